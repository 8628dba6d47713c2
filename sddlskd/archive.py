"""Tar archives of strangers, unpacked so that nothing can be written outside a folder."""

import errno
import os
import shutil
import tarfile
import zlib
from collections.abc import Callable
from lzma import LZMAError
from pathlib import Path, PurePosixPath
from typing import Self

from sddlskd.meter import meter

__all__ = ["UnsafeArchive", "unpack"]

LONGEST_NAME = 1 << 16  # bytes of a header that holds a name; tarfile reads these into memory whatever they claim


DAMAGE = (tarfile.TarError, LZMAError, zlib.error, EOFError, OSError, ValueError, OverflowError, RecursionError)
OF_THIS_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO)


class UnsafeArchive(ValueError):
    """An archive that is damaged, too large, or would write where it must not; nothing of it was kept."""


class _Member(tarfile.TarInfo):
    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        member = super().frombuf(buf, encoding, errors)
        names = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME,
                 tarfile.GNUTYPE_LONGLINK)  # fmt: skip
        if member.type in names and not 0 <= member.size <= LONGEST_NAME:
            raise UnsafeArchive(f"a header of {member.size} bytes")
        return member


def unpack(
    archive: Path,
    folder: Path,
    *,
    limit: int,
    count: int = 100_000,
    wanted: Callable[[PurePosixPath], bool] = lambda path: True,
) -> None:
    """The wanted files of a tar (plain, gz, bz2 or xz) in a new `folder`: all of them, or no folder.

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
        with tarfile.open(archive, "r:*", tarinfo=_Member) as tar, meter(archive.name, None, "members") as show:
            for number, member in enumerate(tar, 1):
                show(number)
                if number > count:
                    raise UnsafeArchive(f"it has more than {count} members")
                path = _safe(member)
                if member.isdir() or not wanted(path):
                    continue
                limit -= member.size
                if limit < 0:
                    raise UnsafeArchive(f"{path} and what comes before it are larger than agreed")
                _write(tar, member, temporary / path)
        os.replace(temporary, folder)
    except DAMAGE as error:
        if isinstance(error, OSError) and error.errno in OF_THIS_DISK:
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UnsafeArchive(f"{archive} is refused: {reason}. Get it again from where it is published") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _safe(member: tarfile.TarInfo) -> PurePosixPath:
    """The path of a file or folder of the archive. Raises UnsafeArchive for anything else."""
    path = PurePosixPath(member.name)
    shown = ascii(member.name[:100])
    if member.size < 0:  # an extended header may say so
        raise UnsafeArchive(f"{shown} has {member.size} bytes")
    if path.is_absolute() or ".." in path.parts or "\\" in member.name or "\0" in member.name:
        raise UnsafeArchive(f"{shown} leads out of the folder")
    if not member.isdir() and (member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse()):
        raise UnsafeArchive(f"{shown} is a link, a device or another special file")
    return path


def _write(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    source = tar.extractfile(member)
    assert source is not None, "a regular file"
    path.parent.mkdir(parents=True, exist_ok=True)
    with source, open(path, "xb") as target:  # x: a file that is there twice is refused
        shutil.copyfileobj(source, target, 1 << 20)
    if path.stat().st_size != member.size:
        raise UnsafeArchive(f"{member.name[:100]!a} is cut off")
