"""Test the configuration: its choices, their values in the papers, and the identity of a job.

Every choice must compose and build. Every recipe, pair and data set must have the values of its
source.
"""

import ast
import csv
import importlib
import inspect
import os
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
import yaml
from hydra_plugins.shared_teacher import SharedTeacherConfig
from hydra_plugins.slurm import SlurmConfig
from omegaconf import DictConfig, OmegaConf

import sddlskd
from sddlskd import config as cfg
from sddlskd import datasets, distill
from sddlskd.config import Config, schema
from sddlskd.config.targets import instantiate
from sddlskd.data.decoding import ImageTransform
from sddlskd.distill import ScaleDecoupled
from sddlskd.models import names
from sddlskd.terminal.console import explain
from tests.composing import loader_of
from tests.conftest import Compose, compose_in
from tests.each import check_each
from tests.tiny import CONF

REFERENCE = Path(__file__).parent / "reference"
GROUPS = (
    "teacher",
    "student",
    "distiller",
    "scales",
    "dataset",
    "optimizer",
    "trainer",
    "pair",
    "recipe",
    "tracking",
)


# Choices of student and teacher that take the network's name as an argument
LIBRARIES = {"timm", "torchvision"}
# Networks for images of 224 pixels
IMAGENET = {"imagenet_resnet18", "imagenet_resnet34", "imagenet_resnet50", "mobilev1"}
VITS = {"deit_tiny", "pit_tiny"}
# Values that a choice requires from its user
UNSAID = {
    "dataset=image_folder": ("dataset.num_classes=37",),
    # The losses of one class per image are refused.
    "dataset=fake_label_sets": ("recipe=mld",),
    "dataset=label_sets": ("dataset.num_classes=20", "recipe=mld"),
}


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def reference(name: str) -> list[dict[str, str]]:
    with open(REFERENCE / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


@cache
def job_of(*overrides: str) -> Config:
    """Return a composed job, which no test may change.

    The job is cached, because composing takes a quarter of a second.
    """
    return compose_in(Path("/home/of/tests"), *overrides)


# {recipe: weights of the method, the cross-entropy and the loss of the logits}. Sources: methods.md
# (mdistiller's and MLKD's files), RepDistiller's README (CC, FT, AB, FSP), the README of SemCKD,
# SimKD and CAT-KD, MGD's file for ImageNet; SDD's appendix for its sums.
OF_METHODS = {
    "ab": (1.0, 1.0, 0.0),
    "at": (1000.0, 1.0, 0.0),
    "cat_kd": (400.0, 1.0, 0.0),
    "cc": (0.02, 1.0, 0.0),
    "crd": (0.8, 1.0, 0.0),
    "fitnet": (100.0, 1.0, 0.0),
    "fsp": (1.0, 1.0, 0.0),
    "ft": (200.0, 1.0, 0.0),
    "kdsvd": (1.0, 1.0, 0.0),
    "mgd": (7e-5, 1.0, 0.0),
    "mlkd": (1.0, 0.1, 0.0),
    "mlkd_ls": (1.0, 0.1, 0.0),
    "nst": (50.0, 1.0, 0.0),
    "ofd": (0.001, 1.0, 0.0),
    "pkt": (30000.0, 1.0, 0.0),
    "reviewkd": (5.0, 1.0, 0.0),
    "rkd": (1.0, 1.0, 0.0),
    "sd_kd_crd": (0.8, 0.1, 0.9),
    "sd_kd_sp": (3000.0, 0.1, 0.9),
    "sd_sp": (3000.0, 1.0, 0.0),
    "semckd": (400.0, 1.0, 1.0),
    "simkd": (1.0, 0.0, 0.0),
    "sp": (3000.0, 1.0, 0.0),
    "vid": (1.0, 1.0, 0.0),
}
# Losses of the logits with tests of their own: tests/methods/test_ctkd.py and tests/test_dot.py.
LOGITS = {"ctkd", "ctkd_ls", "dkd_ctkd", "dot"}


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys of nested dicts or dataclasses, with their values."""
    items = (
        node.items()
        if isinstance(node, dict)
        else ((f.name, getattr(node, f.name, None)) for f in fields(node))
    )
    for key, value in items:
        if is_dataclass(value) or (isinstance(value, dict) and value and "_target_" not in value):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


# Every choice composes, resolves and builds


# Groups whose choices are all tested here; the other groups have tests of their own.
PLAIN = ("distiller", "scales", "dataset", "optimizer", "trainer", "tracking")


@pytest.mark.parametrize(
    ("group", "choice"), [(group, choice) for group in PLAIN for choice in choices(group)]
)
def test_every_choice_composes_and_resolves(group: str, choice: str) -> None:
    job = job_of(f"{group}={choice}", *UNSAID.get(f"{group}={choice}", ()))
    assert cfg.run_name(job) in job.run_dir
    assert not [key for key, value in leaves(job) if value == "???"]
    if group in ("dataset", "optimizer", "distiller"):
        assert getattr(job, group).name == choice


def test_the_choices_are_those_that_the_project_promises() -> None:
    losses = {"kd", "dkd", "nkd", "ttm", "wttm", "rld", "gdkd", "abkd", "dist", "sld", "skd"}
    losses.add("mld")
    assert set(choices("distiller")) == {"vanilla", "features_only"} | losses
    assert set(choices("scales")) == {"global", "two", "three", "skip"}
    small = {"cifar10", "cifar100", "digits", "fake", "fashion_mnist", "stl10"}
    assert set(choices("dataset")) == small | {
        "cub200",
        "fake_label_sets",
        "image_folder",
        "imagenet",
        "label_sets",
        "tiny_imagenet",
    }
    assert set(choices("trainer")) == {"default", "debug", "cpu"}
    assert set(choices("recipe")) == set(RECIPES) | set(OF_METHODS) | LOGITS | {
        "luminet",
        "normkd",
        "mld",
    }
    # The teachers of LSKD Table 5. They are built by their class and are not in models.names().
    wide = {"wrn_16_4", "wrn_28_2", "wrn_28_4"}
    assert (
        set(choices("student"))
        == set(choices("teacher"))
        == set(names()) | wide | LIBRARIES | IMAGENET | VITS
    )
    assert len(set(choices("student")) - LIBRARIES - IMAGENET - VITS) == 26


@pytest.mark.parametrize("name", sorted(set(choices("student")) - LIBRARIES - IMAGENET - VITS))
def test_every_network_is_built_as_student_and_as_teacher(name: str) -> None:
    job = job_of(f"student={name}", f"teacher={name}")
    assert (job.student.name, job.teacher.name) == (name, name)
    assert job.teacher.model == job.student.model
    # Source: architectures.md. SDD, LSKD, CRD and DKD use 0.01 for these three, else 0.05.
    assert job.optimizer.lr == (0.01 if name in ("mobilev2", "shufflev1", "shufflev2") else 0.05)
    assert job.teacher.lr == job.student.lr
    with torch.device("meta"), torch.no_grad():
        logit_map = instantiate(job.student.model, num_classes=7).eval()(torch.empty(2, 3, 32, 32))
    assert logit_map.shape[:2] == (2, 7)


@pytest.mark.parametrize("name", sorted(IMAGENET))
def test_every_network_for_imagenet_is_built_under_the_papers_name(name: str) -> None:
    job = job_of("dataset=imagenet", f"student={name}", f"teacher={name}")
    assert job.student.name == job.teacher.name == name.removeprefix("imagenet_")
    assert job.teacher.model == job.student.model
    with torch.device("meta"), torch.no_grad():
        logit_map = instantiate(job.student.model, num_classes=1000).eval()(
            torch.empty(1, 3, 224, 224)
        )
    assert logit_map.shape == (1, 1000, 7, 7)


def test_the_learning_rate_follows_the_student_not_the_teacher() -> None:
    assert job_of("student=mobilev2", "teacher=vgg13").optimizer.lr == 0.01
    assert job_of("student=vgg8", "teacher=mobilev2").optimizer.lr == 0.05
    assert job_of("student=mobilev2", "optimizer=sgd_cosine").optimizer.lr == 0.01


@pytest.mark.parametrize("recipe", sorted(OF_METHODS))
def test_the_recipe_of_a_method_has_its_sources_weights(recipe: str) -> None:
    job = job_of(f"recipe={recipe}", "teacher=vgg13", "student=resnet8")  # without a tuned file
    weight, ce_weight, kd_weight = OF_METHODS[recipe]
    (feature,) = job.features.values()
    assert (feature.weight, job.distiller.ce_weight) == (weight, ce_weight)
    assert bool(job.distiller.loss) == (kd_weight > 0)
    assert job.distiller.kd_weight == kd_weight
    assert job.recipe == recipe


@pytest.mark.parametrize("name", ["kd", "dkd", "nkd"])
@pytest.mark.parametrize("scales", choices("scales"))
def test_every_distiller_builds_with_every_scales(name: str, scales: str) -> None:
    job = job_of("recipe=none", f"distiller={name}", "distiller.temperature=3")
    M = job_of(f"scales={scales}").M
    assert {"global": [1], "two": [1, 2], "three": [1, 2, 4], "skip": [1, 4]}[scales] == M
    distill = ScaleDecoupled(instantiate(job.distiller.loss, _partial_=True), M)
    student, teacher = torch.randn(2, 5, 4, 4, requires_grad=True), torch.randn(2, 5, 4, 4)
    loss = distill(student, teacher, torch.tensor([0, 4]))
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.isfinite()
    assert student.grad is not None
    assert job.distiller.loss["temperature"] == 3.0


@pytest.mark.parametrize("name", choices("optimizer"))
def test_every_optimizer_builds(compose: Compose, name: str) -> None:
    job = compose(f"optimizer={name}")
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = instantiate(job.optimizer.algorithm, _partial_=True)(
        [parameter], lr=job.optimizer.lr
    )
    parameter.sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    assert (parameter < 1).all()


@pytest.mark.parametrize("name", choices("dataset"))
def test_every_data_set_names_a_loader_that_takes_its_arguments(name: str) -> None:
    job = job_of(f"dataset={name}", *UNSAID.get(f"dataset={name}", ()))
    arguments = {key: value for key, value in job.dataset.load.items() if key != "_target_"}
    inspect.signature(getattr(datasets, name)).bind(**arguments)
    assert job.dataset.load["_target_"] == f"sddlskd.datasets.{name}"
    assert len(job.dataset.mean) == len(job.dataset.std) == 3


@pytest.mark.parametrize("name", ["digits", "fake"])
def test_the_data_sets_that_need_no_file_load(compose: Compose, name: str) -> None:
    job = compose(
        f"dataset={name}",
        *(["+dataset.load.train=20", "+dataset.load.test=10"] if name == "fake" else []),
    )
    splits = instantiate(job.dataset.load)
    assert splits.train.images_NHWC.shape[1:] == (32, 32, 3)
    assert int(splits.train.labels_N.max()) < job.dataset.num_classes


# Precedence: recipe < adapted < pair < tuned < scales < the command line


def test_precedence() -> None:
    main = job_of()
    # The values of the default recipe
    assert (main.M, main.standardize, main.distiller.kd_weight) == ([1, 2, 4], True, 9.0)
    recipe = job_of("recipe=sd_kd")
    assert (recipe.teacher.name, recipe.student.name) == ("resnet32x4", "resnet8x4")
    pair = job_of("recipe=sd_kd", "pair=resnet32x4_shufflev1")
    assert (pair.student.name, pair.optimizer.lr, pair.M) == ("shufflev1", 0.01, [1, 2, 4])
    tuned = job_of("recipe=sd_kd", "pair=vgg13_vgg8")
    assert tuned.M == [1, 2]  # the tuned file replaces the recipe's [1,2,4]
    # The tuned file also applies if teacher and student are named one by one.
    assert job_of("recipe=sd_kd", "teacher=vgg13", "student=vgg8").M == [1, 2]
    assert job_of("recipe=sd_kd", "pair=vgg13_vgg8", "scales=skip").M == [1, 4]
    assert job_of("recipe=sd_kd", "pair=vgg13_vgg8", "scales=skip", "M=[3]").M == [3]
    assert job_of("recipe=sd_kd", "pair=vgg13_vgg8", "student=resnet8").student.name == "resnet8"
    assert job_of("recipe=kd", "scales=two").M == [1, 2]
    assert job_of("recipe=kd_ls", "M=[1,2]").M == [1, 2]
    assert job_of("recipe=kd", "distiller=dkd").distiller.name == "dkd"
    weights = job_of("recipe=kd_ls", "pair=resnet50_mobilev2", "distiller.kd_weight=5").distiller
    # The temperature comes from tuned/, the weight from the command line.
    assert (weights.temperature, weights.kd_weight) == (3.0, 5.0)
    # The values that are tuned for a pair on CIFAR-100 do not apply to another data set.
    assert job_of("recipe=kd_ls", "pair=vgg13_vgg8", "dataset=digits").distiller.temperature == 2.0


# The values of the papers
#
# The comments cite the files of shared/reference; the needed rows are copied to tests/reference.

# {recipe: (distiller, M, standardize, T, ce_weight, kd_weight, warm-up epochs, loss arguments)}
# SDD's trainer clips gradients at 40 (trainer.py, line 189), that of mdistiller and LSKD does not.
CLIPPED = {"nkd", "sd_kd", "sd_dkd", "sd_nkd"}
RLD = {"alpha": 1.0, "beta": 8.0, "alpha_temperature": 1.0}
RECIPES: dict[str, tuple[str, list[int], bool, float, float, float, int, dict[str, Any]]] = {
    # experiments_seed.csv, SDD's rows SDD_KD: T 4, ce 0.1, kd 0.9, no warm-up. checks.md A9:
    # M={1,2,4} for pairs of different architectures
    "kd": ("kd", [1], False, 4.0, 0.1, 0.9, 1, {}),
    "sd_kd": ("kd", [1, 2, 4], False, 4.0, 0.1, 0.9, 1, {}),
    # experiments_seed.csv, rows SDD_DKD: T 4, ce 1.0, alpha 1, beta 8 (less for some pairs),
    # warm-up 20
    "dkd": ("dkd", [1], False, 4.0, 1.0, 1.0, 20, {"alpha": 1.0, "beta": 8.0}),
    "sd_dkd": ("dkd", [1, 2, 4], False, 4.0, 1.0, 1.0, 20, {"alpha": 1.0, "beta": 8.0}),
    # checks.md A10: nkd.py has T 1 and gamma 1.5; SDD_nkd.py takes T 4 and gamma 8 (less for some
    # pairs) from DKD's block. Both take their warm-up from there, which no file for CIFAR-100 sets,
    # so it is the default of SDD's cfg.py, 20
    "nkd": ("nkd", [1], False, 1.0, 1.0, 1.0, 20, {"gamma": 1.5, "exclude_target": False}),
    "sd_nkd": ("nkd", [1, 2, 4], False, 4.0, 1.0, 1.0, 20, {"gamma": 8.0, "exclude_target": False}),
    # checks.md A6, D6: the command in LSKD's README has T 2 and kd 9, and ce 0.1 for KD
    "kd_ls": ("kd", [1], True, 2.0, 0.1, 9.0, 1, {}),
    "dkd_ls": ("dkd", [1], True, 2.0, 1.0, 9.0, 20, {"alpha": 1.0, "beta": 8.0}),
    # The authors' repositories, which conf/distiller/*.yaml names
    "ttm": ("ttm", [1], False, 1.0, 1.0, 45.0, 1, {"gamma": 0.1}),
    "wttm": ("wttm", [1], False, 1.0, 1.0, 1.0, 1, {"gamma": 0.1}),
    "rld": ("rld", [1], False, 4.0, 1.0, 1.0, 20, RLD),
    "gdkd": ("gdkd", [1], False, 4.0, 1.0, 1.0, 20, {"k": 5, "w0": 1.0, "w1": 1.0, "w2": 8.0}),
    "abkd": ("abkd", [1], False, 4.0, 1.0, 32.0, 1, {"alpha": 0.8, "beta": 0.3}),
    "dist": ("dist", [1], False, 4.0, 1.0, 1.0, 1, {"beta": 2.0, "gamma": 2.0}),
    "sld": ("sld", [1], False, 1.0, 0.1, 0.9, 1, {"temperatures": [1, 2, 3, 4, 5, 6]}),
    "skd": ("skd", [1], False, 4.0, 0.1, 0.45, 1, {"ridge": 0.1}),
    # experiments_seed.csv, rows of the seed project: T 2, ce 1.0, kd 9; alpha 9, beta 72.
    # DESIGN.md: the main method
    "sd_kd_ls": ("kd", [1, 2, 4], True, 2.0, 1.0, 9.0, 1, {}),
    "sd_dkd_ls": ("dkd", [1, 2, 4], True, 2.0, 1.0, 9.0, 20, {"alpha": 1.0, "beta": 8.0}),
    "vanilla": ("vanilla", [1], False, 4.0, 1.0, 0.0, 1, {}),
    # From no paper: the values of the distiller's file
    "none": ("kd", [1], False, 4.0, 0.1, 0.9, 1, {}),
}
UNTUNED = ("teacher=resnet32x4", "student=vgg8")  # a pair without a tuned file


@cache
def effective(recipe: str, pair: str) -> Config:
    """Return the job of a recipe with the tuned file of a pair, if there is one.

    The job is cached, so no test may change it.
    """
    job, path = (
        job_of(f"recipe={recipe}", *UNTUNED),
        CONF / "tuned" / "cifar100" / recipe / f"{pair}.yaml",
    )
    if not path.exists():
        return job
    tuned = OmegaConf.load(path)
    assert isinstance(tuned, DictConfig)
    assert set(tuned) <= {"M", "distiller"}, path
    distiller = OmegaConf.to_object(
        OmegaConf.merge(OmegaConf.structured(job.distiller), tuned.get("distiller", {}))
    )
    assert isinstance(distiller, cfg.DistillerConfig)
    distiller.loss["temperature"] = distiller.temperature
    return replace(job, distiller=distiller, M=list(tuned.get("M", job.M)))


@pytest.mark.parametrize(
    ("recipe", "pair"),
    [("kd_ls", "resnet110_resnet20"), ("dkd_ls", "resnet56_resnet20"), ("sd_kd", "vgg13_vgg8"),
     ("sd_dkd", "resnet110_resnet32"),
     ("sd_nkd", "vgg13_shufflev1"), ("dkd", "vgg13_mobilev2"), ("sd_kd_ls", "vgg13_vgg8"),
     ("kd", "vgg13_vgg8")],
)  # fmt: skip
def test_hydra_composes_recipe_pair_and_tuned_file_to_that(recipe: str, pair: str) -> None:
    job, expected = job_of(f"recipe={recipe}", f"pair={pair}"), effective(recipe, pair)
    assert (job.M, job.standardize, job.distiller) == (
        expected.M,
        expected.standardize,
        expected.distiller,
    )
    assert f"{job.teacher.name}_{job.student.name}" == pair


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_its_sources_values(name: str) -> None:
    distiller, M, standardize, temperature, ce_weight, kd_weight, warmup, arguments = RECIPES[name]
    job = job_of(f"recipe={name}", *UNTUNED)
    d = job.distiller
    assert (d.name, job.M, job.standardize) == (distiller, M, standardize)
    assert (d.temperature, d.ce_weight, d.kd_weight, d.warmup_epochs) == (
        temperature,
        ce_weight,
        kd_weight,
        warmup,
    )
    loss: dict[str, Any] = {}
    if name != "vanilla":
        loss["_target_"] = f"sddlskd.losses.{distiller}"
    if name not in ("vanilla", "ttm", "wttm", "sld"):
        loss["temperature"] = temperature
    assert d.loss == loss | arguments
    # Source: SDD Sec. 3.2 and SDD's released code
    assert (job.complementary_weight, d.knowledge, d.reduction) == (2.0, "fusion", "mean")
    assert (job.optimizer.clip_norm, d.pooling) == (40.0 if name in CLIPPED else None, "direct")


def test_the_default_is_the_main_method() -> None:
    assert cfg.config_hash(job_of()) == cfg.config_hash(job_of("recipe=sd_kd_ls"))


def test_lskd_pairs_have_the_values_of_the_authors_logs() -> None:
    def check(row: dict[str, str]) -> None:
        job = effective(row["method"], f"{row['teacher']}_{row['student']}")
        assert job.distiller.temperature == float(row["temperature"])
        assert job.distiller.kd_weight == float(row["kd_weight"])
        assert job.distiller.loss.get("beta") == (
            float(row["beta"] or 8.0) if row["method"] == "dkd_ls" else None
        )
        assert job_of(
            f"student={row['student']}", f"teacher={row['student']}"
        ).optimizer.lr == float(row["lr_first_epoch"])
        assert (job.M, job.standardize) == ([1], True)

    check_each(reference("lskd_logs"), check, lambda row: row["file"])


SUITES = {
    "SDD_KD": "sd_kd",
    "SDD_DKD": "sd_dkd",
    "SDD_NKD": "sd_nkd",
    "SDD_KD_LSKD": "sd_kd_ls",
    "SDD_DKD_LSKD": "sd_dkd_ls",
}
# Pairs of one architecture, which have M={1,2}; other pairs have {1,2,4} (SDD.md Sec. 4.1)
ALIKE = {
    "resnet110_resnet20", "resnet110_resnet32", "resnet56_resnet20", "resnet32x4_resnet8x4",
    "vgg13_vgg8", "wrn_40_2_wrn_16_2", "wrn_40_2_wrn_40_1", "wrn_16_4_wrn_16_2",
    "wrn_28_2_wrn_16_2", "wrn_28_4_wrn_16_2",
}  # fmt: skip


def test_pairs_have_the_values_of_the_released_configurations() -> None:
    def check(row: dict[str, str]) -> None:
        recipe, pair = SUITES[row["distiller"]], f"{row['teacher']}_{row['student']}"
        job = effective(recipe, pair)
        d, loss = job.distiller, job.distiller.loss
        assert (d.temperature, d.ce_weight) == (float(row["temperature"]), float(row["ce_weight"]))
        if row["kd_weight"]:
            assert d.kd_weight == float(row["kd_weight"])
        if row["dkd_alpha"]:
            assert d.kd_weight * loss["alpha"] == float(row["dkd_alpha"])
        if row["dkd_beta"]:
            assert d.kd_weight * loss["gamma" if recipe == "sd_nkd" else "beta"] == float(
                row["dkd_beta"]
            )
        assert d.warmup_epochs == int((re.match(r"\d+", row["warmup_effective"]) or ["1"])[0])
        # SDD's scripts run SD-NKD for vgg8 with M=[1,2] as well (sdd_run_notes.csv).
        two = pair in ALIKE or (recipe == "sd_nkd" and row["student"] == "vgg8")
        expected_M = [1, 2] if two and row["repo"] == "sdd" else [1, 2, 4]
        assert expected_M == job.M
        # The seed project trained every student at 0.05, unlike both papers (checks.md D6).
        if row["repo"] == "sdd":
            assert job_of(
                f"student={row['student']}", f"teacher={row['student']}"
            ).optimizer.lr == float(row["lr"])
        steps = [part * job.trainer.epochs for part in job.optimizer.milestones]
        assert (job.trainer.epochs, job.trainer.batch_size) == (
            int(row["epochs"]),
            int(row["batch_size"]),
        )
        assert (steps, job.optimizer.decay) == (
            yaml.safe_load(row["lr_decay_stages"]),
            float(row["lr_decay_rate"]),
        )
        momentum, weight_decay = float(row["momentum"]), float(row["weight_decay"])
        sgd = {"_target_": "torch.optim.SGD", "momentum": momentum, "weight_decay": weight_decay}
        assert job.optimizer.algorithm == sgd

    check_each(reference("experiments_seed"), check, lambda row: row["config"])


def test_plain_dkd_takes_the_pairs_beta_too() -> None:
    def check(row: dict[str, str]) -> None:
        job = effective("dkd", f"{row['teacher']}_{row['student']}")
        assert (job.distiller.loss["beta"], job.M) == (float(row["dkd_beta"]), [1])

    rows = [row for row in reference("experiments_seed") if row["distiller"] == "SDD_DKD"]
    check_each(rows, check, lambda row: f"{row['teacher']}_{row['student']}")


def test_pairs_of_one_architecture_take_two_scales() -> None:
    def check(pair: str) -> None:
        assert [effective(recipe, pair).M for recipe in ("sd_kd", "sd_dkd", "sd_nkd")] == [
            [1, 2]
        ] * 3

    check_each(sorted(ALIKE), check)


def test_every_published_pair_is_a_choice_and_sets_its_two_networks() -> None:
    rows = reference("pairs") + [
        row for row in reference("experiments_seed") if row["repo"] == "sdd"
    ]
    assert set(choices("pair")) == {
        *(f"{row['teacher']}_{row['student']}" for row in rows),
        *IMAGENET_PAIRS,
        *(f"resnet56_{student}" for student in VITS),
    }
    for row in reference("pairs"):
        with open(CONF / "pair" / f"{row['teacher']}_{row['student']}.yaml") as file:
            defaults = yaml.safe_load(file)["defaults"]
        assert defaults == [
            {"override /teacher": row["teacher"]},
            {"override /student": row["student"]},
        ]


# Source: SDD Tables 3 and 4, LSKD Table 3
IMAGENET_PAIRS = {
    "imagenet_resnet34_imagenet_resnet18": ("resnet34", "resnet18"),
    "imagenet_resnet50_mobilev1": ("resnet50", "mobilev1"),
}


@pytest.mark.parametrize("pair", IMAGENET_PAIRS)
def test_the_pairs_of_imagenet(pair: str) -> None:
    job = job_of("dataset=imagenet", f"pair={pair}")
    assert (job.teacher.name, job.student.name) == IMAGENET_PAIRS[pair]


# Source: tiny-transformers in LSKD's repository: configs/*/*_c100_base.yaml, *_c100_KD_ours.yaml,
# pycls/core/trainer.py (the weight of the cross-entropy) and the names of the logs
@pytest.mark.parametrize(
    ("student", "network", "temperature", "kd_weight"),
    [
        ("deit_tiny", "deit_tiny_distilled_patch16_224", 3.0, 10.0),
        ("pit_tiny", "pit_ti_224", 2.0, 9.0),
    ],
)
def test_the_pairs_with_transformers(
    student: str, network: str, temperature: float, kd_weight: float
) -> None:
    job = job_of(f"pair=resnet56_{student}", "recipe=kd_ls")
    assert (job.teacher.name, job.student.name) == ("resnet56", student)
    o, t, d = job.optimizer, job.trainer, job.distiller
    assert (o.name, o.lr, o.algorithm["weight_decay"]) == ("adamw", 5e-4, 0.05)
    assert (o.schedule, o.warmup_epochs, t.epochs, t.batch_size) == ("cosine", 20, 300, 128)
    assert (d.temperature, d.kd_weight, d.ce_weight) == (temperature, kd_weight, 0.5)
    assert job.student.model["name"] == network
    alone = job_of(f"pair=resnet56_{student}", "recipe=vanilla")
    assert alone.student.model["name"] == network.replace("_distilled", "")
    assert alone.optimizer == o
    # A teacher of the pair is trained as the data set says.
    assert cfg.teacher_job(job).optimizer.name == "sgd"
    with torch.device("meta"), torch.no_grad():
        model = instantiate(job.student.model, num_classes=100).eval()
        logit_map = model(torch.empty(1, 3, 32, 32))
    assert logit_map.shape == (1, 100, *{"deit_tiny": (14, 14), "pit_tiny": (7, 7)}[student])


# The settings of the data sets
#
# Sources: the table of recipes in architectures.md, and experiments_seed.csv. Its rows for ImageNet
# and CUB-200, with SDD's configs/cub200, are copied to tests/reference/experiments_large.csv.


def test_imagenet_brings_its_papers_training() -> None:
    job = job_of("dataset=imagenet", "pair=imagenet_resnet50_mobilev1")
    o, t = job.optimizer, job.trainer
    assert (o.name, o.lr, o.algorithm["weight_decay"], o.algorithm["momentum"]) == (
        "sgd",
        0.2,
        1e-4,
        0.9,
    )
    assert (t.epochs, t.batch_size, [part * t.epochs for part in o.milestones], o.decay) == (
        100,
        512,
        [30, 60, 90],
        0.1,
    )
    assert (job.dataset.size, job.dataset.crop_area, job.dataset.flip) == (224, [0.08, 1.0], True)
    given = job_of(
        "dataset=imagenet",
        "trainer.batch_size=64",
        "optimizer.lr=0.1",
        "optimizer.milestones=[0.5]",
    )
    assert (given.trainer.batch_size, given.optimizer.lr, given.optimizer.milestones) == (
        64,
        0.1,
        [0.5],
    )
    adamw = job_of("dataset=imagenet", "optimizer=adamw").optimizer
    # Another optimizer keeps its own settings.
    assert (adamw.lr, adamw.algorithm["weight_decay"]) == (1e-3, 0.05)


def test_cub200_brings_its_papers_training() -> None:
    for student in ("mobilev2", "shufflev1", "resnet8x4"):
        job = job_of("dataset=cub200", f"student={student}")
        o, t = job.optimizer, job.trainer
        assert (o.lr, o.algorithm["weight_decay"], t.epochs, t.batch_size) == (0.01, 5e-4, 240, 64)
        assert [part * t.epochs for part in o.milestones] == [150, 180, 210]
        assert job.student.model["stem"] == "large"
    d = job.dataset
    assert (d.crop, d.size, d.size / d.centre) == ("squeezed", 224, 256)
    teacher = cfg.teacher_job(job).dataset
    assert d.drop_last is d.new_ends is teacher.drop_last is teacher.new_ends is True
    assert job_of("dataset=cub200", "pair=vgg13_vgg8", "recipe=kd").optimizer.lr == 0.05
    assert "stem" not in job_of("dataset=cub200", "pair=vgg13_vgg8", "recipe=kd").student.model


def test_a_teacher_trained_on_the_spot_has_the_data_sets_settings() -> None:
    job = cfg.teacher_job(job_of("dataset=imagenet", "pair=imagenet_resnet50_mobilev1"))
    assert (job.optimizer.lr, job.optimizer.algorithm["weight_decay"], job.trainer.batch_size) == (
        0.2,
        1e-4,
        512,
    )
    assert job.optimizer.milestones == [0.3, 0.6, 0.9]


@pytest.mark.parametrize("group", ["student", "teacher"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_two_networks_of_one_name_do_not_share_a_file_on_imagenet(group: str, name: str) -> None:
    with pytest.raises(
        Exception, match=f"use {group}=imagenet_{name}, or set another {group}.name"
    ) as caught:
        job_of("dataset=imagenet", "recipe=kd", f"{group}={name}")
    assert "\n" not in explain(caught.value)
    renamed = job_of(
        "dataset=imagenet", "recipe=kd", f"{group}={name}", f"{group}.name=cifar_{name}"
    )
    assert getattr(renamed, group).name == f"cifar_{name}"
    for dataset in ("cifar100", "cub200"):
        assert (
            getattr(job_of(f"dataset={dataset}", "recipe=kd", f"{group}={name}"), group).name
            == name
        )


def test_of_the_loaders_arguments_only_root_is_the_root() -> None:
    words = "dataset=stl10", "dataset.root=unlabeled", "+dataset.load.part=unlabeled"
    job, other = job_of(*words), job_of(*words[:2], "+dataset.load.part=train")
    assert (job.dataset.load["root"], job.dataset.load["part"]) == (
        os.path.abspath("unlabeled"),
        "unlabeled",
    )
    assert cfg.config_hash(job) != cfg.config_hash(other)
    assert cfg.config_hash(job) == cfg.config_hash(
        job_of(words[0], "dataset.root=elsewhere", words[2])
    )


def test_the_command_line_wins_over_a_data_sets_learning_rate() -> None:
    given = job_of(
        "dataset=cub200", "pair=vgg13_vgg8", "recipe=kd", "student.lr=0.2", "teacher.lr=0.3"
    )
    assert (given.optimizer.lr, cfg.teacher_job(given).optimizer.lr) == (0.2, 0.3)
    tuned = job_of("dataset=cub200", "pair=vgg13_vgg8", "recipe=kd")
    assert (tuned.optimizer.lr, cfg.teacher_job(tuned).optimizer.lr) == (0.05, 0.01)
    whole = job_of("dataset=cub200", "pair=vgg13_mobilev2", "recipe=kd", "dataset.lr=0.4")
    assert (whole.optimizer.lr, cfg.teacher_job(whole).optimizer.lr) == (0.4, 0.4)
    for job in (
        job_of("dataset=imagenet", "student.lr=0.7"),
        job_of("student=mobilev2", "student.lr=0.7"),
    ):
        assert job.optimizer.lr == 0.7
    assert (
        job_of("dataset=cub200", "pair=vgg13_vgg8", "recipe=kd", "optimizer=adamw").optimizer.lr
        == 1e-3
    )


def test_large_pairs_have_the_values_of_the_released_configurations() -> None:
    def check(row: dict[str, str]) -> None:
        prefix = (
            {"resnet34": "imagenet_", "resnet50": "imagenet_"}
            if row["dataset"] == "imagenet"
            else {}
        )
        pair = (
            prefix.get(row["teacher"], "")
            + row["teacher"]
            + "_"
            + prefix.get(row["teacher"], "")
            + row["student"]
        )
        pair = pair.replace("imagenet_mobilev1", "mobilev1")
        job = job_of(f"dataset={row['dataset']}", f"pair={pair}", f"recipe={row['recipe']}")
        d, o = job.distiller, job.optimizer
        assert (d.temperature, d.ce_weight, job.M) == (
            float(row["temperature"]),
            float(row["ce_weight"]),
            yaml.safe_load(row["M"]),
        )
        for key, value in ((d.kd_weight, row["kd_weight"]), (d.loss.get("alpha"), row["alpha"]),
                           (d.loss.get("gamma" if "nkd" in row["recipe"] else "beta"),
                            row["beta"])):  # fmt: skip
            assert key == float(value) if value else True
        assert (d.warmup_epochs, o.lr, o.algorithm["weight_decay"]) == (
            int(row["warmup"]), float(row["lr"]), float(row["weight_decay"]),
        )  # fmt: skip
        assert [round(part * job.trainer.epochs) for part in o.milestones] == yaml.safe_load(
            row["lr_decay_stages"]
        )

    check_each(reference("experiments_large"), check, lambda row: row["config"])


@pytest.mark.parametrize("pair", ["resnet32x4_mobilev2", "resnet32x4_shufflev1",
                                  "resnet50_shufflev1", "vgg13_mobilev2",
                                  "vgg13_vgg8"])  # fmt: skip
@pytest.mark.parametrize("method", ["kd", "dkd", "nkd"])
def test_the_plain_rows_of_cub200_are_the_scale_decoupled_ones_with_one_scale(
    method: str, pair: str
) -> None:
    plain, scaled = (
        job_of("dataset=cub200", f"pair={pair}", f"recipe={recipe}")
        for recipe in (method, f"sd_{method}")
    )
    # Source: checks.md A8, and the rows train_cub_*.sh of sdd_run_notes.csv
    assert (plain.M, scaled.M) == ([1], [1, 2, 4])
    assert replace(plain.distiller, pooling=cfg.Pooling.nested) == scaled.distiller
    assert plain.optimizer == scaled.optimizer
    assert plain.optimizer.clip_norm == 40.0
    if method == "nkd":  # source: SDD's configs/cub200/sdd_nkd
        d = plain.distiller
        gamma = 6.0 if pair.startswith("vgg13") else 8.0
        assert (d.temperature, d.loss["temperature"], d.warmup_epochs, d.loss["gamma"]) == (
            4.0,
            4.0,
            20,
            gamma,
        )


@pytest.mark.parametrize("pair", IMAGENET_PAIRS)
def test_both_kinds_of_dkd_with_lskd_take_imagenets_warm_up_and_beta(pair: str) -> None:
    plain, scaled = (
        job_of("dataset=imagenet", f"pair={pair}", f"recipe={r}").distiller
        for r in ("dkd_ls", "sd_dkd_ls")
    )
    beta = 0.5 if pair.endswith("resnet18") else 2.0
    assert (
        (plain.warmup_epochs, plain.loss["beta"])
        == (scaled.warmup_epochs, scaled.loss["beta"])
        == (1, beta)
    )


@pytest.mark.slow
def test_what_is_adapted_is_for_choices_that_exist_and_changes_something() -> None:
    paths = sorted((CONF / "adapted").rglob("*.yaml"))
    assert paths
    for path in paths:
        dataset, recipe = path.relative_to(CONF / "adapted").with_suffix("").parts
        assert (dataset in choices("dataset"), recipe in choices("recipe")) == (True, True)
        unlike = ("teacher=vgg13", "student=resnet8")  # a pair without a tuned file
        # cifar10 has the other settings of cifar100, and nothing is adapted for it.
        here, plain = (
            job_of(f"dataset={name}", f"recipe={recipe}", *unlike) for name in (dataset, "cifar10")
        )
        changed = [here.distiller != plain.distiller, here.features != plain.features]
        changed.append(here.optimizer.clip_norm != plain.optimizer.clip_norm)
        if dataset == "cifar100":
            changed.append(here.optimizer.lr != plain.optimizer.lr)
        assert any(changed), path


def test_sdds_numbers_of_large_images_are_made_with_its_clipping_and_its_pooling() -> None:
    for dataset in ("imagenet", "cub200"):
        for method in ("kd", "dkd", "nkd"):
            job = job_of(f"dataset={dataset}", f"recipe=sd_{method}")
            assert (job.optimizer.clip_norm, job.distiller.pooling) == (40.0, "nested")
    # The NKD rows of SDD's tables of ImageNet are the numbers of NKD's authors.
    nkd = job_of("dataset=imagenet", "recipe=nkd")
    assert (nkd.optimizer.clip_norm, nkd.distiller.warmup_epochs) == (None, 1)
    assert nkd.distiller.loss["exclude_target"]


def test_lskds_two_pairs_of_imagenet_have_the_ce_weights_of_their_files() -> None:
    weights = [
        job_of("dataset=imagenet", f"pair={pair}", "recipe=kd_ls").distiller.ce_weight
        for pair in sorted(IMAGENET_PAIRS)
    ]
    assert weights == [1.0, 0.5]


def test_the_clipping_of_a_recipe_holds_for_every_optimizer_and_can_be_turned_off() -> None:
    adamw = job_of("recipe=sd_kd", "optimizer=adamw").optimizer
    assert (adamw.name, adamw.lr, adamw.schedule, adamw.clip_norm) == (
        "adamw",
        1e-3,
        "cosine",
        40.0,
    )
    assert job_of("recipe=sd_kd", "optimizer.clip_norm=null").optimizer.clip_norm is None


def test_the_default_pooling_leaves_jobs_their_names() -> None:
    assert cfg.config_hash(job_of("distiller.pooling=direct")) == cfg.config_hash(job_of())
    assert cfg.config_hash(job_of("distiller.pooling=nested")) != cfg.config_hash(job_of())


def test_a_stem_that_is_the_default_leaves_jobs_their_names() -> None:
    job = job_of()
    assert job.student.model["stem"] == job.dataset.stem == "small"
    assert cfg.config_hash(job) == "3755aa485b69"  # the hash before the key `stem` existed
    assert cfg.config_hash(job_of("recipe=vanilla")) == "dd34a98191fb"
    large = job_of("dataset.stem=large")
    assert large.student.model["stem"] == large.teacher.model["stem"] == "large"
    assert cfg.config_hash(large) != cfg.config_hash(job)


def test_every_tuned_file_is_for_choices_that_exist_and_changes_something() -> None:
    paths = sorted((CONF / "tuned").rglob("*.yaml"))
    assert paths
    for path in paths:
        dataset, recipe, pair = path.relative_to(CONF / "tuned").with_suffix("").parts
        assert recipe in choices("recipe"), path
        assert pair in choices("pair"), path
        tuned = OmegaConf.load(path)
        assert dataset in ("cifar100", "cub200", "imagenet")
        if recipe not in RECIPES:
            recipe_alone = OmegaConf.load(CONF / "recipe" / f"{recipe}.yaml")
            assert OmegaConf.merge(recipe_alone, tuned) != recipe_alone, path
            continue
        plain = {"M": RECIPES[recipe][1], "distiller": {"temperature": RECIPES[recipe][3]}}
        plain["distiller"] |= {"kd_weight": RECIPES[recipe][5], "loss": RECIPES[recipe][7]}
        assert OmegaConf.merge(plain, tuned) != OmegaConf.create(plain), path


# The identity of a job


SMALL = ("dataset=fashion_mnist", "teacher=resnet8", "student=resnet8")


@pytest.mark.parametrize(
    "same",
    [
        "home=/elsewhere", "run_dir=/elsewhere/run", "trainer.device=cuda:1", "tracking=none",
        "tracking.uri=sqlite:////a/b", "tracking.experiment=other", "trainer.log_every=7",
        "trainer.progress=off", "checkpoint.every_minutes=3",
        "dataset.root=/other/data", "dataset.root=data", "teacher.train_if_missing=true",
        "allow_foreign_targets=true",
        "sweep.name=mine", "trainer=cpu",
    ],
)  # fmt: skip
def test_the_hash_does_not_depend_on_where_and_how(same: str) -> None:
    assert cfg.config_hash(job_of(*SMALL, same)) == cfg.config_hash(job_of(*SMALL))


@pytest.mark.parametrize(
    "other",
    [
        "M=[1]", "M=[1,4,2]", "seed=1", "optimizer.lr=0.02", "trainer.epochs=7",
        "standardize=false",
        "student=resnet14", "teacher=resnet14", "complementary_weight=1", "distiller.temperature=3",
        "trainer.batch_size=32",
        "distiller.loss.temperature=3", "trainer.precision=bf16", "trainer.data_seed=5",
        "dataset=digits",
        "dataset.val_fraction=0.1", "recipe=dkd",
        "optimizer=sgd_cosine", "distiller.knowledge=consistent", "trainer.max_steps=3",
        "teacher.checkpoint=a.pt",
    ],
)  # fmt: skip
def test_the_hash_depends_on_what_is_computed(other: str) -> None:
    assert cfg.config_hash(job_of(*SMALL, other)) != cfg.config_hash(job_of(*SMALL))


def test_the_hash_is_the_same_in_another_process_and_year() -> None:
    assert cfg.config_hash(Config()) == cfg.config_hash(Config())
    assert re.fullmatch(r"[0-9a-f]{12}", cfg.config_hash(job_of()))


def test_scales_as_a_list_and_as_text_are_one_job(compose: Compose) -> None:
    spellings = ("M=[1,2]", "M=[1, 2]", "M='[1,2]'", 'M="[1,2]"')
    jobs = [compose(*SMALL, spelling) for spelling in spellings[:2]]
    assert {cfg.config_hash(job) for job in jobs} == {cfg.config_hash(jobs[0])}
    assert all(job.M == [1, 2] for job in jobs)
    # Hydra's grammar makes a string of a quoted list, and the type of M refuses a string.
    for quoted in spellings[2:]:
        with pytest.raises(
            hydra.errors.ConfigCompositionException, match="Error merging override M="
        ):
            compose(*SMALL, quoted)


def test_a_job_is_typed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """run_dir contains the name of the job, which must not need a second typing."""
    cfg.frame()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        composed = hydra.compose("config", overrides=["home=/h", "seed=3"])
    module = importlib.import_module("sddlskd.config.resolve")
    typed, real = [], module._typed
    monkeypatch.setattr(module, "_typed", lambda root: typed.append(root) or real(root))
    job = cfg.resolve(composed)
    assert len(typed) == 1
    assert job.run_dir == f"/h/runs/{cfg.run_name(job)}"


@pytest.mark.parametrize("recipe", RECIPES)
def test_run_names_are_readable_and_safe_in_a_shell(compose: Compose, recipe: str) -> None:
    job = compose(f"recipe={recipe}", "M=[1,2,4]", "seed=3")
    name = cfg.run_name(job)
    assert re.fullmatch(r"[A-Za-z0-9._/-]+", name)
    assert name.startswith("cifar100/")
    assert name.endswith(f"-s3-{cfg.config_hash(job)}")
    if recipe != "vanilla":
        assert "resnet32x4-resnet8x4" in name
        assert "-M-1-2-4-" in name
        assert ("-ls-" in name) == job.standardize
    assert job.run_dir == f"{job.home}/runs/{name}"


def test_hostile_names_are_made_safe(compose: Compose) -> None:
    job = compose("student.name='a b;rm -rf ~'", "dataset.name='$(x)/../y'")
    assert re.fullmatch(r"[A-Za-z0-9._/-]+", cfg.run_name(job))
    assert len(Path(cfg.run_name(job)).parts) == 2
    assert ".." not in Path(cfg.run_name(job)).parts


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("recipe=sd_nkd", "optimizer=adamw"),
        ("distiller=vanilla",),
        ("tracking=none", "optimizer.clip_norm=3", "trainer.precision=fp16"),
    ],
)
def test_a_frozen_job_reads_back_as_it_was(
    compose: Compose, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    job = compose(*SMALL, *overrides)
    path = tmp_path / "config.yaml"
    path.write_text(cfg.to_yaml(job))
    assert cfg.load(path) == job
    assert cfg.config_hash(cfg.load(path)) == cfg.config_hash(job)
    assert cfg.to_yaml(cfg.load(path)) == path.read_text()
    assert "${" not in path.read_text()


def test_a_missing_file_is_not_called_damaged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        cfg.load(tmp_path / "config.yaml")
    assert explain(caught.value) == f"{tmp_path} is not a run directory: it has no config.yaml"
    (tmp_path / "config.yaml").write_text("seed: [")
    with pytest.raises(ValueError, match=r"config\.yaml is damaged, or of another version"):
        cfg.load(tmp_path / "config.yaml")


def test_a_relative_folder_is_frozen_as_an_absolute_one(
    compose: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    job = compose(
        "dataset=fashion_mnist", "home=here", "dataset.root=pictures", "teacher.checkpoint=t.pt"
    )
    assert (job.home, job.dataset.root) == (f"{tmp_path}/here", f"{tmp_path}/pictures")
    assert job.dataset.load["root"] == f"{tmp_path}/pictures"
    assert job.teacher.checkpoint == f"{tmp_path}/t.pt"
    assert job.run_dir.startswith(f"{tmp_path}/here/runs/")


def test_vanilla_is_one_job_whatever_stands_beside_it(compose: Compose) -> None:
    jobs = [compose("distiller=vanilla", *beside) for beside in (
        (), ("teacher=vgg13",), ("M=[1,4]",), ("standardize=true",), ("complementary_weight=7",),
        ("scales=two",), ("distiller.temperature=9",), ("teacher.checkpoint=x.pt",))]  # fmt: skip
    jobs.append(compose("recipe=vanilla"))
    assert len({cfg.config_hash(job) for job in jobs}) == 1
    assert len({job.run_dir for job in jobs}) == 1
    assert jobs[1].teacher.name == cfg.NO_TEACHER


def test_the_teachers_own_job_does_not_depend_on_the_student(compose: Compose) -> None:
    jobs = [
        cfg.teacher_job(compose("dataset=digits", "teacher=resnet14", *student))
        for student in (
            ("student=resnet8",),
            ("student=shufflev1", "M=[1]", "seed=4"),
            ("recipe=dkd", "optimizer.lr=1"),
        )
    ]
    assert len({job.run_dir for job in jobs}) == 1
    assert (jobs[0].student.name, jobs[0].distiller.name, jobs[0].trainer.epochs) == (
        "resnet14",
        "vanilla",
        20,
    )


def test_the_teachers_own_job_is_captured_as_the_students_are(compose: Compose) -> None:
    plain, chosen = (
        cfg.teacher_job(compose("dataset=digits", "teacher=resnet14", f"trainer.capture={choice}"))
        for choice in ("auto", "off")
    )
    assert (plain.trainer.capture, chosen.trainer.capture) == ("auto", "off")
    assert plain.run_dir == chosen.run_dir


def test_jobs_share_a_teacher_where_they_see_the_same_batches() -> None:
    base = job_of(*SMALL)
    for same in ("student=vgg8", "M=[1]", "recipe=dkd", "optimizer.lr=1"):
        assert cfg.sharing_key(job_of(*SMALL, same)) == cfg.sharing_key(base), same
    for other in (
        "seed=1",
        "teacher=vgg8",
        "trainer.batch_size=32",
        "dataset=digits",
        "trainer.device=cpu",
    ):
        assert cfg.sharing_key(job_of(*SMALL, other)) != cfg.sharing_key(base), other
    seeds = [
        cfg.sharing_key(job_of(*SMALL, "trainer.data_seed=0", f"seed={seed}")) for seed in (1, 2)
    ]
    assert seeds[0] == seeds[1]


def sweep_name(*overrides: str, name: str = "config") -> Any:
    cfg.frame()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        composed = hydra.compose(
            name, overrides=["hydra.mode=MULTIRUN", *overrides], return_hydra_config=True
        )
    return composed.sweep.name


def test_sweep_names_are_deterministic_and_safe() -> None:
    name = sweep_name("student=resnet8", "M=[1,2,4]", "optimizer.lr=0.1")
    assert re.fullmatch(r"[A-Za-z0-9._-]+", name)
    assert re.fullmatch(r"M-lr-student-[0-9a-f]{6}", name)
    # The order of the overrides does not matter.
    assert name == sweep_name("optimizer.lr=0.1", "student=resnet8", "M=[1,2,4]")
    assert name == sweep_name(
        "student=resnet8", "M=[1,2,4]", "optimizer.lr=0.1", "tracking=none", "home=/elsewhere"
    )
    assert name != sweep_name("student=resnet8", "M=[1,2]", "optimizer.lr=0.1")
    long = [f"+optimizer.algorithm.key_{i}={i}" for i in range(50)]
    assert len(sweep_name(*long)) < 40
    assert sweep_name(*long) != sweep_name(*long[:-1])
    assert sweep_name("sweep.name=mine") == "mine"


def test_a_sweep_name_has_the_choices_that_tell_it_from_others() -> None:
    grid = ("dataset=digits", "teacher=resnet14", "student=resnet8,wrn_16_1", "M=[1],[1,2,4]",
            "seed=range(0,3)", "optimizer.lr=0.1,0.2")  # fmt: skip
    _, sweep = loader_of(["hydra.mode=MULTIRUN", *grid])
    assert re.fullmatch(r"digits-M-lr-seed-student-[0-9a-f]{6}", sweep.sweep.name)


def test_a_single_job_belongs_to_no_sweep() -> None:
    assert job_of().sweep.name is None


# Values that are refused although their type is right


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("M=[]", r"M=\[\]"), ("M=[0]", r"M=\[0\]"), ("M=[1,1]", r"M=\[1, 1\]"),
        ("M=[-1,2]", r"M=\[-1, 2\]"),
        ("trainer.epochs=0", r"trainer.epochs=0 must be greater"),
        ("optimizer.lr=-1", "optimizer.lr=-1"),
        ("optimizer.milestones=[150]", "fractions of trainer.epochs"),
        ("dataset.val_fraction=1", "dataset.val_fraction=1"),
        ("seed=-1", "seed=-1"), ("complementary_weight=-1", "complementary_weight=-1"),
        ("optimizer.lr=nan", "optimizer.lr=nan"),
        ("distiller.temperature=0", "temperature=0"), ("optimizer.clip_norm=0", "clip_norm=0"),
        ("home=''", "home is empty"),
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused(tmp_path: Path, override: str, says: str) -> None:
    cfg.frame()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        composed = hydra.compose("config", overrides=[f"home={tmp_path}", override])
        composed.run_dir = str(tmp_path / "run")
        with pytest.raises(ValueError, match=says):
            cfg.resolve(composed)


def test_a_distiller_without_a_teacher_is_refused(compose: Compose) -> None:
    job = compose()
    job.teacher.model = {}
    with pytest.raises(
        ValueError,
        match=r"distiller=kd needs a teacher; choose one with teacher=.*distiller=vanilla",
    ):
        cfg.normalise(job)


@pytest.mark.parametrize("override", ["+foo=1", "+trainer.foo=1", "+student.foo=1"])
def test_a_key_that_nothing_reads_is_refused_even_when_it_is_added(
    tmp_path: Path, override: str
) -> None:
    cfg.frame()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        composed = hydra.compose("config", overrides=[f"home={tmp_path}", "run_dir=x", override])
        with pytest.raises(Exception, match="Key 'foo' not in"):
            cfg.resolve(composed)


# How the configuration is written (STYLE.md)


def test_every_key_is_read_somewhere() -> None:
    package = Path(sddlskd.__file__).parent
    trees = [ast.parse(path.read_text()) for path in package.rglob("*.py")]
    read = {
        node.attr
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    # Only conf/ reads these keys: it sets trainer.epochs, teacher.train_epochs,
    # teacher.train_if_missing and the argument `temperature` of the losses.
    by_conf = {"dataset.epochs", "dataset.train_teachers", "distiller.temperature"}
    keys = {key for key, _ in leaves(Config())}
    assert {key for key in keys - by_conf if key.rpartition(".")[2] not in read} == set()
    yamls = "".join(path.read_text() for path in CONF.rglob("*.yaml"))
    assert all(f"${{{key}}}" in yamls for key in by_conf)


def test_no_default_is_stated_twice() -> None:
    frame = dict(leaves(Config()))
    twice = []
    for path in [
        CONF / "config.yaml",
        *(p for group in GROUPS for p in (CONF / group).glob("*.yaml")),
    ]:
        text = path.read_text()
        group = "" if path.name == "config.yaml" else f"{path.parent.name}."
        # Recipes, scales and pairs state all their values, defaults included.
        if text.startswith("# @package _global_"):
            continue
        content = {k: v for k, v in yaml.safe_load(text).items() if k not in ("defaults", "hydra")}
        twice += [
            f"{path.parent.name}/{path.name}: {key}={value}"
            for key, value in leaves(content)
            if group + key in frame and frame[group + key] == value
        ]
    assert not twice


@pytest.mark.parametrize(
    ("name", "schema"), [("slurm", SlurmConfig), ("submitit_local", SharedTeacherConfig)]
)
def test_no_default_of_a_launcher_is_stated_twice(name: str, schema: type) -> None:
    stated = yaml.safe_load((CONF / "hydra" / "launcher" / f"{name}.yaml").read_text())
    own = [f for f in fields(schema) if f.name in schema.__annotations__ and f.name in stated]
    assert own
    assert [f.name for f in own if f.default == stated[f.name]] == []


def test_the_crops_of_the_decoder_have_the_defaults_of_a_data_set() -> None:
    default, crops = cfg.DatasetConfig(), ImageTransform(size=8)
    assert crops.area == tuple(default.crop_area)
    assert crops.centre == default.centre
    assert crops.pixel_limit == default.pixel_limit
    assert crops.upright == default.upright
    assert crops.squeezed == (default.crop == cfg.Crop.squeezed)


def test_every_field_has_a_comment() -> None:
    path = inspect.getsourcefile(Config)
    assert path
    source = Path(path).read_text().splitlines()
    classes = [
        node
        for node in ast.parse("\n".join(source)).body
        if isinstance(node, ast.ClassDef) and node.name.endswith("Config")
    ]
    assert len(classes) == 12
    without = [
        f"{c.name}.{statement.target.id}"
        for c in classes
        for statement in c.body
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
        and c.name != "Config" and statement.target.id != "name"
        and not source[statement.lineno - 2].lstrip().startswith("#")
        and not any("#" in line for line in source[statement.lineno - 1 : statement.end_lineno])
    ]  # fmt: skip
    assert not without


def test_flatten_has_the_contracts_names() -> None:
    flat = cfg.flatten(job_of("M=[1,2]"))
    contract = (
        "teacher.name",
        "student.name",
        "distiller.name",
        "standardize",
        "complementary_weight",
        "dataset.name",
    )
    assert all(name in flat for name in (*contract, "seed"))
    assert flat["M"] == "[1,2]"
    assert cfg.identity_keys() < set(flat)
    features = {key for key in cfg.flatten(job_of("recipe=at")) if key.startswith("features.")}
    assert features == {f"features.at.{name}" for name in ("weight", "warmup_epochs", "method")}


def test_a_composed_config_is_typed() -> None:
    job = job_of()
    assert not [key for key, value in leaves(job) if isinstance(value, DictConfig)]
    assert isinstance(job.trainer.precision, cfg.Precision)


def test_a_teacher_is_trained_the_same_whatever_its_student(compose):
    plain = cfg.teacher_job(compose("dataset=digits", "teacher=resnet8"))
    # `compose()` takes its optimizer from conf/optimizer/sgd.yaml.
    assert plain.optimizer.algorithm == compose().optimizer.algorithm
    for other in (
        "optimizer=adamw",
        "optimizer.algorithm.weight_decay=0.1",
        "trainer.batch_size=32",
        "seed=3",
    ):
        assert cfg.config_hash(
            cfg.teacher_job(compose("dataset=digits", "teacher=resnet8", other))
        ) == cfg.config_hash(plain)


def test_6_and_6_0_are_one_job(compose):
    hashes = {
        cfg.config_hash(compose("recipe=dkd", f"distiller.loss.beta={beta}"))
        for beta in ("6", "6.0")
    }
    assert len(hashes) == 1


# Ways to standardise


@pytest.mark.parametrize(("old", "new"), [("true", "class"), ("false", "none")])
def test_the_first_names_of_standardisation_keep_their_hash(old: str, new: str) -> None:
    first, second = (job_of("recipe=kd", f"standardize={way}") for way in (old, new))
    assert first == second
    assert cfg.config_hash(first) == cfg.config_hash(second)
    assert isinstance(first.standardize, bool)


def test_other_ways_to_standardise_are_other_methods() -> None:
    jobs = [job_of("recipe=kd", f"standardize={way}") for way in schema.STANDARDIZE]
    assert len({cfg.config_hash(job) for job in jobs}) == 4
    assert [cfg.method_name(job) for job in jobs] == ["KD", "KD+LS", "LumiNet", "NormKD"]
    assert cfg.method_name(job_of("recipe=sd_dkd", "standardize=batch")) == "SD-DKD+BS"
    assert schema.STANDARDIZE == distill.STANDARDIZE


def test_luminet_and_normkd_are_kd_standardised_otherwise() -> None:
    luminet, normkd = job_of("recipe=luminet"), job_of("recipe=normkd")
    assert (luminet.standardize, normkd.standardize) == ("batch", "class_scaled")
    assert luminet.distiller.kd_weight == 33**2 / 4**2
    assert job_of("recipe=luminet", "pair=vgg13_vgg8").distiller.kd_weight == 70**2 / 8**2
