"""Test the unpacking of tar archives, harmless and harmful ones."""

import gzip
import io
import shutil
import signal
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sddlskd.files.archive import UnsafeArchive, unpack, unpack_folder
from tests.tiny import processes

LIMIT = 1 << 20


def member(name: str, content: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, content


def tar(*members: tuple[tarfile.TarInfo, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(  # type: ignore[call-overload]
        fileobj=buffer, mode=mode, format=tarfile.PAX_FORMAT
    ) as target:
        for info, content in members:
            target.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """Yield a folder for x.tar; afterwards check that nothing was written outside of it."""
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    yield inner
    assert {str(path.relative_to(tmp_path)).split("/out")[0] for path in tmp_path.rglob("*")} <= {
        "a",
        "a/b",
        "a/b/x.tar",
    }


def written(place: Path, content: bytes) -> Path:
    path = place / "x.tar"
    path.write_bytes(content)
    return path


def refused(place: Path, content: bytes, *, limit: int = LIMIT, **options: Any) -> str:
    path = written(place, content)
    with pytest.raises(UnsafeArchive, match="Get it again from where it is published") as caught:
        unpack(path, place / "out", limit=limit, **options)
    assert sorted(p.name for p in place.iterdir()) == ["x.tar"]
    message = str(caught.value)
    assert message.startswith(f"{path} is refused: ")
    assert "\n" not in message
    return message


GOOD = (
    member("top", type=tarfile.DIRTYPE),
    member("top/a.txt", b"one"),
    member("./top/deep/b.txt", b"two" * 1000),
)


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_files_and_folders(place: Path, mode: str) -> None:
    unpack(written(place, tar(*GOOD, mode=mode)), place / "out", limit=3003)
    files = {
        str(p.relative_to(place / "out")): p.read_bytes()
        for p in place.joinpath("out").rglob("*")
        if p.is_file()
    }
    assert files == {"top/a.txt": b"one", "top/deep/b.txt": b"two" * 1000}
    with pytest.raises(FileExistsError, match="remove it to unpack"):
        unpack(place / "x.tar", place / "out", limit=LIMIT)


def test_only_what_is_wanted_counts(place: Path) -> None:
    unpack(
        written(place, tar(*GOOD)), place / "out", limit=3, wanted=lambda path: path.name == "a.txt"
    )
    assert [p.name for p in place.joinpath("out").rglob("*")] == ["top", "a.txt"]


@pytest.mark.parametrize(
    "name", ["../out2", "top/../../out2", "/tmp/out2", "..", "top/..", "a\\..\\b", "//x"]
)
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.DIRTYPE])
def test_paths_that_lead_out(place: Path, name: str, kind: bytes) -> None:
    assert "leads out of the folder" in refused(place, tar(GOOD[1], member(name, type=kind)))


SPECIAL = (
    tarfile.SYMTYPE,
    tarfile.LNKTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.FIFOTYPE,
    tarfile.CONTTYPE,
    b"Z",
)


@pytest.mark.parametrize("kind", SPECIAL)
def test_links_and_devices(place: Path, kind: bytes) -> None:
    fields: dict[str, Any] = (
        {"linkname": "/etc/passwd"} if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else {}
    )
    content = tar(GOOD[1], member("top/x", type=kind, **fields))
    assert "is a link, a device or another special file" in refused(place, content)
    # The archive is refused although nobody asked for that member.
    assert "is a link" in refused(place, content, wanted=lambda path: path.name == "a.txt")


def test_a_link_that_a_later_file_would_go_through(place: Path) -> None:
    refused(
        place,
        tar(member("d", type=tarfile.SYMTYPE, linkname=str(place.parent)), member("d/evil", b"x")),
    )


def test_a_file_that_is_there_twice(place: Path) -> None:
    assert "File exists" in refused(place, tar(member("a", b"1"), member("./a", b"2")))


def test_a_file_that_is_a_folder_too(place: Path) -> None:
    refused(place, tar(member("a", b"1"), member("a/b", b"2")))


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "\x1b[2Jx/../.."])
def test_names_no_disk_takes(place: Path, name: str) -> None:
    assert "\x1b" not in refused(place, tar(member("n", b"1", pax_headers={"path": name})))


def test_sizes(place: Path) -> None:
    content = tar(member("a", b"x" * 600), member("b", b"x" * 600))
    assert "b and the files before it are larger than the size limit" in refused(
        place, content, limit=1199
    )
    assert "more than 1 members" in refused(place, content, count=1)
    bomb = tar(member("a", bytes(10_000_000)), mode="w:gz")
    assert len(bomb) < 20_000
    assert "larger than the size limit" in refused(place, bomb)


@pytest.mark.parametrize("size", ["-5", "99999999999999999999"])
def test_sizes_that_an_extended_header_claims(place: Path, size: str) -> None:
    refused(place, tar(member("a", b"1", pax_headers={"size": size}), member("b", b"2")))


def test_a_name_that_would_fill_the_memory(place: Path) -> None:
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 1 << 34
    bomb = gzip.compress(info.tobuf(tarfile.GNU_FORMAT) + bytes(1 << 20))
    assert f"a header of {1 << 34} bytes" in refused(place, bomb)


def test_headers_without_end(place: Path) -> None:
    info = tarfile.TarInfo("x")
    info.type = tarfile.XHDTYPE
    refused(place, info.tobuf(tarfile.USTAR_FORMAT) * 5000)


@pytest.mark.parametrize(
    "content", [b"", b"x", b"not a tar" * 100, bytes(100), gzip.compress(b"not a tar", mtime=0)]
)
def test_what_is_no_archive(place: Path, content: bytes) -> None:
    refused(place, content)


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
def test_cut_in_the_middle_of_a_file(place: Path, mode: str) -> None:
    content = tar(member("a", bytes(range(256)) * 400), mode=mode)
    for length in (len(content) // 2, 600 if mode == "w" else len(content) // 3):
        refused(place, content[:length])


def test_a_full_disk_is_not_the_archives_fault(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(OSError, match="No space left on device"):
        unpack(written(place, tar(*GOOD)), place / "out", limit=LIMIT)
    assert not (place / "out").exists()


WHOLE = tar(*GOOD, member("z", b"3" * 700, pax_headers={"comment": "hello"}))


def unpack_and_hang(archive: Path, folder: Path) -> None:
    from sddlskd.files import archive as module

    module.os.replace = lambda *_: signal.pause()  # type: ignore[assignment]
    unpack_folder(archive, folder, limit=LIMIT)


def test_what_a_killed_process_had_unpacked_is_removed(tmp_path: Path) -> None:
    path = written(tmp_path, tar(member("data/x", b"1" * 9999)))
    for _ in range(2):
        process = processes.Process(target=unpack_and_hang, args=(path, tmp_path / "data"))
        process.start()
        while not any(left.stat().st_size == 9999 for left in tmp_path.glob(".*/data/x")):
            time.sleep(0.01)
        process.kill()
        process.join()
    unpack_folder(path, tmp_path / "data", limit=LIMIT)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["data", "data.lock", "x.tar"]


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_whatever_stands_in_it(place: Path, data: st.DataObject) -> None:
    content = bytearray(WHOLE)
    for _ in range(data.draw(st.integers(1, 8))):
        at = data.draw(st.integers(0, len(content) - 1))
        patch = data.draw(
            st.one_of(
                st.binary(min_size=1, max_size=12), st.sampled_from([b"../../x\0", b"/x\0", b"2"])
            )
        )
        content[at : at + len(patch)] = patch
        # Write the checksum of the changed header.
        content[148:156] = b"%06o\0 " % (sum(content[:148]) + 8 * 32 + sum(content[156:512]))
    path = written(place, bytes(content))
    out = place / "out"
    try:
        unpack(path, out, limit=5000)
    except UnsafeArchive as error:
        said = str(error)
    else:
        said = ""
        assert all(p.is_dir() or p.is_file() for p in out.rglob("*"))
        assert not any(p.is_symlink() for p in out.rglob("*"))
        shutil.rmtree(out)
    assert "\n" not in said
    assert [p.name for p in place.iterdir()] == ["x.tar"]
