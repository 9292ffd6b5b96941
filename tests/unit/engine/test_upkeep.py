"""Orders and memory on production nodes, on virtual time."""

from __future__ import annotations

from typing import Any

import pytest

from llm_orchestrator.engine import maintenance
from llm_orchestrator.engine.maintenance import (
    Admission,
    Mode,
    Orders,
    Standing,
    Watch,
    drain_node,
    enabled,
    read_orders,
    set_standing,
    undrain_node,
)
from llm_orchestrator.engine.memory import Memory, Reading
from llm_orchestrator.errors import Draining, Maintenance, NotFound, Refused, StoreResting
from llm_orchestrator.language.definition import Definition
from llm_orchestrator.model import Json
from llm_orchestrator.store.base import Batch, News, PutRecord, news_of
from llm_orchestrator.store.postgres_bell import pack, unpack
from tests.unit.engine.nodes import House
from tests.unit.engine.support import definition, virtually


def steps(*names: str, takes: float = 0.0) -> Definition:
    """A chain of steps."""
    made: list[dict[str, Any]] = []
    for before, name in zip([None, *names], names, strict=False):
        step = {"id": name, "type": "work", "takes": takes}
        made.append(step if before is None else {**step, "depends_on": [before]})
    return definition("-".join(names), steps=made)


NAP = definition(
    "nap",
    steps=[
        {"id": "before", "type": "work"},
        {"id": "nap", "type": "wait", "seconds": 0.9, "depends_on": ["before"]},
        {"id": "more", "type": "wait", "seconds": 0.9, "depends_on": ["nap"]},
        {"id": "after", "type": "work", "depends_on": ["more"]},
    ],
)


class Scale(Memory):
    """A memory whose use the test sets."""

    def __init__(self) -> None:
        super().__init__(1_000)
        self.share = 0.1

    def read(self) -> Reading:
        return Reading(int(self.share * 1_000), 1_000, "a test")


def refusing(mode: Mode = Mode.KEEP) -> Standing:
    return enabled(by="ada", reason="disks", since=1, mode=mode, retry_after_s=9.0)


def test_kept_runs_go_on_and_new_ones_are_refused_on_every_node() -> None:
    async def main() -> None:
        house = House()
        first, second = await house.begin("a"), await house.begin("b")
        run_id = await house.accept(steps("one", "two", takes=5.0))
        await house.until(lambda: first.work.seen or second.work.seen)
        await set_standing(house.store, refusing())
        for home in (first, second):
            with pytest.raises(Maintenance, match="ada switched maintenance on: disks") as caught:
                await home.node.admission.check()
            assert caught.value.retry_after_s == 9.0
            assert caught.value.retryable
            assert home.node.leaving() == ""
        assert set((await house.ends(run_id)).finished) == {"one", "two"}
        await set_standing(house.store, Standing(by="ada"))
        await first.node.admission.check()
        await house.stop()

    virtually(main())


def test_a_draining_maintenance_ends_what_is_in_flight_and_begins_nothing() -> None:
    async def main() -> None:
        house = House()
        await house.begin("a")
        second = await house.begin("b")
        run_id = await house.accept(steps("one", "two", takes=5.0))
        await house.until(lambda: any(home.work.seen for home in house.homes.values()))
        await set_standing(house.store, refusing(Mode.DRAIN))
        later = await house.accept(steps("three"))
        await house.until(lambda: house.row_state(run_id) == "pending")
        await house.clock.sleep(60.0)
        assert set((await house.fold(run_id)).finished) == {"one"}
        assert house.row_state(later) == "pending"
        assert second.node.upkeep.is_holding
        await house.crash("a")
        await set_standing(house.store, Standing())
        await house.ends(run_id)
        await house.ends(later)
        assert sum(home.work.calls["one"] for home in house.homes.values()) == 1
        await house.stop()

    virtually(main())


def test_a_drained_node_hands_over_is_not_ready_and_may_come_back() -> None:
    async def main() -> None:
        house = House()
        first = await house.begin("a")
        run_id = await house.accept(steps("one", "two", takes=5.0))
        await house.until(lambda: first.work.seen)
        second = await house.begin("b")
        assert await drain_node(house.store, "a", by="ada", reason="new memory") == "a"
        with pytest.raises(Draining, match="node a is drained"):
            await first.node.admission.check()
        await second.node.admission.check()
        await house.ends(run_id)
        assert (first.work.seen, second.work.seen) == (["one"], ["two"])
        assert first.node.upkeep.info()["draining"]
        again = await house.accept(steps("three"))
        await house.ends(again)
        assert "three" in second.work.seen
        assert await undrain_node(house.store, "a") == "a"
        await second.node.stop()
        await house.ends(await house.accept(steps("four")))
        assert "four" in first.work.seen
        await first.node.stop()

    virtually(main())


def test_an_order_that_nobody_heard_of_is_found_by_looking() -> None:
    async def main() -> None:
        house = House()
        home = await house.begin("a")
        home.desk.is_deaf = True
        await set_standing(house.store, refusing(Mode.DRAIN))
        assert not home.node.upkeep.is_holding
        began = house.clock.monotonic()
        await house.until(lambda: home.node.upkeep.is_holding)
        assert house.clock.monotonic() - began <= maintenance.POLL_S + 0.02
        await house.stop()

    virtually(main())


def test_a_node_that_starts_under_an_order_claims_nothing() -> None:
    async def main() -> None:
        house = House()
        run_id = await house.accept(steps("one"))
        await set_standing(house.store, refusing(Mode.DRAIN))
        home = await house.begin("a")
        await house.clock.sleep(30.0)
        assert house.row_state(run_id) == "pending"
        assert "pick" not in home.desk.asked
        await set_standing(house.store, Standing())
        await house.ends(run_id)
        await house.stop()

    virtually(main())


def test_orders_outlive_a_life_of_the_node() -> None:
    async def main() -> None:
        house = House()
        home = await house.begin("a")
        await drain_node(house.store, "a", by="ada")
        await house.bury("a")
        await house.until(lambda: home.node.node_id == "a.2")
        run_id = await house.accept(steps("one"))
        await house.clock.sleep(30.0)
        assert house.row_state(run_id) == "pending"
        await house.stop()

    virtually(main())


def test_draining_names_one_living_node_and_forgets_the_dead() -> None:
    async def main() -> None:
        house = House()
        for name in ("east-1", "east-2", "west-1"):
            await house.begin(name)
        with pytest.raises(Refused, match="east-1, east-2"):
            await drain_node(house.store, "east", by="ada")
        with pytest.raises(NotFound, match="west-1"):
            await drain_node(house.store, "north", by="ada")
        assert await drain_node(house.store, "west", by="ada") == "west-1"
        await house.homes["west-1"].node.stop()
        del house.homes["west-1"]
        await drain_node(house.store, "east-2", by="bo")
        assert set((await read_orders(house.store.shelf)).drained) == {"east-2"}
        with pytest.raises(NotFound, match="no such node is drained: west-1; there is: east-2"):
            await undrain_node(house.store, "west-1")
        await house.stop()

    virtually(main())


def test_a_full_memory_lets_waiting_runs_go_and_takes_them_up_again() -> None:
    async def main() -> None:
        house = House()
        scale = Scale()
        home = await house.begin("a", memory=scale)
        runs = [await house.accept(NAP) for _ in range(8)]
        await house.until(lambda: home.work.calls["before"] == 8)
        scale.share = 0.85
        await house.until(lambda: not home.node.driver.count)
        await house.clock.sleep(30.0)
        assert {house.row_state(run_id) for run_id in runs} == {"pending"}
        assert home.node.driver.ceiling == 4
        assert home.node.upkeep.info()["memory"]["is_shedding"]
        scale.share = 0.3
        for run_id in runs:
            await house.ends(run_id)
        assert (home.work.calls["before"], home.work.calls["after"]) == (8, 8)
        await house.stop()

    virtually(main())


def test_a_full_memory_takes_what_is_in_flight_to_its_end() -> None:
    async def main() -> None:
        house = House()
        scale = Scale()
        home = await house.begin("a", memory=scale)
        run_id = await house.accept(steps("one", "two", takes=5.0))
        await house.until(lambda: home.work.seen)
        scale.share = 0.99
        await house.until(lambda: not home.node.driver.count)
        assert set((await house.fold(run_id)).finished) == {"one"}
        scale.share = 0.1
        await house.ends(run_id)
        assert home.work.calls["one"] == 1
        await house.stop()

    virtually(main())


def test_last_known_orders_stand_while_the_store_is_away() -> None:
    async def main() -> None:
        house = House()
        home = house.make("a")
        watch = Watch(home.node._store, house.clock)
        admission = Admission(watch)
        await set_standing(house.store, refusing())
        with pytest.raises(Maintenance):
            await admission.check()
        home.desk.troubles["any"] = 1_000
        for _ in range(10):
            await house.clock.sleep(maintenance.POLL_S)
            with pytest.raises(Maintenance):
                await admission.check()

    virtually(main())


def test_a_door_is_shut_while_the_store_rests() -> None:
    async def main() -> None:
        house = House()
        home = await house.begin("a")
        await home.node.admission.check()
        home.desk.troubles["any"] = 1_000_000
        await house.until(lambda: home.node.store_gate.state == "open")
        with pytest.raises(StoreResting) as caught:
            await home.node.admission.check()
        assert 0 < caught.value.retry_after_s <= 4.0
        home.desk.troubles["any"] = 0
        await house.until(lambda: home.node.store_gate.state == "closed")
        await home.node.admission.check()
        await house.stop()

    virtually(main())


def test_only_orders_are_news_of_orders() -> None:
    order = PutRecord(maintenance.KIND, "mode", {}, 0)
    other = PutRecord("breaker", "x", {}, 0)
    assert news_of(Batch(changes=(order,))) == News(is_order=True)
    assert not news_of(Batch(changes=(other,)))
    assert (News(is_order=True) | News()).is_order


def test_orders_travel_between_nodes() -> None:
    for news in (News(is_order=True), News(is_due=True)):
        assert [unpack(word) for word in pack("a", news)] == [("a", news)]


def test_a_record_that_makes_no_sense_is_no_order() -> None:
    strange: list[Json] = [None, [], "on", {"enabled": True}]
    for value in [*strange, {**refusing().to_json(), "mode": "explode"}]:
        assert Standing.from_json(value) == Standing()
    assert Standing.from_json(refusing().to_json()) == refusing()
    assert not Orders().drains("a")
