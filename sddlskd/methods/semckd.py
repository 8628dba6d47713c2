"""Cross-layer distillation with semantic calibration (SemCKD).

Source: Chen et al. 2021 (arXiv:2012.03236), as the authors' code computes it.

Shapes: B batch, C channels, H W sides of a map, D channels of queries and keys, S stages of the
student after the stem, T stages of the teacher after the stem.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sddlskd.data.device import Batch
from sddlskd.methods.base import Method, at_smaller_side
from sddlskd.models import Taps

__all__ = ["SemCKD"]


class MLPEmbed(nn.Module):
    """Two linear layers with a ReLU between them; the output vectors are scaled to length 1.

    Args:
        dim_in: Channels of the input.
        dim_out: Channels of the output; the hidden layer has twice as many.
    """

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(dim_in, 2 * dim_out)
        self.linear2 = nn.Linear(2 * dim_out, dim_out)

    def forward(self, x_BC: Tensor) -> Tensor:
        """Return vectors (B, dim_out) of length 1 for the input (B, dim_in)."""
        return F.normalize(self.linear2(self.linear1(x_BC).relu()), dim=1)


class Proj(nn.Module):
    """Convolutions of 1x1, 3x3 and 1x1 that change the number of channels of a map.

    BatchNorm and ReLU follow each of the first two convolutions.

    Args:
        channels: Channels of the input.
        target: Channels of the output; the hidden layers have twice as many.
    """

    def __init__(self, channels: int, target: int) -> None:
        super().__init__()
        middle = 2 * target
        self.regressor = nn.Sequential(
            nn.Conv2d(channels, middle, 1, bias=False),
            nn.BatchNorm2d(middle),
            nn.ReLU(inplace=True),
            nn.Conv2d(middle, middle, 3, padding=1, bias=False),
            nn.BatchNorm2d(middle),
            nn.ReLU(inplace=True),
            nn.Conv2d(middle, target, 1, bias=False),
        )

    def forward(self, map_BCHW: Tensor) -> Tensor:
        """Return the map (B, target, H, W) of a map (B, channels, H, W)."""
        projected_BCHW: Tensor = self.regressor(map_BCHW)
        return projected_BCHW


class SemCKD(Method):
    """Loss of SemCKD: distances of all student stages to all teacher stages, weighted by attention.

    A stage is a group of layers after the stem (the first layers). For each distance, both maps
    (B, C, H, W) are average-pooled to the smaller height and the smaller width, and convolutions
    give the student's map the channels of the teacher's. The distance is the mean squared
    difference.

    The attention comes from a query for each image and student stage, and a key for each image and
    teacher stage. Query and key are learnt functions of the dot products of the image's map with
    the maps of all B images of the batch. Their layers therefore need batches of exactly B images.
    A batch of another size, such as a smaller one at the end of an epoch, has loss 0.

    The products of a query with the keys of all teacher stages pass through a softmax. The loss is
    the sum of the distances with these weights, averaged over images and student stages.

    Args:
        student: Maps of the student (`Taps`) for any batch; only their shapes are read.
        teacher: Maps of the teacher (`Taps`) for any batch; only their shapes are read.
        batch_size: B, images per batch.
        soft: Number by which the products of queries and keys are divided before the softmax.
        factor: Queries and keys have B / `factor` channels, rounded down; an integer of at least 1.

    Raises:
        ValueError: If a network shows no stages after the stem, if `factor` is not an integer of at
            least 1, or if `batch_size` is less than `factor`.
    """

    needs = frozenset({"stages"})
    facts = frozenset({"batch_size"})

    def __init__(
        self, student: Taps, teacher: Taps, *, batch_size: int, soft: float = 1.0, factor: int = 4
    ) -> None:
        super().__init__(student, teacher)
        if isinstance(factor, bool) or not isinstance(factor, int) or factor < 1:
            raise ValueError(f"factor={factor!r} must be an integer of at least 1")
        if batch_size < factor:
            raise ValueError(
                f"batch_size={batch_size} is too small for SemCKD's factor={factor}; "
                f"give trainer.batch_size of at least {factor}"
            )
        self.batch_size, self.soft = batch_size, soft
        self.student_channels = [stage.shape[1] for stage in student.stages[1:]]
        self.teacher_channels = [stage.shape[1] for stage in teacher.stages[1:]]
        for i, _ in enumerate(self.student_channels):
            self.add_module(f"query_{i}", MLPEmbed(batch_size, batch_size // factor))
        for j, _ in enumerate(self.teacher_channels):
            self.add_module(f"key_{j}", MLPEmbed(batch_size, batch_size // factor))
        for i, channels in enumerate(self.student_channels):
            for j, target in enumerate(self.teacher_channels):
                self.add_module(f"regressor{i}{j}", Proj(channels, target))

    def forward(self, student: Taps, teacher: Taps, batch: Batch) -> Tensor:
        """Return the distances of the stages, weighted by attention, as a scalar.

        Args:
            student: Maps of the student; `stages` is read.
            teacher: Maps of the teacher, without gradients; `stages` is read.
            batch: The labels, of which only the number is read.

        Returns:
            The weighted sum over teacher stages, averaged over images and student stages; 0
            (without a gradient) if the batch does not have `batch_size` images.
        """
        if len(batch.labels) != self.batch_size:
            return student.logit_map.new_zeros(())
        distances = []
        for i, own in enumerate(student.stages[1:]):
            for j, other in enumerate(teacher.stages[1:]):
                source_BCHW, target_BCHW = at_smaller_side(own, other)
                projected_BCHW = self.get_submodule(f"regressor{i}{j}")(source_BCHW)
                distances.append((projected_BCHW - target_BCHW).square().flatten(1).mean(1))
        attention_BST = self.attention(student, teacher)
        distance_BST = torch.stack(distances, dim=1).view_as(attention_BST)
        return (attention_BST * distance_BST).sum(2).mean()

    def attention(self, student: Taps, teacher: Taps) -> Tensor:
        """Return the weight of each teacher stage for each student stage and image, (B, S, T).

        S and T are the numbers of stages of student and teacher after the stem. The weights over
        the T teacher stages sum to 1. The `stages` of both networks are read. They must come from a
        batch of `batch_size` images; otherwise torch raises a RuntimeError.
        """
        query_BSD = self._embedded("query", student)
        key_BTD = self._embedded("key", teacher)
        return F.softmax(query_BSD @ key_BTD.mT / self.soft, dim=2)

    def _embedded(self, kind: str, taps: Taps) -> Tensor:
        rows = []
        for number, stage_BCHW in enumerate(taps.stages[1:]):
            flat_BX = stage_BCHW.flatten(1)
            rows.append(self.get_submodule(f"{kind}_{number}")(flat_BX @ flat_BX.mT))
        return torch.stack(rows, dim=1)
