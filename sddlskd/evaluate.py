"""Evaluate a network on a test split: `python -m sddlskd.evaluate RUN_DIR | FILE [key=value ...]`.

RUN_DIR: evaluate the best epoch of a run, on the run's data set unless dataset=... gives another.
dataset.root=FOLDER evaluates it on another folder of the same classes, with the run's settings.
FILE: evaluate a .safetensors file written by sddlskd.export, or a weights file of this package,
RepDistiller or mdistiller; a weights file requires student=NAME dataset=NAME as well. The networks
of runs and of exported files keep the mean and std that they were trained with. The network is
compared with teacher=NAME; for a run the default is the run's own teacher. Several runs or files
give a table with a line each. --json prints plain numbers, without units.

The results are top-1 and top-5 (%), the mean cross-entropy (nats), the expected calibration error
(%, 15 bins, Guo et al. 2017), the parameters of the network and its operations for one image (a
multiplication and an addition are two), its throughput in images per second, and the milliseconds
for a single image; on a GPU also the memory in MiB that a batch takes. With a teacher, the results
also have the teacher's top-1 (%) and the percentage of images for which both networks predict the
same class (agreement).

With --probe dataset=NAME, the network itself stays as it is: a linear classifier (logistic
regression) is trained on the features of that data set's training images, and the result is its
top-1 (%) on the test images. --size 32 resizes the images to 32x32 pixels, as papers do for the
transfer from CIFAR-100 to STL-10 and Tiny ImageNet.
"""

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn

from sddlskd import config as cfg
from sddlskd.config import Config
from sddlskd.config.schema import FeatureConfig, MoreTeacherConfig, TeacherConfig
from sddlskd.data.streaming import Data, StreamedData
from sddlskd.datasets.fingerprint import difference, differing_classes
from sddlskd.export import TRUST, described, load_run
from sddlskd.files.checkpoint import load_weights
from sddlskd.models.base import LogitMapModel
from sddlskd.processes.exit_codes import ExitCode
from sddlskd.record import read_result
from sddlskd.terminal.arguments import other_form
from sddlskd.terminal.console import explain, log_to_terminal, refuse_another_checkout, write_line
from sddlskd.terminal.words import counted
from sddlskd.training.build import (
    build_data,
    build_network,
    load_splits,
    present_fingerprint,
    without_weights,
)
from sddlskd.training.checks import (
    check_maps,
    check_teacher,
    missing_teacher,
    teacher_path,
)
from sddlskd.training.devices import autocast, describe, number_formats, pick_device
from sddlskd.training.evaluation import answers, metered_test_batches, scores
from sddlskd.training.features import rebuild_student
from sddlskd.training.probe import features_of, linear_probe
from sddlskd.training.several import Teachers
from sddlskd.training.size import size_of
from sddlskd.training.teacher import Teacher

__all__ = ["main", "measure", "probe", "throughput"]

# A name that `log_to_terminal` knows; __name__ is "__main__" under `python -m`.
log = logging.getLogger("sddlskd.evaluate")

TIMED_S = 1.0  # seconds of timing, after the warm-up
WARM_UP = 2  # batches
# Errors that a user can fix.
ERRORS = (HydraException, OmegaConfBaseException, ValueError, OSError, RuntimeError)
# Config groups that are replaced as a whole if the command line chooses another option.
WHOLE = ("dataset", "teacher", "trainer")
LEAST_FOR_TOP5 = 6  # classes; with five or fewer, top-5 is always 100%
# Unit of a result in the printed text: the divisor of the number, and the unit. A result without a
# unit is printed as it is.
UNITS = {
    **dict.fromkeys(("top1", "top5", "mAP", "ece", "teacher_top1", "agreement"), (1, "%")),
    "probe_top1": (1, "%"),
    "loss": (1, "nats"),
    "parameters": (10**6, "M"),
    "flops": (10**6, "M"),
    "images_per_s": (1, "images/s"),
    "batch": (1, "images"),
    "ms_per_image": (1, "ms"),
    "memory_mib": (1, "MiB"),
}


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
        predict by the weighted mean of their logits. "parameters" or "flops" is missing if the
        number cannot be counted.

    Raises:
        FileNotFoundError: If the file of the student or of the teacher is missing.
        ValueError: If the student cannot be evaluated: a file does not hold weights of its network,
            the teacher's file differs from the sha256 that was noted when the file first came, the
            images do not fit a network, the device is not available, or any other setting is wrong.
        InstantiationException: If the code of a network or a data set raises an error.
    """
    job = replace(job, M=[1])  # fits logit maps of any size
    device = pick_device(job.trainer.device)
    network = rebuild_student(replace(trained or job, dataset=job.dataset), device)
    load_weights(network, weights, job.student.name)
    alone = cfg.each_teacher(job)
    check_teacher(job)
    keys = cfg.teacher_keys(job)
    teachers = [_build_teacher(one, key, device) for one, key in zip(alone, keys, strict=True)]
    data = build_data(job, device)
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


def _measure_on(
    data: Data, job: Config, network: nn.Module, teacher: Teacher | Teachers | None
) -> dict[str, Any]:
    precision = job.trainer.precision
    batches = metered_test_batches(data, f"{job.student.name} on {job.dataset.name}")
    logits_NK, target_N = answers(network, batches, precision)
    found: dict[str, Any] = {"images": len(target_N), **scores(logits_NK, target_N)}
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
    splits = load_splits(job)
    arrays: list[Tensor] = []
    # A test split is not augmented, so the training images take its place for their features.
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
    """Wait until a CUDA device has computed everything; return at once for any other device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _compose_job(overrides: Sequence[str]) -> Config:
    with hydra.initialize_config_dir(str(cfg.conf_folder()), version_base="1.3"):
        words = cfg.with_each_teacher(["tracking=none", *overrides])
        return cfg.resolve(hydra.compose("config", overrides=words))


def _job_and_weights(source: Path, overrides: Sequence[str]) -> tuple[Config, Path, Config]:
    """Return the arguments of `measure` for a run directory or a file.

    Args:
        source: run directory, .safetensors file or weights file.
        overrides: words of the command line of the form key=value.

    Returns:
        The job to evaluate, the file of the student's weights, and the job that trained the
        student.

    Raises:
        ValueError: If `source` is neither a run directory nor a file that can be evaluated, or if a
            file without metadata comes without student=NAME or dataset=NAME.
    """
    given = {word.lstrip("+~").partition("=")[0] for word in overrides}
    if source.is_dir():
        trained = load_run(source, TRUST in overrides)
        return _override(trained, overrides), source / "best.ckpt", trained
    if not source.is_file():
        raise ValueError(
            f"{source} is neither a run directory nor a file; runs are in <home>/runs/<dataset>/"
        )
    if source.suffix == ".onnx":
        raise ValueError(
            f"{source} is an ONNX model, which cannot be evaluated here; "
            "evaluate its run directory, or the file that --to safetensors exports"
        )
    facts = described(source)
    if facts is None:
        absent = [key for key in ("student", "dataset") if key not in given]
        if absent:
            words = " ".join(f"{key}=NAME" for key in absent)
            raise ValueError(f"{source} has no metadata that describes its network; add {words}")
        job = _compose_job(overrides)
    else:
        dataset = [] if "dataset" in given else [f"dataset={facts['dataset']}"]
        job = _compose_job([*dataset, *overrides])
        job.student = replace(job.student, name=facts["network"], model=facts["model"])
        for key in ("mean", "std"):
            if f"dataset.{key}" not in given:
                setattr(job.dataset, key, facts[key])
    trained = replace(job, features={})
    if facts:
        trained.dataset = replace(job.dataset, num_classes=facts["num_classes"])
    if facts and "methods" in facts:
        features = {name: FeatureConfig(method=method) for name, method in facts["methods"].items()}
        teacher = replace(job.teacher, model=facts["teacher"])
        trained = replace(trained, features=features, teacher=teacher)
    if not any(key.split(".")[0] in ("teacher", "pair") for key in given):
        job.distiller.loss, job.features = {}, {}  # no teacher to compare with
    return job, source, trained


def _override(job: Config, overrides: Sequence[str]) -> Config:
    """Return a run's frozen configuration, changed by the overrides of the command line.

    A group of `WHOLE` that an override chooses is replaced as a whole. A new data set keeps the
    mean and std of the run, and the run's teachers unless an override chooses others.

    Raise ValueError if dataset.root is given and the run's loader takes no folder.
    """
    words = [word.lstrip("+") for word in overrides]
    chosen = [word.partition("=")[0] for word in words]
    plain = OmegaConf.structured(job)
    if chosen:
        composed = _compose_job(overrides)
        for group in WHOLE:
            if group in chosen:
                plain[group] = OmegaConf.structured(getattr(composed, group))
        if "teacher" in chosen:
            plain.more_teachers = composed.more_teachers
        if "dataset" in chosen:
            plain.dataset.mean = job.dataset.mean
            plain.dataset.std = job.dataset.std
        if "teacher" in chosen and not job.has_teacher:
            plain.distiller.loss = {"_target_": "sddlskd.losses.kd"}
        single = [word for word, key in zip(words, chosen, strict=True) if key not in WHOLE]
        plain = OmegaConf.merge(plain, OmegaConf.from_dotlist(single))
        if "dataset.root" in chosen and "dataset" not in chosen:
            _move_data(plain, job)
    changed = cfg.resolve(plain)
    if "teacher" not in chosen and changed.dataset.name != job.dataset.name:
        _keep_teachers(changed, job)
    return changed


def _move_data(plain: Any, job: Config) -> None:
    """Let the loader in `plain`, a changed configuration of the run `job`, read `dataset.root`.

    A frozen configuration holds the folder twice: as `dataset.root`, and as an argument of the
    loader.
    """
    if "root" not in job.dataset.load:
        raise ValueError(
            f"dataset.root has no effect here, because dataset={job.dataset.name} reads no folder; "
            "to judge the run on another folder give dataset=image_folder dataset.root=FOLDER"
        )
    if plain.dataset.load.root == job.dataset.load["root"]:
        plain.dataset.load.root = plain.dataset.root


def _keep_teachers(changed: Config, job: Config) -> None:
    """Let `changed`, a run's configuration with another data set, name the teachers of the run.

    The place of a teacher without `checkpoint` follows from the name of the data set, so that the
    new name would stand for another file.
    """
    for key, one in zip(cfg.teacher_keys(job), cfg.each_teacher(job), strict=True):
        place = str(teacher_path(replace(one, home=changed.home)))
        teacher: TeacherConfig | MoreTeacherConfig = changed.teacher
        if key != "teacher":
            teacher = changed.more_teachers[key.partition(".")[2]]
        teacher.checkpoint = teacher.checkpoint or place


def main(arguments: Sequence[str] | None = None) -> None:
    """Evaluate the networks that the command line names, and print the results.

    The results are those of `measure` or, with --probe, of `probe`. `arguments` are the words of
    the command line; None stands for those of this process. A word is a run directory, a weights
    file, an override key=value or an option, such as --probe.

    Raises:
        SystemExit: With code 1 after printing an error that a user can fix, 2 if the arguments
            cannot be parsed, or 130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(
        prog="python -m sddlskd.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("words", nargs="+", metavar="RUN_DIR | FILE | key=value")
    parser.add_argument("--probe", action="store_true", help="train a linear classifier instead")
    parser.add_argument("--size", type=int, metavar="PIXELS", help="resize the images of --probe")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    given = sys.argv[1:] if arguments is None else arguments
    if wrong := other_form(parser, given):
        parser.error(wrong)
    chosen = parser.parse_intermixed_args(given)
    sources = [Path(word) for word in chosen.words if _is_source(word)]
    overrides = [word for word in chosen.words if not _is_source(word)]
    if not sources:
        parser.error("name a run directory or a weights file")
    refuse_another_checkout()
    cfg.frame()
    log_to_terminal()
    try:
        if chosen.size is not None and not chosen.probe:
            raise ValueError("--size resizes the images of --probe; add --probe")
        # All sources are read first, so that a wrong one costs no results.
        every = [_job_and_weights(source, overrides) for source in sources]
        rows = []
        for source, asked in zip(sources, every, strict=True):
            job, _, trained = asked
            log.info("evaluating %s on %s ...", source, job.dataset.name)
            if not chosen.probe:
                _check_classes(source, job, trained)
            found = probe(*asked, side=chosen.size) if chosen.probe else measure(*asked)
            if job.dataset.num_classes < LEAST_FOR_TOP5 and not chosen.json:
                found.pop("top5", None)
            rows.append((str(source), found))
    except KeyboardInterrupt:
        sys.exit(ExitCode.STOPPED)
    except ERRORS as error:
        sys.stderr.write(f"error: {explain(error)}\n")
        sys.exit(1)
    if chosen.json:
        results = [{"source": source, **found} for source, found in rows]
        write_line(json.dumps(results if len(rows) > 1 else rows[0][1]))
    elif len(rows) > 1:
        _print_table(rows)
    else:
        for name, value in rows[0][1].items():
            write_line(f"{name:>14}  {_shown(name, value)}")


def _check_classes(source: Path, job: Config, trained: Config) -> None:
    """Check that the data of `job` have the classes that the network in `source` was trained on.

    Log a warning if the names of the classes differ, or if a run is judged on its own data set and
    this has other images now.

    Args:
        source: run directory, .safetensors file or weights file.
        job: job to evaluate.
        trained: job that trained the network.

    Raises:
        ValueError: If the number of classes differs.
    """
    load = job.dataset.load
    classes = job.dataset.num_classes
    counts = "num_classes" in load and load.get("root") != trained.dataset.load.get("root")
    earlier: dict[str, Any] = {}
    if source.is_dir():
        earlier = read_result(source).get("data") or {}
    same_name = job.dataset.name == trained.dataset.name
    now = None
    if earlier and (same_name or earlier["class_names"]):
        asked = job
        if counts:  # another folder may have another number of classes, which is named below
            asked = replace(job, dataset=replace(job.dataset, load={**load, "num_classes": None}))
        now = present_fingerprint(asked)
    if now and counts:
        classes = now["classes"]
    if classes != trained.dataset.num_classes:
        place = f"dataset={job.dataset.name}"
        if "root" in load:
            place = f"dataset.root={job.dataset.root}"
        has = f"{place} has {counted(classes, 'class', 'classes')}"
        if now and (differs := differing_classes(earlier, now)):
            has = f"{has} ({differs})"
        raise ValueError(
            f"{source} tells {trained.dataset.num_classes} classes apart, but {has}; "
            "give data with the classes of the training"
        )
    if not now:
        return
    if differs := differing_classes(earlier, now):
        log.warning(
            "%s was trained on other classes than dataset=%s has now (%s); the n-th class now "
            "stands for the n-th one then",
            source, job.dataset.name, differs,
        )  # fmt: skip
    elif same_name and (differs := difference(earlier, now)):
        log.warning(
            "%s was trained on other data than dataset=%s has now (%s)",
            source, job.dataset.name, differs,
        )  # fmt: skip


def _is_source(word: str) -> bool:
    """Return whether a word of the command line names a run or a file, and not a setting."""
    return "=" not in word or Path(word).exists()


def _shown(name: str, value: Any) -> str:
    """Return the text of the result `name`, with its unit (see `UNITS`)."""
    if isinstance(value, str):
        return value
    divisor, unit = UNITS.get(name, (1, ""))
    number = value / divisor if divisor > 1 else value
    text = f"{number:.4g}" if isinstance(number, float) else str(number)
    return f"{text} {unit}".rstrip()


def _print_table(rows: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """Print the results of several students, a line each; `rows` holds (source, results).

    Lines are as long as they need to be. Results that all students have in common follow below.
    """
    names = list(dict.fromkeys(name for _, found in rows for name in found))
    alike = [name for name in names if len({str(found.get(name)) for _, found in rows}) == 1]
    columns = [name for name in names if name not in alike]
    lines = [[*columns, "student"]]
    for source, found in rows:
        lines.append([*(_shown(name, found.get(name, "-")) for name in columns), source])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for *numbers, source in lines:
        shown = [text.rjust(width) for text, width in zip(numbers, widths[:-1], strict=True)]
        write_line("  ".join([*shown, source]))
    for name in alike:
        write_line(f"{name}: {_shown(name, rows[0][1].get(name, '-'))}")


if __name__ == "__main__":
    main()
