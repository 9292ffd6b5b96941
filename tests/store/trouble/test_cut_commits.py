"""A commit whose answer never came: landed or not, it is written once.

The cut comes where it hurts: before the statement reaches the server, or after it was carried out
and before the answer came back. By reset, by black hole, by the death of the server.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest

from llm_orchestrator.drill.postgres_lab import PostgresServer
from llm_orchestrator.drill.proxy import Proxy, Trap
from llm_orchestrator.errors import StoreError, StoreUnavailable
from llm_orchestrator.store import postgres_apply, postgres_connect, postgres_lane
from llm_orchestrator.store.base import Batch, Outcome, PutProgress, PutRecord
from llm_orchestrator.store.postgres import PostgresStore
from tests.postgres import fresh_database
from tests.store.support import draft, land, outcome
from tests.store.trouble.support import (
    HANG_S,
    Witness,
    has_logged,
    lane,
    note,
    opened,
    post,
    through,
    warmed_up,
    watched,
)


@pytest.fixture(scope="module")
def own_server() -> Iterator[PostgresServer]:
    """A server that may be killed."""
    with PostgresServer() as server:
        yield server


@pytest.fixture(autouse=True)
def _soon_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit is late sooner; it is tried longer."""
    monkeypatch.setattr(postgres_lane, "LATE_S", 0.3)
    monkeypatch.setattr(postgres_apply, "PATIENCE_S", HANG_S)


class Scene:
    """A store behind a proxy, and who sees past it."""

    def __init__(
        self, server: PostgresServer, proxy: Proxy, store: PostgresStore, witness: Witness
    ) -> None:
        self.server = server
        self.proxy = proxy
        self.store = store
        self.witness = witness

    def trap(self, name: str, *, is_passed: bool) -> Trap:
        """Strikes when the next commit of a lane is sent: its name is among the values."""
        needle = lane(self.store, name).encode()
        return self.proxy.set_trap(Trap(needle, is_passed=is_passed))

    async def caught(self, trap: Trap) -> None:
        await asyncio.to_thread(trap.wait)


@asynccontextmanager
async def scene(server: PostgresServer) -> AsyncIterator[Scene]:
    with fresh_database(server) as url, Proxy(server.port) as proxy:
        async with (
            opened(through(url, proxy.port)) as store,
            watched(server, url) as witness,
            asyncio.timeout(HANG_S),
        ):
            yield Scene(server, proxy, store, witness)


async def cut(set_up: Scene, trap: Trap, *, how: str, arrives: bool) -> None:
    """Once the trap has struck and, if it `arrives`, the commit is there: the fault itself."""
    await set_up.caught(trap)
    if arrives:
        await set_up.witness.until(
            "SELECT EXISTS (SELECT 1 FROM inbox WHERE name = 'hello') "
            "OR EXISTS (SELECT 1 FROM journal WHERE step = 'hello')"
        )
    if how == "reset":
        set_up.proxy.reset()
    elif how == "hole":
        set_up.proxy.heal(is_old_lost=True)
    else:
        set_up.server.kill()
        set_up.proxy.reset()
        set_up.server.start()


@pytest.mark.parametrize("arrives", [True, False])
@pytest.mark.parametrize("how", ["reset", "hole", "kill"])
async def test_a_message_is_posted_once(
    own_server: PostgresServer, how: str, arrives: bool
) -> None:
    async with scene(own_server) as here:
        writer = await warmed_up(here.store)
        trap = here.trap("side", is_passed=arrives)
        sent = asyncio.create_task(post(here.store, "hello", run_id=writer.run_id))
        await cut(here, trap, how=how, arrives=arrives)
        await sent
        assert await here.witness.messages(writer.run_id) == ["hello"]
        await post(here.store, "again", run_id=writer.run_id)
        assert await here.witness.messages(writer.run_id) == ["hello", "again"]
        assert await here.witness.gaps() == 0


@pytest.mark.parametrize("arrives", [True, False])
@pytest.mark.parametrize("how", ["reset", "hole", "kill"])
async def test_an_entry_and_what_comes_with_it_land_once(
    own_server: PostgresServer, how: str, arrives: bool
) -> None:
    async with scene(own_server) as here:
        writer = await warmed_up(here.store)
        append = writer.append(draft(step="hello"), changes=[note(writer.run_id)])
        trap = here.trap("journal", is_passed=arrives)
        sent = asyncio.create_task(outcome(here.store, append))
        await cut(here, trap, how=how, arrives=arrives)
        assert await sent is Outcome.LANDED
        assert await outcome(here.store, writer.append(draft(step="next"))) is Outcome.LANDED
        assert await here.witness.entries(writer.run_id) == 3
        assert await here.witness.messages(writer.run_id) == ["hello"]


@pytest.mark.parametrize("arrives", [True, False])
async def test_a_large_change_of_many_statements_lands_once(
    own_server: PostgresServer, arrives: bool
) -> None:
    """Two versions of one record in a batch: a transaction, cut at its commit."""
    async with scene(own_server) as here:
        writer = await warmed_up(here.store)
        changes = (
            PutRecord("test", "key", 1, 0),
            PutRecord("test", "key", 2, 1),
            note(writer.run_id),
        )
        trap = here.proxy.set_trap(Trap(b"COMMIT;", is_passed=arrives))
        sent = asyncio.create_task(here.store.commit(Batch(changes=changes)))
        await cut(here, trap, how="reset", arrives=arrives)
        assert not (await sent).is_refused
        assert await here.store.shelf.record("test", "key") == (2, 2)
        assert await here.witness.messages(writer.run_id) == ["hello"]


async def test_a_statement_that_arrives_after_its_sender_gave_up_changes_nothing(
    own_server: PostgresServer,
) -> None:
    async with scene(own_server) as here:
        writer = await warmed_up(here.store)
        trap = here.trap("side", is_passed=False)
        sent = asyncio.create_task(post(here.store, "hello", run_id=writer.run_id))
        await cut(here, trap, how="hole", arrives=False)
        await sent
        assert await here.witness.sessions(lane(here.store, "side")) == 2
        here.proxy.heal()  # now it comes, and then the closing of its connection
        await here.witness.until(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1",
            f"llm-orchestrator {lane(here.store, 'side')}",
            is_value=1,
        )
        assert await here.witness.messages(writer.run_id) == ["hello"]
        assert has_logged(own_server, 'unique constraint "commits_pkey"')


async def test_a_fence_without_entries_that_landed_unheard_is_no_damage(
    own_server: PostgresServer,
) -> None:
    """Pieces of a streamed answer ask only whether the run is still theirs."""
    async with scene(own_server) as here:
        writer = await warmed_up(here.store)
        assert await outcome(here.store, writer.append(draft())) is Outcome.LANDED
        stale = writer.copy()
        for arrives in (True, False):
            piece = PutProgress(writer.run_id, "a", 1, int(arrives), "text")
            trap = here.trap("journal", is_passed=arrives)
            sent = asyncio.create_task(outcome(here.store, writer.append(changes=[piece])))
            await here.caught(trap)
            if arrives:
                await here.witness.until("SELECT count(*) FROM progress", is_value=1)
            here.proxy.reset()
            assert await sent is Outcome.LANDED
        assert await here.witness.see("SELECT count(*) FROM progress") == 2
        # Whoever lost the run meanwhile is told so, although his statement was carried out.
        assert await outcome(here.store, writer.append(draft(step="b"))) is Outcome.LANDED
        trap = here.trap("journal", is_passed=True)
        piece = PutProgress(writer.run_id, "a", 1, 7, "text")
        sent = asyncio.create_task(outcome(here.store, stale.append(changes=[piece])))
        await here.caught(trap)
        await here.witness.until_waiting(lane(here.store, "journal"), "ClientRead")
        here.proxy.reset()
        assert await sent is Outcome.FENCED
        assert await here.witness.see("SELECT count(*) FROM progress") == 2


async def test_each_of_many_callers_hears_of_his_own_commit(
    own_server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One lane: what became of one is found out by the next, and told to him who asks for it."""
    monkeypatch.setattr(postgres_apply, "_PAUSE_S", 1.0)  # all are cut before the first one asks
    async with scene(own_server) as here:
        writer = await warmed_up(here.store)
        sent = []
        for number in range(6):
            text = f"message {number}"
            trap = here.proxy.set_trap(Trap(text.encode(), is_passed=number in (0, 1, 4)))
            sent.append(asyncio.create_task(post(here.store, text, run_id=writer.run_id)))
            await here.caught(trap)
            if trap.is_passed:
                await here.witness.until("SELECT EXISTS (SELECT FROM inbox WHERE name = $1)", text)
            here.proxy.reset()
        await asyncio.gather(*sent)
        found = await here.witness.messages(writer.run_id)
        assert sorted(found) == [f"message {number}" for number in range(6)]


async def test_a_fate_is_kept_when_its_barrier_is_cut_too(own_server: PostgresServer) -> None:
    """The commit is found, then the connection breaks before the barrier behind it is durable."""
    async with scene(own_server) as here:
        writer = await warmed_up(here.store)
        trap = here.trap("side", is_passed=True)
        sent = asyncio.create_task(post(here.store, "hello", run_id=writer.run_id))
        await here.caught(trap)
        await here.witness.until("SELECT count(*) FROM inbox", is_value=1)
        name = lane(here.store, "side")
        digest = await here.witness.see(
            "SELECT digest FROM commits WHERE node_id = $1 ORDER BY number DESC LIMIT 1", name
        )
        trap = here.proxy.set_trap(Trap(digest, way="down", is_passed=True))
        here.proxy.reset()
        await here.caught(trap)  # it has been told that the commit is there
        here.proxy.reset()
        await sent
        assert await here.witness.messages(writer.run_id) == ["hello"]


async def test_whoever_is_cancelled_leaves_and_his_commit_goes_on(
    own_server: PostgresServer,
) -> None:
    async with scene(own_server) as here:
        writer = await warmed_up(here.store)
        await here.witness.see("BEGIN")
        await here.witness.see("SELECT 1 FROM runs WHERE run_id = $1 FOR UPDATE", writer.run_id)
        sent = asyncio.create_task(post(here.store, "hello", run_id=writer.run_id))
        async with watched(own_server, here.store.shown.partition(" ")[0]) as other:
            await other.until_waiting(lane(here.store, "side"), "transactionid")
            sent.cancel()
            with pytest.raises(asyncio.CancelledError):
                await sent
            for _ in range(20):  # a cancel would have come by now: it goes by the same way
                assert await here.store.look.run(writer.run_id) is not None
            assert await other.sessions(lane(here.store, "side"), waits_for="transactionid") == 1
            await here.witness.see("COMMIT")
            await post(here.store, "next", run_id=writer.run_id)
            assert await other.messages(writer.run_id) == ["hello", "next"]
            assert not has_logged(own_server, "canceling statement")


async def test_a_store_that_is_gone_for_good_says_so_and_that_the_outcome_is_not_known(
    own_server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_apply, "PATIENCE_S", 0.3)
    monkeypatch.setattr(postgres_connect, "ALL_HOSTS_S", 0.3)
    async with scene(own_server) as here:
        writer = await warmed_up(here.store)
        trap = here.trap("side", is_passed=True)
        sent = asyncio.create_task(post(here.store, "hello", run_id=writer.run_id))
        await here.caught(trap)
        here.proxy.black_hole()
        with pytest.raises(StoreUnavailable, match="is not known") as caught:
            await sent
        assert caught.value.hint
        here.proxy.heal()
        await post(here.store, "next", run_id=writer.run_id)
        assert (await here.witness.messages(writer.run_id))[-1] == "next"
        here.server.kill()
        here.proxy.reset()
        try:
            with pytest.raises(StoreUnavailable):
                await post(here.store, "perhaps", run_id=writer.run_id)
            # Where nothing can have been sent, the outcome is known: nothing happened.
            with pytest.raises(StoreUnavailable) as caught:
                await post(here.store, "never", run_id=writer.run_id)
            assert "not known" not in caught.value.message
        finally:
            here.server.start()
        await post(here.store, "last", run_id=writer.run_id)
        assert "never" not in await here.witness.messages(writer.run_id)


async def test_a_closed_store_says_so_to_everybody_who_waits(own_server: PostgresServer) -> None:
    async with scene(own_server) as here:
        writer = await warmed_up(here.store)
        trap = here.trap("side", is_passed=False)
        sent = [asyncio.create_task(post(here.store, text, run_id=writer.run_id)) for text in "abc"]
        await here.caught(trap)
        await here.store.close()
        for task in sent:
            with pytest.raises(StoreError, match="closed"):
                await task
        with pytest.raises(StoreError, match="closed"):
            await land(here.store, writer.append(draft()))
        here.proxy.heal()
        await here.witness.until(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'llm-orch%'"
            " AND datname = current_database()",
            is_value=0,
        )
