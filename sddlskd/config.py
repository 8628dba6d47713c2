"""The typed frame of a job: every key, its type, its default and its unit; what must hold between keys; its identity.

Defaults are stated here alone. The YAML files of conf/ state choices: what differs from the frame. No torch here, so
that `--help` and a launcher's planning stay fast.
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
_RUN_NAME: ContextVar[str | None] = ContextVar(
    "run_name", default=None
)  # of the job that is being resolved
M_CURE = "give distinct positive integers, such as M=[1,2,4]"


def _plumbing(default: Any) -> Any:
    """A key that says where or how, not what: it does not count in the job's identity (`config_hash`)."""
    return field(default=default, metadata={"identity": False})


def _later(default: Any) -> Any:
    """A key that jobs did not always have: it counts in the identity only where it is not its default, so that
    jobs from before keep their names."""
    return field(default=default, metadata={"later": True})


class Precision(StrEnum):
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Schedule(StrEnum):
    step = "step"  # x decay at each milestone
    cosine = "cosine"  # half a cosine down to zero
    constant = "constant"


class Knowledge(StrEnum):
    fusion = "fusion"
    consistent = "consistent"
    complementary = "complementary"


class Reduction(StrEnum):
    mean = "mean"
    sum = "sum"


class CacheDtype(StrEnum):
    float16 = "float16"  # half the disk; rounds values by at most 2^-11 of their size, or by 3e-8
    float32 = "float32"  # the same numbers as without a cache


class BadImages(StrEnum):
    fail = "fail"  # stop, naming the file
    skip = "skip"  # in training the next image stands in for it, in evaluation it is left out


class IrregularImages(StrEnum):
    convert = "convert"  # to RGB, as stored, like torchvision's ImageFolder
    skip = "skip"
    fail = "fail"


class Rerun(StrEnum):
    failed = "failed"  # and what is new or was interrupted
    all = "all"  # everything from the start; the old records are set aside
    none = "none"  # only what is new or was interrupted


class Progress(StrEnum):
    auto = "auto"  # live on a terminal, plain lines elsewhere
    plain = "plain"
    off = "off"


@dataclass
class StudentConfig:
    name: str = MISSING  # what the network is called in tables
    model: dict[str, Any] = field(
        default_factory=dict
    )  # _target_ and its arguments; num_classes is added
    lr: float = 0.05  # peak learning rate of its training by the papers' SGD; where nothing is said, dataset.lr


@dataclass
class TeacherConfig(StudentConfig):
    checkpoint: str | None = None  # file; null: <home>/teachers/<dataset>/<name>.pt
    cache: str | None = _plumbing(
        None
    )  # folder to keep its maps in, for this and later sweeps; null: none are kept
    cache_dtype: CacheDtype = CacheDtype.float16  # how they are kept
    train_if_missing: bool = _plumbing(False)  # train it first where the file is missing
    train_epochs: int = _plumbing(240)  # epochs of that training
    train_seed: int = _plumbing(0)  # seed of that training


@dataclass
class DistillerConfig:
    name: str = MISSING  # what the loss is called in tables
    loss: dict[str, Any] = field(
        default_factory=dict
    )  # _target_ and arguments of (s_NK, t_NK, y_N) -> (N,); {}: none
    temperature: float = 4.0  # divides the logits
    ce_weight: float = 1.0  # of cross-entropy with the labels
    kd_weight: float = 1.0  # of the distillation loss
    warmup_epochs: int = 1  # epochs over which kd_weight rises linearly; 1: at once
    knowledge: Knowledge = Knowledge.fusion  # which regions teach (SDD Table 6)
    reduction: Reduction = Reduction.mean  # over regions: mean as SDD's code, sum as its Eq. 9


@dataclass
class DatasetConfig:
    name: str = MISSING  # what the data set is called in tables
    load: dict[str, Any] = field(  # _target_ and arguments of () -> Splits
        default_factory=dict,
        metadata={
            "place": "root"
        },  # its argument `root`, where it is dataset.root, does not count in the identity
    )
    root: str = _plumbing("data")  # folder of the files
    num_classes: int = MISSING  # classes
    mean: list[float] = field(default_factory=list)  # of each channel, of pixels in 0..1
    std: list[float] = field(default_factory=list)  # of each channel, of pixels in 0..1
    padding: int = 4  # pixels of zero padding before the random crop; 0: no crop
    flip: bool = True  # mirror half of the images
    val_fraction: float = (
        0.0  # part of train held out as val; 0: val is the test split, as in the papers
    )
    # From here on to pixel_limit: of data sets of image files (sddlskd/streaming.py) alone.
    size: int = _later(224)  # pixels of the side of what the networks see
    crop_area: list[float] = field(  # least and largest part of an image that a random crop takes
        default_factory=lambda: [0.08, 1.0], metadata={"later": True}
    )
    centre: float = _later(
        0.875
    )  # side of the square that is tested on, as part of the shorter side; 1: all of it
    upright: bool = _later(
        False
    )  # turn images as their EXIF orientation says; false: as they are stored
    bad_images: BadImages = _later(BadImages.fail)  # files that cannot be read  # noqa: RUF009 (all it gives are fields)
    irregular_images: IrregularImages = _later(IrregularImages.convert)  # not upright RGB as stored  # noqa: RUF009
    pixel_limit: int = _later(
        100_000_000
    )  # pixels above which an image counts as bad, by its header
    workers: int | None = _plumbing(
        None
    )  # processes that decode images; 0: none beside the trainer; null: a core each
    epochs: int = 240  # what trainer.epochs and teacher.train_epochs are unless given
    batch_size: int = _plumbing(64)  # images; what trainer.batch_size is unless given
    lr: float | None = _plumbing(
        None
    )  # what student.lr and teacher.lr are unless given; null: CIFAR-100's
    weight_decay: float = _plumbing(5e-4)  # what that of the papers' SGD is unless given
    milestones: list[float] = field(  # what those of the papers' SGD are unless given
        default_factory=lambda: [0.625, 0.75, 0.875], metadata={"identity": False}
    )
    stem: str = _plumbing(
        "small"
    )  # of our CIFAR networks: small for images of 32 pixels, large for images of 224
    train_teachers: bool = _plumbing(False)  # what teacher.train_if_missing is unless given


@dataclass
class OptimizerConfig:
    name: str = MISSING
    algorithm: dict[str, Any] = field(
        default_factory=dict
    )  # _target_ and arguments, without params and lr
    lr: float = 0.05  # peak learning rate
    schedule: Schedule = Schedule.step  # how lr falls
    milestones: list[float] = field(
        default_factory=lambda: [0.625, 0.75, 0.875]
    )  # as parts of trainer.epochs
    decay: float = 0.1  # factor at each milestone
    warmup_epochs: float = 0.0  # epochs over which lr rises linearly from zero
    clip_norm: float | None = None  # largest gradient norm; null: no clipping


@dataclass
class TrainerConfig:
    epochs: int = 240  # passes over the training images
    batch_size: int = 64  # images
    eval_batch_size: int = 500  # images
    max_steps: int | None = None  # batches of an epoch, for trying things out; null: all
    data_seed: int | None = (
        None  # of batches and augmentation; null: seed. Jobs with one data_seed see the same batches
    )
    #                               and share the teacher: they then differ in initialisation only
    device: str = _plumbing("auto")  # auto, cpu, cuda, cuda:1, mps
    devices: int = _plumbing(1)  # processes (one a GPU) that share each batch
    timeout_s: float = _plumbing(
        600.0
    )  # seconds after which one of several processes gives up waiting for another
    precision: Precision = (
        Precision.fp32
    )  # of the networks' forward pass; losses are always float32
    compile: bool = False  # torch.compile the networks
    log_every: int = _plumbing(50)  # steps between looks at the loss
    progress: Progress = _plumbing(Progress.auto)  # noqa: RUF009 (it gives a dataclass field)


@dataclass
class CheckpointConfig:
    every_minutes: float = _plumbing(
        10.0
    )  # minutes between checkpoints inside an epoch; every epoch ends with one


@dataclass
class TrackingConfig:
    enabled: bool = _plumbing(True)  # mirror runs to MLflow
    uri: str | None = _plumbing(None)  # MLflow server or sqlite:////absolute/path
    experiment: str = _plumbing("sddlskd")  # MLflow experiment
    offline: bool = _plumbing(
        False
    )  # go on without MLflow where it does not answer; `sync` delivers later
    predictions: bool = _plumbing(
        False
    )  # keep logits, regions and features on the test split, for figures
    experiment_id: str | None = _plumbing(None)  # set by the launching process
    parent_run_id: str | None = _plumbing(None)  # set by the launching process: the sweep's run


@dataclass
class SweepConfig:
    name: str | None = _plumbing(None)  # tag `sweep` of every run; null: named from what is swept
    jobs: list[str] = field(
        default_factory=list, metadata={"identity": False}
    )  # jobs that are no product: the overrides
    #                               of each in a line, as "pair=vgg13_vgg8 scales=two"; crossed with what is swept
    plan: bool = _plumbing(False)  # print what the sweep would do, and do nothing
    rerun: Rerun = _plumbing(Rerun.failed)  # which jobs of an earlier start are run again  # noqa: RUF009


@dataclass
class Config:
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    distiller: DistillerConfig = field(default_factory=DistillerConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    M: list[int] = field(
        default_factory=lambda: [1]
    )  # scales: the logit maps are cut into m x m regions for each m
    standardize: bool = False  # z-score the logits of each region (LSKD)
    complementary_weight: float = 2.0  # weight of complementary regions (SDD's beta)
    seed: int = 0  # of the initialisation; of the batches too unless trainer.data_seed is given
    allow_foreign_targets: bool = _plumbing(
        False
    )  # whether _target_ may name code that is not of ours or torch's
    home: str = _plumbing(".")  # folder of data/, teachers/, runs/ and mlflow.db
    run_dir: str = _plumbing("")  # folder of this run's record


def frame() -> None:
    """Make the typed frame and the resolvers known to Hydra (once a process)."""
    Plugins.instance()  # finds launchers; one of hydra-submitit-launcher gives way to the file of conf/ of its name
    ConfigStore.instance().repo["hydra"]["launcher"].pop("submitit_local.yaml", None)
    ConfigStore.instance().store("frame", node=Config)
    OmegaConf.register_new_resolver("cwd", lambda: str(Path.cwd()), replace=True)
    OmegaConf.register_new_resolver("given", _given, replace=True)
    OmegaConf.register_new_resolver("run_name", _run_name_of_root, replace=True)
    OmegaConf.register_new_resolver("sweep_name", _sweep_name_of_root, replace=True)


def _given(*values: Any) -> Any:
    """The first value that is not null."""
    return next((value for value in values if value is not None), None)


def _run_name_of_root(*, _root_: DictConfig) -> str:
    return _RUN_NAME.get() or run_name(_typed(_root_))


def _sweep_name_of_root(*, _root_: DictConfig) -> str | None:
    """The name of the sweep's file, or what is swept: student-shufflev1-mobilev2-1f0c2a."""
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
    """The composed configuration as typed values: interpolations filled in, checked, paths absolute.

    Raises ValueError naming the value and what is valid, or OmegaConf's errors for types.
    """
    config = _typed(composed)
    if "run_dir" in composed.keys():  # noqa: SIM118 -- `in composed` would fill it in, by typing all of it once more
        known = _RUN_NAME.set(run_name(config))
        try:
            run_dir = composed["run_dir"]
        finally:
            _RUN_NAME.reset(known)
        refuse_interpolations(run_dir, "run_dir")
        if not isinstance(run_dir, str):
            run_dir = OmegaConf.merge(
                _empty(), {"run_dir": run_dir}
            ).run_dir  # a number as text; else its error
        config.run_dir = os.path.abspath(run_dir) if run_dir else ""
    return config


def _typed(composed: DictConfig) -> Config:
    """All but run_dir."""
    bare = OmegaConf.masked_copy(
        composed, [str(key) for key in composed if key not in ("hydra", "run_dir")]
    )
    plain = OmegaConf.to_container(
        bare, resolve=True
    )  # as plain values, so that a key added with + is refused too
    refuse_interpolations(plain, "")
    config = OmegaConf.to_object(OmegaConf.merge(_empty(), plain))
    assert isinstance(config, Config)
    return settle(config)


@cache
def _empty() -> DictConfig:
    typed: DictConfig = OmegaConf.structured(Config)
    return typed


def settle(config: Config) -> Config:
    """Bring typed values into the one form that a job has, in place: checked, paths absolute. Raises ValueError."""
    if not config.distiller.loss:
        _drop_what_needs_a_teacher(config)
    if config.teacher.cache is None:
        config.teacher.cache_dtype = (
            CacheDtype.float32
        )  # no rounding: the same job as one with such a cache
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
    """A student without a distillation loss is one job, whatever teacher, scales and weights stand beside it."""
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
            "tracking.uri holds a user name or password, which every run's record and MLflow would show; take it "
            "out of the address and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead"
        )
    M = config.M
    if not M or min(M) < 1 or len(set(M)) < len(M):
        raise ValueError(f"M={M} is not valid; {M_CURE}")
    if config.distiller.loss and not config.teacher.model:
        raise ValueError(
            f"distiller={config.distiller.name} needs a teacher; choose one with teacher=..., or distiller=vanilla"
        )
    for group, network in (("student", config.student), ("teacher", config.teacher)):
        ours = network.model.get("_target_") == "sddlskd.models.create"
        if config.dataset.name == "imagenet" and ours and network.name in ("resnet18", "resnet50"):
            raise ValueError(
                f"{group}={network.name} is CIFAR-100's network, whose file on imagenet is that of torchvision's "
                f"{network.name}; take {group}=imagenet_{network.name}, or another {group}.name"
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
            f"optimizer.milestones={config.optimizer.milestones} are parts of trainer.epochs, between 0 and 1: "
            "epoch 150 of 240 is 0.625"
        )
    if not config.dataset.centre <= 1:
        raise ValueError(
            f"dataset.centre={config.dataset.centre} is a part of an image's side, at most 1"
        )
    area = config.dataset.crop_area
    if len(area) != 2 or not 0 < area[0] <= area[1] <= 1:
        raise ValueError(
            f"dataset.crop_area={area} are two parts of an image, from 0 to 1: [0.08,1] are the usual ones"
        )
    if not 0 <= config.dataset.val_fraction < 1:
        raise ValueError(
            f"dataset.val_fraction={config.dataset.val_fraction} must be at least 0 and less than 1"
        )


def teacher_job(config: Config) -> Config:
    """The job that trains `config`'s teacher from scratch: the same whatever student asks for it."""
    job = Config(
        teacher=TeacherConfig(name=NO_TEACHER),
        student=StudentConfig(config.teacher.name, config.teacher.model, config.teacher.lr),
        distiller=DistillerConfig(name="vanilla", kd_weight=0.0),
        dataset=config.dataset,
        optimizer=OptimizerConfig(  # as conf/optimizer/sgd.yaml: it does not follow the students' settings
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
    """6 and 6.0 are one value, wherever a key's type leaves both open."""
    if isinstance(value, dict):
        return {key: _same_numbers(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_same_numbers(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def identity_keys() -> set[str]:
    """The dotted keys that count in `config_hash`."""

    def walk(node: Any, prefix: str) -> Iterator[str]:
        for f in fields(node):
            if f.metadata.get("identity", True):
                value = getattr(node, f.name, None)
                yield from (
                    walk(value, f"{prefix}{f.name}.") if is_dataclass(value) else [prefix + f.name]
                )

    return set(walk(Config(), ""))


def config_hash(config: Config) -> str:
    """Twelve hex digits that name what the job computes: equal for jobs that differ in paths, device or tracking."""
    return _digest(dict(_identity(config)))


def settings_hash(config: Config) -> str:
    """`config_hash` with the seed left out: equal for the repetitions that a mean is taken over."""
    return config_hash(replace(config, seed=0))


def canonical(value: Any) -> str:
    """Plain values as text: equal for equal values."""
    return json.dumps(value, sort_keys=True)


def _digest(value: Any) -> str:
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:12]


def data_seed(config: Config) -> int:
    """The seed of batches and augmentation."""
    return config.seed if config.trainer.data_seed is None else config.trainer.data_seed


def sharing_key(config: Config) -> str:
    """Equal for jobs that see the same batches and ask the same teacher: they can be trained side by side."""
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
    """A readable, unique folder name such as cifar100/resnet32x4-resnet8x4-kd-ls-M-1-2-4-s0-1f0c2a9be417."""
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
    """Free of characters that a shell reads: M=[1,2,4] becomes M-1-2-4."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-")


def flatten(config: Config) -> dict[str, Any]:
    """{"teacher.name": ..., "M": ..., ...}: one entry a key, lists and dicts of arguments as compact JSON."""

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
    """The frozen configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def load(path: Path, *, allow_foreign_targets: bool | None = None) -> Config:
    """Read a frozen configuration back, typed and checked. Raises ValueError naming a file that is damaged.

    allow_foreign_targets: instead of what the file says, where it may be a stranger's.
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
