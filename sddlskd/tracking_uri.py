"""What a tracking.uri names: whether MLflow is there and takes runs, and the client that talks to it."""

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
from sddlskd.files import put

__all__ = [
    "ANSWER_S",
    "CURE",
    "ONE_HOST",
    "check",
    "client",
    "first_line",
    "root_of",
    "sqlite_file",
    "within",
]

Answer = TypeVar("Answer")

CURE = "start it, name another with tracking.uri=..., go on with tracking.offline=true, or use tracking=none"
SIGN_IN = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
ONE_HOST = "SQLite takes writers of one host alone: start a server (make tracking-server) and give its tracking.uri"
ANSWER_S = 6.0  # seconds that a server has, to answer when a job is launched


def client(uri: str) -> Any:
    """MLflow's client of that address. Raises ConnectionError for a SQLite file that this host may not write."""
    if path := sqlite_file(uri):
        _check_file(path)  # MLflow would try for minutes
        _claim(path)
    # A vanished server must not hold the mirror for the client's default of four minutes a call; it tries again itself,
    # and looks first whether what it asked for was made.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow.tracking import MlflowClient  # heavy: only when a job runs

    # MLflow's own use of SQLAlchemy; nothing that a user can change.
    warnings.filterwarnings(
        "ignore", "The ``noload`` loader strategy is deprecated", DeprecationWarning
    )
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    if path and not path.exists():
        _create(path)
    return MlflowClient(tracking_uri=uri)


def sqlite_file(uri: str) -> Path | None:
    """The file that an address names; None where it names a server."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def _check_file(path: Path) -> None:
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    if path.is_dir() or not os.access(there, os.W_OK):
        raise ConnectionError(f"tracking.uri=sqlite:///{path} cannot be written; {CURE}")


def _claim(path: Path) -> None:
    """Note beside a SQLite file which host writes to it; ConnectionError on any other host.

    A network file system does not keep two hosts apart. A host is known by its name or by its boot, which containers
    have in common.
    """
    boot = Path("/proc/sys/kernel/random/boot_id")
    here = [socket.gethostname(), *([boot.read_text().strip()] if boot.exists() else [])]
    owner = path.with_name(f"{path.name}.host")
    if not owner.exists():
        claim = owner.with_name(f"{owner.name}.{here[0]}.{os.getpid()}")
        record.write_text(claim, " ".join(here))
        with suppress(FileExistsError):  # another host was quicker
            put(claim, owner)
        claim.unlink(missing_ok=True)
    there = owner.read_text().split()
    if not set(here) & set(there):
        raise ConnectionError(
            f"tracking.uri=sqlite:///{path} is written by host {there[0]}, this is {here[0]}; {ONE_HOST}, or delete "
            f"{owner} if that host is done with it"
        )


def _create(path: Path) -> None:
    """Make the database beside its place and link it there whole: MLflow migrates a new one step by step, and refuses
    one whose making was cut short by a kill."""
    from mlflow.tracking import MlflowClient

    making = path.with_name(f".{path.name}.new")
    with FileLock(making / "lock"):
        try:
            for left in making.glob("*.db*"):  # by a process that was killed
                left.unlink()
            if not path.exists():
                new = (
                    making / f"{uuid4()}.db"
                )  # never twice the same: MLflow remembers what it has made
                MlflowClient(tracking_uri=f"sqlite:///{new}")
                with suppress(FileExistsError):  # another program was quicker
                    put(new, path)
        finally:
            shutil.rmtree(
                making, ignore_errors=True
            )  # whoever waits for the lock sees that the file is there


def within(seconds: float | None, ask: Callable[[], Answer]) -> Answer:
    """The answer, or TimeoutError: looking a name up and a server that drips have no limit of their own."""
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


def check(uri: str) -> None:
    """Raises ConnectionError for what takes no runs, with the cure; ValueError for what is no address."""
    if uri.startswith(("http://", "https://")):
        _check_server(uri)
    elif path := sqlite_file(uri):
        _check_file(path)
        if path.exists():
            _claim(path)
    else:
        raise ValueError(
            f"tracking.uri={uri} is not valid; give http(s)://host:port or sqlite:////absolute/path/mlflow.db"
        )


def _check_server(uri: str) -> None:
    """Ask for something that needs the database and permission; /health needs neither."""
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
    except Exception as error:  # a wrong address can raise anything at all
        raise ConnectionError(
            f"tracking.uri={uri} does not answer ({root_of(error)}); {CURE}"
        ) from None
    host = urlsplit(uri).netloc
    if answer.status_code == 401:
        raise ConnectionError(f"tracking.uri={uri} wants to know who asks; {SIGN_IN}")
    if answer.status_code == 403 and "Host header" in answer.text:
        names = ",".join(dict.fromkeys((host.rsplit(":", 1)[0], host)))
        raise ConnectionError(
            f"tracking.uri={uri} is not known to its server by that name; start it with --allowed-hosts {names}"
        )
    if answer.status_code == 403:
        raise ConnectionError(f"tracking.uri={uri} does not let this user in; {SIGN_IN}")
    if answer.status_code != 200 or "json" not in answer.headers.get("Content-Type", ""):
        said = " ".join(answer.text.split())[:80]
        raise ConnectionError(
            f"tracking.uri={uri} answers as no MLflow does ({answer.status_code} {said}); {CURE}"
        )


def root_of(error: BaseException) -> str:
    """What an HTTP library has wrapped thrice."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return first_line(error)


def first_line(error: BaseException) -> str:
    """What an error says, shortly."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
