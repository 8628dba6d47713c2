"""Train one group of jobs: prepare data, teacher and networks, then open, train and close the runs.

A job is one training run, as its configuration describes it. The jobs of a group share their
batches and one teacher forward pass per batch.
"""

import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sddlskd import config as cfg
from sddlskd import record, tracking
from sddlskd.config import Config, Views
from sddlskd.data.streaming import Data
from sddlskd.datasets.fingerprint import fingerprint
from sddlskd.files import checkpoint
from sddlskd.record import FAILED, FINISHED, KILLED, Onlooker, Record
from sddlskd.terminal.progress import ProgressDisplay
from sddlskd.training import predictions
from sddlskd.training.begun import check_same_code, check_same_data, check_same_teacher
from sddlskd.training.build import (
    build_data,
    build_network,
    build_run,
    leave_as_teacher,
    load_splits,
)
from sddlskd.training.checks import (
    batch_size_cure,
    check_batches,
    check_maps,
    check_objective,
    check_ranks,
    check_targets,
    check_teacher,
    trained_first,
)
from sddlskd.training.devices import describe, device_failure, number_formats, pick_device
from sddlskd.training.evaluation import evaluate
from sddlskd.training.features import build_features, student_network
from sddlskd.training.halving import Halving
from sddlskd.training.image_folders import log_image_folder
from sddlskd.training.loop import failures_of, train
from sddlskd.training.objective import Feature
from sddlskd.training.outcomes import may_retry
from sddlskd.training.ranks import Ranks
from sddlskd.training.run import Run
from sddlskd.training.several import Teachers, build_teachers
from sddlskd.training.size import size_of
from sddlskd.training.stop import Stop
from sddlskd.training.teacher import Resized, Teacher
from sddlskd.training.teacher_cache import TeacherCache

__all__ = ["fit_group"]


@dataclass
class _Group:
    """Jobs that share batches and teacher, with everything that is built before their runs open.

    Attributes:
        jobs: the jobs.
        students: network of each job's student, in the order of `jobs`.
        features: methods of each job by name, in the order of `jobs`.
        data: the batches of this rank.
        teacher: the shared teacher, or teachers; None without distillation.
        teacher_network: network of the teacher with its BatchNorm, which resizes the images if the
            teacher sees another size; None without distillation and with several teachers.
        facts: facts about the data and the teacher for each job's result.json, in the order of
            `jobs`.
        device: device of this rank.
        ranks: the ranks that share each batch.
        steps: batches per epoch.
        launched: whether a launch has recorded the versions of the user's own code.
    """

    jobs: Sequence[Config]
    students: Sequence[nn.Module]
    features: Sequence[Mapping[str, Feature]]
    data: Data
    teacher: Teacher | TeacherCache | Teachers | None
    teacher_network: nn.Module | None
    facts: Sequence[dict[str, Any]]
    device: torch.device
    ranks: Ranks
    steps: int
    launched: bool


@dataclass
class _OpenRuns:
    """The runs of a group whose run directories are open.

    Attributes:
        jobs: the jobs whose runs could be built or resumed.
        runs: the run of each of these jobs.
        mirror: the copies of the runs; None without tracking and on ranks other than 0.
    """

    jobs: list[Config]
    runs: list[Run]
    mirror: tracking.Copies | None

    def on_change(self, run: Run) -> None:
        """Tell the copies that a run's record has changed; do nothing without copies."""
        if self.mirror:
            self.mirror.update(run.record.folder)

    def report_unfinished(self, status: str, reason: str, *, told: bool = False) -> None:
        """Write an outcome for every run that has none yet, and tell the mirror.

        A run whose result.json cannot be written, as on a full disk, is skipped.

        Args:
            status: FAILED or KILLED.
            reason: why the runs end, in one line.
            told: see `Run.report`.
        """
        for run in self.runs:
            if run.alive:
                with suppress(OSError):
                    run.report(status, reason, told=told)
                    self.on_change(run)


def fit_group(
    jobs: Sequence[Config], stop: Stop, sweep: str | None, ranks: Ranks, launched: bool = False
) -> None:
    """Train the students of one group of jobs, and write the outcome of each run.

    On a single rank, a run that fails alone is marked FAILED while the others go on, and a signal
    during training is no error: the runs that it stopped are marked KILLED. Any error that concerns
    all runs, such as one of the data or of the teacher, is raised.

    Args:
        jobs: jobs with the same `config.sharing_key`.
        stop: the stop request.
        sweep: name of the sweep in MLflow; None for jobs without a sweep.
        ranks: the ranks that share each batch.
        launched: see `fit.fit`.
    """
    _check_group(jobs, ranks)
    with number_formats(jobs[0].trainer.tf32):
        group = _prepare(jobs, stop, sweep, ranks, launched)
        with stop.acting(at_once=False), _open_runs(group) as opened:
            _train_runs(group, opened, stop)
            _close_runs(group, opened, stop)


def _check_group(jobs: Sequence[Config], ranks: Ranks) -> None:
    """Raise ValueError if the jobs cannot be trained as one group by these ranks."""
    if len({cfg.sharing_key(job) for job in jobs}) > 1:
        raise ValueError(
            "these jobs cannot share batches and teacher; "
            "call fit once for each value of config.sharing_key"
        )
    least = 2 * ranks.world_size
    for job in (jobs[0], *trained_first(jobs[0])):
        if ranks.world_size > 1 and job.trainer.batch_size < least:
            raise ValueError(
                f"trainer.batch_size={job.trainer.batch_size} is too small for "
                f"{ranks.world_size} processes to share; give at least {least}, two images each: "
                f"{batch_size_cure(job, str(least))}"
            )


def _prepare(
    jobs: Sequence[Config], stop: Stop, sweep: str | None, ranks: Ranks, launched: bool
) -> _Group:
    """Build data, networks and teacher of a group of jobs, and register the jobs in MLflow.

    Train the teachers first whose files are missing, if the jobs allow it.

    Args:
        jobs: the jobs.
        stop: the stop request, which also ends the training of a teacher.
        sweep: name of the sweep in MLflow; None for jobs without a sweep.
        ranks: the ranks that share each batch.
        launched: see `fit.fit`.

    Returns:
        The group, before any of its run directories is opened.
    """
    first = jobs[0]
    classes = first.dataset.num_classes
    device = ranks.device or pick_device(first.trainer.device)
    _check_without_data(jobs, device, ranks)
    # Rank 0 goes first, so that files that are downloaded on first use are downloaded once.
    with ranks.rank_zero_first():
        data, noted = _load_data(jobs, device, ranks)
        students = [
            build_network(
                job.student.model, classes, job.seed, device, new_ends=job.dataset.new_ends
            )
            for job in jobs
        ]
    noted = ranks.broadcast(noted)
    plain_students = [ranks.with_shared_norm(student) for student in students]
    networks = [
        build_network(one.teacher.model, classes, 0, device) for one in cfg.each_teacher(first)
    ]
    teacher_network = networks[0] if len(networks) == 1 else None
    students = _student_networks(jobs, plain_students, teacher_network, data, device)
    # Before a missing teacher is trained, which may take long.
    for job, student in zip(jobs, students, strict=True):
        _check_maps(job, student, networks, data, device)
        check_batches(job, student, data, ranks)
        _build_features(job, student, teacher_network, data, device)
    _check_batches_of_teachers(first, networks, data, ranks)
    teacher: Teacher | TeacherCache | Teachers | None = None
    facts: list[dict[str, Any]] = [{"data": noted} for _ in jobs]
    if networks:
        train_teacher = partial(_train_teacher, stop=stop, ranks=ranks)
        teacher, of_teacher = build_teachers(
            jobs, networks, data, device, train_teacher, ranks, noted
        )
        facts = [{**one, **more} for one, more in zip(facts, of_teacher, strict=True)]
        # Once more, because the teacher has its weights now.
        students = _student_networks(jobs, plain_students, teacher_network, data, device)
    features = [
        _build_features(job, student, teacher_network, data, device)
        for job, student in zip(jobs, students, strict=True)
    ]
    if ranks.is_rank_zero and any(_is_unregistered(job) for job in jobs):
        jobs = tracking.register(jobs, sweep)
    if teacher_network is not None and first.teacher.image_size:
        teacher_network = Resized(teacher_network, first.teacher.image_size)
    steps = min(data.steps_per_epoch, first.trainer.max_steps or data.steps_per_epoch)
    return _Group(
        jobs=jobs,
        students=students,
        features=features,
        data=data,
        teacher=teacher,
        teacher_network=teacher_network,
        facts=facts,
        device=device,
        ranks=ranks,
        steps=steps,
        launched=launched,
    )


def _check_without_data(jobs: Sequence[Config], device: torch.device, ranks: Ranks) -> None:
    """Make the checks of a group's jobs that need neither data nor networks.

    They come first, so that a mistyped word fails before any data is downloaded.
    """
    for job in jobs:
        check_targets(job)
        check_objective(job, device)
        check_ranks(job, ranks.world_size)
    if ranks.is_rank_zero:
        tracking.check_packages(jobs)
        tracking.check_reachable(jobs)
    for one in cfg.each_teacher(jobs[0]):
        if one.teacher.checkpoint:
            check_teacher(one)


def _check_batches_of_teachers(
    job: Config, networks: Sequence[nn.Module], data: Data, ranks: Ranks
) -> None:
    """Check that the teachers that are trained first can take their batches; see `check_batches`.

    `networks` are those of all teachers of the job. They are left in eval mode.
    """
    for one, network in zip(cfg.each_teacher(job), networks, strict=True):
        for teacher_job in trained_first(one):
            # A teacher that learns from other images is checked by its own training.
            if teacher_job.dataset.train_fraction == job.dataset.train_fraction:
                check_batches(teacher_job, network, data, ranks)
                network.eval()


def _check_maps(
    job: Config,
    student: nn.Module,
    teachers: Sequence[nn.Module],
    data: Data,
    device: torch.device,
) -> None:
    """Check the logit maps of a student beside each of its teachers; see `check_maps`."""
    if not teachers:
        check_maps(job, student, None, data, device)
    for one, teacher in zip(cfg.each_teacher(job), teachers, strict=True):
        check_maps(one, student, teacher, data, device)


def _student_networks(
    jobs: Sequence[Config],
    students: Sequence[nn.Module],
    teacher: nn.Module | None,
    data: Data,
    device: torch.device,
) -> list[nn.Module]:
    """Return the network that each job trains as its student; see `student_network`.

    `teacher` is None for jobs without a teacher, and for jobs with several, which have no methods.
    """
    if teacher is None:
        return list(students)
    return [
        student_network(job, student, teacher, image_CHW=data.image_shape, device=device)
        for job, student in zip(jobs, students, strict=True)
    ]


def _build_features(
    job: Config, student: nn.Module, teacher: nn.Module | None, data: Data, device: torch.device
) -> dict[str, Feature]:
    """Return the methods of a job by name; {} if the job has no teacher or several teachers."""
    if teacher is None:
        return {}
    return build_features(
        job,
        student,
        teacher,
        image_CHW=data.image_shape,
        labels_N=data.train_labels,
        device=device,
    )


def _load_data(
    jobs: Sequence[Config], device: torch.device, ranks: Ranks
) -> tuple[Data, dict[str, Any] | None]:
    """Return the batches of a group for this rank, and on rank 0 the fingerprint of its data set.

    The batches have strong views if a job asks for them, and plain ones if the teacher sees them.
    """
    job = jobs[0]
    strong = any(job.dataset.views == Views.weak_strong for job in jobs)
    splits = load_splits(job)
    noted = None
    if ranks.is_rank_zero:
        noted = fingerprint(splits)
        log_image_folder(job, splits, noted)
    data = build_data(
        job, device, splits=splits, rank=ranks.rank, ranks=ranks.world_size, strong=strong
    )
    return data, noted


def _is_unregistered(job: Config) -> bool:
    return job.tracking.enabled and job.tracking.experiment_id is None


def _train_teacher(job: Config, stop: Stop, ranks: Ranks) -> None:
    """Train the network of a teacher to the end, as a group of one job.

    Args:
        job: the job of the teacher, see `config.teacher_job`.
        stop: the stop request.
        ranks: the ranks that train the teacher together.

    Raises:
        KeyboardInterrupt: If a signal stopped the training.
        ValueError: If the training did not finish.
    """
    fit_group([job], stop, None, ranks)
    if ranks.all_reduce_max(lambda: [stop.signal or 0])()[0]:
        raise KeyboardInterrupt
    result = ranks.broadcast(record.read_result(Path(job.run_dir)))
    if result["status"] != FINISHED:
        raise ValueError(
            f"training teacher={job.student.name} ended as {result['status']}: {result['reason']}"
        )


@contextmanager
def _open_runs(group: _Group) -> Iterator[_OpenRuns]:
    """Open the run directories of a group for a block, and build or resume the runs in them.

    A run that cannot be built or resumed is marked FAILED, and the other runs go on. Its error is
    raised if no run is left, if several ranks share the run, or if the device is full.

    Args:
        group: the group.

    Yields:
        The runs, which are reported as RUNNING.
    """
    opened = _OpenRuns([], [], None)
    refused: list[tuple[Path, Exception]] = []
    with ExitStack() as stack:
        # With plain progress, the lines of several workers mix. Their jobs may have different
        # teachers, so the labels name the teacher.
        plain = group.jobs[0].trainer.progress == cfg.Progress.plain
        labels = cfg.titles(group.jobs, teacher=plain)
        parts = zip(group.jobs, labels, group.students, group.features, strict=True)
        for job, label, student, features in parts:
            directory = _open_directory(job, group.ranks, stack)
            try:
                run = _build_run(job, label, student, features, directory, group)
            except Exception as error:
                concerns_all = isinstance(error, torch.OutOfMemoryError) or device_failure(error)
                if group.ranks.world_size > 1 or concerns_all:
                    raise
                reason = f"{type(error).__name__}: {error}"
                extra = None
                if len(group.jobs) == 1:  # its error is raised, and printed by the caller
                    extra = record.ONLY_IN_FILE
                directory.log.error("%s: failed: %s", label, reason, extra=extra)
                directory.write_outcome(FAILED, reason)
                refused.append((directory.folder, error))
            else:
                opened.jobs.append(job)
                opened.runs.append(run)
        if group.ranks.is_rank_zero and any(map(tracking.is_copied, group.jobs)):
            # Entered last, so that the mirror closes first, while the records are still locked.
            opened.mirror = stack.enter_context(closing(tracking.Copies(group.jobs)))
            for folder, _ in refused:
                opened.mirror.update(folder)
        if not opened.runs:
            raise refused[0][1]
        _report_running(group, opened)
        yield opened


def _open_directory(job: Config, ranks: Ranks, stack: ExitStack) -> Record | Onlooker:
    """Open the run directory of a job, on rank 0 for writing; `stack` closes it."""
    if not ranks.is_rank_zero:
        return Onlooker(job)
    opened = stack.enter_context(closing(Record(job)))
    stack.callback(opened.note_run_id)
    return opened


def _build_run(
    job: Config,
    label: str,
    student: nn.Module,
    features: Mapping[str, Feature],
    directory: Record | Onlooker,
    group: _Group,
) -> Run:
    """Return the run of a job, resumed from its checkpoint if there is one.

    Raise ValueError if the checkpoint was made with other data, with another teacher file or with
    another version of the user's own code.
    """
    if group.ranks.is_rank_zero:
        facts = group.facts[0]  # the data and the files of the teachers are those of all jobs
        check_same_data(job, facts["data"])
        check_same_teacher(directory.folder, facts)
        check_same_code(job, directory.folder, group.launched)
    return build_run(
        job,
        student,
        directory,
        group.device,
        group.steps,
        images=group.data.train_size,
        label=label,
        ranks=group.ranks,
        features=features,
    )


def _report_running(group: _Group, opened: _OpenRuns) -> None:
    """Write down what the runs are computed with, and report them as RUNNING."""
    environment = f"{record.versions()}, {describe(group.device)}"
    if group.ranks.world_size > 1:
        environment += f", {group.ranks.world_size} ranks"
    facts = {job.run_dir: one for job, one in zip(group.jobs, group.facts, strict=True)}
    for job, run in zip(opened.jobs, opened.runs, strict=True):
        info = {**facts[job.run_dir], "group_size": len(opened.runs)}
        size = size_of(run.model, group.data.image_shape)
        run.start({**info, "environment": environment, **size}, crowded=len(opened.runs) > 1)
        opened.on_change(run)


def _train_runs(group: _Group, opened: _OpenRuns, stop: Stop) -> None:
    """Train the runs until the last epoch is done, all runs have failed, or a signal stops them.

    Raise an error that concerns all runs, such as an error of the data or the teacher. On a single
    rank, the outcome of all runs is then written here. With several ranks, the caller writes the
    outcomes after all ranks have ended, because only then it knows which rank failed first.
    """
    first = group.jobs[0]
    view = ProgressDisplay(
        opened.runs,
        cfg.titles(opened.jobs),
        mode=first.trainer.progress if group.ranks.is_rank_zero else "off",
        epochs=first.trainer.epochs,
        steps=group.steps,
        batch=first.trainer.batch_size,
    )
    try:
        with view:
            train(
                opened.runs,
                group.data,
                group.teacher,
                epochs=first.trainer.epochs,
                steps=group.steps,
                log_every=first.trainer.log_every,
                save_every_s=60 * first.checkpoint.every_minutes,
                precision=first.trainer.precision,
                halving=_halving_of(group),
                ranks=group.ranks,
                view=view,
                stop=stop,
                on_change=opened.on_change,
            )
    except KeyboardInterrupt:
        stop.signal = stop.signal or signal.SIGINT
        # The other ranks may be at another point of the program, so do not communicate with them
        # any more. A single rank goes on to close the runs.
        if group.ranks.world_size > 1:
            opened.report_unfinished(KILLED, stop.reason)
            raise
    except Exception as error:
        if group.ranks.world_size == 1:
            # After out-of-memory the caller may retry with fewer runs.
            retry = may_retry(opened.jobs, error) or device_failure(error)
            status = KILLED if retry else FAILED
            opened.report_unfinished(status, f"{type(error).__name__}: {error}", told=True)
        raise


def _halving_of(group: _Group) -> Halving:
    """Return the halving of a group, and note in its run directories which runs are compared.

    These runs are those of the group, and those that earlier processes have noted for a run of the
    group that has ended an epoch. A resumed group may lack runs that have ended before.
    """
    epochs = group.jobs[0].sweep.halving
    if not epochs or not group.ranks.is_rank_zero:
        return Halving(epochs, [])
    folders = [Path(job.run_dir) for job in group.jobs]
    begun = [folder for folder in folders if record.read_rows(folder)]
    noted = [rival for folder in begun for rival in record.read_rivals(folder)]
    rivals = list(dict.fromkeys([*noted, *folders]))
    for folder in folders:
        record.note_rivals(folder, rivals)
    return Halving(epochs, rivals)


def _close_runs(group: _Group, opened: _OpenRuns, stop: Stop) -> None:
    """Finish the runs that are trained to the end, and report the runs that were stopped."""
    for job, run in zip(opened.jobs, opened.runs, strict=True):
        if run.alive:
            with failures_of(run, opened.on_change):
                if run.epoch <= job.trainer.epochs:
                    run.report(KILLED, stop.reason)
                elif group.ranks.is_rank_zero:
                    _finish(job, run, group.teacher_network, group.data)
                opened.on_change(run)


def _finish(job: Config, run: Run, teacher_network: nn.Module | None, data: Data) -> None:
    """Write the final files of a trained student, then mark the run FINISHED.

    FINISHED comes last, because a finished run is never run again.
    """
    leave_as_teacher(job, run, data)
    if job.tracking.predictions:
        arrays = predictions.collect(run.model, teacher_network, data.test_batches(), job.M)
        # The sample is empty if no test image has regions that differ.
        if len(arrays.get("sample", ())):
            arrays["images"] = data.test_images(arrays["sample"].tolist()).numpy()
        predictions.write(run.record.folder / "predictions.npz", arrays)
    # The held-out validation images have selected the best epoch, so its accuracy on the test split
    # is unbiased.
    if job.dataset.val_fraction:
        run.model.load_state_dict(checkpoint.read(run.record.folder / "best.ckpt")["model"])
        run.model.eval()
        found = evaluate(run.forward, data.test_batches(), run.precision)
        run.info |= {f"test_{name}": found[name] for name in ("top1", "mAP") if name in found}
    run.report(FINISHED)
