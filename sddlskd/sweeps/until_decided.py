"""Seeds until decided: choose the seeds that a sweep adds, and stop when its gains are decided.

Every cell (a job without its seed) starts with three seeds. A cell and its baseline are then
compared on their first n seeds, for n = 3, 4, ..., max_seeds, by Welch's t test. While a comparison
is undecided, its cell and its baseline get another seed.

A comparison is decided after n seeds if p * looks * open <= ALPHA. `looks` is the number of values
that n can take, and `open` the number of comparisons that are not decided yet. The probability that
a sweep decides any comparison whose true difference is zero is at most ALPHA: Bonferroni's bound
over the looks, and Holm's procedure over the comparisons. Source: Maurer and Bretz (2013),
"Multiple testing in group sequential trials using graphical approaches".
"""

import json
import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from omegaconf import DictConfig

from sddlskd import config as cfg
from sddlskd import record
from sddlskd.config import Config, Rerun
from sddlskd.record import FINISHED
from sddlskd.sweeps import run_sweep
from sddlskd.sweeps.baselines import find_baselines, name_of, same_pair
from sddlskd.sweeps.grid import compose_grid
from sddlskd.sweeps.outcome import result_of
from sddlskd.sweeps.runner import GroupRunner
from sddlskd.terminal.console import outcomes, write_line
from sddlskd.terminal.words import counted

__all__ = [
    "ALPHA",
    "FIRST_SEEDS",
    "Comparison",
    "compare",
    "describe",
    "run_until_decided",
]

log = logging.getLogger(__name__)

ALPHA = 0.05
"""Largest probability that a sweep decides any comparison whose true difference is zero."""
FIRST_SEEDS = 3
"""Number of seeds that every cell starts with."""
RULE = "until_decided.json"  # in the folder of the sweep: the largest number of seeds


@dataclass(frozen=True)
class Comparison:
    """Comparison of a cell with its baseline by top-1; a cell is a job without its seed.

    Attributes:
        cell: index of the cell among the cells of the sweep.
        baseline: index of the baseline among the cells of the sweep.
        seeds: number of seeds that the latest test used of the cell, and also of the baseline; 0
            before the first test.
        gain: mean top-1 of the cell minus mean top-1 of the baseline, in percentage points; NaN
            before the first test.
        p: p-value of the latest test, times the largest possible number of tests of the cell, times
            the number of comparisons that were undecided; at most 1, and 1 before the first test.
        decided: whether `p` is at most ALPHA (0.05); the cell is then better or worse, by the sign
            of `gain`.
    """

    cell: int
    baseline: int
    seeds: int = 0
    gain: float = math.nan
    p: float = 1.0
    decided: bool = False


def run_until_decided(
    cells: Sequence[Sequence[str]],
    loader: ConfigLoader,
    sweep: DictConfig,
    *,
    runner: GroupRunner,
    max_group_size: int | None = None,
) -> tuple[list[list[str]], list[Config], list[dict[str, Any]]]:
    """Run the cells of a sweep with more and more seeds, until their comparisons are decided.

    A cell is a job without its seed. Each cell starts with three seeds. While the comparison of a
    cell with its baseline is undecided (the p-value that `compare` corrects is above 0.05), both
    get another seed, until they have `sweep.max_seeds` seeds. FINISHED jobs are not run again. At
    the end, the results and the comparisons are printed. With a `Slurm` that does not wait, a call
    only submits the next jobs; call again when they have ended.

    Args:
        cells: overrides of each cell, without a seed. Cells with equal settings count once.
        loader: Hydra's loader of configurations.
        sweep: configuration of the sweep as Hydra composes it.
        runner: what runs the jobs: a `Pool` on this machine, or a `Slurm` on a cluster.
        max_group_size: largest number of jobs that train together; None for no limit.

    Returns:
        Three lists in the same order, with an entry for each job, which is a cell with a seed: its
        overrides, its configuration, and the content of its result.json.

    Raises:
        ValueError: If `sweep.rerun` is `all`, if no cell has a baseline, if no cell has the method
            `sweep.baseline`, if an earlier launch of the sweep had another `sweep.max_seeds`, or if
            the sweep cannot be run (see `run_sweep`).
        OSError, ChildProcessError, KeyboardInterrupt, SystemExit: As `run_sweep` raises them.
    """
    if Rerun(sweep.sweep.rerun) is Rerun.all:
        raise ValueError(
            "sweep.rerun=all cannot be used with sweep.seeds=until_decided: it would run the seeds "
            "of each round again"
        )
    name, max_seeds = str(sweep.sweep.name), int(sweep.sweep.max_seeds)
    firsts = compose_grid(loader, sweep, [[*cell, "seed=0"] for cell in cells])
    # Overrides that a cell ignores, such as the teacher of a student alone, give a cell twice.
    words_of = {cfg.settings_hash(job): list(cell) for job, cell in zip(firsts, cells, strict=True)}
    distinct = list({cfg.settings_hash(job): job for job in firsts}.values())
    baselines = find_baselines(distinct, sweep.sweep.baseline)
    alone = [one for index, one in enumerate(distinct) if index not in baselines]
    if lonely := [_label(one, distinct) for one in alone if one.has_teacher]:
        log.warning("without a baseline in this sweep, so never decided: %s", "; ".join(lonely))
    words = list(words_of.values())
    runs = [(index, seed) for index in range(len(words)) for seed in range(FIRST_SEEDS)]
    ran = False  # whether this launch has run jobs
    told = set[int]()  # cells whose decision is in the log
    while True:
        overrides = [[*words[index], f"seed={seed}"] for index, seed in runs]
        jobs = compose_grid(loader, sweep, overrides)
        if not _all_finished(jobs):
            run_sweep(jobs, name, runner=runner, max_group_size=max_group_size, print_results=False)
            ran = True
        results = [result_of(job) for job in jobs]
        if not _all_finished(jobs):  # the tasks of SLURM run on without this process
            write_line(
                "run the same command again when these jobs have ended: it adds seeds to what is "
                "undecided, or prints the decisions"
            )
            return overrides, jobs, results
        if not sweep.sweep.plan:
            _check_rule(Path(jobs[0].home, "runs", "sweeps", name), max_seeds)
        numbers: list[dict[int, float]] = [{} for _ in words]
        for (index, seed), result in zip(runs, results, strict=True):
            # As in the tables: on the held-out images if there are some.
            numbers[index][seed] = float(result.get("best_mAP", result["best_top1"]))
        comparisons, missing = compare(numbers, baselines, max_seeds)
        if not missing:
            break
        if ran:
            _log_round(comparisons, missing)
            for one in comparisons:
                if one.decided and one.cell not in told:
                    told.add(one.cell)
                    log.info("%s", describe(one, distinct))
        runs += missing
    if not ran:
        # Other launches ran all jobs: print the plan, or note the jobs in the sweep's files.
        run_sweep(jobs, name, runner=runner, max_group_size=max_group_size, print_results=False)
    outcomes(jobs, results)
    for one in comparisons:
        write_line(describe(one, distinct))
    return overrides, jobs, results


def _all_finished(jobs: Sequence[Config]) -> bool:
    return all(result_of(job)["status"] == FINISHED for job in jobs)


def _check_rule(folder: Path, max_seeds: int) -> None:
    """Note the largest number of seeds of a sweep, which must not change once it has looked.

    Raise ValueError if an earlier launch of the sweep in `folder` looked with another number.
    """
    path = folder / RULE
    noted = record.read_json(path)
    if not noted:
        record.write_text(path, json.dumps({"max_seeds": max_seeds}))
    elif noted.get("max_seeds") != max_seeds:
        raise ValueError(
            f"sweep.max_seeds={max_seeds} differs from the number that this sweep began with "
            f"({noted.get('max_seeds')}), for which alone its error rate holds; keep that number, "
            "or give the sweep another sweep.name"
        )


def _log_round(comparisons: Sequence[Comparison], missing: Sequence[tuple[int, int]]) -> None:
    undecided = sum(not one.decided for one in comparisons)
    log.info(
        "undecided after %s: %d of %s; %s follow",
        counted(max(one.seeds for one in comparisons), "seed"),
        undecided,
        counted(len(comparisons), "comparison"),
        counted(len(missing), "more job"),
    )


def compare(
    numbers: Sequence[Mapping[int, float]], baselines: Mapping[int, int], max_seeds: int
) -> tuple[list[Comparison], list[tuple[int, int]]]:
    """Compare cells with their baselines, and return the comparisons and the runs still needed.

    A cell is a job without its seed. A cell and its baseline are compared on their seeds 0 to n - 1
    by Welch's t test, for n = 3, 4, ..., max_seeds, until the comparison is decided. A comparison
    is decided if its p-value is at most ALPHA (0.05), after a correction for the number of values
    of n and the number of undecided comparisons.

    Args:
        numbers: {seed: top-1 (%)} of each cell; seeds count from 0.
        baselines: {index of a cell in `numbers`: index of its baseline}.
        max_seeds: largest number of seeds of a cell, at least 3.

    Returns:
        The comparisons in the order of `baselines`, and (index of the cell, seed) of each run that
        the next test needs and `numbers` lacks. The second list is empty if no test is left.
    """
    looks = max_seeds - FIRST_SEEDS + 1
    found = {cell: Comparison(cell, baseline) for cell, baseline in baselines.items()}
    for seeds in range(FIRST_SEEDS, max_seeds + 1):
        opened = [one for one in found.values() if not one.decided]
        involved = {index for one in opened for index in (one.cell, one.baseline)}
        missing = [
            (index, seed)
            for index in sorted(involved)
            for seed in range(seeds)
            if seed not in numbers[index]
        ]
        if missing:
            return list(found.values()), missing
        looked = {}
        for one in opened:
            ours = [numbers[one.cell][seed] for seed in range(seeds)]
            theirs = [numbers[one.baseline][seed] for seed in range(seeds)]
            gain = statistics.fmean(ours) - statistics.fmean(theirs)
            looked[one.cell] = (gain, looks * _welch(ours, theirs))
        for cell in sorted(looked, key=lambda cell: looked[cell][1]):
            still_open = sum(not one.decided for one in found.values())
            gain, p = looked[cell]
            p = min(1.0, p * still_open)
            found[cell] = Comparison(cell, baselines[cell], seeds, gain, p, p <= ALPHA)
    return list(found.values()), []


def _welch(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return p of Welch's two-sided t test, or 1 if all numbers of each side are equal."""
    from scipy.stats import ttest_ind_from_stats

    if statistics.pstdev(ours) < 1e-9 and statistics.pstdev(theirs) < 1e-9:
        # Accuracies come in steps: equal numbers only say that the deviation is below a step.
        return 1.0
    sides = [(statistics.fmean(x), statistics.stdev(x), len(x)) for x in (ours, theirs)]
    return float(ttest_ind_from_stats(*sides[0], *sides[1], equal_var=False).pvalue)


def describe(comparison: Comparison, cells: Sequence[Config]) -> str:
    """Return a line that states a comparison: pair, methods, verdict, seeds, gain and p-value.

    A cell is a job without its seed. If several cells of the pair of teacher and student have the
    same method, the settings that tell these cells apart follow the names of the methods.

    Args:
        comparison: the comparison of a cell with its baseline.
        cells: configuration of each cell of the sweep; the indices in `comparison` point to them.
    """
    cell, baseline = cells[comparison.cell], cells[comparison.baseline]
    pair = cell.student.name
    if cell.has_teacher:
        pair = f"{cfg.teacher_name(cell)} -> {cell.student.name}"
    verdict = "undecided"
    if comparison.decided:
        verdict = "better" if comparison.gain > 0 else "worse"
    return (
        f"{pair}: {_label(cell, cells)} over {_label(baseline, cells)}: {verdict} after "
        f"{counted(comparison.seeds, 'seed')}, {comparison.gain:+.2f} points, p={comparison.p:.2g}"
    )


def _label(cell: Config, cells: Sequence[Config]) -> str:
    """Return the name of a cell's method, and the settings in which its namesakes differ."""
    alike = [other for other in cells if name_of(other) == name_of(cell) and same_pair(cell, other)]
    own, others = cfg.flatten(cell), list(map(cfg.flatten, alike))
    identifying = cfg.identity_keys() - {"seed"}
    differing = [
        f"{key}={value}"
        for key, value in own.items()
        if key in identifying and any(other.get(key) != value for other in others)
    ]
    # The arguments of a loss repeat its temperature.
    plain = [text for text in differing if "={" not in text]
    return ", ".join([name_of(cell), *(plain or differing)])
