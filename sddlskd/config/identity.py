"""Hashes and names of a job (one training run), computed from its configuration."""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

from sddlskd.config.schema import (
    CacheDtype,
    Capture,
    Config,
    DatasetConfig,
    Pooling,
    TeacherView,
)
from sddlskd.config.targets import with_first_names

__all__ = [
    "cached_side",
    "canonical",
    "config_hash",
    "data_seed",
    "differing_settings",
    "digest",
    "flatten",
    "has_published_name",
    "identity_keys",
    "method_name",
    "plain",
    "run_name",
    "settings_hash",
    "sharing_key",
    "table_order",
    "teacher_name",
    "title",
    "titles",
]

# The papers' names of the losses in conf/distiller and of the methods in conf/features.
METHOD_NAMES = {
    "ab": "AB",
    "abkd": "ABKD",
    "at": "AT",
    "cat_kd": "CAT-KD",
    "cc": "CC",
    "crd": "CRD",
    "dist": "DIST",
    "dkd": "DKD",
    "fitnet": "FitNet",
    "fsp": "FSP",
    "ft": "FT",
    "gdkd": "GDKD",
    "kd": "KD",
    "kdsvd": "KDSVD",
    "mgd": "MGD",
    "mld": "MLD",
    "mlkd": "MLKD",
    "nkd": "NKD",
    "nst": "NST",
    "ofd": "OFD",
    "pkt": "PKT",
    "reviewkd": "ReviewKD",
    "rkd": "RKD",
    "rld": "RLD",
    "semckd": "SemCKD",
    "simkd": "SimKD",
    "skd": "SKD",
    "sld": "SLD",
    "sp": "SP",
    "ttm": "TTM",
    "vid": "VID",
    "wttm": "WTTM",
}

# Suffix of a loss on standardised logits.
STANDARDIZED: dict[bool | str, str] = {True: "LS", "batch": "BS", "class_scaled": "CS"}
# Papers' names of KD on such logits.
STANDARDIZED_KD = {"KD+BS": "LumiNet", "KD+CS": "NormKD"}
# The authors of SemCKD always add KD: the name SemCKD stands for the sum of both losses.
SHORT_NAMES = {"KD+SemCKD": "SemCKD", "SemCKD": "SemCKD without KD"}
# Names that tables give to jobs, besides those of losses and methods.
OTHER_NAMES = ("CTKD", "DOT", "student alone", "vanilla", "features_only", "teacher", "unknown")
# Fields of `Config` that hold settings by name; the names differ between jobs.
BY_NAME = ("features", "more_teachers")


def _identity(node: Any) -> Iterator[tuple[str, Any]]:
    """Yield (name, value) of each field that `config_hash` counts; nested dataclasses become dicts.

    Fields with the metadata identity=False are left out, and so are

    - a field with the metadata later=True that has its default;
    - the argument of `dataset.load` that repeats `dataset.root`;
    - the argument `stem` of this package's networks, if `stem` has its default.

    Whole floats become ints. A `_target_` that has moved gets its first name.
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
        elif f.name == "more_teachers":  # the order counts, because `weights` follows it
            yield f.name, [dict(_identity(teacher)) for teacher in value.values()]
        else:
            yield f.name, with_first_names(_same_numbers(value))


def _without(arguments: dict[str, Any], name: str, default: Any) -> dict[str, Any]:
    """Return a copy of `arguments`, without the entry `name` if its value is `default`."""
    return {k: v for k, v in arguments.items() if (k, v) != (name, default)}


def _same_numbers(value: Any) -> Any:
    """Return `value` with whole floats as ints, so that 6 and 6.0 have the same hash.

    Numbers in nested dicts and lists are converted, too.
    """
    if isinstance(value, dict):
        return {key: _same_numbers(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_same_numbers(inner) for inner in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def identity_keys() -> set[str]:
    """Return the dotted configuration keys that `config_hash` counts, such as "optimizer.lr".

    The result has keys that `config_hash` ignores as long as they have their default. It has no
    keys below `features` and `more_teachers`, which `config_hash` counts, too: the names there
    differ between jobs.
    """

    def walk(node: Any, prefix: str) -> Iterator[str]:
        for f in fields(node):
            if not f.metadata.get("identity", True):
                continue
            value = getattr(node, f.name, None)
            if is_dataclass(value):
                yield from walk(value, f"{prefix}{f.name}.")
            elif f.name not in BY_NAME:
                yield prefix + f.name

    return set(walk(Config(), ""))


def config_hash(config: Config) -> str:
    """Return twelve hex digits that identify what a job (one training run) computes.

    The settings that determine the result count, including the seed. Folders, device, tracking,
    display and other settings that only say how the job runs do not count. `teacher.checkpoint`,
    the path of the teacher's weights, does count.
    """
    return digest(dict(_identity(config)))


def settings_hash(config: Config) -> str:
    """Return the `config_hash` that the job would have with seed 0.

    Jobs that differ only in `seed` have the same settings hash.
    """
    return config_hash(replace(config, seed=0))


def canonical(value: Any) -> str:
    """Return `value` as JSON text that does not depend on the order of keys in dicts.

    Raise TypeError if `value` holds anything that JSON cannot hold, such as a set.
    """
    return json.dumps(value, sort_keys=True)


def digest(value: Any) -> str:
    """Return the first twelve hex digits of the SHA-256 of `canonical(value)`.

    Raise TypeError if `value` holds anything that JSON cannot hold, such as a set.
    """
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:12]


def data_seed(config: Config) -> int:
    """Return the seed of batch order and augmentation.

    The seed is `trainer.data_seed`, or the job's `seed` if `trainer.data_seed` is None.
    """
    return config.seed if config.trainer.data_seed is None else config.trainer.data_seed


def sharing_key(config: Config) -> str:
    """Return twelve hex digits that are equal for jobs that can be trained side by side.

    Such jobs have the same batches and the same teacher with the same cache. They also have the
    same device, number of processes, epochs, precision, compilation and capture. `fit` trains them
    together, with one forward pass of the teacher per batch.
    """
    trainer = dict(_identity(config.trainer)) | {
        "data_seed": data_seed(config),
        "device": config.trainer.device,
        "devices": config.trainer.devices,
    }
    if config.trainer.capture != Capture.auto:
        trainer["capture"] = config.trainer.capture
    teacher: list[Any] = [
        config.teacher.name,
        config.teacher.model,
        config.teacher.checkpoint,
        config.teacher.cache,
        config.teacher.cache_dtype,
        config.home,
    ]
    if config.teacher.cache:
        # A job must read the same cached maps, whatever the jobs beside it need.
        teacher += [cached_side(config), bool(config.features)]
    if config.teacher.image_size:
        teacher.append(config.teacher.image_size)
    if config.teacher.view != TeacherView.augmented:
        teacher.append(config.teacher.view)
    if config.more_teachers:
        teacher += [dict(_identity(one)) for one in config.more_teachers.values()]
    # Jobs with and without strong views can share batches: their weak views are the same.
    dataset = _without(dict(_identity(config.dataset)), "views", config.dataset.views)
    return digest([trainer, teacher, dataset, config.dataset.root])


def cached_side(config: Config) -> int | None:
    """Return the side, in cells, to which the teacher's logit maps are pooled for the disk cache.

    The side is the least common multiple of 4 and of the scales `M`, so the regions of every scale
    can be pooled from the stored map. The pooling "nested" always has the side 4. None means that
    the maps are stored in full, which is so if `teacher.cache_dtype` is float32. A map whose sides
    are not multiples of the returned side is also stored in full.
    """
    if config.teacher.cache_dtype == CacheDtype.float32:
        return None
    if config.distiller.pooling == Pooling.nested:
        return 4  # this pooling goes through 4x4 cells for every scale
    return math.lcm(4, *config.M)


def run_name(config: Config) -> str:
    """Return the folder of a job's files, relative to <home>/runs: <data set>/<readable label>.

    The label names teacher, student, losses, scales and seed, and ends in `config_hash`. An example
    is cifar100/resnet32x4-resnet8x4-kd-ls-M-1-2-4-s0-1f0c2a9be417.
    """
    parts = [config.student.name]
    if config.distiller.loss or not config.features:
        parts.append(config.distiller.name)
    if config.has_teacher:
        parts.insert(0, teacher_name(config))
    if config.distiller.loss:
        if config.distiller.learned_temperature:
            parts.append("ctkd")
        if config.standardize:
            parts.append(STANDARDIZED[config.standardize].lower())
        parts += ["M", *map(str, config.M)]
    parts += config.features
    label = "-".join([*parts, f"s{config.seed}", config_hash(config)])
    return f"{plain(config.dataset.name)}/{plain(label)}"


def teacher_name(config: Config) -> str:
    """Return the name of a job's teacher in tables; several are joined by "+": "vgg13+wrn_40_2"."""
    return "+".join([config.teacher.name, *(one.name for one in config.more_teachers.values())])


def method_name(config: Config) -> str:
    """Return the name of a job's method as papers write it, without the scales: "SD-KD+LS+CRD".

    The parts are the loss on the logits, the feature methods, and "DOT" for the optimizer DOT.
    "SD-" marks a loss on the logits if `M` is not [1], and a feature method that has an option `M`
    of its own. "+LS" marks logits that are standardised over the classes, "+BS" over the batch, and
    "+CS" over the classes with the scale of the teacher. "KD+BS" is called "LumiNet", and "KD+CS"
    "NormKD". A learnt temperature turns "KD" into "CTKD", and other losses into, for example,
    "DKD+CTKD". "KD+SemCKD" becomes "SemCKD", and SemCKD without KD becomes "SemCKD without KD". A
    loss or method that `METHOD_NAMES` does not list keeps its configured name. A job without a
    teacher is called "student alone".
    """
    if not config.has_teacher:
        return "student alone"
    names = []
    for name, feature in config.features.items():
        known = METHOD_NAMES.get(name, name)
        if feature.method.get("M"):  # the loss is computed for each region
            known = f"SD-{known}"
        if feature.method.get("standardize"):
            known = f"{known}+LS"
        names.append(known)
    if config.distiller.loss:
        loss = METHOD_NAMES.get(config.distiller.name, config.distiller.name)
        suffix = ""
        if config.standardize:
            suffix = f"+{STANDARDIZED[config.standardize]}"
        if config.distiller.learned_temperature:
            loss = "CTKD" if loss == "KD" else f"{loss}+CTKD"
        elif f"{loss}{suffix}" in STANDARDIZED_KD:
            loss, suffix = STANDARDIZED_KD[f"{loss}{suffix}"], ""
        if config.M != [1]:
            loss = f"SD-{loss}"
        loss = f"{loss}{suffix}"
        names.insert(0, loss)
    if config.optimizer.name == "dot":  # DOT changes how the losses are combined
        names.append("DOT")
    name = "+".join(names)
    return SHORT_NAMES.get(name, name)


def has_published_name(name: str) -> bool:
    """Return whether a name is that of a method of this package or of a row in its tables.

    Case does not matter, nor do the prefix "sd_" and suffixes such as "_ls": tables would show a
    loss named "KD" or "sd_kd" as they show the published one.
    """
    known = {*METHOD_NAMES, *METHOD_NAMES.values(), *OTHER_NAMES}
    known |= {*STANDARDIZED_KD.values(), *SHORT_NAMES.values()}
    loss = re.sub(r"^sd[_-]", "", name.casefold())
    loss = re.sub(r"(_ls|_ls_batch|_ls_scaled|\+ls|\+bs|\+cs)$", "", loss)
    return not {name.casefold(), loss}.isdisjoint(one.casefold() for one in known)


def title(config: Config, *, seed: bool = True, student: bool = True, teacher: bool = False) -> str:
    """Return a title for a job: method, scales, seed and student.

    An example is "SD-KD+LS [1,2,4] seed 0, resnet8". The title does not name the scales if they are
    [1], or if the job has no loss on the logits.

    Args:
        config: The job.
        seed: Whether the title names the seed.
        student: Whether the title names the student.
        teacher: Whether the title names the teacher, too, if the job has one and the title names
            the student: "KD seed 0, resnet14 -> resnet8".

    Returns:
        The title. Different jobs may have the same title.
    """
    words = [method_name(config)]
    if config.distiller.loss and config.M != [1]:
        words.append(f"[{','.join(map(str, config.M))}]")
    if seed:
        words.append(f"seed {config.seed}")
    if not student:
        return " ".join(words)
    networks = config.student.name
    if teacher and config.has_teacher:
        networks = f"{teacher_name(config)} -> {networks}"
    return f"{' '.join(words)}, {networks}"


def titles(jobs: Sequence[Config], *, teacher: bool = False) -> list[str]:
    """Return a title for each job; the settings that tell namesakes apart follow in brackets.

    An example is "KD seed 0, resnet8 (temperature=2)". See `title` for `teacher`, and
    `differing_settings` for the settings.
    """
    found = []
    for job, own in zip(jobs, differing_settings(jobs), strict=True):
        name = title(job, teacher=teacher)
        if own:
            name = f"{name} ({own})"
        found.append(name)
    return found


def table_order(jobs: Sequence[Config]) -> list[int]:
    """Return the indices of jobs in the order in which a table shows them.

    The students alone come first. The pairs of networks follow as they first occur, each with its
    rows of KD first (KD, KD+LS, SD-KD, SD-KD+LS), as in the tables of the analysis. Other methods,
    scales, settings and seeds keep their order.
    """
    pairs = [(teacher_name(job), job.student.name) for job in jobs]

    def place(index: int) -> tuple[bool, int, bool, bool, bool]:
        job = jobs[index]
        is_kd = job.distiller.name == "kd" and not job.features
        return (
            job.has_teacher,
            pairs.index(pairs[index]),
            not is_kd,
            is_kd and job.M != [1],
            is_kd and job.standardize is not False,
        )

    return sorted(range(len(jobs)), key=place)


def plain(text: str) -> str:
    """Return `text` as one word that no shell interprets: "M=[1,2,4]" becomes "M-1-2-4".

    Each sequence of characters other than ASCII letters, digits, "." and "_" becomes one hyphen.
    Hyphens at both ends are dropped, so the result may be "".
    """
    return re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-")


def flatten(config: Config) -> dict[str, Any]:
    """Return all settings of a job in one flat dict with dotted keys, such as "teacher.name".

    Lists and dicts become compact JSON text, such as "[1,2,4]"; other values keep their type. The
    settings of a feature method have keys such as "features.crd.weight". The value of
    "teacher.name" names all teachers, see `teacher_name`.
    """

    def walk(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        for f in fields(node):
            value = getattr(node, f.name)
            if is_dataclass(value):
                yield from walk(value, f"{prefix}{f.name}.")
            elif f.name in BY_NAME:
                for name, inner in value.items():
                    yield from walk(inner, f"{prefix}{f.name}.{name}.")
            elif isinstance(value, dict | list):
                yield prefix + f.name, json.dumps(value, separators=(",", ":"))
            else:
                yield prefix + f.name, value

    return dict(walk(config, "")) | {"teacher.name": teacher_name(config)}


def differing_settings(jobs: Sequence[Config], searched: Collection[str] = ()) -> list[str]:
    """Return for each job a text with those settings that tell namesakes apart, such as "lr=0.1".

    Namesakes are the jobs in `jobs` with the same teacher and the same `title`. The text has the
    job's value of every setting in which its namesakes differ, except `run_dir`. A key is written
    in full, as in "distiller.temperature=2.0", if its last part is that of several keys.

    Args:
        jobs: The jobs to tell apart.
        searched: Dotted keys that a search varies. The text of each job has those of them in which
            any of the jobs differ, whatever their names; not "M" and "seed", which names have.

    Returns:
        A text for each job. Without `searched`, the text of a job without namesakes is "".
    """
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    flat = []
    for job in jobs:
        values = {key: value for key, value in flatten(job).items() if key != "run_dir"}
        shown = teacher_name(job), title(job)
        groups.setdefault(shown, []).append(values)
        flat.append((shown, values))
    everyone = [values for _, values in flat]
    always = _differing_keys(set(searched) - {"M", "seed"}, everyone)
    return [
        _settings_said(values, {*always, *_differing_keys(values, groups[shown])})
        for shown, values in flat
    ]


def _differing_keys(keys: Iterable[str], rivals: Sequence[dict[str, Any]]) -> set[str]:
    """Return those of the keys in whose values not all `rivals` agree."""
    return {key for key in keys if len({str(one.get(key)) for one in rivals}) > 1}


def _settings_said(values: dict[str, Any], chosen: Collection[str]) -> str:
    """Return the chosen ones of the settings `values`, as words of text."""
    differing = [key for key in values if key in chosen]
    # A mapping such as distiller.loss repeats what keys of their own say.
    scalars = [key for key in differing if not str(values[key]).startswith("{")]
    last_parts = Counter(key.rpartition(".")[2] for key in values)
    words = []
    for key in scalars or differing:
        name, value = key.rpartition(".")[2], values[key]
        text = f"{value:.6g}" if isinstance(value, float) else str(value)
        if last_parts[name] > 1:
            name = key
        words.append(f"{name}={text}")
    return " ".join(words)
