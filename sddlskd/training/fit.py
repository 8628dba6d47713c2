"""Train the students of a list of jobs; all students share one teacher forward pass per batch.

A job is one training run, as its configuration describes it. `fit` takes the configurations.
`_fit_group` prepares data, teacher and networks, opens the runs, trains them and closes them. The
training loop and the code that it calls never see a configuration.
"""

import logging
import math
import signal
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from sddlskd import config as cfg
from sddlskd import record, tracking
from sddlskd.config import Config, Views
from sddlskd.data.streaming import Data
from sddlskd.datasets.arrays import Files, Splits
from sddlskd.datasets.fingerprint import fingerprint
from sddlskd.datasets.folders import left_out
from sddlskd.files import checkpoint
from sddlskd.record import FAILED, FINISHED, KILLED, PRUNED, RUNNING, InUse, Onlooker, Record
from sddlskd.terminal.console import log_to_terminal
from sddlskd.terminal.progress import ProgressDisplay
from sddlskd.terminal.words import counted
from sddlskd.training import predictions
from sddlskd.training.build import (
    build_data,
    build_network,
    build_run,
    leave_as_teacher,
    load_splits,
    present_fingerprint,
)
from sddlskd.training.checks import (
    batch_size_cure,
    check_batches,
    check_maps,
    check_objective,
    check_same_data,
    check_targets,
    check_teacher,
    teacher_changed,
    trained_first,
)
from sddlskd.training.devices import (
    DeviceFailure,
    check_places,
    describe,
    device_failure,
    number_formats,
    pick_device,
)
from sddlskd.training.evaluation import evaluate
from sddlskd.training.features import build_features, student_network
from sddlskd.training.halving import Halving
from sddlskd.training.loop import failures_of, train
from sddlskd.training.objective import Feature
from sddlskd.training.ranks import (
    Cause,
    RankFailed,
    Ranks,
    has_launcher,
    process_group,
    spawn,
    unblock_signals,
)
from sddlskd.training.run import Run
from sddlskd.training.several import Teachers, build_teachers
from sddlskd.training.size import size_of
from sddlskd.training.stop import Stop
from sddlskd.training.teacher import Resized, Teacher
from sddlskd.training.teacher_cache import TeacherCache

__all__ = ["fit"]

log = logging.getLogger(__name__)

IMAGE_FOLDER = "sddlskd.datasets.image_folder"  # loader of data sets of the user's own


def fit(
    configs: Sequence[Config | DictConfig],
    *,
    sweep: str | None = None,
    stop: Stop | None = None,
    launched: bool = False,
) -> list[dict[str, Any]]:
    """Train one student per configuration, side by side on the same batches and with one teacher.

    A job is one training run, and its status is in result.json in its run directory:

    - A job that is FINISHED is not run again. A job that halving has dropped (PRUNED) is not run
      again if it still has `sweep.halving`. Any other job continues from its newest checkpoint, or
      begins if it has none.
    - If a single run raises an error, the run becomes FAILED and the other runs go on. If several
      processes share each batch, the other runs go on only after an infinite or NaN loss; after any
      other error they become KILLED.
    - If an error concerns all runs, the runs that have started become FAILED, and the error is
      raised. After out-of-memory, several runs that halving does not compare do not become FAILED,
      because the caller may train fewer of them together. After a failure of the device, the runs
      become KILLED, because another device may train them.
    - If a signal stops runs during training, they become KILLED, and no error is raised.

    If the environment variable `WORLD_SIZE` is above 1, this process joins a group of processes
    that share each batch. Otherwise the function starts `trainer.devices` processes if that setting
    is above 1.

    Args:
        configs: the jobs, at least one, with equal `config.sharing_key` (same data, teacher and
            length of training). A DictConfig, as Hydra composes it, is resolved first.
        sweep: name of the sweep in MLflow; None for jobs without a sweep.
        stop: stop request of a caller that handles signals beyond this call; None to handle signals
            during this call only.
        launched: whether a launch has recorded the versions of the user's own code. A job whose
            code has changed since is then refused. Otherwise a run that has not begun records the
            versions that this process imported.

    Returns:
        The content of each job's result.json, in the order of `configs`.

    Raises:
        ValueError, OSError: If a setting, the data, the teacher file or a run directory cannot be
            used. The message is one line.
        InUse: If another process has a run directory open. The error is a ValueError.
        DeviceFailure: If the device is missing or broken. The error is a ValueError.
        torch.OutOfMemoryError: If the runs do not fit on the device together; fewer runs may fit.
        RankFailed: If one of several processes ended early, and no single run is the cause.
        KeyboardInterrupt: If a signal asked to stop before training started.
        Exception: Any other error that concerns all runs, such as Hydra's InstantiationException if
            a loader of data or a network raises an error.
    """
    jobs = [c if isinstance(c, Config) else cfg.resolve(c) for c in configs]
    trainer = jobs[0].trainer
    stop = stop or Stop()
    begun = time.time()
    with stop.listening(), process_group(trainer.device, trainer.timeout_s) as ranks:
        unblock_signals()
        ended = [*_finished(jobs, ranks), *_pruned(jobs, ranks)]
        todo = list({job.run_dir: job for job in jobs if job not in ended}.values())
        try:
            if todo and ranks.world_size == 1 and trainer.devices > 1:
                _fit_on_ranks(todo, stop, sweep, launched)
            elif todo:
                # Only rank 0 reacts at once; the other ranks learn from rank 0 that it stopped.
                with stop.acting(at_once=ranks.is_rank_zero):
                    _fit_group(todo, stop, sweep, ranks, launched)
        except InUse:
            raise  # the process that has the run directory open writes its record
        except Exception as error:
            ranks.report_failure(error)
            # After out-of-memory the caller may retry with fewer runs.
            may_retry = _may_retry(todo, error)
            if ranks.is_rank_zero and not has_launcher() and not may_retry:
                # A single process has written the outcome of each run that had started.
                since = begun if ranks.world_size > 1 else math.inf
                cause = ranks.first_failure() or Cause.of(0, error)
                _mark_failed(todo, cause, begun, since)
            failure = device_failure(error)
            if failure and failure is not error:
                raise failure from error
            raise
        results: dict[str, Any] = ranks.broadcast({job.run_dir: _result(job) for job in jobs})
    return [results[job.run_dir] for job in jobs]


def _result(job: Config) -> dict[str, Any]:
    return record.read_result(Path(job.run_dir))


def _finished(jobs: Sequence[Config], ranks: Ranks) -> list[Config]:
    """Return the jobs that rank 0 finds FINISHED, and log that they are not run again.

    Raise ValueError if such a job was trained on other data than its data set has now.
    """
    found = [
        job.run_dir for job in jobs if record.holds(job) and _result(job).get("status") == FINISHED
    ]
    run_dirs = ranks.broadcast(found)
    finished = [job for job in jobs if job.run_dir in run_dirs]
    refusal = ""
    if ranks.is_rank_zero:
        refusal = _why_other_data(finished)
    if refusal := ranks.broadcast(refusal):
        raise ValueError(refusal)
    for job in finished:
        log.info(
            "%s is finished already; to run again, delete it or choose another seed or run_dir",
            job.run_dir,
        )
        if teacher_changed(job, _result(job)):
            log.warning(
                "%s was trained with another teacher file than the current one", job.run_dir
            )
        if modules := record.changed_code(job):
            log.warning(
                "%s ran another version of %s than the current one", job.run_dir, ", ".join(modules)
            )
    return finished


def _pruned(jobs: Sequence[Config], ranks: Ranks) -> list[Config]:
    """Return the jobs with the setting `sweep.halving` that halving has dropped, and log them."""
    results = {job.run_dir: _result(job) for job in jobs if job.sweep.halving}
    found = [run_dir for run_dir, result in results.items() if result.get("status") == PRUNED]
    run_dirs = ranks.broadcast(found)
    pruned = [job for job in jobs if job.run_dir in run_dirs]
    for job in pruned:
        log.info("%s was dropped by sweep.halving: %s", job.run_dir, _result(job)["reason"])
    return pruned


def _may_retry(jobs: Sequence[Config], error: Exception) -> bool:
    """Return whether the caller may train the jobs in smaller groups after this error.

    That is the case after out-of-memory. Halving compares the runs of a group, so its groups stay
    as they are.
    """
    out_of_memory = isinstance(error, torch.OutOfMemoryError)
    return out_of_memory and len(jobs) > 1 and not jobs[0].sweep.halving


def _why_other_data(finished: Sequence[Config]) -> str:
    """Return why one of these finished jobs was trained on other data than its data set has now.

    Return "" if there is no such job. The jobs share one data set, which is loaded only if a record
    tells what its data were.
    """
    if not any(_result(job).get("data") for job in finished):
        return ""
    now = present_fingerprint(finished[0])
    try:
        for job in finished:
            check_same_data(job, now)
    except ValueError as error:
        return str(error)
    return ""


# Ranks that this process starts


def _fit_on_ranks(jobs: Sequence[Config], stop: Stop, sweep: str | None, launched: bool) -> None:
    """Start ranks on this machine to fit the jobs, and raise a failed rank's error in this process.

    Do not raise if a single run caused the failure: the records of the jobs then tell the outcome.
    """
    trainer = jobs[0].trainer
    check_places(trainer.device, trainer.devices)
    to_terminal = bool(logging.getLogger("sddlskd").handlers)
    begun = time.time()
    try:
        spawn(
            _fit_as_rank,
            (jobs, sweep, to_terminal, launched),
            trainer.devices,
            threads=max(torch.get_num_threads() // trainer.devices, 1),
            stop=lambda: stop.signal or 0,
        )
    except RankFailed as failed:
        cause = failed.cause
        message = cause.error.partition(": ")[2]
        for not_recorded in (InUse, torch.OutOfMemoryError):
            if not_recorded.__name__ in cause.kinds and not cause.folder:
                raise not_recorded(message) from None
        _mark_failed(jobs, cause, begun, begun)
        if cause.lost:
            raise DeviceFailure(cause.lost, place=cause.rank) from None
        for refusal in (ValueError, OSError):
            if refusal.__name__ in cause.kinds and not cause.folder:
                raise refusal(message) from None
        log.error("%s\n%s", failed, cause.trace)
        if not cause.folder:
            raise


def _fit_as_rank(
    jobs: Sequence[Config], sweep: str | None, to_terminal: bool, launched: bool
) -> None:
    """Fit the jobs in a rank's process; `to_terminal` says whether to log to the terminal."""
    cfg.frame()
    if to_terminal:
        log_to_terminal()
    fit(jobs, sweep=sweep, launched=launched)


# Failures that no run has recorded


def _mark_failed(jobs: Sequence[Config], cause: Cause, begun: float, since: float) -> None:
    """Mark as FAILED the jobs that have a run directory but no outcome of this call of `fit` yet.

    If one of the runs caused the failure, only that run is FAILED, and the other runs of the group
    are KILLED. If a device failed, all runs are KILLED, because another device may train them. The
    jobs that train the teachers are included if `since` is finite.

    Args:
        jobs: the jobs of the group that failed.
        cause: why the group failed.
        begun: Unix time in seconds at which the call of `fit` began. A job that was
            KILLED before has no outcome of this call.
        since: Unix time in seconds; a job whose record says RUNNING since then or later has no
            outcome. Infinity to leave RUNNING jobs alone.
    """
    frozen = [job for job in jobs if Path(job.run_dir, "config.yaml").exists()]
    # The ranks may have been training the teacher when they failed.
    if since < math.inf:
        teacher_jobs = map(cfg.teacher_job, cfg.each_teacher(jobs[0]))
        frozen = [job for job in teacher_jobs if Path(job.run_dir, "config.yaml").exists()] + frozen
    culprit = ""
    if cause.folder in {job.run_dir for job in jobs}:
        culprit = cause.folder
    marked = []
    for job in frozen:
        # Ignore a run directory in use or a full disk: the error that led here counts.
        with suppress(ValueError, OSError):
            if _is_open_ended(_result(job), begun, since) and _write_failure(
                job, cause, begun, since, culprit
            ):
                marked.append(job)
    if any(map(tracking.is_copied, marked)):
        with closing(tracking.Copies(marked)) as mirror:
            for job in marked:
                mirror.update(Path(job.run_dir))


def _is_open_ended(result: dict[str, Any], begun: float, since: float) -> bool:
    """Return whether a result.json tells no outcome of this call of `fit`.

    `begun` and `since` are arguments of `_mark_failed`.
    """
    if not result:
        return True
    if result["status"] == KILLED:
        return bool(result["time"] < begun)
    return bool(result["status"] == RUNNING and result["time"] >= since)


def _write_failure(job: Config, cause: Cause, begun: float, since: float, culprit: str) -> bool:
    """Write the outcome of a job whose group failed, unless another process has written one.

    Args:
        job: a job with a run directory.
        cause: why the group failed.
        begun: the argument of `_mark_failed`.
        since: the argument of `_mark_failed`.
        culprit: run directory of the run that caused the failure; "" if no run of the group did.

    Returns:
        Whether the outcome was written.

    Raises:
        InUse: If another process has the run directory open.
        ValueError, OSError: If the record cannot be read or written.
    """
    with closing(Record(job)) as opened:
        earlier = _result(job)
        # Checked again: only now does the lock keep other processes from starting the job.
        if not _is_open_ended(earlier, begun, since):
            return False
        if culprit and culprit != job.run_dir:
            name = Path(culprit).name
            opened.write_outcome(KILLED, f"{name} failed in the same group: {cause.error}")
            return True
        if earlier.get("status") == RUNNING:
            opened.log.propagate = False  # the terminal has shown the error already
            opened.log.error("rank %d raised\n%s", cause.rank, cause.trace)
        opened.write_outcome(KILLED if cause.lost else FAILED, cause.error)
        return True


# One group of jobs: prepare, open, train, close


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


def _fit_group(
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
        launched: see `fit`.
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
        launched: see `fit`.

    Returns:
        The group, before any of its run directories is opened.
    """
    first = jobs[0]
    classes = first.dataset.num_classes
    device = ranks.device or pick_device(first.trainer.device)
    for job in jobs:
        check_targets(job)
        check_objective(job, device)
    if ranks.is_rank_zero:
        tracking.check_packages(jobs)
        tracking.check_reachable(jobs)
    # Check a given path early, so that a mistyped path fails before any data is downloaded.
    for one in cfg.each_teacher(first):
        if one.teacher.checkpoint:
            check_teacher(one)
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
    for job, student in zip(jobs, students, strict=True):
        _check_maps(job, student, networks, data, device)
        check_batches(job, student, data, ranks)
        # Refuse a method before a missing teacher is trained.
        _build_features(job, student, teacher_network, data, device)
    for one, network in zip(cfg.each_teacher(first), networks, strict=True):
        for teacher_job in trained_first(one):
            # A teacher that learns from other images is checked by its own training.
            if teacher_job.dataset.train_fraction == first.dataset.train_fraction:
                check_batches(teacher_job, network, data, ranks)
            network.eval()
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
        jobs,
        students,
        features,
        data,
        teacher,
        teacher_network,
        facts,
        device,
        ranks,
        steps,
        launched,
    )


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
        if job.dataset.load.get("_target_") == IMAGE_FOLDER:
            log.info("%s", _settings_of_own_data(job, noted))
            _note_left_out(job, splits)
            _warn_of_single_images(job, splits, noted)
    data = build_data(
        job, device, splits=splits, rank=ranks.rank, ranks=ranks.world_size, strong=strong
    )
    return data, noted


def _settings_of_own_data(job: Config, noted: Mapping[str, Any]) -> str:
    """Return the size of a user's data set and the settings that no paper gives, as a log line.

    `noted` is the fingerprint of the data set.
    """
    d, t = job.dataset, job.trainer
    return (
        f"image folder {d.root}: {counted(d.num_classes, 'class', 'classes')}, "
        f"{counted(noted['train'], 'training image')}, {counted(noted['test'], 'test image')}; "
        f"trained with trainer.epochs={t.epochs}, trainer.batch_size={t.batch_size}, "
        f"optimizer.lr={job.optimizer.lr:g}, dataset.size={d.size} pixels; "
        "those that you did not set are defaults, which no paper has tried on your images"
    )


def _note_left_out(job: Config, splits: Splits) -> None:
    """Log how many files are left out because of their endings, if there are any."""
    found: Counter[str] = Counter()
    for split in splits:
        if isinstance(split, Files):
            found += left_out(split)
    if found:
        log.info(
            "dataset.root=%s: files left out because of their endings: %s; if these are images, "
            "convert them to JPEG or PNG",
            job.dataset.root,
            ", ".join(f"{count} {ending}" for ending, count in found.most_common(5)),
        )


def _warn_of_single_images(job: Config, splits: Splits, noted: Mapping[str, Any]) -> None:
    """Log a warning that names the classes with a single training image, if there are any.

    `noted` is the fingerprint of the data set, which has the names of the classes.
    """
    names = noted["class_names"] or list(map(str, range(job.dataset.num_classes)))
    counts = torch.bincount(splits.train.labels_N).tolist()
    single = [name for name, count in zip(names, counts, strict=False) if count == 1]
    if not single:
        return
    shown = f"class {single[0]} has 1 training image"
    if len(single) > 1:
        listed = ", ".join(single[:5] + ["..."] * (len(single) > 5))
        shown = f"{len(single)} classes have 1 training image each ({listed})"
    log.warning(
        "dataset.root=%s: %s, too few to learn and to hold out (dataset.val_fraction); add images",
        job.dataset.root,
        shown,
    )


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
    _fit_group([job], stop, None, ranks)
    if ranks.all_reduce_max(lambda: [stop.signal or 0])()[0]:
        raise KeyboardInterrupt
    result = ranks.broadcast(_result(job))
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
        # The lines of several workers mix, and their jobs may have different teachers.
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
        _check_same_teacher(directory.folder, facts)
        _check_same_code(job, directory.folder, group.launched)
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


def _check_same_teacher(folder: Path, facts: dict[str, Any]) -> None:
    """Raise ValueError if a run with a checkpoint was begun with another teacher file."""
    earlier = record.read_result(folder).get("teacher_sha256")
    now = facts.get("teacher_sha256")
    if earlier and earlier != now and (folder / "last.ckpt").exists():
        raise ValueError(
            f"run_dir={folder} was begun with another teacher file "
            f"(sha256 {earlier!s:.12}, now {now!s:.12}); "
            "put that file back, or delete the folder to start anew"
        )


def _check_same_code(job: Config, folder: Path, launched: bool) -> None:
    """Raise ValueError if the record of a run names other own code than this process imported.

    A run that has not begun is refused only if it was `launched` (see `fit`). Otherwise its record
    gets the imported versions.
    """
    now = record.own_code_in_use(job)
    changed = record.changed_code(job, now)
    files = ", ".join(f"{module}.py" for module in changed)
    if record.has_begun(folder):
        if changed:
            raise ValueError(
                f"run_dir={folder} was begun with another version of {files}; put that version "
                "back, or delete the folder to start anew"
            )
        return
    if changed and launched:
        raise ValueError(
            f"the sweep was launched with another version of {files}; launch it again to train "
            "with the present one, or put that version back"
        )
    record.note_own_code(folder, now)


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
            may_retry = _may_retry(opened.jobs, error) or device_failure(error)
            status = KILLED if may_retry else FAILED
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
