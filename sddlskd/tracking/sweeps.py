"""Deliver a sweep to MLflow: its experiment, its parent run, its plan and its outcome."""

import hashlib
import json
import logging
import os
import shlex
import socket
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock

from sddlskd import record
from sddlskd.config import Config, TrackingConfig, sqlite_file
from sddlskd.tracking import uri as tracking_uri
from sddlskd.tracking.cells import cells_of, send_cells
from sddlskd.tracking.uri import ONE_HOST, cure_of, first_line, within

__all__ = ["check_reachable", "check_shared", "finish_sweep", "log_plan", "register", "sync_sweep"]

log = logging.getLogger(__name__)


MIRROR_LOCK = ".mlflow.lock"
# MLflow 3 then shows the view for training first, not that for language models.
TRAINING_VIEW = {"mlflow.experimentKind": "custom_model_development"}


def register(configs: Sequence[Config], sweep: str | None = None) -> list[Config]:
    """Create the MLflow experiment of some jobs, and the MLflow run of their sweep.

    A job is one training run that is about to be launched, and a sweep a group of jobs. The first
    configuration with tracking enabled names the MLflow address and the experiment. A missing
    SQLite database, experiment or run is created; existing ones are used. If no configuration has
    tracking enabled, nothing is done.

    Args:
        configs: The configurations of the jobs.
        sweep: The name of the sweep; None to create no run.

    Returns:
        All configurations. `tracking.experiment_id` is set, and `tracking.parent_run_id` to the id
        of the sweep's run (None without `sweep`). `sweep.name` is set if `sweep` is given. If
        `tracking.offline` is set and MLflow does not accept runs, a warning is logged, both ids are
        None, and `runs.sync` creates what is missing later. If no configuration has tracking
        enabled, the configurations are unchanged.

    Raises:
        ConnectionError: If MLflow does not accept runs and `tracking.offline` is not set. For a
            server this error comes within seconds.
        ValueError: If `tracking.uri` is not a valid address, or the experiment was deleted in
            MLflow (`Deleted`).
    """
    tracked = next((c for c in configs if c.tracking.enabled), None)
    if tracked is None:
        return list(configs)
    uri = str(tracked.tracking.uri)
    experiment_id = None
    parent = None
    try:
        tracking_uri.check_answers(uri)
        # No time limit for a file: the time to create a database is not known beforehand.
        seconds = None if sqlite_file(uri) else tracking_uri.ANSWER_S
        ask = partial(experiment_and_parent, tracked, sweep)
        experiment_id, parent = within(seconds, ask)
    except ValueError:
        raise
    except Exception as error:  # MLflow and its database may raise any type
        problem = str(error)
        cure = cure_of(uri)
        if not isinstance(error, ConnectionError):
            problem = f"tracking.uri={uri} does not accept runs ({first_line(error)}); {cure}"
        if not tracked.tracking.offline:
            raise ConnectionError(problem) from error
        log.warning(
            "%s; continuing without MLflow. Deliver the records later with: "
            "python -m sddlskd.tracking sync %s",
            problem.removesuffix(f"; {cure}"),
            shlex.quote(os.path.join(tracked.home, "runs")),
        )
    return [
        replace(
            c,
            tracking=replace(c.tracking, experiment_id=experiment_id, parent_run_id=parent),
            sweep=replace(c.sweep, name=sweep or c.sweep.name),
        )
        for c in configs
    ]


def experiment_and_parent(config: Config, sweep: str | None) -> tuple[str, str | None]:
    """Return (id of a job's MLflow experiment, id of its sweep's run); create what is missing.

    `config` names the MLflow address and the experiment. `sweep` is the name of the sweep, a group
    of jobs. The sweep's run gets the status RUNNING. If `sweep` is None, no run is created, and the
    second id is None. Any number of processes may call this function at the same time. Errors of
    MLflow propagate.

    Raises:
        Deleted: If the experiment was deleted in MLflow.
        ConnectionError: If the MLflow address is a SQLite file that cannot be written, that another
            host writes to, or that another version of MLflow has written.
    """
    uri = str(config.tracking.uri)
    path = sqlite_file(uri)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
    # MLflow's creation of a database has a race condition (MLflow issue 12259).
    lock = FileLock(f"{path}.lock") if path else nullcontext()
    with lock:
        client = tracking_uri.client(uri)
        experiment_id = _experiment(client, config)
        parent = _parent_run(client, experiment_id, sweep) if sweep else None
    return experiment_id, parent


def _experiment(client: Any, config: Config) -> str:
    from mlflow.exceptions import MlflowException

    name = config.tracking.experiment
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        artifacts = None  # a server chooses the place itself
        if sqlite_file(str(config.tracking.uri)):
            artifacts = Path(config.home, "mlartifacts").as_uri()
        try:
            client.create_experiment(name, artifact_location=artifacts, tags=TRAINING_VIEW)
        except MlflowException as error:
            # Another process may have created the experiment in the meantime.
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        experiment = client.get_experiment_by_name(name)
    tracking_uri.refuse_deleted_experiment(str(config.tracking.uri), experiment)
    experiment_id: str = experiment.experiment_id
    return experiment_id


def check_reachable(configs: Sequence[Config]) -> None:
    """Raise ConnectionError if the MLflow of a job that is about to start does not accept runs.

    A job is checked if its setting `tracking.enabled` is true and the launching process has not
    registered it in MLflow (`tracking.experiment_id` is None). An MLflow that accepts no runs is no
    error if `tracking.offline` is true for all checked jobs with its address.

    Raises:
        ConnectionError: If a server or SQLite file does not accept runs; the message names its
            address.
        ValueError: If a `tracking.uri` is not a valid address.
    """
    starting = [
        c.tracking for c in configs if c.tracking.enabled and c.tracking.experiment_id is None
    ]
    for uri in {str(tracking.uri) for tracking in starting}:
        try:
            tracking_uri.check_answers(uri)
        except ConnectionError:
            if not all(tracking.offline for tracking in starting if tracking.uri == uri):
                raise


def check_shared(configs: Sequence[Config], hosts: Iterable[str]) -> None:
    """Raise ValueError if jobs on other hosts than this one would write to a SQLite file.

    `configs` are the configurations of the jobs; those whose `tracking.enabled` is false are not
    checked. `hosts` are the names of all hosts that run jobs; this host may be among them, with or
    without its domain.
    """
    here = {"localhost", socket.gethostname().split(".")[0]}
    others = sorted({host for host in hosts if host.split(".")[0] not in here})
    for uri in {str(c.tracking.uri) for c in configs if c.tracking.enabled}:
        if others and sqlite_file(uri):
            raise ValueError(
                f"tracking.uri={uri} is a file and jobs would write to it from "
                f"{', '.join(others)}; {ONE_HOST}, or launch with tracking=none and deliver the "
                "records later with: python -m sddlskd.tracking sync runs"
            )


def search_runs(client: Any, experiment_id: str | None, condition: str) -> list[Any]:
    """Return the MLflow runs of an experiment that fulfil a condition, the earliest first.

    Deleted runs are not returned, and at most 1,000 runs are. Errors of MLflow propagate.

    Args:
        client: The MLflow client.
        experiment_id: The id of the experiment; must not be None.
        condition: The condition in MLflow's filter language, such as "tags.kind = 'sweep'".

    Returns:
        The runs, MLflow's objects, sorted by start time; [] if there are none.
    """
    runs = client.search_runs([experiment_id], condition)
    return sorted(runs, key=lambda run: (run.info.start_time, run.info.run_id))


def _parent_run(client: Any, experiment_id: str, sweep: str) -> str:
    """Return the id of the sweep's parent run, and set the run's status to RUNNING.

    The run is created if it is missing.
    """
    condition = f"tags.sweep = '{sweep}' and tags.kind = 'sweep'"
    found = search_runs(client, experiment_id, condition)
    own = None
    if not found:
        tags = {"sweep": sweep, "kind": "sweep", "git_sha": record.code_state()["git_sha"]}
        own = client.create_run(experiment_id, run_name=sweep, tags=tags).info.run_id
        # Search again: another launch may have created a parent run at the same moment. All
        # launches choose the earliest one.
        found = search_runs(client, experiment_id, condition)
    parent_id: str = found[0].info.run_id
    if own and own != parent_id:
        client.delete_run(own)
    client.update_run(parent_id, "RUNNING")
    return parent_id


def log_plan(config: Config) -> None:
    """Upload the plan of a sweep to its run in MLflow, and set the status of that run to RUNNING.

    The plan is the file plan.json in the sweep's folder, which lists the sweep's jobs. `config` is
    a configuration that `register` returned for one of the jobs. If the upload fails, a warning is
    logged, and `sync_sweep` can deliver the plan later. If `config.tracking.enabled` is false,
    nothing is done.
    """
    _set_status(config, record.RUNNING, what="plan")


def finish_sweep(config: Config, status: str) -> None:
    """Set the final status of the sweep's run in MLflow, and send the mean accuracies over seeds.

    `config` is a configuration that `register` returned for a job of the sweep. `status` is one of
    FINISHED, FAILED and KILLED. If the delivery fails, a warning is logged, and `sync_sweep` can
    deliver the status later. If `config.tracking.enabled` is false, nothing is done.
    """
    _set_status(config, status, what="outcome")


def _set_status(config: Config, status: str, what: str) -> None:
    """Write the sweep's status to its folder, then try to deliver the status and plan to MLflow.

    `what` names the delivered part in the warning that is logged if the delivery fails.
    """
    if not config.tracking.enabled:
        return
    folder = sweep_folder(config)
    try:
        with FileLock(folder / MIRROR_LOCK):
            delivery = _read_delivery(folder, config) | {"status": status}
            record.write_mirror(folder, delivery)
        # The launching process waits here, so check first: the check takes bounded time.
        tracking_uri.check_answers(str(config.tracking.uri))
        sync_sweep(folder)
    except Exception as error:  # a server may be unreachable, or accept metrics but no files
        log.warning(
            "MLflow at %s did not accept the sweep's %s: %s; "
            "deliver it later with: python -m sddlskd.tracking sync %s",
            config.tracking.uri,
            what,
            first_line(error),
            shlex.quote(str(folder)),
        )


def sweep_folder(config: Config) -> Path:
    """Return the folder of a job's sweep: <home>/runs/sweeps/<name of the sweep>.

    The folder need not exist. `config.sweep.name` must be set.
    """
    return Path(config.home, "runs", "sweeps", str(config.sweep.name))


def _read_delivery(folder: Path, config: Config) -> dict[str, Any]:
    """Return the content of the sweep's mlflow.json, brought up to the configuration.

    The file holds the parent run's id, the values that MLflow should have, and those that MLflow
    already has. If the file is damaged, or is about another MLflow address, experiment, home or
    parent run, nothing counts as delivered.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        delivery = record.read_mirror(folder)
    except record.Damaged:
        delivery = {}
    address = {
        "uri": config.tracking.uri,
        "experiment": config.tracking.experiment,
        "home": config.home,
    }
    if any(delivery.get(key) != value for key, value in address.items()):
        delivery = {}
    parent = config.tracking.parent_run_id or delivery.get("run_id")
    if parent != delivery.get("run_id"):
        delivery = {}
    return {
        "status": record.RUNNING,
        **delivery,
        **address,
        "sweep": config.sweep.name,
        "run_id": parent,
    }


def sync_sweep(folder: Path, *, again: bool = False) -> None:
    """Update MLflow from a sweep's folder: the sweep's run, its status, its plan and its means.

    The plan is the list of the sweep's jobs. The means are the accuracies averaged over seeds
    (`send_cells`), and are sent once the sweep has ended. The function can be called any number of
    times, and sends only what MLflow lacks. If the folder has no mlflow.json, nothing is done.
    Errors of MLflow propagate.

    Args:
        folder: The sweep's folder, <home>/runs/sweeps/<name>.
        again: Whether to deliver everything again, including what was delivered before.

    Raises:
        Deleted: If the sweep's run or its experiment was deleted in MLflow, or MLflow does not know
            the run any more. With `again`, a deleted or unknown run is no error.
        Damaged: If mlflow.json is damaged.
    """
    with FileLock(folder / MIRROR_LOCK):
        delivery = record.read_mirror(folder)
        if not delivery:
            return
        if again:
            kept = ("uri", "experiment", "home", "sweep", "status")
            delivery = {key: delivery[key] for key in kept} | {"run_id": None}
        uri = str(delivery["uri"])
        if delivery["run_id"]:
            tracking_uri.refuse_deleted(uri, delivery["run_id"], folder)
        client = tracking_uri.client(uri)
        plan = folder / "plan.json"
        delivery["run_id"] = _run_of_sweep(folder, delivery)
        if delivery["status"] != delivery.get("told"):
            if delivery["status"] == record.RUNNING:
                client.update_run(delivery["run_id"], delivery["status"])
            else:
                client.set_terminated(delivery["run_id"], delivery["status"])
            delivery["told"] = delivery["status"]
            record.write_mirror(folder, delivery)
        digest = hashlib.sha256(plan.read_bytes()).hexdigest() if plan.exists() else None
        # The plan comes last because a server may accept metrics but no files.
        if digest != delivery.get("plan"):
            client.log_artifact(delivery["run_id"], str(plan))
            delivery["plan"] = digest
            record.write_mirror(folder, delivery)
        if delivery["status"] != record.RUNNING:
            # A job of the sweep may have run again since, by itself or in another launch.
            cells = json.dumps(sorted(cells_of(folder).items()), sort_keys=True)
            cells_digest = hashlib.sha256(cells.encode()).hexdigest()
            if cells_digest != delivery.get("cells"):
                send_cells(folder, delivery)
                record.write_mirror(folder, {**delivery, "cells": cells_digest})


def _run_of_sweep(folder: Path, delivery: dict[str, Any]) -> str:
    """Return the id of the sweep's parent run, creating the run if missing.

    The caller must hold the sweep's lock. `delivery` is the content of mlflow.json, and is changed
    if the run is created.
    """
    if not delivery["run_id"]:
        tracking = TrackingConfig(uri=delivery["uri"], experiment=delivery["experiment"])
        _, delivery["run_id"] = experiment_and_parent(
            Config(tracking=tracking, home=delivery["home"]), delivery["sweep"]
        )
        delivery["told"] = record.RUNNING
        record.write_mirror(folder, delivery)
    run_id: str = delivery["run_id"]
    return run_id


def parent_of(config: Config) -> str | None:
    """Return the id of the MLflow run of a job's sweep, or None if no sweep planned the job.

    The configuration holds the id unless MLflow was unreachable when the sweep was launched. In
    that case, the sweep's run is created if it is missing. Errors of MLflow propagate.
    """
    folder = sweep_folder(config)
    if config.tracking.parent_run_id or not is_planned(folder, config):
        return config.tracking.parent_run_id
    with FileLock(folder / MIRROR_LOCK):
        return _run_of_sweep(folder, _read_delivery(folder, config))


def is_planned(folder: Path, config: Config) -> bool:
    """Return whether plan.json in a sweep's folder lists the job `config`; False without that file.

    Raises:
        ValueError: If plan.json is not JSON.
    """
    path = folder / "plan.json"
    return path.exists() and any(
        job["run_dir"] == config.run_dir for job in json.loads(path.read_text())["jobs"]
    )
