"""Teacher logit maps cached on disk, so that the teacher computes each view of an image only once.

A cache lasts across sweeps. A view is a crop with or without a flip. A CIFAR image with padding 4
has (2 * 4 + 1)^2 * 2 = 162 views, so a logit map can be stored for every view of every image.
The regions of all scales are pooled from the stored map. The stored map may be pooled itself: the
mean of a region is the mean of its cells' means.

Shapes: B batch, C channels, K classes, H W sides, V rows of the cache (images x views of an image).
"""

import hashlib
import json
import logging
import os
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor

from sddlskd.models import Taps
from sddlskd.training.teacher import Teacher

__all__ = ["TeacherCache", "cache_path", "stored_shape"]

log = logging.getLogger(__name__)

DTYPES = {"float16": np.float16, "float32": np.float32}


def cache_path(folder: Path, teacher_sha256: str, about: Mapping[str, Any]) -> Path:
    """Return the path of the cache file for one teacher file and one set of settings.

    Args:
        folder: folder of the cache files.
        teacher_sha256: hash of the teacher file.
        about: everything else that the cached logit maps depend on, such as the data set, the
            augmentation and the number format. JSON must be able to hold the values.

    Returns:
        <folder>/<16 hex digits of the hash of `teacher_sha256` and `about`>.maps
    """
    key = hashlib.sha256(json.dumps([teacher_sha256, about], sort_keys=True).encode()).hexdigest()[
        :16
    ]
    return folder / f"{key}.maps"


def stored_shape(map_KHW: tuple[int, ...], side: int | None) -> tuple[int, ...]:
    """Return the shape (K, H, W) in which the cache stores a logit map of the shape `map_KHW`.

    The shape is (K, side, side) if both sides of the map are multiples of `side`: the map is then
    pooled. Otherwise, or if `side` is None, the shape is `map_KHW`, and the map is stored in full.
    """
    K, H, W = map_KHW
    if side is None or H % side or W % side:
        return map_KHW
    return K, side, side


class TeacherCache:
    """Teacher whose logit maps are cached in a sparse memory-mapped file.

    Call the instance with images (B, C, H, W) and the row of each image in the file, int64 (B,), to
    get the float32 logit map, (B, *map_KHW). A row belongs to one view of one training image, that
    is, to one crop with or without a flip. The teacher computes maps that are not stored yet.
    Several processes may fill the same file at the same time.

    The format float16 keeps 11 significant bits, so a value is rounded by at most 2^-11 of its
    size. Values below 6e-5 have fewer bits and are rounded by at most 2^-25. The format float32
    does not round.

    Args:
        teacher: the teacher that computes missing maps.
        path: the cache file, see `cache_path`. This file and a file of checksums beside it (.sums)
            are made if they are missing.
        rows: V, the number of images times the number of views of an image.
        map_KHW: shape of a stored map, (K, H, W), see `stored_shape`. The teacher's maps are pooled
            to this shape.
        dtype: number format of the file: "float16" or "float32".

    Raises:
        ValueError: If the disk cannot hold the full file, or if an existing file has another size.
            An existing cache file is then unchanged.
        OSError: If the file cannot be made or opened.
    """

    def __init__(
        self, teacher: Teacher, path: Path, *, rows: int, map_KHW: tuple[int, ...], dtype: str
    ) -> None:
        self.teacher = teacher
        cells = int(np.prod(map_KHW)) * np.dtype(DTYPES[dtype]).itemsize
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            present = path.stat().st_blocks * 512 if path.exists() else 0
            free = shutil.disk_usage(path.parent).free
            if rows * cells - present > free:
                raise ValueError(
                    f"teacher.cache={path.parent} needs {rows * cells / 1e9:.1f} GB when full "
                    f"({rows} views of {cells} bytes), {present / 1e9:.1f} GB are already stored "
                    f"and {free / 1e9:.1f} GB are free; "
                    "choose another folder, teacher.cache_dtype=float16, or no cache"
                )
            sums = path.with_suffix(".sums")
            for file, size in ((path, rows * cells), (sums, rows * 4)):
                if file.exists():
                    _check_size(file, size)
                else:
                    # Truncating makes a sparse file: disk blocks are allocated as maps are written.
                    with open(file, "wb") as opened:
                        os.truncate(opened.fileno(), size)
        self._maps: Any = np.memmap(path, DTYPES[dtype], "r+", shape=(rows, *map_KHW))
        # Checksum of each map; 0 for a map that is not stored yet.
        self._sums: Any = np.memmap(sums, np.uint32, "r+", shape=(rows,))
        log.info(
            "teacher.cache: %s holds %.1f%% of %.1f GB",
            path,
            100 * (self._sums != 0).mean(),
            rows * cells / 1e9,
        )

    def __call__(self, images_BCHW: Tensor, views_B: Tensor | None) -> Tensor:
        """Return the logit map of a batch, (B, K, H, W), with the sides of the stored maps.

        Maps that the file does not hold yet are first computed by the teacher and stored. All maps
        have the precision of the file, so that numbers do not depend on whether a view was cached.

        Args:
            images_BCHW: the images.
            views_B: row of each image in the cache, int64 on the CPU. None for views that never
                repeat, such as strong views: the teacher computes full maps, and nothing is stored.

        Returns:
            The maps in float32, on the device of the images. For `views_B` None they are as the
            teacher returns them.
        """
        if views_B is None:
            return self.teacher(images_BCHW)
        rows = views_B.numpy()
        maps_BKHW = np.array(self._maps[rows])
        # A map can differ from its checksum: a crash of the machine may have saved the checksum
        # without the map, or another process may be writing the map right now.
        new = self._sums[rows] != _checksums(maps_BKHW)
        if new.any():
            # Compute the whole batch, not only the missing images: a map then has exactly the bits
            # that it has without a cache.
            asked_BKHW = self._pooled(self.teacher(images_BCHW).float())
            maps_BKHW[new] = asked_BKHW.cpu().numpy().astype(self._maps.dtype)[new]
            self._maps[rows[new]] = maps_BKHW[new]
            self._sums[rows[new]] = _checksums(maps_BKHW[new])
        stored_BKHW = torch.from_numpy(maps_BKHW).float()
        return stored_BKHW.to(
            images_BCHW.device, memory_format=torch.channels_last, non_blocking=True
        )

    def _pooled(self, map_BKHW: Tensor) -> Tensor:
        sides = self._maps.shape[2:]
        if map_BKHW.shape[2:] == sides:
            return map_BKHW
        return F.adaptive_avg_pool2d(map_BKHW, sides)

    def taps(self, images_BCHW: Tensor, views_B: Tensor | None = None) -> Taps:
        """Return the logit map and the inner maps of a batch as the teacher computes them.

        The cache, which holds logit maps alone, is neither read nor filled.

        Args:
            images_BCHW: the images.
            views_B: ignored.

        Returns:
            `Taps` without gradients, see `Teacher.taps`.
        """
        return self.teacher.taps(images_BCHW, views_B)


def _check_size(file: Path, size: int) -> None:
    present = file.stat().st_size
    if present != size:
        raise ValueError(
            f"{file} has {present} bytes instead of {size}: it is no file of this cache; "
            "delete it, or choose another folder as teacher.cache"
        )


def _checksums(maps_BKHW: Any) -> Any:
    """Return the CRC-32 of each map, (B,) uint32; never 0, which marks a missing map."""
    return np.array([zlib.crc32(map_KHW) or 1 for map_KHW in maps_BKHW], np.uint32)
