import math

import pytest
import torch

from sddlskd.methods import create
from tests.methods import drawn


def smooth(difference):
    size = difference.abs()
    if size < 1:
        return difference**2 / 2
    return size - 0.5


def relations(pooled_BD, squared):
    images = range(len(pooled_BD))
    zero = torch.zeros((), dtype=torch.float64)

    def distance(i, j):
        if i == j:
            return zero
        square = ((pooled_BD[i] - pooled_BD[j]) ** 2).sum()
        return square if squared else square.sqrt()

    def direction(i, j):
        to = pooled_BD[j] - pooled_BD[i]
        return to if i == j else to / to.norm()

    table = [[distance(i, j) for j in images] for i in images]
    mean = sum(sum(row) for row in table) / (len(images) * (len(images) - 1))
    angles = [
        (direction(i, j) * direction(i, k)).sum() for i in images for j in images for k in images
    ]
    return [entry / mean for row in table for entry in row], angles


@pytest.mark.parametrize("options", [{}, {"squared": True, "angle_weight": 3.0}])
def test_the_loss_compares_distances_and_angles(options: dict) -> None:
    student = drawn.taps(drawn.STUDENT, 3, seed=1, images=4)
    teacher = drawn.taps(drawn.TEACHER, 9, seed=2, images=4)
    own = relations(student.pooled, options.get("squared", False))
    other = relations(teacher.pooled.detach(), options.get("squared", False))
    parts = [
        sum(smooth(a - b) for a, b in zip(mine, theirs, strict=True)) / len(mine)
        for mine, theirs in zip(own, other, strict=True)
    ]
    expected = 25 * parts[0] + options.get("angle_weight", 50) * parts[1]
    drawn.assert_same(create("rkd", student, teacher, **options), expected, student, teacher)


def test_three_points_by_hand() -> None:
    # Distances 3, 4, 5 and 1, 1, 2, with the means 4 and 4/3. The angles of the triangle are 90
    # degrees at the corner, and those of the line are 180 degrees in its middle and 0 at its ends.
    points = torch.tensor([[0.0, 0], [3, 0], [0, 4]], dtype=torch.float64)
    line = torch.tensor([[0.0], [1], [-1]], dtype=torch.float64)
    student = drawn.taps(drawn.STUDENT, images=3)._replace(pooled=points)
    teacher = drawn.taps(drawn.TEACHER, images=3)._replace(pooled=line)
    distances = 2 * (2 * (0.75 - 0.75) ** 2 / 2 + (1 - 0.75) ** 2 / 2 + (1.25 - 1.5) ** 2 / 2)
    angles = 2 * (1.0**1 - 0.5 + (1 - 0.6) ** 2 / 2 + (1 - 0.8) ** 2 / 2)
    loss = create("rkd", student, teacher)(student, teacher, drawn.batch(3))
    assert math.isclose(loss.item(), 25 * distances / 9 + 50 * angles / 27, rel_tol=1e-9)


def test_equal_features_have_finite_gradients() -> None:
    student = drawn.taps(drawn.STUDENT, images=4)
    teacher = drawn.taps(drawn.TEACHER, images=4)
    alike = torch.ones(4, 6, dtype=torch.float64, requires_grad=True)
    student = student._replace(pooled=alike)
    loss = create("rkd", student, teacher, angle_weight=0)(student, teacher, drawn.batch(4))
    loss.backward()
    assert torch.isfinite(alike.grad).all()


def test_a_batch_of_one_image_has_no_loss() -> None:
    student, teacher = drawn.taps(drawn.STUDENT, images=1), drawn.taps(drawn.TEACHER, images=1)
    loss = create("rkd", student, teacher)(student, teacher, drawn.batch(1))
    loss.backward()
    assert loss.item() == 0
    assert not student.pooled.grad.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distance_weight": -1}, "distance_weight=-1 must be at least 0"),
        ({"angle_weight": math.nan}, "angle_weight=nan must be at least 0"),
        ({"squared": 2}, "squared=2 must be true or false"),
        ({"eps": 0}, "eps=0 must be greater than 0"),
    ],
)
def test_options_out_of_bounds_are_refused(options: dict, message: str) -> None:
    taps = drawn.taps(drawn.STUDENT)
    with pytest.raises(ValueError, match=message):
        create("rkd", taps, taps, **options)


def test_the_memory_of_a_batch_of_64_is_below_a_gibibyte() -> None:
    student, teacher = drawn.on_meta(drawn.RESNET8X4, 256), drawn.on_meta(drawn.RESNET32X4, 256)
    assert drawn.peak_bytes(create("rkd", student, teacher), student, teacher) < 2**30
