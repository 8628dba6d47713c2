"""Test what several methods share."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from sddlskd.methods.at import AT
from sddlskd.methods.base import at_smaller_side
from sddlskd.training.build import build_network
from sddlskd.training.features import build_features
from tests.tiny import tiny


@pytest.mark.parametrize(
    ("ours", "theirs", "side"),
    [((8, 8), (4, 4), (4, 4)), ((4, 8), (4, 4), (4, 4)), ((8, 4), (4, 8), (4, 4))],
)
def test_both_maps_get_the_smaller_sides(
    ours: tuple[int, int], theirs: tuple[int, int], side: tuple[int, int]
) -> None:
    a, b = at_smaller_side(torch.ones(2, 3, *ours), torch.ones(2, 5, *theirs))
    assert (a.shape, b.shape) == ((2, 3, *side), (2, 5, *side))


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (torch.zeros(2), "shape (2,); it must return a scalar, such as 'return loss.mean()'"),
        (0.5, "a float; it must return a scalar tensor, without .item() or float()"),
    ],
)
def test_a_loss_that_is_no_scalar_is_refused_before_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: Any, said: str
) -> None:
    monkeypatch.setattr(AT, "forward", lambda *_: loss)
    job = tiny(tmp_path, "recipe=at", teacher=False)
    cpu = torch.device("cpu")
    networks = [build_network(one.model, 10, 0, cpu) for one in (job.student, job.teacher)]
    words = {"image_CHW": (3, 16, 16), "labels_N": torch.arange(10), "device": cpu}
    with pytest.raises(ValueError, match=f": {re.escape(f'forward returned {said}')}$"):
        build_features(job, *networks, **words)
