"""Open an MLflow store for reading, and read its runs, artifacts and metrics page by page.

Nothing is written: a missing database is not created, and a database with another schema is not
migrated. Within the context of `reading`, all errors of the store become ValueErrors with a message
of one line.
"""

import gc
import logging
import os
import re
import shlex
import sqlite3
import tempfile
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

__all__ = [
    "MAKE_RUNS",
    "artifact",
    "count_runs",
    "experiments_of",
    "holds",
    "points_of",
    "quoted",
    "reading",
    "search",
    "sqlite_file",
    "sqlite_uri",
]

PAGE = 1000  # runs per request; MLflow's limit is 50,000
RUNS_A_REQUEST = 100  # runs per request for metric histories
ALL_POINTS = 10**9  # points per request for metric histories: no limit in practice
REQUESTS_AT_ONCE = 8  # concurrent requests to a server for metric histories
LOCKED_S = 10.0  # seconds to wait for a process that writes to the database
ANSWER_S = 5.0  # seconds within which a server must answer
MAKE_RUNS = 'make some with python -m sddlskd.train -m student=shufflev1,mobilev2 M="[1],[1,2,4]"'


def sqlite_uri(path: str) -> str:
    """Return the address by which MLflow opens a SQLite file: "sqlite:///" followed by the path.

    A path is percent-encoded, slashes included, if it contains "?", a control character or text
    like "%41", because MLflow would not read such a path literally. Any other path stays as it is.
    """
    if re.search(r"[?\x00-\x1f\x7f]|%[0-9A-Fa-f]{2}", path):
        # Slashes are quoted as well: otherwise MLflow makes a folder that is named as the address.
        path = quote(path, safe="", errors="surrogateescape")
    return f"sqlite:///{path}"


def sqlite_file(uri: str) -> Path | None:
    """Return the SQLite file that an MLflow address names; None for an address of another kind.

    Percent escapes such as "%3F" are decoded. The file need not exist.
    """
    if not uri.startswith("sqlite:///"):
        return None
    return Path(unquote(uri.removeprefix("sqlite:///"), errors="surrogateescape"))


def _read_only(database: Path) -> str:
    """Return the address by which sqlite3 opens a file for reading alone."""
    return f"{database.absolute().as_uri()}?mode=ro"


def count_runs(database: Path) -> int | None:
    """Return the number of runs in a SQLite database of MLflow, without loading MLflow.

    The number includes the MLflow runs that stand for a sweep as a whole or for a mean over seeds,
    but not deleted runs. Return None if the file is missing, is locked or is not a database of
    MLflow.
    """
    try:
        with closing(sqlite3.connect(_read_only(database), uri=True, timeout=0)) as connection:
            query = "SELECT count(*) FROM runs WHERE lifecycle_stage = 'active'"
            (count,) = connection.execute(query).fetchone()
    except sqlite3.Error:
        return None
    return int(count)


def holds(database: Path, name: str | None) -> bool | None:
    """Return whether a SQLite database of MLflow has runs of a sweep or experiment of this name.

    If `name` is None, any runs count. MLflow is not loaded. Return None if the file is locked or is
    not a database of MLflow.
    """
    if not database.exists():
        return False
    query = """
        SELECT 1 FROM runs JOIN experiments USING (experiment_id)
        LEFT JOIN tags ON tags.run_uuid = runs.run_uuid AND tags.key = 'sweep'
        WHERE runs.lifecycle_stage = 'active'
        AND (? IS NULL OR ? IN (experiments.name, tags.value)) LIMIT 1"""
    try:
        with closing(sqlite3.connect(_read_only(database), uri=True, timeout=0)) as connection:
            return connection.execute(query, [name, name]).fetchone() is not None
    except sqlite3.Error:
        return None


@contextmanager
def reading(uri: str) -> Iterator[Any]:
    """Open an MLflow store for reading, as a context manager that yields an MlflowClient.

    `uri` is `http(s)://host:port` or `sqlite:////absolute/path/mlflow.db`. Python's garbage
    collection is off within the context. MLflow's loggers are silenced, and its environment
    variables for retries and time-outs are set unless they have values. Both stay so afterwards.

    Raises:
        ValueError: If `uri` has another form, or if the store cannot be read, for example because
            the server does not answer within `ANSWER_S` (5) seconds, or because the database is
            missing, is locked for `LOCKED_S` (10) seconds, or has the schema of another version of
            MLflow. An MlflowException, SQLAlchemyError or OSError that is raised within the context
            becomes a ValueError, too. The message has one line.
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
    """Raise ValueError if a store is unusable, before MLflow opens it.

    MLflow itself would wait for minutes, create a database or migrate one.
    """
    if uri.startswith(("http://", "https://")):
        try:
            urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=ANSWER_S).close()
        except urllib.error.HTTPError:
            pass  # the server answers; a proxy may protect /health
        except (OSError, ValueError, HTTPException) as error:
            raise ValueError(
                f"{uri} does not answer ({error}); start it, or name another store with --uri"
            ) from None
        return
    path = sqlite_file(uri)
    if path is None:
        raise ValueError(
            f"{uri} is not valid; give http(s)://host:port or sqlite:////absolute/path/mlflow.db"
        )
    if "?" in uri:
        raise ValueError(
            f"{uri} holds a '?', after which MLflow reads options; "
            "if the '?' belongs to the file's path, write %3F in its place"
        )
    _check_database(path, uri)


def _check_database(path: Path, uri: str) -> None:
    if not path.is_file():
        raise ValueError(
            f"there is no database {path}; name another with --home or --uri, or {MAKE_RUNS}"
        )
    try:
        with closing(sqlite3.connect(_read_only(path), uri=True, timeout=LOCKED_S)) as database:
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
            f"{have}: an older MLflow wrote it; copy the file, then run: "
            f"mlflow db upgrade {shlex.quote(uri)}"
        )
    raise ValueError(f"{have}: a newer MLflow wrote it; run: pip install --upgrade mlflow")


def experiments_of(client: Any) -> dict[str, str]:
    """Return the ids of the experiments of a store by their names, without deleted experiments.

    `client` is an MlflowClient, as `reading` yields it. Errors of MLflow propagate; within the
    context of `reading`, they become ValueErrors.
    """
    found: dict[str, str] = {}
    token = None
    while True:
        page = client.search_experiments(max_results=PAGE, page_token=token)
        found |= {experiment.name: experiment.experiment_id for experiment in page}
        token = page.token
        if not token:
            return found


def search(client: Any, experiments: Mapping[str, str], query: str = "") -> Iterator[Any]:
    """Yield the runs of some experiments that match a query, oldest first.

    Args:
        client: MlflowClient, as `reading` yields it.
        experiments: ids of the experiments by name, as `experiments_of` returns them.
        query: MLflow filter, such as "tags.kind = 'sweep'"; "" for all runs.

    Yields:
        Runs as MLflow returns them, with `info` and `data`.

    Raises:
        MlflowException: If the store fails or refuses the query. Within the context of `reading`,
            the error becomes a ValueError.
    """
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


def quoted(text: str) -> str:
    """Return `text` in quotes for an MLflow filter.

    The quotes are single unless the text has single quotes. Raise ValueError if the text has both
    kinds of quotes: MLflow has no escape character.
    """
    if "'" in text and '"' in text:
        raise ValueError(f"{text} has both kinds of quotes, and MLflow cannot search for that")
    return f'"{text}"' if "'" in text else f"'{text}'"


@contextmanager
def artifact(client: Any, run_id: str, name: str) -> Iterator[Path | None]:
    """Download an artifact of a run, as a context manager that yields the path of the copy.

    Args:
        client: MlflowClient, as `reading` yields it.
        run_id: id of the run in MLflow.
        name: name of the artifact, a file that is in no folder, such as "plan.json".

    Yields:
        The path of a temporary copy, which is deleted when the context ends; None if the run has no
        artifact of this name.

    Raises:
        MlflowException: If the store has no such run or fails. Within the context of `reading`, the
            error becomes a ValueError.
    """
    if all(entry.path != name for entry in client.list_artifacts(run_id)):
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(client.download_artifacts(run_id, name, folder))


def points_of(
    client: Any, uri: str, run_ids: Sequence[str], metric: str
) -> Iterator[tuple[str, str, int, int, float]]:
    """Yield every logged value of one metric of some runs.

    Args:
        client: MlflowClient, as `reading` yields it.
        uri: address of the client's store. A SQLite store is read without the client, which is
            faster.
        run_ids: ids of the runs in MLflow.
        metric: name of the metric, such as "val/top1".

    Yields:
        (run_id, metric, step, timestamp, value), with the epoch as the step and the timestamp in
        milliseconds since 1970. A run without the metric yields nothing.

    Raises:
        MlflowException: If the store fails. Within the context of `reading`, the error becomes a
            ValueError.
    """
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
