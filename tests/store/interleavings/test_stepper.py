"""The stepper itself: it finds every order once, knows who waits, and holds commits at will."""

from __future__ import annotations

import itertools
from functools import partial

import asyncpg  # type: ignore[import-untyped]
import pytest

from tests.store.interleavings.planted import nothing
from tests.store.interleavings.stepper import Broken, expect
from tests.store.interleavings.world import Node, Scenario, Trial, World

pytestmark = pytest.mark.asyncio(loop_scope="module")

COUNT = "SELECT count(*) FROM records"
ADD = "INSERT INTO records VALUES ($1, $2, '', 1, '')"


def strangers(names: str, count: int, orders: list[str]) -> Scenario:
    """Nodes that write `count` rows each in a transaction, and never meet."""

    async def scenario(trial: Trial) -> None:
        async def write(node: Node) -> None:
            async with node.session.transaction():
                for number in range(count):
                    await node.session.execute(ADD, node.node_id, str(number))

        nodes = await trial.nodes(names)
        await trial.run(**{node.node_id: partial(write, node) for node in nodes})
        orders.append("".join(line[0] for line in trial.log))

    return scenario


@pytest.mark.parametrize(("names", "count"), [("ab", 1), ("ab", 2), ("abc", 1)])
async def test_every_order_comes_once(world: World, names: str, count: int) -> None:
    orders: list[str] = []
    await world.explore(strangers(names, count, orders))
    every = {"".join(order) for order in itertools.permutations(names * (count + 1))}
    assert len(orders) == len(set(orders))
    assert set(orders) == every


async def test_who_waits_is_known_and_goes_on_by_itself(world: World) -> None:
    async def scenario(trial: Trial) -> str:
        a, b = await trial.nodes("ab")
        sql = f"{ADD} ON CONFLICT DO NOTHING"
        await trial.run(
            a=lambda: a.session.execute(sql, "kind", "one"),
            b=lambda: b.session.execute(sql, "kind", "one"),
        )
        return "".join(trial.waited) + " waited for " + trial.first_commit()

    report = await world.explore(scenario)
    one_after_the_other = {" waited for a", " waited for b"}
    assert report.results == one_after_the_other | {"a waited for b", "b waited for a"}


async def test_a_deadlock_is_nobodys_rest(world: World) -> None:
    async def scenario(trial: Trial) -> int:
        a, b = await trial.nodes("ab")
        ended = []

        async def write(node: Node, keys: str) -> None:
            try:
                async with node.session.transaction():
                    for key in keys:
                        await node.session.execute(f"{ADD} ON CONFLICT DO NOTHING", "kind", key)
            except asyncpg.DeadlockDetectedError:
                ended.append(node.node_id)

        await trial.run(a=lambda: write(a, "xy"), b=lambda: write(b, "yx"))
        return len(ended)

    assert (await world.explore(scenario)).results == {0, 1}


async def test_begin_takes_no_snapshot(world: World) -> None:
    """So it is no step: the first statement sees what was committed since, and so does the next."""

    async def scenario(trial: Trial) -> tuple[int, ...]:
        node = await trial.node("a")
        seen = []
        async with node.session.transaction():
            for key in "xy":
                await trial.database.execute(ADD, "kind", key)
                seen.append(await node.session.fetchval(COUNT))
        return tuple(seen)

    assert (await world.explore(scenario)).results == {(1, 2)}


async def test_a_commit_that_is_held_is_durable_and_seen_by_nobody(world: World) -> None:
    async def scenario(trial: Trial) -> tuple[int, bool]:
        a, reader = await trial.node("a", hangs=True), await trial.node("reader")
        await trial.hold()
        got = await trial.run(
            a=lambda: a.session.execute(ADD, "kind", "one"),
            reader=lambda: reader.session.fetchval(COUNT),
        )
        is_after = trial.position("standby: release") < trial.position(f"reader: {COUNT}")
        return got["reader"], is_after

    report = await world.explore(scenario)
    assert report.results == {(0, False), (1, True)}
    assert report.orders == 4


async def test_only_sessions_that_hang_are_held(world: World) -> None:
    async def scenario(trial: Trial) -> bool:
        a = await trial.node("a")
        await trial.hold()
        await trial.run(a=lambda: a.session.execute(ADD, "kind", "one"))
        return any("release" in line for line in trial.log)

    assert (await world.explore(scenario)).results == {False}


async def test_a_promise_that_breaks_in_one_order_names_it(world: World) -> None:
    async def scenario(trial: Trial) -> None:
        a, b = await trial.nodes("ab")
        await trial.run(
            a=lambda: a.session.execute(ADD, "kind", "one"),
            b=lambda: b.session.execute(ADD, "kind", "two"),
        )
        who = [line[0] for line in trial.log]
        expect(who != list("abba"), "a is never first and last")

    order = r"in this order: a: INSERT .*, b: INSERT .*, b: commit, a: commit"
    with pytest.raises(Broken, match=rf"a is never first and last\n{order}"):
        await world.explore(scenario)
    assert len(await world.find(scenario, nothing)) == 1


async def test_a_scenario_that_cannot_be_repeated_is_noticed(world: World) -> None:
    calls = itertools.count()

    async def scenario(trial: Trial) -> None:
        nodes = await trial.nodes("a" if next(calls) else "ab")
        await trial.run(
            **{node.node_id: partial(node.session.execute, "SELECT 1") for node in nodes}
        )

    with pytest.raises(AssertionError, match="not repeatable"):
        await world.explore(scenario)
