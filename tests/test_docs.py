"""Test the pages of the documentation: their place, links, commands and examples."""

import argparse
import json
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torchvision
from onnx import TensorProto, helper
from PIL import Image

from analysis.names import method_name
from sddlskd import __main__ as cli
from sddlskd import config as cfg
from sddlskd import export, record
from sddlskd.data.decoding import Job, decode
from sddlskd.datasets.arrays import Files, Splits
from sddlskd.files import checkpoint
from sddlskd.models import create
from sddlskd.training.build import image_transform
from tests.pages import (
    PAGES,
    REPO,
    TEXTS,
    broken,
    commands,
    composed,
    example,
    name_of,
    write_files,
)
from tests.test_method_name import as_run
from tests.tiny import ForkedCommand, tiny

DOCS = REPO / "docs"
# tests/test_data_page.py and tests/slurm/test_docs.py run the commands of these pages.
ELSEWHERE = {DOCS / "data.md", DOCS / "cluster.md"}
COMMANDS = [(path, line) for path in TEXTS if path not in ELSEWHERE for line in commands(path)]
PLUGINS = ("hydra/launcher=joblib", "hydra/launcher=ray")  # not installed for the tests
TRAINING = sorted(
    {
        line.removesuffix(" sweep.plan=true")
        for _, line in COMMANDS
        if line.startswith("python -m sddlskd.train")
        and not any(word in line for word in ("--config-dir", *PLUGINS))
    }
)
MODULES = sorted(
    {
        line
        for _, line in COMMANDS
        if line.startswith("python -m ") and not line.startswith("python -m sddlskd.train")
    }
)
# Programs of others, and words of the shell.
OTHERS = {".", "cd", "cp", "eval", "export", "git", "mlflow", "pip", "tensorboard"}
OF_PACKAGE = re.compile(r"python -m |make |sddlskd |PGPASSFILE=")


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links_lead_somewhere(path: Path) -> None:
    assert broken(path) == []


def test_every_page_has_its_place_in_the_site() -> None:
    nav = (REPO / "mkdocs.yml").read_text().split("\nnav:\n")[1]
    listed = re.findall(r"^ +- .*: (\S+\.md)$", nav, re.MULTILINE)
    assert len(set(listed)) == len(listed)
    assert {path.relative_to(DOCS).as_posix() for path in PAGES} <= set(listed)
    for name in listed:
        assert (DOCS / name).exists() or (REPO / name).exists()


def test_every_command_is_known() -> None:
    makefile = (REPO / "Makefile").read_text()
    assert len(COMMANDS) > 50
    for path, line in COMMANDS:
        first = line.split()[0]
        assert first in OTHERS or OF_PACKAGE.match(line), f"{name_of(path)}: {line}"
        if first == "make":
            assert f"\n{line.split()[1]}:" in makefile, line
        if first == "sddlskd":
            assert line.split()[1] in {*cli.COMMANDS, "--help"}, line


def test_every_target_of_make_that_is_named_exists() -> None:
    makefile = (REPO / "Makefile").read_text()
    for path in TEXTS:
        for target in re.findall(r"`make ([\w-]+)", path.read_text()):
            assert f"\n{target}:" in makefile, f"{name_of(path)}: make {target}"


def test_make_lists_its_targets_as_contributing_does() -> None:
    printed = subprocess.run(["make"], cwd=REPO, capture_output=True, text=True, check=True).stdout
    listed = re.findall(r"^make ([\w-]+) +(.*)$", printed, re.MULTILINE)
    rows = r"^\| `make ([\w-]+)` \| (.*) \|$"
    said = re.findall(rows, (REPO / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    markup = re.compile(r"`|\[|\]\(.*?\)")
    assert listed == [(target, markup.sub("", text)) for target, text in said]
    (phony,) = re.findall(r"^\.PHONY: (.*)$", (REPO / "Makefile").read_text(), re.MULTILINE)
    parts = {"test-servers", "test-slurm"}  # of test-services
    assert {target for target, _ in listed} == set(phony.split()) - parts - {"help"}


def test_the_page_of_one_run_names_every_choice() -> None:
    page = (DOCS / "one-run.md").read_text()
    for group in ("recipe", "dataset", "scales", "optimizer", "trainer"):
        for path in (REPO / "conf" / group).glob("*.yaml"):
            assert re.search(rf"[` ]{path.stem}[` ]", page), f"{group}={path.stem}"


@pytest.mark.parametrize("command", TRAINING)
def test_every_training_command_composes(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "--help" in command or "--cfg" in command:
        return  # tests/test_cli.py and tests/test_config.py have these
    for animal in ("cat", "dog"):  # the folder of the examples
        (tmp_path / "pets" / "train" / animal).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    # A search proposes numbers of an interval; the first one is as good as any.
    jobs = composed(re.sub(r"(tag\(log,)?interval\(([\d.]+),[\d.]+\)+", r"\2", command))
    assert jobs
    assert (len(jobs) > 1) == ("-m" in shlex.split(command)[3:])


class Parsed(Exception):
    """Raised in place of what a command would do."""


@pytest.mark.filterwarnings("ignore:.*found in sys.modules after import:RuntimeWarning")
@pytest.mark.parametrize("command", MODULES)
def test_every_other_command_is_understood(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, module, *words = shlex.split(command)

    def only(parsing: Callable[..., object]) -> Callable[..., None]:
        def parse(*arguments: object) -> None:
            parsing(*arguments)
            raise Parsed

        return parse

    for name in ("parse_args", "parse_intermixed_args"):
        parser = argparse.ArgumentParser
        monkeypatch.setattr(parser, name, only(getattr(parser, name)))
    monkeypatch.setattr(sys, "argv", [module, *words])
    with pytest.raises(Parsed):
        runpy.run_module(module, run_name="__main__", alter_sys=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["loss", "method", "connector", "network", "dataset"])
def test_examples_run(name: str, tmp_path: Path) -> None:
    blocks = example(DOCS / "extending.md", name)
    assert [language for language, _ in blocks] == ["python", "yaml", "sh"]
    for _, text in blocks:
        assert len(text.splitlines()) < 20
    write_files(blocks, tmp_path)
    words = shlex.split(blocks[-1][1])
    teacher = dict(word.split("=", 1) for word in words if "=" in word)["teacher"]
    torch.manual_seed(0)
    checkpoint.write(
        tmp_path / f"teachers/digits/{teacher}.pt", {"model": create(teacher, 10).state_dict()}
    )
    quick = ["trainer=debug", "tracking=none"]
    assert words[:2] == ["python", "-m"]
    at_home = {"SDDLSKD_HOME": str(tmp_path)}
    code, out, err = ForkedCommand(tmp_path, *words[2:], *quick, cwd=tmp_path, env=at_home).end()
    assert code == 0, out + err
    results = [
        record.read_result(path.parent)
        for path in (tmp_path / "runs").glob(f"*/{teacher}-*/result.json")
    ]
    jobs = {"loss": 2, "method": 2, "connector": 1, "network": 1, "dataset": 1}[name]
    assert [result["status"] for result in results if result.get("teacher_sha256")] == [
        "FINISHED"
    ] * jobs


def test_a_loss_of_ones_own_stands_beside_other_methods(tmp_path: Path) -> None:
    blocks = example(DOCS / "sweeps.md", "own sweep")
    write_files(blocks, tmp_path)
    jobs = composed(blocks[-1][1].strip(), tmp_path)
    assert len(jobs) == 15
    own = [job for job in jobs if job.recipe == "mse"]
    assert [job.seed for job in own] == [0, 1, 2]
    assert {job.distiller.loss["_target_"] for job in own} == {"my_losses.mse"}
    assert {cfg.method_name(job) for job in own} == {"MSE"}
    # The example is the one that tests/test_docs.py runs.
    assert blocks[:2] == example(DOCS / "extending.md", "loss")[:2]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("loss", {"MSE", "SD-MSE [1,2]"}),
        ("method", {"Energy", "KD+Energy"}),
        ("connector", {"Regression"}),
    ],
)
def test_the_name_of_a_method_of_ones_own_is_the_one_that_its_file_gives(
    name: str, shown: set[str], tmp_path: Path
) -> None:
    blocks = example(DOCS / "extending.md", name)
    write_files(blocks, tmp_path)
    jobs = composed(blocks[-1][1].strip(), tmp_path)
    assert {cfg.title(job, seed=False, student=False) for job in jobs} == shown
    # The tables read the same name from MLflow.
    runs = [as_run(job) for job in jobs]
    assert {method_name(run.method, run.M) for run in runs} == shown


def test_example_of_a_loop_of_ones_own() -> None:
    ((_, code), *_) = example(DOCS / "extending.md", "loop")
    torch.manual_seed(0)
    teacher_network, student_network = (
        torchvision.models.resnet18(num_classes=5),
        torchvision.models.resnet18(num_classes=5),
    )
    before = student_network.fc.weight.clone()
    scope = {
        "teacher_network": teacher_network, "student_network": student_network,
        "loader": [(torch.randn(4, 3, 64, 64), torch.arange(4))],
        "optimizer": torch.optim.SGD(student_network.parameters(), 0.01),
    }  # fmt: skip
    exec(code, scope)
    assert scope["loss"].isfinite()
    assert not torch.equal(student_network.fc.weight, before)


@pytest.mark.parametrize("crop", ["area", "squeezed"])
def test_new_images_are_prepared_as_an_evaluation_prepares_them(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    crop: str,
) -> None:
    ((_, code),) = example(DOCS / "export.md", "onnx")
    (tmp_path / "photos").mkdir()
    generator = np.random.default_rng(0)
    noise = [generator.integers(0, 256, shape, np.uint8) for shape in ((9, 7, 3), (5, 8))]
    for number, pixels in enumerate(noise):
        smooth = Image.fromarray(pixels).resize((40 + 13 * number, 57))
        smooth.save(tmp_path / f"photos/{number}.png")
    paths = sorted((tmp_path / "photos").iterdir())
    (tmp_path / "photos/notes.txt").touch()
    files = Files(list(map(str, paths)), torch.arange(2))
    job = tiny(tmp_path, f"dataset.crop={crop}", "dataset.size=24", "dataset.num_classes=4")
    facts = export.about(job, tmp_path, (3, 24, 24), export.resize_of(job, Splits(files, files)))
    said = json.loads(facts["sddlskd"])
    said["class_names"] = ["a", "b", "c", "d"]
    # A linear model of all pixels stands for a network.
    weights = generator.normal(0, 0.1, (4, 3, 24, 24)).astype(np.float32)
    inputs, outputs = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", *shape])
        for name, shape in (("images", (3, 24, 24)), ("logits", (4,)))
    )
    nodes = [
        helper.make_node("Conv", ["images", "weights"], ["map"]),
        helper.make_node("Flatten", ["map"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes, "g", [inputs], [outputs], [onnx.numpy_helper.from_array(weights, "weights")]
    )
    opset = helper.make_opsetid("", 17)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=9)
    helper.set_model_props(model, {"sddlskd": json.dumps(said)})
    onnx.save(model, tmp_path / "best.onnx")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    *lines, skipped = capsys.readouterr().out.splitlines()
    assert skipped == "photos/notes.txt is no image"
    for path, line in zip(paths, lines, strict=True):
        pixels_HWC, _ = decode(Job(str(path), None), image_transform(job.dataset))
        logits = np.tensordot(weights, pixels_HWC.permute(2, 0, 1).numpy() / 255, 3)
        odds = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        name, best, probability = line.split()
        assert name == f"photos/{path.name}"
        assert best == "abcd"[odds.argmax()]
        assert float(probability) == pytest.approx(odds.max(), abs=0.02)


def test_the_method_of_the_guide_for_contributors() -> None:
    text = (REPO / "CONTRIBUTING.md").read_text()
    (block,) = re.findall(r"^    ```python\n(.*?)^    ```$", text, re.DOTALL | re.MULTILINE)
    scope: dict[str, Any] = {}
    exec(re.sub(r"^    ", "", block, flags=re.MULTILINE), scope)
    images = torch.randn(2, 3, 32, 32)
    student, teacher = (create(name, 10).taps(images) for name in ("resnet8", "resnet8x4"))
    assert scope["MyMethod"](student, teacher)(student, teacher, None).isfinite()
    assert len(block.splitlines()) < 30


def test_the_figure_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = DOCS / "figures/method.py"
    monkeypatch.setattr(sys, "argv", [str(script), str(tmp_path)])
    runpy.run_path(str(script), run_name="__main__")
    drawn = sorted(path.name for path in tmp_path.iterdir())
    assert drawn == sorted(path.name for path in script.parent.glob("method-*.svg"))
    assert all("</svg>" in (tmp_path / name).read_text() for name in drawn)
