"""Test that a process ends with its parent, whatever it is doing."""

import subprocess
import sys
from pathlib import Path

import pytest

from sddlskd.processes.exit_codes import ExitCode
from tests.test_sweeps import home as home
from tests.test_sweeps import network, start, wait_for

# A parent that starts the program argv[1] with its own process id, and waits to be killed.
PARENT = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], str(os.getpid())])
print(child.pid, flush=True)
time.sleep(600)
"""
# A child does something in `busy` after it has arranged its end.
CHILD = """
import signal, sys, time
from sddlskd.processes import parent
parent.GRACE_S, parent.POLL_S = 0.5, 0.1
{ending}
{busy}
"""
AT_ONCE = "parent.end_with_parent(int(sys.argv[1]))"
SAVING = "parent.save_and_end_with_parent(int(sys.argv[1]), signal.SIGTERM)"
IGNORING = "signal.signal(signal.SIGTERM, lambda number, frame: None)"
SAVES = "signal.signal(signal.SIGTERM, lambda number, frame: (open({!r}, 'w').close(), sys.exit()))"
READY = "print('ready', flush=True)"
SLEEP = f"{READY}; time.sleep(600)"
LOOP = f"{READY}\nwhile True: pass"


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def kill_parent_of(child: str) -> int:
    """Kill the parent of a process that runs the program `child`; return the id of the process."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, child], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout
    lines = [parent.stdout.readline(), parent.stdout.readline()]
    assert "ready\n" in lines
    (pid,) = (int(line) for line in lines if line != "ready\n")
    assert alive(pid)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    return pid


@pytest.mark.parametrize("busy", [SLEEP, LOOP, f"{IGNORING}; {LOOP}"])
@pytest.mark.parametrize("ending", [AT_ONCE, SAVING])
def test_a_process_ends_with_its_parent(ending: str, busy: str) -> None:
    pid = kill_parent_of(CHILD.format(ending=ending, busy=busy.replace("; while", "\nwhile")))
    wait_for(lambda: not alive(pid), 10)


def test_a_process_may_save_its_state_first(tmp_path: Path) -> None:
    saves = SAVES.format(str(tmp_path / "saved"))
    pid = kill_parent_of(CHILD.format(ending=f"{saves}\n{SAVING}", busy=SLEEP))
    wait_for(lambda: not alive(pid), 10)
    assert (tmp_path / "saved").exists()


@pytest.mark.parametrize("ending", [AT_ONCE, SAVING])
def test_a_process_whose_parent_is_dead_ends_at_once(ending: str) -> None:
    nobody = subprocess.Popen(["true"])
    nobody.wait()
    child = [sys.executable, "-c", CHILD.format(ending=ending, busy=SLEEP), str(nobody.pid)]
    done = subprocess.run(child, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (ExitCode.PARENT_GONE, "")


def test_the_check_of_the_jobs_ends_with_the_command(home: Path) -> None:
    process = start(home, *network("Waits", seconds=300).split(), "M=[1],[2]")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    wait_for(lambda: children.read_text().split())
    (pid,) = map(int, children.read_text().split())
    wait_for(lambda: b"sddlskd.sweeps.precheck" in Path(f"/proc/{pid}/cmdline").read_bytes())
    process.kill()
    process.communicate()
    wait_for(lambda: not alive(pid), 60)


def test_the_codes_are_those_that_scripts_and_schedulers_know() -> None:
    assert {code.name: int(code) for code in ExitCode} == {
        "TOO_LARGE": 75,
        "BUSY": 76,
        "NO_DEVICE": 77,
        "REQUEUE": 85,
        "STOPPED": 130,
        "WARNED_EARLY": 140,
        "PARENT_GONE": 143,
        "NO_DEVICE_0": 200,
    }
