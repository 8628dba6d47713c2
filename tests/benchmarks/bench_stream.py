"""The streaming pipeline beside decoding alone (the bar: 90 %) and beside torchvision's usual loader (the bar: 1.3 x).

    python -m tests.benchmarks.bench_stream

256 JPEGs of 500x375 pixels at quality 90, about 110 kB each as ImageNet's are, made on the spot: noise with the
spectrum of photographs (`tests/photographs.py`), which decodes and compresses much like them, as drawings or enlarged
digits would not. Batches of 64 images of 224x224, by one worker process and by two, on the CPU:

- decoding alone: as many processes that do nothing but what a worker does (open, decode, crop, resize), told at once;
- of that the JPEG alone: Pillow opens and decodes, nothing is cropped;
- the pipeline: `StreamedData`, whole epochs, with the flips and the normalising done in the trainer's process;
- torchvision: ImageFolder, RandomResizedCrop, RandomHorizontalFlip, ToTensor and Normalize in a DataLoader.

They take turns in every repeat, so that a busy machine slows all of them; ratios are of one repeat, median (least to
most). Workers are warm before the clock runs, and the files are in the page cache. Where other work shares the machine,
the processor time that a worker takes for an image says more than the clock: it does not count the trainer's process.
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
from sddlskd.data.streaming import StreamedData
from sddlskd.datasets.arrays import Files
from sddlskd.datasets.folders import image_folder
from tests.photographs import class_folders

IMAGES, BATCH_SIZE, SIZE, REPEATS = 256, 64, 224, 5
STILL_S = 0.05  # seconds of sleep that say that a process has nothing to do
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def jpeg_alone(job: Job) -> None:
    Image.open(job.path).load()


def whole_job(job: Job) -> None:
    decode(job, ImageTransform(SIZE))


def serve(work: Callable[[Job], None], connection: Connection) -> None:
    """Does the work for all jobs of a message, and says so."""
    torch.set_num_threads(1)
    while True:
        for job in connection.recv():
            work(job)
        connection.send(None)


def stat(process: int) -> list[str]:
    """proc(5): its state, and from there on."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()


def idle_since(processes: set[int]) -> float:
    """Wait for all of them to sleep, and to go on doing so; since when they do."""
    since = None
    while since is None or time.perf_counter() - since < STILL_S:
        awake = any(stat(process)[0] != "S" for process in processes)
        since = None if awake else since or time.perf_counter()
        time.sleep(0.002)
    return since


def timed(processes: set[int], work: Callable[[], int]) -> tuple[float, float]:
    """Images a second of the clock, and of these processes' time on the processor, from idle to idle: then as much was
    decoded as came out, however much of it was decoded in advance."""

    def processor_s() -> float:
        ticks = sum(
            int(number) for process in processes for number in stat(process)[11:13]
        )  # utime, stime
        return ticks / os.sysconf("SC_CLK_TCK")

    idle_since(processes)
    used, begin = processor_s(), time.perf_counter()
    count = work()
    return count / (idle_since(processes) - begin), count / (processor_s() - used)


def starts(start: Callable[[], object]) -> set[int]:
    """The processes that this starts."""
    before = multiprocessing.active_children()
    start()
    return {
        child.pid for child in set(multiprocessing.active_children()) - set(before) if child.pid
    }


class Alone:
    """Processes that decode an epoch's images, each its part, and give nothing back."""

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


def steady(data: StreamedData) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Epoch after epoch, the one evaluation image of each left out."""
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
        image_folder(str(folder)), num_classes=1, batch_size=BATCH_SIZE, seed=0, device="cpu", mean=MEAN, std=STD,
        view=ImageTransform(SIZE), workers=workers,
    )  # fmt: skip
    stream, steps = steady(data), IMAGES // BATCH_SIZE
    usual: Any = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE), transforms.RandomHorizontalFlip(), transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )  # fmt: skip
    loader = DataLoader(
        datasets.ImageFolder(str(folder / "train"), usual), batch_size=BATCH_SIZE, shuffle=True, num_workers=workers,
        persistent_workers=True,
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
    ][1:]  # the first warms up
    speed, per_second = ({name: [turn[name][n] for turn in found] for name in runs} for n in (0, 1))
    for what, measured in (("the clock", speed), ("the workers' processor time", per_second)):
        ratios = ", ".join(
            f"{shown([a / b for a, b in zip(measured['streaming'], measured[name], strict=True)])} of {name}"
            for name in runs if name != "streaming"
        )  # fmt: skip
        medians = ", ".join(
            f"{name} {statistics.median(values):.0f}" for name, values in measured.items()
        )
        print(f"{workers} worker(s), by {what}: streaming gives {ratios}; images/s: {medians}")


def main() -> None:
    """Print everything."""
    torch.set_num_threads(1)  # the trainer's; the other core is the worker's
    with tempfile.TemporaryDirectory() as name:
        folder = class_folders(Path(name), 1, IMAGES, width=500, height=375)
        for workers in (1, 2):
            measure(folder, workers)


if __name__ == "__main__":
    main()
