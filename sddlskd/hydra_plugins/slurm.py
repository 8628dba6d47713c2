"""Hydra plugin for a sweep on a SLURM cluster.

The launcher has the options of hydra-submitit-launcher, but runs jobs as this package does. The
launching process composes, checks and freezes the jobs once; the nodes read the frozen jobs.
"""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra_plugins.hydra_submitit_launcher.config import SlurmQueueConf
from hydra_plugins.shared_teacher import SharedTeacherLauncher
from omegaconf import OmegaConf


@dataclass
class SlurmConfig(SlurmQueueConf):
    """Options of the launcher for SLURM, in addition to those of hydra-submitit-launcher."""

    _target_: str = "hydra_plugins.slurm.SlurmLauncher"
    # Jobs that one array task trains side by side; null: all jobs that share batches and teacher.
    max_group_size: int | None = 1
    # true: wait until the sweep is done; false: submit, print the job ids and return
    wait: bool = True
    fail_fast: bool = False  # cancel the sweep at the first job that fails
    # How often a warned task goes back into the queue before it stays interrupted.
    max_requeues: int = 100
    # Command that starts Python on a node; null: this Python, whose path every node must see.
    python: str | None = None
    container: str | None = None  # image for srun --container-image (pyxis)
    srun_args: list[str] = field(default_factory=list)  # further arguments of srun


ConfigStore.instance().store("slurm_frame", SlurmConfig, group="hydra/launcher", provider="sddlskd")


class SlurmLauncher(SharedTeacherLauncher):
    """A launcher that submits every group of the sweep as a task of a job array.

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
        self.options = {
            k: OmegaConf.to_container(v) if OmegaConf.is_config(v) else v
            for k, v in options.items()
        }

    def _pool(self) -> Any:
        from sddlskd.sweeps.slurm import Slurm

        return Slurm(**self.options)
