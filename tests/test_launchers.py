"""Test how the launchers use their configuration, without a cluster."""

import json
import os
import shlex
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig

from sddlskd import config as cfg
from sddlskd import record
from sddlskd.config import Config
from sddlskd.sweeps import run_sweep
from sddlskd.sweeps.plan import no_findings
from sddlskd.sweeps.pool import Pool
from sddlskd.sweeps.search import Start
from sddlskd.sweeps.slurm import Slurm
from sddlskd.sweeps.slurm_queue import Submission, add_submissions, submissions
from sddlskd.terminal.console import explain
from sddlskd.train import ERRORS
from tests.tiny import tiny


def composed(
    folder: Path, *overrides: str, name: str = "config"
) -> tuple[ConfigLoaderImpl, DictConfig]:
    """Return Hydra's loader and the configuration `name`, with `folder` as --config-dir and home.

    Overrides may give another home.
    """
    cfg.frame()
    search = create_config_search_path(str(files("sddlskd.conf")))
    search.prepend("command-line", f"file://{folder}")
    loader = ConfigLoaderImpl(search)
    given = [f"home={folder}", "sweep.name=mine", *overrides]
    return loader, loader.load_configuration(name, given, RunMode.MULTIRUN)


def chosen(folder: Path, *overrides: str) -> Any:
    return instantiate(composed(folder, *overrides)[1].hydra.launcher)


@pytest.mark.parametrize(
    ("choice", "group_size", "kind"),
    [
        ("shared_teacher", None, Pool),
        ("submitit_local", 1, Pool),
        ("slurm", 1, Slurm),
        ("slurm_shared_teacher", None, Slurm),
    ],
)
def test_how_large_groups_are_and_who_runs_them(
    choice: str, group_size: int | None, kind: type, tmp_path: Path
) -> None:
    launcher = chosen(tmp_path, f"hydra/launcher={choice}")
    assert launcher.max_group_size == group_size
    assert isinstance(launcher._runner(), kind)


def test_a_file_that_is_not_yaml_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("seed: [\n")
    with pytest.raises(ERRORS) as caught:
        composed(tmp_path, name="mine")
    assert explain(caught.value).startswith(f"{tmp_path}/mine.yaml, line 2, is not YAML (")


def test_a_profile_of_a_cluster_is_one_small_file(tmp_path: Path) -> None:
    path = tmp_path / "hydra/launcher/mine.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(
        "defaults: [slurm_shared_teacher, _self_]\npartition: gpu\nsetup: [module load cuda]\n"
    )
    launcher = chosen(
        tmp_path,
        "hydra/launcher=mine",
        "hydra.launcher.container=image.sqsh",
        "hydra.launcher.wait=false",
    )
    pool = launcher._runner()
    assert launcher.max_group_size is None
    assert pool.options["partition"] == "gpu"
    assert pool.options["setup"] == ["module load cuda"]
    assert pool.options["name"] == "mine"
    assert pool.srun_args == ["--container-image=image.sqsh"]
    assert pool.wait is False


def swept(
    folder: Path,
    *overrides: str,
    launch: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    words: Sequence[str] = ("seed=0,1",),
    name: str = "config",
) -> list[list[str]]:
    """Run the sweeper, and return the overrides of each job.

    `launch` stands for the work of the launcher, and `words` are the overrides of the sweep.
    """
    launched_jobs: list[list[str]] = []

    def launched(launcher: Any, jobs: Sequence[Sequence[str]]) -> list[Any]:
        launched_jobs.extend(map(list, jobs))
        launch()
        return []

    loader, config = composed(folder, *overrides, name=name)
    sweeper = instantiate(config.hydra.sweeper)
    launcher = instantiate(config.hydra.launcher)
    monkeypatch.setattr(type(launcher), "_launch", launched)
    context = SimpleNamespace(config_loader=loader)
    launcher.setup(hydra_context=context, task_function=None, config=config)
    sweeper.config, sweeper.hydra_context, sweeper.launcher = config, context, launcher
    sweeper.sweep(list(words))
    return launched_jobs


def test_a_plan_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = (f"home={tmp_path}/my/home", "sweep.plan=true")

    def launch() -> None:
        assert list(tmp_path.iterdir()) == []

    swept(tmp_path, *plan, launch=launch, monkeypatch=monkeypatch)
    assert list(tmp_path.iterdir()) == []
    # The plan of a sweep that has run before
    folder = tmp_path / "my/home/runs/sweeps/mine"
    folder.mkdir(parents=True)
    for name in ("sweep.json", "multirun.yaml"):
        (folder / name).write_text("earlier")
    swept(tmp_path, *plan, launch=lambda: None, monkeypatch=monkeypatch)
    assert {path.read_text() for path in folder.iterdir()} == {"earlier"}


def test_a_refused_sweep_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "my/home/runs/sweeps/mine"

    def refuse() -> None:
        assert (folder / "multirun.yaml").exists()
        raise ValueError("refused")

    def launch() -> None:
        (folder / "sweep.json").write_text("{}")

    for kept in (tmp_path, tmp_path / "my/home", folder):
        kept.mkdir(parents=True, exist_ok=True)
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(ValueError, match="refused"):
            swept(tmp_path, f"home={tmp_path}/my/home", launch=refuse, monkeypatch=monkeypatch)
        assert sorted(tmp_path.rglob("*")) == before
    jobs = swept(tmp_path, f"home={tmp_path}/my/home", launch=launch, monkeypatch=monkeypatch)
    assert jobs == [["seed=0"], ["seed=1"]]
    assert (folder / "multirun.yaml").exists()


def test_the_commands_of_a_search_repeat_how_it_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["dataset=digits", "distiller.temperature=2.0"]
    folder = ["--config-dir", str(tmp_path)]
    _, plain = composed(tmp_path, "hydra/sweeper=optuna")
    again = shlex.split(Start.of(plain).command(words))
    assert again == ["python", "-m", "sddlskd.train", *folder, *words]
    launcher = ["hydra/launcher=slurm", "hydra.launcher.partition=my gpu"]
    _, on_cluster = composed(tmp_path, "hydra/sweeper=optuna", *launcher)
    again = shlex.split(Start.of(on_cluster).command(words))
    assert again == ["python", "-m", "sddlskd.train", "-m", *folder, *launcher, *words]
    (tmp_path / "mine.yaml").write_text(
        "defaults: [config, override hydra/sweeper: optuna, _self_]\n"
        "hydra: {mode: MULTIRUN, sweeper: {n_trials: 3, "
        'params: {distiller.temperature: "interval(1.0,8.0)"}}}\n'
    )
    _, of_file = composed(tmp_path, name="mine")
    start = Start.of(of_file)
    named = [*folder, "--config-name", "mine"]
    assert shlex.split(start.command(words))[3:] == [*named, "hydra.mode=RUN", *words]
    several = shlex.split(start.command([*words, "seed=1,2"], of_several=True))[3:]
    assert several == ["-m", *named, "hydra/sweeper=grid", *words, "seed=1,2"]
    # Hydra runs that command, although the file is that of a search.
    jobs = swept(
        tmp_path,
        "hydra/sweeper=grid",
        launch=lambda: None,
        monkeypatch=monkeypatch,
        words=several[-3:],
        name="mine",
    )
    assert [set(job) for job in jobs] == [{*words, f"seed={seed}"} for seed in (1, 2)]


def test_a_plan_says_what_a_cluster_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SBATCH_PARTITION", raising=False)
    groups = [[Config(run_dir=f"/runs/{n}")] for n in range(3)]
    asked = "each task asks for: "
    default = "the cluster's default"
    bare = chosen(tmp_path, "hydra/launcher=slurm")._runner()
    unknown = [None] * 3
    assert bare.requests(groups, unknown) == [
        "SLURM: a job array of 3 tasks, at most 3 at once",
        f"{asked}partition: {default}; GPUs: {default} (maybe none: "
        "hydra.launcher.gpus_per_node=1 asks for one); CPU cores per process: 2; "
        f"memory: {default}; time limit: 60 minutes",
        "whether hydra.launcher.timeout_min=60 suffices is not known without similar runs; a task "
        "that needs longer is requeued, at most 100 times, and goes on from its checkpoint; after "
        "that its jobs stay KILLED until the same command continues them",
    ]
    assert bare.requests([], []) == []
    monkeypatch.setenv("SBATCH_PARTITION", "short")
    assert f"{asked}partition: short; " in bare.requests(groups, unknown)[1]
    for group in groups[1:]:
        group[0].trainer.devices = 2
    words = ("partition=gpu", "gpus_per_node=2", "mem_gb=8", "timeout_min=90", "qos=high")
    given = [f"hydra.launcher.{word}" for word in (*words, "nodes=2", "array_parallelism=1")]
    given.append("+hydra.launcher.additional_parameters.mail-type=FAIL")
    *lines, _ = chosen(tmp_path, "hydra/launcher=slurm", *given)._runner().requests(groups, unknown)
    assert lines == [
        "SLURM: a job array of 1 task, at most 1 at once",
        "SLURM: a job array of 2 tasks of 2 processes each, at most 1 at once",
        f"{asked}partition: gpu; GPUs per node: 2; CPU cores per process: 2; "
        "GB of memory per node: 8; time limit: 90 minutes; nodes: 2; qos: high; mail-type: FAIL",
    ]
    assert Pool("auto", fail_fast=False).requests(groups, unknown) == []


@pytest.mark.parametrize(
    ("minutes", "said"),
    [
        ((5.0, 38.0), "the longest task needs about 38:00: hydra.launcher.timeout_min=60 suffices"),
        ((58.0,), "the longest task needs about 58:00: hydra.launcher.timeout_min=60 is tight, as "
         "times differ between runs"),
        # The warning comes two minutes before the limit.
        ((59.0, None), "the longest task with similar runs needs about 59:00, too long for "
         "hydra.launcher.timeout_min=60: it will be requeued about once, and goes on from its "
         "checkpoint each time"),
        ((58.0 * 3, 1.0), "the longest task needs about 2:54:00, too long for "
         "hydra.launcher.timeout_min=60: it will be requeued about 2 times, and goes on from its "
         "checkpoint each time"),
        ((58.0 * 3 + 1,), "the longest task needs about 2:55:00, too long for "
         "hydra.launcher.timeout_min=60: it will be requeued about 3 times, and goes on from its "
         "checkpoint each time; hydra.launcher.max_requeues=2 leaves its jobs KILLED before "
         "their end, so raise one of the two, or run the same command again"),
    ],
)  # fmt: skip
def test_a_plan_says_whether_the_time_limit_suffices(
    tmp_path: Path, minutes: Sequence[float | None], said: str
) -> None:
    runner = chosen(tmp_path, "hydra/launcher=slurm", "hydra.launcher.max_requeues=2")._runner()
    groups = [[Config(run_dir=f"/runs/{n}")] for n in range(len(minutes))]
    seconds = [None if one is None else 60 * one for one in minutes]
    assert runner.requests(groups, seconds)[-1] == said


def planned(folder: Path, *overrides: str, jobs: Sequence[Config]) -> None:
    """Plan a sweep on a cluster, which must end with exit code 1."""
    answer = no_findings()
    launcher = chosen(folder, "hydra/launcher=slurm", "hydra.launcher.partition=gpu", *overrides)
    with pytest.raises(SystemExit, match="1"):
        run_sweep(
            jobs,
            "mine",
            runner=launcher._runner(),
            max_group_size=launcher.max_group_size,
            precheck=lambda todo, finished, runs_locally: answer,
        )


def test_the_plan_of_a_sweep_on_a_cluster_names_requests_and_other_group_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("SBATCH_PARTITION", raising=False)
    monkeypatch.setattr("sddlskd.sweeps.slurm.shutil.which", lambda command: None)
    jobs = [tiny(tmp_path, f"M=[{m}]", "sweep.plan=true", teacher=False) for m in (1, 2)]
    planned(tmp_path, jobs=jobs)
    told = capsys.readouterr().out
    assert "\nSLURM: a job array of 2 tasks, at most 2 at once\n" in told
    assert "\neach task asks for: partition: gpu; " in told
    assert "\ncannot run: hydra/launcher=slurm needs sbatch" in told
    assert (
        "\njobs that share a teacher and batches: 2 jobs could train in 1 task instead of 2, which "
        "run the teacher once for all their jobs: hydra/launcher=slurm_shared_teacher, or "
    ) in told
    planned(tmp_path, "hydra.launcher.max_group_size=null", jobs=jobs)
    told = capsys.readouterr().out
    assert "slurm_shared_teacher" not in told
    assert (
        "\n1 task for hydra.launcher.array_parallelism=256: hydra.launcher.max_group_size=1 would "
        "end earlier: it makes 2 tasks, the longest of 1 job instead of 2, and the teacher goes "
        "through the data 2 times an epoch instead of 1\n"
    ) in told
    options = ("max_group_size=null", "array_parallelism=2")
    planned(tmp_path, *(f"hydra.launcher.{option}" for option in options), jobs=jobs)
    assert (
        "\n1 task for hydra.launcher.array_parallelism=2: hydra.launcher.max_group_size=1 would end"
    ) in capsys.readouterr().out


def test_the_plan_of_a_sweep_on_a_cluster_names_every_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*command: str, text: str | None = None) -> str:
        raise ConnectionError(f"{command[0]}: no answer")

    monkeypatch.setattr("sddlskd.sweeps.slurm.shutil.which", lambda command: command)
    for module in ("slurm", "slurm_queue"):
        monkeypatch.setattr(f"sddlskd.sweeps.{module}.ask", fails)
    inner = SimpleNamespace(_make_submission_file_text=lambda command, name: "#!/bin/sh")
    # submitit makes its executor on a machine with SLURM alone.
    monkeypatch.setattr(Slurm, "_executor", lambda *_: SimpleNamespace(_executor=inner))
    monkeypatch.setattr(
        "sddlskd.tracking.check_reachable", lambda jobs: fails(*(job.tracking.uri for job in jobs))
    )
    folder = tmp_path / "runs/sweeps/mine"
    folder.mkdir(parents=True)
    earlier = {"job": "17_0", "run_dirs": ["/runs/0"], "log": "log"}
    (folder / "slurm.json").write_text(json.dumps([earlier]))
    words = ("tracking=mlflow", "tracking.uri=http://here:1", "sweep.plan=true", "teacher.cache=c")
    jobs = [
        tiny(tmp_path, f"trainer.devices={n}", f"seed={n}", *words, teacher=False) for n in (2, 3)
    ]
    options = ("nodes=2", "timeout_min=1", "setup=['export MY_TOKEN=x']")
    planned(tmp_path, *(f"hydra.launcher.{option}" for option in options), jobs=jobs)
    refused = [
        line.removeprefix("cannot run: ")
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("cannot run: ")
    ]
    for line, start in zip(
        refused,
        (
            "squeue: no answer",
            "http://here:1: no answer",
            "hydra.launcher.signal_delay_s=120 must be less",
            "hydra.launcher.setup would write export MY_TOKEN",
            "sinfo: no answer",
            "sbatch: no answer; see hydra.launcher.partition",
            "trainer.devices=3 does not spread evenly over hydra.launcher.nodes=2",
        ),
        strict=True,
    ):
        assert line.startswith(start), refused


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_what_sbatch_has_taken_is_noted_before_a_signal_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    class Executor:
        @contextmanager
        def batch(self) -> Iterator[None]:
            yield
            os.kill(os.getpid(), number)  # the signal comes right after the answer of sbatch

        def submit(self, task: Any) -> Any:
            return SimpleNamespace(job_id=f"17_{task.run_dirs[0][-1]}")

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(number, interrupted)
    monkeypatch.setattr("sddlskd.sweeps.slurm.ask", lambda *command: "MaxArraySize = 1001\n")
    pool = chosen(tmp_path, "hydra/launcher=slurm")._runner()
    monkeypatch.setattr(pool, "_executor", lambda *_: Executor())
    try:
        with pytest.raises(KeyboardInterrupt):
            pool._submit([[Config(run_dir=f"/runs/{n}")] for n in range(3)], tmp_path, 1)
    finally:
        signal.signal(number, before)
    assert [(one.job, one.run_dirs) for one in submissions(tmp_path)] == [
        (f"17_{n}", [f"/runs/{n}"]) for n in range(3)
    ]
    for damaged in ("{", "[1]", '[{"other": 1}]'):
        (tmp_path / "slurm.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"slurm\.json is damaged"):
            submissions(tmp_path)


def test_what_another_launch_has_submitted_meanwhile_is_left_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted: list[Any] = []
    pool = chosen(tmp_path, "hydra/launcher=slurm", "hydra.launcher.wait=false")._runner()
    monkeypatch.setattr(
        "sddlskd.sweeps.slurm.states", lambda sweep: {"/runs/0": "queued", "/runs/2": "running"}
    )
    monkeypatch.setattr(pool, "_submit", lambda groups, sweep, ranks: submitted.extend(groups))
    jobs = [Config(run_dir=f"/runs/{n}") for n in range(4)]
    pool.run([jobs[:2], jobs[2:3], jobs[3:]], tmp_path, [])
    assert submitted == [[jobs[1]], [jobs[3]]]
    submitted.clear()
    pool.run([jobs[:1], jobs[2:3]], tmp_path, [])
    assert submitted == []
    assert "submitted to SLURM: nothing new" in capsys.readouterr().out


def test_a_deleted_run_of_an_earlier_launch_does_not_end_the_wait_with_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tiny(tmp_path, teacher=False)
    record.freeze(job)
    tasks = {"17_0": str(tmp_path / "runs/deleted"), "17_1": job.run_dir}
    add_submissions(
        tmp_path, [Submission(task, [run_dir], "log") for task, run_dir in tasks.items()]
    )
    monkeypatch.setattr(
        "sddlskd.sweeps.slurm.causes_of_death", lambda ended: dict.fromkeys(ended, "TIMEOUT")
    )
    monkeypatch.setattr("sddlskd.sweeps.slurm.states", lambda sweep: {})
    pool = chosen(tmp_path, "hydra/launcher=slurm")._runner()
    monkeypatch.setattr(pool, "_wait", lambda sweep: None)
    assert pool.run([], tmp_path, []) == "FINISHED"
    result = record.read_result(Path(job.run_dir))
    assert (result["status"], result["reason"]) == ("KILLED", "SLURM job 17_1 is over: TIMEOUT")


@pytest.mark.parametrize("fails", [False, True])
def test_fail_fast_counts_the_failures_of_this_launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """The launcher looks at the queue several times.

    First a job is running. Then another job may have failed. In the end the queue is empty.
    """
    pool = chosen(tmp_path, "hydra/launcher=slurm", "hydra.launcher.fail_fast=true")._runner()
    looks = iter([{"17_0": ("RUNNING", "None")}] * 2 + [{}] * 2)
    failed = {"/runs/long ago"}
    asked: list[tuple[str, ...]] = []

    def look(sweep: Path) -> dict[str, tuple[str, str]]:
        return next(looks)

    def sleep(seconds: float) -> None:
        failed.update(["/runs/1"] if fails else [])

    monkeypatch.setattr("sddlskd.sweeps.slurm.queue", look)
    monkeypatch.setattr("sddlskd.sweeps.slurm._failed", lambda sweep: set(failed))
    monkeypatch.setattr("sddlskd.sweeps.slurm.ask", lambda *command: asked.append(command))
    monkeypatch.setattr("sddlskd.sweeps.slurm.time", SimpleNamespace(sleep=sleep))
    pool._wait(tmp_path)
    assert asked == ([("scancel", "17_0")] if fails else [])
