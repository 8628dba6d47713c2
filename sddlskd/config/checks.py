"""Check that the settings of a job (one training run) are valid, each alone and together.

The checks need no data, no network and no device; `training/checks.py` has those that do.
"""

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any
from urllib.parse import urlsplit

from sddlskd.config.identity import has_published_name
from sddlskd.config.schema import (
    ARGUMENT,
    ARGUMENTS,
    LAUNCHER,
    M_CURE,
    OBJECTIVES,
    Bounds,
    Combine,
    Config,
    MoreTeacherConfig,
    Precision,
    StudentConfig,
    TeacherView,
)
from sddlskd.config.targets import check_names

__all__ = ["TARGETS", "check", "check_bounds", "check_launcher", "check_scales"]

LONGEST_SHOWN = 60  # characters of a value that a message shows
TARGETS = (
    ("student", "model"),
    ("teacher", "model"),
    ("distiller", "loss"),
    ("distiller", "learned_temperature"),
    ("dataset", "load"),
    ("optimizer", "algorithm"),
)
"""The keys of a job that name code by `_target_`."""
RESERVED = ("ce", "kd", "temperature")
"""Names that no method of `features` may have: metrics and checkpoints use them."""
DOT_TARGET = "sddlskd.training.dot.DOT"


def check_launcher(options: Mapping[str, Any]) -> None:
    """Raise ValueError if a number in the options of a Hydra launcher is out of its bounds.

    `options` is the mapping hydra.launcher. Only the options that `LAUNCHER` lists are checked. An
    option that is missing or no number passes.
    """
    for name, bounds in LAUNCHER.items():
        _check_number(options.get(name), f"hydra.launcher.{name}", bounds)


def check(config: Config, *, frozen: bool) -> None:
    """Raise ValueError for the first value that is not valid; the message says how to correct it.

    `frozen` says whether the configuration is that of a run directory, see `normalise`.
    """
    for group, name in TARGETS:
        key = f"{group}.{name}"
        check_names(getattr(getattr(config, group), name), key, config.allow_foreign_targets)
    for name, feature in config.features.items():
        key = f"features.{name}"
        if name in RESERVED:
            raise ValueError(
                f"{key} has the name of another loss, train/loss_{name}; give it another name"
            )
        if not feature.method.get("_target_"):
            raise ValueError(f"{key}.method has no _target_; choose a method with features={name}")
        check_names(feature.method, f"{key}.method", config.allow_foreign_targets)
        if not frozen:
            _refuse_published_name(name, feature.method, key)
        check_bounds(feature, f"{key}.", frozen=frozen)
        _check_arguments(feature.method, f"{key}.method", frozen=frozen)
    if not frozen:
        name = config.distiller.name
        _refuse_published_name(name, config.distiller.loss, f"distiller.name={name}")
    for name, teacher in config.more_teachers.items():
        key = f"more_teachers.{name}"
        if not teacher.model:
            raise ValueError(f"{key} has no network; add one with +teacher@{key}=CHOICE")
        check_names(teacher.model, f"{key}.model", config.allow_foreign_targets)
        check_bounds(teacher, f"{key}.", frozen=frozen)
        _check_arguments(teacher.model, f"{key}.model", frozen=frozen)
    if not config.home:
        raise ValueError("home is empty; name a folder, such as home=.")
    _check_home(config.home)
    if not frozen:
        _check_sweep_name(config.sweep.name)
    _check_address(config.tracking.uri)
    check_scales(config.M)
    _check_networks(config)
    # Check the data set first, because other groups take their defaults from the data set.
    check_bounds(config.dataset, "dataset.", frozen=frozen)
    check_bounds(config, "", frozen=frozen)
    for group, name in TARGETS:
        _check_arguments(getattr(getattr(config, group), name), f"{group}.{name}", frozen=frozen)
    _check_fractions(config)
    _check_teachers(config)
    _check_dot(config)
    _check_search(config)
    _check_multi_label(config)
    _check_unlabelled(config)
    if config.standardize == "batch" and config.trainer.devices > 1:
        raise ValueError(
            f"trainer.devices={config.trainer.devices} cannot train standardize=batch: it reads "
            "all images of a batch; set trainer.devices=1"
        )
    if config.distiller.learned_temperature and config.trainer.devices > 1:
        raise ValueError(
            f"trainer.devices={config.trainer.devices} would learn a temperature in each process; "
            "set trainer.devices=1"
        )


def unknown_objective(objective: str, valid: Sequence[str]) -> str:
    """Return the message that no run logs an objective, with what to type and what runs log.

    The advice is the first of the `valid` objectives with the metric of `objective`, as best/top1
    for val/top1, or else the first one of all.
    """
    metric = objective.rpartition("/")[2]
    nearest = next((name for name in valid if name.rpartition("/")[2] == metric), valid[0])
    return (
        f"objective={objective} is logged by no run; give objective={nearest}; "
        f"runs log {', '.join(valid)}"
    )


def _check_search(config: Config) -> None:
    """Raise ValueError if no run logs the objective, or if the epochs of halving are not valid."""
    if config.objective not in OBJECTIVES:
        valid = [name for name in OBJECTIVES if config.dataset.multi_label or "mAP" not in name]
        if not config.dataset.val_fraction:
            valid = [name for name in valid if not name.startswith("test/")]
        raise ValueError(unknown_objective(config.objective, valid))
    moment, _, metric = config.objective.partition("/")
    if metric == "mAP" and not config.dataset.multi_label:
        raise ValueError(
            f"objective={config.objective} is logged only with dataset.multi_label=true; give "
            f"objective={moment}/top1"
        )
    if moment == "test" and not config.dataset.val_fraction:
        raise ValueError(
            f"objective={config.objective} is logged only with held-out images; set "
            f"dataset.val_fraction=0.1, or give objective=last/{metric}"
        )
    epochs = config.sweep.halving
    if epochs and (epochs != sorted(set(epochs)) or epochs[-1] >= config.trainer.epochs):
        raise ValueError(
            f"sweep.halving={_shorten(epochs)} is not valid; give increasing epochs before the "
            f"last one (trainer.epochs={config.trainer.epochs}), such as [1,2,4] of 8"
        )


def _check_teachers(config: Config) -> None:
    """Raise ValueError if a job cannot learn from its teachers together, or not so weighted."""
    weights, names = config.teacher.weights, [config.teacher.name, *config.more_teachers]
    if weights and len(weights) != len(names):
        raise ValueError(
            f"teacher.weights={weights} does not have one weight for each of "
            f"teacher=[{','.join(names)}]; give {len(names)} of them"
        )
    if weights and not math.isclose(sum(weights), 1, abs_tol=1e-6):
        raise ValueError(
            f"teacher.weights={weights} has the sum {sum(weights):.6g}; give weights whose sum is 1"
        )
    if config.teacher.view == TeacherView.plain and config.features:
        raise ValueError(
            f"features=[{','.join(config.features)}] compares what both networks show of one "
            "image, but teacher.view=plain shows them two; set teacher.view=augmented, or "
            "features=[]"
        )
    if not config.more_teachers:
        return
    if weights and config.teacher.combine == Combine.confidence:
        raise ValueError(
            f"teacher.weights={weights} would not be used: teacher.combine=confidence computes "
            "weights for each image; leave teacher.weights out"
        )
    if config.features:
        raise ValueError(
            f"features=[{','.join(config.features)}] compares the student with one teacher, not "
            f"with teacher=[{','.join(names)}]; choose one teacher, or features=[]"
        )
    files = {(one.name, one.checkpoint) for one in config.more_teachers.values()}
    files.add((config.teacher.name, config.teacher.checkpoint))
    if len(set(names)) < len(names) or len(files) < len(names):
        raise ValueError(
            f"teacher=[{','.join(names)}] has the same network and file twice; give the second one "
            "a name and a file of its own: +teacher@more_teachers.second=CHOICE "
            "more_teachers.second.checkpoint=FILE"
        )


def _check_dot(config: Config) -> None:
    """Raise ValueError if recipe=dot lacks the optimizer DOT, or if a setting rules DOT out."""
    is_dot = config.optimizer.algorithm.get("_target_") == DOT_TARGET
    if config.recipe == "dot" and not is_dot:
        raise ValueError(
            f"recipe=dot needs optimizer=dot, not optimizer={config.optimizer.name}; take "
            "another recipe, such as recipe=kd, to train with another optimizer"
        )
    if not is_dot:
        return
    reason = "optimizer=dot takes two backward passes a step"
    if config.optimizer.clip_norm is not None:
        raise ValueError(
            f"optimizer.clip_norm={config.optimizer.clip_norm} does not say which of two gradients "
            f"to clip: {reason}; set optimizer.clip_norm=null"
        )
    if config.trainer.precision == Precision.fp16:
        raise ValueError(
            f"trainer.precision=fp16 scales one loss, but {reason}; set trainer.precision=bf16"
        )
    if config.trainer.devices > 1:
        raise ValueError(
            f"trainer.devices={config.trainer.devices} averages one gradient over the processes, "
            f"but {reason}; set trainer.devices=1"
        )


def _check_multi_label(config: Config) -> None:
    """Raise ValueError for a setting that has no meaning for images with several labels."""
    if not config.dataset.multi_label:
        return
    on = "dataset.multi_label=true"
    if config.features:
        raise ValueError(
            f"features=[{','.join(config.features)}] cannot be trained with {on}: feature methods "
            "are tested with one class per image alone; set features=[]"
        )
    if config.trainer.devices > 1:
        raise ValueError(
            f"trainer.devices={config.trainer.devices} cannot measure val/mAP, which {on} asks "
            "for: val/mAP ranks all images; set trainer.devices=1"
        )
    if config.tracking.predictions:
        raise ValueError(
            f"tracking.predictions=true keeps one class per image, but {on}; set "
            "tracking.predictions=false"
        )
    if config.teacher.combine == Combine.confidence:
        raise ValueError(
            f"teacher.combine=confidence weighs teachers by the class of each image, but {on}; set "
            "teacher.combine=logits"
        )
    if not config.distiller.loss:
        return
    if config.standardize is not False:
        raise ValueError(
            f"standardize={config.standardize} moves the zero of the logits, but with {on} a class "
            "is predicted if its logit is above zero; set standardize=false, as recipe=mld does"
        )
    if config.distiller.knowledge != "fusion":
        raise ValueError(
            f"distiller.knowledge={config.distiller.knowledge} needs one class per image, but "
            f"{on}; set distiller.knowledge=fusion"
        )
    if config.M != [1] and config.complementary_weight != 1:
        raise ValueError(
            f"complementary_weight={config.complementary_weight:g} needs one class per image, but "
            f"{on}: no region is complementary; set complementary_weight=1"
        )


def _check_unlabelled(config: Config) -> None:
    """Raise ValueError if a job cannot learn from images without their labels."""
    if not config.dataset.unlabelled:
        return
    on = "dataset.unlabelled=true"
    if config.dataset.train_fraction == 1:
        raise ValueError(
            f"{on} has no images without labels, as dataset.train_fraction=1; set "
            "dataset.train_fraction=0.1 to keep the labels of a tenth"
        )
    if not config.has_teacher:
        raise ValueError(
            f"distiller={config.distiller.name} learns from labels alone, but {on}; choose "
            "another distiller, such as distiller=kd, or set dataset.unlabelled=false"
        )
    if config.dataset.multi_label:
        raise ValueError(
            f"{on} takes the class that the teacher predicts as label, but "
            "dataset.multi_label=true; set dataset.unlabelled=false"
        )
    if config.features:
        raise ValueError(
            f"features=[{','.join(config.features)}] cannot be trained with {on}: feature methods "
            "may read the labels of all images; set features=[]"
        )
    if config.more_teachers:
        raise ValueError(
            f"teacher=[{','.join([config.teacher.name, *config.more_teachers])}] may predict "
            f"several classes for an image without label, but {on}; choose one teacher"
        )
    if config.trainer.devices > 1:
        raise ValueError(
            f"trainer.devices={config.trainer.devices} would weigh labels by process, not by "
            f"image, with {on}; set trainer.devices=1"
        )


def _check_home(home: str) -> None:
    """Raise ValueError if the path of the home folder is not UTF-8."""
    path = os.path.abspath(home)
    if any("\ud800" <= character <= "\udfff" for character in path):
        raise ValueError(f"home={path!a} has a name that is not UTF-8; rename the folder")


def _check_sweep_name(name: str | None) -> None:
    """Raise ValueError unless a sweep's name is None, or names a folder and a tag of MLflow."""
    if name is None or (re.fullmatch(r"[^/'\"]+", name) and name not in (".", "..")):
        return
    raise ValueError(
        f"sweep.name={name} cannot name a folder of runs/sweeps; give a name without slashes and "
        "quotes, such as sweep.name=mine"
    )


def _check_address(uri: str | None) -> None:
    if "@" in urlsplit(uri or "").netloc:
        raise ValueError(
            "tracking.uri holds a user name or password, which every run's record and MLflow "
            "would show; take it out of the address and set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD instead"
        )
    if (uri or "").startswith("sqlite:") and "?" in str(uri):
        raise ValueError(
            f"tracking.uri={uri} holds a '?', after which MLflow reads options; "
            "if the '?' belongs to the file's path, write %3F in its place"
        )


def check_scales(M: list[int]) -> None:
    """Raise ValueError unless the scales `M` are different integers of at least 1."""
    # OmegaConf accepts a nested list as an element.
    if not all(isinstance(m, int) for m in M) or not M or min(M) < 1 or len(set(M)) < len(M):
        raise ValueError(f"M={_shorten(M)} is not valid; {M_CURE}")


def _check_networks(config: Config) -> None:
    """Raise ValueError if a needed teacher is missing, or if a name stands for two networks.

    On imagenet, resnet18 and resnet50 of this package are networks for CIFAR-100, but they have the
    names of torchvision's networks.
    """
    if config.has_teacher and not config.teacher.model:
        needing, other = f"distiller={config.distiller.name}", "distiller=vanilla"
        if config.features:
            needing, other = f"features=[{','.join(config.features)}]", "recipe=vanilla"
        raise ValueError(f"{needing} needs a teacher; choose one with teacher=..., or {other}")
    networks: dict[str, StudentConfig | MoreTeacherConfig] = {
        "student": config.student,
        "teacher": config.teacher,
        **{f"more_teachers.{name}": one for name, one in config.more_teachers.items()},
    }
    for group, network in networks.items():
        ours = network.model.get("_target_") == "sddlskd.models.create"
        if config.dataset.name == "imagenet" and ours and network.name in ("resnet18", "resnet50"):
            raise ValueError(
                f"{group}={network.name} is the network for CIFAR-100, but on imagenet its file "
                f"has the same name as that of torchvision's {network.name}; use "
                f"{group}=imagenet_{network.name}, or set another {group}.name"
            )


def _refuse_published_name(name: str, target: Mapping[str, Any], key: str) -> None:
    """Raise ValueError if code of the user has the name of a published method in tables."""
    code = str(target.get("_target_", "sddlskd."))
    if not code.startswith("sddlskd.") and has_published_name(name):
        raise ValueError(
            f"{key} gives {code} the name of another method, and tables would mix the two; "
            "choose another name"
        )


def check_bounds(node: Any, prefix: str, *, frozen: bool) -> None:
    """Raise ValueError for the first number that is outside of the bounds of its field.

    Nested dataclasses are checked, too. Each element of a list must be a number in the bounds of
    the list's field.

    Args:
        node: A dataclass of the schema.
        prefix: Text before the names of the fields in a dotted key, such as "dataset.".
        frozen: Whether the configuration is that of a run directory, see `normalise`.
    """
    for f in fields(node):
        key, value = f"{prefix}{f.name}", getattr(node, f.name)
        if is_dataclass(value):
            check_bounds(value, f"{key}.", frozen=frozen)
        elif bounds := f.metadata.get("bounds"):
            # OmegaConf accepts a nested list as an element.
            if isinstance(value, list) and not all(isinstance(n, int | float) for n in value):
                raise ValueError(f"{key}={_shorten(value)} is not a list of numbers")
            _check_number(value, key, bounds, frozen=frozen)


def _check_arguments(node: Any, key: str, *, frozen: bool) -> None:
    """Raise ValueError for the first number out of bounds among the arguments of a `_target_`.

    Args:
        node: The arguments, or one of their values.
        key: Dotted key of `node`.
        frozen: Whether the configuration is that of a run directory, see `normalise`.
    """
    if isinstance(node, dict):
        for name, value in node.items():
            _check_arguments(value, f"{key}.{name}", frozen=frozen)
    elif isinstance(node, list) and any(isinstance(value, dict | list) for value in node):
        for index, value in enumerate(node):
            _check_arguments(value, f"{key}[{index}]", frozen=frozen)
    elif not isinstance(node, bool):
        _check_number(node, key, ARGUMENTS.get(key, ARGUMENT), frozen=frozen)


def _check_number(value: Any, key: str, bounds: Bounds, *, frozen: bool = False) -> None:
    """Raise ValueError if `value`, or a number in the list `value`, is out of bounds.

    Any other `value` passes. `frozen` is the argument of `normalise`.
    """
    if frozen:
        bounds = bounds.in_a_record()
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, int | float) and (fault := bounds.fault(number)):
            raise ValueError(f"{key}={_shorten(value)} {fault}")


def _shorten(value: Any) -> str:
    """Return `value` as text for a message, cut after `LONGEST_SHOWN` characters."""
    text = str(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def _check_fractions(config: Config) -> None:
    for group in ("dataset", "optimizer"):
        milestones = getattr(config, group).milestones
        if any(not 0 < part <= 1 for part in milestones):
            raise ValueError(
                f"{group}.milestones={milestones} is not valid; give fractions of trainer.epochs, "
                "above 0 and at most 1: epoch 150 of 240 is 0.625"
            )
    area = config.dataset.crop_area
    if len(area) != 2 or not 0 < area[0] <= area[1] <= 1:
        raise ValueError(
            f"dataset.crop_area={area} is not valid; give the least and the largest fraction of "
            "the image area, above 0 and at most 1, such as [0.08,1]"
        )
