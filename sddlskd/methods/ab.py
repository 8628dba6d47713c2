"""Activation boundaries (AB).

Source: Heo et al. 2019, "Knowledge Transfer via Distillation of Activation Boundaries Formed by
Hidden Neurons" (arXiv:1811.03233), as RepDistiller computes it.

Shapes: B batch, C channels, H W sides of a map.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from sddlskd.data.device import Batch
from sddlskd.methods.base import Method, check_stage_epochs, conv_between
from sddlskd.models import Taps
from sddlskd.terminal.words import counted

__all__ = ["AB"]

SCALE = 3 / 1000  # factor of the loss in the released code


class AB(Method):
    """Loss of AB: before epoch 1, the student learns which neurons of the teacher are active.

    The networks are compared in the first `stage_epochs` epochs, which are numbered ..., -1, 0.
    From epoch 1 on, the loss is 0.

    Both networks give one map (B, C, H, W) for each group of layers after the stem (the first
    layers), taken before the last ReLU. A network without such maps gives the final maps of these
    groups instead. A convolution and BatchNorm are applied to a student's map that differs from the
    teacher's map in shape.

    A neuron is one entry of a map. It is active if its value is above 0. The loss of a neuron is
    max(margin - sign * x, 0)^2, with x the student's value and sign = 1 if the teacher's neuron is
    active, else -1. The loss of a map is the sum over its neurons, averaged over images. The last
    map has weight 3 / 1000, and each earlier map half the weight of the next one.

    Args:
        student: Maps of the student (`Taps`) for any batch; only their shapes are read.
        teacher: Maps of the teacher (`Taps`) for any batch; only their shapes are read.
        stage_epochs: Number of epochs before epoch 1, at least 1.
        margin: Margin of the loss, not negative. A neuron has no loss if sign * x >= margin.

    Raises:
        ValueError: If a network shows no map after the stem, if the networks show different numbers
            of maps, if `conv_between` has no convolution for two maps, if `stage_epochs` is not an
            integer of at least 1, or if `margin` is negative or NaN.
    """

    needs = frozenset({"stages"})

    def __init__(
        self, student: Taps, teacher: Taps, *, stage_epochs: int = 30, margin: float = 1.0
    ) -> None:
        super().__init__(student, teacher)
        check_stage_epochs(stage_epochs)
        if not margin >= 0:
            raise ValueError(f"margin={margin} must not be negative")
        own, other = _boundaries(student), _boundaries(teacher)
        if len(own) != len(other):
            raise ValueError(
                f"the student has {counted(len(own), 'stage')} after the stem "
                f"and the teacher {len(other)}; "
                "AB serves pairs with equally many stages"
            )
        self.first_stage_epochs = stage_epochs
        self.margin = margin
        self.connectors = nn.ModuleList(
            _Connector(a_BCHW, b_BCHW) if a_BCHW.shape[1:] != b_BCHW.shape[1:] else nn.Sequential()
            for a_BCHW, b_BCHW in zip(own, other, strict=True)
        )

    def first_stage(self, student: Taps, teacher: Taps, batch: Batch) -> Tensor:
        """Return the weighted sum over maps of the neurons' losses, a scalar.

        Args:
            student: Maps of the student; `preacts` is read, or `stages` if `preacts` is empty.
            teacher: Maps of the teacher, without gradients; `preacts` or `stages` is read likewise.
            batch: Unused.

        Returns:
            The loss: the sum over neurons, averaged over the images of the batch.
        """
        parts = zip(self.connectors, _boundaries(student), _boundaries(teacher), strict=True)
        losses = [self._hinge(connector(own), other) for connector, own, other in parts]
        last = len(losses) - 1
        weighted = [loss * 2.0 ** (place - last) for place, loss in enumerate(losses)]
        return SCALE * sum(weighted[1:], weighted[0])

    def forward(self, student: Taps, teacher: Taps, batch: Batch) -> Tensor:
        """Return 0, because the method adds no loss from epoch 1 on.

        Args:
            student: Maps of the student; only the device and dtype of `logit_map` are read.
            teacher: Unused.
            batch: Unused.

        Returns:
            A scalar tensor without a gradient.
        """
        return student.logit_map.new_zeros(())

    def _hinge(self, own_BCHW: Tensor, other_BCHW: Tensor) -> Tensor:
        sign_BCHW = (other_BCHW > 0).to(own_BCHW.dtype).mul_(2).sub_(1)
        missing_BCHW = F.relu(self.margin - sign_BCHW * own_BCHW)
        return missing_BCHW.square().sum() / len(own_BCHW)


class _Connector(nn.Module):
    """A convolution and BatchNorm that give a map of the student the shape of the teacher's map."""

    def __init__(self, own_BCHW: Tensor, other_BCHW: Tensor) -> None:
        super().__init__()
        self.conv = conv_between(own_BCHW, other_BCHW)
        self.bn = nn.BatchNorm2d(other_BCHW.shape[1])

    def forward(self, own_BCHW: Tensor) -> Tensor:
        connected: Tensor = self.bn(self.conv(own_BCHW))
        return connected


def _boundaries(taps: Taps) -> Sequence[Tensor]:
    """Return the maps after the stem whose signs say which neurons are active."""
    return (taps.preacts or taps.stages)[1:]
