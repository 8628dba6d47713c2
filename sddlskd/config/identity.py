"""What a job is called: its hashes, its name, and which jobs can share batches and teacher."""

import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

from sddlskd.config.schema import CacheDtype, Config, DatasetConfig, Pooling
from sddlskd.config.targets import with_first_names

__all__ = [
    "cached_side",
    "canonical",
    "config_hash",
    "flatten",
    "identity_keys",
    "method_name",
    "run_name",
    "settings_hash",
    "sharing_key",
    "title",
]

# The papers' names of the losses in conf/distiller and of the methods in conf/features.
METHOD_NAMES = {
    "ab": "AB",
    "at": "AT",
    "cat_kd": "CAT-KD",
    "cc": "CC",
    "crd": "CRD",
    "dkd": "DKD",
    "fitnet": "FitNet",
    "fsp": "FSP",
    "ft": "FT",
    "kd": "KD",
    "kdsvd": "KDSVD",
    "mgd": "MGD",
    "mlkd": "MLKD",
    "nkd": "NKD",
    "nst": "NST",
    "ofd": "OFD",
    "pkt": "PKT",
    "reviewkd": "ReviewKD",
    "rkd": "RKD",
    "semckd": "SemCKD",
    "simkd": "SimKD",
    "sp": "SP",
    "vid": "VID",
}

# SemCKD's authors train it together with KD.
SHORT_NAMES = {"KD+SemCKD": "SemCKD", "SemCKD": "SemCKD without KD"}


def _identity(node: Any) -> Iterator[tuple[str, Any]]:
    """Yield name and value of each field that counts in `config_hash`, nested dataclasses as dicts.

    Three values are left out: a `later` field with its default, the argument of `dataset.load` that
    repeats `dataset.root`, and the default `stem` of this package's networks.
    """
    for f in fields(node):
        if not f.metadata.get("identity", True):
            continue
        value = getattr(node, f.name)
        if f.metadata.get("later") and value == getattr(type(node)(), f.name):
            continue
        if place := f.metadata.get("place"):
            value = _without(value, place, getattr(node, place))
        if f.name == "model" and str(value.get("_target_")).startswith("sddlskd.models."):
            value = _without(value, "stem", DatasetConfig.stem)
        if is_dataclass(value):
            yield f.name, dict(_identity(value))
        elif f.name == "features":
            yield f.name, {name: dict(_identity(feature)) for name, feature in value.items()}
        else:
            yield f.name, with_first_names(_same_numbers(value))


def _without(arguments: dict[str, Any], name: str, default: Any) -> dict[str, Any]:
    """Return the arguments without the one of this name if it has this value."""
    return {k: v for k, v in arguments.items() if (k, v) != (name, default)}


def _same_numbers(value: Any) -> Any:
    """Return `value` with whole floats as ints, so that 6 and 6.0 have the same hash."""
    if isinstance(value, dict):
        return {key: _same_numbers(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_same_numbers(inner) for inner in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def identity_keys() -> set[str]:
    """Return the dotted keys that count in `config_hash`, without those of `features`."""

    def walk(node: Any, prefix: str) -> Iterator[str]:
        for f in fields(node):
            if not f.metadata.get("identity", True):
                continue
            value = getattr(node, f.name, None)
            if is_dataclass(value):
                yield from walk(value, f"{prefix}{f.name}.")
            elif f.name != "features":  # whose keys depend on the job
                yield prefix + f.name

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
    trainer = dict(_identity(config.trainer)) | {
        "data_seed": data_seed(config),
        "device": config.trainer.device,
        "devices": config.trainer.devices,
    }
    teacher: list[Any] = [
        config.teacher.name,
        config.teacher.model,
        config.teacher.checkpoint,
        config.teacher.cache,
        config.teacher.cache_dtype,
        config.home,
    ]
    if config.teacher.cache:
        # So that a job gets the same maps in every group, whatever the other jobs need.
        teacher += [cached_side(config), bool(config.features)]
    # The weak views are the same whether or not another job of the group needs strong ones.
    dataset = _without(dict(_identity(config.dataset)), "views", config.dataset.views)
    return digest([trainer, teacher, dataset, config.dataset.root])


def cached_side(config: Config) -> int | None:
    """Return the side to which the teacher's maps are pooled before the cache keeps them.

    All scales of the job are the same pools of the pooled map as of the full map. The side is at
    least 4, so that one cache serves all of M=[1], [1,2] and [1,2,4]. Return None for full maps,
    which float32 keeps because it promises the numbers of a run without a cache, to the bit.
    """
    if config.teacher.cache_dtype == CacheDtype.float32:
        return None
    if config.distiller.pooling == Pooling.nested:
        return 4  # the code pools to 4x4 before it pools to the scales
    return math.lcm(4, *config.M)


def run_name(config: Config) -> str:
    """Return a readable, unique folder name for the run.

    For example cifar100/resnet32x4-resnet8x4-kd-ls-M-1-2-4-s0-1f0c2a9be417.
    """
    parts = [config.student.name]
    if config.distiller.loss or not config.features:
        parts.append(config.distiller.name)
    if config.has_teacher:
        parts.insert(0, config.teacher.name)
    if config.distiller.loss:
        if config.distiller.learned_temperature:
            parts.append("ctkd")
        if config.standardize:
            parts.append("ls")
        parts += ["M", *map(str, config.M)]
    parts += config.features
    label = "-".join([*parts, f"s{config.seed}", config_hash(config)])
    return f"{plain(config.dataset.name)}/{plain(label)}"


def method_name(config: Config) -> str:
    """Return the papers' name of the job's method without its scales, such as SD-KD+LS+CRD.

    A loss of the user's own keeps its name as the user wrote it.
    """
    if not config.has_teacher:
        return "student alone"
    names = []
    for name, feature in config.features.items():
        known = METHOD_NAMES.get(name, name)
        if feature.method.get("M"):  # its loss is computed for each region of these scales
            known = f"SD-{known}"
        if feature.method.get("standardize"):
            known = f"{known}+LS"
        names.append(known)
    if config.distiller.loss:
        loss = METHOD_NAMES.get(config.distiller.name, config.distiller.name)
        if config.distiller.learned_temperature:
            loss = "CTKD" if loss == "KD" else f"{loss}+CTKD"
        if config.M != [1]:
            loss = f"SD-{loss}"
        if config.standardize:
            loss = f"{loss}+LS"
        names.insert(0, loss)
    if config.optimizer.name == "dot":  # it treats the losses of a method differently
        names.append("DOT")
    name = "+".join(names)
    return SHORT_NAMES.get(name, name)


def title(config: Config, *, seed: bool = True) -> str:
    """Return what people call the run of a job, such as "SD-KD+LS [1,2,4] seed 0, resnet8".

    Args:
        config: The job.
        seed: Whether to name the seed.
    """
    words = [method_name(config)]
    if config.distiller.loss and config.M != [1]:
        words.append(f"[{','.join(map(str, config.M))}]")
    if seed:
        words.append(f"seed {config.seed}")
    return f"{' '.join(words)}, {config.student.name}"


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
            elif f.name == "features":
                for name, feature in value.items():
                    yield from walk(feature, f"{prefix}features.{name}.")
            elif isinstance(value, dict | list):
                yield prefix + f.name, json.dumps(value, separators=(",", ":"))
            else:
                yield prefix + f.name, value

    return dict(walk(config, ""))
