"""Make small data sets of real JPEG files in the layouts of the published data sets."""

import io
import tarfile
import zipfile
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

CUB_CLASSES = ("001.Black_footed_Albatross", "002.Laysan_Albatross", "200.Common_Yellowthroat")
WNIDS = ("n02124075", "n01443537", "n04067472")  # not sorted, as in wnids.txt


@cache
def jpeg(shade: int, size: tuple[int, int] = (40, 30)) -> bytes:
    """Return a JPEG file of one colour with a gradient; `size` is (width, height)."""
    width, height = size
    pixels_HWC = np.full((height, width, 3), shade, np.uint8)
    pixels_HWC[..., 0] = np.linspace(0, 255, width, dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write(path: Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def cub200(root: Path, per_class: int = 4) -> dict[str, tuple[int, int]]:
    """Make root/CUB_200_2011 as the archive unpacks it.

    Return {path below images/: (class from 0, whether the image is for training)}.
    """
    folder, truth = root / "CUB_200_2011", {}
    images, labels, split = [], [], []
    for name in CUB_CLASSES:
        bird = name.partition(".")[2]
        for i in range(per_class):
            image, training = len(images) + 1, int(i % 2 == 0)
            path = f"{name}/{bird}_{i:04d}_{7000 + image}.jpg"
            write(folder / "images" / path, jpeg(20 * image % 256))
            truth[path] = (int(name[:3]) - 1, training)
            images.append(f"{image} {path}\n")
            labels.append(f"{image} {int(name[:3])}\n")
            split.append(f"{image} {training}\n")
    write(folder / "images.txt", "".join(images))
    write(folder / "image_class_labels.txt", "".join(labels))
    write(folder / "train_test_split.txt", "".join(split))
    write(folder / "classes.txt", "".join(f"{int(name[:3])} {name}\n" for name in CUB_CLASSES))
    write(folder / "parts/parts.txt", "1 back\n")
    return truth


def imagenet(root: Path, classes: int = 3, per_class: int = 2) -> None:
    """Make root/train and root/val in the layout of torchvision's ImageFolder."""
    for split in ("train", "val"):
        for label in range(classes):
            for i in range(per_class):
                name = (
                    f"n{label:08d}_{i}.JPEG"
                    if split == "train"
                    else f"ILSVRC2012_val_{i + label * 10:08d}.JPEG"
                )
                write(root / split / f"n{label:08d}" / name, jpeg(10 * label % 256))


def tiny_imagenet(root: Path, per_class: int = 2) -> dict[str, str]:
    """Make root/tiny-imagenet-200 as the archive unpacks it; return {image of val: wnid}."""
    folder = root / "tiny-imagenet-200"
    write(folder / "wnids.txt", "".join(f"{name}\n" for name in WNIDS))
    truth, lines = {}, []
    for label, name in enumerate(WNIDS):
        for i in range(per_class):
            write(
                folder / "train" / name / "images" / f"{name}_{i}.JPEG", jpeg(50 * label, (64, 64))
            )
        write(folder / "train" / name / f"{name}_boxes.txt", f"{name}_0.JPEG\t0\t0\t62\t62\n")
        image = f"val_{label}.JPEG"
        write(folder / "val/images" / image, jpeg(50 * label, (64, 64)))
        truth[image] = name
        lines.append(f"{image}\t{name}\t0\t32\t44\t62\n")
    write(folder / "val/val_annotations.txt", "".join(lines))
    write(folder / "test/images/test_0.JPEG", jpeg(0, (64, 64)))
    return truth


def stl10(folder: Path, train: int = 6, test: int = 4) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Make folder/{train,test}_{X,y}.bin; return {split: (pixels N H W C, classes from 0)}."""
    rng, truth = np.random.default_rng(0), {}
    for name, count in (("train", train), ("test", test)):
        pixels_NHWC, labels_N = (
            rng.integers(256, size=(count, 96, 96, 3), dtype=np.uint8),
            np.arange(count) % 10,
        )
        # "The images are stored in column-major order, one channel at a time" (STL-10's page)
        content = b"".join(
            image[:, :, c].tobytes(order="F") for image in pixels_NHWC for c in range(3)
        )
        write(folder / f"{name}_X.bin", content)
        write(folder / f"{name}_y.bin", (labels_N + 1).astype(np.uint8).tobytes())
        truth[name] = pixels_NHWC, labels_N
    return truth


def packed(folder: Path, archive: Path) -> None:
    """Pack the folder into a .tgz or .zip that contains its name, then remove the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as zipped:
            for path in files:
                zipped.write(path, path.relative_to(folder.parent))
    else:
        with tarfile.open(archive, "w:gz") as tar:
            tar.add(folder, folder.name)
    for path in files:
        path.unlink()
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir()
    folder.rmdir()
