"""A TCP proxy that breaks connections on purpose: for tests and drills of what a network does.

It stands before one server, on a port of 127.0.0.1, in a thread of its own: a client whose event
loop hangs does not stop it. Its faults: a black hole (bytes and closings are kept back and nothing
is closed, as when packets are dropped), a reset, a delay, and a trap: a black hole that opens at
the moment when given bytes come. Healing a black hole delivers what it kept, as TCP's repeats
would; so what is kept back can also arrive late, after its sender has given up.

It must never change or reorder the bytes that it delivers. What changes the proxy has come true
when the call returns.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, Literal, Self

Way = Literal["up", "down"]
"""`up` is from the client to the server."""
WAYS: frozenset[Way] = frozenset(("up", "down"))
_CALL_S = 30.0
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER on, 0 seconds: to close is to reset


class Trap:
    """When `needle` comes in one piece on its way `way`, that connection falls into a black hole.

    Once, and both ways. `is_passed`: the piece itself is still delivered, else it is kept back.
    """

    def __init__(self, needle: bytes, *, way: Way = "up", is_passed: bool) -> None:
        self.needle = needle
        self.way = way
        self.is_passed = is_passed
        self.sprung = threading.Event()

    def wait(self) -> None:
        """Until it has struck; blocks the thread. Raises TimeoutError."""
        if not self.sprung.wait(_CALL_S):
            raise TimeoutError(f"{self.needle!r} did not come")


class Proxy:
    """A server's stand-in: clients find it on `port`. Call it from any thread but its own."""

    def __init__(self, upstream_port: int, *, upstream_host: str = "127.0.0.1") -> None:
        self.upstream = (upstream_host, upstream_port)
        self.port = 0
        self.accepted = 0
        """How many connections clients have opened so far."""
        self._holes: frozenset[Way] = frozenset()
        self._delay_s = 0.0
        self._trap: Trap | None = None
        self._links: set[_Link] = set()
        self._is_empty = asyncio.Event()
        self._listener: asyncio.Server | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._wait(self._listen())
        return self

    def __exit__(self, *_: object) -> None:
        self._wait(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CALL_S)
        self._loop.close()

    # -- faults -------------------------------------------------------------------------------

    def black_hole(self, *ways: Way) -> None:
        """Deliver nothing any more: both ways unless some are named, new connections included."""
        self._wait(self._change(lambda: self._swallow(frozenset(ways) or WAYS)))

    def heal(self, *, is_old_lost: bool = False) -> None:
        """Deliver again, first what was kept back.

        `is_old_lost`: new connections only; the old ones stay in their hole, until the next call.
        """
        self._wait(self._change(lambda: self._heal(is_old_lost=is_old_lost)))

    def reset(self) -> None:
        """Break every connection, to both sides. New ones are taken."""
        self._wait(self._change(self._reset))

    def delay(self, seconds: float) -> None:
        """Deliver everything that comes from now on so much later."""
        self._wait(self._change(lambda: setattr(self, "_delay_s", seconds)))

    def set_trap(self, trap: Trap) -> Trap:
        """Lay a trap, in place of the one before."""
        self._wait(self._change(lambda: setattr(self, "_trap", trap)))
        return trap

    # -- how, on the proxy's own loop ---------------------------------------------------------

    def _wait(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(_CALL_S)

    async def _change(self, change: Callable[[], object]) -> None:
        change()

    async def _listen(self) -> None:
        self._listener = await self._loop.create_server(self._accept, "127.0.0.1", 0)
        self.port = int(self._listener.sockets[0].getsockname()[1])

    async def _end(self) -> None:
        if self._listener is not None:
            self._listener.close()
        self._is_empty = asyncio.Event()
        self._reset()
        if self._links:
            await self._is_empty.wait()

    def _accept(self) -> _Side:
        self.accepted += 1
        link = _Link(self, self._loop, self._holes)
        self._links.add(link)
        return link.client

    def _reset(self) -> None:
        for link in list(self._links):
            link.reset()

    def _swallow(self, ways: frozenset[Way]) -> None:
        self._holes = ways
        for link in self._links:
            link.holes = ways

    def _heal(self, *, is_old_lost: bool) -> None:
        self._holes = frozenset()
        if not is_old_lost:
            for link in list(self._links):
                link.heal()

    def springs(self, data: bytes, way: Way) -> Trap | None:
        """The trap, if these bytes spring it."""
        trap = self._trap
        if trap is None or trap.way != way or trap.needle not in data:
            return None
        self._trap = None
        return trap

    @property
    def delay_s(self) -> float:
        """How long bytes are on their way."""
        return self._delay_s

    def forget(self, link: _Link) -> None:
        """A connection has ended on both sides."""
        self._links.discard(link)
        if not self._links:
            self._is_empty.set()


class _Link:
    """One client's connection and ours to the server behind it."""

    def __init__(
        self, proxy: Proxy, loop: asyncio.AbstractEventLoop, holes: frozenset[Way]
    ) -> None:
        self.proxy = proxy
        self.loop = loop
        self.holes = holes
        self.client = _Side(self, "up")
        self.server = _Side(self, "down")
        self.is_broken = False
        self._due: dict[Way, float] = {"up": 0.0, "down": 0.0}
        self._opening: asyncio.Task[None] | None = None

    def open(self) -> None:
        """The client is there: find the server."""
        self._opening = self.loop.create_task(self._open())

    async def _open(self) -> None:
        host, port = self.proxy.upstream
        try:
            await self.loop.create_connection(lambda: self.server, host, port)
        except OSError:
            self.server.is_gone = True
            self.client.end(is_reset=True)

    def came(self, way: Way, data: bytes) -> None:
        """Bytes came in, or (none) the side from which they come has closed."""
        trap = self.proxy.springs(data, way) if data else None
        if trap is None:
            self._pass_on(way, data)
            return
        if trap.is_passed:
            self._pass_on(way, data)
            self.holes = WAYS
        else:
            self.holes = WAYS
            self._pass_on(way, data)
        trap.sprung.set()

    def heal(self) -> None:
        """Deliver what was kept back, and what comes."""
        self.holes = frozenset()
        for side in (self.client, self.server):
            side.flush()

    def reset(self) -> None:
        """Break both sides."""
        self.is_broken = True
        for side in (self.client, self.server):
            side.end(is_reset=True)

    def ended(self) -> None:
        """One side has closed."""
        if self.client.is_gone and self.server.is_gone:
            self.proxy.forget(self)

    def _pass_on(self, way: Way, data: bytes) -> None:
        target = self.server if way == "up" else self.client
        if way in self.holes:
            target.kept.append(data)
            return
        now = self.loop.time()
        due = now + self.proxy.delay_s
        if due <= self._due[way]:  # behind what is on its way already
            due = self._due[way] + 1e-6
        if due > now:
            self._due[way] = due
            self.loop.call_at(due, target.deliver, data)
        else:
            target.deliver(data)


class _Side(asyncio.Protocol):
    """One of a link's two sockets. `sends` is the way of the bytes that come in here."""

    def __init__(self, link: _Link, sends: Way) -> None:
        self.kept: deque[bytes] = deque()
        """What is still to go out here; an empty piece stands for the closing."""
        self.is_gone = False
        self._link = link
        self._sends = sends
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        if self._sends == "up":
            self._link.open()
        elif self._link.is_broken:
            self.end(is_reset=True)
        elif "up" not in self._link.holes:
            self.flush()

    def data_received(self, data: bytes) -> None:
        self._link.came(self._sends, data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_gone = True
        self._link.came(self._sends, b"")
        self._link.ended()

    def deliver(self, data: bytes) -> None:
        """Send it on, after what waits already."""
        self.kept.append(data)
        self.flush()

    def flush(self) -> None:
        """Send on what waits, as far as there is a socket."""
        while self.kept and self._transport is not None:
            data = self.kept.popleft()
            if data:
                self._transport.write(data)
            else:
                self.end()

    def end(self, *, is_reset: bool = False) -> None:
        """Close, or break."""
        if self._transport is None or self.is_gone:
            return
        if is_reset:
            sock = self._transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            self._transport.abort()
        else:
            self._transport.close()
