"""Find a data set's files: where they lie if `dataset.root` is a level off, or by a download."""

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from sddlskd.files.download import download_into

__all__ = ["check_named_root", "check_root", "fetch", "without_downloads"]

_may_download = ContextVar("may_download", default=True)

LEVELS = 3  # folders up and down from `dataset.root` that are looked into
MOST_FOLDERS = 300  # folders below `dataset.root` that are listed; a data set can have thousands


def check_root(
    root: Path, has_data: Callable[[Path], bool], what: str, parts: Collection[str] | None = None
) -> None:
    """Raise ValueError if a folder around or below `root` holds the data set, and `root` does not.

    Args:
        root: the folder that `dataset.root` names.
        has_data: function that returns whether a folder holds the data set.
        what: what the data set's folder holds, for the message.
        parts: names of the folders that the data set's folder holds. A folder around `root` is
            named only if `root` lies in one of its parts. None if any folder around `root` may be
            named.

    Raises:
        ValueError: with the folder that would do, in one line.
    """
    top = root.absolute()
    if has_data(top):
        return
    found = [
        folder
        for start in (top, top.resolve())  # `root` may be a link into a data set
        for folder in start.parents[:LEVELS]
        if parts is None or start.relative_to(folder).parts[0] in parts
        if has_data(folder)
    ][:1]
    found = found or _folders_below(top, has_data)
    if not found:
        return
    level = "deep" if found[0] in [*top.parents, *top.resolve().parents] else "shallow"
    choices = " or ".join(f"dataset.root={folder}" for folder in found[:3])
    raise ValueError(f"dataset.root={top} is too {level}: it does not hold {what}; set {choices}")


def _folders_below(top: Path, has_data: Callable[[Path], bool]) -> list[Path]:
    """Return the folders nearest below `top` that hold the data set, sorted; none if all are far.

    At most MOST_FOLDERS folders are listed, and hidden folders are left out.
    """
    level, listed = [top], 0
    for _ in range(LEVELS):
        below: list[Path] = []
        for folder in level[: max(MOST_FOLDERS - listed, 0)]:
            below += _subfolders(folder)
        listed += len(level)
        if found := [folder for folder in below if has_data(folder)]:
            return found
        level = below
    return []


def _subfolders(folder: Path) -> list[Path]:
    """Return the sorted folders in `folder` that are not hidden; none if it cannot be read."""
    try:
        entries = list(os.scandir(folder))
        return sorted(Path(e) for e in entries if e.is_dir() and not e.name.startswith("."))
    except OSError:
        return []


def check_named_root(data: Path, files: Collection[str], archive: str) -> None:
    """Check with `check_root` the folder above a data set whose own folder has a fixed name.

    Args:
        data: the data set's own folder, as `dataset.root` places it.
        files: names of the files in it without which it is not the data set's.
        archive: name of the archive beside it, which will do instead.

    Raises:
        ValueError: as `check_root`.
    """

    def has_data(folder: Path) -> bool:
        # Unlike Path.is_file, os.path.isfile takes a folder that may not be read as absent.
        unpacked = all(os.path.isfile(folder / data.name / file) for file in files)
        return unpacked or os.path.isfile(folder / archive)

    check_root(data.parent, has_data, f"{data.name} or {archive}", parts=[data.name])


@contextmanager
def without_downloads() -> Iterator[None]:
    """Let loaders raise FileNotFoundError within a block instead of downloading a file."""
    token = _may_download.set(False)
    try:
        yield
    finally:
        _may_download.reset(token)


def fetch(url: str, md5: str, folder: Path, *, limit: int) -> Path:
    """Download a file as `download_into`, unless `without_downloads` forbids it.

    Args:
        url: address of the file.
        md5: md5 of the file in hex.
        folder: folder of the file.
        limit: largest size in bytes.

    Returns:
        Path of the file.

    Raises:
        FileNotFoundError: if the file is missing and must not be downloaded.
        DownloadError: if the file is missing and cannot be downloaded.
    """
    path = folder / url.rpartition("/")[2]
    if not _may_download.get() and not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    return download_into(url, md5, folder, limit=limit)
