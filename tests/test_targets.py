"""Test which code a configuration may name."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from sddlskd import config as cfg
from sddlskd import evaluate, export, worker
from sddlskd.config import Config, targets
from sddlskd.config.targets import check_names, instantiate
from sddlskd.models import create
from sddlskd.terminal.console import explain
from sddlskd.training.fit import fit
from tests.conftest import Compose, compose_in
from tests.tiny import tiny

FOREIGN = [
    "os.system",
    "subprocess.run",
    "builtins.eval",
    "my_losses.mse",
    "torchx.nn.Linear",
    "sddlskd_.models.create",
]
MISUSED = [
    "sddlskd.files.atomic.os.remove",  # an import of the module
    "sddlskd.datasets.arrays.os.system",
    "sddlskd.datasets.arrays.download.download_file",
    "sddlskd.datasets.arrays.download_into",
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
    "sddlskd.files.checkpoint.read",
    "sddlskd.models._NETWORKS.get",
    "sddlskd.datasets.arrays._log.warning",
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
    assert said.startswith(
        f"student.model._target_='{target}' is not from sddlskd, torch, torchvision, timm"
    )
    assert "allow_foreign_targets=true" in said
    job = compose_in(tmp_path, f"student.model._target_={target}", "allow_foreign_targets=true")
    assert job.student.model["_target_"] == target


@pytest.mark.parametrize(
    "override",
    ["teacher.model._target_=os.system", "distiller.loss._target_=os.system",
     "dataset.load._target_=os.system", "optimizer.algorithm._target_=os.system",
     "+student.model.norm={_target_:os.system}",
     "+student.model.norms=[1,{a:{_target_:os.system}}]",
     "+student.model._args_=[{_target_:os.system}]",
     "+optimizer.algorithm._partial_=true optimizer.algorithm._target_=os.system"],
)  # fmt: skip
def test_wherever_the_target_stands(tmp_path: Path, override: str) -> None:
    with pytest.raises(Exception, match="_target_") as caught:
        compose_in(tmp_path, *override.split())
    key = override.split()[-1].lstrip("+").split("=")[0].removesuffix("._target_")
    assert explain(caught.value).startswith(key)
    assert "_target_='os.system' is not from" in explain(caught.value)


@pytest.mark.parametrize("value", [3, None, ["os.system"], {"_target_": "os.system"}, ""])
def test_what_is_no_name(value: Any) -> None:
    with pytest.raises(ValueError, match=r"student\.model\._target_=.* is not a dotted name"):
        check_names({"_target_": value}, "student.model", allow_foreign=True)


@pytest.mark.parametrize("target", MISUSED)
def test_targets_that_do_something_else_are_refused_before_anything_runs(target: str) -> None:
    for node in (
        {"_target_": target},
        {"_target_": "sddlskd.models.create", "x": [{"_target_": target}]},
    ):
        check_names(node, "student.model", allow_foreign=False)
        with pytest.raises(
            ValueError,
            match=r"name a network, a method, an optimizer, or a function of|cannot be found",
        ) as caught:
            instantiate(node, num_classes=10)
        assert f"_target_={target} " in str(caught.value)
        assert "\n" not in str(caught.value)


def test_what_a_configuration_is_for_is_called(compose: Compose) -> None:
    for node, kind in (
        ({"_target_": "torch.nn.Conv2d", "_args_": [3, 8, 1]}, torch.nn.Conv2d),
        ({"_target_": "torchvision.models.resnet.ResNet", "layers": [1, 1, 1, 1],
          "block": {"_target_": "torchvision.models.resnet.BasicBlock", "_partial_": True}}, None),
        ({"_target_": "sddlskd.models.wrn.WideResNet", "units": 1, "width": 1, "num_classes": 3},
         torch.nn.Module),
        ({"_target_": "timm.layers.LayerNorm2d", "num_channels": 4}, torch.nn.Module),
    ):  # fmt: skip
        if kind is None:
            targets._check_kind("x", node["_target_"])
        else:
            assert isinstance(instantiate(node), kind)
    assert instantiate(
        {"_target_": "sddlskd.losses.kd", "temperature": 2.0}, _partial_=True
    ).keywords == {"temperature": 2.0}
    parameters = [torch.nn.Parameter(torch.ones(1))]
    assert isinstance(
        instantiate({"_target_": "torch.optim.Adam"}, _partial_=True)(parameters), torch.optim.Adam
    )
    assert (
        len(instantiate({"_target_": "sddlskd.data.fake", "train": 4, "test": 2}).train.labels_N)
        == 4
    )


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
    with pytest.raises(ValueError, match=r"model\._target_='tests\.tiny\.Net' is not from"):
        cfg.load(tmp_path / "config.yaml")


INSIDE = "_tar${oc.decode:g}et_: torch.load, f: CANARY, weights_only: false"


class Bomb:
    """An object whose unpickling creates the file `canary`."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.canary,)


def bomb(folder: Path) -> tuple[Path, Path]:
    """Return a file and the canary that its unpickling would create."""
    torch.save(Bomb(folder / "canary"), folder / "evil.pth")
    return folder / "evil.pth", folder / "canary"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Config:
    job = tiny(tmp_path_factory.mktemp("home"), "distiller=vanilla", "trainer.epochs=1")
    fit([job])
    return job


def test_an_exported_file_that_would_be_filled_in_once_more_is_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil, canary = bomb(tmp_path)
    name = "${oc.create:${oc.decode:'{" + INSIDE.replace("CANARY", str(evil)) + "}'}}"
    facts = {"network": "x", "dataset": "fake", "num_classes": 10, "mean": [0.5], "std": [0.5],
             "model": {"_target_": "sddlskd.models.create", "name": name}}  # fmt: skip
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"w": torch.zeros(1)}, path, {"sddlskd": json.dumps(facts)})
    with pytest.raises(SystemExit, match="1"):
        evaluate.main([str(path)])
    said = capsys.readouterr().err.splitlines()[-1]
    assert 'model.name="${oc.create:' in said
    assert "take it out" in said
    with pytest.raises(ValueError, match=r'name="\$\{oc.create:.* take it out'):
        instantiate(facts["model"], num_classes=10)
    assert not canary.exists()


@pytest.mark.parametrize("escapes", range(5))
def test_a_frozen_file_that_would_be_filled_in_is_data(
    tmp_path: Path, trained: Config, escapes: int, capsys: pytest.CaptureFixture[str]
) -> None:
    evil, canary = bomb(tmp_path)
    folder = shutil.copytree(trained.run_dir, tmp_path / "run")
    name = (
        "\\" * escapes
        + "${oc.create:{_target_: torch.load, f: "
        + str(evil)
        + ", weights_only: false}}"
    )
    frozen = yaml.safe_load((folder / "config.yaml").read_text())
    frozen["student"]["model"]["name"] = name
    (folder / "config.yaml").write_text(yaml.safe_dump(frozen))
    for main in (export.main, evaluate.main):
        with pytest.raises(SystemExit, match="1"):
            main([str(folder)])
        said = capsys.readouterr().err.splitlines()[-1]
        assert "student.model.name=" in said
        assert "take it out" in said
    assert worker.run([folder]) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert "take it out" in said
    assert worker.run([folder / "missing"]) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("error: ")
    assert "config.yaml" in said
    assert not canary.exists()


def test_a_frozen_file_does_not_read_the_environment(tmp_path: Path, trained: Config) -> None:
    frozen = yaml.safe_load(Path(trained.run_dir, "config.yaml").read_text())
    frozen["student"]["name"] = "${oc.env:PATH}"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(frozen))
    with pytest.raises(ValueError, match=r"student\.name='\$\{oc\.env:PATH\}' holds a"):
        cfg.load(tmp_path / "config.yaml")


def test_what_escapes_leave_of_a_composed_value_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"student\.name='\$\{oc\.env:PATH\}' holds a"):
        compose_in(tmp_path, r"student.name=\${oc.env:PATH}")


def test_a_strangers_run_directory_does_not_allow_itself_foreign_targets(
    tmp_path: Path, trained: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(trained.run_dir, tmp_path / "run")
    frozen = yaml.safe_load((folder / "config.yaml").read_text())
    frozen["allow_foreign_targets"] = True
    frozen["student"]["model"] = {"_target_": "tests.test_targets.known_network"}
    (folder / "config.yaml").write_text(yaml.safe_dump(frozen))
    for main in (export.main, evaluate.main):
        CALLED.clear()
        with pytest.raises(SystemExit, match="1"):
            main([str(folder)])
        said = capsys.readouterr().err.splitlines()[-1]
        assert "student.model._target_='tests.test_targets.known_network' is not from" in said
        assert "set allow_foreign_targets=true to run it" in said
        assert "damaged" not in said
        assert not CALLED
        main([str(folder), "allow_foreign_targets=true"])
        assert CALLED
    # A user's own frozen jobs keep the permission.
    assert cfg.load(folder / "config.yaml").allow_foreign_targets


CALLED: list[int] = []


def known_network(num_classes: int) -> torch.nn.Module:
    CALLED.append(num_classes)
    return create("resnet8", num_classes)


WORDS = ["torch", "sddlskd", "nn", "os", "system", "hub", "load", "models", "create", "_C",
         "__dict__", "datasets", "optim", "SGD", "functional", "timm", "", " ", "é"]  # fmt: skip


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(WORDS), max_size=5))
def test_any_path_is_a_network_an_optimizer_a_function_of_ours_or_refused(parts: list[str]) -> None:
    target, said = ".".join(parts), ""
    try:
        check_names({"_target_": target}, "x", allow_foreign=False)
        targets._check_kind("x", target)
    except ValueError as error:
        said = str(error)
    assert "\n" not in said
    assert bool(said) == (target not in ("sddlskd.models.create", "torch.optim.SGD"))
