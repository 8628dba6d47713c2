"""`python -m sddlskd.export RUN_DIR`: take the best student of a run out of here.

    --to safetensors    its plain state dict, best.safetensors, with what it is in the header
    --to onnx           best.onnx: images (B, C, H, W), float32 in 0..1, -> logits (B, K); normalising is inside
    --to mlflow         mlflow_model/: the ONNX model with its signature, for `mlflow models serve`; MLflow gets it too,
                        where it has the run

Each is checked against the network here before it is kept.
"""

import argparse
import json
import logging
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from sddlskd import config as cfg
from sddlskd import record, tracking
from sddlskd.build import build_network, shape_of
from sddlskd.checkpoint import load_weights, read_safetensors
from sddlskd.config import Config
from sddlskd.console import explain, log_to_terminal, write_line
from sddlskd.files import write_atomically
from sddlskd.targets import instantiate, refuse_interpolations

__all__ = [
    "FORMATS",
    "TRUST",
    "Classifier",
    "about",
    "best_student",
    "described",
    "load_run",
    "main",
    "to_mlflow",
]
__all__ += ["to_onnx", "to_safetensors", "without_weights"]

TOLERANCE = 1e-4  # of the logits' size, or of 1 where they are smaller
TRUST = (
    "allow_foreign_targets=true"  # on the command line, for code that is not of targets.PACKAGES
)
NEEDS = "pip install 'sddlskd[export]'"
FORMATS = {"safetensors": "best.safetensors", "onnx": "best.onnx", "mlflow": "mlflow_model"}


class Classifier(nn.Module):
    """A logit-map model as others want it: images (B, C, H, W) with values 0..1 -> logits (B, K)."""

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.network = network
        self.mean = nn.Buffer(torch.tensor(mean).reshape(1, -1, 1, 1), persistent=False)
        self.std = nn.Buffer(torch.tensor(std).reshape(1, -1, 1, 1), persistent=False)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        logits_BK: Tensor = self.network((images_BCHW - self.mean) / self.std).mean((2, 3))
        return logits_BK


def load_run(folder: Path, allow_foreign: bool) -> Config:
    """The frozen configuration of a run. Raises ValueError where the folder is none, or no epoch has ended yet.

    allow_foreign: whether the user lets it name code of others (TRUST); a run directory may be anybody's, and what its
    own file says of that does not count.
    """
    if not (folder / "config.yaml").is_file():
        raise ValueError(
            f"{folder} is no run directory: it has no config.yaml; runs are in <home>/runs/<dataset>/"
        )
    if not (folder / "best.ckpt").is_file():
        status = record.read_result(folder).get("status", "not started")
        raise ValueError(f"{folder} has no best.ckpt ({status}); let the run end its first epoch")
    return cfg.load(folder / "config.yaml", allow_foreign_targets=allow_foreign)


def best_student(job: Config, folder: Path) -> nn.Module:
    """The student of the run's best epoch, in eval mode on the CPU."""
    network = build_network(
        without_weights(job.student.model), job.dataset.num_classes, job.seed, torch.device("cpu")
    )
    load_weights(network, folder / "best.ckpt", job.student.name)
    return network.to(memory_format=torch.contiguous_format).eval()


def about(job: Config, folder: Path) -> dict[str, str]:
    """What an exported file says of itself, as text: all that building the network and feeding it needs."""
    d, result = job.dataset, record.read_result(folder)
    facts = {
        "network": job.student.name,
        "model": without_weights(job.student.model),
        "dataset": d.name,
        "num_classes": d.num_classes,
        "mean": d.mean,
        "std": d.std,
        "config_hash": cfg.config_hash(job),
        "best_top1": result.get("best_top1"),
        "best_epoch": result.get("best_epoch"),
    }
    return {"format": "pt", "sddlskd": json.dumps(facts)}


def described(path: Path) -> dict[str, Any] | None:
    """What an exported .safetensors file says of itself (`about`); None for a file that says nothing.

    Raises ValueError for a description that is not ours, or that names code which is not ours: a file is data.
    """
    text = read_safetensors(path)[1].get("sddlskd") if path.suffix == ".safetensors" else None
    if text is None:
        return None
    try:
        facts: dict[str, Any] = json.loads(text)
        model = facts["model"]
        target, rest = (
            model["_target_"],
            [value for key, value in model.items() if key != "_target_"],
        )
        named = {key: facts[key] for key in ("network", "dataset", "num_classes", "mean", "std")}
        refuse_interpolations(facts, "")
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", named["dataset"]):
            raise ValueError(f"dataset={named['dataset']!a} is no plain name")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} describes itself in a way that cannot be read ({error}); export it again"
        ) from error
    if not str(target).startswith("sddlskd.models.") or "_target_" in json.dumps(rest):
        raise ValueError(
            f"{path} names {target!r:.80}, which is no network of sddlskd; evaluate its run directory instead"
        )
    return {**named, "model": without_weights(model)}


def without_weights(model: dict[str, Any]) -> dict[str, Any]:
    """A network's configuration without what would fetch published weights, for one that gets weights of its own."""
    return {key: value for key, value in model.items() if key not in ("pretrained", "weights")}


def to_safetensors(network: nn.Module, path: Path, metadata: dict[str, str]) -> None:
    """The state dict, key by key as torch has it."""
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise ValueError(f"safetensors is not installed: {NEEDS}") from error

    state = {
        name: value.detach().cpu().contiguous().clone()
        for name, value in network.state_dict().items()
    }
    with write_atomically(path) as file:
        file.write(save(state, metadata))


def to_onnx(
    classifier: Classifier, path: Path, image_CHW: Sequence[int], metadata: dict[str, str]
) -> None:
    """The classifier for batches of any size. Raises ValueError where ONNX Runtime gives other logits than torch."""
    try:
        import onnx
        import onnxruntime  # type: ignore[import-untyped, unused-ignore]
        import onnxscript  # type: ignore[import-untyped, unused-ignore]  # noqa: F401  (torch's exporter needs it)
    except ImportError as error:
        raise ValueError(f"{error.name} is not installed: {NEEDS}") from error

    generator = torch.Generator().manual_seed(0)
    images_BCHW, others_BCHW = (torch.rand(B, *image_CHW, generator=generator) for B in (2, 3))
    with TemporaryDirectory() as folder, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own parts
        program = torch.onnx.export(
            classifier.eval(), (images_BCHW,), dynamo=True, verbose=False,
            input_names=["images"], output_names=["logits"], dynamic_shapes=({0: torch.export.Dim("batch")},),
        )  # fmt: skip
        assert program is not None
        program.save(str(Path(folder, "best.onnx")))
        model = onnx.load(str(Path(folder, "best.onnx")))
        onnx.helper.set_model_props(model, metadata)
        expected_BK = classifier(others_BCHW)
    content = model.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"images": others_BCHW.numpy()})
    apart = (torch.from_numpy(got) - expected_BK).abs().max().item()
    size = max(1.0, expected_BK.abs().max().item())
    if not apart <= TOLERANCE * size:
        raise ValueError(
            f"ONNX Runtime's logits differ from torch's by {apart:.2g} of {size:.2g}; nothing is written"
        )
    with write_atomically(path) as file:
        file.write(content)


def to_mlflow(onnx_file: Path, folder: Path, image_CHW: Sequence[int], num_classes: int) -> None:
    """A folder with the ONNX model, its signature and what it needs; what was there before is replaced."""
    with TemporaryDirectory(dir=folder.parent, prefix=".export-") as scratch:
        tracking.save_model(
            onnx_file, Path(scratch, "model"), image_CHW=image_CHW, num_classes=num_classes
        )
        if folder.exists():
            folder.rename(Path(scratch, "earlier"))
        Path(scratch, "model").rename(folder)


def _image_shape(job: Config) -> tuple[int, ...]:
    _, height, width, channels = shape_of(job, instantiate(job.dataset.load))
    return channels, height, width


def _export(folder: Path, to: str, out: Path | None, allow_foreign: bool) -> str:
    if to == "mlflow" and out and out.exists() and not (out / "MLmodel").exists():
        raise ValueError(f"{out} is there and is no MLflow model; give --out a path that is free")
    job = load_run(folder, allow_foreign)
    network, target, facts = (
        best_student(job, folder),
        out or folder / FORMATS[to],
        about(job, folder),
    )
    if to == "safetensors":
        to_safetensors(network, target, facts)
        return str(target)
    image_CHW = _image_shape(job)
    classifier = Classifier(network, job.dataset.mean, job.dataset.std)
    if to == "onnx":
        to_onnx(classifier, target, image_CHW, facts)
        return str(target)
    with TemporaryDirectory() as scratch:
        to_onnx(classifier, Path(scratch, "best.onnx"), image_CHW, facts)
        to_mlflow(Path(scratch, "best.onnx"), target, image_CHW, job.dataset.num_classes)
    uri = tracking.log_model(folder, target)
    return f"{target}{f', in MLflow as {uri}' if uri else ''}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m sddlskd.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, metavar="RUN_DIR")
    parser.add_argument(
        "trust",
        nargs="?",
        choices=[TRUST],
        help="where the run's _target_ name code that you trust",
    )
    parser.add_argument("--to", choices=list(FORMATS), default="safetensors")
    parser.add_argument("--out", type=Path, metavar="PATH", help="instead of a place in RUN_DIR")
    chosen = parser.parse_intermixed_args(arguments)
    cfg.frame()
    log_to_terminal()
    logging.getLogger("sddlskd").info("%s of %s", chosen.to, chosen.folder)
    try:
        write_line(_export(chosen.folder.absolute(), chosen.to, chosen.out, bool(chosen.trust)))
    except KeyboardInterrupt:
        sys.exit(130)
    except (
        Exception
    ) as error:  # a network of the user's own may raise anything while it is exported
        sys.stderr.write(f"error: {explain(error)}\n")
        sys.exit(1)


if __name__ == "__main__":
    main()
