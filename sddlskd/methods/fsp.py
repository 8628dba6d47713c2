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
    """Loss of FSP: before epoch 1, the student learns the relations between the teacher's maps.

    The networks are compared in the first `stage_epochs` epochs, which are numbered ..., -1, 0.
    From epoch 1 on, the loss is 0.

    The maps of a network are those after its stem (the first layers) and after each further group
    of layers. Two consecutive maps of an image, with C and D channels, are average-pooled to the
    smaller height and the smaller width. Their FSP matrix is (C, D). An entry is the mean over
    positions of the product of two channels, one of each map. The loss is the mean squared
    difference between the student's and the teacher's matrix, summed over the pairs of consecutive
    maps.

    Args:
        student: Maps of the student (`Taps`) for any batch; only their shapes are read.
        teacher: Maps of the teacher (`Taps`) for any batch; only their shapes are read.
        stage_epochs: Number of epochs before epoch 1, at least 1.

    Raises:
        ValueError: If a network shows no map after the stem, if the networks differ in the number
            of maps or in the channels of a map, or if `stage_epochs` is not an integer of at least
            1.
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
        """Return 0, because the method adds no loss from epoch 1 on.

        Args:
            student: Maps of the student; only the device and dtype of `logit_map` are read.
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
