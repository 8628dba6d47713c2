"""Check the code that a configuration names by `_target_`, and call it; only this module does so.

A configuration is data: it comes from files, sweeps and other people's run directories. Its targets
must belong to this package, torch, torchvision or timm, unless `allow_foreign_targets` is set. Of
these packages, only networks, losses, optimizers and data sets are allowed. A dotted path leads
through attributes (`sddlskd.files.atomic.os.remove`), so the check looks at the object that the
path resolves to.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from traceback import extract_tb
from typing import Any

from hydra.utils import get_object
from hydra.utils import instantiate as hydra_instantiate

from sddlskd.config.sources import PACKAGES, note_imported, source_of, versions_of

__all__ = [
    "ForeignTarget",
    "MissingCode",
    "check_code",
    "check_names",
    "instantiate",
    "refuse_interpolations",
]

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
MOST_NAMES = 12  # names that a message lists
CURE = (
    "name a network, a method, an optimizer, or a function of sddlskd.models, sddlskd.losses "
    "or sddlskd.datasets"
)


class ForeignTarget(ValueError):
    """Error for a `_target_` with code outside of `PACKAGES`: sddlskd, torch, torchvision and timm.

    The error is raised for jobs without `allow_foreign_targets`.
    """


class MissingCode(ValueError):
    """Error for a `_target_` whose code cannot be found or imported."""


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

    The targets are checked by `check_code`.

    Args:
        node: Values of a configuration with a `_target_`; every target is a text.
        **arguments: Further arguments of `hydra.utils.instantiate`, such as `_partial_=True`.

    Returns:
        What the target returns, or a functools.partial of the target with `_partial_=True`.

    Raises:
        ValueError: As `check_code` raises it, or if a text or a key contains "${". Nothing is
            called in these cases.
        InstantiationException: If the call of a target raises an error, or if Hydra has any other
            problem.
    """
    refuse_interpolations(node, "")
    check_code(node, "")
    return hydra_instantiate(node, **arguments)


def check_code(node: Any, key: str) -> None:
    """Import the code that the targets in nested values name; raise ValueError if that fails.

    Targets outside of `PACKAGES` (sddlskd, torch, torchvision, timm) may be any function or class,
    because they passed `check_names` when the job was composed.

    Args:
        node: Values of a configuration; every target is a text.
        key: Dotted key of `node`, for the message.

    Raises:
        MissingCode: If a target cannot be found or imported. The error is a ValueError, and its
            message says which part of the name is wrong, or which line of the user's file.
        ValueError: If a target from `PACKAGES` is private, or is neither a network, nor an
            optimizer, nor a public function of sddlskd.datasets, sddlskd.losses or sddlskd.models.
            Also if a target from elsewhere cannot be called, such as a module.
    """
    for place, target in _targets(node, key):
        if _is_ours(target):
            _check_kind(place, target)
            continue
        before = versions_of([target])
        found = _find(place, target)
        note_imported(before)
        if not callable(found):
            raise ValueError(
                f"{place}={target} is a {type(found).__name__}; name a function or a class"
            )


def foreign_targets(node: Any) -> list[str]:
    """Return the targets in nested values that name code outside of `PACKAGES`.

    `PACKAGES` are sddlskd, torch, torchvision and timm.
    """
    return [target for _, target in _targets(node, "") if not _is_ours(target)]


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


def _check_kind(place: str, target: str) -> None:
    """Raise ValueError unless `target` is an allowed network, optimizer or function.

    `place` is the dotted key of the target, for the message.
    """
    from torch import nn, optim  # slow to import, and `check_names` does not need it

    if any(part.startswith("_") for part in target.split(".")):
        raise ValueError(f"{place}={target} is private; {CURE}")
    found = _find(place, target)
    if isinstance(found, type):
        origin = f"{found.__module__}."
        network = issubclass(found, nn.Module) and origin.startswith(NETWORK_MODULES)
        optimizer = issubclass(found, optim.Optimizer) and origin.startswith(OPTIMIZER_MODULES)
        allowed = network or optimizer
    else:
        allowed = any(found is function for function in _functions())
    if not allowed:
        raise ValueError(f"{place}={target} is not allowed in a configuration; {CURE}")


def _find(place: str, target: str) -> Any:
    """Return the object that a dotted name names; raise MissingCode if there is none.

    `place` is the dotted key of the name, for the message.
    """
    try:
        with _without_messages("hydra.utils"):
            return get_object(target)
    except Exception as error:  # an import along the path may raise anything
        raise MissingCode(f"{place}={target} {_fault(target)}") from error


def _fault(target: str) -> str:
    """Return what is wrong with a dotted name, as the end of a sentence about it."""
    path, *names = target.split(".")
    try:
        found = import_module(path)
    except Exception as error:
        return _import_fault(path, error)
    for index, name in enumerate(names):
        whole = f"{path}.{name}"
        if not hasattr(found, name):
            try:
                import_module(whole)
            except ModuleNotFoundError as error:
                if error.name == whole:
                    kind = _kind(name, is_last=index == len(names) - 1)
                    return f"cannot be found: {path} has no {kind} {_instead(found, name)}"
                return _import_fault(whole, error)
            except Exception as error:
                return _import_fault(whole, error)
        path, found = whole, getattr(found, name)
    return "cannot be found"


def _kind(name: str, *, is_last: bool) -> str:
    """Return what a part of a dotted name is meant to be; `is_last` tells of the last part."""
    if not is_last:
        return "module"
    return "class" if name[:1].isupper() else "function"


def _instead(found: Any, name: str) -> str:
    """Return a name that `found`, a module or a class, lacks, with what to type instead."""
    path = getattr(found, "__name__", "")
    own = [
        known
        for known, value in vars(found).items()
        if callable(value) and not known.startswith("_") and value.__module__ == path
    ]
    own += [module.name for module in iter_modules(getattr(found, "__path__", []))]
    public = getattr(found, "__all__", own)
    if near := _nearest(name, public):
        return f"{name}; did you mean {near}?"
    if 0 < len(public) <= MOST_NAMES:
        return f"{name}; it has {', '.join(public)}"
    return f"{name}; name another"


def _nearest(name: str, known: Iterable[str], least: float = 0.7) -> str:
    """Return the known name that is most like `name`, whatever the case, or "" if none is.

    `least` is the least likeness, as a ratio of difflib.
    """
    by_small = {one.lower(): one for one in known}
    near = get_close_matches(name.lower(), by_small, n=1, cutoff=least)
    return by_small[near[0]] if near else ""


def _import_fault(module: str, error: Exception) -> str:
    """Return why a module cannot be imported, as the end of a sentence about it."""
    if isinstance(error, ModuleNotFoundError) and error.name == module:
        if near := _nearest(module, (one.name for one in iter_modules()), least=0.8):
            return f"cannot be found: there is no module {module}; did you mean {near}?"
        return (
            f"cannot be found: there is no module {module}; start from its folder, or set "
            "PYTHONPATH"
        )
    if isinstance(error, SyntaxError) and error.filename:
        return f"cannot be imported: {Path(error.filename).name}, line {error.lineno}: {error.msg}"
    said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    _, file = source_of(module)
    lines = [
        frame.lineno for frame in extract_tb(error.__traceback__) if frame.filename == str(file)
    ]
    if file is not None and lines:
        return f"cannot be imported: {file.name}, line {lines[-1]}: {said}"
    return f"cannot be imported: {said}"
