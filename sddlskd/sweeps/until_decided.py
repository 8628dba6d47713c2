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

import copy
import logging
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.config_loader import ConfigLoader
from omegaconf import DictConfig

from sddlskd import config as cfg
from sddlskd.config import Config, Rerun
from sddlskd.record import FINISHED
from sddlskd.sweeps import run_sweep
from sddlskd.sweeps.grid import compose_grid
from sddlskd.sweeps.outcome import result_of
from sddlskd.sweeps.runner import GroupRunner
from sddlskd.terminal.console import outcomes, write_line

__all__ = [
    "ALPHA",
    "FIRST_SEEDS",
    "Comparison",
    "compare",
    "describe",
    "find_baselines",
    "run_until_decided",
]

log = logging.getLogger(__name__)

ALPHA = 0.05
"""Probability that a sweep decides any comparison whose true difference is zero, at most."""
FIRST_SEEDS = 3
"""Number of seeds that every cell starts with."""
# Settings that a cell and its baseline must share, as keys of `cfg.flatten`.
SAME_BUDGET = (
    "dataset.name",
    "dataset.val_fraction",
    "dataset.train_fraction",
    "trainer.epochs",
    "trainer.batch_size",
    "trainer.max_steps",
)
# Settings that choose between several baselines.
TUNED = ("distiller.temperature", "distiller.ce_weight", "distiller.kd_weight", "optimizer.lr")


@dataclass(frozen=True)
class Comparison:
    """A cell compared with its baseline.

    Attributes:
        cell: index of the cell.
        baseline: index of the cell that is its baseline.
        seeds: number of seeds compared; 0 before the first look.
        gain: mean of the cell minus mean of the baseline, in points; NaN before the first look.
        p: p-value of the last look, corrected for the looks and the comparisons.
        decided: whether the sign of the gain is decided.
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
    """Run the cells of a sweep with ever more seeds, until their gains are decided.

    Finished jobs count, so the same command continues a stopped sweep. On SLURM, each call submits
    one round of jobs; call again when they have ended.

    Args:
        cells: overrides of each cell, without a seed.
        loader: Hydra's loader of configurations.
        sweep: the composed configuration of the sweep.
        runner: what runs the groups of jobs, a `Pool` or a `Slurm`.
        max_group_size: largest number of jobs that train side by side; None for no limit.

    Returns:
        The overrides, the configuration and the content of result.json of each job.

    Raises:
        ValueError: If `sweep.rerun=all` is set, if no cell has a baseline, or as `run_sweep` does.
        InvalidJobs: If jobs are invalid.
        SystemExit: As `run_sweep` does.
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
    words = list(words_of.values())
    runs = [(index, seed) for index in range(len(words)) for seed in range(FIRST_SEEDS)]
    launched = False
    while True:
        overrides = [[*words[index], f"seed={seed}"] for index, seed in runs]
        jobs = compose_grid(loader, sweep, overrides)
        results = [result_of(job) for job in jobs]
        comparisons, missing = list[Comparison](), list[tuple[int, int]]()
        if all(result["status"] == FINISHED for result in results):
            numbers: list[dict[int, float]] = [{} for _ in words]
            for (index, seed), result in zip(runs, results, strict=True):
                numbers[index][seed] = _top1(result)
            comparisons, missing = compare(numbers, baselines, max_seeds)
            runs += missing
        elif launched:  # the tasks of SLURM run on without this process
            break
        if missing:
            _log_round(comparisons, missing)
            launched = False
        elif launched and comparisons:
            break
        else:
            results = run_sweep(
                jobs,
                name,
                runner=runner,
                max_group_size=max_group_size,
                print_results=False,
            )
            launched = True
    if comparisons:
        outcomes(jobs, results)
        for one in comparisons:
            write_line(describe(one, distinct))
    return overrides, jobs, results


def _top1(result: Mapping[str, Any]) -> float:
    """Return the top-1 in % that tables show: of the test split if a validation split is held out.

    `result` is the content of result.json of a finished run.
    """
    test = result.get("test_top1")
    return float(result["best_top1"] if test is None else test)


def _log_round(comparisons: Sequence[Comparison], missing: Sequence[tuple[int, int]]) -> None:
    undecided = sum(not one.decided for one in comparisons)
    log.info(
        "%d of %d comparisons are undecided after %d seeds: %d more jobs",
        undecided,
        len(comparisons),
        max(one.seeds for one in comparisons),
        len(missing),
    )


def compare(
    numbers: Sequence[Mapping[int, float]], baselines: Mapping[int, int], max_seeds: int
) -> tuple[list[Comparison], list[tuple[int, int]]]:
    """Return the comparisons of a sweep, and the runs that it needs next.

    The looks are always taken in the order of the seeds, so a sweep that was stopped and started
    again decides what an uninterrupted sweep decides.

    Args:
        numbers: accuracy in % by seed, for each cell.
        baselines: index of the baseline by the index of its cell.
        max_seeds: largest number of seeds of a cell.

    Returns:
        The comparisons in the order of `baselines`, and (index of the cell, seed) of each run that
        is missing. There is none if every comparison is decided or has `max_seeds` seeds.
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
    from scipy.stats import ttest_ind

    if statistics.pstdev(ours) < 1e-9 and statistics.pstdev(theirs) < 1e-9:
        # Accuracies come in steps: equal numbers only say that the deviation is below a step.
        return 1.0
    return float(ttest_ind(ours, theirs, equal_var=False).pvalue)


def find_baselines(cells: Sequence[Config], baseline: str | None = None) -> dict[int, int]:
    """Return the index of the baseline of each cell that has one in the sweep.

    A baseline has the cell's student, teacher and budget (`SAME_BUDGET`). Without `baseline`, it is
    the first of these methods that the sweep has: the cell's method without its last feature
    method, with M=[1], without standardisation, the student alone, KD. If several cells fit, the
    one with the cell's temperature, weights and learning rate is taken, or none.

    Args:
        cells: one job of each cell; its seed does not matter.
        baseline: name of the method that every cell is compared with, such as "KD+LS" or
            "SD-KD [1,2,4]"; None for the choice above.

    Raises:
        ValueError: If no cell has the method `baseline`, or if no cell has a baseline.
    """
    names = [_name(cell) for cell in cells]
    if baseline is not None and baseline not in names:
        raise ValueError(
            f"sweep.baseline={baseline} is no method of this sweep; "
            f"it has {', '.join(dict.fromkeys(names))}"
        )
    found = {}
    for index, cell in enumerate(cells):
        wanted = [baseline] if baseline is not None else list(_counterparts(cell))
        for name in wanted:
            fitting = [
                other
                for other, candidate in enumerate(cells)
                if other != index and names[other] == name and _comparable(cell, candidate)
            ]
            if len(fitting) > 1:
                fitting = [other for other in fitting if _agree(cell, cells[other], TUNED)]
            if len(fitting) == 1 and names[index] != name:
                found[index] = fitting[0]
                break
    if not found:
        raise ValueError(
            "sweep.seeds=until_decided has nothing to decide: no job of this sweep has a baseline "
            f"in it; it has {', '.join(dict.fromkeys(names))}. Add a baseline, such as recipe=kd, "
            "or name it by sweep.baseline"
        )
    return found


def describe(comparison: Comparison, cells: Sequence[Config]) -> str:
    """Return a line that states a comparison: methods, gain, seeds, p and verdict."""
    cell, baseline = cells[comparison.cell], cells[comparison.baseline]
    pair = cell.student.name
    if cell.has_teacher:
        pair = f"{cell.teacher.name} {cell.student.name}"
    verdict = "undecided"
    if comparison.decided:
        verdict = "better" if comparison.gain > 0 else "worse"
    return (
        f"{pair}: {_name(cell)} over {_name(baseline)}: {verdict} after {comparison.seeds} seeds, "
        f"{comparison.gain:+.2f} points, p={comparison.p:.2g}"
    )


def _name(cell: Config) -> str:
    """Return the method and its scales as people write them, such as "SD-KD+LS [1,2,4]"."""
    return cfg.title(cell, seed=False).rpartition(", ")[0]


def _counterparts(cell: Config) -> Iterator[str]:
    """Yield the names of the methods that a cell is compared with, the first choice first."""
    if not cell.has_teacher:
        return
    if cell.features and (len(cell.features) > 1 or cell.distiller.loss):
        without_last = copy.deepcopy(cell)
        without_last.features.popitem()
        yield _name(without_last)
    if cell.M != [1]:
        on_whole_map = copy.deepcopy(cell)
        on_whole_map.M = [1]
        yield _name(on_whole_map)
    if cell.standardize:
        plain = copy.deepcopy(cell)
        plain.standardize = False
        yield _name(plain)
    yield "student alone"
    yield "KD"


def _comparable(cell: Config, other: Config) -> bool:
    """Return whether two cells have the same student, teacher and budget."""
    if cell.student != other.student or not _agree(cell, other, SAME_BUDGET):
        return False
    return not other.has_teacher or cell.teacher.name == other.teacher.name


def _agree(cell: Config, other: Config, keys: Sequence[str]) -> bool:
    ours, theirs = cfg.flatten(cell), cfg.flatten(other)
    return all(ours.get(key) == theirs.get(key) for key in keys)
