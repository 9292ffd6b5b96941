"""Heartbeats on PostgreSQL: a connection of their own, on whatever loop (and thread) beats.

Soft state: `synchronous_commit=local`, so that a beat never waits for a standby (law 5). The
session itself is the other sign of life: the server sees at once when it closes, and says so to
everybody who beats (law 6).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from llm_orchestrator.errors import StoreUnavailable
from llm_orchestrator.model import Json
from llm_orchestrator.store.base import NodeState, Pulse
from llm_orchestrator.store.journal import canonical
from llm_orchestrator.store.postgres_address import Address
from llm_orchestrator.store.postgres_connect import (
    Connection,
    Server,
    connect,
    is_connection_trouble,
    server_of,
    translate,
)
from llm_orchestrator.store.queries import load_queries
from llm_orchestrator.store.rows import member_of

T = TypeVar("T")
BEAT_S = 2.0
"""A beat that takes longer, to connect included, is given up, and its connection with it."""
_PATIENCE_US = 7 * 86_400 * 1_000_000
_SETTINGS = {
    "application_name": "llm-orchestrator heart",
    "synchronous_commit": "local",
    "statement_timeout": "2s",
    "lock_timeout": "1s",
}


class PostgresMembers:
    """See store.base.Members for every method's contract."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._connection: Connection | None = None
        self._server: Server | None = None
        self._sessions = 0

    async def join(self, node_id: str, region: str, info: Json) -> None:
        async def work(connection: Connection) -> None:
            now = (await server_of(connection)).now_us
            await _run(connection, "forget_nodes", before=now - _PATIENCE_US)
            text = canonical(info).decode()
            await _run(connection, "join", node_id=node_id, region=region, now=now, info=text)

        await self._within(work)

    async def beat(self, node_id: str, info: Json) -> Pulse:
        async def work(connection: Connection) -> Pulse:
            text = canonical(info).decode()
            await _run(connection, "beat", node_id=node_id, info=text)
            return await self._look(connection, node_id)

        return await self._within(work)

    async def watch(self, node_id: str) -> Pulse:
        return await self._within(lambda connection: self._look(connection, node_id))

    async def bury(self, node_id: str, beat: int) -> bool:
        query = load_queries("postgres")["bury"]

        async def work(connection: Connection) -> str:
            return str(await connection.execute(query.sql, *query.bind(node_id=node_id, beat=beat)))

        return (await self._within(work)).endswith(" 1")

    async def leave(self, node_id: str, state: NodeState) -> None:
        await self._within(
            lambda connection: _run(connection, "leave", node_id=node_id, state=state.value)
        )

    async def close(self) -> None:
        """End the session."""
        if self._connection is not None:
            self._connection.terminate()
            self._connection = None

    async def _look(self, connection: Connection, node_id: str) -> Pulse:
        rows = await _run(connection, "members", node_id=node_id)
        server = await server_of(connection)
        if server.is_read_only:
            raise StoreUnavailable("the server takes no writes any more", hint="llmo doctor")
        identity = f"{server.identity} {server.timeline}"
        members = [member_of(row) for row in rows]
        return Pulse(identity, server.now_us, members, session=self._sessions)

    async def _connected(self) -> tuple[Connection, Server]:
        if self._connection is None or self._connection.is_closed() or self._server is None:
            self._connection, self._server = await connect(self._address, settings=_SETTINGS)
            self._sessions += 1
        return self._connection, self._server

    async def _within(self, work: Callable[[Connection], Awaitable[T]]) -> T:
        """Connect if need be, and work: all within one bound. A connection in doubt is given up."""
        try:
            async with asyncio.timeout(BEAT_S):
                connection, _ = await self._connected()
                return await work(connection)
        except BaseException as error:
            if not isinstance(error, Exception) or _is_doubtful(error):
                await self.close()
            if not isinstance(error, Exception):
                raise
            raise translate(error, self._address.shown) from error


def _is_doubtful(error: Exception) -> bool:
    """True when nobody knows what the connection would answer next."""
    return is_connection_trouble(error) or isinstance(error, StoreUnavailable)


async def _run(connection: Connection, name: str, /, **values: object) -> list[Any]:
    query = load_queries("postgres")[name]
    rows: list[Any] = await connection.fetch(query.sql, *query.bind(**values))
    return rows
