"""Test the networks with a second implementation in plain functions.

Their parameters must have the names of the published checkpoints.

Shapes: B batch, C channels, H W sides, K classes.
"""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.experimental import optimization

from sddlskd.models import LogitMapModel, create, draw_ends, names
from sddlskd.models.wrn import WideResNet

CHECKPOINT_KEYS: dict[str, dict[str, list[int]]] = json.loads(
    (Path(__file__).parent / "reference" / "checkpoint_keys.json").read_text()
)
FAMILY_HEADS = (
    "resnet8",
    "resnet18",
    "resnet50",
    "wrn_16_2",
    "vgg8",
    "mobilev2",
    "shufflev1",
    "shufflev2",
)
CIFAR = [name for name in names() if name != "mobilev1"]
all_networks = pytest.mark.parametrize("name", CIFAR)
each_family = pytest.mark.parametrize("name", FAMILY_HEADS)


def random_checkpoint(name: str, seed: int = 0) -> dict[str, Tensor]:
    """Return random weights with the names and shapes of the published file of a network.

    They are float64. The statistics of BatchNorm are far from 0 and 1.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(shape: list[int], low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)

    state: dict[str, Tensor] = {}
    for key, shape in CHECKPOINT_KEYS[name].items():
        if key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(3)
        elif key.endswith("running_var") or (key.endswith("weight") and len(shape) == 1):
            state[key] = uniform(shape, 0.5, 1.3)
        elif key.endswith("weight"):
            # This scale keeps the variance of the signal through convolution and ReLU.
            scale = (6 / torch.tensor(shape[1:]).prod().item()) ** 0.5
            state[key] = uniform(shape, -scale, scale)
        else:
            state[key] = uniform(shape, -0.3, 0.3)
    return state


def loaded(name: str, dtype: torch.dtype = torch.float32) -> LogitMapModel:
    """Return the network with the weights of `random_checkpoint(name)`, in eval mode."""
    model = create(name, num_classes=100).to(dtype)
    model.load_state_dict(random_checkpoint(name), strict=True)
    return model.eval()


def images(batch: int, side: int = 32, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(
        batch, 3, side, side, generator=torch.Generator().manual_seed(1), dtype=dtype
    )


def map_side(name: str, image_side: int) -> int:
    if name.startswith("vgg"):
        return image_side // (16 if image_side == 64 else 8)
    if name == "mobilev2":
        return image_side // 16
    return image_side // (8 if name in ("resnet18", "resnet50", "shufflev1", "shufflev2") else 4)


def assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Assert that the values differ by at most `tolerance` times the largest expected value.

    The expected values must have neither vanished nor exploded.
    """
    scale = expected.abs().max().item()
    assert 1e-9 < scale < 1e12
    assert (actual - expected).abs().max().item() <= tolerance * scale


# The second implementation, written from architectures.md
#
# It computes with a state dict and shares no code with sddlskd.models.


class Functional:
    """Layers of a state dict by name.

    For example, `f.conv("layer1.0.conv1", x)` uses `layer1.0.conv1.weight`.
    """

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state

    def conv(self, key: str, x: Tensor, stride: int = 1, groups: int = 1) -> Tensor:
        weight = self.state[f"{key}.weight"]
        kernel = weight.shape[-1]
        padding = {1: 0, 3: 1, 7: 3}[kernel]
        stride = 2 if kernel == 7 else stride  # the large stem
        return F.conv2d(x, weight, self.state.get(f"{key}.bias"), stride, padding, groups=groups)

    def bn(self, key: str, x: Tensor) -> Tensor:
        weight, bias, mean, var = (
            self.state[f"{key}.{part}"][:, None, None]
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    def linear(self, key: str, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3)) @ self.state[f"{key}.weight"].T + self.state[f"{key}.bias"]


def oracle_resnet(f: Functional, x: Tensor, blocks: int) -> Tensor:
    x = f.bn("bn1", f.conv("conv1", x)).relu()
    for stage, stage_stride in ((1, 1), (2, 2), (3, 2)):
        for i in range(blocks):
            p, stride = f"layer{stage}.{i}", stage_stride if i == 0 else 1
            y = f.bn(f"{p}.bn1", f.conv(f"{p}.conv1", x, stride)).relu()
            y = f.bn(f"{p}.bn2", f.conv(f"{p}.conv2", y))
            if f"{p}.downsample.0.weight" in f.state:
                x = f.bn(f"{p}.downsample.1", f.conv(f"{p}.downsample.0", x, stride))
            x = (y + x).relu()
    return f.linear("fc", x)


def oracle_resnet4stage(f: Functional, x: Tensor, blocks: tuple[int, ...]) -> Tensor:
    bottleneck = "layer1.0.conv3.weight" in f.state
    x = f.bn("bn1", f.conv("conv1", x)).relu()
    for stage, stage_stride, count in zip((1, 2, 3, 4), (1, 2, 2, 2), blocks, strict=True):
        for i in range(count):
            p, stride = f"layer{stage}.{i}", stage_stride if i == 0 else 1
            strides = (1, stride, 1) if bottleneck else (stride, 1)
            y = x
            for j, conv_stride in enumerate(strides, start=1):
                y = f.bn(f"{p}.bn{j}", f.conv(f"{p}.conv{j}", y, conv_stride))
                y = y if j == len(strides) else y.relu()
            if f"{p}.shortcut.0.weight" in f.state:
                x = f.bn(f"{p}.shortcut.1", f.conv(f"{p}.shortcut.0", x, stride))
            x = (y + x).relu()
    return f.linear("linear", x)


def oracle_wrn(f: Functional, x: Tensor, units: int) -> Tensor:
    x = f.conv("conv1", x)
    for block, block_stride in ((1, 1), (2, 2), (3, 2)):
        for i in range(units):
            p, stride = f"block{block}.layer.{i}", block_stride if i == 0 else 1
            a = f.bn(f"{p}.bn1", x).relu()
            y = f.bn(f"{p}.bn2", f.conv(f"{p}.conv1", a, stride)).relu()
            y = f.conv(f"{p}.conv2", y)
            if f"{p}.convShortcut.weight" in f.state:
                x = f.conv(f"{p}.convShortcut", a, stride)
            x = x + y
    return f.linear("fc", f.bn("bn1", x).relu())


def oracle_vgg(f: Functional, x: Tensor, convs: tuple[int, ...]) -> Tensor:
    side = x.shape[-1]
    for block, count in enumerate(convs):
        for i in range(count):
            x = f.bn(f"block{block}.{3 * i + 1}", f.conv(f"block{block}.{3 * i}", x)).relu()
        if block < 3 or (block == 3 and side == 64):
            x = F.max_pool2d(x, 2)
    return f.linear("classifier", x)


def oracle_mobilev2(f: Functional, x: Tensor) -> Tensor:
    x = f.bn("conv1.1", f.conv("conv1.0", x, stride=2)).relu()
    x = F.max_pool2d(x, 2) if f.state["conv1.0.weight"].shape[-1] == 7 else x
    table = ((16, 1, 1), (24, 2, 1), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1))
    for stage, (channels, count, stage_stride) in enumerate(table):
        for i in range(count):
            p, stride = f"blocks.{stage}.{i}.conv", stage_stride if i == 0 else 1
            y = f.bn(f"{p}.1", f.conv(f"{p}.0", x)).relu()
            y = f.bn(f"{p}.4", f.conv(f"{p}.3", y, stride, groups=y.shape[1])).relu()
            y = f.bn(f"{p}.7", f.conv(f"{p}.6", y))
            assert y.shape[1] == int(0.5 * channels)
            x = x + y if stride == 1 and x.shape[1] == y.shape[1] else y
    x = f.bn("conv2.1", f.conv("conv2.0", x)).relu()
    return f.linear("classifier.0", x)


def shuffle(x: Tensor, groups: int) -> Tensor:
    """Move channel `g * (C / groups) + i` to position `i * groups + g`."""
    size = x.shape[1] // groups
    return torch.stack([x[:, g * size + i] for i in range(size) for g in range(groups)], dim=1)


def oracle_shufflev1(f: Functional, x: Tensor) -> Tensor:
    x = f.bn("bn1", f.conv("conv1", x)).relu()
    for stage, count in ((1, 4), (2, 8), (3, 4)):
        for i in range(count):
            p, stride = f"layer{stage}.{i}", 2 if i == 0 else 1
            groups = 1 if x.shape[1] == 24 else 3
            y = f.bn(f"{p}.bn1", f.conv(f"{p}.conv1", x, groups=groups)).relu()
            y = shuffle(y, groups)
            y = f.bn(f"{p}.bn2", f.conv(f"{p}.conv2", y, stride, groups=y.shape[1])).relu()
            y = f.bn(f"{p}.bn3", f.conv(f"{p}.conv3", y, groups=3))
            x = (
                torch.cat([y, F.avg_pool2d(x, 3, 2, 1)], dim=1).relu()
                if stride == 2
                else (x + y).relu()
            )
    return f.linear("linear", x)


def oracle_shufflev2(f: Functional, x: Tensor) -> Tensor:
    def pointwise(p: str, j: int, x: Tensor) -> Tensor:
        return f.bn(f"{p}.bn{j}", f.conv(f"{p}.conv{j}", x)).relu()

    def depthwise(p: str, j: int, x: Tensor, stride: int) -> Tensor:
        return f.bn(f"{p}.bn{j}", f.conv(f"{p}.conv{j}", x, stride, groups=x.shape[1]))

    x = f.bn("bn1", f.conv("conv1", x)).relu()
    for stage, basic_units in ((1, 3), (2, 7), (3, 3)):
        p = f"layer{stage}.0"
        left = pointwise(p, 2, depthwise(p, 1, x, stride=2))
        right = pointwise(p, 5, depthwise(p, 4, pointwise(p, 3, x), stride=2))
        x = shuffle(torch.cat([left, right], dim=1), 2)
        for i in range(1, basic_units + 1):
            p, half = f"layer{stage}.{i}", x.shape[1] // 2
            right = pointwise(p, 3, depthwise(p, 2, pointwise(p, 1, x[:, half:]), stride=1))
            x = shuffle(torch.cat([x[:, :half], right], dim=1), 2)
    return f.linear("linear", f.bn("bn2", f.conv("conv2", x)).relu())


def oracle_logits(name: str, state: dict[str, Tensor], x: Tensor) -> Tensor:
    f = Functional(state)
    if name in ("resnet18", "resnet50"):
        return oracle_resnet4stage(f, x, {"resnet18": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3)}[name])
    if name.startswith("resnet"):
        return oracle_resnet(
            f, x, blocks=(int(name.removeprefix("resnet").removesuffix("x4")) - 2) // 6
        )
    if name.startswith("wrn"):
        return oracle_wrn(f, x, units=(int(name.split("_")[1]) - 4) // 6)
    if name.startswith("vgg"):
        heads, tails = {8: (1, 1), 11: (1, 2), 13: (2, 2), 16: (2, 3), 19: (2, 4)}[
            int(name.removeprefix("vgg"))
        ]
        return oracle_vgg(
            f, x, convs=(heads, heads, tails, tails, tails) if name != "vgg8" else (1,) * 5
        )
    return {
        "mobilev2": oracle_mobilev2,
        "shufflev1": oracle_shufflev1,
        "shufflev2": oracle_shufflev2,
    }[name](f, x)


def oracle_mobilev1(f: Functional, x: Tensor) -> Tensor:
    x = f.bn("model.0.1", f.conv("model.0.0", x, stride=2)).relu()
    for i in range(1, 14):
        p, stride = f"model.{i}", 2 if i in (2, 4, 6, 12) else 1
        x = f.bn(f"{p}.1", f.conv(f"{p}.0", x, stride, groups=x.shape[1])).relu()
        x = f.bn(f"{p}.4", f.conv(f"{p}.3", x)).relu()
    return f.linear("fc", x)


# Names


def test_names_are_the_checkpoints():
    assert sorted(CIFAR) == sorted(CHECKPOINT_KEYS)
    assert names()[:3] == ("resnet8", "resnet14", "resnet20")


@all_networks
def test_keys_shapes_and_order(name):
    state = create(name, num_classes=100).state_dict()
    assert [(key, list(value.shape)) for key, value in state.items()] == list(
        CHECKPOINT_KEYS[name].items()
    )


def test_unknown_name():
    with pytest.raises(
        ValueError, match=r"unknown network 'resnet9'; did you mean 'resnet\d+'\? .*wrn_40_2.*vgg8"
    ):
        create("resnet9", num_classes=100)
    with pytest.raises(ValueError, match=r"unknown network '§'; choose one of: resnet8, "):
        create("§", num_classes=100)


def test_too_few_classes():
    with pytest.raises(ValueError, match="num_classes is 1"):
        create("resnet8", num_classes=1)


# Numbers


@all_networks
def test_logits_and_gradients_equal_the_second_writing(name):
    state = random_checkpoint(name)
    model = loaded(name, torch.float64)
    # The image is small because torch has no fast depthwise convolution for float64.
    x = images(batch=1, side=16, dtype=torch.float64)
    parameters = dict(model.named_parameters())
    state |= {key: state[key].requires_grad_() for key in parameters}

    actual, expected = model(x).mean(dim=(2, 3)), oracle_logits(name, state, x)
    assert_near(actual, expected, 1e-10)

    weights = torch.randn(
        expected.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )
    actual_grads = torch.autograd.grad((actual * weights).sum(), list(parameters.values()))
    expected_grads = torch.autograd.grad(
        (expected * weights).sum(), [state[key] for key in parameters]
    )
    for actual_grad, expected_grad in zip(actual_grads, expected_grads, strict=True):
        assert_near(actual_grad, expected_grad, 1e-8)


@all_networks
def test_map_is_the_head_of_the_features(name):
    model, x = loaded(name), images(batch=1)
    with torch.no_grad():
        logit_map, features = model(x), model.features(x)
        assert_near(logit_map.mean(dim=(2, 3)), model.head(features.mean(dim=(2, 3))), 1e-5)
        assert_near(logit_map[:, :, 1, 0], model.head(features[:, :, 1, 0]), 1e-5)
    side = map_side(name, 32)
    assert logit_map.shape == (1, 100, side, side)
    assert features.shape == (1, model.head.in_features, side, side)


@all_networks
def test_training_gradients(name):
    torch.manual_seed(0)
    model = create(name, num_classes=10)
    logit_map = model(images(batch=2))
    assert logit_map.shape == (2, 10, map_side(name, 32), map_side(name, 32))
    F.cross_entropy(logit_map.mean(dim=(2, 3)), torch.arange(2)).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        # BatchNorm subtracts the mean, so the bias of a convolution before it has a gradient of
        # zero, up to rounding.
        convolution_bias = (
            key.endswith("bias") and model.get_parameter(key[:-4] + "weight").ndim == 4
        )
        if not convolution_bias:
            assert parameter.grad.abs().max() > 1e-12, key


@all_networks
def test_channels_last_gives_the_same_numbers(name):
    model, x = loaded(name), images(batch=1)
    with torch.no_grad():
        expected = model(x)
        actual = model.to(memory_format=torch.channels_last)(
            x.to(memory_format=torch.channels_last)
        )
    assert_near(actual, expected, 1e-4)
    assert actual.is_contiguous(memory_format=torch.channels_last)


@all_networks
def test_images_of_other_sides(name):
    model = loaded(name)
    with torch.no_grad():
        for side in (48, 64):
            assert model(images(1, side)).shape == (
                1,
                100,
                map_side(name, side),
                map_side(name, side),
            )


def test_vgg_pools_once_more_at_64():
    model, x = loaded("vgg8", torch.float64), images(1, side=64, dtype=torch.float64)
    with torch.no_grad():
        assert_near(
            model(x).mean(dim=(2, 3)), oracle_logits("vgg8", random_checkpoint("vgg8"), x), 1e-10
        )


# Images of 224 pixels: mobilev1, and the stems that the SDD authors use for CUB-200

LARGE = [name for name in CIFAR if not name.startswith("vgg")]


def state_of(model: LogitMapModel) -> dict[str, Tensor]:
    """Return the state of a network in float64, with random statistics of BatchNorm."""
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 1.3, generator=generator)
    return {
        key: value.double() if value.is_floating_point() else value
        for key, value in model.state_dict().items()
    }


@pytest.mark.parametrize(
    "name", ["resnet8x4", "resnet50", "wrn_16_2", "mobilev2", "shufflev1", "shufflev2"]
)
def test_the_large_stem_equals_the_second_writing(name):
    torch.manual_seed(0)
    model = create(name, num_classes=7, stem="large")
    state = state_of(model)
    x = images(batch=1, side=64, dtype=torch.float64)
    with torch.no_grad():
        assert_near(model.double().eval()(x).mean(dim=(2, 3)), oracle_logits(name, state, x), 1e-10)


@pytest.mark.parametrize("name", LARGE)
def test_the_large_stem_is_another_first_convolution_and_nothing_else(name):
    with torch.device("meta"):
        small, large = (
            create(name, num_classes=200, stem=stem).state_dict() for stem in ("small", "large")
        )
        logit_map = create(name, num_classes=200, stem="large").eval()(torch.empty(1, 3, 224, 224))
    assert list(small) == list(large)
    first = next(iter(large))
    assert [key for key in large if large[key].shape != small[key].shape] == [first]
    assert large[first].shape[1:] == (3, 7, 7)
    side = {"mobilev2": 7, "resnet18": 14, "resnet50": 14, "shufflev1": 14, "shufflev2": 14}.get(
        name, 28
    )
    assert logit_map.shape == (1, 200, side, side)


def test_the_vggs_take_large_images_as_they_are():
    with torch.device("meta"):
        assert create("vgg13", num_classes=200).eval()(torch.empty(1, 3, 224, 224)).shape == (
            1,
            200,
            28,
            28,
        )


def test_stems_that_a_network_does_not_have():
    for name in ("vgg8", "mobilev1"):
        with pytest.raises(ValueError, match=f"{name} has no large stem.*leave stem out"):
            create(name, num_classes=10, stem="large")
    for name in ("vgg8", "resnet8"):
        with pytest.raises(
            ValueError, match=f"unknown stem 'huge' of {name}; choose one of: small, large"
        ):
            create(name, num_classes=10, stem="huge")
    with pytest.raises(ValueError, match="unknown stem 'huge'"):
        WideResNet(units=2, width=4, num_classes=10, stem="huge")


def test_mobilev1_equals_the_second_writing():
    torch.manual_seed(0)
    model = create("mobilev1", num_classes=11)
    state = state_of(model)
    x = images(batch=1, side=64, dtype=torch.float64)
    with torch.no_grad():
        logit_map = model.double().eval()(x)
    assert logit_map.shape == (1, 11, 2, 2)
    assert_near(logit_map.mean(dim=(2, 3)), oracle_mobilev1(Functional(state), x), 1e-10)


def test_mobilev1_is_as_large_as_published():
    with torch.device("meta"):
        model = create("mobilev1", num_classes=1000)
        assert model.eval()(torch.empty(1, 3, 224, 224)).shape == (1, 1000, 7, 7)
    # Source: Howard et al. 2017, table 4
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 4.2


# Folding, tracing, compiling and initialisation


@all_networks
def test_batch_norm_folds_into_convolutions(name):
    model, x = loaded(name), images(batch=1)
    folded = optimization.fuse(model)
    assert isinstance(folded, fx.GraphModule)
    modules = dict(folded.named_modules())
    kept = [
        n.target
        for n in folded.graph.nodes
        if n.op == "call_module" and type(modules[n.target]) is nn.BatchNorm2d
    ]
    # In a pre-activation network, some BatchNorms follow a sum and cannot be folded into it.
    if name.startswith("wrn"):
        assert all(str(target).endswith("bn1") for target in kept)
    else:
        assert kept == []
    with torch.no_grad():
        assert_near(folded(x), model(x), 1e-4)


def test_a_traced_vgg_still_adapts_to_64():
    folded = optimization.fuse(loaded("vgg8"))
    with torch.no_grad():
        assert (
            folded(images(1, side=32)).shape == folded(images(1, side=64)).shape == (1, 100, 4, 4)
        )
        assert folded(images(1, side=48)).shape == (1, 100, 6, 6)


@each_family
def test_compiles_without_a_graph_break(name):
    model, x = loaded(name), images(batch=1)
    # Compilations of the same code by other tests count towards the limit of recompilations.
    torch.compiler.reset()
    with torch.no_grad():
        assert_near(torch.compile(model, backend="eager", fullgraph=True)(x), model(x), 1e-5)


@pytest.mark.parametrize(
    ("name", "stem", "changed"),
    [
        ("resnet8x4", "large", {"conv1.weight", "fc.weight", "fc.bias"}),
        ("resnet50", "large", {"conv1.weight", "linear.weight", "linear.bias"}),
        ("vgg8", "small", {"classifier.weight", "classifier.bias"}),
        ("mobilev2", "large", {"conv1.0.weight"}),
        ("shufflev1", "large", {"conv1.weight", "linear.weight", "linear.bias"}),
        ("mobilev2", "small", set()),
    ],
)
def test_new_ends_are_those_that_sdds_code_replaces(name, stem, changed):
    """Compare with the layers that SDD's train_origin.py puts into its networks for CUB-200."""
    torch.manual_seed(0)
    drawn = create(name, 200, stem)
    plain = {key: value.clone() for key, value in drawn.state_dict().items()}
    draw_ends(drawn)
    differing = {key for key, value in drawn.state_dict().items() if not value.equal(plain[key])}
    assert differing == changed
    for key in changed:
        # PyTorch's default is uniform in +-1 / sqrt(inputs of an output), for weights and biases.
        layer = drawn.get_submodule(key.rpartition(".")[0])
        bound = layer.weight[0].numel() ** -0.5
        value = drawn.state_dict()[key]
        assert value.abs().max() <= bound
        assert value.std().item() == pytest.approx(bound / 3**0.5, rel=0.15)


def test_the_ends_of_other_networks_are_left_alone():
    network = nn.Sequential(nn.Conv2d(3, 4, 7), nn.ReLU())
    before = {key: value.clone() for key, value in network.state_dict().items()}
    draw_ends(network)
    assert all(value.equal(before[key]) for key, value in network.state_dict().items())


def test_initialisation():
    torch.manual_seed(0)
    wrn, vgg, mobile = create("wrn_40_2", 100), create("vgg13", 100), create("mobilev2", 100)
    shuffle_net = create("shufflev1", 100)

    def std(model: nn.Module, key: str) -> float:
        return model.get_parameter(key).std().item()

    assert std(wrn, "block3.layer.1.conv1.weight") == pytest.approx(
        (2 / (9 * 128)) ** 0.5, rel=0.05
    )
    assert std(vgg, "block4.0.weight") == pytest.approx((2 / (9 * 512)) ** 0.5, rel=0.05)
    assert std(mobile, "conv2.0.weight") == pytest.approx((2 / 1280) ** 0.5, rel=0.05)
    assert std(mobile, "blocks.5.1.conv.3.weight") == pytest.approx(
        (2 / (9 * 480)) ** 0.5, rel=0.05
    )
    # The default of torch is uniform, with a std of 1 / sqrt(3 fan_in).
    assert std(shuffle_net, "layer3.1.conv1.weight") == pytest.approx(
        (1 / (3 * 320)) ** 0.5, rel=0.05
    )
    for model in (vgg, mobile):
        assert model.head.weight.std().item() == pytest.approx(0.01, rel=0.05)
        assert model.head.bias.abs().max() == 0
    assert wrn.head.bias.abs().max() == 0
    assert vgg.get_parameter("block0.0.bias").abs().max() == 0
