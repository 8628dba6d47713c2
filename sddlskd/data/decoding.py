"""Decode image files to uint8 pixels of one size, in worker processes.

If an image cannot be decoded or is unusual, the result says why.

Shapes: N files, B images decoded together, P places of the ring buffer (one chunk each), H W C
pixel rows, columns and channels. The ring buffer is memory that the workers share with their parent
process.

Pillow decodes and torch resizes: for a crop of 370x275 to 224x224, torch takes a third of Pillow's
time. The result differs from Pillow's by one level of 255, rarely by two. A JPEG is decoded at 1/2,
1/4 or 1/8 of its size if a random crop then still has at least twice as many pixels per side as the
result. A worker is a fork made by torch's DataLoader. A worker holds no data set: each request
names the files to decode, and the worker writes their pixels to the ring buffer.
"""

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

from sddlskd.processes.parent import end_with_parent
from sddlskd.terminal.meter import meter

__all__ = [
    "CHUNK",
    "Chunk",
    "Fault",
    "ImageTransform",
    "Job",
    "Unreadable",
    "decode",
    "decode_all",
    "decoded",
    "default_workers",
]

CHUNK = 16  # images that a worker decodes per request
RATIO = (3 / 4, 4 / 3)  # range of width / height of a random crop
PIXEL_LIMIT = 100_000_000  # default limit of an image's pixels
MOST_WORKERS = 16  # limit of the default number of workers
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
PILLOWS_ERRORS = (OSError, SyntaxError)  # whose message says everything about a damaged file
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
_ORIENTATION = 0x0112  # EXIF tag of the orientation; its value is 1 for upright


class Unreadable(ValueError):
    """Error for an image file that cannot be decoded; the message says why."""


class ImageTransform(NamedTuple):
    """Settings of the square crop that `decode` cuts from every image.

    Attributes:
        size: side of the crop in pixels, after resizing.
        area: smallest and largest fraction of the image's area that a random crop covers.
        centre: side of the centre crop as a fraction of the image's shorter side, above 0 and at
            most 1.
        pixel_limit: largest number of pixels (width * height) of an image. `decode` raises
            Unreadable for a larger image, before its pixels are decoded. If the image is resized
            for a centre crop, the limit also holds for its new size.
        upright: whether to turn the image as its EXIF orientation says; if False, the orientation
            is ignored.
        squeezed: whether the image, whatever its shape, is first resized to a square with the side
            size / centre, from which random and centre crops are cut. `area` is then not read.
    """

    size: int
    area: tuple[float, float] = (0.08, 1.0)
    centre: float = 0.875
    pixel_limit: int = PIXEL_LIMIT
    upright: bool = False
    squeezed: bool = False

    @property
    def side(self) -> int:
        """Return the pixels of an image's shorter side after resizing, before a centre crop."""
        return round(self.size / self.centre)


class Job(NamedTuple):
    """Request to decode one image file.

    Attributes:
        path: path of the image file.
        draw: seed of the random crop, any text; None for the centre crop.
    """

    path: str
    draw: str | None


class Fault(NamedTuple):
    """Problem of one image, which either cannot be decoded or is unusual.

    Attributes:
        place: index of the image in its `Chunk`, from 0.
        why: the problem, as words for a message, such as "the file is empty" or "grey".
        bad: True if the image cannot be decoded, False if the image is only unusual.
    """

    place: int
    why: str
    bad: bool


class Chunk(NamedTuple):
    """Up to 16 (CHUNK) images that were decoded together.

    Attributes:
        pixels_BHWC: pixels (B, size, size, 3), uint8, in the order of the requests (`Job`). An
            image that cannot be decoded is black.
        faults: problems of the images; an image can have none or several.
    """

    pixels_BHWC: Tensor
    faults: list[Fault]


def decode(job: Job, view: ImageTransform) -> tuple[Tensor, list[str]]:
    """Return a square crop of an image file, and what is unusual about the image.

    The kind of crop depends on `job.draw`, and size and centre are those of `view`:

    - A text is the seed of a `random_crop`, which is resized to size x size pixels. If
      `view.squeezed` is set, the crop is instead that of torchvision's RandomCrop(size), cut from
      the image resized to a square with the side size / centre.
    - None stands for the centre crop: that of torchvision's Resize(size / centre) and
      CenterCrop(size). If `view.squeezed` is set, the image is instead resized to a square with the
      side size / centre before CenterCrop(size).

    All images are resized bilinearly with antialiasing. Grey, palette and CMYK images become RGB,
    and alpha is dropped, as in torchvision's ImageFolder. Images of 16 bits keep the higher 8 bits.
    The EXIF orientation is ignored unless `view.upright` is set.

    Args:
        job: file to decode and kind of crop.
        view: size of the crop, range of its area, and limits.

    Returns:
        (pixels, texts). The pixels are RGB, uint8, (size, size, 3), on the CPU. Each text names an
        unusual property of the file, such as "grey", "alpha", "EXIF orientation 6" or "PNG named as
        JPEG". The list is empty for an upright RGB image under a matching file name.

    Raises:
        Unreadable: If the image cannot be decoded: the file is missing, empty, damaged, not a
            regular file or not a JPEG, PNG, PPM, BMP, TIFF, WebP or GIF file, its pixels are
            floating-point numbers, the image has more pixels than `view.pixel_limit`, or any other
            problem except too little memory.
        MemoryError: If the memory does not suffice.
    """
    with _open_image(job.path) as file:
        try:
            with warnings.catch_warnings(), _without_pillows_limit():
                # Pillow warns of unusual EXIF data and palettes.
                warnings.simplefilter("ignore")
                return _decode(file, job, view)
        except (Unreadable, MemoryError):
            raise
        except Exception as error:  # a damaged file can raise any exception
            reason = str(error).partition("<_io")[0].strip() or "no reason given"
            if not isinstance(error, PILLOWS_ERRORS):
                reason = f"{type(error).__name__}: {reason}"
            raise Unreadable(reason) from error


def _decode(file: IO[bytes], job: Job, view: ImageTransform) -> tuple[Tensor, list[str]]:
    image: Image.Image = Image.open(file, formats=FORMATS)
    if math.prod(image.size) > view.pixel_limit:
        raise Unreadable(
            f"{image.width}x{image.height} are more than {view.pixel_limit} pixels "
            "(dataset.pixel_limit)"
        )
    odd = _oddities(image, job.path)
    if view.upright and image.getexif().get(_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if job.draw is not None and not view.squeezed:
        return _random_square(image, job.draw, view), odd
    return _square_of_whole(image, job.draw, view), odd


def _random_square(image: Image.Image, draw: str, view: ImageTransform) -> Tensor:
    """Return a `random_crop` of an image, resized to (size, size, 3); `draw` is its seed."""
    left, top, width, height = random_crop(
        random.Random(draw), image.width, image.height, view.area
    )
    full_width = image.width
    # Keep twice as many pixels per side as needed, for a good resize.
    shrink = max(1, min(width, height) // (2 * view.size))
    # Only JPEG files shrink here, to 1/2, 1/4 or 1/8.
    image.draft(None, (image.width // shrink, image.height // shrink))
    # Pillow's resize accepts a box with fractional borders; torch's does not.
    if (scale := round(full_width / image.width)) > 1:
        box = (left / scale, top / scale, (left + width) / scale, (top + height) / scale)
        return _rgb(image.resize((view.size, view.size), Image.Resampling.BILINEAR, box))
    cut_HWC = _rgb(image.crop((left, top, left + width, top + height)))
    return _resized(cut_HWC, view.size, view.size)


def _square_of_whole(image: Image.Image, draw: str | None, view: ImageTransform) -> Tensor:
    """Return a square (size, size, 3) of the whole image after resizing.

    `draw` is the seed of the square's place; None for the centre. Raise Unreadable if the resized
    image has too many pixels.
    """
    short = view.side
    width = height = short
    if not view.squeezed:
        width, height = _with_shorter_side(short, image.width, image.height)
    # A narrow strip of few pixels, such as 1x6000, becomes very large.
    if width * height > view.pixel_limit:
        raise Unreadable(
            f"{image.width}x{image.height} become {width}x{height} for the crop, "
            f"more than {view.pixel_limit} pixels (dataset.pixel_limit)"
        )
    whole_HWC = _resized(_rgb(image), width, height)
    top, left = round((height - view.size) / 2), round((width - view.size) / 2)
    if draw is not None:
        numbers = random.Random(draw)
        top, left = numbers.randint(0, height - view.size), numbers.randint(0, width - view.size)
    return whole_HWC[top : top + view.size, left : left + view.size]


def random_crop(
    draw: random.Random, width: int, height: int, area: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Return the place and size of a random crop of an image.

    Up to ten crops are drawn, and the first that fits into the image is taken. The area of a crop
    is uniform in the range `area`. The logarithm of width / height is uniform, with width / height
    between 3/4 and 4/3. The place of the crop in the image is uniform. If none of the ten fits, the
    result is the largest crop in the centre whose width / height is between 3/4 and 4/3.

    Source: torchvision.transforms.RandomResizedCrop.get_params.

    Args:
        draw: source of random numbers, which the call advances.
        width: width of the image in pixels.
        height: height of the image in pixels.
        area: smallest and largest fraction of the image's area that the crop covers.

    Returns:
        (left, top, width, height) of the crop, in whole pixels.
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
    """Return the (width, height) of an image resized so that its shorter side is `short` pixels.

    The longer side is rounded down, as in torchvision.
    """
    if width <= height:
        return short, int(short * height / width)
    return int(short * width / height), short


def _resized(pixels_HWC: Tensor, width: int, height: int) -> Tensor:
    if pixels_HWC.shape[:2] == (height, width):
        return pixels_HWC
    # The permuted tensor is channels_last, and so is the resized one.
    x_1CHW = pixels_HWC[None].permute(0, 3, 1, 2)
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
    """Return what distinguishes an image from an upright RGB image, as short texts.

    A file name whose extension belongs to another image format counts, too.
    """
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
        odd.append(f"{image.format} named as {named}")
    return odd


@contextmanager
def _open_image(path: str) -> Iterator[IO[bytes]]:
    """Open a regular file that is not empty. Raise Unreadable for anything else.

    A pipe or a device is refused at once: the call does not wait for its data.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise Unreadable(error.strerror or str(error)) from error
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_size == 0:
        os.close(descriptor)
        raise Unreadable(
            "the file is empty" if stat.S_ISREG(found.st_mode) else "it is not a regular file"
        )
    with open(descriptor, "rb") as file:
        yield file


@contextmanager
def _without_pillows_limit() -> Iterator[None]:
    """Turn off Pillow's own pixel limit, because `ImageTransform.pixel_limit` is checked instead.

    Pillow has one limit for the whole process, and it warns before it refuses an image.
    """
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


class _Decoder(Dataset[tuple[int, int, list[Fault]]]):
    """Data set whose items a worker process decodes; the pixels go to the ring buffer.

    An item is (place in the ring, jobs). The result is (the same place, number of jobs, faults).
    """

    def __init__(self, view: ImageTransform, ring_PBHWC: Tensor) -> None:
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
    """Return how many processes one rank should start to decode images: 1 to 16 (MOST_WORKERS).

    Ranks are the processes that train together; `ranks` is their number, at least 1. The result is
    a number of cores divided by the number of ranks that share these cores, rounded down:

    - The number of cores is the environment variable SLURM_CPUS_PER_TASK if it is set, else the
      number of cores that this process may use.
    - The number of ranks that share them is `ranks`, or LOCAL_WORLD_SIZE if that variable is set
      and smaller. It is 1 if SLURM_CPUS_PER_TASK is set and SLURM_NTASKS is above 1, because each
      rank is then a task with cores of its own.

    Raises:
        ValueError: If one of these environment variables is not an integer.
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
    chunks: Iterable[Sequence[Job]], view: ImageTransform, *, workers: int, ahead: int = 2
) -> Generator[Chunk]:
    """Decode images in worker processes, and yield the results in order.

    An image that cannot be decoded raises no error: the faults of its `Chunk` name the problem. The
    workers stop when the iterator ends or is closed.

    Args:
        chunks: lists of 1 to 16 (CHUNK) requests; the images of a list are decoded together. This
            process iterates over `chunks`, and reads `workers * ahead` lists in advance.
        view: settings of the crop that is cut from every image.
        workers: number of worker processes; 0 to decode in this process.
        ahead: number of lists that are read in advance for each worker; not used if `workers` is 0.

    Yields:
        One `Chunk` for each list. Its pixels are valid until the next chunk is asked for.

    Raises:
        ChildProcessError: If a worker process dies.
    """
    # The workers inherit the ring buffer and write to it, so that no pixels are sent. It holds the
    # chunks that are being decoded and the chunk in use. Its memory is anonymous: nothing can be
    # left behind, and /dev/shm, which containers keep small, is not used.
    shape = (workers * ahead + 1, CHUNK, view.size, view.size, 3)
    # A tensor made in inference mode cannot be written to outside of it. The first caller may be an
    # evaluation, in inference mode, and the next caller the training.
    with torch.inference_mode(False):
        ring_PBHWC = torch.frombuffer(mmap.mmap(-1, math.prod(shape)), dtype=torch.uint8).view(
            shape
        )
    with warnings.catch_warnings():
        # torch warns if there are more workers than cores.
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        loader = DataLoader(
            _Decoder(view, ring_PBHWC),
            batch_size=None,
            sampler=zip(itertools.cycle(range(len(ring_PBHWC))), chunks),
            collate_fn=_as_it_is,
            num_workers=workers,
            prefetch_factor=ahead if workers else None,
            # With its own generator, the loader does not advance the generator of the process.
            generator=torch.Generator(),
            worker_init_fn=_Start(os.getpid()) if workers else None,
            multiprocessing_context="fork" if workers else None,
        )
        before = signal.getsignal(signal.SIGCHLD)
        # The workers inherit the mask, so that SIGTERM is blocked in all their threads: see _Start.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            stream = iter(loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    # Restore the previous handler for SIGCHLD. If a worker dies, torch's handler would raise in the
    # middle of whatever the trainer does. Without its handler, torch still looks for dead workers
    # every five seconds while it waits for a result.
    if before is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, before)
    try:
        for place, count, faults in stream:
            yield Chunk(ring_PBHWC[place, :count], faults)
    except (RuntimeError, OSError, EOFError) as error:  # torch's errors for a dead worker
        raise ChildProcessError(
            f"a process that decodes images is lost ({error}); "
            f"if memory ran out, lower dataset.workers={workers}"
        ) from error


def decode_all(paths: Sequence[str], size: int, what: str, workers: int | None = None) -> Tensor:
    """Return the centre squares of image files, resized to one size, as one tensor in memory.

    Each image is resized so that its shorter side is `size` pixels, then cropped in the centre, as
    by `decode` with a centre of 1.

    Args:
        paths: paths of the image files.
        size: side of the resized square in pixels.
        what: name of the images that the progress meter shows.
        workers: number of worker processes; 0 to decode in this process, None for
            `default_workers`.

    Returns:
        RGB pixels (N, size, size, 3), uint8, on the CPU, in the order of `paths`.

    Raises:
        ValueError: If a file cannot be decoded; the message names the first such file.
        ChildProcessError: If a worker process dies.
    """
    images_NHWC = torch.empty(len(paths), size, size, 3, dtype=torch.uint8)
    jobs = [Job(path, None) for path in paths]
    firsts = range(0, len(jobs), CHUNK)
    workers = default_workers() if workers is None else workers
    chunks = decoded(
        (jobs[n : n + CHUNK] for n in firsts), ImageTransform(size, centre=1.0), workers=workers
    )
    with meter(what, len(paths), "images") as show:
        for first, chunk in zip(firsts, chunks, strict=True):
            for fault in chunk.faults:
                if fault.bad:
                    raise ValueError(
                        f"{paths[first + fault.place]}: {fault.why}; "
                        "put the right file there, or remove it"
                    )
            images_NHWC[first : first + CHUNK] = chunk.pixels_BHWC
            show(first + len(chunk.pixels_BHWC))
    return images_NHWC


def _as_it_is(done: Any) -> Any:
    return done


class _Start:
    """The `worker_init_fn` of the DataLoader: sets how a worker process reacts to signals.

    A terminal and SLURM signal all processes of a job, but the parent still needs its workers until
    the parent has saved a checkpoint. A worker therefore ignores these signals. A worker ends only
    if its parent dies or sends SIGTERM. To learn who sent a SIGTERM, a thread waits for the signal
    with `sigwaitinfo`; this requires that the worker starts with SIGTERM blocked. On systems other
    than Linux, a SIGTERM from any process ends a worker.

    Args:
        parent: process id of the parent.
    """

    def __init__(self, parent: int) -> None:
        self.parent = parent

    def __call__(self, worker: int) -> None:
        for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        if sys.platform == "linux":
            threading.Thread(target=self._heed_parent, daemon=True).start()
        else:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        end_with_parent(self.parent)

    def _heed_parent(self) -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != self.parent:
            pass
        os._exit(0)
