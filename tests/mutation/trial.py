"""Run the tests on mutants in a copy of the project; `python -m tests.mutation` starts this file.

The current folder is the copy, and the interpreter is that of the copy's environment.
"""

import argparse
import ast
import importlib
import os
import random
import resource
import shutil
import signal
import sys
import time
import tomllib
import traceback
from collections import Counter
from contextlib import suppress
from importlib.util import cache_from_source
from pathlib import Path
from typing import Any, NamedTuple

import operators
import pytest

# Each test session is forked from this process, which has imported what takes long.
IMPORTED = (
    "torch", "torch._dynamo", "torchvision", "hydra", "pandas",
    "mlflow.store.tracking.sqlalchemy_store", "scipy.stats", "rich.live", "requests",
)  # fmt: skip
LOG, TEMPORARY = Path("mutation.log"), Path("mutation.tmp")


class Trial(NamedTuple):
    """The outcome of one test session.

    Attributes:
        passed: whether all tests passed.
        seconds: processor time of the session and of the processes that it started.
        reason: what the session ended with: its first failure, its signal or its last line.
    """

    passed: bool
    seconds: float
    reason: str


def run_tests(arguments: list[str], limit: int | None) -> Trial:
    """Run pytest in a forked process until the first failure.

    Args:
        arguments: test files and options of pytest.
        limit: seconds of processor time for each process; None for no limit.
    """
    shutil.rmtree(TEMPORARY, ignore_errors=True)
    child = os.fork()
    if child == 0:
        _be_session(arguments, limit)
    # Another limit, on elapsed time, ends a session that waits for ever.
    end = time.monotonic() + (20 * limit if limit else 3600)
    done, status, usage = os.wait4(child, os.WNOHANG)
    while not done:
        if time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
        time.sleep(0.05)
        done, status, usage = os.wait4(child, os.WNOHANG)
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(status)
    failures = [
        line
        for line in LOG.read_text().splitlines()
        if line.startswith(("FAILED ", "ERROR tests/"))
    ]
    reason = failures[0] if failures else f"exit code {code}"
    return Trial(code == 0, usage.ru_utime + usage.ru_stime, reason)


def _be_session(arguments: list[str], limit: int | None) -> None:
    code = 99
    try:
        os.setsid()
        with open(LOG, "wb") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        if limit:
            resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
            sys.dont_write_bytecode = True
            os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        sys.path[0] = os.getcwd()
        # Processes that the tests start by multiprocessing import the main module again.
        sys.modules["__main__"] = pytest
        # Pytest warns because hydra, which is a plugin too, was imported before pytest started.
        options = ["-W", "ignore::pytest.PytestAssertRewriteWarning", "-p", "no:cacheprovider"]
        code = int(pytest.main(["-xq", *options, f"--basetemp={TEMPORARY}", *arguments]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def write(path: Path, source: str) -> None:
    """Write a module and remove its bytecode, which Python could take for that of the new text."""
    path.write_text(source)
    Path(cache_from_source(str(path))).unlink(missing_ok=True)


class Candidate(NamedTuple):
    """A mutant that may be tried.

    Attributes:
        name: its name, which does not depend on the lines of the module.
        module: its table in the file of modules.
        place: its place in the module.
    """

    name: str
    module: dict[str, Any]
    place: operators.Place


def candidates_of(modules: list[dict[str, Any]], trees: dict[str, ast.Module]) -> list[Candidate]:
    """Return every mutant of the modules, sorted by name so that a seed draws the same sample."""
    found = []
    for module in modules:
        tree = trees[module["path"]]
        places = operators.places(tree, module.get("functions", ()))
        for key, place in zip(operators.keys(tree, places), places, strict=True):
            found.append(Candidate(f"{Path(module['path']).name} {key}", module, place))
    return sorted(found, key=lambda candidate: candidate.name)


def main() -> None:
    """Try a random sample of mutants, and print each outcome and the counts of each module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--modules", type=Path, required=True)
    parser.add_argument("--mutants", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--only", type=Path)
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    modules = tomllib.loads(args.modules.read_text())["module"]
    trees = {module["path"]: ast.parse(Path(module["path"]).read_text()) for module in modules}
    candidates = candidates_of(modules, trees)
    if args.only:
        names = set(args.only.read_text().splitlines())
        candidates = [candidate for candidate in candidates if candidate.name in names]
    if args.list:
        print("\n".join(candidate.name for candidate in candidates))
        return
    for name in IMPORTED:
        importlib.import_module(name)
    sample = random.Random(args.seed).sample(candidates, min(args.mutants, len(candidates)))
    print(f"{len(sample)} of {len(candidates)} mutants of {len(modules)} modules", flush=True)

    limits: dict[str, int] = {}
    for module in [module for module in modules if any(c.module is module for c in sample)]:
        tests = " ".join(module["tests"])
        if tests not in limits:
            trial = run_tests(module["tests"], None)
            print(f"unchanged: {trial.seconds:.0f} s for {tests}", flush=True)
            if not trial.passed:
                sys.exit(f"{trial.reason}; see {LOG.resolve()}\n{LOG.read_text()[-3000:]}")
            limits[tests] = int(2 * trial.seconds) + 20

    counts: Counter[tuple[str, bool]] = Counter()
    survivors = []
    for _, module, place in sample:
        path, mutant = Path(module["path"]), operators.apply(trees[module["path"]], place)
        original = path.read_text()
        write(path, mutant.source)
        trial = run_tests(module["tests"], limits[" ".join(module["tests"])])
        write(path, original)
        outcome = f"{path}:{mutant.line}: {mutant.change}"
        counts[str(path), trial.passed] += 1
        if trial.passed:
            survivors.append(outcome)
        word = "survived" if trial.passed else "killed"
        print(f"{word} {trial.seconds:.0f} s {outcome} | {trial.reason}", flush=True)

    print(f"\n{'killed':>6} {'all':>4}")
    for path_ in sorted({path for path, _ in counts}):
        killed = counts[path_, False]
        print(f"{killed:6} {killed + counts[path_, True]:4} {path_}")
    print(f"{len(sample) - len(survivors):6} {len(sample):4} together\n\nSurvivors:")
    print("\n".join(survivors))


if __name__ == "__main__":
    main()
