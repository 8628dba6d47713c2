"""Tell whether two runs saw the same data: a fingerprint of a data set, and how two differ."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from sddlskd.datasets.arrays import Files, Images, Splits
from sddlskd.terminal.words import counted

__all__ = ["KEYS", "difference", "differing_classes", "fingerprint"]

KEYS = ("train", "test", "classes", "class_names", "sha256")  # of a fingerprint
# Of larger data sets, every n-th file is looked at, so that a start takes seconds on a slow disk.
MOST_SIZES = 100_000  # files whose size is read
MOST_CONTENTS = 1_000  # files of which the first bytes are read
FIRST_BYTES = 1 << 14
LONGEST_LIST = 5  # class names in a message


def fingerprint(splits: Splits) -> dict[str, Any]:
    """Return the sizes, class names and a hash of a data set, to recognise the same data later.

    The result does not depend on the folder in which the data set lies. If an image file cannot be
    read, no error is raised, but the hash can be another one.

    Returns:
        A dictionary that can be written as JSON, with the keys

        - train, test: number of images of the split;
        - classes: largest label of both splits + 1 or, for images with several labels, the number
          K of columns of the labels (N, K); 0 without images;
        - class_names: names of the class folders of the training images, in the order of the
          labels; None for `Images`, for images with several labels, and for `Files` that do not lie
          in one folder per class;
        - sha256: hash in hex. For `Images`, of the labels and all pixels. For `Files`, of the
          labels, of the paths relative to the folder that all files of a split share, of the sizes
          of at most 100,000 files of a split (MOST_SIZES), and of the first 16 KiB of at most 1,000
          files of a split (MOST_CONTENTS).
    """
    counts = {name: len(split.labels_N) for name, split in splits._asdict().items()}
    names = None
    if isinstance(splits.train, Files) and splits.train.labels_N.ndim == 1:
        names = _class_names(splits.train)
    labels = [split.labels_N for split in splits if len(split.labels_N)]
    return {
        **counts,
        "classes": max(map(_classes, labels), default=0),
        "class_names": names,
        "sha256": _hash(splits),
    }


def difference(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return in words how the data of two fingerprints differ; "" if their hashes are equal.

    `earlier` and `now` are results of `fingerprint`. An example is "100 classes then, 10 now; 50000
    training images then, 45000 now".
    """
    if earlier["sha256"] == now["sha256"]:
        return ""
    parts = [differing_classes(earlier, now)]
    for split, what in (("train", "training"), ("test", "test")):
        if earlier[split] != now[split]:
            parts.append(f"{counted(earlier[split], f'{what} image')} then, {now[split]} now")
    return "; ".join(filter(None, parts)) or "other images, as many as then, of the same classes"


def differing_classes(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return in words how the classes of two fingerprints differ; "" if they do not.

    `earlier` and `now` are results of `fingerprint`. If both have class names, the names and their
    order are compared first. The numbers of classes are compared if the names do not differ or a
    fingerprint has none. An example is "100 classes then, 10 now".
    """
    names = earlier["class_names"], now["class_names"]
    if None not in names and names[0] != names[1]:
        if sorted(names[0]) == sorted(names[1]):
            return "the same classes in another order"
        gone, new = ([x for x in a if x not in b] for a, b in (names, names[::-1]))
        if not gone:
            return f"only now: {_listed(new)}"
        if not new:
            return f"only then: {_listed(gone)}"
        return f"classes {_listed(gone)} then, {_listed(new)} now"
    if earlier["classes"] != now["classes"]:
        return f"{counted(earlier['classes'], 'class', 'classes')} then, {now['classes']} now"
    return ""


def _classes(labels: torch.Tensor) -> int:
    return int(labels.max()) + 1 if labels.ndim == 1 else labels.shape[1]


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(name[:40].encode("unicode_escape").decode() for name in names[:LONGEST_LIST])
    if len(names) > LONGEST_LIST:
        shown += f" and {len(names) - LONGEST_LIST} more"
    return shown


def _class_names(files: Files) -> list[str] | None:
    """Return the name of each class, from the folders of its files.

    The result is None if there are no files, or if the files of a class do not lie in one folder.
    """
    if not files.paths:
        return None
    top = os.path.commonpath(files.paths)
    names: dict[int, str] = {}
    for path, label in zip(files.paths, files.labels_N.tolist(), strict=True):
        folder, found, _ = path[len(top) :].lstrip(os.sep).partition(os.sep)
        if not found or names.setdefault(label, folder) != folder:
            return None
    return [name for _, name in sorted(names.items())]


def _hash(splits: Splits) -> str:
    digest = hashlib.sha256()
    for split in splits:
        digest.update(f"{len(split.labels_N)};".encode())
        digest.update(split.labels_N.to(torch.int64).contiguous().numpy().data)
        if isinstance(split, Images):
            digest.update(f"{tuple(split.images_NHWC.shape)};".encode())
            digest.update(split.images_NHWC.contiguous().numpy().data)
        else:
            _update(digest, split.paths)
    return digest.hexdigest()


def _update(digest: "hashlib._Hash", paths: Sequence[str]) -> None:
    """Update a hash with the names, sizes and beginnings of a split's files."""
    if not paths:
        return
    start = len(os.path.commonpath(paths))
    for path in paths:
        digest.update(os.fsencode(path[start:]) + b"\0")
    for path in _every_nth(paths, MOST_SIZES):
        digest.update(f"{_size(path)};".encode())
    for path in _every_nth(paths, MOST_CONTENTS):
        digest.update(hashlib.sha256(_beginning(path)).digest())


def _every_nth(paths: Sequence[str], most: int) -> Sequence[str]:
    """Return at most `most` of the paths, evenly spaced."""
    return paths[:: -(-len(paths) // most)]


def _size(path: str) -> int:
    """Return the size of a file in bytes, or -1 if it cannot be read."""
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def _beginning(path: str) -> bytes:
    """Return the first bytes of a file, or b"" if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(FIRST_BYTES)
    except OSError:
        return b""
