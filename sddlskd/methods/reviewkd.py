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
from sddlskd.terminal.words import counted

__all__ = ["ReviewKD"]

SCALES = (4, 2, 1)  # sides of the coarser maps of a level that are compared, too
MOST_CHANNELS = 512  # largest number of channels of the fused maps


class ReviewKD(Method):
    """Loss of ReviewKD: the distance of the teacher's levels from fused levels of the student.

    A stage is a group of layers after the stem (the first layers). The levels of a network are the
    maps (B, C, H, W) of its stages and, on top, the pooled features (the input of the classifier)
    as a map of 1x1. The teacher's maps are taken before the last ReLU of a stage. From the top
    down, each level of the student is fused with the result of the level above and resized to the
    sides of the teacher's level. Both levels are then compared at several scales. The losses of the
    levels are summed.

    Args:
        student: Maps of the student (`Taps`) for any batch; only their shapes are read.
        teacher: Maps of the teacher (`Taps`) for any batch; only their shapes are read.
        alignment: What happens if the two networks have different numbers of stages. "strict": a
            ValueError, because the released code cannot train such a pair. "from_end": the first
            stages of the network with more stages are left out. With both values, the levels are
            paired from the top.
        student_preacts: Whether the student's maps are taken before the last ReLU, too.
        labels_N: Class of each training image, (N,), of which only the number N is read. None to
            leave out the check for a batch of one image.
        batch_size: Images per batch. None to leave out the check for a batch of one image.
        drop_last: Whether an epoch leaves out its last batch if that batch is smaller.

    Raises:
        ValueError: If a network shows no stages after the stem or no pooled features, if the
            teacher (or, with `student_preacts`, the student) shows no maps before a ReLU, if
            `alignment` is unknown or refuses the two networks, if `student_preacts` is not a bool,
            or if N images in batches of `batch_size` leave a batch of one image, which BatchNorm
            cannot normalise, and `drop_last` is not set.
    """

    needs = frozenset({"stages", "preacts", "pooled"})
    facts = frozenset({"labels_N", "batch_size", "drop_last"})

    def __init__(
        self,
        student: Taps,
        teacher: Taps,
        *,
        alignment: str = "strict",
        student_preacts: bool = False,
        labels_N: Tensor | None = None,
        batch_size: int | None = None,
        drop_last: bool = False,
    ) -> None:
        if not student_preacts:
            student = student._replace(preacts=student.stages)
        super().__init__(student, teacher)
        check_alignment(alignment)
        check_flags(student_preacts=student_preacts)
        own, other = len(student.preacts) - 1, len(teacher.preacts) - 1
        if alignment == "strict" and own != other:
            raise ValueError(
                f"the student has {counted(own, 'stage')} after the stem and the teacher "
                f"{other}; set "
                "alignment=from_end to leave out the finest maps of the network that has more"
            )
        if labels_N is not None and batch_size is not None and not drop_last:
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
        """Return the sum over levels of the distance between fused level and teacher's level.

        Args:
            student: Maps of the student; `pooled` is read, and `stages` or, with `student_preacts`,
                `preacts`.
            teacher: Maps of the teacher, without gradients; `pooled` and `preacts` are read.
            batch: Unused.

        Returns:
            A scalar. The distance of a level is a weighted mean of mean squared errors: of the maps
            themselves, and of the maps average-pooled to the sides 4, 2 and 1 (only to sides
            smaller than the map's). In this order, each error has half the weight of the one
            before.
        """
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
    """Attention-based fusion (ABF) of a student's level (a map) with the result of the level above.

    Args:
        own: Channels of the student's level.
        width: Channels of the fused map.
        other: Channels of the teacher's level.
        is_top: Whether the level is the top one, above which there is no fused map.
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
        """Return the level to compare with the teacher's, and the fused map for the level below.

        Args:
            own_BCHW: Student's level, (B, own, H, W).
            above_BCHW: Fused map of the level above, (B, width, h, w), whose sides may differ from
                H and W. Not read at the top.
            sides: Height and width of the teacher's level.

        Returns:
            Two maps with the height and width of `sides`: the first with `other` channels, the
            second with `width` channels.

        Raises:
            AssertionError: If `above_BCHW` is None below the top.
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
    """Return the levels (B, C, H, W) of a network: the pooled features, then its stages in reverse.

    The stem is left out.
    """
    return [pooled_BC[:, :, None, None], *reversed(maps[1:])]


def _distance(own_BCHW: Tensor, other_BCHW: Tensor) -> Tensor:
    """Return the hierarchical context loss: a weighted mean of squared errors at several scales.

    The full maps have weight 1. They are also pooled to the sides in `SCALES` that are smaller than
    their own. Each of these scales has half the weight of the scale before.
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
    """Raise ValueError if an epoch of `images` images would have a batch of only one image."""
    if batch_size == 1 or images % batch_size == 1:
        raise ValueError(
            "ReviewKD normalises the pooled features over a batch and cannot train on one image; "
            f"{images} images in batches of {batch_size} leave one: set another "
            "trainer.batch_size, or dataset.drop_last=true"
        )
