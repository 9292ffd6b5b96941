"""W1 to W5 on Absurd (PostgreSQL only), one worker, which is one connection, as its SDK works.

In W5 its lease of 120 seconds, the default, has to run out before anybody goes on.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from itertools import count
from pathlib import Path
from typing import Any

from absurd_sdk import AsyncAbsurd

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
CLAIM_TIMEOUT_S = 120
counts = {"in_five": 0, "past_six": 0}
numbers = count()
ends: dict[int, asyncio.Future[None]] = {}


async def no_op() -> Any:
    return RESULT


async def five() -> Any:
    counts["in_five"] += 1
    if CHOSEN.work == "W5-before":
        await asyncio.sleep(3600)
    return RESULT


def make_app() -> AsyncAbsurd:
    app = AsyncAbsurd(CHOSEN.store, queue_name="bench")

    @app.register_task("chain")
    async def chain(given: Any, context: Any) -> None:
        for number in range(given["steps"]):
            await context.step(f"s{number}", no_op)
        ends[given["run"]].set_result(None)

    @app.register_task("fan")
    async def fan(given: Any, context: Any) -> None:
        await asyncio.gather(*(context.step(f"s{n}", no_op) for n in range(given["steps"])))
        ends[given["run"]].set_result(None)

    @app.register_task("crash")
    async def crash(given: Any, context: Any) -> None:
        for number in range(4):
            await context.step(f"s{number}", no_op)
        await context.step("five", five)
        await context.step("six", no_op)
        counts["past_six"] += 1
        for number in range(4):
            await context.step(f"t{number}", no_op)

    return app


async def run(client: AsyncAbsurd, task: str, steps: int) -> None:
    number = next(numbers)
    ends[number] = asyncio.get_running_loop().create_future()
    await client.spawn(task, {"run": number, "steps": steps})
    await ends[number]


def start_worker(concurrency: int) -> asyncio.Task[Any]:
    return asyncio.create_task(
        make_app().start_worker(
            worker_id=f"worker-{os.getpid()}",
            concurrency=concurrency,
            claim_timeout=CLAIM_TIMEOUT_S,
        )
    )


async def crash(client: AsyncAbsurd) -> None:
    name = "past_six"
    if CHOSEN.work == "W5-before":
        name = "in_five"
        for _ in range(CRASH_RUNS):
            await client.spawn("crash", {})
    worker = start_worker(CRASH_RUNS)
    await until(lambda: counts[name] >= CRASH_RUNS)
    say("READY" if name == "in_five" else "ADVANCED")
    if name == "in_five":
        await worker
    finish()


def make_tables() -> None:
    subprocess.run(
        [Path(sys.executable).with_name("absurdctl"), "init"],
        check=True,
        env={**os.environ, "PGDATABASE": CHOSEN.store},
        stdout=subprocess.DEVNULL,
    )


async def main() -> None:
    work = CHOSEN.work
    client = make_app()
    if work != "W5-after":
        await client.create_queue("bench")
    if work.startswith("W5"):
        await crash(client)
    worker = start_worker(in_flight(work))
    await run(client, "chain", 5)
    meter = Meter()
    if work == "W2":
        await run(client, "chain", SEQUENCE)
        finish(**meter.per_step(SEQUENCE))
    if work == "W3":
        await run(client, "fan", FAN)
        finish(**meter.per_step(FAN))
    await drive(lambda: run(client, "chain", STEPS), CHOSEN.runs, in_flight(work))
    finish(**meter.per_step(CHOSEN.runs * STEPS))
    worker.cancel()


if __name__ == "__main__":
    if CHOSEN.work != "W5-after":
        make_tables()
    asyncio.run(main())
