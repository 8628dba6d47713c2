"""Estimate how long jobs will take, from the epochs of runs of the same networks and data."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

from sddlskd import config as cfg
from sddlskd import record
from sddlskd.config import Config
from sddlskd.terminal.console import duration
from sddlskd.terminal.words import counted

__all__ = ["Estimate", "estimates", "networks_of", "seconds_left", "time_left"]

# The loader of libyaml, if there is one, takes a seventh of the time.
SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
LAST_EPOCHS = 3  # epochs of a run that has no outcome yet whose times count
# Settings that decide the time of an epoch: only runs with the same values count.
DECISIVE = (
    "dataset.size",
    "dataset.train_fraction",
    "student.name",
    "teacher.cache",
    "trainer.batch_size",
    "trainer.compile",
    "trainer.devices",
    "trainer.max_steps",
    "trainer.precision",
)


@dataclass(frozen=True)
class Estimate:
    """Estimated time that a job adds to a sweep on one device.

    Attributes:
        seconds: seconds, if the job's group has as many jobs as the groups of the past runs, or
            more.
        at_most: seconds, if the past runs spent all their time on the teacher. A smaller group
            shares this time among fewer jobs. Equal to `seconds` unless the group is smaller.
        runs: run directories of the past runs that the estimate stands on.
        group_sizes: numbers of jobs in the groups of these runs.
        same_method: whether these runs have the job's method and scales.
    """

    seconds: float
    at_most: float
    runs: frozenset[Path]
    group_sizes: frozenset[int]
    same_method: bool


@dataclass(frozen=True)
class _PastRun:
    """A run whose time counts.

    Attributes:
        folder: the run directory.
        epoch_s: mean seconds of an epoch of the run's group.
        group_size: number of jobs of the group.
        method: method and scales, as the run's name and the optimizer's name have them.
        held_out: part of the training images that is held out.
    """

    folder: Path
    epoch_s: float
    group_size: int
    method: tuple[str, str]
    held_out: float


def seconds_left(
    jobs: Sequence[Config], kind: str | None, *, anew: bool = False
) -> list[float | None]:
    """Return `Estimate.seconds` of each job; None for a job without an estimate.

    The arguments are those of `estimates`.
    """
    found: list[float | None] = [None] * len(jobs)
    for index, one in enumerate(estimates(jobs, kind, anew=anew)):
        if one is not None:
            found[index] = one.seconds
    return found


def estimates(
    jobs: Sequence[Config],
    kind: str | None,
    *,
    anew: bool = False,
    group_sizes: Sequence[int] | None = None,
) -> list[Estimate | None]:
    """Return the estimated time that each job adds to a sweep on one device until its end.

    The estimate is the mean time per epoch of past runs, times the epochs of the job that are left.
    Runs count that have the same student, teacher, data set and `DECISIVE` settings. Of these, runs
    of the job's group size are taken if there are any, and of these, runs of the job's method if
    there are any. The time of a run is divided by its group size, because the runs of a group share
    their time. An entry is None if no run counts.

    Args:
        jobs: the jobs.
        kind: kind of the device, "cuda", "mps" or "cpu"; only runs on such devices count. None if
            it is not known; then all runs count.
        anew: whether the jobs start at their first epoch, whatever their run directories hold.
        group_sizes: number of jobs in the group of each job; None if it is not known.
    """
    past: dict[tuple[Any, ...], list[_PastRun]] = {}
    found: list[Estimate | None] = []
    for index, job in enumerate(jobs):
        folder, networks = Path(job.run_dir).parent, networks_of(job)
        flat = cfg.flatten(job)
        settings = {key: flat.get(key) for key in DECISIVE}
        alike = (folder, networks, job.has_teacher, *map(str, settings.values()))
        if alike not in past:
            past[alike] = _past_runs(folder, networks, job.has_teacher, settings, kind)
        runs = past[alike]
        if not runs:
            found.append(None)
            continue
        done = 0
        if not anew:
            done = sum(row["epoch"] > 0 for row in record.read_rows(Path(job.run_dir)))
        size = group_sizes[index] if group_sizes else None
        found.append(_estimate(job, runs, job.trainer.epochs - done, size))
    return found


def _estimate(job: Config, runs: Sequence[_PastRun], epochs: int, size: int | None) -> Estimate:
    """Return the estimate for some epochs of a job that trains in a group of `size` jobs.

    `runs` are the past runs that count, at least one. `size` is None if it is not known.
    """
    runs = [run for run in runs if run.group_size == size] or runs
    of_method = [
        run for run in runs if run.method == _method(Path(job.run_dir), job.optimizer.name)
    ]
    runs = of_method or runs
    kept = 1 - job.dataset.val_fraction
    shares, most = [], []
    for run in runs:
        seconds = epochs * run.epoch_s / run.group_size * kept / (1 - run.held_out)
        shares.append(seconds)
        if size and job.has_teacher:
            seconds *= max(1, run.group_size / size)
        most.append(seconds)
    return Estimate(
        seconds=mean(shares),
        at_most=mean(most),
        runs=frozenset(run.folder for run in runs),
        group_sizes=frozenset(run.group_size for run in runs),
        same_method=bool(of_method),
    )


def _past_runs(
    folder: Path, networks: str, has_teacher: bool, settings: Mapping[str, Any], kind: str | None
) -> list[_PastRun]:
    """Return the runs of some networks with these settings, without those with a damaged file.

    `folder` holds the run directories. See `estimates` for `kind`.
    """
    runs: list[_PastRun] = []
    for path in folder.glob(f"{networks}-*/result.json"):
        # A damaged record, or one that another process moves away, is no reason to end a sweep.
        with suppress(record.Damaged, OSError, yaml.YAMLError, TypeError, KeyError):
            runs += _past_run(path.parent, has_teacher, settings, kind)
    return runs


def _past_run(
    folder: Path, has_teacher: bool, settings: Mapping[str, Any], kind: str | None
) -> list[_PastRun]:
    """Return a run in a list; [] if it has other settings, no epoch, or another kind of device."""
    result = record.read_result(folder)
    if kind not in (None, _kind_of(result.get("environment", ""))):
        return []
    file = folder / "config.yaml"
    frozen = _frozen(file, file.stat().st_mtime_ns)
    if has_teacher != bool(frozen["distiller"]["loss"] or frozen["features"]):
        return []
    for key, value in settings.items():
        group, _, name = key.partition(".")
        if frozen[group].get(name) != value:
            return []
    group_size = result.get("group_size", 1)
    if result.get("epochs"):
        epoch_s = result["seconds"] / result["epochs"]
    elif rows := record.read_rows(folder)[-LAST_EPOCHS:]:
        epoch_s = mean(row["time/epoch_s"] for row in rows)
    else:
        return []
    method = _method(folder, frozen["optimizer"]["name"])
    return [_PastRun(folder, epoch_s, group_size, method, frozen["dataset"]["val_fraction"])]


@cache
def _frozen(file: Path, changed_ns: int) -> Any:
    """Return the content of a config.yaml, of the version that was written at a time.

    `config.load` would take ten times as long, and a sweep asks for many files after each group.
    """
    return yaml.load(file.read_text(), Loader=SafeLoader)


def _method(run_dir: Path, optimizer: str) -> tuple[str, str]:
    """Return a run's name without its seed and hash, and its optimizer; DOT is a method."""
    return run_dir.name.rsplit("-", 2)[0], optimizer


def networks_of(job: Config) -> str:
    """Return the networks of a job as its run name has them, such as "resnet32x4-resnet8x4"."""
    if not job.has_teacher:
        return job.student.name
    return f"{cfg.teacher_name(job).replace('+', '-')}-{job.student.name}"


def _kind_of(environment: str) -> str:
    """Return the kind of the device in the entry "environment" of a result.json; "" for no entry.

    `devices.describe` has written the entry: it names CPU and MPS, and else the GPU's model.
    """
    words = environment.split(", ")
    if not environment:
        return ""
    return next((kind for kind in ("cpu", "mps") if kind in words), "cuda")


def time_left(seconds: Sequence[float | None], devices: int) -> str:
    """Return how long jobs will take together, such as "about 3:20 on 2 devices".

    Args:
        seconds: estimate of each job, as from `seconds_left`.
        devices: number of devices that train the jobs; those without a job do not count.
    """
    known = [one for one in seconds if one is not None]
    if seconds and not known:
        return "not known yet"
    devices = max(min(devices, len(seconds)), 1)
    places = f"{devices} devices" if devices > 1 else "one device"
    text = f"about {duration(sum(known) / devices)} on {places}"
    if len(known) < len(seconds):
        text += f" for {len(known)} of {counted(len(seconds), 'job')}"
    return text
