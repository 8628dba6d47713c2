"""Jobs that train in a second, processes that start fast, and comparisons of outcomes."""

import functools
import json
import multiprocessing
import os
import runpy
import sys
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import hydra
import torch
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.types import RunMode
from omegaconf import DictConfig
from torch import Tensor, nn

from sddlskd import config as cfg
from sddlskd import sweeps, worker
from sddlskd.config import Config
from sddlskd.models import create
from sddlskd.sweeps import grid, pool, precheck
from sddlskd.sweeps.grid import _referred_to
from sddlskd.training.teacher_files import path_of, publish

CONF = Path(__file__).parents[1] / "conf"
STEPS = 3  # batches of an epoch
TEST_IMAGES = 64
BASE = (
    "dataset=fake",
    "dataset.num_classes=10",
    "+dataset.load.train=192",
    f"+dataset.load.test={TEST_IMAGES}",
    "+dataset.load.size=16",
    "teacher=resnet8",
    "student=resnet8",
    "tracking=none",
    "trainer=cpu",
    "trainer.epochs=2",
    "trainer.progress=off",
    "allow_foreign_targets=true",  # the networks of tests/
)
DIVERGES = "optimizer.algorithm._target_=tests.misbehaving.Burst"
TIMES = ("time", "time/epoch_s", "time/images_per_s")

# Child processes are forked from a process that has imported torch and computed nothing, so they
# start at once.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(
    ["sddlskd.training.fit", "torch._dynamo", "mlflow.store.tracking.sqlalchemy_store"]
)


NOWHERE = "/home/of/no/test"


@functools.cache
def _composed(overrides: tuple[str, ...], *surroundings: str | None) -> Config:
    if surroundings == SURROUNDINGS and not any(word.startswith(ALONE) for word in overrides):
        job = _remembering().job(overrides)
        if job is not None:
            # Compare one job in sixteen with the job that Hydra itself composes.
            if zlib.crc32(repr(overrides).encode()) % 16 == 0:
                assert job == _composed_by_hydra(overrides), overrides
            return job
    return _composed_by_hydra(overrides)


def _composed_by_hydra(overrides: Sequence[str]) -> Config:
    words = cfg.with_each_teacher([f"home={NOWHERE}", *overrides])
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return cfg.resolve(hydra.compose("config", overrides=words))


# The environment in which `Remembering` may compose: no address of MLflow, pytest's own folder.
SURROUNDINGS = (None, os.getcwd())
# Overrides that only Hydra composes, because a grid sets these keys itself.
ALONE = ("sweep.", "run_dir", "hydra", "home")


class Remembering:
    """A composer of jobs that composes each set of choices once and then only sets values.

    It is the composer of grids (`sddlskd.sweeps.grid`). Hydra needs a sixth of a second for a job.
    This class needs a fiftieth if it has composed the choices before.
    """

    def __init__(self) -> None:
        self._loader = ConfigLoaderImpl(create_config_search_path(str(CONF)))
        self._sweep = self._loader.load_configuration("config", [f"home={NOWHERE}"], RunMode.RUN)
        self.list_groups = functools.cache(self._loader.list_groups)
        self._composed: dict[tuple[str, ...], DictConfig] = {}
        self._resolved: dict[int, Config] = {}
        self._referred: dict[int, list[str]] = {}

    def load_sweep_config(self, sweep: DictConfig, words: list[str]) -> DictConfig:
        """Return the composition by Hydra's loader, the same object for the same words."""
        if tuple(words) not in self._composed:
            self._composed[tuple(words)] = self._loader.load_sweep_config(sweep, words)
        return self._composed[tuple(words)]

    def resolve(self, composed: DictConfig) -> Config:
        """Return the result of config.resolve; the grid copies it."""
        if id(composed) not in self._resolved:
            self._resolved[id(composed)] = cfg.resolve(composed)
        return self._resolved[id(composed)]

    def referred_to(self, composed: DictConfig) -> list[str]:
        """Return every key that an interpolation of this configuration mentions."""
        if id(composed) not in self._referred:
            self._referred[id(composed)] = list(_referred_to(composed))
        return self._referred[id(composed)]

    def job(self, overrides: Sequence[str]) -> Config | None:
        """Return the job of these overrides, or None if they are wrong and Hydra must say why."""
        remembered = SimpleNamespace(**{**vars(cfg), "resolve": self.resolve})
        with mock.patch.multiple(grid, cfg=remembered, _referred_to=self.referred_to):
            try:
                (job,) = grid.compose_grid(self, self._sweep, [[f"home={NOWHERE}", *overrides]])
            except grid.InvalidJobs:
                return None
        return job


@functools.cache
def _remembering() -> Remembering:
    return Remembering()


def _moved(value: Any, home: str) -> Any:
    """Return a copy of `value` in which `home` replaces NOWHERE."""
    if is_dataclass(value) and not isinstance(value, type):
        return replace(
            value,
            **{field.name: _moved(getattr(value, field.name), home) for field in fields(value)},
        )
    if isinstance(value, dict):
        return {key: _moved(each, home) for key, each in value.items()}
    if isinstance(value, list):
        return [_moved(each, home) for each in value]
    return value.replace(NOWHERE, home) if type(value) is str else value


def composed(home: Path, *overrides: str) -> Config:
    """Return the job that `python -m sddlskd.train home=HOME OVERRIDES` runs.

    The same overrides are composed only once, because Hydra needs a sixth of a second.
    """
    cfg.frame()
    # A configuration also reads the environment and the current folder.
    surroundings = (os.environ.get("MLFLOW_TRACKING_URI"), os.getcwd())
    job: Config = _moved(_composed(overrides, *surroundings), os.path.abspath(home))
    return job


def tiny(
    home: Path, *overrides: str, model: dict[str, Any] | None = None, teacher: bool = True
) -> Config:
    """Return a job of 2 epochs of 3 batches on random images.

    Args:
        home: home of the job.
        *overrides: overrides of the configuration.
        model: `_target_` and arguments of the student; None for resnet8.
        teacher: whether to put a teacher into the home.
    """
    job = composed(home, *BASE, *overrides)
    if model:
        job.student.model = model
        job.run_dir = str(Path(job.home, "runs", cfg.run_name(job)))
    if teacher:
        leave_teacher(home)
    return job


def leave_teacher(home: Path) -> Path:
    """Put a teacher with fixed random weights where the jobs of `home` look for it."""
    path = path_of(str(home), "fake", "resnet8")
    if not path.exists():
        with torch.random.fork_rng():
            torch.manual_seed(1)
            publish(
                path,
                create("resnet8", num_classes=10).state_dict(),
                network="resnet8",
                dataset="fake",
                top1=10.0,
            )
    return path


def fit_in_child(jobs: Sequence[Config]) -> None:
    """Run `fit` in a child process."""
    cfg.frame()
    torch.set_num_threads(1)
    from sddlskd.training.fit import fit

    fit(jobs)


def child(*jobs: Config) -> Any:
    """Start a process that fits these jobs, and return it."""
    process = processes.Process(target=fit_in_child, args=(jobs,))
    process.start()
    return process


def _work(words: list[str], environment: dict[str, str]) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = words
    torch.set_num_threads(1)
    worker.main()


class ForkedWorker:
    """A substitute for the Popen that a pool starts its workers with.

    The worker is forked, because its imports would take most of a test's time. The option --parent,
    by which a worker ends with its pool, is left out; tests that start the real command cover it.
    """

    def __init__(self, command: list[str], *, env: dict[str, str], start_new_session: bool) -> None:
        assert command[:3] == [sys.executable, "-m", "sddlskd.worker"]
        assert start_new_session
        at = command.index("--parent")
        self._process = processes.Process(
            target=_work, args=([*command[2:at], *command[at + 2 :]], env)
        )
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self._process.pid, number)

    def kill(self) -> None:
        self._process.kill()


def _be_command(
    module: str, words: list[str], cwd: Path, environment: dict[str, str], said: tuple[Path, Path]
) -> None:
    for number, path in enumerate(said, start=1):
        with open(path, "ab") as file:
            os.dup2(file.fileno(), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = [str(cwd)]
    sys.argv = [module, *words]
    # The launchers look these two up when they start a sweep.
    sweeps.run_sweep = functools.partial(sweeps.run_sweep, precheck=precheck.report)
    pool.Pool = functools.partial(pool.Pool, start=ForkedWorker)  # type: ignore[assignment,misc]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


class ForkedCommand:
    """`python -m MODULE WORDS` as a forked process, which needs no seconds for its imports.

    The workers of a sweep are forked, too. Tests in tests/test_train.py and tests/services cover a
    start of Python with nothing imported.
    """

    def __init__(
        self, folder: Path, module: str, *words: str, cwd: Path, env: dict[str, str] | None = None
    ) -> None:
        """Start the process; files in `folder` receive its output."""
        self._said = [
            Path(tempfile.mkstemp(suffix=f".{name}", dir=folder)[1]) for name in ("out", "err")
        ]
        told = (module, list(words), cwd, {**os.environ, **(env or {})}, self._said)
        self._process = processes.Process(target=_be_command, args=told)
        self._process.start()
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def end(self, seconds: float = 300) -> tuple[int, str, str]:
        """Wait until the process ends by itself; return its exit code, stdout and stderr."""
        self._process.join(seconds)
        code = self._process.exitcode
        self._process.kill()
        out, err = (path.read_text() for path in self._said)
        assert code is not None, f"it has not ended in {seconds} s\n{out}{err}"
        return code, out, err


def rows(job: Config) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl without the times."""
    lines = Path(job.run_dir, "metrics.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if key not in TIMES}
        for line in lines
    ]


def final(job: Config) -> dict[str, Any]:
    """Return the content of the last checkpoint without the times."""
    state: dict[str, Any] = torch.load(Path(job.run_dir, "last.ckpt"), weights_only=True)
    del state["row"], state["progress"]["seconds"], state["progress"]["spent"]
    return state


def same(a: Any, b: Any) -> bool:
    """Return whether two values are equal bit for bit, through dicts and lists."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def same_outcome(a: Config, b: Config) -> bool:
    return same(final(a), final(b)) and rows(a) == rows(b)


class Net(nn.Module):
    """A user's network that raises in "training" or "evaluation" if `raises` says so."""

    def __init__(self, num_classes: int, dropout: float = 0.0, raises: str = "") -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 8, 3, 4), nn.Conv2d(8, num_classes, 1)
        self.dropout, self.raises = nn.Dropout(dropout), raises

    def forward(self, images_BCHW: Tensor) -> Tensor:
        if len(images_BCHW) > 1 and self.raises == ("training" if self.training else "evaluation"):
            raise RuntimeError(f"no good at {self.raises}")
        map_BKHW: Tensor = self.head(self.dropout(self.body(images_BCHW).relu()))
        return map_BKHW


def net(**options: Any) -> dict[str, Any]:
    """Return the configuration of a `Net`."""
    return {"_target_": "tests.tiny.Net", **options}
