"""Choose for each cell of a sweep the cell that it is compared with, and tell what is missing.

A cell is a job without its seed. The choice is that of the tables of `analysis`.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from sddlskd import config as cfg
from sddlskd import record
from sddlskd.config import Config
from sddlskd.record import FINISHED
from sddlskd.sweeps.estimate import networks_of

__all__ = ["comparison_lines", "find_baselines", "name_of", "same_pair", "twin_lines"]

# Settings that a cell and its baseline must share, as keys of `cfg.flatten`.
COMPARABLE = (
    "dataset.name",
    "dataset.val_fraction",
    "dataset.train_fraction",
    "optimizer.name",
    "optimizer.lr",
    "trainer.epochs",
    "trainer.batch_size",
    "trainer.max_steps",
    "trainer.precision",
)
# Suffixes of a loss on standardised logits in the papers' names.
SUFFIXES = ("LS", "BS", "CS")
# Plain methods whose names say that the logits are standardised.
PLAIN = {"LumiNet": "KD", "NormKD": "KD"}
# The end of a run's name, which tells its seed and hash (`config.run_name`).
SEED = re.compile(r"-s\d+-[0-9a-f]{12}$")


def find_baselines(cells: Sequence[Config], baseline: str | None = None) -> dict[int, int]:
    """Return {index of a cell: index of its baseline} of the cells that have a baseline in `cells`.

    A cell is a job without its seed. Its baseline is a cell of another method that has the same
    student and data, the same teacher unless the baseline is the student alone, and the same
    optimizer (DOT counts as SGD), learning rate, epochs, steps, batch size and precision. If the
    argument `baseline` is None, the baseline's method is the first of these that `cells` has for
    the same student, data set and teacher:

    1. the cell's method without its last part;
    2. the cell's method with M=[1];
    3. the cell's method without standardisation;
    4. the student alone;
    5. KD.

    If several cells have this method and a teacher, the baseline is the one that agrees with the
    cell in every setting in which these cells differ, such as the temperature. If no single cell is
    left, the cell has no baseline.

    Args:
        cells: one job of each cell; its seed does not matter.
        baseline: name of the method of every baseline, such as "KD+LS" or "SD-KD [1,2,4]"; None for
            the choice above.

    Raises:
        ValueError: If no cell has the method `baseline`, or if no cell has a baseline.
    """
    names = [name_of(cell) for cell in cells]
    if baseline is not None and baseline not in names:
        raise ValueError(
            f"sweep.baseline={baseline} is no method of this sweep; "
            f"it has {', '.join(dict.fromkeys(names))}"
        )
    found = _baselines(cells, baseline)
    if not found:
        raise ValueError(
            "sweep.seeds=until_decided has nothing to decide: no job of this sweep has a baseline "
            f"in it; it has {', '.join(dict.fromkeys(names))}. Add a baseline, such as recipe=kd, "
            "or name it by sweep.baseline"
        )
    return found


def _baselines(cells: Sequence[Config], baseline: str | None = None) -> dict[int, int]:
    """Return what `find_baselines` returns; {} if no cell has a baseline."""
    names = [name_of(cell) for cell in cells]
    found = {}
    for index, cell in enumerate(cells):
        wanted = [baseline] if baseline is not None else _counterparts(names[index])
        on_pair = [
            other
            for other, candidate in enumerate(cells)
            if names[other] != names[index] and same_pair(cell, candidate)
        ]
        first = next((name for name in wanted if name in {names[o] for o in on_pair}), None)
        fitting = [
            other
            for other in on_pair
            if names[other] == first and _agree(cell, cells[other], COMPARABLE)
        ]
        if len(fitting) > 1 and cells[fitting[0]].has_teacher:
            telling = _telling_apart([cells[other] for other in fitting])
            fitting = [other for other in fitting if _agree(cell, cells[other], telling)]
        if len(fitting) == 1:
            found[index] = fitting[0]
    return found


def comparison_lines(jobs: Sequence[Config]) -> list[str]:
    """Return lines for a plan that name what the tables of a sweep will not compare.

    A line names each method that lacks its best baseline, both among the jobs and among the
    finished runs of the same home, and the baseline that takes its place. Another line says that a
    single seed gives no interval.

    Args:
        jobs: all jobs of the sweep, at least one.
    """
    cells = list({cfg.settings_hash(job): job for job in jobs}.values())
    lines = _lacking(cells)
    if lines:  # reading the records of earlier runs takes time
        lines = _lacking(cells, _earlier(cells))
    if len(cells) == len(jobs) and not any(map(_has_other_seeds, jobs)):
        lines.append("one seed of each method: tables show no interval; seed=0,1,2 gives one")
    return lines


def twin_lines(jobs: Sequence[Config]) -> list[str]:
    """Return a line for each set of recipes that give the same jobs but for the clipping.

    The recipe of SD-KD differs from that of KD in `M` and `optimizer.clip_norm` alone. With equal
    `M`, the jobs are the same training unless a gradient is clipped, and no independent runs.
    """
    twins: dict[str, dict[str, Config]] = defaultdict(dict)
    for job in jobs:
        unclipped = replace(job, optimizer=replace(job.optimizer, clip_norm=None))
        twins[cfg.settings_hash(unclipped)][job.recipe] = job
    methods: dict[tuple[str, ...], dict[str, None]] = defaultdict(dict)
    for of_recipe in twins.values():
        if len(of_recipe) > 1:
            words = [
                f"recipe={recipe} (clip_norm={cfg.flatten(job)['optimizer.clip_norm'] or 'null'})"
                for recipe, job in of_recipe.items()
            ]
            methods[tuple(words)][name_of(next(iter(of_recipe.values())))] = None
    return [
        f"{' and '.join(words)} give the same {', '.join(names)} but for optimizer.clip_norm, and "
        "the same numbers where no gradient is clipped; list the jobs by sweep.jobs instead"
        for words, names in methods.items()
    ]


def _lacking(cells: Sequence[Config], earlier: Sequence[Config] = ()) -> list[str]:
    """Return a line for each method whose first choice of a baseline is missing.

    A baseline among `earlier` counts if it is the first choice; else the one that takes its place
    is the one that `cells` alone have, because a table of the sweep shows that. A method without
    any baseline gets no line if it is the baseline of another one.
    """
    names = [name_of(cell) for cell in (*cells, *earlier)]
    with_earlier, found = _baselines([*cells, *earlier]), _baselines(cells)
    for index, base in with_earlier.items():
        if index not in found or names[base] == _counterparts(names[index])[0]:
            found[index] = base
    bases = {names[base] for base in found.values()}
    lines = []
    for index in range(len(cells)):
        choices = _counterparts(names[index])
        if not choices:
            continue
        lack = f"{names[index]}: no comparable {choices[0]} in this sweep or among finished runs"
        if index in found and names[found[index]] != choices[0]:
            lines.append(f"{lack}, so its gain is over {names[found[index]]}")
        elif index not in found and names[index] not in bases:
            lines.append(f"{lack}, so tables show no gain of it")
    return list(dict.fromkeys(lines))


def _earlier(cells: Sequence[Config]) -> list[Config]:
    """Return the newest finished run of each method that `cells` may be compared with.

    The runs have the same home, data set and student as a cell and, if they have one, its teacher.
    Runs with the settings of a cell are left out.
    """
    starts = {
        (Path(cell.run_dir).parent, start)
        for cell in cells
        for start in (networks_of(cell), cell.student.name)
    }
    paths = {path for folder, start in starts for path in folder.glob(f"{start}-*")}
    ended = sorted(filter(_ended, paths), key=lambda path: path.stat().st_mtime)
    newest = {_seedless(path): path for path in ended}
    runs = {}
    for path in newest.values():
        with suppress(ValueError, OSError):  # a damaged record is no reason to refuse a plan
            run = cfg.load(path / "config.yaml")
            runs[cfg.settings_hash(run)] = run
    own = set(map(cfg.settings_hash, cells))
    return [run for settings, run in runs.items() if settings not in own]


def _has_other_seeds(job: Config) -> bool:
    """Return whether there are finished runs of a job's name with other seeds."""
    own = _seedless(Path(job.run_dir))
    others = own.parent.glob(f"{own.name}-s[0-9]*")
    return any(
        _seedless(path) == own and not path.name.startswith(f"{own.name}-s{job.seed}-")
        for path in others
        if _ended(path)
    )


def _seedless(run_dir: Path) -> Path:
    return run_dir.with_name(SEED.sub("", run_dir.name))


def _ended(run_dir: Path) -> bool:
    """Return whether a run is FINISHED; a damaged record is no reason to refuse a plan."""
    with suppress(record.Damaged, OSError):
        return record.read_result(run_dir).get("status") == FINISHED
    return False


def name_of(cell: Config) -> str:
    """Return the method and its scales as people write them, such as "SD-KD+LS [1,2,4]"."""
    return cfg.title(cell, seed=False).rpartition(", ")[0]


def _counterparts(name: str) -> list[str]:
    """Return the names of the methods that a method is compared with, the first choice first."""
    if name == "student alone":
        return []
    method, blank, scales = name.partition(" [")
    shorter, plain = _without_last(method), _plain(method)
    found = [
        shorter and f"{shorter}{blank}{scales}",
        shorter,
        method.removeprefix("SD-"),
        plain and f"{plain}{blank}{scales}",
        plain,
        "student alone",
        "KD",
    ]
    return [one for one in dict.fromkeys(found) if one and one != name]


def _without_last(method: str) -> str | None:
    """Return a sum of losses without its last loss, or None if the method is a single loss."""
    parts = method.split("+")
    if parts[-1] in SUFFIXES:
        parts.pop()
    return "+".join(parts[:-1]) or None


def _plain(method: str) -> str | None:
    """Return the method without standardisation, or None if it has none."""
    prefix = "SD-" if method.startswith("SD-") else ""
    if (own := method.removeprefix("SD-")) in PLAIN:
        return prefix + PLAIN[own]
    rest, _, last = method.rpartition("+")
    return rest if last in SUFFIXES else None


def same_pair(cell: Config, other: Config) -> bool:
    """Return whether two cells have the same student, data set and, if `other` has one, teacher."""
    if cell.student != other.student or cell.dataset.name != other.dataset.name:
        return False
    return not other.has_teacher or cfg.teacher_name(cell) == cfg.teacher_name(other)


def _telling_apart(cells: Sequence[Config]) -> list[str]:
    """Return the settings, as keys of `cfg.flatten`, that tell cells of one method apart.

    The arguments of a loss, which repeat its temperature, are left out.
    """
    flat = [cfg.flatten(cell) for cell in cells]
    return [
        key
        for key in cfg.identity_keys() - {"seed", "distiller.loss"}
        if len({str(values.get(key)) for values in flat}) > 1
    ]


def _agree(cell: Config, other: Config, keys: Sequence[str]) -> bool:
    """Return whether two cells have the same values of the settings `keys` of `cfg.flatten`."""
    ours, theirs = cfg.flatten(cell), cfg.flatten(other)
    for values in (ours, theirs):
        if values["optimizer.name"] == "dot":  # DOT is a method that changes SGD
            values["optimizer.name"] = "sgd"
    return all(ours.get(key) == theirs.get(key) for key in keys)
