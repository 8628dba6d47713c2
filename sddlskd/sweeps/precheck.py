"""Checks that find invalid jobs before they start, without creating weights or writing files.

A sweep runs these checks in a separate process. The process that then waits for hours holds neither
torch nor images.
"""

import argparse
import json
import pickle
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sddlskd import record
from sddlskd.config import Config, Rerun, canonical
from sddlskd.config.targets import instantiate
from sddlskd.data.device import Normalise, trained_on
from sddlskd.datasets.arrays import Files
from sddlskd.datasets.fingerprint import fingerprint
from sddlskd.processes.parent import end_with_parent
from sddlskd.terminal.console import explain, refuse_another_checkout
from sddlskd.training.build import (
    build_network,
    check_batch_size,
    check_cache,
    check_images,
    check_objective,
    check_one_image,
    check_one_process,
    check_same_data,
    check_teacher,
    check_teacher_data,
    check_workers,
    data_changed,
    leaves_one_image,
    load_splits,
    present_fingerprint,
    shape_of,
    teacher_changed,
)
from sddlskd.training.devices import check_places, pick_device
from sddlskd.training.features import build_features, student_network

__all__ = ["main", "problems", "report"]


@dataclass(frozen=True)
class DataSet:
    """Facts about a data set that the checks need.

    Attributes:
        size: number N of training images, before some are held out for validation.
        image_CHW: channels, height and width in pixels of an image, as the networks receive it.
        of_files: whether the images are files that stay on disk.
        noted: fingerprint of the data: numbers of images, classes and a hash.
        labels_N: class ids of the training images, int64, (N,).
    """

    size: int
    image_CHW: tuple[int, int, int]
    of_files: bool
    noted: dict[str, Any]
    labels_N: Tensor


class Checker:
    """Checker of single jobs; an instance loads each data set and builds each network only once."""

    def __init__(self) -> None:
        self._data_sets: dict[str, DataSet | Exception] = {}
        self._fingerprints: dict[str, dict[str, Any] | None] = {}
        self._map_sides: dict[tuple[str, int, tuple[int, ...]], int] = {}
        self._networks: dict[tuple[str, int], nn.Module] = {}

    def check(self, job: Config) -> None:
        """Check that a job can run on this machine, without training it; download missing data.

        The checks cover the devices, the loss, the optimizer, the data, the teacher's file, the
        scales M, and the feature methods.

        Raises:
            FileNotFoundError: If the teacher's file is missing, and the job does not train the
                teacher first (teacher.train_if_missing).
            ValueError: If a setting, the data, the teacher's file or the job's run directory does
                not fit the job.
            Exception: Any other error that the code of a network or a data set raises.
        """
        check_places(job.trainer.device, job.trainer.devices)
        device = pick_device(job.trainer.device)
        check_objective(job, device)
        # Report a mistyped path before any data is downloaded.
        if job.teacher.checkpoint:
            check_teacher(job)
        data = self._data_set(job)
        labels_N = _trained_on(job, data.labels_N)
        check_batch_size(job, len(labels_N), data.size)
        C, H, W = data.image_CHW
        # Raises if mean and std do not fit the channels.
        Normalise(job.dataset.mean, job.dataset.std, C, W, torch.device("cpu"))
        check_images(job, (data.size, H, W, C), device, of_files=data.of_files)
        if job.sweep.rerun is not Rerun.all:  # `all` sets earlier records aside
            check_same_data(job, data.noted)
        check_teacher(job)
        check_teacher_data(job, data.noted)
        if data.of_files:
            check_cache(job)
            check_workers(job)
        classes = job.dataset.num_classes
        side = self._map_side(job.student.model, classes, data.image_CHW)
        if job.distiller.loss:
            side = min(side, self._map_side(job.teacher.model, classes, data.image_CHW))
            if max(job.M) > 2 * side:
                raise ValueError(f"M={job.M} is too fine: the largest scale here is {2 * side}")
        if job.trainer.devices == 1 and leaves_one_image(job, len(labels_N)):
            student = self._network(job.student.model, classes)
            check_one_image(job, student, len(labels_N), data.image_CHW)
        if job.features:
            cpu = torch.device("cpu")
            teacher = self._network(job.teacher.model, classes)
            student = student_network(
                job,
                self._network(job.student.model, classes),
                teacher,
                image_CHW=data.image_CHW,
                device=cpu,
            )
            build_features(
                job,
                student,
                teacher,
                image_CHW=data.image_CHW,
                labels_N=labels_N,
                device=cpu,
            )

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

    def _map_side(
        self, model: dict[str, Any], num_classes: int, image_CHW: tuple[int, int, int]
    ) -> int:
        """Return the shorter side of the network's logit map, computed without weights."""
        key = (canonical(model), num_classes, image_CHW)
        if key not in self._map_sides:
            with torch.device("meta"), torch.no_grad():
                network: nn.Module = instantiate(model, num_classes=num_classes)
                logit_map = network.eval()(torch.empty(1, *image_CHW))
            self._map_sides[key] = int(min(logit_map.shape[2:]))
        return self._map_sides[key]


def _trained_on(job: Config, labels_N: Tensor) -> Tensor:
    """Return the labels of the images that the student of a job learns from."""
    d = job.dataset
    if not d.val_fraction and d.train_fraction == 1:
        return labels_N
    return labels_N[trained_on(labels_N, d.val_fraction, d.train_fraction, d.num_classes)]


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
    """Return (job, reason) for each job that cannot run, in order; [] if all jobs can run.

    Each job is checked by `Checker.check`. If the jobs do not run on this machine, their devices
    and worker processes are left out. An error of any type becomes a reason, as one line.
    """
    checker = Checker()
    found = []
    for job in jobs:
        try:
            check_one_process(job)
            checker.check(job if runs_locally else _on_any_device(job))
        except Exception as error:  # a network or a data set may raise anything
            found.append((job, explain(error)))
    return found


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

    Args:
        todo: jobs to run.
        finished: finished jobs.
        runs_locally: whether the jobs run on this machine.

    Returns:
        A dictionary of plain values for JSON, with these keys:

        - "problems": (index in `todo`, reason) of each job that cannot run;
        - "changed": index in `finished` of each job that learnt from another teacher file than the
          current one;
        - "other_data": (index in `finished`, how the data differ) of each job that was trained on
          other data than its data set has now;
        - "devices": devices of this machine, such as ["cuda:0", "cuda:1"] or ["cpu"].

    Raises:
        record.Damaged: If the result.json of a finished job is damaged.
    """
    checker = Checker()
    index_of = {id(job): index for index, job in enumerate(todo)}
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return {
        "problems": [(index_of[id(job)], reason) for job, reason in problems(todo, runs_locally)],
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
        "devices": devices,
    }


def main() -> None:
    """Read jobs from stdin, check them, and write the dictionary of `report` to stdout as JSON.

    The pickled arguments of `report` come from stdin. Output of the checks, such as that
    of a user's network, goes to stderr. With --parent PID on the command line, this process ends
    when its parent, the process PID, ends.
    """
    parser = argparse.ArgumentParser(prog="python -m sddlskd.sweeps.precheck")
    parser.add_argument("--parent", type=int, help="process id; end when that process dies")
    refuse_another_checkout()
    if parent := parser.parse_args().parent:
        end_with_parent(parent)
    arguments = pickle.load(sys.stdin.buffer)
    answers = sys.stdout
    # A user's network or data set may print, which must not mix with the JSON.
    sys.stdout = sys.stderr
    answers.write(json.dumps(report(*arguments)))


if __name__ == "__main__":
    main()
