"""What one task of a SLURM job array does: it fits the frozen jobs of some run directories, and may be interrupted.

On SLURM's warning (SIGUSR2, before a time limit) or a preemption it saves its checkpoints and ends, and its batch
script, which outlives it, puts the task back into the queue. A task that is killed at once leaves its last checkpoints
to the next one.
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
from sddlskd.outcome import read_manifest, state_of
from sddlskd.record import FAILED, FINISHED
from sddlskd.stop import Stop
from sddlskd.worker import BUSY, STOPPED, TOO_LARGE, run

__all__ = ["SETUP", "TEARDOWN", "ArrayTask"]

log = logging.getLogger(__name__)

RENDEZVOUS = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
REQUEUE = 85  # exit code of a task that was warned and wants to go on
WARNED_EARLY = 128 + signal.SIGUSR2  # of a task that the warning met before Python could listen
SETUP = [
    "trap '' USR2  # the warning is for the task; this script must outlive it",
    "export SUBMITIT_PREEMPT_SIGNAL=USR1  # submitit takes a signal that nobody sends, and leaves SIGUSR2 to us",
]
TEARDOWN = f"""
# The task is over and its records are closed: whether it goes back into the queue is decided here.
code=$?
job=${{SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}${{SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}}
again=
case $code in {REQUEUE}|{WARNED_EARLY}) again=warned;; esac
if [ $code != 0 ] && scontrol show job "$job" | grep -q 'PreemptTime=[0-9]'; then again=preempted; fi
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
    """What one array task does: fit the frozen jobs of some run directories, and end with an exit code for `TEARDOWN`.

    It never returns: submitit would write down a result that nobody reads, and meet signals on the way.
    """

    run_dirs: tuple[str, ...]
    sweep: str
    max_requeues: int

    def __call__(self) -> NoReturn:
        """Called by submitit in each process of the task."""
        restarts = int(os.environ.get("SLURM_RESTART_COUNT", 0))
        warned = (
            ", to go on when SLURM starts it again"
            if restarts < self.max_requeues
            else ", max_requeues reached"
        )
        stop = Stop(warned=warned)
        stop.listen()  # to the end of the process
        folders = [Path(path) for path in self.run_dirs]
        import submitit

        task = submitit.JobEnvironment()
        for name in RENDEZVOUS:  # of the shell that the sweep was launched from
            os.environ.pop(name, None)
        if task.num_tasks > 1:
            submitit.helpers.TorchDistributedEnvironment().export(
                set_cuda_visible_devices=False, overwrite=True
            )
            if task.num_nodes == 1:  # SLURM's name of a node need not resolve
                os.environ["MASTER_ADDR"] = "127.0.0.1"
        if task.global_rank == 0:
            for folder in folders:
                record.note_requeues(folder, task.job_id, restarts)
        left = [folder for folder in folders if record.read_result(folder).get("status") != FAILED]
        code = _fit(left, stop) if left else 1
        statuses = {record.read_result(folder).get("status") for folder in folders}
        if statuses <= {FINISHED, FAILED}:
            code = 1 if FAILED in statuses else 0
        elif stop.signal is signal.SIGUSR2:
            code = REQUEUE
        elif code == STOPPED and task.global_rank > 0:
            code = 0  # it was told so by rank 0, whose code counts: srun ends with the largest
        if task.global_rank == 0:
            try:
                _close_sweep(Path(self.sweep), folders[0])
            except Exception as error:  # of another job's record: this task's own outcome counts
                log.warning("MLflow is not told whether the sweep is over: %s", error)
        # Where Python ends it gives signals back their default, which is to die: what is finished would be requeued.
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        sys.exit(code)


def _fit(folders: Sequence[Path], stop: Stop) -> int:
    """Fit the jobs side by side: by halves where they do not fit into the device's memory, without those that another
    process has."""
    threads = int(os.environ.get("SLURM_CPUS_PER_TASK", 0)) or None
    try:
        code = run(folders, threads=threads, progress="plain", stop=stop)
    except Exception:  # whatever a device or the ranks' network raises; the sweep goes on
        log.exception("ended: %s", ", ".join(map(str, folders)))
        return 1
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
    if code == BUSY and alone:
        free = [folder for folder in folders if state_of(folder) != "running"]
        return max(code, _fit(free, stop)) if 0 < len(free) < len(folders) else code
    if code != TOO_LARGE or len(folders) == 1:
        return code
    if not alone:  # ranks meet once a process
        log.error("lower hydra.launcher.max_group_size=%d", len(folders))
        return code
    half = len(folders) // 2
    return max(_fit(folders[:half], stop), _fit(folders[half:], stop))


def _close_sweep(sweep: Path, folder: Path) -> None:
    """The last job to end tells MLflow that the sweep is over; nobody else may be there to do so."""
    states = {state_of(Path(run_dir)) for run_dir in read_manifest(sweep)["jobs"]}
    if states <= {"finished", "failed"}:
        tracking.finish_sweep(
            cfg.load(folder / "config.yaml"), FAILED if "failed" in states else FINISHED
        )
