"""The parts that all networks share.

Every network computes a feature map and applies a linear head to each cell of the map.

Shapes: B batch, C channels, H W height and width (of an image in pixels, of a map in cells),
K classes.
"""

from abc import ABC, abstractmethod

from torch import Tensor, nn

STEMS = ("small", "large")  # for images of 32 pixels, for images of 224


class LogitMapModel(nn.Module, ABC):
    """A classifier whose output is a logit map; its logits are `model(x_BCHW).mean((2, 3))`.

    The head is linear, so the mean of the logit map equals the head applied to the mean feature.
    These are the logits of the published networks.
    """

    @property
    @abstractmethod
    def head(self) -> nn.Linear:
        """Return the linear layer C -> K, which has its name from the published checkpoints."""

    @abstractmethod
    def features(self, x_BCHW: Tensor) -> Tensor:
        """Return the last feature map B C H W of normalised images B 3 H W.

        The head is applied to this map.
        """

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the logit map B K H W of normalised images B 3 H W.

        The map has the same height and width as `features(x_BCHW)`.
        """
        # In channels_last both permutes are free and the head is one matrix product, as fast as a
        # 1x1 convolution. In other memory formats it is faster than a 1x1 convolution.
        logits_BHWK: Tensor = self.head(self.features(x_BCHW).permute(0, 2, 3, 1))
        return logits_BHWK.permute(0, 3, 1, 2)


def conv(
    in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1
) -> nn.Conv2d:
    """Return a convolution without bias: B in H W -> B out H/stride W/stride.

    The padding keeps height and width at stride 1.

    Args:
        in_channels: The number of input channels.
        out_channels: The number of output channels.
        kernel: The side of the square kernel.
        stride: The stride in both directions.
        groups: The number of channel groups.
    """
    return nn.Conv2d(
        in_channels, out_channels, kernel, stride, padding=kernel // 2, groups=groups, bias=False
    )


def stem_conv(channels: int, kernel: int, stem: str, stride: int = 1) -> nn.Conv2d:
    """Return the first convolution of a network, for RGB images.

    The large stem is the one that the SDD authors use for images of 224 pixels (CUB-200).

    Args:
        channels: The number of output channels.
        kernel: The side of the square kernel of the small stem.
        stem: "small" for the convolution of the CIFAR network, or "large" for a 7x7 convolution
            with stride 2.
        stride: The stride of the small stem.

    Raises:
        ValueError: The stem is unknown.
    """
    if stem not in STEMS:
        raise ValueError(f"unknown stem {stem!r}; choose one of: {', '.join(STEMS)}")
    return conv(3, channels, 7, 2) if stem == "large" else conv(3, channels, kernel, stride)


def conv_bn(
    in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    """Return `conv` followed by batch normalisation (BN).

    Args:
        in_channels: The number of input channels.
        out_channels: The number of output channels.
        kernel: The side of the square kernel.
        stride: The stride in both directions.
        groups: The number of channel groups.
    """
    return nn.Sequential(
        conv(in_channels, out_channels, kernel, stride, groups), nn.BatchNorm2d(out_channels)
    )


def conv_bn_relu(
    in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    """Return `conv` followed by BN and ReLU.

    The ReLU works in place, which is safe because the backward pass of BN needs only BN's input.

    Args:
        in_channels: The number of input channels.
        out_channels: The number of output channels.
        kernel: The side of the square kernel.
        stride: The stride in both directions.
        groups: The number of channel groups.
    """
    return conv_bn(in_channels, out_channels, kernel, stride, groups).append(nn.ReLU(inplace=True))


def init_convs(model: nn.Module) -> None:
    """Initialise all convolutions of a model in place.

    Draw each weight from N(0, 2 / (k * k * out_channels)), with k the kernel's side, and set each
    bias to zero.

    Source: He et al. 2015 (arXiv:1502.01852), fan out. RepDistiller and mdistiller write this
    initialisation in two ways, kaiming_normal_(fan_out, relu) and normal_(0, sqrt(2 / n)), which
    are equivalent. BN needs no code: by default its weight is 1 and its bias 0.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
