"""Read runs from an MLflow store into one frame (pandas DataFrame) with one row per run.

No run is dropped: failed, running and superseded runs are rows, and so is a job that a sweep
planned but nobody ran (status MISSING). Metrics by epoch and predictions are read on demand. All
errors are ValueErrors with a message of one line.
"""

import difflib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import pandas as pd

from .names import counted
from .protocol import trains_longer
from .schema import (
    COLUMNS,
    METRICS,
    PARAMS,
    STANDARDIZED,
    STATUSES,
    TAGS,
    canonical_M,
    details_of,
    feature_of,
    frame_of,
)
from .store import MAKE_RUNS, artifact, experiments_of, points_of, quoted, reading, search

__all__ = ["PRUNED", "Runs", "listing", "load"]

NAMES_SHOWN = 10  # names that an error message lists
# Beginning of the reason of a run that halving dropped.
PRUNED = "PRUNED: "
# Fields of a job in a plan, besides its params.
PLANNED = ("config_hash", "settings_hash", "run_dir", "command")
LEARNED_TEMPERATURE = "distiller.learned_temperature"
"""Param that holds the arguments of a temperature that is learnt, or {}."""
CONTRACT = ("dataset", "teacher", "student", "distiller")
"""Columns that place a run in a table. At least one run of a selection must have all of them."""
NEEDED = (*CONTRACT, "M", "standardize", "epochs", "seed")
"""Columns that every run should have. The column `reason` names those that a run lacks."""


@dataclass(frozen=True, eq=False)
class Runs:
    """Runs of a sweep, an MLflow experiment or a whole MLflow store, as `load` returns them.

    The field `frame` has one row per run.
    """

    frame: pd.DataFrame  # one row per run, with the columns of schema.COLUMNS
    name: str  # name of the sweep or experiment; "" for all runs of the store
    uri: str  # address of the store
    command: str  # command that starts the sweep; "" if it is unknown

    def history(
        self, metrics: Sequence[str] = ("val/top1",), run_ids: Iterable[str] | None = None
    ) -> pd.DataFrame:
        """Return the values of metrics of the runs, one per run, metric and epoch.

        Args:
            metrics: names of metrics in MLflow, such as "val/top1".
            run_ids: MLflow ids of runs; None for all runs of `frame`. The id "", which a planned
                job without a run has, is skipped.

        Returns:
            A frame with the columns run_id, metric, epoch and value, sorted by the first three. If
            a metric was logged more than once for an epoch, the latest value counts. A run without
            a metric has no row for the metric. Without any value, the frame is empty.

        Raises:
            ValueError: If the store cannot be read, or if an MLflow server does not know a run.
        """
        asked = self.frame["run_id"] if run_ids is None else run_ids
        ids = [run_id for run_id in asked if run_id]
        with reading(self.uri) as client:
            points = [
                point for metric in metrics for point in points_of(client, self.uri, ids, metric)
            ]
        types = {
            "run_id": "str",
            "metric": "str",
            "epoch": "int64",
            "time": "int64",
            "value": "float64",
        }
        frame = pd.DataFrame(points, columns=list(types)).astype(types)
        frame = frame.sort_values(["run_id", "metric", "epoch", "time"], kind="stable")
        latest = frame.drop_duplicates(["run_id", "metric", "epoch"], keep="last")
        return latest.drop(columns="time").reset_index(drop=True)

    def predictions(self, run_id: str) -> dict[str, np.ndarray] | None:
        """Return the predictions on the test split that a run saved, or None if it saved none.

        `run_id` is the run's id in MLflow. The result holds the arrays of the run's artifact
        predictions.npz by name; `sddlskd.training.predictions.collect` describes the arrays. Raise
        ValueError if the predictions cannot be read: the artifact is damaged, the store has no such
        run, or any other problem.
        """
        with reading(self.uri) as client, artifact(client, run_id, "predictions.npz") as path:
            if path is None:
                return None
            try:
                with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                    return dict(arrays)
            except (ValueError, OSError, EOFError, BadZipFile) as error:
                raise ValueError(
                    f"predictions.npz of run {run_id} is not a complete file of arrays ({error})"
                ) from None


def load(name: str | Sequence[str] | None, uri: str, *, mixed_epochs: bool = False) -> Runs:
    """Load the runs of a sweep, or those of an MLflow experiment if no sweep has the name.

    Args:
        name: name of the sweep or experiment, or several names, whose runs are taken together; None
            for all runs of the store.
        uri: address of the store: `http(s)://host:port` or `sqlite:////absolute/path/mlflow.db`.
        mixed_epochs: whether runs on one data set may differ in their number of epochs.

    Returns:
        The runs, also those that a later run of the same job replaced (column `superseded`). A job
        that the sweep planned but nobody ran is a row with the status MISSING. If another sweep ran
        a job that this sweep planned, the run is included.

    Raises:
        ValueError: If the runs cannot be loaded: the store cannot be read, no sweep or experiment
            has the name, there is no run of sddlskd, the plan of a sweep is damaged, or any other
            problem. Also if runs on one data set differ in their number of epochs and
            `mixed_epochs` is False. Runs that trained a teacher, and methods that the papers train
            longer, may always differ.
    """
    names = [name] if isinstance(name, str) else list(name or [])
    wanted: Sequence[str | None] = names or [None]
    plans: list[dict[str, Any]] = []
    rows: dict[str, dict[str, Any]] = {}  # by run id, and by config_hash without a run
    with reading(uri) as client:
        experiments = experiments_of(client)
        for one in wanted:
            more, found = _select_named(client, experiments, one, uri)
            _refuse_strangers(found, f"experiment {one}" if one else uri)
            plans += more
            rows |= {row.get("run_id") or row["config_hash"]: row for row in found}
    frame = _frame(list(rows.values()))
    if not mixed_epochs:
        _refuse_mixed_epochs(frame)
    commands = {plan["command"] for plan in plans}
    command = commands.pop() if len(commands) == 1 else ""
    return Runs(frame, " and ".join(names), uri, command)


def listing(uri: str) -> pd.DataFrame:
    """Return a table of the sweeps and experiments of an MLflow store, one per row.

    The columns are "kind" ("sweep" or "experiment"), "name", "runs" (number of runs), and the
    number of runs of each status in `STATUSES`. Sweeps come first; both kinds are sorted by name. A
    job that was planned but never run counts as a run with the status MISSING. Runs that a later
    run of the same job replaced do not count. A run of a job that several sweeps planned counts in
    each of these sweeps. Raise ValueError if the store cannot be read or the plan of a sweep is
    damaged.
    """
    with reading(uri) as client:
        scans = {name: _scan(client, {name: key}) for name, key in experiments_of(client).items()}
    sweeps: dict[str, set[str]] = {}  # names of the sweeps that planned a job, by config_hash
    for plan in (plan for plans, _ in scans.values() for plan in plans):
        for job in plan["jobs"]:
            sweeps.setdefault(job["config_hash"], set()).add(plan["name"])
    there = _hashes(row for _, rows in scans.values() for row in rows.values())
    counts: dict[tuple[str, str], Counter[str]] = {}
    for name, (plans, rows) in scans.items():
        total = counts.setdefault(("experiment", name), Counter())
        for row in (*rows.values(), *_missing(plans, there).values()):
            if not row["superseded"]:
                total[row["status"]] += 1
                for sweep in ({row["sweep"]} | sweeps.get(row["config_hash"], set())) - {""}:
                    counts.setdefault(("sweep", sweep), Counter())[row["status"]] += 1
    lines = [
        {
            "kind": kind,
            "name": name,
            "runs": total.total(),
            **{status: total[status] for status in STATUSES},
        }
        for (kind, name), total in sorted(
            counts.items(), key=lambda item: (item[0][0] != "sweep", item[0][1])
        )
        if total or name != "Default"  # MLflow makes this experiment in every store
    ]
    return pd.DataFrame(lines, columns=["kind", "name", "runs", *STATUSES])


def _no_such(client: Any, experiments: Mapping[str, str], name: str, uri: str) -> str:
    sweeps = {
        run.data.tags.get("sweep", "") for run in search(client, experiments, "tags.kind = 'sweep'")
    } - {""}
    there = sorted(sweeps | experiments.keys())
    closest = difflib.get_close_matches(name, there, n=NAMES_SHOWN, cutoff=0.0)
    more = f" and {len(there) - len(closest)} more" if len(there) > len(closest) else ""
    return f"no sweep or experiment {name} at {uri}; there are {', '.join(closest)}{more}"


# Rows


def _select_named(
    client: Any, experiments: Mapping[str, str], name: str | None, uri: str
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the plans and rows, as `_select` does, of a sweep, an experiment or the whole store.

    Args:
        client: MlflowClient, as `reading` yields it.
        experiments: ids of all experiments, by name.
        name: name of the sweep or experiment; None for all runs.
        uri: address of the store, for messages.

    Raises:
        ValueError: If nothing has the name, or if there are no runs.
    """
    query = f"tags.sweep = {quoted(name)}" if name else ""
    plans, rows = _select(client, experiments, experiments, query)
    if not rows and name and name not in experiments:
        raise ValueError(_no_such(client, experiments, name, uri))
    if not rows and name:
        plans, rows = _select(client, experiments, {name: experiments[name]})
    if not rows:
        where = f" in experiment {name}" if name else ""
        raise ValueError(f"{uri} has no runs{where}; {MAKE_RUNS}")
    return plans, rows


def _select(
    client: Any, everywhere: Mapping[str, str], experiments: Mapping[str, str], query: str = ""
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the plans of the sweeps that a query finds, and a row for each run and missing job.

    A job that two sweeps share is tagged with the first sweep only. For this reason, the unfinished
    jobs of a plan are searched for by config_hash in all experiments.

    Args:
        client: MlflowClient, as `reading` yields it.
        everywhere: ids of all experiments, by name.
        experiments: ids of the experiments that the query is for, by name.
        query: MLflow filter; "" for all runs.

    Returns:
        The plans as `_read_plan` returns them, and the rows.
    """
    plans, rows = _scan(client, experiments, query)
    planned = {job["config_hash"]: job for plan in plans for job in plan["jobs"]}
    finished = _hashes(rows.values(), finished=True)
    for config_hash in (each for each in planned if each not in finished):
        rows |= _scan(client, everywhere, f"tags.config_hash = {quoted(config_hash)}")[1]
    rows |= _missing(plans, _hashes(rows.values()))
    for row in rows.values():
        if row["config_hash"] in planned:
            row["command"] = planned[row["config_hash"]]["command"]
    return plans, list(rows.values())


def _scan(
    client: Any, experiments: Mapping[str, str], query: str = ""
) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """Return the plans among the runs that a query finds, and the other runs as rows by run id.

    Args:
        client: MlflowClient, as `reading` yields it.
        experiments: ids of the experiments to search, by name.
        query: MLflow filter; "" for all runs.
    """
    plans: list[dict[str, Any]] = []
    rows: dict[str, dict[str, Any]] = {}
    for run in search(client, experiments, query):
        kind = run.data.tags.get("kind")
        if kind == "sweep":
            plans.append(_read_plan(client, run))
        elif kind != "cell":  # a cell is a mean over runs that are rows themselves
            rows[run.info.run_id] = _row(run)
    return plans, rows


def _missing(
    plans: Iterable[Mapping[str, Any]], there: Container[str]
) -> dict[str, dict[str, Any]]:
    """Return a row with the status MISSING for each planned job that has no run, by config_hash.

    `there` holds the config_hashes of the jobs that have a run.
    """
    planned = {job["config_hash"]: (plan["name"], job) for plan in plans for job in plan["jobs"]}
    return {key: _missing_row(*found) for key, found in planned.items() if key not in there}


def _hashes(rows: Iterable[Mapping[str, Any]], finished: bool = False) -> set[str]:
    """Return the config_hashes of the rows that are not superseded.

    If `finished` is True, only rows with the status FINISHED count.
    """
    return {
        row["config_hash"]
        for row in rows
        if not row["superseded"] and (row["status"] == "FINISHED" or not finished)
    }


def _read_plan(client: Any, parent: Any) -> dict[str, Any]:
    """Return the plan of a sweep as {"name", "command", "jobs"}, read from the sweep's parent run.

    `jobs` is [] if the run kept no plan. Raise ValueError if the plan is damaged.
    """
    sweep = parent.data.tags.get("sweep", "")
    with artifact(client, parent.info.run_id, "plan.json") as path:
        if path is None:
            return {"name": sweep, "command": "", "jobs": []}
        try:
            plan = json.loads(path.read_text())
            common = plan["common"]  # params that all jobs share
            jobs = [
                {**{key: job[key] for key in PLANNED}, "params": {**common, **job["params"]}}
                for job in plan["jobs"]
            ]
            return {"name": sweep, "command": plan["command"], "jobs": jobs}
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"plan.json of sweep {sweep} (run {parent.info.run_id}) is not a valid plan "
                f"({error!r}); start the sweep again"
            ) from None


def _row(run: Any) -> dict[str, Any]:
    """Return an MLflow run as a row of the frame, {column: value}, without the column `command`.

    A param or group_size that is missing or not valid has no entry. A missing metric is None, and a
    missing text tag is "". `reason` is the recorded reason, followed by a complaint for each param
    of `NEEDED` that is missing, each param or group_size that is not valid, and each metric that is
    NaN.
    """
    tags = run.data.tags
    metrics = run.data.metrics
    row, complaints = _typed(run.data.params)
    complaints += [f"{key} is NaN" for key in METRICS.values() if math.isnan(metrics.get(key, 0.0))]
    # MLflow's public attributes do not give the steps of the metrics.
    steps = {metric.key: metric.step for metric in run.data._metric_objs}
    size, size_complaints = _parsed(tags, {"group_size": TAGS["group_size"]})
    text = {column: tags.get(tag, "") for column, tag in TAGS.items() if COLUMNS[column] == "str"}
    status = "RUNNING" if run.info.status == "SCHEDULED" else run.info.status
    reason = tags.get(TAGS["reason"], "")
    if status == "KILLED" and reason.startswith(PRUNED):  # MLflow has no such status
        status, reason = "PRUNED", reason.removeprefix(PRUNED)
    done = steps.get("val/top1")
    if done is not None:
        done = max(done, 0)  # a first stage of training has the epochs 0, -1, ...
    return {
        **row,
        **size,
        **{column: metrics.get(key) for column, key in METRICS.items()},
        **text,
        "source": tags.get(TAGS["source"], "sddlskd"),
        "reason": "; ".join(filter(None, [reason, *complaints, *size_complaints])),
        "run_id": run.info.run_id,
        "name": run.info.run_name or "",
        "status": status,
        "superseded": tags.get(TAGS["superseded"]) == "true",
        "started": pd.Timestamp(run.info.start_time, unit="ms", tz="UTC"),
        "epochs_done": done,
    }


def _missing_row(sweep: str, job: Mapping[str, Any]) -> dict[str, Any]:
    row, complaints = _typed(job["params"])
    return {
        **row,
        "status": "MISSING",
        "reason": "; ".join(complaints),
        "sweep": sweep,
        "config_hash": job["config_hash"],
        "settings_hash": job["settings_hash"],
        "run_dir": job["run_dir"],
        "name": Path(job["run_dir"]).name,
        "superseded": False,
    }


def _typed(params: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """Return the columns that the params of a run give, and a complaint for each faulty param."""
    other = params.get("standardize", "") if params.get("standardize") in STANDARDIZED else ""
    if other:
        params = {**params, "standardize": "False"}
    row, complaints = _parsed(params, PARAMS)
    row["standardization"] = other
    if features := _features(params):
        row["features"] = "+".join(features)
    row["details"] = details_of(params)
    row["looks"] = _looks(params)
    if params.get(LEARNED_TEMPERATURE, "None") not in ("None", "{}"):
        row["learned_temperature"] = True
    if absent := [PARAMS[column] for column in NEEDED if PARAMS[column] not in params]:
        complaints.insert(0, f"no param {', '.join(absent)}")
    return row, complaints


def _looks(params: Mapping[str, str]) -> int | None:
    """Return how often a sweep with seeds=until_decided looks at its results; None for others.

    Such a sweep looks after 3 seeds, and then after each seed.
    """
    most = params.get("sweep.max_seeds", "")
    if params.get("sweep.seeds") != "until_decided" or not most.isdecimal():
        return None
    return max(1, int(most) - 2)


def _features(params: Mapping[str, str]) -> list[str]:
    """Return the feature methods of a run, spelled as by `feature_of`, in order of their names."""
    keys = [re.fullmatch(r"features\.(.+)\.weight", key) for key in params]
    names = sorted(key[1] for key in keys if key)
    return [feature_of(name, _options(params, name)) for name in names]


def _options(params: Mapping[str, str], feature: str) -> dict[str, Any]:
    """Return the arguments of a feature method; {} if its param is not a JSON object."""
    try:
        options = json.loads(params.get(f"features.{feature}.method", "{}"))
    except ValueError:
        return {}
    return options if isinstance(options, dict) else {}


def _parsed(texts: Mapping[str, str], keys: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    row = {}
    complaints = []
    for column, key in keys.items():
        text = texts.get(key, "None")
        kind = COLUMNS[column].lower()
        parse = _PARSERS[COLUMNS[column]]
        if column == "M":
            kind = "list of scales"
            parse = _scales
        try:
            if text != "None":
                row[column] = parse(text)
        except (ValueError, KeyError):
            complaints.append(f"{key}={text[:40]} is not a valid {kind}")
    return row, complaints


_PARSERS: dict[str, Callable[[str], Any]] = {
    "str": str,
    "bool": lambda text: {"True": True, "False": False}[text],
    "Int64": int,
    "Float64": float,
}


def _scales(text: str) -> str:
    scales = json.loads(text)
    if not isinstance(scales, list) or not all(type(m) is int and m > 0 for m in scales):
        raise ValueError
    return canonical_M(text)


def _frame(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return rows as a typed frame.

    `pair` and `method` are "" if a column that they are derived from is missing in the row.
    """
    frame = frame_of({"M": "", **row} for row in rows)
    for column, parts in {
        "pair": {"teacher", "student"},
        "method": {"distiller", "M", "standardize"},
    }.items():
        frame.loc[[not parts <= row.keys() for row in rows], column] = ""
    return frame


def _refuse_strangers(rows: Sequence[Mapping[str, Any]], where: str) -> None:
    if any(row.keys() >= set(CONTRACT) for row in rows):
        return
    lacking = {PARAMS[column]: sum(column not in row for row in rows) for column in CONTRACT}
    missing = ", ".join(f"{key} ({count})" for key, count in lacking.items() if count)
    raise ValueError(
        f"{where}: none of {counted(len(rows), 'run')} has the params of sddlskd's runs; "
        f"missing are {missing}; "
        f"name an sddlskd experiment, or import results with python -m {__package__} import-logs"
    )


def _refuse_mixed_epochs(frame: pd.DataFrame) -> None:
    """Raise ValueError if runs on one data set differ in their number of epochs.

    Superseded runs, runs that trained a teacher, and methods that the papers train longer do not
    count.
    """
    standing = frame[~frame["superseded"] & frame["epochs"].notna()]
    standing = standing[~standing["method"].map(trains_longer).astype(bool)]
    for dataset, runs in standing.groupby("dataset"):
        teachers = (runs["distiller"] == "vanilla") & runs["student"].isin(set(runs["teacher"]))
        lengths = runs.loc[~teachers, "epochs"].value_counts().sort_index()
        if len(lengths) > 1:
            found = ", ".join(
                f"{count} of {counted(epochs, 'epoch')}" for epochs, count in lengths.items()
            )
            raise ValueError(
                f"{dataset or 'a data set without a name'} has runs of different lengths "
                f"({found}), which cannot be compared; name a sweep or experiment of one length, "
                "or combine them with --mixed-epochs"
            )
