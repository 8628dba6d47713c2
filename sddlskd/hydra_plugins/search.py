"""Hydra plugin for a search: a sweeper that lets Optuna propose the jobs.

hydra-optuna-sweeper requires Optuna 2, whose SQLite storage fails with the SQLAlchemy of MLflow.
The sweeper of this module replaces hydra-optuna-sweeper. Hydra imports every plugin at start, so
this module imports nothing heavy.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


@dataclass
class OptunaConfig:
    """Options of the sweeper for a search; conf/hydra/sweeper/optuna.yaml explains them.

    Attributes:
        n_trials: number of jobs that the search trains.
        n_jobs: number of jobs that are proposed and trained together.
        seed: seed of the proposals.
        params: varied keys and their values, written as on the command line, such as
            {"distiller.temperature": "interval(1.0,8.0)"}.
    """

    _target_: str = "hydra_plugins.search.OptunaSweeper"
    n_trials: int = 20
    n_jobs: int = 2
    seed: int = 0
    params: dict[str, str] = field(default_factory=dict)


ConfigStore.instance().store(
    "optuna_frame", OptunaConfig, group="hydra/sweeper", provider="sddlskd"
)


@dataclass
class OptunaSweeper(Sweeper):
    """Hydra sweeper that searches for the settings that give the best result.

    The configuration key `objective` names the result, an accuracy or a loss. Jobs are trained
    `n_jobs` at a time. With a launcher of sddlskd, these jobs share the teacher's forward passes.

    Attributes:
        n_trials: number of jobs that the search trains.
        n_jobs: number of jobs that are proposed and trained together.
        seed: seed of the proposals.
        params: varied keys and their values, as in `OptunaConfig`.
        config: configuration of the sweep as Hydra composes it; set by `setup`.
        hydra_context: Hydra's loaders; set by `setup`.
        launcher: what trains the jobs; set by `setup`.
    """

    n_trials: int
    n_jobs: int
    seed: int
    params: dict[str, str]
    config: DictConfig = field(init=False)
    hydra_context: HydraContext = field(init=False)
    launcher: Launcher = field(init=False)

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Keep the arguments and make the launcher; Hydra calls this method before `sweep`.

        Args:
            hydra_context: Hydra's loaders.
            task_function: function that Hydra's own launchers run for each job.
            config: configuration of the sweep as Hydra composes it.
        """
        # Hydra executes each plugin's module anew, so the class at import is not that of launchers.
        from hydra_plugins.shared_teacher import SharedTeacherLauncher

        self.config = config
        self.hydra_context = hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )
        if isinstance(self.launcher, SharedTeacherLauncher):
            self.launcher.searches = True

    def sweep(self, arguments: list[str]) -> None:
        """Run the search, and print its best job; Hydra calls this method.

        Args:
            arguments: overrides of the command line.

        Raises:
            ValueError: If the search cannot be run: an option is not valid, Optuna is not
                installed, jobs are invalid, or any other setting or file is wrong.
            SystemExit: With code 1 if a job failed, and as the launcher raises it.
        """
        from hydra_plugins.shared_teacher import leave_no_files, missing_paths

        from sddlskd.sweeps.search import DATABASE, Search, Start, split_words

        self._check()
        swept = [f"{key}={value}" for key, value in self.params.items()]
        fixed, varied = split_words([*swept, *arguments])
        folder = Path(self.config.hydra.sweep.dir)
        is_new = not (folder / DATABASE).exists()
        missing = missing_paths(folder)
        search = Search(
            folder=None if self.config.sweep.plan else folder,
            objective=self.config.objective,
            fixed=fixed,
            varied=varied,
            n_trials=self.n_trials,
            n_jobs=self.n_jobs,
            seed=self.seed,
            start=Start.of(self.config),
        )
        try:
            search.open()
            search.run(self._compose, self._launch)
        finally:
            # A refused search must leave no files.
            if is_new and not search.has_begun and not (folder / "sweep.json").exists():
                (folder / DATABASE).unlink(missing_ok=True)
                leave_no_files(missing)

    def _check(self) -> None:
        """Raise ValueError if an option of the sweep or of the launcher does not suit a search."""
        for name in ("n_trials", "n_jobs"):
            if getattr(self, name) < 1:
                raise ValueError(f"hydra.sweeper.{name}={getattr(self, name)} must be at least 1")
        from hydra_plugins.shared_teacher import SharedTeacherLauncher, refuse_settings

        if not isinstance(self.launcher, SharedTeacherLauncher):
            refuse_settings(self.config, [])
        settings, launcher = self.config.sweep, self.config.hydra.launcher
        for key, refused in {
            "sweep.jobs": bool(settings.jobs),
            "sweep.seeds": settings.seeds is not None,
            "sweep.rerun=all": str(settings.rerun) == "all",
            "hydra.launcher.wait=false": launcher.get("wait") is False,
        }.items():
            if refused:
                raise ValueError(f"{key} cannot be used with hydra/sweeper=optuna; leave it out")
        if settings.halving and (self.n_jobs < 2 or launcher.get("max_group_size") == 1):
            raise ValueError(
                f"sweep.halving={settings.halving} compares the trials of a batch that train "
                "together; set hydra.sweeper.n_jobs to at least 2, and "
                "hydra.launcher.max_group_size=null"
            )

    def _launch(self, overrides: Sequence[Sequence[str]]) -> Any:
        return self.launcher.launch(overrides, initial_job_idx=0)

    def _compose(self, overrides: Sequence[Sequence[str]]) -> list[Any]:
        from sddlskd.sweeps.grid import compose_grid

        return compose_grid(self.hydra_context.config_loader, self.config, overrides)
