"""Step type `loop`: the same steps again and again, until a condition holds.

A child's key is its iteration, from 1. Whether the loop goes on is judged from the last iteration
only: that it was begun proves that the earlier ones did not end it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from llm_orchestrator.language.templates import is_true
from llm_orchestrator.model import Json
from llm_orchestrator.steps.base import Child, Names, Outcome, Plan
from llm_orchestrator.steps.children import LazyChildren, find_failure, result_of


class Loop:
    """Repeats `steps` until `until` holds or `max_iterations` are done; binds result, iterations.

    At the limit the loop ends without an error: `is_done` (the third output) is then false, for a
    later step's condition. Without `until` it always runs to the limit, and is done there.
    """

    type: ClassVar[str] = "loop"
    outputs: ClassVar[tuple[str, ...]] = ("result", "iterations", "is_done")

    def plan(
        self,
        config: Any,
        names: Names,
        children: Mapping[str, Outcome],
        *,
        waited: Json | None = None,
    ) -> Plan:
        """One iteration more, or the end. Inside, names are `iteration` and `previous`."""
        if failure := find_failure(children):
            return Plan(error=f"iteration {failure}")
        ended = len(children)
        if ended:
            last = children[str(ended)]
            seen = {"steps": last.outputs, "iteration": ended}
            has_until = config.until is not None
            is_done = has_until and is_true(names.evaluate(config.until, seen))
            if is_done or ended >= config.max_iterations:
                return Plan(
                    outputs={
                        "result": result_of(config.steps, last),
                        "iterations": ended,
                        "is_done": is_done or not has_until,
                    }
                )
        return Plan(children=_iterations(config, children, ended + 1))


def _iterations(config: Any, children: Mapping[str, Outcome], count: int) -> LazyChildren:
    def make(place: int) -> Child:
        before = children[str(place)].outputs if place else {}
        names = {"iteration": place + 1, "previous": before}
        return Child(str(place + 1), config.steps, names)

    return LazyChildren(count, make)
