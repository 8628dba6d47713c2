"""Test the papers' names of the methods, which persons read in tables of the terminal."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from analysis.coverage import recipe_of
from analysis.names import PAPERS_LOSSES, method_name
from analysis.published import numbers
from analysis.runs import _typed
from analysis.schema import Run, frame_of, runs_of
from sddlskd import config as cfg
from sddlskd.config import Config
from sddlskd.config.identity import METHOD_NAMES
from sddlskd.terminal.console import outcomes
from tests.conftest import Compose

RECIPES = sorted(
    path.stem for path in Path(__file__).parents[1].joinpath("conf", "recipe").glob("*.yaml")
)


def as_run(job: Config) -> Run:
    """Return the run of a job as the analysis reads it from MLflow."""
    row, problems = _typed({key: str(value) for key, value in cfg.flatten(job).items()})
    assert problems == []
    (run,) = runs_of(frame_of([row]))
    return run


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_has_one_name_everywhere(compose: Compose, recipe: str) -> None:
    job = compose(f"recipe={recipe}")
    run = as_run(job)
    assert job.recipe == run.recipe == recipe
    assert cfg.method_name(job) == method_name(run.method)
    # The published numbers of a method are looked up with its recipe.
    if run.method in {number.method for number in numbers()}:
        assert recipe in (recipe_of(run.method), "none")


def test_methods_have_the_same_names_in_the_program_and_in_the_tables() -> None:
    assert METHOD_NAMES.items() <= PAPERS_LOSSES.items()


def test_every_loss_and_method_of_the_package_has_the_name_of_its_paper() -> None:
    known = {
        path.stem
        for group in ("distiller", "features")
        for path in Path(__file__).parents[1].joinpath("conf", group).glob("*.yaml")
    }
    assert known - {"features_only", "vanilla"} == METHOD_NAMES.keys()


def test_jobs_that_differ_in_the_recipe_alone_are_the_same_job(compose: Compose) -> None:
    job = compose("recipe=kd")
    other = replace(job, recipe="none")
    assert cfg.config_hash(job) == cfg.config_hash(other)
    assert cfg.sharing_key(job) == cfg.sharing_key(other)
    assert cfg.run_name(job) == cfg.run_name(other)


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ("recipe=sd_kd_ls", "SD-KD+LS"),
        ("recipe=sd_kd_ls M=[1]", "KD+LS"),
        ("recipe=sd_dkd M=[2]", "SD-DKD"),
        ("recipe=nkd", "NKD"),
        ("recipe=vanilla", "student alone"),
        ("recipe=sd_kd_ls features=[crd,sp]", "SD-KD+LS+CRD+SP"),
        ("recipe=ctkd_ls M=[1,2] optimizer=dot", "SD-CTKD+LS+DOT"),
        ("recipe=dkd_ctkd M=[1,2] standardize=true", "SD-DKD+CTKD+LS"),
        ("distiller.name=my_Loss M=[1] standardize=false", "my_Loss"),
        ("recipe=semckd", "SemCKD"),
        ("recipe=semckd distiller=features_only", "SemCKD without KD"),
        ("distiller.name=my_Loss", "SD-my_Loss+LS"),
        ("distiller.name=My-Loss M=[1] standardize=false", "My-Loss"),
        ("recipe=luminet M=[1,2]", "SD-LumiNet"),
        ("recipe=normkd", "NormKD"),
        ("recipe=sd_dkd standardize=batch", "SD-DKD+BS"),
        ("recipe=ctkd standardize=class_scaled", "CTKD+CS"),
    ],
)
def test_the_name_of_a_method(compose: Compose, overrides: str, name: str) -> None:
    job = compose(*overrides.split())
    assert cfg.method_name(job) == method_name(as_run(job).method) == name


@pytest.mark.parametrize("name", ["KD", "kd", "sd_kd", "DKD+LS", "student alone"])
def test_own_code_has_no_name_of_a_published_method(compose: Compose, name: str) -> None:
    own = ("distiller.loss={_target_:my.loss}", "allow_foreign_targets=true", "recipe=kd")
    with pytest.raises(ValueError, match=rf"distiller.name={re.escape(name)} gives my.loss"):
        compose(*own, f"distiller.name='{name}'")
    assert compose(*own, "distiller.name=JS").distiller.name == "JS"
    assert compose("recipe=kd", "distiller.name=KD")  # the package's own loss


def test_a_run_has_a_title(compose: Compose) -> None:
    job = compose("student=resnet8")
    assert cfg.title(job) == "SD-KD+LS [1,2,4] seed 0, resnet8"
    assert cfg.title(job, seed=False) == "SD-KD+LS [1,2,4], resnet8"
    teacher = cfg.teacher_name(job)
    assert cfg.title(job, teacher=True) == f"SD-KD+LS [1,2,4] seed 0, {teacher} -> resnet8"
    slower = compose("student=resnet8", "optimizer.lr=0.01")
    assert cfg.titles([job, slower])[1] == "SD-KD+LS [1,2,4] seed 0, resnet8 (optimizer.lr=0.01)"
    assert cfg.title(compose("recipe=vanilla", "student=resnet8", "seed=3")) == (
        "student alone seed 3, resnet8"
    )


def test_outcomes_tell_jobs_of_one_method_by_their_settings(
    compose: Compose, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    jobs = [compose(f"distiller.temperature={T}") for T in (2, 4.25)] + [compose("seed=1")]
    outcomes(jobs, 3 * [{"status": "FINISHED", "reason": "", "seconds": 61.0}])
    rows = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert [row[3].strip() for row in rows] == [
        "temperature=2", "temperature=4.25", "",
    ]  # fmt: skip


def test_outcomes_say_once_that_there_is_no_teacher_file(
    compose: Compose, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = ("recipe=vanilla", "student=resnet8", "dataset.train_fraction=0.5")
    jobs = [compose(*alone, f"seed={seed}") for seed in (0, 1)]
    result = {"status": "FINISHED", "reason": "", "best_top1": 71.2, "seconds": 61.0}
    for count, folder in ((1, jobs[0].run_dir), (2, "RUN_DIRECTORY")):
        outcomes(jobs[:count], [result] * count)
        told = capsys.readouterr().out
        assert told.count("what was trained alone (resnet8) is not written as a teacher file") == 1
        assert f"teacher.checkpoint={folder}/best.ckpt" in told


def test_outcomes_name_the_method(
    compose: Compose, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    jobs = [compose("student=resnet8"), compose("recipe=vanilla", "student=resnet8")]
    result = {"status": "FINISHED", "reason": "", "best_top1": 71.239, "seconds": 61.0}
    outcomes(jobs, [result, {**result, "reason": "on [cpu]"}])
    rows = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines() if "│" in line]
    # The student alone comes first, as in the tables of the analysis.
    second, first = ([cell.strip() for cell in row] for row in rows)
    assert first[1:] == ["SD-KD+LS", "1,2,4", "0", "FINISHED", "71.24", "-", "1:01"]
    assert second[:5] == ["resnet8", "student alone", "1", "0", "FINISHED: on [cpu]"]


@pytest.mark.parametrize("columns", [52, 56, 72, 100])
def test_outcomes_break_lines_between_words_only(
    columns: int,
    compose: Compose,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    pair = ["teacher=resnet32x4", "student=shufflev1"]
    jobs = [
        compose(*pair, f"distiller.temperature={T}", f"dataset.train_fraction={part}", recipe)
        for T, part in ((2, 0.25), (4.25, 0.5))
        for recipe in ("recipe=kd", "recipe=crd")
    ]
    outcomes(jobs, len(jobs) * [{"status": "FINISHED", "reason": "", "seconds": 3661.0}])
    out = capsys.readouterr().out
    table, _, below = out.partition("records in ")
    assert max(map(len, table.splitlines())) <= columns
    words = set(re.split(r"[\s│┃]+", table))
    assert {"resnet32x4", "shufflev1", "FINISHED", "1:01:01"} <= words
    for job, text in zip(jobs, cfg.differing_settings(jobs), strict=True):
        assert set(text.split()) <= words, cfg.run_name(job)
    assert ("(1)" in words) == (columns < 72)  # settings that have no room stand below the table
    assert below.startswith(jobs[0].home)


def test_long_reasons_stand_below_the_outcomes_unbroken_and_once(
    compose: Compose, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    reason = "ValueError: trainer.device=cuda:0 needs CUDA, and none is available here; use cpu"
    results = [
        {"status": status, "reason": reason, "seconds": 1.0} for status in ("FAILED", "PRUNED")
    ]
    jobs = [compose("teacher=resnet32x4", "student=shufflev1", f"seed={seed}") for seed in (0, 1)]
    with pytest.raises(SystemExit):
        outcomes(jobs, results, then="table: next")
    out = capsys.readouterr().out
    lines = out.partition("records in ")[0].splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == "resnet32x4 -> shufflev1"  # the pair that all rows share
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line]
    assert [cell[3] for cell in cells] == ["FAILED [1]", "PRUNED [1]"]
    below = " ".join(line.strip() for line in lines[lines.index(lines[-2]) :])
    assert below == f"[1] {reason}"
    assert out.endswith("table: next\n")
