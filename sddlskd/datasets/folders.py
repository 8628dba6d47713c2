"""Load data sets whose images stay files: CUB-200-2011, ImageNet and Tiny ImageNet.

Each loader reads the layout in which the data set is published. It returns `Splits` of `Files`,
whose images `sddlskd.data.streaming` reads. Text files are read line by line, and an error names
the file and the line that do not fit together. No image is opened here.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import torch

from sddlskd.datasets.arrays import EXTENSIONS, Files, Splits
from sddlskd.files.archive import unpack_folder
from sddlskd.files.download import download_into

__all__ = ["cub200", "imagenet", "tiny_imagenet"]


def image_folder(root: str, test: str | None = None, num_classes: int | None = None) -> Splits:
    """Return the images of any folder that holds class folders for a training and a test split.

    The training images are `root`/train/<class>/*. The test images are `root`/val/<class>/*, or
    `root`/test/<class>/*. Classes are numbered by their sorted names. Every file whose name has an
    image extension is taken. Its content is not checked before it is read.

    Args:
        root: folder that holds the folders of the splits.
        test: name of the folder of the test split; None to take the one of val and test that
            exists.
        num_classes: expected number of classes; None to accept any number.

    Returns:
        Splits of `Files`.

    Raises:
        ValueError: if a folder is missing or empty, both val and test exist and `test` is not
            given, the splits have different classes, or their number is not `num_classes`. The
            message is one line.
    """
    top = Path(root).expanduser().absolute()
    held_out = [test] if test else [name for name in ("val", "test") if (top / name).is_dir()]
    if len(held_out) > 1:
        raise ValueError(
            f"{top} has both val and test; say which one to test on: +dataset.load.test=val"
        )
    train_classes, train = _class_folders(top / "train")
    test_classes, tested = _class_folders(top / (held_out or ["val"])[0])
    if differing := sorted(set(train_classes) ^ set(test_classes)):
        shown = ", ".join(differing[:5]) + (", ..." if len(differing) > 5 else "")
        raise ValueError(
            f"{top}: {len(differing)} classes are in one split only ({shown}); "
            "both need the same folders"
        )
    if num_classes is not None and len(train_classes) != num_classes:
        found = f"{top / 'train'} holds {len(train_classes)} classes"
        raise ValueError(
            f"{found}, not {num_classes}; set dataset.num_classes={len(train_classes)}"
        )
    return Splits(train, tested)


def _class_folders(folder: Path) -> tuple[list[str], Files]:
    """Return the sorted class names of a folder of class folders, and all their image files.

    The files are in the order of (class, name). Raise ValueError if `folder` is missing or holds no
    class folder, or if a class folder holds no images.
    """
    if not folder.is_dir():
        raise ValueError(
            f"there is no folder {folder}; it should hold a folder of images for each class"
        )
    classes = sorted(
        entry.name
        for entry in os.scandir(folder)
        if entry.is_dir() and not entry.name.startswith(".")
    )
    if not classes:
        raise ValueError(
            f"{folder} holds no folders; it should hold a folder of images for each class"
        )
    paths, labels = [], []
    for label, name in enumerate(classes):
        files = image_files(folder / name)
        paths += files
        labels += [label] * len(files)
    return classes, Files(paths, torch.tensor(labels))


def image_files(folder: Path) -> list[str]:
    """Return the sorted paths of the files in `folder` that have an image extension.

    Raise ValueError if there is none.
    """
    found = sorted(
        entry.path
        for entry in os.scandir(folder)
        # Names such as ._x.jpg belong to files that macOS leaves behind.
        if entry.name.lower().endswith(EXTENSIONS) and not entry.name.startswith(".")
    )
    if not found:
        raise ValueError(
            f"{folder} holds no images ({' '.join(EXTENSIONS)}); remove the folder, or fill it"
        )
    return found


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
# Largest size of a text file in bytes; the largest one read from CUB-200-2011 has 1 MB.
LARGEST_TEXT = 1 << 24


def cub200(root: str) -> Splits:
    """Return CUB-200-2011 (Wah et al. 2011): 5,994 / 5,794 images of 200 bird classes.

    Read the official folder `root`/CUB_200_2011 (images.txt, image_class_labels.txt,
    train_test_split.txt, images/). If the folder is missing, unpack it from
    `root`/CUB_200_2011.tgz, which is downloaded on first use. Images are in the order of
    images.txt.

    Raises:
        DownloadError: if the archive is missing and cannot be downloaded.
        ValueError: if the text files do not fit together; the message names the file and the line.
    """
    folder = Path(root).expanduser().absolute() / "CUB_200_2011"
    if not folder.is_dir():
        archive = download_into(CUB200_URL, CUB200_MD5, folder.parent, limit=LARGEST_ARCHIVE)
        unpack_folder(
            archive,
            folder,
            limit=LARGEST_UNPACKED,
            wanted=lambda p: (
                p.parts[1:2] == ("images",) or (len(p.parts) == 2 and p.name in CUB200_TEXTS)
            ),
        )
    tables = [_cub_table(folder / name) for name in CUB200_TEXTS[:3]]
    names, labels, in_train = tables
    for table, name in zip(tables, CUB200_TEXTS[:3], strict=True):
        if odd := names.keys() ^ table.keys():
            image = min(odd)
            line = (names | table)[image][1]
            raise ValueError(
                f"{folder / name} {'lacks' if image in names else 'has'} image {image}, "
                "which images.txt "
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
                f"{folder / CUB200_TEXTS[1]}:{line}: "
                f"class {label[:40]!a} is not in 1..{CUB200_CLASSES}; {_AGAIN}"
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
    """Return ImageNet (ILSVRC 2012): 1,281,167 / 50,000 images of 1,000 classes.

    Citation: Russakovsky et al. 2015. Read `root`/train/<synset>/* and `root`/val/<synset>/*.
    Classes are numbered by their sorted synsets, as published weights expect. The data set cannot
    be downloaded here: its licence requires an account.

    Raises:
        ValueError: if a folder is missing or has another layout, or if the number of classes is not
            `num_classes`. The message is one line.
    """
    top = Path(root).expanduser().absolute()
    if (top / "val").is_dir() and not any(path.is_dir() for path in (top / "val").iterdir()):
        raise ValueError(
            f"{top / 'val'} holds no folders: move its images into a folder for each synset, "
            "as train/ has them "
            "(the devkit's ILSVRC2012_validation_ground_truth.txt says which)"
        )
    splits = image_folder(root, "val")
    if (found := int(splits.train[1].max()) + 1) != num_classes:
        raise ValueError(
            f"{top / 'train'} holds {found} classes, and ImageNet has {num_classes}; "
            f"for another data set use dataset=image_folder dataset.num_classes={found}"
        )
    return splits


def tiny_imagenet(root: str) -> Splits:
    """Return Tiny ImageNet (CS231n): 100,000 / 10,000 images 64x64 of 200 classes.

    The test split is the published val split, because the published test images have no labels.
    Read `root`/tiny-imagenet-200 (wnids.txt, train/<wnid>/images/*, val/val_annotations.txt,
    val/images/*). If the folder is missing, unpack it from `root`/tiny-imagenet-200.zip, which is
    downloaded on first use. Classes are numbered by their sorted wnids.

    Raises:
        DownloadError: if the archive is missing and cannot be downloaded.
        ValueError: if the files do not fit together; the message names the file and the line.
    """
    folder = Path(root).expanduser().absolute() / "tiny-imagenet-200"
    if not folder.is_dir():
        archive = download_into(
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
                f"{wnids}:{line}: {name[:40]!a} is not a folder name, or is listed twice; {_AGAIN}"
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
    """Return the split that val_annotations.txt lists.

    Each line holds an image name, its wnid and a box, separated by tabs.
    """
    annotations, there, lines = folder / "val_annotations.txt", _Present(folder), dict[str, int]()
    for line, text in _lines(annotations):
        name, _, rest = text.partition("\t")
        wnid = rest.partition("\t")[0].strip()
        if wnid not in classes:
            raise ValueError(
                f"{annotations}:{line}: {wnid[:40]!a} is not a class of wnids.txt; {_AGAIN}"
            )
        if name in lines or not there(f"images/{name}"):
            raise ValueError(
                f"{annotations}:{line}: {name[:100]!a} is listed twice, "
                f"or is not an image in {folder / 'images'}; {_AGAIN}"
            )
        lines[name] = classes[wnid]
    return Files(
        [str(folder / "images" / name) for name in lines], torch.tensor(list(lines.values()))
    )


_AGAIN = "remove the folder to have it unpacked again, or download it again"


class _Present:
    """A function that returns whether <folder>/<name> is a file below `top`.

    It lists each folder only once.
    """

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
    """Return whether `name` is the name of a file or folder that cannot lead to another folder."""
    return (
        0 < len(name.encode(errors="replace")) < 256
        and name not in (".", "..")
        and not set(name) & set("/\\\0")
    )


def _number(text: str) -> int:
    """Return the positive number that `text` gives in plain digits, or 0 for any other text."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0


def _cub_table(path: Path) -> dict[int, tuple[str, int]]:
    """Return {image id: (rest of the line, line number)} for a text file of CUB-200-2011.

    Raise ValueError, naming the line, if a line has no valid image id or no value, or if an id
    occurs twice.
    """
    table: dict[int, tuple[str, int]] = {}
    for line, text in _lines(path):
        first, _, rest = text.partition(" ")
        image = _number(first)
        if not image or not rest.strip():
            raise ValueError(
                f"{path}:{line}: expected an image's number and a value, "
                f"found {text[:60]!a}; {_AGAIN}"
            )
        if image in table:
            raise ValueError(
                f"{path}:{line}: image {image} is in line {table[image][1]} already; {_AGAIN}"
            )
        table[image] = (rest.strip(), line)
    return table


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number, text) for each line of a text file that is not blank, counted from 1.

    Raise ValueError, naming the file and the line, if the file is missing, empty, too large, or not
    UTF-8.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}; {_AGAIN}")
    if (size := path.stat().st_size) > LARGEST_TEXT:
        raise ValueError(
            f"{path} has {size} bytes, more than the limit of {LARGEST_TEXT}; {_AGAIN}"
        )
    blank = True
    for number, content in enumerate(path.read_bytes().split(b"\n"), 1):
        try:
            text = content.decode().rstrip("\r")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}:{number}: {content[:40]!r} is not text in UTF-8; {_AGAIN}"
            ) from error
        if text.strip():
            blank = False
            yield number, text
    if blank:
        raise ValueError(f"{path} is empty; {_AGAIN}")
