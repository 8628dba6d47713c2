"""The optimizer of a student with its learning rate, gradient clipping and loss scaling."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sddlskd.training.dot import DOT

__all__ = ["CAPTURED_OPTIMIZERS", "Optimisation"]

# Optimizers that can read the learning rate from a tensor without handing it to the host.
CAPTURED_OPTIMIZERS = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)


@dataclass
class Optimisation:
    """Optimizer of a student with its learning-rate schedule, gradient clipping and loss scaling.

    Attributes:
        optimizer: optimizer of the parameters of the student and of the modules of its loss.
        learning_rate: function from the number of epochs done, with fractions, to the learning
            rate.
        clip_norm: largest gradient norm; None for no clipping.
        scaler: scaler of the loss, which is enabled for fp16 alone.
        rate: the present learning rate as a scalar tensor on the device, which captured (recorded)
            steps read; None if steps are not captured.
    """

    optimizer: torch.optim.Optimizer
    learning_rate: Callable[[float], float]
    clip_norm: float | None
    scaler: torch.amp.GradScaler
    rate: Tensor | None = None

    @property
    def in_parts(self) -> bool:
        """Return whether the optimizer needs the distillation loss and the task loss separately.

        This is the case for DOT alone.
        """
        return isinstance(self.optimizer, DOT)

    def set_rate(self, epochs_done: float) -> None:
        """Set the learning rate of the next step.

        `epochs_done` is the number of epochs done so far, with fractions.
        """
        value = self.learning_rate(epochs_done)
        for group in self.optimizer.param_groups:
            group["lr"] = value
        if self.rate is not None:
            self.rate.fill_(value)

    def capture_on(self, device: torch.device) -> None:
        """Move the optimizer's step counters to `device`, and keep the learning rate there, too.

        Steps can then be captured, that is, recorded once and replayed: a captured step reads the
        learning rate from the tensor `rate`. Call this method after the optimizer has loaded its
        state.
        """
        # The CUDA kernels of the optimizers read float32. On the CPU, float64 is what Python has.
        dtype = torch.float64 if device.type == "cpu" else torch.float32
        self.rate = torch.zeros((), dtype=dtype, device=device)
        for state in self.optimizer.state.values():
            if "step" in state:  # Adam keeps it on the CPU, and so do checkpoints
                state["step"] = state["step"].to(device)

    @contextmanager
    def _reading_rate(self) -> Iterator[None]:
        """Let the optimizer read the learning rate from `rate`, if there is one, for the block.

        The settings of the optimizer, which checkpoints hold, are as before after the block.
        """
        if self.rate is None or self._lacks_some_momenta():
            yield
            return
        settings: dict[str, Any] = {"lr": self.rate}
        if self.rate.device.type == "cuda":
            # Only the fused kernels read the learning rate on the device. Every step uses them, so
            # that a captured step has the bits of any other.
            capturing = torch.cuda.is_current_stream_capturing()
            settings |= {"fused": True, "foreach": False, "capturable": capturing}
        groups = self.optimizer.param_groups
        before = [{key: group[key] for key in settings if key in group} for group in groups]
        for group, old in zip(groups, before, strict=True):
            group.update({key: settings[key] for key in old})
        try:
            yield
        finally:
            for group, old in zip(groups, before, strict=True):
                group.update(old)

    def _lacks_some_momenta(self) -> bool:
        """Return whether SGD has momenta of some gradients only, which its fused kernel refuses."""
        if not isinstance(self.optimizer, torch.optim.SGD):
            return False
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        states = [self.optimizer.state.get(p, {}) for p in parameters if p.grad is not None]
        present = [state.get("momentum_buffer") is not None for state in states]
        return any(present) and not all(present)

    def step(self, losses: Sequence[Tensor]) -> None:
        """Update the parameters by one step against the gradient of the losses.

        With an enabled scaler, a step whose gradients are not finite is skipped.

        Args:
            losses: scalars: [the loss], or [distillation loss, task loss] for the optimizer DOT
                (see `in_parts`).
        """
        self.optimizer.zero_grad(set_to_none=True)
        *distillation, loss = losses
        if isinstance(self.optimizer, DOT):
            for part in distillation:
                if part.requires_grad:  # not for a student alone
                    part.backward(retain_graph=True)  # type: ignore[no-untyped-call]
            self.optimizer.keep_distillation()
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        if self.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(parameters, self.clip_norm)
        with self._reading_rate():
            self.scaler.step(self.optimizer)
        self.scaler.update()
