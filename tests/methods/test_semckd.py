"""SemCKD against loops over images and pairs of stages."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sddlskd.methods import Method, Taps, create
from tests.methods.drawn import STUDENT, TEACHER, assert_same, batch, detached, taps

IMAGES = 5


def method_for(student: Taps, teacher: Taps, **options: object) -> Method:
    torch.manual_seed(0)
    settings = {"batch_size": IMAGES, "factor": 2} | options
    return create("semckd", student, teacher, **settings).double()


def embedded(method: Method, name: str, stage_BCHW: Tensor) -> Tensor:
    rows = []
    mlp = method.get_submodule(name)
    first, second = mlp.get_submodule("linear1"), mlp.get_submodule("linear2")
    for i in range(IMAGES):
        row = [(stage_BCHW[i] * stage_BCHW[j]).sum() for j in range(IMAGES)]
        out = second(first(torch.stack(row)).relu())
        rows.append(out / (out @ out).sqrt())
    return torch.stack(rows)


def test_loss_and_gradients() -> None:
    student, teacher = taps(STUDENT, seed=1), taps((*TEACHER, (3, 4)), seed=2)
    method = method_for(student, teacher, soft=0.5)
    own, other = student.stages[1:], [stage.detach() for stage in teacher.stages[1:]]
    assert (len(own), len(other)) == (3, 4)
    queries = [embedded(method, f"query_{i}", stage) for i, stage in enumerate(own)]
    keys = [embedded(method, f"key_{j}", stage) for j, stage in enumerate(other)]
    expected = torch.zeros((), dtype=torch.float64)
    for i, source in enumerate(own):
        energy_BT = torch.stack([(queries[i] * key).sum(1) / 0.5 for key in keys], 1)
        weight_BT = energy_BT.exp() / energy_BT.exp().sum(1, keepdim=True)
        for j, target in enumerate(other):
            side = min(source.shape[2], target.shape[2])
            regressor = method.get_submodule(f"regressor{i}{j}")
            projected = regressor(F.adaptive_avg_pool2d(source, side))
            difference = projected - F.adaptive_avg_pool2d(target, side)
            for b in range(IMAGES):
                expected = expected + weight_BT[b, j] * (difference[b] ** 2).mean() / (IMAGES * 3)
    assert_same(method, expected, student, teacher)


def test_parameters_have_the_names_and_shapes_of_the_released_code() -> None:
    state = method_for(taps(STUDENT), taps(TEACHER)).state_dict()
    assert state["query_2.linear1.weight"].shape == (4, 5)  # 2 * D, B
    assert state["key_0.linear2.weight"].shape == (2, 4)
    assert state["regressor12.regressor.0.weight"].shape == (16, 6, 1, 1)
    assert state["regressor12.regressor.3.weight"].shape == (16, 16, 3, 3)
    assert state["regressor12.regressor.6.weight"].shape == (8, 16, 1, 1)


def test_a_smaller_batch_does_not_count() -> None:
    student, teacher = taps(STUDENT, images=4), taps(TEACHER, images=4)
    assert method_for(student, teacher)(student, detached(teacher), batch(4)).item() == 0


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size=3 is too small for SemCKD's factor=4"):
        create("semckd", taps(STUDENT), taps(TEACHER), batch_size=3)
    with pytest.raises(ValueError, match="the student has no stages"):
        create("semckd", Taps.of_map(torch.zeros(2, 3, 1, 1)), taps(TEACHER), batch_size=8)
