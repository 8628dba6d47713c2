"""The interface of the classes that run the groups of a sweep."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from sddlskd.config import Config

__all__ = ["GroupRunner"]


class GroupRunner(Protocol):
    """Interface of the classes that run a sweep: `Pool` on this machine, `Slurm` on a cluster.

    A group is a list of jobs that are trained together, with one teacher forward pass per batch.

    Attributes:
        runs_locally: whether the jobs run on this machine.
        array_parallelism: largest number of a cluster's tasks that run at once; None on this
            machine.
    """

    runs_locally: bool
    array_parallelism: int | None

    def refusals(self, jobs: Sequence[Config], visible: Sequence[str]) -> Iterator[Exception]:
        """Yield every reason why the runner cannot run the jobs; write no file.

        A reason is a ValueError, or a ConnectionError if a cluster does not answer.

        Args:
            jobs: jobs to run, at least one.
            visible: devices of this machine, such as ["cuda:0"].
        """
        ...

    def validate(self, jobs: Sequence[Config], visible: Sequence[str]) -> None:
        """Check that the runner can run the jobs, before the sweep writes any file.

        The arguments are those of `refusals`.

        Raises:
            ValueError: If the runner cannot run the jobs.
            ConnectionError: If a cluster does not answer.
        """
        for refusal in self.refusals(jobs, visible):
            raise refusal

    def places(self, jobs: Sequence[Config], visible: Sequence[str]) -> list[str]:
        """Return the devices of this machine that train the jobs; [] if a cluster trains them.

        Args:
            jobs: jobs to run.
            visible: devices of this machine, such as ["cuda:0"].
        """
        ...

    def kind(self, jobs: Sequence[Config], visible: Sequence[str]) -> str | None:
        """Return the kind of the devices that train the jobs, "cuda", "mps" or "cpu".

        The time of past runs holds for devices of one kind only. Return None if the kinds differ.
        The arguments are those of `places`.
        """
        ...

    def requests(
        self, groups: Sequence[Sequence[Config]], seconds: Sequence[float | None]
    ) -> list[str]:
        """Return lines for a plan that name the resources which a cluster will be asked for.

        The resources are, for example, the number of tasks, GPUs and the time limit. A runner that
        trains on the local machine returns [].

        Args:
            groups: jobs to run.
            seconds: estimated seconds of each group; None for a group without similar runs.
        """
        ...

    def run(self, groups: Sequence[Sequence[Config]], folder: Path, visible: Sequence[str]) -> str:
        """Run every group.

        Args:
            groups: jobs to run, whose run directories hold config.yaml.
            folder: folder of the sweep.
            visible: devices of this machine, such as ["cuda:0"].

        Returns:
            "FINISHED" if all groups have ended, even if jobs failed; "KILLED" if a signal stopped
            the sweep; "RUNNING" if the groups run on without this process.

        Raises:
            ValueError: If a cluster refuses a job, or if a file of a job is damaged.
            ConnectionError: If a cluster does not answer.
            KeyboardInterrupt: If Ctrl-C ends the wait for a cluster.
        """
        ...
