"""Hydra plugins for a sweep on this machine: a launcher and a sweeper.

The launcher takes the whole grid. It trains jobs side by side if they see the same batches and
have the same teacher. The sweeper is Hydra's own, but it does not compose a large grid twice, which
would take minutes.

Hydra imports every launcher at start, so this module imports nothing heavy.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf


@dataclass
class SharedTeacherConfig:
    """Options of the launcher for this machine (hydra/launcher=shared_teacher)."""

    _target_: str = "hydra_plugins.shared_teacher.SharedTeacherLauncher"
    # auto: the jobs' trainer.device; if that is auto too, every visible GPU, or one CPU worker if
    # there is no GPU. Otherwise a list such as [cuda:0,cuda:1] or [cpu,cpu].
    devices: Any = "auto"
    max_group_size: int | None = None  # jobs that train side by side; null: as many as fit
    fail_fast: bool = False  # stop the sweep at the first job that fails


ConfigStore.instance().store(
    "shared_teacher", SharedTeacherConfig, group="hydra/launcher", provider="sddlskd"
)


@dataclass
class GridConfig:
    """Options of the sweeper (hydra/sweeper=grid)."""

    _target_: str = "hydra_plugins.shared_teacher.GridSweeper"
    # Jobs that the launcher receives at once; null: all of them, so that it can group them.
    max_batch_size: int | None = None
    # The swept keys and their values, written as on the command line.
    params: dict[str, str] = field(default_factory=dict)


ConfigStore.instance().store("grid", GridConfig, group="hydra/sweeper", provider="sddlskd")


class GridSweeper(BasicSweeper):
    """Hydra's basic sweeper without its check of the jobs, if the launcher checks the jobs itself.

    The check composes each job once, which takes a quarter of a second per job. The sweeper leaves
    the check out for `SharedTeacherLauncher` and its subclasses only.
    """

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Check the jobs as Hydra does, unless the launcher checks them itself; called by Hydra.

        `batch` holds the overrides of each job. Raise Hydra's error if one of them cannot be
        composed.
        """
        if not isinstance(self.launcher, SharedTeacherLauncher):
            super().validate_batch_is_legal(batch)


@dataclass
class SharedTeacherLauncher(Launcher):
    """Launcher that trains a sweep on this machine, one group of jobs after the other per device.

    A group is a set of jobs with the same batches and teacher, which are trained side by side.
    Before the training, the configuration of each job is frozen, that is, written to its run
    directory.

    Attributes:
        devices: "auto" or a list of devices, as in `SharedTeacherConfig`.
        max_group_size: largest number of jobs that train side by side; None for no limit.
        fail_fast: whether to stop the sweep at the first job that fails.
        config: configuration of the sweep; set by `setup`.
        hydra_context: Hydra's loaders; set by `setup`.
    """

    devices: Any
    max_group_size: int | None
    fail_fast: bool
    config: DictConfig = field(init=False)
    hydra_context: HydraContext = field(init=False)

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Keep what `launch` needs; called by Hydra.

        Args:
            hydra_context: Hydra's loaders.
            task_function: function that Hydra would run for each job; not used.
            config: configuration of the sweep.
        """
        self.config = config
        self.hydra_context = hydra_context

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run the sweep of the whole grid and return every job's result; called by Hydra.

        If the sweep was only planned or was refused, the files that Hydra made for it are removed.

        Args:
            job_overrides: overrides of each job. If `sweep.jobs` is set, each of its lines of
                overrides is added to each of them, which makes one job per combination.
            initial_job_idx: not used.

        Returns:
            For each job its overrides, its run directory, the status COMPLETED and the content of
            its result.json.

        Raises:
            ValueError: If an option of the launcher is out of bounds, if jobs are invalid (the
                message names all of them), or if the runner refuses the jobs.
            ConnectionError: If the tracking server or SLURM does not answer.
            ChildProcessError: If the process that checks the jobs dies.
            SystemExit: As `run_sweep` raises it, for example with code 1 if a job failed.
        """
        try:
            return self._launch(job_overrides)
        finally:
            folder = Path(self.config.hydra.sweep.dir)
            # A plan or a refused sweep must leave no files, but Hydra has written multirun.yaml.
            if not (folder / "sweep.json").exists():
                (folder / "multirun.yaml").unlink(missing_ok=True)
                for empty in (folder, folder.parent, folder.parent.parent):
                    with suppress(OSError):
                        empty.rmdir()

    def _launch(self, job_overrides: Sequence[Sequence[str]]) -> Sequence[JobReturn]:
        from sddlskd import config as cfg
        from sddlskd.sweeps import run_sweep
        from sddlskd.sweeps.grid import compose_grid

        cfg.check_launcher(self.config.hydra.launcher)
        if self.config.sweep.jobs:
            lines = [line.split() for line in self.config.sweep.jobs]
            job_overrides = [[*overrides, *line] for overrides in job_overrides for line in lines]
        if self.config.sweep.seeds is not None:
            return self._launch_until_decided(job_overrides)
        jobs = compose_grid(self.hydra_context.config_loader, self.config, job_overrides)
        results = run_sweep(
            jobs,
            str(self.config.sweep.name),
            runner=self._runner(),
            max_group_size=self.max_group_size,
        )
        return _returned(job_overrides, jobs, results)

    def _launch_until_decided(self, cells: Sequence[Sequence[str]]) -> Sequence[JobReturn]:
        """Run the jobs of the cells with a seed after the other, until their gains are decided."""
        from sddlskd.sweeps.until_decided import run_until_decided

        if self.config.hydra.sweeper.max_batch_size is not None:
            raise ValueError(
                "sweep.seeds=until_decided compares all jobs of the sweep; "
                "leave out hydra.sweeper.max_batch_size"
            )
        named = [*self.config.hydra.overrides.task, *(word for cell in cells for word in cell)]
        if any(word.lstrip("+").startswith("seed=") for word in named):
            raise ValueError(
                "give either seed=... or sweep.seeds=until_decided, which chooses the seeds"
            )
        overrides, jobs, results = run_until_decided(
            cells,
            self.hydra_context.config_loader,
            self.config,
            runner=self._runner(),
            max_group_size=self.max_group_size,
        )
        return _returned(overrides, jobs, results)

    def _runner(self) -> Any:
        from sddlskd.sweeps.pool import Pool

        devices = self.devices
        if OmegaConf.is_list(devices):
            devices = OmegaConf.to_container(devices)
        return Pool(devices, fail_fast=self.fail_fast)


def _returned(
    overrides: Sequence[Sequence[str]], jobs: Sequence[Any], results: Sequence[dict[str, Any]]
) -> list[JobReturn]:
    """Return what Hydra expects of each job.

    If a job failed, `run_sweep` has exited before. Any other status than COMPLETED would make Hydra
    raise an error although nothing is wrong.
    """
    return [
        JobReturn(
            overrides=list(words),
            working_dir=job.run_dir,
            status=JobStatus.COMPLETED,
            _return_value=result,
        )
        for words, job, result in zip(overrides, jobs, results, strict=True)
    ]
