"""Connections for reading: a bounded pool, each one checked before it is believed.

A primary that was demoted still answers reads, with the past. So a connection that has lain idle is
asked again who it is. One that takes no writes any more, or that breaks, is closed at once and all
idle ones with it. Nothing waits for ever: not for a free connection, not for an answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

from llm_orchestrator.clock import Clock
from llm_orchestrator.errors import StoreUnavailable
from llm_orchestrator.store.postgres_address import Address
from llm_orchestrator.store.postgres_connect import (
    Connection,
    connect,
    is_connection_trouble,
    server_of,
    translate,
)
from llm_orchestrator.store.postgres_pages import Pages
from llm_orchestrator.store.queries import load_queries
from llm_orchestrator.telemetry.metrics import Metrics, Sample

logger = logging.getLogger(__name__)
WAIT_S = 5.0
"""How long a reader waits for a free connection."""
READ_S = 30.0
"""How long one statement may take."""
ASK_S = 2.0
"""How long an idle connection may take to say who it is."""
TRUST_S = 0.5
"""How long a connection is believed to be the primary's without asking."""


class Pool:
    """At most `size` connections, opened when they are needed."""

    def __init__(
        self,
        address: Address,
        clock: Clock,
        *,
        size: int,
        is_pooled: bool,
        metrics: Metrics | None = None,
        pages: Pages | None = None,
    ) -> None:
        self._pages = pages or Pages()
        self._metrics = metrics or Metrics()
        self._metrics.watch(self._gauges)
        self._address = address
        self._clock = clock
        self._size = size
        self._is_pooled = is_pooled
        self._idle: list[tuple[Connection, float]] = []
        self._slots = asyncio.Semaphore(size)
        self._busy = 0
        self._is_closed = False
        self.exhausted = 0
        """How often somebody waited in vain."""

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """One connection for a while. Raises StoreError's subclasses only."""
        await self._wait_for_slot()
        self._busy += 1
        try:
            connection = await self._take()
            try:
                async with asyncio.timeout(READ_S):
                    yield connection
            except BaseException as error:
                if not isinstance(error, Exception):
                    connection.terminate()
                    raise
                if is_connection_trouble(error):
                    connection.terminate()
                    self._evict()
                raise translate(self._pages.told(error), self._address.shown) from error
            finally:
                self._give(connection)
        finally:
            self._busy -= 1
            self._slots.release()

    async def rows(self, name: str, /, **values: object) -> list[Any]:
        """All rows of a named statement. What may pass is tried once more."""
        query = load_queries("postgres")[name]
        arguments = query.bind(**values)
        for is_last in (False, True):
            try:
                async with self.connection() as connection:
                    found: list[Any] = await connection.fetch(query.sql, *arguments)
                return found
            except StoreUnavailable as error:
                if is_last or not _may_pass(error.__cause__):
                    raise
        raise AssertionError("unreachable")

    async def close(self) -> None:
        """Close what is idle; what is in use closes when it comes back."""
        self._is_closed = True
        self._metrics.unwatch(self._gauges)
        idle, self._idle = self._idle, []
        for connection, _ in idle:
            with contextlib.suppress(Exception):
                await connection.close(timeout=1)

    def _gauges(self) -> Iterator[Sample]:
        yield Sample("pool_connections", ("busy",), self._busy)
        yield Sample("pool_connections", ("idle",), len(self._idle))
        yield Sample("pool_size", (), self._size)

    async def _wait_for_slot(self) -> None:
        began = self._clock.monotonic()
        try:
            async with asyncio.timeout(WAIT_S):
                await self._slots.acquire()
            self._metrics.observe("pool_wait_seconds", self._clock.monotonic() - began)
        except TimeoutError:
            self.exhausted += 1
            self._metrics.count("pool_timeouts_total")
            raise StoreUnavailable(
                f"all {self._size} connections to {self._address.shown} were busy for {WAIT_S:g} s",
                hint=f"raise DB_POOL_SIZE (now {self._size})",
            ) from None

    async def _take(self) -> Connection:
        while self._idle:
            connection, used_at = self._idle.pop()
            if connection.is_closed():
                continue
            if self._clock.monotonic() - used_at < TRUST_S or await self._is_good(connection):
                return connection
            self._evict()
        connection, _ = await connect(
            self._address,
            is_pooled=self._is_pooled,
            settings={"application_name": "llm-orchestrator reader", "statement_timeout": "30s"},
        )
        return connection

    async def _is_good(self, connection: Connection) -> bool:
        """Whether it answers, and is the primary's still. If not, it is closed."""
        try:
            async with asyncio.timeout(ASK_S):
                if not (await server_of(connection)).is_read_only:
                    return True
        except BaseException as error:
            connection.terminate()
            if not isinstance(error, Exception):
                raise
        connection.terminate()
        return False

    def _evict(self) -> None:
        """What has befallen one connection has befallen its server: open all of them anew."""
        for connection, _ in self._idle:
            connection.terminate()
        self._idle.clear()

    def _give(self, connection: Connection) -> None:
        if self._is_closed:
            connection.terminate()
        elif not connection.is_closed():
            self._idle.append((connection, self._clock.monotonic()))


def _may_pass(cause: BaseException | None) -> bool:
    """True when a connection broke, or a statement met another one: not when it was too slow."""
    if cause is None or isinstance(cause, TimeoutError):
        return False
    is_met = getattr(cause, "sqlstate", None) in ("40001", "40P01")
    return is_met or is_connection_trouble(cause)
