"""Count the small errors in the code that the tests find: python -m tests.mutation.

A mutant is a copy of the project with one small error in one module: another operator, comparison
or constant, a dropped statement, swapped arguments, a returned None. A mutant is killed if a test
fails. A survivor shows what no test checks, or a change that makes no difference. modules.toml
names the modules and the tests that run for each.

To compare two revisions by the mutants that both have, list the mutants of each with --list, and
pass the lines that stand in both lists with --only. The same seed then draws the same mutants.
"""

import argparse
import os
import shutil
import subprocess
import sysconfig
import tempfile
import venv
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]


def copy_of(source: Path, tree: Path) -> None:
    """Copy the files that git knows or does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=source, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (source / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / name, tree / name)


def environment(tree: Path) -> Path:
    """Return the Python of a new environment: the packages of this one, the project of `tree`."""
    venv.create(tree / ".venv", symlinks=True)
    here = Path(sysconfig.get_path("purelib"))
    there = Path(sysconfig.get_path("purelib", vars={"base": str(tree / ".venv")}))
    (there / "packages.pth").write_text(f"{here}\n")
    # These files, of which there are two, say where the project is that pip installed as editable.
    for file in here.glob("__editable__*"):
        (there / file.name).write_text(file.read_text().replace(str(ROOT), str(tree)))
    # Tests call commands of other packages, such as mlflow.
    for command in Path(sysconfig.get_path("scripts")).iterdir():
        if not (tree / ".venv/bin" / command.name).exists():
            (tree / ".venv/bin" / command.name).symlink_to(command)
    return tree / ".venv/bin/python"


def main() -> None:
    """Copy the project and try mutants of the copy."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("--tree", type=Path, default=ROOT, help="a checkout of any commit")
    parser.add_argument("--modules", type=Path, default=FOLDER / "modules.toml")
    parser.add_argument("--mutants", type=int, default=200, help="size of the sample")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample")
    parser.add_argument("--only", type=Path, help="file with the names of the mutants to draw from")
    parser.add_argument("--list", action="store_true", help="print the names of all mutants")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sddlskd-mutation-") as folder:
        tree = Path(folder).resolve() / "tree"
        copy_of(args.tree, tree)
        options = ["--mutants", str(args.mutants), "--seed", str(args.seed)]
        if args.only:
            options += ["--only", str(args.only.resolve())]
        if args.list:
            options.append("--list")
        subprocess.run(
            [environment(tree), FOLDER / "trial.py", "--modules", args.modules.resolve(), *options],
            cwd=tree,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
            check=True,
        )


if __name__ == "__main__":
    main()
