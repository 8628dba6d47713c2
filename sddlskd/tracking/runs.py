"""Deliver a run directory to MLflow: its run, parameters, metrics and outcome.

The run directory is the record, and MLflow holds a copy. `sync` sends what MLflow lacks, so it can
be called any number of times.
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
from sddlskd.tracking.sweeps import MIRROR_LOCK, experiment_and_parent, parent_of, search_runs
from sddlskd.tracking.uri import (
    Deleted,
    first_line,
    refuse_deleted,
    refuse_deleted_experiment,
    root_of,
)

__all__ = ["supersede", "sync"]

log = logging.getLogger(__name__)


# MLflow's limits
LONGEST_PARAM = 6000  # characters of the value of a parameter
LONGEST_KEY = 250  # characters of the name of a parameter
LONGEST_TAG = 8000  # characters of the value of a tag
PARAMS_A_BATCH = 100  # parameters per request
METRICS_A_BATCH = 1000  # metric values per request
CUT = " ... (cut)"
SUMMARY = {
    **{f"{name}/top1": f"{name}_top1" for name in ("best", "last", "test", "teacher")},
    **{f"student/{name}": name for name in ("parameters", "flops")},
    # Of images with several labels.
    **{f"{name}/mAP": f"{name}_mAP" for name in ("best", "last", "test")},
}
FINAL_TAGS = ("teacher_sha256", "environment", "group_size", "requeues")
SUPERSEDED = ".superseded"  # a file that marks a record as replaced
# MLflow's status for each outcome. MLflow has none for a run that halving dropped: the tag
# status_reason of such a run begins with PRUNED.
OUTCOMES = {
    record.FINISHED: "FINISHED",
    record.FAILED: "FAILED",
    record.KILLED: "KILLED",
    record.PRUNED: "KILLED",
}


def _cut(value: Any, limit: int) -> str:
    text = str(value)
    return text if len(text) <= limit else text[: limit - len(CUT)] + CUT


def supersede(folder: Path) -> None:
    """Tag the MLflow run of a run directory as superseded, because another run replaces it.

    `folder` is the run directory, the existing folder of one training run. Readers of MLflow should
    not count a run with this tag. A marker file in `folder` records that the run is superseded. If
    the run is not in MLflow yet, no tag is set. If MLflow cannot be told, a warning is logged. In
    both cases, the next `sync` of the directory sets the tag.
    """
    (folder / SUPERSEDED).touch()
    try:
        delivery = record.read_mirror(folder)
        if "run_id" in delivery:
            client = tracking_uri.client(str(delivery["uri"]))
            client.set_tag(delivery["run_id"], "superseded", "true")
    except Exception as error:
        log.warning("MLflow was not told that %s is superseded: %s", folder, first_line(error))


class StillUnreachable(ConnectionError):
    """Error of `sync` if MLflow was unreachable when the run was launched, and still is.

    The launch has already logged a warning.
    """


def sync(folder: Path, *, again: bool = False) -> None:
    """Update MLflow from a run directory: the run, its parameters, all new metrics and its outcome.

    The function can be called any number of times, and sends only what MLflow lacks. A run whose
    process ended without writing an outcome gets the status KILLED. If the run has not started yet,
    nothing is done. Errors of MLflow propagate.

    Args:
        folder: The run directory, that is, the folder of one training run.
        again: Whether to deliver everything again, including what was delivered before; for example
            to a server that was restored from a backup.

    Raises:
        Deleted: If the run or its experiment was deleted in MLflow, or MLflow does not know the run
            any more. With `again`, or if the run is superseded (a later run replaces it), a deleted
            or unknown run is no error.
        StillUnreachable: If `tracking.offline` is set, MLflow was unreachable at launch, and still
            is.
        Damaged: If the result or the metrics in the run directory are damaged.
        ValueError: If the config.yaml of the run directory is damaged.
    """
    folder = folder.absolute()  # MLflow records the absolute path
    with FileLock(folder / MIRROR_LOCK):
        # The rows are read after the result, so that no outcome is delivered without its last rows.
        result = result_of(folder)
        if not result:
            return
        status = result["status"]
        config = cfg.load(folder / "config.yaml")
        # The id is None if the job was launched without tracking or while MLflow was unreachable.
        if config.tracking.experiment_id is None:
            try:
                experiment_id, _ = experiment_and_parent(config, None)
            except ValueError:
                raise
            except Exception as error:
                if not config.tracking.offline:
                    raise
                raise StillUnreachable(root_of(error)) from error
            config = _in_experiment(config, experiment_id)
        uri = str(config.tracking.uri)
        client = tracking_uri.client(uri)
        delivery = _read_delivery(client, folder, config)
        superseded = (folder / SUPERSEDED).exists()
        if again:
            config = _in_experiment(config, _experiment_of_delivered(client, config, delivery))
            delivery = {key: delivery[key] for key in ("key", "uri") if key in delivery}
        elif "run_id" in delivery:
            try:
                refuse_deleted(uri, delivery["run_id"], folder)
            except Deleted:
                if superseded:  # nobody misses a run that another one has replaced
                    return
                raise
        if "run_id" not in delivery:
            delivery = _create_run(client, folder, config, delivery)
        run_id = delivery["run_id"]
        if superseded:
            client.set_tag(run_id, "superseded", "true")
        rows = record.read_rows(folder)
        sent = delivery["rows"] if delivery["rows"] <= len(rows) else 0
        if len(rows) > sent:
            _send_rows(client, run_id, rows[sent:])
            delivery["rows"] = len(rows)
            record.write_mirror(folder, delivery)
        if status != delivery["status"]:
            _send_outcome(client, run_id, folder, status, result, rows)
            _delete_twins(client, config, delivery)
            record.write_mirror(folder, {**delivery, "status": status})


def result_of(folder: Path) -> dict[str, Any]:
    """Return the result of a run, as its copies in MLflow and elsewhere show it.

    The result is the content of the result.json in the run directory `folder`; {} if the run has
    not started. The status is KILLED if the process of the run has ended without writing an
    outcome. Raise Damaged if result.json is damaged.
    """
    # Check the process first: otherwise a run that finishes in between would count as KILLED.
    abandoned = record.abandoned(folder)
    result = record.read_result(folder)
    if result and result["status"] == record.RUNNING and abandoned:
        reason = "the process ended without writing a result"
        return {**result, "status": record.KILLED, "reason": reason}
    return result


def params_of(config: Config) -> dict[str, Any]:
    """Return the parameters that the copies of a run have, in MLflow and elsewhere.

    They are the flattened configuration with dotted keys, such as "optimizer.lr", and "method", the
    name of the method in tables.
    """
    return {**cfg.flatten(config), "method": cfg.method_name(config)}


def tags_of(folder: Path, config: Config) -> dict[str, str]:
    """Return the tags that the copies of a run have from its start, in MLflow and elsewhere.

    They are "kind" (always "job"), "config_hash", "settings_hash", "git_sha" (of the code), "sweep"
    (name of the run's sweep or "") and "run_dir". If the run has a recipe, there is "recipe". If it
    names code of the user, there is "own_code": each module with the first eight digits of the
    SHA-256 of its file, such as "my_losses:1f0c2a9b". `folder` is the run directory, and `config`
    the configuration of the run. Raise FileNotFoundError if the directory has no code.json.
    """
    code = json.loads((folder / "code.json").read_text())
    tags = {
        "kind": "job",
        "config_hash": cfg.config_hash(config),
        "settings_hash": cfg.settings_hash(config),
        "git_sha": code["git_sha"],
        "sweep": config.sweep.name or "",
        "run_dir": str(folder),
    }
    if config.recipe:
        tags["recipe"] = config.recipe
    if own_code := code.get("own_code"):
        tags["own_code"] = record.code_versions(own_code)
    return tags


def final_tags_of(result: dict[str, Any]) -> dict[str, str]:
    """Return the tags that the copies of a run get when it ends, in addition to those of `tags_of`.

    `result` is the content of the run's result.json. The tags are:

    - "status_reason": why the run ended, or "" if `result` has no reason. For a run that halving
      dropped, the text begins with "PRUNED: ".
    - "teacher_sha256", "environment", "group_size" and "requeues" (`FINAL_TAGS`): the entries of
      these names in `result`, as text. An entry that is missing, 0 or "" gives no tag.
    """
    given = {tag: str(result[tag]) for tag in FINAL_TAGS if result.get(tag)}
    reason = str(result.get("reason", ""))
    if result.get("status") == record.PRUNED:
        reason = f"{record.PRUNED}: {reason}"
    return {"status_reason": reason, **given}


def summary_of(result: dict[str, Any]) -> dict[str, float]:
    """Return the final metrics of a run that has ended, such as {"best/top1": 76.3} (%).

    `result` is the content of the run's result.json. `SUMMARY` maps the name of a metric to its
    entry in `result`; an entry that is missing or None gives no metric. With several teachers,
    "teacher/top1/<name>" is the top-1 (%) of each.
    """
    summary = {key: result[name] for key, name in SUMMARY.items() if result.get(name) is not None}
    for name, top1 in result.get("teacher_top1_each", {}).items():
        summary[f"teacher/top1/{name}"] = top1
    return summary


def _in_experiment(config: Config, experiment_id: str) -> Config:
    return replace(config, tracking=replace(config.tracking, experiment_id=experiment_id))


def _experiment_of_delivered(client: Any, config: Config, delivery: dict[str, Any]) -> str:
    """Return the id of the experiment to deliver a run to again; create the experiment if missing.

    If MLflow does not know the run any more, its database may be a new one, in which the old id may
    be that of another experiment. The experiment is then found by its name. Raise Deleted if the
    experiment was deleted in MLflow.
    """
    uri = str(config.tracking.uri)
    run = tracking_uri.find_run(uri, delivery["run_id"]) if "run_id" in delivery else None
    if run is None:
        experiment_id, _ = experiment_and_parent(config, None)
        return experiment_id
    experiment = client.get_experiment(run.info.experiment_id)
    refuse_deleted_experiment(uri, experiment)
    return str(experiment.experiment_id)


def _read_delivery(client: Any, folder: Path, config: Config) -> dict[str, Any]:
    """Return what MLflow already has of a run directory, as the directory's mlflow.json says.

    If that file is damaged, search MLflow for a run with the same configuration hash and run
    directory. The result is {} if nothing was delivered to the present address.
    """
    try:
        delivery = record.read_mirror(folder)
        expected = {"key", "run_id", "rows", "status"} if "run_id" in delivery else {"key"}
        if delivery and not expected <= delivery.keys():
            raise record.Damaged(f"{folder / 'mlflow.json'} is damaged ({', '.join(delivery)})")
    except record.Damaged as error:
        runs = client.search_runs(
            [config.tracking.experiment_id],
            f"tags.config_hash = '{cfg.config_hash(config)}' and tags.kind = 'job'",
        )
        keys = [
            run.data.tags["record"] for run in runs if run.data.tags.get("run_dir") == str(folder)
        ]
        if not keys:
            log.warning("%s; MLflow has no run for it", error)
            return {}
        log.warning("%s; its run was found in MLflow", error)
        return {"key": keys[0], "uri": config.tracking.uri}
    if delivery.get("uri", config.tracking.uri) != config.tracking.uri:
        return {}  # the address has changed: deliver the whole run to the new one
    return delivery


def _runs_with_key(client: Any, config: Config, key: str) -> list[Any]:
    return search_runs(client, config.tracking.experiment_id, f"tags.record = '{key}'")


def _delete_twins(client: Any, config: Config, delivery: dict[str, Any]) -> None:
    """Delete all MLflow runs of this record except the one noted in `delivery`.

    A server that was too busy to answer in time may still have created the run, so that the retry
    created a second one.
    """
    for run in _runs_with_key(client, config, delivery["key"]):
        if run.info.run_id != delivery["run_id"]:
            client.delete_run(run.info.run_id)


def _create_run(
    client: Any, folder: Path, config: Config, delivery: dict[str, Any]
) -> dict[str, Any]:
    """Create the MLflow run of this directory, or find it if it exists.

    The record's key is written to disk before the run is created. After a crash in between, the
    next call finds the run by its key and does not create a second one.

    Args:
        client: The MLflow client.
        folder: The run directory.
        config: The configuration of the run.
        delivery: What MLflow already has; without the id of a run.

    Returns:
        The new content of mlflow.json, with the id of the run.
    """
    key = delivery.get("key") or uuid.uuid4().hex
    record.write_mirror(folder, {"key": key, "uri": config.tracking.uri})
    config = replace(config, tracking=replace(config.tracking, parent_run_id=parent_of(config)))
    found = _runs_with_key(client, config, key) if delivery else []
    if found:
        run = found[0]
    else:
        tags = {"record": key, **tags_of(folder, config)}
        if config.tracking.parent_run_id:
            tags["mlflow.parentRunId"] = config.tracking.parent_run_id
        tags = {name: _cut(value, LONGEST_TAG) for name, value in tags.items()}
        name = cfg.title(config)
        run = client.create_run(config.tracking.experiment_id, run_name=name, tags=tags)
    run_id = run.info.run_id
    sent = run.data.params  # empty for a new run
    from mlflow.entities import Param

    # Send no parameter twice: MLflow refuses a changed value, and some values may change between
    # two starts of a job, such as the folder or the device.
    known = params_of(config)
    params = [
        Param(_cut(name, LONGEST_KEY), _cut(value, LONGEST_PARAM))
        for name, value in known.items()
        if _cut(name, LONGEST_KEY) not in sent
    ]
    for at in range(0, len(params), PARAMS_A_BATCH):
        client.log_batch(run_id, params=params[at : at + PARAMS_A_BATCH])
    delivery = {
        "key": key,
        "uri": config.tracking.uri,
        "run_id": run_id,
        "rows": 0,
        "status": record.RUNNING,
    }
    record.write_mirror(folder, delivery)
    return delivery


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


def _has_steps(client: Any, run_id: str) -> bool:
    """Return whether the final metrics of a run have the step of an epoch, as they once had.

    Those of a new run have step 0, so that MLflow shows them as numbers and not as curves of one
    point. MLflow takes the point of the last step for the value of a metric.
    """
    history = [point for key in SUMMARY for point in client.get_metric_history(run_id, key)]
    return any(point.step for point in history)


def _send_outcome(
    client: Any,
    run_id: str,
    folder: Path,
    status: str,
    result: dict[str, Any],
    rows: Sequence[dict[str, Any]],
) -> None:
    """Send the status of a run; if the run has ended, also its final metrics and its files.

    `rows` are the metrics of each epoch, and `result` is the content of result.json.
    """
    # A run that was registered before it began may have begun with a newer version.
    if own_code := record.read_json(folder / "code.json").get("own_code"):
        client.set_tag(run_id, "own_code", _cut(record.code_versions(own_code), LONGEST_TAG))
    if status not in OUTCOMES:  # the run was resumed, so the old reason no longer applies
        client.set_tag(run_id, "status_reason", "")
        client.update_run(run_id, status)
        return
    for tag, value in final_tags_of(result).items():
        client.set_tag(run_id, tag, _cut(value, LONGEST_TAG))
    summary = summary_of(result)
    stepped = _has_steps(client, run_id)
    for row in rows:
        # Use the epoch's own time, because a run may stop at the same epoch twice.
        if row["epoch"] == result.get("epochs"):
            step = row["epoch"] if stepped else 0
            _send_rows(client, run_id, [{**summary, "epoch": step, "time": row["time"]}])
    client.set_terminated(run_id, OUTCOMES[status])
    # The files come last because a server may accept metrics but no files.
    for name in ("config.yaml", "code.diff", "result.json", "predictions.npz"):
        if (folder / name).exists():
            client.log_artifact(run_id, str(folder / name))
