"""Test the meter in the log and on a terminal."""

import logging
import os
import pty
import subprocess
import sys

import pytest

from sddlskd.terminal import meter as module
from sddlskd.terminal.meter import meter


def test_lines_of_the_log(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "EVERY_S", 0.0)
    with caplog.at_level(logging.INFO, logger="sddlskd"):
        with meter("x.tar", 2_500_000, "bytes") as show:
            show(1_234_567)
        with meter("x.tar", None, "bytes") as show:
            show(1_234_567)
        with meter("resnet8", 100, "images") as show:
            show(50)
    assert caplog.messages == ["x.tar: 1.2 of 2.5 MB", "x.tar: 1.2 MB", "resnet8: 50 of 100 images"]


def test_lines_are_rare(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="sddlskd"), meter("x", 1000, "images") as show:
        for done in range(1000):
            show(done)
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("unit", "shown"), [("bytes", "2.0/2.0 MB"), ("images", "2000000/2000000")]
)
def test_a_bar_on_a_terminal(unit: str, shown: str) -> None:
    code = (
        "from sddlskd.terminal.meter import meter\n"
        f"with meter('what', 2_000_000, {unit!r}) as show: show(2_000_000)"
    )
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen([sys.executable, "-c", code], stderr=theirs, env=environment)
    os.close(theirs)
    said = b""
    while True:
        try:
            part = os.read(ours, 1 << 16)
        except OSError:  # Linux raises this error if the other side is closed
            break
        if not part:
            break
        said += part
    os.close(ours)
    assert process.wait() == 0
    assert b"what" in said
    assert shown.encode() in said
