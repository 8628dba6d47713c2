"""Deliver the cells of a sweep to MLflow: one MLflow run per setting, with the mean over seeds.

A cell of a sweep is a group of runs that differ only in the seed. Runs of different versions of the
user's own code are different cells, as they are different rows of a table. MLflow shows single
runs, so each cell becomes an MLflow run of its own, tagged kind=cell, below the sweep's run. Its
metrics are the mean and deviation that a table prints.
"""

import json
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sddlskd import config as cfg
from sddlskd import record
from sddlskd.terminal.words import counted
from sddlskd.tracking import uri as tracking_uri

__all__ = ["cells_of", "send_cells"]

FEWEST = 2  # finished runs that a mean needs
NUMBERS = ("best_top1", "last_top1", "test_top1", "best_mAP", "last_mAP", "test_mAP")
PARAMS = ("dataset.name", "teacher.name", "student.name", "M", "recipe", "trainer.epochs")


Key = tuple[str, str]
"""settings_hash of a cell, and its version of the user's own code: "" unless there are several."""


def cells_of(folder: Path) -> dict[Key, list[dict[str, Any]]]:
    """Return the finished runs of a sweep in groups; the runs of a group differ only in the seed.

    `folder` is the sweep's folder, with the list of its runs in plan.json. Runs whose result is
    missing or cannot be read do not count as finished.

    Returns:
        {(settings_hash, own_code): runs} of each group with at least two finished runs. The hash is
        that of the settings without the seed. `own_code` is the tag of the runs if the settings
        were trained with several versions of the user's own code, else "". Each run is a dict with
        "run_dir" (path of its folder) and the accuracies of `NUMBERS`, such as "best_top1", in
        percent, or None for an accuracy that the run does not have. The result is {} if the plan is
        missing or cannot be read.
    """
    finished: dict[str, list[dict[str, Any]]] = defaultdict(list)
    codes: dict[str, dict[str, str]] = {}
    for job in _planned(folder):
        run_dir = Path(job["run_dir"])
        try:
            result = record.read_result(run_dir)
        except (record.Damaged, OSError):
            continue
        if result.get("status") == record.FINISHED and (run_dir / "config.yaml").exists():
            numbers = {name: result.get(name) for name in NUMBERS}
            finished[job["settings_hash"]].append({"run_dir": job["run_dir"], **numbers})
            codes[job["run_dir"]] = _own_code(run_dir)
    cells: dict[Key, list[dict[str, Any]]] = defaultdict(list)
    for settings, runs in finished.items():
        several = _several([codes[run["run_dir"]] for run in runs])
        for run in runs:
            version = record.code_versions(codes[run["run_dir"]]) if several else ""
            cells[settings, version].append(run)
    return {key: runs for key, runs in cells.items() if len(runs) >= FEWEST}


def _own_code(run_dir: Path) -> dict[str, str]:
    """Return the hashes of the user's own code of a run by module; {} if they are not known."""
    try:
        own_code: dict[str, str] = record.read_json(run_dir / "code.json").get("own_code", {})
    except (record.Damaged, OSError):
        return {}
    return own_code


def _several(codes: Sequence[Mapping[str, str]]) -> bool:
    """Return whether runs are known to have several versions of one module."""
    return len({item for code in codes for item in code.items()}) > len(
        {module for code in codes for module in code}
    )


def send_cells(folder: Path, delivery: Mapping[str, Any]) -> None:
    """Write the means over seeds of a sweep to MLflow, one MLflow run for each group of `cells_of`.

    The runs of a group differ only in the seed. The MLflow run of a group, which lies below the run
    of the sweep, gets the mean and the sample standard deviation of each accuracy, in percent. An
    existing MLflow run of the group is updated; the MLflow run of a group that no longer exists is
    deleted. Errors of MLflow propagate.

    Args:
        folder: The sweep's folder, with its plan.json.
        delivery: The content of the sweep's mlflow.json, with "uri" (address of MLflow), "run_id"
            (id of the sweep's MLflow run) and "sweep" (name of the sweep).
    """
    cells = cells_of(folder)
    client = tracking_uri.client(str(delivery["uri"]))
    parent = delivery["run_id"]
    experiment_id = client.get_run(parent).info.experiment_id
    known = _known(client, experiment_id, parent)
    for key in known.keys() - cells.keys():
        client.delete_run(known[key])
    for key, results in cells.items():
        run_id = known.get(key)
        if run_id is None:
            job = cfg.load(Path(results[0]["run_dir"], "config.yaml"))
            run_id = _create(client, experiment_id, delivery, key, job)
        _send(client, run_id, dict(_numbers(results)))


def _known(client: Any, experiment_id: str, parent: str) -> dict[Key, str]:
    """Return the run ids of the cells below a sweep's run."""
    condition = f"tags.kind = 'cell' and tags.`mlflow.parentRunId` = '{parent}'"
    found: dict[Key, str] = {}
    token = None
    while True:
        page = client.search_runs([experiment_id], condition, page_token=token)
        tags = {run.info.run_id: run.data.tags for run in page}
        found |= {(of["settings_hash"], of.get("own_code", "")): key for key, of in tags.items()}
        token = page.token
        if not token:
            return found


def _send(client: Any, run_id: str, numbers: Mapping[str, float]) -> None:
    """Log the numbers of a cell, with a sentence that MLflow shows beside the run."""
    from mlflow.entities import Metric, RunTag

    now = int(time.time() * 1000)
    metrics = [Metric(name, value, now, 0) for name, value in numbers.items()]
    tags = []
    if "best/top1/std" in numbers:
        best, spread = numbers["best/top1/mean"], numbers["best/top1/std"]
        said = (
            f"best top-1 {best:.2f} ± {spread:.2f} (%, {counted(round(numbers['seeds']), 'seed')})"
        )
        tags.append(RunTag("mlflow.note.content", said))
    client.log_batch(run_id, metrics=metrics, tags=tags)
    client.set_terminated(run_id, record.FINISHED)


def _planned(folder: Path) -> list[dict[str, Any]]:
    """Return the jobs of a sweep's plan; [] if the plan is missing or cannot be read."""
    try:
        jobs: list[dict[str, Any]] = json.loads((folder / "plan.json").read_text())["jobs"]
    except (OSError, ValueError, KeyError):
        return []
    return jobs


def _create(
    client: Any,
    experiment_id: str,
    delivery: Mapping[str, Any],
    key: Key,
    job: cfg.Config,
) -> str:
    """Create the MLflow run of a cell, with its tags and parameters, and return its id.

    `job` is the configuration of one of the runs of the cell.
    """
    settings, own_code = key
    tags = {
        "kind": "cell",
        "settings_hash": settings,
        "sweep": str(delivery["sweep"]),
        "mlflow.parentRunId": delivery["run_id"],
    }
    from mlflow.entities import Param

    name = f"mean: {cfg.title(job, seed=False)}"
    if own_code:
        tags["own_code"] = own_code
        name = f"{name}, own_code={own_code}"
    run_id: str = client.create_run(experiment_id, run_name=name, tags=tags).info.run_id
    params = {key: value for key, value in cfg.flatten(job).items() if key in PARAMS}
    known = {**params, "method": cfg.method_name(job)}
    client.log_batch(run_id, params=[Param(key, str(value)) for key, value in known.items()])
    return run_id


def _numbers(results: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, float]]:
    """Yield (name, value) of the metrics of a cell.

    The metrics are the number of runs (seeds), and for each accuracy the mean and the sample
    standard deviation in percent. An accuracy that fewer than FEWEST runs have is left out.
    """
    yield "seeds", float(len(results))
    for name in NUMBERS:
        values = [result[name] for result in results if result.get(name) is not None]
        if len(values) >= FEWEST:
            key = name.replace("_", "/")
            yield f"{key}/mean", statistics.fmean(values)
            yield f"{key}/std", statistics.stdev(values)
