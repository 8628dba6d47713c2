"""Overhaul of feature distillation (OFD).

Source: Heo et al. 2019 (arXiv:1904.01866), as mdistiller computes it.

Shapes: B batch, C channels, H W sides of a map.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sddlskd.data.device import Batch
from sddlskd.methods.base import Method, check_alignment, check_flags, from_end
from sddlskd.models import LogitMapModel, Taps
from sddlskd.terminal.words import counted

__all__ = ["OFD", "margins"]

MOST_KERNEL = 31  # largest side of the connectors' kernel


class OFD(Method):
    """Loss of OFD: the squared distance of two networks' maps before the last ReLU of each stage.

    A stage is a group of layers after the stem (the first layers). Stages are paired from the last.
    A convolution and a BatchNorm give the student's map (B, C, H, W) the channels of the teacher's.
    The goal of an entry is the teacher's value or the margin of its channel, whichever is larger.
    The margin is the mean of the channel's negative values, see `margins`. An entry whose goal is
    not above 0 counts only if the student's value is above the goal.

    The loss of a stage is the sum of (student - goal)^2 over the entries that count, averaged over
    images. The last stage has weight 1, and each earlier stage half the weight of the next one.

    Args:
        student: Maps of the student (`Taps`) for any batch; only their shapes are read.
        teacher: Maps of the teacher (`Taps`) for any batch; only their shapes are read.
        teacher_network: Teacher, a `LogitMapModel`. The margins come from the BatchNorms that its
            `norms_before_relu` returns.
        alignment: What happens if the teacher has more stages than the student. "strict": a
            ValueError, because the released code cannot train such a pair. "from_end": the
            teacher's first stages are left out. With both values, the first stages of a student
            with more stages are left out.
        stages_for_preacts: Whether a student that shows no maps before a ReLU gives the final maps
            of its stages instead.
        kernel: Side of the convolution's kernel, an odd number in 1..31.

    Raises:
        ValueError: If a network shows no maps before a ReLU (with `stages_for_preacts`, stages of
            the student suffice), if `alignment` is unknown or refuses the two networks, if
            `stages_for_preacts` is not a bool, if `kernel` is not an odd number in 1..31, or if the
            teacher is no `LogitMapModel` that returns one BatchNorm for each stage after the stem.
    """

    needs = frozenset({"preacts"})
    facts = frozenset({"teacher_network"})

    def __init__(
        self,
        student: Taps,
        teacher: Taps,
        *,
        teacher_network: nn.Module,
        alignment: str = "strict",
        stages_for_preacts: bool = False,
        kernel: int = 1,
    ) -> None:
        student = student._replace(preacts=_preacts(student, stages_for_preacts))
        super().__init__(student, teacher)
        self.stages_for_preacts = stages_for_preacts
        check_alignment(alignment)
        check_flags(stages_for_preacts=stages_for_preacts)
        if kernel not in range(1, MOST_KERNEL + 1, 2):
            raise ValueError(f"kernel={kernel} must be an odd number in 1..{MOST_KERNEL}")
        own, other = len(student.preacts) - 1, len(teacher.preacts) - 1
        if alignment == "strict" and other > own:
            raise ValueError(
                f"the teacher has {counted(other, 'stage')} after the stem and the student "
                f"{own}; set "
                "alignment=from_end to leave out the teacher's finest maps"
            )
        norms: tuple[nn.BatchNorm2d, ...] = ()
        if isinstance(teacher_network, LogitMapModel):
            norms = teacher_network.norms_before_relu()
        if len(norms) != other:
            raise ValueError(
                f"the teacher names {counted(len(norms), 'BatchNorm')} for its "
                f"{counted(other, 'stage')}, and OFD needs one for each; choose another "
                "teacher, such as a resnet, wrn or vgg"
            )
        maps = self._pairs(student, teacher)
        self.connectors = nn.ModuleList(_connector(a.shape[1], b.shape[1], kernel) for a, b in maps)
        for i, norm in enumerate(norms[other - len(maps) :]):
            # The margins follow from the teacher, so checkpoints need not hold them.
            self.register_buffer(f"margin_{i}", margins(norm), persistent=False)

    def forward(self, student: Taps, teacher: Taps, batch: Batch) -> Tensor:
        """Return the weighted sum of the stages' squared distances, a scalar.

        If the two maps of a stage differ in height or width, the teacher's map is resized to the
        student's by adaptive average pooling.

        Args:
            student: Maps of the student; `preacts` is read, or `stages` if `stages_for_preacts` is
                set and `preacts` is empty.
            teacher: Maps of the teacher, without gradients; `preacts` is read.
            batch: Unused.

        Returns:
            The sum over channels and positions, averaged over images.
        """
        loss = student.logit_map.new_zeros(())
        parts = zip(self._pairs(student, teacher), self.connectors, strict=True)
        for i, ((own_BCHW, other_BCHW), connector) in enumerate(parts):
            own_BCHW = connector(own_BCHW)
            other_BCHW = F.adaptive_avg_pool2d(other_BCHW, own_BCHW.shape[2:])
            margin_C11 = self.get_buffer(f"margin_{i}")[:, None, None]
            goal_BCHW = torch.maximum(other_BCHW, margin_C11.to(other_BCHW.dtype))
            counts_BCHW = (goal_BCHW > 0) | (own_BCHW > goal_BCHW)
            distance_BCHW = (own_BCHW - goal_BCHW).square() * counts_BCHW
            loss = loss / 2 + distance_BCHW.sum() / len(own_BCHW)
        return loss

    def _pairs(self, student: Taps, teacher: Taps) -> list[tuple[Tensor, Tensor]]:
        own = _preacts(student, self.stages_for_preacts)
        return from_end(own[1:], teacher.preacts[1:])


def _preacts(student: Taps, stages_for_preacts: bool) -> tuple[Tensor, ...]:
    if stages_for_preacts and not student.preacts:
        return student.stages
    return student.preacts


def _connector(own: int, other: int, kernel: int) -> nn.Sequential:
    """Return a convolution and a BatchNorm from the student's channels to the teacher's."""
    conv = nn.Conv2d(own, other, kernel, padding=kernel // 2, bias=False)
    nn.init.normal_(conv.weight, std=math.sqrt(2 / (kernel**2 * other)))
    return nn.Sequential(conv, nn.BatchNorm2d(other))


@torch.no_grad()
def margins(norm: nn.BatchNorm2d) -> Tensor:
    """Return the margin of each channel: the mean of the negative values of a BatchNorm's output.

    The output of a channel is assumed to be normal, with the BatchNorm's bias as mean and its
    |weight| as standard deviation. If at most a thousandth of this distribution is negative, the
    margin is -3 standard deviations. The result is float32, (C,), without a gradient. `norm` must
    have a weight and a bias.
    """
    mean_C = norm.bias.double()
    # With a mean and a standard deviation of zero, the ratio would be NaN.
    std_C = norm.weight.double().abs().clamp(min=1e-30)
    ratio_C = mean_C / std_C
    negative_C = torch.special.ndtr(-ratio_C)
    density_C = (-ratio_C.square() / 2).exp() / math.sqrt(2 * math.pi)
    margin_C = torch.where(negative_C > 0.001, mean_C - std_C * density_C / negative_C, -3 * std_C)
    return margin_C.float()
