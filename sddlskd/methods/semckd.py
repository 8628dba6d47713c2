"""Cross-layer distillation with semantic calibration (SemCKD).

Source: Chen et al. 2021 (arXiv:2012.03236), as the authors' code computes it.

Shapes: B batch, C channels, H W sides of a map, D channels of queries and keys, S stages of the
student, T stages of the teacher.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sddlskd.data.device import Batch
from sddlskd.methods.base import Method, at_smaller_side
from sddlskd.models import Taps

__all__ = ["SemCKD"]


class MLPEmbed(nn.Module):
    """Two linear layers with a ReLU between them, and an output of length 1.

    Args:
        dim_in: Channels of the input.
        dim_out: Channels of the output.
    """

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(dim_in, 2 * dim_out)
        self.linear2 = nn.Linear(2 * dim_out, dim_out)

    def forward(self, x_BC: Tensor) -> Tensor:
        """Return the output, one row of length 1 for each row of the input."""
        return F.normalize(self.linear2(self.linear1(x_BC).relu()), dim=1)


class Proj(nn.Module):
    """Convolutions of 1x1, 3x3 and 1x1 that give a map another number of channels.

    Args:
        channels: Channels of the input.
        target: Channels of the output.
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
        """Return the map with `target` channels and the same sides."""
        projected_BCHW: Tensor = self.regressor(map_BCHW)
        return projected_BCHW


class SemCKD(Method):
    """The distances of each student stage to all teacher stages, weighted by learnt attention.

    The attention of a student stage over the teacher stages comes from the similarities of the
    batch's images in both. A query or key of an image is computed from a row of B similarities, so
    the batch size is fixed. As in the authors' code, a smaller batch at the end of an epoch does
    not count: its loss is 0.

    Args:
        student: Taps of the student for any batch.
        teacher: Taps of the teacher for any batch.
        batch_size: B.
        soft: The number that the products of queries and keys are divided by.
        factor: B / D.

    Raises:
        ValueError: If a network has no stages, or if the batch is smaller than `factor`.
    """

    needs = frozenset({"stages"})
    facts = frozenset({"batch_size"})

    def __init__(
        self, student: Taps, teacher: Taps, *, batch_size: int, soft: float = 1.0, factor: int = 4
    ) -> None:
        super().__init__(student, teacher)
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
        """Return the mean over images and student stages of the weighted distances."""
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
        """Return the weight B S T of each teacher stage for each student stage, with sum 1."""
        query_BSD = self._embedded("query", student)
        key_BTD = self._embedded("key", teacher)
        return F.softmax(query_BSD @ key_BTD.mT / self.soft, dim=2)

    def _embedded(self, kind: str, taps: Taps) -> Tensor:
        rows = []
        for number, stage_BCHW in enumerate(taps.stages[1:]):
            flat_BX = stage_BCHW.flatten(1)
            rows.append(self.get_submodule(f"{kind}_{number}")(flat_BX @ flat_BX.mT))
        return torch.stack(rows, dim=1)
