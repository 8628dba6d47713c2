"""What reading many runs out of SQLite costs: 1,000 runs of 240 epochs with their tables and curves, 10,000 listed.

    python -m tests.benchmarks.bench_analysis

Each figure is of a process of its own, imports included, with its peak of memory. Where other work shares the machine,
the seconds on the processor say more than those on the clock.
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
OTHER_PARAMS = {
    f"other.param_{number}": number for number in range(55)
}  # a run of the trainer's has about 75

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
    """A suite of 20 settings by so many seeds, with accuracies near 70 %."""
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
    """Every metric that the trainer logs, rising to the run's accuracy."""
    curve = [row["last"] * (1 - 0.95**epoch) for epoch in range(1, EPOCHS + 1)]
    return {metric: curve for metric in EPOCH_METRICS}


def read(path: Path, what: str) -> str:
    """What a process that reads it takes."""
    started = time.perf_counter()
    command = [sys.executable, "-c", READING, f"sqlite:///{path}", what]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    whole = time.perf_counter() - started
    processor, peak = json.loads(done.stdout)
    return f"{whole:.1f} s, {processor:.1f} s of them on the processor, {peak:.0f} MiB"


def main() -> None:
    """Print everything."""
    with tempfile.TemporaryDirectory() as folder:
        deep, wide = Path(folder, "deep", "mlflow.db"), Path(folder, "wide", "mlflow.db")
        make_store(deep, rows(seeds=50), history)
        print(
            f"1,000 runs x {EPOCHS} epochs x {len(EPOCH_METRICS)} metrics, loaded: {read(deep, 'frame')}"
        )
        print(f"the same with every table: {read(deep, 'tables')}")
        print(f"the same with the history of val/top1 in place of tables: {read(deep, 'history')}")
        make_store(wide, rows(seeds=500))
        print(f"10,000 runs, loaded: {read(wide, 'frame')}")
        print(f"the same with every table: {read(wide, 'tables')}")
        print(f"10,000 runs, counted by sweep and experiment: {read(wide, 'listing')}")


if __name__ == "__main__":
    main()
