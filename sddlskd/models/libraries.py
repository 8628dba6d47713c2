"""Create networks of timm and torchvision as logit-map models.

conf/student/timm.yaml and conf/student/torchvision.yaml name these functions.
"""

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sddlskd.models.base import LogitMapModel
from sddlskd.models.wrapping import from_network

__all__ = ["from_timm", "from_torchvision"]


def from_timm(
    name: str,
    num_classes: int,
    pretrained: bool = False,
    map: str = "exact",
    resize: int | None = None,
    **options: Any,
) -> LogitMapModel:
    """Return a timm network as a logit-map model, see `from_network`.

    The model maps images (B, 3, H, W) to a logit map (B, K, h, w), whose mean over h and w is the
    network's logits. If torch's default device is the meta device, the model is on that device and
    no published weights are loaded.

    Args:
        name: Name of the network in timm.
        num_classes: K, the number of classes.
        pretrained: Whether to load timm's published weights, which are downloaded if needed. The
            head keeps random weights if the published head has another number of classes.
        map: "exact" or "per_cell", see `from_network`.
        resize: Side in pixels to which images are resized, see `from_network`.
        **options: Further arguments of timm.create_model. With `img_size`, the network is checked
            with images of that size, in pixels.

    Returns:
        The model, which shares its parameters with the timm network. Call `train()` or `eval()` on
        the model before use.

    Raises:
        ValueError: If timm is not installed, if timm does not know the name, if timm cannot build
            the network with the options, or if `from_network` refuses the network.
        OSError: If the weights cannot be downloaded.
    """
    try:
        import timm
    except ImportError as error:
        raise ValueError(
            f"{name} is timm's, and timm is not installed: pip install 'sddlskd[timm]'"
        ) from error

    if not timm.is_model(name):
        raise ValueError(f"timm has no network {name!r}{_close(name, timm.list_models())}")
    load = pretrained and not _meta()
    # Planning builds networks on the meta device, on which `from_network` cannot check values.
    with torch.device("cpu"):
        try:
            network = timm.create_model(name, num_classes=num_classes, pretrained=load, **options)
        except OSError as error:
            raise OSError(
                f"model.pretrained=true of {name} cannot be downloaded ({error}); run once with a "
                "network connection, or leave model.pretrained out for random weights"
            ) from error
        except (TypeError, ValueError, AssertionError, RuntimeError) as error:
            raise ValueError(
                f"timm does not build {name} with {options} ({error}); see its documentation"
            ) from error
    return _placed(network, map, resize, options.get("img_size"))


def from_torchvision(
    name: str,
    num_classes: int,
    weights: str | None = None,
    map: str = "exact",
    resize: int | None = None,
    **options: Any,
) -> LogitMapModel:
    """Return a torchvision network as a logit-map model, see `from_network`.

    The model maps images (B, 3, H, W) to a logit map (B, K, h, w), whose mean over h and w is the
    network's logits. If torch's default device is the meta device, the model is on that device and
    no published weights are loaded.

    Args:
        name: Name of the network in torchvision.
        num_classes: K, the number of classes.
        weights: Name of the published weights to load, such as DEFAULT or IMAGENET1K_V1; they are
            downloaded if needed. None for random weights. The head keeps random weights if the
            published head has another number of classes.
        map: "exact" or "per_cell", see `from_network`.
        resize: Side in pixels to which images are resized, see `from_network`.
        **options: Further arguments of torchvision.models.get_model. With `image_size`, the network
            is checked with images of that size, in pixels.

    Returns:
        The model, which shares its parameters with the torchvision network. Call `train()` or
        `eval()` on the model before use.

    Raises:
        ValueError: If torchvision does not know the name or the weights, if torchvision cannot
            build the network with the options, or if `from_network` refuses the network.
        RuntimeError: If the published weights do not fit the network with these options, or if
            their file is damaged.
        OSError: If the weights cannot be downloaded.
    """
    from torchvision.models import get_model, get_model_weights, list_models  # slow to import

    if name not in list_models():
        raise ValueError(f"torchvision has no network {name!r}{_close(name, list_models())}")
    published = get_model_weights(name)
    if weights is not None and weights not in published.__members__:
        raise ValueError(
            f"torchvision has no weights {weights!r} of {name}; "
            f"valid are {', '.join(published.__members__)}"
        )
    with torch.device("cpu"):
        try:
            network = get_model(name, weights=None, num_classes=num_classes, **options)
        except (TypeError, ValueError, AssertionError, RuntimeError) as error:
            raise ValueError(
                f"torchvision does not build {name} with {options} ({error})"
            ) from error
    model = _placed(network, map, resize, options.get("image_size"))
    if weights is not None and not _meta():
        _load_but_other_heads(model, _downloaded(name, published, weights))
    return model


def _downloaded(name: str, published: Any, weights: str) -> dict[str, Tensor]:
    """Return the weights of torchvision's network `name` that its enumeration calls `weights`.

    Raise OSError if they are neither in torch's cache nor can be downloaded.
    """
    entry = published[weights]
    try:
        found: dict[str, Tensor] = entry.get_state_dict(check_hash=True, weights_only=True)
    except OSError as error:
        place = Path(torch.hub.get_dir(), "checkpoints")
        raise OSError(
            f"model.weights={weights} of {name} cannot be downloaded from {entry.url} "
            f"({error}); put this file into {place}, or leave model.weights out for random weights"
        ) from error
    return found


def _load_but_other_heads(model: LogitMapModel, weights: dict[str, Tensor]) -> None:
    """Load published weights in place, except those of a head with another number of classes."""
    own = model.state_dict()
    of_head = {id(parameter) for parameter in model.head.parameters()}
    heads = {
        name.removeprefix("network.")
        for name, parameter in model.named_parameters()
        if id(parameter) in of_head
    }
    loaded = dict(weights)
    for name in heads & loaded.keys():
        if loaded[name].shape != own[name].shape:
            loaded[name] = own[name]
    model.load_state_dict(loaded)


def _meta() -> bool:
    return torch.empty(0).is_meta


def _placed(
    network: nn.Module, map: str, resize: int | None, size: int | Sequence[int] | None
) -> LogitMapModel:
    """Return the checked logit-map model of a network, on the meta device if torch's default is it.

    Args:
        network: Network of a library, on the CPU.
        map: Passed to `from_network`.
        resize: Passed to `from_network`.
        size: Side or (height, width) of the images to check the network with, in pixels. None if
            the network accepts several sizes. With `resize`, its side is taken instead.
    """
    with torch.device("cpu"):
        sides = (size, size) if isinstance(size, int) else size
        if resize is not None:
            sides = None
        noise_BCHW = None
        if sides is not None:
            noise_BCHW = torch.randn(2, 3, *sides, generator=torch.Generator().manual_seed(0))
        model = from_network(network, noise_BCHW, map, resize)
    return model.to("meta") if _meta() else model


def _close(name: str, valid: list[str]) -> str:
    close = get_close_matches(name, valid, n=3)
    if close:
        return f"; did you mean {' or '.join(close)}?"
    return f"; it has {len(valid)}, such as {', '.join(valid[:3])}"
