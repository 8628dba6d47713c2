"""Test that a record, a teacher file and a teacher cache know the data that they came from."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf.errors import OmegaConfBaseException

from sddlskd import evaluate, teachers
from sddlskd.config import Config
from sddlskd.datasets import cifar10, fake, fashion_mnist, image_folder
from sddlskd.datasets import fingerprint as fingerprints
from sddlskd.datasets.arrays import Files, Images, Splits
from sddlskd.datasets.fingerprint import difference, differing_classes, fingerprint
from sddlskd.datasets.places import without_downloads
from sddlskd.files.checkpoint import read, write
from sddlskd.sweeps import precheck, run_sweep
from sddlskd.sweeps.plan import make_plan
from sddlskd.sweeps.pool import Pool
from sddlskd.terminal.console import explain
from sddlskd.training.build import build_data, build_network, build_teacher, load_splits
from sddlskd.training.fit import fit
from sddlskd.training.image_folders import log_image_folder
from sddlskd.training.teacher_files import path_of
from tests import layouts
from tests.test_sweeps import pool
from tests.tiny import composed, tiny

SHAPE = (
    "dataset=image_folder", "dataset.size=32", "dataset.stem=small", "dataset.workers=0",
    "dataset.num_classes=2", "student=resnet8", "trainer=cpu", "trainer.epochs=1",
    "trainer.batch_size=4", "trainer.progress=off", "tracking=none",
)  # fmt: skip
ALONE = ("recipe=vanilla", "distiller=vanilla")
CPU = torch.device("cpu")


def folder(root: Path, *classes: str, train: int = 4, test: int = 2, shade: int = 0) -> Path:
    for split, count in (("train", train), ("val", test)):
        for name in classes:
            for i in range(count):
                layouts.write(root / split / name / f"{i}.jpg", layouts.jpeg(shade + i, (32, 32)))
    return root


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    return folder(tmp_path / "pets", "cat", "dog")


@pytest.fixture
def cars(tmp_path: Path) -> Path:
    return folder(tmp_path / "cars", "bmw", "vw", train=5, test=3)


def job_of(root: Path, *overrides: str) -> Config:
    return composed(root.parent / "home", *SHAPE, f"dataset.root={root}", *overrides)


def result_of(job: Config) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(Path(job.run_dir, "result.json").read_text())
    return result


def change_result(job: Config, **entries: Any) -> None:
    """Change entries of the job's result.json; None removes an entry."""
    changed = {k: v for k, v in (result_of(job) | entries).items() if v is not None}
    Path(job.run_dir, "result.json").write_text(json.dumps(changed))


def test_the_classes_of_a_folder_are_counted(pets: Path, caplog: pytest.LogCaptureFixture) -> None:
    (pets / "train" / ".cache").mkdir()  # what a program left behind
    counting = [word for word in SHAPE if not word.startswith("dataset.num_classes")]
    root = f"dataset.root={pets}"
    job = composed(pets.parent / "home", *counting, root, *ALONE)
    stated = job_of(pets, *ALONE)
    assert (job.dataset.num_classes, job.run_dir) == (2, stated.run_dir)
    with caplog.at_level("INFO", "sddlskd"):
        (result,) = fit([job])
    assert result["status"] == "FINISHED"
    assert (
        f"image folder {pets}: 2 classes, 8 training images, 4 test images; "
        "trained with trainer.epochs=1, trainer.batch_size=4, optimizer.lr=0.05, dataset.size=32 "
        "pixels; those that you did not set are defaults" in caplog.text
    )
    file = path_of(job.home, "image_folder", "resnet8")
    assert f"teacher file {file}: written (last epoch, top-1 {result['last_top1']:.2f})" in (
        caplog.text
    )
    other = job_of(pets, *ALONE, "seed=1")
    with caplog.at_level("INFO", "sddlskd"):
        (result,) = fit([other])
    assert (
        f"teacher file {file}: kept, since the file exists already, and students learn from that "
        f"one; for this network set teacher.checkpoint={other.run_dir}/best.ckpt (best epoch, "
        f"top-1 {result['best_top1']:.2f}), or" in caplog.text
    )


def test_a_folder_without_classes_says_what_to_set(tmp_path: Path) -> None:
    def told_of(root: Path) -> str:
        with pytest.raises(OmegaConfBaseException) as caught:
            composed(tmp_path, "dataset=image_folder", f"dataset.root={root}")
        told = explain(caught.value)
        assert "\n" not in told
        return told

    pets = tmp_path / "pets"
    assert f"dataset.root={pets} does not exist; give the folder" in told_of(pets)
    pets.mkdir()
    told = told_of(pets)
    for part in (f"there is no folder {tmp_path}/pets/train", "dataset.root=FOLDER",
                 "dataset.num_classes=NUMBER"):  # fmt: skip
        assert part in told
    (pets / "train").mkdir()
    (pets / "train" / "1.jpg").touch()
    assert "/train has no class folders (files directly in it: 1); put" in told_of(pets)
    (pets / "train" / "cat").mkdir()
    assert "/train has a single class folder, cat; a classifier needs" in told_of(pets)


def test_a_class_with_one_image_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    job = job_of(folder(tmp_path / "pets", "cat", "dog", train=3, test=1), *ALONE)
    splits = load_splits(job)
    train = splits.train
    assert isinstance(train, Files)
    with caplog.at_level("WARNING", "sddlskd"):
        log_image_folder(job, splits, fingerprint(splits))
        assert not caplog.messages
        fewer = splits._replace(train=Files(train.paths[2:], train.labels_N[2:]))
        log_image_folder(job, fewer, fingerprint(fewer))
    (told,) = caplog.messages
    assert ": class cat has 1 training image, too few to learn" in told


@pytest.mark.parametrize("root", ["pets/train", "pets/train/cat", "."])
def test_a_root_beside_the_classes_names_the_right_one(tmp_path: Path, root: str) -> None:
    (tmp_path / "pets/train/cat").mkdir(parents=True)
    with pytest.raises(OmegaConfBaseException) as caught:
        composed(tmp_path, "dataset=image_folder", f"dataset.root={tmp_path / root}")
    assert explain(caught.value).endswith(f"set dataset.root={tmp_path}/pets")


# Fingerprints


def test_the_fingerprint_of_files_does_not_depend_on_where_they_lie(pets: Path) -> None:
    noted = fingerprint(image_folder(str(pets)))
    assert {**noted, "sha256": ""} == {
        "train": 8, "test": 4, "classes": 2, "class_names": ["cat", "dog"], "sha256": "",
    }  # fmt: skip
    shutil.copytree(pets, pets.with_name("copy") / "deep")
    assert fingerprint(image_folder(str(pets.with_name("copy") / "deep"))) == noted
    assert json.loads(json.dumps(noted)) == noted


def add_image(root: Path) -> None:
    layouts.write(root / "train/cat/new.jpg", layouts.jpeg(7))


def rename_class(root: Path) -> None:
    for split in ("train", "val"):
        (root / split / "dog").rename(root / split / "wolf")


def swap_test_image(root: Path) -> None:
    """Change a byte of a test image, so that it keeps its size."""
    path = root / "val/dog/1.jpg"
    content = path.read_bytes()
    path.write_bytes(content[:-3] + b"\0" + content[-2:])


def move_image(root: Path) -> None:
    (root / "train/cat/0.jpg").rename(root / "train/dog/x.jpg")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (add_image, "8 training images then, 9 now"),
        (rename_class, "classes dog then, wolf now"),
        (swap_test_image, "other images, as many as then, of the same classes"),
        (move_image, "other images, as many as then, of the same classes"),
    ],
)
def test_how_files_differ_is_said(pets: Path, change: Callable[[Path], None], says: str) -> None:
    before = fingerprint(image_folder(str(pets)))
    change(pets)
    now = fingerprint(image_folder(str(pets)))
    assert difference(before, now) == says
    assert differing_classes(before, now) == (says if change is rename_class else "")
    assert difference(now, now) == ""


def test_many_files_are_looked_at_in_part(pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprints, "MOST_SIZES", 3)
    monkeypatch.setattr(fingerprints, "MOST_CONTENTS", 2)
    before = fingerprint(image_folder(str(pets)))
    layouts.write(pets / "train/cat/1.jpg", b"x")  # between the files that are looked at
    assert fingerprint(image_folder(str(pets))) == before
    layouts.write(pets / "train/cat/0.jpg", b"x")
    assert fingerprint(image_folder(str(pets))) != before


def test_the_same_classes_in_another_order_are_named_as_that() -> None:
    now = {"class_names": ["cat", "dog"], "classes": 2}
    then = {"class_names": ["dog", "cat"], "classes": 2}
    assert differing_classes(then, now) == "the same classes in another order"


def test_files_without_a_folder_a_class_have_no_class_names(tmp_path: Path) -> None:
    layouts.write(tmp_path / "a.jpg", b"")
    layouts.write(tmp_path / "b.jpg", b"")
    split = fingerprints.Files([str(tmp_path / "a.jpg"), str(tmp_path / "b.jpg")], torch.arange(2))
    noted = fingerprint(Splits(split, split))
    assert (noted["class_names"], noted["classes"]) == (None, 2)


def test_the_fingerprint_of_pixels() -> None:
    train, test = fake(10, 8, 20, 10)
    assert isinstance(train, Images)
    noted = fingerprint(Splits(train, test))
    assert fingerprint(fake(10, 8, 20, 10)) == noted
    images_NHWC, labels_N = train.images_NHWC.clone(), train.labels_N.clone()
    images_NHWC[-1, 0, 0, 0] ^= 1
    labels_N[0] += 1
    for other in (Images(images_NHWC, train.labels_N), Images(train.images_NHWC, labels_N)):
        says = "other images, as many as then, of the same classes"
        assert difference(noted, fingerprint(Splits(other, test))) == says
    assert difference(noted, fingerprint(fake(12, 8, 20, 12))) == (
        "10 classes then, 12 now; 10 test images then, 12 now"
    )


# Records


def test_a_finished_record_of_other_data_is_refused(
    pets: Path, cars: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = job_of(pets, *ALONE)
    (result,) = fit([job])
    assert result["data"] == fingerprint(image_folder(str(pets)))
    before = Path(job.run_dir, "result.json").read_bytes()
    other = job_of(cars, *ALONE)
    assert other.run_dir == job.run_dir
    with pytest.raises(ValueError, match="was trained on other data") as caught:
        fit([other])
    for part in (
        f"run_dir={job.run_dir}", "dataset=image_folder", "classes cat, dog then, bmw, vw now",
        "8 training images then, 10 now", "4 test images then, 6 now",
        "choose another dataset.name or run_dir, or put the earlier data back",
    ):  # fmt: skip
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert Path(job.run_dir, "result.json").read_bytes() == before
    with caplog.at_level(logging.INFO, logger="sddlskd"):
        assert fit([job])[0] == json.loads(before)
    assert "is finished already" in caplog.text
    (renamed,) = fit([job_of(cars, *ALONE, "dataset.name=cars")])
    assert renamed["status"] == "FINISHED"


def test_an_interrupted_record_of_other_data_is_refused_and_goes_on_with_its_own(
    pets: Path,
) -> None:
    job = job_of(pets, *ALONE)
    fit([job])
    change_result(job, status="KILLED")
    path = pets / "train/cat/0.jpg"
    content = path.read_bytes()
    path.write_bytes(content + b"x")
    with pytest.raises(ValueError, match="other images, as many as then, of the same classes"):
        fit([job])
    assert result_of(job)["status"] == "FAILED"
    path.write_bytes(content)
    (result,) = fit([job])
    assert result["status"] == "FINISHED"


@pytest.mark.parametrize("status", ["FINISHED", "KILLED"])
def test_a_record_from_before_fingerprints_is_accepted(pets: Path, cars: Path, status: str) -> None:
    job = job_of(pets, *ALONE)
    fit([job])
    change_result(job, status=status, data=None)
    (result,) = fit([job_of(cars, *ALONE)])
    assert result["status"] == "FINISHED"


def test_a_finished_record_whose_data_are_gone_is_shown_with_a_warning(
    pets: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = job_of(pets, *ALONE)
    fit([job])
    shutil.rmtree(pets)
    assert fit([job])[0]["status"] == "FINISHED"
    assert "dataset=image_folder cannot be compared with earlier runs: there is no" in caplog.text


@pytest.mark.parametrize("load", [cifar10, fashion_mnist])
def test_nothing_is_downloaded_to_compare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: Callable[[str], Splits]
) -> None:
    monkeypatch.setattr("sddlskd.datasets.arrays.DEBIAN_FASHION_MNIST", tmp_path / "none")
    monkeypatch.setattr("sddlskd.datasets.places.download_into", lambda *_, **__: 1 / 0)
    with without_downloads(), pytest.raises(FileNotFoundError, match="there is no file"):
        load(str(tmp_path))
    with pytest.raises(ZeroDivisionError):
        load(str(tmp_path))


# Teachers


def test_a_teacher_of_other_classes_is_refused(pets: Path, cars: Path) -> None:
    fit([job_of(pets, *ALONE)])
    job = job_of(cars, "teacher=resnet8")
    with pytest.raises(ValueError, match="classes cat, dog then, bmw, vw now; file ") as caught:
        fit([job])
    assert "teacher=resnet8 was trained on other classes" in str(caught.value)
    assert "choose another dataset.name, or set teacher.checkpoint=FILE" in str(caught.value)
    assert not Path(job.run_dir).exists()


def test_a_teacher_of_other_images_is_named_and_measured_again(
    pets: Path, caplog: pytest.LogCaptureFixture
) -> None:
    alone = job_of(pets, *ALONE)
    fit([alone])
    fit([job_of(pets, "teacher=resnet8")])
    assert "learnt from other data" not in caplog.text
    add_image(pets)
    (result,) = fit([job_of(pets, "teacher=resnet8", "seed=1")])
    assert result["status"] == "FINISHED"
    says = "teacher=resnet8 learnt from other data (8 training images then, 9 now)"
    assert says in caplog.text
    path = path_of(alone.home, "image_folder", "resnet8")
    assert len(json.loads(path.with_name("resnet8.pt.top1.json").read_text())) == 2


def test_a_teacher_from_before_fingerprints_is_accepted(
    pets: Path, cars: Path, caplog: pytest.LogCaptureFixture
) -> None:
    alone = job_of(pets, *ALONE)
    fit([alone])
    path = path_of(alone.home, "image_folder", "resnet8")
    content = read(path)
    assert content.pop("data") == fingerprint(image_folder(str(pets)))
    write(path, content)
    (result,) = fit([job_of(cars, "teacher=resnet8")])
    assert result["status"] == "FINISHED"
    assert "learnt from other data" not in caplog.text


def test_each_data_set_has_its_own_cached_maps(tmp_path: Path) -> None:
    job = tiny(tmp_path, f"teacher.cache={tmp_path}/cache")
    data = build_data(job, CPU)
    for noted in (None, {"sha256": "a"}, {"sha256": "b"}, {"sha256": "b"}):
        network = build_network(job.teacher.model, 10, 0, CPU)
        build_teacher(job, network, data, CPU, lambda _: None, noted=noted)
    assert len(list((tmp_path / "cache").glob("*.maps"))) == 3


# Commands that measure


def test_evaluate_judges_a_run_on_another_folder(
    pets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = job_of(pets, *ALONE)
    fit([job])

    def told(*words: str) -> str:
        evaluate.main([job.run_dir, "--json", *words])
        out, err = capsys.readouterr()
        assert json.loads(out)["images"] == 6
        return err

    other = folder(tmp_path / "other", "cat", "dog", train=2, test=3)
    told(f"dataset.root={other}")
    renamed = folder(tmp_path / "renamed", "bird", "cat", test=3)
    for more in ((), (*SHAPE[:-6], "dataset.name=renamed")):
        said = told(f"dataset.root={renamed}", *more)
        assert "(classes dog then, bird now); the n-th class now stands for the n-th" in said
    third = folder(tmp_path / "third", "cat", "dog", "solo")
    for more in ((), ("dataset=image_folder", "dataset.size=32")):
        with pytest.raises(SystemExit, match="1"):
            evaluate.main([job.run_dir, f"dataset.root={third}", *more])
        assert capsys.readouterr().err.splitlines()[-1] == (
            f"error: {job.run_dir} tells 2 classes apart, but dataset.root={third} has 3 classes "
            "(only now: solo); give data with the classes of the training"
        )


def test_evaluate_and_verify_name_other_data(
    pets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = job_of(pets, *ALONE)
    fit([job])
    verify = ["verify", "resnet8", *SHAPE, f"home={job.home}", f"dataset.root={pets}"]

    def warnings() -> list[str]:
        capsys.readouterr()
        evaluate.main([job.run_dir])
        with pytest.raises(SystemExit) as caught:
            teachers.main(verify)
        assert caught.value.code == 0
        lines = capsys.readouterr().err.splitlines()
        return [line.partition(" ")[2] for line in lines if "other data" in line]

    assert warnings() == []
    add_image(pets)
    differs = "(8 training images then, 9 now)"
    assert warnings() == [
        f"{job.run_dir} was trained on other data than dataset=image_folder has now {differs}",
        f"resnet8 learnt from other data {differs}",
    ]
    rename_class(pets)
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        teachers.main(verify)
    assert caught.value.code == 1
    assert "classes dog then, wolf now" in capsys.readouterr().err


# Sweeps


def test_the_check_of_a_sweep_names_jobs_of_other_data(pets: Path, cars: Path) -> None:
    job, other = job_of(pets, *ALONE), job_of(cars, *ALONE)
    fit([job])
    assert precheck.report([], [job])["other_data"] == []
    ((index, change),) = precheck.report([], [other])["other_data"]
    assert (index, change.partition(";")[0]) == (0, "classes cat, dog then, bmw, vw now")
    change_result(job, status="KILLED")
    assert precheck.report([job], [])["problems"] == []
    ((_, reason),) = precheck.report([other], [])["problems"]
    assert "was trained on other data" in reason
    anew = job_of(cars, *ALONE, "sweep.rerun=all")
    assert precheck.report([anew], [])["problems"] == []
    ((_, reason),) = precheck.report([job_of(cars, "teacher=resnet8")], [])["problems"]
    assert "was trained on other classes" in reason


def test_a_sweep_warns_of_finished_jobs_of_other_data(
    pets: Path, cars: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fit([job_of(pets, *ALONE)])
    other = job_of(cars, *ALONE)
    plan = make_plan([other], "s", runner=Pool("auto", fail_fast=False), precheck=precheck.report)
    assert [job.run_dir for job, _ in plan.other_data] == [other.run_dir]
    run_sweep([other], "s", runner=pool(), precheck=precheck.report)
    assert "1 finished job learnt from other data than there is now" in caplog.text
    assert "classes cat, dog then, bmw, vw now" in caplog.text
