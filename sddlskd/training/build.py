"""Build the parts of a job (one training run) from its configuration.

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
from omegaconf import OmegaConf
from torch import Tensor, nn

from sddlskd import config as cfg
from sddlskd.config import Capture, Config, DatasetConfig, TeacherView
from sddlskd.config.targets import instantiate
from sddlskd.data.decoding import ImageTransform
from sddlskd.data.device import DeviceData
from sddlskd.data.streaming import Data, StreamedData
from sddlskd.datasets.arrays import Files, Splits
from sddlskd.datasets.fingerprint import fingerprint
from sddlskd.datasets.places import without_downloads
from sddlskd.distill import (
    ScaleDecoupled,
    SeveralTeachers,
)
from sddlskd.models import draw_ends
from sddlskd.record import ONLY_IN_FILE, Onlooker, Record
from sddlskd.terminal.console import explain
from sddlskd.training import teacher_files
from sddlskd.training.checks import (
    check_batch_size,
    check_cache,
    check_images,
    check_label_sets,
    check_teacher,
    check_teacher_data,
    check_workers,
    missing_teacher,
    teacher_path,
)
from sddlskd.training.devices import seeded
from sddlskd.training.evaluation import binary_cross_entropy, evaluate
from sddlskd.training.objective import Feature, Objective, labelled_cross_entropy
from sddlskd.training.optimisation import Optimisation
from sddlskd.training.ranks import Ranks
from sddlskd.training.run import Run
from sddlskd.training.schedule import learning_rate
from sddlskd.training.teacher import Teacher
from sddlskd.training.teacher_cache import TeacherCache, cache_path, stored_shape

__all__ = [
    "build_data",
    "build_network",
    "build_run",
    "build_teacher",
    "image_transform",
    "leave_as_teacher",
    "load_splits",
    "present_fingerprint",
    "shape_of",
    "without_weights",
]

log = logging.getLogger(__name__)


def load_splits(job: Config) -> Splits:
    """Return the training and the test split of a job's data set, from the loader `dataset.load`.

    A split is `Images` (all pixels in memory) or `Files` (paths and labels of image files). A
    loader may download a missing data set.

    Raises:
        ValueError: If `dataset.load` names a function that a configuration must not call, or one
            that cannot be found or imported.
        InstantiationException: If the loader raises an error, for example because the data set is
            missing; the error of the loader is its cause.
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
        ValueError: If the labels or pixels are not as the settings `dataset.*` say, if one of these
            settings or a batch size is out of range, if the device has too little memory, or if
            `teacher.cache` is set for random crops of image files.
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
        return StreamedData(
            splits,
            view=image_transform(d),
            workers=d.workers,
            bad=d.bad_images,
            irregular=d.irregular_images,
            **common,
        )
    return DeviceData(splits, padding=d.padding, **common)


def image_transform(dataset: DatasetConfig) -> ImageTransform:
    """Return how squares are cut out of the image files of a data set."""
    low, high = dataset.crop_area
    return ImageTransform(
        dataset.size,
        area=(low, high),
        centre=dataset.centre,
        pixel_limit=dataset.pixel_limit,
        upright=dataset.upright,
        squeezed=dataset.crop == cfg.Crop.squeezed,
    )


def shape_of(job: Config, splits: Splits) -> tuple[int, ...]:
    """Return the shape (N, H, W, C) of a job's training split: images, rows, columns and channels.

    N also counts the images that are held out for validation. For image files, which are cropped, H
    and W are `dataset.size`, and C is 3.
    """
    if isinstance(splits.train, Files):
        return len(splits.train.paths), job.dataset.size, job.dataset.size, 3
    return tuple(splits.train.images_NHWC.shape)


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
        new_ends: whether `models.draw_ends` then initialises the first convolution and the
            classifier anew, as SDD's code does for CUB-200.

    Returns:
        The network, in the channels_last memory format.

    Raises:
        ValueError: If the `_target_` is one that a configuration must not name, or if it cannot be
            found or imported.
        InstantiationException: If the network's code raises an error.
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

    The job has a single teacher; `training/several.py` builds several. Log a warning if the
    teacher's top-1 on the test split is hardly better than guessing, or if the teacher was trained
    on other data with the same classes.

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
    if isinstance(data, StreamedData):
        measured_on += f":size {job.dataset.size}"
        if ranks.is_rank_zero:
            _warn_of_size(job, path)
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
            "teacher %s is missing: training %s alone first (teacher.train_epochs=%d)",
            job.teacher.name,
            job.teacher.name,
            job.teacher.train_epochs,
        )
        train(cfg.teacher_job(job))
        # A finished training has written the file. Without the file, the training has failed.
        if not ranks.broadcast(path.exists()):
            raise missing_teacher(job)


def _warn_of_size(job: Config, path: Path) -> None:
    """Log a warning if a teacher learnt from image files at another size than it is to see.

    The teacher's file `path` tells the size, or the configuration of the run that has the file.
    """
    learnt = teacher_files.size_of(path) or _size_in(path.parent / "config.yaml", job)
    seen = job.teacher.image_size or job.dataset.size
    if learnt not in (None, seen):
        log.warning(
            "teacher=%s was trained with dataset.size=%d, and sees images of %d pixels now (file "
            "%s); set dataset.size=%d, or teacher.image_size=%d",
            job.teacher.name, learnt, seen, path, learnt, learnt,
        )  # fmt: skip


def _size_in(path: Path, job: Config) -> int | None:
    """Return `dataset.size` of a run's config.yaml; None if its data set has another loader.

    Return None also if the file is missing or is no configuration of this package.
    """
    try:
        run = OmegaConf.load(path)
        # The same loader reads files here and there; other data sets ignore dataset.size.
        if OmegaConf.select(run, "dataset.load._target_") != job.dataset.load["_target_"]:
            return None
        size = OmegaConf.select(run, "dataset.size")
    except Exception:  # another program may have written the file, in any form
        return None
    return size if isinstance(size, int) else None


def _warn_at_chance(job: Config, top1: float) -> None:
    """Log a warning if a teacher with this top-1 (%) is hardly better than guessing."""
    if job.dataset.multi_label:  # guessing depends on how many labels images have
        return
    chance = 100 / job.dataset.num_classes
    if top1 < chance + 0.05 * (100 - chance):
        log.warning(
            "teacher %s performs at chance: top-1 %.2f on %s (%s), so students learn nothing from "
            "it; set teacher.checkpoint=FILE to a better one, or remove this file and train the "
            "teacher longer or with another optimizer.lr",
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


def build_run(
    job: Config,
    network: nn.Module,
    opened: Record | Onlooker,
    device: torch.device,
    steps: int,
    *,
    images: int,
    label: str = "",
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
        label: name of the run in logs; "" for the name of its run directory.
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
        label=label or opened.folder.name,
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


def leave_as_teacher(job: Config, run: Run, data: Data) -> None:
    """Write the weights of a network that was trained without a teacher to a teacher file.

    The weights are those of the last epoch. The file is the one that `teacher=<student's name>`
    loads by default. Write no file

    - if the job has a teacher;
    - if `trainer.max_steps` is set, because the epochs are then incomplete;
    - if `dataset.train_fraction` is less than 1, because teachers learn from all images;
    - if the file exists already.

    The log of the run says whether the file was written, except in the first two cases. Raise
    OSError if the file cannot be written.
    """
    if job.has_teacher or job.trainer.max_steps is not None:
        return
    if job.dataset.train_fraction < 1:
        # The outcome of the run or of the whole sweep says so once.
        run.record.log.info(
            "this network is not written as a teacher file, as dataset.train_fraction=%g; "
            "teacher.checkpoint=%s/best.ckpt uses it as a teacher",
            job.dataset.train_fraction,
            job.run_dir,
            extra=ONLY_IN_FILE,
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
        size=job.dataset.size if isinstance(data, StreamedData) else None,
    )
    if written:
        outcome = f"written (last epoch, top-1 {run.progress.last_top1:.2f})"
    else:
        outcome = (
            "kept, since the file exists already, and students learn from that one; for this "
            f"network set teacher.checkpoint={job.run_dir}/best.ckpt (best epoch, top-1 "
            f"{run.progress.best_top1:.2f}), or replace the file as docs/teachers.md says"
        )
    run.record.log.info("teacher file %s: %s", path, outcome)
