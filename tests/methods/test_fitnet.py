import pytest
import torch
from torch import nn

from sddlskd.methods import create
from tests.methods import drawn


def normalised(map_BCHW, norm):
    """Return BatchNorm in train mode, then ReLU, channel by channel."""
    channels = []
    for c in range(map_BCHW.shape[1]):
        x = map_BCHW[:, c]
        centred = x - x.mean()
        unit = centred / ((centred**2).mean() + 1e-5).sqrt()
        channels.append((unit * norm.weight[c] + norm.bias[c]).clamp(min=0))
    return torch.stack(channels, 1)


def convolved(map_BCHW, conv, stride, padding):
    """Return a convolution, cell by cell."""
    size = conv.kernel_size[0]
    padded = nn.functional.pad(map_BCHW, [padding] * 4)
    side = (padded.shape[2] - size) // stride + 1
    cells = [
        torch.einsum("bchw,ochw->bo", padded[:, :, y : y + size, x : x + size], conv.weight)
        for y in range(0, side * stride, stride)
        for x in range(0, side * stride, stride)
    ]
    return torch.stack(cells, 2).unflatten(2, (side, side)) + conv.bias[:, None, None]


def transposed(map_BCHW, conv):
    """Return the transposed 4x4 convolution with stride 2 and padding 1, cell by cell."""
    images, _, side, _ = map_BCHW.shape
    out = map_BCHW.new_zeros(images, conv.out_channels, 2 * side + 2, 2 * side + 2)
    for y in range(side):
        for x in range(side):
            patch = torch.einsum("bc,cohw->bohw", map_BCHW[:, :, y, x], conv.weight)
            shift = (2 * x, 2 * side - 2 - 2 * x, 2 * y, 2 * side - 2 - 2 * y)
            out = out + nn.functional.pad(patch, shift)
    return out[:, :, 1:-1, 1:-1] + conv.bias[:, None, None]


@pytest.mark.parametrize(
    ("own", "other", "kernel", "forward"),
    [
        (8, 4, (3, 3), lambda x, conv: convolved(x, conv, 2, 1)),
        (4, 8, (4, 4), transposed),
        (4, 4, (1, 1), lambda x, conv: convolved(x, conv, 1, 0)),
        (7, 4, (4, 4), lambda x, conv: convolved(x, conv, 1, 0)),
    ],
)
def test_the_loss_is_the_error_of_the_regression(own, other, kernel, forward) -> None:
    student = drawn.taps(((2, 9), (3, 8), (4, own), (5, 2)), seed=1, images=3)
    teacher = drawn.taps(((2, 9), (6, 8), (7, other), (8, 2)), seed=2, images=3)
    method = create("fitnet", student, teacher).double()
    assert method.conv.kernel_size == kernel
    nn.init.normal_(method.bn.weight)
    nn.init.normal_(method.bn.bias)
    predicted = normalised(forward(student.stages[2], method.conv), method.bn)
    expected = ((predicted - teacher.stages[2].detach()) ** 2).mean()
    drawn.assert_same(method, expected, student, teacher)


def test_the_parameters_have_the_published_names() -> None:
    student, teacher = (
        drawn.taps(((32, 32), (64, 32), (128, 16))),
        drawn.taps(((32, 32), (64, 32), (128, 16)), seed=1),
    )
    method = create("fitnet", student, teacher)
    assert [name for name, _ in method.named_parameters()] == [
        "conv.weight",
        "conv.bias",
        "bn.weight",
        "bn.bias",
    ]
    assert sum(p.numel() for p in method.parameters()) == 16768


def test_a_smaller_map_is_refused() -> None:
    student = drawn.taps(((2, 8), (3, 8), (4, 3)))
    teacher = drawn.taps(((2, 8), (3, 8), (4, 4)))
    with pytest.raises(ValueError, match="map 3x3 is smaller than the teacher's 4x4"):
        create("fitnet", student, teacher)


@pytest.mark.parametrize("layer", [-1, 4, 1.5])
def test_a_hint_layer_outside_of_the_stages_is_refused(layer) -> None:
    taps = drawn.taps(drawn.STUDENT)
    with pytest.raises(ValueError, match=rf"hint_layer={layer} must be in 0\.\.3"):
        create("fitnet", taps, taps, hint_layer=layer)
