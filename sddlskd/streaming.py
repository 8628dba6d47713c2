"""A data set that stays on the disk: its images are decoded by worker processes as batches are asked for.

Shapes: N images of a split, B of a batch, H W C pixel rows, columns and channels. Order, crops and flips of an image
follow from (seed, epoch, its index) alone: not from the number of workers, the batch size or the ranks.
"""

import logging
import math
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from sddlskd.data import (
    Batch,
    DeviceData,
    Draws,
    Normalise,
    check_labels,
    draw_epoch,
    held_out,
    mirrored,
    share_of,
)
from sddlskd.datasets import Files, Splits
from sddlskd.decoding import CHUNK, Chunk, Job, Unreadable, View, decode, decoded, default_workers

__all__ = ["Data", "StreamedData"]

IN_A_ROW = 100  # bad files one after the other that say that it is not the files that are bad
NAMED = 20  # bad files, and odd ones of a kind, that the log names; all are counted
log = logging.getLogger(__name__)


class Place(NamedTuple):
    """Images that are decoded together: a piece of a batch."""

    split: str  # train, val or test
    epoch: int  # 0 but in training
    batch: int
    piece: int


class _Plan:
    """What is decoded next, without end: the rest of an epoch, and then what is likely to be asked for, so that no
    border between epochs and evaluations has to wait for the workers.

    Iterating gives the jobs of `next` and moves it on; `sent` holds the places that are under way, with the images.
    """

    def __init__(
        self,
        splits: dict[str, Files],
        seed: int,
        batch_size: int,
        eval_batch_size: int,
        rank: int,
        ranks: int,
    ) -> None:
        self.splits, self.seed, self.rank, self.ranks = splits, seed, rank, ranks
        self.sizes = {"train": batch_size, "val": eval_batch_size, "test": eval_batch_size}
        self.batches = {
            split: math.ceil(len(files.paths) / self.sizes[split])
            for split, files in splits.items()
        }
        self.instead: dict[int, int] = {}  # training images that stand for others
        self.next, self.sent = Place("train", 1, 0, 0), deque[tuple[Place, list[int]]]()
        self.epoch = 0  # the last one in training

        @lru_cache(maxsize=2)  # the epoch and the one after it
        def drawn(epoch: int) -> Draws:
            return draw_epoch(seed, epoch, len(splits["train"].paths), padding=0)

        self.drawn = drawn

    def __iter__(self) -> Iterator[list[Job]]:
        while True:
            place = self.next
            images = self.piece(place)
            self.sent.append(
                (place, [self.instead.get(n, n) if place.split == "train" else n for n in images])
            )
            self.next = self._after(place)
            yield [self.job(place, image) for image in images]

    def ids(self, split: str, epoch: int, batch: int) -> list[int]:
        """The images of this rank's share of a batch."""
        first = batch * self.sizes[split]
        images = range(len(self.splits[split].paths))[first : first + self.sizes[split]]
        if split != "train":
            return list(images)
        share = share_of(len(images), self.rank, self.ranks)
        return self.drawn(epoch).order_N[images.start : images.stop][share].tolist()

    def pieces(self, split: str, epoch: int, batch: int) -> int:
        """Into how many places a batch is cut."""
        return math.ceil(len(self.ids(split, epoch, batch)) / CHUNK)

    def piece(self, place: Place) -> list[int]:
        """The images of a place."""
        return self.ids(place.split, place.epoch, place.batch)[place.piece * CHUNK :][:CHUNK]

    def job(self, place: Place, image: int) -> Job:
        """How an image of a place is made."""
        paths = self.splits[place.split].paths
        if place.split != "train":
            return Job(paths[image], None)
        draw = f"seed {self.seed} epoch {place.epoch} image {image}"
        return Job(paths[self.instead.get(image, image)], draw)

    def _after(self, place: Place) -> Place:
        split, epoch, batch, piece = place
        if piece + 1 < self.pieces(split, epoch, batch):
            return place._replace(piece=piece + 1)
        if batch + 1 < self.batches[split]:
            return Place(split, epoch, batch + 1, 0)
        if split == "train":
            self.epoch = epoch
            return Place("val", 0, 0, 0)
        return Place("train", self.epoch + 1, 0, 0)


class StreamedData:
    """Training, validation and test batches from `splits` of image files, as `DeviceData` gives them from pixels.

    A training image is a random crop (`decoding.decode`) of `view.size`, mirrored with probability 1/2 if `flip`; of
    others the centre is shown. Flips and normalising happen on `device`, everything before in `workers` processes
    (None: as many as there are cores; 0: in this one). `val_fraction` is as in DeviceData; of `ranks` processes that
    share each batch of `batch_size` images this one, `rank`, reads its share of them and of the validation images.

    bad: "fail" raises ValueError, naming the file and what is wrong, when its batch comes; "skip" puts the next image
    of the split that can be read in the place of a bad training image, so that batches keep their size, and leaves a
    bad image out of evaluation. irregular: the same for images that are not upright RGB as stored, or "convert" takes
    them as ImageFolder of torchvision does.

    Raises ValueError for labels that are not int64 in 0..num_classes-1, an empty split, and settings out of range.
    """

    def __init__(
        self,
        splits: Splits,
        *,
        num_classes: int,
        batch_size: int,  # images
        seed: int,
        device: torch.device | str,
        mean: Sequence[float],
        std: Sequence[float],
        view: View,
        flip: bool = True,
        val_fraction: float = 0.0,
        eval_batch_size: int = 500,  # images
        workers: int | None = None,
        bad: str = "fail",
        irregular: str = "convert",
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        train, test = splits
        if not isinstance(train, Files) or not isinstance(test, Files):
            raise ValueError("the splits hold pixels; give them to sddlskd.data.DeviceData")
        for name, files in (("train", train), ("test", test)):
            check_labels(name, files.labels_N, len(files.paths), num_classes)
        if eval_batch_size < 1 or not view.centre <= 1 or view.size < 1:
            raise ValueError(
                f"eval_batch_size is {eval_batch_size}, at least 1; size is {view.size}, at least 1; "
                f"centre is {view.centre}, above 0 and at most 1: correct it"
            )
        val = test
        if val_fraction:
            held_N = held_out(train.labels_N, val_fraction, num_classes)
            train, val = _chosen(train, ~held_N), _chosen(train, held_N)
        self.train_size, self.val_size, self.test_size = (
            len(train.paths),
            len(val.paths),
            len(test.paths),
        )
        if not 1 <= batch_size <= self.train_size:
            raise ValueError(
                f"batch_size is {batch_size}; give 1..{self.train_size}, the number of training images"
            )
        self.image_shape = (3, view.size, view.size)
        self.steps_per_epoch = math.ceil(self.train_size / batch_size)
        self._view, self._flip, self._bad, self._irregular = view, flip, bad, irregular
        self._device = torch.device(device)
        self._normalise = Normalise(mean, std, 3, view.size, self._device)
        part = share_of(self.val_size, rank, ranks)
        self._splits = {
            "train": train,
            "val": Files(val.paths[part], val.labels_N[part]),
            "test": test,
        }
        self._plan = _Plan(self._splits, seed, batch_size, eval_batch_size, rank, ranks)
        self._workers = default_workers(ranks) if workers is None else workers
        self._ahead = max(
            2, math.ceil(2 * batch_size / ranks / CHUNK / max(self._workers, 1))
        )  # two batches at least
        self._stream: Generator[Chunk] | None = None
        self._faults: dict[str, set[str]] = {}  # what is wrong -> the files
        self._unusable: set[str] = set()  # files that are left out
        self._counted = ""

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Augmented batches of one epoch, every training image once, without the first `start` batches (to resume).

        x_BCHW float32 channels_last, y_B int64; the last batch is the rest. ValueError for a start past the epoch.
        """
        if not 0 <= start <= self.steps_per_epoch:
            raise ValueError(
                f"start is {start}; give 0..{self.steps_per_epoch}, the batches of an epoch already done"
            )
        return self._augmented(epoch, start)

    def view_batches(self, epoch: int, start: int = 0) -> Iterator[Tensor]:
        """For each batch of `batches`: the images that it shows, int64 on the CPU."""
        for batch in range(start, self.steps_per_epoch):
            yield torch.tensor(self._plan.ids("train", epoch, batch))

    def val_batches(self) -> Iterator[Batch]:
        """Plain batches of this rank's validation images, in order: the test split unless val_fraction is set."""
        return self._plain("val")

    def test_batches(self) -> Iterator[Batch]:
        """Plain batches of the official test split, in its order."""
        return self._plain("test")

    def test_images(self, indices: Sequence[int]) -> Tensor:
        """The raw pixels of test images, uint8 N H W C on the CPU; counted among those that the test batches show."""
        shown = [path for path in self._splits["test"].paths if path not in self._unusable]
        return torch.stack([decode(Job(shown[n], None), self._view)[0] for n in indices])

    def close(self) -> None:
        """End the worker processes; the next batch starts others."""
        if self._stream is not None:
            self._stream.close()  # at once, though an error's traceback may hold it
        self._stream = None
        self._plan.sent.clear()

    def _augmented(self, epoch: int, start: int) -> Iterator[Batch]:
        flip_N = self._plan.drawn(epoch).flip_N
        for batch in range(start, self.steps_per_epoch):
            x_BHWC, labels_B = self._read("train", epoch, batch)
            if self._flip:
                flip_B = flip_N[self._plan.ids("train", epoch, batch)]
                x_BHWC = mirrored(x_BHWC, flip_B.to(self._device))
            yield self._normalise(x_BHWC), labels_B
        self._count()

    def _plain(self, split: str) -> Iterator[Batch]:
        shown = 0
        for batch in range(self._plan.batches[split]):
            x_BHWC, labels_B = self._read(split, 0, batch)
            if len(labels_B):
                yield self._normalise(x_BHWC), labels_B
            shown += len(labels_B)
        self._count()
        if not shown and (
            self._plan.ranks == 1 or split == "test"
        ):  # a rank's share of val is not the whole
            raise ValueError(
                f"none of the {len(self._splits[split].paths)} {split} images can be used: look at the log"
            )

    def _read(self, split: str, epoch: int, batch: int) -> tuple[Tensor, Tensor]:
        """uint8 x_BHWC and labels_B of a batch, on the device, faults dealt with."""
        parts, labels = [], []
        for piece in range(self._plan.pieces(split, epoch, batch)):
            try:
                pixels_BHWC, ids = self._mended(*self._received(Place(split, epoch, batch, piece)))
            except BaseException:
                self.close()  # what is under way is not known any more, or nobody will ask for it
                raise
            if self._device.type == "cuda":
                parts.append(pixels_BHWC.pin_memory().to(self._device, non_blocking=True))
            else:
                parts.append(pixels_BHWC.to(self._device, copy=True))
            labels.append(self._splits[split].labels_N[ids])
        return torch.cat(parts), torch.cat(labels).to(self._device)

    def _received(self, place: Place) -> tuple[Place, list[int], Chunk]:
        """The place, which images the workers were told to decode there, and what they made of them."""
        plan = self._plan
        if place != plan.next and all(place != sent for sent, _ in plan.sent):
            plan.next = place  # what is under way was guessed wrong
        if self._stream is None:
            self._stream = decoded(plan, self._view, workers=self._workers, ahead=self._ahead)
        while True:
            chunk = next(self._stream)
            sent, ids = plan.sent.popleft()
            if sent == place:
                return place, ids, chunk

    def _mended(self, place: Place, ids: list[int], chunk: Chunk) -> tuple[Tensor, list[int]]:
        """The pixels and the images they show, faults dealt with as `bad` and `irregular` say."""
        pixels_BHWC, paths = chunk.pixels_BHWC, self._splits[place.split].paths
        out = {f.place for f in chunk.faults if self._left_out(paths[ids[f.place]], f.why, f.bad)}
        if place.split == "train":
            for n in sorted(out):
                pixels_BHWC[n], ids[n] = self._replacement(place, self._plan.piece(place)[n])
            return pixels_BHWC, ids
        kept = [n for n in range(len(ids)) if n not in out]
        return (pixels_BHWC[kept], [ids[n] for n in kept]) if out else (pixels_BHWC, ids)

    def _replacement(self, place: Place, image: int) -> tuple[Tensor, int]:
        """The next image that can be used in the place of this one, cropped as this one would be: pixels, which."""
        job = self._plan.job(place, image)
        paths = self._splits[place.split].paths
        for other in range(image + 1, image + 1 + IN_A_ROW):
            other %= len(paths)
            if paths[other] in self._unusable:
                continue
            try:
                pixels_HWC, odd = decode(job._replace(path=paths[other]), self._view)
            except Unreadable as error:
                self._left_out(paths[other], str(error), bad=True)
                continue
            if not any([self._left_out(paths[other], why, bad=False) for why in odd]):
                self._plan.instead[image] = other
                return pixels_HWC, other
        raise ValueError(
            f"{paths[image]} and the {IN_A_ROW} images after it cannot be used: look at the disk, and the log"
        )

    def _left_out(self, path: str, why: str, bad: bool) -> bool:
        """Take note of a fault: whether the image is left out. ValueError where that is not allowed."""
        key, policy = ("bad_images", self._bad) if bad else ("irregular_images", self._irregular)
        if policy == "fail":
            cure = (
                "mend or remove it"
                if bad
                else "convert it, or set dataset.irregular_images=convert"
            )
            cure += f", or set dataset.{key}=skip"
            raise ValueError(f"{path}: {why}; {cure}")
        seen = self._faults.setdefault("unreadable" if bad else why, set())
        if path not in seen:
            seen.add(path)
            if len(seen) <= NAMED:
                tell = log.warning if policy == "skip" else log.info
                last = "; more of these are counted, not named" if len(seen) == NAMED else ""
                tell("%s: %s (dataset.%s=%s)%s", path, why, key, policy, last)
        if policy == "skip":
            self._unusable.add(path)
        return policy == "skip"

    def _count(self) -> None:
        """Tell how many images had which fault so far, whenever that has changed by the end of an epoch."""
        counted = ", ".join(f"{len(paths)} {why}" for why, paths in self._faults.items())
        if counted != self._counted:
            self._counted = counted
            log.info("images so far: %s; %d are left out", counted, len(self._unusable))


def _chosen(files: Files, chosen_N: Tensor) -> Files:
    return Files(
        [files.paths[n] for n in chosen_N.nonzero()[:, 0].tolist()], files.labels_N[chosen_N]
    )


Data = DeviceData | StreamedData
