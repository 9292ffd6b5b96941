"""Runs that wait for somebody: every order of those who look for them."""

from __future__ import annotations

import pytest

from tests.store.interleavings import due
from tests.store.interleavings.world import World

pytestmark = pytest.mark.asyncio(loop_scope="module")

EITHER = {"a", "b"}
SCENARIOS = {
    "two picks": (due.picks("ab"), EITHER),
    "two picks that hang": (due.picks("ab", hangs=True), EITHER),
    "three picks": (due.picks("abc"), {"a", "b", "c"}),
    "a pick and a claim": (due.pick_and_claim, {"not offered", "a", "b"}),
    "a queue for one": (due.narrow_queue, EITHER),
    "two looks for orphans": (due.adopts, EITHER),
    "a burial and a beat": (due.bury_and_beat, {"buried", "alive"}),
    "a burial and a step": (due.bury_and_step, {"old", "new"}),
    "an adoption and a park": (due.adopt_and_park, {"taken", "parked"}),
    "an ageing out and a retry": (due.expire_and_retry, {"gone", "kept"}),
    "an ageing out and a message": (due.expire_and_post, EITHER),
}


@pytest.mark.parametrize("name", SCENARIOS)
async def test_in_every_order(world: World, name: str) -> None:
    scenario, results = SCENARIOS[name]
    report = await world.explore(scenario)
    assert report.results == results
