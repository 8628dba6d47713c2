"""Test the teacher's maps on disk.

The teacher must compute each view once, with the same numbers, for several processes and after a
crash. A cache that the disk cannot hold must be refused.
"""

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sddlskd import record
from sddlskd.data.device import DeviceData
from sddlskd.datasets.arrays import fake
from sddlskd.files import checkpoint
from sddlskd.models import create
from sddlskd.training.fit import fit
from sddlskd.training.teacher import Teacher
from sddlskd.training.teacher_cache import TeacherCache, cache_path
from tests.conftest import Compose

CPU = torch.device("cpu")


class Counting(Teacher):
    """A teacher that counts its calls."""

    asked = 0

    def __call__(self, images_BCHW: Tensor, views_B: Tensor | None = None) -> Tensor:
        type(self).asked += 1
        return super().__call__(images_BCHW)


@pytest.fixture
def teacher() -> Counting:
    torch.manual_seed(0)
    Counting.asked = 0
    return Counting(
        create("resnet8", 10), None, name="resnet8", device=CPU, precision="fp32", compile=False
    )


@pytest.fixture
def data() -> DeviceData:
    splits = fake(num_classes=10, train=40, test=10)
    stats = ([0.5] * 3, [0.25] * 3)
    return DeviceData(
        splits,
        num_classes=10,
        batch_size=16,
        seed=0,
        device=CPU,
        mean=stats[0],
        std=stats[1],
        padding=1,
    )


def open_cache(teacher: Teacher, folder: Path, data: DeviceData, dtype: str) -> TeacherCache:
    path = cache_path(folder, "abc", {"dtype": dtype})
    return TeacherCache(teacher, path, rows=40 * data.views, map_KHW=(10, 8, 8), dtype=dtype)


def test_views_name_what_is_seen(data: DeviceData) -> None:
    """Pixels must be equal if and only if the number of the view is equal."""
    assert data.views == 18
    seen: dict[int, Tensor] = {}
    for epoch in range(1, 12):
        for batch in data.batches(epoch):
            assert batch.views is not None
            assert torch.equal(batch.views // data.views, batch.index)
            for image, view in zip(batch.images, batch.views.tolist(), strict=True):
                assert torch.equal(seen.setdefault(view, image), image)
    assert len({image.numpy().tobytes() for image in seen.values()}) == len(seen)
    assert 40 * 18 > len(seen) > 200


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_second_pass_never_asks(
    teacher: Counting, data: DeviceData, tmp_path: Path, dtype: str
) -> None:
    cache = open_cache(teacher, tmp_path, data, dtype)
    first = [cache(batch.images, batch.views) for batch in data.batches(1)]
    asked = teacher.asked
    again = open_cache(teacher, tmp_path, data, dtype)
    for batch, before in zip(data.batches(1), first, strict=True):
        stored = again(batch.images, batch.views)
        plain = Teacher.__call__(teacher, batch.images)
        assert torch.equal(stored, before)
        if dtype == "float32":
            assert torch.equal(stored, plain)
        else:
            # 2^-14 is the smallest normal number of float16.
            rounding = ((stored - plain).abs() / plain.abs().clamp_min(2**-14)).max().item()
            assert 0 < rounding <= 2**-11
    assert teacher.asked == asked == 3


def test_a_map_that_a_crash_has_lost_is_asked_again(
    teacher: Counting, data: DeviceData, tmp_path: Path
) -> None:
    cache = open_cache(teacher, tmp_path, data, "float32")
    batch = next(iter(data.batches(1)))
    images, views = batch.images, batch.views
    assert views is not None
    before = cache(images, views)
    # Two maps never reached the disk, but their checksums did. A third map is damaged.
    cache._maps[views[:2].numpy()] = 0
    cache._maps[int(views[2]), 0, 0, 0] += 1
    again = open_cache(teacher, tmp_path, data, "float32")
    assert torch.equal(again(images, views), before)
    assert teacher.asked == 2
    assert torch.equal(open_cache(teacher, tmp_path, data, "float32")(images, views), before)
    assert teacher.asked == 2


def test_two_caches_fill_one_file(teacher: Counting, data: DeviceData, tmp_path: Path) -> None:
    one, other = (open_cache(teacher, tmp_path, data, "float32") for _ in range(2))
    for epoch, cache in ((1, one), (2, other), (3, one)):
        for batch in data.batches(epoch):
            cache(batch.images, batch.views)
    asked = teacher.asked
    for epoch, cache in ((1, other), (2, one), (3, other)):
        for batch in data.batches(epoch):
            stored = cache(batch.images, batch.views)
            assert torch.equal(stored, Teacher.__call__(teacher, batch.images))
    assert teacher.asked == asked


def test_a_disk_that_is_too_small(
    teacher: Counting, data: DeviceData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    with pytest.raises(
        ValueError,
        match=r"needs 0\.0 GB when full \(720 views of 2560 bytes\).*are free.*cache_dtype",
    ):
        open_cache(teacher, tmp_path, data, "float32")
    assert not list(tmp_path.glob("*.maps"))


def test_training_with_a_cache(compose: Compose, tmp_path: Path) -> None:
    torch.manual_seed(0)
    checkpoint.write(
        tmp_path / "teachers/digits/resnet8.pt", {"model": create("resnet8", 10).state_dict()}
    )
    common = [
        "dataset=digits",
        "teacher=resnet8",
        "student=resnet8",
        "trainer=debug",
        "trainer.max_steps=4",
    ]
    common += ["tracking=none", "trainer.progress=off"]
    kept = f"teacher.cache={tmp_path}/maps"

    def weights(*overrides: str) -> tuple[str, dict[str, Tensor]]:
        job = compose(*common, *overrides)
        (result,) = fit([job])
        return result["config_hash"], checkpoint.read(Path(job.run_dir, "last.ckpt"))["model"]

    plain_hash, plain = weights()
    exact_hash, exact = weights(kept, "teacher.cache_dtype=float32", f"run_dir={tmp_path}/exact")
    rounded_hash, _ = weights(kept, f"run_dir={tmp_path}/rounded")
    assert exact_hash == plain_hash != rounded_hash
    assert all(torch.equal(exact[key], plain[key]) for key in plain)
    weights(kept, "trainer.tf32=false", "trainer.max_steps=1", f"run_dir={tmp_path}/full")
    assert len(list((tmp_path / "maps").glob("*.maps"))) == 3
    assert record.read_result(tmp_path / "rounded")["status"] == "FINISHED"
