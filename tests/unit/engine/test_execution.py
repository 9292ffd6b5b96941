"""What becomes of one step: tries, waits, limits, unknown outcomes. On virtual time."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from llm_orchestrator import Context, step, workflow
from llm_orchestrator.engine.replay import fold
from llm_orchestrator.errors import (
    ProviderInvalidRequest,
    ProviderRateLimited,
    ProviderTransient,
    ProviderUnavailable,
    ProviderUnknownOutcome,
    RunFailed,
    RunPaused,
)
from llm_orchestrator.model import Retry
from tests.unit.engine.support import Engine, definition, provider_error, virtually

Json = Any


def one(**fields: Json) -> dict[str, Json]:
    """A definition's steps: one of type work."""
    return {"id": "it", "type": "work", **fields}


def run_one(folder: Path, errors: Sequence[BaseException] = (), **fields: Json) -> Engine:
    """Run a definition of one step to its end; the engine keeps the ledger."""
    engine = Engine(folder / "runs.db")
    engine.work.errors["it"] = list(errors)

    async def main() -> None:
        async with engine:
            run_id = await engine.begin(definition(steps=[one(**fields)]))
            try:
                engine.ended = "completed", await engine.result(run_id)
            except RunFailed as error:
                engine.ended = "failed", error.error
            engine.journal = await engine.entries(run_id)

    virtually(main())
    return engine


def gaps(engine: Engine) -> list[float]:
    times = engine.work.times["it"]
    return [round(later - sooner, 1) for sooner, later in itertools.pairwise(times)]


@pytest.mark.parametrize(
    ("backoff", "expected"),
    [
        ("constant", [10.0, 10.0, 10.0]),
        ("linear", [10.0, 20.0, 30.0]),
        ("exponential", [10.0, 20.0, 35.0]),
    ],
)
def test_delays_grow_as_the_policy_says_up_to_its_limit(
    tmp_path: Path, backoff: str, expected: list[float]
) -> None:
    retry = {
        "max_attempts": 4,
        "backoff": backoff,
        "initial_delay_ms": 10_000,
        "max_delay_ms": 35_000,
        "jitter": 0,
    }
    engine = run_one(tmp_path, fails=3, retry=retry)
    assert gaps(engine) == expected


def test_a_step_gives_up_after_its_last_attempt(tmp_path: Path) -> None:
    engine = run_one(tmp_path, fails=9, retry={"max_attempts": 3})
    assert engine.work.calls["it"] == 3
    assert engine.ended[0] == "failed"


def test_an_error_that_can_never_pass_is_not_tried_again(tmp_path: Path) -> None:
    engine = run_one(tmp_path, [provider_error(ProviderInvalidRequest)])
    assert engine.work.calls["it"] == 1


def test_retry_on_names_what_is_tried_again_and_nothing_else_is(tmp_path: Path) -> None:
    limited = [provider_error(ProviderRateLimited), provider_error(ProviderTransient)]
    engine = run_one(tmp_path, limited, retry={"max_attempts": 5, "retry_on": ["rate_limit"]})
    assert engine.work.calls["it"] == 2
    assert engine.ended[0] == "failed"


def test_the_providers_own_word_on_when_to_come_back_is_kept(tmp_path: Path) -> None:
    engine = run_one(tmp_path, [provider_error(ProviderRateLimited, retry_after_s=90.0)])
    assert gaps(engine) == [90.0]


def test_an_unavailable_provider_burns_no_attempt(tmp_path: Path) -> None:
    away = [provider_error(ProviderUnavailable, retry_after_s=600.0) for _ in range(7)]
    engine = run_one(tmp_path, [*away], retry={"max_attempts": 1})
    assert engine.ended[0] == "completed"
    assert {entry.attempt for entry in engine.journal if entry.kind == "intent"} == {1}
    state = fold(engine.journal[0].run_id, engine.journal)
    assert (state.attempts, state.repeats) == (1, 0)


def test_a_step_that_takes_too_long_is_cancelled_and_tried_again(tmp_path: Path) -> None:
    engine = run_one(tmp_path, takes=50.0, timeout_seconds=20, retry={"max_attempts": 2})
    assert engine.ended[0] == "failed"
    assert engine.work.calls["it"] == 2
    assert engine.work.running == 0


def test_usage_of_failed_attempts_is_kept(tmp_path: Path) -> None:
    engine = run_one(tmp_path, fails=1)
    [finished] = [entry for entry in engine.journal if entry.kind == "step_finished"]
    assert b'"cost_usd":0.5' in finished.payload


def test_a_budget_refuses_the_next_paid_step(tmp_path: Path) -> None:
    steps = [one(), {"id": "next", "type": "work", "depends_on": ["it"]}]

    async def main() -> None:
        async with Engine(tmp_path / "runs.db") as engine:
            made = definition(steps=steps, budget={"max_usd": 0.4})
            with pytest.raises(RunFailed, match=r"budget of \$0.4 is spent"):
                await engine.result(await engine.begin(made))
            assert engine.work.seen == ["it"]

    virtually(main())


# -- unknown outcomes -----------------------------------------------------------------------------


def unknown(folder: Path, policy: str, then: Sequence[BaseException] = ()) -> Engine:
    errors = [provider_error(ProviderUnknownOutcome), *then]
    return run_one(folder, errors, effect="once", on_unknown=policy)


def test_unknown_and_retry_is_issued_again(tmp_path: Path) -> None:
    engine = unknown(tmp_path, "retry")
    assert engine.ended[0] == "completed"
    assert engine.work.calls["it"] == 2


def test_unknown_and_fail_is_never_issued_again(tmp_path: Path) -> None:
    engine = unknown(tmp_path, "fail")
    assert engine.ended[1]["kind"] == "step_failed"
    assert engine.work.calls["it"] == 1


@pytest.mark.parametrize(
    ("choice", "calls", "state"),
    [("retry", 2, "completed"), ("finished", 1, "completed"), ("failed", 1, "failed")],
)
def test_unknown_and_ask_waits_for_a_person_and_obeys(
    tmp_path: Path, choice: Any, calls: int, state: str
) -> None:
    async def main() -> None:
        async with Engine(tmp_path / "runs.db") as engine:
            engine.work.errors["it"] = [provider_error(ProviderUnknownOutcome)]
            run_id = await engine.begin(definition(steps=[one(effect="once")]))
            with pytest.raises(RunPaused) as paused:
                await engine.result(run_id)
            assert paused.value.reason == "unknown_outcome"
            assert engine.work.calls["it"] == 1
            await engine.operator.decide(run_id, "it", choice, result={"value": "told"})
            try:
                output = await engine.result(run_id)
                assert output == {"it": {"value": "told" if choice == "finished" else "done"}}
                assert state == "completed"
            except RunFailed:
                assert state == "failed"
            assert engine.work.calls["it"] == calls

    virtually(main())


def is_broken() -> None:
    raise ConnectionError("the probe's server is away")


def test_a_probe_that_breaks_leaves_the_outcome_to_a_person(tmp_path: Path) -> None:
    probe = {"function": "tests.unit.engine.test_execution:is_broken"}

    async def main() -> None:
        async with Engine(tmp_path / "runs.db") as engine:
            engine.work.errors["it"] = [provider_error(ProviderUnknownOutcome)]
            asks = one(effect="once", on_unknown="probe", probe=probe)
            run_id = await engine.begin(definition(steps=[asks]))
            with pytest.raises(RunPaused, match="unknown_outcome"):
                await engine.result(run_id)
            assert engine.work.calls["it"] == 1

    virtually(main())


def test_a_failure_after_a_decision_to_retry_is_an_ordinary_failure(tmp_path: Path) -> None:
    async def main() -> None:
        async with Engine(tmp_path / "runs.db") as engine:
            engine.work.errors["it"] = [
                provider_error(ProviderUnknownOutcome),
                provider_error(ProviderTransient),
            ]
            run_id = await engine.begin(definition(steps=[one(effect="once")]))
            with pytest.raises(RunPaused):
                await engine.result(run_id)
            await engine.operator.decide(run_id, "it", "retry")
            assert await engine.result(run_id) == {"it": {"value": "done"}}
            assert engine.work.calls["it"] == 3

    virtually(main())


def test_asking_a_person_lets_paid_work_beside_it_end(tmp_path: Path) -> None:
    steps = [one(effect="once"), {"id": "beside", "type": "work", "takes": 30.0}]

    async def main() -> None:
        async with Engine(tmp_path / "runs.db") as engine:
            engine.work.errors["it"] = [provider_error(ProviderUnknownOutcome)]
            run_id = await engine.begin(definition(steps=steps))
            with pytest.raises(RunPaused):
                await engine.result(run_id)
            assert [key for key, _ in await engine.kinds(run_id, "step_finished")] == ["beside"]

    virtually(main())


def test_a_python_step_with_an_unknown_outcome_pauses_its_run(tmp_path: Path) -> None:
    @step(effect="once")
    async def send() -> None:
        raise ProviderUnknownOutcome("it went out")

    @workflow
    async def sender(ctx: Context) -> None:
        await ctx.step(send)

    async def main() -> None:
        async with Engine(tmp_path / "runs.db") as engine:
            with pytest.raises(RunPaused, match="unknown_outcome"):
                await engine.run(sender)

    virtually(main())


def test_foreign_errors_of_python_steps_are_tried_again_and_named(tmp_path: Path) -> None:
    calls = []

    @step(retry=Retry(max_attempts=3))
    async def broken() -> None:
        calls.append(1)
        raise LookupError("no such thing")

    @workflow
    async def breaker(ctx: Context) -> None:
        await ctx.step(broken)

    async def main() -> None:
        async with Engine(tmp_path / "runs.db") as engine:
            with pytest.raises(RunFailed, match="no such thing"):
                await engine.run(breaker)

    virtually(main())
    assert len(calls) == 3


def test_every_attempt_has_the_same_idempotency_key(tmp_path: Path) -> None:
    engine = run_one(tmp_path, fails=2)
    assert len(engine.work.keys) == 3
    assert len(set(engine.work.keys)) == 1
    assert engine.work.keys[0].endswith("/it")
