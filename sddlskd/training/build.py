"""Build the parts of a job (one training run) from its configuration, and check its settings.

The parts are the data, the networks, the teacher, the optimizer and the loss.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor, nn

from sddlskd import config as cfg
from sddlskd.config import Capture, Config, TeacherView
from sddlskd.config.targets import instantiate
from sddlskd.data.decoding import ImageTransform
from sddlskd.data.device import DeviceData, share_of, steps_per_epoch
from sddlskd.data.streaming import Data, StreamedData
from sddlskd.datasets.arrays import Files, Splits
from sddlskd.datasets.fingerprint import difference, differing_classes, fingerprint
from sddlskd.datasets.places import without_downloads
from sddlskd.distill import (
    ScaleDecoupled,
    SeveralTeachers,
    compares_images,
    takes_label_sets,
)
from sddlskd.models import ForeignNetwork, draw_ends
from sddlskd.processes.cores import check_processes
from sddlskd.record import FINISHED, Onlooker, Record, read_result
from sddlskd.terminal.console import explain
from sddlskd.training import teacher_files
from sddlskd.training.devices import check_memory, seeded
from sddlskd.training.evaluation import binary_cross_entropy, evaluate
from sddlskd.training.ranks import Ranks
from sddlskd.training.run import (
    Feature,
    Objective,
    Optimisation,
    Run,
    labelled_cross_entropy,
)
from sddlskd.training.schedule import learning_rate
from sddlskd.training.stand_ins import try_loss, try_optimizer
from sddlskd.training.teacher import Teacher, image_of_teacher
from sddlskd.training.teacher_cache import TeacherCache, cache_path, stored_shape

__all__ = [
    "batch_size_cure",
    "build_data",
    "build_network",
    "build_run",
    "build_teacher",
    "check_batch_size",
    "check_batches",
    "check_cache",
    "check_images",
    "check_label_sets",
    "check_maps",
    "check_objective",
    "check_one_image",
    "check_one_process",
    "check_same_data",
    "check_scales",
    "check_teacher",
    "check_teacher_data",
    "check_workers",
    "data_changed",
    "leave_as_teacher",
    "leaves_one_image",
    "load_splits",
    "present_fingerprint",
    "shape_of",
    "teacher_changed",
    "teacher_path",
    "without_weights",
    "wrong_images",
]

log = logging.getLogger(__name__)

WORKER_MB = 30  # memory of a process that decodes images, in megabytes


def load_splits(job: Config) -> Splits:
    """Return the training and the test split of a job's data set, from the loader `dataset.load`.

    A split is `Images` (all pixels in memory) or `Files` (paths and labels of image files). A
    loader may download a missing data set.

    Raises:
        ValueError: If `dataset.load` names a function that a configuration must not call, or one of
            sddlskd, torch, torchvision or timm that does not exist.
        InstantiationException: If the loader raises an error, for example because the data set is
            missing; the error of the loader is its cause. Also if a loader outside of these
            packages cannot be found.
    """
    splits: Splits = instantiate(job.dataset.load)
    return splits


def present_fingerprint(job: Config) -> dict[str, Any] | None:
    """Return the fingerprint of the data that a job would use now: its sizes, classes and a hash.

    `datasets.fingerprint` describes the dict. Nothing is downloaded. If the data cannot be loaded,
    log the reason and return None.
    """
    try:
        with without_downloads():
            return fingerprint(load_splits(job))
    except Exception as error:  # a data set may raise anything
        log.warning(
            "dataset=%s cannot be compared with earlier runs: %s", job.dataset.name, explain(error)
        )
        return None


def data_changed(result: Mapping[str, Any], now: Mapping[str, Any] | None) -> str:
    """Return in words how the data of an earlier run differ from those that its job would use now.

    Args:
        result: content of the run's result.json. Its entry "data" is the fingerprint of the data
            that the run was trained on.
        now: fingerprint of the data that the job would use now (`present_fingerprint`); None if it
            is unknown.

    Returns:
        A text for messages; "" if the data are the same or if a fingerprint is unknown.
    """
    earlier = result.get("data")
    return difference(earlier, now) if earlier and now else ""


def check_same_data(job: Config, now: Mapping[str, Any] | None) -> None:
    """Raise ValueError if the job's run directory holds a run that was trained on other data.

    `now` is the fingerprint of the present data (`present_fingerprint`), or None if it is unknown.
    The check passes if the run directory holds neither a finished run nor a checkpoint. It also
    passes if the fingerprint of either data is unknown. A damaged result.json raises ValueError,
    too.
    """
    folder = Path(job.run_dir)
    result = read_result(folder)
    if result.get("status") != FINISHED and not (folder / "last.ckpt").exists():
        return
    if differs := data_changed(result, now):
        raise ValueError(
            f"run_dir={folder} was trained on other data than dataset={job.dataset.name} has now "
            f"({differs}); choose another dataset.name or run_dir, or put the earlier data back"
        )


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
            "choose another dataset.name, or set teacher.checkpoint=FILE"
        )
    return difference(earlier, now)


def build_data(
    job: Config,
    device: torch.device,
    *,
    splits: Splits | None = None,
    rank: int = 0,
    ranks: int = 1,
    strong: bool = False,
) -> Data:
    """Return the object that makes the batches of a job's data set, for one rank.

    The ranks are the processes that share each batch.

    Args:
        job: configuration of the training run.
        device: device of the batches.
        splits: the training and test split; None to load them with `load_splits`.
        rank: number of this rank, from 0.
        ranks: number of ranks.
        strong: whether the training batches also hold a second, strongly augmented view of each
            image.

    Returns:
        `DeviceData` for pixel arrays, which are kept on the device as a whole. `StreamedData` for
        image files, which are decoded when a batch needs them.

    Raises:
        ValueError: If a setting or the data is not valid, if the device has too little memory, or
            if `teacher.cache` is set for random crops of image files.
        InstantiationException: If `splits` is None and the loader raises an error.
    """
    d = job.dataset
    splits = splits or load_splits(job)
    check_label_sets(job, splits.train.labels_N)
    shape_NHWC = shape_of(job, splits)
    check_batch_size(job, shape_NHWC[0])
    check_images(job, shape_NHWC, device, of_files=isinstance(splits.train, Files))
    common: dict[str, Any] = dict(
        num_classes=d.num_classes,
        batch_size=job.trainer.batch_size,
        eval_batch_size=job.trainer.eval_batch_size,
        seed=cfg.data_seed(job),
        device=device,
        mean=d.mean,
        std=d.std,
        flip=d.flip,
        val_fraction=d.val_fraction,
        train_fraction=d.train_fraction,
        unlabelled=d.unlabelled,
        drop_last=d.drop_last,
        rank=rank,
        ranks=ranks,
        strong=strong,
        plain=job.teacher.view == TeacherView.plain,
    )
    if isinstance(splits.train, Files):
        check_cache(job)
        check_workers(job)
        low, high = d.crop_area
        view = ImageTransform(
            d.size,
            area=(low, high),
            centre=d.centre,
            pixel_limit=d.pixel_limit,
            upright=d.upright,
            squeezed=d.crop == cfg.Crop.squeezed,
        )
        return StreamedData(
            splits,
            view=view,
            workers=d.workers,
            bad=d.bad_images,
            irregular=d.irregular_images,
            **common,
        )
    return DeviceData(splits, padding=d.padding, **common)


def check_label_sets(job: Config, labels_N: Tensor) -> None:
    """Raise ValueError unless `dataset.multi_label` says whether images have several labels.

    `labels_N` are the class ids of the training images (N,), or zeros and ones (N, K) for images
    with several labels.
    """
    several = labels_N.ndim > 1
    if several != job.dataset.multi_label:
        found = "several labels" if several else "one class"
        raise ValueError(
            f"dataset={job.dataset.name} has {found} per image; set "
            f"dataset.multi_label={str(several).lower()}"
        )


def shape_of(job: Config, splits: Splits) -> tuple[int, ...]:
    """Return the shape (N, H, W, C) of a job's training split: images, rows, columns and channels.

    N also counts the images that are held out for validation. For image files, which are cropped, H
    and W are `dataset.size`, and C is 3.
    """
    if isinstance(splits.train, Files):
        return len(splits.train.paths), job.dataset.size, job.dataset.size, 3
    return tuple(splits.train.images_NHWC.shape)


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
        check_batch_size(teacher_job, images if of_teacher is None else of_teacher)
    size = job.trainer.batch_size
    if images < 2:
        raise ValueError(
            f"dataset={job.dataset.name} has {images} training images; BatchNorm needs at least 2"
        )
    if size > images:
        raise ValueError(
            f"trainer.batch_size={size} is larger than the {images} images of "
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


def check_objective(job: Config, device: torch.device) -> None:
    """Raise ValueError if the distillation loss or the optimizer of a job does not work.

    Both are tried on small tensors: the loss on the CPU (`try_loss`), the optimizer on `device`
    (`try_optimizer`). A job without a distillation loss of the logits has only its optimizer tried.

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


def build_network(
    model: dict[str, Any],
    num_classes: int,
    seed: int,
    device: torch.device,
    *,
    new_ends: bool = False,
) -> nn.Module:
    """Return a newly initialised network, whose weights depend on the arguments alone.

    The network is initialised on the CPU, and the CPU's global random state is left unchanged. If
    `model` has a key such as "pretrained", published weights may be downloaded.

    Args:
        model: `_target_` (dotted name of a class or function) and arguments of the network.
        num_classes: number of classes, passed to the network as the argument `num_classes`.
        seed: seed of the initialisation.
        device: device that the network is moved to.
        new_ends: whether first layers and classifier are initialised anew, as `models.draw_ends`
            does.

    Returns:
        The network, in the channels_last memory format.

    Raises:
        ValueError: If the `_target_` is one that a configuration must not name, or if it belongs to
            sddlskd, torch, torchvision or timm and cannot be found.
        InstantiationException: If the network's code raises an error, or if code outside of these
            packages cannot be found.
    """
    with seeded(seed, device):
        network: nn.Module = instantiate(model, num_classes=num_classes)
        if new_ends:
            draw_ends(network)
    return network.to(  # type: ignore[call-overload, no-any-return]
        device=device, memory_format=torch.channels_last
    )


def without_weights(model: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a network's configuration without the keys "pretrained" and "weights".

    `model` holds the `_target_` and the arguments of the network. With these keys, building the
    network would download published weights. Use this function for a network whose weights come
    from a file.
    """
    return {key: value for key, value in model.items() if key not in ("pretrained", "weights")}


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

    A teacher is to be trained if the default weight file of the teacher is missing,
    `teacher.train_if_missing` is set, and `checkpoint` names no other file.
    """
    return [
        cfg.teacher_job(one)
        for one in cfg.each_teacher(job)
        if one.teacher.train_if_missing
        and not one.teacher.checkpoint
        and not teacher_path(one).exists()
    ]


def check_teacher(job: Config) -> None:
    """Raise an error if a teacher file of a job is missing or was replaced.

    Do nothing for a job without a teacher. For a file named by `teacher.checkpoint`, check only
    that it exists. The default file, <home>/teachers/<data set>/<teacher>.pt, may be missing if
    `teacher.train_if_missing` is set. If it exists and <home>/teachers/lock.json records a sha256
    for this teacher, the file must have this sha256.

    Raises:
        FileNotFoundError: If the file is missing, and is not the default file of a job with
            `teacher.train_if_missing`.
        ValueError: If the default file has another sha256 than the recorded one, or if lock.json is
            damaged.
    """
    for one in cfg.each_teacher(job):
        path = teacher_path(one)
        if not path.exists():
            if one.teacher.checkpoint or not one.teacher.train_if_missing:
                raise teacher_files.missing(path, one.teacher.name, one.dataset.name)
        elif not one.teacher.checkpoint:
            key = teacher_files.pin_key(one.dataset.name, one.teacher.name)
            teacher_files.check_pin(one.home, key, teacher_files.file_hash(path))


def teacher_changed(job: Config, result: Mapping[str, Any]) -> bool:
    """Return whether a run was trained with another teacher file than its job would use now.

    `result` is the content of the run's result.json; its entry "teacher_sha256" is the hash of the
    teacher file, or the hashes of several teacher files joined by "+". Return False if the job has
    no teacher, if a teacher file is missing now, or if `result` has no such entry.
    """
    earlier = result.get("teacher_sha256")
    paths = [teacher_path(one) for one in cfg.each_teacher(job)]
    if not paths or not all(path.exists() for path in paths):
        return False
    return earlier not in (None, "+".join(map(teacher_files.file_hash, paths)))


def build_teacher(
    job: Config,
    network: nn.Module,
    data: Data,
    device: torch.device,
    train: Callable[[Config], None],
    ranks: Ranks | None = None,
    noted: Mapping[str, Any] | None = None,
) -> tuple[Teacher | TeacherCache, dict[str, Any]]:
    """Return the teacher of a job; train it first if its file is missing and the job allows it.

    The job has a single teacher; `training/several.py` builds several. A warning is logged if the
    teacher's top-1 on the test split is hardly better than guessing.

    Args:
        job: configuration of the training run.
        network: network of the teacher; its weights are loaded from the teacher file.
        data: data set of the job; the teacher's accuracy is measured on its test split.
        device: device of the teacher.
        train: function that trains a given teacher job and writes the teacher file.
        ranks: the processes that share each batch; all of them must call this function. Rank 0
            looks for the file and measures the accuracy. None for this process alone.
        noted: fingerprint of the data set (`present_fingerprint`); None if it is unknown.

    Returns:
        The teacher, and facts for result.json: {"teacher_top1": percent, "teacher_sha256": hash of
        the teacher file}. The teacher caches its logit maps (`TeacherCache`) if `teacher.cache` is
        set, the views that the teacher sees repeat (see `check_cache`) and the job has no feature
        method.

    Raises:
        FileNotFoundError: If the file is missing and the job may not train the teacher, or if the
            training leaves no file.
        ValueError: If the file cannot be used: its sha256 is not the recorded one (see
            `check_teacher`), it does not hold finite weights of the network, or the teacher was
            trained on other classes. Also if <file>.top1.json, which keeps its accuracy, is
            damaged, or if the disk cannot hold the cache.
        Exception: Any error that `train` raises.
    """
    path = teacher_path(job)
    ranks = ranks or Ranks()
    check_teacher(job)
    _train_if_missing(job, train, ranks)
    # Measured accuracies and cached maps hold only for the data that they come from.
    data_hash = ""
    measured_on = job.dataset.name
    if noted:
        data_hash = noted["sha256"]
        measured_on += f":{data_hash}"
        if (differs := check_teacher_data(job, noted)) and ranks.is_rank_zero:
            log.warning("teacher=%s learnt from other data (%s)", job.teacher.name, differs)
    teacher = Teacher(
        network,
        path,
        name=job.teacher.name,
        device=device,
        precision=job.trainer.precision,
        compile=job.trainer.compile,
        compile_mode=job.trainer.compile_mode,
        image_size=job.teacher.image_size,
    )
    if job.teacher.image_size:
        measured_on += f":{job.teacher.image_size} pixels"
    top1 = None
    if ranks.is_rank_zero:
        top1 = teacher_files.measured_top1(
            path,
            measured_on,
            lambda: evaluate(teacher, data.test_batches())["top1"],
        )
    top1 = ranks.broadcast(top1)
    _warn_at_chance(job, top1)
    sha256 = teacher_files.file_hash(path)
    facts = {"teacher_top1": top1, "teacher_sha256": sha256}
    has_rows = isinstance(data, DeviceData) or job.teacher.view == TeacherView.plain
    if not (job.teacher.cache and has_rows):
        return teacher, facts
    if job.features:
        log.info(
            "teacher.cache=%s is not used: features=[%s] need more than it keeps, "
            "so the teacher is asked for every batch",
            job.teacher.cache,
            ",".join(job.features),
        )
        return teacher, facts
    with ranks.rank_zero_first():
        return _cached(job, teacher, data, device, sha256, data_hash), facts


def _train_if_missing(job: Config, train: Callable[[Config], None], ranks: Ranks) -> None:
    """Train the teacher of a job if its file is missing.

    The arguments are those of `build_teacher`. Raise FileNotFoundError if training left no file.
    """
    path = teacher_path(job)
    if ranks.broadcast(path.exists()):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        # The first job to take the lock trains the teacher; other jobs wait for it.
        if ranks.is_rank_zero:
            stack.enter_context(FileLock(f"{path}.lock"))
        if ranks.broadcast(path.exists()):
            return
        log.info(
            "teacher %s is missing: training it first (teacher.train_epochs=%d)",
            job.teacher.name,
            job.teacher.train_epochs,
        )
        train(cfg.teacher_job(job))
        # A finished training has written the file. Without the file, the training has failed.
        if not ranks.broadcast(path.exists()):
            raise teacher_files.missing(path, job.teacher.name, job.dataset.name)


def _warn_at_chance(job: Config, top1: float) -> None:
    """Log a warning if a teacher with this top-1 (%) is hardly better than guessing."""
    if job.dataset.multi_label:  # guessing depends on how many labels images have
        return
    chance = 100 / job.dataset.num_classes
    if top1 < chance + 0.05 * (100 - chance):
        log.warning(
            "teacher %s performs at chance: top-1 %.2f on %s (%s)",
            job.teacher.name,
            top1,
            job.dataset.name,
            teacher_path(job),
        )


def _cached(
    job: Config,
    teacher: Teacher,
    data: Data,
    device: torch.device,
    sha256: str,
    data_hash: str,
) -> TeacherCache:
    """Return the teacher with a cache of its logit maps.

    Args:
        job: configuration of the training run.
        teacher: the teacher.
        data: the batches of the data set.
        device: device of the teacher.
        sha256: hash of the teacher file.
        data_hash: hash of the data set; "" if it is unknown.

    Returns:
        The teacher with the cache. A cache file is shared by all jobs with the same teacher file,
        data, augmentation, precision, TF32, and shape and number format of the maps.
    """
    d = job.dataset
    seen: list[Any] = [d.name, d.load, d.mean, d.std]
    views = 1
    if job.teacher.view == TeacherView.plain:
        # Of image files, these are the settings of the centre crop.
        seen.append(["plain", data.image_shape, d.crop, d.centre, d.upright])
    else:
        assert isinstance(data, DeviceData)
        views = data.views
        seen += [d.padding, d.flip]
    seen += [d.val_fraction, data.train_size]
    full_KHW = tuple(teacher(torch.zeros(1, *data.image_shape, device=device)).shape[1:])
    map_KHW = stored_shape(full_KHW, cfg.cached_side(job))
    about: dict[str, Any] = {
        "images": seen,
        "data": data_hash,
        "map": map_KHW,
        "dtype": job.teacher.cache_dtype,
        "precision": job.trainer.precision,
    }
    if d.train_fraction < 1 and not d.unlabelled:
        seen.append(d.train_fraction)
    if job.teacher.image_size:
        seen.append({"teacher.image_size": job.teacher.image_size})
    if not job.trainer.tf32:
        about["tf32"] = False
    path = cache_path(Path(str(job.teacher.cache)), sha256, about)
    return TeacherCache(
        teacher,
        path,
        rows=data.train_size * views,
        map_KHW=map_KHW,
        dtype=job.teacher.cache_dtype,
    )


@torch.inference_mode()
def check_maps(
    job: Config, student: nn.Module, teacher: nn.Module | None, data: Data, device: torch.device
) -> None:
    """Check that both networks accept the images and return suitable logit maps.

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
        ValueError: If a network raises a RuntimeError for the image, if its output is not a logit
            map with the classes of the data set, or if, with a teacher, `check_scales` refuses the
            scales.
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
    """Return the error for a network that does not accept the images of a job.

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
    """Raise ValueError if the largest scale of a job is more than twice the side of a logit map.

    Args:
        job: configuration of a training run with a teacher.
        sides: {network, such as "student=resnet8": (height, width) of its logit map}.
        image_CHW: channels, height and width of an image, in pixels.
    """
    name, (height, width) = min(sides.items(), key=lambda item: min(item[1]))
    side = min(height, width)
    if max(job.M) <= 2 * side:
        return
    fitting = [m for m in job.M if m <= side] or [1]
    raise ValueError(
        f"M={job.M} is too fine: the largest scale here is {2 * side}, because the logit map of "
        f"{name} has {height}x{width} places for images of {image_CHW[1]}x{image_CHW[2]} pixels; "
        f"set M=[{','.join(map(str, fitting))}], or choose a network whose first layers shrink "
        "the images less"
    )


def check_batches(job: Config, student: nn.Module, data: Data, ranks: Ranks) -> None:
    """Check that the student can train on a batch of one image, if an epoch has such a batch.

    The check is that of `check_one_image`. If no batch has a single image, nothing is done.

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


def build_run(
    job: Config,
    network: nn.Module,
    opened: Record | Onlooker,
    device: torch.device,
    steps: int,
    *,
    images: int,
    ranks: Ranks | None = None,
    features: Mapping[str, Feature] | None = None,
) -> Run:
    """Return the complete training state of one student: network, loss, optimizer and progress.

    Args:
        job: configuration of the training run.
        network: network of the student.
        opened: the run directory, opened for writing on rank 0 and for reading on other ranks.
        device: device of the network.
        steps: batches per epoch.
        images: images per epoch, over all ranks.
        ranks: the processes that share each batch; all of them must call this function. None for
            this process alone.
        features: the feature and relation methods of the job by name; None for none.

    Returns:
        The run. It continues from the newest readable checkpoint in the run directory, or begins at
        its first epoch if there is no checkpoint.

    Raises:
        UnreadableFile: If checkpoints exist and none can be read. The error is a ValueError.
        ValueError, RuntimeError: If the checkpoint does not fit the network or the optimizer.
    """
    distill: ScaleDecoupled | SeveralTeachers | None = None
    if job.distiller.loss:
        distill = ScaleDecoupled(
            instantiate(job.distiller.loss, _partial_=True),
            job.M,
            complementary_weight=job.complementary_weight,
            standardize=job.standardize,
            knowledge=job.distiller.knowledge,
            reduction=job.distiller.reduction,
            pooling=job.distiller.pooling,
        )
        if job.more_teachers:
            distill = SeveralTeachers(distill, cfg.teacher_weights(job), job.teacher.combine)
    objective = Objective(
        distill,
        ce_weight=job.distiller.ce_weight,
        kd_weight=job.distiller.kd_weight,
        warmup_epochs=job.distiller.warmup_epochs,
        features=features or {},
        temperature=_learned_temperature(job, device),
        cross_entropy=_cross_entropy(job),
        unlabelled=job.dataset.unlabelled,
    )
    parameters = [
        parameter
        for parameter in (*network.parameters(), *objective.modules.parameters())
        if parameter.requires_grad
    ]
    return Run(
        opened,
        network,
        objective,
        _optimisation(job, parameters, device),
        device=device,
        precision=job.trainer.precision,
        compile=job.trainer.compile,
        compile_mode=job.trainer.compile_mode,
        capture=_captures(job, device),
        seed=job.seed,
        steps=steps,
        images=images,
        batch_size=job.trainer.batch_size,
        ranks=ranks or Ranks(),
    )


def _cross_entropy(job: Config) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the cross-entropy for the labels of a job's training images."""
    if job.dataset.multi_label:
        return binary_cross_entropy
    return labelled_cross_entropy if job.dataset.unlabelled else F.cross_entropy


def _captures(job: Config, device: torch.device) -> bool:
    """Return whether the steps of a job are to be captured, if they can be."""
    choice = job.trainer.capture
    if choice == Capture.auto:
        return device.type == "cuda" and job.trainer.devices == 1
    return choice == Capture.on


def _learned_temperature(job: Config, device: torch.device) -> nn.Module | None:
    """Return the learnt temperature of a job's distillation loss; None for a fixed one."""
    if not job.distiller.learned_temperature:
        return None
    temperature: nn.Module = instantiate(job.distiller.learned_temperature)
    return temperature.to(device)


def _optimisation(
    job: Config, parameters: Sequence[nn.Parameter], device: torch.device
) -> Optimisation:
    """Return optimizer, schedule and gradient clipping for the given parameters."""
    o = job.optimizer
    return Optimisation(
        instantiate(o.algorithm, _partial_=True)(parameters, lr=o.lr),
        learning_rate=partial(
            learning_rate,
            peak=o.lr,
            epochs=job.trainer.epochs,
            schedule=o.schedule,
            milestones=o.milestones,
            decay=o.decay,
            warmup_epochs=o.warmup_epochs,
        ),
        clip_norm=o.clip_norm,
        scaler=torch.amp.GradScaler(device.type, enabled=job.trainer.precision == "fp16"),
    )


def leave_as_teacher(job: Config, run: Run) -> None:
    """Write the weights of a network that was trained without a teacher as a teacher file.

    The file is the one that `teacher=<student's name>` loads. An existing file is kept. The log of
    the run says whether the file was written. Do nothing for a distilled student, or if
    `trainer.max_steps` is set, because the epochs are then incomplete. Write no file if
    `dataset.train_fraction` is less than 1, because teachers learn from all images. Raise OSError
    if the file cannot be written.
    """
    if job.has_teacher or job.trainer.max_steps is not None:
        return
    if job.dataset.train_fraction < 1:
        run.record.log.info(
            "no teacher file is written, as dataset.train_fraction=%g; "
            "teacher.checkpoint=%s/best.ckpt uses this network",
            job.dataset.train_fraction,
            job.run_dir,
        )
        return
    path = teacher_files.path_of(job.home, job.dataset.name, job.student.name)
    written = teacher_files.publish(
        path,
        run.model.state_dict(),
        network=job.student.name,
        dataset=job.dataset.name,
        top1=run.progress.last_top1,
        data=run.info.get("data"),
    )
    outcome = "written" if written else "kept, since the file exists already"
    run.record.log.info("teacher file %s: %s", path, outcome)
