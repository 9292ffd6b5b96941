"""Step type `workflow`: another workflow as a run of its own, with its own journal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from llm_orchestrator.model import Json, RunState
from llm_orchestrator.steps.base import ChildRun, Names, Outcome, Plan


class ChildWorkflow:
    """Starts `workflow` (by name, or by the name that its file was given); binds output, run_id."""

    type: ClassVar[str] = "workflow"
    outputs: ClassVar[tuple[str, ...]] = ("output", "run_id")

    def plan(
        self,
        config: Any,
        names: Names,
        children: Mapping[str, Outcome],
        *,
        waited: Json | None = None,
    ) -> Plan:
        """The child first, then its output; an error unless it completed."""
        workflow = config.workflow or config.file
        if waited is None:
            return Plan(wait=ChildRun(workflow, config.version, config.inputs))
        if waited["state"] != RunState.COMPLETED:
            error = waited.get("error") or "no error was recorded"
            reason = error.get("message", error) if isinstance(error, Mapping) else error
            return Plan(error=f"run {waited['run_id']} of {workflow} {waited['state']}: {reason}")
        return Plan(outputs={"output": waited.get("output"), "run_id": waited["run_id"]})
