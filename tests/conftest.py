"""What the tests share: composing a job as the command line does, and a teacher that is there already."""

import gc
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

from sddlskd.config import Config
from tests.tiny import composed

Compose = Callable[..., Config]


@pytest.fixture(scope="session", autouse=True)
def what_is_imported_is_no_garbage() -> None:
    """A fifth of the time that Hydra takes is the collector's, which goes through all of torch each time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Here and in every process that a test starts, since bits are equal for the same number of threads alone; and so
    little work is done sooner by one than by two that wait for each other."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """A command called in this process sets the log up, and MLflow keeps an address in the environment: the next test
    must see neither."""
    package, address = logging.getLogger("sddlskd"), os.environ.get("MLFLOW_TRACKING_URI")
    handlers, level, propagate = package.handlers[:], package.level, package.propagate
    yield
    package.handlers[:], package.level, package.propagate = handlers, level, propagate
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    if address is not None:
        os.environ["MLFLOW_TRACKING_URI"] = address


def compose_in(home: Path, *overrides: str) -> Config:
    """The job that `python -m sddlskd.train home=HOME OVERRIDES` runs."""
    GlobalHydra.instance().clear()
    return composed(home, *overrides)


@pytest.fixture
def compose(tmp_path: Path) -> Iterator[Compose]:
    """compose(*overrides) -> Config, with tmp_path as its home."""
    yield lambda *overrides: compose_in(tmp_path, *overrides)
    GlobalHydra.instance().clear()


@pytest.fixture(scope="session")
def _trained_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home where a resnet8 has seen the digits once and can teach; its top-1 is measured."""
    from sddlskd.training.fit import fit

    home = tmp_path_factory.mktemp("trained")
    overrides = (
        "dataset=digits",
        "student=resnet8",
        "tracking=none",
        "trainer=cpu",
        "trainer.progress=off",
    )
    fit([compose_in(home, *overrides, "distiller=vanilla", "trainer.epochs=1")])
    fit([compose_in(home, *overrides, "teacher=resnet8", "trainer=debug", "trainer.device=cpu")])
    return home


@pytest.fixture
def teacher_home(_trained_home: Path, tmp_path: Path) -> Path:
    """A home of this test's own that holds teachers/digits/resnet8.pt and nothing else."""
    home = tmp_path / "home"
    shutil.copytree(
        _trained_home / "teachers", home / "teachers", ignore=shutil.ignore_patterns("*.lock")
    )
    return home
