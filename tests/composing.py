"""Let Hydra read each file of conf/ and sweeps/ once in a process instead of once a composition.

Reading the files takes half of the time of a composition, and the tests compose thousands of jobs.
Hydra still composes every job itself.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any
from unittest import mock

from hydra._internal import defaults_list
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.utils import create_config_search_path
from hydra.plugins.config_source import ConfigResult
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from sddlskd import config as cfg

REPO = Path(__file__).parents[1]
# Sources whose files no test changes.
FIXED = ("pkg://", "structured://", f"file://{REPO}/conf", f"file://{REPO}/sweeps")
# Copying a configuration from these is faster than reading it. Those from structured:// are copied
# by Hydra itself.
FILES = ("pkg://", "file://")


def loader_of(overrides: list[str]) -> tuple[ConfigLoaderImpl, DictConfig]:
    """Return Hydra's loader and the composed configuration of a sweep, as a launcher gets them."""
    cfg.frame()
    loader = ConfigLoaderImpl(create_config_search_path(str(files("sddlskd.conf"))))
    return loader, loader.load_configuration("config", overrides, RunMode.MULTIRUN)


@contextmanager
def files_read_once() -> Iterator[None]:
    """Keep what Hydra has read, until the context ends."""
    read: dict[tuple[str, ...], ConfigResult] = {}
    load, create_map = ConfigRepository.load_config, defaults_list._create_interpolation_map

    def remembered(self: ConfigRepository, config_path: str) -> ConfigResult | None:
        paths = [source.full_path() for source in self.sources]
        if not all(path.startswith(FIXED) for path in paths):
            return load(self, config_path)
        key = (config_path, *paths)
        if key not in read:
            result = load(self, config_path)
            if result is None or not str(result.path).startswith(FILES):
                return result
            read[key] = result
        return copy.deepcopy(read[key])

    def map_if_needed(overrides: Any, defaults: list[Any], self_added: bool) -> DictConfig:
        # Hydra makes this map for every file and uses it only for defaults like ${dataset}.
        if any(default.is_interpolation() for default in defaults):
            return create_map(overrides, defaults, self_added)
        return OmegaConf.create()

    def shallow(self: ConfigRepository, _: dict[int, Any]) -> ConfigRepository:
        return copy.copy(self)

    with (
        mock.patch.object(ConfigRepository, "load_config", remembered),
        # Hydra copies all sources for each job, and replaces the list if the search path differs.
        mock.patch.object(ConfigRepository, "__deepcopy__", shallow, create=True),
        mock.patch.object(defaults_list, "_create_interpolation_map", map_if_needed),
    ):
        yield
