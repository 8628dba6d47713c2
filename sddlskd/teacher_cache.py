"""Teacher maps kept on disk: each view of each image is asked of the teacher once, in this sweep or an earlier one.

Shapes: B batch, C channels, K classes, H W sides, V rows of the cache (images x views of an image).

Crops and flips are discrete ((2 * padding + 1)^2 * 2 views an image; 162 on CIFAR), so the finest logit map of every
(image, view) can be stored, and every scale derives from it.
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
from filelock import FileLock
from torch import Tensor

from sddlskd.teacher import Teacher

__all__ = ["TeacherCache", "cache_path"]

log = logging.getLogger(__name__)

DTYPES = {"float16": np.float16, "float32": np.float32}


def cache_path(folder: Path, teacher_sha256: str, about: Mapping[str, Any]) -> Path:
    """The cache of one teacher file, data set, augmentation and number format."""
    key = hashlib.sha256(json.dumps([teacher_sha256, about], sort_keys=True).encode()).hexdigest()[
        :16
    ]
    return folder / f"{key}.maps"


class TeacherCache:
    """A teacher that remembers, in a sparse memory-mapped file that several processes fill side by side.

    rows: images x views; map_KHW: shape of a logit map; dtype: float16 or float32. Calling it with images_BCHW and
    views_B (their rows, on the CPU) gives the logit map B K H W in float32. What it gives is always what the file
    holds, so that numbers do not depend on whether a view was new. float16 keeps 11 bits: it rounds by at most
    2^-11 of a value's size (below 6e-5, where it has fewer bits, by at most 2^-25); float32 changes nothing.

    Raises ValueError, before writing, where the disk cannot hold the full file.
    """

    def __init__(
        self, teacher: Teacher, path: Path, *, rows: int, map_KHW: tuple[int, ...], dtype: str
    ) -> None:
        self.teacher, self.name = teacher, teacher.name
        cells = int(np.prod(map_KHW)) * np.dtype(DTYPES[dtype]).itemsize
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            present = path.stat().st_blocks * 512 if path.exists() else 0
            free = shutil.disk_usage(path.parent).free
            if rows * cells - present > free:
                raise ValueError(
                    f"teacher.cache={path.parent} needs {rows * cells / 1e9:.1f} GB when full ({rows} views of {cells} "
                    f"bytes), {present / 1e9:.1f} GB are there and {free / 1e9:.1f} GB are free; "
                    "choose another folder, teacher.cache_dtype=float16, or no cache"
                )
            sums = path.with_suffix(".sums")
            for file, size in ((path, rows * cells), (sums, rows * 4)):
                if not file.exists():
                    with open(file, "wb") as opened:
                        os.truncate(opened.fileno(), size)  # sparse: blocks are taken as maps come
        self._maps: Any = np.memmap(path, DTYPES[dtype], "r+", shape=(rows, *map_KHW))
        self._sums: Any = np.memmap(sums, np.uint32, "r+", shape=(rows,))  # 0: the map is not there
        log.info(
            "teacher.cache: %s holds %.1f%% of %.1f GB",
            path,
            100 * (self._sums != 0).mean(),
            rows * cells / 1e9,
        )

    def __call__(self, images_BCHW: Tensor, views_B: Tensor) -> Tensor:
        rows = views_B.numpy()
        maps_BKHW = np.array(self._maps[rows])
        # A crash of the machine may leave a sum without its map, and another process may be amid a map.
        new = self._sums[rows] != _checksums(maps_BKHW)
        if new.any():
            # The whole batch, not the new images alone: so a map has the bits that it has without a cache.
            asked_BKHW = self.teacher(images_BCHW).float().cpu().numpy().astype(self._maps.dtype)
            maps_BKHW[new] = asked_BKHW[new]
            self._maps[rows[new]] = maps_BKHW[new]
            self._sums[rows[new]] = _checksums(maps_BKHW[new])
        stored_BKHW = torch.from_numpy(maps_BKHW).float()
        return stored_BKHW.to(
            images_BCHW.device, memory_format=torch.channels_last, non_blocking=True
        )


def _checksums(maps_BKHW: Any) -> Any:
    """CRC-32 of each map, never 0."""
    return np.array([zlib.crc32(map_KHW) or 1 for map_KHW in maps_BKHW], np.uint32)
