"""Write files so that a crash leaves no partial file, and report the space a full disk lacks."""

import errno
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

__all__ = ["append", "put", "rotate", "write_atomically"]


@contextmanager
def write_atomically(
    path: Path, size: int | None = None, *, replace: bool = True
) -> Iterator[IO[bytes]]:
    """Open a temporary file for writing, which becomes `path` completely or not at all.

    When the `with` block ends, the file is flushed to the disk with fsync and renamed to `path`. If
    the block raises an error, `path` stays as it was, and the temporary file is removed.

    Args:
        path: file to write; its folder is made if it is missing.
        size: number of bytes that will be written, for the message if the disk is full; None if
            unknown.
        replace: whether to replace an existing `path`.

    Yields:
        The temporary file, opened for binary writing.

    Raises:
        OSError: If the file cannot be written, for example because the disk is full, or if the
            block raises an OSError. `path` stays as it was. For a full disk, the message names
            `path`, the free space and `size`.
        FileExistsError: If `path` exists and `replace` is false.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if replace:
            os.replace(temporary, path)
        else:
            put(temporary, path)
    except FileExistsError:
        raise
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()  # before `_unsaved` measures the free space
        raise _unsaved(path, size, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink()
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # makes the rename itself durable
    finally:
        os.close(folder)


def put(new: Path, path: Path) -> None:
    """Rename the finished file `new` to `path`, unless `path` exists already.

    Both paths must be on the same file system. If several processes call the function for the same
    `path` at once, one of them succeeds. On a file system without hard links, two may succeed, and
    the file of the last process remains.

    Raises:
        FileExistsError: If `path` exists; `new` then stays.
        OSError: If `new` is missing or cannot be renamed.
    """
    try:
        os.link(new, path)
    except FileExistsError:
        raise
    except OSError as error:
        # The file system has no hard links. Two processes at the same moment may both succeed.
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from error
        os.replace(new, path)
    else:
        new.unlink()


def rotate(new: Path) -> None:
    """Put a new checkpoint in place and keep the previous one.

    For `new` = x.ckpt.new, x.ckpt is renamed to x.previous.ckpt if x.ckpt exists, and then
    x.ckpt.new is renamed to x.ckpt. An older x.previous.ckpt is replaced. If a call is interrupted
    between the two steps, another call completes them.

    Raises:
        FileNotFoundError: If `new` does not exist. The first step is done nevertheless.
    """
    path = new.with_suffix("")
    if path.exists():
        os.replace(path, path.with_name(f"{path.stem}.previous{path.suffix}"))
    os.replace(new, path)


def append(path: Path, content: bytes) -> None:
    """Append `content` to the file `path`, and return when the content is on the disk (fsync).

    The file is made if it is missing; its folder must exist.

    Raises:
        OSError: If the content cannot be written, for example because the disk is full. The file is
            then cut back to its old content if possible. The message names `path` and, for a full
            disk, the space needed and free.
    """
    try:
        # Unbuffered: after a failed write, closing the file would try to write a buffer again.
        with open(path, "ab", buffering=0) as file:
            before = file.tell()
            left = memoryview(content)
            try:
                while left:
                    left = left[file.write(left) :]
                os.fsync(file.fileno())
            except OSError:
                with suppress(OSError):
                    file.truncate(before)
                raise
    except OSError as error:
        raise _unsaved(path, len(content), error) from error


def _unsaved(path: Path, size: int | None, error: OSError) -> OSError:
    """Return the error for a file that cannot be saved, with the space if the disk is full.

    `size` is the number of bytes needed, None if unknown.
    """
    space = ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        there = next(place for place in path.absolute().parents if place.exists())
        free = f"{shutil.disk_usage(there).free} free"
        space = f" ({free})" if size is None else f" ({size} bytes needed, {free})"
    reason = error.strerror or error
    return OSError(
        error.errno,
        f"cannot save {path}: {reason}{space}; "
        "free some space or choose another folder with home=...",
    )
