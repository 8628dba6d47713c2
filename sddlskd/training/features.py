"""Build the feature and relation methods of a job (one training run) for its two networks.

Taps are what a network shows of a batch: its logit map and the maps on the way to it.

Shapes: B batch, C channels, H W sides, K classes, N training images.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from inspect import Parameter, signature
from pathlib import Path
from traceback import extract_tb
from typing import Any

import torch
from torch import Tensor, nn

from sddlskd.config import Config, Views
from sddlskd.config.checks import DOT_TARGET
from sddlskd.config.sources import source_of
from sddlskd.config.targets import foreign_targets, instantiate
from sddlskd.data.device import Batch, seed_of
from sddlskd.methods import Method, Taps
from sddlskd.methods.base import NEEDS
from sddlskd.models import ForeignNetwork, LogitMapModel
from sddlskd.training.build import build_network, without_weights
from sddlskd.training.devices import seeded
from sddlskd.training.objective import Feature
from sddlskd.training.teacher import image_of_teacher

__all__ = ["build_features", "rebuild_student", "reuses_teacher", "student_network"]

# Shape of an image that all networks of this package accept. The channels of their maps do not
# depend on its sides.
PROBE_CHW: tuple[int, ...] = (3, 64, 64)


def reuses_teacher(job: Config) -> bool:
    """Return whether the student of a job contains a part of the teacher's network.

    This is the case if a feature method of the job builds such a student. SimKD is an example: its
    student ends in the teacher's head. Raise ValueError if a method's `_target_` is not allowed or
    cannot be found.
    """
    return any(_wrapper(_method_of(feature.method)) for feature in job.features.values())


def student_network(
    job: Config,
    student: nn.Module,
    teacher: nn.Module,
    *,
    image_CHW: Sequence[int],
    device: torch.device,
) -> nn.Module:
    """Return the network that a job trains as its student.

    Most feature methods train `student` itself. A method such as SimKD puts `student` into a larger
    network that contains parts of the teacher. The initial values of new weights depend on the
    job's seed alone. The CPU's global random state is left unchanged.

    Args:
        job: configuration of the training run.
        student: network of the student.
        teacher: network of the teacher, whose BatchNorm layers are not folded into convolutions.
        image_CHW: (C, H, W) of an image.
        device: device of the networks.

    Returns:
        `student` itself, or the larger network on `device` in the channels_last memory format.

    Raises:
        ValueError: If a method is not allowed, cannot be found, cannot serve these networks or does
            not take its options.
        torch.OutOfMemoryError: If the device is full.
    """
    for name, feature in job.features.items():
        build = _method_of(feature.method)
        wrap = _wrapper(build)
        if wrap is None:
            continue
        with seeded(seed_of("seed", job.seed, "student of", name), device), _refused_as(job, name):
            shown = _example(student, image_CHW, device)
            student = wrap(student, teacher, shown, **build.keywords)
        student.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return student


def rebuild_student(job: Config, device: torch.device) -> nn.Module:
    """Return the network that a job trained as its student, without the trained weights.

    The caller loads the trained weights. No published weights are downloaded, and the teacher's
    file is not read.

    Args:
        job: configuration with which the student was trained.
        device: device of the network.

    Returns:
        The network with initial weights, in the channels_last memory format.

    Raises:
        ValueError: If a feature method cannot serve the job's networks or does not take its
            options, or if the `_target_` of a network or a method is not allowed or cannot be
            found.
        InstantiationException: If the code of a network raises an error.
    """
    classes = job.dataset.num_classes
    student = build_network(without_weights(job.student.model), classes, job.seed, device)
    if not reuses_teacher(job):
        return student
    teacher = build_network(without_weights(job.teacher.model), classes, 0, device)
    image_CHW = PROBE_CHW
    if isinstance(student, ForeignNetwork):  # a transformer may accept images of one size alone
        image_CHW = student.image_CHW
    return student_network(job, student, teacher, image_CHW=image_CHW, device=device)


def build_features(
    job: Config,
    student: nn.Module,
    teacher: nn.Module,
    *,
    image_CHW: Sequence[int],
    labels_N: Tensor,
    device: torch.device,
) -> dict[str, Feature]:
    """Return the feature and relation methods of a job, by name, on the device.

    A method is a loss that compares inner maps or features of student and teacher. Its connectors,
    layers that are trained with the student, are initialised from the job's seed alone. The CPU's
    global random state and the training or eval modes of both networks are left unchanged.

    Args:
        job: configuration of the training run.
        student: network that is trained as the student, see `student_network`.
        teacher: network of the teacher, whose BatchNorm layers are not folded into convolutions.
            Some methods read its weights.
        image_CHW: (C, H, W) of an image as the student sees it.
        labels_N: class of each training image, int64, on the CPU.
        device: device of the networks and of the methods.

    Returns:
        Each method with its weight and warm-up, in the order of `job.features`; {} without methods.

    Raises:
        ValueError: If a method cannot be used: it does not suit the networks, does not take its
            options, needs two views of an image while the job has one, or begins with a first stage
            without a task loss while the optimizer is DOT, which needs this loss.
        torch.OutOfMemoryError: If the device is full.
    """
    if not job.features:
        return {}
    teachers_CHW = image_of_teacher(image_CHW, job.teacher.image_size)
    taps = [_example(student, image_CHW, device), _example(teacher, teachers_CHW, device)]
    facts = {
        "labels_N": labels_N,
        "num_classes": job.dataset.num_classes,
        "seed": job.seed,
        "batch_size": job.trainer.batch_size,
        "drop_last": job.dataset.drop_last,
        "teacher_network": teacher,
    }
    features = {}
    for name, feature in job.features.items():
        with seeded(seed_of("seed", job.seed, "method", name), device), _refused_as(job, name):
            method = _build(feature.method, taps, facts)
            _try(method.to(device), taps, images_CHW=image_CHW)
        if method.first_stage_epochs and job.optimizer.algorithm.get("_target_") == DOT_TARGET:
            raise ValueError(
                f"features={name} has a first stage without a task loss, which DOT needs; "
                "set optimizer=sgd"
            )
        if "strong_map" in method.needs and job.dataset.views == Views.weak:
            raise ValueError(
                f"features={name} needs two views of each image; set dataset.views=weak_strong"
            )
        features[name] = Feature(method.to(device), feature.weight, feature.warmup_epochs)
    return features


def _method_of(arguments: dict[str, Any]) -> partial[Any]:
    """Return a partial of the class of a method, with the options of the configuration."""
    build: partial[Any] = instantiate(arguments, _partial_=True)
    return build


def _wrapper(build: partial[Any]) -> Callable[..., nn.Module] | None:
    """Return the function with which a method puts the student into another network.

    `build` is a partial of the method's class. Return None if the method trains the student itself.
    """
    wrap: Callable[..., nn.Module] | None = getattr(build.func, "student_network", None)
    inherited = getattr(wrap, "__func__", None) is getattr(Method.student_network, "__func__", 0)
    if inherited:
        return None
    return wrap


@contextmanager
def _refused_as(job: Config, name: str) -> Iterator[None]:
    """Raise a method's error as a ValueError that names the method and the two networks."""
    try:
        yield
    except torch.OutOfMemoryError:  # the group is tried again with fewer runs
        raise
    except Exception as error:  # a method of a user may raise anything
        raise ValueError(
            f"features={name} cannot serve teacher={job.teacher.name} and "
            f"student={job.student.name}: {_said(error, job.features[name].method)}"
        ) from error


def _said(error: Exception, method: dict[str, Any]) -> str:
    """Return the message of a method's error, with the line of the user's file that raised it.

    `method` has the `_target_` of the method. Errors of this package's methods name no line.
    """
    said = " ".join(str(error).split())[:300]
    if isinstance(error, AttributeError) and isinstance(error.obj, Taps):
        said += f"; it has {', '.join(NEEDS)}"
    files = {str(source_of(target)[1]) for target in foreign_targets(method)}
    own = [frame for frame in extract_tb(error.__traceback__) if frame.filename in files]
    if not own:
        return said
    if not isinstance(error, ValueError):
        said = f"{type(error).__name__}: {said}"
    return f"{Path(own[-1].filename).name}, line {own[-1].lineno}: {said}"


def _build(arguments: dict[str, Any], taps: Sequence[Taps], facts: dict[str, Any]) -> Method:
    """Return the method that `_target_` and its options describe."""
    build = _method_of(arguments)
    wanted: frozenset[str] = getattr(build.func, "facts", frozenset())
    parameters = signature(build.func).parameters.values()
    by_place = [one for one in parameters if one.kind <= one.POSITIONAL_OR_KEYWORD][: len(taps)]
    star = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    taken = [one.name for one in parameters if one not in by_place and one.kind not in star]
    takes_any = any(one.kind is one.VAR_KEYWORD for one in parameters)
    unknown = [name for name in build.keywords if name not in taken]
    if unknown and not takes_any:
        valid = ", ".join(name for name in taken if name not in wanted) or "none"
        raise ValueError(f"{', '.join(unknown)} is no argument of the method; valid are {valid}")
    method: Method = build(*taps, **{name: facts[name] for name in wanted})
    return method


@torch.no_grad()
def _try(method: Method, taps: Sequence[Taps], *, images_CHW: Sequence[int]) -> None:
    """Compute the losses of a method for two images, so that unfit options raise an error now.

    The computation uses a copy of the method, so the method itself stays unchanged. Raise
    ValueError if a loss is no scalar.
    """
    student, teacher = (one._replace(strong_map=one.logit_map).wide() for one in taps)
    device = student.logit_map.device
    images_BCHW = torch.zeros(2, *images_CHW, device=device)
    labels_B = torch.zeros(2, dtype=torch.int64, device=device)
    batch = Batch(images_BCHW, labels_B, torch.arange(2), views=None, strong=images_BCHW)
    trial = copy.deepcopy(method)
    if trial.first_stage_epochs:
        first_loss = trial.first_stage(student, teacher, batch._replace(epoch=0))
        _check_scalar(first_loss, "first_stage")
    _check_scalar(trial(student, teacher, batch), "forward")


def _check_scalar(loss: object, function: str) -> None:
    """Raise ValueError if the result of a method's function is no scalar tensor."""
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"{function} returned a {type(loss).__name__}; it must return a scalar tensor, without "
            ".item() or float()"
        )
    if loss.ndim:
        raise ValueError(
            f"{function} returned shape {tuple(loss.shape)}; it must return a scalar, such as "
            "'return loss.mean()'"
        )


@torch.no_grad()
def _example(network: nn.Module, image_CHW: Sequence[int], device: torch.device) -> Taps:
    """Return the taps of two images of zeros, computed in eval mode.

    A network that is no LogitMapModel shows its logit map alone.
    """
    images_BCHW = torch.zeros(2, *image_CHW, device=device)
    was_training = network.training
    network.eval()
    try:
        if isinstance(network, LogitMapModel):
            return network.taps(images_BCHW)
        return Taps.of_map(network(images_BCHW))
    finally:
        network.train(was_training)
