"""Every request that changes something, or was not allowed to, stands in the audit log.

`Allowed` says who asks and with which permission (`asked`); that a permission is one of `WRITES` is
all that it takes. What leaves no durable record of its own (definitions, the server's settings) is
announced first: an intention that cannot be written stops the request. Runs have their journals:
for them the result alone is written. The answer ends once its entry is durable; one that cannot be
written is logged, for what was done is done.

Routes may add what only they know: `began` (a run was started: its entry need not wait for the
answer), `tell` (facts), `name` (what it is about), `leave_out` (nothing was to be changed: a
preview). A request without a valid token, or for which there is no route, is no entry: anybody
could fill the store.
"""

from __future__ import annotations

import asyncio
import logging
from contextvars import ContextVar

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llm_orchestrator.errors import OrchestratorError, StoreError
from llm_orchestrator.model import Json
from llm_orchestrator.security.audit import AuditLog, Result, reason
from llm_orchestrator.server.principal import Permission, Principal

logger = logging.getLogger(__name__)
ANNOUNCED = frozenset(
    {Permission.WORKFLOW_WRITE, Permission.WORKFLOW_DELETE, Permission.ADMIN_WRITE}
)
WRITES = ANNOUNCED | {Permission.RUN_EXECUTE, Permission.RUN_CONTROL, Permission.RUN_ANSWER}
_READING = frozenset({"GET", "HEAD", "OPTIONS"})
_NAMES = {
    "admin_breaker_reset": "breakers.reset",
    "admin_maintenance_disable": "maintenance.disable",
    "admin_maintenance_enable": "maintenance.enable",
    "admin_node_drain": "nodes.drain",
    "admin_node_undrain": "nodes.undrain",
    "cancel_response": "runs.cancel",
    "chat": "runs.start",
    "create_response": "runs.start",
    "earlier_state_restore": "runs.rewind",
    "earlier_workflow_restore": "runs.rewind",
    "runs_restore": "runs.rewind",
    "workflows_execute": "runs.start",
}
"""What has another name on the command line. The others: `runs_cancel` is `runs.cancel`."""


class _Note:
    """What is known of the request at hand."""

    def __init__(self, scope: Scope, log: AuditLog) -> None:
        self.scope = scope
        self.log = log
        self.actor = ""
        self.target = ""
        self.facts: dict[str, Json] = {}
        self.error: OrchestratorError | None = None
        self.writing: asyncio.Task[None] | None = None

    async def announce(self) -> None:
        """Raises StoreError."""
        entry = await self.log.write(**self._who(), result=Result.INTENDED, detail=self.facts)
        self.facts["intent"] = [entry.chain_id, entry.number]

    def end(self, result: Result) -> None:
        """Begin to write the entry, once."""
        if self.actor and self.writing is None:
            self.writing = asyncio.create_task(self._write(result))
            _unfinished.add(self.writing)
            self.writing.add_done_callback(_unfinished.discard)

    async def _write(self, result: Result) -> None:
        try:
            await self.log.write(**self._who(), result=result, detail=self.facts)
        except StoreError as error:
            logger.error("%s is not in the audit log: %s", self._who(), error.message)

    def _who(self) -> dict[str, str]:
        return {
            "actor": self.actor,
            "action": _action(self.scope),
            "target": self.target or _target(self.scope),
            "request_id": _header(self.scope, b"x-request-id"),
        }


_current: ContextVar[_Note | None] = ContextVar("llm_orchestrator_audit_note", default=None)
_unfinished: set[asyncio.Task[None]] = set()
"""Tasks that nobody waits for must be held by somebody."""


async def asked(principal: Principal, permission: Permission, *, is_named_later: bool) -> None:
    """Somebody who is known asks for something. Raises StoreError: then it must not be done.

    `is_named_later`: only the body says to what; the route calls `announce` before it does it.
    """
    note = _current.get()
    if note is None or permission not in WRITES:
        return
    note.actor = principal.name
    if permission in ANNOUNCED and permission in principal.permissions and not is_named_later:
        await note.announce()


def name(target: str, **facts: Json) -> None:
    """What it is about, where the path does not say so."""
    note = _current.get()
    if note is not None:
        note.target = target
        note.facts.update(facts)


async def announce() -> None:
    """It is about to be done. Raises StoreError: then it must not be."""
    note = _current.get()
    if note is not None:
        await note.announce()


def began(target: str, **facts: Json) -> None:
    """It is done, whatever becomes of the answer: write it now."""
    note = _current.get()
    if note is not None:
        note.target = target
        note.facts.update(facts)
        note.end(Result.SUCCESS)


def tell(**facts: Json) -> None:
    """Facts for the entry's detail; never a secret, never what users have written."""
    note = _current.get()
    if note is not None:
        note.facts.update(facts)


def leave_out() -> None:
    """Nothing is changed by it."""
    note = _current.get()
    if note is not None:
        note.actor = ""


def went_wrong(error: OrchestratorError) -> None:
    """Why it is refused or has failed."""
    note = _current.get()
    if note is not None:
        note.error = error


class Auditing:
    """See the module's docstring."""

    def __init__(self, app: ASGIApp, *, log: AuditLog) -> None:
        self._app = app
        self._log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in _READING:
            await self._app(scope, receive, send)
            return
        note = _Note(scope, self._log)
        status = 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                note.end(_result(note, status))
            is_last = message["type"] == "http.response.body" and not message.get("more_body")
            if is_last and note.writing is not None and status < 500:
                await asyncio.shield(note.writing)
            await send(message)

        place = _current.set(note)
        try:
            await self._app(scope, receive, watched)
        finally:
            _current.reset(place)
            if not status:
                note.facts["error"] = "there was no answer"
                note.end(Result.FAILED)


def _result(note: _Note, status: int) -> Result:
    if status < 400:
        return Result.SUCCESS
    note.facts["status"] = status
    if note.error is not None:
        note.facts["error"] = reason(note.error)
        return Result.FAILED if isinstance(note.error, StoreError) else Result.REFUSED
    return Result.FAILED if status >= 500 else Result.REFUSED


def _action(scope: Scope) -> str:
    found = scope.get("fastapi", {}).get("effective_route_context") or scope.get("route")
    endpoint = scope.get("endpoint")
    name = str(getattr(found, "operation_id", None) or getattr(endpoint, "__name__", "unknown"))
    if name in _NAMES:
        return _NAMES[name]
    group, _, verb = name.partition("_")
    return f"{'runs' if group == 'earlier' else group}.{verb}" if verb else name


def _target(scope: Scope) -> str:
    """The first of the path's parameters: a run, a workflow, a node."""
    return next((str(value) for value in scope.get("path_params", {}).values()), "")


def _header(scope: Scope, wanted: bytes) -> str:
    found = [value for name, value in scope["headers"] if name == wanted]
    return found[0].decode("latin-1") if found else ""
