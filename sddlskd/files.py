"""Writing that a crash cannot tear."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

__all__ = ["write_atomically"]


@contextmanager
def write_atomically(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to that becomes `path` as a whole or not at all (temporary file, fsync, rename).

    Raises OSError naming `path`, its old content untouched, where the disk is full or not writable.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        reason = (
            f"cannot save {path}: {error.strerror or error}; free some space or choose another folder with home=..."
        )
        raise OSError(error.errno, reason) from error
    finally:
        with suppress(FileNotFoundError, OSError):
            temporary.unlink()
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # makes the rename itself durable
    finally:
        os.close(folder)
