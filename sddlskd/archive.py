"""Tar and zip archives of strangers, unpacked so that nothing can be written outside a folder."""

import errno
import os
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Generator
from contextlib import closing
from functools import partial
from lzma import LZMAError
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple, Self

from filelock import FileLock

from sddlskd.meter import meter

__all__ = ["DAMAGE", "Member", "UnsafeArchive", "unpack", "unpack_folder"]

LONGEST_NAME = (
    1 << 16
)  # bytes of a header that holds a name; tarfile reads these into memory whatever they claim
DAMAGE = (tarfile.TarError, zipfile.BadZipFile, struct.error, LZMAError, zlib.error, EOFError, OSError, ValueError,
          OverflowError, LookupError, RuntimeError)  # fmt: skip
OF_THIS_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO)


class UnsafeArchive(ValueError):
    """An archive that is damaged, too large, or would write where it must not; nothing of it was kept."""


class Member(tarfile.TarInfo):
    """A member of a tar whose name is of a decent length, whatever its header claims."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        member = super().frombuf(buf, encoding, errors)
        names = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME,
                 tarfile.GNUTYPE_LONGLINK)  # fmt: skip
        if member.type in names and not 0 <= member.size <= LONGEST_NAME:
            raise UnsafeArchive(f"a header of {member.size} bytes")
        return member


class _Entry(NamedTuple):
    path: PurePosixPath
    is_dir: bool
    size: int  # bytes
    open: Callable[[], IO[bytes]]


def unpack(
    archive: Path,
    folder: Path,
    *,
    limit: int,
    count: int = 100_000,
    wanted: Callable[[PurePosixPath], bool] = lambda path: True,
) -> None:
    """The wanted files of a tar (plain, gz, bz2 or xz) or zip in a new `folder`: all of them, or no folder.

    limit: bytes of all wanted files; count: members of the archive. Raises UnsafeArchive where a member is absolute,
    has .. in its path, is a link, a device or there twice, and where the archive is damaged or too large;
    FileExistsError where `folder` is there.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} is there already; remove it to unpack {archive} again")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        with open(
            archive, "rb"
        ) as file:  # by its beginning: a tar may end in a zip, as files of weights are
            entries_of = _zip_entries if file.read(2) == b"PK" else _tar_entries
        with closing(entries_of(archive)) as entries, meter(archive.name, None, "members") as show:
            for number, entry in enumerate(entries, 1):
                show(number)
                if number > count:
                    raise UnsafeArchive(f"it has more than {count} members")
                if entry.is_dir or not wanted(entry.path):
                    continue
                limit -= entry.size
                if limit < 0:
                    raise UnsafeArchive(
                        f"{entry.path} and what comes before it are larger than agreed"
                    )
                _write(entry, temporary / entry.path)
        os.replace(temporary, folder)
    except DAMAGE as error:
        if isinstance(error, OSError) and error.errno in OF_THIS_DISK:
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UnsafeArchive(
            f"{archive} is refused: {reason}. Get it again from where it is published"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def unpack_folder(archive: Path, folder: Path, *, limit: int, **options: Any) -> None:
    """The folder of that name inside an archive, as `folder`: all of it or nothing, by one process while others wait.

    Options as of `unpack`, and raises as it does; UnsafeArchive too where no such folder is inside.
    """
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if folder.exists():
            return
        scratch = folder.with_name(f".{folder.name}.unpacked")
        for left in (
            scratch,
            *folder.parent.glob(f".{scratch.name}.*.tmp"),
        ):  # of a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        unpack(archive, scratch, limit=limit, **options)
        try:
            if not (scratch / folder.name).is_dir():
                raise UnsafeArchive(
                    f"{archive} holds no folder {folder.name}. Get it again from where it is published"
                )
            os.replace(scratch / folder.name, folder)
        finally:
            shutil.rmtree(scratch)


def _tar_entries(archive: Path) -> Generator[_Entry, None, None]:
    with tarfile.open(archive, "r:*", tarinfo=Member) as tar:
        for member in tar:
            path = _safe(member.name)
            if member.size < 0:  # an extended header may say so
                raise UnsafeArchive(f"{_shown(member.name)} has {member.size} bytes")
            if not member.isdir() and (
                member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse()
            ):
                raise UnsafeArchive(
                    f"{_shown(member.name)} is a link, a device or another special file"
                )
            yield _Entry(path, member.isdir(), member.size, partial(_opened, tar, member))


def _opened(tar: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    source = tar.extractfile(member)
    assert source is not None, "a regular file"
    return source


def _zip_entries(archive: Path) -> Generator[_Entry, None, None]:
    with zipfile.ZipFile(archive) as file:
        for member in file.infolist():
            path, kind = _safe(member.orig_filename), stat.S_IFMT(member.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise UnsafeArchive(
                    f"{_shown(member.filename)} is a link, a device or another special file"
                )
            if member.compress_type not in (
                zipfile.ZIP_STORED,
                zipfile.ZIP_DEFLATED,
            ):  # others take any memory
                raise UnsafeArchive(
                    f"{_shown(member.filename)} is compressed by method {member.compress_type}"
                )
            yield _Entry(
                path, member.filename.endswith("/"), member.file_size, partial(file.open, member)
            )


def _safe(name: str) -> PurePosixPath:
    """The path of a member. Raises UnsafeArchive where it leads out of the folder."""
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise UnsafeArchive(f"{_shown(name)} leads out of the folder")
    return path


def _shown(name: str) -> str:
    return ascii(name[:100])


def _write(entry: _Entry, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        entry.open() as source,
        open(path, "xb") as target,
    ):  # x: a file that is there twice is refused
        shutil.copyfileobj(source, target, 1 << 20)
    if path.stat().st_size != entry.size:
        raise UnsafeArchive(f"{_shown(str(entry.path))} is cut off")
