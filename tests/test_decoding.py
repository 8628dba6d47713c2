"""Test the decoding of image files.

The pixels must be those of torchvision, with and without workers, and every fault of a file must
be named.
"""

import multiprocessing
import os
import random
import signal
import subprocess
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import resized_crop

from sddlskd.data.decoding import (
    CHUNK,
    Chunk,
    ImageTransform,
    Job,
    Unreadable,
    decode,
    decode_all,
    decoded,
    default_workers,
    random_crop,
)
from tests.photographs import photograph

SIZE = 32
KEPT: list[Iterator[Chunk]] = []  # iterators that exist until their process ends
processes = multiprocessing.get_context("fork")
VIEW = ImageTransform(SIZE)


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return paths of small photographs, of which half are wide and half are tall."""
    folder = tmp_path_factory.mktemp("jpegs")
    paths = []
    for seed in range(20):
        path = folder / f"{seed}.jpg"
        photograph(seed, *((60, 45) if seed % 2 else (45, 60))).save(path, quality=90)
        paths.append(str(path))
    return paths


def jobs(paths: list[str]) -> list[Job]:
    return [Job(path, f"seed 0 epoch 1 image {n}") for n, path in enumerate(paths)]


def pieces(jobs: list[Job], size: int) -> Iterator[list[Job]]:
    return (jobs[first : first + size] for first in range(0, len(jobs), size))


def pixels(chunks: Iterator[Chunk]) -> torch.Tensor:
    return torch.cat([chunk.pixels_BHWC.clone() for chunk in chunks])


def as_tensor(path: str) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)


def test_a_random_crop_is_torchvisions(jpegs: list[str]) -> None:
    """Compare with the same crop of the whole image, resized by torchvision's v2.

    The result must equal that of uint8 tensors bit for bit, because no file is decoded at a smaller
    scale here. It may differ from the result of PIL images by two levels of 255.
    """
    for job in jobs(jpegs):
        image = Image.open(job.path)
        assert job.draw
        left, top, width, height = random_crop(random.Random(job.draw), *image.size, VIEW.area)
        ours_HWC, odd = decode(job, VIEW)
        theirs_CHW = resized_crop(
            as_tensor(job.path), top, left, height, width, [SIZE, SIZE], antialias=True
        )
        assert torch.equal(ours_HWC, theirs_CHW.permute(1, 2, 0))
        pil = np.array(resized_crop(image, top, left, height, width, [SIZE, SIZE]), dtype=int)
        apart = abs(pil - ours_HWC.numpy())
        assert apart.max() <= 2
        assert apart.mean() < 0.5
        assert odd == []


@pytest.mark.parametrize("centre", [0.875, 1.0])
def test_the_centre_crop_is_torchvisions(jpegs: list[str], centre: float) -> None:
    transform = v2.Compose([v2.Resize(round(SIZE / centre), antialias=True), v2.CenterCrop(SIZE)])
    for path in jpegs:
        ours_HWC, _ = decode(Job(path, None), ImageTransform(SIZE, centre=centre))
        assert torch.equal(ours_HWC, transform(as_tensor(path)).permute(1, 2, 0))
        pil = np.array(transform(Image.open(path)), dtype=int)
        apart = abs(pil - ours_HWC.numpy())
        assert apart.max() <= 2
        assert apart.mean() < 0.5


def test_squeezed_crops_are_torchvisions(jpegs: list[str]) -> None:
    """Compare with SDD's transforms for CUB-200, on images that are not square.

    Those are Resize((side, side)), then RandomCrop(size) in training and CenterCrop(size) in
    evaluation. A random crop must be one of torchvision's, each place must be possible, and the
    crop must not depend on the pixels.
    """
    view = ImageTransform(SIZE, centre=SIZE / (SIZE + 3), squeezed=True)
    whole = v2.Resize((SIZE + 3, SIZE + 3), antialias=True)
    places = set()
    for n, path in enumerate(jpegs):
        image = as_tensor(path)
        assert image.shape[1] != image.shape[2]
        centre_HWC = v2.CenterCrop(SIZE)(whole(image)).permute(1, 2, 0)
        assert torch.equal(decode(Job(path, None), view)[0], centre_HWC)
        for draw in range(30):
            crop_HWC, _ = decode(Job(path, f"image {n} draw {draw}"), view)
            found = [
                (top, left)
                for top in range(4)
                for left in range(4)
                if torch.equal(
                    crop_HWC, whole(image)[:, top : top + SIZE, left : left + SIZE].permute(1, 2, 0)
                )
            ]
            assert found
            places.update(found)
    assert places == {(top, left) for top in range(4) for left in range(4)}


def test_large_jpegs_are_decoded_at_a_smaller_scale_and_look_the_same(tmp_path: Path) -> None:
    """Compare with torchvision at full scale, on an image with the spectrum of a photograph.

    The mean difference must be less than 2 of 255 levels.
    """
    path = str(tmp_path / "large.jpg")
    photograph(1, 601, 403).save(path, quality=90)
    shrunk = 0
    for n in range(20):
        job = Job(path, f"seed 0 epoch 1 image {n}")
        assert job.draw
        left, top, width, height = random_crop(random.Random(job.draw), 601, 403, VIEW.area)
        shrunk += min(width, height) >= 4 * SIZE
        theirs_CHW = resized_crop(
            as_tensor(path), top, left, height, width, [SIZE, SIZE], antialias=True
        )
        apart = (decode(job, VIEW)[0].permute(2, 0, 1).int() - theirs_CHW.int()).abs().float()
        assert apart.mean() < 2
        assert decode(job, VIEW)[0].shape == (SIZE, SIZE, 3)
    assert shrunk > 10


def test_crops_are_drawn_as_torchvision_draws_them() -> None:
    """Compare means and extremes of our crops with those of torchvision's.

    Areas are uniform in 0.08..1, ratios log-uniform in 3/4..4/3, and corners uniform. The image is
    square, so that few tries fail.
    """
    image = torch.zeros(3, 400, 400)
    ours = np.array(
        [random_crop(random.Random(f"image {n}"), 400, 400, (0.08, 1.0)) for n in range(4000)],
        dtype=float,
    )
    torch.manual_seed(0)
    drawn = [v2.RandomResizedCrop(8, antialias=True).make_params([image]) for _ in range(4000)]
    theirs = np.array([[p["left"], p["top"], p["width"], p["height"]] for p in drawn], dtype=float)
    error = np.sqrt(ours.var(0) + theirs.var(0)) / np.sqrt(4000)
    assert (abs(ours.mean(0) - theirs.mean(0)) < 5 * error).all()
    for crops in (ours, theirs):
        left, top, width, height = crops.T
        assert (left >= 0).all()
        assert (top >= 0).all()
        assert (left + width <= 400).all()
        assert (top + height <= 400).all()
        assert 0.0795 < (width * height / 400**2).min() < 0.09
        assert (width / height).max() < 4 / 3 + 0.02
        assert (width / height).min() > 3 / 4 - 0.02


@pytest.mark.parametrize(
    ("size", "crop"), [((1000, 10), (493, 0, 13, 10)), ((10, 1000), (0, 493, 10, 13))]
)
def test_an_image_that_no_crop_fits_in_gives_its_centre(
    size: tuple[int, int], crop: tuple[int, ...]
) -> None:
    assert random_crop(random.Random(0), *size, (0.9, 1.0)) == crop


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (200, 1), (3, 2)])
def test_the_smallest_images_are_shown(tmp_path: Path, size: tuple[int, int]) -> None:
    path = str(tmp_path / "small.png")
    Image.new("RGB", size, (10, 20, 30)).save(path)
    for draw in (None, "a"):
        pixels_HWC, _ = decode(Job(path, draw), VIEW)
        assert pixels_HWC.shape == (SIZE, SIZE, 3)
        assert pixels_HWC.unique(dim=1)[0].tolist() == [[10, 20, 30]]


@pytest.mark.parametrize(
    ("size", "there"), [((1, 6000), "256x1536000"), ((6000, 1), "1536000x256")]
)
def test_a_strip_that_would_be_enlarged_beyond_measure_is_refused(
    tmp_path: Path, size: tuple[int, int], there: str
) -> None:
    Image.new("RGB", size).save(tmp_path / "strip.png")
    with pytest.raises(
        Unreadable, match=f"{size[0]}x{size[1]} become {there} .* more than 100000000 pixels"
    ):
        decode(Job(str(tmp_path / "strip.png"), None), ImageTransform(224))
    # A random crop is never enlarged to more than the output.
    assert decode(Job(str(tmp_path / "strip.png"), "0"), ImageTransform(224))[0].shape == (
        224,
        224,
        3,
    )
    assert decode(Job(str(tmp_path / "strip.png"), None), ImageTransform(4))[0].shape == (4, 4, 3)


@pytest.mark.parametrize(
    ("told", "ranks", "workers"),
    [
        ({}, 1, 12),
        ({}, 4, 3),
        ({"LOCAL_WORLD_SIZE": "4"}, 16, 3),  # 16 ranks on four machines
        ({"LOCAL_WORLD_SIZE": "4"}, 1, 12),
        ({"LOCAL_WORLD_SIZE": "4", "SLURM_CPUS_PER_TASK": "6", "SLURM_NTASKS": "16"}, 16, 6),
        ({"SLURM_CPUS_PER_TASK": "8"}, 1, 8),
        # Four ranks inside one task
        ({"SLURM_CPUS_PER_TASK": "8", "SLURM_NTASKS": "1", "LOCAL_WORLD_SIZE": "4"}, 4, 2),
        ({"LOCAL_WORLD_SIZE": "40"}, 40, 1),
    ],
)
def test_workers_are_as_many_as_a_ranks_own_cores(
    told: dict[str, str], ranks: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    for key in ("LOCAL_WORLD_SIZE", "SLURM_CPUS_PER_TASK", "SLURM_NTASKS"):
        monkeypatch.delenv(key, raising=False)
    for key, value in told.items():
        monkeypatch.setenv(key, value)
    assert default_workers(ranks) == workers


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_and_chunks_do_not_change_a_bit(jpegs: list[str], workers: int) -> None:
    alone = torch.stack([decode(job, VIEW)[0] for job in jobs(jpegs)])
    for size in (3, CHUNK):
        assert torch.equal(pixels(decoded(pieces(jobs(jpegs), size), VIEW, workers=workers)), alone)
    assert torch.equal(pixels(decoded(pieces(jobs(jpegs), 7), VIEW, workers=0)), alone)


def test_what_an_evaluation_began_to_read_is_read_on_without_it(jpegs: list[str]) -> None:
    given = decoded(pieces(jobs(jpegs), 4), VIEW, workers=0)
    with torch.inference_mode():
        first = next(given).pixels_BHWC.clone()
    assert torch.equal(
        torch.cat([first, pixels(given)]), pixels(decoded(pieces(jobs(jpegs), 4), VIEW, workers=0))
    )


# Images that can be read but are unusual

COLOUR = (200, 100, 50)


def grey(path: Path) -> None:
    Image.new("L", (40, 40), 77).save(path.with_suffix(".jpg"))


def grey_alpha(path: Path) -> None:
    Image.new("LA", (40, 40), (77, 3)).save(path.with_suffix(".png"))


def palette(path: Path) -> None:
    Image.new("RGB", (40, 40), COLOUR).quantize(4).save(path.with_suffix(".png"))


def alpha(path: Path) -> None:
    Image.new("RGBA", (40, 40), (*COLOUR, 128)).save(path.with_suffix(".png"))


def deep(path: Path) -> None:
    Image.fromarray(np.full((40, 40), 77 * 256 + 200, dtype=np.uint16)).save(
        path.with_suffix(".png")
    )


def cmyk(path: Path) -> None:
    # Pillow writes an Adobe marker and inverted values, as Photoshop does.
    Image.new("CMYK", (40, 40), (55, 155, 205, 0)).save(path.with_suffix(".jpg"), quality=100)


def misnamed(path: Path) -> None:
    Image.new("RGB", (40, 40), COLOUR).save(path.with_suffix(".jpg"), format="PNG")


def bitmap(path: Path) -> None:
    Image.new("1", (40, 40), 1).save(path.with_suffix(".png"))


@pytest.mark.parametrize(
    ("make", "odd", "colour"),
    [
        (grey, "grey", (77,) * 3),
        (grey_alpha, "alpha", (77,) * 3),
        (palette, "palette", COLOUR),
        (alpha, "alpha", COLOUR),
        (deep, "16 bits", (77,) * 3),
        (cmyk, "CMYK", COLOUR),
        (misnamed, "PNG named as JPEG", COLOUR),
        (bitmap, "black and white", (255,) * 3),
    ],
)
def test_unusual_images_are_converted_and_named(
    tmp_path: Path, make: Callable[[Path], None], odd: str, colour: tuple[int, ...]
) -> None:
    make(tmp_path / "image")
    (path,) = tmp_path.iterdir()
    for draw in (None, "a"):
        pixels_HWC, found = decode(Job(str(path), draw), VIEW)
        assert found == [odd]
        assert (pixels_HWC.int() - torch.tensor(colour)).abs().max() <= 2
    # Pillow converts 16 bits differently: it clips large values.
    if make is not deep:
        theirs = np.array(Image.open(path).convert("RGB").resize((SIZE, SIZE)), dtype=int)
        assert abs(theirs - pixels_HWC.numpy()).max() <= 1


def test_an_image_is_turned_only_where_that_is_asked_for(tmp_path: Path) -> None:
    path, exif = str(tmp_path / "turned.jpg"), Image.Exif()
    exif[0x0112] = 6  # orientation: the first stored row is the right side of the image
    image = photograph(3, 64, 64)
    image.save(path, quality=95, exif=exif)
    stored, odd = decode(Job(path, None), ImageTransform(64, centre=1.0))
    upright, odd_too = decode(Job(path, None), ImageTransform(64, centre=1.0, upright=True))
    assert odd == odd_too == ["EXIF orientation 6"]
    assert torch.equal(stored, torch.from_numpy(np.array(Image.open(path))))
    assert torch.equal(upright, stored.rot90(-1))
    image.save(path, quality=95, exif=Image.Exif())
    assert decode(Job(path, None), ImageTransform(64, upright=True))[1] == []


# Files that cannot be read


def garbage(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 20)


def truncated(path: Path) -> None:
    photograph(0, 200, 150).save(path, quality=90)
    path.write_bytes(path.read_bytes()[:4000])


def header_only(path: Path) -> None:
    photograph(0, 200, 150).save(path, quality=90)
    path.write_bytes(path.read_bytes()[:170])


def broken_png(path: Path) -> None:
    photograph(0, 200, 150).save(path, format="PNG")
    content = bytearray(path.read_bytes())
    content[3000:3400] = bytes(400)
    path.write_bytes(content)


def text(path: Path) -> None:
    path.write_text("<html>404 Not Found</html>")


def directory(path: Path) -> None:
    path.mkdir()


def dangling(path: Path) -> None:
    path.symlink_to(path.with_name("nothing"))


def loop(path: Path) -> None:
    path.symlink_to(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def floats(path: Path) -> None:
    Image.fromarray(np.zeros((4, 4), dtype=np.float32)).save(path, format="TIFF")


def bomb(path: Path) -> None:
    """Write a PNG of 68 bytes whose header claims 60,000 x 60,000 pixels."""
    Image.new("L", (1, 1)).save(path, format="PNG")
    content = bytearray(path.read_bytes())
    content[16:24] = (60_000).to_bytes(4) * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (Path.touch, "the file is empty"),
        (garbage, "cannot identify image file"),
        (text, "cannot identify image file"),
        (truncated, "image file is truncated"),
        (header_only, "Truncated File Read"),
        (broken_png, "unrecognized data stream"),
        (directory, "it is not a regular file"),
        (os.mkfifo, "it is not a regular file"),
        (device, "it is not a regular file"),
        (dangling, "No such file or directory"),
        (loop, "Too many levels of symbolic links"),
        (floats, "its pixels are floating-point numbers"),
        (bomb, "60000x60000 are more than 100000000 pixels (dataset.pixel_limit)"),
    ],
)
def test_what_cannot_be_read_says_why(
    tmp_path: Path, make: Callable[[Path], None], why: str
) -> None:
    path = tmp_path / "image.jpg"
    make(path)
    for draw in (None, "a"):
        with pytest.raises(Unreadable) as raised:
            decode(Job(str(path), draw), VIEW)
        assert str(raised.value).startswith(why)
        assert "\n" not in str(raised.value)
    (chunk,) = decoded([[Job(str(path), None)]], VIEW, workers=0)
    assert [(fault.place, fault.bad) for fault in chunk.faults] == [(0, True)]
    assert chunk.pixels_BHWC.sum() == 0


def test_a_file_that_may_not_be_read_says_so(tmp_path: Path, jpegs: list[str]) -> None:
    path = tmp_path / "closed.jpg"
    path.write_bytes(Path(jpegs[0]).read_bytes())
    path.chmod(0)

    def look() -> None:
        os.chdir(tmp_path)
        if os.getuid() == 0:
            os.setuid(65534)  # give up root, who may read every file
        with pytest.raises(Unreadable, match=r"^Permission denied$"):
            decode(Job("closed.jpg", None), VIEW)

    process = processes.Process(target=look)
    process.start()
    process.join()
    assert process.exitcode == 0


def test_pillows_own_limit_neither_warns_nor_is_changed(
    jpegs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Pillow warns above this limit and refuses images above twice the limit.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for width in (40, 60):
        path = str(tmp_path / f"{width}.png")
        Image.new("RGB", (width, 40)).save(path)
        assert decode(Job(path, None), ImageTransform(8))[0].shape == (8, 8, 3)
    with pytest.raises(Unreadable, match="60x40 are more than 2399 pixels"):
        decode(Job(path, None), ImageTransform(8, pixel_limit=2399))
    assert Image.MAX_IMAGE_PIXELS == 1000


def test_all_files_at_once(jpegs: list[str], tmp_path: Path) -> None:
    images_NHWC = decode_all(jpegs, 32, "photographs", workers=2)
    assert images_NHWC.shape == (20, 32, 32, 3)
    for n, path in enumerate(jpegs):
        assert torch.equal(
            images_NHWC[n], decode(Job(path, None), ImageTransform(32, centre=1.0))[0]
        )
    exact = tmp_path / "exact.jpg"
    photograph(1, 32, 32).save(exact)
    assert torch.equal(
        decode_all([str(exact)], 32, "one", workers=0)[0].permute(2, 0, 1), as_tensor(str(exact))
    )
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(
        ValueError, match=r"empty\.jpg: the file is empty; put the right file there, or remove it"
    ):
        decode_all([*jpegs, str(tmp_path / "empty.jpg")], 32, "photographs", workers=1)


# Workers and signals


def state_and_parent(pid: int | str) -> tuple[str, int]:
    """Return the state and the parent of a process, or ("Z", 0) if the process has ended."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return "Z", 0
    return state, int(parent)


def children() -> set[int]:
    """Return the ids of the child processes of this process, started by any of its threads."""
    pids = [path.name for path in Path("/proc").glob("[0-9]*")]
    return {int(pid) for pid in pids if state_and_parent(pid)[1] == os.getpid()}


def alive(pid: int) -> bool:
    return state_and_parent(pid)[0] != "Z"


def gone(pids: set[int]) -> bool:
    """Return whether these processes end within half a minute."""
    for _ in range(600):
        if not any(map(alive, pids)):
            return True
        time.sleep(0.05)
    return False


def endless(paths: list[str]) -> Iterator[list[Job]]:
    while True:
        yield jobs(paths)[:CHUNK]


def test_a_killed_worker_is_an_error_and_the_others_end(jpegs: list[str]) -> None:
    before = children()
    stream = decoded(endless(jpegs), VIEW, workers=2)
    next(stream)
    workers = children() - before
    assert len(workers) == 2
    with pytest.raises(  # noqa: PT012
        ChildProcessError, match=r"is lost \(.+\); if memory ran out, lower dataset\.workers=2$"
    ):
        os.kill(min(workers), signal.SIGKILL)
        for _ in range(1000):
            next(stream)
    del stream
    assert gone(workers)


def test_signals_for_everybody_are_left_to_the_parent(jpegs: list[str]) -> None:
    before = children()
    stream = decoded(endless(jpegs), VIEW, workers=1)
    next(stream)
    (worker,) = children() - before
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        os.kill(worker, number)
    # The signal comes from another process than the parent, as from SLURM.
    subprocess.run(["kill", "-TERM", str(worker)], check=True)
    for _ in range(20):
        next(stream)
    assert alive(worker)
    os.kill(worker, signal.SIGTERM)  # from its parent, which the worker obeys
    with pytest.raises(ChildProcessError, match="is lost"):  # noqa: PT012
        for _ in range(1000):
            next(stream)
    assert gone({worker})


def test_workers_end_with_the_iterator_and_with_their_parent(jpegs: list[str]) -> None:
    before = children()
    stream = decoded(endless(jpegs), VIEW, workers=2)
    next(stream)
    workers = children() - before
    del stream
    assert gone(workers)

    def read(last_s: float) -> None:
        torch.set_num_threads(1)  # a forked process cannot use the threads of its parent
        KEPT.append(decoded(endless(jpegs), VIEW, workers=2))
        next(KEPT[0])
        send.send(children())
        time.sleep(last_s)

    # The parent is killed, or it ends by itself while the iterator still exists.
    for last_s in (600, 0):
        receive, send = processes.Pipe(duplex=False)
        parent = processes.Process(target=read, args=(last_s,))
        parent.start()
        workers = receive.recv()
        assert len(workers) == 2
        if last_s:
            parent.kill()
        parent.join()
        assert gone(workers)
