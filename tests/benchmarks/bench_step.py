"""Compare a training step with the two networks alone.

    python -m tests.benchmarks.bench_step

The step is resnet32x4 -> resnet8x4 with M=[1,2,4] and batch 64, on two CPU threads. All numbers are
medians of ratios between things that run in turn in one process. Memory is measured in separate
processes.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from torch import Tensor, nn

from sddlskd import config as cfg
from sddlskd.data.device import Batch
from sddlskd.distill import ScaleDecoupled
from sddlskd.losses import kd
from sddlskd.models import Taps
from sddlskd.record import Record
from sddlskd.training.build import build_network, build_run
from sddlskd.training.run import Run
from sddlskd.training.teacher import Teacher

REPEATS = 7
BATCH_SIZE = 64


def in_turn(*things: Callable[[], object], repeats: int = REPEATS) -> list[list[float]]:
    """Call the things in turn, so that a busy machine slows them alike; return their seconds."""
    seconds: list[list[float]] = [[] for _ in things]
    for _ in range(repeats + 1):
        for thing, taken in zip(things, seconds, strict=True):
            started = time.perf_counter()
            thing()
            taken.append(time.perf_counter() - started)
    return [taken[1:] for taken in seconds]  # the first call is a warm-up


def ratio(a: list[float], b: list[float]) -> str:
    """Return the median of the pairwise ratios and their range, as text."""
    ratios = [x / y for x, y in zip(a, b, strict=True)]
    return f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"


def forward_flops(network: nn.Module, images_BCHW: Tensor) -> int:
    """Return the floating-point operations of a forward pass.

    They are two for each multiplication and addition of convolutions and linear layers.
    """
    total = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        weight = module.weight
        assert isinstance(weight, Tensor)
        total += 2 * output.numel() * weight[0].numel()

    layers = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    with torch.inference_mode():
        network(images_BCHW)
    for hook in hooks:
        hook.remove()
    return total


def setting(folder: Path) -> tuple[Teacher, Run, nn.Module, Batch]:
    """Return a teacher, a run, a student alone and a batch."""
    cfg.frame()
    with initialize_config_dir(str(cfg.conf_folder()), version_base="1.3"):
        overrides = ["dataset=fake", "tracking=none", f"home={folder}", "trainer=cpu"]
        job = cfg.resolve(compose("config", overrides))
    device = torch.device("cpu")
    network = partial(build_network, num_classes=100, seed=0, device=device)
    teacher = Teacher(
        network(job.teacher.model),
        None,
        name="resnet32x4",
        device=device,
        precision="fp32",
        compile=False,
    )
    run = build_run(job, network(job.student.model), Record(job), device, steps=782, images=50_000)
    images = torch.randn(BATCH_SIZE, 3, 32, 32).to(memory_format=torch.channels_last)
    labels = torch.randint(100, (BATCH_SIZE,))
    batch = Batch(images, labels, index=torch.arange(BATCH_SIZE), views=None)
    return teacher, run, network(job.student.model), batch


def main() -> None:
    """Print the ratios."""
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        teacher, run, student, batch = setting(Path(folder))

        def alone() -> None:
            teacher(batch.images)
            student.zero_grad(set_to_none=True)
            F.cross_entropy(student(batch.images).mean((2, 3)), batch.labels).backward()

        a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
        forward_s, matmul_s = in_turn(
            lambda: teacher(batch.images), lambda: [a @ b for _ in range(8)]
        )
        flops = forward_flops(
            build_network(
                {"_target_": "sddlskd.models.create", "name": "resnet32x4"}, 100, 0, a.device
            ),
            batch.images,
        )
        rates = [
            flops / f / (8 * 2 * 2048**3 / m) for f, m in zip(forward_s, matmul_s, strict=True)
        ]
        print(
            f"teacher forward: {statistics.median(rates):.1%} "
            f"({min(rates):.1%} to {max(rates):.1%}) of the FLOP rate of a 2048^3 float32 matmul "
            f"({flops / statistics.median(forward_s) / 1e9:.0f} GFLOP/s)"
        )

        def step() -> None:
            run.train_step(batch, Taps.of_map(teacher(batch.images)))

        composer = ScaleDecoupled(partial(kd, temperature=2.0), [1, 2, 4], standardize=True)
        student_map, teacher_map = (
            torch.randn(BATCH_SIZE, 100, 8, 8),
            torch.randn(BATCH_SIZE, 100, 8, 8),
        )
        student_map, teacher_map = (
            m.to(memory_format=torch.channels_last) for m in (student_map, teacher_map)
        )
        student_map.requires_grad_()
        step_s, alone_s, composer_s = in_turn(
            step, alone, lambda: composer(student_map, teacher_map, batch.labels).backward()
        )
        print(
            "training step / (teacher forward + student forward and backward): "
            f"{ratio(step_s, alone_s)}"
        )
        print(f"composer, forward and backward / training step: {ratio(composer_s, step_s)}")
    peaks = {}
    for what in ("step", "alone", "nothing"):
        command = [sys.executable, "-m", __spec__.name, what]
        done = [
            subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(3)
        ]
        peaks[what] = statistics.median(int(one.stdout) for one in done)
    net = (peaks["step"] - peaks["nothing"]) / (peaks["alone"] - peaks["nothing"])
    print(
        f"peak memory of the step / of the two networks alone: {net:.3f} above what the imports "
        f"take, {peaks['step'] / peaks['alone']:.3f} of the whole process "
        f"({peaks['step'] / 1024:.0f} MiB)"
    )


def peak(what: str) -> None:
    """Print the peak memory of this process in KiB.

    `what` is "step" (three training steps), "alone" (the networks alone) or "nothing".
    """
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        teacher, run, student, batch = setting(Path(folder))
        for _ in range(3 if what != "nothing" else 0):
            teacher_map = teacher(batch.images)
            if what == "step":
                run.train_step(batch, Taps.of_map(teacher_map))
            else:
                student.zero_grad(set_to_none=True)
                F.cross_entropy(student(batch.images).mean((2, 3)), batch.labels).backward()
    # getrusage would return the peak of the parent process if that is larger.
    status = Path("/proc/self/status").read_text()
    print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


if __name__ == "__main__":
    peak(sys.argv[1]) if len(sys.argv) > 1 else main()
