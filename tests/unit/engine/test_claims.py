"""Which runs a node takes: production nodes on one store in memory, on virtual time."""

from __future__ import annotations

import asyncio
from typing import Any

from llm_orchestrator.engine.claims import DEATHS_MAX, POLL_S
from llm_orchestrator.engine.control import Operator
from llm_orchestrator.engine.node import registration
from llm_orchestrator.language.code import workflow
from llm_orchestrator.language.definition import Definition
from llm_orchestrator.model import NewRun
from llm_orchestrator.store.base import Batch, QueueLimit, Register
from tests.unit.engine.nodes import House
from tests.unit.engine.support import definition, virtually


def one(name: str, *, takes: float = 0.0, queue: str = "default") -> Definition:
    """A workflow of one step."""
    step = {"id": name, "type": "work", "takes": takes}
    return definition(name, steps=[step], queue=queue)


def test_news_of_a_run_wakes_the_node_and_lost_news_is_found_by_looking() -> None:
    async def main() -> None:
        house = House()
        home = await house.begin("a")
        await house.clock.sleep(POLL_S / 2)
        began = house.clock.monotonic()
        await house.ends(await house.accept(one("told")))
        assert house.clock.monotonic() - began < 0.1
        home.desk.is_deaf = True
        began = house.clock.monotonic()
        await house.ends(await house.accept(one("untold")))
        assert 0.1 < house.clock.monotonic() - began <= POLL_S + 0.1
        await house.stop()

    virtually(main())


def test_a_signal_that_nobody_told_of_reaches_a_run_in_memory() -> None:
    async def main() -> None:
        house = House()
        home = await house.begin("a")
        slow = {"id": "slow", "type": "work", "takes": 60.0}
        made = definition("waits", steps=[slow, {"id": "go", "type": "wait", "signal": "go"}])
        run_id = await house.accept(made)
        await house.until(lambda: home.work.seen)
        home.desk.is_deaf = True
        await Operator(house.store, house.clock).signal(run_id, "go")
        began = house.clock.monotonic()
        while "go" not in (await house.fold(run_id)).signals:
            await house.clock.sleep(0.1)
        assert house.clock.monotonic() - began <= 2 * POLL_S + 0.2
        assert house.row_state(run_id) == "running"
        await house.ends(run_id)
        await house.stop()

    virtually(main())


def test_a_full_node_leaves_the_rest_to_others_and_claims_when_it_has_room() -> None:
    async def main() -> None:
        house = House()
        first = await house.begin("a", runs_max=2)
        runs = [await house.accept(one("work", takes=10.0)) for _ in range(5)]
        await house.until(lambda: first.work.running == 2)
        await house.clock.sleep(5.0)
        assert (first.work.running, first.node.driver.room) == (2, 0)
        assert sorted(map(house.row_state, runs)) == ["pending"] * 3 + ["running"] * 2
        second = await house.begin("b")
        await house.until(lambda: second.work.running == 3)
        for run_id in runs:
            await house.ends(run_id)
        assert (first.work.running_max, second.work.running_max) == (2, 3)
        await house.stop()

    virtually(main())


def test_a_node_without_its_lease_claims_nothing() -> None:
    async def main() -> None:
        house = House()
        home = await house.begin("a")
        home.node.heart.holds = lambda: False  # type: ignore[method-assign]
        run_id = await house.accept(one("work"))
        await house.clock.sleep(30.0)
        assert house.row_state(run_id) == "pending"
        del home.node.heart.holds
        await house.ends(run_id)
        await house.stop()

    virtually(main())


def test_limits_of_a_queue_hold_over_all_nodes() -> None:
    async def main() -> None:
        house = House()
        limits = {"narrow": QueueLimit(concurrency=3)}
        homes = [await house.begin(name, queues=limits) for name in ("a", "b")]
        runs = [await house.accept(one("work", takes=5.0, queue="narrow")) for _ in range(9)]
        free = await house.accept(one("free"))
        most = 0
        while any(house.row_state(run_id) != "completed" for run_id in runs):
            most = max(most, sum(home.work.running for home in homes))
            await house.clock.sleep(0.5)
        assert most == 3
        await house.ends(free)
        await house.stop()

    virtually(main())


def test_a_run_whose_code_is_not_here_is_left_to_who_has_it() -> None:
    @workflow
    async def house_code(ctx: Any) -> str:
        return "done"

    async def main() -> None:
        house = House()
        first = await house.begin("a")
        stored = registration(house_code)
        names = stored.name, stored.version, stored.digest
        await house.store.commit(Batch(changes=(Register(stored),)))
        new = NewRun("018f0000-0000-7000-8000-000000000001", *names, input={})
        await Operator(house.store, house.clock).accept(new)
        await house.clock.sleep(20.0)
        assert house.row_state(new.run_id) == "pending"
        assert first.desk.asked.count("put_back") == 1, "it is asked for again and again"
        second = house.make("b")
        second.node.add_code(house_code)
        await house.as_node("b", second.node.start())
        await house.ends(new.run_id)
        again = NewRun("018f0000-0000-7000-8000-000000000002", *names, input={})
        await second.node.stop()
        await Operator(house.store, house.clock).accept(again)
        await house.clock.sleep(5.0)
        first.node.add_code(house_code)
        await house.ends(again.run_id)
        await first.node.stop()

    virtually(main())


def test_a_run_that_nodes_die_of_is_set_aside_and_goes_on_when_a_person_says_so() -> None:
    async def main() -> None:
        house = House()
        bad = await house.accept(one("bad", takes=1_000.0))
        for number in range(DEATHS_MAX):
            home = await house.begin(f"n{number}")
            await house.until(lambda home=home: home.work.seen)  # type: ignore[misc]
            await house.crash(f"n{number}")
        home = await house.begin("last")
        found = await house.ends(bad, "paused")
        assert found.reason == "quarantine"
        assert "n2" in str(found.error)
        assert home.work.seen == []
        await Operator(house.store, house.clock).resume(bad)
        await house.ends(bad)
        await house.stop()

    virtually(main())


def test_suspects_run_alone_so_that_the_innocent_are_not_blamed() -> None:
    async def main() -> None:
        house = House()
        suspects = [await house.accept(one(f"s{n}", takes=100.0)) for n in range(3)]
        for number in range(2):
            home = await house.begin(f"n{number}")
            await house.until(lambda home=home: home.work.running == 3)  # type: ignore[misc]
            await house.crash(f"n{number}")
        home = await house.begin("last")
        await house.until(lambda: home.work.running)
        await house.clock.sleep(50.0)
        assert home.work.running == 1
        for run_id in suspects:
            await house.ends(run_id)
        assert home.work.running_max == 1
        await house.stop()

    virtually(main())


def test_a_node_that_leaves_takes_no_new_run_and_hands_over_what_it_cannot_end() -> None:
    async def main() -> None:
        house = House()
        first = await house.begin("a")
        run_id = await house.accept(one("long", takes=30.0))
        await house.until(lambda: first.work.seen)
        leaving = asyncio.ensure_future(house.as_node("a", first.node.stop(grace_s=20.0)))
        await house.clock.sleep(1.0)
        other = await house.accept(one("other"))
        await house.clock.sleep(5.0)
        assert house.row_state(other) == "pending"
        assert house.state_of("a") == "leaving"
        second = await house.begin("b")
        await house.ends(other)
        assert not leaving.done(), "the other run waited for the grace to end"
        assert house.row_state(run_id) == "running"
        await leaving
        assert house.state_of("a") == "left"
        found = await house.ends(run_id)
        assert found.deaths == 0
        assert (first.work.calls["long"], second.work.calls["long"]) == (1, 1)
        await second.node.stop()

    virtually(main())
