"""Distillation-oriented trainer (DOT): SGD with a momentum of its own for each of two losses.

Source: Zhao et al. 2023 (arXiv:2307.08436), Algorithm 1, with the rules of mdistiller for
parameters that only one of the losses reaches.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["DOT"]


class DOT(torch.optim.Optimizer):
    """SGD in which the gradient of the distillation loss gets more momentum than the task gradient.

    Each step takes two backward passes. Call backward of the distillation loss, then
    `keep_distillation`, then backward of the task loss (the cross-entropy), then `step`. With the
    gradients g_kd and g_task of a parameter p:

        v_task <- (momentum - delta) * v_task + g_task + weight_decay * p
        v_kd   <- (momentum + delta) * v_kd + g_kd
        p      <- p - lr * (v_task + v_kd)

    Both velocities v begin at 0. If only one of the losses reaches a parameter, the velocity of
    this loss is updated with plain `momentum`. If only the distillation loss reaches it, as in a
    connector between student and teacher, weight_decay * p is added to g_kd from the second step
    on, as in mdistiller.

    Args:
        params: parameters, which form one group.
        lr: learning rate.
        momentum: momentum of plain SGD.
        delta: amount by which the momenta of the two velocities differ from `momentum`.
        weight_decay: factor of the parameter that is added to its gradient.

    Raises:
        ValueError: If momentum - delta is negative, momentum + delta is 1 or more, or delta is
            negative.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        momentum: float = 0.9,
        delta: float = 0.075,
        weight_decay: float = 0.0,
    ) -> None:
        if not 0 <= momentum - delta <= momentum + delta < 1:
            raise ValueError(
                f"momentum={momentum} and delta={delta} give the momenta {momentum - delta:g} and "
                f"{momentum + delta:g}; both must be at least 0 and less than 1"
            )
        defaults = {"lr": lr, "momentum": momentum, "delta": delta, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        # Gradients of the distillation losses, between the two backward passes of a step.
        self._distillation: dict[Tensor, Tensor] = {}

    def keep_distillation(self) -> None:
        """Store the present gradients as those of the distillation loss, then clear the gradients.

        Call the method between the two backward passes of a step.
        """
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                self._distillation[parameter] = parameter.grad
        self.zero_grad(set_to_none=True)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the parameters from the stored distillation gradients and the task gradients.

        The task gradients are the present gradients of the parameters. The stored gradients are
        forgotten afterwards. A parameter without any gradient stays as it is. `closure` is ignored.
        """
        (group,) = self.param_groups
        momentum, delta = group["momentum"], group["delta"]
        for parameter in group["params"]:
            task, kd = parameter.grad, self._distillation.get(parameter)
            state = self.state[parameter] if task is not None or kd is not None else {}
            both = task is not None and kd is not None
            if task is not None:
                task = task.add(parameter, alpha=group["weight_decay"])
            elif kd is not None and "v_kd" in state:
                kd = kd.add(parameter, alpha=group["weight_decay"])
            for name, gradient, sign in (("v_task", task, -1), ("v_kd", kd, 1)):
                if gradient is None:
                    continue
                if name in state:
                    state[name].mul_(momentum + sign * delta * both).add_(gradient)
                else:
                    state[name] = gradient.clone()
                parameter.sub_(state[name], alpha=group["lr"])
        self._distillation = {}
