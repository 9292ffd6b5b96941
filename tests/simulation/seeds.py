"""From a number to a seed's shape: which faults, which workflows, how many of each."""

from __future__ import annotations

import random

from tests.simulation.nemesis import EVENTS, MESSAGES
from tests.simulation.people import SHAPES
from tests.simulation.world import Shape

_EXTRAS = ("provider", "slow_provider", "slow_statements", "people", "go_back")


def shape_of(seed: int) -> Shape:
    """The same number gives the same shape, for ever."""
    chance = random.Random(seed)
    mode = chance.choice(("single", "sync", "sync"))
    mix = [kind for kind in MESSAGES if chance.random() < 0.35]
    mix += [kind for kind in EVENTS if chance.random() < 0.4 and kind != "rewind"]
    mix += [kind for kind in _EXTRAS if chance.random() < 0.4]
    if chance.random() < 0.15:
        mix.append("rewind")
    flows = tuple(chance.sample(SHAPES, chance.randint(1, 4)))
    if chance.random() < 0.2:
        flows = (*flows, "planned")
    return Shape(
        seed,
        mode=mode,
        nodes=chance.choice((2, 2, 3)),
        runs=chance.randint(2, 6),
        trouble_s=chance.choice((4.0, 7.0, 10.0)),
        mix=tuple(mix),
        flows=flows,
        rate=chance.choice((0.3, 0.8)),
    )
