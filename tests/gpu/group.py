"""Build students, teacher and a batch as a training does, on any device and in any number format.

Shapes: B batch, C channels, H W sides, K classes.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from sddlskd.config import Config
from sddlskd.config.targets import instantiate
from sddlskd.data.device import Batch
from sddlskd.models import Taps
from sddlskd.record import Onlooker
from sddlskd.training.build import build_network, build_run
from sddlskd.training.features import build_features, student_network
from sddlskd.training.inputs import Inputs
from sddlskd.training.objective import Feature
from sddlskd.training.run import Run
from sddlskd.training.teacher import Teacher
from tests.tiny import CONF, composed

SEED = 0
STEPS = 782  # of an epoch of 50,000 images in batches of 64
# Settings without which a recipe is refused
NEEDED = {"mld": ("dataset.multi_label=true",)}


@dataclass
class Group:
    """Runs that share a teacher, and one batch for them.

    Attributes:
        runs: the runs.
        teacher: the teacher; None if the runs learn from the labels alone.
        batch: the batch.
        inputs: gives the runs what they read in a step.
    """

    runs: list[Run]
    teacher: Teacher | None
    batch: Batch
    inputs: Inputs

    def step(self, batch: Batch | None = None) -> None:
        """Ask the teacher once, and train each run for a step, as the training loop does."""
        batch, taps = self.inputs(batch or self.batch, self.runs)
        for run in self.runs:
            run.train_step(batch, taps)
        for run in self.runs:
            run.wait()


def recipes() -> list[str]:
    """Return the names of all recipes that have a loss of their own."""
    return sorted(path.stem for path in (CONF / "recipe").glob("*.yaml") if path.stem != "none")


def small_job(folder: Path, recipe: str, *overrides: str) -> Config:
    """Return a job of resnet8 -> resnet8 on small images, whose methods need few images.

    Args:
        folder: home of the job.
        recipe: name of the recipe.
        *overrides: further overrides.
    """
    job = composed(
        folder,
        "dataset=fake",
        "dataset.num_classes=10",
        "dataset.views=weak_strong",
        "teacher=resnet8",
        "student=resnet8",
        "tracking=none",
        "trainer.batch_size=16",
        "trainer.capture=off",
        f"recipe={recipe}",
        *NEEDED.get(recipe, ()),
        *overrides,
    )
    for feature in job.features.values():
        build = instantiate(feature.method, _partial_=True)
        options = inspect.signature(build.func).parameters
        for option, value in (("K", 16), ("stage_epochs", 1)):
            if option in options:
                feature.method[option] = value
    return job


def random_batch(
    image_CHW: Sequence[int],
    images: int,
    classes: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    multi_label: bool = False,
) -> Batch:
    """Return a batch of two random views, with its indices on the CPU as the data sets give them.

    Args:
        image_CHW: shape of an image.
        images: B.
        classes: number of classes.
        device: device of images and labels.
        dtype: number format of the images.
        multi_label: whether images have several labels.
    """
    generator = torch.Generator().manual_seed(SEED)

    def view() -> Tensor:
        x_BCHW = torch.randn(images, *image_CHW, generator=generator)
        return x_BCHW.to(device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)

    weak, strong = view(), view()
    labels = torch.randint(classes, (images,), generator=generator)
    if multi_label:
        labels = torch.randint(2, (images, classes), generator=generator)
    index = torch.arange(images)
    return Batch(weak, labels.to(device), index, index * 162, epoch=1, strong=strong)


def build_group(
    jobs: Sequence[Config],
    device: torch.device,
    *,
    image_CHW: Sequence[int] = (3, 32, 32),
    images: int = 50_000,
    dtype: torch.dtype = torch.float32,
) -> Group:
    """Return the group of some jobs that share a teacher, whose weights are random.

    All initial values are drawn as in a training, so they are the same for every device and format.

    Args:
        jobs: the jobs; precision, compilation and batch size are those of the first one.
        device: device of the group.
        image_CHW: shape of an image.
        images: number of training images, for methods that remember each.
        dtype: number format of the networks and methods; float64 for reference values.
    """
    first = jobs[0]
    classes = first.dataset.num_classes
    network = partial(build_network, num_classes=classes, device=device)
    teacher_network: nn.Module | None = None
    if first.has_teacher:
        teacher_network = network(first.teacher.model, seed=SEED + 1).eval()
    labels_N = torch.arange(images) % classes
    runs = []
    for job in jobs:
        student = network(job.student.model, seed=job.seed)
        features: dict[str, Feature] = {}
        if teacher_network is not None:
            networks = student, teacher_network
            student = student_network(job, *networks, image_CHW=image_CHW, device=device)
            features = build_features(
                job,
                student,
                teacher_network,
                image_CHW=image_CHW,
                labels_N=labels_N,
                device=device,
            )
        for feature in features.values():
            feature.method.to(dtype)
        student = _cast(student, dtype)
        opened = Onlooker(job)  # a group of checks writes no files
        run = build_run(job, student, opened, device, STEPS, images=images, features=features)
        run.objective.modules.to(dtype)
        runs.append(run)
    teacher = None
    if teacher_network is not None:
        teacher = Teacher(
            _cast(teacher_network, dtype),
            None,
            name=first.teacher.name,
            device=device,
            precision=first.trainer.precision,
            compile=first.trainer.compile,
            compile_mode=first.trainer.compile_mode,
        )
    batch = random_batch(
        image_CHW,
        first.trainer.batch_size,
        classes,
        device,
        dtype,
        multi_label=first.dataset.multi_label,
    )
    return Group(runs, teacher, batch, Inputs(runs, teacher))


def _cast(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    cast: nn.Module = network.to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return cast


def flat_taps(taps: Taps) -> dict[str, Tensor]:
    """Return the tensors of taps by name."""
    named = {"logit_map": taps.logit_map, "pooled": taps.pooled}
    for kind in ("stages", "preacts"):
        named |= {f"{kind}[{i}]": tensor for i, tensor in enumerate(getattr(taps, kind))}
    return named


def values(run: Run) -> dict[str, Tensor]:
    """Return everything that a step has changed, by name: gradients, momenta, buffers."""
    named = [*run.model.named_parameters(), *run.objective.modules.named_parameters()]
    found = {f"grad {name}": p.grad for name, p in named if p.grad is not None}
    for name, parameter in named:
        for key, value in run.optimisation.optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                found[f"{key} {name}"] = value
    buffers = [*run.model.named_buffers(), *run.objective.modules.named_buffers()]
    found |= {f"buffer {name}": value for name, value in buffers if value.is_floating_point()}
    return found
