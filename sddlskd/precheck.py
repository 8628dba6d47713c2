"""What can be known to be wrong with a job before it starts: no weights are made and nothing is written."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from hydra.utils import instantiate
from torch import Tensor, nn

from sddlskd.build import check_teacher
from sddlskd.config import Config, canonical
from sddlskd.console import explain
from sddlskd.precision import pick_device

__all__ = ["problems"]


def problems(jobs: Sequence[Config]) -> list[tuple[Config, str]]:
    """The jobs that cannot run, each with the reason in one line."""

    @cache
    def loaded(load: str) -> Tensor | Exception:
        try:
            images: Tensor = instantiate(by_key[load].dataset.load).train.images_NHWC
        except Exception as error:  # kept, so that what cannot be fetched is asked for once
            return error
        return images

    @cache
    def data(load: str, batch_size: int) -> tuple[int, ...]:
        job, images = by_key[load], loaded(load)
        if isinstance(images, Exception):
            raise images
        if batch_size > len(images):
            raise ValueError(
                f"trainer.batch_size={batch_size} is larger than the {len(images)} images of dataset={job.dataset.name}"
            )
        _, H, W, C = images.shape
        return C, H, W

    @cache
    def side(model: str, num_classes: int, image_CHW: tuple[int, ...]) -> int:
        with torch.device("meta"), torch.no_grad():
            network: nn.Module = instantiate(by_key[model], num_classes=num_classes)
            logit_map = network.eval()(torch.empty(1, *image_CHW))
        return int(min(logit_map.shape[2:]))

    by_key: dict[str, Any] = {}
    found = []
    for job in jobs:
        keys = [canonical(x) for x in (job.dataset.load, job.student.model, job.teacher.model)]
        by_key.update(zip(keys, (job, job.student.model, job.teacher.model), strict=True))
        try:
            pick_device(job.trainer.device)
            if job.teacher.checkpoint:  # a mistyped path shows before any data is fetched
                check_teacher(job)
            image = data(keys[0], job.trainer.batch_size)
            check_teacher(job)
            sides = [side(keys[1], job.dataset.num_classes, image)]
            if job.distiller.loss:
                sides.append(side(keys[2], job.dataset.num_classes, image))
                if max(job.M) > 2 * min(sides):
                    raise ValueError(f"M={job.M} is too fine: the largest scale here is {2 * min(sides)}")
        except Exception as error:  # a network or a data set may raise anything
            found.append((job, explain(error)))
    return found
