"""Test what several methods share."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sddlskd.config import Config
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
    assert refusal_of(job).endswith(f": forward returned {said}")


def refusal_of(job: Config) -> str:
    cpu = torch.device("cpu")
    networks = [build_network(one.model, 10, 0, cpu) for one in (job.student, job.teacher)]
    words = {"image_CHW": (3, 16, 16), "labels_N": torch.arange(10), "device": cpu}
    with pytest.raises(ValueError, match="cannot serve teacher=") as refused:
        build_features(job, *networks, **words)
    return str(refused.value)


OWN_METHODS = """\
from sddlskd.methods import Method

class Index(Method):
    def forward(self, student, teacher, batch):
        return student.stages[9].mean()

class Field(Method):
    def forward(self, student, teacher, batch):
        return student.feats.mean()

class Needs(Method):
    needs = frozenset({"feats"})
    def forward(self, student, teacher, batch):
        return student.feats.mean()

class Power(Method):
    facts = frozenset({"seed"})
    def __init__(self, student, teacher, power=2, *, seed):
        super().__init__(student, teacher)
    def forward(self, student, teacher, batch):
        return student.pooled.mean()

class Star(Method):
    def __init__(self, *taps, power=2):
        super().__init__(*taps)
        self.power = power
    def forward(self, student, teacher, batch):
        return student.pooled.mean() ** self.power
"""
FIELDS = "stages, preacts, pooled, logit_map, last, strong_map"


def test_a_fault_of_a_users_method_names_the_line_and_what_is_valid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_methods.py").write_text(OWN_METHODS)
    monkeypatch.syspath_prepend(tmp_path)
    says = {
        "Index": "own_methods.py, line 5: IndexError: tuple index out of range",
        "Field": "own_methods.py, line 9: AttributeError: 'Taps' object has no attribute 'feats'; "
        f"it has {FIELDS}",
        "Needs": f"Needs.needs names feats, which no network shows; valid are {FIELDS}",
        "Power": "powr is no argument of the method; valid are power",
        "Star": "powr is no argument of the method; valid are power",
    }
    job = tiny(tmp_path, "recipe=at", teacher=False)
    for name, said in says.items():
        method = {"_target_": f"own_methods.{name}"}
        if name in ("Power", "Star"):
            method["powr"] = "3"
        own = replace(job.features["at"], method=method)
        assert refusal_of(replace(job, features={"at": own})).endswith(f"student=resnet8: {said}")
