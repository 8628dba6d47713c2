"""The settings that each published number was made with, as the recipes of conf/ state them.

Run as a program, this file writes analysis/reference/settings.csv, from which the tables tell
whether a run of ours can be compared with a published number:

    python -m tests.reference.settings

tests/test_settings.py fails if the file and conf/ disagree.
"""

import csv
from collections.abc import Iterator
from pathlib import Path

from analysis import published
from analysis.coverage import CONF, available, reason_without_recipe, recipe_of
from analysis.protocol import SETTINGS_FILE
from analysis.published import Published
from analysis.schema import details_of
from sddlskd import config as cfg
from sddlskd.config import Config
from tests.composing import files_read_once
from tests.tiny import composed

__all__ = ["cells", "job_of", "main", "rows", "settings_of"]

# Column of the file, by the key of the configuration.
COLUMNS = {
    "M": "M",
    "complementary_weight": "complementary_weight",
    "distiller.temperature": "temperature",
    "distiller.ce_weight": "ce_weight",
    "distiller.kd_weight": "kd_weight",
    "optimizer.name": "optimizer",
    "optimizer.lr": "lr",
    "trainer.batch_size": "batch_size",
    "trainer.epochs": "epochs",
}
NEED_A_LOGIT_LOSS = ("M", "complementary_weight", "distiller.temperature", "distiller.kd_weight")

HOME = Path("/home/of/tests")

Row = dict[str, str]


def cells() -> list[Published]:
    """Return one published number for each data set, pair and method that a recipe can train."""
    names = available()
    found: dict[tuple[str, str, str], Published] = {}
    for number in published.numbers():
        if number.method != "teacher" and not reason_without_recipe(number, names):
            found.setdefault((number.dataset, number.pair, number.method), number)
    return list(found.values())


def job_of(number: Published, *overrides: str) -> Config:
    """Return the job of the recipe of a published number, composed by Hydra."""
    choices = {"teacher": number.teacher, "student": number.student}
    for group, network in choices.items():
        own = f"{number.dataset}_{network}"
        if own in available()[group]:
            choices[group] = own
    chosen = [f"{group}={choice}" for group, choice in choices.items()]
    if (CONF / "pair" / f"{number.pair}.yaml").is_file():  # a pair may set the optimizer
        chosen = [f"pair={number.pair}"]
    recipe = recipe_of(number.method)
    return composed(HOME, f"dataset={number.dataset}", f"recipe={recipe}", *chosen, *overrides)


def settings_of(number: Published) -> Row:
    """Return the row of settings.csv of a published number."""
    job = job_of(number)
    params = {key: str(value) for key, value in cfg.flatten(job).items()}
    row = {"dataset": number.dataset, "pair": number.pair, "method": number.method}
    for key, column in COLUMNS.items():
        read = bool(job.distiller.loss) or key not in NEED_A_LOGIT_LOSS
        row[column] = params[key] if read else ""
    if job.distiller.learned_temperature:
        row["temperature"] = ""
    if job.M == [1]:
        row["complementary_weight"] = ""
    row["details"] = details_of(params)
    return row


def rows(numbers: list[Published]) -> Iterator[Row]:
    """Yield the row of settings.csv of each number."""
    with files_read_once():
        for number in numbers:
            yield settings_of(number)


def main() -> None:
    """Write analysis/reference/settings.csv, which takes two minutes."""
    found = list(rows(cells()))
    with SETTINGS_FILE.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(found[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)


if __name__ == "__main__":
    main()
