"""Import the logs of other projects as runs in MLflow, so that the tables show them beside ours.

Imported runs are marked source=imported. There are four formats, recognised by their content:
- worklog: worklog.txt of mdistiller and of projects built on it (SDD, LSKD). An epoch is a block
  between dashed lines; `best_acc` ends the log. The learning rate is printed with two decimals:
  0.025 reads 0.03, and a rate that reads 0.00 is not imported.
- CTKD: one JSON object per epoch, without a separator (`}{`).
- tiny-transformers: lines `json_stats: {...}`; top-1 is 100 - top1_err.
- CSV: one row per run, with columns named as in schema.COLUMNS; a finished run needs best, last or
  both.

A log states neither networks nor method. They are read from the name of its file or folder, in the
authors' notation (`kd,res32x4,res8x4`; LSKD's `dkd,vgg13,vgg8,2,15,2.0`: temperature, weight, beta;
`deit-ti_c100_KD_ours_3_10`), and from `given`, which takes precedence. A name of three parts counts
as not standardised. LSKD's own code names its standardised runs the same way: pass
`standardize=true` for those. Scales are never guessed.
"""

import csv
import hashlib
import io
import itertools
import json
import logging
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .runs import reading
from .schema import COLUMNS, METRICS, PARAMS, canonical_M

__all__ = ["FORMATS", "import_logs"]

log = logging.getLogger(__name__)

FORMATS = (
    "worklog.txt of mdistiller, SDD and LSKD; CTKD's JSON objects; "
    "tiny-transformers' json_stats lines; "
    "CSV with the columns teacher, student, method, dataset, M, seed, epochs, best, last"
)
LOG_SUFFIXES = {".txt", ".log", ".json", ".csv"}  # files that are read from a folder
MAX_BYTES = 64 * 2**20  # 17 times the size of the longest log that LSKD published
ROUNDING = 0.0051  # tolerance for values that logs print with two decimals
METRICS_A_BATCH = 1000  # metrics per request; MLflow's limit
NEEDED = ("dataset.name", "teacher.name", "student.name", "distiller.name", "M", "standardize")
STATUS_WORDS = {
    **dict.fromkeys(("", "finished", "complete"), "FINISHED"),
    **dict.fromkeys(("killed", "partial", "running"), "KILLED"),
    **dict.fromkeys(("failed", "crashed"), "FAILED"),
}
CSV_NAMES = {
    **PARAMS,
    **{key: key for key in PARAMS.values()},
    **{key: key for key in METRICS.values()},
    **METRICS,
    **{"best_top1": "best/top1", "best_acc": "best/top1", "last_top1": "last/top1"},
    **{
        "epochs_configured": "trainer.epochs",
        "epochs_logged": "epochs_done",
        "epochs_done": "epochs_done",
    },
    **{name: name for name in ("method", "status", "name")},
}
WORKLOG = {
    "lr": "lr",
    "train_acc": "train/top1",
    "train_loss": "train/loss",
    "test_acc": "val/top1",
    "test_acc_top5": "val/top5",
    "test_loss": "val/loss",
}
DATASETS = {"c100": "cifar100"}
NETWORKS = (
    (r"(?:resnet|res|r)_?(\d+(?:x\d+)?)", r"resnet\1"),
    (r"(?:mobile(?:net)?|m)_?v(\d)", r"mobilev\1"),
    (r"shu(?:f|ff|ffle|fflenet)?_?v(\d)", r"shufflev\1"),
    (r"wrn_?(\d+)_(\d+)", r"wrn_\1_\2"),
    (r"vgg_?(\d+)", r"vgg\1"),
    (r"(deit|pit|pvt)_ti", r"\1_tiny"),
    (r"t2t_(\d+)", r"t2t_vit_\1"),
    (r"([a-z][a-z0-9_]*)", r"\1"),
)


@dataclass
class _Log:
    """One run as read from a log."""

    epochs: list[dict[str, float]] = field(default_factory=list)  # metrics of epoch 1, 2, ...
    best: float | None = None  # best top-1 (%) that the log states
    lr: float | None = None  # learning rate of the first epoch
    planned: int = 0  # planned number of epochs; 0 if the log does not state it
    torn: bool = False  # whether the log ends in the middle of an epoch
    closed: bool | None = None  # whether the log has its last line; None: the format has none


@dataclass(frozen=True)
class _Import:
    """One run as it is written to MLflow."""

    name: str
    path: Path
    record: str  # identifies the content, so that it is imported only once
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
    """Create an MLflow run for each log that has not been imported before.

    Args:
        paths: log files, or folders, from which every .txt, .log, .json and .csv file is read.
        uri: MLflow store. A missing SQLite database is created.
        experiment: name of the MLflow experiment. A missing one is created.
        given: params of every run, keyed by MLflow's names (the values of schema.PARAMS). They
            take precedence over what a file states.
        say: receives one line for each run that is imported or already exists.

    Returns:
        The ids of the new runs.

    Raises:
        ValueError: if a file or row is refused, after all others are imported, with one line for
            each; or, before anything is read, if `given` is invalid.
    """
    fixed = {key: _param(key, text) for key, text in (given or {}).items()}
    refused: list[str] = []
    found = _read_all(_files(paths, refused), fixed, refused)
    run_ids: list[str] = []
    # No database is created if there is nothing to import.
    if (first := next(found, None)) is not None:
        _make_database(uri)
        with reading(uri) as client:
            experiment_id = _experiment(client, uri, experiment)
            for run in itertools.chain([first], found):
                if there := _there(client, experiment_id, run.record):
                    say(
                        f"{run.path}: {run.name} is already imported as run {there}; "
                        "delete that run in MLflow to import it again"
                    )
                    continue
                run_ids.append(_write(client, experiment_id, run))
                say(
                    f"{run.path}: {run.name} is run {run_ids[-1]}, "
                    f"{run.status}{run.reason and f' ({run.reason})'}"
                )
    if refused:
        raise ValueError(
            "\n".join([f"{len(refused)} not imported, {len(run_ids)} imported:", *refused])
        )
    return run_ids


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
        logs = _glued_json(text)
    elif 'json_stats: {"' in text:
        logs = _json_stats(text)
    elif re.search(r"^epoch: ", text, re.MULTILINE) and "test_acc" in text:
        logs = _worklog(text)
    elif {"teacher.name", "student.name"} <= set(_header(text)):
        return _rows(path, text, given, refused)
    else:
        raise ValueError(f"has an unknown format; known formats are {FORMATS}")
    return _runs(path, content, logs, given)


def _runs(
    path: Path, content: bytes, logs: Sequence[_Log], given: Mapping[str, str]
) -> Iterator[_Import]:
    name, digest = _name(path), hashlib.sha256(content).hexdigest()
    params = {**_named(name, path), **given}
    longest = max(
        (len(each.epochs) for each in logs if not each.torn and each.closed is not False), default=0
    )
    for index, each in enumerate(logs):
        done = len(each.epochs)
        if not done:
            raise ValueError("has no complete epoch")
        own = _complete(params)
        planned = (
            int(given.get("trainer.epochs", 0))
            or each.planned
            or (done if each.closed else longest)
        )
        if planned >= done:
            own["trainer.epochs"] = str(planned)
        elif "trainer.epochs" in given or each.planned:
            raise ValueError(
                f"{done} epochs are more than the {planned} planned; give --set trainer.epochs=..."
            )
        if each.lr:
            own.setdefault("optimizer.lr", str(each.lr))
        accuracies = [row["val/top1"] for row in each.epochs]
        best = max(filter(math.isfinite, accuracies), default=math.nan)
        final = {"best/top1": best, "last/top1": accuracies[-1]}
        metrics = [
            (key, value, epoch)
            for epoch, row in enumerate(each.epochs, 1)
            for key, value in row.items()
        ]
        metrics += [(key, value, done) for key, value in final.items()]
        _require_percent(metrics)
        label = name if len(logs) == 1 else f"{name} #{index + 1}"
        yield _Import(
            label, path, f"{digest}:{index}", own, metrics, *_outcome(each, planned, best)
        )


def _outcome(each: _Log, planned: int, best: float) -> tuple[str, str]:
    """Return the status of a run, and the reason if it is not simply FINISHED."""
    done = len(each.epochs)
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
    for epoch, row in enumerate(each.epochs, 1):
        if broken := [key for key, value in row.items() if not math.isfinite(value)]:
            return "FAILED", "; ".join(
                [f"{broken[0]} is {row[broken[0]]} in epoch {epoch}", *reasons]
            )
    return status, "; ".join(reasons)


# Formats


def _take(logs: list[_Log], epoch: int, metrics: dict[str, float]) -> None:
    """Append an epoch to the last run of `logs`; epoch 1 starts a new run."""
    if epoch == 1:
        logs.append(_Log())
    done = len(logs[-1].epochs) if logs else 0
    if epoch != done + 1:
        raise ValueError(
            f"epoch {epoch} follows epoch {done}; "
            "epochs must run 1, 2, 3, ..., and from 1 again for another run"
        )
    logs[-1].epochs.append(metrics)


def _worklog(text: str) -> list[_Log]:
    logs: list[_Log] = []
    block: dict[str, str] = {}
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        if match := re.fullmatch(r"\s*(\w+):\s*(\S+)\s*", line):
            if match[1] in block:
                raise ValueError(
                    f"line {number}: {match[1]} appears twice "
                    f"in the block of epoch {block.get('epoch')}"
                )
            block[match[1]] = match[2]
        elif match := re.fullmatch(r"best_acc\s+(\S+?)-*\s*", line):
            # The dashes belong to another run, appended without a line break.
            if block or not logs:
                raise ValueError(f"line {number}: best_acc comes before the end of an epoch")
            logs[-1].best, logs[-1].closed = _number(match[1], number), True
        elif re.fullmatch(r"-+\s*", line):
            if block:
                _take_block(logs, block, number)
            block = {}
        elif line.strip() and (number < len(lines) or text.endswith("\n")):
            # A last line without a line break may be cut off, and is not an error.
            raise ValueError(f"line {number}: {line[:60]!r} is not a line of a worklog")
    if block and logs and block.get("epoch") != "1":
        logs[-1].torn = True
    return logs or [_Log()]


def _take_block(logs: list[_Log], block: Mapping[str, str], number: int) -> None:
    if absent := [key for key in ("epoch", *WORKLOG) if key not in block]:
        raise ValueError(
            f"line {number}: the block of epoch {block.get('epoch', '?')} lacks {', '.join(absent)}"
        )
    if not block["epoch"].isdecimal():
        raise ValueError(f"line {number}: epoch: {block['epoch']} is not a whole number")
    metrics = {name: _number(block[key], number) for key, name in WORKLOG.items()}
    if metrics["lr"] == 0:  # rounded to two decimals, so not the true rate
        del metrics["lr"]
    _take(logs, int(block["epoch"]), metrics)
    logs[-1].closed = False  # until best_acc is read
    if len(logs[-1].epochs) == 1:
        logs[-1].lr = metrics.get("lr")


def _glued_json(text: str) -> list[_Log]:
    logs: list[_Log] = []
    decoder, at = json.JSONDecoder(), 0
    while rest := text[at : at + 1]:
        if rest.isspace():
            at += 1
            continue
        try:
            entry, end = decoder.raw_decode(text, at)
            accuracy = float(entry["test_acc"])
            metrics = {"val/top1": accuracy, "val/top5": float(entry["test_acc_top5"])}
            _take(logs, int(entry["epoch"]), metrics)
            logs[-1].best = float(entry["best_acc"])
        except json.JSONDecodeError as error:
            if "}" in text[at:] or not logs:
                raise ValueError(
                    f"line {text.count(chr(10), 0, error.pos) + 1}: {error.msg}"
                ) from None
            logs[-1].torn = True
            break
        except (KeyError, TypeError, RecursionError) as error:
            number = text.count("\n", 0, at) + 1
            raise ValueError(
                f"the object at line {number} is not a CTKD epoch ({error!r})"
            ) from None
        at = end
    return logs


def _json_stats(text: str) -> list[_Log]:
    logs: list[_Log] = []
    trained: dict[str, float] = {}
    whole = True
    lines = [
        (number, line) for number, line in enumerate(text.splitlines(), 1) if "json_stats: " in line
    ]
    for number, line in lines:
        kind = re.search(r'"_type": "(\w+)"', line)
        whole = kind is not None and kind[1] == "test_epoch"
        if kind is None or kind[1] not in ("train_epoch", "test_epoch"):
            continue  # an iteration, as are 78 of the 80 lines of an epoch
        try:
            entry = json.loads(line.split("json_stats: ", 1)[1])
            epoch, planned = map(int, entry["epoch"].split("/"))
            top1, top5 = (round(100 - float(entry[name]), 4) for name in ("top1_err", "top5_err"))
            if kind[1] == "train_epoch":
                trained = {"train/top1": top1, "train/loss": float(entry["loss"])}
                if lr := float(entry["lr"]):  # 0.0000 is rounded, so not the true rate
                    trained["lr"] = lr
                continue
            stated = round(100 - float(entry["min_top1_err"]), 4)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if number == lines[-1][0]:
                whole = False
                break
            raise ValueError(
                f"line {number} is not a tiny-transformers epoch ({error!r})"
            ) from None
        _take(logs, epoch, {**trained, "val/top1": top1, "val/top5": top5})
        logs[-1].best, logs[-1].planned, trained = stated, planned, {}
    if logs:
        logs[-1].torn = not whole
    return logs or [_Log()]


def _header(text: str) -> list[str]:
    """Return our names of the columns of a CSV file, "" for columns that we do not know."""
    try:
        return [CSV_NAMES.get(name.strip(), "") for name in next(csv.reader(io.StringIO(text)), [])]
    except csv.Error:
        return []


def _rows(path: Path, text: str, given: Mapping[str, str], refused: list[str]) -> Iterator[_Import]:
    reader = csv.reader(io.StringIO(text), strict=True)
    names = _header(text)
    next(reader)
    seen: Counter[str] = Counter()
    try:
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
                    raise ValueError(f"{len(cells)} cells for {len(names)} columns")
                name = row.get("name", f"{path.stem}:{reader.line_num}")
                yield _row(name, path, f"{digest}:{seen[digest] - 1}", row, given)
            except ValueError as error:
                refused.append(f"{path} line {reader.line_num}: {error}")
    except csv.Error as error:
        refused.append(f"{path} line {reader.line_num}: {error}")


def _row(
    name: str, path: Path, record: str, row: Mapping[str, str], given: Mapping[str, str]
) -> _Import:
    own = _method(row["method"]) if "method" in row else {}
    if "distiller.name" in row:
        own |= (
            _method(row["distiller.name"])
            if not own
            else {"distiller.name": row["distiller.name"].lower()}
        )
    told = {
        key: _param(key, row[key])
        for key in PARAMS.values()
        if key in row and key != "distiller.name"
    }
    own = _complete({**own, **told, **given})
    status = STATUS_WORDS.get(row.get("status", "").lower())
    if status is None:
        raise ValueError(
            f"status {row['status']} is not one of "
            f"{', '.join(word for word in STATUS_WORDS if word)}"
        )
    planned = own.get("trainer.epochs", "0")
    done = int(_whole("epochs_done", row.get("epochs_done", planned)))
    if status == "FINISHED" and done < int(planned):
        status = "KILLED"
    values = {key: _float(key, row[key]) for key in METRICS.values() if key in row}
    _require_percent([(key, value, done) for key, value in values.items()])
    if best_or_last := {"best/top1", "last/top1"} & values.keys():
        if 0 < max(values[key] for key in best_or_last) <= 1:
            raise ValueError(
                f"top-1 {max(values[key] for key in best_or_last)} looks like a fraction; "
                "give percent"
            )
    elif status == "FINISHED":
        raise ValueError("a finished run has best, last or both; this has neither")
    reason = f"{done} of {planned} epochs" if status != "FINISHED" and done < int(planned) else ""
    return _Import(
        name,
        path,
        record,
        own,
        [(key, value, done) for key, value in values.items()],
        status,
        reason,
    )


# Params from paths and cells


def _name(path: Path) -> str:
    """Return the run's name: that of the file, or of its folder if that describes the run."""
    stem = path.name.removesuffix(path.suffix) if path.suffix.lower() in LOG_SUFFIXES else path.name
    folder = path.absolute().parent.name
    return folder if stem == "worklog" or ("," in folder and "," not in stem) else stem


def _named(name: str, path: Path) -> dict[str, str]:
    """Return the params that the name of a log and its folders state."""
    params: dict[str, str] = {}
    # mdistiller writes output/cifar100_baselines/kd,res32x4,res8x4/worklog.txt.
    for folder in path.absolute().parts[-4:-1]:
        if match := re.match("cifar100|imagenet|cub200", folder.lower()):
            params["dataset.name"] = match[0]
    parts = name.split(",")
    if 3 <= len(parts) <= 6:
        method, teacher, student, *numbers = parts
        if len(parts) > 3:  # LSKD names its CIFAR-100 logs this way
            params = {"dataset.name": "cifar100"} | params
    elif len(parts := name.split("_")) in (4, 6) and parts[3] == "ours":  # LSKD's other logs
        teacher, student, method, _, *numbers = parts
        if student in DATASETS:
            params["dataset.name"] = DATASETS[student]
            teacher, student = "", teacher
    else:
        return params
    params |= _method(method) | {"teacher.name": teacher, "student.name": student}
    if len(parts) > 3:
        params["standardize"] = "True"
    # LSKD's weight multiplies both weights of DKD, alpha and beta, as kd_weight does.
    keys = ("distiller.temperature", "distiller.kd_weight", "distiller.loss.beta")
    return params | {key: str(_float(key, text)) for key, text in zip(keys, numbers, strict=False)}


def _method(text: str) -> dict[str, str]:
    """Return the params that a method name states: SDD_KD_LSKD is distiller kd, standardised.

    Without SDD, the only scale is the whole map (M=[1]). With SDD, the name does not state M.
    """
    name = re.sub(r"[-+ ](?=ls(kd)?$)", "_", text.strip().lower())
    match = re.fullmatch(r"(sdd?_)?(.+?)(_ls|_lskd)?", name)
    if match is None:
        raise ValueError(f"method {text!r} is not valid; give kd, dkd, sd_kd_ls, ...")
    scales, loss, standardized = match.groups()
    params = {"distiller.name": loss, "standardize": str(bool(standardized) or loss == "lskd")}
    return params if scales else params | {"M": "[1]"}


def _network(text: str) -> str:
    """Return our name of a network: resnet32x4 for ResNet32x4 and res32x4.

    A network that is not one of ours keeps its name.
    """
    name = text.strip().lower().replace("-", "_").removesuffix("_sdd")
    for pattern, ours in NETWORKS:
        if match := re.fullmatch(pattern, name):
            return match.expand(ours)
    raise ValueError(
        f"{text!r} is not a network name; give --set teacher.name=... student.name=..."
    )


def _param(key: str, text: str) -> str:
    """Return a param in the form that the trainer writes."""
    column = next((column for column, param in PARAMS.items() if param == key), None)
    if column is None:
        raise ValueError(
            f"{key} is not a param that a table uses; choose from {', '.join(PARAMS.values())}"
        )
    if column in ("teacher", "student"):
        return _network(text)
    if column == "M":
        if not re.fullmatch(r"\[[1-9]\d*(,[1-9]\d*)*\]", canonical_M(text)):
            raise ValueError(f"M={text} is not a list of scales; give a list such as [1,2,4]")
        return canonical_M(text)
    if COLUMNS[column] == "bool":
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{key}={text} is not valid; give true or false")
        return text.capitalize()
    if COLUMNS[column] == "Int64":
        return _whole(key, text)
    if COLUMNS[column] == "Float64":
        return str(_float(key, text))
    return text.strip().lower()


def _float(key: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{key}={text} is not a number")
    return value


def _whole(key: str, text: str) -> str:
    value = _float(key, text)  # pandas writes integers as 240.0 if values are missing
    if value != int(value) or value < 0:
        raise ValueError(f"{key}={text} is not a whole number")
    return str(int(value))


def _number(text: str, line: int) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"line {line}: {text!r} is not a number") from None


def _complete(params: Mapping[str, str]) -> dict[str, str]:
    """Return the params with our names of networks; raise ValueError if a required one is missing.

    The log of a student that was trained alone names a teacher that takes no part in the training,
    so the teacher, the scales and the standardisation of such a run are set here.
    """
    alone = {"teacher.name": "none", "M": "[1]", "standardize": "False"}
    whole = {**params, **(alone if params.get("distiller.name") == "vanilla" else {})}
    if absent := [key for key in NEEDED if not whole.get(key)]:
        raise ValueError(
            f"does not state {', '.join(absent)}; "
            f"give --set {' '.join(f'{key}=...' for key in absent)}"
        )
    return {**whole, **{key: _network(whole[key]) for key in ("teacher.name", "student.name")}}


def _require_percent(metrics: Iterable[tuple[str, float, int]]) -> None:
    for key, value, _ in metrics:
        if key.endswith(("top1", "top5")) and (value < 0 or value > 100):
            raise ValueError(f"{key} {value} is not a percentage")


# MLflow


def _make_database(uri: str) -> None:
    """Create the database if `uri` names a missing SQLite file.

    Any other store is checked when it is opened.
    """
    path = Path(uri.removeprefix("sqlite:///"))
    if not uri.startswith("sqlite:///") or path.exists():
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


def _experiment(client: Any, uri: str, name: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is None:
        # By default, a SQLite store would put the artifacts into the current folder.
        here = (
            Path(uri.removeprefix("sqlite:///")).absolute().parent
            if uri.startswith("sqlite:")
            else None
        )
        return str(
            client.create_experiment(
                name, artifact_location=(here / "mlartifacts").as_uri() if here else None
            )
        )
    if found.lifecycle_stage == "deleted":
        raise ValueError(
            f"experiment {name} was deleted in MLflow; restore it there or choose another name"
        )
    return str(found.experiment_id)


def _there(client: Any, experiment_id: str, record: str) -> str:
    """Return the id of the run with this record, or "" if there is none.

    Delete such a run first if an interrupted import left it unfinished.
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
