"""Estimate how long jobs will take, from the epochs of runs of the same networks and data."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from statistics import mean

from sddlskd import config as cfg
from sddlskd import record
from sddlskd.config import Config
from sddlskd.terminal.console import duration
from sddlskd.terminal.words import counted

__all__ = ["networks_of", "seconds_left", "time_left"]

LAST_EPOCHS = 3  # epochs of a run that has no outcome yet whose times count


def seconds_left(
    jobs: Sequence[Config], kind: str | None, *, anew: bool = False
) -> list[float | None]:
    """Return the estimated seconds that each job adds to a sweep on one device until its end.

    The estimate is the mean time per epoch of runs of the same student, teacher and data set, times
    the epochs of the job that are left. The time of a run is divided by its group size, because the
    runs of a group share their time. An entry is None if there is no such run.

    Args:
        jobs: the jobs.
        kind: kind of the device, "cuda", "mps" or "cpu"; only runs on such devices count. None if
            it is not known; then all runs count.
        anew: whether the jobs start at their first epoch, whatever their run directories hold.
    """
    per_epoch: dict[tuple[Path, str], float | None] = {}
    found: list[float | None] = []
    for job in jobs:
        alike = Path(job.run_dir).parent, networks_of(job)
        if alike not in per_epoch:
            per_epoch[alike] = _seconds_per_epoch(*alike, kind)
        seconds = per_epoch[alike]
        if seconds is not None:
            done = 0
            if not anew:
                done = sum(row["epoch"] > 0 for row in record.read_rows(Path(job.run_dir)))
            seconds *= job.trainer.epochs - done
        found.append(seconds)
    return found


def _seconds_per_epoch(folder: Path, networks: str, kind: str | None) -> float | None:
    """Return the mean seconds of an epoch of the runs of some networks, None without such runs.

    `folder` holds the run directories. See `seconds_left` for `kind`. A run with a damaged file
    does not count.
    """
    of_runs: list[float] = []
    for path in folder.glob(f"{networks}-*/result.json"):
        with suppress(record.Damaged):
            of_runs += _epoch_of(path.parent, kind)
    return mean(of_runs) if of_runs else None


def _epoch_of(folder: Path, kind: str | None) -> list[float]:
    """Return the mean seconds of an epoch of a run, [] if none has ended or the kind is another."""
    result = record.read_result(folder)
    if kind not in (None, _kind_of(result.get("environment", ""))):
        return []
    group_size = result.get("group_size", 1)
    if result.get("epochs"):
        return [result["seconds"] / result["epochs"] / group_size]
    rows = record.read_rows(folder)[-LAST_EPOCHS:]
    if not rows:
        return []
    return [mean(row["time/epoch_s"] for row in rows) / group_size]


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
