"""The parts that all networks share.

Every network computes a feature map and applies a linear head to each cell of the map.

Shapes: B batch, C channels, H W height and width (of an image in pixels, of a map in cells),
K classes.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

STEMS = ("small", "large")  # for images of 32 pixels, for images of 224


class Taps(NamedTuple):
    """What a network shows of one batch: the logit map and the maps on the way to it.

    Attributes:
        logit_map: logit map B K H W.
        stages: map B C H W of the stem and of each stage, as the field's codes count them. () for a
            network whose stages are unknown.
        preacts: the same maps before their last ReLU; the first entry is `stages[0]` itself. () for
            a network that has no such maps.
        pooled: input of the classifier, B C: the mean of the map that the head is applied to.
        strong_map: logit map B K H W of a second, strongly augmented view of the same images; None
            for a batch of one view.
        last: map B C H W that the head is applied to; None for a network without taps.
    """

    logit_map: Tensor
    stages: tuple[Tensor, ...]
    preacts: tuple[Tensor, ...]
    pooled: Tensor
    strong_map: Tensor | None = None
    last: Tensor | None = None

    @classmethod
    def of_map(cls, logit_map_BKHW: Tensor) -> "Taps":
        """Return taps with the logit map alone; the pooled features have no channels."""
        return cls(logit_map_BKHW, (), (), logit_map_BKHW[:, :0, 0, 0])

    def wide(self) -> "Taps":
        """Return the taps in float32; float64 stays float64."""
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
        )


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class LogitMapModel(nn.Module, ABC):
    """A classifier whose output is a logit map: normalised images B 3 H W -> B K h w.

    The logits B K are the mean of the map, `model(x_BCHW).mean((2, 3))`. The head is linear, so
    this mean equals the head applied to the mean feature, which gives the logits of the published
    networks.

    A subclass defines `head` and `features`. It overrides `taps` to show its stages, and
    `norms_before_relu` to serve OFD as a teacher.
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
        return self._logit_map(self.features(x_BCHW))

    def taps(self, x_BCHW: Tensor) -> Taps:
        """Return the logit map of normalised images B 3 H W, and the maps on the way to it.

        The logit map equals `forward(x_BCHW)`. A tap is never overwritten by a later operation. A
        network that does not override this method has no stages.
        """
        return self._taps((), (), self.features(x_BCHW))

    def norms_before_relu(self) -> tuple[nn.BatchNorm2d, ...]:
        """Return the last BatchNorm of each map in `taps(x).stages[1:]`, before the ReLU if any.

        The margins of OFD come from these layers. Return () for a network of which mdistiller names
        none.
        """
        return ()

    def _taps(self, stages: Sequence[Tensor], preacts: Sequence[Tensor], last_BCHW: Tensor) -> Taps:
        """Return the taps of a batch, given the map that the head is applied to."""
        pooled_BC = last_BCHW.mean((2, 3))
        logit_map_BKHW = self._logit_map(last_BCHW)
        return Taps(logit_map_BKHW, tuple(stages), tuple(preacts), pooled_BC, last=last_BCHW)

    def _logit_map(self, last_BCHW: Tensor) -> Tensor:
        # In channels_last both permutes are free and the head is one matrix product, as fast as a
        # 1x1 convolution. In other memory formats it is faster than a 1x1 convolution.
        logits_BHWK: Tensor = self.head(last_BCHW.permute(0, 2, 3, 1))
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


def last_norm(block: nn.Sequential) -> nn.BatchNorm2d:
    """Return the last BatchNorm of a block, which ends in BN or in BN and ReLU."""
    norm = [layer for layer in block if not isinstance(layer, nn.ReLU)][-1]
    assert isinstance(norm, nn.BatchNorm2d)
    return norm


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
