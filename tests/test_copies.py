"""Test the copies of runs for TensorBoard and W&B: complete, without repeated steps, optional."""

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from sddlskd import config as cfg
from sddlskd import record, tracking
from sddlskd.config import Config
from sddlskd.record import FINISHED, KILLED, RUNNING, Record
from sddlskd.sweeps.outcome import record_outcome
from sddlskd.tracking import __main__ as sync_command
from sddlskd.tracking import copies
from sddlskd.tracking.runs import SUMMARY
from sddlskd.tracking.tensorboard import FOLDER, EventFiles, read
from sddlskd.training.fit import fit
from tests.conftest import Compose
from tests.test_tracking import FINAL, METRICS, write_record
from tests.tiny import tiny

TENSORBOARD = "tracking.mirrors=[tensorboard]"


def copied(home: Path, *overrides: str) -> Config:
    return tiny(home, TENSORBOARD, "recipe=vanilla", *overrides, teacher=False)


def scalars(folder: Path) -> list[tuple[str, int, float, float]]:
    """Return (name, step, value, Unix time) of all scalars in a run's event files, in order."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    return [
        (value.tag, event.step, value.tensor.float_val[0], event.wall_time)
        for path in sorted((folder / FOLDER).iterdir())
        for event in EventFileLoader(str(path)).Load()
        for value in event.summary.value
        if value.metadata.plugin_data.plugin_name == "scalars"
    ]


def texts(folder: Path) -> dict[str, str]:
    return read(folder / FOLDER)[1]


def begin(job: Config, epochs: int) -> Path:
    """Write the record of a run in training, up to an epoch."""
    opened = Record(job)
    opened.result(RUNNING, epochs=0)
    for epoch in range(1, epochs + 1):
        opened.append({"epoch": epoch, "time": 1000.0 + epoch, "val/top1": 10.0 * epoch})
    opened.close()
    return opened.folder


# The contract


def test_the_event_files_hold_what_mlflow_holds(tmp_path: Path) -> None:
    job = tiny(tmp_path, TENSORBOARD, "M=[1,2]", "sweep.name=table-1")
    (result,) = fit([job])
    folder = Path(job.run_dir)
    found = scalars(folder)
    rows = record.read_rows(folder)
    assert {name for name, *_ in found} == METRICS | FINAL
    for row in rows:
        for name in METRICS:
            expected = (name, row["epoch"], pytest.approx(row[name], rel=1e-6), row["time"])
            assert expected in found
    final = {name: (step, value) for name, step, value, _ in found if name in FINAL}
    assert final == {name: (2, pytest.approx(result[SUMMARY[name]], rel=1e-6)) for name in FINAL}
    tags = json.loads(texts(folder)["tags"])
    assert tags["config_hash"] == cfg.config_hash(job)
    assert tags["settings_hash"] == cfg.settings_hash(job)
    assert tags["sweep"] == "table-1"
    assert tags["teacher_sha256"] == result["teacher_sha256"]
    assert tags["status_reason"] == ""
    assert texts(folder)["status"] == FINISHED
    assert not (tmp_path / "mlflow.db").exists()


def test_the_parameters_are_those_of_mlflow(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    job = copied(tmp_path)
    folder = write_record(job)
    copies.write_copies(folder, job.tracking.mirrors)
    (path,) = (folder / FOLDER).iterdir()
    (start,) = (
        HParamsPluginData.FromString(value.metadata.plugin_data.content).session_start_info
        for event in EventFileLoader(str(path)).Load()
        for value in event.summary.value
        if value.tag == "_hparams_/session_start_info"
    )
    assert start.hparams.keys() == cfg.flatten(job).keys() | {"method"}
    assert start.hparams["student.name"].string_value == "resnet8"
    assert start.hparams["seed"].number_value == 0


def test_there_is_no_copy_unless_it_is_asked_for(tmp_path: Path) -> None:
    job = tiny(tmp_path, "recipe=vanilla", teacher=False)
    assert not tracking.is_copied(job)
    fit([job])
    assert not (Path(job.run_dir) / FOLDER).exists()


# Interruptions


def test_a_resumed_run_repeats_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sddlskd.training.run import Run

    job = copied(tmp_path, "trainer.epochs=3")
    original = Run.end_epoch

    def die(run: Run, *arguments: Any, **named: Any) -> Any:
        done = original(run, *arguments, **named)
        if run.epoch > 2:
            raise KeyboardInterrupt
        return done

    with monkeypatch.context() as patch:
        patch.setattr(Run, "end_epoch", die)
        (result,) = fit([job])
    assert result["status"] == KILLED
    folder = Path(job.run_dir)
    assert texts(folder)["status"] == KILLED
    assert fit([job])[0]["status"] == FINISHED
    assert len(list((folder / FOLDER).iterdir())) == 2
    counts = Counter((name, step) for name, step, *_ in scalars(folder))
    assert set(counts.values()) == {1}
    assert [step for name, step, *_ in scalars(folder) if name == "val/top1"] == [1, 2, 3]
    assert [step for name, step, *_ in scalars(folder) if name == "best/top1"] == [2, 3]
    assert texts(folder)["status"] == FINISHED


@pytest.mark.parametrize("cut", [0, 1, 40, 2000])
def test_a_killed_writer_loses_nothing_that_the_record_has(tmp_path: Path, cut: int) -> None:
    job = copied(tmp_path)
    writer = EventFiles(begin(job, epochs=5))
    writer.update()
    writer.close()
    (path,) = (Path(job.run_dir) / FOLDER).iterdir()
    path.write_bytes(path.read_bytes()[: -cut or None])  # the last events did not reach the disk
    folder = begin(job, epochs=7)
    copies.write_copies(folder, job.tracking.mirrors)
    found = [(step, value) for name, step, value, _ in scalars(folder) if name == "val/top1"]
    assert found == [(epoch, 10.0 * epoch) for epoch in range(1, 8)]


def test_a_run_whose_process_died_is_killed_in_its_copy(tmp_path: Path) -> None:
    job = copied(tmp_path)
    folder = begin(job, epochs=1)
    copies.write_copies(folder, job.tracking.mirrors)
    assert texts(folder)["status"] == KILLED
    assert json.loads(texts(folder)["tags"])["status_reason"] == (
        "the process ended without writing a result"
    )


def test_a_job_that_could_not_start_is_failed_in_its_copy(tmp_path: Path) -> None:
    job = copied(tmp_path)
    record_outcome(job, "FAILED", "no memory")
    assert texts(Path(job.run_dir))["status"] == "FAILED"


def test_a_copy_that_cannot_be_written_does_not_end_the_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = copied(tmp_path)
    folder = begin(job, epochs=0)
    (folder / FOLDER).write_text("a file in the way")
    assert fit([job])[0]["status"] == FINISHED
    (warning,) = [entry for entry in caplog.messages if "no copy for tensorboard" in entry]
    assert warning.startswith(f"{folder}: ")
    assert warning.endswith("training continues")


# The command


def test_sync_writes_the_copies_that_are_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = [tiny(tmp_path, f"seed={seed}", teacher=False) for seed in (0, 1)]
    folders = [write_record(job) for job in jobs]
    for _ in range(2):
        sync_command.main(["sync", "--to", "tensorboard", str(tmp_path / "runs")])
        assert capsys.readouterr().out == "copies are up to date of 2 runs\n"
    for folder in folders:
        counts = Counter((name, step) for name, step, *_ in scalars(folder))
        assert counts == dict.fromkeys(
            [(name, epoch) for name in ("val/top1", "train/loss") for epoch in (1, 2, 3)]
            + [("best/top1", 3), ("last/top1", 3)],
            1,
        )
    sync_command.main(["sync", "--to", "tensorboard", "--again", str(folders[0])])
    assert len(list((folders[0] / FOLDER).iterdir())) == 1
    assert not (tmp_path / "mlflow.db").exists()


def test_sync_leaves_a_run_in_training_to_its_process_and_names_a_damaged_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job, damaged = (tiny(tmp_path, f"seed={seed}", teacher=False) for seed in (0, 1))
    write_record(damaged)
    (Path(damaged.run_dir) / "metrics.jsonl").write_text("no JSON\n")
    opened = Record(job)
    opened.result(RUNNING, epochs=0)
    with pytest.raises(SystemExit, match=r"could not be copied: .*line 1 is damaged") as refused:
        sync_command.main(["sync", "--to", "tensorboard", str(tmp_path / "runs")])
    opened.close()
    assert str(refused.value).startswith(f"error: {damaged.run_dir} could not")
    assert capsys.readouterr().out == (
        "left out: 1 run in training\ncopies are up to date of 0 runs\n"
    )
    assert not (Path(job.run_dir) / FOLDER).exists()


def test_sync_of_mlflow_brings_the_other_copies_up_to_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = copied(tmp_path)
    folder = write_record(job)
    monkeypatch.setattr(sync_command, "sync", lambda folder, again: None)
    sync_command.main(["sync", str(folder)])
    assert texts(folder)["status"] == FINISHED


# Packages


@pytest.mark.parametrize(
    ("mirror", "cure"),
    [("tensorboard", r"pip install 'sddlskd\[tensorboard\]'"), ("wandb", "pip install wandb")],
)
def test_a_missing_package_is_named_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mirror: str, cure: str
) -> None:
    monkeypatch.setattr(copies, "find_spec", lambda name: None)
    job = tiny(tmp_path, f"tracking.mirrors=[{mirror}]", teacher=False)
    with pytest.raises(
        ValueError, match=f"tracking.mirrors: {mirror} is not installed: {cure}, or leave"
    ):
        fit([job])
    assert not Path(job.run_dir).exists()


def test_a_folder_of_its_name_is_not_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ValueError, match="wandb is not installed"):
        tracking.check_packages([tiny(tmp_path, "tracking.mirrors=[wandb]", teacher=False)])


def test_an_unknown_mirror_is_refused(compose: Compose) -> None:
    with pytest.raises(Exception, match=r"tracking.mirrors"):
        compose("tracking.mirrors=[neptune]")


# W&B, with a stand-in for its package


class FakeRun:
    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.summary: dict[str, Any] = {}
        self.exit_code: int | None = None

    def log(self, row: dict[str, float], step: int) -> None:
        self.logged.append((step, row))

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> list[FakeRun]:
    """Return the runs that a stand-in for the package wandb gets."""
    runs: list[FakeRun] = []

    def init(**options: Any) -> FakeRun:
        runs.append(FakeRun(options))
        return runs[-1]

    fake: Any = ModuleType("wandb")
    fake.init, fake.Settings = init, SimpleNamespace
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(copies, "find_spec", lambda name: SimpleNamespace(origin=name))
    return runs


def test_an_offline_run_of_wandb_holds_the_record(tmp_path: Path, wandb: list[FakeRun]) -> None:
    job = tiny(tmp_path, "tracking.mirrors=[wandb]", "recipe=vanilla", teacher=False)
    (result,) = fit([job])
    (run,) = wandb  # written once, at the end
    assert run.options["mode"] == "offline"
    assert run.options["dir"] == job.run_dir
    assert run.options["config"] == cfg.flatten(job) | {"method": cfg.method_name(job)}
    rows = record.read_rows(Path(job.run_dir))
    assert [step for step, _ in run.logged] == list(range(len(rows)))
    assert [logged for _, logged in run.logged] == [
        {name: value for name, value in row.items() if name != "time"} for row in rows
    ]
    assert run.summary["best/top1"] == result["best_top1"]
    assert run.summary["config_hash"] == cfg.config_hash(job)
    assert (run.summary["status"], run.exit_code) == (FINISHED, 0)


def test_an_offline_run_is_written_anew_only_if_the_run_ends_again(
    tmp_path: Path, wandb: list[FakeRun]
) -> None:
    job = tiny(tmp_path, teacher=False)
    folder = write_record(job, status=KILLED, reason="SIGTERM")
    write: Callable[..., None] = copies.write_copies
    for again, expected in ((False, 1), (False, 1), (True, 2)):
        write(folder, [cfg.FileMirror.wandb], again=again)
        assert len(wandb) == expected
    write_record(job, epochs=4)
    write(folder, [cfg.FileMirror.wandb])
    assert [run.exit_code for run in wandb] == [1, 1, 0]
    assert len({run.options["id"] for run in wandb}) == 1
    assert len(wandb[-1].logged) == 4
