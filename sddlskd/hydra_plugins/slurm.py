"""Hydra plugin for a sweep on a SLURM cluster.

The launcher has the options of hydra-submitit-launcher, but runs jobs as this package does. The
launching process composes, checks and freezes the jobs once; the nodes read the frozen jobs.
"""

from dataclasses import dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra_plugins.hydra_submitit_launcher.config import SlurmQueueConf
from hydra_plugins.shared_teacher import SharedTeacherLauncher
from omegaconf import MISSING, OmegaConf


@dataclass
class SlurmConfig(SlurmQueueConf):
    """Options of the launcher for SLURM (hydra/launcher=slurm).

    The options of hydra-submitit-launcher come first; those below are added.
    conf/hydra/launcher/slurm.yaml gives each option its value and explains it.
    """

    _target_: str = "hydra_plugins.slurm.SlurmLauncher"
    max_group_size: int | None = MISSING
    wait: bool = MISSING
    fail_fast: bool = MISSING
    max_requeues: int = MISSING
    python: str | None = MISSING
    container: str | None = MISSING
    srun_args: list[str] = MISSING


ConfigStore.instance().store("slurm_frame", SlurmConfig, group="hydra/launcher", provider="sddlskd")


class SlurmLauncher(SharedTeacherLauncher):
    """Launcher that submits every group of a sweep to SLURM, as a task of a job array.

    A group is a set of jobs with the same batches and teacher, which are trained side by side.

    Args:
        max_group_size: largest number of jobs that a task trains side by side; None for no limit.
        submitit_folder: not used; hydra-submitit-launcher's own launcher has this option.
        max_num_timeout: not used; hydra-submitit-launcher's own launcher has this option.
        **options: options of `sddlskd.sweeps.slurm.Slurm`.
    """

    def __init__(
        self,
        *,
        max_group_size: int | None,
        submitit_folder: str,
        max_num_timeout: int,
        **options: Any,
    ) -> None:
        self.max_group_size = max_group_size
        self.options = {}
        for name, value in options.items():
            if OmegaConf.is_config(value):
                value = OmegaConf.to_container(value)
            self.options[name] = value

    def _runner(self) -> Any:
        from sddlskd.sweeps.slurm import Slurm

        return Slurm(**self.options)
