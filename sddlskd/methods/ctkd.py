"""Curriculum temperature (CTKD): a temperature that is trained to increase the distillation loss.

Source: Li et al. 2023 (arXiv:2211.16231), the global temperature, as the authors' code computes it.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["LearnedTemperature"]


class LearnedTemperature(nn.Module):
    """Temperature in (start, start + span) that is trained to increase the distillation loss.

    The temperature is start + span * sigmoid(theta), with a parameter theta that is 1 at the
    beginning. In the backward pass, the gradient of theta is multiplied by the factor

        -(1 - cos(pi * min(epoch, ramp_epochs) / ramp_epochs)) / 2

    The factor is between -1 and 0 before epoch `ramp_epochs`, and -1 from that epoch on. An
    optimizer that decreases the loss therefore changes theta so that the loss increases.

    Args:
        start: Lower limit of the temperature (the authors' t_start).
        span: Upper limit of the temperature minus `start` (the authors' t_end).
        ramp_epochs: First epoch in which the factor is -1.

    Raises:
        ValueError: If an argument is not greater than 0.
    """

    def __init__(self, *, start: float = 1.0, span: float = 20.0, ramp_epochs: int = 10) -> None:
        super().__init__()
        for name, value in (("start", start), ("span", span), ("ramp_epochs", ramp_epochs)):
            if not value > 0:
                raise ValueError(f"{name}={value} must be greater than 0")
        self.start, self.span, self.ramp_epochs = start, span, ramp_epochs
        self.global_T = nn.Parameter(torch.ones(1))  # theta, named as in the authors' code

    def forward(self, epoch: int) -> Tensor:
        """Return the temperature, a scalar tensor with a gradient.

        `epoch`, which counts from 1, changes only the gradient of theta, not the temperature.
        """
        theta: Tensor = _ScaledGradient.apply(self.global_T, self.factor(epoch))
        return (self.start + self.span * torch.sigmoid(theta))[0]

    def factor(self, epoch: int) -> float:
        """Return the factor of the gradient of theta in an epoch, which counts from 1."""
        done = min(epoch, self.ramp_epochs) / self.ramp_epochs
        return -(1 - math.cos(math.pi * done)) / 2


class _ScaledGradient(torch.autograd.Function):
    """Identity function whose gradient is multiplied by a factor."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.factor * gradient, None
