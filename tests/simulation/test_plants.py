"""The simulation bites: each bug that is planted on purpose is caught within its seeds."""

from __future__ import annotations

import pytest

from tests.simulation.plants import PLANTS, Plant, hunt, planted
from tests.simulation.test_simulation import simulate

NAMES = [plant.name for plant in PLANTS]


@pytest.mark.parametrize("name", NAMES)
def test_planted_bug_is_caught(name: str) -> None:
    told = simulate(name, module="tests.simulation.hunts")
    assert told.startswith(f"{name} (")


def test_there_are_enough() -> None:
    assert len(NAMES) == len(set(NAMES)) >= 16


def test_a_plant_that_changes_nothing_is_not_caught() -> None:
    harmless = Plant("nothing", dict, ("kill",), seeds=2)
    assert hunt(harmless) is None


def test_a_patch_that_changes_nothing_is_refused() -> None:
    from llm_orchestrator.engine.heart import Heart

    with (
        pytest.raises(LookupError),
        planted({"llm_orchestrator.engine.heart.Heart.holds": Heart.holds}),
    ):
        raise AssertionError("unreachable")
