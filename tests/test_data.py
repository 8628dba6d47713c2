"""Test the data sets and their batches.

The batches are compared with a slow second implementation and with each other. Damaged files must
give clear errors.
"""

import gzip
import hashlib
import http.server
import io
import multiprocessing
import pickle
import struct
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from sddlskd.data.device import Batch, DeviceData, draw_epoch, seed_of, share_of
from sddlskd.data.subsets import trained_on
from sddlskd.datasets import arrays
from sddlskd.datasets.arrays import Images, Splits, cifar100, digits, fake, fashion_mnist
from sddlskd.files import download
from sddlskd.files.download import DownloadError
from tests.tiny import same as values_are_same

MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
CLOSED = "http://127.0.0.1:9/"  # the discard port, where no server listens
# Order, flips, rows and columns that the first epoch of seed 0 draws for six images
PINNED = ([5, 0, 4, 3, 2, 1], [1, 0, 0, 1, 0, 0], [1, 3, 5, 3, 2, 3], [3, 5, 0, 2, 4, 1])


def small(train: int = 150, test: int = 30, classes: int = 10, size: int = 32) -> Splits:
    return fake(num_classes=classes, size=size, train=train, test=test)


def device_data(splits: Splits | None = None, **changes: Any) -> DeviceData:
    options: dict[str, Any] = {
        "num_classes": 10,
        "batch_size": 32,
        "seed": 0,
        "device": "cpu",
        "mean": MEAN,
        "std": STD,
    }
    return DeviceData(splits or small(), **(options | changes))


def joined(batches: Iterator[Batch] | Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    x, y, *_ = zip(*batches, strict=True)
    return torch.cat(x), torch.cat(y)


def same(ours: Iterator[tuple[Any, ...]], theirs: Iterator[tuple[Any, ...]]) -> bool:
    pairs = zip(ours, theirs, strict=True)
    return all(values_are_same(our, their) for our, their in pairs)


def plain(image_HWC: Tensor) -> Tensor:
    return tv.normalize(image_HWC.permute(2, 0, 1).float() / 255, list(MEAN), list(STD))


# Batches


@pytest.mark.parametrize(
    ("padding", "flip", "shape"),
    [(4, True, (32, 32, 3)), (2, False, (32, 32, 3)), (0, True, (9, 7, 3)), (0, False, (8, 8, 3))],
)
def test_batches_are_what_torchvision_makes_image_by_image(
    padding: int, flip: bool, shape: tuple[int, int, int]
) -> None:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (150, *shape), dtype=torch.uint8, generator=generator)
    splits = Splits(Images(images, torch.arange(150) % 10), Images(images[:5], torch.arange(5)))
    data = device_data(splits, padding=padding, flip=flip, seed=3)
    x_BCHW, y_B = joined(data.batches(epoch=7))
    draws = draw_epoch(seed=3, epoch=7, size=150, padding=padding)
    for place, n in enumerate(draws.order_N.tolist()):
        image_CHW = tv.pad(images[n].permute(2, 0, 1), [padding])
        image_CHW = tv.crop(image_CHW, int(draws.top_N[n]), int(draws.left_N[n]), *shape[:2])
        if flip and draws.flip_N[n]:
            image_CHW = tv.horizontal_flip(image_CHW)
        torch.testing.assert_close(
            x_BCHW[place], plain(image_CHW.permute(1, 2, 0)), rtol=1e-5, atol=1e-6
        )
        assert y_B[place] == n % 10


def test_batches_have_the_promised_form() -> None:
    data = device_data(batch_size=64)
    assert (data.steps_per_epoch, data.train_size, data.val_size, data.image_shape) == (
        3,
        150,
        30,
        (3, 32, 32),
    )
    batches = list(data.batches(0))
    assert [len(batch.labels) for batch in batches] == [64, 64, 22]
    for batch in batches:
        assert batch.views is not None
        for numbers_B in (batch.index, batch.views):
            assert numbers_B.dtype == torch.int64
            assert numbers_B.shape == batch.labels.shape
    for x, y, *_ in [*batches, *data.val_batches()]:
        assert x.dtype == torch.float32
        assert y.dtype == torch.int64
        assert x.shape[1:] == (3, 32, 32)
        assert x.is_contiguous(memory_format=torch.channels_last)


def test_epochs_follow_from_seed_and_epoch_alone() -> None:
    data = device_data()
    assert same(data.batches(2), device_data().batches(2))
    torch.manual_seed(123)
    assert same(data.batches(2), data.batches(2))
    assert not same(data.batches(2), data.batches(3))
    assert not same(data.batches(2), device_data(seed=1).batches(2))
    # Two pairs (seed, epoch) with the same sum or the same digits give different orders.
    assert not torch.equal(draw_epoch(1, 12, 99, 4).order_N, draw_epoch(11, 2, 99, 4).order_N)


def test_draws_are_the_same_on_every_machine_and_version() -> None:
    order_N, top_N, left_N, flip_N = draw_epoch(seed=0, epoch=1, size=6, padding=4)
    assert (order_N.tolist(), flip_N.int().tolist()) == PINNED[:2]
    assert (top_N.tolist(), left_N.tolist()) == PINNED[2:]


def test_seeds_follow_from_the_text_of_their_parts() -> None:
    assert seed_of("seed", 0, "epoch", 1) == seed_of("seed 0 epoch 1") == 7509575632138063048
    assert len({seed_of("seed", s, "epoch", e) for s in range(9) for e in range(9)}) == 81
    assert all(0 <= seed_of(n) < 2**63 for n in range(99))


def test_draws_are_those_of_the_whole_hash() -> None:
    """Epochs drawn with 64 bits of the hash must stay the same, also where bit 63 is set."""
    digest = hashlib.sha256(b"seed 0 epoch 2").digest()
    earlier = int.from_bytes(digest[:8], "little")
    assert earlier >= 2**63
    order_N = torch.randperm(99, generator=torch.Generator().manual_seed(earlier))
    assert torch.equal(draw_epoch(seed=0, epoch=2, size=99, padding=4).order_N, order_N)


def test_interleaved_epochs_do_not_disturb_each_other() -> None:
    data = device_data()
    pairs = zip(data.batches(0), data.batches(1), strict=True)
    assert same(iter([first for first, _ in pairs]), data.batches(0))


def test_every_image_once_an_epoch() -> None:
    images = torch.arange(200, dtype=torch.uint8).view(200, 1, 1, 1).expand(200, 4, 4, 3)
    data = device_data(
        Splits(Images(images, torch.arange(200)), small(size=4).test), num_classes=200, padding=0
    )
    x, y = joined(data.batches(5))
    assert y.sort().values.tolist() == list(range(200))
    assert y.tolist() != list(range(200))
    pixels = (x[:, 0, 0, 0] * STD[0] + MEAN[0]) * 255
    assert pixels.round().int().tolist() == y.tolist()


@pytest.mark.parametrize("batch_size", [7, 32, 150])
def test_a_resumed_epoch_is_the_tail_of_the_whole(batch_size: int) -> None:
    data = device_data(batch_size=batch_size)
    whole = list(data.batches(4))
    for start in range(data.steps_per_epoch + 1):
        assert same(data.batches(4, start=start), iter(whole[start:]))


@pytest.mark.parametrize(("batch_size", "steps"), [(40, 3), (50, 3), (150, 1)])
def test_the_last_smaller_batch_can_be_left_out(batch_size: int, steps: int) -> None:
    data = device_data(batch_size=batch_size, drop_last=True)
    assert data.steps_per_epoch == steps
    batches = list(data.batches(1))
    assert [len(batch.labels) for batch in batches] == [batch_size] * steps
    assert values_are_same(batches, list(device_data(batch_size=batch_size).batches(1))[:steps])
    assert values_are_same(list(data.batches(1, steps - 1)), batches[-1:])
    assert list(data.batches(1, steps)) == []


def test_batch_size_does_not_change_the_views() -> None:
    reference = joined(device_data(batch_size=32).batches(1))
    for batch_size in (1, 50, 149, 150):
        assert same(
            iter([joined(device_data(batch_size=batch_size).batches(1))]), iter([reference])
        )


def test_crops_reach_every_offset_and_half_are_mirrored() -> None:
    order_N, top_N, left_N, flip_N = draw_epoch(seed=0, epoch=0, size=20_000, padding=4)
    counts = torch.bincount(top_N * 9 + left_N, minlength=81)
    assert len(counts) == 81
    assert counts.min() > 20_000 / 81 * 0.7
    assert abs(flip_N.float().mean().item() - 0.5) < 0.02
    # The draws are independent of each other.
    assert (
        abs(torch.corrcoef(torch.stack([order_N, top_N, left_N, flip_N]).float()).triu(1)).max()
        < 0.04
    )


def test_flip_alone_mirrors_or_keeps() -> None:
    splits = small(train=64, size=5)
    kept = plain_by_order(splits, epoch=0, seed=0)
    x, _ = joined(device_data(splits, padding=0).batches(0))
    mirrored = [not torch.equal(a, b) for a, b in zip(x, kept, strict=True)]
    assert 10 < sum(mirrored) < 54
    assert all(
        torch.equal(a, b.flip(2) if m else b) for a, b, m in zip(x, kept, mirrored, strict=True)
    )


def plain_by_order(splits: Splits, epoch: int, seed: int) -> Tensor:
    return joined(device_data(splits, padding=0, flip=False, seed=seed).batches(epoch))[0]


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(5)
    np.random.seed(5)
    state, numpy_state = (
        torch.get_rng_state(),
        np.random.get_state()[1].tolist(),  # type: ignore[index, union-attr]
    )
    data = device_data(val_fraction=0.2)
    for batches in (data.batches(0), data.val_batches(), data.test_batches()):
        joined(batches)
    digits()
    assert torch.equal(torch.get_rng_state(), state)
    assert np.random.get_state()[1].tolist() == numpy_state  # type: ignore[index, union-attr]


def test_validation_and_test_are_plain_and_in_order() -> None:
    splits = small()
    data = device_data(splits, eval_batch_size=7)
    x, y = joined(data.test_batches())
    assert torch.equal(y, splits.test.labels_N)
    expected = torch.stack([plain(image) for image in splits.test.images_NHWC])
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-6)
    assert same(data.val_batches(), data.test_batches())


def test_held_out_validation_is_stratified_disjoint_and_fixed() -> None:
    splits = small(train=200)
    labels = torch.cat([torch.full((110,), 0), torch.full((60,), 1), torch.full((30,), 2)])
    splits = splits._replace(train=splits.train._replace(labels_N=labels))
    data, other = (
        device_data(splits, val_fraction=0.1, padding=0, flip=False, seed=seed) for seed in (0, 1)
    )
    assert (data.train_size, data.val_size, data.steps_per_epoch) == (180, 20, 6)
    (x, y), (val_x, val_y) = joined(data.batches(0)), joined(data.val_batches())
    assert torch.bincount(val_y).tolist() == [11, 6, 3]
    assert torch.bincount(y).tolist() == [99, 54, 27]
    held, rest, all_of = (
        {image.numpy().tobytes() for image in part} for part in (val_x, x, whole_of(splits))
    )
    assert not held & rest
    assert held | rest == all_of
    assert same(data.val_batches(), other.val_batches())
    assert same(data.test_batches(), device_data(splits).test_batches())


@pytest.mark.parametrize(("val_fraction", "counts"), [(0.0, [22, 12, 6]), (0.1, [20, 11, 5])])
def test_a_part_of_the_training_images_is_stratified_nested_and_fixed(
    val_fraction: float, counts: list[int]
) -> None:
    splits = small(train=200)
    labels = torch.cat([torch.full((110,), 0), torch.full((60,), 1), torch.full((30,), 2)])
    splits = splits._replace(train=splits.train._replace(labels_N=labels))
    options = {"val_fraction": val_fraction, "padding": 0, "flip": False}
    data, other, larger, whole = (
        device_data(splits, train_fraction=fraction, seed=seed, **options)
        for fraction, seed in ((0.2, 0), (0.2, 1), (0.5, 0), (1.0, 0))
    )
    _, y = joined(data.batches(0))
    assert torch.bincount(y).tolist() == counts
    assert data.train_size == sum(counts)
    chosen, same_part, more, every = (
        {image.numpy().tobytes() for image in joined(one.batches(0))[0]}
        for one in (data, other, larger, whole)
    )
    assert chosen == same_part
    assert chosen < more < every
    assert same(data.val_batches(), whole.val_batches())  # the held-out images stay the same


def test_each_class_keeps_an_image() -> None:
    mask_N = trained_on(torch.tensor([0, 0, 0, 1]), 0.0, 0.01, 2)
    assert mask_N.sum() == 2
    assert mask_N[3]


def whole_of(splits: Splits) -> Tensor:
    return joined(device_data(splits, padding=0, flip=False).batches(0))[0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_makes_the_same_batches() -> None:
    theirs = list(device_data(device="cuda", strong=True).batches(1))
    ours = list(device_data(strong=True).batches(1))
    assert {part.device.type for batch in theirs for part in (batch.index, batch.views)} == {"cpu"}
    for own, other in zip(ours, theirs, strict=True):
        values = [value.cpu() if isinstance(value, Tensor) else value for value in other]
        assert values_are_same(list(own), values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 151}, r"batch_size is 151; give 1\.\.150"),
        ({"batch_size": 0}, r"batch_size is 0; give 1\.\.150"),
        ({"batch_size": 140, "val_fraction": 0.1}, r"batch_size is 140; give 1\.\.130"),
        ({"num_classes": 9}, r"train label 9 at index 9 is outside 0\.\.8: set num_classes"),
        ({"train_fraction": 0.0}, r"train_fraction is 0\.0; it must lie in \(0, 1\]"),
        ({"train_fraction": 1.5}, r"train_fraction is 1\.5"),
        ({"train_fraction": float("nan")}, r"train_fraction is nan"),
        ({"val_fraction": 1.0}, r"val_fraction is 1\.0; it must lie in \[0, 1\)"),
        ({"val_fraction": -0.1}, r"val_fraction is -0\.1"),
        ({"val_fraction": float("nan")}, r"val_fraction is nan"),
        ({"val_fraction": 0.001}, r"val_fraction is 0\.001, which holds out 0 of 150"),
        ({"val_fraction": 0.999}, r"val_fraction is 0\.999, which holds out 150 of 150"),
        ({"mean": (0.5,)}, r"mean has 1 and std 3 entries for 3 channels"),
        ({"std": (0.5, 0.5)}, r"mean has 3 and std 2 entries for 3 channels"),
        ({"std": (0.5, 0.0, 0.5)}, r"std is \[0\.5, 0\.0, 0\.5\]"),
        ({"padding": -1}, r"padding is -1, must be at least 0"),
        ({"eval_batch_size": 0}, r"eval_batch_size is 0, must be at least 1"),
    ],
)
def test_bad_settings_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        device_data(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("part", "images", "labels", "message"),
    [
        (
            "train",
            torch.zeros(4, 8, 8, 3),
            torch.zeros(4).long(),
            r"train images are torch\.float32 \(4, 8, 8, 3\)",
        ),
        (
            "test",
            torch.zeros(4, 3, 8, 8).byte(),
            torch.zeros(4).long(),
            r"test images are torch\.uint8 \(4, 3, 8, 8\)",
        ),
        (
            "test",
            torch.zeros(4, 8, 8).byte(),
            torch.zeros(4).long(),
            r"test images are torch\.uint8 \(4, 8, 8\)",
        ),
        (
            "train",
            torch.zeros(4, 8, 8, 3).byte(),
            torch.zeros(4).int(),
            r"train labels are torch\.int32 \(4,\)",
        ),
        (
            "test",
            torch.zeros(4, 8, 8, 3).byte(),
            torch.zeros(3).long(),
            r"test labels are torch\.int64 \(3,\)",
        ),
        ("train", torch.zeros(0, 8, 8, 3).byte(), torch.zeros(0).long(), r"train holds 0 images"),
        (
            "test",
            torch.zeros(3, 8, 8, 3).byte(),
            torch.tensor([0, 1, -1]),
            r"test label -1 at index 2 is outside 0\.\.9",
        ),
    ],
)
def test_bad_splits_are_named(part: str, images: Tensor, labels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        device_data(small(size=8)._replace(**{part: Images(images, labels)}))


@pytest.mark.parametrize("start", [-1, 6])
def test_a_start_outside_the_epoch_is_refused_at_once(start: int) -> None:
    with pytest.raises(ValueError, match=rf"start is {start}; give 0\.\.5"):
        device_data().batches(0, start=start)


# Loaders that need no file


def test_digits() -> None:
    splits = digits()
    assert [tuple(part.images_NHWC.shape) for part in splits] == [
        (1437, 32, 32, 3),
        (360, 32, 32, 3),
    ]
    assert all(
        torch.bincount(part.labels_N).float().std() < 0.02 * len(part.labels_N) for part in splits
    )
    assert splits.train.images_NHWC.min() == 0
    assert splits.train.images_NHWC.max() == 255
    assert torch.equal(splits.train.images_NHWC[..., 0], splits.train.images_NHWC[..., 2])
    assert all(
        torch.equal(a.images_NHWC, b.images_NHWC) for a, b in zip(splits, digits(), strict=True)
    )
    device_data(splits, padding=2, flip=False)


def test_digits_are_scikit_learns_enlarged_and_split() -> None:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    small_NP, labels_N = load_digits(return_X_y=True)
    drawn = train_test_split(range(1797), test_size=360, random_state=0, stratify=labels_N)
    for part, rows in zip(digits(), map(np.sort, drawn), strict=True):
        assert np.array_equal(part.labels_N, labels_N[rows])
        means_NHW = part.images_NHWC[..., 0].float().reshape(-1, 8, 4, 8, 4).mean(dim=(2, 4))
        # Each pixel was enlarged to a block of 4x4 pixels, whose mean is close to the old value.
        assert np.corrcoef(means_NHW.flatten(), small_NP[rows].flatten())[0, 1] > 0.95


def test_fake_is_balanced_and_seeded() -> None:
    splits = fake(num_classes=4, size=8, train=20, test=8)
    assert torch.bincount(splits.train.labels_N).tolist() == [5, 5, 5, 5]
    assert splits.test.images_NHWC.shape == (8, 8, 8, 3)
    again, other = fake(4, 8, 20, 8), fake(4, 8, 20, 8, seed=1)
    assert torch.equal(splits.train.images_NHWC, again.train.images_NHWC)
    assert not torch.equal(splits.train.images_NHWC, other.train.images_NHWC)


# CIFAR-100


def cifar_pickles(
    protocol: int = 2, as_bytes: bool = True
) -> tuple[dict[str, bytes], dict[str, tuple[np.ndarray, list[int]]]]:
    rng, pickles, truth = np.random.default_rng(0), {}, {}
    for name, count in (("train", 12), ("test", 5)):
        data, labels = (
            rng.integers(256, size=(count, 3072), dtype=np.uint8),
            [7 * i % 100 for i in range(count)],
        )
        entries = {
            "data": data,
            "fine_labels": labels,
            "coarse_labels": labels,
            "filenames": ["a.png"] * count,
        }
        content = {key.encode() if as_bytes else key: value for key, value in entries.items()}
        pickles[name], truth[name] = pickle.dumps(content, protocol), (data, labels)
    return pickles, truth


def write_cifar_tar(path: Path, pickles: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in pickles.items():
            member = tarfile.TarInfo(f"cifar-100-python/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize("as_bytes", [True, False])
@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("layout", ["folder", "archive"])
def test_cifar100_reads_torchvisions_layouts(
    tmp_path: Path, layout: str, protocol: int, as_bytes: bool
) -> None:
    pickles, truth = cifar_pickles(protocol, as_bytes)
    if layout == "folder":
        (tmp_path / "cifar-100-python").mkdir()
        for name, content in pickles.items():
            (tmp_path / "cifar-100-python" / name).write_bytes(content)
    else:
        write_cifar_tar(tmp_path / "cifar-100-python.tar.gz", pickles)
    for name, part in zip(truth, cifar100(str(tmp_path)), strict=True):
        data, labels = truth[name]
        assert part.labels_N.tolist() == labels
        assert part.images_NHWC.is_contiguous()
        # As torchvision.datasets.CIFAR10 does: reshape(-1, 3, 32, 32), transpose((0, 2, 3, 1))
        assert np.array_equal(
            part.images_NHWC.numpy(), data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        )


def test_cifar100_says_when_it_is_not_the_published_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_cifar_tar(tmp_path / "cifar-100-python.tar.gz", cifar_pickles()[0])
    cifar100(str(tmp_path))
    assert "cifar-100-python/train is not the published CIFAR-100" in caplog.text


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_malicious_cifar_pickle_is_refused_and_runs_nothing(
    tmp_path: Path, protocol: int
) -> None:
    trap = tmp_path / "trap"
    pickles = cifar_pickles()[0] | {"train": pickle.dumps({"data": Malicious(trap)}, protocol)}
    write_cifar_tar(tmp_path / "cifar-100-python.tar.gz", pickles)
    with pytest.raises(
        ValueError, match=r"cifar-100-python/train is not a CIFAR-100 pickle .* asks for .*open"
    ):
        cifar100(str(tmp_path))
    assert not trap.exists()
    pickle.loads(pickles["train"])["data"].close()
    assert trap.exists(), "the trap itself does not work"


def test_a_tar_with_outside_members_writes_nothing(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    write_cifar_tar(root / "cifar-100-python.tar.gz", cifar_pickles()[0] | {"../../outside": b"x"})
    cifar100(str(root))
    assert [path.name for path in tmp_path.iterdir()] == ["root"]
    assert [path.name for path in root.iterdir()] == ["cifar-100-python.tar.gz"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda pickles: b"no archive", "cannot be read"),
        (lambda pickles: tar_bytes(pickles)[:2000], "cannot be read"),
        (lambda pickles: tar_bytes({"train": pickles["train"]}), "cifar-100-python/test"),
        (
            lambda pickles: tar_bytes(pickles | {"test": pickles["test"][:-900]}),
            "cifar-100-python/test is not a CIFAR-100",
        ),
        (
            lambda pickles: tar_bytes(pickles | {"test": b""}),
            "cifar-100-python/test is not a CIFAR-100",
        ),
        (
            lambda pickles: tar_bytes(pickles | {"test": pickle.dumps([1])}),
            "cifar-100-python/test is not a CIFAR-100",
        ),
        (
            lambda pickles: tar_bytes(
                pickles
                | {
                    "test": pickle.dumps(
                        {"data": np.zeros((2, 9), np.uint8), "fine_labels": [1, 2]}
                    )
                }
            ),
            r"data is uint8 \(2, 9\), not uint8 \(2, 3072\)",
        ),
    ],
)
def test_damaged_cifar_archives_are_named(tmp_path: Path, damage: Any, message: str) -> None:
    archive = tmp_path / "cifar-100-python.tar.gz"
    archive.write_bytes(damage(cifar_pickles()[0]))
    with pytest.raises(ValueError, match=message) as caught:
        cifar100(str(tmp_path))
    assert str(archive) in str(caught.value)
    assert "fetched again" in str(caught.value)


def tar_bytes(pickles: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in pickles.items():
            member = tarfile.TarInfo(f"cifar-100-python/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


# Downloads


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(Quiet, directory=str(folder))
    ) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{listening.server_port}/", folder
        listening.shutdown()
        thread.join()


def serve_cifar(server: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    url, folder = server
    write_cifar_tar(folder / "cifar-100-python.tar.gz", cifar_pickles()[0])
    md5 = hashlib.md5((folder / "cifar-100-python.tar.gz").read_bytes()).hexdigest()
    monkeypatch.setattr(arrays, "CIFAR100_URL", url + "cifar-100-python.tar.gz")
    monkeypatch.setattr(arrays, "CIFAR100_MD5", md5)


def test_cifar100_is_fetched_once(
    tmp_path: Path, server: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    serve_cifar(server, monkeypatch)
    root = tmp_path / "new" / "root"
    assert len(cifar100(str(root)).train.labels_N) == 12
    monkeypatch.setattr(arrays, "CIFAR100_URL", CLOSED + "cifar-100-python.tar.gz")
    assert len(cifar100(str(root)).train.labels_N) == 12
    assert not list(root.glob("*.partial"))


def test_two_processes_may_fetch_at_once(
    tmp_path: Path, server: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    serve_cifar(server, monkeypatch)
    root = tmp_path / "root"
    task = (arrays.CIFAR100_URL, arrays.CIFAR100_MD5, root)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        paths = pool.starmap(
            partial(download.download_into, limit=1 << 20), [task] * 4, chunksize=1
        )
    assert set(paths) == {root / "cifar-100-python.tar.gz"}
    assert len(cifar100(str(root)).test.labels_N) == 5


def test_a_fetched_file_with_another_md5_is_not_kept(
    tmp_path: Path, server: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    serve_cifar(server, monkeypatch)
    monkeypatch.setattr(arrays, "CIFAR100_MD5", "0" * 32)
    with pytest.raises(DownloadError, match=r"the downloaded file has md5 [0-9a-f]{32}"):
        cifar100(str(tmp_path / "root"))
    assert not [path for path in (tmp_path / "root").iterdir() if path.suffix != ".lock"]


@pytest.mark.parametrize("address", [CLOSED, "served"])
def test_a_failed_fetch_says_what_to_put_where(
    tmp_path: Path, server: tuple[str, Path], monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    # The server answers with 404; the closed port refuses the connection.
    base = server[0] if address == "served" else address
    monkeypatch.setattr(arrays, "CIFAR100_URL", base + "cifar-100-python.tar.gz")
    monkeypatch.setattr(arrays, "FASHION_MNIST_URL", base)
    monkeypatch.setattr(arrays, "DEBIAN_FASHION_MNIST", str(tmp_path / "nothing"))
    for load, name, md5, folder in (
        (cifar100, "cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85", tmp_path),
        (
            fashion_mnist,
            "train-images-idx3-ubyte.gz",
            "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            tmp_path / "FashionMNIST" / "raw",
        ),
    ):
        with pytest.raises(DownloadError) as caught:
            load(str(tmp_path))
        message = str(caught.value)
        assert "\n" not in message
        assert message.endswith(f"put {name}, md5 {md5}, into {folder}")
        assert f"cannot fetch {base}{name}" in message


def test_a_root_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DownloadError, match=r"put cifar-100-python\.tar\.gz"):
        cifar100(str(tmp_path / "file" / "root"))


# Fashion-MNIST


def idx(array: np.ndarray) -> bytes:
    return (
        bytes((0, 0, 8, array.ndim))
        + struct.pack(f">{array.ndim}I", *array.shape)
        + array.tobytes()
    )


def write_fashion(folder: Path, compressed: bool) -> dict[str, np.ndarray]:
    rng, truth = np.random.default_rng(0), {}
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", 6), ("t10k", 3)):
        truth[f"{split}-images-idx3-ubyte"] = rng.integers(
            1, 256, size=(count, 28, 28), dtype=np.uint8
        )
        truth[f"{split}-labels-idx1-ubyte"] = rng.integers(10, size=count, dtype=np.uint8)
    for name, array in truth.items():
        path = folder / (f"{name}.gz" if compressed else name)
        path.write_bytes(gzip.compress(idx(array)) if compressed else idx(array))
    return truth


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("place", ["FashionMNIST/raw", ".", "debian"])
def test_fashion_mnist_is_found_padded_and_tripled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, compressed: bool
) -> None:
    root = tmp_path / "root"
    monkeypatch.setattr(arrays, "DEBIAN_FASHION_MNIST", str(tmp_path / "debian"))
    truth = write_fashion(tmp_path / "debian" if place == "debian" else root / place, compressed)
    for split, part in zip(("train", "t10k"), fashion_mnist(str(root)), strict=True):
        images_NHWC = part.images_NHWC.numpy()
        assert part.labels_N.tolist() == truth[f"{split}-labels-idx1-ubyte"].tolist()
        assert images_NHWC.shape[1:] == (32, 32, 3)
        for channel in range(3):
            assert np.array_equal(
                images_NHWC[:, 2:30, 2:30, channel], truth[f"{split}-images-idx3-ubyte"]
            )
        assert np.count_nonzero(images_NHWC) == 3 * truth[f"{split}-images-idx3-ubyte"].size


@pytest.mark.parametrize("compressed", [True, False])
def test_damaged_idx_files_are_named_with_their_sizes(tmp_path: Path, compressed: bool) -> None:
    name = "t10k-images-idx3-ubyte"
    truth = write_fashion(tmp_path, compressed)
    path = tmp_path / (f"{name}.gz" if compressed else name)
    whole = idx(truth[name])
    pack = gzip.compress if compressed else bytes
    for content, message in (
        (
            whole[:-5],
            rf"expected {len(whole)} bytes for its shape \[3, 28, 28\], found {len(whole) - 5}",
        ),
        (whole + b"x", rf"expected {len(whole)} bytes .* found {len(whole) + 1}"),
        (
            whole[:9],
            r"expected 16 bytes or more beginning 00000803, found 9 bytes beginning 00000803",
        ),
        (b"", r"expected 16 bytes or more beginning 00000803, found 0 bytes"),
        (b"\0\0\x0d\3" + whole[4:], rf"found {len(whole)} bytes beginning 00000d03"),
    ):
        path.write_bytes(pack(content))
        with pytest.raises(ValueError, match=message) as caught:
            fashion_mnist(str(tmp_path))
        assert str(path) in str(caught.value)


def test_cut_and_broken_gzip_files_are_named(tmp_path: Path) -> None:
    truth = write_fashion(tmp_path, compressed=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    whole, packed = idx(truth["train-images-idx3-ubyte"]), path.read_bytes()
    path.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(ValueError, match=rf"{path}: expected {len(whole)} bytes .* found \d+"):
        fashion_mnist(str(tmp_path))
    path.write_bytes(packed[:20] + b"\xff" * 40 + packed[60:])
    with pytest.raises(ValueError, match=rf"{path} is a damaged gzip file of {len(packed)} bytes"):
        fashion_mnist(str(tmp_path))


@pytest.mark.skipif(
    not Path(arrays.DEBIAN_FASHION_MNIST).is_dir(), reason="needs Debian's dataset-fashion-mnist"
)
def test_debians_fashion_mnist(tmp_path: Path) -> None:
    splits = fashion_mnist(str(tmp_path))
    assert [torch.bincount(part.labels_N).tolist() for part in splits] == [[6000] * 10, [1000] * 10]
    assert splits.train.images_NHWC.shape == (60_000, 32, 32, 3)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_ranks_share_a_batch_in_order_or_take_all_of_it(ranks: int) -> None:
    for count in range(1, 70):
        shares = [list(range(count))[share_of(count, rank, ranks)] for rank in range(ranks)]
        if count < 2 * ranks:
            assert shares == [list(range(count))] * ranks
        else:
            assert [image for share in shares for image in share] == list(range(count))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1
            assert min(map(len, shares)) >= 2
