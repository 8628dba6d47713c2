"""Writing that a crash cannot tear, and that says what a full disk lacks."""

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
    """A file to write to that becomes `path` as a whole or not at all (temporary file, fsync, rename).

    size: bytes that will be written, where that is known. Raises OSError naming `path` and what is needed, its old
    content untouched, where the disk is full or not writable; FileExistsError where it is there and not to be replaced.
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
            temporary.unlink()  # before the free space is measured
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
    """Give a finished file a name that nothing has, however many try at once. FileExistsError where one has."""
    try:
        os.link(new, path)
    except FileExistsError:
        raise
    except (
        OSError
    ) as error:  # a file system that knows no links: two at the same moment are not told apart
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from error
        os.replace(new, path)
    else:
        new.unlink()


def rotate(new: Path) -> None:
    """x.ckpt.new becomes x.ckpt, which becomes x.previous.ckpt; cut short anywhere, it can be done again."""
    path = new.with_suffix("")
    if path.exists():
        os.replace(path, path.with_name(f"{path.stem}.previous{path.suffix}"))
    os.replace(new, path)


def append(path: Path, content: bytes) -> None:
    """Add to a file and wait until the disk has it. Raises OSError as `write_atomically`, the file as it was."""
    try:
        with open(
            path, "ab", buffering=0
        ) as file:  # no buffer that would be tried again when the file is closed
            before, left = file.tell(), memoryview(content)
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
    lack = ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        there = next(place for place in path.absolute().parents if place.exists())
        free = f"{shutil.disk_usage(there).free} free"
        lack = f" ({free})" if size is None else f" ({size} bytes needed, {free})"
    reason = error.strerror or error
    return OSError(
        error.errno,
        f"cannot save {path}: {reason}{lack}; free some space or choose another folder with home=...",
    )
