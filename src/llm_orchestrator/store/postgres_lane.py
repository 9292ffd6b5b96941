"""One writing connection, and the task that owns it.

Laws 3 and 4: the task is never cancelled and no statement of it is, because PostgreSQL reports a
cancelled commit as done. A commit that takes too long is abandoned by closing the socket. What
became of it is decided by a barrier: a row under the number of that commit. Either the number is
taken, then the commit is there; or the barrier takes it, then the commit can never come any more.
The barrier is durable (and on the standby), so everything read before it is, too.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import asyncpg  # type: ignore[import-untyped]

from llm_orchestrator.errors import StoreError
from llm_orchestrator.store.postgres_address import Address
from llm_orchestrator.store.postgres_connect import (
    Connection,
    connect,
    is_connection_trouble,
    translate,
)
from llm_orchestrator.store.postgres_pages import Pages
from llm_orchestrator.store.queries import load_queries

logger = logging.getLogger(__name__)
LATE_S = 5.0
"""A statement that takes longer is abandoned; its server may be cut off."""
_PLANS = {"plan_cache_mode": "force_generic_plan", "enable_seqscan": "off"}
"""Statements are few and fetch rows by their keys: one plan each, which stays good as tables grow.

To plan a commit of one entry each time costs more than to execute it.
"""
Work = Callable[[Connection, int], Awaitable[Any]]
"""Given the connection and the number under which it must write its row of `commits`."""


class Unsure(Exception):
    """The connection was lost during the statement; `settle` tells what became of it."""

    def __init__(self, cause: StoreError, number: int) -> None:
        super().__init__(cause.message)
        self.cause = cause
        self.number = number


class Lane:
    """See the module's docstring. Opens at first use."""

    def __init__(
        self, name: str, address: Address, *, is_pooled: bool = False, pages: Pages | None = None
    ) -> None:
        self.name = name
        self._pages = pages or Pages()
        self._address = address
        self._is_pooled = is_pooled
        self._connection: Connection | None = None
        self._number = 0
        """Of the last commit that landed."""
        self._unsure: int | None = None
        """The number of a commit that may or may not be there, or come yet."""
        self._met: dict[int, bool] = {}
        """Numbers that were taken already: by a commit (True), or by a barrier cut short."""
        self._landed: dict[int, bool] = {}
        """Of commits that were unsure, by number: whether it was there after all."""
        self._is_closed = False
        self._has_warned = False
        self._was_late = False
        self._turn = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def shown(self) -> str:
        """Where the server is, without the password."""
        return self._address.shown

    async def run(self, work: Work, *, is_commit: bool = True, late_s: float | None = None) -> Any:
        """The result of `work`, which commits under the number it is given, within `late_s`.

        Raises Unsure when the connection broke meanwhile, StoreError when there is none, and what
        PostgreSQL raised when nothing was written.
        """
        limit_s = LATE_S if late_s is None else late_s
        return await self._uncancelled(self._do(work, is_commit=is_commit, late_s=limit_s))

    async def settle(self, unsure: Unsure) -> bool:
        """What became of the commit that raised `unsure`: True when it is there, for good."""
        landed: bool = await self._uncancelled(self._find_out(unsure.number))
        return landed

    async def barrier(self, connection: Connection, number: int) -> None:
        """Work that makes everything durable which the connection has read."""
        query = load_queries("postgres")["barrier"]
        await connection.execute(query.sql, *query.bind(lane=self.name, number=number))

    async def close(self) -> None:
        """End the connection, and with it what is still under way or waits for its turn."""
        self._is_closed = True
        self._drop()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._drop()

    # -- how ----------------------------------------------------------------------------------

    async def _uncancelled(self, work: Coroutine[Any, Any, Any]) -> Any:
        """A caller that is cancelled leaves; the work goes on."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return await asyncio.shield(task)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # a caller that is gone leaves no "never retrieved" warning

    async def _find_out(self, number: int) -> bool:
        async with self._turn:
            if number not in self._landed:
                await self._connected()
            return self._landed.pop(number)

    async def _do(self, work: Work, *, is_commit: bool, late_s: float) -> Any:
        async with self._turn:
            connection = await self._connected()
            self._has_warned = False
            error: Exception | None = None
            late = asyncio.get_running_loop().call_later(late_s, self._abandon, late_s)
            try:
                result = await work(connection, self._number + 1)
            except Exception as caught:  # noqa: BLE001 (told apart below)
                error = caught
            finally:
                late.cancel()
            if error is None and not self._has_warned and not self._was_late:
                self._number += int(is_commit)
                return result
            if error is not None and not is_connection_trouble(error) and not self._was_late:
                raise self._pages.told(error)
            self._drop()
            if is_commit:
                self._unsure = self._number + 1
            cause = error or ConnectionError("the commit was cut short")
            raise Unsure(translate(cause, self._address.shown), self._number + 1)

    def _abandon(self, late_s: float) -> None:
        """Close the socket under a statement that takes too long; it fails with that."""
        logger.warning("a commit took longer than %g s: looking for the leader", late_s)
        self._was_late = True
        self._drop()

    async def _connected(self) -> Connection:
        if self._connection is not None and not self._connection.is_closed():
            return self._connection
        self._check_open()
        connection, _ = await connect(
            self._address,
            is_pooled=self._is_pooled,
            settings={
                **_PLANS,
                "application_name": f"llm-orchestrator {self.name}"[:63],
                "statement_timeout": "0",
            },
            seek_leader=self._was_late,
        )
        connection.add_log_listener(self._listen)
        try:
            async with asyncio.timeout(LATE_S):
                await self._promise(connection)
                await self._raise_barrier(connection)
            self._check_open()
        except BaseException as error:
            connection.terminate()
            if not isinstance(error, Exception):
                raise
            raise translate(self._pages.told(error), self._address.shown) from error
        self._connection = connection
        self._was_late = False
        return connection

    def _check_open(self) -> None:
        if self._is_closed:
            raise StoreError("the store is closed")

    async def _promise(self, connection: Connection) -> None:
        """See that a commit's answer means what we take it for, whatever the role's defaults."""
        row = await connection.fetchrow(load_queries("postgres")["promises"].sql)
        if row[0] not in ("off", "local") and row[1] != "error":
            return
        if self._is_pooled:
            raise StoreError(
                f"{self.shown}: synchronous_commit is {row[0]}, client_min_messages is {row[1]}: "
                "an answer would not mean that a commit is safe",
                hint="ALTER ROLE name SET synchronous_commit = on, client_min_messages = notice",
            )
        await connection.execute("SET synchronous_commit = on")

    async def _raise_barrier(self, connection: Connection) -> None:
        """Law 3: before this connection acknowledges anything."""
        queries = load_queries("postgres")
        while True:
            number = self._number + 1
            try:
                await self._write_barrier(connection, number)
            except asyncpg.UniqueViolationError:
                there = queries["commit_at"]
                values = there.bind(lane=self.name, number=number)
                # An earlier barrier of ours, cut short as well, has an empty digest.
                self._met[number] = bool(await connection.fetchval(there.sql, *values))
                self._number = number
                continue
            self._number = number
            break
        if self._unsure is not None:
            self._landed[self._unsure] = self._met.get(self._unsure, False)
            self._unsure = None
        self._met.clear()

    async def _write_barrier(self, connection: Connection, number: int) -> None:
        self._has_warned = False
        await self.barrier(connection, number)
        if self._has_warned:
            raise ConnectionError("a barrier was cut short")

    def _listen(self, _: Any, message: Any) -> None:
        """Law 4: a WARNING during a commit says that it may be on this server only."""
        if str(getattr(message, "severity_en", "") or "") in ("WARNING", "ERROR", "FATAL", "PANIC"):
            logger.warning("PostgreSQL warns: %s", getattr(message, "message", message))
            self._has_warned = True

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.terminate()
            self._connection = None
