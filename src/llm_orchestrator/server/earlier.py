"""Words of the earlier system: what its paths meant by an id, and the shapes that it answered with.

`{id}` is a run's id, or a workflow's name; a name with `executionId` means that run. A name alone
means the workflow's one unfinished run; where there are several the request is refused with their
ids, where there is none it is the newest run that is meant.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from llm_orchestrator.engine.replay import Fold, checkpoints, fold, hidden
from llm_orchestrator.engine.steps_view import steps_of
from llm_orchestrator.errors import NotFound, Refused
from llm_orchestrator.model import Entry, Json, Run, RunState, stamp
from llm_orchestrator.server.surface import Surface
from llm_orchestrator.store.base import RunFilter
from llm_orchestrator.store.rows import is_run_id

STATES: dict[str, tuple[RunState, ...]] = {
    "pending": (RunState.PENDING,),
    "running": (RunState.RUNNING, RunState.WAITING),
    "paused": (RunState.PAUSED,),
    "completed": (RunState.COMPLETED,),
    "failed": (RunState.FAILED,),
    "cancelled": (RunState.CANCELLED,),
}
"""Its statuses, in our states: a run that waits is one of those that it called running."""
_UNFINISHED = tuple(state for state in RunState if not state.is_final)
_SHOWN = 5
OFFSET_MAX = 100_000
Word = Literal["pending", "running", "paused", "completed", "failed", "cancelled"]


async def meant(surface: Surface, name: str, execution_id: str | None) -> str:
    """The run that a path means. Raises NotFound, Refused."""
    if execution_id is not None:
        if not is_run_id(execution_id):
            raise NotFound(f"there is no run {execution_id!r}", hint="llmo runs list")
        run = await surface.store.look.run(execution_id)
        if run is None or (name not in (run.workflow, run.run_id)):
            raise NotFound(f"{name} has no run {execution_id}", hint="llmo runs list")
        return run.run_id
    if is_run_id(name):
        if await surface.store.look.run(name) is None:
            raise NotFound(f"there is no run {name}", hint="llmo runs list")
        return name
    return (await _one_of(surface, name)).run_id


async def _one_of(surface: Surface, workflow: str) -> Run:
    look = surface.store.look
    wanted = RunFilter(states=_UNFINISHED, workflow=workflow, limit=_SHOWN + 1)
    found = await look.runs(wanted)
    if len(found) > 1:
        ids = ", ".join(run.run_id for run in found[:_SHOWN])
        raise Refused(
            f"{workflow} has several unfinished runs ({ids}{', ...' * (len(found) > _SHOWN)})",
            hint="say which one: ?executionId=ID",
        )
    found = found or await look.runs(RunFilter(workflow=workflow, limit=1))
    if not found:
        raise NotFound(f"there is no run of {workflow}", hint="llmo runs list")
    return found[0]


async def run_page(surface: Surface, status: Word, *, limit: int, offset: int) -> dict[str, Json]:
    """GET /workflows?status=: runs, the newest first, and how many there are."""
    states = STATES[status]
    found = await surface.store.look.runs(RunFilter(states=states, limit=offset + limit))
    census = await surface.store.counts.census()
    total = sum(each.number for each in census if each.state in states)
    items = [row_facts(run) for run in found[offset:]]
    return {"items": items, "total": total, "limit": limit, "offset": offset}


def status_facts(run: Run, state: Fold) -> dict[str, Json]:
    """GET /workflows/{id}/status."""
    return {
        "id": run.run_id,
        "execution_id": run.run_id,
        "workflow_id": run.workflow,
        "workflow_name": run.workflow,
        "status": state.state.value,
        "reason": state.reason,
        "started_at": stamp(run.started_at),
        "updated_at": stamp(run.finished_at or run.started_at or run.created_at),
        "completed_at": stamp(run.finished_at),
        "error": _message(state.error),
    }


def row_facts(run: Run) -> dict[str, Json]:
    """One item of GET /workflows?status=."""
    return {
        "id": run.run_id,
        "execution_id": run.run_id,
        "workflow_id": run.workflow,
        "workflow_name": run.workflow,
        "status": run.state.value,
        "reason": run.reason,
        "started_at": stamp(run.started_at),
        "completed_at": stamp(run.finished_at),
    }


def state_facts(run: Run, entries: Sequence[Entry]) -> dict[str, Json]:
    """GET /state/{id}: the run with its context and its steps."""
    state = fold(run.run_id, entries)
    outputs = {step: done.result for step, done in state.finished.items()}
    steps = [
        {
            "step_id": row.step,
            "status": row.state.value,
            "started_at": stamp(row.first_at),
            "completed_at": stamp(row.last_at) if row.step in outputs else None,
            "outputs": outputs.get(row.step),
            "error": row.error or None,
            "retry_count": max(0, row.attempts - 1),
        }
        for row in steps_of(entries)
    ]
    context = {"inputs": state.accepted["input"], "outputs": outputs}
    return status_facts(run, state) | {"context": context, "steps": steps, "output": state.output}


def checkpoint_facts(run_id: str, entries: Sequence[Entry]) -> list[dict[str, Json]]:
    """GET /state/{id}/checkpoints: the newest first; without what a rewind has taken back."""
    taken_back = hidden(entries)
    return [
        {
            "id": f"{run_id}:{entry.seq}",
            "workflow_state_id": run_id,
            "step_id": entry.step,
            "timestamp": stamp(entry.recorded_at),
        }
        for entry in reversed(checkpoints(entries))
        if entry.seq not in taken_back
    ]


def seq_of(checkpoint_id: str, run_id: str) -> int:
    """Which entry a checkpoint's id means. Raises NotFound."""
    head, colon, seq = checkpoint_id.rpartition(":")
    is_seq = seq.isascii() and seq.isdigit() and len(seq) < 10
    if not is_seq or (colon and head != run_id):
        raise NotFound(f"run {run_id} has no checkpoint {checkpoint_id!r}")
    return int(seq)


def _message(error: Json) -> str | None:
    if isinstance(error, dict):
        return str(error.get("message", ""))
    return None if error is None else str(error)
