"""`llmo status`: what the store says becomes lines, the worst first, each with its command."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llm_orchestrator.cli.doctor_postgres import Finding
from llm_orchestrator.cli.status import (
    Seen,
    breaker_findings,
    node_findings,
    order_findings,
    run_findings,
    standby_findings,
)
from llm_orchestrator.engine.breakers import BreakerView
from llm_orchestrator.engine.maintenance import Orders, Standing
from llm_orchestrator.model import Run, RunState
from llm_orchestrator.providers.breaker import State
from llm_orchestrator.store.base import Member
from llm_orchestrator.store.statistics import Queue, RunCount, Standby, Statistics

NOW = 1_000_000_000_000
SECOND = 1_000_000


def member(name: str, *, quiet_s: float = 0.0, state: str = "alive", beat: int = 7) -> Member:
    return Member(name, "local", state, beat, True, 0, NOW - int(quiet_s * SECOND))


def paused(reason: str) -> Run:
    return Run(
        "r", "w", "1", "d", RunState.PAUSED, reason, None, 1, 0, "q", None, None, 0, 0, {}, 0, 0, 0
    )


WELL = Seen(NOW, 1.0, True, [], Statistics(), [], [member("a")], Orders(), [])


def states(findings: list[Finding]) -> list[tuple[str, str, str]]:
    return [(each.check, each.state, each.hint) for each in findings]


def test_a_healthy_store_has_nothing_to_say() -> None:
    assert states(node_findings(WELL)) == [("nodes", "ok", "")]
    assert order_findings(WELL) + standby_findings(WELL) + breaker_findings(WELL) == []
    assert states(run_findings(WELL)) == [("runs", "ok", "llmo runs list")]


@pytest.mark.parametrize(
    ("members", "is_served", "state"),
    [
        ([], False, "error"),
        ([member("a", quiet_s=60)], True, "error"),
        ([member("a", quiet_s=60), member("b")], True, "warning"),
        ([member("a", state="dead")], False, "error"),
        ([member("file", beat=0, quiet_s=9_999)], True, "ok"),  # a lock says that it lives
        ([member("file", beat=0)], False, "error"),
    ],
)
def test_who_executes(members: list[Member], is_served: bool, state: str) -> None:
    seen = replace(WELL, members=members, is_served=is_served)
    assert [each.state for each in node_findings(seen)] == [state]


def test_runs_that_want_somebody_are_named_with_a_command() -> None:
    statistics = Statistics([Queue("slow", 3, NOW - 60 * SECOND)], stalled=2)
    seen = replace(
        WELL,
        census=[RunCount("running", "w", 2), RunCount("running", "v", 1)],
        statistics=statistics,
        paused=[paused("unknown_outcome"), paused("unknown_outcome"), paused("quarantine")],
    )
    found = run_findings(seen)
    assert found[0].finding == "3 running"
    assert states(found)[1:] == [
        ("queues", "error", "llmo runs list --state pending"),
        ("stalled", "warning", "llmo runs list --state running"),
        ("paused: quarantine", "warning", "llmo runs list --state paused"),
        ("paused: unknown_outcome", "warning", "llmo runs list --state paused"),
    ]
    assert "3 due runs wait" in found[1].finding
    fresh = replace(seen, statistics=Statistics([Queue("slow", 3, NOW - SECOND)]))
    assert "queues" not in [each.check for each in run_findings(fresh)]


def test_orders_lag_and_breakers_are_not_forgotten() -> None:
    standing = Standing(True, by="eve", reason="new disks", since=NOW - 7_200 * SECOND)
    orders = Orders(standing, {"node-1": {}})
    seen = replace(
        WELL,
        orders=orders,
        statistics=Statistics(standbys=[Standby("s1", True, 0, 0, 90.0)]),
        breakers=[BreakerView("openai/gpt", State.OPEN, 12.0), BreakerView("x/y", State.CLOSED)],
    )
    assert states(order_findings(seen)) == [
        ("maintenance", "warning", "llmo maintenance disable"),
        ("drained", "warning", "llmo nodes drain node-1 --undo"),
    ]
    assert order_findings(seen)[0].finding == "on since 2 h, by eve: new disks"
    assert states(standby_findings(seen)) == [("standby", "warning", "llmo doctor")]
    assert states(breaker_findings(seen)) == [("breaker", "warning", "llmo breakers list")]
