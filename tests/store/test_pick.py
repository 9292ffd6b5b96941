"""Which runs a node is offered: one queue, a bound over all nodes, what it leaves out, orphans."""

from __future__ import annotations

from typing import Any

from llm_orchestrator.model import RunState
from llm_orchestrator.store.base import NodeState, Outcome, Store, Wanted
from tests.store.support import HandClock, Writer, accepted, claim, moved, new_run, outcome

NODE = "node-1"


async def waiting(store: Store, *numbers: int, **values: Any) -> dict[int, Writer]:
    """Runs that are due, by the ends of their ids."""
    return {number: await accepted(store, new_run(number, **values)) for number in numbers}


async def claimed(store: Store, writer: Writer, owner: str = NODE) -> None:
    entry, change = claim(owner)
    assert await outcome(store, writer.append(entry, change=change)) is Outcome.LANDED


async def picked(store: Store, clock: HandClock, limit: int = 10, **wanted: Any) -> list[int]:
    runs = await store.pick(NODE, Wanted(limit, clock.now, **wanted))
    return [int(run.run_id[-3:]) for run in runs]


async def adopted(store: Store, limit: int = 10, **wanted: Any) -> list[int]:
    return [int(run_id[-3:]) for run_id in await store.adopt(NODE, limit, **wanted)]


def ids(writers: dict[int, Writer], *numbers: int) -> list[str]:
    return [writers[number].run_id for number in numbers]


async def test_one_queue_is_picked_alone(store: Store, clock: HandClock) -> None:
    await waiting(store, 901, 902)
    await waiting(store, 903, 904, queue="narrow")
    assert await picked(store, clock, queue="narrow") == [903, 904]
    assert await picked(store, clock, queue="nobody's") == []
    assert await picked(store, clock, queue="narrow", full_queues=["narrow"]) == []
    assert await picked(store, clock) == [901, 902, 903, 904]


async def test_a_bound_counts_what_any_node_drives(store: Store, clock: HandClock) -> None:
    writers = await waiting(store, 901, 902, 903, 904, 905, queue="narrow")
    others = await waiting(store, 911, 912)
    await claimed(store, others[911], "another")
    await claimed(store, writers[901], "another")
    await claimed(store, writers[902])
    narrow: dict[str, Any] = {"queue": "narrow", "concurrency": 4}
    assert await picked(store, clock, **narrow | {"concurrency": 2}) == []
    assert await picked(store, clock, **narrow | {"concurrency": 1}) == []  # set lower meanwhile
    found = await picked(store, clock, **narrow)
    assert found == [903, 904]
    for number in found:
        await claimed(store, writers[number])
    assert await picked(store, clock, **narrow) == []
    await moved(store, writers[901], RunState.COMPLETED)
    await moved(store, writers[902], RunState.WAITING, wake_at=clock.now + 5)
    assert await picked(store, clock, 1, **narrow) == [905]
    assert await picked(store, clock, queue="narrow") == [905]


async def test_runs_may_be_left_out(store: Store, clock: HandClock) -> None:
    writers = await waiting(store, 901, 902, 903)
    some = ids(writers, 901, 903)
    assert await picked(store, clock, except_runs=some) == [902]
    assert await picked(store, clock, 1, except_runs=[some[0]]) == [902]
    assert await picked(store, clock, except_runs=["no run's id", *some]) == [902]
    assert await picked(store, clock, except_runs=ids(writers, 901, 902, 903)) == []


async def test_what_was_put_back_is_offered_again(store: Store, clock: HandClock) -> None:
    writers = await waiting(store, 901, 902)
    assert await picked(store, clock, 1) == [901]
    await store.put_back(NODE, ids(writers, 901))
    assert await picked(store, clock) == [901, 902]


async def test_orphans_are_runs_of_nodes_that_do_not_live(store: Store) -> None:
    """A node that says that it leaves still drives its runs; nobody drives a dead one's."""
    members = await store.members()
    await members.join("living", "here", None)
    await members.beat("living", None)
    writers = await waiting(store, 901, 902, 903, 904, 905)
    writers |= await waiting(store, 906, priority=3)
    for number, owner in ((902, "living"), (903, "unknown"), (906, "living"), (904, "unknown")):
        await claimed(store, writers[number], owner)
    await moved(store, writers[904], RunState.COMPLETED)
    assert await adopted(store) == [903]
    await members.leave("living", NodeState.LEAVING)
    assert await adopted(store) == [903]
    assert await members.bury("living", 1)
    assert await adopted(store) == [906, 902, 903]
    assert await adopted(store, 2) == [906, 902]
    assert await adopted(store, except_runs=ids(writers, 902)) == [906, 903]
    assert await adopted(store, strange=["ab" * 32]) == []
    await members.close()


async def test_orphans_in_a_bounded_queue_are_still_counted(store: Store, clock: HandClock) -> None:
    """Whoever adopts one drives it on: it never was free."""
    writers = await waiting(store, 901, 902, queue="narrow")
    await claimed(store, writers[901], "unknown")
    assert await picked(store, clock, queue="narrow", concurrency=1) == []
    assert await adopted(store) == [901]
