"""Training of one student: the training step, the progress and the record of a run.

Taps are what a network shows of a batch: its logit map and the maps on the way to it.

Shapes: B batch, C channels, H W sides, K classes, R ranks, S sums of an epoch.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sddlskd.data.device import Batch, seed_of
from sddlskd.files import checkpoint
from sddlskd.methods import Taps
from sddlskd.models import LogitMapModel
from sddlskd.record import (
    FAILED,
    FINISHED,
    KILLED,
    ONLY_IN_FILE,
    PRUNED,
    RUNNING,
    Onlooker,
    Record,
)
from sddlskd.training.capture import Captured
from sddlskd.training.devices import autocast, compiled
from sddlskd.training.objective import Objective, logits_of
from sddlskd.training.optimisation import CAPTURED_OPTIMIZERS, Optimisation
from sddlskd.training.ranks import Ranks

__all__ = ["NonFiniteLoss", "Progress", "Run"]


CURE = "lower optimizer.lr or set optimizer.clip_norm"


class NonFiniteLoss(ArithmeticError):
    """Error for a training or validation loss that became infinite or NaN."""


@dataclass
class Progress:
    """Position of a run and the accuracy reached so far; checkpoints hold these values by name.

    A run is the training of one student.

    Attributes:
        epoch: number of the current epoch, or of the next one between two epochs, from 1. After the
            last epoch it is the number of epochs plus 1. Some methods have a first stage of
            training before epoch 1, whose epochs are ..., -1, 0.
        step: number of batches of the current epoch that are done.
        seen: number of images of the current epoch that are done, over all ranks (processes that
            share each batch).
        best_top1: validation top-1 of the best epoch in percent; -1 before epoch 1 has ended.
        best_epoch: number of the best epoch, 0 before epoch 1 has ended. The best epoch is the one
            with the highest validation top-1, or mAP if images have several labels.
        last_top1: validation top-1 of the epoch that ended last, in percent; -1 before an epoch has
            ended.
        seconds: seconds spent on all epochs that have ended.
        spent: seconds that earlier processes spent on the current epoch.
        best_mAP: validation mAP of the best epoch in percent; -1 before epoch 1 has ended, and -1
            unless images have several labels.
        last_mAP: validation mAP of the epoch that ended last, in percent; -1 before an epoch has
            ended, and -1 unless images have several labels.
    """

    epoch: int = 1
    step: int = 0
    seen: int = 0
    best_top1: float = -1.0
    best_epoch: int = 0
    last_top1: float = -1.0
    seconds: float = 0.0
    spent: float = 0.0
    best_mAP: float = -1.0
    last_mAP: float = -1.0

    @classmethod
    def saved_in(cls, state: Mapping[str, Any]) -> "Progress":
        """Return the progress that is stored in `state`, the content of a checkpoint.

        Checkpoints of earlier versions, which hold the values as lists, are understood, too. Raise
        KeyError if `state` holds no progress.
        """
        if "progress" in state:
            return cls(**state["progress"])
        # The older lists hold the values in the order of the attributes.
        return cls(*state["position"], *state["scores"], *state["seconds"])


class Run:
    """Complete training state of one student, with its run directory.

    If the run directory holds a checkpoint, the run resumes from the checkpoint. The ranks are the
    processes that share each batch. Every rank has the same weights and progress, and only rank 0
    writes files.

    Args:
        record: the run directory, opened for writing on rank 0 and for reading on other ranks.
        model: the student.
        objective: the loss that the student is trained with.
        optimisation: how the parameters are updated.
        label: name of the run in logs.
        device: device of this rank.
        precision: precision of the forward pass: "fp32", "bf16" or "fp16".
        compile: whether to apply torch.compile to the student.
        compile_mode: mode of torch.compile.
        capture: whether to capture the steps (record them as a CUDA graph and replay it). Steps
            that cannot be captured run as usual.
        seed: seed of random layers such as dropout, which depend on (seed, epoch, step) alone, and
            on the rank if several ranks share a batch.
        steps: batches per epoch.
        images: images per epoch, over all ranks.
        batch_size: images per batch, over all ranks.
        ranks: the ranks; all of them must build the run together.

    Attributes:
        label: name of the run in logs.
        progress: position of the run and the accuracy that it has reached.
        state: the status of the run: RUNNING, FINISHED, FAILED, KILLED or PRUNED.
        loss: mean training loss of the current epoch when `check_loss` was last called, or of the
            last epoch after `end_epoch`; NaN before.
        val_top1: validation top-1 of the epoch that ended last, in percent; NaN before an epoch has
            ended.
        info: facts for result.json, such as {"teacher_top1": 79.4, "environment": "..."}.
        crowded: whether other runs share the device.
        compiled: whether torch.compile is applied to the student.
        captured: the object that captures and replays the steps; None if steps are not captured.

    Raises:
        UnreadableFile: If the run directory holds checkpoints and none can be read. The error is a
            ValueError.
        ValueError, RuntimeError: If the checkpoint does not fit the student or the optimizer.
    """

    def __init__(
        self,
        record: Record | Onlooker,
        model: nn.Module,
        objective: Objective,
        optimisation: Optimisation,
        *,
        label: str,
        device: torch.device,
        precision: str,
        compile: bool,
        compile_mode: str = "default",
        capture: bool = False,
        seed: int,
        steps: int,
        images: int,
        batch_size: int,
        ranks: Ranks,
    ) -> None:
        self.record = record
        self.label = label
        self.model = model
        self.objective = objective
        self.optimisation = optimisation
        self.device = device
        self.precision = precision
        self.seed = seed
        self.steps = steps
        self.images = images
        self.batch_size = batch_size
        self.ranks = ranks
        self.progress = Progress(epoch=objective.first_epoch)
        # Sums over this epoch's images on this rank: the losses and the correct answers.
        self.sums = torch.zeros(len(objective.names) + 1, device=device)
        # Step and value of the first non-finite loss; the step is -1 if there is none.
        self.first_bad = torch.full((2,), -1.0, device=device)
        # Number of the present step from 1. A captured step reads it on the device.
        self._number = torch.zeros((), device=device)
        self.state = RUNNING
        self.loss = math.nan
        self.val_top1 = math.nan
        self.info: dict[str, Any] = {}
        self.crowded = False
        self._resume()
        shared = ranks.wrap(model)
        self.compiled = compile
        self._is_uncompiled = compile  # until the first step, in which the compiler runs
        self.forward = compiled(shared, compile_mode) if compile else shared
        self._taps: Callable[[Tensor], Taps] | None = None
        if objective.needs_taps:
            assert isinstance(model, LogitMapModel)  # as the methods have checked
            self._taps = compiled(model.taps, compile_mode) if compile else model.taps
        self.captured: Captured | None = None
        if capture and not (reason := self._why_not_captured()):
            optimisation.capture_on(device)
            self.captured = Captured("steps", device, record.log, watched=not self.compiled)
        elif capture:
            record.log.info(
                "%s: steps are not captured, but started kernel by kernel: %s", label, reason
            )

    def _why_not_captured(self) -> str:
        """Return why no step of this run can be captured; "" if nothing is known against it."""
        kind = type(self.optimisation.optimizer)
        if self.ranks.world_size > 1:
            return "several processes share each batch"
        if self.optimisation.scaler.is_enabled():
            return "fp16 scales the loss"
        if kind not in CAPTURED_OPTIMIZERS:
            return f"the optimizer {kind.__name__} cannot be captured"
        return ""

    @property
    def epoch(self) -> int:
        """Return the number of the current epoch, or of the next one between two epochs.

        Epochs count from 1. Epochs of a first stage, which some methods have, come before and have
        the numbers ..., -1, 0. After the last epoch, the result is the number of epochs plus 1.
        """
        return self.progress.epoch

    @property
    def step(self) -> int:
        """Return the number of batches of the current epoch that are done."""
        return self.progress.step

    @property
    def alive(self) -> bool:
        """Return whether the run can still be trained: not FINISHED, FAILED, KILLED or PRUNED."""
        return self.state not in (FINISHED, FAILED, KILLED, PRUNED)

    def start(self, info: Mapping[str, Any], *, crowded: bool) -> None:
        """Store `info` and `crowded` as attributes, and report the run as RUNNING in result.json.

        Args:
            info: facts for result.json, such as {"teacher_top1": 79.4, "environment": "..."}.
            crowded: whether other runs share the device.

        Raises:
            OSError: If result.json cannot be written.
            Damaged: If requeues.json in the run directory is damaged. The error is a ValueError.
        """
        self.info = dict(info)
        self.crowded = crowded
        self.report(RUNNING)

    def train_step(self, batch: Batch, teacher: Taps | None) -> None:
        """Train the student for one step on one batch, and count the step in `progress`.

        A loss that is not finite raises no error here. `check_loss` raises it, and must be called
        from time to time. Torch's global random generators are seeded anew in each step.

        Args:
            batch: this rank's share of the batch, of the run's current epoch.
            teacher: what the teacher shows of `batch`: the logit map (B, K, H, W) and the inner
                maps that the losses read. None for a student without a teacher.
        """
        began = time.monotonic()
        own = len(batch.labels)
        whole = self._images_of_step(own)
        count = self.ranks.images_of_step(own, whole)
        self.wait()
        # Seed each step, so that a run draws the same numbers alone, in a group and after a resume.
        torch.manual_seed(self._seed_of_step())
        self._number.fill_(self.step + 1)
        self.optimisation.set_rate(self.epoch - 1 + self.step / self.steps)
        learn = partial(self._learn, batch, teacher, count, whole)
        if self.captured is None:
            learn()
        elif own < self.batch_size:
            self.captured.plainly(learn)
        else:
            self.captured(learn, self._read(batch, teacher), self.objective.fixed_by(batch.epoch))
        self.progress.step += 1
        self.progress.seen += whole
        if self._is_uncompiled:
            self._is_uncompiled = False
            took = time.monotonic() - began
            self.record.log.info("%s: torch.compile: %.1f s with the first step", self.label, took)

    def _learn(self, batch: Batch, teacher: Taps | None, count: float, whole: int) -> None:
        """Update the weights and the sums of the epoch from one batch, on the device alone.

        A captured step repeats this work, so it must neither read a value of the device nor depend
        on values of Python that change from step to step.

        Args:
            batch: this rank's share of the batch.
            teacher: taps of the teacher; None for a student without a teacher.
            count: number of images that this rank counts for.
            whole: number of images of the batch, over all ranks.
        """
        own = len(batch.labels)
        with autocast(self.device, self.precision):
            student = self._see(batch)
        losses = self.objective.losses(student, teacher, batch)
        loss = losses["loss"]
        parts = [loss]
        if self.optimisation.in_parts:
            parts = self.objective.parts(losses, batch.epoch)
        # The gradients are averaged over the ranks. Weighting each rank's loss by its share of the
        # images makes that average the gradient of the whole batch.
        share = count * self.ranks.world_size / whole
        self.optimisation.step([part * share for part in parts])

        with torch.no_grad():
            class_B = logits_of(student.logit_map).argmax(1)
            right = _are_right(class_B, batch.labels).sum() * (count / own)
            counted = [losses[name] * count for name in self.objective.names]
            self.sums += torch.stack([*counted, right.to(loss.dtype)])
            is_first = ~torch.isfinite(loss) & (self.first_bad[0] < 0)
            found = torch.stack((self._number, loss.float()))
            self.first_bad.copy_(torch.where(is_first, found, self.first_bad))

    def _read(self, batch: Batch, teacher: Taps | None) -> list[Tensor]:
        """Return the tensors that a step reads and that differ from batch to batch."""
        unread = {"views", "plain"} if self.objective.features else {"views", "plain", "index"}
        fields = batch._asdict()
        read = [value for name, value in fields.items() if name not in unread]
        return [value for value in (*read, *tree_leaves(teacher)) if isinstance(value, Tensor)]

    def wait(self) -> None:
        """Make later work on the device wait for the steps of this run so far; the host goes on.

        Captured steps run on a CUDA stream of their own. Call this method before other code reads
        the weights or results of the run.
        """
        if self.captured is not None:
            self.captured.wait()

    def _see(self, batch: Batch) -> Taps:
        """Return the taps of the student that the losses read."""
        taps = self._taps(batch.images) if self._taps else Taps.of_map(self.forward(batch.images))
        if "strong_map" in self.objective.needs:
            # A separate forward pass, so that BatchNorm does not mix the two views.
            taps = taps._replace(strong_map=self.forward(batch.strong))
        return taps

    def _images_of_step(self, own: int) -> int:
        """Return the number of images of the current step, of which this rank holds `own`."""
        if self.ranks.world_size == 1:
            return own
        return min(self.batch_size, self.images - self.step * self.batch_size)

    def _seed_of_step(self) -> int:
        parts = ["seed", self.seed, "epoch", self.epoch, "step", self.step]
        if self.ranks.world_size > 1:
            parts += ["rank", self.ranks.rank]  # so that dropout differs between ranks
        return seed_of(*parts)

    def check_loss(self) -> None:
        """Set `loss` to the mean training loss of the epoch so far, over the images of all ranks.

        The method waits for the device, and all ranks must call it together. Before the first step
        of an epoch the loss is 0.

        Raises:
            NonFiniteLoss: On all ranks, if the loss of any rank was infinite or NaN in a step of
                this epoch. The message tells the first such step and the value.
        """
        self.wait()
        found = self.ranks.all_gather(torch.cat((self.sums, self.first_bad)))
        bad = [(int(step), value) for step, value in found[:, -2:].tolist() if step >= 0]
        if bad:
            step, value = min(bad, key=lambda one: one[0])
            raise NonFiniteLoss(f"loss became {value} at epoch {self.epoch}, step {step}; {CURE}")
        self.loss = (found[:, 0].sum() / max(self.progress.seen, 1)).item()

    def end_epoch(self, val: dict[str, float], seconds: float) -> None:
        """End an epoch: record its metrics, write a checkpoint, and move on to the next epoch.

        If the epoch is the best one so far, the weights are also written to best.ckpt; an epoch of
        a first stage (before epoch 1) is never the best. After the last epoch of a first stage, the
        state of the optimizer (momentum) is cleared. The metrics are recorded last; the checkpoint
        holds a copy of them in case the process dies in between. All ranks must call this method
        together.

        Args:
            val: validation metrics by name, with "loss" and "top1" (percent), and with "mAP"
                (percent) if images have several labels.
            seconds: seconds since this process started or resumed the epoch.

        Raises:
            NonFiniteLoss: If the validation loss is infinite or NaN: the last steps of the epoch
                have made the weights unusable. Nothing is saved then.
            OSError: If a file cannot be written, for example because the disk is full.
        """
        if not math.isfinite(val["loss"]):
            raise NonFiniteLoss(
                f"val/loss became {val['loss']} at epoch {self.epoch}, step {self.step}; {CURE}"
            )
        progress = self.progress
        row = self._metrics(val, progress.spent + seconds)
        self.loss = row["train/loss"]
        self.val_top1 = val["top1"]
        progress.seconds += row["time/epoch_s"]
        progress.last_top1 = val["top1"]
        score, best = val["top1"], progress.best_top1
        if "mAP" in val:
            score, best = val["mAP"], progress.best_mAP
            progress.last_mAP = val["mAP"]
        # An epoch of a first stage does not count for the best weights.
        if progress.epoch > 0 and score > best:
            progress.best_top1 = val["top1"]
            progress.best_mAP = val.get("mAP", -1.0)
            progress.best_epoch = progress.epoch
            self._save_best()
        if progress.epoch == 0:
            self.optimisation.optimizer.state.clear()  # drops the first stage's momentum
        progress.epoch += 1
        progress.step = 0
        progress.seen = 0
        progress.spent = 0.0
        self.sums.zero_()
        self.save(row)
        self.record.append(row)

    def _metrics(self, val: dict[str, float], epoch_s: float) -> dict[str, Any]:
        """Return the metrics of the epoch that ends, which took `epoch_s` seconds in all.

        "train/top1" counts the images with a label; it is 0 if the epoch had none.
        """
        means = self.ranks.all_gather(self.sums).sum(0) / self.progress.seen
        *losses, right = means.tolist()
        values = dict(zip(self.objective.names, losses, strict=True))
        labelled = values.get("labelled", 1.0)
        top1 = 0.0
        if labelled:
            top1 = 100 * right / labelled
        return {
            "epoch": self.epoch,
            "time": time.time(),
            **{f"train/{name}": value for name, value in values.items()},
            "train/top1": top1,
            **{f"val/{name}": value for name, value in val.items()},
            "lr": self.optimisation.optimizer.param_groups[0]["lr"],
            "time/epoch_s": epoch_s,
            "time/images_per_s": self.progress.seen / epoch_s,
        }

    def _save_best(self) -> None:
        if self.ranks.is_rank_zero:
            best = {
                "model": self.model.state_dict(),
                "epoch": self.progress.best_epoch,
                "top1": self.progress.best_top1,
            }
            checkpoint.write(self.record.folder / "best.ckpt", best)

    def save(self, row: dict[str, Any] | None = None, seconds: float = 0.0) -> None:
        """Write a checkpoint with everything that resuming requires.

        All ranks must call this method together; only rank 0 writes.

        Args:
            row: metrics of the epoch that just ended; None inside an epoch. If the process dies
                before the metrics are in the record, resuming takes them from the checkpoint.
            seconds: seconds that this process has spent on the current epoch; 0 between epochs.

        Raises:
            OSError: If the checkpoint cannot be written; the old checkpoints stay as they were.
        """
        self.wait()
        sums_RS = self.ranks.all_gather(self.sums) if self.step else self.sums[None]
        if not self.ranks.is_rank_zero:
            return
        state = {
            "progress": asdict(replace(self.progress, spent=self.progress.spent + seconds)),
            "model": self.model.state_dict(),
            "methods": self.objective.modules.state_dict(),
            "optimizer": self.optimisation.optimizer.state_dict(),
            "scaler": self.optimisation.scaler.state_dict(),
            "sums": sums_RS.squeeze(0),
            "row": row,
        }
        checkpoint.write_latest(self.record.folder, state)

    def _resume(self) -> None:
        newest = checkpoint.read_latest(self.record.folder) if self.ranks.is_rank_zero else None
        state = self.ranks.broadcast_tensors(newest)
        if state is None:
            return
        self.progress = Progress.saved_in(state)
        self.model.load_state_dict(state["model"])
        # Older checkpoints have no methods.
        self.objective.modules.load_state_dict(state.get("methods", {}))
        self.optimisation.optimizer.load_state_dict(state["optimizer"])
        self.optimisation.scaler.load_state_dict(state["scaler"])
        sums_RS = state["sums"].view(-1, len(self.sums))
        if len(sums_RS) == self.ranks.world_size:
            self.sums.copy_(sums_RS[self.ranks.rank])
        elif self.ranks.is_rank_zero:
            # Another number of ranks wrote the checkpoint: rank 0 takes over the sums of all ranks.
            self.sums.copy_(sums_RS.sum(0))
        if self.progress.last_top1 >= 0:  # an epoch has ended
            self.val_top1 = self.progress.last_top1
        if state["row"] is not None:
            self.record.append(state["row"])
        self.record.log.info(
            "%s: continuing at epoch %d, step %d", self.label, self.epoch, self.step
        )

    def report(self, status: str, reason: str = "", *, told: bool = False) -> dict[str, Any]:
        """Set the status of the run, write it with the scores to result.json, and log it.

        Args:
            status: RUNNING at the start; FINISHED, FAILED, KILLED or PRUNED at the end.
            reason: why the run ended, in one line; "" if there is nothing to explain.
            told: whether the user learns the reason from an error that ends all runs. Then only
                train.log gets the line, and not the terminal.

        Returns:
            The content of result.json; {} on ranks other than 0, which write nothing.

        Raises:
            OSError: If result.json cannot be written. For FAILED the error is only logged.
            Damaged: If requeues.json in the run directory is damaged. The error is a ValueError.
        """
        self.state = status
        if not self.alive and self.captured is not None:
            self.captured.release()
        progress = self.progress
        has_scores = progress.best_epoch > 0
        said = f": {reason}" if reason else ""
        if status == RUNNING:
            said = f" ({self.record.folder.name})"  # the name by which its files are found
        elif status == FINISHED and has_scores:
            said = f", top-1 {progress.best_top1:.2f} at best, {progress.last_top1:.2f} at the end"
        log = self.record.log.error if status == FAILED else self.record.log.info
        log("%s: %s%s", self.label, status.lower(), said, extra=ONLY_IN_FILE if told else None)
        info = dict(self.info)
        if self.captured is not None and self.captured.replays:
            info["environment"] = f"{info.get('environment', '')}, captured steps"
        several = {"best_mAP": progress.best_mAP, "last_mAP": progress.last_mAP}
        return self.record.result(
            status,
            reason,
            best_top1=progress.best_top1 if has_scores else None,
            best_epoch=progress.best_epoch if has_scores else None,
            last_top1=progress.last_top1 if has_scores else None,
            epochs=max(progress.epoch - 1, 0),
            seconds=round(progress.seconds, 3),
            **{name: value for name, value in several.items() if value >= 0},
            **info,
        )


def _are_right(class_B: Tensor, labels: Tensor) -> Tensor:
    """Return whether each class is the label (B,) of its image, or one of its labels (B, K)."""
    if labels.ndim == 1:
        return class_B == labels
    return labels.gather(1, class_B[:, None]) == 1
