"""What the API does, apart from HTTP: for routes, names of the earlier system, model-shaped routes.

Starting a run with an idempotency key: whatever stands in the way of a new run (maintenance, inputs
that no longer fit, a workflow that is gone) does not stand in the way of one that the same request
has started before, so a repeat is answered from the key's record. "The same request" is what
`request_digest` covers: everything that makes the run, and nothing of how its caller waits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import blake2b
from typing import NamedTuple

from llm_orchestrator.clock import new_run_id
from llm_orchestrator.engine.acceptance import REQUEST
from llm_orchestrator.engine.control import read_journal
from llm_orchestrator.engine.driver import End
from llm_orchestrator.engine.replay import Fold, fold
from llm_orchestrator.engine.schedule import KIND as SCHEDULE
from llm_orchestrator.errors import KeyReused, NotFound, OrchestratorError, Refused
from llm_orchestrator.language.sandbox import aside
from llm_orchestrator.model import MICROSECONDS, Json, NewRun, Run, RunState, Workflow
from llm_orchestrator.server import auditing
from llm_orchestrator.server.surface import Surface
from llm_orchestrator.store.base import Batch, Change, PutRecord, RunFilter, Unregister
from llm_orchestrator.store.journal import encode


@dataclass(frozen=True, slots=True)
class Wish:
    """A run that somebody wants. None: as the workflow says."""

    workflow: str
    version: str | None = None
    inputs: Json = None
    labels: Mapping[str, str] | None = None
    priority: int | None = None
    queue: str | None = None
    delay_s: float | None = None
    key: str | None = None
    """Idempotency key; per workflow."""
    origin: Mapping[str, Json] = field(default_factory=dict)


class Started(NamedTuple):
    """A run that was started; `is_repeat`: by an earlier request with the same key."""

    run_id: str
    workflow: str
    version: str
    is_repeat: bool


def request_digest(wish: Wish) -> str:
    """Tells two requests apart that come with the same key."""
    given = {
        "version": wish.version,
        "inputs": wish.inputs or {},
        "labels": dict(wish.labels or {}),
        "priority": wish.priority,
        "queue": wish.queue,
        "delay_s": wish.delay_s or 0,
    }
    return blake2b(encode(given), digest_size=16).hexdigest()


async def start(surface: Surface, wish: Wish) -> Started:
    """Make a run durable and start it.

    Raises NotFound, InputError, KeyReused, Maintenance, Draining, StoreError.
    """
    run_id = new_run_id(surface.clock)
    origin = dict(wish.origin)
    if wish.key is not None:
        origin[REQUEST] = request_digest(wish)
    try:
        stored = await surface.known.find(wish.workflow, wish.version)
        make = partial(_new_run, surface, wish, stored, run_id=run_id, origin=origin)
        new = await aside(make)  # an input's `pattern` may be dear
        accepted = await surface.accept(new)
    except KeyReused:
        raise
    except OrchestratorError:
        if wish.key is None:
            raise
        asked = NewRun(
            run_id, wish.workflow, "", "", idempotency_key=wish.key, origin=origin, input=None
        )
        earlier = await surface.operator.earlier(asked)
        if earlier is None:
            raise
        accepted = earlier
    if accepted == run_id:
        auditing.began(run_id, workflow=stored.name, version=stored.version)
        return Started(run_id, stored.name, stored.version, is_repeat=False)
    auditing.leave_out()  # nothing was begun
    row = await run_row(surface, accepted)
    return Started(accepted, row.workflow, row.version, is_repeat=True)


def _new_run(
    surface: Surface, wish: Wish, stored: Workflow, *, run_id: str, origin: dict[str, Json]
) -> NewRun:
    new = surface.catalogue.new_run(stored, wish.inputs, run_id)
    changes: dict[str, Json] = {}
    if wish.labels:
        changes["labels"] = {**new.labels, **wish.labels}
    if wish.priority is not None:
        changes["priority"] = wish.priority
    if wish.queue is not None:
        changes["queue"] = wish.queue
    if wish.delay_s:
        changes["wake_at"] = surface.clock.now_us() + int(wish.delay_s * MICROSECONDS)
    if wish.key is not None:
        changes["idempotency_key"] = wish.key
    if origin:
        changes["origin"] = origin
    return replace(new, **changes) if changes else new


def state_now(surface: Surface, run_id: str) -> RunState:
    """What a run that was just started is, without asking the store."""
    node = surface.node
    is_here = node is not None and run_id in node.driver.driven
    return RunState.RUNNING if is_here else RunState.PENDING


async def run_row(surface: Surface, run_id: str) -> Run:
    """A run's row. Raises NotFound."""
    row = await surface.store.look.run(run_id)
    if row is None:
        raise NotFound(f"there is no run {run_id}", hint="llmo runs list")
    return row


async def run_and_state(surface: Surface, run_id: str) -> tuple[Run, Fold]:
    """A run's row and what its journal says. Raises NotFound, StoreDamaged."""
    row = await run_row(surface, run_id)
    return row, fold(run_id, (await read_journal(surface.store, run_id)).entries)


async def wait_end(surface: Surface, run_id: str, wait_s: float) -> End | None:
    """How a run ended or why it is paused; None when it moves still. Raises NotFound."""
    return await surface.waiting.ended(run_id, wait_s)


async def versions_of(surface: Surface, name: str, version: str | None = None) -> list[Workflow]:
    """The definitions of that name (and version), the oldest first."""
    known = await surface.store.shelf.workflows()
    return [each for each in known if each.name == name and version in (None, each.version)]


async def unregister(surface: Surface, name: str, version: str | None = None) -> list[Workflow]:
    """Forget definitions, and the schedule that belongs to the newest of them; what is gone.

    Raises NotFound, and Refused while a run refers to any of them.
    """
    gone = await versions_of(surface, name, version)
    if not gone:
        raise NotFound(f"no workflow {name!r} {version or ''}".rstrip() + " is registered")
    changes: list[Change] = [Unregister(name, version)]
    schedule, moved = await surface.store.shelf.record(SCHEDULE, name)
    if schedule is not None and schedule.get("version") in {each.version for each in gone}:
        changes.append(PutRecord(SCHEDULE, name, None, moved))
    receipt = await surface.store.commit(Batch(changes=tuple(changes)))
    surface.known.forget()
    if receipt.is_refused:
        found = await surface.store.look.runs(RunFilter(workflow=name, limit=1_000))
        used = [run for run in found if version in (None, run.version)]
        active = [run for run in used if not run.state.is_final]
        raise Refused(
            f"{len(used)} runs refer to {name} {version or ''}".rstrip()
            + f", {len(active)} of them have not ended",
            hint=f"llmo runs list --workflow {name}; retention removes runs that have ended",
        )
    return gone
