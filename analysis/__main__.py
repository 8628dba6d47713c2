"""Run the command line of the analysis, `python -m analysis`.

`python -m analysis NAME` writes the tables, figures and report of a sweep. Other commands count the
published numbers that have runs, print the text of docs/evidence.md and import logs. Modules that
are slow to import are imported only by the commands that need them.
"""

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .names import counted

if TYPE_CHECKING:
    from .cells import Table
    from .runs import Runs

__all__ = ["main"]

FORMATS = ("md", "tex", "html", "csv")
TESTS = ("pooled", "paired")
LONGEST = 200  # largest number of lines of the tables that are printed
STOPPED = 130  # exit status after Ctrl-C, as of the other commands
SHOWN = 20  # largest number of unfinished runs that are listed one by one
# `analysis` in a checkout, `sddlskd.analysis` in a wheel.
COMMAND = f"python -m {__package__}"
USAGE = """
  %(prog)s                        list the sweeps and experiments
  %(prog)s NAME [options]         write each table and figure that has runs, runs.csv, report.html
  %(prog)s NAME imported          the same, with the imported numbers beside the runs of NAME
  %(prog)s coverage [options]     count the published numbers that have a recipe, a run, a verdict
  %(prog)s evidence               write what the papers' own logs and numbers say as Markdown
  %(prog)s import-logs PATH ...   import text logs and CSV files of other projects as runs"""
METRIC = """best: best epoch on the test set, as the papers report; last: last epoch;
val: test accuracy at the best epoch of a held-out split (dataset.val_fraction>0); mAP: of several
labels per image. Default: best"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command of `python -m analysis`, and return the exit status.

    The status is 0, 1 after an error, or 130 after Ctrl-C.

    Depending on `arguments`, the command writes the tables, figures and report of runs in MLflow,
    lists what MLflow holds, compares published numbers with runs or logs, or imports logs. A
    ValueError or OSError of the command is not raised: its message goes to stderr, and the status
    is 1.

    Args:
        arguments: command and options, such as ["coverage", "--home", "runs"]; None takes those in
            `sys.argv`.

    Raises:
        SystemExit: If the options ask for help (status 0), or if argparse refuses them (status 2).
    """
    if arguments is None:
        arguments = sys.argv[1:]
    given = list(arguments)
    try:
        if given[:1] == ["import-logs"]:
            _import_logs(given[1:])
        elif given[:1] == ["coverage"]:
            _coverage(given[1:])
        elif given[:1] == ["evidence"]:
            _evidence(given[1:])
        else:
            _analyse(given)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("stopped\n")
        return STOPPED
    return 0


def _analyse(given: Sequence[str]) -> None:
    chosen = _parse(_parser(), given)
    formats = chosen.format.split(",")
    if unknown := [name for name in formats if name not in FORMATS]:
        raise ValueError(
            f"--format {','.join(unknown)} is not valid; choose from {','.join(FORMATS)}"
        )
    uri = _uri(chosen)
    for name in chosen.names or [None]:
        _refuse_if_elsewhere(name, uri)
    if not chosen.names:
        _list(uri)
        return
    _say(f"reading {' and '.join(chosen.names)} from {uri}")
    _tell_what_is_read(uri)
    from .runs import load

    runs = load(chosen.names, uri, mixed_epochs=chosen.mixed_epochs)
    _say(f"{counted(len(runs.frame), 'run')}: {_by_status(runs)}")
    _write(runs, chosen, formats)
    _say_what_is_missing(runs)


def _parser() -> argparse.ArgumentParser:
    """Return the parser of the command without a name of its own, which analyses runs."""
    parser = argparse.ArgumentParser(
        COMMAND, USAGE, "Write the papers' tables, figures and a report from MLflow."
    )
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="a sweep or an MLflow experiment; the runs of several names stand in the same tables",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("results"), help="folder to write to. Default: results"
    )
    _add_store(parser)
    parser.add_argument(
        "--metric", choices=("best", "last", "val", "mAP"), default="best", help=METRIC
    )
    parser.add_argument(
        "--mixed-epochs",
        action="store_true",
        help="combine runs that differ in their number of epochs",
    )
    parser.add_argument(
        "--test",
        choices=TESTS,
        default=TESTS[0],
        help="test of the gains: pooled takes the variance that all methods of a pair have in "
        "common, or pairs the runs by seed if Bartlett's test refuses that; paired always pairs "
        "them. Default: %(default)s",
    )
    parser.add_argument(
        "--margin",
        type=float,
        default=0.3,
        help="largest gain, in points of accuracy, that counts as none (verdict: equivalent). "
        "Default: %(default)s",
    )
    parser.add_argument(
        "--baseline",
        default="",
        metavar="METHOD",
        help="method that all others are compared with, such as kd, sd_kd_ls or a loss of your "
        "own. Default: a method without its trick (SD-, +LS, +CRD), and for plain methods the "
        "student alone, or KD if there is none",
    )
    parser.add_argument(
        "--format", default=",".join(FORMATS), help="formats of the tables. Default: %(default)s"
    )
    return parser


def _parse(parser: argparse.ArgumentParser, given: Sequence[str]) -> argparse.Namespace:
    """Return the arguments; refuse home=FOLDER, the form of other commands, by the right form."""
    options = parser._option_string_actions
    for before, word in zip(["", *given], given, strict=False):
        key, assigns, value = word.partition("=")
        option = f"--{key.replace('_', '-')}"
        if assigns and option in options and before not in options:
            parser.error(f"{key}= is unknown; did you mean {option} {shlex.quote(value)}?")
    return parser.parse_intermixed_args(given)  # `NAME --out FOLDER NAME`, too


def _write(runs: "Runs", chosen: argparse.Namespace, formats: Sequence[str]) -> None:
    from . import figures, render, report, tables
    from .schema import runs_of
    from .selection import GainOptions, refuse_absent

    out, metric = chosen.out, chosen.metric
    refuse_absent(metric, runs_of(runs.frame))
    options = GainOptions(chosen.test, chosen.margin, chosen.baseline)
    (out / "tables").mkdir(parents=True, exist_ok=True)
    _tell("computing the tables and their tests")
    built = tables.build(
        runs.frame, metric=metric, sweep=runs.name, command=runs.command, options=options
    )
    for table in built:
        for suffix in formats:
            text = render.FORMATS[suffix](table)
            (out / "tables" / f"{table.name}.{suffix}").write_text(text, encoding="utf-8")
        endings = formats[0] if len(formats) == 1 else f"{{{','.join(formats)}}}"
        _say(f"wrote {out / 'tables' / table.name}.{endings}: {table.title}")
    if not built:
        _say("no table written: there are no runs for any table")
    _tell("drawing the figures")
    drawn = figures.build(
        runs, out / "figures", metric=metric, test=chosen.test, baseline=chosen.baseline
    )
    for figure in drawn:
        _say(f"wrote {out / 'figures' / figure.name}.{{png,svg}}: {figure.title}")
    runs.frame.to_csv(out / "runs.csv", index=False)
    _say(f"wrote {out / 'runs.csv'}: one row per run")
    _tell("writing the report")
    report.write(out / "report.html", runs, built, drawn, metric=metric)
    _say(
        f"wrote {out / 'report.html'}: "
        f"{counted(len(built), 'table')}, {counted(len(drawn), 'figure')}, "
        f"{counted(len(runs.frame), 'run')}"
    )
    _show(built, out)


def _show(built: "Sequence[Table]", out: Path) -> None:
    """Print the tables, as far as they fit into `LONGEST` lines, and say where the others are."""
    from .render import text

    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    printed, left = 0, LONGEST
    for table in built:
        lines = text(table, width).splitlines()
        if len(lines) <= left:
            _say("\n".join(["", *lines, ""]))
            printed, left = printed + 1, left - len(lines)
    if printed < len(built):
        rest = counted(len(built) - printed, "more table")
        _say(f"not printed: {rest}; open {out / 'report.html'}")


def _say_what_is_missing(runs: "Runs") -> None:
    """Print the runs that are not finished, with the command of the sweep, which finishes them.

    If that is not known, each run has its own command.

    Superseded runs (replaced by a later run of the job) and runs that halving dropped are not
    printed. Nothing is printed if all other runs are finished.
    """
    from .schema import runs_of

    standing = [run for run in runs_of(runs.frame) if not run.superseded]
    open_runs = [run for run in standing if run.status not in ("FINISHED", "PRUNED")]
    if not open_runs:
        return
    _say(f"not finished: {len(open_runs)} of {counted(len(standing), 'run')}:")
    for run in open_runs[:SHOWN]:
        reason = f" ({run.reason})" if run.reason else ""
        _say(f"  {run.status.lower()}: {run.name}{reason}")
        # One command runs them all, if it is known.
        if run.command and run.status != "RUNNING" and not runs.command:
            _say(f"    {run.command}")
    if len(open_runs) > SHOWN:
        _say(f"  and {len(open_runs) - SHOWN} more; report.html has them all")
    if runs.command:
        _say(f"to finish them: {runs.command}")


def _by_status(runs: "Runs") -> str:
    standing = runs.frame[~runs.frame["superseded"]]
    counts = [
        f"{count} {status.lower()}" for status, count in standing["status"].value_counts().items()
    ]
    superseded = len(runs.frame) - len(standing)
    if superseded:
        counts.append(f"{superseded} superseded")
    return ", ".join(counts)


def _list(uri: str) -> None:
    _tell_what_is_read(uri)
    from .runs import listing
    from .store import MAKE_RUNS

    found = listing(uri)
    if len(found):
        _say(found.rename(columns=str.lower).to_string(index=False))
    if found["runs"].sum():
        _say(f"{COMMAND} NAME writes the tables, figures and report of one of them")
    else:
        _say(f"there are no runs at {uri}; {MAKE_RUNS}")


def _coverage(given: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        f"{COMMAND} coverage",
        description="Count, for each table of the papers, the numbers that have a recipe, a run "
        "and a verdict, and name those without a recipe.",
    )
    _add_store(parser)
    chosen = _parse(parser, given)
    from .coverage import cover, lines
    from .runs import load
    from .store import sqlite_file
    from .tables import build

    uri = _uri(chosen)
    database = sqlite_file(uri)
    built = []
    if database and not database.exists() and not (chosen.uri or chosen.home):
        _say(f"there is no {database}, so no runs are counted")
    else:
        _tell_what_is_read(uri)
        built = build(load(None, uri, mixed_epochs=True).frame)
    for line in lines(cover(built)):
        _say(line)


def _evidence(given: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        f"{COMMAND} evidence",
        description="Write Markdown on how the papers' numbers and the authors' own logs agree.",
    )
    parser.parse_args(given)
    from .evidence import lines

    for line in lines():
        _say(line)


def _import_logs(given: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        f"{COMMAND} import-logs",
        description="Import results of other projects as runs, marked source=imported.",
    )
    parser.add_argument(
        "paths", nargs="+", type=Path, metavar="PATH", help="log files, or folders of log files"
    )
    _add_store(parser)
    parser.add_argument(
        "--experiment", default="imported", help="MLflow experiment. Default: imported"
    )
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="PARAM=VALUE",
        help="params that the logs do not state, such as teacher=resnet32x4 (docs/import.md)",
    )
    parser.add_argument(
        "--remove",
        action="store_true",
        help="remove the runs that were imported from PATH, in place of importing it",
    )
    chosen = _parse(parser, given)
    if wrong := [text for text in chosen.set if "=" not in text]:
        raise ValueError(
            f"--set {wrong[0]} is not valid; give PARAM=VALUE, such as teacher.name=resnet32x4"
        )
    from .import_logs import import_logs, remove_imports
    from .schema import PARAMS

    uri = _uri(chosen)
    if chosen.remove:
        removed = remove_imports(chosen.paths, uri, chosen.experiment, say=_say)
        _say(f"{counted(len(removed), 'run')} removed from experiment {chosen.experiment} at {uri}")
        return
    texts: dict[str, str] = dict(text.split("=", 1) for text in chosen.set)
    given_params = {PARAMS.get(key, key): value for key, value in texts.items()}
    run_ids = import_logs(chosen.paths, uri, chosen.experiment, given_params, say=_say)
    _say(f"{counted(len(run_ids), 'new run')} in experiment {chosen.experiment} at {uri}")
    _say(f"{COMMAND} NAME {chosen.experiment} shows them beside the runs of the sweep NAME")


def _add_store(parser: argparse.ArgumentParser) -> None:
    store = parser.add_mutually_exclusive_group()
    store.add_argument("--uri", help="MLflow server or sqlite:////absolute/path/mlflow.db")
    neither = "By default: MLFLOW_TRACKING_URI, or mlflow.db in SDDLSKD_HOME or the current folder"
    store.add_argument("--home", type=Path, help=f"folder that holds mlflow.db. {neither}")


def _uri(chosen: argparse.Namespace) -> str:
    from .store import sqlite_uri

    server = None if chosen.home else os.environ.get("MLFLOW_TRACKING_URI")
    home = chosen.home or os.environ.get("SDDLSKD_HOME", ".")
    return chosen.uri or server or sqlite_uri(f"{os.path.abspath(home)}/mlflow.db")


def _refuse_if_elsewhere(name: str | None, uri: str) -> None:
    """Raise ValueError if a folder beside the MLflow database has the runs, and not the database.

    `name` is the name of a sweep or experiment; None for any runs. `uri` is the address of the
    store.
    """
    from .store import holds, sqlite_file

    database = sqlite_file(uri)
    if database is None or holds(database, name) is not False:
        return
    for other in sorted(database.parent.glob("*/mlflow.db")):
        if holds(other, name):
            folder = other.parent
            if folder.is_relative_to(Path.cwd()):
                folder = folder.relative_to(Path.cwd())
            wanted = f" of {name}" if name else ""
            raise ValueError(
                f"{database} has no runs{wanted}, but the folder {folder} has: "
                f"give --home {shlex.quote(str(folder))}"
            )


def _tell_what_is_read(uri: str) -> None:
    """Print to stderr how many runs are searched, and where: loading MLflow alone takes seconds.

    Print nothing if the store is a file that cannot be read, because an error follows at once.
    """
    from .store import count_runs, sqlite_file

    database = sqlite_file(uri)
    if database is None:
        _tell(f"loading MLflow, to search the runs at {uri}")
    elif (count := count_runs(database)) is not None:
        _tell(f"loading MLflow, to search {counted(count, 'run')} at {uri}")


def _tell(line: str) -> None:
    """Print a line on the progress to stderr; stdout has the results alone."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def _say(line: str) -> None:
    """Print a line of the results; drop it if the reader of a pipe has gone, as in `... | head`."""
    try:
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()
    except BrokenPipeError:
        # Python would report an error when it flushes the rest at its end.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


if __name__ == "__main__":
    sys.exit(main())
