"""Check and measure this package on one GPU, in at most six minutes.

    python -m tests.gpu [--device cpu|cuda] [--only right|fast] [--out FILE]

The report goes to the terminal and, with --out, to a file. The exit code is 1 if a check failed.
docs/measurements/README.md says what a machine needs.
"""

import argparse
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

# Read when CUDA starts: without it, products of matrices have no deterministic form.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

SECONDS = 350.0  # of the whole report


def machine(device_name: str) -> str:
    """Return the section about the machine."""
    import platform

    import torch

    from tests.gpu.report import table

    facts = [
        ("torch", f"{torch.__version__}, CUDA {torch.version.cuda}"),
        ("Python", f"{platform.python_version()}, {platform.platform()}"),
        (
            "CPU",
            f"{len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} threads of torch",
        ),
        ("begun", time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())),
    ]
    if device_name == "cuda":
        card = torch.cuda.get_device_properties(0)
        facts = [
            (
                "card",
                f"{card.name}, {card.total_memory / 2**30:.0f} GiB, "
                f"compute capability {card.major}.{card.minor}",
            ),
            ("driver", _driver()),
            ("cuDNN", str(torch.backends.cudnn.version())),
            *facts,
        ]
    return table(("what", "which"), facts)


def _driver() -> str:
    """Return the version of the driver, or "unknown"."""
    import subprocess

    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return said.stdout.split("\n")[0]


def main(words: Sequence[str] | None = None) -> int:
    """Run what the command line asks for, and return the exit code."""
    parser = argparse.ArgumentParser("python -m tests.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--only", choices=("right", "fast"), help="one half; default: both")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the report here")
    parser.add_argument(
        "--patience",
        type=float,
        default=1.0,
        metavar="FACTOR",
        help="multiply all time limits, for a machine that is busy with other work",
    )
    options = parser.parse_args(words)

    import torch

    from tests.gpu import report

    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA here; --device cpu runs the checks that a CPU can run")
    clock = report.Clock(SECONDS * options.patience)
    # The trainings of the checks fail on purpose now and then; the outcome says what matters.
    logging.getLogger("sddlskd").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", message="Error importing 'hydra_plugins")
    device = torch.device("cuda", 0)
    if options.device == "cpu":
        device = torch.device("cpu")
        torch.set_num_threads(1)
    sections = [f"# Report of tests.gpu on {options.device}", machine(options.device)]

    def tell(outcome: report.Outcome) -> None:
        sys.stderr.write(f"{outcome.verdict:>10}  {outcome.seconds:5.1f} s  {outcome.name}\n")

    failed = False
    with tempfile.TemporaryDirectory() as folder:
        if options.only != "fast":
            from tests.gpu import right

            checks = report.with_patience(right.checks(device, Path(folder)), options.patience)
            outcomes = report.run_all(checks, clock, tell)
            failed |= any(outcome.verdict == report.FAIL for outcome in outcomes)
            sections.append(report.checks_section(outcomes))
        if options.only == "fast" or (options.only is None and options.device == "cuda"):
            from tests.gpu import fast

            outcomes = report.run_all(fast.measurements(device, Path(folder)), clock, tell)
            failed |= any(outcome.verdict == report.FAIL for outcome in outcomes)
            sections.append(report.measurements_section(outcomes))
            if options.device == "cpu":
                sections.append("On the CPU, the networks are small: these times say nothing.")
    text = "\n\n".join([*sections, f"Outcome: {'FAILED' if failed else 'passed'}"]) + "\n"
    sys.stdout.write(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
