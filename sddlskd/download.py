"""Files from the web: whole or not at all, resumed, tried again, and never larger than was agreed.

What is under way stands in <file>.partial, and in <file>.partial.json which file of the server it is a part of.
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

from sddlskd.files import write_atomically
from sddlskd.meter import meter

__all__ = ["DownloadError", "fetch", "fetch_into"]

ATTEMPTS = 5  # in a row that bring less than GAIN bytes; then the address is given up
GAIN = 1 << 20  # bytes
STALLED_S = 30.0  # seconds without an answer, or with less than SLOWEST bytes a second
SLOWEST = 100  # bytes a second
BACKOFF_S = 1.0  # seconds before the second attempt; twice as long before each one after it
LONGEST_S = 60.0  # seconds between attempts, whatever the server asks for
LATER = (408, 425, 429, 500, 502, 503, 504)  # answers that say: try again later

log = logging.getLogger(__name__)


class DownloadError(RuntimeError):
    """A file cannot be had from its address; the message says why."""


class _TryAgain(Exception):
    """An attempt failed in a way that the next one may not.

    after_s: seconds that the server asks for; reached: whether there was a server; anew: what is held is of no use.
    """

    def __init__(
        self, reason: str, *, after_s: float = 0.0, reached: bool = True, anew: bool = False
    ) -> None:
        super().__init__(reason)
        self.after_s, self.reached, self.anew = after_s, reached, anew


class _GiveUp(Exception):
    """An attempt failed in a way that every other one would."""


class _Answer(NamedTuple):
    body: HTTPResponse
    start: int  # bytes that the answer leaves out
    total: int | None  # bytes of the whole file
    version: (
        str | None
    )  # what names this version of the file to the server: a strong ETag or a date


def fetch(url: str, path: Path, *, limit: int, md5: str | None = None) -> Path:
    """Have the file of `url` at `path`: fetched unless it is there, by one process while others wait.

    limit: largest size in bytes; md5: in hex, where it is known. An interrupted download goes on where it stopped if
    the server still has the same version of the file. Raises DownloadError; nothing is at `path` then.
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
                    raise _GiveUp(f"what came has md5 {came}")
                os.replace(partial, path)  # nobody ever sees part of a file under its name
                _forget(partial)
    except (OSError, _GiveUp) as error:
        raise DownloadError(f"cannot fetch {url} ({_reason(error)})") from error
    return path


def fetch_into(url: str, md5: str, folder: Path, *, limit: int) -> Path:
    """The file of `url` in `folder`, fetched if it is not there: once, whole and with this md5, or DownloadError."""
    name = url.rsplit("/", 1)[-1]
    try:
        return fetch(url, folder / name, limit=limit, md5=md5)
    except DownloadError as error:
        raise DownloadError(f"{error}: put {name}, md5 {md5}, into {folder}") from error


def _check_address(url: str) -> None:
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid or not url.isascii() or not url.isprintable() or " " in url:
        raise _GiveUp("it is no address: expected http://host/path or https://host/path")


def _persist(url: str, partial: Path, limit: int) -> None:
    """Attempt after attempt until the whole file stands in `partial`. Raises _GiveUp, or OSError of the disk."""
    failures, furthest, reached = 0, 0, False
    while True:
        try:
            with _opened(url, *_held(url, partial)) as answer:
                _store(url, answer, partial, limit)
            return
        except _TryAgain as error:
            held = partial.stat().st_size if partial.exists() else 0
            failures = 1 if held >= furthest + GAIN else failures + 1
            furthest, reached = max(furthest, held), reached or error.reached
            if (
                failures >= ATTEMPTS or not reached
            ):  # where nobody ever answered, waiting is of little use
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
            time.sleep(
                pause * random.SystemRandom().uniform(0.75, 1.0)
            )  # those who failed together do not come back together


def _held(url: str, partial: Path) -> tuple[int, str | None]:
    """How many bytes of which version an earlier attempt left; 0 where they cannot be told from another file's."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(_note(partial).read_text())
        size = partial.stat().st_size
        if known["url"] == url and isinstance(known["version"], str) and size:
            return size, known["version"]
    return 0, None


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but never from https to http, nor from the web to anything else."""

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
    opener = urllib.request.OpenerDirector()  # build_opener would add file: and ftp:
    for handler in (urllib.request.ProxyHandler, urllib.request.HTTPHandler, urllib.request.HTTPSHandler, _Redirects,
                    urllib.request.HTTPDefaultErrorHandler, urllib.request.HTTPErrorProcessor):  # fmt: skip
        opener.add_handler(handler())
    answer = opener.open(request, timeout=STALLED_S)
    assert isinstance(answer, HTTPResponse)
    return answer


@contextmanager
def _opened(url: str, held: int, version: str | None) -> Iterator[_Answer]:
    """The server's answer to a request for what is missing. Raises _TryAgain or _GiveUp."""
    request = urllib.request.Request(
        url, headers={"User-Agent": "sddlskd", "Accept-Encoding": "identity"}
    )
    if version:
        request.add_header("Range", f"bytes={held}-")
        request.add_header("If-Range", version)  # another version is sent as a whole
    try:
        with _open(request) as body:
            yield _read_headers(body, held, version)
    except urllib.error.HTTPError as error:
        with error:  # it is the open answer as well
            if error.code == 416:  # the file ends before what is missing
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
    except ValueError as error:  # a redirect to what is no address
        raise _GiveUp(_reason(error)) from error


def _read_headers(body: HTTPResponse, held: int, expected: str | None) -> _Answer:
    if (encoding := body.headers.get("Content-Encoding", "identity")) != "identity":
        raise _GiveUp(f"it comes encoded as {encoding:.40}")
    tag, date = body.headers.get("ETag", ""), body.headers.get("Last-Modified", "")
    version: str | None = (
        tag if tag.startswith('"') else date
    )  # a weak ETag does not vouch for every byte
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
        raise _GiveUp(f"it answers {body.status} {span:.80} to a request for all from byte {held}")
    total = span.rpartition("/")[2]
    return _Answer(body, held, int(total) if total.isdecimal() else None, version)


def _store(url: str, answer: _Answer, partial: Path, limit: int) -> None:
    """Write an answer into `partial` at its place. Raises _TryAgain where it is cut or stalls, _GiveUp if too large."""
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
    """What has come, without waiting for more."""
    try:
        return body.read1(1 << 16)
    except (HTTPException, OSError, ValueError) as error:  # ValueError: a chunk's bad length
        raise _TryAgain(_reason(error)) from error


def _check_size(size: int, limit: int, partial: Path) -> None:
    if size > limit:
        _forget(partial)
        raise _GiveUp(f"{size} bytes or more, and at most {limit} are taken")


def _note(partial: Path) -> Path:
    return partial.with_name(f"{partial.name}.json")


def _forget(partial: Path) -> None:
    for path in (partial, _note(partial)):
        path.unlink(missing_ok=True)


def _md5(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _seconds(text: Any) -> float:
    """A Retry-After header; 0 where there is none, or it is a date."""
    return float(text) if isinstance(text, str) and text.isdecimal() and len(text) < 6 else 0.0


def _reason(error: BaseException) -> str:
    if isinstance(error, TimeoutError) or (
        isinstance(error, urllib.error.URLError) and isinstance(error.reason, TimeoutError)
    ):
        return f"no answer within {STALLED_S:g} s"
    return " ".join(str(error).split()) or type(error).__name__
