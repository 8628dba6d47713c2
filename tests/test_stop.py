"""Test stop requests: obeyed at once if nothing would be lost, otherwise after the step."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from sddlskd.training import group
from sddlskd.training.fit import fit
from sddlskd.training.stop import Stop
from tests.tiny import leave_teacher, tiny


@pytest.mark.usefixtures("a_terminal_that_may_close")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP])
def test_a_signal_is_noted_and_handlers_are_given_back(number: signal.Signals) -> None:
    before, stop = signal.getsignal(number), Stop()
    with stop.listening():
        assert stop.reason == "stopped"
        signal.raise_signal(number)
        assert stop.signal is number
        assert stop.reason == f"stopped by {number.name}"
    assert signal.getsignal(number) is before


def test_nohup_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    before, stop = signal.signal(signal.SIGHUP, signal.SIG_IGN), Stop()
    try:
        with stop.listening():
            signal.raise_signal(signal.SIGHUP)
        assert stop.signal is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_only_a_person_ends_it_by_asking_twice() -> None:
    stop = Stop(warned=", to go on later")
    with stop.listening():
        for number in (signal.SIGUSR2, signal.SIGUSR2, signal.SIGTERM, signal.SIGTERM):
            signal.raise_signal(number)
        assert stop.reason == "stopped by SIGUSR2, to go on later"  # the first signal counts
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_worker_leaves_the_words_to_its_launcher_and_names_its_death(
    caplog: pytest.LogCaptureFixture,
) -> None:
    stop = Stop(launcher=os.getppid())
    with stop.listening():
        signal.raise_signal(signal.SIGINT)
    assert (stop.reason, caplog.messages) == ("stopped by SIGINT", [])
    stop = Stop(launcher=os.getpid())  # which is not the parent any more
    with stop.listening():
        signal.raise_signal(signal.SIGTERM)
    assert stop.reason == "the launching process died"
    assert caplog.messages == ["SIGTERM: stopping after this step with all checkpoints saved"]


def test_it_acts_at_once_where_nothing_would_be_lost() -> None:
    stop = Stop()
    with stop.listening():
        with stop.acting(at_once=True), stop.acting(at_once=False):
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            stop.acting(at_once=True).__enter__()


@pytest.mark.parametrize("phase", ["build_data", "build_teachers"])
def test_before_the_first_step_a_job_stops_at_once(
    phase: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tiny(tmp_path)
    real = getattr(group, phase)

    def asked(*arguments: Any, **options: Any) -> Any:
        signal.raise_signal(signal.SIGUSR2)
        return real(*arguments, **options)

    monkeypatch.setattr(group, phase, asked)
    stop = Stop()
    with stop.listening():
        with pytest.raises(KeyboardInterrupt):
            fit([job], stop=stop)
        assert stop.signal is signal.SIGUSR2
    assert not Path(job.run_dir).exists()


def test_what_is_trained_is_finished_though_asked_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_teacher(tmp_path)
    job, real = tiny(tmp_path), group._finish

    def asked(*arguments: Any) -> None:
        signal.raise_signal(signal.SIGUSR2)
        real(*arguments)

    monkeypatch.setattr(group, "_finish", asked)
    (result,) = fit([job])
    assert result["status"] == "FINISHED"
