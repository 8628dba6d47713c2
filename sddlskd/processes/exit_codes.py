"""Exit codes by which the processes of this package tell each other how they ended."""

import signal
from enum import IntEnum

__all__ = ["ExitCode"]


class ExitCode(IntEnum):
    """Exit codes besides 0 (success) and 1 (an error that the output of the process explains)."""

    # A group of jobs does not fit into the device's memory side by side; smaller groups may fit.
    TOO_LARGE = 75
    # Another process has the run directory of one of the jobs open.
    BUSY = 76
    # The device of the process is missing or broken; the jobs may run on another device.
    NO_DEVICE = 77
    # SLURM warned a task, which saved its checkpoints and has to go back into the queue.
    REQUEUE = 85
    # A person or a scheduler stopped the command; shells report the same code after Ctrl-C.
    STOPPED = 128 + signal.SIGINT
    # SIGUSR2, SLURM's warning, ended a task before Python had a signal handler (140 on Linux).
    WARNED_EARLY = 128 + signal.SIGUSR2
    # The process that started this one has died; shells report the same code after SIGTERM.
    PARENT_GONE = 128 + signal.SIGTERM
    # The first of several devices that share each batch is missing or broken. The codes above this
    # one stand for the second device, the third and so on. Shells report up to 128 + 64 after a
    # signal; the largest exit code is 255.
    NO_DEVICE_0 = 200
