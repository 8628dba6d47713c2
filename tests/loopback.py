"""A web server on loopback whose answers the tests choose, wrong answers included."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Page = Callable[["BaseHTTPRequestHandler"], None]


class Site:
    """A web site on loopback.

    Attributes:
        pages: the function that answers each path.
        asked: (path, Range header) of every request so far.
        url: address of the root, with a final slash.
    """

    def __init__(self, port: int, over: threading.Event) -> None:
        self.url, self.over = f"http://127.0.0.1:{port}/", over
        self.pages: dict[str, Page] = {}
        self.asked: list[tuple[str, str | None]] = []

    def file(
        self,
        path: str,
        content: bytes,
        *,
        tag: str | None = '"1"',
        ranges: bool = True,
        cuts: Sequence[int] = (),
    ) -> str:
        """Serve a file and return its address.

        Args:
            path: path of the file.
            content: content of the file.
            tag: ETag of the file; None for no ETag.
            ranges: whether requests for a range are answered with the range.
            cuts: number of bytes after which the first, second, ... answer is cut off.
        """
        left = list(cuts)

        def page(handler: BaseHTTPRequestHandler) -> None:
            start, asked = 0, handler.headers.get("Range")
            if asked and ranges and handler.headers.get("If-Range") == tag:
                start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content) > 0:
                return status(416)(handler)
            body = content[start:]
            handler.send_response(206 if start else 200)
            if start:
                handler.send_header(
                    "Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}"
                )
            if tag:
                handler.send_header("ETag", tag)
            handler.send_header("Content-Length", str(len(body)))
            handler.end_headers()
            handler.wfile.write(body[: left.pop(0)] if left else body)

        self.pages[f"/{path}"] = page
        return self.url + path

    def page(self, path: str, *answers: Page) -> str:
        """Answer a path with these pages in turn, then always with the last one; return its URL."""
        left = list(answers)
        self.pages[f"/{path}"] = lambda handler: (left.pop(0) if len(left) > 1 else left[0])(
            handler
        )
        return self.url + path

    def stalls(self, after: bytes = b"", length: int = 1000) -> Page:
        """Return a page that sends `after` of a body of `length` bytes, then nothing more."""

        def page(handler: BaseHTTPRequestHandler) -> None:
            if after:
                answer(after, Content_Length=str(length))(handler)
                handler.wfile.flush()
            self.over.wait()

        return page

    def drips(self, pause_s: float) -> Page:
        """Return a page that sends a byte every `pause_s` seconds until the client leaves."""

        def page(handler: BaseHTTPRequestHandler) -> None:
            answer(b"", Content_Length="100000")(handler)
            while not self.over.wait(pause_s):
                handler.wfile.write(b".")
                handler.wfile.flush()

        return page


def status(code: int, **headers: str) -> Page:
    return answer(b"", code, **headers)


def answer(body: bytes, code: int = 200, **headers: str) -> Page:
    """Return a page with exactly these headers; `_` in a name stands for `-`."""

    def page(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return page


def raw(content: bytes) -> Page:
    """Return a page that sends these bytes, which include the headers."""
    return lambda handler: void(handler.wfile.write(content))


def void(_: Any) -> None: ...


@contextmanager
def site() -> Iterator[Site]:
    over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            here.asked.append((self.path, self.headers.get("Range")))
            with suppress(BrokenPipeError, ConnectionResetError):
                here.pages.get(self.path, status(404))(self)

        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        here = Site(listening.server_port, over)
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield here
        over.set()
        listening.shutdown()
        thread.join()
