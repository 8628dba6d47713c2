"""Import the logs of other projects as runs in MLflow, so that the tables show them beside ours.

Imported runs have the tag source=imported. The content of a file tells its format:
- worklog: worklog.txt of mdistiller and of projects built on it (SDD, LSKD). An epoch is a block
  between dashed lines; the line `best_acc` ends the log. The learning rate is printed with two
  decimals: 0.025 reads 0.03. A rate that reads 0.00 is not imported. A resumed training may log
  epochs again, or append to an incomplete block. The later epoch is then imported, with a note.
- CTKD: one JSON object per epoch, without a separator (`}{`).
- tiny-transformers: lines `json_stats: {...}`; top-1 is 100 - top1_err.
- CSV: one row per run; docs/import.md lists the columns.

A text log states neither networks nor method. They are read from the name of its file or folder.
Params that the caller gives take precedence over the name. The authors write names in these forms:
- `kd,res32x4,res8x4`: method, teacher, student. The run counts as not standardised, although LSKD's
  own code names standardised runs in this form too. Give `standardize=true` for such runs.
- `dkd,vgg13,vgg8,2,15,2.0`: LSKD, standardised, with temperature, weight and beta.
- `deit-ti_c100_KD_ours_3_10`: LSKD, standardised: student, data set, method, temperature, weight.
  The teacher is resnet56, as in all of LSKD's configurations of transformers.
- `SDD_KD,res32x4_sdd,shuv1_sddM:[1,2,4],SOLVER.LR:0.01`: options of the command line follow. The
  options in log_params.OPTIONS are imported.
The scales of a method with SDD are never guessed: a run that does not state them is refused.
"""

import csv
import difflib
import hashlib
import io
import itertools
import json
import logging
import math
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .coverage import available
from .log_formats import Log, glued_json, json_stats, worklog
from .log_params import (
    LOG_SUFFIXES,
    complete,
    loss_name,
    name_of,
    number_of,
    param,
    params_of_method,
    params_of_name,
    whole_number,
)
from .names import counted
from .runs import PRUNED
from .schema import METRICS, PARAMS
from .store import experiments_of, quoted, reading, search, sqlite_file

__all__ = ["FORMATS", "import_logs", "remove_imports"]

log = logging.getLogger(__name__)

FORMATS = (
    "worklog.txt of mdistiller, SDD and LSKD; CTKD's JSON objects; "
    "tiny-transformers' json_stats lines; "
    "CSV with the columns teacher, student, method, dataset, M, seed, epochs, top1 (docs/import.md)"
)
MAX_BYTES = 64 * 2**20  # 17 times the size of the longest log that LSKD published
ROUNDING = 0.0051  # tolerance for values that logs print with two decimals
NO_ACCURACY = "a finished run needs an accuracy in a column best, top1 or last"
LINES_SAID = 3  # largest number of line numbers in a message
MAX_NOTES = 6  # largest number of notes on what was left out of a run, in its status reason
METRICS_A_BATCH = 1000  # metrics per request; MLflow's limit
STATUS_WORDS = {
    **dict.fromkeys(("", "finished", "complete"), "FINISHED"),
    **dict.fromkeys(("killed", "partial", "running"), "KILLED"),
    **dict.fromkeys(("failed", "crashed"), "FAILED"),
    "pruned": "PRUNED",
}
# Name of a param or metric in MLflow, or of another value, by the name of a column in a CSV file.
CSV_NAMES = {
    **PARAMS,
    **{key: key for key in PARAMS.values()},
    **{key: key for key in METRICS.values()},
    **METRICS,
    **dict.fromkeys(("best_top1", "best_acc", "top1", "accuracy"), "best/top1"),
    **dict.fromkeys(("last_top1", "last_acc"), "last/top1"),
    **{
        "epochs_configured": "trainer.epochs",
        "epochs_logged": "epochs_done",
        "epochs_done": "epochs_done",
    },
    **{name: name for name in ("method", "status", "name")},
}


@dataclass(frozen=True)
class _Import:
    """One run as it is written to MLflow."""

    name: str
    path: Path
    record: str  # hash of the content, by which a second import finds the run
    params: dict[str, str]
    metrics: list[tuple[str, float, int]]  # key, value, epoch
    status: str
    reason: str


def import_logs(
    paths: Sequence[Path],
    uri: str,
    experiment: str = "imported",
    given: Mapping[str, str] | None = None,
    say: Callable[[str], None] = log.info,
) -> list[str]:
    """Import the runs in log files into an MLflow experiment, except those that it has already.

    A text log holds one or more runs. Each row of a CSV file is a run. The experiment has a run
    already if the run was imported from a text log or CSV row with the same content.

    Args:
        paths: log files and folders. Every .txt, .log, .json and .csv file in a folder and its
            subfolders is read.
        uri: MLflow store: `http(s)://host:port` or `sqlite:////absolute/path/mlflow.db`. A missing
            SQLite database is created if there is a run to import.
        experiment: name of the MLflow experiment. A missing experiment is created.
        given: params of every run as texts, keyed by MLflow's names, such as "teacher.name" (the
            values of `schema.PARAMS`). They take precedence over what a file states. None for no
            params.
        say: receives one line of text for each run that is imported or already exists.

    Returns:
        The MLflow ids of the new runs, in the order of import.

    Raises:
        ValueError: In three cases. Before anything is read, if `given` has an unknown key or an
            invalid value. At once, if the store fails, if `experiment` was deleted in MLflow or if
            a sweep has its name; runs that were created before remain. At the end, if a path, a
            file or a row cannot be imported; all others are imported, and the message lists what is
            not, and why.
    """
    fixed = {key: param(key, text) for key, text in (given or {}).items()}
    refused: list[str] = []
    found = _read_all(_files(paths, refused), fixed, refused)
    run_ids: list[str] = []
    records: dict[Path, set[str]] = defaultdict(set)  # of the runs that each file has now
    names: set[str] = set()
    # No database is created if there is nothing to import.
    if (first := next(found, None)) is not None:
        _make_database(uri)
        with reading(uri) as client:
            _refuse_name_of_sweep(client, experiment)
            experiment_id = _experiment(client, uri, experiment)
            for run in itertools.chain([first], found):
                records[run.path].add(run.record)
                names |= {run.params["teacher.name"], run.params["student.name"]}
                if there := _there(client, experiment_id, run.record):
                    say(
                        f"{run.path}: {run.name} is already imported as run {there}; "
                        f"to import it again, first give import-logs --remove {run.path}"
                    )
                    continue
                run_ids.append(_write(client, experiment_id, run))
                say(
                    f"{run.path}: {run.name} is run {run_ids[-1]}, "
                    f"{run.status}{run.reason and f' ({run.reason})'}"
                )
            for path, own in records.items():
                earlier = [
                    run for run in _of_path(client, experiment_id, path) if run[1] not in own
                ]
                if earlier:
                    say(
                        f"{path}: the tables also have {counted(len(earlier), 'run')} of an "
                        "earlier import that this file no longer states; give "
                        f"import-logs --remove {path}, and import it again"
                    )
    for line in _unknown_networks(names):
        say(line)
    if refused:
        raise ValueError(
            "\n".join([f"{len(refused)} not imported, {len(run_ids)} imported:", *refused])
        )
    return run_ids


def remove_imports(
    paths: Sequence[Path],
    uri: str,
    experiment: str = "imported",
    say: Callable[[str], None] = log.info,
) -> list[str]:
    """Delete the runs that were imported from files, and return their MLflow ids.

    MLflow keeps a deleted run until `mlflow gc`, and can restore it.

    Args:
        paths: files, and folders of files, as they were imported. They need not exist any more.
        uri: MLflow store, as in `import_logs`.
        experiment: name of the MLflow experiment.
        say: receives one line of text for each run that is deleted.

    Raises:
        ValueError: If the store fails, or if no run of the experiment was imported from a path.
            Nothing is deleted then.
    """
    with reading(uri) as client:
        found = client.get_experiment_by_name(experiment)
        of_paths: dict[Path, list[tuple[str, str, str]]] = {path: [] for path in paths}
        if found:
            of_paths = {path: _of_path(client, found.experiment_id, path) for path in paths}
        if missing := [str(path) for path, runs in of_paths.items() if not runs]:
            raise ValueError(
                f"experiment {experiment} has no run that was imported from {', '.join(missing)}; "
                "nothing was removed"
            )
        removed: list[str] = []
        for path, runs in of_paths.items():
            for run_id, _, name in runs:
                client.delete_run(run_id)
                say(f"{path}: {name}, run {run_id}, is removed")
                removed.append(run_id)
    return removed


def _of_path(client: Any, experiment_id: str, path: Path) -> list[tuple[str, str, str]]:
    """Return (id, record, name) of each run that was imported from a file or from a folder."""
    imported = search(client, {"": experiment_id}, "tags.source = 'imported'")
    return [
        (run.info.run_id, run.data.tags.get("record", ""), run.info.run_name)
        for run in imported
        if Path(run.data.tags.get("run_dir", "")).is_relative_to(path.absolute())
    ]


def _unknown_networks(names: Iterable[str]) -> Iterator[str]:
    """Yield a warning for each name that is nearly, but not quite, that of a network here."""
    files = available()
    known = {name.removeprefix("imagenet_") for name in [*files["teacher"], *files["student"]]}
    for name in sorted(set(names) - known - {"none"}):
        if close := difflib.get_close_matches(name, known, n=1, cutoff=0.8):
            yield (
                f"warning: {name} is no network of sddlskd; did you mean {close[0]}? "
                "Then mend the file, and give import-logs --remove FILE before you import it again"
            )


# Files


def _files(paths: Iterable[Path], refused: list[str]) -> list[Path]:
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            logs = sorted(
                file
                for file in path.rglob("*")
                if file.suffix.lower() in LOG_SUFFIXES and file.is_file()
            )
            found += logs
            if not logs:
                refused.append(
                    f"{path}: no file in this folder ends in {', '.join(sorted(LOG_SUFFIXES))}; "
                    "name the log files"
                )
        elif path.is_file():
            found.append(path)
        else:
            refused.append(f"{path}: there is no such file")
    return list({file.resolve(): file for file in found}.values())


def _read_all(
    files: Iterable[Path], given: Mapping[str, str], refused: list[str]
) -> Iterator[_Import]:
    for path in files:
        try:
            yield from list(_read(path, given, refused))
        except (ValueError, OSError) as error:
            refused.append(f"{path}: {error}")


def _read(path: Path, given: Mapping[str, str], refused: list[str]) -> Iterable[_Import]:
    if (size := path.stat().st_size) > MAX_BYTES:
        raise ValueError(
            f"{size / 2**20:.0f} MiB exceed the limit of {MAX_BYTES // 2**20} MiB; "
            "keep only the lines of complete epochs"
        )
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"byte {error.start} is not UTF-8; if the file is a log, save it as UTF-8"
        ) from None
    if not text.strip():
        raise ValueError("is empty")
    if text.lstrip().startswith("{") and '"test_acc"' in text:
        logs = glued_json(text)
    elif 'json_stats: {"' in text:
        logs = json_stats(text)
    elif re.search(r"^epoch: ", text, re.MULTILINE) and "test_acc" in text:
        logs = worklog(text)
    elif {"teacher.name", "student.name"} <= set(_header(text)):
        return _rows(path, text, given, refused)
    else:
        raise ValueError(f"has an unknown format; known formats are {FORMATS}")
    return _runs(path, content, logs, given)


def _runs(
    path: Path, content: bytes, logs: Sequence[Log], given: Mapping[str, str]
) -> Iterator[_Import]:
    name, digest = name_of(path), hashlib.sha256(content).hexdigest()
    stated, notes = params_of_name(name, path, given)
    params = {**stated, **given}
    longest = max(
        (each.done for each in logs if not each.torn and each.closed is not False), default=0
    )
    for index, each in enumerate(logs):
        done = each.done
        if not done:
            raise ValueError("has no complete epoch")
        each.notes += notes
        own = complete(params)
        planned = int(params.get("trainer.epochs", 0)) or each.planned
        if not planned:
            planned = done if each.closed else longest
        if planned >= done:
            own["trainer.epochs"] = str(planned)
        elif "trainer.epochs" in params or each.planned:
            raise ValueError(
                f"the log has {counted(done, 'epoch')}, more than the {planned} planned; "
                "give --set trainer.epochs=..."
            )
        if each.lr:
            own.setdefault("optimizer.lr", str(each.lr))
        final = {"best/top1": each.best_top1(), "last/top1": each.epochs[done]["val/top1"]}
        metrics = [
            (key, value, epoch) for epoch, row in each.epochs.items() for key, value in row.items()
        ]
        metrics += [(key, value, done) for key, value in final.items()]
        _require_percent(metrics)
        label = name
        if len(logs) > 1:
            label = f"{name} #{index + 1}"
        yield _Import(label, path, f"{digest}:{index}", own, metrics, *_outcome(each, planned))


def _outcome(each: Log, planned: int) -> tuple[str, str]:
    """Return the status of a run in a text log, and the reason of the status.

    Args:
        each: the run, with at least one complete epoch.
        planned: planned number of epochs.

    Returns:
        "FAILED" if a metric is NaN or infinite, else "KILLED" if the log ends too early, else
        "FINISHED". The reason also says what was left out; "" if there is nothing to say.
    """
    done, best = each.done, each.best_top1()
    status, reasons = "KILLED", []
    if each.torn:
        reasons.append(f"log ends in the middle of epoch {done + 1}")
    elif done < planned:
        reasons.append(f"log ends after epoch {done} of {planned}")
    elif each.closed is False:
        reasons.append(f"log ends after epoch {done} without a line best_acc")
    else:
        status = "FINISHED"
    if each.best is not None and not abs(each.best - best) < ROUNDING:
        reasons.append(f"log states best top-1 {each.best:.2f}, and its epochs' best is {best:.2f}")
    missing = [epoch for epoch in range(1, done) if epoch not in each.epochs]
    notes = [*each.notes, *(f"epoch {epoch} is missing" for epoch in missing)]
    reasons += notes[:MAX_NOTES]
    if len(notes) > MAX_NOTES:
        reasons.append(f"and {counted(len(notes) - MAX_NOTES, 'more note')}")
    for epoch, row in each.epochs.items():
        if broken := [key for key, value in row.items() if not math.isfinite(value)]:
            return "FAILED", "; ".join(
                [f"{broken[0]} is {row[broken[0]]} in epoch {epoch}", *reasons]
            )
    return status, "; ".join(reasons)


# Rows of CSV files


def _header(text: str) -> list[str]:
    """Return the names that `CSV_NAMES` gives to the columns of a CSV file.

    The name of an unknown column is "". The result is empty if `text` is not CSV.
    """
    try:
        return [CSV_NAMES.get(name.strip(), "") for name in next(csv.reader(io.StringIO(text)), [])]
    except csv.Error:
        return []


def _rows(path: Path, text: str, given: Mapping[str, str], refused: list[str]) -> Iterator[_Import]:
    reader = csv.reader(io.StringIO(text), strict=True)
    names = _header(text)
    seen: Counter[str] = Counter()
    wrong: dict[str, list[int]] = defaultdict(list)  # lines by what is wrong with them
    try:
        next(reader)  # the header, too, may have a quote where none is allowed
        for cells in reader:
            row = {name: cell.strip() for name, cell in zip(names, cells, strict=False) if name}
            row = {
                name: cell
                for name, cell in row.items()
                if cell not in ("", "None", "nan", "NaN", "<NA>")
            }
            if not row:
                continue
            # Hash the row, not the file: if a table grows, only its new rows are imported.
            digest = hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()
            seen[digest] += 1
            try:
                if len(cells) != len(names):
                    raise ValueError(_other_length(cells, names))
                name = row.get("name", f"{path.stem}:{reader.line_num}")
                yield _row(name, path, f"{digest}:{seen[digest] - 1}", row, given)
            except ValueError as error:
                wrong[str(error)].append(reader.line_num)
    except csv.Error as error:
        wrong[str(error)].append(reader.line_num)
    refused += [f"{path} {_lines_said(lines)}: {problem}" for problem, lines in wrong.items()]


def _other_length(cells: Sequence[str], names: Sequence[str]) -> str:
    """Return what is wrong with a row that has more or fewer cells than there are columns."""
    wrong = f"{counted(len(cells), 'cell')} for {counted(len(names), 'column')}"
    if found := re.search(r"\[[0-9, ]+,[0-9, ]+\]", ",".join(cells)):
        return f'{wrong}; put the list of scales in quotes: "{found[0]}"'
    return wrong


def _lines_said(lines: Sequence[int]) -> str:
    """Return a text that lists line numbers, such as "lines 2, 3, 4 and 97 more"."""
    if len(lines) == 1:
        return f"line {lines[0]}"
    more = f" and {len(lines) - LINES_SAID} more" if len(lines) > LINES_SAID else ""
    return f"lines {', '.join(map(str, lines[:LINES_SAID]))}{more}"


def _row(
    name: str, path: Path, record: str, row: Mapping[str, str], given: Mapping[str, str]
) -> _Import:
    own: dict[str, str] = {}
    if "method" in row:
        own = params_of_method(row["method"])
        if "distiller.name" in row:
            own["distiller.name"] = loss_name(row["distiller.name"])
    elif "distiller.name" in row:
        own = params_of_method(row["distiller.name"])
    told = {
        key: param(key, row[key])
        for key in PARAMS.values()
        if key in row and key != "distiller.name"
    }
    own = _complete({**own, **told, **given}, row)
    status = STATUS_WORDS.get(row.get("status", "").lower())
    if status is None:
        raise ValueError(
            f"status {row['status']} is not one of "
            f"{', '.join(word for word in STATUS_WORDS if word)}"
        )
    planned = own.get("trainer.epochs", "0")
    done = int(whole_number("epochs_done", row.get("epochs_done", planned)))
    if status == "FINISHED" and done < int(planned):
        status = "KILLED"
    values = {key: number_of(key, row[key]) for key in METRICS.values() if key in row}
    _require_percent([(key, value, done) for key, value in values.items()])
    if best_or_last := {"best/top1", "last/top1"} & values.keys():
        if 0 < max(values[key] for key in best_or_last) <= 1:
            raise ValueError(
                f"top-1 {max(values[key] for key in best_or_last)} looks like a fraction; "
                "give percent"
            )
    elif status == "FINISHED":
        raise ValueError(NO_ACCURACY)
    reason = ""
    if status != "FINISHED" and done < int(planned):
        reason = f"{done} of {counted(int(planned), 'epoch')}"
    if status == "PRUNED":  # MLflow has no such status
        status, reason = "KILLED", f"{PRUNED}{reason}"
    return _Import(
        name,
        path,
        record,
        own,
        [(key, value, done) for key, value in values.items()],
        status,
        reason,
    )


def _complete(params: Mapping[str, str], row: Mapping[str, str]) -> dict[str, str]:
    """Return the params of a CSV row as `log_params.complete` does.

    Raise ValueError if params are missing. If a finished run lacks the accuracy as well, the
    message says both.
    """
    try:
        return complete(params)
    except ValueError as error:
        finished = STATUS_WORDS.get(row.get("status", "").lower()) == "FINISHED"
        if not finished or {"best/top1", "last/top1"} & row.keys():
            raise
        raise ValueError(f"{error}; {NO_ACCURACY}") from None


def _require_percent(metrics: Iterable[tuple[str, float, int]]) -> None:
    for key, value, _ in metrics:
        if key.endswith(("top1", "top5")) and (value < 0 or value > 100):
            raise ValueError(f"{key} {value} is not a percentage")


# MLflow


def _make_database(uri: str) -> None:
    """Create the database if `uri` names a missing SQLite file.

    Other stores are checked later, when they are opened. Raise ValueError if the file cannot be
    created.
    """
    path = sqlite_file(uri)
    if path is None or "?" in uri or path.exists():
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Try to write here: MLflow would retry for half a minute if it cannot.
        path.touch()
        path.unlink()
    except OSError as error:
        raise ValueError(
            f"{uri} cannot be created ({error}); name another with --home or --uri"
        ) from None
    from mlflow.tracking import MlflowClient  # imported late, because it is slow

    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    MlflowClient(tracking_uri=uri).search_experiments(max_results=1)


def _refuse_name_of_sweep(client: Any, name: str) -> None:
    """Raise ValueError if a sweep has the name: under it, tables have the sweep's runs alone."""
    if next(search(client, experiments_of(client), f"tags.sweep = {quoted(name)}"), None):
        raise ValueError(
            f"--experiment {name} is the name of a sweep; leave it out, and show the imported runs "
            f"beside the sweep with python -m {__package__} {name} imported"
        )


def _experiment(client: Any, uri: str, name: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is None:
        # By default, a SQLite store would put the artifacts into the current folder.
        artifacts = None
        if path := sqlite_file(uri):
            artifacts = (path.absolute().parent / "mlartifacts").as_uri()
        return str(client.create_experiment(name, artifact_location=artifacts))
    if found.lifecycle_stage == "deleted":
        raise ValueError(
            f"experiment {name} was deleted in MLflow; restore it there or choose another name"
        )
    return str(found.experiment_id)


def _there(client: Any, experiment_id: str, record: str) -> str:
    """Return the id of the imported run with this tag `record`, or "" if there is none.

    A run with this record that an interrupted import left unfinished is deleted.
    """
    for run in client.search_runs([experiment_id], f"tags.record = '{record}'"):
        if run.info.status != "RUNNING":
            return str(run.info.run_id)
        client.delete_run(run.info.run_id)
    return ""


def _write(client: Any, experiment_id: str, run: _Import) -> str:
    from mlflow.entities import Metric, Param

    now = int(time.time() * 1000)
    tags = {
        "source": "imported",
        "kind": "job",
        "record": run.record,
        "run_dir": str(run.path.absolute()),
        "status_reason": run.reason,
    }
    run_id = str(client.create_run(experiment_id, run_name=run.name, tags=tags).info.run_id)
    params = [Param(key, value) for key, value in run.params.items()]
    points = [Metric(key, value, now, epoch) for key, value, epoch in run.metrics]
    client.log_batch(run_id, params=params)
    for at in range(0, len(points), METRICS_A_BATCH):
        client.log_batch(run_id, metrics=points[at : at + METRICS_A_BATCH])
    client.set_terminated(run_id, run.status)
    return run_id
