"""Checks that find invalid jobs before they start. They train nothing; some download missing data.

A sweep runs these checks in a separate process. The process that then waits for hours holds neither
torch nor images.
"""

import argparse
import json
import logging
import pickle
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sddlskd import record
from sddlskd.config import Config, Rerun, canonical, each_teacher
from sddlskd.config.targets import instantiate
from sddlskd.data.device import Normalise
from sddlskd.data.subsets import shown
from sddlskd.datasets.arrays import Files
from sddlskd.datasets.fingerprint import fingerprint
from sddlskd.datasets.places import without_downloads
from sddlskd.processes.parent import end_with_parent
from sddlskd.terminal.console import explain, log_to_terminal, refuse_another_checkout
from sddlskd.terminal.words import counted
from sddlskd.training.begun import check_same_data, data_changed, teacher_changed
from sddlskd.training.build import build_network, load_splits, present_fingerprint, shape_of
from sddlskd.training.checks import (
    check_batch_size,
    check_cache,
    check_images,
    check_label_sets,
    check_objective,
    check_one_image,
    check_one_process,
    check_pins,
    check_scales,
    check_targets,
    check_teacher,
    check_teacher_data,
    check_workers,
    leaves_one_image,
    missing_teachers,
    trained_first,
    wrong_images,
)
from sddlskd.training.devices import check_places, pick_device
from sddlskd.training.features import build_features, student_network
from sddlskd.training.teacher import image_of_teacher

__all__ = ["main", "problems", "report"]

log = logging.getLogger(__name__)

EVERY_S = 10.0  # seconds between two log lines about the progress

# Side of the images of the data sets that are arrays, in pixels, by the loaders' names
SIDES = {"cifar10": 32, "cifar100": 32, "digits": 32, "fashion_mnist": 32, "stl10": 96}
# Loaders of image files
OF_FILES = ("cub200", "image_folder", "imagenet", "label_sets", "tiny_imagenet")


@dataclass(frozen=True)
class DataSet:
    """Facts about a data set that the checks need.

    Attributes:
        size: number N of training images, before some are held out for validation.
        image_CHW: channels, height and width in pixels of an image, as the networks receive it.
        of_files: whether the images are files that stay on disk.
        noted: fingerprint of the data: numbers of images, classes and a hash.
        labels_N: class ids of the training images, int64, (N,); zeros and ones (N, K) for images
            with several labels.
    """

    size: int
    image_CHW: tuple[int, int, int]
    of_files: bool
    noted: dict[str, Any]
    labels_N: Tensor


class Downloadable(Exception):
    """Error for a missing file of a data set, which the job would download when it starts."""


class Checker:
    """Checks whether a job can run, and whether the data of a finished job have changed.

    `check` raises the first error that keeps the job from running, and `obstacles` yields all such
    errors. `data_change` compares the present data with those of a finished job. An instance loads
    each data set and builds each network only once, however many jobs it checks.
    """

    def __init__(self) -> None:
        self._data_sets: dict[str, DataSet | Exception] = {}
        self._fingerprints: dict[str, dict[str, Any] | None] = {}
        self._map_sides: dict[tuple[str, int, tuple[int, ...]], tuple[int, ...]] = {}
        self._networks: dict[tuple[str, int], nn.Module] = {}
        self._missing: dict[Path, FileNotFoundError] = {}
        self._weights_MB: dict[str, float | None] = {}

    def check(self, job: Config) -> None:
        """Raise the first error that keeps a job from running on this machine; do not train it.

        The checks cover the code that the job names, the devices, the loss, the optimizer, the
        data, the teacher's file, the scales M, and the feature methods. A missing data set is
        downloaded.

        Raises:
            FileNotFoundError: If the teacher's file is missing, and the job does not train the
                teacher first (teacher.train_if_missing).
            ValueError: If a setting, the data, the teacher's file or the job's run directory does
                not fit the job.
            Exception: Any other error that the code of a network or a data set raises.
        """
        check_targets(job)
        _check_settings(job)
        # Report a mistyped path before any data is downloaded.
        teachers = each_teacher(job)
        for one in teachers:
            if one.teacher.checkpoint:
                check_teacher(one)
        data = self._data_set(job)
        _check_images(job, data)
        check_teacher(job)
        for one in teachers:
            check_teacher_data(one, data.noted)
        self._check_networks(job, data.image_CHW, _trained_on(job, data.labels_N))

    def obstacles(self, job: Config) -> Iterator[Exception]:
        """Yield every error that keeps a job from running on this machine; download nothing.

        The checks are those of `check`. A missing file that the job would download is yielded as
        `Downloadable`. If code that the job names cannot be imported, no other error is yielded. If
        the data cannot be loaded:

        - the images, the labels, the last batch and the feature methods are not checked;
        - the scales are checked with the image size of the published data set, and not at all for a
          data set that is not one of this package.
        """
        try:
            check_targets(job)
        except ValueError as error:
            yield error
            return
        data: DataSet | None = None
        try:
            with without_downloads():
                data = self._data_set(job)
        except Exception as error:
            # Hydra wraps the error of a loader.
            if isinstance(error, FileNotFoundError) or isinstance(
                error.__cause__, FileNotFoundError
            ):
                yield Downloadable(explain(error))
            else:
                yield error
        checks: list[Callable[[], object]] = [
            partial(_check_settings, job),
            partial(check_pins, job),
        ]
        # Jobs may name one file by different keys; the plan has one line for each file.
        for path, missing in missing_teachers(job).items():
            yield self._missing.setdefault(path, missing)
        image_CHW = _published_image(job)
        labels_N = None
        if data is not None:
            checks += [
                partial(_check_images, job, data),
                *(partial(check_teacher_data, one, data.noted) for one in each_teacher(job)),
            ]
            image_CHW, labels_N = data.image_CHW, _trained_on(job, data.labels_N)
        if image_CHW is not None:
            checks.append(partial(self._check_networks, job, image_CHW, labels_N))
        for check in checks:
            try:
                check()
            except Exception as error:
                yield error

    def _check_networks(
        self, job: Config, image_CHW: tuple[int, int, int], labels_N: Tensor | None
    ) -> None:
        """Check the scales and the feature methods of a job with its two networks.

        Args:
            job: the job.
            image_CHW: channels, height and width of an image, in pixels.
            labels_N: class ids of the images that the student learns from; None if they are
                unknown. The feature methods are not checked then.

        Raises:
            ValueError: If a scale or a method does not fit the networks.
        """
        classes = job.dataset.num_classes
        name = f"student={job.student.name}"
        of_student = self._map_sides_of(name, job.student.model, classes, image_CHW)
        if job.distiller.loss:
            sides = {name: of_student}
            for one in each_teacher(job):
                teachers_CHW = image_of_teacher(image_CHW, one.teacher.image_size)
                name = f"teacher={one.teacher.name}"
                sides[name] = self._map_sides_of(name, one.teacher.model, classes, teachers_CHW)
            check_scales(job, sides, image_CHW)
        if labels_N is not None:
            self._check_last_batch(job, image_CHW, len(labels_N))
        if job.features and labels_N is not None:
            cpu = torch.device("cpu")
            teacher = self._network(job.teacher.model, classes)
            student = student_network(
                job,
                self._network(job.student.model, classes),
                teacher,
                image_CHW=image_CHW,
                device=cpu,
            )
            build_features(
                job, student, teacher, image_CHW=image_CHW, labels_N=labels_N, device=cpu
            )

    def _check_last_batch(self, job: Config, image_CHW: tuple[int, int, int], images: int) -> None:
        """Raise ValueError if the student cannot train on a last batch of one image.

        `images` is the number of images that the student learns from.
        """
        if job.trainer.devices == 1 and leaves_one_image(job, images):
            student = self._network(job.student.model, job.dataset.num_classes)
            check_one_image(job, student, images, image_CHW)

    def data_change(self, job: Config) -> str:
        """Return in words how the data of a finished job have changed since the job was trained.

        Return "" if the data are the same, if result.json does not describe the earlier data, or if
        the present data cannot be loaded. Nothing is downloaded. Raise record.Damaged if
        result.json is damaged.
        """
        result = record.read_result(Path(job.run_dir))
        if not result.get("data"):
            return ""
        key = canonical(job.dataset.load)
        if key not in self._fingerprints:
            self._fingerprints[key] = present_fingerprint(job)
        return data_changed(result, self._fingerprints[key])

    def run_MB(self, job: Config) -> float | None:
        """Return the estimated disk space of a run in megabytes; None if its student has an error.

        A run directory keeps two checkpoints and a copy of the best weights. A checkpoint holds the
        student's weights and the optimizer's buffers, each as large as the weights. SGD counts with
        one buffer, any other optimizer with two.
        """
        key = canonical([job.student.model, job.dataset.num_classes])
        if key not in self._weights_MB:
            try:
                with torch.device("meta"):
                    network = instantiate(job.student.model, num_classes=job.dataset.num_classes)
                tensors = network.state_dict().values()
                self._weights_MB[key] = sum(one.nbytes for one in tensors) / 1e6
            except Exception:  # a network may raise anything; the checks of the job say why
                self._weights_MB[key] = None
        weights = self._weights_MB[key]
        buffers = 2
        if str(job.optimizer.algorithm.get("_target_")).endswith(".SGD"):
            buffers = 1
        return None if weights is None else weights * (2 * (1 + buffers) + 1)

    def _data_set(self, job: Config) -> DataSet:
        key = canonical([job.dataset.load, job.dataset.size])
        if key not in self._data_sets:
            # Remember an error, too, so that no other job tries the download again.
            self._data_sets[key] = _load(job)
        found = self._data_sets[key]
        if isinstance(found, Exception):
            raise found
        return found

    def _network(self, model: dict[str, Any], num_classes: int) -> nn.Module:
        """Return a network on the CPU, for checks that need its layers."""
        key = (canonical(model), num_classes)
        if key not in self._networks:
            self._networks[key] = build_network(model, num_classes, 0, torch.device("cpu"))
        return self._networks[key]

    def _map_sides_of(
        self, name: str, model: dict[str, Any], num_classes: int, image_CHW: tuple[int, ...]
    ) -> tuple[int, ...]:
        """Return height and width of the network's logit map, computed without weights.

        Raise ValueError if the network does not accept images of the shape `image_CHW`. The message
        calls the network `name`, such as "student=timm".
        """
        key = (canonical(model), num_classes, image_CHW)
        if key not in self._map_sides:
            with torch.device("meta"), torch.no_grad():
                network: nn.Module = instantiate(model, num_classes=num_classes)
                try:
                    logit_map = network.eval()(torch.empty(1, *image_CHW))
                except NotImplementedError:  # not possible without weights, whatever the images
                    raise
                except (RuntimeError, AssertionError) as error:  # timm asserts the size
                    raise wrong_images(name, network, image_CHW, error) from error
            self._map_sides[key] = tuple(logit_map.shape[2:])
        return self._map_sides[key]


def _check_settings(job: Config) -> None:
    """Raise ValueError if the devices, the loss or the optimizer of a job do not work here."""
    check_places(job.trainer.device, job.trainer.devices)
    check_objective(job, pick_device(job.trainer.device))


def _check_images(job: Config, data: DataSet) -> None:
    """Raise ValueError if the data do not fit the batches, the memory or the record of a job."""
    check_label_sets(job, data.labels_N)
    device = pick_device(job.trainer.device)
    C, H, W = data.image_CHW
    check_batch_size(job, len(_trained_on(job, data.labels_N)), data.size)
    # Raises if mean and std do not fit the channels.
    Normalise(job.dataset.mean, job.dataset.std, C, W, torch.device("cpu"))
    check_images(job, (data.size, H, W, C), device, of_files=data.of_files)
    if job.sweep.rerun is not Rerun.all:  # `all` sets earlier records aside
        check_same_data(job, data.noted)
    if data.of_files:
        check_cache(job)
        check_workers(job)


def _published_image(job: Config) -> tuple[int, int, int] | None:
    """Return (C, H, W) of the images of a data set of this package; None for another data set."""
    loader = str(job.dataset.load.get("_target_")).removeprefix("sddlskd.datasets.")
    if loader in OF_FILES:
        return 3, job.dataset.size, job.dataset.size
    side = SIDES.get(loader)
    return None if side is None else (3, side, side)


def _trained_on(job: Config, labels_N: Tensor) -> Tensor:
    """Return the labels of the images that the student of a job learns from, -1 for none."""
    d = job.dataset
    if not d.val_fraction and d.train_fraction == 1:
        return labels_N
    mask_N, seen_N = shown(labels_N, d.val_fraction, d.train_fraction, d.num_classes, d.unlabelled)
    return seen_N[mask_N]


def _load(job: Config) -> DataSet | Exception:
    """Return the facts about the job's data set, or the error that its loader raises."""
    try:
        splits = load_splits(job)
    except Exception as error:
        return error
    N, H, W, C = shape_of(job, splits)
    of_files = isinstance(splits.train, Files)
    return DataSet(N, (C, H, W), of_files, fingerprint(splits), splits.train.labels_N)


def problems(jobs: Sequence[Config], runs_locally: bool = True) -> list[tuple[Config, str]]:
    """Check each job by `Checker.check`, and return (job, reason) of the jobs that cannot run.

    The reason is the first error that the check raises, of any type, as one line. The pairs have
    the order of `jobs`; there are none if all jobs can run. Missing data sets are downloaded.

    If `runs_locally` is false, the jobs are going to run on other machines. It is then not checked
    whether this machine has the devices (trainer.device, trainer.devices) and the cores
    (dataset.workers) that they ask for.
    """
    checker = Checker()
    found = []
    for job in _with_progress(jobs):
        try:
            check_one_process(job)
            checker.check(job if runs_locally else _on_any_device(job))
        except Exception as error:  # a network or a data set may raise anything
            found.append((job, explain(error)))
    return found


def obstacles(
    jobs: Sequence[Config], runs_locally: bool = True
) -> tuple[list[tuple[Config, str]], list[str]]:
    """Return everything that keeps jobs from running, for a plan that is only printed.

    Nothing is downloaded.

    Args:
        jobs: jobs to check by `Checker.obstacles`.
        runs_locally: whether the jobs are going to run on this machine, as for `problems`.

    Returns:
        Two lists: (job, reason) of each obstacle, in the order of `jobs`, with several entries for
        a job that has several; and the missing files of data sets that the jobs would download,
        which are not among the obstacles.
    """
    checker = Checker()
    found: list[tuple[Config, str]] = []
    downloads: dict[str, None] = {}
    for job in _with_progress(jobs):
        placed = job
        if not runs_locally:
            placed = _on_any_device(job)  # has one process
            try:
                check_one_process(job)
            except ValueError as refusal:
                found.append((job, explain(refusal)))
        for error in checker.obstacles(placed):
            if isinstance(error, Downloadable):
                downloads[str(error).removeprefix("there is no ")] = None
            else:
                found.append((job, explain(error)))
    return found, list(downloads)


def _with_progress(jobs: Sequence[Config]) -> Iterator[Config]:
    """Yield the jobs, and log every ten seconds (EVERY_S) how many of them have been checked."""
    last = time.monotonic()
    for number, job in enumerate(jobs):
        if time.monotonic() - last >= EVERY_S:
            last = time.monotonic()
            log.info("checked %d of %s", number, counted(len(jobs), "job"))
        yield job


def _on_any_device(job: Config) -> Config:
    """Return the job without its devices and workers, which this machine need not have."""
    return replace(
        job,
        trainer=replace(job.trainer, device="auto", devices=1),
        dataset=replace(job.dataset, workers=None),
    )


def report(
    todo: Sequence[Config], finished: Sequence[Config], runs_locally: bool = True
) -> dict[str, Any]:
    """Check the jobs of a sweep before it starts, and return what is wrong with them.

    Missing data sets are downloaded, unless `sweep.plan` of the first job in `todo` is set.

    Args:
        todo: jobs to run.
        finished: finished jobs.
        runs_locally: whether the jobs run on this machine.

    Returns:
        A dictionary of plain values for JSON, with these keys:

        - "problems": (index in `todo`, reason) of each job that cannot run; if `sweep.plan` is set,
          of each obstacle, of which a job may have several;
        - "downloads": missing files of data sets that the sweep would download; [] unless
          `sweep.plan` is set;
        - "changed": index in `finished` of each job that learnt from another teacher file than the
          current one;
        - "other_data": (index in `finished`, how the data differ) of each job that was trained on
          other data than its data set has now;
        - "devices": devices of this machine, such as ["cuda:0", "cuda:1"] or ["cpu"];
        - "teachers": missing teachers that jobs train first, such as "resnet32x4 for cifar100 (240
          epochs)";
        - "run_MB": estimated disk space of the run of each job in `todo` in megabytes, None if it
          is not known, for example for a network that is missing; [] unless `sweep.plan` is set.

    Raises:
        record.Damaged: If the result.json of a finished job is damaged.
    """
    checker = Checker()
    index_of = {id(job): index for index, job in enumerate(todo)}
    downloads: list[str] = []
    run_MB: list[float | None] = []
    if todo and todo[0].sweep.plan:
        found, downloads = obstacles(todo, runs_locally)
        run_MB = [checker.run_MB(job) for job in todo]
    else:
        found = problems(todo, runs_locally)
    return {
        "problems": [(index_of[id(job)], reason) for job, reason in found],
        "downloads": downloads,
        "changed": [
            index
            for index, job in enumerate(finished)
            if teacher_changed(job, record.read_result(Path(job.run_dir)))
        ],
        "other_data": [
            (index, change)
            for index, job in enumerate(finished)
            if (change := checker.data_change(job))
        ],
        "devices": _devices(),
        "teachers": list(
            dict.fromkeys(_teacher_line(one) for job in todo for one in trained_first(job))
        ),
        "run_MB": run_MB,
    }


def _devices() -> list[str]:
    """Return the GPUs of this machine, or without one, what trainer.device=auto stands for."""
    if torch.cuda.is_available():
        return [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return [str(pick_device("auto"))]


def _teacher_line(job: Config) -> str:
    return f"{job.student.name} for {job.dataset.name} ({counted(job.trainer.epochs, 'epoch')})"


def main() -> None:
    """Read jobs from stdin, check them, and write the dictionary of `report` to stdout as JSON.

    The pickled arguments of `report` come from stdin. Output of the checks, such as that of a
    user's network, goes to stderr. With --parent PID on the command line, this process ends when
    its parent, the process PID, ends.
    """
    parser = argparse.ArgumentParser(prog="python -m sddlskd.sweeps.precheck")
    parser.add_argument("--parent", type=int, help="process id; end when that process dies")
    refuse_another_checkout()
    log_to_terminal()
    if parent := parser.parse_args().parent:
        end_with_parent(parent)
    arguments = pickle.load(sys.stdin.buffer)
    answers = sys.stdout
    # A user's network or data set may print, which must not mix with the JSON.
    sys.stdout = sys.stderr
    answers.write(json.dumps(report(*arguments)))


if __name__ == "__main__":
    main()
