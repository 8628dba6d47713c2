"""Students that see some images without their labels."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from analysis.runs import _typed
from analysis.schema import frame_of, runs_of
from analysis.selection import rows as table_rows
from sddlskd import config as cfg
from sddlskd.config import Config
from sddlskd.data import subsets
from sddlskd.data.decoding import ImageTransform
from sddlskd.data.device import Batch, DeviceData, draw_epoch
from sddlskd.data.streaming import StreamedData
from sddlskd.data.subsets import trained_on
from sddlskd.datasets import image_folder
from sddlskd.datasets.arrays import Splits, fake
from sddlskd.distill import ScaleDecoupled
from sddlskd.losses import dkd
from sddlskd.models import Taps
from sddlskd.sweeps.precheck import problems
from sddlskd.training import group
from sddlskd.training.fit import fit
from sddlskd.training.objective import Objective, labelled_cross_entropy
from tests.conftest import Compose
from tests.photographs import class_folders
from tests.stopping import stopped_at
from tests.tiny import final, rows, same, same_outcome, tiny

PART = ("dataset.train_fraction=0.25", "dataset.unlabelled=true")
OPTIONS: dict[str, Any] = {
    "batch_size": 16, "seed": 3, "device": "cpu", "mean": [0.5] * 3, "std": [0.25] * 3,
}  # fmt: skip


# Batches


@pytest.mark.parametrize("val_fraction", [0.0, 0.2])
def test_batches_hold_all_images_in_the_usual_order(val_fraction: float) -> None:
    splits = fake(num_classes=4, train=60, test=10, size=8)
    common = OPTIONS | {"num_classes": 4, "val_fraction": val_fraction}
    data = DeviceData(splits, **common, train_fraction=0.25, unlabelled=True)
    whole = DeviceData(splits, **common)
    labelled_N = trained_on(splits.train.labels_N, val_fraction, 0.25, 4)
    seen_N = trained_on(splits.train.labels_N, val_fraction, 1.0, 4)
    assert data.train_size == whole.train_size == seen_N.sum()
    for batch, usual in zip(data.batches(2), whole.batches(2), strict=True):
        has_label_B = labelled_N[seen_N][batch.index]
        wanted_B = torch.where(has_label_B, usual.labels, -1)
        assert same(batch._asdict(), usual._replace(labels=wanted_B)._asdict())
    index_N = torch.cat([batch.index for batch in data.batches(2)])
    assert torch.equal(index_N, draw_epoch(3, 2, data.train_size, 4).order_N)
    assert (data.train_labels >= 0).sum() == labelled_N.sum()


def test_streamed_batches_hold_all_images(tmp_path: Path) -> None:
    splits = image_folder(str(class_folders(tmp_path, 3, 8)))
    common = OPTIONS | {"num_classes": 3, "view": ImageTransform(8), "workers": 0}
    data = StreamedData(splits, **common, train_fraction=0.25, unlabelled=True)
    whole = StreamedData(splits, **common)
    labelled_N = trained_on(splits.train.labels_N, 0.0, 0.25, 3)
    for batch, usual in zip(data.batches(1), whole.batches(1), strict=True):
        wanted_B = torch.where(labelled_N[batch.index], usual.labels, -1)
        assert same(batch._asdict(), usual._replace(labels=wanted_B)._asdict())


# Losses


def test_cross_entropy_is_the_mean_over_the_labelled_images() -> None:
    logits_BK = torch.randn(6, 5, requires_grad=True)
    labels_B = torch.tensor([2, -1, 0, -1, -1, 4])
    got = labelled_cross_entropy(logits_BK, labels_B)
    torch.testing.assert_close(got, F.cross_entropy(logits_BK[[0, 2, 5]], labels_B[[0, 2, 5]]))
    nothing = labelled_cross_entropy(logits_BK, torch.full((6,), -1))
    (gradient,) = torch.autograd.grad(nothing, logits_BK)
    assert nothing.item() == 0
    assert not gradient.any()


def test_the_teachers_prediction_takes_the_place_of_the_label() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 6, 5, 4, 4, generator=generator)
    labels_B = torch.tensor([2, -1, 0, -1, -1, 4])
    distill = ScaleDecoupled(partial(dkd, alpha=1.0, beta=2.0, temperature=4.0), [1, 2, 4])
    objective = Objective(
        distill, 1.0, 1.0, 1, cross_entropy=labelled_cross_entropy, unlabelled=True
    )
    batch = Batch(student, labels_B, torch.arange(6), None)
    losses = objective.losses(Taps.of_map(student), Taps.of_map(teacher), batch)
    predicted_B = teacher.mean((2, 3)).argmax(1)
    target_B = torch.tensor([2, predicted_B[1], 0, predicted_B[3], predicted_B[4], 4])
    assert torch.equal(losses["loss_kd"], distill(student, teacher, target_B))
    assert losses["labelled"] == 0.5
    assert set(losses) == set(objective.names)


# Training


def with_labels(monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    """Let training load the data with other labels of the images that have none in `PART`."""
    load = group.load_splits

    def loaded(job: Config) -> Splits:
        splits = load(job)
        labels_N = splits.train.labels_N
        labelled_N = trained_on(labels_N, 0.0, 0.25, 10)
        others_N = torch.zeros_like(labels_N)
        if change == "permuted":
            others_N = (labels_N + 3) % 10
        # Which images have labels must not follow from the changed ones.
        masks = {0.25: labelled_N, 1.0: torch.ones_like(labelled_N)}
        monkeypatch.setattr(subsets, "trained_on", lambda _, __, fraction, ___: masks[fraction])
        labels_N = torch.where(labelled_N, labels_N, others_N)
        return splits._replace(train=splits.train._replace(labels_N=labels_N))

    monkeypatch.setattr(group, "load_splits", loaded)


@pytest.mark.parametrize("recipe", ["sd_kd_ls", "sd_dkd"])
def test_no_label_of_an_unlabelled_image_reaches_a_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    words = [f"recipe={recipe}", "M=[1,2]", "trainer.epochs=1"]
    true, *changed = (tiny(tmp_path / at, *words, *PART) for at in ("true", "zeroed", "permuted"))
    fit([true])
    for job, change in zip(changed, ("zeroed", "permuted"), strict=True):
        with monkeypatch.context() as patch:
            with_labels(patch, change)
            assert [result["status"] for result in fit([job])] == ["FINISHED"]
        assert same_outcome(true, job)
    # The images count, though.
    alone = tiny(tmp_path / "true", *words, PART[0], "trainer.batch_size=16")
    fit([alone])
    assert not same(final(true)["model"], final(alone)["model"])


def test_a_change_of_these_labels_matters_if_students_see_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [tiny(tmp_path / at, "trainer.epochs=1", "M=[1]") for at in ("true", "zeroed")]
    fit(jobs[:1])
    with_labels(monkeypatch, "zeroed")
    fit(jobs[1:])
    assert not same(*(final(job)["model"] for job in jobs))


def test_a_group_equals_its_runs_alone_and_a_stopped_run_continues(tmp_path: Path) -> None:
    ways = [["recipe=kd", "teacher.view=plain"], ["recipe=sd_kd_ls", "teacher.view=plain"]]
    together, alone, captured = (
        [tiny(tmp_path / at, "M=[1,2]", *PART, *way) for way in ways]
        for at in ("together", "alone", "captured")
    )
    fit(together)
    for job in captured:
        job.trainer.capture = cfg.Capture.on
    fit(captured)
    assert "not captured" not in Path(captured[0].run_dir, "train.log").read_text()
    for a, b, c in zip(together, alone, captured, strict=True):
        with stopped_at(2, 2):
            assert [result["status"] for result in fit([b])] == ["KILLED"]
        fit([b])
        assert same_outcome(a, b)
        assert same_outcome(a, c)


def test_top1_counts_the_labelled_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right, labelled = [], []
    real = Objective.losses

    def watched(self: Objective, student: Taps, teacher: Taps, batch: Batch) -> dict[str, Tensor]:
        class_B = student.logit_map.mean((2, 3)).argmax(1)
        right.append(int((class_B == batch.labels).sum()))
        labelled.append(int((batch.labels >= 0).sum()))
        return real(self, student, teacher, batch)

    monkeypatch.setattr(Objective, "losses", watched)
    job = tiny(tmp_path, "trainer.epochs=1", *PART)
    fit([job])
    (row,) = rows(job)
    assert sum(labelled) == trained_on(group.load_splits(job).train.labels_N, 0.0, 0.25, 10).sum()
    assert sum(right) > 0
    assert row["train/top1"] == pytest.approx(100 * sum(right) / sum(labelled), rel=1e-6)
    assert row["train/labelled"] == pytest.approx(sum(labelled) / 192, rel=1e-6)


# Jobs


def test_the_hash_counts_it_and_the_teacher_learns_from_all_labels(compose: Compose) -> None:
    part, stated, both = (
        compose("recipe=kd", PART[0], *words)
        for words in ([], ["dataset.unlabelled=false"], PART[1:])
    )
    assert cfg.config_hash(part) == cfg.config_hash(stated) != cfg.config_hash(both)
    assert cfg.sharing_key(part) != cfg.sharing_key(both)
    taught = cfg.teacher_job(both).dataset
    assert (taught.train_fraction, taught.unlabelled) == (1.0, False)


def test_a_batch_may_be_larger_than_the_labelled_images(tmp_path: Path) -> None:
    fits = tiny(tmp_path, *PART)
    few = tiny(tmp_path, PART[0])
    assert [job for job, _ in problems([fits, few])] == [few]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["recipe=kd", PART[1]],
         "dataset.unlabelled=true has no images without labels, as dataset.train_fraction=1; set"),
        (["distiller=vanilla", *PART],
         "distiller=vanilla learns from labels alone, but dataset.unlabelled=true; choose another"),
        (["dataset=label_sets", "dataset.num_classes=4", "dataset.root=x", "recipe=mld", *PART],
         "dataset.unlabelled=true takes the class that the teacher predicts as label, but"),
        (["recipe=crd", *PART], "features=[crd] cannot be trained with dataset.unlabelled=true"),
        (["teacher=[resnet8,resnet14]", *PART], "teacher=[resnet8,resnet14] may predict several"),
        (["recipe=kd", "trainer.devices=2", *PART], "trainer.devices=2 would weigh labels"),
    ],
)  # fmt: skip
def test_what_has_no_meaning_is_refused(compose: Compose, overrides: list[str], says: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(says)}") as caught:
        compose(*overrides)
    assert "\n" not in str(caught.value)


def test_tables_tell_the_ways_apart(compose: Compose) -> None:
    ways = [[], PART[1:], [*PART[1:], "teacher.view=plain"]]
    jobs = [compose("recipe=kd", PART[0], *way) for way in ways]
    found = []
    for job in jobs:
        row, _ = _typed({key: str(value) for key, value in cfg.flatten(job).items()})
        found.append(row | {"settings_hash": cfg.settings_hash(job)})
    split = [row.split for row in table_rows(runs_of(frame_of(found)), lambda run: run.method)]
    assert len(split) == len(jobs)
    assert set(split[0]) == {"dataset.unlabelled", "teacher.view"}
