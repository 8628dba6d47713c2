"""Test halving inside a group: which runs it drops, and that an interruption changes nothing."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from sddlskd import config as cfg
from sddlskd import record
from sddlskd.config import Config, Rerun
from sddlskd.sweeps import precheck, run_sweep
from sddlskd.sweeps.plan import check_halving
from sddlskd.sweeps.pool import Pool
from sddlskd.sweeps.status import status_of
from sddlskd.training.fit import _pruned, fit
from sddlskd.training.halving import Halving
from sddlskd.training.ranks import Ranks
from sddlskd.training.run import Run
from sddlskd.worker import run as work
from tests.tiny import ForkedWorker, net, same_outcome, tiny

EPOCHS = 6
RATES = (0.1, 0.0001, 0.01, 0.001)


class Crash(BaseException):
    """The process dies."""


class Entry:
    """What halving reads of a run."""

    def __init__(self, folder: Path) -> None:
        self.record = SimpleNamespace(folder=folder)
        self.alive = True


def leave_rows(folder: Path, *scores: tuple[float, float]) -> Path:
    """Leave a run directory with (val/top1, val/loss) of epochs 1, 2, ..."""
    folder.mkdir()
    rows = [
        {"epoch": epoch, "val/top1": top1, "val/loss": loss}
        for epoch, (top1, loss) in enumerate(scores, start=1)
    ]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


def dropped(halving: Halving, epoch: int, *folders: Path) -> dict[str, str]:
    """Return {name: reason} of the runs that are dropped before an epoch."""
    runs = [Entry(one) for one in folders]
    found = halving.to_prune(epoch, cast("list[Run]", runs), Ranks())
    return {run.record.folder.name: reason for run, reason in found.items()}


def test_the_worse_half_is_dropped_and_the_middle_stays(tmp_path: Path) -> None:
    folders = [
        leave_rows(tmp_path / name, *scores)
        for name, scores in {
            "a": [(50.0, 1.0), (60.0, 1.0)],
            "b": [(40.0, 2.0), (70.0, 1.0)],
            "c": [(40.0, 1.0), (50.0, 1.0)],
            "d": [(30.0, 1.0)],
            "e": [(90.0, 1.0), (10.0, 1.0)],
        }.items()
    ]
    halving = Halving([1, 2], folders)
    assert dropped(halving, 1, *folders) == {}
    assert dropped(halving, 2, *folders) == {
        "b": "rank 4 of 5 at epoch 1: val/top1 40.00",  # the higher loss of two equal runs
        "d": "rank 5 of 5 at epoch 1: val/top1 30.00",
    }
    assert dropped(halving, 2, *folders) == {}
    # b has gone on without halving: it is ranked if it has ended the epoch.
    assert dropped(halving, 3, *folders) == {
        "c": "rank 3 of 4 at epoch 2: val/top1 50.00",
        "e": "rank 4 of 4 at epoch 2: val/top1 10.00",
    }
    # A process that begins later drops the same runs, of those that it trains.
    assert set(dropped(Halving([1, 2], folders), 3, folders[3], folders[4])) == {"d", "e"}


def test_runs_with_several_labels_per_image_are_ranked_by_map(tmp_path: Path) -> None:
    folders = [
        leave_rows(tmp_path / name, (top1, 1.0)) for name, top1 in (("a", 50.0), ("b", 60.0))
    ]
    for folder, mAP in zip(folders, (40.0, 30.0), strict=True):
        (row,) = record.read_rows(folder)
        (folder / "metrics.jsonl").write_text(json.dumps({**row, "val/mAP": mAP}) + "\n")
    assert dropped(Halving([1], folders), 2, *folders) == {
        "b": "rank 2 of 2 at epoch 1: val/mAP 30.00"
    }


def group(home: Path, halving: list[int], rates: tuple[float, ...] = RATES) -> list[Config]:
    """Return jobs of the digits whose learning rates differ."""
    jobs = []
    for rate in rates:
        job = tiny(
            home, "dataset=digits", "~dataset.load.train", "~dataset.load.test",
            "~dataset.load.size", f"optimizer.lr={rate}", f"trainer.epochs={EPOCHS}",
            "trainer.max_steps=8", "recipe=vanilla", model=net(), teacher=False,
        )  # fmt: skip
        jobs.append(replace(job, sweep=replace(job.sweep, halving=halving)))
    return jobs


def statuses(jobs: list[Config]) -> list[tuple[str, str]]:
    results = [record.read_result(Path(job.run_dir)) for job in jobs]
    return [(str(one.get("status")), str(one.get("reason"))) for one in results]


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> list[Config]:
    """Return the jobs of a group that all trained to the end."""
    jobs = group(tmp_path_factory.mktemp("full"), [])
    fit(jobs)
    return jobs


@pytest.fixture(scope="module")
def halved(tmp_path_factory: pytest.TempPathFactory) -> list[Config]:
    """Return the jobs of a group that was halved after epochs 1 and 2, without interruption."""
    jobs = group(tmp_path_factory.mktemp("halved"), [1, 2])
    fit(jobs)
    return jobs


def best_of(jobs: list[Config]) -> int:
    tops = [record.read_result(Path(job.run_dir))["best_top1"] for job in jobs]
    return tops.index(max(tops))


def test_it_finds_the_best_run_of_the_grid_in_less_than_half_of_the_epochs(
    full: list[Config], halved: list[Config]
) -> None:
    assert [status for status, _ in statuses(halved)].count("PRUNED") == 3
    assert best_of(halved) == best_of(full)
    assert statuses(halved)[best_of(full)][0] == "FINISHED"
    assert same_outcome(halved[best_of(full)], full[best_of(full)])
    trained = [len(record.read_rows(Path(job.run_dir))) for job in halved]
    assert sorted(trained) == [1, 1, 2, EPOCHS]
    assert sum(trained) < len(halved) * EPOCHS / 2


@pytest.mark.parametrize(
    ("method", "condition"),
    [
        ("report", lambda run: run.state == "PRUNED"),  # the second run is not marked yet
        ("train_step", lambda run: (run.epoch, run.step) == (2, 3)),
        ("end_epoch", lambda run: run.epoch == 3),  # the other run has not ended the epoch
    ],
)
def test_a_killed_group_drops_the_same_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    halved: list[Config],
    method: str,
    condition: Callable[[Run], bool],
) -> None:
    jobs = group(tmp_path, [1, 2])
    original = getattr(Run, method)

    def dies(self: Run, *arguments: Any, **named: Any) -> Any:
        result = original(self, *arguments, **named)
        if condition(self):
            raise Crash
        return result

    with monkeypatch.context() as patched:
        patched.setattr(Run, method, dies)
        with pytest.raises(Crash):
            fit(jobs)
    left = [
        job for job, (status, _) in zip(jobs, statuses(jobs), strict=True) if status == "RUNNING"
    ]
    fit(left)  # as a sweep does, without the runs that have ended
    assert statuses(jobs) == statuses(halved)
    assert all(same_outcome(a, b) for a, b in zip(jobs, halved, strict=True))


def test_ranks_that_do_not_see_the_run_directories_learn_the_reasons(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Other(Ranks):
        """A rank that rank 0 has told which runs were dropped."""

        def broadcast(self, value: Any = None) -> Any:
            assert value == {}
            return {job.run_dir: "rank 2 of 2"}

    job, _ = group(tmp_path, [1], (0.1, 0.01))
    caplog.set_level("INFO")
    assert _pruned([job], Other(rank=1, world_size=2)) == [job]
    assert "was dropped by sweep.halving: rank 2 of 2" in caplog.text


def sweep(jobs: list[Config]) -> None:
    run_sweep(
        jobs,
        "test",
        runner=Pool(["cpu"], fail_fast=False, start=ForkedWorker),
        precheck=precheck.report,
    )


def test_a_sweep_leaves_dropped_runs_alone_until_it_is_told_otherwise(
    tmp_path: Path,
    full: list[Config],
    capsys: pytest.CaptureFixture[str],
) -> None:
    jobs = group(tmp_path, [1], RATES[:2])
    sweep(jobs)  # exits with code 0
    worse = Path(jobs[1].run_dir)
    first = record.read_result(worse)
    assert (first["status"], first["epochs"]) == ("PRUNED", 1)
    assert first["reason"].startswith("rank 2 of 2 at epoch 1: val/top1 ")
    status = status_of(tmp_path / "runs/sweeps/test")
    assert status.counts == {"finished": 1, "pruned": 1}
    assert (status.command, status.seconds_left) == ("", 0.0)
    sweep(jobs)
    assert work([worse]) == 0
    assert record.read_result(worse) == first

    sweep([replace(job, sweep=replace(job.sweep, halving=[])) for job in jobs])
    assert [status for status, _ in statuses(jobs)] == ["FINISHED", "FINISHED"]
    assert same_outcome(jobs[1], full[1])

    anew = [replace(job, sweep=replace(job.sweep, rerun=Rerun.all)) for job in jobs]
    sweep(anew)
    assert [status for status, _ in statuses(jobs)] == ["FINISHED", "PRUNED"]
    capsys.readouterr()


def test_a_group_that_does_not_fit_is_not_divided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = group(tmp_path, [1], RATES[:2])

    def full_memory(self: Run, *_: Any) -> None:
        raise torch.OutOfMemoryError("no memory left")

    for job in jobs:
        record.freeze(job)
    monkeypatch.setattr(Run, "train_step", full_memory)
    assert work([Path(job.run_dir) for job in jobs]) == 1
    assert "lower hydra.launcher.max_group_size" in capsys.readouterr().err
    assert [status for status, _ in statuses(jobs)] == ["FAILED", "FAILED"]


def test_a_job_that_trains_alone_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    jobs = group(tmp_path, [1])
    held_out = [replace(job, dataset=replace(job.dataset, val_fraction=0.1)) for job in jobs]
    check_halving(held_out, None)
    assert caplog.text == ""
    check_halving(jobs, None)
    assert "on the test split; dataset.val_fraction=0.1 holds out" in caplog.text
    with pytest.raises(ValueError, match="trains alone"):
        check_halving(jobs, 3)
    with pytest.raises(ValueError, match=cfg.run_name(jobs[0])):
        check_halving(jobs[:1], None)
