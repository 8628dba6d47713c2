"""Training of one student: the training step, the state and the record of a run.

Shapes: B batch, C channels, H W sides, K classes.
"""

import math
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sddlskd.distill import ScaleDecoupled
from sddlskd.files import checkpoint
from sddlskd.record import FAILED, FINISHED, KILLED, RUNNING, Onlooker, Record
from sddlskd.training.devices import autocast
from sddlskd.training.ranks import Ranks

__all__ = ["NonFiniteLoss", "Run"]


CURE = "lower optimizer.lr or set optimizer.clip_norm"


class NonFiniteLoss(ArithmeticError):
    """The error for a loss that became infinite or NaN."""


class Run:
    """The complete training state of one student.

    The position of a run is (epoch, step): `epoch` counts from 1, and `step` is the number of
    batches of that epoch that are done. If the run directory holds a checkpoint, the run resumes
    from the checkpoint.

    Every rank has the same weights and position. The sums of the metrics cover the rank's own
    images only, and only rank 0 writes files.

    Args:
        record: the run directory, opened for writing on rank 0 and for reading on other ranks.
        label: name of the run in logs.
        model: the student.
        optimizer: optimizer of the student's parameters.
        distill: the composed distillation loss; None for a student without a teacher.
        ce_weight: weight of the cross-entropy.
        kd_weight: weight of the distillation loss.
        warmup_epochs: epochs over which the weight of the distillation loss rises linearly.
        learning_rate: function from progress in epochs to the learning rate.
        clip_norm: largest gradient norm; None for no clipping.
        device: device of this rank.
        precision: precision of the forward pass: "fp32", "bf16" or "fp16".
        compile: whether to apply torch.compile to the student.
        seed: seed of random layers such as dropout, which depend on (seed, epoch, step) alone, and
            on the rank if several ranks share a batch.
        steps: batches per epoch.
        ranks: the ranks that share each batch.
        images: images per epoch, over all ranks.
        batch_size: images per batch, over all ranks.
    """

    def __init__(
        self,
        record: Record | Onlooker,
        label: str,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        distill: ScaleDecoupled | None,
        ce_weight: float,
        kd_weight: float,
        warmup_epochs: int,
        learning_rate: Callable[[float], float],
        clip_norm: float | None,
        device: torch.device,
        precision: str,
        compile: bool,
        seed: int,
        steps: int,
        ranks: Ranks,
        images: int,
        batch_size: int,
    ) -> None:
        self.record, self.label, self.model, self.optimizer = record, label, model, optimizer
        self.distill, self.ce_weight, self.kd_weight, self.warmup_epochs = (
            distill,
            ce_weight,
            kd_weight,
            warmup_epochs,
        )
        self.learning_rate, self.clip_norm, self.precision, self.seed, self.steps = (
            learning_rate,
            clip_norm,
            precision,
            seed,
            steps,
        )
        self.device = device
        self.ranks, self.images, self.batch_size = ranks, images, batch_size
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.epoch, self.step, self.seen = 1, 0, 0
        # Sums over this epoch's images on this rank: loss, cross-entropy, KD loss, correct answers.
        self.sums = torch.zeros(4, device=device)
        # Step and value of the first non-finite loss; the step is -1 if there is none.
        self.bad = torch.full((2,), -1.0, device=device)
        self.best_top1, self.best_epoch, self.last_top1, self.seconds = -1.0, 0, -1.0, 0.0
        self.spent = 0.0  # seconds that earlier processes spent on this epoch
        self.info: dict[str, Any] = {}  # facts for result.json: teacher, group, environment
        self.crowded = False  # whether other runs share the device
        self.state, self.reason = RUNNING, ""
        self.loss, self.val_top1 = float("nan"), float("nan")
        self._resume()
        shared = ranks.wrap(model)
        self.forward = torch.compile(shared) if compile else shared

    def train_step(
        self, images_BCHW: Tensor, target_B: Tensor, teacher_map_BKHW: Tensor | None
    ) -> None:
        """Train the student for one step on one batch.

        The method does not read any value back to the host, so it does not wait for the device.
        `check_loss` reads the loss from time to time.

        Args:
            images_BCHW: this rank's images, float32.
            target_B: class ids of the images, int64.
            teacher_map_BKHW: logit map of the teacher; None for a student without a teacher.
        """
        # Include the rank, so that dropout differs between ranks.
        own = (self.ranks.rank,) if self.ranks.world_size > 1 else ()
        # Seed each step, so that a run draws the same numbers alone, in a group and after a resume.
        torch.manual_seed(hash((self.seed, self.epoch, self.step, *own)) % 2**63)
        progress = self.epoch - 1 + self.step / self.steps
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(progress)

        whole = len(target_B)
        if self.ranks.world_size > 1:
            whole = min(self.batch_size, self.images - self.step * self.batch_size)
        count = self.ranks.images_of_step(len(target_B), whole)
        with autocast(self.device, self.precision):
            student_map_BKHW = self.forward(images_BCHW)
        logits_BK = student_map_BKHW.float().mean((2, 3))
        loss_ce = F.cross_entropy(logits_BK, target_B)
        loss, loss_kd = self.ce_weight * loss_ce, torch.zeros_like(loss_ce)
        if self.distill is not None and teacher_map_BKHW is not None:
            loss_kd = self.distill(student_map_BKHW, teacher_map_BKHW, target_B)
            loss = loss + self.kd_weight * min(self.epoch / self.warmup_epochs, 1.0) * loss_kd

        self.optimizer.zero_grad(set_to_none=True)
        # The gradients are averaged over the ranks. Weighting each rank's loss by its share of the
        # images makes that average the gradient of the whole batch.
        self.scaler.scale(loss * (count * self.ranks.world_size / whole)).backward()  # type: ignore[no-untyped-call]
        if self.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()

        with torch.no_grad():
            right = (logits_BK.argmax(1) == target_B).sum() * (count / len(target_B))
            self.sums += torch.stack(
                (loss * count, loss_ce * count, loss_kd * count, right.to(loss.dtype))
            )
            first_bad = ~torch.isfinite(loss) & (self.bad[0] < 0)
            self.bad = torch.where(
                first_bad, torch.stack((loss.new_full((), self.step + 1.0), loss)), self.bad
            )
        self.step, self.seen = self.step + 1, self.seen + whole

    def check_loss(self) -> None:
        """Update `loss` with the mean training loss of the epoch so far, over all ranks.

        Reading the loss waits for the device. Raise NonFiniteLoss on all ranks, with the step and
        the value, if the loss of any rank became non-finite.
        """
        found_R6 = self.ranks.all_gather(torch.cat((self.sums, self.bad)))
        bad = [(int(step), value) for step, value in found_R6[:, 4:].tolist() if step >= 0]
        if bad:
            step, value = min(bad, key=lambda found: found[0])
            raise NonFiniteLoss(f"loss became {value} at epoch {self.epoch}, step {step}; {CURE}")
        self.loss = (found_R6[:, 0].sum() / max(self.seen, 1)).item()

    def end_epoch(self, val: dict[str, float], seconds: float) -> None:
        """End an epoch: save the best weights and the checkpoint, then append the metrics.

        The metrics are appended to the record last; the checkpoint holds a copy of them in case the
        process dies in between.

        Args:
            val: validation metrics by name, with "loss" and "top1" (%).
            seconds: time since this process started or resumed the epoch.

        Raises:
            NonFiniteLoss: if the validation loss is not finite, which means that the last steps of
                the epoch made the weights unusable.
        """
        if not math.isfinite(val["loss"]):
            raise NonFiniteLoss(
                f"val/loss became {val['loss']} at epoch {self.epoch}, step {self.step}; {CURE}"
            )
        seconds, self.spent = self.spent + seconds, 0.0
        loss, loss_ce, loss_kd, right = (
            self.ranks.all_gather(self.sums).sum(0) / self.seen
        ).tolist()
        self.seconds += seconds
        self.loss, self.val_top1, self.last_top1 = loss, val["top1"], val["top1"]
        row = {
            "epoch": self.epoch,
            "time": time.time(),
            "train/loss": loss,
            "train/loss_ce": loss_ce,
            "train/loss_kd": loss_kd,
            "train/top1": 100 * right,
            **{f"val/{name}": value for name, value in val.items()},
            "lr": self.optimizer.param_groups[0]["lr"],
            "time/epoch_s": seconds,
            "time/images_per_s": self.seen / seconds,
        }
        if val["top1"] > self.best_top1:
            self.best_top1, self.best_epoch = val["top1"], self.epoch
            if self.ranks.is_rank_zero:
                best = {
                    "model": self.model.state_dict(),
                    "epoch": self.epoch,
                    "top1": self.best_top1,
                }
                checkpoint.write(self.record.folder / "best.ckpt", best)
        self.epoch, self.step, self.seen = self.epoch + 1, 0, 0
        self.sums.zero_()
        self.save(row)
        self.record.append(row)

    def save(self, row: dict[str, Any] | None = None, seconds: float = 0.0) -> None:
        """Write a checkpoint with everything that resuming requires; only rank 0 writes.

        Args:
            row: metrics of the epoch that just ended. If the process dies before the metrics are in
                the record, resuming recovers them from the checkpoint.
            seconds: time that this process spent on an epoch that has not ended.
        """
        sums_R4 = self.ranks.all_gather(self.sums) if self.step else self.sums[None]
        if not self.ranks.is_rank_zero:
            return
        state = {
            "position": [self.epoch, self.step, self.seen],
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "sums": sums_R4.squeeze(0),
            "scores": [self.best_top1, self.best_epoch, self.last_top1],
            "seconds": [self.seconds, self.spent + seconds],
            "row": row,
        }
        checkpoint.write_latest(self.record.folder, state)

    def _resume(self) -> None:
        state = self.ranks.broadcast_tensors(
            checkpoint.read_latest(self.record.folder) if self.ranks.is_rank_zero else None
        )
        if state is None:
            return
        self.epoch, self.step, self.seen = state["position"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        sums_R4 = state["sums"].view(-1, 4)
        # If another number of ranks wrote the checkpoint, rank 0 takes over the sums of all ranks.
        if len(sums_R4) != self.ranks.world_size:
            sums_R4 = torch.cat(
                (sums_R4.sum(0, keepdim=True), sums_R4.new_zeros(self.ranks.world_size - 1, 4))
            )
        self.sums.copy_(sums_R4[self.ranks.rank])
        self.best_top1, self.best_epoch, self.last_top1 = state["scores"]
        self.seconds, self.spent = state["seconds"]
        self.val_top1 = self.last_top1
        if state["row"] is not None:
            self.record.append(state["row"])
        self.record.log.info("continuing at epoch %d, step %d", self.epoch, self.step)

    def report(self, status: str, reason: str = "") -> dict[str, Any]:
        """Write result.json and return its content; return {} on ranks other than 0.

        `status` is RUNNING at the start, and FINISHED, FAILED or KILLED at the end.
        """
        self.state, self.reason = status, reason
        log = self.record.log.error if status == FAILED else self.record.log.info
        log("%s: %s%s", self.label, status.lower(), f": {reason}" if reason else "")
        return self.record.result(
            status,
            reason,
            best_top1=self.best_top1 if self.best_epoch else None,
            best_epoch=self.best_epoch or None,
            last_top1=self.last_top1 if self.best_epoch else None,
            epochs=self.epoch - 1,
            seconds=round(self.seconds, 3),
            **self.info,
        )

    @property
    def alive(self) -> bool:
        """Whether the run is still training: not finished, failed or killed."""
        return self.state not in (FINISHED, FAILED, KILLED)
