"""Batches in each other's way: PostgreSQL gives up on one of them, the store does not."""

from __future__ import annotations

import asyncio

from llm_orchestrator.drill.postgres_lab import PostgresServer
from llm_orchestrator.model import Kind, RunState
from llm_orchestrator.store.base import Outcome, Post, PutRecord
from llm_orchestrator.store.postgres import PostgresStore
from tests.store.support import Writer, claim, land, outcome
from tests.store.trouble.support import (
    HANG_S,
    Witness,
    has_logged,
    lane,
    opened,
    post,
    warmed_up,
    watched,
)


async def set_database(witness: Witness, setting: str) -> None:
    name = await witness.see("SELECT current_database()")
    await witness.see(f'ALTER DATABASE "{name}" SET {setting}')


async def test_two_stores_that_deadlock_both_land(
    postgres_server: PostgresServer, postgres_url: str
) -> None:
    """Each holds its own run's row, and posts to the other's."""
    async with (
        watched(postgres_server, postgres_url) as witness,
        watched(postgres_server, postgres_url) as holder,
        asyncio.timeout(HANG_S),
    ):
        await set_database(witness, "deadlock_timeout = '50ms'")
        async with opened(postgres_url) as first, opened(postgres_url) as second:
            stores: tuple[PostgresStore, ...] = (first, second)
            writers = [await warmed_up(store) for store in stores]
            changes = tuple(PutRecord("gate", str(number), 0, 0) for number in range(2))
            await land(first, changes=changes)
            await holder.see("BEGIN")
            await holder.see("SELECT count(*) FROM (SELECT 1 FROM records FOR UPDATE) AS gates")
            sent = []
            for number, store in enumerate(stores):
                own, other = writers[number], writers[1 - number]
                entry, change = claim(store.node_id)
                gate = PutRecord("gate", str(number), 1, 1)
                message = Post(other.run_id, "signal", f"from {number}")
                append = own.append(entry, change=change, changes=[gate, message])
                sent.append(asyncio.create_task(outcome(store, append)))
                # It has its own row, and is held before it comes to the other's.
                await witness.until_waiting(lane(store, "journal"), "transactionid")
            await holder.see("COMMIT")
            assert await asyncio.gather(*sent) == [Outcome.LANDED] * 2
            assert await witness.messages(writers[0].run_id) == ["from 1"]
            assert await witness.messages(writers[1].run_id) == ["from 0"]
            for writer, store in zip(writers, stores, strict=True):
                await settled(witness, writer, store)
            assert has_logged(postgres_server, "deadlock detected")


async def settled(witness: Witness, writer: Writer, store: PostgresStore) -> None:
    """The claim is there, once."""
    assert await witness.entries(writer.run_id) == 2
    kind = "SELECT kind FROM journal WHERE run_id = $1 AND seq = 2"
    assert await witness.see(kind, writer.run_id) == Kind.CLAIMED
    run = await store.look.run(writer.run_id)
    assert run is not None
    assert (run.state, run.owner) == (RunState.RUNNING, store.node_id)


async def test_a_serialization_failure_is_tried_again(
    postgres_server: PostgresServer, postgres_url: str
) -> None:
    """Behind a pooler a session has the database's defaults, which may be stricter than ours."""
    async with (
        watched(postgres_server, postgres_url) as witness,
        watched(postgres_server, postgres_url) as holder,
        asyncio.timeout(HANG_S),
    ):
        await set_database(witness, "default_transaction_isolation = 'repeatable read'")
        async with opened(postgres_url, direct_url=f"{postgres_url}?sslmode=disable") as store:
            writer = await warmed_up(store)
            await holder.see("BEGIN")
            await holder.see("UPDATE runs SET priority = 7 WHERE run_id = $1", writer.run_id)
            sent = asyncio.create_task(post(store, "hello", run_id=writer.run_id))
            waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"
            await witness.until(waiting, is_value=1)
            await holder.see("COMMIT")
            await sent
            assert await witness.messages(writer.run_id) == ["hello"]
            assert has_logged(postgres_server, "could not serialize access")
        async with opened(postgres_url) as store:
            isolation = "SHOW transaction_isolation"
            levels = [
                await lane.run(lambda connection, _: connection.fetchval(isolation))
                for lane in store._lanes
            ]
            assert levels == ["read committed"] * 2


async def test_a_statement_that_an_operator_cancels_is_sent_again(
    postgres_server: PostgresServer, postgres_url: str
) -> None:
    async with (
        opened(postgres_url) as store,
        watched(postgres_server, postgres_url) as witness,
        watched(postgres_server, postgres_url) as holder,
        asyncio.timeout(HANG_S),
    ):
        writer = await warmed_up(store)
        await holder.see("BEGIN")
        await holder.see("SELECT 1 FROM runs WHERE run_id = $1 FOR UPDATE", writer.run_id)
        entry, change = claim(store.node_id)
        sent = asyncio.create_task(outcome(store, writer.append(entry, change=change)))
        for _ in range(3):
            await witness.until_waiting(lane(store, "journal"), "transactionid")
            cancelled = "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE "
            cancelled += "application_name = $1 AND wait_event = 'transactionid'"
            name = f"llm-orchestrator {lane(store, 'journal')}"
            assert await witness.see(cancelled, name)
            await witness.until_waiting(lane(store, "journal"), "ClientRead")
        await holder.see("COMMIT")
        assert await sent is Outcome.LANDED
        await settled(witness, writer, store)
