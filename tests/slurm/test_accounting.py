"""Test a cluster with accounts: who may submit, and what sacct remembers."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from sddlskd.sweeps.slurm_queue import causes_of_death
from tests.slurm.cluster import Cluster, wait_for
from tests.slurm.conftest import cluster_of_its_own
from tests.slurm.test_slurm import jobs_of, sweep
from tests.test_sweeps import network

pytestmark = [pytest.mark.services, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def accounted() -> Iterator[Cluster]:
    yield from cluster_of_its_own(cpus=2, accounting=True)


def test_an_account_that_is_not_there_is_refused_in_sbatchs_words(
    accounted: Cluster, home: Path
) -> None:
    with pytest.raises(
        ValueError, match=r"sbatch: .*Invalid account .* see hydra\.launcher\.partition, account"
    ):
        sweep(jobs_of(home, network("Tiny")), account="nope")
    assert not (home / "runs").exists()


def test_the_cause_of_death_is_known_long_afterwards(
    accounted: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit = ["sbatch", "--account=lab", "--output=/dev/null", "--parsable"]
    failed = accounted.ask(
        *submit, "--array=0-1", "--wrap=exit $((3 * SLURM_ARRAY_TASK_ID))"
    ).strip()
    cancelled = accounted.ask(*submit, "--hold", "--array=0-1", "--wrap=true").strip()
    accounted.ask("scancel", cancelled)
    wait_for(lambda: not accounted.queue())
    sacct = shutil.which("sacct")
    assert sacct
    (tmp_path / "sacct").symlink_to(sacct)
    # Leave out scontrol, as if it had forgotten the jobs, which it does after some minutes.
    monkeypatch.setenv("PATH", str(tmp_path))
    dead = [f"{failed}_0", f"{failed}_1", f"{cancelled}_0", f"{cancelled}_1", "999999"]
    gone = "gone, and SLURM does not know why any more"
    causes = ["COMPLETED", "FAILED (exit code 3:0)", "CANCELLED", "CANCELLED", gone]
    # Wait, because sacct learns of the end of a job with a delay.
    wait_for(lambda: list(causes_of_death(dead).values()) == causes)
