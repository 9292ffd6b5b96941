"""W1 to W7 on our engine, as a user would write them: `python -m bench.ours W1 --folder DIR`."""

from __future__ import annotations

import asyncio
import gc
import time
from pathlib import Path

from bench.measure import (
    CRASH_RUNS,
    FAN,
    IN_FLIGHT,
    SEQUENCE,
    STEPS,
    WAITING_RUNS,
    Meter,
    arguments,
    drive,
    finish,
    payload,
    rss_kb,
    say,
    size_of,
    until,
)
from llm_orchestrator import Context, Orchestrator, step, workflow
from llm_orchestrator.model import Json, RunState

WARM_UP_RUNS = 20
WAITING_WARM_UP = 5_000


class Flows:
    """The workflows of the benchmark; `size` is that of a step's result."""

    def __init__(self, size: int = 200, *, is_stuck: bool = False) -> None:
        result = payload(size)
        self.in_five = self.past_six = self.parked = 0

        @step
        async def no_op(number: int) -> object:
            return result

        @step
        async def five() -> object:
            self.in_five += 1
            if is_stuck:
                await asyncio.Event().wait()
            return result

        @workflow
        async def chain(ctx: Context, steps: int) -> int:
            for number in range(steps):
                await ctx.step(no_op, number)
            return steps

        @workflow
        async def fan(ctx: Context, width: int) -> int:
            return len(await ctx.gather(*(ctx.step(no_op, number) for number in range(width))))

        @workflow
        async def crash(ctx: Context) -> None:
            for number in range(4):
                await ctx.step(no_op, number)
            await ctx.step(five)
            await ctx.step(no_op, 6)
            self.past_six += 1
            for number in range(4):
                await ctx.step(no_op, number)

        @workflow
        async def sleeper(ctx: Context) -> None:
            await ctx.sleep(86_400)

        self.chain, self.fan, self.crash, self.sleeper = chain, fan, crash, sleeper

    def watch(self, run_id: str, what: str, step: str, attempt: int, data: dict[str, Json]) -> None:
        """Count the runs that have left to wait."""
        if what == RunState.WAITING and not step:
            self.parked += 1


async def chains(engine: Orchestrator, flows: Flows, runs: int) -> dict[str, float]:
    """W1 and W4."""

    async def one() -> None:
        await engine.run(flows.chain, {"steps": STEPS})

    await drive(one, WARM_UP_RUNS, WARM_UP_RUNS)
    writer = engine.node.writer
    batches, entries = writer.batches, writer.entries
    meter = Meter()
    await drive(one, runs, IN_FLIGHT)
    done = meter.per_step(runs * STEPS)
    done["rows_commit"] = round((writer.entries - entries) / (writer.batches - batches), 1)
    return done


async def sequence(engine: Orchestrator, flows: Flows) -> dict[str, float]:
    """W2."""
    await engine.run(flows.chain, {"steps": 5})
    meter = Meter()
    await engine.run(flows.chain, {"steps": SEQUENCE})
    return meter.per_step(SEQUENCE)


async def fan_out(engine: Orchestrator, flows: Flows) -> dict[str, float]:
    """W3."""
    await engine.run(flows.chain, {"steps": 5})
    meter = Meter()
    await engine.run(flows.fan, {"width": FAN})
    return meter.per_step(FAN)


async def waiting(engine: Orchestrator, flows: Flows) -> dict[str, float]:
    """W6: how much the process grows once its caches are full (that is what the warm-up does)."""

    async def one() -> None:
        await engine.start(flows.sleeper)

    async def get_waiting(runs: int) -> None:
        wanted = flows.parked + runs
        await drive(one, runs, 1_000)
        await until(lambda: flows.parked == wanted and not list(engine.node.driver.driven), 0.01)
        gc.collect()

    await get_waiting(WAITING_WARM_UP)
    before, start = rss_kb(), time.perf_counter()
    await get_waiting(WAITING_RUNS)
    took_s = time.perf_counter() - start
    grown = rss_kb() - before
    return {"kb_run": round(grown / WAITING_RUNS, 3), "all_waiting_s": round(took_s, 2)}


async def before_crash(engine: Orchestrator, flows: Flows) -> None:
    """W5 until the kill: every run is inside step 5."""
    for _ in range(CRASH_RUNS):
        await engine.start(flows.crash)
    await until(lambda: flows.in_five == CRASH_RUNS)
    say("READY")
    await asyncio.Event().wait()


async def after_crash(flows: Flows) -> None:
    """W5 after the kill: nobody but the engine does anything."""
    await until(lambda: flows.past_six >= CRASH_RUNS, 0.002)
    say("ADVANCED")
    finish()


async def work_on(work: str, file: Path, runs: int) -> dict[str, float]:
    """One workload on a store of its own; returns what was measured."""
    flows = Flows(size_of(work), is_stuck=work == "W5-before")
    publish = flows.watch if work == "W6" else None
    async with Orchestrator(
        f"sqlite:///{file}", workflows=[flows.crash], publish=publish
    ) as engine:
        if work in ("W1", "W4"):
            return await chains(engine, flows, runs)
        if work == "W2":
            return await sequence(engine, flows)
        if work == "W3":
            return await fan_out(engine, flows)
        if work == "W5-before":
            await before_crash(engine, flows)
        if work == "W5-after":
            await after_crash(flows)
        if work == "W6":
            return await waiting(engine, flows)
        await engine.run(flows.chain, {"steps": 1})  # W7
        say("HELLO")
    return {}


def main() -> None:
    chosen = arguments()
    finish(**asyncio.run(work_on(chosen.work, chosen.folder.resolve() / "ours.db", chosen.runs)))


if __name__ == "__main__":
    main()
