"""Test what machines do to runs: crashes at any point, damaged files and full disks."""

import logging
import os
import pkgutil
import random
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from sddlskd import record
from sddlskd.config import Config
from sddlskd.files import atomic as files
from sddlskd.files import checkpoint
from sddlskd.files.checkpoint import UnreadableFile
from sddlskd.training.fit import fit
from tests.crashing import Crash, ended, fit_again, forked, ready
from tests.tiny import processes, rows, same, same_outcome, tiny  # noqa: F401


def small(home: Path, *overrides: str) -> Config:
    """Return a job that trains for a third of a second."""
    return tiny(
        home,
        "distiller=vanilla",
        *overrides,
        model={"_target_": "tests.misbehaving.Tiny", "width": 128},
        teacher=False,
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Config:
    job = small(tmp_path_factory.mktemp("undisturbed"))
    fit([job])
    return job


def moved(job: Config, home: Path) -> Config:
    """Return the same job with another home."""
    return replace(job, home=str(home), run_dir=str(home / "runs" / Path(job.run_dir).name))


# Crashes at any point


def crash_everywhere(job: Config, undisturbed: Config, home: Path, queue: Any) -> None:
    """Crash the job at each file operation in turn, and let it finish afterwards.

    Put into `queue` what went wrong ("" if nothing) and the number of operations.
    """
    ready()
    wrong, at = "", 0
    while not wrong:
        crashed = moved(job, home / str(at))

        def until_the_crash(job: Config = crashed, at: int = at) -> None:
            Crash(Path(job.home).resolve(), at)
            fit([job])

        code = ended(forked(until_the_crash))
        again = ended(forked(lambda job=crashed: fit_again(job)))  # type: ignore[misc]
        at += 1
        if code not in (0, 9) or again:
            wrong = f"operation {at}: exit codes {code} and {again}"
        elif left := [path.name for path in Path(crashed.run_dir).glob(".*.ckpt*.tmp")]:
            wrong = f"operation {at}: {left}"
        elif not same_outcome(crashed, undisturbed) or not same(
            *(checkpoint.read(Path(j.run_dir, "best.ckpt")) for j in (crashed, undisturbed))
        ):
            wrong = f"operation {at}: another outcome"
        elif code == 0:
            break
        else:
            shutil.rmtree(crashed.home)
    queue.put((wrong, at))


@pytest.mark.slow
def test_crash_at_every_file_operation(tmp_path: Path, undisturbed: Config) -> None:
    queue = processes.SimpleQueue()
    process = processes.Process(
        target=crash_everywhere, args=(undisturbed, undisturbed, tmp_path, queue)
    )
    process.start()
    process.join()
    wrong, points = queue.get()
    assert not wrong
    # They freeze the job and write four checkpoints, two rows, three results and a teacher.
    assert points > 40


# Damaged files


def damages(content: bytes, seed: int) -> Iterator[bytes]:
    """Yield a hundred truncated copies and a hundred copies with one changed byte.

    The changed bytes include those that no checksum covers.
    """
    draw = random.Random(seed)
    for _ in range(100):
        yield content[: draw.randrange(len(content))]
    for at in [*range(-30, 0), *(draw.randrange(len(content)) for _ in range(70))]:
        damaged = bytearray(content)
        damaged[at] ^= draw.randrange(1, 256)
        yield bytes(damaged)


def test_no_spoilt_checkpoint_is_taken_for_a_good_one(undisturbed: Config, tmp_path: Path) -> None:
    names = (checkpoint.LATEST, checkpoint.SPARE)
    content = {name: Path(undisturbed.run_dir, name).read_bytes() for name in names}
    newest, spare = (checkpoint.read(Path(undisturbed.run_dir, name)) for name in names)
    harmless = 0
    for damaged in damages(content[checkpoint.LATEST], seed=0):
        (tmp_path / checkpoint.LATEST).write_bytes(damaged)
        (tmp_path / checkpoint.SPARE).write_bytes(content[checkpoint.SPARE])
        got = checkpoint.read_latest(tmp_path)
        assert same(got, spare) or same(got, newest)
        harmless += same(got, newest)
        (tmp_path / checkpoint.SPARE).unlink()
        if same(got, spare):
            with pytest.raises(
                UnreadableFile,
                match=rf"{tmp_path / checkpoint.LATEST} is .*or delete {tmp_path} to",
            ):
                checkpoint.read_latest(tmp_path)
    # Some bytes, such as padding and times, have no meaning. A truncated file is never harmless.
    assert harmless < 40


def test_a_cut_checkpoint_is_never_read(undisturbed: Config, tmp_path: Path) -> None:
    content, path = Path(undisturbed.run_dir, checkpoint.LATEST).read_bytes(), tmp_path / "x.ckpt"
    draw = random.Random(1)
    for length in [
        *range(len(content) - 30, len(content)),
        *(draw.randrange(len(content)) for _ in range(70)),
    ]:
        path.write_bytes(content[:length])
        with pytest.raises(UnreadableFile, match=f"{path} is truncated"):
            checkpoint.read(path)


READERS: dict[str, Callable[[Config], Any]] = {
    "result.json": lambda job: record.read_result(Path(job.run_dir)),
    "metrics.jsonl": lambda job: record.read_rows(Path(job.run_dir)),
    "config.yaml": record.holds,
}


@pytest.mark.parametrize("name", READERS)
def test_a_spoilt_record_is_named_or_harmless(
    undisturbed: Config, tmp_path: Path, name: str
) -> None:
    """Every error must be a ValueError of one line that names the file."""
    folder = tmp_path / "run"
    shutil.copytree(undisturbed.run_dir, folder)
    job, path, said = replace(undisturbed, run_dir=str(folder)), folder / name, []
    for damaged in islice(damages(path.read_bytes(), seed=2), 0, None, 5):
        path.write_bytes(damaged)
        try:
            READERS[name](job)
        except ValueError as error:
            said.append(str(error))
    assert len(said) > 10
    for text in said:
        assert str(path) in text or f"run_dir={folder} holds another job" in text
        assert "\n" not in text


def test_a_spoilt_result_is_deleted_and_the_run_goes_on(
    undisturbed: Config, tmp_path: Path
) -> None:
    job = moved(undisturbed, tmp_path)
    shutil.copytree(undisturbed.run_dir, job.run_dir)
    path = Path(job.run_dir, "result.json")
    path.write_bytes(b"\0" * 200)
    with pytest.raises(
        record.Damaged, match=rf"{path} is damaged .*delete it: the run then goes on from"
    ):
        fit([job])
    path.unlink()
    (result,) = fit([job])
    assert result["status"] == "FINISHED"
    assert same_outcome(job, undisturbed)


# A full disk


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Yield a file system of one megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True, text=True
    )
    if done.returncode:
        if os.environ.get("CI"):
            pytest.fail(f"no small disk: {done.stderr}")
        pytest.skip(f"a small disk can be mounted by root alone: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


def fill(disk: Path, room: int = 0) -> None:
    """Fill the disk except for `room` bytes."""
    with suppress(OSError), open(disk / "filler", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    os.truncate(disk / "filler", (disk / "filler").stat().st_size - room)


FULL = "No space left on device"


@pytest.mark.parametrize(
    # A room of 4096 bytes is enough for result.json.
    ("method", "named", "room"),
    [
        ("sddlskd.training.run.Run.end_epoch", "best.ckpt", 4096),
        ("sddlskd.files.checkpoint.write_latest", "last.ckpt.new", 4096),
        ("sddlskd.files.checkpoint.write_latest", "last.ckpt.new", 0),
        ("sddlskd.record.Record.append", "metrics.jsonl", 0),
        ("sddlskd.training.group.leave_as_teacher", "resnet8.pt", 4096),
        ("sddlskd.training.predictions.write", "predictions.npz", 0),
    ],
)
def test_full_disk(
    disk: Path,
    undisturbed: Config,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    method: str,
    named: str,
    room: int,
) -> None:
    """The disk is full when `method` is called.

    The run must stop and name the file and the bytes needed. With space again, the run must
    continue and have the same outcome as an undisturbed run.
    """
    job, calls = small(disk, "tracking.predictions=true"), [0]
    real, at = pkgutil.resolve_name(method), 2 if named in ("best.ckpt", "last.ckpt.new") else 1

    def in_the_end(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == at:
            if named == "best.ckpt":
                arguments[0].progress.best_top1 = -1.0  # then this epoch writes best.ckpt
            fill(disk, room)
        return real(*arguments, **options)

    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR, logger="sddlskd"):
        patch.setattr(method, in_the_end)
        (result,) = fit([job])
    why = (
        rf"cannot save \S+{re.escape(named)}: {FULL} \((\d+) bytes needed, (\d+) free\); free some"
    )
    match = re.search(why, caplog.text)
    assert match, caplog.text
    assert int(match[1]) > int(match[2])
    assert "Logging error" not in capfd.readouterr().err
    if room:
        assert result["status"] == "FAILED"
        assert f"{named}: {FULL}" in result["reason"]
    else:
        # The outcome could not be written, so the record still says RUNNING.
        assert result["status"] == "RUNNING"
        assert record.abandoned(Path(job.run_dir))
    assert not list(Path(job.run_dir).glob(".*.tmp"))
    # The previous checkpoint is still there.
    assert checkpoint.read_latest(Path(job.run_dir))["progress"]["epoch"] >= 2
    (disk / "filler").unlink()
    (result,) = fit([job])
    assert result["status"] == "FINISHED"
    assert same_outcome(job, undisturbed)
    assert Path(job.run_dir, "predictions.npz").exists()


def test_append_on_a_full_disk_leaves_whole_lines(disk: Path) -> None:
    path = disk / "metrics.jsonl"
    path.write_bytes(b"x" * 4089 + b"\n")
    before = path.read_bytes()
    fill(disk)
    with pytest.raises(OSError, match=rf"cannot save {path}: {FULL} \(100 bytes needed, 0 free\)"):
        files.append(path, b"y" * 99 + b"\n")
    assert path.read_bytes() == before
    (disk / "filler").unlink()
    files.append(path, b"y" * 99 + b"\n")
    assert path.read_bytes() == before + b"y" * 99 + b"\n"


def test_a_full_disk_at_the_start_is_one_line(disk: Path) -> None:
    fill(disk)
    with pytest.raises(OSError, match=FULL):
        fit([small(disk)])
    (disk / "filler").unlink()
    assert fit([small(disk)])[0]["status"] == "FINISHED"
