"""Test captured steps: on the CPU, a stand-in for the graph gives the same numbers as before."""

import logging
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sddlskd import config as cfg
from sddlskd.config import Config
from sddlskd.data.device import Batch
from sddlskd.record import read_result
from sddlskd.training.capture import Captured, Watch, _Graph
from sddlskd.training.devices import number_formats
from sddlskd.training.fit import fit
from sddlskd.training.objective import _Noting
from sddlskd.training.optimisation import Optimisation
from tests.gpu.captured import NOT_CAPTURED, obstacles
from tests.gpu.group import build_group, small_job
from tests.gpu.placement import META
from tests.stopping import stopped_at
from tests.tiny import net, same_outcome, tiny

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]
SHORT = ("+dataset.load.train=176",)  # the last of three batches has 48 images
COMMON = (*SHORT[:0], "trainer.epochs=3")
# Each with something that a recording bakes in: warm-ups, methods that read the epoch and the
# indices, a first stage, a learnt temperature, clipping, and Adam with its counters.
GROUP = (
    ("recipe=kd", "distiller.warmup_epochs=2"),
    ("recipe=sd_kd_ls", "M=[1,2]", "optimizer.clip_norm=1.0", "student=wrn_16_1"),
    ("recipe=crd", "features.crd.method.K=16", "features.crd.warmup_epochs=2"),
    ("recipe=fsp", "features.fsp.method.stage_epochs=2"),
    ("recipe=ctkd", "optimizer=adamw"),
)


def job_of(home: Path, capture: str, *words: str) -> Config:
    """Return a small job whose epochs end with a shorter batch."""
    return tiny(
        home, "dataset.load.train=176", "trainer.epochs=3", f"trainer.capture={capture}", *words
    )


def jobs_of(home: Path, capture: str) -> list[Config]:
    return [job_of(home, capture, *words) for words in GROUP]


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> Counter[Captured]:
    """Count the repeated recordings of each object that records."""
    counted: Counter[Captured] = Counter()
    original = Captured._repeat

    def counting(self: Captured) -> None:
        counted[self] += 1
        original(self)

    monkeypatch.setattr(Captured, "_repeat", counting)
    return counted


@pytest.fixture(scope="module")
def eager(tmp_path_factory: pytest.TempPathFactory) -> list[Config]:
    """Return a group of jobs that was trained without captured steps."""
    jobs = jobs_of(tmp_path_factory.mktemp("eager"), "off")
    assert [result["status"] for result in fit(jobs)] == ["FINISHED"] * len(jobs)
    return jobs


def test_captured_steps_give_the_same_numbers(
    tmp_path: Path, eager: list[Config], replays: Counter[Captured]
) -> None:
    jobs = jobs_of(tmp_path, "on")
    assert [result["status"] for result in fit(jobs)] == ["FINISHED"] * len(jobs)
    for ours, theirs in zip(jobs, eager, strict=True):
        assert same_outcome(ours, theirs)
    for job in jobs:
        assert read_result(Path(job.run_dir))["environment"].endswith(", captured steps")
    # Every run and the teacher have repeated a step.
    assert len(replays) == len(jobs) + 1
    # A run that has ended keeps no recording.
    assert [each for each in replays if each._what == "steps" and each._graph is not None] == []


def test_a_captured_run_alone_equals_the_one_in_a_group(
    tmp_path: Path, eager: list[Config]
) -> None:
    job = job_of(tmp_path, "on", *GROUP[2])
    fit([job])
    assert same_outcome(job, eager[2])


@pytest.mark.parametrize(("before", "after"), [("on", "on"), ("on", "off"), ("off", "on")])
def test_a_resumed_run_may_be_captured_or_not(
    tmp_path: Path, eager: list[Config], before: str, after: str
) -> None:
    some = (1, 4)
    stopped = [job_of(tmp_path, before, *GROUP[number]) for number in some]
    with stopped_at(2, 2):
        assert {result["status"] for result in fit(stopped)} == {"KILLED"}
    jobs = [job_of(tmp_path, after, *GROUP[number]) for number in some]
    assert [job.run_dir for job in jobs] == [job.run_dir for job in stopped]
    fit(jobs)
    for job, number in zip(jobs, some, strict=True):
        assert same_outcome(job, eager[number])


def test_a_recording_is_kept_while_nothing_that_it_bakes_in_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: Counter[str] = Counter()
    original = Captured._record

    def counting(self: Captured, function: Any) -> bool:
        made[self._what] += 1
        return original(self, function)

    monkeypatch.setattr(Captured, "_record", counting)
    jobs = [
        tiny(tmp_path, "trainer.capture=on", "trainer.epochs=4", words)
        for words in ("recipe=at", "M=[1]")
    ]
    fit(jobs)
    assert made == {"steps": 2, "forward passes of the teacher": 1}
    made.clear()
    fit(
        [
            tiny(
                tmp_path,
                "trainer.capture=on",
                "trainer.epochs=4",
                "recipe=kd",
                "distiller.warmup_epochs=2",
            )
        ]
    )
    # Weights change once, after the first epoch, and the second step of an epoch is recorded.
    assert made["steps"] == 2


def test_a_recording_of_the_teacher_fills_the_taps_that_students_read(tmp_path: Path) -> None:
    """A run that reads inner maps joins for a single step, after which there are new taps."""
    jobs = [small_job(tmp_path, recipe, "trainer.capture=on") for recipe in ("kd", "at")]
    group = build_group(jobs, CPU, image_CHW=(3, 16, 16), images=192)
    alone = group.runs[:1]
    assert group.teacher is not None
    for runs in (*[alone] * 3, group.runs, *[alone] * 4):
        batch = group.batch._replace(images=torch.randn_like(group.batch.images))
        _, taps = group.inputs(batch, runs)
        assert taps is not None
        assert torch.equal(taps.logit_map, group.teacher(batch.images))


def test_a_cached_teacher_is_not_captured_and_its_students_are(
    tmp_path: Path, replays: Counter[Captured]
) -> None:
    """The cache is filled by the first training and read by the second one."""
    cache = f"teacher.cache={tmp_path / 'cache'}"
    jobs = [tiny(tmp_path / choice, cache, f"trainer.capture={choice}") for choice in ("off", "on")]
    for job in jobs:
        fit([job])
    assert same_outcome(*jobs)
    assert [each._what for each in replays] == ["steps"]


@pytest.mark.parametrize(
    ("words", "model", "reason"),
    [
        ((), net(dropout=0.5), "random numbers are drawn"),
        (("optimizer=dot",), None, "the optimizer DOT cannot be captured"),
        (("recipe=kdsvd",), None, "the host waits for _linalg_svd"),
    ],
    ids=["dropout", "dot", "svd"],
)
def test_what_cannot_be_captured_runs_as_before(
    tmp_path: Path, replays: Counter[Captured], words: tuple[str, ...], model: Any, reason: str
) -> None:
    jobs = [
        tiny(tmp_path / capture, f"trainer.capture={capture}", *words, model=model)
        for capture in ("on", "off")
    ]
    for job in jobs:
        fit([job])
    assert same_outcome(*jobs)
    assert "captured steps" not in read_result(Path(jobs[0].run_dir))["environment"]
    told = Path(jobs[0].run_dir, "train.log").read_text()
    assert told.count("steps are not captured") == 1
    assert reason in told
    assert len(replays) <= 1  # the teacher alone


def test_work_is_called_after_its_recording_was_dropped() -> None:
    log = logging.getLogger("sddlskd.test")
    total, batch = torch.zeros(()), torch.ones(3)
    captured = Captured("sums", CPU, log)
    for _ in range(3):
        captured(lambda: total.add_(batch.sum()), [batch], None)
    assert (float(total), captured.replays) == (9.0, 2)
    captured.release()
    captured(lambda: total.zero_(), [batch], None)
    assert float(total) == 0.0


def test_other_tensors_and_other_values_are_recorded_anew() -> None:
    log = logging.getLogger("sddlskd.test")
    total = torch.zeros(())
    captured = Captured("sums", CPU, log)
    one, two = torch.ones(3), torch.ones(3)

    def add(batch: Tensor, weight: float) -> None:
        total.add_(weight * batch.sum())

    for batch, weight in [(one, 1.0)] * 3 + [(two, 1.0)] * 3 + [(two, 2.0)] * 3:
        captured(partial(add, batch, weight), [batch], weight)
    assert float(total) == 9 + 9 + 18
    assert captured.replays == 6
    # The recording repeats what it was given, whatever function comes with the same tensors.
    captured(lambda: total.zero_(), [two], 2.0)
    assert float(total) == 42.0


def no_room() -> None:
    raise torch.OutOfMemoryError("no room for the step either")


def test_numbers_of_numpy_are_not_recorded() -> None:
    total, batch = torch.zeros(()), torch.ones(3)
    captured = Captured("sums", CPU, logging.getLogger("sddlskd.test"))
    captured(lambda: total.add_(float(np.random.rand())), [batch], None)
    assert captured.reason == "random numbers are drawn"


def test_an_error_while_recording_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    log = logging.getLogger("sddlskd.test")
    monkeypatch.setattr("sddlskd.training.capture._StandIn", refused)
    total, batch = torch.zeros(()), torch.ones(3)
    captured = Captured("sums", CPU, log)
    for _ in range(3):
        captured(lambda: total.add_(batch.sum()), [batch], None)
    assert float(total) == 9.0
    assert captured.reason == "RuntimeError: operation not permitted when stream is capturing"


@pytest.mark.parametrize("is_full", [True, False])
def test_a_device_that_is_too_full_for_a_recording_may_hold_the_step(
    monkeypatch: pytest.MonkeyPatch, is_full: bool
) -> None:
    """The end of a recording raises an error of its own."""

    def full(*_: Any) -> None:
        try:
            raise torch.OutOfMemoryError("full")
        finally:
            raise RuntimeError("the recording is not valid")

    monkeypatch.setattr("sddlskd.training.capture._StandIn", full)
    total, batch = torch.zeros(()), torch.ones(3)
    captured = Captured("sums", CPU, logging.getLogger("sddlskd.test"))
    captured(partial(total.add_, 1.0), [batch], None)
    if is_full:
        with pytest.raises(torch.OutOfMemoryError, match="no room for the step either"):
            captured(no_room, [batch], None)
    else:
        captured(partial(total.add_, 1.0), [batch], None)
        assert float(total) == 2.0
    assert captured.reason == "RuntimeError: the recording is not valid"


def test_torch_records_once_more_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Older versions of torch need that, and the graph that failed."""
    ended: list[object] = []

    @contextmanager
    def recording(graph: object, **_: Any) -> Iterator[None]:
        yield
        ended.append(graph)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr("sddlskd.training.capture.FAILED", failed := list[object]())
    stream: Any = SimpleNamespace(device=CPU)
    with pytest.raises(torch.OutOfMemoryError):
        _Graph(no_room, stream)
    assert (len(failed), len(ended)) == (1, 1)
    _Graph(lambda: None, stream)
    assert (len(failed), len(ended)) == (1, 2)


def test_which_recipes_can_be_captured(tmp_path: Path) -> None:
    """The checks of tests/gpu look at all recipes."""
    some = ("crd", "mlkd", "fsp", "mld", *NOT_CAPTURED)
    found = obstacles(tmp_path, some)
    assert found.keys() == NOT_CAPTURED.keys()
    assert all(reason in found[recipe] for recipe, reason in NOT_CAPTURED.items())


def test_the_watch_finds_what_a_recording_cannot_repeat() -> None:
    gpu, mask = torch.zeros(3, device="meta"), torch.zeros(3, dtype=torch.bool, device="meta")
    for work in (
        lambda: gpu.copy_(torch.ones(3), non_blocking=True),
        lambda: torch.ones(3).to("meta", non_blocking=True),
        lambda: gpu[mask] if False else torch.ops.aten.index_put(gpu, [mask], gpu[:1]),
        lambda: torch.linalg.eigh(torch.zeros(3, 3, device="meta")),
    ):
        with Watch(META) as watch:
            work()
        assert len(watch.found) == 1
    with Watch(META) as watch:
        gpu.add_(1.0).sum().mul(2.0).to(torch.bfloat16)
        torch.full((), 2.0, device="meta")
    assert watch.found == []


def test_a_resumed_adam_copies_nothing_in_its_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without numbers stand for those on the GPU."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    gpu = torch.device("cuda", 0)
    with FakeTensorMode():
        weight = torch.nn.Parameter(torch.empty(3, device=gpu))
        weight.grad = torch.empty(3, device=gpu)
        adam = torch.optim.AdamW([weight], lr=1e-3)
        state = {"step": torch.tensor(5.0), "exp_avg": weight.grad, "exp_avg_sq": weight.grad}
        adam.load_state_dict({**adam.state_dict(), "state": {0: state}})
        optimisation = Optimisation(adam, lambda _: 1e-3, None, torch.amp.GradScaler(enabled=False))
        optimisation.capture_on(gpu)
        with Watch(gpu) as watch, optimisation._reading_rate():
            assert adam.state[weight]["step"].device == gpu  # where the fused kernel reads it
    assert watch.found == []


def test_what_a_method_reads_of_the_epoch_is_noted(tmp_path: Path) -> None:
    for recipe, reads in (("at", False), ("crd", True), ("mgd", True)):
        group = build_group([small_job(tmp_path, recipe)], CPU, image_CHW=(3, 16, 16), images=192)
        group.step()
        (run,) = group.runs
        assert run.objective.reads_epoch is reads
        assert (run.objective.fixed_by(5) == run.objective.fixed_by(6)) is not reads


@pytest.mark.parametrize(
    "read",
    [
        lambda batch: batch._replace(strong=None),
        lambda batch: batch._asdict(),
        lambda batch: Batch(*batch),
        lambda batch: batch[4],
        lambda batch: batch.epoch,
    ],
    ids=["replace", "asdict", "unpack", "index", "epoch"],
)
def test_no_way_of_reading_the_epoch_is_missed(read: Callable[[Batch], object]) -> None:
    batch = _Noting(torch.zeros(1), torch.zeros(1), torch.zeros(1), None, 3)
    assert (batch.images, batch.labels, batch.was_read) == (0, 0, False)
    read(batch)
    assert batch.was_read


def test_a_learnt_temperature_is_fixed_after_its_ramp(tmp_path: Path) -> None:
    job = small_job(tmp_path, "ctkd")
    (run,) = build_group([job], CPU, image_CHW=(3, 16, 16), images=192).runs
    ramp = int(job.distiller.learned_temperature["ramp_epochs"])
    fixed = [run.objective.fixed_by(epoch) for epoch in (ramp - 1, ramp, ramp + 1)]
    assert fixed[0] != fixed[1] == fixed[2]


def test_number_formats_are_restored() -> None:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32
    for tf32 in (True, False):
        with number_formats(tf32):
            assert (cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32) == (True, tf32, False)
        assert (cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32) == before


def test_which_new_settings_count(tmp_path: Path) -> None:
    plain = tiny(tmp_path)
    for word, counts in (
        ("capture=on", False),
        ("tf32=false", True),
        ("compile_mode=max_autotune", True),
    ):
        job = tiny(tmp_path, f"trainer.{word}")
        assert (cfg.config_hash(job) != cfg.config_hash(plain)) is counts
        assert cfg.sharing_key(job) != cfg.sharing_key(plain)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_checks_for_a_gpu_pass_on_a_cpu(tmp_path: Path) -> None:
    """`make gpu DEVICE=cpu` passes, so that a GPU is not the first to find what is broken."""
    report = tmp_path / "report.md"
    command = [sys.executable, "-m", "tests.gpu", "--device", "cpu", "--only", "right"]
    # Other tests use the cores at the same time.
    command += ["--patience", "10", "--out", str(report)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1400)
    assert done.returncode == 0, done.stdout
    assert "Outcome: passed" in report.read_text()
