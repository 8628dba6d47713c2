"""Define the names of methods, pairs and settings that tables, figures and report show.

A method has the papers' name, followed by its scales: SD-KD+LS [1,2,4].
"""

import re
from typing import Any

__all__ = [
    "BY_YEAR",
    "PAPERS_LOSSES",
    "SUFFIXES",
    "counted",
    "method_name",
    "pair_name",
    "reading_order",
    "row_key",
    "row_name",
    "scales_order",
    "setting_name",
    "value_name",
]

PAPERS_LOSSES = {
    "ab": "AB",
    "abkd": "ABKD",
    "at": "AT",
    "cat_kd": "CAT-KD",
    "cc": "CC",
    "crd": "CRD",
    "ctkd": "CTKD",
    "dist": "DIST",
    "dkd": "DKD",
    "dot": "DOT",
    "fitnet": "FitNet",
    "fsp": "FSP",
    "ft": "FT",
    "gdkd": "GDKD",
    "kd": "KD",
    "kd_ls_batch": "LumiNet",
    "kd_ls_scaled": "NormKD",
    "kd_dot": "KD+DOT",
    "kdsvd": "KDSVD",
    "locality_guidance": "locality guidance",
    "lskd": "LSKD",
    "mgd": "MGD",
    "mld": "MLD",
    "mlkd": "MLKD",
    "nkd": "NKD",
    "nst": "NST",
    "ofd": "OFD",
    "pkt": "PKT",
    "reviewkd": "ReviewKD",
    "rkd": "RKD",
    "rld": "RLD",
    "semckd": "SemCKD",
    "semckd_without_kd": "SemCKD without KD",
    "simkd": "SimKD",
    "skd": "SKD",
    "sld": "SLD",
    "sp": "SP",
    "ttm": "TTM",
    "vid": "VID",
    "wcord": "WCoRD",
    "wttm": "WTTM",
}
"""Names of the losses that the papers compare, as the papers spell them."""

PAPERS_NAMES = {
    name.casefold() for names in (PAPERS_LOSSES, PAPERS_LOSSES.values()) for name in names
}
SUFFIXES = {"_ls": "+LS", "_ls_batch": "+BS", "_ls_scaled": "+CS"}
"""Suffixes of losses on standardised logits, and what tables write for them."""
BY_YEAR = {
    2015: ("kd", "fitnet"),
    2017: ("at", "fsp", "nst"),
    2018: ("ft", "kdsvd", "pkt"),
    2019: ("ab", "cc", "ofd", "rkd", "sp", "vid"),
    2020: ("crd",),
    2021: ("reviewkd", "semckd", "semckd_without_kd", "wcord"),
    2022: ("dkd", "dist", "locality_guidance", "mgd", "simkd"),
    2023: ("cat_kd", "ctkd", "dot", "kd_dot", "kd_ls_scaled", "mld", "mlkd", "nkd"),
    2024: ("lskd", "ttm", "wttm"),
    2025: ("abkd", "gdkd", "kd_ls_batch", "rld", "sld"),
    2026: ("skd",),
}
"""The losses of `PAPERS_LOSSES` by the year in which they were published.

DKD (March 2022) comes before DIST (May 2022); other losses of one year are in alphabetical order.
"""

NO_LOSS = {
    "": "method not known",
    "unknown": "method not known",
    "teacher": "teacher",
    "vanilla": "student alone",
}


def method_name(method: str, M: str = "[1]") -> str:
    """Return the name of a method as the papers spell it, such as "SD-KD+LS [1,2,4]".

    A loss that is not in `PAPERS_LOSSES` keeps its spelling. "vanilla" gives "student alone",
    "teacher" gives "teacher", and "" or "unknown" gives "method not known", all without scales.

    Args:
        method: method as `schema.method_of` spells it, such as "sd_kd_ls" or "sd_kd+crd".
        M: scales of the method, such as "[1,2,4]"; a scale m stands for m x m regions of the logit
            map. For "[1]" (the whole map) and "", the name has no scales.
    """
    if method in NO_LOSS:
        return NO_LOSS[method]
    name = "+".join(_part_name(part) for part in method.split("+"))
    if M in ("", "[1]"):
        return name
    return f"{name} {M}"


def reading_order(key: str) -> tuple[Any, ...]:
    """Return the place of a row, by its key (`row_key`), among the rows of a table.

    The teacher comes first, then the student alone. Methods follow by the year in which their first
    loss was published, and losses of nobody's paper come last, by their names. Among the rows of a
    loss, sums with other losses come after the loss alone, SD- after the whole map, +LS after plain
    logits, and many scales after few.
    """
    method, _, scales = key.partition(" [")
    if method in ("teacher", "vanilla"):
        return (method != "teacher", 0)
    first, *others = method.split("+")
    loss, suffix = _loss_and_suffix(first)
    losses = [loss for of_year in BY_YEAR.values() for loss in of_year]
    rank = losses.index(loss) if loss in losses else len(losses)
    has_regions = first.startswith("sd_")
    return (2, rank, loss, others, has_regions, suffix, scales_order(f"[{scales}"))


def scales_order(M: str) -> tuple[int, list[int]]:
    """Return the sort key of scales such as "[1,2,4]": few before many, then by value."""
    scales = [int(scale) for scale in re.findall(r"\d+", M)]
    return len(scales), scales


def _loss_and_suffix(part: str) -> tuple[str, str]:
    """Return one loss of a method without its prefix sd_ and its suffix, and the suffix.

    A suffix that belongs to a loss with a name of its own, as in LumiNet, stays with the loss.
    """
    loss = part.removeprefix("sd_")
    if loss in PAPERS_LOSSES:
        return loss, ""
    suffix = next((suffix for suffix in SUFFIXES if loss.endswith(suffix)), "")
    return loss.removesuffix(suffix), suffix


def _part_name(part: str) -> str:
    """Return the papers' name of one loss of a method, such as SD-KD+LS for `sd_kd_ls`."""
    loss, suffix = _loss_and_suffix(part)
    own = loss
    if loss not in PAPERS_LOSSES and loss.casefold() in PAPERS_NAMES:
        own = f"{loss} (own)"  # a row of its own, beside that of the published loss
    name = f"{PAPERS_LOSSES.get(loss, own)}{SUFFIXES.get(suffix, '')}"
    if part.startswith("sd_"):
        name = f"SD-{name}"
    return name


def row_key(method: str, M: str) -> str:
    """Return the key of a table row: the method and its scales M, such as "sd_kd [1,2]" or "kd".

    `method` is as `schema.method_of` spells it; "" becomes "unknown". A scale m stands for m x m
    regions of the logit map. For "[1]" (the whole map) and "", the key is the method alone.
    """
    return f"{method or 'unknown'} {M or '[1]'}".removesuffix(" [1]")


def row_name(key: str) -> str:
    """Return the label of a row for its key (`row_key`): "SD-KD [1,2]" for "sd_kd [1,2]"."""
    method, blank, scales = key.partition(" [")
    if not blank:
        return method_name(method)
    return method_name(method, f"[{scales}")


def pair_name(teacher: str, student: str) -> str:
    """Return the name of a pair, such as "resnet56 → resnet20".

    If `teacher` is "none", the student is trained alone: "resnet20 alone".
    """
    if teacher == "none":
        return f"{student} alone"
    return f"{teacher} → {student}"


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, which is given in the singular: "1 run", "2 runs"."""
    if number == 1:
        return f"1 {noun}"
    return f"{number} {noun}s"


def value_name(value: Any) -> str:
    """Return the value of a setting as text.

    None and "" give "unknown". The text "None", which MLflow has for a setting without a value,
    gives "null", as it is typed. A float has at most 12 significant digits and no trailing zeros:
    "4" for 4.0. Other values are written as by `str`.
    """
    if value is None or value == "":
        return "unknown"
    if value == "None":
        return "null"
    if isinstance(value, float):
        return f"{value:.12g}"
    return str(value)


def setting_name(setting: str, value: Any) -> str:
    """Return a setting as the text "name=value", such as "temperature=4".

    `setting` is the name. The value is written as by `value_name`: "4" for 4.0.
    """
    return f"{setting}={value_name(value)}"
