"""Read runs from MLflow (SQLite or a server) into one tidy frame with one row per run.

Per-epoch metrics and predictions are read on demand. No run is dropped: failed, running and
superseded runs are rows, and so is a job that a sweep planned and nobody ran (status MISSING).
Nothing is written: a missing database is not created, and a database with another schema is not
migrated. Errors are ValueErrors with a one-line message.
"""

import difflib
import gc
import json
import logging
import math
import os
import sqlite3
import tempfile
import urllib.error
import urllib.request
import warnings
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import pandas as pd

from .schema import COLUMNS, METRICS, PARAMS, STATUSES, TAGS, canonical_M, frame_of

__all__ = ["MAKE_RUNS", "Runs", "listing", "load", "reading"]

PAGE = 1000  # runs per request; MLflow's limit is 50,000
RUNS_A_REQUEST = 100  # runs per request for metric histories
ALL_POINTS = 10**9  # points per request for metric histories: no limit in practice
REQUESTS_AT_ONCE = 8  # concurrent requests to a server
LOCKED_S = 10.0  # seconds to wait for a process that writes to the database
ANSWER_S = 5.0  # seconds within which a server must answer
NAMES_SHOWN = 10  # names that an error message lists
# The fields that a plan stores for a job, besides its params.
PLANNED = ("config_hash", "settings_hash", "run_dir", "command")
MAKE_RUNS = 'make some with python -m sddlskd.train -m student=shufflev1,mobilev2 M="[1],[1,2,4]"'
CONTRACT = ("dataset", "teacher", "student", "distiller")
"""Columns that select a run's table cell. If every run lacks one of them, none is sddlskd's."""
NEEDED = (*CONTRACT, "M", "standardize", "epochs", "seed")
"""Required columns: `reason` of a row names those that its run lacks."""


@dataclass(frozen=True, eq=False)
class Runs:
    """A selection of runs from one MLflow store."""

    frame: pd.DataFrame  # one row per run, with the columns of schema.COLUMNS
    name: str  # sweep or experiment; "" for all runs of the store
    uri: str
    command: str  # starts the sweep; "" if it is unknown

    def history(
        self, metrics: Sequence[str] = ("val/top1",), run_ids: Iterable[str] | None = None
    ) -> pd.DataFrame:
        """Return the per-epoch metrics of runs.

        Args:
            metrics: names of metrics in MLflow, such as `val/top1`.
            run_ids: MLflow run ids, "" is skipped; None means all runs of the frame.

        Returns:
            A frame with the columns run_id, metric, epoch and value. If an epoch has several
            points of a metric, the frame holds the latest.
        """
        ids = [
            run_id for run_id in (self.frame["run_id"] if run_ids is None else run_ids) if run_id
        ]
        with reading(self.uri) as client:
            points = [
                point for metric in metrics for point in _points(client, self.uri, ids, metric)
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
        """Return a run's predictions on the test split, or None if the run did not keep them.

        The arrays are those of the artifact predictions.npz. Raise ValueError if it is damaged.
        """
        with reading(self.uri) as client, _artifact(client, run_id, "predictions.npz") as path:
            if path is None:
                return None
            try:
                with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                    return dict(arrays)
            except (ValueError, OSError, EOFError, BadZipFile) as error:
                raise ValueError(
                    f"predictions.npz of run {run_id} is not a complete file of arrays ({error})"
                ) from None


def load(name: str | None, uri: str, *, mixed_epochs: bool = False) -> Runs:
    """Load the runs of a sweep, or of an MLflow experiment if no sweep has that name.

    Args:
        name: name of the sweep or experiment. None loads all runs of the store.
        uri: `http(s)://host:port` or `sqlite:////absolute/path/mlflow.db`.
        mixed_epochs: accept runs on one data set that differ in their number of epochs.

    Returns:
        The runs, with a row of status MISSING for each planned job that has no run.

    Raises:
        ValueError: if the store cannot be read, if it has no such name or no runs, if none of the
            runs is sddlskd's, or if their numbers of epochs differ and `mixed_epochs` is False.
    """
    with reading(uri) as client:
        experiments = _experiments(client)
        if name is None:
            plans, rows = _select(client, experiments, experiments)
        else:
            plans, rows = _select(client, experiments, experiments, f"tags.sweep = {_quoted(name)}")
            if not rows and name in experiments:
                plans, rows = _select(client, experiments, {name: experiments[name]})
            elif not rows:
                raise ValueError(_no_such(client, experiments, name, uri))
    if not rows:
        raise ValueError(
            f"{uri} has no runs{f' in experiment {name}' if name else ''}; {MAKE_RUNS}"
        )
    _refuse_strangers(rows, f"experiment {name}" if name else uri)
    frame = _frame(rows)
    if not mixed_epochs:
        _refuse_mixed_epochs(frame)
    commands = {plan["command"] for plan in plans}
    return Runs(frame, name or "", uri, commands.pop() if len(commands) == 1 else "")


def listing(uri: str) -> pd.DataFrame:
    """Return the sweeps and experiments of a store, one per row.

    The columns are kind ("sweep" or "experiment"), name, runs, and the number of runs of each
    status. Superseded runs are not counted.
    """
    with reading(uri) as client:
        scans = {name: _scan(client, {name: key}) for name, key in _experiments(client).items()}
    sweeps: dict[str, set[str]] = {}  # names of the sweeps that planned a job, by its config_hash
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
    ]
    return pd.DataFrame(lines, columns=["kind", "name", "runs", *STATUSES])


# The store


@contextmanager
def reading(uri: str) -> Iterator[Any]:
    """Yield an MlflowClient for the store at `uri`.

    Raise ValueError with a one-line message if the store is unusable, or if MLflow, the database
    or the network fails within the context.
    """
    _check(uri)
    # By default, each call takes the client four minutes if the server has gone away.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    from mlflow.exceptions import MlflowException  # imported late, because it is slow
    from mlflow.tracking import MlflowClient
    from sqlalchemy.exc import SQLAlchemyError

    # MLflow's own use of SQLAlchemy causes this warning: a user cannot change it.
    warnings.filterwarnings(
        "ignore", "The ``noload`` loader strategy is deprecated", DeprecationWarning
    )
    logging.getLogger("alembic").setLevel(logging.WARNING)
    # MLflow logs tracebacks of errors that are raised here as ValueErrors.
    logging.getLogger("mlflow").setLevel(logging.CRITICAL)
    # Garbage collection would traverse SQLAlchemy's million objects again and again and free
    # nothing: reading 10,000 runs takes 28 s with it and 10 s without.
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield MlflowClient(tracking_uri=uri)
    except (MlflowException, SQLAlchemyError, OSError) as error:
        raise ValueError(f"{uri} cannot be read ({_first_line(error)})") from error
    finally:
        if collecting:
            gc.enable()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def _check(uri: str) -> None:
    """Raise ValueError if MLflow would wait for minutes, create a database or migrate one."""
    if uri.startswith(("http://", "https://")):
        try:
            urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=ANSWER_S).close()
        except urllib.error.HTTPError:
            pass  # the server answers; a proxy may protect /health
        except (OSError, ValueError, HTTPException) as error:
            raise ValueError(
                f"{uri} does not answer ({error}); start it, or name another store with --uri"
            ) from None
    elif uri.startswith("sqlite:///"):
        _check_database(Path(uri.removeprefix("sqlite:///")), uri)
    else:
        raise ValueError(
            f"{uri} is not valid; give http(s)://host:port or sqlite:////absolute/path/mlflow.db"
        )


def _check_database(path: Path, uri: str) -> None:
    if not path.is_file():
        raise ValueError(
            f"there is no database {path}; name another with --home or --uri, or {MAKE_RUNS}"
        )
    try:
        with closing(
            sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=LOCKED_S)
        ) as database:
            tables = {
                name
                for (name,) in database.execute(
                    "SELECT name FROM sqlite_master WHERE type = 'table'"
                )
            }
            if not {"alembic_version", "runs"} <= tables:
                raise ValueError(
                    f"{path} is not an MLflow database; name another with --home or --uri"
                )
            (found,) = database.execute("SELECT version_num FROM alembic_version").fetchone() or (
                "none",
            )
    except sqlite3.OperationalError as error:
        if "locked" not in str(error):
            raise ValueError(f"{path} cannot be read ({error})") from None
        raise ValueError(
            f"{path} was locked for {LOCKED_S:.0f} s by a process that writes to it; "
            "try again when that process is done"
        ) from None
    except sqlite3.DatabaseError as error:
        raise ValueError(
            f"{path} is not an MLflow database ({error}); name another with --home or --uri"
        ) from None
    _check_schema(path, uri, found)


def _check_schema(path: Path, uri: str, found: str) -> None:
    # MLflow checks the schema too, but only after it has added tables that an older database lacks.
    import mlflow
    from alembic.script import ScriptDirectory

    script = ScriptDirectory(str(Path(mlflow.__file__).parent / "store/db_migrations"))
    wanted = script.get_current_head()
    if found == wanted:
        return
    have = f"{path} has the schema {found}, and MLflow {mlflow.__version__} here reads {wanted}"
    if found in {revision.revision for revision in script.walk_revisions()}:
        raise ValueError(
            f"{have}: an older MLflow wrote it; copy the file, then run: mlflow db upgrade {uri}"
        )
    raise ValueError(f"{have}: a newer MLflow wrote it; run: pip install --upgrade mlflow")


def _experiments(client: Any) -> dict[str, str]:
    """Return the ids of all experiments by name."""
    found: dict[str, str] = {}
    token = None
    while True:
        page = client.search_experiments(max_results=PAGE, page_token=token)
        found |= {experiment.name: experiment.experiment_id for experiment in page}
        token = page.token
        if not token:
            return found


def _search(client: Any, experiments: Mapping[str, str], query: str = "") -> Iterator[Any]:
    """Yield runs, oldest first, so that runs that start meanwhile do not shift the pages."""
    token = None
    while True:
        page = client.search_runs(
            list(experiments.values()),
            query,
            max_results=PAGE,
            order_by=["attributes.start_time ASC"],
            page_token=token,
        )
        yield from page
        token = page.token
        if not token:
            return


def _quoted(text: str) -> str:
    """Return `text` in quotes for an MLflow filter.

    MLflow has no escape character, so text with both kinds of quotes raises ValueError.
    """
    if "'" in text and '"' in text:
        raise ValueError(f"{text} has both kinds of quotes, and MLflow cannot search for that")
    return f'"{text}"' if "'" in text else f"'{text}'"


@contextmanager
def _artifact(client: Any, run_id: str, name: str) -> Iterator[Path | None]:
    """Yield the path of a run's artifact, or None if the run has none of that name.

    The file is deleted when the context ends.
    """
    if all(entry.path != name for entry in client.list_artifacts(run_id)):
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(client.download_artifacts(run_id, name, folder))


def _points(
    client: Any, uri: str, run_ids: Sequence[str], metric: str
) -> Iterator[tuple[str, str, int, int, float]]:
    """Yield (run_id, metric, step, timestamp, value) for every logged point."""
    if uri.startswith("sqlite:"):
        # The client queries run by run, and each query makes SQLite scan the metric's points of
        # all runs, which takes three times as long.
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

        open_store: Any = SqlAlchemyStore  # untyped
        store = open_store(uri, default_artifact_root="unused: nothing is written")
        for at in range(0, len(run_ids), RUNS_A_REQUEST):
            for found in store.get_metric_history_bulk(
                run_ids[at : at + RUNS_A_REQUEST], metric, ALL_POINTS
            ):
                yield found.run_id, metric, found.step, found.timestamp, found.value
    else:
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
            histories = pool.map(lambda run_id: client.get_metric_history(run_id, metric), run_ids)
            for run_id, points in zip(run_ids, histories, strict=True):
                yield from (
                    (run_id, metric, point.step, point.timestamp, point.value) for point in points
                )


def _no_such(client: Any, experiments: Mapping[str, str], name: str, uri: str) -> str:
    sweeps = {
        run.data.tags.get("sweep", "")
        for run in _search(client, experiments, "tags.kind = 'sweep'")
    } - {""}
    there = sorted(sweeps | experiments.keys())
    closest = difflib.get_close_matches(name, there, n=NAMES_SHOWN, cutoff=0.0)
    more = f" and {len(there) - len(closest)} more" if len(there) > len(closest) else ""
    return f"no sweep or experiment {name} at {uri}; there are {', '.join(closest)}{more}"


# Rows


def _select(
    client: Any, everywhere: Mapping[str, str], experiments: Mapping[str, str], query: str = ""
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the plans of the sweeps that the query finds, and a row per run and missing job.

    A job that two sweeps share is tagged with the first sweep only, so the unfinished jobs of a
    plan are searched for by config_hash in all experiments (`everywhere`).
    """
    plans, rows = _scan(client, experiments, query)
    planned = {job["config_hash"]: job for plan in plans for job in plan["jobs"]}
    finished = _hashes(rows.values(), finished=True)
    for config_hash in (each for each in planned if each not in finished):
        rows |= _scan(client, everywhere, f"tags.config_hash = {_quoted(config_hash)}")[1]
    rows |= _missing(plans, _hashes(rows.values()))
    for row in rows.values():
        if row["config_hash"] in planned:
            row["command"] = planned[row["config_hash"]]["command"]
    return plans, list(rows.values())


def _scan(
    client: Any, experiments: Mapping[str, str], query: str = ""
) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """Return the plans among the runs that the query finds, and the other runs as rows by id."""
    plans: list[dict[str, Any]] = []
    rows: dict[str, dict[str, Any]] = {}
    for run in _search(client, experiments, query):
        if run.data.tags.get("kind") == "sweep":
            plans.append(_read_plan(client, run))
        else:
            rows[run.info.run_id] = _row(run)
    return plans, rows


def _missing(
    plans: Iterable[Mapping[str, Any]], there: Container[str]
) -> dict[str, dict[str, Any]]:
    """Return a MISSING row for each planned job whose config_hash is not in `there`, by hash."""
    planned = {job["config_hash"]: (plan["name"], job) for plan in plans for job in plan["jobs"]}
    return {key: _missing_row(*found) for key, found in planned.items() if key not in there}


def _hashes(rows: Iterable[Mapping[str, Any]], finished: bool = False) -> set[str]:
    """Return the config_hashes of the runs that are not superseded (`finished`: only FINISHED)."""
    return {
        row["config_hash"]
        for row in rows
        if not row["superseded"] and (row["status"] == "FINISHED" or not finished)
    }


def _read_plan(client: Any, parent: Any) -> dict[str, Any]:
    """Return {name, command, jobs} from a sweep's parent run; jobs is [] if it kept no plan."""
    sweep = parent.data.tags.get("sweep", "")
    with _artifact(client, parent.info.run_id, "plan.json") as path:
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
    """Return a run as a row of the frame, without its command.

    Values that are missing or of the wrong type are left out, and `reason` says so.
    """
    tags, metrics = run.data.tags, run.data.metrics
    row, complaints = _typed(run.data.params)
    complaints += [f"{key} is NaN" for key in METRICS.values() if math.isnan(metrics.get(key, 0.0))]
    # MLflow's public attributes do not give the steps of the metrics.
    steps = {metric.key: metric.step for metric in run.data._metric_objs}
    size, size_complaints = _parsed(tags, {"group_size": TAGS["group_size"]})
    text = {column: tags.get(tag, "") for column, tag in TAGS.items() if COLUMNS[column] == "str"}
    reasons = [tags.get(TAGS["reason"], ""), *complaints, *size_complaints]
    return {
        **row,
        **size,
        **{column: metrics.get(key) for column, key in METRICS.items()},
        **text,
        "source": tags.get(TAGS["source"], "sddlskd"),
        "reason": "; ".join(filter(None, reasons)),
        "run_id": run.info.run_id,
        "name": run.info.run_name or "",
        "status": "RUNNING" if run.info.status == "SCHEDULED" else run.info.status,
        "superseded": tags.get(TAGS["superseded"]) == "true",
        "started": pd.Timestamp(run.info.start_time, unit="ms", tz="UTC"),
        "epochs_done": steps.get("val/top1"),
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
    """Return the columns that the params give, and a message for each problem with the params."""
    row, complaints = _parsed(params, PARAMS)
    if absent := [PARAMS[column] for column in NEEDED if PARAMS[column] not in params]:
        complaints.insert(0, f"no param {', '.join(absent)}")
    return row, complaints


def _parsed(texts: Mapping[str, str], keys: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    row, complaints = {}, []
    for column, key in keys.items():
        text = texts.get(key, "None")
        try:
            if text != "None":
                row[column] = _scales(text) if column == "M" else _PARSERS[COLUMNS[column]](text)
        except (ValueError, KeyError):
            complaints.append(
                f"{key}={text[:40]} is not a valid "
                f"{'list of scales' if column == 'M' else COLUMNS[column].lower()}"
            )
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
    """Return the rows as a typed frame; pair and method are "" if their parts are unknown."""
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
    counted = ", ".join(f"{key} ({count})" for key, count in lacking.items() if count)
    raise ValueError(
        f"{where}: none of its {len(rows)} runs has the params of sddlskd's runs; "
        f"missing are {counted}; "
        f"name an sddlskd experiment, or import results with python -m {__package__} import-logs"
    )


def _refuse_mixed_epochs(frame: pd.DataFrame) -> None:
    """Raise ValueError if runs on one data set differ in their number of epochs.

    Runs that trained a teacher do not count.
    """
    standing = frame[~frame["superseded"] & frame["epochs"].notna()]
    for dataset, runs in standing.groupby("dataset"):
        teachers = (runs["distiller"] == "vanilla") & runs["student"].isin(set(runs["teacher"]))
        lengths = runs.loc[~teachers, "epochs"].value_counts().sort_index()
        if len(lengths) > 1:
            counted = ", ".join(f"{count} of {epochs} epochs" for epochs, count in lengths.items())
            raise ValueError(
                f"{dataset or 'a data set without a name'} has runs of different lengths "
                f"({counted}), which cannot be compared; name a sweep or experiment of one length, "
                "or combine them with --mixed-epochs"
            )
