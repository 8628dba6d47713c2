"""Find or download a data set's files; recognise a `dataset.root` that is a few levels off."""

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from sddlskd.files.download import download_into

__all__ = ["check_named_root", "check_root", "fetch", "without_downloads"]

_may_download = ContextVar("may_download", default=True)

LEVELS = 3  # folders up and down from `dataset.root` that are looked into
# Folders below `dataset.root` that are listed at most; a data set can have thousands.
MOST_FOLDERS = 300


def check_root(
    root: Path, has_data: Callable[[Path], bool], what: str, parts: Collection[str] | None = None
) -> None:
    """Raise ValueError if not `root` but a folder above or below `root` holds the data set.

    The folders up to three levels (LEVELS) above and below `root` are checked. Below `root`, hidden
    folders are skipped, and at most 300 folders (MOST_FOLDERS) are listed. If no checked folder
    holds the data set, nothing is raised.

    Args:
        root: folder in which the user says that the data set is (`dataset.root`).
        has_data: function that returns whether the folder with this path holds the data set.
        what: what a folder with the data set holds, for the message.
        parts: names of subfolders that a folder with the data set has. A folder above `root` then
            counts only if `root` lies in, or is, one of its subfolders with such a name. None if
            every folder above `root` counts.

    Raises:
        ValueError: If folders above or below `root` hold the data set, and `root` does not. The
            message names one to three of the folders.
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
    """Return the folders nearest below `top` that hold the data set, sorted.

    The result is empty if there are none within LEVELS levels. At most MOST_FOLDERS folders are
    listed, and hidden folders are left out.
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
    """Raise ValueError if a data set is not in `dataset.root`, but in a folder above or below it.

    `dataset.root`, the folder that the user names, is the parent of `data`. The folders above and
    below are those that `check_root` checks. If none of them holds the data set either, nothing is
    raised.

    Args:
        data: folder of the unpacked data set in `dataset.root`, whose name the data set prescribes;
            need not exist.
        files: names of the files in `data` by which the data set is recognised; all must exist.
        archive: name of the data set's archive, which lies beside `data`. A folder that has the
            archive alone counts as holding the data set.

    Raises:
        ValueError: If neither the files nor the archive are there, but a folder above or below
            `dataset.root` holds them; the message names one to three such folders.
    """

    def has_data(folder: Path) -> bool:
        # Unlike Path.is_file, os.path.isfile takes a folder that may not be read as absent.
        unpacked = all(os.path.isfile(folder / data.name / file) for file in files)
        return unpacked or os.path.isfile(folder / archive)

    check_root(data.parent, has_data, f"{data.name} or {archive}", parts=[data.name])


@contextmanager
def without_downloads() -> Iterator[None]:
    """Forbid downloads inside a `with` block: `fetch` raises FileNotFoundError for a missing file.

    All loaders of data sets download with `fetch`. Other threads may still download.
    """
    token = _may_download.set(False)
    try:
        yield
    finally:
        _may_download.reset(token)


def fetch(url: str, md5: str, folder: Path, *, limit: int) -> Path:
    """Return the path of a file of a data set; download the file into `folder` if it is missing.

    The md5 and size of a file that exists are not checked.

    Args:
        url: address of the file, http or https; its last part is the file name.
        md5: md5 in hex that the downloaded file must have.
        folder: folder of the file; made if it is missing.
        limit: largest size of the download in bytes.

    Returns:
        Path of the file: `folder`/<last part of `url`>.

    Raises:
        FileNotFoundError: If the file is missing in a block `with without_downloads()`.
        DownloadError: If the file is missing and cannot be downloaded: the server fails, the file
            is larger than `limit`, has another md5, cannot be written, or any other problem.
    """
    path = folder / url.rpartition("/")[2]
    if not _may_download.get() and not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    return download_into(url, md5, folder, limit=limit)
