"""Prepare what the runs of a group read in a step: the batch, and the teacher's outputs for it.

A group is a list of runs that are trained side by side. The outputs (`Taps`) are the teacher's
logit map and, if a loss needs them, the maps of its stages and the input of its classifier.

Shapes: B batch, K classes, H W sides of a map.
"""

import logging
from collections.abc import Hashable, Sequence

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from sddlskd.data.device import Batch
from sddlskd.models import Taps
from sddlskd.training.capture import Captured
from sddlskd.training.run import Run
from sddlskd.training.several import Teachers
from sddlskd.training.teacher import Teacher
from sddlskd.training.teacher_cache import TeacherCache

__all__ = ["Inputs", "ask"]

log = logging.getLogger(__name__)


def ask(teacher: Teacher | TeacherCache | Teachers, batch: Batch, runs: Sequence[Run]) -> Taps:
    """Return the teacher's taps of a batch: the logit map, and the inner maps if a loss reads them.

    Args:
        teacher: the teacher, or the teachers, that the runs share.
        batch: the images, in two views if a run needs two.
        runs: the runs that train on the batch. The teacher computes only what their losses read.

    Returns:
        `Taps` without gradients. `logit_map` is (B, K, H, W), of the first teacher if there are
        several; `others` are the logit maps of the second teacher and the following ones.
        `strong_map` is the logit map of the second view, or None if no run reads it.
    """
    images_BCHW, rows_B = _shown(batch)
    # Methods that read inner maps have a single teacher.
    if isinstance(teacher, Teachers) or any(run.objective.needs_taps for run in runs):
        taps = teacher.taps(images_BCHW, rows_B)
    else:
        logit_map_BKHW = teacher(images_BCHW, rows_B)
        if any(run.objective.features for run in runs):
            logit_map_BKHW = logit_map_BKHW.clone()  # autograd refuses inference tensors
        taps = Taps.of_map(logit_map_BKHW)
    if any("strong_map" in run.objective.needs for run in runs):
        assert batch.strong is not None
        taps = taps._replace(strong_map=teacher(batch.strong, None).clone())
    return taps


def _shown(batch: Batch) -> tuple[Tensor, Tensor | None]:
    """Return the images of a batch that the teacher sees, and the row of each one in a cache.

    A batch holds plain images only if the teacher sees them. An image then has a single row.
    """
    if batch.plain is None:
        return batch.images, batch.views
    return batch.plain, batch.index


class Inputs:
    """Function that prepares the tensors of a step for the runs of a group: batch and taps.

    Call the instance with the data set's batch and the runs that train on it. The call returns the
    batch that the runs shall use, and the teacher's taps of it; without a teacher, the taps are
    None. The teacher processes the batch once for all runs.

    If steps are captured (recorded as a CUDA graph and replayed), batch and taps are copied to the
    same memory in every step, because a recording always reads the same memory. Only a batch that
    is shorter than an earlier one, such as the last of an epoch, and its taps are not copied. The
    forward pass of the teacher is captured, too, unless the logit maps come from a cache.

    Args:
        runs: all runs of the group.
        teacher: the teacher, or the teachers, that the runs share; None without distillation.
    """

    def __init__(
        self, runs: Sequence[Run], teacher: Teacher | TeacherCache | Teachers | None
    ) -> None:
        self._runs, self._teacher = runs, teacher
        self._device = runs[0].device
        self._is_captured = any(run.captured is not None for run in runs)
        # Fields that no captured step reads: a cache alone reads `views`, and methods read `index`.
        self._unread = {"views", "index"}
        if any(run.objective.features for run in runs):
            self._unread = {"views"}
        self._batch: dict[str, Tensor] = {}
        self._taps: Taps | None = None
        self._asked: Hashable = None
        self._forward: Captured | None = None
        if self._is_captured and _has_no_cache(teacher):
            watched = not any(run.compiled for run in runs)
            self._forward = Captured(
                "forward passes of the teacher", self._device, log, watched=watched
            )

    def __call__(self, batch: Batch, runs: Sequence[Run]) -> tuple[Batch, Taps | None]:
        """Return the batch and the taps of the teacher for one step of some runs of the group.

        The next call may overwrite the returned tensors.

        Args:
            batch: the batch as the data set makes it.
            runs: the runs that train on the batch.

        Returns:
            The batch, and the teacher's taps of this batch: None if `runs` is empty or if there is
            no teacher.
        """
        # The memory of the last step may be overwritten or freed from here on.
        for run in self._runs:
            run.wait()
        fits = self._is_captured and self._hold(batch)
        if fits:
            batch = batch._replace(**self._batch)  # type: ignore[arg-type]
        if self._teacher is None or not runs:
            return batch, None
        if fits:
            return batch, self._held_taps(batch, runs)
        return batch, ask(self._teacher, batch, runs)

    def _hold(self, batch: Batch) -> bool:
        """Copy a batch to the memory of the earlier ones; return False if it is shorter."""
        new = {
            name: value
            for name, value in batch._asdict().items()
            if isinstance(value, Tensor) and name not in self._unread
        }
        size = len(batch.labels)
        if not self._batch or size > len(self._batch["labels"]):
            self._batch = {name: tensor.to(self._device, copy=True) for name, tensor in new.items()}
            return True
        if size < len(self._batch["labels"]):
            return False
        for name, tensor in new.items():
            self._batch[name].copy_(tensor, non_blocking=True)
        return True

    def _held_taps(self, batch: Batch, runs: Sequence[Run]) -> Taps:
        """Return the taps of a batch in the memory of the earlier ones."""
        teacher = self._teacher
        assert teacher is not None
        needs = frozenset[str]().union(*(run.objective.needs for run in runs))
        images_BCHW, _ = _shown(batch)
        asked = needs, images_BCHW.data_ptr()
        if self._taps is None or asked != self._asked:
            self._taps = tree_map_only(Tensor, Tensor.clone, ask(teacher, batch, runs))
            self._asked = asked
            return self._taps
        held = _tensors(self._taps)

        def fill() -> None:
            for old, new in zip(held, _tensors(ask(teacher, batch, runs)), strict=True):
                old.copy_(new)

        if self._forward is None:
            fill()
        else:
            read = [images_BCHW, *([] if batch.strong is None else [batch.strong])]
            # The recording writes to `held`, so it is of no use for other taps.
            self._forward(fill, [*read, *held], needs)
            self._forward.wait()
        return self._taps


def _has_no_cache(teacher: Teacher | TeacherCache | Teachers | None) -> bool:
    """Return whether each logit map comes from a forward pass of a teacher."""
    if isinstance(teacher, Teachers):
        return all(isinstance(one, Teacher) for one in teacher.teachers)
    return isinstance(teacher, Teacher)


def _tensors(taps: Taps) -> list[Tensor]:
    """Return all tensors of taps, in a fixed order."""
    return [leaf for leaf in tree_leaves(taps) if isinstance(leaf, Tensor)]
