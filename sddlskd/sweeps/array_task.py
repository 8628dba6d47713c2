"""The program of one task of a SLURM job array: train the frozen jobs of some run directories.

SLURM may interrupt a task by a warning (SIGUSR2, before the time limit) or by a preemption. The
task then saves its checkpoints and ends. Its batch script outlives the task and puts the task back
into the queue. A task that is killed at once resumes from its last checkpoints when it starts
again.
"""

import logging
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from sddlskd import config as cfg
from sddlskd import record, tracking
from sddlskd.processes.exit_codes import ExitCode
from sddlskd.record import FAILED, FINISHED, PRUNED
from sddlskd.sweeps.manifest import read_manifest
from sddlskd.sweeps.outcome import state_of
from sddlskd.training.stop import Stop
from sddlskd.worker import run

__all__ = ["SETUP", "TEARDOWN", "ArrayTask"]

log = logging.getLogger(__name__)

RENDEZVOUS = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
# Shell lines of a task's batch script, before (SETUP) and after (TEARDOWN) the task. The line that
# starts the task, "srun ...", calls the function srun.
SETUP = """
trap '' USR2  # SIGUSR2 warns the task; this script must outlive the task
# This is a signal that nobody sends: submitit must leave SIGUSR2 to our own handler.
export SUBMITIT_PREEMPT_SIGNAL=USR1
# If slurmctld is away when srun asks for the task's resources, srun fails before the task starts.
srun() {
    local attempt code
    for attempt in $(seq 19); do
        command srun "$@" && return
        code=$?
        # The log says why srun failed; it is not read again if setup has made it a pipe.
        [ -f /proc/$$/fd/1 ] || return $code
        tail -n 3 /proc/$$/fd/1 | grep -E 'Unable to (confirm allocation|create step)' \\
            | grep -Evq ': (Job/step already|More processors|Requested node config)' || return $code
        echo "the task has not started; srun tries again in 10 seconds"
        sleep 10
    done
    command srun "$@"
}
""".strip().splitlines()
TEARDOWN = f"""
# The task is over and its records are closed: decide whether it goes back into the queue.
code=$?
job=${{SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}${{SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}}
again=
case $code in {ExitCode.REQUEUE}|{ExitCode.WARNED_EARLY}) again=warned;; esac
if [ $code != 0 ] && scontrol show job "$job" | grep -q 'PreemptTime=[0-9]'; then \
again=preempted; fi
if [ -n "$again" ] && [ "${{SLURM_RESTART_COUNT:-0}}" -ge MAX_REQUEUES ]; then
    echo "$again, but not requeued: max_requeues=MAX_REQUEUES is reached"
elif [ -n "$again" ]; then
    echo "$again: back into the queue"
    for attempt in $(seq 12); do scontrol requeue "$job" && break; sleep 5; done
fi
exit $code
"""


@dataclass(frozen=True)
class ArrayTask:
    """Task of a SLURM job array: trains jobs together, with one teacher forward pass per batch.

    submitit calls an instance in each process of the task. The call never returns: it ends the
    process with an exit code. The batch script uses the code to decide whether the task goes back
    into SLURM's queue.

    Args:
        run_dirs: paths of the jobs' run directories, each of which holds a config.yaml.
        sweep: path of the sweep's folder.
        max_requeues: how often at most the task goes back into the queue.
    """

    run_dirs: tuple[str, ...]
    sweep: str
    max_requeues: int

    def __call__(self) -> NoReturn:
        """Train the jobs and exit; submitit calls this method in each process of the task.

        Raises:
            SystemExit: Always. The code is 0 if all jobs are FINISHED or PRUNED, 1 if all have
                ended and some FAILED, `ExitCode.REQUEUE` if SLURM's warning stopped the training,
                and else that of `worker.run`. A process other than the first exits with 0 if the
                first one stopped the training.
        """
        restarts = int(os.environ.get("SLURM_RESTART_COUNT", 0))
        if restarts < self.max_requeues:
            stop = Stop(warned=", continues when SLURM starts it again")
        else:
            stop = Stop(warned=", max_requeues reached")
        stop.listen()  # until the process ends
        folders = [Path(path) for path in self.run_dirs]
        import submitit

        task = submitit.JobEnvironment()
        # The variables may come from the shell that launched the sweep.
        for name in RENDEZVOUS:
            os.environ.pop(name, None)
        if task.num_tasks > 1:
            submitit.helpers.TorchDistributedEnvironment().export(
                set_cuda_visible_devices=False, overwrite=True
            )
            if task.num_nodes == 1:  # SLURM's name of the node may not resolve
                os.environ["MASTER_ADDR"] = "127.0.0.1"
        if task.global_rank == 0:
            for folder in folders:
                record.note_requeues(folder, task.job_id, restarts)
        not_failed = [folder for folder in folders if _status(folder) != FAILED]
        code = _fit(not_failed, stop) if not_failed else 1
        statuses = {_status(folder) for folder in folders}
        if statuses <= {FINISHED, FAILED, PRUNED}:
            code = 1 if FAILED in statuses else 0
        elif stop.signal is signal.SIGUSR2:
            code = ExitCode.REQUEUE
        elif code == ExitCode.STOPPED and task.global_rank > 0:
            # Rank 0 told this rank to stop. Only the code of rank 0 may count, and srun ends with
            # the largest exit code of all ranks.
            code = 0
        if task.global_rank == 0:
            try:
                _close_sweep(Path(self.sweep), folders[0])
            except Exception as error:
                # Another job's record may be damaged, but this task must report its own outcome.
                log.warning("cannot tell MLflow whether the sweep is over: %s", error)
        # Python restores the default signal handlers when it ends. A late SIGUSR2 would then kill
        # the process, and a finished task would be requeued.
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        sys.exit(code)


def _status(folder: Path) -> str | None:
    """Return the status in a run directory, or None if the job has not started."""
    status: str | None = record.read_result(folder).get("status")
    return status


def _fit(folders: Sequence[Path], stop: Stop) -> int:
    """Train the jobs side by side and return the exit code of `worker.run`; 1 after an error.

    If the jobs do not fit into the device's memory, train each half of them by itself. If another
    process has some of the jobs open, train the others.
    """
    threads = int(os.environ.get("SLURM_CPUS_PER_TASK", 0)) or None
    try:
        code = run(folders, threads=threads, progress="plain", stop=stop)
    except Exception:
        # A device or the network may raise anything, and the sweep must continue.
        log.exception("ended with an error: %s", ", ".join(map(str, folders)))
        return 1
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
    if code == ExitCode.BUSY and alone:
        free = [folder for folder in folders if state_of(folder) != "running"]
        if free and len(free) < len(folders):
            return max(code, _fit(free, stop))
        return code
    if code != ExitCode.TOO_LARGE or len(folders) == 1:
        return code
    # The ranks of a task join each other only once, so they cannot try again in halves.
    if not alone:
        log.error(
            "%d jobs do not fit into the device's memory side by side; "
            "lower hydra.launcher.max_group_size",
            len(folders),
        )
        return code
    half = len(folders) // 2
    first_code = _fit(folders[:half], stop)
    second_code = _fit(folders[half:], stop)
    return max(first_code, second_code)


def _close_sweep(sweep: Path, folder: Path) -> None:
    """Tell MLflow that the sweep is over if all its jobs have finished, failed or are pruned.

    The last task to end does this, because no launching process may be running any more.
    """
    states = {state_of(Path(run_dir)) for run_dir in read_manifest(sweep)["jobs"]}
    if states <= {"finished", "failed", "pruned"}:
        status = FAILED if "failed" in states else FINISHED
        tracking.finish_sweep(cfg.load(folder / "config.yaml"), status)
