"""A store with all kinds of runs, and what must come of each when an engine opens it again."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm_orchestrator import Context, Orchestrator, step, workflow
from llm_orchestrator.clock import derived_run_id
from llm_orchestrator.errors import InputError, OrchestratorError, RunFailed, RunPaused
from llm_orchestrator.language.code import CodeWorkflow
from llm_orchestrator.model import RunState
from llm_orchestrator.store.base import RunFilter

SECONDS_MAX = 10
Found = dict[str, tuple[str, Any]]


@dataclass
class World:
    """What the steps see: how often each was made, and whether they are to hang."""

    is_slow: bool = False
    made: Counter[str] = field(default_factory=Counter)
    arrived: int = 0


def make_flows(world: World) -> list[CodeWorkflow[Any]]:
    """The workflows, bound to a world."""

    @step
    async def think(what: str) -> dict[str, str]:
        world.made[what] += 1
        return {"thought": " ".join(f"{what}-{word}" for word in range(12))}

    @step(effect="once")
    async def pay(what: str) -> str:
        world.made[f"paid {what}"] += 1
        return f"receipt for {what} " * 10

    @step
    async def linger(what: str) -> str:
        world.made[what] += 1
        if world.is_slow:
            world.arrived += 1
            await asyncio.Event().wait()
        return f"{what} done"

    @step
    async def refuse(what: str) -> None:
        raise InputError(f"{what} is refused")

    @workflow
    async def finished(ctx: Context, what: str) -> Any:
        first = await ctx.step(think, f"{what}/1")
        paid = await ctx.step(pay, what)
        return [first, paid, await ctx.step(think, f"{what}/2"), float("inf")]

    @workflow
    async def big(ctx: Context, what: str) -> int:
        text = await ctx.step(think, f"{what}/1")
        return len(await ctx.map(lambda n: ctx.step(think, f"{what}/{n}{text}"), range(20)))

    @workflow
    async def waiting(ctx: Context, what: str) -> Any:
        first = await ctx.step(think, f"{what}/1")
        paid = await ctx.step(pay, what)
        word = await ctx.wait_signal("go")
        return [first, paid, word, await ctx.step(think, f"{what}/2")]

    @workflow
    async def parent(ctx: Context, what: str) -> Any:
        return [await ctx.run(waiting, what=f"{what}/child"), await ctx.step(think, f"{what}/2")]

    @workflow
    async def half(ctx: Context, what: str) -> Any:
        first = await ctx.step(think, f"{what}/1")
        paid = await ctx.step(pay, what)
        slow = [ctx.step(linger, f"{what}/slow{number}") for number in range(2)]
        return [first, paid, *await ctx.gather(*slow)]

    @workflow
    async def failed(ctx: Context, what: str) -> None:
        await ctx.step(think, f"{what}/1")
        await ctx.step(refuse, what)

    return [finished, big, waiting, parent, half, failed]


def _url(path: Path) -> str:
    return f"sqlite:///{path}"


async def build(path: Path) -> None:
    """Some 30 runs: finished, failed, cancelled, paused, waiting, and cut off in the middle."""
    world = World(is_slow=True)
    flows = make_flows(world)
    finished, big, waiting, parent, half, failed = flows
    async with Orchestrator(_url(path.with_suffix(".live")), workflows=flows) as engine:
        ids = [await engine.start(finished, {"what": f"finished{n}"}) for n in range(8)]
        ids.append(await engine.start(big, {"what": "big"}))
        for run_id in ids:
            await engine.result(run_id)
        broken = await engine.start(failed, {"what": "failed"})
        with contextlib.suppress(RunFailed):
            await engine.result(broken)
        parked = [await engine.start(waiting, {"what": f"waiting{n}"}) for n in range(8)]
        await engine.start(parent, {"what": "parent0"})
        await engine.start(parent, {"what": "parent1"})
        for number in range(6):
            await engine.start(half, {"what": f"half{number}"})
        await _until(engine, world)
        await engine.operator.cancel(parked[0])
        await engine.operator.pause(parked[1])
        # What a kill -9 at this moment would leave, and nothing of what was there before.
        with sqlite3.connect(path.with_suffix(".live")) as database:
            database.execute("VACUUM INTO ?", (str(path),))
        database.close()


async def _until(engine: Orchestrator, world: World) -> None:
    """All that is to park has parked, all that is to linger lingers."""
    async with asyncio.timeout(SECONDS_MAX):
        while True:
            states = [run.state for run in await engine.store.look.runs(RunFilter())]
            if world.arrived == 12 and states.count(RunState.WAITING) == 12:
                return
            await asyncio.sleep(0.02)


async def recover(path: Path, run_ids: Sequence[str]) -> tuple[Found, Counter[str]]:
    """Open an engine, say `go` to whoever waits, and see what comes of every run.

    ("opens", error) when no engine opens. Whatever is no OrchestratorError comes out as it is.
    """
    world = World()
    engine = Orchestrator(_url(path), workflows=make_flows(world))
    try:
        await engine.__aenter__()
    except OrchestratorError as error:
        return {run_id: _described(error) for run_id in run_ids}, world.made
    try:
        assert engine.node._settler is not None
        await asyncio.wait({engine.node._settler})
        ends = {run_id: asyncio.ensure_future(_end(engine, run_id)) for run_id in run_ids}
        _, hanging = await asyncio.wait(ends.values(), timeout=SECONDS_MAX)
        found = {
            run_id: ("hangs", "") if end in hanging else end.result()
            for run_id, end in ends.items()
        }
        for end in hanging:
            end.cancel()
        await asyncio.gather(*hanging, return_exceptions=True)
    finally:
        await engine.close(grace_s=0)
    return found, world.made


async def _end(engine: Orchestrator, run_id: str) -> tuple[str, Any]:
    """("waits", its child's end) for a parent whose child goes nowhere without a person."""
    try:
        state = await engine.operator.state(run_id)
        if state.accepted["workflow"] == "parent":
            child = await _end(engine, derived_run_id(run_id, "run-waiting"))
            if child[0] != "result":
                return "waits", child
        if state.accepted["workflow"] == "waiting" and not state.state.is_final:
            await engine.operator.signal(run_id, "go", {"to": "all"}, sender_key="go")
        return "result", await engine.result(run_id)
    except OrchestratorError as error:
        return _described(error)


def _described(error: OrchestratorError) -> tuple[str, Any]:
    if isinstance(error, RunPaused):
        return "paused", error.reason
    if isinstance(error, RunFailed):
        return "failed", error.state
    return "error", f"{type(error).__name__}: {error.message}"
