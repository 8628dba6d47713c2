"""Test two classes and several labels per image: losses, scores, data, training and refusals."""

import json
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score
from torch import Tensor

from sddlskd import config as cfg
from sddlskd import record
from sddlskd.config import Config
from sddlskd.data.checks import check_labels
from sddlskd.data.decoding import ImageTransform
from sddlskd.data.device import DeviceData
from sddlskd.data.streaming import StreamedData
from sddlskd.data.subsets import held_out, trained_on
from sddlskd.datasets import Files, Splits, fake_label_sets, label_sets
from sddlskd.datasets.fingerprint import fingerprint
from sddlskd.distill import STANDARDIZE, ScaleDecoupled, region_logits, takes_label_sets
from sddlskd.losses import kd, mld
from sddlskd.training.checks import check_objective
from sddlskd.training.evaluation import binary_cross_entropy, mean_average_precision, scores
from sddlskd.training.fit import fit
from tests.conftest import Compose
from tests.newer import NEWER
from tests.test_losses import LOSSES
from tests.tiny import tiny

CPU = torch.device("cpu")
EVERY: dict[str, Any] = {**LOSSES, **NEWER}
SETS = (
    "dataset=fake_label_sets",
    "dataset.num_classes=4",
    "+dataset.load.train=96",
    "+dataset.load.test=64",
    "+dataset.load.size=16",
    "recipe=mld",
)


def maps(K: int, seed: int = 0, side: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = 3 * torch.randn(2, 6, K, side, side, generator=generator)
    return student, teacher


def several(home: Path, *overrides: str) -> Config:
    """Return a tiny job whose images have several labels."""
    return tiny(home, *(text.removeprefix("+") for text in SETS), *overrides, teacher=False)


# Two classes


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("way", STANDARDIZE)
@pytest.mark.parametrize("M", [[1], [1, 2, 4]], ids=str)
def test_every_loss_of_two_classes_is_finite(name: str, way: str, M: list[int]) -> None:
    student, teacher = maps(2)
    student.requires_grad_()
    target = torch.tensor([0, 1, 1, 0, 1, 0])
    loss = ScaleDecoupled(EVERY[name], M, standardize=way)(student, teacher, target)
    loss.backward()
    assert loss.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("way", ["class", "class_scaled"])
def test_two_standardised_classes_keep_their_sign_alone(way: str) -> None:
    student, teacher = maps(2)
    target = torch.tensor([0, 1, 1, 0, 1, 0])
    distill = ScaleDecoupled(partial(kd, temperature=2.0), [1], standardize=way)
    student.requires_grad_()
    loss = distill(student, teacher, target)
    loss.backward()
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-6
    same = distill(100 * student.detach(), teacher, target)
    assert same.item() == pytest.approx(loss.item(), abs=1e-6)


def two_classes(compose: Compose, *overrides: str) -> Config:
    return compose("dataset=fake", "dataset.num_classes=2", "distiller=kd", *overrides)


@pytest.mark.parametrize("way", ["true", "class", "class_scaled"])
def test_a_standardisation_that_leaves_no_gradient_is_warned_of(
    compose: Compose, caplog: pytest.LogCaptureFixture, way: str
) -> None:
    check_objective(two_classes(compose, f"standardize={way}"), CPU)
    (warning,) = caplog.messages
    assert "leaves only the sign of the logits of two classes" in warning
    assert "distiller=kd has no gradient: set standardize=none or standardize=batch" in warning


def test_other_jobs_are_not_warned_of(compose: Compose, caplog: pytest.LogCaptureFixture) -> None:
    for overrides in (["standardize=none"], ["standardize=batch"], ["dataset.num_classes=3"]):
        check_objective(two_classes(compose, *overrides), CPU)
    assert caplog.messages == []


# The loss of several labels


def test_mld_by_hand() -> None:
    # Probabilities at temperature 2 of three classes, of which the image has the first.
    student_p, teacher_p = np.array([0.2, 0.5, 0.9]), np.array([0.6, 0.5, 0.3])
    student, teacher = (torch.tensor(2 * np.log(p / (1 - p)))[None] for p in (student_p, teacher_p))
    divergence = teacher_p * np.log(teacher_p / student_p)
    divergence += (1 - teacher_p) * np.log((1 - teacher_p) / (1 - student_p))
    labels = torch.tensor([[1, 0, 0]])
    loss = mld(student, teacher, labels, temperature=2.0, alpha=3.0, beta=0.5)
    expected = 4 * (3 * divergence[0] + 0.5 * divergence[1:].sum())
    assert loss.tolist() == pytest.approx([expected], rel=1e-12)


def test_mld_is_the_released_loss_at_temperature_one() -> None:
    student, teacher = torch.randn(2, 5, 4, dtype=torch.float64)
    labels = torch.zeros(5, 4, dtype=torch.int64)
    p, q = torch.sigmoid(teacher), torch.sigmoid(student)
    # criterion/distiller_zoo/logits_based/mld.py of penghui-yang/L2D: batchmean of both sums.
    released = (F.kl_div(q.log(), p, reduction="sum") + F.kl_div(
        (1 - q).log(), 1 - p, reduction="sum"
    )) / 5  # fmt: skip
    ours = mld(student, teacher, labels, temperature=1.0).mean()
    assert ours.item() == pytest.approx(released.item(), rel=1e-12)


def test_mld_of_one_class_is_kd_of_its_two_events() -> None:
    student, teacher = torch.randn(2, 5, 1, dtype=torch.float64)
    pairs = [torch.cat((logit, torch.zeros_like(logit)), 1) for logit in (student, teacher)]
    expected = kd(*pairs, torch.zeros(5, dtype=torch.int64), temperature=3.0)
    ours = mld(student, teacher, torch.ones(5, 1), temperature=3.0)
    assert torch.allclose(ours, expected, atol=1e-12)


def test_mld_has_its_gradient_and_no_order_of_classes() -> None:
    student, teacher = torch.randn(2, 3, 4, dtype=torch.float64)
    labels = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    loss = partial(mld, temperature=2.0, alpha=2.0, beta=0.5)
    assert torch.autograd.gradcheck(lambda x: loss(x, teacher, labels), (student.requires_grad_(),))
    order = torch.tensor([2, 0, 3, 1])
    permuted = loss(student[:, order], teacher[:, order], labels[:, order])
    assert torch.allclose(permuted, loss(student, teacher, labels))


@pytest.mark.parametrize("scale", [1e3, 1e4])
def test_mld_of_extreme_logits_is_finite(scale: float) -> None:
    student, teacher = scale * torch.randn(2, 6, 3)
    student.requires_grad_()
    loss = mld(student, teacher, torch.ones(6, 3), temperature=1.0)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert student.grad is not None
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("M", [[1], [1, 2], [1, 2, 4]], ids=str)
def test_mld_composes_with_scales(M: list[int]) -> None:
    student, teacher = maps(3)
    labels = torch.tensor([[1, 0, 1]] * 6)
    loss = partial(mld, temperature=2.0, alpha=2.0)
    found = ScaleDecoupled(loss, M)(student, teacher, labels)
    regions = [region_logits(logit_map, M).unbind(1) for logit_map in (student, teacher)]
    values = [loss(*pair, labels) for pair in zip(*regions, strict=True)]
    assert found.item() == pytest.approx(torch.stack(values).mean().item(), rel=1e-5)


def test_only_mld_takes_label_sets_and_it_knows_no_complementary_regions() -> None:
    assert takes_label_sets(partial(mld, temperature=1.0))
    assert not any(takes_label_sets(loss) for loss in EVERY.values())
    with pytest.raises(ValueError, match="knowledge='consistent' needs one class per image"):
        ScaleDecoupled(partial(mld, temperature=1.0), [1, 2], knowledge="consistent")


# Scores


def test_map_is_that_of_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (40, 5), generator=generator)
    labels[:, 3] = 0
    logits = torch.randn(40, 5, generator=generator)
    logits[:, 1] = logits[:, 1].round()  # ties
    expected = np.mean(
        [
            average_precision_score(labels[:, k].numpy(), logits[:, k].numpy())
            for k in (0, 1, 2, 4)  # no image has class 3
        ]
    )
    assert mean_average_precision(logits, labels) == pytest.approx(100 * expected, abs=1e-9)
    assert mean_average_precision(logits, torch.zeros_like(labels)) == 0


def test_scores_of_several_labels_by_hand() -> None:
    logits = torch.tensor([[2.0, 1.0, -1.0], [0.0, 3.0, 1.0], [1.0, 2.0, 3.0]])
    labels = torch.tensor([[1, 1, 0], [0, 0, 1], [0, 0, 0]])
    found = scores(logits, labels)
    p = torch.sigmoid(logits).numpy()
    entropy = -np.where(labels == 1, np.log(p), np.log(1 - p)).sum(1)
    assert found["top1"] == pytest.approx(100 / 3)
    assert found["top5"] == pytest.approx(200 / 3)
    assert found["loss"] == pytest.approx(entropy.mean(), rel=1e-6)
    # Class 0 is ranked first; class 1 third; class 2 second.
    assert found["mAP"] == pytest.approx(100 * (1 + 1 / 3 + 1 / 2) / 3)
    assert "ece" not in found
    assert binary_cross_entropy(logits, labels).item() == pytest.approx(entropy.mean(), rel=1e-6)


# Data


def test_images_are_held_out_without_regard_to_their_labels() -> None:
    labels = torch.randint(2, (50, 4))
    held = held_out(labels, 0.2, 4)
    assert held.sum() == 10
    rest = trained_on(labels, 0.2, 0.5, 4)
    assert rest.sum() == 20
    assert not (held & rest).any()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            torch.zeros(3, 5).long(),
            r"are torch.int64 \(3, 5\); .* torch.int64 \(3, 4\)",
        ),
        (torch.zeros(3, 4), r"are torch.float32 \(3, 4\)"),
        (torch.full((3, 4), 2), "are not all 0 or 1"),
    ],
)
def test_labels_that_are_no_sets_are_refused(labels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_labels("train", labels, 3, 4)


def test_a_batch_has_the_labels_of_its_images() -> None:
    splits = fake_label_sets(num_classes=4, size=16, train=30, test=10)
    data = DeviceData(
        splits, num_classes=4, batch_size=8, seed=0, device="cpu", mean=[0.5] * 3, std=[0.25] * 3
    )
    for batch in data.batches(1):
        assert torch.equal(batch.labels, splits.train.labels_N[batch.index])
    assert fingerprint(splits)["classes"] == 4


def folder_of_sets(root: Path) -> Path:
    from PIL import Image

    listed = {"train": ["a.png,cat;dog", "sub/b.png,dog", "c.png,"], "val": ["d.png,bird"]}
    for split, lines in listed.items():
        for line in lines:
            path = root / split / line.partition(",")[0]
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), (len(line), 0, 0)).save(path)
        (root / split / "labels.csv").write_text("file,labels\n" + "\n".join(lines) + "\n")
    return root


def test_a_folder_with_lists_of_labels(tmp_path: Path) -> None:
    train, test = label_sets(str(folder_of_sets(tmp_path)), num_classes=3)
    assert isinstance(train, Files)
    assert [Path(path).name for path in train.paths] == ["a.png", "b.png", "c.png"]
    assert train.labels_N.tolist() == [[0, 1, 1], [0, 0, 1], [0, 0, 0]]  # bird, cat, dog
    assert test.labels_N.tolist() == [[1, 0, 0]]
    data = StreamedData(
        Splits(train, test), num_classes=3, batch_size=3, seed=0, device="cpu", mean=[0.5] * 3,
        std=[0.25] * 3, workers=0, view=ImageTransform(16, area=(1.0, 1.0), centre=1.0),
    )  # fmt: skip
    (batch,) = data.batches(1)
    assert torch.equal(batch.labels, train.labels_N[batch.index])
    assert fingerprint(Splits(train, test))["class_names"] is None


def test_a_list_that_a_spreadsheet_program_saved_is_read(tmp_path: Path) -> None:
    """Such a file begins with a byte order mark."""
    root = folder_of_sets(tmp_path)
    expected = label_sets(str(root))
    listing = root / "train" / "labels.csv"
    listing.write_text(listing.read_text(), encoding="utf-8-sig", newline="\r\n")
    train, _ = label_sets(str(root))
    assert train.paths == expected.train.paths
    assert torch.equal(train.labels_N, expected.train.labels_N)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("a.png", "labels.csv:1: 'a.png' is not an image below"),
        ("gone.png,cat", "labels.csv:1: 'gone.png,cat' is not an image below"),
        ("a.png,cat\na.png,dog", "labels.csv:2: .* lists an image twice"),
        ("file,labels", "labels.csv lists no image"),
        ("a.png,cat", "name 2 classes, not 3; set dataset.num_classes=2"),
        (None, "there is no file .*labels.csv; it should list"),
    ],
)
def test_a_list_that_is_wrong_is_named(tmp_path: Path, lines: str | None, message: str) -> None:
    listing = folder_of_sets(tmp_path) / "train" / "labels.csv"
    listing.unlink()
    if lines is not None:
        listing.write_text(lines)
    with pytest.raises(ValueError, match=message):
        label_sets(str(tmp_path), num_classes=3)


# Training


def test_the_best_epoch_of_several_labels_is_that_of_the_best_map(tmp_path: Path) -> None:
    job = several(tmp_path, "trainer.epochs=3", "dataset.val_fraction=0.25", "M=[1,2]")
    (result,) = fit([job])
    rows = record.read_rows(Path(job.run_dir))
    best = max(rows, key=lambda row: row["val/mAP"])
    assert (result["best_mAP"], result["best_epoch"]) == (best["val/mAP"], best["epoch"])
    assert result["last_mAP"] == rows[-1]["val/mAP"]
    assert result["best_top1"] == best["val/top1"]
    assert 0 < result["test_mAP"] <= 100
    assert rows[-1]["train/loss_kd"] > 0
    opened = record.Record(job)
    written = opened.write_outcome("FINISHED", "")
    opened.close()
    assert {name: written[name] for name in ("best_mAP", "last_mAP", "best_top1")} == {
        name: result[name] for name in ("best_mAP", "last_mAP", "best_top1")
    }


def test_several_labels_are_searched_by_their_map(compose: Compose) -> None:
    assert compose(*SETS, "objective=last/mAP").objective == "last/mAP"
    assert compose(*SETS, "objective=test/mAP", "dataset.val_fraction=0.2").objective == "test/mAP"
    mine = r"objective=val/mAP is logged by no run; give objective=best/mAP; runs log .*last/mAP$"
    with pytest.raises(ValueError, match=mine):
        compose(*SETS, "objective=val/mAP")
    with pytest.raises(ValueError, match=r"give objective=val/loss; runs log .*, val/loss$"):
        compose("dataset=digits", "objective=train/loss")
    with pytest.raises(ValueError, match=r"objective=test/mAP is logged only with held-out.*/mAP$"):
        compose(*SETS, "objective=test/mAP")
    with pytest.raises(ValueError, match=r"only with .*multi_label=true; give objective=best/top1"):
        compose("dataset=digits", "objective=best/mAP")


def test_jobs_with_one_class_have_no_map_and_their_hash(compose: Compose, tmp_path: Path) -> None:
    job = tiny(tmp_path, "recipe=vanilla", "trainer.epochs=1", teacher=False)
    (result,) = fit([job])
    assert not [name for name in result if "mAP" in name]
    assert "val/mAP" not in json.loads((Path(job.run_dir) / "metrics.jsonl").read_text())
    plain = compose("dataset=digits", "recipe=kd")
    assert cfg.config_hash(plain) == cfg.config_hash(
        compose("dataset=digits", "recipe=kd", "dataset.multi_label=false")
    )


# Refusals


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["standardize=true"], "standardize=True moves the zero of the logits"),
        (["M=[1,2]", "complementary_weight=2"], "complementary_weight=2 needs one class per image"),
        (["distiller.knowledge=consistent"], "distiller.knowledge=consistent needs one class"),
        (["features=[crd]"], r"features=\[crd\] cannot be trained with dataset.multi_label=true"),
        (["trainer.devices=2"], "trainer.devices=2 cannot measure val/mAP"),
        (
            ["+teacher@more_teachers.resnet14=resnet14", "teacher.combine=confidence"],
            "teacher.combine=confidence weighs teachers by the class of each image",
        ),
        (["tracking.predictions=true"], "tracking.predictions=true keeps one class per image"),
    ],
)
def test_settings_that_need_one_class_are_refused(
    compose: Compose, overrides: Sequence[str], message: str
) -> None:
    compose(*SETS)  # the recipe itself is valid
    with pytest.raises(ValueError, match=message) as refused:
        compose(*SETS, *overrides)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            [*SETS, "distiller=kd"],
            "distiller=kd needs one class per image, which dataset=fake_label_sets does not have; "
            "choose recipe=mld or recipe=vanilla",
        ),
        (
            ["dataset=digits", "recipe=mld"],
            "distiller=mld needs several labels per image, which dataset=digits does not have; "
            "choose another distiller, such as distiller=kd",
        ),
    ],
)
def test_a_loss_for_other_labels_is_refused(
    compose: Compose, overrides: Sequence[str], message: str
) -> None:
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        check_objective(compose(*overrides), CPU)
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["dataset.multi_label=false", "recipe=vanilla"], "has several labels per image; set"),
        (["dataset=fake", "dataset.multi_label=true", "recipe=vanilla"], "has one class per image"),
    ],
)
def test_data_with_other_labels_than_stated_are_refused(
    tmp_path: Path, overrides: Sequence[str], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    job = several(tmp_path, *overrides)
    with pytest.raises(ValueError, match=f"{message}.*dataset.multi_label="):
        fit([job])
    assert not Path(job.run_dir).exists()
