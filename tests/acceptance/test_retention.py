"""Finished runs expire by age and by count; whatever may still move stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_orchestrator import Context, Orchestrator, workflow
from llm_orchestrator.engine.retention import Retention, expire
from llm_orchestrator.store.base import RunFilter


@workflow
async def quick(ctx: Context, n: int) -> int:
    return n


@workflow
async def parked(ctx: Context) -> None:
    await ctx.wait_signal("never")


async def ids(orchestrator: Orchestrator) -> set[str]:
    return {run.run_id for run in await orchestrator.store.look.runs(RunFilter(limit=1000))}


async def test_the_newest_finished_runs_stay_and_what_waits_is_not_counted(tmp_path: Path) -> None:
    async with Orchestrator(f"sqlite:///{tmp_path / 'runs.db'}") as orchestrator:
        waiting = await orchestrator.start(parked)
        finished = []
        for number in range(120):
            finished.append(await orchestrator.start(quick, {"n": number}))
            await orchestrator.result(finished[-1])
        gone = await expire(orchestrator.store, Retention(runs=7), orchestrator.clock)
        assert gone == 113
        assert await ids(orchestrator) == {waiting, *finished[-7:]}
        assert await orchestrator.store.look.load(finished[:1]) == {}
        assert await expire(orchestrator.store, Retention(runs=7), orchestrator.clock) == 0


@pytest.mark.parametrize(("days", "left"), [(1.0, 3), (0.0, 3), (1e-12, 0)])
async def test_runs_go_when_they_are_older_than_the_limit(
    tmp_path: Path, days: float, left: int
) -> None:
    async with Orchestrator(f"sqlite:///{tmp_path / 'runs.db'}") as orchestrator:
        for number in range(3):
            await orchestrator.run(quick, {"n": number})
        await expire(orchestrator.store, Retention(days=days), orchestrator.clock)
        assert len(await ids(orchestrator)) == left
