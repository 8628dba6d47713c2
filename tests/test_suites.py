"""Test every file of sweeps/: the number and the values of its jobs."""

import csv
import re
from functools import cache
from importlib.resources import files
from pathlib import Path

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import create_config_search_path
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig

from analysis import published
from analysis.coverage import recipe_of
from sddlskd import config as cfg
from sddlskd.config import Config
from sddlskd.sweeps import groups_of
from sddlskd.sweeps.grid import compose_grid
from sddlskd.training.checks import teacher_path

REPO = Path(__file__).parent.parent
SUITES = sorted(path.stem for path in (REPO / "sweeps").glob("*.yaml"))


# Hydra composes each pair with each recipe anew, which takes a tenth of a second. Of a larger grid,
# only the first pair with every recipe and every pair with the first recipe are composed.
COMPOSED_WHOLE = 8
CHOICES = ("pair=", "recipe=")


@cache
def loader() -> ConfigLoaderImpl:
    """Return Hydra's loader of the suites and of conf/."""
    cfg.frame()
    search = create_config_search_path(str(files("sddlskd.conf")))
    search.prepend("command-line", f"file://{REPO / 'sweeps'}")
    return ConfigLoaderImpl(search)


@cache
def suite_of(name: str) -> tuple[DictConfig, list[list[str]]]:
    """Return the configuration of a suite, and the overrides of each of its jobs."""
    sweep = loader().load_configuration(name, [], RunMode.MULTIRUN)
    params = sweep.hydra.sweeper.params or {}
    overrides = OverridesParser.create().parse_overrides(
        [f"{key}={value}" for key, value in params.items()]
    )
    (grid,) = BasicSweeper.split_arguments(overrides, None)
    lines = [line.split() for line in sweep.sweep.jobs] or [[]]
    return sweep, [[*one, *line] for one in grid for line in lines]


def chosen(name: str) -> list[list[str]]:
    """Return the overrides of the jobs of a suite that the tests compose."""
    _, grid = suite_of(name)
    choices = [[text for text in one if text.startswith(CHOICES)] for one in grid]
    if len(grid) <= COMPOSED_WHOLE or len(choices[0]) < len(CHOICES):
        return grid
    return [
        one for one, own in zip(grid, choices, strict=True) if not set(own).isdisjoint(choices[0])
    ]


@cache
def jobs_of(name: str) -> list[Config]:
    """Return the jobs of `python -m sddlskd.train -m -cd sweeps -cn NAME` that are `chosen`."""
    sweep, _ = suite_of(name)
    return compose_grid(loader(), sweep, chosen(name))


def number_of_jobs(grid: list[list[str]]) -> int:
    """Return the number of different jobs: a student alone is the same job with every teacher."""
    jobs = set()
    for one in grid:
        words = one
        if "recipe=vanilla" in one:
            words = [student_of(text) if text.startswith("pair=") else text for text in one]
        jobs.add(tuple(words))
    return len(jobs)


def student_of(pair: str) -> str:
    text = (REPO / "conf" / "pair" / f"{pair.removeprefix('pair=')}.yaml").read_text()
    return re.search(r"override /student: (\w+)", text)[1]


@pytest.mark.parametrize("suite", SUITES)
def test_the_header_says_what_the_suite_is_and_teachers_do_not_depend_on_the_order(
    suite: str,
) -> None:
    header = (REPO / "sweeps" / f"{suite}.yaml").read_text().split("defaults:")[0]
    _, grid = suite_of(suite)
    jobs = jobs_of(suite)
    assert re.search(rf"# Command: +python -m sddlskd.train (-m )?-cd sweeps -cn {suite}\b", header)
    assert int(re.search(r"# Jobs: +(\d+)", header)[1]) == number_of_jobs(grid)
    assert len({job.run_dir for job in jobs}) == number_of_jobs(chosen(suite))
    assert "# Cost:" in header
    passes = re.search(r"goes through the data (once|\d+ times) an epoch instead of (\d+)", header)
    if passes:
        taught = [job for job in jobs if job.has_teacher]
        often = "once"
        if len(groups_of(taught)) > 1:
            often = f"{len(groups_of(taught))} times"
        assert passes.groups() == (often, str(len(taught)))

    assert teachers_trained_in_several_ways(jobs) == []


def teachers_trained_in_several_ways(jobs: list[Config]) -> list[str]:
    """Return the teacher files for which it matters whose job trains them first."""
    ways: dict[str, set[str]] = {}
    for job in jobs:
        if job.has_teacher:
            ways.setdefault(str(teacher_path(job)), set()).add(
                cfg.config_hash(cfg.teacher_job(job))
            )
    return [file for file, hashes in ways.items() if len(hashes) != 1]


def short(job: Config) -> tuple[str, str, str]:
    return job.teacher.name, job.student.name, str(job.M).replace(" ", "")


def test_the_seed_suite_is_the_seeds() -> None:
    with open(REPO / "tests/reference/seed_suite.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 20
    for part in ("1", "2", "3"):
        expected = [(r["teacher"], r["student"], r["M"]) for r in rows if r["part"] == part]
        assert sorted(map(short, jobs_of(f"seed_part{part}"))) == sorted(expected)
    assert sorted(map(short, jobs_of("seed"))) == sorted(
        (r["teacher"], r["student"], r["M"]) for r in rows
    )
    for job, row in (
        (job, row)
        for job in jobs_of("seed")
        for row in rows
        if short(job) == (row["teacher"], row["student"], row["M"])
    ):
        d, o, t = job.distiller, job.optimizer, job.trainer
        assert (d.name, d.temperature, d.ce_weight, d.kd_weight) == (
            "kd",
            float(row["temperature"]),
            float(row["ce_weight"]),
            float(row["kd_weight"]),
        )
        assert job.standardize
        assert d.loss["temperature"] == 2.0
        assert (t.epochs, t.batch_size) == (int(row["epochs"]), int(row["batch_size"]))
        assert [part * t.epochs for part in o.milestones] == [150, 180, 210]
        # The suite has the papers' rates, where the seed project had 0.05 for every student.
        assert o.lr == (0.01 if job.student.name in ("mobilev2", "shufflev1") else float(row["lr"]))


def test_the_papers_tables() -> None:
    table6 = jobs_of("sdd_table6")
    assert {job.distiller.knowledge.value for job in table6} == {
        "fusion",
        "consistent",
        "complementary",
    }
    sd_kd = [job for job in table6 if job.recipe == "sd_kd"]
    assert {tuple(job.M) for job in sd_kd if job.student.name == "shufflev1"} == {(1, 2, 4)}
    assert {tuple(job.M) for job in sd_kd if job.student.name == "resnet8x4"} == {(1, 2)}
    assert {tuple(job.M) for job in jobs_of("sdd_table7")} == {(1,), (1, 2), (1, 4), (1, 2, 4)}
    assert not any(job.standardize for job in jobs_of("sdd_table7"))
    assert [job.complementary_weight for job in jobs_of("sdd_table8")] == [1, 2, 4, 6, 8]
    for suite in ("lskd_table1", "lskd_table2"):
        jobs = jobs_of(suite)
        assert {job.recipe for job in jobs if job.standardize} == {"kd_ls", "ctkd_ls", "dkd_ls"}
        assert all(job.M == [1] for job in jobs)
    fusion = jobs_of("fusion")
    assert {job.seed for job in fusion} == set(range(5))
    assert len({short(job)[:2] for job in fusion}) == 20
    assert all(
        (job.distiller.ce_weight, job.distiller.kd_weight, job.M) == (1.0, 9.0, [1, 2, 4])
        for job in fusion
    )


@pytest.mark.parametrize("suite", ["sdd_table3", "sdd_table4", "lskd_table3", "sdd_table5"])
def test_the_tables_of_large_images(suite: str) -> None:
    jobs = [job for job in jobs_of(suite) if job.has_teacher]
    dataset = "cub200" if suite == "sdd_table5" else "imagenet"
    expected = {
        "imagenet": (100, 512, [30, 60, 90], 1e-4), "cub200": (240, 64, [150, 180, 210], 5e-4),
    }[dataset]  # fmt: skip
    for job in jobs:
        o, t = job.optimizer, job.trainer
        steps = [round(part * t.epochs) for part in o.milestones]
        if job.recipe not in ("mlkd", "mlkd_ls", "ofd", "reviewkd"):  # they have their own
            assert (t.epochs, t.batch_size, steps, o.algorithm["weight_decay"]) == expected
            assert o.lr == (
                0.2 if dataset == "imagenet" else 0.05 if job.student.name == "vgg8" else 0.01
            )
        several = [1, 2] if job.student.name == "resnet18" else [1, 2, 4]
        assert (several if job.recipe.startswith("sd_") else [1]) == job.M
        assert (job.dataset.name, job.dataset.size) == (dataset, 224)


TABLES = {
    **{f"sdd_table{number}": f"SDD Table {number}" for number in (1, 2, 3, 4, 5, 9)},
    "sdd_appendix_a": "SDD Appendix 6.1a (combination with feature distillation)",
    "sdd_appendix_b": "SDD Appendix 6.1b (SP on pooled features)",
    **{f"lskd_table{number}": f"LSKD Table {number}" for number in (1, 2, 3, 5)},
    "crd_identical": "CRD README CIFAR-100 identical",
    "crd_fsp": "CRD README CIFAR-100 identical",
    "crd_distinct": "CRD README CIFAR-100 distinct",
    "dot": "mdistiller README DOT cifar100",
    "dot_imagenet": "mdistiller README DOT imagenet",
}
"""Table of each suite that has a job for every number of the table."""


@pytest.mark.parametrize("suite", TABLES)
def test_a_suite_has_the_rows_of_its_table_and_says_the_numbers(suite: str) -> None:
    printed = {
        (number.pair, recipe_of(number.method)): number.value
        for metric in ("top1", "ms_per_batch")
        for number in published.of_table(TABLES[suite], metric)
        if number.method != "teacher"
        # WCoRD has no released code (docs/methods.md).
        and number.method != "wcord"
        # FSP, which needs equal channels, has a suite of its own.
        and (number.method == "fsp") == (suite == "crd_fsp")
    }
    _, grid = suite_of(suite)
    cells = {
        (pair.removeprefix("pair=").replace("imagenet_", ""), recipe.removeprefix("recipe="))
        for pair, recipe in grid
    }
    assert printed.keys() <= cells  # a table may leave cells of its rows empty
    assert {recipe for _, recipe in cells} == {recipe for _, recipe in printed}
    header = (REPO / "sweeps" / f"{suite}.yaml").read_text().split("defaults:")[0]
    expect = re.search(r"# Expect:(.*?)\n# [A-Z]", header, re.DOTALL)[1]
    words = " ".join(expect.replace("#", " ").split())
    said = {
        (pair, recipe): float(value)
        for pair, line in re.findall(r"(\w+): ([^:]*)(?= \w+:|$)", words)
        for recipe, value in re.findall(r"(\w+) ([\d.]+)", line)
    }
    assert said == printed


def test_the_seeds_cub200_suite() -> None:
    jobs = jobs_of("seed_cub")
    pairs = (
        "resnet32x4_resnet8x4",
        "resnet32x4_shufflev1",
        "resnet32x4_mobilev2",
        "wrn_40_2_shufflev1",
    )
    cells = {(f"{job.teacher.name}_{job.student.name}", tuple(job.M)) for job in jobs}
    assert cells == {(pair, M) for pair in pairs for M in ((1,), (1, 2), (1, 2, 4))}
    for job in jobs:  # source: experiments_seed.csv, part cub
        d = job.distiller
        assert (d.temperature, d.ce_weight, d.kd_weight, job.standardize, job.optimizer.lr) == (
            2.0,
            1.0,
            9.0,
            True,
            0.01,
        )
