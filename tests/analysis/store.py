"""Make MLflow stores of synthetic runs.

MLflow creates the schema. SQL inserts the rows, which is much faster.
"""

import json
import math
import shutil
import sqlite3
import tempfile
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from analysis.schema import METRICS, PARAMS, TAGS

Row = Mapping[str, Any]
History = Mapping[str, Sequence[float]]

STARTED_MS = 1_700_000_000_000
EPOCH_METRICS = (
    *(
        "train/loss",
        "train/loss_ce",
        "train/loss_kd",
        "train/top1",
        "val/top1",
        "val/top5",
        "val/loss",
        "lr",
    ),
    *("time/epoch_s", "time/images_per_s"),
)
USUAL = {
    "status": "FINISHED",
    "experiment": "sddlskd",
    "dataset": "cifar100",
    "teacher": "resnet32x4",
    "student": "shufflev1",
    "distiller": "kd",
    "M": "[1]",
    "standardize": False,
    "complementary_weight": 2.0,
    "knowledge": "fusion",
    "temperature": 4.0,
    "ce_weight": 1.0,
    "kd_weight": 1.0,
    "lr": 0.05,
    "batch_size": 64,
    "epochs": 240,
    "seed": 0,
    "val_fraction": 0.0,
    "git_sha": "0" * 40,
}


@cache
def empty_store() -> Path:
    """Return an empty database of MLflow, made once per process because that takes seconds."""
    from mlflow.tracking import MlflowClient

    warnings.filterwarnings(
        "ignore", "The ``noload`` loader strategy is deprecated", DeprecationWarning
    )
    path = Path(tempfile.mkdtemp(prefix="store-"), "mlflow.db")
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


def make_store(
    path: Path,
    rows: Iterable[Row],
    history: Callable[[Row], History] | None = None,
    command: str = "python -m sddlskd.train -m sweep=a",
    plans: bool = True,
) -> list[str]:
    """Make a database of runs, with artifacts beside it. Each sweep gets a parent run.

    A row has the keys of schema.COLUMNS; USUAL has the values that a row lacks. Further keys are
    `experiment`, `absent` (columns and parameters that are not logged), `history` ({metric: values
    from epoch 1}), `predictions` (arrays), `planned_by` (other sweeps that planned the run), `tags`
    (further tags), and parameters, whose names contain a dot.

    Args:
        path: file of the database.
        rows: the runs.
        history: function that returns the history of a row without `history`; None for no history.
        command: command of the sweeps.
        plans: whether each sweep has a plan.json.

    Returns:
        The ids of the runs; "" for a run with status MISSING.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(empty_store(), path)
    artifacts = path.parent / "mlartifacts"
    whole = [_whole(number, row) for number, row in enumerate(rows)]
    with closing(sqlite3.connect(path)) as database, database:
        experiments = {"Default": 0}
        for row in whole:
            if row["experiment"] not in experiments:
                experiments[row["experiment"]] = len(experiments)
                values = {"experiment_id": len(experiments) - 1, "name": row["experiment"]}
                kept = {
                    "artifact_location": artifacts.as_uri(),
                    "lifecycle_stage": "active",
                    "creation_time": 0,
                }
                _insert(database, "experiments", [{**values, **kept}])
        runs = [row for row in whole if row["status"] != "MISSING"]
        parents = _parents(whole)
        everything = [*runs, *parents]
        _insert(database, "runs", (_run(row, experiments, artifacts) for row in everything))
        _insert(
            database,
            "tags",
            (_keyed(row, *tag) for row in everything for tag in _tags(row).items()),
        )
        _insert(
            database,
            "params",
            (_keyed(row, *param) for row in runs for param in _params(row).items()),
        )
        if history:
            for row in runs:
                row.setdefault("history", history(row))
        _insert(database, "metrics", (point for row in runs for point in _points(row)))
        _insert(database, "latest_metrics", (point for row in runs for point in _latest(row)))
    for row in everything:
        folder = artifacts / row["run_id"] / "artifacts"
        if "predictions" in row:
            folder.mkdir(parents=True)
            np.savez_compressed(folder / "predictions.npz", **row["predictions"])
        if "planned" in row and plans:
            folder.mkdir(parents=True)
            plan = {"name": row["sweep"], "command": command, **row["planned"]}
            (folder / "plan.json").write_text(json.dumps(plan))
    return [row["run_id"] for row in whole]


def command_of(row: Row) -> str:
    """Return the command of a job in the plan of such a store."""
    return f"python -m sddlskd.worker /runs/{row['student']}-{row['M']}-{row['seed']}"


def _plan_of(rows: Sequence[Row]) -> dict[str, Any]:
    """Return a plan: the common parameters once, and the other parameters of each job."""
    params = [_params(row) for row in rows]
    common = dict(set.intersection(*(set(one.items()) for one in params)))
    jobs = [
        {
            **{name: row[name] for name in ("config_hash", "settings_hash", "run_dir")},
            "command": command_of(row),
            "params": {key: value for key, value in own.items() if key not in common},
        }
        for row, own in zip(rows, params, strict=True)
    ]
    return {"common": common, "jobs": jobs}


def _whole(number: int, row: Row) -> dict[str, Any]:
    usual = {
        "run_id": "" if row.get("status") == "MISSING" else uuid.uuid4().hex,
        "name": f"run-{number}",
        "config_hash": f"{number:012x}",
        "settings_hash": "",
        "run_dir": f"/runs/run-{number}",
        "started": STARTED_MS + 1000 * number,
        "sweep": "",
        "absent": (),
        "planned_by": (),
    }
    return {**USUAL, **usual, **row}


def _parents(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return a parent run for each sweep."""
    planned: dict[str, list[Row]] = {}
    for row in rows:
        for sweep in filter(None, (row["sweep"], *row["planned_by"])):
            planned.setdefault(sweep, []).append(row)
    return [
        {
            **{
                "run_id": uuid.uuid4().hex,
                "name": sweep,
                "sweep": sweep,
                "status": "FINISHED",
                "absent": (),
            },
            **{
                "experiment": jobs[0]["experiment"],
                "started": STARTED_MS - 1000,
                "tags": {"kind": "sweep"},
            },
            "planned": _plan_of(jobs),
        }
        for sweep, jobs in planned.items()
    ]


def _insert(database: sqlite3.Connection, table: str, lines: Iterable[Mapping[str, Any]]) -> None:
    iterator = iter(lines)
    first = next(iterator, None)
    if first is not None:
        columns, marks = (
            ", ".join(f'"{name}"' for name in first),
            ", ".join(f":{name}" for name in first),
        )
        statement = f"INSERT INTO {table} ({columns}) VALUES ({marks})"
        database.execute(statement, first)
        database.executemany(statement, iterator)


def _run(row: Row, experiments: Mapping[str, int], artifacts: Path) -> dict[str, Any]:
    return {
        "run_uuid": row["run_id"],
        "name": row["name"],
        "source_type": "UNKNOWN",
        "source_name": "",
        "entry_point_name": "",
        "user_id": "",
        "status": row["status"],
        "start_time": row["started"],
        "lifecycle_stage": "active",
        "artifact_uri": f"{artifacts.as_uri()}/{row['run_id']}/artifacts",
        "experiment_id": experiments[row["experiment"]],
    }


def _keyed(row: Row, key: str, value: str) -> dict[str, str]:
    return {"key": key, "value": value, "run_uuid": row["run_id"]}


def _tags(row: Row) -> dict[str, str]:
    tags = {
        tag: str(row[column])
        for column, tag in TAGS.items()
        if column in row and column not in row["absent"]
    }
    if "superseded" in row:
        tags["superseded"] = str(row["superseded"]).lower()
    return {"kind": "job", **tags, **row.get("tags", {}), "mlflow.runName": row["name"]}


def _params(row: Row) -> dict[str, str]:
    # A training logs null as "None", too.
    params = {key: str(row.get(column)) for column, key in PARAMS.items()}
    params |= {key: str(value) for key, value in row.items() if "." in key}
    return {
        key: value
        for key, value in params.items()
        if key not in {PARAMS.get(name, name) for name in row["absent"]}
    }


def _finals(row: Row) -> dict[str, float]:
    return {key: row[column] for column, key in METRICS.items() if row.get(column) is not None}


def _point(row: Row, key: str, value: float, epoch: int) -> dict[str, Any]:
    nan = math.isnan(value)
    return {
        "key": key,
        "value": 0.0 if nan else float(value),
        "timestamp": row["started"] + epoch,
        "run_uuid": row["run_id"],
        "step": epoch,
        "is_nan": nan,
    }


def _points(row: Row) -> Iterator[dict[str, Any]]:
    history = row.get("history", {})
    for key, values in history.items():
        for epoch, value in enumerate(values, start=1):
            yield _point(row, key, value, epoch)
    for key, value in _finals(row).items():
        if key not in history:
            yield _point(row, key, value, _epochs_done(row))


def _latest(row: Row) -> Iterator[dict[str, Any]]:
    history = row.get("history", {})
    latest = {
        key: _point(row, key, values[-1], len(values))
        for key, values in history.items()
        if len(values)
    }
    if "val/top1" not in latest and row.get("epochs_done", row.get("last")) is not None:
        latest["val/top1"] = _point(row, "val/top1", row.get("last", 0.0), _epochs_done(row))
    for key, value in _finals(row).items():
        latest.setdefault(key, _point(row, key, value, _epochs_done(row)))
    return iter(latest.values())


def _epochs_done(row: Row) -> int:
    done = row.get("epochs_done")
    return int(row["epochs"] if done is None else done)
