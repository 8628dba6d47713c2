"""Measure how long the analysis needs to read many runs from SQLite.

    python -m tests.benchmarks.bench_analysis

The stores hold 1,000 runs of 240 epochs, and 10,000 runs without epochs. Each number is from a
process of its own, imports included, with its peak memory. If the machine is busy, the processor
time says more than the elapsed time.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tests.analysis.store import EPOCH_METRICS, make_store

EPOCHS = 240
SCALES = ("[1]", "[1,2]", "[1,2,4]", "[1,2,3]", "[1,4]")
PAIRS = (
    ("resnet32x4", "shufflev1"),
    ("resnet32x4", "mobilev2"),
    ("wrn_40_2", "vgg8"),
    ("vgg13", "vgg8"),
)
# With these, a run has about as many parameters as a real run (75).
OTHER_PARAMS = {f"other.param_{number}": number for number in range(55)}

READING = """
import json, sys, time
from pathlib import Path
from analysis import runs, tables
uri, what = sys.argv[1:]
found = runs.load("suite", uri) if what != "listing" else runs.listing(uri)
if what == "tables":
    tables.build(found.frame, sweep="suite")
if what == "history":
    assert len(found.history()) == 240 * len(found.frame)
status = Path("/proc/self/status").read_text()
peak = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
print(json.dumps([time.process_time(), int(peak) / 1024]))
"""


def rows(seeds: int) -> Iterator[dict[str, Any]]:
    """Yield the runs of 20 settings, each with `seeds` seeds and accuracies near 70 %."""
    random = np.random.default_rng(0)
    for seed in range(seeds):
        for teacher, student in PAIRS:
            for M in SCALES:
                best = float(random.normal(70.0, 0.3))
                setting = {
                    "sweep": "suite",
                    "teacher": teacher,
                    "student": student,
                    "M": M,
                    "seed": seed,
                }
                yield {
                    **setting,
                    "best": best,
                    "last": best - 0.3,
                    "images_per_s": 4000.0,
                    **OTHER_PARAMS,
                }


def history(row: Any) -> dict[str, list[float]]:
    """Return a rising curve for every metric that a training logs."""
    curve = [row["last"] * (1 - 0.95**epoch) for epoch in range(1, EPOCHS + 1)]
    return {metric: curve for metric in EPOCH_METRICS}


def read(path: Path, what: str) -> str:
    """Read a store in another process, and return its time and memory as text."""
    started = time.perf_counter()
    command = [sys.executable, "-c", READING, f"sqlite:///{path}", what]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    whole = time.perf_counter() - started
    processor, peak = json.loads(done.stdout)
    return f"{whole:.1f} s, {processor:.1f} s of them on the processor, {peak:.0f} MiB"


def main() -> None:
    """Print all measurements."""
    with tempfile.TemporaryDirectory() as folder:
        deep, wide = Path(folder, "deep", "mlflow.db"), Path(folder, "wide", "mlflow.db")
        make_store(deep, rows(seeds=50), history)
        print(
            f"1,000 runs x {EPOCHS} epochs x {len(EPOCH_METRICS)} metrics, loaded: "
            f"{read(deep, 'frame')}"
        )
        print(f"the same with every table: {read(deep, 'tables')}")
        print(f"the same with the history of val/top1 in place of tables: {read(deep, 'history')}")
        make_store(wide, rows(seeds=500))
        print(f"10,000 runs, loaded: {read(wide, 'frame')}")
        print(f"the same with every table: {read(wide, 'tables')}")
        print(f"10,000 runs, counted by sweep and experiment: {read(wide, 'listing')}")


if __name__ == "__main__":
    main()
