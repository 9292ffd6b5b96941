"""Runs age out whole, a few at a time, and nobody else notices."""

from __future__ import annotations

from llm_orchestrator.engine import retention
from llm_orchestrator.engine.acceptance import KEY_RECORD, key_record
from llm_orchestrator.engine.retention import Retention, expire
from llm_orchestrator.model import RunState
from llm_orchestrator.store.base import Batch, Store, TrimCommits
from llm_orchestrator.store.sqlite import SQLiteStore
from tests.store.support import (
    HandClock,
    Writer,
    accepted,
    accepting,
    batches_of,
    land,
    moved,
    new_run,
)

DAY_US = 86_400_000_000


async def ended(store: Store, clock: HandClock, count: int, *, first: int) -> list[str]:
    """Runs that end one second after the other."""
    run_ids = []
    for number in range(first, first + count):
        writer = await accepted(store, new_run(number))
        clock.now += 1_000_000
        await moved(store, writer, RunState.COMPLETED)
        run_ids.append(writer.run_id)
    return run_ids


async def test_without_a_policy_everything_stays(store: Store, clock: HandClock) -> None:
    run_ids = await ended(store, clock, 3, first=100)
    clock.now += 1_000 * DAY_US
    assert await expire(store, Retention(), clock) == 0
    assert await store.look.run_ids() == run_ids


async def test_runs_go_by_age_in_batches(store: Store, clock: HandClock) -> None:
    old = await ended(store, clock, 120, first=1_000)
    clock.now += 2 * DAY_US
    young = await ended(store, clock, 3, first=2_000)
    batches = batches_of(store)
    assert await expire(store, Retention(days=1), clock) == len(old)
    assert await store.look.run_ids() == young
    assert max(len(runs_of(batch)) for batch in batches) == retention.BATCH_RUNS
    assert await expire(store, Retention(days=1), clock) == 0


def runs_of(batch: Batch) -> list[str]:
    return [run for change in batch.changes for run in getattr(change, "run_ids", ())]


async def test_the_newest_runs_stay_by_count(store: Store, clock: HandClock) -> None:
    run_ids = await ended(store, clock, 10, first=100)
    assert await expire(store, Retention(runs=4), clock) == 6
    assert await store.look.run_ids() == run_ids[6:]


async def test_age_and_count_both_count(store: Store, clock: HandClock) -> None:
    run_ids = await ended(store, clock, 4, first=100)
    clock.now += 2 * DAY_US
    run_ids += await ended(store, clock, 4, first=200)
    assert await expire(store, Retention(days=1, runs=100), clock) == 4
    assert await expire(store, Retention(days=100, runs=1), clock) == 3
    assert await store.look.run_ids() == run_ids[7:]


async def test_runs_that_are_not_finished_never_go(store: Store, clock: HandClock) -> None:
    states = (RunState.RUNNING, RunState.WAITING, RunState.PAUSED)
    writers = [await accepted(store) for _ in states]
    for writer, state in zip(writers, states, strict=True):
        await moved(store, writer, state)
    pending = await accepted(store)
    clock.now += 1_000 * DAY_US
    assert await expire(store, Retention(days=1, runs=1), clock) == 0
    assert len(await store.look.run_ids()) == 4
    assert pending.run_id in await store.look.run_ids()


async def test_an_idempotency_key_goes_with_its_run_and_only_with_it(
    store: Store, clock: HandClock
) -> None:
    writers: list[Writer] = []
    for key in ("old", "young"):
        run = new_run(idempotency_key=key)
        writer, append = accepting(run, changes=[key_record(run)])
        await land(store, append)
        writers.append(writer)
    await moved(store, writers[0], RunState.COMPLETED)
    clock.now += 2 * DAY_US
    await moved(store, writers[1], RunState.COMPLETED)
    assert await expire(store, Retention(days=1), clock) == 1
    assert set(await store.shelf.records(KEY_RECORD)) == {"flow/young"}
    _, append = accepting(run := new_run(idempotency_key="old"), changes=[key_record(run)])
    assert (await land(store, append)).refused == {}


async def test_the_count_of_commits_is_trimmed_without_a_gap(
    store: Store, clock: HandClock
) -> None:
    for _ in range(30):
        await store.commit(Batch())
    await store.commit(Batch(changes=[TrimCommits(keep=5, limit=10)]))
    assert await store.look.structure() == []
    if isinstance(store, SQLiteStore):
        rows = await store._reader.read(
            lambda database: database.execute("SELECT number FROM commits").fetchall()
        )
        assert [row[0] for row in rows] == list(range(11, 32))
