"""Try a loss and an optimizer on small tensors, before a job (one training run) writes anything.

A configuration names a loss and an optimizer with their arguments. Only a call shows whether they
take these arguments, and whether they work as the training loop uses them.

Shapes: B batch, N regions of a batch, K classes, H W map sides.
"""

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from sddlskd.config.targets import MissingCode, instantiate
from sddlskd.distill import ScaleDecoupled, WrongShape, takes_label_sets

__all__ = ["try_loss", "try_optimizer"]

IMAGES = 8  # number of images in the batch of random logits


def try_loss(
    loss: Mapping[str, Any],
    num_classes: int,
    learned_temperature: Mapping[str, Any] | None = None,
) -> None:
    """Check that a distillation loss and its gradient can be computed for random logits on the CPU.

    Args:
        loss: `_target_` (dotted name) and arguments of the loss. The loss is a function
            (student_NK, teacher_NK, target_N) -> loss_N of the logits and class ids of N samples.
        num_classes: K, the number of classes.
        learned_temperature: `_target_` and arguments of a learnt temperature, a module that maps an
            epoch to the value that the loss takes as `temperature`. None for the loss's own
            temperature.

    Raises:
        MissingCode: If the loss or the learnt temperature cannot be found or imported. The error is
            a ValueError.
        ValueError: If the loss or the learnt temperature cannot be used: it is not allowed or
            raises an error; the loss returns another shape than (N,); the loss or its gradient is
            not finite; or no gradient reaches the student's logits.
    """
    options = {}
    if learned_temperature:
        try:
            options["temperature"] = instantiate(learned_temperature)(1)
        except MissingCode:
            raise
        except Exception as error:  # arguments that the class does not take
            raise ValueError(
                f"distiller.learned_temperature={_call(learned_temperature)} cannot be built "
                f"({_reason(error)}); give the arguments that it takes"
            ) from error
    generator = torch.Generator().manual_seed(0)
    shape_BKHW = (IMAGES, num_classes, 1, 1)
    student_BKHW = torch.randn(shape_BKHW, generator=generator).requires_grad_()
    teacher_BKHW = torch.randn(shape_BKHW, generator=generator)
    target_B = torch.arange(IMAGES) % num_classes
    cure = "give the arguments that it takes"
    try:
        per_sample = instantiate(loss, _partial_=True)
        if not _takes_three(per_sample):
            cure = "a loss takes (student, teacher, target)"
        distill = ScaleDecoupled(per_sample, [1])
        if takes_label_sets(per_sample):
            target_B = F.one_hot(target_B, num_classes)
        with torch.random.fork_rng(devices=[]):
            value = distill(student_BKHW, teacher_BKHW, target_B, **options)
            if value.requires_grad:
                value.backward()  # type: ignore[no-untyped-call]
    except MissingCode:
        raise
    except WrongShape as error:
        raise ValueError(f"distiller.loss={_call(loss)} cannot be used: {error}") from error
    except Exception as error:  # code of a user may raise anything
        raise ValueError(
            f"distiller.loss={_call(loss)} cannot be computed ({_reason(error)}); "
            f"{cure}, or choose another distiller"
        ) from error
    gradient_BKHW = student_BKHW.grad
    if gradient_BKHW is None:
        raise ValueError(
            f"distiller.loss={_call(loss)} has no gradient for the student; is there a detach() or "
            "no_grad() in it?"
        )
    if not (value.isfinite() and gradient_BKHW.isfinite().all()):
        raise ValueError(
            f"distiller.loss={_call(loss)} is {value.item()} for random logits, or its gradient "
            "is not finite; give it other arguments"
        )


def try_optimizer(algorithm: Mapping[str, Any], lr: float, device: torch.device) -> None:
    """Check that an optimizer can update the weights of a convolution and of a normalisation layer.

    One step is taken with weights and gradients of one.

    Args:
        algorithm: `_target_` (dotted name) and arguments of the optimizer, without params and lr.
        lr: learning rate.
        device: device of the weights.

    Raises:
        MissingCode: If the optimizer cannot be found or imported. The error is a ValueError.
        ValueError: If the optimizer cannot be used: `algorithm` has an argument "lr", or the
            optimizer is not allowed, is no torch optimizer, raises an error, or makes a weight
            infinite or NaN.
    """
    if "lr" in algorithm:
        raise ValueError(
            f"optimizer.algorithm.lr={algorithm['lr']} would be ignored; set optimizer.lr instead"
        )
    weights = [torch.ones(shape, device=device) for shape in ((2, 3, 3, 3), (2,))]
    parameters = [nn.Parameter(weight) for weight in weights]
    try:
        optimizer = instantiate(algorithm, _partial_=True)(parameters, lr=lr)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"it is a {type(optimizer).__name__}, which is no optimizer")
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    except MissingCode:
        raise
    except Exception as error:  # an optimizer of a user may raise anything
        raise ValueError(
            f"optimizer.algorithm={_call(algorithm)} cannot update a network ({_reason(error)}); "
            "give the arguments that it takes, or choose another optimizer"
        ) from error
    if not all(parameter.isfinite().all() for parameter in parameters):
        raise ValueError(
            f"optimizer.algorithm={_call(algorithm)} makes weights infinite or NaN in one step "
            f"with lr={lr}; give it other arguments"
        )


def _takes_three(loss: partial[Any]) -> bool:
    """Return whether a loss takes three positional arguments; true if that is not known."""
    try:
        inspect.signature(loss.func).bind_partial(None, None, None)
    except TypeError:
        return False
    except ValueError:  # a function in C may not tell
        return True
    return True


def _call(node: Mapping[str, Any]) -> str:
    """Return a target with its arguments as a call, such as torch.optim.SGD(momentum=0.9)."""
    arguments = [f"{name}={value!r}" for name, value in node.items() if name != "_target_"]
    return f"{node.get('_target_')}({', '.join(arguments)})"


def _reason(error: Exception) -> str:
    """Return one line with the type of an error and the beginning of its message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
