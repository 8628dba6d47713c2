"""Augment uint8 images strongly, with tensor functions over a batch on the batch's device.

RandAugment is the variant of MLKD and FixMatch: each image gets 2 of 14 operations, drawn with
replacement, each with a value that is uniform in the operation's range. A Cutout always follows.
The operations are Pillow's, and they give exactly Pillow's values. Those with look-up tables and
sums are computed in integers. Brightness, colour, contrast and sharpness are computed in float32
and cut off as in Pillow. The geometric operations take the nearest pixel at Pillow's 16-bit
fixed-point coordinates. An image's result does not depend on the other images of the batch.

MixUp and CutMix combine pairs of normalised images. The training loop does not call them yet: each
mixed image has two labels, and the loop's losses take one.

Shapes: N images of the data set, B images of a batch, H W C pixel rows, columns and channels, P
planes (B * C), S = H * W, L = 256 levels, K operations of an image.

Sources: RandAugment = Cubuk et al. 2020 (arXiv:1909.13719); Cutout = DeVries and Taylor 2017
(arXiv:1708.04552); MLKD = Jin et al. 2023 (CVPR), mdistiller/dataset/cifar100.py of its code; MixUp
= Zhang et al. 2018 (arXiv:1710.09412); CutMix = Yun et al. 2019 (arXiv:1905.04899).
"""

import math
import random
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "OPERATIONS",
    "Mix",
    "StrongDraws",
    "cutmix",
    "cutout",
    "draw_mix",
    "draw_strong",
    "mixup",
    "rand_augment",
]

LEVELS = 256
DRAWN = 2  # operations of an image
MOST_CUT = 0.5  # largest side of a Cutout, in widths of the image
CUT_COLOUR = (125, 123, 114)  # the mean colour of CIFAR-10
ONE = 1 << 16  # 1.0 in Pillow's fixed-point coordinates

Operation = Callable[[Tensor, Tensor], Tensor]
"""Function (uint8 images (B, H, W, C), float64 values (B,) on the CPU) -> uint8 images."""


class StrongDraws(NamedTuple):
    """Random choices of one epoch for the strong views: strongly augmented versions of N images.

    Row n is for image n of the images that are trained on, as in `Batch.index`.

    Attributes:
        top_N: first row of image n's crop in the padded image, int64, 0..2*padding.
        left_N: first column of image n's crop in the padded image, int64, 0..2*padding.
        flip_N: whether image n is mirrored left to right after the crop, bool.
        operation_NK: indices into `OPERATIONS` of the K operations on image n, in the order in
            which they are applied, int64 (N, K).
        value_NK: value of each operation, float64 (N, K), from 0 (least value of the operation in
            `OPERATIONS`) to 1 (largest value).
        cut_N3: side, centre column and centre row of the square that `cutout` paints, float64
            (N, 3), each uniform in 0 to 1; `cutout` turns them into pixels.
    """

    top_N: Tensor
    left_N: Tensor
    flip_N: Tensor
    operation_NK: Tensor
    value_NK: Tensor
    cut_N3: Tensor


def draw_strong(seed: int, size: int, padding: int) -> StrongDraws:
    """Return one epoch's random choices for the strong views of `size` images.

    A strong view is a strongly augmented version of an image. The result depends on the arguments
    alone, not on the process, the device or the batch size.

    Args:
        seed: seed of the choices; no other random choice should use the same seed.
        size: number of images.
        padding: pixels added on each side of an image; a crop starts at row and column
            0..2*padding.

    Returns:
        The choices, one row per image, on the CPU; each image has K = 2 operations.
    """
    generator = torch.Generator().manual_seed(seed)
    flip_N = torch.randint(2, (size,), generator=generator) == 1
    top_N, left_N = torch.randint(2 * padding + 1, (2, size), generator=generator)
    operation_NK = torch.randint(len(OPERATIONS), (size, DRAWN), generator=generator)
    unit_NX = torch.rand(size, DRAWN + 3, generator=generator, dtype=torch.float64)
    return StrongDraws(top_N, left_N, flip_N, operation_NK, unit_NX[:, :DRAWN], unit_NX[:, DRAWN:])


def rand_augment(images_BHWC: Tensor, operation_BK: Tensor, value_BK: Tensor) -> Tensor:
    """Return the images after K operations of RandAugment on each image.

    Args:
        images_BHWC: RGB images, at least one, uint8 (B, H, W, 3).
        operation_BK: indices into `OPERATIONS` of the operations on each image, in the order in
            which they are applied, int64 (B, K) on the CPU.
        value_BK: value of each operation, float64 (B, K) on the CPU, from 0 (least value of the
            operation in `OPERATIONS`) to 1 (largest value).

    Returns:
        The new images, uint8 (B, H, W, 3); the given images are not changed.
    """
    device = images_BHWC.device
    for operation_B, value_B in zip(operation_BK.T, value_BK.T, strict=True):
        # Sort the images by operation, so that each operation is called once.
        order_B = operation_B.argsort(stable=True)
        counts = operation_B.bincount(minlength=len(OPERATIONS)).tolist()
        images = torch.split(images_BHWC.index_select(0, order_B.to(device)), counts)
        parts = [
            apply(part_BHWC, low + (high - low) * part_B)
            for (apply, low, high), part_BHWC, part_B in zip(
                OPERATIONS, images, torch.split(value_B[order_B], counts), strict=True
            )
            if len(part_B)
        ]
        images_BHWC = torch.cat(parts).index_select(0, order_B.argsort().to(device))
    return images_BHWC


def cutout(images_BHWC: Tensor, cut_B3: Tensor) -> Tensor:
    """Return the images with a square painted on each in the mean colour of CIFAR-10.

    Let s, c and r be an image's row in `cut_B3`, and H and W its height and width in pixels. The
    side of the square is floor(s W / 2) + 1 pixels. If s is 0, nothing is painted. The square
    starts at column floor(W - c (W - 1) - s W / 4) and row floor(H - r (H - 1) - s W / 4), or at 0
    if the number is negative. At the right and lower edges, the square is cut off.

    Args:
        images_BHWC: RGB images, uint8 (B, H, W, 3).
        cut_B3: s, c and r of each image, each from 0 to 1, float64 (B, 3) on the CPU.

    Returns:
        The new images, uint8 (B, H, W, 3); the given images are not changed.
    """
    device = images_BHWC.device
    _, height, width, _ = images_BHWC.shape
    share_B, column_B, row_B = cut_B3.unbind(1)
    side_B = share_B * MOST_CUT * width

    def span(centre_B: Tensor, length: int) -> Tensor:
        """Return which of `length` rows or columns the square covers, bool (B, length)."""
        # The centre is in 1..length: the released code calls numpy's uniform(length), which sets
        # the lower bound alone.
        first_B = (length + (1 - length) * centre_B - side_B / 2).clamp(min=0).floor()
        last_B = (first_B + side_B).floor()  # Pillow paints the last row and column, too
        last_B[side_B <= 0] = -1  # nothing is painted
        place = torch.arange(length, device=device)
        first_B1, last_B1 = (end_B.long().to(device)[:, None] for end_B in (first_B, last_B))
        return (place >= first_B1) & (place <= last_B1)

    inside_BHW = span(row_B, height)[:, :, None] & span(column_B, width)[:, None, :]
    colour_C = torch.tensor(CUT_COLOUR, dtype=torch.uint8, device=device)
    return torch.where(inside_BHW[..., None], colour_C, images_BHWC)


# The operations. Each takes one value per image; some do not use it.


def _identity(images_BHWC: Tensor, _: Tensor) -> Tensor:
    return images_BHWC


def _auto_contrast(images_BHWC: Tensor, _: Tensor) -> Tensor:
    """Stretch each channel to 0..255."""
    lowest_PL = images_BHWC.amin((1, 2)).view(-1, 1)
    highest_PL = images_BHWC.amax((1, 2)).view(-1, 1)
    device = images_BHWC.device
    # Pillow computes in float64, which Apple's GPUs lack.
    place = torch.device("cpu") if device.type == "mps" else device
    low_PL, high_PL = lowest_PL.to(place, torch.float64), highest_PL.to(place, torch.float64)
    level_L = torch.arange(LEVELS, dtype=torch.float64, device=place)
    # Not `255 / range`: torch computes that as the product with the reciprocal.
    scale_PL = level_L[-1] / (high_PL - low_PL).clamp(min=1)
    stretched_PL = (level_L * scale_PL - low_PL * scale_PL).clamp(0, 255)
    table_PL = torch.where(high_PL > low_PL, stretched_PL, level_L).to(torch.uint8)
    return _looked_up(images_BHWC, table_PL.to(device))


def _equalize(images_BHWC: Tensor, _: Tensor) -> Tensor:
    """Make the histogram of each channel even."""
    planes_PS = _planes(images_BHWC).long()
    count_PL = planes_PS.new_zeros(len(planes_PS), LEVELS)
    count_PL.scatter_add_(1, planes_PS, torch.ones_like(planes_PS))
    of_highest_PL = count_PL.gather(1, planes_PS.amax(1, keepdim=True))
    step_PL = (planes_PS.shape[1] - of_highest_PL) // 255
    below_PL = count_PL.cumsum(1) - count_PL
    even_PL = ((step_PL // 2 + below_PL) // step_PL.clamp(min=1)).clamp(max=255)
    level_L = torch.arange(LEVELS, device=planes_PS.device)
    table_PL = torch.where(step_PL > 0, even_PL, level_L).to(torch.uint8)
    return _looked_up(images_BHWC, table_PL)


def _posterize(images_BHWC: Tensor, bits_B: Tensor) -> Tensor:
    """Keep the highest bits of each level; the number of bits is rounded down."""
    mask_B = (256 - (1 << (8 - bits_B.long()))).to(torch.uint8)
    return images_BHWC & _per_image(mask_B, images_BHWC)


def _solarize(images_BHWC: Tensor, threshold_B: Tensor) -> Tensor:
    """Invert the levels at or above a threshold."""
    first_B = threshold_B.ceil().to(torch.int16)
    return torch.where(
        images_BHWC < _per_image(first_B, images_BHWC), images_BHWC, 255 - images_BHWC
    )


def _brightness(images_BHWC: Tensor, share_B: Tensor) -> Tensor:
    return _blended(torch.zeros_like(images_BHWC[:, :1, :1]), images_BHWC, share_B)


def _colour(images_BHWC: Tensor, share_B: Tensor) -> Tensor:
    return _blended(_grey(images_BHWC), images_BHWC, share_B)


def _contrast(images_BHWC: Tensor, share_B: Tensor) -> Tensor:
    grey_BS = _grey(images_BHWC).flatten(1)
    size = grey_BS.shape[1]
    mean_B = (2 * grey_BS.sum(1, dtype=torch.int64) + size) // (2 * size)
    return _blended(mean_B[:, None, None, None], images_BHWC, share_B)


def _sharpness(images_BHWC: Tensor, share_B: Tensor) -> Tensor:
    """Blend with the images smoothed by a 3x3 kernel, whose border stays as it is."""
    wide_BHWC = images_BHWC.to(torch.int16)
    columns = wide_BHWC[:, :, :-2] + wide_BHWC[:, :, 1:-1] + wide_BHWC[:, :, 2:]
    sum_BHWC = columns[:, :-2] + columns[:, 1:-1] + columns[:, 2:]
    sum_BHWC += 4 * wide_BHWC[:, 1:-1, 1:-1]
    smooth_BHWC = images_BHWC.clone()
    # The kernel sums to 13. No sum is within rounding error of a half.
    smooth_BHWC[:, 1:-1, 1:-1] = sum_BHWC.float().div_(13).add_(0.5).to(torch.uint8)
    return _blended(smooth_BHWC, images_BHWC, share_B)


def _rotate(images_BHWC: Tensor, degrees_B: Tensor) -> Tensor:
    """Rotate about the centre, counter-clockwise for positive values."""
    _, height, width, _ = images_BHWC.shape
    angle_B = -torch.deg2rad(degrees_B)
    cos_B, sin_B = angle_B.cos(), angle_B.sin()
    x, y = width / 2, height / 2
    across = torch.stack((cos_B, sin_B, x - cos_B * x - sin_B * y), 1)
    down = torch.stack((-sin_B, cos_B, y + sin_B * x - cos_B * y), 1)
    return _nearest(images_BHWC, across, down)


def _shear_x(images_BHWC: Tensor, share_B: Tensor) -> Tensor:
    across, down = _unmoved(share_B)
    across[:, 1] = share_B
    return _nearest(images_BHWC, across, down)


def _shear_y(images_BHWC: Tensor, share_B: Tensor) -> Tensor:
    across, down = _unmoved(share_B)
    down[:, 0] = share_B
    return _nearest(images_BHWC, across, down)


def _translate_x(images_BHWC: Tensor, share_B: Tensor) -> Tensor:
    across, down = _unmoved(share_B)
    # Translate by whole pixels, as a separate path in Pillow does.
    across[:, 2] = (share_B * images_BHWC.shape[2] + 0.5).floor()
    return _nearest(images_BHWC, across, down)


def _translate_y(images_BHWC: Tensor, share_B: Tensor) -> Tensor:
    across, down = _unmoved(share_B)
    down[:, 2] = (share_B * images_BHWC.shape[1] + 0.5).floor()
    return _nearest(images_BHWC, across, down)


OPERATIONS: tuple[tuple[Operation, float, float], ...] = (
    (_auto_contrast, 0, 1),
    (_brightness, 0.05, 0.95),
    (_colour, 0.05, 0.95),
    (_contrast, 0.05, 0.95),
    (_equalize, 0, 1),
    (_identity, 0, 1),
    (_posterize, 4, 8),
    (_rotate, -30, 30),
    (_sharpness, 0.05, 0.95),
    (_shear_x, -0.3, 0.3),
    (_shear_y, -0.3, 0.3),
    (_solarize, 0, 256),
    (_translate_x, -0.3, 0.3),
    (_translate_y, -0.3, 0.3),
)
"""The operations of RandAugment: (function, least value, largest value).

For brightness, colour, contrast and sharpness, the value is the weight of the original image in a
blend. For `_posterize`, the value is the number of bits kept; for `_rotate`, an angle in degrees;
for `_solarize`, the lowest level that is inverted. For shears, the value is the shift in pixels per
row or column; for translations, the shift as a fraction of the width or height. `_auto_contrast`,
`_equalize` and `_identity` ignore the value.
"""


def _per_image(value_B: Tensor, images_BHWC: Tensor) -> Tensor:
    return value_B.to(images_BHWC.device)[:, None, None, None]


def _planes(images_BHWC: Tensor) -> Tensor:
    """Return the values of each channel of each image, (P, S)."""
    return images_BHWC.flatten(1, 2).transpose(1, 2).flatten(0, 1)


def _looked_up(images_BHWC: Tensor, table_PL: Tensor) -> Tensor:
    """Return the images with each value replaced by its entry in the table of its channel."""
    B, H, W, C = images_BHWC.shape
    new_PS = table_PL.gather(1, _planes(images_BHWC).long())
    return new_PS.view(B, C, H * W).transpose(1, 2).reshape(B, H, W, C)


def _grey(images_BHWC: Tensor) -> Tensor:
    """Return the luminance of each pixel as Pillow's mode L, (B, H, W, 1), ITU-R 601-2."""
    red, green, blue = images_BHWC.int().unbind(-1)
    return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16).to(torch.uint8)[..., None]


def _blended(from_BHWC: Tensor, images_BHWC: Tensor, share_B: Tensor) -> Tensor:
    """Return from + share * (images - from), in float32 and cut off to integers as in Pillow."""
    from_BHWC = from_BHWC.float()
    difference_BHWC = images_BHWC.float().sub_(from_BHWC)
    return difference_BHWC.mul_(_per_image(share_B.float(), images_BHWC)).add_(from_BHWC).byte()


def _unmoved(value_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return the coefficients of the identity for `_nearest`: two new tensors (B, 3)."""
    across, down = value_B.new_zeros(2, len(value_B), 3)
    across[:, 0] = 1
    down[:, 1] = 1
    return across, down


def _nearest(images_BHWC: Tensor, across_B3: Tensor, down_B3: Tensor) -> Tensor:
    """Return the images after an affine map, black outside of the given ones.

    Pixel (x, y) of the result is the given pixel at column a x + b y + c and row d x + e y + f,
    which is found in fixed-point numbers as in Pillow's `affine_fixed`.

    Args:
        images_BHWC: images, uint8.
        across_B3: a, b, c, float64 on the CPU.
        down_B3: d, e, f, float64 on the CPU.

    Returns:
        The new images.
    """
    B, H, W, _ = images_BHWC.shape
    device = images_BHWC.device
    across, down = (
        # Pixel centres lie half a pixel from the corner.
        torch.cat((of[:, :2], of[:, 2:] + of[:, :2].sum(1, keepdim=True) / 2), 1)
        for of in (across_B3, down_B3)
    )
    fixed = (torch.stack((across, down)) * ONE + 0.5).floor().int().to(device)[..., None, None]
    x = torch.arange(W, dtype=torch.int32, device=device)
    y = torch.arange(H, dtype=torch.int32, device=device)[:, None]
    column_BHW, row_BHW = ((of[:, 0] * x + of[:, 1] * y + of[:, 2]) >> 16 for of in fixed)
    is_inside_BHW = (column_BHW >= 0) & (column_BHW < W) & (row_BHW >= 0) & (row_BHW < H)
    first_B = torch.arange(B, device=device)[:, None, None] * (H * W)
    place_BHW = first_B + row_BHW.clamp(0, H - 1) * W + column_BHW.clamp(0, W - 1)
    moved_BHWC = images_BHWC.flatten(0, 2).index_select(0, place_BHW.flatten())
    return moved_BHWC.view(images_BHWC.shape).mul_(is_inside_BHW[..., None])


# Combinations of two images


class Mix(NamedTuple):
    """Random choices with which `mixup` and `cutmix` combine each image of a batch with a partner.

    Attributes:
        partner_B: index in the batch of each image's partner, which can be the image itself, int64
            (B,) on the CPU.
        share: weight of an image in the result, 0 to 1, the same for the whole batch. Its partner
            has the weight 1 - share.
        column: column of the centre of CutMix's box, as a fraction of the image's width.
        row: row of the centre of CutMix's box, as a fraction of the image's height.
    """

    partner_B: Tensor
    share: float
    column: float
    row: float


def draw_mix(seed: int, size: int, alpha: float = 1.0) -> Mix:
    """Return random choices with which `mixup` or `cutmix` combines the images of a batch.

    As in the papers of MixUp and CutMix, all images of the batch have the same `share`, drawn from
    Beta(alpha, alpha).

    Args:
        seed: seed of the batch. `sddlskd.data.device.seed_of` can make it from the seed of the run,
            the epoch and the indices of the images.
        size: number of images.
        alpha: parameter of the Beta distribution. With a small value, the share is mostly near 0 or
            1, so that the images are hardly mixed.

    Returns:
        The partners (a random permutation), the share and the centre of the box.

    Raises:
        ValueError: If `alpha` is not above 0.
    """
    if not alpha > 0:
        raise ValueError(f"alpha={alpha} must be greater than 0")
    generator = torch.Generator().manual_seed(seed)
    draw = random.Random(seed)
    partner_B = torch.randperm(size, generator=generator)
    return Mix(partner_B, draw.betavariate(alpha, alpha), draw.random(), draw.random())


def mixup(images_BCHW: Tensor, mix: Mix) -> tuple[Tensor, float]:
    """Return weighted means of images and their partners, and the weight of the images' own labels.

    The images are floating-point (B, C, H, W), and so are the means, in a new tensor. A mean is
    `mix.share` * image + (1 - `mix.share`) * partner. The weight is a scalar, `mix.share`. The
    label of the partner has the weight 1 - `mix.share`.
    """
    partner_BCHW = images_BCHW[mix.partner_B.to(images_BCHW.device)]
    return mix.share * images_BCHW + (1 - mix.share) * partner_BCHW, mix.share


def cutmix(images_BCHW: Tensor, mix: Mix) -> tuple[Tensor, float]:
    """Return images with a box from each image's partner, and the weight of the images' own labels.

    The images are floating-point (B, C, H, W), and so are the new ones; the given ones are not
    changed. All images have the same box. Its centre is at (`mix.row`, `mix.column`), as fractions
    of height and width. The sides of the box are sqrt(1 - `mix.share`) of the image's sides,
    rounded down to even numbers of pixels, and the box is cut off at the edges. The weight is a
    scalar, the fraction of the pixels outside the box. The label of the partner has the weight 1
    minus this fraction.
    """
    height, width = images_BCHW.shape[2:]
    part = math.sqrt(1 - mix.share)

    def span(centre: float, length: int) -> slice:
        middle, half = int(centre * length), int(part * length) // 2
        return slice(max(middle - half, 0), min(middle + half, length))

    rows, columns = span(mix.row, height), span(mix.column, width)
    mixed_BCHW = images_BCHW.clone()
    partner_BCHW = images_BCHW[mix.partner_B.to(images_BCHW.device)]
    mixed_BCHW[:, :, rows, columns] = partner_BCHW[:, :, rows, columns]
    boxed = (rows.stop - rows.start) * (columns.stop - columns.start)
    return mixed_BCHW, 1 - boxed / (height * width)
