"""Fetch, verify and import trained teachers: `python -m sddlskd.teachers COMMAND`.

Commands:
    list                        show the published teachers and the local ones
    fetch NAME ... | all        download published teachers to the place that teacher=NAME reads;
                                for dataset=cifar100 unless another dataset is given; the names
                                imagenet_... are for dataset=imagenet
    verify NAME ...             measure top-1 on the test split and compare it with the published
                                value
    import FILE --as NAME       copy your own weights file to the same place (a file written by
                                this package, RepDistiller or mdistiller)

Files are copied byte for byte (safetensors files are rewritten as .pt) after a check of every key
and shape. The sha256 of a file is noted (pinned) when the file first comes; a file that differs
later is refused. Arguments of the form key=value override the configuration, for example home=,
dataset= or trainer.device=.
"""

import argparse
import hashlib
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import hydra
import torch
from filelock import FileLock
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from sddlskd import config as cfg
from sddlskd.config import Config
from sddlskd.data.streaming import Data
from sddlskd.files import download
from sddlskd.files.archive import unpack
from sddlskd.files.checkpoint import load_weights, read_weights, write
from sddlskd.files.download import DownloadError
from sddlskd.processes.exit_codes import ExitCode
from sddlskd.terminal.arguments import other_form
from sddlskd.terminal.console import explain, log_to_terminal, refuse_another_checkout, write_line
from sddlskd.terminal.layout import fitting_table
from sddlskd.training import teacher_files
from sddlskd.training.build import build_data, build_network, present_fingerprint
from sddlskd.training.checks import check_teacher_data, missing_teacher, teacher_path
from sddlskd.training.devices import pick_device
from sddlskd.training.evaluation import evaluate, metered_test_batches
from sddlskd.training.teacher import Teacher
from sddlskd.training.teacher_files import (
    PUBLISHED,
    choice_of,
    file_hash,
    path_of,
    pin_key,
)

__all__ = ["PLACES", "PUBLISHED", "fetch", "import_file", "main", "verify"]

log = logging.getLogger(__name__)


# Addresses by data set: an archive of all its files, or a base URL to which /<file> is appended.
PLACES = {
    "cifar100": (
        "https://github.com/megvii-research/mdistiller/releases/download/checkpoints/"
        "cifar_teachers.tar",
        # from RepDistiller's scripts/fetch_pretrained_teachers.sh
        "http://shape2prog.csail.mit.edu/repo",
    ),
    "imagenet": ("https://download.pytorch.org/models",),
}
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
LARGEST_ARCHIVE = 2 << 30  # bytes
# In percentage points of top-1: 10 of 10,000 images. This is more than the rounding or the JPEG
# decoder of another device changes.
TOLERANCE = 0.1
# Errors that a user can fix.
ERRORS = (HydraException, OmegaConfBaseException, ValueError, OSError, DownloadError)


def fetch(job: Config, mirrors: Sequence[str] = ()) -> str:
    """Download a published teacher to the path <home>/teachers/<data set>/<network>.pt.

    The file's sha256 is noted in <home>/teachers/lock.json. If the path has the file with the noted
    sha256 already, nothing is downloaded.

    Args:
        job: configuration that names the home folder, the data set and the teacher's network.
        mirrors: addresses to try before those of `PLACES`: each is the URL of an archive, or a base
            URL to which the teacher's file name is appended.

    Returns:
        A line for the user that says where the teacher came from and where its file is.

    Raises:
        ValueError: If no such teacher is published, if the path has another file or one without a
            noted sha256, if no address delivers the teacher, or if lock.json is damaged.
        OSError: If the file cannot be written.
    """
    name = job.teacher.name
    dataset = job.dataset.name
    if name not in PUBLISHED.get(dataset, ()):
        valid = "; ".join(
            f"valid for {known} are {', '.join(of_it)}" for known, of_it in PUBLISHED.items()
        )
        raise ValueError(
            f"no {name} for {dataset} is published; {valid}. Train it with "
            f"`python -m sddlskd.train distiller=vanilla student={name} dataset={dataset}`"
        )
    target = path_of(job.home, dataset, name)
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):  # the training of a missing teacher uses the same lock
        if target.exists():
            if not teacher_files.check_pin(job.home, pin_key(dataset, name), file_hash(target)):
                raise ValueError(
                    f"{target} already exists but was not fetched: it was trained here or copied "
                    "there, and runs may have learnt from it. Move it away to fetch the published "
                    "one, or choose another home=..."
                )
            return f"{name} already exists: {target}"
        reasons = []
        for place in (*mirrors, *PLACES[dataset]):
            try:
                return f"{name} from {_fetch_from(place, job)}: {target}"
            except (DownloadError, ValueError) as error:
                reasons.append(explain(error))
        raise ValueError(
            f"{name} could not be fetched: {'; '.join(reasons)}. "
            "Give another place with --mirror URL, or get the file yourself and run "
            f"`python -m sddlskd.teachers import FILE --as {name}`"
        )


def _fetch_from(place: str, job: Config) -> str:
    """Download the job's teacher from one place, install it, and return the address used.

    Raise DownloadError or ValueError if this place does not deliver the teacher.
    """
    file = PUBLISHED[job.dataset.name][job.teacher.name].file
    address = place if place.endswith(ARCHIVES) else f"{place.rstrip('/')}/{file}"
    digest = hashlib.sha256(address.encode()).hexdigest()[:12]
    downloads = path_of(job.home, job.dataset.name, job.teacher.name).parent / "downloads"
    kept = downloads / f"{digest}-{address.rpartition('/')[2]}"
    if address == place:
        _fetch_from_archive(address, file, job, kept)
    else:
        _fetch_file(address, job, kept)
    return address


def _fetch_file(address: str, job: Config, kept: Path) -> None:
    """Download the job's teacher to the file `kept`, install it from there, and delete `kept`."""
    download.download_file(address, kept, limit=teacher_files.LARGEST_FILE)
    named = re.search(r"-([0-9a-f]{8})\.pth$", address)
    try:
        if named and not file_hash(kept).startswith(named[1]):
            raise ValueError(
                f"{address} has sha256 {file_hash(kept)[:16]}..., not the one in its name"
            )
        _install(job, kept, address)
    finally:
        kept.unlink(missing_ok=True)  # so that the next try downloads a rejected file again


def _fetch_from_archive(address: str, file: str, job: Config, kept: Path) -> None:
    """Download an archive to `kept`, and install the job's teacher from it.

    The archive is kept, because it contains the data set's other teachers as well, unless it cannot
    be used.

    Args:
        address: URL of the archive.
        file: end of the teacher's path in the archive.
        job: configuration whose teacher is installed.
        kept: path of the downloaded archive.

    Raises:
        DownloadError: If the archive cannot be downloaded.
        ValueError: If the archive differs from its pinned sha256, is not safe to unpack, or does
            not hold the teacher exactly once.
    """
    download.download_file(address, kept, limit=LARGEST_ARCHIVE)
    try:
        sha256 = file_hash(kept)
        teacher_files.check_pin(job.home, address, sha256)
        with TemporaryDirectory(dir=kept.parent) as folder:
            unpacked = Path(folder, "unpacked")
            unpack(
                kept,
                unpacked,
                limit=teacher_files.LARGEST_FILE,
                wanted=lambda path: f"/{path}".endswith(f"/{file}"),
            )
            found = [path for path in unpacked.rglob("*") if path.is_file()]
            if len(found) != 1:
                raise ValueError(f"{address} has {len(found)} files {file}, expected one")
            _install(job, found[0], address)
        teacher_files.pin(job.home, address, sha256, address)
    except ValueError:
        kept.unlink()
        raise


def import_file(job: Config, path: Path) -> str:
    """Copy a teacher's weights to <home>/teachers/<data set>/<network>.pt; return a line to print.

    The weights are checked against the teacher's network, and the sha256 of the new file is noted.
    A .safetensors file is rewritten as .pt. Nothing is copied if the same file is there already.

    Args:
        job: configuration that names the home folder, the data set and the teacher's network.
        path: weights file of this package, RepDistiller or mdistiller.

    Raises:
        ValueError: If `path` is not a file of finite weights of the network, if the file is larger
            than `teacher_files.LARGEST_FILE` (512 MiB), if another file is there already, if the
            file differs from a sha256 noted earlier, or if the file cannot be used for any other
            reason.
        OSError: If a file cannot be read or written.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a file; give a weights file of {job.teacher.name}")
    teacher_files.check_size(path)
    _check_weights(job, path)  # before any folder is made
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
                    f"{target} already exists and is another file; runs may have learnt from it. "
                    "Move it away first, or choose another home=..."
                )
            return f"{job.teacher.name} already exists: {target}"
        _install(job, copy, str(path.absolute()))
    return f"{job.teacher.name} from {path}: {target}"


def _check_weights(job: Config, path: Path) -> None:
    """Raise ValueError if a file does not hold weights of a job's teacher."""
    model = build_network(job.teacher.model, job.dataset.num_classes, 0, torch.device("cpu"))
    load_weights(model, path, job.teacher.name)


def _install(job: Config, file: Path, source: str) -> None:
    """Check a file, and move it to the path that `teacher=<name>` reads.

    Raise ValueError as `teacher_files.install` does.

    Args:
        job: configuration whose teacher the file holds.
        file: weights file, on the file system of the teacher's path.
        source: address or path that the file came from, for messages and the pin.
    """
    model = build_network(job.teacher.model, job.dataset.num_classes, 0, torch.device("cpu"))
    teacher_files.install(
        file,
        model,
        home=job.home,
        dataset=job.dataset.name,
        network=job.teacher.name,
        source=source,
    )


def verify(job: Config, test_split: Callable[[], Data]) -> str:
    """Measure the test top-1 of a job's teacher, and compare it with the published value.

    Args:
        job: configuration that names the teacher, the data set, the device and the precision.
        test_split: function that returns the data set, of which the test split is used. The
            function is called after the checks of the teacher's file.

    Returns:
        A line for the user with the measured top-1 and the published one (%), or with the note that
        nothing is published.

    Raises:
        FileNotFoundError: If the teacher's file is missing.
        ValueError: If the two values differ by more than TOLERANCE (0.1 percentage points), if the
            file does not hold finite weights of the network, if the file differs from the sha256
            that was noted when it first came (not checked with teacher.checkpoint), if the teacher
            was trained on other classes, or if the device or the data cannot be used.
        InstantiationException: If the code of the network or the data set raises an error, for
            example because the data set is missing.
    """
    path = teacher_path(job)
    name = job.teacher.name
    key = pin_key(job.dataset.name, name)
    if not path.exists():
        raise missing_teacher(job)
    if not job.teacher.checkpoint:
        teacher_files.check_pin(job.home, key, file_hash(path))
    differs = ""
    if teacher_files.data_of(path) and (now := present_fingerprint(job)):
        differs = check_teacher_data(job, now)
    if differs:
        log.warning("%s learnt from other data (%s)", name, differs)
    device = pick_device(job.trainer.device)
    network = build_network(job.teacher.model, job.dataset.num_classes, 0, device)
    teacher = Teacher(
        network,
        path,
        name=name,
        device=device,
        precision=job.trainer.precision,
        compile=False,
        image_size=job.teacher.image_size,
    )
    batches = metered_test_batches(test_split(), f"{name} on {job.dataset.name}")
    top1 = evaluate(teacher, batches)["top1"]
    published = PUBLISHED.get(job.dataset.name, {}).get(name)
    if published is None:
        return (
            f"{name}: top-1 {top1:.2f} on {job.dataset.name}; nothing is published to compare with"
        )
    if round(abs(top1 - published.top1), 4) > TOLERANCE:
        raise ValueError(
            f"{name}: top-1 {top1:.2f} on {job.dataset.name}, but the published value is "
            f"{published.top1:.2f}: {path} was trained differently, or the data differs. Remove "
            f"this file and its entry {key} in {teacher_files.lock_path(job.home)}, "
            "and fetch it again"
        )
    return f"{name}: top-1 {top1:.2f} on {job.dataset.name}, as published ({published.top1:.2f})"


def table(home: str) -> str:
    """Return a table of the published teachers and of those in the folder `home`/teachers, as text.

    A row has the data set, the network, the published top-1 (%), whether the file is there and
    still has the sha256 that was noted when it first came, and where the file came from. Raise
    ValueError if lock.json, which holds the noted sha256 values, is damaged.
    """
    from rich.console import Console

    columns = ("data set", "network", "published top-1", "file", "source")
    rows = []
    known = teacher_files.pinned(home)
    here = {
        f"{path.parent.name}/{path.stem}": path for path in Path(home, "teachers").glob("*/*.pt")
    }
    listed = [f"{dataset}/{name}" for dataset, of_it in PUBLISHED.items() for name in of_it]
    for key in dict.fromkeys([*listed, *sorted(here)]):
        dataset, _, name = key.partition("/")
        published = PUBLISHED.get(dataset, {}).get(name)
        top1 = f"{published.top1:.2f}" if published else ""
        source = known[key]["source"] if key in known else ""
        if key not in here:
            presence = "missing"
        elif key not in known:
            presence = "present"
            source = "trained here, or copied there"
        elif file_hash(here[key]) == known[key]["sha256"]:
            presence = "present, as pinned"
        else:
            presence = "present, CHANGED"
        rows.append(dict(zip(columns, (dataset, name, top1, presence, source), strict=True)))
    console = Console()
    drawn, width = fitting_table(f"teachers of {home}", columns, rows, console.width, ["source"])
    console.width = max(console.width, width)
    with console.capture() as text:
        console.print(drawn)
    return text.get().rstrip()


def _compose_job(name: str, overrides: Sequence[str]) -> Config:
    """Return the configuration of a training run with the teacher `name` and these overrides."""
    if name.startswith("imagenet_"):
        overrides = ["dataset=imagenet", *overrides]
    with hydra.initialize_config_dir(str(cfg.conf_folder()), version_base="1.3"):
        return cfg.resolve(
            hydra.compose("config", overrides=["tracking=none", f"teacher={name}", *overrides])
        )


def _data(job: Config) -> Data:
    return build_data(job, pick_device(job.trainer.device))


def _shared_data(job: Config, built: dict[str, Data]) -> Data:
    """Return the job's data set, built once for all jobs of the data set.

    `built` holds the data sets by name; a new one is added.
    """
    name = job.dataset.name
    if name not in built:
        built[name] = _data(job)
    return built[name]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command `list`, `fetch`, `verify` or `import` of the command line, then exit.

    If a teacher cannot be fetched or verified, the error is printed, and the next teacher follows.
    `arguments` are the words of the command line; None stands for those of this process.

    Raises:
        SystemExit: With code 0 if everything succeeded, 1 if anything failed, 2 if the arguments
            cannot be parsed, or 130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(
        prog="python -m sddlskd.teachers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=["list", "fetch", "verify", "import"])
    parser.add_argument("words", nargs="*", metavar="NAME | FILE | key=value")
    parser.add_argument(
        "--as",
        dest="name",
        metavar="NAME",
        help="import: the network that the weights belong to",
    )
    parser.add_argument(
        "--mirror", action="append", default=[], metavar="URL",
        help="fetch: a URL to try first, of an archive or of a folder laid out like "
        "RepDistiller's; more can be listed in SDDLSKD_TEACHER_MIRRORS",
    )  # fmt: skip
    given = sys.argv[1:] if arguments is None else arguments
    if wrong := other_form(parser, given):
        parser.error(wrong)
    chosen = parser.parse_intermixed_args(given)
    # The path of a file may hold "=": Hydra names folders as lr=0.1.
    # Not Path.is_file, which raises an error if a name is too long for a file.
    words = [word for word in chosen.words if "=" not in word or os.path.isfile(word)]
    overrides = [word for word in chosen.words if word not in words]
    file = ""
    if chosen.command == "list":
        words = ["resnet32x4"]  # any name works: only the configuration's home is needed
    elif chosen.command == "import":
        if len(words) != 1 or not chosen.name:
            parser.error("give one file and its network: import FILE --as NAME")
        file = words[0]
        words = [chosen.name]
    elif not words:
        parser.error(f"{chosen.command} what? Give names, such as {chosen.command} resnet32x4")
    if named := [word for word in overrides if word.startswith("teacher=")]:
        parser.error(f"{named[0]} cannot be given; name teachers as words: resnet14 resnet8")
    if chosen.command == "fetch" and words == ["all"]:
        dataset = dict(word.split("=", 1) for word in overrides).get("dataset", "cifar100")
        of_it = PUBLISHED.get(dataset, PUBLISHED["cifar100"])
        words = [choice_of(name, dataset) for name in of_it]
    refuse_another_checkout()
    cfg.frame()
    log_to_terminal()
    mirrors = [*chosen.mirror, *os.environ.get("SDDLSKD_TEACHER_MIRRORS", "").split()]
    built: dict[str, Data] = {}  # by data set, for all teachers that are verified on it
    failed = False
    try:
        for name in words:
            try:
                job = _compose_job(name, overrides)
                if chosen.command == "list":
                    line = table(job.home)
                elif chosen.command == "fetch":
                    line = fetch(job, mirrors)
                elif chosen.command == "verify":
                    line = verify(job, partial(_shared_data, job, built))
                else:
                    line = import_file(job, Path(file))
                write_line(line)
            except ERRORS as error:
                failed = True
                sys.stderr.write(f"error: {explain(error)}\n")
    except KeyboardInterrupt:
        sys.stderr.write("stopped; the same command continues where it stopped\n")
        sys.exit(ExitCode.STOPPED)
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
