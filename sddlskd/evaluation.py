"""How good a network is on labelled images.

Shapes: B batch, C channels, K classes, H W sides.
"""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from sddlskd.precision import autocast

__all__ = ["evaluate"]


@torch.inference_mode()
def evaluate(
    model: Callable[[Tensor], Tensor], batches: Iterable[tuple[Tensor, Tensor]], precision: str = "fp32"
) -> dict[str, float]:
    """top1 (%), top5 (%) and loss (mean cross-entropy) of a model: images_BCHW -> logit map B K H W."""
    parts, count = [], 0
    for images_BCHW, target_B in batches:
        with autocast(images_BCHW.device, precision):
            map_BKHW = model(images_BCHW)
        logits_BK = map_BKHW.float().mean((2, 3))
        ranked_B5 = logits_BK.topk(min(5, logits_BK.shape[1])).indices == target_B[:, None]
        loss = F.cross_entropy(logits_BK, target_B, reduction="sum")
        parts.append(torch.stack((ranked_B5[:, 0].sum(), ranked_B5.sum(), loss)))  # no wait here
        count += len(target_B)
    first, five, loss_sum = torch.stack(parts).double().sum(0).tolist()
    return {"top1": 100 * first / count, "top5": 100 * five / count, "loss": loss_sum / count}
