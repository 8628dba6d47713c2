"""Keep the translation of another code's file, and make the training command from it."""

import copy
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sddlskd import config as cfg
from sddlskd.config import Config
from sddlskd.terminal.console import explain

__all__ = [
    "ERRORS",
    "Keys",
    "Refused",
    "Translation",
    "command",
    "dotted",
    "milestones",
    "number",
    "numbers",
]

PROGRAM = "python -m sddlskd.train"
# Errors of a choice or a value that this package refuses
ERRORS = (ValueError, HydraException, OmegaConfBaseException)


class Refused(ValueError):
    """Error for all that prevents the translation of a file.

    Args:
        reasons: one line for each fault of the file, at least one.

    Attributes:
        reasons: the argument `reasons`, without repetitions.
    """

    def __init__(self, reasons: Sequence[str]) -> None:
        self.reasons = list(dict.fromkeys(reasons))
        super().__init__(" | ".join(self.reasons))


@dataclass
class Translation:
    """Settings of this package that train like a configuration file of another code.

    Attributes:
        choices: {group: choice} of the folders in conf/, such as {"recipe": "kd"}.
        values: {dotted key of this package: value}, such as {"trainer.epochs": 240}. The choices
            may already set some of these values.
        ignored: for the user, a line for each key or flag that is not translated, with the reason.
        unknown: for the user, a line for each key that the other code does not have, which may be
            mistyped.
        faults: for the user, a line for each fault of the file, because of which it cannot be
            translated.
    """

    choices: dict[str, str] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    @contextmanager
    def noting_faults(self) -> Iterator[None]:
        """Catch a ValueError that the `with` block raises, and add its message to `faults`."""
        try:
            yield
        except ValueError as error:
            self.faults.append(str(error))


def command(translation: Translation) -> str:
    """Return the training command for a translation, as one line for a shell.

    The command has the choices, and an override for each value that differs from what the choices
    set. A key that the choices do not have is added with "+".

    Raises:
        Refused: If the translation has faults, or if this package refuses a choice or a value. The
            error, a ValueError, holds the reasons of all of them.
    """
    choices = [f"{group}={choice}" for group, choice in translation.choices.items()]
    if unknown := _unknown(choices):
        raise Refused([*translation.faults, *unknown])
    try:
        composed = _composed(choices)
    except ERRORS as error:
        raise Refused([*translation.faults, explain(error)]) from error
    overrides = []
    for key, value in translation.values.items():
        present = OmegaConf.select(composed, key, default=None)
        if _same(present, value):
            continue
        add = "" if _has(composed, key) else "+"
        overrides.append(f"{add}{key}={cfg.value_text(value)}")
    try:
        _composed([*choices, *overrides])
    except ERRORS as error:
        bad = _bad_values(composed, translation.values) or [explain(error)]
        raise Refused([*translation.faults, *bad]) from error
    if translation.faults:
        raise Refused(translation.faults)
    return " ".join([PROGRAM, *map(shlex.quote, [*choices, *overrides])])


def _unknown(choices: Sequence[str]) -> list[str]:
    """Return a line for each choice, such as "student=vgg9", that conf/ does not have."""
    found = []
    for choice in choices:
        group, _, name = choice.partition("=")
        if "." in group or (cfg.conf_folder() / group / f"{name}.yaml").is_file():
            continue
        try:
            _composed([choice])
        except ERRORS as error:
            found.append(explain(error))
    return found


def _bad_values(composed: DictConfig, values: Mapping[str, Any]) -> list[str]:
    """Return a line for each value that this package refuses whatever the other values are.

    Args:
        composed: job with the choices of a translation alone.
        values: {dotted key: value} of the translation.
    """
    found = []
    for key, value in values.items():
        job = copy.deepcopy(composed)
        try:
            OmegaConf.update(job, key, value, force_add=True)
            changed = OmegaConf.to_object(job)
            assert isinstance(changed, Config)
            cfg.normalise(changed)
        except ERRORS as error:
            found.append(explain(error))
    return found


def milestones(stages: Sequence[float], epochs: int) -> list[float]:
    """Convert the epochs at which the learning rate falls to fractions of the training.

    Args:
        stages: numbers of epochs after which the learning rate falls, such as [150, 180, 210].
            Numbers of at least `epochs` give no fraction.
        epochs: number of epochs of the training.

    Returns:
        The fractions, such as [0.625, 0.75, 0.875], the form of the setting optimizer.milestones.
    """
    return [stage / epochs for stage in stages if stage < epochs]


def number(key: str, value: Any, least: float = -math.inf) -> float | int:
    """Return a number of a file; a text that states a number, such as "1e-4", becomes a float.

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
    """Return a list of a file with each entry as a number, as by `number`.

    `key` is the key of the list in the file, for messages. Raise ValueError if `value` is not a
    list, or if an entry is not a finite number.
    """
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


class Keys:
    """Keys of a file, with the defaults of its code; remembers which keys were read.

    A value that should be a number and is none becomes a fault, and its default stands for it.

    Args:
        values: content of the file.
        defaults: default of each key that may be read.
        found: translation that gets the faults.

    Attributes:
        stated: {dotted key: value} of the file itself.
    """

    def __init__(
        self, values: Mapping[str, Any], defaults: Mapping[str, Any], found: Translation
    ) -> None:
        self.stated = dotted(values)
        self._defaults = defaults
        self._found = found
        self._read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        """Return the value of a dotted key, or its default; raise KeyError if it has no default."""
        self._read.add(key)
        value = self.stated.get(key, self._defaults[key])
        default = self._defaults[key]
        if isinstance(default, int | float) and not isinstance(default, bool):
            with self._found.noting_faults():
                return number(key, value)
            return default
        return value

    def unread(self) -> list[str]:
        """Return the keys of the file that nobody has asked for, in the order of the file."""
        return [key for key in self.stated if key not in self._read]
