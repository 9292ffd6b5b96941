"""The table of nodes on SQLite: a file has one engine, so the others in it are past lives."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llm_orchestrator.clock import Clock
from llm_orchestrator.model import Json
from llm_orchestrator.store.base import NodeState, Pulse
from llm_orchestrator.store.journal import canonical
from llm_orchestrator.store.queries import load_queries
from llm_orchestrator.store.rows import member_of
from llm_orchestrator.store.sqlite_file import translate
from llm_orchestrator.store.sqlite_thread import DatabaseThread

Lend = Callable[[], tuple[sqlite3.Connection, DatabaseThread]]
"""The engine's writing connection, which is another one after a restore. Raises StoreError."""
_PATIENCE_US = 7 * 86_400 * 1_000_000
"""How long a past life is still listed."""


class SQLiteMembers:
    """See store.base.Members for every method's contract."""

    def __init__(self, lend: Lend, *, path: Path, clock: Clock) -> None:
        self._lend = lend
        self._path = path
        self._clock = clock

    async def join(self, node_id: str, region: str, info: Json) -> None:
        now = self._clock.now_us()

        def work(database: sqlite3.Connection) -> None:
            _execute(database, "forget_nodes", before=now - _PATIENCE_US)
            _execute(database, "bury_others", node_id=node_id)
            text = canonical(info).decode()
            _execute(database, "join", node_id=node_id, region=region, now=now, info=text)

        await self._transaction(work)

    async def beat(self, node_id: str, info: Json) -> Pulse:
        now, text = self._clock.now_us(), canonical(info).decode()
        await self._one("beat", node_id=node_id, now=now, info=text)
        return await self.watch(node_id)

    async def watch(self, node_id: str) -> Pulse:
        rows = await self._transaction(
            lambda database: _execute(database, "members", node_id=node_id).fetchall()
        )
        return Pulse(str(self._path), self._clock.now_us(), [member_of(row) for row in rows])

    async def bury(self, node_id: str, beat: int) -> bool:
        done = await self._one("bury", node_id=node_id, beat=beat)
        return bool(done.rowcount == 1)

    async def leave(self, node_id: str, state: NodeState) -> None:
        await self._one("leave", node_id=node_id, state=state.value)

    async def close(self) -> None:
        """Nothing of its own is open."""

    async def _one(self, name: str, /, **values: object) -> Any:
        return await self._transaction(lambda database: _execute(database, name, **values))

    async def _transaction(self, work: Callable[[sqlite3.Connection], Any]) -> Any:
        database, thread = self._lend()

        def whole() -> Any:
            database.execute("BEGIN IMMEDIATE")
            try:
                result = work(database)
                database.execute("COMMIT")
            except BaseException:
                if database.in_transaction:
                    database.execute("ROLLBACK")
                raise
            return result

        try:
            return await thread.submit(whole)
        except sqlite3.Error as error:
            raise translate(error, self._path) from error


def _execute(database: sqlite3.Connection, name: str, /, **values: object) -> sqlite3.Cursor:
    query = load_queries()[name]
    return database.execute(query.sql, query.bind(**values))
