"""Keep the translation of another code's file, and make the training command from it."""

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from sddlskd import config as cfg
from sddlskd.config import Config

__all__ = ["Translation", "command", "dotted", "milestones", "number", "numbers"]

PROGRAM = "python -m sddlskd.train"


@dataclass
class Translation:
    """Settings of this package that train like a configuration file of another code.

    Attributes:
        choices: {group: choice} of the folders in conf/, such as {"recipe": "kd"}.
        values: {dotted key of this package: value}, such as {"trainer.epochs": 240}. The choices
            may already set some of these values.
        ignored: for the user, a line for each key or flag that is not translated, with the reason.
    """

    choices: dict[str, str] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)


def command(translation: Translation) -> str:
    """Return the training command for a translation, as one line for a shell.

    The command has the choices, and an override for each value that differs from what the choices
    set. A key that the choices do not have is added with "+".

    Raises:
        ValueError, HydraException, OmegaConfBaseException: If this package refuses a choice or a
            value.
    """
    choices = [f"{group}={choice}" for group, choice in translation.choices.items()]
    composed = _composed(choices)
    overrides = []
    for key, value in translation.values.items():
        present = OmegaConf.select(composed, key, default=None)
        if _same(present, value):
            continue
        add = "" if _has(composed, key) else "+"
        overrides.append(f"{add}{key}={_text(value)}")
    _composed([*choices, *overrides])  # raises if Hydra cannot compose the command
    return " ".join([PROGRAM, *map(shlex.quote, [*choices, *overrides])])


def milestones(stages: Sequence[float], epochs: int) -> list[float]:
    """Convert the epochs at which the learning rate falls to fractions of the training.

    Args:
        stages: numbers of epochs after which the learning rate falls, such as [150, 180, 210].
            Numbers that the training does not reach are left out.
        epochs: number of epochs of the training.

    Returns:
        The fractions, such as [0.625, 0.75, 0.875], the form of the setting optimizer.milestones.
    """
    return [stage / epochs for stage in stages if stage < epochs]


def number(key: str, value: Any, least: float = -math.inf) -> float | int:
    """Return a number of a file; a text such as "1e-4", which YAML does not read, becomes a number.

    Args:
        key: key of the value in the file, for messages.
        value: value of any type.
        least: smallest valid number.

    Raises:
        ValueError: If the value is not a finite number, or if it is less than `least`.
    """
    found = value
    try:
        if isinstance(value, str):
            found = float(value)
        is_finite = math.isfinite(found) and not isinstance(value, bool)
    except (TypeError, ValueError, OverflowError):  # OverflowError: an integer of 400 digits
        is_finite = False
    if not is_finite:
        raise ValueError(f"{key}={value} is not a number")
    if found < least:
        raise ValueError(f"{key}={value} must be at least {least}")
    return found  # type: ignore[no-any-return]


def numbers(key: str, value: Any) -> list[float | int]:
    """Return a list of numbers of a file; raise ValueError that names `key` if it is no list."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"{key}={value} is not a list of numbers")
    return [number(key, one) for one in value]


def _composed(overrides: Sequence[str]) -> DictConfig:
    """Return the checked job of overrides, as a configuration with dotted keys."""
    cfg.frame()
    with hydra.initialize_config_dir(str(cfg.conf_folder()), version_base="1.3"):
        job: Config = cfg.resolve(hydra.compose("config", overrides=list(overrides)))
    structured: DictConfig = OmegaConf.structured(job)
    return structured


def _has(composed: DictConfig, key: str) -> bool:
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(composed, parent) if parent else composed
    return isinstance(node, DictConfig) and name in node


def _same(present: Any, value: Any) -> bool:
    """Return whether two values are equal; numbers need only be close, and 1 is not true."""
    if OmegaConf.is_config(present):
        present = OmegaConf.to_container(present)
    if isinstance(present, list) and isinstance(value, list):
        return len(present) == len(value) and all(map(_same, present, value))
    if isinstance(present, bool) or isinstance(value, bool):
        return present is value
    if isinstance(present, int | float) and isinstance(value, int | float):
        return math.isclose(present, value, rel_tol=1e-9)
    return bool(present == value)


def _text(value: Any) -> str:
    """Return a value as Hydra reads it: true, null, [1,2], 0.05."""
    if isinstance(value, list):
        return f"[{','.join(map(_text, value))}]"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)


def dotted(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return {dotted key: value} of all values of nested mappings, such as {"SOLVER.LR": 0.05}.

    An empty mapping counts as a value. `prefix` is put before each key.
    """
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping) and value:
            flat |= dotted(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
