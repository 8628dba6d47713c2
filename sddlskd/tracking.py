"""Copy run directories to MLflow; no other module writes to MLflow.

The run directory is the record of a run. `sync` updates MLflow from the run directory and may be
called any number of times. Training never waits for MLflow: `Mirror` calls `sync` from a background
thread and retries while the server is unreachable. To deliver records that are still undelivered
when a job ends, run `python -m sddlskd.tracking sync DIR [DIR ...]`.
"""

import argparse
import hashlib
import json
import logging
import math
import socket
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock

from sddlskd import config as cfg
from sddlskd import record, tracking_uri
from sddlskd.config import Config, TrackingConfig
from sddlskd.tracking_uri import CURE, ONE_HOST, first_line, root_of, sqlite_file, within

__all__ = [
    "Mirror",
    "check_reachable",
    "check_shared",
    "finish_sweep",
    "log_model",
    "log_plan",
    "register",
    "save_model",
    "supersede",
    "sync",
    "sync_sweep",
]

log = logging.getLogger(__name__)

# MLflow's limits: the first three in characters, the last two in entries per request.
PARAM, KEY, TAG, PARAMS_A_BATCH, METRICS_A_BATCH = (6000, 250, 8000, 100, 1000)
CUT = " ... (cut)"
MIRROR_LOCK = ".mlflow.lock"
SUMMARY = {f"{name}/top1": f"{name}_top1" for name in ("best", "last", "test", "teacher")}
SUPERSEDED = ".superseded"  # a file that marks a record as replaced
OUTCOMES = (record.FINISHED, record.FAILED, record.KILLED)


def _cut(value: Any, limit: int) -> str:
    text = str(value)
    return text if len(text) <= limit else text[: limit - len(CUT)] + CUT


def register(configs: Sequence[Config], sweep: str | None = None) -> list[Config]:
    """Create the database, the experiment and a sweep's parent run; return configs with their ids.

    The launching process calls this function. The first of the configurations with tracking enabled
    names the MLflow address and the experiment; the parent run is created only if `sweep` is given.
    If MLflow does not accept runs and `tracking.offline` is set, log a warning and return
    configurations without ids: `sync` creates the missing experiment and runs later.

    Raises:
        ConnectionError: MLflow does not accept runs and `tracking.offline` is not set. For a server
            this error comes within seconds.
        ValueError: `tracking.uri` is not a valid address, or the experiment was deleted in MLflow.
    """
    tracked = next((c for c in configs if c.tracking.enabled), None)
    if tracked is None:
        return list(configs)
    uri, experiment_id, parent = str(tracked.tracking.uri), None, None
    try:
        tracking_uri.check(uri)
        # No time limit for a file: the time to create a database is not known beforehand.
        seconds = None if sqlite_file(uri) else tracking_uri.ANSWER_S
        experiment_id, parent = within(seconds, lambda: _ids(tracked, sweep))
    except ValueError:
        raise
    except Exception as error:  # MLflow and its database may raise any type
        known = isinstance(error, ConnectionError)
        said = (
            str(error)
            if known
            else f"tracking.uri={uri} does not accept runs ({first_line(error)}); {CURE}"
        )
        if not tracked.tracking.offline:
            raise ConnectionError(said) from error
        runs = Path(tracked.home, "runs")
        log.warning(
            "%s; continuing without MLflow. Deliver the records later with: "
            "python -m sddlskd.tracking sync %s",
            said.removesuffix(f"; {CURE}"),
            runs,
        )
    return [
        replace(
            c,
            tracking=replace(c.tracking, experiment_id=experiment_id, parent_run_id=parent),
            sweep=replace(c.sweep, name=sweep or c.sweep.name),
        )
        for c in configs
    ]


def _ids(config: Config, sweep: str | None) -> tuple[str, str | None]:
    """Return (experiment id, parent run id), creating the experiment and the run if missing.

    The parent run id is None without a sweep. Any number of processes may call this function at the
    same time.
    """
    uri = str(config.tracking.uri)
    path = sqlite_file(uri)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
    # MLflow's creation of a database has a race condition (MLflow issue 12259).
    with FileLock(f"{path}.lock") if path else nullcontext():
        client = tracking_uri.client(uri)
        experiment_id = _experiment(client, config)
        parent = _parent_run(client, experiment_id, sweep) if sweep else None
    return experiment_id, parent


def _experiment(client: Any, config: Config) -> str:
    from mlflow.exceptions import MlflowException

    name = config.tracking.experiment
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        place = (
            Path(config.home, "mlartifacts").as_uri()
            if sqlite_file(str(config.tracking.uri))
            else None
        )
        try:
            client.create_experiment(name, artifact_location=place)
        except MlflowException as error:
            # Another process may have created the experiment in the meantime.
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        experiment = client.get_experiment_by_name(name)
    if experiment.lifecycle_stage == "deleted":
        raise ValueError(
            f"tracking.experiment={name} was deleted in MLflow; "
            "restore it there or choose another name"
        )
    experiment_id: str = experiment.experiment_id
    return experiment_id


def check_reachable(configs: Sequence[Config]) -> None:
    """Check that the MLflow server of every job that is about to start answers.

    Jobs that the launching process already registered (`tracking.experiment_id` is set) may start
    without the server, because any running job may lose its server. The same holds for jobs with
    `tracking.offline`.

    Raises:
        ConnectionError: A server does not answer; the message names its address.
        ValueError: A `tracking.uri` is not a valid address.
    """
    starting = [
        c.tracking for c in configs if c.tracking.enabled and c.tracking.experiment_id is None
    ]
    for uri in {str(tracking.uri) for tracking in starting}:
        try:
            tracking_uri.check(uri)
        except ConnectionError:
            if not all(tracking.offline for tracking in starting if tracking.uri == uri):
                raise


def check_shared(configs: Sequence[Config], hosts: Iterable[str]) -> None:
    """Raise ValueError if jobs on hosts other than this one would write to a SQLite file."""
    here = {"localhost", socket.gethostname().split(".")[0]}
    others = sorted({host for host in hosts if host.split(".")[0] not in here})
    for uri in {str(c.tracking.uri) for c in configs if c.tracking.enabled}:
        if others and sqlite_file(uri):
            raise ValueError(
                f"tracking.uri={uri} is a file and jobs would write to it from "
                f"{', '.join(others)}; {ONE_HOST}, or launch with tracking=none and deliver the "
                "records later with: python -m sddlskd.tracking sync runs"
            )


def _parent_run(client: Any, experiment_id: str, sweep: str) -> str:
    def all_there() -> list[Any]:
        return sorted(
            client.search_runs([experiment_id], f"tags.sweep = '{sweep}' and tags.kind = 'sweep'"),
            key=lambda run: (run.info.start_time, run.info.run_id),
        )

    found, own = all_there(), None
    if not found:
        tags = {"sweep": sweep, "kind": "sweep", "git_sha": record.code_state()["git_sha"]}
        own = client.create_run(experiment_id, run_name=sweep, tags=tags).info.run_id
        # Search again: another launch may have created a parent run at the same moment. All
        # launches choose the earliest one.
        found = all_there()
    parent_id: str = found[0].info.run_id
    if own and own != parent_id:
        client.delete_run(own)
    client.update_run(parent_id, "RUNNING")
    return parent_id


def log_plan(config: Config, path: Path) -> None:
    """Upload the sweep's plan to its parent run, so that jobs that never started remain visible.

    Without the plan, a planned job that never started looks like a job that was never planned.
    """
    _tell(config, "plan", status=record.RUNNING)


def finish_sweep(config: Config, status: str) -> None:
    """Set the final status of the sweep's parent run; log a warning if MLflow is unreachable."""
    _tell(config, "outcome", status=status)


def _tell(config: Config, what: str, status: str) -> None:
    """Write the sweep's status to its folder, then try to deliver the status and plan to MLflow.

    `what` names the delivered part in the warning that is logged if the delivery fails.
    """
    if not config.tracking.enabled:
        return
    folder = _sweep_folder(config)
    try:
        with FileLock(folder / MIRROR_LOCK):
            state = _sweep_state(folder, config) | {"status": status}
            record.write_mirror(folder, state)
        # The launching process waits here, so check first: the check takes bounded time.
        tracking_uri.check(str(config.tracking.uri))
        sync_sweep(folder)
    except Exception as error:  # a server may be unreachable, or accept metrics but no files
        log.warning(
            "MLflow at %s did not accept the sweep's %s: %s; "
            "deliver it later with: python -m sddlskd.tracking sync %s",
            config.tracking.uri,
            what,
            first_line(error),
            folder,
        )


def _sweep_folder(config: Config) -> Path:
    return Path(config.home, "runs", "sweeps", str(config.sweep.name))


def _sweep_state(folder: Path, config: Config) -> dict[str, Any]:
    """Return the content of the sweep's mlflow.json.

    It holds the parent run's id, the values that MLflow should have, and those that MLflow already
    has. Start from an empty state if the file is damaged or is about another MLflow address,
    experiment, home or parent run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        state = record.read_mirror(folder)
    except record.Damaged:
        state = {}
    address = {
        "uri": config.tracking.uri,
        "experiment": config.tracking.experiment,
        "home": config.home,
    }
    if any(state.get(key) != value for key, value in address.items()):
        state = {}
    parent = config.tracking.parent_run_id or state.get("run_id")
    if parent != state.get("run_id"):
        state = {}
    return {
        "status": record.RUNNING,
        **state,
        **address,
        "sweep": config.sweep.name,
        "run_id": parent,
    }


def sync_sweep(folder: Path, *, again: bool = False) -> None:
    """Update MLflow from a sweep's folder: its parent run, its status and its plan.

    The function is idempotent. `again` means the same as in `sync`.
    """
    with FileLock(folder / MIRROR_LOCK):
        state = record.read_mirror(folder)
        if not state:
            return
        if again:
            state = {
                key: state[key] for key in ("uri", "experiment", "home", "sweep", "status")
            } | {"run_id": None}
        client, plan = tracking_uri.client(str(state["uri"])), folder / "plan.json"
        state["run_id"] = _run_of_sweep(folder, state)
        if state["status"] != state.get("told"):
            (client.update_run if state["status"] == record.RUNNING else client.set_terminated)(
                state["run_id"], state["status"]
            )
            state["told"] = state["status"]
            record.write_mirror(folder, state)
        digest = hashlib.sha256(plan.read_bytes()).hexdigest() if plan.exists() else None
        # The plan comes last because a server may accept metrics but no files.
        if digest != state.get("plan"):
            client.log_artifact(state["run_id"], str(plan))
            record.write_mirror(folder, {**state, "plan": digest})


def _run_of_sweep(folder: Path, state: dict[str, Any]) -> str:
    """Return the id of the sweep's parent run, creating the run if missing.

    The caller must hold the sweep's lock.
    """
    if not state["run_id"]:
        tracking = TrackingConfig(uri=state["uri"], experiment=state["experiment"])
        _, state["run_id"] = _ids(Config(tracking=tracking, home=state["home"]), state["sweep"])
        state["told"] = record.RUNNING
        record.write_mirror(folder, state)
    run_id: str = state["run_id"]
    return run_id


def _parent_of(config: Config) -> str | None:
    """Return the id of the parent run of the sweep that planned this job, or None if no sweep did.

    The configuration holds the id unless MLflow was unreachable when the sweep was launched.
    """
    folder = _sweep_folder(config)
    if config.tracking.parent_run_id or not _planned(folder, config):
        return config.tracking.parent_run_id
    with FileLock(folder / MIRROR_LOCK):
        return _run_of_sweep(folder, _sweep_state(folder, config))


def _planned(folder: Path, config: Config) -> bool:
    path = folder / "plan.json"
    return path.exists() and any(
        job["run_dir"] == config.run_dir for job in json.loads(path.read_text())["jobs"]
    )


def supersede(folder: Path) -> None:
    """Tag the MLflow run of a replaced record as superseded, so that it is not counted twice.

    If MLflow is unreachable now, log a warning; `sync` sets the tag later.
    """
    (folder / SUPERSEDED).touch()
    try:
        state = record.read_mirror(folder)
        if "run_id" in state:
            tracking_uri.client(str(state["uri"])).set_tag(state["run_id"], "superseded", "true")
    except Exception as error:
        log.warning("MLflow was not told that %s is superseded: %s", folder, first_line(error))


class _StillAway(ConnectionError):
    """MLflow was unreachable at launch, which was logged then, and is still unreachable."""


def sync(folder: Path, *, again: bool = False) -> None:
    """Update MLflow from a run directory: the run, its parameters, all new metrics and its outcome.

    The function is idempotent. A run whose process ended without writing an outcome gets the status
    KILLED. A run that has not started yet is skipped. Errors of MLflow propagate to the caller.

    Args:
        folder: The run directory.
        again: Deliver everything again, including what was delivered before; for example for a
            server that was restored from a backup.
    """
    folder = folder.absolute()  # MLflow records the absolute path
    with FileLock(folder / MIRROR_LOCK):
        # Check the process before reading the result: otherwise a run that finishes in between
        # would count as KILLED. Read the rows after the result, so that no outcome is delivered
        # without its last rows.
        abandoned = record.abandoned(folder)
        result = record.read_result(folder)
        if not result:
            return
        status = result["status"]
        if status == record.RUNNING and abandoned:
            status, result["reason"] = record.KILLED, "the process ended without writing a result"
        config = cfg.load(folder / "config.yaml")
        # The id is None if the job was launched without tracking or while MLflow was unreachable.
        if config.tracking.experiment_id is None:
            try:
                config = replace(
                    config, tracking=replace(config.tracking, experiment_id=_ids(config, None)[0])
                )
            except ValueError:
                raise
            except Exception as error:
                raise _StillAway(root_of(error)) if config.tracking.offline else error from error
        client = tracking_uri.client(str(config.tracking.uri))
        state = _state(client, folder, config)
        if again:
            state = {key: state[key] for key in ("key", "uri") if key in state}
        if "run_id" not in state:
            state = _create_run(client, folder, config, state)
        if (folder / SUPERSEDED).exists():
            client.set_tag(state["run_id"], "superseded", "true")
        rows = record.read_rows(folder)
        sent = state["rows"] if state["rows"] <= len(rows) else 0
        if len(rows) > sent:
            _send_rows(client, state["run_id"], rows[sent:])
            state["rows"] = len(rows)
            record.write_mirror(folder, state)
        if status != state["status"]:
            _send_outcome(client, state["run_id"], folder, status, result, rows)
            _delete_twins(client, config, state)
            record.write_mirror(folder, {**state, "status": status})


def _state(client: Any, folder: Path, config: Config) -> dict[str, Any]:
    """Return what MLflow already has of a run directory.

    The directory's mlflow.json says so. If that file is damaged, search MLflow for a run with the
    same configuration hash and run directory.
    """
    try:
        state = record.read_mirror(folder)
        noted = {"key", "run_id", "rows", "status"} if "run_id" in state else {"key"}
        if state and not noted <= state.keys():
            raise record.Damaged(f"{folder / 'mlflow.json'} is damaged ({', '.join(state)})")
    except record.Damaged as error:
        runs = client.search_runs(
            [config.tracking.experiment_id],
            f"tags.config_hash = '{cfg.config_hash(config)}' and tags.kind = 'job'",
        )
        keys = [
            run.data.tags["record"] for run in runs if run.data.tags.get("run_dir") == str(folder)
        ]
        log.warning(
            "%s; %s", error, "its run was found in MLflow" if keys else "MLflow has no run for it"
        )
        return {"key": keys[0], "uri": config.tracking.uri} if keys else {}
    if state.get("uri", config.tracking.uri) != config.tracking.uri:
        return {}  # the address has changed: deliver the whole run to the new one
    return state


def _runs_of(client: Any, config: Config, key: str) -> list[Any]:
    runs = client.search_runs([config.tracking.experiment_id], f"tags.record = '{key}'")
    return sorted(runs, key=lambda run: (run.info.start_time, run.info.run_id))


def _delete_twins(client: Any, config: Config, state: dict[str, Any]) -> None:
    """Delete all MLflow runs of this record except the one noted in `state`.

    A server that was too busy to answer in time may still have created the run, so that the retry
    created a second one.
    """
    for run in _runs_of(client, config, state["key"]):
        if run.info.run_id != state["run_id"]:
            client.delete_run(run.info.run_id)


def _create_run(client: Any, folder: Path, config: Config, state: dict[str, Any]) -> dict[str, Any]:
    """Create the MLflow run of this directory, or find it if it exists, and return its state.

    Write the record's key to disk before creating the run: after a crash in between, the next call
    finds the run by its key and does not create a second one.
    """
    known = bool(state)
    key = state.get("key") or uuid.uuid4().hex
    record.write_mirror(folder, {"key": key, "uri": config.tracking.uri})
    config = replace(config, tracking=replace(config.tracking, parent_run_id=_parent_of(config)))
    found = _runs_of(client, config, key) if known else []
    code = json.loads((folder / "code.json").read_text())
    if found:
        run_id, sent = found[0].info.run_id, found[0].data.params
    else:
        tags = {
            "record": key,
            "kind": "job",
            "config_hash": cfg.config_hash(config),
            "settings_hash": cfg.settings_hash(config),
            "git_sha": code["git_sha"],
            "sweep": config.sweep.name or "",
            "run_dir": str(folder),
            **(
                {"mlflow.parentRunId": config.tracking.parent_run_id}
                if config.tracking.parent_run_id
                else {}
            ),
        }
        tags = {name: _cut(value, TAG) for name, value in tags.items()}
        run = client.create_run(config.tracking.experiment_id, run_name=folder.name, tags=tags)
        run_id, sent = run.info.run_id, {}
    from mlflow.entities import Param

    # Send no parameter twice: MLflow refuses a changed value, and some values may change between
    # two starts of a job, such as the folder or the device.
    params = [
        Param(_cut(k, KEY), _cut(v, PARAM))
        for k, v in cfg.flatten(config).items()
        if _cut(k, KEY) not in sent
    ]
    for at in range(0, len(params), PARAMS_A_BATCH):
        client.log_batch(run_id, params=params[at : at + PARAMS_A_BATCH])
    state = {
        "key": key,
        "uri": config.tracking.uri,
        "run_id": run_id,
        "rows": 0,
        "status": record.RUNNING,
    }
    record.write_mirror(folder, state)
    return state


def _send_rows(client: Any, run_id: str, rows: Iterable[dict[str, Any]]) -> None:
    from mlflow.entities import Metric

    # Key, value, time and step come from the file, so MLflow drops a point that it already has.
    points = [
        Metric(key, float(value), int(row["time"] * 1000), row["epoch"])
        for row in rows
        for key, value in row.items()
        if key not in ("epoch", "time")
    ]
    for at in range(0, len(points), METRICS_A_BATCH):
        client.log_batch(run_id, metrics=points[at : at + METRICS_A_BATCH])


def _send_outcome(
    client: Any,
    run_id: str,
    folder: Path,
    status: str,
    result: dict[str, Any],
    rows: Sequence[dict[str, Any]],
) -> None:
    if status not in OUTCOMES:  # the run was resumed, so the old reason no longer applies
        client.set_tag(run_id, "status_reason", "")
        client.update_run(run_id, status)
        return
    client.set_tag(run_id, "status_reason", _cut(result.get("reason", ""), TAG))
    for tag in ("teacher_sha256", "environment", "group_size", "requeues"):
        if result.get(tag):
            client.set_tag(run_id, tag, _cut(result[tag], TAG))
    summary = {key: result[name] for key, name in SUMMARY.items() if result.get(name) is not None}
    for row in rows:
        # Use the epoch's own time, because a run may stop at the same epoch twice.
        if row["epoch"] == result.get("epochs"):
            _send_rows(client, run_id, [{**summary, "epoch": row["epoch"], "time": row["time"]}])
    client.set_terminated(run_id, status)
    # The files come last because a server may accept metrics but no files.
    for name in ("config.yaml", "code.diff", "result.json", "predictions.npz"):
        if (folder / name).exists():
            client.log_artifact(run_id, str(folder / name))


def save_model(
    onnx_file: Path, folder: Path, *, image_CHW: Sequence[int], num_classes: int
) -> None:
    """Write an ONNX model (images -> logits) as an MLflow model with its signature.

    Args:
        onnx_file: The ONNX model. It takes float32 images (B, C, H, W) with values in 0..1 and
            returns float32 logits (B, K).
        folder: The folder to write the MLflow model to.
        image_CHW: The shape of one image: channels, height and width in pixels.
        num_classes: K, the number of classes.
    """
    with warnings.catch_warnings():
        # The import of MLflow warns about MLflow's own type hints.
        warnings.simplefilter("ignore")
        import mlflow.onnx
        import numpy as np
        import onnx
        from mlflow.models import ModelSignature
        from mlflow.types import Schema, TensorSpec

        number = np.dtype("float32")
        images, logits = (
            TensorSpec(number, (-1, *image_CHW), "images"),
            TensorSpec(number, (-1, num_classes), "logits"),
        )
        mlflow.onnx.save_model(
            onnx.load(str(onnx_file)),
            str(folder),
            signature=ModelSignature(Schema([images]), Schema([logits])),
            pip_requirements=[
                f"{name}=={version(name)}" for name in ("mlflow", "numpy", "onnx", "onnxruntime")
            ],
            onnx_execution_providers=["CPUExecutionProvider"],
            save_as_external_data=False,
        )


def log_model(folder: Path, model: Path) -> str | None:
    """Upload the model of a run to MLflow and return its URI (runs:/RUN_ID/NAME).

    Return None if MLflow does not have the run. Log a warning and return None if MLflow does not
    accept the model.
    """
    state = record.read_mirror(folder)
    if "run_id" not in state:
        return None
    try:
        tracking_uri.client(str(state["uri"])).log_artifacts(
            state["run_id"], str(model), model.name
        )
    except Exception as error:  # a server may be unreachable, or accept metrics but no files
        log.warning("MLflow at %s did not accept the model: %s", state["uri"], first_line(error))
        return None
    return f"runs:/{state['run_id']}/{model.name}"


class Mirror:
    """A background thread that delivers changed run directories to MLflow."""

    def __init__(self) -> None:
        self._dirty: set[Path] = set()  # folders waiting for delivery
        self._busy: set[Path] = set()  # folders being delivered
        # The time.monotonic() after which a failed delivery is not retried.
        self._give_up = math.inf
        self._wake = threading.Condition()
        self._closing = False
        self._away = False
        self._thread = threading.Thread(target=self._work, name="mlflow-mirror", daemon=True)
        self._thread.start()

    def update(self, folder: Path) -> None:
        """Schedule the delivery of this run directory, which has changed."""
        with self._wake:
            self._dirty.add(folder)
            self._wake.notify()

    def close(self, timeout: float = 60.0, retry: float = 10.0) -> None:
        """Deliver the remaining run directories, then stop; log the undelivered ones.

        Args:
            timeout: The longest time to wait, in seconds, if MLflow accepts metrics.
            retry: The longest time to retry failed deliveries, in seconds.
        """
        with self._wake:
            self._closing, self._give_up = True, time.monotonic() + retry
            self._wake.notify()
        self._thread.join(retry if self._away else timeout)
        if left := self._dirty | self._busy:
            folders = " ".join(sorted(map(str, left)))
            log.warning(
                "MLflow did not receive everything; once it is reachable, run: "
                "python -m sddlskd.tracking sync %s",
                folders,
            )

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
                    self._wake.wait(min(pause, 4.0) if self._closing else pause)
            pause = min(pause * 2, 60.0) if failed else 1.0

    def _try(self, folder: Path) -> bool:
        try:
            sync(folder)
        except Exception as error:  # an error of MLflow must not end the training
            if not self._away and not isinstance(error, _StillAway):
                reason = f"{type(error).__name__}: {first_line(error)}"
                log.warning("MLflow does not accept metrics (%s); training continues", reason)
            self._away = True
            return False
        if self._away:
            log.warning("MLflow is reachable again; delivering the metrics that it missed")
        self._away = False
        return True


def main(arguments: Sequence[str] | None = None) -> None:
    """Deliver run directories, or all run directories inside folders, to MLflow."""
    parser = argparse.ArgumentParser(prog="python -m sddlskd.tracking", description=main.__doc__)
    parser.add_argument("command", choices=["sync"])
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR")
    parser.add_argument(
        "--again",
        action="store_true",
        help="deliver everything again, for example after the server lost its data",
    )
    chosen = parser.parse_args(arguments)
    cfg.frame()
    runs = sorted(
        {path.parent for folder in chosen.folders for path in folder.rglob("config.yaml")}
    )
    sweeps = {path.parent for folder in chosen.folders for path in folder.rglob("plan.json")}
    if not runs and not sweeps:
        sys.exit(f"error: no run directory in {' '.join(map(str, chosen.folders))}")
    problems, delivered, answering = [], 0, set()
    for run in runs:
        try:
            config = cfg.load(run / "config.yaml")
            if config.tracking.uri not in answering:
                tracking_uri.check(str(config.tracking.uri))
                answering.add(config.tracking.uri)
            sync(run, again=chosen.again)
            delivered += 1
            if _planned(_sweep_folder(config), config):
                sweeps.add(_sweep_folder(config))
        except ConnectionError as error:
            sys.exit(f"error: {run} could not be delivered: {error}")
        except Exception as error:  # one damaged run must not block the delivery of the others
            problems.append(f"error: {run} could not be delivered: {first_line(error)}")
    for sweep in sorted(sweeps):
        try:
            sync_sweep(sweep, again=chosen.again)
        except Exception as error:
            problems.append(f"error: {sweep} could not be delivered: {first_line(error)}")
    sys.stdout.write(f"MLflow has {delivered} runs up to date\n")
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
