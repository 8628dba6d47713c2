"""The loss that a student is trained with, and its parts.

Taps are what a network shows of a batch: its logit map and the maps on the way to it.

Shapes: B batch, H W sides, K classes.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sddlskd.data.device import Batch
from sddlskd.data.subsets import UNLABELLED
from sddlskd.distill import ScaleDecoupled, SeveralTeachers
from sddlskd.methods import Method, Taps
from sddlskd.methods.ctkd import LearnedTemperature

__all__ = ["Feature", "Objective", "labelled_cross_entropy", "logits_of"]


class _Noting(Batch):
    """A batch that notes whether its epoch is read.

    Reading all fields, as unpacking and `_replace` do, counts as reading the epoch.
    """

    was_read = False

    @property
    def epoch(self) -> int:
        self.was_read = True
        return super().epoch

    def __iter__(self) -> Iterator[Any]:
        self.was_read = True
        return super().__iter__()

    def __getitem__(self, index: Any) -> Any:
        self.was_read = True
        return super().__getitem__(index)


@dataclass
class Feature:
    """Feature or relation method (a loss on inner maps) of a run, and how much its loss counts.

    Attributes:
        method: the method.
        weight: weight of its loss.
        warmup_epochs: number of epochs over which the weight rises linearly; 1 for the full weight
            from the first epoch.
    """

    method: Method
    weight: float
    warmup_epochs: int


@dataclass
class Objective:
    """Loss that a student is trained with.

    The loss is the sum of ce_weight * cross-entropy, kd_weight * warm-up * distillation loss, and
    weight * warm-up * loss for each feature or relation method. A warm-up is epoch / warmup_epochs,
    but at most 1. A student without a teacher has ce_weight * cross-entropy alone.

    Some methods have a first stage of training before epoch 1. Its epochs have the numbers ..., -1,
    0. In these epochs the loss is the sum of the methods' first-stage losses, without weights. A
    method with n such epochs takes part from epoch 1 - n on.

    An image without label has the label -1. The distillation loss then uses the class that the
    teacher predicts for the image. The cross-entropy does not count the image.

    Attributes:
        distill: the distillation loss of two logit maps, or that of a student and several teachers;
            None without such a loss.
        ce_weight: weight of the cross-entropy.
        kd_weight: weight of the distillation loss.
        warmup_epochs: number of epochs of the warm-up of the distillation loss.
        features: the feature and relation methods by name.
        temperature: module that maps an epoch to the learnt temperature of the distillation loss;
            None for the loss's own temperature.
        cross_entropy: the cross-entropy of logits (B, K) with the labels, as a mean over the
            images. Images with several labels need `binary_cross_entropy`, and images without label
            `labelled_cross_entropy`.
        unlabelled: whether batches may hold images without label.
        reads_epoch: whether a method has read `Batch.epoch` so far, so that its loss may change
            from epoch to epoch.
    """

    distill: ScaleDecoupled | SeveralTeachers | None
    ce_weight: float
    kd_weight: float
    warmup_epochs: int
    features: Mapping[str, Feature] = field(default_factory=dict)
    temperature: nn.Module | None = None
    cross_entropy: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    unlabelled: bool = False
    reads_epoch: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the values in the result of `losses`.

        The names are "loss", "loss_ce", "loss_kd", "loss_<method>" for each method, "temperature"
        if the temperature is learnt, and "labelled" if batches may hold images without label. The
        mean of a value over an epoch is the metric train/<name>.
        """
        others = ["temperature"] if self.temperature is not None else []
        if self.unlabelled:
            others.append("labelled")
        return ("loss", "loss_ce", "loss_kd", *(f"loss_{name}" for name in self.features), *others)

    @property
    def modules(self) -> nn.ModuleDict:
        """Return all modules of the loss: the methods by name, and "temperature" if it is learnt.

        Their parameters are trained with the student, and their state is saved in checkpoints.
        """
        modules: dict[str, nn.Module] = {
            name: feature.method for name, feature in self.features.items()
        }
        if self.temperature is not None:
            modules["temperature"] = self.temperature
        return nn.ModuleDict(modules)

    @property
    def needs(self) -> frozenset[str]:
        """Return the fields of `Taps` that the methods read beside `logit_map`, such as "stages".

        `Taps` holds the logit map and the inner maps of a network; `Method.needs` lists the
        possible fields. The set is empty without methods.
        """
        return frozenset().union(*(feature.method.needs for feature in self.features.values()))

    @property
    def needs_taps(self) -> bool:
        """Return whether a method reads more of the networks' taps than logit maps.

        More means inner maps or pooled features. The logit maps are those of the images and of
        their second, strongly augmented view.
        """
        return bool(self.needs - {"strong_map"})

    @property
    def first_epoch(self) -> int:
        """Return the number of the first epoch.

        The number is 1, or 1 - n if the longest first stage of a method has n epochs.
        """
        stages = [feature.method.first_stage_epochs for feature in self.features.values()]
        return 1 - max(stages, default=0)

    def weights(self, epoch: int) -> dict[str, float]:
        """Return the weight of each loss in an epoch, warm-up included, by name.

        The names are "loss_ce", "loss_kd" and "loss_<method>" for each method. Before epoch 1, in a
        first stage, only the losses of the methods are in the result, each with the weight 1.
        """
        weights = {f"loss_{name}": feature.weight for name, feature in self.features.items()}
        if epoch < 1:
            return dict.fromkeys(weights, 1.0)
        for name, feature in self.features.items():
            weights[f"loss_{name}"] *= min(epoch / feature.warmup_epochs, 1.0)
        kd_weight = self.kd_weight * min(epoch / self.warmup_epochs, 1.0)
        return {"loss_ce": self.ce_weight, "loss_kd": kd_weight, **weights}

    def fixed_by(self, epoch: int) -> Hashable:
        """Return the Python values, such as weights, that the losses depend on in an epoch.

        If two epochs have equal results, the losses are the same function of the tensors in both
        epochs, so a recorded step of one epoch can be replayed in the other. This holds only once
        `losses` has been called for a batch: only then is it known whether a method reads the
        number of the epoch (`reads_epoch`). So ask anew at each step.
        """
        weights = tuple(self.weights(epoch).items())
        if epoch < 1 or self.reads_epoch:
            return weights, epoch
        if isinstance(self.temperature, LearnedTemperature):
            return weights, self.temperature.factor(epoch)
        if self.temperature is not None:
            return weights, epoch
        return weights

    def losses(self, student: Taps, teacher: Taps | None, batch: Batch) -> dict[str, Tensor]:
        """Return the losses of a batch by their `names`.

        `Taps` are what a network shows of a batch: the logit map (B, K, H, W) and the inner maps.

        Args:
            student: taps of the student; without methods, only the logit map is read.
            teacher: taps of the teacher; None for a student without a teacher.
            batch: the batch with its labels, and the number of its epoch, which determines the
                warm-up. Some methods also read `index`.

        Returns:
            Scalars: "loss", which is to be minimised, and its parts without their weights:
            "loss_ce", "loss_kd" and "loss_<method>" for each method. "temperature" is the learnt
            temperature, if there is one, and "labelled" the share of images with a label, if some
            may have none. A value that is not computed, such as "loss_kd" in a first stage or
            without a distillation loss, is 0.
        """
        loss_ce = self.cross_entropy(logits_of(student.logit_map), batch.labels)
        values = {"loss_ce": loss_ce}
        extra = {}
        target_B = batch.labels
        if self.unlabelled:
            assert teacher is not None
            extra["labelled"] = (batch.labels != UNLABELLED).to(loss_ce.dtype).mean()
            target_B = _with_predictions(batch.labels, teacher.logit_map)
        if teacher is not None:
            if self.distill is not None and batch.epoch > 0:
                options = {}
                if self.temperature is not None:
                    options["temperature"] = extra["temperature"] = self.temperature(batch.epoch)
                shown: Any = teacher.logit_map
                if isinstance(self.distill, SeveralTeachers):
                    shown = (teacher.logit_map, *teacher.others)
                values["loss_kd"] = self.distill(student.logit_map, shown, target_B, **options)
            values |= self._of_methods(student, teacher, batch)
        weights = self.weights(batch.epoch)
        counted = [weights[name] * value for name, value in values.items() if name in weights]
        loss = sum(counted[1:], counted[0])
        absent = dict.fromkeys(self.names, torch.zeros_like(loss_ce))
        return absent | {"loss": loss} | values | extra

    def parts(self, losses: Mapping[str, Tensor], epoch: int) -> list[Tensor]:
        """Return the loss in two parts, as the optimizer DOT needs them.

        Args:
            losses: the losses by name, as `losses` returns them.
            epoch: number of the epoch, which determines the weights.

        Returns:
            Two scalars, weights and warm-up included: the sum of all losses except the
            cross-entropy, then the cross-entropy.
        """
        weights = self.weights(epoch)
        task = weights.pop("loss_ce", 0.0) * losses["loss_ce"]
        others = [weight * losses[name] for name, weight in weights.items()]
        return [sum(others[1:], others[0]), task]

    def _of_methods(self, student: Taps, teacher: Taps, batch: Batch) -> dict[str, Tensor]:
        """Return the loss of each method, computed in float32 (float64 stays) outside of autocast.

        Before epoch 1, only the methods whose first stage has begun are in the result.
        """
        values = {}
        shown = _Noting(*batch)
        with torch.autocast(student.logit_map.device.type, enabled=False):
            student, teacher = student.wide(), teacher.wide()
            for name, feature in self.features.items():
                method = feature.method
                if batch.epoch > 0:
                    values[f"loss_{name}"] = method(student, teacher, shown)
                elif batch.epoch > -method.first_stage_epochs:
                    values[f"loss_{name}"] = method.first_stage(student, teacher, shown)
        self.reads_epoch |= shown.was_read
        return values


def labelled_cross_entropy(logits_BK: Tensor, labels_B: Tensor) -> Tensor:
    """Return the mean cross-entropy of the images with a label; 0 if there are none.

    Args:
        logits_BK: logits of the images.
        labels_B: class of each image, int64; -1 for an image without label.

    Returns:
        The loss, a scalar.
    """
    total = F.cross_entropy(logits_BK, labels_B, ignore_index=UNLABELLED, reduction="sum")
    return total / (labels_B != UNLABELLED).sum().clamp(min=1)


def _with_predictions(labels_B: Tensor, teacher_map_BKHW: Tensor) -> Tensor:
    """Return the labels (B,), with the class that the teacher predicts where there is no label."""
    return torch.where(labels_B != UNLABELLED, labels_B, logits_of(teacher_map_BKHW).argmax(1))


def logits_of(logit_map_BKHW: Tensor) -> Tensor:
    """Return the logits (B, K) of a logit map: its mean over H and W, in float32.

    If the map is float64, the logits are float64, too.
    """
    dtype = torch.promote_types(logit_map_BKHW.dtype, torch.float32)
    return logit_map_BKHW.to(dtype).mean((2, 3))
