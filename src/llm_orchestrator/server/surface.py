"""What every route stands on: one `Surface` per process, made by the composition root.

Routes change nothing in it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, NamedTuple, Protocol

from fastapi import Depends, Request

from llm_orchestrator.clock import Clock
from llm_orchestrator.engine.control import Operator
from llm_orchestrator.engine.node import Node
from llm_orchestrator.engine.store_breaker import StoreBreaker
from llm_orchestrator.errors import Refused, StoreResting, StoreUnavailable
from llm_orchestrator.model import Json, NewRun, Workflow
from llm_orchestrator.security.audit import AuditLog
from llm_orchestrator.server.auditing import asked
from llm_orchestrator.server.collect import Collector
from llm_orchestrator.server.feed import Feed
from llm_orchestrator.server.known import Known
from llm_orchestrator.server.principal import Guard, Permission, Principal
from llm_orchestrator.server.probe import Probe
from llm_orchestrator.server.waiting import Waiting
from llm_orchestrator.store.base import Database
from llm_orchestrator.telemetry.metrics import Metrics


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
    """Behind `gate`: a store that does not answer costs a request no time."""
    gate: StoreBreaker
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
    metrics: Metrics = field(default_factory=Metrics)
    known: Known = field(init=False)
    waiting: Waiting = field(init=False)
    probe: Probe = field(init=False)
    collector: Collector = field(init=False)
    audit: AuditLog = field(init=False)
    """This process's chain of the audit log."""
    _accepting: set[asyncio.Task[str]] = field(init=False, default_factory=set)

    def __post_init__(self) -> None:
        self.audit = AuditLog(self.store, self.clock, self.store.node_id, metrics=self.metrics)
        self.known = Known(self.store, self.clock)
        self.waiting = Waiting(self.store, self.clock, self.node, is_over=self.is_stopping)
        self.probe = Probe(self.store, self.clock)
        self.collector = Collector(
            self.store,
            self.clock,
            metrics=self.metrics,
            probe=self.probe,
            is_stopping=self.is_stopping,
        )

    async def accept(self, new: NewRun) -> str:
        """Make a run durable and start it, here or wherever there is room. Its id.

        With an idempotency key that was used before, the first run's id. Raises Maintenance or
        Draining, KeyReused for a key that came with another request; StoreUnavailable when nobody
        knows yet whether it is accepted: the same key tells.
        """
        await self.admission.check()
        if self.node is None:
            return await self.operator.accept(new)
        try:
            return await self._accept_here(self.node, new)
        except Refused:
            earlier = await self.operator.earlier(new)
            if earlier is None:
                raise
            return earlier

    async def _accept_here(self, node: Node, new: NewRun) -> str:
        """The node's writer gives up on nothing: it goes on when this request has been answered."""

        async def ask() -> str:
            accepting = asyncio.create_task(node.accept(new), name=f"accept {new.run_id}")
            self._accepting.add(accepting)
            accepting.add_done_callback(self._accepted)
            return await asyncio.shield(accepting)

        try:
            return await self.gate.call(ask)
        except StoreResting:
            raise  # it was not asked
        except StoreUnavailable as error:
            raise StoreUnavailable(
                f"run {new.run_id} may be accepted as soon as the store answers: {error.message}",
                hint="ask again with the same Idempotency-Key, or look for the run",
            ) from error

    def _accepted(self, task: asyncio.Task[str]) -> None:
        self._accepting.discard(task)
        if not task.cancelled():
            task.exception()  # whoever asked may have left: no "never retrieved" warning


def surface_in(request: Request) -> Surface:
    """The surface of the process that serves this request."""
    surface = request.app.state.surface
    assert isinstance(surface, Surface)
    return surface


async def surface_of(request: Request) -> Surface:
    """The same as a dependency: async, or FastAPI would run it on a thread."""
    return surface_in(request)


TheSurface = Annotated[Surface, Depends(surface_of)]


async def principal_of(request: Request) -> Principal:
    """Who asks. Raises Unauthenticated."""
    return surface_in(request).guard.principal(request.headers.get("authorization"))


class Allowed:
    """A dependency: `principal: Annotated[Principal, Depends(Allowed(Permission.RUN_READ))]`."""

    def __init__(self, permission: Permission, *, is_named_later: bool = False) -> None:
        self.permission = permission
        self.is_named_later = is_named_later
        """The route says what it is about, and announces it (auditing.py)."""

    async def __call__(self, request: Request) -> Principal:
        """The principal, if it may. Raises Unauthenticated, Denied, StoreError (auditing.py)."""
        principal = await principal_of(request)
        await asked(principal, self.permission, is_named_later=self.is_named_later)
        principal.demand(self.permission)
        return principal
