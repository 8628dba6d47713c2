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

from sddlskd import config as cfg
from sddlskd.config import Config
from sddlskd.sweeps import groups_of
from sddlskd.sweeps.grid import compose_grid
from sddlskd.training.build import teacher_path

REPO = Path(__file__).parent.parent
SUITES = sorted(path.stem for path in (REPO / "sweeps").glob("*.yaml"))


@cache
def jobs_of(suite: str) -> list[Config]:
    """Return the jobs that `python -m sddlskd.train -m -cd sweeps -cn SUITE` runs."""
    cfg.frame()
    search = create_config_search_path(str(files("sddlskd.conf")))
    search.prepend("command-line", f"file://{REPO / 'sweeps'}")
    loader = ConfigLoaderImpl(search)
    sweep = loader.load_configuration(suite, [], RunMode.MULTIRUN)
    params = sweep.hydra.sweeper.params or {}
    overrides = OverridesParser.create().parse_overrides(
        [f"{key}={value}" for key, value in params.items()]
    )
    (grid,) = BasicSweeper.split_arguments(overrides, None)
    lines = [line.split() for line in sweep.sweep.jobs] or [[]]
    return compose_grid(loader, sweep, [[*one, *line] for one in grid for line in lines])


@pytest.mark.parametrize("suite", SUITES)
def test_the_header_says_what_the_suite_is(suite: str) -> None:
    header = (REPO / "sweeps" / f"{suite}.yaml").read_text().split("defaults:")[0]
    jobs = jobs_of(suite)
    assert re.search(rf"# Command: +python -m sddlskd.train (-m )?-cd sweeps -cn {suite}\b", header)
    assert (
        int(re.search(r"# Jobs: +(\d+)", header)[1])
        == len({job.run_dir for job in jobs})
        == len(jobs)
    )
    assert "# Cost:" in header
    passes = re.search(r"goes through the data (\d+) times an epoch instead of (\d+)", header)
    if passes:
        taught = [job for job in jobs if job.distiller.loss]
        assert [int(number) for number in passes.groups()] == [len(groups_of(taught)), len(taught)]


@pytest.mark.parametrize("suite", SUITES)
def test_one_teacher_is_trained_in_one_way_whoever_asks_first(suite: str) -> None:
    ways: dict[str, set[str]] = {}
    for job in jobs_of(suite):
        if job.distiller.loss:
            ways.setdefault(str(teacher_path(job)), set()).add(
                cfg.config_hash(cfg.teacher_job(job))
            )
    assert [file for file, hashes in ways.items() if len(hashes) != 1] == []


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
    assert {tuple(job.M) for job in table6 if job.student.name == "shufflev1"} == {(1, 2, 4)}
    assert {tuple(job.M) for job in table6 if job.student.name == "resnet8x4"} == {(1, 2)}
    assert {tuple(job.M) for job in jobs_of("sdd_table7")} == {(1,), (1, 2), (1, 4), (1, 2, 4)}
    assert not any(job.standardize for job in jobs_of("sdd_table7"))
    assert [job.complementary_weight for job in jobs_of("sdd_table8")] == [1, 2, 4, 6, 8]
    for suite in ("lskd_identical", "lskd_distinct"):
        jobs = jobs_of(suite)
        assert len({short(job)[:2] for job in jobs}) == 7
        assert sum(job.standardize for job in jobs) == len(jobs) // 2
        assert all(job.M == [1] for job in jobs)
    fusion = jobs_of("fusion")
    assert {job.seed for job in fusion} == set(range(5))
    assert len({short(job)[:2] for job in fusion}) == 20
    assert all(
        (job.distiller.ce_weight, job.distiller.kd_weight, job.M) == (1.0, 9.0, [1, 2, 4])
        for job in fusion
    )


SDD = {"kd", "sd_kd", "dkd", "sd_dkd", "nkd", "sd_nkd"}


def method(job: Config) -> str:
    return ("sd_" if job.M != [1] else "") + job.distiller.name + ("_ls" if job.standardize else "")


@pytest.mark.parametrize(
    ("suite", "dataset", "methods", "pairs"),
    [
        ("sdd_table3", "imagenet", SDD, {"resnet34_resnet18"}),
        ("sdd_table4", "imagenet", SDD, {"resnet50_mobilev1"}),
        ("lskd_table3", "imagenet", {"kd", "kd_ls", "dkd", "dkd_ls"},
         {"resnet34_resnet18", "resnet50_mobilev1"}),
        ("sdd_table5", "cub200", SDD, {"resnet32x4_mobilev2", "resnet32x4_shufflev1",
                                       "vgg13_mobilev2", "vgg13_vgg8", "resnet50_shufflev1"}),
    ],
)  # fmt: skip
def test_the_tables_of_large_images(
    suite: str, dataset: str, methods: set[str], pairs: set[str]
) -> None:
    jobs = jobs_of(suite)
    cells = {(f"{job.teacher.name}_{job.student.name}", method(job)) for job in jobs}
    assert cells == {(pair, name) for pair in pairs for name in methods}
    expected = {
        "imagenet": (100, 512, [30, 60, 90], 1e-4), "cub200": (240, 64, [150, 180, 210], 5e-4),
    }[dataset]  # fmt: skip
    for job in jobs:
        o, t = job.optimizer, job.trainer
        steps = [round(part * t.epochs) for part in o.milestones]
        assert (t.epochs, t.batch_size, steps, o.algorithm["weight_decay"]) == expected
        assert o.lr == (
            0.2 if dataset == "imagenet" else 0.05 if job.student.name == "vgg8" else 0.01
        )
        several = [1, 2] if job.student.name == "resnet18" else [1, 2, 4]
        assert (several if method(job).startswith("sd_") else [1]) == job.M
        assert (job.dataset.name, job.dataset.size) == (dataset, 224)


@pytest.mark.parametrize("suite", ["sdd_table3", "sdd_table4", "sdd_table5", "lskd_table3"])
def test_the_header_expects_the_published_numbers(suite: str) -> None:
    table = suite.replace("sdd_table", "SDD Table ").replace("lskd_table", "LSKD Table ")
    with open(REPO / "analysis/reference/published.csv", newline="") as file:
        printed = {(f"{r['teacher']}_{r['student']}", r["method"]): r["value"]
                   for r in csv.DictReader(file)
                   if (r["table"], r["metric"]) == (table, "top1")}  # fmt: skip
    header = (REPO / "sweeps" / f"{suite}.yaml").read_text().split("defaults:")[0]
    said = {
        pair: line
        for pair, line in re.findall(
            r"^#\s+(?:Expect:\s+)?(\w+_\w+): (kd .*)$", header, re.MULTILINE
        )
    }
    jobs = jobs_of(suite)
    assert said.keys() == {f"{job.teacher.name}_{job.student.name}" for job in jobs}
    for job in jobs:
        pair = f"{job.teacher.name}_{job.student.name}"
        assert f"{method(job)} {printed[pair, method(job)]}" in said[pair].split(", ")


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
