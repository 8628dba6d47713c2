"""Load data sets whose images stay files: your own in two layouts, and three published ones.

Each loader returns `Splits` of `Files`, whose images `sddlskd.data.streaming` reads. The loaders of
CUB-200-2011, ImageNet and Tiny ImageNet read the layout in which the data set is published. Text
files are read line by line, and an error names the file and the line that do not fit together. No
image is opened here.
"""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from sddlskd.datasets.arrays import EXTENSIONS, Files, Splits
from sddlskd.datasets.places import check_named_root, check_root, fetch
from sddlskd.files.archive import unpack_folder
from sddlskd.terminal.words import counted

__all__ = ["cub200", "imagenet", "tiny_imagenet"]


def image_folder(root: str, test: str | None = None, num_classes: int | None = None) -> Splits:
    """Return the images of a data set that has a folder of images for each class of each split.

    The training images are `root`/train/<class>/*. The test images are `root`/val/<class>/* or
    `root`/test/<class>/*. Classes are numbered from 0 by their sorted names. As in torchvision's
    ImageFolder, every file with an image extension is taken, in the class folder or in any folder
    below it. Unlike there, two things are left out: files whose names begin with "._", and class
    folders without images whose names begin with ".". No image is opened.

    Args:
        root: folder that holds the folders of the splits.
        test: name of the folder of the test split; None for val or test, whichever exists.
        num_classes: expected number of classes; None to accept any number.

    Returns:
        Splits of `Files`.

    Raises:
        ValueError: If the folders cannot be used: one is missing, a class folder has no images, val
            and test exist and `test` is None, the splits have different classes, their number is
            not `num_classes`, or a link leads to a folder that holds the link. If a folder above or
            below `root` has the right layout instead, the message names that folder.
    """
    top = Path(root).expanduser().absolute()
    names = [test] if test else ["val", "test"]
    check_root(
        top,
        lambda folder: (
            os.path.isdir(folder / "train") and any(os.path.isdir(folder / name) for name in names)
        ),
        f"the folders train and {' or '.join(names)}",
    )
    present = [name for name in names if (top / name).is_dir()]
    if (top / "train").is_dir() and not present:
        raise ValueError(
            f"dataset.root={top} has no folder {' or '.join(names)}; images to test on are always "
            "needed, also with dataset.val_fraction: move some of each class from train/<class> "
            f"to {names[0]}/<class> (docs/data.md has a few lines that do so)"
        )
    if len(present) > 1:
        raise ValueError(
            f"dataset.root={top} has both val and test; say which one to test on: "
            "+dataset.load.test=val"
        )
    with _of_split(top, "train"):
        train_classes, train = _class_folders(top / "train")
    tested_on = present[0]  # if there is none, an error was raised above
    named = f"{test}, which dataset.load.test names," if test else tested_on
    with _of_split(top, named):
        test_classes, tested = _class_folders(top / tested_on)
    lacking = [
        _only_in(name, other, sorted(set(ours) - set(others)))
        for name, ours, other, others in (
            ("train", train_classes, tested_on, test_classes),
            (tested_on, test_classes, "train", train_classes),
        )
        if set(ours) - set(others)
    ]
    if lacking:
        raise ValueError(
            f"dataset.root={top}: {', and '.join(lacking)}; both need a folder for each class"
        )
    if num_classes is not None and len(train_classes) != num_classes:
        found = f"{top / 'train'} holds {counted(len(train_classes), 'class', 'classes')}"
        raise ValueError(
            f"{found}, not {num_classes}; set dataset.num_classes={len(train_classes)}"
        )
    return Splits(train, tested)


def label_sets(root: str, num_classes: int | None = None) -> Splits:
    """Return the images of a data set with several labels per image, which text files list.

    The training images are those of `root`/train/labels.csv, and the test images those of
    `root`/val/labels.csv. A line of such a file is "a.jpg,cat;dog": the path of an image below the
    folder of the file, a comma, and the names of its classes, which are separated by ";". An image
    may have no class. Classes are numbered from 0 by their sorted names in both files. A first line
    "file,labels" and blank lines are skipped. No image is opened.

    Args:
        root: folder that holds the folders train and val.
        num_classes: expected number of classes; None to accept any number.

    Returns:
        Splits of `Files` with labels (N, K) of zeros and ones.

    Raises:
        ValueError: If a file cannot be used: it is missing or empty, a line has no comma, an image
            is missing or listed twice, or the number of classes is not `num_classes`. The message
            names the file or folder and, for a fault of a line, the line.
    """
    top = Path(root).expanduser().absolute()
    listed = []
    for split in ("train", "val"):
        with _of_split(top, split):
            listed.append(_listed_images(top / split))
    names = sorted({name for images in listed for labels in images.values() for name in labels})
    if num_classes is not None and len(names) != num_classes:
        raise ValueError(
            f"dataset.root={top}: the two labels.csv name "
            f"{counted(len(names), 'class', 'classes')}, not {num_classes}; "
            f"set dataset.num_classes={len(names)}"
        )
    place = {name: label for label, name in enumerate(names)}
    splits = []
    for images in listed:
        labels_NK = torch.zeros(len(images), len(names), dtype=torch.int64)
        for row, labels in enumerate(images.values()):
            labels_NK[row, [place[name] for name in labels]] = 1
        splits.append(Files(list(images), labels_NK))
    return Splits(*splits)


@contextmanager
def _of_split(root: Path, split: str) -> Iterator[None]:
    """Add the split and `dataset.root` to the message of a ValueError in the body of `with`."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{error} (split {split} of dataset.root={root})") from None


def _only_in(split: str, other: str, classes: Sequence[str]) -> str:
    """Return the text "class a is in train, but not in val" for the classes of one split alone."""
    if len(classes) == 1:
        return f"class {classes[0]} is in {split}, but not in {other}"
    return f"{len(classes)} classes are in {split}, but not in {other} ({_first_of(classes)})"


def _first_of(names: Sequence[str]) -> str:
    """Return the first five names, separated by commas, with "..." if there are more."""
    more = ", ..." if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def _listed_images(folder: Path) -> dict[str, list[str]]:
    """Return the names of the classes of each image that labels.csv in a folder lists, by path."""
    listing = folder / "labels.csv"
    if not listing.is_file():
        raise ValueError(
            f"there is no file {listing}; it should list the images as a.jpg,class1;class2"
        )
    images: dict[str, list[str]] = {}
    # Spreadsheet programs begin a file in UTF-8 with a byte order mark, which -sig skips.
    content = listing.read_text(encoding="utf-8-sig", errors="replace")
    for line, text in enumerate(content.splitlines(), 1):
        if not text.strip() or (line == 1 and text.strip() == "file,labels"):
            continue
        name, comma, labels = text.rpartition(",")
        path = str(folder / name)
        if not comma or path in images or not os.path.isfile(path):
            raise ValueError(
                f"{listing}:{line}: {text[:60]!a} is not an image below {folder}, a comma and the "
                "image's classes, or lists an image twice"
            )
        images[path] = [label.strip() for label in labels.split(";") if label.strip()]
    if not images:
        raise ValueError(f"{listing} lists no image; give lines such as a.jpg,class1;class2")
    return images


def _class_folders(folder: Path) -> tuple[list[str], Files]:
    """Return the sorted class names of a folder of class folders, and all their image files.

    The files are in the order of `_images_below`, class by class. Class folders without images are
    left out if their names begin with ".". Raise ValueError if `folder` is missing or holds no
    class folder, or if another class folder holds no images.
    """
    if not folder.is_dir():
        raise ValueError(
            f"there is no folder {folder}; it should hold a folder of images for each class"
        )
    classes: list[str] = []
    paths: list[str] = []
    labels: list[int] = []
    for name in sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()):
        files = _images_below(folder / name)
        if not files:
            if name.startswith("."):  # such as .cache, which a program left behind
                continue
            raise _no_images(folder / name)
        labels += [len(classes)] * len(files)
        paths += files
        classes.append(name)
    if not classes:
        raise ValueError(
            f"{folder} holds no folders; it should hold a folder of images for each class"
        )
    return classes, Files(paths, torch.tensor(labels))


def image_files(folder: Path) -> list[str]:
    """Return the paths of the image files in a folder and in all folders below it.

    The paths begin with `folder`. They are sorted by folder, and within a folder by name. Files
    whose names begin with "._" are not returned. Apart from that, torchvision's ImageFolder takes
    the same files in the same order if `folder` is one of its class folders.

    Raises:
        ValueError: If there is no image file, or if a link leads to a folder that holds the link.
    """
    found = _images_below(folder)
    if not found:
        raise _no_images(folder)
    return found


def left_out(files: Files) -> Counter[str]:
    """Return how many files beside images are no images of a data set, by their endings.

    Args:
        files: images of a split that lie in class folders, of two or more classes.

    Returns:
        The number of files by ending, in lower case. The files are those in the folder that all
        images share, and below it. Files whose names begin with "." do not count.
    """
    return Counter(
        Path(name).suffix.lower() or "no ending"
        for _, names in _walk(Path(os.path.commonpath(files.paths)))
        for name in names
        if not name.lower().endswith(EXTENSIONS) and not name.startswith(".")
    )


def _images_below(folder: Path) -> list[str]:
    """Return the paths of the image files in `folder` and in all folders below it.

    The files and their order are those of torchvision's ImageFolder, which sorts the folders by
    their paths and the files of a folder by their names. The one difference: names such as ._x.jpg
    are left out. They belong to files without pixels that macOS leaves behind.
    """
    return [
        os.path.join(place, name)
        for place, names in _walk(folder)
        for name in names
        if name.lower().endswith(EXTENSIONS) and not name.startswith("._")
    ]


def _walk(folder: Path) -> list[tuple[str, list[str]]]:
    """Return (folder, sorted names of its files) for a folder and all below it, sorted by path.

    Links to folders are followed. Raise ValueError for a link to a folder that holds the link.
    """
    found = []
    for place, folders, names in os.walk(folder, followlinks=True):
        for path in (Path(place, name) for name in folders):
            if path.is_symlink() and path.resolve() in [p.resolve() for p in path.parents]:
                raise ValueError(f"{path} is a link to a folder that holds it; remove the link")
        found.append((place, sorted(names)))
    return sorted(found)


def _no_images(folder: Path) -> ValueError:
    """Return the error for a folder without images; it names a file of another type, if any."""
    others = [
        os.path.join(place, name)
        for place, names in _walk(folder)
        for name in names
        if not name.startswith(".")
    ]
    cure = "remove the folder, or fill it"
    if others:
        cure = (
            f"it holds {os.path.relpath(others[0], folder)[:100]!a} (files of other types: "
            f"{len(others)}); convert images to one of these types, or move the folder elsewhere"
        )
    return ValueError(f"{folder} holds no images ({' '.join(EXTENSIONS)}); {cure}")


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
    """Return CUB-200-2011 (Wah et al. 2011): 5,994 training, 5,794 test images, 200 classes.

    The classes are species of birds. The splits are `Files`, in the order of images.txt. The
    official folder `root`/CUB_200_2011 is read (images.txt, image_class_labels.txt,
    train_test_split.txt, images/). If the folder is missing, it is unpacked from
    `root`/CUB_200_2011.tgz, which is downloaded if it is missing.

    Raises:
        DownloadError: If the archive is missing and cannot be downloaded.
        FileNotFoundError: If the archive is missing in a block `with places.without_downloads()`.
        OSError: If the archive cannot be unpacked because the disk is full or not writable.
        ValueError: If the data cannot be used: the archive or a text file is damaged, a text file
            is missing, or the text files and the images do not fit together. Also if not `root` but
            a folder above or below `root` holds the data set. The message names the file, the line
            or the folder.
    """
    folder = Path(root).expanduser().absolute() / "CUB_200_2011"
    check_named_root(folder, CUB200_TEXTS[:3], "CUB_200_2011.tgz")
    if not folder.is_dir():
        archive = fetch(CUB200_URL, CUB200_MD5, folder.parent, limit=LARGEST_ARCHIVE)
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
        differing = names.keys() ^ table.keys()
        if differing:
            image = min(differing)
            line = (names | table)[image][1]
            if image in names:
                found = f"lacks image {image}, which images.txt has in line {line}"
            else:
                found = f"has image {image}, which images.txt lacks (line {line})"
            raise ValueError(f"{folder / name} {found}; {_AGAIN}")
    is_present = _Present(folder / "images")
    splits: dict[str, tuple[list[str], list[int]]] = {"1": ([], []), "0": ([], [])}
    for image, (name, line) in names.items():
        listed = f"{folder / CUB200_TEXTS[0]}:{line}"
        if not is_present(name):
            raise ValueError(
                f"{listed}: there is no image {name[:100]!a} in {folder / 'images'}; {_AGAIN}"
            )
        label, line = labels[image]
        number = _number(label)
        if not 1 <= number <= CUB200_CLASSES:
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
    """Return ImageNet (ILSVRC 2012): 1,281,167 training and 50,000 test images of 1,000 classes.

    The splits are `Files` of `root`/train/<synset>/* and `root`/val/<synset>/*, read as by
    `image_folder`. A synset is the name of a class's folder, such as n01440764. Classes are
    numbered from 0 by their sorted synsets, as published weights expect. The data set cannot be
    downloaded here: its licence requires an account. `num_classes` is the number of classes that
    must be found; the numbers of images are not checked.

    Citation: Russakovsky et al. 2015.

    Raises:
        ValueError: If the folders cannot be used: one is missing, has no images or has another
            layout, the splits have different classes, the number of classes is not `num_classes`,
            or any other problem for which `image_folder` raises ValueError.
    """
    top = Path(root).expanduser().absolute()
    if (top / "val").is_dir() and not any(path.is_dir() for path in (top / "val").iterdir()):
        raise ValueError(
            f"{top / 'val'} holds no folders: move its images into a folder for each synset, "
            "as train/ has them "
            "(the devkit's ILSVRC2012_validation_ground_truth.txt says which) "
            f"(split val of dataset.root={top})"
        )
    splits = image_folder(root, "val")
    found = int(splits.train.labels_N.max()) + 1
    if found != num_classes:
        raise ValueError(
            f"{top / 'train'} holds {counted(found, 'class', 'classes')}, "
            f"and ImageNet has {num_classes}; "
            f"for another data set use dataset=image_folder dataset.num_classes={found}"
        )
    return splits


def tiny_imagenet(root: str) -> Splits:
    """Return Tiny ImageNet (CS231n): 100,000 training and 10,000 test images of 200 classes.

    The splits are `Files` of 64x64 pixels. The test split is the published val split, because the
    published test images have no labels. The folder `root`/tiny-imagenet-200 is read (wnids.txt,
    train/<wnid>/images/*, val/val_annotations.txt, val/images/*). If the folder is missing, it is
    unpacked from `root`/tiny-imagenet-200.zip, which is downloaded if it is missing. A wnid is the
    name of a class's folder, such as n01443537. Classes are numbered from 0 by their sorted wnids.

    Raises:
        DownloadError: If the archive is missing and cannot be downloaded.
        FileNotFoundError: If the archive is missing in a block `with places.without_downloads()`.
        OSError: If the archive cannot be unpacked because the disk is full or not writable.
        ValueError: If the data cannot be used: the archive or a text file is damaged, a text file
            is missing, or the text files and the images do not fit together. Also if not `root` but
            a folder above or below `root` holds the data set. The message names the file, the line
            or the folder.
    """
    folder = Path(root).expanduser().absolute() / "tiny-imagenet-200"
    check_named_root(folder, ["wnids.txt"], "tiny-imagenet-200.zip")
    if not folder.is_dir():
        archive = fetch(TINY_IMAGENET_URL, TINY_IMAGENET_MD5, folder.parent, limit=LARGEST_ARCHIVE)
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
        if not _is_plain(name) or name in classes:
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
    """Return the split that val_annotations.txt in `folder` lists.

    `classes` maps each wnid to its class. Each line of the file holds an image name, its wnid and a
    box, separated by tabs. Raise ValueError if a wnid is unknown, or if an image is missing or
    listed twice.
    """
    annotations = folder / "val_annotations.txt"
    is_present = _Present(folder)
    labels: dict[str, int] = {}  # by image name
    for line, text in _lines(annotations):
        name, _, rest = text.partition("\t")
        wnid = rest.partition("\t")[0].strip()
        if wnid not in classes:
            raise ValueError(
                f"{annotations}:{line}: {wnid[:40]!a} is not a class of wnids.txt; {_AGAIN}"
            )
        if name in labels or not is_present(f"images/{name}"):
            raise ValueError(
                f"{annotations}:{line}: {name[:100]!a} is listed twice, "
                f"or is not an image in {folder / 'images'}; {_AGAIN}"
            )
        labels[name] = classes[wnid]
    paths = [str(folder / "images" / name) for name in labels]
    return Files(paths, torch.tensor(list(labels.values())))


_AGAIN = "remove the folder to have it unpacked again, or download it again"


class _Present:
    """Function that returns whether the path <folder>/<name> is a file below `top`.

    Each folder is listed only once.
    """

    def __init__(self, top: Path) -> None:
        self.top = top
        self.files: dict[str, set[str]] = {}  # names of the files by name of their folder

    def __call__(self, path: str) -> bool:
        folder, _, name = path.rpartition("/")
        if not _is_plain(folder) or not _is_plain(name):
            return False
        if folder not in self.files:
            self.files[folder] = set()
            if (self.top / folder).is_dir():
                entries = os.scandir(self.top / folder)
                self.files[folder].update(entry.name for entry in entries if entry.is_file())
        return name in self.files[folder]


def _is_plain(name: str) -> bool:
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
    size = path.stat().st_size
    if size > LARGEST_TEXT:
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
