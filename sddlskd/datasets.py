"""The data sets: each loader gives `Splits`, as uint8 images in host memory (`Images`, which `sddlskd.data.DeviceData`
takes on) or as names of image files (`Files`, which `sddlskd.streaming.StreamedData` reads batch by batch).

Shapes: N images, H W C pixel rows, columns and channels. A new data set is a function that returns `Splits`, picked in
its conf/dataset/<name>.yaml by `_target_`. The md5 vouches for what was fetched; a file put in place by hand is taken
whatever its md5 (archives get repacked), since reading it can run no code and shapes and labels are checked.
"""

import hashlib
import io
import logging
import math
import os
import pickle
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sddlskd import download
from sddlskd.download import DownloadError

CIFAR100_URL = "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"
CIFAR100_MD5 = "eb9058c3a382ffc7106e4002c42a8d85"
CIFAR100_MEMBERS = {"train": "16019d7e3df5f24257cddd939b257f8d", "test": "f0ef6b0ae62326f3e7ffdfab6717acfc"}
FASHION_MNIST_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
FASHION_MNIST_MD5 = {
    "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
}
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's
LARGEST = 1 << 30  # bytes of a download; CIFAR-100 has 169 MB
DEBIAN_FASHION_MNIST = "/usr/share/datasets/fashion-mnist"  # where Debian's package dataset-fashion-mnist puts it

_log = logging.getLogger(__name__)


class Images(NamedTuple):
    """One split: pixels 0..255 and classes counted from 0."""

    images_NHWC: Tensor  # uint8
    labels_N: Tensor  # int64


class Files(NamedTuple):
    """One split that stays on the disk: image files and classes counted from 0. Nothing of a file is read here."""

    paths: Sequence[str]  # absolute
    labels_N: Tensor  # int64


class Splits(NamedTuple):
    """The official training and test split of a data set, both of one kind."""

    train: Images | Files
    test: Images | Files


def cifar100(root: str) -> Splits:
    """CIFAR-100 (Krizhevsky 2009): 50,000 / 10,000 images 32x32x3 of 100 classes (the fine labels).

    Read from `root`/cifar-100-python/{train,test}, else from `root`/cifar-100-python.tar.gz, fetched on first use.
    Raises DownloadError where it cannot be had, ValueError naming the file where it is damaged or refused.
    """
    folder = Path(root).expanduser() / "cifar-100-python"
    pickles = {name: folder / name for name in CIFAR100_MEMBERS}
    if all(path.is_file() for path in pickles.values()):
        return Splits(*(_cifar_split(path.read_bytes(), name, str(path)) for name, path in pickles.items()))
    archive = _fetch(CIFAR100_URL, CIFAR100_MD5, folder.parent)
    members = _tar_members(archive, [f"{folder.name}/{name}" for name in CIFAR100_MEMBERS])
    return Splits(*(_cifar_split(members[f"{folder.name}/{n}"], n, f"{archive}:{folder.name}/{n}") for n in pickles))


def fashion_mnist(root: str) -> Splits:
    """Fashion-MNIST (Xiao et al. 2017): 60,000 / 10,000 images of 10 classes, 28x28 grey made 32x32x3 by a zero border.

    The four IDX files, plain or .gz, are read from `root`/FashionMNIST/raw (torchvision's place), `root`, or the folder
    of Debian's package dataset-fashion-mnist, whichever holds any of them first; what is missing there is fetched.
    Raises DownloadError where a file cannot be had, ValueError naming the file where it is damaged.
    """
    top = Path(root).expanduser()
    places = [top / "FashionMNIST" / "raw", top, Path(DEBIAN_FASHION_MNIST)]
    folder = next((place for place in places if any(_held(place, name) for name in FASHION_MNIST_MD5)), places[0])
    files = [_held(folder, n) or _fetch(FASHION_MNIST_URL + n, md5, folder) for n, md5 in FASHION_MNIST_MD5.items()]
    return Splits(_grey_split(*files[:2]), _grey_split(*files[2:]))


def digits() -> Splits:
    """scikit-learn's 1,797 handwritten digits, 8x8 with values 0..16, made 32x32x3 with values 0..255; needs no file.

    Bilinear; a fixed stratified split, 1,437 for training and 360 for test.
    """
    from sklearn.datasets import load_digits  # type: ignore[import-untyped, unused-ignore]  # slow to import
    from sklearn.model_selection import train_test_split  # type: ignore[import-untyped, unused-ignore]

    images, labels = load_digits(return_X_y=True)
    small_N1HW = torch.from_numpy(images).float().reshape(-1, 1, 8, 8)
    # Resized before scaling: every value so far is exact in float32, so rounding is the same everywhere.
    large_N1HW = F.interpolate(small_N1HW, size=(32, 32), mode="bilinear", align_corners=False).mul_(255 / 16).round_()
    images_NHWC = large_N1HW.to(torch.uint8).permute(0, 2, 3, 1).repeat(1, 1, 1, 3)
    labels_N = torch.from_numpy(labels).long()
    train, test = train_test_split(np.arange(len(labels)), test_size=360, random_state=0, stratify=labels)
    return Splits(*(Images(images_NHWC[part], labels_N[part]) for part in (np.sort(train), np.sort(test))))


def fake(num_classes: int = 100, size: int = 32, train: int = 50_000, test: int = 10_000, seed: int = 0) -> Splits:
    """Random pixels with balanced labels, of CIFAR-100's size unless told: for timings and smoke tests."""
    generator = torch.Generator().manual_seed(seed)

    def split(count: int) -> Images:
        images_NHWC = torch.randint(256, (count, size, size, 3), dtype=torch.uint8, generator=generator)
        return Images(images_NHWC, torch.arange(count) % num_classes)

    return Splits(split(train), split(test))


def image_folder(root: str, test: str | None = None) -> Splits:
    """Any folder of class folders: `root`/train/<class>/* and `root`/val/<class>/* (or test/, or the folder named by
    `test`), classes numbered by their sorted names.

    Every name in a class folder that ends as an image does is taken, whatever it turns out to be when it is read.
    Raises ValueError, in one line, for a folder that is missing or empty and for classes that the splits do not share.
    """
    top = Path(root).expanduser().absolute()
    held_out = [test] if test else [name for name in ("val", "test") if (top / name).is_dir()]
    if len(held_out) > 1:
        raise ValueError(f"{top} has both val and test; say which one to test on: +dataset.load.test=val")
    train_classes, train = _class_folders(top / "train")
    test_classes, tested = _class_folders(top / (held_out or ["val"])[0])
    if differing := sorted(set(train_classes) ^ set(test_classes)):
        shown = ", ".join(differing[:5]) + (", ..." if len(differing) > 5 else "")
        raise ValueError(f"{top}: {len(differing)} classes are in one split only ({shown}); both need the same folders")
    return Splits(train, tested)


def _class_folders(folder: Path) -> tuple[list[str], Files]:
    """The sorted classes of a folder of class folders, and their image files in the order of (class, name)."""
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; it should hold a folder of images for each class")
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise ValueError(f"{folder} holds no folders; it should hold a folder of images for each class")
    paths, labels = [], []
    for label, name in enumerate(classes):
        files = image_files(folder / name)
        paths += files
        labels += [label] * len(files)
    return classes, Files(paths, torch.tensor(labels))


def image_files(folder: Path) -> list[str]:
    """The paths of what is called an image in a folder, sorted; ValueError where there is none."""
    found = sorted(
        entry.path
        for entry in os.scandir(folder)
        if entry.name.lower().endswith(EXTENSIONS) and not entry.name.startswith(".")  # ._x.jpg: what macOS leaves
    )
    if not found:
        raise ValueError(f"{folder} holds no images ({' '.join(EXTENSIONS)}); remove the folder, or fill it")
    return found


def _fetch(url: str, md5: str, folder: Path) -> Path:
    """The file of `url` in `folder`, fetched if it is not there: once, whole and with this md5, or DownloadError."""
    name = url.rsplit("/", 1)[-1]
    try:
        return download.fetch(url, folder / name, limit=LARGEST, md5=md5)
    except DownloadError as error:
        raise DownloadError(f"{error}: put {name}, md5 {md5}, into {folder}") from error


class _ArrayUnpickler(pickle.Unpickler):
    """Reads pickles of containers, strings, numbers and NumPy arrays; refuses any other global, so no code can run."""

    # Taken from NumPy's own answers: the modules of its two builders are private and were renamed in NumPy 2.
    _reconstruct, _frombuffer = np.empty(0).__reduce__()[0], np.empty(0).__reduce_ex__(5)[0]
    _ALLOWED: Mapping[tuple[str, str], Any] = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy.core.numeric", "_frombuffer"): _frombuffer,
        ("numpy._core.numeric", "_frombuffer"): _frombuffer,
        ("_codecs", "encode"): lambda text, _: text.encode("latin1"),  # how protocol 2 spells bytes
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}; only NumPy arrays are read")
        return self._ALLOWED[module, name]


def _cifar_split(content: bytes, member: str, where: str) -> Images:
    """Images of one pickle of the archive: a dict of `data`, uint8 N x 3072 channel-major, and `fine_labels`."""
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != CIFAR100_MEMBERS[member]:
        _log.warning("%s is not the published CIFAR-100 (its md5 differs): results will not compare", where)
    try:
        loaded = _ArrayUnpickler(io.BytesIO(content), encoding="latin1").load()
        entries = {key.decode() if isinstance(key, bytes) else key: value for key, value in loaded.items()}
        data, labels = entries["data"], np.array(entries["fine_labels"], dtype=np.int64)
        if data.dtype != np.uint8 or data.shape != (len(labels), 3072):
            raise ValueError(f"data is {data.dtype} {data.shape}, not uint8 {(len(labels), 3072)}")
    except Exception as error:  # a damaged pickle can raise anything at all
        reason = f"{where} is no CIFAR-100 pickle ({type(error).__name__}: {error})"
        raise ValueError(f"{reason}: remove it to have {CIFAR100_URL} fetched again") from error
    images_NHWC = torch.from_numpy(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1).copy())
    return Images(images_NHWC, torch.from_numpy(labels))


def _tar_members(archive: Path, names: list[str]) -> dict[str, bytes]:
    """The named files of a tar, read in memory: nothing is extracted, so no member can write outside a folder."""
    try:
        with tarfile.open(archive) as tar:
            files = {name: tar.extractfile(name) for name in names}
            return {name: file.read() if file else b"" for name, file in files.items()}
    except (tarfile.TarError, KeyError, EOFError, OSError, zlib.error) as error:
        raise ValueError(
            f"{archive} cannot be read ({error}): remove it to have {CIFAR100_URL} fetched again"
        ) from error


def _held(folder: Path, name: str) -> Path | None:
    """The plain or the gzipped file of that .gz name in the folder, if there is one."""
    return next((path for path in (folder / name.removesuffix(".gz"), folder / name) if path.is_file()), None)


def _read_idx(path: Path, ndim: int) -> Tensor:
    """A uint8 tensor of `ndim` dimensions from an IDX file (http://yann.lecun.com/exdb/mnist/), plain or gzipped."""
    cure = "remove it to have it fetched again"
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = zlib.decompressobj(wbits=31).decompress(content)  # unlike gzip, gives what a cut file still holds
        except zlib.error as error:
            raise ValueError(f"{path} is a damaged gzip file of {len(content)} bytes ({error}): {cure}") from error
    magic, header = bytes((0, 0, 8, ndim)), 4 + 4 * ndim  # 8: unsigned bytes
    if len(content) < header or content[:4] != magic:
        found = f"{len(content)} bytes beginning {content[:4].hex()}"
        raise ValueError(
            f"{path} is no IDX file: expected {header} bytes or more beginning {magic.hex()}, found {found}: {cure}"
        )
    shape = np.frombuffer(content, dtype=">u4", count=ndim, offset=4).tolist()
    expected = header + math.prod(shape)
    if len(content) != expected:
        raise ValueError(f"{path}: expected {expected} bytes for its shape {shape}, found {len(content)}: {cure}")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)[header:].reshape(shape)


def _grey_split(images: Path, labels: Path) -> Images:
    """28x28 grey to 32x32x3: two black pixels on each side, the one channel three times."""
    images_NHWC = F.pad(_read_idx(images, 3), (2, 2, 2, 2))[..., None].repeat(1, 1, 1, 3)
    return Images(images_NHWC, _read_idx(labels, 1).long())
