"""Test the teacher: folding, measuring its accuracy, and its files."""

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sddlskd import config as cfg
from sddlskd.config import Config
from sddlskd.files.checkpoint import UnreadableFile, read, write
from sddlskd.models import create
from sddlskd.training import build
from sddlskd.training.build import build_data, build_network, build_teacher
from sddlskd.training.checks import check_teacher
from sddlskd.training.evaluation import evaluate
from sddlskd.training.fit import fit
from sddlskd.training.teacher import Teacher
from sddlskd.training.teacher_files import (
    PUBLISHED,
    choice_of,
    file_hash,
    measured_top1,
    missing,
    path_of,
    publish,
)
from tests.tiny import CONF, leave_teacher, same, tiny

CPU = torch.device("cpu")
NETWORKS = ("resnet8x4", "wrn_16_2", "vgg8", "mobilev2", "shufflev1", "shufflev2", "resnet50")


def lived(network: nn.Module) -> nn.Module:
    """Return the network with random BatchNorm layers.

    Folding fresh BatchNorm layers would have no effect.
    """
    generator = torch.Generator().manual_seed(0)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for tensor in (layer.running_mean, layer.bias):
                tensor.data.copy_(  # type: ignore[union-attr]
                    torch.randn(tensor.shape, generator=generator) * 0.1
                )
            for tensor in (layer.running_var, layer.weight):
                tensor.data.copy_(  # type: ignore[union-attr]
                    torch.rand(tensor.shape, generator=generator) + 0.5
                )
    return network


def teacher_of(network: nn.Module, path: Path | None = None, name: str = "it") -> Teacher:
    return Teacher(network, path, name=name, device=CPU, precision="fp32", compile=False)


def batch_norms(network: nn.Module) -> int:
    return sum(isinstance(layer, nn.BatchNorm2d) for layer in network.modules())


# Folding


@pytest.mark.parametrize("name", NETWORKS)
def test_folding_keeps_the_logits(tmp_path: Path, name: str) -> None:
    plain = lived(create(name, num_classes=10)).eval()
    path = tmp_path / f"{name}.pt"
    write(path, {"model": plain.state_dict()})
    teacher = teacher_of(create(name, num_classes=10), path, name)
    images_BCHW = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = plain(images_BCHW)
    got = teacher(images_BCHW)
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert batch_norms(teacher.network) < batch_norms(plain)
    assert not got.requires_grad
    assert got.is_inference()
    assert not any(p.requires_grad for p in teacher.network.parameters())
    assert not any(layer.training for layer in teacher.network.modules())
    assert all(
        p.is_contiguous(memory_format=torch.channels_last)
        for p in teacher.network.parameters()
        if p.ndim == 4
    )


def test_teacher_does_not_learn(tmp_path: Path) -> None:
    teacher = teacher_of(lived(create("resnet8", num_classes=10)))
    before = {name: value.clone() for name, value in teacher.network.state_dict().items()}
    student_map_BKHW = nn.Conv2d(3, 10, 1)(torch.ones(2, 3, 8, 8))
    (student_map_BKHW - teacher(torch.ones(2, 3, 32, 32))).square().sum().backward()
    assert same(dict(teacher.network.state_dict()), before)


class Twice(nn.Module):
    """A network that uses a convolution twice, each time with another BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.first, self.second = (
            nn.Conv2d(3, 3, 1),
            nn.BatchNorm2d(3),
            nn.BatchNorm2d(3),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.second(  # type: ignore[no-any-return]
            self.conv(self.first(self.conv(x)).relu())
        )


class Untraceable(Twice):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else super().forward(-x)


class Fussy(Twice):
    """A network that checks its input, which fails for the proxies of a tracer."""

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError("give me a tensor")
        return super().forward(x)


@pytest.mark.parametrize("kind", [Twice, Untraceable, Fussy])
def test_network_that_cannot_be_folded_stays_right(kind: type[nn.Module]) -> None:
    network = lived(kind()).eval()
    x = torch.rand(2, 3, 4, 4)
    with torch.no_grad():
        expected = network(x)
    assert torch.allclose(teacher_of(network)(x), expected, atol=1e-6)


# Measuring the accuracy once


def test_top1_is_measured_once_a_file(tmp_path: Path) -> None:
    path, measured = tmp_path / "x.pt", []

    def measure() -> float:
        measured.append(1)
        return 70.0 + len(measured)

    write(path, {"model": {"w": torch.zeros(1)}})
    assert [measured_top1(path, "digits", measure) for _ in range(3)] == [71.0] * 3
    assert json.loads((tmp_path / "x.pt.top1.json").read_text()) == {
        f"digits:{file_hash(path)}": 71.0
    }
    assert measured_top1(path, "fake", measure) == 72.0
    write(path, {"model": {"w": torch.ones(1)}})
    assert measured_top1(path, "digits", measure) == 73.0
    assert [measured_top1(path, name, measure) for name in ("fake", "digits")] == [74.0, 73.0]
    for damaged in ("[]", '{"digits:', ""):
        (tmp_path / "x.pt.top1.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"x\.pt\.top1\.json is damaged; delete it"):
            measured_top1(path, "digits", measure)


def test_top1_without_a_place_for_the_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = leave_teacher(tmp_path)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert measured_top1(path, "fake", lambda: 5.0) == 5.0


def test_top1_is_that_of_the_unfolded_network_on_the_test_images(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = tiny(tmp_path)
    data = build_data(job, CPU)
    with caplog.at_level(logging.WARNING, logger="sddlskd"):
        _, facts = build_teacher(
            job, build_network(job.teacher.model, 10, 5, CPU), data, CPU, never
        )
    plain = create("resnet8", num_classes=10)
    path = path_of(job.home, "fake", "resnet8")
    plain.load_state_dict(read(path)["model"])
    assert facts == {
        "teacher_top1": evaluate(plain.eval(), data.test_batches())["top1"],
        "teacher_sha256": file_hash(path),
    }
    assert (
        f"teacher resnet8 performs at chance: top-1 {facts['teacher_top1']:.2f} on fake ({path}), "
        "so students learn nothing from it; set teacher.checkpoint=FILE to a better one"
        in caplog.text
    )


@pytest.mark.parametrize(
    ("top1", "classes", "warns"),
    [(14.0, 10, True), (15.0, 10, False), (60.0, 2, False), (1.0, 100, True)],
)
def test_chance(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    top1: float,
    classes: int,
    warns: bool,
) -> None:
    job = tiny(tmp_path, f"dataset.num_classes={classes}", teacher=False)
    network = build_network(job.teacher.model, classes, 0, CPU)
    publish(
        path_of(job.home, "fake", "resnet8"),
        network.state_dict(),
        network="resnet8",
        dataset="fake",
        top1=top1,
    )
    monkeypatch.setattr(build, "evaluate", lambda *_: {"top1": top1})
    with caplog.at_level(logging.WARNING, logger="sddlskd"):
        build_teacher(job, network, build_data(job, CPU), CPU, never)
    assert ("performs at chance" in caplog.text) is warns


# Teacher files that are written and found


def never(job: Config) -> None:
    raise AssertionError("no teacher needs training here")


def test_publish_keeps_an_earlier_teacher(tmp_path: Path) -> None:
    path = path_of(str(tmp_path), "digits", "resnet8")
    first, second = ({"w": torch.full((2,), value)} for value in (1.0, 2.0))
    options: dict[str, Any] = {"network": "resnet8", "dataset": "digits", "top1": 50.0}
    assert publish(path, first, **options)
    assert not publish(path, second, **options)
    assert same(read(path), {"model": first, **options})


def test_of_two_that_publish_at_once_one_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = path_of(str(tmp_path), "digits", "resnet8")
    first, second = ({"w": torch.full((2,), value)} for value in (1.0, 2.0))
    options: dict[str, Any] = {"network": "resnet8", "dataset": "digits", "top1": 50.0}

    def overtaken(place: Path, state: Any, *, replace: bool) -> None:
        monkeypatch.undo()
        assert publish(path, second, **options)
        write(place, state, replace=replace)

    monkeypatch.setattr("sddlskd.training.teacher_files.write", overtaken)
    assert not publish(path, first, **options)
    assert same(read(path)["model"], second)
    assert list(path.parent.iterdir()) == [path]


def test_missing_teacher_says_both_ways(tmp_path: Path) -> None:
    job = tiny(tmp_path, "teacher.train_if_missing=false", teacher=False)
    network = build_network(job.teacher.model, 10, 0, CPU)
    with pytest.raises(FileNotFoundError) as caught:
        build_teacher(job, network, build_data(job, CPU), CPU, never)
    for part in (
        "teacher=resnet8 for fake is missing",
        str(path_of(job.home, "fake", "resnet8")),
        "distiller=vanilla student=resnet8 and the dataset.* and trainer.* words of this job",
        "teacher.checkpoint=FILE",
    ):
        assert part in str(caught.value)
    # A folder of images without its name misses the teacher of that name.
    other = path_of(job.home, "pets", "resnet8")
    other.parent.mkdir(parents=True)
    other.touch()
    error = missing(Path("x.pt"), "resnet8", "image_folder", home=job.home)
    assert f"; add dataset.name=pets for the file {other}, or train it with" in str(error)
    job = tiny(
        tmp_path,
        f"teacher.checkpoint={tmp_path}/x.pth",
        "teacher.train_if_missing=true",
        teacher=False,
    )
    # A file that the user names is never trained.
    with pytest.raises(FileNotFoundError, match=r"x\.pth"):
        build_teacher(job, network, build_data(job, CPU), CPU, never)


@pytest.mark.parametrize(
    ("network", "dataset", "options", "cure"),
    [
        ("resnet32x4", "cifar100", {},
         "fetch the published file with `python -m sddlskd.teachers fetch resnet32x4 "
         "'home=/my home'`, or train it with distiller=vanilla student=resnet32x4 and the "),
        ("resnet34", "imagenet", {},
         "fetch the published file with `python -m sddlskd.teachers fetch imagenet_resnet34 "
         "'home=/my home'`, or train it with distiller=vanilla student=imagenet_resnet34 and "),
        ("resnet32x4", "digits", {}, "train it with distiller=vanilla student=resnet32x4 and "),
        ("timm_vit_tiny", "cifar100", {},
         "train it with distiller=vanilla student=timm student.model.name=vit_tiny and the "),
        ("resnet8", "digits", {"key": "more_teachers.b", "named": True},
         "set more_teachers.b.checkpoint=FILE to a file that exists, or leave it out"),
        ("resnet56", "cifar100", {"named": True},
         "set teacher.checkpoint=FILE to a file that exists, or leave it out and fetch the "
         "published file with `python -m sddlskd.teachers fetch resnet56 'home=/my home'`"),
    ],
)  # fmt: skip
def test_a_missing_teacher_comes_with_the_command_that_gets_it(
    network: str, dataset: str, options: dict[str, Any], cure: str
) -> None:
    error = missing(Path("/x.pt"), network, dataset, home="/my home", **options)
    start = f"teacher={network} for {dataset} is missing: no file /x.pt; {cure}"
    assert str(error).startswith(start)


def test_every_published_teacher_has_a_choice() -> None:
    for dataset, names in PUBLISHED.items():
        for name in names:
            path = CONF / "teacher" / f"{choice_of(name, dataset)}.yaml"
            assert f"name: {name}\n" in path.read_text()


def test_all_missing_teachers_are_named_with_their_keys(tmp_path: Path) -> None:
    job = tiny(tmp_path, "teacher=[resnet8,resnet14]", "teacher.train_if_missing=false",
               teacher=False)  # fmt: skip
    with pytest.raises(FileNotFoundError) as caught:
        check_teacher(job)
    first, second = re.findall(r"teacher=\w+ for fake is missing.*?mdistiller", str(caught.value))
    assert "set teacher.checkpoint=FILE" in first
    assert "student=resnet14" in second
    assert "set more_teachers.resnet14.checkpoint=FILE" in second


def test_teacher_from_a_named_file_of_mdistillers_layout(tmp_path: Path) -> None:
    weights = read(leave_teacher(tmp_path))["model"]
    path = tmp_path / "student_best"
    torch.save(
        {"epoch": 240, "model": {f"module.{k}": v for k, v in weights.items()}, "best_acc": 72.5},
        path,
    )
    job = tiny(tmp_path / "home", f"teacher.checkpoint={path}", teacher=False)
    (result,) = fit([job])
    assert result["status"] == "FINISHED"
    assert result["teacher_sha256"] == file_hash(path)


def damage_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def put_another(path: Path) -> None:
    write(path, {"model": create("resnet14", num_classes=10).state_dict()})


def put_more_classes(path: Path) -> None:
    write(path, {"model": create("resnet8", num_classes=100).state_dict()})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("key", ["fc.bias", "bn1.running_var"])
def test_teacher_file_with_nan_or_infinity_is_named(tmp_path: Path, key: str, value: float) -> None:
    weights = read(leave_teacher(tmp_path))["model"]
    weights[key][1] = value
    path = tmp_path / "diverged.pth"
    torch.save({"state_dict": {f"module.{k}": v for k, v in weights.items()}}, path)
    job = tiny(tmp_path / "home", f"teacher.checkpoint={path}", teacher=False)
    with pytest.raises(ValueError, match=f"^{path} holds values that are not finite, in {key}: "):
        fit([job])
    assert not Path(job.run_dir).exists()


@pytest.mark.parametrize(
    ("spoil", "kind", "message"),
    [
        (damage_half, UnreadableFile, "is truncated, damaged or not a checkpoint"),
        (put_another, ValueError, "does not hold weights of resnet8: .* is not in resnet8"),
        (put_more_classes, ValueError, r"fc.weight is \(100, 64\) instead of \(10, 64\)"),
    ],
)
def test_bad_teacher_file_is_refused_before_anything_is_written(
    tmp_path: Path, spoil: Callable[[Path], None], kind: type[Exception], message: str
) -> None:
    job = tiny(tmp_path)
    spoil(path_of(job.home, "fake", "resnet8"))
    with pytest.raises(kind, match=message):
        fit([job])
    assert not Path(job.run_dir).exists()


def test_trained_alone_is_left_where_it_is_found(tmp_path: Path) -> None:
    alone = tiny(tmp_path, "distiller=vanilla", "student=resnet8", teacher=False)
    fit([alone])
    left = read(path_of(alone.home, "fake", "resnet8"))
    assert same(left["model"], read(Path(alone.run_dir, "last.ckpt"))["model"])
    assert (left["network"], left["dataset"]) == ("resnet8", "fake")
    job = tiny(tmp_path, "teacher.train_if_missing=false", "student=wrn_16_1", teacher=False)
    (result,) = fit([job])
    assert result["teacher_top1"] == left["top1"]


def test_a_trial_run_leaves_no_teacher(tmp_path: Path) -> None:
    fit([tiny(tmp_path, "distiller=vanilla", "trainer.max_steps=1", teacher=False)])
    assert not path_of(str(tmp_path), "fake", "resnet8").exists()


def test_missing_teacher_is_trained_first(tmp_path: Path) -> None:
    job = tiny(
        tmp_path,
        "teacher.train_if_missing=true",
        "teacher.train_epochs=1",
        "student=wrn_16_1",
        teacher=False,
    )
    (result,) = fit([job])
    assert result["status"] == "FINISHED"
    teacher = cfg.teacher_job(job)
    assert json.loads(Path(teacher.run_dir, "result.json").read_text())["status"] == "FINISHED"
    path = path_of(job.home, "fake", "resnet8")
    assert same(read(path)["model"], read(Path(teacher.run_dir, "last.ckpt"))["model"])
    # The teacher's run is finished, but its file is gone. The next job must write the file again.
    path.unlink()
    other = tiny(
        tmp_path, "teacher.train_if_missing=true", "teacher.train_epochs=1", "seed=1", teacher=False
    )
    fit([other])
    assert file_hash(path) == result["teacher_sha256"]


def test_teacher_that_cannot_be_trained_is_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "learning_rate", lambda *_, **__: 1e30)
    job = tiny(tmp_path, "teacher.train_if_missing=true", teacher=False)
    with pytest.raises(
        ValueError, match="training teacher=resnet8 ended as FAILED: NonFiniteLoss: loss became nan"
    ):
        fit([job])
    assert not Path(job.run_dir).exists()
