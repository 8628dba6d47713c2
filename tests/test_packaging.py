"""Test the wheel: its content, and that it runs without this checkout."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {
    name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "SDDLSKD_HOME")
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the wheel.

    It is built from a copy of the repository's files, so that no build folder is left here.
    """
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.splitlines()):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(out),
    ]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with only the installed wheel."""
    target = tmp_path_factory.mktemp("installed")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--no-compile",
    ]
    done = subprocess.run(
        [*command, "--target", str(target), str(wheel)],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr
    return target


def run(installed: Path, empty: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run Python with the installed copy and the dependencies, but without the checkout.

    The option -S of Python leaves out the editable installation.
    """
    paths = os.pathsep.join(
        [str(installed), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    )
    return subprocess.run(
        [sys.executable, "-S", *command],
        cwd=empty, capture_output=True, text=True, env={**ENVIRONMENT, "PYTHONPATH": paths},
    )  # fmt: skip


def test_the_wheel_holds_what_a_job_needs_and_no_more(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    here = {f"sddlskd/{p.relative_to(ROOT)}" for p in (ROOT / "conf").rglob("*.yaml")}
    assert len(here) > 100
    assert here <= names
    modules = {
        str(p.relative_to(ROOT))
        for p in (ROOT / "sddlskd").rglob("*.py")
        if "hydra_plugins" not in p.parts
    }
    assert modules <= names
    assert {
        "hydra_plugins/search.py",
        "hydra_plugins/shared_teacher.py",
        "sddlskd/py.typed",
    } <= names
    assert "hydra_plugins/__init__.py" not in names
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"sddlskd", "hydra_plugins"}
    assert {
        f"sddlskd/analysis/{p.name}" for p in (ROOT / "analysis").iterdir() if p.is_file()
    } <= names
    assert {name for name in names if name.endswith(".csv")} == {
        f"sddlskd/analysis/reference/{p.name}"
        for p in (ROOT / "analysis" / "reference").glob("*.csv")
    }
    assert not [name for name in names if "test" in name.lower()]


def test_the_wheel_says_how_to_call_it(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (entry,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
    assert "sddlskd-train = sddlskd.train:main" in archive.read(entry).decode()
    (metadata,) = [name for name in archive.namelist() if name.endswith("METADATA")]
    text = archive.read(metadata).decode()
    for needed in ("torch", "torchvision", "hydra-core", "omegaconf", "hydra-submitit-launcher",
                   "mlflow", "pandas",
                   "scikit-learn", "rich"):  # fmt: skip
        assert any(
            line.startswith(f"Requires-Dist: {needed}>=")
            or line.startswith(f"Requires-Dist: {needed}<")
            for line in text.splitlines()
        ), needed


def test_the_installed_copy_runs_from_an_empty_directory(installed: Path, tmp_path: Path) -> None:
    yaml = installed / "sddlskd" / "conf" / "student" / "shufflev1.yaml"
    # The changed value shows that the command reads this copy.
    yaml.write_text(yaml.read_text().replace("0.01", "0.0123"))
    done = run(
        installed, tmp_path, "-m", "sddlskd.train", "--cfg", "job", "--resolve", "student=shufflev1"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "lr: 0.0123" in done.stdout
    assert f"home: {tmp_path}" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_installed_copy_writes_tables(installed: Path, tmp_path: Path) -> None:
    done = run(installed, tmp_path, "-m", "sddlskd.analysis", "--home", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: there is no database {tmp_path / 'mlflow.db'}")
    shown = run(installed, tmp_path, "-m", "sddlskd.analysis", "--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "python -m sddlskd.analysis" in shown.stdout


def test_hydra_finds_the_launcher_of_the_installed_copy(installed: Path, tmp_path: Path) -> None:
    code = (
        "import hydra_plugins.shared_teacher as plugin, sddlskd.train as train; "
        "print(plugin.__file__, train.__file__)"
    )
    done = run(installed, tmp_path, "-c", code)
    expected = [
        str(installed / "hydra_plugins" / "shared_teacher.py"),
        str(installed / "sddlskd" / "train.py"),
    ]
    assert done.stdout.split() == expected, done.stderr
    shown = run(installed, tmp_path, "-m", "sddlskd.train", "--info", "plugins")
    assert "SharedTeacherLauncher" in shown.stdout, shown.stderr
