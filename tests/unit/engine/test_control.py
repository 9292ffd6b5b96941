"""What operators ask of runs: each request ends in the journal, whoever drives the run."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from llm_orchestrator import Context, step, workflow
from llm_orchestrator.engine.driver import NodeOptions
from llm_orchestrator.errors import NotFound, Overtaken, Refused, RunFailed, RunPaused
from llm_orchestrator.model import RunState
from llm_orchestrator.store.base import Batch, Outcome, QueueLimit, Receipt
from llm_orchestrator.store.sqlite import SQLiteStore
from tests.unit.engine.support import Engine, VirtualClock, definition, virtually

Json = Any


def work(name: str, *after: str, **fields: Json) -> dict[str, Json]:
    return {"id": name, "type": "work", "depends_on": list(after), "value": name, **fields}


def with_engine(folder: Path, test: Callable[[Engine], Awaitable[None]], **options: Any) -> Engine:
    engine = Engine(folder / "runs.db", **options)

    async def main() -> None:
        async with engine:
            await test(engine)

    virtually(main())
    return engine


async def state_of(engine: Engine, run_id: str) -> RunState:
    return (await engine.operator.state(run_id)).state


WAITS = definition(
    steps=[work("a"), {"id": "w", "type": "wait", "signal": "go", "depends_on": ["a"]}]
)


# -- cancel ---------------------------------------------------------------------------------------


def test_cancel_stops_work_in_flight(tmp_path: Path) -> None:
    async def test(engine: Engine) -> None:
        run_id = await engine.begin(definition(steps=[work("a", takes=1000.0)]))
        result = asyncio.ensure_future(engine.result(run_id))
        await VirtualClock().sleep(1)
        await engine.operator.cancel(run_id)
        with pytest.raises(RunFailed, match="cancelled"):
            await result
        assert engine.work.running == 0
        assert await state_of(engine, run_id) is RunState.CANCELLED

    with_engine(tmp_path, test)


@pytest.mark.parametrize("request_name", ["cancel", "pause"])
def test_whoever_waits_hears_of_a_parked_runs_end(tmp_path: Path, request_name: str) -> None:
    async def test(engine: Engine) -> None:
        run_id = await engine.begin(WAITS)
        result = asyncio.ensure_future(engine.result(run_id))
        await engine.happens("waiting")
        await getattr(engine.operator, request_name)(run_id)
        with pytest.raises((RunFailed, RunPaused)):
            await result

    with_engine(tmp_path, test)


class Crossing(SQLiteStore):
    """A store in which something else happens just before a run's last entry lands."""

    first: Callable[[], Awaitable[None]] | None = None

    async def commit(self, batch: Batch) -> Receipt:
        states = [append.change.state for append in batch.appends if append.change]
        if RunState.COMPLETED in states and self.first is not None:
            first, self.first = self.first, None
            await first()
        return await super().commit(batch)


def test_a_cancel_that_crosses_the_runs_last_entry_comes_too_late(tmp_path: Path) -> None:
    store = Crossing(tmp_path / "runs.db", node_id="crossing", clock=VirtualClock())

    async def test(engine: Engine) -> None:
        run_id = await engine.begin(definition(steps=[work("a", takes=5.0)]))

        async def cancel() -> None:
            await engine.operator.cancel(run_id)
            await VirtualClock().sleep(1)

        store.first = cancel
        assert await engine.result(run_id) == {"a": {"value": "a"}}
        assert await state_of(engine, run_id) is RunState.COMPLETED
        assert (run_id, "completed", "") in engine.events

    with_engine(tmp_path, test, store=store)


@workflow(name="inner")
async def inner(ctx: Context) -> str:
    return str(await ctx.wait_signal("never"))


@workflow(name="outer")
async def outer(ctx: Context) -> str:
    return await ctx.run(inner)


async def _family(engine: Engine) -> tuple[str, str]:
    """A parent that waits for a child that waits for a signal; both parked."""
    parent = await engine.start(outer)
    await engine.happens("waiting", times=2)
    [child] = [run for run in await engine.store.look.run_ids() if run != parent]
    return parent, child


def test_cancelling_a_parent_cancels_its_children(tmp_path: Path) -> None:
    async def test(engine: Engine) -> None:
        parent, child = await _family(engine)
        await engine.operator.cancel(parent)
        assert await state_of(engine, parent) is RunState.CANCELLED
        assert await state_of(engine, child) is RunState.CANCELLED

    with_engine(tmp_path, test)


def test_a_parent_hears_that_its_parked_child_was_cancelled(tmp_path: Path) -> None:
    async def test(engine: Engine) -> None:
        parent, child = await _family(engine)
        await engine.operator.cancel(child)
        with pytest.raises(RunFailed, match="ended cancelled"):
            await engine.result(parent)

    with_engine(tmp_path, test)


# -- pause, resume --------------------------------------------------------------------------------


def test_pause_lets_work_in_flight_end_and_starts_nothing(tmp_path: Path) -> None:
    steps = [work("slow", takes=100.0), work("quick", takes=10.0), work("next", "quick")]

    async def test(engine: Engine) -> None:
        run_id = await engine.begin(definition(steps=steps))
        await VirtualClock().sleep(1)
        await engine.operator.pause(run_id)
        with pytest.raises(RunPaused, match="operator"):
            await engine.result(run_id)
        finished = [key for key, _ in await engine.kinds(run_id, "step_finished")]
        assert finished == ["quick", "slow"]
        await engine.operator.resume(run_id)
        await engine.result(run_id)
        assert engine.work.calls == {"slow": 1, "quick": 1, "next": 1}

    with_engine(tmp_path, test)


def test_pause_of_a_python_workflow_lets_each_branch_end_its_step(tmp_path: Path) -> None:
    done: list[str] = []

    @step
    async def take(name: str, seconds: float) -> str:
        await VirtualClock().sleep(seconds)
        done.append(name)
        return name

    @workflow
    async def both(ctx: Context) -> list[str]:
        async def branch() -> str:
            await ctx.step(take, "quick", 10.0)
            return await ctx.step(take, "next", 1.0)

        return await ctx.gather(ctx.step(take, "slow", 100.0), branch())

    async def test(engine: Engine) -> None:
        run_id = await engine.start(both)
        await VirtualClock().sleep(1)
        await engine.operator.pause(run_id)
        with pytest.raises(RunPaused):
            await engine.result(run_id)
        assert done == ["quick", "slow"]
        await engine.operator.resume(run_id)
        assert await engine.result(run_id) == ["slow", "next"]
        assert done == ["quick", "slow", "next"]

    with_engine(tmp_path, test)


def test_what_does_not_fit_the_runs_state_is_refused(tmp_path: Path) -> None:
    async def test(engine: Engine) -> None:
        run_id = await engine.begin(definition(steps=[work("a")]))
        await engine.result(run_id)
        for request in (engine.operator.cancel, engine.operator.pause, engine.operator.resume):
            with pytest.raises(Refused, match="completed"):
                await request(run_id)
        with pytest.raises(Refused, match="takes no signals"):
            await engine.operator.signal(run_id, "go")
        with pytest.raises(NotFound):
            await engine.operator.pause("nobody")

    with_engine(tmp_path, test)


# -- retry, rewind, fork --------------------------------------------------------------------------


def test_retry_goes_on_from_the_step_that_failed(tmp_path: Path) -> None:
    async def test(engine: Engine) -> None:
        steps = [work("a"), work("b", "a", fails=1, retry={"max_attempts": 1}), work("c", "b")]
        run_id = await engine.begin(definition(steps=steps))
        with pytest.raises(RunFailed):
            await engine.result(run_id)
        engine.work.errors["b"] = []
        await engine.operator.retry(run_id)
        with pytest.raises(RunFailed):  # attempt 1 again: it fails as its definition says
            await engine.result(run_id)
        assert engine.work.calls == {"a": 1, "b": 2}

    with_engine(tmp_path, test)


def test_rewind_hides_what_came_after_and_does_it_again(tmp_path: Path) -> None:
    async def test(engine: Engine) -> None:
        run_id = await engine.begin(definition(steps=[work("a"), work("b", "a"), work("c", "b")]))
        await engine.result(run_id)
        before = await engine.entries(run_id)
        [point] = [entry.seq for entry in before if entry.step == "a" and "finished" in entry.kind]
        await engine.operator.rewind(run_id, point)
        assert await engine.result(run_id) == {"c": {"value": "c"}}
        assert engine.work.calls == {"a": 1, "b": 2, "c": 2}
        after = await engine.entries(run_id)
        assert after[: len(before)] == before
        assert after[-1].epoch > before[-1].epoch
        with pytest.raises(NotFound, match="no checkpoint"):
            await engine.operator.rewind(run_id, len(after))

    with_engine(tmp_path, test)


def test_a_rewind_delivers_signals_again(tmp_path: Path) -> None:
    steps = [
        work("a"),
        {"id": "w", "type": "wait", "signal": "go", "depends_on": ["a"]},
        {
            "id": "last",
            "type": "transform",
            "function": "template",
            "template": "got {{ steps.w.payload }}",
        },
    ]

    async def test(engine: Engine) -> None:
        run_id = await engine.begin(definition(steps=steps))
        await engine.operator.signal(run_id, "go", "this")
        assert await engine.result(run_id) == {"last": {"result": "got this"}}
        await engine.operator.rewind(run_id, 1)
        assert await engine.result(run_id) == {"last": {"result": "got this"}}
        assert engine.work.calls == {"a": 2}

    with_engine(tmp_path, test)


def test_a_fork_shares_what_came_before_and_may_have_other_inputs(tmp_path: Path) -> None:
    steps = [
        work("a"),
        {
            "id": "b",
            "type": "transform",
            "function": "template",
            "depends_on": ["a"],
            "template": "for {{ inputs.who }}",
        },
    ]

    async def test(engine: Engine) -> None:
        run_id = await engine.begin(definition(steps=steps), {"who": "ann"})
        assert await engine.result(run_id) == {"b": {"result": "for ann"}}
        fork = await engine.operator.fork(run_id, "b", inputs={"who": "bob"})
        assert await engine.result(fork) == {"b": {"result": "for bob"}}
        assert engine.work.calls == {"a": 1}
        assert (await engine.operator.state(fork)).usage.cost_usd == 0

    with_engine(tmp_path, test)


# -- signals --------------------------------------------------------------------------------------


def test_a_signal_wakes_a_parked_run_and_a_repeat_changes_nothing(tmp_path: Path) -> None:
    async def test(engine: Engine) -> None:
        run_id = await engine.begin(WAITS)
        await engine.happens("waiting")
        assert list(engine.node.driver.driven) == []
        for _ in range(2):
            await engine.operator.signal(run_id, "other", 1, sender_key="same")
        await engine.operator.signal(run_id, "go", "word", sender_key="go")
        assert await engine.result(run_id) == {"w": {"payload": "word"}}
        assert len(await engine.store.look.inbox(run_id)) == 1  # "other", once, never asked for

    with_engine(tmp_path, test)


def test_a_signal_in_one_branch_is_not_slept_through_by_the_other(tmp_path: Path) -> None:
    """The branch that got its message goes on at once, though another waits for an hour."""
    steps = [
        {"id": "hour", "type": "wait", "seconds": 3600},
        {"id": "w", "type": "wait", "signal": "go"},
        work("then", "w"),
    ]

    async def test(engine: Engine) -> None:
        run_id = await engine.begin(definition(steps=steps))
        await engine.happens("waiting")
        await VirtualClock().sleep(100)
        await engine.operator.signal(run_id, "go")
        await engine.result(run_id)
        [moment] = engine.work.times["then"]
        assert moment < 200

    with_engine(tmp_path, test)


def test_an_approval_refuses_a_bad_form_and_takes_the_next(tmp_path: Path) -> None:
    steps = [{"id": "gate", "type": "approval", "form": {"why": "string"}}]

    async def test(engine: Engine) -> None:
        run_id = await engine.begin(definition(steps=steps))
        await engine.happens("waiting")
        await engine.operator.approve(run_id, None, approved=True, form={"why": 7}, by="bob")
        await engine.happens("refused", "gate")
        await engine.operator.approve(run_id, "gate", approved=True, form={"why": "so"}, by="ann")
        output = await engine.result(run_id)
        assert output == {"gate": {"approved": True, "form": {"why": "so"}, "by": "ann"}}
        with pytest.raises(NotFound, match="does not wait for approval"):
            await engine.operator.approve(run_id, "gate", approved=True, by="ann")

    with_engine(tmp_path, test)


# -- accepting ------------------------------------------------------------------------------------


@workflow(name="counting")
async def counting(ctx: Context, number: int = 0) -> int:
    return number


def test_an_idempotency_key_gives_the_same_run_and_refuses_another_input(tmp_path: Path) -> None:
    async def test(engine: Engine) -> None:
        first = await engine.start(counting, {"number": 1}, idempotency_key="one")
        again = await engine.start(counting, {"number": 1}, idempotency_key="one")
        assert first == again
        with pytest.raises(Refused, match="another input"):
            await engine.start(counting, {"number": 2}, idempotency_key="one")
        assert len(await engine.store.look.run_ids()) == 1

    with_engine(tmp_path, test)


def test_a_higher_priority_starts_first_when_there_is_no_room(tmp_path: Path) -> None:
    async def test(engine: Engine) -> None:
        busy = await engine.begin(definition("busy", steps=[work("busy", takes=10.0)]))
        flows = {
            name: await engine.begin(definition(name, steps=[work(name)]), priority=priority)
            for name, priority in (("low", -5), ("mid", 0), ("high", 5))
        }
        for run_id in (busy, *flows.values()):
            await engine.result(run_id)
        assert engine.work.seen == ["busy", "high", "mid", "low"]

    with_engine(tmp_path, test, options=NodeOptions(runs_max=1))


def test_a_queues_limit_holds_its_runs_and_no_others(tmp_path: Path) -> None:
    async def test(engine: Engine) -> None:
        slow = [
            await engine.begin(
                definition(f"slow{number}", steps=[work(f"slow{number}", takes=10.0)]),
                queue="narrow",
            )
            for number in range(4)
        ]
        other = await engine.begin(definition("other", steps=[work("other")]))
        await engine.result(other)
        assert VirtualClock().monotonic() < 10
        for run_id in slow:
            await engine.result(run_id)
        assert engine.work.running_max <= 2  # one of the queue, and the other
        assert VirtualClock().monotonic() >= 40

    with_engine(tmp_path, test, options=NodeOptions(queues={"narrow": QueueLimit(concurrency=1)}))


def test_a_full_queue_keeps_no_parked_run_of_another_queue_asleep(tmp_path: Path) -> None:
    async def test(engine: Engine) -> None:
        for number in range(12):
            await engine.begin(
                definition(f"slow{number}", steps=[work(f"slow{number}", takes=1000.0)]),
                queue="narrow",
            )
        waiting = await engine.begin(WAITS)
        await engine.happens("waiting")
        await engine.operator.signal(waiting, "go")
        await engine.result(waiting)
        assert VirtualClock().monotonic() < 1000

    with_engine(
        tmp_path,
        test,
        options=NodeOptions(runs_max=5, queues={"narrow": QueueLimit(concurrency=1)}),
    )


# -- parking --------------------------------------------------------------------------------------


def test_waiting_runs_leave_memory_and_timers_survive_restarts(tmp_path: Path) -> None:
    steps = [{"id": "rest", "type": "wait", "seconds": 3600}, work("after", "rest")]
    started: list[str] = []

    async def begin(engine: Engine) -> None:
        started.append(await engine.begin(definition(steps=steps)))
        await engine.happens("waiting")
        assert list(engine.node.driver.driven) == []

    with_engine(tmp_path, begin)

    async def go_on(engine: Engine) -> None:
        await engine.result(started[0])
        assert 3500 < VirtualClock().monotonic() < 3700

    with_engine(tmp_path, go_on)


def test_a_run_that_takes_longer_than_its_limit_fails_even_while_it_is_parked(
    tmp_path: Path,
) -> None:
    async def test(engine: Engine) -> None:
        made = definition(
            steps=[{"id": "w", "type": "wait", "signal": "never"}], timeout_seconds=600
        )
        with pytest.raises(RunFailed, match="longer than its 600 s"):
            await engine.result(await engine.begin(made))
        assert 599 < VirtualClock().monotonic() < 700

    with_engine(tmp_path, test)


def test_a_wait_for_a_signal_may_time_out(tmp_path: Path) -> None:
    async def test(engine: Engine) -> None:
        wait = {"id": "w", "type": "wait", "signal": "go", "timeout_seconds": 300}
        with pytest.raises(RunFailed, match="no signal 'go' came within 300 s"):
            await engine.result(await engine.begin(definition(steps=[wait])))

    with_engine(tmp_path, test)


def test_closing_the_engine_releases_its_runs_and_the_next_one_goes_on(tmp_path: Path) -> None:
    started: list[str] = []

    async def begin(engine: Engine) -> None:
        made = definition(steps=[work("a", takes=1.0), work("b", "a", takes=1.0)])
        started.append(await engine.begin(made))
        await VirtualClock().sleep(0.5)

    first = with_engine(tmp_path, begin)
    assert first.work.calls == {"a": 1}

    async def go_on(engine: Engine) -> None:
        await engine.result(started[0])

    second = with_engine(tmp_path, go_on)
    assert second.work.calls == {"b": 1}


# -- overtaken ------------------------------------------------------------------------------------


def test_a_request_that_is_always_overtaken_names_the_epoch(tmp_path: Path) -> None:
    async def test(engine: Engine) -> None:
        run_id = await engine.begin(WAITS)
        while await state_of(engine, run_id) is not RunState.WAITING:
            await VirtualClock().sleep(1)

        async def commit(batch: Batch) -> Receipt:
            return Receipt({append.run_id: Outcome.FENCED for append in batch.appends})

        engine.store.commit = commit  # type: ignore[method-assign]
        with pytest.raises(Overtaken, match="keeps changing hands") as raised:
            await engine.operator.cancel(run_id)
        found = await engine.store.look.run(run_id)
        assert found is not None
        assert raised.value.epoch == found.epoch > 0
        del engine.store.commit
        await engine.operator.cancel(run_id)

    with_engine(tmp_path, test)
