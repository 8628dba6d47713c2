"""Download files: completely or not at all, with resume, retries and a size limit.

An unfinished download is in <file>.partial. The note <file>.partial.json says which version of
which file on the server it is a part of.
"""

import hashlib
import json
import logging
import os
import random
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException, HTTPMessage, HTTPResponse
from pathlib import Path
from typing import IO, Any, NamedTuple
from urllib.parse import urlsplit

from filelock import FileLock

from sddlskd.files.atomic import write_atomically
from sddlskd.terminal.meter import meter

__all__ = ["DownloadError", "download_file", "download_into"]

# Give up after this many attempts in a row that each bring less than GAIN bytes.
ATTEMPTS = 5
GAIN = 1 << 20  # bytes
# An attempt has failed after this many seconds without an answer, or below SLOWEST.
STALLED_S = 30.0
SLOWEST = 100  # bytes per second
BACKOFF_S = 1.0  # seconds before the second attempt; doubled before each later one
LONGEST_S = 60.0  # longest pause between attempts, even if the server asks for a longer one
LATER = (408, 425, 429, 500, 502, 503, 504)  # HTTP status codes that mean: try again later

log = logging.getLogger(__name__)


class DownloadError(RuntimeError):
    """A file that cannot be downloaded; the message says why."""


class _TryAgain(Exception):
    """An attempt failed, but the next one may succeed.

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
        self.after_s, self.reached, self.anew = after_s, reached, anew


class _GiveUp(Exception):
    """An attempt failed in a way in which every other attempt would fail."""


class _Answer(NamedTuple):
    """A server's answer.

    Attributes:
        body: the response to read from.
        start: number of bytes at the beginning of the file that the answer leaves out.
        total: number of bytes of the whole file, if known.
        version: text that identifies this version of the file to the server (a strong ETag or a
            date).
    """

    body: HTTPResponse
    start: int
    total: int | None
    version: str | None


def download_file(url: str, path: Path, *, limit: int, md5: str | None = None) -> Path:
    """Download `url` to `path` unless `path` exists.

    If several processes call the function at once, one downloads and the others wait. An
    interrupted download continues at the byte it reached if the server still has the same version
    of the file.

    Args:
        url: address of the file, http or https.
        path: file to write.
        limit: largest size in bytes.
        md5: md5 of the file in hex, if known.

    Returns:
        `path`.

    Raises:
        DownloadError: if the file cannot be downloaded; `path` does not exist then.
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
    """Download `url` into `folder` under its own name, unless the file exists there.

    If several processes call the function at once, the file is downloaded once.

    Args:
        url: address of the file, http or https; its last part is the file name.
        md5: md5 of the file in hex.
        folder: folder of the file.
        limit: largest size in bytes.

    Returns:
        Path of the file.

    Raises:
        DownloadError: if the file cannot be downloaded or has another md5. The message says which
            file to put into which folder.
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
    failures, furthest, reached = 0, 0, False
    while True:
        try:
            with _connection(url, *_held(url, partial)) as answer:
                _store(url, answer, partial, limit)
            return
        except _TryAgain as error:
            held = partial.stat().st_size if partial.exists() else 0
            failures = 1 if held >= furthest + GAIN else failures + 1
            furthest, reached = max(furthest, held), reached or error.reached
            # If no server ever answered, waiting is of little use.
            if failures >= ATTEMPTS or not reached:
                raise _GiveUp(str(error)) from error
            if error.anew:
                _forget(partial)
            pause = min(max(BACKOFF_S * 2 ** (failures - 1), error.after_s), LONGEST_S)
            log.info(
                "%s: %s; trying again in %.0f s (%d of %d)",
                url,
                error,
                pause,
                failures + 1,
                ATTEMPTS,
            )
            # A random pause spreads clients that failed at the same moment.
            time.sleep(pause * random.SystemRandom().uniform(0.75, 1.0))


def _held(url: str, partial: Path) -> tuple[int, str | None]:
    """Return how many bytes of which version an earlier attempt left.

    The result is (0, None) if these bytes cannot be told from those of another file.
    """
    with suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(_note(partial).read_text())
        size = partial.stat().st_size
        if known["url"] == url and isinstance(known["version"], str) and size:
            return size, known["version"]
    return 0, None


class _Redirects(urllib.request.HTTPRedirectHandler):
    """A handler that follows redirects within http and https, but not from https to http."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        schemes = urlsplit(req.full_url).scheme, urlsplit(newurl).scheme
        if schemes not in (("http", "http"), ("http", "https"), ("https", "https")):
            raise _GiveUp(f"it redirects from {schemes[0]} to {newurl:.200}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)

    def http_error_302(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage
    ) -> Any:
        try:
            return super().http_error_302(req, fp, code, msg, headers)
        except (_GiveUp, ValueError):
            fp.close()
            raise

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


def _open(request: urllib.request.Request) -> HTTPResponse:
    opener = urllib.request.OpenerDirector()  # build_opener would allow file: and ftp: too
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        _Redirects,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
    ):
        opener.add_handler(handler())
    answer = opener.open(request, timeout=STALLED_S)
    assert isinstance(answer, HTTPResponse)
    return answer


@contextmanager
def _connection(url: str, held: int, version: str | None) -> Iterator[_Answer]:
    """Request the missing bytes of a file and yield the server's answer.

    Args:
        url: address of the file.
        held: number of bytes that an earlier attempt left.
        version: version of the file that these bytes belong to; None to request the whole file.

    Raises:
        _TryAgain: if the next attempt may succeed.
        _GiveUp: if every other attempt would fail.
    """
    request = urllib.request.Request(
        url, headers={"User-Agent": "sddlskd", "Accept-Encoding": "identity"}
    )
    if version:
        request.add_header("Range", f"bytes={held}-")
        request.add_header("If-Range", version)  # the server sends another version as a whole
    try:
        with _open(request) as body:
            yield _read_headers(body, held, version)
    except urllib.error.HTTPError as error:
        with error:  # the error holds the open response
            if error.code == 416:  # the file ends before the requested bytes
                raise _TryAgain("the file has changed on the server", anew=True) from error
            if error.code in LATER:
                raise _TryAgain(
                    _reason(error), after_s=_seconds(error.headers.get("Retry-After"))
                ) from error
            raise _GiveUp(_reason(error)) from error
    except urllib.error.URLError as error:
        raise _TryAgain(_reason(error), reached=False) from error
    except (HTTPException, TimeoutError, ConnectionError) as error:
        raise _TryAgain(_reason(error)) from error
    except ValueError as error:  # a redirect to an invalid address
        raise _GiveUp(_reason(error)) from error


def _read_headers(body: HTTPResponse, held: int, expected: str | None) -> _Answer:
    """Return the answer that the headers of a response describe.

    Raise _TryAgain or _GiveUp if the response does not fit the request.
    """
    if (encoding := body.headers.get("Content-Encoding", "identity")) != "identity":
        raise _GiveUp(f"the server sends it encoded as {encoding:.40}")
    tag, date = body.headers.get("ETag", ""), body.headers.get("Last-Modified", "")
    # A weak ETag does not guarantee that every byte is the same.
    version: str | None = tag if tag.startswith('"') else date
    if not (version and version.isascii() and version.isprintable() and len(version) < 200):
        version = None
    length = body.headers.get("Content-Length")
    size = int(length) if length and length.isdecimal() else None
    if body.status == 200:
        return _Answer(body, 0, size, version)
    span = body.headers.get("Content-Range", "")
    if body.status == 206 and version not in (None, expected):
        raise _TryAgain("the file has changed on the server", anew=True)
    if body.status != 206 or not held or not span.startswith(f"bytes {held}-"):
        raise _GiveUp(
            f"the server answers {body.status} {span:.80} to a request for the bytes from {held} on"
        )
    total = span.rpartition("/")[2]
    return _Answer(body, held, int(total) if total.isdecimal() else None, version)


def _store(url: str, answer: _Answer, partial: Path, limit: int) -> None:
    """Append an answer to `partial`, or write it anew if the answer holds the whole file.

    Raise _TryAgain if the answer is cut off or stalls, _GiveUp if the file is larger than `limit`.
    """
    body, start, total, version = answer
    _check_size(total or 0, limit, partial)
    if not start:
        _forget(partial)
        with write_atomically(_note(partial)) as note:
            note.write(json.dumps({"url": url, "version": version}).encode())
    done, since, before = start, time.monotonic(), start
    with open(partial, "ab") as file, meter(partial.stem, total, "bytes") as show:
        while chunk := _chunk(body):
            file.write(chunk)
            done += len(chunk)
            _check_size(done, limit, partial)
            show(done)
            if (elapsed := time.monotonic() - since) >= STALLED_S:
                if done - before < SLOWEST * elapsed:
                    raise _TryAgain(f"stalled: {done - before} bytes in {elapsed:.0f} s")
                since, before = time.monotonic(), done
        if total is not None and done != total:
            raise _TryAgain(f"cut off after {done} of {total} bytes", anew=done > total)
        file.flush()
        os.fsync(file.fileno())


def _chunk(body: HTTPResponse) -> bytes:
    """Return the bytes that have arrived, without waiting for more; empty at the end."""
    try:
        return body.read1(1 << 16)
    except (HTTPException, OSError, ValueError) as error:  # ValueError: invalid chunk length
        raise _TryAgain(_reason(error)) from error


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


def _seconds(text: Any) -> float:
    """Return the seconds of a Retry-After header; 0 if the header is missing or a date."""
    return float(text) if isinstance(text, str) and text.isdecimal() and len(text) < 6 else 0.0


def _reason(error: BaseException) -> str:
    if isinstance(error, TimeoutError) or (
        isinstance(error, urllib.error.URLError) and isinstance(error.reason, TimeoutError)
    ):
        return f"no answer within {STALLED_S:g} s"
    return " ".join(str(error).split()) or type(error).__name__
