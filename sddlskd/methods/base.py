"""What all methods share: how a method is built, called and refused.

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


class Method(nn.Module, ABC):
    """A loss that compares the taps of a student with those of its teacher.

    The parameters of a method are its connectors. They are trained by the student's optimizer,
    saved in checkpoints, and left out of the exported student. Its buffers are saved as well. The
    teacher's taps carry no gradient, and a method must not change any tap in place.

    Args:
        student: Taps of the student for any batch; only their shapes are read.
        teacher: Taps of the teacher for any batch; only their shapes are read.

    Raises:
        ValueError: If a network lacks what the method `needs`.

    Attributes:
        needs: What the method reads beside the logit maps: "stages", "preacts", "pooled" and "last"
            of the taps; "strong_map" for two views of each image.
        facts: Keyword arguments that the training gives to the constructor, of these:
            `labels_N` (class of each training image, int64, on the CPU), `num_classes` (K), `seed`
            (of the run), `batch_size` (images per batch), `teacher_network` (the teacher with its
            BatchNorm, in eval mode).
        first_stage_epochs: Number of epochs of a first stage, 0 for none. The stage comes before
            epoch 1, so its epochs have the numbers ..., -1, 0. In these epochs the loss is
            `first_stage` without a weight; cross-entropy and distillation loss are left out.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    facts: ClassVar[frozenset[str]] = frozenset()
    first_stage_epochs: int = 0

    def __init__(self, student: Taps, teacher: Taps) -> None:
        super().__init__()
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

        It is the student itself, or a network around it. It must not depend on the teacher's
        weights, except for parameters and buffers of the network that is returned.

        Args:
            student: The student.
            teacher: The teacher with its BatchNorm.
            shown: Taps of the student for any batch.
            **options: The options of the method.

        Raises:
            ValueError: If the networks do not fit.
        """
        return student

    def first_stage(self, student: Taps, teacher: Taps, batch: Batch) -> Tensor:
        """Return the loss of a batch in an epoch before the first one; see `forward`."""
        raise NotImplementedError(f"{type(self).__name__} has no first stage")

    @abstractmethod
    def forward(self, student: Taps, teacher: Taps, batch: Batch) -> Tensor:
        """Return the loss of a batch, a scalar.

        Args:
            student: Taps of the student.
            teacher: Taps of the teacher, without gradients.
            batch: The images, their labels and indices, and the number of the epoch.
        """


def pairs(student: Taps, teacher: Taps) -> list[tuple[Tensor, Tensor]]:
    """Return the maps (student B C H W, teacher B C H W) of each stage after the stem.

    The maps are paired from the front, as mdistiller pairs them: if one network has more stages,
    its last ones are left out.
    """
    return list(zip(student.stages[1:], teacher.stages[1:], strict=False))


def check_alignment(alignment: str) -> None:
    """Raise ValueError unless `alignment` says how to pair the stages of two networks."""
    if alignment not in ALIGNMENTS:
        raise ValueError(f"alignment={alignment!r}; choose one of: {', '.join(ALIGNMENTS)}")


def from_end(own: Sequence[Tensor], other: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return the maps (student B C H W, teacher B C H W) of the stages, paired from the end.

    If one network has more stages, its first ones, which have the finest maps, are left out.
    """
    count = min(len(own), len(other))
    return list(zip(own[len(own) - count :], other[len(other) - count :], strict=True))


def at_smaller_side(a_BCHW: Tensor, b_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Return two maps, of which the larger is average-pooled to the sides of the smaller one."""
    a_height, a_width = a_BCHW.shape[2:]
    b_height, b_width = b_BCHW.shape[2:]
    if a_height > b_height:
        a_BCHW = F.adaptive_avg_pool2d(a_BCHW, (b_height, b_width))
    elif a_height < b_height:
        b_BCHW = F.adaptive_avg_pool2d(b_BCHW, (a_height, a_width))
    return a_BCHW, b_BCHW


def check_flags(**flags: bool) -> None:
    """Raise ValueError unless each of these options is true or false."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name}={value!r} must be true or false")


def check_stage_epochs(stage_epochs: int) -> None:
    """Raise ValueError unless `stage_epochs` is a number of epochs of a first stage."""
    if isinstance(stage_epochs, bool) or not isinstance(stage_epochs, int) or stage_epochs < 1:
        raise ValueError(f"stage_epochs={stage_epochs} must be an integer of at least 1")


def conv_between(own_BCHW: Tensor, other_BCHW: Tensor) -> nn.Module:
    """Return a convolution from the shape of a student's map to that of a teacher's.

    Raise ValueError if the student's map is smaller than the teacher's and not half as large.
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
