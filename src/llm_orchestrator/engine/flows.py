"""From a run to the code that it runs: a Python workflow here, or a stored definition."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from llm_orchestrator.engine.context import Context, unpack_input
from llm_orchestrator.engine.execution import Execution
from llm_orchestrator.errors import NotFound
from llm_orchestrator.language.code import CodeWorkflow
from llm_orchestrator.model import Json, Workflow

if TYPE_CHECKING:
    from llm_orchestrator.engine.interpreter import Tools

Body = Callable[[Execution], Awaitable[Json]]


@dataclass(frozen=True, slots=True)
class Flow:
    """How to run one workflow."""

    name: str
    version: str
    digest: str
    body: Body
    timeout_s: float | None = None
    queue: str = "default"
    priority: int = 0
    labels: Mapping[str, str] | None = None
    concurrency_max: int = 0


class Definitions(Protocol):
    """The part of a store that keeps definitions."""

    async def workflow(
        self, name: str, version: str | None = None, digest: str | None = None
    ) -> Workflow | None: ...


class Flows:
    """Finds flows and keeps them: a definition is parsed once per process."""

    def __init__(
        self, definitions: Definitions, make_tools: Callable[[], Tools] | None = None
    ) -> None:
        self._definitions = definitions
        self._make_tools = make_tools
        self._tools: Tools | None = None
        self._flows: dict[str, Flow] = {}

    def add_code(self, workflow: CodeWorkflow[Any]) -> Flow:
        """Make a Python workflow runnable in this process."""
        found = self._flows.get(workflow.digest)
        if found is None:
            found = self._flows[workflow.digest] = _code_flow(workflow)
        return found

    def add_definition(self, stored: Workflow) -> Flow:
        """Make a definition runnable before it is stored."""
        if stored.digest not in self._flows:
            self._flows[stored.digest] = self._definition_flow(stored)
        return self._flows[stored.digest]

    async def find(self, name: str, version: str | None, digest: str | None = None) -> Flow | None:
        """The flow of a run, or None when its code is not in this process.

        Raises NotFound for a workflow that nobody registered, StoreDamaged for a broken definition.
        """
        if digest is not None and digest in self._flows:
            return self._flows[digest]
        stored = await self._definitions.workflow(name, version, digest)
        if stored is None:
            raise NotFound(
                f"no workflow {name} {version or ''} is registered".replace("  ", " "),
                hint="llmo workflows list",
            )
        if is_code(stored):
            return self._flows.get(stored.digest)
        return self.add_definition(stored)

    def tools(self) -> Tools:
        """Step types, templates and providers; made when they are first needed."""
        if self._tools is None:
            if self._make_tools is None:
                raise NotFound("this engine runs Python workflows only")
            self._tools = self._make_tools()
        return self._tools

    def _definition_flow(self, stored: Workflow) -> Flow:
        from llm_orchestrator.engine.interpreter import definition_flow  # noqa: PLC0415 (slow)

        return definition_flow(stored, self.tools())


def is_code(stored: Workflow) -> bool:
    """True when the stored definition only names a Python workflow."""
    return bool(json.loads(stored.definition).get("kind") == "python")


def _code_flow(workflow: CodeWorkflow[Any]) -> Flow:
    async def body(execution: Execution) -> Json:
        context = Context(execution)
        args, kwargs = unpack_input(execution.fold.accepted["input"])
        output = await workflow.function(context, *args, **kwargs)
        context.finish()
        return output

    return Flow(
        workflow.name,
        workflow.version,
        workflow.digest,
        body,
        timeout_s=workflow.timeout_s,
        queue=workflow.queue,
    )
