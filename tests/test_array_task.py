"""What a task of a job array does, as far as it needs no SLURM (tests/slurm has the rest)."""

from pathlib import Path

from sddlskd import record
from sddlskd.array_task import _fit
from sddlskd.stop import Stop
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


def test_requeues_are_counted_over_all_submissions(home: Path) -> None:
    (job,) = jobs_of(home, network("Tiny"))
    folder = record.freeze(job)
    for slurm_job, restarts in (("7_0", 0), ("7_0", 1), ("7_0", 3), ("9", 0), ("9", 2)):
        record.note_requeues(folder, slurm_job, restarts)
    assert _fit([folder], Stop()) == 0
    assert record.read_result(folder)["requeues"] == 5
