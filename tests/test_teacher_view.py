"""Teachers that see the images without the student's augmentation."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sddlskd import config as cfg
from sddlskd.config import Config
from sddlskd.data.decoding import ImageTransform, Job, decode
from sddlskd.data.device import DeviceData
from sddlskd.data.streaming import StreamedData
from sddlskd.datasets import image_folder
from sddlskd.datasets.arrays import Images, fake
from sddlskd.sweeps.precheck import problems
from sddlskd.training.checks import check_objective
from sddlskd.training.fit import fit
from sddlskd.training.inputs import ask
from sddlskd.training.teacher import Teacher
from tests.conftest import Compose
from tests.photographs import class_folders
from tests.stopping import stopped_at
from tests.tiny import final, same, same_outcome, tiny

CPU = torch.device("cpu")
PLAIN = "teacher.view=plain"
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]


# Batches


def in_memory(**changes: Any) -> DeviceData:
    options: dict[str, Any] = {
        "num_classes": 10, "batch_size": 16, "seed": 0, "device": CPU, "mean": MEAN, "std": STD,
        "plain": True,
    }  # fmt: skip
    return DeviceData(fake(num_classes=10, train=40, test=10, size=12), **(options | changes))


@pytest.mark.parametrize(
    "changes", [{}, {"padding": 0}, {"flip": False}, {"strong": True}], ids=str
)
def test_the_plain_view_is_the_image_itself(changes: dict[str, Any]) -> None:
    train = fake(num_classes=10, train=40, test=10, size=12).train
    assert isinstance(train, Images)
    data, without = in_memory(**changes), in_memory(**changes, plain=False)
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    for batch, other in zip(data.batches(2, 1), without.batches(2, 1), strict=True):
        assert batch.plain is not None
        pixels_BHWC = train.images_NHWC[batch.index] / 255
        wanted_BCHW = ((pixels_BHWC - mean) / std).permute(0, 3, 1, 2)
        torch.testing.assert_close(batch.plain, wanted_BCHW, rtol=0, atol=1e-6)
        assert batch.plain.is_contiguous(memory_format=torch.channels_last)
        assert other.plain is None
        assert same(batch._replace(plain=None)._asdict(), other._asdict())


def test_ranks_share_the_plain_views() -> None:
    shares = [in_memory(rank=rank, ranks=2).batches(1) for rank in (0, 1)]
    for whole, *parts in zip(in_memory().batches(1), *shares, strict=True):
        assert torch.equal(whole.plain, torch.cat([part.plain for part in parts]))


def streamed(folder: Path, **changes: Any) -> StreamedData:
    options: dict[str, Any] = {
        "num_classes": 2, "batch_size": 10, "seed": 0, "device": CPU, "mean": MEAN, "std": STD,
        "view": ImageTransform(16), "workers": 0, "bad": "skip", "plain": True,
    }  # fmt: skip
    return StreamedData(image_folder(str(folder)), **(options | changes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of 28 training images, of which one is damaged."""
    folder = class_folders(tmp_path_factory.mktemp("view"), 2, 14)
    (folder / "train/class_0/0003.jpg").write_bytes(b"no image")
    return folder


@pytest.mark.parametrize("strong", [False, True])
def test_the_plain_view_of_a_file_is_the_centre_crop(folder: Path, strong: bool) -> None:
    data, without = (streamed(folder, strong=strong, plain=plain) for plain in (True, False))
    paths = image_folder(str(folder)).train.paths  # type: ignore[union-attr]
    replaced = 0
    for batch, other in zip(data.batches(1), without.batches(1), strict=True):
        index = batch.index.tolist()
        crops = [decode(Job(paths[n], None), ImageTransform(16))[0] for n in index]
        assert batch.plain is not None
        assert torch.equal(batch.plain, data._normalise(torch.stack(crops)))
        assert same(batch._replace(plain=None)._asdict(), other._asdict())
        assert 3 not in index
        replaced += index.count(4)
    assert replaced == 2


# Jobs


def test_the_view_of_the_teacher_is_part_of_the_job_and_of_its_group(tmp_path: Path) -> None:
    usual, stated, plain = (
        tiny(tmp_path, *words, teacher=False) for words in ([], ["teacher.view=augmented"], [PLAIN])
    )
    assert cfg.config_hash(usual) == cfg.config_hash(stated) != cfg.config_hash(plain)
    assert cfg.sharing_key(usual) == cfg.sharing_key(stated) != cfg.sharing_key(plain)
    alone, same_alone = (
        tiny(tmp_path, "recipe=vanilla", *words, teacher=False) for words in ([], [PLAIN])
    )
    assert cfg.config_hash(alone) == cfg.config_hash(same_alone)


def test_feature_methods_are_refused(compose: Compose) -> None:
    with pytest.raises(ValueError, match=r"^features=\[at\] compares .* set teacher.view=aug"):
        compose("features=at", PLAIN)


def test_regions_of_two_views_are_warned_of(
    compose: Compose, caplog: pytest.LogCaptureFixture
) -> None:
    for words in ([PLAIN, "M=[1]"], ["M=[1,2]"]):
        check_objective(compose("recipe=kd", *words), CPU)
    assert caplog.messages == []
    check_objective(compose("recipe=kd", "M=[1,2]", PLAIN), CPU)
    (warning,) = caplog.messages
    assert "M=[1] compares whole images" in warning


# Training


def test_a_teacher_sees_the_plain_view_and_the_student_the_augmented_one() -> None:
    class Shows:
        """A teacher that returns its images as a logit map."""

        def __call__(self, images_BCHW: Tensor, rows_B: Tensor) -> Tensor:
            self.rows_B = rows_B
            return images_BCHW

    teacher: Any = Shows()
    for data in (in_memory(), in_memory(plain=False)):
        batch = next(data.batches(1))
        seen = ask(teacher, batch, []).logit_map
        if batch.plain is None:
            assert torch.equal(seen, batch.images)
            assert teacher.rows_B is batch.views
        else:
            assert torch.equal(seen, batch.plain)
            assert not torch.equal(seen, batch.images)
            assert teacher.rows_B is batch.index


def test_without_augmentation_both_views_train_alike(tmp_path: Path) -> None:
    still = ["trainer.epochs=1", "M=[1]", "dataset.padding=0", "dataset.flip=false"]
    jobs = [tiny(tmp_path, *still), tiny(tmp_path, *still, PLAIN)]
    augmented = [tiny(tmp_path, "trainer.epochs=1", "M=[1]", *words) for words in ([], [PLAIN])]
    for job in (*jobs, *augmented):
        fit([job])
    assert same_outcome(*jobs)
    assert not same(*(final(job)["model"] for job in augmented))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collect the number of images of each forward pass of a teacher."""
    seen: list[int] = []
    real = Teacher.__call__

    def counted(self: Teacher, images: Tensor, views: Tensor | None = None) -> Tensor:
        seen.append(len(images))
        return real(self, images, views)

    monkeypatch.setattr(Teacher, "__call__", counted)
    return seen


def cached(folder: Path) -> list[str]:
    return [f"teacher.cache={folder}", "teacher.cache_dtype=float32"]


def test_a_cache_has_one_map_an_image(tmp_path: Path, asked: list[int]) -> None:
    short = ["trainer.epochs=1", "M=[1]", "dataset.load.test=60"]
    words = [*short, PLAIN]
    uncached = tiny(tmp_path / "uncached", *words)
    fit([uncached])
    filling, filled = (
        tiny(tmp_path / at, *words, *cached(tmp_path / "maps")) for at in ("filling", "filled")
    )
    fit([filling])
    fit([tiny(tmp_path / "other", *short, *cached(tmp_path / "maps"))])
    asked.clear()
    fit([filled])
    assert 64 not in asked  # no training batch, but the test images to measure the teacher
    assert same_outcome(uncached, filling)
    assert same_outcome(uncached, filled)
    sizes = sorted(path.stat().st_size for path in (tmp_path / "maps").glob("*.maps"))
    # 192 images with logit maps of 4x4 cells, and 162 augmented views of each.
    assert sizes == [192 * 10 * 16 * 4, 162 * 192 * 10 * 16 * 4]


Jobs = Callable[..., Config]


@pytest.fixture
def of_files(compose: Compose, tmp_path: Path) -> Jobs:
    """Return a function that composes jobs of 2 epochs on 24 image files, in batches of 8."""
    root = class_folders(tmp_path / "folder", 3, 8, test=3)

    def job(home: str, *overrides: str) -> Config:
        return compose(
            "dataset=image_folder", f"dataset.root={root}", "dataset.size=16", "dataset.workers=0",
            "teacher=resnet8", "student=resnet8", "tracking=none", "trainer=cpu", "M=[1]",
            "dataset.batch_size=8", "trainer.epochs=2", "trainer.progress=off",
            "teacher.train_if_missing=true", "teacher.train_epochs=1", f"home={tmp_path / home}",
            *overrides,
        )  # fmt: skip

    return job


def test_streamed_images_can_be_cached(of_files: Jobs, tmp_path: Path, asked: list[int]) -> None:
    uncached = of_files("one", PLAIN)
    fit([uncached])
    maps = cached(tmp_path / "maps")
    filling, filled = (of_files("one", PLAIN, *maps, f"run_dir={tmp_path}/{n}") for n in (1, 2))
    assert problems([filling]) == []
    fit([filling])
    asked.clear()
    fit([filled])
    assert 8 not in asked  # no training batch
    assert same_outcome(uncached, filling)
    assert same_outcome(uncached, filled)
    ((_, reason),) = problems([of_files("one", *maps)])
    assert reason.endswith("set teacher.cache=null, or teacher.view=plain")


def test_a_group_equals_its_runs_alone_and_a_stopped_run_continues(tmp_path: Path) -> None:
    ways = [["recipe=kd", "M=[1]", PLAIN], ["recipe=sd_kd_ls", "M=[1,2]", PLAIN]]
    together, alone = (
        [tiny(tmp_path / at, "dataset.views=weak_strong", *way) for way in ways]
        for at in ("together", "alone")
    )
    fit(together)
    for a, b in zip(together, alone, strict=True):
        with stopped_at(2, 2):
            assert [result["status"] for result in fit([b])] == ["KILLED"]
        fit([b])
        assert same_outcome(a, b)


@pytest.mark.parametrize("kept", [False, True], ids=["asked", "cached"])
def test_captured_steps_give_the_same_numbers(tmp_path: Path, kept: bool) -> None:
    words = ["dataset.load.train=176", "trainer.epochs=3", "M=[1]", PLAIN]
    jobs = []
    for way in ("off", "on"):
        maps = cached(tmp_path / way / "maps") if kept else []
        jobs.append(tiny(tmp_path / way, *words, *maps, f"trainer.capture={way}"))
        fit([jobs[-1]])
    assert same_outcome(*jobs)


def test_several_teachers_see_the_plain_view(compose: Compose) -> None:
    job = compose("teacher=[resnet8,resnet14]", PLAIN)
    assert [one.teacher.view for one in cfg.each_teacher(job)] == ["plain", "plain"]
