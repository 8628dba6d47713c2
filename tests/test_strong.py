"""Test strong augmentation against Pillow on photographs, and the strong views of batches."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from sklearn.datasets import load_sample_images
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from sddlskd import config as cfg
from sddlskd.data import strong
from sddlskd.data.decoding import ImageTransform, Job, decode
from sddlskd.data.device import DeviceData, draw_epoch, seed_of
from sddlskd.data.streaming import StreamedData
from sddlskd.data.strong import OPERATIONS, draw_strong
from sddlskd.datasets.arrays import Images, Splits, fake
from sddlskd.datasets.folders import image_folder
from sddlskd.training import build
from sddlskd.training.features import build_features
from sddlskd.training.fit import fit
from tests.photographs import class_folders
from tests.tiny import composed, final, rows, same, tiny

RANGES = {
    "auto_contrast": (0, 1),
    "brightness": (0.05, 0.95),
    "colour": (0.05, 0.95),
    "contrast": (0.05, 0.95),
    "equalize": (0, 1),
    "identity": (0, 1),
    "posterize": (4, 8),
    "rotate": (-30, 30),
    "sharpness": (0.05, 0.95),
    "shear_x": (-0.3, 0.3),
    "shear_y": (-0.3, 0.3),
    "solarize": (0, 256),
    "translate_x": (-0.3, 0.3),
    "translate_y": (-0.3, 0.3),
}


def moved(*matrix: float) -> Callable[[Image.Image], Image.Image]:
    return lambda image: image.transform(image.size, Image.Transform.AFFINE, matrix)


def by_pillow(name: str, image: Image.Image, value: float) -> Image.Image:
    """Return an image after an operation, as MLKD calls Pillow."""
    width, height = image.size
    operations: dict[str, Callable[[Image.Image], Image.Image]] = {
        "auto_contrast": ImageOps.autocontrast,
        "brightness": lambda image: ImageEnhance.Brightness(image).enhance(value),
        "colour": lambda image: ImageEnhance.Color(image).enhance(value),
        "contrast": lambda image: ImageEnhance.Contrast(image).enhance(value),
        "equalize": ImageOps.equalize,
        "identity": lambda image: image,
        "posterize": lambda image: ImageOps.posterize(image, int(value)),
        "rotate": lambda image: image.rotate(value),
        "sharpness": lambda image: ImageEnhance.Sharpness(image).enhance(value),
        "shear_x": moved(1, value, 0, 0, 1, 0),
        "shear_y": moved(1, 0, 0, value, 1, 0),
        "solarize": lambda image: ImageOps.solarize(image, value),  # type: ignore[arg-type]
        "translate_x": moved(1, 0, value * width, 0, 1, 0),
        "translate_y": moved(1, 0, 0, 0, 1, value * height),
    }
    return operations[name](image)


def cut_by_pillow(image: Image.Image, cut: list[float]) -> Image.Image:
    """Return an image after a Cutout, as MLKD paints it."""
    width, height = image.size
    side = cut[0] * 0.5 * width
    column, row = width + (1 - width) * cut[1], height + (1 - height) * cut[2]
    left, top = int(max(0, column - side / 2)), int(max(0, row - side / 2))
    corners = (left, top, min(width, left + side), min(height, top + side))
    image = image.copy()
    ImageDraw.Draw(image).rectangle(corners, (125, 123, 114))
    return image


@pytest.fixture(scope="module")
def photographs() -> Tensor:
    """Return 32x32 details of two photographs, noise, and images of one and of two colours."""
    draw = np.random.default_rng(0)
    images = [
        np.full((32, 32, 3), 7, np.uint8),
        draw.integers(256, size=(32, 32, 3), dtype=np.uint8),
    ]
    images.append(np.where(np.arange(32)[:, None, None] < 9, 3, images[0] * 30).astype(np.uint8))
    for photograph in load_sample_images().images:
        for _ in range(40):
            row, column = (draw.integers(length - 128) for length in photograph.shape[:2])
            detail = Image.fromarray(photograph[row : row + 128, column : column + 128])
            images.append(np.array(detail.resize((32, 32), Image.Resampling.BILINEAR)))
    return torch.from_numpy(np.stack(images))


def units(*size: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(size, generator=generator, dtype=torch.float64)


def pillow(images_BHWC: Tensor, change: Callable[[int, Image.Image], Image.Image]) -> Tensor:
    changed = [
        np.array(change(n, Image.fromarray(image))) for n, image in enumerate(images_BHWC.numpy())
    ]
    return torch.from_numpy(np.stack(changed))


@pytest.mark.parametrize("place", range(len(RANGES)), ids=list(RANGES))
@pytest.mark.parametrize("crop", [(32, 32), (29, 31)], ids=["square", "oblong"])
def test_every_operation_is_pillows(photographs: Tensor, place: int, crop: tuple[int, int]) -> None:
    """All values are equal: no operation interpolates."""
    name, (low, high) = list(RANGES.items())[place]
    apply, *between = OPERATIONS[place]
    assert (apply.__name__, between) == (f"_{name}", [low, high])
    images_BHWC = photographs[:, : crop[0], : crop[1]].contiguous()
    before_BHWC = images_BHWC.clone()
    value_B = low + (high - low) * units(len(images_BHWC))
    own_BHWC = apply(images_BHWC, value_B)
    values = value_B.tolist()
    theirs_BHWC = pillow(images_BHWC, lambda n, image: by_pillow(name, image, values[n]))
    assert own_BHWC.dtype == torch.uint8
    assert torch.equal(own_BHWC, theirs_BHWC)
    assert torch.equal(images_BHWC, before_BHWC)
    assert name == "identity" or not torch.equal(own_BHWC, images_BHWC)


@pytest.mark.parametrize("name", ["auto_contrast", "equalize", "posterize"])
def test_torchvision_agrees_where_it_computes_on_tensors(photographs: Tensor, name: str) -> None:
    """Its autocontrast rounds differently, by one level; the others are equal."""
    x_BCHW = photographs.permute(0, 3, 1, 2)
    theirs_BCHW = {
        "auto_contrast": tv.autocontrast,
        "equalize": tv.equalize,
        "posterize": lambda x: tv.posterize(x, 5),
    }[name](x_BCHW)
    apply = OPERATIONS[list(RANGES).index(name)][0]
    own_BHWC = apply(photographs, torch.full((len(photographs),), 5.5, dtype=torch.float64))
    difference = (own_BHWC.permute(0, 3, 1, 2).int() - theirs_BCHW.int()).abs().max()
    assert difference <= (name == "auto_contrast")


def test_two_operations_and_a_cutout_are_pillows(photographs: Tensor) -> None:
    count = len(photographs)
    draws = draw_strong(3, count, padding=4)
    augmented = strong.rand_augment(photographs, draws.operation_NK, draws.value_NK)
    own_BHWC = strong.cutout(augmented, draws.cut_N3)
    ranges = list(RANGES.items())

    def change(n: int, image: Image.Image) -> Image.Image:
        for place, unit in zip(
            draws.operation_NK[n].tolist(), draws.value_NK[n].tolist(), strict=True
        ):
            name, (low, high) = ranges[place]
            image = by_pillow(name, image, low + (high - low) * unit)
        return cut_by_pillow(image, draws.cut_N3[n].tolist())

    assert torch.equal(own_BHWC, pillow(photographs, change))
    # Each image alone gives the same.
    for n in (0, 1, count - 1):
        one = slice(n, n + 1)
        alone = strong.rand_augment(photographs[one], draws.operation_NK[one], draws.value_NK[one])
        assert torch.equal(strong.cutout(alone, draws.cut_N3[one]), own_BHWC[one])


@pytest.mark.parametrize(
    ("cut", "columns", "rows_"),
    [
        # Half of the width: 16 pixels, and the last row and column are painted, too.
        ((1.0, 0.5, 0.5), range(8, 25), range(8, 25)),
        ((0.5, 1.0, 1.0), range(0, 9), range(0, 9)),  # the centre is at 1, not at 0
        ((0.5, 0.0, 0.0), range(28, 32), range(28, 32)),  # the centre is at 32
        ((0.0, 0.5, 0.5), range(0), range(0)),
    ],
)
def test_cutout_paints_a_rectangle(
    cut: tuple[float, float, float], columns: range, rows_: range
) -> None:
    images_BHWC = torch.zeros(1, 32, 32, 3, dtype=torch.uint8)
    expected_BHWC = images_BHWC.clone()
    colour = torch.tensor([125, 123, 114], dtype=torch.uint8)
    expected_BHWC[:, rows_.start : rows_.stop, columns.start : columns.stop] = colour
    cut_B3 = torch.tensor([cut], dtype=torch.float64)
    assert torch.equal(strong.cutout(images_BHWC, cut_B3), expected_BHWC)


def test_draws_are_uniform() -> None:
    draws = draw_strong(0, 28_000, padding=2)
    counts = draws.operation_NK.flatten().bincount(minlength=14)
    assert ((counts - 4000).abs() < 5 * (4000 * 13 / 14) ** 0.5).all()
    both = (draws.operation_NK[:, 0] == draws.operation_NK[:, 1]).double().mean()
    assert abs(both - 1 / 14) < 0.01  # with replacement
    for unit_N in (*draws.value_NK.T, *draws.cut_N3.T):
        assert unit_N.dtype == torch.float64
        assert 0 <= unit_N.min() < 0.001
        assert 0.999 < unit_N.max() < 1
        assert abs(unit_N.mean() - 0.5) < 0.01
    assert draws.top_N.unique().tolist() == draws.left_N.unique().tolist() == [0, 1, 2, 3, 4]
    other = draw_strong(1, 28_000, padding=2)
    assert not torch.equal(draws.operation_NK, other.operation_NK)


# Batches


def device_data(splits: Splits | None = None, **changes: Any) -> DeviceData:
    options: dict[str, Any] = {
        "num_classes": 10,
        "batch_size": 32,
        "seed": 0,
        "device": "cpu",
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
        "strong": True,
    }
    splits = splits or fake(num_classes=10, size=32, train=150, test=30)
    return DeviceData(splits, **(options | changes))


def views(data: DeviceData, epoch: int = 1, start: int = 0) -> Tensor:
    """Return the strong views of an epoch, in the order of its batches."""
    parts = [batch.strong for batch in data.batches(epoch, start)]
    assert all(part is not None for part in parts)
    return torch.cat([part for part in parts if part is not None])


def test_weak_views_are_the_same_with_and_without_strong_ones() -> None:
    one, two = device_data(strong=False), device_data()
    for own, other in zip(one.batches(3), two.batches(3), strict=True):
        assert own.strong is None
        assert same(own[:5], other[:5])
        assert other.strong is not None
        assert other.strong.shape == own.images.shape
        assert other.strong.is_contiguous(memory_format=torch.channels_last)
        assert not torch.equal(own.images, other.strong)


def test_strong_views_depend_on_seed_epoch_and_image_alone() -> None:
    data = device_data()
    whole = views(data)
    assert torch.equal(whole, views(data))
    assert torch.equal(whole, views(device_data(batch_size=48)))
    assert torch.equal(whole[64:], views(data, start=2))
    assert not torch.equal(whole, views(data, epoch=2))
    assert not torch.equal(whole, views(device_data(seed=1)))
    shares = [device_data(rank=rank, ranks=2).batches(1) for rank in (0, 1)]
    together = [torch.cat([a.strong, b.strong]) for a, b in zip(*shares, strict=True)]  # type: ignore[list-item]
    assert torch.equal(whole, torch.cat(together))


def test_a_strong_view_is_a_crop_then_the_operations(photographs: Tensor) -> None:
    labels = torch.arange(len(photographs)) % 10
    splits = Splits(Images(photographs, labels), Images(photographs[:1], labels[:1]))
    data = device_data(splits)
    key = seed_of("seed", 0, "epoch", 1, "view", "strong")
    draws = draw_strong(key, len(photographs), padding=4)
    for batch in data.batches(1):
        index_B = batch.index
        crops = []
        for n in index_B.tolist():
            padded = torch.nn.functional.pad(photographs[n], (0, 0, 4, 4, 4, 4))
            top, left = draws.top_N[n], draws.left_N[n]
            crop = padded[top : top + 32, left : left + 32]
            crops.append(crop.flip(1) if draws.flip_N[n] else crop)
        x_BHWC = strong.rand_augment(
            torch.stack(crops), draws.operation_NK[index_B], draws.value_NK[index_B]
        )
        x_BHWC = strong.cutout(x_BHWC, draws.cut_N3[index_B])
        expected_BCHW = (x_BHWC.permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
        torch.testing.assert_close(batch.strong, expected_BCHW, rtol=0, atol=1e-6)


def test_grey_images_have_no_strong_views() -> None:
    grey = Images(torch.zeros(40, 8, 8, 1, dtype=torch.uint8), torch.arange(40) % 10)
    with pytest.raises(ValueError, match="needs images of 3 channels, not 1"):
        device_data(Splits(grey, grey), mean=[0.5], std=[0.25])


# Streamed batches


def streamed(folder: Path, **changes: Any) -> StreamedData:
    options: dict[str, Any] = {
        "num_classes": 2,
        "batch_size": 10,
        "seed": 0,
        "device": "cpu",
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
        "view": ImageTransform(16),
        "workers": 0,
        "bad": "skip",
        "strong": True,
    }
    return StreamedData(image_folder(str(folder)), **(options | changes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of 28 training images, of which one is damaged."""
    folder = class_folders(tmp_path_factory.mktemp("strong"), 2, 14)
    (folder / "train/class_0/0003.jpg").write_bytes(b"no image")
    return folder


def by_image(data: StreamedData, epoch: int = 1, start: int = 0) -> dict[int, Tensor]:
    """Return the two views of each image by its place in the order of the epoch."""
    both = [
        torch.stack([weak, strong])
        for batch in data.batches(epoch, start)
        if batch.strong is not None
        for weak, strong in zip(batch.images, batch.strong, strict=True)
    ]
    return dict(enumerate(both, start * 10))


def test_streamed_strong_views_depend_on_seed_epoch_and_image_alone(folder: Path) -> None:
    whole = by_image(streamed(folder))
    assert len(whole) == 28
    assert same(whole, by_image(streamed(folder, batch_size=9)))
    assert same({n: whole[n] for n in range(10, 28)}, by_image(streamed(folder), start=1))
    other = by_image(streamed(folder), epoch=2)
    assert not any(torch.equal(whole[n][1], other[n][1]) for n in whole)
    # The weak views are the same without strong ones, the replaced image included.
    one = streamed(folder, strong=False)
    weak = [image for batch in one.batches(1) for image in batch.images]
    assert all(torch.equal(weak[n], both[0]) for n, both in whole.items())
    assert next(iter(one.batches(1))).strong is None
    with torch.inference_mode():
        shown = sum(len(labels) for _, labels in streamed(folder).val_batches())
    assert shown == 2


def test_a_streamed_strong_view_is_a_crop_then_the_operations(folder: Path) -> None:
    data = streamed(folder)
    key = seed_of("seed", 0, "epoch", 1, "view", "strong")
    draws = draw_strong(key, 28, padding=0)
    paths = image_folder(str(folder)).train.paths  # type: ignore[union-attr]
    order = draw_epoch(0, 1, 28, padding=0).order_N.tolist()
    shown = torch.cat([batch.strong for batch in data.batches(1)])  # type: ignore[misc]
    for place, n in enumerate(order):
        # Image 3 is damaged: the next one takes its place, but not its draws.
        path = paths[4] if n == 3 else paths[n]
        job = Job(path, f"seed 0 epoch 1 image {n} view strong")
        x_BHWC = decode(job, ImageTransform(16))[0][None]
        if draws.flip_N[n]:
            x_BHWC = x_BHWC.flip(2)
        one = slice(n, n + 1)
        x_BHWC = strong.rand_augment(x_BHWC, draws.operation_NK[one], draws.value_NK[one])
        x_BHWC = strong.cutout(x_BHWC, draws.cut_N3[one])
        expected_BCHW = (x_BHWC.permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
        torch.testing.assert_close(shown[place : place + 1], expected_BCHW, rtol=0, atol=1e-6)


# Jobs


def test_views_change_the_job_but_not_its_group(tmp_path: Path) -> None:
    weak = composed(tmp_path, "recipe=kd")
    both = composed(tmp_path, "recipe=kd", "dataset.views=weak_strong")
    assert cfg.config_hash(weak) != cfg.config_hash(both)
    assert cfg.sharing_key(weak) == cfg.sharing_key(both)
    assert cfg.teacher_job(weak) == cfg.teacher_job(both)
    explicit = composed(tmp_path, "recipe=kd", "dataset.views=weak")
    assert cfg.config_hash(weak) == cfg.config_hash(explicit)


def test_a_job_that_needs_two_views_is_refused_with_one(tmp_path: Path) -> None:
    job = tiny(tmp_path, "recipe=mlkd", "dataset.views=weak")
    networks = [
        build.build_network(model, 10, 0, torch.device("cpu"))
        for model in (job.student.model, job.teacher.model)
    ]
    with pytest.raises(ValueError, match=r"^features=mlkd needs two views of each image; set "):
        build_features(
            job,
            *networks,
            image_CHW=(3, 16, 16),
            labels_N=torch.arange(10),
            device=torch.device("cpu"),
        )


def test_a_job_with_one_view_is_the_same_beside_one_with_two(tmp_path: Path) -> None:
    words = ("trainer.epochs=1", "optimizer.lr=0.01")
    alone, beside = (tiny(tmp_path / place, "recipe=kd", *words) for place in ("alone", "beside"))
    two = tiny(tmp_path / "beside", "recipe=mlkd", *words)
    fit([alone])
    results = fit([beside, two])
    assert [result["status"] for result in results] == ["FINISHED"] * 2, results
    assert rows(alone) == rows(beside)
    assert same(final(alone), final(beside))
    (row,) = rows(two)
    assert row["train/loss"] == pytest.approx(
        0.1 * row["train/loss_ce"] + row["train/loss_mlkd"], rel=1e-5
    )


# MixUp and CutMix


def test_mixup_is_the_weighted_sum() -> None:
    x_BCHW = torch.randn(5, 3, 4, 6, dtype=torch.float64)
    mix = strong.draw_mix(seed=7, size=5, alpha=0.4)
    assert sorted(mix.partner_B.tolist()) == [0, 1, 2, 3, 4]
    mixed_BCHW, share = strong.mixup(x_BCHW, mix)
    assert 0 <= share <= 1
    for own, other, mixed in zip(x_BCHW, x_BCHW[mix.partner_B], mixed_BCHW, strict=True):
        torch.testing.assert_close(mixed, share * own + (1 - share) * other)
    assert same(list(mix), list(strong.draw_mix(seed=7, size=5, alpha=0.4)))
    assert mix.share != strong.draw_mix(seed=8, size=5, alpha=0.4).share


@pytest.mark.parametrize("seed", range(6))
def test_cutmix_takes_a_box_from_the_partner(seed: int) -> None:
    x_BCHW = torch.arange(1.0, 6)[:, None, None, None].expand(5, 3, 10, 12)
    mix = strong.draw_mix(seed=seed, size=5)
    mixed_BCHW, share = strong.cutmix(x_BCHW, mix)
    part = (1 - mix.share) ** 0.5
    middle = int(mix.row * 10), int(mix.column * 12)
    halves = int(part * 10) // 2, int(part * 12) // 2
    own = 0
    for row in range(10):
        for column in range(12):
            boxed = all(
                at - half <= place < at + half
                for place, at, half in zip((row, column), middle, halves, strict=True)
            )
            own += not boxed
            source = x_BCHW[mix.partner_B] if boxed else x_BCHW
            assert torch.equal(mixed_BCHW[:, :, row, column], source[:, :, row, column])
    assert share == pytest.approx(own / 120)


def test_the_share_follows_the_beta_distribution() -> None:
    shares = torch.tensor([strong.draw_mix(seed, 2, alpha=0.5).share for seed in range(2000)])
    assert abs(shares.mean() - 0.5) < 0.03
    assert abs(shares.var() - 0.125) < 0.01  # 1 / (4 (2 alpha + 1))
    with pytest.raises(ValueError, match="alpha=0 must be greater than 0"):
        strong.draw_mix(0, 2, alpha=0)
