"""VGG with batch normalisation: five blocks of 3x3 convolutions; the map is 4x4 for 32x32 images (and for 64x64).

Source: Simonyan and Zisserman 2015 (arXiv:1409.1556). Deviations, those of the published checkpoints: BN after every
convolution, one linear layer in place of three, max-pool after blocks 0, 1, 2 only (after block 3 too for 64x64
images), and vgg8, which has one convolution a block.
"""

import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from sddlskd.models.base import LogitMapModel, init_convs


class VGG(LogitMapModel):
    """VGG with `convs` convolutions in each of its blocks: B 3 H W -> logit map B K H/8 W/8 (B K 4 4 where H is 64)."""

    def __init__(self, convs: tuple[int, int, int, int, int], num_classes: int) -> None:
        super().__init__()
        self.block0 = _block(3, 64, convs[0])
        self.block1 = _block(64, 128, convs[1])
        self.block2 = _block(128, 256, convs[2])
        self.block3 = _block(256, 512, convs[3])
        self.block4 = _block(512, 512, convs[4])
        self.classifier = nn.Linear(512, num_classes)
        init_convs(self)
        nn.init.normal_(self.classifier.weight, std=0.01)  # as in RepDistiller
        nn.init.zeros_(self.classifier.bias)

    @property
    def head(self) -> nn.Linear:
        return self.classifier

    def features(self, x_BCHW: Tensor) -> Tensor:
        out = x_BCHW
        for block in (self.block0, self.block1, self.block2):
            out = F.max_pool2d(F.relu(block(out), inplace=True), 2)
        out = F.relu(self.block3(out), inplace=True)
        out = max_pool_where_64(out, x_BCHW.shape[2])
        return F.relu(self.block4(out), inplace=True)


def max_pool_where_64(map_BCHW: Tensor, side: int) -> Tensor:
    """The map B C H W, max-pooled to B C H/2 W/2 where the image's `side` is 64 pixels."""
    return F.max_pool2d(map_BCHW, 2) if side == 64 else map_BCHW


torch.fx.wrap(
    "max_pool_where_64"
)  # traced as one call, so that a traced network still adapts to its input


def _block(in_channels: int, channels: int, convs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i in range(convs):
        layers += [
            nn.Conv2d(in_channels if i == 0 else channels, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(
        *layers[:-1]
    )  # the last ReLU is in `features`: the published blocks end before it
