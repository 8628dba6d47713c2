"""ResNet-18 and ResNet-50, the four-stage networks for ImageNet, fitted to small images; the map is 4x4 for 32x32,
and 14x14 for 224x224 with the large stem.

Source: He et al. 2016 (arXiv:1512.03385), table 1. Deviations, those of the published checkpoints: the stem is conv3x3
with stride 1 and no max-pool; the bottleneck's stride is on its 3x3 convolution (the paper's is on the first 1x1).
"""

import torch.nn.functional as F
from torch import Tensor, nn

from sddlskd.models.base import LogitMapModel, conv, conv_bn, init_convs, stem_conv


class BasicBlock(nn.Module):
    """conv3x3(stride)-BN-ReLU-conv3x3-BN, add the shortcut, ReLU: B in H W -> B width H/stride W/stride."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = _shortcut(in_channels, width, stride)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x_BCHW)), inplace=True)
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x_BCHW)
        return F.relu(out, inplace=True)


class Bottleneck(nn.Module):
    """conv1x1-BN-ReLU-conv3x3(stride)-BN-ReLU-conv1x1-BN, add, ReLU: B in H W -> B 4*width H/stride W/stride."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv(width, 4 * width, 1)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.shortcut = _shortcut(in_channels, 4 * width, stride)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x_BCHW)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        out += self.shortcut(x_BCHW)
        return F.relu(out, inplace=True)


class ResNet4Stage(LogitMapModel):
    """Four stages of widths 64, 128, 256, 512: B 3 H W -> logit map B K H/8 W/8 (/16 with the large stem).

    `blocks` is the number of blocks in each stage. Initialised as mdistiller's resnetv2.
    """

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        blocks: tuple[int, int, int, int],
        num_classes: int,
        stem: str = "small",
    ) -> None:
        super().__init__()
        self.conv1 = stem_conv(64, 3, stem)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = _stage(block, 64, 64, blocks[0], stride=1)
        self.layer2 = _stage(block, 64 * block.expansion, 128, blocks[1], stride=2)
        self.layer3 = _stage(block, 128 * block.expansion, 256, blocks[2], stride=2)
        self.layer4 = _stage(block, 256 * block.expansion, 512, blocks[3], stride=2)
        self.linear = nn.Linear(512 * block.expansion, num_classes)
        init_convs(self)

    @property
    def head(self) -> nn.Linear:
        return self.linear

    def features(self, x_BCHW: Tensor) -> Tensor:
        out: Tensor = F.relu(self.bn1(self.conv1(x_BCHW)), inplace=True)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            out = stage(out)
        return out


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    reshapes = stride != 1 or in_channels != out_channels
    return conv_bn(in_channels, out_channels, 1, stride) if reshapes else nn.Identity()


def _stage(
    block: type[BasicBlock | Bottleneck], in_channels: int, width: int, blocks: int, stride: int
) -> nn.Sequential:
    first = block(in_channels, width, stride)
    return nn.Sequential(
        first, *(block(width * block.expansion, width, 1) for _ in range(blocks - 1))
    )
