"""Stores in real trouble: opened through a proxy, watched past it.

A `Witness` looks at the same database by a connection of its own that no fault touches: what it
sees is what PostgreSQL has, whatever the store under test believes. It also waits for what must
happen on the server, by looking until it does.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import asyncpg  # type: ignore[import-untyped]

from llm_orchestrator.clock import RealClock
from llm_orchestrator.drill.postgres_lab import PostgresServer
from llm_orchestrator.store.base import News, Post, Store
from llm_orchestrator.store.postgres import PostgresStore
from tests.store.support import Writer, accepted, new_run

HANG_S = 20.0
"""Nothing here takes a tenth of it."""
_numbers = itertools.count(1)


@asynccontextmanager
async def opened(
    url: str, *, direct_url: str = "", pool_size: int = 10, is_engine: bool = False
) -> AsyncIterator[PostgresStore]:
    """A store on real time, as a process of its own would open it."""
    store = PostgresStore(
        url,
        node_id=f"node-{next(_numbers)}",
        clock=RealClock(),
        direct_url=direct_url,
        pool_size=pool_size,
    )
    try:
        async with asyncio.timeout(HANG_S):
            await (store.open_as_engine() if is_engine else store.open())
        yield store
    finally:
        await store.close()


def through(url: str, port: int) -> str:
    """The same database by another port."""
    parts = urlsplit(url)
    return parts._replace(netloc=f"{parts.username}@127.0.0.1:{port}").geturl()


def beside(*urls: str) -> str:
    """One URL for the same database on several servers."""
    hosts = ",".join(urlsplit(url).netloc.rpartition("@")[2] for url in urls)
    parts = urlsplit(urls[0])
    return parts._replace(netloc=f"{parts.username}@{hosts}").geturl()


def note(run_id: str, text: str = "hello") -> Post:
    """A message without a sender key: nothing but the store itself keeps it from being doubled."""
    return Post(run_id, "signal", text)


async def warmed_up(store: Store) -> Writer:
    """A run to post to; the lanes are connected, their statements prepared."""
    writer = await accepted(store, new_run())
    await post(store, "warm-up-nobody", run_id="00000000-0000-7000-8000-ffffffffffff")
    return writer


async def post(store: Store, text: str, *, run_id: str) -> None:
    from llm_orchestrator.store.base import Batch

    receipt = await store.commit(Batch(changes=(note(run_id, text),)))
    assert not receipt.is_refused
    assert not receipt.refused


def lane(store: PostgresStore, name: str) -> str:
    """The name under which a lane counts its commits, and its sessions are known."""
    return f"{store.node_id}/{name}"


class Ear:
    """Collects a store's news."""

    def __init__(self, store: Store) -> None:
        self._news: list[News] = []
        self._came = asyncio.Event()
        store.on_news(self._hear)

    def _hear(self, news: News) -> None:
        self._news.append(news)
        self._came.set()

    def forget(self) -> None:
        self._news.clear()

    async def until(self, fits: Callable[[News], bool]) -> News:
        """The first news, of all heard together, that fits."""
        async with asyncio.timeout(HANG_S):
            while True:
                self._came.clear()
                heard = News()
                for news in self._news:
                    heard = heard | news
                if fits(heard):
                    return heard
                await self._came.wait()


class Witness:
    """Sees a database as it is."""

    def __init__(self, server: PostgresServer, database: str) -> None:
        self._server = server
        self._database = database
        self._connection: Any = None

    async def see(self, statement: str, *values: object) -> Any:
        """The first value of the first row. Connects anew when it has to."""
        if self._connection is None or self._connection.is_closed():
            url = self._server.url(self._database, via="socket")
            self._connection = await asyncpg.connect(url, timeout=HANG_S)
        return await self._connection.fetchval(statement, *values)

    async def until(self, statement: str, *values: object, is_value: object = True) -> None:
        """Look until the statement gives `is_value`."""
        async with asyncio.timeout(HANG_S):
            while await self.see(statement, *values) != is_value:
                pass

    async def sessions(self, application: str, *, waits_for: str = "%") -> int:
        """How many backends there are of ours, by what they wait for."""
        count: int = await self.see(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND "
            "application_name LIKE $1 AND COALESCE(wait_event, '') LIKE $2",
            f"llm-orchestrator {application}",
            waits_for,
        )
        return count

    async def until_waiting(self, application: str, waits_for: str, *, count: int = 1) -> None:
        """Until so many backends of ours wait for something."""
        async with asyncio.timeout(HANG_S):
            while await self.sessions(application, waits_for=waits_for) < count:
                pass

    async def messages(self, run_id: str) -> list[str]:
        """The texts of all messages that a run was ever sent."""
        found: list[str] = await self.see(
            "SELECT COALESCE(array_agg(name ORDER BY number), '{}') FROM inbox WHERE run_id = $1",
            run_id,
        )
        return found

    async def entries(self, run_id: str) -> int:
        """How many entries a journal has."""
        count: int = await self.see("SELECT count(*) FROM journal WHERE run_id = $1", run_id)
        return count

    async def gaps(self) -> int:
        """How many lanes have commits that are not numbered one after another."""
        count: int = await self.see(
            "SELECT count(*) FROM (SELECT node_id FROM commits GROUP BY node_id "
            "HAVING max(number) - min(number) + 1 <> count(*)) AS gap"
        )
        return count

    async def close(self) -> None:
        if self._connection is not None:
            self._connection.terminate()


@asynccontextmanager
async def watched(server: PostgresServer, url: str) -> AsyncIterator[Witness]:
    witness = Witness(server, urlsplit(url).path.lstrip("/"))
    try:
        yield witness
    finally:
        await witness.close()


async def hold_commits(server: PostgresServer, witness: Witness) -> None:
    """From now on every synchronous commit waits for a standby that does not exist.

    The server takes its new setting when it gets to it: a commit of our own must have met it.
    """
    set_server(server, "synchronous_standby_names", "nobody")
    probe = await asyncpg.connect(server.url(via="socket"), timeout=HANG_S)
    waits = "SELECT wait_event = 'SyncRep' FROM pg_stat_activity WHERE pid = $1"
    pid = probe.get_server_pid()
    while True:
        commit = asyncio.create_task(
            probe.execute("SELECT pg_logical_emit_message(true, 'probe', '')")
        )
        while not commit.done() and not await witness.see(waits, pid):
            pass
        if not commit.done():
            break
        await commit
    probe.terminate()
    await asyncio.gather(commit, return_exceptions=True)


def release_commits(server: PostgresServer) -> None:
    """No commit waits any more."""
    set_server(server, "synchronous_standby_names", "")


def has_logged(server: PostgresServer, text: str) -> bool:
    """Whether the server has ever written this."""
    return text in (server.folder / "log").read_text(errors="replace")


def set_server(server: PostgresServer, name: str, value: str) -> None:
    """Change a setting of a running server, for the sessions that there are, too."""
    server.psql(f"ALTER SYSTEM SET {name} = '{value}'")
    server.psql("SELECT pg_reload_conf()")
