"""The eight wrong fences, planted: each is caught by the scenarios that hold the right one.

What goes wrong with each was first seen by hand; `expected` is what some order must say of it. A
variant that changes nothing, or that no order shows, fails its test.
"""

from __future__ import annotations

import pytest

from tests.store.interleavings import fence, variants
from tests.store.interleavings.planted import Plant, nothing
from tests.store.interleavings.variants import by_node
from tests.store.interleavings.world import Scenario, World

pytestmark = pytest.mark.asyncio(loop_scope="module")

BEHIND = "nothing lands behind the new owner's back"
UNKNOWN = "the new owner knows what was done before"
WRONG: dict[str, tuple[Scenario, Plant, str]] = {
    "an epoch that is read and not locked": (
        fence.stale_step(take_over=variants.move),
        variants.BY_EPOCH,
        BEHIND,
    ),
    "a key share lock on the node and a burial that does not conflict": (
        fence.stale_step(take_over=variants.bury),
        by_node("KEY SHARE"),
        BEHIND,
    ),
    "a share lock on the node": (
        variants.step_and_beat,
        by_node("SHARE"),
        "a beat and a commit do not wait for each other",
    ),
    "an advisory lock and the check in one statement": (
        fence.stale_step(take_over=variants.lock_and_move),
        variants.BY_LOCK,
        BEHIND,
    ),
    "a takeover that looks with a snapshot from before its wait": (
        fence.stale_step(take_over=variants.lock_and_look_in_one_snapshot),
        by_node("KEY SHARE"),
        UNKNOWN,
    ),
    "a takeover that locks and looks in one statement": (
        fence.stale_step(take_over=variants.lock_and_look_in_one_statement),
        by_node("KEY SHARE"),
        UNKNOWN,
    ),
    "an entry that is skipped on conflict": (
        fence.stale_step(count=2),
        variants.SKIPPING,
        "the journal is one chain: entry does not fit its digest (4)",
    ),
    "the primary key alone": (
        fence.put_back,
        variants.BY_KEY,
        "a writer whose past is gone is refused",
    ),
    "the node's row alone": (
        fence.zombie,
        variants.BY_NODE_ALONE,
        "an old coroutine is refused",
    ),
}
SOUND: dict[str, tuple[Scenario, Plant]] = {
    "a key share lock on the node and a burial that locks it first": (
        fence.stale_step(take_over=variants.lock_and_bury),
        by_node("KEY SHARE"),
    ),
    "the same, in a commit that hangs": (
        fence.stale_step(take_over=variants.lock_and_bury, hangs=True),
        by_node("KEY SHARE"),
    ),
    "a key share lock and a beat": (variants.step_and_beat, by_node("KEY SHARE")),
    "an advisory lock in a statement of its own": (
        fence.stale_step(take_over=variants.lock_and_move, step=variants.lock_then_append),
        variants.BY_EPOCH,
    ),
    "our own fence and a beat": (variants.step_and_beat, nothing),
}


@pytest.mark.parametrize("name", WRONG)
async def test_a_wrong_fence_is_caught(world: World, name: str) -> None:
    scenario, plant, expected = WRONG[name]
    found = await world.find(scenario, plant)
    assert [broken for broken in found if str(broken).startswith(expected)]


@pytest.mark.parametrize("name", SOUND)
async def test_a_sound_fence_is_not(world: World, name: str) -> None:
    scenario, plant = SOUND[name]
    assert (await world.explore(scenario, plant)).orders > 1
