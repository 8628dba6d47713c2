"""Data sets whose images stay files: CUB-200-2011, ImageNet and Tiny ImageNet, in the layouts they are published in.

Each loader gives `Splits` of `Files`, whose images `sddlskd.streaming` reads. Text files are read line by line, and
what does not fit together is named with its file and line. Nothing of an image is looked at here.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import torch

from sddlskd.archive import unpack_folder
from sddlskd.datasets import Files, Splits, image_files, image_folder
from sddlskd.download import fetch_into

__all__ = ["cub200", "imagenet", "tiny_imagenet"]

CUB200_URL = "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz"
CUB200_MD5 = "97eceeb196236b17998738112f37df78"
CUB200_TEXTS = (
    "images.txt",
    "image_class_labels.txt",
    "train_test_split.txt",
    "classes.txt",
    "README",
)
CUB200_CLASSES = 200
TINY_IMAGENET_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
TINY_IMAGENET_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
LARGEST_ARCHIVE = 2 << 30  # bytes; CUB-200-2011 has 1.2 GB
LARGEST_UNPACKED = 4 << 30  # bytes
LARGEST_TEXT = 1 << 24  # bytes; CUB-200-2011's largest of those that are read has 1 MB


def cub200(root: str) -> Splits:
    """CUB-200-2011 (Wah et al. 2011): 5,994 / 5,794 images of 200 birds.

    Read from the official folder `root`/CUB_200_2011 (images.txt, image_class_labels.txt, train_test_split.txt,
    images/), which comes out of `root`/CUB_200_2011.tgz, fetched on first use. Images are in the order of images.txt.
    Raises DownloadError where it cannot be had, ValueError naming file and line where the texts do not fit together.
    """
    folder = Path(root).expanduser().absolute() / "CUB_200_2011"
    if not folder.is_dir():
        archive = fetch_into(CUB200_URL, CUB200_MD5, folder.parent, limit=LARGEST_ARCHIVE)
        unpack_folder(
            archive, folder, limit=LARGEST_UNPACKED,
            wanted=lambda p: p.parts[1:2] == ("images",) or (len(p.parts) == 2 and p.name in CUB200_TEXTS),
        )  # fmt: skip
    tables = [_cub_table(folder / name) for name in CUB200_TEXTS[:3]]
    names, labels, in_train = tables
    for table, name in zip(tables, CUB200_TEXTS[:3], strict=True):
        if odd := names.keys() ^ table.keys():
            image = min(odd)
            line = (names | table)[image][1]
            raise ValueError(
                f"{folder / name} {'lacks' if image in names else 'has'} image {image}, which images.txt "
                f"{f'has in line {line}' if image in names else f'lacks (line {line})'}; {_AGAIN}"
            )
    there = _Present(folder / "images")
    splits: dict[str, tuple[list[str], list[int]]] = {"1": ([], []), "0": ([], [])}
    for image, (name, line) in names.items():
        where = f"{folder / CUB200_TEXTS[0]}:{line}"
        if not there(name):
            raise ValueError(
                f"{where}: there is no image {name[:100]!a} in {folder / 'images'}; {_AGAIN}"
            )
        label, line = labels[image]
        if not (number := _number(label)) or number > CUB200_CLASSES:
            raise ValueError(
                f"{folder / CUB200_TEXTS[1]}:{line}: class {label[:40]!a} is none of 1..{CUB200_CLASSES}; {_AGAIN}"
            )
        flag, line = in_train[image]
        if flag not in splits:
            raise ValueError(
                f"{folder / CUB200_TEXTS[2]}:{line}: {flag[:40]!a} is neither 0 nor 1; {_AGAIN}"
            )
        paths, classes = splits[flag]
        paths.append(str(folder / "images" / name))
        classes.append(number - 1)
    for flag, what in (("1", "training"), ("0", "test")):
        if not splits[flag][0]:
            raise ValueError(f"{folder / CUB200_TEXTS[2]}: no image is a {what} image; {_AGAIN}")
    return Splits(*(Files(paths, torch.tensor(classes)) for paths, classes in splits.values()))


def imagenet(root: str, num_classes: int = 1000) -> Splits:
    """ImageNet (ILSVRC 2012; Russakovsky et al. 2015): 1,281,167 / 50,000 images of 1,000 classes.

    Read from `root`/train/<synset>/* and `root`/val/<synset>/*; classes are numbered by their sorted synsets, as
    published weights have them. It cannot be fetched: its licence asks for an account. Raises ValueError, in one line,
    for a folder that is missing or laid out in another way, and for other classes than `num_classes`.
    """
    top = Path(root).expanduser().absolute()
    if (top / "val").is_dir() and not any(path.is_dir() for path in (top / "val").iterdir()):
        raise ValueError(
            f"{top / 'val'} holds no folders: move its images into a folder for each synset, as train/ has them "
            "(the devkit's ILSVRC2012_validation_ground_truth.txt says which)"
        )
    splits = image_folder(root, "val")
    if (found := int(splits.train[1].max()) + 1) != num_classes:
        raise ValueError(
            f"{top / 'train'} holds {found} classes, and ImageNet has {num_classes}; for others take "
            f"dataset=image_folder dataset.num_classes={found}"
        )
    return splits


def tiny_imagenet(root: str) -> Splits:
    """Tiny ImageNet (CS231n): 100,000 / 10,000 images 64x64 of 200 classes; its test images have no labels, so that the
    test split is its val.

    Read from `root`/tiny-imagenet-200 (wnids.txt, train/<wnid>/images/*, val/val_annotations.txt, val/images/*), which
    comes out of `root`/tiny-imagenet-200.zip, fetched on first use. Classes are numbered by their sorted wnids. Raises
    DownloadError where it cannot be had, ValueError naming file and line where something does not fit.
    """
    folder = Path(root).expanduser().absolute() / "tiny-imagenet-200"
    if not folder.is_dir():
        archive = fetch_into(
            TINY_IMAGENET_URL, TINY_IMAGENET_MD5, folder.parent, limit=LARGEST_ARCHIVE
        )
        unpack_folder(
            archive,
            folder,
            limit=LARGEST_UNPACKED,
            count=200_000,
            wanted=lambda p: "test" not in p.parts,
        )
    wnids = folder / "wnids.txt"
    classes: dict[str, int] = {}
    for name, line in sorted((text.strip(), line) for line, text in _lines(wnids)):
        if not _plain(name) or name in classes:
            raise ValueError(
                f"{wnids}:{line}: {name[:40]!a} is no folder's name, or there twice; {_AGAIN}"
            )
        classes[name] = len(classes)
    paths: list[str] = []
    labels: list[int] = []
    for name, label in classes.items():
        images = folder / "train" / name / "images"
        if not images.is_dir():
            raise ValueError(
                f"{wnids} names {name[:40]!a}, and there is no folder {images}; {_AGAIN}"
            )
        files = image_files(images)
        paths += files
        labels += [label] * len(files)
    return Splits(Files(paths, torch.tensor(labels)), _tiny_imagenet_val(folder / "val", classes))


def _tiny_imagenet_val(folder: Path, classes: dict[str, int]) -> Files:
    """Each line: the image, its wnid and a box, separated by tabs."""
    annotations, there, lines = folder / "val_annotations.txt", _Present(folder), dict[str, int]()
    for line, text in _lines(annotations):
        name, _, rest = text.partition("\t")
        wnid = rest.partition("\t")[0].strip()
        if wnid not in classes:
            raise ValueError(
                f"{annotations}:{line}: {wnid[:40]!a} is none of the classes in wnids.txt; {_AGAIN}"
            )
        if name in lines or not there(f"images/{name}"):
            raise ValueError(
                f"{annotations}:{line}: {name[:100]!a} is there twice, or no image in {folder / 'images'}; {_AGAIN}"
            )
        lines[name] = classes[wnid]
    return Files(
        [str(folder / "images" / name) for name in lines], torch.tensor(list(lines.values()))
    )


_AGAIN = "remove the folder to have it unpacked again, or get it again"


class _Present:
    """Whether a folder/name is a file below `top`; each folder is read once."""

    def __init__(self, top: Path) -> None:
        self.top, self.seen = top, dict[str, set[str]]()

    def __call__(self, path: str) -> bool:
        folder, _, name = path.rpartition("/")
        if not _plain(folder) or not _plain(name):
            return False
        if folder not in self.seen:
            place = self.top / folder
            self.seen[folder] = (
                {e.name for e in os.scandir(place) if e.is_file()} if place.is_dir() else set()
            )
        return name in self.seen[folder]


def _plain(name: str) -> bool:
    """Whether it is the name of a file or folder, and leads nowhere else."""
    return (
        0 < len(name.encode(errors="replace")) < 256
        and name not in (".", "..")
        and not set(name) & set("/\\\0")
    )


def _number(text: str) -> int:
    """A positive number in plain digits; 0 for anything else."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0


def _cub_table(path: Path) -> dict[int, tuple[str, int]]:
    """{image id: (what stands after it, line)}. Raises ValueError naming the line."""
    table: dict[int, tuple[str, int]] = {}
    for line, text in _lines(path):
        first, _, rest = text.partition(" ")
        image = _number(first)
        if not image or not rest.strip():
            raise ValueError(
                f"{path}:{line}: expected an image's number and a value, found {text[:60]!a}; {_AGAIN}"
            )
        if image in table:
            raise ValueError(
                f"{path}:{line}: image {image} is in line {table[image][1]} already; {_AGAIN}"
            )
        table[image] = (rest.strip(), line)
    return table


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text file that are not blank, counted from 1. Raises ValueError naming file and line."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}; {_AGAIN}")
    if (size := path.stat().st_size) > LARGEST_TEXT:
        raise ValueError(
            f"{path} has {size} bytes, more than the {LARGEST_TEXT} that are read; {_AGAIN}"
        )
    blank = True
    for number, content in enumerate(path.read_bytes().split(b"\n"), 1):
        try:
            text = content.decode().rstrip("\r")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}:{number}: {content[:40]!r} is no text in UTF-8; {_AGAIN}"
            ) from error
        if text.strip():
            blank = False
            yield number, text
    if blank:
        raise ValueError(f"{path} is empty; {_AGAIN}")
