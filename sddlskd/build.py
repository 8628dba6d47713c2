"""From a configuration to the things that train: data, networks, teacher, runs."""

import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import nn

from sddlskd import config as cfg
from sddlskd import pins
from sddlskd import teacher as teachers
from sddlskd.config import Config
from sddlskd.data import DeviceData, Files, Splits
from sddlskd.decoding import View
from sddlskd.distill import ScaleDecoupled
from sddlskd.distributed import Ranks
from sddlskd.evaluation import evaluate
from sddlskd.record import Onlooker, Record
from sddlskd.run import Run
from sddlskd.schedule import learning_rate
from sddlskd.streaming import Data, StreamedData
from sddlskd.targets import instantiate
from sddlskd.teacher import Teacher
from sddlskd.teacher_cache import TeacherCache, cache_path

__all__ = [
    "build_data",
    "build_network",
    "build_run",
    "build_teacher",
    "check_maps",
    "leave_as_teacher",
    "shape_of",
]
__all__ += ["check_cache", "check_teacher", "teacher_changed", "teacher_path"]

log = logging.getLogger(__name__)


def build_data(job: Config, device: torch.device, *, rank: int = 0, ranks: int = 1) -> Data:
    """The data set: its pixels on the device, or its files read as batches are asked for; this rank's share of it."""
    d, splits = job.dataset, instantiate(job.dataset.load)
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
        rank=rank,
        ranks=ranks,
    )
    if isinstance(splits.train, Files):
        check_cache(job)
        low, high = d.crop_area
        view = View(
            d.size, area=(low, high), centre=d.centre, pixel_limit=d.pixel_limit, upright=d.upright
        )
        choices: dict[str, Any] = {
            "workers": d.workers,
            "bad": d.bad_images,
            "irregular": d.irregular_images,
        }
        return StreamedData(splits, view=view, **choices, **common)
    return DeviceData(splits, padding=d.padding, **common)


def shape_of(job: Config, splits: Splits) -> tuple[int, ...]:
    """(N, H, W, C) of the training images as the networks see them."""
    if isinstance(splits.train, Files):
        return len(splits.train.paths), job.dataset.size, job.dataset.size, 3
    return tuple(splits.train.images_NHWC.shape)


def check_cache(job: Config) -> None:
    """ValueError for a cache of the teacher's maps of views that never come again."""
    if job.teacher.cache:
        raise ValueError(
            f"teacher.cache={job.teacher.cache} cannot hold the crops of dataset={job.dataset.name}, no two of which "
            "are alike; set teacher.cache=null"
        )


def build_network(
    model: dict[str, Any], num_classes: int, seed: int, device: torch.device
) -> nn.Module:
    """A freshly initialised network: its weights depend on `seed` alone, not on what was built before it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network: nn.Module = instantiate(model, num_classes=num_classes)
    return network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def teacher_path(job: Config) -> Path:
    """The file of the job's teacher."""
    return Path(
        job.teacher.checkpoint or teachers.path_of(job.home, job.dataset.name, job.teacher.name)
    )


def check_teacher(job: Config) -> None:
    """FileNotFoundError unless the teacher's file is there, or will be trained; ValueError if it is not as pinned."""
    path = teacher_path(job)
    if job.distiller.loss and path.exists() and not job.teacher.checkpoint:
        pins.check(
            job.home, pins.key_of(job.dataset.name, job.teacher.name), teachers.file_hash(path)
        )
    if (
        job.distiller.loss
        and not path.exists()
        and (job.teacher.checkpoint or not job.teacher.train_if_missing)
    ):
        raise teachers.missing(path, job.teacher.name, job.dataset.name)


def teacher_changed(job: Config, result: Mapping[str, Any]) -> bool:
    """Whether a run learnt from another teacher file than the one that its job finds now."""
    earlier, path = result.get("teacher_sha256"), teacher_path(job)
    return bool(
        job.distiller.loss and earlier and path.exists() and teachers.file_hash(path) != earlier
    )


def build_teacher(
    job: Config,
    network: nn.Module,
    data: Data,
    device: torch.device,
    train: Callable[[Config], None],
    ranks: Ranks | None = None,
) -> tuple[Teacher | TeacherCache, dict[str, Any]]:
    """The teacher and what is known of it; `train` makes it first where its file is missing and the job says so.

    ranks: that have it each and train it together; rank 0 looks for it, and measures it.
    """
    path, ranks = teacher_path(job), ranks or Ranks()
    check_teacher(job)
    if not ranks.told(path.exists()):
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            FileLock(f"{path}.lock") if ranks.first else nullcontext()
        ):  # the first job trains it, the others wait
            if not ranks.told(path.exists()):
                log.info(
                    "teacher %s is not there yet: training it first (teacher.train_epochs=%d)",
                    job.teacher.name,
                    job.teacher.train_epochs,
                )
                train(cfg.teacher_job(job))
                if not ranks.told(path.exists()):  # trained before, and its file taken away since
                    raise teachers.missing(path, job.teacher.name, job.dataset.name)
    teacher = Teacher(
        network,
        path,
        name=job.teacher.name,
        device=device,
        precision=job.trainer.precision,
        compile=job.trainer.compile,
    )
    top1 = ranks.told(
        teachers.measured_top1(
            path, job.dataset.name, lambda: evaluate(teacher, data.test_batches())["top1"]
        )
        if ranks.first
        else None
    )
    chance = 100 / job.dataset.num_classes
    if top1 < chance + 0.05 * (100 - chance):
        log.warning(
            "teacher %s performs at chance: top-1 %.2f on %s (%s)",
            job.teacher.name,
            top1,
            job.dataset.name,
            path,
        )
    sha256 = teachers.file_hash(path)
    facts = {"teacher_top1": top1, "teacher_sha256": sha256}
    if not (
        job.teacher.cache and isinstance(data, DeviceData)
    ):  # of no other data, see check_cache
        return teacher, facts
    with ranks.first_before_others():
        return _remembering(job, teacher, data, device, sha256), facts


def _remembering(
    job: Config, teacher: Teacher, data: DeviceData, device: torch.device, sha256: str
) -> TeacherCache:
    d = job.dataset
    seen = [d.name, d.load, d.mean, d.std, d.padding, d.flip, d.val_fraction, data.train_size]
    map_KHW = tuple(teacher(torch.zeros(1, *data.image_shape, device=device)).shape[1:])
    about = {
        "images": seen,
        "map": map_KHW,
        "dtype": job.teacher.cache_dtype,
        "precision": job.trainer.precision,
    }
    path = cache_path(Path(str(job.teacher.cache)), sha256, about)
    return TeacherCache(
        teacher,
        path,
        rows=data.train_size * data.views,
        map_KHW=map_KHW,
        dtype=job.teacher.cache_dtype,
    )


@torch.inference_mode()
def check_maps(
    job: Config, student: nn.Module, teacher: nn.Module | None, data: Data, device: torch.device
) -> None:
    """ValueError unless both networks take the images and give maps of the right classes that the scales fit on."""
    image = torch.zeros(1, *data.image_shape, device=device)
    networks = {f"student={job.student.name}": student, f"teacher={job.teacher.name}": teacher}
    maps = {}
    for name, network in networks.items():
        try:
            if network is not None:
                maps[name] = network.eval()(image)
        except torch.OutOfMemoryError:  # of what is busy on the device, not of the network
            raise
        except RuntimeError as error:
            channels, height, width = data.image_shape
            raise ValueError(
                f"{name} cannot take images of {channels}x{height}x{width} ({' '.join(str(error).split())[:200]}); "
                "choose another network or size"
            ) from error
    student.train()
    for name, logit_map in maps.items():
        if logit_map.ndim != 4 or logit_map.shape[1] != job.dataset.num_classes:
            raise ValueError(
                f"{name} gives {tuple(logit_map.shape)}; a logit map is (B, {job.dataset.num_classes}, H, W)"
            )
    side = min(min(logit_map.shape[2:]) for logit_map in maps.values())
    if teacher is not None and max(job.M) > 2 * side:
        sides = ", ".join(
            f"{name} {tuple(logit_map.shape[2:])}" for name, logit_map in maps.items()
        )
        raise ValueError(
            f"M={job.M} asks for {max(job.M)}x{max(job.M)} regions, more than twice the smaller map ({sides}); "
            f"the largest scale here is {2 * side}"
        )


def build_run(
    job: Config,
    network: nn.Module,
    opened: Record | Onlooker,
    device: torch.device,
    steps: int,
    *,
    images: int,
    ranks: Ranks | None = None,
) -> Run:
    """One student with its optimizer and loss, where its checkpoint left it. images: of an epoch."""
    distill = None
    if job.distiller.loss:
        distill = ScaleDecoupled(
            instantiate(job.distiller.loss, _partial_=True),
            job.M,
            complementary_weight=job.complementary_weight,
            standardize=job.standardize,
            knowledge=job.distiller.knowledge,
            reduction=job.distiller.reduction,
        )
    o = job.optimizer
    return Run(
        opened,
        Path(job.run_dir).name,
        network,
        instantiate(o.algorithm, _partial_=True)(network.parameters(), lr=o.lr),
        distill=distill,
        ce_weight=job.distiller.ce_weight,
        kd_weight=job.distiller.kd_weight,
        warmup_epochs=job.distiller.warmup_epochs,
        learning_rate=lambda progress: learning_rate(
            progress, peak=o.lr, epochs=job.trainer.epochs, schedule=o.schedule, milestones=o.milestones,
            decay=o.decay, warmup_epochs=o.warmup_epochs,
        ),
        clip_norm=o.clip_norm,
        device=device,
        precision=job.trainer.precision,
        compile=job.trainer.compile,
        seed=job.seed,
        steps=steps,
        ranks=ranks or Ranks(),
        images=images,
        batch_size=job.trainer.batch_size,
    )  # fmt: skip


def leave_as_teacher(job: Config, run: Run) -> None:
    """A network trained to the end without a teacher can teach: leave it where `teacher=<name>` finds it."""
    if job.distiller.loss or job.trainer.max_steps is not None:
        return
    path = teachers.path_of(job.home, job.dataset.name, job.student.name)
    left = teachers.publish(
        path,
        run.model.state_dict(),
        network=job.student.name,
        dataset=job.dataset.name,
        top1=run.last_top1,
    )
    run.record.log.info(
        "teacher file %s: %s",
        path,
        "written" if left else "kept as it was, since one is there already",
    )
