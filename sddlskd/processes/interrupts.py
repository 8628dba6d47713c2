"""Ctrl-C before the work of a process begins, and after its work is done."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from sddlskd.processes.exit_codes import ExitCode

__all__ = ["held_back", "hung_up_counts", "ignore_interrupts", "leave_at_once"]

STOPPING = (signal.SIGINT, signal.SIGTERM)


def ignore_interrupts() -> None:
    """Ignore SIGINT until this process ends, because its work is done and only its end is left.

    Otherwise, Ctrl-C while the process ends would make a finished run look stopped. In a thread
    other than the main one, which may not change signals, do nothing.
    """
    with suppress(ValueError):
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def hung_up_counts() -> bool:
    """Return whether SIGHUP, which a closed terminal sends, asks this process to stop.

    `nohup` makes a process ignore SIGHUP; then the result is False.
    """
    return signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN


@contextmanager
def held_back() -> Iterator[None]:
    """Hold back SIGINT and SIGTERM for a block, and in the processes that are started in it.

    A new process would otherwise die with a traceback before it has a signal handler. It receives
    the signals from its call of `leave_at_once` on. This process receives them after the block.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_at_once() -> None:
    """End this process silently at SIGINT or SIGTERM, with `ExitCode.STOPPED`, from now on.

    Call this function while there is nothing to save. Training replaces the signal handlers. The
    signals that `held_back` has held back arrive now.
    """
    for number in STOPPING:
        signal.signal(number, lambda *_: os._exit(ExitCode.STOPPED))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
