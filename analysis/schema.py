"""One row a run: the columns of every frame of runs, their types, and what MLflow calls them.

The contract with the trainer is in these names alone: `PARAMS` are flattened configuration keys, `METRICS` final
metrics, `TAGS` tags of a run.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

__all__ = [
    "COLUMNS",
    "METRICS",
    "PARAMS",
    "STATUSES",
    "TAGS",
    "canonical_M",
    "frame_of",
    "method_of",
    "read_frame",
]

STATUSES = ("FINISHED", "RUNNING", "FAILED", "KILLED", "MISSING")
"""MISSING: planned by the sweep, and no run of it is in MLflow."""

COLUMNS = {
    "run_id": "str",  # MLflow's; "" for a missing run
    "name": "str",  # of the run: its folder
    "source": "str",  # sddlskd, or imported
    "status": "str",  # one of STATUSES
    "reason": "str",  # why it failed or was stopped
    "sweep": "str",
    "config_hash": "str",  # what the run computes, seed included
    "settings_hash": "str",  # what it computes, seed aside
    "git_sha": "str",
    "run_dir": "str",
    "command": "str",  # that runs it (again), "" where it is not known
    "environment": "str",  # versions and device, as one line
    "superseded": "bool",  # run again since; stands in no table
    "started": "datetime64[ns, UTC]",
    "dataset": "str",
    "teacher": "str",  # "none" for a student alone
    "student": "str",
    "pair": "str",  # teacher_student
    "method": "str",  # as the papers name it: vanilla, kd, kd_ls, sd_kd, sd_kd_ls, sd_dkd ...
    "distiller": "str",  # the loss: vanilla, kd, dkd, nkd ...
    "M": "str",  # canonical, "[1,2,4]"
    "standardize": "bool",
    "complementary_weight": "Float64",
    "knowledge": "str",  # fusion, consistent, complementary
    "temperature": "Float64",
    "ce_weight": "Float64",
    "kd_weight": "Float64",
    "lr": "Float64",
    "batch_size": "Int64",
    "epochs": "Int64",  # configured
    "max_steps": "Int64",  # batches of an epoch; missing: all
    "precision": "str",  # of the networks' forward pass: fp32, bf16, fp16
    "compile": "bool",  # networks compiled by torch
    "teacher_cache": "str",  # folder that the teacher's maps were kept in; "": none
    "epochs_done": "Int64",
    "seed": "Int64",
    "val_fraction": "Float64",  # of the training images held out; 0: val is the test split
    "group_size": "Int64",  # runs trained side by side: their times are the group's
    "best": "Float64",  # top-1 (%), best epoch
    "last": "Float64",  # top-1 (%), last epoch
    "test": "Float64",  # top-1 (%) on the test split at the epoch that a held-out val chose
    "teacher_top1": "Float64",
    "epoch_s": "Float64",  # seconds, last epoch
    "images_per_s": "Float64",  # last epoch
}

PARAMS = {
    "dataset": "dataset.name",
    "teacher": "teacher.name",
    "student": "student.name",
    "distiller": "distiller.name",
    "M": "M",
    "standardize": "standardize",
    "complementary_weight": "complementary_weight",
    "knowledge": "distiller.knowledge",
    "temperature": "distiller.temperature",
    "ce_weight": "distiller.ce_weight",
    "kd_weight": "distiller.kd_weight",
    "lr": "optimizer.lr",
    "batch_size": "trainer.batch_size",
    "epochs": "trainer.epochs",
    "max_steps": "trainer.max_steps",
    "precision": "trainer.precision",
    "compile": "trainer.compile",
    "teacher_cache": "teacher.cache",
    "seed": "seed",
    "val_fraction": "dataset.val_fraction",
}

METRICS = {
    "best": "best/top1",
    "last": "last/top1",
    "test": "test/top1",
    "teacher_top1": "teacher/top1",
    "epoch_s": "time/epoch_s",
    "images_per_s": "time/images_per_s",
}

TAGS = {
    "source": "source",
    "reason": "status_reason",
    "sweep": "sweep",
    "config_hash": "config_hash",
    "settings_hash": "settings_hash",
    "git_sha": "git_sha",
    "run_dir": "run_dir",
    "environment": "environment",
    "superseded": "superseded",
    "group_size": "group_size",
}


def canonical_M(text: str) -> str:
    """ "[1, 2,4]" -> "[1,2,4]"."""
    return text.replace(" ", "")


def method_of(distiller: str, M: str, standardize: bool) -> str:
    """The papers' name: `sd_` for more scales than the whole map, `_ls` for standardised logits."""
    if distiller == "vanilla":
        return distiller
    return ("" if M == "[1]" else "sd_") + distiller + ("_ls" if standardize else "")


def frame_of(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows as a frame with every column, typed; what a row lacks is "", False or missing.

    `pair` and `method` follow from the others where a row does not give them. Raises KeyError for an unknown column.
    """
    whole = []
    for row in rows:
        if unknown := row.keys() - COLUMNS.keys():
            raise KeyError(f"{sorted(unknown)} are no columns; there are {list(COLUMNS)}")
        empty: dict[str, Any] = {
            name: {"str": "", "bool": False}.get(kind) for name, kind in COLUMNS.items()
        }
        filled = {**empty, "source": "sddlskd", "knowledge": "fusion", "M": "[1]", **row}
        filled["M"] = canonical_M(filled["M"])
        filled["pair"] = filled["pair"] or f"{filled['teacher']}_{filled['student']}"
        filled["method"] = filled["method"] or method_of(
            filled["distiller"], filled["M"], filled["standardize"]
        )
        whole.append(filled)
    return pd.DataFrame(whole, columns=list(COLUMNS)).astype(COLUMNS)


def read_frame(path: Path) -> pd.DataFrame:
    """The frame in a runs.csv; it may lack columns."""
    cells = pd.read_csv(path, dtype=str, keep_default_na=False).to_dict("records")
    return frame_of(
        {name: _value(COLUMNS[name], text) for name, text in row.items()} for row in cells
    )


def _value(kind: str, text: str) -> Any:
    if kind == "str":
        return text
    if kind == "bool":
        return text == "True"
    return (
        (float(text) if kind == "Float64" else int(text) if kind == "Int64" else text)
        if text
        else None
    )
