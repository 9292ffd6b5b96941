"""Server-sent events over HTTP: the bytes, the bounds, and an orderly end.

At most STREAMS_MAX streams per process; a reader that takes nothing for SLOW_S is cut off. A
comment goes out after each SILENCE_S, so that proxies and clients know that the line is alive.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator

from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from llm_orchestrator.errors import StoreUnavailable
from llm_orchestrator.server.replies import to_json
from llm_orchestrator.server.streams_entries import Event
from llm_orchestrator.server.streams_watch import Crowd, Watch

STREAMS_MAX = 1_000
SILENCE_S = 15.0
SLOW_S = 30.0
RETRY_MS = 1_000
HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-store",
    "x-accel-buffering": "no",
}


class TooManyStreams(StoreUnavailable):
    """The process has all the streams that it may have; another one may have room."""

    kind = "too_many_streams"


class Streams(Crowd):
    """The open streams of one process. `count` is the metric `streams_open`."""

    def __init__(self, limit: int | None = None) -> None:
        super().__init__()
        self.limit = STREAMS_MAX if limit is None else limit

    def enter(self) -> Callable[[], None]:
        """Take a place; call what is returned to leave it. Raises TooManyStreams."""
        if self.count >= self.limit:
            raise TooManyStreams(f"{self.count} streams are open here; that is all there may be")
        self.count += 1
        places = [None]

        def leave() -> None:
            while places:
                places.pop()
                self.count -= 1

        return leave


def streams_of(request: Request) -> Streams:
    """The streams of the process that serves this request."""
    state = request.app.state
    if not hasattr(state, "streams"):
        state.streams = Streams()
    streams = state.streams
    assert isinstance(streams, Streams)
    return streams


def to_bytes(event: Event) -> bytes:
    """One event on the wire."""
    head = f"id: {event.id}\n" if event.id else ""
    return f"{head}event: {event.name}\ndata: ".encode() + to_json(event.data) + b"\n\n"


async def to_stream(watch: Watch) -> AsyncIterator[bytes]:
    """A watch as a stream of bytes."""
    yield f"retry: {RETRY_MS}\n\n".encode()
    async for event in watch.events(silence_s=SILENCE_S):
        yield to_bytes(event) if event is not None else b": still here\n\n"


class EventStream(Response):
    """Sends what `pieces` gives, as it comes; calls each `leave` when it is over, in any case."""

    def __init__(
        self, pieces: AsyncIterator[bytes], *leave: Callable[[], None], slow_s: float = SLOW_S
    ) -> None:
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]
        self._pieces = pieces
        self._leave = leave
        self._slow_s = slow_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Until the pieces end, the client goes, or it takes nothing any more."""
        sending = asyncio.create_task(self._send(send))
        going = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait([sending, going], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (sending, going):
                task.cancel()
            with contextlib.suppress(Exception):
                await asyncio.gather(sending, going, return_exceptions=True)
            for each in self._leave:
                each()
        if not sending.cancelled() and (error := sending.exception()) is not None:
            raise error

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for piece in self._pieces:
            if not await self._sent(send, piece, more=True):
                return
        await self._sent(send, b"", more=False)

    async def _sent(self, send: Send, piece: bytes, *, more: bool) -> bool:
        """False when the client takes nothing any more."""
        try:
            async with asyncio.timeout(self._slow_s):
                await send({"type": "http.response.body", "body": piece, "more_body": more})
        except TimeoutError:
            return False
        return True


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


@contextlib.contextmanager
def undone(*undo: Callable[[], None]) -> Iterator[None]:
    """Undo what was taken if the block fails."""
    try:
        yield
    except BaseException:
        for each in undo:
            each()
        raise
