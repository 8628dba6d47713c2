"""Test the run directory: freezing, one writer at a time, and whole lines of metrics."""

import json
import logging
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from sddlskd import config as cfg
from sddlskd import record
from sddlskd.record import Record, freeze, holds, read_result, read_rows
from sddlskd.sweeps import manifest
from sddlskd.tracking.runs import tags_of
from tests.tiny import processes, tiny

ROW = {"epoch": 1, "time": 1.5, "val/top1": 50.0}


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=n", "-c", "user.email=e@x"]
    done = subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a git repository that record.py takes for the repository of this package."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    git(folder, "init", "-q")
    (folder / "record.py").write_text("old\n")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "one")
    monkeypatch.setattr(record, "__file__", str(folder / "record.py"))
    record.code_state.cache_clear()
    monkeypatch.setattr(record, "code_state", record.code_state.__wrapped__)
    return folder


# Freezing


def test_freeze(tmp_path: Path, checkout: Path) -> None:
    job = tiny(tmp_path / "home", "M=[1,2]", teacher=False)
    assert not holds(job)
    folder = freeze(job)
    assert holds(job)
    assert cfg.load(folder / "config.yaml") == job
    code = json.loads((folder / "code.json").read_text())
    assert code == {"version": code["version"], "git_sha": git(checkout, "rev-parse", "HEAD")}
    assert not (folder / "code.diff").exists()  # the checkout has no uncommitted changes


def test_freeze_keeps_uncommitted_changes(tmp_path: Path, checkout: Path) -> None:
    (checkout / "record.py").write_text("new\n")
    folder = freeze(tiny(tmp_path / "home", teacher=False))
    assert "-old\n+new\n" in (folder / "code.diff").read_text()


def test_an_installation_inside_another_project_is_not_that_project(
    tmp_path: Path, checkout: Path
) -> None:
    (checkout / ".gitignore").write_text("venv\n")
    (checkout / "venv").mkdir()
    record.__file__ = str(checkout / "venv" / "record.py")
    folder = freeze(tiny(tmp_path / "home", teacher=False))
    assert json.loads((folder / "code.json").read_text())["git_sha"] == ""
    assert not (folder / "code.diff").exists()


def test_freeze_again_takes_where_it_runs_and_keeps_the_rest(tmp_path: Path) -> None:
    job = tiny(tmp_path, teacher=False)
    folder = freeze(job)
    code = (folder / "code.json").stat().st_mtime_ns
    job.trainer.device = "cuda"  # a setting that does not identify the job
    freeze(job)
    assert cfg.load(folder / "config.yaml").trainer.device == "cuda"
    assert (folder / "code.json").stat().st_mtime_ns == code
    opened = Record(job)
    job.trainer.device = "cpu"
    freeze(job)  # changes nothing, because a process has the run open
    opened.close()
    assert cfg.load(folder / "config.yaml").trainer.device == "cuda"


def test_another_job_is_refused_with_what_differs(tmp_path: Path) -> None:
    job, other = tiny(tmp_path, teacher=False), tiny(tmp_path, "M=[1,2]", "seed=3", teacher=False)
    other.run_dir = job.run_dir
    freeze(job)
    with pytest.raises(ValueError, match=r"holds another job") as caught:
        freeze(other)
    for part in (
        job.run_dir,
        "M=[1,2,4] there, [1,2] here",
        "seed=0 there, 3 here",
        "choose another run_dir",
    ):
        assert part in str(caught.value)
    with pytest.raises(ValueError, match="holds another job"):
        Record(other)
    Record(job).close()  # the refused job left no lock behind


def test_a_freeze_that_is_interrupted_leaves_no_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """config.yaml is written last: if it exists, the other files are complete."""
    job = tiny(tmp_path, teacher=False)
    real = record.write_text

    def dying(path: Path, text: str) -> None:
        if path.name == "config.yaml":
            raise KeyboardInterrupt
        real(path, text)

    monkeypatch.setattr(record, "write_text", dying)
    with pytest.raises(KeyboardInterrupt):
        freeze(job)
    assert not holds(job)
    monkeypatch.undo()
    freeze(job)
    assert holds(job)


# One process at a time


def hold(job: Any, opened: Any, done: Any) -> None:
    held = Record(job)
    opened.set()
    done.wait()
    held.close()


def test_second_process_is_refused_by_name(tmp_path: Path) -> None:
    job = tiny(tmp_path, teacher=False)
    opened, done = processes.Event(), processes.Event()
    process = processes.Process(target=hold, args=(job, opened, done))
    process.start()
    assert opened.wait(60)
    with pytest.raises(
        ValueError, match=rf"run_dir={job.run_dir} is in use by process {process.pid} on "
    ):
        Record(job)
    done.set()
    process.join()
    assert process.exitcode == 0
    Record(job).close()


def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    job = tiny(tmp_path, teacher=False)
    opened, done = processes.Event(), processes.Event()
    process = processes.Process(target=hold, args=(job, opened, done))
    process.start()
    assert opened.wait(60)
    assert not record.abandoned(Path(job.run_dir))
    process.kill()
    process.join()
    assert record.abandoned(Path(job.run_dir))
    left_over = Path(job.run_dir, ".last.ckpt.new.123.tmp")
    left_over.write_bytes(b"half")
    Record(job).close()
    assert not left_over.exists()


def test_logs_of_two_runs_stay_apart(tmp_path: Path) -> None:
    # The same job in two homes
    jobs = [tiny(tmp_path / place, teacher=False) for place in ("a", "b")]
    opened = [Record(job) for job in jobs]
    for number, each in enumerate(opened):
        each.log.info("this is run %d", number)
        each.close()
        each.log.info("nobody hears this")
    for number, each in enumerate(opened):
        text = (each.folder / "train.log").read_text()
        assert re.fullmatch(rf"\S+ \S+ INFO this is run {number}\n", text)
        assert not logging.getLogger(each.log.name).handlers


# Metrics and result


def test_append_is_idempotent(tmp_path: Path) -> None:
    opened = Record(tiny(tmp_path, teacher=False))
    for epoch in (1, 2, 2, 1, 3):
        opened.append({**ROW, "epoch": epoch})
    assert [row["epoch"] for row in opened.rows()] == [1, 2, 3]
    assert read_rows(opened.folder)[0] == ROW
    opened.close()


@pytest.mark.parametrize(
    "torn", [b'{"epoch": 2, "ti', b'{"epoch": 2, "time": 1}', b"\x00\x00\x00", b"{"]
)
def test_torn_last_line_is_mended(tmp_path: Path, torn: bytes) -> None:
    job = tiny(tmp_path, teacher=False)
    opened = Record(job)
    opened.append(ROW)
    path = opened.folder / "metrics.jsonl"
    opened.close()
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    assert read_rows(opened.folder) == [ROW]  # a reader ignores the incomplete line, too
    opened = Record(job)
    assert path.read_bytes() == whole
    opened.append({**ROW, "epoch": 2})
    assert [row["epoch"] for row in opened.rows()] == [1, 2]
    opened.close()


def test_result(tmp_path: Path) -> None:
    job = tiny(tmp_path, teacher=False)
    assert read_result(Path(job.run_dir)) == {}
    opened = Record(job)
    written = opened.result("FAILED", "why: é", best_top1=None, epochs=3)
    opened.close()
    assert read_result(opened.folder) == written
    assert written == {
        "run_id": None,
        "status": "FAILED",
        "reason": "why: é",
        "config_hash": cfg.config_hash(job),
        "best_top1": None,
        "epochs": 3,
        "requeues": 0,
        "time": written["time"],
    }
    assert not [name for name in os.listdir(opened.folder) if name.endswith(".tmp")]


def test_the_outcome_of_a_dead_process_keeps_what_was_measured(tmp_path: Path) -> None:
    job = tiny(tmp_path, teacher=False)
    opened = Record(job)
    opened.result("RUNNING", parameters=7, flops=9, group_size=2, best_top1=1.0)
    opened.append(ROW | {"time/epoch_s": 1.5})
    written = opened.write_outcome("KILLED", "its worker died")
    opened.close()
    assert {key: written[key] for key in ("parameters", "flops", "group_size", "best_top1")} == {
        "parameters": 7,
        "flops": 9,
        "group_size": 2,
        "best_top1": 50.0,
    }


def test_a_record_that_cannot_be_opened_is_not_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tiny(tmp_path, teacher=False)
    freeze(job)

    def fail(path: object) -> None:
        raise ValueError("another job")

    monkeypatch.setattr(record, "rotate", fail)
    (Path(job.run_dir) / "best.ckpt.new").touch()
    with pytest.raises(ValueError, match="another job"):
        Record(job)
    monkeypatch.undo()
    assert record.abandoned(Path(job.run_dir))


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_damaged_plan_of_a_sweep_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(record.Damaged, match=r"plan.json is damaged"):
        manifest.planned_jobs(tmp_path)


def test_a_damaged_count_of_requeues_is_named(tmp_path: Path) -> None:
    (tmp_path / "requeues.json").write_text("{")
    with pytest.raises(record.Damaged, match=r"requeues.json is damaged"):
        record.note_requeues(tmp_path, "7", 1)


def test_outside_code_is_kept_as_a_hash_of_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    loss, network = tmp_path / "my_loss.py", tmp_path / "my_room" / "networks.py"
    network.parent.mkdir()
    for file in (loss, network, network.parent / "__init__.py"):
        file.write_text("raise RuntimeError('nobody may import this')")
    job = tiny(tmp_path / "home")
    job.allow_foreign_targets = True
    job.distiller.loss = {"_target_": "my_loss.kl"}
    job.student.model = {"_target_": "my_room.networks.Small", "block": {"_target_": "lost.Block"}}
    freeze(job)
    kept = json.loads(Path(job.run_dir, "code.json").read_text())["own_code"]
    assert kept.keys() == {"my_loss", "my_room", "my_room.networks"}
    assert tags_of(Path(job.run_dir), job)["own_code"] == " ".join(
        f"{module}:{sha[:8]}" for module, sha in kept.items()
    )
    assert record.changed_code(job) == []
    network.write_text("edited")
    assert record.changed_code(job) == ["my_room.networks"]
    job.allow_foreign_targets = False
    assert record.changed_code(job) == []
