"""Make rows of runs with chosen numbers for `schema.frame_of`."""

from collections.abc import Iterable
from typing import Any

PLAIN = {"temperature": 4.0, "ce_weight": 0.1, "kd_weight": 0.9}
STANDARDISED = {"temperature": 2.0, "ce_weight": 0.1, "kd_weight": 9.0}


def run(
    teacher: str, student: str, seed: int | None, top1: float | None, **columns: Any
) -> dict[str, Any]:
    """Return a finished run by the papers' protocol.

    The config_hash depends on everything except the outcome.
    """
    row = {
        "status": "FINISHED",
        "dataset": "cifar100",
        "teacher": teacher,
        "student": student,
        "distiller": "kd",
        "M": "[1]",
        "standardize": False,
        "complementary_weight": 2.0,
        "lr": 0.01 if student in ("mobilev2", "shufflev1", "shufflev2") else 0.05,
        "batch_size": 64,
        "epochs": 240,
        "val_fraction": 0.0,
        "seed": seed,
        "best": top1,
        "last": None if top1 is None else top1 - 0.25,
        **(STANDARDISED if columns.get("standardize") else PLAIN),
        **columns,
    }
    outcome = (
        "status",
        "best",
        "last",
        "test",
        "images_per_s",
        "group_size",
        "superseded",
        "started",
        "command",
    )
    row.setdefault(
        "config_hash", "-".join(f"{row[key]}" for key in sorted(row) if key not in outcome)
    )
    row.setdefault("run_id", f"{row['config_hash']}-{top1}-{row['status']}")
    row.setdefault(
        "command", f"python -m sddlskd.train teacher={teacher} student={student} seed={seed}"
    )
    return row


def runs(
    teacher: str, student: str, values: Iterable[float | None], **columns: Any
) -> list[dict[str, Any]]:
    """Return a run for each value, with seeds from 0."""
    return [run(teacher, student, seed, value, **columns) for seed, value in enumerate(values)]
