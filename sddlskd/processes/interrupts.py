"""Ignore Ctrl-C in a process whose work is done."""

import signal
from contextlib import suppress

__all__ = ["ignore_interrupts"]


def ignore_interrupts() -> None:
    """Ignore SIGINT until this process ends, because its work is done and only its end is left.

    Otherwise, Ctrl-C while the process ends would make a finished run look stopped. In a thread
    other than the main one, which may not change signals, do nothing.
    """
    with suppress(ValueError):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
