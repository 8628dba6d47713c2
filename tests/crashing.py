"""Processes that die at a chosen file operation, as after SIGKILL or in a power cut."""

import builtins
import io
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sddlskd import config as cfg
from sddlskd import record
from sddlskd.config import Config


def forked(work: Callable[[], Any]) -> int:
    """Fork a process that calls `work`, and return its id.

    The process exits with 0, or with 1 if `work` raises. The calling process must have no other
    threads.
    """
    assert len(os.listdir("/proc/self/task")) == 1
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException as error:
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
        finally:
            os._exit(code)
    return pid


def ended(pid: int) -> int:
    """Wait for a process and return its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def ready() -> None:
    """Do in advance what every process would do itself, so that forked processes start at once."""
    cfg.frame()
    torch.set_num_threads(1)
    # The first step imports hundreds of modules.
    torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1).step()
    import rich.progress  # noqa: F401

    record.code_state()
    record.versions()


def fit_again(job: Config) -> None:
    from sddlskd.training.fit import fit

    fit([job])


class Crash:
    """End this process right before its `at`-th file operation below `folder`.

    The operations are open for writing, fsync, rename and link. Content that was not fsynced by
    then is cut at a random length, as in a power cut.
    """

    def __init__(self, folder: Path, at: int) -> None:
        self.folder, self.left, self.draw = str(folder), at, random.Random(at)
        self.unsynced: dict[str, int] = {}  # {file: size when it was opened}
        self.fsync, self.replace, self.link, self.open = (
            os.fsync,
            os.replace,
            os.link,
            builtins.open,
        )
        os.fsync, os.replace, os.link = (  # type: ignore[assignment]
            self._fsync,
            self._replace,
            self._link,
        )
        builtins.open = io.open = self._open  # type: ignore[assignment]

    def step(self) -> None:
        self.left -= 1
        if self.left < 0:
            for name, size in self.unsynced.items():
                if os.path.exists(name) and (now := os.path.getsize(name)) > size:
                    os.truncate(name, self.draw.randint(size, now))
            os._exit(9)

    def _fsync(self, descriptor: int) -> None:
        self.step()
        self.fsync(descriptor)
        self.unsynced.pop(os.readlink(f"/proc/self/fd/{descriptor}"), None)

    def _replace(self, source: Any, target: Any) -> None:
        self.step()
        self.replace(source, target)

    def _link(self, source: Any, target: Any) -> None:
        self.step()
        self.link(source, target)

    def _open(self, file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        name = os.path.realpath(file) if isinstance(file, str | os.PathLike) else ""
        if name.startswith(self.folder) and not name.endswith(".log") and set(mode) & set("wa"):
            self.step()
            self.unsynced[name] = (
                os.path.getsize(name) if "a" in mode and os.path.exists(name) else 0
            )
        return self.open(file, mode, *arguments, **options)
