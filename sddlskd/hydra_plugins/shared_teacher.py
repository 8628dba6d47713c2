"""A sweep on this machine: jobs that see the same batches and ask the same teacher are trained side by side.

A launcher that takes the whole grid, and Hydra's own sweeper without composing a large grid twice, which takes minutes.

Hydra imports every launcher at start, so nothing heavy is imported here.
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
    _target_: str = "hydra_plugins.shared_teacher.SharedTeacherLauncher"
    devices: Any = "auto"  # auto: every visible GPU, else one CPU worker; or a list such as [cuda:0,cuda:1] or [cpu,cpu]
    max_group_size: int | None = None  # jobs that train side by side; null: as many as fit
    fail_fast: bool = False  # stop the sweep at the first job that fails


ConfigStore.instance().store(
    "shared_teacher", SharedTeacherConfig, group="hydra/launcher", provider="sddlskd"
)


@dataclass
class GridConfig:
    _target_: str = "hydra_plugins.shared_teacher.GridSweeper"
    max_batch_size: int | None = (
        None  # jobs handed over at once; null: all, so that they can be grouped
    )
    params: dict[str, str] = field(default_factory=dict)  # what is swept, as on the command line


ConfigStore.instance().store("grid", GridConfig, group="hydra/sweeper", provider="sddlskd")


class GridSweeper(BasicSweeper):
    """Hydra's sweeper. It composes every job once to check it, a quarter second each; our launcher does so itself."""

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Called by Hydra."""
        if not isinstance(self.launcher, SharedTeacherLauncher):
            super().validate_batch_is_legal(batch)


@dataclass
class SharedTeacherLauncher(Launcher):
    """Freezes every job of the sweep when it is launched, then fits group after group on every device."""

    devices: Any = "auto"
    max_group_size: int | None = None
    fail_fast: bool = False
    config: DictConfig = field(init=False)
    hydra_context: HydraContext = field(init=False)

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Called by Hydra."""
        self.config, self.hydra_context = config, hydra_context

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Called by Hydra with the whole grid."""
        try:
            return self._launch(job_overrides)
        finally:
            folder = Path(self.config.hydra.sweep.dir)
            if not (
                folder / "sweep.json"
            ).exists():  # a plan or a refusal leaves no trace; Hydra wrote this before us
                (folder / "multirun.yaml").unlink(missing_ok=True)
                for empty in (folder, folder.parent, folder.parent.parent):
                    with suppress(OSError):
                        empty.rmdir()

    def _launch(self, job_overrides: Sequence[Sequence[str]]) -> Sequence[JobReturn]:
        from sddlskd.grid import compose_grid
        from sddlskd.sweeps import run_sweep

        if self.config.sweep.jobs:
            lines = [line.split() for line in self.config.sweep.jobs]
            job_overrides = [[*overrides, *line] for overrides in job_overrides for line in lines]
        jobs = compose_grid(self.hydra_context.config_loader, self.config, job_overrides)
        results = run_sweep(
            jobs, str(self.config.sweep.name), pool=self._pool(), max_group_size=self.max_group_size
        )
        return [  # run_sweep has exited where a job failed; any other status would make Hydra raise what is no error
            JobReturn(
                overrides=list(overrides),
                working_dir=job.run_dir,
                status=JobStatus.COMPLETED,
                _return_value=result,
            )
            for overrides, job, result in zip(job_overrides, jobs, results, strict=True)
        ]

    def _pool(self) -> Any:
        from sddlskd.pool import Pool

        devices = (
            OmegaConf.to_container(self.devices)
            if OmegaConf.is_list(self.devices)
            else self.devices
        )
        return Pool(devices, fail_fast=self.fail_fast)
