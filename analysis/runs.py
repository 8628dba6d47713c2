"""Runs out of MLflow (SQLite or a server) as one tidy frame, a row a run; per-epoch metrics and predictions on demand.

Nothing is dropped: runs that failed, are running or were superseded are rows, and so is a job that a sweep planned and
nobody ran (MISSING). Nothing is written: a database that is not there is not made, and one of another schema is not
migrated. Errors are ValueErrors of one line.
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

from analysis.schema import COLUMNS, METRICS, PARAMS, STATUSES, TAGS, canonical_M, frame_of

__all__ = ["MAKE_RUNS", "Runs", "listing", "load", "reading"]

PAGE = 1000  # runs a request; MLflow's limit is 50,000
RUNS_A_REQUEST = 100  # of a request for histories
ALL_POINTS = 10**9  # of such a request
REQUESTS_AT_ONCE = 8  # to a server
LOCKED_S = 10.0  # seconds to wait for whoever writes to the database
ANSWER_S = 5.0  # seconds in which a server has to answer
NAMES_SHOWN = 10
PLANNED = (
    "config_hash",
    "settings_hash",
    "run_dir",
    "command",
)  # what a plan says of a job, beside its params
MAKE_RUNS = 'make some with python -m sddlskd.train -m student=shufflev1,mobilev2 M="[1],[1,2,4]"'
CONTRACT = ("dataset", "teacher", "student", "distiller")
"""Columns that say which cell of a table a run belongs to: runs that all lack one of them are not the trainer's."""
NEEDED = (*CONTRACT, "M", "standardize", "epochs", "seed")
"""Columns whose absence a row's `reason` names."""


@dataclass(frozen=True, eq=False)
class Runs:
    """A selection of runs."""

    frame: pd.DataFrame  # of schema.COLUMNS
    name: str  # of the sweep or experiment; "" for everything
    uri: str
    command: str  # of the sweep, "" where it is not known

    def history(
        self, metrics: Sequence[str] = ("val/top1",), run_ids: Iterable[str] | None = None
    ) -> pd.DataFrame:
        """Per-epoch metrics: run_id, metric, epoch, value; of several points of an epoch the latest.

        run_ids: all of the frame's where none are given.
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
        """What the run predicted on the test split (artifact predictions.npz); None where it was not kept."""
        with reading(self.uri) as client, _artifact(client, run_id, "predictions.npz") as path:
            if path is None:
                return None
            try:
                with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                    return dict(arrays)
            except (ValueError, OSError, EOFError, BadZipFile) as error:
                raise ValueError(
                    f"predictions.npz of run {run_id} is no whole file of arrays ({error})"
                ) from None


def load(name: str | None, uri: str, *, mixed_epochs: bool = False) -> Runs:
    """The runs of a sweep, else of the MLflow experiment of that name; everything there is where name is None.

    mixed_epochs: take runs of one data set and different lengths together.
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
    """The sweeps and experiments there are: kind, name, runs, and how many of them are FINISHED, RUNNING, ...

    A superseded run counts in none of them.
    """
    with reading(uri) as client:
        scans = {name: _scan(client, {name: key}) for name, key in _experiments(client).items()}
    sweeps: dict[str, set[str]] = {}  # that planned a job, by config_hash
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
    """An MlflowClient; whatever MLflow and the database or network under it raise is one line of ValueError."""
    _check(uri)
    # A server that vanishes must not hold the reader for the client's default of four minutes a call.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    from mlflow.exceptions import MlflowException  # heavy: only when runs are read
    from mlflow.tracking import MlflowClient
    from sqlalchemy.exc import SQLAlchemyError

    # MLflow's own use of SQLAlchemy; nothing that a user can change.
    warnings.filterwarnings(
        "ignore", "The ``noload`` loader strategy is deprecated", DeprecationWarning
    )
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow").setLevel(
        logging.CRITICAL
    )  # it prints tracebacks of what is raised here as well
    collecting = gc.isenabled()
    gc.disable()  # it walks SQLAlchemy's million objects again and again (28 s of 10,000 runs; 10 s without), in vain
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
    """Raises ValueError where MLflow would wait for minutes, make a database, or migrate one."""
    if uri.startswith(("http://", "https://")):
        try:
            urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=ANSWER_S).close()
        except urllib.error.HTTPError:
            pass  # it answers; a proxy may guard /health
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
                    f"{path} is no database of MLflow's; name another with --home or --uri"
                )
            (found,) = database.execute("SELECT version_num FROM alembic_version").fetchone() or (
                "none",
            )
    except sqlite3.OperationalError as error:
        if "locked" not in str(error):
            raise ValueError(f"{path} cannot be read ({error})") from None
        raise ValueError(
            f"{path} was locked for {LOCKED_S:.0f} s by a process that writes to it; try again when that is done"
        ) from None
    except sqlite3.DatabaseError as error:
        raise ValueError(
            f"{path} is no database of MLflow's ({error}); name another with --home or --uri"
        ) from None
    _check_schema(path, uri, found)


def _check_schema(path: Path, uri: str, found: str) -> None:
    # MLflow checks it too, but only after it has added what tables an older database lacks.
    import mlflow
    from alembic.script import ScriptDirectory

    script = ScriptDirectory(str(Path(mlflow.__file__).parent / "store/db_migrations"))
    wanted = script.get_current_head()
    if found == wanted:
        return
    have = f"{path} has the schema {found}, and MLflow {mlflow.__version__} here reads {wanted}"
    if found in {revision.revision for revision in script.walk_revisions()}:
        raise ValueError(
            f"{have}: it is an older MLflow's; copy the file, then run: mlflow db upgrade {uri}"
        )
    raise ValueError(f"{have}: it is a newer MLflow's; run: pip install --upgrade mlflow")


def _experiments(client: Any) -> dict[str, str]:
    """Ids by name."""
    found: dict[str, str] = {}
    token = None
    while True:
        page = client.search_experiments(max_results=PAGE, page_token=token)
        found |= {experiment.name: experiment.experiment_id for experiment in page}
        token = page.token
        if not token:
            return found


def _search(client: Any, experiments: Mapping[str, str], query: str = "") -> Iterator[Any]:
    """Runs, oldest first, so that what starts meanwhile shifts no page."""
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
    """For a filter; MLflow knows no escape."""
    if "'" in text and '"' in text:
        raise ValueError(f"{text} has both kinds of quotes, and MLflow cannot search for that")
    return f'"{text}"' if "'" in text else f"'{text}'"


@contextmanager
def _artifact(client: Any, run_id: str, name: str) -> Iterator[Path | None]:
    """A run's file, for as long as the context lasts; None where it has none of that name."""
    if all(entry.path != name for entry in client.list_artifacts(run_id)):
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(client.download_artifacts(run_id, name, folder))


def _points(
    client: Any, uri: str, run_ids: Sequence[str], metric: str
) -> Iterator[tuple[str, str, int, int, float]]:
    """(run_id, metric, step, time, value) of every point."""
    if uri.startswith("sqlite:"):
        # The client asks run by run, and SQLite walks the metric's points of all runs each time: three times as long.
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
    """The plans of the sweeps among the runs that the query finds, and a row for each other run and each missing job.

    A job that two sweeps share carries the tag of the first alone: a plan's jobs are found by what they compute.
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
    """The plans among the runs that the query finds, and the other runs as rows by run id."""
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
    """Rows, by config_hash, of the planned jobs that are not there."""
    planned = {job["config_hash"]: (plan["name"], job) for plan in plans for job in plan["jobs"]}
    return {key: _missing_row(*found) for key, found in planned.items() if key not in there}


def _hashes(rows: Iterable[Mapping[str, Any]], finished: bool = False) -> set[str]:
    """What the runs compute that stand (and are finished)."""
    return {
        row["config_hash"]
        for row in rows
        if not row["superseded"] and (row["status"] == "FINISHED" or not finished)
    }


def _read_plan(client: Any, parent: Any) -> dict[str, Any]:
    """{name, command, jobs} of a sweep's parent run; no jobs where it kept no plan."""
    sweep = parent.data.tags.get("sweep", "")
    with _artifact(client, parent.info.run_id, "plan.json") as path:
        if path is None:
            return {"name": sweep, "command": "", "jobs": []}
        try:
            plan = json.loads(path.read_text())
            common = plan["common"]  # what all jobs share stands there once
            jobs = [
                {**{key: job[key] for key in PLANNED}, "params": {**common, **job["params"]}}
                for job in plan["jobs"]
            ]
            return {"name": sweep, "command": plan["command"], "jobs": jobs}
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"plan.json of sweep {sweep} (run {parent.info.run_id}) is no plan ({error!r}); start the sweep again"
            ) from None


def _row(run: Any) -> dict[str, Any]:
    """A run as a row of the frame, without its command. What is absent or of a wrong type is left out, and said."""
    tags, metrics = run.data.tags, run.data.metrics
    row, complaints = _typed(run.data.params)
    complaints += [f"{key} is NaN" for key in METRICS.values() if math.isnan(metrics.get(key, 0.0))]
    steps = {
        metric.key: metric.step for metric in run.data._metric_objs
    }  # no public name has the steps
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
    """The columns that parameters give, and what is wrong with them."""
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
                f"{key}={text[:40]} is no {'list of scales' if column == 'M' else COLUMNS[column].lower()}"
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
    """The rows, typed; no pair and no method where what they are made of is not known."""
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
        f"{where}: none of its {len(rows)} runs has the params of sddlskd's runs; missing are {counted}; "
        "name an experiment of sddlskd's, or bring results in with python -m analysis import-logs"
    )


def _refuse_mixed_epochs(frame: pd.DataFrame) -> None:
    """Raises ValueError where runs of one data set have several lengths, those that made the teachers aside."""
    standing = frame[~frame["superseded"] & frame["epochs"].notna()]
    for dataset, runs in standing.groupby("dataset"):
        teachers = (runs["distiller"] == "vanilla") & runs["student"].isin(set(runs["teacher"]))
        lengths = runs.loc[~teachers, "epochs"].value_counts().sort_index()
        if len(lengths) > 1:
            counted = ", ".join(f"{count} of {epochs} epochs" for epochs, count in lengths.items())
            raise ValueError(
                f"{dataset or 'a data set without a name'} has runs of different lengths ({counted}), which do not "
                "compare; name a sweep or experiment of one length, or take them together with --mixed-epochs"
            )
