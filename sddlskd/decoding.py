"""From image files to uint8 pixels of one size, in worker processes; whatever is wrong with a file has a name.

Shapes: N files, B images decoded together, P places for such, H W C pixel rows, columns and channels.

Pillow decodes and torch resizes: a crop of 370x275 to 224x224 takes it a third of Pillow's time, and differs from
Pillow by one level of 255, rarely two. Where a random crop of a JPEG has twice the pixels it needs even at 1/2, 1/4 or
1/8 of the image's size, that is what is decoded. A worker is a fork by torch's DataLoader: it holds no data set, is
told what to decode, and gives back pixels in shared memory.
"""

import ctypes
import itertools
import math
import mmap
import os
import random
import signal
import stat
import sys
import threading
import warnings
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sddlskd.meter import meter

__all__ = [
    "CHUNK",
    "Chunk",
    "Fault",
    "Job",
    "Unreadable",
    "View",
    "decode",
    "decode_all",
    "decoded",
    "default_workers",
]

CHUNK = 16  # images a worker is asked for at once
RATIO = (3 / 4, 4 / 3)  # width by height of a random crop
PIXEL_LIMIT = 100_000_000  # pixels of an image
MOST_WORKERS = 16  # unless more are asked for
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
NAMED = {
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".png": "PNG",
    ".bmp": "BMP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
}
KINDS = {
    "1": "black and white",
    "L": "grey",
    "LA": "alpha",
    "RGBA": "alpha",
    "P": "palette",
    "PA": "palette",
}
_ORIENTATION = 0x0112  # EXIF's tag; 1: upright
_PR_SET_PDEATHSIG = 1


class Unreadable(ValueError):
    """An image file that gives no pixels; the text says why."""


class View(NamedTuple):
    """What is made of every image."""

    size: int  # pixels of the side
    area: tuple[float, float] = (0.08, 1.0)  # part of the image's area that a random crop takes
    centre: float = 0.875  # side of the centre crop, as part of the image's shorter side
    pixel_limit: int = PIXEL_LIMIT  # pixels; a larger image is refused by its header
    upright: bool = False  # turn as the EXIF orientation says


class Job(NamedTuple):
    """One image to decode."""

    path: str
    draw: str | None  # what a random crop follows from; None: the centre crop


class Fault(NamedTuple):
    """Something about an image of a chunk."""

    place: int  # in the chunk
    why: str  # what is wrong, or, where `bad` is false, out of the ordinary
    bad: bool  # there are no pixels


class Chunk(NamedTuple):
    """Images decoded together; those of bad files are black."""

    pixels_BHWC: Tensor  # uint8
    faults: list[Fault]


def decode(job: Job, view: View) -> tuple[Tensor, list[str]]:
    """size x size x 3 uint8 pixels of an image file, and what is out of the ordinary about it.

    A random crop takes `area` of the image at a width by height in RATIO, as torchvision's RandomResizedCrop; the
    centre crop is torchvision's Resize(size / centre) and CenterCrop(size): bilinear, antialiased. Grey, palette and
    CMYK images become RGB, alpha is dropped, 16 bits become 8, and an image is taken as it is stored, not as its EXIF
    orientation says, unless `upright`: all but the 16 bits as torchvision's ImageFolder does. Raises Unreadable.
    """
    with _opened(job.path) as file:
        try:
            with warnings.catch_warnings(), _without_pillows_limit():
                warnings.simplefilter("ignore")  # of EXIF data and palettes that Pillow finds odd
                return _decode(file, job, view)
        except (Unreadable, MemoryError):
            raise
        except Exception as error:  # a damaged file can raise anything at all
            reason = str(error).partition("<_io")[0].strip() or "no reason given"
            raise Unreadable(f"{type(error).__name__}: {reason}") from error


def _decode(file: IO[bytes], job: Job, view: View) -> tuple[Tensor, list[str]]:
    image: Image.Image = Image.open(file, formats=FORMATS)
    if math.prod(image.size) > view.pixel_limit:
        raise Unreadable(
            f"{image.width}x{image.height} are more than {view.pixel_limit} pixels (dataset.pixel_limit)"
        )
    odd = _oddities(image, job.path)
    if view.upright and image.getexif().get(_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if job.draw is not None:
        left, top, width, height = random_crop(
            random.Random(job.draw), image.width, image.height, view.area
        )
        full = image.width
        shrink = max(
            1, min(width, height) // (2 * view.size)
        )  # twice as many pixels as needed, for a fair resize
        image.draft(
            None, (image.width // shrink, image.height // shrink)
        )  # JPEG alone, to 1/2, 1/4 or 1/8
        if (
            scale := round(full / image.width)
        ) > 1:  # Pillow's resize takes a box between pixels, torch's does not
            box = (left / scale, top / scale, (left + width) / scale, (top + height) / scale)
            return _rgb(image.resize((view.size, view.size), Image.Resampling.BILINEAR, box)), odd
        return _resized(
            _rgb(image.crop((left, top, left + width, top + height))), view.size, view.size
        ), odd
    short = round(view.size / view.centre)
    width, height = _with_shorter_side(short, image.width, image.height)
    if width * height > view.pixel_limit:  # a narrow strip of few pixels, such as 1x6000
        raise Unreadable(
            f"{image.width}x{image.height} become {width}x{height} for the centre crop, more than {view.pixel_limit} "
            "pixels (dataset.pixel_limit)"
        )
    whole_HWC = _resized(_rgb(image), width, height)
    top, left = round((height - view.size) / 2), round((width - view.size) / 2)
    return whole_HWC[top : top + view.size, left : left + view.size], odd


def random_crop(
    draw: random.Random, width: int, height: int, area: tuple[float, float]
) -> tuple[int, int, int, int]:
    """(left, top, width, height) of a crop: ten tries to find one that fits, else the largest in the centre.

    Source: torchvision.transforms.RandomResizedCrop.get_params. Only `random()` is drawn from, whose numbers Python
    promises to keep.
    """

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * draw.random()

    for _ in range(10):
        pixels = width * height * uniform(*area)
        ratio = math.exp(uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(draw.random() * (width - w + 1)), int(draw.random() * (height - h + 1)), w, h
    w = min(width, round(height * RATIO[1]))
    h = min(height, round(width / RATIO[0]))
    return (width - w) // 2, (height - h) // 2, w, h


def _with_shorter_side(short: int, width: int, height: int) -> tuple[int, int]:
    """(width, height) of the same shape, as torchvision rounds it."""
    if width <= height:
        return short, int(short * height / width)
    return int(short * width / height), short


def _resized(pixels_HWC: Tensor, width: int, height: int) -> Tensor:
    if pixels_HWC.shape[:2] == (height, width):
        return pixels_HWC
    x_1CHW = pixels_HWC[None].permute(
        0, 3, 1, 2
    )  # in this order it is channels_last, and so is what comes out
    return F.interpolate(x_1CHW, (height, width), mode="bilinear", antialias=True).permute(
        0, 2, 3, 1
    )[0]


def _rgb(image: Image.Image) -> Tensor:
    if image.mode in ("I", "I;16", "I;16B", "I;16L"):
        grey_HW = (np.array(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        return torch.from_numpy(grey_HW)[..., None].repeat(1, 1, 3)
    if image.mode == "F":
        raise Unreadable("its pixels are floating-point numbers")
    return torch.from_numpy(np.array(image if image.mode == "RGB" else image.convert("RGB")))


def _oddities(image: Image.Image, path: str) -> list[str]:
    """What sets an image apart from an ordinary RGB photograph."""
    odd = (
        []
        if image.mode == "RGB"
        else [KINDS.get(image.mode, "16 bits" if image.mode[0] == "I" else image.mode)]
    )
    if "transparency" in image.info and image.mode != "P":
        odd.append("alpha")
    if "exif" in image.info and (orientation := image.getexif().get(_ORIENTATION, 1)) != 1:
        odd.append(f"EXIF orientation {orientation}")
    named = NAMED.get(os.path.splitext(path)[1].lower(), image.format)
    if image.format not in (named, "MPO"):
        odd.append(f"{image.format} in the name of {named}")
    return odd


@contextmanager
def _opened(path: str) -> Iterator[IO[bytes]]:
    """A regular file that is not empty; a pipe or a device is refused at once, not waited for."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise Unreadable(error.strerror or str(error)) from error
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_size == 0:
        os.close(descriptor)
        raise Unreadable(
            "the file is empty" if stat.S_ISREG(found.st_mode) else "it is no regular file"
        )
    with open(descriptor, "rb") as file:
        yield file


@contextmanager
def _without_pillows_limit() -> Iterator[None]:
    """Ours is checked instead: Pillow's is one for the whole process and warns before it refuses."""
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


class _Decoder(Dataset[tuple[int, int, list[Fault]]]):
    """What a worker does: (place in the ring, jobs) -> (that place, how many, faults), the pixels left in the ring."""

    def __init__(self, view: View, ring_PBHWC: Tensor) -> None:
        self.view, self.ring_PBHWC = view, ring_PBHWC

    def __getitem__(self, item: tuple[int, Sequence[Job]]) -> tuple[int, int, list[Fault]]:
        place, jobs = item
        faults = []
        for n, job in enumerate(jobs):
            try:
                self.ring_PBHWC[place, n], odd = decode(job, self.view)
                faults += [Fault(n, why, bad=False) for why in odd]
            except Unreadable as error:
                self.ring_PBHWC[place, n] = 0
                faults.append(Fault(n, str(error), bad=True))
        return place, len(jobs), faults


def default_workers(ranks: int = 1) -> int:
    """Decode processes of one of so many ranks: the cores that it may use, shared by the ranks of its machine.

    Where each rank is a task of SLURM, all cores of the task are its own.
    """
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    sharing = min(ranks, int(os.environ.get("LOCAL_WORLD_SIZE", ranks)))
    if of_task := int(os.environ.get("SLURM_CPUS_PER_TASK", 0)):
        cores = of_task
        sharing = 1 if int(os.environ.get("SLURM_NTASKS", 1)) > 1 else sharing
    return max(1, min(MOST_WORKERS, cores // sharing))


def decoded(
    chunks: Iterable[Sequence[Job]], view: View, *, workers: int, ahead: int = 2
) -> Generator[Chunk]:
    """The chunks, decoded by so many worker processes (0: by this one) and in their order.

    `chunks`, of up to CHUNK jobs, is read in this process, `ahead` chunks a worker in advance. The pixels of a chunk
    are good until the next one is asked for. Raises ChildProcessError where a worker dies. The workers end with the
    iterator.
    """
    # Memory that the workers inherit and write to, so that no pixels are sent. It is anonymous: it has no place in
    # /dev/shm, which containers keep small, and nobody can leave it behind.
    shape = (
        workers * ahead + 1,
        CHUNK,
        view.size,
        view.size,
        3,
    )  # all that are under way, and the one in use
    with torch.inference_mode(
        False
    ):  # an evaluation may be what asks first, and training what writes next
        ring_PBHWC = torch.frombuffer(mmap.mmap(-1, math.prod(shape)), dtype=torch.uint8).view(
            shape
        )
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="This DataLoader will create"
        )  # more workers than cores
        loader = DataLoader(
            _Decoder(view, ring_PBHWC),
            batch_size=None,
            sampler=zip(itertools.cycle(range(len(ring_PBHWC))), chunks),
            collate_fn=_as_it_is,
            num_workers=workers,
            prefetch_factor=ahead if workers else None,
            generator=torch.Generator(),  # its own: the process's is not drawn from
            worker_init_fn=_Start(os.getpid()) if workers else None,
            multiprocessing_context="fork" if workers else None,
        )
        before = signal.getsignal(signal.SIGCHLD)
        blocked = signal.pthread_sigmask(
            signal.SIG_BLOCK, {signal.SIGTERM}
        )  # in every thread a worker has: see _Start
        try:
            stream = iter(loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    # torch would raise from its handler for SIGCHLD, in the middle of whatever the trainer does when a worker dies; it
    # looks for dead workers by itself, every five seconds that it waits for one.
    if before is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, before)
    try:
        for place, count, faults in stream:
            yield Chunk(ring_PBHWC[place, :count], faults)
    except (RuntimeError, OSError, EOFError) as error:  # torch's ways to say so
        raise ChildProcessError(
            f"a process that decodes images is lost ({error}); if memory ran out, lower dataset.workers={workers}"
        ) from error


def decode_all(paths: Sequence[str], size: int, what: str, workers: int | None = None) -> Tensor:
    """images_NHWC, uint8, of all these files, held in memory: the centre square of each, size x size.

    what: what the meter calls them. Raises ValueError naming the first file that cannot be read.
    """
    images_NHWC = torch.empty(len(paths), size, size, 3, dtype=torch.uint8)
    jobs = [Job(path, None) for path in paths]
    firsts = range(0, len(jobs), CHUNK)
    workers = default_workers() if workers is None else workers
    chunks = decoded((jobs[n : n + CHUNK] for n in firsts), View(size, centre=1.0), workers=workers)
    with meter(what, len(paths), "images") as show:
        for first, chunk in zip(firsts, chunks, strict=True):
            for fault in chunk.faults:
                if fault.bad:
                    raise ValueError(
                        f"{paths[first + fault.place]}: {fault.why}; put the right file there, or remove it"
                    )
            images_NHWC[first : first + CHUNK] = chunk.pixels_BHWC
            show(first + len(chunk.pixels_BHWC))
    return images_NHWC


def _as_it_is(done: Any) -> Any:
    return done


class _Start:
    """How a worker begins: it ends with its parent or at its word, and leaves everybody else's signals to the parent.

    A terminal and SLURM signal all processes of a job, and the parent goes on reading until it has saved. Who sent a
    signal only `sigwaitinfo` tells; elsewhere than on Linux anybody's SIGTERM ends a worker.
    """

    def __init__(self, parent: int) -> None:
        self.parent = parent

    def __call__(self, worker: int) -> None:
        for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            threading.Thread(target=self._heed_parent, daemon=True).start()
        else:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        if os.getppid() != self.parent:
            os._exit(1)

    def _heed_parent(self) -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != self.parent:
            pass
        os._exit(0)
