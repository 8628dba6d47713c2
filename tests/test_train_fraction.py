"""Test students that learn from a part of the images, while their teacher learns from all."""

from pathlib import Path

from sddlskd import config as cfg
from sddlskd.sweeps.precheck import problems
from sddlskd.training.fit import fit
from tests.tiny import composed

SHAPE = ("dataset=digits", "teacher=resnet8", "student=resnet8", "tracking=none")


def job_of(home: Path, *overrides: str) -> cfg.Config:
    return composed(home, *SHAPE, *overrides)


def test_the_teacher_is_that_of_all_images(tmp_path: Path) -> None:
    part = cfg.teacher_job(job_of(tmp_path, "dataset.train_fraction=0.1"))
    assert cfg.config_hash(part) == cfg.config_hash(cfg.teacher_job(job_of(tmp_path)))


def test_jobs_on_other_images_do_not_share_batches_and_have_another_hash(tmp_path: Path) -> None:
    part, whole = job_of(tmp_path, "dataset.train_fraction=0.1"), job_of(tmp_path)
    assert cfg.sharing_key(part) != cfg.sharing_key(whole)
    assert cfg.config_hash(part) != cfg.config_hash(whole)


def test_a_batch_larger_than_the_part_is_refused_before_the_start(tmp_path: Path) -> None:
    ((_, reason),) = problems([job_of(tmp_path, "dataset.train_fraction=0.02")])
    assert "trainer.batch_size=64 is larger than the 30 images" in reason
    assert not problems([job_of(tmp_path, "dataset.train_fraction=0.1")])


def test_crd_draws_its_negatives_from_the_part(tmp_path: Path) -> None:
    overrides = ("recipe=crd", "dataset.train_fraction=0.1", "trainer.batch_size=32")
    ((_, reason),) = problems([job_of(tmp_path, *overrides, "features.crd.method.K=200")])
    assert "K=200" in reason


def test_a_network_of_a_part_leaves_no_teacher_file(tmp_path: Path) -> None:
    words = (
        "distiller=vanilla",
        "trainer.epochs=1",
        "trainer.batch_size=16",
        "trainer.progress=off",
    )
    (part,) = fit([job_of(tmp_path, *words, "dataset.train_fraction=0.1")])
    assert part["status"] == "FINISHED"
    assert not (tmp_path / "teachers").exists()
