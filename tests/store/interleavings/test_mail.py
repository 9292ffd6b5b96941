"""Inboxes and records: every order of those who write to them at once."""

from __future__ import annotations

import pytest

from tests.store.interleavings import mail
from tests.store.interleavings.world import World

pytestmark = pytest.mark.asyncio(loop_scope="module")

EITHER = {"a", "b"}
SLEEPS = {"seen", "kept awake", "woken"}
SCENARIOS = {
    "a park and a message": (mail.park_and_post(), SLEEPS),
    "a park that hangs and a message": (mail.park_and_post("a"), SLEEPS),
    "a park and a message that hangs": (mail.park_and_post("b"), SLEEPS),
    "an end and a message": (mail.change_and_post, EITHER),
    "a claim and a message": (mail.claim_and_post, EITHER),
    "a child that ends and a parent that parks": (mail.child_and_parent, EITHER),
    "two ends that cross": (mail.cross, {"at once", "again"}),
    "two messages": (
        mail.signals(keys=(None, None)),
        {(name, count) for name in "ab" for count in range(3)},
    ),
    "two messages that hang": (
        mail.signals(keys=("one", "two"), hangs=True),
        {(name, count) for name in "ab" for count in (0, 1, 2)},
    ),
    "one message twice": (
        mail.signals(keys=("same", "same")),
        {(name, count) for name in "ab" for count in range(2)},
    ),
    "a message taken and another one": (mail.consume_and_post, {"a", "b", "c"}),
    "a message taken and a takeover": (mail.stale_consume, {"old", "new"}),
    "a record made twice": (mail.records(None, 1, 2), EITHER),
    "a record moved twice": (mail.records(0, 1, 2), EITHER),
    "a record moved and removed": (mail.records(0, 1, None), EITHER),
    "a record removed twice": (mail.records(0, None, None), EITHER),
    "a record of two runs": (mail.record_and_append, EITHER),
    "a repair and a message": (mail.mend_and_post, EITHER),
    "a repair and a claim": (mail.mend_and_claim, EITHER),
}


@pytest.mark.parametrize("name", SCENARIOS)
async def test_in_every_order(world: World, name: str) -> None:
    scenario, results = SCENARIOS[name]
    report = await world.explore(scenario)
    assert report.results == results
