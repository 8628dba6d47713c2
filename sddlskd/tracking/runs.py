"""Deliver a run directory to MLflow: its run, parameters, metrics and outcome.

The run directory is the record. `sync` is idempotent: it brings MLflow up to the record as
often as it is called.
"""

import json
import logging
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from sddlskd import config as cfg
from sddlskd import record
from sddlskd.config import Config
from sddlskd.tracking import uri as tracking_uri
from sddlskd.tracking.sweeps import MIRROR_LOCK, experiment_and_parent, parent_of
from sddlskd.tracking.uri import first_line, root_of

__all__ = ["supersede", "sync"]

log = logging.getLogger(__name__)


# MLflow's limits: the first three in characters, the last two in entries per request.
PARAM, KEY, TAG, PARAMS_A_BATCH, METRICS_A_BATCH = (6000, 250, 8000, 100, 1000)
CUT = " ... (cut)"
SUMMARY = {f"{name}/top1": f"{name}_top1" for name in ("best", "last", "test", "teacher")}
SUPERSEDED = ".superseded"  # a file that marks a record as replaced
OUTCOMES = (record.FINISHED, record.FAILED, record.KILLED)


def _cut(value: Any, limit: int) -> str:
    text = str(value)
    return text if len(text) <= limit else text[: limit - len(CUT)] + CUT


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


class StillUnreachable(ConnectionError):
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
                    config,
                    tracking=replace(
                        config.tracking, experiment_id=experiment_and_parent(config, None)[0]
                    ),
                )
            except ValueError:
                raise
            except Exception as error:
                raise (
                    StillUnreachable(root_of(error)) if config.tracking.offline else error
                ) from error
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
    config = replace(config, tracking=replace(config.tracking, parent_run_id=parent_of(config)))
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
