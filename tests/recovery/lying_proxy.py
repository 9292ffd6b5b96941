"""An HTTP proxy before an object store that fails, lies and loses on purpose.

`lies` is a list of what becomes of the next requests that fit, each for one request (or for ever).
Everything else passes as it is. What is below HTTP (stalls, resets) is drill/proxy.py's.
"""

from __future__ import annotations

import contextlib
import http.client
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>reduce your rate</Message></Error>"
HOP = ("connection", "transfer-encoding", "content-length", "expect")


@dataclass
class Answer:
    """What goes back to the client."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes
    is_cut: bool = False
    """The connection breaks in the middle of the body."""


@dataclass
class Lie:
    """What becomes of one request. All that is not given is as it should be."""

    method: str
    path: str = ""
    """Part of the path, query included."""
    before: Callable[[bytes], bytes | None] = lambda body: body
    """The body that the server gets; None: it gets nothing."""
    after: Callable[[Answer], Answer] = lambda answer: answer
    times: int = 1


@dataclass
class LyingProxy:
    """Listens on `port`; `requests` is what came."""

    upstream: int
    port: int = 0
    lies: list[Lie] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def lie(self, lie: Lie) -> None:
        """Lie once more."""
        with self.lock:
            self.lies.append(lie)

    def lie_for(self, method: str, path: str) -> Lie | None:
        """The lie for a request, used up."""
        with self.lock:
            self.requests.append(f"{method} {path}")
            for lie in self.lies:
                if lie.method == method and lie.path in path and lie.times:
                    lie.times -= 1
                    return lie
        return None

    def ask(self, method: str, path: str, *, headers: dict[str, str], body: bytes) -> Answer:
        """What the server says."""
        connection = http.client.HTTPConnection("127.0.0.1", self.upstream, timeout=30)
        try:
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in headers.items():
                if name.lower() not in HOP:
                    connection.putheader(name, value)
            connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            got = connection.getresponse()
            return Answer(got.status, got.getheaders(), got.read())
        finally:
            connection.close()


def swallow(status: int = 200, headers: list[tuple[str, str]] | None = None) -> Lie:
    """A PUT that is said to be done, and never comes to the server."""
    return Lie("PUT", before=lambda _: None, after=lambda _: Answer(status, headers or [], b""))


def fail(
    method: str, path: str = "", *, status: int = 503, is_done: bool = False, times: int = 1
) -> Lie:
    """An error; with `is_done` the server has done what it was asked."""
    return Lie(
        method,
        path,
        before=lambda body: body if is_done else None,
        after=lambda _: Answer(status, [("Content-Type", "application/xml")], SLOW_DOWN),
        times=times,
    )


def cut(path: str, *, times: int = 1) -> Lie:
    """A GET whose connection breaks in the middle."""

    def after(answer: Answer) -> Answer:
        answer.is_cut = True
        return answer

    return Lie("GET", path, after=after, times=times)


def without(*names: str) -> Callable[[Answer], Answer]:
    """An answer that lacks some headers."""

    def after(answer: Answer) -> Answer:
        answer.headers = [each for each in answer.headers if each[0].lower() not in names]
        return answer

    return after


def flipped(body: bytes) -> bytes:
    """Its first byte is another one."""
    return bytes([body[0] ^ 0xFF]) + body[1:] if body else body


@contextlib.contextmanager
def lying(upstream: int) -> Iterator[LyingProxy]:
    """A proxy before the server on port `upstream`."""
    proxy = LyingProxy(upstream)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def handle_any(self) -> None:
            lie = proxy.lie_for(self.command, self.path) or Lie(self.command)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            sent = lie.before(body)
            answer = Answer(200, [], b"")
            if sent is not None:
                headers = dict(self.headers.items())
                answer = proxy.ask(self.command, self.path, headers=headers, body=sent)
            self.reply(lie.after(answer))

        def reply(self, answer: Answer) -> None:
            self.send_response_only(answer.status)
            size = len(answer.body)
            for name, value in answer.headers:
                if name.lower() not in HOP:
                    self.send_header(name, value)
                elif name.lower() == "content-length" and self.command == "HEAD":
                    size = int(value)
            self.send_header("Content-Length", str(size))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer.body[: size // 2] if answer.is_cut else answer.body)
            self.close_connection = self.close_connection or answer.is_cut

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any  # noqa: N815 (http.server's)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    proxy.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
