"""Run a private tracking server: MLflow on PostgreSQL, on loopback, with all data in one folder.

    python -m sddlskd.server [--folder FOLDER] [--port PORT] [--name NAME ...]
                             [-- OPTIONS OF mlflow server]

PostgreSQL listens on a Unix socket that only PostgreSQL's own user can open. Clients need a
password, which this module generates and stores in FOLDER/password. docs/tracking.md explains how
to make the server safe to reach from other machines.
"""

import argparse
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

from sddlskd.processes.parent import end_with_parent
from sddlskd.terminal.arguments import other_form
from sddlskd.terminal.console import write_line

__all__ = ["main"]

USER = "sddlskd"  # the database user
START_S = 120.0  # time limit in seconds for the start of PostgreSQL, and for that of MLflow
STOP_S = 30.0  # time limit in seconds for the stop of PostgreSQL, and for that of MLflow
# By default uvicorn kills a worker that does not respond for 5 s. On a busy machine the import of
# MLflow takes longer, so that no worker would ever start.
_UVICORN = f"--timeout-graceful-shutdown 5 --timeout-worker-healthcheck {START_S:.0f}"


class Stopped(Exception):
    """Request to stop the server, raised by the handler of SIGINT (Ctrl-C) and SIGTERM."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run an MLflow server with a PostgreSQL database, at the address http://127.0.0.1:PORT.

    Ctrl-C or SIGTERM stops the server. The same command continues with the same data. An error ends
    the command with exit code 1, and a wrong argument with exit code 2.
    """
    parser = argparse.ArgumentParser(prog="python -m sddlskd.server", description=main.__doc__)
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("tracking-server"),
        help="folder for the database, artifacts, password and log",
    )
    parser.add_argument("--port", type=int, default=5000)
    parser.add_argument(
        "--name",
        action="append",
        default=[],
        help="a host name that a proxy passes on; may be given several times",
    )
    parser.add_argument(
        "options", nargs="*", help="after --: options of `mlflow server`, such as --workers 8"
    )
    given = sys.argv[1:] if arguments is None else arguments
    folder = "give the folder of the server: --folder {home}/tracking-server"
    if wrong := other_form(parser, given, keys=(), home=folder):
        parser.error(wrong)
    chosen = parser.parse_args(given)
    if not 1 <= chosen.port <= 65535:
        parser.error(f"--port {chosen.port} is not valid; give a number from 1 to 65535")

    def stop(number: int, frame: FrameType | None) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)  # a second signal must not interrupt the stop
        raise Stopped

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        _serve(chosen.folder.absolute(), chosen.port, chosen.name, chosen.options)
    except Stopped:
        write_line("stopped; the same command continues with the same data")
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
                f"{folder} is already in use by a server; "
                "stop that server, or choose another --folder"
            ) from None
        sockets = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sddlskd-")))
        owner = _owner(folder, sockets)
        password = _database(folder, programs, owner)
        postgres = [programs / "postgres", "-D", folder / "postgres"]
        postgres += ["-c", "listen_addresses=", "-c", f"unix_socket_directories={sockets}"]
        # SIGINT is PostgreSQL's orderly shutdown, but PostgreSQL may ignore it during a recovery.
        # SIGQUIT ends it without an orderly shutdown, so that the next start has to do a recovery.
        database = _start(
            stack,
            postgres,
            folder,
            ending=signal.SIGINT,
            orphan=signal.SIGQUIT,
            **owner,
        )
        ready: list[str | Path] = [programs / "pg_isready", "-q", "-h", sockets, "-U", USER]
        _wait(database, folder, lambda: subprocess.run(ready, check=False).returncode == 0)

        hosts = ["127.0.0.1", "localhost", *names]
        hosts += [f"{host}:{port}" for host in hosts]
        mlflow: list[str | Path] = [sys.executable, "-m", "mlflow", "server"]
        mlflow += ["--host", "127.0.0.1", "--port", str(port)]
        mlflow += ["--serve-artifacts", "--artifacts-destination", folder / "artifacts"]
        mlflow += ["--allowed-hosts", ",".join(hosts), "--uvicorn-opts", _UVICORN, *options]
        environment = os.environ | {
            "MLFLOW_BACKEND_STORE_URI": f"postgresql+psycopg2://{USER}@/postgres?host={sockets}",
            "PGPASSFILE": str(password),  # every user can read a command line
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
        dead = "PostgreSQL" if server.poll() is None else "MLflow"
        raise OSError(f"{dead} died; {_end_of_log(folder)}")


def _programs() -> Path:
    """Return the folder of PostgreSQL's programs.

    The folder is that of `initdb` on PATH, else that of the newest version that Debian installed.
    Raise ValueError if PostgreSQL or psycopg2 is not installed.
    """
    if not find_spec("psycopg2"):
        raise ValueError("MLflow needs psycopg2 to reach PostgreSQL: pip install 'sddlskd[server]'")
    if initdb := shutil.which("initdb"):
        return Path(initdb).resolve().parent
    # Debian keeps the programs of each version in a folder that is not on PATH.
    versions = list(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not versions:
        raise ValueError(
            "PostgreSQL is not installed on this machine; "
            "install it, for example with: apt-get install postgresql"
        )
    return max(versions, key=lambda path: int(path.parts[-3])).resolve().parent


def _owner(folder: Path, sockets: Path) -> dict[str, Any]:
    """Return the arguments of Popen that start a process as the user postgres.

    Return {} unless this process is root. PostgreSQL refuses to run as root. The user postgres
    becomes the owner of `sockets`. Raise ValueError if this process is root and the user postgres
    does not exist or cannot reach `folder`.
    """
    if os.geteuid() != 0:
        return {}
    try:
        user = pwd.getpwnam("postgres")
    except KeyError:
        raise ValueError(
            "PostgreSQL does not run as root, and the user postgres does not exist; "
            "run this command as a user other than root"
        ) from None
    os.chown(sockets, user.pw_uid, user.pw_gid)
    owner: dict[str, Any] = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    if subprocess.run(["test", "-x", folder], check=False, cwd="/", **owner).returncode:
        raise ValueError(
            f"the user postgres cannot reach {folder}; "
            "open its parents (chmod o+x), or choose another --folder"
        )
    return owner


def _database(folder: Path, programs: Path, owner: dict[str, Any]) -> Path:
    """Create the database if it is missing; return its password file (in libpq's format)."""
    password_file = folder / "password"
    data = folder / "postgres"
    if data.exists():
        return password_file
    new = folder / "postgres.new"
    shutil.rmtree(new, ignore_errors=True)  # left by an interrupted start
    new.mkdir(mode=0o700)
    user = owner.get("user", -1)  # -1 keeps the user and the group
    group = owner.get("group", -1)
    os.chown(new, user, group)
    password = secrets.token_urlsafe(32)
    private = os.open(password_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(private, "w") as file:
        file.write(f"*:*:*:{USER}:{password}\n")
    with tempfile.NamedTemporaryFile("w") as once:  # only for initdb; its mode is 0600 as well
        once.write(password)
        once.flush()
        os.chown(once.name, user, group)
        command = [programs / "initdb", "-D", new, "-U", USER, f"--pwfile={once.name}"]
        command += ["-A", "scram-sha-256", "-E", "UTF8", "--locale=C.UTF-8"]
        _run(command, folder, owner)
    new.rename(data)
    return password_file


def _run(command: Sequence[Any], folder: Path, owner: dict[str, Any]) -> None:
    parent = os.getpid()
    with open(folder / "server.log", "ab") as log:
        done = subprocess.run(
            command,
            stdout=log,
            stderr=log,
            check=False,
            cwd="/",
            preexec_fn=lambda: end_with_parent(parent),
            **owner,
        )
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
    """Start a process in its own session and register its stop on `stack`.

    Because of the separate session, Ctrl-C reaches only this process, which then stops the child.

    Args:
        stack: exit stack whose end sends the signal `ending` to the process, and kills a process
            that still runs after STOP_S seconds.
        command: program and its arguments.
        folder: folder of server.log, which receives the output of the process.
        ending: signal that stops the process in the normal case.
        orphan: signal that the process receives if this process dies (on Linux only).
        **options: further arguments of Popen.

    Returns:
        The running process.
    """
    parent = os.getpid()
    with open(folder / "server.log", "ab") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=lambda: end_with_parent(parent, orphan),
            **{"cwd": "/", **options},
        )

    def end() -> None:
        with suppress(ProcessLookupError):
            process.send_signal(ending)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the group, so that worker processes end too
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
    log_file = folder / "server.log"
    lines = log_file.read_text(errors="replace").split("\n")
    text = " | ".join(line.strip() for line in lines if line.strip())
    return f"{log_file} ends: {text[-300:]}"


if __name__ == "__main__":
    main()
