"""Test what several methods share."""

import pytest
import torch

from sddlskd.methods.base import at_smaller_side


@pytest.mark.parametrize(
    ("ours", "theirs", "side"),
    [((8, 8), (4, 4), (4, 4)), ((4, 8), (4, 4), (4, 4)), ((8, 4), (4, 8), (4, 4))],
)
def test_both_maps_get_the_smaller_sides(
    ours: tuple[int, int], theirs: tuple[int, int], side: tuple[int, int]
) -> None:
    a, b = at_smaller_side(torch.ones(2, 3, *ours), torch.ones(2, 5, *theirs))
    assert (a.shape, b.shape) == ((2, 3, *side), (2, 5, *side))
