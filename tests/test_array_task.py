"""Test the task of a job array without SLURM; tests/slurm tests the rest."""

import os
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sddlskd import record
from sddlskd.processes.exit_codes import ExitCode
from sddlskd.sweeps.array_task import SETUP, ArrayTask, _fit
from sddlskd.training.stop import Stop
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
    assert _fit([Path(job.run_dir) for job in jobs], Stop()) == ExitCode.BUSY
    elsewhere.close()
    assert record.read_result(Path(jobs[1].run_dir))["status"] == "FINISHED"


def test_what_nobody_foresaw_ends_in_a_log_and_an_exit_code(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The task must still report whether its sweep is over."""
    (job,) = jobs_of(home, network("Tiny"))

    def lost(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr("sddlskd.sweeps.array_task.run", lost)
    assert _fit([record.freeze(job)], Stop()) == 1


def test_requeues_are_counted_over_all_submissions(home: Path) -> None:
    (job,) = jobs_of(home, network("Tiny"))
    folder = record.freeze(job)
    for slurm_job, restarts in (("7_0", 0), ("7_0", 1), ("7_0", 3), ("9", 0), ("9", 2)):
        record.note_requeues(folder, slurm_job, restarts)
    assert _fit([folder], Stop()) == 0
    assert record.read_result(folder)["requeues"] == 5


@pytest.mark.parametrize(
    ("rank", "stopped_by", "code"), [(0, "SIGTERM", 130), (1, "SIGTERM", 0), (1, "SIGUSR2", 85)]
)
def test_whether_a_task_is_requeued_is_for_its_first_rank_to_say(
    home: Path, monkeypatch: pytest.MonkeyPatch, rank: int, stopped_by: str, code: int
) -> None:
    """Only the exit code of rank 0 may decide.

    srun ends with the largest code of all ranks, and another rank may learn of the warning only
    from rank 0.
    """
    (job,) = jobs_of(home, network("Tiny"))

    def stopped(folders: list[Path], stop: Stop) -> int:
        stop.signal = signal.Signals[stopped_by]
        return ExitCode.STOPPED

    slurm = SimpleNamespace(num_tasks=1, num_nodes=1, global_rank=rank, job_id="7_0")
    monkeypatch.setattr("submitit.JobEnvironment", lambda: slurm)
    monkeypatch.setattr("sddlskd.sweeps.array_task._fit", stopped)
    monkeypatch.setattr("sddlskd.sweeps.array_task._close_sweep", lambda *_: None)
    before = {
        number: signal.getsignal(number)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
    }
    try:
        with pytest.raises(SystemExit) as caught:
            ArrayTask((str(record.freeze(job)),), str(home), 3)()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert caught.value.code == code


GONE = "Unable to confirm allocation for job 7: Connection reset by peer"
NO_STEP = "Unable to create step for job 7: Unable to contact slurm controller (connect failure)"
TOO_MANY = "Unable to create step for job 7: More processors requested than permitted"


def write_programs(folder: Path, **scripts: str) -> None:
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name).chmod(0o755)


def call_srun(programs: Path, log: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", "\n".join([*SETUP, "srun --unbuffered 'a b'", "exit $?"])],
        env={"PATH": f"{programs}:{os.environ['PATH']}"},
        stdout=log,
        stderr=subprocess.STDOUT,
        check=False,
        text=True,
        timeout=30,
    )


@pytest.mark.parametrize(
    ("messages", "code", "retries"),
    [
        ([], 0, 0),
        ([GONE, NO_STEP], 0, 2),
        (["RuntimeError: Unable"], 1, 0),
        ([TOO_MANY] * 99, 1, 0),  # slurmctld has answered
        ([GONE] * 99, 1, 19),
    ],
)
def test_srun_tries_again_if_slurmctld_is_away(
    tmp_path: Path, messages: list[str], code: int, retries: int
) -> None:
    """A program that stands for srun prints one message per call, and succeeds without one."""
    (tmp_path / "messages").write_text("".join(f"{message}\n" for message in messages))
    write_programs(
        tmp_path,
        sleep="",
        srun=f"""cd {tmp_path}; echo "$@" >> calls
            message=$(sed -n "$(wc -l < calls)p" messages)
            if [ -n "$message" ]; then echo "srun: error: $message" >&2; exit 1; fi""",
    )
    with open(tmp_path / "log", "w") as log:
        done = call_srun(tmp_path, log)
    assert done.returncode == code
    assert (tmp_path / "calls").read_text().splitlines() == ["--unbuffered a b"] * (1 + retries)
    told = (tmp_path / "log").read_text()
    assert told.count("srun tries again") == retries


def test_a_task_fails_at_once_whose_setup_sends_the_log_to_a_program(tmp_path: Path) -> None:
    """To read a pipe again, which the batch script itself keeps open, would never end."""
    write_programs(tmp_path, srun="exit 3")
    assert call_srun(tmp_path, subprocess.PIPE).returncode == 3
