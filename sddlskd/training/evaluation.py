"""Metrics of a network on labelled images: accuracy, cross-entropy and calibration.

Shapes: B batch, N images, C channels, K classes, H W sides.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from sddlskd.data.streaming import Data
from sddlskd.terminal.meter import meter
from sddlskd.training.devices import autocast
from sddlskd.training.ranks import Ranks

__all__ = ["answers", "calibration_error", "evaluate", "metered_test_batches", "scores"]


@torch.inference_mode()
def evaluate(
    model: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    precision: str = "fp32",
    ranks: Ranks | None = None,
) -> dict[str, float]:
    """Return top-1, top-5 and mean cross-entropy of a model over all batches.

    The logits of an image are the spatial mean of its logit map. The model is not switched to eval
    mode here.

    Args:
        model: function from images_BCHW to a logit map (B, K, H, W).
        batches: (images_BCHW, target_B) of this rank, with targets as int64 class ids.
        precision: precision of the forward pass: "fp32", "bf16" or "fp16".
        ranks: the processes that evaluate together, each on its own batches or on none; all of them
            must call this function. None for this process alone.

    Returns:
        {"top1": percent, "top5": percent, "loss": mean cross-entropy per image}, over the images of
        all ranks and the same on every rank.

    Raises:
        ValueError: If no rank has any image.
    """
    parts, count = [torch.zeros(3, device=ranks.device if ranks else None)], 0
    for images_BCHW, target_B in batches:
        with autocast(images_BCHW.device, precision):
            map_BKHW = model(images_BCHW)
        # Keep the sums on the device: reading the values would wait for the device at every batch.
        parts.append(_sums(map_BKHW.float().mean((2, 3)), target_B))
        count += len(target_B)
    sums = torch.stack([part.to(parts[-1].device) for part in parts]).double().sum(0)
    sums = torch.cat((sums, sums.new_full((1,), count)))
    first, five, loss_sum, images = (
        sums if ranks is None else ranks.all_gather(sums).sum(0)
    ).tolist()
    if not images:
        raise ValueError("none of the images can be used: look at the log")
    return {"top1": 100 * first / images, "top5": 100 * five / images, "loss": loss_sum / images}


def _sums(logits_BK: Tensor, target_B: Tensor) -> Tensor:
    """Return the numbers of top-1 and top-5 hits and the summed cross-entropy, as a tensor (3,)."""
    ranked_B5 = logits_BK.topk(min(5, logits_BK.shape[1])).indices == target_B[:, None]
    loss = F.cross_entropy(logits_BK, target_B, reduction="sum")
    return torch.stack((ranked_B5[:, 0].sum(), ranked_B5.sum(), loss))


@torch.inference_mode()
def answers(
    model: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    precision: str = "fp32",
) -> tuple[Tensor, Tensor]:
    """Return the logits of a model for all images, and the targets of the images.

    The logits of an image are the spatial mean of its logit map. The model is not switched to eval
    mode here.

    Args:
        model: function from images_BCHW to a logit map (B, K, H, W).
        batches: (images_BCHW, target_B), with targets as int64 class ids.
        precision: precision of the forward pass: "fp32", "bf16" or "fp16".

    Returns:
        logits_NK, float32, and target_N for all N images, both on the CPU and in the order of the
        batches.

    Raises:
        ValueError, RuntimeError: If there is no batch; the type depends on the version of torch.
    """
    logits, targets = [], []
    for images_BCHW, target_B in batches:
        with autocast(images_BCHW.device, precision):
            map_BKHW = model(images_BCHW)
        logits.append(map_BKHW.float().mean((2, 3)).cpu())
        targets.append(target_B.cpu())
    return torch.cat(logits), torch.cat(targets)


def scores(logits_NK: Tensor, target_N: Tensor) -> dict[str, float]:
    """Return accuracy, cross-entropy and calibration of logits (N, K) for class ids (N,), int64.

    Both tensors must be on the CPU. The keys of the result are "top1" (%), "top5" (%), "loss" (mean
    cross-entropy) and "ece" (%, see `calibration_error`). All values are NaN for N = 0.
    """
    first, five, loss_sum = (_sums(logits_NK, target_N).double() / len(target_N)).tolist()
    return {
        "top1": 100 * first,
        "top5": 100 * five,
        "loss": loss_sum,
        "ece": calibration_error(logits_NK, target_N),
    }


def calibration_error(logits_NK: Tensor, target_N: Tensor, bins: int = 15) -> float:
    """Return the expected calibration error (ECE) in percent.

    The ECE is the mean of |accuracy - mean confidence| over the bins, weighted by the number of
    images in each bin. The confidence of an image is its largest softmax probability. Bin m,
    counted from 1, holds the images with a confidence in ((m - 1) / bins, m / bins].

    Source: Guo et al. 2017 (arXiv:1706.04599), section 2, ECE.

    Args:
        logits_NK: logits, (N, K), on the CPU.
        target_N: class ids, int64, (N,), on the CPU.
        bins: number of bins of equal width.

    Returns:
        A number from 0 (perfectly calibrated) to 100; NaN for N = 0.
    """
    confidence_N, class_N = logits_NK.double().softmax(1).max(1)
    bin_N = (confidence_N * bins).ceil().long().clamp(1, bins) - 1
    gap_N = (class_N == target_N).double() - confidence_N
    gaps = torch.zeros(bins, dtype=torch.float64).index_add(0, bin_N, gap_N)
    return 100 * (gaps.abs().sum() / len(target_N)).item()


def metered_test_batches(data: Data, title: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each test batch of a data set, and show in the terminal how many images are done.

    Args:
        data: data set whose test split is read.
        title: label in front of the progress bar, or of the log lines if there is no terminal.

    Yields:
        (images_BCHW, target_B) on the device of `data`: normalised float32 images, and class ids,
        int64.
    """
    done = 0
    with meter(title, data.test_size, "images") as show:
        for images_BCHW, target_B in data.test_batches():
            yield images_BCHW, target_B
            done += len(target_B)
            show(done)
