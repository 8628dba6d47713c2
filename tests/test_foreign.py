"""Test logit-map models that are made of other people's networks.

The mean of the map must equal the network's own logits. Other networks must be refused, with the
operation that does not fit.

Shapes: B batch, C channels, H W sides, N tokens, K classes.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from hydra.utils import instantiate
from torch import Tensor, nn

from sddlskd.files import checkpoint
from sddlskd.models import LogitMapModel, create, from_network, from_timm, from_torchvision, names
from sddlskd.sweeps import precheck
from sddlskd.training.fit import fit
from sddlskd.training.teacher import Teacher
from tests.conftest import compose_in
from tests.tiny import tiny

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
PATCHES = {"global_pool": "avg", "fc_norm": False}


def of_timm(name: str, **options: Any) -> nn.Module:
    return timm.create_model(name, num_classes=7, **options)


def of_torchvision(name: str) -> nn.Module:
    network: nn.Module = torchvision.models.get_model(name, num_classes=7)
    return network


def images(batch: int = 3, side: int = 64) -> Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


def assert_mean_is_logits(network: nn.Module, model: LogitMapModel, images_BCHW: Tensor) -> Tensor:
    with torch.no_grad():
        logits_BK, map_BKHW = network.eval()(images_BCHW), model.eval()(images_BCHW)
    assert map_BKHW.ndim == 4
    assert (map_BKHW.mean((2, 3)) - logits_BK).abs().max() <= 1e-4 * max(
        1.0, logits_BK.abs().max().item()
    )
    with torch.no_grad():
        # The cells of the map must differ.
        assert model.features(images_BCHW).std((2, 3)).max() > 0
    return map_BKHW


@pytest.mark.parametrize(
    ("make", "side", "map_side"),
    [
        (lambda: of_torchvision("resnet18"), 96, 3),  # pools with a module, then flattens
        (lambda: of_torchvision("mobilenet_v2"), 64, 2),  # F.adaptive_avg_pool2d
        (lambda: of_torchvision("shufflenet_v2_x0_5"), 64, 2),  # x.mean([2, 3])
        (lambda: of_torchvision("densenet121"), 64, 2),  # F.relu in place on the features
        (lambda: of_timm("resnet18", drop_rate=0.2), 96, 3),
        (lambda: of_timm("mobilenetv2_050"), 64, 2),
        (lambda: of_timm("convnext_atto", head_norm_first=True), 64, 2),
        # Swin's features are B H W C.
        (lambda: of_timm("swin_tiny_patch4_window7_224", img_size=64, embed_dim=12,
                         depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), window_size=2), 64, 2),
        # The prefix tokens are left out of the map.
        (lambda: of_timm("vit_tiny_patch16_224", **VIT, **PATCHES), 32, 4),
        (lambda: of_timm("deit_tiny_patch16_224", **VIT, **PATCHES), 32, 4),
        (lambda: of_timm("mixer_s32_224", img_size=64), 64, 2),
    ],
)  # fmt: skip
def test_mean_of_the_map_is_the_networks_logits(
    make: Callable[[], nn.Module], side: int, map_side: int
) -> None:
    torch.manual_seed(0)
    network = make()
    model = from_network(network)
    assert isinstance(model, LogitMapModel)
    assert network.training
    map_BKHW = assert_mean_is_logits(network, model, images(3, side))
    assert map_BKHW.shape == (3, 7, map_side, map_side)
    features_BCHW = model.features(images(1, side))
    assert features_BCHW.shape == (1, model.head.in_features, map_side, map_side)


class Flat(nn.Module):
    """One of our networks in the usual form: images -> logits."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.inner = create(name, 7)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        logits_BK: Tensor = self.inner.head(self.inner.features(images_BCHW).mean((2, 3)))
        return logits_BK


@pytest.mark.parametrize(
    "name", ["resnet8", "resnet18", "wrn_16_1", "vgg8", "mobilev2", "shufflev1", "shufflev2"]
)
def test_each_family_of_ours_gives_the_same_map_as_a_strangers_network(name: str) -> None:
    assert name in names()
    network = Flat(name)
    model = from_network(network)
    with torch.no_grad():
        got, expected = model.eval()(images(2, 32)), network.inner.eval()(images(2, 32))
    assert torch.allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (
            lambda: of_timm("vit_tiny_patch16_224", **VIT),
            "stands the selection of the class token .*global_pool=avg",
        ),
        (
            lambda: of_timm("vit_tiny_patch16_224", **VIT, global_pool="avg"),
            "stands layer_norm in `fc_norm`",
        ),
        (
            lambda: of_timm("vit_tiny_patch16_224", **VIT, global_pool="max", fc_norm=False),
            "stands amax",
        ),
        (
            lambda: of_timm("deit_tiny_distilled_patch16_224", **VIT),
            "two heads, one of them of a distillation token",
        ),
        (lambda: of_timm("convnext_atto"), "stands layer_norm in `head.norm`"),
        (
            lambda: of_timm("resnet18", global_pool="max"),
            "between map and head `fc` stands adaptive_max_pool2d",
        ),
        (lambda: of_timm("mobilenetv3_small_050"), "stands hardswish in `act2`"),
        (lambda: of_torchvision("mobilenet_v3_small"), "stands hardswish in `classifier.1`"),
        (
            lambda: of_torchvision("squeezenet1_0"),
            "do not come from an nn.Linear, but from adaptive_avg_pool2d",
        ),
        (lambda: create("resnet8", 7), "a logit map already: use it as it is"),
        (
            lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 7)),
            "between map and head `1` stands a value whose computation was not recorded",
        ),
        (nn.Identity, "has no parameters"),
        (
            lambda: nn.Conv2d(5, 7, 1),
            r"takes none of the images tried .*from_network\(network, image_BCHW\)",
        ),
    ],
)
def test_what_stands_between_map_and_head_is_named(make: Callable[[], nn.Module], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        from_network(make())


class Late(nn.Module):
    """A network that pools, then applies `act`, which does not commute with pooling."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.fc, self.act = nn.Conv2d(3, 8, 3, 4), nn.Linear(8, 7), act

    def forward(self, images_BCHW: Tensor) -> Tensor:
        logits_BK: Tensor = self.fc(self.act(self.body(images_BCHW).mean((2, 3))))
        return logits_BK


@pytest.mark.parametrize(
    ("act", "named"),
    [
        (F.relu, "relu"),
        (torch.relu_, "relu_"),
        (lambda x: x * 2, "mul"),
        (lambda x: x.add_(1), "add_"),
    ],
)
def test_what_is_done_after_pooling_is_named_also_in_place(
    act: Callable[[Tensor], Tensor], named: str
) -> None:
    with pytest.raises(ValueError, match=f"stands {named} in the forward of the network itself"):
        from_network(Late(act))


def test_scaled_logits_are_refused() -> None:
    class Scaled(Late):
        def forward(self, images_BCHW: Tensor) -> Tensor:
            return super().forward(images_BCHW) * 3

    with pytest.raises(ValueError, match=r"its logits do not come from an nn.Linear, but from mul"):
        from_network(Scaled(nn.Identity()))


def test_state_dict_is_the_networks_own_both_ways(tmp_path: Path) -> None:
    network = of_timm("resnet18")
    model = from_network(network)
    assert list(model.state_dict()) == list(network.state_dict())
    other = of_timm("resnet18").state_dict()
    checkpoint.write(tmp_path / "x.pth", {"model": other})
    checkpoint.load_weights(model, tmp_path / "x.pth", "resnet18")
    assert all(torch.equal(value, other[key]) for key, value in network.state_dict().items())


def test_dropout_before_the_head_leaves_out_whole_channels_in_training() -> None:
    model = from_network(of_timm("resnet18", drop_rate=0.5)).train()
    features_BCHW = model.features(images(4, 64))
    dropped_BC = (features_BCHW == 0).all(3).all(2)
    assert 0.4 < dropped_BC.float().mean() < 0.7
    assert not (model.eval().features(images(4, 64)) == 0).all(3).all(2).float().mean() > 0.4


def test_gradients_reach_every_parameter_and_a_copy_works_alone() -> None:
    model = from_network(of_timm("vit_tiny_patch16_224", **VIT, **PATCHES))
    twin = copy.deepcopy(model)
    for one in (model, twin):
        one(images(2, 32)).mean((2, 3)).square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in one.parameters())
    assert model._taken is None
    assert twin._taken is None


def test_it_compiles_without_a_graph_break_and_teaches() -> None:
    model = from_network(Late(nn.Dropout(0.5))).eval()
    with torch.no_grad():
        expected = model(images(2, 64))
        assert torch.allclose(
            torch.compile(model, backend="eager", fullgraph=True)(images(2, 64)),
            expected,
            atol=1e-5,
        )
    teacher = Teacher(
        model, None, name="x", device=torch.device("cpu"), precision="fp32", compile=False
    )
    assert torch.allclose(teacher(images(2, 64)), expected, atol=1e-5)


def test_tokens_lie_as_the_image_does() -> None:
    network = of_timm("vit_tiny_patch16_224", **{**VIT, "img_size": (32, 64)}, **PATCHES)
    wide = torch.randn(1, 3, 32, 64)
    model = from_network(network, wide).eval()
    assert model(wide).shape == (1, 7, 4, 8)
    with torch.no_grad():
        patches_BNC = network.eval().forward_features(wide)[:, 1:]
    assert torch.allclose(model.features(wide)[0, :, 1, 2], patches_BNC[0, 8 + 2], atol=1e-6)


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_it_is_one_override_away_for_student_and_teacher(tmp_path: Path, library: str) -> None:
    overrides = [f"{who}={library}" for who in ("student", "teacher")]
    overrides += [f"{who}.model.name=resnet18" for who in ("student", "teacher")]
    job = compose_in(tmp_path, *overrides)
    assert job.student.name == job.teacher.name == f"{library}_resnet18"
    with torch.device("meta"):
        planned = instantiate(job.student.model, num_classes=7)
    assert next(planned.parameters()).is_meta
    assert planned.eval()(torch.empty(1, 3, 64, 64, device="meta")).shape == (1, 7, 2, 2)


def test_a_student_of_timm_is_trained_by_a_teacher_of_ours(tmp_path: Path) -> None:
    options = [
        f"+student.model.{key}={value}" for key, value in {**VIT, "img_size": 16, **PATCHES}.items()
    ]
    job = tiny(
        tmp_path, "student=timm", "student.model.name=vit_tiny_patch16_224", *options, "M=[1,2]"
    )
    assert precheck.problems([job]) == []
    (result,) = fit([job])
    assert result["status"] == "FINISHED"


def test_what_cannot_be_built_is_said_before_a_sweep_starts(tmp_path: Path) -> None:
    refused = tiny(tmp_path, "student=timm", "student.model.name=convnext_atto")
    unknown = tiny(tmp_path, "student=torchvision", "student.model.name=resnet81")
    reasons = [reason for _, reason in precheck.problems([refused, unknown])]
    assert "stands layer_norm in `head.norm`" in reasons[0]
    assert reasons[1].startswith("torchvision has no network 'resnet81'; did you mean resnet18")


def test_bad_names_options_and_weights() -> None:
    with pytest.raises(ValueError, match="timm has no network 'resnet17'; did you mean resnet"):
        from_timm("resnet17", 7)
    with pytest.raises(ValueError, match=r"timm does not build resnet18 with {'widht': 2}"):
        from_timm("resnet18", 7, widht=2)
    with pytest.raises(ValueError, match=r"torchvision does not build resnet18 with {'widht': 2}"):
        from_torchvision("resnet18", 7, widht=2)
    with pytest.raises(ValueError, match=r"no weights 'BEST' of resnet18; valid are IMAGENET1K_V1"):
        from_torchvision("resnet18", 7, weights="BEST")


def test_published_weights_load_but_a_head_of_other_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchvision reads the weights from torch's cache.

    The test puts a file with the right name and checksum there.
    """
    import hashlib

    from torchvision.models import ResNet18_Weights

    published = torchvision.models.resnet18().state_dict()
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(published, folder / "x.pth")
    digest = hashlib.sha256((folder / "x.pth").read_bytes()).hexdigest()[:8]
    (folder / "x.pth").rename(folder / f"resnet18-{digest}.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(
        type(ResNet18_Weights.DEFAULT),
        "url",
        f"https://localhost/resnet18-{digest}.pth",
        raising=False,
    )
    for classes in (7, 1000):
        state = from_torchvision("resnet18", classes, weights="DEFAULT").state_dict()
        same = {key for key, value in state.items() if value.shape == published[key].shape
                and torch.equal(value, published[key])}  # fmt: skip
        assert set(state) - same == (set() if classes == 1000 else {"fc.weight", "fc.bias"})
