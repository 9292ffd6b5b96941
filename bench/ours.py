"""W1 to W9 on our engine, as a user would write them: `python -m bench.ours W1 --folder DIR`."""

from __future__ import annotations

import asyncio
import gc
import os
import time
from dataclasses import replace

from bench.measure import (
    CRASH_RUNS,
    FAN,
    SEQUENCE,
    WAITING_RUNS,
    Meter,
    arguments,
    drive,
    finish,
    in_flight,
    payload,
    rss_kb,
    say,
    size_of,
    steps_of,
    until,
)
from llm_orchestrator import Context, Orchestrator, step, workflow
from llm_orchestrator.config import Config
from llm_orchestrator.language.code import CodeWorkflow
from llm_orchestrator.model import Json, RunState

WARM_UP_RUNS = 20
WAITING_WARM_UP = 5_000
PINGS = 100
PING_PAUSE_S = 0.03


class Flows:
    """The workflows of the benchmark; `size` is that of a step's result."""

    def __init__(self, size: int = 200, *, is_stuck: bool = False) -> None:
        result = payload(size)
        self.in_five = self.past_six = self.parked = 0
        self.begun: dict[int, int] = {}

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
        self.ping = self._make_ping()

    def _make_ping(self) -> CodeWorkflow[None]:
        @step
        async def note(number: int) -> None:
            self.begun[number] = time.monotonic_ns()

        @workflow
        async def ping(ctx: Context, number: int) -> None:
            await ctx.step(note, number)

        return ping

    def watch(self, run_id: str, what: str, step: str, attempt: int, data: dict[str, Json]) -> None:
        """Count the runs that have left to wait."""
        if what == RunState.WAITING and not step:
            self.parked += 1


async def chains(engine: Orchestrator, flows: Flows, work: str, runs: int) -> dict[str, float]:
    """W1, W4 and W8."""
    steps = steps_of(work)

    async def one() -> None:
        await engine.run(flows.chain, {"steps": steps})

    await drive(one, WARM_UP_RUNS, WARM_UP_RUNS)
    writer = engine.node.writer
    batches, entries = writer.batches, writer.entries
    meter = Meter()
    await drive(one, runs, in_flight(work))
    done = meter.per_step(runs * steps)
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
    say("UP")
    await until(lambda: flows.past_six >= CRASH_RUNS, 0.002)
    say("ADVANCED")
    finish()


async def answer(flows: Flows) -> None:
    """W9, the node: says when it began the first step of each run that the client accepted."""
    say("UP")
    await until(lambda: len(flows.begun) > PINGS)
    finish(begun=[flows.begun[number] for number in range(1, PINGS + 1)])


async def ask(url: str) -> None:
    """W9, the client: accepts a run now and then, on a cluster that has nothing else to do."""
    from llm_orchestrator.cli.target import of_code  # noqa: PLC0415 - W7 times what all import
    from llm_orchestrator.clock import RealClock, new_run_id  # noqa: PLC0415
    from llm_orchestrator.store.postgres import PostgresStore  # noqa: PLC0415

    store = PostgresStore(url, node_id="client", clock=RealClock())
    await store.open_as_client()
    target = of_code(Flows().ping)
    sent, acked = [], []
    for number in range(PINGS + 1):  # the first one is warm-up
        sent.append(time.monotonic_ns())
        new = target.new_run(new_run_id(store.clock), {"number": number})
        await target.accept(store, store.clock, new)
        acked.append(time.monotonic_ns())
        target = replace(target, is_registered=True)
        await asyncio.sleep(PING_PAUSE_S)
    finish(sent=sent[1:], acked=acked[1:])


async def work_on(work: str, url: str, *, runs: int, config: Config) -> dict[str, float]:
    """One workload on a store of its own; returns what was measured."""
    if work == "W9-client":
        await ask(url)
    flows = Flows(size_of(work), is_stuck=work == "W5-before")
    publish = flows.watch if work == "W6" else None
    known = [flows.crash, flows.ping]
    async with Orchestrator(url, workflows=known, config=config, publish=publish) as engine:
        match work.partition(".")[0]:
            case "W1" | "W4" | "W8":
                return await chains(engine, flows, work, runs)
            case "W2":
                return await sequence(engine, flows)
            case "W3":
                return await fan_out(engine, flows)
            case "W5-before":
                await before_crash(engine, flows)
            case "W5-after":
                await after_crash(flows)
            case "W6":
                return await waiting(engine, flows)
            case "W7":
                await engine.run(flows.chain, {"steps": 1})
                say("HELLO")
            case "W9-node":
                await answer(flows)
    return {}


def main() -> None:
    chosen = arguments()
    folder = chosen.folder.resolve()
    url = chosen.store or f"sqlite:///{folder / 'ours.db'}"
    config = Config(
        data_dir=folder / f"data-{os.getpid()}",
        archive_place=chosen.archive,
        archive_mode=chosen.mode,
    )
    finish(**asyncio.run(work_on(chosen.work, url, runs=chosen.runs, config=config)))


if __name__ == "__main__":
    main()
