"""Define the columns of a frame of runs (one row per run), their types and their names in MLflow.

The analysis depends on the trainer by these names only: `PARAMS` are flattened configuration keys,
`METRICS` are final metrics, `TAGS` are tags of a run.
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
"""Statuses of a run. MISSING: the sweep planned the job, but MLflow has no run of it."""

COLUMNS = {
    "run_id": "str",  # in MLflow; "" for a missing run
    "name": "str",  # name of the run directory
    "source": "str",  # "sddlskd" or "imported"
    "status": "str",  # one of STATUSES
    "reason": "str",  # why the run failed or was stopped
    "sweep": "str",
    "config_hash": "str",  # hash of what the job computes, including its seed
    "settings_hash": "str",  # the same without the seed
    "git_sha": "str",
    "run_dir": "str",
    "command": "str",  # runs the job (again); "" if it is unknown
    "environment": "str",  # versions and device, in one line
    "superseded": "bool",  # replaced by a later run of the job; left out of every table
    "started": "datetime64[ns, UTC]",
    "dataset": "str",
    "teacher": "str",  # "none" for a student that is trained alone
    "student": "str",
    "pair": "str",  # "teacher_student"
    "method": "str",  # the papers' name: vanilla, kd, kd_ls, sd_kd, sd_kd_ls, sd_dkd ...
    "distiller": "str",  # loss: vanilla, kd, dkd, nkd ...
    "M": "str",  # scales, as canonical_M writes them: "[1,2,4]"
    "standardize": "bool",
    "complementary_weight": "Float64",
    "knowledge": "str",  # fusion, consistent, complementary
    "temperature": "Float64",
    "ce_weight": "Float64",
    "kd_weight": "Float64",
    "lr": "Float64",
    "batch_size": "Int64",
    "epochs": "Int64",  # configured number
    "max_steps": "Int64",  # batches per epoch; missing: all batches
    "precision": "str",  # of the networks' forward pass: fp32, bf16 or fp16
    "compile": "bool",  # whether torch compiles the networks
    "teacher_cache": "str",  # folder of the cached teacher maps; "": no cache
    "epochs_done": "Int64",
    "seed": "Int64",
    "val_fraction": "Float64",  # fraction of the training images held out; 0: val is the test split
    "group_size": "Int64",  # runs trained side by side, whose times are those of the group
    "best": "Float64",  # top-1 (%), best epoch
    "last": "Float64",  # top-1 (%), last epoch
    "test": "Float64",  # top-1 (%) on the test split at the best epoch of a held-out val
    "teacher_top1": "Float64",
    "epoch_s": "Float64",  # seconds of the last epoch
    "images_per_s": "Float64",  # in the last epoch
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
    """Return the scales without blanks: "[1, 2,4]" becomes "[1,2,4]"."""
    return text.replace(" ", "")


def method_of(distiller: str, M: str, standardize: bool) -> str:
    """Return the papers' name of a method, such as `sd_kd_ls`.

    Args:
        distiller: name of the loss.
        M: scales in canonical form. Anything but "[1]" (the whole map) adds the prefix `sd_`.
        standardize: whether logits are standardised, which adds the suffix `_ls`.

    Returns:
        The name. `vanilla` takes neither prefix nor suffix.
    """
    if distiller == "vanilla":
        return distiller
    return ("" if M == "[1]" else "sd_") + distiller + ("_ls" if standardize else "")


def frame_of(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Return the rows as a typed frame with all columns.

    A value that a row lacks becomes "", False or missing, except `source` ("sddlskd"), `knowledge`
    ("fusion") and `M` ("[1]"). `pair` and `method` are derived from other columns if a row lacks
    them. Raise KeyError for an unknown column.
    """
    whole = []
    for row in rows:
        if unknown := row.keys() - COLUMNS.keys():
            raise KeyError(f"unknown columns {sorted(unknown)}; choose from {list(COLUMNS)}")
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
    """Return the frame that a runs.csv holds; the file may lack columns."""
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
