"""ResNet for CIFAR, depth 6n+2: three stages of n basic blocks; the map is 8x8 for 32x32 images, and
28x28 for 224x224 images with the large stem.

Source: He et al. 2016 (arXiv:1512.03385), section 4.2. Deviations, those of the published checkpoints: the shortcut is
conv1x1-BN where the shape changes (option B; the paper pads with zeros on CIFAR); the x4 networks double the stem and
quadruple the stages.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from sddlskd.models.base import LogitMapModel, conv, conv_bn, init_convs, stem_conv


class BasicBlock(nn.Module):
    """conv3x3(stride)-BN-ReLU-conv3x3-BN, add the shortcut, ReLU: B in H W -> B out H/stride W/stride."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, channels, 3, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv(channels, channels, 3)
        self.bn2 = nn.BatchNorm2d(channels)
        reshapes = stride != 1 or in_channels != channels
        self.downsample = conv_bn(in_channels, channels, 1, stride) if reshapes else nn.Identity()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x_BCHW)), inplace=True)
        out = self.bn2(self.conv2(out))
        out += self.downsample(x_BCHW)
        return F.relu(out, inplace=True)


class ResNet(LogitMapModel):
    """ResNet of depth 6 * blocks + 2: B 3 H W -> logit map B K H/4 W/4 (H/8 W/8 with the large stem).

    `blocks` per stage; `first` (of the stem) and `channels` (one per stage) in channels. Initialised as RepDistiller.
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
        return self.fc

    def features(self, x_BCHW: Tensor) -> Tensor:
        out: Tensor = F.relu(self.bn1(self.conv1(x_BCHW)), inplace=True)
        for stage in (self.layer1, self.layer2, self.layer3):
            out = stage(out)
        return out


def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, channels, stride)
    return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))
