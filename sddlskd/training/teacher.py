"""The teacher network and its weight files: paths, publishing, hashes and measured accuracy."""

import logging
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from sddlskd.files.checkpoint import check_finite, load_weights
from sddlskd.training.devices import autocast

__all__ = ["Teacher"]

log = logging.getLogger(__name__)


class Teacher:
    """A frozen network that returns logit maps.

    The network runs in eval mode, without gradients, with BatchNorm folded into the convolutions
    if torch.fx can trace it and it uses no layer twice.

    Args:
        network: the module.
        path: the file of its weights; None to keep the weights as they are.
        name: name of the network, for messages.
        device: device that the network is moved to.
        precision: precision of the forward pass: "fp32", "bf16" or "fp16".
        compile: whether to apply torch.compile.

    Raises:
        ValueError: if the file does not hold weights of this network, is unreadable
            (see `load_weights`), or holds NaN or infinity.
        FileNotFoundError: if the file is missing.
    """

    def __init__(
        self,
        network: nn.Module,
        path: Path | None,
        *,
        name: str,
        device: torch.device,
        precision: str,
        compile: bool,
    ) -> None:
        if path is not None:
            load_weights(network, path, name)
            check_finite(network, path)
        self.name = name
        self.network = _folded(network.eval().requires_grad_(False), name).eval()
        self.network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.precision = precision
        self._forward = torch.compile(self.network) if compile else self.network

    def __call__(self, images_BCHW: Tensor, views_B: Tensor | None = None) -> Tensor:
        """Return the logit map (B, K, H, W) of a batch, as an inference tensor.

        `views_B` identifies the image and the view of each sample. Only `TeacherCache` uses it.
        """
        with torch.inference_mode(), autocast(images_BCHW.device, self.precision):
            logit_map_BKHW: Tensor = self._forward(images_BCHW)
        return logit_map_BKHW


def _folded(network: nn.Module, name: str) -> nn.Module:
    try:
        traced = torch.fx.symbolic_trace(network)
    except Exception as error:  # tracing runs the network's own code, which can raise anything
        log.info("teacher %s cannot be traced (%s); its BatchNorm stays unfolded", name, error)
        return network
    layers = {
        n
        for n, layer in traced.named_modules()
        if isinstance(layer, nn.Conv2d | nn.Linear | nn.BatchNorm2d)
    }
    calls = Counter(node.target for node in traced.graph.nodes if node.target in layers)
    # If a layer is used twice, `fuse` would fold the BatchNorm after one use into every use.
    if max(calls.values(), default=0) > 1:
        log.info("teacher %s uses a layer twice; its BatchNorm stays unfolded", name)
        return network
    folded: nn.Module = fuse(traced)
    return folded
