"""The logit-map model around a network of timm, torchvision or your own code.

Shapes: B batch, C channels, H W height and width (of an image in pixels, of a map in cells), N
tokens, K classes.
"""

from math import isqrt
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sddlskd.models.base import LogitMapModel, Taps
from sddlskd.models.tracing import Step, again

__all__ = ["LAYOUTS", "ForeignNetwork", "Layer", "Stage", "Tap", "as_map", "grid"]

# The dimensions that global pooling averages, by layout.
LAYOUTS = {"BCHW": (2, 3), "BHWC": (1, 2), "BNC": (1,), "BCN": (2,)}


class Layer(NamedTuple):
    """A module between average (or class token) and head, which sees one cell of each image."""

    module: str  # the name of the module
    shape: tuple[int, ...]  # the shape of its input without the batch, such as (C,) or (C, 1, 1)


class Tap(NamedTuple):
    """The place in a network at which its feature map is taken, and how the head's input follows.

    The head's input is the mean of this map, or a token beside the map, after the layers of `tail`.
    """

    module: str  # the name of the module whose output or input is taken
    output: bool  # True: the module's output; False: its input
    steps: tuple[Step, ...]  # functions of one tensor that lead from there to the map
    layout: str  # the layout of the result: BCHW, BHWC, BNC or BCN
    dropout: float  # the dropout probability in front of the head
    tokens: tuple[int, ...] = ()  # the token that each head reads; (): the mean of the map
    prefix: int = 0  # the number of tokens in front of the patch tokens, class tokens included
    tail: tuple[Layer, ...] = ()  # the layers between mean or token and head, in their order


class Stage(NamedTuple):
    """A module whose output is the map of a stage."""

    module: str  # the name of the module
    overwritten: bool  # whether a later operation changes the output in place
    prefix: int = 0  # the number of tokens in front of the patch tokens
    relu: str = ""  # the name of the ReLU inside the module that gives the output; "" if none
    # The name of the BatchNorm inside the module that gives the input of this ReLU, or a summand of
    # the input; "" if there is none.
    norm: str = ""


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
        tap: Tap,
        stages: tuple[Stage, ...] = (),
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
            taken = again(step, taken)
        map_BCHW = as_map(taken, self._tap.layout, x_BCHW.shape, self._tap.prefix)
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
            return as_map(taken[module], self._tap.layout, x_BCHW.shape, prefix)

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


def as_map(value: Tensor, layout: str, image_BCHW: torch.Size, prefix: int = 0) -> Tensor:
    """Return a map (B, C, H, W) of a value with the given layout.

    The first `prefix` tokens of a value with tokens are left out.
    """
    if layout == "BCHW":
        return value
    if layout == "BHWC":
        return value.permute(0, 3, 1, 2)
    tokens_BCN = value[:, prefix:].transpose(1, 2) if layout == "BNC" else value
    rows, columns = grid(tokens_BCN.shape[2], image_BCHW)
    return tokens_BCN.reshape(*tokens_BCN.shape[:2], rows, columns)


def grid(tokens: int, image_BCHW: torch.Size) -> tuple[int, int]:
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
