"""Test the command for published teachers: list, fetch, verify and import.

The files come from a web server on loopback. Every kind of bad file must be refused.
"""

import argparse
import hashlib
import io
import json
import logging
import os
import pickle
import re
import shlex
import shutil
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sddlskd import teachers
from sddlskd.config import Config
from sddlskd.datasets import arrays
from sddlskd.files import download
from sddlskd.files.checkpoint import load_weights
from sddlskd.models import create
from sddlskd.teachers import PLACES, PUBLISHED, fetch, import_file, main
from sddlskd.training import build, checks, teacher_files
from sddlskd.training.fit import fit
from sddlskd.training.teacher import Teacher
from sddlskd.training.teacher_files import Published, file_hash, path_of, publish
from tests.conftest import Compose, compose_in
from tests.loopback import Site, site, status
from tests.pages import REPO
from tests.test_data import cifar_pickles, write_cifar_tar
from tests.tiny import same, tiny

NAME = "resnet56"
FOLDER, FILE = "resnet56_vanilla", "ckpt_epoch_240.pth"
SMALLER = 1 << 25  # largest file in bytes, for tests that write a larger file


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """Yield a web server; the addresses of published teachers are removed."""
    monkeypatch.setattr(download, "BACKOFF_S", 0.001)
    monkeypatch.setattr(download, "STALLED_S", 0.5)
    monkeypatch.setattr(teachers, "PLACES", {"cifar100": (), "imagenet": ()})
    monkeypatch.delenv("SDDLSKD_TEACHER_MIRRORS", raising=False)
    with site() as here:
        yield here


@cache
def composed(*overrides: str) -> Config:
    return compose_in(Path("nowhere"), *overrides)


@pytest.fixture
def compose(tmp_path: Path) -> Compose:
    """Return the function `compose` with a cache, so that nothing is composed twice."""
    return lambda *overrides: replace(composed(*overrides), home=str(tmp_path))


@pytest.fixture
def job(compose: Compose) -> Config:
    return compose(f"teacher={NAME}")


def weights(name: str = NAME, classes: int = 100, seed: int = 0) -> dict[str, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return dict(create(name, num_classes=classes).state_dict())


def saved(state: Any, **others: Any) -> bytes:
    """Return a file in the layout of RepDistiller."""
    buffer = io.BytesIO()
    beside = {
        "epoch": 240,
        "accuracy": np.float64(72.34),
        "opt": argparse.Namespace(model=NAME),
        "optimizer": {},
    }
    torch.save({**beside, "model": state, **others}, buffer)
    return buffer.getvalue()


GOOD = saved(weights())


def tar(*members: tuple[str, bytes], **special: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as target:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            target.addfile(info, io.BytesIO(content))
        for name, kind in special.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            target.addfile(info)
    return buffer.getvalue()


def repdistiller(web: Site, content: bytes, **options: Any) -> str:
    web.file(f"repo/{FOLDER}/{FILE}", content, **options)
    return web.url + "repo"


def mdistiller(web: Site, content: bytes | None = None) -> str:
    if content is None:
        content = tar(
            (f"cifar_teachers/{FOLDER}/{FILE}", GOOD),
            (f"cifar_teachers/vgg13_vanilla/{FILE}", b"other"),
        )
    return web.file("release/cifar_teachers.tar", content)


def target(job: Config) -> Path:
    return path_of(job.home, job.dataset.name, job.teacher.name)


def holds(path: Path, expected: dict[str, Tensor]) -> bool:
    network = create(NAME, num_classes=100)
    load_weights(network, path, NAME)
    return same(dict(network.state_dict()), expected)


def refused(job: Config, *mirrors: str) -> str:
    with pytest.raises(ValueError, match=f"{NAME} could not be fetched: ") as caught:
        fetch(job, mirrors)
    message = str(caught.value)
    assert "\n" not in message
    assert f"python -m sddlskd.teachers import FILE --as {NAME}" in message
    assert not target(job).exists()
    assert teacher_files.pinned(job.home) == {}
    kept = [
        path
        for path in Path(job.home, "teachers").rglob("*")
        if path.is_file() and path.suffix != ".lock"
    ]
    assert [path.name for path in kept if ".partial" not in path.name] == []
    return message


# The command fetch


def test_what_is_published() -> None:
    top1 = {name: published.top1 for name, published in PUBLISHED["cifar100"].items()}
    assert top1 == {
        "resnet32x4": 79.42, "wrn_40_2": 75.61, "vgg13": 74.64, "resnet50": 79.34,
        "resnet56": 72.34, "resnet110": 74.31,
    }  # fmt: skip
    assert [address.split("/")[2] for address in PLACES["cifar100"]] == [
        "github.com",
        "shape2prog.csail.mit.edu",
    ]


def test_the_imagenet_teachers_are_torchvisions() -> None:
    (place,) = PLACES["imagenet"]
    for name, published in PUBLISHED["imagenet"].items():
        weights = torchvision.models.get_model_weights(name).IMAGENET1K_V1
        assert f"{place}/{published.file}" == weights.url
        assert published.top1 == round(weights.meta["_metrics"]["ImageNet-1K"]["acc@1"], 2)


def torchvisions(seed: int = 0) -> tuple[bytes, str]:
    """Return a state dict in a file as torchvision publishes them, and the file's name."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        buffer = io.BytesIO()
        torch.save(torchvision.models.resnet18().state_dict(), buffer)
    return buffer.getvalue(), f"resnet18-{hashlib.sha256(buffer.getvalue()).hexdigest()[:8]}.pth"


def test_an_imagenet_teacher_is_fetched_and_loads_strictly(
    web: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    content, file = torchvisions()
    web.file(f"models/{file}", content)
    monkeypatch.setitem(PUBLISHED["imagenet"], "resnet18", Published(69.76, file))
    words = ("fetch", "imagenet_resnet18", "--mirror", f"{web.url}models", f"home={tmp_path}")
    path = tmp_path / "teachers/imagenet/resnet18.pt"
    assert run(capsys, *words)[:2] == (0, f"resnet18 from {web.url}models/{file}: {path}\n")
    job = compose_in(tmp_path, "dataset=imagenet", "teacher=imagenet_resnet18")
    network = build.build_network(job.teacher.model, 1000, 0, torch.device("cpu"))
    load_weights(network, checks.teacher_path(job), "resnet18")
    assert same(
        dict(network.state_dict()), dict(torch.load(io.BytesIO(content), weights_only=True))
    )
    assert teacher_files.check_pin(str(tmp_path), "imagenet/resnet18", file_hash(path))
    assert run(capsys, *words)[:2] == (0, f"resnet18 already exists: {path}\n")


def test_an_imagenet_file_that_is_not_the_one_in_its_name_is_refused(
    web: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    web.file("models/resnet18-f37072fd.pth", torchvisions()[0])
    words = ("fetch", "imagenet_resnet18", "--mirror", f"{web.url}models", f"home={tmp_path}")
    code, out, err = run(capsys, *words)
    assert (code, out) == (1, "")
    assert "not the one in its name" in err
    kept = [
        path.name
        for path in (tmp_path / "teachers").rglob("*")
        if path.is_file() and path.suffix != ".lock"
    ]
    assert kept == []
    assert teacher_files.pinned(str(tmp_path)) == {}


def test_the_commands_for_nodes_without_internet(
    web: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (REPO / "docs" / "cluster.md").read_text()
    section = page.partition("## Nodes without internet\n")[2].partition("\n## ")[0]
    fetched, loaded, copied = re.findall(r"^    (.*?)(?:  +#.*)?$", section, re.MULTILINE)
    web.file(f"repo/resnet32x4_vanilla/{FILE}", saved(weights("resnet32x4")))
    monkeypatch.setattr(teachers, "PLACES", {"cifar100": (web.url + "repo",)})
    write_cifar_tar(tmp_path / "cifar.tar.gz", cifar_pickles()[0])
    archive = (tmp_path / "cifar.tar.gz").read_bytes()
    monkeypatch.setattr(arrays, "CIFAR100_URL", web.file("cifar-100-python.tar.gz", archive))
    monkeypatch.setattr(arrays, "CIFAR100_MD5", hashlib.md5(archive).hexdigest())
    folders = [tmp_path / name for name in ("workstation", "cluster")]
    folders[0].mkdir()
    monkeypatch.chdir(folders[0])
    assert run(capsys, *shlex.split(fetched)[3:])[0] == 0
    exec(shlex.split(loaded)[2])
    assert Path("teachers/cifar100/resnet32x4.pt").exists()
    for name in shlex.split(copied)[2:-1]:
        shutil.copytree(name, folders[1] / name)

    asked = len(web.asked)
    monkeypatch.chdir(folders[1])
    assert "already exists" in run(capsys, *shlex.split(fetched)[3:])[1]
    exec(shlex.split(loaded)[2])
    assert len(web.asked) == asked
    Path("teachers/cifar100/resnet32x4.pt").write_bytes(b"another file")
    with pytest.raises(ValueError, match="cifar100/resnet32x4 has changed"):
        checks.check_pins(compose_in(folders[1], "teacher=resnet32x4"))


@pytest.mark.parametrize("place", [repdistiller, mdistiller])
def test_fetched_is_found_and_pinned(web: Site, job: Config, place: Any) -> None:
    address = place(web, GOOD) if place is repdistiller else place(web)
    said = fetch(job, [address])
    assert str(target(job)) in said
    assert target(job) == Path(job.home, "teachers", "cifar100", "resnet56.pt")
    # The file is the same byte for byte, so that its sha256 is the same everywhere.
    assert target(job).read_bytes() == GOOD
    assert holds(target(job), weights())
    pin = teacher_files.pinned(job.home)["cifar100/resnet56"]
    assert pin["sha256"] == file_hash(target(job))
    assert pin["source"].startswith(address)
    asked = len(web.asked)
    assert "already exists" in fetch(job, [address])
    assert len(web.asked) == asked


def test_an_archive_is_fetched_once_for_all_its_teachers(
    web: Site, job: Config, compose: Compose
) -> None:
    other = saved(weights("vgg13"))
    content = tar(
        (f"./x/{FOLDER}/{FILE}", GOOD), (f"./x/vgg13_vanilla/{FILE}", other), ("x/README", b"hello")
    )
    address = mdistiller(web, content)
    fetch(job, [address])
    vgg13 = compose("teacher=vgg13")
    fetch(vgg13, [address])
    assert target(vgg13).read_bytes() == other
    assert len(web.asked) == 1
    assert sorted(teacher_files.pinned(job.home)) == [
        "cifar100/resnet56",
        "cifar100/vgg13",
        address,
    ]


def test_resumed_after_a_cut(web: Site, job: Config) -> None:
    fetch(job, [repdistiller(web, GOOD, cuts=[1_000_000, 500_000])])
    assert [wanted for _, wanted in web.asked] == [None, "bytes=1000000-", "bytes=1500000-"]
    assert target(job).read_bytes() == GOOD


def test_the_next_place_is_asked(web: Site, job: Config) -> None:
    web.page(f"gone/{FOLDER}/{FILE}", status(404))
    places = [web.url + "gone/", web.file("a/x.tar", b"no archive"), repdistiller(web, GOOD)]
    assert places[2] in fetch(job, places)
    assert [path for path, _ in web.asked] == [
        f"/gone/{FOLDER}/{FILE}", "/a/x.tar", f"/repo/{FOLDER}/{FILE}",
    ]  # fmt: skip


def test_every_place_is_named_with_its_fault(web: Site, job: Config) -> None:
    said = refused(job, web.url + "gone", "file:///etc")
    assert f"cannot fetch {web.url}gone/{FOLDER}/{FILE} (HTTP Error 404" in said
    assert f"cannot fetch file:///etc/{FOLDER}/{FILE} (it is not a valid address" in said
    web.page(f"loop/{FOLDER}/{FILE}", status(302, Location=f"/loop/{FOLDER}/{FILE}"))
    assert "redirect" in refused(job, web.url + "loop")


def test_names_without_a_published_file(web: Site, compose: Compose) -> None:
    with pytest.raises(
        ValueError, match=r"no resnet8 for cifar100 is published; valid .* are resnet32x4, wrn_40_2"
    ):
        fetch(compose("teacher=resnet8"), [web.url])
    with pytest.raises(ValueError, match="no resnet56 for digits is published"):
        fetch(compose("teacher=resnet56", "dataset=digits"), [web.url])
    assert web.asked == []


def test_a_teacher_of_ones_own_is_not_replaced(web: Site, job: Config) -> None:
    publish(target(job), weights(seed=1), network=NAME, dataset="cifar100", top1=1.0)
    before = target(job).read_bytes()
    with pytest.raises(ValueError, match=r"already exists but was not fetched.*Move it away"):
        fetch(job, [repdistiller(web, GOOD)])
    assert target(job).read_bytes() == before


# Files that have changed


def test_a_file_that_changed_at_its_place_is_refused(web: Site, job: Config) -> None:
    address = repdistiller(web, GOOD)
    fetch(job, [address])
    target(job).unlink()
    repdistiller(web, saved(weights(seed=1)), tag='"2"')
    with pytest.raises(
        ValueError,
        match=r"cifar100/resnet56 has changed: .*remove the entry cifar100/resnet56 from",
    ):
        fetch(job, [address])
    assert not target(job).exists()
    # The same file from another address is accepted.
    assert "cifar_teachers.tar" in fetch(job, [address, mdistiller(web)])
    assert target(job).read_bytes() == GOOD


def test_an_archive_that_changed_at_its_place_is_refused(
    web: Site, job: Config, compose: Compose
) -> None:
    address = mdistiller(web)
    fetch(job, [address])
    for path in target(job).parent.joinpath("downloads").glob("*.tar"):
        path.unlink()
    vgg13 = compose("teacher=vgg13")
    web.file(
        "release/cifar_teachers.tar",
        tar((f"x/vgg13_vanilla/{FILE}", saved(weights("vgg13")))),
        tag='"2"',
    )
    with pytest.raises(ValueError, match=rf"{address} has changed"):
        fetch(vgg13, [address])
    assert not target(vgg13).exists()


def test_a_pinned_file_that_changed_here_is_refused_everywhere(
    web: Site, job: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    address = repdistiller(web, GOOD)
    fetch(job, [address])
    target(job).write_bytes(saved(weights(seed=1)))
    with pytest.raises(ValueError, match="cifar100/resnet56 has changed"):
        fetch(job, [address])
    code, out, err = run(capsys, "verify", NAME, f"home={job.home}")
    assert (code, out) == (1, "")
    assert "cifar100/resnet56 has changed" in err
    assert "CHANGED" in run(capsys, "list", f"home={job.home}")[1]


def test_a_training_does_not_learn_from_a_changed_teacher(tmp_path: Path) -> None:
    job = tiny(tmp_path)
    path = path_of(job.home, "fake", "resnet8")
    teacher_files.pin(job.home, "fake/resnet8", file_hash(path), "http://place/x")
    assert fit([job])[0]["status"] == "FINISHED"
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(ValueError, match="fake/resnet8 has changed"):
        fit([tiny(tmp_path, "seed=1")])


# Bad files


class Malicious:
    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.proof}",)


def bad_files(proof: Path) -> dict[str, tuple[bytes, str]]:
    """Return {kind: (a bad file, a part of the error message)}."""
    good = weights()
    missing, first = dict(list(good.items())[1:]), next(iter(good))
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(SMALLER + 1))
    return {
        "malicious": (saved(good, x=Malicious(proof)), "it would run"),
        "malicious weights": (saved({**good, first: Malicious(proof)}), "it would run"),
        "bare pickle": (pickle.dumps(Malicious(proof), protocol=2), " is "),
        "a page of errors": (
            b"<html>Please log in</html>",
            "is a web page, not a c",
        ),
        "empty": (b"", "truncated, damaged or not a checkpoint"),
        "half": (GOOD[: len(GOOD) // 2], "truncated, damaged or not a checkpoint"),
        "no weights": (saved({}), "holds no state dict"),
        "another network": (saved(weights("resnet110")), "does not hold weights of resnet56"),
        "another class count": (
            saved(weights(classes=10)),
            "fc.weight is (10, 64) instead of (100, 64)",
        ),
        "a key less": (saved(missing), f"{first} is missing"),
        "a key more": (saved({**good, "x": torch.ones(1)}), "x is not in resnet56"),
        "not finite": (
            saved({**good, "fc.bias": torch.full((100,), torch.nan)}),
            "not finite, in fc.bias",
        ),
        "complex": (
            saved({**good, "fc.bias": torch.ones(100, dtype=torch.complex64)}),
            "complex64 instead of",
        ),
        "bomb": (bomb.getvalue(), "a teacher has at most"),
    }


KINDS = sorted(bad_files(Path("unused")))


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[bytes, str]]]:
    proof = tmp_path_factory.mktemp("proof") / "proof"
    yield bad_files(proof)
    assert not proof.exists()


@pytest.mark.parametrize("kind", KINDS)
def test_bad_files_are_refused_from_everywhere(
    web: Site,
    job: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bad: dict[str, tuple[bytes, str]],
    kind: str,
) -> None:
    content, fault = bad[kind]
    monkeypatch.setattr(teacher_files, "LARGEST_FILE", SMALLER)
    for address in (
        repdistiller(web, content),
        mdistiller(web, tar((f"x/{FOLDER}/{FILE}", content))),
    ):
        said = refused(job, address)
        assert fault in said
        assert address.removesuffix("/repo") in said
    path = tmp_path / "file.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path} ") as caught:
        import_file(job, path)
    assert fault in str(caught.value)
    assert not target(job).exists()
    assert list(target(job).parent.glob("*.pt")) == []
    # Nothing of the bad file is left that would prevent the next attempt.
    fetch(job, [repdistiller(web, GOOD, tag='"2"')])
    assert target(job).read_bytes() == GOOD


ARCHIVES = {
    "..": tar((f"x/{FOLDER}/{FILE}", GOOD), ("../evil", b"evil")),
    "absolute": tar((f"/x/{FOLDER}/{FILE}", GOOD)),
    "link": tar((f"x/{FOLDER}/{FILE}", GOOD), evil=tarfile.SYMTYPE),
    "hard link": tar(**{f"x/{FOLDER}/{FILE}": tarfile.LNKTYPE}),
    "device": tar((f"x/{FOLDER}/{FILE}", GOOD), evil=tarfile.CHRTYPE),
    "fifo": tar((f"x/{FOLDER}/{FILE}", GOOD), evil=tarfile.FIFOTYPE),
    "not in it": tar((f"x/{FOLDER}2/{FILE}", GOOD)),
    "twice in it": tar((f"x/{FOLDER}/{FILE}", GOOD), (f"y/{FOLDER}/{FILE}", GOOD)),
    "cut": tar((f"x/{FOLDER}/{FILE}", GOOD))[: len(GOOD) // 2],
    "empty": b"",
}


@pytest.mark.parametrize("kind", list(ARCHIVES))
def test_bad_archives_are_refused(web: Site, job: Config, tmp_path: Path, kind: str) -> None:
    address = mdistiller(web, ARCHIVES[kind])
    said = refused(job, address)
    assert "is refused: " in said or "expected one" in said
    assert not [path for path in tmp_path.rglob("*") if "evil" in path.name]
    mdistiller(web, tar((f"x/{FOLDER}/{FILE}", GOOD)))
    fetch(job, [address])
    assert target(job).read_bytes() == GOOD


@pytest.mark.parametrize("place", [repdistiller, mdistiller])
def test_files_larger_than_a_teacher_can_be(
    web: Site, job: Config, monkeypatch: pytest.MonkeyPatch, place: Any
) -> None:
    address = place(web, GOOD) if place is repdistiller else place(web)
    monkeypatch.setattr(teacher_files, "LARGEST_FILE", len(GOOD) - 1)
    refused(job, address)
    monkeypatch.setattr(teacher_files, "LARGEST_FILE", len(GOOD))
    fetch(job, [address])


def test_a_stalled_place_is_left_for_the_next(
    web: Site, job: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "STALLED_S", 0.1)
    web.page(f"slow/{FOLDER}/{FILE}", web.stalls(GOOD[:1000], len(GOOD)))
    assert "repo" in fetch(job, [web.url + "slow", repdistiller(web, GOOD)])


# The command import


@pytest.mark.parametrize("content", [GOOD, saved({f"module.{k}": v for k, v in weights().items()})])
def test_a_file_of_ones_own(job: Config, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "mine.pth"
    path.write_bytes(content)
    assert str(target(job)) in import_file(job, path)
    assert path.read_bytes() == target(job).read_bytes() == content
    assert holds(target(job), weights())
    assert teacher_files.pinned(job.home)["cifar100/resnet56"]["source"] == str(path)
    assert "already exists" in import_file(job, path)
    path.write_bytes(saved(weights(seed=1)))
    with pytest.raises(ValueError, match="already exists and is another file"):
        import_file(job, path)
    target(job).unlink()
    with pytest.raises(ValueError, match="has changed"):
        import_file(job, path)
    assert not target(job).exists()


def test_a_file_of_ours_for_another_data_set(compose: Compose, tmp_path: Path) -> None:
    job = compose("teacher=resnet8", "dataset=digits")
    path = tmp_path / "mine.pt"
    publish(path, weights("resnet8", 10), network="resnet8", dataset="digits", top1=90.0)
    import_file(job, path)
    assert target(job) == Path(job.home, "teachers", "digits", "resnet8.pt")


def test_an_exported_student(compose: Compose, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    job, path = compose("teacher=resnet8", "dataset=digits"), tmp_path / "student.safetensors"
    safetensors.save_file(PLAIN, path)
    import_file(job, path)
    network = create("resnet8", num_classes=10)
    load_weights(network, target(job), "resnet8")
    assert same(dict(network.state_dict()), PLAIN)
    assert "already exists" in import_file(job, path)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a safetensors file"):
        import_file(compose("teacher=resnet14", "dataset=digits"), path)


def test_a_file_of_torchvisions_says_how_to_import_it(compose: Compose, tmp_path: Path) -> None:
    job, path = compose("teacher=resnet18", "dataset=digits"), tmp_path / "mine.pth"
    network = torchvision.models.resnet18(num_classes=10)
    torch.save(network.state_dict(), path)
    told = (
        "torchvision's; choose that network, as in teacher=torchvision teacher.model.name=resnet18 "
        "or, to import the file, --as torchvision teacher.model.name=resnet18"
    )
    with pytest.raises(ValueError, match=told):
        import_file(job, path)
    with pytest.raises(ValueError, match=told):
        Teacher(
            create("resnet18", 10),
            path,
            name="resnet18",
            device=torch.device("cpu"),
            precision="fp32",
            compile=False,
        )
    assert not target(job).parent.exists()
    torch.save({**network.state_dict(), "fc.weight": torch.zeros(3, 512)}, path)
    with pytest.raises(ValueError, match=r"file alone are layer2\.0\.downsample\.0\.weight, "):
        import_file(job, path)


@pytest.mark.parametrize("path", ["gone.pth", ".", "/dev/zero", "/dev/null", "fifo"])
def test_what_is_no_file(
    job: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo")
    with pytest.raises(ValueError, match=f"{path} is not a file; give a weights file of resnet56"):
        import_file(job, Path(path))


# The command line


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Return exit code, stdout and stderr of `python -m sddlskd.teachers WORDS`."""
    package = logging.getLogger("sddlskd")
    before = package.handlers[:], package.level, package.propagate
    try:
        with pytest.raises(SystemExit) as caught:
            main(words)
    finally:
        package.handlers[:], package.level, package.propagate = before
    code = caught.value.code
    assert isinstance(code, int)
    return code, *capsys.readouterr()


def test_teachers_are_named_as_words(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "verify", "resnet14", "teacher=[resnet14,resnet8]")
    said = "teacher=[resnet14,resnet8] cannot be given; name teachers as words: resnet14 resnet8"
    assert (code, err.splitlines()[-1].partition("error: ")[2]) == (2, said)


def test_list(
    web: Site, job: Config, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    fetch(job, [repdistiller(web, GOOD)])
    publish(
        path_of(job.home, "digits", "resnet8"),
        weights("resnet8"),
        network="resnet8",
        dataset="digits",
        top1=1.0,
    )
    code, out, err = run(capsys, "list", f"home={job.home}")
    assert (code, err) == (0, "")
    lines = [line.split("│")[1:-1] for line in out.splitlines() if line.startswith("│")]
    rows = {cells[1].strip(): [cell.strip() for cell in cells[2:]] for cells in lines}
    assert rows["resnet56"] == ["72.34", "present, as pinned", f"{web.url}repo/{FOLDER}/{FILE}"]
    assert rows["vgg13"] == ["74.64", "missing", ""]
    assert rows["resnet8"] == ["", "present", "trained here, or copied there"]
    assert set(rows) == {*PUBLISHED["cifar100"], *PUBLISHED["imagenet"], "resnet8"}


def test_fetch_with_a_mirror(
    web: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    address = repdistiller(web, GOOD)
    code, out, err = run(capsys, "fetch", NAME, "--mirror", address, f"home={tmp_path}/one")
    assert code == 0
    assert f"fetching {address}" in err
    assert out == (
        f"resnet56 from {address}/{FOLDER}/{FILE}: {tmp_path}/one/teachers/cifar100/resnet56.pt\n"
    )
    monkeypatch.setenv("SDDLSKD_TEACHER_MIRRORS", f"{web.url}gone {address}")
    code, out, err = run(capsys, "fetch", "all", f"home={tmp_path}/two")
    assert code == 1
    assert out.startswith("resnet56 from ")
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    # The command tries all teachers and names each that fails.
    assert len(errors) == len(PUBLISHED["cifar100"]) - 1
    assert "Traceback" not in err


def test_what_was_imported_teaches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = tiny(tmp_path / "home", teacher=False)
    path = tmp_path / "lr=0.1" / "mine.pth"  # as Hydra names folders
    path.parent.mkdir()
    path.write_bytes(saved(weights("resnet8", 10)))
    words = [f"home={job.home}", "dataset=fake", "dataset.num_classes=10"]
    assert run(capsys, "import", str(path), "--as", "resnet8", *words)[0] == 0
    (result,) = fit([job])
    assert (result["status"], result["teacher_sha256"]) == ("FINISHED", file_hash(path))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("fetch", "resnet8"), "error: no resnet8 for cifar100 is published; valid"),
        (
            ("fetch", "resnet56x"),
            "error: teacher=resnet56x is unknown; did you mean teacher=resnet56",
        ),
        (("verify", "../x"), "error: teacher/..=x is unknown; valid"),
        (("verify", NAME, "homme=x"), "error: homme is unknown; did you mean home?"),
        (("verify", NAME), "error: teacher=resnet56 for cifar100 is missing: no file"),
        (("import", "gone", "--as", NAME), "error: gone is not a file"),
        (("verify", NAME, f"hom={'x' * 300}"), "error: hom is unknown"),  # too long for a file
    ],
)
def test_errors_take_one_line(
    web: Site,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: Any,
    said: str,
) -> None:
    monkeypatch.setenv("SDDLSKD_HOME", str(tmp_path))
    code, out, err = run(capsys, *words)
    assert (code, out) == (1, "")
    assert err.startswith(said)
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "words", [(), ("fetch",), ("verify",), ("import", "x"), ("import", "--as", "x"), ("steal",)]
)
def test_incomplete_commands(capsys: pytest.CaptureFixture[str], words: Any) -> None:
    code, _, err = run(capsys, *words)
    assert code == 2
    assert "python -m sddlskd.teachers: error: " in err


def test_ctrl_c(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(teachers, "fetch", interrupted)
    code, _, err = run(capsys, "fetch", NAME)
    assert (code, err) == (130, "stopped; the same command continues where it stopped\n")


# The command verify

SMALL = ("dataset=fake", "dataset.num_classes=10", "++dataset.load.train=64",
         "++dataset.load.test=200", "++dataset.load.size=16", "trainer.device=cpu")  # fmt: skip


def known_top1(home: Path) -> float:
    """Put a resnet8 into a home, and return its top-1, computed without the package's code."""
    job = tiny(home, *SMALL[2:5], teacher=False)
    state = weights("resnet8", 10)
    publish(
        path_of(str(home), "fake", "resnet8"), state, network="resnet8", dataset="fake", top1=0.0
    )
    network = create("resnet8", num_classes=10).eval()
    network.load_state_dict(state)
    split = teachers._data(job)._test
    mean, std = torch.tensor(job.dataset.mean), torch.tensor(job.dataset.std)
    pixels_BCHW = ((split.images_NHWC / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad():
        found_B = network(pixels_BCHW).mean((2, 3)).argmax(1)
    return 100 * float((found_B == split.labels_N).double().mean())


def test_verify(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    top1 = known_top1(tmp_path)
    words = ("verify", "resnet8", f"home={tmp_path}", *SMALL)
    plain = f"resnet8: top-1 {top1:.2f} on fake; nothing is published to compare with\n"
    assert run(capsys, *words) == (0, plain, "")
    for published, agrees in (
        (top1 + 0.1, True),
        (top1 - 0.1, True),
        (top1 + 0.11, False),
    ):
        monkeypatch.setitem(PUBLISHED, "fake", {"resnet8": Published(published, "x")})
        code, out, err = run(capsys, *words)
        assert code == (0 if agrees else 1)
        said = out if agrees else err.removeprefix("error: ")
        assert said.startswith(f"resnet8: top-1 {top1:.2f} on fake, ")
        assert f"{published:.2f}" in said


def test_each_is_verified_on_its_own_data_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr(
        teachers, "_data", lambda job: opened.append(job.dataset.name) or job.dataset.name
    )
    monkeypatch.setattr(teachers, "verify", lambda job, split: f"{job.teacher.name} on {split()}")
    code, out, _ = run(
        capsys, "verify", "resnet56", "imagenet_resnet34", "resnet110", f"home={tmp_path}"
    )
    assert (code, out) == (0, "resnet56 on cifar100\nresnet34 on imagenet\nresnet110 on cifar100\n")
    assert opened == ["cifar100", "imagenet"]


# Random files


PLAIN = weights("resnet8", 10)


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_whatever_stands_in_a_file(compose: Compose, tmp_path: Path, data: st.DataObject) -> None:
    job = compose("teacher=resnet8", "dataset=digits")
    values = st.one_of(
        st.none(), st.integers(), st.text(max_size=5), st.just(torch.ones(3)), st.binary(max_size=5)
    )
    content = bytearray(
        saved(
            data.draw(
                st.one_of(
                    st.just(PLAIN),
                    st.lists(values),
                    st.dictionaries(st.one_of(st.text(), st.integers()), values),
                )
            ),
            x=data.draw(values),
        )
    )
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "fuzz.pth"
    path.write_bytes(
        content[: data.draw(st.sampled_from([None, len(content) // 2, len(content) - 3]))]
    )
    try:
        import_file(job, path)
    except ValueError as error:
        said = str(error)
    else:
        said = ""
        assert json.loads(teacher_files.lock_path(job.home).read_text())["pins"].pop(
            "digits/resnet8"
        )
        teacher_files.lock_path(job.home).unlink()
        target(job).unlink()
    assert "\n" not in said
    assert not target(job).exists()
    assert {p.name for p in target(job).parent.iterdir()} <= {"resnet8.pt.lock"}
