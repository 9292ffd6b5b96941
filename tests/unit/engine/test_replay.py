"""The fold: what a journal says, entry by entry, and after a rewind or a repair."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_orchestrator.engine.acceptance import accepted_draft
from llm_orchestrator.engine.machine import TRANSITIONS, Event, Happening, decide
from llm_orchestrator.engine.replay import checkpoints, fold
from llm_orchestrator.engine.rows import contradiction, row_of
from llm_orchestrator.errors import StoreDamaged
from llm_orchestrator.model import Draft, Entry, Kind, NewRun, RunState
from llm_orchestrator.store.journal import GENESIS, encode, link

RUN = "00000000-0000-7000-8000-000000000001"


class Story:
    """A journal as it is told."""

    def __init__(self, **values: Any) -> None:
        self.entries: list[Entry] = []
        self.epoch = 10
        self.state = RunState.PENDING
        self.add(accepted_draft(NewRun(RUN, "flow", "1", "d" * 64, **values)))

    def add(self, draft: Draft) -> Story:
        seq = len(self.entries) + 1
        previous = self.entries[-1].digest if self.entries else GENESIS
        columns = (seq, self.epoch, *draft)
        digest = link(previous, RUN, columns)
        self.entries.append(Entry(RUN, *columns, digest, 1_000 + seq))
        return self

    def note(self, kind: Kind, step: str, attempt: int = 0, **data: Any) -> Story:
        return self.add(Draft(kind, step, attempt, encode(data)))

    def happen(self, event: Event, reason: str = "", **values: Any) -> Story:
        decision = decide(self.state, self.epoch, Happening(event, reason, **values))
        self.epoch, self.state = decision.epoch, decision.state
        return self.add(decision.draft)

    def claim(self, owner: str = "me") -> Story:
        is_running = self.state is RunState.RUNNING
        return self.happen(Event.TAKEOVER if is_running else Event.CLAIM, owner=owner)

    def finish(self, step: str, result: Any = None, **data: Any) -> Story:
        return self.note(Kind.STEP_FINISHED, step, 1, result=result, **data)

    @property
    def fold(self) -> Any:
        return fold(RUN, self.entries)


def test_a_run_from_acceptance_to_its_end() -> None:
    story = Story(input={"n": 1}, wake_at=77)
    state = story.fold
    assert (state.state, state.owner, state.wake_at) == (RunState.PENDING, None, 77)
    assert state.accepted["input"] == {"n": 1}
    assert state.created_at == 1_001
    state = story.claim("a").fold
    assert (state.state, state.owner, state.epoch, state.wake_at) == (RunState.RUNNING, "a", 11, 0)
    story.finish("s", {"x": 1}).happen(Event.WAIT, "timer", wake_at=99)
    state = story.fold
    assert (state.state, state.reason, state.owner) == (RunState.WAITING, "timer", None)
    assert state.wake_at == 99
    state = story.claim("b").happen(Event.COMPLETE, output=[1]).fold
    assert (state.state, state.output, state.epoch) == (RunState.COMPLETED, [1], 12)
    assert (state.seq, state.digest) == (6, story.entries[-1].digest)
    assert state.finished["s"].result == {"x": 1}


def test_attempts_repeats_and_open_intents_are_counted() -> None:
    story = Story().claim()
    story.note(Kind.INTENT, "pay", 1)
    assert story.fold.intents == {"pay": 1}
    story.claim().note(Kind.INTENT, "pay", 1)
    assert (story.fold.attempts, story.fold.repeats) == (2, 1)
    story.note(Kind.ATTEMPT_FAILED, "pay", 1, error={"kind": "x"}, next_at=5)
    state = story.fold
    assert state.intents == {}
    assert (state.failures["pay"].next_at, state.failures["pay"].is_final) == (5, False)
    story.note(Kind.INTENT, "pay", 2).finish("pay", "ok")
    state = story.fold
    assert (state.failures, state.intents) == ({}, {})
    assert state.attempts == 3
    story.finish("free")
    assert story.fold.attempts == 4


def test_usage_adds_up_over_failures_and_results() -> None:
    story = Story().claim()
    usage = {"input_tokens": 1, "output_tokens": 2, "cost_usd": 0.5}
    story.note(Kind.ATTEMPT_FAILED, "s", 1, error={}, usage=usage)
    story.finish("s", usage=usage)
    assert (story.fold.usage.output_tokens, story.fold.usage.cost_usd) == (4, 1.0)


def test_a_retry_forgives_failures() -> None:
    story = Story().claim()
    story.note(Kind.ATTEMPT_FAILED, "s", 3, error={"kind": "x"}, final=True)
    story.happen(Event.FAIL, error={"kind": "x"})
    assert story.fold.failures["s"].is_final
    state = story.happen(Event.RETRY).fold
    assert (state.failures, state.state, state.error) == ({}, RunState.PENDING, None)


def test_a_rewind_hides_results_keeps_money_and_gives_signals_back() -> None:
    story = Story().claim().finish("a", 1)
    usage = {"input_tokens": 5}
    story.finish("b", 2, usage=usage)
    story.note(Kind.SIGNAL, "w", number=1, name="go", payload="p", by=None)
    story.note(Kind.STEP_SKIPPED, "c", reason="no")
    story.happen(Event.COMPLETE, output="done")
    story.happen(Event.REWIND, data={"to_seq": 3})
    state = story.fold
    assert set(state.finished) == {"a"}
    assert state.skipped == state.signals == {}
    assert [data["number"] for data in state.redeliver] == [1]
    assert state.usage.input_tokens == 5
    assert (state.state, state.output, state.owner) == (RunState.PENDING, None, None)
    story.claim().note(Kind.SIGNAL, "w", number=1, name="go", payload="p", by=None)
    assert story.fold.redeliver == []
    assert "w" in story.fold.signals


def test_a_rewind_behind_a_rewind_hides_that_one_too() -> None:
    story = Story().claim().finish("a", 1).finish("b", 2)
    story.happen(Event.REWIND, data={"to_seq": 3})
    story.claim().finish("b", 3)
    assert story.fold.finished["b"].result == 3
    story.happen(Event.REWIND, data={"to_seq": 1})
    state = story.fold
    assert state.finished == {}
    assert state.rewinds == 1
    assert state.epoch == story.epoch


def test_a_rewind_past_a_rewind_does_not_bring_back_what_it_hid() -> None:
    story = Story().claim().finish("a", 1).finish("b", 2)
    story.happen(Event.REWIND, data={"to_seq": 3})
    story.claim().finish("c", 4)
    story.happen(Event.REWIND, data={"to_seq": 5})
    assert set(story.fold.finished) == {"a"}


def test_a_rewind_to_a_checkpoint_that_a_rewind_hid_brings_it_back() -> None:
    story = Story().claim().finish("a", 1).finish("b", 2)
    story.happen(Event.REWIND, data={"to_seq": 3})
    story.claim().finish("b", 3)
    story.happen(Event.REWIND, data={"to_seq": 4})
    assert {step: done.result for step, done in story.fold.finished.items()} == {"a": 1, "b": 2}


def test_a_repair_gives_up_entries_and_moves_nothing_else() -> None:
    story = Story().claim().finish("a", 1)
    data = {"is_repair": True, "lost": [[3, ""]], "steps": ["a"], "why": []}
    story.add(Draft(Kind.REWOUND, "", 0, encode(data)))
    state = fold(RUN, [entry for entry in story.entries if entry.seq != 3])
    assert state.finished == {}
    assert (state.state, state.owner) == (RunState.RUNNING, None)


def test_checkpoints_are_the_ends_of_steps() -> None:
    story = (
        Story().claim().finish("a").note(Kind.STEP_SKIPPED, "b").note(Kind.WAITING, "c", until=1)
    )
    assert [entry.seq for entry in checkpoints(story.entries)] == [3, 4]


def test_the_place_of_a_call_is_remembered_by_its_scope() -> None:
    story = Story().claim().finish("a", at=0).finish("map/0/b", at=0).finish("map/1/b", at=0)
    assert story.fold.order == {("", 0): "a", ("map/0", 0): "map/0/b", ("map/1", 0): "map/1/b"}


@pytest.mark.parametrize(
    "entry",
    [
        Draft("unheard_of", "", 0, encode({})),
        Draft(Kind.STEP_FINISHED, "s", 1, encode({})),
        Draft(Kind.STATE, "", 0, encode({"state": "sleeping"})),
        Draft(Kind.ATTEMPT_FAILED, "s", 1, encode({"error": {}, "next_at": "soon"})),
        Draft(Kind.SIGNAL, "s", 1, b"no json"),
    ],
    ids=lambda draft: str(draft.kind),
)
def test_an_entry_that_makes_no_sense_is_damage(entry: Draft) -> None:
    with pytest.raises(StoreDamaged):
        _ = Story().claim().add(entry).fold


EVENTS = st.lists(st.tuples(st.sampled_from(list(Event)), st.integers(0, 5)), max_size=20)


@given(EVENTS)
def test_the_fold_stands_where_the_machine_does_and_its_row_agrees(
    events: list[tuple[Event, int]],
) -> None:
    story = Story(wake_at=3, labels={"a": "b"}, input=[1.5])
    for event, number in events:
        if event not in TRANSITIONS[story.state]:
            continue
        values: dict[str, Any] = {"wake_at": number if event is Event.WAIT else 0}
        if event is Event.REWIND:
            values["data"] = {"to_seq": 1 + number % len(story.entries)}
        if event in (Event.FAIL, Event.PAUSE):
            values["error"] = {"kind": "x"}
        if event in (Event.CLAIM, Event.TAKEOVER):
            values["owner"] = f"node{number}"
        story.happen(event, f"why{number}" if number else "", output=number, **values)
        story.finish(f"s{number}")
    state = story.fold
    assert (state.state, state.epoch) == (story.state, story.epoch)
    row = row_of(state, story.entries)
    assert contradiction(row, state, story.entries) == ""
    assert row.change.state == story.state
    assert (row.finished_at is not None) is story.state.is_final


def test_each_thing_that_a_row_says_wrongly_is_noticed() -> None:
    story = Story(wake_at=3).claim().happen(Event.WAIT, "timer", wake_at=50)
    state = story.fold
    right = row_of(state, story.entries)
    asleep = right._replace(change=right.change._replace(wake_at=50))
    assert contradiction(asleep, state, story.entries) == ""
    changes: list[dict[str, Any]] = [
        {"state": "pending"},
        {"state": "wbiting"},
        {"reason": "Timer"},
        {"owner": "somebody"},
        {"wake_at": 51},
        {"output": b"x"},
        {"error": b"x"},
    ]
    wrong = [right._replace(change=right.change._replace(**change)) for change in changes]
    other = NewRun(RUN, "flow", "1", "d" * 64, wake_at=3, queue="other")
    wrong += [right._replace(accept=other), right._replace(epoch=99)]
    wrong += [right._replace(finished_at=5)]
    for row in (None, *wrong):
        assert contradiction(row, state, story.entries) != "", row
