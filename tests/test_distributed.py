"""Test ranks that share each batch.

They must compute the same as one process. No rank may outlive the others or wait for a rank that
has ended.

Most tests run a function in several forked processes, which find each other by the environment
variables of torch, as the processes of a scheduler do. In the last tests, `fit` starts the ranks.
"""

import faulthandler
import functools
import importlib
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from torch import Tensor, nn
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from sddlskd import config as cfg
from sddlskd.config import Config
from sddlskd.data.device import DeviceData, seed_of, share_of
from sddlskd.datasets.arrays import Images, Splits
from sddlskd.models import Taps
from sddlskd.record import Onlooker, abandoned, read_result
from sddlskd.sweeps.precheck import problems
from sddlskd.training.build import build_data, build_network, build_run
from sddlskd.training.devices import DeviceFailure, check_places, pick_device
from sddlskd.training.evaluation import evaluate
from sddlskd.training.fit import fit
from sddlskd.training.ranks import RankFailed, Ranks, process_group, spawn
from sddlskd.training.run import Run
from sddlskd.training.teacher_files import path_of
from tests.made_once import made_once
from tests.tiny import (
    DIVERGES,
    TEST_IMAGES,
    Net,
    child,
    final,
    net,
    processes,
    rows,
    same,
    same_outcome,
    tiny,
)

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
ONE_IMAGE = 100 / TEST_IMAGES + 1e-6  # in %
PATIENCE = 240  # seconds until a rank counts as hanging; a loaded machine is slow


def _be(
    rank: int,
    count: int,
    port: int,
    hosted: bool,
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    faulthandler.register(signal.SIGUSR1)  # prints the place where the rank hangs
    cfg.frame()
    torch.set_num_threads(1)
    there = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_USE_AGENT_STORE": hosted,
    }
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "GLOO_SOCKET_IFNAME": "lo"}
    os.environ.update({key: str(value) for key, value in {**there, **here}.items()})
    work(*arguments)


class Started:
    """Started ranks that run work(*arguments)."""

    def __init__(
        self, count: int, work: Callable[..., Any], *arguments: Any, hosted: bool = True
    ) -> None:
        """Start `count` ranks.

        Args:
            count: number of ranks.
            work: function that each rank calls.
            *arguments: arguments of `work`.
            hosted: whether this process holds the store. If not, rank 0 holds it, at a port that
                was free a moment ago.
        """
        self.store = TCPStore(
            "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60)
        )
        told = (count, self.store.port, hosted, work, arguments)
        if not hosted:
            del self.store
        self.processes = [
            processes.Process(target=_be, args=(rank, *told)) for rank in range(count)
        ]
        for process in self.processes:
            process.start()

    def end(self) -> list[int | None]:
        """Wait until all ranks end by themselves, and return their exit codes."""
        end = time.monotonic() + PATIENCE
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            if process.exitcode is None:
                os.kill(process.pid, signal.SIGUSR1)
                process.join(1.0)
                process.kill()
                process.join()
        return codes


def on_ranks(count: int, work: Callable[..., Any], *arguments: Any) -> None:
    assert Started(count, work, *arguments).end() == [0] * count


def result_of(job: Config) -> dict[str, Any]:
    return read_result(Path(job.run_dir))


# Shares of a batch


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [7, 64, 300])
def test_shares_are_slices_of_the_batches(batch_size: int, ranks: int) -> None:
    images = torch.randint(
        256, (604, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    split = Images(images, torch.arange(604) % 10)
    made = functools.partial(
        DeviceData, Splits(split, Images(*(t[:37] for t in split))), num_classes=10,
        batch_size=batch_size, seed=3, device="cpu", mean=[0.5] * 3, std=[0.2] * 3,
        eval_batch_size=10,
    )  # fmt: skip
    whole, shares = made(), [made(rank=rank, ranks=ranks) for rank in range(ranks)]
    for start in (0, 1, whole.steps_per_epoch - 1, whole.steps_per_epoch):
        expected = list(whole.batches(2, start))
        assert len(expected) == whole.steps_per_epoch - start
        for rank, data in enumerate(shares):
            for batch, own in zip(expected, data.batches(2, start), strict=True):
                part = share_of(len(batch.labels), rank, ranks)
                assert same(own[:4], [tensor[part] for tensor in batch[:4]])
                assert (own.epoch, own.strong) == (2, None)
    labels = torch.cat([y for data in shares for _, y in data.val_batches()])
    assert same(labels, torch.cat([y for _, y in whole.val_batches()]))
    assert [sum(len(y) for _, y in data.test_batches()) for data in shares] == [37] * ranks


# Gradients and statistics


CASES: dict[str, tuple[Sequence[str], dict[str, Any] | None]] = {
    "plain": (["M=[1,2,4]", "optimizer.clip_norm=0.5"], net()),
    "sum": (["M=[1,2]", "distiller.reduction=sum", "recipe=sd_dkd"], net()),
    "batchnorm": (["M=[1,2,4]"], None),
    "alone": (["distiller=vanilla"], None),
    "deep": (["student=mobilev2", "M=[1]"], None),
}


def case(home: Path, name: str) -> Config:
    """Return a job with batches of 63, 63, 63 and 3 images.

    Two ranks get shares of 31 and 32 images, and cannot share the last batch.
    """
    overrides, model = CASES[name]
    return tiny(home, "trainer.batch_size=63", *overrides, model=model)


def gradients_of(job: Config, ranks: Ranks) -> dict[str, Any]:
    """Return gradients, statistics and metrics of every step of an epoch, at the initial weights.

    All is computed in float64.
    """
    data = build_data(job, CPU, rank=ranks.rank, ranks=ranks.world_size)
    student = ranks.with_shared_norm(build_network(job.student.model, 10, 0, CPU).double())
    teacher = (
        build_network(job.teacher.model, 10, 1, CPU).double().eval() if job.distiller.loss else None
    )
    run = build_run(
        job, student, Onlooker(job), CPU, data.steps_per_epoch, images=data.train_size, ranks=ranks
    )
    run.optimisation.learning_rate = lambda epochs_done: 0.0
    steps, statistics, seeds = [], [], []
    for batch in data.batches(1):
        batch = batch._replace(images=batch.images.double())
        with torch.no_grad():
            taps = Taps.of_map(teacher(batch.images)) if teacher else None
        run.train_step(batch, taps)
        seeds.append(torch.initial_seed())
        steps.append(
            [
                parameter.grad.clone()
                for parameter in student.parameters()
                if parameter.grad is not None
            ]
        )
        statistics.append({name: value.clone() for name, value in student.named_buffers()})
    run.check_loss()
    seen = run.progress.seen
    sums = ranks.all_gather(run.sums).sum(0) / seen
    val = evaluate(student.eval().float(), data.val_batches(), ranks=ranks)
    names = list(student.state_dict())
    return {"steps": steps, "buffers": statistics, "sums": sums, "seen": seen, "loss": run.loss,
            "val": val, "names": names, "seeds": seeds}  # fmt: skip


def keep_gradients(home: Path, jobs: dict[str, Config]) -> None:
    with process_group("cpu", 60) as ranks:
        for name, job in jobs.items():
            torch.save(
                gradients_of(job, ranks), home / f"{name}-{ranks.rank}-of-{ranks.world_size}.pt"
            )


@pytest.fixture(scope="module")
def gradients(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str, int, int], dict[str, Any]]:
    """Return a function (case, rank, ranks) -> what `gradients_of` returned on that rank."""

    def make(home: Path) -> None:
        jobs = {name: case(home, name) for name in CASES}
        for name, job in jobs.items():
            torch.save(gradients_of(job, Ranks()), home / f"{name}-0-of-1.pt")
        for count in (2, 3):
            on_ranks(count, keep_gradients, home, jobs)

    home = made_once(tmp_path_factory, "gradients", make)

    def read(name: str, rank: int, ranks: int) -> dict[str, Any]:
        content: dict[str, Any] = torch.load(home / f"{name}-{rank}-of-{ranks}.pt")
        return content

    return read


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_whole_batch(gradients: Any, name: str, ranks: int) -> None:
    """Gradients may differ by rounding, because the cross-entropy is computed in float32."""
    one, some = gradients(name, 0, 1), [gradients(name, rank, ranks) for rank in range(ranks)]
    assert len(one["steps"]) == 4
    for step, expected in enumerate(one["steps"]):
        scale = max(gradient.abs().max() for gradient in expected)
        assert scale > 0
        for rank in range(ranks):
            found = some[rank]["steps"][step]
            # All ranks must agree bit for bit; otherwise their weights would drift apart.
            assert same(found, some[0]["steps"][step])
            for ours, theirs in zip(found, expected, strict=True):
                assert (ours - theirs).abs().max() <= 2e-6 * scale
    assert all(part["names"] == one["names"] for part in some)


@pytest.mark.parametrize("ranks", [2, 3])
def test_statistics_of_batchnorm_are_those_of_the_whole_batch(gradients: Any, ranks: int) -> None:
    one, some = (
        gradients("batchnorm", 0, 1),
        [gradients("batchnorm", rank, ranks) for rank in range(ranks)],
    )
    for step, expected in enumerate(one["buffers"]):
        assert len(expected) == 3 * 9
        for rank in range(ranks):
            found = some[rank]["buffers"][step]
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", CASES)
def test_metrics_are_those_of_all_images(gradients: Any, name: str, ranks: int) -> None:
    one = gradients(name, 0, 1)
    for rank in range(ranks):
        found = gradients(name, rank, ranks)
        assert found["seen"] == one["seen"] == 192
        torch.testing.assert_close(found["sums"], one["sums"], rtol=1e-5, atol=0)
        assert found["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert found["sums"][3] == pytest.approx(one["sums"][3].item(), rel=1e-6)
        assert (found["val"]["top1"], found["val"]["top5"]) == (
            one["val"]["top1"],
            one["val"]["top5"],
        )
        assert found["val"]["loss"] == pytest.approx(one["val"]["loss"], rel=1e-5)


def test_ranks_drop_differently(gradients: Any) -> None:
    one, some = gradients("plain", 0, 1), [gradients("plain", rank, 3) for rank in range(3)]
    seeds = [seed for found in (one, *some) for seed in found["seeds"]]
    assert len(seeds) == len(set(seeds)) == 4 * 4
    assert one["seeds"] == [seed_of("seed", 0, "epoch", 1, "step", step) for step in range(4)]


def test_a_batchnorm_that_does_more_is_refused() -> None:
    class Loud(nn.BatchNorm2d):
        """A BatchNorm of a user, which may compute anything."""

    with pytest.raises(ValueError, match="1 is a Loud, which is not known to share"):
        Ranks(world_size=2, device=CPU).with_shared_norm(nn.Sequential(nn.Conv2d(3, 8, 1), Loud(8)))


# Whole jobs


GROUP = (("student=resnet8",), ("student=wrn_16_1", "optimizer.clip_norm=1.0"))
KEPT = ("tracking.predictions=true", "dataset.val_fraction=0.25", "teacher.cache=maps")


def signal_at(epoch: int, step: int, rank: int) -> Any:
    """Send SIGTERM to this process once, after the given step, if it is the given rank."""
    original = Run.train_step

    def watched(run: Run, *arguments: Any) -> None:
        original(run, *arguments)
        if (run.epoch, run.step, run.ranks.rank) == (epoch, step, rank):
            Run.train_step = original  # type: ignore[method-assign]
            signal.raise_signal(signal.SIGTERM)

    Run.train_step = watched  # type: ignore[method-assign]


def fit_the_house(home: Path) -> None:
    """Run the jobs that the tests below check, one after the other on the same ranks."""
    fit([tiny(home / "undisturbed")])
    fit([tiny(home / "grouped", *overrides) for overrides in GROUP])
    fit([tiny(home / "alone", *GROUP[1])])
    fit([tiny(home / "diverged", DIVERGES), tiny(home / "diverged")])
    fit([tiny(home / "half", "trainer.precision=fp16", "trainer.epochs=1")])
    fit([tiny(home / "kept", *KEPT, f"teacher.cache={home / 'maps'}")])
    fit([tiny(home / "taught", "teacher.train_if_missing=true", "teacher.train_epochs=1",
              "student=wrn_16_1", teacher=False)])  # fmt: skip
    for place, epoch, step, rank in STOPS:
        signal_at(epoch, step, rank)
        (result,) = fit([tiny(home / place)])
        assert (result["status"], result["reason"]) == ("KILLED", "stopped by SIGTERM")
    for place in [place for place, *_ in STOPS[:2]] + ["more ranks"]:
        fit([tiny(home / place)])


STOPS = (("first", 1, 1, 0), ("second", 2, 2, 1), ("fewer ranks", 1, 2, 1))


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:

    def make(home: Path) -> None:
        signal_at(1, 2, 0)
        assert fit([tiny(home / "more ranks")])[0]["status"] == "KILLED"
        on_ranks(2, fit_the_house, home)

    return made_once(tmp_path_factory, "house", make)


def close(a: Config, b: Config, epochs: int = 2) -> bool:
    """Return whether the metrics of two jobs are equal up to rounding.

    On some processors, rounding changes the class of one of the test images.
    """
    ours, theirs = rows(a), rows(b)
    if len(ours) != epochs or len(theirs) != epochs:
        return False
    for own, other in zip(ours, theirs, strict=True):
        for name in own.keys() | other.keys():
            tolerance = 1e-4
            if "top" in name:
                tolerance = ONE_IMAGE
            if own[name] != pytest.approx(other[name], rel=2e-2, abs=tolerance):
                return False
    return True


def test_two_ranks_train_as_one(house: Path, tmp_path: Path) -> None:
    alone, shared = tiny(tmp_path), tiny(house / "undisturbed")
    fit([alone])
    assert close(alone, shared)
    ours, theirs = final(shared), final(alone)
    for name in ("epoch", "step", "seen"):
        assert ours["progress"][name] == theirs["progress"][name]
    assert ours["model"].keys() == theirs["model"].keys()
    assert ours["optimizer"]["param_groups"] == theirs["optimizer"]["param_groups"]
    assert result_of(shared)["environment"].endswith("cpu, 1 threads, 2 ranks")
    assert Path(shared.run_dir, "train.log").read_text().count("finished") == 1


def test_grouped_is_alone_on_ranks(house: Path) -> None:
    first, second = (tiny(house / "grouped", *overrides) for overrides in GROUP)
    assert same_outcome(first, tiny(house / "undisturbed"))
    assert same_outcome(second, tiny(house / "alone", *GROUP[1]))


def test_a_student_that_diverges_leaves_alone_on_all_ranks(house: Path) -> None:
    bad = result_of(tiny(house / "diverged", DIVERGES))
    assert bad["status"] == "FAILED"
    assert "NonFiniteLoss: loss became nan at epoch 1, step 2" in bad["reason"]
    assert same_outcome(tiny(house / "diverged"), tiny(house / "undisturbed"))


@pytest.mark.parametrize("place", ["first", "second"])
def test_resumed_is_uninterrupted_on_ranks(house: Path, place: str) -> None:
    assert result_of(tiny(house / place))["status"] == "FINISHED"
    assert same_outcome(tiny(house / place), tiny(house / "undisturbed"))


def test_resumed_by_fewer_or_more_ranks(house: Path) -> None:
    fewer, more = tiny(house / "fewer ranks"), tiny(house / "more ranks")
    assert final(fewer)["sums"].shape == (2, 4)
    assert fit([fewer])[0]["status"] == result_of(more)["status"] == "FINISHED"
    assert close(fewer, tiny(house / "undisturbed"))
    assert close(more, tiny(house / "undisturbed"))
    assert final(fewer)["sums"].shape == final(more)["sums"].shape == (4,)


def test_ranks_skip_the_same_steps_of_fp16(house: Path, tmp_path: Path) -> None:
    overrides = ("trainer.precision=fp16", "trainer.epochs=1")
    shared, alone = tiny(house / "half", *overrides), tiny(tmp_path, *overrides)
    fit([alone])
    assert 0 < final(shared)["scaler"]["scale"] < 65536
    assert final(shared)["scaler"] == final(alone)["scaler"]
    assert close(shared, alone, epochs=1)


def test_what_a_student_leaves(house: Path) -> None:
    job = tiny(house / "kept", *KEPT, f"teacher.cache={house / 'maps'}")
    assert {"test_top1", "teacher_top1"} <= result_of(job).keys()
    with np.load(Path(job.run_dir, "predictions.npz")) as arrays:
        assert arrays["logits"].shape == (64, 10)
    (sums,) = (house / "maps").glob("*.sums")
    # The cache holds the maps of all training images of an epoch, not only of a rank's share.
    assert np.count_nonzero(np.fromfile(sums, np.uint32)) > 142


def test_a_teacher_is_trained_by_all_ranks(house: Path) -> None:
    job = tiny(house / "taught", "teacher.train_if_missing=true", "teacher.train_epochs=1",
               "student=wrn_16_1", teacher=False)  # fmt: skip
    assert result_of(job)["status"] == "FINISHED"
    teacher = cfg.teacher_job(job)
    assert result_of(teacher)["environment"].endswith("2 ranks")
    assert path_of(job.home, "fake", "resnet8").exists()


# Ranks that fail, end or are stopped


class Bad(Net):
    """A network that misbehaves as `how` says, in its second training step on one rank."""

    def __init__(self, num_classes: int, how: str, rank: int) -> None:
        super().__init__(num_classes)
        self.how, self.rank, self.steps = how, rank, 0

    def forward(self, images_BCHW: Tensor) -> Tensor:
        if self.training and len(images_BCHW) > 1 and os.environ.get("RANK") == str(self.rank):
            self.steps += 1
            if self.steps == 2:
                self.misbehave()
        return super().forward(images_BCHW)

    def misbehave(self) -> None:
        if self.how == "raises":
            raise RuntimeError("no good on one rank")
        if self.how == "lost":
            raise RuntimeError("CUDA error: GPU is lost")
        if self.how == "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "hangs":
            time.sleep(10 * PATIENCE)
        if self.how == "leaves":
            os._exit(3)


def bad(home: Path, how: str, rank: int, *overrides: str) -> Config:
    model = {"_target_": "tests.test_distributed.Bad", "how": how, "rank": rank}
    patience = 5 if how == "hangs" else PATIENCE
    return tiny(home, f"trainer.timeout_s={patience}", *overrides, model=model)


@pytest.mark.parametrize(
    ("how", "status", "reason"),
    [
        ("raises", "FAILED", "RuntimeError: no good on one rank"),
        ("lost", "KILLED", "RuntimeError: CUDA error: GPU is lost"),
    ],
)
def test_a_rank_that_raises_ends_the_others(
    tmp_path: Path, how: str, status: str, reason: str
) -> None:
    """No process watches over the ranks, as under a scheduler.

    Rank 0 holds the store and writes the record. A job whose device failed may continue elsewhere.
    """
    job = bad(tmp_path, how, 1)
    assert Started(2, fit, [job], hosted=False).end() == [1, 1]
    result = result_of(job)
    assert (result["status"], result["reason"]) == (status, reason)
    assert "in misbehave" in Path(job.run_dir, "train.log").read_text()


def test_a_device_of_several_that_fails_is_known(tmp_path: Path) -> None:
    jobs = [
        bad(tmp_path, "lost", 1, "trainer.devices=2"),
        tiny(tmp_path, "trainer.devices=2"),
    ]
    with pytest.raises(DeviceFailure, match="GPU is lost") as failed:
        fit(jobs)
    assert failed.value.place == 1
    assert [result_of(job)["status"] for job in jobs] == ["KILLED"] * 2


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("raises", "RuntimeError: no good on one rank"),
        ("is killed", "killed by SIGKILL; out of memory?"),
        ("leaves", "ended with exit code 3"),
        ("hangs", "another rank hangs or has ended (trainer.timeout_s limits the wait for it)"),
    ],
)
def test_a_rank_that_ends_ends_the_job(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], how: str, reason: str
) -> None:
    beside = tiny(tmp_path, "trainer.devices=2")
    job = bad(tmp_path, how, 1, "trainer.devices=2")
    if how in ("raises", "hangs"):
        results = fit([job, beside])
        assert results[1]["status"] == "KILLED"
        assert results[1]["reason"].startswith(
            f"{Path(job.run_dir).name} failed in the same group: RuntimeError: "
        )
        assert "in misbehave" in Path(job.run_dir, "train.log").read_text() + capfd.readouterr().err
    else:
        with pytest.raises(RankFailed, match=f"rank 1 of 2: {reason[:20]}"):
            fit([job])
    assert result_of(job)["status"] == "FAILED"
    assert result_of(job)["reason"].endswith(reason)
    assert not multiprocessing.active_children()


def fit_and_leave(job: Config, done: Path) -> None:
    fit([job])
    done.touch()


def wait_for(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("number", "reason"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGKILL, "SIGINT")]
)
def test_a_signal_to_the_first_process_stops_all_ranks(
    tmp_path: Path, number: int, reason: str
) -> None:
    """After SIGKILL, the ranks end as after Ctrl-C, with all checkpoints saved."""
    job = tiny(tmp_path, "trainer.devices=2", "trainer.epochs=400")
    process = child(job)
    wait_for(lambda: rows_so_far(job))
    os.kill(process.pid, number)
    wait_for(lambda: result_of(job)["status"] == "KILLED" and abandoned(Path(job.run_dir)))
    process.join()
    assert process.exitcode == (0 if number == signal.SIGTERM else -number)
    assert result_of(job)["reason"] == f"stopped by {reason}"
    assert final(job)["progress"]["epoch"] <= 400


def test_ranks_that_wait_for_a_teacher_stop_at_once(tmp_path: Path) -> None:
    """The ranks wait while another job trains their teacher.

    They have nothing to save, and there is no step after which they could stop.
    """
    job = tiny(tmp_path, "trainer.devices=2", "teacher.train_if_missing=true", teacher=False)
    path = path_of(job.home, job.dataset.name, job.teacher.name)
    path.parent.mkdir(parents=True)
    with FileLock(f"{path}.lock"):
        process = child(job)
        wait_for_quiet(process.pid, children=2)
        os.kill(process.pid, signal.SIGTERM)
        process.join(PATIENCE / 4)
        assert process.exitcode == 1  # the process raised KeyboardInterrupt
    assert not path.exists()
    assert not result_of(job)


def ticks_of_children(parent: int) -> list[int]:
    """Return the processor time of each child process of `parent`, in hundredths of a second."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[1]) == parent:
                found.append(int(fields[11]) + int(fields[12]))
    return found


def wait_for_quiet(parent: int, children: int) -> None:
    """Wait until `parent` has so many child processes and they use almost no processor time."""

    def quiet() -> bool:
        before = ticks_of_children(parent)
        time.sleep(1.0)
        return len(before) == children and sum(ticks_of_children(parent)) - sum(before) < 20

    wait_for(quiet)


def rows_so_far(job: Config) -> bool:
    return Path(job.run_dir, "metrics.jsonl").exists()


REFUSED = {
    (
        "trainer.batch_size=3",
    ): r"batch_size=3 is too small for 2 processes to share; give at least 4",
    ("M=[1,32]",): r"M=\[1, 32\] is too fine: the largest scale here is 8",
    # Every rank takes a batch of one image as a whole: BatchNorm sees it once, not twice.
    ("student=mobilev2", "M=[1]", "trainer.batch_size=191"): (
        r"mobilev2 cannot train on .* set trainer.batch_size=192"
    ),
    # The ranks of torchrun count, although trainer.devices is 1.
    ("features=sp",): (
        r"trainer.devices=2 cannot train features=\[sp\]: .*; set trainer.devices=1, "
        r"and start one process \(WORLD_SIZE=2 here\)"
    ),
    ("standardize=batch",): r"trainer.devices=2 cannot train standardize=batch: .*WORLD_SIZE=2",
}


def be_refused(home: Path, words: tuple[str, ...], refusal: str) -> None:
    # One rank raises ValueError itself; the other may learn of it from that rank (RankFailed).
    with pytest.raises((ValueError, RankFailed), match=refusal):
        fit([tiny(home, *words)])


@pytest.mark.parametrize("words", REFUSED)
def test_refused_by_every_rank(tmp_path: Path, words: tuple[str, ...]) -> None:
    on_ranks(2, be_refused, tmp_path, words, REFUSED[words])


def test_refused_in_one_line_by_the_ranks(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"trainer\.device=cuda needs CUDA"):
        fit([tiny(tmp_path, "trainer.device=cuda", "trainer.devices=2")])


def test_more_ranks_than_cores_are_refused_before_any_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SDDLSKD_MOST_PROCESSES")
    cores = len(os.sched_getaffinity(0))
    check_places("cpu", cores)
    job = tiny(tmp_path, "trainer.devices=1000")
    said = (
        f"^trainer.devices=1000 asks for more processes than the {cores} cores here, .* 200000 MB"
    )
    with pytest.raises(ValueError, match=said):
        fit([job])
    assert not Path(job.run_dir).exists()
    ((_, reason),) = problems([job])
    assert re.search(said, reason)


def test_the_environment_overrides_the_number_of_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDDLSKD_MOST_PROCESSES", "2000")
    check_places("cpu", 2000)
    with pytest.raises(ValueError, match="give at most 2000"):
        check_places("cpu", 2001)
    for wrong in ("-1", "0", "many"):
        monkeypatch.setenv("SDDLSKD_MOST_PROCESSES", wrong)
        with pytest.raises(ValueError, match=f"^SDDLSKD_MOST_PROCESSES={wrong} is not valid"):
            check_places("cpu", 2)


SLOW_MODULE = """
import os, time
from pathlib import Path

folder = Path(__file__).parent
if (folder / "slow").exists():
    (folder / f"{os.getpid()}.importing").touch()
    time.sleep(600)


def work():
    raise AssertionError("never called")
"""


def spawn_slowly(folder: Path) -> None:
    sys.path.insert(0, str(folder))
    work = importlib.import_module("slow_module").work
    (folder / "slow").touch()
    spawn(work, (), 2, threads=1, stop=lambda: 0)


def is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def test_ranks_that_still_import_end_with_their_parent(tmp_path: Path) -> None:
    (tmp_path / "slow_module.py").write_text(SLOW_MODULE)
    parent = processes.Process(target=spawn_slowly, args=(tmp_path,))
    parent.start()
    wait_for(lambda: len(list(tmp_path.glob("*.importing"))) == 2)
    ranks = [int(path.stem) for path in tmp_path.glob("*.importing")]
    assert all(is_running(rank) for rank in ranks)
    parent.kill()
    parent.join()
    end = time.monotonic() + 5
    while any(is_running(rank) for rank in ranks):
        assert time.monotonic() < end, "the ranks outlive their parent"
        time.sleep(0.02)


def test_pick_device_gives_each_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [pick_device(name, 1, 2) for name in ("cuda", "auto", "cpu")] == [
        torch.device("cuda:1")
    ] * 2 + [CPU]
    with pytest.raises(
        ValueError, match=r"trainer.devices=3 asks for more GPUs than the 2 here; give 1..2"
    ):
        check_places("cuda", 3)
    check_places("cuda", 2)
    # A scheduler shows one GPU to each of two processes.
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert pick_device("cuda", 1, 2) == torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(
        ValueError, match=r"trainer\.device=cuda:1 is one device for 2 processes; use cuda or cpu"
    ):
        pick_device("cuda:1", 0, 2)
