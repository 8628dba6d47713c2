"""ResNet-18 and ResNet-50, the four-stage networks for ImageNet, adapted to small images.

The map is 4x4 for 32x32 images, and 14x14 for 224x224 images with the large stem.

Source: He et al. 2016 (arXiv:1512.03385), table 1. The deviations are those of the published
checkpoints: the stem is conv3x3 with stride 1 and without max-pool; the stride of the bottleneck is
on its 3x3 convolution (in the paper it is on the first 1x1 convolution).
"""

import torch.nn.functional as F
from torch import Tensor, nn

from sddlskd.models.base import LogitMapModel, Taps, conv, conv_bn, init_convs, stem_conv


class BasicBlock(nn.Module):
    """A basic block: (B, in_channels, H, W) -> (B, width, H/stride, W/stride).

    The block computes conv3x3(stride)-BN-ReLU-conv3x3-BN, adds the shortcut, and applies ReLU. The
    shortcut is the input, or conv1x1(stride)-BN of the input if the shape changes.

    Args:
        in_channels: Number of input channels.
        width: Number of output channels.
        stride: Stride of the first convolution.
    """

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = _shortcut(in_channels, width, stride)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the map (B, width, H/stride, W/stride) of a map (B, in_channels, H, W)."""
        return F.relu(self.preact(x_BCHW), inplace=True)

    def preact(self, x_BCHW: Tensor) -> Tensor:
        """Return the map of `forward` before the last ReLU, (B, width, H/stride, W/stride)."""
        out: Tensor = F.relu(self.bn1(self.conv1(x_BCHW)), inplace=True)
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x_BCHW)
        return out

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        """Return the last BatchNorm of the residual branch, before the shortcut is added."""
        return self.bn2


class Bottleneck(nn.Module):
    """A bottleneck block: (B, in_channels, H, W) -> (B, 4*width, H/stride, W/stride).

    The block computes conv1x1-BN-ReLU-conv3x3(stride)-BN-ReLU-conv1x1-BN, adds the shortcut, and
    applies ReLU. The shortcut is the input, or conv1x1(stride)-BN of the input if the shape
    changes.

    Args:
        in_channels: Number of input channels.
        width: Number of channels of the first two convolutions.
        stride: Stride of the 3x3 convolution.
    """

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
        """Return the map (B, 4*width, H/stride, W/stride) of a map (B, in_channels, H, W)."""
        return F.relu(self.preact(x_BCHW), inplace=True)

    def preact(self, x_BCHW: Tensor) -> Tensor:
        """Return the map of `forward` before the last ReLU, (B, 4*width, H/stride, W/stride)."""
        out: Tensor = F.relu(self.bn1(self.conv1(x_BCHW)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        out += self.shortcut(x_BCHW)
        return out

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        """Return the last BatchNorm of the residual branch, before the shortcut is added."""
        return self.bn3


class ResNet4Stage(LogitMapModel):
    """A ResNet of four stages: images (B, 3, H, W) -> logit map (B, K, H/8, W/8).

    The logit map holds the logits of each position; its mean over height and width is the logits.
    With the large stem, the map is (B, K, H/16, W/16). The stages (groups of blocks) have 64, 128,
    256 and 512 times `block.expansion` channels. The convolutions are initialised as in
    mdistiller's resnetv2.

    Args:
        block: Class of the blocks, `BasicBlock` (expansion 1) or `Bottleneck` (expansion 4).
        blocks: Number of blocks in each of the four stages.
        num_classes: K, the number of classes.
        stem: "small" for a first convolution of 3x3 with stride 1, for images of 32 pixels; "large"
            for 7x7 with stride 2, for images of 224 pixels.

    Raises:
        ValueError: If `stem` is unknown.
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
        """Return the linear classifier, with 512 * block.expansion input features and K classes."""
        return self.linear

    def features(self, x_BCHW: Tensor) -> Tensor:
        """Return the last feature map of normalised images (B, 3, H, W).

        The map has the shape (B, 512 * block.expansion, H/8, W/8). With the large stem, height and
        width are H/16 and W/16.
        """
        out: Tensor = F.relu(self.bn1(self.conv1(x_BCHW)), inplace=True)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            out = stage(out)
        return out

    def taps(self, x_BCHW: Tensor) -> Taps:
        """Return the logit map (B, K, H/8, W/8) and inner maps of normalised images (B, 3, H, W).

        `stages` are the maps after the stem (the first layers) and after each of the four stages.
        `preacts[0]` is `stages[0]`. For i >= 1, `preacts[i]` is `stages[i]` before its last ReLU.
        `last` is `features(x_BCHW)`, and `pooled` is its mean over height and width. With the large
        stem, the logit map is (B, K, H/16, W/16).
        """
        out: Tensor = F.relu(self.bn1(self.conv1(x_BCHW)), inplace=True)
        stages, preacts = [out], [out]
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in stage[:-1]:
                out = block(out)
            preacts.append(_last_block(stage).preact(out))
            out = F.relu(preacts[-1])
            stages.append(out)
        return self._taps(stages, preacts, out)

    def norms_before_relu(self) -> tuple[nn.BatchNorm2d, ...]:
        """Return the last BatchNorm of each of the four stages, before the shortcut is added."""
        stages = (self.layer1, self.layer2, self.layer3, self.layer4)
        return tuple(_last_block(stage).last_norm for stage in stages)


def _last_block(stage: nn.Sequential) -> BasicBlock | Bottleneck:
    block = stage[-1]
    assert isinstance(block, BasicBlock | Bottleneck)
    return block


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
