"""Knowledge review (ReviewKD).

Source: Chen et al. 2021 (arXiv:2104.09044), as the authors' code and mdistiller compute it.

Shapes: B batch, C channels, H W sides of a map.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sddlskd.data.device import Batch
from sddlskd.methods.base import Method, check_alignment, check_flags
from sddlskd.models import Taps

__all__ = ["ReviewKD"]

SCALES = (4, 2, 1)  # sides of the coarser maps that a level is compared at, too
MOST_CHANNELS = 512  # most channels of the fused maps


class ReviewKD(Method):
    """The distance of the teacher's levels from the student's, each fused with the levels above it.

    The levels of a network are its stages after the stem, and the pooled features on top. From the
    top down, the student's level is fused with what comes from above, and the result is compared
    with the teacher's level, at several scales. The levels are summed.

    Args:
        student: Taps of the student for any batch.
        teacher: Taps of the teacher for any batch.
        alignment: Which levels are paired: always the top with the top. "strict": both networks
            must have equally many stages, as in the released code. "from_end": leave out the finest
            maps of the network that has more.
        student_preacts: Whether to read the student's stages before their last ReLU.
        labels_N: Class of each training image; None if the sizes of the batches are unknown.
        batch_size: Images per batch; None if it is unknown.

    Raises:
        ValueError: If the alignment is unknown or cannot serve the pair, if a network lacks what
            the method reads, or if a batch has only one image, because the pooled features are
            normalised over the batch.
    """

    needs = frozenset({"stages", "preacts", "pooled"})
    facts = frozenset({"labels_N", "batch_size"})

    def __init__(
        self,
        student: Taps,
        teacher: Taps,
        *,
        alignment: str = "strict",
        student_preacts: bool = False,
        labels_N: Tensor | None = None,
        batch_size: int | None = None,
    ) -> None:
        if not student_preacts:
            student = student._replace(preacts=student.stages)
        super().__init__(student, teacher)
        check_alignment(alignment)
        check_flags(student_preacts=student_preacts)
        own, other = len(student.preacts) - 1, len(teacher.preacts) - 1
        if alignment == "strict" and own != other:
            raise ValueError(
                f"the student has {own} stages after the stem and the teacher {other}; set "
                "alignment=from_end to leave out the finest maps of the network that has more"
            )
        if labels_N is not None and batch_size is not None:
            _check_batches(len(labels_N), batch_size)
        self.student_preacts = student_preacts
        self.levels = min(own, other) + 1
        own_maps = _from_top(student.preacts, student.pooled)[: self.levels]
        other_maps = _from_top(teacher.preacts, teacher.pooled)[: self.levels]
        width = min(MOST_CHANNELS, student.pooled.shape[1])
        self.abfs = nn.ModuleList(
            Fusion(a.shape[1], width, b.shape[1], is_top=i == 0)
            for i, (a, b) in enumerate(zip(own_maps, other_maps, strict=True))
        )

    def forward(self, student: Taps, teacher: Taps, batch: Batch) -> Tensor:
        """Return the sum over levels of the distance at several scales."""
        maps = student.stages
        if self.student_preacts:
            maps = student.preacts
        losses = []
        above_BCHW: Tensor | None = None
        parts = zip(
            _from_top(maps, student.pooled)[: self.levels],
            _from_top(teacher.preacts, teacher.pooled)[: self.levels],
            self.abfs,
            strict=True,
        )
        for own_BCHW, other_BCHW, fusion in parts:
            fuse = cast(Fusion, fusion)
            level_BCHW, above_BCHW = fuse(own_BCHW, above_BCHW, other_BCHW.shape[2:])
            losses.append(_distance(level_BCHW, other_BCHW))
        return sum(losses[1:], losses[0])


class Fusion(nn.Module):
    """Attention-based fusion (ABF) of a level of the student with what comes from above.

    Args:
        own: Channels of the student's level.
        width: Channels of the fused map.
        other: Channels of the teacher's level.
        is_top: Whether nothing comes from above.
    """

    def __init__(self, own: int, width: int, other: int, *, is_top: bool) -> None:
        super().__init__()
        self.conv1 = _conv_bn(own, width, 1)
        self.conv2 = _conv_bn(width, other, 3)
        self.att_conv: nn.Module | None = None
        if not is_top:
            self.att_conv = nn.Sequential(nn.Conv2d(2 * width, 2, 1), nn.Sigmoid())

    def forward(
        self, own_BCHW: Tensor, above_BCHW: Tensor | None, sides: torch.Size
    ) -> tuple[Tensor, Tensor]:
        """Return the level to compare with the teacher's, and the map for the level below.

        Args:
            own_BCHW: The student's level.
            above_BCHW: The map from the level above; None at the top.
            sides: Height and width of the teacher's level.
        """
        fused_BCHW = self.conv1(own_BCHW)
        if self.att_conv is not None:
            assert above_BCHW is not None
            above_BCHW = F.interpolate(above_BCHW, fused_BCHW.shape[2:], mode="nearest")
            share_B2HW = self.att_conv(torch.cat([fused_BCHW, above_BCHW], dim=1))
            fused_BCHW = fused_BCHW * share_B2HW[:, :1] + above_BCHW * share_B2HW[:, 1:]
        if fused_BCHW.shape[2:] != sides:
            fused_BCHW = F.interpolate(fused_BCHW, tuple(sides), mode="nearest")
        return self.conv2(fused_BCHW), fused_BCHW


def _conv_bn(channels: int, out: int, kernel: int) -> nn.Sequential:
    conv = nn.Conv2d(channels, out, kernel, padding=kernel // 2, bias=False)
    nn.init.kaiming_uniform_(conv.weight, a=1)
    return nn.Sequential(conv, nn.BatchNorm2d(out))


def _from_top(maps: tuple[Tensor, ...], pooled_BC: Tensor) -> list[Tensor]:
    """Return the levels B C H W of a network: the pooled features, then the last map, ...."""
    return [pooled_BC[:, :, None, None], *reversed(maps[1:])]


def _distance(own_BCHW: Tensor, other_BCHW: Tensor) -> Tensor:
    """Return the hierarchical context loss: the mean of squared errors at several scales.

    The full maps have weight 1, and each coarser scale has half the weight of the scale before.
    """
    loss = F.mse_loss(own_BCHW, other_BCHW)
    weight = total = 1.0
    for side in SCALES:
        if side < own_BCHW.shape[2]:
            weight /= 2
            total += weight
            own_coarse = F.adaptive_avg_pool2d(own_BCHW, side)
            other_coarse = F.adaptive_avg_pool2d(other_BCHW, side)
            loss = loss + weight * F.mse_loss(own_coarse, other_coarse)
    return loss / total


def _check_batches(images: int, batch_size: int) -> None:
    """Raise ValueError if a batch of an epoch has only one image."""
    if batch_size == 1 or images % batch_size == 1:
        raise ValueError(
            "ReviewKD normalises the pooled features over a batch and cannot train on one image; "
            f"{images} images in batches of {batch_size} leave one: set another trainer.batch_size"
        )
