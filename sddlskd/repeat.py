"""Print the command that trains a past run again: `python -m sddlskd.repeat RUN [OVERRIDE ...]`.

RUN: the folder of a run, or its config.yaml, which may come from the artifacts of MLflow.

The command has the run's choices (recipe, teacher, student, data set and others), and an override
for each key in which the run differs from them. Folders, tracking and the sweep are left out.
stdout has the command alone, with the overrides that follow RUN; a shell runs it by
eval "$(sddlskd repeat RUN seed=3)". stderr tells what is not as it was: the code, the data, the
teacher file.
"""

import argparse
import copy
import os
import re
import shlex
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from sddlskd import config as cfg
from sddlskd import record
from sddlskd.config import Config
from sddlskd.config.targets import ForeignTarget
from sddlskd.terminal.arguments import other_form
from sddlskd.terminal.console import (
    explain,
    log_to_terminal,
    refuse_another_checkout,
    write_line,
)

__all__ = ["main", "overrides_of"]

RECORDED = "config.yaml"  # the file beside a run's result.json and code.json
PROGRAM = "python -m sddlskd.train"
# Errors of a value that this package or Hydra refuses
ERRORS = (HydraException, OmegaConfBaseException, ValueError, OSError, OverflowError)
# Keys that say where a run is recorded, and `recipe`, which is a choice
LEFT_OUT = ("home", "run_dir", "recipe", "tracking", "sweep")
# The key below each group of conf/ that holds a `_target_`
TARGET_OF = {
    "dataset": "load",
    "teacher": "model",
    "student": "model",
    "distiller": "loss",
    "features": "method",
    "optimizer": "algorithm",
}
ROOT = ("dataset.root", "dataset.load.root")  # keys that `_root` compares
PLAIN_FEATURE = "cc"  # file of conf/features without options, the start for a method of the user
KEY = re.compile(r"[A-Za-z_][\w-]*")  # part of a key that an override can name
MOST_KEYS = 5  # keys that a message names
CURE = (
    "take config.yaml from the run's artifacts in MLflow, or use the version of sddlskd that "
    "code.json names"
)
WHERE = "give the folder of a run, such as runs/<dataset>/<run>, or its config.yaml"


@dataclass(frozen=True)
class Override:
    """Override of a key on the command line.

    Attributes:
        key: dotted key.
        value: value of nested dicts, lists and plain values; not used if `sign` is "~".
        sign: "" to replace a value, "+" to add a key, "~" to delete it.
    """

    key: str
    value: Any
    sign: str = ""

    def __str__(self) -> str:
        if self.sign == "~":
            return f"~{self.key}"
        return f"{self.sign}{self.key}={cfg.value_text(self.value)}"

    def apply(self, composed: DictConfig) -> None:
        """Change a composed configuration as Hydra would change it."""
        if self.sign != "~":
            OmegaConf.update(composed, self.key, self.value, merge=True, force_add=True)
            return
        parent, _, name = self.key.rpartition(".")
        node = OmegaConf.select(composed, parent)
        with open_dict(node):
            del node[name]


def main() -> None:
    """Print the training command of the run that the command line (`sys.argv`) names.

    The command goes to stdout, notes go to stderr.

    Raises:
        SystemExit: With code 1 after printing why the run cannot be repeated, or 2 if the arguments
            cannot be parsed.
    """
    log_to_terminal()
    refuse_another_checkout()
    options = _parse(sys.argv[1:])
    path = Path(options.run)
    try:
        file = _file_of(path)
        run = _load(file)
        words, job = _repeated(run, file)
        notes = _notes(job, file, is_same=not options.overrides)
    except ERRORS as error:
        _refuse(explain(error))
    for note in notes:
        sys.stderr.write(f"note: {note}\n")
    write_line(" ".join([PROGRAM, *map(shlex.quote, [*words, *options.overrides])]))


def _refuse(reason: str) -> NoReturn:
    sys.stderr.write(f"error: {reason}\n")
    sys.exit(1)


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m sddlskd.repeat",
        description="Print the training command of a past run. In a shell, "
        'eval "$(sddlskd repeat RUN seed=3)" runs it with another seed.',
        allow_abbrev=False,
    )
    parser.add_argument("run", help="the folder of the run, or its config.yaml")
    parser.add_argument(
        "overrides", nargs="*", help="what the command shall change, as in seed=3, or home=FOLDER"
    )
    if wrong := other_form(parser, words):
        parser.error(wrong)
    options = parser.parse_args(words)
    for word in options.overrides:
        if "=" not in word and not word.startswith("~"):
            parser.error(f"{word} is no override; give KEY=VALUE, such as seed=3")
    return options


def _file_of(path: Path) -> Path:
    """Return the config.yaml of a run, given as this file or as the run's folder.

    Raise ValueError if there is none.
    """
    if path.is_file():
        return path
    if not path.exists():
        raise ValueError(f"there is no folder {path}; {WHERE}")
    if (path / RECORDED).is_file():
        return path / RECORDED
    if (path / "sweep.json").is_file():
        jobs = record.read_json(path / "sweep.json").get("jobs") or ["none"]
        raise ValueError(
            f"{path} is the folder of a sweep; give one of its runs, such as {jobs[0]}"
        )
    inside = [*path.glob(f"*/{RECORDED}"), *path.glob(f"*/*/{RECORDED}")]
    if inside:
        raise ValueError(f"{path} holds runs; give one of them, such as {min(inside).parent}")
    raise ValueError(f"{path} is not the folder of a run: it has no config.yaml; {WHERE}")


def _load(file: Path) -> Config:
    """Return the configuration of a run from its config.yaml.

    Raise ValueError if the file is damaged, or if result.json beside it has the hash of another
    configuration.
    """
    try:
        run = cfg.load(file)
    except ForeignTarget:
        raise
    except ValueError as error:
        raise ValueError(f"{error}; {CURE}") from None
    noted = None
    if file.name == RECORDED:
        noted = record.read_result(file.parent).get("config_hash")
    if noted and noted != cfg.config_hash(run):
        raise ValueError(
            f"{file} is not what was trained: its hash is {cfg.config_hash(run)}, and result.json "
            f"has {noted}; {CURE}"
        )
    return run


def _repeated(run: Config, file: Path) -> tuple[list[str], Config]:
    """Return the overrides that repeat a run, and the job that they compose.

    `file` is the run's config.yaml, for messages. Raise ValueError if the job is not that of the
    run, because this version of the package refuses a value or has no such setting.
    """
    try:
        words = overrides_of(run)
        job = _job_of(words)
    except ERRORS as error:
        raise ValueError(
            f"{file} cannot be repeated by this version of sddlskd: {explain(error)}; use the "
            "version that code.json names"
        ) from None
    if differing := _differing_keys(run, job):
        raise ValueError(
            f"{file} cannot be repeated by this version of sddlskd: the command would differ in "
            f"{', '.join(differing)}; use the version that code.json names"
        )
    return words, job


def overrides_of(run: Config) -> list[str]:
    """Return the overrides with which Hydra composes the job of a run.

    `run` is the configuration of the run, as `cfg.load` returns it. If no overrides compose this
    job, return those of the job that is nearest to it. Raise an error of `ERRORS` if this package
    refuses a value.
    """
    choices, base = _choices(run)
    fixed = _root(run, base)
    for override in fixed:
        override.apply(base)
    wanted = _values(run)
    found: dict[str, Override] = {}
    while True:  # an override may change further keys, which then need overrides of their own
        changed = _changed(base, found.values())
        new = {
            override.key: override
            for override in _differences(changed, wanted)
            if override.key not in found
        }
        if not new:
            break
        found |= new
    # Leave out the overrides that follow from others: those of references, or any of them if the
    # choices alone make no valid job, whose values cannot be compared.
    is_valid = not found or _is_valid(base)
    can_follow = [key for key in found if not is_valid or _refers(base, key)]
    for key in can_follow:
        fewer = {k: override for k, override in found.items() if k != key}
        if not _differences(_changed(base, fewer.values()), wanted):
            found = fewer
    return [*choices, *map(str, fixed), *map(str, found.values())]


def _choices(run: Config) -> tuple[list[str], DictConfig]:
    """Return the overrides that choose files of conf/ for a run, and what Hydra composes of them.

    The overrides are such as "recipe=kd"; references in the configuration stay unresolved.
    """
    words = [f"recipe={_recipe(run)}"]
    teacher = ""
    if run.has_teacher:
        teacher = _choice("teacher", run.teacher.name, run.teacher.model)
        more = {
            key: _choice("teacher", one.name, one.model) for key, one in run.more_teachers.items()
        }
        has_own_names = all(key == choice != teacher for key, choice in more.items())
        if more and teacher and has_own_names:
            words.append(f"teacher=[{','.join([teacher, *more])}]")
        else:
            if teacher:
                words.append(f"teacher={teacher}")
            for key, choice in more.items():
                words.append(f"+teacher@more_teachers.{key}={choice or 'resnet8'}")
    if student := _choice("student", run.student.name, run.student.model):
        words.append(f"student={student}")
        pair = f"{teacher}_{student}"
        if not run.more_teachers and _pair_has_values(pair):
            words[1:] = [f"pair={pair}"]
    if dataset := _choice("dataset", run.dataset.name, run.dataset.load):
        words.append(f"dataset={dataset}")
    composed = _composed(words)
    count = len(words)
    for group, part in (("distiller", run.distiller.loss), ("optimizer", run.optimizer.algorithm)):
        name = getattr(run, group).name
        chosen = _choice(group, name, part)
        if chosen and composed[group].name not in (name, chosen):
            words.append(f"{group}={chosen}")
    known = [name for name in run.features if name in _files("features")]
    if set(composed.features) != set(known):
        words.append(f"features=[{','.join(known)}]")
    for name, feature in run.features.items():
        if name not in known:
            start = _choice("features", name, feature.method) or PLAIN_FEATURE
            words.append(f"+features@features.{name}={start}")
    if len(words) > count:
        composed = _composed(words)
    return words, composed


def _recipe(run: Config) -> str:
    if run.recipe in _files("recipe"):
        return run.recipe
    return "none" if run.has_teacher else "vanilla"


def _pair_has_values(name: str) -> bool:
    """Return whether a file of conf/pair has more than the choice of teacher and student."""
    return name in _files("pair") and set(_files("pair")[name]) != {"defaults"}


def _choice(group: str, name: str, part: Mapping[str, Any]) -> str:
    """Return the file of a group of conf/ that is nearest to a run's settings, or "".

    `part` is what the run has below the key `TARGET_OF[group]`. The file has the same `_target_`
    and, if it has a `name` there, the same `name`. The best of several such files is the one whose
    file or whose setting `name` is called `name`, then the one with the most arguments of `part`.
    Without such a file, it is the one that is called `name`.
    """
    files, ranks = _files(group), {}
    for stem, content in files.items():
        own = content.get(TARGET_OF[group]) or {}
        same_target = part and own.get("_target_") == part.get("_target_")
        if same_target and own.get("name", "???") in ("???", part.get("name")):
            equal = sum(own.get(key) == value for key, value in part.items())
            ranks[stem] = (stem == name, content.get("name") == name, equal)
    if ranks:
        return max(ranks, key=ranks.__getitem__)
    return name if name in files else ""


@cache
def _files(group: str) -> dict[str, dict[str, Any]]:
    """Return {name: content} of the files of a group in conf/; references are not resolved."""
    paths = sorted((cfg.conf_folder() / group).glob("*.yaml"))
    return {path.stem: OmegaConf.to_container(OmegaConf.load(path)) for path in paths}  # type: ignore[misc]


def _root(run: Config, base: DictConfig) -> list[Override]:
    """Return the override of dataset.root if a run's data are not where they would be by default.

    A folder of the same place in another home is the default, unless only the run's own exists.
    """
    there = run.dataset.root
    if run.dataset.load.get("root") != there:
        return []  # the data set does not read the folder
    here = os.path.abspath(base.dataset.root)
    is_default = os.path.relpath(there, run.home) == os.path.relpath(here, base.home)
    if here == there or (is_default and (Path(here).exists() or not Path(there).exists())):
        return []
    return [Override("dataset.root", there)]


def _composed(words: Sequence[str]) -> DictConfig:
    """Return what Hydra composes of overrides; references stay unresolved."""
    cfg.frame()
    cfg.check_choices(words)
    with hydra.initialize_config_dir(str(cfg.conf_folder()), version_base="1.3"):
        return hydra.compose("config", overrides=cfg.with_each_teacher(words))


def _job_of(words: Sequence[str]) -> Config:
    """Return the job that `python -m sddlskd.train` would run with the overrides `words`."""
    return cfg.resolve(_composed(words))


def _changed(base: DictConfig, overrides: Collection[Override]) -> DictConfig:
    changed = copy.deepcopy(base)
    for override in overrides:
        override.apply(changed)
    return changed


def _values(job: Config) -> dict[str, Any]:
    """Return {dotted key: value} of a job, without the keys that a command leaves out."""
    values = dict(_leaves(asdict(job)))
    if job.dataset.load.get("root") == job.dataset.root:
        values.pop("dataset.load.root")
    values.pop("dataset.root")
    return values


def _leaves(node: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of nested settings; a value that cannot be read is left out.

    An empty dict is a value, and so is a dict with a key that an override cannot name.
    """
    for name in node:
        if not prefix and name in LEFT_OUT:
            continue
        key = f"{prefix}{name!s}"
        try:
            value = node[name]
            if isinstance(value, Mapping) and value and all(map(_is_key, value)):
                yield from _leaves(value, f"{key}.")
            else:
                yield key, _plain(value)
        except (OmegaConfBaseException, ValueError):
            continue  # a value that the user must give, or a folder that is missing


def _is_key(name: Any) -> bool:
    return isinstance(name, str) and bool(KEY.fullmatch(name))


def _plain(value: Any) -> Any:
    """Return a value of OmegaConf as dicts, lists, texts and numbers."""
    if isinstance(value, DictConfig | ListConfig):
        return OmegaConf.to_container(value, resolve=True, enum_to_str=True)
    return value.value if isinstance(value, Enum) else value


def _differences(composed: DictConfig, wanted: Mapping[str, Any]) -> list[Override]:
    """Return the overrides of the keys in which a composed job differs from wanted values.

    If values of the job cannot be read, return those of the missing keys alone: other values may
    depend on them.
    """
    unread = set[str]()
    try:
        present = _values(cfg.resolve(composed))
    except ERRORS:  # a value is missing or not valid; the overrides may mend it
        present = dict(_leaves(composed))
        unread = {key for key, value in wanted.items() if key not in present and value != {}}
    found = []
    for key, value in wanted.items():
        has_key = _place(composed, key)[0] is not None
        if has_key and (value == {} or (key in present and _same(present[key], value))):
            continue
        if key in unread or not unread:
            found.append(Override(key, value, "" if has_key else "+"))
    if unread:
        return found
    for key in present:
        is_wanted = key in wanted or any(other.startswith(f"{key}.") for other in wanted)
        if not is_wanted and key not in ROOT:
            found.append(Override(key, None, "~"))
    return found


def _is_valid(composed: DictConfig) -> bool:
    try:
        cfg.resolve(composed)
    except ERRORS:
        return False
    return True


def _refers(composed: DictConfig, key: str) -> bool:
    """Return whether a value is a reference to other keys, which may give it the right value."""
    node, name = _place(composed, key)
    return node is not None and OmegaConf.is_interpolation(node, name)


def _place(composed: DictConfig, key: str) -> tuple[DictConfig | None, str]:
    """Return the settings that hold a dotted key, None if there are none, and the key's last part.

    A key without a value yet, such as a name that the user must give, is there.
    """
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(composed, parent) if parent else composed
    is_there = isinstance(node, DictConfig) and name in node.keys()  # noqa: SIM118
    return node if is_there else None, name


def _same(one: Any, other: Any) -> bool:
    """Return whether two values are equal; 6 is 6.0, but 1 is not true."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


def _differing_keys(run: Config, job: Config) -> list[str]:
    """Return the keys in which a job is not that of a run; [] if both have the same hash."""
    if cfg.config_hash(run) == cfg.config_hash(job):
        return []
    then, now = _values(run), _values(job)
    keys = [key for key in {**then, **now} if not _same(then.get(key), now.get(key))]
    return keys[:MOST_KEYS] or ["settings that have no key"]


def _notes(job: Config, file: Path, *, is_same: bool) -> list[str]:
    """Return lines about what is not as it was when a run was trained.

    Args:
        job: the job of the run's command.
        file: the run's config.yaml. The other files of the run may be missing.
        is_same: whether the command that is printed has no further overrides.
    """
    notes: list[str] = []
    if file.name == RECORDED:
        try:
            notes += _notes_on_code(job, file.parent)
        except record.Damaged as error:
            notes.append(str(error))
        notes += _notes_on_inputs(job, file.parent)
    if is_same and Path(job.run_dir, RECORDED).is_file():
        notes.append(
            f"{job.run_dir} holds this run; add seed=NUMBER, another override or home=FOLDER to "
            "train anew"
        )
    return notes


def _notes_on_code(job: Config, folder: Path) -> Iterator[str]:
    then = record.read_json(folder / "code.json")
    if then:
        now = record.code_state()
        if any(then.get(key) != now[key] for key in ("version", "git_sha")):
            yield (
                f"the run was trained by sddlskd {_revision(then)}, and this is {_revision(now)}: "
                "the numbers may differ"
            )
        file = folder / "code.diff"
        diff = file.read_text(errors="replace") if file.is_file() else ""
        if diff != now["diff"]:
            yield "the uncommitted changes of the code are not those of the run (code.diff)"
    own_then, own_now = then.get("own_code", {}), record.own_code_of(job)
    for module, sha256 in own_then.items():
        if module not in own_now:
            yield f"{module}.py is not found here; start from its folder, or set PYTHONPATH"
        elif own_now[module] != sha256:
            yield f"{module}.py has changed since the run was trained: the numbers may differ"
    match = re.search(r"\btorch ([^\s,]+)", str(record.read_result(folder).get("environment", "")))
    if match and match[1] != version("torch"):
        yield f"the run was trained with torch {match[1]}, and this is {version('torch')}"


def _revision(code: Mapping[str, Any]) -> str:
    commit = str(code.get("git_sha", ""))[:12]
    return f"{code.get('version')} (commit {commit})" if commit else f"{code.get('version')}"


def _notes_on_inputs(job: Config, folder: Path) -> Iterator[str]:
    """Yield a note if the data or the teacher file differ from those of the run."""
    result = record.read_result(folder)
    if not result.get("data") and not result.get("teacher_sha256"):
        return
    # These import PyTorch, which takes seconds.
    from sddlskd.training.begun import data_changed, teacher_changed
    from sddlskd.training.build import present_fingerprint

    # A file of a stranger may name any code, which only training runs.
    if not job.allow_foreign_targets and (
        differs := data_changed(result, present_fingerprint(job))
    ):
        yield f"dataset={job.dataset.name} has other data than the run saw ({differs})"
    if teacher_changed(job, result):
        yield f"the run had another file of the teacher {cfg.teacher_name(job)} than {job.home} has"


if __name__ == "__main__":
    main()
