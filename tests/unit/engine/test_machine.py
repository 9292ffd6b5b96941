"""The machine: everything in the table happens as it says, everything else is refused."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_orchestrator.engine.machine import (
    TRANSITIONS,
    WAKE_MAX,
    Event,
    Happening,
    column_bytes,
    decide,
)
from llm_orchestrator.errors import Refused
from llm_orchestrator.model import Kind, RunState
from llm_orchestrator.store import journal
from llm_orchestrator.store.journal import decode

EVERYTHING = list(itertools.product(RunState, Event))


@pytest.mark.parametrize(("state", "event"), EVERYTHING)
def test_what_is_not_in_the_table_is_refused(state: RunState, event: Event) -> None:
    happening = Happening(event, owner="me", output=1)
    if event in TRANSITIONS[state]:
        assert decide(state, 5, happening).state is TRANSITIONS[state][event]
    else:
        with pytest.raises(Refused, match=f"a run that is {state} takes no {event}"):
            decide(state, 5, happening)


def test_every_state_is_in_the_table_and_can_be_reached() -> None:
    assert set(TRANSITIONS) == set(RunState)
    reached, todo = {RunState.PENDING}, [RunState.PENDING]
    while todo:
        for following in TRANSITIONS[todo.pop()].values():
            if following not in reached:
                reached.add(following)
                todo.append(following)
    assert reached == set(RunState)


def test_every_unfinished_run_can_be_ended_and_a_cancelled_one_never_moves() -> None:
    for state in RunState:
        assert (Event.CANCEL in TRANSITIONS[state]) is not state.is_final, state
    assert TRANSITIONS[RunState.CANCELLED] == {}


@pytest.mark.parametrize(("state", "event"), EVERYTHING)
def test_entry_and_row_say_the_same(state: RunState, event: Event) -> None:
    if event not in TRANSITIONS[state]:
        return
    happening = Happening(event, "why", owner="me", wake_at=9, output=[1], error={"kind": "x"})
    decision = decide(state, 5, happening)
    data, change = decode(decision.draft.payload), decision.change
    assert change.state == decision.state
    assert data["reason"] == change.reason == "why"
    if decision.draft.kind == Kind.CLAIMED:
        assert data["node"] == change.owner == "me"
    else:
        assert change.owner is None
    if decision.draft.kind == Kind.STATE:
        assert (data["state"], data["event"]) == (decision.state, event)
    assert ("output" in data) is (change.output is not None) is (event is Event.COMPLETE)
    assert change.error == column_bytes({"kind": "x"})
    assert ("wake_at" in data) is (event is Event.WAIT)


def test_only_claims_takeovers_and_rewinds_raise_the_epoch() -> None:
    raising = {
        event
        for state, event in EVERYTHING
        if event in TRANSITIONS[state] and decide(state, 5, Happening(event, owner="me")).epoch == 6
    }
    assert raising == {Event.CLAIM, Event.TAKEOVER, Event.REWIND}


@given(st.integers())
def test_a_wake_up_always_fits_its_column(wake_at: int) -> None:
    change = decide(RunState.RUNNING, 1, Happening(Event.WAIT, wake_at=wake_at)).change
    assert change.wake_at <= WAKE_MAX < 1 << 63


@pytest.mark.parametrize("output", [float("inf"), b"x", {1, "a"}, (1, 2), "\ud800", object])
def test_the_output_is_what_a_replay_reads_of_it(output: object) -> None:
    decision = decide(RunState.RUNNING, 1, Happening(Event.COMPLETE, output=output))
    recorded = decode(decision.draft.payload)["output"]
    assert decision.output == recorded
    assert decision.change.output is not None
    assert decode(decision.change.output) == {"value": recorded}


def test_an_output_that_no_journal_holds_fails_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "PAYLOAD_BYTES_MAX", 100_000)
    decision = decide(RunState.RUNNING, 1, Happening(Event.COMPLETE, output="x" * 200_000))
    assert decision.state is RunState.FAILED
    assert decision.error["kind"] == "too_large"
    assert decision.output is None
