"""Test the papers' names of the methods, which persons read in tables of the terminal."""

from pathlib import Path

import pytest

from analysis.names import method_name
from analysis.schema import method_of
from sddlskd import config as cfg
from sddlskd.config import Config
from sddlskd.terminal.console import outcomes, run_title
from tests.conftest import Compose

RECIPES = sorted(
    path.stem for path in Path(__file__).parents[1].joinpath("conf", "recipe").glob("*.yaml")
)


def label_in_tables(job: Config) -> str:
    """Return what the tables of the analysis call the method of the job."""
    M = f"[{','.join(map(str, job.M))}]"
    return method_name(method_of(job.distiller.name, M, bool(job.standardize)))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_has_the_name_that_it_has_in_the_tables(compose: Compose, recipe: str) -> None:
    job = compose(f"recipe={recipe}")
    assert cfg.method_name(job) == label_in_tables(job)


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ("recipe=sd_kd_ls", "SD-KD+LS"),
        ("recipe=sd_kd_ls M=[1]", "KD+LS"),
        ("recipe=sd_dkd M=[2]", "SD-DKD"),
        ("recipe=nkd", "NKD"),
        ("recipe=vanilla", "student alone"),
        ("distiller.name=my_Loss M=[1] standardize=false", "my_Loss"),
        ("distiller.name=my_Loss", "SD-my_Loss+LS"),
    ],
)
def test_the_name_of_a_method(compose: Compose, overrides: str, name: str) -> None:
    job = compose(*overrides.split())
    assert cfg.method_name(job) == label_in_tables(job) == name


def test_a_run_has_a_title(compose: Compose) -> None:
    assert run_title(compose("student=resnet8")) == "resnet8 SD-KD+LS [1,2,4] seed 0"
    assert run_title(compose("recipe=vanilla", "student=resnet8", "seed=3")) == (
        "resnet8 student alone seed 3"
    )


def test_outcomes_name_the_method(
    compose: Compose, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    jobs = [compose("student=resnet8"), compose("recipe=vanilla", "student=resnet8")]
    result = {"status": "FINISHED", "reason": "", "best_top1": 71.239, "seconds": 61.0}
    outcomes(jobs, [result, {**result, "reason": "on [cpu]"}])
    rows = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines() if "│" in line]
    first, second = ([cell.strip() for cell in row] for row in rows)
    assert first[1:] == ["SD-KD+LS", "1,2,4", "0", "FINISHED", "71.24", "-", "1:01"]
    assert second[:5] == ["resnet8", "student alone", "1", "0", "FINISHED: on [cpu]"]
