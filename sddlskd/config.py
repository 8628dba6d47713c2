"""Typed configuration of a job: keys, types, defaults and units; validation; the job's identity.

Only this module states defaults. The YAML files of conf/ state only what differs from these
defaults. This module does not import torch, so that `--help` and the planning of a launcher stay
fast.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, is_dataclass, replace
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.types import RunMode
from omegaconf import MISSING, DictConfig, OmegaConf

from sddlskd.targets import ForeignTarget, check_names, refuse_interpolations

__all__ = [
    "Config",
    "canonical",
    "config_hash",
    "flatten",
    "frame",
    "identity_keys",
    "load",
    "resolve",
    "run_name",
    "settings_hash",
    "settle",
    "sharing_key",
    "teacher_job",
    "to_yaml",
]

NO_TEACHER = "none"
# The name of the job that `resolve` is working on, so that `run_name` does not type it once more.
_RUN_NAME: ContextVar[str | None] = ContextVar("run_name", default=None)
M_CURE = "give distinct positive integers, such as M=[1,2,4]"


def _plumbing(default: Any) -> Any:
    """Return a field for how a job runs (paths, device, tracking), not for what it computes.

    `config_hash` ignores the field.
    """
    return field(default=default, metadata={"identity": False})


def _later(default: Any) -> Any:
    """Return a field for a key that older jobs do not have.

    `config_hash` ignores the field while it has its default value, so that older jobs keep their
    names.
    """
    return field(default=default, metadata={"later": True})


class Precision(StrEnum):
    """Number format of the networks' forward pass."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Schedule(StrEnum):
    """Shape of the learning rate over the epochs."""

    step = "step"  # times `decay` at each milestone
    cosine = "cosine"  # half a cosine down to zero
    constant = "constant"


class Knowledge(StrEnum):
    """Regions whose loss counts (SDD Table 6)."""

    fusion = "fusion"
    consistent = "consistent"
    complementary = "complementary"


class Reduction(StrEnum):
    """Reduction of the distillation loss over regions."""

    mean = "mean"
    sum = "sum"


class CacheDtype(StrEnum):
    """Number format of the cached teacher maps."""

    # Half the disk space. The rounding error of a value is at most 2^-11 of its size, or 3e-8.
    float16 = "float16"
    float32 = "float32"  # the same numbers as without a cache


class BadImages(StrEnum):
    """Policy for image files that cannot be read."""

    fail = "fail"  # stop, naming the file
    skip = "skip"  # training uses the next image instead, evaluation leaves the image out


class IrregularImages(StrEnum):
    """Policy for images that are not upright RGB as stored."""

    convert = "convert"  # to RGB, in the stored orientation, like torchvision's ImageFolder
    skip = "skip"
    fail = "fail"


class Rerun(StrEnum):
    """Jobs of an earlier launch of the sweep that run again."""

    failed = "failed"  # failed, interrupted and new jobs
    all = "all"  # every job from the start; the old records are set aside
    none = "none"  # only interrupted and new jobs


class Progress(StrEnum):
    """Display of training progress."""

    auto = "auto"  # live table on a terminal, plain lines elsewhere
    plain = "plain"
    off = "off"


@dataclass
class StudentConfig:
    """The student network and its learning rate."""

    name: str = MISSING  # name of the network in tables
    # _target_ and its arguments; num_classes is added
    model: dict[str, Any] = field(default_factory=dict)
    # Peak learning rate for the papers' SGD (optimizer=sgd); conf/rates.yaml sets it to dataset.lr
    # by default
    lr: float = 0.05


@dataclass
class TeacherConfig(StudentConfig):
    """The teacher network, its weights file, its map cache and how to train it if it is missing."""

    checkpoint: str | None = None  # weights file; null: <home>/teachers/<dataset>/<name>.pt
    # Folder that keeps the teacher's maps for this and later sweeps; null: no cache
    cache: str | None = _plumbing(None)
    cache_dtype: CacheDtype = CacheDtype.float16  # number format of the cached maps
    train_if_missing: bool = _plumbing(False)  # train the teacher first if its file is missing
    train_epochs: int = _plumbing(240)  # epochs of that training
    train_seed: int = _plumbing(0)  # seed of that training


@dataclass
class DistillerConfig:
    """The training loss of a student: distillation loss, weights and options of SDD."""

    name: str = MISSING  # name of the loss in tables
    # _target_ and arguments of (s_NK, t_NK, y_N) -> (N,); {}: no distillation loss
    loss: dict[str, Any] = field(default_factory=dict)
    temperature: float = 4.0  # divides the logits
    ce_weight: float = 1.0  # weight of the cross-entropy with the labels
    kd_weight: float = 1.0  # weight of the distillation loss
    # Epochs over which kd_weight rises linearly; 1: full weight from the first epoch
    warmup_epochs: int = 1
    knowledge: Knowledge = Knowledge.fusion  # which regions teach (SDD Table 6)
    # Over regions: mean as in SDD's code, sum as in its Eq. 9
    reduction: Reduction = Reduction.mean


@dataclass
class DatasetConfig:
    """The data set, its preprocessing, and the defaults that it gives to other groups."""

    name: str = MISSING  # name of the data set in tables
    # _target_ and arguments of () -> Splits. The identity ignores the argument `root` if it equals
    # dataset.root.
    load: dict[str, Any] = field(
        default_factory=dict,
        metadata={"place": "root"},
    )
    root: str = _plumbing("data")  # folder of the files
    num_classes: int = MISSING  # number of classes
    mean: list[float] = field(default_factory=list)  # per channel, for pixels in 0..1
    std: list[float] = field(default_factory=list)  # per channel, for pixels in 0..1
    padding: int = 4  # pixels of zero padding before the random crop; 0: no crop
    flip: bool = True  # mirror half of the images
    # Fraction of the training split held out for validation; 0: validate on the test split, as in
    # the papers
    val_fraction: float = 0.0
    # The keys from here to pixel_limit apply only to data sets of image files
    # (sddlskd/streaming.py).
    size: int = _later(224)  # side of the networks' input, in pixels
    # Least and largest fraction of the image area that a random crop covers
    crop_area: list[float] = field(default_factory=lambda: [0.08, 1.0], metadata={"later": True})
    # Side of the centre square for evaluation, as a fraction of the shorter side; 1: the full side
    centre: float = _later(0.875)
    # Rotate images according to their EXIF orientation; false: keep the stored orientation
    upright: bool = _later(False)
    # Files that cannot be read. (RUF009 is a false alarm: `_later` returns a dataclass field.)
    bad_images: BadImages = _later(BadImages.fail)  # noqa: RUF009
    # Images that are not upright RGB as stored
    irregular_images: IrregularImages = _later(IrregularImages.convert)  # noqa: RUF009
    # Pixels above which an image counts as bad, according to its header
    pixel_limit: int = _later(100_000_000)
    # Worker processes that decode images; 0: decode in the training process; null: one per core
    # that this rank may use, at most 16 (decoding.default_workers)
    workers: int | None = _plumbing(None)
    epochs: int = 240  # default of trainer.epochs and teacher.train_epochs
    batch_size: int = _plumbing(64)  # default of trainer.batch_size, in images
    # Default of student.lr and teacher.lr; null: the value for CIFAR-100 (conf/rates.yaml)
    lr: float | None = _plumbing(None)
    weight_decay: float = _plumbing(5e-4)  # default weight decay of the papers' SGD
    # Default milestones of the papers' SGD
    milestones: list[float] = field(
        default_factory=lambda: [0.625, 0.75, 0.875], metadata={"identity": False}
    )
    # Stem of this package's CIFAR networks: small for images of 32 pixels, large for images of 224
    stem: str = _plumbing("small")
    train_teachers: bool = _plumbing(False)  # default of teacher.train_if_missing


@dataclass
class OptimizerConfig:
    """The optimizer and its learning-rate schedule."""

    name: str = MISSING
    # _target_ and its arguments, without params and lr
    algorithm: dict[str, Any] = field(default_factory=dict)
    lr: float = 0.05  # peak learning rate
    schedule: Schedule = Schedule.step  # how the learning rate falls
    # As fractions of trainer.epochs
    milestones: list[float] = field(default_factory=lambda: [0.625, 0.75, 0.875])
    decay: float = 0.1  # factor at each milestone
    warmup_epochs: float = 0.0  # epochs over which the learning rate rises linearly from zero
    clip_norm: float | None = None  # largest gradient norm; null: no clipping


@dataclass
class TrainerConfig:
    """The training loop: length, batches, device, processes and precision."""

    epochs: int = 240  # passes over the training images
    batch_size: int = 64  # images
    eval_batch_size: int = 500  # images
    max_steps: int | None = None  # batches per epoch, for quick trials; null: all
    # Seed of batches and augmentation; null: `seed`. Jobs with the same data_seed see the same
    # batches and share the teacher, so they differ only in their initialisation.
    data_seed: int | None = None
    device: str = _plumbing("auto")  # auto, cpu, cuda, cuda:1, mps
    devices: int = _plumbing(1)  # processes (one per GPU) that share each batch
    # Seconds that one of several processes waits for another before it gives up
    timeout_s: float = _plumbing(600.0)
    # Of the networks' forward pass; losses are always float32
    precision: Precision = Precision.fp32
    compile: bool = False  # torch.compile the networks
    log_every: int = _plumbing(50)  # steps between two readings of the loss
    # RUF009 is a false alarm: `_plumbing` returns a dataclass field.
    progress: Progress = _plumbing(Progress.auto)  # noqa: RUF009


@dataclass
class CheckpointConfig:
    """Frequency of checkpoints."""

    # Minutes between checkpoints within an epoch; every epoch ends with a checkpoint
    every_minutes: float = _plumbing(10.0)


@dataclass
class TrackingConfig:
    """Mirroring of runs to MLflow."""

    enabled: bool = _plumbing(True)  # mirror runs to MLflow
    uri: str | None = _plumbing(None)  # MLflow server or sqlite:////absolute/path
    experiment: str = _plumbing("sddlskd")  # MLflow experiment
    # Continue without MLflow if it is unreachable; `sync` delivers the runs later
    offline: bool = _plumbing(False)
    # Keep logits, region predictions and features on the test split, for figures
    predictions: bool = _plumbing(False)
    experiment_id: str | None = _plumbing(None)  # set by the launching process
    parent_run_id: str | None = _plumbing(None)  # run id of the sweep, set by the launching process


@dataclass
class SweepConfig:
    """A sweep: its name, its extra jobs and which jobs run again."""

    # Tag `sweep` of every run; null: named after the swept overrides
    name: str | None = _plumbing(None)
    # Jobs that do not form a grid: one entry per job with its overrides, such as
    # "pair=vgg13_vgg8 scales=two". They are crossed with the swept overrides.
    jobs: list[str] = field(default_factory=list, metadata={"identity": False})
    plan: bool = _plumbing(False)  # print what the sweep would do, and do nothing
    # Which jobs of an earlier launch run again. (RUF009 is a false alarm.)
    rerun: Rerun = _plumbing(Rerun.failed)  # noqa: RUF009


@dataclass
class Config:
    """All settings of a job."""

    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    distiller: DistillerConfig = field(default_factory=DistillerConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    # Scales: each m in M divides the logit maps into m x m regions
    M: list[int] = field(default_factory=lambda: [1])
    standardize: bool = False  # z-score the logits of each region (LSKD)
    complementary_weight: float = 2.0  # weight of complementary regions (SDD's beta)
    # Seed of the initialisation, and of the batches unless trainer.data_seed is given
    seed: int = 0
    # Whether _target_ may name code outside of targets.PACKAGES (this package, torch, torchvision
    # and timm)
    allow_foreign_targets: bool = _plumbing(False)
    home: str = _plumbing(".")  # folder of data/, teachers/, runs/ and mlflow.db
    run_dir: str = _plumbing("")  # folder of this run's record


def frame() -> None:
    """Register the typed configuration and the resolvers with Hydra, once per process."""
    # Plugins.instance() finds the launchers. The launcher `submitit_local` of
    # hydra-submitit-launcher is dropped in favour of conf/hydra/launcher/submitit_local.yaml.
    Plugins.instance()
    ConfigStore.instance().repo["hydra"]["launcher"].pop("submitit_local.yaml", None)
    ConfigStore.instance().store("frame", node=Config)
    OmegaConf.register_new_resolver("cwd", lambda: str(Path.cwd()), replace=True)
    OmegaConf.register_new_resolver("given", _given, replace=True)
    OmegaConf.register_new_resolver("run_name", _run_name_of_root, replace=True)
    OmegaConf.register_new_resolver("sweep_name", _sweep_name_of_root, replace=True)


def _given(*values: Any) -> Any:
    """Return the first value that is not null, or None if all are null."""
    return next((value for value in values if value is not None), None)


def _run_name_of_root(*, _root_: DictConfig) -> str:
    return _RUN_NAME.get() or run_name(_typed(_root_))


def _sweep_name_of_root(*, _root_: DictConfig) -> str | None:
    """Return a name for the sweep, or None for a single run.

    The name consists of the sweep's configuration file (unless it is the default, `config`) and of
    the overrides that change what is computed, with a hash of both: for example
    student-shufflev1-mobilev2-1f0c2a.
    """
    if "hydra" not in _root_ or _root_.hydra.mode is not RunMode.MULTIRUN:
        return None
    how = (
        "tracking",
        "home=",
        "dataset.root=",
        "sweep.",
        "checkpoint.",
        "trainer.device=",
        "trainer.progress=",
    )
    overrides = sorted(
        text for text in _root_.hydra.overrides.task if not text.lstrip("+").startswith(how)
    )
    name, file = "-".join(overrides), str(_root_.hydra.job.config_name)
    if file != "config":
        name = "-".join([file, *overrides])
    return (
        f"{_plain(name)[:60].strip('-')}-{_digest([file, overrides])[:6]}"
        if overrides
        else _plain(file)
    )


def resolve(composed: DictConfig) -> Config:
    """Return the composed configuration as typed, checked values.

    Interpolations are resolved and paths are absolute. Raises ValueError, naming the value and what
    is valid, or an OmegaConf error for a value of the wrong type.
    """
    config = _typed(composed)
    # `in composed` would resolve run_dir, which types the whole configuration once more.
    if "run_dir" in composed.keys():  # noqa: SIM118
        known = _RUN_NAME.set(run_name(config))
        try:
            run_dir = composed["run_dir"]
        finally:
            _RUN_NAME.reset(known)
        refuse_interpolations(run_dir, "run_dir")
        if not isinstance(run_dir, str):
            # The merge turns a number into text and raises OmegaConf's error for other types.
            run_dir = OmegaConf.merge(_empty(), {"run_dir": run_dir}).run_dir
        config.run_dir = os.path.abspath(run_dir) if run_dir else ""
    return config


def _typed(composed: DictConfig) -> Config:
    """Return the typed and checked configuration, without run_dir."""
    bare = OmegaConf.masked_copy(
        composed, [str(key) for key in composed if key not in ("hydra", "run_dir")]
    )
    # Plain values, so that the merge also refuses a key added with `+`.
    plain = OmegaConf.to_container(bare, resolve=True)
    refuse_interpolations(plain, "")
    config = OmegaConf.to_object(OmegaConf.merge(_empty(), plain))
    assert isinstance(config, Config)
    return settle(config)


@cache
def _empty() -> DictConfig:
    typed: DictConfig = OmegaConf.structured(Config)
    return typed


def settle(config: Config) -> Config:
    """Check and normalise typed values in place, so that equal jobs have equal values.

    Paths become absolute, and keys that a job does not use get fixed values. Returns `config`.
    Raises ValueError if a value is not valid.
    """
    if not config.distiller.loss:
        _drop_what_needs_a_teacher(config)
    if config.teacher.cache is None:
        # A float32 cache does not round, so a job with such a cache equals a job without a cache.
        config.teacher.cache_dtype = CacheDtype.float32
    else:
        config.teacher.cache = os.path.abspath(config.teacher.cache)
    _check(config)
    config.home = os.path.abspath(config.home)
    if config.tracking.uri and config.tracking.uri.startswith("sqlite:///"):
        config.tracking.uri = "sqlite:///" + os.path.abspath(
            config.tracking.uri.removeprefix("sqlite:///")
        )
    root, config.dataset.root = config.dataset.root, os.path.abspath(config.dataset.root)
    if config.dataset.load.get("root") == root:
        config.dataset.load = {**config.dataset.load, "root": config.dataset.root}
    if config.run_dir:
        config.run_dir = os.path.abspath(config.run_dir)
    if config.teacher.checkpoint:
        config.teacher.checkpoint = os.path.abspath(config.teacher.checkpoint)
    return config


def _drop_what_needs_a_teacher(config: Config) -> None:
    """Reset all keys that only matter with a teacher.

    A student without a distillation loss is then the same job for every teacher, scale and weight.
    """
    plain = Config()
    config.teacher = TeacherConfig(name=NO_TEACHER)
    config.distiller = DistillerConfig(
        name=config.distiller.name, ce_weight=config.distiller.ce_weight, kd_weight=0.0
    )
    config.M, config.standardize = plain.M, plain.standardize
    config.complementary_weight = plain.complementary_weight


def _check(config: Config) -> None:
    for key in (
        "student.model",
        "teacher.model",
        "distiller.loss",
        "dataset.load",
        "optimizer.algorithm",
    ):
        group, name = key.split(".")
        check_names(getattr(getattr(config, group), name), key, config.allow_foreign_targets)
    if not config.home:
        raise ValueError("home is empty; name a folder, such as home=.")
    if "@" in urlsplit(config.tracking.uri or "").netloc:
        raise ValueError(
            "tracking.uri holds a user name or password, which every run's record and MLflow "
            "would show; take it out of the address and set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD instead"
        )
    M = config.M
    if not M or min(M) < 1 or len(set(M)) < len(M):
        raise ValueError(f"M={M} is not valid; {M_CURE}")
    if config.distiller.loss and not config.teacher.model:
        raise ValueError(
            f"distiller={config.distiller.name} needs a teacher; choose one with teacher=..., or "
            "distiller=vanilla"
        )
    for group, network in (("student", config.student), ("teacher", config.teacher)):
        ours = network.model.get("_target_") == "sddlskd.models.create"
        if config.dataset.name == "imagenet" and ours and network.name in ("resnet18", "resnet50"):
            raise ValueError(
                f"{group}={network.name} is the network for CIFAR-100, but on imagenet its file "
                f"has the same name as that of torchvision's {network.name}; use "
                f"{group}=imagenet_{network.name}, or set another {group}.name"
            )
    positive = {
        "dataset.size": config.dataset.size,
        "dataset.centre": config.dataset.centre,
        "dataset.pixel_limit": config.dataset.pixel_limit,
        "trainer.epochs": config.trainer.epochs,
        "trainer.batch_size": config.trainer.batch_size,
        "trainer.eval_batch_size": config.trainer.eval_batch_size,
        "trainer.log_every": config.trainer.log_every,
        "trainer.devices": config.trainer.devices,
        "trainer.timeout_s": config.trainer.timeout_s,
        "trainer.max_steps": 1 if config.trainer.max_steps is None else config.trainer.max_steps,
        "teacher.train_epochs": config.teacher.train_epochs,
        "distiller.warmup_epochs": config.distiller.warmup_epochs,
        "distiller.temperature": config.distiller.temperature,
        "optimizer.lr": config.optimizer.lr,
        "optimizer.clip_norm": 1
        if config.optimizer.clip_norm is None
        else config.optimizer.clip_norm,
        "checkpoint.every_minutes": config.checkpoint.every_minutes,
    }
    not_negative = {
        "distiller.ce_weight": config.distiller.ce_weight,
        "distiller.kd_weight": config.distiller.kd_weight,
        "complementary_weight": config.complementary_weight,
        "optimizer.warmup_epochs": config.optimizer.warmup_epochs,
        "dataset.padding": config.dataset.padding,
        "dataset.workers": config.dataset.workers or 0,
        "seed": config.seed,
        "trainer.data_seed": config.trainer.data_seed or 0,
    }
    for key, value in positive.items():
        if not value > 0:
            raise ValueError(f"{key}={value} must be greater than 0")
    for key, value in not_negative.items():
        if not value >= 0:
            raise ValueError(f"{key}={value} must not be negative")
    if any(not 0 < part <= 1 for part in config.optimizer.milestones):
        raise ValueError(
            f"optimizer.milestones={config.optimizer.milestones} is not valid; give fractions of "
            "trainer.epochs, above 0 and at most 1: epoch 150 of 240 is 0.625"
        )
    if not config.dataset.centre <= 1:
        raise ValueError(
            f"dataset.centre={config.dataset.centre} is not valid; give a fraction of the image's "
            "shorter side, at most 1"
        )
    area = config.dataset.crop_area
    if len(area) != 2 or not 0 < area[0] <= area[1] <= 1:
        raise ValueError(
            f"dataset.crop_area={area} is not valid; give the least and the largest fraction of "
            "the image area, above 0 and at most 1, such as [0.08,1]"
        )
    if not 0 <= config.dataset.val_fraction < 1:
        raise ValueError(
            f"dataset.val_fraction={config.dataset.val_fraction} must be at least 0 and less than 1"
        )


def teacher_job(config: Config) -> Config:
    """Return the job that trains the teacher of `config` from scratch.

    The job is the same for every student that needs this teacher.
    """
    job = Config(
        teacher=TeacherConfig(name=NO_TEACHER),
        student=StudentConfig(config.teacher.name, config.teacher.model, config.teacher.lr),
        distiller=DistillerConfig(name="vanilla", kd_weight=0.0),
        dataset=config.dataset,
        # As conf/optimizer/sgd.yaml: the teacher's training ignores the students' settings.
        optimizer=OptimizerConfig(
            name="sgd",
            algorithm={
                "_target_": "torch.optim.SGD",
                "momentum": 0.9,
                "weight_decay": config.dataset.weight_decay,
            },
            lr=config.teacher.lr,
            milestones=config.dataset.milestones,
        ),
        trainer=TrainerConfig(
            epochs=config.teacher.train_epochs,
            batch_size=config.dataset.batch_size,
            device=config.trainer.device,
            devices=config.trainer.devices,
            timeout_s=config.trainer.timeout_s,
            log_every=config.trainer.log_every,
            progress=config.trainer.progress,
        ),
        tracking=config.tracking,
        seed=config.teacher.train_seed,
        allow_foreign_targets=config.allow_foreign_targets,
        home=config.home,
    )
    settle(job)
    job.run_dir = str(Path(config.home, "runs", run_name(job)))
    return job


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
            yield f.name, dict(_identity(value)) if is_dataclass(value) else _same_numbers(value)


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
    return _digest(dict(_identity(config)))


def settings_hash(config: Config) -> str:
    """Return `config_hash` without the seed.

    The hash is equal for the repetitions that a mean is taken over.
    """
    return config_hash(replace(config, seed=0))


def canonical(value: Any) -> str:
    """Return plain values as JSON text that is equal for equal values."""
    return json.dumps(value, sort_keys=True)


def _digest(value: Any) -> str:
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
    return _digest([trainer, teacher, dict(_identity(config.dataset)), config.dataset.root])


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
    return f"{_plain(config.dataset.name)}/{_plain(label)}"


def _plain(text: str) -> str:
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


def to_yaml(config: Config) -> str:
    """Return the configuration as YAML, as it is written to the run directory."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def load(path: Path, *, allow_foreign_targets: bool | None = None) -> Config:
    """Read a configuration from a run directory, typed and checked.

    Args:
        path: The YAML file, as written by `to_yaml`.
        allow_foreign_targets: Replaces the value in the file, which may come from a stranger. None
            keeps the value in the file.

    Returns:
        The typed configuration, with absolute paths.

    Raises:
        ForeignTarget: If the file names code that is not allowed.
        ValueError: If the file is missing, damaged or of another version; the error names the file.
    """
    try:
        frozen = OmegaConf.load(path)
        refuse_interpolations(OmegaConf.to_container(frozen, resolve=False), "")
        job = OmegaConf.merge(_empty(), frozen)
        if allow_foreign_targets is not None:
            job.allow_foreign_targets = allow_foreign_targets
        return resolve(job)  # type: ignore[arg-type]
    except ForeignTarget as error:
        raise ForeignTarget(f"{path}: {error}") from None
    except Exception as error:  # a damaged file can raise anything at all
        raise ValueError(
            f"{path} is damaged, or of another version of sddlskd ({' '.join(str(error).split())})"
        ) from error
