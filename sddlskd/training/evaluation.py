"""Metrics of a network on labelled images: accuracy, cross-entropy and calibration.

Shapes: B batch, N images, C channels, K classes, H W sides.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sddlskd.data.streaming import Data
from sddlskd.terminal.meter import meter
from sddlskd.training.devices import autocast
from sddlskd.training.ranks import Ranks

__all__ = [
    "answers",
    "binary_cross_entropy",
    "calibration_error",
    "class_scores",
    "evaluate",
    "mean_average_precision",
    "metered_test_batches",
    "scores",
]


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
        batches: (images_BCHW, target_B) of this rank, with targets as int64 class ids, or (B, K)
            for images with several labels.
        precision: precision of the forward pass: "fp32", "bf16" or "fp16".
        ranks: the processes that evaluate together, each on its own batches or on none; all of them
            must call this function. None for this process alone.

    Returns:
        {"top1": percent, "top5": percent, "loss": mean cross-entropy per image}, over the images of
        all ranks and the same on every rank. For images with several labels, the values are those
        of `scores`.

    Raises:
        ValueError: If no rank has any image, or if several ranks hold images with several labels.
    """
    batches = iter(batches)
    first_batch = next(batches, None)
    if first_batch is not None:
        batches = chain([first_batch], batches)
        if first_batch[1].ndim > 1:
            if ranks is not None and ranks.world_size > 1:
                raise ValueError("mAP ranks all images: evaluate them in one process")
            return scores(*answers(model, batches, precision))
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
    """Return the numbers of top-1 and top-5 hits and the summed cross-entropy, as a tensor (3,).

    An image with several labels is a top-1 hit if the class with the largest logit is one of them,
    and a top-5 hit if one of the five largest is. Its cross-entropy is the binary one.
    """
    best_B5 = logits_BK.topk(min(5, logits_BK.shape[1])).indices
    if target_B.ndim == 1:
        ranked_B5 = best_B5 == target_B[:, None]
        loss = F.cross_entropy(logits_BK, target_B, reduction="sum")
    else:
        ranked_B5 = target_B.gather(1, best_B5) == 1
        loss = binary_cross_entropy(logits_BK, target_B) * len(target_B)
    return torch.stack((ranked_B5[:, 0].sum(), ranked_B5.any(1).sum(), loss))


def binary_cross_entropy(logits_BK: Tensor, labels_BK: Tensor) -> Tensor:
    """Return the binary cross-entropy of B images with several labels, a scalar tensor.

    The cross-entropy is summed over the K classes and averaged over the images. `logits_BK` are the
    logits, (B, K). `labels_BK`, (B, K), is 1 for the classes of an image, and 0 for the others.
    """
    loss_BK = F.binary_cross_entropy_with_logits(
        logits_BK, labels_BK.to(logits_BK.dtype), reduction="none"
    )
    return loss_BK.sum(1).mean()


def mean_average_precision(logits_NK: Tensor, labels_NK: Tensor) -> float:
    """Return the mean average precision (mAP) over the classes, in percent.

    The average precision of a class is the mean precision over the images that have the class. The
    precision at such an image is a fraction of the images whose logit of the class is at least as
    large as its own: the fraction that has the class. The mean over the classes does not count
    classes that no image has; the result is 0 if no image has any class.

    Args:
        logits_NK: logits, (N, K).
        labels_NK: 1 for the classes of an image and 0 for the others, (N, K).
    """
    precisions = []
    for logits_N, labels_N in zip(logits_NK.T.contiguous(), labels_NK.T.bool(), strict=True):
        if not labels_N.any():
            continue
        own_P = logits_N[labels_N].contiguous()
        # How many logits, of the images with the class and of all, are at least as large.
        counts = [
            len(found) - torch.searchsorted(found.sort().values, own_P)
            for found in (own_P, logits_N)
        ]
        precisions.append((counts[0].double() / counts[1]).mean())
    return 100 * float(sum(precisions)) / max(len(precisions), 1)


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
        batches: (images_BCHW, target_B), with targets as int64 class ids, or (B, K) for images
            with several labels.
        precision: precision of the forward pass: "fp32", "bf16" or "fp16".

    Returns:
        logits_NK, float32, and the targets of all N images, (N,) or (N, K). Both are on the CPU and
        in the order of the batches.

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

    For images with several labels, `target_N` holds zeros and ones, (N, K). The result then has
    "mAP" (%, see `mean_average_precision`) instead of "ece". "top1" is the percentage of images
    that have the class with the largest logit, and "top5" the percentage that have one of the five
    classes with the largest logits. "loss" is the mean of `binary_cross_entropy`.
    """
    first, five, loss_sum = (_sums(logits_NK, target_N).double() / len(target_N)).tolist()
    found = {"top1": 100 * first, "top5": 100 * five, "loss": loss_sum}
    if target_N.ndim > 1:
        return {**found, "mAP": mean_average_precision(logits_NK, target_N)}
    return {**found, "ece": calibration_error(logits_NK, target_N)}


def class_scores(logits_NK: Tensor, target_N: Tensor) -> list[dict[str, Any]]:
    """Return the accuracy and the most frequent mistake of each class with images, worst first.

    Args:
        logits_NK: logits, (N, K), on the CPU.
        target_N: class ids, int64, (N,), on the CPU.

    Returns:
        For each class a dict with "class" (id), "images" (number), "top1" (%), "mistaken_for" (the
        class that is predicted most often for images that are not recognised; None if all are) and
        "mistakes" (how often that is). Classes of equal accuracy are in the order of their ids.
    """
    predicted_N = logits_NK.argmax(1)
    found = []
    for k in torch.unique(target_N).tolist():
        own_n = predicted_N[target_N == k]
        others, counts = torch.unique(own_n[own_n != k], return_counts=True)
        mistaken_for, mistakes = None, 0
        if len(others):
            mistaken_for, mistakes = int(others[counts.argmax()]), int(counts.max())
        top1 = 100 * (own_n == k).double().mean().item()
        found.append(
            {
                "class": k,
                "images": len(own_n),
                "top1": top1,
                "mistaken_for": mistaken_for,
                "mistakes": mistakes,
            }
        )
    return sorted(found, key=lambda row: row["top1"])


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
        int64, (B,), or zeros and ones (B, K) for images with several labels.
    """
    done = 0
    with meter(title, data.test_size, "images") as show:
        for images_BCHW, target_B in data.test_batches():
            yield images_BCHW, target_B
            done += len(target_B)
            show(done)
