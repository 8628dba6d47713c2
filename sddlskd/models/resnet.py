"""ResNet for CIFAR with depth 6n+2: three stages of n basic blocks.

The map is 8x8 for 32x32 images, and 28x28 for 224x224 images with the large stem.

Source: He et al. 2016 (arXiv:1512.03385), section 4.2. The deviations are those of the published
checkpoints: the shortcut is conv1x1-BN if the shape changes (option B; on CIFAR the paper pads with
zeros); the x4 networks have twice the channels in the stem and four times the channels in the
stages.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from sddlskd.models.base import LogitMapModel, Taps, conv, conv_bn, init_convs, stem_conv


class BasicBlock(nn.Module):
    """A basic block: (B, in_channels, H, W) -> (B, channels, H/stride, W/stride).

    The block computes conv3x3(stride)-BN-ReLU-conv3x3-BN, adds the shortcut, and applies ReLU. The
    shortcut is the input, or conv1x1(stride)-BN of the input if the shape changes.

    Args:
        in_channels: Number of input channels.
        channels: Number of output channels.
        stride: Stride of the first convolution.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, channels, 3, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv(channels, channels, 3)
        self.bn2 = nn.BatchNorm2d(channels)
        reshapes = stride != 1 or in_channels != channels
        self.downsample = conv_bn(in_channels, channels, 1, stride) if reshapes else nn.Identity()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the map (B, channels, H/stride, W/stride) of a map (B, in_channels, H, W)."""
        return F.relu(self.preact(x_BCHW), inplace=True)

    def preact(self, x_BCHW: Tensor) -> Tensor:
        """Return the map of `forward` before the last ReLU, (B, channels, H/stride, W/stride)."""
        out: Tensor = F.relu(self.bn1(self.conv1(x_BCHW)), inplace=True)
        out = self.bn2(self.conv2(out))
        out += self.downsample(x_BCHW)
        return out


class ResNet(LogitMapModel):
    """A ResNet of depth 6 * blocks + 2: images (B, 3, H, W) -> logit map (B, K, H/4, W/4).

    The logit map holds the logits of each position; its mean over height and width is the logits.
    With the large stem, the map is (B, K, H/8, W/8). The convolutions are initialised as in
    RepDistiller.

    Args:
        blocks: Number of blocks in each of the three stages (groups of blocks).
        num_classes: K, the number of classes.
        first: Number of channels of the stem, the first convolution.
        channels: Numbers of channels of the three stages.
        stem: "small" for a 3x3 convolution with stride 1, for images of 32 pixels; "large" for a
            7x7 convolution with stride 2, for images of 224 pixels.

    Raises:
        ValueError: If `stem` is unknown.
    """

    def __init__(
        self,
        blocks: int,
        num_classes: int,
        first: int = 16,
        channels: tuple[int, int, int] = (16, 32, 64),
        stem: str = "small",
    ) -> None:
        super().__init__()
        self.conv1 = stem_conv(first, 3, stem)
        self.bn1 = nn.BatchNorm2d(first)
        self.layer1 = _stage(first, channels[0], blocks, stride=1)
        self.layer2 = _stage(channels[0], channels[1], blocks, stride=2)
        self.layer3 = _stage(channels[1], channels[2], blocks, stride=2)
        self.fc = nn.Linear(channels[2], num_classes)
        init_convs(self)

    @property
    def head(self) -> nn.Linear:
        """Return the linear classifier, with channels[2] input features and K classes."""
        return self.fc

    def features(self, x_BCHW: Tensor) -> Tensor:
        """Return the feature map (B, channels[2], H/4, W/4) of normalised images (B, 3, H, W).

        With the large stem, the map is (B, channels[2], H/8, W/8).
        """
        out: Tensor = F.relu(self.bn1(self.conv1(x_BCHW)), inplace=True)
        for stage in (self.layer1, self.layer2, self.layer3):
            out = stage(out)
        return out

    def taps(self, x_BCHW: Tensor) -> Taps:
        """Return the logit map (B, K, H/4, W/4) and inner maps of normalised images (B, 3, H, W).

        `stages` are the maps after the stem (the first layers) and after each of the three stages.
        `preacts[0]` is `stages[0]`. For i >= 1, `preacts[i]` is `stages[i]` before its last ReLU.
        `last` is `features(x_BCHW)`, and `pooled` is its mean over height and width. With the large
        stem, the logit map is (B, K, H/8, W/8).
        """
        out: Tensor = F.relu(self.bn1(self.conv1(x_BCHW)), inplace=True)
        stages, preacts = [out], [out]
        for stage in (self.layer1, self.layer2, self.layer3):
            for block in stage[:-1]:
                out = block(out)
            preacts.append(_last_block(stage).preact(out))
            out = F.relu(preacts[-1])
            stages.append(out)
        return self._taps(stages, preacts, out)

    def norms_before_relu(self) -> tuple[nn.BatchNorm2d, ...]:
        """Return the last BatchNorm of each of the three stages, before the shortcut is added."""
        return tuple(_last_block(stage).bn2 for stage in (self.layer1, self.layer2, self.layer3))


def _last_block(stage: nn.Sequential) -> BasicBlock:
    block = stage[-1]
    assert isinstance(block, BasicBlock)
    return block


def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, channels, stride)
    return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))
