"""Build the several teachers of a job, and compute their logit maps for a batch.

Shapes: B batch, C channels, H W sides, K classes.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sddlskd import config as cfg
from sddlskd.config import Config
from sddlskd.data.streaming import Data, StreamedData
from sddlskd.models import Taps
from sddlskd.training import teacher_files
from sddlskd.training.build import build_teacher
from sddlskd.training.checks import teacher_path
from sddlskd.training.evaluation import evaluate
from sddlskd.training.ranks import Ranks
from sddlskd.training.teacher import Teacher
from sddlskd.training.teacher_cache import TeacherCache

__all__ = ["Teachers", "build_teachers"]


class Teachers:
    """Several teachers that process the same batches, for all students of a group.

    Call the instance for the weighted mean of the teachers' logits, as a map with 1 x 1 positions.
    Call `taps` for the logit maps of all teachers.

    Args:
        teachers: the teachers, in the order of `config.each_teacher`.
        weights: weight of each teacher in the mean, with the sum 1; None for equal weights.
    """

    def __init__(
        self, teachers: Sequence[Teacher | TeacherCache], weights: Sequence[float] | None = None
    ) -> None:
        self.teachers = tuple(teachers)
        self.weights = weights or [1 / len(self.teachers)] * len(self.teachers)

    def __call__(self, images_BCHW: Tensor, views_B: Tensor | None = None) -> Tensor:
        """Return the weighted mean of the teachers' logits, as a logit map (B, K, 1, 1).

        The arguments are those of `taps`.
        """
        taps = self.taps(images_BCHW, views_B)
        maps = zip(self.weights, (taps.logit_map, *taps.others), strict=True)
        with torch.inference_mode():
            parts = [
                weight * map_BKHW.float().mean((2, 3), keepdim=True) for weight, map_BKHW in maps
            ]
            return sum(parts[1:], parts[0])

    def taps(self, images_BCHW: Tensor, views_B: Tensor | None = None) -> Taps:
        """Return the logit maps of all teachers, without gradients.

        Args:
            images_BCHW: the images.
            views_B: row of each image in the caches of the teachers, see `TeacherCache`; None
                without caches.

        Returns:
            `Taps` with the logit map of the first teacher, and those of the others in `others`.
            There are no inner maps.
        """
        first_BKHW, *others = (teacher(images_BCHW, views_B) for teacher in self.teachers)
        return Taps.of_map(first_BKHW)._replace(others=tuple(others))


def build_teachers(
    jobs: Sequence[Config],
    networks: Sequence[nn.Module],
    data: Data,
    device: torch.device,
    train: Callable[[Config], None],
    ranks: Ranks | None = None,
    noted: Mapping[str, Any] | None = None,
) -> tuple[Teacher | TeacherCache | Teachers, list[dict[str, Any]]]:
    """Return the teacher or teachers of a group of jobs; train those first whose files are missing.

    The jobs allow this training with `teacher.train_if_missing`.

    Args:
        jobs: the jobs, which share their teachers.
        networks: network of each teacher, in the order of `config.each_teacher`; the weights are
            loaded from the teacher files.
        data: data set of the jobs; the teachers' accuracies are measured on its test split.
        device: device of the teachers.
        train: function that trains a given teacher job and writes the teacher file.
        ranks: the processes that share each batch; all of them must call this function. None for
            this process alone.
        noted: fingerprint of the data set (`present_fingerprint`); None if it is unknown.

    Returns:
        The teacher or `Teachers`, and each job's facts for result.json. With a single teacher both
        are those of `build_teacher`. With several, the facts are "teacher_top1" (top-1 in percent
        of the mean of the teachers' logits, with the job's weights), "teacher_top1_each" (top-1 of
        each teacher by its name in the configuration) and "teacher_sha256" (hashes of the teacher
        files, joined by "+").

    Raises:
        FileNotFoundError, ValueError: As `build_teacher` does, for any of the teachers.
        Exception: Any error that `train` raises.
    """
    ranks = ranks or Ranks()
    first = jobs[0]
    alone = cfg.each_teacher(first)
    built = [
        build_teacher(one, network, data, device, train, ranks, noted)
        for one, network in zip(alone, networks, strict=True)
    ]
    if len(built) == 1:
        return built[0][0], [built[0][1] for _ in jobs]
    teachers = [teacher for teacher, _ in built]
    hashes = [facts["teacher_sha256"] for _, facts in built]
    names = [first.teacher.name, *first.more_teachers]
    top1s: list[float] = []
    if ranks.is_rank_zero:
        top1s = [_top1_of_mean(teachers, hashes, data, job, noted) for job in jobs]
    each = {name: facts["teacher_top1"] for name, (_, facts) in zip(names, built, strict=True)}
    shared = {"teacher_top1_each": each, "teacher_sha256": "+".join(hashes)}
    return Teachers(teachers), [{"teacher_top1": top1, **shared} for top1 in ranks.broadcast(top1s)]


def _top1_of_mean(
    teachers: Sequence[Teacher | TeacherCache],
    hashes: Sequence[str],
    data: Data,
    job: Config,
    noted: Mapping[str, Any] | None,
) -> float:
    """Return the top-1 (%) of the weighted mean of the teachers' logits, measured only once.

    The value is kept beside the file of the first teacher. `hashes` are those of all files.
    """
    measured_on = f"{job.dataset.name}:{noted['sha256'] if noted else ''}:{'+'.join(hashes[1:])}"
    sizes = [one.teacher.image_size for one in cfg.each_teacher(job)]
    if any(sizes):
        measured_on += f":{sizes} pixels"
    if isinstance(data, StreamedData):
        measured_on += f":size {job.dataset.size}"
    if job.teacher.weights:
        measured_on += f":weights {job.teacher.weights}"
    together = Teachers(teachers, cfg.teacher_weights(job))
    return teacher_files.measured_top1(
        teacher_path(job), measured_on, lambda: evaluate(together, data.test_batches())["top1"]
    )
