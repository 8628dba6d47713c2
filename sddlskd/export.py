"""Export the best student of a run: `python -m sddlskd.export RUN_DIR`.

    --to safetensors    best.safetensors: the plain state dict; the header describes the network
    --to onnx           best.onnx: images (B, C, H, W), float32 in 0..1, -> logits (B, K); the model
                        normalises the images itself
    --to mlflow         mlflow_model/: the ONNX model with its signature, for `mlflow models serve`;
                        it is also uploaded to MLflow if MLflow has the run

The ONNX model is saved only if its logits agree with those of the PyTorch network.
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
from sddlskd.config import Config
from sddlskd.config.targets import refuse_interpolations
from sddlskd.datasets.arrays import Files, Splits
from sddlskd.files.atomic import write_atomically
from sddlskd.files.checkpoint import load_weights, read_safetensors
from sddlskd.processes.exit_codes import ExitCode
from sddlskd.terminal.arguments import RUN_DIR_IN_HOME, other_form
from sddlskd.terminal.console import explain, log_to_terminal, refuse_another_checkout, write_line
from sddlskd.training.build import image_transform, load_splits, shape_of, without_weights
from sddlskd.training.features import rebuild_student, reuses_teacher

__all__ = [
    "FORMATS",
    "TRUST",
    "Classifier",
    "about",
    "best_student",
    "described",
    "load_run",
    "main",
    "resize_of",
    "to_mlflow",
    "to_onnx",
    "to_safetensors",
]

TOLERANCE = 1e-4  # relative to the largest absolute logit or to 1, whichever is larger
# The command line argument that allows code from outside targets.PACKAGES.
TRUST = "allow_foreign_targets=true"
NEEDS = "pip install 'sddlskd[export]'"
# Settings dataset.* of the preparation of image files for an evaluation.
PREPARATION = ("size", "crop", "centre", "upright")
SHOWN_CLASSES = 5  # names of classes that the log shows
FORMATS = {"safetensors": "best.safetensors", "onnx": "best.onnx", "mlflow": "mlflow_model"}


class Classifier(nn.Module):
    """Classifier of images in 0..1: normalises the images, then averages the network's logit map.

    Args:
        network: network that returns a logit map (K logits at each position) of normalised images:
            (B, C, H, W) -> (B, K, h, w).
        mean: mean of each of the C channels, for images in 0..1.
        std: standard deviation of each of the C channels, for images in 0..1.
    """

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.network = network
        self.mean = nn.Buffer(torch.tensor(mean).reshape(1, -1, 1, 1), persistent=False)
        self.std = nn.Buffer(torch.tensor(std).reshape(1, -1, 1, 1), persistent=False)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Return the logits (B, K) of images (B, C, H, W) with values in 0..1.

        The logits are the mean of the network's logit map over its positions.
        """
        logits_BK: Tensor = self.network((images_BCHW - self.mean) / self.std).mean((2, 3))
        return logits_BK


def load_run(folder: Path, allow_foreign: bool) -> Config:
    """Return the configuration of a run that has finished at least one epoch, from its config.yaml.

    Args:
        folder: run directory.
        allow_foreign: whether the configuration may name code from outside sddlskd, torch,
            torchvision and timm. This argument replaces the value of allow_foreign_targets in the
            file.

    Returns:
        The configuration, with checked values.

    Raises:
        ValueError: If the folder has no config.yaml or no best.ckpt, or if config.yaml is damaged
            or names code that is not allowed. The content of best.ckpt is not checked.
    """
    record.check_has_best(folder)
    return cfg.load(folder / "config.yaml", allow_foreign_targets=allow_foreign)


def best_student(job: Config, folder: Path) -> nn.Module:
    """Return the student with the weights of the run's best epoch, in eval mode on the CPU.

    Args:
        job: configuration of the run, as `load_run` returns it.
        folder: run directory, which holds best.ckpt.

    Raises:
        FileNotFoundError: If best.ckpt is missing.
        ValueError: If best.ckpt is damaged or holds weights of another network, or if the network
            cannot be built from the configuration.
        InstantiationException: If the network's code raises an error.
    """
    network = rebuild_student(job, torch.device("cpu"))
    load_weights(network, folder / "best.ckpt", job.student.name)
    return network.to(memory_format=torch.contiguous_format).eval()


def about(
    job: Config,
    folder: Path,
    image_CHW: Sequence[int] | None = None,
    resize: dict[str, Any] | None = None,
) -> dict[str, str]:
    """Return the metadata of an exported student, for the header of its file.

    Args:
        job: configuration of the run.
        folder: run directory, whose result.json has the best top-1 and its epoch, and the names of
            the classes if the images lie in class folders.
        image_CHW: shape of one image: channels, height and width in pixels; None if it is unknown.
        resize: how an image file becomes such an image, as `resize_of` returns it; None for images
            that are no files.

    Returns:
        Two texts: "format" is "pt", the mark of PyTorch tensors in .safetensors files. "sddlskd" is
        a JSON object with the network's name and configuration, the name of the data set, the
        number of classes, their names in the order of the logits (null if unknown), the shape of an
        image (null if unknown), `resize`, the `_target_` of the loader of the data, the settings
        PREPARATION of the data set, which apply to image files, the mean and std of the images, the
        hash of the configuration, and the best top-1 (%) with its epoch (null if unknown). If the
        student holds a part of its teacher, as with SimKD, the object also has the teacher's
        network and the feature methods.

    Raises:
        record.Damaged: If result.json is damaged.
    """
    result = record.read_result(folder)
    preparation = {key: getattr(job.dataset, key) for key in PREPARATION}
    facts = {
        "network": job.student.name,
        "model": without_weights(job.student.model),
        "dataset": job.dataset.name,
        "num_classes": job.dataset.num_classes,
        "class_names": _class_names(folder),
        "image_shape": image_CHW,
        "resize": resize,
        "loader": job.dataset.load["_target_"],
        "preparation": {**preparation, "crop": job.dataset.crop.value},
        "mean": job.dataset.mean,
        "std": job.dataset.std,
        "config_hash": cfg.config_hash(job),
        "best_top1": result.get("best_top1"),
        "best_epoch": result.get("best_epoch"),
    }
    if reuses_teacher(job):
        facts["teacher"] = without_weights(job.teacher.model)
        facts["methods"] = {name: feature.method for name, feature in job.features.items()}
    return {"format": "pt", "sddlskd": json.dumps(facts)}


def _class_names(folder: Path) -> list[str] | None:
    """Return the names of the classes that a run has noted; None if it noted none."""
    data = record.read_result(folder).get("data") or {}
    names: list[str] | None = data.get("class_names")
    return names


def described(path: Path) -> dict[str, Any] | None:
    """Return the metadata of a student that was exported to a .safetensors file (see `about`).

    Args:
        path: weights file of any format.

    Returns:
        A dict with "network" (name), "model" (`_target_` and arguments of the network), "dataset"
        (name), "num_classes", "mean", "std", "class_names" (None if unknown), "loader" (`_target_`
        of the loader of the data; "" if unknown) and "preparation" (settings PREPARATION by name;
        {} if unknown). If the student holds a part of its teacher, the dict also has "teacher"
        (`_target_` and arguments of the teacher's network) and "methods" (`_target_` and arguments
        of each feature method, by name). None if the file is not a .safetensors file or has no
        such metadata.

    Raises:
        FileNotFoundError: If a .safetensors file is missing.
        ValueError: If the file or its metadata is damaged, if the metadata names code other than
            networks and methods of this package, or if the package safetensors is not installed.
    """
    text = read_safetensors(path)[1].get("sddlskd") if path.suffix == ".safetensors" else None
    if text is None:
        return None
    try:
        facts: dict[str, Any] = json.loads(text)
        named = {key: facts[key] for key in ("network", "dataset", "num_classes", "mean", "std")}
        built: dict[str, Any] = {
            "model": without_weights(facts["model"]),
            "class_names": facts.get("class_names"),
            "loader": str(facts.get("loader", "")),
            "preparation": _preparation(facts.get("preparation", {})),
        }
        foreign = _foreign_target(facts["model"], "sddlskd.models.")
        if "methods" in facts:
            built["teacher"] = without_weights(facts["teacher"])
            built["methods"] = dict(facts["methods"])
            foreign = foreign or _foreign_target(facts["teacher"], "sddlskd.models.")
            for method in built["methods"].values():
                foreign = foreign or _foreign_target(method, "sddlskd.methods.")
        refuse_interpolations(facts, "")
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", named["dataset"]):
            raise ValueError(f"dataset={named['dataset']!a} is not a plain name")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} contains metadata that cannot be read ({error}); export it again"
        ) from error
    if foreign:
        raise ValueError(
            f"{path} names {foreign:.80}, which is not a network of sddlskd; "
            "evaluate its run directory instead"
        )
    return {**named, **built}


def _preparation(found: dict[str, Any]) -> dict[str, Any]:
    """Return the settings PREPARATION that metadata hold; raise ValueError for a wrong value."""
    if not found:
        return {}
    size, crop, centre, upright = (found[key] for key in PREPARATION)
    if type(size) is not int or size < 1 or not 0 < centre <= 1 or type(upright) is not bool:
        raise ValueError(f"preparation={found!a:.80}")
    return {"size": size, "crop": cfg.Crop(crop), "centre": centre, "upright": upright}


def _foreign_target(node: dict[str, Any], package: str) -> str:
    """Return the quoted `_target_` of a node that must not be built; "" if it may be built.

    A node may be built if its target begins with `package` and its arguments name no targets.
    """
    target = node["_target_"]
    arguments = [value for key, value in node.items() if key != "_target_"]
    if str(target).startswith(package) and "_target_" not in json.dumps(arguments):
        return ""
    return repr(target)


def to_safetensors(network: nn.Module, path: Path, metadata: dict[str, str]) -> None:
    """Write a network's state dict to a .safetensors file, with the names of its tensors unchanged.

    Args:
        network: network to save, on any device.
        path: file to write; an existing file is replaced.
        metadata: texts by name for the file's header, as `about` returns them.

    Raises:
        ValueError: If the package safetensors is not installed.
        OSError: If the file cannot be written.
    """
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
    """Write a classifier as an ONNX model for batches of any size, after checking its logits.

    The check compares the logits of ONNX Runtime and of torch for three random images.

    Args:
        classifier: classifier on the CPU; it is left in eval mode.
        path: file to write; an existing file is replaced.
        image_CHW: shape of one image: channels, height and width in pixels.
        metadata: texts by name for the model's properties, as `about` returns them.

    Raises:
        ValueError: If onnx, onnxruntime or onnxscript is not installed, or if a logit of ONNX
            Runtime differs from that of torch by more than 1e-4 (TOLERANCE) times the larger of 1
            and the largest absolute logit. Nothing is written then.
        OSError: If the file cannot be written.
        Exception: Any error of torch's exporter or of ONNX Runtime.
    """
    try:
        import onnx
        import onnxruntime  # type: ignore[import-untyped, unused-ignore]

        # torch's exporter needs onnxscript.
        import onnxscript  # type: ignore[import-untyped, unused-ignore]  # noqa: F401
    except ImportError as error:
        raise ValueError(f"{error.name} is not installed: {NEEDS}") from error

    generator = torch.Generator().manual_seed(0)
    images_BCHW, others_BCHW = (torch.rand(B, *image_CHW, generator=generator) for B in (2, 3))
    with TemporaryDirectory() as folder, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns about its own parts
        program = torch.onnx.export(
            classifier.eval(), (images_BCHW,), dynamo=True, verbose=False,
            input_names=["images"], output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )  # fmt: skip
        assert program is not None
        program.save(str(Path(folder, "best.onnx")))
        model = onnx.load(str(Path(folder, "best.onnx")))
        onnx.helper.set_model_props(model, metadata)
        expected_BK = classifier(others_BCHW)
    content = model.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"images": others_BCHW.numpy()})
    difference = (torch.from_numpy(got) - expected_BK).abs().max().item()
    size = max(1.0, expected_BK.abs().max().item())
    if not difference <= TOLERANCE * size:  # also if the difference is not a number
        raise ValueError(
            f"ONNX Runtime's logits differ from torch's by {difference:.2g} of {size:.2g}; "
            "nothing is written"
        )
    with write_atomically(path) as file:
        file.write(content)


def to_mlflow(onnx_file: Path, folder: Path, image_CHW: Sequence[int], num_classes: int) -> None:
    """Write an MLflow model: a folder with the ONNX model, its signature and its requirements.

    Args:
        onnx_file: ONNX model, as `to_onnx` writes it.
        folder: folder to write; an existing folder is replaced, whatever it holds.
        image_CHW: shape of one image: channels, height and width in pixels.
        num_classes: number of classes, the length of the logits of an image.

    Raises:
        ImportError: If MLflow, onnx or onnxruntime is not installed.
        OSError: If the folder cannot be written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=".export-") as scratch:
        tracking.save_model(
            onnx_file, Path(scratch, "model"), image_CHW=image_CHW, num_classes=num_classes
        )
        if folder.exists():
            folder.rename(Path(scratch, "earlier"))
        Path(scratch, "model").rename(folder)


def resize_of(job: Config, splits: Splits) -> dict[str, Any] | None:
    """Return how an evaluation resizes an image file before it cuts the middle out.

    Args:
        job: configuration of the run.
        splits: images of the run.

    Returns:
        A dict with "side" (pixels of the shorter side of the resized image), "squeezed" (whether
        both sides become that long) and "upright" (whether the image is first turned as its EXIF
        orientation says). None for images that are no files: they are not resized.
    """
    if not isinstance(splits.train, Files):
        return None
    view = image_transform(job.dataset)
    return {"side": view.side, "squeezed": view.squeezed, "upright": view.upright}


def _export(folder: Path, to: str, out: Path | None, allow_foreign: bool) -> str:
    if to == "mlflow" and out and out.exists() and not (out / "MLmodel").exists():
        raise ValueError(
            f"{out} exists and is not an MLflow model; give --out a path that does not exist"
        )
    job = load_run(folder, allow_foreign)
    network = best_student(job, folder)
    target = out or folder / FORMATS[to]
    if to == "safetensors":
        to_safetensors(network, target, about(job, folder))
        return str(target)
    splits = load_splits(job)
    _, height, width, channels = shape_of(job, splits)
    image_CHW = (channels, height, width)
    facts = about(job, folder, image_CHW, resize_of(job, splits))
    classifier = Classifier(network, job.dataset.mean, job.dataset.std)
    if to == "onnx":
        to_onnx(classifier, target, image_CHW, facts)
        logging.getLogger("sddlskd").info("%s", _how_to_load(target, image_CHW, job, folder))
        return str(target)
    with TemporaryDirectory() as scratch:
        to_onnx(classifier, Path(scratch, "best.onnx"), image_CHW, facts)
        to_mlflow(Path(scratch, "best.onnx"), target, image_CHW, job.dataset.num_classes)
    uri = tracking.log_model(folder, target)
    return f"{target}, in MLflow as {uri}" if uri else str(target)


def _how_to_load(path: Path, image_CHW: Sequence[int], job: Config, folder: Path) -> str:
    """Return one line on the input, the classes and the use of an exported ONNX model.

    Args:
        path: ONNX model.
        image_CHW: shape of one image: channels, height and width in pixels.
        job: configuration of the run.
        folder: run directory.
    """
    shape = ", ".join(map(str, image_CHW))
    classes = f"{job.dataset.num_classes} classes of {job.dataset.name}"
    if names := _class_names(folder):
        more = ", ..." if len(names) > SHOWN_CLASSES else ""
        classes = f"{classes} ({', '.join(names[:SHOWN_CLASSES])}{more})"
    return (
        f"{path}: images (B, {shape}), float32 in 0..1 -> logits of {classes}; "
        f"load it with onnxruntime.InferenceSession({str(path)!r})"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Export the student of the run that the command line names, and print the path of the export.

    `arguments` are the words of the command line, of which the first is the run directory; None
    stands for those of this process.

    Raises:
        SystemExit: With code 1 after printing an error of the export, 2 if the arguments cannot be
            parsed, or 130 after Ctrl-C.
    """
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
        help="allow the run's _target_ values to name code of other packages; only if you trust it",
    )
    parser.add_argument("--to", choices=list(FORMATS), default="safetensors")
    parser.add_argument(
        "--out", type=Path, metavar="PATH", help="the output path (default: inside RUN_DIR)"
    )
    given = sys.argv[1:] if arguments is None else arguments
    if wrong := other_form(parser, given, keys=(TRUST.partition("=")[0],), home=RUN_DIR_IN_HOME):
        parser.error(wrong)
    chosen = parser.parse_intermixed_args(given)
    refuse_another_checkout()
    cfg.frame()
    log_to_terminal()
    logging.getLogger("sddlskd").info("%s of %s", chosen.to, chosen.folder)
    try:
        write_line(_export(chosen.folder.absolute(), chosen.to, chosen.out, bool(chosen.trust)))
    except KeyboardInterrupt:
        sys.exit(ExitCode.STOPPED)
    except Exception as error:  # a user's own network may raise any type during the export
        sys.stderr.write(f"error: {explain(error)}\n")
        sys.exit(1)


if __name__ == "__main__":
    main()
