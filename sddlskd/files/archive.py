"""Unpack untrusted tar and zip archives so that no file is written outside a folder."""

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

from sddlskd.terminal.meter import meter

__all__ = ["DAMAGE", "Member", "UnsafeArchive", "unpack", "unpack_folder"]

# Largest size in bytes of a header that holds a name. tarfile reads such a header into memory,
# whatever size it claims.
LONGEST_NAME = 1 << 16
# Errors that reading a damaged archive can raise.
DAMAGE = (
    tarfile.TarError,
    zipfile.BadZipFile,
    struct.error,
    LZMAError,
    zlib.error,
    EOFError,
    OSError,
    ValueError,
    OverflowError,
    LookupError,
    RuntimeError,
)
# Error numbers that mean a fault of the local disk, not of the archive.
OF_THIS_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO)


class UnsafeArchive(ValueError):
    """Error for an archive that is refused: it is missing, damaged, too large or unsafe to unpack.

    `unpack` then leaves no unpacked file behind.
    """


class Member(tarfile.TarInfo):
    """Member of a tar archive, with a size limit on headers that hold a name.

    Give the class to `tarfile.open` as `tarinfo`. Reading the archive then raises UnsafeArchive for
    a header of a long name or of extended attributes with more than 64 KiB (LONGEST_NAME). Without
    the limit, tarfile would read the whole header into memory.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """Return the member that a header block describes.

        Args:
            buf: the header block, 512 bytes.
            encoding: encoding of names, as in `tarfile.TarInfo.frombuf`.
            errors: error handling of that encoding.

        Returns:
            The member, without the content of its file.

        Raises:
            UnsafeArchive: If the block announces a name or extended attributes of more than 64 KiB
                (LONGEST_NAME), or of less than 0 bytes.
            tarfile.HeaderError: If the block is not a valid header.
        """
        member = super().frombuf(buf, encoding, errors)
        names = (
            tarfile.XHDTYPE,
            tarfile.XGLTYPE,
            tarfile.SOLARIS_XHDTYPE,
            tarfile.GNUTYPE_LONGNAME,
            tarfile.GNUTYPE_LONGLINK,
        )
        if member.type in names and not 0 <= member.size <= LONGEST_NAME:
            raise UnsafeArchive(
                f"it has a header of {member.size} bytes, and the limit is {LONGEST_NAME}"
            )
        return member


class _Entry(NamedTuple):
    """One member of an archive; `open` opens its content for reading."""

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
    """Unpack the wanted files of an archive into a new folder, completely or not at all.

    Args:
        archive: a tar (plain, gz, bz2 or xz) or zip file.
        folder: folder to make; must not exist. The folders above are made if they are missing.
        limit: largest total size in bytes of the wanted files.
        count: largest number of members of the archive, wanted or not.
        wanted: function that returns whether to unpack the file with this path in the archive.

    Raises:
        UnsafeArchive: If the archive is missing, damaged, beyond `limit` or `count`, or unsafe. An
            archive is unsafe if any member is a link, a device or another special file, if the path
            of a member is absolute or contains "..", a backslash or a null character, if a wanted
            file occurs twice, or if a member of a zip file is compressed other than by deflate.
        FileExistsError: If `folder` exists.
        OSError: If the local disk is full or defective, or if a file may not be read or written.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} already exists; remove it to unpack {archive} again")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        # Look at the beginning of the file: a tar may end with a zip file, such as a weights file.
        with open(archive, "rb") as file:
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
                        f"{entry.path} and the files before it are larger than the size limit"
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
    """Unpack one top-level folder of an archive, the one with the name of `folder`, to `folder`.

    The folder is unpacked completely or not at all. If `folder` exists, nothing is done. If several
    processes call the function at once, one unpacks and the others wait.

    Args:
        archive: a tar or zip file that contains the folder at its top level.
        folder: folder to make; its last part is the name of the folder in the archive.
        limit: largest total size in bytes of the wanted files, in all folders of the archive.
        **options: `count` and `wanted` of `unpack`. The paths that `wanted` gets begin with the
            name of the top-level folder.

    Raises:
        UnsafeArchive: If `unpack` refuses the archive, or if the archive contains no wanted file in
            such a folder.
        OSError: If the local disk is full or defective, or if a file may not be read or written.
    """
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if folder.exists():
            return
        scratch = folder.with_name(f".{folder.name}.unpacked")
        # Remove the files of a process that was killed.
        for left in (scratch, *folder.parent.glob(f".{scratch.name}.*.tmp")):
            shutil.rmtree(left, ignore_errors=True)
        unpack(archive, scratch, limit=limit, **options)
        try:
            if not (scratch / folder.name).is_dir():
                raise UnsafeArchive(
                    f"{archive} holds no folder {folder.name}. "
                    "Get it again from where it is published"
                )
            os.replace(scratch / folder.name, folder)
        finally:
            shutil.rmtree(scratch)


# The checks below are stricter than tarfile's filter="data", which accepts links inside the folder,
# contiguous files, "top/.." and backslashes, and unpacks an absolute name without its first "/".
def _tar_entries(archive: Path) -> Generator[_Entry, None, None]:
    with tarfile.open(archive, "r:*", tarinfo=Member) as tar:
        for member in tar:
            path = _safe_path(member.name)
            if member.size < 0:  # an extended header can claim that
                raise UnsafeArchive(f"{_printable(member.name)} has {member.size} bytes")
            if not member.isdir() and (
                member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse()
            ):
                raise UnsafeArchive(
                    f"{_printable(member.name)} is a link, a device or another special file"
                )
            yield _Entry(path, member.isdir(), member.size, partial(_open_member, tar, member))


def _open_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    source = tar.extractfile(member)
    assert source is not None, "a regular file"
    return source


def _zip_entries(archive: Path) -> Generator[_Entry, None, None]:
    with zipfile.ZipFile(archive) as file:
        for member in file.infolist():
            path = _safe_path(member.orig_filename)
            kind = stat.S_IFMT(member.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise UnsafeArchive(
                    f"{_printable(member.filename)} is a link, a device or another special file"
                )
            # Other compression methods can take any amount of memory.
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise UnsafeArchive(
                    f"{_printable(member.filename)} is compressed by method "
                    f"{member.compress_type}, which is not supported"
                )
            yield _Entry(
                path, member.filename.endswith("/"), member.file_size, partial(file.open, member)
            )


def _safe_path(name: str) -> PurePosixPath:
    """Return the path of a member. Raise UnsafeArchive if the path may lead out of the folder."""
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise UnsafeArchive(f"{_printable(name)} leads out of the folder")
    return path


def _printable(name: str) -> str:
    return ascii(name[:100])


def _write(entry: _Entry, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Mode x refuses a file that occurs twice.
    with entry.open() as source, open(path, "xb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
    if path.stat().st_size != entry.size:
        raise UnsafeArchive(f"{_printable(str(entry.path))} is cut off")
