"""Hydra plugins for a sweep on this machine: a launcher and a sweeper.

The launcher takes the whole grid. It trains jobs side by side if they see the same batches and
have the same teacher. The sweeper is Hydra's own, but it does not compose a large grid twice, which
would take minutes.

Hydra imports every launcher at start, so this module imports nothing heavy.
"""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, read_write


@dataclass
class SharedTeacherConfig:
    """Options of the launcher for this machine (hydra/launcher=shared_teacher).

    Attributes:
        devices: list of devices, such as [cuda:0,cuda:1] or [cpu,cpu], one for each worker process
            that runs at a time. "auto" takes the jobs' trainer.device; if that is auto as well, the
            devices are all visible GPUs, else MPS, else the CPU.
        max_group_size: largest number of jobs that train together, with one teacher forward pass
            per batch; None for no limit.
        fail_fast: whether to stop the sweep at the first job that fails.
    """

    _target_: str = "hydra_plugins.shared_teacher.SharedTeacherLauncher"
    devices: Any = "auto"
    max_group_size: int | None = None
    fail_fast: bool = False


ConfigStore.instance().store(
    "shared_teacher", SharedTeacherConfig, group="hydra/launcher", provider="sddlskd"
)


@dataclass
class GridConfig:
    """Options of this package's sweeper `GridSweeper` (hydra/sweeper=grid).

    Attributes:
        max_batch_size: number of jobs that the launcher receives at once; None for all of them, so
            that the launcher can group them.
        params: swept keys and their values, written as on the command line, such as
            {"seed": "0,1,2"}.
        n_trials: not used; an option of a search, whose file may be run as a grid.
        n_jobs: not used, as `n_trials`.
        seed: not used, as `n_trials`.
    """

    _target_: str = "hydra_plugins.shared_teacher.GridSweeper"
    max_batch_size: int | None = None
    params: dict[str, str] = field(default_factory=dict)
    n_trials: int | None = None
    n_jobs: int | None = None
    seed: int | None = None


ConfigStore.instance().store("grid", GridConfig, group="hydra/sweeper", provider="sddlskd")


class GridSweeper(BasicSweeper):
    """Hydra's basic sweeper, with two differences: its check of the jobs, and its files.

    It does not check jobs that the launcher checks itself. The launchers that do so are
    `SharedTeacherLauncher` and its subclasses. Hydra's own check takes minutes for a large grid. A
    plan (`sweep.plan`) and a refused sweep leave no files.

    Args:
        max_batch_size: number of jobs that the launcher receives at once; None for all of them.
        params: swept keys and their values, as in `GridConfig`.
        **of_search: not used; options of `OptunaSweeper`.
    """

    def __init__(
        self, max_batch_size: int | None, params: dict[str, str], **of_search: int | None
    ) -> None:
        super().__init__(max_batch_size=max_batch_size, params=params)

    def sweep(self, arguments: list[str]) -> Any:
        """Run or plan the sweep; Hydra calls this method.

        Args:
            arguments: overrides of the command line.

        Returns:
            What Hydra's basic sweeper returns: the results of the jobs, batch by batch.

        Raises:
            Exception: As Hydra's basic sweeper and the launcher raise it.
        """
        # Hydra refuses intervals of a search, also if the command line replaces them.
        replaced = {word.partition("=")[0] for word in arguments}
        self.params = {key: text for key, text in self.params.items() if key not in replaced}
        settings = self.config.hydra.sweep
        self._missing = missing_paths(Path(settings.dir))
        if not self.config.sweep.plan:
            return super().sweep(arguments)
        # Hydra writes multirun.yaml before the launcher is called. A plan must not write into the
        # folder of the sweep, which may be that of an earlier launch.
        with TemporaryDirectory() as folder, read_write(settings):
            settings.dir = folder
            return super().sweep(arguments)

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Check that Hydra can compose each job, unless the launcher is a `SharedTeacherLauncher`.

        Such a launcher checks the jobs itself. Hydra calls this method before it launches the jobs.

        Args:
            batch: overrides of each job.

        Raises:
            ValueError: If the sweep has a setting that only a `SharedTeacherLauncher` knows (see
                `refuse_settings`). The files that Hydra made for the sweep are removed then.
            Exception: The error of Hydra or OmegaConf if a job cannot be composed.
        """
        if not isinstance(self.launcher, SharedTeacherLauncher):
            try:
                refuse_settings(self.config, [word for words in batch for word in words])
            except ValueError:
                leave_no_files(self._missing)
                raise
            super().validate_batch_is_legal(batch)


@dataclass
class SharedTeacherLauncher(Launcher):
    """Hydra launcher that trains the jobs of a sweep on this machine.

    Jobs with the same batches and teacher are trained together, with one teacher forward pass per
    batch. Each device trains one such group after the other.

    Attributes:
        devices: "auto" or a list of devices, as in `SharedTeacherConfig`.
        max_group_size: largest number of jobs that train together; None for no limit.
        fail_fast: whether to stop the sweep at the first job that fails.
        config: configuration of the sweep as Hydra composes it; set by `setup`.
        hydra_context: Hydra's loaders; set by `setup`.
        missing: the paths that a refused sweep removes, see `missing_paths`; set by `setup`.
        searches: whether a search calls the launcher several times. The launcher then prints no
            results unless a job failed, because the search prints all results at its end.
    """

    devices: Any
    max_group_size: int | None
    fail_fast: bool
    config: DictConfig = field(init=False)
    hydra_context: HydraContext = field(init=False)
    missing: list[Path] = field(init=False)
    searches: bool = field(default=False, init=False)

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Keep the arguments that `launch` needs; Hydra calls this method before `launch`.

        Args:
            hydra_context: Hydra's loaders.
            task_function: function that Hydra's own launchers run for each job; not used.
            config: configuration of the sweep as Hydra composes it.
        """
        self.config = config
        self.hydra_context = hydra_context
        self.missing = missing_paths(Path(config.hydra.sweep.dir))

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run the jobs of a sweep, and return the result of every job; called by Hydra.

        If no job is started, because the sweep was only planned or was refused, the files that
        Hydra made for the sweep are removed.

        Args:
            job_overrides: overrides of each job. If the setting `sweep.jobs` holds lines of
                overrides, there is a job for each combination of an element and a line. With
                sweep.seeds=until_decided, each of these jobs is run with several seeds.
            initial_job_idx: not used.

        Returns:
            A JobReturn for each job, with its overrides, its run directory, the status COMPLETED
            and its objective (None if it has not finished).

        Raises:
            ValueError: If the sweep cannot be run: an option of the launcher is out of bounds, jobs
                are invalid, or any other setting or file is wrong.
            OSError, ChildProcessError, KeyboardInterrupt, SystemExit: As `run_sweep` raises them,
                for example SystemExit with code 1 if a job failed.
        """
        try:
            return self._launch(job_overrides)
        finally:
            # A refused sweep must leave no files, but Hydra has written multirun.yaml.
            if not Path(self.config.hydra.sweep.dir, "sweep.json").exists():
                leave_no_files(self.missing)

    def _launch(self, job_overrides: Sequence[Sequence[str]]) -> Sequence[JobReturn]:
        from sddlskd import config as cfg
        from sddlskd.sweeps import run_sweep
        from sddlskd.sweeps.grid import compose_grid
        from sddlskd.sweeps.plan import check_halving

        cfg.check_launcher(self.config.hydra.launcher)
        if self.config.sweep.jobs:
            lines = [line.split() for line in self.config.sweep.jobs]
            job_overrides = [[*overrides, *line] for overrides in job_overrides for line in lines]
        if self.config.sweep.seeds is not None:
            return self._launch_until_decided(job_overrides)
        jobs = compose_grid(self.hydra_context.config_loader, self.config, job_overrides)
        if self.config.sweep.halving and not self.searches:
            check_halving(jobs, self.max_group_size)
        results = run_sweep(
            jobs,
            str(self.config.sweep.name),
            runner=self._runner(),
            max_group_size=self.max_group_size,
            print_results=not self.searches,
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
        if self.config.sweep.halving:
            raise ValueError(
                "sweep.seeds=until_decided needs all runs to the end; leave out sweep.halving"
            )
        if any(_is_seed(word) for word in self.config.hydra.overrides.task):
            raise ValueError(
                "give either seed=... or sweep.seeds=until_decided, which chooses the seeds"
            )
        # The seeds of a sweep's file are those of a sweep without `sweep.seeds`.
        seedless = {tuple(word for word in cell if not _is_seed(word)): None for cell in cells}
        cells = [list(cell) for cell in seedless]
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


def _is_seed(override: str) -> bool:
    return override.lstrip("+").startswith("seed=")


def refuse_settings(config: DictConfig, words: Sequence[str]) -> None:
    """Raise ValueError if a sweep has a setting that only the launchers of this package know.

    Args:
        config: configuration of a sweep with another launcher, such as Hydra's basic one.
        words: overrides of all jobs of the sweep.
    """
    settings = config.sweep
    refused = {
        "sweep.plan=true": bool(settings.plan),
        f"sweep.rerun={settings.rerun}": str(settings.rerun) != "failed",
        "sweep.seeds=until_decided": settings.seeds is not None,
        f"sweep.halving={settings.halving}": bool(settings.halving),
    }
    # Hydra merges the teachers of a list; a launcher of this package spells each of them.
    refused |= {word: True for word in words if word.startswith("teacher=[")}
    for setting, is_set in refused.items():
        if is_set:
            launcher = config.hydra.runtime.choices["hydra/launcher"]
            raise ValueError(
                f"{setting} cannot be used with hydra/launcher={launcher}, which trains each job "
                "alone; leave hydra/launcher out"
            )


def missing_paths(folder: Path) -> list[Path]:
    """Return which paths Hydra will make for a sweep in `folder`, the innermost one first.

    These are multirun.yaml in the folder, the folder, and its parents, if they do not exist yet.
    """
    paths = [folder / "multirun.yaml", folder, *folder.absolute().parents]
    return [path for path in paths if not os.path.lexists(path)]


def leave_no_files(missing: Sequence[Path]) -> None:
    """Remove the file and the empty folders that Hydra has made for a sweep that does not run.

    `missing` is what `missing_paths` returned before Hydra made them. A folder that is not empty
    stays, and a path that is still missing is no error.
    """
    for path in missing:
        with suppress(OSError):
            if path.is_dir():
                path.rmdir()
            else:
                path.unlink()


def _returned(
    overrides: Sequence[Sequence[str]], jobs: Sequence[Any], results: Sequence[dict[str, Any]]
) -> list[JobReturn]:
    """Return what Hydra expects of each job, with the objective as the value that the job returns.

    If a job failed, `run_sweep` has exited before. Any other status than COMPLETED would make Hydra
    raise an error although nothing is wrong.
    """
    from sddlskd.sweeps.search import objective_of

    return [
        JobReturn(
            overrides=list(words),
            working_dir=job.run_dir,
            status=JobStatus.COMPLETED,
            _return_value=objective_of(job, result),
        )
        for words, job, result in zip(overrides, jobs, results, strict=True)
    ]
