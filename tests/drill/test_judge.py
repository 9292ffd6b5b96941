"""What a fault excuses, and what it does not: books of one run, made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llm_orchestrator.drill.judge import Books, judge, read
from llm_orchestrator.drill.money import dollars

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


def test_calls_of_two_providers_are_one_account_with_its_price(tmp_path: Path) -> None:
    at = {"openai.chat": 10, "anthropic.messages": 20}
    for api, when in at.items():
        model = "gpt-4o" if when == 10 else "claude-haiku-4-5"
        call = {"event": "arrived", "at": when, "id": api, "prompt": f"drill {KEY} ask"}
        call |= {"api": api, "model": model, "input_tokens": 1000}
        tokens, outcome = (40, "aborted") if when == 10 else (50, "complete")
        end = {"event": "ended", "at": when + 5, "id": api, "tokens": tokens, "outcome": outcome}
        path = tmp_path / f"llm_{api}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in (call, end)))
    accepted = {"event": "accepted", "at": 1, "run": RUN, "key": KEY, "kind": "load"}
    accepted |= {"tokens": {"ask": 50}, "expects": {"said": "x"}}
    claims = [{**entry(n, n, "claimed", epoch=n), "event": "final"} for n in (1, 2)]
    ledger = tmp_path / "witness.jsonl"
    ledger.write_text("".join(json.dumps(line) + "\n" for line in (accepted, *claims)))
    verdict = judge(read(ledger, sorted(tmp_path.glob("llm*.jsonl"))))
    assert verdict.counts["llm_calls"] == 2
    assert verdict.counts["claimed_again"] == 1
    assert verdict.respent == {"calls": 1, "tokens": 40, "refused_calls": 0}
    assert verdict.respent_by == {"openai/gpt-4o": {"input": 1000, "output": 40}}
    assert dollars(verdict.respent_by) == pytest.approx(0.0029)
    assert dollars({"openai/fake": {"input": 1, "output": 1}}) is None
    assert dollars({}) == 0
