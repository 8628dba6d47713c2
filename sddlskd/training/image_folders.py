"""Log what a user should know of an image folder that a job trains on."""

import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from sddlskd.config import Config
from sddlskd.datasets.arrays import Files, Splits
from sddlskd.datasets.folders import left_out
from sddlskd.terminal.words import counted

__all__ = ["log_image_folder"]

log = logging.getLogger(__name__)

LOADER = "sddlskd.datasets.image_folder"


def log_image_folder(job: Config, splits: Splits, noted: Mapping[str, Any]) -> None:
    """Log size, settings and doubtful files of the image folder of a job.

    Do nothing if the job has another data set.

    Args:
        job: configuration of the training run.
        splits: images and labels of the data set.
        noted: fingerprint of the data set, which has the names of the classes.
    """
    if job.dataset.load.get("_target_") != LOADER:
        return
    log.info("%s", _settings(job, noted))
    _note_left_out(job, splits)
    _warn_of_single_images(job, splits, noted)


def _settings(job: Config, noted: Mapping[str, Any]) -> str:
    """Return the size of the data set and the settings that no paper gives, as a log line."""
    d, t = job.dataset, job.trainer
    return (
        f"image folder {d.root}: {counted(d.num_classes, 'class', 'classes')}, "
        f"{counted(noted['train'], 'training image')}, {counted(noted['test'], 'test image')}; "
        f"trained with trainer.epochs={t.epochs}, trainer.batch_size={t.batch_size}, "
        f"optimizer.lr={job.optimizer.lr:g}, dataset.size={d.size} pixels; "
        "those that you did not set are defaults, which no paper has tried on your images"
    )


def _note_left_out(job: Config, splits: Splits) -> None:
    """Log how many files are left out because of their endings, if there are any."""
    found: Counter[str] = Counter()
    for split in splits:
        if isinstance(split, Files):
            found += left_out(split)
    if found:
        log.info(
            "dataset.root=%s: files left out because of their endings: %s; if these are images, "
            "convert them to JPEG or PNG",
            job.dataset.root,
            ", ".join(f"{count} {ending}" for ending, count in found.most_common(5)),
        )


def _warn_of_single_images(job: Config, splits: Splits, noted: Mapping[str, Any]) -> None:
    """Log a warning that names the classes with a single training image, if there are any."""
    names = noted["class_names"] or list(map(str, range(job.dataset.num_classes)))
    counts = torch.bincount(splits.train.labels_N).tolist()
    single = [name for name, count in zip(names, counts, strict=False) if count == 1]
    if not single:
        return
    shown = f"class {single[0]} has 1 training image"
    if len(single) > 1:
        listed = ", ".join(single[:5] + ["..."] * (len(single) > 5))
        shown = f"{len(single)} classes have 1 training image each ({listed})"
    log.warning(
        "dataset.root=%s: %s, too few to learn and to hold out (dataset.val_fraction); add images",
        job.dataset.root,
        shown,
    )
