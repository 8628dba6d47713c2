"""A data set held on the device as uint8, its batches made there by tensor functions.

Shapes: N images of the data set, B of a batch, H W C pixel rows, columns and channels, X = W * C the numbers of a row,
P positions of a crop. Order, crops and flips of an epoch follow from (seed, epoch) alone, so every run with that seed
sees the same batches and nothing is saved to resume.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sddlskd.datasets import Files, Images, Splits, cifar100, digits, fake, fashion_mnist
from sddlskd.download import DownloadError

__all__ = ["DeviceData", "DownloadError", "Draws", "Files", "Images", "Normalise", "Splits"]
__all__ += ["check_labels", "draw_epoch", "held_out", "mirrored", "share_of"]
__all__ += [
    "cifar100",
    "digits",
    "fake",
    "fashion_mnist",
]  # the loaders, for `_target_: sddlskd.data.<name>`

CHUNK = (
    256  # images augmented together; measured: 128 to 512 are alike, more falls out of the cache
)
Batch = tuple[Tensor, Tensor]  # x_BCHW float32 normalised, y_B int64


class Draws(NamedTuple):
    """What chance decides in one epoch. Crops and flips belong to the image, not to its place in the order."""

    order_N: Tensor  # int64, image ids in the order they are shown
    top_N: Tensor  # int64, first row of image n's crop of the padded image, 0..2*padding
    left_N: Tensor  # int64, its first column
    flip_N: Tensor  # bool, mirrored left to right, after the crop


def draw_epoch(seed: int, epoch: int, size: int, padding: int) -> Draws:
    """The draws of an epoch over `size` images, the same in every process and for every device and batch size."""
    digest = hashlib.sha256(f"seed {seed} epoch {epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
    order_N = torch.randperm(size, generator=generator)
    flip_N = torch.randint(2, (size,), generator=generator) == 1
    top_N, left_N = torch.randint(2 * padding + 1, (2, size), generator=generator)
    return Draws(order_N, top_N, left_N, flip_N)


def share_of(count: int, rank: int, ranks: int) -> slice:
    """The part of a batch of `count` images that a rank trains on: in order, sizes differing by at most one.

    A batch with fewer than two images a rank cannot be shared (BatchNorm needs two): every rank then takes all of it.
    """
    if count < 2 * ranks:
        return slice(0, count)
    return slice(count * rank // ranks, count * (rank + 1) // ranks)


class DeviceData:
    """Training, validation and test batches from `splits`, all pixels resident on `device`.

    A training image is padded by `padding` black pixels on each side (before normalising, as torchvision's RandomCrop
    does on a PIL image, so the border becomes -mean/std), cropped to its size at random, and mirrored with probability
    1/2 if `flip`. `mean` and `std` are per channel, for pixels scaled to 0..1. With `val_fraction` > 0 that part of
    each class of the training split is held out as validation, the same images for every seed; otherwise validation
    is the test split.

    Where `ranks` processes share each batch, `batch_size` is that of all of them: this one, `rank`, gets its `share_of`
    each training batch, bit for bit, and its part of the validation images. Test batches are whole.

    Raises ValueError for images that are not uint8 NHWC of one size, labels that are not int64 in 0..num_classes-1, an
    empty split, and settings out of range.
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
        padding: int = 4,  # pixels on each side
        flip: bool = True,
        val_fraction: float = 0.0,
        eval_batch_size: int = 500,  # images
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        train, test = splits
        if isinstance(train, Files) or isinstance(test, Files):
            raise ValueError(
                "the splits are files; give them to sddlskd.streaming.StreamedData, or load their pixels"
            )
        _check_split("train", train, num_classes, train.images_NHWC.shape[1:])
        _check_split("test", test, num_classes, train.images_NHWC.shape[1:])
        height, width, channels = train.images_NHWC.shape[1:]
        self._device = torch.device(device)
        self._normalise = Normalise(mean, std, channels, width, self._device)
        if padding < 0 or eval_batch_size < 1:
            raise ValueError(
                f"padding is {padding}, at least 0; eval_batch_size is {eval_batch_size}, at least 1: raise it"
            )

        train, held_out = (
            _hold_out(train, val_fraction, num_classes) if val_fraction else (train, test)
        )
        self.train_size, self.val_size = len(train.labels_N), len(held_out.labels_N)
        self.test_size = len(test.labels_N)
        if not 1 <= batch_size <= self.train_size:
            raise ValueError(
                f"batch_size is {batch_size}; give 1..{self.train_size}, the number of training images"
            )
        self.image_shape = (channels, height, width)
        self.steps_per_epoch = math.ceil(self.train_size / batch_size)
        self._seed, self._padding, self._flip = seed, padding, flip
        self._batch_size, self._eval_batch_size = batch_size, eval_batch_size
        self._rank, self._ranks = rank, ranks

        self._train_labels_N = train.labels_N.to(self._device)
        padded_NHWC = F.pad(
            train.images_NHWC.to(self._device), (0, 0, padding, padding, padding, padding)
        ).contiguous()
        self._windows_PHX, self._padded_width = (
            _windows(padded_NHWC, height, width),
            width + 2 * padding,
        )
        self._padded_pixels = (height + 2 * padding) * self._padded_width
        self._test = Images(*(tensor.contiguous().to(self._device) for tensor in test))
        val = (
            Images(*(tensor.to(self._device) for tensor in held_out))
            if val_fraction
            else self._test
        )
        part = share_of(self.val_size, rank, ranks)
        self._val = Images(*(tensor[part] for tensor in val))

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Augmented batches of one epoch, every training image once, without the first `start` batches (to resume).

        x_BCHW float32 channels_last, y_B int64; the last batch is the rest. ValueError for a start past the epoch.
        """
        if not 0 <= start <= self.steps_per_epoch:
            raise ValueError(
                f"start is {start}; give 0..{self.steps_per_epoch}, the batches of an epoch already done"
            )
        order_N, top_N, left_N, flip_N = draw_epoch(
            self._seed, epoch, self.train_size, self._padding
        )
        corner_N = (
            torch.arange(self.train_size) * self._padded_pixels
            + top_N * self._padded_width
            + left_N
        )
        # All of the epoch's indices go over at once, so that no batch waits for the host.
        place_N, sizes = self._own(start)
        order_N = order_N[place_N].to(self._device)
        corner_N = corner_N.to(self._device)[order_N]
        flip_N = flip_N.to(self._device)[order_N]
        return self._chunks(corner_N, flip_N, self._train_labels_N[order_N], sizes)

    @property
    def views(self) -> int:
        """How many views of an image there are: crops times flips."""
        return (2 * self._padding + 1) ** 2 * (2 if self._flip else 1)

    def view_batches(self, epoch: int, start: int = 0) -> Iterator[Tensor]:
        """For each batch of `batches`: which view of which image each is, image * views + view, int64 on the CPU."""
        order_N, top_N, left_N, flip_N = draw_epoch(
            self._seed, epoch, self.train_size, self._padding
        )
        view_N = top_N * (2 * self._padding + 1) + left_N
        if self._flip:
            view_N = 2 * view_N + flip_N
        place_N, sizes = self._own(start)
        yield from torch.split(
            (torch.arange(self.train_size) * self.views + view_N)[order_N[place_N]], sizes
        )

    def _own(self, start: int) -> tuple[Tensor, list[int]]:
        """This rank's places in the epoch's order, from batch `start` on, and how many of them each batch has."""
        firsts = range(start * self._batch_size, self.train_size, self._batch_size)
        batches = [range(first, min(first + self._batch_size, self.train_size)) for first in firsts]
        shares = [batch[share_of(len(batch), self._rank, self._ranks)] for batch in batches]
        places = [torch.arange(share.start, share.stop) for share in shares]
        return torch.cat([torch.arange(0), *places]), [len(share) for share in shares]

    def val_batches(self) -> Iterator[Batch]:
        """Plain batches of this rank's validation images, in order: of the test split unless val_fraction is given."""
        return self._plain(self._val)

    def test_batches(self) -> Iterator[Batch]:
        """Plain batches of the official test split, in its order."""
        return self._plain(self._test)

    def test_images(self, indices: Sequence[int]) -> Tensor:
        """The raw pixels of test images, uint8 N H W C on the CPU."""
        return self._test.images_NHWC[list(indices)].cpu()

    def _chunks(
        self, corner_N: Tensor, flip_N: Tensor, labels_N: Tensor, sizes: list[int]
    ) -> Iterator[Batch]:
        # Small batches are made several at a time: fewer, larger operations, all elementwise, so the bits are the same.
        together, end = max(1, CHUNK * self._ranks // self._batch_size), 0
        for first in range(0, len(sizes), together):
            some = sizes[first : first + together]
            begin, end = end, end + sum(some)
            x_BCHW = self._augment(corner_N[begin:end], flip_N[begin:end])
            yield from zip(
                torch.split(x_BCHW, some), torch.split(labels_N[begin:end], some), strict=True
            )

    def _augment(self, corner_B: Tensor, flip_B: Tensor) -> Tensor:
        channels, height, width = self.image_shape
        x_BHWC = self._windows_PHX.index_select(0, corner_B).view(-1, height, width, channels)
        return self._normalise(mirrored(x_BHWC, flip_B) if self._flip else x_BHWC)

    def _plain(self, images: Images) -> Iterator[Batch]:
        firsts = range(0, len(images.labels_N), self._eval_batch_size)
        parts = (slice(first, first + self._eval_batch_size) for first in firsts)
        return (
            (self._normalise(images.images_NHWC[part]), images.labels_N[part]) for part in parts
        )


def _windows(images_NHWC: Tensor, height: int, width: int) -> Tensor:
    """A view, no copy: window p is the crop, height x (width * channels), whose corner is pixel p of all images."""
    count, padded_height, padded_width, channels = images_NHWC.shape
    corners = count * padded_height * padded_width - (height - 1) * padded_width - width + 1
    strides = (channels, padded_width * channels, 1)
    return images_NHWC.as_strided((corners, height, width * channels), strides)


def mirrored(x_BHWC: Tensor, flip_B: Tensor) -> Tensor:
    """The images, those that flip_B says left to right."""
    # Chosen by bytes (a ^ ((a ^ b) & mask) is b under the mask): on the CPU twice as fast as torch.where.
    mask_B111 = flip_B.to(torch.uint8).mul_(255)[:, None, None, None]
    return x_BHWC.flip(2).bitwise_xor_(x_BHWC).bitwise_and_(mask_B111).bitwise_xor_(x_BHWC)


class Normalise:
    """uint8 x_BHWC to float32 x_BCHW: (pixel / 255 - mean) / std; the permuted layout is channels_last as it stands.

    Raises ValueError unless there is one mean and one std, above 0, for each channel.
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
                f"mean has {len(mean)} and std {len(std)} entries for {channels} channels: give one of each per channel"
            )
        if not all(value > 0 and math.isfinite(value) for value in std):
            raise ValueError(
                f"std is {list(std)}; entries must be above 0: give the deviation of pixels in 0..1"
            )
        # pixel * scale - offset, repeated along a row: three at a time is far slower.
        mean_C, std_C = (
            torch.tensor(mean, dtype=torch.float64),
            torch.tensor(std, dtype=torch.float64),
        )
        self._scale_X = (1 / (255 * std_C)).float().repeat(width).to(device)
        self._offset_X = (mean_C / std_C).float().repeat(width).to(device)

    def __call__(self, x_BHWC: Tensor) -> Tensor:
        x_BHX = x_BHWC.flatten(2).float().mul_(self._scale_X).sub_(self._offset_X)
        return x_BHX.view(x_BHWC.shape).permute(0, 3, 1, 2)


def _hold_out(train: Images, fraction: float, num_classes: int) -> tuple[Images, Images]:
    """(rest, held out), both in the order of `train`."""
    held_N = held_out(train.labels_N.cpu(), fraction, num_classes)
    rest, val = (
        Images(*(tensor[part.to(tensor.device)] for tensor in train)) for part in (~held_N, held_N)
    )
    return rest, val


def held_out(labels_N: Tensor, fraction: float, num_classes: int) -> Tensor:
    """bool: the images that are validation, `fraction` of each class, rounded, chosen once and for all.

    Raises ValueError for a fraction outside [0, 1), and where that leaves nothing on one of the sides.
    """
    if not 0 <= fraction < 1:
        raise ValueError(
            f"val_fraction is {fraction}; it must lie in [0, 1): give 0.1 to hold out a tenth"
        )
    generator = torch.Generator().manual_seed(0)
    held_N = torch.zeros(len(labels_N), dtype=torch.bool)
    for label in range(num_classes):
        ids = (labels_N == label).nonzero()[:, 0]
        held_N[ids[torch.randperm(len(ids), generator=generator)[: round(fraction * len(ids))]]] = (
            True
        )
    if held_N.all() or not held_N.any():
        held = int(held_N.sum())
        message = (
            f"val_fraction is {fraction}, which holds out {held} of {len(held_N)} training images"
        )
        raise ValueError(f"{message}: give one that leaves images of a class on both sides")
    return held_N


def _check_split(name: str, split: Images, num_classes: int, image_shape: torch.Size) -> None:
    """ValueError unless the split has labelled uint8 images of that H, W, C."""
    images, labels = split
    if (
        images.dtype != torch.uint8
        or images.dim() != 4
        or images.shape[1:] != image_shape
        or 0 in image_shape
    ):
        found = f"{name} images are {images.dtype} {tuple(images.shape)}"
        raise ValueError(
            f"{found}; they must be torch.uint8 (N, H, W, C), one size in both splits: convert them in the loader"
        )
    check_labels(name, labels, len(images), num_classes)


def check_labels(name: str, labels: Tensor, count: int, num_classes: int) -> None:
    """ValueError unless the split has images, and each an int64 class in 0..num_classes-1."""
    if labels.dtype != torch.int64 or labels.shape != (count,):
        found = f"{name} labels are {labels.dtype} {tuple(labels.shape)}"
        raise ValueError(
            f"{found}; they must be torch.int64 ({count},), one per image: convert them in the loader"
        )
    if len(labels) == 0:
        raise ValueError(
            f"{name} holds 0 images; it must hold at least 1: check the loader's files and sizes"
        )
    bad = ((labels < 0) | (labels >= num_classes)).nonzero()
    if len(bad):
        index = int(bad[0])
        found = (
            f"{name} label {int(labels[index])} at index {index} is outside 0..{num_classes - 1}"
        )
        raise ValueError(
            f"{found}: set num_classes to the data's classes, or number them from 0 in the loader"
        )
