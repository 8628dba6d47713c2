"""Fixtures of this folder: one SLURM cluster for all tests, and homes with a teacher."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sddlskd.files import checkpoint
from sddlskd.models import create
from tests.slurm.cluster import Cluster, missing

REPO = Path(__file__).parents[2]


def cluster_of_its_own(**options: Any) -> Iterator[Cluster]:
    """Yield a running cluster, to which SLURM's commands connect while it runs."""
    if lacking := missing(**{key: value for key, value in options.items() if key == "accounting"}):
        reason = f"SLURM cannot run here, for want of: {', '.join(lacking)}"
        assert "CI" not in os.environ, reason
        pytest.skip(reason)
    # The folder is not below pytest's folders, which only their owner may enter: munge requires
    # that every user can reach its socket.
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
    """Empty the queue and start missing daemons after the test."""
    yield
    cluster.restore()


def leave_teacher(home: Path) -> Path:
    """Put a teacher for digits into a home, and return the home."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        checkpoint.write(
            home / "teachers/digits/resnet8.pt", {"model": create("resnet8", 10).state_dict()}
        )
    return home


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a home with a teacher; the node can import `tests`."""
    monkeypatch.chdir(REPO)
    monkeypatch.setattr("sddlskd.sweeps.slurm.POLL", 0.5)
    return leave_teacher(tmp_path)
