"""Step type `map`: the same steps for each item of a list, each in a scope of its own.

A child's key is the item's place, from 0. The list is read out of the names each time a plan is
asked for, so it must be the same each time: what a step sees before it starts does not change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from llm_orchestrator.model import Json
from llm_orchestrator.steps.base import Child, Names, Outcome, Plan
from llm_orchestrator.steps.children import LazyChildren, find_failure, result_of, to_limit
from llm_orchestrator.steps.values import describe


class Map:
    """Runs `steps` for each of `items`; `output` binds results, in the order of the items."""

    type: ClassVar[str] = "map"
    outputs: ClassVar[tuple[str, ...]] = ("results",)

    def plan(
        self,
        config: Any,
        names: Names,
        children: Mapping[str, Outcome],
        *,
        waited: Json | None = None,
    ) -> Plan:
        """All items at once. A result is the last step's first output, null when skipped."""
        if failure := find_failure(children):
            return Plan(error=f"item {failure}")
        items = config.items
        if isinstance(items, str):
            items = names.evaluate(items)
        if not isinstance(items, list | tuple):
            return Plan(error=f"items are {describe(items)}; map needs a list")
        if len(children) < len(items):
            return Plan(
                children=_children(config, items),
                max_concurrency=to_limit(config.max_concurrency),
            )
        results = [result_of(config.steps, children[str(place)]) for place in range(len(items))]
        return Plan(outputs={"results": results})


def _children(config: Any, items: Sequence[Json]) -> LazyChildren:
    def make(place: int) -> Child:
        names = {config.item: items[place], "index": place}
        return Child(str(place), config.steps, names)

    return LazyChildren(len(items), make)
