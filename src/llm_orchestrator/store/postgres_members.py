"""Heartbeats on PostgreSQL: a connection of their own, on whatever loop (and thread) beats.

Soft state: `synchronous_commit=local`, so that a beat never waits for a standby (law 5). The
session itself is the other sign of life: the server sees at once when it closes, and says so to
everybody who beats (law 6).
"""

from __future__ import annotations

import asyncio
from typing import Any

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

BEAT_S = 2.0
"""A beat that takes longer is given up, and its connection with it."""
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

    async def join(self, node_id: str, region: str, info: Json) -> None:
        connection, server = await self._connected()
        text = canonical(info).decode()
        before = server.now_us - _PATIENCE_US
        await self._do(connection, "forget_nodes", before=before)
        now = server.now_us
        await self._do(connection, "join", node_id=node_id, region=region, now=now, info=text)

    async def beat(self, node_id: str, info: Json) -> Pulse:
        connection, _ = await self._connected()
        text = canonical(info).decode()
        await self._do(connection, "beat", node_id=node_id, info=text)
        return await self.watch(node_id)

    async def watch(self, node_id: str) -> Pulse:
        connection, _ = await self._connected()
        rows = await self._do(connection, "members", node_id=node_id)
        try:
            async with asyncio.timeout(BEAT_S):
                server = await server_of(connection)
        except BaseException as error:
            raise self._lost(error) from error
        if server.is_read_only:
            raise self._lost(StoreUnavailable("the server takes no writes any more"))
        identity = f"{server.identity} {server.timeline}"
        return Pulse(identity, server.now_us, [member_of(row) for row in rows])

    async def bury(self, node_id: str, beat: int) -> bool:
        connection, _ = await self._connected()
        status = await self._do(connection, "bury", node_id=node_id, beat=beat, is_count=True)
        return str(status).endswith(" 1")

    async def leave(self, node_id: str, state: NodeState) -> None:
        connection, _ = await self._connected()
        await self._do(connection, "leave", node_id=node_id, state=state.value)

    async def close(self) -> None:
        """End the session."""
        if self._connection is not None:
            self._connection.terminate()
            self._connection = None

    async def _connected(self) -> tuple[Connection, Server]:
        if self._connection is None or self._connection.is_closed() or self._server is None:
            self._connection, self._server = await connect(self._address, settings=_SETTINGS)
        return self._connection, self._server

    async def _do(
        self, connection: Connection, name: str, /, is_count: bool = False, **values: object
    ) -> Any:
        query = load_queries("postgres")[name]
        run = connection.execute if is_count else connection.fetch
        try:
            async with asyncio.timeout(BEAT_S):
                return await run(query.sql, *query.bind(**values))
        except BaseException as error:
            raise self._lost(error) from error

    def _lost(self, error: BaseException) -> BaseException:
        """What to raise; a connection in doubt is given up."""
        if not isinstance(error, Exception):
            return error
        if self._connection is not None and (
            is_connection_trouble(error) or isinstance(error, TimeoutError | StoreUnavailable)
        ):
            self._connection.terminate()
            self._connection = None
        return translate(error, self._address.shown)
