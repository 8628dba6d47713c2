"""MobileNetV2 with expansion 6 and width 0.5.

The map is 2x2 for 32x32 images, and 7x7 for 224x224 images with the large stem.

Source: Sandler et al. 2018 (arXiv:1801.04381), table 2. The deviations are those of the published
checkpoints: ReLU instead of ReLU6; the first block keeps its 1x1 convolution although its expansion
is 1; the 24-channel blocks have stride 1 (2 in the paper). Channels are int(0.5 * c), as in the
paper; later code rounds them to multiples of 8.
"""

from torch import Tensor, nn

from sddlskd.models.base import (
    LogitMapModel,
    Taps,
    conv_bn,
    conv_bn_relu,
    init_convs,
    last_norm,
    stem_conv,
)

# (expansion, channels at width 1, number of blocks, stride of the first block), as in table 2
_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
_TAPPED = (1, 2, 4, 6)  # the blocks whose maps mdistiller compares, counted from 0


class InvertedResidual(nn.Module):
    """An inverted residual block: (B, in_channels, H, W) -> (B, channels, H/stride, W/stride).

    The block computes conv1x1-BN-ReLU, depthwise conv3x3(stride)-BN-ReLU and conv1x1-BN. If the
    stride is 1 and `channels` equals `in_channels`, the input is added.

    Args:
        in_channels: Number of input channels.
        channels: Number of output channels.
        stride: Stride of the depthwise convolution.
        expansion: Factor by which the first convolution multiplies the channels.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        self.residual = stride == 1 and in_channels == channels
        wide = in_channels * expansion
        self.conv = nn.Sequential(
            *conv_bn_relu(in_channels, wide, 1),
            *conv_bn_relu(wide, wide, 3, stride, groups=wide),
            *conv_bn(wide, channels, 1),
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the map (B, channels, H/stride, W/stride) of a map (B, in_channels, H, W)."""
        out: Tensor = self.conv(x_BCHW)
        if self.residual:
            out += x_BCHW
        return out


class MobileNetV2(LogitMapModel):
    """MobileNetV2 at width 0.5: images (B, 3, H, W) -> logit map (B, K, H/16, W/16).

    The logit map holds the logits of each position; its mean over height and width is the logits.
    `num_classes` is K. With stem="small", the first convolution is 3x3 with stride 2. With
    stem="large", it is 7x7 with stride 2, a max-pool of 2 follows after BN and ReLU, and the map is
    (B, K, H/32, W/32). The parameters have the same names with both. Raise ValueError if the stem
    is unknown.
    """

    def __init__(self, num_classes: int, stem: str = "small") -> None:
        super().__init__()
        self.conv1 = nn.Sequential(
            stem_conv(16, 3, stem, stride=2), nn.BatchNorm2d(16), nn.ReLU(inplace=True)
        )
        # No checkpoint with a large stem is published, so the names of its parameters are a guess.
        if stem == "large":
            self.conv1.append(nn.MaxPool2d(2))
        self.blocks = nn.Sequential()
        in_channels = 16
        for expansion, full_channels, blocks, stride in _STAGES:
            channels = full_channels // 2
            first = InvertedResidual(in_channels, channels, stride, expansion)
            rest = (InvertedResidual(channels, channels, 1, expansion) for _ in range(blocks - 1))
            self.blocks.append(nn.Sequential(first, *rest))
            in_channels = channels
        self.conv2 = conv_bn_relu(in_channels, 1280, 1)
        self.classifier = nn.Sequential(nn.Linear(1280, num_classes))
        init_convs(self)
        nn.init.normal_(self.head.weight, std=0.01)  # as in RepDistiller
        nn.init.zeros_(self.head.bias)

    @property
    def head(self) -> nn.Linear:
        """Return the linear classifier, with 1280 input features and K classes."""
        linear = self.classifier[0]
        assert isinstance(linear, nn.Linear)
        return linear

    def features(self, x_BCHW: Tensor) -> Tensor:
        """Return the feature map (B, 1280, H/16, W/16) of normalised images (B, 3, H, W).

        With the large stem, the map is (B, 1280, H/32, W/32).
        """
        out: Tensor = self.conv2(self.blocks(self.conv1(x_BCHW)))
        return out

    def taps(self, x_BCHW: Tensor) -> Taps:
        """Return the logit map (B, K, H/16, W/16) and inner maps of normalised images (B, 3, H, W).

        `stages` are the maps after the stem (the first layers) and after the blocks 1, 2, 4 and 6,
        counted from 0. The map of the large stem is taken before the max-pool. `preacts` is (),
        because the blocks do not end in a ReLU. `last` is `features(x_BCHW)`, and `pooled` is its
        mean over height and width. With the large stem, the logit map is (B, K, H/32, W/32).
        """
        out = x_BCHW
        for layer in self.conv1[:3]:
            out = layer(out)
        stages = [out]
        for layer in self.conv1[3:]:
            out = layer(out)
        for index, block in enumerate(self.blocks):
            out = block(out)
            if index in _TAPPED:
                stages.append(out)
        return self._taps(stages, (), self.conv2(out))

    def norms_before_relu(self) -> tuple[nn.BatchNorm2d, ...]:
        """Return the last BatchNorm of each of the blocks 1, 2, 4 and 6, counted from 0.

        The maps of the same blocks are in `taps`. No ReLU follows these BatchNorms.
        """
        return tuple(last_norm(_last_unit(self.blocks[index]).conv) for index in _TAPPED)


def _last_unit(block: nn.Module) -> InvertedResidual:
    assert isinstance(block, nn.Sequential)
    unit = block[-1]
    assert isinstance(unit, InvertedResidual)
    return unit
