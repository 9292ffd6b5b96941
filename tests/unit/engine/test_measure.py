"""What is counted while runs are driven, on virtual time."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llm_orchestrator.engine.attempt import Attempt
from llm_orchestrator.engine.control import Operator
from llm_orchestrator.engine.measure import ClaimTimes
from llm_orchestrator.engine.mend import Mender
from llm_orchestrator.engine.node import Node
from llm_orchestrator.engine.replay import Fold
from llm_orchestrator.errors import RunFailed
from llm_orchestrator.model import MICROSECONDS, Entry, Journal, RunState, Usage
from llm_orchestrator.providers.base import Resume
from llm_orchestrator.telemetry.metrics import Metrics
from tests.store.support import HandClock
from tests.unit.engine.nodes import House
from tests.unit.engine.support import Engine, definition, virtually
from tests.unit.engine.test_mend import Lab

SLOW = [{"id": "it", "type": "work", "takes": 5.0, "output": ["value"]}]


def metrics_of(node: Node) -> Metrics:
    return node._services.metrics


def counted(metrics: Metrics, word: str) -> dict[tuple[str, ...], float]:
    return metrics.counters[word].values


def seen(metrics: Metrics, word: str, *labels: str) -> tuple[int, float]:
    """How many values a histogram has seen, and their sum."""
    found = metrics.histograms[word].seen[labels]
    return sum(found.counts), found.total


def test_steps_attempts_and_runs_are_counted_as_they_end(tmp_path: Path) -> None:
    quick = {"initial_delay_ms": 1, "jitter": 0}
    steps = [
        {"id": "it", "type": "work", "takes": 2.0, "fails": 1, "retry": quick},
        {"id": "no", "type": "work", "condition": "false"},
        {"id": "bad", "type": "work", "fails": 9, "retry": {"max_attempts": 1}},
    ]

    async def main() -> Metrics:
        async with Engine(tmp_path / "runs.db") as engine:
            run_id = await engine.begin(definition(steps=steps, on_failure="continue"))
            with pytest.raises(RunFailed):
                await engine.result(run_id)
            return engine.metrics

    metrics = virtually(main())
    assert counted(metrics, "steps_total") == {
        ("work", "completed"): 1,
        ("work", "skipped"): 1,
        ("work", "failed"): 1,
    }
    attempts = {("work", "ok"): 1, ("work", "transient"): 2}
    assert counted(metrics, "step_attempts_total") == attempts
    assert metrics.errors.values == {("transient", "work"): 2}
    count, total = seen(metrics, "step_duration_seconds", "work")
    assert (count, round(total, 1)) == (3, 4.0)
    assert counted(metrics, "runs_finished_total") == {("flow", "failed"): 1}
    count, total = seen(metrics, "run_duration_seconds", "flow")
    assert (count, round(total, 1)) == (1, 4.0)


def test_a_run_that_is_ended_while_nobody_drives_it_is_counted_by_who_ends_it(
    tmp_path: Path,
) -> None:
    async def main() -> Metrics:
        metrics = Metrics()
        async with Engine(tmp_path / "runs.db") as engine:
            run_id = await engine.begin(
                definition(steps=[{"id": "ear", "type": "wait", "signal": "never"}])
            )
            while (await engine.operator.state(run_id)).state is not RunState.WAITING:
                await engine.clock.sleep(0.1)
            await Operator(engine.store, engine.clock, metrics=metrics).cancel(run_id)
        return metrics

    assert counted(virtually(main()), "runs_finished_total") == {("flow", "cancelled"): 1}


def test_a_takeover_is_counted_with_its_time_and_with_what_is_paid_again() -> None:
    async def main() -> Metrics:
        house = House()
        await house.begin("first")
        run_id = await house.accept(definition(steps=SLOW))
        await house.until(lambda: house.homes["first"].work.running)
        second = await house.begin("second")
        await house.crash("first")
        await house.ends(run_id)
        await house.stop()
        assert second.work.calls["it"] == 1
        return metrics_of(second.node)

    metrics = virtually(main())
    assert counted(metrics, "takeovers_total") == {(): 1}
    count, total = seen(metrics, "recovery_time_seconds")
    assert (count, 0 <= total < 5) == (1, True)
    assert counted(metrics, "respent_usd_total") == {("other", "other"): 0.5}
    assert counted(metrics, "respent_tokens_total") == {("other", "other"): 2}


def test_nothing_is_paid_again_where_nobody_died() -> None:
    async def main() -> Metrics:
        house = House()
        only = await house.begin("only")
        steps = [{**SLOW[0], "fails": 1}]  # a failed attempt is known to have ended
        await house.ends(await house.accept(definition(steps=steps)))
        await house.stop()
        return metrics_of(only.node)

    metrics = virtually(main())
    assert counted(metrics, "takeovers_total") == {(): 0}
    assert counted(metrics, "respent_usd_total") == {}
    assert seen(metrics, "claim_latency_seconds")[0] == 1


@pytest.mark.parametrize(
    ("resume", "tokens", "cost_usd"),
    [
        (None, 100, 1.0),
        (Resume.RESTART, 100, 1.0),
        (Resume.PREFILL, 20, 0.2),
        (Resume.ATTACH, 0, 0),
    ],
)
def test_a_resumed_answer_is_paid_again_only_in_part(
    resume: Resume | None, tokens: int, cost_usd: float
) -> None:
    metrics, clock = Metrics(), HandClock()
    services = SimpleNamespace(clock=clock, metrics=metrics, spent=None, publish=None)
    execution: Any = SimpleNamespace(
        run_id="r", fold=Fold("r"), services=services, idempotency_key=lambda key: key
    )
    providers: Any = None
    attempt = Attempt(execution, "story", providers)
    attempt.asked = ("openai", "gpt")
    attempt.add_usage(Usage(20, 80, 0, 1.0))
    if resume is not None:
        attempt.note("resume", resume.value)
    attempt.respent()
    labels = ("openai", "gpt")
    assert counted(metrics, "respent_tokens_total").get(labels, 0) == tokens
    assert counted(metrics, "respent_usd_total").get(labels, 0) == pytest.approx(cost_usd)


class Times:
    """A node's claims, on a clock that the test moves."""

    def __init__(self) -> None:
        self.clock = HandClock()
        self.metrics = Metrics()
        self.times = ClaimTimes(self.metrics, self.clock)

    def later(self, seconds: float) -> None:
        self.clock.now += int(seconds * MICROSECONDS)

    def take_over(self, owner: str = "dead") -> None:
        state = Fold("r", state=RunState.RUNNING, owner=owner)
        self.times.driven(state, Journal("r", ()), "me")

    def claim(self, state: RunState, *, wake_at: int, last_at: int) -> tuple[int, float]:
        before = Fold("r", state=state, wake_at=wake_at)
        entry = Entry("r", 1, 1, "state", "", 0, b"", b"", last_at)
        self.times.driven(before, Journal("r", (entry,)), "me")
        return seen(self.metrics, "claim_latency_seconds")


def test_a_claim_waits_since_the_run_was_due_or_let_go() -> None:
    bench = Times()
    begun = bench.clock.now
    bench.later(10)
    assert bench.claim(RunState.PENDING, wake_at=0, last_at=begun) == (1, 10.0)
    due = begun + 7 * MICROSECONDS
    assert bench.claim(RunState.WAITING, wake_at=due, last_at=begun) == (2, 13.0)


def test_a_claim_of_a_run_that_a_message_woke_says_nothing() -> None:
    bench = Times()
    assert bench.claim(RunState.WAITING, wake_at=1 << 60, last_at=0) == (0, 0.0)


def test_recovery_counts_from_the_death_until_all_runs_are_taken() -> None:
    bench = Times()
    bench.times.saw_death()
    bench.later(4)
    bench.times.saw_death()  # another one, before the runs of the first are taken
    bench.times.look()
    bench.later(1)
    bench.take_over()
    assert seen(bench.metrics, "recovery_time_seconds") == (1, 5.0)
    bench.times.took_all()
    bench.later(100)
    bench.times.look()  # nobody told of this death: from here on
    bench.later(2)
    bench.take_over()
    assert seen(bench.metrics, "recovery_time_seconds") == (2, 7.0)
    bench.take_over("me")  # it had left for a moment: nobody died
    assert counted(bench.metrics, "takeovers_total") == {(): 2}


async def test_damage_is_counted_when_it_is_found_and_when_it_is_mended() -> None:
    lab = Lab()
    metrics = Metrics()
    lab.mender = Mender(lab.store, lab.writer, metrics=metrics)
    await lab.finished()
    lab.damage(3)
    await lab.mended()
    assert counted(metrics, "journal_damaged_total") == {(): 1}
    assert counted(metrics, "journal_mended_total") == {(): 1}
    await lab.mended()
    assert counted(metrics, "journal_damaged_total") == {(): 1}
