"""Damage, case by case: what is put back, what is given up, who must decide."""

from __future__ import annotations

from typing import Any

import pytest

from llm_orchestrator.engine.acceptance import accepted_draft
from llm_orchestrator.engine.audit import settle, verify_store
from llm_orchestrator.engine.machine import Event, Happening, decide
from llm_orchestrator.engine.mend import Mender
from llm_orchestrator.engine.replay import Fold
from llm_orchestrator.errors import StoreDamaged
from llm_orchestrator.model import Draft, Journal, Kind, NewRun, RunState
from llm_orchestrator.store.base import Batch, Post
from llm_orchestrator.store.journal import encode
from llm_orchestrator.store.memory import MemoryStore
from llm_orchestrator.store.writer import GroupWriter, Head
from tests.store.support import HandClock, batches_of, new_run


class Lab:
    """A store in memory with one run, whose rows can be damaged."""

    def __init__(self, **values: Any) -> None:
        self.clock = HandClock()
        self.store = MemoryStore(self.clock, node_id="me")
        self.writer = GroupWriter(self.store, self.clock)
        self.writer.start()
        self.mender = Mender(self.store, self.writer)
        self.new = new_run(**{"input": {"n": 1}, **values})
        self.run_id = self.new.run_id
        self.head = Head(self.run_id, 1 << 40)
        self.state = RunState.PENDING

    async def accept(self) -> None:
        await self.writer.append(self.head, [accepted_draft(self.new)], accept=self.new)

    async def happen(self, event: Event, reason: str = "", **values: Any) -> None:
        if event is Event.CLAIM:
            values["owner"] = "dead"
        decision = decide(self.state, self.head.epoch, Happening(event, reason, **values))
        self.head.epoch, self.state = decision.epoch, decision.state
        await self.writer.append(self.head, [decision.draft], change=decision.change)

    async def note(self, kind: Kind, step: str, attempt: int = 0, **data: Any) -> None:
        await self.writer.append(self.head, [Draft(kind, step, attempt, encode(data))])

    async def finish(self, step: str) -> None:
        await self.note(Kind.STEP_FINISHED, step, 1, result=step)

    async def finished(self) -> None:
        """1 accepted, 2 claimed, 3 a, 4 pay's intent, 5 pay, 6 b, 7 completed."""
        await self.accept()
        await self.happen(Event.CLAIM)
        await self.finish("a")
        await self.note(Kind.INTENT, "pay", 1)
        await self.finish("pay")
        await self.finish("b")
        await self.happen(Event.COMPLETE, output={"done": True})

    async def half(self) -> None:
        """1 accepted, 2 claimed, 3 a, 4 pay's intent, 5 pay, 6 b."""
        await self.accept()
        await self.happen(Event.CLAIM)
        await self.finish("a")
        await self.note(Kind.INTENT, "pay", 1)
        await self.finish("pay")
        await self.finish("b")

    def damage(self, seq: int, **values: Any) -> None:
        values = values or {"payload": b'{"result":"forged"}'}
        key = (self.run_id, seq)
        self.store.tables.journal[key] = self.store.tables.journal[key]._replace(**values)

    def lose(self, seq: int) -> None:
        del self.store.tables.journal[self.run_id, seq]

    def wrong_row(self, **values: Any) -> None:
        row = self.store.tables.runs[self.run_id]
        self.store.tables.runs[self.run_id] = row._replace(change=row.change._replace(**values))

    async def journal(self) -> Journal:
        return (await self.store.look.load([self.run_id]))[self.run_id]

    async def mended(self) -> Fold:
        state, head = await self.mender.whole(await self.journal())
        journal = await self.journal()
        assert journal.flaws == ()
        assert await verify_store(self.store) == []
        assert (head.seq, head.digest) == (journal.entries[-1].seq, journal.entries[-1].digest)
        return state


async def test_a_whole_run_is_left_alone() -> None:
    lab = Lab()
    await lab.half()
    before = dict(lab.store.tables.journal)
    state = await lab.mended()
    assert lab.store.tables.journal == before
    assert set(state.finished) == {"a", "pay", "b"}


async def test_a_flipped_digest_is_put_right_and_nothing_is_lost() -> None:
    lab = Lab()
    await lab.half()
    lab.damage(3, digest=bytes(32))
    state = await lab.mended()
    assert set(state.finished) == {"a", "pay", "b"}
    assert len(lab.store.tables.journal) == 6


@pytest.mark.parametrize(
    "damage",
    [
        {"payload": b"{}"},
        {"kind": "acceptee"},
        {"epoch": 77},
        {"step": "x"},
        {"attempt": 3},
        {"payload": b"", "kind": "", "epoch": 0},
    ],
    ids=str,
)
async def test_the_first_entry_is_rebuilt_from_the_row(damage: dict[str, Any]) -> None:
    lab = Lab(labels={"a": "b"}, origin={"fork": "x"}, priority=3)
    await lab.half()
    right = lab.store.tables.journal[lab.run_id, 1]
    lab.damage(1, **damage)
    await lab.mended()
    assert lab.store.tables.journal[lab.run_id, 1] == right


async def test_the_first_entry_is_rebuilt_even_when_it_is_gone() -> None:
    lab = Lab()
    await lab.half()
    right = lab.store.tables.journal[lab.run_id, 1]
    lab.lose(1)
    state = await lab.mended()
    assert lab.store.tables.journal[lab.run_id, 1]._replace(recorded_at=0) == right._replace(
        recorded_at=0
    )
    assert set(state.finished) == {"a", "pay", "b"}


async def test_a_forged_row_does_not_forge_the_first_entry() -> None:
    lab = Lab()
    await lab.half()
    lab.damage(1)
    row = lab.store.tables.runs[lab.run_id]
    other = new_run(int(lab.run_id[-12:]), input={"n": 2})
    lab.store.tables.runs[lab.run_id] = row._replace(accept=other)
    with pytest.raises(StoreDamaged, match="cannot be mended from this store"):
        await lab.mended()


async def test_how_a_run_ended_is_rebuilt_from_the_row() -> None:
    lab = Lab()
    await lab.finished()
    lab.damage(7)
    state = await lab.mended()
    assert (state.state, state.output) == (RunState.COMPLETED, {"done": True})
    assert len(lab.store.tables.journal) == 7


async def test_how_a_run_failed_is_rebuilt_from_the_row() -> None:
    lab = Lab()
    await lab.half()
    await lab.happen(Event.FAIL, "timeout", error={"kind": "timeout", "message": "late"})
    lab.damage(7)
    state = await lab.mended()
    assert (state.state, state.reason) == (RunState.FAILED, "timeout")
    assert state.error == {"kind": "timeout", "message": "late"}


async def test_an_end_that_cannot_be_proved_is_reached_again() -> None:
    lab = Lab()
    await lab.finished()
    lab.damage(7)
    lab.wrong_row(output=encode({"value": "forged"}))
    state = await lab.mended()
    assert (state.state, state.reason) == (RunState.PENDING, "repaired")
    assert set(state.finished) == {"a", "pay", "b"}
    run = await lab.store.look.run(lab.run_id)
    assert run is not None
    assert (run.state, run.owner) == (RunState.PENDING, None)


async def test_a_step_whose_entry_is_lost_runs_again_and_the_others_stand() -> None:
    lab = Lab()
    await lab.half()
    lab.damage(3)
    plan = await lab.mender.plan(await lab.journal())
    assert (plan.lost_steps, plan.needs_person) == (("a",), "")
    assert "steps that run again: a" in plan.summary()
    state = await lab.mended()
    assert set(state.finished) == {"pay", "b"}
    assert (state.state, state.reason) == (RunState.PENDING, "repaired")


async def test_a_once_step_whose_result_is_lost_has_an_unknown_outcome() -> None:
    lab = Lab()
    await lab.half()
    lab.damage(5)
    state = await lab.mended()
    assert state.intents == {"pay": 1}
    assert "pay" not in state.finished


@pytest.mark.parametrize(
    ("kind", "step"),
    [
        (Kind.INTENT, "pay"),
        (Kind.SIGNAL, "wait"),
        (Kind.DECISION, "pay"),
        (Kind.REWOUND, ""),
        ("unheard_of", ""),
    ],
)
async def test_what_may_have_recorded_an_effect_or_a_will_needs_a_person(
    kind: Kind, step: str
) -> None:
    lab = Lab()
    await lab.accept()
    await lab.happen(Event.CLAIM)
    await lab.note(kind, step, result=None, name="go", number=1, to_seq=1)
    await lab.finish("b")
    lab.damage(3)
    state = await lab.mended()
    assert (state.state, state.reason) == (RunState.PAUSED, "damaged")
    assert state.error["kind"] == "damaged"
    run = await lab.store.look.run(lab.run_id)
    assert run is not None
    assert run.state is RunState.PAUSED


async def test_repair_and_pause_are_one_commit() -> None:
    lab = Lab()
    await lab.half()
    lab.damage(4)
    seen = batches_of(lab.store)
    await lab.mended()
    kinds = [[entry.kind for entry in append.entries] for batch in seen for append in batch.appends]
    assert kinds == [[Kind.REWOUND, Kind.STATE]]


@pytest.mark.parametrize("event", [Event.CANCEL, Event.PAUSE])
async def test_a_lost_cancel_or_pause_does_not_let_the_run_go_on(event: Event) -> None:
    lab = Lab()
    await lab.half()
    await lab.happen(event, "requested", data={"by": "somebody"})
    lab.damage(7)
    state = await lab.mended()
    assert (state.state, state.reason) == (RunState.PAUSED, "damaged")


async def test_a_lost_retry_needs_a_person() -> None:
    lab = Lab()
    await lab.accept()
    await lab.happen(Event.CLAIM)
    await lab.note(Kind.ATTEMPT_FAILED, "a", 3, error={"kind": "x"}, final=True)
    await lab.happen(Event.FAIL, error={"kind": "x"})
    await lab.happen(Event.RETRY)
    await lab.happen(Event.CLAIM)
    lab.damage(5)
    state = await lab.mended()
    assert (state.state, state.reason) == (RunState.PAUSED, "damaged")


async def test_a_missing_row_is_given_up_with_its_follower_for_a_person() -> None:
    lab = Lab()
    await lab.half()
    lab.lose(3)
    state = await lab.mended()
    assert set(state.finished) == {"pay", "b"}
    assert (state.state, state.reason) == (RunState.PAUSED, "damaged")


async def test_after_a_lost_tail_new_entries_at_its_numbers_count() -> None:
    lab = Lab()
    await lab.finished()
    lab.lose(7)
    lab.lose(6)
    lab.wrong_row(output=None)
    state = await lab.mended()
    assert state.reason == "damaged"
    head = (await lab.journal()).entries[-1]
    assert head.seq == 7
    lab.state, lab.head = (
        RunState.PAUSED,
        Head(lab.run_id, state.epoch, seq=head.seq, digest=head.digest),
    )
    await lab.happen(Event.RESUME)
    await lab.happen(Event.CLAIM)
    await lab.finish("b")
    await lab.happen(Event.COMPLETE, output=2)
    state = await lab.mended()
    assert (state.state, state.output) == (RunState.COMPLETED, 2)
    assert set(state.finished) == {"a", "pay", "b"}


async def test_a_run_without_any_entry_says_so() -> None:
    lab = Lab()
    await lab.accept()
    lab.lose(1)
    with pytest.raises(StoreDamaged, match="first entry"):
        await lab.mended()


async def test_a_second_damage_is_mended_like_the_first() -> None:
    lab = Lab()
    await lab.half()
    lab.damage(3)
    await lab.mended()
    lab.damage(6)
    state = await lab.mended()
    assert set(state.finished) == {"pay"}


async def test_a_damaged_repair_is_repaired() -> None:
    lab = Lab()
    await lab.half()
    lab.damage(3)
    await lab.mended()
    lab.damage(7)
    state = await lab.mended()
    assert set(state.finished) == {"pay", "b"}
    assert (state.state, state.reason) == (RunState.PAUSED, "damaged")


async def test_a_lost_blob_loses_its_step_and_a_lost_input_is_written_again() -> None:
    lab = Lab(input={"text": HARD})
    await lab.accept()
    await lab.happen(Event.CLAIM)
    await lab.note(Kind.STEP_FINISHED, "big", 1, result=HARD[::-1])
    assert len(lab.store.tables.blobs) == 2
    lab.store.tables.blobs.clear()
    state = await lab.mended()
    assert state.finished == {}
    assert state.accepted["input"] == {"text": HARD}
    assert len(lab.store.tables.blobs) == 1


HARD = "".join(chr(0x4E00 + number * 7919 % 20_000) for number in range(1_200_000))
"""Text that compression leaves longer than a mebibyte."""


# -- rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"state": "running"},
        {"wake_at": 1 << 60},
        {"owner": "nobody"},
        {"reason": "x"},
    ],
    ids=str,
)
async def test_the_row_of_an_unfinished_run_is_settled(wrong: dict[str, Any]) -> None:
    lab = Lab()
    await lab.half()
    await lab.happen(Event.WAIT, "timer", wake_at=99)
    lab.wrong_row(**wrong)
    lab.store.tables.inbox_seqs[lab.run_id] = 0
    assert len(await verify_store(lab.store)) == 1
    assert await settle(lab.store, lab.mender) == [lab.run_id]
    assert await verify_store(lab.store) == []
    run = await lab.store.look.run(lab.run_id)
    assert run is not None
    assert (run.state, run.owner, run.wake_at) == (RunState.WAITING, None, 0)
    assert await settle(lab.store, lab.mender) == []


async def test_a_missing_row_is_made_anew_and_knows_its_messages() -> None:
    lab = Lab(priority=4, queue="q", labels={"a": "b"})
    await lab.half()
    await lab.happen(Event.WAIT, "signal", wake_at=1 << 62)
    await lab.store.commit(Batch(changes=(Post(lab.run_id, "signal", "go"),)))
    del lab.store.tables.runs[lab.run_id]
    assert await settle(lab.store, lab.mender) == [lab.run_id]
    run = await lab.store.look.run(lab.run_id)
    assert run is not None
    assert (run.state, run.priority, run.queue, run.labels) == (
        RunState.WAITING,
        4,
        "q",
        {"a": "b"},
    )
    assert run.inbox_seq == 1
    assert [message.name for message in await lab.store.look.inbox(lab.run_id)] == ["go"]


async def test_a_delayed_start_stays_delayed_when_its_row_is_made_anew() -> None:
    lab = Lab(wake_at=1 << 60)
    await lab.accept()
    del lab.store.tables.runs[lab.run_id]
    assert await settle(lab.store, lab.mender) == [lab.run_id]
    run = await lab.store.look.run(lab.run_id)
    assert run is not None
    assert run.wake_at == 1 << 60


async def test_settling_mends_journals_that_nobody_drives_and_skips_the_hopeless() -> None:
    lab = Lab()
    await lab.half()
    await lab.happen(Event.WAIT, "timer", wake_at=99)
    lab.damage(3)
    hopeless = NewRun("0" * 36, "f", "1", "d")
    await lab.writer.append(Head("0" * 36), [accepted_draft(hopeless)], accept=hopeless)
    del lab.store.tables.journal["0" * 36, 1]
    assert await settle(lab.store, lab.mender) == [lab.run_id]
    flaws = await verify_store(lab.store)
    assert {flaw.run_id for flaw in flaws} == {"0" * 36}
