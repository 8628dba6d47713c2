"""Test sweeps on a real SLURM of one node: tasks that are warned, preempted or crash."""

import json
import re
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from sddlskd import config as cfg
from sddlskd import record
from sddlskd.config import Config
from sddlskd.files import checkpoint
from sddlskd.sweeps import precheck, run_sweep
from sddlskd.sweeps.__main__ import main
from sddlskd.sweeps.outcome import state_of
from sddlskd.sweeps.slurm import Slurm
from sddlskd.sweeps.slurm_queue import Submission, submissions
from sddlskd.training.fit import fit
from tests.slurm.cluster import Cluster, wait_for
from tests.test_sweeps import grid_of, network

pytestmark = [pytest.mark.services, pytest.mark.timeout(1800), pytest.mark.usefixtures("restored")]

COMMON = [
    "dataset=digits",
    "teacher=resnet8",
    "trainer=cpu",
    "trainer.batch_size=32",
    "tracking=none",
]
COMMON += ["allow_foreign_targets=true"]
OPTIONS: dict[str, Any] = {
    "wait": True,
    "max_requeues": 100,
    "fail_fast": False,
    "python": None,
    "container": None,
    "srun_args": [],
    "array_parallelism": 256,
    "name": "test",
    "timeout_min": 10,
    "signal_delay_s": 60,
    "nodes": 1,
    "tasks_per_node": 1,
    "cpus_per_task": 1,
    "mem_gb": 1,
    "stderr_to_stdout": True,
}


def slow(seconds: float, *more: str) -> list[str]:
    """Return overrides for three epochs of eight steps of `seconds` each."""
    return [
        *network("Slow", seconds=seconds).split(),
        "trainer.epochs=3",
        "trainer.max_steps=8",
        *more,
    ]


def jobs_of(home: Path, *grid: str, common: tuple[str, ...] = ()) -> list[Config]:
    return grid_of(home, [*COMMON, *common], [one.split() for one in grid])[2]


def run(jobs: list[Config], name: str, max_group_size: int | None, **options: Any) -> None:
    """Run a sweep, and check its jobs in this process, because another one would take longer.

    The commands that tests start check them in another process.
    """
    runner = Slurm(**{**OPTIONS, **options})
    run_sweep(jobs, name, runner=runner, max_group_size=max_group_size, precheck=precheck.report)


def sweep(
    jobs: list[Config], name: str = "test", **options: Any
) -> tuple[list[dict[str, Any]], int]:
    """Run a sweep in this process and return the results and the exit code."""
    try:
        run(jobs, name, max_group_size=1, **options)
        code = 0
    except SystemExit as exit:
        code = int(exit.code or 0)
    return [record.read_result(Path(job.run_dir)) for job in jobs], code


def training(run_dir: Path) -> bool:
    """Return whether a process trains the run at the moment."""
    return record.read_result(run_dir).get("status") == "RUNNING" and not record.abandoned(run_dir)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = checkpoint.read(folder / "last.ckpt")["model"]
    return state


def same_weights(a: Path, b: Path) -> bool:
    ours, theirs = weights(a), weights(b)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def requeues_of(cluster: Cluster, job: str) -> int:
    found = re.search(r"Restarts=(\d+)", cluster.ask("scontrol", "show", "job", job))
    return int(found[1]) if found else 0


def hold(**more: Any) -> dict[str, Any]:
    """Return options with which jobs stay in the queue."""
    return {"wait": False, "additional_parameters": {"hold": True, **more}}


def test_a_queued_sweep_is_seen_cancelled_and_never_submitted_twice(
    cluster: Cluster, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = jobs_of(home, *(f"{' '.join(network('Tiny').split())} seed={seed}" for seed in range(7)))
    _, code = sweep(jobs, **hold())
    folder = home / "runs/sweeps/test"
    submitted = submissions(folder)
    assert code == 0
    assert (
        f"submitted to SLURM: {' '.join(one.job for one in submitted)}" in capsys.readouterr().out
    )
    # No array may be larger than MaxArraySize.
    arrays = [one.job.split("_")[0] for one in submitted]
    assert [arrays.count(array) for array in dict.fromkeys(arrays)] == [5, 2]
    assert [one.run_dirs for one in submitted] == [[job.run_dir] for job in jobs]

    sweep(jobs, **hold())
    assert submissions(folder) == submitted
    more = jobs_of(home, f"{network('Tiny')} seed=7")
    sweep([*jobs, *more], **hold())
    assert [one.run_dirs for one in submissions(folder)[7:]] == [[more[0].run_dir]]

    capsys.readouterr()
    main(["status", "test", "--home", str(home)])
    told = capsys.readouterr().out
    assert "8 jobs: 8 queued" in told
    assert "PENDING (JobHeldUser)" in told
    main(["logs", "test", "--home", str(home)])
    assert capsys.readouterr().out.count("not started yet") == 8
    main(["cancel", "test", "--home", str(home)])
    assert capsys.readouterr().out.startswith(f"cancelled: {submitted[0].job} ")
    wait_for(lambda: not cluster.queue())
    main(["cancel", "test", "--home", str(home)])
    main(["status", "test", "--home", str(home)])
    told = capsys.readouterr().out
    assert "SLURM has no job of this sweep" in told
    assert "8 jobs: 8 new" in told
    assert told.count("CANCELLED") == 8


def test_what_kills_one_job_is_told_and_its_siblings_finish(
    cluster: Cluster,
    home: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (home / "kills").mkdir()
    slurmctld_away(cluster, monkeypatch)
    kills = network("Kills", folder=home / "kills", times=9)
    jobs = jobs_of(home, network("Tiny"), kills, network("Raises"), common=("trainer=debug",))
    results, code = sweep(jobs)
    assert [result["status"] for result in results] == ["FINISHED", "KILLED", "FAILED"]
    assert "FAILED (exit code 137:0)" in results[1]["reason"]
    assert "Killed" in Path(all_of(home)[1].log).read_text()
    assert "does not like its images" in results[2]["reason"]
    assert code == 130
    told = capsys.readouterr().out
    assert "1 failed: RuntimeError" in told
    assert f"logs of the tasks: python -m sddlskd.sweeps logs {home}/runs/sweeps/test" in told
    states = {
        job: cluster.ask("scontrol", "show", "job", job)
        for job in (one.job for one in all_of(home))
    }
    assert ["JobState=COMPLETED" in state for state in states.values()] == [True, False, False]


def all_of(home: Path) -> list[Any]:
    return submissions(home / "runs/sweeps/test")


def slurmctld_away(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop slurmctld when the launcher first sees a job in the queue, and start it again."""
    import sddlskd.sweeps.slurm

    asked, real = [], sddlskd.sweeps.slurm.queue

    def look(folder: Path) -> dict[str, tuple[str, str]]:
        found = real(folder)
        if found and not asked:
            asked.append(1)
            cluster.end("slurmctld", signal.SIGTERM)
            with pytest.raises(ConnectionError, match="squeue"):
                real(folder)
            cluster.start_slurmctld()
        return found

    monkeypatch.setattr(sddlskd.sweeps.slurm, "queue", look)


def test_a_task_starts_though_slurmctld_is_away_when_srun_asks_for_it(
    cluster: Cluster, home: Path
) -> None:
    """The batch script waits for a file, and another server takes slurmctld's place meanwhile."""
    go = home / "go"
    (job,) = jobs_of(home, network("Tiny"), common=("trainer=debug",))
    sweep([job], wait=False, setup=[f"until [ -e {go} ]; do sleep 0.1; done"])
    wait_for(lambda: "RUNNING" in cluster.queue().values())
    cluster.end("slurmctld", signal.SIGTERM)
    log = Path(all_of(home)[0].log)
    wait_for(log.exists)
    with socket.create_server(("127.0.0.1", cluster.ctld_port)) as server:
        server.settimeout(1.0)
        go.touch()
        end = time.monotonic() + 120
        while "srun tries again" not in log.read_text() and time.monotonic() < end:
            with suppress(TimeoutError):
                server.accept()[0].close()
    cluster.start_slurmctld()
    wait_for(lambda: record.read_result(Path(job.run_dir)).get("status") == "FINISHED")
    assert "error: Unable to" in log.read_text()


def test_a_node_that_crashes_costs_what_was_not_saved(cluster: Cluster, home: Path) -> None:
    """The job is also cancelled, which saves a checkpoint, and continued by the next launch."""
    jobs = jobs_of(home, " ".join(slow(0.4, "checkpoint.every_minutes=0.005")))
    folder = Path(jobs[0].run_dir)
    sweep(jobs, wait=False)
    wait_for(lambda: (folder / "last.ckpt").exists())
    cluster.crash_node()
    wait_for(lambda: state_of(folder) == "killed")
    # SLURM needs some time to notice the crash.
    wait_for(lambda: "PENDING" in cluster.queue().values())
    cluster.start_slurmd()
    wait_for(lambda: training(folder) and record.read_result(folder)["requeues"] == 1)
    assert "continuing at epoch" in (folder / "train.log").read_text()
    main(["cancel", "test", "--home", str(home)])
    wait_for(lambda: not cluster.queue())
    assert record.read_result(folder)["reason"] == "stopped by SIGTERM"
    results, code = sweep(jobs)
    assert (code, results[0]["status"], results[0]["requeues"]) == (0, "FINISHED", 1)
    (twin,) = jobs_of(
        home / "twin", " ".join(slow(0.0, f"teacher.checkpoint={home}/teachers/digits/resnet8.pt"))
    )
    fit([twin])
    assert same_weights(folder, Path(twin.run_dir))


def preempted(cluster: Cluster, home: Path) -> tuple[Path, Submission]:
    """Return run directory and submission of a training job that another job displaces."""
    jobs = jobs_of(home, " ".join(slow(0.5)))
    folder = Path(jobs[0].run_dir)
    sweep(jobs, wait=False, partition="spot")
    wait_for(lambda: training(folder))
    cluster.ask("sbatch", "--cpus-per-task=4", "--output=/dev/null", "--wrap=sleep 3")
    (one,) = all_of(home)
    return folder, one


def test_a_preempted_job_that_has_time_to_end_is_queued_again(cluster: Cluster, home: Path) -> None:
    folder, one = preempted(cluster, home)
    wait_for(lambda: "preempted: back into the queue" in Path(one.log).read_text())
    assert record.read_result(folder)["reason"] == "stopped by SIGTERM"
    wait_for(lambda: not cluster.queue())
    result = record.read_result(folder)
    assert (result["status"], result["requeues"]) == ("FINISHED", 1)


def test_a_job_that_dies_after_a_preemption_is_not_preempted_again(
    cluster: Cluster, home: Path
) -> None:
    folder, one = preempted(cluster, home)
    wait_for(lambda: requeues_of(cluster, one.job) == 1)
    wait_for(lambda: training(folder))
    cluster.ask("scancel", "--signal=KILL", f"{one.job}.0")
    wait_for(lambda: not cluster.queue())
    assert requeues_of(cluster, one.job) == 1


def test_a_finished_job_is_not_requeued_however_often_it_is_warned(
    cluster: Cluster, home: Path
) -> None:
    jobs = jobs_of(home, network("Tiny"), common=("trainer=debug",))
    sweep(jobs, wait=False)
    job = all_of(home)[0].job
    wait_for(
        lambda: record.read_result(Path(jobs[0].run_dir)).get("status") == "FINISHED", every=0.02
    )
    # The process needs some time to end. Warn it all the while.
    while cluster.queue():
        cluster.ask("scancel", "--signal=USR2", f"{job}.0")
    state = cluster.ask("scontrol", "show", "job", job)
    assert "JobState=COMPLETED" in state
    assert "Restarts=0" in state


def test_there_is_an_end_to_requeues(cluster: Cluster, home: Path) -> None:
    jobs = jobs_of(home, " ".join(slow(0.5)))
    sweep(jobs, wait=False, max_requeues=0)
    wait_for(lambda: training(Path(jobs[0].run_dir)))
    cluster.ask("scancel", "--signal=USR2", f"{all_of(home)[0].job}.0")
    wait_for(lambda: not cluster.queue())
    assert (
        record.read_result(Path(jobs[0].run_dir))["reason"]
        == "stopped by SIGUSR2, max_requeues reached"
    )
    assert "max_requeues=0 is reached" in Path(all_of(home)[0].log).read_text()


def test_a_group_is_one_task_and_how_python_starts_is_the_users_to_say(
    cluster: Cluster, home: Path
) -> None:
    jobs = jobs_of(home, "M=[1]", "M=[2]", network("Raises"), common=("trainer=debug",))
    python = f"env MARK=here {sys.executable}"
    setup = [f"touch {home}/set-up"]
    options = {"python": python, "setup": setup, "srun_args": ["--label"]}
    with pytest.raises(SystemExit):
        run(jobs, "test", max_group_size=None, **options)
    assert [
        result["status"] for result in (record.read_result(Path(job.run_dir)) for job in jobs)
    ] == [
        "FINISHED",
        "FINISHED",
        "FAILED",
    ]
    (one,) = all_of(home)
    assert one.run_dirs == [job.run_dir for job in jobs]
    assert record.read_result(Path(jobs[0].run_dir))["group_size"] == 3
    assert (home / "set-up").exists()
    assert re.search(r"(?m)^0: ", Path(one.log).read_text())  # the effect of srun --label
    assert python in Path(one.log.replace("_0_log.out", "_submission.sh")).read_text()


def test_what_slurm_will_refuse_is_told_before_anything_is_written(
    cluster: Cluster, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = jobs_of(home, network("Tiny"))
    for options, message in (
        ({"partition": "nope"}, r"sbatch: .*[Ii]nvalid partition.* see hydra\.launcher\.partition"),
        ({"gpus_per_node": 8}, r"sbatch: .*generic resource"),
        ({"signal_delay_s": 600}, r"signal_delay_s=600 .*timeout_min=10"),
        ({"nodes": 2}, r"trainer\.devices=1 .*hydra\.launcher\.nodes=2"),
        (
            {"setup": ["module load x", "export MY_TOKEN=abc"]},
            r"setup would write export MY_TOKEN into files",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            sweep(jobs, **options)
    tracked = jobs_of(home, network("Tiny"), common=("tracking=mlflow",))
    with pytest.raises(
        ValueError, match=r"tracking\.uri=sqlite.* from \w+; .*make tracking-server.*tracking sync"
    ):
        sweep(tracked, partition="wide")
    cached = jobs_of(home, f"{network('Tiny')} teacher.cache={home}/maps")
    with pytest.raises(
        ValueError,
        match=r"teacher\.cache=\S+maps can be written by one host only, .* on 2 hosts; set",
    ):
        sweep(cached, partition="wide")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ValueError, match=r"hydra/launcher=slurm needs sbatch, .*login node"):
        sweep(jobs)
    assert not (home / "runs").exists()


def test_without_slurm_a_submitted_sweep_does_not_run_and_its_status_says_why(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = jobs_of(home, network("Tiny"))
    folder = home / "runs/sweeps/test"
    folder.mkdir(parents=True)
    (folder / "sweep.json").write_text(
        json.dumps(
            {"name": "test", "command": "x", "folder": "/", "time": 0, "jobs": [jobs[0].run_dir]}
        )
    )
    (folder / "slurm.json").write_text(
        json.dumps([{"job": "1", "run_dirs": [jobs[0].run_dir], "log": "/x"}])
    )
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConnectionError, match="squeue is not on PATH"):
        sweep(jobs)
    cfg.frame()
    main(["status", "test", "--home", str(home)])
    told = capsys.readouterr().out
    assert "cannot ask SLURM about the jobs of this sweep: squeue is not on PATH" in told
    assert "1 job: 1 new" in told


def test_ranks_that_share_each_batch_are_processes_of_one_task(
    cluster: Cluster, home: Path
) -> None:
    """Ranks that are warned must end with the same weights as ranks that are not."""
    jobs = jobs_of(home, " ".join(slow(0.4, "trainer.devices=2")))
    folder = Path(jobs[0].run_dir)
    sweep(jobs, wait=False)
    wait_for(lambda: training(folder))
    time.sleep(1.0)
    cluster.ask("scancel", "--signal=USR2", f"{all_of(home)[0].job}.0")
    wait_for(lambda: requeues_of(cluster, all_of(home)[0].job) == 1)
    wait_for(lambda: not cluster.queue())
    result = record.read_result(folder)
    assert (result["status"], result["requeues"]) == ("FINISHED", 1)
    assert result["environment"].endswith("2 ranks")
    teacher = f"teacher.checkpoint={home}/teachers/digits/resnet8.pt"
    alone = jobs_of(home / "alone", " ".join(slow(0.0, "trainer.devices=2", teacher)))
    sweep(alone)
    assert same_weights(folder, Path(alone[0].run_dir))
