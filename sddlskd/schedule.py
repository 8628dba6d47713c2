"""The learning rate as a function of progress: no state, so nothing of it needs saving to resume."""

import math
from collections.abc import Sequence

__all__ = ["learning_rate"]


def learning_rate(
    progress: float,
    *,
    peak: float,
    epochs: int,
    schedule: str,
    milestones: Sequence[float],
    decay: float,
    warmup_epochs: float,
) -> float:
    """The learning rate after `progress` epochs (0 at the start, fractions inside an epoch).

    step: peak * decay^(milestones passed), milestones being parts of `epochs` (0.625 of 240 is epoch 150).
    cosine: half a cosine from peak to 0 over the epochs after the warm-up. constant: peak.
    During the first `warmup_epochs` it rises linearly, reaching the schedule's value at their end.
    """
    if schedule == "step":
        value = peak * decay ** sum(progress >= round(part * epochs) for part in milestones)
    elif schedule == "cosine":
        part = max(progress - warmup_epochs, 0.0) / max(epochs - warmup_epochs, 1e-9)
        value = peak * 0.5 * (1 + math.cos(math.pi * min(part, 1.0)))
    elif schedule == "constant":
        value = peak
    else:
        raise ValueError(f"schedule={schedule!r} is not one of step, cosine, constant")
    return value * min((progress + 1e-3) / warmup_epochs, 1.0) if warmup_epochs > 0 else value
