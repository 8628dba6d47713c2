"""Test the rule that adds seeds until a sweep's gains are decided."""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra._internal.callbacks import Callbacks
from hydra.types import HydraContext
from hydra_plugins.shared_teacher import SharedTeacherLauncher

from analysis import stats, tables
from analysis.runs import _typed
from analysis.schema import frame_of
from sddlskd import config as cfg
from sddlskd import record
from sddlskd.config import Config
from sddlskd.record import read_result
from sddlskd.sweeps import until_decided
from sddlskd.sweeps.baselines import comparison_lines, find_baselines
from sddlskd.sweeps.grid import InvalidJobs
from sddlskd.sweeps.manifest import read_manifest
from sddlskd.sweeps.pool import Pool
from sddlskd.sweeps.status import status_of
from sddlskd.sweeps.until_decided import Comparison, compare, run_until_decided
from tests.composing import REPO, loader_of
from tests.tiny import ForkedCommand, composed

MOST = 10
COMMON = ("dataset=digits", "teacher=resnet8", "tracking=none")


def numbered(*columns: Sequence[float]) -> list[Mapping[int, float]]:
    return [dict(enumerate(column)) for column in columns]


def test_a_clear_gain_needs_three_seeds_and_an_unclear_one_another() -> None:
    numbers = numbered([70.0, 70.3, 69.8], [80.0, 80.2, 79.9], [70.4, 69.9, 70.6])
    (clear, unclear), missing = compare(numbers, {1: 0, 2: 0}, MOST)
    assert clear.decided
    assert (clear.seeds, clear.gain) == (3, pytest.approx(10.0))
    assert not unclear.decided
    assert missing == [(0, 3), (2, 3)]


def test_missing_first_seeds_come_first() -> None:
    comparisons, missing = compare(numbered([70.0], [71.0, 71.5]), {1: 0}, MOST)
    assert comparisons == [Comparison(1, 0, gain=pytest.approx(np.nan, nan_ok=True))]
    assert missing == [(0, 1), (0, 2), (1, 2)]


def test_the_largest_number_of_seeds_ends_a_sweep() -> None:
    numbers = numbered([70.0, 70.5, 69.5, 70.2], [70.1, 70.4, 69.7, 70.1])
    ((comparison,), missing) = compare(numbers, {1: 0}, 4)
    assert not comparison.decided
    assert missing == []


def test_equal_numbers_decide_nothing() -> None:
    ((comparison,), _) = compare(numbered([70.0] * 3, [71.0] * 3), {1: 0}, MOST)
    assert comparison.p == 1.0


def test_more_seeds_than_decided_it_change_nothing() -> None:
    numbers = numbered([70.0, 70.3, 69.8], [80.0, 80.2, 79.9])
    more = numbered([70.0, 70.3, 69.8, 90.0], [80.0, 80.2, 79.9, 10.0])
    assert compare(numbers, {1: 0}, MOST) == compare(more, {1: 0}, MOST)


@pytest.mark.parametrize("n", [3, 5])
def test_tables_and_sweeps_compute_one_p(n: int) -> None:
    ours, theirs = [70.3, 70.9, 69.9, 70.6, 70.4][:n], [70.0, 70.6, 69.8, 70.1, 70.5][:n]
    ((comparison,), _) = compare(numbered(theirs, ours), {1: 0}, n)
    shown = stats.sequential(dict(enumerate(ours)), dict(enumerate(theirs)), n - 2)
    assert shown is not None
    assert comparison.seeds == n  # undecided at every look
    assert comparison.p == pytest.approx(shown.p)
    alone = stats.welch(ours, theirs)
    assert shown.p == pytest.approx(min(1.0, (n - 2) * (alone.p or 0)))
    assert shown.half_width() == pytest.approx(alone.half_width(1 - 0.05 / (n - 2)))


def simulated(gains: Sequence[float], repeats: int) -> tuple[float, float, float]:
    """Return what sweeps of cells with these true gains over a baseline do.

    The standard deviation over seeds is 0.5.

    Returns:
        The fraction of sweeps that decide a cell whose true gain is zero, the fraction of the other
        cells that are decided, and the mean number of seeds of a cell.
    """
    rng = np.random.default_rng(0)
    baselines = dict.fromkeys(range(1, len(gains) + 1), 0)
    shift = np.array([0.0, *gains])[:, None]
    wrong, right, seeds = 0, 0, 0
    for _ in range(repeats):
        drawn = rng.normal(70, 0.5, (len(gains) + 1, MOST)) + shift
        comparisons, _ = compare(numbered(*drawn.tolist()), baselines, MOST)
        decided = {one.cell for one in comparisons if one.decided}
        wrong += any(gains[cell - 1] == 0 for cell in decided)
        right += sum(gains[cell - 1] != 0 for cell in decided)
        seeds += sum(one.seeds for one in comparisons)
    others = max(1, sum(gain != 0 for gain in gains))
    return wrong / repeats, right / (repeats * others), seeds / (repeats * len(gains))


def test_the_error_of_a_sweep_is_below_its_bound() -> None:
    wrong, _, _ = simulated((0.0, 0.0), 200)
    # The bound is 0.05; 2 standard errors of 200 sweeps are 0.03.
    assert wrong <= until_decided.ALPHA + 0.03


def test_true_gains_are_decided() -> None:
    _, right, seeds = simulated((1.0, 1.5), 60)
    assert right > 0.9
    assert seeds < MOST


def job(home: Path, *overrides: str) -> Config:
    return composed(home, *COMMON, *overrides)


def test_each_method_has_the_baseline_of_the_tables(tmp_path: Path) -> None:
    cells = [
        job(tmp_path, *overrides)
        for overrides in (
            ["recipe=vanilla"],
            ["recipe=kd"],
            ["recipe=kd_ls"],
            ["recipe=sd_kd_ls", "scales=three"],
            ["recipe=crd"],
            ["recipe=kd", "student=resnet14"],
            ["recipe=kd", "trainer.epochs=7"],
        )
    ]
    # The last two have another student and another budget, so nothing is their baseline.
    assert find_baselines(cells) == {1: 0, 2: 1, 3: 2, 4: 0}
    assert find_baselines(cells, "KD+LS") == {1: 2, 3: 2, 4: 2}


GRIDS = {
    "overview": ["vanilla", "kd", "kd_ls", "sd_kd M=[1,2]", "sd_kd_ls M=[1,2]", "crd", "sd_kd_crd"],
    "no student alone": ["kd", "kd_ls", "sd_kd_ls M=[1,2]", "dkd", "dot"],
    "no KD+LS": ["vanilla", "kd", "sd_kd M=[1,2]", "sd_kd_ls M=[1,2]"],
    "features": ["vanilla", "sp", "sd_sp", "crd", "semckd", "kd"],
    "others": ["vanilla", "kd", "luminet", "normkd", "ctkd", "dkd_ctkd", "dkd", "kd_ls", "dot"],
    "two rates": [
        f"{one} optimizer.lr={lr}" for one in ("vanilla", "kd", "kd_ls") for lr in (0.1, 0.2)
    ],
    "two temperatures": [
        "vanilla",
        *(f"{one} distiller.temperature={T}" for one in ("kd", "kd_ls") for T in (2, 4)),
    ],
    "precisions": ["vanilla", "kd trainer.precision=bf16", "kd_ls trainer.precision=bf16"],
}


@pytest.mark.parametrize("grid", GRIDS)
def test_a_sweep_decides_the_gains_of_the_tables(tmp_path: Path, grid: str) -> None:
    cells = [job(tmp_path, f"recipe={one.split()[0]}", *one.split()[1:]) for one in GRIDS[grid]]
    found = find_baselines(cells)
    rows = []
    for index, cell in enumerate(cells):
        row, problems = _typed({key: str(value) for key, value in cfg.flatten(cell).items()})
        assert problems == []
        for seed in range(2):
            more = {"status": "FINISHED", "seed": seed, "best": 50.0 + index + 0.1 * seed}
            rows.append(
                {**row, **more, "run_id": f"{index}-{seed}", "config_hash": f"{index}{seed}"}
            )
    (table,) = [one for one in tables.build(frame_of(rows)) if one.name == "overview_digits"]
    shown = {
        round((cell.mean or 0) - 50.05): round((cell.gain.base.mean or 0) - 50.05)
        for cell in table.cells.values()
        if cell.gain
    }
    assert found == shown


def test_several_baselines_are_told_apart_by_temperature(tmp_path: Path) -> None:
    cells = [
        job(tmp_path, "recipe=kd", f"distiller.temperature={t}", f"M=[{m}]")
        for t in (2, 4)
        for m in (1, "1,2")
    ]
    assert find_baselines(cells) == {1: 0, 3: 2}


def finish(one: Config) -> None:
    record.freeze(one)
    record.write_text(Path(one.run_dir, "result.json"), '{"status": "FINISHED"}')


def test_a_plan_names_what_tables_will_not_compare(tmp_path: Path) -> None:
    kd, kd_ls = job(tmp_path, "recipe=kd"), job(tmp_path, "recipe=kd_ls")
    both, again = (job(tmp_path, "recipe=sd_kd_ls", "scales=three", f"seed={n}") for n in (0, 1))
    lack = "SD-KD+LS [1,2,4]: no comparable KD+LS in this sweep or among finished runs, so"
    one_seed = "one seed of each method: tables show no interval; seed=0,1,2 gives one"
    assert comparison_lines([kd, both]) == [f"{lack} its gain is over KD", one_seed]
    assert comparison_lines([both, again]) == [f"{lack} tables show no gain of it"]
    # A student alone of another budget, which the sweep does not have, changes nothing.
    dkd = job(tmp_path, "recipe=dkd")
    over_kd = "DKD: no comparable student alone in this sweep or among finished runs, so its gain"
    assert comparison_lines([kd, dkd]) == [f"{over_kd} is over KD", one_seed]
    finish(job(tmp_path, "recipe=vanilla", "trainer.epochs=9"))
    assert comparison_lines([kd, dkd]) == [f"{over_kd} is over KD", one_seed]
    clipped = job(tmp_path, "recipe=sd_kd", "M=[1]")
    assert comparison_lines([kd, clipped, dkd]) == [f"{over_kd} is over KD", one_seed]
    finish(kd_ls)
    assert comparison_lines([kd, both]) == [one_seed]
    assert comparison_lines([kd_ls, both, again]) == []
    finish(again)
    assert comparison_lines([kd, both]) == []
    # A damaged record is that of no finished run, and no reason to refuse a plan.
    Path(again.run_dir, "result.json").write_text("{")
    assert comparison_lines([kd, both]) == [one_seed]


def test_a_sweep_without_a_baseline_is_refused(tmp_path: Path) -> None:
    cells = [job(tmp_path, "recipe=kd_ls"), job(tmp_path, "recipe=crd")]
    with pytest.raises(ValueError, match="no job of this sweep has a baseline in it; it has KD"):
        find_baselines(cells)
    with pytest.raises(ValueError, match=r"sweep.baseline=DKD is no method of this sweep; it has"):
        find_baselines(cells, "DKD")


class Trained:
    """A stand-in for `run_sweep` that writes results in place of training."""

    def __init__(self, scores: Mapping[str, Sequence[float]], **others: float) -> None:
        self.scores, self.others = scores, others
        self.name = "best_mAP" if "best_top1" in others else "best_top1"
        self.rounds: list[int] = []  # number of jobs that were not finished, by round

    def __call__(self, jobs: Sequence[Config], name: str, **options: Any) -> list[dict[str, Any]]:
        new = [job for job in jobs if not Path(job.run_dir, "result.json").exists()]
        self.rounds.append(len(new))
        for one in new:
            score = self.scores[cfg.method_name(one)][one.seed]
            result = {"status": "FINISHED", "reason": "", self.name: score, "seconds": 1.0}
            result |= self.others
            Path(one.run_dir).mkdir(parents=True)
            Path(one.run_dir, "result.json").write_text(json.dumps(result))
        return [until_decided.result_of(job) for job in jobs]


def test_the_seeds_of_a_sweeps_file_give_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader, sweep = loader_of(
        [*COMMON, f"home={tmp_path}", "sweep.name=test", "sweep.seeds=until_decided"]
    )
    given: list[Any] = []

    def run(cells: Any, *_: Any, **__: Any) -> tuple[list[Any], list[Any], list[Any]]:
        given.extend(cells)
        return [], [], []

    monkeypatch.setattr(until_decided, "run_until_decided", run)
    launcher = SharedTeacherLauncher(["cpu"], None, fail_fast=False)
    launcher.config, launcher.hydra_context = sweep, HydraContext(loader, Callbacks())
    launcher._launch_until_decided([["M=[1]", f"seed={seed}"] for seed in range(3)])
    assert given == [["M=[1]"]]


def launched(
    home: Path, monkeypatch: pytest.MonkeyPatch, trained: Trained, *overrides: str
) -> list[str]:
    """Return the jobs of a sweep of four methods, as "method seed"."""
    loader, sweep = loader_of(
        [*COMMON, f"home={home}", "sweep.name=test", "sweep.seeds=until_decided", *overrides]
    )
    monkeypatch.setattr(until_decided, "run_sweep", trained)
    cells = [[f"home={home}", *COMMON, f"recipe={one}"] for one in ("vanilla", "kd", "kd_ls")]
    # A student alone ignores its teacher: this is a cell again.
    cells.append([f"home={home}", *COMMON, "recipe=vanilla", "teacher=resnet14"])
    _, jobs, results = run_until_decided(
        cells, loader, sweep, runner=Pool(["cpu"], fail_fast=False)
    )
    assert [result["status"] for result in results] == ["FINISHED"] * len(jobs)
    return [f"{cfg.method_name(job)} {job.seed}" for job in jobs]


def test_a_sweep_adds_seeds_and_a_second_launch_adds_none(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(logging.getLogger("sddlskd"), "propagate", True)
    alone = [70.0, 70.1, 69.9, 70.0, 70.2]
    taught = [80.0, 80.1, 79.9, 80.2, 79.8]
    trained = Trained({"student alone": alone, "KD": taught, "KD+LS": [x + 0.1 for x in taught]})
    jobs = launched(tmp_path, monkeypatch, trained, "sweep.max_seeds=4")
    # KD against the student alone is decided after 3 seeds, KD+LS against KD never.
    assert trained.rounds == [9, 2]
    assert len(jobs) == len(set(jobs)) == 11
    assert "student alone 3" not in jobs
    assert {"KD 3", "KD+LS 3"} <= set(jobs)
    told = capsys.readouterr().out
    assert "KD over student alone: better after 3 seeds, +10.00 points" in told
    assert "KD+LS over KD: undecided after 4 seeds, +0.10 points" in told
    # A decision is told as soon as it falls, and once.
    assert caplog.text.count("better after 3 seeds") == 1
    again = Trained({})
    assert sorted(launched(tmp_path, monkeypatch, again, "sweep.max_seeds=4")) == sorted(jobs)
    assert again.rounds == [0]


def test_several_labels_are_decided_by_their_map(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = {"student alone": [30.0, 30.1, 29.9], "KD": [40.0, 40.1, 39.9], "KD+LS": [50.0] * 3}
    launched(tmp_path, monkeypatch, Trained(scores, best_top1=70.0))
    assert "KD over student alone: better after 3 seeds, +10.00 points" in capsys.readouterr().out


def test_jobs_that_run_on_without_this_process_are_waited_for_by_the_next_launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As SLURM's tasks do: `run_sweep` returns while the jobs are in the queue."""
    submitted = []

    def submit(jobs: Sequence[Config], name: str, **options: Any) -> None:
        submitted.append(len(jobs))

    loader, sweep = loader_of(
        [*COMMON, f"home={tmp_path}", "sweep.name=test", "sweep.seeds=until_decided"]
    )
    monkeypatch.setattr(until_decided, "run_sweep", submit)
    cells = [[f"home={tmp_path}", *COMMON, f"recipe={one}"] for one in ("vanilla", "kd")]
    _, jobs, results = run_until_decided(
        cells, loader, sweep, runner=Pool(["cpu"], fail_fast=False)
    )
    assert submitted == [6]
    assert [result["status"] for result in results] == ["NEW"] * len(jobs)
    assert "run the same command again when these jobs have ended" in capsys.readouterr().out


@pytest.mark.slow
def test_the_command_trains_until_all_is_decided(tmp_path: Path) -> None:
    words = ("-m", "dataset=digits", "teacher=resnet8", "student=resnet8", "trainer=debug")
    words += ("trainer.max_steps=2", "teacher.train_epochs=1", "tracking=none", f"home={tmp_path}")
    words += ("recipe=kd", "M=[1],[2]", "sweep.name=test")
    words += ("sweep.seeds=until_decided", "sweep.max_seeds=4")
    code, out, err = ForkedCommand(tmp_path, "sddlskd.train", *words, cwd=REPO).end()
    assert code == 0, out + err
    (line,) = [text for text in out.splitlines() if "over KD" in text]
    assert re.search(r"SD-KD \[2\] over KD: \w+ after [34] seeds, [+-]\d", line)
    folder = tmp_path / "runs/sweeps/test"
    jobs = read_manifest(folder)["jobs"]
    assert len(jobs) in (6, 8)
    assert {read_result(Path(job))["status"] for job in jobs} == {"FINISHED"}
    status = status_of(folder)
    # All jobs are finished, and the sweep may add others.
    assert "sweep.seeds=until_decided" in status.command
    code, again, err = ForkedCommand(tmp_path, "sddlskd.train", *words, cwd=REPO).end()
    assert code == 0, again + err
    assert line in again
    assert read_manifest(folder)["jobs"] == jobs


def test_another_largest_number_of_seeds_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = [70.0, 70.1, 69.9, 70.2, 70.0]
    trained = Trained(dict.fromkeys(("student alone", "KD", "KD+LS"), numbers))
    launched(tmp_path, monkeypatch, trained, "sweep.max_seeds=3")
    with pytest.raises(
        ValueError, match=r"max_seeds=4 differs from .* began with \(3\), for which"
    ):
        launched(tmp_path, monkeypatch, trained, "sweep.max_seeds=4")


def test_cells_that_differ_in_a_setting_alone_are_told_apart(tmp_path: Path) -> None:
    cells = [job(tmp_path, "recipe=vanilla")]
    cells += [job(tmp_path, "recipe=kd", f"distiller.temperature={t}") for t in (2, 4)]
    lines = [
        until_decided.describe(Comparison(one, 0, 3, 1.0, 0.01, True), cells) for one in (1, 2)
    ]
    assert "KD, distiller.temperature=2.0" in lines[0]
    assert "KD, distiller.temperature=4.0" in lines[1]
    assert all("over student alone: better after 3 seeds, +1.00 points" in line for line in lines)


def test_running_every_job_again_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="would run the seeds of each round again"):
        launched(tmp_path, monkeypatch, Trained({}), "sweep.rerun=all")


def test_an_invalid_job_is_named(tmp_path: Path) -> None:
    loader, sweep = loader_of([*COMMON, f"home={tmp_path}", "sweep.name=test"])
    with pytest.raises(InvalidJobs, match=r"recipe=nothing seed=0"):
        run_until_decided(
            [["recipe=nothing"]], loader, sweep, runner=Pool(["cpu"], fail_fast=False)
        )
