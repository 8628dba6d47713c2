"""The launchers that can be chosen: what each makes of its configuration, without a cluster."""

from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.types import RunMode
from hydra.utils import instantiate

from sddlskd import config as cfg
from sddlskd.pool import Pool
from sddlskd.slurm import Slurm


def chosen(folder: Path, *overrides: str) -> Any:
    cfg.frame()
    search = create_config_search_path(str(files("sddlskd.conf")))
    search.prepend("command-line", f"file://{folder}")
    given = [f"home={folder}", "sweep.name=mine", *overrides]
    config = ConfigLoaderImpl(search).load_configuration("config", given, RunMode.MULTIRUN)
    return instantiate(config.hydra.launcher)


@pytest.mark.parametrize(
    ("choice", "group_size", "kind"),
    [
        ("shared_teacher", None, Pool),
        ("submitit_local", 1, Pool),
        ("slurm", 1, Slurm),
        ("slurm_shared_teacher", None, Slurm),
    ],
)
def test_how_large_groups_are_and_who_runs_them(
    choice: str, group_size: int | None, kind: type, tmp_path: Path
) -> None:
    launcher = chosen(tmp_path, f"hydra/launcher={choice}")
    assert launcher.max_group_size == group_size
    assert isinstance(launcher._pool(), kind)


def test_a_profile_of_a_cluster_is_one_small_file(tmp_path: Path) -> None:
    path = tmp_path / "hydra/launcher/mine.yaml"
    path.parent.mkdir(parents=True)
    path.write_text("defaults: [slurm_shared_teacher, _self_]\npartition: gpu\nsetup: [module load cuda]\n")
    launcher = chosen(
        tmp_path, "hydra/launcher=mine", "hydra.launcher.container=image.sqsh", "hydra.launcher.wait=false"
    )
    pool = launcher._pool()
    assert launcher.max_group_size is None
    assert pool.options["partition"] == "gpu"
    assert pool.options["setup"] == ["module load cuda"]
    assert pool.options["name"] == "mine"
    assert pool.srun_args == ["--container-image=image.sqsh"]
    assert pool.wait is False
