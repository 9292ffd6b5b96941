"""One run out of a backup, whatever the live store still has of it."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from llm_orchestrator import Context, Orchestrator, step, workflow
from llm_orchestrator.clock import RealClock
from llm_orchestrator.engine.audit import verify_store
from llm_orchestrator.errors import NotFound
from llm_orchestrator.model import RunState
from llm_orchestrator.recovery import reconcile
from llm_orchestrator.recovery.one_run import Brought, How, bring_back
from tests.recovery.test_carry import opened

BIG = 3 << 20
calls: list[str] = []


@step(effect="once")
async def pay(name: str) -> str:
    calls.append(name)
    return name * BIG if name == "x" else name


@workflow
async def shop(ctx: Context, name: str) -> str:
    paid = str(await ctx.step(pay, name))
    await ctx.wait_signal("go")
    return paid


def urls(folder: Path) -> tuple[str, str]:
    return f"sqlite:///{folder / 'backup.db'}", f"sqlite:///{folder / 'live.db'}"


async def brought(folder: Path, run_id: str) -> Brought:
    backup, live = urls(folder)
    async with opened(backup) as one, opened(live) as other:
        found = await bring_back(one, other, run_id, clock=RealClock(), name="a backup")
        assert await verify_store(other) == []
    return found


async def ended(url: str, name: str) -> str:
    async with Orchestrator(url) as one:
        run_id = await one.start(shop, {"name": name})
        await one.operator.signal(run_id, "go")
        await one.result(run_id)
    return run_id


@pytest.mark.parametrize("name", ["a", "x"], ids=["small", "in a blob"])
async def test_a_run_that_is_gone_comes_back_as_it_was(tmp_path: Path, name: str) -> None:
    backup, live = urls(tmp_path)
    run_id = await ended(backup, name)
    found = await brought(tmp_path, run_id)
    assert (found.run_id, found.how, found.is_held) == (run_id, How.AS_IT_WAS, False)
    async with Orchestrator(live) as one:
        assert await one.result(run_id) in ("a", "x" * BIG)
    again = await brought(tmp_path, run_id)
    assert again.how is How.AS_ANOTHER
    assert again.run_id != run_id
    async with Orchestrator(live) as one:
        state = await one.operator.state(again.run_id)
        assert state.accepted["origin"]["restored"]["run"] == run_id
        assert await one.result(again.run_id) in ("a", "x" * BIG)


async def test_a_run_that_had_not_ended_is_held_and_pays_once(tmp_path: Path) -> None:
    backup, live = urls(tmp_path)
    calls.clear()
    async with Orchestrator(backup) as one:
        run_id = await one.start(shop, {"name": "a"})
        while (await one.operator.state(run_id)).state is not RunState.WAITING:
            await one.clock.sleep(0.001)
    found = await brought(tmp_path, run_id)
    assert found.is_held
    async with Orchestrator(live, workflows=[shop]) as one:
        [held] = await reconcile.held_runs(one.store)
        assert held.run_id == run_id
        await reconcile.accept(one.store, one.clock, run_id, by="a test")
        await one.operator.signal(run_id, "go")
        assert await one.result(run_id) == "a"
    assert calls == ["a"]


async def test_a_damaged_run_is_mended(tmp_path: Path) -> None:
    backup, live = urls(tmp_path)
    run_id = await ended(backup, "a")
    await brought(tmp_path, run_id)
    with sqlite3.connect(tmp_path / "live.db") as database:
        database.execute("UPDATE journal SET payload = X'7b7d' WHERE seq IN (3, 4)")
    found = await brought(tmp_path, run_id)
    assert found.how is How.MENDED
    async with Orchestrator(live) as one:
        assert await one.result(run_id) == "a"


async def test_a_backup_without_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="a backup has no run"):
        await brought(tmp_path, "00000000-0000-7000-8000-000000000000")
