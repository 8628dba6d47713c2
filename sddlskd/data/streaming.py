"""Stream a data set from the disk: worker processes decode its images when batches need them.

Shapes: N images of a split, B images of a batch, H W C pixel rows, columns and channels. The order,
crop and flip of an image depend on (seed, epoch, image index) alone. They do not depend on the
number of workers, the batch size or the number of ranks.
"""

import logging
import math
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from sddlskd.data.checks import check_labels
from sddlskd.data.decoding import (
    CHUNK,
    Chunk,
    ImageTransform,
    Job,
    Unreadable,
    decode,
    decoded,
    default_workers,
)
from sddlskd.data.device import (
    Batch,
    DeviceData,
    Draws,
    Normalise,
    draw_epoch,
    mirrored,
    seed_of,
    share_of,
    steps_per_epoch,
)
from sddlskd.data.strong import StrongDraws, cutout, draw_strong, rand_augment
from sddlskd.data.subsets import held_out, shown
from sddlskd.datasets.arrays import Files, Splits
from sddlskd.terminal.words import counted

__all__ = ["Data", "StreamedData"]

# Give up after this many unusable files in a row: the cause is then not the files themselves.
IN_A_ROW = 100
# The log names this many files of each kind of fault; all are counted.
NAMED = 20
log = logging.getLogger(__name__)


class Place(NamedTuple):
    """Position of one piece of a batch; a piece is up to 16 images that are decoded together.

    Attributes:
        split: "train", "val" or "test".
        epoch: number of the training epoch; 0 for validation and test.
        batch: index of the batch in its epoch or split, from 0.
        piece: index of the piece in the batch, from 0.
    """

    split: str
    epoch: int
    batch: int
    piece: int


class _Plan:
    """Endless iterable over the images to decode, in the order in which they will probably be used.

    After the rest of an epoch, the plan goes on with the validation batches and the next epoch. The
    workers therefore have images ready at each change between training and evaluation.

    Each step yields the jobs of the place `next` and moves `next` on. The jobs of a training place
    are those of its first view, then those of the next one, in the order of `views`. `sent` holds
    the places that were given to the workers and are not yet received, with the image indices of
    each.
    """

    def __init__(
        self,
        splits: dict[str, Files],
        seed: int,
        batch_size: int,
        eval_batch_size: int,
        drop_last: bool,
        rank: int,
        ranks: int,
        strong: bool,
        plain: bool,
    ) -> None:
        self.splits, self.seed, self.rank, self.ranks = splits, seed, rank, ranks
        self.sizes = {"train": batch_size, "val": eval_batch_size, "test": eval_batch_size}
        self.batches = {
            split: steps_per_epoch(
                len(files.paths), self.sizes[split], drop_last and split == "train"
            )
            for split, files in splits.items()
        }
        self._of_training = ("weak", *(["strong"] * strong), *(["plain"] * plain))
        # Index of an unusable training image -> index of the image that replaces it.
        self.instead: dict[int, int] = {}
        self.next, self.sent = Place("train", 1, 0, 0), deque[tuple[Place, list[int]]]()
        self.epoch = 0  # the last training epoch that the plan went through

        @lru_cache(maxsize=2)  # the current epoch and the next one
        def drawn(epoch: int) -> Draws:
            return draw_epoch(seed, epoch, len(splits["train"].paths), padding=0)

        @lru_cache(maxsize=1)
        def drawn_strong(epoch: int) -> StrongDraws:
            key = seed_of("seed", seed, "epoch", epoch, "view", "strong")
            return draw_strong(key, len(splits["train"].paths), padding=0)

        self.drawn, self.drawn_strong = drawn, drawn_strong

    def __iter__(self) -> Iterator[list[Job]]:
        while True:
            place = self.next
            images = self.piece(place)
            self.sent.append(
                (place, [self.instead.get(n, n) if place.split == "train" else n for n in images])
            )
            self.next = self._after(place)
            yield [
                self.job(place, image, view) for view in self.views(place.split) for image in images
            ]

    def views(self, split: str) -> tuple[str, ...]:
        """Return the views decoded of each image: "weak" and others for training, else "plain"."""
        return self._of_training if split == "train" else ("plain",)

    def ids(self, split: str, epoch: int, batch: int) -> list[int]:
        """Return the image indices of this rank's share of a batch, in the order of the batch."""
        first = batch * self.sizes[split]
        images = range(len(self.splits[split].paths))[first : first + self.sizes[split]]
        if split != "train":
            return list(images)
        share = share_of(len(images), self.rank, self.ranks)
        return self.drawn(epoch).order_N[images.start : images.stop][share].tolist()

    def pieces(self, split: str, epoch: int, batch: int) -> int:
        """Return how many pieces this rank's share of a batch has."""
        return math.ceil(len(self.ids(split, epoch, batch)) / (CHUNK // len(self.views(split))))

    def piece(self, place: Place) -> list[int]:
        """Return the image indices of one piece of a batch."""
        size = CHUNK // len(self.views(place.split))
        return self.ids(place.split, place.epoch, place.batch)[place.piece * size :][:size]

    def job(self, place: Place, image: int, view: str) -> Job:
        """Return the job that decodes an image of a place.

        Args:
            place: piece of the batch that the image is in.
            image: index of the image. If the image is unusable and has a replacement, the file is
                that of the replacement, and the crop stays that of `image`.
            view: one of the `views` of the split.

        Returns:
            The job: the centre crop for the view "plain", a random crop otherwise.
        """
        path = self.splits[place.split].paths[image]
        if place.split == "train":
            path = self.splits["train"].paths[self.instead.get(image, image)]
        if view == "plain":
            return Job(path, None)
        draw = f"seed {self.seed} epoch {place.epoch} image {image}"
        if view == "strong":
            draw += " view strong"
        return Job(path, draw)

    def _after(self, place: Place) -> Place:
        """Return the place to decode next: validation follows training, and training evaluation."""
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
    """Training, validation and test batches of image files that are decoded when needed.

    The methods and attributes are those of `DeviceData`, without `views` and with `close`. A
    training image is a random crop (see `decoding.decode`) of `view.size` x `view.size` pixels,
    mirrored with probability 1/2 if `flip` is set. A validation or test image is the centre crop.
    Worker processes decode and crop the images; all later steps run on `device`.

    Ranks are the processes that train together. Each rank gets, and decodes, the slice
    `device.share_of` of each training batch, one such slice of all validation images, and all test
    images.

    Args:
        splits: training and test split, as `Files`.
        num_classes: number of classes. A label is 0..num_classes-1; several labels of an image are
            num_classes zeros and ones.
        batch_size: training images per batch, over all ranks; at most the number of training
            images.
        seed: seed of the order, crops and flips.
        device: device of the batches.
        mean: mean per channel (RGB), for pixels scaled to 0..1.
        std: standard deviation per channel (RGB), for pixels scaled to 0..1.
        view: settings of the crops: size, area, centre and limits.
        flip: whether training images are mirrored at random.
        val_fraction: fraction of each class of the training split that is held out for validation,
            the same images for every seed. With 0, the test split serves as validation split.
        train_fraction: fraction of each class that is trained on, of the training images that are
            not held out; the same images for every seed.
        unlabelled: whether the training batches also hold the images that `train_fraction` leaves
            out, with the label -1.
        eval_batch_size: images per batch of validation and test.
        drop_last: whether the last training batch of an epoch is left out if it is smaller than
            `batch_size`.
        workers: number of worker processes; 0 to decode in this process, None for
            `decoding.default_workers`, which counts the cores.
        bad: what to do with an image that cannot be decoded. "fail" raises ValueError when the
            image's batch is read; the message names the file and the problem. "skip" replaces a
            training image by the next usable one of the images that are trained on, so that batches
            keep their size, and leaves a validation or test image out.
        irregular: what to do with an image that is unusual: not RGB, not upright or under the name
            of another format, see `decoding.decode`. "fail" and "skip" do the same as for `bad`.
            "convert" uses the image as `decoding.decode` returns it.
        rank: number of this rank, from 0.
        ranks: number of ranks that share each batch.
        strong: whether each training batch also has strongly augmented versions of its images, in
            `Batch.strong`. A strong version has its own random crop, its own mirroring if `flip` is
            set, then RandAugment and Cutout (`sddlskd.data.strong`) on `device`. The setting does
            not change `Batch.images`.
        plain: whether each training batch also has the centre crops of its images, in
            `Batch.plain`. The setting does not change `Batch.images`.

    Attributes:
        train_size: number of images that are trained on, over all ranks.
        val_size: number of validation images, over all ranks.
        test_size: number of test images.
        image_shape: (C, H, W) of an image.
        steps_per_epoch: number of training batches per epoch.

    Raises:
        ValueError: If the data or an argument cannot be used: the splits are `Images`, a split is
            empty, the labels are not those that `checks.check_labels` accepts, `mean` or `std` does
            not suit `Normalise`, `view.size` is below 1, `view.centre` is not in (0, 1], or a batch
            size or a fraction is out of range. A `val_fraction` other than 0 must hold out some
            images, but not all.
    """

    def __init__(
        self,
        splits: Splits,
        *,
        num_classes: int,
        batch_size: int,
        seed: int,
        device: torch.device | str,
        mean: Sequence[float],
        std: Sequence[float],
        view: ImageTransform,
        flip: bool = True,
        val_fraction: float = 0.0,
        train_fraction: float = 1.0,
        unlabelled: bool = False,
        eval_batch_size: int = 500,
        drop_last: bool = False,
        workers: int | None = None,
        bad: str = "fail",
        irregular: str = "convert",
        rank: int = 0,
        ranks: int = 1,
        strong: bool = False,
        plain: bool = False,
    ) -> None:
        train, test = splits
        if not isinstance(train, Files) or not isinstance(test, Files):
            raise ValueError("the splits hold pixels; give them to sddlskd.data.DeviceData")
        for name, files in (("train", train), ("test", test)):
            check_labels(name, files.labels_N, len(files.paths), num_classes)
        if eval_batch_size < 1 or not 0 < view.centre <= 1 or view.size < 1:
            raise ValueError(
                f"eval_batch_size is {eval_batch_size}, must be at least 1; "
                f"size is {view.size}, must be at least 1; "
                f"centre is {view.centre}, must be above 0 and at most 1"
            )
        val = test
        if val_fraction:
            val = _chosen(train, held_out(train.labels_N, val_fraction, num_classes))
        if val_fraction or train_fraction != 1:
            mask_N, labels_N = shown(
                train.labels_N, val_fraction, train_fraction, num_classes, unlabelled
            )
            train = _chosen(train._replace(labels_N=labels_N), mask_N)
        self.train_size, self.val_size = len(train.paths), len(val.paths)
        self.test_size = len(test.paths)
        if not 1 <= batch_size <= self.train_size:
            raise ValueError(
                f"batch_size is {batch_size}; "
                f"give 1..{self.train_size}, the number of training images"
            )
        self.image_shape = (3, view.size, view.size)
        self.steps_per_epoch = steps_per_epoch(self.train_size, batch_size, drop_last)
        self._view, self._flip, self._bad, self._irregular = view, flip, bad, irregular
        self._device = torch.device(device)
        self._normalise = Normalise(mean, std, 3, view.size, self._device)
        part = share_of(self.val_size, rank, ranks)
        self._splits = {
            "train": train,
            "val": Files(val.paths[part], val.labels_N[part]),
            "test": test,
        }
        self._plan = _Plan(
            self._splits, seed, batch_size, eval_batch_size, drop_last, rank, ranks, strong, plain
        )
        self._workers = default_workers(ranks) if workers is None else workers
        # Decode at least two batches ahead.
        decodings = len(self._plan.views("train")) * batch_size / ranks
        self._ahead = max(2, math.ceil(2 * decodings / CHUNK / max(self._workers, 1)))
        self._stream: Generator[Chunk] | None = None
        self._faults: dict[str, set[str]] = {}  # fault -> paths of the files that have it
        self._unusable: set[str] = set()  # paths of the files that are left out
        self._counted = ""

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Return an iterator over the augmented training batches of one epoch, in random order.

        Over a whole epoch, each image that is trained on is in exactly one batch, with three
        exceptions: an unusable image is in none, its replacement is in a batch once more, and the
        images of the last batch are in none if `drop_last` leaves that batch out.

        Args:
            epoch: number of the epoch; with the seed, the number decides the order, crops and
                flips.
            start: number of batches to skip at the beginning of the epoch, to resume the epoch.

        Returns:
            Iterator over this rank's share of each `Batch`. The last batch holds the remaining
            images, which may be fewer. If an unusable image was replaced, label and index are those
            of the replacement.

        Raises:
            ValueError: If `start` is outside 0..steps_per_epoch; raised at once. During iteration:
                if an image has a fault whose setting (`bad` or `irregular`) is "fail", or if none
                of the 100 images (IN_A_ROW) after an unusable one can replace it.
            ChildProcessError: If a worker process dies, during iteration.
        """
        if not 0 <= start <= self.steps_per_epoch:
            raise ValueError(
                f"start is {start}; give 0..{self.steps_per_epoch}, "
                "the number of batches of the epoch that are already done"
            )
        return self._augmented(epoch, start)

    @property
    def train_labels(self) -> Tensor:
        """Return the class of each image that is trained on, int64 (N,), on the CPU.

        Entry n is the class of the image whose `Batch.index` is n; -1 if the image has no label.
        For images with several labels, the result is (N, K) with zeros and ones.
        """
        return self._splits["train"].labels_N

    def val_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Return an iterator over this rank's validation batches, in order, not augmented.

        A batch is (images, labels) on the device: normalised float32 (B, C, H, W) and int64 (B,),
        or (B, K) for images with several labels. B is `eval_batch_size`, or less in the last batch
        and in batches with images that `bad` or `irregular` skips. A batch of skipped images alone
        is not returned. The images come from the test split if `val_fraction` is 0.

        Raises:
            ValueError: If an image has a fault whose setting (`bad` or `irregular`) is "fail", or
                there is one rank and no validation image can be used; raised during iteration.
            ChildProcessError: If a worker process dies, during iteration.
        """
        return self._plain("val")

    def test_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Return an iterator over the batches of the whole test split, in order, not augmented.

        A batch is (images, labels) on the device: normalised float32 (B, C, H, W) and int64 (B,),
        or (B, K) for images with several labels. B is `eval_batch_size`, or less in the last batch
        and in batches with images that `bad` or `irregular` skips. A batch of skipped images alone
        is not returned.

        Raises:
            ValueError: If an image has a fault whose setting (`bad` or `irregular`) is "fail", or
                no test image can be used; raised during iteration.
            ChildProcessError: If a worker process dies, during iteration.
        """
        return self._plain("test")

    def test_images(self, indices: Sequence[int]) -> Tensor:
        """Return the raw pixels of some test images, centre-cropped, uint8 (B, H, W, C) on the CPU.

        `indices`, at least one, count the images that the test batches show, from 0. Images that
        `bad` or `irregular` skips do not count. Which images these are is known only after
        `test_batches` has been read to the end, so call this method after that.

        Raises:
            Unreadable: If an image cannot be decoded.
            IndexError: If an index is not below the number of images that the test batches show.
        """
        shown = [path for path in self._splits["test"].paths if path not in self._unusable]
        return torch.stack([decode(Job(shown[n], None), self._view)[0] for n in indices])

    def close(self) -> None:
        """Stop the worker processes, if there are any.

        Reading another batch starts new processes.
        """
        if self._stream is not None:
            # Do not wait for the garbage collector: the traceback of an error may hold the stream.
            self._stream.close()
        self._stream = None
        self._plan.sent.clear()

    def _augmented(self, epoch: int, start: int) -> Iterator[Batch]:
        flip_N = self._plan.drawn(epoch).flip_N
        for batch in range(start, self.steps_per_epoch):
            views, labels_B, index_B = self._read("train", epoch, batch)
            # A replacement is mirrored as the unusable image would have been.
            ids = self._plan.ids("train", epoch, batch)
            x_BHWC = self._mirrored(views["weak"], flip_N[ids])
            made = Batch(self._normalise(x_BHWC), labels_B, index_B, None, epoch=epoch)
            if "strong" in views:
                made = made._replace(strong=self._strong(views["strong"], epoch, ids))
            if "plain" in views:
                made = made._replace(plain=self._normalise(views["plain"]))
            yield made
        self._count()

    def _mirrored(self, x_BHWC: Tensor, flip_B: Tensor) -> Tensor:
        return mirrored(x_BHWC, flip_B.to(self._device)) if self._flip else x_BHWC

    def _strong(self, x_BHWC: Tensor, epoch: int, ids: list[int]) -> Tensor:
        """Return the normalised strong views x_BCHW of the images with the indices `ids`.

        `x_BHWC` holds their crops, uint8.
        """
        draws = StrongDraws(*(drawn_N[ids] for drawn_N in self._plan.drawn_strong(epoch)))
        x_BHWC = self._mirrored(x_BHWC, draws.flip_N)
        x_BHWC = rand_augment(x_BHWC, draws.operation_NK, draws.value_NK)
        return self._normalise(cutout(x_BHWC, draws.cut_N3))

    def _plain(self, split: str) -> Iterator[tuple[Tensor, Tensor]]:
        shown = 0
        for batch in range(self._plan.batches[split]):
            views, labels_B, _ = self._read(split, 0, batch)
            if len(labels_B):
                yield self._normalise(views["plain"]), labels_B
            shown += len(labels_B)
        self._count()
        # A rank has only a share of the validation images: other ranks may have usable ones.
        if not shown and (self._plan.ranks == 1 or split == "test"):
            paths = self._splits[split].paths
            raise ValueError(
                f"none of {counted(len(paths), 'image')} of the {split} split, such as {paths[0]}, "
                "can be used: look at the log, which has the reason of each file"
            )

    def _read(self, split: str, epoch: int, batch: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Return uint8 x_BHWC of each view by its name, labels_B and index_B of a batch.

        Bad images are replaced or left out. The pixels and the labels are on the device, the
        indices on the CPU.
        """
        parts: dict[str, list[Tensor]] = {view: [] for view in self._plan.views(split)}
        index: list[int] = []
        for piece in range(self._plan.pieces(split, epoch, batch)):
            try:
                pixels_BHWC, ids = self._mended(*self._received(Place(split, epoch, batch, piece)))
            except BaseException:
                # The plan may no longer match the images that the workers are decoding, or nobody
                # will ask for these images.
                self.close()
                raise
            if self._device.type == "cuda":
                pixels_BHWC = pixels_BHWC.pin_memory().to(self._device, non_blocking=True)
            else:
                pixels_BHWC = pixels_BHWC.to(self._device, copy=True)
            views = torch.split(pixels_BHWC, len(ids) or 1)
            for part, view_BHWC in zip(parts.values(), views, strict=True):
                part.append(view_BHWC)
            index += ids
        index_B = torch.tensor(index, dtype=torch.int64)
        labels_B = self._splits[split].labels_N[index_B]
        pixels = {view: torch.cat(part) for view, part in parts.items()}
        return pixels, labels_B.to(self._device), index_B

    def _received(self, place: Place) -> tuple[Place, list[int], Chunk]:
        """Return the place, the image indices that the workers decoded for it, and their chunk.

        Chunks of other places, which the plan wrongly predicted, are dropped.
        """
        plan = self._plan
        if place != plan.next and all(place != sent for sent, _ in plan.sent):
            plan.next = place  # the plan predicted other images: drop those
        if self._stream is None:
            self._stream = decoded(plan, self._view, workers=self._workers, ahead=self._ahead)
        while True:
            chunk = next(self._stream)
            sent, ids = plan.sent.popleft()
            if sent == place:
                return place, ids, chunk

    def _mended(self, place: Place, ids: list[int], chunk: Chunk) -> tuple[Tensor, list[int]]:
        """Return the pixels and indices of a place's images, with faulty images handled.

        The settings `bad` and `irregular` decide whether an image is kept, replaced (training) or
        left out. With several views, the pixels of one view of all images follow those of another.
        """
        pixels_BHWC, paths = chunk.pixels_BHWC, self._splits[place.split].paths
        count = len(ids)
        out = {
            f.place % count
            for f in chunk.faults
            if self._left_out(paths[ids[f.place % count]], f.why, f.bad)
        }
        if place.split == "train":
            for n in sorted(out):
                # Every `count`-th image is another view of image n.
                pixels_BHWC[n::count], ids[n] = self._replacement(place, self._plan.piece(place)[n])
            return pixels_BHWC, ids
        kept = [n for n in range(len(ids)) if n not in out]
        return (pixels_BHWC[kept], [ids[n] for n in kept]) if out else (pixels_BHWC, ids)

    def _replacement(self, place: Place, image: int) -> tuple[Tensor, int]:
        """Return (pixels, index) of the next usable image, cropped as `image` would have been.

        The pixels (V, H, W, C) are those of the V views of a training image. Raise ValueError if
        none of the next IN_A_ROW images is usable.
        """
        jobs = [self._plan.job(place, image, view) for view in self._plan.views("train")]
        paths = self._splits[place.split].paths
        for other in range(image + 1, image + 1 + IN_A_ROW):
            other %= len(paths)
            if paths[other] in self._unusable:
                continue
            try:
                views = [decode(job._replace(path=paths[other]), self._view) for job in jobs]
            except Unreadable as error:
                self._left_out(paths[other], str(error), bad=True)
                continue
            odd = views[0][1]
            if not any([self._left_out(paths[other], why, bad=False) for why in odd]):
                self._plan.instead[image] = other
                return torch.stack([pixels_HWC for pixels_HWC, _ in views]), other
        raise ValueError(
            f"{paths[image]} and the {IN_A_ROW} images after it cannot be used: "
            "look at the disk and the log"
        )

    def _left_out(self, path: str, why: str, bad: bool) -> bool:
        """Record a fault of an image, and return whether the image is left out.

        Raise ValueError if the setting for this kind of fault is "fail".
        """
        key, policy = ("bad_images", self._bad) if bad else ("irregular_images", self._irregular)
        if policy == "fail":
            cure = (
                "repair or remove it"
                if bad
                else "convert it, or set dataset.irregular_images=convert"
            )
            cure += f", or set dataset.{key}=skip"
            raise ValueError(f"{path}: {why}; {cure}")
        seen = self._faults.setdefault("unreadable" if bad else why, set())
        if path not in seen:
            seen.add(path)
            # A whole folder may be grey: an image that is used is an example, no fault.
            named = NAMED if policy == "skip" else 1
            if len(seen) <= named:
                tell = log.warning if policy == "skip" else log.info
                last = "; more of these are counted, not named" if len(seen) == named else ""
                tell("%s: %s (dataset.%s=%s)%s", path, why, key, policy, last)
        if policy == "skip":
            self._unusable.add(path)
        return policy == "skip"

    def _count(self) -> None:
        """Log how many images have each fault so far, if a number changed since the last report."""
        counted = ", ".join(f"{len(paths)} {why}" for why, paths in self._faults.items())
        if counted != self._counted:
            self._counted = counted
            log.info("images so far: %s; %d are left out", counted, len(self._unusable))


def _chosen(files: Files, chosen_N: Tensor) -> Files:
    return Files(
        [files.paths[n] for n in chosen_N.nonzero()[:, 0].tolist()], files.labels_N[chosen_N]
    )


Data = DeviceData | StreamedData
