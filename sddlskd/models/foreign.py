"""Turn any network with a feature map and a linear head into a logit-map model.

The code of the network need not change. The network runs once on random images while every function
call is recorded. The search starts at the logits and goes back to the linear head. From the head's
input, the search goes back to a global average of a feature map (or of patch tokens). If another
operation lies in between, the mean of the logit map would not be the network's logits. The network
is then rejected with an error that names the operation.

Shapes: B batch, C channels, H W height and width (of an image in pixels, of a map in cells), N
tokens, K classes.
"""

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from math import isqrt
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

from sddlskd.models.base import LogitMapModel, Taps

__all__ = ["ForeignNetwork", "from_network"]

# Image sides in pixels, tried in this order until the network accepts one.
SIDES = (64, 224, 32, 96, 128, 256, 288, 299, 320, 384, 448, 512)
TOLERANCE = 1e-4  # relative to the largest absolute logit or to 1, whichever is larger
CURES = (
    "Build the network without it, or write it as a module that gives the logit map (B, K, H, W) "
    "itself"
)
CLASS_TOKEN = "an average of the patch tokens is needed (timm: global_pool=avg fc_norm=false)"


class _Step(NamedTuple):
    """A recorded function call inside the module named `owner`."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    owner: str

    @property
    def name(self) -> str:
        full = resolve_name(self.function) or repr(self.function)
        return full.removesuffix(".__get__").rpartition(".")[2]

    @property
    def sources(self) -> list[Tensor]:
        return [value for value in (*self.args, *self.kwargs.values()) if isinstance(value, Tensor)]

    def __str__(self) -> str:
        owner = f"`{self.owner}`" if self.owner else "the forward of the network itself"
        return f"{self.name} in {owner}"


class _Trace(TorchFunctionMode):
    """Recorder of the function that made each tensor, and of the input and output of each module.

    For a module that runs more than once, the record keeps the last input and the last output.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.names = {module: name for name, module in network.named_modules()}
        self.inside: list[str] = []
        self.made: dict[int, _Step] = {}  # the call that made each tensor, by id
        self.kept: list[Tensor] = []  # keeps ids unique: a freed tensor's id could be used again
        # By id of the tensor: the calls that changed the tensor in place, and dropout calls, which
        # return their input in eval mode.
        self.touched: dict[int, list[_Step]] = {}
        self.took: dict[str, Tensor] = {}  # each module's input, by module name
        self.gave: dict[str, Tensor] = {}  # each module's output, by module name
        # The version of each module's output when the module ended, by module name. A later change
        # of the output in place raises the version of the tensor.
        self.given: dict[str, int] = {}
        self.runs: Counter[str] = Counter()  # how often each module ran, by module name

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        owner = self.inside[-1] if self.inside else ""
        step = _Step(func, tuple(args), dict(kwargs or {}), owner)
        versions = [source._version for source in step.sources]
        result = func(*args, **step.kwargs)
        if not isinstance(result, Tensor):
            return result
        for source, version in zip(step.sources, versions, strict=True):
            if result is source:
                if step.name == "dropout" or result._version != version:
                    self.touched.setdefault(id(result), []).append(step)
                return result
        self.kept.append(result)
        self.made[id(result)] = step
        return result

    def enter(self, module: nn.Module, args: Any) -> None:
        """Record the input of a module that starts, if its only positional argument is a tensor."""
        self.inside.append(self.names[module])
        if len(args) == 1 and isinstance(args[0], Tensor):
            self.took[self.names[module]] = args[0]

    def leave(self, module: nn.Module, args: Any, result: Any) -> None:
        """Record the output of a module that ends, if the output is a tensor.

        Args:
            module: Module that ends.
            args: Unused.
            result: Output of the module.
        """
        name = self.inside.pop()
        self.runs[name] += 1
        if isinstance(result, Tensor):
            self.gave.pop(name, None)  # keeps `gave` in the order of the last outputs
            self.gave[name] = result
            self.given[name] = result._version


class _Tap(NamedTuple):
    """The place in a network at which its feature map is taken.

    The mean of this map is the input of the head.
    """

    module: str  # the name of the module whose output or input is taken
    output: bool  # True: the module's output; False: its input
    steps: tuple[_Step, ...]  # functions of one tensor that lead from there to the map
    layout: str  # the layout of the result: BCHW, BHWC, BNC or BCN
    dropout: float  # the dropout probability between pooling and head


class _Stage(NamedTuple):
    """A module whose output is the map of a stage."""

    module: str  # the name of the module
    overwritten: bool  # whether a later operation changes the output in place
    relu: str = ""  # the name of the ReLU inside the module that gives the output; "" if none
    # The name of the BatchNorm inside the module that gives the input of this ReLU, or a summand of
    # the input; "" if there is none.
    norm: str = ""


# The dimensions that global pooling averages, by layout.
LAYOUTS = {"BCHW": (2, 3), "BHWC": (1, 2), "BNC": (1,), "BCN": (2,)}
NO_MAP = (0, 0)  # height and width of a value that is no map


class ForeignNetwork(LogitMapModel):
    """Logit-map model around any network, whose feature map is taken by a forward hook.

    Create instances with `from_network`. The linear head of the network is applied to each position
    of the feature map; the result is the logit map (B, K, h, w). The state dict has the keys of the
    wrapped network, so weights files can be exchanged with code that uses the network directly.

    Args:
        network: Network to wrap, which is not copied. Hooks are added to its modules.
        head: Name of the network's linear head, a module.
        tap: Where the feature map is taken: the output or input of a module, and the functions that
            lead from this tensor to the map.
        stages: Modules whose outputs are the maps of the stages (groups of layers); () if they are
            unknown.
    """

    def __init__(
        self, network: nn.Module, head: str, tap: _Tap, stages: tuple[_Stage, ...] = ()
    ) -> None:
        super().__init__()
        self.network = network
        self._head = head
        self._tap = tap
        self._stages = stages
        self._taken: Tensor | None = None
        self._taken_stages: dict[nn.Module, Tensor] | None = None  # None if nobody asks for them
        tapped = network.get_submodule(tap.module)
        if tap.output:
            tapped.register_forward_hook(self._take_output)
        else:
            tapped.register_forward_pre_hook(self._take_input)
        for stage in stages:
            take = self._take_copy if stage.overwritten else self._take_stage
            network.get_submodule(stage.module).register_forward_hook(take)
        # `preacts` holds the first stage as it is, so only the later stages need a ReLU.
        self._has_preacts = len(stages) > 1 and all(stage.relu for stage in stages[1:])
        if self._has_preacts:
            for stage in stages[1:]:
                network.get_submodule(stage.relu).register_forward_pre_hook(self._take_preact)
        self.register_state_dict_post_hook(_without_prefix)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_with_prefix)  # type: ignore[no-untyped-call]

    @property
    def head(self) -> nn.Linear:
        """Return the linear head of the wrapped network, with C input features and K classes."""
        linear = self.network.get_submodule(self._head)
        assert isinstance(linear, nn.Linear)
        return linear

    def _take_output(self, module: nn.Module, args: Any, result: Any) -> None:
        self._taken = result

    def _take_input(self, module: nn.Module, args: Any) -> None:
        self._taken = args[0]

    def _take_stage(self, module: nn.Module, args: Any, result: Any) -> None:
        if self._taken_stages is not None:
            self._taken_stages[module] = result

    def _take_copy(self, module: nn.Module, args: Any, result: Any) -> None:
        if self._taken_stages is not None:
            self._taken_stages[module] = result.clone()

    def _take_preact(self, module: nn.Module, args: Any) -> None:
        # A block may use its ReLU several times: the last use counts. A ReLU in place would
        # overwrite its input, so the input is cloned.
        if self._taken_stages is not None:
            self._taken_stages[module] = args[0].clone()

    def features(self, x_BCHW: Tensor) -> Tensor:
        """Return the map (B, C, h, w) that the head is applied to, for images (B, 3, H, W).

        The patch tokens of a transformer are placed row by row on a grid that has the aspect ratio
        of the image. Dropout between pooling and head becomes dropout of whole channels of the map,
        which has the same effect.

        Raise RuntimeError if the module that gives the map did not run. Raise ValueError if the
        tokens do not form a grid of square patches of the image.
        """
        self.network(x_BCHW)
        taken = self._taken
        self._taken = None
        if taken is None:
            raise RuntimeError(
                f"{self._tap.module} did not run: "
                "the forward pass takes another path than when the model was built"
            )
        for step in self._tap.steps:
            taken = _again(step, taken)
        map_BCHW = _as_map(taken, self._tap.layout, x_BCHW.shape)
        if not self._tap.dropout:
            return map_BCHW
        return F.dropout2d(map_BCHW, self._tap.dropout, self.training)

    def taps(self, x_BCHW: Tensor) -> Taps:
        """Return the logit map (B, K, h, w) and the inner maps of images (B, 3, H, W).

        `stages` are the maps of the modules that timm names for the network (`feature_info`).
        Without usable names, they are the last map of each size among the outputs of the network's
        modules. They are () if fewer than two are found. `preacts` are the maps before the last
        ReLU of each stage, except that `preacts[0]` is `stages[0]`. They are () unless each stage
        after the first ends in an nn.ReLU. `last` is `features(x_BCHW)`, and `pooled` is its mean
        over h and w.

        Raise RuntimeError if a module that gives a map did not run. Raise ValueError if the tokens
        do not form a grid of square patches of the image.
        """
        self._taken_stages = {}
        try:
            last_BCHW = self.features(x_BCHW)
            taken = self._taken_stages
        finally:
            self._taken_stages = None

        def maps(names: Iterable[str]) -> list[Tensor]:
            found = []
            for name in names:
                module = self.network.get_submodule(name)
                if module not in taken:
                    raise RuntimeError(f"{name} did not run, which gives the map of a stage")
                found.append(_as_map(taken[module], self._tap.layout, x_BCHW.shape))
            return found

        stages = maps(stage.module for stage in self._stages)
        preacts = []
        if self._has_preacts:
            preacts = [stages[0], *maps(stage.relu for stage in self._stages[1:])]
        return self._taps(stages, preacts, last_BCHW)

    def norms_before_relu(self) -> tuple[nn.BatchNorm2d, ...]:
        """Return the BatchNorm before the last ReLU of each stage after the first.

        In a residual block this is the BatchNorm of the branch to which the shortcut is added.
        Return () if `taps` shows no `preacts`, or if a stage has no such BatchNorm.
        """
        if not self._has_preacts:
            return ()
        names = [stage.norm for stage in self._stages[1:]]
        norms = (self.network.get_submodule(name) for name in names if name)
        found = tuple(norm for norm in norms if isinstance(norm, nn.BatchNorm2d))
        return found if len(found) == len(names) else ()


def _without_prefix(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    inner = f"{prefix}network."
    for key in [key for key in state if key.startswith(inner)]:
        state[prefix + key.removeprefix(inner)] = state.pop(key)


def _with_prefix(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for key in [key for key in state if key.startswith(prefix)]:
        state[f"{prefix}network.{key.removeprefix(prefix)}"] = state.pop(key)


def _again(step: _Step, value: Tensor) -> Tensor:
    """Return the result of a recorded function for another tensor than the recorded one."""
    step = _with_tensor(step, value)
    result: Tensor = step.function(*step.args, **step.kwargs)
    return result


def _with_tensor(step: _Step, tensor: Tensor) -> _Step:
    """Return the step with each of its tensors replaced by `tensor`."""
    args = list(step.args)
    for index, argument in enumerate(args):
        if isinstance(argument, Tensor):
            args[index] = tensor
    kwargs = dict(step.kwargs)
    for name, argument in kwargs.items():
        if isinstance(argument, Tensor):
            kwargs[name] = tensor
    return step._replace(args=tuple(args), kwargs=kwargs)


def _as_map(value: Tensor, layout: str, image_BCHW: torch.Size) -> Tensor:
    if layout == "BCHW":
        return value
    if layout == "BHWC":
        return value.permute(0, 3, 1, 2)
    tokens_BCN = value.transpose(1, 2) if layout == "BNC" else value
    rows, columns = _grid(tokens_BCN.shape[2], image_BCHW)
    return tokens_BCN.reshape(*tokens_BCN.shape[:2], rows, columns)


def _grid(tokens: int, image_BCHW: torch.Size) -> tuple[int, int]:
    """Return the numbers of rows and columns of a grid of `tokens` square patches of an image.

    Raise ValueError if the tokens do not form such a grid.
    """
    height, width = image_BCHW[-2:]
    rows = isqrt(tokens * height // width)
    if not rows or rows * (tokens // rows) != tokens or rows * width != tokens // rows * height:
        raise ValueError(
            f"{tokens} tokens do not form a grid of square patches of an image {height}x{width}; "
            "prefix tokens that are averaged with the patches have no place in a map. "
            "Build the network so that only patch tokens are averaged"
        )
    return rows, tokens // rows


def from_network(network: nn.Module, image_BCHW: Tensor | None = None) -> ForeignNetwork:
    """Return a logit-map model around a network that classifies images (B, 3, H, W).

    The model maps the images to a logit map (B, K, h, w), whose mean over h and w is the logits of
    the network. The network may come from timm, torchvision or your own code. It must accept
    batches of any size, average a feature map or patch tokens globally, and end in one nn.Linear
    that gives the logits (B, K). There may be dropout between the average and the linear layer. The
    network is run on images to check these conditions. On the meta device, only shapes are checked.

    Args:
        network: Network to wrap. Its modules keep their modes (train or eval).
        image_BCHW: One or more images that the network accepts, (B, C, H, W). None to try random
            RGB images, first with a side of 64 pixels, then of other usual sizes.

    Returns:
        A model that shares the modules of `network`, without a copy. The model itself is in eval
        mode: call `train()` or `eval()` on the model before use.

    Raises:
        ValueError: If the network accepts none of the images, does not meet the conditions above,
            or cannot be wrapped for another reason; the message says why. Also if the mean of the
            logit map differs from the network's logits by more than 1e-4 times the largest absolute
            logit or 1, whichever is larger.
    """
    training = {module: module.training for module in network.modules()}
    try:
        network.eval()
        return _tapped(network, image_BCHW)
    finally:
        for module, was in training.items():
            module.training = was


@torch.no_grad()
def _tapped(network: nn.Module, image_BCHW: Tensor | None) -> ForeignNetwork:
    what = type(network).__name__
    like = next(network.parameters(), None)
    if like is None:
        raise ValueError(f"{what} has no parameters, so no linear head. {CURES}")
    tried: Iterable[Tensor] = (_noise(like, side) for side in SIDES)
    if image_BCHW is not None:
        tried = (image_BCHW.to(like.device),)
    not_taken: list[str] = []
    refusals: list[_OneCell] = []
    for images_BCHW in tried:
        trace = _Trace(network)
        try:
            with _listening(network, trace), trace:
                logits = network(images_BCHW)
        except Exception as error:  # a network may raise any type for an unsupported image size
            not_taken.append(f"{tuple(images_BCHW.shape)}: {' '.join(str(error).split())[:200]}")
            continue
        try:
            head = _head_of(network, trace, logits, what)
            tap = _tap_of(trace, trace.took[head], images_BCHW, what, head)
        except _OneCell as error:  # nothing is averaged here: try a larger image
            refusals.append(error)
            if len(refusals) == 2:
                break
            continue
        stages = _stages_of(network, trace, tap)
        model = ForeignNetwork(network, head, tap, stages).eval()
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


@contextmanager
def _listening(network: nn.Module, trace: _Trace) -> Iterator[None]:
    with ExitStack() as stack:
        for module in network.modules():
            stack.callback(module.register_forward_pre_hook(trace.enter).remove)
            stack.callback(module.register_forward_hook(trace.leave).remove)
        yield


def _head_of(network: nn.Module, trace: _Trace, logits: Any, what: str) -> str:
    """Return the name of the linear layer that computes the logits.

    Raise ValueError if the output of the network is not logits (B, K), or if no linear layer
    computes the logits.
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
            if _equal(F.linear(trace.took[name], module.weight, module.bias), value):
                return name  # also for a subclass with a forward of its own, as in timm
        changed = trace.touched.get(id(value))
        step = changed[-1] if changed else trace.made.get(id(value))
        before = _same_values(step, value) if step else None
        if before is None:
            origin = str(step or "an operation that was not recorded")
            if hasattr(network, "head_dist"):
                origin += "; it averages two heads, one of them of a distillation token"
            raise ValueError(
                f"{what}: its logits do not come from an nn.Linear, but from {origin}. {CURES}"
            )
        value = before


def _tap_of(trace: _Trace, pooled: Tensor, images_BCHW: Tensor, what: str, head: str) -> _Tap:
    """Return the place of the feature map whose mean is the head's input `pooled`.

    The search goes back from the head's input to the map, and on to a module that has the map as
    its input or output. Raise ValueError if the head's input is not the global average of a map.
    """
    value = pooled
    dropout = 0.0
    one_cell = False
    while True:
        changed = [step for step in trace.touched.get(id(value), ()) if step.name != "dropout"]
        for step in trace.touched.get(id(value), ()):
            if step.name == "dropout":
                p = _probability(step)
                dropout += p - dropout * p
        made = changed[-1] if changed else trace.made.get(id(value))
        sources = [] if changed or made is None else made.sources
        layouts = [(source, _layout(source, value)) for source in sources]
        found = [(source, layout) for source, layout in layouts if layout]
        if found:
            source, layout = found[0]
            break
        before = None if changed or made is None else _same_values(made, value)
        if before is None:
            kind = _OneCell if one_cell else ValueError
            raise kind(
                f"{what}: between map and head `{head}` stands {_why(made, value, sources)}. "
                f"{CURES}"
            )
        value = before
        one_cell = one_cell or before.ndim > 2
    if layout in ("BNC", "BCN"):
        _grid(source.shape[LAYOUTS[layout][0]], images_BCHW.shape)
    module, output, steps = _place(trace, source, images_BCHW, what)
    return _Tap(module, output, steps, layout, dropout)


def _why(step: _Step | None, value: Tensor, sources: list[Tensor]) -> str:
    if step is None:
        return "a value whose computation was not recorded"
    if any(s.ndim == 3 and s.shape[1] > 1 and _equal(s[:, 0], value) for s in sources):
        return f"the selection of the class token ({step}); {CLASS_TOKEN}"
    return f"{step}, which is neither a global average nor a change of shape"


def _place(
    trace: _Trace, value: Tensor, images_BCHW: Tensor, what: str
) -> tuple[str, bool, tuple[_Step, ...]]:
    """Return the module from which `value` can be taken: (name, whether output or input, steps).

    The outermost module whose output or input is `value` is chosen, and outputs are preferred. If
    there is no such module, the search goes back through functions of one tensor. The returned
    steps repeat these functions. Raise ValueError if the search ends at another function.
    """
    steps: list[_Step] = []
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
        steps.append(_emptied(step))
        value = step.sources[0]


def _stages_of(network: nn.Module, trace: _Trace, tap: _Tap) -> tuple[_Stage, ...]:
    """Return the stages that timm names, or else those found by size; () without two or more."""
    info = getattr(network, "feature_info", None)
    named = []
    if isinstance(info, list) and all(isinstance(entry, dict) for entry in info):
        named = [str(entry.get("module")) for entry in info]
    for names in (named, _last_of_each_size(trace, tap)):
        sizes = [_size(trace.gave.get(name), tap) for name in names]
        falling = sizes == sorted(set(sizes), reverse=True)
        if len(names) > 1 and falling and all(trace.runs[name] == 1 for name in names):
            return tuple(_stage(network, trace, name) for name in names)
    return ()


def _stage(network: nn.Module, trace: _Trace, name: str) -> _Stage:
    """Return the stage whose map the module `name` gives, with its last ReLU and BatchNorm.

    The ReLU is the last one that gave the very tensor that the module gave. A ReLU in place gives
    its own input, to which a shortcut may have been added in place before.
    """
    gave = trace.gave[name]
    overwritten = gave._version != trace.given[name]
    inside = [other for other in trace.gave if f"{other}.".startswith(f"{name}.")]
    relu = norm = ""
    for other in inside:
        module = network.get_submodule(other)
        if isinstance(module, nn.ReLU) and trace.gave[other] is gave:
            relu = other
    if relu and relu in trace.took:
        for other in inside:
            module = network.get_submodule(other)
            if isinstance(module, nn.BatchNorm2d) and trace.gave[other] is trace.took[relu]:
                norm = other
    return _Stage(name, overwritten, relu, norm)


def _last_of_each_size(trace: _Trace, tap: _Tap) -> list[str]:
    """Return the names of the modules that gave the last map of each size, up to the tap."""
    order = list(trace.gave)
    end = order.index(tap.module) + tap.output
    last = {}
    for part in _parts("", trace, tap):
        # If the map is a module's input, parts inside that module run after the map, although they
        # end before the module does.
        after = not tap.output and f"{part}.".startswith(f"{tap.module}.")
        if order.index(part) < end and not after:
            last[_size(trace.gave[part], tap)] = part
    return [part for size, part in last.items() if size != NO_MAP]


def _parts(name: str, trace: _Trace, tap: _Tap) -> list[str]:
    """Return the names of the modules that a module consists of, in the order of their outputs.

    A module is divided into its children if its input is a map and its output is no map, or a map
    of less than half the height.
    """
    start = f"{name}." if name else ""
    children = [n for n in trace.gave if n.startswith(start) and n and "." not in n[len(start) :]]
    took, gave = _size(trace.took.get(name), tap), _size(trace.gave[name], tap)
    reduces = took != NO_MAP and took[0] > 2 * gave[0]
    if name and not (children and reduces):
        return [name]
    return [part for child in children for part in _parts(child, trace, tap)]


def _size(value: Tensor | None, tap: _Tap) -> tuple[int, int]:
    """Return the height and width of a map; `NO_MAP` if the value is no map of the tap's layout."""
    if value is None or value.ndim != 4 or len(tap.layout) != 4:
        return NO_MAP
    height, width = (value.shape[dim] for dim in LAYOUTS[tap.layout])
    return height, width


def _emptied(step: _Step) -> _Step:
    """Return the step with empty tensors, since its own tensors would stay in memory."""
    return _with_tensor(step, torch.empty(0))


def _same_values(step: _Step, value: Tensor) -> Tensor | None:
    """Return the step's input tensor if the step only reshaped it or left it unchanged, else None.

    Dropout in eval mode leaves its input unchanged.
    """
    sources = step.sources
    if len(sources) != 1 or sources[0].numel() != value.numel() or len(sources[0]) != len(value):
        return None
    return sources[0] if _equal(sources[0].flatten(1), value.flatten(1)) else None


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
            if mean.numel() == pooled.numel() and _equal(mean, pooled.flatten(1)):
                return layout
    return None


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and (
        a.is_meta or torch.allclose(a.float(), b.float(), TOLERANCE, TOLERANCE)
    )


def _probability(step: _Step) -> float:
    """Return the probability p of a recorded call of F.dropout."""
    return float(
        inspect.signature(F.dropout).bind(*step.args, **step.kwargs).arguments.get("p", 0.5)
    )


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
