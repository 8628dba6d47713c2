"""Invented runs for the tests of figures and report.

`Standin` has those members of analysis.runs.Runs that figures and report read.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from analysis.schema import frame_of

# {method: (distiller, standardize, M)}
RECIPES = {
    "vanilla": ("vanilla", False, "[1]"),
    "kd": ("kd", False, "[1]"),
    "kd_ls": ("kd", True, "[1]"),
    "sd_kd": ("kd", False, "[1,2]"),
    "sd_kd_ls": ("kd", True, "[1,2,4]"),
}
GAIN = {"vanilla": 0.0, "kd": 2.2, "kd_ls": 4.0, "sd_kd": 3.1, "sd_kd_ls": 4.6}


def row(
    seed: int = 0,
    method: str = "kd",
    pair: tuple[str, str] = ("resnet32x4", "resnet8x4"),
    **more: Any,
) -> dict[str, Any]:
    distiller, standardize, M = RECIPES[method]
    teacher, student = ("none" if method == "vanilla" else pair[0]), pair[1]
    made = {
        **{
            "status": "FINISHED",
            "dataset": "cifar100",
            "teacher": teacher,
            "student": student,
            "seed": seed,
        },
        **{
            "distiller": distiller,
            "standardize": standardize,
            "M": M,
            "temperature": 2.0,
            "complementary_weight": 2.0,
        },
        **{
            "ce_weight": 1.0,
            "kd_weight": 9.0,
            "lr": 0.05,
            "batch_size": 64,
            "epochs": 30,
            "epochs_done": 30,
        },
        **{
            "val_fraction": 0.0,
            "group_size": 1,
            "git_sha": "c6bc3be",
            "environment": "torch 2.6, cpu",
        },
        "started": pd.Timestamp("2026-03-01", tz="UTC"),
    }
    made |= more
    name = f"{pair[0]}_{student}-{method}-{made['M']}-{seed}"
    return {
        "name": name,
        "run_id": f"id-{name}",
        "command": f"python -m sddlskd.train student={student} seed={seed}",
    } | made


def grid(
    pairs: Sequence[tuple[str, str]],
    methods: Sequence[str] = tuple(RECIPES),
    seeds: int = 3,
    **more: Any,
) -> list[dict[str, Any]]:
    """Return a run of every method, pair and seed, with plausible accuracies.

    A student alone has one run for each seed, whatever the number of its pairs.
    """
    noise = np.random.default_rng(0)
    rows, alone = [], set()
    for number, pair in enumerate(pairs):
        for method in methods:
            if method == "vanilla" and pair[1] in alone:
                continue
            alone.add(pair[1])
            for seed in range(seeds):
                best = 68 + number + GAIN[method] + noise.normal(0, 0.25)
                seconds = 9.0 + 4 * ("kd" in method) + 1.5 * ("sd" in method) + noise.normal(0, 0.2)
                values = {
                    "best": best,
                    "last": best - 0.3,
                    "epoch_s": seconds,
                    "images_per_s": 50000 / seconds,
                }
                rows.append(row(seed, method, pair, **values, **more))
    return rows


@dataclass
class Standin:
    rows: Sequence[Mapping[str, Any]]
    kept: Mapping[str, dict[str, np.ndarray]] = field(default_factory=dict)  # {run id: predictions}
    name: str = "suite"
    uri: str = "sqlite:////tmp/mlflow.db"
    command: str = "python -m sddlskd.train -m +sweep=suite"

    def __post_init__(self) -> None:
        self.frame = frame_of(self.rows)

    def history(
        self, metrics: Sequence[str] = ("val/top1",), run_ids: Iterable[str] | None = None
    ) -> pd.DataFrame:
        """Return curves that rise to each run's last accuracy, with steps as of a schedule."""
        wanted = set(self.frame["run_id"]) if run_ids is None else set(run_ids)
        points = []
        for run in self.frame.itertuples():
            if run.run_id in wanted and pd.notna(run.last):
                noise = np.random.default_rng([run.seed, len(run.name)])
                for epoch in range(1, run.epochs_done + 1):
                    at = epoch / run.epochs_done
                    gone = 12 * (at < 0.6) + 3 * (at < 0.8) + 45 * np.exp(-12 * at)
                    points.append(
                        (
                            run.run_id,
                            metrics[0],
                            epoch,
                            run.last - gone + noise.normal(0, 0.4 if at < 0.8 else 0.1),
                        )
                    )
        return pd.DataFrame(points, columns=["run_id", "metric", "epoch", "value"])

    def predictions(self, run_id: str) -> dict[str, np.ndarray] | None:
        return self.kept.get(run_id)


def predictions(
    seed: int,
    images: int = 600,
    classes: int = 20,
    scale: int = 2,
    closeness: float = 0.7,
    side: int = 32,
) -> dict[str, np.ndarray]:
    """Return plausible predictions of a teacher and a student.

    Args:
        seed: seed of the student.
        images: number of images.
        classes: number of classes, which form clusters.
        scale: regions per side of the map.
        closeness: similarity of the student to the teacher, from 0 to 1.
        side: side of the example images in pixels.
    """
    same, noise = np.random.default_rng(7), np.random.default_rng(seed)
    target = same.integers(0, classes, images)
    similar = same.normal(size=(classes, classes)) / 2 + 3 * np.eye(classes)
    teacher = similar[target] + same.normal(0, 0.9, (images, classes))
    student = (
        closeness * teacher
        + (1 - closeness) * similar[target]
        + noise.normal(0, 1.2 - closeness, (images, classes))
    )
    maps = teacher[:, None] + same.normal(0, 1.0, (images, scale * scale, classes))
    regions = maps.argmax(2)
    predicted = teacher.astype(np.float16).argmax(1)
    sample = np.flatnonzero((regions != predicted[:, None]).any(1))[:24]
    y, x = np.mgrid[:side, :side] / side
    waves = [np.sin(6 * x + t) * np.cos(5 * y - t) for t in target[sample]]
    pictures = (
        np.stack([np.stack([w, w * x, 1 - w * y], 2) for w in waves])
        if len(sample)
        else np.zeros((0, side, side, 3))
    )
    directions = same.normal(size=(classes, 16))
    return {
        "target": target,
        "logits": student.astype(np.float16),
        "teacher_logits": teacher.astype(np.float16),
        "scale": np.array(scale),
        "regions": regions.astype(np.int16),
        "student_regions": regions.astype(np.int16),
        "features": (directions[target] * 1.5 + noise.normal(size=(images, 16))).astype(np.float16),
        "teacher_features": (directions[target] * 2 + same.normal(size=(images, 16))).astype(
            np.float16
        ),
        "sample": sample,
        "images": (127 + 60 * pictures).clip(0, 255).astype(np.uint8),
    }
