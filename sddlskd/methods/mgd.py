"""Masked generative distillation (MGD).

Source: Yang et al. 2022 (arXiv:2205.01529), as the authors' code for classification computes it.

Shapes: B batch, C channels, H W sides of a map.
"""

import torch
from torch import Tensor, nn

from sddlskd.data.device import Batch, seed_of
from sddlskd.methods.base import Method, at_smaller_side
from sddlskd.methods.draws import keys_of, uniform
from sddlskd.models import Taps

__all__ = ["MGD"]

MASKS = ("channel", "cell")


class MGD(Method):
    """Loss of MGD: the squared error of the teacher's last map, generated from the student's.

    Both maps (B, C, H, W) are average-pooled to the smaller height and the smaller width. If the
    channels differ, a 1x1 convolution gives the student's map the channels of the teacher's. Random
    channels or positions of the student's map are then set to 0. From the map with these zeros, two
    3x3 convolutions with a ReLU between them generate the teacher's map. Which channels or
    positions are set to 0 depends on the seed, the epoch and the image alone.

    Args:
        student: Maps of the student (`Taps`) for any batch; only their shapes are read.
        teacher: Maps of the teacher (`Taps`) for any batch; only their shapes are read.
        seed: Seed of the run.
        ratio: Probability that a channel or a position is set to 0 (the paper's lambda), in [0, 1).
        mask: "channel" to set whole channels to 0, as the authors do for classification; "cell" to
            set all channels of a position to 0, as they do for detection and segmentation.

    Raises:
        ValueError: If a network shows no map after the stem (the first layers), if `ratio` is
            outside [0, 1), or if `mask` is unknown.
    """

    needs = frozenset({"stages"})
    facts = frozenset({"seed"})

    def __init__(
        self,
        student: Taps,
        teacher: Taps,
        *,
        seed: int,
        ratio: float = 0.15,
        mask: str = "channel",
    ) -> None:
        super().__init__(student, teacher)
        if not 0 <= ratio < 1:
            raise ValueError(f"ratio={ratio} must lie in [0, 1); the paper has 0.15")
        if mask not in MASKS:
            raise ValueError(f"mask={mask!r} is unknown; choose one of: {', '.join(MASKS)}")
        self.ratio, self.mask = ratio, mask
        self.seed = seed_of("seed", seed, "mask of MGD")
        own, target = (taps.stages[-1].shape[1] for taps in (student, teacher))
        self.align: nn.Conv2d | None = None
        if own != target:
            self.align = nn.Conv2d(own, target, 1)
        self.generation = nn.Sequential(
            nn.Conv2d(target, target, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(target, target, 3, padding=1),
        )

    def forward(self, student: Taps, teacher: Taps, batch: Batch) -> Tensor:
        """Return the squared error of the generated map, a scalar.

        Args:
            student: Maps of the student; the last map of `stages` is read.
            teacher: Maps of the teacher, without gradients; the last map of `stages` is read.
            batch: Indices of the images, and the number of the epoch.

        Returns:
            The sum over channels and positions of the map, averaged over images.
        """
        own_BCHW, target_BCHW = at_smaller_side(student.stages[-1], teacher.stages[-1])
        if self.align is not None:
            own_BCHW = self.align(own_BCHW)
        generated_BCHW = self.generation(own_BCHW * self._kept(own_BCHW, batch))
        loss: Tensor = (generated_BCHW - target_BCHW).square().sum() / len(target_BCHW)
        return loss

    def _kept(self, map_BCHW: Tensor, batch: Batch) -> Tensor:
        """Return the mask (B, C, 1, 1) or (B, 1, H, W): 0 for masked entries, 1 for the rest."""
        B, C, H, W = map_BCHW.shape
        shape = (B, C, 1, 1)
        if self.mask == "cell":
            shape = (B, 1, H, W)
        u = uniform(keys_of(self.seed, batch), torch.Size(shape[1:]).numel())
        return (u >= self.ratio).to(map_BCHW.dtype).view(shape)
