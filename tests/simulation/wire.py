"""What lies between a process and a server: connections that are slow, late, and break.

`SimConnection` is what asyncpg's connection is to our store code. A request that is on its way when
the client gives up still arrives; an answer may be lost after the commit.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import asyncpg  # type: ignore[import-untyped]

from tests.simulation.loop import PROCESS, Process, SimLoop

if TYPE_CHECKING:
    from tests.simulation.server import Server, Session

RESET_S = 10.0
"""How long a packet is sent again before the connection breaks (tcp_user_timeout)."""
WARNING = SimpleNamespace(severity_en="WARNING", message="canceling wait for replication")


_NO_SOCKET = SimpleNamespace(get_extra_info=lambda name: SimpleNamespace(family=None))


class Network:
    """Delays and faults of every message, by chance. All probabilities are 0 at first."""

    def __init__(self, loop: SimLoop, seed: int) -> None:
        self.loop = loop
        self.random = random.Random(seed)
        self.base_s = self.random.choice((0.0003, 0.001, 0.004))
        self.faults: dict[str, float] = {}
        """`before`, `after`, `late`, `slow`, `lost_news`, `twin_news`: how likely, per message."""
        self.cut: dict[tuple[str, str], float] = {}
        """(process, server): until when their packets do not get through."""
        self.on_fault: Callable[[str, str], None] = lambda kind, who: None

    def delay(self) -> float:
        """One way."""
        return self.base_s * (0.5 + self.random.random())

    def arrival(self, process: Process, server: Server) -> float:
        """Until a packet that is sent now arrives."""
        until = self.cut.get((process.name, server.name), 0.0)
        return max(0.0, until - self.loop.now) + self.delay()

    def pick(self) -> str:
        """Which fault, if any, befalls a request."""
        if not self.faults:
            return ""
        chance = self.random.random()
        for kind in ("before", "after", "late", "slow"):
            chance -= self.faults.get(kind, 0.0)
            if chance < 0:
                return kind
        return ""

    def strikes(self, kind: str) -> bool:
        likely = self.faults.get(kind, 0.0)
        return likely > 0 and self.random.random() < likely


class SimConnection:
    """The client's end. See asyncpg.Connection for what the methods promise."""

    def __init__(self, network: Network, process: Process, session: Session) -> None:
        self.network = network
        self.process = process
        self.session = session
        self.server = session.server
        self._start = self.server.start
        self._transport = _NO_SOCKET
        self._is_closed = False
        self._busy: Any = None
        self._last_arrival = 0.0
        self._log_listeners: list[Any] = []

    # -- asking ----------------------------------------------------------------------------------

    async def fetch(self, sql: str, *arguments: Any) -> list[Any]:
        rows: list[Any] = (await self._ask(sql, arguments))[0]
        return rows

    async def fetchrow(self, sql: str, *arguments: Any) -> Any:
        rows = await self.fetch(sql, *arguments)
        return rows[0] if rows else None

    async def fetchval(self, sql: str, *arguments: Any) -> Any:
        row = await self.fetchrow(sql, *arguments)
        return None if row is None else row[0]

    async def execute(self, sql: str, *arguments: Any) -> str:
        return f"DONE {(await self._ask(sql, arguments))[1]}"

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[None]:
        await self._ask("BEGIN", ())
        try:
            yield
        except BaseException:
            if not self._is_closed:
                await self._ask("ROLLBACK", ())
            raise
        await self._ask("COMMIT", ())

    async def add_listener(self, channel: str, heard: Any) -> None:
        await self._ask("SELECT 1", ())
        network, loop = self.network, self.network.loop

        def hear(word: str) -> None:
            copies = 0 if network.strikes("lost_news") else 1 + network.strikes("twin_news")
            for _ in range(copies):
                when = loop.now + network.arrival(self.process, self.server)
                values = (heard, self, 0, channel, word)
                loop.call_at(when, self._hear, *values, context=self.process.context)

        self.session.listens = hear

    def _hear(self, heard: Any, *values: Any) -> None:
        if not self._is_closed:
            heard(*values)

    def add_log_listener(self, heard: Any) -> None:
        self._log_listeners.append(heard)

    def is_closed(self) -> bool:
        return self._is_closed

    async def close(self, *, timeout: float = 0) -> None:
        self.terminate()

    def terminate(self) -> None:
        """Close the socket. What was sent before arrives before."""
        if not self._is_closed:
            self.break_off()

    def break_off(self, after_s: float = 0.0) -> None:
        """The connection is gone for the client; the server hears of it later."""
        self._is_closed = True
        if self._busy is not None and not self._busy.done():
            self._busy.set_exception(
                asyncpg.ConnectionDoesNotExistError("the connection was closed under a request")
            )
        loop = self.network.loop
        wait_s = max(self._last_arrival - loop.now, 0.0) + after_s
        loop.in_world(wait_s + self.network.delay(), self.server.close, self.session)

    # -- how -------------------------------------------------------------------------------------

    async def _ask(self, sql: str, arguments: tuple[Any, ...]) -> Any:
        if self._is_closed:
            raise asyncpg.InterfaceError("connection is closed")
        if self._busy is not None:
            raise asyncpg.InterfaceError("another operation is in progress")
        network, loop = self.network, self.network.loop
        answer = self._busy = loop.create_future()
        fault = network.pick()
        wait_s = network.arrival(self.process, self.server)
        if fault:
            network.on_fault(fault, self.process.name)
        if wait_s > RESET_S:
            loop.in_world(RESET_S, self._reset)
        elif fault == "before":
            loop.in_world(wait_s, self._reset)
        else:
            if fault == "late":
                loop.in_world(wait_s, self._reset)
            if fault in ("late", "slow"):
                wait_s += network.random.choice((0.3, 2.0, 6.0)) * network.random.random()
            self._last_arrival = loop.now + wait_s
            loop.in_world(wait_s, self._arrive, sql, arguments, (answer, fault))
        try:
            return await answer
        finally:
            self._busy = None

    def _arrive(self, sql: str, arguments: tuple[Any, ...], asked: tuple[Any, str]) -> None:
        server = self.server
        is_there = server.is_up and server.start == self._start and self.session.is_open
        if not is_there:
            self._reset()
            return
        answer, fault = asked

        def done(result: Any, error: BaseException | None, warned: bool) -> None:
            delay = self.network.arrival(self.process, server)
            if fault == "after":
                self.network.loop.in_world(delay, self._reset)
            else:
                self.network.loop.in_world(delay, self._answer, answer, (result, error, warned))

        server.execute(self.session, sql, arguments, done)

    def _answer(self, answer: Any, told: tuple[Any, BaseException | None, bool]) -> None:
        if answer.done() or self._is_closed:
            return
        result, error, warned = told
        if warned:
            for heard in self._log_listeners:
                self.network.loop.call_soon(heard, self, WARNING, context=self.process.context)
        if error is not None:
            answer.set_exception(error)
        else:
            answer.set_result(result)

    def _reset(self) -> None:
        if not self._is_closed:
            self.break_off()

    def server_died(self) -> None:
        """Its server fell: the client hears of it."""
        if self.server.start != self._start:
            self._reset()


def current() -> Process:
    """The process whose code is running."""
    return PROCESS.get()
