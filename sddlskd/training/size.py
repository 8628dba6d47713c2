"""Count what a network costs: its parameters, and its operations for one image."""

import copy
import logging

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["size_of"]

log = logging.getLogger(__name__)


def size_of(network: nn.Module, image_CHW: tuple[int, ...]) -> dict[str, int]:
    """Return the number of parameters of a network, and of its operations for one image.

    A copy without values is counted, so the network, its statistics and the random generators stay
    as they are.

    Args:
        network: The network, a callable 1 C H W -> any.
        image_CHW: The shape of an image.

    Returns:
        {"parameters": ..., "flops": ...}. A multiplication and an addition count as two operations;
        those of convolutions and matrix products are counted, as torch's FlopCounterMode does. An
        entry is missing if it cannot be counted: "flops" of a network of others that cannot be
        passed an image without values, and "parameters" of one whose layers are not built yet.
    """
    found: dict[str, int] = {}
    try:
        found["parameters"] = sum(parameter.numel() for parameter in network.parameters())
        empty = copy.deepcopy(network).to("meta").eval()
        for module in empty.modules():  # hooks of the network write into what it belongs to
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        counter = FlopCounterMode(display=False)
        with torch.random.fork_rng(devices=[]), torch.no_grad(), counter:
            empty(torch.empty(1, *image_CHW, device="meta"))
        found["flops"] = counter.get_total_flops()
    except Exception as error:  # a network of others may raise anything, and no run ends for this
        log.debug("operations are not counted: %s", error)
    return found
