"""A sweep on a SLURM cluster: hydra-submitit-launcher's options, our way of running jobs.

Jobs are composed, checked and frozen once, where the sweep is launched; the nodes read what was frozen.
"""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra_plugins.hydra_submitit_launcher.config import SlurmQueueConf
from hydra_plugins.shared_teacher import SharedTeacherLauncher
from omegaconf import OmegaConf


@dataclass
class SlurmConfig(SlurmQueueConf):
    _target_: str = "hydra_plugins.slurm.SlurmLauncher"
    max_group_size: int | None = (
        1  # jobs that an array task trains side by side; null: as many as share a teacher
    )
    wait: bool = True  # until the sweep is done; false: submit, print the job ids and return
    fail_fast: bool = False  # cancel the sweep at the first job that fails
    max_requeues: int = (
        100  # times that a warned task goes back into the queue before it is left as it is
    )
    python: str | None = (
        None  # what starts Python on a node; null: this Python, which every node must see
    )
    container: str | None = None  # image for srun --container-image (pyxis)
    srun_args: list[str] = field(default_factory=list)  # more words for srun


ConfigStore.instance().store("slurm_frame", SlurmConfig, group="hydra/launcher", provider="sddlskd")


class SlurmLauncher(SharedTeacherLauncher):
    """Submits every group of the sweep as a task of a job array."""

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
        from sddlskd.slurm import Slurm

        return Slurm(**self.options)
