"""Measure the steps of a training on a device, and tell times, ratios and memory.

On the CPU the same code runs with small networks and few steps. That shows that it works; its times
say nothing.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from sddlskd.config import Config
from sddlskd.data.device import Batch, DeviceData
from sddlskd.datasets.arrays import fake
from sddlskd.training.build import build_network
from sddlskd.training.devices import number_formats
from tests.gpu.group import NEEDED, STEPS, Group, build_group, recipes
from tests.gpu.plain_step import MEAN, STD, PlainJob, endless
from tests.gpu.report import CannotRun, Check, table
from tests.tiny import CONF, composed

__all__ = ["measurements"]

BATCH_SIZE = 64
EPOCHS = 240
LOADER_WORKERS = 4
WEAK = "weak views"


@dataclass(frozen=True)
class Variant:
    """One way to compute a step.

    Attributes:
        name: its name in the report.
        precision: "fp32", "bf16" or "fp16".
        tf32: whether float32 convolutions may round their inputs to TF32, as trainer.tf32 says.
        capture: whether the steps are captured.
        compile: whether the networks are compiled.
    """

    name: str
    precision: str
    tf32: bool
    capture: bool = False
    compile: bool = False


EAGER = (
    Variant("eager fp32", "fp32", tf32=False),
    Variant("eager fp32 with TF32", "fp32", tf32=True),
    Variant("eager bf16", "bf16", tf32=True),
    Variant("eager fp16", "fp16", tf32=True),
)
CAPTURED = (
    Variant("captured fp32", "fp32", tf32=False, capture=True),
    Variant("captured fp32 with TF32", "fp32", tf32=True, capture=True),
    Variant("captured bf16", "bf16", tf32=True, capture=True),
)
COMPILED = (
    Variant("compiled and captured bf16", "bf16", tf32=True, capture=True, compile=True),
    Variant("compiled bf16", "bf16", tf32=True, compile=True),
)
FASTEST = CAPTURED[2]


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        teacher: network of the teacher.
        students: networks of the students; each trains with M=[1] and with M=[1,2,4].
        images: training images.
        steps: steps of a block; the median of `blocks` blocks counts.
        blocks: number of blocks.
    """

    teacher: str = "resnet32x4"
    students: tuple[str, ...] = ("shufflev1", "mobilev2")
    images: int = 50_000
    steps: int = 20
    blocks: int = 3


SMALL = Size(teacher="resnet8", students=("resnet8",), images=640, steps=1, blocks=1)


@dataclass(frozen=True)
class Timed:
    """What a step costs.

    Attributes:
        wall_ms: time of a step.
        kernel_ms: sum of the times of its kernels; None if they were not counted.
        busy_ms: time in which at least one kernel runs; None if they were not counted.
        kernels: number of its kernels; None if they were not counted.
        peak_mib: most memory that tensors take; None on the CPU.
    """

    wall_ms: float
    kernel_ms: float | None = None
    busy_ms: float | None = None
    kernels: float | None = None
    peak_mib: float | None = None

    @property
    def busy(self) -> float | None:
        """Return the time in which a kernel runs in % of the whole; None if it was not measured."""
        if self.busy_ms is None:
            return None
        return 100 * self.busy_ms / self.wall_ms


class Bench:
    """The measurements on one device; a measurement may use what an earlier one has found.

    Args:
        device: the device.
        folder: home of the jobs; nothing is written to it.
    """

    def __init__(self, device: torch.device, folder: Path) -> None:
        self.device, self.folder = device, folder
        self.size = Size()
        if device.type == "cpu":
            self.size = SMALL
        self.commands: dict[str, Timed] = {}
        self.found: dict[str, float] = {}

    def jobs(self, variant: Variant, *more: str) -> list[Config]:
        """Return the jobs of the command of record: each student with M=[1] and M=[1,2,4]."""
        return [
            self.job(variant, f"student={student}", f"M={M}", *more)
            for student in self.size.students
            for M in ("[1]", "[1,2,4]")
        ]

    def job(self, variant: Variant, *overrides: str) -> Config:
        """Return a job on random images of CIFAR-100's size."""
        return composed(
            self.folder,
            "dataset=fake",
            "tracking=none",
            f"teacher={self.size.teacher}",
            f"trainer.batch_size={BATCH_SIZE}",
            f"trainer.precision={variant.precision}",
            f"trainer.compile={str(variant.compile).lower()}",
            f"trainer.capture={'on' if variant.capture else 'off'}",
            *overrides,
        )

    def group(self, jobs: Sequence[Config]) -> Group:
        """Return the group of some jobs."""
        return build_group(jobs, self.device, images=self.size.images)

    def timed(self, step: Callable[[], object], *, profiled: bool = True) -> Timed:
        """Return what a step costs; `profiled` says whether its kernels are counted, too."""
        for _ in range(min(5, self.size.steps)):  # the first steps choose algorithms
            step()
        if self.device.type == "cpu":
            return Timed(self._wall_ms(step))
        torch.cuda.reset_peak_memory_stats(self.device)
        wall_ms = statistics.median(self._wall_ms(step) for _ in range(self.size.blocks))
        peak_mib = torch.cuda.max_memory_allocated(self.device) / 2**20
        if not profiled:
            return Timed(wall_ms, peak_mib=peak_mib)
        return Timed(wall_ms, *self._kernels(step), peak_mib)

    def _wall_ms(self, step: Callable[[], object]) -> float:
        self._wait()
        began = time.perf_counter()
        for _ in range(self.size.steps):
            step()
        self._wait()
        return 1000 * (time.perf_counter() - began) / self.size.steps

    def _kernels(self, step: Callable[[], object]) -> tuple[float, float, float]:
        """Return (sum of times in ms, time with a kernel in ms, number) of a step's kernels."""
        steps = 5
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(steps):
                step()
            self._wait()
        # Ranges that code has named are no kernels, but contain some.
        on_gpu = [
            event
            for event in profile.events()
            if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
        ]
        spans = sorted((event.time_range.start, event.time_range.end) for event in on_gpu)
        total = sum(end - start for start, end in spans)
        return total / 1000 / steps, covered(spans) / 1000 / steps, len(spans) / steps

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """Return the length that spans (start, end), sorted by start, cover together."""
    total, reached = 0.0, -math.inf
    for start, end in spans:
        total += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return total


def measurements(device: torch.device, folder: Path) -> list[Check]:
    """Return all measurements, in the order in which they run: the most important ones first.

    Args:
        device: the device that is measured.
        folder: home of the jobs.
    """
    bench = Bench(device, folder)
    size = bench.size
    record = f"{size.teacher} -> {', '.join(size.students)} x M=[1],[1,2,4], batch {BATCH_SIZE}"
    listed: list[tuple[str, Callable[[], str], float]] = [
        (f"A step of four students: {record}", partial(command, bench, (*CAPTURED, *EAGER)), 90),
        ("Grouped, alone, and the plain way", partial(against_plain, bench), 60),
        ("Images per second of the input pipeline", partial(pipeline, bench), 30),
        ("A part of an epoch, batches included", partial(epoch, bench), 30),
        ("The bars of the project", partial(bars, bench), 30),
        ("Hours of the 20 experiments of sweeps/seed", partial(seed_sweep, bench), 60),
        ("A step of each recipe", partial(each_recipe, bench), 90),
        ("Compiled", partial(command, bench, COMPILED), 150),
    ]
    return [Check(name, measure, limit_s, judged=False) for name, measure, limit_s in listed]


def command(bench: Bench, variants: Sequence[Variant]) -> str:
    """Measure a step of the command of record in each variant."""
    lines = []
    for variant in variants:
        if bench.device.type == "cpu" and variant.precision == "fp16":
            continue  # CPUs have no fast fp16
        began = time.perf_counter()
        with number_formats(variant.tf32):
            group = bench.group(bench.jobs(variant))
            group.step()
            bench._wait()
            first_s = time.perf_counter() - began
            found = bench.timed(group.step)
        bench.commands[variant.name] = found
        seconds = f"{STEPS * found.wall_ms / 1000:.2f}", f"{first_s:.1f}"
        lines.append((variant.name, *_row(found), *seconds, _replays(group)))
        del group
        _release()
    head = (*ROW, f"s for {STEPS} steps", "s to build and to do the first step", "captured")
    return table(("variant", *head), lines)


def _replays(group: Group) -> str:
    """Return how many runs of a group repeat captured steps, and why others do not."""
    recorders = [run.captured for run in group.runs]
    reasons = {each.reason for each in recorders if each is not None and each.reason}
    replayed = sum(each is not None and each.replays > 0 for each in recorders)
    return "; ".join([f"{replayed} of {len(recorders)}", *sorted(reasons)])


ROW = ("ms", "kernel ms", "GPU busy in %", "kernels", "peak MiB")


def _row(found: Timed) -> tuple[str, ...]:
    return (
        f"{found.wall_ms:.3f}",
        _cell(found.kernel_ms, 3),
        _cell(found.busy, 0),
        _cell(found.kernels, 0),
        _cell(found.peak_mib, 0),
    )


def _cell(value: float | None, digits: int) -> str:
    """Return a number as text, or a dash if it was not measured."""
    return "-" if value is None else f"{value:.{digits}f}"


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def against_plain(bench: Bench) -> str:
    """Compare a step of the group with one step of each run alone, and with the plain way."""
    lines = []
    for variant in (EAGER[2], CAPTURED[1], FASTEST):
        with number_formats(variant.tf32):
            jobs = bench.jobs(variant)
            grouped = bench.timed(bench.group(jobs).step, profiled=False)
            alone = [bench.timed(bench.group([job]).step, profiled=False) for job in jobs]
        lines.append((f"grouped, {variant.name}", grouped.wall_ms))
        lines.append((f"each alone, {variant.name}", sum(one.wall_ms for one in alone)))
        _release()
    images = fake(train=bench.size.images, test=1).train
    for loaded in (False, True):
        total = sum(_plain_ms(bench, job, images, loaded) for job in bench.jobs(EAGER[1]))
        batches = f"DataLoader with {LOADER_WORKERS} workers" if loaded else "one batch again"
        lines.append((f"the plain way, job by job, fp32 with TF32, {batches}", total))
    bench.found["plain ms"] = plain = lines[-1][1]
    rows = [(name, f"{ms:.3f}", f"{plain / ms:.2f}") for name, ms in lines]
    students = len(bench.jobs(FASTEST))
    return table((f"a step of {students} students", "ms", "times as fast as the last line"), rows)


def _plain_ms(bench: Bench, job: Config, images: Any, loaded: bool) -> float:
    """Return the time of a plain step in ms; `loaded` says whether a DataLoader makes batches."""
    network = partial(build_network, num_classes=100, device=bench.device)
    plain = PlainJob(
        network(job.student.model, seed=0), network(job.teacher.model, seed=1), job.M, bench.device
    )
    workers = LOADER_WORKERS if bench.device.type == "cuda" else 0
    batches = endless(images, BATCH_SIZE, workers)
    first = next(batches)
    with number_formats(True):
        if loaded:
            found = bench.timed(lambda: plain.step(*next(batches)), profiled=False)
        else:
            found = bench.timed(lambda: plain.step(*first), profiled=False)
    batches.close()  # type: ignore[attr-defined]
    return found.wall_ms


def _data(bench: Bench, *, strong: bool = False) -> DeviceData:
    return DeviceData(
        fake(train=bench.size.images, test=1),
        num_classes=100,
        batch_size=BATCH_SIZE,
        seed=0,
        device=bench.device,
        mean=MEAN,
        std=STD,
        eval_batch_size=1,
        strong=strong,
    )


def pipeline(bench: Bench) -> str:
    """Measure whole epochs of batches, with weak and with strong views."""
    lines = []
    for name, strong in ((WEAK, False), ("weak and strong views", True)):
        data = _data(bench, strong=strong)
        rates = []
        for epoch in range(1, 4):
            bench._wait()
            began = time.perf_counter()
            seen = sum(len(batch.labels) for batch in data.batches(epoch))
            bench._wait()
            rates.append(seen / (time.perf_counter() - began))
        spread = f"{min(rates[1:]):,.0f} to {max(rates[1:]):,.0f}"
        bench.found[name] = statistics.median(rates[1:])
        lines.append((name, f"{bench.found[name]:,.0f}", spread))
        del data
        _release()
    return table(("batches of 64", "images/s", "range"), lines)


def epoch(bench: Bench) -> str:
    """Measure steps of the command of record on batches of the pipeline."""
    lines = []
    for variant in CAPTURED[1:]:
        with number_formats(variant.tf32):
            group = bench.group(bench.jobs(variant))
            step = partial(_next_step, group, _forever(_data(bench)))
            found = bench.timed(step)
        bench.found[variant.name] = STEPS * found.wall_ms / 1000
        lines.append((variant.name, *_row(found), f"{STEPS * found.wall_ms / 1000:.2f}"))
        del group, step
        _release()
    return table(("variant", *ROW, f"s for {STEPS} steps"), lines)


def bars(bench: Bench) -> str:
    """Compare what was measured before with the bars that the project has set for a large GPU."""
    step, found = bench.commands.get(FASTEST.name), bench.found
    if step is None:
        raise CannotRun("a captured step was not measured")
    faster = busy = spread = None
    if "plain ms" in found:
        faster = found["plain ms"] / step.wall_ms
    if step.busy is not None and step.kernel_ms is not None:
        busy, spread = step.busy, step.wall_ms / step.kernel_ms
    tf32 = CAPTURED[1].name
    lines = [
        _bar("a captured step, times as fast as the plain way", faster, least=5),
        _bar("GPU busy in a captured step, in %", busy, least=80),
        _bar("a captured step / the sum of its kernels' times", spread, most=1.25),
        _bar("images/s of the input pipeline", found.get(WEAK), least=1e6),
        _bar(f"s for 50,000 images, {FASTEST.name}", found.get(FASTEST.name), most=4),
        _bar(f"s for 50,000 images, {tf32}", found.get(tf32), most=8),
    ]
    told = table(("bar", "limit", "measured", "outcome"), lines)
    return f"{told}\n\nThe outcome is for information: the limits are those of an H100-class GPU."


def _bar(
    name: str, value: float | None, *, least: float = 0.0, most: float = math.inf
) -> tuple[str, str, str, str]:
    """Return a line of the table of bars; `value` is None if it was not measured."""
    limit = f"at most {most:g}" if most < math.inf else f"at least {least:,.0f}"
    if value is None:
        return name, limit, "-", "not measured"
    outcome = "pass" if least <= value <= most else "fail"
    return name, limit, f"{value:,.3g}", outcome


def _forever(data: DeviceData) -> Iterator[Batch]:
    for number in count(1):
        for batch in data.batches(number):
            if len(batch.labels) == BATCH_SIZE:
                yield batch


def _next_step(group: Group, batches: Iterator[Batch]) -> None:
    group.step(next(batches))


def seed_sweep(bench: Bench) -> str:
    """Measure a step of the groups of sweeps/seed, and derive the hours of the whole sweep."""
    if bench.device.type == "cpu":
        raise CannotRun("needs CUDA: its networks are too large for a short run on a CPU")
    sweep = OmegaConf.load(CONF.parent / "sweeps" / "seed.yaml")
    lines, total_h = [], 0.0
    for teacher, words in _by_teacher(sweep.sweep.jobs).items():
        jobs = [
            composed(
                bench.folder,
                *f"{each} dataset=fake tracking=none optimizer.clip_norm=40.0".split(),
                f"trainer.precision={FASTEST.precision}",
                f"trainer.batch_size={BATCH_SIZE}",
            )
            for each in words
        ]
        with number_formats(FASTEST.tf32):
            found = bench.timed(bench.group(jobs).step)
        hours = EPOCHS * STEPS * found.wall_ms / 3.6e6
        total_h += hours
        lines.append((f"{teacher}, {len(jobs)} students", *_row(found), f"{hours:.2f}"))
        _release()
    told = table((f"group, {FASTEST.name}", *ROW, f"hours for {EPOCHS} epochs"), lines)
    return f"{told}\n\nBoth groups one after the other: {total_h:.2f} hours, without validation."


def _by_teacher(jobs: Sequence[str]) -> dict[str, list[str]]:
    """Return the overrides of the jobs for each teacher of the pairs that they name."""
    found: dict[str, list[str]] = {}
    for words in jobs:
        pair = words.split()[0].removeprefix("pair=")
        choice = OmegaConf.load(CONF / "pair" / f"{pair}.yaml")
        (teacher,) = (d["override /teacher"] for d in choice.defaults if "override /teacher" in d)
        found.setdefault(teacher, []).append(words)
    return found


def each_recipe(bench: Bench) -> str:
    """Measure a step of each recipe with resnet8x4 as the student."""
    student = "resnet8x4" if bench.device.type == "cuda" else "resnet8"
    names = recipes() if bench.device.type == "cuda" else ["sd_kd_ls", "mlkd"]
    few = replace(bench.size, steps=min(bench.size.steps, 5), blocks=1)
    lines = []
    for recipe in names:
        job = bench.job(
            FASTEST,
            f"student={student}",
            f"recipe={recipe}",
            "dataset.views=weak_strong",
            *NEEDED.get(recipe, ()),
        )
        group = bench.group([job])
        (run,) = group.runs
        run.progress.epoch = group.batch.epoch
        shortened = Bench(bench.device, bench.folder)
        shortened.size = few
        with number_formats(FASTEST.tf32):
            lines.append((recipe, *_row(shortened.timed(group.step))))
        del group, run
        _release()
    lines.sort(key=lambda line: float(line[1]))
    return table((f"recipe, {bench.size.teacher} -> {student}, {FASTEST.name}", *ROW), lines)
