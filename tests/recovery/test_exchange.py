"""Nodes that serve a store go on with the one that a restore has put in its place."""

from __future__ import annotations

import asyncio

import pytest

from llm_orchestrator import Context, Orchestrator, step, workflow
from llm_orchestrator.clock import RealClock
from llm_orchestrator.engine.audit import verify_store
from llm_orchestrator.errors import StoreUnavailable
from llm_orchestrator.recovery import reconcile
from llm_orchestrator.store.base import Batch, Database, PutRecord, Receipt
from llm_orchestrator.store.copying import Identity
from llm_orchestrator.store.postgres import PostgresStore
from llm_orchestrator.wire.orchestrator import node_options
from tests.recovery.test_restore import Site, expected, ledger, parked, site, trade

__all__ = ["site"]


async def test_a_node_drops_its_runs_and_serves_the_restored_store(site: Site) -> None:
    options = node_options(site.config)
    async with Orchestrator(
        site.url, workflows=[trade], config=site.config, options=options
    ) as one:
        kept = await one.start(trade, {"n": 1})
        await parked(one, 1)
        await site.back_up()
        taken_back = await one.start(trade, {"n": 2})
        await parked(one, 2)
        before = one.node.node_id
        done = await site.restore()
        assert done.carried.held == [taken_back]
        async with asyncio.timeout(60):
            while one.node.node_id == before or one.store.generation != 2:
                await one.clock.sleep(0.02)
            await one.operator.signal(kept, "go")
            assert await one.result(kept) == expected(1)
            fresh = await one.start(trade, {"n": 3})
            await reconcile.accept(one.store, one.clock, taken_back, by="a test")
            await one.operator.signal(taken_back, "go")
            await one.operator.signal(fresh, "go")
            assert await one.result(taken_back) == expected(2)
            assert await one.result(fresh) == expected(3)
        assert await verify_store(one.store) == []
    assert sorted(ledger.lines()) == ["1-a", "1-b", "2-a", "2-b", "3-a", "3-b"]


answers: list[asyncio.Future[str]] = []


@step
async def asks() -> str:
    answers.append(asyncio.get_running_loop().create_future())
    return await answers[-1]


@workflow
async def one_question(ctx: Context) -> str:
    return await ctx.step(asks)


@pytest.mark.parametrize("site", ["sqlite"], indirect=True)
async def test_what_waits_to_be_committed_does_not_land_in_the_restored_store(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The restored journal ends where the waiting entry would fit: nobody else would refuse it."""
    answers.clear()
    async with Orchestrator(site.url, workflows=[one_question], config=site.config) as one:
        run_id = await one.start(one_question)
        await asked(one, 1)
        dump, _ = await site.backups.copier.dump(site.config.data_dir)
        aside = await site.backups.copier.load(dump)
        refused = asyncio.Event()
        commit = one.store.commit

        async def told(batch: Batch) -> Receipt:
            try:
                return await commit(batch)
            except StoreUnavailable:
                refused.set()
                raise

        monkeypatch.setattr(one.store, "commit", told)

        async def last(store: Database) -> None:
            answers[0].set_result("before")
            refused.clear()
            await refused.wait()

        await aside.take_over(Identity("new" * 10, 2), last=last)
        await asked(one, 2)
        await one.clock.sleep(1.2)  # longer than the writer rests between two tries
        answers[1].set_result("after")
        assert await one.result(run_id) == "after"
        assert await verify_store(one.store) == []


async def asked(one: Orchestrator, times: int) -> None:
    async with asyncio.timeout(60):
        while len(answers) < times:
            await one.clock.sleep(0.01)


@pytest.mark.parametrize("site", ["postgres"], indirect=True)
async def test_who_only_asks_is_told_to_ask_again(site: Site) -> None:
    async with Orchestrator(site.url):
        await site.back_up()
    asking = PostgresStore(site.url, node_id="api", clock=RealClock())
    await asking.open_as_client()
    await site.restore()
    change = Batch(changes=(PutRecord("kind", "key", 1, 0),))
    refusals = [await refusal(asking, change)]
    while "restored" not in refusals[-1]:  # its connections were ended: that is heard first
        assert refusals[-1]
        refusals.append(await refusal(asking, change))
    assert await refusal(asking, change) == ""
    assert (await asking.shelf.record("kind", "key"))[0] == 1
    await asking.close()


async def refusal(store: PostgresStore, change: Batch) -> str:
    """Why the store does not take it now; "" when it has."""
    try:
        await store.commit(change)
    except StoreUnavailable as error:
        return error.message
    return ""
