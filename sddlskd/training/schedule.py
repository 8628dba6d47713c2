"""Learning-rate schedules as a stateless function of progress.

Because the schedule has no state, checkpoints need not store anything for it.
"""

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
    """Return the learning rate after `progress` epochs.

    The schedules are:

    - step: peak * decay^(number of milestones reached).
    - cosine: half a cosine from `peak` to 0 over the epochs after the warm-up.
    - constant: `peak`.

    During the warm-up, the schedule's value is multiplied by a factor that rises linearly from
    almost 0 to 1. For negative `progress` the result is `peak`.

    Args:
        progress: epochs done so far: 0 at the start, fractional inside an epoch; negative in a
            first stage of training, which some methods have before epoch 1.
        peak: highest learning rate of the schedule.
        epochs: length of the training in epochs.
        schedule: "step", "cosine" or "constant".
        milestones: fractions of `epochs` at which the step schedule decays, rounded to whole epochs
            (0.625 of 240 means after 150 epochs).
        decay: factor applied at each milestone, at most 1.
        warmup_epochs: length of the warm-up in epochs; 0 for none.

    Returns:
        A number from 0 to `peak`.

    Raises:
        ValueError: If `schedule` is none of the three names and `progress` is not negative.
    """
    if progress < 0:
        return peak
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
