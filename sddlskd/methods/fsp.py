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
    """Loss of FSP: in a first stage, the student learns the relations between the teacher's maps.

    The FSP matrix of two consecutive maps holds one number for each pair of their channels: the
    mean over cells of the product of the two channels. Before that, the larger map is
    average-pooled to the sides of the smaller one. The first map is that of the stem. The loss is
    the mean squared difference between the student's and the teacher's matrices, summed over the
    pairs of maps. After the first stage of training, the loss is 0.

    Args:
        student: Maps of the student for any batch; only their shapes are read.
        teacher: Maps of the teacher for any batch; only their shapes are read.
        stage_epochs: Number of epochs of the first stage, at least 1.

    Raises:
        ValueError: If a network shows no stages after the stem, if the networks differ in the
            number of maps or in the channels of a map, or if `stage_epochs` is not an integer of at
            least 1.
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
        """Return the mean squared difference of the FSP matrices, summed over pairs of maps.

        Args:
            student: Maps of the student; `stages` is read.
            teacher: Maps of the teacher, without gradients; `stages` is read.
            batch: Unused.

        Returns:
            A scalar; the mean is over images and pairs of channels.
        """
        matrices = zip(_matrices(student), _matrices(teacher), strict=True)
        losses = [F.mse_loss(own_BCD, other_BCD) for own_BCD, other_BCD in matrices]
        return sum(losses[1:], losses[0])

    def forward(self, student: Taps, teacher: Taps, batch: Batch) -> Tensor:
        """Return 0, because the method adds no loss after the first stage.

        Args:
            student: Maps of the student; only device and dtype are read.
            teacher: Unused.
            batch: Unused.

        Returns:
            A scalar tensor without a gradient.
        """
        return student.logit_map.new_zeros(())


def _matrices(taps: Taps) -> list[Tensor]:
    """Return the FSP matrix (B, C, D) of each pair of consecutive maps, from the stem on."""
    matrices = []
    for maps in pairwise(taps.stages):
        first_BCS, second_BDS = (each.flatten(2) for each in at_smaller_side(*maps))
        matrices.append(first_BCS @ second_BDS.transpose(1, 2) / first_BCS.shape[2])
    return matrices
