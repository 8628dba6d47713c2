"""Test the reading of runs from MLflow stores whose rows are known."""

import gc
import math
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient

from analysis import store
from analysis.runs import listing, load
from analysis.schema import COLUMNS, details_of, frame_of
from tests.analysis.store import empty_store, make_store


def uri_of(path: Path) -> str:
    return f"sqlite:///{path}"


def error_of(*arguments: Any, **options: Any) -> str:
    """Return the line of the ValueError that `load` raises."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the callers check the whole line)
        load(*arguments, **options)
    (line,) = str(caught.value).splitlines()
    return line


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "mlflow.db"


# Rows


def test_every_column_of_a_run_is_as_logged(path: Path) -> None:
    row = {
        **{
            "name": "the-run",
            "sweep": "s",
            "config_hash": "c0ffee",
            "git_sha": "ab" * 20,
            "run_dir": "/r/the-run",
        },
        **{
            "environment": "torch 2.6, H200",
            "status": "FINISHED",
            "group_size": 4,
            "dataset": "cub200",
        },
        **{
            "teacher": "vgg13",
            "student": "vgg8",
            "distiller": "dkd",
            "M": "[1, 2,4]",
            "standardize": True,
        },
        **{
            "complementary_weight": 1.5,
            "knowledge": "complementary",
            "temperature": 2.0,
            "ce_weight": 0.5,
        },
        **{
            "kd_weight": 9.0,
            "lr": 0.01,
            "batch_size": 32,
            "epochs": 30,
            "epochs_done": 29,
            "seed": 7,
        },
        **{
            "val_fraction": 0.1,
            "best": 70.5,
            "last": 70.25,
            "test": 69.0,
            "teacher_top1": 75.0,
            "epoch_s": 12.5,
        },
        **{"images_per_s": 4000.0, "max_steps": 100, "settings_hash": "5e77"},
        **{"precision": "bf16", "compile": True, "teacher_cache": "/cache"},
        **{"recipe": "dkd_ls", "optimizer": "sgd", "train_fraction": 0.5},
        **{"parameters": 78042.0, "flops": 2.5e7, "mAP": 81.5},
    }
    (run_id,) = make_store(path, [{**row, "started": 1_700_000_000_123}])
    frame = load("s", uri_of(path)).frame
    derived = {
        "M": "[1,2,4]",
        "pair": "vgg13_vgg8",
        "method": "sd_dkd_ls",
        "features": "",
        "learned_temperature": False,
        "details": "",
        "looks": None,
        "own_code": "",
        "standardization": "",
        "run_id": run_id,
        "source": "sddlskd",
    }
    command = {"command": "python -m sddlskd.worker /runs/vgg8-[1, 2,4]-7"}
    started = {
        "started": pd.Timestamp("2023-11-14 22:13:20.123", tz="UTC"),
        "reason": "",
        "superseded": False,
    }
    assert frame.iloc[0].to_dict() == row | derived | command | started
    assert list(frame.columns) == list(COLUMNS)
    assert (frame.dtypes == frame_of([]).dtypes).all()


def test_a_method_is_made_of_its_parts(path: Path) -> None:
    learned = {"distiller.learned_temperature": '{"_target_":"sddlskd.methods.ctkd.Learned"}'}
    crd = {"features.crd.weight": 0.8, "features.crd.method": '{"_target_":"sddlskd.methods.CRD"}'}
    mlkd = {"features.mlkd.weight": 9.0, "features.mlkd.method": '{"standardize":true}'}
    alone = {"distiller": "features_only"}
    sd_sp = {"features.sp.weight": 1.0, "features.sp.method": '{"M":[1,2]}'}
    methods = {
        "crd": crd | alone,
        "crd+sp": {**crd, "features.sp.weight": 3000.0, **alone},
        "sd_sp": sd_sp | alone,
        "mlkd_ls": mlkd | alone,
        "sd_kd+crd": {**crd, "M": "[1,2]"},
        "ctkd_ls": {**learned, "standardize": True},
        "dkd+ctkd": {**learned, "distiller": "dkd"},
        "kd": {"distiller.learned_temperature": "{}", "features.x.method": "cut off"},
        "kd_dot": {"optimizer": "dot"},
    }
    make_store(path, [row | {"sweep": "s", "name": name} for name, row in methods.items()])
    frame = load("s", uri_of(path)).frame
    assert dict(zip(frame["name"], frame["method"], strict=True)) == {
        name: name for name in methods
    }


def test_no_run_is_dropped(path: Path) -> None:
    rows = [
        {"sweep": "s", "status": "FINISHED", "seed": 0, "best": 70.0},
        {"sweep": "s", "status": "FAILED", "seed": 1, "reason": "loss is nan at step 3"},
        {"sweep": "s", "status": "KILLED", "seed": 2},
        {"sweep": "s", "status": "RUNNING", "seed": 3, "last": 41.0, "epochs_done": 12},
        {"sweep": "s", "status": "MISSING", "seed": 4},
        {
            "sweep": "s",
            "status": "FAILED",
            "seed": 0,
            "superseded": True,
            "config_hash": f"{0:012x}",
        },
        {"sweep": "other", "status": "FINISHED", "seed": 9},
    ]
    make_store(path, rows)
    frame = load("s", uri_of(path)).frame.set_index("seed").sort_index(kind="stable")
    assert list(frame["status"]) == ["FINISHED", "FAILED", "FAILED", "KILLED", "RUNNING", "MISSING"]
    assert list(frame["superseded"]) == [False, True, False, False, False, False]
    assert frame.loc[1, "reason"] == "loss is nan at step 3"
    assert frame.loc[3, "epochs_done"] == 12
    assert frame.loc[2, "epochs_done"] is pd.NA
    missing = frame.loc[4]
    assert (missing["run_id"], missing["sweep"], missing["student"]) == ("", "s", "shufflev1")
    assert missing["command"] == "python -m sddlskd.worker /runs/shufflev1-[1]-4"
    assert (missing["epochs"], missing["method"], missing["run_dir"]) == (240, "kd", "/runs/run-4")
    assert missing["best"] is pd.NA
    assert len(load(None, uri_of(path)).frame) == len(rows)


def test_a_run_that_halving_dropped_is_pruned(path: Path) -> None:
    reason = "rank 2 of 2 at epoch 1: val/top1 9.00"
    rows = [
        {"sweep": "s", "status": "KILLED", "reason": f"PRUNED: {reason}"},
        {"sweep": "s", "status": "FINISHED", "reason": "PRUNED: of an earlier attempt"},
    ]
    make_store(path, rows)
    frame = load("s", uri_of(path)).frame
    assert list(frame["status"]) == ["PRUNED", "FINISHED"]
    assert frame["reason"][0] == reason


def test_a_job_whose_only_run_is_superseded_is_missing(path: Path) -> None:
    make_store(path, [{"sweep": "s", "superseded": True}])
    assert list(load("s", uri_of(path)).frame["status"]) == ["FINISHED", "MISSING"]


def test_sweep_has_the_runs_that_another_sweep_made(path: Path) -> None:
    rows = [
        {"sweep": "first", "seed": 0, "planned_by": ["second"]},
        {"sweep": "first", "seed": 1},
        {"sweep": "second", "seed": 2, "experiment": "elsewhere"},
    ]
    make_store(path, rows)
    second = load("second", uri_of(path)).frame
    assert dict(zip(second["seed"], second["sweep"], strict=True)) == {0: "first", 2: "second"}
    assert set(load("first", uri_of(path)).frame["seed"]) == {0, 1}
    counts = listing(uri_of(path)).set_index(["kind", "name"])["runs"].to_dict()
    assert counts["sweep", "first"] == 2
    assert counts["sweep", "second"] == 2


def test_sweep_without_a_plan_has_its_runs(path: Path) -> None:
    make_store(path, [{"sweep": "s"}, {"sweep": "s", "status": "MISSING"}], plans=False)
    found = load("s", uri_of(path))
    assert list(found.frame["status"]) == ["FINISHED"]
    assert (found.command, found.frame.loc[0, "command"]) == ("", "")


def test_experiment_by_name_and_the_sweeps_command(path: Path) -> None:
    make_store(
        path,
        [{"sweep": "s"}, {"experiment": "mine", "seed": 5}, {"experiment": "mine", "seed": 6}],
        command="c",
    )
    assert list(load("mine", uri_of(path)).frame["seed"]) == [5, 6]
    assert load("mine", uri_of(path)).command == ""
    assert load("s", uri_of(path)).command == "c"


def test_more_runs_than_a_page(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "PAGE", 7)
    ids = make_store(path, [{"sweep": "s", "seed": seed, "started": 5} for seed in range(50)])
    frame = load("s", uri_of(path)).frame
    assert sorted(frame["run_id"]) == sorted(ids)
    assert sorted(frame["seed"]) == list(range(50))


# Runs that break the contract of docs/design.md


def test_a_param_of_a_wrong_type_is_blank_with_a_complaint(path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"sweep": "s", "seed": "x"},
        {"sweep": "s", "M": "abc"},
        {"sweep": "s", "M": "[1,0]"},
        {"sweep": "s", "standardize": "maybe", "temperature": "hot", "reason": "stopped"},
        {"sweep": "s", "group_size": "two"},
    ]
    make_store(path, rows)
    frame = load("s", uri_of(path)).frame
    assert frame.loc[0, "seed"] is pd.NA
    assert frame.loc[0, "reason"] == "seed=x is not a valid int64"
    assert list(frame.loc[1:2, "M"]) == ["", ""]
    assert list(frame["method"]) == ["kd", "", "", "", "kd"]
    assert list(frame.loc[1:2, "reason"]) == [
        "M=abc is not a valid list of scales",
        "M=[1,0] is not a valid list of scales",
    ]
    assert frame.loc[3, "temperature"] is pd.NA
    assert (
        frame.loc[3, "reason"] == "stopped; standardize=maybe is not a valid bool; "
        "distiller.temperature=hot is not a valid float64"
    )
    assert frame.loc[4, "group_size"] is pd.NA


def test_null_is_blank_without_a_complaint(path: Path) -> None:
    make_store(path, [{"sweep": "s", "temperature": None}])
    frame = load("s", uri_of(path)).frame
    assert frame.loc[0, "temperature"] is pd.NA
    assert frame.loc[0, "reason"] == ""


def test_run_that_lacks_params_stays_with_blanks(path: Path) -> None:
    make_store(path, [{"sweep": "s"}, {"sweep": "s", "absent": ["student", "seed", "M"]}])
    frame = load("s", uri_of(path)).frame
    assert frame.loc[1, "reason"] == "no param student.name, M, seed"
    assert (frame.loc[1, "student"], frame.loc[1, "pair"], frame.loc[1, "method"]) == ("", "", "")
    assert frame.loc[1, "seed"] is pd.NA
    assert frame.loc[0, "reason"] == ""


def test_garbage_is_collected_again_after_reading(path: Path) -> None:
    make_store(path, [{"sweep": "s"}])
    load("s", uri_of(path))
    assert gc.isenabled()
    error_of("no such", uri_of(path))
    assert gc.isenabled()


def test_someone_elses_experiment_is_refused(path: Path) -> None:
    absent = ["dataset", "teacher", "student", "distiller"]
    make_store(
        path,
        [
            {"experiment": "theirs", "absent": absent},
            {"experiment": "theirs", "absent": absent[2:]},
        ],
    )
    line = error_of("theirs", uri_of(path))
    assert line.startswith(
        "experiment theirs: none of 2 runs has the params of sddlskd's runs; missing are "
    )
    assert "dataset.name (1), teacher.name (1), student.name (2), distiller.name (2);" in line
    assert "import-logs" in line


def test_a_run_with_a_nan_metric_stays_with_a_complaint(path: Path) -> None:
    make_store(
        path,
        [{"sweep": "s", "best": math.nan, "last": 10.0, "history": {"val/top1": [1, math.nan]}}],
    )
    found = load("s", uri_of(path))
    assert found.frame["best"].isna().all()
    assert found.frame.loc[0, "last"] == 10.0
    assert found.frame.loc[0, "reason"] == "best/top1 is NaN"
    values = found.history()["value"]
    assert values[0] == 1
    assert math.isnan(values[1])


def test_damaged_plan_is_an_error(path: Path) -> None:
    make_store(path, [{"sweep": "s"}])
    (plan,) = path.parent.glob("mlartifacts/*/artifacts/plan.json")
    whole = plan.read_text()
    for damaged in (whole[:50], whole.replace("params", "no params"), "[]"):
        plan.write_text(damaged)
        assert error_of("s", uri_of(path)).startswith("plan.json of sweep s (run ")


# Numbers of epochs


LENGTHS = [
    {"sweep": "s", "epochs": 30, "seed": 0},
    *({"sweep": "s", "epochs": 240, "seed": seed} for seed in (1, 2)),
]


def test_several_lengths_are_refused_unless_asked(path: Path) -> None:
    make_store(path, LENGTHS)
    line = error_of("s", uri_of(path))
    assert "cifar100 has runs of different lengths (1 of 30 epochs, 2 of 240 epochs)" in line
    assert "--mixed-epochs" in line
    assert len(load("s", uri_of(path), mixed_epochs=True).frame) == 3


@pytest.mark.parametrize(
    "other",
    [
        # The training of the other runs' teacher
        {"distiller": "vanilla", "teacher": "none", "student": "resnet32x4"},
        {"superseded": True, "config_hash": "1" * 12},
        {"dataset": "imagenet"},
    ],
)
def test_runs_that_are_in_no_common_table_may_have_other_epochs(
    path: Path, other: dict[str, Any]
) -> None:
    make_store(
        path,
        [*LENGTHS[1:], {"sweep": "s", "epochs": 30, "config_hash": "1" * 12, **other}],
        plans=False,
    )
    assert len(load("s", uri_of(path)).frame) == 3


def test_a_student_alone_counts_as_a_length(path: Path) -> None:
    alone = {
        "sweep": "s",
        "epochs": 30,
        "distiller": "vanilla",
        "teacher": "none",
        "student": "shufflev1",
    }
    make_store(path, [*LENGTHS[1:], alone])
    assert "1 of 30 epochs" in error_of("s", uri_of(path))


# History, predictions and listings


def test_history_is_one_point_an_epoch_and_the_latest(path: Path) -> None:
    first = {"val/top1": [10.0, 20.0], "lr": [0.1, 0.01]}
    ids = make_store(
        path,
        [
            {"sweep": "s", "history": first},
            {"sweep": "s", "seed": 1, "history": {"val/top1": [30.0]}},
        ],
    )
    # Add the second epoch twice more, with a later and with an earlier time.
    with closing(sqlite3.connect(path)) as database, database:
        insert = (
            "INSERT INTO metrics (key, value, timestamp, run_uuid, step, is_nan) "
            "VALUES ('val/top1', ?, ?, ?, 2, 0)"
        )
        database.execute(insert, (21.0, 2_000_000_000_000, ids[0]))
        database.execute(insert, (99.0, 1, ids[0]))
    found = load("s", uri_of(path))
    history = found.history(["val/top1", "lr"]).set_index(["run_id", "metric", "epoch"])["value"]
    expected = {
        (ids[0], "val/top1", 1): 10.0,
        (ids[0], "val/top1", 2): 21.0,
        (ids[1], "val/top1", 1): 30.0,
    }
    assert history.to_dict() == expected | {(ids[0], "lr", 1): 0.1, (ids[0], "lr", 2): 0.01}
    assert found.history(run_ids=[ids[1], ""])["value"].to_list() == [30.0]
    empty = found.history(["no/such"])
    assert list(empty.columns) == ["run_id", "metric", "epoch", "value"]
    assert empty.empty


def test_history_of_more_runs_than_a_request_takes(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "RUNS_A_REQUEST", 3)
    rows = [
        {"sweep": "s", "seed": seed, "history": {"val/top1": [float(seed)]}} for seed in range(10)
    ]
    ids = make_store(path, rows)
    history = load("s", uri_of(path)).history()
    assert dict(zip(history["run_id"], history["value"], strict=True)) == dict(
        zip(ids, range(10), strict=True)
    )


def test_predictions(path: Path) -> None:
    arrays = {"target": np.arange(3), "logits": np.ones((3, 2), np.float16), "scale": np.array(2)}
    kept, none = make_store(
        path, [{"sweep": "s", "predictions": arrays}, {"sweep": "s", "seed": 1}]
    )
    found = load("s", uri_of(path))
    read = found.predictions(kept)
    assert read is not None
    assert read.keys() == arrays.keys()
    for key, array in arrays.items():
        np.testing.assert_array_equal(read[key], array)
        assert read[key].dtype == array.dtype
    assert found.predictions(none) is None
    file = path.parent / f"mlartifacts/{kept}/artifacts/predictions.npz"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"predictions.npz of run {kept} is not a complete file"):
        found.predictions(kept)


def test_listing(path: Path) -> None:
    rows = [
        {"sweep": "b"},
        {"sweep": "b", "status": "MISSING"},
        {"sweep": "a", "status": "FAILED"},
        {"superseded": True},
    ]
    make_store(path, rows)
    found = listing(uri_of(path)).set_index(["kind", "name"])
    assert list(found.index) == [
        ("sweep", "a"),
        ("sweep", "b"),
        ("experiment", "sddlskd"),
    ]
    assert found.loc[("sweep", "b")].to_dict() == {
        **{"runs": 2, "FINISHED": 1, "RUNNING": 0, "PRUNED": 0},
        **{"FAILED": 0, "KILLED": 0, "MISSING": 1},
    }
    assert found.loc[("experiment", "sddlskd"), "runs"] == 3


# Stores that cannot be read


def test_no_such_name_lists_the_closest_first(path: Path) -> None:
    make_store(path, [{"sweep": "table7"}, {"sweep": "heterogeneous", "experiment": "it's"}])
    line = error_of("table-7", uri_of(path))
    assert line.startswith(f"no sweep or experiment table-7 at {uri_of(path)}; there are table7, ")
    assert all(name in line for name in ("heterogeneous", "it's", "sddlskd", "Default"))
    assert error_of("it's not", uri_of(path)).startswith("no sweep or experiment it's not")
    assert error_of("no such; --", uri_of(path)).startswith("no sweep or experiment no such; --")
    assert "both kinds of quotes" in error_of("""'" """, uri_of(path))


def test_long_lists_of_names_are_cut(path: Path) -> None:
    make_store(path, [{"sweep": f"s{number}"} for number in range(20)])
    assert error_of("s", uri_of(path)).endswith(" and 12 more")


def test_no_database_is_said_and_none_is_made(path: Path) -> None:
    assert "there is no database" in error_of("s", uri_of(path))
    assert "python -m sddlskd.train" in error_of("s", uri_of(path))
    with pytest.raises(ValueError, match="there is no database"):
        listing(uri_of(path))
    assert not list(path.parent.iterdir())


@pytest.mark.parametrize("content", [b"", b"no database at all, only text" * 50])
def test_file_that_is_no_database_of_mlflows_is_left_alone(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    assert "is not an MLflow database" in error_of("s", uri_of(path))
    assert path.read_bytes() == content


def test_empty_store(path: Path) -> None:
    shutil.copy(empty_store(), path)
    assert error_of(None, uri_of(path)).startswith(
        f"{uri_of(path)} has no runs; make some with python -m sddlskd.train"
    )
    assert "has no runs in experiment Default; make some" in error_of("Default", uri_of(path))
    assert listing(uri_of(path))["runs"].sum() == 0


def test_locked_database(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_store(path, [{"sweep": "s"}])
    monkeypatch.setattr(store, "LOCKED_S", 0.5)
    with closing(sqlite3.connect(path)) as writer:
        writer.execute("BEGIN EXCLUSIVE")
        started = time.monotonic()
        assert "was locked for 0 s by a process that writes to it" in error_of("s", uri_of(path))
        assert time.monotonic() - started < 5
    assert len(load("s", uri_of(path)).frame) == 1


@pytest.mark.parametrize(
    ("version", "cure"),
    [("f" * 12, "pip install --upgrade mlflow"), ("older", "mlflow db upgrade")],
)
def test_other_schema_is_named_and_not_migrated(path: Path, version: str, cure: str) -> None:
    make_store(path, [{"sweep": "s"}])
    with closing(sqlite3.connect(path)) as database, database:
        (wanted,) = database.execute("SELECT version_num FROM alembic_version").fetchone()
        found = "451aebb31d03" if version == "older" else version  # MLflow's first revision
        database.execute("UPDATE alembic_version SET version_num = ?", (found,))
        # MLflow creates missing tables before it checks the version.
        database.execute("DROP TABLE latest_metrics")
    before = path.read_bytes()
    line = error_of("s", uri_of(path))
    assert found in line
    assert wanted in line
    assert cure in line
    assert path.read_bytes() == before


def test_a_text_that_is_no_address_is_refused() -> None:
    assert "give http(s)://host:port or sqlite:////absolute/path/mlflow.db" in error_of(
        "s", "postgres://x"
    )


def test_server_that_is_not_there_and_one_that_never_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(store, "ANSWER_S", 0.5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert f"{uri} does not answer" in error_of("s", uri)
        silent.listen()
        started = time.monotonic()
        assert f"{uri} does not answer" in error_of("s", uri)
        assert time.monotonic() - started < 5


def test_server_that_is_not_mlflow() -> None:
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>hello</html>")

        do_POST = do_GET

        def log_message(self, *arguments: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        uri = f"http://127.0.0.1:{server.server_port}"
        assert error_of("s", uri).startswith(f"{uri} cannot be read (")
        server.shutdown()


@pytest.fixture
def server(path: Path) -> Iterator[str]:
    """Yield the address of `mlflow server` on an empty store."""
    shutil.copy(empty_store(), path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    log = path.parent / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                *command,
                "--workers",
                "1",
                "--backend-store-uri",
                uri_of(path),
                "--artifacts-destination",
                str(path.parent / "mlartifacts"),
            ],
            # Its job runner would start eight processes more.
            env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    deadline = time.monotonic() + 120
    while True:
        with suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
            break
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    yield f"http://127.0.0.1:{port}"
    os.killpg(process.pid, signal.SIGKILL)  # the session holds the server and its workers
    process.wait()


def test_server_gives_what_the_database_gives(path: Path, server: str) -> None:
    rows = [
        {"sweep": "s", "seed": 0, "best": 70.0, "history": {"val/top1": [1.0, 2.0]}},
        {
            "sweep": "s",
            "seed": 1,
            "status": "FAILED",
            "reason": "why",
            "history": {"val/top1": [3.0]},
        },
        {"sweep": "s", "seed": 2, "status": "MISSING"},
    ]
    make_store(path, rows)
    there, here = load("s", server), load("s", uri_of(path))
    pd.testing.assert_frame_equal(there.frame, here.frame)
    assert there.command == here.command == "python -m sddlskd.train -m sweep=a"
    pd.testing.assert_frame_equal(there.history(), here.history())
    assert len(here.history()) == 3
    assert there.predictions(here.frame.loc[0, "run_id"]) is None
    pd.testing.assert_frame_equal(listing(server), listing(uri_of(path)))


def test_a_cell_of_the_tracker_is_no_run(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    make_store(path, [{"name": "one", "seed": 0, "best": 70.0, "last": 70.0}])
    client = MlflowClient(uri_of(path))
    (experiment,) = [e for e in client.search_experiments() if e.name != "Default"]
    client.create_run(experiment.experiment_id, tags={"kind": "cell", "settings_hash": "x"})
    assert list(load(None, uri_of(path)).frame["name"]) == ["one"]
    assert listing(uri_of(path))["runs"].max() == 1


def test_equal_settings_have_equal_details() -> None:
    with_lists = [
        details_of({"distiller.name": "sld", "distiller.loss.temperatures": temperatures})
        for temperatures in ("[1.0, 4.5]", "[1, 4.5]", "[1, 4]")
    ]
    assert with_lists[0] == with_lists[1] != with_lists[2]
    assert "4.5" in with_lists[0]
