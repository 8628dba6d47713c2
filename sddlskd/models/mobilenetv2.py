"""MobileNetV2 of expansion 6 and width 0.5; the map is 2x2 for 32x32 images, and 7x7 for 224x224
with the large stem.

Source: Sandler et al. 2018 (arXiv:1801.04381), table 2. Deviations, those of the published checkpoints: ReLU in place
of ReLU6; the first block keeps its 1x1 convolution though it expands nothing; the stride of the 24-channel blocks is 1
(2 in the paper). Channels are int(0.5 * c), as the paper has it; later code rounds them to multiples of 8.
"""

from torch import Tensor, nn

from sddlskd.models.base import LogitMapModel, conv_bn, conv_bn_relu, init_convs, stem_conv

# (expansion, channels at width 1, number of blocks, stride of the first), as in table 2
_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class InvertedResidual(nn.Module):
    """Expand (1x1), depthwise 3x3(stride), project (1x1, linear): B in H W -> B out H/stride W/stride.

    Its input is added where the shape stays.
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
        out: Tensor = self.conv(x_BCHW)
        if self.residual:
            out += x_BCHW
        return out


class MobileNetV2(LogitMapModel):
    """MobileNetV2 at width 0.5: B 3 H W -> logit map B K H/16 W/16.

    The large stem, conv7x7(stride 2)-BN-ReLU-max-pool 2, gives H/32 W/32. Its parameters are called as those of the
    small one: a guess, since no such checkpoint is published.
    """

    def __init__(self, num_classes: int, stem: str = "small") -> None:
        super().__init__()
        self.conv1 = nn.Sequential(
            stem_conv(16, 3, stem, stride=2), nn.BatchNorm2d(16), nn.ReLU(inplace=True)
        )
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
        linear = self.classifier[0]
        assert isinstance(linear, nn.Linear)
        return linear

    def features(self, x_BCHW: Tensor) -> Tensor:
        out: Tensor = self.conv2(self.blocks(self.conv1(x_BCHW)))
        return out
