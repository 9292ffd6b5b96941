"""What a fault excuses, and what it does not: books of one run, made by hand."""

from __future__ import annotations

from typing import Any

import pytest

from llm_orchestrator.drill.judge import Books, judge

RUN, KEY = "run-1", "drill-0"
Lines = list[dict[str, Any]]


def entry(at: int, seq: int, kind: str, step: str = "", *, epoch: int) -> dict[str, Any]:
    return {
        "event": "entry",
        "at": at,
        "run": RUN,
        "seq": seq,
        "epoch": epoch,
        "kind": kind,
        "step": step,
        "digest": f"d{seq}",
    }


def zombie(*, first_intent: int = 3, woke_at: int = 90, until: int = 95) -> Books:
    """A node is frozen at 5; another one takes the run over at 40 and asks; the first wakes up."""
    entries = [
        entry(1, 1, "accepted", epoch=1),
        entry(2, 2, "claimed", epoch=1),
        entry(first_intent, 3, "intent", "ask", epoch=1),
        entry(40, 4, "claimed", epoch=2),
        entry(41, 5, "intent", "ask", epoch=2),
        entry(50, 6, "step_finished", "ask", epoch=2),
        entry(51, 7, "state", epoch=2),
    ]
    lines: Lines = [
        {"event": "accepted", "at": 1, "run": RUN, "key": KEY, "kind": "load", "tokens": {"ask": 2}}
        | {"expects": {"said": "x"}},
        *entries,
        {"event": "ended", "at": 60, "run": RUN, "state": "completed", "output": {"said": "x"}},
        *(line | {"event": "final"} for line in entries),
        {"event": "window", "at": 99, "from": 5, "until": until, "t0": 5},
    ]
    calls: Lines = []
    for at, name in ((42, "a"), (woke_at, "b")):
        calls.append({"event": "arrived", "at": at, "id": name, "prompt": f"drill {KEY} ask"})
        calls.append({"event": "ended", "at": at + 1, "id": name, "tokens": 2})
        calls[-1]["outcome"] = "complete"
    return Books(lines, calls)


def kinds(books: Books) -> list[str]:
    return [finding.kind for finding in judge(books).findings]


def test_a_call_that_was_begun_before_its_node_froze_may_arrive_when_it_wakes_up() -> None:
    verdict = judge(zombie())
    assert verdict.is_whole
    assert verdict.respent["tokens"] == 2


@pytest.mark.parametrize(
    "books",
    [
        pytest.param(zombie(first_intent=60), id="its intent came after the result"),
        pytest.param(zombie(until=70), id="the fault was over"),
    ],
)
def test_nothing_else_is_excused(books: Books) -> None:
    assert kinds(books) == ["twice"]


def test_one_intent_excuses_one_call() -> None:
    books = zombie()
    more = {"event": "arrived", "at": 91, "id": "c", "prompt": f"drill {KEY} ask"}
    assert kinds(Books(books.lines, [*books.calls, more])) == ["twice"]
