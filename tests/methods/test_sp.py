import math

import pytest
import torch

from sddlskd.methods import create
from tests.methods import drawn


def test_the_loss_is_the_difference_of_the_similarity_matrices() -> None:
    student, teacher = drawn.taps(drawn.STUDENT, seed=1), drawn.taps(drawn.TEACHER, seed=2)

    def rows(map_BCHW):
        images = len(map_BCHW)
        table = [[(map_BCHW[i] * map_BCHW[j]).sum() for j in range(images)] for i in range(images)]
        return [[entry / sum(e**2 for e in row).sqrt() for entry in row] for row in table]

    own, other = rows(student.stages[-1]), rows(teacher.stages[-1].detach())
    parts = [(own[i][j] - other[i][j]) ** 2 for i in range(5) for j in range(5)]
    drawn.assert_same(create("sp", student, teacher), sum(parts) / 25, student, teacher)


def test_two_images_by_hand() -> None:
    # The products of the images are [[1, 1], [1, 2]] and [[1, 0], [0, 1]].
    student = drawn.taps(((1, 1), (2, 1)), images=2)
    teacher = drawn.taps(((1, 1), (2, 1)), images=2)
    own = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)[:, :, None, None]
    other = torch.eye(2, dtype=torch.float64)[:, :, None, None]
    student = student._replace(stages=(own, own))
    teacher = teacher._replace(stages=(other, other))
    half, fifth = 1 / math.sqrt(2), 1 / math.sqrt(5)
    expected = ((1 - half) ** 2 + half**2 + fifth**2 + (1 - 2 * fifth) ** 2) / 4
    loss = create("sp", student, teacher)(student, teacher, drawn.batch(2))
    assert math.isclose(loss.item(), expected, rel_tol=1e-9)


def test_a_batch_of_one_image_has_no_loss() -> None:
    student = drawn.taps(drawn.STUDENT, images=1)
    teacher = drawn.taps(drawn.TEACHER, images=1)
    loss = create("sp", student, teacher)(student, teacher, drawn.batch(1))
    assert loss.item() < 1e-20


def test_sd_sp_is_the_mean_of_sp_over_the_cells_of_all_scales() -> None:
    student, teacher = drawn.taps(drawn.STUDENT, seed=1), drawn.taps(drawn.TEACHER, seed=2)
    expected = torch.zeros((), dtype=torch.float64)
    # The last stages have sides of 2 and 4: one cell of the whole map, and four quarters.
    for row, column, share in ((0, 0, 1), (0, 0, 2), (0, 1, 2), (1, 0, 2), (1, 1, 2)):
        cells = []
        for map_BCHW in (student.stages[-1], teacher.stages[-1].detach()):
            side = map_BCHW.shape[2] // share
            rows, columns = (slice(at * side, (at + 1) * side) for at in (row, column))
            cells.append(map_BCHW[:, :, rows, columns].mean((2, 3), keepdim=True))
        own, other = (
            shown._replace(stages=(shown.stages[0], cell))
            for shown, cell in zip((student, teacher), cells, strict=True)
        )
        expected = expected + create("sp", student, teacher)(own, other, drawn.batch()) / 5
    drawn.assert_same(create("sp", student, teacher, M=[1, 2]), expected, student, teacher)


def test_scales_that_are_not_valid_are_refused() -> None:
    with pytest.raises(ValueError, match=r"M=\[1, 1\]"):
        create("sp", drawn.taps(drawn.STUDENT), drawn.taps(drawn.TEACHER), M=[1, 1])
    with pytest.raises(ValueError, match=r"M=3 is not a list of scales"):
        create("sp", drawn.taps(drawn.STUDENT), drawn.taps(drawn.TEACHER), M=3)
