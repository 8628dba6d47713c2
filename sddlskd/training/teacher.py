"""The teacher: a frozen network that returns logit maps and taps.

Shapes: B batch, C channels, K classes, H W sides.
"""

import copy
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.experimental.optimization import fuse

from sddlskd.files.checkpoint import check_finite, load_weights
from sddlskd.models import LogitMapModel, Taps
from sddlskd.training.devices import autocast, compiled

__all__ = ["Resized", "Teacher", "image_of_teacher"]

log = logging.getLogger(__name__)


class Teacher:
    """Frozen network that returns logit maps, or taps: the logit map and the maps on the way to it.

    Call the instance for the logit map (B, K, H, W) of images_BCHW, and `taps` for the inner maps,
    too. The network runs in eval mode and without gradients. BatchNorm is folded into the
    convolutions, unless torch.fx cannot trace the network or the network uses a layer twice.

    Args:
        network: the module, which is changed: it gets the weights, eval mode, and parameters that
            require no gradient.
        path: the file of the weights; None to keep the weights of `network`.
        name: name of the network, for messages.
        device: device on which the forward pass runs.
        precision: precision of the forward pass: "fp32", "bf16" or "fp16".
        compile: whether to apply torch.compile.
        compile_mode: mode of torch.compile: "default" or "max_autotune".
        image_size: side in pixels to which the images are resized first; None for no resizing.

    Raises:
        ValueError: If the file cannot be read, does not hold weights of this network, or holds NaN
            or infinity.
        FileNotFoundError: If the file is missing.
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
        compile_mode: str = "default",
        image_size: int | None = None,
    ) -> None:
        if path is not None:
            load_weights(network, path, name)
            check_finite(network, path)
        self.name = name
        network.eval().requires_grad_(False)
        tapped: nn.Module = _Tapped(network, image_size)
        folded = _folded(tapped, name)
        if folded is not None:
            tapped, network = folded, _logit_map_alone(folded)
        elif image_size is not None:
            network = Resized(network, image_size)
        for module in (tapped, network):
            module.eval().to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.network = network
        self.precision = precision
        self._forward: Callable[[Tensor], Tensor] = network
        self._taps: Callable[[Tensor], Taps] = tapped
        if compile:
            # The compiler runs at the first call, so taps that nobody asks for cost nothing.
            self._forward, self._taps = (compiled(each, compile_mode) for each in (network, tapped))

    def __call__(self, images_BCHW: Tensor, views_B: Tensor | None = None) -> Tensor:
        """Return the logit map (B, K, H, W) of a batch, as an inference tensor.

        `views_B` is ignored; it is there because `TeacherCache` takes it.
        """
        with torch.inference_mode(), autocast(images_BCHW.device, self.precision):
            return self._forward(images_BCHW)

    def taps(self, images_BCHW: Tensor, views_B: Tensor | None = None) -> Taps:
        """Return the logit map and the inner maps of a batch, without gradients.

        If the network is not a `LogitMapModel`, the result holds the logit map and nothing else.
        The logit map equals that of `__call__`. Unlike the result of `__call__`, the tensors are no
        inference tensors, so a loss may save them for its backward pass.

        Args:
            images_BCHW: the images.
            views_B: ignored; it is there because `TeacherCache` takes it.

        Returns:
            The `Taps`; `logit_map` is (B, K, H, W). With "bf16" or "fp16", tensors may be in half
            precision.
        """
        # Autograd could not keep the tensors of inference mode.
        with torch.no_grad(), autocast(images_BCHW.device, self.precision):
            return self._taps(images_BCHW)


def image_of_teacher(image_CHW: Sequence[int], image_size: int | None) -> tuple[int, int, int]:
    """Return the shape (C, H, W) of an image as a teacher sees it.

    `image_CHW` is the shape of the image in the data set. `image_size` is the side in pixels to
    which the teacher resizes images; None for no resizing.
    """
    channels, height, width = image_CHW
    if image_size is None:
        return channels, height, width
    return channels, image_size, image_size


def _resized(images_BCHW: Tensor, side: int) -> Tensor:
    """Return images resized to squares with `side` pixels, bilinearly with antialiasing."""
    return F.interpolate(
        images_BCHW, (side, side), mode="bilinear", align_corners=False, antialias=True
    )


class Resized(nn.Module):
    """A network in front of which images are resized to squares, bilinearly with antialiasing.

    Args:
        network: the network, from images (B, C, side, side) to logit maps.
        side: side of the squares, in pixels.
    """

    def __init__(self, network: nn.Module, side: int) -> None:
        super().__init__()
        self.network = network
        self.side = side

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Return the logit map of images (B, C, H, W) of any size."""
        logit_map_BKHW: Tensor = self.network(_resized(images_BCHW, self.side))
        return logit_map_BKHW


class _Tapped(nn.Module):
    """A network whose forward pass returns its taps, so that torch.fx can trace them.

    If `image_size` is not None, the images are resized to squares with this side first.
    """

    def __init__(self, network: nn.Module, image_size: int | None) -> None:
        super().__init__()
        self.network = network
        self.image_size = image_size

    def forward(self, images_BCHW: Tensor) -> Taps:
        if self.image_size is not None:
            images_BCHW = _resized(images_BCHW, self.image_size)
        if isinstance(self.network, LogitMapModel):
            return self.network.taps(images_BCHW)
        return Taps.of_map(self.network(images_BCHW))


def _folded(network: nn.Module, name: str) -> fx.GraphModule | None:
    """Return a copy of a network with BatchNorm folded into the convolutions.

    Return None if the network cannot be traced or uses a layer twice. `network` returns taps, and
    `name` is its name in messages.
    """
    try:
        traced = fx.symbolic_trace(network)
    # Tracing runs the network's own code, which can raise anything.
    except Exception as error:
        # This only costs some time, so it is no news for a user: most foreign networks end here.
        log.debug("teacher %s cannot be traced (%s); its BatchNorm stays unfolded", name, error)
        return None
    layers = {
        n
        for n, layer in traced.named_modules()
        if isinstance(layer, nn.Conv2d | nn.Linear | nn.BatchNorm2d)
    }
    calls = Counter(node.target for node in traced.graph.nodes if node.target in layers)
    # If a layer is used twice, `fuse` would fold the BatchNorm after one use into every use.
    if max(calls.values(), default=0) > 1:
        log.debug("teacher %s uses a layer twice; its BatchNorm stays unfolded", name)
        return None
    folded = fuse(traced)
    assert isinstance(folded, fx.GraphModule)
    return folded


def _logit_map_alone(tapped: fx.GraphModule) -> fx.GraphModule:
    """Return a network that computes only the logit map and shares all parameters with `tapped`.

    A tap can keep a BatchNorm from being folded. Both networks therefore come from one folding, so
    that their logit maps have the same bits.
    """
    graph = copy.deepcopy(tapped.graph)
    output = graph.output_node()
    (taps,) = output.args
    assert isinstance(taps, fx.Node)
    # A call whose result nobody uses was written for its effect, such as a ReLU in place.
    kept = {node for node in graph.nodes if not node.users}
    output.args = (taps.args[0],)  # the first field of Taps
    for node in reversed(graph.nodes):
        if not node.users and node not in kept:
            graph.erase_node(node)
    return fx.GraphModule(tapped, graph)
