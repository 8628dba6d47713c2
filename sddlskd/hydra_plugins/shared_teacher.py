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
    """Options of the launcher for this machine."""

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
    """Options of the sweeper."""

    _target_: str = "hydra_plugins.shared_teacher.GridSweeper"
    # Jobs that the launcher receives at once; null: all of them, so that it can group them.
    max_batch_size: int | None = None
    # The swept keys and their values, written as on the command line.
    params: dict[str, str] = field(default_factory=dict)


ConfigStore.instance().store("grid", GridConfig, group="hydra/sweeper", provider="sddlskd")


class GridSweeper(BasicSweeper):
    """Hydra's sweeper, but our launchers check the jobs themselves.

    Hydra's sweeper composes each job once to check it, which takes a quarter of a second per job.
    With `SharedTeacherLauncher` or a subclass of it, this sweeper leaves the check out. With any
    other launcher, it checks the jobs as Hydra does.
    """

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Check the jobs as Hydra does, unless the launcher checks them; called by Hydra."""
        if not isinstance(self.launcher, SharedTeacherLauncher):
            super().validate_batch_is_legal(batch)


@dataclass
class SharedTeacherLauncher(Launcher):
    """A launcher that freezes every job of the sweep, then trains group after group on each device.

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
        """Run the sweep of the whole grid and return every job's result; called by Hydra."""
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
        jobs = compose_grid(self.hydra_context.config_loader, self.config, job_overrides)
        results = run_sweep(
            jobs,
            str(self.config.sweep.name),
            runner=self._runner(),
            max_group_size=self.max_group_size,
        )
        # If a job failed, run_sweep has already exited. Any other status than COMPLETED would make
        # Hydra raise an error although nothing is wrong.
        return [
            JobReturn(
                overrides=list(overrides),
                working_dir=job.run_dir,
                status=JobStatus.COMPLETED,
                _return_value=result,
            )
            for overrides, job, result in zip(job_overrides, jobs, results, strict=True)
        ]

    def _runner(self) -> Any:
        from sddlskd.sweeps.pool import Pool

        devices = self.devices
        if OmegaConf.is_list(devices):
            devices = OmegaConf.to_container(devices)
        return Pool(devices, fail_fast=self.fail_fast)
