"""Kill trainings two hundred times at random moments, also while they write a checkpoint.

Nothing may be lost, damaged or duplicated.
"""

import os
import random
import signal
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sddlskd import record
from sddlskd.config import Config
from sddlskd.files import checkpoint
from sddlskd.tracking import __main__ as sync_command
from sddlskd.tracking import uri as tracking_uri
from tests.crashing import Crash, ended, fit_again, forked, ready
from tests.tiny import net, processes, rows, same, same_outcome, tiny

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]
RUNS, KILLS = 8, 25


class Slow(Crash):
    """Make every file operation take milliseconds, so that kills can hit it.

    Unlike `Crash`, it never ends the process.
    """

    def step(self) -> None:
        time.sleep(self.draw.uniform(0, 0.01))


def alive(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def kill_again_and_again(jobs: list[Config], queue: Any) -> None:
    """Start and kill each job until `KILLS` signals have ended it early; then let it finish.

    Put counts of what the kills hit into `queue`.
    """
    ready()
    met: Counter[str] = Counter()
    for job in jobs:
        draw, folder = random.Random(job.seed), Path(job.run_dir)
        killed, number = 0, 0
        while killed < KILLS and (number := number + 1) <= 8 * KILLS:
            earlier = record.read_result(folder)

            def work(job: Config = job, number: int = number) -> None:
                Slow(Path(job.home).resolve(), number)
                fit_again(job)

            pid = forked(work)
            if draw.random() < 0.4:
                while alive(pid) and not list(folder.glob(".*.ckpt*.tmp")):
                    time.sleep(0.001)
            else:
                time.sleep(draw.uniform(0, 0.8))
            how = draw.choice((signal.SIGKILL, signal.SIGTERM))
            os.kill(pid, how)
            code = ended(pid)
            result = record.read_result(folder)
            saved = result.get("status") == "KILLED" and result != earlier
            if code < 0 or saved:
                killed += 1
                met["stopped with its checkpoint saved" if saved else how.name] += 1
                met["inside a checkpoint's write"] += bool(list(folder.glob(".*.ckpt*.tmp")))
            # Undo the end of a finished run, so that it can be killed again.
            if result.get("status") == "FINISHED":
                for name in ("result.json", checkpoint.LATEST):
                    (folder / name).unlink()
        met["ended"] += ended(forked(lambda job=job: fit_again(job))) == 0  # type: ignore[misc]
    queue.put(dict(met))


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> list[Config]:
    """Return jobs of three epochs with dropout that save a checkpoint after every step.

    One job in four is mirrored to MLflow while it trains.
    """
    home = tmp_path_factory.mktemp("kills")
    overrides = (
        "distiller=vanilla",
        "trainer.epochs=3",
        "checkpoint.every_minutes=0.00001",
        "trainer.log_every=1",
    )
    found = []
    for seed in range(RUNS):
        tracked = "tracking=mlflow" if seed % 4 == 0 else "tracking=none"
        found.append(
            tiny(home, *overrides, f"seed={seed}", tracked, model=net(dropout=0.2), teacher=False)
        )
    return found


def test_two_hundred_kills(jobs: list[Config], tmp_path: Path) -> None:
    undisturbed = [
        replace(job, home=str(tmp_path), run_dir=str(tmp_path / Path(job.run_dir).name))
        for job in jobs
    ]
    undisturbed = [
        replace(job, tracking=replace(job.tracking, enabled=False)) for job in undisturbed
    ]
    started, queues = [], [processes.SimpleQueue() for _ in range(3)]
    for part, queue in zip((jobs[::2], jobs[1::2]), queues, strict=False):
        started.append(processes.Process(target=kill_again_and_again, args=(part, queue)))
        started[-1].start()
    met: Counter[str] = Counter()
    for queue in queues[:2]:
        met.update(queue.get())
    for process in started:
        process.join()
    for job in undisturbed:
        process = processes.Process(target=run_alone, args=(job,))
        process.start()
        process.join()
        assert process.exitcode == 0
    assert (
        sum(met[how] for how in ("SIGKILL", "SIGTERM", "stopped with its checkpoint saved"))
        == RUNS * KILLS
    ), met
    assert met["inside a checkpoint's write"] > RUNS * KILLS / 20, met
    for job, alone in zip(jobs, undisturbed, strict=True):
        assert record.read_result(Path(job.run_dir))["status"] == "FINISHED"
        assert same_outcome(job, alone)
        assert same(*(checkpoint.read(Path(each.run_dir, "best.ckpt")) for each in (job, alone)))
        assert [row["epoch"] for row in rows(job)] == [1, 2, 3]
        assert not list(Path(job.run_dir).glob(".*.ckpt*.tmp"))
    sync_command.main(["sync", str(Path(jobs[0].home, "runs"))])
    client = tracking_uri.client(str(jobs[0].tracking.uri))
    (experiment,) = [each for each in client.search_experiments() if each.name == "sddlskd"]
    runs = {run.data.tags["run_dir"]: run for run in client.search_runs([experiment.experiment_id])}
    assert runs.keys() == {job.run_dir for job in jobs}
    assert len(client.search_runs([experiment.experiment_id])) == RUNS
    for job in jobs:
        run = runs[job.run_dir]
        assert run.info.status == "FINISHED"
        for key in record.read_rows(Path(job.run_dir))[0].keys() - {"epoch", "time"}:
            points = [(p.step, p.value) for p in client.get_metric_history(run.info.run_id, key)]
            assert points == [
                (row["epoch"], row[key]) for row in record.read_rows(Path(job.run_dir))
            ]


def run_alone(job: Config) -> None:
    ready()
    fit_again(job)
