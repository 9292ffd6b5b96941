"""A parked run sleeps until something new happens, however many messages it had before."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from llm_orchestrator import Context, Orchestrator, workflow
from llm_orchestrator.model import Kind
from llm_orchestrator.store.sqlite import SQLiteStore
from tests.unit.engine.support import VirtualClock, virtually


@workflow
async def patient(ctx: Context) -> str:
    for _ in range(3):
        await ctx.wait_signal("go")
    for _ in range(3):
        await ctx.sleep(1_000)
    return "done"


def test_messages_that_were_taken_keep_no_parked_run_awake(tmp_path: Path) -> None:
    async def main() -> Counter[str]:
        clock = VirtualClock()
        for life in range(2):
            store = SQLiteStore(tmp_path / "runs.db", node_id=f"life{life}", clock=clock)
            engine = Orchestrator("sqlite:///x.db", store=store, clock=clock, workflows=[patient])
            async with engine:
                if life == 0:
                    run_id = await engine.start(patient)
                    for number in range(3):
                        await clock.sleep(10)
                        await engine.operator.signal(run_id, "go", number)
                    await clock.sleep(500)
                    continue
                assert await engine.result(run_id) == "done"
                entries = await store.look.stored(run_id)
        return Counter(entry.kind for entry in entries)

    kinds = virtually(main())
    assert kinds[Kind.SIGNAL] == 3
    assert kinds[Kind.CLAIMED] <= 10, kinds
