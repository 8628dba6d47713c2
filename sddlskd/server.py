"""A tracking server of one's own: MLflow on PostgreSQL, on loopback, its data in one folder.

    python -m sddlskd.server [--folder FOLDER] [--port PORT] [--name NAME ...] [-- OPTIONS OF mlflow server]

PostgreSQL listens on a socket that its own user alone can open, and asks for a password that is made here and kept in
FOLDER/password. What makes the server safe to reach from other machines: docs/tracking.md.
"""

import argparse
import ctypes
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

from filelock import FileLock, Timeout

from sddlskd.console import write_line

__all__ = ["main"]

USER = "sddlskd"  # of the database
START_S = 120.0  # seconds that each of the two has to start
STOP_S = 30.0  # seconds that each of the two has to stop
# uvicorn kills a worker that is silent for 5 s, as one is that imports MLflow on a busy machine: then none ever starts.
_UVICORN = f"--timeout-graceful-shutdown 5 --timeout-worker-healthcheck {START_S:.0f}"
_PR_SET_PDEATHSIG = 1


class Stopped(Exception):
    """A person or the system asked to stop."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run MLflow on PostgreSQL on loopback until it is stopped. The same command goes on with the same data."""
    parser = argparse.ArgumentParser(prog="python -m sddlskd.server", description=main.__doc__)
    parser.add_argument(
        "--folder", type=Path, default=Path("tracking-server"), help="where everything is kept"
    )
    parser.add_argument("--port", type=int, default=5000)
    parser.add_argument(
        "--name", action="append", default=[], help="a host name that a proxy passes on"
    )
    parser.add_argument(
        "options", nargs="*", help="after --: options of `mlflow server`, such as --workers 8"
    )
    chosen = parser.parse_args(arguments)

    def stop(number: int, frame: FrameType | None) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)  # once is enough: both are being stopped
        raise Stopped

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        _serve(chosen.folder.absolute(), chosen.port, chosen.name, chosen.options)
    except Stopped:
        write_line("stopped; the same command goes on with the same data")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _serve(folder: Path, port: int, names: Sequence[str], options: Sequence[str]) -> None:
    programs = _programs()
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise OSError(
                f"port {port} cannot be used ({error.strerror}); choose another with --port"
            ) from None
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(FileLock(folder / ".lock", timeout=0))
        except Timeout:
            raise ValueError(
                f"{folder} is served already; stop that server, or choose another --folder"
            ) from None
        sockets = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sddlskd-")))
        owner = _owner(folder, sockets)
        password = _database(folder, programs, owner)
        postgres = [
            programs / "postgres",
            "-D",
            folder / "postgres",
            "-c",
            "listen_addresses=",
            "-c",
        ]
        # In a recovery PostgreSQL may take no notice of SIGINT, its orderly end; SIGQUIT leaves it a recovery to do.
        database = _start(
            stack,
            [*postgres, f"unix_socket_directories={sockets}"],
            folder,
            ending=signal.SIGINT,
            orphan=signal.SIGQUIT,
            **owner,
        )
        ready: list[str | Path] = [programs / "pg_isready", "-q", "-h", sockets, "-U", USER]
        _wait(database, folder, lambda: subprocess.run(ready, check=False).returncode == 0)

        hosts = [
            name for host in ("127.0.0.1", "localhost", *names) for name in (host, f"{host}:{port}")
        ]
        mlflow: list[str | Path] = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
        ]
        mlflow += ["--serve-artifacts", "--artifacts-destination", folder / "artifacts"]
        mlflow += ["--allowed-hosts", ",".join(hosts), "--uvicorn-opts", _UVICORN, *options]
        environment = os.environ | {
            "MLFLOW_BACKEND_STORE_URI": f"postgresql+psycopg2://{USER}@/postgres?host={sockets}",
            "PGPASSFILE": str(password),  # a command line is for everybody to see
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        server = _start(
            stack,
            mlflow,
            folder,
            ending=signal.SIGTERM,
            orphan=signal.SIGTERM,
            env=environment,
            cwd=folder,
        )
        _wait(server, folder, lambda: _answers(f"http://127.0.0.1:{port}/health"))
        write_line(
            f"tracking.uri=http://127.0.0.1:{port}    (data and logs in {folder}; Ctrl-C stops it)"
        )
        while server.poll() is None and database.poll() is None:
            time.sleep(0.5)
        raise OSError(
            f"{'PostgreSQL' if server.poll() is None else 'MLflow'} died; {_end_of_log(folder)}"
        )


def _programs() -> Path:
    """The folder of PostgreSQL's programs."""
    if not find_spec("psycopg2"):
        raise ValueError("MLflow needs psycopg2 to reach PostgreSQL: pip install 'sddlskd[server]'")
    debian = sorted(
        Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3])
    )
    found = shutil.which("initdb") or next(map(str, reversed(debian)), None)
    if found is None:
        raise ValueError(
            "there is no PostgreSQL on this machine; install it, as with: apt-get install postgresql"
        )
    return Path(found).resolve().parent


def _owner(folder: Path, sockets: Path) -> dict[str, Any]:
    """Arguments of Popen for PostgreSQL, which refuses root: it then runs as the user postgres."""
    if os.geteuid() != 0:
        return {}
    try:
        user = pwd.getpwnam("postgres")
    except KeyError:
        raise ValueError(
            "PostgreSQL does not run as root, and there is no user postgres; run this as a user"
        ) from None
    os.chown(sockets, user.pw_uid, user.pw_gid)
    owner: dict[str, Any] = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    if subprocess.run(["test", "-x", folder], check=False, cwd="/", **owner).returncode:
        raise ValueError(
            f"the user postgres cannot reach {folder}; open its parents (chmod o+x), or choose another --folder"
        )
    return owner


def _database(folder: Path, programs: Path, owner: dict[str, Any]) -> Path:
    """Make the database where there is none; gives the file of its password, in libpq's form."""
    password, data, new = folder / "password", folder / "postgres", folder / "postgres.new"
    if not data.exists():
        shutil.rmtree(new, ignore_errors=True)  # of a start that was cut short
        new.mkdir(mode=0o700)
        os.chown(new, owner.get("user", -1), owner.get("group", -1))
        word = secrets.token_urlsafe(32)
        with open(os.open(password, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(f"*:*:*:{USER}:{word}\n")
        with tempfile.NamedTemporaryFile("w") as once:  # for initdb alone, and 0600 too
            once.write(word)
            once.flush()
            os.chown(once.name, owner.get("user", -1), owner.get("group", -1))
            command = [
                programs / "initdb",
                "-D",
                new,
                "-U",
                USER,
                f"--pwfile={once.name}",
                "-A",
                "scram-sha-256",
            ]
            _run([*command, "-E", "UTF8", "--locale=C.UTF-8"], folder, owner)
        new.rename(data)
    return password


def _run(command: Sequence[Any], folder: Path, owner: dict[str, Any]) -> None:
    with open(folder / "server.log", "ab") as log:
        done = subprocess.run(command, stdout=log, stderr=log, check=False, cwd="/", **owner)
    if done.returncode:
        raise OSError(f"{Path(command[0]).name} failed; {_end_of_log(folder)}")


def _start(
    stack: ExitStack,
    command: Sequence[Any],
    folder: Path,
    *,
    ending: signal.Signals,
    orphan: signal.Signals,
    **options: Any,
) -> subprocess.Popen[bytes]:
    """A process in a session of its own, so that Ctrl-C stops it through us, by `ending`; by `orphan` where we die."""

    def end_with_parent() -> None:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, orphan)

    with open(folder / "server.log", "ab") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=end_with_parent,
            **{"cwd": "/", **options},
        )

    def end() -> None:
        with suppress(ProcessLookupError):
            process.send_signal(ending)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its workers too
        process.wait()

    stack.callback(end)
    return process


def _wait(process: subprocess.Popen[bytes], folder: Path, ready: Callable[[], bool]) -> None:
    end = time.monotonic() + START_S
    while not ready():
        if process.poll() is not None or time.monotonic() > end:
            name = Path(process.args[0]).name if isinstance(process.args, list) else ""
            raise OSError(f"{name} did not start; {_end_of_log(folder)}")
        time.sleep(0.1)


def _answers(address: str) -> bool:
    with suppress(OSError):
        urllib.request.urlopen(address, timeout=5).close()
        return True
    return False


def _end_of_log(folder: Path) -> str:
    lines = (folder / "server.log").read_text(errors="replace").split("\n")
    return f"{folder / 'server.log'} ends: {' | '.join(line.strip() for line in lines if line.strip())[-300:]}"


if __name__ == "__main__":
    main()
