"""Check captured steps: which can be captured, and whether they compute what others compute."""

import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sddlskd.config import Config
from sddlskd.training.capture import Captured, Watch
from sddlskd.training.devices import number_formats
from sddlskd.training.inputs import ask
from tests.gpu.group import build_group, recipes, small_job
from tests.gpu.placement import META, meta_as_gpu
from tests.gpu.report import CannotRun, Differs

__all__ = [
    "NOT_CAPTURED",
    "captured_is_eager",
    "failed_recording",
    "obstacles",
    "what_can_be_captured",
]

SMALL_CHW = (3, 8, 8)
# Recipes whose steps cannot be captured, and a part of the reason.
NOT_CAPTURED = {"kdsvd": "_linalg_svd", "dot": "the optimizer DOT"}
STEPS = 6
TOLERANCE = 1e-5  # of the weights after `STEPS` steps in float32, relative
# Those of a feature method with indices, of warm-ups, of a first stage and of a learnt temperature
COMPARED = (
    ("sd_kd_ls", ()),
    ("sd_kd_ls", ("distiller.warmup_epochs=2", "optimizer.clip_norm=1.0")),
    ("kd", ("optimizer=adamw",)),
    ("at", ()),
    ("crd", ()),
    ("fsp", ()),
    ("ctkd", ()),
    ("mlkd", ()),
    ("kdsvd", ()),
    ("dot", ()),
)


def obstacles(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Return why the steps of some recipes cannot be captured, found without a GPU.

    Tensors on torch's meta device stand for those on the GPU. Recipes without an obstacle are left
    out.

    Args:
        folder: home of the jobs; nothing is written to it.
        names: names of the recipes.
    """
    found = {}
    with meta_as_gpu():
        for recipe in names:
            job = small_job(folder, recipe, "trainer.capture=on")
            group = build_group([job], META, image_CHW=SMALL_CHW, images=192)
            (run,) = group.runs
            if run.captured is None:
                found[recipe] = f"the optimizer {type(run.optimisation.optimizer).__name__}"
                continue
            run.optimisation.rate = None  # the optimizer cannot read a tensor without numbers
            for epoch in sorted({run.epoch, 1}):
                run.progress.epoch = epoch
                batch, taps = group.inputs(group.batch._replace(epoch=epoch), group.runs)
                with Watch(META) as watch:
                    if group.teacher is not None:
                        ask(group.teacher, batch, group.runs)
                    run._learn(batch, taps, len(batch.labels), len(batch.labels))
                if watch.found:
                    found[recipe] = watch.found[0]
    return found


def what_can_be_captured(folder: Path) -> str:
    """Check that the steps of all recipes can be captured, except for those that are known."""
    found = obstacles(folder, recipes())
    if found.keys() != NOT_CAPTURED.keys():
        raise Differs("; ".join(f"{recipe}: {why}" for recipe, why in found.items()))
    told = "; ".join(f"{recipe}: {why}" for recipe, why in found.items())
    return f"{len(recipes()) - len(found)} recipes can be captured; not: {told}"


def captured_is_eager(device: torch.device, folder: Path) -> str:
    """Train each of some recipes for a few steps with and without captured steps, and compare."""
    far, told = [], []
    compared = COMPARED
    if device.type == "cpu":
        compared = COMPARED[::2]  # tests/test_capture.py looks at more
    for recipe, words in compared:
        results = []
        for choice in ("off", "on"):
            job = small_job(folder, recipe, *words, f"trainer.capture={choice}")
            with _repeatable():
                weights, replays, reason = _trained(job, device)
            results.append(weights)
        known = NOT_CAPTURED.get(recipe)
        if (replays == 0) != (known is not None and (known in reason or recipe == "dot")):
            raise Differs(f"{recipe}: {replays} steps were replayed; {reason or 'no reason given'}")
        distance = float((results[1] - results[0]).norm() / results[0].norm())
        far.append((distance, " ".join((recipe, *words))))
        told.append(f"{recipe} {replays}")
    distance, name = max(far)
    allowed = 0.0 if device.type == "cpu" else TOLERANCE
    if not distance <= allowed:
        raise Differs(f"weights after {STEPS} steps are {distance:.1e} apart ({name})")
    return f"largest distance {distance:.1e} ({name}); replays: {', '.join(told)}"


def failed_recording(device: torch.device) -> str:
    """Check that a recording that fails disturbs nothing that comes after it or was before it."""
    if device.type != "cuda":
        raise CannotRun("needs CUDA")
    log = logging.getLogger("sddlskd.checks")
    total, ones = torch.zeros((), device=device), torch.ones(1000, device=device)

    def drawn() -> Tensor:
        torch.manual_seed(0)
        return torch.rand(8, device=device)

    before, count = drawn(), torch.zeros((), device=device)
    older = Captured("older sums", device, log)
    for _ in range(3):
        older(lambda: count.add_(ones.sum()), [ones], None)

    def read() -> None:
        total.add_(ones.sum())
        total.item()

    refused = Captured("functions that read a value", device, log, watched=False)
    for seed in range(4):
        torch.manual_seed(seed)
        refused(read, [ones], None)
        refused.wait()
    older(lambda: count.add_(ones.sum()), [ones], None)
    older.wait()
    if not torch.equal(drawn(), before) or older.replays != 3 or float(count) != 4000:
        raise Differs(f"an older recording gave {float(count):g}, not 4000, or draws differ")
    captured = Captured("sums", device, log)
    for seed in range(4):
        torch.manual_seed(seed)
        captured(lambda: total.add_(ones.sum()), [ones], None)
        captured.wait()
    if not refused.reason or captured.replays != 3 or float(total) != 8000:
        raise Differs(
            f"sum {float(total):g} instead of 8000, {captured.replays} replays instead of 3; "
            f"first failure: {refused.reason or 'none'}"
        )
    return f"refused ({refused.reason}), and then repeated another recording"


@contextmanager
def _repeatable() -> Iterator[None]:
    """Compute float32 in float32 and, where torch can, with algorithms that add in a fixed order.

    A rounding error can move a value across zero, where a ReLU makes a large difference of it.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with number_formats(tf32=False), warnings.catch_warnings(action="ignore"):
            yield
    finally:
        torch.use_deterministic_algorithms(False)


def _trained(job: Config, device: torch.device) -> tuple[Tensor, int, str]:
    """Return the weights after some steps, the number of replays, and why there are none."""
    group = build_group([job], device, image_CHW=SMALL_CHW, images=192)
    (run,) = group.runs
    run.record.log.setLevel(logging.CRITICAL)
    first = run.epoch
    for epoch in (first, first + 1) if first < 1 else (1, 2):
        run.progress.epoch, run.progress.step = epoch, 0
        for _ in range(STEPS // 2):
            group.step(group.batch._replace(epoch=epoch))
    run.wait()
    modules: list[nn.Module] = [run.model, run.objective.modules]
    flat = [p.detach().double().flatten().cpu() for m in modules for p in m.parameters()]
    captured: Any = run.captured
    reason = ""
    replays = 0
    if captured is not None:
        replays, reason = captured.replays, captured.reason
    return torch.cat(flat), replays, reason
