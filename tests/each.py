"""Check many cases in one test, and name every case that fails."""

from collections.abc import Callable, Iterable
from typing import TypeVar

Case = TypeVar("Case")


def check_each(
    cases: Iterable[Case], check: Callable[[Case], None], name: Callable[[Case], str] = str
) -> None:
    """Call `check` for every case, and fail at the end with the names of those that failed.

    Args:
        cases: The cases, at least one.
        check: A function that raises if a case is wrong.
        name: A function that returns the name of a case for the message.
    """
    cases, failed = list(cases), []
    assert cases, "there is no case to check"
    for case in cases:
        try:
            check(case)
        except Exception as error:
            failed.append(f"{name(case)}: {type(error).__name__}: {error}")
    assert not failed, "\n".join([f"{len(failed)} of {len(cases)} failed", *failed])
