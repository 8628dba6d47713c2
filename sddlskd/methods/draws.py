"""Random draws that depend on (seed, epoch, image) alone, whatever else a batch holds.

A hash of counters replaces a generator, so that the draws of an image are the same in any batch, on
any device and after a resume.

Shapes: B batch, K draws of an image.
"""

import torch
from torch import Tensor

from sddlskd.data.device import Batch

__all__ = ["distinct", "independent", "keys_of", "uniform"]

BITS = 32  # of a hash; products with the factors below fit into int64
FULL = 2**BITS - 1
ROUNDS = 16  # of the shuffle in `distinct`; measured: with 8, the samples of an image are uneven


def keys_of(seed: int, batch: Batch) -> Tensor:
    """Return a number for each image of a batch, which depends on (seed, epoch, image) alone.

    Args:
        seed: An integer.
        batch: The images, and the number of the epoch.

    Returns:
        key_B, int64 in 0..2^32-1, on the device of the labels.
    """
    index_B = batch.index.to(batch.labels.device, non_blocking=True)
    start = torch.full_like(index_B, seed % 2**BITS)
    return _hash(_hash(_hash(start, seed >> BITS & FULL), batch.epoch % 2**BITS), index_B)


def uniform(key_B: Tensor, count: int) -> Tensor:
    """Return `count` numbers u_BK for each key, uniform in [0, 1), float32."""
    # 24 bits, which float32 holds exactly
    return (_counted(key_B, count) >> BITS - 24).float() / 2**24


def independent(key_B: Tensor, size_B: Tensor, count: int) -> Tensor:
    """Return integers for each key, drawn independently and uniformly from 0..size-1.

    Args:
        key_B: A key for each image, as `keys_of` returns it.
        size_B: The number of integers to choose from, below 2^31, int64.
        count: K.

    Returns:
        x_BK, int64.
    """
    x_BK: Tensor = _counted(key_B, count) * size_B[:, None] >> BITS
    return x_BK


def distinct(key_B: Tensor, size_B: Tensor, count: int) -> Tensor:
    """Return `count` different integers for each key, a random sample of 0..size-1.

    They are the first numbers of a shuffle by the key. In each round of the shuffle, every number
    has a partner, and a bit of a hash that both share decides whether they swap places.

    Source: Hoang, Morris and Rogaway 2012 (Crypto), the swap-or-not shuffle.

    Args:
        key_B: A key for each image, as `keys_of` returns it.
        size_B: The number of integers to choose from, at least `count`, int64.
        count: K.

    Returns:
        x_BK, int64.
    """
    size_B1 = size_B[:, None]
    x_BK = torch.arange(count, device=key_B.device).expand(len(key_B), count)
    for step in range(ROUNDS):
        pivot_B1, factor_B1, offset_B1 = (
            _hash(key_B, 3 * step + part)[:, None] for part in range(3)
        )
        partner_BK = pivot_B1 % size_B1 - x_BK
        partner_BK = torch.where(partner_BK < 0, partner_BK + size_B1, partner_BK)
        hash_BK = torch.maximum(x_BK, partner_BK) * (factor_B1 >> 2 | 1) + offset_B1
        x_BK = torch.where((hash_BK >> 29 & 1).bool(), partner_BK, x_BK)
    return x_BK


def _counted(key_B: Tensor, count: int) -> Tensor:
    """Return the hashes B K of each key with 0, 1, ..., count - 1."""
    return _hash(key_B[:, None], torch.arange(count, device=key_B.device))


def _hash(a: Tensor, b: Tensor | int) -> Tensor:
    """Return a hash of two integers in 0..2^32-1, in the same range."""
    x = (a * 0x2545F491 + b + 0x1B873593) & FULL
    # The constants of this mixing function are those of C. Wellons' hash-prospector.
    x = ((x ^ x >> 15) * 0x2C1B3C6D) & FULL
    x = ((x ^ x >> 12) * 0x297A2D39) & FULL
    mixed: Tensor = x ^ x >> 15
    return mixed
