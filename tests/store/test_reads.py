"""Wake-ups, inboxes, lists, records and everything else that stands beside the journal."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from llm_orchestrator.model import Draft, Kind, Message, RunState, Workflow
from llm_orchestrator.store.base import (
    Consume,
    DropProgress,
    Expire,
    Mend,
    News,
    NodeState,
    Outcome,
    Post,
    PutProgress,
    PutRecord,
    PutVectors,
    Register,
    RunFilter,
    Store,
    Unregister,
    Wanted,
)
from llm_orchestrator.store.check import definition_digest
from llm_orchestrator.store.journal import decode, encode
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


async def test_parking_keeps_the_wake_up_of_a_message_that_it_has_not_seen(store: Store) -> None:
    blind, seeing = await accepted(store), await accepted(store)
    for writer in (blind, seeing):
        await land(store, changes=[Post(writer.run_id, "signal", "x")])
    await moved(store, blind, RunState.WAITING, wake_at=99, inbox_seen=0)
    await moved(store, seeing, RunState.WAITING, wake_at=99, inbox_seen=1)
    found = [await store.look.run(writer.run_id) for writer in (blind, seeing)]
    assert [run and run.wake_at for run in found] == [0, 99]


async def test_a_message_wakes_a_run_that_waits_and_nobody_else(store: Store) -> None:
    later = 1 << 62
    waiting, paused, delayed = [await accepted(store, new_run(wake_at=later)) for _ in range(3)]
    await moved(store, waiting, RunState.WAITING, wake_at=later)
    await moved(store, paused, RunState.PAUSED, wake_at=later)
    for writer in (waiting, paused, delayed):
        await land(store, changes=[Post(writer.run_id, "signal", "x")])
    runs = [await store.look.run(writer.run_id) for writer in (waiting, paused, delayed)]
    assert [run and run.wake_at for run in runs] == [0, later, later]
    assert [run and run.inbox_seq for run in runs] == [1, 1, 1]


async def test_a_sender_key_is_heard_once_even_after_it_was_consumed(store: Store) -> None:
    writer = await accepted(store)
    post = Post(writer.run_id, "signal", "paid", {"n": 1}, sender_key="mail-7")
    await land(store, changes=[post, post])
    await land(store, changes=[replace(post, payload={"n": 2})])
    inbox = await store.look.inbox(writer.run_id)
    assert inbox == [Message(writer.run_id, 1, "signal", "paid", {"n": 1}, "mail-7")]
    await land(store, writer.append(draft(), changes=[Consume(writer.run_id, (1,))]))
    await land(store, changes=[post])
    assert await store.look.inbox(writer.run_id) == []
    assert await store.look.inbox_seqs([writer.run_id]) == {writer.run_id: 1}


async def test_messages_without_a_key_all_count_and_keep_their_order(store: Store) -> None:
    writer = await accepted(store)
    for number in range(3):
        await land(store, changes=[Post(writer.run_id, "signal", "x", number)])
    assert [message.payload for message in await store.look.inbox(writer.run_id)] == [0, 1, 2]
    await land(store, writer.append(draft(), changes=[Consume(writer.run_id, (1, 3))]))
    assert [message.number for message in await store.look.inbox(writer.run_id)] == [2]


async def test_a_message_to_nobody_is_nothing(store: Store) -> None:
    receipt = await land(store, changes=[Post("nobody", "signal", "x")])
    assert not receipt.is_refused
    assert await store.look.inbox("nobody") == []
    assert await store.look.inbox_seqs(["nobody"]) == {}


@pytest.mark.parametrize(
    ("payload", "read"),
    [(None, None), (float("inf"), float("inf")), (b"x", "eA=="), ("\ud800", "\ud800")],
    ids=["nothing", "infinity", "bytes", "surrogate"],
)
async def test_a_message_of_anything_arrives(store: Store, payload: Any, read: Any) -> None:
    writer, other = await accepted(store), await accepted(store)
    post = Post(writer.run_id, "signal", "x", payload)
    receipt = await land(store, other.append(draft()), changes=[post])
    assert not receipt.is_refused
    assert [message.payload for message in await store.look.inbox(writer.run_id)] == [read]


async def test_runs_are_claimed_by_priority_then_age(store: Store, clock: HandClock) -> None:
    runs = [
        new_run(901, digest="cd" * 32),
        new_run(902, priority=5),
        new_run(903, wake_at=clock.now + 10),
        new_run(904, priority=5, wake_at=7, queue="other"),
        new_run(905),
        new_run(906),
    ]
    writers = [await accepted(store, run) for run in runs]
    entry, change = claim()
    await land(store, writers[4].append(entry, change=change))
    await moved(store, writers[5], RunState.PAUSED)

    async def due(limit: int = 10, **left_out: Any) -> list[int]:
        found = await store.pick("node-1", Wanted(limit, clock.now, **left_out))
        return [int(run.run_id[-3:]) for run in found]

    assert await due() == [902, 904, 901]
    assert await due(1) == [902]
    assert await due(full_queues=["default"]) == [904]
    assert await due(strange=["cd" * 32]) == [902, 904]
    assert await store.look.next_wake() == 0
    clock.now += 10
    assert await due() == [902, 904, 901, 903]


async def test_the_next_wake_up_is_the_earliest_of_runs_that_nobody_drives(store: Store) -> None:
    assert await store.look.next_wake() is None
    first, second = (
        await accepted(store, new_run(wake_at=50)),
        await accepted(store, new_run(wake_at=70)),
    )
    assert await store.look.next_wake() == 50
    entry, change = claim()
    await land(store, first.append(entry, change=change))
    assert await store.look.next_wake() == 70
    await moved(store, second, RunState.COMPLETED)
    assert await store.look.next_wake() is None


async def test_a_dead_owners_runs_are_found(store: Store) -> None:
    writers = [await accepted(store, new_run(priority=number)) for number in range(3)]
    for writer, owner in zip(writers, ("dead", "alive", "dead"), strict=True):
        entry, change = claim(owner)
        await land(store, writer.append(entry, change=change))
    members = await store.members()
    await members.join("alive", "here", None)
    assert await store.adopt("alive", 9) == [writers[2].run_id, writers[0].run_id]
    assert await store.adopt("alive", 1) == [writers[2].run_id]
    assert await store.adopt("alive", 9, [writers[2].run_id]) == [writers[0].run_id]
    await members.leave("alive", NodeState.LEFT)
    assert len(await store.adopt("alive", 9)) == 3
    await members.close()


async def test_runs_are_listed_by_every_filter_and_in_pages(store: Store) -> None:
    labels = [{}, {"team": "blau", "ü": "ß"}, {'a"team': "blau"}, {"team": "grün"}]
    writers = [
        await accepted(store, new_run(500 + number, labels=label, queue=f"q{number % 2}"))
        for number, label in enumerate(labels)
    ]
    child = await accepted(store, new_run(510, parent_run_id=writers[0].run_id, workflow="other"))
    await moved(store, writers[3], RunState.PAUSED)

    async def found(**wanted: Any) -> list[int]:
        return [int(run.run_id[-3:]) for run in await store.look.runs(RunFilter(**wanted))]

    assert await found() == [510, 503, 502, 501, 500]
    assert await found(limit=2) == [510, 503]
    assert await found(limit=2, before=writers[3].run_id) == [502, 501]
    assert await found(states=(RunState.PAUSED, RunState.FAILED)) == [503]
    assert await found(workflow="other") == [510]
    assert await found(parent_run_id=writers[0].run_id) == [int(child.run_id[-3:])]
    assert await found(queue="q1") == [503, 501]
    assert await found(label=("team", "blau")) == [501]
    assert await found(label=("team", "grün")) == [503]
    assert await found(label=("ü", "ß")) == [501]
    assert await found(label=('a"team', "blau")) == [502]
    assert await store.look.run_ids() == sorted(writer.run_id for writer in (*writers, child))


async def test_records_change_only_from_the_version_that_was_seen(store: Store) -> None:
    async def put(value: Any, version: int) -> bool:
        return not (await land(store, changes=[PutRecord("kind", "k", value, version)])).is_refused

    assert await store.shelf.record("kind", "k") == (None, 0)
    assert await put({"n": 1}, 0)
    assert not await put({"n": 2}, 0)
    assert not await put({"n": 2}, 7)
    assert await put({"n": 2}, 1)
    assert await store.shelf.record("kind", "k") == ({"n": 2}, 2)
    assert await store.shelf.records("kind") == {"k": {"n": 2}}
    assert not await put(None, 1)
    assert await put(None, 2)
    assert await store.shelf.record("kind", "k") == (None, 0)
    assert not await put(None, 0)
    assert await put("again", 0)


async def test_changes_without_an_append_land_together_or_not_at_all(store: Store) -> None:
    writer = await accepted(store)
    changes = [PutRecord("kind", "a", 1, 0), PutRecord("kind", "b", 1, 5)]
    receipt = await land(store, writer.append(draft()), changes=changes)
    assert receipt.is_refused
    assert receipt.refused == {}
    assert await store.shelf.records("kind") == {}
    assert len(await store.look.stored(writer.run_id)) == 2


async def test_the_pieces_of_the_newest_attempt_are_joined(store: Store) -> None:
    writer = await accepted(store)
    pieces = [
        PutProgress(writer.run_id, "s", 1, 0, "old"),
        PutProgress(writer.run_id, "s", 2, 0, "he", {"id": 1}),
        PutProgress(writer.run_id, "s", 2, 1, "llo"),
        PutProgress(writer.run_id, "t", 9, 0, "other"),
    ]
    await land(store, writer.append(changes=pieces))
    kept = await store.look.progress(writer.run_id, "s")
    assert kept is not None
    assert (kept.attempt, kept.text, kept.handle) == (2, "hello", {"id": 1})
    await land(store, writer.append(draft(), changes=[DropProgress(writer.run_id, "s")]))
    assert await store.look.progress(writer.run_id, "s") is None
    assert await store.look.progress(writer.run_id, "t") is not None


async def test_vectors_are_replaced_by_id_and_kept_apart_by_namespace(store: Store) -> None:
    await land(store, changes=[PutVectors("i", "a", (("1", b"x", b"{}"), ("2", b"y", b"{}")))])
    await land(store, changes=[PutVectors("i", "a", (("1", b"z", b'{"n":1}'),))])
    await land(store, changes=[PutVectors("i", "b", (("1", b"w", b"{}"),))])
    assert [tuple(row) for row in await store.shelf.vectors("i", "a")] == [
        ("1", b"z", b'{"n":1}'),
        ("2", b"y", b"{}"),
    ]
    assert await store.shelf.vectors("other", "a") == []


async def test_the_newest_definition_is_found_and_an_old_one_by_its_version(store: Store) -> None:
    flows = []
    for version in ("1", "2"):
        definition = f'{{"v":{version}}}'.encode()
        flow = Workflow("f", version, definition_digest(definition), definition, int(version))
        flows.append(flow)
        await land(store, changes=[Register(flow)])
        await land(store, changes=[Register(replace(flow, created_at=99))])
    assert await store.shelf.workflow("f") == flows[1]
    assert await store.shelf.workflow("f", "1") == flows[0]
    assert await store.shelf.workflow("f", digest=flows[0].digest) == flows[0]
    assert await store.shelf.workflow("g") is None
    assert await store.shelf.workflows() == flows


async def test_finished_runs_expire_by_age_and_by_count(store: Store, clock: HandClock) -> None:
    writers = [await accepted(store, new_run(700 + number)) for number in range(5)]
    for writer in writers[:4]:
        clock.now += 10
        await moved(store, writer, RunState.COMPLETED)
    start = clock.now - 30

    async def due(before: int = 0, keep: int = 1 << 60, limit: int = 9) -> list[int]:
        found = await store.look.expirable(finished_before=before, keep=keep, limit=limit)
        return [int(run.run_id[-3:]) for run in found]

    assert await due() == []
    assert await due(before=start) == []
    assert await due(before=start + 11) == [700, 701]
    assert await due(keep=3) == [700]
    assert await due(keep=1) == [700, 701, 702]
    assert await due(keep=4) == []
    assert await due(keep=1, limit=2) == [700, 701]


async def test_an_expired_run_is_gone_and_one_that_is_not_finished_stays(
    store: Store, clock: HandClock
) -> None:
    gone, stays = await accepted(store), await accepted(store)
    for writer in (gone, stays):
        await land(store, changes=[Post(writer.run_id, "signal", "x")])
        await moved(store, writer, RunState.COMPLETED)
    await moved(store, stays, RunState.PENDING)  # taken up again
    await land(store, changes=[Expire((gone.run_id, stays.run_id, "nobody"))])
    assert await store.look.run_ids() == [stays.run_id]
    assert await store.look.inbox(gone.run_id) == []
    assert await store.look.load([gone.run_id]) == {}
    assert len(await store.look.stored(stays.run_id)) == 3


async def test_a_row_is_put_back_as_the_journal_says(store: Store, clock: HandClock) -> None:
    run = new_run(labels={"a": "b"}, input={"n": [1]}, wake_at=5)
    writer = await accepted(store, run)
    await land(store, changes=[Post(writer.run_id, "signal", "x")])
    await moved(store, writer, RunState.FAILED, error=encode({"value": {"message": "no"}}))
    right = await store.look.row(writer.run_id)
    assert right is not None
    await moved(store, writer, RunState.PENDING)
    now = await store.look.row(writer.run_id)
    assert now is not None
    wrong = right._replace(head_seq=now.head_seq, head_digest=now.head_digest)
    receipt = await land(store, changes=[Mend(writer.run_id, row=wrong)])
    assert not receipt.is_refused
    assert await store.look.row(writer.run_id) == wrong
    assert await store.look.inbox_seqs([writer.run_id]) == {writer.run_id: 1}


async def test_a_row_is_not_put_back_once_the_journal_has_moved(store: Store) -> None:
    writer = await accepted(store)
    await moved(store, writer, RunState.FAILED)
    old = await store.look.row(writer.run_id)
    await moved(store, writer, RunState.PENDING)
    receipt = await land(store, changes=[Mend(writer.run_id, row=old)])
    assert receipt.is_refused
    run = await store.look.run(writer.run_id)
    assert run is not None
    assert run.state is RunState.PENDING


async def test_an_entry_is_put_back_as_it_was(store: Store) -> None:
    writer = await accepted(store)
    await land(store, writer.append(draft(step="a"), draft(step="b")))
    stored = await store.look.stored(writer.run_id)
    edited = stored[1]._replace(payload=encode({"result": "edited"}), epoch=7)
    await land(store, changes=[Mend(writer.run_id, (edited,))])
    journal = (await store.look.load([writer.run_id]))[writer.run_id]
    assert [flaw.seq for flaw in journal.flaws] == [2]
    await land(store, changes=[Mend(writer.run_id, (stored[1],))])
    journal = (await store.look.load([writer.run_id]))[writer.run_id]
    assert journal.flaws == ()
    assert decode(journal.entries[1].payload) == {"result": "a"}


async def test_a_row_without_a_journal_is_damage_and_none_is_nothing(store: Store) -> None:
    stray = new_run()
    _, append = accepting(stray)
    await land(store, append._replace(entries=()))
    journals = await store.look.load([stray.run_id, "nobody"])
    assert list(journals) == [stray.run_id]
    assert [flaw.seq for flaw in journals[stray.run_id].flaws] == [1]
    assert await store.look.unfinished() == [stray.run_id]


async def test_a_journal_without_its_tail_is_found_by_its_anchor(store: Store) -> None:
    writer = await accepted(store)
    entry, change = state(RunState.PAUSED)
    ahead = change._replace(wake_at=1)
    append = writer.append(entry, change=ahead)
    assert await outcome(store, append) is Outcome.LANDED
    row = await store.look.row(writer.run_id)
    assert row is not None
    assert (row.head_seq, row.head_digest) == (2, writer.digest)
    journal = (await store.look.load([writer.run_id]))[writer.run_id]
    assert journal.flaws == ()


async def test_a_whole_store_has_a_whole_structure(store: Store) -> None:
    writer = await accepted(store)
    await land(store, writer.append(Draft(Kind.SIGNAL, "s", 0, encode({"number": 1}))))
    assert await store.look.structure() == []


def stored_workflow(name: str, version: str) -> Workflow:
    definition = encode({"name": name, "version": version})
    return Workflow(name, version, definition_digest(definition), definition)


async def test_a_workflow_goes_only_while_no_run_refers_to_it(store: Store) -> None:
    flows = [stored_workflow("a", "1"), stored_workflow("a", "2"), stored_workflow("b", "1")]
    await land(store, changes=[Register(flow) for flow in flows])
    run = replace(new_run(), workflow="a", version="1", digest=flows[0].digest)
    writer = await accepted(store, run)
    await moved(store, writer, RunState.COMPLETED)
    for change in (Unregister("a", "1"), Unregister("a"), Unregister("a", "3"), Unregister("c")):
        assert (await land(store, changes=[change])).is_refused, change
    assert not (await land(store, changes=[Unregister("a", "2")])).is_refused
    assert not (await land(store, changes=[Unregister("b")])).is_refused
    left = [(flow.name, flow.version) for flow in await store.shelf.workflows()]
    assert left == [("a", "1")]
    await land(store, changes=[Expire((run.run_id,))])
    assert not (await land(store, changes=[Unregister("a")])).is_refused
    assert await store.shelf.workflow("a") is None


async def test_a_refused_removal_takes_the_batchs_other_changes_with_it(store: Store) -> None:
    await land(store, changes=[PutRecord("k", "a", 1, 0)])
    receipt = await land(store, changes=[PutRecord("k", "a", None, 1), Unregister("a")])
    assert receipt.is_refused
    assert await store.shelf.record("k", "a") == (1, 1)


async def test_definitions_that_come_and_go_are_news(store: Store) -> None:
    heard: list[News] = []
    store.on_news(heard.append)
    await land(store, changes=[Register(stored_workflow("a", "1"))])
    await land(store, changes=[Unregister("a")])
    assert [news.is_workflow for news in heard] == [True, True]


async def test_runs_are_listed_by_the_time_of_their_acceptance(
    store: Store, clock: HandClock
) -> None:
    times = []
    for _ in range(4):
        clock.now += 1_000_000
        writer = await accepted(store)
        times.append((clock.now, writer.run_id))
    middle = RunFilter(since=times[1][0], until=times[3][0])
    assert [run.run_id for run in await store.look.runs(middle)] == [times[2][1], times[1][1]]
    assert await store.look.runs(RunFilter(until=times[0][0])) == []
    assert await store.look.runs(RunFilter(since=times[3][0] + 1)) == []
