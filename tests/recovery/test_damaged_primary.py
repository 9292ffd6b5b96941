"""A primary with damaged pages is left once, for a copy, and made anew; else rows are blamed."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest

from llm_orchestrator.errors import Refused, StoreUnavailable
from llm_orchestrator.recovery.damaged_primary import KIND, PageGuard
from llm_orchestrator.recovery.patroni import Cluster, Patroni, Server
from llm_orchestrator.store.memory import MemoryStore
from llm_orchestrator.store.postgres_pages import Pages
from llm_orchestrator.store.statistics import DamagedPages
from llm_orchestrator.telemetry.metrics import Metrics
from tests.unit.engine.support import VirtualClock, virtually


class Servers:
    """Three servers, what each has counted, and a Patroni that moves and makes anew."""

    def __init__(self, *, sync: str = "degrade", standbys: tuple[str, ...] = ("a-db2",)) -> None:
        self.leader = "a-db1"
        self.sync = sync
        self.standbys = standbys
        self.counted: dict[str, float] = {}
        """Who has met a damaged page, and how long ago, seconds."""
        self.has_checksums = True
        self.refuses = False
        self.moves: list[tuple[str, str]] = []
        self.anew: list[str] = []

    async def damaged_pages(self) -> DamagedPages | None:
        age_s = self.counted.get(self.leader)
        return DamagedPages(int(age_s is not None), age_s) if self.has_checksums else None

    async def look(self) -> Cluster:
        def role(name: str) -> str:
            if name == self.leader:
                return "leader"
            return "sync_standby" if name in self.standbys else "replica"

        names = ("a-db1", "a-db2", "a-db3")
        servers = [Server(name, "a", role(name), "running", 0) for name in names]
        return Cluster(servers, self.leader, self.sync)

    async def switch(self, leader: str, candidate: str) -> None:
        if self.refuses or leader != self.leader:
            raise Refused("no")
        self.moves.append((leader, candidate))
        self.leader, self.standbys = candidate, ("a-db3",)

    async def make_anew(self, server: Server) -> None:
        if server.name == self.leader:
            raise Refused("the leader")
        self.anew.append(server.name)
        self.counted.pop(server.name, None)


class Site:
    """Nodes that look after `servers`."""

    def __init__(self, servers: Servers, nodes: int = 2) -> None:
        self.clock = VirtualClock()
        self.servers = servers
        self.store = cast("Any", MemoryStore(self.clock))
        self.store.clock = self.clock
        self.pages = [Pages() for _ in range(nodes)]
        self.guards = [self._guard(pages) for pages in self.pages]

    def _guard(self, pages: Pages) -> PageGuard:
        @contextlib.asynccontextmanager
        async def patroni() -> AsyncIterator[Patroni]:
            yield cast("Patroni", self.servers)

        return PageGuard(self.store, self.servers, pages=pages, patroni=patroni, metrics=Metrics())

    async def rounds(self, count: int) -> None:
        for _ in range(count):
            for guard in self.guards:
                await guard.do()
            await self.clock.sleep(2.0)


def test_it_is_left_once_and_made_anew_once_whoever_looks() -> None:
    async def main() -> None:
        site = Site(servers := Servers())
        await site.rounds(2)
        assert servers.moves == []
        servers.counted["a-db1"] = 0.5
        await site.rounds(3)
        assert servers.moves == [("a-db1", "a-db2")]
        assert servers.anew == ["a-db1"]
        assert list(await site.store.shelf.records(KIND)) == ["a-db1"]
        await site.rounds(20)
        assert (servers.moves, servers.anew) == ([("a-db1", "a-db2")], ["a-db1"])
        assert await site.store.shelf.records(KIND) == {}  # it may lead again
        assert all(pages.is_left for pages in site.pages)

    virtually(main())


def test_a_server_that_was_left_is_nobody_to_go_to() -> None:
    async def main() -> None:
        site = Site(servers := Servers(), nodes=1)
        servers.counted["a-db1"] = 0.5
        await site.rounds(2)
        servers.counted["a-db2"], servers.standbys = 0.5, ("a-db1",)
        await site.rounds(2)
        assert servers.moves == [("a-db1", "a-db2")]
        assert not site.pages[0].is_left
        servers.standbys = ("a-db3",)
        await site.rounds(1)
        assert servers.moves[1:] == [("a-db2", "a-db3")]

    virtually(main())


def test_two_damaged_servers_in_a_row_are_both_made_anew() -> None:
    async def main() -> None:
        site = Site(servers := Servers(), nodes=1)
        servers.counted |= {"a-db1": 0.5, "a-db2": 0.5}
        await site.rounds(1)
        servers.standbys = ("a-db1", "a-db3")  # before anything is noted
        await site.rounds(4)
        assert servers.moves == [("a-db1", "a-db2"), ("a-db2", "a-db3")]
        assert sorted(servers.anew) == ["a-db1", "a-db2"]

    virtually(main())


@pytest.mark.parametrize("trouble", ["no standby", "refused", "long ago", "no checksums"])
def test_where_it_cannot_be_left_or_need_not_be_it_stays(trouble: str) -> None:
    async def main() -> None:
        servers = Servers(standbys=() if trouble == "no standby" else ("a-db2",))
        servers.counted["a-db1"] = 3_600.0 if trouble == "long ago" else 0.5
        servers.refuses = trouble == "refused"
        servers.has_checksums = trouble != "no checksums"
        site = Site(servers)
        await site.rounds(3)
        assert servers.moves == []
        assert [pages.is_left for pages in site.pages] == [trouble == "long ago"] * 2

    virtually(main())


def test_no_commit_has_to_wait_until_a_server_is_made_anew() -> None:
    async def main() -> None:
        site = Site(servers := Servers(sync="strict"), nodes=1)
        servers.counted["a-db1"] = 0.5
        await site.rounds(1)
        servers.standbys = ("a-db1",)  # the only other copy
        await site.rounds(5)
        assert servers.anew == []
        servers.standbys = ("a-db1", "a-db3")
        await site.rounds(2)
        assert servers.anew == ["a-db1"]

    virtually(main())


def test_what_met_a_page_waits_only_while_the_server_is_left() -> None:
    class PageError(Exception):
        sqlstate = "XX001"

    class IndexFault(PageError):
        sqlstate = "XX002"

    pages, page, index = Pages(), PageError("invalid page"), IndexFault("wrong order")
    assert pages.told(page) is page
    pages.is_left = True
    assert isinstance(pages.told(page), StoreUnavailable)
    assert pages.told(index) is index  # the copies have it, too
