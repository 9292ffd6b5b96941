"""The nodes of a store: they join, beat, leave, are buried. How they lose touch is elsewhere."""

from __future__ import annotations

from llm_orchestrator.store.base import Member, Members, NodeState, Pulse, Store

NODE = "node-a"


async def joined(store: Store) -> Members:
    members = await store.members()
    await members.join(NODE, "north", {"host": "one"})
    return members


def own(pulse: Pulse) -> Member:
    return next(member for member in pulse.members if member.node_id == NODE)


async def listed(store: Store) -> dict[str, Member]:
    return {member.node_id: member for member in await store.shelf.nodes()}


async def test_a_node_that_joins_is_alive_and_listed(store: Store) -> None:
    members = await joined(store)
    member = (await listed(store))[NODE]
    assert (member.node_id, member.region, member.state) == (NODE, "north", NodeState.ALIVE)
    assert (member.beat, member.is_connected, member.info) == (0, True, {"host": "one"})
    assert member.started_at == member.heartbeat_at
    await members.close()


async def test_each_beat_counts_and_tells_what_is_new_of_the_node(store: Store) -> None:
    members = await joined(store)
    first = await members.beat(NODE, {"runs": 1})
    second = await members.beat(NODE, {"runs": 2})
    assert (own(first).beat, own(second).beat) == (1, 2)
    assert own(second).info == {"runs": 2}
    assert own(second).region == "north"
    assert second.server == first.server
    assert second.now_us >= first.now_us
    assert own(second).heartbeat_at >= own(first).heartbeat_at >= own(first).started_at
    await members.close()


async def test_whoever_only_watches_does_not_beat(store: Store) -> None:
    members = await joined(store)
    await members.beat(NODE, {})
    pulse = await members.watch(NODE)
    assert own(pulse) == own(await members.watch(NODE))
    assert own(pulse).beat == 1
    assert [member.node_id for member in (await members.watch("nobody")).members] == [NODE]
    await members.close()


async def test_only_who_is_still_as_silent_as_he_was_is_buried(store: Store) -> None:
    members = await joined(store)
    await members.beat(NODE, {})
    assert not await members.bury(NODE, 0)
    assert not await members.bury("nobody", 0)
    assert own(await members.beat(NODE, {})).state == NodeState.ALIVE
    assert await members.bury(NODE, 2)
    assert not await members.bury(NODE, 2)
    await members.close()


async def test_the_dead_stay_dead_and_are_told_so(store: Store) -> None:
    members = await joined(store)
    assert await members.bury(NODE, 0)
    pulse = await members.beat(NODE, {"is": "late"})
    assert (own(pulse).state, own(pulse).beat) == (NodeState.DEAD, 0)
    assert own(pulse).info == {"host": "one"}
    await members.leave(NODE, NodeState.LEFT)
    assert own(await members.beat(NODE, {})).state == NodeState.DEAD
    assert (await members.watch("somebody")).members == []
    assert (await listed(store))[NODE].state == NodeState.DEAD
    await members.close()


async def test_whoever_leaves_beats_until_he_has_left(store: Store) -> None:
    members = await joined(store)
    await members.leave(NODE, NodeState.LEAVING)
    pulse = await members.beat(NODE, {})
    assert (own(pulse).state, own(pulse).beat) == (NodeState.LEAVING, 1)
    await members.leave(NODE, NodeState.LEFT)
    assert own(await members.beat(NODE, {})).beat == 1
    assert (await members.watch("somebody")).members == []
    assert not await members.bury(NODE, 1)
    assert (await listed(store))[NODE].state == NodeState.LEFT
    await members.close()


async def test_whoever_comes_back_is_another_node(store: Store) -> None:
    members = await joined(store)
    assert await members.bury(NODE, 0)
    await members.join("node-a.1", "north", {})
    pulse = await members.beat("node-a.1", {})
    assert [member.node_id for member in pulse.members] == ["node-a.1"]
    assert set(await listed(store)) == {NODE, "node-a.1"}
    await members.close()
