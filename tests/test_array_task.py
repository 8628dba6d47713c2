"""What a task of a job array does, as far as it needs no SLURM (tests/slurm has the rest)."""

from pathlib import Path
from typing import Any

import pytest

from sddlskd import record
from sddlskd.array_task import _fit
from sddlskd.stop import Stop
from sddlskd.worker import BUSY
from tests.test_sweeps import home, jobs_of, network

__all__ = ["home"]


def test_a_group_that_does_not_fit_is_halved(home: Path) -> None:
    jobs = jobs_of(home, *(f"{network('Heavy')} M=[{m}]" for m in (1, 2, 4, 8)))
    for job in jobs:
        record.freeze(job)
    folders = [Path(job.run_dir) for job in jobs]
    assert _fit(folders, Stop()) == 0
    assert [record.read_result(folder)["status"] for folder in folders] == ["FINISHED"] * 4
    assert [record.read_result(folder)["group_size"] for folder in folders] == [2] * 4


def test_a_job_that_another_process_has_does_not_keep_the_others_of_its_group(home: Path) -> None:
    jobs = jobs_of(home, *(f"{network('Tiny')} M=[{m}]" for m in (1, 2)))
    elsewhere = record.Record(jobs[0])
    elsewhere.result(record.RUNNING, best_top1=None, last_top1=None, epochs=0, seconds=0.0)
    record.freeze(jobs[1])
    assert _fit([Path(job.run_dir) for job in jobs], Stop()) == BUSY
    elsewhere.close()
    assert record.read_result(Path(jobs[1].run_dir))["status"] == "FINISHED"


def test_what_nobody_foresaw_ends_in_a_log_and_an_exit_code(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The task has still to say whether its sweep is over."""
    (job,) = jobs_of(home, network("Tiny"))

    def lost(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr("sddlskd.array_task.run", lost)
    assert _fit([record.freeze(job)], Stop()) == 1


def test_requeues_are_counted_over_all_submissions(home: Path) -> None:
    (job,) = jobs_of(home, network("Tiny"))
    folder = record.freeze(job)
    for slurm_job, restarts in (("7_0", 0), ("7_0", 1), ("7_0", 3), ("9", 0), ("9", 2)):
        record.note_requeues(folder, slurm_job, restarts)
    assert _fit([folder], Stop()) == 0
    assert record.read_result(folder)["requeues"] == 5
