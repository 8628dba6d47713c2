"""Tell which runs of ours the published numbers can be compared with.

settings.csv holds the settings that each published number was made with: the recipes of `conf` for
its method, data set and pair. `tests/reference/settings.py` writes the file.
"""

import csv
import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from .names import setting_name
from .published import Published
from .schema import COLUMNS, NO_LOGIT_LOSS, Run

__all__ = [
    "PAPERS_WEIGHT",
    "SETTINGS_FILE",
    "other_budget",
    "other_method",
    "settings_of",
    "trains_longer",
]

SETTINGS_FILE = Path(__file__).parent / "reference" / "settings.csv"
PAPERS_WEIGHT = 2.0
"""Weight of complementary regions, SDD section 4.1."""
BUDGET = ("lr", "batch_size", "epochs")
NUMBERS = {"Int64": int, "Float64": float}


@cache
def _all_settings() -> dict[tuple[str, str, str], dict[str, Any]]:
    """Return the settings of the published numbers, by data set, pair and method.

    A setting that the method does not have is left out.
    """
    found = {}
    with SETTINGS_FILE.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            key = row.pop("dataset"), row.pop("pair"), row.pop("method")
            found[key] = {name: _value(name, text) for name, text in row.items() if text}
    return found


def _value(column: str, text: str) -> Any:
    if column == "details":
        return json.loads(text)
    if column == "M":
        return text.replace(" ", "")
    return NUMBERS.get(COLUMNS[column], str)(text)


def settings_of(number: Published) -> Mapping[str, Any]:
    """Return the settings that a published number was made with, by column of the frame of runs.

    `details` is a mapping from dotted keys to values. A number of a method without a recipe has the
    learning rate, batch size and epochs of KD on its pair; {} if there is no such number either.
    """
    settings = _all_settings()
    found = settings.get((number.dataset, number.pair, number.method))
    if found is None:
        of_kd = settings.get((number.dataset, number.pair, "kd"), {})
        found = {name: value for name, value in of_kd.items() if name in BUDGET}
    stated = {
        "M": number.M or None,
        "complementary_weight": float(number.beta) if number.beta else None,
        "temperature": number.temperature,
        "ce_weight": number.ce_weight,
        "kd_weight": number.kd_weight,
    }
    return found | {name: value for name, value in stated.items() if value is not None}


def trains_longer(method: str) -> bool:
    """Return whether the papers train a method for more epochs than all others."""
    return "mlkd" in method


def other_method(run: Run, number: Published) -> list[str]:
    """Return how the method of a run differs from that of a published number; [] if it does not.

    For `sd_` methods with a loss of the logits, the scales and the weight of complementary regions
    are compared; for kd_ls, the weight of cross-entropy. A weight that is None in the run is not
    compared. On CUB-200, the scales [1,2,4] of the authors' scripts count as the number's too.

    Returns:
        The settings that differ, each as "name=value" with the value of the run, such as "M=[1,2]".
    """
    settings = settings_of(number)
    if number.method == "kd_ls" and run.ce_weight not in (None, settings.get("ce_weight")):
        return [setting_name("ce_weight", run.ce_weight)]
    # The scales of SD-SP are an argument of its feature method.
    if not number.method.startswith("sd_") or run.distiller in NO_LOGIT_LOSS:
        return []
    scales = {settings.get("M")}
    # For similar architectures, the paper's text says [1,2] and the authors' scripts [1,2,4].
    if number.dataset == "cub200":
        scales.add("[1,2,4]")
    wrong = []
    if run.M not in scales:
        wrong.append(setting_name("M", run.M))
    weight = settings.get("complementary_weight", PAPERS_WEIGHT)
    if run.complementary_weight not in (None, weight):
        wrong.append(setting_name("complementary_weight", run.complementary_weight))
    return wrong


def other_budget(run: Run, number: Published) -> list[str]:
    """Return the training settings of the run that differ from those of the published number.

    A stronger teacher of the paper is the only reason then, since no run of ours has it.
    """
    if number.flag == "other_teacher":
        return ["the source trains with a stronger teacher"]
    whole: dict[str, Any] = {"val_fraction": 0.0, "train_fraction": 1.0, "max_steps": "all"}
    expected = {**whole, **settings_of(number)}
    for name in ("M", "complementary_weight"):  # `other_method` compares them
        expected.pop(name, None)
    # SDD does not publish the learning rate of students alone on CUB-200.
    if number.dataset == "cub200" and number.method == "vanilla":
        expected.pop("lr", None)
    details = expected.pop("details", {})
    differing = [
        setting_name(name, getattr(run, name))
        for name, value in expected.items()
        if getattr(run, name) not in (None, "", value) and not _rounded(run, name, value)
    ]
    return [*differing, *_other_details(run, details)]


def _rounded(run: Run, name: str, value: Any) -> bool:
    """Return whether an imported run has the expected learning rate, rounded to two decimals.

    The authors' logs print 0.03 for 0.025.
    """
    if run.source != "imported" or name != "lr" or not run.lr:
        return False
    return bool(abs(run.lr - value) < 0.0051)


def _other_details(run: Run, expected: Mapping[str, Any]) -> Iterator[str]:
    """Yield the details of the run that differ from the expected ones, as far as both are known."""
    ours = json.loads(run.details or "{}")
    for name, value in expected.items():
        if name in ours and ours[name] != value:
            yield setting_name(name, ours[name])
