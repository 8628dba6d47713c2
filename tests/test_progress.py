"""Test the progress display."""

import io
import logging
import re
import sys
from dataclasses import dataclass

import pytest
from rich.console import Console
from rich.logging import RichHandler

from sddlskd.record import ONLY_IN_FILE
from sddlskd.terminal import progress
from sddlskd.terminal.console import log_to_terminal
from sddlskd.terminal.lines import LineHandler
from sddlskd.terminal.progress import ProgressDisplay


@dataclass
class Seen:
    label: str = "resnet8-kd-M-1-2"
    epoch: int = 1
    step: int = 0
    loss: float = float("nan")
    val_top1: float = float("nan")
    state: str = "RUNNING"

    @property
    def alive(self) -> bool:
        return self.state == "RUNNING"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return a list whose only entry is the time of the display, for a test to set."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def view(*runs: Seen, mode: str = "plain") -> ProgressDisplay:
    titles = [f"title of {run.label}" for run in runs]
    return ProgressDisplay(runs, titles, mode=mode, epochs=4, steps=10, batch=64)


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3725, "1:02:05"), (1e6, "277:46:40")],
)
def test_duration(seconds: float, shown: str) -> None:
    assert progress.duration(seconds) == shown


def test_time_left(clock: list[float]) -> None:
    run = Seen()
    seen = view(run)
    assert seen._left() == "?"
    run.step, clock[0] = 5, 110.0  # 5 of 40 steps in 10 s
    assert seen._left() == "1:10"
    assert seen._rate() * seen.batch == 32.0


def test_time_left_after_a_resume_counts_this_process_alone(clock: list[float]) -> None:
    run = Seen(epoch=3)
    seen = view(run)
    run.epoch, clock[0] = 4, 120.0
    assert seen._left() == "0:20"


def test_run_that_failed_does_not_slow_the_others(clock: list[float]) -> None:
    failed, run = Seen(), Seen()
    seen = view(failed, run)
    failed.state, run.epoch, clock[0] = "FAILED", 3, 120.0
    assert seen._left() == "0:20"
    run.state = "FAILED"
    assert seen._left() == "0:00"


def test_plain_lines(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    run = Seen()
    with caplog.at_level(logging.INFO, logger="sddlskd"), view(run) as seen:
        seen.refresh()
        run.epoch, run.loss, run.val_top1, clock[0] = 2, 1.23456, 67.891, 105.0
        seen.epoch(run)
    assert [r.getMessage() for r in caplog.records] == [
        "resnet8-kd-M-1-2  epoch 1/4  loss 1.2346  top-1 67.89  128 images/s  0:15 left"
    ]


def test_off_says_nothing(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    run = Seen()
    with caplog.at_level(logging.INFO), view(run, mode="off") as seen:
        seen.refresh()
        seen.epoch(run)
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


def test_live_table(
    clock: list[float], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    monkeypatch.setattr(progress, "console_of_log", lambda: console)
    runs = [Seen(), Seen(label="wrn_16_1-vanilla", state="FAILED")]
    with caplog.at_level(logging.INFO), view(*runs, mode="auto") as seen:
        runs[0].epoch, runs[0].loss, clock[0] = 2, 1.5, 105.0
        seen.epoch(runs[0])
        runs[0].step, clock[0] = 3, 105.6
        seen.refresh()
        runs[0].step = 4
        seen.refresh()  # too soon after the last one
        shown_inside = out.getvalue()
        runs[0].epoch, runs[0].step = 5, 0
        seen.epoch(runs[0])
    shown = out.getvalue()
    for part in (
        "title of resnet8-kd-M-1-2",
        "2/4",
        "3/10",
        "1.5000",
        "images/s",
        "title of wrn_16_1-vanilla",
        "FAILED",
        "4/4",
        "10/10",
    ):
        assert part in shown
    assert "1/4" in shown_inside  # before the first epoch has ended
    assert "4/10" not in shown_inside
    assert "nan" not in shown
    assert shown.endswith("\x1b[2K")  # it vanishes
    assert not caplog.records  # the table replaces the lines of the log


def test_log_and_table_share_a_console() -> None:
    """Two consoles on one terminal would write into each other's lines."""
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    handler, package = RichHandler(console=console), logging.getLogger("sddlskd")
    package.addHandler(handler)
    try:
        assert view(Seen(), mode="auto").console is console
    finally:
        package.removeHandler(handler)


@pytest.mark.parametrize("on_terminal", [False, True])
def test_log_lines_have_one_form(
    on_terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if on_terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    package = logging.getLogger("sddlskd")
    before = package.handlers[:], package.level, package.propagate
    try:
        log_to_terminal()
        package.info("KD [1,2] seed 0: 3 of 4")
        package.info("a second line in the same second")
        package.info("a line for train.log", extra=ONLY_IN_FILE)
        package.info("%s: exported", "/long" * 40)
    finally:
        package.handlers[:], package.level, package.propagate = before
    shown = capsys.readouterr().err
    assert ("\x1b[" in shown) == on_terminal
    assert "KD [1,2] seed 0: 3 of 4" in shown  # without colours inside
    lines = re.sub(r"\x1b\[[\d;]*m", "", shown).splitlines()
    assert lines[-1].endswith(f"{'/long' * 40}: exported") or lines[-2].endswith("/long:")
    lines = lines[:2]
    assert all(re.match(r"\d\d:\d\d:\d\d \S", line) for line in lines)


def test_not_a_terminal_gets_plain_lines() -> None:
    assert view(Seen(), mode="auto").live is None
    assert view(Seen(), mode="auto").plain


class Closed(io.StringIO):
    """Stream of a terminal that was closed."""

    def write(self, text: str) -> int:
        raise OSError(5, "Input/output error")


def test_a_line_of_the_log_does_not_end_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Closed())  # a handler reports its own error there
    handler = LineHandler(console=Console(file=Closed(), force_terminal=True))
    handler.emit(logging.makeLogRecord({"msg": "stopping after this step"}))


def test_a_closed_terminal_does_not_end_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=Closed(), force_terminal=True)
    monkeypatch.setattr(progress, "console_of_log", lambda: console)
    run = Seen()
    with view(run, mode="auto") as seen:
        run.epoch = 2
        seen.epoch(run)
        assert seen.live
