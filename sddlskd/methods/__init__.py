"""Feature and relation losses, one file per method.

A method is an `nn.Module` that compares the taps of student and teacher:
`method(student_taps, teacher_taps, batch)` returns a scalar. docs/methods.md gives the formulas.
"""

from difflib import get_close_matches
from importlib import import_module
from typing import Any

from sddlskd.methods.base import Method
from sddlskd.models import Taps

__all__ = ["Method", "Taps", "create", "names"]

_CLASSES = {
    "ab": "AB",
    "at": "AT",
    "cat_kd": "CATKD",
    "cc": "CC",
    "crd": "CRD",
    "fitnet": "FitNet",
    "fsp": "FSP",
    "ft": "FT",
    "kdsvd": "KDSVD",
    "mgd": "MGD",
    "mlkd": "MLKD",
    "nst": "NST",
    "ofd": "OFD",
    "pkt": "PKT",
    "reviewkd": "ReviewKD",
    "rkd": "RKD",
    "semckd": "SemCKD",
    "simkd": "SimKD",
    "sp": "SP",
    "vid": "VID",
}


def names() -> tuple[str, ...]:
    """Return the names of all methods; each is a module of this package."""
    return tuple(_CLASSES)


def create(name: str, student: Taps, teacher: Taps, **options: Any) -> Method:
    """Return a method for two networks, with connectors drawn from torch's global generator.

    Args:
        name: One of `names()`.
        student: Taps of the student for any batch; only their shapes are read.
        teacher: Taps of the teacher for any batch; only their shapes are read.
        **options: Further arguments of the method, with the paper's values as defaults.

    Raises:
        ValueError: The name is unknown, or the method cannot serve these networks.
    """
    if name not in _CLASSES:
        close = get_close_matches(name, _CLASSES, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"unknown method {name!r}; {hint}choose one of: {', '.join(_CLASSES)}")
    method: Method = getattr(import_module(f"sddlskd.methods.{name}"), _CLASSES[name])(
        student, teacher, **options
    )
    return method
