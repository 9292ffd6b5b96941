"""Many nodes pick from one database: each gets other runs, and a dead one's are free at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from llm_orchestrator.drill.postgres_lab import PostgresServer
from llm_orchestrator.store import postgres
from llm_orchestrator.store.base import Outcome, Wanted
from llm_orchestrator.store.postgres import PostgresStore
from llm_orchestrator.store.postgres_members import PostgresMembers
from tests.store.support import Writer, accepted, claim, new_run, outcome
from tests.store.trouble.support import HANG_S, opened, watched


class Node:
    """A store of its own, and its place among the nodes."""

    def __init__(self, store: PostgresStore, members: PostgresMembers) -> None:
        self.store = store
        self.members = members
        self.node_id = store.node_id

    async def pick(self, limit: int) -> set[str]:
        return await self._pick(Wanted(limit, self.store.clock.now_us()))

    async def pick_narrow(self, limit: int) -> set[str]:
        """From a queue of which all nodes together may drive three runs."""
        now = self.store.clock.now_us()
        return await self._pick(Wanted(limit, now, queue="narrow", concurrency=3))

    async def _pick(self, wanted: Wanted) -> set[str]:
        return {run.run_id for run in await self.store.pick(self.node_id, wanted)}

    async def adopt(self, limit: int) -> set[str]:
        return set(await self.store.adopt(self.node_id, limit))


@asynccontextmanager
async def node(url: str, *, direct_url: str = "") -> AsyncIterator[Node]:
    async with opened(url, direct_url=direct_url) as store:
        members = await store.members()
        try:
            await members.join(store.node_id, "here", {})
            async with asyncio.timeout(HANG_S):
                yield Node(store, members)
        finally:
            await members.close()


async def runs(store: PostgresStore, count: int, queue: str = "default") -> dict[str, Writer]:
    writers = [await accepted(store, new_run(queue=queue)) for _ in range(count)]
    return {writer.run_id: writer for writer in writers}


async def test_nodes_that_pick_at_once_get_disjoint_runs(postgres_url: str) -> None:
    async with node(postgres_url) as a, node(postgres_url) as b:
        everything = set(await runs(a.store, 40))
        found: list[set[str]] = await asyncio.gather(
            *(which.pick(4) for which in (a, b) for _ in range(5))
        )
        mine, others = set[str]().union(*found[:5]), set[str]().union(*found[5:])
        assert mine
        assert others
        assert not mine & others
        rest = await b.pick(100)
        assert mine | others | rest == everything
        assert not mine & rest


async def test_a_dead_pickers_runs_are_free_at_once_and_a_living_ones_when_they_lapse(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with node(postgres_url) as a, node(postgres_url) as b:
        mine = set(await runs(a.store, 3))
        narrow = set(await runs(a.store, 3, "narrow"))
        assert await a.pick_narrow(10) == narrow
        assert await a.pick(10) == mine | narrow  # its own are offered again
        assert await b.pick(10) == set()
        assert await b.pick_narrow(10) == set()
        assert await b.members.bury(a.node_id, 0)
        assert await b.pick_narrow(10) == narrow
        assert await b.pick(10) == mine | narrow
        assert await a.pick(10) == set()  # b lives
        await b.store.put_back(b.node_id, list(mine))
        assert await a.pick(10) == mine
        monkeypatch.setattr(postgres, "PICK_US", -1_000_000)  # it has lapsed
        assert await b.pick(10) == mine | narrow
        assert await a.pick(10) == mine | narrow


async def test_orphans_are_adopted_by_one_node_each(postgres_url: str) -> None:
    async with node(postgres_url) as a, node(postgres_url) as b, node(postgres_url) as dead:
        writers = await runs(dead.store, 20)
        for writer in writers.values():
            entry, change = claim(dead.node_id)
            assert await outcome(dead.store, writer.append(entry, change=change)) is Outcome.LANDED
        assert await a.adopt(20) == set()
        assert await a.members.bury(dead.node_id, 0)
        first, second = await asyncio.gather(a.adopt(10), b.adopt(10))
        assert not first & second
        assert first | second | await a.adopt(20) | await b.adopt(20) == set(writers)
        assert await b.members.bury(a.node_id, 0)
        assert await b.adopt(20) == set(writers)


@pytest.mark.parametrize("is_pooled", [False, True])
async def test_a_bound_holds_when_all_nodes_pick_at_once(
    postgres_server: PostgresServer, postgres_url: str, is_pooled: bool
) -> None:
    """Also where the database's own default is a snapshot for the whole transaction."""
    async with watched(postgres_server, postgres_url) as witness:
        name = await witness.see("SELECT current_database()")
        await witness.see(
            f"ALTER DATABASE \"{name}\" SET default_transaction_isolation = 'repeatable read'"
        )
        direct = f"{postgres_url}?sslmode=disable" if is_pooled else ""
        async with (
            node(postgres_url, direct_url=direct) as a,
            node(postgres_url, direct_url=direct) as b,
            node(postgres_url, direct_url=direct) as c,
        ):
            writers = await runs(a.store, 12, "narrow")
            await asyncio.gather(*(each.pick(0) for each in (a, b, c)))
            lock = "SELECT pg_advisory_lock(hashtextextended('llm_orchestrator.queue.narrow', 0))"
            await witness.see(lock)
            asked = [asyncio.create_task(each.pick_narrow(2)) for each in (a, b, c)]
            blocked = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
            await witness.until(blocked, is_value=3)
            await witness.see("SELECT pg_advisory_unlock_all()")
            found = await asyncio.gather(*asked)
            assert sorted(map(len, found)) == [0, 1, 2]
            assert len(set().union(*found)) == 3
            assert set().union(*found) <= set(writers)
