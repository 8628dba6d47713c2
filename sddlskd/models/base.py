"""The base class of all networks, and layers that several of them use.

Every network computes a feature map and applies a linear head to each cell of the map.

Shapes: B batch, C channels, H W height and width (of an image in pixels, of a map in cells), K
classes.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

STEMS = ("small", "large")  # for images of 32 pixels, for images of 224


class Taps(NamedTuple):
    """What a network computes for a batch of images: its logit map and the maps on the way to it.

    A logit map holds the logits of each position. Its mean over H and W is the logits of the
    network.

    Attributes:
        logit_map: Logit map, (B, K, H, W).
        stages: Maps (B, C, H, W) after the stem (the first layers) and after each stage (a group of
            later layers), with the division into stages of RepDistiller and mdistiller. () for a
            network whose stages are unknown.
        preacts: For each entry of `stages`, the map (B, C, H, W) before the last ReLU; for a WRN,
            the map before the next ReLU. The first entry is `stages[0]` itself. () for a network
            whose stages are unknown or do not end at a ReLU.
        pooled: Input of the classifier, (B, C): the mean of `last` over H and W. (B, 0) for a
            network that shows a logit map alone.
        strong_map: Logit map (B, K, H, W) of a second, strongly augmented view of the same images.
            None if the images have one view.
        last: Map (B, C, H, W) that the classifier is applied to at each position. None for a
            network that shows a logit map alone.
        others: If these are the taps of several teachers, the logit maps (B, K, H, W) of all but
            the first, whose sides may differ; else ().
    """

    logit_map: Tensor
    stages: tuple[Tensor, ...]
    preacts: tuple[Tensor, ...]
    pooled: Tensor
    strong_map: Tensor | None = None
    last: Tensor | None = None
    others: tuple[Tensor, ...] = ()

    @classmethod
    def of_map(cls, logit_map_BKHW: Tensor) -> "Taps":
        """Return taps with a logit map (B, K, H, W) alone, for a network that shows no other maps.

        `stages`, `preacts` and `others` are (), `pooled` has the shape (B, 0), and `strong_map` and
        `last` are None.
        """
        return cls(logit_map_BKHW, (), (), logit_map_BKHW[:, :0, 0, 0])

    def wide(self) -> "Taps":
        """Return the taps with all tensors converted to float32; float64 stays float64."""
        strong_map = last = None
        if self.strong_map is not None:
            strong_map = _wide(self.strong_map)
        if self.last is not None:
            last = _wide(self.last)
        return Taps(
            _wide(self.logit_map),
            tuple(map(_wide, self.stages)),
            tuple(map(_wide, self.preacts)),
            _wide(self.pooled),
            strong_map,
            last,
            tuple(map(_wide, self.others)),
        )


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class LogitMapModel(nn.Module, ABC):
    """Base class of classifiers that map normalised images (B, 3, H, W) to logit maps (B, K, h, w).

    The classifier's linear head is applied to each position of the last feature map (B, C, h, w),
    and gives the logit map. The logits (B, K) are the mean of the logit map,
    `model(x_BCHW).mean((2, 3))`. Because the head is linear, they equal the head applied to the
    mean of the feature map, as in the published networks.

    A subclass defines `head` and `features`. It overrides `taps` to show the maps of its stages
    (groups of layers), and `norms_before_relu` to serve as a teacher of the method OFD.
    """

    @property
    @abstractmethod
    def head(self) -> nn.Linear:
        """Return the linear classifier, with C input features and K classes."""

    @abstractmethod
    def features(self, x_BCHW: Tensor) -> Tensor:
        """Return the last feature map (B, C, h, w) of normalised images (B, 3, H, W).

        The head is applied to each position of this map.
        """

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the logit map (B, K, h, w) of normalised images (B, 3, H, W).

        h and w are the height and width of `features(x_BCHW)`.
        """
        return self._logit_map(self.features(x_BCHW))

    def taps(self, x_BCHW: Tensor) -> Taps:
        """Return the logit map (B, K, h, w) and the inner maps of normalised images (B, 3, H, W).

        `logit_map` equals `forward(x_BCHW)`, `last` is `features(x_BCHW)`, and `pooled` is its mean
        over h and w. By default, `stages` and `preacts` are (). No later operation of the network
        overwrites a returned map.
        """
        return self._taps((), (), self.features(x_BCHW))

    def norms_before_relu(self) -> tuple[nn.BatchNorm2d, ...]:
        """Return the BatchNorm in front of the last ReLU of each stage after the stem.

        A stage is a group of layers, and the stem is the first layers. In a WRN, the BatchNorm in
        front of the next ReLU is taken. The BatchNorms are in the order of `taps(x).stages[1:]`.
        The method OFD reads those of a teacher. By default the result is (), and OFD refuses such a
        teacher.
        """
        return ()

    def _taps(self, stages: Sequence[Tensor], preacts: Sequence[Tensor], last_BCHW: Tensor) -> Taps:
        """Return the taps of a batch; `last_BCHW` is the map that the head is applied to."""
        pooled_BC = last_BCHW.mean((2, 3))
        logit_map_BKHW = self._logit_map(last_BCHW)
        return Taps(logit_map_BKHW, tuple(stages), tuple(preacts), pooled_BC, last=last_BCHW)

    def _logit_map(self, last_BCHW: Tensor) -> Tensor:
        # In channels_last both permutes are free, and the head is one matrix product, as fast as a
        # 1x1 convolution. In other memory formats, the head is faster than a 1x1 convolution.
        logits_BHWK: Tensor = self.head(last_BCHW.permute(0, 2, 3, 1))
        return logits_BHWK.permute(0, 3, 1, 2)


def conv(
    in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1
) -> nn.Conv2d:
    """Return a convolution without bias.

    Args:
        in_channels: Number of input channels.
        out_channels: Number of output channels.
        kernel: Side of the square kernel, an odd number.
        stride: Stride in both directions.
        groups: Number of channel groups, a divisor of both numbers of channels.

    Returns:
        A layer (B, in_channels, H, W) -> (B, out_channels, H/stride, W/stride), rounded up. The
        padding is kernel // 2.
    """
    return nn.Conv2d(
        in_channels, out_channels, kernel, stride, padding=kernel // 2, groups=groups, bias=False
    )


def stem_conv(channels: int, kernel: int, stem: str, stride: int = 1) -> nn.Conv2d:
    """Return the stem's (first) convolution of a network for RGB images, without bias.

    Args:
        channels: Number of output channels.
        kernel: Side of the square kernel of the small stem, an odd number.
        stem: "small" for a convolution with `kernel` and `stride`, or "large" for a 7x7 convolution
            with stride 2, for which `kernel` and `stride` are not read.
        stride: Stride of the small stem.

    Returns:
        A layer (B, 3, H, W) -> (B, channels, H/s, W/s), rounded up, with s the stride of the chosen
        stem.

    Raises:
        ValueError: If `stem` is unknown.
    """
    if stem not in STEMS:
        raise ValueError(f"unknown stem {stem!r}; choose one of: {', '.join(STEMS)}")
    return conv(3, channels, 7, 2) if stem == "large" else conv(3, channels, kernel, stride)


def conv_bn(
    in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    """Return a convolution without bias, followed by batch normalisation (BN).

    Args:
        in_channels: Number of input channels.
        out_channels: Number of output channels.
        kernel: Side of the square kernel, an odd number.
        stride: Stride in both directions.
        groups: Number of channel groups, a divisor of both numbers of channels.

    Returns:
        Two layers (B, in_channels, H, W) -> (B, out_channels, H/stride, W/stride), rounded up.
    """
    return nn.Sequential(
        conv(in_channels, out_channels, kernel, stride, groups), nn.BatchNorm2d(out_channels)
    )


def conv_bn_relu(
    in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    """Return a convolution without bias, followed by batch normalisation (BN) and ReLU.

    The ReLU overwrites the output of BN.

    Args:
        in_channels: Number of input channels.
        out_channels: Number of output channels.
        kernel: Side of the square kernel, an odd number.
        stride: Stride in both directions.
        groups: Number of channel groups, a divisor of both numbers of channels.

    Returns:
        Three layers (B, in_channels, H, W) -> (B, out_channels, H/stride, W/stride), rounded up.
    """
    # In place is safe, because the backward pass of BN needs only the input of BN.
    return conv_bn(in_channels, out_channels, kernel, stride, groups).append(nn.ReLU(inplace=True))


def last_norm(block: nn.Sequential) -> nn.BatchNorm2d:
    """Return the last layer of a block, ReLUs not counted; this layer must be a BatchNorm2d.

    Raise AssertionError if the layer is no BatchNorm2d, and IndexError if all layers are ReLUs.
    """
    norm = [layer for layer in block if not isinstance(layer, nn.ReLU)][-1]
    assert isinstance(norm, nn.BatchNorm2d)
    return norm


def init_convs(model: nn.Module) -> None:
    """Initialise all 2D convolutions of a model in place, and leave all other layers as they are.

    Each weight is drawn from a normal distribution with mean 0 and variance 2 / (k * k *
    out_channels), with k the side of the kernel, by torch's global generator. Biases become 0.

    Source: He et al. 2015 (arXiv:1502.01852), fan out, as in RepDistiller and mdistiller.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
