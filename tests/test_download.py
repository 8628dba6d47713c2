"""Test downloads from a web server on loopback, with good and bad answers."""

import hashlib
import io
import json
import logging
import multiprocessing
import random
import socket
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from requests.adapters import HTTPAdapter

from sddlskd.files import download
from sddlskd.files.download import DownloadError, download_file
from tests.loopback import Page, Site, answer, raw, site, status

CONTENT = random.Random(0).randbytes(300_000)
MD5 = hashlib.md5(CONTENT).hexdigest()
LIMIT = 1 << 20


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(download, "BACKOFF_S", 0.001)
    monkeypatch.setattr(download, "STALLED_S", 0.5)
    with site() as here:
        yield here


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new" / "file.bin"


def left(path: Path) -> list[str]:
    return (
        sorted(p.name for p in path.parent.iterdir() if p.suffix != ".lock")
        if path.parent.exists()
        else []
    )


def refused(url: str, path: Path, limit: int = LIMIT, md5: str | None = None) -> str:
    with pytest.raises(DownloadError) as caught:
        download_file(url, path, limit=limit, md5=md5)
    message = str(caught.value)
    assert message.startswith(f"cannot fetch {url} (")
    assert "\n" not in message
    assert not path.exists()
    return message


def test_a_file_is_fetched_once(web: Site, path: Path) -> None:
    url = web.file("file.bin", CONTENT)
    for _ in range(2):
        assert download_file(url, path, limit=LIMIT, md5=MD5) == path
        assert path.read_bytes() == CONTENT
    assert web.asked == [("/file.bin", None)]
    assert left(path) == ["file.bin"]


def test_an_empty_file(web: Site, path: Path) -> None:
    assert download_file(web.file("file.bin", b""), path, limit=LIMIT).read_bytes() == b""


# Downloads that are cut off


def test_what_is_cut_off_goes_on_where_it_stopped(web: Site, path: Path) -> None:
    url = web.file("file.bin", CONTENT, cuts=[100_000, 50_000])
    download_file(url, path, limit=LIMIT, md5=MD5)
    assert [wanted for _, wanted in web.asked] == [None, "bytes=100000-", "bytes=150000-"]
    assert path.read_bytes() == CONTENT
    assert left(path) == ["file.bin"]


def test_a_later_process_goes_on_where_an_earlier_one_gave_up(web: Site, path: Path) -> None:
    url = web.file("file.bin", CONTENT, cuts=[100_000, 0, 0, 0, 0, 0, 0])
    assert "cut off after 100000 of 300000 bytes" in refused(url, path)
    assert left(path) == ["file.bin.partial", "file.bin.partial.json"]
    web.file("file.bin", CONTENT)
    web.asked.clear()
    assert download_file(url, path, limit=LIMIT).read_bytes() == CONTENT
    assert web.asked == [("/file.bin", "bytes=100000-")]


@pytest.mark.parametrize("tag", [None, 'W/"1"'])
def test_without_a_version_to_name_it_starts_anew(web: Site, path: Path, tag: str | None) -> None:
    url = web.file("file.bin", CONTENT, tag=tag, cuts=[100_000])
    assert download_file(url, path, limit=LIMIT).read_bytes() == CONTENT
    assert web.asked == [("/file.bin", None)] * 2


def test_a_server_without_ranges_sends_it_all_again(web: Site, path: Path) -> None:
    assert (
        download_file(
            web.file("file.bin", CONTENT, ranges=False, cuts=[9]), path, limit=LIMIT
        ).read_bytes()
        == CONTENT
    )


def test_a_file_that_changed_in_between_is_not_glued_together(web: Site, path: Path) -> None:
    url = web.file("file.bin", CONTENT, cuts=[100_000] + [0] * 9)
    refused(url, path)
    web.file("file.bin", CONTENT[::-1], tag='"2"')
    assert download_file(url, path, limit=LIMIT).read_bytes() == CONTENT[::-1]
    assert web.asked[-1] == ("/file.bin", "bytes=100000-")


def test_a_server_that_does_not_look_at_the_version(web: Site, path: Path) -> None:
    url = web.file("file.bin", CONTENT, cuts=[100_000] + [0] * 9)
    refused(url, path)
    span = {
        "Content_Range": "bytes 100000-299999/300000",
        "ETag": '"2"',
        "Content_Length": "200000",
    }
    whole = answer(CONTENT[::-1], ETag='"2"', Content_Length="300000")
    web.page("file.bin", answer(CONTENT[::-1][100_000:], 206, **span), whole)
    assert download_file(url, path, limit=LIMIT).read_bytes() == CONTENT[::-1]


def test_a_whole_file_that_was_never_renamed(web: Site, path: Path) -> None:
    url = web.file("file.bin", CONTENT)
    path.parent.mkdir()
    path.with_name("file.bin.partial").write_bytes(CONTENT)
    path.with_name("file.bin.partial.json").write_text(json.dumps({"url": url, "version": '"1"'}))
    assert download_file(url, path, limit=LIMIT, md5=MD5).read_bytes() == CONTENT


@pytest.mark.parametrize("note", ["", "{", "[]", "null", '{"url": 1}',
                                  '{"url": "http://other/", "version": "\\"1\\""}',
                                  '{"url": "URL", "version": 3}'])  # fmt: skip
def test_a_part_of_who_knows_what_is_not_built_upon(web: Site, path: Path, note: str) -> None:
    url = web.file("file.bin", CONTENT)
    path.parent.mkdir()
    path.with_name("file.bin.partial").write_bytes(b"something else")
    path.with_name("file.bin.partial.json").write_text(note.replace("URL", url))
    assert download_file(url, path, limit=LIMIT).read_bytes() == CONTENT
    assert web.asked == [("/file.bin", None)]


def test_attempts_that_bring_enough_do_not_count(
    web: Site, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "GAIN", 10_000)
    url = web.file("file.bin", CONTENT, cuts=[10_000] * 20)
    assert download_file(url, path, limit=LIMIT, md5=MD5).read_bytes() == CONTENT
    # Without an ETag every attempt starts from the beginning, so there is no progress.
    web.file("file.bin", CONTENT, tag=None, cuts=[20_000] * 100)
    web.asked.clear()
    refused(url, path.with_name("other"))
    assert len(web.asked) == download.ATTEMPTS


def test_cut_chunks(web: Site, path: Path) -> None:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    whole = raw(head + b"5\r\nhello\r\n0\r\n\r\n")
    url = web.page(
        "file.bin",
        raw(head + b"5\r\nhel"),
        raw(head + b"5\r\nhello\r\n"),
        raw(head + b"zz\r\n"),
        whole,
    )
    assert download_file(url, path, limit=LIMIT).read_bytes() == b"hello"


# Refusals


@pytest.mark.parametrize("code", [400, 401, 403, 404, 410, 501])
def test_what_is_not_there_is_not_asked_for_again(web: Site, path: Path, code: int) -> None:
    assert str(code) in refused(web.page("file.bin", status(code)), path)
    assert len(web.asked) == 1
    assert left(path) == []


@pytest.mark.parametrize("code", download.LATER)
def test_what_may_come_later_is_asked_for_again(web: Site, path: Path, code: int) -> None:
    url = web.page("file.bin", status(code), status(code, Retry_After="0"), answer(b"here"))
    assert download_file(url, path, limit=LIMIT).read_bytes() == b"here"
    url = web.page("never", status(code))
    web.asked.clear()
    assert str(code) in refused(url, path.with_name("never"))
    assert len(web.asked) == download.ATTEMPTS


def test_pauses_grow_and_follow_the_server(
    web: Site, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(download, "BACKOFF_S", 1.0)
    monkeypatch.setattr("time.sleep", pauses.append)
    patient = [
        status(503, Retry_After=text)
        for text in ("7", "Wed, 21 Oct 2026 07:28:00 GMT", "99999", "-1")
    ]
    refused(web.page("file.bin", *patient, status(500)), path)
    for pause, longest in zip(pauses, (7.0, 2.0, download.LONGEST_S, 8.0), strict=True):
        assert 0.75 * longest <= pause <= longest


def test_redirects_are_followed(web: Site, path: Path) -> None:
    url = web.page("a", status(302, Location="/b"))
    web.page("b", status(307, Location=web.file("file.bin", CONTENT)))
    assert download_file(url, path, limit=LIMIT).read_bytes() == CONTENT


def test_redirect_loops_end(web: Site, path: Path) -> None:
    url = web.page("a", status(302, Location="/b"))
    web.page("b", status(301, Location="/a"))
    assert "redirect" in refused(url, path)
    assert len(web.asked) < 25
    for i in range(50):
        web.page(f"chain{i}", status(302, Location=f"/chain{i + 1}"))
    assert "redirect" in refused(web.url + "chain0", path)


@pytest.mark.parametrize(
    "target", ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:,x", "http://[", "gopher://x/"]
)
def test_redirects_out_of_the_web_are_refused(web: Site, path: Path, target: str) -> None:
    refused(web.page("a", status(302, Location=target)), path)
    assert len(web.asked) == 1


def test_redirects_from_https_to_http_are_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def send(_: HTTPAdapter, request: requests.PreparedRequest, **options: Any) -> Any:
        asked.append(request.url)
        response = requests.Response()
        response.request, response.url = request, str(request.url)
        response.status_code, response.headers["Location"] = 302, "http://host/x"
        response.raw = io.BytesIO(b"moved")
        return response

    monkeypatch.setattr(HTTPAdapter, "send", send)
    assert "(it redirects from https to http://host/x)" in refused("https://host/x", path)
    assert asked == ["https://host/x"]


def test_the_body_of_a_redirect_is_not_waited_for(web: Site, path: Path) -> None:
    def page(handler: BaseHTTPRequestHandler) -> None:
        status(302, Location="/b", Content_Length="1000")(handler)
        handler.wfile.flush()
        web.over.wait()

    web.page("b", answer(b"here"))
    assert download_file(web.page("a", page), path, limit=LIMIT).read_bytes() == b"here"
    assert web.asked == [("/a", None), ("/b", None)]


@pytest.mark.parametrize("url", ["", "file:///etc/passwd", "ftp://h/x", "http://", "http:///x",
                                 "http://h:99999/x", "x", "http://h/a b", "http://h/\n",
                                 "http://[::1/x", "http://ü/x"])  # fmt: skip
def test_what_is_no_address(path: Path, url: str) -> None:
    with pytest.raises(
        DownloadError,
        match="it is not a valid address: expected http://host/path or https://host/path",
    ):
        download_file(url, path, limit=LIMIT)


def test_nobody_there_is_not_waited_for(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: pytest.fail("waited"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # the socket does not listen, so connections are refused
        refused(f"http://127.0.0.1:{taken.getsockname()[1]}/x", path)


# Sizes


def test_an_announced_size_above_the_limit(web: Site, path: Path) -> None:
    assert "300000 bytes or more, and the limit is 299999" in refused(
        web.file("file.bin", CONTENT), path, limit=299_999
    )
    assert len(web.asked) == 1
    assert left(path) == []
    download_file(web.url + "file.bin", path, limit=300_000)


@pytest.mark.parametrize("head", [b"HTTP/1.0 200 OK\r\n\r\n",
                                  b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n"])  # fmt: skip
def test_a_size_above_the_limit_that_nobody_announced(web: Site, path: Path, head: bytes) -> None:
    assert "the limit is 1000" in refused(
        web.page("file.bin", raw(head + CONTENT)), path, limit=1000
    )
    assert left(path) == []


@pytest.mark.parametrize("digits", [30, 5000])
def test_a_size_beyond_any_file(web: Site, path: Path, digits: int) -> None:
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {'9' * digits}\r\n\r\n"
    refused(web.page("file.bin", raw(head.encode() + b"short")), path)
    assert len(web.asked) == 1
    assert left(path) == []


def test_more_than_was_announced_is_not_read(web: Site, path: Path) -> None:
    url = web.page("file.bin", raw(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello and more"))
    assert download_file(url, path, limit=LIMIT).read_bytes() == b"hello"


def test_another_md5_is_not_kept(web: Site, path: Path) -> None:
    assert f"the downloaded file has md5 {MD5}" in refused(
        web.file("file.bin", CONTENT), path, md5="0" * 32
    )
    assert left(path) == []


def test_an_encoded_answer_is_refused(web: Site, path: Path) -> None:
    assert "encoded as gzip" in refused(
        web.page("file.bin", answer(b"x", Content_Encoding="gzip")), path
    )


# Downloads that stall


def stalled_at_once(web: Site) -> Page:
    return web.stalls()


def stalled_in_between(web: Site) -> Page:
    return web.stalls(b"half")


def dripping(web: Site) -> Page:
    return web.drips(0.05)


@pytest.mark.parametrize("stall", [stalled_at_once, stalled_in_between, dripping])
def test_a_stalled_socket_is_given_up_and_asked_again(
    web: Site, path: Path, stall: Callable[[Site], Page], caplog: pytest.LogCaptureFixture
) -> None:
    url = web.page("file.bin", stall(web), stall(web), answer(CONTENT))
    with caplog.at_level(logging.INFO, logger="sddlskd"):
        assert download_file(url, path, limit=LIMIT).read_bytes() == CONTENT
    assert len(web.asked) == 3
    assert "no answer within 0.5 s" in caplog.text or "stalled: " in caplog.text


def test_a_socket_that_always_stalls(
    web: Site, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "STALLED_S", 0.1)
    assert "no answer within 0.1 s" in refused(web.page("file.bin", web.stalls()), path)
    assert len(web.asked) == download.ATTEMPTS


# Errors of this machine


def test_a_full_disk_is_said_and_not_tried_again(
    web: Site, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = web.file("file.bin", CONTENT)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert "No space left on device" in refused(url, path)
    assert len(web.asked) == 1


def test_processes_that_start_together_fetch_it_once(web: Site, path: Path) -> None:
    url = web.file("file.bin", CONTENT)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        jobs = [pool.apply_async(download_file, (url, path), {"limit": LIMIT}) for _ in range(4)]
        assert {job.get() for job in jobs} == {path}
    assert len(web.asked) == 1


# Random answers


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_whatever_a_server_says(
    web: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: st.DataObject
) -> None:
    monkeypatch.setattr(download, "LONGEST_S", 0.001)
    monkeypatch.setattr(download, "STALLED_S", 0.1)
    names = [
        "Content-Length",
        "Content-Range",
        "ETag",
        "Last-Modified",
        "Location",
        "Retry-After",
        "Transfer-Encoding",
    ]
    values = st.one_of(st.sampled_from(["0", "5", "-1", "9" * 30, '"1"', "chunked", "bytes 0-1/2",
                                        "/x", "²"]),
                       st.text(st.characters(max_codepoint=255), max_size=20))  # fmt: skip
    lines = data.draw(st.lists(st.tuples(st.sampled_from(names), values), max_size=4))
    code = data.draw(st.sampled_from([200, 206, 301, 404, 416, 503, 99, 1000]))
    head = (
        f"HTTP/1.1 {code} X\r\n" + "".join(f"{name}: {value}\r\n" for name, value in lines) + "\r\n"
    )
    wire = head.encode("latin-1") + data.draw(st.binary(max_size=50))
    page = raw(data.draw(st.sampled_from([wire, wire[: len(wire) // 2], wire[10:]])))
    target = tmp_path / "fuzz" / "file"
    target.unlink(missing_ok=True)
    try:
        download_file(web.page("fuzz", page), target, limit=1000)
    except DownloadError as error:
        said = str(error)
    else:
        said = ""
    assert target.exists() is not bool(said)
    assert "\n" not in said
    assert {path.name.split(".")[0] for path in target.parent.iterdir()} <= {"file"}
