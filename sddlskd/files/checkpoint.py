"""Crash-safe checkpoints with a spare, and weights files read without running their code."""

import argparse
import functools
import itertools
import logging
import pickle
import re
import zipfile
from collections.abc import Collection, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sddlskd.files.atomic import rotate, write_atomically

__all__ = [
    "UnreadableFile",
    "check_finite",
    "load_weights",
    "read",
    "read_latest",
    "read_safetensors",
    "read_weights",
    "write",
    "write_latest",
]

log = logging.getLogger(__name__)

# Files of a run: the checkpoint that is being put in place, the newest one, and the one before it.
NEW = "last.ckpt.new"
LATEST = "last.ckpt"
SPARE = "last.previous.ckpt"

# Keys under which other trainers keep a state dict, the preferred key first: averages of weights
# are taken only if the file holds no weights beside them.
AVERAGES = {"state_dict_ema", "model_ema"}
WRAPPERS = ("model", "state_dict", "model_state_dict", "net", "state_dict_ema", "model_ema")
# Buffers that count something and take no part in a forward pass: of torch's AveragedModel and of
# thop.
COUNTERS = {"n_averaged", "total_ops", "total_params"}
ZIP = b"PK\x03\x04"  # beginning of a zip file, and so of a file of torch.save
# What a file is that a user gave in place of weights, by the first bytes of the file in lower case
FOREIGN = {
    b"version https://git-lfs": "a pointer of Git LFS in place of the file; run: git lfs pull",
    b"<": "a web page, not a checkpoint; download the file itself",
    b"\x1f\x8b": "compressed; unpack it with gunzip, and give the unpacked file",
}
LARGE_STEM = 7  # side of the first convolution of networks of this package for large images
MOST_NESTED = 8  # wrappers around a state dict, and prefixes of its keys


class UnreadableFile(ValueError):
    """Error for a file that is refused: it is damaged, is no checkpoint, or would run code."""


def write(path: Path, state: Mapping[str, Any], *, replace: bool = True) -> None:
    """Save tensors and plain values to a file, completely or not at all.

    Args:
        path: The file to write; its folder is made if it is missing.
        state: Tensors, containers and plain values, as `torch.save` takes them. `read` refuses
            objects of other classes.
        replace: Whether an existing file is replaced.

    Raises:
        FileExistsError: If the file exists and `replace` is false.
        OSError: If the file cannot be written, for example because the disk is full; an old file
            stays as it was.
    """
    # The buffer lets a full disk fail in one plain write, and not inside the zip writer.
    buffer = BytesIO()
    torch.save(dict(state), buffer)
    content = buffer.getbuffer()
    with write_atomically(path, content.nbytes, replace=replace) as file:
        file.write(content)


def read(path: Path) -> Any:
    """Return the content of a file of `write` or `torch.save`, on the CPU, without running code.

    The file may hold tensors, containers and plain values. It may also hold numpy scalars and
    argparse.Namespace (only filled with attributes), because RepDistiller and mdistiller save them
    beside the weights.

    Raises:
        UnreadableFile: If the file is damaged, is no checkpoint, or would run code, as objects of
            other classes do; the error names the file, what is wrong and what to do.
        OSError: If the file cannot be opened; FileNotFoundError if there is no such file.
    """
    with open(path, "rb") as file:
        try:
            # torch.load does not verify the checksums of the zip file.
            if zipfile.is_zipfile(file):
                with zipfile.ZipFile(file) as archive:
                    if broken := archive.testzip():
                        raise ValueError(f"checksum of {broken} differs")
            file.seek(0)
            with torch.serialization.safe_globals([*_numpy_scalars(), argparse.Namespace]):
                return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file can raise any exception
            raise UnreadableFile(_why_unreadable(path, error)) from error


def _why_unreadable(path: Path, error: Exception) -> str:
    refused = None
    if isinstance(error, pickle.UnpicklingError):
        refused = re.search(
            r"GLOBAL ([\w.]+)|import of ([\w.]+)|(?:class|type) ([\w.]+\.[\w.]+)", str(error)
        )
    if refused:
        name = next(group for group in refused.groups() if group)
        return (
            f"{path} is refused: it would run {name} while being read. Nothing was run. Save its "
            "state_dict alone (torch.save({'model': model.state_dict()}, file)) and use that file"
        )
    if "TorchScript" in str(error):
        return (
            f"{path} is refused: it is a TorchScript program, which would run while being read. "
            "Save its state_dict alone (torch.save({'model': torch.jit.load(file).state_dict()}, "
            "other)) and use that file"
        )
    with open(path, "rb") as file:
        start = file.read(64)
    for beginning, what in FOREIGN.items():
        if start.lstrip().lower().startswith(beginning):
            return f"{path} is {what}"
    first_line = (str(error).splitlines() or [type(error).__name__])[0]
    if first_line.startswith("Weights only load failed"):  # the rest is advice to run its code
        first_line = "torch.save did not write it"
    elif isinstance(error, LookupError):  # of the unpickler, such as KeyError(101)
        first_line = "its bytes are not those of torch.save"
    size = path.stat().st_size
    return (
        f"{path} is truncated, damaged or not a checkpoint ({size} bytes: {first_line:.120}); "
        "get it again"
    )


@functools.cache
def _numpy_scalars() -> list[Any]:
    scalar = np.float64(0).__reduce__()[0]
    dtypes = [
        type(np.dtype(name))
        for name in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?")
    ]
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")  # numpy 1 and 2
    return [np.dtype, *dtypes, *((scalar, name) for name in names)]


def write_latest(folder: Path, state: Mapping[str, Any]) -> None:
    """Save the newest checkpoint of a run, and keep the previous checkpoint as a spare.

    `folder` is the run directory, which holds the files of one training run. `state` is saved as by
    `write`, to last.ckpt in this folder. An existing last.ckpt becomes last.previous.ckpt, and an
    older last.previous.ckpt is replaced.

    Raises:
        OSError: If the checkpoint cannot be written; the old checkpoints can still be read.
    """
    write(folder / NEW, state)
    rotate(folder / NEW)


def read_latest(folder: Path) -> Any | None:
    """Return the newest readable checkpoint of a run, or None if the run has no checkpoint yet.

    `folder` is the run directory, in which `write_latest` saved the checkpoints. If a checkpoint
    cannot be read, a warning is logged, and the one before it is read instead. The result is what
    was saved, on the CPU.

    Raises:
        UnreadableFile: If checkpoints exist and none of them can be read.
    """
    errors = []
    for path in (folder / NEW, folder / LATEST, folder / SPARE):
        if path.exists():
            try:
                state = read(path)
            except FileNotFoundError:  # rotated meanwhile by the process that has the run open
                continue
            except UnreadableFile as error:
                errors.append(error)
                log.warning("%s; falling back to the checkpoint before it", error)
                continue
            if errors:
                log.warning("continuing from %s", path)
            return state
    if errors:
        raise UnreadableFile(f"{errors[0]}, or delete {folder} to start this run anew")
    return None


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the state dict in a weights file, on the CPU.

    The file may be a checkpoint of this package, RepDistiller or mdistiller ({"model": ...}), a
    state dict under another usual key ("state_dict", "net", ...; see WRAPPERS), the only state dict
    under any other key, a bare state dict or a safetensors file. The prefix "module.", which
    DataParallel puts in front of every name, is removed.

    Raises:
        UnreadableFile: If the file is damaged, would run code, or holds no state dict.
        FileNotFoundError: If there is no such file.
        ValueError: If a .safetensors file is given and the package safetensors is not installed.
    """
    return {name.removeprefix("module."): value for name, value in _state_dict(path).items()}


def _state_dict(path: Path) -> dict[str, Tensor]:
    """Return the state dict in a weights file as `read_weights` does, with the file's own keys."""
    content = read_safetensors(path)[0] if _is_safetensors(path) else read(path)
    taken = None
    # A limit, because a file can hold a dict that contains itself.
    for _ in range(MOST_NESTED):
        if not (found := _wrapped(content)):
            break
        taken, *unused = found
        if unused and taken not in AVERAGES and (averages := AVERAGES.intersection(unused)):
            log.warning(
                "%s holds averaged weights (%s), which are not used; "
                "to use them, save them alone: torch.save({'model': checkpoint['%s']}, FILE)",
                path,
                min(averages),
                min(averages),
            )
        content = content[taken]
    if not _is_state_dict(content):
        message = (
            f"{path} holds no state dict; expected {{'model': state_dict}} or a bare state dict "
            f"({', '.join(WRAPPERS)} are known instead of model)"
        )
        if isinstance(content, Mapping) and content:
            place = f"under {taken}" if taken else "of the file"
            message += f"; the first keys {place} are {_first_keys(content)}"
            if several := _state_dicts(content):
                names = ", ".join(map(_printable, several))
                message += f"; save one of {names} alone: torch.save({{'model': ...}}, FILE)"
        raise UnreadableFile(message)
    return dict(content)


def _is_safetensors(path: Path) -> bool:
    """Return whether a file is to be read as safetensors: by its content, or else by its name.

    A file of that format begins with the length of its header in 8 bytes, then the header in JSON.
    """
    if not path.is_file():
        return path.suffix == ".safetensors"
    with open(path, "rb") as file:
        start = file.read(9)
    if start.startswith(ZIP):
        return False
    return path.suffix == ".safetensors" or start[8:] == b"{"


def _wrapped(content: Any) -> list[str]:
    """Return the keys under which `content` holds a state dict, the preferred key first.

    They are the keys of WRAPPERS under which there are tensors. If there is none, it is the only
    key under which there is a state dict, if there is exactly one such key.
    """
    if not isinstance(content, Mapping):
        return []
    inner = {key: content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)}
    # A dict of plain values is for example the configuration of a model.
    found = [
        key
        for key, values in inner.items()
        if any(isinstance(value, Tensor | Mapping) for value in values.values())
    ]
    state_dicts = _state_dicts(content)
    if not found and len(state_dicts) == 1:
        return state_dicts
    return found


def _state_dicts(content: Mapping[Any, Any]) -> list[str]:
    """Return the keys of `content` under which there is nothing but tensors by name."""
    return [
        str(key)
        for key, values in content.items()
        if isinstance(key, str) and _is_state_dict(values)
    ]


def _is_state_dict(content: Any) -> bool:
    return (
        isinstance(content, Mapping)
        and bool(content)
        and all(_is_weight(*item) for item in content.items())
    )


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a .safetensors file by name, on the CPU, and the header's metadata.

    The metadata are texts by key; {} if the header has none.

    Raises:
        UnreadableFile: If the file is damaged.
        FileNotFoundError: If there is no such file.
        ValueError: If the package safetensors is not installed.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ValueError(
            f"reading {path} needs safetensors: pip install 'sddlskd[export]'"
        ) from error

    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise UnreadableFile(
            f"{path} is truncated, damaged or not a safetensors file "
            f"({path.stat().st_size} bytes: {error}); get it again"
        ) from error


def _is_weight(name: Any, value: Any) -> bool:
    dense = (
        isinstance(value, Tensor) and value.layout is torch.strided and value.device.type == "cpu"
    )
    return isinstance(name, str) and dense and not value.is_quantized


def load_weights(model: nn.Module, path: Path, network: str) -> None:
    """Load a weights file into a network; every name and shape must fit.

    The names in the file may have prefixes that the network lacks: "module." on any name, and up to
    8 components that all names share, such as "module.student.". The prefixes are removed if more
    names then fit. Counters of other tools that the network lacks (COUNTERS, such as "n_averaged")
    are ignored. BatchNorm's num_batches_tracked may be missing in the file.

    Args:
        model: The network, changed in place, only if everything fits.
        path: The weights file, in a format of `read_weights`.
        network: Name of the network, for the message.

    Raises:
        ValueError: If a tensor is missing or unknown, has another shape, or is floating-point
            although the network has an integer one or vice versa; the message names the first
            three. If the weights fit torchvision's network of that name, the message says how to
            choose that network. Also if a .safetensors file is given and the package safetensors is
            not installed.
        UnreadableFile: If the file is damaged, would run code, or holds no state dict.
        FileNotFoundError: If there is no such file.
    """
    own = model.state_dict()
    read_names = _state_dict(path)
    weights = _renamed(read_names, own)
    differing = [f"{k} is missing" for k in own if k not in weights]
    differing += [f"{_printable(k)} is not in {network}" for k in weights if k not in own]
    names_differ = bool(differing)
    differing += [
        f"{k} is {tuple(weights[k].shape)} instead of {tuple(own[k].shape)}"
        for k in own
        if k in weights and weights[k].shape != own[k].shape
    ]
    differing += [
        f"{k} is {weights[k].dtype} instead of {own[k].dtype}"
        for k in own
        if k in weights and weights[k].is_floating_point() != own[k].is_floating_point()
    ]
    if names_differ and _fits_torchvision(read_names, network, own):
        raise ValueError(
            f"{path} does not hold weights of sddlskd's {network}, but of torchvision's; choose "
            f"that network, as in teacher=torchvision teacher.model.name={network} or, to import "
            f"the file, --as torchvision teacher.model.name={network}"
        )
    if len(differing) == 1 and (stem := _other_stem(weights, own)):
        raise ValueError(
            f"{path} does not hold weights of {network} with the first layer of this job: "
            f"{differing[0]}; set dataset.stem={stem}, the stem that the file was trained with"
        )
    if differing:
        shown = "; ".join(differing[:3])
        if len(differing) > 3:
            shown += f"; and {len(differing) - 3} more"
        message = (
            f"{path} does not hold weights of {network}: {shown}. Give the file of that network "
            "and data set"
        )
        unknown = [key for key in read_names if key not in own]
        if names_differ and unknown:
            lacking = [key for key in own if key not in read_names]
            message += (
                f" (the first keys of the file alone are {_first_keys(unknown)}; "
                f"those of {network} alone are {_first_keys(lacking) or 'none'})"
            )
        raise ValueError(message)
    model.load_state_dict(weights)


def _other_stem(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """Return the stem of a file if its first convolution alone shows it, else "".

    The large stem of this package's networks has 7x7 pixels, and the small one 3x3 or fewer.
    `weights` are the tensors of the file, and `own` those of the network, of the same names.
    """
    differing = [name for name in own if name in weights and weights[name].shape != own[name].shape]
    if len(differing) != 1:
        return ""
    theirs, ours = weights[differing[0]].shape, own[differing[0]].shape
    if len(theirs) != 4 or len(ours) != 4 or theirs[:2] != ours[:2] or theirs[1] != 3:
        return ""
    sides = theirs[-1], ours[-1]
    if sides[1] == LARGE_STEM and sides[0] < LARGE_STEM:
        return "small"
    return "large" if sides[0] == LARGE_STEM and sides[1] < LARGE_STEM else ""


def _fits_torchvision(
    weights: Mapping[str, Tensor], network: str, own: Mapping[str, Tensor]
) -> bool:
    """Return whether weights have the names and shapes of torchvision's network of this name.

    `own` are the tensors of the network of this package, whose head comes last. Its number of
    classes counts.
    """
    from torchvision.models import get_model, list_models  # slow to import

    if network not in list_models():
        return False
    *_, bias_K = own.values()
    with torch.device("meta"):
        theirs = get_model(network, num_classes=len(bias_K)).state_dict()
    shapes = {name: value.shape for name, value in weights.items()}
    return shapes == {name: value.shape for name, value in theirs.items()}


def check_finite(model: nn.Module, source: Path | str) -> None:
    """Raise ValueError if a tensor in the state dict of `model` holds NaN or an infinite value.

    The message names the first three such tensors and `source`, the file or address from which the
    weights were read.
    """
    spoilt = [name for name, value in model.state_dict().items() if not value.isfinite().all()]
    if spoilt:
        shown = ", ".join(spoilt[:3])
        if len(spoilt) > 3:
            shown += f" and {len(spoilt) - 3} more"
        raise ValueError(
            f"{source} holds values that are not finite, in {shown}: its training diverged, or the "
            "file is damaged; get it again, or give another file"
        )


def _renamed(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights under the names of the network that they fit.

    A prefix that all names share, such as "module.student.", is removed if the rest are names of
    the network. Buffers of COUNTERS that the network does not have are left out. BatchNorm's
    num_batches_tracked, which files from before PyTorch 0.4.1 lack and this package does not read,
    are taken from the network if the file lacks them.

    Args:
        weights: The weights under the file's own names.
        own: The state dict of the network.

    Returns:
        The weights, under names that may still differ from those of the network.
    """
    candidates = [dict(weights)]
    # DataParallel may wrap a part of a network only.
    bare = {k.removeprefix("module."): value for k, value in weights.items()}
    if len(bare) == len(weights):
        candidates.append(bare)
    for _ in range(MOST_NESTED):
        if not (prefix := _common_prefix(candidates[-1])):
            break
        candidates.append({k.removeprefix(prefix): v for k, v in candidates[-1].items()})
    # `max` prefers the first of equally good candidates: the names as they are in the file.
    best = max(candidates, key=lambda candidate: len(candidate.keys() & own.keys()))
    counts = {k: value for k, value in own.items() if k.endswith(".num_batches_tracked")}
    return counts | {k: v for k, v in best.items() if k in own or not _is_counter(k)}


def _common_prefix(weights: Mapping[str, Tensor]) -> str:
    """Return the first component that all names share, with its dot; COUNTERS are ignored.

    The result is "" if the names share no component.
    """
    firsts = {name.partition(".")[:2] for name in weights if not _is_counter(name)}
    if len(firsts) != 1:
        return ""
    first, dot = firsts.pop()
    return first + dot if dot else ""


def _is_counter(name: str) -> bool:
    return name.rpartition(".")[2] in COUNTERS


def _first_keys(content: Collection[Any]) -> str:
    shown = ", ".join(_printable(str(key)) for key in itertools.islice(content, 3))
    return shown + ", ..." if len(content) > 3 else shown


def _printable(name: str) -> str:
    """Return a name from an untrusted file, shortened and without terminal control characters."""
    return name[:80].encode("unicode_escape").decode()
