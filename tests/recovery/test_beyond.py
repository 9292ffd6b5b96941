"""A run that is put back to any of its entries loses no fact, and asks before it pays again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from llm_orchestrator import Context, Orchestrator, step, workflow
from llm_orchestrator.engine.acceptance import from_accepted
from llm_orchestrator.engine.audit import verify_store
from llm_orchestrator.engine.node import registration
from llm_orchestrator.engine.replay import fold
from llm_orchestrator.engine.rows import row_of
from llm_orchestrator.errors import NotFound, Refused
from llm_orchestrator.language.code import CodeWorkflow
from llm_orchestrator.model import Entry, Kind, RunState
from llm_orchestrator.recovery import reconcile
from llm_orchestrator.recovery.beyond import Tail, carry, tail_of
from llm_orchestrator.store.base import Append, Batch, Register, Store
from llm_orchestrator.store.journal import GENESIS

calls: list[str] = []


@step(effect="once")
async def charge(name: str) -> str:
    calls.append(name)
    return f"charged {name}"


@step
async def look(name: str) -> str:
    calls.append(name)
    return f"saw {name}"


@workflow
async def shop(ctx: Context) -> list[str]:
    first = await ctx.step(look, "shelf")
    second = await ctx.step(charge, "card")
    third = await ctx.step(charge, "voucher")
    return [first, second, third]


@workflow
async def stroll(ctx: Context) -> list[str]:
    return [await ctx.step(look, "river"), await ctx.step(look, "hill")]


def url(folder: Path, name: str) -> str:
    return f"sqlite:///{folder / name}"


async def finished(
    folder: Path, flow: CodeWorkflow[list[str]]
) -> tuple[str, Sequence[Entry], object]:
    """A run from its beginning to its end: what the live store knows."""
    calls.clear()
    async with Orchestrator(url(folder, "live.db")) as live:
        run_id = await live.start(flow)
        output = await live.result(run_id)
        entries = (await live.store.look.load([run_id]))[run_id].entries
    return run_id, entries, output


async def put(store: Store, run_id: str, known: Sequence[Entry]) -> None:
    """A store in which the run ends with `known`, as a backup has it."""
    if not known:
        return
    state = fold(run_id, known)
    row = row_of(state, known)
    accept = from_accepted(run_id, state.accepted)
    append = Append(run_id, 0, GENESIS, known, accept, row.change)
    receipt = await store.commit(Batch(appends=(append,)))
    assert not receipt.refused


async def put_back(store: Store, run_id: str, entries: Sequence[Entry], at: int) -> bool:
    """The restore of one run to entry `at`; whether it is held."""
    restored = entries[:at]
    await put(store, run_id, restored)
    tail = tail_of(restored, entries, run_id)
    assert tail is not None
    generation = store.generation + 1
    carried = carry(tail, restored, generation=generation, now_us=1, why="a test")
    receipt = await store.commit(Batch(appends=(carried.append,)))
    assert not receipt.refused
    assert await verify_store(store) == []
    return carried.is_held


@pytest.mark.parametrize("decision", ["accept", "rerun"])
async def test_from_every_entry_a_held_run_ends_right(tmp_path: Path, decision: str) -> None:
    run_id, entries, output = await finished(tmp_path, shop)
    assert calls == ["shelf", "card", "voucher"]
    held = 0
    for at in range(len(entries)):
        calls.clear()
        target = url(tmp_path, f"{decision}-{at}.db")
        async with Orchestrator(target) as fresh:
            await fresh.store.commit(Batch(changes=(Register(registration(shop)),)))
            is_held = await put_back(fresh.store, run_id, entries, at)
            beyond = entries[at:]
            assert is_held == any(_is_effect(entry) for entry in beyond)
            if is_held:
                held += 1
                [one] = await reconcile.held_runs(fresh.store)
                assert one.run_id == run_id
                assert one.to_seq == max(at, 1)
                with pytest.raises(Refused, match="held"):
                    await fresh.operator.resume(run_id)
                assert calls == []
                await decide(fresh, run_id, decision)
                assert await reconcile.held_runs(fresh.store) == []
        async with Orchestrator(target, workflows=[shop]) as fresh:
            assert await fresh.result(run_id) == output
            assert await verify_store(fresh.store) == []
        known = {entry.step for entry in entries[:at] if entry.kind == Kind.STEP_FINISHED}
        if decision == "accept" and is_held:
            assert calls == []
        else:
            assert len(calls) == 3 - len(known)
    assert held > 4


def _is_effect(entry: Entry) -> bool:
    return entry.kind == Kind.INTENT or (
        entry.kind == Kind.STEP_FINISHED and b"charged" in entry.payload
    )


async def decide(fresh: Orchestrator, run_id: str, decision: str) -> None:
    if decision == "accept":
        await reconcile.accept(fresh.store, fresh.clock, run_id, by="a test")
    else:
        await reconcile.rerun(fresh.store, fresh.clock, run_id, by="a test")


async def test_a_run_without_effects_goes_on_by_itself(tmp_path: Path) -> None:
    run_id, entries, output = await finished(tmp_path, stroll)
    target = url(tmp_path, "restored.db")
    async with Orchestrator(target) as fresh:  # it has no code: nothing moves while we look
        await fresh.store.commit(Batch(changes=(Register(registration(stroll)),)))
        assert not await put_back(fresh.store, run_id, entries, 2)
        with pytest.raises(NotFound):
            await reconcile.accept(fresh.store, fresh.clock, run_id, by="a test")
    async with Orchestrator(target, workflows=[stroll]) as fresh:
        assert await fresh.result(run_id) == output


async def test_two_stories_are_not_joined(tmp_path: Path) -> None:
    run_id, entries, _ = await finished(tmp_path, stroll)
    other = [*entries[:2], entries[2]._replace(digest=b"x" * 32)]
    assert tail_of(other, entries, run_id) is None
    assert tail_of(entries, entries, run_id) is None
    assert isinstance(tail_of(entries[:2], entries, run_id), Tail)


async def test_a_cancelled_run_stays_cancelled(tmp_path: Path) -> None:
    calls.clear()
    async with Orchestrator(url(tmp_path, "live.db")) as live:
        run_id = await live.start(shop, delay_s=1_000.0)
        await live.operator.cancel(run_id)
        entries = (await live.store.look.load([run_id]))[run_id].entries
    async with Orchestrator(url(tmp_path, "restored.db")) as fresh:
        assert not await put_back(fresh.store, run_id, entries, 1)
        state = await fresh.operator.state(run_id)
        assert state.state is RunState.CANCELLED
