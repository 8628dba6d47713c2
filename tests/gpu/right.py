"""Check that a device computes what the CPU computes.

The reference values are those of the CPU in float64. They make the checks meaningful on the CPU,
too: there they compare float32 with float64.

Shapes: B batch, C channels, H W sides, K classes.
"""

import copy
import gc
import json
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sddlskd import worker
from sddlskd.config import Config, Precision
from sddlskd.data.device import Batch, DeviceData, draw_epoch
from sddlskd.datasets.arrays import Splits, digits, fake
from sddlskd.models import create, names
from sddlskd.processes.exit_codes import ExitCode
from sddlskd.record import freeze, read_result
from sddlskd.sweeps.pool import Pool
from sddlskd.training.devices import autocast
from sddlskd.training.fit import fit
from sddlskd.training.inputs import ask
from sddlskd.training.run import Run
from sddlskd.training.teacher import Teacher
from sddlskd.training.teacher_cache import TeacherCache
from tests.gpu.captured import captured_is_eager, failed_recording, what_can_be_captured
from tests.gpu.group import build_group, flat_taps, recipes, small_job, values
from tests.gpu.placement import META, Placement, meta_as_gpu
from tests.gpu.report import CannotRun, Check, Differs
from tests.stopping import stopped_at
from tests.tiny import STEPS, composed, final, rows, same, tiny

__all__ = ["checks"]

CPU = torch.device("cpu")
SMALL_CHW = (3, 8, 8)
TOLERANCE = 1e-4  # of float32, relative
# Of networks in training: BatchNorm over the few values of a small batch enlarges rounding errors.
TRAINING_TOLERANCE = 1e-3
# Of the number formats with 8 and 11 bits, relative to the norm of a tensor. Rounding errors of up
# to 110 layers add up.
FORMAT_TOLERANCE = {"bf16": 0.1, "fp16": 0.02}
NARROW_LOSS_TOLERANCE = 0.02  # of the loss of a step in bf16 or fp16, relative
# Of a whole training of a few steps whose operations may add in any order
TRAINED_TOLERANCE = 1e-2
SLOW_ON_CPU = 4  # recipes and networks that are checked in bf16 on the CPU
# Top-1 in % of resnet8 after `DIGITS_EPOCHS` epochs of the digits. Measured on the CPU: see
# docs/measurements/README.md.
DIGITS_EPOCHS = 4
DIGITS_TOP1 = 70.0
DIGITS_APART = 5.0  # most that two devices may differ in %

# Where a step waits for the GPU, and why that stays so. Any other place fails the check.
WAITS = {
    "sddlskd/methods/kdsvd.py": "torch.linalg.svd tells the host whether it has converged",
    "sddlskd/methods/crd.py": "the indices of the images are copied from the host",
    "sddlskd/data/strong.py": "the draws are copied from the host, operation by operation",
}


def checks(device: torch.device, folder: Path) -> list[Check]:
    """Return all checks, in the order in which they run.

    Args:
        device: the device that is checked.
        folder: folder for the files of trainings.
    """
    some = SLOW_ON_CPU if device.type == "cpu" else None
    listed: list[tuple[str, Callable[[], str], float]] = [
        ("networks and taps, fp32", partial(networks, device), 60),
        ("networks and taps, bf16", partial(networks_in, device, "bf16", some), 60),
        ("networks and taps, fp16", partial(networks_in, device, "fp16", some), 60),
        ("a step of every recipe, fp32", partial(every_recipe, device, folder), 90),
        ("a step of every recipe, bf16", partial(every_recipe_in_bf16, device, folder, some), 60),
        ("steps mix no devices", partial(placement, folder), 60),
        ("what can be captured", partial(what_can_be_captured, folder), 60),
        ("captured = eager", partial(captured_is_eager, device, folder), 60),
        ("a recording that fails", partial(failed_recording, device), 30),
        ("steps do not wait for the GPU", partial(waits, device, folder), 60),
        ("batches, bit for bit", partial(batches, device), 30),
        ("strong views, bit for bit", partial(strong_views, device), 30),
        ("teacher cache", partial(teacher_cache, device, folder / "cache"), 30),
        ("grouped = alone", partial(grouped, device, folder / "grouped"), 60),
        ("resumed = uninterrupted", partial(resumed, device, folder / "resumed"), 60),
        ("without deterministic algorithms", partial(plain, device, folder / "plain"), 60),
        ("bf16 training", partial(precision, device, folder, "bf16"), 60),
        ("fp16 training with a loss scale", partial(precision, device, folder, "fp16"), 60),
        ("compiled training", partial(compiled, device, folder / "compiled"), 120),
        ("two streams", partial(two_streams, device, folder), 30),
        ("out of memory halves a group", partial(out_of_memory, device, folder / "full"), 60),
        ("two GPUs (nccl)", partial(two_gpus, device, folder / "two"), 90),
        ("resnet8 learns the digits", partial(learns_digits, device, folder / "digits"), 60),
    ]
    return [Check(name, check, limit_s) for name, check, limit_s in listed]


# How results are compared


@contextmanager
def exact() -> Iterator[None]:
    """Compute float32 in float32, not in TF32, for the block."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = False
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before


@contextmanager
def deterministic(warned: set[str]) -> Iterator[None]:
    """Use deterministic algorithms in the block.

    `warned` receives the names of the operations that have none.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        torch.use_deterministic_algorithms(False)
    for one in caught:
        text = str(one.message)
        if "deterministic" in text:
            warned.add(text.split()[0])


def apart(a: Tensor, b: Tensor) -> float:
    """Return the norm of the difference of two tensors, relative to the norm of `b`."""
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    if a.shape != b.shape or not a.isfinite().all():
        return math.inf
    return float((a - b).norm() / b.norm().clamp(min=1e-12))


def farthest(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> tuple[float, str]:
    """Return the largest distance of two tensors of the same name, and the name."""
    if ours.keys() != theirs.keys():
        return math.inf, f"only one side has {', '.join(sorted(ours.keys() ^ theirs.keys()))}"
    # A small part must not hide in a large one, nor may rounding errors of zeros count.
    largest = max(float(value.detach().norm()) for value in theirs.values())
    return max((_beside(value, theirs[name], largest), name) for name, value in ours.items())


def _beside(a: Tensor, b: Tensor, largest: float) -> float:
    norm = max(float(b.detach().double().norm()), 1e-2 * largest, 1e-12)
    return apart(a, b) * max(float(b.detach().double().norm()), 1e-12) / norm


def require(
    found: Sequence[tuple[float, str]],
    tolerance: float,
    what: str,
    unit: str = "relative difference",
) -> str:
    """Return a line about the largest distance; raise Differs if one exceeds the tolerance.

    Args:
        found: (distance, name) pairs.
        tolerance: largest distance allowed.
        what: what was compared, in the plural.
        unit: what the distances are.
    """
    wrong = [f"{name}: {distance:.1e}" for distance, name in found if not distance <= tolerance]
    if wrong:
        raise Differs(
            f"{len(wrong)} of {len(found)} {what} differ by more than {tolerance:g}: "
            + "; ".join(wrong[:20])
        )
    distance, name = max(found)
    return f"{len(found)} {what}, largest {unit} {distance:.1e} ({name})"


# Networks


def networks(device: torch.device) -> str:
    """Compare logit maps and taps of all networks in training, and of the folded teachers."""
    found: dict[bool, list[tuple[float, str]]] = {True: [], False: []}
    with exact():
        for name in names():
            for kind, ours, theirs in _taps_of(name, device, "fp32"):
                distance, tap = farthest(ours, theirs)
                found[kind == "student"].append((distance, f"{name} {tap}"))
    trained = require(found[True], TRAINING_TOLERANCE, "networks in training")
    folded = require(found[False], TOLERANCE, "teachers, with taps and with the logit map alone")
    return f"{trained}; {folded}"


def networks_in(device: torch.device, precision: str, some: int | None) -> str:
    """Compare the logit maps of networks under autocast; `some` limits the number of networks.

    Rounding errors grow from layer to layer, in deep networks without trained weights to the size
    of the values. So a GPU may be as far from float64 as the CPU is in bf16, with some margin; fp16
    has three bits more and must be nearer.
    """
    if device.type == "cpu" and precision == "fp16":
        raise CannotRun("fp16 is for GPUs")
    margin = {"bf16": 2.0, "fp16": 0.5}[precision]
    found, largest = [], 0.0
    for name in names()[:some]:
        ours = _logit_distances(name, device, precision)
        of_cpu = dict.fromkeys(ours, 0.0)
        if device.type != "cpu":
            of_cpu = _logit_distances(name, CPU, "bf16")
        for kind, distance in ours.items():
            allowed = max(FORMAT_TOLERANCE[precision], margin * of_cpu[kind])
            found.append((distance / allowed, f"{name} {kind}"))
            largest = max(largest, distance)
    told = require(found, 1.0, "logit maps", "share of the tolerance")
    return f"{told}; largest distance from float64 {largest:.1e}"


def _logit_distances(name: str, device: torch.device, precision: str) -> dict[str, float]:
    """Return how far the logit map of a network is from the one in float64, by its role."""
    parts = _taps_of(name, device, precision)
    return {kind: apart(ours["logit_map"], theirs["logit_map"]) for kind, ours, theirs in parts}


def _taps_of(
    name: str, device: torch.device, precision: str
) -> Iterator[tuple[str, dict[str, Tensor], dict[str, Tensor]]]:
    """Yield (role, taps on the device, taps of the CPU in float64) as student and as teacher."""
    torch.manual_seed(0)
    reference = create(name, 10).double()
    images_BCHW = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    network = copy.deepcopy(reference).float().to(device, memory_format=torch.channels_last)
    ours_BCHW = images_BCHW.float().to(device).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        theirs = reference.train().taps(images_BCHW)
        with autocast(device, precision):
            ours = network.train().taps(ours_BCHW)
        yield "student", flat_taps(ours), flat_taps(theirs)
        # The statistics of the batch above, so that the values keep their scale.
        for one in (reference, network):
            for norm in one.modules():
                if isinstance(norm, nn.BatchNorm2d):
                    norm.momentum = 1.0
        reference.taps(images_BCHW)
        network.load_state_dict({k: v.float() for k, v in reference.state_dict().items()})
        options: dict[str, Any] = {"name": name, "compile": False}
        for one in (reference, network):
            one.eval()
        theirs = reference.taps(images_BCHW)
        teacher = Teacher(network, None, device=device, precision=precision, **options)
        ours = teacher.taps(ours_BCHW)
        yield "teacher", flat_taps(ours), flat_taps(theirs)
        maps = {"logit_map": teacher(ours_BCHW)}, {"logit_map": ours.logit_map}
        yield "teacher's map alone", *maps


# Losses and methods


def every_recipe(device: torch.device, folder: Path) -> str:
    """Compare losses, gradients, momenta and buffers of a step of every recipe.

    Where rounding errors move a value across zero, a ReLU answers differently and the gradient of
    the whole network changes by far more than rounding. That is rare and no fault, so a recipe may
    try three batches; a wrong gradient is wrong for all of them.
    """
    found = []
    with exact():
        for recipe in recipes():
            tried = []
            for seed in range(3):
                tried.append(_distance(small_job(folder, recipe, f"seed={seed}"), device))
                if tried[-1][0] <= TOLERANCE:
                    break
            distance, what = min(tried)
            found.append((distance, f"{recipe} {what}"))
    return require(found, TOLERANCE, "recipes")


def every_recipe_in_bf16(device: torch.device, folder: Path, some: int | None) -> str:
    """Compare the losses of a step in bf16; `some` limits the number of recipes."""
    found = []
    for recipe in recipes()[:some]:
        job = small_job(folder, recipe, "trainer.precision=bf16")
        wide = replace(job, trainer=replace(job.trainer, precision=Precision.fp32))
        ours, theirs = _steps(job, device, torch.float32), _steps(wide, CPU, torch.float64)
        for (own, _), (other, _) in zip(ours, theirs, strict=True):
            distance = abs(own["loss"] - other["loss"]) / max(abs(other["loss"]), 1e-3)
            found.append((distance, recipe))
    return require(found, NARROW_LOSS_TOLERANCE, "losses")


Step = tuple[dict[str, float], dict[str, Tensor]]


def _distance(job: Config, device: torch.device) -> tuple[float, str]:
    """Return the largest distance of losses and tensors of a step from those of the CPU."""
    found = []
    ours, theirs = _steps(job, device, torch.float32), _steps(job, CPU, torch.float64)
    for (own, own_values), (other, other_values) in zip(ours, theirs, strict=True):
        for name, value in other.items():
            found.append((abs(own[name] - value) / max(abs(value), 1e-3), name))
        found.append(farthest(own_values, other_values))
    return max(found)


def _steps(job: Config, device: torch.device, dtype: torch.dtype) -> list[Step]:
    """Return losses and tensors after a step of each stage of training: the first one, if any."""
    group = build_group([job], device, image_CHW=SMALL_CHW, images=192, dtype=dtype)
    (run,) = group.runs
    steps = []
    for epoch in _stages(run):
        run.progress.epoch = epoch
        run.sums.zero_()
        group.step(group.batch._replace(epoch=epoch))
        means = (run.sums / len(group.batch.labels)).tolist()
        losses = dict(zip(run.objective.names, means, strict=False))
        copied = {name: value.detach().clone() for name, value in values(run).items()}
        steps.append((losses, copied))
    return steps


def _stages(run: Run) -> list[int]:
    """Return an epoch of each stage: 0 for a first stage, and 1."""
    return [0, 1] if run.objective.first_epoch < 1 else [1]


# Where tensors lie


def placement(folder: Path) -> str:
    """Check on torch's meta device that no step mixes devices, and where a step would wait."""
    found: dict[str, list[str]] = {}
    with meta_as_gpu():
        for recipe in recipes():
            job = small_job(folder, recipe)
            group = build_group([job], META, image_CHW=SMALL_CHW, images=192)
            for epoch in _stages(group.runs[0]):
                group.runs[0].progress.epoch = epoch
                with Placement() as seen:
                    group.step(group.batch._replace(epoch=epoch))
                for note in seen.found:
                    found.setdefault(note, []).append(recipe)
        for strong in (False, True):
            iterator = _data(fake(train=300, test=8), META, strong=strong).batches(1)
            next(iterator)  # all draws of an epoch are copied at once, before its first batch
            with Placement() as seen:
                list(iterator)
            for note in seen.found:
                found.setdefault(note, []).append("strong views" if strong else "batches")
    return _waits(found)


def waits(device: torch.device, folder: Path) -> str:
    """Find where steps and batches wait for the GPU, as CUDA reports it."""
    if device.type != "cuda":
        raise CannotRun("needs CUDA; the check above finds the same without a GPU")
    found: dict[str, list[str]] = {}
    for recipe in recipes():
        group = build_group([small_job(folder, recipe)], device, image_CHW=SMALL_CHW, images=192)
        for epoch in _stages(group.runs[0]):
            group.runs[0].progress.epoch = epoch
            batch = group.batch._replace(epoch=epoch)
            group.step(batch)  # the first step of a process allocates what later ones reuse
            for note in _synchronisations(partial(group.step, batch)):
                found.setdefault(note, []).append(recipe)
    for strong in (False, True):
        iterator = _data(fake(train=300, test=8), device, strong=strong).batches(1)
        next(iterator)
        for note in _synchronisations(partial(list, iterator)):
            found.setdefault(note, []).append("strong views" if strong else "batches")
    return _waits(found)


def _synchronisations(act: Callable[[], object]) -> list[str]:
    """Return where an action waits for the GPU, as file:line of the package."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            act()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    notes = []
    for one in caught:
        if "synchroniz" in str(one.message):
            _, ours, place = one.filename.rpartition("/sddlskd/")
            notes.append(f"{'sddlskd/' if ours else ''}{place}:{one.lineno}")
    return sorted(set(notes))


def _waits(found: dict[str, list[str]]) -> str:
    """Return a line about known waits; raise Differs for all others."""
    known = {note: who for note, who in found.items() if note.partition(":")[0] in WAITS}
    new = {note: who for note, who in found.items() if note not in known}
    if new:
        raise Differs("; ".join(f"{note} ({', '.join(who)})" for note, who in new.items()))
    files = sorted({note.partition(":")[0] for note in known})
    told = "".join(f"; {file} waits: {WAITS[file]}" for file in files)
    return f"{len(recipes())} recipes, weak and strong views{told}"


# Batches


def _data(splits: Splits, device: torch.device, *, size: int = 64, strong: bool) -> DeviceData:
    return DeviceData(
        splits,
        num_classes=100,
        batch_size=size,
        seed=3,
        device=device,
        mean=(0.5, 0.45, 0.4),
        std=(0.25, 0.3, 0.2),
        strong=strong,
    )


def batches(device: torch.device) -> str:
    """Compare the batches of an epoch and of the test split with images made one by one."""
    splits = fake(train=300, test=70)
    data = _data(splits, device, strong=False)
    mean_C11, std_C11 = (
        torch.tensor(v)[:, None, None] for v in ((0.5, 0.45, 0.4), (0.25, 0.3, 0.2))
    )
    draws = draw_epoch(3, 1, 300, 4)
    seen = 0
    for batch in data.batches(1):
        for x_CHW, label, index in zip(
            batch.images, batch.labels, batch.index.tolist(), strict=True
        ):
            image_CHW = splits.train.images_NHWC[index].permute(2, 0, 1)
            padded = F.pad(image_CHW, (4, 4, 4, 4))
            top, left = int(draws.top_N[index]), int(draws.left_N[index])
            cut = padded[:, top : top + 32, left : left + 32]
            if draws.flip_N[index]:
                cut = cut.flip(2)
            expected = (cut.double() / 255 - mean_C11.double()) / std_C11.double()
            # Bits are compared with the CPU's below; here the formula counts.
            if not torch.allclose(x_CHW.cpu().double(), expected, atol=1e-5):
                raise Differs(f"image {index} is not its crop")
            if int(label) != int(splits.train.labels_N[index]):
                raise Differs(f"image {index} has label {int(label)}")
            seen += 1
    _same_batches(data.batches(1), _data(splits, CPU, size=7, strong=False).batches(1))
    pairs = zip(data.test_batches(), _data(splits, CPU, strong=False).test_batches(), strict=True)
    for (ours, labels), (theirs, expected_labels) in pairs:
        if not (torch.equal(ours.cpu(), theirs) and torch.equal(labels.cpu(), expected_labels)):
            raise Differs("test batches differ from the CPU's")
    return f"{seen} images equal their crops one by one, and all batches equal the CPU's"


def strong_views(device: torch.device) -> str:
    """Compare the strong views of an epoch with those that the CPU makes in other batches."""
    splits = fake(train=1500, test=8)
    ours, theirs = _data(splits, device, strong=True), _data(splits, CPU, size=7, strong=True)
    count = _same_batches(ours.batches(1), theirs.batches(1))
    return f"{count} images with 14 operations of RandAugment equal the CPU's in batches of 7"


def _same_batches(ours: Iterator[Batch], theirs: Iterator[Batch]) -> int:
    """Return the number of images of two epochs, whose batch sizes may differ.

    Raise Differs unless all images, labels and indices are equal bit for bit.
    """
    one, other = list(ours), list(theirs)
    for field in ("images", "labels", "index", "views", "strong"):
        parts = [[getattr(batch, field) for batch in each] for each in (one, other)]
        if parts[0][0] is None:
            continue
        a, b = (torch.cat([part.cpu() for part in each]) for each in parts)
        if not torch.equal(a, b):
            wrong = int((a != b).flatten(1).any(1).sum()) if a.dim() > 1 else int((a != b).sum())
            raise Differs(f"{field} of {wrong} of {len(a)} images differ from the CPU's")
    return sum(len(batch.labels) for batch in one)


def teacher_cache(device: torch.device, folder: Path) -> str:
    """Compare what the teacher's cache answers, filling and filled, with the teacher's maps."""
    network = create("resnet8", 10).to(device, memory_format=torch.channels_last)
    teacher = Teacher(network, None, name="resnet8", device=device, precision="fp32", compile=False)
    images = torch.randn(8, 3, 32, 32).to(device, memory_format=torch.channels_last)
    views = torch.tensor([3, 1, 4, 15, 9, 2, 6, 5])
    map_BKHW = teacher(images)
    shape = tuple(map_BKHW.shape[1:])
    found = []
    for dtype, tolerance in (("float32", 0.0), ("float16", 2.0**-11)):
        cache = TeacherCache(
            teacher, folder / dtype / "a.maps", rows=16, map_KHW=shape, dtype=dtype
        )
        filling, filled = cache(images, views), cache(torch.zeros_like(images), views)
        for answer in (filling, filled):
            if answer.device.type != device.type:
                raise Differs(f"the answer lies on {answer.device}")
            distance = float(((answer - map_BKHW).abs() / map_BKHW.abs().clamp(min=1e-4)).max())
            if distance > tolerance:
                raise Differs(f"{dtype}: the maps differ by {distance:.1e}")
            found.append(f"{dtype} {distance:.0e}")
    return f"largest relative differences, filling and filled: {', '.join(found)}"


# Trainings


GROUP = (
    ("student=resnet8", "M=[1]"),
    ("student=shufflev1", "M=[1,2]", "optimizer.clip_norm=1.0"),
    ("student=resnet8", "recipe=crd", "features.crd.method.K=16"),
)


def _job(folder: Path, device: torch.device, *overrides: str) -> Config:
    return tiny(folder, f"trainer.device={device}", *overrides)


def _finished(jobs: Sequence[Config]) -> None:
    for result in fit(jobs):
        if result["status"] != "FINISHED":
            raise Differs(f"a run ended as {result['status']}: {result['reason']}")


def _compare(a: Config, b: Config) -> float:
    """Return how far the weights of two finished trainings are apart; 0 if all bits are equal."""
    one, other = final(a), final(b)
    if same(one, other) and rows(a) == rows(b):
        return 0.0
    floats = [{k: v for k, v in s["model"].items() if v.is_floating_point()} for s in (one, other)]
    flat = [torch.cat([value.flatten() for value in state.values()]) for state in floats]
    return max(apart(*flat), 1e-12)


def _bits(distance: float, warned: set[str], what: str) -> str:
    without = ""
    if warned:
        without = f"; no deterministic form: {', '.join(sorted(warned))}"
    if distance:
        raise Differs(f"{what}: not equal bit for bit (weights {distance:.1e} apart){without}")
    return f"{what}: bit for bit, with deterministic algorithms{without}"


def grouped(device: torch.device, folder: Path) -> str:
    """Train three students as a group and alone."""
    warned: set[str] = set()
    with deterministic(warned):
        together = [_job(folder / "together", device, *words) for words in GROUP]
        _finished(together)
        alone = [_job(folder / "alone", device, *words) for words in GROUP]
        for job in alone:
            _finished([job])
    distances = [_compare(a, b) for a, b in zip(together, alone, strict=True)]
    return _bits(max(distances), warned, f"{len(GROUP)} students")


def resumed(device: torch.device, folder: Path) -> str:
    """Stop a group in the middle of its second epoch, resume it, and compare."""
    warned: set[str] = set()
    with deterministic(warned):
        whole = [_job(folder / "whole", device, *words) for words in GROUP[1:]]
        _finished(whole)
        parts = [_job(folder / "parts", device, *words) for words in GROUP[1:]]
        with stopped_at(2, 1):
            results = fit(parts)
        if {result["status"] for result in results} != {"KILLED"}:
            raise Differs("the training was not stopped")
        _finished(parts)
    distances = [_compare(a, b) for a, b in zip(whole, parts, strict=True)]
    return _bits(max(distances), warned, f"{len(whole)} students, stopped in epoch 2 of 2")


def plain(device: torch.device, folder: Path) -> str:
    """Train twice as a user does, and tell how far the results are apart."""
    jobs = [_job(folder / place, device, *GROUP[0]) for place in ("one", "two")]
    for job in jobs:
        _finished([job])
    distance = _compare(*jobs)
    if distance > TRAINED_TOLERANCE:
        raise Differs(f"two equal trainings of {2 * STEPS} steps are {distance:.1e} apart")
    told = f"weights {distance:.1e} apart" if distance else "bit for bit"
    return f"two equal trainings of {2 * STEPS} steps: {told}"


def precision(device: torch.device, folder: Path, name: str) -> str:
    """Train in a narrow format and compare the loss with that of fp32."""
    # One step: in fp16, the steps whose gradients overflow are left out, so the next ones differ.
    words = ("trainer.epochs=1", "trainer.max_steps=1")
    wide = _job(folder / f"fp32-for-{name}", device, *words)
    narrow = _job(folder / name, device, f"trainer.precision={name}", *words)
    for job in (wide, narrow):
        _finished([job])
    ours, theirs = (rows(job)[0]["train/loss"] for job in (narrow, wide))
    distance = abs(ours - theirs) / theirs
    state = final(narrow)
    formats = {value.dtype for value in state["model"].values()}
    if distance > NARROW_LOSS_TOLERANCE or formats != {torch.float32, torch.int64}:
        raise Differs(f"train/loss {ours:.4f}, in fp32 {theirs:.4f}; weights {formats}")
    told = f"train/loss {ours:.4f}, in fp32 {theirs:.4f}"
    if name == "fp16":
        words = ("trainer.precision=fp16", "distiller.kd_weight=900")
        job = _job(folder / "overflow", device, *words)
        _finished([job])
        scale = final(job)["scaler"]["scale"]
        if not 0 < scale < 65536:
            raise Differs(f"the loss scale is {scale}, although the first losses overflow")
        told += f"; loss scale {scale:g}"
    return told


def compiled(device: torch.device, folder: Path) -> str:
    """Train with trainer.compile and compare the loss; the CPU traces without compiling."""
    real = torch.compile
    stand_in: Callable[..., Any] = real
    told = "compiled"
    if device.type == "cpu":
        stand_in, told = partial(real, backend="eager"), "traced, not compiled, on the CPU"
    jobs = [_job(folder / "plain", device), _job(folder / "c", device, "trainer.compile=true")]
    with mock.patch.object(torch, "compile", stand_in):
        for job in jobs:
            _finished([job])
    theirs, ours = (rows(job)[-1]["train/loss"] for job in jobs)
    distance = abs(ours - theirs) / theirs
    if distance > TRAINED_TOLERANCE:
        raise Differs(f"train/loss {ours:.5f}, without compilation {theirs:.5f}")
    return f"{told}: train/loss {ours:.5f}, without {theirs:.5f}"


def two_streams(device: torch.device, folder: Path) -> str:
    """Train two students on a CUDA stream each, and compare with one stream."""
    if device.type != "cuda":
        raise CannotRun("needs CUDA")
    warned: set[str] = set()
    with deterministic(warned), exact():
        one = _on_streams(device, folder, [None, None])
        two = _on_streams(device, folder, [torch.cuda.Stream(device) for _ in range(2)])
    distance = max(apart(a, b) for a, b in zip(two, one, strict=True))
    return _bits(distance, warned, f"2 students, {STEPS} steps")


def _on_streams(
    device: torch.device, folder: Path, streams: Sequence[torch.cuda.Stream | None]
) -> list[Tensor]:
    """Return the weights of two students after some steps, each on its stream."""
    jobs = [small_job(folder, recipe) for recipe in ("sd_kd_ls", "at")]
    group = build_group(jobs, device, images=192)
    for _ in range(STEPS):
        assert group.teacher is not None
        taps = ask(group.teacher, group.batch, group.runs)
        current = torch.cuda.current_stream(device)
        for run, stream in zip(group.runs, streams, strict=True):
            if stream is None:
                run.train_step(group.batch, taps)
                continue
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                run.train_step(group.batch, taps)
        for stream in streams:
            if stream is not None:
                current.wait_stream(stream)
    return [
        nn.utils.parameters_to_vector(run.model.parameters()).detach().clone() for run in group.runs
    ]


# Memory and several GPUs


class Inside:
    """A substitute for the process of a worker: it trains in this process when it is started.

    The limit of the GPU's memory, which is that of this process, then holds for it.
    """

    def __init__(self, command: list[str], *, env: dict[str, str], start_new_session: bool) -> None:
        folders = [Path(word) for word in command if (Path(word) / "config.yaml").is_file()]
        device = command[command.index("--device") + 1]
        self.returncode = worker.run(folders, device=device, progress="off")
        STARTED.append((len(folders), self.returncode))
        gc.collect()  # what the error of a full memory still holds
        torch.cuda.empty_cache()

    def poll(self) -> int:
        """Return the exit code; the work is done."""
        return self.returncode

    def kill(self) -> None:
        """Do nothing; the work is done."""


STARTED: list[tuple[int, int]] = []  # jobs and exit code of each worker of `Inside`


def out_of_memory(device: torch.device, folder: Path) -> str:
    """Run a group of four on a GPU whose memory holds two of them."""
    if device.type != "cuda":
        raise CannotRun("needs CUDA, whose memory can be limited")
    jobs = [_heavy(folder, device, f"seed={seed}") for seed in range(4)]
    for job in jobs:
        freeze(job)
    STARTED.clear()
    weights = sum(p.numel() * p.element_size() for p in create("vgg19", 10).parameters())
    gc.collect()
    torch.cuda.empty_cache()
    # Weights, gradients and momenta of four take 12 times the weights, those of two half of that.
    limit = torch.cuda.memory_reserved(device) + 10 * weights
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(limit / total, device)
    try:
        pool = Pool([str(device)], fail_fast=False, start=Inside)  # type: ignore[arg-type]
        pool.run([jobs], folder, [str(device)])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
        torch.cuda.empty_cache()
    statuses = [read_result(Path(job.run_dir)).get("status") for job in jobs]
    groups = [
        f"{number} ({'too large' if code == ExitCode.TOO_LARGE else f'exit code {code}'})"
        for number, code in STARTED
    ]
    told = f"limit {limit / 1e6:.0f} MB; groups that ran: {', '.join(groups)}"
    if statuses != ["FINISHED"] * 4 or STARTED[0] != (4, ExitCode.TOO_LARGE):
        raise Differs(f"{told}; the jobs ended as {statuses}")
    return told


def _heavy(folder: Path, device: torch.device, *overrides: str) -> Config:
    """Return a job whose student has many weights, and whose batches are small."""
    words = ("student=vgg19", "dataset.load.size=32", "trainer.batch_size=8", "trainer.epochs=1")
    return _job(folder, device, *words, "trainer.max_steps=2", "trainer.data_seed=0", *overrides)


def two_gpus(device: torch.device, folder: Path) -> str:
    """Train on two GPUs and compare with one."""
    count = torch.cuda.device_count() if device.type == "cuda" else 0
    if count < 2:
        raise CannotRun(f"needs two GPUs, and this machine has {count}")
    jobs = [
        _job(folder / "one", torch.device("cuda")),
        _job(folder / "two", torch.device("cuda"), "trainer.devices=2"),
    ]
    for job in jobs:
        _finished([job])
    theirs, ours = (rows(job)[-1]["train/loss"] for job in jobs)
    distance = abs(ours - theirs) / theirs
    if distance > TRAINED_TOLERANCE:
        raise Differs(f"train/loss {ours:.5f} on two GPUs, {theirs:.5f} on one")
    return f"train/loss {ours:.5f} on two GPUs, {theirs:.5f} on one"


def learns_digits(device: torch.device, folder: Path) -> str:
    """Train resnet8 on the digits, and compare its accuracy with the CPU's."""
    try:
        digits()
    except PackageNotFoundError:
        raise CannotRun("scikit-learn, which holds the digits, is not installed") from None
    top1 = {}
    for place in dict.fromkeys((device.type, "cpu")):
        job = composed(
            folder / place,
            "dataset=digits",
            "student=resnet8",
            "distiller=vanilla",
            "tracking=none",
            "trainer.progress=off",
            f"trainer.epochs={DIGITS_EPOCHS}",
            f"trainer.device={device if place == device.type else place}",
        )
        _finished([job])
        top1[place] = json.loads(Path(job.run_dir, "result.json").read_text())["best_top1"]
    told = ", ".join(f"{place} {value:.1f} %" for place, value in top1.items())
    told = f"top-1 after {DIGITS_EPOCHS} epochs: {told}"
    if min(top1.values()) < DIGITS_TOP1 or top1[device.type] < top1["cpu"] - DIGITS_APART:
        raise Differs(f"{told}; at least {DIGITS_TOP1:g} %, and at most {DIGITS_APART:g} apart")
    return told
