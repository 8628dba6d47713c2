"""The only writer to MLflow. The run directory is the record; `sync` brings MLflow up to it, as often as it is called.

Training never waits for MLflow: `Mirror` calls `sync` from a background thread and goes on trying while a server is
away. What is left undelivered is delivered by `python -m sddlskd.tracking sync DIR [DIR ...]`.
"""

import argparse
import json
import logging
import math
import os
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
import warnings
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from http.client import HTTPException
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock

from sddlskd import config as cfg
from sddlskd import record
from sddlskd.config import Config

__all__ = [
    "Mirror",
    "check_reachable",
    "finish_sweep",
    "log_model",
    "log_plan",
    "register",
    "save_model",
    "supersede",
    "sync",
]

log = logging.getLogger(__name__)

PARAM, KEY, TAG, PARAMS_A_BATCH, METRICS_A_BATCH = 6000, 250, 8000, 100, 1000  # MLflow's limits: characters, entries
CUT = " ... (cut)"
CURE = "start it, name another with tracking.uri=..., or use tracking=none"
SUMMARY = {f"{name}/top1": f"{name}_top1" for name in ("best", "last", "test", "teacher")}
SUPERSEDED = ".superseded"  # a file that marks a record as set aside
OUTCOMES = (record.FINISHED, record.FAILED, record.KILLED)


def _client(uri: str) -> Any:
    # A vanished server must not hold the mirror for the client's default of four minutes a call; it tries again itself.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    from mlflow.tracking import MlflowClient  # heavy: only when a job runs

    # MLflow's own use of SQLAlchemy; nothing that a user can change.
    warnings.filterwarnings("ignore", "The ``noload`` loader strategy is deprecated", DeprecationWarning)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _cut(value: Any, limit: int) -> str:
    text = str(value)
    return text if len(text) <= limit else text[: limit - len(CUT)] + CUT


def register(configs: Sequence[Config], sweep: str | None = None) -> list[Config]:
    """Create database, experiment and (for a sweep) the parent run, and hand their ids on in the configurations.

    Called once, by the launching process alone, since MLflow's first creation races between processes (mlflow issues
    4123 and 12259).
    """
    tracked = next((c for c in configs if c.tracking.enabled), None)
    if tracked is None:
        return list(configs)
    uri, name = str(tracked.tracking.uri), tracked.tracking.experiment
    _check_uri(uri)
    path = Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:") else None
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{path}.lock") if path else nullcontext():  # two launches on an empty home
            client = _client(uri)
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                artifacts = Path(tracked.home, "mlartifacts").as_uri() if path else None
                client.create_experiment(name, artifact_location=artifacts)
                experiment = client.get_experiment_by_name(name)
            if experiment.lifecycle_stage == "deleted":
                raise ValueError(
                    f"tracking.experiment={name} was deleted in MLflow; restore it there or choose another name"
                )
            parent = _parent_run(client, experiment.experiment_id, sweep) if sweep else None
    except ValueError:
        raise
    except Exception as error:  # whatever MLflow and the database under it raise
        raise ConnectionError(f"tracking.uri={uri} does not take runs ({_first_line(error)}); {CURE}") from error
    ids = {"experiment_id": experiment.experiment_id, "parent_run_id": parent}
    return [
        replace(c, tracking=replace(c.tracking, **ids), sweep=replace(c.sweep, name=sweep or c.sweep.name))
        for c in configs
    ]


def check_reachable(configs: Sequence[Config]) -> None:
    """Raises ConnectionError naming the server that does not answer, ValueError for an address that is none."""
    for uri in {str(c.tracking.uri) for c in configs if c.tracking.enabled}:
        _check_uri(uri)


def _check_uri(uri: str) -> None:
    if uri.startswith(("http://", "https://")):
        try:
            urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=5).close()
        except urllib.error.HTTPError:
            pass  # it answers; a proxy may guard /health
        except (OSError, ValueError, HTTPException) as error:
            raise ConnectionError(f"tracking.uri={uri} does not answer ({error}); {CURE}") from None
    elif uri.startswith("sqlite:///"):
        path = Path(uri.removeprefix("sqlite:///"))
        there = next(place for place in (path, *path.absolute().parents) if place.exists())
        if path.is_dir() or not os.access(there, os.W_OK):
            raise ConnectionError(f"tracking.uri={uri} cannot be written; {CURE}")
    else:
        raise ValueError(
            f"tracking.uri={uri} is not valid; give http(s)://host:port or sqlite:////absolute/path/mlflow.db"
        )


def _parent_run(client: Any, experiment_id: str, sweep: str) -> str:
    found = client.search_runs([experiment_id], f"tags.sweep = '{sweep}' and tags.kind = 'sweep'", max_results=1)
    if found:
        parent_id: str = found[0].info.run_id
    else:
        tags = {"sweep": sweep, "kind": "sweep", "git_sha": record.code_state()["git_sha"]}
        parent_id = client.create_run(experiment_id, run_name=sweep, tags=tags).info.run_id
    client.update_run(parent_id, "RUNNING")
    return parent_id


def log_plan(config: Config, path: Path) -> None:
    """Put the sweep's plan beside its run, so that what never started can be told from what was never meant to."""
    if config.tracking.enabled and config.tracking.parent_run_id:
        try:
            _client(str(config.tracking.uri)).log_artifact(config.tracking.parent_run_id, str(path))
        except Exception as error:  # a server may take numbers and no files
            log.warning("MLflow at %s did not take the sweep's plan: %s", config.tracking.uri, _first_line(error))


def finish_sweep(config: Config, status: str) -> None:
    """Close the sweep's parent run; a server that is away is named in the log."""
    if config.tracking.enabled and config.tracking.parent_run_id:
        try:
            _client(str(config.tracking.uri)).set_terminated(config.tracking.parent_run_id, status)
        except Exception as error:
            log.warning("MLflow at %s did not take the sweep's outcome: %s", config.tracking.uri, _first_line(error))


def supersede(folder: Path) -> None:
    """Tag the run of a record that is set aside, so that it does not stand beside the one that replaces it."""
    state, config = record.read_mirror(folder), cfg.load(folder / "config.yaml")
    (folder / SUPERSEDED).touch()  # what MLflow does not hear now, `sync` tells it
    if "run_id" in state:
        try:
            _client(str(state.get("uri", config.tracking.uri))).set_tag(state["run_id"], "superseded", "true")
        except Exception as error:
            log.warning("MLflow was not told that %s is superseded: %s", folder, error)


def sync(folder: Path) -> None:
    """Bring MLflow up to a run directory: run, parameters, every metric not yet there, outcome. Idempotent.

    A run whose process is gone without an outcome ends as KILLED; one that has not started yet is left out. Raises what
    MLflow raises.
    """
    with FileLock(folder / ".mlflow.lock"):
        # In this order, so that an outcome is never newer than what is known of the process, nor than the rows.
        abandoned = record.abandoned(folder)
        result = record.read_result(folder)
        if not result:
            return
        status = result["status"]
        if status == record.RUNNING and abandoned:
            status, result["reason"] = record.KILLED, "the process ended without a word"
        config = cfg.load(folder / "config.yaml")
        if config.tracking.experiment_id is None:  # launched without tracking
            config = register([replace(config, tracking=replace(config.tracking, enabled=True))])[0]
        client = _client(str(config.tracking.uri))
        state = record.read_mirror(folder)
        if state.get("uri", config.tracking.uri) != config.tracking.uri:
            state = {}  # another MLflow than before: it gets the whole run
        if "run_id" not in state:
            state = _create_run(client, folder, config, state)
        if (folder / SUPERSEDED).exists():
            client.set_tag(state["run_id"], "superseded", "true")
        rows = record.read_rows(folder)
        if len(rows) > state["rows"]:
            _send_rows(client, state["run_id"], rows[state["rows"] :])
            state["rows"] = len(rows)
            record.write_mirror(folder, state)
        if status != state["status"]:
            _send_outcome(client, state["run_id"], folder, status, result)
            record.write_mirror(folder, {**state, "status": status})


def _create_run(client: Any, folder: Path, config: Config, state: dict[str, Any]) -> dict[str, Any]:
    """The run of this directory: its key is on disk before the run is made, so that a crash between leaves no twin."""
    known = bool(state)
    key = state.get("key") or uuid.uuid4().hex
    record.write_mirror(folder, {"key": key, "uri": config.tracking.uri})
    experiment_id = config.tracking.experiment_id
    found = client.search_runs([experiment_id], f"tags.record = '{key}'", max_results=1) if known else []
    code = json.loads((folder / "code.json").read_text())
    if found:
        run_id = found[0].info.run_id
    else:
        tags = {
            "record": key,
            "kind": "job",
            "config_hash": cfg.config_hash(config),
            "settings_hash": cfg.settings_hash(config),
            "git_sha": code["git_sha"],
            "sweep": config.sweep.name or "",
            "run_dir": str(folder),
            **({"mlflow.parentRunId": config.tracking.parent_run_id} if config.tracking.parent_run_id else {}),
        }
        tags = {name: _cut(value, TAG) for name, value in tags.items()}
        run_id = client.create_run(experiment_id, run_name=folder.name, tags=tags).info.run_id
    from mlflow.entities import Param

    params = [Param(_cut(k, KEY), _cut(v, PARAM)) for k, v in cfg.flatten(config).items()]
    for at in range(0, len(params), PARAMS_A_BATCH):
        client.log_batch(run_id, params=params[at : at + PARAMS_A_BATCH])
    state = {"key": key, "uri": config.tracking.uri, "run_id": run_id, "rows": 0, "status": record.RUNNING}
    record.write_mirror(folder, state)
    return state


def _send_rows(client: Any, run_id: str, rows: Iterable[dict[str, Any]]) -> None:
    from mlflow.entities import Metric

    # Key, value, time and step come from the file: MLflow drops a point that it has already.
    points = [
        Metric(key, float(value), int(row["time"] * 1000), row["epoch"])
        for row in rows
        for key, value in row.items()
        if key not in ("epoch", "time")
    ]
    for at in range(0, len(points), METRICS_A_BATCH):
        client.log_batch(run_id, metrics=points[at : at + METRICS_A_BATCH])


def _send_outcome(client: Any, run_id: str, folder: Path, status: str, result: dict[str, Any]) -> None:
    if status not in OUTCOMES:  # resumed: what stopped it is over
        client.set_tag(run_id, "status_reason", "")
        client.update_run(run_id, status)
        return
    client.set_tag(run_id, "status_reason", _cut(result.get("reason", ""), TAG))
    for tag in ("teacher_sha256", "environment", "group_size", "requeues"):
        if result.get(tag):
            client.set_tag(run_id, tag, _cut(result[tag], TAG))
    row = {key: result[name] for key, name in SUMMARY.items() if result.get(name) is not None}
    _send_rows(client, run_id, [{**row, "epoch": result.get("epochs", 0), "time": result.get("time", time.time())}])
    client.set_terminated(run_id, status)
    for name in (
        "config.yaml",
        "code.diff",
        "result.json",
        "predictions.npz",
    ):  # last: a server may take numbers and no files
        if (folder / name).exists():
            client.log_artifact(run_id, str(folder / name))


def save_model(onnx_file: Path, folder: Path, *, image_CHW: Sequence[int], num_classes: int) -> None:
    """Write an ONNX model (images in 0..1 -> logits) as an MLflow model with its signature."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of MLflow's own type hints, while it is imported
        import mlflow.onnx
        import numpy as np
        import onnx
        from mlflow.models import ModelSignature
        from mlflow.types import Schema, TensorSpec

        number = np.dtype("float32")
        images, logits = TensorSpec(number, (-1, *image_CHW), "images"), TensorSpec(number, (-1, num_classes), "logits")
        mlflow.onnx.save_model(
            onnx.load(str(onnx_file)),
            str(folder),
            signature=ModelSignature(Schema([images]), Schema([logits])),
            pip_requirements=[f"{name}=={version(name)}" for name in ("mlflow", "numpy", "onnx", "onnxruntime")],
            onnx_execution_providers=["CPUExecutionProvider"],
            save_as_external_data=False,
        )


def log_model(folder: Path, model: Path) -> str | None:
    """Give MLflow the model of a run; its address there, or None where MLflow lacks the run or does not take it."""
    state = record.read_mirror(folder)
    if "run_id" not in state:
        return None
    try:
        _client(str(state["uri"])).log_artifacts(state["run_id"], str(model), model.name)
    except Exception as error:  # a server may be away, or take numbers and no files
        log.warning("MLflow at %s did not take the model: %s", state["uri"], _first_line(error))
        return None
    return f"runs:/{state['run_id']}/{model.name}"


class Mirror:
    """A background thread that keeps MLflow up to the run directories it is told of."""

    def __init__(self) -> None:
        self._dirty: set[Path] = set()  # to be delivered
        self._busy: set[Path] = set()  # being delivered
        self._give_up = math.inf  # time.monotonic() after which a failed delivery is not tried again
        self._wake = threading.Condition()
        self._closing = False
        self._away = False
        self._thread = threading.Thread(target=self._work, name="mlflow-mirror", daemon=True)
        self._thread.start()

    def update(self, folder: Path) -> None:
        """Something changed in this run directory."""
        with self._wake:
            self._dirty.add(folder)
            self._wake.notify()

    def close(self, timeout: float = 60.0, retry: float = 10.0) -> None:
        """Deliver what is left, for at most `timeout` seconds, of which `retry` are spent on MLflow that does not take
        it; name in the log what could not be delivered."""
        with self._wake:
            self._closing, self._give_up = True, time.monotonic() + retry
            self._wake.notify()
        self._thread.join(timeout)
        if left := self._dirty | self._busy:
            folders = " ".join(sorted(map(str, left)))
            log.warning("MLflow has not got everything; when it is back: python -m sddlskd.tracking sync %s", folders)

    def _work(self) -> None:
        pause = 1.0
        while True:
            with self._wake:
                while not self._dirty and not self._closing:
                    self._wake.wait()
                if not self._dirty:
                    return
                self._busy, self._dirty = self._dirty, set()
            failed = {folder for folder in self._busy if not self._try(folder)}
            with self._wake:
                self._dirty |= failed
                self._busy = set()
                if failed and time.monotonic() > self._give_up:
                    return
                if failed:
                    self._wake.wait(1.0 if self._closing else pause)
            pause = min(pause * 2, 60.0) if failed else 1.0

    def _try(self, folder: Path) -> bool:
        try:
            sync(folder)
        except Exception as error:  # whatever MLflow raises: training must not see it
            if not self._away:
                reason = f"{type(error).__name__}: {_first_line(error)}"
                log.warning("MLflow does not take metrics (%s); training goes on", reason)
            self._away = True
            return False
        if self._away:
            log.warning("MLflow is back; what it missed is being delivered")
        self._away = False
        return True


def main(arguments: Sequence[str] | None = None) -> None:
    """`python -m sddlskd.tracking sync DIR ...`: bring MLflow up to run directories, or to folders of them."""
    parser = argparse.ArgumentParser(prog="python -m sddlskd.tracking", description=main.__doc__)
    parser.add_argument("command", choices=["sync"])
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR")
    chosen = parser.parse_args(arguments)
    cfg.frame()
    runs = sorted({path.parent for folder in chosen.folders for path in folder.rglob("config.yaml")})
    if not runs:
        sys.exit(f"error: no run directory in {' '.join(map(str, chosen.folders))}")
    for run in runs:
        try:
            sync(run)
        except Exception as error:
            sys.exit(f"error: {run} could not be delivered: {error}")
    sys.stdout.write(f"MLflow has {len(runs)} runs up to date\n")


if __name__ == "__main__":
    main()
