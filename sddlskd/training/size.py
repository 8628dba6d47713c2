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
        those of convolutions and matrix products are counted, as torch's FlopCounterMode does.
        "flops" is missing if a network of others cannot be passed an image without values.
    """
    found = {"parameters": sum(parameter.numel() for parameter in network.parameters())}
    try:
        empty = copy.deepcopy(network).to("meta").eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            empty(torch.empty(1, *image_CHW, device="meta"))
    except (RuntimeError, NotImplementedError, TypeError) as error:
        log.debug("operations are not counted: %s", error)
        return found
    return {**found, "flops": counter.get_total_flops()}
