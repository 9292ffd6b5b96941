"""The primary changes under living connections: the store goes where writes are taken.

A real standby follows a real primary; the URL names both.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from llm_orchestrator.drill.postgres_lab import PostgresServer
from llm_orchestrator.drill.proxy import Proxy, Trap
from llm_orchestrator.errors import StoreUnavailable
from llm_orchestrator.store import postgres_apply, postgres_connect, postgres_lane, postgres_read
from llm_orchestrator.store.base import NodeState, Outcome, Wanted
from llm_orchestrator.store.postgres import PostgresStore
from tests.postgres import fresh_database
from tests.store.support import draft, outcome
from tests.store.trouble.support import (
    HANG_S,
    Witness,
    beside,
    hold_commits,
    lane,
    note,
    opened,
    post,
    set_server,
    through,
    warmed_up,
    watched,
)

READERS = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE '% reader'"


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres_apply, "PATIENCE_S", HANG_S)


class Pair:
    """A primary, the standby that follows it, and a URL that names both."""

    def __init__(self, primary: PostgresServer, standby: PostgresServer, name: str) -> None:
        self.primary = primary
        self.standby = standby
        self.name = name
        self.url = beside(primary.url(name), standby.url(name))
        self.url += "?target_session_attrs=read-write&connect_timeout=2"

    async def follow(self) -> None:
        """Until the standby has everything that the primary has."""
        position = self.primary.psql("SELECT pg_current_wal_lsn()")
        async with watched(self.standby, self.standby.url(self.name)) as witness:
            await witness.until("SELECT pg_last_wal_replay_lsn() >= $1::text::pg_lsn", position)

    def promote(self) -> None:
        self.standby.psql("SELECT pg_promote()")


@asynccontextmanager
async def pair() -> AsyncIterator[Pair]:
    with PostgresServer() as primary:
        primary.create_database("store")
        with primary.standby() as standby:
            async with asyncio.timeout(HANG_S):
                yield Pair(primary, standby, "store")


@asynccontextmanager
async def slowly(here: Pair) -> AsyncIterator[str]:
    """A URL by which the standby always answers last."""
    with Proxy(here.standby.port) as proxy:
        proxy.delay(0.01)
        primary = here.primary.url(here.name)
        yield beside(primary, through(primary, proxy.port))


async def readers(store: PostgresStore, witness: Witness, count: int) -> None:
    """Open so many reading connections, and leave them idle."""
    held = [store._pool.connection() for _ in range(count)]
    for one in held:
        await one.__aenter__()
    for one in held:
        await one.__aexit__(None, None, None)
    assert await witness.see(READERS) == count


@pytest.mark.parametrize("is_killed", [False, True])
async def test_work_goes_on_at_the_standby_when_the_primary_is_demoted_or_dies(
    is_killed: bool,
) -> None:
    async with (
        pair() as here,
        opened(here.url) as store,
        watched(here.primary, here.url) as old,
        watched(here.standby, here.url) as new,
    ):
        writer = await warmed_up(store)
        await post(store, "before", run_id=writer.run_id)
        await here.follow()
        if is_killed:
            here.primary.kill()
        else:  # told to take no writes: SQLSTATE 25006 on connections that live on
            set_server(here.primary, "default_transaction_read_only", "on")
            await old.until("SHOW transaction_read_only", is_value="on")
        sent = [
            asyncio.create_task(post(store, "hello", run_id=writer.run_id)),
            asyncio.create_task(
                outcome(store, writer.append(draft(), changes=[note(writer.run_id, "note")]))
            ),
        ]
        here.promote()
        await asyncio.gather(*sent)
        assert sent[1].result() is Outcome.LANDED
        assert sorted(await new.messages(writer.run_id)) == ["before", "hello", "note"]
        assert await new.entries(writer.run_id) == 2
        if not is_killed:
            assert await old.messages(writer.run_id) == ["before"]


@pytest.mark.parametrize("trust_s", [0.0, 1e9])
async def test_readers_leave_a_demoted_primary_at_once(
    trust_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although it still answers. To pick is to write: SQLSTATE 25006 where nobody asked before."""
    monkeypatch.setattr(postgres_read, "TRUST_S", trust_s)
    async with (
        pair() as here,
        opened(here.url) as store,
        watched(here.primary, here.url) as old,
        watched(here.standby, here.url) as new,
    ):
        writer = await warmed_up(store)
        await readers(store, old, 3)
        await here.follow()
        set_server(here.primary, "default_transaction_read_only", "on")
        await old.until("SHOW transaction_read_only", is_value="on")
        here.promote()
        await new.until("SELECT pg_is_in_recovery()", is_value=False)
        await new.see("UPDATE runs SET priority = 77")
        if trust_s:
            picked = await store.pick("nobody", Wanted(limit=5, now_us=store.clock.now_us()))
            assert [run.priority for run in picked] == [77]
        else:
            run = await store.look.run(writer.run_id)
            assert run is not None
            assert run.priority == 77
        await old.until(READERS, is_value=0)


async def test_a_commit_that_hangs_on_a_cut_off_primary_lands_at_the_higher_timeline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both say that they are primaries. What hung on the old one was never acknowledged."""
    monkeypatch.setattr(postgres_lane, "LATE_S", 0.3)
    async with (
        pair() as here,
        slowly(here) as url,
        opened(url) as store,
        watched(here.primary, here.url) as old,
        watched(here.standby, here.url) as new,
    ):
        writer = await warmed_up(store)
        await here.follow()
        here.standby.psql("ALTER SYSTEM SET primary_conninfo = 'port=1'")
        here.standby.psql("SELECT pg_reload_conf()")
        await old.until("SELECT count(*) FROM pg_stat_replication", is_value=0)
        await hold_commits(here.primary, old)
        here.promote()
        await post(store, "hello", run_id=writer.run_id)
        assert await new.messages(writer.run_id) == ["hello"]
        assert await old.messages(writer.run_id) == []


async def test_a_terminated_session_is_replaced_and_its_commit_lands_once(
    postgres_server: PostgresServer, postgres_url: str
) -> None:
    """SQLSTATE 57P01, in the middle of a statement that waits for a row."""
    async with (
        opened(postgres_url) as store,
        watched(postgres_server, postgres_url) as witness,
        watched(postgres_server, postgres_url) as holder,
        asyncio.timeout(HANG_S),
    ):
        writer = await warmed_up(store)
        await holder.see("BEGIN")
        await holder.see("SELECT 1 FROM runs WHERE run_id = $1 FOR UPDATE", writer.run_id)
        sent = asyncio.create_task(post(store, "hello", run_id=writer.run_id))
        for _ in range(2):
            await witness.until_waiting(lane(store, "side"), "transactionid")
            assert await witness.see(
                "SELECT bool_and(pg_terminate_backend(pid, 10000)) FROM pg_stat_activity "
                "WHERE application_name LIKE 'llm-orch%' AND datname = current_database()"
            )
        await witness.until_waiting(lane(store, "side"), "transactionid")
        await holder.see("COMMIT")
        await sent
        assert await witness.messages(writer.run_id) == ["hello"]


async def test_a_session_that_was_ended_is_replaced_before_its_closing_comes(
    postgres_server: PostgresServer, postgres_url: str
) -> None:
    """The server's last word has come, its closing has not: the driver refuses to work."""
    with Proxy(postgres_server.port) as proxy:
        async with (
            opened(through(postgres_url, proxy.port)) as store,
            watched(postgres_server, postgres_url) as witness,
            asyncio.timeout(HANG_S),
        ):
            writer = await warmed_up(store)
            await store.look.run(writer.run_id)
            for name in (lane(store, "side"), "reader"):
                trap = proxy.set_trap(Trap(b"57P01", way="down", is_passed=True))
                await witness.see(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE "
                    "application_name = $1 AND datname = current_database()",
                    f"llm-orchestrator {name}",
                )
                await asyncio.to_thread(trap.wait)
                await post(store, f"after {name}", run_id=writer.run_id)
                assert await store.look.run(writer.run_id) is not None
            assert len(await witness.messages(writer.run_id)) == 2


async def test_a_host_that_swallows_everything_costs_no_time(
    postgres_server: PostgresServer, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_connect, "CONNECT_S", 10 * HANG_S)
    with Proxy(postgres_server.port) as proxy:
        proxy.black_hole()
        url = beside(through(postgres_url, proxy.port), postgres_url)
        async with opened(url) as store, asyncio.timeout(HANG_S):
            writer = await warmed_up(store)
            await post(store, "hello", run_id=writer.run_id)
            assert proxy.accepted >= 3
            members = await store.members()
            await members.join("node-a", "here", {})
            await members.leave("node-a", NodeState.LEFT)
            await members.close()


async def test_two_hosts_that_take_no_writes_are_both_named(
    postgres_server: PostgresServer,
) -> None:
    with fresh_database(postgres_server) as url, PostgresServer() as other:
        other.kill()
        name = url.rpartition("/")[2]
        set_server(postgres_server, "default_transaction_read_only", "on")
        try:
            async with watched(postgres_server, url) as witness:
                await witness.until("SHOW transaction_read_only", is_value="on")
            with pytest.raises(StoreUnavailable, match=r"takes no writes.*Connect call") as caught:
                async with opened(beside(url, other.url(name))):
                    pass
            assert f":{other.port}" in caught.value.message
        finally:
            set_server(postgres_server, "default_transaction_read_only", "off")
