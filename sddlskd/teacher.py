"""The teacher: found or trained, checked, folded, and asked once a batch."""

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
    """Where a network trained on a data set is left, and where `teacher=network` finds it."""
    return Path(home, "teachers", dataset, f"{network}.pt")


def missing(path: Path, network: str, dataset: str) -> FileNotFoundError:
    """The error for a teacher that is not there, with the ways to get one."""
    return FileNotFoundError(
        f"teacher={network} for {dataset} is missing: no file {path}. Train it with `python -m sddlskd.train "
        f"distiller=vanilla student={network} dataset={dataset}` (or teacher.train_if_missing=true), fetch it where "
        "it is published (`python -m sddlskd.teachers list`), or name a file of ours, RepDistiller's "
        "or mdistiller's with teacher.checkpoint=FILE"
    )


def publish(
    path: Path, weights: dict[str, Tensor], *, network: str, dataset: str, top1: float
) -> bool:
    """Leave trained weights where `teacher=network` finds them; False where a teacher is there already.

    An earlier teacher is kept: swapping it would make runs of one study incomparable.
    """
    if path.exists():
        return False
    try:
        write(
            path,
            {"model": weights, "network": network, "dataset": dataset, "top1": top1},
            replace=False,
        )
    except FileExistsError:  # another run has finished meanwhile, or it was fetched
        return False
    return True


def file_hash(path: Path) -> str:
    """sha256 of a file, in hex; read once while the file stays as it is."""
    return _hash(path, path.stat().st_mtime_ns, path.stat().st_size)


@cache
def _hash(path: Path, mtime_ns: int, size: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def measured_top1(path: Path, dataset: str, measure: Callable[[], float]) -> float:
    """Top-1 (%) of a teacher's file on a data set: measured once, then read from the note beside the file."""
    note, key = path.with_name(path.name + ".top1.json"), f"{dataset}:{file_hash(path)}"
    known: dict[str, float] = json.loads(note.read_text()) if note.exists() else {}
    if key not in known:
        known[key] = measure()
        try:
            with write_atomically(note) as file:
                file.write(json.dumps(known).encode())
        except OSError:  # a read-only folder of teachers: it is measured again next time
            log.info("cannot keep the teacher's top-1 beside %s", path)
    return known[key]


class Teacher:
    """A frozen network that gives logit maps: eval mode, no gradients, BatchNorm folded into the convolutions.

    network: the module; path: the file of its weights (None: as it is). Calling it with images_BCHW gives the logit
    map B K H W as an inference tensor; which views of which images they are (views_B) matters to `TeacherCache` alone.
    Raises what `load_weights` raises.
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
        with torch.inference_mode(), autocast(images_BCHW.device, self.precision):
            logit_map_BKHW: Tensor = self._forward(images_BCHW)
        return logit_map_BKHW


def _folded(network: nn.Module, name: str) -> nn.Module:
    try:
        traced = torch.fx.symbolic_trace(network)
    except Exception as error:  # a network's own code, run on stand-ins for tensors
        log.info("teacher %s cannot be traced (%s); its BatchNorm stays unfolded", name, error)
        return network
    layers = {
        n
        for n, layer in traced.named_modules()
        if isinstance(layer, nn.Conv2d | nn.Linear | nn.BatchNorm2d)
    }
    calls = Counter(node.target for node in traced.graph.nodes if node.target in layers)
    if (
        max(calls.values(), default=0) > 1
    ):  # `fuse` would fold every use of it by the BatchNorm after one
        log.info("teacher %s uses a layer twice; its BatchNorm stays unfolded", name)
        return network
    folded: nn.Module = fuse(traced)
    return folded
