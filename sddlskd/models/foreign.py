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

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from math import isqrt
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode, resolve_name

from sddlskd.models.base import LogitMapModel, Taps

__all__ = ["MAPS", "ForeignNetwork", "from_network"]

MAPS = ("exact", "per_cell")
"""What happens to layers between the average of a network and its head.

exact: a network with such layers is rejected. per_cell: the layers are applied to each cell, and
the map is shifted so that its mean is the logits of the network, see `ForeignNetwork`.
"""

# Image sides in pixels, tried in this order until the network accepts one.
SIDES = (64, 224, 32, 96, 128, 256, 288, 299, 320, 384, 448, 512)
TOLERANCE = 1e-4  # relative to the largest absolute logit or to 1, whichever is larger
CURES = (
    "Build the network without it, or write it as a module that gives the logit map (B, K, H, W) "
    "itself"
)
PER_CELL = (
    "Set map=per_cell (+student.model.map=per_cell, +teacher.model.map=per_cell) to apply that "
    "layer to each cell and to keep the network's logits as the mean of the map"
)


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


class _Layer(NamedTuple):
    """A module between average (or class token) and head, which sees one cell of each image."""

    module: str  # the name of the module
    shape: tuple[int, ...]  # the shape of its input without the batch, such as (C,) or (C, 1, 1)


class _Tap(NamedTuple):
    """The place in a network at which its feature map is taken, and how the head's input follows.

    The head's input is the mean of this map, or a token beside the map, after the layers of `tail`.
    """

    module: str  # the name of the module whose output or input is taken
    output: bool  # True: the module's output; False: its input
    steps: tuple[_Step, ...]  # functions of one tensor that lead from there to the map
    layout: str  # the layout of the result: BCHW, BHWC, BNC or BCN
    dropout: float  # the dropout probability in front of the head
    tokens: tuple[int, ...] = ()  # the token that each head reads; (): the mean of the map
    prefix: int = 0  # the number of tokens in front of the patch tokens, class tokens included
    tail: tuple[_Layer, ...] = ()  # the layers between mean or token and head, in their order


class _Stage(NamedTuple):
    """A module whose output is the map of a stage."""

    module: str  # the name of the module
    overwritten: bool  # whether a later operation changes the output in place
    prefix: int = 0  # the number of tokens in front of the patch tokens
    relu: str = ""  # the name of the ReLU inside the module that gives the output; "" if none
    # The name of the BatchNorm inside the module that gives the input of this ReLU, or a summand of
    # the input; "" if there is none.
    norm: str = ""


# The dimensions that global pooling averages, by layout.
LAYOUTS = {"BCHW": (2, 3), "BHWC": (1, 2), "BNC": (1,), "BCN": (2,)}
# The heads of class token and distillation token, as timm names them.
TWO_HEADS = ("head", "head_dist")
NO_MAP = (0, 0)  # height and width of a value that is no map


class ForeignNetwork(LogitMapModel):
    """Logit-map model around any network, whose feature map is taken by a forward hook.

    Create instances with `from_network`. The linear head of the network is applied to each position
    of a feature map z; the result is the logit map (B, K, h, w). The state dict has the keys of the
    wrapped network, so weights files can be exchanged with code that uses the network directly.

    The mean of the logit map is the logits of the network. For a network that averages a feature
    map and applies its head, z is that map. In two cases, the head reads a vector g that is not the
    mean of the map. The map is then shifted to the mean g: z = cells + (g - mean of the cells),
    with the vectors at the map's positions as the cells. The mean of the logit map is then the
    head's output for g, and the differences between the cells stay. This is a definition of this
    package; no paper has one.

    - Class token: the cells are the patch tokens, and g is the class token, both after the layers
      that the network applies to the class token.
    - Layers between average and head (`map="per_cell"`): the cells are those of the averaged map,
      and g is their mean, each after these layers.

    A network with a class and a distillation token (DeiT) has two heads, and the mean of their
    outputs is its logits, in training, too. Then z holds the shifted cells for either head, one
    after the other.

    Args:
        network: Network to wrap, which is not copied. Hooks are added to its modules.
        heads: Names of the network's linear heads, modules. With two, the logits are their mean.
        tap: Where the feature map is taken: the output or input of a module, and the functions that
            lead from this tensor to the map. Also what lies between this map and the heads.
        stages: Modules whose outputs are the maps of the stages (groups of layers); () if they are
            unknown.
        resize: Side in pixels to which images are resized before the network sees them; None to
            leave them as they are.

    Attributes:
        image_CHW: Shape of an image that the network has accepted.
    """

    image_CHW: tuple[int, ...]

    def __init__(
        self,
        network: nn.Module,
        heads: tuple[str, ...],
        tap: _Tap,
        stages: tuple[_Stage, ...] = (),
        resize: int | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self._heads = heads
        self._tap = tap
        self._stages = stages
        self._resize = resize
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
        """Return the linear head of the wrapped network, with C input features and K classes.

        Raise ValueError if the network has two heads.
        """
        if len(self._heads) > 1:
            raise ValueError(
                f"{type(self.network).__name__} has {len(self._heads)} heads "
                f"({', '.join(self._heads)}), and a single one is needed; "
                "take the network without a distillation token"
            )
        return self._linear(self._heads[0])

    def _linear(self, name: str) -> nn.Linear:
        linear = self.network.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        return linear

    def _logit_map(self, last_BCHW: Tensor) -> Tensor:
        if len(self._heads) == 1:
            return super()._logit_map(last_BCHW)
        cells_BHWC = last_BCHW.permute(0, 2, 3, 1).chunk(len(self._heads), 3)
        maps = [
            self._linear(name)(cells) for name, cells in zip(self._heads, cells_BHWC, strict=True)
        ]
        return torch.stack(maps).mean(0).permute(0, 3, 1, 2)

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
        of the image. Dropout in front of the head becomes dropout of whole channels of the map,
        which has the same effect. With two heads, the map has the channels of both.

        Raise RuntimeError if the module that gives the map did not run. Raise ValueError if the
        tokens do not form a grid of square patches of the image.
        """
        return self._features(self.resized(x_BCHW))

    def resized(self, x_BCHW: Tensor) -> Tensor:
        """Return images (B, 3, H, W) as the wrapped network sees them.

        The images are resized to squares, bilinearly, if `resize` was given.
        """
        if self._resize is None or x_BCHW.shape[-2:] == (self._resize, self._resize):
            return x_BCHW
        sides = (self._resize, self._resize)
        return F.interpolate(x_BCHW, sides, mode="bilinear", align_corners=False)

    def _features(self, x_BCHW: Tensor) -> Tensor:
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
        map_BCHW = _as_map(taken, self._tap.layout, x_BCHW.shape, self._tap.prefix)
        if self._tap.tokens:
            map_BCHW = self._shifted(map_BCHW, taken[:, self._tap.tokens])
        elif self._tap.tail or len(self._heads) > 1:
            mean_BGC = map_BCHW.mean((2, 3))[:, None].expand(-1, len(self._heads), -1)
            map_BCHW = self._shifted(map_BCHW, mean_BGC)
        if not self._tap.dropout:
            return map_BCHW
        return F.dropout2d(map_BCHW, self._tap.dropout, self.training)

    def _shifted(self, map_BCHW: Tensor, global_BGC: Tensor) -> Tensor:
        """Return a map whose mean is what the heads read of `global_BGC`, one entry for each head.

        Cells and `global_BGC` go through the layers in front of the heads as images of one cell.
        Then the cells are shifted to the mean of each head in turn.
        """
        B, G, C = global_BGC.shape
        rows = torch.cat((global_BGC, map_BCHW.flatten(2).transpose(1, 2)), 1).reshape(-1, C)
        for layer in self._tap.tail:
            rows = self.network.get_submodule(layer.module)(rows.reshape(-1, *layer.shape))
        rows_BNC = rows.reshape(B, G + map_BCHW[0, 0].numel(), -1)
        cells_BNC = rows_BNC[:, G:]
        centred_BNC = cells_BNC - cells_BNC.mean(1, keepdim=True)
        shifted_BNC = torch.cat([centred_BNC + rows_BNC[:, g, None] for g in range(G)], 2)
        return shifted_BNC.transpose(1, 2).reshape(B, -1, *map_BCHW.shape[2:])

    def taps(self, x_BCHW: Tensor) -> Taps:
        """Return the logit map (B, K, h, w) and the inner maps of images (B, 3, H, W).

        `stages` are () unless one of these, the first that applies, gives at least two maps:

        - the maps of the modules that timm names for the network (`feature_info`);
        - the last map of each size among the outputs of the network's modules;
        - if the maps are patch tokens of one size, the outputs of the network's blocks.

        `preacts` are the maps before the last ReLU of each stage, except that `preacts[0]` is
        `stages[0]`. They are () unless each stage after the first ends in an nn.ReLU. `last` is
        `features(x_BCHW)`, and `pooled` is its mean over h and w.

        Raise RuntimeError if a module that gives a map did not run. Raise ValueError if the tokens
        do not form a grid of square patches of the image.
        """
        x_BCHW = self.resized(x_BCHW)
        self._taken_stages = {}
        try:
            last_BCHW = self._features(x_BCHW)
            taken = self._taken_stages
        finally:
            self._taken_stages = None

        def map_of(name: str, prefix: int) -> Tensor:
            module = self.network.get_submodule(name)
            if module not in taken:
                raise RuntimeError(f"the module {name} did not run, but gives the map of a stage")
            return _as_map(taken[module], self._tap.layout, x_BCHW.shape, prefix)

        stages = [map_of(stage.module, stage.prefix) for stage in self._stages]
        preacts = []
        if self._has_preacts:
            later = [map_of(stage.relu, stage.prefix) for stage in self._stages[1:]]
            preacts = [stages[0], *later]
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


def _as_map(value: Tensor, layout: str, image_BCHW: torch.Size, prefix: int = 0) -> Tensor:
    """Return a map (B, C, H, W) of a value with the given layout.

    The first `prefix` tokens of a value with tokens are left out.
    """
    if layout == "BCHW":
        return value
    if layout == "BHWC":
        return value.permute(0, 3, 1, 2)
    tokens_BCN = value[:, prefix:].transpose(1, 2) if layout == "BNC" else value
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
        trace = _Trace(network)
        try:
            with _listening(network, trace), trace:
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
        stages = _stages_of(network, trace, tap, images_BCHW)
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


@contextmanager
def _listening(network: nn.Module, trace: _Trace) -> Iterator[None]:
    with ExitStack() as stack:
        for module in network.modules():
            stack.callback(module.register_forward_pre_hook(trace.enter).remove)
            stack.callback(module.register_forward_hook(trace.leave).remove)
        yield


def _heads_of(network: nn.Module, trace: _Trace, logits: Any, what: str) -> tuple[str, ...]:
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
            if _equal(F.linear(trace.took[name], module.weight, module.bias), value):
                return (name,)  # also for a subclass with a forward of its own, as in timm
        changed = trace.touched.get(id(value))
        step = changed[-1] if changed else trace.made.get(id(value))
        before = _same_values(step, value) if step else None
        if before is None:
            outputs = [trace.gave[name] for name in TWO_HEADS if name in trace.gave]
            linear = [isinstance(getattr(network, name, None), nn.Linear) for name in TWO_HEADS]
            if all(linear) and len(outputs) == 2 and _equal(torch.stack(outputs).mean(0), value):
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
    tail: tuple[_Layer, ...]  # the layers between mean or token and head
    dropout: float  # the dropout probability in front of the head
    reason: str  # what is wrong with a non-empty tail


def _tap_of(
    network: nn.Module,
    trace: _Trace,
    images_BCHW: Tensor,
    what: str,
    heads: tuple[str, ...],
    map: str,
) -> _Tap:
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
        _grid(first.source.shape[LAYOUTS[first.layout][0]] - prefix, images_BCHW.shape)
    module, output, steps = _place(trace, first.source, images_BCHW, what)
    return _Tap(module, output, steps, first.layout, first.dropout, tokens, prefix, first.tail)


def _read_of(network: nn.Module, trace: _Trace, head: str, what: str) -> _Read:
    """Return how the input of a head follows from a map; raise ValueError if it does not."""
    value = trace.took[head]
    order = list(trace.gave)
    position = order.index(head)  # modules that ended later are not searched
    tail: list[_Layer] = []
    visited: set[int] = set()
    dropout = 0.0
    one_cell = False
    reason = ""
    while True:
        touched = trace.touched.get(id(value), ())
        used = {layer.module for layer in tail}
        changed = [step for step in touched if step.name != "dropout" and step.owner not in used]
        for step in touched if id(value) not in visited else ():
            p = _probability(step) if step.name == "dropout" else 0.0
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
        before = None if changed or made is None else _same_values(made, value)
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


def _token(step: _Step, source: Tensor, value: Tensor) -> int | None:
    """Return the number of the token that `step` takes from tokens (B, N, C); None if none."""
    if step.name != "__getitem__" or source.ndim != 3 or source.shape[1] < 2:
        return None
    if value.numel() != source[:, 0].numel() or len(value) != len(source):
        return None
    numbers_N = torch.arange(source.shape[1], device="cpu")
    taken = set(_again(step, numbers_N[None, :, None].expand(source.shape)).flatten().tolist())
    return int(taken.pop()) if len(taken) == 1 else None


def _layer_before(
    network: nn.Module, trace: _Trace, value: Tensor, made: _Step | None, names: list[str]
) -> _Layer | None:
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
        return _Layer(name, tuple(took.shape[1:])) if of_one_cell else None
    return None


def _why(step: _Step | None) -> str:
    if step is None:
        return "a value whose computation was not recorded"
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


def _stages_of(
    network: nn.Module, trace: _Trace, tap: _Tap, images_BCHW: Tensor
) -> tuple[_Stage, ...]:
    """Return the stages that timm names, or else those found by size; () without two or more.

    If all maps have the size of the tapped one, the network's blocks are the stages.
    """
    if tap.layout == "BNC":
        return _token_stages(network, trace, tap, images_BCHW)
    for names in (_named_stages(network), _last_of_each_size(trace, tap)):
        sizes = [_size(trace.gave.get(name), tap) for name in names]
        falling = sizes == sorted(set(sizes), reverse=True)
        if len(names) > 1 and falling and all(trace.runs[name] == 1 for name in names):
            return tuple(_stage(network, trace, name) for name in names)
    return ()


def _named_stages(network: nn.Module) -> list[str]:
    """Return the names of the modules that timm lists as stages; [] for a network without them."""
    info = getattr(network, "feature_info", None)
    if not isinstance(info, list) or not all(isinstance(entry, dict) for entry in info):
        return []
    return [str(entry.get("module")) for entry in info]


def _token_stages(
    network: nn.Module, trace: _Trace, tap: _Tap, images_BCHW: Tensor
) -> tuple[_Stage, ...]:
    """Return the stages of a network whose maps are tokens (B, N, C); () without two or more."""
    order = list(trace.gave)
    sizes: dict[str, tuple[int, int]] = {}
    prefixes: dict[str, int] = {}
    most = int(getattr(network, "num_prefix_tokens", tap.prefix))
    for name in order[: order.index(tap.module) + tap.output]:
        prefix = _prefix_of(trace.gave[name], most, images_BCHW.shape)
        has_parameters = next(network.get_submodule(name).parameters(), None) is not None
        if prefix is not None and has_parameters and trace.runs[name] == 1:
            prefixes[name] = prefix
            sizes[name] = _grid(trace.gave[name].shape[1] - prefix, images_BCHW.shape)
    names = _named_stages(network)
    if not set(names) <= sizes.keys():
        names = list({size: name for name, size in sizes.items()}.values())
    if len(names) < 2:
        names = _blocks(network, list(sizes))
    if len(names) < 2:
        return ()
    return tuple(_stage(network, trace, name)._replace(prefix=prefixes[name]) for name in names)


def _prefix_of(value: Tensor, most: int, image_BCHW: torch.Size) -> int | None:
    """Return the number of tokens in front of the patch tokens: `most` or 0; None if no grid."""
    if value.ndim != 3 or value.shape[1] <= most:
        return None
    for prefix in (most, 0):
        try:
            _grid(value.shape[1] - prefix, image_BCHW)
        except ValueError:
            continue
        return prefix
    return None


def _blocks(network: nn.Module, names: list[str]) -> list[str]:
    """Return the largest modules of which there are several of one class in one module.

    The result is the outermost such group among the named modules, and [] if there is none.
    """
    groups: dict[tuple[str, type], list[str]] = {}
    for name in names:
        key = (name.rpartition(".")[0], type(network.get_submodule(name)))
        groups.setdefault(key, []).append(name)
    several = [group for group in groups.values() if len(group) > 1]
    return min(several, key=lambda group: group[0].count("."), default=[])


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
    return _Stage(name, overwritten, relu=relu, norm=norm)


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
