"""Test what the networks, the teacher and the teacher cache show of a batch beside the logits.

The maps must be those that mdistiller's networks return, and must not change the network's numbers.

Shapes: B batch, C channels, H W sides, K classes, R regions.
"""

import copy
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sddlskd import config as cfg
from sddlskd.distill import region_logits
from sddlskd.models import LogitMapModel, Taps, create, from_network
from sddlskd.training.build import build_data, build_network, build_teacher
from sddlskd.training.teacher import Teacher
from sddlskd.training.teacher_cache import TeacherCache, stored_shape
from tests.tiny import tiny

CPU = torch.device("cpu")
K = 7


class Row(NamedTuple):
    """A network of the table of mdistiller's maps.

    Attributes:
        stages: (C, H) of each map.
        signed: number of the first map with negative values; all maps after it have them, too.
        pooled: channels of the classifier's input.
        norms: names of the BatchNorm layers that mdistiller names for OFD.
        preacts: whether there are maps before the last ReLU.
        side: side of the images.
    """

    stages: list[tuple[int, int]]
    signed: int
    pooled: int
    norms: list[str]
    preacts: bool = True
    side: int = 32


NEVER = 9
TABLE = {
    "resnet8": Row(
        [(16, 32), (16, 32), (32, 16), (64, 8)],
        NEVER,
        64,
        ["layer1.0.bn2", "layer2.0.bn2", "layer3.0.bn2"],
    ),
    "resnet8x4": Row(
        [(32, 32), (64, 32), (128, 16), (256, 8)],
        NEVER,
        256,
        ["layer1.0.bn2", "layer2.0.bn2", "layer3.0.bn2"],
    ),
    "resnet18": Row(
        [(64, 32), (64, 32), (128, 16), (256, 8), (512, 4)],
        NEVER,
        512,
        [f"layer{i}.1.bn2" for i in (1, 2, 3, 4)],
    ),
    "resnet50": Row(
        [(64, 32), (256, 32), (512, 16), (1024, 8), (2048, 4)],
        NEVER,
        2048,
        ["layer1.2.bn3", "layer2.3.bn3", "layer3.5.bn3", "layer4.2.bn3"],
    ),
    "wrn_16_1": Row(
        [(16, 32), (16, 32), (32, 16), (64, 8)],
        0,
        64,
        ["block2.layer.0.bn1", "block3.layer.0.bn1", "bn1"],
    ),
    "wrn_16_2": Row(
        [(16, 32), (32, 32), (64, 16), (128, 8)],
        0,
        128,
        ["block2.layer.0.bn1", "block3.layer.0.bn1", "bn1"],
    ),
    "vgg8": Row(
        [(64, 32), (128, 16), (256, 8), (512, 4), (512, 4)],
        NEVER,
        512,
        ["block1.1", "block2.1", "block3.1", "block4.1"],
    ),
    "vgg11": Row(
        [(64, 64), (128, 32), (256, 16), (512, 8), (512, 4)],
        NEVER,
        512,
        ["block1.1", "block2.4", "block3.4", "block4.4"],
        side=64,
    ),
    "mobilev1": Row(
        [(32, 32), (128, 16), (256, 8), (512, 4), (1024, 2)],
        NEVER,
        1024,
        ["model.3.4", "model.5.4", "model.11.4", "model.13.4"],
        side=64,
    ),
    "mobilev2": Row(
        [(16, 16), (12, 16), (16, 8), (48, 4), (160, 2)],
        1,
        1280,
        ["blocks.1.1.conv.7", "blocks.2.2.conv.7", "blocks.4.2.conv.7", "blocks.6.0.conv.7"],
        preacts=False,
    ),
    "shufflev1": Row([(24, 32), (240, 16), (480, 8), (960, 4)], NEVER, 960, []),
    "shufflev2": Row([(24, 32), (116, 16), (232, 8), (464, 4)], NEVER, 1024, []),
}
of_the_table = pytest.mark.parametrize("name", TABLE)
of_each_family = pytest.mark.parametrize(
    "name", ["resnet8", "resnet18", "wrn_16_2", "vgg8", "mobilev2", "shufflev1", "shufflev2"]
)


def lived(network: nn.Module) -> nn.Module:
    """Return the network in eval mode, with random BatchNorm layers."""
    generator = torch.Generator().manual_seed(0)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for shape_C, low in ((layer.bias, -0.3), (layer.running_mean, -0.3)):
                assert shape_C is not None
                shape_C.data = low + 0.6 * torch.rand(shape_C.shape, generator=generator)
            for shape_C in (layer.weight, layer.running_var):
                assert shape_C is not None
                shape_C.data = 0.5 + torch.rand(shape_C.shape, generator=generator)
    return network.eval()


@cache
def network_of(name: str) -> LogitMapModel:
    """Return a network that no test may change."""
    torch.manual_seed(0)
    network = lived(create(name, K))
    assert isinstance(network, LogitMapModel)
    return network


def images(batch: int = 2, side: int = 32) -> Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


@cache
@torch.no_grad()
def taps_of(name: str) -> Taps:
    return network_of(name).taps(images(side=TABLE[name].side))


def tensors(taps: Taps) -> list[Tensor]:
    return [taps.logit_map, taps.pooled, *taps.stages, *taps.preacts]


def equal(a: Taps, b: Taps) -> bool:
    return all(map(torch.equal, tensors(a), tensors(b))) and len(tensors(a)) == len(tensors(b))


# The networks


@of_the_table
def test_maps_are_those_of_the_table(name: str) -> None:
    row, taps = TABLE[name], taps_of(name)
    assert [(tuple(m.shape)) for m in taps.stages] == [(2, C, H, H) for C, H in row.stages]
    assert [bool((m < 0).any()) for m in taps.stages] == [
        number >= row.signed for number in range(len(row.stages))
    ]
    assert [m.shape for m in taps.preacts] == [m.shape for m in taps.stages if row.preacts]
    assert all((m < 0).any() for m in taps.preacts[1:])
    if row.preacts:
        assert taps.preacts[0] is taps.stages[0]
    assert taps.pooled.shape == (2, row.pooled)
    names = {module: name for name, module in network_of(name).named_modules()}
    assert [names[norm] for norm in network_of(name).norms_before_relu()] == row.norms


@of_the_table
def test_logit_map_and_pooled_are_those_of_the_network(name: str) -> None:
    network, taps = network_of(name), taps_of(name)
    images_BCHW = images(side=TABLE[name].side)
    with torch.no_grad():
        assert torch.equal(taps.logit_map, network(images_BCHW))
        logits_BK = network.head(taps.pooled)
    assert torch.allclose(taps.logit_map.mean((2, 3)), logits_BK, atol=1e-5)


def interleaved(map_BCHW: Tensor) -> Tensor:
    return F.channel_shuffle(map_BCHW, 2)


@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if row.preacts])
def test_maps_before_the_relu(name: str) -> None:
    network, taps = network_of(name), taps_of(name)
    for number, (stage, preact) in enumerate(
        zip(taps.stages[1:], taps.preacts[1:], strict=True), start=0
    ):
        if name.startswith("wrn"):
            # The map that the next unit starts with. Its mean after ReLU, not that of the stage, is
            # the classifier's input.
            with torch.no_grad():
                expected = network.norms_before_relu()[number](stage)
            assert torch.equal(preact, expected)
            assert torch.allclose(F.relu(taps.preacts[-1]).mean((2, 3)), taps.pooled, atol=1e-6)
        elif name == "shufflev2":
            assert torch.equal(interleaved(F.relu(preact)), stage)
            half = preact.shape[1] // 2
            assert (preact[:, :half] >= 0).all()
        else:
            assert torch.equal(F.relu(preact), stage)


class OutOfPlace(TorchFunctionMode):
    """Computes ReLUs and sums in new tensors, so that nothing can overwrite a tap."""

    replaced = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.__iadd__:
            self.replaced += 1
            return args[0] + args[1]
        if kwargs.get("inplace"):
            self.replaced += 1
            kwargs["inplace"] = False
        return func(*args, **kwargs)


@of_the_table
def test_no_later_operation_overwrites_a_map(name: str) -> None:
    mode = OutOfPlace()
    with torch.no_grad(), mode:
        expected = network_of(name).taps(images(side=TABLE[name].side))
    assert mode.replaced > 0
    assert equal(taps_of(name), expected)


@of_each_family
def test_taps_train_as_the_network_does(name: str) -> None:
    """BatchNorm must see the batch once, and every tap must have a gradient."""
    one, other = (copy.deepcopy(network_of(name)).train() for _ in range(2))
    taps = one.taps(images())
    assert torch.equal(taps.logit_map, other(images()))
    for (key, a), b in zip(one.named_buffers(), other.buffers(), strict=True):
        assert torch.equal(a, b), key
    sum(tap.square().sum() for tap in tensors(taps)).backward()  # type: ignore[union-attr]
    for key, parameter in one.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert key.endswith("bias") or parameter.grad.any(), key


# The teacher


def teacher_of(network: nn.Module, **options: Any) -> Teacher:
    chosen = {"name": "it", "device": CPU, "precision": "fp32", "compile": False, **options}
    return Teacher(copy.deepcopy(network), None, **chosen)


@of_each_family
def test_folded_teacher_has_the_same_taps(name: str) -> None:
    teacher = teacher_of(network_of(name))
    taps = teacher.taps(images())
    assert len(tensors(taps)) == len(tensors(taps_of(name)))
    for tap, expected in zip(tensors(taps), tensors(taps_of(name)), strict=True):
        scale = max(1.0, expected.abs().max().item())
        assert torch.allclose(tap, expected, rtol=0, atol=1e-5 * scale)
    assert isinstance(teacher.network, torch.fx.GraphModule)
    # So that a run sees the same numbers in a group with and without taps.
    assert torch.equal(taps.logit_map, teacher(images()))


def test_teacher_keeps_its_taps_for_the_backward_pass() -> None:
    taps = teacher_of(network_of("resnet8")).taps(images())
    assert not any(tap.is_inference() or tap.requires_grad for tap in tensors(taps))
    weight_1C11 = torch.ones(1, 16, 1, 1, requires_grad=True)
    (weight_1C11 * taps.stages[0]).sum().backward()
    assert weight_1C11.grad is not None
    assert torch.allclose(weight_1C11.grad, taps.stages[0].sum((0, 2, 3), keepdim=True))


def test_teacher_in_bf16() -> None:
    teacher = teacher_of(network_of("resnet8"), precision="bf16")
    assert {tap.dtype for tap in teacher.taps(images()).stages} == {torch.bfloat16}
    assert torch.equal(teacher.taps(images()).logit_map, teacher(images()))


class Untraceable(LogitMapModel):
    """A network whose path depends on its input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, K)

    @property
    def head(self) -> nn.Linear:
        return self.fc

    def features(self, x_BCHW: Tensor) -> Tensor:
        out: Tensor = self.norm(self.conv(x_BCHW if x_BCHW.sum() > 0 else -x_BCHW))
        return out


def test_teacher_that_cannot_be_traced() -> None:
    network = lived(Untraceable())
    assert isinstance(network, Untraceable)
    with torch.no_grad():
        expected = network.taps(images())
    got = teacher_of(network).taps(images())
    assert torch.allclose(got.logit_map, expected.logit_map, atol=1e-6)
    assert torch.allclose(got.pooled, expected.pooled, atol=1e-6)
    assert got.pooled.shape == (2, 4)


def test_teacher_that_is_no_network_of_ours() -> None:
    torch.manual_seed(0)
    network = lived(nn.Sequential(nn.Conv2d(3, K, 3), nn.BatchNorm2d(K)))
    taps = teacher_of(network).taps(images())
    with torch.no_grad():
        assert torch.allclose(taps.logit_map, network(images()), atol=1e-5)
    assert (taps.stages, taps.preacts, taps.pooled.shape) == ((), (), (2, 0))


# Networks of others


class Overwriting(nn.Module):
    """A network that changes the output of a module in place, like DenseNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 2, 1)
        self.body = nn.Conv2d(4, 8, 3, 2, 1)
        self.fc = nn.Linear(8, K)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        stem = self.stem(images_BCHW)
        out = self.body(F.relu(stem, inplace=True))
        logits_BK: Tensor = self.fc(F.relu(out).mean((2, 3)))
        return logits_BK


@pytest.mark.parametrize(
    ("make", "stages"),
    [
        (
            lambda: torchvision.models.resnet18(num_classes=K),
            [(64, 32), (64, 16), (128, 8), (256, 4), (512, 2)],
        ),
        (  # all stages lie in one child
            lambda: torchvision.models.mobilenet_v2(num_classes=K),
            [(16, 32), (24, 16), (32, 8), (96, 4), (1280, 2)],
        ),
        (  # timm says where the stages are
            lambda: timm.create_model("mobilenetv2_050", num_classes=K),
            [(8, 32), (16, 16), (16, 8), (48, 4), (160, 2)],
        ),
        (  # maps of B H W C
            lambda: timm.create_model(
                "swin_tiny_patch4_window7_224", num_classes=K, img_size=64, embed_dim=12,
                depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), window_size=2,
            ),
            [(12, 16), (24, 8), (48, 4), (96, 2)],
        ),
        (  # one map of tokens after another, all of one size: the blocks
            lambda: timm.create_model(
                "vit_tiny_patch16_224", num_classes=K, img_size=64, embed_dim=24, depth=2,
                num_heads=2, global_pool="avg", fc_norm=False,
            ),
            [(24, 4), (24, 4)],
        ),
        (Overwriting, [(4, 32), (8, 16)]),
    ],
)  # fmt: skip
def test_stages_of_networks_of_others(
    make: Callable[[], nn.Module], stages: list[tuple[int, int]]
) -> None:
    torch.manual_seed(0)
    model = from_network(lived(make())).eval()
    took_BC: list[Tensor] = []
    with torch.no_grad():
        taps = model.taps(images(side=64))
        assert torch.equal(taps.logit_map, model(images(side=64)))
        model.head.register_forward_pre_hook(lambda module, args: took_BC.append(args[0]))
        model.network(images(side=64))
    assert [tuple(tap.shape) for tap in taps.stages] == [(2, C, H, H) for C, H in stages]
    assert torch.allclose(taps.pooled, took_BC[0], atol=1e-5)
    # A stage that ends in a ReLU also shows the map before it.
    is_resnet = isinstance(model.network, torchvision.models.ResNet)
    assert len(taps.preacts) == len(taps.stages) * is_resnet
    for preact, stage in zip(taps.preacts[1:], taps.stages[1:], strict=is_resnet):
        assert torch.equal(F.relu(preact), stage)
        assert (preact < 0).any()
    channels = [norm.num_features for norm in model.norms_before_relu()]
    assert channels == [C for C, _ in stages[1:]] * is_resnet


def test_stage_of_another_network_is_not_overwritten() -> None:
    network = Overwriting()
    model = from_network(network).eval()
    taps = model.taps(images(side=64))
    assert torch.equal(taps.stages[0], network.stem(images(side=64)))
    assert (taps.stages[0] < 0).any()
    # Nothing holds on to the maps, and a copy has hooks of its own.
    assert model._taken_stages is None
    assert equal(copy.deepcopy(model).taps(images(side=64)), taps)
    compiled = torch.compile(model.taps, backend="eager", fullgraph=True)
    assert equal(compiled(images(side=64)), taps)


# The teacher cache


@pytest.mark.parametrize(
    ("side", "full_KHW", "stored_KHW"),
    [
        (4, (100, 8, 8), (100, 4, 4)),
        (4, (100, 4, 4), (100, 4, 4)),
        (4, (100, 2, 2), (100, 2, 2)),  # a larger map than the full one is never stored
        (4, (100, 7, 7), (100, 7, 7)),  # the cells of a 4x4 map would overlap
        (4, (100, 8, 6), (100, 8, 6)),
        (8, (100, 8, 8), (100, 8, 8)),
        (12, (100, 24, 12), (100, 12, 12)),
        (None, (100, 8, 8), (100, 8, 8)),
    ],
)
def test_shape_of_stored_maps(
    side: int | None, full_KHW: tuple[int, ...], stored_KHW: tuple[int, ...]
) -> None:
    assert stored_shape(full_KHW, side) == stored_KHW


def test_side_of_stored_maps_follows_from_the_job(tmp_path: Path) -> None:
    job = tiny(tmp_path, "teacher.cache=maps", teacher=False)
    sides = {(1,): 4, (1, 2): 4, (1, 2, 4): 4, (1, 2, 3): 12, (1, 8): 8}
    for M, side in sides.items():
        assert cfg.cached_side(replace(job, M=list(M))) == side
    nested = replace(job.distiller, pooling=cfg.Pooling.nested)
    assert cfg.cached_side(replace(job, M=[1, 3], distiller=nested)) == 4
    exact = replace(job.teacher, cache_dtype=cfg.CacheDtype.float32)
    assert cfg.cached_side(replace(job, M=[1, 2, 4], teacher=exact)) is None


def test_jobs_with_other_maps_do_not_share(tmp_path: Path) -> None:
    job = tiny(tmp_path, teacher=False)
    features = tiny(tmp_path, "features=at", teacher=False).features

    def keys(job: cfg.Config) -> list[str]:
        jobs = [replace(job, M=M) for M in ([1], [1, 2, 4], [1, 3])]
        return [cfg.sharing_key(one) for one in (*jobs, replace(job, features=features))]

    cached = replace(job.teacher, cache="maps", cache_dtype=cfg.CacheDtype.float16)
    one, same, other, tapped = keys(replace(job, teacher=cached))
    assert one == same
    assert len({one, other, tapped}) == 3
    assert len(set(keys(job))) == 1


def cache_of(teacher: Teacher, path: Path, side: int) -> TeacherCache:
    return TeacherCache(teacher, path, rows=3, map_KHW=(K, side, side), dtype="float16")


def test_pooled_maps_have_the_same_regions(tmp_path: Path) -> None:
    teacher = teacher_of(network_of("resnet8"))
    whole_BKHW = teacher(images()).clone()
    views_B = torch.tensor([2, 0])
    for _ in range(2):  # computed, then read
        stored_BKHW = cache_of(teacher, tmp_path / "x.maps", 4)(images(), views_B)
        assert stored_BKHW.shape == (2, K, 4, 4)
        expected_BRK = region_logits(whole_BKHW, [1, 2, 4])
        got_BRK = region_logits(stored_BKHW, [1, 2, 4])
        size = whole_BKHW.abs().max().item()
        assert torch.allclose(got_BRK, expected_BRK, rtol=0, atol=2**-11 * size)
    assert (tmp_path / "x.maps").stat().st_size == 3 * K * 16 * 2


def test_file_of_another_size_is_refused(tmp_path: Path) -> None:
    teacher = teacher_of(network_of("resnet8"))
    path = tmp_path / "x.maps"
    cache_of(teacher, path, 8)
    with pytest.raises(ValueError, match=r"x\.maps has 2688 bytes instead of 672: .* delete it"):
        cache_of(teacher, path, 4)


def test_cache_asks_the_teacher_for_taps_and_strong_views(tmp_path: Path) -> None:
    teacher = teacher_of(network_of("resnet8"))
    kept = cache_of(teacher, tmp_path / "x.maps", 4)
    assert equal(kept.taps(images(), torch.tensor([0, 1])), teacher.taps(images()))
    assert torch.equal(kept(images(), None), teacher(images()))
    assert not kept._sums.any()


@pytest.mark.parametrize("features", [True, False])
def test_cache_of_a_job(tmp_path: Path, caplog: pytest.LogCaptureFixture, features: bool) -> None:
    chosen = ["features=at"] if features else []
    job = tiny(
        tmp_path, f"teacher.cache={tmp_path}/maps", "M=[1,2,4]", "dataset.load.size=32", *chosen
    )
    network = build_network(job.teacher.model, 10, 0, CPU)

    def never(job: cfg.Config) -> None:
        raise AssertionError("the teacher is there")

    with caplog.at_level(logging.INFO, logger="sddlskd"):
        teacher, _ = build_teacher(job, network, build_data(job, CPU), CPU, never)
    files = list(tmp_path.glob("maps/*.maps"))
    if features:
        assert isinstance(teacher, Teacher)
        assert not files
        assert "features=[at] need more than it keeps" in caplog.text
    else:
        assert isinstance(teacher, TeacherCache)
        assert teacher._maps.shape[1:] == (10, 4, 4)
        assert len(files) == 1
