"""ShuffleNet V1 with 3 groups.

The map is 4x4 for 32x32 images, and 14x14 for 224x224 images with the large stem.

Source: Zhang et al. 2018 (arXiv:1707.01083), table 1, g = 3. The deviations are those of the
published checkpoints: the stem is conv1x1 with stride 1 and without max-pool; a ReLU follows the
depthwise convolution; units with stride 2 append the pooled input after the branch. The
initialisation is torch's default, as in RepDistiller.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sddlskd.models.base import LogitMapModel, Taps, conv, stem_conv

_GROUPS = 3
_STEM = 24


class Unit(nn.Module):
    """A ShuffleNet V1 unit: (B, in_channels, H, W) -> (B, channels, H/stride, W/stride).

    A branch computes conv1x1-BN-ReLU, channel shuffle, depthwise conv3x3(stride)-BN-ReLU and
    conv1x1-BN. Then the unit joins the branch with the input and applies ReLU. With stride 1 the
    input is added, so `channels` must equal `in_channels`. With stride 2 the average-pooled input
    is appended to the branch, so the branch has channels - in_channels output channels.

    Args:
        in_channels: Number of input channels. If it is 24, the first convolution has one group and
            the shuffle is left out; else both have 3 groups.
        channels: Number of output channels.
        stride: 1 or 2.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        # Section 3.2: the first convolution after the stem has no groups, because the stem has few
        # channels. With one group the shuffle is the identity.
        self.groups = 1 if in_channels == _STEM else _GROUPS
        out_channels = channels - in_channels if stride == 2 else channels
        mid_channels = out_channels // 4
        self.conv1 = conv(in_channels, mid_channels, 1, groups=self.groups)
        self.bn1 = nn.BatchNorm2d(mid_channels)
        self.conv2 = conv(mid_channels, mid_channels, 3, stride, groups=mid_channels)
        self.bn2 = nn.BatchNorm2d(mid_channels)
        self.conv3 = conv(mid_channels, out_channels, 1, groups=_GROUPS)
        self.bn3 = nn.BatchNorm2d(out_channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the map (B, channels, H/stride, W/stride) of a map (B, in_channels, H, W)."""
        return F.relu(self.preact(x_BCHW), inplace=True)

    def preact(self, x_BCHW: Tensor) -> Tensor:
        """Return the map of `forward` before the last ReLU, (B, channels, H/stride, W/stride)."""
        out: Tensor = F.relu(self.bn1(self.conv1(x_BCHW)), inplace=True)
        if self.groups > 1:
            out = channel_shuffle(out, self.groups)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        if self.stride == 2:
            out = torch.cat((out, F.avg_pool2d(x_BCHW, 3, stride=2, padding=1)), dim=1)
        else:
            out += x_BCHW
        return out


class ShuffleNetV1(LogitMapModel):
    """ShuffleNet V1: images (B, 3, H, W) -> logit map (B, K, H/8, W/8).

    The logit map holds the logits of each position; its mean over height and width is the logits.
    The three stages (groups of units) have 240, 480 and 960 channels and 4, 8 and 4 units.
    `num_classes` is K. With stem="small", the first convolution is 1x1 with stride 1. With
    stem="large", it is 7x7 with stride 2, and the map is (B, K, H/16, W/16). Raise ValueError if
    the stem is unknown.
    """

    def __init__(self, num_classes: int, stem: str = "small") -> None:
        super().__init__()
        self.conv1 = stem_conv(_STEM, 1, stem)
        self.bn1 = nn.BatchNorm2d(_STEM)
        self.layer1 = _stage(_STEM, 240, units=4)
        self.layer2 = _stage(240, 480, units=8)
        self.layer3 = _stage(480, 960, units=4)
        self.linear = nn.Linear(960, num_classes)

    @property
    def head(self) -> nn.Linear:
        """Return the linear classifier, with 960 input features and K classes."""
        return self.linear

    def features(self, x_BCHW: Tensor) -> Tensor:
        """Return the feature map (B, 960, H/8, W/8) of normalised images (B, 3, H, W).

        With the large stem, the map is (B, 960, H/16, W/16).
        """
        out: Tensor = F.relu(self.bn1(self.conv1(x_BCHW)), inplace=True)
        for stage in (self.layer1, self.layer2, self.layer3):
            out = stage(out)
        return out

    def taps(self, x_BCHW: Tensor) -> Taps:
        """Return the logit map (B, K, H/8, W/8) and inner maps of normalised images (B, 3, H, W).

        `stages` are the maps after the stem (the first layers) and after each of the three stages.
        `preacts[0]` is `stages[0]`. For i >= 1, `preacts[i]` is `stages[i]` before its last ReLU.
        `last` is `features(x_BCHW)`, and `pooled` is its mean over height and width. With the large
        stem, the logit map is (B, K, H/16, W/16).
        """
        out: Tensor = F.relu(self.bn1(self.conv1(x_BCHW)), inplace=True)
        stages, preacts = [out], [out]
        for stage in (self.layer1, self.layer2, self.layer3):
            for unit in stage[:-1]:
                out = unit(out)
            preacts.append(_last_unit(stage).preact(out))
            out = F.relu(preacts[-1])
            stages.append(out)
        return self._taps(stages, preacts, out)


def _last_unit(stage: nn.Sequential) -> Unit:
    unit = stage[-1]
    assert isinstance(unit, Unit)
    return unit


def channel_shuffle(x_BCHW: Tensor, groups: int) -> Tensor:
    """Return a map (B, C, H, W) with its channels in the order of a ShuffleNet channel shuffle.

    The channels are `groups` groups of equal size. The new order lists the first channel of each
    group, then the second channel of each group, and so on. For 1 < `groups` < C, the result is in
    channels_last memory format. Raise RuntimeError if C is not a multiple of `groups`.
    """
    # Shuffling (B, H, W, C) takes one copy for a channels_last map. F.channel_shuffle is slower
    # (CPU, 3 groups) or does not return channels_last (CUDA).
    x_BHWC = x_BCHW.permute(0, 2, 3, 1)
    return torch.unflatten(x_BHWC, 3, (groups, -1)).transpose(3, 4).flatten(3).permute(0, 3, 1, 2)


def _stage(in_channels: int, channels: int, units: int) -> nn.Sequential:
    first = Unit(in_channels, channels, stride=2)
    return nn.Sequential(first, *(Unit(channels, channels, stride=1) for _ in range(units - 1)))
