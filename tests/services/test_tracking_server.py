"""Test MLflow on PostgreSQL as `make tracking-server` starts it.

With many writers and outages, nothing may be lost and nothing stored twice.
"""

import json
import math
import os
import random
import re
import select
import shutil
import signal
import socket
import socketserver
import stat
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sddlskd import config as cfg
from sddlskd import record, tracking
from sddlskd.config import Config
from sddlskd.record import FINISHED, RUNNING, Record
from sddlskd.sweeps.manifest import write_manifest, write_plan
from sddlskd.tracking import Mirror
from sddlskd.tracking import __main__ as sync_command
from sddlskd.tracking import uri as tracking_uri
from sddlskd.training.fit import fit
from sddlskd.training.run import Run
from tests.tiny import processes, tiny

pytestmark = [pytest.mark.services, pytest.mark.timeout(1800)]
WRITERS, EPOCHS = 64, 3


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


class Server:
    """`python -m sddlskd.server`, which can be stopped, killed and restarted with its data."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name, self.port = folder, name, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[str] | None = None

    def command(self) -> list[str]:
        command = [
            sys.executable,
            "-m",
            "sddlskd.server",
            "--folder",
            str(self.folder),
            "--port",
            str(self.port),
        ]
        return [*command, "--name", self.name, "--", "--workers", "2"]

    def start(self) -> None:
        self.process = subprocess.Popen(
            self.command(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line.startswith(f"tracking.uri={self.uri} "), line

    def stop(self) -> str:
        assert self.process
        self.process.send_signal(signal.SIGTERM)
        said, _ = self.process.communicate(timeout=120)
        return said

    def children(self) -> dict[str, int]:
        """Return the process ids of PostgreSQL and of MLflow."""
        assert self.process
        found = (
            Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        )
        names = {
            Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode(): int(pid)
            for pid in found
        }
        return {
            "postgres" if name.endswith("postgres") else "mlflow": pid
            for name, pid in names.items()
        }

    def kill(self, part: str) -> None:
        """Send SIGKILL to a part of the server, then start again what has stopped."""
        assert self.process
        children = self.children()
        # If one connection is killed, PostgreSQL drops all connections and recovers.
        if part == "connection":
            (connection,) = self.sql(
                "select min(pid) from pg_stat_activity where backend_type = 'client backend'"
            )
            os.kill(int(connection[0]), signal.SIGKILL)
            return
        os.kill(self.process.pid if part == "all" else children[part], signal.SIGKILL)
        self.process.communicate(timeout=120)
        deadline = time.monotonic() + 120
        while (
            any(Path(f"/proc/{pid}").exists() for pid in children.values())
            or not self.port_is_free()
        ):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        self.start()

    def port_is_free(self) -> bool:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with suppress(OSError):
                probe.bind(("127.0.0.1", self.port))
                return True
        return False

    def points(self) -> int:
        """Return the number of stored points, or 0 while PostgreSQL recovers."""
        with suppress(subprocess.CalledProcessError):
            return int(self.sql("select count(*) from metrics")[0][0])
        return 0

    def sql(self, query: str) -> list[list[str]]:
        place = (self.folder / "postgres" / "postmaster.pid").read_text().splitlines()[4]
        command = [
            "psql",
            "-h",
            place,
            "-U",
            "sddlskd",
            "-d",
            "postgres",
            "-At",
            "-F",
            "\t",
            "-c",
            query,
        ]
        environment = os.environ | {"PGPASSFILE": str(self.folder / "password")}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return [line.split("\t") for line in done.stdout.splitlines()]


class Gate(socketserver.ThreadingTCPServer):
    """A proxy between writers and server.

    It can be closed, and it can cut off connections in the middle of an answer.
    """

    daemon_threads, request_queue_size = True, 256

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Pump)
        self.is_open, self.cuts, self.server, self.draw = True, 0.0, 0, random.Random(0)
        self.uri = f"http://127.0.0.1:{self.server_address[1]}"


class Pump(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        gate: Any = self.server
        # Bytes of the answers until the connection is cut off
        left = gate.draw.randrange(400) if gate.draw.random() < gate.cuts else math.inf
        with suppress(OSError), socket.create_connection(("127.0.0.1", gate.server)) as server:
            while gate.is_open:
                for ready in select.select([self.request, server], [], [], 0.05)[0]:
                    content = ready.recv(65536)
                    if not content or left <= 0:
                        return
                    if ready is server:
                        content, left = content[: int(min(left, 65536))], left - len(content)
                    (server if ready is self.request else self.request).sendall(content)


@pytest.fixture(scope="module")
def gate() -> Iterator[Gate]:
    with Gate() as gate:
        thread = threading.Thread(target=gate.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield gate
        gate.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def server(gate: Gate) -> Iterator[Server]:
    if not shutil.which("psql"):
        reason = "there is no PostgreSQL on this machine"
        assert "CI" not in os.environ, reason
        pytest.skip(reason)
    place = Path(tempfile.mkdtemp(prefix="sddlskd-test-"))
    # The user postgres must be able to enter the folder. It cannot enter pytest's folders.
    place.chmod(0o755)
    server = Server(place / "tracking-server", gate.uri.removeprefix("http://"))
    gate.server = server.port
    server.start()
    yield server
    if server.process and server.process.poll() is None:
        server.stop()
    shutil.rmtree(place)


def write(jobs: Sequence[Config]) -> None:
    """Write the records of eight jobs, each in a thread of its own."""
    cfg.frame()
    threads = [threading.Thread(target=write_one, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def write_one(job: Config) -> None:
    draw, mirror, opened = random.Random(job.seed), Mirror(), Record(job)
    for epoch in range(1, EPOCHS + 1):
        strange = draw.choice([math.nan, math.inf, -math.inf, 1e-300])
        opened.append(
            {"epoch": epoch, "time": time.time(), "val/top1": draw.random(), "train/loss": strange}
        )
        opened.result(RUNNING, epochs=epoch)
        mirror.update(opened.folder)
        time.sleep(draw.uniform(0, 1))
    opened.result(FINISHED, best_top1=1.0, last_top1=0.5, epochs=EPOCHS, seconds=1.0)
    while record.read_mirror(opened.folder).get("status") != FINISHED:
        mirror.update(opened.folder)
        time.sleep(draw.uniform(3, 6))
    mirror.close()
    opened.close()


def expected(job: Config) -> Counter[tuple[Any, ...]]:
    """Return the rows that a finished run must have in the table `metrics`."""
    rows = record.read_rows(Path(job.run_dir))
    last = {
        "epoch": 0,  # final numbers have no step
        "time": rows[-1]["time"],
        "best/top1": 1.0,
        "last/top1": 0.5,
    }
    found = Counter[tuple[Any, ...]]()
    for row in [*rows, last]:
        for key in row.keys() - {"epoch", "time"}:
            # MLflow stores the largest float instead of infinity.
            value = max(min(row[key], sys.float_info.max), -sys.float_info.max)
            nan = math.isnan(row[key])
            found[
                key,
                row["epoch"],
                int(row["time"] * 1000),
                0.0 if nan else value,
                "t" if nan else "f",
            ] += 1
    return found


def test_sixty_four_writers_lose_nothing(server: Server, gate: Gate, tmp_path: Path) -> None:
    """The writers also create the experiment and the sweep, all at the same time.

    Meanwhile each part of the server is killed, and connections are cut off.
    """
    draw, gate.cuts = random.Random(7), 0.03
    one = tiny(
        tmp_path, "tracking=mlflow", f"tracking.uri={gate.uri}", "sweep.name=many", teacher=False
    )
    seeds = [replace(one, seed=seed) for seed in range(WRITERS)]
    jobs = [replace(job, run_dir=str(tmp_path / "runs" / cfg.run_name(job))) for job in seeds]
    gate.is_open = False
    sweep_folder = Path(jobs[0].home, "runs/sweeps/many")
    write_manifest(sweep_folder, "many", jobs)
    write_plan(sweep_folder, "many", jobs)
    tracking.log_plan(one)
    gate.is_open = True
    for job in jobs:
        record.freeze(job)
    writers = [processes.Process(target=write, args=(jobs[at::8],)) for at in range(8)]
    for writer in writers:
        writer.start()
    for part in ("connection", "mlflow", "all", "postgres"):
        before = server.points()
        # Wait until the writers have written something.
        while server.points() <= before and any(writer.is_alive() for writer in writers):
            time.sleep(draw.uniform(0, 1))
        server.kill(part)
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * 8
    gate.cuts = 0.0
    tracking.finish_sweep(one, FINISHED)
    sync_command.main(["sync", str(tmp_path / "runs")])

    assert server.sql("select name, lifecycle_stage from experiments where name = 'sddlskd'") == [
        ["sddlskd", "active"]
    ]
    active = (
        "from runs r join tags t on t.run_uuid = r.run_uuid "
        "where r.lifecycle_stage = 'active' and t.key = "
    )
    parents = server.sql(f"select r.run_uuid, r.status {active} 'kind' and t.value = 'sweep'")
    assert [state for _, state in parents] == ["FINISHED"]
    runs = dict(
        server.sql(f"select t.value, r.run_uuid {active} 'run_dir' and r.status = 'FINISHED'")
    )
    assert len(server.sql(f"select r.run_uuid {active} 'record'")) == WRITERS
    assert runs.keys() == {job.run_dir for job in jobs}
    assert {
        tuple(row)
        for row in server.sql(f"select t.value, count(*) {active} 'mlflow.parentRunId' group by 1")
    } == {(parents[0][0], str(WRITERS + 1))}  # and the cell, their mean
    written: dict[str, Counter[tuple[Any, ...]]] = {run_id: Counter() for run_id in runs.values()}
    for run_id, key, step, stamp, value, nan in server.sql(
        "select run_uuid, key, step, timestamp, value, is_nan from metrics"
    ):
        if run_id in written:
            written[run_id][key, int(step), int(stamp), float(value), nan] += 1
    params = dict(server.sql("select run_uuid, count(*) from params group by 1"))
    for job in jobs:
        assert written[runs[job.run_dir]] == expected(job)
        assert params[runs[job.run_dir]] == str(len(cfg.flatten(job)) + 1)  # and the method
    client = tracking_uri.client(server.uri)
    for job in jobs[::16]:  # MLflow's client must read the same
        rows = record.read_rows(Path(job.run_dir))
        points = client.get_metric_history(runs[job.run_dir], "val/top1")
        assert [(point.step, point.value) for point in points] == [
            (row["epoch"], row["val/top1"]) for row in rows
        ]
    assert [file.path for file in client.list_artifacts(parents[0][0])] == ["plan.json"]


@pytest.mark.parametrize(
    "shut", [(0, 3), (2, 4), (4, 99), (0, 99)], ids=["start", "middle", "end", "whole"]
)
def test_outages(
    server: Server,
    gate: Gate,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shut: tuple[int, int],
) -> None:
    """The server is unreachable from the end of one epoch to the end of another.

    `shut` holds the two epochs: 0 is the start of the training, and 99 is after its end.
    """
    monkeypatch.setattr(Mirror.close, "__defaults__", (30.0, 0.5 if shut[1] == 99 else 30.0))
    real = Run.end_epoch

    def ending(self: Run, *arguments: Any) -> None:
        real(self, *arguments)
        gate.is_open = not shut[0] < self.epoch <= shut[1]
        noted = self.record.folder / "mlflow.json"
        deadline = time.monotonic() + 60
        # Wait until MLflow has the run, so that an outage never begins before that.
        while gate.is_open and "rows" not in record.read_mirror(noted.parent):
            assert time.monotonic() < deadline
            time.sleep(0.05)

    monkeypatch.setattr(Run, "end_epoch", ending)
    gate.is_open = shut[0] > 0
    job = tiny(
        tmp_path, "tracking=mlflow", f"tracking.uri={gate.uri}", "tracking.offline=true",
        "trainer.epochs=5",
        f"tracking.experiment=outage-{shut[0]}-{shut[1]}",
    )  # fmt: skip
    (result,) = fit([job])
    assert result["status"] == FINISHED
    gate.is_open = True
    if shut[1] == 99:
        with pytest.raises(AssertionError):
            assert history(server, job) == Counter(expected_keys(job))
        sync_command.main(["sync", job.run_dir])
    for _ in range(2):
        assert history(server, job) == Counter(expected_keys(job))
        (Path(job.run_dir) / "mlflow.json").write_text("{")
        sync_command.main(["sync", job.run_dir])


FINAL = {"best/top1", "last/top1", "teacher/top1", "student/parameters", "student/flops"}


def history(server: Server, job: Config) -> Counter[tuple[str, int, float]]:
    client = tracking_uri.client(server.uri)
    experiment = client.get_experiment_by_name(job.tracking.experiment)
    found = Counter[tuple[str, int, float]]()
    for run in client.search_runs([experiment.experiment_id]) if experiment else []:
        for key in run.data.metrics.keys() - FINAL:
            found.update(
                (key, point.step, point.value)
                for point in client.get_metric_history(run.info.run_id, key)
            )
    return found


def expected_keys(job: Config) -> list[tuple[str, int, float]]:
    rows = record.read_rows(Path(job.run_dir))
    return [(key, row["epoch"], row[key]) for row in rows for key in row.keys() - {"epoch", "time"}]


def test_what_protects_it(server: Server) -> None:
    password = (server.folder / "password").read_text()
    assert stat.S_IMODE((server.folder / "password").stat().st_mode) == 0o600
    word = password.strip().rsplit(":", 1)[1].encode()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            assert word not in path.read_bytes()
    assert word not in (server.folder / "server.log").read_bytes()
    page = (Path(__file__).parents[2] / "docs" / "tracking.md").read_text()
    (backup,) = re.findall(r"```sh\n(PGPASSFILE=.*?)```", page, re.DOTALL)
    subprocess.run(["bash", "-ec", backup], cwd=server.folder.parent, check=True)
    assert "CREATE TABLE public.metrics" in (server.folder.parent / "mlflow.sql").read_text()
    environment = os.environ | {"PGPASSWORD": "another", "PGPASSFILE": "/nonexistent"}
    place = (server.folder / "postgres" / "postmaster.pid").read_text().splitlines()[4]
    done = subprocess.run(
        ["psql", "-h", place, "-U", "sddlskd", "-d", "postgres", "-c", "select 1"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "password authentication failed" in done.stderr
    assert server.sql("show listen_addresses") in ([], [[""]])
    for host, code in (
        (f"localhost:{server.port}", 200),
        ("localhost", 200),
        ("evil.example", 403),
    ):
        asked = f"{server.uri}/api/2.0/mlflow/experiments/search?max_results=1"
        request = urllib.request.Request(asked, headers={"Host": host})
        try:
            assert urllib.request.urlopen(request, timeout=20).status == code
        except urllib.error.HTTPError as error:
            assert error.code == code  # noqa: PT017


def descendants(pid: int) -> list[int]:
    children = [
        int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    ]
    return [*children, *(below for child in children for below in descendants(child))]


def test_a_worker_that_is_silent_for_a_while_is_left_alone(server: Server) -> None:
    """A worker that imports MLflow on a busy machine is silent for a while.

    With uvicorn's default of 5 s, every worker would be killed while it starts.
    """

    def workers() -> list[int]:
        below = descendants(server.children()["mlflow"])
        return [pid for pid in below if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    before = workers()
    assert len(before) == 2
    os.kill(before[0], signal.SIGSTOP)
    time.sleep(8)
    os.kill(before[0], signal.SIGCONT)
    time.sleep(1)
    assert workers() == before


def test_it_is_refused_twice_and_keeps_its_data(server: Server, gate: Gate) -> None:
    def refused(*other: str) -> str:
        command = [*server.command()[:3], *other]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 1
        assert len(done.stderr.splitlines()) == 1
        return done.stderr

    folder, elsewhere = str(server.folder), str(server.folder.parent / "other")
    assert f"port {server.port} cannot be used" in refused(
        "--folder", elsewhere, "--port", str(server.port)
    )
    assert f"{folder} is already in use by a server" in refused(
        "--folder", folder, "--port", str(free_port())
    )
    before = server.sql("select count(*) from metrics")
    children = server.children()
    assert "stopped; the same command continues with the same data" in server.stop()
    assert not [pid for pid in children.values() if Path(f"/proc/{pid}").exists()]
    server.start()
    assert server.sql("select count(*) from metrics") == before


REFUSED = """
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {names} else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = map(Without, sys.meta_path)
"""
# Packages that mlflow requires and mlflow-skinny of the same version does not.
FULL = (
    "alembic",
    "sqlalchemy",
    "flask",
    "flask_cors",
    "graphene",
    "docker",
    "gunicorn",
    "huey",
    "skops",
    "psycopg2",
    "pyarrow",
)


def test_a_node_needs_mlflow_skinny_alone(server: Server, tmp_path: Path) -> None:
    code = (
        REFUSED.format(names=set(FULL))
        + "import runpy; runpy.run_module(sys.argv.pop(1), run_name='__main__')"
    )
    common = [
        f"home={tmp_path}",
        "dataset=digits",
        "distiller=vanilla",
        "student=resnet8",
        "trainer=debug",
    ]
    common += ["trainer.device=cpu", "trainer.progress=off", "tracking.experiment=node"]
    environment = os.environ | {"PYTHONPATH": str(Path.cwd())}

    def run(module: str, *words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code, module, *words],
            cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    assert "MLflow does not" not in run("sddlskd.train", f"tracking.uri={server.uri}", *common)
    run("sddlskd.train", f"tracking.uri={server.uri}", "tracking=none", "seed=1", *common)
    assert "MLflow has 2 runs up to date" in run("sddlskd.tracking", "sync", "runs")
    client = tracking_uri.client(server.uri)
    runs = client.search_runs([client.get_experiment_by_name("node").experiment_id])
    assert sorted((run.info.status, run.data.params["seed"]) for run in runs) == [
        ("FINISHED", "0"),
        ("FINISHED", "1"),
    ]
    for run_ in runs:
        assert {"config.yaml", "result.json"} <= {
            file.path for file in client.list_artifacts(run_.info.run_id)
        }
        assert (
            json.loads(Path(run_.data.tags["run_dir"], "result.json").read_text())["status"]
            == "FINISHED"
        )
