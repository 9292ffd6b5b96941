"""What every route stands on: one `Surface` per process, made by the composition root.

Routes change nothing in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, NamedTuple, Protocol

from fastapi import Depends, Request

from llm_orchestrator.clock import Clock
from llm_orchestrator.engine.control import Operator
from llm_orchestrator.engine.node import Node
from llm_orchestrator.model import Json, NewRun, Workflow
from llm_orchestrator.server.feed import Feed
from llm_orchestrator.server.principal import Guard, Permission, Principal
from llm_orchestrator.store.base import Database


class Parsed(NamedTuple):
    """A definition that was read and found right."""

    workflow: Workflow
    warnings: Sequence[str] = ()


class Catalogue(Protocol):
    """What the API needs to know of definitions; implemented by the composition root."""

    def parse(self, content: bytes, *, is_json: bool) -> Parsed:
        """Read a workflow file's text. Raises DefinitionError with every problem."""
        ...

    def new_run(self, stored: Workflow, inputs: Json, run_id: str) -> NewRun:
        """A run with checked inputs and the workflow's own queue, priority and labels.

        Raises InputError with every mistake.
        """
        ...


class Admission(Protocol):
    """Whether runs from outside may begin here."""

    async def check(self) -> None:
        """Raises Maintenance or Draining."""
        ...


class Setting(NamedTuple):
    """One setting as it may be shown, and where it came from."""

    name: str
    value: Json
    origin: str


@dataclass(slots=True)
class Surface:
    """See the module's docstring. `node` is None in a process that serves the API only."""

    store: Database
    clock: Clock
    operator: Operator
    catalogue: Catalogue
    feed: Feed
    guard: Guard
    admission: Admission
    node: Node | None = None
    settings: Sequence[Setting] = ()
    version: str = ""
    region: str = "local"
    is_started: Callable[[], bool] = lambda: True
    is_stopping: Callable[[], bool] = lambda: False
    extra: Mapping[str, object] = field(default_factory=dict)

    async def accept(self, new: NewRun) -> str:
        """Make a run durable and start it, here or wherever there is room. Its id.

        Raises Maintenance or Draining, Refused for a key that came with another input.
        """
        await self.admission.check()
        if self.node is not None and new.idempotency_key is None:
            return await self.node.accept(new)
        return await self.operator.accept(new)


def surface_of(request: Request) -> Surface:
    """The surface of the process that serves this request."""
    surface = request.app.state.surface
    assert isinstance(surface, Surface)
    return surface


TheSurface = Annotated[Surface, Depends(surface_of)]


def principal_of(request: Request, surface: TheSurface) -> Principal:
    """Who asks. Raises Unauthenticated."""
    return surface.guard.principal(request.headers.get("authorization"))


class Allowed:
    """A dependency: `principal: Annotated[Principal, Depends(Allowed(Permission.RUN_READ))]`."""

    def __init__(self, permission: Permission) -> None:
        self.permission = permission

    def __call__(self, principal: Annotated[Principal, Depends(principal_of)]) -> Principal:
        """The principal, if it may. Raises Unauthenticated, Denied."""
        principal.demand(self.permission)
        return principal
