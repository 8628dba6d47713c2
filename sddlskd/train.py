"""Compose and check the job of a command line, then train it: `python -m sddlskd.train`.

Heavy modules are imported only when a job runs, so that --help, --cfg and planning stay fast.
"""

import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from sddlskd import config as cfg
from sddlskd.config import Rerun
from sddlskd.processes.exit_codes import ExitCode
from sddlskd.processes.interrupts import ignore_interrupts
from sddlskd.terminal.arguments import other_form
from sddlskd.terminal.choices import choices
from sddlskd.terminal.console import (
    explain,
    log_to_terminal,
    outcomes,
    refuse_another_checkout,
)

__all__ = ["main"]

# Errors that a user can fix. OverflowError comes from a number with hundreds of digits.
ERRORS = (HydraException, OmegaConfBaseException, ValueError, OSError, OverflowError, YAMLError)
# Keys that the config.yaml of a run has, and hardly another file without defaults
OF_A_RUN = {"home", "run_dir", "student", "dataset", "trainer"}
HELP = re.compile(r"-[a-z]*h[a-z]*|--h.*")  # what argparse takes for --help


def _choices() -> str:
    """Return the choices of each group if the command line asks for help, else "".

    Hydra fills in its help text each time that it composes a job, and to read the choices takes as
    long as to compose one.
    """
    if any(map(HELP.fullmatch, sys.argv[1:])):
        return choices()
    return ""


cfg.frame()
OmegaConf.register_new_resolver("choices", _choices, replace=True)  # for conf/hydra/help


class _Refused(SystemExit):
    """Exception that carries a job's error, its cause, through Hydra.

    Hydra adds its own lines to the message of an Exception, but not to that of a SystemExit.
    """


@hydra.main(version_base="1.3", config_path=str(cfg.conf_folder()), config_name="config")
def _run_job(composed: DictConfig) -> float | None:
    hydra_config = HydraConfig.get()
    # Only a file can have set hydra.run.dir: `_mend_arguments` renames it on the command line.
    if hydra_config.mode is RunMode.RUN and hydra_config.run.dir != ".":
        composed.run_dir = hydra_config.run.dir
    try:
        cfg.check_choices(hydra_config.overrides.task)
        job = cfg.resolve(composed)
        _check_single(job)
        from sddlskd.sweeps.search import objective_of

        result = _fit(job)
    except ERRORS as error:
        raise _Refused from error
    outcomes([job], [result])
    return objective_of(job, result)  # for sweepers of Hydra that search


def _check_single(job: cfg.Config) -> None:
    """Raise ValueError if a job that is run by itself has a setting that only a sweep can have."""
    if job.sweep.plan:
        raise ValueError(
            "sweep.plan=true requires a sweep; put -m before the overrides: "
            "-m sweep.plan=true seed=0,1"
        )
    if job.sweep.rerun is not Rerun.failed:
        raise ValueError(
            f"sweep.rerun={job.sweep.rerun} requires a sweep; put -m before the overrides, "
            f"or delete {job.run_dir} to run this job again"
        )
    if job.sweep.seeds is not None:
        raise ValueError(
            "sweep.seeds=until_decided requires a sweep with one of the launchers of sddlskd; "
            "put -m before the overrides: -m sweep.seeds=until_decided recipe=kd,kd_ls"
        )
    if job.sweep.halving:
        raise ValueError(
            f"sweep.halving={job.sweep.halving} requires a sweep with one of the launchers of "
            "sddlskd; put -m before the overrides: -m sweep.halving=[1,2,4] M=[1],[1,2,4]"
        )


def _fit(job: cfg.Config) -> dict[str, Any]:
    """Train the student of a job, and return the content of its result.json.

    If Ctrl-C comes after the run is FINISHED, it is ignored from then on.

    Raises:
        KeyboardInterrupt: If Ctrl-C comes earlier, and there is nothing to save.
        Exception: As `fit` raises it.
    """
    if sys.stderr.isatty():  # a busy machine takes half a minute to import PyTorch
        sys.stderr.write("loading PyTorch ...\n")
    from sddlskd.record import FINISHED, read_result
    from sddlskd.training.fit import fit

    try:
        (result,) = fit([job])
    except KeyboardInterrupt:
        result = read_result(Path(job.run_dir))
        if result.get("status") != FINISHED:
            raise
    if result["status"] == FINISHED:
        ignore_interrupts()
    return result


def _mend_arguments() -> None:
    """Change the words of sys.argv that argparse and Hydra do not take well, or refuse them.

    These words change:

    - -m moves to the front, because argparse fails on it after the overrides;
    - hydra.run.dir becomes run_dir, because Hydra makes that folder before a job is checked;
    - a list of teachers is spelled out (`config.with_each_teacher`), because Hydra merges them.

    These end with a message and exit code 1: an option in place of a key, such as --home; a file
    that `_wrong_file` names; a teacher that is named twice; scales=1,2; a number that has more
    digits than Python reads.
    """
    words = sys.argv[1:]
    if wrong := other_form(get_args_parser(), words):
        _refuse(wrong)
    if wrong := _wrong_file(words):
        _refuse(wrong)
    flags = [word for word in words if word in ("-m", "--multirun")]
    words = [word for word in words if word not in flags]
    if not flags:
        words = [re.sub(r"^hydra\.run\.dir=", "run_dir=", word) for word in words]
    try:
        words = cfg.with_each_teacher(words)
    except ValueError as error:
        _refuse(str(error))
    sys.argv[1:] = flags + words
    for word in words:
        if re.search(rf"\d{{{sys.get_int_max_str_digits() + 1}}}", word):
            _refuse(f"{word.partition('=')[0]} is too large for a number; give a smaller one")
        if match := re.fullmatch(r"scales=\[?([\d, ]+)\]?", word):
            _refuse(f"{word} is not a choice; give M=[{match[1]}], or scales=global|two|three|skip")


def _wrong_file(words: Sequence[str]) -> str:
    """Return what is wrong with the file that --config-dir and --config-name name, or "".

    These are wrong:

    - a folder --config-dir that does not exist;
    - the config.yaml of a run: it lacks the settings of Hydra, so a run with it would be recorded
      elsewhere;
    - a file of --config-dir that has the name of one of this package: it has no effect;
    - a file without defaults: it has none of the settings of this package.
    """
    options, _ = get_args_parser().parse_known_args(words)
    name = str(options.config_name or "config").removesuffix(".yaml")
    if options.config_dir and not Path(options.config_dir).is_dir():
        return (
            f"there is no folder {Path(options.config_dir).absolute()}, which -cd names; start "
            "from the folder that holds it, or give its full path"
        )
    for folder in filter(None, (options.config_path, options.config_dir)):
        # --config-path is relative to this file; --config-dir is relative to the current folder.
        start = Path(__file__).parent if folder == options.config_path else Path()
        file = start / folder / f"{name}.yaml"
        keys = _keys_of(file)
        if keys >= OF_A_RUN and "defaults" not in keys:
            run = file.parent if file.name == "config.yaml" else file
            return (
                f"{file} is the configuration of a run, which train does not take; "
                f"`sddlskd repeat {shlex.quote(str(run))}` prints the command that repeats the run"
            )
        ours = cfg.conf_folder() / f"{name}.yaml"
        is_hidden = folder != options.config_path and not options.config_path and ours.is_file()
        if is_hidden and options.config_name and file.is_file():
            return f"-cn {name} names a file of this package, not {file}; rename that file"
        if options.config_name and keys and "defaults" not in keys:
            return (
                f"{file} has no defaults, and so none of the settings of this package; begin it "
                "with the line `defaults: [config, _self_]`"
            )
    return ""


def _keys_of(file: Path) -> set[str]:
    """Return the keys of a YAML file; an empty set if it cannot be read or has none."""
    try:
        return set(map(str, OmegaConf.load(file)))
    except (OSError, ValueError, YAMLError):
        return set()  # there is no file, or Hydra says what is wrong with it


def _refuse(reason: str) -> NoReturn:
    """Write an error message to stderr, and exit with code 1."""
    sys.stderr.write(f"error: {reason}\n")
    sys.exit(1)


def main() -> None:
    """Train the job, or run the sweep, that the command line (`sys.argv`) describes.

    An error that a user can fix becomes a message of one line and exit code 1. If the environment
    has HYDRA_FULL_ERROR=1, the error is raised instead.

    Raises:
        SystemExit: With code 1 after such a message, or if a run failed. With code 130
            (`ExitCode.STOPPED`) if a signal stopped the training. After printing the plan of a
            sweep, with code 1 if a job is invalid or the sweep would be refused, else with 0.
    """
    log_to_terminal()
    refuse_another_checkout()
    _mend_arguments()
    traceback_wanted = os.environ.get("HYDRA_FULL_ERROR") == "1"
    # Hydra then raises its errors, and only this function prints them.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    failed: BaseException | None = None
    try:
        _run_job()
    except KeyboardInterrupt:
        sys.stderr.write("stopped; the same command continues where it stopped\n")
        sys.exit(ExitCode.STOPPED)
    except _Refused as refused:
        failed = refused.__cause__
    except ERRORS as error:
        failed = error
    finally:
        os.environ["HYDRA_FULL_ERROR"] = "1" if traceback_wanted else "0"
    if failed is not None:
        if traceback_wanted:
            raise failed
        _refuse(explain(failed))


if __name__ == "__main__":
    main()
