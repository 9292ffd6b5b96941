"""Slots bound how many steps execute, and lose none."""

from __future__ import annotations

import asyncio

from llm_orchestrator.engine.slots import Slots


async def test_no_more_than_its_slots_are_out_and_all_get_their_turn() -> None:
    slots, inside, most, served = Slots(3), 0, 0, 0

    async def work() -> None:
        nonlocal inside, most, served
        if not slots.take():
            await slots.wait()
        inside += 1
        most = max(most, inside)
        await asyncio.sleep(0)
        inside -= 1
        served += 1
        slots.give()

    await asyncio.gather(*(work() for _ in range(50)))
    assert (most, served) == (3, 50)


async def test_a_slot_handed_to_a_waiter_that_was_cancelled_goes_on_to_the_next() -> None:
    slots = Slots(1)
    assert slots.take()
    first = asyncio.create_task(slots.wait())
    second = asyncio.create_task(slots.wait())
    await asyncio.sleep(0)
    slots.give()
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    await asyncio.wait_for(second, 1)
    slots.give()
    assert slots.take()
