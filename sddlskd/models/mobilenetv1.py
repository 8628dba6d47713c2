"""MobileNetV1 for ImageNet; the map is 7x7 for 224x224 images.

Source: Howard et al. 2017 (arXiv:1704.04861), table 1, at width 1. mdistiller and both papers train
this network as a student of resnet50 on ImageNet; their configurations call it MobileNetV2. The
parameter names and the initialisation (torch's defaults) are the same as in mdistiller.
"""

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from sddlskd.models.base import LogitMapModel, Taps, conv_bn_relu, last_norm

# The output channels of the stem, then of each unit.
_CHANNELS = (32, 64, 128, 128, 256, 256, *[512] * 6, 1024, 1024)
_STRIDED = (2, 4, 6, 12)  # the units with stride 2, counted from 1
_TAPPED = (3, 5, 11, 13)  # the last unit of each map size, counted from 1, as in mdistiller


class MobileNetV1(LogitMapModel):
    """MobileNetV1 at width 1: images (B, 3, H, W) -> logit map (B, K, H/32, W/32).

    The logit map holds the logits of each position; its mean over height and width is the logits.
    The network has a stem (first convolution) and 13 depthwise-separable units, the same for images
    of every size. `num_classes` is K.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.model = nn.Sequential(conv_bn_relu(3, _CHANNELS[0], 3, stride=2))
        for unit, (in_channels, channels) in enumerate(pairwise(_CHANNELS), 1):
            stride = 2 if unit in _STRIDED else 1
            depthwise = conv_bn_relu(in_channels, in_channels, 3, stride, groups=in_channels)
            self.model.append(nn.Sequential(*depthwise, *conv_bn_relu(in_channels, channels, 1)))
        self.fc = nn.Linear(_CHANNELS[-1], num_classes)

    @property
    def head(self) -> nn.Linear:
        """Return the linear classifier, with 1024 input features and K classes."""
        return self.fc

    def features(self, x_BCHW: Tensor) -> Tensor:
        """Return the feature map (B, 1024, H/32, W/32) of normalised images (B, 3, H, W)."""
        out: Tensor = self.model(x_BCHW)
        return out

    def taps(self, x_BCHW: Tensor) -> Taps:
        """Return the logit map (B, K, H/32, W/32) and inner maps of normalised images (B, 3, H, W).

        `stages` are the maps after the stem (the first layers) and after the units 3, 5, 11 and 13,
        counted from 1. `preacts[0]` is `stages[0]`. For i >= 1, `preacts[i]` is `stages[i]` before
        its last ReLU. `last` is `features(x_BCHW)`, and `pooled` is its mean over height and width.
        """
        out: Tensor = self.model[0](x_BCHW)
        stages, preacts = [out], [out]
        for index, unit in enumerate(self.model[1:], 1):
            if index not in _TAPPED:
                out = unit(out)
                continue
            *layers, _ = _layers(unit)
            for layer in layers:
                out = layer(out)
            preacts.append(out)
            out = F.relu(out)
            stages.append(out)
        return self._taps(stages, preacts, out)

    def norms_before_relu(self) -> tuple[nn.BatchNorm2d, ...]:
        """Return the last BatchNorm of each of the units 3, 5, 11 and 13, counted from 1.

        The maps of the same units are in `taps`.
        """
        return tuple(last_norm(_layers(self.model[index])) for index in _TAPPED)


def _layers(unit: nn.Module) -> nn.Sequential:
    assert isinstance(unit, nn.Sequential)
    return unit
