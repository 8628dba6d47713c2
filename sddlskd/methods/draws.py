"""Random draws for each image of a batch that depend on the seed, the epoch and the image alone.

The draws come from a hash of counters instead of a generator. The draws of an image are therefore
the same in any batch, on any device and after a resume.

Shapes: B batch, K draws of an image.
"""

import torch
from torch import Tensor

from sddlskd.data.device import Batch

__all__ = ["distinct", "independent", "keys_of", "uniform"]

BITS = 32  # bits of a hash, so few that the products below fit into int64
FULL = 2**BITS - 1
# Rounds of the shuffle in `distinct`. Measured: with 8, the samples of an image are uneven.
ROUNDS = 16


def keys_of(seed: int, batch: Batch) -> Tensor:
    """Return a hash of (seed, epoch, image index) for each image of a batch.

    Args:
        seed: Seed, an integer; its lowest 64 bits count.
        batch: Batch of B training images; `index` and `epoch` are read.

    Returns:
        key_B, int64, (B,), in 0..2^32-1, on the device of the batch's labels.
    """
    index_B = batch.index.to(batch.labels.device, non_blocking=True)
    start = torch.full_like(index_B, seed % 2**BITS)
    return _hash(_hash(_hash(start, seed >> BITS & FULL), batch.epoch % 2**BITS), index_B)


def uniform(key_B: Tensor, count: int) -> Tensor:
    """Return `count` random numbers for each key: float32, uniform in [0, 1), (B, count).

    `key_B`, int64, (B,), comes from `keys_of`. Equal keys get equal numbers.
    """
    # float32 holds integers of 24 bits exactly.
    return (_counted(key_B, count) >> BITS - 24).float() / 2**24


def independent(key_B: Tensor, size_B: Tensor, count: int) -> Tensor:
    """Return `count` random integers for each key, drawn from 0..size-1 with replacement.

    Args:
        key_B: Keys from `keys_of`, int64, (B,).
        size_B: Number of integers to draw from, for each key: int64, (B,), in 1..2^31 - 1.
        count: K, number of draws for each key.

    Returns:
        x_BK, int64, (B, K). Equal keys with equal sizes get equal integers.
    """
    x_BK: Tensor = _counted(key_B, count) * size_B[:, None] >> BITS
    return x_BK


def distinct(key_B: Tensor, size_B: Tensor, count: int) -> Tensor:
    """Return `count` different random integers for each key, drawn from 0..size-1.

    The integers of a key are the first `count` of a shuffle of 0..size-1.

    Source: Hoang, Morris and Rogaway 2012 (Crypto), the swap-or-not shuffle.

    Args:
        key_B: Keys from `keys_of`, int64, (B,).
        size_B: Number of integers to draw from, for each key: int64, (B,), at least `count` (not
            checked).
        count: K, number of draws for each key.

    Returns:
        x_BK, int64, (B, K). Equal keys with equal sizes get equal integers.
    """
    size_B1 = size_B[:, None]
    x_BK = torch.arange(count, device=key_B.device).expand(len(key_B), count)
    # In each round, every number has a partner. A bit of a hash of the pair decides whether both
    # swap places.
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
    """Return the hash of each key with each of the counters 0, 1, ..., count - 1, (B, count)."""
    return _hash(key_B[:, None], torch.arange(count, device=key_B.device))


def _hash(a: Tensor, b: Tensor | int) -> Tensor:
    """Return a hash of two integers in 0..2^32-1, in the same range."""
    x = (a * 0x2545F491 + b + 0x1B873593) & FULL
    # The constants of this mixing function are those of C. Wellons' hash-prospector.
    x = ((x ^ x >> 15) * 0x2C1B3C6D) & FULL
    x = ((x ^ x >> 12) * 0x297A2D39) & FULL
    mixed: Tensor = x ^ x >> 15
    return mixed
