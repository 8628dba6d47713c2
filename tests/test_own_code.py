"""Test that a record names the version of the user's own code that trained its run."""

import hashlib
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sddlskd import record, worker
from sddlskd.config import Config, sources
from sddlskd.config.targets import check_code
from sddlskd.sweeps import run_sweep
from sddlskd.sweeps.pool import Pool
from sddlskd.sweeps.precheck import report
from sddlskd.training import group
from sddlskd.training.begun import check_same_code
from sddlskd.training.fit import fit
from tests.tiny import ForkedWorker, tiny

LOSS = """
import my_util
def loss(s, t, y, **_): return my_util.soften(s - t).square().mean(1)
"""
ROW = '{"epoch": 1, "val/top1": 9.0, "time/epoch_s": 1.0}\n'
HELPER = "def soften(x): return {} * x\n"


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Yield a folder of the user with a loss and its helper, from which Python imports."""
    room = tmp_path / "room"
    room.mkdir()
    (room / "my_l2.py").write_text(LOSS)
    (room / "my_util.py").write_text(HELPER.format(1))
    monkeypatch.syspath_prepend(room)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield room
    forget()


def forget() -> None:
    """Let Python import the modules anew, as another process does."""
    for name in ("my_l2", "my_util"):
        sys.modules.pop(name, None)
    importlib.invalidate_caches()


def edit(room: Path, factor: int = 2) -> None:
    (room / "my_util.py").write_text(HELPER.format(factor))


def of(home: Path, *overrides: str) -> Config:
    own = ("recipe=none", "distiller.name=mine", "+distiller.loss={_target_:my_l2.loss}")
    return tiny(home, *own, "trainer.epochs=1", *overrides)


def recorded(job: Config) -> dict[str, str]:
    versions: dict[str, str] = json.loads(Path(job.run_dir, "code.json").read_text())["own_code"]
    return versions


def hash_of(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_modules_that_the_user_s_file_imports_count(room: Path) -> None:
    inner = room / "my_room" / "inner"
    inner.mkdir(parents=True)  # a folder without __init__.py is a package, too
    (room / "my_room" / "__init__.py").write_text("import torch, numpy, json\n")
    (room / "my_room" / "parts.py").write_text("import my_room.inner.deep as deep\n")
    (inner / "deep.py").write_text("from .. import parts\ndef later():\n    from my_l2 import x\n")
    (room / "my_broken.py").write_text("def f(\n")
    (room / "main.py").write_text("from my_room.parts import a\nimport my_broken, my_lost\n")
    found = sources.versions_of(["main.f", "torch.nn.Linear"])
    del found["torch"], found["torch.nn"]  # what a target names counts wherever it is
    assert found == {
        "main": hash_of(room / "main.py"),
        "my_broken": hash_of(room / "my_broken.py"),
        "my_l2": hash_of(room / "my_l2.py"),
        "my_room": hash_of(room / "my_room" / "__init__.py"),
        "my_room.inner.deep": hash_of(inner / "deep.py"),
        "my_room.parts": hash_of(room / "my_room" / "parts.py"),
        "my_util": hash_of(room / "my_util.py"),
    }
    assert not {"my_room", "my_l2", "my_util"} & sys.modules.keys()


def test_an_edited_helper_is_a_change_unless_the_record_is_older(
    room: Path, tmp_path: Path
) -> None:
    job = of(tmp_path)
    record.freeze(job)
    assert record.changed_code(job) == []
    edit(room)
    assert record.changed_code(job) == ["my_util"]
    kept = Path(job.run_dir, "code.json")
    code = json.loads(kept.read_text())
    del code["own_code"]["my_util"]
    kept.write_text(json.dumps(code))
    assert record.changed_code(job) == []


def test_the_version_in_use_is_the_imported_one(room: Path) -> None:
    before = hash_of(room / "my_util.py")
    check_code({"_target_": "my_l2.loss"}, "distiller.loss")
    edit(room)
    check_code({"_target_": "my_l2.loss"}, "distiller.loss")
    assert sources.versions_in_use(["my_l2.loss"])["my_util"] == before
    importlib.reload(sys.modules["my_util"])
    check_code({"_target_": "my_l2.loss"}, "distiller.loss")
    assert sources.versions_in_use(["my_l2.loss"])["my_util"] == hash_of(room / "my_util.py")
    (room / "my_util.py").unlink()
    check_code({"_target_": "my_l2.loss"}, "distiller.loss")
    assert sources.versions_in_use(["my_l2.loss"]).keys() == {"my_l2"}


def test_a_file_that_changes_during_its_import_is_refused(room: Path) -> None:
    own = room / "my_l2.py"
    own.write_text(f"from pathlib import Path\nPath({str(own)!r}).write_text('')\n{LOSS}")
    with pytest.raises(ValueError, match="my_l2 has changed while it was imported; run the"):
        check_code({"_target_": "my_l2.loss"}, "distiller.loss")


def test_a_job_whose_code_has_changed_since_the_launch_is_refused(
    room: Path, tmp_path: Path
) -> None:
    job = of(tmp_path)
    record.freeze(job)
    before = recorded(job)
    edit(room)
    with pytest.raises(ValueError, match=r"launched with another version of my_util\.py; "):
        fit([job], launched=True)
    assert recorded(job) == before
    assert record.read_result(Path(job.run_dir))["status"] == "FAILED"
    # Without a launch, the record gets what trained the run.
    (result,) = fit([job])
    assert result["status"] == "FINISHED"
    assert recorded(job)["my_util"] == hash_of(room / "my_util.py") != before["my_util"]


def test_a_sweep_trains_the_version_of_its_launch(room: Path, tmp_path: Path) -> None:
    job = of(tmp_path)

    class Worker(ForkedWorker):
        """A worker that runs in this process, and imports the user's files anew."""

        def __init__(self, command: list[str], **options: Any) -> None:
            forget()
            self.code = worker.run([Path(command[-1])], progress="off")

        def poll(self) -> int:
            return self.code

        returncode = property(poll)

    class LateWorker(Worker):
        """A worker that starts after an edit of the user."""

        def __init__(self, command: list[str], **options: Any) -> None:
            edit(room)
            super().__init__(command)

    def sweep(start: type[Worker]) -> None:
        run_sweep([job], "own", runner=Pool("auto", fail_fast=False, start=start), precheck=report)

    with pytest.raises(SystemExit, match="1"):
        sweep(LateWorker)
    reason = record.read_result(Path(job.run_dir))["reason"]
    assert "another version of my_util.py; launch it again" in reason
    sweep(Worker)
    assert record.read_result(Path(job.run_dir))["status"] == "FINISHED"
    assert recorded(job)["my_util"] == hash_of(room / "my_util.py")


def test_an_edit_between_import_and_record_does_not_count(
    room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = of(tmp_path)
    before = hash_of(room / "my_util.py")

    def edited(*arguments: object, original: Callable[..., object] = group._load_data) -> object:
        edit(room)
        return original(*arguments)

    monkeypatch.setattr(group, "_load_data", edited)
    (result,) = fit([job])
    assert (result["status"], recorded(job)["my_util"]) == ("FINISHED", before)


def test_a_run_does_not_continue_with_other_code(room: Path, tmp_path: Path) -> None:
    begun, beside = of(tmp_path), of(tmp_path, "M=[2]")
    record.freeze(begun)
    before = (room / "my_util.py").read_bytes()
    Path(begun.run_dir, "metrics.jsonl").write_text(ROW)
    edit(room)
    results = fit([begun, beside])
    assert [result["status"] for result in results] == ["FAILED", "FINISHED"]
    assert results[0]["reason"] == (
        f"ValueError: run_dir={begun.run_dir} was begun with another version of my_util.py; put "
        "that version back, or delete the folder to start anew"
    )
    (room / "my_util.py").write_bytes(before)
    forget()
    check_code(begun.distiller.loss, "distiller.loss")
    check_same_code(begun, Path(begun.run_dir), launched=True)
