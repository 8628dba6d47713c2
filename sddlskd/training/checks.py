"""Check that a job (one training run) fits its data, its networks, its teacher and this machine.

Each check raises an error of one line that names the setting and the cure. Training makes the
checks before its first step, and a sweep makes them before it starts any job.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sddlskd import config as cfg
from sddlskd.config import Config, TeacherView
from sddlskd.config.checks import TARGETS, check
from sddlskd.config.targets import check_code, instantiate
from sddlskd.data.device import share_of, steps_per_epoch
from sddlskd.data.streaming import Data
from sddlskd.datasets.fingerprint import difference, differing_classes
from sddlskd.distill import (
    compares_images,
    takes_label_sets,
)
from sddlskd.models import ForeignNetwork
from sddlskd.processes.cores import check_processes
from sddlskd.terminal.words import counted
from sddlskd.training import teacher_files
from sddlskd.training.devices import check_memory
from sddlskd.training.ranks import Ranks
from sddlskd.training.stand_ins import try_loss, try_optimizer
from sddlskd.training.teacher import image_of_teacher

__all__ = [
    "batch_size_cure",
    "check_batch_size",
    "check_batches",
    "check_cache",
    "check_images",
    "check_label_sets",
    "check_maps",
    "check_objective",
    "check_one_image",
    "check_one_process",
    "check_pins",
    "check_ranks",
    "check_scales",
    "check_targets",
    "check_teacher",
    "check_teacher_data",
    "check_workers",
    "leaves_one_image",
    "missing_teacher",
    "missing_teachers",
    "teacher_path",
    "trained_first",
    "wrong_images",
]

log = logging.getLogger(__name__)

WORKER_MB = 30  # memory of a process that decodes images, in megabytes


def check_teacher_data(job: Config, now: Mapping[str, Any]) -> str:
    """Return in words how a job's data differ from the data that the job's teacher was trained on.

    Args:
        job: configuration of the training run, with a single teacher (see `config.each_teacher`).
        now: fingerprint of the data that the job would use now (`present_fingerprint`).

    Returns:
        A text for messages. It is "" if the data are the same, if the job has no teacher, or if the
        teacher file is missing or does not tell its data.

    Raises:
        ValueError: If the teacher was trained on other classes than those in `now`.
    """
    path = teacher_path(job)
    if not job.has_teacher or not path.exists():
        return ""
    earlier = teacher_files.data_of(path)
    if not earlier:
        return ""
    if differs := differing_classes(earlier, now):
        raise ValueError(
            f"teacher={job.teacher.name} was trained on other classes than "
            f"dataset={job.dataset.name} has now ({differs}; file {path}); "
            "choose another dataset.name, or set teacher.checkpoint=FILE "
            "(more_teachers.NAME.checkpoint=FILE for a further teacher)"
        )
    return difference(earlier, now)


def check_label_sets(job: Config, labels_N: Tensor) -> None:
    """Raise ValueError if `dataset.multi_label` contradicts the labels of the training images.

    The setting must be true if `labels_N` holds several labels per image, as zeros and ones (N, K).
    It must be false if `labels_N` holds one class id per image, (N,).
    """
    several = labels_N.ndim > 1
    if several != job.dataset.multi_label:
        found = "several labels" if several else "one class"
        raise ValueError(
            f"dataset={job.dataset.name} has {found} per image; set "
            f"dataset.multi_label={str(several).lower()}"
        )


def check_images(
    job: Config, shape_NHWC: tuple[int, ...], device: torch.device, *, of_files: bool
) -> None:
    """Raise ValueError if the device has too little free memory for the images of a job.

    Args:
        job: configuration of the training run.
        shape_NHWC: (N, H, W, C) of the training split, as `shape_of` returns it.
        device: device of the images.
        of_files: whether the images are read from files, so that only one batch is in memory. If
            False, all N padded images are kept on the device.

    Raises:
        ValueError: If the images do not fit into the free memory: with `of_files` one batch of
            training or of evaluation, else the padded training split. If the free memory is
            unknown, the check passes (see `check_memory`).
    """
    N, H, W, C = shape_NHWC
    if of_files:
        batch = max(job.trainer.batch_size, job.trainer.eval_batch_size)
        # A value takes one byte as a decoded pixel, and four bytes as an input of the networks.
        check_memory(f"dataset.size={job.dataset.size}", 5 * batch * H * W * C, device)
    else:
        padding = job.dataset.padding
        padded = N * (H + 2 * padding) * (W + 2 * padding) * C
        check_memory(f"dataset.padding={padding}", padded, device)


def check_batch_size(job: Config, images: int, of_teacher: int | None = None) -> None:
    """Raise ValueError if a job has too few training images for its batch size.

    If the job first trains its missing teacher, the teacher's batch size is checked as well.

    Args:
        job: configuration of the training run.
        images: number of images that the student learns from.
        of_teacher: number of images that the teacher learns from; None for `images`.

    Raises:
        ValueError: If there are fewer than two images, or fewer images than the batch size, for the
            student or for a teacher that is trained first.
    """
    for teacher_job in trained_first(job):
        learnt = images if of_teacher is None else of_teacher
        of_data = teacher_job.trainer.batch_size
        # If trainer.batch_size equals it, the message below names both.
        if 2 <= learnt < of_data != job.trainer.batch_size:
            raise ValueError(
                f"teacher={teacher_job.student.name} is missing and trained first, with "
                f"dataset.batch_size={of_data}, whatever trainer.batch_size is; that is larger "
                f"than the {counted(learnt, 'image')} of dataset={job.dataset.name}; set "
                f"dataset.batch_size={learnt} or less"
            )
        check_batch_size(teacher_job, learnt)
    size = job.trainer.batch_size
    if images < 2:
        raise ValueError(
            f"dataset={job.dataset.name} has {counted(images, 'training image')}; "
            "BatchNorm needs at least 2"
        )
    if size > images:
        raise ValueError(
            f"trainer.batch_size={size} is larger than the {counted(images, 'image')} of "
            f"dataset={job.dataset.name}; {batch_size_cure(job, f'{images} or less')}"
        )


def batch_size_cure(job: Config, size: str) -> str:
    """Return the end of an error message, which says how to change a job's batch size to `size`.

    `size` is text, such as "64" or "100 or less". If trainer.batch_size equals dataset.batch_size,
    the advice is to set dataset.batch_size, because a missing teacher is trained with
    dataset.batch_size. Otherwise the advice is to set trainer.batch_size.
    """
    if job.trainer.batch_size == job.dataset.batch_size:
        return f"set dataset.batch_size={size}, which trainer.batch_size follows unless set"
    return f"set trainer.batch_size={size}"


def check_targets(job: Config) -> None:
    """Import the code that a job names by `_target_`; raise ValueError if that fails.

    The message begins with the key of the `_target_`.

    Raises:
        MissingCode: If the code cannot be found or imported. The error is a ValueError.
        ValueError: If a configuration must not name the code, or if the code cannot be called.
    """
    for group, name in TARGETS:
        check_code(getattr(getattr(job, group), name), f"{group}.{name}")
    for name, feature in job.features.items():
        check_code(feature.method, f"features.{name}.method")
    for name, teacher in job.more_teachers.items():
        check_code(teacher.model, f"more_teachers.{name}.model")


def check_objective(job: Config, device: torch.device) -> None:
    """Raise ValueError if the distillation loss or the optimizer of a job does not work.

    Both are tried on small tensors: the loss on the CPU (`try_loss`), the optimizer on `device`
    (`try_optimizer`). A job without a distillation loss of the logits has only its optimizer tried.
    Log a warning if `standardize` leaves the loss of two classes without a gradient, or if
    `teacher.view=plain` makes `M` compare regions that show different parts of an image.

    Raises:
        ValueError: If the loss, its learnt temperature or the optimizer cannot be found, is not
            allowed or does not work with its arguments; if the loss does not suit the labels (one
            or several per image); or if several processes are to train a job that needs a single
            one (`check_one_process`).
    """
    if job.distiller.loss:
        _check_kind_of_loss(job)
        try_loss(
            job.distiller.loss, job.dataset.num_classes, job.distiller.learned_temperature or None
        )
    try_optimizer(job.optimizer.algorithm, job.optimizer.lr, device)
    check_one_process(job)


def _check_kind_of_loss(job: Config) -> None:
    """Raise ValueError if the logit loss is not for the labels of the data set.

    Log a warning if the standardisation leaves a loss of two classes without a gradient, or if
    regions are compared that do not show the same part of an image.
    """
    try:
        several = takes_label_sets(instantiate(job.distiller.loss, _partial_=True))
    except Exception:  # `try_loss` says what is wrong with the loss
        return
    if several != job.dataset.multi_label:
        needs, other = "one class per image", "recipe=mld or recipe=vanilla"
        if several:
            needs, other = "several labels per image", "another distiller, such as distiller=kd"
        raise ValueError(
            f"distiller={job.distiller.name} needs {needs}, which dataset={job.dataset.name} does "
            f"not have; choose {other}"
        )
    if job.dataset.num_classes == 2 and job.standardize in (True, "class_scaled"):
        log.warning(
            "standardize=%s leaves only the sign of the logits of two classes (the logits become "
            "+-0.707), so distiller=%s has no gradient: set standardize=none or standardize=batch",
            str(job.standardize).lower(),
            job.distiller.name,
        )
    if job.teacher.view == TeacherView.plain and job.M != [1]:
        log.warning(
            "teacher.view=plain with M=%s compares a region of the augmented image with the region "
            "at the same place of the plain one, which shows something else after a crop or a "
            "mirroring: M=[1] compares whole images",
            job.M,
        )


def check_one_process(job: Config) -> None:
    """Raise ValueError if several processes share a batch of which a loss must see all images.

    The number of processes is `trainer.devices`. Such losses are those of the feature and relation
    methods, and losses on the logits that compare images (see `compares_images`).
    """
    if job.trainer.devices == 1:
        return
    whole = ""
    if job.features:
        whole = f"features=[{','.join(job.features)}]: these losses compare"
    elif job.distiller.loss and compares_images(instantiate(job.distiller.loss, _partial_=True)):
        whole = f"distiller={job.distiller.name}: this loss compares"
    if whole:
        raise ValueError(
            f"trainer.devices={job.trainer.devices} cannot train {whole} all images of a batch; "
            "set trainer.devices=1"
        )


def check_ranks(job: Config, ranks: int) -> None:
    """Raise ValueError if several ranks are to train a job that needs a single process.

    The ranks are the processes that share each batch. Their number is the variable WORLD_SIZE of
    the environment if torchrun or a scheduler has started them, whatever `trainer.devices` says.
    The checks are those of a job whose `trainer.devices` is this number.
    """
    if ranks == 1:
        return
    shared = replace(job, trainer=replace(job.trainer, devices=ranks))
    try:
        check(shared, frozen=True)
        check_one_process(shared)
    except ValueError as error:
        raise ValueError(f"{error}, and start one process (WORLD_SIZE={ranks} here)") from None


def check_workers(job: Config) -> None:
    """Raise ValueError if `dataset.workers` exceeds the number of CPU cores of this process.

    `dataset.workers` is the number of processes that decode images. None, which stands for a number
    that suits the cores, passes. The environment variable SDDLSKD_MOST_PROCESSES replaces the
    number of cores; if it is not a positive integer, ValueError is raised, too.
    """
    check_processes("dataset.workers", job.dataset.workers or 0, WORKER_MB)


def check_cache(job: Config) -> None:
    """Raise ValueError if `teacher.cache` would keep logit maps of random crops.

    Call this function only for a data set of image files. Their random crops never repeat, so the
    cache would be of no use, unless the teacher sees the images without augmentation.
    """
    if job.teacher.cache and job.teacher.view == TeacherView.augmented:
        raise ValueError(
            f"teacher.cache={job.teacher.cache} cannot hold the crops of "
            f"dataset={job.dataset.name}: its random crops never repeat, so the cache would never "
            "hit; set teacher.cache=null, or teacher.view=plain"
        )


def teacher_path(job: Config) -> Path:
    """Return the path of the weight file of a job's teacher, which need not exist.

    The path is `teacher.checkpoint` if set, else <home>/teachers/<data set>/<teacher>.pt. If the
    job has several teachers, the path is that of the first one.
    """
    return Path(
        job.teacher.checkpoint
        or teacher_files.path_of(job.home, job.dataset.name, job.teacher.name)
    )


def trained_first(job: Config) -> list[Config]:
    """Return the jobs that must train missing teachers before `job` can run; [] if there are none.

    The list has a job for each teacher of `job` whose weight file (`teacher_path`) is missing, if
    `teacher.train_if_missing` is set and `teacher.checkpoint` is not.
    """
    return [
        cfg.teacher_job(one)
        for one in cfg.each_teacher(job)
        if one.teacher.train_if_missing
        and not one.teacher.checkpoint
        and not teacher_path(one).exists()
    ]


def check_teacher(job: Config) -> None:
    """Raise an error if teacher files of a job are missing, or if one was replaced.

    Do nothing for a job without a teacher. For a file named by `teacher.checkpoint`, check only
    that it exists. The default file, <home>/teachers/<data set>/<teacher>.pt, may be missing if
    `teacher.train_if_missing` is set. If it exists and <home>/teachers/lock.json records a sha256
    for this teacher, the file must have this sha256.

    Raises:
        FileNotFoundError: If a file is missing, and is not the default file of a job with
            `teacher.train_if_missing`; the message names all such files.
        ValueError: If the default file has another sha256 than the recorded one, or if lock.json is
            damaged.
    """
    check_pins(job)
    if missing := missing_teachers(job):
        raise FileNotFoundError("; ".join(map(str, missing.values())))


def check_pins(job: Config) -> None:
    """Raise ValueError if a default teacher file of a job was replaced, or lock.json is damaged.

    A missing file is no error here. See `check_teacher`.
    """
    for one in cfg.each_teacher(job):
        path = teacher_path(one)
        if path.exists() and not one.teacher.checkpoint:
            name = teacher_files.pin_key(one.dataset.name, one.teacher.name)
            teacher_files.check_pin(one.home, name, teacher_files.file_hash(path))


def missing_teachers(job: Config) -> dict[Path, FileNotFoundError]:
    """Return the error for each teacher file that a job lacks and does not train: {path: error}."""
    return {
        teacher_path(one): missing_teacher(one, key)
        for key, one in zip(cfg.teacher_keys(job), cfg.each_teacher(job), strict=True)
        if not teacher_path(one).exists()
        and (one.teacher.checkpoint or not one.teacher.train_if_missing)
    }


def missing_teacher(job: Config, key: str = "teacher") -> FileNotFoundError:
    """Return the error for the missing teacher file of a job, whose message says how to get it.

    Args:
        job: configuration of the training run, with a single teacher (see `config.each_teacher`).
        key: configuration key of the teacher: "teacher", or "more_teachers.NAME" for a further one.
    """
    return teacher_files.missing(
        teacher_path(job),
        job.teacher.name,
        job.dataset.name,
        home=job.home,
        key=key,
        named=bool(job.teacher.checkpoint),
    )


@torch.inference_mode()
def check_maps(
    job: Config, student: nn.Module, teacher: nn.Module | None, data: Data, device: torch.device
) -> None:
    """Check that student and teacher accept the images and return suitable logit maps.

    A logit map (B, K, H, W) holds the logits of K classes for each place of a grid. One image of
    zeros, with the size that the network is to see, is passed through each network in eval mode.
    Afterwards the student is in training mode and the teacher in eval mode.

    Args:
        job: configuration of the training run.
        student: network of the student.
        teacher: network of the teacher; None for a job without a teacher.
        data: data set of the job.
        device: device of the networks.

    Raises:
        ValueError: If a network raises a RuntimeError or AssertionError for the image, if its
            output is not a logit map with the classes of the data set, or if, with a teacher,
            `check_scales` refuses the scales.
        torch.OutOfMemoryError: If the device is full.
    """
    teachers_CHW = image_of_teacher(data.image_shape, job.teacher.image_size)
    networks = {
        f"student={job.student.name}": (student, data.image_shape),
        f"teacher={job.teacher.name}": (teacher, teachers_CHW),
    }
    maps = {}
    for name, (network, image_CHW) in networks.items():
        try:
            if network is not None:
                maps[name] = network.eval()(torch.zeros(1, *image_CHW, device=device))
        except torch.OutOfMemoryError:  # the device is full, which says nothing about the network
            raise
        except (RuntimeError, AssertionError) as error:  # timm asserts the size of the images
            assert network is not None
            raise wrong_images(name, network, image_CHW, error) from error
    student.train()
    for name, logit_map in maps.items():
        if logit_map.ndim != 4 or logit_map.shape[1] != job.dataset.num_classes:
            raise ValueError(
                f"{name} returns shape {tuple(logit_map.shape)}; "
                f"it must return a logit map of shape (B, {job.dataset.num_classes}, H, W)"
            )
    if teacher is not None:
        check_scales(job, {name: tuple(m.shape[2:]) for name, m in maps.items()}, data.image_shape)


def wrong_images(
    name: str, network: nn.Module, image_CHW: tuple[int, ...], error: BaseException
) -> ValueError:
    """Return the ValueError that says that a network does not accept images, and what to change.

    Args:
        name: the network as the job names it, such as "student=timm".
        network: the network.
        image_CHW: channels, height and width of an image, in pixels.
        error: what the network raised.
    """
    channels, height, width = image_CHW
    cure = "choose another network or size"
    if isinstance(network, ForeignNetwork):
        who, side = name.partition("=")[0], network.image_CHW[-1]
        cure += f", or set +{who}.model.resize={side}"
    return ValueError(
        f"{name} cannot take images of {channels}x{height}x{width} "
        f"({' '.join(str(error).split())[:200]}); {cure}"
    )


def check_scales(
    job: Config, sides: Mapping[str, tuple[int, ...]], image_CHW: tuple[int, ...]
) -> None:
    """Raise ValueError if the largest scale of a job exceeds twice the side of the smallest map.

    If a map is not square, its shorter side counts. Scales above the side repeat places of the map.
    They are allowed up to twice the side, because the papers train mobilev2 (2x2) with M=[1,2,4].

    Args:
        job: configuration of a training run with a teacher.
        sides: {network, such as "student=resnet8": (height, width) of its logit map}.
        image_CHW: channels, height and width of an image, in pixels.
    """
    name, (height, width) = min(sides.items(), key=lambda item: min(item[1]))
    side = min(height, width)
    if max(job.M) <= 2 * side:
        return
    fitting = [m for m in job.M if m <= 2 * side] or [1]
    cures = ["choose a network whose first layers shrink the images less"]
    if set(image_CHW[1:]) == {job.dataset.size} and not job.teacher.image_size:
        # Networks shrink images by powers of two, and round sides up.
        stride = 2 ** math.ceil(math.log2(min(image_CHW[1:]) / side))
        cures.insert(0, f"dataset.size={stride * math.ceil(max(job.M) / 2)}")
    raise ValueError(
        f"M={job.M} is too fine: the largest scale here is {2 * side}, because the logit map of "
        f"{name} has {height}x{width} places for images of {image_CHW[1]}x{image_CHW[2]} pixels, "
        "and twice its side is the limit (scales above the side repeat places); "
        f"set M=[{','.join(map(str, fitting))}], or {', or '.join(cures)}"
    )


def check_batches(job: Config, student: nn.Module, data: Data, ranks: Ranks) -> None:
    """Check that the student can train on a batch of one image, if an epoch has such a batch.

    The check is that of `check_one_image`. It is made only if a rank gets a batch of one image in
    an epoch (`leaves_one_image`).

    Args:
        job: configuration of the training run, which gives the batch size.
        student: network of the student, after `Ranks.with_shared_norm`.
        data: data set of the job.
        ranks: the processes that share each batch; all of them must call this function.

    Raises:
        ValueError: If a rank gets a batch of one image on which the network cannot train.
        torch.OutOfMemoryError: If the device is full.
    """
    if not leaves_one_image(job, data.train_size, ranks.world_size):
        return
    # This call tells SharedBatchNorm that every rank holds the whole batch.
    ranks.images_of_step(1, 1)
    check_one_image(job, student, data.train_size, data.image_shape)


def leaves_one_image(job: Config, images: int, ranks: int = 1) -> bool:
    """Return whether a rank gets a batch of one image in an epoch.

    Args:
        job: configuration of the training run, which gives the batch size.
        images: number of images of an epoch, over all ranks.
        ranks: number of processes that share each batch.
    """
    size = job.trainer.batch_size
    # The job of a teacher can have another batch size than the data that were built.
    steps = steps_per_epoch(images, size, job.dataset.drop_last)
    steps = min(steps, job.trainer.max_steps or steps)
    sizes = {min(size, images - step * size) for step in {0, steps - 1}}
    return any(1 in _shares(batch, ranks) for batch in sizes)


def check_one_image(
    job: Config, student: nn.Module, images: int, image_CHW: tuple[int, ...]
) -> None:
    """Check that the student of a job can train on a batch of one image.

    BatchNorm cannot train if it sees a single value per channel. One image of zeros is passed
    through the network in training mode. Afterwards the buffers have their earlier values, and the
    network is in training mode.

    Args:
        job: configuration of the training run, for the message.
        student: network of the student.
        images: number of images of an epoch, for the message.
        image_CHW: (C, H, W) of an image.

    Raises:
        ValueError: If the network cannot train on one image; the message names a batch size that
            leaves no such batch.
        torch.OutOfMemoryError: If the device is full.
    """
    size = job.trainer.batch_size
    device = next(student.parameters()).device
    image = torch.zeros(1, *image_CHW, device=device)
    before = {name: buffer.clone() for name, buffer in student.named_buffers()}
    try:
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            student.train()(image)
    except (ValueError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        fitting = next(n for n in range(size + 1, images + 1) if images % n != 1)
        raise ValueError(
            f"student={job.student.name} cannot train on a batch of one image "
            f"({' '.join(str(error).split())[:200]}), and the last batch of an epoch has one: "
            f"{images} images in batches of {size}; {batch_size_cure(job, str(fitting))}, "
            "or leave that batch out with dataset.drop_last=true"
        ) from error
    finally:
        with torch.no_grad():
            for name, buffer in student.named_buffers():
                buffer.copy_(before[name])


def _shares(batch: int, ranks: int) -> set[int]:
    """Return the numbers of images that ranks may hold of a batch of `batch` images."""
    parts = (share_of(batch, rank, ranks) for rank in range(ranks))
    return {part.stop - part.start for part in parts}
