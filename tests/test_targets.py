"""Which code a configuration may name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sddlskd import config as cfg
from sddlskd import targets
from sddlskd.console import explain
from sddlskd.targets import check_names, instantiate
from tests.conftest import Compose, compose_in

FOREIGN = [
    "os.system",
    "subprocess.run",
    "builtins.eval",
    "my_losses.mse",
    "torchx.nn.Linear",
    "sddlskd_.models.create",
]
MISUSED = [
    "sddlskd.files.os.remove",  # through a module's imports
    "sddlskd.datasets.os.system",
    "sddlskd.datasets.download.fetch",
    "sddlskd.datasets.fetch_into",
    "torch.os.system",
    "torch.hub.load",
    "torch.load",
    "torch.jit.load",
    "torch.utils.cpp_extension.load_inline",
    "torch.distributed.nn.RemoteModule",
    "torch.nn.modules.module.torch.load",
    "torchvision.models.resnet18",
    "torchvision.datasets.MNIST",
    "timm.create_model",
    "sddlskd.train.main",
    "sddlskd.checkpoint.read",
    "sddlskd.models._NETWORKS.get",
    "sddlskd.datasets._log.warning",
    "sddlskd.models.create.__globals__",
    "sddlskd.models.create.__class__",
    "sddlskd.models.LogitMapModel.register_forward_hook",
    "sddlskd.models",
    "torch.optim.lr_scheduler.LambdaLR",
    "torch.nothing.there",
]


@pytest.mark.parametrize("target", FOREIGN)
def test_foreign_targets_are_refused_when_the_job_is_composed(tmp_path: Path, target: str) -> None:
    with pytest.raises(Exception, match="_target_") as caught:
        compose_in(tmp_path, f"student.model._target_={target}")
    said = explain(caught.value)
    assert "\n" not in said
    assert said.startswith(f"student.model._target_='{target}' is not of sddlskd, torch, torchvision, timm")
    assert "allow_foreign_targets=true" in said
    job = compose_in(tmp_path, f"student.model._target_={target}", "allow_foreign_targets=true")
    assert job.student.model["_target_"] == target


@pytest.mark.parametrize(
    "override",
    ["teacher.model._target_=os.system", "distiller.loss._target_=os.system", "dataset.load._target_=os.system",
     "optimizer.algorithm._target_=os.system", "+student.model.norm={_target_:os.system}",
     "+student.model.norms=[1,{a:{_target_:os.system}}]", "+student.model._args_=[{_target_:os.system}]",
     "+optimizer.algorithm._partial_=true optimizer.algorithm._target_=os.system"],
)  # fmt: skip
def test_wherever_the_target_stands(tmp_path: Path, override: str) -> None:
    with pytest.raises(Exception, match="_target_") as caught:
        compose_in(tmp_path, *override.split())
    key = override.split()[-1].lstrip("+").split("=")[0].removesuffix("._target_")
    assert explain(caught.value).startswith(key)
    assert "_target_='os.system' is not of" in explain(caught.value)


@pytest.mark.parametrize("value", [3, None, ["os.system"], {"_target_": "os.system"}, ""])
def test_what_is_no_name(value: Any) -> None:
    with pytest.raises(ValueError, match=r"student\.model\._target_=.* is no dotted name"):
        check_names({"_target_": value}, "student.model", allow_foreign=True)


@pytest.mark.parametrize("target", MISUSED)
def test_targets_that_do_something_else_are_refused_before_anything_runs(target: str) -> None:
    for node in ({"_target_": target}, {"_target_": "sddlskd.models.create", "x": [{"_target_": target}]}):
        check_names(node, "student.model", allow_foreign=False)
        with pytest.raises(ValueError, match="name a network, an optimizer, or a function of") as caught:
            instantiate(node, num_classes=10)
        assert f"_target_={target} " in str(caught.value)
        assert "\n" not in str(caught.value)


def test_what_a_configuration_is_for_is_called(compose: Compose) -> None:
    for node, kind in (
        ({"_target_": "torch.nn.Conv2d", "_args_": [3, 8, 1]}, torch.nn.Conv2d),
        ({"_target_": "torchvision.models.resnet.ResNet", "layers": [1, 1, 1, 1],
          "block": {"_target_": "torchvision.models.resnet.BasicBlock", "_partial_": True}}, None),
        ({"_target_": "sddlskd.models.wrn.WideResNet", "units": 1, "width": 1, "num_classes": 3}, torch.nn.Module),
        ({"_target_": "timm.layers.LayerNorm2d", "num_channels": 4}, torch.nn.Module),
    ):  # fmt: skip
        if kind is None:
            targets._check_kind(node["_target_"])
        else:
            assert isinstance(instantiate(node), kind)
    assert instantiate({"_target_": "sddlskd.losses.kd", "temperature": 2.0}, _partial_=True).keywords == {
        "temperature": 2.0
    }
    parameters = [torch.nn.Parameter(torch.ones(1))]
    assert isinstance(instantiate({"_target_": "torch.optim.Adam"}, _partial_=True)(parameters), torch.optim.Adam)
    assert len(instantiate({"_target_": "sddlskd.data.fake", "train": 4, "test": 2}).train.labels_N) == 4


def test_a_foreign_target_that_was_allowed_is_called_and_stays_allowed_in_the_frozen_job(
    compose: Compose, tmp_path: Path
) -> None:
    job = compose(
        "student.model._target_=tests.tiny.Net",
        "~student.model.name",
        "~student.model.stem",
        "allow_foreign_targets=true",
    )
    assert type(instantiate(job.student.model, num_classes=3)).__name__ == "Net"
    (tmp_path / "config.yaml").write_text(cfg.to_yaml(job))
    assert cfg.load(tmp_path / "config.yaml") == job
    assert cfg.teacher_job(job).allow_foreign_targets
    text = (tmp_path / "config.yaml").read_text().replace("allow_foreign_targets: true", "")
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"student\.model\._target_='tests\.tiny\.Net' is not of"):
        cfg.load(tmp_path / "config.yaml")


WORDS = ["torch", "sddlskd", "nn", "os", "system", "hub", "load", "models", "create", "_C", "__dict__", "datasets",
         "optim", "SGD", "functional", "timm", "", " ", "é"]  # fmt: skip


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(WORDS), max_size=5))
def test_any_path_is_a_network_an_optimizer_a_function_of_ours_or_refused(parts: list[str]) -> None:
    target, said = ".".join(parts), ""
    try:
        check_names({"_target_": target}, "x", allow_foreign=False)
        targets._check_kind(target)
    except ValueError as error:
        said = str(error)
    assert "\n" not in said
    assert bool(said) == (target not in ("sddlskd.models.create", "torch.optim.SGD"))
