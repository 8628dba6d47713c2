"""Fixtures that many tests share: composed jobs, and a home with a trained teacher."""

import gc
import logging
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

from sddlskd.config import Config
from sddlskd.training import measure
from tests.composing import files_read_once
from tests.tiny import composed

Compose = Callable[..., Config]


@pytest.fixture(scope="session", autouse=True)
def what_is_imported_is_no_garbage() -> None:
    """Keep the garbage collector away from the imported modules.

    Otherwise it goes through all of torch each time, which takes a fifth of the time that Hydra
    needs.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Use one thread in this process and in every process that a test starts.

    Numbers are equal bit for bit only for the same number of threads. For such small jobs, one
    thread is also faster than two that wait for each other.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    # Some tests start two ranks, on any machine.
    os.environ.setdefault("SDDLSKD_MOST_PROCESSES", str(max(4, os.cpu_count() or 1)))
    torch.set_num_threads(1)


@pytest.fixture
def a_terminal_that_may_close() -> Iterator[None]:
    """Give SIGHUP its default effect, which `nohup` takes from the tests and what they start."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="session", autouse=True)
def networks_are_timed_briefly() -> None:
    """Time a network for 20 ms instead of a second: no test compares speeds."""
    measure.TIMED_S = 0.02


@pytest.fixture(scope="session", autouse=True)
def hydra_reads_each_file_once() -> Iterator[None]:
    """Keep the files of conf/ and sweeps/ in memory: a composition takes half of the time."""
    with files_read_once():
        yield


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Restore the logging, MLFLOW_TRACKING_URI and the handling of Ctrl-C after each test.

    A command that runs in this process sets up logging and ignores Ctrl-C at its end, and MLflow
    keeps an address in the environment.
    """
    interrupt = signal.getsignal(signal.SIGINT)
    package, address = logging.getLogger("sddlskd"), os.environ.get("MLFLOW_TRACKING_URI")
    handlers, level, propagate = package.handlers[:], package.level, package.propagate
    yield
    signal.signal(signal.SIGINT, interrupt)
    package.handlers[:], package.level, package.propagate = handlers, level, propagate
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    if address is not None:
        os.environ["MLFLOW_TRACKING_URI"] = address


def compose_in(home: Path, *overrides: str) -> Config:
    """Return the job that `python -m sddlskd.train home=HOME OVERRIDES` runs."""
    GlobalHydra.instance().clear()
    return composed(home, *overrides)


@pytest.fixture
def compose(tmp_path: Path) -> Iterator[Compose]:
    """Yield compose(*overrides) -> Config, with tmp_path as the home."""
    yield lambda *overrides: compose_in(tmp_path, *overrides)
    GlobalHydra.instance().clear()


@pytest.fixture(scope="session")
def _trained_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a home with a resnet8 teacher, trained for one epoch on the digits and measured."""
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
    """Return a home for this test alone that holds only teachers/digits/resnet8.pt."""
    home = tmp_path / "home"
    shutil.copytree(
        _trained_home / "teachers", home / "teachers", ignore=shutil.ignore_patterns("*.lock")
    )
    return home
