"""Hints (FitNet).

Source: Romero et al. 2015 (arXiv:1412.6550), Eq. 3, as mdistiller computes it.

Shapes: B batch, C channels, H W sides of a map.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from sddlskd.data.device import Batch
from sddlskd.methods.base import Method, conv_between
from sddlskd.models import Taps

__all__ = ["FitNet"]


class FitNet(Method):
    """Loss of FitNet: the mean squared error of the teacher's map, predicted from the student's.

    Both networks give the map (B, C, H, W) of one stage (group of layers). The prediction is a
    convolution (see `conv_between`), BatchNorm and ReLU of the student's map.

    Args:
        student: Maps of the student (`Taps`) for any batch; only their shapes are read.
        teacher: Maps of the teacher (`Taps`) for any batch; only their shapes are read.
        hint_layer: Number of the stage that is compared in both networks; 0 is the stem (the first
            layers).

    Raises:
        ValueError: If a network shows no stages after the stem, if a network has no stage
            `hint_layer`, or if `conv_between` has no convolution for the two maps.
    """

    needs = frozenset({"stages"})

    def __init__(self, student: Taps, teacher: Taps, *, hint_layer: int = 2) -> None:
        super().__init__(student, teacher)
        stages = min(len(student.stages), len(teacher.stages))
        if hint_layer not in range(stages):
            raise ValueError(f"hint_layer={hint_layer} must be in 0..{stages - 1}")
        self.hint_layer = hint_layer
        self.conv = conv_between(student.stages[hint_layer], teacher.stages[hint_layer])
        self.bn = nn.BatchNorm2d(teacher.stages[hint_layer].shape[1])

    def forward(self, student: Taps, teacher: Taps, batch: Batch) -> Tensor:
        """Return the mean squared error of the predicted map, a scalar.

        Args:
            student: Maps of the student; `stages` is read.
            teacher: Maps of the teacher, without gradients; `stages` is read.
            batch: Unused.

        Returns:
            The mean over images, channels and positions of the map.
        """
        predicted_BCHW = F.relu(self.bn(self.conv(student.stages[self.hint_layer])))
        return F.mse_loss(predicted_BCHW, teacher.stages[self.hint_layer])
