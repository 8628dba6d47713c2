"""`python -m sddlskd.teachers`: bring home the teachers that others trained, safely.

    list                        what is published and what is here
    fetch NAME ... | all        leave published teachers where teacher=NAME finds them, for dataset=cifar100 unless
                                another is given; imagenet_... are for dataset=imagenet
    verify NAME ...             measure top-1 on the test split and compare it with what is published
    import FILE --as NAME       the same place for a file of one's own (ours, RepDistiller's or mdistiller's)

Files are taken byte for byte (safetensors: rewritten as .pt), after a check of every key and shape, and pinned by their
sha256 on first use. key=value words override the configuration, such as home=, dataset= or trainer.device=.
"""

import argparse
import hashlib
import os
import re
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import hydra
import torch
from filelock import FileLock
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

from sddlskd import config as cfg
from sddlskd import download, pins
from sddlskd.archive import unpack
from sddlskd.build import build_data, build_network, teacher_path
from sddlskd.checkpoint import load_weights, read_weights, write
from sddlskd.config import Config
from sddlskd.console import explain, log_to_terminal, write_line
from sddlskd.download import DownloadError
from sddlskd.evaluation import evaluate
from sddlskd.files import put
from sddlskd.meter import meter
from sddlskd.precision import pick_device
from sddlskd.streaming import Data
from sddlskd.teacher import Teacher, file_hash, missing, path_of

__all__ = ["PLACES", "PUBLISHED", "fetch", "import_file", "main", "verify"]


class Published(NamedTuple):
    """A teacher that the papers use."""

    top1: float  # % on the test split, as its publisher gives it
    file: str  # in every place; torchvision's have the first digits of their sha256 in the name


PUBLISHED = {  # by data set and name
    "cifar100": {  # Tian et al. (2020), whose README gives the top-1; mdistiller and the papers after it use them
        "resnet32x4": Published(79.42, "resnet32x4_vanilla/ckpt_epoch_240.pth"),
        "wrn_40_2": Published(75.61, "wrn_40_2_vanilla/ckpt_epoch_240.pth"),
        "vgg13": Published(74.64, "vgg13_vanilla/ckpt_epoch_240.pth"),
        "resnet50": Published(79.34, "ResNet50_vanilla/ckpt_epoch_240.pth"),
        "resnet56": Published(72.34, "resnet56_vanilla/ckpt_epoch_240.pth"),
        "resnet110": Published(74.31, "resnet110_vanilla/ckpt_epoch_240.pth"),
    },
    "imagenet": {  # torchvision's IMAGENET1K_V1, which both papers use
        "resnet18": Published(69.76, "resnet18-f37072fd.pth"),
        "resnet34": Published(73.31, "resnet34-b627a593.pth"),
        "resnet50": Published(76.13, "resnet50-0676ba61.pth"),
    },
}
PLACES = {  # an archive with all files of the data set, or an address that /<file> is put behind
    "cifar100": (
        "https://github.com/megvii-research/mdistiller/releases/download/checkpoints/cifar_teachers.tar",
        "http://shape2prog.csail.mit.edu/repo",  # RepDistiller's scripts/fetch_pretrained_teachers.sh
    ),
    "imagenet": ("https://download.pytorch.org/models",),
}
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
LARGEST_ARCHIVE = 2 << 30  # bytes
LARGEST_FILE = 1 << 29  # bytes; resnet50 with its optimizer's state has 190 MB
TOLERANCE = 0.1  # points of top-1: 10 of 10,000 images, more than another device's rounding or JPEG decoder moves
ERRORS = (
    HydraException,
    OmegaConfBaseException,
    ValueError,
    OSError,
    DownloadError,
)  # what a user can mend


def fetch(job: Config, mirrors: Sequence[str] = ()) -> str:
    """Leave the published teacher of the job where `teacher=<name>` finds it; the answer says where it came from.

    mirrors: asked before PLACES, each of either kind. Raises ValueError naming every place and what is wrong with it.
    """
    name = job.teacher.name
    dataset = job.dataset.name
    if name not in PUBLISHED.get(dataset, ()):
        valid = "; ".join(
            f"valid for {known} are {', '.join(of_it)}" for known, of_it in PUBLISHED.items()
        )
        raise ValueError(
            f"no {name} for {dataset} is published; {valid}. "
            f"Train it with `python -m sddlskd.train distiller=vanilla student={name} dataset={dataset}`"
        )
    target = path_of(job.home, dataset, name)
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):  # the same as for training it
        if target.exists():
            if not pins.check(job.home, _key(job), file_hash(target)):
                raise ValueError(
                    f"{target} is there already and was not fetched: it was trained or put there, and runs may have "
                    "learnt from it. Move it away to fetch the published one, or choose another home=..."
                )
            return f"{name} is there already: {target}"
        reasons = []
        for place in (*mirrors, *PLACES[dataset]):
            try:
                return f"{name} from {_fetch_from(place, job, target)}: {target}"
            except (DownloadError, ValueError) as error:
                reasons.append(explain(error))
        raise ValueError(
            f"{name} is not to be had: {'; '.join(reasons)}. Name another place with --mirror URL, "
            f"or get the file and `python -m sddlskd.teachers import FILE --as {name}`"
        )


def _fetch_from(place: str, job: Config, target: Path) -> str:
    """Have the teacher at `target` from one place; gives the address."""
    file, downloads = (
        PUBLISHED[job.dataset.name][job.teacher.name].file,
        target.parent / "downloads",
    )
    address = place if place.endswith(ARCHIVES) else f"{place.rstrip('/')}/{file}"
    kept = (
        downloads
        / f"{hashlib.sha256(address.encode()).hexdigest()[:12]}-{address.rpartition('/')[2]}"
    )
    if address != place:
        download.fetch(address, kept, limit=LARGEST_FILE)
        named = re.search(r"-([0-9a-f]{8})\.pth$", file)
        try:
            if named and not file_hash(kept).startswith(named[1]):
                raise ValueError(
                    f"{address} has sha256 {file_hash(kept)[:16]}..., not the one in its name"
                )
            _install(job, kept, target, address)
        finally:
            kept.unlink(missing_ok=True)  # what was refused is asked for anew next time
        return address
    download.fetch(address, kept, limit=LARGEST_ARCHIVE)
    try:
        sha256 = file_hash(kept)
        pins.check(job.home, address, sha256)
        with TemporaryDirectory(dir=downloads) as folder:
            unpacked = Path(folder, "unpacked")
            unpack(
                kept, unpacked, limit=LARGEST_FILE, wanted=lambda p: f"/{p}".endswith(f"/{file}")
            )
            found = [path for path in unpacked.rglob("*") if path.is_file()]
            if len(found) != 1:
                raise ValueError(f"{address} has {len(found)} files {file}, expected one")
            _install(job, found[0], target, address)
        pins.pin(job.home, address, sha256, address)
    except ValueError:
        kept.unlink()
        raise
    return address  # the archive stays for the other five


def import_file(job: Config, path: Path) -> str:
    """Leave a copy of someone's file where `teacher=<name>` finds it. Raises ValueError if it is not such weights."""
    if not path.is_file():
        raise ValueError(f"{path} is no file; give a file of weights of {job.teacher.name}")
    _check_size(path)
    target = path_of(job.home, job.dataset.name, job.teacher.name)
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"), TemporaryDirectory(dir=target.parent) as folder:
        copy = Path(folder, target.name)
        if path.suffix == ".safetensors":
            write(copy, {"model": read_weights(path)})
        else:
            shutil.copyfile(path, copy)
        if target.exists():
            if file_hash(target) != file_hash(copy):
                raise ValueError(
                    f"{target} is there already and is another file; runs may have learnt from it. "
                    "Move it away first, or choose another home=..."
                )
            return f"{job.teacher.name} is there already: {target}"
        _install(job, copy, target, str(path.absolute()))
    return f"{job.teacher.name} from {path}: {target}"


def _install(job: Config, came: Path, target: Path, source: str) -> None:
    """Move a file to `target` if it holds the job's teacher and is what was pinned, and pin it if nothing was."""
    network = build_network(job.teacher.model, job.dataset.num_classes, 0, torch.device("cpu"))
    try:
        _check_size(came)
        load_weights(network, came, job.teacher.name)
    except ValueError as error:
        raise ValueError(str(error).replace(str(came), source)) from error
    spoilt = [name for name, value in network.state_dict().items() if not value.isfinite().all()]
    if spoilt:
        raise ValueError(
            f"{source} holds values that are not finite, in {', '.join(spoilt[:3])}; get it again"
        )
    pins.pin(job.home, _key(job), file_hash(came), source)
    try:
        put(came, target)
    except FileExistsError:
        raise ValueError(
            f"{target} has come meanwhile from a run that trained it; move it away to have the one from {source}"
        ) from None


def _check_size(path: Path) -> None:
    """ValueError for a file larger than any teacher, also once a zip is inflated."""
    size = path.stat().st_size
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                size = max(size, sum(member.file_size for member in archive.infolist()))
        except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError):
            return  # whoever reads it says what is wrong
    if size > LARGEST_FILE:
        raise ValueError(
            f"{path} has {size} bytes, and a teacher has at most {LARGEST_FILE}; save its state_dict alone"
        )


def _key(job: Config) -> str:
    return pins.key_of(job.dataset.name, job.teacher.name)


def verify(job: Config, test_split: Callable[[], Data]) -> str:
    """The top-1 of the job's teacher beside what is published; ValueError where they differ by more than TOLERANCE."""
    path, name = teacher_path(job), job.teacher.name
    if not path.exists():
        raise missing(path, name, job.dataset.name)
    if not job.teacher.checkpoint:
        pins.check(job.home, _key(job), file_hash(path))
    device = pick_device(job.trainer.device)
    network = build_network(job.teacher.model, job.dataset.num_classes, 0, device)
    teacher = Teacher(
        network, path, name=name, device=device, precision=job.trainer.precision, compile=False
    )
    data = test_split()

    def seen() -> Iterator[tuple[Tensor, Tensor]]:
        done = 0
        with meter(f"{name} on {job.dataset.name}", data.test_size, "images") as show:
            for images_BCHW, target_B in data.test_batches():
                yield images_BCHW, target_B
                show(done := done + len(target_B))

    top1 = evaluate(teacher, seen())["top1"]
    published = PUBLISHED.get(job.dataset.name, {}).get(name)
    if published is None:
        return (
            f"{name}: top-1 {top1:.2f} on {job.dataset.name}; nothing is published to compare with"
        )
    if round(abs(top1 - published.top1), 4) > TOLERANCE:
        raise ValueError(
            f"{name}: top-1 {top1:.2f} on {job.dataset.name}, published is {published.top1:.2f}: {path} was trained "
            f"otherwise, or the data differs. Remove it and its entry {_key(job)} in {pins.lock_path(job.home)}, "
            "and fetch it again"
        )
    return f"{name}: top-1 {top1:.2f} on {job.dataset.name}, as published ({published.top1:.2f})"


def table(home: str) -> str:
    """The published teachers, and those that are here, as a table."""
    from rich.console import Console
    from rich.table import Table

    rows = Table(title=f"teachers of {home}", title_justify="left")
    for column in ("data set", "network", "published top-1", "file", "source"):
        rows.add_column(column, overflow="fold")
    known = pins.pinned(home)
    here = {
        f"{path.parent.name}/{path.stem}": path for path in Path(home, "teachers").glob("*/*.pt")
    }
    listed = [f"{dataset}/{name}" for dataset, of_it in PUBLISHED.items() for name in of_it]
    for key in dict.fromkeys([*listed, *sorted(here)]):
        dataset, _, name = key.partition("/")
        published = PUBLISHED.get(dataset, {}).get(name)
        source = known[key]["source"] if key in known else ""
        if key not in here:
            state = "not here"
        elif key not in known:
            state, source = "here", "trained here, or put there"
        else:
            state = (
                "here, as pinned"
                if file_hash(here[key]) == known[key]["sha256"]
                else "here, CHANGED"
            )
        rows.add_row(dataset, name, f"{published.top1:.2f}" if published else "", state, source)
    console = Console()
    with console.capture() as text:
        console.print(rows)
    return text.get().rstrip()


def _job(name: str, overrides: Sequence[str]) -> Config:
    """The configuration of one teacher, as a training would compose it."""
    if name.startswith("imagenet_"):
        overrides = ["dataset=imagenet", *overrides]
    with hydra.initialize_config_module("sddlskd.conf", version_base="1.3"):
        return cfg.resolve(
            hydra.compose("config", overrides=["tracking=none", f"teacher={name}", *overrides])
        )


def _data(job: Config) -> Data:
    return build_data(job, pick_device(job.trainer.device))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m sddlskd.teachers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=["list", "fetch", "verify", "import"])
    parser.add_argument("words", nargs="*", metavar="NAME | FILE | key=value")
    parser.add_argument(
        "--as", dest="name", metavar="NAME", help="import: the network whose weights they are"
    )
    parser.add_argument(
        "--mirror", action="append", default=[], metavar="URL",
        help="fetch: a place to ask first, an archive or a folder as RepDistiller's; also in SDDLSKD_TEACHER_MIRRORS",
    )  # fmt: skip
    chosen = parser.parse_intermixed_args(arguments)
    words = [word for word in chosen.words if "=" not in word]
    overrides = [word for word in chosen.words if "=" in word]
    file = ""
    if chosen.command == "list":
        words = ["resnet32x4"]  # any: the home is that of the configuration
    elif chosen.command == "import":
        if len(words) != 1 or not chosen.name:
            parser.error("give one file and its network: import FILE --as NAME")
        file, words = words[0], [chosen.name]
    elif not words:
        parser.error(f"{chosen.command} what? Give names, such as {chosen.command} resnet32x4")
    if chosen.command == "fetch" and words == ["all"]:
        dataset = dict(word.split("=", 1) for word in overrides).get("dataset", "cifar100")
        prefix = "imagenet_" if dataset == "imagenet" else ""  # as conf/teacher calls them
        words = [prefix + name for name in PUBLISHED.get(dataset, PUBLISHED["cifar100"])]
    cfg.frame()
    log_to_terminal()
    mirrors = [*chosen.mirror, *os.environ.get("SDDLSKD_TEACHER_MIRRORS", "").split()]
    splits: dict[str, Data] = {}  # one for all that are verified on a data set

    def split(job: Config) -> Data:
        if job.dataset.name not in splits:
            splits[job.dataset.name] = _data(job)
        return splits[job.dataset.name]

    acts: dict[str, Callable[[Config], str]] = {
        "list": lambda job: table(job.home),
        "fetch": lambda job: fetch(job, mirrors),
        "verify": lambda job: verify(job, lambda: split(job)),
        "import": lambda job: import_file(job, Path(file)),
    }
    failed = False
    try:
        for name in words:
            try:
                write_line(acts[chosen.command](_job(name, overrides)))
            except ERRORS as error:
                failed = True
                sys.stderr.write(f"error: {explain(error)}\n")
    except KeyboardInterrupt:
        sys.stderr.write("stopped; the same command continues where it stopped\n")
        sys.exit(130)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
