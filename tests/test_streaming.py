"""Test batches that are streamed from image files.

The bits must not depend on workers, batch size or ranks. Bad files must be named and treated as the
settings say. The last tests train whole jobs.
"""

import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.errors import InstantiationException
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import horizontal_flip, resized_crop

from sddlskd import config as cfg
from sddlskd.data.decoding import CHUNK, ImageTransform, random_crop
from sddlskd.data.device import DeviceData
from sddlskd.data.streaming import StreamedData
from sddlskd.datasets.arrays import Files, Splits, fake
from sddlskd.datasets.folders import image_folder, left_out
from sddlskd.models import create
from sddlskd.sweeps.precheck import problems
from sddlskd.training.build import build_data
from sddlskd.training.evaluation import evaluate
from sddlskd.training.fit import fit
from sddlskd.training.measure import measure
from sddlskd.training.ranks import Ranks
from tests.conftest import Compose
from tests.photographs import class_folders, photograph
from tests.test_decoding import alive, children, gone
from tests.tiny import same, same_outcome

SIZE, MEAN, STD = 24, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
# Images of each of the 3 classes; their number is no multiple of a batch or a chunk.
EACH = 19
assert CHUNK < 20  # otherwise no batch would be divided into chunks
Batches = list[tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of 57 training and 9 test images of 3 classes; no test may change it."""
    return class_folders(tmp_path_factory.mktemp("folder"), 3, EACH, test=3)


@pytest.fixture
def own_folder(folder: Path, tmp_path: Path) -> Path:
    """Return a copy of `folder` that a test may change."""
    return Path(shutil.copytree(folder, tmp_path / "folder"))


def streamed(root: Path, **changes: Any) -> StreamedData:
    options: dict[str, Any] = {
        "num_classes": 3, "batch_size": 20, "seed": 5, "device": "cpu", "mean": MEAN, "std": STD,
        "view": ImageTransform(SIZE), "eval_batch_size": 7, "workers": 0,
    }  # fmt: skip
    return StreamedData(image_folder(str(root)), **(options | changes))


def equal(a: Batches, b: Batches) -> bool:
    return same(a, b)


# Folders of class folders


def test_a_folder_of_class_folders(folder: Path) -> None:
    splits = image_folder(str(folder))
    assert isinstance(splits.train, Files)
    assert splits.train.labels_N.tolist() == [0] * EACH + [1] * EACH + [2] * EACH
    assert splits.test.labels_N.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert splits.train.paths[EACH] == str(folder / "train/class_1/0000.jpg")
    assert all(os.path.isabs(path) for path in splits.train.paths)


def test_what_counts_as_an_image_of_a_folder(own_folder: Path) -> None:
    classes = own_folder / "train"
    assert left_out(image_folder(str(own_folder)).train) == {}
    for name in ("A.JPEG", "b.PnG", "notes.txt", "._0000.jpg", ".DS_Store", "0000.jpg.part"):
        (classes / "class_0" / name).touch()
    (classes / ".cache").mkdir()
    (classes / "list.txt").touch()
    elsewhere = own_folder / "elsewhere"
    (classes / "class_1").rename(elsewhere)
    (classes / "class_1").symlink_to(elsewhere)
    train = image_folder(str(own_folder)).train
    assert isinstance(train, Files)
    assert {Path(path).name for path in train.paths[: EACH + 2]} >= {"A.JPEG", "b.PnG"}
    assert torch.bincount(train.labels_N).tolist() == [EACH + 2, EACH, EACH]
    assert left_out(train) == {".txt": 2, ".part": 1}


def test_the_test_folder_may_have_another_name(own_folder: Path) -> None:
    shutil.copytree(own_folder / "val", own_folder / "test")
    with pytest.raises(ValueError, match="has both val and test; say which one to test on"):
        image_folder(str(own_folder))
    assert len(image_folder(str(own_folder), test="val").test.labels_N) == 9
    shutil.rmtree(own_folder / "val")
    assert len(image_folder(str(own_folder)).test.labels_N) == 9


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda root: shutil.rmtree(root),
            "there is no folder .*/folder/train; it should hold a folder of images for each class "
            r"\(split train of dataset.root=.*/folder\)$",
        ),
        (
            lambda root: shutil.rmtree(root / "val"),
            "^dataset.root=.*/folder has no folder val or test; images to test on are always "
            "needed, also with dataset.val_fraction: move some of each class from train/<class> to "
            "val/<class> ",
        ),
        (
            lambda root: shutil.rmtree(root / "val/class_1"),
            "^dataset.root=.*/folder: class class_1 is in train, but not in val; both need",
        ),
        (
            lambda root: (root / "val/class_1").rename(root / "val/class_9"),
            "class class_1 is in train, but not in val, and class class_9 is in val, but not in "
            "train; both",
        ),
        (
            lambda root: [shutil.rmtree(root / f"val/class_{n}") for n in (0, 1)],
            r"2 classes are in train, but not in val \(class_0, class_1\); both",
        ),
        (
            lambda root: [p.unlink() for p in (root / "train/class_2").iterdir()],
            r"train/class_2 holds no images \(.jpg.* \(split train of dataset.root=.*/folder\)$",
        ),
        (
            lambda root: [shutil.rmtree(p) for p in (root / "val").iterdir()],
            r"/val holds no folders; .* \(split val of dataset.root=.*/folder\)$",
        ),
    ],
)
def test_a_folder_that_is_not_as_it_should_be(
    own_folder: Path, spoil: Callable[[Path], object], message: str
) -> None:
    spoil(own_folder)
    with pytest.raises(ValueError, match=message) as raised:
        image_folder(str(own_folder))
    assert "\n" not in str(raised.value)


def test_a_missing_test_folder_that_is_named_is_told_with_its_key(own_folder: Path) -> None:
    named = r"\(split dev, which dataset.load.test names, of dataset.root=.*/folder\)$"
    (own_folder / "dev").mkdir()
    with pytest.raises(ValueError, match=f"folder/dev holds no folders; .* {named}"):
        image_folder(str(own_folder), test="dev")


# Batches


def test_a_training_batch_is_torchvisions_by_hand(folder: Path) -> None:
    """Compare each image with torchvision's crop of the PIL image, mirrored or not.

    Pixels may differ by two levels of 255, because Pillow rounds in between. About half of the
    images must be mirrored.
    """
    data, paths = streamed(folder), image_folder(str(folder)).train
    assert isinstance(paths, Files)
    shown, mirrored = [], 0
    for x_BCHW, labels_B, index_B, views_B, *_ in data.batches(2):
        assert views_B is None
        for x_CHW, label, n in zip(x_BCHW, labels_B.tolist(), index_B.tolist(), strict=True):
            image = Image.open(paths.paths[n])
            left, top, width, height = random_crop(
                random.Random(f"seed 5 epoch 2 image {n}"), *image.size, (0.08, 1.0)
            )
            crop = resized_crop(image, top, left, height, width, [SIZE, SIZE])
            finish = v2.Compose(
                [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
            )
            apart = [(finish(c) - x_CHW).abs().max() for c in (crop, horizontal_flip(crop))]
            assert min(apart) < 2.01 / 255 / min(STD)
            mirrored += apart[1] < apart[0]
            assert label == paths.labels_N[n]
            shown.append(n)
        assert x_BCHW.is_contiguous(memory_format=torch.channels_last)
    assert sorted(shown) == list(range(57))
    assert shown != sorted(shown)
    assert 15 < mirrored < 42


def test_a_test_batch_is_torchvisions(folder: Path) -> None:
    data, paths = streamed(folder), image_folder(str(folder)).test
    assert isinstance(paths, Files)
    transform = v2.Compose([v2.Resize(round(SIZE / 0.875)), v2.CenterCrop(SIZE), v2.ToImage(),
                            v2.ToDtype(torch.float32, scale=True),
                            v2.Normalize(MEAN, STD)])  # fmt: skip
    theirs = torch.stack([transform(Image.open(path)) for path in paths.paths])
    for batches in (list(data.test_batches()), list(data.val_batches())):
        assert [len(y) for _, y in batches] == [7, 2]
        assert torch.cat([y for _, y in batches]).tolist() == paths.labels_N.tolist()
        assert (torch.cat([x for x, _ in batches]) - theirs).abs().max() < 2.01 / 255 / min(STD)
    images_NHWC = data.test_images([8, 0])
    shown = ((images_NHWC[0] / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).permute(2, 0, 1)
    assert torch.allclose(shown, batches[1][0][1], atol=1e-5)


def test_sizes_and_shapes(folder: Path) -> None:
    data = streamed(folder, val_fraction=0.2)
    assert (data.train_size, data.val_size, data.test_size, data.image_shape) == (
        45,
        12,
        9,
        (3, SIZE, SIZE),
    )
    assert data.steps_per_epoch == 3
    assert [len(batch.labels) for batch in data.batches(1)] == [20, 20, 5]
    assert torch.bincount(torch.cat([y for _, y in data.val_batches()])).tolist() == [4, 4, 4]
    in_memory = DeviceData(
        fake(3, 8, 57, 9), num_classes=3, batch_size=20, seed=5, device="cpu", mean=MEAN, std=STD
    )
    # Both can start at any batch.
    for order in (data.batches, in_memory.batches):
        assert len(list(order(1, 2))) == 1
        assert list(order(1, 3)) == []
    for start in (-1, 4):
        with pytest.raises(ValueError, match=rf"start is {start}; give 0..3"):
            data.batches(1, start)


def test_held_out_images_are_those_of_the_memory_data_set(folder: Path) -> None:
    data = streamed(
        folder, val_fraction=0.2, flip=False, view=ImageTransform(SIZE, area=(1.0, 1.0))
    )
    again = streamed(folder, val_fraction=0.2, seed=99)
    assert equal(list(data.val_batches()), list(again.val_batches()))
    assert not equal(list(data.batches(1)), list(again.batches(1)))


def test_a_part_of_the_images_is_that_of_the_memory_data_set(folder: Path) -> None:
    data = streamed(folder, val_fraction=0.2, train_fraction=0.4, batch_size=6)
    whole = streamed(folder, val_fraction=0.2)
    assert (data.train_size, data.val_size) == (18, 12)
    assert (
        torch.bincount(torch.cat([batch.labels for batch in data.batches(1)])).tolist() == [6] * 3
    )
    assert equal(list(data.val_batches()), list(whole.val_batches()))


@pytest.mark.parametrize("workers", [1, 3])
def test_neither_workers_nor_batch_sizes_change_a_bit(folder: Path, workers: int) -> None:
    alone = streamed(folder)
    epochs = [[*alone.batches(epoch), *alone.val_batches()] for epoch in (1, 2)]
    data = streamed(folder, workers=workers)
    assert [
        same([*data.batches(epoch), *data.val_batches()], epochs[epoch - 1]) for epoch in (1, 2)
    ] == [True, True]
    other = streamed(folder, workers=workers, batch_size=7, eval_batch_size=100)
    x_NCHW = torch.cat([batch[0] for batch in epochs[1][:3]])
    assert torch.equal(torch.cat([batch.images for batch in other.batches(2)]), x_NCHW)
    assert not torch.equal(torch.cat([batch.images for batch in other.batches(1)]), x_NCHW)


def test_a_resumed_epoch_is_the_rest_of_an_uninterrupted_one(folder: Path) -> None:
    whole = list(streamed(folder, workers=1).batches(4))
    for start in range(4):
        data = streamed(folder, workers=1)
        assert equal(list(data.batches(4, start)), whole[start:])
        data.close()


def test_the_last_smaller_batch_can_be_left_out(folder: Path) -> None:
    data = streamed(folder, drop_last=True)  # 57 images in batches of 20
    assert data.steps_per_epoch == 2
    kept = streamed(folder)
    for epoch in (1, 2):
        assert equal(list(data.batches(epoch)), list(kept.batches(epoch))[:2])
        assert equal(list(data.val_batches()), list(kept.val_batches()))
    assert equal(list(data.batches(2, 1)), list(kept.batches(2))[1:2])
    data.close()
    kept.close()


def test_resuming_decodes_nothing_of_what_is_done(own_folder: Path) -> None:
    data = streamed(own_folder)
    paths = image_folder(str(own_folder)).train
    assert isinstance(paths, Files)
    done = next(streamed(own_folder).batches(1)).index
    for n in done.tolist():
        Path(paths.paths[n]).unlink()
    assert len(list(data.batches(1, 1))) == 2
    with pytest.raises(
        ValueError,
        match=r"\.jpg: No such file or directory; repair or remove it, or set dataset.bad_im",
    ):
        next(data.batches(1))


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_ranks_shares_are_the_whole(folder: Path, ranks: int) -> None:
    whole = streamed(folder)
    parts = [streamed(folder, rank=rank, ranks=ranks) for rank in range(ranks)]
    for batch, shares in zip(
        whole.batches(3), zip(*(part.batches(3) for part in parts), strict=True), strict=True
    ):
        joined = [torch.cat(tensors) for tensors in zip(*(s[:3] for s in shares), strict=True)]
        assert same(joined, list(batch[:3]))
    val = [torch.cat(tensors) for tensors in zip(*whole.val_batches(), strict=True)]
    shares = [
        torch.cat(tensors)
        for tensors in zip(*(b for part in parts for b in part.val_batches()), strict=True)
    ]
    assert same(shares, val)
    assert all(equal(list(part.test_batches()), list(whole.test_batches())) for part in parts)


def test_what_is_asked_for_unexpectedly_comes_all_the_same(folder: Path) -> None:
    """The workers decode in advance what usually comes next.

    They do not expect an epoch that is left early, an evaluation in between, or two iterators at
    once.
    """
    data, alone = streamed(folder, workers=2), streamed(folder)
    first, test = next(data.batches(1)), next(data.test_batches())
    assert same([first, test], [next(alone.batches(1)), next(alone.test_batches())])
    assert equal(list(data.batches(7)), list(alone.batches(7)))
    at_once = list(zip(data.batches(1), data.batches(2), strict=True))
    assert equal([a for a, _ in at_once], list(alone.batches(1)))
    assert equal([b for _, b in at_once], list(alone.batches(2)))
    assert equal(list(data.val_batches()), list(alone.val_batches()))
    assert equal(list(data.batches(2)), list(alone.batches(2)))


def test_the_next_epoch_is_under_way_before_the_last_batch_is_taken(folder: Path) -> None:
    data = streamed(folder, workers=1, batch_size=16, eval_batch_size=16)
    for _ in data.batches(1):
        pass
    assert {place.split for place, _ in data._plan.sent} == {"val", "train"}
    for _ in data.val_batches():
        pass
    assert [place.epoch for place, _ in data._plan.sent if place.split == "train"][:1] == [2]


# Bad and unusual files


def spoil(root: Path, names: list[str]) -> None:
    for name in names:
        (root / name).write_bytes(b"no image")


def test_a_bad_image_stops_by_its_name_and_only_when_its_batch_comes(own_folder: Path) -> None:
    data, paths = streamed(own_folder, workers=1), image_folder(str(own_folder)).train
    assert isinstance(paths, Files)
    bad = paths.paths[list(streamed(own_folder).batches(1))[1].index[3]]
    spoil(Path("/"), [bad])
    batches = data.batches(1)
    next(batches)
    with pytest.raises(
        ValueError,
        match=rf"^{bad}: cannot identify image file; repair or remove",
    ) as e:
        next(batches)
    assert "\n" not in str(e.value)


def test_workers_end_where_a_bad_image_stops_the_reading(own_folder: Path) -> None:
    before = children()
    spoil(own_folder, ["val/class_1/0001.jpg"])
    data = streamed(own_folder, workers=2)
    with pytest.raises(ValueError, match="repair or remove") as held:
        list(data.val_batches())
    assert held.value.__traceback__ is not None
    assert gone(children() - before)
    data.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_skipped_training_image_is_replaced_by_the_next(
    own_folder: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The outcome must be as if each bad file were a copy of the next good file, with its label.

    This must hold in every epoch, also in a resumed one.
    """
    untouched = own_folder.with_name("untouched")
    shutil.copytree(own_folder, untouched)
    bad = ["train/class_0/0018.jpg", "train/class_1/0000.jpg", "train/class_2/0018.jpg"]
    spoil(own_folder, bad)
    # After the last image comes the first.
    good = ["train/class_1/0001.jpg", "train/class_1/0001.jpg", "train/class_0/0000.jpg"]
    for name, by in zip(bad, good, strict=True):
        shutil.copy(untouched / by, untouched / name)
    data, expected = streamed(own_folder, workers=workers, bad="skip"), streamed(untouched)
    train = image_folder(str(own_folder)).train
    assert isinstance(train, Files)
    labels = train.labels_N.clone()
    labels[[18, 56]] = torch.tensor([1, 0])
    with caplog.at_level(logging.INFO, "sddlskd"):
        for epoch in (1, 2):
            ours, theirs = list(data.batches(epoch)), list(expected.batches(epoch))
            assert same([batch.images for batch in ours], [batch.images for batch in theirs])
            labels_N = torch.cat([batch.labels for batch in ours])
            assert torch.equal(labels_N, labels[torch.cat([batch.index for batch in theirs])])
            index_N = torch.cat([batch.index for batch in ours])
            assert torch.equal(labels_N, train.labels_N[index_N])
            assert not {18, 19, 56} & set(index_N.tolist())
    told = [record.getMessage() for record in caplog.records]
    assert equal(list(streamed(own_folder, bad="skip").batches(2, 1)), ours[1:])
    assert sum("(dataset.bad_images=skip)" in line for line in told) == 3
    assert all(
        any(f"{own_folder}/{name}: cannot identify" in line for line in told) for name in bad
    )
    assert [line for line in told if "so far" in line] == [
        "images so far: 3 unreadable; 3 are left out"
    ]


def test_a_skipped_test_image_is_left_out(own_folder: Path) -> None:
    before = list(streamed(own_folder, eval_batch_size=3).test_batches())
    spoil(own_folder, ["val/class_0/0001.jpg", *(f"val/class_1/{n:04}.jpg" for n in range(3))])
    data = streamed(own_folder, eval_batch_size=3, bad="skip", workers=1)
    batches = list(data.test_batches())
    # A batch without any image is left out.
    assert [y.tolist() for _, y in batches] == [[0, 0], [2, 2, 2]]
    assert torch.equal(batches[0][0], before[0][0][[0, 2]])
    assert torch.equal(batches[1][0], before[2][0])
    shown = torch.cat([x for x, _ in batches])[2]
    pixels = ((data.test_images([2])[0] / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).permute(
        2, 0, 1
    )
    assert torch.allclose(shown, pixels, atol=1e-5)


def test_where_nothing_can_be_read_that_is_said(own_folder: Path) -> None:
    spoil(own_folder, [str(path.relative_to(own_folder)) for path in own_folder.rglob("*.jpg")])
    data = streamed(own_folder, bad="skip")
    with pytest.raises(ValueError, match=r"\.jpg and the \d+ images after it cannot be used"):
        next(data.batches(1))
    with pytest.raises(ValueError, match="none of 9 images of the test split, such as /"):
        list(data.test_batches())


def test_a_rank_whose_share_of_val_cannot_be_read_goes_on(own_folder: Path) -> None:
    # These are all images of the first of three ranks.
    spoil(own_folder, [f"val/class_0/{n:04}.jpg" for n in range(3)])
    assert list(streamed(own_folder, bad="skip", rank=0, ranks=3).val_batches()) == []
    whole = [
        list(streamed(own_folder, bad="skip", rank=rank, ranks=3).val_batches()) for rank in (1, 2)
    ]
    assert [y.tolist() for batches in whole for _, y in batches] == [[1, 1, 1], [2, 2, 2]]

    class Gathered(Ranks):
        """The first of several ranks, whose other ranks always contribute the same values."""

        def all_gather(self, values: Tensor) -> Tensor:
            assert values.tolist() == [0, 0, 0, 0]
            return torch.stack([values, values.new_tensor([1, 2, 3, 4])])

    nothing = streamed(own_folder, bad="skip", rank=0, ranks=3)
    found = evaluate(create("resnet8", 3), nothing.val_batches(), ranks=Gathered(world_size=2))
    assert found == {"top1": 25, "top5": 50, "loss": 0.75}
    with pytest.raises(ValueError, match="none of the images can be used"):
        evaluate(create("resnet8", 3), nothing.val_batches(), ranks=Ranks())


def test_irregular_images_are_converted_skipped_or_refused(
    own_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    photograph(0, 40, 40).convert("L").save(own_folder / "train/class_0/0003.jpg")
    photograph(0, 40, 40).convert("CMYK").save(own_folder / "train/class_2/0003.jpg")
    with caplog.at_level(logging.INFO, "sddlskd"):
        converted = torch.cat([batch.labels for batch in streamed(own_folder).batches(1)])
    assert torch.bincount(converted).tolist() == [EACH] * 3
    told = [record.getMessage() for record in caplog.records]
    grey = f"{own_folder}/train/class_0/0003.jpg: grey (dataset.irregular_images=convert)"
    assert f"{grey}; more of these are counted, not named" in told
    assert sorted(told[-1].removeprefix("images so far: ").split("; ")[0].split(", ")) == [
        "1 CMYK",
        "1 grey",
    ]
    skipped = torch.cat(
        [batch.labels for batch in streamed(own_folder, irregular="skip", workers=1).batches(1)]
    )
    assert torch.bincount(skipped).tolist() == [EACH] * 3
    with pytest.raises(
        ValueError,
        match=r"000\d.jpg: (grey|CMYK); convert it, or set dataset.irregular_images=convert",
    ):
        list(streamed(own_folder, irregular="fail").batches(1))


def test_of_very_many_bad_files_the_log_names_the_first(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class_folders(tmp_path, 1, 30, width=20, height=20)
    for path in sorted((tmp_path / "train/class_0").iterdir())[5:]:
        path.write_bytes(b"")
    data = streamed(tmp_path, num_classes=1, bad="skip")
    assert [len(batch.labels) for batch in data.batches(1)] == [20, 10]
    named = [r.getMessage() for r in caplog.records if "the file is empty" in r.getMessage()]
    assert len(named) == 20
    assert named[-1].endswith("; more of these are counted, not named")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": 2}, r"train label 2 at index 38 is outside 0..1"),
        ({"batch_size": 58}, r"batch_size is 58; give 1..57"),
        ({"batch_size": 0}, r"batch_size is 0; give 1..57"),
        ({"eval_batch_size": 0}, "eval_batch_size is 0, must be at least 1"),
        ({"view": ImageTransform(8, centre=0.0)}, "centre is 0.0, must be above 0 and at most 1"),
        ({"view": ImageTransform(8, centre=1.5)}, "centre is 1.5, must be above 0 and at most 1"),
        ({"view": ImageTransform(0)}, "size is 0, must be at least 1"),
        ({"val_fraction": 1.0}, "val_fraction is 1.0; it must lie in"),
        ({"mean": (0.5,)}, "mean has 1 and std 3 entries for 3 channels"),
    ],
)
def test_settings_out_of_range(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        streamed(folder, **changes)


def test_each_kind_of_split_has_its_data_object(folder: Path) -> None:
    pixels, files = fake(3, 8, 6, 3), image_folder(str(folder))
    options: dict[str, Any] = {
        "num_classes": 3, "batch_size": 2, "seed": 0, "device": "cpu", "mean": MEAN, "std": STD
    }  # fmt: skip
    with pytest.raises(ValueError, match="hold pixels"):
        StreamedData(pixels, view=ImageTransform(8), **options)
    with pytest.raises(ValueError, match="are files"):
        DeviceData(files, **options)
    with pytest.raises(ValueError, match="are files"):
        DeviceData(Splits(pixels.train, files.test), **options)


def test_a_lost_worker_is_an_error_after_which_others_can_be_started(folder: Path) -> None:
    data, before = streamed(folder, workers=2), children()
    next(data.batches(1))
    workers = children() - before
    os.kill(max(workers), signal.SIGKILL)
    with pytest.raises(  # noqa: PT012
        ChildProcessError, match="a process that decodes images is lost"
    ):
        for epoch in range(1, 50):
            list(data.batches(epoch))
    assert gone(workers)
    assert equal(list(data.batches(3)), list(streamed(folder).batches(3)))
    workers = children() - before
    assert all(map(alive, workers))
    del data
    assert gone(workers)


# Whole trainings


@pytest.fixture
def job_of(compose: Compose, folder: Path) -> Callable[..., cfg.Config]:
    """Return a function that composes jobs on images of 16x16 with one decoding process."""

    def of(*overrides: str, root: Path = folder) -> cfg.Config:
        return compose(
            "dataset=image_folder", f"dataset.root={root}", "dataset.num_classes=3",
            "dataset.size=16", "dataset.workers=1", "teacher=resnet8", "student=resnet8",
            "tracking=none", "trainer=cpu", "trainer.batch_size=20", "trainer.epochs=2",
            "trainer.progress=off", *overrides,
        )  # fmt: skip

    return of


Jobs = Callable[..., cfg.Config]


def test_a_teacher_and_its_student_train_on_files(job_of: Jobs) -> None:
    before = children()
    (taught,) = fit([job_of("distiller=vanilla", "trainer.epochs=1")])
    assert taught["status"] == "FINISHED"
    job = job_of(
        "M=[1,2]",
        "tracking.predictions=true",
        "dataset.val_fraction=0.2",
        "dataset.bad_images=skip",
    )
    (result,) = fit([job])
    assert (result["status"], result["epochs"]) == ("FINISHED", 2)
    assert "test_top1" in result
    with np.load(Path(job.run_dir, "predictions.npz")) as kept:
        assert kept["target"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        assert kept["images"].shape == (len(kept["sample"]), 16, 16, 3)
    found = measure(job, Path(job.run_dir, "best.ckpt"))
    assert found["images"] == 9
    assert found["top1"] == pytest.approx(result["test_top1"])
    assert gone(children() - before)


def test_predictions_without_a_region_that_differs_have_no_images(job_of: Jobs) -> None:
    fit([job_of("distiller=vanilla", "trainer.epochs=1")])  # the teacher
    # The whole map is the only region.
    job = job_of("M=[1]", "tracking.predictions=true", "trainer.epochs=1")
    (result,) = fit([job])
    assert (result["status"], result["reason"]) == ("FINISHED", "")
    with np.load(Path(job.run_dir, "predictions.npz")) as kept:
        assert len(kept["sample"]) == 0
        assert "images" not in kept


def test_a_run_that_is_stopped_goes_on_with_the_same_bits(job_of: Jobs, tmp_path: Path) -> None:
    """The run is stopped in the first step of the second epoch.

    SIGTERM goes to the training process and to its decoding process, as SLURM sends it.
    """
    whole, stopped = (
        job_of("distiller=vanilla", f"home={tmp_path / name}") for name in ("whole", "stopped")
    )
    fit([whole])
    data_batches, before = StreamedData.batches, children()

    def batches(self: StreamedData, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in data_batches(self, epoch, start):
            if epoch == 2:
                (worker,) = children() - before
                subprocess.run(["kill", "-TERM", str(os.getpid()), str(worker)], check=True)
            yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StreamedData, "batches", batches)
        (result,) = fit([stopped])
    assert (result["status"], result["epochs"]) == ("KILLED", 1)
    (result,) = fit([stopped])
    assert result["status"] == "FINISHED"
    assert same_outcome(whole, stopped)


def test_a_bad_file_fails_the_run_by_its_name(job_of: Jobs, own_folder: Path) -> None:
    spoil(own_folder, ["train/class_1/0005.jpg"])
    job = job_of("distiller=vanilla", root=own_folder)
    with pytest.raises(
        ValueError,
        match=r"train/class_1/0005\.jpg: cannot .*or set dataset\.bad_images=skip$",
    ):
        fit([job])
    result = json.loads(Path(job.run_dir, "result.json").read_text())
    assert result["status"] == "FAILED"
    assert f"{own_folder}/train/class_1/0005.jpg" in result["reason"]


def test_workers_end_with_an_evaluation_that_fails(job_of: Jobs, own_folder: Path) -> None:
    fit([job := job_of("distiller=vanilla", "trainer.epochs=1", root=own_folder)])
    before = children()
    spoil(own_folder, ["val/class_1/0001.jpg"])
    with pytest.raises(ValueError, match="repair or remove"):
        measure(job, Path(job.run_dir, "best.ckpt"))
    assert gone(children() - before)


# The teacher is trained first, in batches that the few images fill.
TAUGHT = ("teacher.train_if_missing=true", "dataset.batch_size=8")


def test_no_cache_of_crops_that_never_come_again(job_of: Jobs, tmp_path: Path) -> None:
    job = job_of(f"teacher.cache={tmp_path}", *TAUGHT)
    with pytest.raises(
        ValueError, match=r"teacher.cache=.* cannot hold the crops of dataset=image_folder"
    ):
        build_data(job, torch.device("cpu"))
    ((_, reason),) = problems([job])
    assert "set teacher.cache=null" in reason


def test_a_job_is_checked_without_a_look_into_any_file(job_of: Jobs, own_folder: Path) -> None:
    spoil(own_folder, [str(path.relative_to(own_folder)) for path in own_folder.rglob("*.jpg")])
    well = [job_of(*TAUGHT, f"dataset.size={size}", root=own_folder) for size in (16, 64)]
    ill = [
        job_of("distiller=vanilla", "trainer.batch_size=58", root=own_folder),
        # The logit maps have 4x4 cells.
        job_of(*TAUGHT, "M=[1,16]", root=own_folder),
        job_of("distiller=vanilla", root=own_folder.with_name("nowhere")),
    ]
    reasons = [reason for _, reason in problems([*well, *ill])]
    assert len(reasons) == 3
    assert "is larger than the 57 images" in reasons[0]
    assert "the largest scale here is" in reasons[1]
    assert "there is no folder" in reasons[2]


@pytest.mark.parametrize("given", [2, 4])
def test_another_number_of_classes_than_the_folders_is_refused_before_the_start(
    job_of: Jobs, given: int
) -> None:
    job = job_of("distiller=vanilla", f"dataset.num_classes={given}")
    message = rf"train holds 3 classes, not {given}; set dataset\.num_classes=3"
    ((_, reason),) = problems([job])
    assert re.search(message, reason)
    with pytest.raises(InstantiationException, match=message):
        build_data(job, torch.device("cpu"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("dataset.size=0", "dataset.size=0 must be greater than 0"),
        ("dataset.centre=1.2", "dataset.centre=1.2 must be at most 1"),
        ("dataset.centre=0", "dataset.centre=0.0 must be at least 0.01"),
        ("dataset.workers=-1", "dataset.workers=-1 must not be negative"),
        ("dataset.crop_area=[0.5]", r"dataset.crop_area=\[0.5\] is not valid; give"),
        ("dataset.crop_area=[0.5,0.4]", r"dataset.crop_area=\[0.5, 0.4\] is not valid; give"),
        ("dataset.crop_area=[0,1]", r"dataset.crop_area=\[0.0, 1.0\] is not valid; give"),
        ("dataset.pixel_limit=0", "dataset.pixel_limit=0 must be greater than 0"),
    ],
)
def test_keys_out_of_range(job_of: Jobs, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        job_of(override)


def test_keys_of_files_count_in_a_job_once_they_differ(job_of: Jobs) -> None:
    default = cfg.config_hash(job_of("dataset.size=224"))
    for override in (
        "dataset.size=224",
        "dataset.centre=0.875",
        "dataset.bad_images=fail",
        "dataset.workers=7",
    ):
        assert cfg.config_hash(job_of("dataset.size=224", override)) == default
    for override in ("dataset.size=64", "dataset.centre=1", "dataset.bad_images=skip",
                     "dataset.crop_area=[0.2,1]", "dataset.irregular_images=skip",
                     "dataset.upright=true",
                     "dataset.pixel_limit=1000"):  # fmt: skip
        assert cfg.config_hash(job_of("dataset.size=224", override)) != default
