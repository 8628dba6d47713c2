"""Processes that end at a chosen point of their writing, as by SIGKILL or by a power cut."""

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
    """The id of a new process that does this and ends with 0, or with 1 where it raises; ours must have no threads."""
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
    """The exit code of a process, once it ended; minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def ready() -> None:
    """What every process would do for itself: forked ones then start in no time."""
    cfg.frame()
    torch.set_num_threads(1)
    torch.optim.SGD(
        [torch.zeros(1, requires_grad=True)], lr=0.1
    ).step()  # imports hundreds of modules
    import rich.progress  # noqa: F401

    record.code_state()
    record.versions()


def fit_again(job: Config) -> None:
    from sddlskd.training.fit import fit

    fit([job])


class Crash:
    """Ends this process right before its `at`-th file operation below `folder` (open for writing, fsync, rename,
    link).

    What was not fsynced by then is cut at a random length, as a power cut would leave it.
    """

    def __init__(self, folder: Path, at: int) -> None:
        self.folder, self.left, self.draw = str(folder), at, random.Random(at)
        self.unsynced: dict[str, int] = {}  # file -> its size when it was opened
        self.fsync, self.replace, self.link, self.open = (
            os.fsync,
            os.replace,
            os.link,
            builtins.open,
        )
        os.fsync, os.replace, os.link = self._fsync, self._replace, self._link  # type: ignore[assignment]
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
