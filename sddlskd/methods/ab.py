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

__all__ = ["AB"]

SCALE = 3 / 1000  # of the loss in the released code


class AB(Method):
    """A first stage in which the student learns when each neuron of the teacher is active.

    The loss is a squared hinge: a neuron counts if it is on the wrong side of zero, or within
    `margin` of it. The sum over neurons is divided by the images and by 1000 / 3, and a stage
    counts half as much as the next one. A connector (convolution and BatchNorm) precedes it where
    the maps of a stage differ in shape. After the first stage the method adds nothing.

    The maps are those before the last ReLU. A network without such maps, whose stages end without a
    ReLU (mobilev2), gives its stages.

    Args:
        student: Taps of the student for any batch.
        teacher: Taps of the teacher for any batch.
        stage_epochs: Number of epochs of the first stage.
        margin: Distance from zero from which a neuron's value is right.

    Raises:
        ValueError: If the numbers of stages differ, if no convolution leads from the sides of a
            student's map to those of the teacher's, or if a value is out of range.
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
                f"the student has {len(own)} stages after the stem and the teacher {len(other)}; "
                "AB serves pairs with equally many stages"
            )
        self.first_stage_epochs = stage_epochs
        self.margin = margin
        self.connectors = nn.ModuleList(
            _Connector(a_BCHW, b_BCHW) if a_BCHW.shape[1:] != b_BCHW.shape[1:] else nn.Sequential()
            for a_BCHW, b_BCHW in zip(own, other, strict=True)
        )

    def first_stage(self, student: Taps, teacher: Taps, batch: Batch) -> Tensor:
        """Return the weighted sum of the hinge losses of the stages."""
        parts = zip(self.connectors, _boundaries(student), _boundaries(teacher), strict=True)
        losses = [self._hinge(connector(own), other) for connector, own, other in parts]
        last = len(losses) - 1
        weighted = [loss * 2.0 ** (place - last) for place, loss in enumerate(losses)]
        return SCALE * sum(weighted[1:], weighted[0])

    def forward(self, student: Taps, teacher: Taps, batch: Batch) -> Tensor:
        """Return zero."""
        return student.logit_map.new_zeros(())

    def _hinge(self, own_BCHW: Tensor, other_BCHW: Tensor) -> Tensor:
        sign_BCHW = (other_BCHW > 0).to(own_BCHW.dtype).mul_(2).sub_(1)
        missing_BCHW = F.relu(self.margin - sign_BCHW * own_BCHW)
        return missing_BCHW.square().sum() / len(own_BCHW)


class _Connector(nn.Module):
    """A convolution and BatchNorm from a map of the student to the shape of the teacher's."""

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
