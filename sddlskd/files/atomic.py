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
    """Open a temporary file for writing that becomes `path` completely or not at all.

    When the `with` block ends, the file is flushed to the disk with fsync and renamed to `path`.

    Args:
        path: file to write; its folder is made if it is missing.
        size: number of bytes that will be written, if known; it is shown in the error of a full
            disk.
        replace: whether to replace an existing `path`.

    Yields:
        The temporary file, opened for binary writing.

    Raises:
        OSError: if the disk is full or not writable. The message names `path` and the space needed,
            and the old content of `path` is untouched.
        FileExistsError: if `path` exists and `replace` is false.
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
    """Rename the finished file `new` to `path`, which must not exist.

    If several processes try this at once, one of them succeeds. Raise FileExistsError if `path`
    exists.
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
    """Rename x.ckpt, if it exists, to x.previous.ckpt, and then `new`, x.ckpt.new, to x.ckpt.

    If the function is interrupted at any point, it can be called again.
    """
    path = new.with_suffix("")
    if path.exists():
        os.replace(path, path.with_name(f"{path.stem}.previous{path.suffix}"))
    os.replace(new, path)


def append(path: Path, content: bytes) -> None:
    """Append `content` to a file, and return when the disk has it.

    Raise OSError as `write_atomically` does; the file then keeps its old content.
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
    """Return the error for a file that cannot be saved, with the space if the disk is full."""
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
