"""Nodes that serve a store go on with the one that a restore has put in its place."""

from __future__ import annotations

import asyncio

import pytest

from llm_orchestrator import Orchestrator
from llm_orchestrator.clock import RealClock
from llm_orchestrator.engine.audit import verify_store
from llm_orchestrator.errors import StoreUnavailable
from llm_orchestrator.recovery import reconcile
from llm_orchestrator.store.base import Batch, PutRecord
from llm_orchestrator.store.postgres import PostgresStore
from llm_orchestrator.wire.orchestrator import node_options
from tests.recovery.test_restore import Site, expected, ledger, parked, site, trade

__all__ = ["site"]


@pytest.mark.parametrize("site", ["postgres"], indirect=True)
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
