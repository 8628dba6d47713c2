"""Wide ResNet with depth 6n+4 and width k: three blocks of n pre-activation units.

The map is 8x8 for 32x32 images.

Source: Zagoruyko and Komodakis 2016 (arXiv:1605.07146). There is no deviation; dropout is 0, as in
the published checkpoints.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from sddlskd.models.base import LogitMapModel, Taps, conv, init_convs, stem_conv


class Unit(nn.Module):
    """A pre-activation unit: (B, in_channels, H, W) -> (B, channels, H/stride, W/stride).

    The unit computes BN-ReLU-conv3x3(stride)-BN-ReLU-conv3x3 and adds the shortcut. The shortcut is
    the input, or conv1x1(stride) of the first ReLU's output if the number of channels changes.

    Args:
        in_channels: Number of input channels.
        channels: Number of output channels.
        stride: Stride of the first convolution; must be 1 if `channels` equals `in_channels`.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv(in_channels, channels, 3, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = conv(channels, channels, 3)
        self.convShortcut = (
            conv(in_channels, channels, 1, stride) if in_channels != channels else None
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the map (B, channels, H/stride, W/stride) of a map (B, in_channels, H, W)."""
        return self.of_active(x_BCHW, F.relu(self.bn1(x_BCHW), inplace=True))

    def of_active(self, x_BCHW: Tensor, active_BCHW: Tensor) -> Tensor:
        """Return what `forward(x_BCHW)` returns, if the caller has the first activation already.

        `active_BCHW` must be the ReLU of `bn1(x_BCHW)`, with `bn1` the first BatchNorm of this
        unit. Both arguments have the shape (B, in_channels, H, W).
        """
        out: Tensor = F.relu(self.bn2(self.conv1(active_BCHW)), inplace=True)
        out = self.conv2(out)
        # If the number of channels changes, the shortcut convolves the activated input. Otherwise
        # the shortcut is the raw input.
        shortcut = x_BCHW if self.convShortcut is None else self.convShortcut(active_BCHW)
        out += shortcut
        return out


class Block(nn.Module):
    """A sequence of units (`Unit`): (B, in_channels, H, W) -> (B, channels, H/stride, W/stride).

    Args:
        units: Number of units.
        in_channels: Number of input channels.
        channels: Number of output channels.
        stride: Stride of the first unit; the other units have stride 1.
    """

    def __init__(self, units: int, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        first = Unit(in_channels, channels, stride)
        self.layer = nn.Sequential(first, *(Unit(channels, channels, 1) for _ in range(units - 1)))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the map (B, channels, H/stride, W/stride) of a map (B, in_channels, H, W)."""
        out: Tensor = self.layer(x_BCHW)
        return out

    @property
    def first(self) -> Unit:
        """Return the first unit of the block."""
        unit = self.layer[0]
        assert isinstance(unit, Unit)
        return unit


class WideResNet(LogitMapModel):
    """A Wide ResNet of depth 6 * units + 4: images (B, 3, H, W) -> logit map (B, K, H/4, W/4).

    The logit map holds the logits of each position; its mean over height and width is the logits.
    With the large stem, the map is (B, K, H/8, W/8).

    Args:
        units: Number of units in each of the three blocks.
        width: Factor that multiplies the blocks' channels 16, 32 and 64.
        num_classes: K, the number of classes.
        stem: "small" for a first convolution of 3x3 with stride 1, for images of 32 pixels; "large"
            for 7x7 with stride 2, for images of 224 pixels.

    Raises:
        ValueError: If `stem` is unknown.
    """

    def __init__(self, units: int, width: int, num_classes: int, stem: str = "small") -> None:
        super().__init__()
        self.conv1 = stem_conv(16, 3, stem)
        self.block1 = Block(units, 16, 16 * width, stride=1)
        self.block2 = Block(units, 16 * width, 32 * width, stride=2)
        self.block3 = Block(units, 32 * width, 64 * width, stride=2)
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.fc = nn.Linear(64 * width, num_classes)
        init_convs(self)
        nn.init.zeros_(self.fc.bias)  # as in RepDistiller

    @property
    def head(self) -> nn.Linear:
        """Return the linear classifier, with 64 * width input features and K classes."""
        return self.fc

    def features(self, x_BCHW: Tensor) -> Tensor:
        """Return the feature map (B, 64 * width, H/4, W/4) of normalised images (B, 3, H, W).

        With the large stem, the map is (B, 64 * width, H/8, W/8).
        """
        out = self.block3(self.block2(self.block1(self.conv1(x_BCHW))))
        return F.relu(self.bn1(out), inplace=True)

    def taps(self, x_BCHW: Tensor) -> Taps:
        """Return the logit map (B, K, H/4, W/4) and inner maps of normalised images (B, 3, H, W).

        `stages` are the maps of the stem (the first convolution) and of the three blocks, which end
        without BN and ReLU. `preacts[0]` is `stages[0]`. For i >= 1, `preacts[i]` is `stages[i]`
        after the next BN, which is the first BN of the next block or the BN in front of the head.
        `last` is `features(x_BCHW)`, and `pooled` is its mean over height and width. With the large
        stem, the logit map is (B, K, H/8, W/8).
        """
        out: Tensor = self.conv1(x_BCHW)
        stages, preacts = [out], [out]
        out = self.block1(out)
        stages.append(out)
        for block in (self.block2, self.block3):
            preacts.append(block.first.bn1(out))
            out = block.first.of_active(out, F.relu(preacts[-1]))
            for unit in block.layer[1:]:
                out = unit(out)
            stages.append(out)
        preacts.append(self.bn1(out))
        return self._taps(stages, preacts, F.relu(preacts[-1]))

    def norms_before_relu(self) -> tuple[nn.BatchNorm2d, ...]:
        """Return the BatchNorm that follows each of the three blocks, in front of the next ReLU."""
        return self.block2.first.bn1, self.block3.first.bn1, self.bn1
