"""Train one group of jobs on one device, as a worker process of a sweep.

The configuration of each job is in its run directory. The same command runs a job again:

python -m sddlskd.worker RUN_DIR [RUN_DIR ...]
"""

import argparse
import logging
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sddlskd import config as cfg
from sddlskd.config import Config
from sddlskd.processes.exit_codes import ExitCode
from sddlskd.processes.interrupts import leave_at_once
from sddlskd.processes.parent import save_and_end_with_parent
from sddlskd.record import KILLED, InUse
from sddlskd.terminal.arguments import RUN_DIR_IN_HOME, other_form
from sddlskd.terminal.console import explain, log_to_terminal, refuse_another_checkout
from sddlskd.training.stop import Stop

__all__ = ["main", "run"]


def main() -> None:
    """Train the jobs of the given run directories, each from its last checkpoint.

    The jobs are trained together, with one teacher forward pass per batch, so they must share
    batches and teacher. Exit code 0 means that all jobs have ended; the result.json of a job says
    whether it failed.
    """
    leave_at_once()
    parser = argparse.ArgumentParser(prog="python -m sddlskd.worker", description=main.__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN_DIR")
    parser.add_argument("--device", help="device to use instead of the jobs' trainer.device")
    parser.add_argument("--threads", type=int, help="number of CPU threads")
    parser.add_argument(
        "--progress",
        choices=[mode.value for mode in cfg.Progress],
        help="used instead of the jobs' trainer.progress",
    )
    parser.add_argument("--parent", type=int, help="process id; stop when that process ends")
    if wrong := other_form(parser, sys.argv[1:], keys=(), home=RUN_DIR_IN_HOME):
        parser.error(wrong)
    chosen = parser.parse_args()
    if chosen.threads is not None and chosen.threads < 1:
        parser.error(f"argument --threads: {chosen.threads} must be at least 1")
    refuse_another_checkout()
    if chosen.parent:
        # An orphaned worker would keep its run directories locked.
        save_and_end_with_parent(chosen.parent, signal.SIGTERM)
    code = run(
        chosen.folders,
        device=chosen.device,
        threads=chosen.threads,
        progress=chosen.progress,
        stop=Stop(launcher=chosen.parent),
    )
    sys.exit(code)


def run(
    folders: Sequence[Path],
    *,
    device: str | None = None,
    threads: int | None = None,
    progress: str | None = None,
    stop: Stop | None = None,
) -> int:
    """Train the jobs of some run directories together, and return an exit code.

    The jobs share each teacher forward pass. KILLED jobs continue from their last checkpoints.

    Args:
        folders: run directories of jobs that share batches and teacher; each holds config.yaml.
        device: device to use instead of the jobs' trainer.device, such as "cuda:0"; None to keep
            trainer.device.
        threads: number of CPU threads; None for torch's default.
        progress: "auto", "plain" or "off", to use instead of the jobs' trainer.progress; None to
            keep trainer.progress.
        stop: the `Stop` that handles signals during this call, and beyond it if the caller listens;
            None for a new one.

    Returns:
        - 75 (ExitCode.TOO_LARGE) if the jobs do not fit into the device's memory together;
        - 76 (ExitCode.BUSY) if another process has the run directory of a job open;
        - 77 (ExitCode.NO_DEVICE) if the device is missing or broken; other devices can train the
          jobs. If several devices share each batch, it is 200 (ExitCode.NO_DEVICE_0) plus the index
          of the device. The error is printed unless `device` is given;
        - 130 (ExitCode.STOPPED) if a signal stopped the training, or a job is left KILLED;
        - 1 after printing a ValueError or OSError that prevents the training, such as the error for
          a config.yaml that is missing or damaged, or that jobs with the setting `sweep.halving` do
          not fit into the device's memory;
        - otherwise 0, even if jobs failed: the result.json of a job has its outcome.

    Raises:
        Exception: Any other error that stops all jobs.
    """
    log_to_terminal()
    cfg.frame()
    try:
        jobs = [_load_job(folder, device, progress) for folder in folders]
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {explain(error)}\n")
        return 1

    import torch

    from sddlskd.training.devices import DeviceFailure
    from sddlskd.training.fit import fit

    if threads:
        torch.set_num_threads(threads)
    try:
        results = fit(jobs, stop=stop, launched=True)
    except torch.OutOfMemoryError as error:
        if jobs[0].sweep.halving:
            sys.stderr.write(
                f"error: {len(jobs)} jobs do not fit side by side, and sweep.halving compares "
                "them; lower hydra.launcher.max_group_size\n"
            )
            return 1
        logging.getLogger("sddlskd").warning(
            "%d jobs do not fit side by side: %s", len(jobs), explain(error)
        )
        return ExitCode.TOO_LARGE
    except KeyboardInterrupt:
        return ExitCode.STOPPED
    except InUse as error:
        logging.getLogger("sddlskd").warning("%s", explain(error))
        return ExitCode.BUSY
    except DeviceFailure as error:
        if device is None:  # a sweep that has chosen the device reports its failure
            sys.stderr.write(f"error: {explain(error)}\n")
        if error.place is None:
            return ExitCode.NO_DEVICE
        return ExitCode.NO_DEVICE_0 + error.place
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {explain(error)}\n")
        return 1
    if any(result["status"] == KILLED for result in results):
        return ExitCode.STOPPED
    return 0


def _load_job(folder: Path, device: str | None, progress: str | None) -> Config:
    """Return the job of a run directory, with another device or progress display if given."""
    job = replace(cfg.load(folder / "config.yaml"), run_dir=str(folder.absolute()))
    trainer = replace(
        job.trainer,
        device=device or job.trainer.device,
        progress=cfg.Progress(progress or job.trainer.progress),
    )
    return replace(job, trainer=trainer)


if __name__ == "__main__":
    main()
