"""Test docs/cluster.md: run all its commands, one after the other."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from sddlskd import record
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import REPO

pytestmark = [pytest.mark.services, pytest.mark.timeout(1800)]
PAGE = (REPO / "docs/cluster.md").read_text()
FENCE = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)


def test_every_command_of_the_page_works(cluster: Cluster, tmp_path: Path) -> None:
    clone = tmp_path / "sddlskd"
    # Another user may own the checkout.
    (tmp_path / "gitconfig").write_text("[safe]\ndirectory = *\n")
    environment = os.environ | {"GIT_CONFIG_GLOBAL": str(tmp_path / "gitconfig")}
    subprocess.run(["git", "clone", "--quiet", REPO, clone], env=environment, check=True)
    # Use the environment of this test, so that `make setup` has nothing to do.
    (clone / ".venv").mkdir()
    (clone / ".venv/bin").symlink_to(REPO / ".venv/bin")
    (clone / ".venv/installed").touch()
    blocks = FENCE.findall(PAGE)
    (profile,) = [text for language, text in blocks if language == "yaml"]
    path = clone / profile.splitlines()[0].removeprefix("# ")
    path.parent.mkdir(parents=True)
    path.write_text(profile)
    commands = [line for language, text in blocks if language == "sh" for line in text.splitlines()]
    assert commands[0] == "git clone REPOSITORY sddlskd"
    script = "\n".join(["set -eux", *commands[1:]])
    # Use the clone's code and its launchers, not the installed ones.
    plugins = tmp_path / "plugins"
    plugins.mkdir()
    (plugins / "hydra_plugins").symlink_to(clone / "sddlskd/hydra_plugins")
    environment["PYTHONPATH"] = f"{clone}:{plugins}"
    environment.pop("SDDLSKD_HOME", None)
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    told = done.stdout + done.stderr
    assert done.returncode == 0, told
    results = [
        record.read_result(path.parent) for path in (clone / "runs").glob("digits/*/result.json")
    ]
    statuses = sorted(result["status"] for result in results)
    # They are the teacher, the two jobs of the sweep, and the job without a server.
    assert statuses.count("FINISHED") == 4
    # The jobs of the cancelled sweep are KILLED.
    assert set(statuses) <= {"FINISHED", "KILLED"}
    assert "submitted to SLURM" in told
    assert "MLflow has" in told
    assert (clone / "results/tables/overview_digits.md").exists()
