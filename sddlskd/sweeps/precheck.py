"""Checks that find invalid jobs before they start, without creating weights or writing files.

A sweep runs these checks in a separate process. The process that then waits for hours holds neither
torch nor images.
"""

import json
import pickle
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sddlskd import record
from sddlskd.config import Config, canonical
from sddlskd.config.targets import instantiate
from sddlskd.datasets.arrays import Files, Splits
from sddlskd.terminal.console import explain
from sddlskd.training.build import check_cache, check_teacher, shape_of, teacher_changed
from sddlskd.training.devices import check_places

__all__ = ["main", "problems", "report"]


def problems(jobs: Sequence[Config]) -> list[tuple[Config, str]]:
    """Return (job, reason) for each job that cannot run; each reason is one line."""

    @cache
    def shape(load: str) -> tuple[int, ...] | Exception:
        try:
            splits: Splits = instantiate(by_key[load].dataset.load)
        except Exception as error:
            # Return the error, so that the cache prevents a second attempt to download.
            return error
        if isinstance(splits.train, Files):
            of_files.add(load)
        return shape_of(by_key[load], splits)

    @cache
    def data(load: str, batch_size: int) -> tuple[int, ...]:
        job, found = by_key[load], shape(load)
        if isinstance(found, Exception):
            raise found
        N, H, W, C = found
        if batch_size > N:
            raise ValueError(
                f"trainer.batch_size={batch_size} is larger than the {N} images of "
                f"dataset={job.dataset.name}"
            )
        return C, H, W

    @cache
    def side(model: str, num_classes: int, image_CHW: tuple[int, ...]) -> int:
        with torch.device("meta"), torch.no_grad():
            network: nn.Module = instantiate(by_key[model], num_classes=num_classes)
            logit_map = network.eval()(torch.empty(1, *image_CHW))
        return int(min(logit_map.shape[2:]))

    by_key: dict[str, Any] = {}
    of_files: set[str] = set()  # keys of data sets whose images stay on disk
    found = []
    for job in jobs:
        seen = [job.dataset.load, job.dataset.size]
        keys = [canonical(x) for x in (seen, job.student.model, job.teacher.model)]
        by_key.update(zip(keys, (job, job.student.model, job.teacher.model), strict=True))
        try:
            check_places(job.trainer.device, job.trainer.devices)
            # Report a mistyped path before any data is downloaded.
            if job.teacher.checkpoint:
                check_teacher(job)
            image = data(keys[0], job.trainer.batch_size)
            check_teacher(job)
            if keys[0] in of_files:
                check_cache(job)
            sides = [side(keys[1], job.dataset.num_classes, image)]
            if job.distiller.loss:
                sides.append(side(keys[2], job.dataset.num_classes, image))
                if max(job.M) > 2 * min(sides):
                    raise ValueError(
                        f"M={job.M} is too fine: the largest scale here is {2 * min(sides)}"
                    )
        except Exception as error:  # a network or a data set may raise anything
            found.append((job, explain(error)))
    return found


def report(todo: Sequence[Config], finished: Sequence[Config]) -> dict[str, Any]:
    """Return the problems of the jobs to run and facts that the sweep needs, as a dictionary.

    The dictionary has the keys

    - problems: (index in `todo`, reason) of each job that cannot run;
    - changed: indices in `finished` of the jobs that learnt from another teacher file than the
      current one;
    - devices: devices of this machine, such as ["cuda:0", "cuda:1"] or ["cpu"].
    """
    place = {id(job): i for i, job in enumerate(todo)}
    cuda = (
        [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    return {
        "problems": [(place[id(job)], reason) for job, reason in problems(todo)],
        "changed": [
            i
            for i, job in enumerate(finished)
            if teacher_changed(job, record.read_result(Path(job.run_dir)))
        ],
        "devices": cuda or ["cpu"],
    }


def main() -> None:
    """Read (jobs to run, finished jobs) as pickle from stdin; write their `report` as JSON."""
    todo, finished = pickle.load(sys.stdin.buffer)
    # A user's network or data set may print, which must not mix with the JSON.
    answers, sys.stdout = sys.stdout, sys.stderr
    answers.write(json.dumps(report(todo, finished)))


if __name__ == "__main__":
    main()
