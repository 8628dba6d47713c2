"""One SLURM for all tests of this folder, and homes with a teacher in them."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sddlskd import checkpoint, precheck
from sddlskd.models import create
from tests.slurm.cluster import Cluster, missing, running_cluster

REPO = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A running cluster, which every command started from here finds."""
    if lacking := missing():
        reason = f"SLURM cannot run here, for want of: {', '.join(lacking)}"
        assert "CI" not in os.environ, reason
        pytest.skip(reason)
    before = os.environ.get("SLURM_CONF")
    # Not below pytest's own folders, which nobody but their owner may enter: munge wants its socket open to everybody.
    with tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        folder.chmod(0o755)
        os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
        try:
            yield from running_cluster(folder, cpus=4, max_array_size=5)
        finally:
            del os.environ["SLURM_CONF"]
            if before is not None:
                os.environ["SLURM_CONF"] = before


@pytest.fixture(autouse=True)
def restored(cluster: Cluster) -> Iterator[None]:
    """Leave the next test an empty queue and every daemon."""
    yield
    cluster.restore()


def leave_teacher(home: Path) -> Path:
    """A home where jobs on digits find a teacher."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        checkpoint.write(home / "teachers/digits/resnet8.pt", {"model": create("resnet8", 10).state_dict()})
    return home


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with a teacher, and `tests` importable on the node."""
    monkeypatch.chdir(REPO)
    # The commands that tests start ask it in a process of its own; here that would be most of a test's time.
    monkeypatch.setattr("sddlskd.sweeps._ask_precheck", precheck.look)
    return leave_teacher(tmp_path)
