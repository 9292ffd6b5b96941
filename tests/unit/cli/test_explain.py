"""Every state and reason has one sentence and a command that moves the run."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llm_orchestrator.engine.explain import Surroundings, explain
from llm_orchestrator.engine.gate import NEVER
from llm_orchestrator.engine.replay import Failure, Fold
from llm_orchestrator.model import Run, RunState

NOW = 1_800_000_000_000_000
SECOND = 1_000_000
ALIVE, ALONE = Surroundings(is_engine_alive=True), Surroundings(is_engine_alive=False)
ID = "01920000-0000-7000-8000-000000000001"


def a_fold(state: RunState, reason: str = "", **changes: object) -> Fold:
    fold = Fold(ID, accepted={"workflow": "w", "queue": "default"}, state=state, reason=reason)
    for name, value in changes.items():
        setattr(fold, name, value)
    return fold


def a_row(wake_at: int = 0) -> Run:
    return Run(
        ID, "w", "1", "d", RunState.WAITING, "", None, 1, 0, "default", None, None, wake_at, 0,
        {}, 1, None, None,
    )  # fmt: skip


FAILED = {"kind": "step_failed", "message": "step a: no key"}
SIGNAL = {"for": "signal", "name": "go", "until": NEVER}
APPROVAL = {"for": "signal", "name": "approval:review", "until": NOW + 5 * SECOND}
CHILD = {"for": "signal", "name": "child:01920000-0000-7000-8000-000000000002", "until": NEVER}
TIMER = {"for": "timer", "until": NOW + 30 * SECOND}
LATER = a_row(NOW + 30 * SECOND)
RETRY = Failure(2, {"message": "503"}, is_final=False, next_at=NOW + 4 * SECOND, seq=3)
FULL = Surroundings(is_engine_alive=True, queue_running=2, queue_max=2)

CASES: list[tuple[Fold, Run | None, Surroundings, str, str]] = [
    (a_fold(RunState.PENDING), None, ALONE, "none serves the store", "llmo serve"),
    (a_fold(RunState.PENDING), LATER, ALIVE, "start later, in 30.0 s", f"llmo runs watch {ID}"),
    (
        a_fold(RunState.PENDING),
        None,
        FULL,
        "queue default is full: 2 of 2",
        "llmo runs list --queue default --state running",
    ),
    (
        a_fold(RunState.PENDING),
        None,
        Surroundings(is_engine_alive=True, is_python=True),
        "the code of Python workflow w",
        "llmo serve --import MODULE",
    ),
    (a_fold(RunState.PENDING), None, ALIVE, "has not claimed it yet", f"llmo runs watch {ID}"),
    (
        a_fold(RunState.RUNNING, intents={"a": 1, "b": 1}),
        None,
        ALIVE,
        "executing step a and 1 more",
        f"llmo runs watch {ID}",
    ),
    (
        a_fold(RunState.RUNNING, failures={"a": RETRY}),
        None,
        ALIVE,
        "attempt 2 of step a failed (503); the next one starts in 4.0 s",
        f"llmo runs watch {ID}",
    ),
    (a_fold(RunState.RUNNING, owner="n1"), None, ALIVE, "driven by n1", f"llmo runs watch {ID}"),
    (a_fold(RunState.RUNNING, owner="n1"), None, ALONE, "(n1) is gone", "llmo serve"),
    (
        a_fold(RunState.WAITING, waits={"s": SIGNAL}),
        a_row(NEVER),
        ALIVE,
        "step s waits for the signal 'go'",
        f"llmo runs signal {ID} go",
    ),
    (
        a_fold(RunState.WAITING, waits={"review": APPROVAL}),
        a_row(NOW + 5 * SECOND),
        ALIVE,
        "step review waits for somebody's approval, or until",
        f"llmo runs approve {ID} review",
    ),
    (
        a_fold(RunState.WAITING, waits={"c": CHILD}),
        a_row(NEVER),
        ALIVE,
        "waits for the end of its child run 01920000",
        "llmo runs explain 01920000-0000-7000-8000-000000000002",
    ),
    (
        a_fold(RunState.WAITING, waits={"t": TIMER}),
        LATER,
        ALIVE,
        "step t waits for its time, in 30.0 s",
        f"llmo runs watch {ID}",
    ),
    (
        a_fold(RunState.WAITING, waits={"t": TIMER}),
        LATER,
        ALONE,
        "no engine serves the store",
        "llmo serve",
    ),
    (a_fold(RunState.WAITING), LATER, ALIVE, "a provider is unavailable", f"llmo runs watch {ID}"),
    (
        a_fold(RunState.WAITING, failures={"a": RETRY}),
        LATER,
        ALIVE,
        "the next one starts in 4.0 s",
        f"llmo runs watch {ID}",
    ),
    (a_fold(RunState.WAITING), a_row(0), ALONE, "its wait is over, but no engine", "llmo serve"),
    (a_fold(RunState.WAITING), a_row(0), ALIVE, "about to go on", f"llmo runs watch {ID}"),
    (
        a_fold(RunState.PAUSED, "operator"),
        None,
        ALIVE,
        "an operator paused it",
        f"llmo runs resume {ID}",
    ),
    (
        a_fold(RunState.PAUSED, "unknown_outcome", intents={"pay": 1}),
        None,
        ALIVE,
        "nobody knows whether step pay was done",
        f"llmo runs resume {ID} --step pay --as retry|finished|failed",
    ),
    (
        a_fold(RunState.PAUSED, "nondeterminism", error={"message": "asks for b, not a"}),
        None,
        ALIVE,
        "asks for b, not a",
        f"llmo runs resume {ID}",
    ),
    (
        a_fold(RunState.PAUSED, "damaged", error={"message": "entry 4 is lost"}),
        None,
        ALIVE,
        "entry 4 is lost",
        f"llmo runs journal {ID}",
    ),
    (
        a_fold(RunState.PAUSED, "quarantine"),
        None,
        ALIVE,
        "engines died",
        f"llmo runs resume {ID}",
    ),
    (a_fold(RunState.COMPLETED), None, ALIVE, "result is recorded", f"llmo runs result {ID}"),
    (
        a_fold(RunState.FAILED, error=FAILED),
        None,
        ALIVE,
        "it failed: step a: no key",
        f"llmo runs retry {ID}",
    ),
    (
        a_fold(RunState.FAILED, "timeout", error={"message": "too long"}),
        None,
        ALIVE,
        "only a fork has time again",
        f"llmo runs fork {ID}",
    ),
    (a_fold(RunState.CANCELLED), None, ALIVE, "cancelled, which is final", f"llmo runs fork {ID}"),
]


@pytest.mark.parametrize(
    ("fold", "row", "around", "words", "command"),
    CASES,
    ids=[f"{case[0].state}-{case[3][:20]}" for case in CASES],
)
def test_each_state_says_why_and_what_moves_it(
    fold: Fold, row: Run | None, around: Surroundings, words: str, command: str
) -> None:
    found = explain(fold, row, NOW, around=around)
    assert words in found.sentence
    assert found.command.startswith(command)
    assert "\n" not in found.sentence


def test_every_state_is_explained() -> None:
    assert {case[0].state for case in CASES} == set(RunState)


def test_an_answered_wait_is_no_wait() -> None:
    fold = a_fold(RunState.WAITING, waits={"s": SIGNAL}, signals={"s": {"name": "go"}})
    assert "signal" not in explain(fold, a_row(0), NOW, around=ALIVE).sentence


@pytest.mark.parametrize("moment", [NEVER, -NEVER])
def test_a_moment_beyond_the_calendar_is_no_crash(moment: int) -> None:
    wait = {"for": "timer", "until": moment}
    fold = a_fold(RunState.WAITING, waits={"t": wait})
    assert explain(fold, replace(a_row(), wake_at=moment), NOW, around=ALIVE).sentence
