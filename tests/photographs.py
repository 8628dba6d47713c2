"""Make small JPEG files with the spectrum of photographs."""

from pathlib import Path

import numpy as np
from PIL import Image

__all__ = ["class_folders", "photograph"]


def photograph(seed: int, width: int, height: int) -> Image.Image:
    """Return an image of noise whose amplitude falls as 1/frequency, mostly in brightness.

    The amplitude of natural images falls in the same way (Field 1987).
    """
    random = np.random.default_rng(seed)
    down, right = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    frequency = np.maximum(np.hypot(down, right), 1 / max(height, width))
    waves_CHW = np.fft.rfft2(random.standard_normal((3, height, width))) / frequency
    x_CHW = np.fft.irfft2(waves_CHW, s=(height, width))
    x_CHW = (x_CHW - x_CHW.mean()) / x_CHW.std()
    x_CHW = 0.35 * x_CHW + 1.2 * x_CHW.mean(0)
    return Image.fromarray(np.clip(128 + 50 * x_CHW, 0, 255).astype(np.uint8).transpose(1, 2, 0))


def class_folders(
    root: Path, classes: int, each: int, *, test: int = 1, width: int = 60, height: int = 44
) -> Path:
    """Make root/train/<class>/ and root/val/<class>/ of JPEG files, and return `root`.

    Args:
        root: folder of the data set.
        classes: number of classes.
        each: training images of a class.
        test: images of a class in val.
        width: width of the images.
        height: height of the images.
    """
    seed = 0
    for split, count in (("train", each), ("val", test)):
        for label in range(classes):
            folder = root / split / f"class_{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                photograph(seed := seed + 1, width, height).save(
                    folder / f"{number:04}.jpg", quality=90
                )
    return root
