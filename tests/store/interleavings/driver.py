"""What stands in for asyncpg below the production store: connections that ask for leave.

Nothing above is replaced: connecting, lanes and their barriers, the pool, hearts, the statements
and what is made of their outcomes are what ships. A connection here runs each statement that writes
in a transaction of its own, so that there is a moment between the statement and its commit; and it
leaves time out: where production gives up after seconds, an order takes as long as it takes.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any
from unittest.mock import patch
from urllib.parse import urlsplit

import asyncpg  # type: ignore[import-untyped]

from llm_orchestrator.store import postgres_connect, postgres_lane, postgres_members
from llm_orchestrator.store.queries import load_queries
from tests.store.interleavings.stepper import STEPPED, Turns

CHATTER = frozenset({"server", "promises"})
"""What is asked of a new connection."""
_AGES_S = 60.0
_TIMELESS = {
    "application_name": STEPPED,
    "idle_in_transaction_session_timeout": "0",
    "lock_timeout": "0",
    "statement_timeout": "0",
}


class Session:
    """What the store takes for an asyncpg connection."""

    def __init__(self, driver: Driver, raw: Any) -> None:
        self._driver = driver
        self._raw = raw
        self._is_open = False
        """In a transaction."""

    def __getattr__(self, name: str) -> Any:
        """Everything that sends nothing: listeners, the socket."""
        return getattr(self._raw, name)

    async def fetch(self, sql: str, *values: object) -> Any:
        return await self._do("fetch", sql, values)

    async def fetchrow(self, sql: str, *values: object) -> Any:
        return await self._do("fetchrow", sql, values)

    async def fetchval(self, sql: str, *values: object) -> Any:
        return await self._do("fetchval", sql, values)

    async def execute(self, sql: str, *values: object) -> Any:
        return await self._do("execute", sql, values)

    @contextlib.asynccontextmanager
    async def transaction(self, *, isolation: str | None = None) -> AsyncIterator[None]:
        """Begins with its first statement, asks before its commit."""
        transaction = self._raw.transaction(isolation=isolation)
        self._is_open = True
        try:
            await transaction.start()
            yield
            await self._driver.turns.step("commit")
        except BaseException:
            self._is_open = False
            with contextlib.suppress(asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
                await transaction.rollback()
            raise
        self._is_open = False
        await transaction.commit()

    async def _do(self, how: str, sql: str, values: tuple[object, ...]) -> Any:
        if sql.startswith("SET "):
            return None  # the driver sets what there is to set
        driver, is_in_step = self._driver, self._is_open or sql.startswith("SELECT")
        name, is_all = _name(sql), driver.is_whole and not is_in_step
        driver.used = self._raw
        driver.turns.pid = 0 if self._raw.is_closed() else self._raw.get_server_pid()
        if name not in driver.quiet:
            await driver.turns.step(f"{name} and commit" if is_all else name)
        if is_in_step or is_all:
            return await getattr(self._raw, how)(sql, *values)
        async with self.transaction():
            return await getattr(self._raw, how)(sql, *values)


def _name(sql: str) -> str:
    """What a log calls a statement."""
    for name, query in load_queries("postgres").items():
        if query.sql == sql:
            return name
    return "append" if "INSERT INTO commits" in sql else " ".join(sql.split())[:40]


class Driver:
    """The connections of one node."""

    def __init__(self, turns: Turns, url: str, sockets: list[Any], *, is_patient: bool) -> None:
        self.turns = turns
        self.quiet = CHATTER
        """Statements that need no leave: their order changes nothing in the scenario."""
        self.is_whole = False
        """A statement and its commit are one step: it goes on though its client is gone."""
        self.is_cut = False
        self._hangs = False
        """Its commits wait for the standby."""
        self._is_patient = is_patient
        """Of two sessions in a deadlock the other one is ended: who it is may not be chance."""
        self._url = url
        self._sockets = sockets
        """Of the whole world."""
        self._own: list[Any] = []
        self.used: Any = None
        """The connection that was asked for something last."""

    async def connect(self, settings: Mapping[str, str]) -> Session:
        wanted = {
            **settings,
            **_TIMELESS,
            "deadlock_timeout": "60s" if self._is_patient else "20ms",
            "synchronous_commit": "on" if self._hangs else "local",
        }
        raw = await asyncpg.connect(self._url, server_settings=wanted)
        self._sockets.append(raw)
        self._own.append(raw)
        return Session(self, raw)

    async def prepare(self, *, hangs: bool, is_whole: bool) -> None:
        """For the next trial."""
        self.quiet, self.is_whole, self.is_cut = CHATTER, is_whole, False
        if hangs is not self._hangs:
            self._hangs = hangs
            for raw in self._own:
                await raw.execute(f"SET synchronous_commit = {'on' if hangs else 'local'}")

    def cut(self) -> None:
        """The network is gone under what the node sends, or was about to."""
        self.is_cut = True
        self.turns.pid = 0  # what the old one waits for is no matter of ours any more
        self.used.terminate()

    def close(self) -> None:
        """Give all of them up."""
        for raw in self._own:
            raw.terminate()
        self.forget()

    def forget(self) -> None:
        """What is closed is over: nobody asks what the server still does for it."""
        for raw in [raw for raw in self._own if raw.is_closed()]:
            self._own.remove(raw)
            self._sockets.remove(raw)


class _Asyncpg:
    """The module, but for where nodes connect to: `postgresql://NODE/stepped`."""

    def __init__(self, drivers: Mapping[str, Driver]) -> None:
        self._drivers = drivers

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncpg, name)

    async def connect(self, dsn: str, **options: Any) -> Any:
        driver = self._drivers.get(urlsplit(dsn).hostname or "")
        if driver is None:
            return await asyncpg.connect(dsn, **options)
        return await driver.connect(options.get("server_settings") or {})


@contextlib.contextmanager
def in_place(drivers: Mapping[str, Driver]) -> Iterator[None]:
    """The production store connects through these."""
    with (
        patch.object(postgres_connect, "asyncpg", _Asyncpg(drivers)),
        patch.object(postgres_lane, "LATE_S", _AGES_S),
        patch.object(postgres_members, "BEAT_S", _AGES_S),
    ):
        yield
