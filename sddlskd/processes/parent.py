"""End a process when its parent dies, so that no orphan keeps files locked or a device busy."""

import ctypes
import os
import pickle
import signal
import sys
import threading
import time

from sddlskd.processes.exit_codes import ExitCode

__all__ = ["end_with_parent", "run_pickled", "save_and_end_with_parent"]

GRACE_S = 120.0  # seconds that an orphan gets to save its state
POLL_S = 1.0  # seconds between two looks at the parent
_PR_SET_PDEATHSIG = 1  # of prctl(2)


def end_with_parent(parent: int, by: signal.Signals = signal.SIGKILL) -> None:
    """End this process as soon as the process `parent` dies.

    Call this function in the child. If the parent is dead already, the child ends at once with
    `ExitCode.PARENT_GONE`. A later death is noticed on Linux only. The effect lasts through exec,
    but processes that this one forks do not inherit it.

    Args:
        parent: process id of the parent, as the parent itself has read it (os.getpid).
        by: signal that the kernel sends to this process when the parent dies.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, by)
    # The kernel sends no signal if the parent died before the call above.
    if os.getppid() != parent:
        os._exit(ExitCode.PARENT_GONE)


def save_and_end_with_parent(parent: int, by: signal.Signals) -> None:
    """End this process when the process `parent` dies, at most about 120 seconds later.

    Call this function in the child. The function returns at once, and a thread watches the parent.
    On Linux, the process gets the signal `by` when the parent dies, and can save its state. On
    every system, a process that has not ended 120 seconds (GRACE_S) later is killed. If the parent
    is dead already, the process ends at once with `ExitCode.PARENT_GONE`.

    Args:
        parent: process id of the parent, as the parent itself has read it (os.getpid).
        by: signal whose handler saves the state and ends the process.
    """
    end_with_parent(parent, by)
    threading.Thread(target=_kill_orphan, args=(parent,), name="parent", daemon=True).start()


def run_pickled(work: bytes, parent: int) -> None:
    """Unpickle and call a function without arguments, in a child process that `parent` started.

    On Linux, the child is killed when its parent dies, also while the unpickling imports the
    function's modules, which may take long. On other systems, the child ends only if the parent is
    dead already (`end_with_parent`). What the function returns is dropped; its errors propagate.

    Args:
        work: pickled function.
        parent: process id of the parent, as the parent itself has read it (os.getpid).
    """
    end_with_parent(parent)
    pickle.loads(work)()


def _kill_orphan(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_S)
    time.sleep(GRACE_S)
    os.kill(os.getpid(), signal.SIGKILL)
