"""Test the readers of untrusted files with damaged and hostile files.

The outcome must be a valid result or an error of one line. No code of a file may run, and nothing
may be written outside of the given folder. The examples are the same every time.
"""

import gzip
import io
import os
import pickle
import struct
import tarfile
import tempfile
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sddlskd.datasets import arrays
from sddlskd.datasets.folders import cub200, tiny_imagenet
from sddlskd.files import archive
from sddlskd.files.archive import UnsafeArchive, unpack
from sddlskd.files.checkpoint import UnreadableFile, read_weights
from sddlskd.models import create
from tests import layouts

fuzz = settings(
    max_examples=120, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
Data = st.DataObject


@contextmanager
def place() -> Iterator[Path]:
    """Yield an empty folder; afterwards check that nothing was written beside it."""
    with tempfile.TemporaryDirectory() as outer:
        inner = Path(outer, "inner")
        inner.mkdir()
        yield inner
        assert os.listdir(outer) == ["inner"]


def said(act: Callable[[], Any], *kinds: type[Exception]) -> tuple[str, Any]:
    """Call `act` and return ("", its result), or (its error in one line, None).

    An error of other kinds than `kinds` is raised, and fails the test.
    """
    try:
        return "", act()
    except kinds as error:
        message = str(error)
    assert message
    assert "\n" not in message
    return message, None


def mutated(data: Data, content: bytes, most: int = 6) -> bytes:
    """Return `content` with up to `most` changes of bytes, perhaps truncated."""
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(0, most))):
        at = data.draw(st.integers(0, max(0, len(changed) - 1)))
        how = data.draw(st.sampled_from(["set", "insert", "delete"]))
        if how == "insert":
            changed[at:at] = data.draw(st.binary(max_size=8))
        elif how == "delete":
            del changed[at : at + data.draw(st.integers(1, 8))]
        elif changed:
            changed[at] = data.draw(st.integers(0, 255))
    return bytes(changed[: data.draw(st.sampled_from([None, len(changed) // 2, len(changed) - 1]))])


class Canary:
    """An object whose pickle creates a file if plain pickle loads it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


# Archives


NAMES = st.one_of(
    st.sampled_from(["top/a", "top/b/c", "../x", "/etc/x", "top/../../x", "a\\..\\b", "C:x", "top",
                     "top/", "", ".", "a\0b", "é" * 200, "x" * 300, "top/a/under"]),
    st.text(max_size=12),
)  # fmt: skip


@fuzz
@given(st.data())
def test_zips(data: Data) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as target:
        for _ in range(data.draw(st.integers(0, 5))):
            info = zipfile.ZipInfo("x")
            info.filename = data.draw(NAMES)
            info.external_attr = (
                data.draw(st.sampled_from([0, 0o100644, 0o120777, 0o020600, 0o040755, 0o140600]))
                << 16
            )
            info.compress_type = data.draw(st.sampled_from([0, 8, 12, 14]))
            content = data.draw(st.sampled_from([b"", b"abc", b"\0" * 5000]))
            try:
                # zipfile warns if a name occurs twice.
                with pytest.warns() if info.filename in target.namelist() else place():
                    target.writestr(info, content)
            except (ValueError, UnicodeError, struct.error):  # zipfile cannot write this name
                return
    with place() as folder:
        path = folder / "x.zip"
        path.write_bytes(mutated(data, buffer.getvalue(), most=3))
        message, _ = said(lambda: unpack(path, folder / "out", limit=8000, count=4), UnsafeArchive)
        assert set(os.listdir(folder)) == ({"x.zip"} if message else {"x.zip", "out"})
        files = [p for p in (folder / "out").rglob("*") if not p.is_dir()]
        assert all(p.is_file() and not p.is_symlink() for p in files)
        assert sum(p.stat().st_size for p in files) <= 8000


KINDS = [tarfile.REGTYPE] * 4 + [
    tarfile.SYMTYPE,
    tarfile.LNKTYPE,
    tarfile.CHRTYPE,
    tarfile.FIFOTYPE,
    tarfile.DIRTYPE,
]


@fuzz
@given(st.data())
def test_tars(data: Data) -> None:
    buffer = io.BytesIO()
    with tarfile.open(
        fileobj=buffer, mode=data.draw(st.sampled_from(["w", "w:gz"])), format=tarfile.PAX_FORMAT
    ) as target:
        for _ in range(data.draw(st.integers(0, 5))):
            info = tarfile.TarInfo(data.draw(NAMES))
            info.type = data.draw(st.sampled_from(KINDS))
            info.linkname = data.draw(st.sampled_from(["", "../../x", "/etc/passwd"]))
            content = (
                data.draw(st.sampled_from([b"", b"abc"])) if info.type == tarfile.REGTYPE else b""
            )
            info.size = len(content)
            if data.draw(st.booleans()):
                info.pax_headers = {
                    "size": data.draw(st.sampled_from(["-1", "99999999999999", "x", "3"]))
                }
            target.addfile(info, io.BytesIO(content))
    with place() as folder:
        path = folder / "x.tar"
        path.write_bytes(mutated(data, buffer.getvalue(), most=3))
        message, _ = said(lambda: unpack(path, folder / "out", limit=8000, count=4), UnsafeArchive)
        assert set(os.listdir(folder)) == ({"x.tar"} if message else {"x.tar", "out"})
        assert all(
            p.is_dir() or (p.is_file() and not p.is_symlink()) for p in (folder / "out").rglob("*")
        )


# Text files


WORDS = st.one_of(
    st.sampled_from(
        ["0", "1", "2", "-1", "201", "1e3", "٣", "../x", "/etc/passwd", "", "..", "\r"]
    ),
    st.text(max_size=6),
)


def edited(data: Data, text: str) -> bytes:
    """Return a text file with changed, duplicated, deleted or damaged lines."""
    lines = text.splitlines(keepends=True)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(lines) - 1))
        words = lines[at].split(" ") if " " in lines[at] else lines[at].split("\t")
        how = data.draw(st.sampled_from(["double", "delete", "word", "blank", "any", "huge"]))
        if how == "double":
            lines.insert(at, lines[at])
        elif how == "delete" and len(lines) > 1:
            del lines[at]
        elif how == "word":
            words[data.draw(st.integers(0, len(words) - 1))] = data.draw(WORDS)
            lines[at] = " ".join(words)
        elif how == "huge":
            lines[at] = "9" * data.draw(st.sampled_from([5, 10, 5000])) + " " + words[-1]
        else:
            lines[at] = "\n" if how == "blank" else data.draw(st.text(max_size=30))
    content = "".join(lines).encode(errors="surrogatepass")
    return mutated(data, content, most=1) if data.draw(st.booleans()) else content


@fuzz
@given(st.data())
def test_the_text_files_of_cub200(data: Data) -> None:
    with place() as folder:
        layouts.cub200(folder, per_class=2)
        path = (
            folder
            / "CUB_200_2011"
            / data.draw(
                st.sampled_from(["images.txt", "image_class_labels.txt", "train_test_split.txt"])
            )
        )
        path.write_bytes(edited(data, path.read_text()))
        message, splits = said(lambda: cub200(str(folder)), ValueError)
        assert (str(folder / "CUB_200_2011") in message) or splits
        for split in splits or ():
            assert all(
                Path(p).resolve().is_relative_to(folder / "CUB_200_2011/images")
                for p in split.paths
            )
            assert all(0 <= label < 200 for label in split.labels_N.tolist())


@fuzz
@given(st.data())
def test_the_text_files_of_tiny_imagenet(data: Data) -> None:
    with place() as folder:
        layouts.tiny_imagenet(folder, per_class=1)
        top = folder / "tiny-imagenet-200"
        path = top / data.draw(st.sampled_from(["wnids.txt", "val/val_annotations.txt"]))
        path.write_bytes(edited(data, path.read_text()))
        _, splits = said(lambda: tiny_imagenet(str(folder)), ValueError)
        for split in splits or ():
            assert all(
                Path(p).resolve().is_relative_to(top) and Path(p).is_file() for p in split.paths
            )


# Binary files


@fuzz
@given(st.data())
def test_idx_files(data: Data) -> None:
    dims = data.draw(st.lists(st.sampled_from([0, 1, 2, 28, 1 << 16, (1 << 32) - 1]), max_size=4))
    header = data.draw(
        st.sampled_from([b"\0\0\x08\x03", b"\0\0\x08\x01", b"\0\0\x0d\x03", b"\x1f\x8b\0\0", b""])
    )
    content = (
        header + b"".join(struct.pack(">I", n) for n in dims) + data.draw(st.binary(max_size=60))
    )
    if data.draw(st.booleans()):
        content = mutated(data, gzip.compress(content), most=2)
    with place() as folder:
        path = folder / "train-images-idx3-ubyte"
        path.write_bytes(content)
        message, pixels = said(lambda: arrays._read_idx(path, 3), ValueError)
        assert (str(path) in message) or pixels.numel() <= len(content)


def cifar_pickle(**entries: Any) -> bytes:
    return pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [1, 2], **entries}, 2)


@fuzz
@given(st.data())
def test_cifar_pickles(data: Data) -> None:
    with place() as folder:
        canary = folder / "canary"
        content = data.draw(st.sampled_from([
            cifar_pickle(),
            pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [3]}, 5),
            cifar_pickle(extra=Canary(canary)), cifar_pickle(labels=np.zeros(2, "S0")),
            cifar_pickle(labels="xx"), cifar_pickle(data=np.zeros((2, 3072), object)),
            pickle.dumps([1]),
        ]))  # fmt: skip
        message, found = said(
            lambda: arrays._cifar_split(
                mutated(data, content), "the/file", "http://x", "CIFAR-10", "labels"
            ),
            ValueError,
        )
        assert ("the/file is not a CIFAR-10 pickle" in message) or found.images_NHWC.shape[1:] == (
            32,
            32,
            3,
        )
        assert not canary.exists()


WEIGHTS = {
    name: value
    for name, value in create("resnet8", num_classes=10).state_dict().items()
    if name < "g"
}


@fuzz
@given(st.data())
def test_files_of_weights(data: Data) -> None:
    with place() as folder:
        canary, buffer = folder / "canary", io.BytesIO()
        state = data.draw(
            st.sampled_from(
                [{"model": WEIGHTS}, WEIGHTS, {"model": {"x": Canary(canary)}}, Canary(canary)]
            )
        )
        torch.save(state, buffer, _use_new_zipfile_serialization=data.draw(st.booleans()))
        path = folder / data.draw(st.sampled_from(["x.pth", "x.safetensors"]))
        path.write_bytes(mutated(data, buffer.getvalue(), most=4))
        message, weights = said(lambda: read_weights(path), UnreadableFile)
        assert (str(path) in message) or all(
            isinstance(value, torch.Tensor) for value in weights.values()
        )
        assert not canary.exists()


def test_the_canary_sings() -> None:
    """Check that a canary creates its file, on which the tests above rely."""
    with place() as folder:
        pickle.loads(pickle.dumps(Canary(folder / "canary"))).close()
        assert (folder / "canary").exists()


# Small files that claim much memory


@contextmanager
def little_memory(most: int) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()


def test_a_gzip_of_a_gigabyte_of_zeros_is_not_inflated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "train-images-idx3-ubyte.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(b"\0\0\x08\x03" + struct.pack(">III", 1 << 20, 8, 8))
        for _ in range(64):
            file.write(bytes(1 << 20))
    monkeypatch.setattr(arrays, "LARGEST_MEMBER", 1 << 20)
    with little_memory(8 << 20), pytest.raises(ValueError, match="expected 67108880 bytes"):
        arrays._read_idx(path, 3)


def test_a_member_of_a_tar_that_is_too_large_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, member = tmp_path / "x.tar.gz", tarfile.TarInfo("f/train")
    member.size = 32 << 20
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        tar.addfile(member, io.BytesIO(bytes(member.size)))
    monkeypatch.setattr(arrays, "LARGEST_MEMBER", 1 << 20)
    with little_memory(8 << 20), pytest.raises(ValueError, match=r"f/train has 33554432 bytes"):
        arrays._tar_members(path, ["f/train"], "http://x")


@pytest.mark.parametrize("builder", ["numpy.core.multiarray _reconstruct", "numpy ndarray"])
def test_a_pickle_cannot_ask_for_an_array_of_any_size(builder: str) -> None:
    module, name = builder.split()
    shape = b"(J" + struct.pack("<i", 1 << 28) + b"t"  # 2^28 bytes
    arguments = (
        b"(cnumpy\nndarray\n" + shape + b"U\x01bt"
        if name == "_reconstruct"
        else b"(" + shape + b"U\x01bt"
    )
    content = b"\x80\x02}U\x04datac" + f"{module}\n{name}\n".encode() + arguments + b"Rs."
    with little_memory(8 << 20):
        message, _ = said(
            lambda: arrays._cifar_split(content, "f", "http://x", "CIFAR-10", "labels"),
            ValueError,
        )
    assert "f is not a CIFAR-10 pickle" in message


def test_a_pickle_cannot_ask_for_a_long_list_of_objects() -> None:
    content = b"\x80\x02}r" + struct.pack("<I", 1 << 26) + b"."
    message, _ = said(
        lambda: arrays._cifar_split(content, "f", "http://x", "CIFAR-10", "labels"), ValueError
    )
    assert "it numbers an object 67108864" in message


def state(kind: str, shape: Any, content: Any, dtype: Any = (3, "|")) -> bytes:
    """Return a pickle of CIFAR whose array of images has a state of one's own."""
    parts = [pickle.dumps(part, 2)[2:-1] for part in (shape, content, dtype, kind)]
    shape_, content_, dtype_, kind_ = parts
    typed = b"cnumpy\ndtype\n" + kind_ + b"\x85R" + dtype_ + b"b"
    array = b"cnumpy.core.multiarray\n_reconstruct\n)R(K\x01" + shape_ + typed + b"\x89"
    return (
        b"\x80\x02}(X\x04\x00\x00\x00data" + array + content_ + b"tb"
        b"X\x06\x00\x00\x00labels](K\x01K\x02eu."
    )


@pytest.mark.parametrize(
    ("kind", "shape", "content", "dtype"),
    [
        ("O8", (2, 3072), "x" * 6144 * 8, (3, "|")),  # addresses of objects
        ("u1", (2, 3072), "x" * 6143, (3, "|")),
        ("u1", (-2, -3072), "x" * 6144, (3, "|")),
        ("u1", (2, 1 << 70), "x" * 6144, (3, "|")),
        ("u1", (2, 3072), ["x"] * 6144, (3, "|")),
        ("u1", (2, 3072), 5, (3, "|")),
        ("u1", 7, "x" * 6144, (3, "|")),
        ("V4", (2, 3072), "x" * 6144 * 4, (3, "|", ("u1", (9,)), ("a",), {"a": 5}, 1 << 30, 1, 0)),
        ("u1", (2, 3072), "x" * 6144, "<"),
        ("", (2, 3072), "x" * 6144, (3, "")),
        (5, (2, 3072), "x" * 6144, (3, 5)),
    ],
)
def test_numpy_never_restores_the_array_of_a_pickle(
    kind: Any, shape: Any, content: Any, dtype: Any
) -> None:
    found = arrays._cifar_split(state("u1", (2, 3072), "é" * 6144), "f", "u", "CIFAR-10", "labels")
    assert found.images_NHWC.unique().tolist() == [ord("é")]
    message, _ = said(
        lambda: arrays._cifar_split(
            state(kind, shape, content, dtype), "f", "http://x", "CIFAR-10", "labels"
        ),
        ValueError,
    )
    assert "f is not a CIFAR-10 pickle" in message


def test_a_pickle_changes_no_function_of_the_reader() -> None:
    """Check that BUILD sets attributes of a copy, so the next pickle is read as before."""
    build = b"cnumpy\ndtype\n}X\x01\x00\x00\x00aK\x01sb0"
    content = state("u1", (2, 3072), "x" * 6144)
    found = arrays._cifar_split(content[:2] + build + content[2:], "f", "u", "CIFAR-10", "labels")
    assert found.labels_N.tolist() == [1, 2]
    assert not hasattr(arrays._PickledType, "a")


def test_a_zip_that_says_less_than_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        target.writestr("top/zeros", bytes(4 << 20))
    content = path.read_bytes().replace(struct.pack("<I", 4 << 20), struct.pack("<I", 100))
    path.write_bytes(content)
    with little_memory(8 << 20), pytest.raises(UnsafeArchive):
        unpack(path, tmp_path / "out", limit=1000)
    assert os.listdir(tmp_path) == ["x.zip"]
    assert archive.LONGEST_NAME == 1 << 16
