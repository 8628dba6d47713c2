"""The networks, one file per family.

Each network returns a logit map (B, K, H, W), and `model(x_BCHW).mean((2, 3))` are its logits. The
parameters have the names of the published CIFAR checkpoints (RepDistiller, mdistiller), which
therefore load with strict=True.
"""

from collections.abc import Callable
from difflib import get_close_matches
from functools import partial

from torch import nn

from sddlskd.models.base import STEMS, LogitMapModel, Taps
from sddlskd.models.foreign import ForeignNetwork
from sddlskd.models.libraries import from_timm, from_torchvision
from sddlskd.models.mobilenetv1 import MobileNetV1
from sddlskd.models.mobilenetv2 import MobileNetV2
from sddlskd.models.resnet import ResNet
from sddlskd.models.resnet4stage import BasicBlock, Bottleneck, ResNet4Stage
from sddlskd.models.shufflenetv1 import ShuffleNetV1
from sddlskd.models.shufflenetv2 import ShuffleNetV2
from sddlskd.models.vgg import VGG
from sddlskd.models.wrapping import from_network
from sddlskd.models.wrn import WideResNet

__all__ = [
    "ForeignNetwork",
    "LogitMapModel",
    "Taps",
    "create",
    "draw_ends",
    "from_network",
    "from_timm",
    "from_torchvision",
    "names",
]

_NETWORKS: dict[str, Callable[..., LogitMapModel]] = {
    "resnet8": partial(ResNet, blocks=1),
    "resnet14": partial(ResNet, blocks=2),
    "resnet20": partial(ResNet, blocks=3),
    "resnet32": partial(ResNet, blocks=5),
    "resnet44": partial(ResNet, blocks=7),
    "resnet56": partial(ResNet, blocks=9),
    "resnet110": partial(ResNet, blocks=18),
    "resnet8x4": partial(ResNet, blocks=1, first=32, channels=(64, 128, 256)),
    "resnet32x4": partial(ResNet, blocks=5, first=32, channels=(64, 128, 256)),
    "resnet18": partial(ResNet4Stage, BasicBlock, (2, 2, 2, 2)),
    "resnet50": partial(ResNet4Stage, Bottleneck, (3, 4, 6, 3)),
    "wrn_16_1": partial(WideResNet, units=2, width=1),
    "wrn_16_2": partial(WideResNet, units=2, width=2),
    "wrn_40_1": partial(WideResNet, units=6, width=1),
    "wrn_40_2": partial(WideResNet, units=6, width=2),
    "vgg8": partial(VGG, (1, 1, 1, 1, 1)),
    "vgg11": partial(VGG, (1, 1, 2, 2, 2)),
    "vgg13": partial(VGG, (2, 2, 2, 2, 2)),
    "vgg16": partial(VGG, (2, 2, 3, 3, 3)),
    "vgg19": partial(VGG, (2, 2, 4, 4, 4)),
    "mobilev1": MobileNetV1,
    "mobilev2": MobileNetV2,
    "shufflev1": ShuffleNetV1,
    "shufflev2": ShuffleNetV2,
}
_ONE_STEM = ("vgg", "mobilev1")
_FAMILIES = (
    MobileNetV1,
    MobileNetV2,
    ResNet,
    ResNet4Stage,
    ShuffleNetV1,
    ShuffleNetV2,
    VGG,
    WideResNet,
)


def names() -> tuple[str, ...]:
    """Return the names of all networks that `create` builds, grouped by family."""
    return tuple(_NETWORKS)


def create(name: str, num_classes: int, stem: str = "small") -> LogitMapModel:
    """Return a new network with random weights, by name.

    The network maps images (B, 3, H, W) to a logit map (B, K, h, w), which holds the logits of each
    position; its mean over h and w is the logits (B, K). The weights are drawn from torch's global
    generator.

    Args:
        name: Name of the network, one of `names()`.
        num_classes: K, the number of classes, at least 2.
        stem: "small" for first layers that suit images of 32 pixels. "large" for a first
            convolution of 7x7 with stride 2, for images of 224 pixels. The VGGs and mobilev1 have
            the same first layers for images of every size; their stem is called "small".

    Returns:
        The network, in train mode.

    Raises:
        ValueError: If the name or the stem is unknown, if `stem` is "large" for a VGG or mobilev1,
            or if `num_classes` is less than 2.
    """
    if name not in _NETWORKS:
        close = get_close_matches(name, _NETWORKS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"unknown network {name!r}; {hint}choose one of: {', '.join(_NETWORKS)}")
    if num_classes < 2:
        raise ValueError(f"num_classes is {num_classes}; a classifier needs at least 2")
    if stem not in STEMS:
        raise ValueError(f"unknown stem {stem!r} of {name}; choose one of: {', '.join(STEMS)}")
    if stem == STEMS[0]:
        return _NETWORKS[name](num_classes=num_classes)
    if name.startswith(_ONE_STEM):
        raise ValueError(
            f"{name} has no {stem} stem: it is the same network for images of every size; "
            "leave stem out"
        )
    return _NETWORKS[name](num_classes=num_classes, stem=stem)


def draw_ends(network: nn.Module) -> None:
    """Initialise anew, in place, the layers that SDD's code replaces in a network for CUB-200.

    These layers are

    - the first convolution of a network with the large stem (7x7);
    - the classifier of every network but mobilev2.

    Their weights are drawn from PyTorch's default distribution by torch's global generator. A
    network that is not of a class in `sddlskd.models` does not change.

    Source: modify_student_model_for_cub200 in train_origin.py of SDD at e412036.
    """
    if not isinstance(network, _FAMILIES):
        return
    first = next(layer for layer in network.modules() if isinstance(layer, nn.Conv2d))
    if first.kernel_size == (7, 7):
        first.reset_parameters()
    if not isinstance(network, MobileNetV2):
        network.head.reset_parameters()
