"""Step type `parallel`: tasks side by side. Steps around see the tasks by their own ids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from llm_orchestrator.model import Json
from llm_orchestrator.steps.base import Child, Names, Outcome, Plan
from llm_orchestrator.steps.children import find_failure, to_limit


class Parallel:
    """Runs each of `tasks` in a scope named by its id; `output` binds results."""

    type: ClassVar[str] = "parallel"
    outputs: ClassVar[tuple[str, ...]] = ("results",)

    def plan(
        self,
        config: Any,
        names: Names,
        children: Mapping[str, Outcome],
        *,
        waited: Json | None = None,
    ) -> Plan:
        """All tasks at once. Results are {task id: its outputs}, null for a skipped task."""
        if failure := find_failure(children):
            return Plan(error=f"task {failure}")
        if len(children) < len(config.tasks):
            tasks = [Child(task.id, (task,), is_shared=True) for task in config.tasks]
            return Plan(children=tasks, max_concurrency=to_limit(config.max_concurrency))
        results = {task.id: children[task.id].outputs.get(task.id) for task in config.tasks}
        return Plan(outputs={"results": results})
