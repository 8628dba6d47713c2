"""Define what is known of a run: as a `Run`, as a row of a frame (pandas DataFrame), and in MLflow.

`PARAMS`, `METRICS` and `TAGS` map columns of the frame to the names of the params, final metrics
and tags that the trainer writes to MLflow. The name of a param is its dotted configuration key.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, get_type_hints

import pandas as pd

__all__ = [
    "COLUMNS",
    "METHOD_PARTS",
    "METRICS",
    "NO_LOGIT_LOSS",
    "PARAMS",
    "STANDARDIZED",
    "STATUSES",
    "TAGS",
    "Run",
    "canonical_M",
    "details_of",
    "feature_of",
    "frame_of",
    "method_of",
    "read_frame",
    "runs_of",
]

STATUSES = ("FINISHED", "RUNNING", "PRUNED", "FAILED", "KILLED", "MISSING")
"""Statuses of a run. PRUNED: halving dropped the run, because other runs of its group were better.
MISSING: a sweep planned the job, but MLflow has no run of the job."""


@dataclass(frozen=True, slots=True)
class Run:
    """One training run with its settings, status and results: a row of the frame of runs.

    The fields are the columns of the frame (a pandas DataFrame), in the same order; only the last
    field, `unread`, is no column. A job that a sweep planned but nobody ran has the status
    "MISSING". A value that MLflow does not have is the default of its field, except that unknown
    scales `M` are "".
    """

    run_id: str = ""  # in MLflow; "" for a missing run
    name: str = ""  # name of the run directory
    source: str = "sddlskd"  # "sddlskd" or "imported"
    status: str = ""  # one of STATUSES
    reason: str = ""  # why the run failed, was stopped or was dropped
    sweep: str = ""
    config_hash: str = ""  # hash of all that determines the result of the job, with the seed
    settings_hash: str = ""  # the same without the seed
    git_sha: str = ""
    # Files of the user's own code (allow_foreign_targets) with the first digits of their hashes,
    # "my_losses:1f0c2a9b"; "": none, or unknown
    own_code: str = ""
    run_dir: str = ""
    command: str = ""  # command that runs the job (again); "" if it is unknown
    environment: str = ""  # versions and device, in one line
    superseded: bool = False  # replaced by a later run of the job; left out of every table
    started: datetime | None = None
    dataset: str = ""
    teacher: str = ""  # "none" for a student that is trained alone
    student: str = ""
    pair: str = ""  # "teacher_student"
    method: str = ""  # as method_of spells it: vanilla, kd, sd_kd_ls, crd, sd_kd+crd ...
    recipe: str = ""  # value of recipe=..., or ""; other arguments may have changed its settings
    distiller: str = ""  # name of the loss of the logits: kd, dkd ...; or one of NO_LOGIT_LOSS
    features: str = ""  # feature methods as feature_of spells them, joined by "+": "crd+sp"
    learned_temperature: bool = False  # whether the temperature is learnt (CTKD)
    optimizer: str = ""
    M: str = "[1]"  # scales, as canonical_M writes them: "[1,2,4]"
    standardize: bool = False  # over the classes, as LSKD does
    standardization: str = ""  # another way to standardise the logits: batch or class_scaled
    complementary_weight: float | None = None
    knowledge: str = "fusion"  # regions that the loss uses: fusion, consistent or complementary
    temperature: float | None = None
    ce_weight: float | None = None
    kd_weight: float | None = None
    lr: float | None = None
    batch_size: int | None = None
    epochs: int | None = None  # number that the job was configured with
    # Batches per epoch. None means all batches in a run of ours (analysis.selection replaces it by
    # "all"), and unknown in an imported run.
    max_steps: int | Literal["all"] | None = None
    # Settings of the papers' methods without a column of their own, as details_of writes them;
    # "": unknown
    details: str = ""
    precision: str = ""  # of the networks' forward pass: fp32, bf16 or fp16
    compile: bool = False  # whether torch compiles the networks
    teacher_cache: str = ""  # folder of the cached teacher maps; "": no cache
    epochs_done: int | None = None  # number of the last epoch with an accuracy
    seed: int | None = None
    # Number of looks at the results that a sweep with seeds=until_decided plans; None: the user
    # chose the seeds
    looks: int | None = None
    # Fraction of the training images that is held out to choose the best epoch. 0: the test split
    # chooses.
    val_fraction: float | None = None
    train_fraction: float | None = None  # fraction of the other training images that is used
    group_size: int | None = None  # number of runs trained side by side, with one time for all
    best: float | None = None  # top-1 (%), best epoch
    last: float | None = None  # top-1 (%), last epoch
    test: float | None = None  # top-1 (%) on the test split, at the best epoch on held-out images
    mAP: float | None = None  # mAP (%) of several labels per image, best epoch
    teacher_top1: float | None = None  # top-1 (%) of the teacher
    parameters: float | None = None  # number of parameters of the student
    flops: float | None = None  # operations of the student for one image
    epoch_s: float | None = None  # seconds of the last epoch
    images_per_s: float | None = None  # in the last epoch
    # Recorded values of the settings that the loss does not use, set by analysis.selection. This
    # field is no column of the frame.
    unread: tuple[object, ...] = ()


PANDAS_TYPES: dict[Any, str] = {
    str: "str",
    bool: "bool",
    int | None: "Int64",
    int | Literal["all"] | None: "Int64",
    float | None: "Float64",
    datetime | None: "datetime64[ns, UTC]",
}
COLUMNS = {
    field: PANDAS_TYPES[kind] for field, kind in get_type_hints(Run).items() if field != "unread"
}
"""Pandas type of each column of the frame of runs."""

PARAMS = {
    "dataset": "dataset.name",
    "teacher": "teacher.name",
    "student": "student.name",
    "distiller": "distiller.name",
    "M": "M",
    "standardize": "standardize",
    "complementary_weight": "complementary_weight",
    "knowledge": "distiller.knowledge",
    "temperature": "distiller.temperature",
    "ce_weight": "distiller.ce_weight",
    "kd_weight": "distiller.kd_weight",
    "optimizer": "optimizer.name",
    "lr": "optimizer.lr",
    "batch_size": "trainer.batch_size",
    "epochs": "trainer.epochs",
    "max_steps": "trainer.max_steps",
    "precision": "trainer.precision",
    "compile": "trainer.compile",
    "teacher_cache": "teacher.cache",
    "seed": "seed",
    "val_fraction": "dataset.val_fraction",
    "train_fraction": "dataset.train_fraction",
    "recipe": "recipe",
}
"""Configuration key of each column that holds a setting, which is also its MLflow param."""

METRICS = {
    "best": "best/top1",
    "last": "last/top1",
    "test": "test/top1",
    "mAP": "best/mAP",
    "teacher_top1": "teacher/top1",
    "parameters": "student/parameters",
    "flops": "student/flops",
    "epoch_s": "time/epoch_s",
    "images_per_s": "time/images_per_s",
}
"""MLflow metric of each column that holds a final number of the run."""

DETAILS = (
    "dataset.unlabelled",
    "dataset.views",
    "distiller.learned_temperature",
    "distiller.loss",
    "distiller.pooling",
    "distiller.warmup_epochs",
    "optimizer.algorithm",
    "optimizer.clip_norm",
    "optimizer.milestones",
    "optimizer.schedule",
    "optimizer.warmup_epochs",
    "teacher.combine",
    "teacher.image_size",
    "teacher.view",
    "teacher.weights",
)
"""Params that `details` holds, besides those that begin with "features." or "distiller.loss."."""

TAGS = {
    "source": "source",
    "reason": "status_reason",
    "sweep": "sweep",
    "config_hash": "config_hash",
    "settings_hash": "settings_hash",
    "git_sha": "git_sha",
    "own_code": "own_code",
    "run_dir": "run_dir",
    "environment": "environment",
    "superseded": "superseded",
    "group_size": "group_size",
}
"""MLflow tag of each column that is kept as a tag."""


def canonical_M(text: str) -> str:
    """Return the text of a list of scales without spaces: "[1, 2,4]" becomes "[1,2,4]".

    A scale m stands for m x m regions of the logit map. `text` is not checked.
    """
    return text.replace(" ", "")


def details_of(params: Mapping[str, str]) -> str:
    """Return the settings of a run for the field `details` of `Run`, as the text of a JSON object.

    `params` holds all MLflow params of the run, as texts by dotted key. The result has the params

    - that `DETAILS` lists, such as "optimizer.schedule";
    - whose keys begin with "features." or "distiller.loss.".

    Of these, the result does not have

    - the params whose keys begin with "distiller.", if the run has no loss on the logits
      ("distiller.name" is in `NO_LOGIT_LOSS`);
    - "distiller.loss.temperature", if it equals "distiller.temperature";
    - the entries `_target_` of a param that is a JSON object. Each other entry has a key of its
      own, such as "features.crd.method.K".

    The keys are sorted, and 4.0 becomes 4, so that equal settings give equal texts. The result is
    "" if `params` has none of these settings.
    """
    found: dict[str, Any] = {}
    no_loss = params.get("distiller.name") in NO_LOGIT_LOSS
    for key in params:
        if no_loss and key.startswith("distiller."):
            continue
        if key in DETAILS or key.startswith(("features.", "distiller.loss.")):
            found |= dict(_flat(key, _plain(params[key])))
    temperature = _plain(params.get("distiller.temperature", ""))
    if found.get("distiller.loss.temperature") == temperature:
        del found["distiller.loss.temperature"]
    return json.dumps(found, sort_keys=True) if found else ""


def _plain(text: str) -> Any:
    """Return the value of a param that is JSON; a text that is not JSON stays as it is."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _flat(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) for each value of nested dictionaries, without `_target_`."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if name != "_target_":
                yield from _flat(f"{key}.{name}", inner)
    elif isinstance(value, list):
        yield key, [_whole(entry) for entry in value]
    else:
        yield key, _whole(value)


def _whole(value: Any) -> Any:
    """Return a float without a fraction as an int, any other value as it is."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


NO_LOGIT_LOSS = ("vanilla", "features_only")
"""Values of `distiller` for runs without a loss of the logits."""
METHOD_PARTS = (
    "distiller",
    "M",
    "standardize",
    "standardization",
    "features",
    "learned_temperature",
    "optimizer",
)
"""Columns that determine the method: the arguments of `method_of`."""
STANDARDIZED = {"batch": "_ls_batch", "class_scaled": "_ls_scaled"}
"""Suffixes of losses on logits that are standardised otherwise than by LSKD."""
SHORT_NAMES = {
    "kd+dot": "kd_dot",
    "kd+semckd": "semckd",  # its authors train it together with KD
    "semckd": "semckd_without_kd",
}
"""Short names of methods, by the parts of the method joined by "+"."""


def feature_of(name: str, options: Mapping[str, Any]) -> str:
    """Return the name of a feature method with its prefix and suffix, such as "sp" or "sd_sp_ls".

    `name` is the method's name in its configuration keys, features.<name>. `options` holds the
    arguments of the method. The prefix "sd_" says that there are scales, `options["M"]`. The suffix
    "_ls" says that `options["standardize"]` is true.
    """
    prefix = "sd_" if options.get("M") else ""
    suffix = "_ls" if options.get("standardize") else ""
    return f"{prefix}{name}{suffix}"


def method_of(
    distiller: str,
    M: str,
    standardize: bool,
    features: str = "",
    learned_temperature: bool = False,
    optimizer: str = "",
    standardization: str = "",
) -> str:
    """Return the name of a method, such as "sd_kd_ls", "crd" or "sd_kd+crd".

    Args:
        distiller: name of the loss on the logits, such as "kd", or one of `NO_LOGIT_LOSS`. In the
            latter case, `M`, `standardize`, `standardization` and `learned_temperature` do not
            matter.
        M: scales as `canonical_M` writes them; "[1]" is the whole logit map. Any other text adds
            the prefix "sd_" to the loss.
        standardize: whether the logits are standardised over the classes, which adds the suffix
            "_ls" to the loss.
        features: names of feature methods from `feature_of`, joined by "+"; "" for none.
        learned_temperature: whether the temperature of the loss is learnt (CTKD). The loss "kd"
            then becomes "ctkd", and another loss becomes, for example, "dkd+ctkd".
        optimizer: name of the optimizer. "dot" is added as the last part; other names are not.
        standardization: another way to standardise the logits: "batch" adds the suffix
            "_ls_batch", and "class_scaled" the suffix "_ls_scaled". "" for none.

    Returns:
        The loss, the feature methods and "dot", joined by "+", or the short name in `SHORT_NAMES`
        for this text. Without a loss and without feature methods, the result is "vanilla".
    """
    parts = [features] if features else []
    if distiller not in NO_LOGIT_LOSS:
        loss = distiller
        if learned_temperature:
            loss = "ctkd" if distiller == "kd" else f"{distiller}+ctkd"
        prefix = "" if M == "[1]" else "sd_"
        suffix = "_ls" if standardize else STANDARDIZED.get(standardization, "")
        parts.insert(0, f"{prefix}{loss}{suffix}")
    if not parts:
        return "vanilla"
    if optimizer == "dot":
        parts.append(optimizer)
    name = "+".join(parts)
    return SHORT_NAMES.get(name, name)


def frame_of(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Return rows of runs as a frame (pandas DataFrame) with the columns and types of `COLUMNS`.

    A row maps columns to values. A value that a row lacks is the default of `Run`. If `pair` or
    `method` is missing or "", it is derived from other columns of the row. No rows give an empty
    frame. Raise KeyError for an unknown column. A value that does not fit its column raises
    ValueError, TypeError or AttributeError.
    """
    defaults = {field.name: field.default for field in fields(Run) if field.name in COLUMNS}
    whole = []
    for row in rows:
        if unknown := row.keys() - COLUMNS.keys():
            raise KeyError(f"unknown columns {sorted(unknown)}; choose from {list(COLUMNS)}")
        filled = {**defaults, **row}
        filled["M"] = canonical_M(filled["M"])
        filled["pair"] = filled["pair"] or f"{filled['teacher']}_{filled['student']}"
        filled["method"] = filled["method"] or method_of(
            **{part: filled[part] for part in METHOD_PARTS}
        )
        whole.append(filled)
    return pd.DataFrame(whole, columns=list(COLUMNS)).astype(COLUMNS)


def runs_of(frame: pd.DataFrame) -> list[Run]:
    """Return the rows of a frame of runs as `Run` objects, in order.

    A missing value (NA) becomes None. Raise KeyError if the frame lacks a column of `COLUMNS`.
    """
    columns = frame[list(COLUMNS)].astype(object)
    rows = columns.where(frame[list(COLUMNS)].notna(), None)
    return [Run(*row) for row in rows.itertuples(index=False, name=None)]


def read_frame(path: Path) -> pd.DataFrame:
    """Return the frame of runs that a CSV file holds, such as the runs.csv of an analysis.

    The frame has the columns of `COLUMNS`. Columns that the file lacks have the defaults of `Run`.
    An empty field is "" in a column of texts, and a missing value in a column of numbers or times.
    In a column of booleans, "True" is True and any other text is False. An empty `pair` or `method`
    is derived from other columns. Raise KeyError for an unknown column, ValueError if the file
    cannot be parsed or a field is not of the column's type, and OSError if the file cannot be read.
    """
    cells = pd.read_csv(path, dtype=str, keep_default_na=False).to_dict("records")
    return frame_of(
        {name: _value(COLUMNS[name], text) for name, text in row.items()} for row in cells
    )


def _value(kind: str, text: str) -> Any:
    if kind == "str":
        return text
    if kind == "bool":
        return text == "True"
    if not text:
        return None
    if kind == "Float64":
        return float(text)
    if kind == "Int64":
        return int(text)
    return text
