"""Check the code that a configuration names by `_target_`, and call it; only this module does so.

A configuration is data: it comes from files, sweeps and other people's run directories. Its targets
must belong to this package, torch, torchvision or timm, unless `allow_foreign_targets` is set. Of
these packages, only networks, losses, optimizers and data sets are allowed. A dotted path leads
through attributes (`sddlskd.files.atomic.os.remove`), so the check looks at the object that the
path resolves to.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hydra.utils import get_object
from hydra.utils import instantiate as hydra_instantiate

__all__ = ["ForeignTarget", "check_names", "instantiate", "refuse_interpolations"]

PACKAGES = ("sddlskd", "torch", "torchvision", "timm")
# Where an allowed subclass of nn.Module may come from
NETWORK_MODULES = ("sddlskd.models.", "sddlskd.methods.", "torch.nn.", "torchvision.", "timm.")
# Where an allowed optimizer may come from
OPTIMIZER_MODULES = ("torch.optim.", "sddlskd.training.dot.")
# Modules whose public functions (`__all__`) a configuration may call
FUNCTION_MODULES = ("sddlskd.datasets", "sddlskd.losses", "sddlskd.models")
# First name -> present name of each target that has moved. Old run directories and hashes have the
# first names.
RENAMED = {
    "sddlskd.folders.cub200": "sddlskd.datasets.cub200",
    "sddlskd.folders.imagenet": "sddlskd.datasets.imagenet",
    "sddlskd.folders.tiny_imagenet": "sddlskd.datasets.tiny_imagenet",
}
_FIRST_NAMES = {new: first for first, new in RENAMED.items()}


class ForeignTarget(ValueError):
    """Error for a `_target_` with code outside of `PACKAGES`: sddlskd, torch, torchvision and timm.

    The error is raised for jobs without `allow_foreign_targets`.
    """


def check_names(node: Any, key: str, allow_foreign: bool) -> None:
    """Raise ValueError if a `_target_` in nested values names code that is not allowed.

    Of a name, only the first part is checked, which is the package. Nothing is imported.

    Args:
        node: Values of a configuration: nested dicts, lists and plain values.
        key: Dotted key of `node`, for the message.
        allow_foreign: Whether targets may name code outside of `PACKAGES` (sddlskd, torch,
            torchvision, timm).

    Raises:
        ForeignTarget: If a target is outside of `PACKAGES` and `allow_foreign` is false. The error
            is a ValueError.
        ValueError: If a target is not text or is empty, or if a text or a key of a dict contains
            "${".
    """
    refuse_interpolations(node, key)
    for place, target in _targets(node, key):
        if not isinstance(target, str) or not target:
            raise ValueError(
                f"{place}={target!r} is not a dotted name; give one such as sddlskd.models.create"
            )
        if not allow_foreign and not _is_ours(target):
            raise ForeignTarget(
                f"{place}={target!a} is not from {', '.join(PACKAGES)}; if it is your own code, or "
                "code that you trust, set allow_foreign_targets=true to run it"
            )


def refuse_interpolations(node: Any, key: str) -> None:
    """Raise ValueError if a text in nested values, or a key of a dict, contains "${".

    `node` holds resolved values: nested dicts, lists and plain values. Hydra would resolve a text
    with "${" once more, to a value that nobody has checked. `key` is the dotted key of `node`, for
    the message.
    """
    if isinstance(node, dict):
        for name, value in node.items():
            refuse_interpolations(name, key)
            refuse_interpolations(value, f"{key}.{name}".lstrip("."))
    elif isinstance(node, list | tuple):
        for i, value in enumerate(node):
            refuse_interpolations(value, f"{key}[{i}]")
    elif isinstance(node, str) and "${" in node:
        raise ValueError(
            f"{key}={node[:200]!a} holds a '${{', which a resolved value must not hold; take it out"
        )


def instantiate(node: Any, **arguments: Any) -> Any:
    """Check the targets in `node` (`_target_`, names of code), then call `hydra.utils.instantiate`.

    Targets outside of `PACKAGES` (sddlskd, torch, torchvision, timm) are not checked here, because
    they passed `check_names` when the job was composed.

    Args:
        node: Values of a configuration with a `_target_`; every target is a text.
        **arguments: Further arguments of `hydra.utils.instantiate`, such as `_partial_=True`.

    Returns:
        What the target returns, or a functools.partial of the target with `_partial_=True`.

    Raises:
        ValueError: If a target from `PACKAGES` is private, cannot be found, or is neither a
            network, nor an optimizer, nor a public function of sddlskd.datasets, sddlskd.losses or
            sddlskd.models; or if a text or a key contains "${". Nothing is called in these cases.
        InstantiationException: If Hydra cannot call a target: the call raises an error, a target
            outside of `PACKAGES` cannot be found, or any other problem.
    """
    refuse_interpolations(node, "")
    for _, target in _targets(node, ""):
        if _is_ours(target):
            _check_kind(target)
    return hydra_instantiate(node, **arguments)


def foreign_files(node: Any) -> dict[str, Path]:
    """Return {module: its source file} for the targets in nested values that are outside code.

    Outside code is code that is not in `PACKAGES` (sddlskd, torch, torchvision, timm). A module
    without a source file is left out. No module is imported.
    """
    files = {}
    for _, target in _targets(node, ""):
        if not _is_ours(target):
            module, file = _source_of(target)
            if file is not None:
                files[module] = file
    return files


def _source_of(target: str) -> tuple[str, Path | None]:
    """Return the name and the source file of the module of a dotted name; None without a file."""
    module, *rest = target.split(".")
    spec = None
    with suppress(ImportError, ValueError):
        spec = find_spec(module)
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        return module, None
    file = Path(spec.origin)
    for name in rest:
        inner, package = file.parent / f"{name}.py", file.parent / name / "__init__.py"
        if file.name != "__init__.py" or not (inner.is_file() or package.is_file()):
            break
        module = f"{module}.{name}"
        file = package if package.is_file() else inner
    return module, file


def _targets(node: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and the value of every `_target_` in nested dicts and lists."""
    if isinstance(node, dict):
        for name, value in node.items():
            place = f"{key}.{name}".lstrip(".")
            if name == "_target_":
                yield place, value
            else:
                yield from _targets(value, place)
    elif isinstance(node, list | tuple):
        for i, value in enumerate(node):
            yield from _targets(value, f"{key}[{i}]")


def with_names_of_today(node: Any) -> Any:
    """Return a copy of `node` with the present name of each `_target_` that has moved.

    `node` holds nested dicts, lists and plain values. `RENAMED` lists the moved targets. Other
    targets and all other values stay the same.
    """
    return _with_targets(node, RENAMED)


def with_first_names(node: Any) -> Any:
    """Return a copy of `node` with the first name of each `_target_` that has moved.

    `node` holds nested dicts, lists and plain values. `RENAMED` lists the moved targets. Hashes use
    first names, so that a moved target does not change the hash of a job.
    """
    return _with_targets(node, _FIRST_NAMES)


def _with_targets(node: Any, names: Mapping[str, str]) -> Any:
    if isinstance(node, dict):
        renamed = {key: _with_targets(value, names) for key, value in node.items()}
        target = renamed.get("_target_")
        if isinstance(target, str):
            renamed["_target_"] = names.get(target, target)
        return renamed
    if isinstance(node, list):
        return [_with_targets(value, names) for value in node]
    return node


def _functions() -> Iterator[Any]:
    """Yield the functions that a configuration may call."""
    for name in FUNCTION_MODULES:
        module = import_module(name)
        yield from (getattr(module, function) for function in module.__all__)


def _is_ours(target: str) -> bool:
    return target.partition(".")[0] in PACKAGES


@contextmanager
def _without_messages(name: str) -> Iterator[None]:
    """Silence the logger `name` for a block.

    Hydra logs an error of several lines before raising it.
    """
    logger = logging.getLogger(name)
    earlier, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = earlier


def _check_kind(target: str) -> None:
    """Raise ValueError unless `target` is an allowed network, optimizer or function."""
    from torch import nn, optim  # slow to import, and `check_names` does not need it

    cure = (
        "name a network, a method, an optimizer, or a function of sddlskd.models, sddlskd.losses "
        "or sddlskd.datasets"
    )
    if any(part.startswith("_") for part in target.split(".")):
        raise ValueError(f"_target_={target} is private; {cure}")
    try:
        with _without_messages("hydra.utils"):
            found = get_object(target)
    except Exception as error:  # an import along the path may raise anything
        raise ValueError(
            f"_target_={target} cannot be found ({' '.join(str(error).split())[:200]}); {cure}"
        ) from error
    if isinstance(found, type):
        origin = f"{found.__module__}."
        network = issubclass(found, nn.Module) and origin.startswith(NETWORK_MODULES)
        optimizer = issubclass(found, optim.Optimizer) and origin.startswith(OPTIMIZER_MODULES)
        allowed = network or optimizer
    else:
        allowed = any(found is function for function in _functions())
    if not allowed:
        raise ValueError(f"_target_={target} is not allowed in a configuration; {cure}")
