"""Group commit: order per run, one state change per run and batch, nothing lands behind a hole."""

from __future__ import annotations

import asyncio
import random

import pytest

from llm_orchestrator.errors import Fenced, Refused, StoreDamaged, StoreError, StoreFull
from llm_orchestrator.model import Draft, Kind, NewRun
from llm_orchestrator.store import writer as writing
from llm_orchestrator.store.base import (
    Append,
    Batch,
    DropProgress,
    Outcome,
    PutBlob,
    Receipt,
    StateChange,
)
from llm_orchestrator.store.journal import GENESIS, chain, encode
from llm_orchestrator.store.writer import GroupWriter, Head, Ticket, WriterCore
from tests.store.support import HandClock

RUNNING = StateChange("running")


def ticket(
    head: Head,
    *steps: str,
    change: StateChange | None = None,
    changes: tuple[DropProgress, ...] = (),
    payload: bytes = encode({}),
) -> Ticket:
    drafts = [Draft(Kind.STEP_FINISHED, step, 1, payload) for step in steps]
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    return Ticket(head, drafts, future=future, change=change, accept=None, changes=changes)


def core(*tickets: Ticket) -> WriterCore:
    queue = WriterCore()
    queue.queue.extend(tickets)
    return queue


def steps(append: Append) -> list[str]:
    return [entry.step for entry in append.entries]


async def test_a_runs_entries_keep_their_order_and_are_chained_across_tickets() -> None:
    one, two = Head("one", epoch=5), Head("two", seq=7, digest=b"x" * 32)
    writer = core(ticket(one, "a"), ticket(two, "x"), ticket(one, "b", "c"))
    batch, taken = writer.next_batch(123)
    assert [(append.run_id, steps(append)) for append in batch.appends] == [
        ("one", ["a", "b", "c"]),
        ("two", ["x"]),
    ]
    first, second = batch.appends
    assert (first.prev_seq, first.prev_digest) == (0, GENESIS)
    assert (second.prev_seq, second.prev_digest) == (7, b"x" * 32)
    previous = GENESIS
    for seq, entry in enumerate(first.entries, 1):
        assert (entry.seq, entry.epoch, entry.recorded_at) == (seq, 5, 123)
        assert entry.digest == chain(previous, entry)
        previous = entry.digest
    assert (one.seq, two.seq) == (0, 7), "heads move when the commit has returned"
    writer.settle(batch, taken, Receipt())
    assert (one.seq, one.digest, two.seq) == (3, previous, 8)
    assert all(ticket.future.done() for ticket in taken)


async def test_a_run_changes_its_state_once_per_batch() -> None:
    one, two = Head("one"), Head("two")
    writer = core(
        ticket(one, "a", change=RUNNING),
        ticket(two, "x"),
        ticket(one, "b"),
        ticket(two, "y"),
    )
    batch, taken = writer.next_batch(0)
    assert [steps(append) for append in batch.appends] == [["a"], ["x"]]
    assert batch.appends[0].change == RUNNING
    writer.settle(batch, taken, Receipt())
    batch, _ = writer.next_batch(0)
    assert [(steps(append), append.prev_seq) for append in batch.appends] == [
        (["b"], 1),
        (["y"], 1),
    ]


async def test_two_drivers_of_one_run_never_share_a_batch() -> None:
    old, new = Head("one"), Head("one", seq=1)
    batch, _ = core(ticket(old, "a"), ticket(new, "b")).next_batch(0)
    assert [steps(append) for append in batch.appends] == [["a"]]


async def test_a_batch_has_its_limits_and_always_takes_something(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(writing, "BATCH_ENTRIES_MAX", 3)
    heads = [Head(str(number)) for number in range(4)]
    writer = core(*(ticket(head, *"abcde") for head in heads[:2]), ticket(heads[2], "a"))
    assert len(writer.next_batch(0)[0].appends) == 1
    assert len(writer.next_batch(0)[0].appends) == 1
    monkeypatch.setattr(writing, "BATCH_BYTES_MAX", 10)
    writer = core(*(ticket(head, "a", payload=bytes(20)) for head in heads))
    assert len(writer.next_batch(0)[0].appends) == 1
    assert len(writer.queue) == 3


async def test_a_long_payload_becomes_a_reference_and_a_blob_beside_it() -> None:
    payload = random.Random(1).randbytes(2 << 20)
    batch, _ = core(ticket(Head("one"), "a", payload=payload)).next_batch(0)
    [append] = batch.appends
    [entry], [blob] = append.entries, append.changes
    assert isinstance(blob, PutBlob)
    assert blob.content == payload
    assert entry.payload == b"\x03" + blob.digest
    assert entry.digest == chain(GENESIS, entry)


async def test_changes_stay_with_their_run_and_need_no_entry() -> None:
    one, two = Head("one"), Head("two", seq=4, digest=b"d" * 32)
    drop = DropProgress("x", "s")
    batch, taken = core(ticket(one, "a"), ticket(two, changes=(drop,))).next_batch(0)
    assert batch.changes == ()
    assert batch.appends[0].changes == []
    assert list(batch.appends[1].changes) == [drop]
    assert (batch.appends[1].prev_seq, batch.appends[1].entries) == (4, [])
    WriterCore.settle(batch, taken, Receipt())
    assert (two.seq, two.digest) == (4, b"d" * 32)


@pytest.mark.parametrize(
    ("outcome", "error"),
    [
        (Outcome.FENCED, Fenced),
        (Outcome.CONFLICT, Refused),
        (Outcome.UNFIT, Refused),
        (Outcome.DAMAGED, StoreDamaged),
    ],
)
async def test_a_refused_run_is_told_and_writes_no_more_the_others_go_on(
    outcome: Outcome, error: type[BaseException]
) -> None:
    one, two = Head("one"), Head("two")
    writer = core(ticket(one, "a"), ticket(two, "x"), ticket(one, "b", change=RUNNING))
    writer.queue.append(ticket(one, "c"))
    later = writer.queue[-1]
    batch, taken = writer.next_batch(0)
    writer.settle(batch, taken, Receipt({"one": outcome}))
    assert one.is_fenced
    assert (one.seq, two.seq) == (0, 1)
    assert [type(item.future.exception()) for item in taken] == [error, type(None), error]
    batch, taken = writer.next_batch(0)
    assert (batch.appends, taken, writer.queue) == ([], [], [])
    assert isinstance(later.future.exception(), Fenced)


class Disk:
    """A store that answers what it is told to; remembers what it was asked."""

    def __init__(self, *answers: Receipt | BaseException) -> None:
        self.answers = list(answers)
        self.asked: list[Batch] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def commit(self, batch: Batch) -> Receipt:
        self.asked.append(batch)
        await self.gate.wait()
        answer = self.answers.pop(0) if self.answers else Receipt()
        if isinstance(answer, BaseException):
            raise answer
        return answer


def draft(step: str = "a") -> tuple[Draft, ...]:
    return (Draft(Kind.STEP_FINISHED, step, 1, encode({})),)


async def test_what_comes_while_a_commit_is_in_flight_shares_the_next_one() -> None:
    disk = Disk()
    disk.gate.clear()
    writer = GroupWriter(disk, HandClock())
    writer.start()
    futures = [writer.append(Head("first"), draft())]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    futures += [writer.append(Head(f"run{number}"), draft()) for number in range(100)]
    disk.gate.set()
    await asyncio.gather(*futures)
    assert [len(batch.appends) for batch in disk.asked] == [1, 100]
    await writer.close()


async def test_a_full_disk_is_asked_again_with_the_same_bytes_until_it_takes_them() -> None:
    disk = Disk(StoreFull("full"), StoreFull("full"), StoreFull("full"))
    writer = GroupWriter(disk, HandClock())
    writer.start()
    head = Head("one")
    await writer.append(head, draft())
    assert head.seq == 1
    assert len(disk.asked) == 4
    assert all(batch is disk.asked[0] for batch in disk.asked)
    await writer.close()


async def test_a_closing_writer_does_not_ask_a_full_disk_for_ever() -> None:
    disk = Disk(*[StoreFull("full")] * 50)
    writer = GroupWriter(disk, HandClock())
    writer.start()
    future = writer.append(Head("one"), draft())
    await writer.close()
    assert isinstance(future.exception(), StoreFull)


@pytest.mark.parametrize("error", [StoreError("gone"), StoreDamaged("bad"), KeyError("defect")])
async def test_nothing_lands_behind_a_commit_that_failed(error: Exception) -> None:
    disk = Disk(error)
    disk.gate.clear()
    writer = GroupWriter(disk, HandClock())
    writer.start()
    head, other = Head("one"), Head("other")
    first = writer.append(head, draft("a"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    second = writer.append(head, draft("b"))
    third = writer.append(other, draft())
    disk.gate.set()
    with pytest.raises(StoreError):
        await first
    with pytest.raises(Fenced):
        await second
    await third
    with pytest.raises(Fenced):
        await writer.append(head, draft("c"))
    assert [steps(append) for batch in disk.asked for append in batch.appends] == [["a"], ["a"]]
    await writer.close()


async def test_a_waiter_that_is_gone_changes_nothing() -> None:
    disk = Disk()
    disk.gate.clear()
    writer = GroupWriter(disk, HandClock())
    writer.start()
    head = Head("one")
    gone = asyncio.ensure_future(writer.append(head, draft("a")))
    await asyncio.sleep(0)
    gone.cancel()
    disk.gate.set()
    await writer.append(head, draft("b"))
    assert head.seq == 2
    await writer.close()


async def test_a_closed_writer_takes_nothing_and_commits_what_it_has() -> None:
    disk = Disk()
    writer = GroupWriter(disk, HandClock())
    writer.start()
    future = writer.append(Head("one"), draft(), accept=NewRun("one", "f", "1", "d"))
    await writer.close()
    assert future.done()
    assert disk.asked[0].appends[0].accept is not None
    with pytest.raises(StoreError):
        await writer.append(Head("two"), draft())
