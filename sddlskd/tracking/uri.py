"""Check that a tracking.uri leads to an MLflow that accepts runs, and create the client for it."""

import logging
import os
import shlex
import shutil
import socket
import sqlite3
import threading
import warnings
from collections.abc import Callable
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit
from uuid import uuid4

from filelock import FileLock

from sddlskd import record
from sddlskd.config import sqlite_file, sqlite_uri
from sddlskd.files.atomic import put

__all__ = [
    "ANSWER_S",
    "ONE_HOST",
    "Deleted",
    "check_answers",
    "client",
    "cure_of",
    "find_run",
    "first_line",
    "refuse_deleted",
    "refuse_deleted_experiment",
    "root_of",
    "within",
]

Answer = TypeVar("Answer")

SIGN_IN = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
ONE_HOST = (
    "SQLite accepts writers on one host only: "
    "start a server (make tracking-server) and give its tracking.uri"
)
ANSWER_S = 6.0  # time limit in seconds for a server's answer at launch


class Deleted(ValueError):
    """Error for a run or an experiment that was deleted in MLflow or is unknown there.

    The message says how to restore the run or experiment, or how to deliver it again.
    """


def client(uri: str) -> Any:
    """Return an MLflow client for the address `uri`, with short time limits for HTTP requests.

    The time limits are environment variables of this process, set unless they are set already. If
    `uri` names a SQLite file that does not exist, the file is created. A file beside it, with the
    suffix .host, records the host that writes to it.

    Raises:
        ConnectionError: If `uri` names a SQLite file that cannot be written, that another host
            writes to, or that another version of MLflow has written. Other errors of MLflow
            propagate.
    """
    path = sqlite_file(uri)
    if path:
        _check_file(path)  # without this check MLflow would retry for minutes
        _claim(path)
    # With MLflow's defaults a call to a vanished server blocks for four minutes, which is too long
    # for the mirror thread. The mirror retries by itself, and first checks whether the server has
    # already created the requested run.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow.tracking import MlflowClient  # slow to import, so imported only if needed

    # MLflow itself uses this deprecated SQLAlchemy feature; users cannot change that.
    warnings.filterwarnings(
        "ignore", "The ``noload`` loader strategy is deprecated", DeprecationWarning
    )
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    if path and not path.exists():
        _create(path)
    try:
        return MlflowClient(tracking_uri=uri)
    except Exception:  # MLflow and its database may raise any type
        if path:
            _check_schema(path)
        raise


def cure_of(uri: str) -> str:
    """Return words for a message: what to do if the MLflow at `uri` accepts no runs."""
    first = "start it"
    if sqlite_file(uri):
        first = "make it an MLflow database that you may write"
    return (
        f"{first}, choose another with tracking.uri=..., "
        "continue without it with tracking.offline=true, or use tracking=none"
    )


def find_run(uri: str, run_id: str) -> Any | None:
    """Return an MLflow run, even a deleted one, or None if the MLflow at `uri` does not know it.

    A missing SQLite file is created, as by `client`. The ConnectionError of `client` and other
    errors of MLflow propagate.
    """
    from mlflow.exceptions import MlflowException

    try:
        return client(uri).get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def refuse_deleted(uri: str, run_id: str, folder: Path) -> None:
    """Raise Deleted if MLflow no longer has a run that was delivered to it.

    Args:
        uri: The address of MLflow.
        run_id: The id of the MLflow run.
        folder: The run directory, or the sweep's folder, that was delivered; for the message.

    Raises:
        Deleted: If the run or its experiment was deleted in MLflow, or MLflow does not know the
            run. The message gives the commands to restore the run or to deliver it again.
        ConnectionError: If `uri` names a SQLite file that cannot be written, that another host
            writes to, or that another version of MLflow has written.
        MlflowException: For other errors of MLflow, such as a server that does not answer.
    """
    run = find_run(uri, run_id)
    again = f"python -m sddlskd.tracking sync --again {shlex.quote(str(folder))}"
    if run is None:
        raise Deleted(
            f"{folder}: MLflow at {uri} does not have its run {run_id} any more; "
            f"send it anew with: {again}"
        )
    if run.info.lifecycle_stage == "deleted":
        refuse_deleted_experiment(uri, client(uri).get_experiment(run.info.experiment_id))
        raise Deleted(
            f"{folder}: its run {run_id} was deleted in MLflow; "
            f"restore it with: {_command(uri)} runs restore --run-id {run_id}, "
            f"or send it anew with: {again}"
        )


def refuse_deleted_experiment(uri: str, experiment: Any) -> None:
    """Raise Deleted if an MLflow experiment was deleted; the message says how to restore it.

    `experiment` is MLflow's object, and `uri` the address of MLflow, for the message.
    """
    if experiment.lifecycle_stage == "deleted":
        raise Deleted(
            f"tracking.experiment={experiment.name} was deleted in MLflow; "
            "restore it and all its runs with: "
            f"{_command(uri)} experiments restore --experiment-id {experiment.experiment_id}, "
            "or choose another name"
        )


def _command(uri: str) -> str:
    """Return how a shell starts MLflow's own command for the MLflow at `uri`."""
    return f"MLFLOW_TRACKING_URI={shlex.quote(uri)} mlflow"


def _check_file(path: Path) -> None:
    """Raise ConnectionError if the SQLite file `path` is a folder or may not be written.

    If the file is missing, the nearest existing folder above it must be writable.
    """
    uri = sqlite_uri(str(path))
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    if path.is_dir() or not os.access(there, os.W_OK):
        raise ConnectionError(f"tracking.uri={uri} cannot be written; {cure_of(uri)}")


def _check_schema(path: Path) -> None:
    """Raise ConnectionError if another version of MLflow has written a SQLite file.

    MLflow itself advises to upgrade the database, even if the database is the newer one.
    """
    import mlflow
    from alembic.script import ScriptDirectory

    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as database:
            (found,) = database.execute("SELECT version_num FROM alembic_version").fetchone()
    except (sqlite3.Error, TypeError):  # not a database of MLflow, or one without a version
        return
    script = ScriptDirectory(str(Path(mlflow.__file__).parent / "store/db_migrations"))
    wanted = script.get_current_head()
    if found == wanted:
        return
    uri = sqlite_uri(str(path))
    have = (
        f"tracking.uri={uri} has the schema {found}, and MLflow {mlflow.__version__} here reads "
        f"{wanted}"
    )
    other = "or choose another with tracking.uri=..."
    if found in {revision.revision for revision in script.walk_revisions()}:
        raise ConnectionError(
            f"{have}: an older MLflow wrote it; copy the file, then run: "
            f"mlflow db upgrade {shlex.quote(uri)}, {other}"
        )
    raise ConnectionError(
        f"{have}: a newer MLflow wrote it; run: pip install --upgrade mlflow, {other}"
    )


def _claim(path: Path) -> None:
    """Record next to a SQLite file which host writes to it; raise ConnectionError on other hosts.

    File locks on a network file system do not keep two hosts apart. A host is identified by its
    name or by its boot id. Containers on one machine share the boot id.
    """
    here = [socket.gethostname()]
    boot = Path("/proc/sys/kernel/random/boot_id")
    if boot.exists():
        here.append(boot.read_text().strip())
    owner = path.with_name(f"{path.name}.host")
    if not owner.exists():
        claim = owner.with_name(f"{owner.name}.{here[0]}.{os.getpid()}")
        record.write_text(claim, " ".join(here))
        with suppress(FileExistsError):  # another host or process was faster
            put(claim, owner)
        claim.unlink(missing_ok=True)
    there = owner.read_text().split()
    if not set(here) & set(there):
        raise ConnectionError(
            f"tracking.uri={sqlite_uri(str(path))} is written by host {there[0]}, but this host is "
            f"{here[0]}; {ONE_HOST}, or delete {owner} if that host no longer uses the file"
        )


def _create(path: Path) -> None:
    """Create the database in a temporary folder, then link the finished file to `path`.

    MLflow migrates a new database step by step, and refuses a database whose creation was cut short
    by a kill.
    """
    from mlflow.tracking import MlflowClient

    making = path.with_name(f".{path.name}.new")
    with FileLock(making / "lock"):
        try:
            for left in making.glob("*.db*"):  # left by a killed process
                left.unlink()
            if not path.exists():
                # A new name each time, because MLflow remembers the databases that it has created.
                new = making / f"{uuid4()}.db"
                MlflowClient(tracking_uri=sqlite_uri(str(new)))
                with suppress(FileExistsError):  # another program was faster
                    put(new, path)
        finally:
            # Safe while others wait for the lock: they then find that `path` exists.
            shutil.rmtree(making, ignore_errors=True)


def within(seconds: float | None, ask: Callable[[], Answer]) -> Answer:
    """Return the result of `ask()`, or raise TimeoutError if the call takes too long.

    The call runs in a thread, which goes on in the background after a TimeoutError. Errors of `ask`
    propagate.

    Args:
        seconds: The time limit in seconds; None for no limit.
        ask: The function to call.

    Returns:
        What `ask` returns.

    Raises:
        TimeoutError: If `ask` takes longer than `seconds`.
    """
    answers: list[Answer] = []
    errors: list[Exception] = []
    thread = threading.Thread(
        target=_collect, args=(ask, answers, errors), name="mlflow-start", daemon=True
    )
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not answers:
        raise TimeoutError(f"no answer in {seconds} s")
    return answers[0]


def _collect(ask: Callable[[], Answer], answers: list[Answer], errors: list[Exception]) -> None:
    """Append what `ask` returns to `answers`, or what it raises to `errors`."""
    try:
        answers.append(ask())
    except Exception as error:
        errors.append(error)


def check_answers(uri: str) -> None:
    """Raise an error unless `uri` is an MLflow server or SQLite file that accepts runs.

    - A server must answer a search for experiments within six seconds (ANSWER_S).
    - MLflow must be able to open and write an existing SQLite file, and no other host may write to
      the file. The check records this host in a file beside the SQLite file, and turns an empty
      SQLite file into a database.
    - A missing SQLite file passes if it can be created; the check does not create it.

    Raises:
        ConnectionError: If the server or file does not accept runs; the message says what to do.
        ValueError: If `uri` is neither an http(s) address nor a sqlite:/// path.
    """
    if uri.startswith(("http://", "https://")):
        _check_server(uri)
        return
    path = sqlite_file(uri)
    if path is None:
        raise ValueError(
            f"tracking.uri={uri} is not valid; "
            "give http(s)://host:port or sqlite:////absolute/path/mlflow.db"
        )
    _check_file(path)
    if path.exists():
        _check_opens(uri)


def _check_opens(uri: str) -> None:
    """Raise ConnectionError if MLflow cannot open the SQLite file of `uri`."""
    try:
        client(uri)
    except ConnectionError:
        raise
    except Exception as error:  # MLflow and its database may raise any type
        raise ConnectionError(
            f"tracking.uri={uri} does not accept runs ({first_line(error)}); {cure_of(uri)}"
        ) from error


def _check_server(uri: str) -> None:
    """Raise ConnectionError if the server does not answer a search for experiments.

    The search requires the database and permission, which the server's /health does not.
    """
    client(uri)
    try:
        # `within` limits the time. MLflow's own time limit, which `client` sets, is longer.
        answer = within(ANSWER_S, partial(_search_experiments, uri))
    except Exception as error:  # a wrong address may raise any type
        raise ConnectionError(
            f"tracking.uri={uri} does not answer ({root_of(error)}); {cure_of(uri)}"
        ) from None
    host = urlsplit(uri).netloc
    if answer.status_code == 401:
        raise ConnectionError(f"tracking.uri={uri} requires a login; {SIGN_IN}")
    if answer.status_code == 403 and "Host header" in answer.text:
        names = ",".join(dict.fromkeys((host.rsplit(":", 1)[0], host)))
        raise ConnectionError(
            f"tracking.uri={uri} is refused because its server does not accept this host name; "
            f"start the server with --allowed-hosts {names}"
        )
    if answer.status_code == 403:
        raise ConnectionError(f"tracking.uri={uri} denies access to this user; {SIGN_IN}")
    if answer.status_code != 200 or "json" not in answer.headers.get("Content-Type", ""):
        said = " ".join(answer.text.split())[:80]
        raise ConnectionError(
            f"tracking.uri={uri} does not answer like an MLflow server "
            f"({answer.status_code} {said}); {cure_of(uri)}"
        )


def _search_experiments(uri: str) -> Any:
    """Return the server's HTTP response to a search for one experiment."""
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    return http_request(  # type: ignore[no-untyped-call]
        get_default_host_creds(uri),  # type: ignore[no-untyped-call]
        "/api/2.0/mlflow/experiments/search",
        "GET",
        params={"max_results": 1},
        max_retries=0,
        raise_on_status=False,
    )


def root_of(error: BaseException) -> str:
    """Return the first line of the message of an error's root cause, at most 200 characters.

    The root cause is found by following `__cause__`, or else `__context__`. If its message is
    empty, the name of its type is returned.
    """
    cause: BaseException | None = error
    while cause is not None:
        error = cause
        cause = error.__cause__ or error.__context__
    return first_line(error)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, at most 200 characters.

    The name of the error's type is returned if the message is empty.
    """
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0][:200]
