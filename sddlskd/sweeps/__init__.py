"""Sweeps: plan, freeze and run many jobs, on this machine or on SLURM, and resume stopped sweeps.

    python -m sddlskd.sweeps               list the sweeps
    python -m sddlskd.sweeps status NAME   print the state of every job and the command to continue
    python -m sddlskd.sweeps logs NAME     print the last lines of the logs
    python -m sddlskd.sweeps cancel NAME   stop the sweep, with all checkpoints saved

To freeze a job means to write its configuration into its run directory. The state of a sweep is
that of its run directories, which runs/sweeps/<name>/sweep.json lists. In the same folder,
slurm.json lists the submitted SLURM jobs; plan.json and mlflow.json are for MLflow.
"""

import logging
import sys
import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sddlskd import config as cfg
from sddlskd import record, tracking
from sddlskd.config import Config, Rerun
from sddlskd.processes.interrupts import ignore_interrupts
from sddlskd.record import FAILED, FINISHED, KILLED, RUNNING
from sddlskd.sweeps.baselines import comparison_lines
from sddlskd.sweeps.grid import InvalidJobs
from sddlskd.sweeps.manifest import (
    marked_as_running,
    planned_epochs,
    planned_jobs,
    refusal_of_second_launch,
    write_manifest,
    write_plan,
)
from sddlskd.sweeps.outcome import outcome_of, result_of, state_of
from sddlskd.sweeps.plan import Plan, Precheck, ask_precheck, groups_of, make_plan
from sddlskd.sweeps.report import plan_lines, print_outcome, print_plan
from sddlskd.sweeps.runner import GroupRunner
from sddlskd.sweeps.status import DONE
from sddlskd.terminal.console import write_line
from sddlskd.terminal.words import counted

__all__ = ["groups_of", "run_sweep"]

log = logging.getLogger(__name__)

# End of a warning about some finished jobs of a sweep
RERUN = (
    "sweep.rerun=all runs all jobs of its command again: leave the others out of it, as with "
    "recipe=NAME"
)


def run_sweep(
    jobs: Sequence[Config],
    name: str,
    *,
    runner: GroupRunner,
    max_group_size: int | None = None,
    precheck: Precheck = ask_precheck,
    print_results: bool = True,
) -> list[dict[str, Any]]:
    """Run the unfinished jobs of a sweep and return the result of every job.

    A job is one training run:

    - New jobs start, and KILLED jobs continue from their last checkpoints.
    - FAILED jobs continue, too, unless the setting `sweep.rerun` is `none`.
    - Jobs that halving has dropped (PRUNED) continue only if `sweep.halving` is empty.
    - FINISHED jobs are left alone, and so are jobs that run already or are in SLURM's queue.

    If `sweep.rerun` is `all`, all jobs start anew instead, except those that run already or are in
    SLURM's queue. Old run directories are renamed. If `sweep.plan` is set, the function only prints
    what it would do, and exits.

    Args:
        jobs: configurations of the jobs, at least one; duplicates run once. The settings `sweep` of
            the first job count for all.
        name: name of the sweep; its files go to <home>/runs/sweeps/<name>.
        runner: what runs the jobs: a `Pool` on this machine, or a `Slurm` on a cluster.
        max_group_size: largest number of jobs that train together, with one teacher forward pass
            per batch; None for no limit.
        precheck: function that checks the jobs before any of them starts. It has the arguments and
            the result of `ask_precheck`.
        print_results: False to print no table of results if all jobs are FINISHED or PRUNED.

    Returns:
        The content of each job's result.json, in the order of `jobs`. All jobs are FINISHED or
        PRUNED, unless a `Slurm` with wait=False runs them: then jobs may still wait or run, and the
        result of a job that has not started has the status "NEW".

    Raises:
        ValueError: If the sweep cannot be run: jobs are invalid (`InvalidJobs`), different jobs
            have the same run directory, another launch on this machine trains one of the jobs, the
            runner refuses the jobs, a file of the sweep or of a job is damaged, or any other
            setting is wrong.
        OSError: If a file of the sweep or of a job cannot be written.
        ConnectionError: If MLflow or SLURM does not answer.
        ChildProcessError: If the process that checks the jobs dies.
        KeyboardInterrupt: If Ctrl-C ends the wait for SLURM's tasks.
        SystemExit: With code 130 if the sweep or a job was stopped, else with 1 if a job is neither
            FINISHED nor PRUNED at the end. After printing a plan with code 1 if a job is invalid
            or the sweep would be refused, else with 0.
    """
    plan = make_plan(
        jobs,
        name,
        runner=runner,
        max_group_size=max_group_size,
        precheck=precheck,
    )
    only_print = plan.jobs[0].sweep.plan
    if plan.invalid and not only_print:
        raise InvalidJobs(plan.invalid)
    _warn_of_finished(plan)
    _warn_of_other_length(plan)
    if only_print:
        devices = runner.places(plan.todo, plan.devices)
        requests = runner.requests(plan.groups, plan.group_seconds)
        # Searches, halving and seeds until decided compare their jobs by themselves.
        compares = print_results and not plan.jobs[0].sweep.halving
        notes = comparison_lines(plan.jobs) if compares else []
        print_plan(plan, devices, requests, runner.array_parallelism, notes)
        refusals = _refusals(plan, runner)
        for reason in refusals:
            write_line(f"cannot run: {reason}")
        if plan.invalid or refusals:
            sys.exit(1)
        sys.exit(0)
    log.info("%s", "; ".join(plan_lines(plan)))
    ended = _run(plan, runner)
    if ended == RUNNING:
        write_line(f"state: python -m sddlskd.sweeps status {plan.folder}")
    else:
        if print_results and _status_of_all(plan.jobs) == FINISHED:
            ignore_interrupts()
        results = [outcome_of(job) for job in plan.jobs]
        if print_results or ended == KILLED or _status_of_all(plan.jobs) != FINISHED:
            print_outcome(plan, results, stopped=ended == KILLED, locally=runner.runs_locally)
    return [result_of(job) for job in jobs]


def _warn_of_finished(plan: Plan) -> None:
    """Log a warning for each way in which finished jobs differ from what would run now."""
    if plan.changed:
        log.warning(
            "%s learnt from another teacher file than the current one (%s ...); " + RERUN,
            counted(len(plan.changed), "finished job"),
            ", ".join(map(cfg.run_name, plan.changed[:3])),
        )
    if plan.other_data:
        job, change = plan.other_data[0]
        log.warning(
            "%s learnt from other data than there is now "
            "(%s: %s ...); choose another dataset.name, or " + RERUN,
            counted(len(plan.other_data), "finished job"),
            cfg.run_name(job),
            change,
        )
    if plan.changed_code:
        job, modules = plan.changed_code[0]
        log.warning(
            "%s ran another version of %s than the current one (%s ...); " + RERUN,
            counted(len(plan.changed_code), "finished job"),
            ", ".join(modules),
            cfg.run_name(job),
        )


def _warn_of_other_length(plan: Plan) -> None:
    """Log a warning if no job of earlier launches of the sweep trains as long as one of these."""
    earlier = planned_epochs(plan.folder)
    other = {job.trainer.epochs for job in plan.jobs} - earlier
    if earlier and other:
        log.warning(
            "trainer.epochs=%s is new to sweep %s, which has jobs of %s; tables refuse such a "
            "mixture, unless the papers train these methods longer: give another sweep.name",
            ", ".join(map(str, sorted(other))),
            plan.name,
            counted(max(earlier), "epoch"),
        )


def _refusals(plan: Plan, runner: GroupRunner) -> list[str]:
    """Return why a launch of the sweep would be refused although its single jobs can run."""
    found = list(plan.refusals)
    if not plan.todo:
        return found
    if second := refusal_of_second_launch(plan.folder, plan.name, _run_dirs_here(plan, runner)):
        found.append(second)
    # The check of a SQLite file writes a file beside it, which a plan must not do.
    on_servers = [job for job in plan.todo if str(job.tracking.uri).startswith("http")]
    for check in (
        partial(tracking.check_packages, plan.todo),
        partial(tracking.check_reachable, on_servers),
    ):
        try:
            check()
        except (ValueError, ConnectionError) as error:
            found.append(str(error))
    found += map(str, runner.refusals(plan.todo, plan.devices))
    return list(dict.fromkeys(found))


def _run(plan: Plan, runner: GroupRunner) -> str:
    """Write the files of the sweep, and run its groups.

    Return FINISHED if all groups have ended, KILLED if a signal stopped the sweep, or RUNNING if
    SLURM runs the groups on without this process.
    """
    if plan.todo:  # these checks come before anything is written
        tracking.check_packages(plan.todo)
        tracking.check_reachable(plan.todo)
        runner.validate(plan.todo, plan.devices)
    devices = len(runner.places(plan.todo, plan.devices)) or 1
    with marked_as_running(plan.folder, plan.name, _run_dirs_here(plan, runner)):
        write_manifest(plan.folder, plan.name, plan.jobs, devices, plan.kind)
        return _run_groups(plan, runner)


def _run_dirs_here(plan: Plan, runner: GroupRunner) -> list[str]:
    """Return the run directories of the jobs that this process trains; [] if a cluster does."""
    return [job.run_dir for job in plan.todo if runner.runs_locally]


def _run_groups(plan: Plan, runner: GroupRunner) -> str:
    """Register and freeze the jobs of a sweep, and run its groups; return what `_run` returns."""
    if not plan.todo:
        if not planned_jobs(plan.folder) >= {job.run_dir for job in plan.jobs}:
            _register_finished_sweep(plan)
        # Only SLURM's tasks may be left, which another launch submitted.
        if {"queued", "running"}.isdisjoint(plan.states.values()):
            return FINISHED
        return runner.run(plan.groups, plan.folder, plan.devices)
    if plan.jobs[0].sweep.rerun is Rerun.all:
        for job in plan.todo:
            _set_aside(Path(job.run_dir))
    if any(job.tracking.enabled for job in plan.todo):
        log.info("registering %s in MLflow", counted(len(plan.todo), "job"))
    registered = tracking.register(plan.todo, sweep=plan.name)
    for job in registered:
        folder = record.freeze(job)
        if not record.has_begun(folder) and record.abandoned(folder):
            record.note_own_code(folder, record.own_code_of(job))
        record.queue_again(Path(job.run_dir))
    write_plan(plan.folder, plan.name, plan.jobs)
    tracking.log_plan(registered[0])
    ended = runner.run(plan.groups, plan.folder, plan.devices)
    if ended == KILLED and _status_of_all(plan.jobs) == FINISHED:
        ended = FINISHED  # the signal came when the last job had finished
    if ended != RUNNING:
        status = KILLED if ended == KILLED else _status_of_all(plan.jobs)
        tracking.finish_sweep(registered[0], status)
    return ended


def _status_of_all(jobs: Iterable[Config]) -> str:
    if all(state_of(Path(job.run_dir)) in DONE for job in jobs):
        return FINISHED
    return FAILED


def _register_finished_sweep(plan: Plan) -> None:
    """Register in MLflow a sweep whose jobs were all run by other sweeps.

    If MLflow does not answer, only log a warning: the run directories hold all results.
    """
    try:
        tracking.check_reachable(plan.jobs)
        first = tracking.register(plan.jobs[:1], sweep=plan.name)[0]
    except ConnectionError as error:
        log.warning("MLflow does not know of sweep %s: %s", plan.name, error)
        return
    write_plan(plan.folder, plan.name, plan.jobs)
    tracking.log_plan(first)
    tracking.finish_sweep(first, _status_of_all(plan.jobs))


def _set_aside(run_dir: Path) -> None:
    """Rename an earlier run directory, and mark its MLflow run as superseded.

    The new name is <run_dir>.before-<time>. Do nothing if there is no such directory.
    """
    if run_dir.exists():
        if (run_dir / "config.yaml").exists():
            tracking.supersede(run_dir)
        time_now = time.strftime("%Y%m%d-%H%M%S")
        run_dir.rename(run_dir.with_name(f"{run_dir.name}.before-{time_now}"))
