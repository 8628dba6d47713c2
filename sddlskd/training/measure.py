"""Measure a trained student: test scores, size, throughput, and a linear probe of its features."""

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sddlskd import config as cfg
from sddlskd.config import Config
from sddlskd.data.streaming import Data, StreamedData
from sddlskd.files.checkpoint import load_weights
from sddlskd.models.base import LogitMapModel
from sddlskd.training.build import build_data, build_network, load_splits, without_weights
from sddlskd.training.checks import check_maps, check_teacher, missing_teacher, teacher_path
from sddlskd.training.devices import autocast, describe, number_formats, pick_device
from sddlskd.training.evaluation import answers, class_scores, metered_test_batches, scores
from sddlskd.training.features import rebuild_student
from sddlskd.training.probe import features_of, linear_probe
from sddlskd.training.several import Teachers
from sddlskd.training.size import size_of
from sddlskd.training.teacher import Teacher

__all__ = ["measure", "probe", "throughput"]

TIMED_S = 1.0  # seconds of timing, after the warm-up
WARM_UP = 2  # batches
LEAST_BATCH = 2  # images; the smallest valid trainer.batch_size

log = logging.getLogger(__name__)


def measure(job: Config, weights: Path, trained: Config | None = None) -> dict[str, Any]:
    """Return the test scores, the size and the throughput of a student with given weights.

    Args:
        job: configuration with the data set, the device, the precision and the teacher to compare
            with. If `job.has_teacher` is false, there is no comparison. `job.M` is ignored.
        weights: file of the student's weights: a .safetensors file, or a checkpoint of this
            package, RepDistiller or mdistiller (see `checkpoint.read_weights`).
        trained: configuration that the student was trained with, which describes its network; None
            if this is `job`.

    Returns:
        The results by name: "images" (number of test images), "top1" and "top5" (%), "ece"
        (expected calibration error, %) or "mAP" (%, for several labels per image), "loss" (mean
        cross-entropy), "parameters" (number), "flops" (operations for one image), "images_per_s"
        (throughput), "batch" (images per timed batch), "ms_per_image" (milliseconds for a batch of
        one image) and "environment" (name of the device). On a GPU also "memory_mib" (peak memory
        in MiB while a batch is computed). With a teacher also "teacher_top1" (%) and "agreement"
        (percentage of images for which both networks predict the same class); several teachers
        predict by the weighted mean of their logits. "classes" has the scores of each class
        (`class_scores`), unless images have several labels. "parameters" or "flops" is missing
        if the number cannot be counted.

    Raises:
        FileNotFoundError: If the file of the student or of the teacher is missing.
        ValueError: If the student cannot be evaluated: a file does not hold weights of its network,
            the teacher's file differs from the sha256 that was noted when the file first came, the
            images do not fit a network, the device is not available, or any other setting is wrong.
        InstantiationException: If the code of a network or a data set raises an error.
    """
    # Logit maps of any size suit M=[1]. The batch size of training does not matter here, but must
    # not exceed the number of training images.
    job = replace(job, M=[1], trainer=replace(job.trainer, batch_size=LEAST_BATCH))
    device = pick_device(job.trainer.device)
    network = rebuild_student(replace(trained or job, dataset=job.dataset), device)
    load_weights(network, weights, job.student.name)
    alone = cfg.each_teacher(job)
    check_teacher(job)
    keys = cfg.teacher_keys(job)
    teachers = [_build_teacher(one, key, device) for one, key in zip(alone, keys, strict=True)]
    data = build_data(job, device)
    _warn_of_size(job, trained or job, data)
    try:
        check_maps(job, network, None, data, device)
        for one, teacher in zip(alone, teachers, strict=True):
            check_maps(one, network, teacher.network, data, device)
        together: Teacher | Teachers | None = None
        if teachers:
            together = teachers[0]
        if len(teachers) > 1:
            together = Teachers(teachers, cfg.teacher_weights(job))
        with number_formats(job.trainer.tf32):
            found = _measure_on(data, job, network.eval(), together)
            found["environment"] = describe(device)
    finally:
        if isinstance(data, StreamedData):
            data.close()
    return found


def _warn_of_size(job: Config, trained: Config, data: Data) -> None:
    """Log a warning if a student that learnt from image files sees them at another size now."""
    # The same loader reads files here and there; other data sets ignore dataset.size.
    same_loader = job.dataset.load.get("_target_") == trained.dataset.load.get("_target_")
    if not isinstance(data, StreamedData) or not same_loader:
        return
    if job.dataset.size != trained.dataset.size:
        log.warning(
            "%s was trained with dataset.size=%d, and sees images of dataset.size=%d now",
            job.student.name, trained.dataset.size, job.dataset.size,
        )  # fmt: skip


def _measure_on(
    data: Data, job: Config, network: nn.Module, teacher: Teacher | Teachers | None
) -> dict[str, Any]:
    precision = job.trainer.precision
    batches = metered_test_batches(data, f"{job.student.name} on {job.dataset.name}")
    logits_NK, target_N = answers(network, batches, precision)
    found: dict[str, Any] = {"images": len(target_N), **scores(logits_NK, target_N)}
    if target_N.ndim == 1:
        found["classes"] = class_scores(logits_NK, target_N)
    if teacher:
        batches = metered_test_batches(data, f"teacher {cfg.teacher_name(job)}")
        teacher_NK, _ = answers(teacher, batches, precision)
        found["teacher_top1"] = scores(teacher_NK, target_N)["top1"]
        agree_N = logits_NK.argmax(1) == teacher_NK.argmax(1)
        found["agreement"] = 100 * agree_N.double().mean().item()
    images_BCHW, _ = next(data.test_batches())
    found |= size_of(network, tuple(images_BCHW.shape[1:]))
    found["images_per_s"] = throughput(network, images_BCHW, precision, TIMED_S)
    found["batch"] = len(images_BCHW)
    if images_BCHW.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(images_BCHW.device)
        throughput(network, images_BCHW, precision, seconds=0.0)
        found["memory_mib"] = torch.cuda.max_memory_allocated(images_BCHW.device) / 2**20
    found["ms_per_image"] = 1000 / throughput(network, images_BCHW[:1], precision, TIMED_S)
    return found


def probe(job: Config, weights: Path, trained: Config, side: int | None = None) -> dict[str, Any]:
    """Return the test accuracy of a linear classifier that is trained on a student's features.

    The classifier learns from all training images of `job.dataset`, without augmentation (see
    `linear_probe`). The student is not trained.

    Args:
        job: configuration with the data set, the device and the precision.
        weights: file of the student's weights, as in `measure`.
        trained: configuration that the student was trained with.
        side: height and width in pixels to which the images are resized; None to keep their size.

    Returns:
        The results by name: "probe_top1" (%), "train_images" and "images" (numbers of training and
        test images), "features" (length of an image's feature vector) and "environment" (name of
        the device).

    Raises:
        FileNotFoundError: If the file of the student is missing.
        ValueError: If the file does not hold weights of the student, if the network shows no
            features (is no `LogitMapModel`), if images of the data set have several labels, if the
            data set has a single class, if `side` is below 1, if a feature is not finite, or if any
            other setting is wrong.
        RuntimeError: If the student cannot take images of this size.
        InstantiationException: If the code of a network or a data set raises an error.
    """
    device, precision = pick_device(job.trainer.device), job.trainer.precision
    if job.dataset.multi_label:
        raise ValueError(
            f"--probe classifies into one class per image, but dataset={job.dataset.name} has "
            "several labels per image"
        )
    if side is not None and side < 1:
        raise ValueError(f"--size {side} must be at least 1")
    network = rebuild_student(trained, device)
    load_weights(network, weights, job.student.name)
    student = network.eval()
    if not isinstance(student, LogitMapModel):
        raise ValueError(f"{job.student.name} has no features to probe")
    job = replace(job, trainer=replace(job.trainer, batch_size=LEAST_BATCH))
    splits = load_splits(job)
    arrays: list[Tensor] = []
    # Test images are not augmented. To read the training images like that, too, they take the
    # place of the test split.
    for name, test in (("training", splits.train), ("test", splits.test)):
        data = build_data(job, device, splits=splits._replace(test=test))
        batches = metered_test_batches(data, f"{name} images of {job.dataset.name}")
        try:
            with number_formats(job.trainer.tf32):
                arrays += features_of(student, batches, precision, side)
        finally:
            if isinstance(data, StreamedData):
                data.close()
    train_NC, _, test_MC, _ = arrays
    return {
        "probe_top1": linear_probe(*arrays),
        "train_images": len(train_NC),
        "images": len(test_MC),
        "features": train_NC.shape[1],
        "environment": describe(device),
    }


def _build_teacher(job: Config, key: str, device: torch.device) -> Teacher:
    """Return the teacher of a job with a single teacher, whose configuration key is `key`."""
    path = teacher_path(job)
    if not path.exists():  # `check_teacher` passes if the job would train the teacher first
        raise missing_teacher(job, key)
    network = build_network(without_weights(job.teacher.model), job.dataset.num_classes, 0, device)
    return Teacher(
        network,
        path,
        name=job.teacher.name,
        device=device,
        precision=job.trainer.precision,
        compile=False,
        image_size=job.teacher.image_size,
    )


@torch.inference_mode()
def throughput(
    network: Callable[[Tensor], Tensor],
    images_BCHW: Tensor,
    precision: str,
    seconds: float = TIMED_S,
) -> float:
    """Return the throughput of a network's forward pass in images per second.

    Args:
        network: function from images (B, C, H, W) to any output, on the device of the images.
        images_BCHW: images (B, C, H, W); the same batch is passed again and again.
        precision: precision of the forward pass: "fp32", "bf16" or "fp16".
        seconds: time to measure.

    Returns:
        Images per second. The timing starts after two untimed batches (WARM_UP), and ends with the
        batch that completes `seconds`.
    """
    batches = -WARM_UP
    started = 0.0
    while True:
        if batches == 0:
            _wait_for(images_BCHW.device)
            started = time.monotonic()
        with autocast(images_BCHW.device, precision):
            network(images_BCHW)
        batches += 1
        if batches > 0:
            _wait_for(images_BCHW.device)
            passed = time.monotonic() - started
            if passed >= seconds:
                return batches * len(images_BCHW) / passed


def _wait_for(device: torch.device) -> None:
    """Wait until a GPU has computed everything; return at once for the CPU, which never lags."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
