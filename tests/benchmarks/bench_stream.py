"""Compare the streaming pipeline with decoding alone and with torchvision's usual loader.

    python -m tests.benchmarks.bench_stream

The target is 90 % of decoding alone and 1.3 times torchvision's loader. The data are 256 JPEGs of
500x375 pixels at quality 90, about 110 kB each, as in ImageNet. They are noise with the spectrum of
photographs (`tests/photographs.py`), which decodes and compresses much like photographs. Batches of
64 images of 224x224 are made on the CPU by one and by two worker processes:

- decoding alone: processes that only do what a worker does (open, decode, crop, resize);
- the JPEG alone: Pillow opens and decodes, and nothing is cropped;
- the pipeline: whole epochs of `StreamedData`; the training process flips and normalises;
- torchvision: ImageFolder, RandomResizedCrop, RandomHorizontalFlip, ToTensor and Normalize in a
  DataLoader.

They take turns in every repetition, so that a busy machine slows them alike. A ratio compares the
times of one repetition; the median and the range are printed. Workers are warm before the
measurement starts, and the files are in the page cache. If the machine is busy, the processor time
of the workers says more than the elapsed time; it leaves out the training process.
"""

import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from sddlskd.data.decoding import ImageTransform, Job, decode
from sddlskd.data.device import Batch
from sddlskd.data.streaming import StreamedData
from sddlskd.datasets.arrays import Files
from sddlskd.datasets.folders import image_folder
from tests.photographs import class_folders

IMAGES, BATCH_SIZE, SIZE, REPEATS = 256, 64, 224, 5
STILL_S = 0.05  # seconds of sleep after which a process counts as idle
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def jpeg_alone(job: Job) -> None:
    Image.open(job.path).load()


def whole_job(job: Job) -> None:
    decode(job, ImageTransform(SIZE))


def serve(work: Callable[[Job], None], connection: Connection) -> None:
    """Call `work` for all jobs of each message, then send an answer."""
    torch.set_num_threads(1)
    while True:
        for job in connection.recv():
            work(job)
        connection.send(None)


def stat(process: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the state on (see proc(5))."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()


def idle_since(processes: set[int]) -> float:
    """Wait until all processes are idle, and return the time since when they are."""
    since = None
    while since is None or time.perf_counter() - since < STILL_S:
        awake = any(stat(process)[0] != "S" for process in processes)
        since = None if awake else since or time.perf_counter()
        time.sleep(0.002)
    return since


def timed(processes: set[int], work: Callable[[], int]) -> tuple[float, float]:
    """Call `work` and return its images per second of elapsed time and of processor time.

    The processes are idle before and after. Thus they decode as many images as they deliver,
    although they decode in advance.
    """

    def processor_s() -> float:
        # The fields are utime and stime.
        ticks = sum(int(number) for process in processes for number in stat(process)[11:13])
        return ticks / os.sysconf("SC_CLK_TCK")

    idle_since(processes)
    used, begin = processor_s(), time.perf_counter()
    count = work()
    return count / (idle_since(processes) - begin), count / (processor_s() - used)


def starts(start: Callable[[], object]) -> set[int]:
    """Call `start` and return the ids of the processes that it started."""
    before = multiprocessing.active_children()
    start()
    return {
        child.pid for child in set(multiprocessing.active_children()) - set(before) if child.pid
    }


class Alone:
    """Processes that each decode a part of an epoch's images and return nothing."""

    def __init__(self, work: Callable[[Job], None], paths: list[str]) -> None:
        self.work, self.paths = work, paths
        self.connections: list[Any] = []

    def start(self, workers: int) -> None:
        for _ in range(workers):
            mine, theirs = multiprocessing.Pipe()
            context = multiprocessing.get_context("fork")
            context.Process(target=serve, args=(self.work, theirs), daemon=True).start()
            self.connections.append(mine)

    def epoch(self, number: int) -> int:
        jobs = [Job(path, f"seed 0 epoch {number} image {n}") for n, path in enumerate(self.paths)]
        for n, connection in enumerate(self.connections):
            connection.send(jobs[n :: len(self.connections)])
        for connection in self.connections:
            connection.recv()
        return len(jobs)


def steady(data: StreamedData) -> Iterator[Batch]:
    """Yield the batches of epoch after epoch, and drop the evaluation image of each."""
    epoch = 0
    while True:
        yield from data.batches(epoch := epoch + 1)
        list(data.val_batches())


def shown(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def measure(folder: Path, workers: int) -> None:
    files = image_folder(str(folder)).train
    assert isinstance(files, Files)
    data = StreamedData(
        image_folder(str(folder)), num_classes=1, batch_size=BATCH_SIZE, seed=0, device="cpu",
        mean=MEAN, std=STD, view=ImageTransform(SIZE), workers=workers,
    )  # fmt: skip
    stream, steps = steady(data), IMAGES // BATCH_SIZE
    usual: Any = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE), transforms.RandomHorizontalFlip(),
            transforms.ToTensor(), transforms.Normalize(MEAN, STD),
        ]
    )  # fmt: skip
    loader = DataLoader(
        datasets.ImageFolder(str(folder / "train"), usual), batch_size=BATCH_SIZE, shuffle=True,
        num_workers=workers, persistent_workers=True,
    )  # fmt: skip

    alone, jpeg = (Alone(work, list(files.paths)) for work in (whole_job, jpeg_alone))
    runs: dict[str, Callable[[int], int]] = {
        "decoding alone": alone.epoch,
        "streaming": lambda _: sum(len(next(stream)[0]) for _ in range(steps)),
        "the JPEG alone": jpeg.epoch,
        "torchvision": lambda _: sum(len(x) for x, _ in loader),
    }
    processes = {
        "decoding alone": starts(lambda: alone.start(workers)),
        "streaming": starts(lambda: next(stream)),
        "the JPEG alone": starts(lambda: jpeg.start(workers)),
        "torchvision": starts(lambda: next(iter(loader))),
    }
    assert all(len(started) == workers for started in processes.values())
    found = [
        {
            name: timed(processes[name], lambda run=run, turn=turn: run(turn))
            for name, run in runs.items()
        }  # type: ignore[misc]
        for turn in range(REPEATS + 1)
    ][1:]  # the first repetition is a warm-up
    speed, per_second = ({name: [turn[name][n] for turn in found] for name in runs} for n in (0, 1))
    for what, measured in (("the clock", speed), ("the workers' processor time", per_second)):
        ratios = ", ".join(
            f"{shown([a / b for a, b in zip(measured['streaming'], measured[name], strict=True)])}"
            f" of {name}"
            for name in runs if name != "streaming"
        )  # fmt: skip
        medians = ", ".join(
            f"{name} {statistics.median(values):.0f}" for name, values in measured.items()
        )
        print(f"{workers} worker(s), by {what}: streaming gives {ratios}; images/s: {medians}")


def main() -> None:
    """Print all measurements."""
    torch.set_num_threads(1)  # for the training process; the other core is for the worker
    with tempfile.TemporaryDirectory() as name:
        folder = class_folders(Path(name), 1, IMAGES, width=500, height=375)
        for workers in (1, 2):
            measure(folder, workers)


if __name__ == "__main__":
    main()
