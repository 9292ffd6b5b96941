"""A breaker that somebody closes: runs that wait for it go on, in waves, while it stays closed."""

from __future__ import annotations

from typing import Any

import pytest

from llm_orchestrator.engine import breakers
from llm_orchestrator.engine.breakers import KIND, reset_breaker, wake_parked
from llm_orchestrator.errors import ProviderUnavailable
from llm_orchestrator.language.definition import Definition
from llm_orchestrator.providers.breaker import State, Verdict
from llm_orchestrator.store.base import Batch, Post, PutRecord, news_of
from llm_orchestrator.store.memory import MemoryStore
from tests.unit.engine.nodes import Home, House
from tests.unit.engine.support import definition, virtually

NAME = "house/fake"


def shut(*, wait_s: float = 600.0) -> ProviderUnavailable:
    error = ProviderUnavailable("its breaker is open", provider=NAME, retry_after_s=wait_s)
    error.breaker = NAME
    return error


def spent() -> ProviderUnavailable:
    return ProviderUnavailable("its limit is spent", provider=NAME, retry_after_s=600.0)


def ask(name: str = "ask") -> Definition:
    return definition(f"flow-{name}", steps=[{"id": name, "type": "work"}])


async def put(store: MemoryStore, verdict: Verdict) -> None:
    _, version = await store.shelf.record(KIND, NAME)
    await store.commit(Batch(changes=(PutRecord(KIND, NAME, verdict.to_json(), version),)))


async def parked(house: House, home: Home, count: int, error: Any = shut) -> list[str]:
    """Runs that left memory because the breaker is open, or for another reason."""
    home.work.errors["ask"] = [error() for _ in range(count)]
    run_ids = [await house.accept(ask()) for _ in range(count)]
    await house.until(lambda: {house.row_state(each) for each in run_ids} == {"waiting"})
    return run_ids


def test_a_reset_lets_parked_runs_go_on_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        house = House()
        home = await house.begin("a")
        await put(house.store, Verdict(State.OPEN, until=9e9, openings=1))
        run_ids = await parked(house, home, 20)
        folds = [await house.fold(run_id) for run_id in run_ids]
        assert {each.reason for each in folds} == {"provider"}
        began, sizes = house.clock.monotonic(), []
        commit = house.store.commit

        async def watched(batch: Batch) -> Any:
            posts = [each for each in batch.changes if isinstance(each, Post)]
            sizes.extend([len(posts)] if posts else [])
            return await commit(batch)

        monkeypatch.setattr(house.store, "commit", watched)
        assert await reset_breaker(house.store, NAME)
        assert await wake_parked(house.store, NAME, house.clock) == 20
        assert sizes == [1, 2, 4, 8, 5]
        for run_id in run_ids:
            await house.ends(run_id)
        assert house.clock.monotonic() - began < 5.0
        assert home.work.calls["ask"] == 40
        for run_id in run_ids:
            assert await house.store.look.inbox(run_id) == [], "a message that nobody takes"
        await house.stop()

    virtually(main())


def test_runs_that_wait_for_anything_else_are_left_alone() -> None:
    async def main() -> None:
        house = House()
        home = await house.begin("a")
        await put(house.store, Verdict())
        await parked(house, home, 3, spent)
        assert await wake_parked(house.store, NAME, house.clock) == 0
        assert await wake_parked(house.store, "other/x", house.clock) == 0
        await house.stop()

    virtually(main())


def test_a_breaker_that_opens_again_ends_the_waves(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        house = House()
        home = await house.begin("a")
        await put(house.store, Verdict(State.OPEN, until=9e9))
        run_ids = await parked(house, home, 10)
        await reset_breaker(house.store, NAME)
        told: list[str] = []
        commit = house.store.commit

        async def opens_again(batch: Batch) -> Any:
            posts = [each.run_id for each in batch.changes if isinstance(each, Post)]
            told.extend(posts)
            landed = await commit(batch)
            if posts and len(told) == 3:
                await put(house.store, Verdict(State.OPEN, until=9e9))
            return landed

        monkeypatch.setattr(house.store, "commit", opens_again)
        assert await wake_parked(house.store, NAME, house.clock) == 3
        assert told == sorted(run_ids)[:3], "the oldest first"
        await house.stop()

    virtually(main())


def test_runs_in_memory_go_on_on_every_node_when_somebody_closes_the_breaker() -> None:
    """They have something else in flight, so they did not park."""

    async def main() -> None:
        house = House()
        homes = [await house.begin(name, runs_max=20) for name in ("a", "b")]
        await put(house.store, Verdict(State.OPEN, until=9e9))
        both = definition(
            "both",
            steps=[{"id": "ask", "type": "work"}, {"id": "busy", "type": "work", "takes": 300.0}],
        )
        for home in homes:
            home.work.errors["ask"] = [shut() for _ in range(20)]
        await house.register(both)
        run_ids = [await house.accept(both) for _ in range(40)]
        await house.until(lambda: sum(home.work.calls["ask"] for home in homes) == 40)
        assert all(home.node.driver.count for home in homes)
        await house.clock.sleep(10.0)
        assert sum(home.work.calls["ask"] for home in homes) == 40
        for home in homes:
            home.work.errors.clear()
        began = house.clock.monotonic()
        await reset_breaker(house.store, NAME)
        await house.until(lambda: sum(home.work.calls["ask"] for home in homes) == 80)
        assert house.clock.monotonic() - began < 5.0
        for run_id in run_ids:
            await house.ends(run_id)
        await house.stop()

    virtually(main())


def test_a_breaker_that_closes_is_news_and_its_other_changes_are_not() -> None:
    for state, is_news in (("closed", True), ("open", False), ("half_open", False)):
        change = PutRecord(KIND, NAME, Verdict(State(state)).to_json(), 0)
        assert news_of(Batch(changes=(change,))).is_order is is_news
    assert not news_of(Batch(changes=(PutRecord(KIND, NAME, None, 1),)))
    assert breakers.WAVE_MAX == 64
