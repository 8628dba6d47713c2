"""Compare the settings of our runs with those of published numbers.

A run and a number that differ in a compared setting get no verdict in the tables.
`reference/settings.csv` holds the settings of each published number: those that the recipe of its
method in `conf` sets for its data set and pair of networks. `tests/reference/settings.py` writes
the file.
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
"""Weight of the loss of complementary regions in SDD, section 4.1."""
FROM_KD = ("lr", "batch_size", "epochs")
"""Settings that a method without a recipe takes from the recipe of KD for its data and pair."""
NUMBERS = {"Int64": int, "Float64": float}


@cache
def _all_settings() -> dict[tuple[str, str, str], dict[str, Any]]:
    """Return the settings in `SETTINGS_FILE`, by data set, pair and method.

    The settings of a number map a column of the frame of runs to a value. An empty field of the
    file has no entry.
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
    """Return the settings that a published number was trained with, as far as they are known.

    Settings that the paper's table prints take precedence. Settings that it does not print come
    from the method's recipe (YAML files in conf/) for the data set and pair of networks. If there
    is no such recipe, the recipe of KD for this data set and pair, if any, gives the learning rate,
    batch size and epochs.

    Returns:
        A mapping from a field of `schema.Run`, such as "lr", to its value. The value of "details"
        is a mapping from dotted configuration keys to values. Unknown settings have no entry.
    """
    settings = _all_settings()
    found = settings.get((number.dataset, number.pair, number.method))
    if found is None:
        of_kd = settings.get((number.dataset, number.pair, "kd"), {})
        found = {name: value for name, value in of_kd.items() if name in FROM_KD}
    stated = {
        "M": number.M or None,
        "complementary_weight": float(number.beta) if number.beta else None,
        "temperature": number.temperature,
        "ce_weight": number.ce_weight,
        "kd_weight": number.kd_weight,
    }
    return found | {name: value for name, value in stated.items() if value is not None}


def trains_longer(method: str) -> bool:
    """Return whether the papers train a method for more epochs than the other methods.

    The result is True for MLKD and every method that contains MLKD. `method` is a name as
    `schema.method_of` returns it, such as "mlkd_ls".
    """
    return "mlkd" in method


def other_method(run: Run, number: Published) -> list[str]:
    """Return the settings of the method in which a run differs from a published number.

    `number` must be of the run's method, data set and pair. Two kinds of methods are compared:

    - "sd_..." (losses on regions): the scales `M` and the weight of complementary regions are
      compared. On CUB-200, the scales [1,2,4] always fit. If the scales are unknown for the number,
      every run differs. If the weight is unknown, the weight 2 of the SDD paper counts.
    - "kd_ls": the weight of the cross-entropy is compared. If the weight is unknown for the number,
      every run with a known weight differs.

    A weight that is None in the run fits every number. The result is [] for other methods, for runs
    without a loss on the logits, and if no setting differs.

    Returns:
        The settings that differ, each as "name=value" with the value of the run, such as "M=[1,2]".
    """
    settings = settings_of(number)
    if number.method == "kd_ls" and run.ce_weight not in (None, settings.get("ce_weight")):
        return [setting_name("ce_weight", run.ce_weight)]
    # The scales of SD-SP are an argument of its feature method, so `run.M` does not hold them.
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
    """Return the training settings in which a run differs from those of a published number.

    These settings are compared:

    - the settings of `settings_of`, except the scales and the weight of complementary regions,
      which `other_method` compares;
    - `val_fraction`, `train_fraction` and `max_steps`: a run must train on all training images and
      all batches of an epoch.

    These are not compared:

    - a setting that is unknown for the run or for the number;
    - the learning rate of a student alone on CUB-200;
    - the learning rate of an imported run, if the two values differ by less than 0.0051 (rounding
      to two decimals);
    - all settings, if the flag of the number is "other_teacher" or "other_settings".

    Returns:
        The settings that differ, each as "name=value" with the value of the run, such as
        "epochs=30"; [] if none differs. For a number with one of the two flags, the list holds one
        clause instead, which says that the source has a stronger teacher, or settings that are not
        known or not those of the recipe.
    """
    if number.flag == "other_teacher":
        return ["the source trains with a stronger teacher"]
    if number.flag == "other_settings":
        return ["the source's settings are not known, or are not those of the recipe"]
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
    """Return whether a setting of a run differs from `value` by rounding only.

    This holds for learning rates of imported runs: the authors' logs print 0.03 for 0.025.
    """
    if run.source != "imported" or name != "lr" or not run.lr:
        return False
    return bool(abs(run.lr - value) < 0.0051)


def _other_details(run: Run, expected: Mapping[str, Any]) -> Iterator[str]:
    """Yield the details of a run that differ from the expected ones, each as "name=value".

    A detail that the run does not state is not compared.
    """
    ours = json.loads(run.details or "{}")
    for name, value in expected.items():
        if name in ours and ours[name] != value:
            yield setting_name(name, ours[name])
