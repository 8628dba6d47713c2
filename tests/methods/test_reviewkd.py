import pytest
import torch
from torch import nn

from sddlskd.methods import create
from tests.methods import drawn
from tests.methods.test_fitnet import convolved
from tests.methods.test_nst import pooled

MORE = (*drawn.STUDENT, (7, 1))


def resized(map_BCHW, side):
    """Return the map at another side, each cell from the nearest one."""
    own = map_BCHW.shape[2]
    places = [i * own // side for i in range(side)]
    return map_BCHW[:, :, places][:, :, :, places]


def conv_bn(map_BCHW, layers, padding):
    conv, norm = layers
    plain = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size).double()
    plain.weight, plain.bias = conv.weight, nn.Parameter(torch.zeros(conv.out_channels).double())
    shifted = [
        (x - x.mean()) / ((x - x.mean()) ** 2).mean().add(1e-5).sqrt()
        for x in convolved(map_BCHW, plain, 1, padding).unbind(1)
    ]
    pairs = zip(shifted, norm.weight, norm.bias, strict=True)
    return torch.stack([x * weight + bias for x, weight, bias in pairs], 1)


def expected(method, own, other):
    """Return the loss of levels that are listed from the top."""
    loss, above = 0, None
    for x, goal, fusion in zip(own, other, method.abfs, strict=True):
        x = conv_bn(x, fusion.conv1, 0)
        if above is not None:
            y = resized(above, x.shape[2])
            a, b = torch.sigmoid(convolved(torch.cat([x, y], 1), fusion.att_conv[0], 1, 0)).unbind(
                1
            )
            x = a[:, None] * x + b[:, None] * y
        above = resized(x, goal.shape[2])
        z = conv_bn(above, fusion.conv2, 1)
        error, total, weight = ((z - goal) ** 2).mean(), 1.0, 1.0
        for side in [side for side in (4, 2, 1) if side < goal.shape[2]]:
            weight /= 2
            total += weight
            error = error + weight * ((pooled(z, side) - pooled(goal, side)) ** 2).mean()
        loss = loss + error / total
    return loss


def levels(maps, pooled_BC, count):
    return [pooled_BC[:, :, None, None], *list(maps)[::-1]][:count]


@pytest.mark.parametrize(
    ("own", "other", "options"),
    [
        (drawn.STUDENT, drawn.TEACHER, {}),
        (drawn.TEACHER, drawn.STUDENT, {"student_preacts": True}),
        (MORE, drawn.TEACHER, {"alignment": "from_end"}),
        (drawn.TEACHER, MORE, {"alignment": "from_end"}),
    ],
)
def test_the_loss_compares_fused_levels(own, other, options: dict) -> None:
    student, teacher = drawn.taps(own, 9, seed=1), drawn.taps(other, 8, seed=2)
    method = create("reviewkd", student, teacher, **options).double()
    for name, parameter in method.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    maps = student.stages
    if options.get("student_preacts"):
        maps = student.preacts
    loss = expected(
        method,
        levels(maps[1:], student.pooled, 4),
        levels(drawn.detached(teacher).preacts[1:], teacher.pooled.detach(), 4),
    )
    drawn.assert_same(method, loss, student, teacher)


def test_the_parameters_have_the_published_names() -> None:
    taps = drawn.taps(((2, 8), (3, 8), (4, 4)), 600, images=2)
    method = create("reviewkd", taps, taps)
    shapes = {name: tuple(p.shape) for name, p in method.named_parameters()}
    assert shapes["abfs.0.conv1.0.weight"] == (512, 600, 1, 1)
    assert shapes["abfs.0.conv2.0.weight"] == (600, 512, 3, 3)
    assert shapes["abfs.2.conv1.1.bias"] == (512,)
    assert shapes["abfs.2.att_conv.0.bias"] == (2,)
    assert "abfs.0.att_conv.0.weight" not in shapes


def test_a_student_needs_no_preactivations() -> None:
    student, teacher = drawn.taps(drawn.STUDENT)._replace(preacts=()), drawn.taps(drawn.TEACHER)
    method = create("reviewkd", student, teacher).double()
    assert method(student, teacher, drawn.batch()) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "the student has 4 stages after the stem and the teacher 3; set alignment=from_end"),
        ({"alignment": "front"}, "alignment='front'; choose one of: strict, from_end"),
        ({"student_preacts": "no"}, "student_preacts='no' must be true or false"),
        (
            {"alignment": "from_end", "labels_N": torch.zeros(33), "batch_size": 16},
            "33 images in batches of 16 leave one: set another trainer.batch_size",
        ),
    ],
)
def test_what_does_not_fit_is_refused(options: dict, message: str) -> None:
    student, teacher = drawn.taps(MORE), drawn.taps(drawn.TEACHER)
    with pytest.raises(ValueError, match=message):
        create("reviewkd", student, teacher, **options)


def test_a_last_batch_of_one_image_may_be_left_out() -> None:
    taps = drawn.taps(drawn.STUDENT), drawn.taps(drawn.STUDENT)
    create("reviewkd", *taps, labels_N=torch.zeros(33), batch_size=16, drop_last=True)
    with pytest.raises(ValueError, match=r"or dataset\.drop_last=true"):
        create("reviewkd", *taps, labels_N=torch.zeros(33), batch_size=16)


@pytest.mark.parametrize(
    ("who", "options"), [("teacher", {}), ("student", {"student_preacts": True})]
)
def test_missing_preactivations_are_refused(who: str, options: dict) -> None:
    pair = {"student": drawn.taps(drawn.STUDENT), "teacher": drawn.taps(drawn.STUDENT)}
    pair[who] = pair[who]._replace(preacts=())
    with pytest.raises(ValueError, match=f"the {who} has no preacts"):
        create("reviewkd", *pair.values(), **options)
