"""What machines do to a run: it ends anywhere, its files are cut and spoilt, its disk is full."""

import json
import logging
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sddlskd import checkpoint, files, record
from sddlskd.checkpoint import UnreadableFile
from sddlskd.config import Config
from sddlskd.record import Record
from sddlskd.run import Run
from sddlskd.trainer import fit
from tests.crashing import Crash, ended, fit_again, forked, ready
from tests.tiny import final, net, one_thread, processes, rows, same, same_outcome, tiny  # noqa: F401


def small(home: Path, *overrides: str) -> Config:
    """A training of a third of a second."""
    return tiny(home, "distiller=vanilla", *overrides, model=net(), teacher=False)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Config:
    job = small(tmp_path_factory.mktemp("undisturbed"))
    fit([job])
    return job


def moved(job: Config, home: Path) -> Config:
    """The same job in another place."""
    return replace(job, home=str(home), run_dir=str(home / "runs" / Path(job.run_dir).name))


# Ending anywhere


def crash_everywhere(job: Config, undisturbed: Config, home: Path, queue: Any) -> None:
    """Tells of what went wrong, and how many points there are."""
    ready()
    wrong, at = "", 0
    while not wrong:
        crashed = moved(job, home / str(at))

        def until_the_crash(job: Config = crashed, at: int = at) -> None:
            Crash(Path(job.home).resolve(), at)
            fit([job])

        code = ended(forked(until_the_crash))
        again = ended(forked(lambda job=crashed: fit_again(job)))  # type: ignore[misc]
        at += 1
        if code not in (0, 9) or again:
            wrong = f"operation {at}: exit codes {code} and {again}"
        elif left := [path.name for path in Path(crashed.run_dir).glob(".*.ckpt*.tmp")]:
            wrong = f"operation {at}: {left}"
        elif not same_outcome(crashed, undisturbed) or not same(
            *(checkpoint.read(Path(j.run_dir, "best.ckpt")) for j in (crashed, undisturbed))
        ):
            wrong = f"operation {at}: another outcome"
        elif code == 0:
            break
        else:
            shutil.rmtree(crashed.home)
    queue.put((wrong, at))


def test_crash_at_every_file_operation(tmp_path: Path, undisturbed: Config) -> None:
    queue = processes.SimpleQueue()
    process = processes.Process(target=crash_everywhere, args=(undisturbed, undisturbed, tmp_path, queue))
    process.start()
    process.join()
    wrong, points = queue.get()
    assert not wrong
    assert points > 40  # freezing, four checkpoints, two rows, three results, a teacher
