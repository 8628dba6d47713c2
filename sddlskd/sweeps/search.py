"""Search for the best settings with Optuna: jobs are proposed, trained in batches, and judged.

A trial is a job that Optuna proposes. The file optuna.db (SQLite) in the sweep's folder keeps all
trials, so that the same command continues the search after an interruption.
"""

import logging
import math
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from omegaconf import DictConfig

from sddlskd import config as cfg
from sddlskd.config import OBJECTIVES, Config, conf_folder
from sddlskd.record import FAILED, FINISHED, PRUNED, read_rows
from sddlskd.sweeps.outcome import result_of
from sddlskd.terminal.console import outcomes, write_line
from sddlskd.terminal.words import counted

__all__ = ["DATABASE", "Search", "Start", "objective_of", "searched_keys", "split_words"]

log = logging.getLogger(__name__)

DATABASE = "optuna.db"
# Settings that change neither the results of trials nor their comparison
NOT_COMPARED = ("sweep.", "hydra.", "hydra/", "tracking.", "home=", "objective=")
DEFAULT_LAUNCHER = "shared_teacher"
TRAIN = ("python", "-m", "sddlskd.train")
# Settings of the trials that the final training does not have
NOT_IN_FINAL = ("dataset.val_fraction=", "objective=", "seed=")
FINAL_SEEDS = 3  # number of seeds in the command of the final training
INSTALL = "hydra/sweeper=optuna needs the package optuna: pip install 'sddlskd[search]'"


def objective_of(job: Config, result: Mapping[str, Any]) -> float | None:
    """Return the number that a search compares a job by, which the key `objective` names.

    Args:
        job: configuration of the job.
        result: content of the job's result.json.

    Returns:
        The number: an accuracy in percent, or a loss. None if the job has not finished.
    """
    if result["status"] != FINISHED:
        return None
    name, _ = OBJECTIVES[job.objective]
    number = result.get(name)
    if number is None:
        number = read_rows(Path(job.run_dir))[-1].get(name)
    return None if number is None else float(number)


def _tell_if_not_held_out(job: Config) -> None:
    """Log a warning if the objective of a search is measured on the test split."""
    if job.objective.startswith("test/"):
        log.warning(
            "objective=%s is measured on the test split; set objective=%s",
            job.objective,
            job.objective.replace("test/", "best/"),
        )
    elif not job.dataset.val_fraction:
        log.warning(
            "objective=%s is measured on the test split; dataset.val_fraction=0.1 holds out "
            "training images for the search",
            job.objective,
        )


def split_words(words: Sequence[str]) -> tuple[list[str], dict[str, Override]]:
    """Return the overrides of a search in two parts: those of all jobs, and those that vary.

    Args:
        words: overrides as on the command line. A later one replaces an earlier one of its key.

    Returns:
        The overrides with one value, and {key: override} of those with several. Such an override
        is a list of choices (`M=[1],[1,2]`), a range, or an interval (`seed=interval(0,9)`).

    Raises:
        HydraException: If an override cannot be read.
        ValueError: If no override has several values.
    """
    parsed = {
        one.get_key_element(): one for one in OverridesParser.create().parse_overrides(list(words))
    }
    varied = {key: one for key, one in parsed.items() if one.is_sweep_override()}
    if not varied:
        raise ValueError(
            "hydra/sweeper=optuna has nothing to search; vary a key, such as "
            "distiller.temperature=interval(1.0,8.0)"
        )
    fixed = [str(one.input_line) for key, one in parsed.items() if key not in varied]
    return fixed, varied


def searched_keys(command: str) -> list[str]:
    """Return the keys that a search varies, from the command that continues it.

    `command` is that of the sweep's manifest. The list is empty if no override of the command has
    several values.
    """
    words = [word for word in shlex.split(command) if "=" in word and not word.startswith("-")]
    parsed = OverridesParser.create().parse_overrides(words)
    return [one.get_key_element() for one in parsed if one.is_sweep_override()]


def _distribution(override: Override) -> Any:
    """Return Optuna's distribution of the values of an override.

    `int(interval(1,9))` has integers, and another interval has real numbers, which may be negative.
    The tag `log` draws them on a logarithmic scale. All other values are choices without an order.

    Raises:
        ValueError: If there are no values: an interval ends before it begins, has an infinite end,
            or begins at 0 or below with the tag `log`; or a range is empty. Also if there is
            another tag than `log`, or if it belongs to no interval.
    """
    from optuna import distributions

    value = override.value()
    wrong = _wrong_with(value)
    if wrong:
        raise ValueError(f"{override.input_line}: {wrong}")
    if isinstance(value, IntervalSweep):
        kind: Any = distributions.FloatDistribution
        if isinstance(value.start, int) and isinstance(value.end, int):
            kind = distributions.IntDistribution
        return kind(value.start, value.end, log="log" in value.tags)
    choices = list(override.sweep_string_iterator())
    if not choices:
        raise ValueError(f"{override.input_line}: it has no values")
    return distributions.CategoricalDistribution(choices)


def _wrong_with(value: Any) -> str:
    """Return what is wrong with the values of an override, in words; "" if nothing is."""
    tags: set[str] = getattr(value, "tags", set())
    if other := sorted(tags - {"log"}):
        return f"{other[0]} is no tag of a search; give tag(log, interval(LOW,HIGH))"
    if not isinstance(value, IntervalSweep):
        return "a logarithmic scale needs tag(log, interval(LOW,HIGH))" if tags else ""
    low, high = value.start, value.end
    assert low is not None
    assert high is not None
    if not (math.isfinite(low) and math.isfinite(high)):
        return "both ends of an interval must be finite numbers"
    if low > high:
        return f"the interval ends before it begins; give interval({high},{low})"
    if tags and low <= 0:
        return f"a logarithmic scale must begin above 0, not at {low}; raise it or leave out tag"
    return ""


@dataclass(frozen=True)
class Start:
    """How a search was started, as far as the commands that it prints must repeat it.

    Attributes:
        options: options that choose the configuration file and its folder, and overrides of
            Hydra's search path; such as ["--config-dir", "/my_conf", "--config-name", "mine"].
        launcher: overrides of the launcher, such as ["hydra/launcher=slurm"].
        has_launcher: whether the command line or the file has chosen or set a launcher.
        has_file: whether a configuration file was chosen. It may hold a sweeper or hydra.mode.
    """

    options: Sequence[str] = ()
    launcher: Sequence[str] = ()
    has_launcher: bool = False
    has_file: bool = False

    @classmethod
    def of(cls, config: DictConfig) -> "Start":
        """Return the start of the search with this configuration, as Hydra composes it."""
        hydra = config.hydra
        options = []
        for source in hydra.runtime.config_sources:
            if source.provider == "command-line":
                options += ["--config-dir", source.path]
            elif source.provider == "main" and Path(source.path) != conf_folder():
                options += ["--config-path", source.path]
        has_file = hydra.job.config_name != "config"
        if has_file:
            options += ["--config-name", hydra.job.config_name]
        words = [(word.lstrip("+~"), word) for word in hydra.overrides.hydra]
        options += [word for key, word in words if key.startswith("hydra.searchpath=")]
        launcher = [
            word for key, word in words if key.startswith(("hydra/launcher=", "hydra.launcher."))
        ]
        is_chosen = hydra.runtime.choices["hydra/launcher"] != DEFAULT_LAUNCHER
        return cls(options, launcher, bool(launcher) or is_chosen, has_file)

    def command(self, words: Sequence[str], *, of_several: bool = False) -> str:
        """Return the shell command that trains the jobs of these overrides.

        Args:
            words: overrides.
            of_several: whether the overrides describe several jobs. A single job is trained by this
                process unless the search had a launcher.
        """
        start = [*TRAIN]
        if of_several or self.has_launcher:
            start += ["-m", *self.options, *self.launcher]
            if self.has_file:
                start.append("hydra/sweeper=grid")
        else:
            start += self.options
            if self.has_file:
                start.append("hydra.mode=RUN")
        return shlex.join([*start, *words])


@dataclass
class Search:
    """Search for the best settings of a sweep, which Optuna's sampler TPE proposes.

    Call `open` before the other methods. A trial is a job that Optuna proposes.

    Attributes:
        folder: folder of the sweep, which holds the database; None to keep nothing, for a plan.
        objective: what is compared, a key of `OBJECTIVES`, such as "best/top1".
        fixed: overrides that all jobs have, as `split_words` returns them.
        varied: the overrides with several values, by key, as `split_words` returns them.
        n_trials: number of trials, at least 1.
        n_jobs: number of trials in a batch, at least 1. They are proposed and trained together.
        seed: seed of the proposals.
        start: how the search was started, for the commands that it prints.
    """

    folder: Path | None
    objective: str
    fixed: Sequence[str]
    varied: Mapping[str, Override]
    n_trials: int
    n_jobs: int
    seed: int
    start: Start = field(default_factory=Start)

    _study: Any = field(default=None, init=False)
    _space: dict[str, Any] = field(default_factory=dict, init=False)
    _failed: set[int] = field(default_factory=set, init=False)  # trials that failed in this process

    def open(self) -> None:
        """Open Optuna's study (the list of trials) in the folder's database, or begin a new one.

        Raises:
            ValueError: If Optuna is not installed, if the objective or a range is not valid, if the
                folder cannot hold the database, if the database is damaged or locked, or if the
                study there had another objective or other overrides.
        """
        try:
            import optuna
        except ImportError:
            raise ValueError(INSTALL) from None

        if self.objective not in OBJECTIVES:
            raise ValueError(cfg.unknown_objective(self.objective, list(OBJECTIVES)))
        self._space = {key: _distribution(one) for key, one in self.varied.items()}
        storage = None
        if self.folder is not None:
            if "?" in str(self.folder):
                raise ValueError(f"{self.folder} holds a '?', which no address of SQLite can hold")
            self.folder.mkdir(parents=True, exist_ok=True)
            storage = f"sqlite:///{self.folder / DATABASE}"
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        _, larger_is_better = OBJECTIVES[self.objective]
        with self._database():
            self._study = optuna.create_study(
                storage=storage,
                study_name="search",
                direction="maximize" if larger_is_better else "minimize",
                load_if_exists=True,
            )
            self._refuse_other_settings()

    def _refuse_other_settings(self) -> None:
        """Raise ValueError if the study began with another objective or other overrides.

        A new study keeps the objective and the overrides of this search.
        """
        earlier = self._study.user_attrs.get("objective", self.objective)
        if earlier != self.objective:
            raise ValueError(
                f"objective={self.objective} differs from the objective that this search began "
                f"with ({earlier}); keep it, or give the search another sweep.name"
            )
        words = {one for one in self.fixed if not one.lstrip("+~").startswith(NOT_COMPARED)}
        words |= {str(one.input_line) for one in self.varied.values()}
        kept = set(self._study.user_attrs.get("overrides", words))
        if kept != words:
            now = " ".join(sorted(words - kept)) or "nothing"
            before = " ".join(sorted(kept - words)) or "nothing"
            raise ValueError(
                f"{now} differs from what this search began with ({before}); keep it, or give the "
                "search another sweep.name"
            )
        self._study.set_user_attr("objective", self.objective)
        self._study.set_user_attr("overrides", sorted(words))

    @contextmanager
    def _database(self) -> Iterator[None]:
        """Turn an error of the database in the body of `with` into a ValueError of one line."""
        from optuna.exceptions import StorageInternalError
        from sqlalchemy.exc import SQLAlchemyError

        try:
            yield
        except (SQLAlchemyError, StorageInternalError) as error:
            assert self.folder is not None
            cause = error.__cause__ or error
            reason = str(getattr(cause, "orig", cause)).partition("\n")[0]
            raise ValueError(
                f"{self.folder / DATABASE} cannot be used ({reason}); if another process holds it, "
                "wait for that process; if it is damaged, delete it, or give the search another "
                "sweep.name"
            ) from error

    @property
    def has_begun(self) -> bool:
        """Return whether at least one trial has been judged."""
        return self._study is not None and any(
            trial.state.is_finished() for trial in self._study.trials
        )

    def next_batch(self) -> list[tuple[int, list[str]]]:
        """Return the trials to train next, as (number, overrides); [] after the last trial.

        The overrides are those that vary. Trials that an earlier process has proposed but not
        judged come again, and so do trials that failed in an earlier process. A batch begins at a
        multiple of `n_jobs`, and each proposal is drawn with a seed of its own. An interrupted
        search thus proposes the same trials as an undisturbed one.
        """
        from optuna.samplers import TPESampler

        trials = self._study.get_trials(deepcopy=False)
        failed = self._study.user_attrs.get("failed", [])
        unjudged = [one.number for one in trials if not one.state.is_finished()]
        number = next((one for one in unjudged if one not in failed), len(trials))
        end = min(self.n_trials, (number // self.n_jobs + 1) * self.n_jobs)
        for number in range(len(trials), end):
            # With constant_liar, the sampler takes trials that are not judged yet for bad ones, so
            # that the proposals of a batch differ.
            self._study.sampler = TPESampler(seed=1000 * self.seed + number, constant_liar=True)
            self._study.ask(fixed_distributions=self._space)
        return [
            (trial.number, _words(trial.params))
            for trial in self._study.get_trials(deepcopy=False)
            if not trial.state.is_finished() and trial.number not in self._failed
        ]

    def _extremes(self) -> list[list[str]]:
        """Return varied overrides with each end of each interval, and with each choice."""
        values = {
            key: getattr(one, "choices", None) or (one.low, one.high)
            for key, one in self._space.items()
        }
        first = {key: ends[0] for key, ends in values.items()}
        others = [{**first, key: value} for key, ends in values.items() for value in ends[1:]]
        return [_words(params) for params in (first, *others)]

    def judge(self, number: int, job: Config, result: Mapping[str, Any]) -> None:
        """Tell Optuna how a trial has ended, and its value if the trial has one.

        A failed trial stays without a judgement, so that the next process tries it again.

        Args:
            number: number of the trial.
            job: configuration of the trial's job.
            result: content of the job's result.json, with a status other than RUNNING.
        """
        from optuna.trial import TrialState

        if result["status"] == FAILED:
            self._failed.add(number)
            failed = self._failed.union(self._study.user_attrs.get("failed", []))
            self._study.set_user_attr("failed", sorted(failed))
            return
        state = TrialState.PRUNED if result["status"] == PRUNED else None
        self._study.tell(number, objective_of(job, result), state=state)

    def trials(self) -> list[list[str]]:
        """Return the varied overrides of all trials, in the order of their numbers."""
        return [_words(trial.params) for trial in self._study.get_trials(deepcopy=False)]

    def best(self) -> tuple[int, float, list[str]] | None:
        """Return (number, value, varied overrides) of the best trial; None if none has a value.

        The value is that of the objective, an accuracy in percent or a loss.
        """
        with suppress(ValueError):
            trial = self._study.best_trial
            assert trial.value is not None
            return trial.number, trial.value, _words(trial.params)
        return None

    def run(
        self,
        compose: Callable[[list[list[str]]], list[Config]],
        launch: Callable[[list[list[str]]], object],
    ) -> None:
        """Train and judge batches until the last trial; then print all trials and the best one.

        Args:
            compose: function that returns the job for each list of overrides in a list.
            launch: function that trains the job for each list of overrides in a list. The function
                may raise SystemExit with code 1 if a job failed.

        Raises:
            SystemExit: With code 1 if a trial failed, and as `launch` raises it.
            ValueError: If the database is damaged or locked.
            Exception: As `compose` and `launch` raise it.
        """
        # A value that no job may have must not end the search after hours.
        compose([[*self.fixed, *words] for words in self._extremes()])
        is_told = False
        while True:
            with self._database():
                batch = self.next_batch()
            if not batch:
                break
            overrides = [[*self.fixed, *words] for _, words in batch]
            jobs = compose(overrides)
            if not is_told:
                _tell_if_not_held_out(jobs[0])
                is_told = True
            if jobs[0].sweep.plan:
                write_line(self._plan_line(jobs))
            try:
                launch(overrides)
            except SystemExit as ended:
                if ended.code != 1 or any(_has_no_end(job) for job in jobs):
                    raise
            with self._database():
                for (number, _), job in zip(batch, jobs, strict=True):
                    self.judge(number, job, result_of(job))
            self._log_progress()
        self._report(compose([[*self.fixed, *words] for words in self.trials()]))

    def _plan_line(self, jobs: Sequence[Config]) -> str:
        """Return a line that says how the first batch of a search relates to all of its trials."""
        return (
            f"search: {counted(self.n_trials, 'trial')} in all, {self.n_jobs} at a time; the plan "
            f"is that of the first batch of {len(jobs)}, and others follow from its results"
        )

    def _log_progress(self) -> None:
        best = self.best()
        value = f"best {self.objective} {best[1]:.6g}" if best else "none has a value yet"
        log.info("%d of %s: %s", len(self._study.trials), counted(self.n_trials, "trial"), value)

    def _report(self, jobs: Sequence[Config]) -> None:
        """Print a table of all trials, the best trial, and the command that runs it again.

        If the trials held out images for validation, print the command of the final training, too.
        """
        code: Any = 0
        try:
            outcomes(jobs, [result_of(job) for job in jobs], searched=self.varied)
        except SystemExit as ended:
            code = ended.code
        if best := self.best():
            number, value, words = best
            write_line(
                f"best of {counted(len(jobs), 'trial')}: trial {number} with {self.objective} "
                f"{value:.6g}: "
                f"{' '.join(words)}"
            )
            kept = [word for word in self.fixed if not word.lstrip("+").startswith("sweep.")]
            if not any(word.startswith("home=") for word in kept):
                kept.append(f"home={jobs[0].home}")
            write_line(f"to run it again: {self.start.command([*kept, *words])}")
            if jobs[number].dataset.val_fraction:
                final = _final_words([*kept, *words], jobs)
                command = self.start.command(final, of_several=True)
                write_line(f"to train it on all training images, with new seeds: {command}")
        else:
            write_line(f"none of {counted(len(jobs), 'trial')} has a value")
        if code:
            sys.exit(code)


def _final_words(words: Sequence[str], jobs: Sequence[Config]) -> list[str]:
    """Return the overrides that train a trial on all training images, with three new seeds.

    Args:
        words: overrides of the trial.
        jobs: jobs of all trials, whose seeds are not taken again.
    """
    chosen = [word for word in words if not word.lstrip("+").startswith(NOT_IN_FINAL)]
    first = max(job.seed for job in jobs) + 1
    seeds = ",".join(str(first + more) for more in range(FINAL_SEEDS))
    return [*chosen, f"seed={seeds}"]


def _words(params: Mapping[str, Any]) -> list[str]:
    return [f"{key}={value}" for key, value in params.items()]


def _has_no_end(job: Config) -> bool:
    return result_of(job)["status"] not in (FINISHED, FAILED, PRUNED)
