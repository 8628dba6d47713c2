"""Download files: completely or not at all, with resume, retries and a size limit.

An unfinished download is in <file>.partial. The file <file>.partial.json notes the address and the
version of the file on the server to which these bytes belong.
"""

import hashlib
import json
import logging
import os
import random
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import requests
from filelock import FileLock
from urllib3.exceptions import HTTPError, MaxRetryError, ReadTimeoutError

from sddlskd.files.atomic import write_atomically
from sddlskd.terminal.meter import meter

__all__ = ["DownloadError", "download_file", "download_into"]

# Give up after this many attempts in a row that each bring less than GAIN bytes.
ATTEMPTS = 5
GAIN = 1 << 20  # bytes
# An attempt has failed after this many seconds without an answer, or below SLOWEST.
STALLED_S = 30.0
SLOWEST = 100  # bytes per second
BACKOFF_S = 1.0  # pause before the second attempt; doubled each time
LONGEST_S = 60.0  # longest pause, even if the server asks for more
LATER = (408, 425, 429, 500, 502, 503, 504)  # HTTP status codes that mean: try again later
MOST_REDIRECTS = 10

log = logging.getLogger(__name__)


class DownloadError(RuntimeError):
    """Error for a file that cannot be downloaded; the message says why."""


class _TryAgain(Exception):
    """Error for an attempt that failed when the next attempt may succeed.

    Args:
        reason: why the attempt failed.
        after_s: seconds that the server asks to wait.
        reached: whether a server was reached.
        anew: whether the bytes of earlier attempts are useless.
    """

    def __init__(
        self, reason: str, *, after_s: float = 0.0, reached: bool = True, anew: bool = False
    ) -> None:
        super().__init__(reason)
        self.after_s = after_s
        self.reached = reached
        self.anew = anew


class _GiveUp(Exception):
    """Error for an attempt that failed in a way in which every other attempt would fail."""


def download_file(url: str, path: Path, *, limit: int, md5: str | None = None) -> Path:
    """Download `url` to `path`, unless the file `path` exists.

    An existing file is not checked. An attempt that fails for a passing reason, such as a time-out
    or a busy server, is repeated until five attempts in a row (ATTEMPTS) have each brought less
    than 1 MiB (GAIN). If no server can be reached, the first attempt is the only one. Each attempt,
    also in a later call, continues at the byte that was reached if the server still has the same
    version of the file. If several processes call the function at once, one downloads and the
    others wait.

    Args:
        url: address of the file, http or https.
        path: file to write; its folder is made if it is missing.
        limit: largest size in bytes.
        md5: md5 in hex that the file must have; None to accept any content.

    Returns:
        `path`.

    Raises:
        DownloadError: If the file cannot be downloaded: the address is invalid, the server fails or
            refuses, the file is larger than `limit` or has another md5, the disk fails, or any
            other problem. `path` does not exist then.
    """
    if path.is_file():
        return path
    try:
        _check_address(url)
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f"{path.name}.lock")):
            if not path.is_file():
                log.info("fetching %s into %s", url, path.parent)
                partial = path.with_name(f"{path.name}.partial")
                _persist(url, partial, limit)
                if md5 and (came := _md5(partial)) != md5:
                    _forget(partial)
                    raise _GiveUp(f"the downloaded file has md5 {came}, expected {md5}")
                # Rename at the end, so that no process ever sees part of a file at `path`.
                os.replace(partial, path)
                _forget(partial)
    except (OSError, _GiveUp) as error:
        raise DownloadError(f"cannot fetch {url} ({_reason(error)})") from error
    return path


def download_into(url: str, md5: str, folder: Path, *, limit: int) -> Path:
    """Download `url` into `folder` under the file name in `url`, unless that file exists there.

    An existing file is not checked. If several processes call the function at once, the file is
    downloaded once.

    Args:
        url: address of the file, http or https; its last part is the file name.
        md5: md5 in hex that the downloaded file must have.
        folder: folder of the file; made if it is missing.
        limit: largest size in bytes.

    Returns:
        Path of the file.

    Raises:
        DownloadError: If the file cannot be downloaded, is larger than `limit` or has another md5.
            The message says which file to put into which folder.
    """
    name = url.rsplit("/", 1)[-1]
    try:
        return download_file(url, folder / name, limit=limit, md5=md5)
    except DownloadError as error:
        raise DownloadError(f"{error}: put {name}, md5 {md5}, into {folder}") from error


def _check_address(url: str) -> None:
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid or not url.isascii() or not url.isprintable() or " " in url:
        raise _GiveUp("it is not a valid address: expected http://host/path or https://host/path")


def _persist(url: str, partial: Path, limit: int) -> None:
    """Repeat attempts until the whole file is in `partial`.

    Raise _GiveUp if the attempts are used up or pointless, or OSError if the disk fails.
    """
    failures = 0
    furthest = 0
    reached = False
    with requests.Session() as session:
        session.max_redirects = MOST_REDIRECTS
        session.hooks["response"].append(_check_redirect)
        while True:
            try:
                _attempt(session, url, partial, limit)
                return
            except _TryAgain as error:
                held = partial.stat().st_size if partial.exists() else 0
                if held >= furthest + GAIN:
                    failures = 0
                failures += 1
                furthest = max(furthest, held)
                reached = reached or error.reached
                # If no server ever answered, waiting is of little use.
                if failures >= ATTEMPTS or not reached:
                    raise _GiveUp(str(error)) from error
                if error.anew:
                    _forget(partial)
                pause = min(max(BACKOFF_S * 2 ** (failures - 1), error.after_s), LONGEST_S)
                message = "%s: %s; trying again in %.0f s (%d of %d)"
                log.info(message, url, error, pause, failures + 1, ATTEMPTS)
                # A random pause spreads clients that failed at the same moment.
                time.sleep(pause * random.SystemRandom().uniform(0.75, 1.0))


def _attempt(session: requests.Session, url: str, partial: Path, limit: int) -> None:
    """Download the bytes of a file that `partial` lacks.

    Raise _TryAgain if the next attempt may succeed, and _GiveUp if every other attempt would fail.
    """
    held, expected = _held(url, partial)
    headers = {"User-Agent": "sddlskd", "Accept-Encoding": "identity"}
    if expected:
        # The server sends another version as a whole.
        headers |= {"Range": f"bytes={held}-", "If-Range": expected}
    try:
        with session.get(url, headers=headers, stream=True, timeout=STALLED_S) as response:
            status = f"HTTP Error {response.status_code}: {response.reason}"
            if response.status_code == 416:  # the file ends before the requested bytes
                raise _TryAgain("the file has changed on the server", anew=True)
            if response.status_code in LATER:
                after_s = _number(response.headers.get("Retry-After", ""))
                raise _TryAgain(status, after_s=after_s or 0)
            if response.status_code >= 300:
                raise _GiveUp(status)
            start, total, version = _read_headers(response, held, expected)
            _check_size(total or 0, limit, partial)
            if not start:
                _forget(partial)
                with write_atomically(_note(partial)) as note:
                    note.write(json.dumps({"url": url, "version": version}).encode())
            _store(response, partial, start, total, limit)
    except (requests.TooManyRedirects, ValueError) as error:  # ValueError: an invalid address
        raise _GiveUp(_reason(error)) from error
    except (requests.RequestException, HTTPError) as error:
        # requests meets a MaxRetryError if it cannot connect, and in no other case.
        reached = not isinstance(error.__context__, MaxRetryError)
        raise _TryAgain(_reason(error), reached=reached) from error


def _check_redirect(response: requests.Response, **_: Any) -> None:
    """Raise _GiveUp if a response redirects from https to another scheme."""
    if response.is_redirect:
        response.close()  # do not read the body, however long it is
        target = urljoin(response.url, response.headers["Location"])
        if response.url.startswith("https:") and not target.startswith("https:"):
            raise _GiveUp(f"it redirects from https to {target:.200}")


def _held(url: str, partial: Path) -> tuple[int, str | None]:
    """Return how many bytes an earlier attempt left in `partial`, and the version they belong to.

    The result is (0, None) if these bytes cannot be told from those of another file.
    """
    with suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(_note(partial).read_text())
        size = partial.stat().st_size
        if known["url"] == url and isinstance(known["version"], str) and size:
            return size, known["version"]
    return 0, None


def _read_headers(
    response: requests.Response, held: int, expected: str | None
) -> tuple[int, int | None, str | None]:
    """Return what the headers say: (first byte of the answer, size of the whole file, version).

    The size is None if it is unknown. The version is a strong ETag or a date, or None if there is
    neither. Raise _TryAgain or _GiveUp if the response does not fit the request.
    """
    headers = response.headers
    encoding = headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        raise _GiveUp(f"the server sends it encoded as {encoding:.40}")
    tag = headers.get("ETag", "")
    # A weak ETag does not guarantee that every byte is the same.
    version: str | None = tag if tag.startswith('"') else headers.get("Last-Modified", "")
    if not (version and version.isascii() and version.isprintable() and len(version) < 200):
        version = None
    if response.status_code == 200:
        return 0, _number(headers.get("Content-Length", "")), version
    span = headers.get("Content-Range", "")
    if response.status_code == 206 and version not in (None, expected):
        raise _TryAgain("the file has changed on the server", anew=True)
    if response.status_code != 206 or not held or not span.startswith(f"bytes {held}-"):
        raise _GiveUp(
            f"the server answers {response.status_code} {span:.80} "
            f"to a request for the bytes from {held} on"
        )
    return held, _number(span.rpartition("/")[2]), version


def _store(
    response: requests.Response, partial: Path, start: int, total: int | None, limit: int
) -> None:
    """Append the body of a response to `partial`.

    Raise _TryAgain if the body is cut off or stalls, _GiveUp if the file is larger than `limit`.

    Args:
        response: the response.
        partial: file to append to.
        start: number of bytes that the file holds.
        total: number of bytes of the whole file, if known.
        limit: largest size in bytes.
    """
    response.raw.enforce_content_length = False  # the check below counts the bytes of `start` too
    done = before = start
    since = time.monotonic()
    with open(partial, "ab") as file, meter(partial.stem, total, "bytes") as show:
        # read1 returns the bytes that have arrived, without waiting for more; empty at the end.
        while chunk := response.raw.read1(1 << 16):
            file.write(chunk)
            done += len(chunk)
            _check_size(done, limit, partial)
            show(done)
            elapsed = time.monotonic() - since
            if elapsed >= STALLED_S:
                if done - before < SLOWEST * elapsed:
                    raise _TryAgain(f"stalled: {done - before} bytes in {elapsed:.0f} s")
                since = time.monotonic()
                before = done
        if total is not None and done != total:
            raise _TryAgain(f"cut off after {done} of {total} bytes", anew=done > total)
        file.flush()
        os.fsync(file.fileno())


def _check_size(size: int, limit: int, partial: Path) -> None:
    if size > limit:
        _forget(partial)
        raise _GiveUp(f"it has {size} bytes or more, and the limit is {limit}")


def _note(partial: Path) -> Path:
    return partial.with_name(f"{partial.name}.json")


def _forget(partial: Path) -> None:
    for path in (partial, _note(partial)):
        path.unlink(missing_ok=True)


def _md5(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _number(text: str) -> int | None:
    """Return the number that a header gives in plain digits, or None."""
    return int(text) if text.isascii() and text.isdecimal() else None


def _reason(error: BaseException) -> str:
    """Return why an attempt failed, in one line."""
    if isinstance(error, requests.Timeout | ReadTimeoutError):
        return f"no answer within {STALLED_S:g} s"
    if isinstance(error, requests.RequestException | HTTPError):
        # The libraries wrap the error that says why in errors that repeat the address.
        while cause := error.__cause__ or error.__context__:
            error = cause
    return " ".join(str(error).split()) or type(error).__name__
