"""Make a typed and checked job from a composed Hydra configuration, or from a file of a run.

A job is one training run. `resolve` takes what Hydra composed. `load` reads the configuration that
a run directory holds.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from sddlskd.config.checks import TARGETS, check, check_bounds, check_scales
from sddlskd.config.identity import digest, plain, run_name
from sddlskd.config.schema import (
    LR,
    NO_TEACHER,
    STANDARDIZE,
    CacheDtype,
    Combine,
    Config,
    DatasetConfig,
    DistillerConfig,
    FeatureConfig,
    OptimizerConfig,
    StudentConfig,
    TeacherConfig,
    TrainerConfig,
)
from sddlskd.config.targets import (
    ForeignTarget,
    refuse_interpolations,
    with_names_of_today,
)

__all__ = [
    "check_choices",
    "conf_folder",
    "default_run_dir",
    "each_teacher",
    "frame",
    "load",
    "normalise",
    "resolve",
    "sqlite_file",
    "sqlite_uri",
    "teacher_job",
    "teacher_keys",
    "teacher_weights",
    "to_yaml",
    "with_each_teacher",
]


SQLITE = "sqlite:///"  # beginning of the address of a SQLite file
LONGEST_SWEEP_NAME = 32  # characters of an automatic name, without its hash
NAMING = ("dataset", "recipe", "pair")  # groups whose choice is part of an automatic name


def conf_folder() -> Path:
    """Return the folder `conf`, which holds the YAML files of this package for Hydra.

    An installed wheel has the folder inside the package. A checkout has the folder beside the
    package; the function does not check that it exists there.
    """
    package = Path(__file__).parents[1]
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def frame() -> None:
    """Register the schema `Config` with Hydra, and the resolvers of conf/ with OmegaConf.

    Call this function before Hydra composes a configuration of conf/. Further calls in the same
    process are harmless.
    """
    # Plugins.instance() finds the launchers. The launcher `submitit_local` of
    # hydra-submitit-launcher is dropped in favour of conf/hydra/launcher/submitit_local.yaml.
    Plugins.instance()
    ConfigStore.instance().repo["hydra"]["launcher"].pop("submitit_local.yaml", None)
    ConfigStore.instance().store("frame", node=Config)
    OmegaConf.register_new_resolver("class_folders", _class_folders, replace=True)
    OmegaConf.register_new_resolver("cwd", lambda: str(Path.cwd()), replace=True)
    OmegaConf.register_new_resolver("default", _default, replace=True)
    OmegaConf.register_new_resolver("sqlite_uri", sqlite_uri, replace=True)
    OmegaConf.register_new_resolver("given", _given, replace=True)
    OmegaConf.register_new_resolver("sweep_name", _sweep_name_of_root, replace=True)


def sqlite_uri(path: str) -> str:
    """Return the address by which MLflow opens a SQLite file: "sqlite:///" followed by the path.

    A path is percent-encoded, slashes included, if it contains "?", a control character or text
    like "%41", because MLflow would not read such a path literally. Any other path stays as it is.
    """
    if re.search(r"[?\x00-\x1f\x7f]|%[0-9A-Fa-f]{2}", path):
        # Slashes are quoted as well: otherwise MLflow makes a folder that is named as the address.
        path = quote(path, safe="", errors="surrogateescape")
    return SQLITE + path


def sqlite_file(uri: str) -> Path | None:
    """Return the SQLite file that an MLflow address names; None for an address of another kind.

    Percent escapes such as "%3F" are decoded.
    """
    if not uri.startswith(SQLITE):
        return None
    return Path(unquote(uri.removeprefix(SQLITE), errors="surrogateescape"))


def _default(key: str) -> Any:
    """Return the schema's default for a dotted key, such as "student.lr"."""
    return OmegaConf.select(_empty(), key)


def _given(*values: Any) -> Any:
    """Return the first value that is not null, or None if all are null."""
    return next((value for value in values if value is not None), None)


def _class_folders(root: str) -> int:
    """Return the number of classes of an image folder: the folders in <root>/train.

    Folders whose names begin with "." do not count. The loader checks the number again, together
    with the images.
    """
    train = Path(root).expanduser().absolute() / "train"
    try:
        entries = [e for e in os.scandir(train) if not e.name.startswith(".")]
        classes = sum(e.is_dir() for e in entries)
    except OSError:
        if other := _image_folder_near(train.parent):
            level = "deep" if other in train.parents else "shallow"
            raise ValueError(
                f"dataset.root={train.parent} is too {level}: there is no folder {train}; "
                f"set dataset.root={other}"
            ) from None
        if not train.parent.is_dir():
            raise ValueError(
                f"dataset.root={train.parent} does not exist; give the folder that holds "
                "train/<class> and val/<class>, or set dataset.num_classes=NUMBER"
            ) from None
        raise ValueError(
            f"the classes of dataset=image_folder cannot be counted, because there is no folder "
            f"{train}; set dataset.root=FOLDER, which holds train/<class> and val/<class>, or set "
            "dataset.num_classes=NUMBER"
        ) from None
    if classes == 0:
        raise ValueError(
            f"{train} has no class folders (files directly in it: {len(entries)}); "
            "put the images of each class into a folder of its own, as in train/cat and train/dog"
        )
    if classes == 1:
        raise ValueError(
            f"{train} has a single class folder, {next(e.name for e in entries if e.is_dir())}; "
            "a classifier needs two or more"
        )
    return classes


def _image_folder_near(root: Path) -> Path | None:
    """Return the folder with train/ that lies up to two levels above or one below `root`.

    Return None if there is no such folder, or if several lie below.
    """
    above = [folder for folder in root.parents[:2] if (folder / "train").is_dir()]
    below = [train.parent for train in root.glob("*/train") if train.is_dir()]
    if above:
        return above[0]
    return below[0] if len(below) == 1 else None


def _sweep_name_of_root(*, _root_: DictConfig) -> str | None:
    """Return a name for the sweep, or None for a single run.

    The name consists of the sweep's configuration file, unless the file is the default `config`, of
    `_telling_words`, and of a hash of the file and the overrides that change what is computed. An
    example is digits-M-student-1f0c2a. Without such overrides the name is that of the file.
    """
    if "hydra" not in _root_ or _root_.hydra.mode is not RunMode.MULTIRUN:
        return None
    changing_no_result = (
        "tracking",
        "home=",
        "dataset.root=",
        "sweep.",
        "checkpoint.",
        "trainer.device=",
        "trainer.progress=",
    )
    overrides = sorted(
        text
        for text in _root_.hydra.overrides.task
        if not text.lstrip("+").startswith(changing_no_result)
    )
    file = str(_root_.hydra.job.config_name)
    if not overrides:
        return plain(file)
    words = _telling_words(overrides)
    if file != "config":
        words = [file, *words]
    name = plain("-".join(words))[:LONGEST_SWEEP_NAME].strip("-")
    return f"{name}-{digest([file, overrides])[:6]}"


def _telling_words(overrides: Sequence[str]) -> list[str]:
    """Return the words of a sweep's overrides that tell it from other sweeps.

    The words are the data set, recipe and pair, if the sweep has one of each, and the last part of
    each key that has several values. If there are no such words, they are those of all keys.
    """
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    keys = {override.key_or_group: override.is_sweep_override() for override in parsed}
    chosen = [
        str(override.value())
        for override in parsed
        if override.key_or_group in NAMING and not override.is_sweep_override()
    ]
    swept = [key.rpartition(".")[2] for key, several in keys.items() if several]
    return [*chosen, *swept] or [key.rpartition(".")[2] for key in keys]


def resolve(composed: DictConfig) -> Config:
    """Turn a configuration that Hydra composed into a typed and checked job (one training run).

    Interpolations are resolved, and an empty `run_dir` becomes <home>/runs/<name>
    (`default_run_dir`). The settings below `hydra` are left out. Values are changed as by
    `normalise`, so that equal jobs have equal values: for example, paths become absolute, and
    settings that the job does not use get fixed values.

    Raises:
        ValueError: If a value is not valid, or if a `_target_` names code that is not allowed. The
            message names the value and says what is valid.
        OmegaConfBaseException: If the configuration does not fit `Config`: a key is unknown, a
            required value is missing, a value has the wrong type, an interpolation fails, or any
            other problem of OmegaConf.
    """
    config = _typed(composed)
    if not config.run_dir:
        config.run_dir = default_run_dir(config)
    return config


def with_each_teacher(overrides: Sequence[str]) -> list[str]:
    """Return overrides with a list of teachers spelled as Hydra's package overrides.

    Hydra would merge the settings of the teachers in a list. "teacher=[a,b]" therefore becomes
    "teacher=a" and "+teacher@more_teachers.b=b". Other overrides stay as they are.

    Raise ValueError if a list names a teacher twice, or if an override takes the teacher away.
    """
    words: list[str] = []
    for text in overrides:
        if re.fullmatch(r"~teacher(=.*)?|teacher=(null|none|\[ *\]|''|\"\")?", text, re.IGNORECASE):
            raise ValueError(
                f"{text}: distillation needs a teacher; choose one with teacher=..., or leave it "
                "out: recipe=vanilla trains a student alone"
            )
        chosen = re.fullmatch(r"teacher=\[([^\[\]]*)\]", text)
        if not chosen:
            words.append(text)
            continue
        first, *others = (name.strip() for name in chosen[1].split(","))
        if len({first, *others}) < 1 + len(others):
            raise ValueError(
                f"{text} names a teacher twice; give the second one a name and a file of its own: "
                f"teacher={first} +teacher@more_teachers.second={first} "
                "more_teachers.second.checkpoint=FILE"
            )
        words.append(f"teacher={first}")
        words += [f"+teacher@more_teachers.{name}={name}" for name in others]
    return words


def check_choices(overrides: Sequence[str]) -> None:
    """Raise ValueError if an override lists a feature method twice, such as "features=[crd,crd]".

    `overrides` are the Hydra overrides of one job. Overrides of other keys always pass.
    """
    for text in overrides:
        chosen = re.fullmatch(r"\+*features=\[(.*)\]", text)
        names = [name.strip() for name in chosen[1].split(",")] if chosen else []
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"{text} names {min(twice)} twice; name each method once")


def default_run_dir(config: Config) -> str:
    """Return the path of the run directory of a job that sets no `run_dir`.

    The path is <home>/runs/<name>, with the name from `run_name`.
    """
    return os.path.join(config.home, "runs", run_name(config))


def _typed(composed: DictConfig, *, frozen: bool = False) -> Config:
    job = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
    # Plain values, so that the merge also refuses a key added with `+`.
    values = OmegaConf.to_container(job, resolve=True)
    refuse_interpolations(values, "")
    _check_packages(values)
    config = OmegaConf.to_object(OmegaConf.merge(_empty(), values))
    assert isinstance(config, Config)
    return normalise(config, frozen=frozen)


def _check_packages(values: Any) -> None:
    """Raise ValueError if settings of a feature method stand directly below `features`.

    A YAML file of the group `features` puts them there if its `# @package` line is missing.
    """
    features = values.get("features")
    names = [f.name for f in fields(FeatureConfig)]
    if isinstance(features, dict) and (lost := [name for name in names if name in features]):
        raise ValueError(
            f"features.{lost[0]} belongs to no method; the first line of the file of features=... "
            "must be `# @package features.NAME`, NAME being the name of the method in tables"
        )


@cache
def _empty() -> DictConfig:
    typed: DictConfig = OmegaConf.structured(Config)
    return typed


def normalise(config: Config, *, frozen: bool = False) -> Config:
    """Check the values of a job and change them in place, so that equal jobs have equal values.

    Paths become absolute. Settings that the job does not use get fixed values. Feature methods are
    sorted by name. A `_target_` that has moved gets its present name.

    Args:
        config: The job, which may be changed even if an error is raised.
        frozen: Whether the values come from a run directory. Older versions of this package allowed
            more numbers, so the wider bounds of `Bounds.in_a_record` hold.

    Returns:
        The same object `config`.

    Raises:
        ValueError: If a value is not valid, or if the job needs a teacher and has none.
        ForeignTarget: If a `_target_` is outside of `PACKAGES` (this package, torch, torchvision,
            timm) and `allow_foreign_targets` is false. The error is a ValueError.
    """
    if not config.distiller.loss:
        # Values that the job does not use must be valid, too. Check them before they are reset.
        check_bounds(config, "", frozen=frozen)
        check_scales(config.M)
        _drop_what_needs_a_logit_loss(config)
    if not config.more_teachers:
        config.teacher.combine = Combine.logits  # has no effect with a single teacher
    if config.teacher.cache is None or config.features:
        # A float32 cache does not round, so a job with such a cache equals a job without a cache.
        # Jobs with features do not read the cache.
        config.teacher.cache_dtype = CacheDtype.float32
    if config.teacher.cache is not None:
        config.teacher.cache = os.path.abspath(config.teacher.cache)
    if config.standardize not in {*STANDARDIZE, True, False}:
        raise ValueError(
            f"standardize={config.standardize} is not valid; give {', '.join(STANDARDIZE)}, "
            "true (the same as class) or false"
        )
    config.standardize = STANDARDIZE.get(str(config.standardize), config.standardize)
    for group, name in TARGETS:
        part = getattr(config, group)
        setattr(part, name, with_names_of_today(getattr(part, name)))
    for one in config.more_teachers.values():
        one.model = with_names_of_today(one.model)
        if one.checkpoint:
            one.checkpoint = os.path.abspath(one.checkpoint)
    # The order in which the methods are named changes nothing.
    config.features = dict(sorted(config.features.items()))
    for feature in config.features.values():
        feature.method = with_names_of_today(feature.method)
    check(config, frozen=frozen)
    if len(set(config.teacher.weights)) == 1:
        config.teacher.weights = []  # equal weights, which are the default
    config.home = os.path.abspath(config.home)
    database = sqlite_file(config.tracking.uri or "")
    if database:
        config.tracking.uri = sqlite_uri(os.path.abspath(database))
    root = os.path.abspath(config.dataset.root)
    if config.dataset.load.get("root") == config.dataset.root:
        config.dataset.load = {**config.dataset.load, "root": root}
    config.dataset.root = root
    if config.run_dir:
        config.run_dir = os.path.abspath(config.run_dir)
    if config.teacher.checkpoint:
        config.teacher.checkpoint = os.path.abspath(config.teacher.checkpoint)
    return config


def _drop_what_needs_a_logit_loss(config: Config) -> None:
    """Reset, in place, all settings that matter only with a logit loss.

    The teacher is reset as well if the job has no feature method. A student that is trained without
    distillation is then the same job for every teacher, scale and weight.
    """
    default = Config()
    if not config.has_teacher:
        config.teacher = TeacherConfig(name=NO_TEACHER)
        config.more_teachers = {}
    config.distiller = DistillerConfig(
        name=config.distiller.name, ce_weight=config.distiller.ce_weight, kd_weight=0.0
    )
    config.M = default.M
    config.standardize = default.standardize
    config.complementary_weight = default.complementary_weight
    if config.recipe != "vanilla" and not config.has_teacher:
        config.recipe = default.recipe


def each_teacher(config: Config) -> list[Config]:
    """Return one copy of a job for each of its teachers; the copy has this teacher alone.

    The teacher `config.teacher` comes first, then those of `config.more_teachers`. The copy for one
    of `config.more_teachers` has the name, network, weights file, learning rate and image size of
    that teacher; a missing learning rate becomes `config.dataset.lr` or, if that is missing, `LR`.
    In every copy, `teacher.combine` is `Combine.logits`, and `teacher.weights` and `more_teachers`
    are empty. The cache and all other settings are those of `config`. Return [] for a job without a
    teacher.
    """
    if not config.has_teacher:
        return []
    alone = replace(config.teacher, combine=Combine.logits, weights=[])
    teachers = [alone]
    for one in config.more_teachers.values():
        rate = one.lr or config.dataset.lr or LR
        teachers.append(
            replace(
                alone,
                name=one.name,
                model=one.model,
                checkpoint=one.checkpoint,
                lr=rate,
                image_size=one.image_size,
            )
        )
    return [replace(config, teacher=teacher, more_teachers={}) for teacher in teachers]


def teacher_keys(config: Config) -> list[str]:
    """Return the configuration key of each teacher of a job, in the order of `each_teacher`.

    The key is "teacher" for the first one, and "more_teachers.NAME" for a further one.
    """
    if not config.has_teacher:
        return []
    return ["teacher", *(f"more_teachers.{name}" for name in config.more_teachers)]


def teacher_weights(config: Config) -> list[float]:
    """Return the weight of each teacher of a job, in the order of `each_teacher`.

    The weights are `config.teacher.weights`. If that list is empty, all are equal, with the sum 1.
    """
    count = 1 + len(config.more_teachers)
    return config.teacher.weights or [1 / count] * count


def teacher_job(config: Config) -> Config:
    """Return the job that trains the teacher of `config` from scratch, without distillation.

    `config` has a single teacher, see `each_teacher`. Network, epochs, learning rate and seed are
    those of `config.teacher`. The data set is that of `config`, but with one view per image and
    with `train_fraction` 1: the teacher learns from all images that are not held out. Batch size,
    weight decay and milestones are the defaults of the data set, and the optimizer is SGD. Of
    `config.trainer`, only the device, the number of processes, the time-out, `log_every`, the
    display and `capture` are taken. The run directory is that of `default_run_dir`.

    Raise ValueError if a value of the new job is not valid.
    """
    job = Config(
        teacher=TeacherConfig(name=NO_TEACHER),
        student=StudentConfig(config.teacher.name, config.teacher.model, config.teacher.lr),
        distiller=DistillerConfig(name="vanilla", kd_weight=0.0),
        dataset=replace(
            config.dataset, views=DatasetConfig.views, train_fraction=1.0, unlabelled=False
        ),
        # As in conf/optimizer/sgd.yaml, so that the students' optimizer does not matter.
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
            capture=config.trainer.capture,
        ),
        tracking=config.tracking,
        seed=config.teacher.train_seed,
        allow_foreign_targets=config.allow_foreign_targets,
        home=config.home,
    )
    normalise(job)
    job.run_dir = default_run_dir(job)
    return job


def to_yaml(config: Config) -> str:
    """Return a job as the YAML text of its file in the run directory, which `load` reads."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def load(path: Path, *, allow_foreign_targets: bool | None = None) -> Config:
    """Return the typed and checked job that a YAML file of a run directory holds.

    Args:
        path: The YAML file, with the text of `to_yaml`.
        allow_foreign_targets: Value that replaces the one in the file, because the file may come
            from a stranger. None keeps the value in the file.

    Returns:
        The job, with absolute paths.

    Raises:
        FileNotFoundError: If the file does not exist.
        ForeignTarget: If a `_target_` in the file is outside of `PACKAGES` (this package, torch,
            torchvision, timm) and is not allowed. The error is a ValueError.
        ValueError: If the file cannot be used: it is damaged, does not fit this version of the
            package, or any other problem. The message names the file.
    """
    try:
        frozen = OmegaConf.load(path)
        refuse_interpolations(OmegaConf.to_container(frozen, resolve=False), "")
        job = OmegaConf.merge(_empty(), frozen)
        if allow_foreign_targets is not None:
            job.allow_foreign_targets = allow_foreign_targets
        return _typed(job, frozen=True)  # type: ignore[arg-type]
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path.parent} is not a run directory: it has no {path.name}"
        ) from None
    except ForeignTarget as error:
        raise ForeignTarget(f"{path}: {error}") from None
    except Exception as error:  # a damaged file can raise anything at all
        raise ValueError(
            f"{path} is damaged, or of another version of sddlskd ({' '.join(str(error).split())})"
        ) from error
