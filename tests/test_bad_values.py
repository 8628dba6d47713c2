"""Test that a job with a bad value is refused in one line before anything is written.

The table of bad values is made from the schema: each number of a job takes each of the values.
"""

import math
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import Field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf

from sddlskd import config as cfg
from sddlskd import train
from sddlskd.config import Config
from sddlskd.config.schema import ARGUMENTS, LAUNCHER, Bounds, FeatureConfig
from sddlskd.config.targets import check_code
from sddlskd.sweeps.precheck import Checker, problems
from sddlskd.terminal.console import explain
from sddlskd.training.fit import fit
from sddlskd.training.stand_ins import try_loss, try_optimizer
from tests.each import check_each
from tests.tiny import BASE, leave_teacher, tiny

MOST = 2**63 - 1
LONG = "1" + 400 * "0"  # more than a float holds
CHECKING = re.compile(r"\d\d:\d\d:\d\d checking \d+ jobs? \(loading PyTorch takes some seconds\)$")
VALUES = ("nan", "inf", "-inf", "-1", "0", str(2**63), str(2**70), "1e300", LONG, "word", "null")
# What is valid among VALUES
VALID = {
    "0": {
        "complementary_weight", "dataset.mean", "dataset.padding", "dataset.val_fraction",
        "dataset.weight_decay", "dataset.workers", "distiller.ce_weight", "distiller.kd_weight",
        "features.at.weight", "optimizer.warmup_epochs", "seed", "teacher.train_seed",
        "trainer.data_seed",
    },
    "null": {
        "dataset.lr", "dataset.workers", "optimizer.clip_norm", "teacher.image_size",
        "trainer.data_seed", "trainer.max_steps",
    },
    # Infinitely many minutes between checkpoints: only at the end of each epoch
    **{value: {"checkpoint.every_minutes"} for value in ("inf", str(2**63), str(2**70), "1e300")},
}  # fmt: skip


def number_fields(schema: type, prefix: str = "") -> Iterator[tuple[str, Field[Any]]]:
    """Yield the dotted key and the field of every number, and of every list of numbers."""
    for f in fields(schema):
        if isinstance(f.type, type) and is_dataclass(f.type):
            yield from number_fields(f.type, f"{prefix}{f.name}.")
        elif {int, float} & {f.type, *get_args(f.type)}:
            yield prefix + f.name, f


NUMBERS = dict(number_fields(Config)) | dict(number_fields(FeatureConfig, "features.at."))
TABLE = [(key, value) for key in NUMBERS for value in VALUES]
LISTS = {key for key, f in NUMBERS.items() if get_origin(f.type) is list}


def override(key: str, value: str) -> str:
    """Return how a person gives this value; a list has the value as one of its numbers."""
    return f"{key}=[{value}]" if key in LISTS and value != "null" else f"{key}={value}"


@pytest.fixture(scope="module")
def refusal(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Return a function from an override to the reason why a job refuses it, "" if it does not.

    The value is set on a composed job, as a sweep sets it. Composing the job anew would take a
    sixth of a second.
    """
    job = tiny(tmp_path_factory.mktemp("home"), "features=[at]")
    frame = OmegaConf.structured(job)
    parser = OverridesParser.create()

    def why(text: str) -> str:
        change = parser.parse_override(text)
        key = change.key_or_group
        before = OmegaConf.select(frame, key)
        if OmegaConf.is_config(before):
            before = OmegaConf.to_container(before)
        try:
            OmegaConf.update(frame, key, change.value(), force_add=False)
            changed = OmegaConf.to_object(frame)
            assert isinstance(changed, Config)
            cfg.normalise(changed)
        except Exception as error:
            return explain(error)
        finally:
            OmegaConf.update(frame, key, before, force_add=False)
        return ""

    return why


def test_every_number_has_bounds() -> None:
    assert len(NUMBERS) > 40
    assert {key for key, f in NUMBERS.items() if "bounds" not in f.metadata} == set()


def test_every_bad_number_is_refused_in_one_line_that_names_its_key(
    refusal: Callable[[str], str],
) -> None:
    def check(case: tuple[str, str]) -> None:
        key, value = case
        said = refusal(override(*case))
        if key in VALID.get(value, ()):
            assert said == ""
            return
        assert said.startswith((f"{key}=", f"{key}[0]", f"{key} is too large")), said
        assert len(said.splitlines()) == 1
        assert len(said) < 220

    check_each(TABLE, check, str)


def test_every_number_is_accepted_up_to_its_bounds(refusal: Callable[[str], str]) -> None:
    def check(key: str) -> None:
        bounds = NUMBERS[key].metadata["bounds"]
        is_float = float in {NUMBERS[key].type, *get_args(NUMBERS[key].type)}
        for edge, outside in ((bounds.ge, -math.inf), (bounds.le, math.inf)):
            if edge is not None:
                beyond = edge + 1 if outside > 0 else edge - 1
                if is_float:
                    beyond = math.nextafter(edge, outside)
                assert refusal(override(key, repr(edge))) == ""
                assert refusal(override(key, repr(beyond))).startswith(f"{key}=")

    # The sum of teacher.weights must be 1, too, and runs are halved before their last epoch.
    check_each(NUMBERS.keys() - {"teacher.weights", "sweep.halving"}, check, str)


@pytest.mark.parametrize(
    "overrides",
    [
        # The least valid numbers
        [
            "dataset.mean=[0,0,0]", "dataset.padding=0", "distiller.ce_weight=0",
            "complementary_weight=0", "features.at.weight=0", "optimizer.clip_norm=null",
            "trainer.data_seed=0", "checkpoint.every_minutes=inf", "trainer.batch_size=2",
            "trainer.max_steps=1",
        ],
        # The greatest ones. With greater weights the student diverges.
        [
            f"seed={MOST}", f"trainer.data_seed={MOST}", "trainer.eval_batch_size=1000000",
            "trainer.max_steps=1000000000", "optimizer.warmup_epochs=1000000",
            "features.at.warmup_epochs=1000000", "distiller.warmup_epochs=1000000",
            "optimizer.clip_norm=1000000", "checkpoint.every_minutes=1e300",
            "optimizer.decay=1", "trainer.log_every=1000000000",
        ],
    ],
    ids=["least", "greatest"],
)  # fmt: skip
def test_valid_numbers_train(tmp_path: Path, overrides: list[str]) -> None:
    job = tiny(tmp_path, "features=[at]", "trainer.epochs=1", *overrides)
    assert problems([job]) == []
    (result,) = fit([job])
    assert (result["status"], result["reason"]) == ("FINISHED", "")


# Arguments of the loss and of the optimizer


def test_arguments_have_bounds(refusal: Callable[[str], str]) -> None:
    keys = ("optimizer.algorithm.momentum", "distiller.loss.temperature")
    assert set(keys) <= set(ARGUMENTS)
    cases = [(key, value) for key in keys for value in ("nan", "inf", "-1", "2000", str(2**70))]

    def check(case: tuple[str, str]) -> None:
        key, value = case
        said = refusal(f"{key}={value}")
        assert said.startswith(f"{key}="), said
        assert len(said.splitlines()) == 1

    check_each(cases, check, str)
    # Other arguments need only be finite and fit in 64 bits.
    assert refusal(f"features.at.method.p={2**63}").startswith("features.at.method.p=")
    assert refusal("features.at.method.p=1") == ""


def test_losses_are_finite_at_their_bounds() -> None:
    losses = [
        {"_target_": "sddlskd.losses.kd"},
        {"_target_": "sddlskd.losses.dkd", "alpha": 10.0**6, "beta": 10.0**6},
        {"_target_": "sddlskd.losses.nkd", "gamma": 10.0**6},
        {"_target_": "sddlskd.losses.rld", "alpha": 10.0**6, "beta": 10.0**6},
        {"_target_": "sddlskd.losses.gdkd", "k": 1, "w0": 10.0**6, "w1": 10.0**6, "w2": 10.0**6},
        {"_target_": "sddlskd.losses.abkd", "alpha": 10.0**6, "beta": 10.0**-6},
        {"_target_": "sddlskd.losses.dist", "beta": 10.0**6, "gamma": 10.0**6},
        {"_target_": "sddlskd.losses.skd", "ridge": 10.0**-6},
    ]
    for loss in losses:
        for temperature in (0.01, 1000.0):
            for classes in (2, 100):
                try_loss({**loss, "temperature": temperature}, classes)


def test_a_loss_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match=r"losses.kd\(temperature=1e-45\) is nan for random log"):
        try_loss({"_target_": "sddlskd.losses.kd", "temperature": 1e-45}, 10)


def test_an_optimizer_that_makes_weights_infinite_is_refused() -> None:
    algorithm = {"_target_": "torch.optim.SGD", "weight_decay": 3e38}
    with pytest.raises(ValueError, match="makes weights infinite or NaN in one step"):
        try_optimizer(algorithm, 1000.0, torch.device("cpu"))


def test_code_that_cannot_be_found_is_refused_as_other_errors() -> None:
    with pytest.raises(ValueError, match=r"_target_=nopackage\.f cannot be found"):
        try_loss({"_target_": "nopackage.f"}, 10)
    with pytest.raises(ValueError, match=r"_target_=nopackage\.F cannot be found"):
        try_optimizer({"_target_": "nopackage.F"}, 0.1, torch.device("cpu"))


MISSING = {
    "own_losses.jss": "cannot be found: own_losses has no function jss; did you mean js?",
    "own_losses.JSS": "cannot be found: own_losses has no class JSS; did you mean js?",
    "own_losses.zz": "cannot be found: own_losses has no function zz; it has js, two, cut",
    "own_loses.js": "cannot be found: there is no module own_loses; did you mean own_losses?",
    "nopackage.f": "cannot be found: there is no module nopackage; start from its folder, or set "
    "PYTHONPATH",
    "own_losses": "is a module; name a function or a class",
    "own_syntax.f": "cannot be imported: own_syntax.py, line 2: expected ':'",
    "own_raises.f": "cannot be imported: own_raises.py, line 3: ModuleNotFoundError: No module "
    "named 'nopackage'",
    "sddlskd.losses.kdd": "cannot be found: sddlskd.losses has no function kdd; did you mean kd?",
    "sddlskd.loses.kd": "cannot be found: sddlskd has no module loses; did you mean losses?",
}


@pytest.fixture
def own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make modules of a user, which can be imported."""
    (tmp_path / "own_losses.py").write_text(
        "def js(s, t, y): return (s - t).square().mean(1)\n"
        "def two(s, t): return (s - t).square().mean(1)\n"
        "def cut(s, t, y): return (s.detach() - t).square().mean(1)\n"
    )
    (tmp_path / "own_syntax.py").write_text("\ndef f(s)\n")
    (tmp_path / "own_raises.py").write_text("\n\nimport nopackage\n")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("own_code")
def test_a_mistyped_target_is_named_with_its_key_and_what_is_there() -> None:
    for target, says in MISSING.items():
        with pytest.raises(ValueError, match=re.escape(says)) as caught:
            check_code({"_target_": target}, "features.a.method")
        assert str(caught.value) == f"features.a.method._target_={target} {says}"


def test_every_target_of_a_job_is_checked_with_its_key(tmp_path: Path) -> None:
    missing = {"_target_": "nopackage.F"}
    job = tiny(tmp_path, "features=[at]")
    for key in (
        "student.model", "teacher.model", "distiller.loss", "dataset.load", "optimizer.algorithm"
    ):  # fmt: skip
        group, name = key.split(".")
        wrong = replace(job, **{group: replace(getattr(job, group), **{name: missing})})
        ((_, reason),) = problems([wrong])
        assert reason.startswith(f"{key}._target_=nopackage.F cannot be found")
        assert [explain(error) for error in Checker().obstacles(wrong)] == [reason]
        with pytest.raises(ValueError, match=re.escape(reason)):
            fit([wrong])
    wrong = replace(job, features={"at": replace(job.features["at"], method=missing)})
    ((_, reason),) = problems([wrong])
    assert reason.startswith("features.at.method._target_=nopackage.F cannot be found")


@pytest.mark.usefixtures("own_code")
def test_a_loss_without_gradient_or_target_is_refused_with_the_cure() -> None:
    with pytest.raises(ValueError, match=r"own_losses.cut\(\) has no gradient for the student; is"):
        try_loss({"_target_": "own_losses.cut"}, 10)
    with pytest.raises(ValueError, match=r"given\); a loss takes \(student, teacher, target\)"):
        try_loss({"_target_": "own_losses.two"}, 10)


def summed(student_NK: torch.Tensor, teacher_NK: torch.Tensor, target_N: torch.Tensor) -> Any:
    """Return a loss without one value per sample, as a user may write it."""
    return (student_NK - teacher_NK).square().sum()


def test_a_loss_that_reduces_is_refused_with_the_cure() -> None:
    with pytest.raises(ValueError, match="summed") as caught:
        try_loss({"_target_": "tests.test_bad_values.summed"}, 10)
    assert str(caught.value).startswith(
        "distiller.loss=tests.test_bad_values.summed() cannot be used: the loss returned shape () "
    )
    assert str(caught.value).endswith("then 'return loss.mean(1)'")


def test_trying_leaves_the_random_numbers_alone() -> None:
    before = torch.random.get_rng_state()
    try_loss({"_target_": "sddlskd.losses.kd", "temperature": 4.0}, 10)
    try_optimizer({"_target_": "torch.optim.AdamW"}, 0.1, torch.device("cpu"))
    assert torch.equal(before, torch.random.get_rng_state())


LBFGS = "optimizer.algorithm._target_=torch.optim.LBFGS"
UNFIT = {
    ("+optimizer.algorithm.foo=1",): "SGD(momentum=0.9, weight_decay=0.0005, foo=1) cannot",
    (LBFGS,): "LBFGS(momentum=0.9, weight_decay=0.0005) cannot update a network (TypeError",
    (LBFGS, "~optimizer.algorithm.momentum", "~optimizer.algorithm.weight_decay"): "'closure'",
    ("+optimizer.algorithm.lr=3",): "optimizer.algorithm.lr=3 would be ignored; set optimizer.lr",
    ("+distiller.loss.foo=1",): "losses.kd(temperature=2.0, foo=1) cannot be computed (TypeError",
    ("dataset.padding=100000",): "dataset.padding=100000 needs 23043.7 GB of memory",
    ("dataset.mean=[0,0]",): "mean has 2 and std 3 entries for 3 channels: give one of each",
    ("trainer.batch_size=193",): "of dataset=fake; set trainer.batch_size=192 or less",
    ("teacher=resnet14", "teacher.train_if_missing=true", "trainer.batch_size=64",
     "dataset.batch_size=194"): "trained first, with dataset.batch_size=194, whatever trainer.ba",
    ("dataset.batch_size=193",): "set dataset.batch_size=192 or less, which trainer.batch_size",
}  # fmt: skip


def test_what_cannot_work_is_refused_by_the_check_and_by_training(tmp_path: Path) -> None:
    jobs = [tiny(tmp_path, *overrides) for overrides in UNFIT]
    for (job, reason), says in zip(problems(jobs), UNFIT.values(), strict=True):
        assert says in reason
        assert len(reason.splitlines()) == 1
        # The end may tell how much memory is free, which differs from moment to moment.
        with pytest.raises(ValueError, match=re.escape(reason[:60])):
            fit([job])
        assert not Path(job.run_dir).exists()


def test_a_teacher_that_is_trained_first_is_checked_before_anything_is_written(
    tmp_path: Path,
) -> None:
    job = tiny(
        tmp_path, "teacher=mobilev2", "teacher.train_if_missing=true", "M=[1]",
        "trainer.batch_size=64", "dataset.batch_size=191", teacher=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"mobilev2 cannot train .*; set dataset.batch_size=192"):
        fit([job])
    assert list(tmp_path.iterdir()) == []


# The command line


@pytest.fixture
def refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., str]]:
    """Yield a function from overrides to the only line that the command prints.

    A sweep may print before it that it checks its jobs. The command must exit with 1 and leave the
    home as it was.
    """
    leave_teacher(tmp_path)
    before = sorted(tmp_path.rglob("*"))

    def line(*overrides: str) -> str:
        GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", ["train", *BASE, f"home={tmp_path}", *overrides])
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
        with pytest.raises(SystemExit) as caught:
            train.main()
        printed = capsys.readouterr()
        assert caught.value.code == 1
        assert printed.out == ""
        assert sorted(tmp_path.rglob("*")) == before
        (said,) = (line for line in printed.err.splitlines() if not CHECKING.match(line))
        return said.removeprefix("error: ")

    yield line
    GlobalHydra.instance().clear()


REFUSED = [
    (["distiller.temperature=1e300"], "distiller.temperature=1e+300 must be at most 1000"),
    ([LBFGS], "cannot update a network"),
    ([f"seed={2**63}"], f"seed={2**63} must be at most {MOST}"),
    ([f"optimizer.lr={LONG}"], "optimizer.lr is too large for a number; give a smaller one"),
    (["seed=1" + 5000 * "0"], "seed is too large for a number; give a smaller one"),
    (["trainer.timeout_s=10:00"], "trainer.timeout_s=10:00 is not a number of seconds"),
    (["trainer.epochs=word"], "trainer.epochs=word is not an integer"),
    (["trainer.epochs=null"], "trainer.epochs=null is not valid; give a value, or leave it out"),
    (["M=null"], "M=null is not valid; give distinct positive integers, such as M=[1,2,4]"),
    (["dataset.root=/a b=c"], """put the value in quotes, and all of it in quotes for the shell: \
'dataset.root="/a b=c"'"""),
    (["M=[[1]]"], "M=[[1]] is not valid; give distinct positive integers, such as M=[1,2,4]"),
    (["dataset.mean=[[1]]"], "dataset.mean=[[1]] is not a list of numbers"),
    (["sweep.rerun=all"], "sweep.rerun=all requires a sweep; put -m before the overrides"),
    (["sweep.seeds=until_decided"],
     "sweep.seeds=until_decided requires a sweep with one of the launchers of sddlskd; put -m"),
    (["-m", "sweep.seeds=until_decided", "seed=0,1"],
     "give either seed=... or sweep.seeds=until_decided, which chooses the seeds"),
    (["-m", "sweep.seeds=until_decided", "hydra.sweeper.max_batch_size=2", "M=[1],[1,2]"],
     "leave out hydra.sweeper.max_batch_size"),
    (["-m", "sweep.seeds=until_decided", "recipe=kd_ls,crd"],
     "no job of this sweep has a baseline in it; it has KD+LS, CRD"),
    (["standardize=rows"],
     "standardize=rows is not valid; give none, class, batch, class_scaled, true"),
    (["sweep.halving=[1]"],
     "sweep.halving=[1] requires a sweep with one of the launchers of sddlskd; put -m before"),
    (["-m", "sweep.halving=[1]", "seed=0,1"],
     "sweep.halving=[1] compares the runs of a group, but fake/resnet8-resnet8-kd-ls-M-1-2-4-s0-"),
    *((["-m", word, "hydra/launcher=basic", "M=[1],[1,2]"],
       f"{word} cannot be used with hydra/launcher=basic, which trains each job alone; leave")
      for word in ("sweep.halving=[1]", "sweep.seeds=until_decided", "sweep.plan=true")),
    (["-m", "hydra/sweeper=optuna", "hydra/launcher=basic", "sweep.halving=[1]", "M=[1],[1,2]"],
     "sweep.halving=[1] cannot be used with hydra/launcher=basic"),
    (["-m", "teacher=[resnet8,resnet14],resnet14", "hydra/launcher=basic"],
     "teacher=[resnet8,resnet14] cannot be used with hydra/launcher=basic"),
    (["-m", "hydra/sweeper=optuna", "objective=foo", "M=[1],[1,2]"],
     "objective=foo is logged by no run; give objective=best/top1; runs log best/"),
    (["sweep.halving=[2]"],
     "give increasing epochs before the last one (trainer.epochs=2)"),
    (["sweep.halving=[3,1]", "trainer.epochs=8"],
     "sweep.halving=[3, 1] is not valid; give increasing epochs"),
    (["sweep.halving=[0]"], "sweep.halving=[0] must be at least 1"),
    (["-m", "sweep.halving=[1]", "sweep.seeds=until_decided", "recipe=kd,kd_ls"],
     "sweep.seeds=until_decided needs all runs to the end; leave out sweep.halving"),
    (["objective=val/accuracy"],
     "objective=val/accuracy is logged by no run; give objective=best/top1; runs log best/"),
    (["objective=test/top1"],
     "objective=test/top1 is logged only with held-out images; set dataset.val_fraction=0.1"),
    (["-m", "hydra/sweeper=optuna", "M=[1]"],
     "hydra/sweeper=optuna has nothing to search; vary a key"),
    (["-m", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=0", "M=[1],[1,2]"],
     "hydra.sweeper.n_trials=0 must be at least 1"),
    (["-m", "hydra/sweeper=optuna", "sweep.halving=[1]", "hydra.sweeper.n_jobs=1", "M=[1],[1,2]"],
     "compares the trials of a batch that train together; set hydra.sweeper.n_jobs to at least 2"),
    (["-m", "hydra/sweeper=optuna", "sweep.seeds=until_decided", "M=[1],[1,2]"],
     "sweep.seeds cannot be used with hydra/sweeper=optuna; leave it out"),
    (["-m", "hydra/sweeper=optuna", "dataset.val_fraction=0.25", "dataset.mean=[0],[1]"],
     "mean has 1 and std 3 entries for 3 channels"),
    (["-m", "hydra/sweeper=optuna", "optimizer.lr=interval(0.2,0.1)"], "0.2"),
    (["distiller.temperature=1,2"], "distiller.temperature=1,2 has several values; put -m before"),
    (["distiller.temperature=interval(1,8)"], "has several values; put -m before the overrides"),
    (["-m", "distiller.temperature=interval(1,8)"], "require a search; add hydra/sweeper=optuna"),
    (["dataset.unlabelled=true"],
     "dataset.unlabelled=true has no images without labels, as dataset.train_fraction=1; set"),
    (["dataset.unlabelled=true", "dataset.train_fraction=0.5", "recipe=crd"],
     "features=[crd] cannot be trained with dataset.unlabelled=true: feature methods may read"),
    (["teacher.view=plain", "recipe=at"],
     "features=[at] compares what both networks show of one image, but teacher.view=plain"),
    (["teacher.view=side"],
     "teacher.view=side: Invalid value 'side', expected one of [augmented, plain]"),
    (["sweep.max_seeds=2"],
     "sweep.max_seeds=2 must be at least 3"),
    (["-m", "sweep.seeds=enough", "M=[1],[1,2]"], "sweep.seeds"),
    (["-m", "hydra/launcher=slurm", "hydra.launcher.timeout_min=24:00:00", "seed=0,1"],
     "hydra.launcher.timeout_min=24:00:00 is not an integer of minutes; 24:00:00 is 1440"),
    (["-m", "hydra/launcher=slurm", "hydra.launcher.devices=[cuda:0]", "seed=0,1"],
     "SLURM assigns devices; set hydra.launcher.gpus_per_node"),
    (["-m", "hydra.launcher.partition=gpu", "seed=0,1"],
     "hydra.launcher.partition is unknown here; hydra/launcher=slurm has it"),
    (["teacher=null"], "teacher=null: distillation needs a teacher; choose one with teacher=..., "),
    (["-m", "hydra.launcher.max_group_size=0", "seed=0,1"],
     "hydra.launcher.max_group_size=0 must be at least 1"),
]  # fmt: skip


def test_command_prints_one_line_and_writes_nothing(refused: Callable[..., str]) -> None:
    def check(case: tuple[list[str], str]) -> None:
        overrides, says = case
        said = refused(*overrides)
        assert says in said, said
        assert len(said) < 300

    check_each(REFUSED, check, lambda case: " ".join(case[0])[:60])


def test_the_advised_quotes_can_be_read() -> None:
    parser = OverridesParser.create()
    for value in ("/a b=c", "/a(b)", 'say "so"', "it's", "a{b", "C:\\x=y"):
        with pytest.raises(HydraException) as caught:
            parser.parse_overrides([f"dataset.root={value}"])
        (advised,) = shlex.split(explain(caught.value).partition("for the shell: ")[2])
        (read,) = parser.parse_overrides([advised])
        assert (read.key_or_group, read.value()) == ("dataset.root", value)


def test_launchers_options_have_bounds() -> None:
    for name, bounds in LAUNCHER.items():
        least = bounds.ge if bounds.ge is not None else 1
        cfg.check_launcher({name: least})
        for bad in (-1, 2**70, float("nan"), float("inf")):
            with pytest.raises(ValueError, match=rf"^hydra\.launcher\.{name}={bad} "):
                cfg.check_launcher({name: bad})
    cfg.check_launcher({name: None for name in LAUNCHER})


def test_bounds_say_what_is_wrong() -> None:
    bounds = Bounds(gt=0, le=2)
    assert bounds.fault(1) == bounds.fault(2.0) == ""
    assert bounds.fault(0) == "must be greater than 0"
    assert bounds.fault(10**400) == "must be at most 2"
    assert bounds.fault(float("-inf")) == "must be finite"
    assert Bounds(ge=0, lt=1).fault(1) == "must be less than 1"
    assert Bounds(ge=0).fault(-1) == "must not be negative"
    assert Bounds(gt=0, finite=False).fault(float("inf")) == ""


def test_a_record_may_hold_numbers_that_were_valid_when_it_was_written(tmp_path: Path) -> None:
    job = tiny(tmp_path)
    text = cfg.to_yaml(job)
    path = tmp_path / "config.yaml"
    for old, new in (("  batch_size: 64", "  batch_size: 1"), ("  lr: 0.05", "  lr: 5000.0")):
        assert old in text
        path.write_text(text.replace(old, new))
        assert cfg.load(path) != job
    for old, new in (("  lr: 0.05", "  lr: -1.0"), ("  lr: 0.05", "  lr: .nan")):
        path.write_text(text.replace(old, new))
        with pytest.raises(ValueError, match=r"lr=(-1\.0 must be greater than 0|nan is not)"):
            cfg.load(path)


def test_numbers_in_nested_arguments_are_checked(tmp_path: Path) -> None:
    job = tiny(tmp_path)
    job.student.model["stages"] = [{"depth": float("nan")}]
    with pytest.raises(ValueError, match=r"student\.model\.stages\[0\]\.depth=.*nan"):
        cfg.normalise(job)


@pytest.mark.parametrize("name", ["ce", "kd", "temperature"])
def test_a_method_with_the_name_of_another_metric_is_refused(tmp_path: Path, name: str) -> None:
    job = tiny(tmp_path)
    feature = FeatureConfig(method={"_target_": "sddlskd.methods.at.AT"})
    with pytest.raises(ValueError, match=f"features.{name} has the name of another loss"):
        cfg.normalise(replace(job, features={name: feature}))


OWN_FILES = {
    "recipe/bare.yaml": "defaults:\n  - override /distiller: kd\nrecipe: bare",
    "recipe/flat.yaml": "recipe: flat\nM: [1]",
    "features/bare.yaml": "weight: 1.0\nmethod: {_target_: my.Method}",
    "features/deep.yaml": "method: {_target_: my.Method}",
    "distiller/bare.yaml": "loss: {_target_: my.loss}",
    "student/bare.yaml": "model: {_target_: my.Network}",
}
PACKAGE = "must be `# @package features.NAME`, NAME being the name of the method in tables"
UNNAMED = ".name is missing; add a line `name: ...` (the name in tables) to the file of"
OF_OWN_FILES = {
    "recipe=bare": "the first line of recipe/bare.yaml must be `# @package _global_`",
    "recipe=flat": "the first line of recipe/flat.yaml must be `# @package _global_`",
    "features=bare": f"the first line of features/bare.yaml {PACKAGE}",
    "features=deep": f"the first line of features/deep.yaml {PACKAGE}",
    "distiller=bare": f"distiller{UNNAMED} distiller=...",
    "student=bare": f"student{UNNAMED} student=...",
}


def test_what_a_file_lacks_is_said(
    refused: Callable[..., str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("conf")
    for name, text in OWN_FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    for override, says in OF_OWN_FILES.items():
        assert refused(override, f"--config-dir={folder}") == says
    assert refused(f"--config-dir={folder / 'none'}") == (
        f"there is no folder {folder / 'none'}, which -cd names; start from the folder that holds "
        "it, or give its full path"
    )
