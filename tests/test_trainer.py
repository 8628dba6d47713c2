"""Test the training loop: the outcome must be the same, whatever interrupts the training."""

import dataclasses
import functools
import json
import random
import re
import signal
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sddlskd import config as cfg
from sddlskd import record
from sddlskd.config import Config
from sddlskd.data.device import Batch
from sddlskd.distill import ScaleDecoupled
from sddlskd.files import checkpoint
from sddlskd.losses import kd
from sddlskd.models import Taps
from sddlskd.record import Record
from sddlskd.sweeps.precheck import problems
from sddlskd.training import outcomes
from sddlskd.training.build import build_data, build_network
from sddlskd.training.checks import check_batches
from sddlskd.training.devices import seeded
from sddlskd.training.evaluation import evaluate
from sddlskd.training.fit import fit
from sddlskd.training.objective import Objective
from sddlskd.training.ranks import Ranks
from sddlskd.training.run import Progress, Run
from sddlskd.training.teacher import Teacher
from sddlskd.training.teacher_files import path_of
from tests.test_tracking import runs_of
from tests.tiny import (
    BASE,
    DIVERGES,
    STEPS,
    ForkedCommand,
    child,
    composed,
    final,
    leave_teacher,
    net,
    rows,
    same,
    same_outcome,
    tiny,
)

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
GROUP = (
    ("student=resnet8", "M=[1]"),
    ("student=wrn_16_1", "M=[1,2,4]", "optimizer.clip_norm=1.0"),
    ("student=resnet14", "recipe=sd_dkd", "M=[2]"),
)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Return a job that was trained without interruption."""
    job = tiny(tmp_path_factory.mktemp("undisturbed"))
    fit([job])
    return job


def after(
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    condition: Callable[[Run], bool],
    act: Callable[[], Any],
) -> None:
    """Call `act` once, after the first call of a method of Run for which `condition` is true."""
    original, left = getattr(Run, method), [act]

    def wrapped(self: Run, *arguments: Any, **named: Any) -> None:
        original(self, *arguments, **named)
        if left and condition(self):
            left.pop()()

    monkeypatch.setattr(Run, method, wrapped)


def stop(monkeypatch: pytest.MonkeyPatch, method: str, condition: Callable[[Run], bool]) -> None:
    after(monkeypatch, method, condition, lambda: signal.raise_signal(signal.SIGTERM))


def result_of(job: Config) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(Path(job.run_dir, "result.json").read_text())
    return content


def saved_at(job: Config) -> int:
    """Return the time of the last checkpoint in ns, or 0 if there is none at the moment."""
    try:
        return Path(job.run_dir, "last.ckpt").stat().st_mtime_ns
    except FileNotFoundError:
        return 0


# A run in a group equals the run alone


def test_grouped_is_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = Teacher.__call__
    monkeypatch.setattr(
        Teacher,
        "__call__",
        lambda self, x, views=None: (calls.append(len(x)), original(self, x))[1],
    )
    together = [tiny(tmp_path / "together", *overrides) for overrides in GROUP]
    assert [r["status"] for r in fit(together)] == ["FINISHED"] * 3
    # The teacher runs once per batch, not once per student, and once on the 64 test images.
    assert calls.count(64) == 2 * STEPS + 1
    for overrides, grouped in zip(GROUP, together, strict=True):
        alone = tiny(tmp_path / "alone", *overrides)
        fit([alone])
        assert same_outcome(alone, grouped)
        assert len(rows(alone)) == 2


def test_students_of_a_group_differ(tmp_path: Path) -> None:
    jobs = [tiny(tmp_path, "trainer.data_seed=7", f"seed={seed}") for seed in (0, 1)]
    networks = [build_network(job.student.model, 10, job.seed, CPU) for job in jobs]
    assert not same(networks[0].state_dict(), networks[1].state_dict())
    batches = [next(build_data(job, CPU).batches(1)) for job in jobs]
    assert same(*batches)
    assert [r["status"] for r in fit(jobs)] == ["FINISHED"] * 2
    with pytest.raises(ValueError, match="cannot share batches"):
        fit([tiny(tmp_path, f"seed={seed}") for seed in (0, 1)])


@pytest.mark.parametrize("raises", ["training", "evaluation"])
def test_a_student_that_raises_fails_alone(
    tmp_path: Path, undisturbed: Config, raises: str
) -> None:
    bad, good = tiny(tmp_path, model=net(raises=raises)), tiny(tmp_path)
    results = fit([bad, good])
    assert [r["status"] for r in results] == ["FAILED", "FINISHED"]
    assert results[0]["reason"] == f"RuntimeError: no good at {raises}"
    assert same_outcome(good, undisturbed)


def test_a_student_that_diverges_fails_alone(tmp_path: Path, undisturbed: Config) -> None:
    bad, good = tiny(tmp_path, DIVERGES), tiny(tmp_path)
    results = fit([bad, good])
    assert [r["status"] for r in results] == ["FAILED", "FINISHED"]
    assert "loss became nan at epoch 1, step 2; lower optimizer.lr" in results[0]["reason"]
    assert same_outcome(good, undisturbed)
    assert not Path(bad.run_dir, "best.ckpt").exists()


def test_weights_broken_by_the_last_step_are_no_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tiny(tmp_path, "distiller=vanilla", "student=resnet14")

    def spoil(run: Run, *_: Any) -> None:
        with torch.no_grad():
            next(run.model.parameters()).fill_(float("nan"))

    original = Run.train_step
    monkeypatch.setattr(
        Run, "train_step", lambda run, *a: (original(run, *a), run.step == STEPS and spoil(run))[0]
    )
    (result,) = fit([job])
    assert result["status"] == "FAILED"
    assert "val/loss became nan at epoch 1, step 3" in result["reason"]
    assert not path_of(job.home, "fake", "resnet14").exists()


def test_stop_after_a_failure_keeps_the_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One student fails in the step after which the other is stopped; only the other is saved."""
    bad, good = (
        tiny(tmp_path, DIVERGES, "trainer.log_every=2"),
        tiny(tmp_path, "trainer.log_every=2"),
    )
    stop(monkeypatch, "train_step", lambda run: run.step == 2)
    results = fit([bad, good])
    assert [r["status"] for r in results] == ["FAILED", "KILLED"]
    assert not Path(bad.run_dir, "last.ckpt").exists()
    assert Path(good.run_dir, "last.ckpt").exists()


# A resumed run equals an uninterrupted run


@pytest.mark.parametrize(
    ("method", "epoch", "step"),
    [("end_epoch", 2, 0), ("train_step", 1, 1), ("train_step", 2, 2), ("train_step", 2, 3)],
)
def test_resumed_is_uninterrupted(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: Config,
    method: str,
    epoch: int,
    step: int,
) -> None:
    job = tiny(tmp_path)
    stop(monkeypatch, method, lambda run: (run.epoch, run.step) == (epoch, step))
    (killed,) = fit([job])
    assert (killed["status"], killed["reason"]) == ("KILLED", "stopped by SIGTERM")
    progress = final(job)["progress"]
    assert (progress["epoch"], progress["step"]) == (epoch, step)
    (result,) = fit([job])
    assert result["status"] == "FINISHED"
    assert same_outcome(job, undisturbed)
    assert [row["epoch"] for row in rows(job)] == [1, 2]
    assert result["best_top1"] == result_of(undisturbed)["best_top1"]


def test_seconds_of_an_epoch_span_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = tiny(tmp_path, "trainer.epochs=1")
    after(monkeypatch, "train_step", lambda run: run.step == 1, lambda: time.sleep(2.0))
    stop(monkeypatch, "train_step", lambda run: run.step == 1)
    fit([job])
    monkeypatch.undo()
    (result,) = fit([job])
    row = json.loads(Path(job.run_dir, "metrics.jsonl").read_text())
    assert row["time/epoch_s"] >= 2.0
    assert row["time/images_per_s"] <= 192 / 2.0
    assert result["seconds"] >= 2.0


def test_seconds_of_an_epoch_do_not_count_the_steps_of_other_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that resumes after step 2 waits while the run beside it does steps 1 and 2."""
    resumed, new = (
        tiny(tmp_path, "trainer.epochs=1", f"student={name}") for name in ("resnet8", "wrn_16_1")
    )
    with monkeypatch.context() as patch:
        stop(patch, "train_step", lambda run: run.step == 2)
        fit([resumed])
    spent = checkpoint.read(Path(resumed.run_dir, "last.ckpt"))["progress"]["spent"]
    after(monkeypatch, "train_step", lambda run: run.step == 1, lambda: time.sleep(1.0))
    assert [result["status"] for result in fit([resumed, new])] == ["FINISHED"] * 2
    seconds = [
        json.loads(Path(job.run_dir, "metrics.jsonl").read_text())["time/epoch_s"]
        for job in (resumed, new)
    ]
    assert spent < seconds[0] < spent + seconds[1] - 1.0


def test_group_of_interrupted_and_new_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Config
) -> None:
    jobs = [tiny(tmp_path), tiny(tmp_path, "student=wrn_16_1")]
    stop(monkeypatch, "train_step", lambda run: (run.epoch, run.step) == (2, 2))
    fit(jobs[:1])
    assert [r["status"] for r in fit(jobs)] == ["FINISHED"] * 2
    alone = tiny(tmp_path / "alone", "student=wrn_16_1")
    fit([alone])
    assert same_outcome(jobs[0], undisturbed)
    assert same_outcome(jobs[1], alone)


def test_dropout_is_the_same_alone_grouped_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, grouped, resumed = (
        tiny(tmp_path / place, model=net(dropout=0.5)) for place in ("a", "b", "c")
    )
    fit([alone])
    fit([tiny(tmp_path / "b", "student=wrn_16_1"), grouped])
    stop(monkeypatch, "train_step", lambda run: (run.epoch, run.step) == (1, 2))
    fit([resumed])
    fit([resumed])
    assert same_outcome(alone, grouped)
    assert same_outcome(alone, resumed)
    without = tiny(tmp_path / "d", model=net(dropout=0.0))
    fit([without])
    assert rows(without) != rows(alone)


@pytest.mark.long
def test_killed_at_any_moment(tmp_path: Path) -> None:
    """Kill after a random number of checkpoints, on slow and on fast machines."""
    overrides = ("trainer.epochs=24", "checkpoint.every_minutes=0.0001")
    undisturbed, job = (
        tiny(tmp_path / "undisturbed", *overrides),
        tiny(tmp_path / "killed", *overrides),
    )
    process = child(undisturbed)
    process.join()
    draw, inside = random.Random(0), 0
    for _ in range(4):
        process = child(job)
        last, left = saved_at(job), draw.randint(1, 6)
        while process.is_alive() and left:
            now = saved_at(job)
            left -= now not in (0, last)
            last = now or last
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.02))
        process.kill()
        process.join()
        inside += process.exitcode == -signal.SIGKILL and result_of(job)["status"] == "RUNNING"
    assert inside >= 2
    process = child(job)
    process.join()
    assert process.exitcode == 0
    assert result_of(job)["status"] == "FINISHED"
    assert same_outcome(job, undisturbed)
    assert [row["epoch"] for row in rows(job)] == list(range(1, 25))
    assert not list(Path(job.run_dir).glob("*.tmp")) + list(Path(job.run_dir).glob(".*.ckpt*.tmp"))


def test_metrics_that_did_not_reach_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Config
) -> None:
    """If the process dies between both files, the row is taken from the checkpoint."""
    job = tiny(tmp_path)

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("sddlskd.record.Record.append", die)
        fit([job])
    assert not Path(job.run_dir, "metrics.jsonl").exists()
    fit([job])
    assert same_outcome(job, undisturbed)


def test_finished_job_is_not_run_again(
    tmp_path: Path, undisturbed: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {p: p.stat().st_mtime_ns for p in Path(undisturbed.run_dir).iterdir()}
    (result,) = fit([undisturbed])
    assert result["status"] == "FINISHED"
    assert {p: p.stat().st_mtime_ns for p in Path(undisturbed.run_dir).iterdir()} == before


def test_ctrl_c_saves_and_the_same_command_continues(tmp_path: Path) -> None:
    leave_teacher(tmp_path)
    folder = tmp_path / "run"

    def start() -> ForkedCommand:
        words = (*BASE, "trainer.epochs=20", f"hydra.run.dir={folder}", f"home={tmp_path}")
        return ForkedCommand(tmp_path, "sddlskd.train", *words, cwd=ROOT)

    process = start()
    while process.poll() is None and not (folder / "metrics.jsonl").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    code, output, errors = process.end()
    assert code == 130, errors
    assert "the same command continues" in output
    result = json.loads((folder / "result.json").read_text())
    assert (result["status"], result["reason"]) == ("KILLED", "stopped by SIGINT")
    assert checkpoint.read(folder / "last.ckpt")["progress"]["epoch"] <= 20
    code, _, errors = start().end()
    assert code == 0, errors
    assert json.loads((folder / "result.json").read_text())["status"] == "FINISHED"
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == list(range(1, 21))


# Refusals


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["M=[1,32]"], r"M=\[1, 32\] is too fine: the largest scale here is 8.*set M=\[1\]"),
        (["trainer.batch_size=193"], "batch_size=193 is larger than the 192 images of"),
        (["trainer.device=cuda:99"], "trainer.device=cuda:99"),
        (
            ["teacher=resnet14", "teacher.train_if_missing=false"],
            "teacher=resnet14 for fake is missing",
        ),
        (
            ["tracking=mlflow", "tracking.uri=http://127.0.0.1:9"],
            "tracking.uri=http://127.0.0.1:9 does not answer",
        ),
        (["tracking=mlflow", "tracking.uri=nonsense"], "tracking.uri=nonsense is not valid"),
    ],
)
def test_refused_early_leaves_nothing_behind(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    job = tiny(tmp_path, *overrides)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((ValueError, OSError), match=message):
        fit([job])
    assert [
        p for p in sorted(tmp_path.rglob("*")) if p not in before and "top1.json" not in p.name
    ] == []


@pytest.mark.parametrize(
    ("size", "lacking"),
    [("2", "RANK, MASTER_PORT, MASTER_ADDR"), ("two", "WORLD_SIZE, RANK, MASTER_PORT, MASTER_ADD")],
)
def test_a_number_of_ranks_without_their_addresses_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: str, lacking: str
) -> None:
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(ValueError, match=f"^WORLD_SIZE={size} .* no valid {lacking}.* torchrun"):
        fit([tiny(tmp_path)])


def test_scales_are_checked_before_a_teacher_is_trained(tmp_path: Path) -> None:
    job = tiny(tmp_path, "M=[32]", "teacher.train_if_missing=true", teacher=False)
    with pytest.raises(ValueError, match=r"M=\[32\] is too fine"):
        fit([job])
    assert list(tmp_path.iterdir()) == []


def test_another_job_in_the_run_dir_is_refused_although_finished(undisturbed: Config) -> None:
    other = tiny(Path(undisturbed.home), "optimizer.lr=0.01")
    other.run_dir = undisturbed.run_dir
    with pytest.raises(
        ValueError, match=r"holds another job \(optimizer.lr=0.05 there, 0.01 here\)"
    ):
        fit([other])


def test_another_teacher_in_the_middle_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tiny(tmp_path)
    stop(monkeypatch, "train_step", lambda run: run.step == 1)
    fit([job])
    path = path_of(job.home, "fake", "resnet8")
    weights = checkpoint.read_weights(path)
    weights["fc.bias"] += 1
    checkpoint.write(path, {"model": weights})
    with pytest.raises(ValueError, match="begun with another teacher file"):
        fit([job])


def test_a_run_with_unreadable_checkpoints_fails_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoilt, new, begun = (
        tiny(tmp_path, f"M={M}", "tracking=mlflow") for M in ("[1]", "[2]", "[1,2]")
    )
    with monkeypatch.context() as patch:
        stop(patch, "end_epoch", lambda run: run.epoch == 2)
        fit([spoilt, begun])
    for path in Path(spoilt.run_dir).glob("*.ckpt"):
        path.write_bytes(b"spoilt")
    results = fit([spoilt, new, begun])
    assert [result["status"] for result in results] == ["FAILED", "FINISHED", "FINISHED"]
    assert re.search(r"UnreadableFile: .*last.ckpt", results[0]["reason"])
    assert (results[0]["epochs"], results[0]["best_epoch"], results[0]["group_size"]) == (1, 1, 2)
    assert results[0]["environment"] == results[1]["environment"]
    runs = {run.data.tags["run_dir"]: run.info.status for run in runs_of(spoilt)}
    assert runs == {spoilt.run_dir: "FAILED", new.run_dir: "FINISHED", begun.run_dir: "FINISHED"}
    with pytest.raises(checkpoint.UnreadableFile):
        fit([spoilt])  # without other jobs, the error is raised


def test_jobs_frozen_by_a_sweep_become_failed_if_they_cannot_start(tmp_path: Path) -> None:
    job = tiny(tmp_path, "teacher=resnet14", "teacher.train_if_missing=false")
    record.freeze(job)
    with pytest.raises(FileNotFoundError):
        fit([job])
    assert result_of(job)["status"] == "FAILED"
    assert "teacher=resnet14" in result_of(job)["reason"]


class Unwritable(Record):
    """A record whose outcome cannot be written."""

    opened: ClassVar[list[Record]] = []

    def write_outcome(self, status: str, reason: str) -> dict[str, Any]:
        self.opened.append(self)  # so that the garbage collector does not release the lock
        raise OSError("the disk is broken")


def test_a_record_that_cannot_be_marked_failed_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tiny(tmp_path, "teacher=resnet14", "teacher.train_if_missing=false")
    record.freeze(job)
    monkeypatch.setattr(outcomes, "Record", Unwritable)
    with pytest.raises(FileNotFoundError):
        fit([job])
    (opened,) = Unwritable.opened
    assert record.abandoned(opened.folder)
    assert opened.log.handlers == []


def test_a_checkpoint_of_an_earlier_version_tells_the_same_progress() -> None:
    """Earlier versions saved lists in place of names."""
    state = {"position": [3, 2, 128], "scores": [55.5, 1, 54.0], "seconds": [12.5, 0.25]}
    progress = Progress(
        epoch=3,
        step=2,
        seen=128,
        best_top1=55.5,
        best_epoch=1,
        last_top1=54.0,
        seconds=12.5,
        spent=0.25,
    )
    assert Progress.saved_in(state) == progress
    assert Progress.saved_in({"progress": asdict(progress)}) == progress


# The parts of a step


def test_the_objective_weighs_and_warms_up_its_losses() -> None:
    torch.manual_seed(0)
    student_map, teacher_map = torch.randn(2, 8, 10, 4, 4)
    images, target = torch.empty(8, 3, 4, 4), torch.arange(8)
    distill = ScaleDecoupled(functools.partial(kd, temperature=2.0), [1, 2])
    objective = Objective(distill, ce_weight=0.5, kd_weight=3.0, warmup_epochs=4)
    for epoch, warmup in ((1, 0.25), (3, 0.75), (4, 1.0), (9, 1.0)):
        batch = Batch(images, target, target, views=None, epoch=epoch)
        losses = objective.losses(Taps.of_map(student_map), Taps.of_map(teacher_map), batch)
        assert losses["loss_ce"] == F.cross_entropy(student_map.mean((2, 3)), target)
        assert losses["loss_kd"] == distill(student_map, teacher_map, target)
        expected = 0.5 * losses["loss_ce"] + 3.0 * warmup * losses["loss_kd"]
        assert losses["loss"] == expected
    plain = Objective(None, ce_weight=0.5, kd_weight=3.0, warmup_epochs=4)
    losses = plain.losses(Taps.of_map(student_map), None, batch)
    assert losses["loss"] == 0.5 * losses["loss_ce"]
    assert losses["loss_kd"] == 0


class NoSync(TorchDispatchMode):
    """A mode in which operations that make the host wait for the device are errors."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        # lift_fresh copies a tensor of Python numbers to the device, and the copy waits.
        assert name not in {
            "_local_scalar_dense",
            "nonzero",
            "masked_select",
            "equal",
            "lift_fresh",
            "unique",
        }, name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "overrides",
    [
        ["M=[1,2,4]"],
        ["distiller=vanilla", "student=wrn_16_1"],
        ["optimizer.clip_norm=0.5"],
        ["recipe=sd_dkd"],
    ],
)
def test_step_reads_nothing_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str]
) -> None:
    original, steps = Run.train_step, []

    def watched(self: Run, *arguments: Any) -> None:
        with NoSync():
            original(self, *arguments)
        steps.append(self.step)
        with pytest.raises(AssertionError, match="_local_scalar_dense"), NoSync():
            self.check_loss()

    monkeypatch.setattr(Run, "train_step", watched)
    assert fit([tiny(tmp_path, *overrides)])[0]["status"] == "FINISHED"
    assert len(steps) == 2 * STEPS


def test_bf16_on_the_cpu(tmp_path: Path, undisturbed: Config) -> None:
    job = tiny(tmp_path, "trainer.precision=bf16")
    assert fit([job])[0]["status"] == "FINISHED"
    ours, theirs = rows(job)[0]["train/loss"], rows(undisturbed)[0]["train/loss"]
    assert ours != theirs
    assert ours == pytest.approx(theirs, rel=0.01)
    assert {value.dtype for value in final(job)["model"].values()} == {torch.float32, torch.int64}


def test_fp16_with_its_loss_scale_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # With this weight, the first steps overflow.
    overrides = ("trainer.precision=fp16", "distiller.kd_weight=900")
    whole, resumed = (
        tiny(tmp_path / place, *overrides, model=net()) for place in ("whole", "resumed")
    )
    fit([whole])
    stop(monkeypatch, "train_step", lambda run: (run.epoch, run.step) == (1, 2))
    fit([resumed])
    assert final(resumed)["scaler"]["scale"] < 65536
    fit([resumed])
    assert same_outcome(whole, resumed)


def test_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Config) -> None:
    compiled = []
    real = functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", lambda model: (compiled.append(model), real(model))[1])
    job = tiny(tmp_path, "trainer.compile=true")
    assert fit([job])[0]["status"] == "FINISHED"
    assert len(compiled) == 3  # the teacher's logit map, its taps, and the student
    assert rows(job)[-1]["train/loss"] == pytest.approx(
        rows(undisturbed)[-1]["train/loss"], rel=1e-3
    )
    assert final(job)["model"].keys() == final(undisturbed)["model"].keys()


def test_best_checkpoint_is_of_the_best_epoch_on_the_held_out_images(tmp_path: Path) -> None:
    job = tiny(tmp_path, "dataset.val_fraction=0.25", "trainer.epochs=4", "optimizer.lr=0.02")
    (result,) = fit([job])
    data = build_data(job, CPU)
    assert (data.train_size, data.val_size) == (142, 50)
    best = checkpoint.read(Path(job.run_dir, "best.ckpt"))
    scores = [row["val/top1"] for row in rows(job)]
    assert best["top1"] == max(scores) == result["best_top1"]
    assert best["epoch"] == 1 + scores.index(max(scores)) == result["best_epoch"]
    network = build_network(job.student.model, 10, 0, CPU)
    network.load_state_dict(best["model"])
    assert evaluate(network.eval(), data.val_batches())["top1"] == best["top1"]
    assert evaluate(network.eval(), data.test_batches())["top1"] == result["test_top1"]
    network.load_state_dict(final(job)["model"])
    assert evaluate(network.eval(), data.val_batches()) == {
        name: rows(job)[-1][f"val/{name}"] for name in ("top1", "top5", "loss")
    }


def test_train_metrics_are_means_over_the_images(tmp_path: Path) -> None:
    """The batches have 80, 80 and 32 images, so the last batch must count less."""
    job = tiny(
        tmp_path,
        "trainer.batch_size=80",
        "trainer.epochs=1",
        "distiller=vanilla",
        "student=wrn_16_1",
    )
    seen: list[tuple[int, float]] = []
    original = Run.train_step

    def watched(self: Run, batch: Batch, teacher_map: Any) -> None:
        before = self.sums[0].item()
        original(self, batch, teacher_map)
        count = len(batch.labels)
        seen.append((count, (self.sums[0].item() - before) / count))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "train_step", watched)
        fit([job])
    assert [count for count, _ in seen] == [80, 80, 32]
    assert rows(job)[0]["train/loss"] == pytest.approx(
        sum(n * loss for n, loss in seen) / 192, rel=1e-5
    )
    assert rows(job)[0]["train/loss"] == pytest.approx(rows(job)[0]["train/loss_ce"])


def test_teacher_is_trained_once_by_two_processes(tmp_path: Path) -> None:
    overrides = ("teacher.train_if_missing=true", "teacher.train_epochs=1")
    jobs = [
        tiny(tmp_path, *overrides, f"student={s}", teacher=False) for s in ("wrn_16_1", "resnet14")
    ]
    started = [child(job) for job in jobs]
    for process in started:
        process.join()
        assert process.exitcode == 0
    assert [result_of(job)["status"] for job in jobs] == ["FINISHED"] * 2
    assert len({result_of(job)["teacher_sha256"] for job in jobs}) == 1
    teacher = cfg.teacher_job(jobs[0])
    assert Path(teacher.run_dir, "train.log").read_text().count("running") == 1
    assert [row["epoch"] for row in rows(teacher)] == [1]


# The last batch of an epoch can have one image


@pytest.mark.parametrize(
    ("images", "size", "cure"),
    [(192, 191, 192), (16, 5, 6), pytest.param(13, 3, 5, id="4 leaves one image, too")],
)
def test_a_last_batch_of_one_image_is_refused_before_the_first_step(
    tmp_path: Path, images: int, size: int, cure: int
) -> None:
    job = tiny(tmp_path, "student=mobilev2", "recipe=vanilla", f"trainer.batch_size={size}")
    job.dataset.load["train"] = images
    says = (
        r"^student=mobilev2 cannot train on a batch of one image \(Expected more than 1 .*"
        rf"{images} images in batches of {size}; set trainer\.batch_size={cure}, "
        r"or leave that batch out with dataset\.drop_last=true$"
    )
    with pytest.raises(ValueError, match=says):
        fit([job])
    ((_, reason),) = problems([job])
    assert re.search(says, reason)
    assert not Path(job.run_dir).exists()
    without = dataclasses.replace(job, dataset=dataclasses.replace(job.dataset, drop_last=True))
    without.run_dir += "-without"
    job.trainer.batch_size = cure
    for mended in (job, without):
        (result,) = fit([mended])
        assert result["status"] == "FINISHED"


@pytest.mark.parametrize(
    "words",
    [
        ("student=resnet8", "trainer.batch_size=191"),  # its smallest map has more than one cell
        ("student=mobilev2", "trainer.batch_size=191", "trainer.max_steps=1", "M=[1]"),
        ("student=mobilev2", "trainer.batch_size=190", "M=[1]", "optimizer.lr=1e-4"),
    ],
)
def test_batches_that_the_student_can_take_are_trained_on(
    tmp_path: Path, words: tuple[str, ...]
) -> None:
    (result,) = fit([tiny(tmp_path, *words, "trainer.epochs=1")])
    assert result["status"] == "FINISHED"


def test_a_teacher_that_is_trained_on_the_spot_names_the_batch_size_of_the_data_set(
    tmp_path: Path,
) -> None:
    words = ("teacher=mobilev2", "teacher.train_if_missing=true", "dataset.batch_size=191", "M=[1]")
    job = tiny(tmp_path, *words, "trainer.batch_size=64", teacher=False)
    with pytest.raises(ValueError, match=r"batches of 191; set dataset\.batch_size=192, which "):
        fit([job])
    assert not Path(job.run_dir).exists()


def test_new_ends_are_another_start_of_the_student(tmp_path: Path) -> None:
    words = ("student=vgg8", "recipe=vanilla", "trainer.epochs=1", "trainer.max_steps=1")
    losses = []
    for new_ends in (False, True):
        job = tiny(tmp_path, *words, f"dataset.new_ends={new_ends}")
        fit([job])
        losses += [row["train/loss"] for row in rows(job)]
    assert losses[0] != losses[1]


def test_the_check_of_the_batches_changes_nothing(tmp_path: Path) -> None:
    job = tiny(tmp_path, "trainer.batch_size=191")
    student = nn.Sequential(nn.Conv2d(3, 10, 3), nn.BatchNorm2d(10), nn.Dropout(0.5))
    before = {name: value.clone() for name, value in student.state_dict().items()}
    random_state = torch.get_rng_state()
    check_batches(job, student, build_data(job, CPU), Ranks())
    assert same(dict(student.state_dict()), before)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_more_decoding_processes_than_cores_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SDDLSKD_MOST_PROCESSES")
    for name in ("train/a", "train/b", "val/a", "val/b"):
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (40, 40), (number, 0, 0)).save(folder / f"{number}.png")
    job = composed(
        tmp_path, "dataset=image_folder", "dataset.name=two", "dataset.num_classes=2",
        "dataset.size=32", "dataset.stem=small", "dataset.workers=1000",
        f"dataset.root={tmp_path / 'images'}", "student=resnet8", "recipe=vanilla", "trainer=cpu",
        "trainer.batch_size=4", "trainer.epochs=1", "tracking=none", "trainer.progress=off",
    )  # fmt: skip
    said = "^dataset.workers=1000 asks for more processes than the .* cores here, .* give at most"
    with pytest.raises(ValueError, match=said):
        fit([job])
    assert not Path(job.run_dir).exists()
    ((_, reason),) = problems([job])
    assert re.search(said, reason)
    job.dataset.workers = 1
    (result,) = fit([job])
    assert result["status"] == "FINISHED"


def test_a_seeded_block_draws_the_same_and_leaves_the_generator_alone() -> None:
    before = torch.random.get_rng_state()
    drawn = []
    for _ in range(2):
        with seeded(7, torch.device("cpu")):
            drawn.append(torch.rand(3))
    assert torch.equal(*drawn)
    assert torch.equal(before, torch.random.get_rng_state())
