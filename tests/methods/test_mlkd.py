"""MLKD against a computation with loops over images, classes and temperatures."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sddlskd.methods import Taps, create
from tests.methods.drawn import STUDENT, TEACHER, batch, gradients, taps
from tests.tiny import composed

CLASSES, IMAGES = 4, 6


def seen(seed: int, shapes: Sequence[tuple[int, int]]) -> Taps:
    """Return float64 taps of two views of six images."""
    strong = taps(shapes, seed=seed + 1, images=IMAGES, classes=CLASSES).logit_map
    weak = taps(shapes, seed=seed, images=IMAGES, classes=CLASSES)
    return weak._replace(logit_map=3 * weak.logit_map, strong_map=2 * strong)


def without_gradient(both: Taps) -> Taps:
    assert both.strong_map is not None
    return both._replace(logit_map=both.logit_map.detach(), strong_map=both.strong_map.detach())


def rows(logit_map_BKHW: Tensor | None) -> list[list[Tensor]]:
    """Return the logits as a list of scalars for each image."""
    assert logit_map_BKHW is not None
    return [[cells.mean() for cells in image] for image in logit_map_BKHW]


def softmax(row: list[Tensor], temperature: float) -> list[Tensor]:
    powers = [(value / temperature).exp() for value in row]
    return [power / sum(powers) for power in powers]


def z_score(row: list[Tensor]) -> list[Tensor]:
    mean = sum(row) / len(row)
    variance = sum((value - mean) ** 2 for value in row) / (len(row) - 1)
    return [(value - mean) / (variance**0.5 + 1e-7) for value in row]


def divergences(own: list[list[Tensor]], other: list[list[Tensor]], T: float) -> list[Tensor]:
    return [
        T**2 * sum(q * (q / p).log() for p, q in zip(softmax(a, T), softmax(b, T), strict=True))
        for a, b in zip(own, other, strict=True)
    ]


def gram_errors(own: list[list[Tensor]], other: list[list[Tensor]]) -> list[Tensor]:
    """Return the squared errors of the products of all pairs of rows, summed for each row."""

    def product(a: list[Tensor], b: list[Tensor]) -> Tensor:
        return sum((x * y for x, y in zip(a, b, strict=True)), torch.tensor(0.0))

    return [
        sum(
            ((product(own[i], own[j]) - product(other[i], other[j])) ** 2 for j in range(len(own))),
            torch.tensor(0.0),
        )
        for i in range(len(own))
    ]


def naive(
    student: Taps,
    teacher: Taps,
    labels: list[int],
    *,
    temperatures: Sequence[float],
    strong_at: Sequence[int],
    standardize: bool,
    each: bool,
) -> Tensor:
    """Return the loss with weights 0.9 and 0.1."""
    weak, strong = rows(student.logit_map), rows(student.strong_map)
    weak_t, strong_t = rows(teacher.logit_map), rows(teacher.strong_map)
    sure = [[float(value) for value in softmax(row, 1.0)] for row in weak_t]
    most = [max(row) for row in sure]
    of_class = [sum(column) for column in zip(*sure, strict=True)]
    images = [float(value <= np.percentile(most, 50)) for value in most]
    classes = [float(value <= np.percentile(of_class, 50)) for value in of_class]

    def masked(losses: list[Tensor], mask: list[float]) -> Tensor:
        if each:
            return sum(a * b for a, b in zip(losses, mask, strict=True)) / len(losses)
        return sum(losses) / len(losses) * sum(mask) / len(mask)

    def z(logits: list[list[Tensor]]) -> list[list[Tensor]]:
        return [z_score(row) for row in logits] if standardize else logits

    loss = torch.tensor(0.0, dtype=torch.float64)
    for place, T in enumerate(temperatures):
        of_weak = divergences(z(weak), z(weak_t), T)
        of_strong = divergences(z(strong), z(strong_t), T) if place in strong_at else of_weak
        loss = loss + masked(of_weak, images) + sum(of_strong) / len(of_strong)
        p, q = ([softmax(row, T) for row in logits] for logits in (weak, weak_t))
        loss = loss + masked(gram_errors(p, q), images)
        p, q = ([list(column) for column in zip(*rows_, strict=True)] for rows_ in (p, q))
        loss = loss + masked(gram_errors(p, q), classes)
    ce = -sum(softmax(row, 1.0)[label].log() for row, label in zip(strong, labels, strict=True))
    return 0.9 * loss + 0.1 * ce / len(strong)


@pytest.mark.parametrize(
    ("standardize", "masks", "strong_only_at"),
    [(False, "share", (0, 1, 2)), (True, "share", (0, 1, 2)), (False, "each", None)],
)
def test_loss_and_gradient_are_those_of_the_formula(
    standardize: bool, masks: str, strong_only_at: tuple[int, ...] | None
) -> None:
    student, teacher = seen(1, STUDENT), seen(5, TEACHER)
    temperatures = (2.0, 3.0, 5.0, 2.0)
    method = create(
        "mlkd",
        student,
        teacher,
        temperatures=temperatures,
        standardize=standardize,
        masks=masks,
        strong_only_at=strong_only_at,
    )
    images = batch(IMAGES, classes=CLASSES)
    loss = method(student, without_gradient(teacher), images)
    expected = naive(
        student,
        without_gradient(teacher),
        images.labels.tolist(),
        temperatures=temperatures,
        strong_at=range(4) if strong_only_at is None else strong_only_at,
        standardize=standardize,
        each=masks == "each",
    )
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    assert student.strong_map is not None
    wanted = [student.logit_map, student.strong_map]
    for own, other in zip(gradients(loss, wanted), gradients(expected, wanted), strict=True):
        assert own.abs().max() > 0
        torch.testing.assert_close(own, other, rtol=1e-6, atol=1e-9)


def test_a_student_like_its_teacher_has_only_the_cross_entropy() -> None:
    both = seen(1, STUDENT)
    images = batch(IMAGES, classes=CLASSES)
    loss = create("mlkd", both, both)(both, without_gradient(both), images)
    assert both.strong_map is not None
    logits = both.strong_map.mean((2, 3))
    expected = 0.1 * torch.nn.functional.cross_entropy(logits, images.labels)
    assert math.isclose(loss.item(), expected.item(), rel_tol=1e-9)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"temperatures": []}, "temperatures"),
        ({"temperatures": [4, 0]}, "temperatures"),
        ({"masks": "none"}, "share, each"),
        ({"standardize": "no"}, "standardize='no' must be true or false"),
        ({"strong_only_at": [0, 5]}, "holds 5"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], reason: str) -> None:
    both = seen(1, STUDENT)
    with pytest.raises(ValueError, match=reason):
        create("mlkd", both, both, **options)


@pytest.mark.parametrize(
    ("recipe", "pair", "epochs", "rate", "decays"),
    [
        ("mlkd", (), 240, 0.025, (150, 180, 210)),
        ("mlkd", ("student=shufflev1",), 960, 0.01, (150, 180, 210)),
        ("mlkd_ls", (), 480, 0.025, (150, 180, 210)),
        ("mlkd_ls", ("teacher=vgg13", "student=vgg8"), 480, 0.01, (150, 180, 210)),
        ("mlkd_ls", ("student=shufflev2",), 960, 0.01, (150, 180, 210)),
        ("mlkd", ("dataset=imagenet", "pair=imagenet_resnet50_mobilev1"), 100, 0.2, (30, 60, 90)),
    ],
)
def test_the_recipes_train_as_the_papers_do(
    tmp_path: Path,
    recipe: str,
    pair: tuple[str, ...],
    epochs: int,
    rate: float,
    decays: tuple[int, ...],
) -> None:
    job = composed(tmp_path, f"recipe={recipe}", *pair)
    assert (job.trainer.epochs, job.optimizer.lr) == (epochs, rate)
    assert tuple(round(part * epochs) for part in job.optimizer.milestones) == decays
    assert job.distiller.ce_weight == job.features["mlkd"].method["ce_weight"]
    assert job.dataset.views == "weak_strong"
