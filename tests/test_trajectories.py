"""Our trainings follow the released trainers of SDD and LSKD step by step, as composed.

tests/reference/trajectories.py made the curves, from the same weights, images and labels.
"""

from functools import cache
from pathlib import Path

import pytest
import torch

from sddlskd.config import Config
from sddlskd.data.device import Batch
from sddlskd.models import LogitMapModel, Taps, create
from sddlskd.record import Onlooker
from sddlskd.training.build import build_network, build_run
from tests.reference.trajectories import (
    BATCHES,
    CASES,
    CLASSES,
    TEACHERS,
    Case,
    draw_images,
    draw_weights,
    read,
    teach,
)
from tests.tiny import composed

CPU = torch.device("cpu")
CURVES = read()


def job_of(case: Case) -> Config:
    words = (f"recipe={case.recipe}", f"pair={case.pair}", "trainer=cpu", "tracking=none")
    return composed(Path("/home/of/no/test"), *words, *case.overrides)


@cache
def teacher_of(name: str, batch: int) -> LogitMapModel:
    """Return a teacher that is fitted to the first `batch` images."""
    network = create(name, num_classes=CLASSES)
    teach(network, TEACHERS[name][1], draw_images(BATCHES * batch)[:batch])
    return network


@cache
def taps_of(teacher: str, batch: int, step: int) -> Taps:
    """Return the taps of a teacher for a batch of `batch` images."""
    images_BCHW = draw_images(BATCHES * batch).split(batch)[step]
    with torch.no_grad():
        return Taps.of_map(teacher_of(teacher, batch)(images_BCHW))


def losses_of(case: Case, job: Config, steps: int) -> list[float]:
    """Return the losses of the first steps of a training in float64."""
    images, labels = draw_images(BATCHES * case.batch), torch.tensor(CURVES[case.name].labels)
    student = build_network(job.student.model, CLASSES, 0, CPU)
    draw_weights(student, case.seed)
    run = build_run(job, student.train(), Onlooker(job), CPU, BATCHES, images=len(images))
    run.sums = run.sums.double()
    losses = []
    for step in range(steps):
        run.progress.epoch, run.progress.step = 1 + step // BATCHES, step % BATCHES
        seen = slice(run.step * case.batch, (run.step + 1) * case.batch)
        batch = Batch(images[seen], labels[seen], torch.arange(case.batch), None, run.epoch)
        run.sums.zero_()
        run.train_step(batch, taps_of(case.teacher, case.batch, run.step))
        losses.append(run.sums[0].item() / case.batch)
    return losses


def departure(case: Case, losses: list[float]) -> float:
    """Return the largest relative difference between losses and the authors' curve."""
    expected = CURVES[case.name].losses[: len(losses)]
    return max(abs(ours / theirs - 1) for ours, theirs in zip(losses, expected, strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_first_steps_follow_the_authors_program(case: Case) -> None:
    assert departure(case, losses_of(case, job_of(case), case.quick)) < 1e-9


@pytest.mark.long
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_training_follows_the_authors_program(case: Case) -> None:
    assert departure(case, losses_of(case, job_of(case), len(CURVES[case.name].losses))) < 1e-9
