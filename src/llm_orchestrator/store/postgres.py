"""The store on PostgreSQL: any number of nodes on one database.

Connections: two lanes that write (one for journals, one for everything else, so that a breaker's
state does not wait behind a thousand steps), a pool that reads, a bell for wake-ups, and a heart on
a thread of its own (see store.base.Members). The bell and the heart use the direct URL, where there
is one: the rest works behind a pooler in transaction mode.

It must never write a run's entries but through `append`, and never choose anything else for a place
whose outcome is not known (see postgres_lane.py).
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

import asyncpg  # type: ignore[import-untyped]

from llm_orchestrator.clock import Clock, StoreClock
from llm_orchestrator.errors import (
    StoreError,
    StoreForeign,
    StoreIsCopy,
    StoreReplaced,
    StoreUnavailable,
)
from llm_orchestrator.model import Run
from llm_orchestrator.store.archiving import Archive, archived
from llm_orchestrator.store.base import Batch, News, Receipt, Wanted, lives, news_of
from llm_orchestrator.store.measure import measured
from llm_orchestrator.store.postgres_address import parse_address
from llm_orchestrator.store.postgres_apply import Applier
from llm_orchestrator.store.postgres_bell import CHANNEL, Bell, pack
from llm_orchestrator.store.postgres_connect import Connection, connect, translate
from llm_orchestrator.store.postgres_lane import Lane
from llm_orchestrator.store.postgres_look import PostgresLook
from llm_orchestrator.store.postgres_members import PostgresMembers
from llm_orchestrator.store.postgres_pages import Pages
from llm_orchestrator.store.postgres_read import Pool
from llm_orchestrator.store.postgres_schema import prepare, prepare_vectors
from llm_orchestrator.store.queries import load_queries
from llm_orchestrator.store.rows import is_run_id
from llm_orchestrator.store.shelf import TableShelf
from llm_orchestrator.store.statistics import TableCounts
from llm_orchestrator.telemetry.metrics import Metrics

logger = logging.getLogger(__name__)
DRIFT_S = 60.0
PICK_US = 10_000_000
"""How long a picked run is kept for the node that picked it."""


class PostgresStore:
    """See store.base.Store for every method's contract."""

    def __init__(
        self,
        url: str,
        *,
        node_id: str,
        clock: Clock,
        direct_url: str = "",
        pool_size: int = 10,
        metrics: Metrics | None = None,
        may_copy: bool = False,
    ) -> None:
        self.node_id = node_id
        self._may_copy = may_copy  # whoever has put it aside knows that it is a copy
        self.metrics = metrics or Metrics()
        self.archive: Archive | None = None
        self.generation = 1
        self.incarnation = ""
        self._role = ""
        self.clock = StoreClock(clock)
        self._address = parse_address(url)
        self._direct = parse_address(direct_url) if direct_url else self._address
        is_pooled = self._direct != self._address
        self.pages = Pages()
        self._pool = Pool(
            self._address,
            clock,
            size=pool_size,
            is_pooled=is_pooled,
            metrics=self.metrics,
            pages=self.pages,
        )
        self.look = PostgresLook(self._pool)
        self.shelf = TableShelf(self._pool)
        self.counts = TableCounts(self._pool, has_standbys=True)
        self._lanes = [
            Lane(f"{node_id}/{name}", self._address, is_pooled=is_pooled, pages=self.pages)
            for name in ("journal", "side")
        ]
        self._appliers: list[Applier] = []
        self._bell: Bell | None = None
        self._listeners: list[Callable[[News], None]] = []

    @property
    def shown(self) -> str:
        """Where it is, without the password."""
        return self._address.shown

    @property
    def exhausted(self) -> int:
        """How often a reader waited in vain for one of DB_POOL_SIZE connections."""
        return self._pool.exhausted

    async def is_served(self) -> bool:
        """True when a node is alive and connected."""
        try:
            nodes = await self.shelf.nodes()
        except StoreForeign:  # no tables yet
            return False
        return any(lives(node) and node.is_connected for node in nodes)

    # -- opening -------------------------------------------------------------------------------

    async def open(self, *, may_create: bool = True) -> None:
        """Connect; make or migrate the tables. Raises StoreError's subclasses, each with a hint."""
        connection, server = await connect(self._direct)
        self.clock.set(server.now_us)  # before anything reads it, and while it is fresh
        try:
            self.incarnation, self.generation, self._role = await prepare(
                connection, self.clock, shown=self.shown, may_create=may_create
            )
            self.shelf.has_nearest = await prepare_vectors(connection)
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            raise translate(error, self.shown) from error
        finally:
            connection.terminate()
        if abs(self.clock.drift_s) > DRIFT_S:
            logger.warning(
                "this machine's clock is %+.0f s off the store's; the store's is used",
                self.clock.drift_s,
            )
        self._make_appliers()

    async def open_as_engine(self) -> None:
        """Open as a node: with wake-ups."""
        await self.open()
        if self._role != "primary" and not self._may_copy:
            await self.close()
            raise StoreIsCopy(
                f"{self.shown} is a {self._role}: what runs in it would be done twice",
                hint="llmo runs list looks into it; llmo restore makes it live",
            )
        self._bell = Bell(self.node_id, self._direct, self.clock, heard=self._tell)
        self._bell.start()

    async def open_as_client(self, *, may_create: bool = False) -> None:
        """Open to look and to ask; what is committed still wakes the nodes."""
        await self.open(may_create=may_create)

    async def reader_pid(self) -> int:
        """The server process of a connection that reads: with a pool of one, of every read."""
        async with self._pool.connection() as connection:
            return int(connection.get_server_pid())

    def _make_appliers(self) -> None:
        self._appliers = [
            Applier(
                lane,
                incarnation=self.incarnation,
                clock=self.clock,
                has_nearest=self.shelf.has_nearest,
            )
            for lane in self._lanes
        ]

    async def renew(self) -> None:
        async with self._pool.connection() as connection:
            row = await connection.fetchrow("SELECT incarnation, generation FROM store")
        if row is not None and row[0] != self.incarnation:
            self.incarnation, self.generation = row
            self._make_appliers()  # the caller goes on at once: nobody gets a turn in between

    async def close(self) -> None:
        """End every connection."""
        if self.archive is not None:
            await self.archive.close()
        self._appliers = []
        if self._bell is not None:
            await self._bell.close()
            self._bell = None
        for lane in self._lanes:
            await lane.close()
        await self._pool.close()

    # -- writing -------------------------------------------------------------------------------

    async def commit(self, batch: Batch) -> Receipt:
        if not self._appliers:
            raise StoreError("the store is closed")
        applier = self._appliers[0 if batch.appends else 1]
        try:
            receipt = await measured(
                archived(self.archive, batch, applier.apply, clock=self.clock),
                batch,
                metrics=self.metrics,
                clock=self.clock,
            )
        except StoreReplaced as error:
            if self._bell is not None:
                raise  # a node drops what it knows before it takes the new one
            await self.renew()
            raise StoreUnavailable(
                f"{self.shown} was restored meanwhile; ask again", hint="look before you ask again"
            ) from error
        news = news_of(batch)
        if news:
            self._tell(news)
            await self._ring(news)
        return receipt

    def on_news(self, listener: Callable[[News], None]) -> None:
        self._listeners.append(listener)

    def _tell(self, news: News) -> None:
        for listener in self._listeners:
            listener(news)

    async def _ring(self, news: News) -> None:
        if not replace(news, parked=frozenset(), ended=frozenset()):
            return  # parked runs wake by the clock; who waits for an end elsewhere looks himself
        if self._bell is not None:
            self._bell.ring(news)
            return
        try:
            async with self._pool.connection() as connection:
                for word in pack(self.node_id, news):
                    await connection.execute("SELECT pg_notify($1, $2)", CHANNEL, word)
        except StoreUnavailable as error:
            logger.debug("nobody could be told at once: %s", error.message)

    # -- nodes and claims ----------------------------------------------------------------------

    async def members(self) -> PostgresMembers:
        return PostgresMembers(self._direct)

    async def pick(self, node_id: str, wanted: Wanted) -> list[Run]:
        query = load_queries("postgres")["pick"]
        values: dict[str, Any] = {
            "node_id": node_id,
            "now": wanted.now_us,
            "until": wanted.now_us + PICK_US,
            "full_queues": list(wanted.full_queues),
            "strange": list(wanted.strange),
            "except_runs": [run_id for run_id in wanted.except_runs if is_run_id(run_id)],
            "queue": wanted.queue,
        }
        if wanted.queue is None or not wanted.concurrency:
            rows = await self._pool.rows("pick", **values, limit=wanted.limit)
            return self.look.readable(rows)

        async def work(connection: Connection) -> list[Any]:
            async with connection.transaction(isolation="read_committed"):
                lock, count = (
                    load_queries("postgres")[name] for name in ("lock_queue", "in_flight")
                )
                await connection.execute(lock.sql, wanted.queue)
                arguments = count.bind(queue=wanted.queue, now=wanted.now_us)
                busy = await connection.fetchval(count.sql, *arguments)
                limit = max(0, min(wanted.limit, wanted.concurrency - busy))
                found: list[Any] = await connection.fetch(
                    query.sql, *query.bind(**values, limit=limit)
                )
            return found

        return self.look.readable(await self._on_pool(work))

    async def adopt(
        self,
        node_id: str,
        limit: int,
        except_runs: Sequence[str] = (),
        *,
        strange: Sequence[str] = (),
    ) -> list[str]:
        now = self.clock.now_us()
        rows = await self._pool.rows(
            "adopt",
            node_id=node_id,
            now=now,
            until=now + PICK_US,
            except_runs=[run_id for run_id in except_runs if is_run_id(run_id)],
            strange=list(strange),
            limit=limit,
        )
        return [str(row[0]) for row in rows]

    async def put_back(self, node_id: str, run_ids: Sequence[str]) -> None:
        await self._pool.rows("put_back", node_id=node_id, runs=list(run_ids))

    async def _on_pool(self, work: Callable[[Connection], Awaitable[list[Any]]]) -> list[Any]:
        async with self._pool.connection() as connection:
            return await work(connection)
