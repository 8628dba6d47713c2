"""Factor transfer (FT).

Source: Kim et al. 2018, "Paraphrasing Complex Network: Network Compression via Factor Transfer"
(arXiv:1802.04977), as RepDistiller computes it.

Shapes: B batch, C channels, H W sides of a map, A = H * W, or C * H * W for `p1=None`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sddlskd.data.device import Batch
from sddlskd.methods.base import Method, at_smaller_side, check_stage_epochs
from sddlskd.models import Taps

__all__ = ["FT"]

SLOPE = 0.1  # of LeakyReLU below zero


class FT(Method):
    """The distance between factors, small maps that two networks of convolutions make.

    In a first stage the paraphraser, an autoencoder, learns to reconstruct the teacher's last map;
    what is in its middle is the teacher's factor. Afterwards it is frozen, and a translator makes
    the student's factor of the student's last map. Both factors are normalised per image.

    Args:
        student: Taps of the student for any batch.
        teacher: Taps of the teacher for any batch.
        stage_epochs: Number of epochs of the first stage.
        stage_weight: Weight of the reconstruction in the first stage. RepDistiller trains the
            paraphraser of ResNet and WRN students at a fifth of the learning rate; a weight of 0.2
            makes the same steps with SGD, but for a weight decay that is five times as strong.
        rate: Channels of the factors, as a fraction of those of the teacher's map.
        p1: The factors are reduced to the mean over channels of x^p1, as in RepDistiller. None for
            the whole factors, as in the paper and its authors' code.
        p2: The loss is the mean of |difference|^p2.

    Raises:
        ValueError: If a value is out of range.
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
        """Return the mean squared error of the reconstruction of the teacher's last map."""
        map_BCHW = teacher.stages[-1]
        encode, decode = self.paraphraser["encoder"], self.paraphraser["decoder"]
        return self.stage_weight * F.mse_loss(decode(encode(map_BCHW)), map_BCHW)

    def forward(self, student: Taps, teacher: Taps, batch: Batch) -> Tensor:
        """Return the mean distance of the normalised factors; the paraphraser gets no gradient."""
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
    """Return 3x3 convolutions of these (in, out) channels, each with a LeakyReLU.

    BatchNorm is in between if `norm` is set. Without it, a placeholder keeps the numbers of the
    layers, by which the released code names its weights.
    """
    conv = nn.ConvTranspose2d if transposed else nn.Conv2d
    layers: list[nn.Module] = []
    for own, other in channels:
        between = nn.BatchNorm2d(other) if norm else nn.Identity()
        layers += [conv(own, other, 3, 1, 1), between, nn.LeakyReLU(SLOPE)]
    return nn.Sequential(*layers)
