"""One SLURM for all tests of this folder, and homes with a teacher in them."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sddlskd.files import checkpoint
from sddlskd.models import create
from sddlskd.sweeps import precheck
from tests.slurm.cluster import Cluster, missing

REPO = Path(__file__).parents[2]


def cluster_of_its_own(**options: Any) -> Iterator[Cluster]:
    """A running cluster, which every command started from here finds while it runs."""
    if lacking := missing(**{key: value for key, value in options.items() if key == "accounting"}):
        reason = f"SLURM cannot run here, for want of: {', '.join(lacking)}"
        assert "CI" not in os.environ, reason
        pytest.skip(reason)
    # Not below pytest's own folders, which nobody but their owner may enter: munge wants its socket open to everybody.
    with (
        tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as name,
        pytest.MonkeyPatch.context() as patch,
    ):
        folder = Path(name)
        folder.chmod(0o755)
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        started = Cluster(folder, **options)
        try:
            started.start()
            yield started
        finally:
            started.stop()


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    yield from cluster_of_its_own(cpus=4, max_array_size=5)


@pytest.fixture
def restored(cluster: Cluster) -> Iterator[None]:
    """Leave the next test an empty queue and every daemon."""
    yield
    cluster.restore()


def leave_teacher(home: Path) -> Path:
    """A home where jobs on digits find a teacher."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        checkpoint.write(
            home / "teachers/digits/resnet8.pt", {"model": create("resnet8", 10).state_dict()}
        )
    return home


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with a teacher, and `tests` importable on the node."""
    monkeypatch.chdir(REPO)
    # The commands that tests start ask it in a process of its own; here that would be most of a test's time.
    monkeypatch.setattr("sddlskd.sweeps.ask_precheck", precheck.report)
    monkeypatch.setattr("sddlskd.sweeps.slurm.POLL", 0.5)
    return leave_teacher(tmp_path)
