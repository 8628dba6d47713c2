"""Weight files of teachers: their paths, their pins, and their measured accuracy.

A pin is the sha256 that a file had when it first came from elsewhere. `teachers/lock.json` in the
home folder holds the pins. A file that differs from its pin is refused.
"""

import hashlib
import json
import logging
import shlex
import zipfile
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock
from torch import Tensor, nn

from sddlskd.datasets.fingerprint import KEYS
from sddlskd.files.atomic import put, write_atomically
from sddlskd.files.checkpoint import UnreadableFile, check_finite, load_weights, read, write

__all__ = [
    "LARGEST_FILE",
    "PUBLISHED",
    "Published",
    "check_pin",
    "check_size",
    "choice_of",
    "data_of",
    "file_hash",
    "install",
    "lock_path",
    "measured_top1",
    "missing",
    "path_of",
    "pin",
    "pin_key",
    "pinned",
    "publish",
    "size_of",
]

log = logging.getLogger(__name__)

# Names of data sets of the user's own for which dataset.name is not set.
UNNAMED = ("image_folder", "label_sets")
LARGEST_FILE = 1 << 29  # bytes; resnet50 with its optimizer state has 190 MB


class Published(NamedTuple):
    """Weights file of a teacher that others have trained and published, with its accuracy.

    Attributes:
        top1: published top-1 on the test split, in %.
        file: path of the weights file, relative to a base URL or inside an archive.
    """

    top1: float
    file: str


PUBLISHED = {  # by data set and network name
    # Tian et al. (2020). Their README gives the top-1. mdistiller and later papers use these files.
    "cifar100": {
        "resnet32x4": Published(79.42, "resnet32x4_vanilla/ckpt_epoch_240.pth"),
        "wrn_40_2": Published(75.61, "wrn_40_2_vanilla/ckpt_epoch_240.pth"),
        "vgg13": Published(74.64, "vgg13_vanilla/ckpt_epoch_240.pth"),
        "resnet50": Published(79.34, "ResNet50_vanilla/ckpt_epoch_240.pth"),
        "resnet56": Published(72.34, "resnet56_vanilla/ckpt_epoch_240.pth"),
        "resnet110": Published(74.31, "resnet110_vanilla/ckpt_epoch_240.pth"),
    },
    "imagenet": {  # torchvision's IMAGENET1K_V1 weights, which both papers use
        "resnet18": Published(69.76, "resnet18-f37072fd.pth"),
        "resnet34": Published(73.31, "resnet34-b627a593.pth"),
        "resnet50": Published(76.13, "resnet50-0676ba61.pth"),
    },
}


def path_of(home: str, dataset: str, network: str) -> Path:
    """Return the path of the weight file that `teacher=<network>` loads by default.

    A network that is trained to the end without a teacher is written to the same path.

    Args:
        home: the home folder, which holds data/, teachers/ and runs/.
        dataset: name of the data set.
        network: name of the network.

    Returns:
        <home>/teachers/<dataset>/<network>.pt, whether or not this file exists.
    """
    return Path(home, "teachers", dataset, f"{network}.pt")


def choice_of(network: str, dataset: str) -> str:
    """Return the choice of `teacher=` or `student=` whose network has this name on a data set.

    torchvision's networks for ImageNet have a prefix in conf/: resnet18 is imagenet_resnet18.
    """
    if dataset == "imagenet" and network in PUBLISHED["imagenet"]:
        return f"imagenet_{network}"
    return network


def missing(
    path: Path, network: str, dataset: str, *, home: str, key: str = "teacher", named: bool = False
) -> FileNotFoundError:
    """Return the error for a missing teacher file, whose message says how to get the file.

    Args:
        path: the missing file.
        network: name of the teacher's network.
        dataset: name of the data set.
        home: the home folder, which holds data/, teachers/ and runs/.
        key: configuration key of the teacher: "teacher", or "more_teachers.NAME" for a further one.
        named: whether the setting `checkpoint` below `key` names the file.

    Returns:
        The FileNotFoundError, for the caller to raise.
    """
    choice = choice_of(network, dataset)
    fetch = ""
    if network in PUBLISHED.get(dataset, ()):
        words = ["python", "-m", "sddlskd.teachers", "fetch", choice]
        fetch = f"`{shlex.join([*words, f'home={Path(home).absolute()}'])}`"
    student = f"student={choice}"
    library, _, name = network.partition("_")
    if library in ("timm", "torchvision"):
        student = f"student={library} student.model.name={name}"
    if named:
        cures = [f"set {key}.checkpoint=FILE to a file that exists", "leave it out"]
        if fetch:
            cures[1] = f"leave it out and fetch the published file with {fetch}"
    else:
        cures = [
            f"train it with distiller=vanilla {student} and the dataset.* and trainer.* words of "
            "this job",
            "set teacher.train_if_missing=true (it is then trained with dataset.batch_size and "
            "teacher.train_epochs)",
            f"set {key}.checkpoint=FILE to a checkpoint of sddlskd, RepDistiller or mdistiller",
        ]
        if fetch:
            cures.insert(0, f"fetch the published file with {fetch}")
        if dataset in UNNAMED:
            teachers = sorted(Path(home, "teachers").glob(f"*/{network}.pt"))
            cures[:0] = [
                f"add dataset.name={file.parent.name} for the file {file}" for file in teachers[:2]
            ]
    return FileNotFoundError(
        f"teacher={network} for {dataset} is missing: no file {path}; {', or '.join(cures)}"
    )


def publish(
    path: Path,
    weights: dict[str, Tensor],
    *,
    network: str,
    dataset: str,
    top1: float,
    data: Mapping[str, Any] | None = None,
    size: int | None = None,
) -> bool:
    """Write trained weights as a teacher file, unless the file exists already.

    Args:
        path: the teacher file, see `path_of`.
        weights: state dict of the network.
        network: name of the network.
        dataset: name of the data set.
        top1: top-1 accuracy of the network in percent.
        data: fingerprint of the training data (`datasets.fingerprint`); None if it is unknown.
        size: side in pixels of the squares of image files (`dataset.size`); None for other data.

    Returns:
        Whether the file was written; False if a teacher file existed already.

    Raises:
        OSError: If the file cannot be written.
    """
    if path.exists():
        return False
    content = {"model": weights, "network": network, "dataset": dataset, "top1": top1}
    if data:
        content["data"] = dict(data)
    if size:
        content["size"] = size
    try:
        write(path, content, replace=False)
    except FileExistsError:  # another run or a download wrote the file in the meantime
        return False
    return True


def install(
    file: Path, model: nn.Module, *, home: str, dataset: str, network: str, source: str
) -> None:
    """Check that a file holds a teacher's weights, move it to the teacher's path, and pin it.

    The path is the one that `teacher=<network>` loads (`path_of`). A pin is the sha256 that
    <home>/teachers/lock.json records for the teacher. The file must agree with an existing pin. If
    the teacher has no pin yet, the file's sha256 becomes the pin.

    Args:
        file: the file. It must be on the file system of the new path, whose folder must exist.
        model: a network of the teacher's architecture; it gets the weights.
        home: the home folder, which holds data/, teachers/ and runs/.
        dataset: name of the data set.
        network: name of the network.
        source: the file's origin (address or path), for error messages and the pin.

    Raises:
        ValueError: If the file cannot be used: it is larger than 512 MiB, is not readable, does not
            hold the weights of `model`, holds values that are not finite, or differs from the pin.
            Also if lock.json is damaged, or if a file has the teacher's path already.
        FileNotFoundError: If `file` is missing.
        OSError: If lock.json cannot be written or the file cannot be moved.
    """
    try:
        check_size(file)
        load_weights(model, file, network)
    except ValueError as error:
        raise ValueError(str(error).replace(str(file), source)) from error
    check_finite(model, source)
    key, sha256 = pin_key(dataset, network), file_hash(file)
    check_pin(home, key, sha256)
    target = path_of(home, dataset, network)
    try:
        put(file, target)
    except FileExistsError:
        raise ValueError(
            f"{target} was written meanwhile by a run that trained this teacher; "
            f"move it away to install the one from {source}"
        ) from None
    # After the move: a file that another process has put there must not get this pin.
    pin(home, key, sha256, source)


def check_size(path: Path) -> None:
    """Raise ValueError if a file, or the unpacked content of a zip file, exceeds 512 MiB.

    The limit is LARGEST_FILE. A damaged zip file passes, because reading the file reports the
    damage. Raise FileNotFoundError if the file is missing.
    """
    size = path.stat().st_size
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                size = max(size, sum(member.file_size for member in archive.infolist()))
        except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError):
            return  # the code that reads the file reports the error
    if size > LARGEST_FILE:
        raise ValueError(
            f"{path} has {size} bytes, and a teacher has at most {LARGEST_FILE}; "
            "save its state_dict alone"
        )


def file_hash(path: Path) -> str:
    """Return the sha256 of a file in hexadecimal.

    The hash is kept in memory until the file's modification time or size changes. Raise
    FileNotFoundError if the file is missing.
    """
    return _hash(path, path.stat().st_mtime_ns, path.stat().st_size)


@cache
def _hash(path: Path, mtime_ns: int, size: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def size_of(path: Path) -> int | None:
    """Return the side in pixels of the images that a teacher was trained on, if its file tells it.

    Files tell it for image files only. Raise FileNotFoundError if the file is missing.
    """
    size = _content(path, path.stat().st_mtime_ns, path.stat().st_size).get("size")
    return size if isinstance(size, int) else None


def data_of(path: Path) -> dict[str, Any] | None:
    """Return the fingerprint of the data that a teacher was trained on, if its file holds one.

    Return None if the file holds no fingerprint. This is the case for files of other programs or
    of older versions, for .safetensors files and for damaged files. The fingerprint is kept in
    memory until the file's modification time or size changes. Raise FileNotFoundError if the file
    is missing.
    """
    found = _content(path, path.stat().st_mtime_ns, path.stat().st_size).get("data")
    return found if isinstance(found, dict) and found.keys() >= set(KEYS) else None


@cache
def _content(path: Path, mtime_ns: int, size: int) -> dict[str, Any]:
    """Return the entries of a teacher file other than its weights; {} if it cannot be read."""
    try:
        content = read(path)
    # A .safetensors file, or a damaged file, which loading the weights reports.
    except UnreadableFile:
        return {}
    if not isinstance(content, dict):
        return {}
    return {key: content[key] for key in ("data", "size") if key in content}


def measured_top1(path: Path, dataset: str, measure: Callable[[], float]) -> float:
    """Return the top-1 accuracy of a teacher file on a data set, measured only once.

    The value is stored in <path>.top1.json, under the name of the data set and the hash of the
    teacher file. If the folder is read-only, the next call measures the value again.

    Args:
        path: the teacher file.
        dataset: text that identifies the data set: its name and, if known, the hash of its data.
        measure: function that measures the top-1 accuracy in percent; called if no value is stored.

    Returns:
        The top-1 accuracy in percent.

    Raises:
        FileNotFoundError: If the teacher file is missing.
        ValueError: If <path>.top1.json is damaged.
    """
    note, key = path.with_name(path.name + ".top1.json"), f"{dataset}:{file_hash(path)}"
    try:
        known: dict[str, float] = json.loads(note.read_bytes()) if note.exists() else {}
        if not isinstance(known, dict):
            raise ValueError("it is no JSON object")
    except ValueError as error:
        raise ValueError(f"{note} is damaged; delete it") from error
    if key not in known:
        known[key] = measure()
        try:
            with write_atomically(note) as file:
                file.write(json.dumps(known).encode())
        except OSError:  # the folder of teachers may be read-only
            log.info("cannot save the teacher's top-1 next to %s; the next run measures it", path)
    return known[key]


def lock_path(home: str) -> Path:
    """Return the path of the file that holds the pins of a home folder, <home>/teachers/lock.json.

    A pin is the sha256 that a downloaded or imported file had at first. The content of lock.json is
    {"pins": {key: {"sha256", "source", "first_seen"}}}. A key is <dataset>/<network> for a teacher,
    or the URL of an archive.
    """
    return Path(home, "teachers", "lock.json")


def pin_key(dataset: str, network: str) -> str:
    """Return the key under which lock.json records a teacher's sha256: <dataset>/<network>."""
    return f"{dataset}/{network}"


def pinned(home: str) -> dict[str, dict[str, str]]:
    """Return the pins of a home folder by key: {key: {"sha256", "source", "first_seen"}}.

    A pin is the sha256 that a downloaded or imported file had at first; lock.json in the home
    folder's teachers/ records it. A key is <dataset>/<network> for a teacher, or the URL of an
    archive. Return {} if there is no lock.json yet. Raise ValueError if lock.json is damaged.
    """
    path = lock_path(home)
    if not path.exists():
        return {}
    try:
        pins: Any = json.loads(path.read_bytes())["pins"]
        if not all(
            isinstance(pin["sha256"], str) and isinstance(pin["source"], str)
            for pin in pins.values()
        ):
            raise TypeError("a pin is not text")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}): put a copy back, "
            "or remove it to trust the files that are present"
        ) from error
    return dict(pins)


def check_pin(home: str, key: str, sha256: str) -> bool:
    """Return whether a key has a pin, after checking that the pin agrees with a file's hash.

    A pin is the sha256 that <home>/teachers/lock.json records for a key.

    Args:
        home: the home folder, which holds data/, teachers/ and runs/.
        key: key of the pin: <dataset>/<network>, or the URL of an archive.
        sha256: sha256 of the file in hexadecimal.

    Returns:
        True if the key is pinned to this sha256; False if the key has no pin.

    Raises:
        ValueError: If the key is pinned to another sha256, or if lock.json is damaged.
    """
    pin = pinned(home).get(key)
    if pin and pin["sha256"] != sha256:
        raise ValueError(
            f"{key} has changed: its sha256 is {sha256[:16]}..., but the pinned sha256 is "
            f"{pin['sha256'][:16]}... (from {pin['source']}). Put the pinned file back or, if the "
            f"change is intended, remove the entry {key} from {lock_path(home)}"
        )
    return pin is not None


def pin(home: str, key: str, sha256: str, source: str) -> None:
    """Record a file's sha256 under a key (pin the key), unless the same sha256 is recorded already.

    The pins are in <home>/teachers/lock.json.

    Args:
        home: the home folder, which holds data/, teachers/ and runs/.
        key: key of the pin: <dataset>/<network>, or the URL of an archive.
        sha256: sha256 of the file in hexadecimal.
        source: URL or path that the file came from.

    Raises:
        ValueError: If the key is pinned to another sha256, or if lock.json is damaged.
        OSError: If lock.json cannot be written.
    """
    path = lock_path(home)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if check_pin(home, key, sha256):
            return
        pins = pinned(home) | {
            key: {
                "sha256": sha256,
                "source": source,
                "first_seen": datetime.now(UTC).isoformat(timespec="seconds"),
            }
        }
        with write_atomically(path) as file:
            file.write(json.dumps({"pins": dict(sorted(pins.items()))}, indent=2).encode() + b"\n")
