import math

import pytest
import torch
from scipy.stats import norm as normal
from torch import nn

from sddlskd.methods import create
from sddlskd.methods.ofd import margins
from sddlskd.models import create as network
from tests.methods import drawn
from tests.methods.test_reviewkd import MORE, conv_bn


def teacher_of(shapes, seed=0):
    """Return a network whose BatchNorms in front of the ReLUs are drawn for these shapes."""
    torch.manual_seed(seed)
    norms = []
    for channels, _ in shapes[1:]:
        norms.append(nn.BatchNorm2d(channels))
        nn.init.normal_(norms[-1].weight)
        nn.init.normal_(norms[-1].bias, std=2)
    teacher = network("resnet8", num_classes=3)
    teacher.norms_before_relu = lambda: tuple(norms)
    return teacher


def margin(weight, bias):
    s, m = abs(weight), bias
    if normal.cdf(-m / s) > 0.001:
        return m - s * normal.pdf(m / s) / normal.cdf(-m / s)
    return -3 * s


def pooled(map_BCHW, side):
    """Return adaptive average pooling, which repeats cells if the side grows."""
    own = map_BCHW.shape[2]
    spans = [slice(i * own // side, -(-(i + 1) * own // side)) for i in range(side)]
    rows = [torch.stack([map_BCHW[:, :, y, x].mean((2, 3)) for x in spans], 2) for y in spans]
    return torch.stack(rows, 2)


@pytest.mark.parametrize(
    ("own", "other", "options"),
    [
        (drawn.STUDENT, drawn.TEACHER, {}),
        (drawn.TEACHER, drawn.STUDENT, {"kernel": 3}),
        (MORE, drawn.TEACHER, {}),
        (drawn.TEACHER, MORE, {"alignment": "from_end"}),
        (drawn.STUDENT, drawn.TEACHER, {"alignment": "from_end"}),
    ],
)
def test_the_loss_is_the_distance_above_the_margins(own, other, options: dict) -> None:
    student, teacher = drawn.taps(own, seed=1, images=3), drawn.taps(other, seed=2, images=3)
    of_teacher = teacher_of(other)
    method = create("ofd", student, teacher, teacher_network=of_teacher, **options).double()
    norms = of_teacher.norms_before_relu()[-3:]
    expected = 0
    for i in range(3):
        x = conv_bn(student.preacts[-3 + i], method.connectors[i], options.get("kernel", 1) // 2)
        g = pooled(teacher.preacts[-3 + i].detach(), x.shape[2])
        weights, biases = norms[i].weight.tolist(), norms[i].bias.tolist()
        for c, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            edge = margin(weight, bias)
            mine, theirs = x[:, c], g[:, c]
            near = (theirs > 0) | ((theirs > edge) & (mine > theirs))
            far = (theirs <= edge) & (mine > edge)
            total = ((mine - theirs) ** 2)[near].sum() + ((mine - edge) ** 2)[far].sum()
            expected = expected + total / 3 / 2 ** (2 - i)
    drawn.assert_same(method, expected, student, teacher)


def test_margins_are_the_means_of_the_negative_values() -> None:
    norm = nn.BatchNorm2d(5)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, -2.0, 0.1, 0.0, 0.0]))
        norm.bias.copy_(torch.tensor([0.0, 1.0, 5.0, -1.0, 0.0]))
    found = margins(norm)
    assert found.dtype == torch.float32
    wanted = [-math.sqrt(2 / math.pi), float(margin(2, 1)), -0.3, -1, 0]
    assert torch.allclose(found, torch.tensor(wanted))


def test_a_student_without_preactivations_shows_its_stages_if_asked() -> None:
    student, teacher = drawn.taps(drawn.STUDENT), drawn.taps(drawn.TEACHER)
    linear = student._replace(preacts=())
    told = {"teacher_network": teacher_of(drawn.TEACHER), "stages_for_preacts": True}
    method = create("ofd", linear, teacher, **told).double()
    of_stages = student._replace(preacts=student.stages)
    batch = drawn.batch()
    assert torch.equal(method(linear, teacher, batch), method(of_stages, teacher, batch))
    with pytest.raises(ValueError, match="the student has no preacts"):
        create("ofd", linear, teacher, teacher_network=told["teacher_network"])


def test_the_parameters_have_the_published_names() -> None:
    student, teacher = drawn.taps(drawn.STUDENT), drawn.taps(drawn.TEACHER)
    method = create("ofd", student, teacher, teacher_network=teacher_of(drawn.TEACHER))
    state = method.state_dict()
    assert state["connectors.2.0.weight"].shape == (8, 5, 1, 1)
    assert state["connectors.2.1.bias"].shape == (8,)
    assert {name.split(".")[0] for name in state} == {"connectors"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "the teacher has 4 stages after the stem and the student 3; set alignment=from_end"),
        ({"alignment": "front"}, "alignment='front'; choose one of: strict, from_end"),
        ({"stages_for_preacts": "no"}, "stages_for_preacts='no' must be true or false"),
        ({"kernel": 2}, r"kernel=2 must be an odd number in 1\.\.31"),
        (
            {"alignment": "from_end", "teacher_network": nn.Identity()},
            "the teacher names 0 BatchNorms for its 4 stages",
        ),
    ],
)
def test_what_does_not_fit_is_refused(options: dict, message: str) -> None:
    student, teacher = drawn.taps(drawn.TEACHER), drawn.taps(MORE)
    with pytest.raises(ValueError, match=message):
        create("ofd", student, teacher, **{"teacher_network": teacher_of(MORE)} | options)
