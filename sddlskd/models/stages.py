"""Find the stages of a network, whose maps its taps show, from a record of its forward pass.

Shapes: B batch, C channels, N tokens.
"""

import torch
from torch import Tensor, nn

from sddlskd.models.foreign import LAYOUTS, Stage, Tap, grid
from sddlskd.models.tracing import Trace

__all__ = ["stages_of"]

NO_MAP = (0, 0)  # height and width of a value that is no map


def stages_of(network: nn.Module, trace: Trace, tap: Tap, images_BCHW: Tensor) -> tuple[Stage, ...]:
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
    network: nn.Module, trace: Trace, tap: Tap, images_BCHW: Tensor
) -> tuple[Stage, ...]:
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
            sizes[name] = grid(trace.gave[name].shape[1] - prefix, images_BCHW.shape)
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
            grid(value.shape[1] - prefix, image_BCHW)
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


def _stage(network: nn.Module, trace: Trace, name: str) -> Stage:
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
    return Stage(name, overwritten, relu=relu, norm=norm)


def _last_of_each_size(trace: Trace, tap: Tap) -> list[str]:
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


def _parts(name: str, trace: Trace, tap: Tap) -> list[str]:
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


def _size(value: Tensor | None, tap: Tap) -> tuple[int, int]:
    """Return the height and width of a map; `NO_MAP` if the value is no map of the tap's layout."""
    if value is None or value.ndim != 4 or len(tap.layout) != 4:
        return NO_MAP
    height, width = (value.shape[dim] for dim in LAYOUTS[tap.layout])
    return height, width
