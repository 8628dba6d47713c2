"""Test the status of a sweep: what it holds, how it is printed, and its JSON."""

import json
import os
import signal
import socket
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from sddlskd import config as cfg
from sddlskd import record
from sddlskd.sweeps.__main__ import main
from sddlskd.sweeps.manifest import (
    local_launch,
    marked_as_running,
    refusal_of_second_launch,
)
from sddlskd.sweeps.report import print_status
from sddlskd.sweeps.search import DATABASE
from sddlskd.sweeps.status import JobStatus, SweepStatus, status_of
from tests.tiny import tiny

EPOCHS = 8


def leave_job(
    home: Path, seed: int, top1: tuple[float, ...] = (), more: tuple[str, ...] = (), **result: Any
) -> Path:
    """Leave the record of a job whose epochs took 10 seconds each; return its run directory."""
    job = tiny(home, f"seed={seed}", f"trainer.epochs={EPOCHS}", *more, teacher=False)
    folder = record.freeze(job)
    rows = [
        {"epoch": epoch, "val/top1": value, "time/epoch_s": 10.0}
        for epoch, value in enumerate(top1, start=1)
    ]
    if result:
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        (folder / "result.json").write_text(json.dumps({"reason": "", **result}))
    return folder


def leave_sweep(home: Path, *folders: Path) -> Path:
    sweep = home / "runs/sweeps/mine"
    sweep.mkdir(parents=True)
    content = {
        "name": "mine",
        "command": "python -m sddlskd.train -m seed=0,1",
        "folder": "/some where",
        "time": 0,
        "jobs": [str(folder) for folder in folders],
    }
    (sweep / "sweep.json").write_text(json.dumps(content))
    return sweep


def in_slurm(sweep: Path, **tasks: Path) -> None:
    submissions = [
        {"job": f"17_{name[-1]}", "run_dirs": [str(folder)], "log": "/none"}
        for name, folder in tasks.items()
    ]
    (sweep / "slurm.json").write_text(json.dumps(submissions))


def fake_slurm(folder: Path, monkeypatch: pytest.MonkeyPatch, **programs: str) -> None:
    folder.mkdir()
    for name, program in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{program}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Return the folder of a sweep with a finished, a failed, a stopped and two new jobs."""
    finished = leave_job(
        tmp_path, 0, (70.0, 71.0) * 4, status="FINISHED", best_top1=71.239, epochs=8, seconds=80.0
    )
    failed = leave_job(tmp_path, 1, (33.3,), status="FAILED", reason="NonFiniteLoss: bad")
    stopped = leave_job(
        tmp_path, 2, (41.0, 43.0, 42.0), status="KILLED", reason="stopped", requeues=2
    )
    new = leave_job(tmp_path, 3)
    return leave_sweep(tmp_path, finished, failed, stopped, new, tmp_path / "runs/not-frozen")


def test_what_the_status_of_a_sweep_holds(sweep: Path) -> None:
    found = status_of(sweep)
    assert (found.sweep, found.slurm_error) == ("mine", "")
    assert found.counts == {"finished": 1, "killed": 1, "failed": 1, "new": 2}
    assert found.command == "cd '/some where' && python -m sddlskd.train -m seed=0,1"
    # Seven epochs of the failed job are left, five of the stopped one, and eight of the new one;
    # the other is not known.
    assert [job.seconds_left for job in found.jobs] == [0, 70, 50, 80, None]
    assert found.seconds_left == pytest.approx((7 + 5 + 8) * 10.0)
    assert (found.running, found.teachers, found.devices) == (False, [], 1)
    jobs = [(job.state, job.epochs_done, job.epochs, job.top1, job.reason) for job in found.jobs]
    assert jobs == [
        ("finished", 8, 8, 71.239, ""),
        ("failed", 1, 8, 33.3, "NonFiniteLoss: bad"),
        ("killed", 3, 8, 43.0, "stopped"),
        ("new", 0, 8, None, ""),
        ("new", 0, 0, None, ""),
    ]
    assert [job.requeues for job in found.jobs] == [0, 0, 2, 0, 0]
    assert {job.slurm_job for job in found.jobs} == {None}


def test_jobs_with_several_labels_show_their_map(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = leave_job(tmp_path, 0, (70.0,), status="FINISHED", best_top1=70.0, best_mAP=51.5)
    running = leave_job(tmp_path, 1, (60.0,), status="KILLED")
    row = {"epoch": 1, "val/top1": 60.0, "val/mAP": 41.25, "time/epoch_s": 1.0}
    (running / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    leave_sweep(tmp_path, done, running)
    main(["status", "mine", "--home", str(tmp_path)])
    told = capsys.readouterr().out
    assert "top-1 70.00  mAP 51.50" in told
    assert "top-1 60.00  mAP 41.25" in told


def test_it_tells_jobs_of_one_name_by_their_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = [(0, "2", "0.25"), (0, "4.125", "0.25"), (1, "2", "0.25")]
    folders = [
        leave_job(
            tmp_path,
            seed,
            more=("recipe=kd", f"distiller.temperature={T}", f"dataset.train_fraction={part}"),
        )
        for seed, T, part in chosen
    ]
    sweep = leave_sweep(tmp_path, *folders, tmp_path / "runs/not-frozen")
    told = ["temperature=2", "temperature=4.125", "", ""]
    assert [job.settings for job in status_of(sweep).jobs] == told
    main(["status", "mine", "--home", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()[1:5]
    names = [folder.name for folder in folders] + ["not-frozen"]
    for line, name, settings in zip(lines, names, told, strict=True):
        assert line.endswith(f"epochs  {name}  {settings}".rstrip())


def test_a_search_shows_what_each_trial_tries(tmp_path: Path) -> None:
    chosen = [("0", "2", "[1]"), ("1", "3.4567891", "[1]"), ("1", "5", "[1,2]")]
    folders = [
        leave_job(tmp_path, int(seed), more=("recipe=kd", f"distiller.temperature={T}", f"M={M}"))
        for seed, T, M in chosen
    ]
    sweep = leave_sweep(tmp_path, *folders)
    assert {job.settings for job in status_of(sweep).jobs} == {""}  # the names tell them apart
    (sweep / DATABASE).touch()
    manifest = json.loads((sweep / "sweep.json").read_text())
    manifest["command"] = (
        "python -m sddlskd.train -m --config-dir 'my conf' hydra/sweeper=optuna recipe=kd "
        "'distiller.temperature=interval(1.0,8.0)' 'M=[1],[1,2]' 'seed=int(interval(0,9))' "
        "optimizer.lr=0.1,0.2 'home=a b'"
    )
    (sweep / "sweep.json").write_text(json.dumps(manifest))
    assert [job.settings for job in status_of(sweep).jobs] == [
        "temperature=2", "temperature=3.45679", "temperature=5",
    ]  # fmt: skip


def test_it_is_printed(sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [Path(path).name for path in json.loads((sweep / "sweep.json").read_text())["jobs"]]
    main(["status", "mine", "--home", str(tmp_path)])
    assert capsys.readouterr().out.splitlines() == [
        "sweep mine: 5 jobs: 1 finished, 1 killed, 1 failed, 2 new",
        f"  finished  8/8 epochs  top-1 71.24  {names[0]}",
        f"  failed    1/8 epochs  top-1 33.30  {names[1]}  NonFiniteLoss: bad",
        f"  killed    3/8 epochs  top-1 43.00  {names[2]}  stopped  requeued 2 times",
        f"  new       0/8 epochs  {names[3]}",
        "  new       0/0 epochs  not-frozen",
        "time left: about 3:20 on one device for 3 of 4 jobs, with 1 failed job, which the command "
        "continues",
        "to finish it: cd '/some where' && python -m sddlskd.train -m seed=0,1",
    ]


def test_it_tells_that_the_sweep_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ("teacher=resnet14", "teacher.train_if_missing=true", "teacher.train_epochs=3")
    jobs = [tiny(tmp_path, f"seed={seed}", *more) for seed in (0, 1)]
    sweep = leave_sweep(tmp_path, *(record.freeze(job) for job in jobs))
    teacher = record.Record(cfg.teacher_job(jobs[0]))
    teacher.result("RUNNING")
    manifest = json.loads((sweep / "sweep.json").read_text())
    (sweep / "sweep.json").write_text(json.dumps(manifest | {"devices": 4}))
    with marked_as_running(sweep), marked_as_running(sweep):
        main(["status", "mine", "--home", str(tmp_path)])
        told = capsys.readouterr().out
        assert "the sweep is running; it trains the teacher resnet14: 0/3 epochs\n" in told
        assert "to finish it" not in told
        main(["logs", "mine", "--home", str(tmp_path)])
        told = capsys.readouterr().out
        assert told == (
            f"{teacher.folder / 'train.log'}  (a teacher in training)\n"
            "not shown: 2 new; the log of a run is RUN_DIRECTORY/train.log\n"
        )
    teacher.close()
    found = status_of(sweep)
    assert (found.running, found.teachers, found.devices) == (False, [], 4)
    print_status(replace(found, jobs=[replace(job, seconds_left=30.0) for job in found.jobs]))
    told = capsys.readouterr().out
    assert "time left: about 0:30 on 2 devices\nto finish it: cd" in told


def test_the_sweeps_are_listed_without_a_name(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in ([], ["status"]):
        main([*arguments, "--home", str(tmp_path)])
        head, line = capsys.readouterr().out.splitlines()
        assert head.split("  ")[0] == "sweep"
        assert line.startswith("mine   5     1         1       3         1970-01-0")
    with marked_as_running(sweep):
        main(["--json", "--home", str(tmp_path)])
    (summary,) = json.loads(capsys.readouterr().out)
    assert (summary["name"], summary["running"], summary["time"]) == ("mine", True, 0)
    main(["--home", str(tmp_path / "empty")])
    assert capsys.readouterr().out.startswith("there is no sweep in ")
    with pytest.raises(SystemExit) as caught:
        main(["logs"])
    assert caught.value.code == 2


def test_jobs_stand_in_the_order_of_the_tables(tmp_path: Path) -> None:
    recipes = ("crd", "sd_kd_ls", "vanilla", "kd")
    jobs = [tiny(tmp_path, f"recipe={recipe}") for recipe in recipes]
    sweep = leave_sweep(tmp_path, *(record.freeze(job) for job in jobs))
    order = [jobs[index].run_dir for index in (2, 3, 1, 0)]
    assert [job.run_dir for job in status_of(sweep).jobs] == order


def test_failed_jobs_that_the_command_leaves_alone_take_no_time(tmp_path: Path) -> None:
    sweep = leave_sweep(tmp_path, leave_job(tmp_path, 1, (33.3,), status="FAILED"))
    assert status_of(sweep).seconds_left == pytest.approx((EPOCHS - 1) * 10.0)
    manifest = json.loads((sweep / "sweep.json").read_text())
    manifest["command"] += " sweep.rerun=none"
    (sweep / "sweep.json").write_text(json.dumps(manifest))
    assert status_of(sweep).seconds_left == 0


def test_a_closed_pipe_ends_the_output_silently(
    sweep: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        main(["status", str(sweep)])
    assert capfd.readouterr() == ("", "")


def test_a_single_job_is_no_plural(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = leave_job(tmp_path, 0, (41.0,), ("trainer.epochs=1",), status="KILLED", requeues=1)
    leave_sweep(tmp_path, alone)
    main(["status", "mine", "--home", str(tmp_path)])
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "sweep mine: 1 job: 1 killed"
    assert told[1] == f"  killed    1/1 epoch  top-1 41.00  {alone.name}  requeued 1 time"


def test_the_json_holds_the_same(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["status", str(sweep), "--home", str(tmp_path / "elsewhere"), "--json"])
    content = json.loads(capsys.readouterr().out)
    assert content == asdict(status_of(sweep))
    assert list(content) == list(SweepStatus.__annotations__)
    assert [list(job) for job in content["jobs"]] == [list(JobStatus.__annotations__)] * 5


@pytest.mark.parametrize("command", ["logs", "cancel"])
def test_only_the_status_is_json(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "mine", "--home", str(tmp_path), "--json"])
    assert caught.value.code == 2
    assert f"--json belongs to status, not to {command}" in capsys.readouterr().err


def test_a_sweep_without_slurm_shows_the_logs_of_its_runs(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [Path(path) for path in json.loads((sweep / "sweep.json").read_text())["jobs"]]
    (folders[1] / "train.log").write_text("".join(f"line {number}\n" for number in range(9)))
    main(["logs", str(sweep)])
    assert capsys.readouterr().out.splitlines() == [
        f"{folders[1] / 'train.log'}  (failed)",
        *(f"    line {number}" for number in range(4, 9)),
        f"{folders[2] / 'train.log'}  (killed)",
        "    not started yet",
        "not shown: 1 finished, 2 new; the log of a run is RUN_DIRECTORY/train.log",
    ]


def test_the_process_of_a_launch_is_stopped(
    sweep: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    main(["cancel", str(sweep)])
    assert capsys.readouterr().out.startswith(
        "nothing runs here, and SLURM has no job of this sweep"
    )
    signals: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda *call: signals.append(call))
    with marked_as_running(sweep, "mine", ["a", "b"]):
        assert refusal_of_second_launch(sweep, "mine", ["c"]) == ""
        with marked_as_running(sweep, "mine", ["c"]):  # jobs of its own
            pass
        main(["cancel", str(sweep)])
        with (
            pytest.raises(ValueError, match=f"process {os.getpid()} runs sweep mine already"),
            marked_as_running(sweep, "mine", ["b", "c"]),
        ):
            pass
        monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
        assert refusal_of_second_launch(sweep, "mine", ["b"]) == ""
        capsys.readouterr()
        main(["cancel", str(sweep)])
        assert f"type there: kill -TERM {os.getpid()}" in capsys.readouterr().out
    assert signals == [(os.getpid(), signal.SIGTERM)]


def test_a_running_job_shows_its_best_epoch_so_far(tmp_path: Path) -> None:
    folder = leave_job(tmp_path, 0, (19.0, 91.0), status="RUNNING", best_top1=19.0, reason="old")
    (job,) = jobs_while_open(folder, leave_sweep(tmp_path, folder))
    assert (job.state, job.top1, job.reason) == ("running", 91.0, "")


def jobs_while_open(folder: Path, sweep: Path) -> list[JobStatus]:
    opened = record.Record(cfg.load(folder / "config.yaml"))
    try:
        return status_of(sweep).jobs
    finally:
        opened.close()


def test_the_group_shares_the_time_of_an_epoch(tmp_path: Path) -> None:
    half = leave_job(tmp_path, 0, (1.0,) * 4, status="KILLED", group_size=2)
    assert status_of(leave_sweep(tmp_path, half)).seconds_left == pytest.approx(4 * 5.0)


def test_without_an_epoch_the_time_left_is_not_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = leave_sweep(tmp_path, leave_job(tmp_path, 0))
    assert status_of(sweep).seconds_left is None
    main(["status", str(sweep)])
    assert "time left: not known yet\n" in capsys.readouterr().out


def test_a_finished_sweep_needs_no_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = leave_job(tmp_path, 0, (50.0,) * 8, status="FINISHED", best_top1=50.0)
    sweep = leave_sweep(tmp_path, done)
    found = status_of(sweep)
    assert (found.seconds_left, found.command) == (0.0, "")
    main(["status", str(sweep)])
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_the_name_of_a_sweep_may_follow_the_options(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["status", "--json", "--home", str(tmp_path), "mine"])
    assert json.loads(capsys.readouterr().out)["sweep"] == "mine"


@pytest.mark.parametrize("command", ["status", "logs"])
def test_a_manifest_that_lacks_a_key_is_damaged(sweep: Path, command: str) -> None:
    (sweep / "sweep.json").write_text('{"name": "mine"}')
    with pytest.raises(
        SystemExit, match=r"sweep\.json is damaged \(it has no command\); delete it"
    ):
        main([command, str(sweep)])


def test_the_tasks_of_slurm(
    sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, _, stopped, new, not_frozen = map(
        Path, json.loads((sweep / "sweep.json").read_text())["jobs"]
    )
    in_slurm(sweep, task_0=stopped, task_1=new, task_2=not_frozen)
    fake_slurm(
        tmp_path / "bin",
        monkeypatch,
        squeue="printf '17_0|RUNNING|None\\n17_1|PENDING|Priority\\n'",
        sacct="echo '17_2|TIMEOUT|0:0'",
        scontrol="exit 1",
    )
    found = status_of(sweep)
    assert [(job.state, job.slurm_job, job.slurm_state) for job in found.jobs[2:]] == [
        ("running", "17_0", "RUNNING (None)"),
        ("queued", "17_1", "PENDING (Priority)"),
        ("new", "17_2", "TIMEOUT"),
    ]
    assert found.jobs[2].reason == ""  # that of the earlier attempt
    main(["status", str(sweep)])
    assert f"{new.name}  SLURM job 17_1: PENDING (Priority)\n" in capsys.readouterr().out


def test_a_status_without_an_answer_of_slurm(
    sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped = Path(json.loads((sweep / "sweep.json").read_text())["jobs"][2])
    in_slurm(sweep, task_0=stopped)
    down = "echo 'squeue: error: down' >&2; exit 1"
    fake_slurm(tmp_path / "bin", monkeypatch, squeue=down, sacct=down, scontrol=down)
    found = status_of(sweep)
    assert found.slurm_error == "squeue: down"
    assert found.jobs[2].state == "killed"
    assert found.jobs[2].slurm_state == "gone, and SLURM does not know why any more"
    main(["status", str(sweep)])
    first = capsys.readouterr().out.splitlines()[0]
    assert first == "cannot ask SLURM about the jobs of this sweep: squeue: down"
    words = "squeue: error: resolve_ctls_from_dns_srv: res_nsearch error: Unknown host"
    fake_slurm(tmp_path / "nowhere", monkeypatch, squeue=f"echo '{words}' >&2; exit 1")
    assert status_of(sweep).slurm_error == (
        "no SLURM answers on this machine (squeue: resolve_ctls_from_dns_srv: res_nsearch error: "
        "Unknown host); use a login node of the cluster"
    )


def test_a_damaged_record_is_one_line(sweep: Path) -> None:
    job = Path(json.loads((sweep / "sweep.json").read_text())["jobs"][0])
    (job / "config.yaml").write_text("seed: [")
    with pytest.raises(SystemExit, match=r"^error: .*config\.yaml is damaged"):
        main(["status", str(sweep)])


def test_a_killed_launch_is_not_taken_for_the_next_one(sweep: Path) -> None:
    launch = {"process": 1, "host": socket.gethostname(), "jobs": ["a"]}
    (sweep / "running.json").write_text(json.dumps(launch))  # as kill -9 leaves it
    assert local_launch(sweep) is None
    with marked_as_running(sweep, "mine"):  # its jobs train on a cluster
        assert local_launch(sweep) is None
        assert refusal_of_second_launch(sweep, "mine", ["a"]) == ""
