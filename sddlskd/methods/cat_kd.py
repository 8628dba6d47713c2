"""Class attention transfer (CAT-KD).

Source: Guo et al. 2023 (arXiv:2304.12777), as the authors' code computes it.

Shapes: B batch, K classes, H W sides of a logit map.
"""

import torch.nn.functional as F
from torch import Tensor

from sddlskd.data.device import Batch
from sddlskd.methods.base import Method, check_flags
from sddlskd.models import Taps

__all__ = ["CATKD"]


class CATKD(Method):
    """Loss of CAT-KD: the mean squared difference of the class activation maps of two networks.

    The class activation maps are the logit maps (B, K, H, W) of the networks, which hold the logits
    of each position. Both are average-pooled to `resolution` x `resolution` entries before they are
    compared.

    Args:
        student: Maps of the student (`Taps`) for any batch; not read.
        teacher: Maps of the teacher (`Taps`) for any batch; not read.
        resolution: Side of the pooled maps, an integer of at least 1.
        normalize: Whether the pooled map of each image and class is divided by its Euclidean
            length, as in the paper.
        binarize: Whether the teacher's map is made binary before pooling. An entry becomes 1 if it
            is above the mean absolute value of the map of its image and class, else 0.

    Raises:
        ValueError: If `resolution` is not an integer of at least 1, or if `normalize` or `binarize`
            is not a bool.
    """

    def __init__(
        self,
        student: Taps,
        teacher: Taps,
        *,
        resolution: int = 2,
        normalize: bool = True,
        binarize: bool = False,
    ) -> None:
        super().__init__(student, teacher)
        if isinstance(resolution, bool) or not isinstance(resolution, int) or resolution < 1:
            raise ValueError(f"resolution={resolution!r} must be an integer of at least 1")
        check_flags(normalize=normalize, binarize=binarize)
        self.resolution, self.normalize, self.binarize = resolution, normalize, binarize

    def forward(self, student: Taps, teacher: Taps, batch: Batch) -> Tensor:
        """Return the mean squared difference of the pooled maps, a scalar.

        Args:
            student: Maps of the student; `logit_map` is read.
            teacher: Maps of the teacher, without gradients; `logit_map` is read.
            batch: Unused.

        Returns:
            The mean over images, classes and entries of the pooled maps.
        """
        target_BKHW = teacher.logit_map
        if self.binarize:
            mean_BK11 = target_BKHW.abs().mean((2, 3), keepdim=True)
            target_BKHW = (target_BKHW > mean_BK11).to(target_BKHW.dtype)
        return F.mse_loss(self._pooled(student.logit_map), self._pooled(target_BKHW))

    def _pooled(self, map_BKHW: Tensor) -> Tensor:
        pooled_BKHW = F.adaptive_avg_pool2d(map_BKHW, self.resolution)
        if self.normalize:
            pooled_BKHW = F.normalize(pooled_BKHW, dim=(2, 3))  # type: ignore[arg-type]
        return pooled_BKHW
