"""Keep copies of runs: in MLflow, in TensorBoard's event files, and in offline runs of W&B.

The setting `tracking.enabled` asks for the copy in MLflow, and `tracking.mirrors` for copies in the
run directory. All copies hold the metrics, parameters and outcome of the record (the files of the
run directory), under the same names.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from sddlskd.config import Config, FileMirror
from sddlskd.tracking.mirror import Mirror
from sddlskd.tracking.tensorboard import EventFiles
from sddlskd.tracking.uri import first_line
from sddlskd.tracking.wandb import OfflineRun

__all__ = ["Copies", "check_packages", "is_copied", "write_copies"]

log = logging.getLogger(__name__)


class Writer(Protocol):
    """Interface of the classes that write a copy of one run into its run directory."""

    def update(self) -> None:
        """Write what the record of the run holds and the copy lacks."""

    def close(self) -> None:
        """Close the copy's files."""


WRITERS: dict[FileMirror, Callable[..., Writer]] = {
    FileMirror.tensorboard: EventFiles,
    FileMirror.wandb: OfflineRun,
}
CURES = {
    FileMirror.tensorboard: "pip install 'sddlskd[tensorboard]'",
    FileMirror.wandb: "pip install wandb",
}


class Copies:
    """Keeps all copies of the runs of a group up to date with the run directories.

    A background thread (`Mirror`) writes the copy in MLflow; `update` itself writes the copies in
    the run directories. No error of a copy reaches the caller: the first error of a copy is logged
    as a warning, and the next call of `update` tries again.

    Args:
        configs: The configurations of the runs, whose settings `tracking` choose the copies.
    """

    def __init__(self, configs: Sequence[Config]) -> None:
        self._mlflow: Mirror | None = None
        if any(config.tracking.enabled for config in configs):
            self._mlflow = Mirror()
        self._writers: dict[Path, list[tuple[FileMirror, Writer]]] = {
            Path(config.run_dir): [
                (name, WRITERS[name](Path(config.run_dir))) for name in config.tracking.mirrors
            ]
            for config in configs
        }
        self._warned: set[tuple[Path, FileMirror]] = set()

    def update(self, folder: Path) -> None:
        """Bring the copies of a run up to date; `folder` is its run directory, which has changed.

        The copies in the run directory are complete when the call returns. MLflow follows later.
        """
        for name, writer in self._writers.get(folder, ()):
            try:
                writer.update()
            except Exception as error:  # an error of a copy must not end the training
                if (folder, name) not in self._warned:
                    reason = f"{type(error).__name__}: {first_line(error)}"
                    log.warning("%s: no copy for %s (%s); training continues", folder, name, reason)
                self._warned.add((folder, name))
        if self._mlflow:
            self._mlflow.update(folder)

    def close(self) -> None:
        """Close the files of all copies, and wait for MLflow as `Mirror.close` does."""
        for writers in self._writers.values():
            for _, writer in writers:
                writer.close()
        if self._mlflow:
            self._mlflow.close()


def is_copied(config: Config) -> bool:
    """Return whether a run is to have any copy, in MLflow or in its run directory."""
    return config.tracking.enabled or bool(config.tracking.mirrors)


def check_packages(configs: Iterable[Config]) -> None:
    """Raise ValueError if a run wants a copy (`tracking.mirrors`) whose package is not installed.

    The packages are tensorboard and wandb. `configs` are the configurations of the runs.
    """
    for name in {name for config in configs for name in config.tracking.mirrors}:
        _check_package(name)


def _check_package(name: FileMirror) -> None:
    found = find_spec(str(name))
    # A folder of this name in the working directory is a package without an origin.
    if found is None or found.origin is None:
        raise ValueError(
            f"tracking.mirrors: {name} is not installed: {CURES[name]}, or leave {name} out"
        )


def write_copies(folder: Path, mirrors: Iterable[FileMirror], *, again: bool = False) -> None:
    """Write copies of a run for TensorBoard or W&B into the run directory.

    Args:
        folder: The run directory. The run must not be in training, because the process that trains
            a run also writes the copies.
        mirrors: The copies to write.
        again: Whether to write everything anew, including what the copies hold already.

    Raises:
        ValueError: If the package that writes one of the copies is not installed.
        Damaged: If the record of the run is damaged.
    """
    for name in mirrors:
        _check_package(name)
        writer = WRITERS[name](folder, again=again)
        try:
            writer.update()
        finally:
            writer.close()
