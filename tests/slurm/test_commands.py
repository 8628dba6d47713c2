"""Test sweeps that the command submits, with everything that a cluster does to jobs."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sddlskd import record
from sddlskd.sweeps.slurm_queue import submissions
from sddlskd.tracking import uri as tracking_uri
from sddlskd.training.fit import fit
from tests.slurm.cluster import Cluster, wait_for
from tests.slurm.conftest import REPO, leave_teacher
from tests.slurm.test_slurm import COMMON, jobs_of, requeues_of, same_weights, slow, training
from tests.test_sweeps import network

pytestmark = [pytest.mark.services, pytest.mark.timeout(1800), pytest.mark.usefixtures("restored")]


def launch(
    home: Path, name: str, *overrides: str, launcher: str = "slurm"
) -> subprocess.CompletedProcess[str]:
    """Run the command, which submits a sweep and does not wait for it."""
    command = [
        sys.executable,
        "-m",
        "sddlskd.train",
        "-m",
        f"hydra/launcher={launcher}",
        *COMMON,
        f"home={home}",
    ]
    command += [
        f"sweep.name={name}",
        "hydra.launcher.cpus_per_task=1",
        "hydra.launcher.wait=false",
        *overrides,
    ]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def run_dirs(home: Path, name: str) -> list[Path]:
    return [
        Path(path)
        for path in json.loads((home / "runs/sweeps" / name / "sweep.json").read_text())["jobs"]
    ]


def is_over(run_dir: Path) -> bool:
    """Return whether a job is FINISHED; SLURM may not have noticed yet that its task has ended."""
    return record.read_result(run_dir).get("status") == record.FINISHED


GRID = ["M=[1],[1,2]", "seed=0,1"]


@pytest.fixture(scope="module")
def story(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the homes of the sweeps after all of them have ended.

    The same four jobs run twice: undisturbed (calm), and with everything that a cluster does to
    jobs (rough). Another job needs longer than its time limit (long). All run at once, since most
    of it is waiting.
    """
    homes = {
        name: leave_teacher(tmp_path_factory.mktemp(name))
        for name in ("calm", "rough", "long", "twin")
    }
    mlflow = ["tracking=mlflow"]
    long = ["trainer.epochs=3", "trainer.max_steps=30", "checkpoint.every_minutes=0.02"]
    # 75 seconds for a start and a part of the 90 steps; the rest is for a slow machine's last step.
    limits = ("hydra.launcher.timeout_min=2", "hydra.launcher.signal_delay_s=45")
    one_second = network("Slow", seconds=1.0).split()
    launch(homes["long"], "long", *one_second, *long, *mlflow, *limits)
    launch(homes["rough"], "rough", *slow(1.0, *GRID, *mlflow, "checkpoint.every_minutes=0.01"))
    errors: list[BaseException] = []

    def disturb(job: str, run_dir: Path, blows: list[str]) -> None:
        try:
            for blow in blows:
                if blow == "early":  # probably before Python handles signals
                    wait_for(lambda: cluster.queue().get(job) == "RUNNING" or is_over(run_dir))
                    time.sleep(0.3)
                else:
                    wait_for(lambda: training(run_dir) or is_over(run_dir))
                    time.sleep(1.0)
                before = requeues_of(cluster, job)
                if blow == "requeue":
                    cluster.ask("scontrol", "requeue", job)
                # On a slow machine, the job may end before the blow reaches it.
                while requeues_of(cluster, job) == before and not is_over(run_dir):
                    if blow != "requeue":
                        cluster.ask("scancel", "--signal=USR2", f"{job}.0")
                    time.sleep(2.0)
        except BaseException as error:
            errors.append(error)

    blows = [
        ["warn", "warn", "warn"],
        ["early", "warn", "warn"],
        ["warn", "requeue", "warn"],
        ["warn", "early", "warn"],
    ]
    threads = [
        threading.Thread(target=disturb, args=(one.job, Path(one.run_dirs[0]), some))
        for one, some in zip(submissions(homes["rough"] / "runs/sweeps/rough"), blows, strict=True)
    ]
    for thread in threads:
        thread.start()
    time.sleep(3)
    # The jobs go on without slurmd, which finds them again when it is back.
    cluster.end("slurmd")
    time.sleep(3)
    cluster.start_slurmd()
    launch(homes["calm"], "calm", *slow(1.0, *GRID, *mlflow))
    for thread in threads:
        thread.join()
    assert not errors, errors
    wait_for(lambda: not cluster.queue(), 600)
    return homes


def test_a_sweep_is_submitted_finished_in_mlflow_and_in_tables(
    story: dict[str, Path], tmp_path: Path
) -> None:
    home = story["calm"]
    folders = run_dirs(home, "calm")
    assert [record.read_result(folder)["status"] for folder in folders] == ["FINISHED"] * 4
    client = tracking_uri.client(f"sqlite:///{home}/mlflow.db")
    (parent,) = client.search_runs(["1"], "tags.kind = 'sweep'")
    assert parent.info.status == "FINISHED"  # although no process waited for the sweep
    assert len(client.search_runs(["1"], "tags.kind = 'job'")) == 4
    command = [
        sys.executable,
        "-m",
        "analysis",
        "calm",
        "--home",
        str(home),
        "--out",
        str(tmp_path),
    ]
    subprocess.run(command, cwd=REPO, check=True, capture_output=True)
    assert "(2)" in (tmp_path / "tables/overview_digits.md").read_text()  # two seeds per cell


def test_whatever_happens_to_it_a_job_ends_with_the_same_weights(story: dict[str, Path]) -> None:
    home = story["rough"]
    client = tracking_uri.client(f"sqlite:///{home}/mlflow.db")
    in_mlflow = {
        run.data.tags["run_dir"]: run for run in client.search_runs(["1"], "tags.kind = 'job'")
    }
    assert len(in_mlflow) == 4
    for folder in run_dirs(home, "rough"):
        result = record.read_result(folder)
        assert result["status"] == "FINISHED"
        assert result["requeues"] >= 3
        assert [row["epoch"] for row in record.read_rows(folder)] == [1, 2, 3]
        assert same_weights(folder, story["calm"] / "runs/digits" / folder.name)
        run = in_mlflow[str(folder)]
        assert (run.info.run_id, run.info.status) == (result["run_id"], "FINISHED")
        assert run.data.tags["requeues"] == str(result["requeues"])
    logs = [Path(one.log).read_text() for one in submissions(home / "runs/sweeps/rough")]
    # Of the twelve interruptions, one is a requeue without a warning.
    assert sum(text.count("warned: back into the queue") for text in logs) >= 11
    assert all(
        "continuing at epoch" in (folder / "train.log").read_text()
        for folder in run_dirs(home, "rough")
    )


def test_a_job_longer_than_its_time_limit_goes_on_after_it(story: dict[str, Path]) -> None:
    (folder,) = run_dirs(story["long"], "long")
    result = record.read_result(folder)
    assert result["status"] == "FINISHED"
    assert result["requeues"] >= 1
    assert "stopped by SIGUSR2" in (folder / "train.log").read_text()
    (twin,) = jobs_of(
        story["twin"],
        " ".join(network("Slow", seconds=0.0).split()),
        common=("trainer.epochs=3", "trainer.max_steps=30"),
    )
    fit([twin])
    assert same_weights(folder, Path(twin.run_dir))
