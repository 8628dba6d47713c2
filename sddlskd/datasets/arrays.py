"""Load data sets: each loader returns `Splits`, either as pixels or as paths of image files.

Pixels are `Images`, uint8 in host memory, which `sddlskd.data.DeviceData` copies to the device.
Paths are `Files`, which `sddlskd.data.streaming.StreamedData` reads batch by batch.

Shapes: N images, H W C pixel rows, columns and channels. A new data set is a function that returns
`Splits`; its conf/dataset/<name>.yaml selects the function with `_target_`. Only downloaded files
must have the known md5. A file that the user puts in place is accepted whatever its md5, because
archives get repacked. That is safe: reading the file can run no code, and shapes and labels are
checked.
"""

import gzip
import hashlib
import io
import logging
import math
import os
import pickle
import pickletools
import re
import tarfile
import zlib
from base64 import b64decode
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import distribution
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sddlskd.datasets.places import check_named_root, check_root, fetch
from sddlskd.files.archive import DAMAGE, Member, unpack_folder

# One bit per image, set for images of the test split. The bits were drawn once with scikit-learn's
# train_test_split(test_size=360, random_state=0, stratify=labels). They are stored here so that a
# later version of scikit-learn cannot draw another split.
DIGITS_TEST = (
    "AAAEiDUkEEAABkEAk0IFABoACAEAJAAoBiwSABAAlAoAkBkSBCD4oAKBEKAACAqIIEQVJElCQKAKAAAAQATYAACBgC"
    "AASAXEABBACKAQAAVASAAwEAACDsQJAAIkhACDqAE8IKaYCgAAAAsIQAgEoBhIAgJAQcEAgARARoQ3aoECFgBEgABA"
    "QqCkGApQAIQLhWHGCBCACABMgMAgBAaOAAEIggCBADgIA8AIGQAAEA4BAIQQoCEAMygpBMBEwIBoDgECgwCCAIgipk"
    "AsJAQhCKhggJCBoAwCggJCEgE4pBUA"
)
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
CIFAR10_MD5 = "c58f30108f718f92721af3b95e74349a"
CIFAR10_MEMBERS = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
CIFAR100_URL = "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"
CIFAR100_MD5 = "eb9058c3a382ffc7106e4002c42a8d85"
CIFAR100_MEMBERS = {
    "train": "16019d7e3df5f24257cddd939b257f8d",
    "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
}
FASHION_MNIST_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
FASHION_MNIST_MD5 = {
    "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
}
STL10_URL = "http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz"
STL10_MD5 = "91f7769df0f17e558f3565bffb0c7dfb"
STL10_FILES = ("train_X.bin", "train_y.bin", "test_X.bin", "test_y.bin")
# The extensions that torchvision accepts.
EXTENSIONS = (
    ".jpg",
    ".jpeg",
    ".png",
    ".ppm",
    ".bmp",
    ".pgm",
    ".tif",
    ".tiff",
    ".webp",
)
# Largest size in bytes of an archive, and of the unpacked files; CIFAR-100 has 169 MB.
LARGEST = 1 << 30
# Largest size in bytes of a file that is read into memory. The largest file of Fashion-MNIST has
# 47 MB, that of CIFAR-100 155 MB.
LARGEST_MEMBER = 1 << 28
# The folder of Debian's package dataset-fashion-mnist.
DEBIAN_FASHION_MNIST = "/usr/share/datasets/fashion-mnist"
_log = logging.getLogger(__name__)


class Images(NamedTuple):
    """One split of a data set in host memory.

    Attributes:
        images_NHWC: pixels 0..255, uint8 (N, H, W, C).
        labels_N: class of each image, counted from 0, int64 (N,). For images with several labels,
            int64 (N, K): 1 for the classes of an image, and 0 for the others.
    """

    images_NHWC: Tensor
    labels_N: Tensor


class Files(NamedTuple):
    """One split of a data set whose images stay on the disk, as paths and labels.

    Attributes:
        paths: absolute paths of the N image files. The loaders do not open the files.
        labels_N: labels of the images, as those of `Images`.
    """

    paths: Sequence[str]
    labels_N: Tensor


class Splits(NamedTuple):
    """The training and test split of a data set, both as `Images` or both as `Files`."""

    train: Images | Files
    test: Images | Files


def cifar100(root: str) -> Splits:
    """Return CIFAR-100 (Krizhevsky 2009): 50,000 training and 10,000 test images of 100 classes.

    The splits are `Images` of 32x32x3 pixels with the fine labels. The files
    `root`/cifar-100-python/{train,test} are read if both exist. Otherwise, the archive
    `root`/cifar-100-python.tar.gz is read; it is downloaded if it is missing. A train or test file
    that does not have the published md5 is used nevertheless, and a warning is logged.

    Raises:
        DownloadError: If the archive is missing and cannot be downloaded.
        FileNotFoundError: If the archive is missing in a block `with places.without_downloads()`.
        ValueError: If a file cannot be used: it is damaged, larger than 256 MiB (LARGEST_MEMBER) or
            a pickle that would run code. Also if not `root` but a folder above or below `root`
            holds the data set. The message names the file or folder.
    """
    folder = Path(root).expanduser() / "cifar-100-python"
    return Splits(
        *_cifar(folder, CIFAR100_URL, CIFAR100_MD5, CIFAR100_MEMBERS, "CIFAR-100", "fine_labels")
    )


def cifar10(root: str) -> Splits:
    """Return CIFAR-10 (Krizhevsky 2009): 50,000 training and 10,000 test images of 10 classes.

    The splits are `Images` of 32x32x3 pixels. The six files
    `root`/cifar-10-batches-py/{data_batch_1..5,test_batch} are read if all exist. Otherwise, the
    archive `root`/cifar-10-python.tar.gz is read; it is downloaded if it is missing. If one of the
    six files does not have the published md5, it is used nevertheless, and a warning is logged.

    Raises:
        DownloadError: If the archive is missing and cannot be downloaded.
        FileNotFoundError: If the archive is missing in a block `with places.without_downloads()`.
        ValueError: If a file cannot be used: it is damaged, larger than 256 MiB (LARGEST_MEMBER) or
            a pickle that would run code. Also if not `root` but a folder above or below `root`
            holds the data set. The message names the file or folder.
    """
    folder = Path(root).expanduser() / "cifar-10-batches-py"
    *train, test = _cifar(folder, CIFAR10_URL, CIFAR10_MD5, CIFAR10_MEMBERS, "CIFAR-10", "labels")
    images, labels = zip(*train, strict=True)
    return Splits(Images(torch.cat(images), torch.cat(labels)), test)


def stl10(root: str) -> Splits:
    """Return STL-10 (Coates et al. 2011): 5,000 training and 8,000 test images of 10 classes.

    The splits are `Images` of 96x96x3 pixels. The unlabelled images of STL-10 are left out. The
    files `root`/stl10_binary/{train,test}_{X,y}.bin are read. If the folder `root`/stl10_binary is
    missing, these files are unpacked from `root`/stl10_binary.tar.gz, which is downloaded if it is
    missing.

    Raises:
        DownloadError: If the archive is missing and cannot be downloaded.
        FileNotFoundError: If the archive is missing in a block `with places.without_downloads()`.
        OSError: If the archive cannot be unpacked because the disk is full or not writable.
        ValueError: If the archive or a file cannot be used: it is missing in an existing folder,
            damaged or too large. Also if not `root` but a folder above or below `root` holds the
            data set. The message names the file or folder.
    """
    folder = Path(root).expanduser() / "stl10_binary"
    check_named_root(folder, STL10_FILES, "stl10_binary.tar.gz")
    if not folder.exists():
        archive = fetch(STL10_URL, STL10_MD5, folder.parent, limit=3 << 30)
        unpack_folder(archive, folder, limit=LARGEST, wanted=lambda path: path.name in STL10_FILES)
    absent = [name for name in STL10_FILES if not (folder / name).is_file()]
    if absent:
        raise ValueError(
            f"{', '.join(absent)} is missing in {folder}; "
            "put it there, or remove the folder to have it unpacked again"
        )
    return Splits(
        *(
            _stl10_split(folder / f"{name}_X.bin", folder / f"{name}_y.bin")
            for name in ("train", "test")
        )
    )


def _stl10_split(images: Path, labels: Path) -> Images:
    """Return one split from an image file and a label file of STL-10.

    An image is 3 x 96 x 96 bytes, channel by channel, each channel column by column. A label is one
    byte, counted from 1.
    """
    pixels = _read_limited(images)
    classes = _read_limited(labels)
    count = len(classes)
    if len(pixels) != count * 3 * 96 * 96 or not count:
        raise ValueError(
            f"{images}: expected {count * 3 * 96 * 96} bytes for the {count} labels of "
            f"{labels.name}, found {len(pixels)}; "
            f"remove the folder {images.parent} to have it unpacked again"
        )
    labels_N = torch.frombuffer(bytearray(classes), dtype=torch.uint8).long() - 1
    if not 0 <= int(labels_N.min()) <= int(labels_N.max()) < 10:
        raise ValueError(
            f"{labels} holds labels other than 1..10; "
            f"remove the folder {labels.parent} to have it unpacked again"
        )
    columns_NCWH = torch.frombuffer(bytearray(pixels), dtype=torch.uint8).reshape(count, 3, 96, 96)
    return Images(columns_NCWH.permute(0, 3, 2, 1).contiguous(), labels_N)


def _read_limited(path: Path) -> bytes:
    """Return the bytes of a file. Raise ValueError if it has more than LARGEST_MEMBER bytes."""
    size = path.stat().st_size
    if size > LARGEST_MEMBER:
        raise ValueError(
            f"{path} has {size} bytes, more than the limit of {LARGEST_MEMBER}; "
            "check that it is the right file"
        )
    return path.read_bytes()


def fashion_mnist(root: str) -> Splits:
    """Return Fashion-MNIST (Xiao et al. 2017): 60,000 training, 10,000 test images, 10 classes.

    The splits are `Images` of 32x32x3 pixels: each original image, 28x28 and grey, gets a border of
    zeros, and its channel is repeated three times. The four IDX files, plain or .gz, are read from
    the first of these folders that holds any of them: `root`/FashionMNIST/raw (torchvision's
    folder), `root`, and the folder of Debian's package dataset-fashion-mnist. Files that are
    missing in that folder are downloaded into it. If no folder holds any, all four are downloaded
    into `root`/FashionMNIST/raw.

    Raises:
        DownloadError: If a file is missing and cannot be downloaded.
        FileNotFoundError: If a file is missing in a block `with places.without_downloads()`.
        ValueError: If a file cannot be used: it is damaged or larger than 256 MiB (LARGEST_MEMBER).
            Also if only a folder above or below `root` holds the data set. The message names the
            file or folder.
    """
    top = Path(root).expanduser()
    places = [*_fashion_mnist_places(top), Path(DEBIAN_FASHION_MNIST)]
    with_files = [place for place in places if _has_fashion_mnist(place)]
    if not with_files:
        check_root(
            top,
            lambda folder: any(map(_has_fashion_mnist, _fashion_mnist_places(folder))),
            "FashionMNIST/raw",
            parts=["FashionMNIST"],
        )
    folder = with_files[0] if with_files else places[0]
    files = [
        _find_file(folder, name) or fetch(FASHION_MNIST_URL + name, md5, folder, limit=LARGEST)
        for name, md5 in FASHION_MNIST_MD5.items()
    ]
    return Splits(_grey_split(*files[:2]), _grey_split(*files[2:]))


def _fashion_mnist_places(top: Path) -> list[Path]:
    """Return the folders, at or below a root, in which the IDX files may be."""
    return [top / "FashionMNIST" / "raw", top]


def _has_fashion_mnist(folder: Path) -> bool:
    """Return whether a folder holds any of the IDX files."""
    return any(_find_file(folder, name) for name in FASHION_MNIST_MD5)


def digits() -> Splits:
    """Return scikit-learn's 1,797 handwritten digits of 10 classes as 32x32x3 images.

    The splits are `Images`: 1,437 for training and 360 for test, always the same ones, stratified
    by class. The original images are 8x8 and grey, with values 0..16. They are resized bilinearly
    and scaled to 0..255, and the channel is repeated three times. Nothing is downloaded: the file
    of the installed scikit-learn is read.
    """
    # Read the file itself: importing scikit-learn takes longer than importing torch.
    with gzip.open(
        str(distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz"))
    ) as file:
        # Columns: 64 pixels, then the label.
        table_NP = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.uint8))
    small_N1HW = table_NP[:, :64].float().reshape(-1, 1, 8, 8)
    # Resize before scaling: all resized values are exact in float32, so the rounding is the same
    # on every machine.
    large_N1HW = (
        F.interpolate(small_N1HW, size=(32, 32), mode="bilinear", align_corners=False)
        .mul_(255 / 16)
        .round_()
    )
    images_NHWC = large_N1HW.to(torch.uint8).permute(0, 2, 3, 1).repeat(1, 1, 1, 3)
    labels_N = table_NP[:, 64].long()
    for_test_N = torch.from_numpy(
        np.unpackbits(np.frombuffer(b64decode(DIGITS_TEST), np.uint8), count=1797)
    ).bool()
    return Splits(
        *(Images(images_NHWC[part_N], labels_N[part_N]) for part_N in (~for_test_N, for_test_N))
    )


MOST_FAKE = 50_000_000_000  # bytes; more is a slip of the keyboard


def fake(
    num_classes: int = 100, size: int = 32, train: int = 50_000, test: int = 10_000, seed: int = 0
) -> Splits:
    """Return random pixels with balanced labels, for timings and smoke tests.

    The default sizes are those of CIFAR-100.

    Args:
        num_classes: number of classes, at least 1; image n has the class n mod `num_classes`.
        size: side of the square images in pixels.
        train: number of training images.
        test: number of test images.
        seed: seed of the pixels.

    Returns:
        Splits of `Images` with 3 channels.

    Raises:
        ValueError: If the pixels would take more than 50 GB (MOST_FAKE).
    """
    needed = (train + test) * size**2 * 3
    if needed > MOST_FAKE:
        raise ValueError(
            f"train={train} and test={test} images of size={size} need {needed / 1e9:.1f} GB; "
            f"random images take at most {MOST_FAKE / 1e9:.0f} GB"
        )
    generator = torch.Generator().manual_seed(seed)
    splits = []
    for count in (train, test):
        images_NHWC = torch.randint(
            256, (count, size, size, 3), dtype=torch.uint8, generator=generator
        )
        splits.append(Images(images_NHWC, torch.arange(count) % num_classes))
    return Splits(*splits)


def fake_label_sets(
    num_classes: int = 6, size: int = 32, train: int = 2_000, test: int = 500, seed: int = 0
) -> Splits:
    """Return fake images with several labels each, which a network can learn, for smoke tests.

    Each class has a colour and a place: for each class of an image, a square of the class's colour
    lies over the noise at the class's place. An image has each class with probability 0.4.

    Args:
        num_classes: number of classes, at least 1.
        size: side of the square images in pixels, at least 8.
        train: number of training images.
        test: number of test images.
        seed: seed of the pixels and labels.

    Returns:
        Splits of `Images` with 3 channels and labels (N, num_classes) of zeros and ones.
    """
    generator = torch.Generator().manual_seed(seed)
    colours_K3 = torch.randint(256, (num_classes, 3), dtype=torch.uint8, generator=generator)
    side = size // 4
    corners_K2 = torch.randint(size - side + 1, (num_classes, 2), generator=generator).tolist()
    splits = []
    for count in (train, test):
        labels_NK = (torch.rand(count, num_classes, generator=generator) < 0.4).long()
        images_NHWC = torch.randint(
            256, (count, size, size, 3), dtype=torch.uint8, generator=generator
        )
        for label, (top, left) in enumerate(corners_K2):
            having_N = labels_NK[:, label].bool()
            square_NHWC = images_NHWC[:, top : top + side, left : left + side]
            square_NHWC[having_N] = colours_K3[label]
        splits.append(Images(images_NHWC, labels_NK))
    return Splits(*splits)


class _PickledArray:
    """Array of a pickle, kept as the values that the pickle gives.

    NumPy is not asked to restore the array: some values make it read memory that is not its own.
    """

    _TYPE = re.compile("[<>=|][iu][1248]")

    def __init__(self) -> None:
        self.state: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Keep (shape, type, whether columns come first, bytes)."""
        _version, *self_state = state
        self.state = tuple(self_state)

    @classmethod
    def from_buffer(cls, content: Any, dtype: Any, shape: Any, order: Any, *_: Any) -> Self:
        """Return an array as pickles of protocol 5 write it."""
        array = cls()
        array.state = (shape, dtype, order == "F", content)
        return array

    def numpy(self) -> np.ndarray[Any, Any]:
        """Return the array. Raise ValueError if it has no integers, or another number of bytes."""
        shape, dtype, columns_first, content = self.state
        if not isinstance(dtype, _PickledType) or not self._TYPE.fullmatch(dtype.name):
            raise ValueError("an array does not hold integers")
        if isinstance(content, str):  # Python 2 wrote bytes as strings
            content = content.encode("latin1")
        if any(type(side) is not int or side < 0 for side in shape):
            raise ValueError("the shape of an array is not one")
        order: Literal["C", "F"] = "F" if columns_first else "C"
        return np.frombuffer(content, np.dtype(dtype.name)).reshape(shape, order=order)


class _PickledType:
    """Type of an array's elements in a pickle."""

    def __init__(self, code: str, *_: Any) -> None:
        self.name = f"|{code}"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Keep the order of bytes: "<", ">", "=" or "|"."""
        _version, order, *_ = state
        self.name = f"{order}{self.name[1:]}"


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickler of containers, strings, numbers and arrays, which it returns as `_PickledArray`.

    Any other class or function that a pickle names raises UnpicklingError, so no code can run.
    """

    # The modules of NumPy's two functions that build arrays are private, and NumPy 2 renamed them.
    _ALLOWED: Mapping[tuple[str, str], Callable[..., Any]] = {
        ("numpy", "ndarray"): lambda: None,  # only passed to _reconstruct
        ("numpy", "dtype"): _PickledType,
        ("numpy.core.multiarray", "_reconstruct"): lambda *_: _PickledArray(),
        ("numpy._core.multiarray", "_reconstruct"): lambda *_: _PickledArray(),
        ("numpy.core.numeric", "_frombuffer"): _PickledArray.from_buffer,
        ("numpy._core.numeric", "_frombuffer"): _PickledArray.from_buffer,
        # Pickles of protocol 2 write bytes as a call of this function.
        ("_codecs", "encode"): lambda text, _: text.encode("latin1"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}; only NumPy arrays are read")
        build = self._ALLOWED[module, name]
        # A pickle can set attributes of what it is given: it gets a function of its own.
        return lambda *args: build(*args)


def _load_arrays(content: bytes) -> Any:
    """Return what a pickle of containers and arrays holds.

    Raise an error of any class if the pickle is damaged or refused.
    """
    for opcode, argument, _ in pickletools.genops(content):
        # A pickle numbers its objects. Python allocates a list as long as the largest number.
        if "PUT" in opcode.name and argument is not None and argument > len(content):
            raise pickle.UnpicklingError(f"it numbers an object {argument}")
    return _ArrayUnpickler(io.BytesIO(content), encoding="latin1").load()


def _cifar(
    folder: Path, url: str, md5: str, members: Mapping[str, str], what: str, labels: str
) -> list[Images]:
    """Return the images of each pickle, read from `folder` or from the archive beside it.

    Log a warning if a pickle does not have the published md5.

    Args:
        folder: folder of the unpacked pickles; the archive is in its parent.
        url: address of the archive, which is downloaded if it is missing.
        md5: md5 of the archive in hex.
        members: md5 in hex of each pickle, by file name.
        what: name of the data set, for messages.
        labels: key of the labels in a pickle.

    Returns:
        One `Images` per pickle, in the order of `members`.

    Raises:
        DownloadError: If the archive is missing and cannot be downloaded.
        FileNotFoundError: If the archive is missing and must not be downloaded.
        ValueError: If a file is damaged or refused, or if another folder than the one above
            `folder` holds the data set, see `check_root`.
    """
    check_named_root(folder, members, url.rpartition("/")[2])
    if all((folder / name).is_file() for name in members):
        contents = {str(folder / name): _read_limited(folder / name) for name in members}
    else:
        archive = fetch(url, md5, folder.parent, limit=LARGEST)
        inside = _tar_members(archive, [f"{folder.name}/{name}" for name in members], url)
        contents = {f"{archive}:{name}": content for name, content in inside.items()}
    splits = []
    for (file, content), expected in zip(contents.items(), members.values(), strict=True):
        if hashlib.md5(content, usedforsecurity=False).hexdigest() != expected:
            _log.warning(
                "%s is not the published %s (its md5 differs): results will not be comparable",
                file,
                what,
            )
        splits.append(_cifar_split(content, file, url, what, labels))
    return splits


def _cifar_split(content: bytes, file: str, url: str, what: str, labels_key: str) -> Images:
    """Return the images of one pickle. Raise ValueError if it is damaged or refused.

    The pickle holds a dict of `data`, uint8 N x 3072 channel-major, and of `labels_key`, a list of
    labels. In messages, `file` names the pickle, `url` its source and `what` the data set.
    """
    try:
        entries = {}
        for key, value in _load_arrays(content).items():
            name = key.decode() if isinstance(key, bytes) else key
            entries[name] = value
        data = entries["data"].numpy()
        listed = entries[labels_key]
        if isinstance(listed, _PickledArray):
            listed = listed.numpy().tolist()
        if not all(type(label) is int for label in listed):
            raise ValueError(f"{labels_key} are not integers")
        labels = np.array(listed, dtype=np.int64)
        if data.dtype != np.uint8 or data.shape != (len(labels), 3072):
            raise ValueError(f"data is {data.dtype} {data.shape}, not uint8 {(len(labels), 3072)}")
    except Exception as error:  # a damaged pickle can raise any exception
        reason = (
            f"{file} is not a {what} pickle "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        )
        raise ValueError(f"{reason}: remove it to have {url} fetched again") from error
    images_NHWC = torch.from_numpy(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1).copy())
    return Images(images_NHWC, torch.from_numpy(labels))


def _tar_members(archive: Path, names: list[str], url: str) -> dict[str, bytes]:
    """Return the contents of the named files of a tar archive, by name.

    The files are read into memory and nothing is extracted, so no member can write outside a
    folder. `url` is the address of the archive, for messages. Raise ValueError if the archive is
    damaged, lacks a file, or has a file larger than LARGEST_MEMBER.
    """
    try:
        with tarfile.open(archive, tarinfo=Member) as tar:
            for name in names:
                size = tar.getmember(name).size
                if size > LARGEST_MEMBER:
                    raise ValueError(f"{name} has {size} bytes")
            contents = {}
            for name in names:
                file = tar.extractfile(name)
                contents[name] = file.read() if file else b""
            return contents
    except (*DAMAGE, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{archive} cannot be read ({reason}): remove it to have {url} fetched again"
        ) from error


def _find_file(folder: Path, name: str) -> Path | None:
    """Return the path of a plain or gzipped file, or None if `folder` holds neither.

    `name` is the name of the gzipped file. The plain file has that name without .gz, and it is
    preferred.
    """
    for path in (folder / name.removesuffix(".gz"), folder / name):
        if os.path.isfile(path):
            return path
    return None


def _read_idx(path: Path, ndim: int) -> Tensor:
    """Return the uint8 tensor of `ndim` dimensions in an IDX file, plain or gzipped.

    Raise ValueError if the file is damaged. Format: http://yann.lecun.com/exdb/mnist/.
    """
    cure = "remove it to have it fetched again"
    content = _read_limited(path)
    if content[:2] == b"\x1f\x8b":
        try:
            # Unlike the gzip module, zlib returns the data that a truncated file still holds, and
            # no more bytes than it is asked for.
            content = zlib.decompressobj(wbits=31).decompress(content, LARGEST_MEMBER)
        except zlib.error as error:
            raise ValueError(
                f"{path} is a damaged gzip file of {len(content)} bytes ({error}): {cure}"
            ) from error
    magic = bytes((0, 0, 8, ndim))  # 8: unsigned bytes
    header = 4 + 4 * ndim  # bytes
    if len(content) < header or content[:4] != magic:
        found = f"{len(content)} bytes beginning {content[:4].hex()}"
        raise ValueError(
            f"{path} is not an IDX file: expected {header} bytes or more beginning {magic.hex()}, "
            f"found {found}: {cure}"
        )
    shape = np.frombuffer(content, dtype=">u4", count=ndim, offset=4).tolist()
    expected = header + math.prod(shape)
    if len(content) != expected:
        raise ValueError(
            f"{path}: expected {expected} bytes for its shape {shape}, found {len(content)}: {cure}"
        )
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)[header:].reshape(shape)


def _grey_split(images: Path, labels: Path) -> Images:
    """Return a split of 28x28 grey images as 32x32x3.

    Each image gets two black pixels on each side, and its channel is repeated three times.
    """
    images_NHWC = F.pad(_read_idx(images, 3), (2, 2, 2, 2))[..., None].repeat(1, 1, 1, 3)
    return Images(images_NHWC, _read_idx(labels, 1).long())
