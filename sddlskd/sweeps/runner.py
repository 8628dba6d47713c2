"""The interface of the classes that run the groups of a sweep."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from sddlskd.config import Config

__all__ = ["GroupRunner"]


class GroupRunner(Protocol):
    """Interface of what runs the groups of a sweep: `Pool` on this machine, `Slurm` on a cluster.

    Attributes:
        runs_locally: whether the jobs run on this machine.
    """

    runs_locally: bool

    def validate(self, jobs: Sequence[Config]) -> None:
        """Check, before anything is written, that the jobs can be run.

        Raises:
            ValueError: If the jobs cannot be run.
            ConnectionError: If a cluster does not answer.
        """
        ...

    def run(self, groups: Sequence[Sequence[Config]], folder: Path, visible: Sequence[str]) -> str:
        """Run every group.

        Args:
            groups: frozen jobs to run; the jobs of a group are trained side by side.
            folder: folder of the sweep.
            visible: devices of this machine, such as ["cuda:0"].

        Returns:
            FINISHED if all groups have ended, also with failures; KILLED if a signal stopped the
            sweep; RUNNING if the groups run on without this process.

        Raises:
            ValueError: If a cluster refuses a job.
            ConnectionError: If a cluster does not answer.
        """
        ...
