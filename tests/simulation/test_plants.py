"""The simulation bites: each bug that is planted on purpose is caught within its seeds."""

from __future__ import annotations

from typing import Any

import pytest

from tests.simulation.append import Append
from tests.simulation.mvcc import Steps
from tests.simulation.plants import PLANTS, Plant, hunt, planted
from tests.simulation.test_simulation import simulate
from tests.simulation.world import World

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


@pytest.mark.parametrize("error", [NotImplementedError, KeyError])
def test_an_error_of_the_model_itself_fails_a_seed(error: type[Exception]) -> None:
    """No trouble of the store that a run outlives: the world is not what it says it is."""

    def fail(self: Append, *_: Any) -> Steps:
        yield 0.0
        raise error("the model does not know this")

    with planted({"tests.simulation.append.Append.run": fail}):
        violations = World(Plant("model", dict, ("kill",)).shape(0)).run()
    assert any("the model fails" in each and error.__name__ in each for each in violations)
