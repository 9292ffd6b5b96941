"""Who may append: every order of two or three writers at the end of one journal."""

from __future__ import annotations

import pytest

from tests.store.interleavings import fence
from tests.store.interleavings.world import World

pytestmark = pytest.mark.asyncio(loop_scope="module")

SCENARIOS = {
    "two acceptances of one id": (fence.accept_one_id, {"a", "b"}),
    "two acceptances with one key": (fence.accept_one_key(), {"a", "b"}),
    "two acceptances with one key that hang": (fence.accept_one_key(hangs=True), {"a", "b"}),
    "two uses of one key": (fence.accept_one_key(is_same=False), {"a", "b"}),
    "two claims": (fence.claims(), {"a", "b"}),
    "two claims that hang": (fence.claims(hangs=True), {"a", "b"}),
    "two claims and a step": (fence.claims_and_step, {"a", "b", "c"}),
    "a step and a takeover": (fence.stale_step(), {"old", "new"}),
    "a step that hangs and a takeover": (fence.stale_step(hangs=True), {"old", "new"}),
    "two steps and a takeover": (fence.stale_step(count=2), {"old", "new"}),
    "an end that hangs and a takeover": (
        fence.stale_step(hangs=True, is_final=True),
        {"old", "new"},
    ),
    "a batch and a takeover": (fence.stale_in_batch, {"old", "new"}),
    "a cancel and a claim": (fence.cancel_and_claim, {"cancelled", "asked"}),
    "an old coroutine": (fence.zombie, {"refused"}),
    "a store that was put back": (fence.put_back, {"refused"}),
    "a store that was restored": (fence.restored, {"refused"}),
    "the same bytes again": (fence.resend, {"first", "second"}),
    "a cut": (fence.cut(), {"answered", "free"}),
    "a cut before a commit": (fence.cut(is_whole=False), {"answered", "free"}),
    "a cut in a commit that hangs": (fence.cut(hangs=True), {"answered", "taken", "free"}),
    "a cut of a statement that is late": (
        fence.cut(is_locked=True),
        {"answered", "taken", "free"},
    ),
}


@pytest.mark.parametrize("name", SCENARIOS)
async def test_in_every_order(world: World, name: str) -> None:
    scenario, results = SCENARIOS[name]
    report = await world.explore(scenario)
    assert report.results == results
