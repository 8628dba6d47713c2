"""ShuffleNet V1 with 3 groups; the map is 4x4 for 32x32 images, and 14x14 for 224x224 with the large
stem.

Source: Zhang et al. 2018 (arXiv:1707.01083), table 1, g = 3. Deviations, those of the published checkpoints: the stem
is conv1x1 with stride 1 and no max-pool; a ReLU follows the depthwise convolution; stride 2 appends the pooled input
after the branch. Initialised by torch's defaults, as in RepDistiller.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sddlskd.models.base import LogitMapModel, conv, stem_conv

_GROUPS = 3
_STEM = 24


class Unit(nn.Module):
    """1x1-BN-ReLU, shuffle, depthwise 3x3(stride)-BN-ReLU, 1x1-BN, join, ReLU: B in H W -> B out H/stride W/stride.

    Stride 1 adds the input; stride 2 appends the average-pooled input, so the branch makes out - in channels.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        # Section 3.2: no groups on the stem's few channels, and with one group the shuffle is the identity.
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
        out = F.relu(self.bn1(self.conv1(x_BCHW)), inplace=True)
        if self.groups > 1:
            out = channel_shuffle(out, self.groups)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        if self.stride == 2:
            out = torch.cat((out, F.avg_pool2d(x_BCHW, 3, stride=2, padding=1)), dim=1)
        else:
            out += x_BCHW
        return F.relu(out, inplace=True)


class ShuffleNetV1(LogitMapModel):
    """Stages of 240, 480 and 960 channels with 4, 8 and 4 units: B 3 H W -> logit map B K H/8 W/8.

    With the large stem H/16 W/16.
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
        return self.linear

    def features(self, x_BCHW: Tensor) -> Tensor:
        out: Tensor = F.relu(self.bn1(self.conv1(x_BCHW)), inplace=True)
        for stage in (self.layer1, self.layer2, self.layer3):
            out = stage(out)
        return out


def channel_shuffle(x_BCHW: Tensor, groups: int) -> Tensor:
    """Channels (group, i) -> (i, group), the shape stays; the result is in channels_last.

    Moved as B H W C: on channels_last maps this is one copy that stays channels_last, which `F.channel_shuffle` is
    slower at (CPU, 3 groups) or gives up (CUDA).
    """
    x_BHWC = x_BCHW.permute(0, 2, 3, 1)
    return torch.unflatten(x_BHWC, 3, (groups, -1)).transpose(3, 4).flatten(3).permute(0, 3, 1, 2)


def _stage(in_channels: int, channels: int, units: int) -> nn.Sequential:
    first = Unit(in_channels, channels, stride=2)
    return nn.Sequential(first, *(Unit(channels, channels, stride=1) for _ in range(units - 1)))
