"""Test the loaders of CUB-200-2011, ImageNet, Tiny ImageNet, STL-10 and CIFAR-10.

The data sets are small folders and archives in the published layouts.
"""

import hashlib
import io
import pickle
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from sddlskd.datasets import arrays, folders
from sddlskd.datasets.arrays import Files, Splits, cifar10, fashion_mnist, stl10
from sddlskd.datasets.folders import cub200, image_folder, imagenet, tiny_imagenet
from sddlskd.files import download
from sddlskd.files.download import DownloadError
from sddlskd.training import build
from tests import layouts
from tests.conftest import compose_in
from tests.layouts import WNIDS
from tests.loopback import Site, site


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(download, "BACKOFF_S", 0.001)
    with site() as here:
        yield here


def published(
    web: Site, monkeypatch: pytest.MonkeyPatch, module: object, name: str, archive: Path
) -> None:
    """Move an archive to the web server, and let `module` download it from there."""
    content = archive.read_bytes()
    archive.unlink()
    monkeypatch.setattr(module, f"{name}_URL", web.file(f"files/{archive.name}", content))
    monkeypatch.setattr(module, f"{name}_MD5", hashlib.md5(content).hexdigest())


def below(files: Files, folder: Path) -> list[str]:
    return [str(Path(path).relative_to(folder)) for path in files.paths]


# CUB-200-2011


def test_cub200(tmp_path: Path) -> None:
    truth = layouts.cub200(tmp_path)
    images = tmp_path / "CUB_200_2011/images"
    for split, training in zip(cub200(str(tmp_path)), (1, 0), strict=True):
        expected = {path: label for path, (label, flag) in truth.items() if flag == training}
        assert below(split, images) == list(expected)
        assert split.labels_N.tolist() == list(expected.values())
        assert split.labels_N.dtype == torch.int64
        assert all(Path(path).is_absolute() and Path(path).is_file() for path in split.paths)


def test_cub200_out_of_its_archive_given_or_fetched(
    tmp_path: Path, web: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = layouts.cub200(tmp_path)
    folder, archive = tmp_path / "CUB_200_2011", tmp_path / "CUB_200_2011.tgz"
    layouts.packed(folder, archive)
    assert sum(len(split.paths) for split in cub200(str(tmp_path))) == len(expected)
    assert not (folder / "parts").exists()  # files that are not read are not unpacked
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "CUB_200_2011",
        "CUB_200_2011.lock",
        archive.name,
    ]
    published(web, monkeypatch, folders, "CUB200", archive)
    there = tmp_path / "elsewhere"
    assert (
        cub200(str(there)).train.labels_N.tolist() == cub200(str(tmp_path)).train.labels_N.tolist()
    )
    monkeypatch.setattr(folders, "CUB200_URL", "http://127.0.0.1:1/CUB_200_2011.tgz")
    # The archive stays unpacked, so no download is needed.
    assert len(cub200(str(there)).test.paths) == 6


def test_cub200_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "CUB200_URL", "http://127.0.0.1:1/CUB_200_2011.tgz")
    with pytest.raises(
        DownloadError,
        match=f"put CUB_200_2011.tgz, md5 97eceeb196236b17998738112f37df78, into {tmp_path}",
    ):
        cub200(str(tmp_path))


@pytest.mark.parametrize(
    ("file", "old", "new", "says"),
    [
        ("images.txt", "2 001", "1 001", r"images\.txt:2: image 1 is in line 1 already"),
        (
            "images.txt",
            "2 001",
            "x 001",
            r"images\.txt:2: expected an image's number and a value, found 'x 001",
        ),
        ("images.txt", "2 001", "-2 001", r"images\.txt:2: expected an image's number"),
        ("images.txt", "2 001", "2\u0662 001", r"images\.txt:2: expected an image's number"),
        (
            "images.txt",
            "2 001",
            "99999999999999999999 001",
            r"images\.txt:2: expected an image's number",
        ),
        ("images.txt", "2 001.B", "2 ../001.B", r"images\.txt:2: there is no image '\.\./001"),
        (
            "images.txt",
            "2 001.Black_footed_Albatross/",
            "2 /etc/passwd/",
            r"images\.txt:2: there is no image",
        ),
        ("images.txt", "_7002.jpg", "_7777.jpg", r"images\.txt:2: there is no image .*_7777\.jpg"),
        (
            "image_class_labels.txt",
            "3 1\n",
            "3 201\n",
            r"image_class_labels\.txt:3: class '201' is not in 1\.\.200",
        ),
        ("image_class_labels.txt", "3 1\n", "3 0\n", r"image_class_labels\.txt:3: class '0'"),
        ("image_class_labels.txt", "3 1\n", "3\n", r"image_class_labels\.txt:3: expected"),
        (
            "image_class_labels.txt",
            "3 1\n",
            "",
            r"image_class_labels\.txt lacks image 3, .* in line 3",
        ),
        (
            "image_class_labels.txt",
            "3 1\n",
            "3 1\n77 1\n",
            r"image_class_labels\.txt has image 77, .*lacks \(line 4\)",
        ),
        (
            "train_test_split.txt",
            "3 1\n",
            "3 2\n",
            r"train_test_split\.txt:3: '2' is neither 0 nor 1",
        ),
        (
            "train_test_split.txt",
            " 0\n",
            " 1\n",
            r"train_test_split\.txt: no image is a test image",
        ),
    ],
)
def test_cub200_whose_texts_do_not_fit(
    tmp_path: Path, file: str, old: str, new: str, says: str
) -> None:
    layouts.cub200(tmp_path)
    path = tmp_path / "CUB_200_2011" / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=says) as caught:
        cub200(str(tmp_path))
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"", "is empty"), (None, "there is no file"), (b"1 \xff\xfe/x.jpg\n", ":1: b'1")],
)
def test_cub200_whose_texts_are_none(tmp_path: Path, content: bytes | None, says: str) -> None:
    layouts.cub200(tmp_path)
    path = tmp_path / "CUB_200_2011/images.txt"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=says):
        cub200(str(tmp_path))


def test_an_archive_of_something_else(tmp_path: Path) -> None:
    layouts.write(tmp_path / "other/images.txt", "1 x\n")
    layouts.packed(tmp_path / "other", tmp_path / "CUB_200_2011.tgz")
    with pytest.raises(ValueError, match="holds no folder CUB_200_2011"):
        cub200(str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "CUB_200_2011.lock",
        "CUB_200_2011.tgz",
    ]


# Any folder of class folders


def both(root: Path, *names: str) -> None:
    """Make image files of these names below root/train and root/val."""
    for split in ("train", "val"):
        for name in names:
            layouts.write(root / split / name, layouts.jpeg(len(name)))


def check_as_torchvision(root: Path) -> None:
    """Check that both splits hold torchvision's images and classes in torchvision's order."""
    for split, name in zip(image_folder(str(root)), ("train", "val"), strict=True):
        expected = ImageFolder(str(root / name)).samples
        assert list(zip(split.paths, split.labels_N.tolist(), strict=True)) == expected


def test_images_below_a_class_folder_are_torchvisions(tmp_path: Path) -> None:
    both(tmp_path / "mixed", "a/2.png", "a/more/1.png", "a/more/deep/0.JPG", "b/x.png")
    both(tmp_path / "deep", "a/x/1.png", "b/y/z/1.png")
    # "a-b" sorts before "a/": torchvision sorts the whole paths of the folders.
    both(
        tmp_path / "order",
        "k/a/1.png",
        "k/a-b/1.png",
        "k/a/c/1.png",
        "k/10.png",
        "k/9.png",
        "l/1.png",
    )
    both(tmp_path / "hidden", "a/.thumbs/1.png", "a/.x.png", ".b/1.png", "c/notes.txt", "c/1.png")
    for name in ("mixed", "deep", "order", "hidden"):
        check_as_torchvision(tmp_path / name)


def test_links_below_a_class_folder_are_followed(tmp_path: Path) -> None:
    both(tmp_path, "a/1.png", "b/1.png")
    layouts.write(tmp_path / "more/2.png", layouts.jpeg(2))
    (tmp_path / "train/a/linked").symlink_to(tmp_path / "more")
    (tmp_path / "train/a/3.png").symlink_to(tmp_path / "more/2.png")
    check_as_torchvision(tmp_path)
    (tmp_path / "train/b/whole").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="train/b/whole is a link to a folder that holds it"):
        image_folder(str(tmp_path))


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (["c/x.heic", "c/y/z.gif"], r"it holds 'x\.heic' \(files of other types: 2\); convert"),
        (["c/y/z.gif"], r"it holds 'y/z\.gif' \(files of other types: 1\); convert"),
        ([], "remove the folder, or fill it"),
    ],
)
def test_a_class_folder_is_to_be_removed_only_if_nothing_is_in_it(
    tmp_path: Path, files: list[str], says: str
) -> None:
    both(tmp_path, "a/1.png", "b/1.png", *files)
    (tmp_path / "train/c").mkdir(exist_ok=True)
    with pytest.raises(ValueError, match=rf"train/c holds no images \(.jpg .*\); {says}") as caught:
        image_folder(str(tmp_path))
    assert ("remove" in str(caught.value)) == (not files)


# ImageNet


def test_imagenet(tmp_path: Path) -> None:
    layouts.imagenet(tmp_path)
    splits = imagenet(str(tmp_path), num_classes=3)
    assert [split.labels_N.tolist() for split in splits] == [[0, 0, 1, 1, 2, 2]] * 2
    assert below(splits.train, tmp_path)[2] == "train/n00000001/n00000001_0.JPEG"


def test_imagenet_laid_out_in_another_way(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"there is no folder {tmp_path}/train"):
        imagenet(str(tmp_path))
    layouts.imagenet(tmp_path)
    with pytest.raises(
        ValueError, match=r"holds 3 classes, and ImageNet has 1000.*dataset=image_folder"
    ):
        imagenet(str(tmp_path))
    flat = tmp_path / "flat"
    layouts.imagenet(flat)
    for path in list((flat / "val").rglob("*.JPEG")):
        path.rename(flat / "val" / path.name)
        if not any(path.parent.iterdir()):
            path.parent.rmdir()
    with pytest.raises(
        ValueError, match=r"flat/val holds no folders: move its images .*ground_truth"
    ):
        imagenet(str(flat), num_classes=3)


# Tiny ImageNet


def test_tiny_imagenet_from_its_folder_or_archive(
    tmp_path: Path, web: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = layouts.tiny_imagenet(tmp_path)
    train, val = tiny_imagenet(str(tmp_path))
    assert train.labels_N.tolist() == [0, 0, 1, 1, 2, 2]
    assert [Path(path).parts[-3] for path in train.paths[::2]] == sorted(WNIDS)
    assert {
        Path(path).name: sorted(WNIDS)[label] for path, label in zip(*val, strict=True)
    } == truth
    archive = tmp_path / "tiny-imagenet-200.zip"
    layouts.packed(tmp_path / "tiny-imagenet-200", archive)
    published(web, monkeypatch, folders, "TINY_IMAGENET", archive)
    again = tiny_imagenet(str(tmp_path / "new"))
    assert [split.labels_N.tolist() for split in again] == [
        train.labels_N.tolist(),
        val.labels_N.tolist(),
    ]
    assert not (tmp_path / "new/tiny-imagenet-200/test").exists()


@pytest.mark.parametrize(
    ("file", "old", "new", "says"),
    [
        (
            "wnids.txt",
            "n02124075",
            "n01443537",
            r"wnids\.txt:\d: 'n01443537' is not a folder name, or is listed twice",
        ),
        ("wnids.txt", "n02124075", "../../x", r"wnids\.txt:1: '\.\./\.\./x' is not a folder name"),
        ("wnids.txt", "n02124075", "n99999999", r"names 'n99999999', and there is no folder"),
        (
            "val/val_annotations.txt",
            "n02124075",
            "n99999999",
            r"val_annotations\.txt:1: 'n99999999' is not a class of",
        ),
        (
            "val/val_annotations.txt",
            "val_1",
            "val_0",
            r"val_annotations\.txt:2: 'val_0\.JPEG' is listed twice",
        ),
        (
            "val/val_annotations.txt",
            "val_1",
            "../val_1",
            r"val_annotations\.txt:2: '\.\./val_1\.JPEG' is listed twice, or is not",
        ),
        (
            "val/val_annotations.txt",
            "\t",
            " ",
            r"val_annotations\.txt:1: '' is not a class of",
        ),
    ],
)
def test_tiny_imagenet_whose_texts_do_not_fit(
    tmp_path: Path, file: str, old: str, new: str, says: str
) -> None:
    layouts.tiny_imagenet(tmp_path)
    path = tmp_path / "tiny-imagenet-200" / file
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match=says):
        tiny_imagenet(str(tmp_path))


# STL-10 and CIFAR-10


def test_stl10_from_its_folder_or_archive(
    tmp_path: Path, web: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, archive = tmp_path / "stl10_binary", tmp_path / "stl10_binary.tar.gz"
    truth = layouts.stl10(folder)
    layouts.write(folder / "unlabeled_X.bin", b"x" * 1000)
    for layout in ("folder", "archive"):
        if layout == "archive":
            layouts.packed(folder, archive)
            published(web, monkeypatch, arrays, "STL10", archive)
        for name, split in zip(("train", "test"), stl10(str(tmp_path)), strict=True):
            pixels_NHWC, labels_N = truth[name]
            assert np.array_equal(split.images_NHWC.numpy(), pixels_NHWC)
            assert split.labels_N.tolist() == labels_N.tolist()
            assert split.images_NHWC.is_contiguous()
    assert not (folder / "unlabeled_X.bin").exists()


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        (
            "train_X.bin",
            b"x" * 5,
            r"train_X\.bin: expected 165888 bytes for the 6 labels of train_y\.bin, found 5",
        ),
        ("train_y.bin", b"", r"expected 0 bytes"),
        ("train_y.bin", bytes([1, 2, 3, 4, 5, 0]), "labels other than"),
        ("train_y.bin", bytes([1, 2, 3, 4, 5, 11]), "labels other than"),
    ],
)
def test_stl10_that_is_damaged(tmp_path: Path, file: str, content: bytes, says: str) -> None:
    layouts.stl10(tmp_path / "stl10_binary")
    (tmp_path / "stl10_binary" / file).write_bytes(content)
    with pytest.raises(ValueError, match=says):
        stl10(str(tmp_path))


@pytest.mark.parametrize("absent", [["test_y.bin"], list(arrays.STL10_FILES)])
def test_stl10_whose_folder_lacks_files_is_not_downloaded(
    tmp_path: Path, absent: list[str], web: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "stl10_binary"
    layouts.stl10(folder)
    for name in absent:
        (folder / name).unlink()
    monkeypatch.setattr(arrays, "STL10_URL", web.url + "stl10_binary.tar.gz")
    with pytest.raises(ValueError, match="remove the folder to have it unpacked again") as caught:
        stl10(str(tmp_path))
    assert str(caught.value).startswith(f"{', '.join(absent)} is missing in {folder}; put it there")
    assert "\n" not in str(caught.value)
    assert web.asked == []


def test_stl10_whose_archive_lacks_a_file(tmp_path: Path) -> None:
    folder = tmp_path / "stl10_binary"
    layouts.stl10(folder)
    (folder / "train_y.bin").unlink()
    layouts.packed(folder, tmp_path / "stl10_binary.tar.gz")
    with pytest.raises(ValueError, match=f"train_y.bin is missing in {folder}; put it there"):
        stl10(str(tmp_path))


def cifar10_batches(count: int = 3) -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    return {
        name: pickle.dumps(
            {b"data": rng.integers(256, size=(count, 3072), dtype=np.uint8),
             b"labels": [i % 10 for i in range(count)],
             b"batch_label": b"x", b"filenames": [b"a.png"] * count}, 2,
        )
        for name in arrays.CIFAR10_MEMBERS
    }  # fmt: skip


@pytest.mark.parametrize("layout", ["folder", "archive"])
def test_cifar10_reads_torchvisions_layouts(tmp_path: Path, layout: str) -> None:
    batches = cifar10_batches()
    if layout == "folder":
        for name, content in batches.items():
            layouts.write(tmp_path / "cifar-10-batches-py" / name, content)
    else:
        with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as tar:
            for name, content in batches.items():
                member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    train, test = cifar10(str(tmp_path))
    raw = [pickle.loads(content, encoding="bytes")[b"data"] for content in batches.values()]
    expected = np.vstack(raw[:5]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    assert np.array_equal(train.images_NHWC.numpy(), expected)
    assert (len(train.labels_N), test.labels_N.tolist()) == (15, [0, 1, 2])


def test_cifar10_that_is_damaged_names_the_batch(tmp_path: Path) -> None:
    for name, content in (cifar10_batches() | {"data_batch_3": b"x"}).items():
        layouts.write(tmp_path / "cifar-10-batches-py" / name, content)
    with pytest.raises(
        ValueError,
        match=r"data_batch_3 is not a CIFAR-10 pickle .*cifar-10-python\.tar\.gz fetched again",
    ):
        cifar10(str(tmp_path))


# A root that is a level off


def put_cifar10(root: Path) -> None:
    for name, content in cifar10_batches().items():
        layouts.write(root / "cifar-10-batches-py" / name, content)


def put_cifar10_archive(root: Path) -> None:
    layouts.write(root / "cifar-10-python.tar.gz", b"never read")


def put_stl10(root: Path) -> None:
    layouts.stl10(root / "stl10_binary")


def put_fashion_mnist(root: Path) -> None:
    for name in arrays.FASHION_MNIST_MD5:
        layouts.write(root / "FashionMNIST/raw" / name, b"never read")


def put_image_folder(root: Path) -> None:
    both(root, "a/1.png", "b/1.png")


def put_image_folder_with_test(root: Path) -> None:
    put_image_folder(root)
    (root / "val").rename(root / "test")


LOADERS = [
    (put_image_folder, image_folder, ["train", "val/a", "notes"]),
    (put_image_folder_with_test, image_folder, ["test", "train/a"]),
    (layouts.imagenet, imagenet, ["train", "val"]),
    (layouts.cub200, cub200, ["CUB_200_2011", "CUB_200_2011/images"]),
    (layouts.tiny_imagenet, tiny_imagenet, ["tiny-imagenet-200", "tiny-imagenet-200/val"]),
    (put_cifar10, cifar10, ["cifar-10-batches-py"]),
    (put_stl10, stl10, ["stl10_binary"]),
    (put_fashion_mnist, fashion_mnist, ["FashionMNIST"]),
]


@pytest.mark.parametrize(
    ("put", "load", "inside"),
    [(put, load, place) for put, load, places in LOADERS for place in places],
)
def test_a_root_too_deep_names_the_folder_that_would_do(
    tmp_path: Path,
    web: Site,
    monkeypatch: pytest.MonkeyPatch,
    put: Callable[[Path], object],
    load: Callable[[str], Splits],
    inside: str,
) -> None:
    monkeypatch.setattr(arrays, "DEBIAN_FASHION_MNIST", tmp_path / "none")
    put(tmp_path / "data")
    root = tmp_path / "data" / inside
    before = sorted(tmp_path.rglob("*"))
    says = rf"root={root} is too deep: .*; set dataset\.root={tmp_path / 'data'}$"
    with pytest.raises(ValueError, match=says) as caught:
        load(str(root))
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("between", ["x", "x/y", "ILSVRC/Data/CLS-LOC"])
@pytest.mark.parametrize(
    ("put", "load"),
    [
        *((put, load) for put, load, _ in LOADERS if put is not put_fashion_mnist),
        (put_cifar10_archive, cifar10),
    ],
)
def test_a_root_too_shallow_names_the_folder_that_would_do(
    tmp_path: Path, put: Callable[[Path], object], load: Callable[[str], Splits], between: str
) -> None:
    put(tmp_path / "data" / between)
    (tmp_path / "data/other").mkdir()
    right = tmp_path / "data" / between
    says = rf"root={tmp_path / 'data'} is too shallow: .*; set dataset\.root={right}$"
    with pytest.raises(ValueError, match=says):
        load(str(tmp_path / "data"))


def test_a_root_too_shallow_for_fashion_mnist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrays, "DEBIAN_FASHION_MNIST", tmp_path / "none")
    put_fashion_mnist(tmp_path / "data/torch")
    with pytest.raises(ValueError, match=rf"shallow: .*; set dataset\.root={tmp_path}/data/torch$"):
        fashion_mnist(str(tmp_path / "data"))


def test_several_folders_that_would_do_are_all_named(tmp_path: Path) -> None:
    put_image_folder(tmp_path / "pets")
    put_image_folder(tmp_path / "cars")
    choices = f"dataset.root={tmp_path}/cars or dataset.root={tmp_path}/pets"
    with pytest.raises(ValueError, match=f"; set {choices}$"):
        image_folder(str(tmp_path))


def test_a_data_set_beside_the_root_does_not_stop_a_download(
    tmp_path: Path, web: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    layouts.cub200(tmp_path)
    monkeypatch.setattr(folders, "CUB200_URL", web.url + "CUB_200_2011.tgz")
    with pytest.raises(DownloadError):
        cub200(str(tmp_path / "elsewhere"))


# The data sets in a job


@pytest.mark.parametrize(
    ("name", "size"), [("cub200", 224), ("imagenet", 224), ("tiny_imagenet", 64)]
)
def test_batches_of_a_job(tmp_path: Path, name: str, size: int) -> None:
    root = tmp_path / "data" / ("imagenet" if name == "imagenet" else "")
    getattr(layouts, name)(root)
    more = ["dataset.num_classes=3"] if name == "imagenet" else []
    job = compose_in(
        tmp_path, f"dataset={name}", "trainer.batch_size=4", "dataset.workers=0", *more
    )
    data = build.build_data(job, torch.device("cpu"))
    x_BCHW, y_B, *_ = next(data.batches(1))
    assert x_BCHW.shape == (4, 3, size, size)
    if name == "cub200":  # 6 training images: the last batch of 2 is left out, as by SDD's code
        assert data.steps_per_epoch == 1
        path = data._splits["test"].paths[0]
        image_CHW = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
        assert image_CHW.shape[1] != image_CHW.shape[2]
        squeezed_CHW = v2.Resize((256, 256), antialias=True)(image_CHW)
        cropped_CHW = v2.CenterCrop(224)(squeezed_CHW)
        assert torch.equal(data.test_images([0])[0], cropped_CHW.permute(1, 2, 0))
    assert len(y_B) == 4
    assert data.test_size == {"cub200": 6, "imagenet": 6, "tiny_imagenet": 3}[name]
    assert int(y_B.max()) < job.dataset.num_classes
