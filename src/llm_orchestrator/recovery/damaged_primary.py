"""Leaving a primary that has damaged pages on its disk, for a copy that has none.

PostgreSQL counts the pages whose checksum did not fit; every node looks at that count. Who sees a
fresh one has Patroni move the primary to a synchronous standby: nothing acknowledged is lost, and
while it lasts nobody is blamed for what lies on those pages (store/postgres_pages.py). Patroni
moves it only away from the server that we name, so it does not matter how many nodes ask.

The server that was left is noted in the store, and as soon as another one leads, some node has
Patroni make it anew from the leader. Not where commits would have to wait for that: then a person
does it when it suits. Where there is no copy to go to, damaged pages are again the matter of the
runs whose rows lie on them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from llm_orchestrator.errors import OrchestratorError, Refused, StoreError, StoreUnavailable
from llm_orchestrator.model import MICROSECONDS, Json
from llm_orchestrator.recovery.patroni import Cluster, Patroni, Server
from llm_orchestrator.store.base import Batch, Database, PutRecord
from llm_orchestrator.store.postgres_pages import Pages
from llm_orchestrator.store.statistics import DamagedPages
from llm_orchestrator.telemetry.metrics import Metrics

logger = logging.getLogger(__name__)
PERIOD_S = 2.0
FRESH_S = 30.0
"""A page that was met so lately is damaged still."""
KIND = "damaged-server"
_SETTLED_S = 30.0
"""So long after the order Patroni tells the truth about a server that it makes anew."""
_AGAIN_S = 600.0


class Counts(Protocol):
    """Who counts damaged pages: store.statistics.TableCounts."""

    async def damaged_pages(self) -> DamagedPages | None: ...


class PageGuard:
    """What a node does every PERIOD_S. `patroni` gives None where there is none."""

    def __init__(
        self,
        store: Database,
        counts: Counts,
        *,
        pages: Pages,
        patroni: Callable[[], AbstractAsyncContextManager[Patroni | None]],
        metrics: Metrics,
    ) -> None:
        self._store = store
        self._counts = counts
        self._pages = pages
        self._patroni = patroni
        self._metrics = metrics
        self._damaged: set[str] = set()
        """Servers whose count was fresh while they led, until they are noted."""
        pages.is_left = True

    async def do(self) -> None:
        """Look, and act. Raises StoreError's subclasses, but not while the store is away."""
        try:
            found = await self._counts.damaged_pages()
            is_hit = _is_fresh(found)
            if not is_hit:
                self._pages.is_left = found is not None  # else nobody would see them
            left = {} if is_hit else await self._store.shelf.records(KIND)
        except StoreUnavailable:
            return
        if not is_hit and not self._damaged and not left:
            return
        async with self._patroni() as patroni:
            cluster = await patroni.look() if patroni is not None else None
            if patroni is None or cluster is None:
                self._give_up("no Patroni answers")
            elif is_hit:
                await self._leave(patroni, cluster)
            elif cluster.leader:
                await self._note(cluster, left)
                await self._make_anew(patroni, cluster, left)

    # -- leaving ------------------------------------------------------------------------------

    async def _leave(self, patroni: Patroni, cluster: Cluster) -> None:
        if not cluster.leader:
            return  # somebody is about to
        try:
            left: Collection[str] = await self._store.shelf.records(KIND)
        except StoreError:  # on such a page, perhaps
            left = ()
        heir = cluster.heir({*left, *self._damaged})
        if heir is None:
            self._give_up("no synchronous standby can take over")
            return
        # Asked after the leader: what Patroni is told to leave is the server that has counted.
        if not _is_fresh(await self._counts.damaged_pages()):
            return
        self._damaged.add(cluster.leader)
        logger.error(
            "pages of the primary %s are damaged on its disk: moving it to %s",
            cluster.leader,
            heir.name,
        )
        try:
            await patroni.switch(cluster.leader, heir.name)
            self._metrics.count("primaries_left_total")
        except (Refused, StoreUnavailable) as error:
            after = await patroni.look()
            if after is not None and after.leader == cluster.leader:
                self._give_up(error.message)

    def _give_up(self, why: str) -> None:
        if self._pages.is_left:
            logger.error("the primary's damaged pages cannot be left behind: %s", why)
        self._pages.is_left = False

    # -- what was left ------------------------------------------------------------------------

    async def _note(self, cluster: Cluster, left: Collection[str]) -> None:
        """Every node that saw it writes it down, so that one of them does."""
        for name in self._damaged - {cluster.leader}:
            if name not in left:
                await self._put(name, {"left_at": self._now, "by": self._store.node_id}, 0)
            self._damaged.discard(name)

    async def _make_anew(self, patroni: Patroni, cluster: Cluster, left: Collection[str]) -> None:
        for server in cluster.servers:
            if server.name not in left or server.name == cluster.leader:
                continue
            if cluster.sync == "strict" and cluster.heir(left) is None:
                continue  # without it no commit would get through
            value, version = await self._store.shelf.record(KIND, server.name)
            if not isinstance(value, dict):
                continue
            since_s = (self._now - value.get("anew_at", 0)) / MICROSECONDS
            if "anew_at" in value and server.is_well and since_s > _SETTLED_S:
                if await self._put(server.name, None, version):
                    logger.warning("%s has been made anew from %s", server.name, cluster.leader)
            elif since_s > _AGAIN_S:
                anew = {**value, "anew_at": self._now}
                if await self._put(server.name, anew, version):
                    await self._order(patroni, server)

    async def _order(self, patroni: Patroni, server: Server) -> None:
        try:
            await patroni.make_anew(server)
            logger.warning("%s, which had damaged pages, is being made anew", server.name)
        except OrchestratorError as error:
            logger.error("%s", error.message)

    async def _put(self, name: str, value: Json, version: int) -> bool:
        """False: another node was quicker."""
        put = PutRecord(KIND, name, value, version)
        return not (await self._store.commit(Batch(changes=(put,)))).is_refused

    @property
    def _now(self) -> int:
        return self._store.clock.now_us()


def _is_fresh(found: DamagedPages | None) -> bool:
    return found is not None and found.age_s is not None and found.age_s < FRESH_S
