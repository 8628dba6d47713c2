"""Test the mirror in MLflow: complete, without duplicates, and never delaying a training."""

import json
import logging
import math
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
import pytest

from analysis.__main__ import main as analyse
from analysis.runs import load
from sddlskd import config as cfg
from sddlskd import record, tracking
from sddlskd.config import Config
from sddlskd.record import FAILED, FINISHED, RUNNING, Record
from sddlskd.sweeps.manifest import write_manifest, write_plan
from sddlskd.tracking import __main__ as sync_command
from sddlskd.tracking import cells
from sddlskd.tracking import mirror as mirror_module
from sddlskd.tracking import runs as tracking_runs
from sddlskd.tracking import uri as tracking_uri
from sddlskd.tracking.mirror import Mirror
from sddlskd.tracking.runs import CUT, sync
from sddlskd.tracking.sweeps import register, sync_sweep
from sddlskd.training.fit import fit
from sddlskd.training.run import Run
from tests.loopback import answer, site
from tests.loopback import status as code
from tests.tiny import BASE, CONF, DIVERGES, net, processes, tiny

METRICS = {
    *(
        "train/loss",
        "train/loss_ce",
        "train/loss_kd",
        "train/top1",
        "val/top1",
        "val/top5",
        "val/loss",
        "lr",
    ),
    *("time/epoch_s", "time/images_per_s"),
}
FINAL = {"best/top1", "last/top1", "teacher/top1", "student/parameters", "student/flops"}


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an empty database of MLflow, created once because that takes seconds."""
    home = tmp_path_factory.mktemp("database")
    register([tiny(home, "tracking=mlflow", "tracking.experiment=other", teacher=False)])
    return home / "mlflow.db"


@pytest.fixture
def home(tmp_path: Path, empty_database: Path) -> Path:
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return tmp_path


def tracked(home: Path, *overrides: str, **options: Any) -> Config:
    return tiny(home, "tracking=mlflow", *overrides, **options)


def client_of(job: Config) -> Any:
    return tracking_uri.client(str(job.tracking.uri))


def runs_of(job: Config, kind: str = "job") -> list[Any]:
    client = client_of(job)
    experiment = client.get_experiment_by_name(job.tracking.experiment)
    runs: list[Any] = client.search_runs([experiment.experiment_id], f"tags.kind = '{kind}'")
    return runs


def points(job: Config, run_id: str) -> dict[str, list[tuple[int, float]]]:
    """Return {metric: [(step, value), ...]} of a run in MLflow."""
    client = client_of(job)
    keys = client.get_run(run_id).data.metrics
    return {
        key: [(p.step, p.value) for p in client.get_metric_history(run_id, key)] for key in keys
    }


def write_record(job: Config, epochs: int = 3, status: str = FINISHED, reason: str = "") -> Path:
    """Write a run directory as a training does, and return it."""
    opened = Record(job)
    for epoch in range(1, epochs + 1):
        opened.append(
            {
                "epoch": epoch,
                "time": 1000.0 + epoch,
                "val/top1": 10.0 * epoch,
                "train/loss": 1 / epoch,
            }
        )
    opened.result(
        status, reason, best_top1=10.0 * epochs, last_top1=10.0 * epochs, epochs=epochs, seconds=1.0
    )
    opened.close()
    return opened.folder


# The contract


def test_contract(home: Path) -> None:
    job = tracked(home, "M=[1,2]", "sweep.name=table-1", "student=wrn_16_1")
    (result,) = fit([job])
    (run,) = runs_of(job)
    assert run.info.run_id == result["run_id"]
    assert json.loads(Path(job.run_dir, "result.json").read_text())["run_id"] == result["run_id"]
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "SD-KD+LS [1,2] seed 0, wrn_16_1"
    params = run.data.params
    expected = {
        "teacher.name": "resnet8",
        "student.name": "wrn_16_1",
        "distiller.name": "kd",
        "M": "[1,2]",
        "standardize": "True",
        "complementary_weight": "2.0",
        "dataset.name": "fake",
        "seed": "0",
    }
    assert expected.items() <= params.items()
    assert params.keys() == cfg.flatten(job).keys() | {"method"}
    assert params["method"] == "SD-KD+LS"
    tags = run.data.tags
    assert tags["config_hash"] == cfg.config_hash(job)
    assert tags["git_sha"] == record.code_state()["git_sha"]
    assert tags["sweep"] == "table-1"
    assert tags["status_reason"] == ""
    assert tags["teacher_sha256"] == result["teacher_sha256"]
    assert tags["settings_hash"] == cfg.settings_hash(
        tracked(home, "M=[1,2]", "student=wrn_16_1", "seed=7")
    )
    assert tags["settings_hash"] != cfg.settings_hash(tracked(home, "M=[1,4]", "student=wrn_16_1"))
    assert tags["group_size"] == "1"
    assert re.match(
        r"sddlskd [\d.]+, torch \S+, Python [\d.]+, \w+ \w+, cpu, 1 threads$", tags["environment"]
    )
    history = points(job, run.info.run_id)
    assert history.keys() == METRICS | FINAL
    rows = record.read_rows(Path(job.run_dir))
    for key in METRICS:
        assert history[key] == [(row["epoch"], row[key]) for row in rows]
    assert history["best/top1"] == [(0, result["best_top1"])]
    assert history["last/top1"] == [(0, result["last_top1"])]
    assert history["teacher/top1"] == [(0, result["teacher_top1"])]
    artifacts = {file.path for file in client_of(job).list_artifacts(run.info.run_id)}
    assert {"config.yaml", "result.json"} <= artifacts


def test_held_out_images_and_predictions_reach_mlflow(home: Path) -> None:
    job = tracked(
        home, "dataset.val_fraction=0.25", "tracking.predictions=true", "trainer.epochs=1"
    )
    (result,) = fit([job])
    (run,) = runs_of(job)
    assert run.data.metrics["test/top1"] == result["test_top1"]
    assert "predictions.npz" in {
        file.path for file in client_of(job).list_artifacts(run.info.run_id)
    }


def test_sync_is_idempotent(home: Path) -> None:
    (job,) = register([tracked(home, teacher=False)])
    folder = write_record(job)
    counts = []
    for _ in range(3):
        sync(folder)
        (run,) = runs_of(job)
        counts.append({key: len(found) for key, found in points(job, run.info.run_id).items()})
    # The note of what was delivered is lost.
    (folder / "mlflow.json").write_text(json.dumps({"key": run.data.tags["record"]}))
    sync(folder)
    (run,) = runs_of(job)
    counts.append({key: len(found) for key, found in points(job, run.info.run_id).items()})
    assert counts == [{"val/top1": 3, "train/loss": 3, "best/top1": 1, "last/top1": 1}] * 4


def test_what_a_server_lost_is_delivered_again(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = register(
        [tracked(home, f"seed={seed}", teacher=False) for seed in (0, 1)], sweep="table-1"
    )
    sweep_folder = Path(jobs[0].home, "runs/sweeps/table-1")
    write_manifest(sweep_folder, "table-1", jobs)
    write_plan(sweep_folder, "table-1", jobs)
    tracking.log_plan(jobs[0])
    sync(write_record(jobs[0]))
    with closing(sqlite3.connect(home / "mlflow.db")) as database:
        for table in ("metrics", "latest_metrics"):
            assert database.execute(f"delete from {table}").rowcount > 0
        database.commit()
    for _ in range(2):
        sync_command.main(["sync", "--again", str(home / "runs")])
    (run,), (parent,) = runs_of(jobs[0]), runs_of(jobs[0], kind="sweep")
    assert {key: len(found) for key, found in points(jobs[0], run.info.run_id).items()} == {
        "val/top1": 3, "train/loss": 3, "best/top1": 1, "last/top1": 1
    }  # fmt: skip
    assert [file.path for file in client_of(jobs[0]).list_artifacts(parent.info.run_id)] == [
        "plan.json"
    ]


def problems_of_sync(folder: Path, *options: str) -> list[str]:
    """Return the errors that `sync` ends with."""
    with pytest.raises(SystemExit) as caught:
        sync_command.main(["sync", *options, str(folder)])
    return str(caught.value).splitlines()


def restore(cure: str) -> None:
    """Run the command of MLflow that a message names."""
    found = re.search("restore .*with: (MLFLOW_TRACKING_URI=.*?-id [0-9a-f]+)", cure)
    assert found, cure
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(found[1], shell=True, check=True, capture_output=True, env=environment)


@pytest.mark.parametrize("again", [False, True])
def test_a_run_that_was_deleted_in_mlflow_is_named_and_comes_back(
    home: Path, capsys: pytest.CaptureFixture[str], again: bool
) -> None:
    jobs = register([tracked(home, f"seed={seed}", teacher=False) for seed in (0, 1)])
    folders = [write_record(job) for job in jobs]
    sync_command.main(["sync", str(home / "runs")])
    assert capsys.readouterr().out == "MLflow has 2 runs up to date\n"
    run_id = record.read_mirror(folders[0])["run_id"]
    client_of(jobs[0]).delete_run(run_id)
    (problem,) = problems_of_sync(home / "runs")
    assert capsys.readouterr().out == "MLflow has 1 run up to date\n"
    assert problem.startswith(f"error: {folders[0]}: its run {run_id} was deleted in MLflow; ")
    assert problem.endswith(f"python -m sddlskd.tracking sync --again {folders[0]}")
    if again:
        sync_command.main(["sync", "--again", str(folders[0])])
        assert run_id not in {run.info.run_id for run in runs_of(jobs[0])}
    else:
        restore(problem)
        assert run_id in {run.info.run_id for run in runs_of(jobs[0])}
    for run in runs_of(jobs[0]):
        assert {key: len(found) for key, found in points(jobs[0], run.info.run_id).items()} == {
            "val/top1": 3, "train/loss": 3, "best/top1": 1, "last/top1": 1
        }  # fmt: skip
    assert len(runs_of(jobs[0])) == 2
    capsys.readouterr()
    sync_command.main(["sync", str(home / "runs")])
    assert capsys.readouterr().out == "MLflow has 2 runs up to date\n"


def test_a_deleted_experiment_is_named_once_for_all_its_runs(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = register([tracked(home, f"seed={seed}", teacher=False) for seed in (0, 1)])
    for job in jobs:
        sync(write_record(job))
    client_of(jobs[0]).delete_experiment(jobs[0].tracking.experiment_id)
    for options in ([], ["--again"]):
        (problem,) = problems_of_sync(home / "runs", *options)
        assert problem.startswith("error: tracking.experiment=sddlskd was deleted in MLflow; ")
    restore(problem)
    assert len(runs_of(jobs[0])) == 2
    capsys.readouterr()
    sync_command.main(["sync", str(home / "runs")])
    assert capsys.readouterr().out == "MLflow has 2 runs up to date\n"


def test_a_deleted_parent_run_of_a_sweep_is_named_and_comes_back(home: Path) -> None:
    jobs = register([tracked(home, teacher=False)], sweep="table-1")
    folder = Path(jobs[0].home, "runs/sweeps/table-1")
    write_manifest(folder, "table-1", jobs)
    write_plan(folder, "table-1", jobs)
    tracking.log_plan(jobs[0])
    (parent,) = runs_of(jobs[0], kind="sweep")
    client_of(jobs[0]).delete_run(parent.info.run_id)
    (problem,) = problems_of_sync(home / "runs")
    assert problem.startswith(f"error: {folder}: its run {parent.info.run_id} was deleted")
    sync_command.main(["sync", "--again", str(home / "runs")])
    (parent,) = runs_of(jobs[0], kind="sweep")
    assert [file.path for file in client_of(jobs[0]).list_artifacts(parent.info.run_id)] == [
        "plan.json"
    ]


def test_runs_of_a_database_that_is_gone_are_delivered_to_a_new_one(
    home: Path, empty_database: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a new database the ids of the experiments are others."""
    jobs = [
        register([tracked(home, f"tracking.experiment={name}", f"seed={seed}", teacher=False)])[0]
        for seed, name in enumerate(("second", "first"))
    ]
    folders = [write_record(job) for job in jobs]
    for folder in folders:
        sync(folder)
    shutil.copy(empty_database, home / "mlflow.db")
    problems = problems_of_sync(home / "runs")
    assert capsys.readouterr().out == "MLflow has 0 runs up to date\n"
    for problem, folder in zip(problems, sorted(folders), strict=True):
        assert problem.startswith(f"error: {folder}: MLflow at sqlite:///{home}/mlflow.db does not")
        assert problem.endswith(
            f"send it anew with: python -m sddlskd.tracking sync --again {folder}"
        )
    for folder in reversed(folders):
        sync_command.main(["sync", "--again", str(folder)])
    for job, folder in zip(jobs, folders, strict=True):
        assert [run.info.run_id for run in runs_of(job)] == [record.read_mirror(folder)["run_id"]]


def test_a_superseded_run_may_be_deleted_in_mlflow(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (job,) = register([tracked(home, teacher=False)])
    folder = write_record(job)
    sync(folder)
    tracking.supersede(folder)
    client_of(job).delete_run(record.read_mirror(folder)["run_id"])
    sync_command.main(["sync", str(folder)])
    assert capsys.readouterr().out == "MLflow has 1 run up to date\n"


def test_resumed_run_stays_one_run(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = tracked(home)
    original = Run.train_step

    def stopping(self: Run, *arguments: Any) -> None:
        original(self, *arguments)
        if (self.epoch, self.step) == (2, 1):
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "train_step", stopping)
        fit([job])
    (run,) = runs_of(job)
    assert (run.info.status, run.data.tags["status_reason"]) == ("KILLED", "stopped by SIGTERM")
    assert [step for step, _ in points(job, run.info.run_id)["val/top1"]] == [1]
    fit([job])
    (again,) = runs_of(job)
    assert again.info.run_id == run.info.run_id
    assert (again.info.status, again.data.tags["status_reason"]) == ("FINISHED", "")
    assert [step for step, _ in points(job, run.info.run_id)["val/top1"]] == [1, 2]
    assert again.data.metrics["last/top1"] == record.read_result(Path(job.run_dir))["last_top1"]


def test_a_resumed_run_has_no_reason_left(home: Path) -> None:
    (job,) = register([tracked(home, teacher=False)])
    opened = Record(job)
    for status, reason in ((RUNNING, ""), (record.KILLED, "stopped by SIGINT"), (RUNNING, "")):
        opened.result(status, reason, epochs=0)
        sync(opened.folder)
    opened.close()
    (run,) = runs_of(job)
    assert (run.info.status, run.data.tags["status_reason"]) == ("RUNNING", "")


def test_a_dropped_run_is_killed_with_its_reason(home: Path) -> None:
    (job,) = register([tracked(home, teacher=False)])
    folder = write_record(job, epochs=1, status=record.PRUNED, reason="rank 2 of 2 at epoch 1")
    sync(folder)
    (run,) = runs_of(job)
    assert run.info.status == "KILLED"
    assert run.data.tags["status_reason"] == "PRUNED: rank 2 of 2 at epoch 1"


def test_failed_run(home: Path) -> None:
    job = tracked(home, DIVERGES)
    fit([job])
    (run,) = runs_of(job)
    assert run.info.status == "FAILED"
    assert run.data.tags["status_reason"].startswith(
        "NonFiniteLoss: loss became nan at epoch 1, step 2"
    )
    assert "best/top1" not in run.data.metrics


def test_job_that_cannot_start_is_failed_in_mlflow_too(home: Path) -> None:
    (job,) = register(
        [tracked(home, "teacher=resnet14", "teacher.train_if_missing=false")], sweep="table-1"
    )
    record.freeze(job)
    with pytest.raises(FileNotFoundError):
        fit([job])
    (run,) = runs_of(job)
    assert run.info.status == "FAILED"
    assert "teacher=resnet14 for fake is missing" in run.data.tags["status_reason"]


def test_process_that_died_is_killed_and_one_not_started_is_left_out(home: Path) -> None:
    died, queued = register([tracked(home, f"seed={seed}", teacher=False) for seed in (0, 1)])
    folder = write_record(died, epochs=1, status=RUNNING)
    record.freeze(queued)
    sync(Path(queued.run_dir))
    sync(folder)
    (run,) = runs_of(died)
    assert run.data.params["seed"] == "0"
    assert (run.info.status, run.data.tags["status_reason"]) == (
        "KILLED",
        "the process ended without writing a result",
    )
    opened = Record(died)  # the run is resumed
    opened.result(RUNNING, best_top1=10.0, last_top1=10.0, epochs=1, seconds=1.0)
    sync(folder)
    assert runs_of(died)[0].info.status == "RUNNING"
    opened.close()


def test_a_record_that_was_set_aside_before_it_was_delivered_is_superseded(home: Path) -> None:
    (job,) = register([tracked(home)])
    folder = write_record(job, epochs=1)
    tracking.supersede(folder)  # MLflow does not have the run yet
    folder = folder.rename(folder.with_name(f"{folder.name}.before"))
    sync(write_record(job, epochs=2))
    sync(folder)
    found = {run.data.metrics["best/top1"]: run.data.tags.get("superseded") for run in runs_of(job)}
    assert found == {10.0: "true", 20.0: None}


def test_long_values_are_cut_with_a_mark(home: Path) -> None:
    job = tracked(home, teacher=False)
    job.student.model = {"_target_": "x", "long": "y" * 9000}
    (job,) = register([job])
    folder = write_record(job, status=FAILED, reason="why " * 5000)
    sync(folder)
    (run,) = runs_of(job)
    value, reason = run.data.params["student.model"], run.data.tags["status_reason"]
    assert len(value) == 6000
    assert value.endswith(CUT)
    assert value.startswith('{"_target_":"x","long":"yyy')
    assert len(reason) == 8000
    assert reason.endswith(CUT)


def test_more_rows_and_parameters_than_a_batch_takes(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking_runs, "METRICS_A_BATCH", 7)
    monkeypatch.setattr(tracking_runs, "PARAMS_A_BATCH", 9)
    (job,) = register([tracked(home, teacher=False)])
    sync(write_record(job, epochs=30))
    (run,) = runs_of(job)
    assert [step for step, _ in points(job, run.info.run_id)["val/top1"]] == list(range(1, 31))
    assert run.data.params.keys() == cfg.flatten(job).keys() | {"method"}


def test_final_metrics_are_numbers_and_not_curves_of_one_point(home: Path) -> None:
    (job,) = register([tracked(home, teacher=False)])
    sync(write_record(job, epochs=3))
    (run,) = runs_of(job)
    found = points(job, run.info.run_id)
    assert (found["best/top1"], found["last/top1"]) == ([(0, 30.0)], [(0, 30.0)])
    assert [step for step, _ in found["val/top1"]] == [1, 2, 3]


def test_a_run_whose_final_metrics_have_steps_keeps_them(home: Path) -> None:
    """An earlier version stopped the run: its point of a later step would hide one of step 0."""
    (job,) = register([tracked(home, teacher=False)])
    folder = write_record(job, epochs=2, status="KILLED")
    sync(folder)
    (run,) = runs_of(job)
    client_of(job).log_metric(run.info.run_id, "best/top1", 20.0, step=2)
    write_record(job, epochs=5)
    sync(folder, again=False)
    (run,) = runs_of(job)
    assert run.data.metrics["best/top1"] == 50.0


# Sweeps


def finished_sweep(home: Path, seeds: Sequence[int]) -> list[Config]:
    """Finish a sweep of kd over seeds; the best accuracy of a seed is 70 plus the seed."""
    jobs = register(
        [tracked(home, "recipe=kd", f"seed={seed}", teacher=False) for seed in seeds], sweep="cells"
    )
    folder = home / "runs" / "sweeps" / "cells"
    write_plan(folder, "cells", jobs)
    tracking.log_plan(jobs[0])
    for job in jobs:
        with_best = Record(job)
        with_best.append({"epoch": 1, "time": 1.0, "val/top1": 70.0 + job.seed})
        with_best.result(FINISHED, best_top1=70.0 + job.seed, last_top1=69.0, epochs=1, seconds=1.0)
        with_best.close()
        sync(with_best.folder)
    tracking.finish_sweep(jobs[0], "FINISHED")
    return jobs


def test_a_cell_of_several_labels_has_their_map() -> None:
    numbers = dict(cells._numbers([{"best_mAP": 40.0}, {"best_mAP": 42.0}]))
    assert numbers["best/mAP/mean"] == 41.0


def test_a_cell_has_mean_and_deviation_over_seeds(home: Path) -> None:
    jobs = finished_sweep(home, [0, 1, 2])
    (cell,) = runs_of(jobs[0], kind="cell")
    (parent,) = runs_of(jobs[0], kind="sweep")
    assert cell.data.metrics == {
        "seeds": 3.0,
        "best/top1/mean": 71.0,
        "best/top1/std": 1.0,
        "last/top1/mean": 69.0,
        "last/top1/std": 0.0,
    }
    assert cell.info.run_name == "mean: KD, resnet8"
    assert cell.info.status == "FINISHED"
    assert cell.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert cell.data.tags["mlflow.note.content"] == "best top-1 71.00 ± 1.00 (%, 3 seeds)"
    assert cell.data.params["method"] == "KD"


def test_a_cell_follows_later_seeds_and_is_there_once(home: Path) -> None:
    finished_sweep(home, [0, 1])
    jobs = finished_sweep(home, [2, 3, 4])
    (cell,) = runs_of(jobs[0], kind="cell")
    assert (cell.data.metrics["seeds"], cell.data.metrics["best/top1/mean"]) == (5.0, 72.0)


def test_a_cell_follows_a_job_that_ran_again_by_itself(home: Path) -> None:
    """A launch that told the outcome first must not keep later seeds out."""
    jobs = finished_sweep(home, [0, 1, 2])
    folder = home / "runs" / "sweeps" / "cells"
    result = Path(jobs[2].run_dir, "result.json")
    result.write_text(json.dumps({**json.loads(result.read_text()), "best_top1": 78.0}))
    sync_sweep(folder)
    (cell,) = runs_of(jobs[0], kind="cell")
    assert cell.data.metrics["best/top1/mean"] == 73.0
    for job in jobs[1:]:
        shutil.rmtree(job.run_dir)
    sync_sweep(folder)
    assert runs_of(jobs[0], kind="cell") == []


def test_versions_of_own_code_are_cells_of_their_own(home: Path) -> None:
    jobs = finished_sweep(home, [0, 1, 2, 3])
    folder = home / "runs" / "sweeps" / "cells"
    for job, sha in zip(jobs, ("a" * 64, "b" * 64, "a" * 64, "b" * 64), strict=True):
        path = Path(job.run_dir, "code.json")
        path.write_text(json.dumps({**json.loads(path.read_text()), "own_code": {"mine": sha}}))
    sync_sweep(folder)
    means = {
        (cell.data.tags["own_code"], cell.info.run_name, cell.data.metrics["best/top1/mean"])
        for cell in runs_of(jobs[0], kind="cell")
    }
    name = "mean: KD, resnet8, own_code=mine:"
    assert means == {
        ("mine:aaaaaaaa", f"{name}aaaaaaaa", 71.0),
        ("mine:bbbbbbbb", f"{name}bbbbbbbb", 72.0),
    }
    sync_sweep(folder)
    assert len(runs_of(jobs[0], kind="cell")) == 2


def test_a_damaged_record_keeps_neither_the_plan_nor_other_cells_back(home: Path) -> None:
    jobs = finished_sweep(home, [0, 1, 2])
    Path(jobs[0].run_dir, "config.yaml").unlink()
    Path(jobs[0].run_dir, "result.json").write_text("{")
    sync_sweep(home / "runs" / "sweeps" / "cells", again=True)
    (cell,) = runs_of(jobs[0], kind="cell")
    assert cell.data.metrics["seeds"] == 2.0


def test_a_single_seed_makes_no_cell(home: Path) -> None:
    assert runs_of(finished_sweep(home, [4])[0], kind="cell") == []


def test_a_new_experiment_opens_in_the_view_for_training(home: Path) -> None:
    (job,) = register([tracked(home, "tracking.experiment=new", teacher=False)])
    experiment = client_of(job).get_experiment_by_name("new")
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"


def test_parent_and_children(home: Path) -> None:
    jobs = register(
        [tracked(home, f"seed={seed}", teacher=False) for seed in (0, 1)], sweep="table-1"
    )
    for job in jobs:
        sync(write_record(job))
    (parent,) = runs_of(jobs[0], kind="sweep")
    children = runs_of(jobs[0])
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    assert {run.data.tags["sweep"] for run in [parent, *children]} == {"table-1"}
    assert parent.info.status == "RUNNING"
    tracking.finish_sweep(jobs[0], "FINISHED")
    again = register([tracked(home, "seed=2", teacher=False)], sweep="table-1")
    # The sweep keeps its run in MLflow.
    assert again[0].tracking.parent_run_id == parent.info.run_id
    (parent,) = runs_of(jobs[0], kind="sweep")
    assert parent.info.status == "RUNNING"


def test_deleted_experiment_is_named(home: Path) -> None:
    (job,) = register([tracked(home, teacher=False)])
    client_of(job).delete_experiment(job.tracking.experiment_id)
    with pytest.raises(
        ValueError, match=r"tracking.experiment=sddlskd was deleted in MLflow; restore it.* with: "
    ):
        register([tracked(home, teacher=False)])


def make_database(path: Path) -> None:
    tracking_uri.client(f"sqlite:///{path}")


@pytest.mark.parametrize("size", [1, 250_000, 700_000])
def test_database_whose_making_was_killed_is_made_anew(tmp_path: Path, size: int) -> None:
    making = processes.Process(target=make_database, args=(tmp_path / "mlflow.db",))
    making.start()
    while not any(path.stat().st_size >= size for path in tmp_path.glob(".mlflow.db.new/*.db")):
        assert making.is_alive()
        time.sleep(0.002)
    making.kill()
    making.join()
    assert making.exitcode == -signal.SIGKILL
    assert list(tmp_path.glob(".mlflow.db.new/*.db"))
    assert not (tmp_path / "mlflow.db").exists()
    register([tracked(tmp_path, teacher=False)])
    assert {path.name for path in tmp_path.glob("*mlflow*")} <= {
        "mlflow.db",
        "mlflow.db.host",
        "mlflow.db.lock",
    }


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("no database" * 100)
    with pytest.raises(
        ConnectionError,
        match=r"tracking.uri=sqlite:.*mlflow.db does not accept runs \(.*\); make it an "
        r"MLflow database that you may write, choose another .*tracking=none",
    ):
        register([tracked(tmp_path, teacher=False)])


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ("ffffffffffff", r"a newer MLflow wrote it; run: pip install --upgrade mlflow"),
        ("451aebb31d03", r"an older MLflow wrote it; copy the file, then run: mlflow db upgrade "),
    ],
)
def test_database_of_another_mlflow_is_named_with_its_cure(
    home: Path, capsys: pytest.CaptureFixture[str], schema: str, says: str
) -> None:
    with closing(sqlite3.connect(home / "mlflow.db")) as database, database:
        database.execute("UPDATE alembic_version SET version_num = ?", [schema])
    for ask in (tracking.check_reachable, register):
        with pytest.raises(ConnectionError, match=rf"mlflow.db has the schema {schema}.*: {says}"):
            ask([tracked(home, teacher=False)])
    # The analysis says the same.
    assert analyse(["--home", str(home)]) == 1
    assert re.search(rf"mlflow.db has the schema {schema}.*: {says}", capsys.readouterr().err)


def test_a_file_that_cannot_be_written_is_named_with_its_cure(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").mkdir()
    for ask in (tracking.check_reachable, register):
        with pytest.raises(
            ConnectionError,
            match=r"mlflow.db cannot be written; make it .* that you may write, choose",
        ) as caught:
            ask([tracked(tmp_path, teacher=False)])
        assert "start it" not in str(caught.value)


NAMES_OF_FOLDERS = [
    "plain",
    "My%20Project",
    "run?1",
    "50%",
    "a b#1&c=d;",
    "é漢'\"`$",
    "..%2f",
    "a\nb",
]


@pytest.mark.parametrize("name", NAMES_OF_FOLDERS)
def test_home_of_every_name_has_its_database_and_nothing_beside_it(
    tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    home = tmp_path / name
    home.mkdir()
    shutil.copy(empty_database, home / "mlflow.db")
    monkeypatch.setenv("SDDLSKD_HOME", str(home))
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        small = [*BASE[:5], "distiller=vanilla", "recipe=vanilla", "student=resnet8"]
        composed = cfg.resolve(hydra.compose("config", overrides=small))
    uri = str(composed.tracking.uri)
    assert cfg.sqlite_file(uri) == home / "mlflow.db"
    (job,) = register([composed])
    folder = write_record(job)
    sync(folder)
    (run,) = runs_of(job)
    assert {file.path for file in client_of(job).list_artifacts(run.info.run_id)} >= {"config.yaml"}
    assert cfg.load(folder / "config.yaml").tracking.uri == uri
    assert analyse(["--home", str(home)]) == 0
    assert list(load("sddlskd", uri).frame["run_id"]) == [run.info.run_id]
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    "uri", ["http://127.0.0.1:9", "http://127.0.0.1:nonsense", "nonsense", "sqlite:////", "null"]
)
def test_address_that_does_not_work_is_named(tmp_path: Path, uri: str) -> None:
    job = tracked(tmp_path / "home", f"tracking.uri={uri}", teacher=False)
    shown = "None" if uri == "null" else uri
    with pytest.raises((ConnectionError, ValueError), match=f"tracking.uri={shown}"):
        tracking.check_reachable([job])
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("options", ["?mode=ro", "/run?1/mlflow.db"])
def test_an_address_with_a_question_mark_is_refused(tmp_path: Path, options: str) -> None:
    with pytest.raises(ValueError, match=r"holds a '\?', .* write %3F in its place") as caught:
        tracked(tmp_path, f"tracking.uri='sqlite:///{tmp_path}{options}'", teacher=False)
    assert "\n" not in str(caught.value)


def test_a_home_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    job = tracked(tmp_path, teacher=False)
    with pytest.raises(ValueError, match=r"home='.*\\udcff' has a name that is not UTF-8; rename"):
        cfg.normalise(replace(job, home=os.fsdecode(b"/a/\xff")))


def test_run_without_tracking_is_delivered_later(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = tiny(home, teacher=False)
    write_record(job)
    sync_command.main(["sync", str(home / "runs")])
    assert capsys.readouterr().out == "MLflow has 1 run up to date\n"
    job = tracked(home, teacher=False)
    (run,) = runs_of(job)
    assert len(points(job, run.info.run_id)["val/top1"]) == 3
    with pytest.raises(SystemExit, match="no run directory in"):
        sync_command.main(["sync", str(home / "nowhere")])


def test_ctrl_c_stops_a_delivery(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(folder: Path, *, again: bool) -> None:
        raise KeyboardInterrupt

    write_record(tracked(home, teacher=False))
    monkeypatch.setattr(sync_command, "sync", interrupted)
    with pytest.raises(SystemExit) as caught:
        sync_command.main(["sync", str(home / "runs")])
    assert caught.value.code == 130
    assert capsys.readouterr().err == "stopped; the same command delivers what is missing\n"


# Crashes and failures


@pytest.mark.parametrize("moment", ["create_run", "log_batch", "set_terminated", "log_artifact"])
def test_a_process_that_dies_during_a_delivery_leaves_one_run_in_mlflow(
    home: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """The process dies after MLflow accepted something and before the record notes this."""
    from mlflow.tracking import MlflowClient

    (job,) = register([tracked(home, teacher=False)])
    folder, original = write_record(job), getattr(MlflowClient, moment)

    def dying(*arguments: Any, **named: Any) -> None:
        original(*arguments, **named)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, moment, dying)
        with pytest.raises(KeyboardInterrupt):
            sync(folder)
    sync(folder)
    (run,) = runs_of(job)
    assert run.info.status == "FINISHED"
    assert {key: len(found) for key, found in points(job, run.info.run_id).items()} == {
        "val/top1": 3,
        "train/loss": 3,
        "best/top1": 1,
        "last/top1": 1,
    }


def failing(times: int, calls: list[Path]) -> Callable[[Path], None]:
    def sync(folder: Path) -> None:
        calls.append(folder)
        if len(calls) <= times:
            raise ConnectionError("gone\nfor lunch")

    return sync


def test_mirror_tries_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[Path] = []
    monkeypatch.setattr(mirror_module, "sync", failing(2, calls))
    with caplog.at_level(logging.WARNING, logger="sddlskd"):
        mirror = Mirror()
        mirror.update(Path("a"))
        mirror.close()
    assert calls == [Path("a")] * 3
    assert [r.getMessage() for r in caplog.records] == [
        "MLflow does not accept metrics (ConnectionError: gone); training continues",
        "MLflow is reachable again; delivering the metrics that it missed",
    ]


def test_mirror_gives_up_at_the_end_and_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(mirror_module, "sync", failing(1000, []))
    mirror = Mirror()
    mirror.update(Path("a"))
    mirror.update(Path("b"))
    with caplog.at_level(logging.WARNING, logger="sddlskd"):
        started = time.monotonic()
        mirror.close(retry=0.5)
    assert time.monotonic() - started < 10
    assert caplog.records[-1].getMessage().endswith("python -m sddlskd.tracking sync a b")


def test_a_delivery_that_hangs_does_not_delay_the_end_of_a_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hangs, ended = threading.Event(), threading.Event()

    def hang(folder: Path) -> None:
        hangs.set()
        assert ended.wait(60)

    monkeypatch.setattr(mirror_module, "sync", hang)
    mirror = Mirror()
    mirror.update(Path("a"))
    assert hangs.wait(60)
    started = time.monotonic()
    with caplog.at_level(logging.WARNING, logger="sddlskd"):
        mirror.close(timeout=0.2)
    assert time.monotonic() - started < 6
    assert caplog.records[-1].getMessage().endswith("python -m sddlskd.tracking sync a")
    ended.set()
    mirror._thread.join()


def deliver(job: Config) -> None:
    cfg.frame()
    mirror = Mirror()
    opened = Record(job)
    for epoch in range(1, 16):
        opened.append({"epoch": epoch, "time": 1000.0 + epoch, "val/top1": float(epoch)})
        opened.result(RUNNING, best_top1=None, last_top1=None, epochs=epoch, seconds=1.0)
        mirror.update(opened.folder)
        time.sleep(0.02)
    opened.result(FINISHED, best_top1=15.0, last_top1=15.0, epochs=15, seconds=1.0)
    mirror.update(opened.folder)
    mirror.close()
    opened.close()


def test_deliveries_of_eight_processes_are_complete(home: Path) -> None:
    jobs = register(
        [tracked(home, f"seed={seed}", teacher=False) for seed in range(8)], sweep="eight"
    )
    started = [processes.Process(target=deliver, args=(job,)) for job in jobs]
    for process in started:
        process.start()
    for process in started:
        process.join()
    assert [process.exitcode for process in started] == [0] * 8
    runs = runs_of(jobs[0])
    assert sorted(run.data.params["seed"] for run in runs) == list("01234567")
    for run in runs:
        assert run.info.status == "FINISHED"
        assert points(jobs[0], run.info.run_id)["val/top1"] == [
            (epoch, float(epoch)) for epoch in range(1, 16)
        ]


def launch(job: Config, queue: Any) -> None:
    cfg.frame()
    (registered,) = register([job])
    queue.put(registered.tracking.experiment_id)


def test_two_launches_on_an_empty_home(tmp_path: Path) -> None:
    queue = processes.SimpleQueue()
    started = [
        processes.Process(target=launch, args=(tracked(tmp_path, teacher=False), queue))
        for _ in range(2)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join()
    assert [process.exitcode for process in started] == [0, 0]
    assert len({queue.get(), queue.get()}) == 1


# A start without MLflow

ASKED = "api/2.0/mlflow/experiments/search?max_results=1"
NOT_MLFLOW = {
    "not MLflow": (
        answer(b"<html>hello", Content_Type="text/html"),
        r"does not answer like an MLflow server \(200 <html>hello\)",
    ),
    "broken": (
        answer(b"no database", 500),
        r"does not answer like an MLflow server \(500 no database\); start it",
    ),
    "unknown": (code(404), r"does not answer like an MLflow server \(404"),
    "host": (
        answer(b"Invalid Host header - x", 403),
        r"--allowed-hosts 127\.0\.0\.1,127\.0\.0\.1:\d+$",
    ),
    "stranger": (
        code(401),
        "requires a login; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
    ),
    "forbidden": (code(403), "denies access to this user; set MLFLOW_TRACKING_USERNAME"),
}


@pytest.mark.parametrize("kind", NOT_MLFLOW)
def test_a_server_that_is_no_usable_mlflow_is_named_with_its_cure(
    tmp_path: Path, kind: str
) -> None:
    page, said = NOT_MLFLOW[kind]
    with site() as here:
        here.page(ASKED, page)
        with pytest.raises(ConnectionError, match=rf"tracking.uri={here.url} .*{said}") as caught:
            tracking.check_reachable([tracked(tmp_path, f"tracking.uri={here.url}", teacher=False)])
    assert "\n" not in str(caught.value)


@pytest.fixture
def silent() -> Iterator[dict[str, str]]:
    """Yield {kind: address} of servers that do not answer, each in another way."""
    with (
        socket.socket() as mute,
        socket.socket() as full,
        socket.socket() as closed,
        ExitStack() as stack,
    ):
        for listener, backlog in ((mute, 5), (full, 0)):
            listener.bind(("127.0.0.1", 0))
            listener.listen(backlog)
        # Fill the queue of connections: further packets are dropped, as by a firewall.
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        closed.bind(("127.0.0.1", 0))
        listening = {"mute": mute, "dropping": full, "closed": closed}
        addresses = {
            kind: f"http://127.0.0.1:{each.getsockname()[1]}" for kind, each in listening.items()
        }
        yield {**addresses, "no such host": "http://tracking.invalid:5000"}


@pytest.mark.parametrize("kind", ["mute", "dropping", "closed", "no such host"])
def test_a_start_without_an_answer_ends_in_time(
    tmp_path: Path, silent: dict[str, str], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tracking_uri.ANSWER_S < 10
    if kind in ("mute", "dropping"):
        monkeypatch.setattr(tracking_uri, "ANSWER_S", 0.5)
    job = tracked(tmp_path, f"tracking.uri={silent[kind]}", teacher=False)
    for ask in (tracking.check_reachable, register):
        started = time.monotonic()
        with pytest.raises(
            ConnectionError, match=rf"tracking.uri={silent[kind]} does not answer \(.+\); start it"
        ) as caught:
            ask([job])
        assert ("(no answer in 0.5 s)" in str(caught.value)) is (kind in ("mute", "dropping"))
        assert time.monotonic() - started < 15


def test_a_registered_job_starts_without_its_server(tmp_path: Path, silent: dict[str, str]) -> None:
    job = tracked(
        tmp_path, f"tracking.uri={silent['closed']}", "tracking.experiment_id='1'", teacher=False
    )
    tracking.check_reachable([job])


def test_a_server_that_never_answers_does_not_delay_training(
    tmp_path: Path,
    silent: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(tracking_uri, "ANSWER_S", 0.5)
    monkeypatch.setattr(Mirror.close, "__defaults__", (4.0, 0.5))
    threads, real = set(), tracking.sync

    def watched(folder: Path) -> None:
        threads.add(threading.current_thread().name)
        real(folder)

    monkeypatch.setattr(mirror_module, "sync", watched)
    job = tracked(tmp_path, f"tracking.uri={silent['mute']}", "tracking.offline=true")
    with caplog.at_level(logging.WARNING, logger="sddlskd"):
        (result,) = fit([job])
    assert result["status"] == "FINISHED"
    assert threads == {"mlflow-mirror"}  # no other thread waits for MLflow
    said = [
        each.getMessage()
        for each in caplog.records
        if "MLflow" in each.getMessage() or "tracking" in each.name
    ]
    assert len(said) == 2  # one at the start and one at the end
    later = f"python -m sddlskd.tracking sync {tmp_path}/runs"
    assert said[0].startswith(
        f"tracking.uri={silent['mute']} does not answer (no answer in 0.5 s); continuing without"
    )
    assert all(later in each for each in said)


@pytest.fixture
def away(tmp_path: Path) -> Callable[[], None]:
    """Return a function; until it is called, the database of the home cannot be created."""
    (tmp_path / "mlflow.db").mkdir()
    return (tmp_path / "mlflow.db").rmdir


def deliver_one(folder: str) -> None:
    cfg.frame()
    sync(Path(folder))


def test_a_sweep_that_began_without_mlflow_is_delivered_whole(
    tmp_path: Path, away: Callable[[], None]
) -> None:
    names = [f"seed={seed}" for seed in range(6)]
    jobs = [tracked(tmp_path, name, "tracking.offline=true", teacher=False) for name in names]
    jobs = register(jobs, sweep="table-1")
    assert {job.tracking.experiment_id for job in jobs} == {None}
    sweep_folder = Path(jobs[0].home, "runs/sweeps/table-1")
    write_manifest(sweep_folder, "table-1", jobs)
    write_plan(sweep_folder, "table-1", jobs)
    tracking.log_plan(jobs[0])
    folders = [write_record(job) for job in jobs[:5]]  # the sixth job never starts
    tracking.finish_sweep(jobs[0], FAILED)
    away()
    started = [processes.Process(target=deliver_one, args=(str(folder),)) for folder in folders[1:]]
    for process in started:
        process.start()
    for process in started:
        process.join()
    assert [process.exitcode for process in started] == [0] * 4
    for _ in range(2):
        sync_command.main(["sync", str(tmp_path / "runs")])
    (parent,) = runs_of(jobs[0], kind="sweep")
    children = runs_of(jobs[0])
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    assert sorted(run.data.params["seed"] for run in children) == list("01234")
    assert parent.info.status == "FAILED"
    assert [file.path for file in client_of(jobs[0]).list_artifacts(parent.info.run_id)] == [
        "plan.json"
    ]
    frame = load("table-1", str(jobs[0].tracking.uri)).frame
    assert Counter(frame["status"]) == {"FINISHED": 5, "MISSING": 1}
    for run in children:
        assert {key: len(found) for key, found in points(jobs[0], run.info.run_id).items()} == {
            "val/top1": 3, "train/loss": 3, "best/top1": 1, "last/top1": 1
        }  # fmt: skip


# Access and hosts


def test_a_password_in_the_address_is_refused_before_it_is_written(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "sddlskd.train",
        "-m",
        "dataset=digits",
        "distiller=vanilla",
        "seed=0,1",
    ]
    environment = os.environ | {
        "MLFLOW_TRACKING_URI": "https://me:s3cret@host:5000",
        "SDDLSKD_HOME": str(tmp_path),
    }
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert (
        "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead"
        in done.stderr.splitlines()[-1]
    )
    assert "s3cret" not in done.stdout + done.stderr
    assert not [
        path for path in tmp_path.rglob("*") if path.is_file() and b"s3cret" in path.read_bytes()
    ]
    for uri in ("http://token@host", "postgresql://me:s3cret@host/mlflow"):
        with pytest.raises(ValueError, match="holds a user name or password") as caught:
            tracked(tmp_path, f"tracking.uri={uri}", teacher=False)
        assert "s3cret" not in str(caught.value)


def test_sqlite_is_written_by_one_host_alone(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    (job,) = register([tracked(home)])
    (home / "mlflow.db.host").write_text("elsewhere 0000-0000")
    for ask in (tracking.check_reachable, register):
        with pytest.raises(
            ConnectionError,
            match=rf"{home}/mlflow.db is written by host elsewhere, .*tracking-server",
        ):
            ask([tracked(home)])
    before = {path.name: path.read_bytes() for path in home.glob("mlflow.db*")}
    with caplog.at_level(logging.WARNING, logger="sddlskd"):
        (result,) = fit([job])  # as if it had been launched on the other host
    assert result["status"] == "FINISHED"
    assert "is written by host elsewhere" in caplog.text
    assert {path.name: path.read_bytes() for path in home.glob("mlflow.db*")} == before
    (home / "mlflow.db.host").unlink()
    sync(Path(job.run_dir))
    assert [run.info.status for run in runs_of(job)] == ["FINISHED"]


def test_of_two_hosts_that_claim_a_file_at_once_one_has_it(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, write_text = home / "mlflow.db.host", record.write_text

    def overtaken(path: Path, text: str) -> None:
        write_text(path, text)
        owner.write_text("elsewhere 0000-0000")

    monkeypatch.setattr(record, "write_text", overtaken)
    assert not owner.exists()
    with pytest.raises(ConnectionError, match="is written by host elsewhere"):
        tracking_uri.client(f"sqlite:///{home}/mlflow.db")
    assert owner.read_text() == "elsewhere 0000-0000"
    assert {path.name for path in home.iterdir()} == {"mlflow.db", "mlflow.db.host"}


def test_sqlite_is_refused_for_other_nodes(home: Path) -> None:
    file, server = (
        tracked(home, teacher=False),
        tracked(home, "tracking.uri=http://host:5000", teacher=False),
    )
    here = socket.gethostname()
    tracking.check_shared([file], [here, "localhost"])
    tracking.check_shared([server, tiny(home, teacher=False)], ["node7"])
    with pytest.raises(
        ValueError,
        match=r"sqlite:.*mlflow.db is a file and jobs would write to it from node7, node8; S",
    ):
        tracking.check_shared([server, file], [here, "node8", "node7"])


# Damaged files, unusual values and repetitions


@pytest.mark.parametrize("damage", [b"", b"\0" * 90, b"{", b"[]", "cut", "flipped", "other"])
def test_a_damaged_mlflow_json_makes_no_second_run_in_mlflow(
    home: Path, damage: bytes | str
) -> None:
    (job,) = register([tracked(home, teacher=False)])
    folder = write_record(job)
    sync(folder)
    (run,) = runs_of(job)
    path = folder / "mlflow.json"
    whole = path.read_bytes()
    spoilt = {
        "cut": whole[:50],
        "flipped": whole.replace(b'"rows": 3', b'"rows": 7'),
        "other": b'{"rows": 3}',
    }
    path.write_bytes(damage if isinstance(damage, bytes) else spoilt[damage])
    assert path.read_bytes() != whole
    opened = Record(job)
    opened.append({"epoch": 4, "time": 1004.0, "val/top1": 40.0, "train/loss": 0.25})
    opened.result(FINISHED, best_top1=40.0, last_top1=40.0, epochs=4, seconds=1.0)
    opened.close()
    sync(folder)
    (again,) = runs_of(job)
    assert again.info.run_id == run.info.run_id
    assert [step for step, _ in points(job, run.info.run_id)["val/top1"]] == [1, 2, 3, 4]
    assert record.read_mirror(folder)["rows"] == 4


def test_numbers_that_are_not_finite_and_any_name_of_a_folder_reach_mlflow(home: Path) -> None:
    (job,) = register([replace(tracked(home, teacher=False), run_dir=f"{home}/läuft ✓ 'so'")])
    opened, values = (
        Record(job),
        [math.nan, math.inf, -math.inf, 1e-300, 0.1 + 0.2, 1234567890123456.0],
    )
    for epoch in range(1, 1201):
        value = values[epoch % len(values)]
        opened.append(
            {"epoch": epoch, "time": 1000.0 + epoch, "val/top1": value, "train/loss": -value}
        )
    opened.result(FINISHED, best_top1=1.0, last_top1=1.0, epochs=1200, seconds=1.0)
    opened.close()
    for _ in range(2):
        (opened.folder / "mlflow.json").unlink(missing_ok=True)
        (opened.folder / "mlflow.json").write_text("spoilt")
        sync(opened.folder)
    (run,) = runs_of(job)
    assert run.data.tags["run_dir"] == str(opened.folder)
    largest = sys.float_info.max  # MLflow stores this number instead of infinity
    kept = {math.inf: largest, -math.inf: -largest}
    found = points(job, run.info.run_id)
    for key in ("val/top1", "train/loss"):
        expected = [
            (row["epoch"], kept.get(row[key], row[key])) for row in record.read_rows(opened.folder)
        ]
        assert [repr(point) for point in found[key]] == [repr(point) for point in expected]


def test_a_run_that_is_stopped_twice_at_an_epoch_has_its_summary_once(home: Path) -> None:
    (job,) = register([tracked(home, teacher=False)])
    folder = write_record(job, epochs=2, status=record.KILLED, reason="stopped by SIGTERM")
    for state in (record.KILLED, RUNNING, record.KILLED, FINISHED):
        sync(folder)
        opened = Record(job)
        opened.result(state, best_top1=20.0, last_top1=20.0, epochs=2, seconds=1.0)
        opened.close()
    sync(folder)
    (run,) = runs_of(job)
    assert run.info.status == "FINISHED"
    assert {key: len(found) for key, found in points(job, run.info.run_id).items()} == {
        "val/top1": 2, "train/loss": 2, "best/top1": 1, "last/top1": 1
    }  # fmt: skip


def test_one_damaged_run_does_not_stop_the_delivery_of_the_others(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = register([tracked(home, f"seed={seed}", teacher=False) for seed in range(3)])
    folders = sorted(write_record(job) for job in jobs)
    (folders[0] / "metrics.jsonl").write_text("nonsense\n")
    (folders[1] / "config.yaml").write_text("[")
    with pytest.raises(SystemExit) as caught:
        sync_command.main(["sync", str(home / "runs")])
    assert capsys.readouterr().out == "MLflow has 1 run up to date\n"
    first, second = str(caught.value).splitlines()
    assert f"{folders[0]}/metrics.jsonl, line 1 is damaged" in first
    assert f"{folders[1]}/config.yaml is damaged" in second
    delivered = [run for run in runs_of(jobs[2]) if run.info.status == "FINISHED"]
    assert [run.data.tags["run_dir"] for run in delivered] == [str(folders[2])]


# A real server


class Server:
    """`mlflow server` on loopback, which can be killed and restarted with the same data.

    It starts without its job runner, as that of `sddlskd.server`: the runner's eight processes need
    most of the time of a start.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
        ]
        command += ["--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db", "--workers", "1"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        with open(self.folder / "server.log", "ab") as log:
            self.process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + 120
        while True:
            assert self.process.poll() is None, (self.folder / "server.log").read_text()
            assert time.monotonic() < deadline, (self.folder / "server.log").read_text()
            with suppress(OSError):
                urllib.request.urlopen(f"{self.uri}/health", timeout=5).close()
                return
            time.sleep(0.1)

    def kill(self) -> None:
        if self.process:
            # Kill the session, which holds the server and its worker.
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture
def server(home: Path) -> Iterator[Server]:
    started = Server(home)
    started.start()
    yield started
    started.kill()


def test_server_that_dies_and_comes_back(
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(Mirror.close, "__defaults__", (20.0, 0.5))
    original = Run.end_epoch

    def ending(self: Run, *arguments: Any) -> None:
        original(self, *arguments)
        if self.epoch == 3:
            mirrored = self.record.folder / "mlflow.json"
            deadline = time.monotonic() + 60
            while not (mirrored.exists() and json.loads(mirrored.read_text()).get("rows")):
                assert time.monotonic() < deadline
                time.sleep(0.05)
            server.kill()

    monkeypatch.setattr(Run, "end_epoch", ending)
    job = tiny(
        tmp_path / "work", "tracking=mlflow", f"tracking.uri={server.uri}", "trainer.epochs=6"
    )
    with caplog.at_level(logging.WARNING, logger="sddlskd"):
        (result,) = fit([job])
    assert result["status"] == "FINISHED"
    assert len(record.read_rows(Path(job.run_dir))) == 6
    assert (
        f"once it is reachable, run: python -m sddlskd.tracking sync {job.run_dir}" in caplog.text
    )
    server.start()
    sync_command.main(["sync", job.run_dir])
    (run,) = runs_of(job)
    assert (run.info.status, run.info.run_id) == ("FINISHED", result["run_id"])
    history = points(job, run.info.run_id)
    assert history.keys() == METRICS | FINAL
    steps = Counter(len(found) for key, found in history.items() if key in METRICS)
    assert steps == {6: len(METRICS)}
    assert {file.path for file in client_of(job).list_artifacts(run.info.run_id)} >= {
        "config.yaml",
        "result.json",
    }
    sync(Path(job.run_dir))
    assert points(job, run.info.run_id) == history


def test_tracking_of_a_students_group_that_fails_in_part(home: Path) -> None:
    jobs = [tracked(home), tracked(home, model=net(raises="training"))]
    fit(jobs)
    assert sorted(run.info.status for run in runs_of(jobs[0])) == ["FAILED", "FINISHED"]
    assert {run.data.params["student.model"] for run in runs_of(jobs[0])} == {
        json.dumps(job.student.model, separators=(",", ":")) for job in jobs
    }
