"""A commit that waits for a standby which does not answer: done for the server, not for us.

`synchronous_standby_names = 'nobody'` holds every synchronous commit: durable here, invisible, not
acknowledged. It ends by a cancel, which PostgreSQL reports as success (law 4), or when the standby
is there, or when the operator gives up on one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest

from llm_orchestrator.drill.postgres_lab import PostgresServer
from llm_orchestrator.errors import StoreError, StoreUnavailable
from llm_orchestrator.store import postgres_apply, postgres_lane
from llm_orchestrator.store.base import Outcome
from llm_orchestrator.store.postgres import PostgresStore
from tests.postgres import fresh_database
from tests.store.support import draft, land, outcome
from tests.store.trouble.support import (
    HANG_S,
    Witness,
    hold_commits,
    lane,
    note,
    opened,
    post,
    release_commits,
    warmed_up,
    watched,
)


@pytest.fixture(scope="module")
def own_server() -> Iterator[PostgresServer]:
    """A server whose standby may be missing."""
    with PostgresServer() as server:
        yield server


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres_apply, "PATIENCE_S", HANG_S)


@asynccontextmanager
async def scene(server: PostgresServer) -> AsyncIterator[tuple[PostgresStore, Witness]]:
    with fresh_database(server) as url:
        async with (
            opened(url) as store,
            watched(server, url) as witness,
            asyncio.timeout(HANG_S),
        ):
            try:
                yield store, witness
            finally:
                release_commits(server)


async def cancel_wait(witness: Witness, application: str) -> None:
    """What an operator does with a session that hangs."""
    await witness.see(
        "SELECT pg_cancel_backend(pid) FROM pg_stat_activity "
        "WHERE application_name = $1 AND wait_event = 'SyncRep'",
        f"llm-orchestrator {application}",
    )


async def test_a_late_commit_is_abandoned_and_settled_when_it_may_end(
    own_server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_lane, "LATE_S", 0.3)
    async with scene(own_server) as (store, witness):
        writer = await warmed_up(store)
        await hold_commits(own_server, witness)
        sent = asyncio.create_task(post(store, "hello", run_id=writer.run_id))
        side = lane(store, "side")
        await witness.until_waiting(side, "SyncRep")
        # The old session still waits; the barrier of the next one waits for it, at the key.
        await witness.until_waiting(side, "transactionid")
        assert not sent.done()
        assert await witness.messages(writer.run_id) == []
        release_commits(own_server)
        await sent
        assert await witness.messages(writer.run_id) == ["hello"]
        assert await witness.gaps() == 0


@pytest.mark.parametrize("name", ["journal", "side"])
async def test_a_cancelled_wait_is_no_commit(own_server: PostgresServer, name: str) -> None:
    async with scene(own_server) as (store, witness):
        writer = await warmed_up(store)
        await hold_commits(own_server, witness)
        if name == "journal":
            append = writer.append(draft(), changes=[note(writer.run_id)])
            sent = asyncio.create_task(land(store, append))
        else:
            sent = asyncio.create_task(land(store, changes=[note(writer.run_id)]))
        own = lane(store, name)
        await witness.until_waiting(own, "SyncRep")
        await cancel_wait(witness, own)
        # Now it shows, on this server only: the barrier behind it waits for the standby.
        await witness.until("SELECT count(*) FROM inbox", is_value=1)
        await witness.until_waiting(own, "SyncRep")
        assert not sent.done()
        # A barrier that is cancelled, too, proves no more than the commit did.
        await cancel_wait(witness, own)
        await witness.until(
            "SELECT count(*) FROM commits WHERE node_id = $1 AND digest = ''", own, is_value=2
        )
        await witness.until_waiting(own, "SyncRep")
        assert not sent.done()
        release_commits(own_server)
        receipt = await sent
        assert (receipt.refused, receipt.is_refused) == ({}, False)
        assert await witness.entries(writer.run_id) == (2 if name == "journal" else 1)
        assert await witness.messages(writer.run_id) == ["hello"]


async def test_whoever_loses_patience_is_told_and_nothing_is_acknowledged(
    own_server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_lane, "LATE_S", 0.2)
    monkeypatch.setattr(postgres_apply, "PATIENCE_S", 0.5)
    async with scene(own_server) as (store, witness):
        writer = await warmed_up(store)
        await hold_commits(own_server, witness)
        append = writer.append(draft(), changes=[note(writer.run_id)])
        with pytest.raises(StoreUnavailable, match="not known") as caught:
            await outcome(store, append)
        assert caught.value.hint
        assert caught.value.retryable
        release_commits(own_server)
        assert await outcome(store, append) is Outcome.LANDED  # the same bytes again
        assert await witness.entries(writer.run_id) == 2
        assert await witness.messages(writer.run_id) == ["hello"]


async def test_a_hanging_commit_survives_its_caller(own_server: PostgresServer) -> None:
    """To cancel the statement would end its wait, and PostgreSQL would call it done."""
    async with scene(own_server) as (store, witness):
        writer = await warmed_up(store)
        await hold_commits(own_server, witness)
        sent = asyncio.create_task(post(store, "hello", run_id=writer.run_id))
        await witness.until_waiting(lane(store, "side"), "SyncRep")
        sent.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sent
        for _ in range(20):  # a cancel request would have come by now, by the same way
            await store.look.run(writer.run_id)
        assert await witness.sessions(lane(store, "side"), waits_for="SyncRep") == 1
        assert await witness.messages(writer.run_id) == []
        release_commits(own_server)
        await post(store, "next", run_id=writer.run_id)
        assert await witness.messages(writer.run_id) == ["hello", "next"]


@pytest.mark.parametrize("level", ["off", "local"])
async def test_a_role_that_does_not_wait_for_its_commits_is_made_to(
    own_server: PostgresServer, level: str
) -> None:
    with fresh_database(own_server) as url:
        name = url.rpartition("/")[2]
        own_server.psql(f'ALTER DATABASE "{name}" SET synchronous_commit = {level}')
        own_server.psql(f'ALTER DATABASE "{name}" SET client_min_messages = error')
        async with opened(url) as store, watched(own_server, url) as witness:
            writer = await warmed_up(store)
            await hold_commits(own_server, witness)
            sent = asyncio.create_task(post(store, "hello", run_id=writer.run_id))
            await witness.until_waiting(lane(store, "side"), "SyncRep")
            release_commits(own_server)
            await sent
            assert await witness.messages(writer.run_id) == ["hello"]
        # Behind a pooler nothing can be set for a session: such a role is refused.
        async with opened(url, direct_url=f"{url}?application_name=direct") as store:
            with pytest.raises(StoreError, match=f"synchronous_commit is {level}") as caught:
                await post(store, "never", run_id=writer.run_id)
            assert "ALTER ROLE" in str(caught.value.hint)
