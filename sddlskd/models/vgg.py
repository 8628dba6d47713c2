"""VGG with batch normalisation: five blocks of 3x3 convolutions.

The map is 4x4 for 32x32 images and for 64x64 images.

Source: Simonyan and Zisserman 2015 (arXiv:1409.1556). The deviations are those of the published
checkpoints: BN after every convolution; one linear layer instead of three; max-pool only after
blocks 0, 1 and 2 (for 64x64 images after block 3 as well); and vgg8, which has one convolution per
block.
"""

import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from sddlskd.models.base import LogitMapModel, Taps, init_convs, last_norm


class VGG(LogitMapModel):
    """A VGG: images (B, 3, H, W) -> logit map (B, K, H/8, W/8), or (B, K, H/16, W/16) if H is 64.

    The logit map holds the logits of each position; its mean over height and width is the logits.
    The first layers are the same for images of every size.

    Args:
        convs: Number of convolutions in each of the five blocks.
        num_classes: K, the number of classes.
    """

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
        """Return the linear classifier, with 512 input features and K classes."""
        return self.classifier

    def features(self, x_BCHW: Tensor) -> Tensor:
        """Return the feature map (B, 512, H/8, W/8) of normalised images (B, 3, H, W).

        If H is 64, the map is (B, 512, H/16, W/16).
        """
        out = x_BCHW
        for block in (self.block0, self.block1, self.block2):
            out = F.max_pool2d(F.relu(block(out), inplace=True), 2)
        out = F.relu(self.block3(out), inplace=True)
        out = max_pool_where_64(out, x_BCHW.shape[2])
        return F.relu(self.block4(out), inplace=True)

    def taps(self, x_BCHW: Tensor) -> Taps:
        """Return the logit map (B, K, H/8, W/8) and inner maps of normalised images (B, 3, H, W).

        `stages` are the maps of the five blocks, each before the max-pool that follows.
        `preacts[0]` is `stages[0]`. For i >= 1, `preacts[i]` is `stages[i]` before its last ReLU.
        `last` is `features(x_BCHW)`, and `pooled` is its mean over height and width. If H is 64,
        the logit map is (B, K, H/16, W/16).
        """
        out: Tensor = F.relu(self.block0(x_BCHW), inplace=True)
        stages, preacts = [out], [out]
        for block in (self.block1, self.block2, self.block3, self.block4):
            if block is self.block4:
                out = max_pool_where_64(out, x_BCHW.shape[2])
            else:
                out = F.max_pool2d(out, 2)
            preacts.append(block(out))
            out = F.relu(preacts[-1])
            stages.append(out)
        return self._taps(stages, preacts, out)

    def norms_before_relu(self) -> tuple[nn.BatchNorm2d, ...]:
        """Return the last BatchNorm of each of the blocks 1 to 4, counted from 0."""
        blocks = (self.block1, self.block2, self.block3, self.block4)
        return tuple(last_norm(block) for block in blocks)


def max_pool_where_64(map_BCHW: Tensor, side: int) -> Tensor:
    """Return a map (B, C, H, W), max-pooled to (B, C, H/2, W/2) if `side` is 64, else unchanged.

    `side` is the height in pixels of the images that the map comes from.
    """
    return F.max_pool2d(map_BCHW, 2) if side == 64 else map_BCHW


# torch.fx traces this function as one call, so that a traced network still adapts to its input.
torch.fx.wrap("max_pool_where_64")


def _block(in_channels: int, channels: int, convs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(convs):
        layers += [
            nn.Conv2d(in_channels, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
        ]
        in_channels = channels
    # The last ReLU is in `features`, because the published blocks end before their last ReLU.
    return nn.Sequential(*layers[:-1])
