"""W1 to W5 and W7 on DBOS with SQLite or PostgreSQL, its defaults otherwise."""

from __future__ import annotations

import asyncio
from typing import Any

from dbos import DBOS

from bench.measure import (
    CRASH_RUNS,
    FAN,
    SEQUENCE,
    STEPS,
    Meter,
    arguments,
    drive,
    finish,
    in_flight,
    payload,
    say,
    size_of,
    until,
)

CHOSEN = arguments()
RESULT = payload(size_of(CHOSEN.work))
IN_FLIGHT_20_KB = 20  # it is slower with more
DBOS(
    config={
        "name": "bench",
        "system_database_url": CHOSEN.store or f"sqlite:///{CHOSEN.folder / 'dbos.sqlite'}",
        "log_level": "ERROR",
        "application_version": "1",
    }
)
counts = {"in_five": 0, "past_six": 0}


@DBOS.step()
async def no_op(number: int) -> Any:
    return RESULT


@DBOS.step()
async def five() -> Any:
    counts["in_five"] += 1
    if CHOSEN.work == "W5-before":
        await asyncio.sleep(3600)
    return RESULT


@DBOS.workflow()
async def chain(steps: int) -> int:
    for number in range(steps):
        await no_op(number)
    return steps


@DBOS.workflow()
async def fan(width: int) -> int:
    return len(await asyncio.gather(*(no_op(number) for number in range(width))))


@DBOS.workflow()
async def crash() -> None:
    for number in range(4):
        await no_op(number)
    await five()
    await no_op(6)
    counts["past_six"] += 1
    for number in range(4):
        await no_op(number)


async def run(function: Any, argument: int) -> None:
    handle = await DBOS.start_workflow_async(function, argument)
    await handle.get_result()


async def main() -> None:
    work = CHOSEN.work
    DBOS.launch()
    if work == "W5-before":
        for _ in range(CRASH_RUNS):
            await DBOS.start_workflow_async(crash)
        await until(lambda: counts["in_five"] >= CRASH_RUNS)
        say("READY")
        await asyncio.sleep(3600)
    if work == "W5-after":
        await until(lambda: counts["past_six"] >= CRASH_RUNS)
        say("ADVANCED")
        finish()
    if work == "W7":
        await run(chain, 1)
        say("HELLO")
        finish()
    await run(chain, 5)
    meter = Meter()
    if work in ("W1", "W1.500", "W4"):
        at_once = IN_FLIGHT_20_KB if work == "W4" else in_flight(work)
        await drive(lambda: run(chain, STEPS), CHOSEN.runs, at_once)
        finish(**meter.per_step(CHOSEN.runs * STEPS))
    if work == "W2":
        await run(chain, SEQUENCE)
        finish(**meter.per_step(SEQUENCE))
    await run(fan, FAN)
    finish(**meter.per_step(FAN))


if __name__ == "__main__":
    asyncio.run(main())
