"""Hold a data set on the device as uint8 and make its batches there with tensor functions.

Shapes: N images of the data set, B images of a batch, H W C pixel rows, columns and channels, X = W
* C values of a pixel row, P positions of a crop. The order, crops and flips of an epoch depend on
(seed, epoch) alone. Every run with the same seed therefore sees the same batches, and resuming a
run needs no saved state.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sddlskd.data.checks import check_split
from sddlskd.data.strong import StrongDraws, cutout, draw_strong, rand_augment
from sddlskd.data.subsets import held_out, shown
from sddlskd.datasets.arrays import Files, Images, Splits
from sddlskd.terminal.words import counted

__all__ = [
    "Batch",
    "DeviceData",
    "Draws",
    "Normalise",
    "draw_epoch",
    "mirrored",
    "seed_of",
    "share_of",
]

# Images augmented together. Measured: 128 to 512 are equally fast; more do not fit in the cache.
CHUNK = 256


class Batch(NamedTuple):
    """Batch of B training images with their labels and indices.

    If several ranks share each batch, the B images are this rank's share.

    Attributes:
        images: normalised images, float32 (B, C, H, W), channels_last, on the device.
        labels: class of each image, int64 (B,), on the device; -1 for an image without label. For
            images with several labels, int64 (B, K): 1 for the classes of an image, and 0 for the
            others.
        index: index of each image among the images that are trained on, int64 (B,). Images of the
            training split that are not trained on have no index. On the CPU as the data set makes
            the batch; on the device in a captured step (recorded as a CUDA graph).
        views: number that identifies the image, its crop and its flip, int64 (B,), on the CPU. The
            number is index * `DeviceData.views` + number of the crop and flip. None for streamed
            images, whose crops never repeat.
        epoch: number of the epoch, from 1. If a method has a first stage of training before epoch
            1, the epochs of that stage are numbered ..., -1, 0.
        strong: strongly augmented versions of the same images, float32 (B, C, H, W), channels_last,
            on the device. None if the data were made without `strong`.
        plain: the same images without augmentation, float32 (B, C, H, W), channels_last, on the
            device. None if the data were made without `plain`.
    """

    images: Tensor
    labels: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which has no use here
    views: Tensor | None
    epoch: int = 1
    strong: Tensor | None = None
    plain: Tensor | None = None


class Draws(NamedTuple):
    """Random choices of one epoch: the order, crops and flips of the N images that are trained on.

    Image n is the one whose `Batch.index` is n, wherever the image is in the order.

    Attributes:
        order_N: indices of the images in the order in which they are shown, int64.
        top_N: first row of image n's crop in the padded image, int64, 0..2*padding.
        left_N: first column of image n's crop in the padded image, int64, 0..2*padding.
        flip_N: whether image n is mirrored left to right after the crop, bool.
    """

    order_N: Tensor
    top_N: Tensor
    left_N: Tensor
    flip_N: Tensor


def seed_of(*parts: object) -> int:
    """Return a seed from 0 to 2^63 - 1, hashed from the texts of all parts joined by spaces.

    The same parts give the same seed in every process and on every machine. Name the parts, as in
    `seed_of("seed", 1, "epoch", 2)`, so that no two uses have the same text.
    """
    digest = hashlib.sha256(" ".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") % 2**63


def draw_epoch(seed: int, epoch: int, size: int, padding: int) -> Draws:
    """Return the random choices of one epoch over `size` images.

    The result depends on the arguments alone, not on the process, the device or the batch size.

    Args:
        seed: seed of the run.
        epoch: number of the epoch.
        size: number of images.
        padding: pixels added on each side of an image; a crop starts at row and column
            0..2*padding.

    Returns:
        The order of the images, and one crop and flip per image, on the CPU.
    """
    generator = torch.Generator().manual_seed(seed_of("seed", seed, "epoch", epoch))
    order_N = torch.randperm(size, generator=generator)
    flip_N = torch.randint(2, (size,), generator=generator) == 1
    top_N, left_N = torch.randint(2 * padding + 1, (2, size), generator=generator)
    return Draws(order_N, top_N, left_N, flip_N)


def share_of(count: int, rank: int, ranks: int) -> slice:
    """Return the slice of a batch of `count` images that one rank takes.

    The slices of ranks 0, 1, ... follow each other in the batch, and their sizes differ by at most
    one. If `count` is less than 2 * `ranks`, every rank takes the whole batch, because BatchNorm
    needs two images.

    Args:
        count: number of images in the batch.
        rank: number of this rank, from 0.
        ranks: number of ranks that share the batch.

    Returns:
        A slice with start and stop in 0..count.
    """
    if count < 2 * ranks:
        return slice(0, count)
    return slice(count * rank // ranks, count * (rank + 1) // ranks)


def steps_per_epoch(images: int, batch_size: int, drop_last: bool) -> int:
    """Return the number of batches of an epoch.

    Args:
        images: number of images of the epoch.
        batch_size: number of images of a batch, over all ranks.
        drop_last: whether the last batch is left out if it is smaller than `batch_size`.
    """
    return images // batch_size if drop_last else math.ceil(images / batch_size)


class DeviceData:
    """Training, validation and test batches of a data set whose pixels all stay on the device.

    A training image is padded with black pixels, cropped at random to its original size, and
    mirrored with probability 1/2 if `flip` is set. The padding comes before the normalisation, so
    the normalised border is -mean/std.

    Ranks are the processes that train together. Each rank gets the slice `share_of` of each
    training batch, and one such slice of all validation images. Every rank gets all test batches.
    The number of ranks does not change the pixels of a training image.

    Args:
        splits: training and test split, as `Images`.
        num_classes: number of classes. A label is 0..num_classes-1; several labels of an image are
            num_classes zeros and ones.
        batch_size: training images per batch, over all ranks; at most the number of training
            images.
        seed: seed of the order, crops and flips.
        device: device that holds the pixels and makes the batches.
        mean: mean per channel, for pixels scaled to 0..1.
        std: standard deviation per channel, for pixels scaled to 0..1.
        padding: pixels added on each side of a training image.
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
        rank: number of this rank, from 0.
        ranks: number of ranks that share each batch.
        strong: whether each training batch also has strongly augmented versions of its images, in
            `Batch.strong`. A strong version has its own random crop, its own mirroring if `flip` is
            set, then RandAugment and Cutout (`sddlskd.data.strong`). The setting does not change
            `Batch.images`.
        plain: whether each training batch also has its images without augmentation, in
            `Batch.plain`. The setting does not change `Batch.images`.

    Attributes:
        train_size: number of images that are trained on, over all ranks.
        val_size: number of validation images, over all ranks.
        test_size: number of test images.
        image_shape: (C, H, W) of an image.
        steps_per_epoch: number of training batches per epoch.

    Raises:
        ValueError: If the data or an argument cannot be used: the splits are `Files`, the images
            are not uint8 (N, H, W, C) of one size in both splits, a split is empty, the labels are
            not those that `check_labels` accepts, `strong` is set and the images do not have 3
            channels, `mean` or `std` does not suit `Normalise`, or `padding`, a batch size or a
            fraction is out of range. A `val_fraction` other than 0 must hold out some images, but
            not all.
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
        padding: int = 4,
        flip: bool = True,
        val_fraction: float = 0.0,
        train_fraction: float = 1.0,
        unlabelled: bool = False,
        eval_batch_size: int = 500,
        drop_last: bool = False,
        rank: int = 0,
        ranks: int = 1,
        strong: bool = False,
        plain: bool = False,
    ) -> None:
        train, test = splits
        if isinstance(train, Files) or isinstance(test, Files):
            raise ValueError(
                "the splits are files; "
                "give them to sddlskd.data.streaming.StreamedData, or load their pixels"
            )
        check_split("train", train, num_classes, train.images_NHWC.shape[1:])
        check_split("test", test, num_classes, train.images_NHWC.shape[1:])
        height, width, channels = train.images_NHWC.shape[1:]
        if strong and channels != 3:
            raise ValueError(
                f"dataset.views=weak_strong needs images of 3 channels, not {channels}: "
                "set dataset.views=weak"
            )
        self._device = torch.device(device)
        self._normalise = Normalise(mean, std, channels, width, self._device)
        if padding < 0 or eval_batch_size < 1:
            raise ValueError(
                f"padding is {padding}, must be at least 0; "
                f"eval_batch_size is {eval_batch_size}, must be at least 1"
            )

        val = test
        if val_fraction:
            val = _chosen(train, held_out(train.labels_N.cpu(), val_fraction, num_classes))
        if val_fraction or train_fraction != 1:
            mask_N, labels_N = shown(
                train.labels_N.cpu(), val_fraction, train_fraction, num_classes, unlabelled
            )
            train = _chosen(train._replace(labels_N=labels_N), mask_N)
        self.train_size, self.val_size = len(train.labels_N), len(val.labels_N)
        self.test_size = len(test.labels_N)
        if not 1 <= batch_size <= self.train_size:
            raise ValueError(
                f"batch_size is {batch_size}; "
                f"give 1..{self.train_size}, the number of training images"
            )
        self.image_shape = (channels, height, width)
        self.steps_per_epoch = steps_per_epoch(self.train_size, batch_size, drop_last)
        self._seed, self._padding, self._flip = seed, padding, flip
        self._batch_size, self._eval_batch_size = batch_size, eval_batch_size
        self._rank, self._ranks = rank, ranks
        self._strong, self._with_plain = strong, plain

        self._train_labels_N = train.labels_N.to(self._device)
        padded_NHWC = F.pad(
            train.images_NHWC.to(self._device), (0, 0, padding, padding, padding, padding)
        ).contiguous()
        self._windows_PHX = _windows(padded_NHWC, height, width)
        self._padded_width = width + 2 * padding
        self._padded_pixels = (height + 2 * padding) * self._padded_width
        self._test = Images(*(tensor.contiguous().to(self._device) for tensor in test))
        val = Images(*(tensor.to(self._device) for tensor in val)) if val_fraction else self._test
        part = share_of(self.val_size, rank, ranks)
        self._val = Images(*(tensor[part] for tensor in val))

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Return an iterator over the augmented training batches of one epoch, in random order.

        Over a whole epoch, each image that is trained on is in exactly one batch. The images of the
        last batch are in none if `drop_last` leaves that batch out.

        Args:
            epoch: number of the epoch; with the seed, the number decides the order, crops and
                flips.
            start: number of batches to skip at the beginning of the epoch, to resume the epoch.

        Returns:
            Iterator over this rank's share of each `Batch`. The last batch holds the remaining
            images, which may be fewer.

        Raises:
            ValueError: If `start` is outside 0..steps_per_epoch; raised at once, not during
                iteration.
        """
        if not 0 <= start <= self.steps_per_epoch:
            raise ValueError(
                f"start is {start}; give 0..{self.steps_per_epoch}, "
                "the number of batches of the epoch that are already done"
            )
        order_N, top_N, left_N, flip_N = draw_epoch(
            self._seed, epoch, self.train_size, self._padding
        )
        place_N, sizes = self._own(start)
        index_N = order_N[place_N]
        corner_N = self._corners(top_N, left_N)
        view_N = top_N * (2 * self._padding + 1) + left_N
        if self._flip:
            view_N = 2 * view_N + flip_N
        views_N = index_N * self.views + view_N[index_N]
        if self._device.type == "cuda":
            index_N = index_N.pin_memory()  # a batch's part is then copied without waiting
        # Copy all indices of the epoch to the device at once, so that no batch waits for the host.
        batches = self._chunks(
            corner_N[index_N].to(self._device),
            flip_N[index_N].to(self._device),
            self._train_labels_N[index_N.to(self._device)],
            index_N,
            views_N,
            sizes,
            epoch,
        )
        if self._strong:
            pairs = zip(batches, self._strong_views(index_N, sizes, epoch), strict=True)
            batches = (batch._replace(strong=x_BCHW) for batch, x_BCHW in pairs)
        if self._with_plain:
            pairs = zip(batches, self._plain_views(index_N, sizes), strict=True)
            batches = (batch._replace(plain=x_BCHW) for batch, x_BCHW in pairs)
        return batches

    @property
    def train_labels(self) -> Tensor:
        """Return the class of each image that is trained on, int64 (N,), on the CPU.

        Entry n is the class of the image whose `Batch.index` is n; -1 if the image has no label.
        For images with several labels, the result is (N, K) with zeros and ones.
        """
        return self._train_labels_N.cpu()

    @property
    def views(self) -> int:
        """Return how many different crops and flips a training image can have.

        The number is (2 * padding + 1)^2 crops, times 2 if `flip` is set.
        """
        return (2 * self._padding + 1) ** 2 * (2 if self._flip else 1)

    def _own(self, start: int) -> tuple[Tensor, list[int]]:
        """Return this rank's positions in the order of an epoch, and their number per batch.

        Both begin at batch `start`.
        """
        firsts = [step * self._batch_size for step in range(start, self.steps_per_epoch)]
        batches = [range(first, min(first + self._batch_size, self.train_size)) for first in firsts]
        shares = [batch[share_of(len(batch), self._rank, self._ranks)] for batch in batches]
        places = [torch.arange(share.start, share.stop) for share in shares]
        return torch.cat([torch.arange(0), *places]), [len(share) for share in shares]

    def val_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Return an iterator over this rank's validation batches, in order, not augmented.

        A batch is (images, labels) on the device: normalised float32 (B, C, H, W) and int64 (B,),
        or (B, K) for images with several labels. B is `eval_batch_size`, or less in the last batch.
        The images come from the test split if `val_fraction` is 0.
        """
        return self._plain(self._val)

    def test_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Return an iterator over the batches of the whole test split, in order, not augmented.

        A batch is (images, labels) on the device: normalised float32 (B, C, H, W) and int64 (B,),
        or (B, K) for images with several labels. B is `eval_batch_size`, or less in the last batch.
        """
        return self._plain(self._test)

    def test_images(self, indices: Sequence[int]) -> Tensor:
        """Return the raw pixels of some test images, uint8 (B, H, W, C) on the CPU.

        `indices` are the positions of the B images in the test split, from 0.

        Raises:
            IndexError: If an index is not below the number of test images.
        """
        return self._test.images_NHWC[list(indices)].cpu()

    def _chunks(
        self,
        corner_N: Tensor,
        flip_N: Tensor,
        labels_N: Tensor,
        index_N: Tensor,
        views_N: Tensor,
        sizes: list[int],
        epoch: int,
    ) -> Iterator[Batch]:
        # Small batches are made several at a time, with fewer and larger operations. All operations
        # are elementwise, so the results are the same bits.
        together = max(1, CHUNK * self._ranks // self._batch_size)
        end = 0
        for first in range(0, len(sizes), together):
            some = sizes[first : first + together]
            part = slice(end, end + sum(some))
            end = part.stop
            x_BCHW = self._augment(corner_N[part], flip_N[part])
            yield from map(
                Batch,
                torch.split(x_BCHW, some),
                torch.split(labels_N[part], some),
                torch.split(index_N[part], some),
                torch.split(views_N[part], some),
                repeat(epoch),
            )

    def _strong_views(self, index_N: Tensor, sizes: list[int], epoch: int) -> Iterator[Tensor]:
        """Return an iterator over the strong views of the images of an epoch, batch by batch.

        Args:
            index_N: index of each image, in the order of the batches.
            sizes: number of images of each batch.
            epoch: number of the epoch.

        Returns:
            Iterator over x_BCHW, normalised float32, one per batch.
        """
        key = seed_of("seed", self._seed, "epoch", epoch, "view", "strong")
        draws = draw_strong(key, self.train_size, self._padding)
        draws = StrongDraws(*(drawn_N[index_N] for drawn_N in draws))
        corner_N = self._corners(draws.top_N, draws.left_N, index_N).to(self._device)
        flip_N = draws.flip_N.to(self._device)
        together = max(1, CHUNK * self._ranks // self._batch_size)
        end = 0
        for first in range(0, len(sizes), together):
            some = sizes[first : first + together]
            part = slice(end, end + sum(some))
            end = part.stop
            x_BHWC = self._crops(corner_N[part], flip_N[part])
            x_BHWC = rand_augment(x_BHWC, draws.operation_NK[part], draws.value_NK[part])
            x_BHWC = cutout(x_BHWC, draws.cut_N3[part])
            yield from torch.split(self._normalise(x_BHWC), some)

    def _corners(self, top_N: Tensor, left_N: Tensor, index_N: Tensor | None = None) -> Tensor:
        """Return the index in `_windows_PHX` of one crop per image.

        Args:
            top_N: first row of each crop in the padded image.
            left_N: first column of each crop in the padded image.
            index_N: index of the image of each crop; None for all training images in order.

        Returns:
            The indices, (N,) int64.
        """
        if index_N is None:
            index_N = torch.arange(self.train_size)
        return index_N * self._padded_pixels + top_N * self._padded_width + left_N

    def _augment(self, corner_B: Tensor, flip_B: Tensor) -> Tensor:
        return self._normalise(self._crops(corner_B, flip_B))

    def _plain_views(self, index_N: Tensor, sizes: list[int]) -> Iterator[Tensor]:
        """Return an iterator over the images of an epoch without augmentation, batch by batch.

        Args:
            index_N: index of each image, in the order of the batches.
            sizes: number of images of each batch.

        Returns:
            Iterator over x_BCHW, normalised float32, one per batch.
        """
        middle_N = torch.full_like(index_N, self._padding)
        corner_N = self._corners(middle_N, middle_N, index_N).to(self._device)
        channels, height, width = self.image_shape
        for corner_B in torch.split(corner_N, sizes):
            x_BHX = self._windows_PHX.index_select(0, corner_B)
            yield self._normalise(x_BHX.view(-1, height, width, channels))

    def _crops(self, corner_B: Tensor, flip_B: Tensor) -> Tensor:
        channels, height, width = self.image_shape
        x_BHWC = self._windows_PHX.index_select(0, corner_B).view(-1, height, width, channels)
        return mirrored(x_BHWC, flip_B) if self._flip else x_BHWC

    def _plain(self, images: Images) -> Iterator[tuple[Tensor, Tensor]]:
        firsts = range(0, len(images.labels_N), self._eval_batch_size)
        parts = (slice(first, first + self._eval_batch_size) for first in firsts)
        return (
            (self._normalise(images.images_NHWC[part]), images.labels_N[part]) for part in parts
        )


def _windows(images_NHWC: Tensor, height: int, width: int) -> Tensor:
    """Return a view (no copy) of the crops at all P positions of the padded images.

    Window p is the crop, height x (width * channels), whose top left corner is pixel p, counted
    over the pixels of all images.
    """
    count, padded_height, padded_width, channels = images_NHWC.shape
    corners = count * padded_height * padded_width - (height - 1) * padded_width - width + 1
    strides = (channels, padded_width * channels, 1)
    return images_NHWC.as_strided((corners, height, width * channels), strides)


def mirrored(x_BHWC: Tensor, flip_B: Tensor) -> Tensor:
    """Return a copy of the images in which the selected ones are mirrored left to right.

    `x_BHWC` is uint8 (B, H, W, C). `flip_B` is bool (B,), true for the images to mirror, on the
    device of the images.
    """
    # a ^ ((a ^ b) & mask) selects b under the mask. On the CPU, this selection of bytes is twice
    # as fast as torch.where.
    mask_B111 = flip_B.to(torch.uint8).mul_(255)[:, None, None, None]
    return x_BHWC.flip(2).bitwise_xor_(x_BHWC).bitwise_and_(mask_B111).bitwise_xor_(x_BHWC)


class Normalise:
    """Function from uint8 images (B, H, W, C) to normalised float32 images (B, C, H, W).

    Call the instance with the images. The result is (pixel / 255 - mean) / std, channels_last.

    Args:
        mean: mean of each channel, for pixels scaled to 0..1.
        std: standard deviation of each channel, for pixels scaled to 0..1.
        channels: number of channels, C.
        width: width of all images in pixels, W.
        device: device of the images.

    Raises:
        ValueError: If `mean` or `std` does not have one entry per channel, or if an entry of `std`
            is not above 0 and finite.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        channels: int,
        width: int,
        device: torch.device,
    ) -> None:
        if len(mean) != channels or len(std) != channels:
            raise ValueError(
                f"mean has {len(mean)} and std {counted(len(std), 'entry', 'entries')} for "
                f"{counted(channels, 'channel')}: give one of each per channel"
            )
        if not all(value > 0 and math.isfinite(value) for value in std):
            raise ValueError(
                f"std is {list(std)}; entries must be above 0: "
                "give the standard deviation of pixels scaled to 0..1"
            )
        # Compute pixel * scale - offset with both repeated along a pixel row, because operations
        # on three channels at a time are far slower.
        mean_C = torch.tensor(mean, dtype=torch.float64)
        std_C = torch.tensor(std, dtype=torch.float64)
        self._scale_X = (1 / (255 * std_C)).float().repeat(width).to(device)
        self._offset_X = (mean_C / std_C).float().repeat(width).to(device)

    def __call__(self, x_BHWC: Tensor) -> Tensor:
        """Return normalised float32 images x_BCHW, channels_last, of uint8 images x_BHWC.

        The given images are not changed.
        """
        x_BHX = x_BHWC.flatten(2).float().mul_(self._scale_X).sub_(self._offset_X)
        return x_BHX.view(x_BHWC.shape).permute(0, 3, 1, 2)


def _chosen(images: Images, mask_N: Tensor) -> Images:
    """Return the images that the mask is true for, in their order."""
    return Images(*(tensor[mask_N.to(tensor.device)] for tensor in images))
