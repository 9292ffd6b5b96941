"""Bugs that are planted on purpose, each with the trouble in which it shows.

A plant is a patch at run time: of the model's statement (what a naive SQL would do), of the store's
protocol, or of the engine. Each says which seeds to play; one of the first few must be caught.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

from tests.simulation import plants_engine, plants_store
from tests.simulation.seeds import shape_of
from tests.simulation.world import Shape, World

Patches = dict[str, Any]
"""Dotted name to what stands there instead."""


@dataclass(frozen=True)
class Plant:
    """One bug. `mix`, `flows`, `mode` make the trouble in which it matters."""

    name: str
    patches: Callable[[], Patches]
    mix: tuple[str, ...]
    flows: tuple[str, ...] = ("sequence", "parallel", "sleeper")
    mode: str = "single"
    rate: float = 0.8
    seeds: int = 25
    harm: float = 1.0

    def shape(self, seed: int) -> Shape:
        """A seed's shape, with this plant's trouble."""
        return replace(
            shape_of(seed),
            mix=self.mix,
            flows=self.flows,
            mode=self.mode,
            rate=self.rate,
            harm=self.harm,
            runs=6,
            trouble_s=8.0,
        )


@contextmanager
def planted(patches: Patches) -> Iterator[None]:
    """Put the patches in place. Raises LookupError for one that changes nothing."""
    with ExitStack() as stack:
        for name, value in patches.items():
            target = patch(name, value)
            original, _ = target.get_original()
            if original is value:
                raise LookupError(f"{name} is already that")
            stack.enter_context(target)
        yield


def hunt(plant: Plant, *, is_planted: bool = True) -> tuple[int, str] | None:
    """The first seed that catches the bug, and what it says; None when none does."""
    for seed in range(plant.seeds):
        patches = plant.patches() if is_planted else {}
        with planted(patches):
            violations = World(plant.shape(seed)).run()
        if any("the model fails" in each for each in violations):
            raise NotImplementedError(violations)
        if violations:
            return seed, violations[0]
    return None


_KILLS = ("kill", "freeze")
PLANTS = [
    # What naive SQL does (the table of broken variants in the design's facts).
    Plant("fence_removed", plants_store.fence_removed, (*_KILLS, "cut", "slow")),
    Plant(
        "predecessor_unchecked",
        plants_store.predecessor_unchecked,
        ("rewind", "freeze"),
        rate=0.5,
    ),
    Plant("on_conflict_do_nothing", plants_store.on_conflict_do_nothing, (*_KILLS, "cut", "slow")),
    Plant(
        "epoch_only",
        plants_store.epoch_only,
        ("people", "slow", "slow_statements"),
        ("listener", "sleeper", "endless"),
        harm=3.0,
    ),
    Plant(
        "lock_and_check_in_one_statement",
        plants_store.lock_and_check,
        ("people", "slow", "slow_statements"),
        ("listener", "sleeper", "endless"),
        harm=3.0,
    ),
    Plant(
        "node_fence_only",
        plants_store.node_fence_only,
        ("people", "slow", "slow_statements"),
        ("listener", "sleeper", "endless"),
        harm=3.0,
    ),
    Plant(
        "lost_wakeup",
        plants_store.lost_wakeup,
        ("lost_news", "people", "slow_provider"),
        ("listener",),
        harm=3.0,
    ),
    Plant("double_claim", plants_store.double_claim, ("slow_statements", "twin_news")),
    # The store's protocol.
    Plant("ack_before_commit", plants_store.ack_before_commit, ("crash", "kill", "cut")),
    Plant(
        "resend_without_asking",
        plants_store.resend_without_asking,
        ("after", "people"),
        ("listener",),
        harm=6.0,
    ),
    Plant(
        "warning_unheard",
        plants_store.warning_unheard,
        ("standby", "cancel_wait", "promote"),
        mode="sync",
        rate=2.0,
        seeds=40,
    ),
    # The engine.
    Plant("lease_on_wall_clock", plants_engine.lease_on_wall_clock, ("cut", "freeze")),
    Plant("takeover_without_epoch", plants_engine.takeover_without_epoch, ("kill",)),
    Plant("once_reissued", plants_engine.once_reissued, ("kill", "provider"), ("effects",)),
    Plant("fenced_goes_on", plants_engine.fenced_goes_on, ("cut", "freeze")),
    Plant("verdict_ignored", plants_engine.verdict_ignored, ("cut", "freeze")),
    Plant(
        "cancel_unheard",
        plants_engine.cancel_unheard,
        ("people", "slow_provider"),
        ("endless",),
    ),
    Plant("child_started_twice", plants_engine.child_started_twice, _KILLS, ("parent",)),
    Plant(
        "fold_forgets_rewind",
        plants_engine.fold_forgets_rewind,
        ("people", "go_back", "slow_provider"),
        ("sequence", "sleeper"),
    ),
    Plant("plan_fired_twice", plants_engine.plan_fired_twice, ("freeze",), ("planned",)),
    Plant(
        "key_survives_rewind",
        plants_engine.key_survives_rewind,
        ("people", "go_back", "slow_provider"),
        ("sequence", "sleeper"),
    ),
    Plant(
        "lost_run_left_alone",
        plants_engine.lost_run_left_alone,
        ("crash", "after", "before", "provider"),
        ("parent",),
        rate=1.5,
        seeds=40,
        harm=2.0,
    ),
    Plant("claims_of_dead_kept", plants_engine.orphans_unclaimed, ("kill",)),
]
