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

_PATIENCE_US = 7 * 86_400 * 1_000_000
"""How long a past life is still listed."""


class SQLiteMembers:
    """See store.base.Members for every method's contract. Uses the engine's writing connection."""

    def __init__(
        self, database: sqlite3.Connection, thread: DatabaseThread, *, path: Path, clock: Clock
    ) -> None:
        self._database = database
        self._thread = thread
        self._path = path
        self._clock = clock

    async def join(self, node_id: str, region: str, info: Json) -> None:
        now = self._clock.now_us()

        def work() -> None:
            self._execute("forget_nodes", before=now - _PATIENCE_US)
            self._execute("bury_others", node_id=node_id)
            text = canonical(info).decode()
            self._execute("join", node_id=node_id, region=region, now=now, info=text)

        await self._transaction(work)

    async def beat(self, node_id: str, info: Json) -> Pulse:
        now, text = self._clock.now_us(), canonical(info).decode()
        await self._transaction(lambda: self._execute("beat", node_id=node_id, now=now, info=text))
        return await self.watch(node_id)

    async def watch(self, node_id: str) -> Pulse:
        rows = await self._transaction(lambda: self._execute("members", node_id=node_id).fetchall())
        return Pulse(str(self._path), self._clock.now_us(), [member_of(row) for row in rows])

    async def bury(self, node_id: str, beat: int) -> bool:
        done = await self._transaction(lambda: self._execute("bury", node_id=node_id, beat=beat))
        return bool(done.rowcount == 1)

    async def leave(self, node_id: str, state: NodeState) -> None:
        await self._transaction(lambda: self._execute("leave", node_id=node_id, state=state.value))

    async def close(self) -> None:
        """Nothing of its own is open."""

    def _execute(self, name: str, /, **values: object) -> sqlite3.Cursor:
        query = load_queries()[name]
        return self._database.execute(query.sql, query.bind(**values))

    async def _transaction(self, work: Callable[[], Any]) -> Any:
        def whole() -> Any:
            self._database.execute("BEGIN IMMEDIATE")
            try:
                result = work()
                self._database.execute("COMMIT")
            except BaseException:
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")
                raise
            return result

        try:
            return await self._thread.submit(whole)
        except sqlite3.Error as error:
            raise translate(error, self._path) from error
