"""The base class of the feature and relation methods, and functions that several of them use.

Shapes: B batch, C channels, H W sides of a map, K classes, N training images.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from sddlskd.data.device import Batch
from sddlskd.models import Taps

__all__ = [
    "Method",
    "at_smaller_side",
    "check_alignment",
    "check_flags",
    "check_stage_epochs",
    "conv_between",
    "from_end",
    "pairs",
]

ALIGNMENTS = ("strict", "from_end")
NEEDS = ("stages", "preacts", "pooled", "logit_map", "last", "strong_map")  # valid in `needs`


class Method(nn.Module, ABC):
    """Base class of losses that compare the maps of a student with those of its teacher.

    A method is called with the `Taps` of both networks and a `Batch`, see `forward`. `Taps` hold
    the maps and pooled features that a network computes for a batch. The teacher's tensors carry no
    gradient. A subclass must not change tensors of `Taps` in place.

    A method may have layers of its own, its connectors, between the maps of the two networks. The
    student's optimizer trains their parameters. Checkpoints hold the parameters and the persistent
    buffers of the method. The exported student holds neither.

    Args:
        student: Maps of the student for any batch; only their shapes are read.
        teacher: Maps of the teacher for any batch; only their shapes are read.

    Raises:
        ValueError: If `needs` has an unknown name, or if a network does not show a field of
            `needs`, except "strong_map", which is not checked.

    Attributes:
        needs: Names of the fields of `Taps` that the method reads beside `logit_map`: "stages" and
            "preacts" (each with at least one map after that of the stem, the first layers),
            "pooled", "last" and "strong_map" (the logit map of a second view of each image).
        facts: Names of the constructor's keyword arguments whose values come from the training, not
            from the configuration. Possible names: `labels_N` (class of each training image, int64,
            on the CPU), `num_classes` (K), `seed` (of the run), `batch_size` (images per batch),
            `drop_last` (whether an epoch leaves out a smaller last batch), `teacher_network` (the
            teacher with its BatchNorms, in eval mode).
        first_stage_epochs: Number of epochs of a first stage of training, which comes before epoch
            1; 0 if there is none. The epochs of the first stage are numbered ..., -1, 0. Their loss
            is `first_stage` with the weight 1, without cross-entropy and without distillation of
            the logits.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    facts: ClassVar[frozenset[str]] = frozenset()
    first_stage_epochs: int = 0

    def __init__(self, student: Taps, teacher: Taps) -> None:
        super().__init__()
        if unknown := sorted(set(self.needs).difference(NEEDS)):
            raise ValueError(
                f"{type(self).__name__}.needs names {', '.join(unknown)}, which no network shows; "
                f"valid are {', '.join(NEEDS)}"
            )
        for who, taps in (("student", student), ("teacher", teacher)):
            for need in ("stages", "preacts"):
                if need in self.needs and len(getattr(taps, need)) < 2:
                    raise ValueError(
                        f"the {who} has no {need} after the stem, which {type(self).__name__} needs"
                    )
            if "pooled" in self.needs and not taps.pooled.shape[1]:
                raise ValueError(f"the {who} has no taps, which {type(self).__name__} needs")
            if "last" in self.needs and taps.last is None:
                raise ValueError(f"the {who} has no taps, which {type(self).__name__} needs")

    @classmethod
    def student_network(
        cls, student: nn.Module, teacher: nn.Module, shown: Taps, **options: Any
    ) -> nn.Module:
        """Return the network that is trained, evaluated and exported as the student.

        By default that network is `student` itself. A subclass may return a larger network that
        contains `student` and takes weights from the teacher. Such weights must be parameters or
        buffers of the larger network. To load a saved student, this method is called with an
        untrained teacher, and the saved weights are then loaded into the result.

        Args:
            student: Network of the student.
            teacher: Network of the teacher, with its BatchNorms.
            shown: Maps of the student for any batch.
            **options: Options of the method from the configuration.

        Returns:
            The student, or a network that contains the student.

        Raises:
            ValueError: If a subclass cannot serve these networks or options.
        """
        return student

    def first_stage(self, student: Taps, teacher: Taps, batch: Batch) -> Tensor:
        """Return the loss of a batch in the first stage of training (before epoch 1), a scalar.

        Args:
            student: Maps of the student.
            teacher: Maps of the teacher, without gradients.
            batch: Labels and indices of the images, and the number of the epoch, which is at most
                0.

        Returns:
            The loss, which the training minimises as it is (weight 1).

        Raises:
            NotImplementedError: If the method has no first stage.
        """
        raise NotImplementedError(f"{type(self).__name__} has no first stage")

    @abstractmethod
    def forward(self, student: Taps, teacher: Taps, batch: Batch) -> Tensor:
        """Return the loss of a batch from epoch 1 on, a scalar.

        Args:
            student: Maps of the student.
            teacher: Maps of the teacher, without gradients.
            batch: Labels and indices of the images, and the number of the epoch, which is at least
                1.

        Returns:
            The loss; the caller multiplies it by the method's weight.
        """


def pairs(student: Taps, teacher: Taps) -> list[tuple[Tensor, Tensor]]:
    """Return pairs (student's map, teacher's map) of the stages after the stem, from the first on.

    A stage is a group of layers, and its map is (B, C, H, W). The stem is the first layers. If one
    network has more stages, its last stages are left out, as in mdistiller. The two maps of a pair
    may differ in channels and sides.
    """
    return list(zip(student.stages[1:], teacher.stages[1:], strict=False))


def check_alignment(alignment: str) -> None:
    """Raise ValueError unless `alignment`, the way to pair stages, is "strict" or "from_end"."""
    if alignment not in ALIGNMENTS:
        raise ValueError(f"alignment={alignment!r}; choose one of: {', '.join(ALIGNMENTS)}")


def from_end(own: Sequence[Tensor], other: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return pairs (student's map, teacher's map) of two lists of maps, paired from the last.

    `own` are the maps (B, C, H, W) of the student, `other` those of the teacher. The pairs keep the
    order of the lists. If one list is longer, its first maps are left out. If a list is empty, the
    result is [].
    """
    count = min(len(own), len(other))
    return list(zip(own[len(own) - count :], other[len(other) - count :], strict=True))


def at_smaller_side(a_BCHW: Tensor, b_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Return both maps, (B, C, H, W), average-pooled to the smaller height and the smaller width.

    A map that has these sides is returned unchanged. The channels may differ.
    """
    sides = min(a_BCHW.shape[2], b_BCHW.shape[2]), min(a_BCHW.shape[3], b_BCHW.shape[3])
    a_BCHW, b_BCHW = (
        map_BCHW if map_BCHW.shape[2:] == sides else F.adaptive_avg_pool2d(map_BCHW, sides)
        for map_BCHW in (a_BCHW, b_BCHW)
    )
    return a_BCHW, b_BCHW


def check_flags(**flags: bool) -> None:
    """Raise ValueError unless the value of each keyword argument is a bool.

    The message names the argument. Each flag is therefore given under its own name, as in
    `check_flags(squared=squared)`.
    """
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name}={value!r} must be true or false")


def check_stage_epochs(stage_epochs: int) -> None:
    """Raise ValueError unless `stage_epochs` is an integer of at least 1; a bool is refused."""
    if isinstance(stage_epochs, bool) or not isinstance(stage_epochs, int) or stage_epochs < 1:
        raise ValueError(f"stage_epochs={stage_epochs} must be an integer of at least 1")


def conv_between(own_BCHW: Tensor, other_BCHW: Tensor) -> nn.Module:
    """Return a new convolution that gives a student's map the shape of a teacher's map.

    Only the shapes (B, C, H, W) of the two maps are read. The convolution has a bias. The first of
    three cases that holds for both height and width counts. The side of the student's map is:
    - twice the teacher's: 3x3 convolution with stride 2.
    - half of the teacher's: transposed 4x4 convolution with stride 2.
    - at least the teacher's: convolution without padding. Each side of the kernel is 1 plus the
      difference of the maps' sides.

    Raise ValueError if no case holds for both height and width.
    """
    channels = own_BCHW.shape[1], other_BCHW.shape[1]
    own, other = own_BCHW.shape[2:], other_BCHW.shape[2:]
    height, width = zip(own, other, strict=True)
    if all(a == 2 * b for a, b in (height, width)):
        return nn.Conv2d(*channels, 3, stride=2, padding=1)
    if all(2 * a == b for a, b in (height, width)):
        return nn.ConvTranspose2d(*channels, 4, stride=2, padding=1)
    if all(a >= b for a, b in (height, width)):
        return nn.Conv2d(*channels, (1 + height[0] - height[1], 1 + width[0] - width[1]))
    small, large = ("x".join(map(str, sides)) for sides in (own, other))
    raise ValueError(
        f"the student's map {small} is smaller than the teacher's {large} and not half as large; "
        "choose a pair or a stage at which the student's map is larger, equal or half as large"
    )
