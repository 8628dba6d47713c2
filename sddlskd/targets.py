"""Which code a configuration may name by `_target_`, and the one place that calls it.

A configuration is data: it comes from files, sweeps and other people's run directories. Its targets are of this
package, torch, torchvision or timm, and of these only what makes networks, losses, optimizers and data sets. A dotted
path leads through attributes (`sddlskd.files.os.remove`), so what counts is the object that is found.
"""

import inspect
from collections.abc import Iterator
from typing import Any

from hydra.utils import get_object
from hydra.utils import instantiate as hydra_instantiate

__all__ = ["ForeignTarget", "check_names", "instantiate", "refuse_interpolations"]

PACKAGES = ("sddlskd", "torch", "torchvision", "timm")
NETWORKS = (
    "sddlskd.models.",
    "torch.nn.",
    "torchvision.",
    "timm.",
)  # where a subclass of nn.Module may be from
FUNCTIONS = (
    "sddlskd.datasets.",
    "sddlskd.folders.",
    "sddlskd.losses.",
    "sddlskd.models.",
)  # ... and public functions


class ForeignTarget(ValueError):
    """A target is of code that nobody has said to trust."""


def check_names(node: Any, key: str, allow_foreign: bool) -> None:
    """ValueError, in one line, for a target anywhere in `node` that is not of PACKAGES, and for what could still become
    one (`refuse_interpolations`); key: where the node stands."""
    refuse_interpolations(node, key)
    for place, target in _targets(node, key):
        if not isinstance(target, str) or not target:
            raise ValueError(
                f"{place}={target!r} is no dotted name; give one such as sddlskd.models.create"
            )
        if not allow_foreign and not _is_ours(target):
            raise ForeignTarget(
                f"{place}={target!a} is not of {', '.join(PACKAGES)}; if it is code of yours, or code that you trust, "
                "allow_foreign_targets=true runs it"
            )


def refuse_interpolations(node: Any, key: str) -> None:
    """ValueError, in one line, for a "${" anywhere in values that are filled in: it would be filled in once more, and
    could then be a target that nobody has looked at."""
    if isinstance(node, dict):
        for name, value in node.items():
            refuse_interpolations(name, key)
            refuse_interpolations(value, f"{key}.{name}".lstrip("."))
    elif isinstance(node, list | tuple):
        for i, value in enumerate(node):
            refuse_interpolations(value, f"{key}[{i}]")
    elif isinstance(node, str) and "${" in node:
        raise ValueError(
            f"{key}={node[:200]!a} holds a '${{', which values that are filled in must not; take it out"
        )


def instantiate(node: Any, **arguments: Any) -> Any:
    """hydra.utils.instantiate, for targets that a configuration may name.

    Foreign ones passed `check_names` when the job was composed. Raises ValueError, before anything is called, for one
    of PACKAGES that is neither a network, an optimizer, nor a public function of FUNCTIONS. Hydra fills in "${...}"
    itself, after that check, so that there must be none.
    """
    refuse_interpolations(node, "")
    for _, target in _targets(node, ""):
        if _is_ours(target):
            _check_kind(target)
    return hydra_instantiate(node, **arguments)


def _targets(node: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Every `_target_` in nested dicts and lists, with its dotted key."""
    if isinstance(node, dict):
        for name, value in node.items():
            place = f"{key}.{name}".lstrip(".")
            yield from [(place, value)] if name == "_target_" else _targets(value, place)
    elif isinstance(node, list | tuple):
        for i, value in enumerate(node):
            yield from _targets(value, f"{key}[{i}]")


def _is_ours(target: str) -> bool:
    return target.partition(".")[0] in PACKAGES


def _check_kind(target: str) -> None:
    from torch import nn, optim  # slow to import, and a configuration is checked without it

    cure = "name a network, an optimizer, or a function of sddlskd.models, sddlskd.losses or sddlskd.datasets"
    if any(part.startswith("_") for part in target.split(".")):
        raise ValueError(f"_target_={target} is private; {cure}")
    try:
        found = get_object(target)
    except Exception as error:  # importing a module on the way may raise anything
        raise ValueError(
            f"_target_={target} cannot be found ({' '.join(str(error).split())[:200]}); {cure}"
        ) from error
    origin = f"{found.__module__}." if isinstance(found, type) or inspect.isfunction(found) else ""
    if isinstance(found, type):
        allowed = issubclass(found, nn.Module) and origin.startswith(NETWORKS)
        allowed |= issubclass(found, optim.Optimizer) and origin.startswith("torch.optim.")
    else:
        allowed = origin.startswith(FUNCTIONS)
    if not allowed:
        raise ValueError(f"_target_={target} is not what a configuration may call; {cure}")
