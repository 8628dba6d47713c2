"""Count the parameters of a network, and its operations for one image."""

import copy
import logging

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sddlskd.models import ForeignNetwork

__all__ = ["size_of"]

log = logging.getLogger(__name__)


def size_of(network: nn.Module, image_CHW: tuple[int, ...]) -> dict[str, int]:
    """Return the number of parameters of a network, and of its operations for one image.

    To count, a copy on torch's meta device (shapes without values) is called in eval mode. The
    network itself and the random generators stay as they are.

    Args:
        network: the network, which takes images (1, C, H, W).
        image_CHW: (C, H, W) of an image.

    Returns:
        {"parameters": number, "flops": number}. The flops are those that torch's FlopCounterMode
        counts, mainly of convolutions and matrix products; a multiplication and an addition are
        two. For a network of timm or torchvision they are those of the library's own network, which
        computes logits and no logit map. "flops" is missing if the network cannot be called on the
        meta device. Both are missing if a lazy layer of the network has not been built yet. No
        error is raised.
    """
    found: dict[str, int] = {}
    try:
        found["parameters"] = sum(parameter.numel() for parameter in network.parameters())
        image_BCHW = torch.empty(1, *image_CHW, device="meta")
        if isinstance(network, ForeignNetwork):
            image_BCHW, network = network.resized(image_BCHW), network.network
        empty = copy.deepcopy(network).to("meta").eval().requires_grad_(False)
        for module in empty.modules():  # a hook could change an object outside of the copy
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        counter = FlopCounterMode(display=False)
        with torch.random.fork_rng(devices=[]), torch.no_grad(), counter:
            empty(image_BCHW)
        found["flops"] = counter.get_total_flops()
    # A user's network may raise anything, and no run must end for that.
    except Exception as error:
        log.debug("operations are not counted: %s", error)
    return found
