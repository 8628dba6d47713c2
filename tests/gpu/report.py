"""Run checks and measurements one by one, each within a time limit, and write what they found."""

import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import FrameType

PASS, FAIL, CANNOT = "pass", "FAIL", "cannot run"


class Differs(AssertionError):
    """Raised by a check that found a difference; the message says what differs."""


class CannotRun(Exception):
    """Raised by a check that this machine cannot run; the message says what it lacks."""


@dataclass(frozen=True)
class Check:
    """A check or a measurement.

    Attributes:
        name: what is checked, in a few words.
        run: does it and returns what it found: one line of a table for a check, any Markdown for a
            measurement.
        limit_s: seconds after which it is stopped.
        judged: whether it fails if it takes longer. A measurement then cannot run.
    """

    name: str
    run: Callable[[], str]
    limit_s: float = 60.0
    judged: bool = True


@dataclass
class Outcome:
    """What became of a check.

    Attributes:
        name: name of the check.
        verdict: PASS, FAIL or CANNOT.
        found: what it found, or why it failed or cannot run.
        seconds: how long it took.
        trace: traceback of an error that the check did not raise on purpose; "" if there is none.
    """

    name: str
    verdict: str
    found: str
    seconds: float
    trace: str = field(default="", repr=False)


class Clock:
    """The time that is left for the whole report.

    Args:
        seconds: length of the report.
    """

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Return the seconds that are left."""
        return self._end - time.monotonic()


def with_patience(checks: Sequence[Check], factor: float) -> list[Check]:
    """Return the checks with `factor` times their limits."""
    return [replace(check, limit_s=factor * check.limit_s) for check in checks]


def run_all(
    checks: Sequence[Check], clock: Clock, tell: Callable[[Outcome], None]
) -> list[Outcome]:
    """Return the outcome of each check; an error ends one check, not the report.

    Args:
        checks: the checks, in order.
        clock: the time that is left. A check that would begin after it cannot run.
        tell: called with each outcome at once.
    """
    outcomes = []
    for check in checks:
        outcome = _outcome(check, min(check.limit_s, clock.left))
        outcomes.append(outcome)
        tell(outcome)
    return outcomes


def _outcome(check: Check, limit_s: float) -> Outcome:
    began = time.monotonic()
    trace = ""
    try:
        if limit_s < 1:
            raise CannotRun("the time of the report was over")
        with time_limit(limit_s):
            verdict, found = PASS, check.run()
    except CannotRun as why:
        verdict, found = CANNOT, str(why)
    except Differs as difference:
        verdict, found = FAIL, str(difference)
    except Exception as error:  # the next checks run all the same
        verdict, found = FAIL, f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
        trace = "".join(traceback.format_exception(error))
        # Code that the limit interrupts may raise an error of its own.
        if time.monotonic() - began >= limit_s:
            found, trace = f"stopped after {limit_s:.0f} s", ""
            if not check.judged:
                verdict = CANNOT
    return Outcome(check.name, verdict, found, time.monotonic() - began, trace)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block after so many seconds."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"stopped after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table; a pipe inside a cell is escaped."""
    lines = [head, ["---"] * len(head), *rows]
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def checks_section(outcomes: Sequence[Outcome]) -> str:
    """Return the section of the checks, with the tracebacks below the table."""
    rows = [(o.name, o.verdict, o.found, f"{o.seconds:.1f}") for o in outcomes]
    parts = ["## Right", table(("check", "outcome", "found", "seconds"), rows)]
    parts += [f"{o.name}:\n\n```\n{o.trace.strip()}\n```" for o in outcomes if o.trace]
    return "\n\n".join(parts)


def measurements_section(outcomes: Sequence[Outcome]) -> str:
    """Return the section of the measurements, one heading for each."""
    parts = ["## Fast"]
    for o in outcomes:
        found = o.found
        if o.verdict != PASS:
            found = f"Not measured ({o.verdict}): {o.found}"
        parts += [f"### {o.name}", found, f"({o.seconds:.1f} s)"]
        if o.trace:
            parts.append(f"```\n{o.trace.strip()}\n```")
    return "\n\n".join(parts)
