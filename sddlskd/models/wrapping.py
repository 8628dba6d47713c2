"""Turn any network with a feature map and a linear head into a logit-map model.

The code of the network need not change. The network runs once on random images while every function
call is recorded. The search starts at the logits and goes back to the linear head. From the head's
input, the search goes back to a global average of a feature map (or of patch tokens), or to a class
token.

The mean of the logit map is always the logits of the network. After an average alone, the head
applied to each cell gives such a map. In two other cases, the map is shifted to the right mean, see
`ForeignNetwork`: if the head reads a class token, and, if the user asks for it, if layers lie
between average and head. Any other network is rejected with an error that names the operation in
between.

Shapes: B batch, C channels, H W height and width (of an image in pixels, of a map in cells), N
tokens, K classes.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sddlskd.models.foreign import LAYOUTS, ForeignNetwork, Layer, Tap, grid
from sddlskd.models.stages import stages_of
from sddlskd.models.tracing import (
    TOLERANCE,
    Step,
    Trace,
    again,
    dropout_probability,
    emptied,
    equal,
    listening,
    same_values,
)

__all__ = ["MAPS", "from_network"]

MAPS = ("exact", "per_cell")
"""What happens to layers between the average of a network and its head.

exact: a network with such layers is rejected. per_cell: the layers are applied to each cell, and
the map is shifted so that its mean is the logits of the network, see `ForeignNetwork`.
"""

# Image sides in pixels, tried in this order until the network accepts one.
SIDES = (64, 224, 32, 96, 128, 256, 288, 299, 320, 384, 448, 512)

CURES = (
    "Build the network without it, or write it as a module that gives the logit map (B, K, H, W) "
    "itself"
)

PER_CELL = (
    "Set map=per_cell (+student.model.map=per_cell, +teacher.model.map=per_cell) to apply that "
    "layer to each cell and to keep the network's logits as the mean of the map"
)

# The heads of class token and distillation token, as timm names them.
TWO_HEADS = ("head", "head_dist")


def from_network(
    network: nn.Module,
    image_BCHW: Tensor | None = None,
    map: str = "exact",
    resize: int | None = None,
) -> ForeignNetwork:
    """Return a logit-map model around a network that classifies images (B, 3, H, W).

    The model maps the images to a logit map (B, K, h, w), whose mean over h and w is the logits of
    the network. The network may come from timm, torchvision or your own code. It must

    - accept batches of any size;
    - average a feature map or patch tokens globally, or read a class token;
    - end in one nn.Linear that gives the logits (B, K), or in two whose mean is the logits, as
      timm's networks with a distillation token. There may be dropout in front of the linear layer.

    The network is run on images to check these conditions. On the meta device, only shapes are
    checked. If the head reads a class token, the map is shifted so that its mean is the logits, see
    `ForeignNetwork`.

    Args:
        network: Network to wrap. Its modules keep their modes (train or eval).
        image_BCHW: One or more images that the network accepts, (B, C, H, W). None to try random
            RGB images, first with a side of 64 pixels, then of other usual sizes.
        map: One of `MAPS`, for a network with layers (other than dropout) between average and head,
            such as MobileNetV3. "exact" to reject such a network. "per_cell" to apply these layers
            to each cell, see `ForeignNetwork`. For a network without such layers, both give the
            same model.
        resize: Side in pixels to which the model resizes images (bilinearly) before the network
            sees them, for instance 224 for a transformer and images of 32 pixels. None to leave
            them as they are. `image_BCHW` must have that side.

    Returns:
        A model that shares the modules of `network`, without a copy. The model itself is in eval
        mode: call `train()` or `eval()` on the model before use.

    Raises:
        ValueError: If `map` or `resize` is invalid. If the network accepts none of the images, does
            not meet the conditions above, or cannot be wrapped for another reason; the message says
            why. Also if the mean of the logit map differs from the network's logits by more than
            1e-4 times the largest absolute logit or 1, whichever is larger.
    """
    if map not in MAPS:
        raise ValueError(f"map={map!r} is not one of {', '.join(MAPS)}")
    if resize is not None and (
        isinstance(resize, bool) or not isinstance(resize, int) or resize < 1
    ):
        raise ValueError(f"resize={resize!r} must be a number of pixels, such as 224")
    training = {module: module.training for module in network.modules()}
    try:
        network.eval()
        return _tapped(network, image_BCHW, map, resize)
    finally:
        for module, was in training.items():
            module.training = was


@torch.no_grad()
def _tapped(
    network: nn.Module, image_BCHW: Tensor | None, map: str, resize: int | None
) -> ForeignNetwork:
    what = type(network).__name__
    like = next(network.parameters(), None)
    if like is None:
        raise ValueError(f"{what} has no parameters, so no linear head. {CURES}")
    sides = SIDES if resize is None else (resize,)
    tried: Iterable[Tensor] = (_noise(like, side) for side in sides)
    if image_BCHW is not None:
        tried = (image_BCHW.to(like.device),)
    not_taken: list[str] = []
    refusals: list[_OneCell] = []
    for images_BCHW in tried:
        trace = Trace(network)
        try:
            with listening(network, trace), trace:
                logits = network(images_BCHW)
        except Exception as error:  # a network may raise any type for an unsupported image size
            not_taken.append(f"{tuple(images_BCHW.shape)}: {' '.join(str(error).split())[:200]}")
            continue
        try:
            heads = _heads_of(network, trace, logits, what)
            tap = _tap_of(network, trace, images_BCHW, what, heads, map)
        except _OneCell as error:  # nothing is averaged here: try a larger image
            refusals.append(error)
            if len(refusals) == 2:
                break
            continue
        stages = stages_of(network, trace, tap, images_BCHW)
        model = ForeignNetwork(network, heads, tap, stages, resize).eval()
        model.image_CHW = tuple(images_BCHW.shape[1:])
        _check_logits(model, images_BCHW, what)
        return model
    if refusals:
        raise ValueError(str(refusals[-1]))
    raise ValueError(
        f"{what} takes none of the images tried ({not_taken[0]}); "
        "give some with from_network(network, image_BCHW)"
    )


class _OneCell(ValueError):
    """A rejection that may be caused by a feature map of a single cell."""


def _noise(like: Tensor, side: int) -> Tensor:
    with torch.device("cpu"):
        noise_BCHW = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    return noise_BCHW.to(like.device, like.dtype)


def _check_logits(model: ForeignNetwork, images_BCHW: Tensor, what: str) -> None:
    """Raise ValueError if the mean of the logit map differs from the network's logits.

    The check uses one image more than `images_BCHW` has, so that it covers another batch size, too.
    On the meta device nothing is compared.
    """
    more_BCHW = torch.cat((images_BCHW, images_BCHW.flip(-1)))[: len(images_BCHW) + 1]
    logits_BK = model.network(more_BCHW)
    map_BKHW = model(more_BCHW)
    if map_BKHW.is_meta:
        return
    error = (map_BKHW.float().mean((2, 3)) - logits_BK.float()).abs().max().item()
    size = max(1.0, logits_BK.abs().max().item())
    if not error <= TOLERANCE * size:
        raise ValueError(
            f"{what}: the mean of its logit map differs from its logits by {error:.2g}, "
            f"more than {TOLERANCE:g} of {size:.2g}. {CURES}"
        )


def _heads_of(network: nn.Module, trace: Trace, logits: Any, what: str) -> tuple[str, ...]:
    """Return the name of the linear layer that computes the logits, or the names of two.

    With two layers, the logits are the mean of their outputs; they are called as in timm's networks
    with a distillation token. Raise ValueError if the output of the network is not logits (B, K),
    or if no linear layers compute the logits.
    """
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"{what} gives {type(logits).__name__}, not logits; wrap it so that it gives (B, K)"
        )
    if logits.ndim == 4:
        raise ValueError(
            f"{what} gives {tuple(logits.shape)}, a logit map already: use it as it is"
        )
    if logits.ndim != 2:
        raise ValueError(f"{what} gives {tuple(logits.shape)}; logits are (B, K). {CURES}")
    value = logits
    while True:
        for name, result in trace.gave.items():
            module = network.get_submodule(name)
            if result is not value or name not in trace.took or not isinstance(module, nn.Linear):
                continue
            if equal(F.linear(trace.took[name], module.weight, module.bias), value):
                return (name,)  # also for a subclass with a forward of its own, as in timm
        changed = trace.touched.get(id(value))
        step = changed[-1] if changed else trace.made.get(id(value))
        before = same_values(step, value) if step else None
        if before is None:
            outputs = [trace.gave[name] for name in TWO_HEADS if name in trace.gave]
            linear = [isinstance(getattr(network, name, None), nn.Linear) for name in TWO_HEADS]
            if all(linear) and len(outputs) == 2 and equal(torch.stack(outputs).mean(0), value):
                return TWO_HEADS
            origin = str(step or "an operation that was not recorded")
            raise ValueError(
                f"{what}: its logits do not come from an nn.Linear, but from {origin}. {CURES}"
            )
        value = before


class _Read(NamedTuple):
    """How the input of one head follows from a feature map."""

    source: Tensor  # the value that holds the map
    layout: str  # the layout of `source`
    token: int | None  # the token that the head reads; None: the mean of the map
    tail: tuple[Layer, ...]  # the layers between mean or token and head
    dropout: float  # the dropout probability in front of the head
    reason: str  # what is wrong with a non-empty tail


def _tap_of(
    network: nn.Module,
    trace: Trace,
    images_BCHW: Tensor,
    what: str,
    heads: tuple[str, ...],
    map: str,
) -> Tap:
    """Return the place of the feature map from which the inputs of the heads follow.

    The search goes back from each head's input to the map, and on to a module that has the map as
    its input or output. Raise ValueError if the input of a head is neither the global average of a
    map nor a class token, or if `map` does not allow the layers in between.
    """
    reads = [_read_of(network, trace, head, what) for head in heads]
    first = reads[0]
    tokens = tuple(read.token for read in reads if read.token is not None)
    differ = any(read.source is not first.source or read.tail != first.tail for read in reads)
    if differ or len(tokens) not in (0, len(heads)):
        raise ValueError(f"{what}: its heads {' and '.join(heads)} read different maps. {CURES}")
    if first.tail and not tokens and map == "exact":
        raise ValueError(f"{first.reason}. {PER_CELL}")
    prefix = 0
    if tokens:
        prefix = int(getattr(network, "num_prefix_tokens", max(tokens) + 1))
        if first.source.shape[1] <= prefix:
            raise ValueError(
                f"{what}: its head reads a token that lies beside no patch tokens. {CURES}"
            )
    if first.layout in ("BNC", "BCN"):
        grid(first.source.shape[LAYOUTS[first.layout][0]] - prefix, images_BCHW.shape)
    module, output, steps = _place(trace, first.source, images_BCHW, what)
    return Tap(module, output, steps, first.layout, first.dropout, tokens, prefix, first.tail)


def _read_of(network: nn.Module, trace: Trace, head: str, what: str) -> _Read:
    """Return how the input of a head follows from a map; raise ValueError if it does not."""
    value = trace.took[head]
    order = list(trace.gave)
    position = order.index(head)  # modules that ended later are not searched
    tail: list[Layer] = []
    visited: set[int] = set()
    dropout = 0.0
    one_cell = False
    reason = ""
    while True:
        touched = trace.touched.get(id(value), ())
        used = {layer.module for layer in tail}
        changed = [step for step in touched if step.name != "dropout" and step.owner not in used]
        for step in touched if id(value) not in visited else ():
            p = dropout_probability(step) if step.name == "dropout" else 0.0
            dropout += p - dropout * p
            if p and tail:
                raise ValueError(
                    f"{what}: dropout stands in front of `{tail[0].module}`, and not directly in "
                    f"front of the head `{head}`. {CURES}"
                )
        visited.add(id(value))
        made = changed[-1] if changed else trace.made.get(id(value))
        sources = [] if changed or made is None else made.sources
        for source in sources:
            assert made is not None
            token = _token(made, source, value)
            layout = _layout(source, value) if token is None else "BNC"
            if layout:
                return _Read(source, layout, token, tuple(tail), dropout, reason)
        before = None if changed or made is None else same_values(made, value)
        if before is not None:
            one_cell = one_cell or before.ndim > 2
            value = before
            continue
        why = _why(made)
        reason = reason or f"{what}: between map and head `{head}` stands {why}"
        layer = _layer_before(network, trace, value, made, order[:position])
        if layer is None:
            kind = _OneCell if one_cell else ValueError
            raise kind(f"{what}: between map and head `{head}` stands {why}. {CURES}")
        position = order.index(layer.module)
        tail.insert(0, layer)
        value = trace.took[layer.module]


def _token(step: Step, source: Tensor, value: Tensor) -> int | None:
    """Return the number of the token that `step` takes from tokens (B, N, C); None if none."""
    if step.name != "__getitem__" or source.ndim != 3 or source.shape[1] < 2:
        return None
    if value.numel() != source[:, 0].numel() or len(value) != len(source):
        return None
    numbers_N = torch.arange(source.shape[1], device="cpu")
    taken = set(again(step, numbers_N[None, :, None].expand(source.shape)).flatten().tolist())
    return int(taken.pop()) if len(taken) == 1 else None


def _layout(source: Tensor, pooled: Tensor) -> str | None:
    """Return the layout of `source` if `pooled` is its global average, else None.

    `pooled` may keep the averaged dimensions with size 1.
    """
    for layout, dims in LAYOUTS.items():
        if (
            source.ndim == len(layout)
            and source.numel() != pooled.numel()
            and len(source) == len(pooled)
        ):
            mean = source.mean(dims) if source.is_floating_point() else source
            if mean.numel() == pooled.numel() and equal(mean, pooled.flatten(1)):
                return layout
    return None


def _layer_before(
    network: nn.Module, trace: Trace, value: Tensor, made: Step | None, names: list[str]
) -> Layer | None:
    """Return the last of the named modules that gave `value`, if it can be applied to each cell.

    The module must see one cell of each image. BatchNorm is no such layer, because its statistics
    would depend on the number of cells. Modules with children, identity and dropout are passed
    over. `made` is the step that made `value`; the module may reshape its result. Return None if
    there is no such module.
    """
    for name in reversed(names):
        gave, took = trace.gave[name], trace.took.get(name)
        reshaped = made is not None and made.owner == name and gave.numel() == value.numel()
        module = network.get_submodule(name)
        passed = isinstance(module, nn.Identity | nn.Dropout) or bool(list(module.children()))
        if passed or not (gave is value or reshaped):
            continue
        if took is None or isinstance(module, _BatchNorm):
            return None
        of_one_cell = took[0].numel() == max(took.shape[1:]) and len(took) == len(value)
        return Layer(name, tuple(took.shape[1:])) if of_one_cell else None
    return None


def _why(step: Step | None) -> str:
    if step is None:
        return "a value whose computation was not recorded"
    return f"{step}, which is neither a global average nor a change of shape"


def _place(
    trace: Trace, value: Tensor, images_BCHW: Tensor, what: str
) -> tuple[str, bool, tuple[Step, ...]]:
    """Return the module from which `value` can be taken: (name, whether output or input, steps).

    The outermost module whose output or input is `value` is chosen, and outputs are preferred. If
    there is no such module, the search goes back through functions of one tensor. The returned
    steps repeat these functions. Raise ValueError if the search ends at another function.
    """
    steps: list[Step] = []
    while True:
        places = [(name, True) for name, gave in trace.gave.items() if gave is value and name]
        places += [(name, False) for name, took in trace.took.items() if took is value and name]
        if places:
            module, output = min(places, key=lambda place: (not place[1], place[0].count(".")))
            return module, output, tuple(reversed(steps))
        step = trace.made.get(id(value))
        if (
            step is None
            or value is images_BCHW
            or len(step.sources) != 1
            or id(value) in trace.touched
        ):
            raise ValueError(
                f"{what}: its map is not the output of a module, but of {step}; "
                "put that step into a module of its own"
            )
        steps.append(emptied(step))
        value = step.sources[0]
