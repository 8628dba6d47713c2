"""The draws of an image depend on (seed, epoch, image) alone, and they are random."""

import torch
from torch import Tensor

from sddlskd.data.device import Batch
from sddlskd.methods.draws import distinct, independent, keys_of, uniform


def of(index_B: Tensor, epoch: int = 1) -> Batch:
    """Return a batch of the images with these indices."""
    return Batch(torch.zeros(0), torch.zeros_like(index_B), index_B, None, epoch)


def test_keys_depend_on_seed_epoch_and_image_alone() -> None:
    whole = keys_of(5, of(torch.arange(4096)))
    assert len(whole.unique()) == 4096
    assert torch.equal(keys_of(5, of(torch.tensor([7, 3]))), whole[[7, 3]])
    for other in (
        keys_of(6, of(torch.arange(4096))),
        keys_of(5 + 2**40, of(torch.arange(4096))),
        keys_of(5, of(torch.arange(4096), epoch=2)),
        keys_of(5, of(torch.arange(4096), epoch=0)),
    ):
        assert not (other == whole).any()


def test_uniform_numbers() -> None:
    u_BK = uniform(keys_of(0, of(torch.arange(20_000))), 3)
    assert u_BK.min() >= 0
    assert u_BK.max() < 1
    # Standard errors: 0.002 of a mean, 0.0005 of a variance, 0.007 of a correlation
    torch.testing.assert_close(u_BK.mean(0), torch.full((3,), 0.5), rtol=0, atol=0.01)
    torch.testing.assert_close(u_BK.var(0), torch.full((3,), 1 / 12), rtol=0, atol=0.003)
    assert (torch.corrcoef(u_BK.T) - torch.eye(3)).abs().max() < 0.035


def test_distinct_numbers_are_a_random_sample_in_random_order() -> None:
    size, count, images = 7, 3, 42_000
    key_B = keys_of(1, of(torch.arange(images)))
    x_BK = distinct(key_B, torch.full((images,), size), count)
    counts = torch.bincount(x_BK @ torch.tensor([size**2, size, 1]), minlength=size**3)
    # 210 ordered samples without repetition; chi-squared has mean 209 and deviation 20.
    assert (counts > 0).sum() == 210
    expected = images / 210
    assert ((counts[counts > 0] - expected) ** 2 / expected).sum() < 209 + 5 * 20


def test_distinct_numbers_of_different_sizes() -> None:
    size_B = torch.tensor([50, 51, 997])
    x_BK = distinct(torch.tensor([1, 2, 3]), size_B, 50)
    assert all(len(row.unique()) == 50 for row in x_BK)
    assert (x_BK >= 0).all()
    assert (x_BK < size_B[:, None]).all()
    assert torch.equal(x_BK[0].sort()[0], torch.arange(50))  # the whole range


def test_independent_numbers() -> None:
    x_BK = independent(torch.tensor([1, 2]), torch.tensor([5, 1000]), 50_000)
    for row, size in zip(x_BK, (5, 1000), strict=True):
        counts = torch.bincount(row, minlength=size)
        expected = 50_000 / size
        chi_squared = float(((counts - expected) ** 2 / expected).sum())
        assert len(counts) == size
        assert abs(chi_squared - size) < 6 * (2 * size) ** 0.5
