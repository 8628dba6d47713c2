"""Test logit-map models that are made of other people's networks.

The mean of the map must equal the network's own logits. Other networks must be refused, with the
operation that does not fit.

Shapes: B batch, C channels, H W sides, N tokens, K classes.
"""

import copy
import json
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

from sddlskd import evaluate, export
from sddlskd.files import checkpoint
from sddlskd.models import (
    ForeignNetwork,
    LogitMapModel,
    create,
    from_network,
    from_timm,
    from_torchvision,
    names,
)
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
            lambda: of_timm("vit_tiny_patch16_224", **VIT, global_pool="avg"),
            r"stands layer_norm in `fc_norm`.*\. Set map=per_cell \(\+student.model.map=per_cell, ",
        ),
        (
            lambda: of_timm("vit_tiny_patch16_224", **VIT, global_pool="max", fc_norm=False),
            "stands amax",
        ),
        (
            lambda: of_timm("pit_ti_distilled_224"),
            "its head reads a token that lies beside no patch tokens",
        ),
        (
            lambda: of_timm("mobilenetv4_conv_small_035"),
            "stands batch_norm in `norm_head`, .* Build the network without it",
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


# A class token, and layers between average and head


def of_torchvision_vit(**options: Any) -> nn.Module:
    return torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=24, mlp_dim=48,
        num_classes=7, **options,
    )  # fmt: skip


def lively(network: nn.Module) -> nn.Module:
    """Return the network in eval mode, with values that tell images and cells apart."""
    for name, parameter in network.named_parameters():
        if "head" in name or "classifier" in name:
            nn.init.normal_(parameter, std=0.5)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the statistics of the images below
    if any(isinstance(module, nn.BatchNorm2d) for module in network.modules()):
        network.train()(images(8, 64))
    return network.eval()


TOKENS: list[tuple[Callable[[], nn.Module], tuple[str, ...]]] = [
    (lambda: of_timm("vit_tiny_patch16_224", **VIT), ("head",)),
    (lambda: of_timm("deit_tiny_patch16_224", **VIT), ("head",)),
    (lambda: of_timm("vit_tiny_patch16_224", **VIT, reg_tokens=4), ("head",)),
    (lambda: of_timm("vit_tiny_patch16_224", **VIT, dynamic_img_size=True), ("head",)),
    (lambda: of_timm("deit_tiny_distilled_patch16_224", **VIT), ("head", "head_dist")),
    (of_torchvision_vit, ("heads.head",)),
]


@pytest.mark.parametrize(("make", "heads"), TOKENS)
def test_the_class_token_is_the_mean_of_the_map_and_patches_its_cells(
    make: Callable[[], nn.Module], heads: tuple[str, ...]
) -> None:
    torch.manual_seed(0)
    network = lively(make())
    model = from_network(network).eval()
    images_BCHW = images(3, 32)
    map_BKHW = assert_mean_is_logits(network, model, images_BCHW)
    assert map_BKHW.shape == (3, 7, 4, 4)
    # Each cell is the heads' output for its patch token, up to one shift for each image and class.
    tokens_BNC = normed_tokens(network, images_BCHW)[:, -16:]
    with torch.no_grad():
        outputs = [network.get_submodule(name)(tokens_BNC) for name in heads]
    cells_BNK = torch.stack(outputs).mean(0)
    shift_BNK = map_BKHW.flatten(2).transpose(1, 2) - cells_BNK
    assert torch.allclose(shift_BNK, shift_BNK[:, :1].expand_as(shift_BNK), atol=1e-5)
    assert cells_BNK.std(1).min() > 1e-2
    teacher = Teacher(
        copy.deepcopy(model), None, name="x", device=torch.device("cpu"), precision="fp32",
        compile=False,
    )  # fmt: skip
    assert torch.allclose(teacher(images_BCHW), map_BKHW, atol=1e-5)
    # The stages are the token grids of the two blocks.
    taps = model.taps(images_BCHW)
    assert [stage.shape for stage in taps.stages] == [(3, 24, 4, 4)] * 2
    assert (taps.preacts, taps.pooled.shape) == ((), (3, 24 * len(heads)))
    assert list(model.state_dict()) == list(network.state_dict())


def normed_tokens(network: nn.Module, images_BCHW: Tensor) -> Tensor:
    """Return the tokens (B, N, C) after the last norm of a transformer."""
    seen: list[Tensor] = []
    norm = network.get_submodule("encoder.ln" if hasattr(network, "encoder") else "norm")
    handle = norm.register_forward_hook(lambda module, args, result: seen.append(result))
    with torch.no_grad():
        network(images_BCHW)
    handle.remove()
    return seen[0]


def test_stages_are_the_blocks_outputs() -> None:
    network = of_timm("vit_tiny_patch16_224", **VIT).eval()
    seen: list[Tensor] = []
    network.get_submodule("blocks.0").register_forward_hook(
        lambda module, args, result: seen.append(result)
    )
    model = from_network(network).eval()
    taps = model.taps(images(2, 32))
    patches_BNC = seen[-1][:, 1:]
    assert torch.equal(taps.stages[0].flatten(2).transpose(1, 2), patches_BNC)


def maps_of(network: nn.Module, images_BCHW: Tensor) -> Tensor:
    """Return the map that a network averages, as cells (B, N, C)."""
    features: Any = getattr(network, "forward_features", None) or network.features
    with torch.no_grad():
        shown = features(images_BCHW)
    return shown[:, 1:] if shown.ndim == 3 else shown.flatten(2).transpose(1, 2)


@pytest.mark.parametrize(
    ("make", "side", "classify"),
    [
        (  # a 1x1 convolution and an activation in place
            lambda: of_timm("mobilenetv3_small_050", drop_rate=0.2),
            64,
            lambda n, rows: n.classifier(n.act2(n.conv_head(rows[..., None, None])).flatten(1)),
        ),
        (  # a linear layer, an activation and dropout
            lambda: of_torchvision("mobilenet_v3_small"), 64, lambda n, rows: n.classifier(rows),
        ),
        (  # a norm
            lambda: of_timm("vit_tiny_patch16_224", **VIT, global_pool="avg"),
            32,
            lambda n, rows: n.head(n.fc_norm(rows)),
        ),
        (  # a norm that permutes its result
            lambda: of_timm("convnext_atto"),
            64,
            lambda n, rows: n.head.fc(n.head.norm(rows[..., None, None]).flatten(1)),
        ),
    ],
)  # fmt: skip
def test_layers_between_average_and_head_are_applied_to_each_cell(
    make: Callable[[], nn.Module], side: int, classify: Callable[[Any, Tensor], Tensor]
) -> None:
    torch.manual_seed(0)
    network = lively(make())
    model = from_network(network, map="per_cell").eval()
    map_BKHW = assert_mean_is_logits(network, model, images(3, side))
    cells_BNC = maps_of(network, images(3, side))
    with torch.no_grad():
        rows_NK = classify(network, cells_BNC.reshape(-1, cells_BNC.shape[2]))
    shift_BNK = map_BKHW.flatten(2).transpose(1, 2) - rows_NK.unflatten(0, cells_BNC.shape[:2])
    assert torch.allclose(shift_BNK, shift_BNK[:, :1].expand_as(shift_BNK), atol=1e-4)
    # These layers are not linear: the mean of the cells is not what the network says.
    assert shift_BNK.abs().max() > 1e-3
    teacher = Teacher(
        copy.deepcopy(model), None, name="x", device=torch.device("cpu"), precision="fp32",
        compile=False,
    )  # fmt: skip
    size = map_BKHW.abs().max().item()
    assert torch.allclose(teacher(images(3, side)), map_BKHW, atol=1e-5 * size)
    assert list(model.state_dict()) == list(network.state_dict())


def test_per_cell_changes_no_network_that_needs_no_cure() -> None:
    network = of_timm("resnet18").eval()
    exact, per_cell = from_network(network).eval(), from_network(network, map="per_cell").eval()
    assert torch.equal(exact(images()), per_cell(images()))


def test_dropout_after_the_layers_leaves_out_whole_channels_in_training() -> None:
    model = from_network(of_torchvision("mobilenet_v3_small"), map="per_cell").train()
    dropped_BC = (model.features(images(4, 64)) == 0).all(3).all(2)
    assert 0.15 < dropped_BC.float().mean() < 0.25


def test_images_are_enlarged_for_a_network_that_needs_it() -> None:
    model = from_timm("vit_tiny_patch16_224", 7, resize=32, **VIT).eval()
    assert isinstance(model, ForeignNetwork)
    small_BCHW = images(2, 16)
    large_BCHW = F.interpolate(small_BCHW, (32, 32), mode="bilinear")
    with torch.no_grad():
        assert torch.equal(model(small_BCHW), model(large_BCHW))
        assert torch.allclose(model(small_BCHW).mean((2, 3)), model.network(large_BCHW), atol=1e-5)
    assert model.taps(small_BCHW).stages[0].shape == (2, 24, 4, 4)
    with pytest.raises(ValueError, match=r"takes none of the images tried .*\(2, 3, 24, 24\)"):
        from_timm("vit_tiny_patch16_224", 7, resize=24, **VIT)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"map": "cells"}, "map='cells' is not one of exact, per_cell"),
        ({"resize": 0}, "resize=0 must be a number of pixels, such as 224"),
        ({"resize": "224"}, "resize='224' must be a number of pixels, such as 224"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], why: str) -> None:
    for build in (from_timm, from_torchvision):
        with pytest.raises(ValueError, match=why):
            build("resnet18", 7, **options)


class TwoHeads(Late):
    """A network whose two heads read one average."""

    def __init__(self) -> None:
        super().__init__(nn.Identity())
        self.head, self.head_dist = nn.Linear(8, 7), nn.Linear(8, 7)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        pooled_BC = self.body(images_BCHW).mean((2, 3))
        logits_BK: Tensor = (self.head(pooled_BC) + self.head_dist(pooled_BC)) / 2
        return logits_BK


def test_two_heads_of_one_average_give_the_mean_of_their_maps() -> None:
    network = TwoHeads()
    map_BKHW = assert_mean_is_logits(network, from_network(network), images(2, 32))
    cells_BHWC = network.body(images(2, 32)).permute(0, 2, 3, 1)
    expected = (network.head(cells_BHWC) + network.head_dist(cells_BHWC)) / 2
    assert torch.allclose(map_BKHW, expected.permute(0, 3, 1, 2), atol=1e-5)


class DropoutFirst(Late):
    """A network with dropout in front of a layer between average and head."""

    def __init__(self) -> None:
        super().__init__(nn.Dropout(0.5))
        self.wide = nn.Linear(8, 8)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        pooled_BC = self.act(self.body(images_BCHW).mean((2, 3)))
        logits_BK: Tensor = self.fc(self.wide(pooled_BC))
        return logits_BK


def test_dropout_in_front_of_a_layer_is_named() -> None:
    with pytest.raises(ValueError, match="dropout stands in front of `wide`, and not directly in"):
        from_network(DropoutFirst(), map="per_cell")


def test_two_heads_are_no_head() -> None:
    model = from_network(of_timm("deit_tiny_distilled_patch16_224", **VIT))
    with pytest.raises(ValueError, match=r"has 2 heads \(head, head_dist\), and a single one is"):
        model.head  # noqa: B018


def test_pits_stages_are_its_token_grids() -> None:
    """PiT passes its class token alone through the last norm, so the norm is a layer of each cell.

    Its three transformers have grids of their own.
    """
    torch.manual_seed(0)
    network = lively(small_pit())
    model = from_network(network, images(1, 64)).eval()
    assert_mean_is_logits(network, model, images(2, 64))
    shapes = [tuple(stage.shape) for stage in model.taps(images(2, 64)).stages]
    assert shapes == [(2, 8, 7, 7), (2, 16, 4, 4), (2, 32, 2, 2)]


def small_pit() -> nn.Module:
    network: nn.Module = timm.models.pit.PoolingVisionTransformer(
        img_size=64, patch_size=16, stride=8, stem_type="overlap", base_dims=(4, 4, 4),
        depth=(1, 1, 2), heads=(2, 4, 8), mlp_ratio=2, num_classes=7,
    )  # fmt: skip
    return network


def test_students_with_a_shifted_map_share_a_group_with_a_cnn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {**VIT, "img_size": 16, "patch_size": 4}
    options = [f"+student.model.{key}={value}" for key, value in small.items()]
    common = ("recipe=sd_kd_ls", "M=[1,2,4]", "trainer.epochs=1", "trainer.max_steps=2")
    students = [
        ("student=timm", "student.model.name=deit_tiny_distilled_patch16_224", *options),
        ("student=timm", "student.model.name=mobilenetv3_small_050", "+student.model.resize=64",
         "+student.model.map=per_cell"),
        ("student=resnet8",),
    ]  # fmt: skip
    jobs = [tiny(tmp_path, *words, *common) for words in students]
    assert precheck.problems(jobs) == []
    results = fit(jobs)
    assert [(result["status"], result["group_size"]) for result in results] == [("FINISHED", 3)] * 3
    assert all(result["flops"] > result["parameters"] for result in results)
    capsys.readouterr()
    for job, result in zip(jobs[:2], results, strict=False):
        evaluate.main([job.run_dir, "trainer.device=cpu", "--json"])
        assert json.loads(capsys.readouterr().out)["top1"] == result["best_top1"]


def test_a_teacher_with_a_class_token_teaches_a_cnn(tmp_path: Path) -> None:
    small = {**VIT, "img_size": 16, "patch_size": 4}
    options = [f"+teacher.model.{key}={value}" for key, value in small.items()]
    words = ("teacher=timm", "teacher.model.name=vit_tiny_patch16_224", *options)
    more = ("teacher.train_if_missing=true", "teacher.train_epochs=1", "trainer.max_steps=2")
    features = tiny(tmp_path, *words, *more, "trainer.epochs=1", "features=[at,rkd]", teacher=False)
    plain = tiny(tmp_path, *words, *more, "trainer.epochs=1", "M=[1,2,4]", teacher=False)
    assert precheck.problems([features, plain]) == []
    assert [result["status"] for result in fit([features, plain])] == ["FINISHED"] * 2


def test_simkd_rebuilds_a_student_that_accepts_one_size(tmp_path: Path) -> None:
    small = {**VIT, "img_size": 16, "patch_size": 4}
    options = [f"+student.model.{key}={value}" for key, value in small.items()]
    words = ("student=timm", "student.model.name=vit_tiny_patch16_224", *options)
    job = tiny(tmp_path, *words, "recipe=simkd", "trainer.epochs=1", "trainer.max_steps=2")
    (result,) = fit([job])
    assert result["status"] == "FINISHED"
    network = export.best_student(job, Path(job.run_dir))
    assert network(images(2, 16)).shape == (2, 10, 4, 4)


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


def test_planning_loads_no_published_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan could otherwise download weights that it never uses."""
    asked: list[bool] = []
    create = timm.create_model

    def without_weights(name: str, *, pretrained: bool, **options: Any) -> nn.Module:
        asked.append(pretrained)
        return create(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", without_weights)
    with torch.device("meta"):
        assert next(from_timm("resnet18", 7, pretrained=True).parameters()).is_meta
    from_timm("resnet18", 7, pretrained=True)
    assert asked == [False, True]


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


def test_weights_that_cannot_be_downloaded_name_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(OSError, match=r"^model.weights=DEFAULT of resnet18 .*resnet18-\w+\.pth "):
        from_torchvision("resnet18", 7, weights="DEFAULT")
    monkeypatch.setattr("timm.create_model", offline)
    with pytest.raises(OSError, match=r"^model.pretrained=true of resnet18 .*no network"):
        from_timm("resnet18", 7, pretrained=True)


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
