"""Test the command line: what it refuses, what it leaves behind, and how it starts."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from sddlskd import config as cfg
from sddlskd import record, train
from sddlskd.models import create
from sddlskd.terminal import console
from tests.conftest import compose_in
from tests.tiny import CONF, DIVERGES, ForkedCommand

ROOT = Path(__file__).parents[1]
SCRIPT = Path(sys.executable).with_name("sddlskd-train")
SMALL = (
    "dataset=digits",
    "teacher=resnet8",
    "student=resnet8",
    "trainer=debug",
    "trainer.device=cpu",
)
MODULE = (sys.executable, "-m", "sddlskd.train")


@dataclass
class Done:
    """Exit code and output of a command."""

    code: int
    out: str
    err: str

    def refusal(self, *patterns: str) -> str:
        """Return the line of the error.

        The command must have failed, printed only this line, and the line must match `patterns`.
        """
        assert self.code == 1, (self.code, self.out, self.err)
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("error: ")
        assert self.out == ""
        for pattern in patterns:
            assert re.search(pattern, lines[0], re.IGNORECASE), f"{pattern} is not in {lines[0]}"
        return lines[0]


Command = Callable[..., Done]


def content(folder: Path) -> dict[str, bytes | None]:
    """Return {path: content} of a folder; the content of a folder is None."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in folder.rglob("*")
    }


def shell(
    *command: str | Path, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> Done:
    """Run a command as a process of its own."""
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **(env or {})},
    )
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def here(
    teacher_home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Command]:
    """Yield a function of overrides that runs the command in this process.

    It runs the smallest job, in a home with a teacher.
    """
    package = logging.getLogger("sddlskd")
    before = package.handlers[:], package.level, package.propagate

    def run(*overrides: str, small: tuple[str, ...] = (*SMALL, "tracking=none")) -> Done:
        GlobalHydra.instance().clear()
        HydraConfig.instance().cfg = None
        # argparse requires the options before the overrides.
        options = [part for part in overrides if part.startswith("--")]
        rest = [part for part in overrides if part not in options]
        monkeypatch.setattr(
            sys, "argv", ["sddlskd-train", *options, f"home={teacher_home}", *small, *rest]
        )
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
        code = 0
        capsys.readouterr()
        try:
            train.main()
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 0
        return Done(code, *capsys.readouterr())

    yield run
    GlobalHydra.instance().clear()
    package.handlers[:], package.level, package.propagate = before


@pytest.fixture
def refused(here: Command, teacher_home: Path) -> Callable[..., Done]:
    """Return the function of `here`, which also checks that the home stays unchanged."""

    def run(*overrides: str, **options: tuple[str, ...]) -> Done:
        before = content(teacher_home)
        done = here(*overrides, **options)
        assert content(teacher_home) == before
        return done

    return run


# Bad input: one line with the value and what to do, exit code 1, and no files left behind


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["M=[]"], [r"M=\[\]", r"distinct positive integers, such as M=\[1,2,4\]"]),
        (["M=[0]"], [r"M=\[0\]", "distinct positive integers"]),
        (["M=[1,1]"], [r"M=\[1, ?1\]", "distinct positive integers"]),
        (["M=[1,x]"], [r"M=\[1,x\]", "distinct positive integers"]),
        (["M=3"], ["M=3", "distinct positive integers"]),
        (["M=[1.5]"], [r"M=\[1\.5\]", "distinct positive integers"]),
        (["M=[1"], [r"M=\[1 ", r"key=value"]),
        (["scales=[1,2]"], [r"scales=\[1,2\]", r"M=\[1,2\]", r"scales=global\|two"]),
        (["scales=4"], ["scales=4", r"M=\[4\]"]),
        (["M=[17]"], [r"M=\[17\]", "the largest scale here is 16", "student=resnet8"]),
        (["M=[16]", "student=mobilev2"], [r"M=\[16\]", "the largest scale here is 4",
                                          "student=mobilev2"]),
        # Its stem is made for 224 pixels, so that 32 pixels leave a map of one place.
        (["student=timm", "student.model.name=resnet18", "M=[1,2,4]"],
         [r"M=\[1, 2, 4\]", r"student=timm_resnet18 has 1x1 places.* 32x32 pixels",
          r"set M=\[1,2\], or choose a network"]),
        (["student=resnet7"], ["student=resnet7", "did you mean student=resnet8",
                               "valid are .*shufflev1.*wrn_40_2"]),
        (["teacher=resnet9"], ["teacher=resnet9", "did you mean teacher=resnet8",
                               "valid are .*vgg13"]),
        (["dataset=cifar11"], ["dataset=cifar11", "did you mean dataset=cifar10",
                               "valid are .*digits"]),
        (["distiller=kdd"], ["distiller=kdd", "did you mean distiller=",
                             "valid are abkd, dist, .*, nkd, rld, skd, sld, ttm, vanilla, wttm"]),
        (["recipe=sdkd"], ["recipe=sdkd", "did you mean recipe=sd_kd", "valid are .*sd_kd_ls"]),
        (["recipe=sd_kd_sl"], [r"did you mean recipe=sd_kd_ls\?"]),
        (["teacher=resnet34"], [r"did you mean teacher=imagenet_resnet34\?",
                                "teacher=timm teacher.model.name=NAME takes a network of timm"]),
        (["pair=resnet32x4_resnet8x5"], ["did you mean pair=resnet32x4_resnet8x4",
                                         "valid are .*wrn_40_2_wrn_40_1"]),
        (["scales=four"], ["scales=four", "valid are global, skip, three, two"]),
        (["tracking=wandb"], ["tracking=wandb", "valid are mlflow, none"]),
        (["trainer.device=tpu"], ["trainer.device=tpu",
                                  "valid are auto, cpu, cuda, cuda:<number> or mps"]),
        (["trainer.device=xpu"], ["trainer.device=xpu", "valid are auto, cpu, cuda"]),
        (["trainer.precision=fp8"], ["trainer.precision=fp8", r"fp32, bf16, fp16"]),
        (["optimizer.schedule=linear"], ["optimizer.schedule=linear", "step, cosine, constant"]),
        (["trainer.batch_size=2000"], ["batch_size.*2000", "1437"]),
        (["trainer.batch_size=0"], ["trainer.batch_size=0", "at least 2"]),
        (["trainer.epohs=3"], ["trainer.epohs", "did you mean trainer.epochs",
                               "valid are .*batch_size"]),
        (["studnet=resnet8"], ["studnet", "did you mean student", "valid are .*recipe"]),
        (["recip=kd"], ["recip", "did you mean recipe"]),
        (["temperature=2"], [r"did you mean distiller\.temperature\?"]),
        (["lr=0.1"], [r"did you mean optimizer\.lr or teacher\.lr or student\.lr\?"]),
        (["epochs=3"], [r"did you mean trainer\.epochs\?"]),
        (["ce_weight=1"], [r"did you mean distiller\.ce_weight\?"]),
        (["batch_size=32"], [r"did you mean trainer\.batch_size\?"]),
        (["root=data"], [r"did you mean dataset\.root\?"]),
        (["distiller.lr=0.1"], [r"unknown; did you mean optimizer\.lr or teacher\.lr or student"]),
        (["method=kd"], ["method is unknown; did you mean recipe"]),
        (["recipe=SD-KD+LS"], [r"did you mean recipe=sd_kd_ls\?"]),
        (["recipe=LSKD"], [r"did you mean recipe=kd_ls\?"]),
        (["max_group_size=3"], [r"did you mean hydra\.launcher\.max_group_size\?"]),
        (["distiller.loss.temprature=3"], ["did you mean distiller.loss.temperature"]),
        (["+trainer.foo=1"], ["trainer.foo is unknown", "valid are .*epochs"]),
        (["+foo=1"], ["foo is unknown", "valid are .*seed"]),
        (["trainer.epochs=ten"], ["trainer.epochs=ten", "Integer"]),
        (["trainer.compile=maybe"], ["trainer.compile=maybe", "bool"]),
        (["optimizer.lr=high"], ["optimizer.lr=high is not a number"]),
        (["teacher.checkpoint=[1]"], [r"teacher.checkpoint=\[1\]", "string"]),
        (["seed=-1"], ["seed=-1", "not be negative"]),
        (["student=resnet8,resnet14"], ["student=resnet8,resnet14", "put -m before"]),
        (["student"], ["student", "key=value"]),
        (["-m", "hydra/sweeper=optuna", "distiller.temperature=interval(1)"],
         [r"interval\(1\) cannot be read \(missing a required argument: 'end'"]),
        (["home="], ["home is empty", r"home=\."]),
        (["hydra/launcher=slrum"], ["hydra/launcher=slrum", "did you mean hydra/launcher=slurm",
                                    "Valid are .*slurm"]),
        (["--config-name=nope"], ["nope", "--config-dir"]),
        (["+dataset.load.size=3"], ["size"]),
        (["teacher=resnet14", "teacher.train_if_missing=false"],
         ["teacher=resnet14 for digits is missing",
          "distiller=vanilla student=resnet14 and the dataset.* and trainer.* words of this job",
          "teacher.train_if_missing=true",
          "teacher.checkpoint=FILE"]),
        (["teacher.checkpoint=/no/such.pt"], [r"/no/such\.pt", "teacher.checkpoint=FILE"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)  # fmt: skip
def test_bad_input_takes_one_line(
    refused: Callable[..., Done],
    monkeypatch: pytest.MonkeyPatch,
    overrides: list[str],
    says: list[str],
) -> None:
    refused(*overrides).refusal(*says)


def test_the_flag_for_a_sweep_may_stand_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train", "seed=0,1", "-m", "M=[1]"])
    train._mend_arguments()
    assert sys.argv == ["train", "-m", "seed=0,1", "M=[1]"]


def test_cuda_without_cuda(refused: Callable[..., Done], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("cuda", "cuda:1"):
        refused(f"trainer.device={device}").refusal(
            f"trainer.device={device} needs CUDA", "trainer.device=cpu or auto"
        )


def test_data_that_cannot_be_fetched(
    here: Command, monkeypatch: pytest.MonkeyPatch, teacher_home: Path
) -> None:
    monkeypatch.setattr(
        "sddlskd.datasets.arrays.CIFAR100_URL", "http://127.0.0.1:1/cifar-100-python.tar.gz"
    )
    done = here("dataset=cifar100")
    assert (done.code, done.out) == (1, "")
    *_, line = done.err.splitlines()
    for part in (
        "error: cannot fetch http://127.0.0.1:1/cifar",
        "put cifar-100-python.tar.gz, md5 eb9058c",
        "home/data",
    ):
        assert part in line
    assert not (teacher_home / "runs").exists()


class Malicious:
    """An object that creates a folder if plain pickle loads it."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.target),)


def test_teacher_files_that_are_not_this_teachers(
    refused: Callable[..., Done], tmp_path: Path
) -> None:
    file, ran = tmp_path / "teacher.pt", tmp_path / "it-ran"
    override = f"teacher.checkpoint={file}"
    name = re.escape(str(file))

    torch.save({"model": create("resnet14", 10).state_dict()}, file)
    refused(override).refusal(
        name, "does not hold weights of resnet8", r"layer1\.1\.conv1\.weight is not in resnet8"
    )

    torch.save({"model": create("resnet8", 100).state_dict()}, file)
    refused(override).refusal(name, r"fc\.weight is \(100, 64\) instead of \(10, 64\)")

    torch.save({"model": create("resnet8", 10).state_dict()}, file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    refused(override).refusal(name, "truncated", "get it again")

    file.write_bytes(b"")
    refused(override).refusal(name, "truncated, damaged or not a checkpoint")

    torch.save({"model": create("resnet8", 10).state_dict(), "extra": Malicious(ran)}, file)
    refused(override).refusal(name, "is refused: it would run .*mkdir", "Nothing was run")
    assert not ran.exists()
    # Check that the file would indeed run code if it were loaded carelessly.
    torch.load(file, weights_only=False)
    assert ran.exists()


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("http://127.0.0.1:1", ["does not answer", "tracking=none"]),
        ("nonsense", ["is not valid", "sqlite:////"]),
    ],
)
def test_tracking_that_cannot_be_reached(
    refused: Callable[..., Done], uri: str, says: list[str]
) -> None:
    refused("tracking=mlflow", f"tracking.uri={uri}", small=SMALL).refusal(
        f"tracking.uri={uri}", *says
    )


BAD_LABELS = """
import torch
from sddlskd.datasets import Images, Splits

def load(label):
    images_NHWC = torch.zeros(20, 32, 32, 3, dtype=torch.uint8)
    labels_N = torch.arange(20) % 10
    labels_N[7] = label
    return Splits(Images(images_NHWC, labels_N), Images(images_NHWC, labels_N))
"""
BAD_LABELS_YAML = """
name: bad_labels
load: {_target_: bad_labels.load, label: 10}
num_classes: 10
mean: [0.5, 0.5, 0.5]
std: [0.5, 0.5, 0.5]
"""


@pytest.mark.parametrize("label", [10, -1])
def test_labels_out_of_range_in_a_data_set_of_ones_own(
    refused: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, label: int
) -> None:
    (tmp_path / "mine" / "dataset").mkdir(parents=True)
    (tmp_path / "mine" / "dataset" / "bad_labels.yaml").write_text(BAD_LABELS_YAML)
    (tmp_path / "bad_labels.py").write_text(BAD_LABELS)
    monkeypatch.syspath_prepend(tmp_path)
    job = (
        "dataset=bad_labels",
        f"dataset.load.label={label}",
        "trainer.batch_size=10",
        "allow_foreign_targets=true",
    )
    for way in (f"--config-dir={tmp_path}/mine", f"hydra.searchpath=[file://{tmp_path}/mine]"):
        refused(way, *job).refusal(rf"label {label} at index 7", r"0\.\.9", "num_classes")


def test_a_run_directory_of_another_job(here: Command, teacher_home: Path) -> None:
    folder = teacher_home / "runs" / "mine"
    assert here(f"run_dir={folder}").code == 0
    before = content(teacher_home)
    here(f"run_dir={folder}", "M=[1]").refusal(
        re.escape(str(folder)), r"M=\[1,2,4\] there", "choose another run_dir"
    )
    assert content(teacher_home) == before


def test_an_error_that_is_nobodys_fault_keeps_its_traceback(
    here: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sddlskd.training.group.build_data", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        here()


def test_a_traceback_on_request(
    monkeypatch: pytest.MonkeyPatch, here: Command, tmp_path: Path
) -> None:
    assert "Traceback" not in here("trainer.batch_size=2000").err
    GlobalHydra.instance().clear()
    monkeypatch.setattr(
        sys, "argv", ["x", *SMALL, "tracking=none", f"home={tmp_path}", "trainer.batch_size=2000"]
    )
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ValueError, match="batch_size"):
        train.main()


def test_explain_gives_one_line_for_anything() -> None:
    for error in (
        ValueError("a\nb\n\nc"),
        OSError(28, "No space left on device"),
        RuntimeError(""),
        KeyError("x"),
    ):
        assert "\n" not in console.explain(error)
    assert console.explain(ValueError("a\nb")) == "a b"


# Runs


def test_a_non_finite_loss_fails_with_step_and_value(here: Command, teacher_home: Path) -> None:
    done = here(DIVERGES, "allow_foreign_targets=true", "seed=5")
    assert done.code == 1
    (path,) = teacher_home.glob("runs/digits/*/result.json")
    result = json.loads(path.read_text())
    assert result["status"] == "FAILED"
    assert re.search(
        r"loss became (nan|inf) at epoch 1, step 2; lower optimizer\.lr", result["reason"]
    )
    assert "FAILED" in done.out


RESULT_KEYS = {
    "run_id",
    "status",
    "reason",
    "config_hash",
    "best_top1",
    "last_top1",
    "epochs",
    "seconds",
}


@pytest.fixture(scope="module")
def module_home(tmp_path_factory: pytest.TempPathFactory, _trained_home: Path) -> Path:
    home = tmp_path_factory.mktemp("module")
    (home / "teachers").symlink_to(_trained_home / "teachers")
    return home


@pytest.fixture(scope="module")
def good_run(module_home: Path) -> tuple[tuple[str | Path, ...], Done, Path]:
    """Return a command, its outcome and its run directory."""
    command = (*MODULE, f"home={module_home}", *SMALL, "tracking=none")
    done = shell(*command, cwd=module_home)
    assert done.code == 0, done.err
    (folder,) = (module_home / "runs" / "digits").iterdir()
    return command, done, folder


def test_a_run_leaves_its_record(good_run: tuple[tuple[str | Path, ...], Done, Path]) -> None:
    _, done, folder = good_run
    assert {"config.yaml", "last.ckpt", "best.ckpt", "metrics.jsonl", "result.json"} <= {
        p.name for p in folder.iterdir()
    }
    result = json.loads((folder / "result.json").read_text())
    assert set(result) >= RESULT_KEYS
    assert (result["status"], result["reason"], result["epochs"]) == ("FINISHED", "", 1)
    job = cfg.load(folder / "config.yaml")
    assert result["config_hash"] == cfg.config_hash(job) == folder.name.rpartition("-")[2]
    assert (job.run_dir, job.M, job.dataset.name) == (str(folder), [1, 2, 4], "digits")
    (row,) = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    contract = {
        "train/loss", "train/loss_ce", "train/loss_kd", "train/top1", "val/top1", "val/top5",
        "val/loss", "lr", "time/epoch_s", "time/images_per_s",
    }  # fmt: skip
    assert contract <= set(row)
    assert result["last_top1"] == row["val/top1"]
    assert re.fullmatch(r"[A-Za-z0-9._-]+-M-1-2-4-s0-[0-9a-f]{12}", folder.name)
    assert "FINISHED" in done.out
    assert str(folder.parent) in done.out
    assert "Traceback" not in done.err


def test_the_same_command_again_says_that_it_is_done(
    good_run: tuple[tuple[str | Path, ...], Done, Path],
) -> None:
    command, _, folder = good_run
    before, started = content(folder), time.monotonic()
    done = shell(*command, cwd=folder)
    assert done.code == 0, done.err
    assert "is finished already" in done.err
    assert time.monotonic() - started < 30
    assert {k: v for k, v in content(folder).items() if not k.startswith(".")} == {
        k: v for k, v in before.items() if not k.startswith(".")
    }


@pytest.mark.parametrize("when", ["as fit ends", "as the outcome is printed"])
def test_ctrl_c_after_the_end_is_no_failure(
    here: Command, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    from sddlskd.training import fit as training

    def interrupted(*arguments: Any, **options: Any) -> Any:
        result = original(*arguments, **options)
        signal.raise_signal(signal.SIGINT)
        return result

    place = (training, "fit") if when == "as fit ends" else (train, "outcomes")
    original = getattr(*place)
    monkeypatch.setattr(*place, interrupted)
    done = here("seed=21")
    assert (done.code, done.err.count("stopped")) == (0, 0)
    assert "FINISHED" in done.out


def test_another_process_in_the_same_run_directory(module_home: Path, tmp_path: Path) -> None:
    overrides = (*SMALL, "tracking=none", "seed=11")
    held = record.Record(compose_in(module_home, *overrides))
    try:
        before = content(held.folder)
        command = ForkedCommand(
            tmp_path, "sddlskd.train", f"home={module_home}", *overrides, cwd=tmp_path
        )
        Done(*command.end()).refusal(
            re.escape(str(held.folder)),
            f"in use by process {os.getpid()}",
            "choose another run_dir",
        )
        assert content(held.folder) == before
    finally:
        held.close()


def test_two_processes_starting_one_job_at_once(module_home: Path, tmp_path: Path) -> None:
    words = ("sddlskd.train", f"home={module_home}", *SMALL, "tracking=none", "seed=12")
    commands = [ForkedCommand(tmp_path, *words, cwd=tmp_path) for _ in range(2)]
    ended = [Done(*command.end()) for command in commands]
    assert any(done.code == 0 for done in ended), ended
    for done in ended:
        if done.code:
            done.refusal("in use by")
    (folder,) = module_home.glob("runs/digits/*-s12-*")
    assert record.read_result(folder)["status"] == "FINISHED"
    assert len(record.read_rows(folder)) == 1


@pytest.mark.parametrize("key", ["run_dir", "hydra.run.dir"])
def test_the_run_directory_can_be_chosen(here: Command, teacher_home: Path, key: str) -> None:
    folder = teacher_home / "mine" / "first try"
    assert here(f"{key}='{folder}'").code == 0
    assert record.read_result(folder)["status"] == "FINISHED"
    assert cfg.load(folder / "config.yaml").run_dir == str(folder)
    assert not (teacher_home / "runs").exists()


def test_a_file_can_choose_the_run_directory_with_hydras_key(
    here: Command, teacher_home: Path, tmp_path: Path
) -> None:
    folder = teacher_home / "mine"
    (tmp_path / "conf").mkdir()
    text = f"defaults: [config, _self_]\nhydra: {{run: {{dir: {folder}}}}}\n"
    (tmp_path / "conf" / "mine.yaml").write_text(text)
    assert here(f"--config-dir={tmp_path}/conf", "--config-name=mine").code == 0
    assert record.read_result(folder)["status"] == "FINISHED"
    assert not (teacher_home / "runs").exists()


@pytest.mark.parametrize("key", ["run_dir", "hydra.run.dir"])
def test_a_refused_job_makes_no_folder(
    refused: Callable[..., Done], teacher_home: Path, key: str
) -> None:
    for override, says in (("M=[0]", "M="), ("trainer.batch_size=2000", "batch_size")):
        refused(f"{key}={teacher_home}/not/there", override).refusal(says)


def test_a_refused_job_keeps_what_was_in_its_directory(
    refused: Callable[..., Done], teacher_home: Path
) -> None:
    folder = teacher_home / "notes"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    refused(f"run_dir={folder}", "trainer.batch_size=2000").refusal("batch_size")


def test_editing_yaml_later_changes_no_launched_job(
    here: Command, teacher_home: Path, tmp_path: Path
) -> None:
    choice = tmp_path / "mine" / "optimizer" / "mine.yaml"
    choice.parent.mkdir(parents=True)
    text = "defaults: [sgd]\nname: mine\nlr: 0.02\n"
    choice.write_text(text)
    run = (f"--config-dir={tmp_path}/mine", "optimizer=mine", f"run_dir={teacher_home}/run")
    assert here(*run).code == 0
    frozen = (teacher_home / "run" / "config.yaml").read_text()
    choice.write_text(text.replace("0.02", "0.5"))
    job = cfg.load(teacher_home / "run" / "config.yaml")
    assert job.optimizer.lr == 0.02
    assert record.read_result(teacher_home / "run")["config_hash"] == cfg.config_hash(job)
    here(*run).refusal("optimizer.lr=0.02 there, 0.5 here")
    assert (teacher_home / "run" / "config.yaml").read_text() == frozen


# Start of the command


def test_help_says_what_one_can_choose(tmp_path: Path) -> None:
    done = shell(SCRIPT, "--help", cwd=tmp_path, env={"COLUMNS": "100"})
    assert (done.code, done.err) == (0, "")
    for group in (
        "teacher, student", "distiller", "scales", "dataset", "optimizer", "trainer", "pair",
        "recipe", "tracking", "features",
    ):  # fmt: skip
        assert re.search(rf"^\s*{group}:", done.out, re.MULTILINE), group
    for choice in ("shufflev1", "sd_kd_ls", "fashion_mnist", "wrn_40_2_wrn_40_1", "skip"):
        assert choice in done.out
    # Choices are sorted by kind. The names of the pairs follow from those of the networks.
    for kind, names in {
        "for 224 pixels": "imagenet_resnet18, imagenet_resnet34, imagenet_resnet50, mobilev1",
        "without a teacher": "vanilla",
        "standardised logits": "ctkd_ls, dkd_ls, kd_ls, luminet, normkd",
        "in scales, standardised": "sd_dkd_ls, sd_kd_ls",
        "SDD with features": "sd_kd_crd, sd_kd_sp, sd_sp",
        "your own": "image_folder",
    }.items():
        assert re.search(rf"^    {kind}: +{names}$", done.out, re.MULTILINE), kind
    assert "pair: 30 of the papers' tables" in done.out
    assert "resnet32x4_mobilev2" not in done.out
    assert "others" not in done.out
    assert "_submitit" not in done.out
    # These groups are chosen by the data set, the recipe and the pair.
    assert "tuned" not in done.out
    assert "adapted" not in done.out
    assert max(map(len, done.out.splitlines())) <= 110
    assert list(tmp_path.iterdir()) == []


def test_help_lists_the_choices_of_another_folder(tmp_path: Path) -> None:
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "mine.yaml").write_text("name: mine\n")
    done = shell(*MODULE, "--help", f"--config-dir={tmp_path}", cwd=tmp_path)
    assert (done.code, done.err) == (0, "")
    assert re.search(r"^  student:\n(    .*\n)+    others: +mine$", done.out, re.MULTILINE)


HEAVY = "{'torch', 'torchvision', 'mlflow', 'pandas', 'sklearn', 'numpy'}"


@pytest.mark.parametrize("option", ["--help", "--cfg job", "M=[0]", "-sc query=bash"])
def test_nothing_heavy_is_imported_before_a_job_runs(tmp_path: Path, option: str) -> None:
    code = (
        f"import sys; sys.argv = ['x', *{option.split()!r}]\n"
        "from sddlskd import train\n"
        "try: train.main()\n"
        "except SystemExit: pass\n"
        f"sys.exit(repr({HEAVY} & set(sys.modules)))"
    )
    done = shell(sys.executable, "-c", code, cwd=tmp_path, env={"COMP_LINE": "x student=r"})
    assert done.err.splitlines()[-1] == "set()"
    assert done.out or option == "M=[0]"


def test_the_whole_configuration_is_shown(tmp_path: Path) -> None:
    done = shell(
        *MODULE,
        "--cfg",
        "job",
        "--resolve",
        f"home={tmp_path}",
        "student=shufflev1",
        "M=[1,2]",
        cwd=tmp_path,
    )
    assert (done.code, done.err) == (0, "")
    assert re.search(r"^M:\n- 1\n- 2$", done.out, re.MULTILINE)
    assert f"home: {tmp_path}\n" in done.out
    assert "run_dir: ''\n" in done.out  # the default, which contains the name of the checked job
    assert list(tmp_path.iterdir()) == []


def test_refusals_as_a_process(tmp_path: Path) -> None:
    for overrides, says in (
        (("M=[0]",), "M="),
        ((*SMALL, "tracking=none", "trainer.batch_size=2000"), "1437"),
    ):
        done = shell(SCRIPT, f"home={tmp_path}", *overrides, cwd=tmp_path)
        done.refusal(says)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("line", "candidates"),
    [
        ("sddlskd-train student=shuff", {"student=shufflev1", "student=shufflev2"}),
        ("sddlskd-train recipe=sd_kd", {"recipe=sd_kd", "recipe=sd_kd_ls"}),
        ("sddlskd-train trainer.prec", {"trainer.precision="}),
    ],
)
def test_tab_completion(tmp_path: Path, line: str, candidates: set[str]) -> None:
    done = shell(
        SCRIPT,
        "-sc",
        "query=bash",
        env={"COMP_LINE": line, "COMP_POINT": str(len(line))},
        cwd=tmp_path,
    )
    assert (done.code, done.err) == (0, "")
    assert candidates <= set(done.out.split())
    assert all(found.startswith(line.split()[-1]) for found in done.out.split())


def test_conf_is_the_repositorys() -> None:
    done = shell(
        sys.executable, "-c", "from importlib.resources import files; print(files('sddlskd.conf'))"
    )
    assert Path(done.out.strip()) == CONF
