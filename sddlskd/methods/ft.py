"""Factor transfer (FT).

Source: Kim et al. 2018, "Paraphrasing Complex Network: Network Compression via Factor Transfer"
(arXiv:1802.04977), as RepDistiller computes it.

Shapes: B batch, C channels, H W sides of a map, A entries of a factor after the reduction: H * W,
or C * H * W if `p1` is None.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sddlskd.data.device import Batch
from sddlskd.methods.base import Method, at_smaller_side, check_stage_epochs
from sddlskd.models import Taps

__all__ = ["FT"]

SLOPE = 0.1  # slope of LeakyReLU below zero


class FT(Method):
    """Loss of FT: the difference between factors, which are encodings of the networks' last maps.

    In the first `stage_epochs` epochs, numbered ..., -1, 0, an autoencoder (the paraphraser) learns
    to reconstruct the teacher's last map (B, C, H, W). Its encoder gives the teacher's factor. From
    epoch 1 on, the paraphraser gets no gradient. Another encoder (the translator) then learns to
    give the student's factor from the student's last map.

    Both factors are average-pooled to the smaller height and the smaller width. They are reduced as
    `p1` says, and divided by their Euclidean length for each image. The loss is the mean of
    |difference|^p2.

    Args:
        student: Maps of the student (`Taps`) for any batch; only their shapes are read.
        teacher: Maps of the teacher (`Taps`) for any batch; only their shapes are read.
        stage_epochs: Number of epochs before epoch 1, at least 1.
        stage_weight: Weight of the reconstruction loss, greater than 0.
        rate: Channels of the factors, as a fraction of the channels of the teacher's last map. The
            number of channels is rounded down.
        p1: Power that reduces a factor x to the mean of x^p1 over channels, as in RepDistiller.
            None for the whole factors, as in the paper and its authors' code.
        p2: Power in the loss, at least 1.

    Raises:
        ValueError: If a network shows no map after the stem (the first layers), if `stage_epochs`
            is not an integer of at least 1, if `stage_weight` is not greater than 0, if `p2` is
            less than 1, or if `rate` gives the factors less than 1 channel or more channels than
            the teacher's map has.
    """

    needs = frozenset({"stages"})

    def __init__(
        self,
        student: Taps,
        teacher: Taps,
        *,
        stage_epochs: int = 30,
        stage_weight: float = 1.0,
        rate: float = 0.5,
        p1: int | None = 2,
        p2: int = 1,
    ) -> None:
        super().__init__(student, teacher)
        check_stage_epochs(stage_epochs)
        if not stage_weight > 0 or p2 < 1:
            raise ValueError(
                f"stage_weight={stage_weight} must be greater than 0; p2={p2} must be at least 1"
            )
        own, other = student.stages[-1].shape[1], teacher.stages[-1].shape[1]
        factors = int(other * rate)
        if not 1 <= factors <= other:
            raise ValueError(
                f"rate={rate} leaves {factors} of the teacher's {other} channels; "
                "give a fraction of at least 1 channel and at most 1"
            )
        self.first_stage_epochs = stage_epochs
        self.stage_weight, self.p1, self.p2 = stage_weight, p1, p2
        self.paraphraser = nn.ModuleDict(
            {
                "encoder": _convolutions((other, other), (other, factors), (factors, factors)),
                "decoder": _convolutions(
                    (factors, factors), (factors, other), (other, other), transposed=True
                ),
            }
        )
        self.translator = nn.ModuleDict(
            {"encoder": _convolutions((own, own), (own, factors), (factors, factors), norm=True)}
        )

    def first_stage(self, student: Taps, teacher: Taps, batch: Batch) -> Tensor:
        """Return the weighted mean squared error of the reconstruction of the teacher's last map.

        Args:
            student: Unused.
            teacher: Maps of the teacher, without gradients; the last map of `stages` is read.
            batch: Unused.

        Returns:
            A scalar: `stage_weight` times the mean over images, channels and positions.
        """
        map_BCHW = teacher.stages[-1]
        encode, decode = self.paraphraser["encoder"], self.paraphraser["decoder"]
        return self.stage_weight * F.mse_loss(decode(encode(map_BCHW)), map_BCHW)

    def forward(self, student: Taps, teacher: Taps, batch: Batch) -> Tensor:
        """Return the mean of |difference|^p2 of the two networks' factors, a scalar.

        The paraphraser gets no gradient from this loss.

        Args:
            student: Maps of the student; the last map of `stages` is read.
            teacher: Maps of the teacher, without gradients; the last map of `stages` is read.
            batch: Unused.

        Returns:
            The mean over images and entries of the reduced factors.
        """
        with torch.no_grad():
            other_BCHW = self.paraphraser["encoder"](teacher.stages[-1])
        own_BCHW = self.translator["encoder"](student.stages[-1])
        own_BA, other_BA = map(self._normalised, at_smaller_side(own_BCHW, other_BCHW))
        return (own_BA - other_BA).abs().pow(self.p2).mean()

    def _normalised(self, factor_BCHW: Tensor) -> Tensor:
        if self.p1 is not None:
            factor_BCHW = factor_BCHW.pow(self.p1).mean(1)
        return F.normalize(factor_BCHW.flatten(1), dim=1)


def _convolutions(
    *channels: tuple[int, int], norm: bool = False, transposed: bool = False
) -> nn.Sequential:
    """Return 3x3 convolutions with these (input, output) channels, each with a LeakyReLU behind it.

    If `norm` is set, a BatchNorm is between the two. Otherwise a placeholder is there, which keeps
    the numbers of the layers: they are the names of the weights in the released code.
    """
    conv = nn.ConvTranspose2d if transposed else nn.Conv2d
    layers: list[nn.Module] = []
    for own, other in channels:
        between = nn.BatchNorm2d(other) if norm else nn.Identity()
        layers += [conv(own, other, 3, 1, 1), between, nn.LeakyReLU(SLOPE)]
    return nn.Sequential(*layers)
