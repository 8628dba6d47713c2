"""Check that a tracking.uri leads to an MLflow that accepts runs, and create the client for it."""

import logging
import os
import shutil
import socket
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit
from uuid import uuid4

from filelock import FileLock

from sddlskd import record
from sddlskd.files.atomic import put

__all__ = [
    "ANSWER_S",
    "CURE",
    "ONE_HOST",
    "check_answers",
    "client",
    "first_line",
    "root_of",
    "sqlite_file",
    "within",
]

Answer = TypeVar("Answer")

CURE = (
    "start it, choose another with tracking.uri=..., "
    "continue without it with tracking.offline=true, or use tracking=none"
)
SIGN_IN = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
ONE_HOST = (
    "SQLite accepts writers on one host only: "
    "start a server (make tracking-server) and give its tracking.uri"
)
ANSWER_S = 6.0  # time limit in seconds for a server's answer at launch


def client(uri: str) -> Any:
    """Return an MLflow client for `uri`; create the SQLite file if `uri` names a missing one.

    Raise ConnectionError if `uri` names a SQLite file that this host may not write.
    """
    if path := sqlite_file(uri):
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
    return MlflowClient(tracking_uri=uri)


def sqlite_file(uri: str) -> Path | None:
    """Return the SQLite file that `uri` names, or None if `uri` does not name one."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def _check_file(path: Path) -> None:
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    if path.is_dir() or not os.access(there, os.W_OK):
        raise ConnectionError(f"tracking.uri=sqlite:///{path} cannot be written; {CURE}")


def _claim(path: Path) -> None:
    """Record next to a SQLite file which host writes to it; raise ConnectionError on other hosts.

    File locks on a network file system do not keep two hosts apart. A host is identified by its
    name or by its boot id. Containers on one machine share the boot id.
    """
    boot = Path("/proc/sys/kernel/random/boot_id")
    here = [socket.gethostname(), *([boot.read_text().strip()] if boot.exists() else [])]
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
            f"tracking.uri=sqlite:///{path} is written by host {there[0]}, but this host is "
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
                MlflowClient(tracking_uri=f"sqlite:///{new}")
                with suppress(FileExistsError):  # another program was faster
                    put(new, path)
        finally:
            # Safe while others wait for the lock: they then find that `path` exists.
            shutil.rmtree(making, ignore_errors=True)


def within(seconds: float | None, ask: Callable[[], Answer]) -> Answer:
    """Return `ask()`, or raise TimeoutError if it takes longer than `seconds` (None: no limit).

    A name lookup has no time limit of its own, nor has a server that answers byte by byte. Errors
    of `ask` propagate.
    """
    answers: list[Answer] = []
    errors: list[Exception] = []

    def work() -> None:
        try:
            answers.append(ask())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=work, name="mlflow-start", daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not answers:
        raise TimeoutError(f"no answer in {seconds} s")
    return answers[0]


def check_answers(uri: str) -> None:
    """Check that `uri` is an MLflow server or SQLite file that accepts runs.

    Raises:
        ConnectionError: The server or file does not accept runs; the message says what to do.
        ValueError: `uri` is neither an http(s) address nor a sqlite:/// path.
    """
    if uri.startswith(("http://", "https://")):
        _check_server(uri)
    elif path := sqlite_file(uri):
        _check_file(path)
        if path.exists():
            _claim(path)
    else:
        raise ValueError(
            f"tracking.uri={uri} is not valid; "
            "give http(s)://host:port or sqlite:////absolute/path/mlflow.db"
        )


def _check_server(uri: str) -> None:
    """Raise ConnectionError if the server does not answer a search for experiments.

    The search requires the database and permission, which the server's /health does not.
    """
    client(uri)
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    def ask() -> Any:
        what = {
            "params": {"max_results": 1},
            "max_retries": 0,
            "timeout": ANSWER_S,
            "raise_on_status": False,
        }
        creds = get_default_host_creds(uri)  # type: ignore[no-untyped-call]
        return http_request(creds, "/api/2.0/mlflow/experiments/search", "GET", **what)  # type: ignore[no-untyped-call]

    try:
        answer = within(ANSWER_S, ask)
    except Exception as error:  # a wrong address may raise any type
        raise ConnectionError(
            f"tracking.uri={uri} does not answer ({root_of(error)}); {CURE}"
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
            f"({answer.status_code} {said}); {CURE}"
        )


def root_of(error: BaseException) -> str:
    """Return the first line of an error's root cause, because HTTP libraries nest their errors."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return first_line(error)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message (at most 200 characters), or its type's name."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
