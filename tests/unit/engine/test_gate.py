"""Who may start, who may end, and when a run parks: on virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from llm_orchestrator.engine.gate import NEVER, PARK_S, Gate
from llm_orchestrator.engine.machine import Event, Happening
from llm_orchestrator.errors import Suspended
from tests.unit.engine.support import VirtualClock, virtually

PAUSE = Happening(Event.PAUSE, "operator")
CANCEL = Happening(Event.CANCEL, "requested")


async def drive(body: Callable[[Gate], Awaitable[str]]) -> tuple[Gate, str]:
    """Run `body` as a run's code; ("left") when the gate made it leave."""
    gate = Gate("run", VirtualClock())

    async def run() -> str:
        return await body(gate)

    task = asyncio.ensure_future(run())
    gate.task = task
    try:
        return gate, await task
    except (asyncio.CancelledError, Suspended):
        return gate, "left"


def driven(body: Callable[[Gate], Awaitable[str]]) -> tuple[Gate, str]:
    return virtually(drive(body))


def in_a_second() -> int:
    return VirtualClock.START_US + int(PARK_S * 1e6)


def test_a_long_wait_parks_the_run_until_its_moment() -> None:
    async def body(gate: Gate) -> str:
        await gate.wait("timer", in_a_second() * 2)
        return "went on"

    gate, end = driven(body)
    assert end == "left"
    assert gate.stop is not None
    assert (gate.stop.event, gate.stop.reason) == (Event.WAIT, "timer")


def test_the_earliest_of_several_waits_wakes_the_run() -> None:
    async def body(gate: Gate) -> str:
        soon = in_a_second() + 5_000_000
        event: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        await asyncio.gather(
            gate.wait("a", soon + 7), gate.wait("b", NEVER, event), gate.wait("c", soon)
        )
        return "went on"

    gate, end = driven(body)
    assert end == "left"
    assert gate.stop is not None
    assert (gate.stop.wake_at, gate.stop.reason) == (in_a_second() + 5_000_000, "timer")


def test_a_run_that_parks_says_which_breakers_it_waits_for() -> None:
    async def body(gate: Gate) -> str:
        later = in_a_second() * 2
        waits = [gate.wait_for_breaker(key, later, key) for key in ("b/x", "a/x")]
        await asyncio.gather(*waits, gate.wait_for_breaker("retry", later, ""))
        return "went on"

    gate, end = driven(body)
    assert end == "left"
    assert gate.stop is not None
    assert gate.stop.reason == "provider"
    assert gate.stop.data == {"breakers": ["a/x", "b/x"]}
    assert gate.shut == frozenset()


def test_a_closed_breaker_ends_the_wait_for_it_and_no_other() -> None:
    async def body(gate: Gate) -> str:
        gate.enter()  # something else is in flight: it does not park
        later = in_a_second() * 2
        shut = asyncio.ensure_future(gate.wait_for_breaker("a", later, "a/x"))
        other = asyncio.ensure_future(gate.wait_for_breaker("b", later, "b/x"))
        await asyncio.sleep(0)
        assert gate.shut == {"a/x", "b/x"}
        assert not gate.release("c/x")
        assert gate.release("a/x")
        await shut
        assert gate.shut == {"b/x"}
        assert not other.done()
        other.cancel()
        return "went on"

    assert driven(body)[1] == "went on"


def test_a_short_wait_stays_in_memory() -> None:
    async def body(gate: Gate) -> str:
        await gate.wait("timer", in_a_second() - 200_000)
        return "went on"

    assert driven(body)[1] == "went on"


def test_a_message_ends_a_wait_before_its_moment() -> None:
    async def body(gate: Gate) -> str:
        event: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_later(0.005, event.set_result, None)
        await gate.wait("signal", NEVER, event)
        return "heard"

    assert driven(body)[1] == "heard"


def test_a_wait_for_somebody_parks_with_what_it_has_seen() -> None:
    async def body(gate: Gate) -> str:
        gate.inbox_seen = 4
        event: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        await gate.wait("signal", NEVER, event)
        return "heard"

    gate, end = driven(body)
    assert end == "left"
    assert gate.stop is not None
    assert (gate.stop.reason, gate.stop.inbox_seen, gate.stop.wake_at) == ("signal", 4, NEVER)


def test_a_run_does_not_park_while_something_executes() -> None:
    async def body(gate: Gate) -> str:
        async def work() -> None:
            gate.enter()
            await VirtualClock().sleep(50)
            gate.leave()

        async def wait() -> None:
            await gate.wait("timer", in_a_second() + 40_000_000)

        await asyncio.gather(work(), wait())
        return "went on"

    assert driven(body)[1] == "went on"


def test_a_pause_lets_work_in_flight_end_and_starts_nothing() -> None:
    ended: list[str] = []

    async def body(gate: Gate) -> str:
        gate.enter()
        gate.request_stop(PAUSE)
        with pytest.raises(Suspended):
            gate.enter()
        await VirtualClock().sleep(10)
        ended.append("work")
        gate.leave()
        await VirtualClock().sleep(10)
        return "went on"

    gate, end = driven(body)
    assert (end, ended, gate.stop) == ("left", ["work"], PAUSE)


def test_a_cancel_stops_work_in_flight_at_once_and_outranks_a_pause() -> None:
    async def body(gate: Gate) -> str:
        gate.enter()
        gate.request_stop(PAUSE)
        gate.request_stop(CANCEL, at_once=True)
        await VirtualClock().sleep(10)
        return "went on"

    gate, end = driven(body)
    assert (end, gate.stop) == ("left", CANCEL)


def test_the_first_request_counts_unless_another_is_at_once() -> None:
    async def body(gate: Gate) -> str:
        gate.enter()
        gate.request_stop(PAUSE)
        gate.request_stop(Happening(Event.RELEASE))
        gate.leave()
        await VirtualClock().sleep(10)
        return "went on"

    assert driven(body)[0].stop == PAUSE


def test_whoever_wants_to_start_while_the_run_leaves_is_held() -> None:
    async def body(gate: Gate) -> str:
        async def late() -> str:
            await gate.hold()
            return "started"

        gate.enter()
        gate.request_stop(PAUSE)
        asyncio.get_running_loop().call_later(5, gate.leave)
        return await late()

    assert driven(body)[1] == "left"


def test_no_stop_interrupts_the_entry_with_which_a_run_leaves() -> None:
    async def body(gate: Gate) -> str:
        gate.close()
        gate.request_stop(CANCEL, at_once=True)
        await VirtualClock().sleep(1)
        return "wrote its end"

    assert driven(body)[1] == "wrote its end"
