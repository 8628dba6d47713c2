"""Distillation with the teacher's classifier (SimKD).

Source: Chen et al. 2022 (arXiv:2203.14001), as the authors' code computes it.

Shapes: B batch, C channels, H W sides of a map, K classes.
"""

import copy

import torch.nn.functional as F
from torch import Tensor, nn

from sddlskd.data.device import Batch
from sddlskd.methods.base import Method, at_smaller_side
from sddlskd.models import LogitMapModel, Taps

__all__ = ["SimKD", "WithTeacherHead"]


class WithTeacherHead(LogitMapModel):
    """Student whose last map goes through a projector into a copy of the teacher's head.

    The projector is three convolutions (1x1, 3x3, 1x1), each with BatchNorm and ReLU. Its input is
    the map of the student's last stage (group of layers) or, for a student that shows no stages,
    the map that its own head is applied to. The copy of the teacher's linear head is not trained.
    The student's own head, and layers between its last stage and that head, have no effect.

    Args:
        student: Network of the student, which is not copied.
        head: Linear head of the teacher, which is copied.
        channels: Channels of the projector's input.
        factor: The hidden layers of the projector have 1 / `factor` of the channels that `head`
            takes, rounded down.
    """

    def __init__(
        self, student: LogitMapModel, head: nn.Linear, *, channels: int, factor: int
    ) -> None:
        super().__init__()
        target = head.in_features
        middle = target // factor
        self.student = student
        self.transfer = nn.Sequential(
            nn.Conv2d(channels, middle, 1, bias=False),
            nn.BatchNorm2d(middle),
            nn.ReLU(inplace=True),
            nn.Conv2d(middle, middle, 3, padding=1, bias=False),
            nn.BatchNorm2d(middle),
            nn.ReLU(inplace=True),
            nn.Conv2d(middle, target, 1, bias=False),
            nn.BatchNorm2d(target),
            nn.ReLU(inplace=True),
        )
        self.teacher_head = copy.deepcopy(head).requires_grad_(False)

    @property
    def head(self) -> nn.Linear:
        """Return the copy of the teacher's linear head."""
        return self.teacher_head

    def features(self, x_BCHW: Tensor) -> Tensor:
        """Return the projector's output (B, C, h, w) for normalised images (B, 3, H, W).

        C is the number of channels that the teacher's head takes. h and w are the sides of the map
        that goes into the projector.
        """
        return self._projected(self.student.taps(x_BCHW))

    def taps(self, x_BCHW: Tensor) -> Taps:
        """Return the logit map (B, K, h, w) and the inner maps of normalised images (B, 3, H, W).

        `stages` and `preacts` are those of the student inside. `last` is `features(x_BCHW)`,
        `pooled` is its mean over h and w, and `logit_map` is the teacher's head applied to each
        position of `last`.
        """
        shown = self.student.taps(x_BCHW)
        return self._taps(shown.stages, shown.preacts, self._projected(shown))

    def _projected(self, shown: Taps) -> Tensor:
        projected_BCHW: Tensor = self.transfer(_last_stage(shown))
        return projected_BCHW


class SimKD(Method):
    """Loss of SimKD: the mean squared difference between the maps that the heads are applied to.

    The student is trained, evaluated and exported as a `WithTeacherHead`: the student, a projector
    and a copy of the teacher's linear head. The projector's output is compared with the teacher's
    last map.

    Args:
        student: Maps of the `WithTeacherHead` (`Taps`) for any batch.
        teacher: Maps of the teacher (`Taps`) for any batch.
        factor: Not read by the loss. The option belongs to `student_network`, which builds the
            projector.

    Raises:
        ValueError: If a network does not show the map that its head is applied to.
    """

    needs = frozenset({"last"})

    def __init__(self, student: Taps, teacher: Taps, *, factor: int = 2) -> None:
        super().__init__(student, teacher)
        self.factor = factor

    @classmethod
    def student_network(  # type: ignore[override]
        cls, student: nn.Module, teacher: nn.Module, shown: Taps, *, factor: int = 2
    ) -> nn.Module:
        """Return the student with a projector and a copy of the teacher's head.

        Args:
            student: Network of the student.
            teacher: Network of the teacher.
            shown: Maps of the student for any batch; only a number of channels is read.
            factor: The hidden layers of the projector have 1 / `factor` of the channels that the
                teacher's head takes, rounded down.

        Returns:
            A `WithTeacherHead` around `student`, which is not copied.

        Raises:
            ValueError: If a network is not a `LogitMapModel`, or if `factor` is less than 1 or more
                than the channels that the teacher's head takes.
        """
        for who, network in (("student", student), ("teacher", teacher)):
            if not isinstance(network, LogitMapModel):
                raise ValueError(
                    f"the {who}, a {type(network).__name__}, is no network with a linear head "
                    "(a sddlskd.models.LogitMapModel), which SimKD needs"
                )
        assert isinstance(student, LogitMapModel)
        assert isinstance(teacher, LogitMapModel)
        channels = teacher.head.in_features
        if not 1 <= factor <= channels:
            raise ValueError(
                f"factor={factor} does not fit the teacher's {channels} channels; "
                f"give 1..{channels}, the paper has 2"
            )
        return WithTeacherHead(
            student, teacher.head, channels=_last_stage(shown).shape[1], factor=factor
        )

    def forward(self, student: Taps, teacher: Taps, batch: Batch) -> Tensor:
        """Return the mean squared difference of the two maps, a scalar.

        Args:
            student: Maps of the student with the projector; `last`, (B, C, H, W), is read.
            teacher: Maps of the teacher, without gradients; `last` is read.
            batch: Unused.

        Returns:
            The mean over images, channels and positions. Before that, both maps are average-pooled
            to the smaller height and the smaller width.
        """
        assert student.last is not None  # as the constructor has checked
        assert teacher.last is not None
        return F.mse_loss(*at_smaller_side(student.last, teacher.last))


def _last_stage(shown: Taps) -> Tensor:
    """Return the map of the last stage, or the input of the head for a network without stages."""
    if shown.stages:
        return shown.stages[-1]
    assert shown.last is not None  # a LogitMapModel always shows it
    return shown.last
