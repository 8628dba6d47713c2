"""Feature and relation losses of distillation, one file per method.

A method is an `nn.Module` that compares the taps of a student with those of its teacher. Taps are
the maps and pooled features that a network shows of a batch. `method(student_taps, teacher_taps,
batch)` returns a scalar. docs/methods.md gives the formulas.
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
    """Return the names of the distillation methods that `create` builds, such as "at" and "crd"."""
    return tuple(_CLASSES)


def create(name: str, student: Taps, teacher: Taps, **options: Any) -> Method:
    """Return a new distillation method (a loss on the maps of two networks) by its name.

    The initial weights of the method's own layers are drawn from torch's global generator.

    Args:
        name: Name of the method, one of `names()`.
        student: Maps of the student (`Taps`) for any batch; only their shapes are read.
        teacher: Maps of the teacher (`Taps`) for any batch; only their shapes are read.
        **options: Keyword arguments of the method's class. Some classes require arguments that
            describe the training, such as `seed`; their names are in the class attribute `facts`.

    Returns:
        An instance of the method's class.

    Raises:
        ValueError: If the name is unknown, or if the class refuses the two networks or the value of
            an option.
        TypeError: If the class has no such option, or if a required one is missing.
    """
    if name not in _CLASSES:
        close = get_close_matches(name, _CLASSES, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"unknown method {name!r}; {hint}choose one of: {', '.join(_CLASSES)}")
    method: Method = getattr(import_module(f"sddlskd.methods.{name}"), _CLASSES[name])(
        student, teacher, **options
    )
    return method
