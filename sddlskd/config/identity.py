"""What a job is called: its hashes, its name, and which jobs can share batches and teacher."""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

from sddlskd.config.schema import Config, DatasetConfig
from sddlskd.config.targets import (
    with_first_names,
)

__all__ = [
    "canonical",
    "config_hash",
    "flatten",
    "identity_keys",
    "run_name",
    "settings_hash",
    "sharing_key",
]


def _identity(node: Any) -> Iterator[tuple[str, Any]]:
    """Yield name and value of each field that counts in `config_hash`, nested dataclasses as dicts.

    Three values are left out: a `later` field with its default, the argument of `dataset.load` that
    repeats `dataset.root`, and the default `stem` of this package's networks.
    """
    for f in fields(node):
        if f.metadata.get("identity", True):
            value = getattr(node, f.name)
            if f.metadata.get("later") and value == getattr(type(node)(), f.name):
                continue
            if place := f.metadata.get("place"):
                value = {k: v for k, v in value.items() if (k, v) != (place, getattr(node, place))}
            if f.name == "model" and str(value.get("_target_")).startswith("sddlskd.models."):
                value = {k: v for k, v in value.items() if (k, v) != ("stem", DatasetConfig.stem)}
            plain_value = dict(_identity(value)) if is_dataclass(value) else _same_numbers(value)
            yield f.name, with_first_names(plain_value)


def _same_numbers(value: Any) -> Any:
    """Return `value` with whole floats as ints, so that 6 and 6.0 have the same hash."""
    if isinstance(value, dict):
        return {key: _same_numbers(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_same_numbers(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def identity_keys() -> set[str]:
    """Return the dotted keys that count in `config_hash`."""

    def walk(node: Any, prefix: str) -> Iterator[str]:
        for f in fields(node):
            if f.metadata.get("identity", True):
                value = getattr(node, f.name, None)
                yield from (
                    walk(value, f"{prefix}{f.name}.") if is_dataclass(value) else [prefix + f.name]
                )

    return set(walk(Config(), ""))


def config_hash(config: Config) -> str:
    """Return twelve hex digits that identify what the job computes.

    Jobs that differ only in paths, device or tracking have the same hash.
    """
    return digest(dict(_identity(config)))


def settings_hash(config: Config) -> str:
    """Return `config_hash` without the seed.

    The hash is equal for the repetitions that a mean is taken over.
    """
    return config_hash(replace(config, seed=0))


def canonical(value: Any) -> str:
    """Return plain values as JSON text that is equal for equal values."""
    return json.dumps(value, sort_keys=True)


def digest(value: Any) -> str:
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:12]


def data_seed(config: Config) -> int:
    """Return the seed of batches and augmentation."""
    return config.seed if config.trainer.data_seed is None else config.trainer.data_seed


def sharing_key(config: Config) -> str:
    """Return a key that is equal for jobs with the same batches and the same teacher.

    Jobs with equal keys can be trained side by side.
    """
    where = {"device": config.trainer.device, "devices": config.trainer.devices}
    trainer = dict(_identity(config.trainer)) | {"data_seed": data_seed(config), **where}
    asked = config.teacher
    teacher = [
        asked.name,
        asked.model,
        asked.checkpoint,
        asked.cache,
        asked.cache_dtype,
        config.home,
    ]
    return digest([trainer, teacher, dict(_identity(config.dataset)), config.dataset.root])


def run_name(config: Config) -> str:
    """Return a readable, unique folder name for the run.

    For example cifar100/resnet32x4-resnet8x4-kd-ls-M-1-2-4-s0-1f0c2a9be417.
    """
    parts = [config.student.name, config.distiller.name]
    if config.distiller.loss:
        parts = [
            config.teacher.name,
            *parts,
            *(["ls"] if config.standardize else []),
            "M",
            *map(str, config.M),
        ]
    label = "-".join([*parts, f"s{config.seed}", config_hash(config)])
    return f"{plain(config.dataset.name)}/{plain(label)}"


def plain(text: str) -> str:
    """Return `text` without characters that a shell interprets: M=[1,2,4] becomes M-1-2-4."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-")


def flatten(config: Config) -> dict[str, Any]:
    """Return a flat dict {"teacher.name": ..., "M": ..., ...} with one entry per key.

    Lists and dicts of arguments become compact JSON.
    """

    def walk(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        for f in fields(node):
            value = getattr(node, f.name)
            if is_dataclass(value):
                yield from walk(value, f"{prefix}{f.name}.")
            elif isinstance(value, dict | list):
                yield prefix + f.name, json.dumps(value, separators=(",", ":"))
            else:
                yield prefix + f.name, value

    return dict(walk(config, ""))
