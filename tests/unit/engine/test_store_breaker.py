"""A store that does not answer: requests fail fast, a few probes find it again."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from llm_orchestrator.engine.store_breaker import (
    PATIENCE_S,
    POLICY,
    PROBE_S,
    StoreBreaker,
    gated,
    hurried,
)
from llm_orchestrator.errors import StoreDamaged, StoreResting, StoreUnavailable
from llm_orchestrator.store.base import Batch, Database, PutRecord
from llm_orchestrator.store.memory import MemoryStore
from tests.unit.engine.support import VirtualClock, virtually


class Ward:
    """A store that can be away, and how often it was asked."""

    def __init__(self) -> None:
        self.clock = VirtualClock()
        self.gate = StoreBreaker(self.clock)
        self.is_away = False
        self.takes = 0.0
        self.asked = self.running = self.running_max = 0

    async def ask(self) -> str:
        self.asked += 1
        self.running += 1
        self.running_max = max(self.running, self.running_max)
        try:
            await self.clock.sleep(self.takes)
        finally:
            self.running -= 1
        if self.is_away:
            raise StoreUnavailable("no route to it")
        return "fine"

    async def call(self) -> str:
        return await self.gate.call(self.ask)

    async def open(self) -> None:
        self.is_away = True
        for _ in range(POLICY.failures_max):
            with pytest.raises(StoreUnavailable):
                await self.call()
        assert self.gate.state == "open"


def test_it_opens_after_some_failures_in_a_row_and_asks_no_more() -> None:
    async def main() -> None:
        ward = Ward()
        ward.is_away = True
        for _ in range(2):
            with pytest.raises(StoreUnavailable):
                await ward.call()
        ward.is_away = False
        assert await ward.call() == "fine"
        await ward.open()
        asked = ward.asked
        for _ in range(100):
            with pytest.raises(StoreResting, match="no route to it") as caught:
                await ward.call()
            assert 0 < caught.value.retry_after_s <= POLICY.open_s
            with pytest.raises(StoreResting):
                ward.gate.demand()
        assert ward.asked == asked
        told: Any = ward.gate.to_json()
        assert (told["state"], told["detail"]) == ("open", "no route to it")

    virtually(main())


def test_probes_are_bounded_and_the_waves_close_it() -> None:
    async def main() -> None:
        ward = Ward()
        await ward.open()
        await ward.clock.sleep(POLICY.open_s)
        ward.is_away, ward.takes, sizes = False, 1.0, []
        while ward.gate.state != "closed":
            ward.running_max = 0
            crowd = await asyncio.gather(*(ward.call() for _ in range(50)), return_exceptions=True)
            assert crowd.count("fine") == ward.running_max
            sizes.append(ward.running_max)
        assert sizes == [1, 4]
        ward.gate.demand()
        assert await asyncio.gather(*(ward.call() for _ in range(50))) == ["fine"] * 50

    virtually(main())


def test_each_opening_in_a_row_lasts_longer_up_to_a_bound() -> None:
    async def main() -> None:
        ward = Ward()
        await ward.open()
        waits = []
        for _ in range(6):
            waits.append(cast("dict[str, float]", ward.gate.to_json())["retry_in_s"])
            await ward.clock.sleep(waits[-1])
            with pytest.raises(StoreUnavailable, match=r"^no route"):
                await ward.call()
        assert waits == [0.5, 1.0, 2.0, 4.0, 4.0, 4.0]

    virtually(main())


def test_a_probe_that_is_given_up_leaves_its_place_to_another() -> None:
    async def main() -> None:
        ward = Ward()
        await ward.open()
        await ward.clock.sleep(POLICY.open_s)
        ward.is_away, ward.takes = False, PROBE_S / 2
        probe = asyncio.ensure_future(ward.call())
        await ward.clock.sleep(0.1)
        with pytest.raises(StoreResting):
            await ward.call()
        probe.cancel()
        await asyncio.gather(probe, return_exceptions=True)
        assert await ward.call() == "fine"

    virtually(main())


def test_no_answer_in_time_is_none_and_a_probe_is_given_less_time() -> None:
    async def main() -> None:
        ward = Ward()
        ward.takes = 3_600.0
        began = ward.clock.monotonic()
        for _ in range(POLICY.failures_max):
            with pytest.raises(StoreUnavailable, match="may still be done"):
                await ward.call()
        assert ward.clock.monotonic() - began == pytest.approx(PATIENCE_S * POLICY.failures_max)
        assert ward.gate.state == "open"
        await ward.clock.sleep(POLICY.open_s)
        began = ward.clock.monotonic()
        with pytest.raises(StoreUnavailable, match="no answer"):
            await ward.call()
        assert ward.clock.monotonic() - began == pytest.approx(PROBE_S)

    virtually(main())


def test_whoever_has_a_limit_of_his_own_is_told_of_that_one() -> None:
    async def main() -> None:
        ward = Ward()

        async def late() -> None:
            raise TimeoutError("of somebody else")

        with pytest.raises(TimeoutError, match="somebody else"):
            await ward.gate.call(late)
        ward.takes = PATIENCE_S * 2
        assert await ward.gate.call(ward.ask, patience_s=0.0) == "fine"

    virtually(main())


def test_a_hurried_look_at_a_gated_store_counts_like_any_other() -> None:
    async def main() -> None:
        clock = VirtualClock()
        gate, store = StoreBreaker(clock), cast("Database", MemoryStore(clock))
        assert hurried(store, 1.0) is store
        quick = hurried(gated(store, gate), 1.0)

        async def hangs(kind: str, key: str) -> None:
            await clock.sleep(3_600.0)

        store.shelf.record = hangs  # type: ignore[method-assign, assignment]
        for _ in range(POLICY.failures_max):
            with pytest.raises(StoreUnavailable, match="within 1 s"):
                await quick.shelf.record("k", "a")
        assert gate.state == "open"

    virtually(main())


def test_an_answer_that_is_no_good_is_an_answer() -> None:
    async def main() -> None:
        ward = Ward()

        async def damaged() -> None:
            raise StoreDamaged("a page")

        for _ in range(20):
            with pytest.raises(StoreDamaged):
                await ward.gate.call(damaged)
        assert ward.gate.state == "closed"

    virtually(main())


def test_reads_and_commits_of_a_gated_store_pass_the_breaker_and_nothing_else_does() -> None:
    async def main() -> None:
        clock = VirtualClock()
        gate, store = StoreBreaker(clock), MemoryStore(clock)
        through = gated(cast("Database", store), gate)
        await through.commit(Batch(changes=(PutRecord("k", "a", 1, 0),)))
        assert await through.shelf.record("k", "a") == (1, 1)
        assert await through.look.run_ids() == []
        assert through.node_id == store.node_id
        calls = 0

        async def count(ask: Any, **_: float) -> Any:
            nonlocal calls
            calls += 1
            return await ask()

        gate.call = count  # type: ignore[method-assign]
        await through.commit(Batch())
        await through.shelf.records("k")
        await through.look.next_wake()
        await through.counts.census()
        await through.adopt("n", 1)
        assert calls == 4

    virtually(main())
