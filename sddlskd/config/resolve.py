"""From a composed configuration to a typed, checked job, and from a frozen file back to it."""

import os
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from sddlskd.config.identity import digest, plain, run_name
from sddlskd.config.schema import (
    M_CURE,
    NO_TEACHER,
    CacheDtype,
    Config,
    DistillerConfig,
    OptimizerConfig,
    StudentConfig,
    TeacherConfig,
    TrainerConfig,
)
from sddlskd.config.targets import (
    ForeignTarget,
    check_names,
    refuse_interpolations,
    with_names_of_today,
)

__all__ = ["conf_folder", "frame", "load", "normalise", "resolve", "teacher_job", "to_yaml"]


# The name of the job that `resolve` is working on, so that `run_name` does not type it once more.
_RUN_NAME: ContextVar[str | None] = ContextVar("run_name", default=None)


TARGETS = (
    ("student", "model"),
    ("teacher", "model"),
    ("distiller", "loss"),
    ("dataset", "load"),
    ("optimizer", "algorithm"),
)
"""The keys of a job that name code by `_target_`."""


def conf_folder() -> Path:
    """Return the folder of YAML files that belongs to this code.

    A wheel carries it inside the package, a checkout has it beside the package. An environment that
    was installed from another checkout is not asked: its `conf/` may be of another revision.
    """
    package = Path(__file__).parents[1]
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


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
        f"{plain(name)[:60].strip('-')}-{digest([file, overrides])[:6]}"
        if overrides
        else plain(file)
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
    return normalise(config)


@cache
def _empty() -> DictConfig:
    typed: DictConfig = OmegaConf.structured(Config)
    return typed


def normalise(config: Config) -> Config:
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
    for group, name in TARGETS:
        part = getattr(config, group)
        setattr(part, name, with_names_of_today(getattr(part, name)))
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
    for group, name in TARGETS:
        key = f"{group}.{name}"
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
    normalise(job)
    job.run_dir = str(Path(config.home, "runs", run_name(job)))
    return job


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
