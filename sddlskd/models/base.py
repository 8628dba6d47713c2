"""What every network shares: features, then a linear head on every cell of the map.

Shapes: B batch, C channels, H W sides (of the image or of a map, in cells), K classes.
"""

from abc import ABC, abstractmethod

from torch import Tensor, nn

STEMS = ("small", "large")  # for images of 32 pixels, for images of 224


class LogitMapModel(nn.Module, ABC):
    """A classifier whose output is a logit map; its logits are `model(x_BCHW).mean((2, 3))`.

    The head is linear, so the mean of the map is the head of the mean feature: the published networks' logits.
    """

    @property
    @abstractmethod
    def head(self) -> nn.Linear:
        """The linear layer C -> K, registered under the name it has in the published checkpoints."""

    @abstractmethod
    def features(self, x_BCHW: Tensor) -> Tensor:
        """Images B 3 H W (normalised) -> the last feature map B C H W, which the head is applied to."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Images B 3 H W (normalised) -> the logit map B K H W, of the same side as `features(x_BCHW)`."""
        # One GEMM in channels_last, where both permutes are free; as fast as a 1x1 convolution there, faster elsewhere.
        logits_BHWK: Tensor = self.head(self.features(x_BCHW).permute(0, 2, 3, 1))
        return logits_BHWK.permute(0, 3, 1, 2)


def conv(
    in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1
) -> nn.Conv2d:
    """A convolution without bias, padded to keep the side at stride 1: B in H W -> B out H/stride W/stride."""
    return nn.Conv2d(
        in_channels, out_channels, kernel, stride, padding=kernel // 2, groups=groups, bias=False
    )


def stem_conv(channels: int, kernel: int, stem: str, stride: int = 1) -> nn.Conv2d:
    """The first convolution, of RGB images: as in the CIFAR network (small), or 7x7 with stride 2 (large).

    Source of large: what the SDD authors put in its place for images of 224 pixels (CUB-200).
    """
    if stem not in STEMS:
        raise ValueError(f"unknown stem {stem!r}; choose one of: {', '.join(STEMS)}")
    return conv(3, channels, 7, 2) if stem == "large" else conv(3, channels, kernel, stride)


def conv_bn(
    in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    """`conv`, BN."""
    return nn.Sequential(
        conv(in_channels, out_channels, kernel, stride, groups), nn.BatchNorm2d(out_channels)
    )


def conv_bn_relu(
    in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    """`conv`, BN, ReLU (in place: the backward of BN needs its input only)."""
    return conv_bn(in_channels, out_channels, kernel, stride, groups).append(nn.ReLU(inplace=True))


def init_convs(model: nn.Module) -> None:
    """Draw every convolution's weight from N(0, 2 / (k * k * out_channels)) and zero its bias, in place.

    Source: He et al. 2015 (arXiv:1502.01852), fan out. RepDistiller and mdistiller write it in two ways,
    kaiming_normal_(fan_out, relu) and normal_(0, sqrt(2 / n)), which are the same. BN starts at 1 and 0 by default.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
