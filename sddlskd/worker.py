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
from sddlskd.processes.exit_codes import ExitCode
from sddlskd.processes.parent import save_and_end_with_parent
from sddlskd.record import KILLED, InUse
from sddlskd.terminal.console import explain, log_to_terminal
from sddlskd.training.stop import Stop

__all__ = ["main", "run"]


def main() -> None:
    """Train the jobs of the given run directories, each from its last checkpoint.

    The jobs are trained side by side, so they must share batches and teacher.
    """
    parser = argparse.ArgumentParser(prog="python -m sddlskd.worker", description=main.__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN_DIR")
    parser.add_argument("--device", help="device to use instead of the jobs' trainer.device")
    parser.add_argument("--threads", type=int, help="number of CPU threads")
    parser.add_argument("--progress", help="used instead of the jobs' trainer.progress")
    parser.add_argument("--parent", type=int, help="process id; stop when that process ends")
    chosen = parser.parse_args()
    if chosen.parent:
        # An orphaned worker would keep its run directories locked.
        save_and_end_with_parent(chosen.parent, signal.SIGTERM)
    code = run(
        chosen.folders, device=chosen.device, threads=chosen.threads, progress=chosen.progress
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
    """Train the jobs of some run directories side by side, and return the exit code.

    An error that stops all jobs, other than those below, is passed on.

    Args:
        folders: run directories of jobs that share batches and teacher; each holds config.yaml.
        device: device to use instead of the jobs' trainer.device; None to keep it.
        threads: number of CPU threads; None for torch's default.
        progress: "auto", "plain" or "off", used instead of the jobs' trainer.progress; None to keep
            it.
        stop: stop request of a caller that handles the stop signals itself; None to handle them
            here.

    Returns:
        - ExitCode.TOO_LARGE if the jobs do not fit into the device's memory together;
        - ExitCode.BUSY if another process has the run directory of a job open;
        - ExitCode.STOPPED if a signal stopped the training;
        - 1 if a ValueError or OSError, which is printed to stderr, prevents the training;
        - otherwise 0, even if a job failed: each result.json tells the outcome.

    Raises:
        FileNotFoundError: If a run directory has no config.yaml.
        ValueError: If a config.yaml is damaged, or if `progress` is not valid.
    """
    log_to_terminal()
    cfg.frame()
    jobs = []
    for folder in folders:
        job = replace(cfg.load(folder / "config.yaml"), run_dir=str(folder.absolute()))
        trainer = replace(
            job.trainer,
            device=device or job.trainer.device,
            progress=cfg.Progress(progress or job.trainer.progress),
        )
        jobs.append(replace(job, trainer=trainer))

    import torch

    from sddlskd.training.fit import fit

    if threads:
        torch.set_num_threads(threads)
    try:
        results = fit(jobs, stop=stop)
    except torch.OutOfMemoryError as error:
        logging.getLogger("sddlskd").warning(
            "%d jobs do not fit side by side: %s", len(jobs), explain(error)
        )
        return ExitCode.TOO_LARGE
    except KeyboardInterrupt:
        return ExitCode.STOPPED
    except InUse as error:
        logging.getLogger("sddlskd").warning("%s", explain(error))
        return ExitCode.BUSY
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {explain(error)}\n")
        return 1
    if any(result["status"] == KILLED for result in results):
        return ExitCode.STOPPED
    return 0


if __name__ == "__main__":
    main()
