"""ShuffleNet V2 of size 1x.

The map is 4x4 for 32x32 images, and 14x14 for 224x224 images with the large stem.

Source: Ma et al. 2018 (arXiv:1807.11164), table 5, 1x. The deviation is that of the published
checkpoints: the stem is conv1x1 with stride 1 and without max-pool. The initialisation is torch's
default, as in RepDistiller.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sddlskd.models.base import LogitMapModel, Taps, conv, stem_conv


class BasicUnit(nn.Module):
    """A unit that keeps the shape: (B, channels, H, W) -> (B, channels, H, W).

    The first half of the channels passes unchanged. The second half goes through conv1x1-BN-ReLU,
    depthwise 3x3-BN and conv1x1-BN-ReLU. Then the channels of both halves are interleaved.
    `channels` must be an even number.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = conv(half, half, 1)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = conv(half, half, 3, groups=half)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = conv(half, half, 1)
        self.bn3 = nn.BatchNorm2d(half)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the map (B, channels, H, W) of a map (B, channels, H, W)."""
        left, right = self.halves(x_BCHW)
        return interleave(left, F.relu(right, inplace=True))

    def halves(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return the unchanged half of the channels, and the other half before its last ReLU.

        Both maps have the shape (B, channels/2, H, W).
        """
        left, right = x_BCHW.chunk(2, dim=1)
        right = F.relu(self.bn1(self.conv1(right)), inplace=True)
        right = self.bn2(self.conv2(right))
        return left, self.bn3(self.conv3(right))


class DownUnit(nn.Module):
    """A downsampling unit: (B, in_channels, H, W) -> (B, channels, H/2, W/2).

    Two branches with stride 2 take the whole input. Each gives half of the output channels, after a
    last ReLU. The channels of both are interleaved. `channels` must be an even number.
    """

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = conv(in_channels, in_channels, 3, stride=2, groups=in_channels)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv2 = conv(in_channels, half, 1)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = conv(in_channels, half, 1)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = conv(half, half, 3, stride=2, groups=half)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = conv(half, half, 1)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the map (B, channels, H/2, W/2) of a map (B, in_channels, H, W)."""
        left = self.bn1(self.conv1(x_BCHW))
        left = F.relu(self.bn2(self.conv2(left)), inplace=True)
        right = F.relu(self.bn3(self.conv3(x_BCHW)), inplace=True)
        right = self.bn4(self.conv4(right))
        right = F.relu(self.bn5(self.conv5(right)), inplace=True)
        return interleave(left, right)


class ShuffleNetV2(LogitMapModel):
    """ShuffleNet V2: images (B, 3, H, W) -> logit map (B, K, H/8, W/8).

    The logit map holds the logits of each position; its mean over height and width is the logits.
    The three stages (groups of units) have 116, 232 and 464 channels and 4, 8 and 4 units. A 1x1
    convolution to 1024 channels follows. `num_classes` is K. With stem="small", the first
    convolution is 1x1 with stride 1. With stem="large", it is 7x7 with stride 2, and the map is
    (B, K, H/16, W/16). Raise ValueError if the stem is unknown.
    """

    def __init__(self, num_classes: int, stem: str = "small") -> None:
        super().__init__()
        self.conv1 = stem_conv(24, 1, stem)
        self.bn1 = nn.BatchNorm2d(24)
        self.layer1 = _stage(24, 116, units=4)
        self.layer2 = _stage(116, 232, units=8)
        self.layer3 = _stage(232, 464, units=4)
        self.conv2 = conv(464, 1024, 1)
        self.bn2 = nn.BatchNorm2d(1024)
        self.linear = nn.Linear(1024, num_classes)

    @property
    def head(self) -> nn.Linear:
        """Return the linear classifier, with 1024 input features and K classes."""
        return self.linear

    def features(self, x_BCHW: Tensor) -> Tensor:
        """Return the feature map (B, 1024, H/8, W/8) of normalised images (B, 3, H, W).

        With the large stem, the map is (B, 1024, H/16, W/16).
        """
        out: Tensor = F.relu(self.bn1(self.conv1(x_BCHW)), inplace=True)
        for stage in (self.layer1, self.layer2, self.layer3):
            out = stage(out)
        return F.relu(self.bn2(self.conv2(out)), inplace=True)

    def taps(self, x_BCHW: Tensor) -> Taps:
        """Return the logit map (B, K, H/8, W/8) and inner maps of normalised images (B, 3, H, W).

        `stages` are the maps after the stem (the first layers) and after each of the three stages.
        `preacts[0]` is `stages[0]`. For i >= 1, `preacts[i]` is what the last unit of stage i
        computes before its last ReLU and before it interleaves channels. The channels of the
        unchanged half come first, then those of the other half. `preacts[i]` and `stages[i]`
        therefore have their channels in different orders, as in mdistiller. `last` is
        `features(x_BCHW)`, and `pooled` is its mean over height and width. With the large stem, the
        logit map is (B, K, H/16, W/16).
        """
        out: Tensor = F.relu(self.bn1(self.conv1(x_BCHW)), inplace=True)
        stages, preacts = [out], [out]
        for stage in (self.layer1, self.layer2, self.layer3):
            for unit in stage[:-1]:
                out = unit(out)
            left, right = _last_unit(stage).halves(out)
            preacts.append(torch.cat((left, right), dim=1))
            out = interleave(left, F.relu(right, inplace=True))
            stages.append(out)
        return self._taps(stages, preacts, F.relu(self.bn2(self.conv2(out)), inplace=True))


def _last_unit(stage: nn.Sequential) -> BasicUnit:
    unit = stage[-1]
    assert isinstance(unit, BasicUnit)
    return unit


def interleave(left_BCHW: Tensor, right_BCHW: Tensor) -> Tensor:
    """Return a map (B, 2C, H, W) with the channels of two maps (B, C, H, W) in turn.

    The order is left, right, left, right, and so on, as after a concatenation and a channel shuffle
    with 2 groups. The result is in channels_last memory format. Raise RuntimeError if the shapes
    differ.
    """
    pair_BHWC2 = torch.stack((left_BCHW.permute(0, 2, 3, 1), right_BCHW.permute(0, 2, 3, 1)), dim=4)
    return pair_BHWC2.flatten(3).permute(0, 3, 1, 2)


def _stage(in_channels: int, channels: int, units: int) -> nn.Sequential:
    return nn.Sequential(
        DownUnit(in_channels, channels), *(BasicUnit(channels) for _ in range(units - 1))
    )
