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

    The options of hydra-submitit-launcher, such as partition and timeout_min, are inherited. The
    file conf/hydra/launcher/slurm.yaml sets and explains all options.

    Attributes:
        max_group_size: largest number of jobs that a task trains together; None for no limit.
        wait: whether the sweep's command waits until the tasks have ended; if False, the command
            only submits the tasks.
        fail_fast: whether to cancel the sweep at the first job that fails.
        max_requeues: how often at most a task goes back into SLURM's queue.
        python: command that starts Python on a node; None for the Python that submits the tasks.
        container: image for `srun --container-image`; None for no container.
        srun_args: arguments of srun, in addition to those that submitit gives it.
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
    """Hydra launcher that submits the jobs of a sweep to SLURM, as tasks of job arrays.

    A task trains jobs with the same batches and teacher together, with one teacher forward pass per
    batch.

    Args:
        max_group_size: largest number of jobs that a task trains together; None for no limit.
        submitit_folder: not used; an option of hydra-submitit-launcher's own launcher.
        max_num_timeout: not used; an option of hydra-submitit-launcher's own launcher.
        **options: arguments of `sddlskd.sweeps.slurm.Slurm`.
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
