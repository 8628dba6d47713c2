"""Flow of solution procedure (FSP).

Source: Yim et al. 2017, "A Gift from Knowledge Distillation: Fast Optimization, Network
Minimization and Transfer Learning" (CVPR 2017), as RepDistiller computes it.

Shapes: B batch, C channels, H W sides of a map, S = H * W, D channels of the next stage.
"""

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor

from sddlskd.data.device import Batch
from sddlskd.methods.base import Method, at_smaller_side, check_stage_epochs
from sddlskd.models import Taps

__all__ = ["FSP"]


class FSP(Method):
    """A first stage in which the student learns how the teacher's maps lead to the next ones.

    The FSP matrix of two consecutive stages is the mean over cells of the products of their
    channels, the larger map pooled to the sides of the smaller. The loss is the mean squared
    difference of the networks' matrices, summed over the pairs of stages. After the first stage the
    method adds nothing.

    Args:
        student: Taps of the student for any batch.
        teacher: Taps of the teacher for any batch.
        stage_epochs: Number of epochs of the first stage.

    Raises:
        ValueError: If the networks differ in the number of stages or in the channels of a stage, or
            if `stage_epochs` is out of range.
    """

    needs = frozenset({"stages"})

    def __init__(self, student: Taps, teacher: Taps, *, stage_epochs: int = 30) -> None:
        super().__init__(student, teacher)
        check_stage_epochs(stage_epochs)
        own, other = ([stage.shape[1] for stage in taps.stages] for taps in (student, teacher))
        if own != other:
            raise ValueError(
                f"the student's stages have {own} channels and the teacher's {other}; "
                "FSP compares the channels one by one and serves pairs with equal channels"
            )
        self.first_stage_epochs = stage_epochs

    def first_stage(self, student: Taps, teacher: Taps, batch: Batch) -> Tensor:
        """Return the sum over pairs of stages of the mean squared difference of the matrices."""
        matrices = zip(_matrices(student), _matrices(teacher), strict=True)
        losses = [F.mse_loss(own_BCD, other_BCD) for own_BCD, other_BCD in matrices]
        return sum(losses[1:], losses[0])

    def forward(self, student: Taps, teacher: Taps, batch: Batch) -> Tensor:
        """Return zero."""
        return student.logit_map.new_zeros(())


def _matrices(taps: Taps) -> list[Tensor]:
    """Return the FSP matrix B C D of each stage, the stem included, and the next one."""
    matrices = []
    for maps in pairwise(taps.stages):
        first_BCS, second_BDS = (each.flatten(2) for each in at_smaller_side(*maps))
        matrices.append(first_BCS @ second_BDS.transpose(1, 2) / first_BCS.shape[2])
    return matrices
