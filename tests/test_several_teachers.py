"""Students that learn from several teachers.

Shapes: B batch, K classes, N = B*R regions of a batch, T teachers.
"""

import json
import math
import os
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hydra.errors import HydraException
from torch import Tensor

from analysis.names import pair_name
from analysis.runs import _typed
from analysis.schema import frame_of, runs_of
from analysis.selection import rows as table_rows
from sddlskd import config as cfg
from sddlskd.config import Config
from sddlskd.distill import COMBINATIONS, ScaleDecoupled, SeveralTeachers, confidence_weights
from sddlskd.evaluate import _override
from sddlskd.files.checkpoint import read
from sddlskd.losses import dist, dkd, kd
from sddlskd.models import create
from sddlskd.record import read_result
from sddlskd.sweeps.precheck import problems
from sddlskd.terminal.console import explain
from sddlskd.tracking.runs import _send_outcome
from sddlskd.training.build import build_data
from sddlskd.training.evaluation import evaluate
from sddlskd.training.fit import fit
from sddlskd.training.measure import measure
from sddlskd.training.run import Run
from sddlskd.training.several import Teachers
from sddlskd.training.teacher import Teacher
from sddlskd.training.teacher_files import file_hash, path_of, publish
from tests.conftest import Compose, compose_in
from tests.tiny import final, leave_teacher, processes, rows, same, same_outcome, tiny

CPU = torch.device("cpu")
TWO = "teacher=[resnet8,resnet14]"


def maps(*sides: int, B: int = 6, K: int = 5, seed: int = 0) -> list[Tensor]:
    """Return a random logit map for each side, in float64."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, K, s, s, generator=generator, dtype=torch.float64) for s in sides]


TARGET_B = torch.tensor([0, 1, 2, 3, 4, 0])
KD = partial(kd, temperature=2.0)


# The three ways to combine


def test_mean_of_logits_is_that_by_hand() -> None:
    student, *teachers = maps(4, 4, 2, 8)
    weights = [0.2, 0.3, 0.5]
    got = SeveralTeachers(ScaleDecoupled(KD, [1]), weights)(student, teachers, TARGET_B)
    mean_BK = sum(w * t.mean((2, 3)) for w, t in zip(weights, teachers, strict=True))
    p_BK = (mean_BK / 2).softmax(1)
    log_q_BK = (student.mean((2, 3)) / 2).log_softmax(1)
    by_hand = 4 * (p_BK * (p_BK.log() - log_q_BK)).sum(1).mean()
    # All regions of M=[1] are consistent, with weight 1.
    torch.testing.assert_close(got, by_hand, rtol=1e-12, atol=0)


@pytest.mark.parametrize("standardize", ["none", "class", "batch", "class_scaled"])
def test_mixed_regions_are_those_of_the_mixed_map(standardize: str) -> None:
    student, *teachers = maps(4, 4, 4)
    distill = ScaleDecoupled(KD, [1, 2, 4], standardize=standardize)
    got = SeveralTeachers(distill, [0.3, 0.7])(student, teachers, TARGET_B)
    mixed = 0.3 * teachers[0] + 0.7 * teachers[1]
    torch.testing.assert_close(got, distill(student, mixed, TARGET_B), rtol=1e-12, atol=0)


def test_mean_of_losses_is_that_by_hand() -> None:
    student, *teachers = maps(4, 4, 2)
    distill = ScaleDecoupled(partial(dkd, alpha=1.0, beta=2.0, temperature=4.0), [1, 2])
    got = SeveralTeachers(distill, [0.3, 0.7], "losses")(student, teachers, TARGET_B)
    first, second = (distill(student, teacher, TARGET_B) for teacher in teachers)
    torch.testing.assert_close(got, 0.3 * first + 0.7 * second, rtol=1e-12, atol=0)


def test_the_gradient_of_the_mean_of_losses_is_that_of_the_mean_of_probabilities() -> None:
    student, *teachers = maps(1, 1, 1)
    student.requires_grad_()
    several = SeveralTeachers(ScaleDecoupled(KD, [1]), [0.5, 0.5], "losses")
    (got,) = torch.autograd.grad(several(student, teachers, TARGET_B), student)
    p_BK = sum((t.mean((2, 3)) / 2).softmax(1) for t in teachers) / 2
    log_q_BK = (student.mean((2, 3)) / 2).log_softmax(1)
    (wanted,) = torch.autograd.grad(4 * (p_BK * -log_q_BK).sum(1).mean(), student)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("T", [2, 3])
def test_confidence_weights_are_ca_mkds(T: int) -> None:
    logits_TBK = torch.stack([m.mean((2, 3)) for m in maps(*[2] * T)])
    got = confidence_weights(logits_TBK, TARGET_B)
    for b, y in enumerate(TARGET_B.tolist()):
        ce = [-math.log(logits_TBK[t, b].softmax(0)[y].item()) for t in range(T)]
        whole = sum(map(math.exp, ce))
        wanted = [(1 - math.exp(one) / whole) / (T - 1) for one in ce]
        assert got[:, b].tolist() == pytest.approx(wanted, abs=1e-12)
        assert sum(wanted) == pytest.approx(1)
        assert wanted.index(max(wanted)) == ce.index(min(ce))


def test_confidence_weighs_the_losses_of_each_image() -> None:
    student, *teachers = maps(4, 4, 2)
    distill = ScaleDecoupled(KD, [1, 2])
    got = SeveralTeachers(distill, [0.5, 0.5], "confidence")(student, teachers, TARGET_B)
    weight_TB = confidence_weights(torch.stack([t.mean((2, 3)) for t in teachers]), TARGET_B)
    wanted = sum(
        weight_TB[t, b] * distill(student[b : b + 1], teacher[b : b + 1], TARGET_B[b : b + 1])
        for t, teacher in enumerate(teachers)
        for b in range(len(TARGET_B))
    )
    torch.testing.assert_close(got, wanted / len(TARGET_B), rtol=1e-12, atol=0)


@pytest.mark.parametrize("loss", [KD, partial(dist, beta=1.0, gamma=1.0, temperature=1.0)])
@pytest.mark.parametrize("combine", COMBINATIONS)
def test_two_equal_teachers_are_one(combine: str, loss: Any) -> None:
    student, teacher = (one.float() for one in maps(4, 8))
    student.requires_grad_()
    distill = ScaleDecoupled(loss, [1, 2, 4], standardize=True)
    several = SeveralTeachers(distill, [0.5, 0.5], combine)(student, [teacher, teacher], TARGET_B)
    alone = distill(student, teacher, TARGET_B)
    assert several.item() == alone.item()
    gradients = [torch.autograd.grad(one, student)[0] for one in (several, alone)]
    if combine == "logits":
        assert torch.equal(*gradients)
    # The gradients of two losses are added, which rounds.
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("combine", COMBINATIONS)
def test_a_sure_teacher_leaves_the_loss_finite(combine: str) -> None:
    student, *teachers = maps(2, 2, 2)
    several = SeveralTeachers(ScaleDecoupled(KD, [1, 2]), [0.5, 0.5], combine)
    student.requires_grad_()
    loss = several(student, [1e4 * teachers[0], teachers[1]], TARGET_B)
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.isfinite()
    assert gradient.isfinite().all()


def test_another_way_to_combine_is_refused() -> None:
    with pytest.raises(ValueError, match="combine='mean' is not one of logits, losses, confidence"):
        SeveralTeachers(ScaleDecoupled(KD, [1]), [0.5, 0.5], "mean")


# The configuration


def test_a_list_of_teachers_is_composed_with_each_ones_settings(compose: Compose) -> None:
    job = compose("teacher=[mobilev2,wrn_40_2,vgg13]", "student=mobilev2", "dataset=cifar100")
    each = cfg.each_teacher(job)
    assert [one.teacher.name for one in each] == ["mobilev2", "wrn_40_2", "vgg13"]
    for one in each[1:]:
        alone = compose(f"teacher={one.teacher.name}", "student=mobilev2", "dataset=cifar100")
        assert one == replace(alone, run_dir=one.run_dir)
    assert cfg.teacher_name(job) == "mobilev2+wrn_40_2+vgg13"
    assert cfg.flatten(job)["teacher.name"] == "mobilev2+wrn_40_2+vgg13"
    assert "mobilev2-wrn_40_2-vgg13-mobilev2-" in job.run_dir
    assert cfg.teacher_weights(job) == [1 / 3] * 3


def test_a_list_of_one_teacher_is_that_teacher(compose: Compose) -> None:
    assert compose("teacher=[resnet14]", "teacher.combine=losses", "teacher.weights=[1]") == (
        compose("teacher=resnet14")
    )


def test_a_student_alone_has_no_teachers(compose: Compose) -> None:
    assert compose(TWO, "recipe=vanilla") == compose("recipe=vanilla")


def test_what_is_computed_counts_in_the_hash(compose: Compose) -> None:
    jobs = [
        compose(*words)
        for words in (
            ["teacher=resnet8"],
            [TWO],
            ["teacher=[resnet14,resnet8]"],
            [TWO, "teacher.weights=[0.3,0.7]"],
            [TWO, "teacher.combine=losses"],
            [TWO, "more_teachers.resnet14.checkpoint=x.pt"],
        )
    ]
    assert len({cfg.config_hash(job) for job in jobs}) == len(jobs)
    assert compose(TWO, "teacher.weights=[0.5,0.5]") == jobs[1]
    # The way to combine is that of each student; the teachers are those of the group.
    keys = [cfg.sharing_key(job) for job in jobs]
    assert keys[1] == keys[3] == keys[4]
    assert len(set(keys)) == len(jobs) - 2


def test_a_frozen_job_reads_back_as_it_was(compose: Compose, tmp_path: Path) -> None:
    job = compose(
        "teacher=resnet8", "+teacher@more_teachers.second=resnet8",
        "more_teachers.second.checkpoint=x.pt", "teacher.weights=[0.25,0.75]",
    )  # fmt: skip
    (tmp_path / "config.yaml").write_text(cfg.to_yaml(job))
    assert cfg.load(tmp_path / "config.yaml") == job
    assert job.more_teachers["second"].name == "resnet8"


REFUSED = [
    (
        [TWO, "teacher.weights=[0.3,0.6]"],
        "teacher.weights=[0.3, 0.6] has the sum 0.9; give weights whose sum is 1",
    ),
    (
        [TWO, "teacher.weights=[-0.5,1.5]"],
        "teacher.weights=[-0.5, 1.5] must not be negative",
    ),
    (
        [TWO, "teacher.weights=[0.2,0.3,0.5]"],
        "teacher.weights=[0.2, 0.3, 0.5] does not have one weight for each of "
        "teacher=[resnet8,resnet14]; give 2 of them",
    ),
    (
        ["teacher=resnet8", "teacher.weights=[0.5,0.5]"],
        "teacher.weights=[0.5, 0.5] does not have one weight for each of teacher=[resnet8]; "
        "give 1 of them",
    ),
    (
        [TWO, "teacher.combine=mean"],
        "teacher.combine=mean: Invalid value 'mean', expected one of [logits, losses, confidence]",
    ),
    (
        [TWO, "teacher.combine=confidence", "teacher.weights=[0.4,0.6]"],
        "teacher.weights=[0.4, 0.6] would not be used: teacher.combine=confidence computes "
        "weights for each image; leave teacher.weights out",
    ),
    (
        [TWO, "features=[crd]"],
        "features=[crd] compares the student with one teacher, not with "
        "teacher=[resnet8,resnet14]; choose one teacher, or features=[]",
    ),
    (
        ["teacher=[resnet8,resnet8]"],
        "teacher=[resnet8,resnet8] names a teacher twice; give the second one a name and a file of "
        "its own: teacher=resnet8 +teacher@more_teachers.second=resnet8 "
        "more_teachers.second.checkpoint=FILE",
    ),
    (
        ["teacher=resnet8", "+teacher@more_teachers.second=resnet8"],
        "teacher=[resnet8,second] has the same network and file twice; give the second one a name "
        "and a file of its own: +teacher@more_teachers.second=CHOICE "
        "more_teachers.second.checkpoint=FILE",
    ),
    *(
        (
            [word],
            f"{word}: distillation needs a teacher; choose one with teacher=..., or leave it out: "
            "recipe=vanilla trains a student alone",
        )
        for word in ("teacher=[]", "teacher=null", "teacher=none", "teacher=", "~teacher")
    ),
]


@pytest.mark.parametrize(("words", "says"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_does_not_fit_is_refused_in_one_line(
    tmp_path: Path, words: list[str], says: str
) -> None:
    with pytest.raises((ValueError, HydraException)) as caught:
        compose_in(tmp_path, *words)
    assert explain(caught.value) == says


# Training


def leave_second(home: Path, classes: int = 10) -> Path:
    """Put a resnet14 with fixed random weights where jobs of `home` look for it."""
    path = path_of(str(home), "fake", "resnet14")
    with torch.random.fork_rng():
        torch.manual_seed(2)
        weights = create("resnet14", num_classes=classes).state_dict()
    publish(path, weights, network="resnet14", dataset="fake", top1=10.0)
    return path


def two(home: Path, *overrides: str, at: str = "") -> Config:
    """Return a tiny job with two teachers, whose files are there; `at` names another home."""
    leave_second(home)
    job = tiny(home, TWO, *overrides)
    if at:
        job.run_dir = str(Path(home, at))
    return job


def fit_until_killed(job: Config, step: int) -> None:
    """Fit a job, and kill this process before step `step` of the first epoch."""
    real = Run.train_step

    def dying(self: Run, *arguments: Any) -> None:
        if self.step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        real(self, *arguments)

    Run.train_step = dying  # type: ignore[method-assign]
    fit([job])


def kill_at_step(job: Config, step: int) -> None:
    """Start to fit a job in a process that is killed before step `step` of its first epoch."""
    process = processes.Process(target=fit_until_killed, args=(job, step))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_two_teachers_train_a_student_and_are_recorded(tmp_path: Path) -> None:
    job = two(tmp_path, "trainer.epochs=1", "student=resnet14")
    (result,) = fit([job])
    assert result["status"] == "FINISHED"
    data, networks = build_data(job, CPU), []
    for name in ("resnet8", "resnet14"):
        path = path_of(job.home, "fake", name)
        networks.append(create(name, num_classes=10).eval())
        networks[-1].load_state_dict(read(path)["model"])
        assert result["teacher_top1_each"][name] == top1(networks[-1], data)
        assert file_hash(path) in result["teacher_sha256"].split("+")
    first, second = networks
    # The maps of both teachers have the same sides.
    assert result["teacher_top1"] == top1(lambda x: (first(x) + second(x)) / 2, data)
    assert len(result["teacher_top1_each"]) == 2


def test_the_top1_of_the_mean_has_the_weights_and_image_sizes_of_the_job(tmp_path: Path) -> None:
    few = ("trainer.epochs=1", "trainer.max_steps=1")
    uneven = ["teacher.weights=[0.99,0.01]", "teacher.combine=losses"]
    fit([two(tmp_path, *few), two(tmp_path, *few, *uneven)])  # a group with two means
    job = two(tmp_path, *few, *uneven)
    result = read_result(Path(job.run_dir))
    assert measure(job, Path(job.run_dir, "best.ckpt"))["teacher_top1"] == result["teacher_top1"]
    plain = read_result(Path(two(tmp_path, *few).run_dir))
    assert result["teacher_top1"] != plain["teacher_top1"]
    small = ("teacher.image_size=8", "more_teachers.resnet14.image_size=8")
    fit([two(tmp_path, *few, *small)])
    notes = path_of(str(tmp_path), "fake", "resnet8").with_name("resnet8.pt.top1.json")
    # Those of the first teacher and of both means, and with small images of a teacher and a mean.
    assert len(json.loads(notes.read_text())) == 5


def top1(network: Any, data: Any) -> float:
    return evaluate(network, data.test_batches())["top1"]


def test_a_group_with_several_ways_to_combine_equals_its_runs_alone(tmp_path: Path) -> None:
    ways = [["teacher.weights=[0.2,0.8]"], ["teacher.combine=losses"],
            ["teacher.combine=confidence", "recipe=kd"]]  # fmt: skip
    together, alone = (
        [two(tmp_path, "trainer.epochs=1", *way, at=f"{at}{i}") for i, way in enumerate(ways)]
        for at in ("together", "alone")
    )
    fit(together)
    for a, b in zip(together, alone, strict=True):
        fit([b])
        assert same_outcome(a, b)
    losses = [rows(job)[-1]["train/loss_kd"] for job in together]
    assert len(set(losses)) == len(losses)


def test_the_teachers_go_over_a_batch_once_for_the_whole_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    real = Teacher.__call__

    def counted(self: Teacher, images: Tensor, views: Tensor | None = None) -> Tensor:
        if len(images) == 64:  # a training batch
            asked.append(self.name)
        return real(self, images, views)

    fit([two(tmp_path, "trainer.epochs=1")])  # measures the teachers
    monkeypatch.setattr(Teacher, "__call__", counted)
    fit([two(tmp_path, "trainer.epochs=1", f"seed={s}", "trainer.data_seed=0") for s in (1, 2)])
    assert asked == ["resnet8", "resnet14"] * 3


def test_two_equal_teachers_train_the_student_of_one(tmp_path: Path) -> None:
    alone = tiny(tmp_path, "trainer.epochs=1")
    copy = tmp_path / "copy.pt"
    copy.write_bytes(leave_teacher(tmp_path).read_bytes())
    words = ["+teacher@more_teachers.second=resnet8", f"more_teachers.second.checkpoint={copy}"]
    job = tiny(tmp_path, "trainer.epochs=1", *words)
    fit([alone])
    fit([job])
    assert same_outcome(alone, job)


def test_a_killed_run_continues_as_if_it_had_not_been(tmp_path: Path) -> None:
    words = ["teacher.combine=confidence", "trainer.epochs=1"]
    whole = two(tmp_path, *words, at="whole")
    killed = two(tmp_path, *words, "checkpoint.every_minutes=1e-9", at="killed")
    fit([whole])
    kill_at_step(killed, 2)
    assert final(killed)["progress"]["step"] == 2
    (result,) = fit([killed])
    assert result["status"] == "FINISHED"
    assert same_outcome(whole, killed)


def test_caches_of_several_teachers_change_no_number(tmp_path: Path) -> None:
    words = ["trainer.epochs=1", f"teacher.cache={tmp_path}/cache", "teacher.cache_dtype=float32"]
    plain = two(tmp_path, "trainer.epochs=1", at="plain")
    fit([plain])
    for at in ("filling", "filled"):
        cached = two(tmp_path, *words, at=at)
        fit([cached])
        assert same_outcome(plain, cached)
    assert len(list((tmp_path / "cache").glob("*.maps"))) == 2


def test_every_missing_teacher_is_trained_first(tmp_path: Path) -> None:
    job = tiny(tmp_path, TWO, "teacher.train_if_missing=true", "teacher.train_epochs=1",
               "trainer.epochs=1", teacher=False)  # fmt: skip
    (result,) = fit([job])
    assert result["status"] == "FINISHED"
    for name in ("resnet8", "resnet14"):
        path = path_of(job.home, "fake", name)
        assert file_hash(path) in result["teacher_sha256"]


def test_a_missing_teacher_is_named(tmp_path: Path) -> None:
    job = tiny(tmp_path, TWO, "teacher.train_if_missing=false")
    ((_, reason),) = problems([job])
    assert "teacher=resnet14 for fake is missing: no file" in reason
    with pytest.raises(FileNotFoundError, match="teacher=resnet14 for fake is missing"):
        fit([job])
    assert not Path(job.run_dir).exists()


def test_a_teacher_of_other_classes_is_refused(tmp_path: Path) -> None:
    leave_second(tmp_path, classes=20)
    job = tiny(tmp_path, TWO)
    with pytest.raises(ValueError, match="resnet14") as caught:
        fit([job])
    assert "\n" not in explain(caught.value)
    assert not Path(job.run_dir).exists()


def test_a_run_does_not_continue_with_other_teachers(tmp_path: Path) -> None:
    job = two(tmp_path, "checkpoint.every_minutes=1e-9")
    kill_at_step(job, 2)
    path = path_of(job.home, "fake", "resnet14")
    path.unlink()
    torch.manual_seed(3)
    publish(path, create("resnet14", num_classes=10).state_dict(),
            network="resnet14", dataset="fake", top1=10.0)  # fmt: skip
    with pytest.raises(ValueError, match="was begun with another teacher file"):
        fit([job])


def test_taps_hold_the_maps_of_all_teachers() -> None:
    made = [
        Teacher(create(name, num_classes=5), None, name=name, device=CPU,
                precision="fp32", compile=False)
        for name in ("resnet8", "vgg8")
    ]  # fmt: skip
    images_BCHW = torch.randn(3, 3, 32, 32)
    teachers = Teachers(made, [0.25, 0.75])
    taps = teachers.taps(images_BCHW)
    wanted = [teacher(images_BCHW) for teacher in made]
    assert same([taps.logit_map, *taps.others], wanted)
    assert taps.logit_map.shape[2:] != taps.others[0].shape[2:]
    mean_BK = 0.25 * wanted[0].mean((2, 3)) + 0.75 * wanted[1].mean((2, 3))
    torch.testing.assert_close(teachers(images_BCHW)[:, :, 0, 0], mean_BK)


def test_the_students_teacher_can_be_another_in_an_evaluation(tmp_path: Path) -> None:
    job = two(tmp_path)
    changed = _override(job, ["teacher=resnet8"])
    assert (cfg.teacher_name(changed), changed.more_teachers) == ("resnet8", {})
    assert cfg.teacher_name(_override(changed, ["teacher=[vgg8,vgg13]"])) == "vgg8+vgg13"


# Where the results go


def test_tables_have_a_pair_of_its_own_and_tell_the_ways_apart(compose: Compose) -> None:
    ways = [[], ["teacher.combine=losses"], ["teacher.weights=[0.3,0.7]"]]
    jobs = [compose(TWO, *way) for way in ways]
    params = [{key: str(value) for key, value in cfg.flatten(job).items()} for job in jobs]
    found = [_typed(one)[0] for one in params]
    for row, job in zip(found, jobs, strict=True):
        row["settings_hash"] = cfg.settings_hash(job)
    runs = runs_of(frame_of(found))
    assert {run.pair for run in runs} == {"resnet8+resnet14_resnet8x4"}
    assert pair_name(runs[0].teacher, runs[0].student) == "resnet8+resnet14 → resnet8x4"
    split = [row.split for row in table_rows(runs, lambda run: run.method)]
    assert len(split) == len(jobs)
    assert set(split[0]) == {"teacher.combine", "teacher.weights"}


def test_mlflow_has_the_top1_of_each_teacher(tmp_path: Path) -> None:
    client = Mock()
    client.get_metric_history.return_value = []
    result = {"epochs": 1, "teacher_top1": 3.0, "teacher_top1_each": {"resnet8": 1.0, "vgg8": 2.0}}
    _send_outcome(client, "id", tmp_path, "FINISHED", result, [{"epoch": 1, "time": 0.0}])
    sent = {one.key: one.value for one in client.log_batch.call_args.kwargs["metrics"]}
    assert sent == {"teacher/top1": 3.0, "teacher/top1/resnet8": 1.0, "teacher/top1/vgg8": 2.0}
