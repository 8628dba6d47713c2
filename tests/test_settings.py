"""Hold the settings of the published numbers and the recipes of conf/ equal."""

import csv
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from analysis import published
from analysis.protocol import SETTINGS_FILE, other_budget, other_method
from analysis.published import Published
from analysis.runs import _typed
from analysis.schema import Run, frame_of, runs_of
from sddlskd import config as cfg
from tests.composing import files_read_once
from tests.reference import settings

EVERY = 40  # composing all takes minutes


@cache
def rows() -> dict[tuple[str, str, str], dict[str, str]]:
    """Return the rows of settings.csv by data set, pair and method."""
    with SETTINGS_FILE.open(newline="", encoding="utf-8") as file:
        return {(row["dataset"], row["pair"], row["method"]): row for row in csv.DictReader(file)}


def key_of(number: Published) -> tuple[str, str, str]:
    return number.dataset, number.pair, number.method


def chosen() -> list[Published]:
    """Return every number of one pair for each recipe and data set, and some of the others."""
    found: dict[tuple[str, str], Published] = {}
    for number in settings.cells():
        found.setdefault((number.dataset, number.method), number)
    return [*found.values(), *settings.cells()[::EVERY]]


def test_every_number_with_a_recipe_has_a_row() -> None:
    assert rows().keys() == {key_of(number) for number in settings.cells()}


@pytest.mark.slow
def test_the_rows_are_what_the_recipes_compose() -> None:
    numbers = chosen()
    wrong = [
        (key_of(number), row)
        for number, row in zip(numbers, settings.rows(numbers), strict=True)
        if row != rows()[key_of(number)]
    ]
    assert not wrong, "python -m tests.reference.settings writes the file again"


# Runs of the recipes and of others


@cache
def run_of(number: Published, *overrides: str) -> Run:
    """Return the run of a published number's recipe as MLflow keeps it."""
    with files_read_once():
        job = settings.job_of(number, *overrides)
    params = {key: str(value) for key, value in cfg.flatten(job).items()}
    row, problems = _typed(params)
    assert problems == []
    (run,) = runs_of(frame_of([row]))
    teacher, student = number.teacher, number.student  # conf names those of ImageNet imagenet_...
    return replace(run, teacher=teacher, student=student, pair=number.pair, max_steps="all")


def number(table: str, pair: str, method: str) -> Published:
    (found,) = (
        one for one in published.of_table(table) if (one.pair, one.method) == (pair, method)
    )
    return found


def faults(run: Run, number: Published) -> list[str]:
    return other_method(run, number) + other_budget(run, number)


def test_the_run_of_a_recipe_is_compared_with_the_number_of_its_paper() -> None:
    comparable = [one for one in chosen() if not one.flag.startswith("other_")]
    found = {key_of(one): faults(run_of(one), one) for one in comparable}
    assert {key: fault for key, fault in found.items() if fault} == {}


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        ("features.crd.weight=1.6", "features.crd.weight=1.6"),
        ("features.crd.method.K=4096", "features.crd.method.K=4096"),
        ("optimizer=adamw", "optimizer=adamw"),
        ("distiller.ce_weight=0.5", "ce_weight=0.5"),
        ("optimizer.clip_norm=1", "optimizer.clip_norm=1"),
        ("dataset.views=weak_strong", "dataset.views=weak_strong"),
    ],
)
def test_a_run_of_other_settings_is_not(overrides: str, fault: str) -> None:
    crd = number("LSKD Table 2", "vgg13_vgg8", "crd")
    assert fault in faults(run_of(crd, *overrides.split()), crd)


@pytest.mark.parametrize(
    ("method", "overrides", "fault"),
    [
        ("dkd", "distiller.loss.beta=2", "distiller.loss.beta=2"),
        ("dkd", "distiller.warmup_epochs=1", "distiller.warmup_epochs=1"),
        ("kd", "distiller.temperature=2", "temperature=2"),
    ],
)
def test_a_run_of_another_loss_is_not(method: str, overrides: str, fault: str) -> None:
    one = number("LSKD Table 2", "vgg13_vgg8", method)
    assert faults(run_of(one, overrides), one) == [fault]


@pytest.mark.parametrize("unknown", [{"details": ""}, {"optimizer": ""}, {"temperature": None}])
def test_what_is_not_known_of_a_run_is_no_fault(unknown: dict[str, Any]) -> None:
    one = number("LSKD Table 2", "vgg13_vgg8", "dkd")
    assert faults(replace(run_of(one), **unknown), one) == []


@pytest.mark.parametrize(
    ("table", "pair", "method", "reason"),
    [
        ("TTM README CIFAR-100 identical", "vgg13_vgg8", "ttm", ""),
        ("TTM README CIFAR-100 identical", "vgg13_vgg8", "wttm", "settings are not known"),
        ("DIST README CIFAR-100", "resnet32x4_resnet8x4", "dist", ""),
        ("LumiNet README CIFAR-100 distinct", "resnet50_mobilev2", "kd_ls_batch", ""),
        ("LumiNet README ImageNet", "resnet34_resnet18", "kd_ls_batch", ""),
        ("SKD README CIFAR-100", "resnet32x4_resnet8x4", "skd", "settings are not known"),
    ],
)
def test_a_newer_loss_is_compared_if_the_readme_has_the_settings_of_the_recipe(
    table: str, pair: str, method: str, reason: str
) -> None:
    one = number(table, pair, method)
    found = faults(run_of(one), one)
    assert len(found) == bool(reason)
    assert all(reason in fault for fault in found)
