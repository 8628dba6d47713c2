"""Test exported models: every format must give the numbers of the run."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors.torch
import timm
import torch

from sddlskd import export
from sddlskd.config import Config
from sddlskd.files import checkpoint
from sddlskd.models import create, from_network, names
from sddlskd.training.fit import fit
from tests.test_foreign import VIT, Late
from tests.tiny import same, tiny

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Return the job of a finished run that MLflow has, too."""
    home = tmp_path_factory.mktemp("home")
    job = tiny(
        home, "tracking=mlflow", f"tracking.uri=sqlite:///{home}/mlflow.db", "trainer.epochs=1"
    )
    fit([job])
    return job


def images(count: int = 5, side: int = 16) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(3))


def best(job: Config) -> Any:
    model = create("resnet8", 10)
    model.load_state_dict(checkpoint.read(Path(job.run_dir, "best.ckpt"))["model"])
    return model.eval()


def expected_of(job: Config) -> torch.Tensor:
    mean, std = (torch.tensor(x).reshape(3, 1, 1) for x in (job.dataset.mean, job.dataset.std))
    with torch.no_grad():
        return best(job)((images() - mean) / std).mean((2, 3))


def answer(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Run the command, which must succeed, and return its stdout."""
    export.main([str(word) for word in words])
    return capsys.readouterr().out.strip()


def test_safetensors_is_the_plain_state_dict(
    trained: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(answer(capsys, trained.run_dir))
    assert path == Path(trained.run_dir, "best.safetensors")
    state = safetensors.torch.load_file(path)
    assert same(state, dict(best(trained).state_dict()))
    facts = export.described(path)
    assert facts is not None
    assert (facts["network"], facts["dataset"], facts["num_classes"]) == ("resnet8", "fake", 10)
    twin = create("resnet8", 10)
    checkpoint.load_weights(twin, path, "resnet8")
    assert same(dict(twin.state_dict()), state)


@pytest.mark.parametrize("name", names())
def test_safetensors_round_trip_of_every_network(tmp_path: Path, name: str) -> None:
    network, twin = (
        create(name, 10).to(memory_format=torch.channels_last),  # type: ignore[call-overload]
        create(name, 10),
    )
    export.to_safetensors(network, tmp_path / "x.safetensors", {})
    checkpoint.load_weights(twin, tmp_path / "x.safetensors", name)
    assert same(dict(twin.state_dict()), dict(network.state_dict()))


@pytest.mark.parametrize("name", ["wrn_16_1", "vgg8", "foreign"])
def test_onnx_gives_torchs_logits(tmp_path: Path, name: str) -> None:
    network = (
        from_network(Late(torch.nn.Dropout(0.5))) if name == "foreign" else create(name, 10)
    ).eval()
    classifier = export.Classifier(network, MEAN, STD)
    export.to_onnx(classifier, tmp_path / "x.onnx", (3, 32, 32), {"a": "b"})
    onnx.checker.check_model(str(tmp_path / "x.onnx"), full_check=True)
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx", providers=["CPUExecutionProvider"])
    for count in (1, 5):
        x = images(count, 32)
        (got,) = session.run(None, {"images": x.numpy()})
        normalised = (x - torch.tensor(MEAN).reshape(3, 1, 1)) / torch.tensor(STD).reshape(3, 1, 1)
        with torch.no_grad():
            expected = network(normalised).mean((2, 3)).numpy()
        assert np.abs(got - expected).max() <= 1e-4 * max(1.0, np.abs(expected).max())
    assert session.get_modelmeta().custom_metadata_map == {"a": "b"}


class Headed(torch.nn.Module):
    """A network with layers between average and head, as MobileNetV3 has them."""

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Conv2d(3, 8, 3, 4)
        self.wide, self.act = torch.nn.Linear(8, 16), torch.nn.Hardswish()
        self.head = torch.nn.Linear(16, 7)

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        pooled_BC = self.body(images_BCHW).mean((2, 3))
        logits_BK: torch.Tensor = self.head(self.act(self.wide(pooled_BC)))
        return logits_BK


@pytest.mark.parametrize("what", ["class token", "layers after the average"])
def test_onnx_gives_the_logits_of_the_wrapped_network(tmp_path: Path, what: str) -> None:
    torch.manual_seed(0)
    if what == "class token":
        small = {**VIT, "depth": 1}
        own = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=7, **small)
        model = from_network(own)
    else:
        own = Headed()
        model = from_network(own, map="per_cell")
    classifier = export.Classifier(model.eval(), MEAN, STD)
    export.to_onnx(classifier, tmp_path / "x.onnx", (3, 32, 32), {})
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx", providers=["CPUExecutionProvider"])
    x = images(5, 32)
    (got,) = session.run(None, {"images": x.numpy()})
    with torch.no_grad():
        expected = own.eval()((x - classifier.mean) / classifier.std).numpy()
    assert np.abs(got - expected).max() <= 1e-5


def test_a_model_for_mlflow_has_a_signature_and_stands_beside_its_run(
    trained: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    said = answer(capsys, trained.run_dir, "--to", "mlflow")
    folder, _, uri = said.partition(", in MLflow as ")
    assert uri.startswith("runs:/")
    mlflow.set_tracking_uri(trained.tracking.uri)
    for place in (folder, uri):
        model = mlflow.pyfunc.load_model(place)
        inputs, outputs = (
            model.metadata.signature.inputs.inputs,
            model.metadata.signature.outputs.inputs,
        )
        assert [(x.name, x.shape) for x in (*inputs, *outputs)] == [
            ("images", (-1, 3, 16, 16)),
            ("logits", (-1, 10)),
        ]
        got = model.predict({"images": images().numpy()})["logits"]
        assert np.abs(got - expected_of(trained).numpy()).max() < 1e-4
    # A second export replaces the first.
    assert answer(capsys, trained.run_dir, "--to", "mlflow") == said


def test_the_folder_of_a_model_for_mlflow_is_made(
    tmp_path: Path, trained: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "model"
    answer(capsys, trained.run_dir, "--to", "mlflow", "--out", str(out))
    assert (out / "MLmodel").is_file()
    assert [path.name for path in out.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("where", ["thesis", "run", "file"])
def test_a_model_for_mlflow_replaces_nothing_else(
    tmp_path: Path, trained: Config, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.tex").write_text("years")
    (tmp_path / "file").write_text("days")
    out = Path(trained.run_dir) if where == "run" else tmp_path / where
    before = sorted((path, path.stat().st_mtime_ns) for path in [out, *out.rglob("*")])
    with pytest.raises(SystemExit, match="1"):
        export.main([trained.run_dir, "--to", "mlflow", "--out", str(out)])
    assert (
        f"{out} exists and is not an MLflow model; give --out a path that does not exist"
        in capsys.readouterr().err
    )
    assert before == sorted((path, path.stat().st_mtime_ns) for path in [out, *out.rglob("*")])


def test_an_onnx_model_says_what_it_takes_and_gives(
    tmp_path: Path, trained: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained.run_dir, folder)
    result = json.loads((folder / "result.json").read_text())
    names = [f"class{number}" for number in range(10)]
    result["data"]["class_names"] = names
    (folder / "result.json").write_text(json.dumps(result))
    export.main([str(folder), "--to", "onnx"])
    out, err = capsys.readouterr()
    path = folder / "best.onnx"
    assert out == f"{path}\n"
    assert err.splitlines()[-1].partition(" ")[2] == (
        f"{path}: images (B, 3, 16, 16), float32 in 0..1 -> logits of 10 classes of fake "
        "(class0, class1, class2, class3, class4, ...); "
        f"load it with onnxruntime.InferenceSession('{path}')"
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    facts = json.loads(session.get_modelmeta().custom_metadata_map["sddlskd"])
    assert facts["class_names"] == names
    assert facts["image_shape"] == [3, 16, 16]
    assert facts["resize"] is None  # images in memory are not resized
    assert (facts["mean"], facts["std"]) == (trained.dataset.mean, trained.dataset.std)


def test_onnx_that_differs_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    with pytest.raises(ValueError, match=r"differ from torch's by .* nothing is written"):
        export.to_onnx(
            export.Classifier(create("resnet8", 10), MEAN, STD),
            tmp_path / "x.onnx",
            (3, 16, 16),
            {},
        )
    assert list(tmp_path.iterdir()) == []


def test_errors_take_one_line(
    tmp_path: Path, trained: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = tiny(tmp_path)
    Path(begun.run_dir).mkdir(parents=True)
    Path(begun.run_dir, "config.yaml").write_text(Path(trained.run_dir, "config.yaml").read_text())
    failed = tmp_path / "failed"
    failed.mkdir()
    Path(failed, "config.yaml").touch()
    Path(failed, "result.json").write_text('{"status": "FAILED"}')
    for folder, why in (
        (failed, "has no best.ckpt (FAILED); no epoch was finished: run the same command again"),
        (tmp_path, "is not a run directory"),
        (begun.run_dir, r"has no best.ckpt (not started)"),
    ):
        with pytest.raises(SystemExit, match="1"):
            export.main([str(folder)])
        err = capsys.readouterr().err.splitlines()[-1]
        assert err.startswith("error: ")
        assert why in err


@pytest.mark.parametrize(
    ("facts", "why"),
    [
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        (
            {"model": {"_target_": "os.system", "command": "true"}},
            "names 'os.system', which is not a network of sddlskd",
        ),
        (
            {"model": {"_target_": "sddlskd.models.create", "name": {"_target_": "os.getcwd"}}},
            "is not a network of sddlskd",
        ),
    ],
)
def test_a_file_that_describes_itself_badly_is_refused(
    tmp_path: Path, facts: Any, why: str
) -> None:
    whole = {"network": "x", "dataset": "fake", "num_classes": 10, "mean": MEAN, "std": STD}
    text = facts if isinstance(facts, str) else json.dumps({**whole, **facts})
    safetensors.torch.save_file(
        {"w": torch.zeros(1)}, tmp_path / "x.safetensors", {"sddlskd": text}
    )
    with pytest.raises(ValueError, match=why):
        export.described(tmp_path / "x.safetensors")


def test_damaged_safetensors_are_named(tmp_path: Path) -> None:
    for content in (b"", b"no safetensors at all", b"\xff" * 64):
        (tmp_path / "x.safetensors").write_bytes(content)
        with pytest.raises(
            checkpoint.UnreadableFile, match=r"damaged or not a safetensors file \(\d+ bytes"
        ):
            checkpoint.read_weights(tmp_path / "x.safetensors")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        checkpoint.read_weights(tmp_path / "y.safetensors")
