"""Test sweeps: groups, jobs that fail, workers that die, and sweeps that are continued."""

import json
import logging
import multiprocessing
import os
import random
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.types import RunMode
from omegaconf import DictConfig

from sddlskd import config as cfg
from sddlskd import record
from sddlskd.config import Config
from sddlskd.files import checkpoint
from sddlskd.models import create
from sddlskd.processes.exit_codes import ExitCode
from sddlskd.processes.interrupts import held_back
from sddlskd.sweeps import groups_of, precheck, run_sweep
from sddlskd.sweeps.__main__ import main
from sddlskd.sweeps.balance import better_group_size, jobs_of_devices, split
from sddlskd.sweeps.grid import InvalidJobs, compose_grid
from sddlskd.sweeps.manifest import (
    command_to_continue,
    read_manifest,
    write_manifest,
    write_plan,
)
from sddlskd.sweeps.outcome import state_of
from sddlskd.sweeps.plan import ask_precheck, epochs_of, make_plan, no_findings
from sddlskd.sweeps.pool import Pool, Task
from sddlskd.sweeps.report import _command_for_tables, cause_of, plan_lines
from sddlskd.tracking import uri as tracking_uri
from sddlskd.training.fit import fit
from tests.composing import loader_of
from tests.tiny import DIVERGES, ForkedCommand, ForkedWorker, tiny

REPO = Path(__file__).parent.parent
COMMON = [
    "allow_foreign_targets=true",
    "dataset=digits",
    "teacher=resnet8",
    "trainer=debug",
    "trainer.max_steps=3",
    "tracking=none",
]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a home with a teacher; the workers can import `tests`."""
    torch.manual_seed(0)
    checkpoint.write(
        tmp_path / "teachers/digits/resnet8.pt", {"model": create("resnet8", 10).state_dict()}
    )
    monkeypatch.chdir(REPO)
    return tmp_path


def grid_of(
    home: Path, common: list[str], grid: list[list[str]]
) -> tuple[ConfigLoaderImpl, DictConfig, list[Config]]:
    loader, sweep = loader_of([*common, f"home={home}", "sweep.name=test"])
    overrides = [[*common, f"home={home}", *one] for one in grid]
    return loader, sweep, compose_grid(loader, sweep, overrides)


def jobs_of(home: Path, *grid: str, common: tuple[str, ...] = ()) -> list[Config]:
    return grid_of(home, [*COMMON, *common], [one.split() for one in grid])[2]


def network(kind: str, **arguments: Any) -> str:
    choice = f"student.name={kind.lower()} student.model._target_=tests.misbehaving.{kind}"
    choice += " ~student.model.name ~student.model.stem"
    return choice + "".join(f" +student.model.{key}={value}" for key, value in arguments.items())


def pool(devices: Any = "auto", fail_fast: bool = False, start: Any = ForkedWorker) -> Pool:
    return Pool(devices, fail_fast=fail_fast, start=start)


def run(jobs: list[Config], name: str = "test", **options: Any) -> list[dict[str, Any]]:
    """Run a sweep, and check its jobs in this process, because another one would take longer.

    The commands that tests start check them in another process.
    """
    return run_sweep(jobs, name, runner=pool(**options), precheck=precheck.report)


def sweep(jobs: list[Config], **options: Any) -> tuple[list[dict[str, Any]], int]:
    """Run a sweep and return the results and the exit code."""
    try:
        run(jobs, **options)
        code = 0
    except SystemExit as exit:
        code = int(exit.code or 0)
    return [record.read_result(Path(job.run_dir)) for job in jobs], code


def plan_unchecked(jobs: list[Config], devices: Any = "auto") -> None:
    """Print the plan of jobs with sweep.plan=true, without the check of each job."""
    answer = no_findings()
    answer["devices"] = devices if isinstance(devices, list) else ["cpu"]
    with pytest.raises(SystemExit, match="0"):
        run_sweep(jobs, "test", runner=pool(devices), precheck=lambda *_: answer)


def statuses(results: list[dict[str, Any]]) -> list[str]:
    return [result.get("status", "NEW") for result in results]


def test_the_grid_is_what_hydra_composes(tmp_path: Path) -> None:
    choices = {
        "student": ["shufflev1", "mobilev2", "resnet8x4"],
        "M": ["[1]", "[1,2,4]"],
        "seed": ["0", "3"],
        "recipe": ["kd_ls", "sd_dkd", "vanilla"],
        "pair": ["vgg13_mobilev2", "resnet32x4_resnet8x4"],
        "scales": ["two", "skip"],
        "student.lr": ["0.2"],
        "optimizer.lr": ["0.3", "1e-3", "${student.lr}"],
        "distiller.temperature": ["3", "4.5"],
        "distiller.knowledge": ["consistent"],
        "trainer.epochs": ["3"],
        "dataset.epochs": ["9"],
        "trainer.precision": ["bf16"],
        "dataset.name": ["renamed"],
        "+distiller.loss.extra": ["1"],
        "optimizer.milestones": ["[0.5]"],
        "trainer.data_seed": ["4", "null", "${seed}"],
        "optimizer.algorithm": ["{weight_decay:0.001}", "{momentum:0.5}"],
        "teacher.cache": ["maps"],
    }
    draw = random.Random(0)
    grid = [
        [f"{k}={draw.choice(choices[k])}" for k in draw.sample(list(choices), 6)] for _ in range(40)
    ]
    loader, sweep_config, jobs = grid_of(tmp_path, [], grid)
    for overrides, job in zip(grid, jobs, strict=True):
        composed = loader.load_sweep_config(sweep_config, [f"home={tmp_path}", *overrides])
        composed.sweep.name = "test"
        assert job == cfg.resolve(composed), overrides


def test_overrides_may_choose_what_the_file_of_a_sweep_leaves_open(tmp_path: Path) -> None:
    for kind in ("train/cat", "train/dog", "val/cat", "val/dog"):
        (tmp_path / "pets" / kind).mkdir(parents=True)
    (tmp_path / "mine.yaml").write_text(
        "defaults: [config, override dataset: image_folder, _self_]\n"
    )
    cfg.frame()
    search = create_config_search_path(str(files("sddlskd.conf")))
    search.prepend("command-line", f"file://{tmp_path}")
    loader = ConfigLoaderImpl(search)
    common = [f"home={tmp_path}", f"dataset.root={tmp_path}/pets", "standardize=false"]
    sweep_config = loader.load_configuration("mine", common, RunMode.MULTIRUN)
    grid = [[*common, f"trainer.epochs={epochs}"] for epochs in (3, 4)]
    jobs = compose_grid(loader, sweep_config, grid)
    assert [job.trainer.epochs for job in jobs] == [3, 4]
    assert {job.dataset.num_classes for job in jobs} == {2}


def test_overrides_that_are_valid_only_together_make_a_job(tmp_path: Path) -> None:
    words = ["recipe=sd_kd", "optimizer=dot", "optimizer.clip_norm=null"]  # DOT clips nothing
    (job,) = grid_of(tmp_path, [], [words])[2]
    assert (job.optimizer.name, job.optimizer.clip_norm) == ("dot", None)


@pytest.mark.parametrize("name", ["''", "..", "a/b", '"it\'s"'])
def test_a_name_of_a_sweep_that_is_no_folder_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"sweep\.name=\S* cannot name a folder of runs/sweeps; "):
        jobs_of(tmp_path, "seed=0", common=(f"sweep.name={name}",))


def test_every_invalid_job_is_named_before_anything_starts(home: Path) -> None:
    with pytest.raises(InvalidJobs) as caught:
        jobs_of(home, "M=[0]", "M=[1]", "M=[1,1]", "seed=x")
    assert "3 jobs" in str(caught.value)
    assert all(part in str(caught.value) for part in ("M=[0]", "M=[1, 1]", "seed"))
    with pytest.raises(InvalidJobs, match=r"M=\[1, cannot be read .*; give key=value, as in M="):
        jobs_of(home, "M=[1, 2]")
    jobs = jobs_of(
        home,
        "M=[1]",
        "M=[32]",
        "trainer.batch_size=5000",
        "teacher=resnet14 teacher.train_if_missing=false",
    )
    with pytest.raises(InvalidJobs) as caught:
        run(jobs)
    assert [name for name, _ in caught.value.reasons] == [cfg.run_name(job) for job in jobs[1:]]
    assert not (home / "runs" / "digits").exists()


def test_groups_share_teacher_and_batches() -> None:
    def sizes(*grid: str, size: int | None = None) -> list[int]:
        jobs = grid_of(Path("/nowhere"), COMMON, [one.split() for one in grid])[2]
        return [len(group) for group in groups_of(jobs, size)]

    assert sizes("student=resnet8", "student=wrn_16_1 M=[1]", "optimizer.lr=0.1", "recipe=kd") == [
        4
    ]
    assert sizes("seed=0", "seed=1") == [1, 1]
    assert sizes("seed=0 trainer.data_seed=0", "seed=1 trainer.data_seed=0") == [2]
    assert (
        sizes(
            "trainer.epochs=2",
            "trainer.epochs=3",
            "trainer.batch_size=32",
            "trainer.precision=bf16",
        )
        == [1] * 4
    )
    assert (
        sizes("teacher=resnet14", "teacher=resnet8", "dataset.flip=true", "recipe=vanilla")
        == [1] * 4
    )
    assert sizes("seed=0", "seed=0") == [1]
    assert sizes("M=[1]", "M=[2]", "M=[4]", "M=[1,4]", "M=[1,2]", size=2) == [2, 2, 1]


def test_failures_stay_local_and_a_sweep_continues(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = jobs_of(
        home,
        "student=resnet8",
        network("Raises"),
        f"student=resnet8 {DIVERGES}",
        network("Tiny"),
    )
    results, code = sweep(jobs)
    assert statuses(results) == ["FINISHED", "FAILED", "FAILED", "FINISHED"]
    assert code == 1
    assert "does not like its images" in results[1]["reason"]
    assert "NonFiniteLoss" in results[2]["reason"]
    assert "step" in results[2]["reason"]
    assert "does not like its images" in Path(jobs[1].run_dir, "train.log").read_text()
    told = capsys.readouterr()
    assert "1 failed: RuntimeError" in told.out
    assert "non-finite loss at epoch 1" in told.out
    assert f"python -m sddlskd.worker {jobs[1].run_dir}" in told.out

    finished = [Path(jobs[i].run_dir, "result.json").read_text() for i in (0, 3)]
    more = [*jobs, *jobs_of(home, "student=resnet8 M=[1]")]
    results, code = sweep(more)
    assert statuses(results) == ["FINISHED", "FAILED", "FAILED", "FINISHED", "FINISHED"]
    assert [Path(jobs[i].run_dir, "result.json").read_text() for i in (0, 3)] == finished
    assert results[1]["time"] < time.time()

    capsys.readouterr()
    main(["status", "test", "--home", str(home)])
    told = capsys.readouterr()
    assert "5 jobs: 3 finished, 2 failed" in told.out
    assert "to finish it: cd" in told.out


def test_rerun_none_leaves_failures_and_all_starts_anew(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    jobs = jobs_of(home, network("Tiny"), network("Raises"))
    first, _ = sweep(jobs)
    none = jobs_of(home, network("Tiny"), network("Raises"), common=("sweep.rerun=none",))
    kept, code = sweep(none)
    assert kept == first
    assert code == 1
    again = jobs_of(home, network("Tiny"), network("Raises"), common=("sweep.rerun=all",))
    logging.getLogger("sddlskd").propagate = True
    caplog.set_level(logging.INFO)
    results, _ = sweep(again)
    assert "checking 2 jobs" in caplog.text  # the finished one counts once
    assert statuses(results) == ["FINISHED", "FAILED"]
    assert results[0]["time"] > first[0]["time"]
    assert len(list(Path(jobs[0].run_dir).parent.glob("*.before-*"))) == 2


def test_a_plan_starts_nothing(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = jobs_of(home, "M=[1]", "M=[2]", "seed=1", common=("sweep.plan=true",))
    _, code = sweep(jobs)
    told = capsys.readouterr().out
    assert code == 0
    assert "cannot run" not in told
    assert sweep(jobs_of(home, "M=[64]", "M=[64] seed=1", common=("sweep.plan=true",)))[1] == 1
    assert capsys.readouterr().out.count("\ncannot run") == 1
    assert "3 jobs (3 new), 3 to do in 2 groups" in told
    assert "2 times an epoch instead of 3" in told
    assert not (home / "runs").exists()


def test_a_plan_needs_neither_data_nor_teacher_and_names_every_obstacle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    common = ("dataset=cifar100", "teacher=resnet32x4", "sweep.plan=true")
    small = "student=timm student.model.name=resnet18"
    jobs = jobs_of(empty, "M=[1]", "M=[2] seed=1", f"{small} M=[1,4]", common=common)
    _, code = sweep(jobs, devices=["cpu", "cpu"])
    told = capsys.readouterr().out
    assert code == 1
    assert told.startswith("sweep test: 3 jobs (3 new), 3 to do in 2 groups; 3 cannot run, see be")
    assert told.count("to download: ") == 1
    assert f"there is no file {empty}/data/cifar-100-python.tar.gz; the sweep downloads it" in told
    obstacles = [line for line in told.splitlines() if line.startswith("cannot run: ")]
    assert len(obstacles) == 2
    assert obstacles[0].startswith("cannot run: teacher=resnet32x4 for cifar100 is missing")
    assert not obstacles[0].endswith(" more)")  # all three jobs are named
    assert "M=[1, 4] is too fine: the largest scale here is 2" in obstacles[1]
    assert "the time is not known" in told
    # A file that jobs know by several keys is named once.
    both = jobs_of(empty, "M=[1]", "M=[1] teacher=[wrn_40_2,resnet32x4]", common=common)
    reasons = [reason for _, reason in precheck.obstacles(both)[0]]
    assert [reason.partition(" ")[0] for reason in reasons] == [
        "teacher=resnet32x4",
        "teacher=wrn_40_2",
        "teacher=resnet32x4",
    ]
    assert reasons[0] == reasons[2]
    assert not empty.exists()


def test_a_plan_names_what_a_launch_would_refuse(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sddlskd.tracking.copies.find_spec", lambda name: None)
    monkeypatch.setenv("SDDLSKD_MOST_PROCESSES", "1")
    common = ("sweep.plan=true", "tracking.mirrors=[wandb]")
    _, code = sweep(jobs_of(home, "seed=1", "seed=2", common=common), devices=["cpu", "cpu"])
    assert code == 1
    refused = [line for line in capsys.readouterr().out.splitlines() if "cannot run: " in line]
    assert len(refused) == 2
    assert refused[0].startswith("cannot run: tracking.mirrors: wandb is not installed")
    assert refused[1].startswith("cannot run: the number of workers in hydra.launcher.devices")


def test_a_plan_for_a_cluster_refuses_processes_that_share_a_batch(home: Path) -> None:
    jobs = jobs_of(home, "recipe=crd", common=("trainer.devices=2", "sweep.plan=true"))
    found, _ = precheck.obstacles(jobs, runs_locally=False)
    assert [reason for _, reason in found if reason.startswith("trainer.devices=2 cannot train")]


def test_a_plan_without_files_of_label_sets_checks_the_networks(tmp_path: Path) -> None:
    words = ("dataset=label_sets", f"dataset.load.root={tmp_path}", "dataset.num_classes=4")
    jobs = jobs_of(tmp_path, "recipe=mld teacher=resnet8 M=[64]", common=words)
    reasons = [reason for _, reason in precheck.obstacles(jobs)[0]]
    assert any(reason.startswith("M=[64] is too fine") for reason in reasons), reasons


@pytest.mark.parametrize("check", [precheck.problems, lambda jobs: precheck.obstacles(jobs)[0]])
def test_labels_of_the_other_kind_and_images_of_another_size_are_refused(
    home: Path, check: Any
) -> None:
    vit = "student=timm student.model.name=vit_tiny_patch16_224"
    jobs = jobs_of(home, "dataset.multi_label=true recipe=mld", vit)
    (one, labels), (two, size) = check(jobs)
    assert [one, two] == jobs
    assert labels.endswith("set dataset.multi_label=false")
    assert size.startswith("student=timm_vit_tiny_patch16_224 cannot take images of 3x32x32")
    assert size.endswith("or set +student.model.resize=224")


def test_a_plan_says_how_the_jobs_spread(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = jobs_of(home, *(f"M=[{m}]" for m in (1, 2, 4, 8)), "seed=1", common=("sweep.plan=true",))
    record_of_past_run(jobs[0], seconds=60.0)
    sweep(jobs, devices=["cpu", "cpu"])
    told = capsys.readouterr().out
    assert "groups: 1 of 4 jobs, 1 of 1 job" in told
    assert "devices: cpu 4 jobs, cpu 1 job" in told
    assert (
        "hydra.launcher.max_group_size=3 would end earlier: 3 instead of 4 jobs on the busiest "
        "device, 3 instead of 2 passes of the teacher an epoch\n"
    ) in told
    assert "\n  resnet8, 1 epoch:\n    resnet8x4 seed 0: KD+LS; SD-KD+LS [2]; SD-KD+LS [4];" in told
    # An epoch of a job took a minute; five jobs of one epoch each are to do.
    assert "about 5:00 on one device" in told
    assert "about 4:00 on these 2 devices" in told
    # The time of a CPU says nothing of a GPU.
    plan_unchecked(jobs, devices=["cuda:0", "cuda:1"])
    told = capsys.readouterr().out
    assert "there are no similar runs on a GPU yet, so the time is not known" in told
    assert "on these 2 devices" not in told
    other = jobs_of(home, "student=resnet8", "recipe=vanilla", common=("sweep.plan=true",))
    plan_unchecked([*jobs[:2], *other])
    assert (
        "the time is known for 2 of 4 jobs: about 2:00 on one device, estimated from 1 run of "
        "these networks on a CPU, for 1 job from other methods; there is no similar run of "
        "resnet8-resnet8, resnet8x4 yet"
    ) in capsys.readouterr().out


def test_only_runs_that_take_as_long_tell_the_time(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(*grid: str, size: int | None = None) -> str:
        jobs = jobs_of(home, *grid, common=("sweep.plan=true", "trainer.epochs=2"))
        answer = no_findings() | {"devices": ["cpu"]}
        with pytest.raises(SystemExit, match="0"):
            run_sweep(jobs, "test", runner=pool(), max_group_size=size, precheck=lambda *_: answer)
        return capsys.readouterr().out

    (past,) = jobs_of(home, "recipe=kd")
    record_of_past_run(past, seconds=600.0, group_size=10)
    unlike = ("trainer.max_steps=null", "dataset.train_fraction=0.5", "trainer.precision=bf16")
    for one in (*unlike, "trainer.batch_size=32", "recipe=vanilla student=resnet8"):
        said = told(f"recipe=kd {one}")
        assert "the time is not known" in said, one
        assert "train one epoch first (the same command with trainer.epochs=1 and" in said
    # An epoch of a group of ten took ten minutes. How much of it the teacher took is not known.
    smaller = "measured in groups of 10, and smaller groups take longer"
    said = told("recipe=kd")
    assert "about 2:00 to 20:00 on one device, estimated from 1 run of these networks on" in said
    assert smaller in said
    two = ("recipe=kd M=[1]", "recipe=kd M=[2]")
    assert "about 4:00 to 20:00 on one device" in told(*two)
    assert "about 4:00 to 40:00 on one device" in told(*two, size=1)
    # Runs of groups of this size come first.
    (single,) = jobs_of(home, "recipe=crd")
    record_of_past_run(single, seconds=240.0)
    said = told("recipe=kd")
    assert "about 8:00 on one device, estimated from 1 run of these networks on a CPU with" in said
    assert "with other methods\n" in said
    assert "other methods" not in told("recipe=crd")


def test_a_plan_says_what_halving_leaves(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("trainer.epochs=16", "sweep.halving=[2,4,8]", "dataset.val_fraction=0.2")
    grid = [f"distiller.temperature={temperature}" for temperature in range(1, 9)]
    jobs = jobs_of(home, *grid, common=("sweep.plan=true", *words))
    plan_unchecked(jobs)
    assert (
        "halving at the end of epochs 2, 4, 8: these jobs train at most 40 epochs in all instead "
        "of 128\n"
    ) in capsys.readouterr().out
    plan_unchecked(jobs, devices=["cpu", "cpu"])
    assert "max_group_size" not in capsys.readouterr().out  # smaller groups would compare less
    assert epochs_of(jobs[:5]) == 5 * 2 + 3 * 2 + 2 * 4 + 8  # of an odd number, the middle stays


def test_a_plan_names_teachers_that_are_trained_first_and_missing_gpus(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    common = ("sweep.plan=true", "teacher.train_if_missing=true", "teacher.train_epochs=7")
    jobs = jobs_of(tmp_path, "seed=1", "seed=2", common=common)
    assert sweep(jobs, devices=["cuda:0", "cpu"])[1] == 1
    told = capsys.readouterr().out
    assert told.count("trained first: teacher resnet8 for digits (7 epochs)") == 1
    assert "devices: cuda:0 1 job, cpu 1 job" in told
    # The 1.2 million parameters of resnet8x4: two checkpoints with momentum, and the best weights
    assert "\ndisk: at most about 24.3 MB a run, 0.049 GB in all; free: " in told
    assert "cannot run: this machine has no cuda:0, which hydra.launcher.devices names" in told


def test_a_plan_lists_groups_that_differ_by_seed_once(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def groups(*grid: str, size: int | None = None, shared: str = "null") -> str:
        common = ("sweep.plan=true", f"trainer.data_seed={shared}")
        jobs = jobs_of(home, *grid, common=common)
        with pytest.raises(SystemExit, match="0"):
            run_sweep(
                jobs,
                "test",
                runner=pool(),
                max_group_size=size,
                precheck=lambda *_: no_findings(),
            )
        told = capsys.readouterr().out
        return told[told.index("  resnet8, 1 epoch") :]

    grid = [f"recipe={recipe} seed={seed}" for seed in range(3) for recipe in ("kd", "kd_ls")]
    assert groups(*grid).startswith(
        "  resnet8, 1 epoch, 3 groups:\n    resnet8x4 seeds 0 to 2, each: KD; KD+LS\n"
    )
    assert groups(*grid, shared="0").startswith(
        "  resnet8, 1 epoch:\n    resnet8x4 seeds 0 to 2, each: KD; KD+LS\n"
    )
    # A name that two groups have comes with the settings that tell its jobs apart.
    namesakes = [f"recipe=kd distiller.temperature={value}" for value in (2, 3)]
    said = groups(*namesakes, "recipe=kd seed=5", size=1)
    assert "resnet8x4 seed 0: KD (temperature=2)\n" in said
    assert "resnet8x4 seed 0: KD (temperature=3)\n" in said
    assert "resnet8x4 seed 5: KD\n" in said


def record_of_past_run(job: Config, seconds: float, group_size: int = 1) -> None:
    """Leave the result of an earlier run of a job, in the folder of another seed."""
    name = Path(job.run_dir).name.replace("-s0-", f"-s99{len(str(seconds))}-")
    folder = Path(job.run_dir).with_name(name)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(cfg.to_yaml(job))
    result = {"status": "FINISHED", "epochs": 1, "seconds": seconds, "group_size": group_size}
    result["environment"] = "torch 2.14.1, Linux x86_64, cpu, 1 threads"
    (folder / "result.json").write_text(json.dumps(result))


@pytest.mark.parametrize(
    ("together", "devices", "largest", "better"),
    [
        ([12], 1, None, None),  # one device has nothing to share
        ([12], 4, None, 3),
        ([4, 4, 4], 3, None, None),  # even already
        ([4, 4, 4], 2, None, 2),
        ([6], 2, 1, 3),  # groups share the teacher's passes
        ([], 2, None, None),
    ],
)
def test_a_better_group_size(
    together: list[int], devices: int, largest: int | None, better: int | None
) -> None:
    assert better_group_size(together, devices, largest) == better
    assert sum(jobs_of_devices(split(together, better), devices)) == sum(together)


def test_a_network_of_a_library_is_a_job_of_a_sweep(home: Path) -> None:
    (job,) = jobs_of(home, "student=torchvision student.model.name=resnet18 M=[1]")
    assert job.student.name == "torchvision_resnet18"


def test_slow_checks_say_how_far_they_are(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(precheck, "EVERY_S", 0.0)
    logging.getLogger("sddlskd").propagate = True
    caplog.set_level(logging.INFO)
    precheck.problems(jobs_of(home, "seed=1", "seed=2"))
    assert "checked 1 of 2 jobs" in caplog.text


def test_ctrl_c_after_the_last_job_is_no_failure(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(self: Pool) -> None:
        collect(self)
        if not self.busy and not self.queue:
            signal.raise_signal(signal.SIGINT)

    collect = Pool._collect_workers
    monkeypatch.setattr(Pool, "_collect_workers", interrupted)
    results, code = sweep(jobs_of(home, network("Tiny")))
    assert (statuses(results), code) == (["FINISHED"], 0)
    assert "the same command continues" not in capsys.readouterr().out


def test_a_killed_worker_goes_on_from_its_checkpoints(home: Path) -> None:
    (home / "kills").mkdir()
    killer = network("Kills", folder=home / "kills", times=1, after=4)
    jobs = jobs_of(home, "student=resnet8", killer, common=("trainer.epochs=2",))
    results, code = sweep(jobs)
    assert statuses(results) == ["FINISHED", "FINISHED"]
    assert code == 0
    assert len(list((home / "kills").iterdir())) == 1
    common = ("trainer.epochs=2", f"teacher.checkpoint={home}/teachers/digits/resnet8.pt")
    alone = jobs_of(home / "alone", "student=resnet8", common=common)
    fit(alone)
    grouped, single = (
        checkpoint.read(Path(job.run_dir, "last.ckpt"))["model"] for job in (jobs[0], alone[0])
    )
    assert all(torch.equal(grouped[key], single[key]) for key in single)


def test_the_job_that_kills_workers_is_found(home: Path) -> None:
    (home / "kills").mkdir()
    jobs = jobs_of(
        home, network("Tiny"), network("Kills", folder=home / "kills", times=9), "student=resnet8"
    )
    results, code = sweep(jobs, devices=["cpu", "cpu"])
    assert statuses(results) == ["FINISHED", "FAILED", "FINISHED"]
    assert code == 1
    assert "SIGKILL" in results[1]["reason"]
    assert len(list((home / "kills").iterdir())) == 3  # twice in the group, once alone


def test_a_group_that_is_too_large_is_halved(home: Path) -> None:
    jobs = jobs_of(home, *(f"{network('Large')} M=[{m}]" for m in (1, 2, 4, 8)))
    results, code = sweep(jobs)
    assert statuses(results) == ["FINISHED"] * 4
    assert code == 0


def test_fail_fast_stops_the_sweep(home: Path) -> None:
    jobs = jobs_of(home, network("Raises"), "seed=1", "seed=2")
    results, code = sweep(jobs, fail_fast=True)
    assert statuses(results) == ["FAILED", "NEW", "NEW"]
    assert code == 1


def start(home: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "sddlskd.train",
        "-m",
        *COMMON,
        f"home={home}",
        "sweep.name=test",
        *overrides,
    ]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=REPO
    )


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


LONG = [
    *network("Tiny").split(),
    "M=[1],[2]",
    "trainer.epochs=4",
    "trainer.max_steps=12",
    "checkpoint.every_minutes=0.001",
]


@pytest.mark.slow
def test_ctrl_c_stops_with_checkpoints_and_the_same_command_goes_on(home: Path) -> None:
    words = ("sddlskd.train", "-m", *COMMON, f"home={home}", "sweep.name=test", *LONG)
    process = ForkedCommand(home, *words, cwd=REPO)
    wait_for(lambda: any((home / "runs" / "digits").glob("*/last.ckpt")))
    process.send_signal(signal.SIGINT)
    code, out, err = process.end()
    assert code == 130, out + err
    folders = [path.parent for path in (home / "runs" / "digits").glob("*/config.yaml")]
    assert {state_of(folder) for folder in folders} == {"killed"}
    assert {record.read_result(folder)["status"] for folder in folders} == {"KILLED"}
    assert "to go on: python -m sddlskd.train -m" in out + err
    code, out, err = ForkedCommand(home, *words, cwd=REPO).end()
    assert code == 0, out + err
    assert {state_of(folder) for folder in folders} == {"finished"}
    for folder in folders:
        assert [row["epoch"] for row in record.read_rows(folder)] == [1, 2, 3, 4]


@pytest.mark.slow
@pytest.mark.usefixtures("a_terminal_that_may_close")
def test_a_closed_terminal_stops_with_checkpoints(home: Path) -> None:
    terminal, screen = os.openpty()
    words = ("-m", "sddlskd.train", "-m", *COMMON, f"home={home}", "sweep.name=test", *LONG)
    command = [sys.executable, *words, "trainer.progress=auto"]
    with subprocess.Popen(
        command, stdin=screen, stdout=screen, stderr=screen, cwd=REPO, start_new_session=True
    ) as process:
        os.close(screen)

        def saves() -> bool:
            if select.select([terminal], [], [], 0)[0]:
                os.read(terminal, 1 << 16)  # a full screen would block the sweep
            return any((home / "runs" / "digits").glob("*/last.ckpt"))

        wait_for(saves)
        os.close(terminal)
        os.killpg(process.pid, signal.SIGHUP)
        assert process.wait(60) != 0
    results = [record.read_result(path.parent) for path in home.glob("runs/digits/*/config.yaml")]
    assert {one["status"] for one in results} == {"KILLED"}
    assert {one["reason"] for one in results} == {"stopped by SIGHUP"}


@pytest.mark.slow
def test_killed_sweeps_end_as_undisturbed_ones(home: Path) -> None:
    """The weights must be those of undisturbed sweeps.

    The record must have every epoch once, and MLflow must have every job and epoch once.
    """
    draw = random.Random(1)
    undisturbed = home / "undisturbed"
    checkpoint.write(
        undisturbed / "teachers/digits/resnet8.pt",
        checkpoint.read(home / "teachers/digits/resnet8.pt"),
    )
    fixed = [text for text in LONG if not text.startswith("M=")]
    fit(grid_of(undisturbed, [*COMMON, *fixed], [["M=[1]"], ["M=[2]"]])[2])
    for kill in ("sweep", "worker"):
        process = start(home, *LONG, "tracking=mlflow")
        wait_for(saves_again(home, process))
        time.sleep(draw.uniform(0.0, 1.0))
        victims = [process.pid] if kill == "sweep" else workers_of(process.pid)
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
        process.communicate(timeout=180)
    words = ("-m", *COMMON, f"home={home}", "sweep.name=test", *LONG, "tracking=mlflow")
    code, out, err = ForkedCommand(home, "sddlskd.train", *words, cwd=REPO).end()
    assert code == 0, out + err
    manifest = json.loads((home / "runs/sweeps/test/sweep.json").read_text())
    assert len(manifest["jobs"]) == 2
    for path in manifest["jobs"]:
        twin = undisturbed / "runs" / "digits" / Path(path).name
        ours, theirs = (
            checkpoint.read(folder / "last.ckpt")["model"] for folder in (Path(path), twin)
        )
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
        assert [row["epoch"] for row in record.read_rows(Path(path))] == [1, 2, 3, 4]
    plan = json.loads((home / "runs/sweeps/test/plan.json").read_text())
    assert [job["run_dir"] for job in plan["jobs"]] == manifest["jobs"]
    in_mlflow = mlflow_jobs(home)
    assert {run.data.tags["config_hash"] for run in in_mlflow} == {
        job["config_hash"] for job in plan["jobs"]
    }
    assert sorted(run.data.tags["run_dir"] for run in in_mlflow) == sorted(manifest["jobs"])
    for run in in_mlflow:
        assert run.info.status == "FINISHED"
        steps = [
            point.step for point in client_of(home).get_metric_history(run.info.run_id, "val/top1")
        ]
        assert sorted(steps) == [1, 2, 3, 4]


def saves_again(home: Path, process: subprocess.Popen[str]) -> Callable[[], bool]:
    """Return a function: whether a checkpoint was written since, or the process has ended."""
    before = checkpoints(home)
    return lambda: process.poll() is not None or bool(checkpoints(home) - before)


def test_the_plan_names_every_job_of_every_start(home: Path) -> None:
    first = jobs_of(home, network("Tiny"), network("Tiny") + " seed=1")
    sweep(first)
    second = jobs_of(home, network("Tiny") + " M=[2]", network("Tiny"), common=("tracking=mlflow",))
    sweep(second)
    plan = json.loads((home / "runs/sweeps/test/plan.json").read_text())
    jobs = {job.run_dir: job for job in [*first, *second]}
    assert len(plan["jobs"]) == len(jobs) == 3
    for planned in plan["jobs"]:
        job = jobs[planned["run_dir"]]
        assert planned["config_hash"] == cfg.config_hash(job)
        assert planned["command"] == f"python -m sddlskd.worker {job.run_dir}"
        params = {**plan["common"], **planned["params"]}
        for key in ("student.name", "M", "seed", "trainer.epochs"):
            assert params[key] == str(cfg.flatten(job)[key])
    (parent,) = client_of(home).search_runs(["1"], "tags.kind = 'sweep'")
    assert [file.path for file in client_of(home).list_artifacts(parent.info.run_id)] == [
        "plan.json"
    ]


def add_jobs(home: Path, seeds: range) -> None:
    for seed in seeds:
        job = Config(home=str(home), seed=seed, run_dir=str(home / f"runs/{seed}"))
        write_manifest(home / "runs/sweeps/test", "test", [job])
        write_plan(home / "runs/sweeps/test", "test", [job])


def test_two_launches_of_one_sweep_lose_no_job(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    launches = [
        context.Process(target=add_jobs, args=(tmp_path, range(at, at + 20))) for at in (0, 20)
    ]
    for launch in launches:
        launch.start()
    for launch in launches:
        launch.join()
    folder = tmp_path / "runs/sweeps/test"
    assert len(read_manifest(folder)["jobs"]) == 40
    assert len(json.loads((folder / "plan.json").read_text())["jobs"]) == 40


def test_a_check_that_dies_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for program, why in (("kill -9 $$", "SIGKILL"), ("exit 3", "exit code 3")):
        fake = tmp_path / "python"
        fake.write_text(f"#!/bin/sh\ncat > /dev/null\n{program}\n")
        fake.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(fake))
        with pytest.raises(
            OSError, match=f"check of the jobs died \\({why}\\), so none was started"
        ):
            ask_precheck([], [])


def test_mlflow_knows_a_sweep_whose_jobs_another_ran(home: Path) -> None:
    jobs = jobs_of(home, network("Tiny"), common=("tracking=mlflow",))
    sweep(jobs)
    run(jobs, "other")
    parents = client_of(home).search_runs(["1"], "tags.kind = 'sweep' and tags.sweep = 'other'")
    assert [parent.info.status for parent in parents] == ["FINISHED"]
    assert [file.path for file in client_of(home).list_artifacts(parents[0].info.run_id)] == [
        "plan.json"
    ]
    assert len(mlflow_jobs(home)) == 1


def test_a_server_that_is_gone_at_the_end_costs_no_outcome(
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    def away(*arguments: Any) -> None:
        raise ConnectionError("the server is away")

    def run(self: Pool, *arguments: Any) -> str:
        monkeypatch.setattr(tracking_uri, "check_answers", away)
        monkeypatch.setattr(tracking_uri, "client", away)
        return "KILLED"

    monkeypatch.setattr(Pool, "run", run)
    sweep(jobs_of(home, network("Tiny"), common=("tracking=mlflow",)))
    assert "to go on: " in capsys.readouterr().out
    assert "did not accept the sweep's outcome: the server is away" in caplog.text


def test_the_command_for_tables_names_the_home_if_the_folder_does_not(home: Path) -> None:
    jobs = jobs_of(home, network("Tiny"), common=("tracking=mlflow",))
    plan: Any = SimpleNamespace(name="mine", jobs=jobs)
    command = _command_for_tables(plan)
    assert command == f"table: python -m sddlskd.analysis mine --home {home}"


def checkpoints(home: Path) -> set[tuple[str, int]]:
    """Return the path and the time of every job's last checkpoint."""
    found = set()
    for path in (home / "runs" / "digits").glob("*/last.ckpt"):
        with suppress(FileNotFoundError):
            found.add((str(path), path.stat().st_mtime_ns))
    return found


def client_of(home: Path) -> Any:
    return tracking_uri.client(f"sqlite:///{home}/mlflow.db")


def mlflow_jobs(home: Path) -> list[Any]:
    client = client_of(home)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return [run for run in client.search_runs(experiments) if run.data.tags.get("kind") == "job"]


def workers_of(parent: int) -> list[int]:
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [int(child) for child in children]


def test_a_worker_that_is_stopped_twice_leaves_its_jobs_interrupted(home: Path) -> None:
    job = jobs_of(home, "seed=0")[0]
    own = pool(["cpu"])
    own._ended(ExitCode.STOPPED, Task([job]))
    assert [task.is_retry for task in own.queue] == [True]
    own._ended(ExitCode.STOPPED, own.queue.pop())
    assert not own.queue
    assert not record.read_result(Path(job.run_dir))  # a worker that died twice would be FAILED


def test_a_loss_that_compares_images_is_refused_before_slurm_gets_it(home: Path) -> None:
    words = ("seed=0", "recipe=dist", "recipe=at", "recipe=kd")
    jobs = jobs_of(home, *(f"{word} trainer.devices=2" for word in words))
    found = precheck.report(jobs, [], False)["problems"]
    assert [index for index, _ in found] == [1, 2]
    assert all("all images of a batch; set trainer.devices=1" in reason for _, reason in found)


def test_failures_are_grouped_by_the_cause_in_their_reason() -> None:
    assert cause_of("OutOfMemoryError: CUDA out of memory. Tried") == "out of memory"
    assert (
        cause_of("NonFiniteLoss: loss became nan at epoch 17, step 4; lower")
        == "non-finite loss at epoch 17"
    )
    assert cause_of("its worker died twice (SIGKILL); out of memory?") == "worker died"
    assert cause_of("FileNotFoundError: teacher=x is missing") == "FileNotFoundError"


def test_a_sweep_without_its_tracking_server_leaves_no_trace(home: Path) -> None:
    jobs = jobs_of(home, "tracking=mlflow tracking.uri=http://127.0.0.1:1")
    with pytest.raises(ConnectionError, match=r"tracking\.uri=http"):
        run(jobs)
    assert not (home / "runs").exists()


def test_a_refused_sweep_leaves_no_trace(home: Path) -> None:
    process = start(home, "M=[1],[99]")
    told, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "M=[99] is too fine" in told.splitlines()[-1]
    assert not (home / "runs").exists()


def test_a_stop_while_a_worker_starts_reaches_it(home: Path) -> None:
    class Starting(subprocess.Popen[bytes]):
        def __init__(self, command: list[str], **how: Any) -> None:
            super().__init__(command, **how)
            signal.raise_signal(signal.SIGTERM)

    jobs = jobs_of(home, network("Slow", seconds=0.2), network("Slow", seconds=0.2) + " seed=1",
                   common=("trainer.max_steps=null", "trainer.epochs=50"))  # fmt: skip
    before = time.monotonic()
    results, code = sweep(jobs, start=Starting)
    assert code == 130
    assert statuses(results)[1] == "NEW"
    assert statuses(results)[0] in ("NEW", "KILLED")
    assert time.monotonic() - before < 60  # without the stop, it would train for minutes


def test_another_length_under_the_name_of_a_sweep_is_a_warning(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, longer = (
        jobs_of(home, f"trainer.epochs={epochs}", common=("sweep.plan=true",)) for epochs in (1, 2)
    )
    write_manifest(home / "runs/sweeps/test", "test", first)
    write_plan(home / "runs/sweeps/test", "test", first)
    plan_unchecked([*first, *longer])
    assert "trainer.epochs=2 is new to sweep test, which has jobs of 1 epoch; " in caplog.text
    caplog.clear()
    plan_unchecked(first)
    assert "is new to sweep" not in caplog.text


def test_one_run_dir_for_two_jobs_is_refused(home: Path) -> None:
    jobs = jobs_of(home, "M=[1]", "M=[2]", common=(f"run_dir={home}/same",))
    with pytest.raises(ValueError, match="one run_dir"):
        run(jobs)


def test_jobs_that_another_process_runs_are_left_to_it(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = jobs_of(home, network("Tiny"), network("Tiny") + " M=[2]")
    elsewhere = record.Record(jobs[0])
    (Path(jobs[0].run_dir) / "result.json").write_text(
        json.dumps({"status": "RUNNING", "reason": "", "seconds": 0.0})
    )
    try:
        results, code = sweep(jobs)
    finally:
        elsewhere.close()
    assert statuses(results) == ["RUNNING", "FINISHED"]
    assert code == 1
    (row,) = (line for line in capsys.readouterr().out.splitlines() if "RUNNING" in line)
    assert row.rstrip("│ ").split()[-1] == "-"  # the time is not known


def test_a_failed_job_is_judged_by_its_new_run(home: Path) -> None:
    jobs = jobs_of(home, network("Tiny"))
    record.freeze(jobs[0])
    record.write_text(
        Path(jobs[0].run_dir, "result.json"),
        json.dumps({"status": "FAILED", "reason": "the old one"}),
    )
    results, code = sweep(jobs, fail_fast=True)
    assert statuses(results) == ["FINISHED"]
    assert code == 0


def test_a_new_launch_does_not_keep_the_tracking_server_of_an_earlier_one(home: Path) -> None:
    (job,) = jobs_of(home, "tracking=mlflow tracking.uri=http://127.0.0.1:1")
    record.freeze(job)
    results, code = sweep(jobs_of(home, "tracking=none"))
    assert statuses(results) == ["FINISHED"]
    assert code == 0


def test_the_command_to_go_on_does_not_start_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train", "-m", "M=[1],[2]", "sweep.rerun=all"])
    assert command_to_continue("/h") == "python -m sddlskd.train -m 'M=[1],[2]' home=/h"


def test_a_teacher_file_that_was_replaced_is_named(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    jobs = jobs_of(home, network("Tiny"))
    sweep(jobs)
    torch.manual_seed(1)
    checkpoint.write(
        home / "teachers/digits/resnet8.pt", {"model": create("resnet8", 10).state_dict()}
    )
    monitored = logging.getLogger("sddlskd")
    monitored.propagate = True
    sweep(jobs)
    assert "1 finished job learnt from another teacher file" in caplog.text


def test_a_loss_that_was_edited_is_named(
    home: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = jobs_of(home, network("Tiny"))
    sweep(jobs)
    logging.getLogger("sddlskd").propagate = True
    sweep(jobs)
    assert "than the current one" not in caplog.text
    kept = Path(jobs[0].run_dir, "code.json")
    module = next(iter(json.loads(kept.read_text())["own_code"]))
    monkeypatch.setattr(record, "own_code_of", lambda job: {module: "edited"})
    sweep(jobs)
    fit(jobs)
    assert f"{jobs[0].run_dir} ran another version of {module} than" in caplog.text
    assert f"1 finished job ran another version of {module} than the current one" in caplog.text


def test_a_job_s_own_device_counts_unless_devices_are_listed() -> None:
    auto = pool()
    jobs = [Config(), Config()]
    jobs[1].trainer.device = "cuda:1"
    auto.queue.extend(Task([job]) for job in jobs)
    assert auto._next("cpu").jobs == [jobs[0]]
    assert auto._next("cpu") is None
    assert auto._next("cuda:1").jobs == [jobs[1]]
    assert pool("cuda:1").devices == ["cuda:1"]
    listed = pool(["cpu"])
    listed.queue.extend(Task([job]) for job in jobs)
    assert [listed._next("cpu").jobs for _ in jobs] == [[jobs[0]], [jobs[1]]]


@pytest.mark.slow
def test_a_job_of_several_devices_has_the_pool_to_itself(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide, narrow = jobs_of(home, "seed=0 trainer.devices=2", "seed=1")
    results, code = sweep([wide, narrow], devices=["cpu", "cpu"])
    assert statuses(results) == ["FINISHED"] * 2
    assert code == 0
    assert [" 2 ranks" in result["environment"] for result in results] == [True, False]

    started: list[Any] = []

    def note(command: list[str], *, env: dict[str, str], start_new_session: bool) -> None:
        started.append((command, env))

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    two = pool(["cuda:1", "cuda:2"], start=note)
    two.queue.extend([Task([wide]), Task([narrow])])
    two._start_workers()
    assert [task.jobs for _, task in two.busy.values()] == [[wide]]
    command, environment = started[0]
    assert command[command.index("--device") + 1] == "cuda"
    assert environment["CUDA_VISIBLE_DEVICES"] == "5,6"
    two.busy = {0: (two.busy[0][0], Task([narrow]))}
    two.queue.extend([Task([wide])])
    assert [task.jobs for task in iter(lambda: two._next("cuda:2"), None)] == [[narrow]]


def test_more_workers_than_cores_are_refused_before_anything_is_written(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDDLSKD_MOST_PROCESSES", "2")
    jobs = jobs_of(home, "seed=0", "seed=1", "seed=2")
    before = sorted(home.rglob("*"))
    said = "^the number of workers in hydra.launcher.devices=3 asks for more .* give at most 2"
    with pytest.raises(ValueError, match=said):
        run(jobs, devices=["cpu"] * 1000)
    assert sorted(home.rglob("*")) == before
    pool(devices=["cpu"] * 1000).validate(jobs[:2], ["cpu"])


def test_workers_share_the_cores_of_a_machine_that_does_not_tell_which_are_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")  # macOS has none
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    two = pool(["cpu", "cpu"])
    assert two.run([], tmp_path, ["cpu"]) == "FINISHED"
    assert two.threads == 4


def test_a_sweep_trains_on_the_device_that_a_single_run_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for is_there, device in ((False, "cpu"), (True, "mps")):
        monkeypatch.setattr("torch.backends.mps.is_available", lambda answer=is_there: answer)
        visible = precheck.report([], [])["devices"]
        assert visible == [device]
        assert pool().places([Config()], visible) == [device]


def finding(*devices: str) -> Any:
    """Return a check of jobs that finds these devices on this machine."""
    return lambda *arguments: precheck.report(*arguments) | {"devices": list(devices)}


def test_a_device_that_fails_leaves_its_jobs_to_the_others(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("sddlskd").propagate = True
    caplog.set_level(logging.INFO)
    check = finding("cuda:99")
    jobs = jobs_of(home, *(f"{network('Tiny')} seed={seed}" for seed in (0, 1)))
    devices = pool(["cuda:99"])
    with pytest.raises(SystemExit) as caught:
        run_sweep(jobs, "test", runner=devices, precheck=check)
    assert caught.value.code
    assert [state_of(Path(job.run_dir)) for job in jobs] == ["killed", "new"]
    assert "too few devices are left for 2 jobs; the same command trains what stays" in caplog.text
    caplog.clear()
    run_sweep(jobs, "test", runner=pool(["cuda:99", "cpu"]), precheck=check)
    assert [state_of(Path(job.run_dir)) for job in jobs] == ["finished"] * 2
    assert caplog.text.count("cuda:99 is taken out of the sweep: DeviceFailure: trainer.dev") == 1
    assert "starting a worker on cpu for group 2 of 2" in caplog.text
    assert "1 of 2 jobs done; time left: about 0:0" in caplog.text


def test_a_failed_device_of_several_leaves_the_job_to_the_others(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("sddlskd").propagate = True
    gpus = ["cuda:97", "cuda:98", "cuda:99"]
    (job,) = jobs_of(home, "trainer.devices=2")
    with pytest.raises(SystemExit):
        run_sweep([job], "test", runner=pool(gpus), precheck=finding(*gpus))
    assert state_of(Path(job.run_dir)) == "killed"
    out = "is taken out of the sweep: DeviceFailure: CUDA does not find GPU"
    assert all(f"cuda:{n} {out} {n}, which" in caplog.text for n in (97, 98))
    assert "cuda:99 is" not in caplog.text
    assert "too few devices are left for 1 job; the same" in caplog.text

    wide = pool(gpus)
    wide.devices = gpus
    wide.queue.extend([Task([job]), Task([job])])
    assert wide._at_once([job]) == 1  # each job takes several devices
    narrow = replace(job, trainer=replace(job.trainer, devices=1))
    assert wide._at_once([narrow]) == 2  # two groups for three devices

    ended = SimpleNamespace(returncode=ExitCode.NO_DEVICE_0 + 1)
    ended.poll = lambda: ended.returncode
    second_fails = pool(gpus, start=lambda *_, **__: ended)
    second_fails.queue.append(Task([job]))
    second_fails._start_workers()
    second_fails._collect_workers()
    assert second_fails.failed_devices == {"cuda:98"}
    assert second_fails._may_train("cuda:99", second_fails.queue[0])


def test_an_interrupted_job_that_is_refused_keeps_the_reason(home: Path) -> None:
    jobs = jobs_of(home, network("Tiny"))
    record.freeze(jobs[0])
    opened = record.Record(jobs[0])
    opened.write_outcome("KILLED", "stopped")
    opened.close()
    own = pool(["cpu"])
    own.devices = ["0"]
    assert own.run([jobs], home, ["cpu"]) == "FINISHED"
    result = record.read_result(Path(jobs[0].run_dir))
    assert result["status"] == "FAILED"
    assert result["reason"].startswith("ValueError: trainer.device=0 is unknown")


@pytest.mark.parametrize(
    ("devices", "said"),
    [
        (4, "=4 is not a list; give [cuda:0,cuda:1,cuda:2,cuda:3] or auto"),
        (True, "=True is not a list; give [cuda:0,cuda:1] or auto"),
        (None, "=null is not a list; give [cuda:0,cuda:1] or auto"),
        ([0, 1], "=[0,1] names 0, which is no device; give [cuda:0,cuda:1], [cpu] or auto"),
        (["cpu", "gpu"], "=[cpu,gpu] names gpu, which is no device; give [cuda:0,cuda:1], [cpu]"),
        ([], "=[] has no device; give auto or a list such as [cuda:0,cuda:1] or [cpu,cpu]"),
    ],
)
def test_what_is_no_list_of_devices_is_refused(devices: Any, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"hydra.launcher.devices{said}")):
        pool(devices)


def test_gpus_that_are_not_here_are_refused() -> None:
    def missing(listed: list[str], visible: list[str]) -> list[str]:
        return [str(refusal) for refusal in pool(listed).refusals([], visible)]

    assert not missing(["cuda:1", "cuda", "cpu"], ["cuda:0", "cuda:1"])
    (said,) = missing(["cuda:1", "cuda:2"], ["cuda:0", "cuda:1"])
    assert said.startswith("this machine has no cuda:2, which hydra.launcher.devices names")
    assert said.endswith("give auto, or a list such as [cuda:0,cuda:1]")
    (said,) = missing(["cuda"], ["cpu"])
    assert said.endswith("give auto, or a list such as [cpu,cpu]")


def test_a_worker_that_is_stopped_while_it_loads_leaves_silently(home: Path) -> None:
    with held_back():
        worker = subprocess.Popen(
            [sys.executable, "-m", "sddlskd.worker", str(home)], stderr=subprocess.PIPE
        )
    worker.send_signal(signal.SIGINT)
    _, said = worker.communicate(timeout=60)
    assert (worker.returncode, said) == (ExitCode.STOPPED, b"")


def test_the_plan_says_which_jobs_are_equal_to_others(tmp_path: Path) -> None:
    nothing = no_findings()

    def lines(*words: str) -> list[str]:
        jobs = [tiny(tmp_path, *words, f"M={M}") for M in ("[1]", "[1,2]", "[1,2]")]
        plan = make_plan(jobs, "s", runner=pool(), precheck=lambda *_: nothing)
        return plan_lines(plan)

    assert lines()[1] == "1 more job is equal to these"
    assert lines("recipe=vanilla")[1] == (
        "2 more jobs are equal to these: M and the settings of a distillation have no effect "
        "without a loss on the logits (distiller=vanilla)"
    )


def test_the_plan_names_recipes_that_give_the_same_training(tmp_path: Path) -> None:
    def lines(*recipes: str) -> list[str]:
        jobs = [
            tiny(tmp_path, f"recipe={recipe}", f"M={M}", f"seed={seed}")
            for recipe in recipes
            for M in ("[1]", "[1,2]")
            for seed in (0, 1)
        ]
        plan = make_plan(jobs, "s", runner=pool(), precheck=lambda *_: no_findings())
        return [line for line in plan_lines(plan) if "give the same" in line]

    assert lines("kd", "kd_ls") == []
    assert lines("kd", "sd_kd") == [
        "recipe=kd (clip_norm=null) and recipe=sd_kd (clip_norm=40.0) give the same KD, "
        "SD-KD [1,2] but for optimizer.clip_norm, and the same numbers where no gradient is "
        "clipped; list the jobs by sweep.jobs instead"
    ]
