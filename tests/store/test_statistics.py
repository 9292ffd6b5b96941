"""Counting: what metrics and people are told of a store."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from llm_orchestrator.model import MICROSECONDS, Draft, RunState
from llm_orchestrator.store.base import Consume, Outcome, Post, StateChange, Store
from llm_orchestrator.store.postgres import PostgresStore
from llm_orchestrator.store.statistics import Counts, Queue, RunCount, Statistics
from tests.store.support import (
    HandClock,
    Writer,
    accepted,
    claim,
    draft,
    land,
    moved,
    new_run,
    outcome,
    state,
)

LATER = 1 << 60


@pytest.fixture
def counts(store: Store) -> Counts:
    found: Counts = store.counts  # type: ignore[attr-defined]
    return found


async def claimed(store: Store, **values: Any) -> Writer:
    writer = await accepted(store, new_run(**values))
    entry, change = claim("node-1")
    assert await outcome(store, writer.append(entry, change=change)) is Outcome.LANDED
    return writer


async def append_now(
    store: Store, writer: Writer, entry: Draft, change: StateChange | None, clock: HandClock
) -> None:
    append = writer.append(entry, change=change)
    entries = [each._replace(recorded_at=clock.now) for each in append.entries]
    assert await outcome(store, append._replace(entries=entries)) is Outcome.LANDED


async def test_an_empty_store_counts_nothing(counts: Counts) -> None:
    assert await counts.census() == []
    found = await counts.statistics(1, stalled_before=1)
    assert (found.queues, found.stalled, found.waiting) == ([], 0, 0)


async def test_every_run_is_counted_by_state_and_workflow(store: Store, counts: Counts) -> None:
    for _ in range(2):
        await accepted(store, replace(new_run(), workflow="b"))
    first = await accepted(store, replace(new_run(), workflow="a"))
    await moved(store, first, RunState.COMPLETED)
    await claimed(store, workflow="a")
    assert await counts.census() == [
        RunCount("pending", "b", 2),
        RunCount("completed", "a", 1),
        RunCount("running", "a", 1),
    ]


async def test_only_what_is_due_and_driven_by_nobody_is_in_a_queue(
    store: Store, counts: Counts, clock: HandClock
) -> None:
    now = clock.now
    await accepted(store, new_run(queue="q"))
    await accepted(store, new_run(queue="q", wake_at=now + 1))
    await claimed(store, queue="q")
    paused = await accepted(store, new_run(queue="q"))
    await moved(store, paused, RunState.PAUSED)
    await accepted(store, new_run(queue="other"))
    await accepted(store, new_run(queue="other"))
    found = await counts.statistics(now, stalled_before=0)
    assert found.queues == [Queue("other", 2, now), Queue("q", 1, now)]
    assert found.waiting == 3
    later = await counts.statistics(now + 1, stalled_before=0)
    assert later.waiting == 4


async def test_a_run_is_due_since_its_own_time_or_since_its_acceptance(
    store: Store, counts: Counts, clock: HandClock
) -> None:
    begun = clock.now
    await accepted(store, new_run(queue="timed", wake_at=begun + 50))
    await accepted(store, new_run(queue="late", wake_at=begun - 50))
    found = await counts.statistics(begun + 100, stalled_before=0)
    assert {queue.name: queue.since for queue in found.queues} == {
        "timed": begun + 50,
        "late": begun,
    }


async def test_a_run_that_was_let_go_is_due_since_then(
    store: Store, counts: Counts, clock: HandClock
) -> None:
    writer = await claimed(store)
    clock.now += 7 * MICROSECONDS
    await append_now(store, writer, *state(RunState.PENDING), clock)
    (queue,) = (await counts.statistics(clock.now, stalled_before=0)).queues
    assert queue.since == clock.now


async def test_a_message_makes_a_waiting_run_due_since_the_first_that_nobody_took(
    store: Store, counts: Counts, clock: HandClock
) -> None:
    writer = await claimed(store)
    await moved(store, writer, RunState.WAITING, wake_at=LATER)
    assert (await counts.statistics(clock.now, stalled_before=0)).waiting == 0
    times = []
    for number in range(3):
        clock.now += MICROSECONDS
        times.append(clock.now)
        await land(store, changes=[Post(writer.run_id, "signal", f"s{number}")])
    await land(store, changes=[Consume(writer.run_id, (1,))])
    (queue,) = (await counts.statistics(clock.now, stalled_before=0)).queues
    assert queue.since == times[1]


async def test_driven_runs_stall_when_no_entry_comes(
    store: Store, counts: Counts, clock: HandClock
) -> None:
    begun = clock.now
    await claimed(store)
    moving = await claimed(store)
    await accepted(store)
    clock.now += 60 * MICROSECONDS
    await append_now(store, moving, draft(), None, clock)
    assert (await counts.statistics(clock.now, stalled_before=begun)).stalled == 0
    assert (await counts.statistics(clock.now, stalled_before=begun + 1)).stalled == 1
    assert (await counts.statistics(clock.now, stalled_before=clock.now + 1)).stalled == 2


async def test_only_a_server_speaks_of_standbys(store: Store, counts: Counts) -> None:
    found: Statistics = await counts.statistics(1, stalled_before=0)
    assert found.standbys == ([] if isinstance(store, PostgresStore) else None)
