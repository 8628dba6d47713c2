"""The teacher network and its weight files: paths, publishing, hashes and measured accuracy."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from sddlskd.checkpoint import load_weights, write
from sddlskd.files import write_atomically
from sddlskd.precision import autocast

__all__ = ["Teacher", "file_hash", "measured_top1", "missing", "path_of", "publish"]

log = logging.getLogger(__name__)


def path_of(home: str, dataset: str, network: str) -> Path:
    """Return the path of the weight file that `teacher=<network>` loads by default.

    A network that is trained to the end without a teacher is written to the same path.

    Args:
        home: the home folder of the experiments.
        dataset: name of the data set.
        network: name of the network.

    Returns:
        <home>/teachers/<dataset>/<network>.pt
    """
    return Path(home, "teachers", dataset, f"{network}.pt")


def missing(path: Path, network: str, dataset: str) -> FileNotFoundError:
    """Return the error for a missing teacher file; its message lists the ways to get one.

    Args:
        path: the missing file.
        network: name of the teacher's network.
        dataset: name of the data set.

    Returns:
        The FileNotFoundError, for the caller to raise.
    """
    return FileNotFoundError(
        f"teacher={network} for {dataset} is missing: no file {path}. Train it with "
        f"`python -m sddlskd.train distiller=vanilla student={network} dataset={dataset}` "
        "(or teacher.train_if_missing=true), fetch it if it is published "
        "(`python -m sddlskd.teachers list`), or set teacher.checkpoint=FILE to a checkpoint of "
        "sddlskd, RepDistiller or mdistiller"
    )


def publish(
    path: Path, weights: dict[str, Tensor], *, network: str, dataset: str, top1: float
) -> bool:
    """Write trained weights as a teacher file, unless the file exists already.

    An existing teacher file is kept: replacing it would make the runs of one study incomparable.

    Args:
        path: the teacher file, see `path_of`.
        weights: state dict of the network.
        network: name of the network.
        dataset: name of the data set.
        top1: top-1 accuracy of the network in %.

    Returns:
        Whether the file was written; False if a teacher file existed already.
    """
    if path.exists():
        return False
    try:
        write(
            path,
            {"model": weights, "network": network, "dataset": dataset, "top1": top1},
            replace=False,
        )
    except FileExistsError:  # another run or a download wrote the file in the meantime
        return False
    return True


def file_hash(path: Path) -> str:
    """Return the sha256 of a file in hex.

    The hash is cached until the file's modification time or size changes.
    """
    return _hash(path, path.stat().st_mtime_ns, path.stat().st_size)


@cache
def _hash(path: Path, mtime_ns: int, size: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def measured_top1(path: Path, dataset: str, measure: Callable[[], float]) -> float:
    """Return the top-1 accuracy of a teacher file on a data set, measured only once.

    The measured value is stored in a JSON file next to the teacher file, under the data set's name
    and the hash of the teacher file.

    Args:
        path: the teacher file.
        dataset: name of the data set.
        measure: function that measures the top-1 accuracy in %; called if no value is stored.

    Returns:
        The top-1 accuracy in %.
    """
    note, key = path.with_name(path.name + ".top1.json"), f"{dataset}:{file_hash(path)}"
    known: dict[str, float] = json.loads(note.read_text()) if note.exists() else {}
    if key not in known:
        known[key] = measure()
        try:
            with write_atomically(note) as file:
                file.write(json.dumps(known).encode())
        except OSError:  # the folder of teachers may be read-only
            log.info("cannot save the teacher's top-1 next to %s; the next run measures it", path)
    return known[key]


class Teacher:
    """A frozen network that returns logit maps.

    The network runs in eval mode, without gradients, with BatchNorm folded into the convolutions
    if torch.fx can trace it and it uses no layer twice.

    Args:
        network: the module.
        path: the file of its weights; None to keep the weights as they are.
        name: name of the network, for messages.
        device: device that the network is moved to.
        precision: precision of the forward pass: "fp32", "bf16" or "fp16".
        compile: whether to apply torch.compile.

    Raises:
        ValueError: if the file does not hold weights of this network, or is unreadable
            (see `load_weights`).
        FileNotFoundError: if the file is missing.
    """

    def __init__(
        self,
        network: nn.Module,
        path: Path | None,
        *,
        name: str,
        device: torch.device,
        precision: str,
        compile: bool,
    ) -> None:
        if path is not None:
            load_weights(network, path, name)
        self.name = name
        self.network = _folded(network.eval().requires_grad_(False), name).eval()
        self.network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.precision = precision
        self._forward = torch.compile(self.network) if compile else self.network

    def __call__(self, images_BCHW: Tensor, views_B: Tensor | None = None) -> Tensor:
        """Return the logit map (B, K, H, W) of a batch, as an inference tensor.

        `views_B` identifies the image and the view of each sample. Only `TeacherCache` uses it.
        """
        with torch.inference_mode(), autocast(images_BCHW.device, self.precision):
            logit_map_BKHW: Tensor = self._forward(images_BCHW)
        return logit_map_BKHW


def _folded(network: nn.Module, name: str) -> nn.Module:
    try:
        traced = torch.fx.symbolic_trace(network)
    except Exception as error:  # tracing runs the network's own code, which can raise anything
        log.info("teacher %s cannot be traced (%s); its BatchNorm stays unfolded", name, error)
        return network
    layers = {
        n
        for n, layer in traced.named_modules()
        if isinstance(layer, nn.Conv2d | nn.Linear | nn.BatchNorm2d)
    }
    calls = Counter(node.target for node in traced.graph.nodes if node.target in layers)
    # If a layer is used twice, `fuse` would fold the BatchNorm after one use into every use.
    if max(calls.values(), default=0) > 1:
        log.info("teacher %s uses a layer twice; its BatchNorm stays unfolded", name)
        return network
    folded: nn.Module = fuse(traced)
    return folded
