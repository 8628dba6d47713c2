"""Read the params of a run from the name of its log, or from the cells of a CSV row.

Params are texts, keyed by MLflow's names (`schema.PARAMS`). The names of logs are in the authors'
notation: `kd,res32x4,res8x4` (see `import_logs`).
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path

from .names import PAPERS_LOSSES
from .schema import COLUMNS, PARAMS, canonical_M

__all__ = [
    "LOG_SUFFIXES",
    "complete",
    "loss_name",
    "name_of",
    "network",
    "number_of",
    "param",
    "params_of_method",
    "params_of_name",
    "whole_number",
]

LOG_SUFFIXES = {".txt", ".log", ".json", ".csv"}  # files that are read from a folder
NEEDED = ("dataset.name", "teacher.name", "student.name", "distiller.name", "M", "standardize")
DATASETS = {"c100": "cifar100"}
# Teacher of LSKD's transformers, by data set. The logs do not name the teacher, but the
# configurations do (TEACHER_WEIGHTS: work_dirs/r-56_c100/model.pyth).
TEACHERS_OF_TRANSFORMERS = {"cifar100": "resnet56"}
# An option in a name: M: or SOLVER.LR: anywhere, another word such as gpu: only after "," or "]"
_KNOWN = r"(?:[A-Z]+(?:\.[A-Z0-9_]+)+|M):"
OPTION = re.compile(
    rf"(?:,? *-*(?={_KNOWN})|(?:,|(?<=\])) *-*(?![\w.]*?{_KNOWN}))([A-Za-z][\w.]*):"
)
# Params that the options of the authors' command line set.
OPTIONS = {
    "M": "M",
    "SOLVER.LR": "optimizer.lr",
    "SOLVER.EPOCHS": "trainer.epochs",
    "SOLVER.BATCH_SIZE": "trainer.batch_size",
    "DATASET.TYPE": "dataset.name",
    "DISTILLER.TEACHER": "teacher.name",
    "DISTILLER.STUDENT": "student.name",
    "EXPERIMENT.LOGIT_STAND": "standardize",
    "KD.TEMPERATURE": "distiller.temperature",
    "KD.LOSS.CE_WEIGHT": "distiller.ce_weight",
    "KD.LOSS.KD_WEIGHT": "distiller.kd_weight",
    "DKD.T": "distiller.temperature",
    "DKD.CE_WEIGHT": "distiller.ce_weight",
    "DKD.BETA": "distiller.loss.beta",
}
# Section of the options that the authors' code reads for each loss.
SECTIONS = {"kd": "KD", "mlkd": "KD", "dkd": "DKD", "nkd": "DKD"}
# Options with these beginnings do not change what a run computes.
IRRELEVANT_OPTIONS = (
    "DISTILLER.TYPE",
    "EXPERIMENT.",
    "LOG.",
    "DATASET.NUM_WORKERS",
    "DATASET.TEST.",
)
# Patterns of the names of networks, and our names for the networks that match.
NETWORKS = (
    (r"(?:resnet|res|r)_?(\d+(?:x\d+)?)", r"resnet\1"),
    (r"(?:mobile(?:net)?|m)_?v(\d)", r"mobilev\1"),
    (r"sh(?:u(?:f|ff|ffle|fflenet)?)?_?v(\d)", r"shufflev\1"),
    (r"wrn_?(\d+)_(\d+)", r"wrn_\1_\2"),
    (r"vgg_?(\d+)", r"vgg\1"),
    (r"(deit|pit|pvt)_ti", r"\1_tiny"),
    (r"t2t_(\d+)", r"t2t_vit_\1"),
    (r"([a-z][a-z0-9_]*)", r"\1"),
)
LOSSES = {*PAPERS_LOSSES, "vanilla"}  # losses whose names may be written in capitals


def name_of(path: Path) -> str:
    """Return the name of the run in a log file: that of the file, or that of its folder.

    The file's name is taken without a suffix .txt, .log, .json or .csv (`LOG_SUFFIXES`). If that
    name is "worklog", or if only the folder's name has a comma, as in kd,res32x4,res8x4/train.txt,
    the folder's name is taken instead. `path` need not exist.
    """
    name = path.name
    if path.suffix.lower() in LOG_SUFFIXES:
        name = path.stem
    folder = path.absolute().parent.name
    if name == "worklog" or ("," in folder and "," not in name):
        return folder
    return name


def params_of_name(
    name: str, path: Path, given: Mapping[str, str]
) -> tuple[dict[str, str], list[str]]:
    """Return the params that the name of a log and the names of its folders state.

    Params are texts, keyed by MLflow's names, such as "teacher.name". The name of a log is in the
    notation of mdistiller or LSKD, such as "kd,res32x4,res8x4" (method, teacher, student). Options
    of the command line of mdistiller or LSKD may follow, such as "SOLVER.LR:0.01".

    Args:
        name: name of the run, as `name_of` returns it.
        path: path of the log. The names of the last three folders may state the data set.
        given: params that the caller knows. An option whose param is in `given` is skipped. The
            params of `given` are not added to the result.

    Returns:
        The params, and a sentence for each option that is not imported although it may matter.
        Names of networks may still be as the log spells them. A name in another notation states
        only its options.

    Raises:
        ValueError: If the name has a value that is not valid, such as a text for a number. An
            invalid option is not an error if `given` has its param, or all params that every run
            needs (`NEEDED`).
    """
    params: dict[str, str] = {}
    # mdistiller writes output/cifar100_baselines/kd,res32x4,res8x4/worklog.txt.
    for folder in path.absolute().parts[-4:-1]:
        if match := re.match("cifar100|imagenet|cub200", folder.lower()):
            params["dataset.name"] = match[0]
    tag, *rest = OPTION.split(name)
    options = {key: value.strip(" ,'\"") for key, value in zip(rest[::2], rest[1::2], strict=True)}
    if kind := options.get("DISTILLER.TYPE"):
        method = "vanilla" if kind == "NONE" else kind
        tag = re.sub("^[^,]+(?=,)", lambda _: method, tag)
    tagged = _params_of_tag(tag)
    if "," in tag and "distiller.temperature" in tagged:  # LSKD names its CIFAR-100 logs so
        params.setdefault("dataset.name", "cifar100")
    params |= tagged
    loss = given.get("distiller.name", params.get("distiller.name", ""))
    stated, notes = _params_of_options(options, loss, given)
    return params | stated, notes


def _params_of_tag(tag: str) -> dict[str, str]:
    """Return the params that a name without options states; {} if the notation is unknown."""
    params: dict[str, str] = {}
    parts = [part.strip() for part in tag.split(",")]
    numbers = [part for part in parts[3:] if _is_number(part)]
    if 3 <= len(parts) <= 6 and len(parts) == 3 + len(numbers) and parts[0]:
        method, teacher, student = parts[:3]
        standardized = bool(numbers)
    elif len(parts := tag.split("_")) in (4, 6) and parts[3] == "ours" and parts[2]:
        # LSKD's other logs.
        teacher, student, method, _, *numbers = parts
        if not all(map(_is_number, numbers)):
            return {}
        standardized = True
        if student in DATASETS:
            params["dataset.name"] = DATASETS[student]
            teacher, student = TEACHERS_OF_TRANSFORMERS[params["dataset.name"]], teacher
    else:
        return {}
    params |= params_of_method(method) | {"teacher.name": teacher, "student.name": student}
    if standardized:
        params["standardize"] = "True"
    # LSKD's weight multiplies both weights of DKD, alpha and beta, as kd_weight does.
    keys = ("distiller.temperature", "distiller.kd_weight", "distiller.loss.beta")
    return params | {
        key: str(number_of(key, text)) for key, text in zip(keys, numbers, strict=False)
    }


def _is_number(text: str) -> bool:
    return re.fullmatch(r"\d+(\.\d*)?", text) is not None


def _params_of_options(
    options: Mapping[str, str], loss: str, given: Mapping[str, str]
) -> tuple[dict[str, str], list[str]]:
    """Return the params that the options in a name state.

    Args:
        options: values of options of the authors' command line, such as SOLVER.LR.
        loss: name of the distiller. Options in the section of another loss are not imported.
        given: params that take precedence over the options.

    Returns:
        The params, and a sentence for each option that is not imported.

    Raises:
        ValueError: If the value of an option is not valid, unless `given` has the param, or all
            params that a run needs (`NEEDED`).
    """
    params: dict[str, str] = {}
    notes: list[str] = []
    for option, text in options.items():
        key, section = OPTIONS.get(option), option.partition(".")[0]
        if key in given or (key is None and option.startswith(IRRELEVANT_OPTIONS)):
            continue
        if key is None or (section in SECTIONS.values() and section != SECTIONS.get(loss.lower())):
            notes.append(f"{option}:{text} in the name is not imported")
            continue
        try:
            if key in PARAMS.values():
                params[key] = param(key, text)
            else:
                params[key] = str(number_of(key, text))
        except ValueError as error:
            if not given.keys() >= set(NEEDED):
                raise ValueError(f"{option} in the name: {error}; give --set {key}=...") from None
            notes.append(f"{option}:{text} in the name is not valid and not imported")
    return params, notes


def params_of_method(text: str) -> dict[str, str]:
    """Return the params that the name of a method states: distiller.name, standardize and M.

    "SD_KD_LS", for example, gives {"distiller.name": "kd", "standardize": "True"}.

    - The suffix _LS, _LSKD or +LS means standardised logits, and so does the loss "lskd".
    - The prefix SD_ or SDD_ means a loss on regions of the logit map, at several scales M. The name
      does not state the scales, so the result has no M. Without the prefix, M is "[1]", the whole
      map.

    Prefix and suffix may be in lower case, and may have "-" in place of "_". Raise ValueError if
    `text` is blank or has a line break.
    """
    name = re.sub(
        r"[-+ ](?=ls(kd)?$)|(?<=^sd)[-+ ]|(?<=^sdd)[-+ ]", "_", text.strip(), flags=re.IGNORECASE
    )
    match = re.fullmatch(r"(sdd?_)?(.+?)(_ls|_lskd)?", name, re.IGNORECASE)
    if match is None:
        raise ValueError(f"method {text!r} is not valid; give kd, dkd, sd_kd_ls, ...")
    scales, loss, standardized = match.groups()
    loss = loss_name(loss)
    params = {"distiller.name": loss, "standardize": str(bool(standardized) or loss == "lskd")}
    if not scales:
        params["M"] = "[1]"
    return params


def loss_name(text: str) -> str:
    """Return the name that sddlskd has for a loss: "kd" for "KD".

    A loss that is not in `LOSSES` keeps its spelling. Blanks around the name are removed.
    """
    name = text.strip()
    if name.lower() in LOSSES:
        return name.lower()
    return name


def network(text: str) -> str:
    """Return the name that sddlskd has for a network: "resnet32x4" for "ResNet32x4" or "res32x4".

    The name of an unknown network is only put into lower case, with "_" for "-" and without the
    suffix "_sdd". Raise ValueError if the result does not start with a letter, or has characters
    other than letters a to z, digits and "_".
    """
    name = text.strip().lower().replace("-", "_").removesuffix("_sdd")
    for pattern, ours in NETWORKS:
        if match := re.fullmatch(pattern, name):
            return match.expand(ours)
    raise ValueError(
        f"{text!r} is not a network name; give --set teacher.name=... student.name=..."
    )


def param(key: str, text: str) -> str:
    """Return the value of a param in the spelling that the trainer writes to MLflow.

    Args:
        key: name of the param in MLflow, one of the values of `schema.PARAMS`.
        text: the value as a person or a log spells it, such as "ResNet8x4", "[1, 2]" or "true".

    Returns:
        The value as text: "resnet8x4", "[1,2]", "True" for these examples. Most other texts, such
        as the name of a data set, are put into lower case.

    Raises:
        ValueError: If `key` is unknown, or if `text` is not a valid value of the param, such as a
            word for a number.
    """
    column = next((column for column, param in PARAMS.items() if param == key), None)
    if column is None:
        raise ValueError(
            f"{key} is not a param that a table uses; choose from {', '.join(PARAMS.values())}"
        )
    if column in ("teacher", "student"):
        return network(text)
    if column == "distiller":
        return loss_name(text)
    if column == "M":
        if not re.fullmatch(r"\[[1-9]\d*(,[1-9]\d*)*\]", canonical_M(text)):
            raise ValueError(f"M={text} is not a list of scales; give a list such as [1,2,4]")
        return canonical_M(text)
    if COLUMNS[column] == "bool":
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{key}={text} is not valid; give true or false")
        return text.capitalize()
    if COLUMNS[column] == "Int64":
        return whole_number(key, text)
    if COLUMNS[column] == "Float64":
        return str(number_of(key, text))
    if column == "teacher_cache":  # a path
        return text.strip()
    return text.strip().lower()


def number_of(key: str, text: str) -> float:
    """Return the finite number that `text` states, as a float.

    `key` is the name of the param or column, for the error message. Raise ValueError if `text` is
    not a number, or is NaN or infinite.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{key}={text} is not a number")
    return value


def whole_number(key: str, text: str) -> str:
    """Return a whole number as a text of digits: "1200" if `text` is "1,200" or "1200.0".

    `key` is the name of the param or column, for the error message. Raise ValueError if `text` is
    not a whole number, or is negative.
    """
    if re.fullmatch(r"\d{1,3}(,\d{3})+", text):  # 1,200
        text = text.replace(",", "")
    value = number_of(key, text)  # pandas writes integers as 240.0 if values are missing
    if value != int(value) or value < 0:
        raise ValueError(f"{key}={text} is not a whole number")
    return str(int(value))


def complete(params: Mapping[str, str]) -> dict[str, str]:
    """Check that a run has the params that it needs, and return them with sddlskd's network names.

    `params` are texts, keyed by MLflow's names. In the result, teacher.name and student.name are as
    `network` returns them. A student that was trained alone (distiller.name is "vanilla") gets
    teacher "none", M "[1]" and standardize "False", whatever `params` says.

    Raise ValueError if one of the params `NEEDED` (data set, teacher, student, distiller, M,
    standardize) is missing or empty, or if `network` refuses a name.
    """
    whole = dict(params)
    if params.get("distiller.name") == "vanilla":
        whole |= {"teacher.name": "none", "M": "[1]", "standardize": "False"}
    if absent := [key for key in NEEDED if not whole.get(key)]:
        raise ValueError(
            f"does not state {', '.join(absent)}; "
            f"give --set {' '.join(f'{key}=...' for key in absent)}"
        )
    return {**whole, **{key: network(whole[key]) for key in ("teacher.name", "student.name")}}
