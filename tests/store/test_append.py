"""The rule of the journal: compare and append, each run for itself, the others untouched."""

from __future__ import annotations

import asyncio
import random

import pytest

from llm_orchestrator.model import Draft, Kind, RunState
from llm_orchestrator.store.base import (
    Append,
    Batch,
    News,
    Outcome,
    Post,
    PutBlob,
    PutProgress,
    PutRecord,
    StateChange,
    Store,
)
from llm_orchestrator.store.journal import blob_reference, encode
from tests.store.support import (
    HandClock,
    accepted,
    accepting,
    claim,
    draft,
    land,
    moved,
    new_run,
    outcome,
    state,
)


async def test_an_accepted_run_has_a_row_and_an_entry(store: Store, clock: HandClock) -> None:
    run = new_run(labels={"team": "blue"}, queue="slow", priority=3, input={"n": 1})
    await accepted(store, run)
    row = await store.look.run(run.run_id)
    assert row is not None
    assert (row.state, row.queue, row.priority, row.labels) == (
        RunState.PENDING,
        "slow",
        3,
        {"team": "blue"},
    )
    assert (row.created_at, row.started_at, row.finished_at) == (clock.now, None, None)
    journal = (await store.look.load([run.run_id, "unknown"]))[run.run_id]
    assert [entry.kind for entry in journal.entries] == [Kind.ACCEPTED]
    assert journal.flaws == ()
    stored = await store.look.row(run.run_id)
    assert stored is not None
    assert stored.accept == run


async def test_entries_land_in_order_and_a_state_change_lands_with_its_entry(store: Store) -> None:
    writer = await accepted(store)
    entry, change = claim()
    assert await outcome(store, writer.append(entry, change=change)) is Outcome.LANDED
    assert await outcome(store, writer.append(draft(step="a"), draft(step="b"))) is Outcome.LANDED
    entry, change = state(RunState.COMPLETED, output=encode({"value": [1, None]}))
    assert await outcome(store, writer.append(entry, change=change)) is Outcome.LANDED
    journal = (await store.look.load([writer.run_id]))[writer.run_id]
    assert [entry.seq for entry in journal.entries] == [1, 2, 3, 4, 5]
    assert journal.flaws == ()
    run = await store.look.run(writer.run_id)
    assert run is not None
    assert (run.state, run.owner, run.epoch) == (RunState.COMPLETED, None, writer.epoch)
    assert run.started_at is not None
    assert run.finished_at is not None
    row = await store.look.row(writer.run_id)
    assert row is not None
    assert row.change.output == encode({"value": [1, None]})


async def test_a_stale_owner_is_fenced_and_the_rest_of_the_batch_lands(store: Store) -> None:
    stale, other = await accepted(store), await accepted(store)
    owner = stale.copy()
    entry, change = claim("new-owner")
    assert await outcome(store, owner.append(entry, change=change)) is Outcome.LANDED
    before = await store.look.run(stale.run_id)
    entry, change = state(RunState.COMPLETED)
    receipt = await land(store, stale.append(entry, change=change), other.append(draft()))
    assert receipt.refused == {stale.run_id: Outcome.FENCED}
    assert await store.look.run(stale.run_id) == before
    journals = await store.look.load([stale.run_id, other.run_id])
    assert len(journals[stale.run_id].entries) == 2
    assert len(journals[other.run_id].entries) == 2


async def test_a_stale_owner_with_two_entries_lands_neither(store: Store) -> None:
    stale = await accepted(store)
    owner = stale.copy()
    assert await outcome(store, owner.append(draft(step="new"))) is Outcome.LANDED
    assert await outcome(store, stale.append(draft(), draft())) is Outcome.FENCED
    assert [entry.step for entry in await store.look.stored(stale.run_id)] == ["", "new"]


async def test_of_two_claims_exactly_one_lands(store: Store) -> None:
    first = await accepted(store)
    second = first.copy()
    appends = []
    for writer, owner in ((first, "a"), (second, "b")):
        writer.epoch += 1
        entry, change = claim(owner)
        appends.append(writer.append(entry, change=change))
    outcomes = await asyncio.gather(*(outcome(store, append) for append in appends))
    assert sorted(outcomes) == [Outcome.FENCED, Outcome.LANDED]
    run = await store.look.run(first.run_id)
    assert run is not None
    assert run.owner == ("a" if outcomes[0] is Outcome.LANDED else "b")


async def test_the_same_bytes_again_have_landed(store: Store) -> None:
    writer = await accepted(store)
    entry, change = claim()
    post = Post(writer.run_id, "signal", "once")
    append = writer.append(entry, draft(), change=change, changes=[post])
    assert await outcome(store, append) is Outcome.LANDED
    assert await outcome(store, append) is Outcome.LANDED
    assert len(await store.look.stored(writer.run_id)) == 3
    assert len(await store.look.inbox(writer.run_id)) == 1


async def test_the_same_acceptance_again_has_landed_another_one_conflicts(store: Store) -> None:
    run = new_run()
    _, append = accepting(run)
    assert await outcome(store, append) is Outcome.LANDED
    assert await outcome(store, append) is Outcome.LANDED
    _, other = accepting(new_run(int(run.run_id[-12:]), workflow="other"))
    assert await outcome(store, other) is Outcome.CONFLICT


async def test_a_gap_is_refused(store: Store) -> None:
    writer = await accepted(store)
    writer.append(draft())  # never sent
    assert await outcome(store, writer.append(draft())) is Outcome.DAMAGED
    assert len(await store.look.stored(writer.run_id)) == 1


async def test_a_gap_inside_an_append_is_refused(store: Store) -> None:
    writer = await accepted(store)
    append = writer.append(draft(), draft())
    gap = append._replace(entries=append.entries[1:])
    assert await outcome(store, gap) is Outcome.UNFIT
    foreign = append._replace(
        entries=tuple(entry._replace(run_id="other") for entry in append.entries)
    )
    assert await outcome(store, foreign) is Outcome.UNFIT
    assert len(await store.look.stored(writer.run_id)) == 1


async def test_a_writer_that_knows_another_predecessor_is_refused(store: Store) -> None:
    writer = await accepted(store)
    stranger = writer.copy()
    stranger.digest = bytes(32)
    assert await outcome(store, stranger.append(draft())) is Outcome.DAMAGED
    assert len(await store.look.stored(writer.run_id)) == 1


async def test_an_idempotency_key_refuses_just_its_own_run(store: Store) -> None:
    appends: list[Append] = []
    for run in (new_run(), new_run(), new_run()):
        record = PutRecord("key", "same", {"run_id": run.run_id}, 0, run.run_id)
        appends.append(accepting(run, changes=[record] if len(appends) != 1 else ())[1])
    receipt = await land(store, *appends)
    assert receipt.refused == {appends[2].run_id: Outcome.CONFLICT}
    assert await store.look.run(appends[1].run_id) is not None
    assert await store.look.run(appends[2].run_id) is None
    assert await store.look.stored(appends[2].run_id) == []
    assert await store.shelf.record("key", "same") == ({"run_id": appends[0].run_id}, 1)


async def test_a_message_to_another_run_falls_with_the_append_that_sends_it(store: Store) -> None:
    parent, child = await accepted(store), await accepted(store)
    winner = child.copy()
    assert await outcome(store, winner.append(draft())) is Outcome.LANDED
    news = Post(parent.run_id, "signal", "child-ended")
    entry, change = state(RunState.COMPLETED)
    receipt = await land(
        store, child.append(entry, change=change, changes=[news]), parent.append(draft())
    )
    assert receipt.refused == {child.run_id: Outcome.FENCED}
    assert await store.look.inbox(parent.run_id) == []


async def test_a_message_to_another_run_lands_though_that_run_is_refused(store: Store) -> None:
    parent, child = await accepted(store), await accepted(store)
    stale = parent.copy()
    assert await outcome(store, parent.append(draft())) is Outcome.LANDED
    news = Post(parent.run_id, "signal", "child-ended")
    receipt = await land(
        store, child.append(draft(), changes=[news]), stale.append(draft(step="late"))
    )
    assert receipt.refused == {stale.run_id: Outcome.FENCED}
    assert [message.name for message in await store.look.inbox(parent.run_id)] == ["child-ended"]


async def test_a_stale_owner_leaves_no_piece_of_an_answer(store: Store) -> None:
    stale = await accepted(store)
    owner = stale.copy()
    piece = PutProgress(stale.run_id, "a", 1, 0, "hello")
    assert await outcome(store, stale.append(changes=[piece])) is Outcome.LANDED
    assert await outcome(store, owner.append(draft(Kind.INTENT))) is Outcome.LANDED
    late = PutProgress(stale.run_id, "a", 1, 1, " world")
    assert await outcome(store, stale.append(changes=[late])) is Outcome.FENCED
    kept = await store.look.progress(stale.run_id, "a")
    assert kept is not None
    assert kept.text == "hello"


@pytest.mark.parametrize(
    "bad",
    [
        Draft(Kind.STEP_FINISHED, "lone \ud800 surrogate", 1, encode({"result": 1})),
        Draft(Kind.STEP_FINISHED, "a", 1 << 31, encode({"result": 1})),
    ],
    ids=["text", "number"],
)
async def test_content_that_no_column_takes_leaves_the_other_runs_alone(
    store: Store, bad: Draft
) -> None:
    good, guilty = await accepted(store), await accepted(store)
    append = guilty.append(bad)
    if bad.attempt > 1:
        too_big = [entry._replace(attempt=1 << 70) for entry in append.entries]
        append = append._replace(entries=too_big)
    receipt = await land(store, good.append(draft()), append)
    assert receipt.refused == {guilty.run_id: Outcome.UNFIT}
    assert len(await store.look.stored(good.run_id)) == 2
    assert len(await store.look.stored(guilty.run_id)) == 1


async def test_a_wake_up_beyond_64_bits_refuses_just_its_own_run(store: Store) -> None:
    good, guilty = await accepted(store), await accepted(store)
    entry, change = state(RunState.WAITING, wake_at=1 << 64)
    receipt = await land(store, guilty.append(entry, change=change), good.append(draft()))
    assert receipt.refused == {guilty.run_id: Outcome.UNFIT}
    run = await store.look.run(guilty.run_id)
    assert run is not None
    assert run.state is RunState.PENDING


async def test_payloads_beyond_a_mebibyte_are_kept_in_blobs(store: Store) -> None:
    writer = await accepted(store)
    payload = encode({"result": random.Random(7).randbytes(1 << 20).hex()})
    assert len(payload) > 1 << 20
    reference = blob_reference(payload)
    blob = PutBlob(writer.run_id, reference[1:], payload)
    big = Draft(Kind.STEP_FINISHED, "big", 1, reference)
    assert await outcome(store, writer.append(big, changes=[blob])) is Outcome.LANDED
    [stored] = [entry for entry in await store.look.stored(writer.run_id) if entry.step == "big"]
    assert len(stored.payload) == 33
    journal = (await store.look.load([writer.run_id]))[writer.run_id]
    assert journal.flaws == ()
    assert journal.entries[-1].payload == payload


async def test_an_entry_without_its_blob_is_a_flaw(store: Store) -> None:
    writer = await accepted(store)
    reference = blob_reference(b"somewhere else")
    lost = Draft(Kind.STEP_FINISHED, "big", 1, reference)
    assert await outcome(store, writer.append(lost)) is Outcome.LANDED
    journal = (await store.look.load([writer.run_id]))[writer.run_id]
    assert [flaw.seq for flaw in journal.flaws] == [2]
    assert [entry.seq for entry in journal.entries] == [1]


async def test_everybody_is_told_of_a_commit_of_this_process(store: Store) -> None:
    told: list[News] = []
    store.on_news(told.append)
    writer = await accepted(store)
    post = Post(writer.run_id, "signal", "x")
    await land(store, writer.append(draft()))
    await land(store, writer.append(draft(), changes=[post]))
    assert told == [News(is_due=True), News(posted=frozenset([writer.run_id]))]


async def test_a_change_of_a_run_whose_row_is_gone_is_damage(store: Store) -> None:
    writer = await accepted(store)
    orphan = new_run()
    orphan_writer, append = accepting(orphan)
    await land(store, append._replace(accept=None))
    entry, change = claim()
    assert await outcome(store, orphan_writer.append(entry, change=change)) is Outcome.DAMAGED
    await moved(store, writer, RunState.PAUSED, reason="operator")


async def test_an_empty_batch_is_nothing(store: Store) -> None:
    receipt = await store.commit(Batch())
    assert (receipt.refused, receipt.is_refused) == ({}, False)


def test_a_state_change_is_all_that_a_row_takes() -> None:
    assert StateChange("running").owner is None
