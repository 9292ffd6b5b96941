"""One action on every run that a filter finds: first a preview, then the result of each."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Depends, HTTPException

from llm_orchestrator.engine.machine import TRANSITIONS, Event
from llm_orchestrator.errors import OrchestratorError
from llm_orchestrator.model import Json, Run
from llm_orchestrator.server import auditing, models
from llm_orchestrator.server.openapi import answers
from llm_orchestrator.server.principal import Permission, Principal
from llm_orchestrator.server.replies import Reply
from llm_orchestrator.server.strict import JsonBody, StrictRoute
from llm_orchestrator.server.surface import Allowed, Surface, TheSurface

router = APIRouter(tags=["runs"], route_class=StrictRoute)
AT_ONCE = 16
"""So many runs are asked at a time."""


@router.post(
    "/runs/bulk",
    operation_id="runs_bulk",
    responses=answers(_200=models.BulkResult),
)
async def bulk(
    surface: TheSurface,
    who: Annotated[Principal, Depends(Allowed(Permission.RUN_CONTROL))],
    body: Annotated[models.Bulk, Depends(JsonBody(models.Bulk))],
) -> Reply:
    """Cancel, pause, resume or retry the runs that a filter finds. Nothing is done in a preview.

    Runs that refuse are named with the reason, the others are done.
    """
    found = await _select(surface, body)
    chosen = found[: body.limit]
    if body.preview:
        auditing.leave_out()
        items = [_would(run, Event(body.action)) for run in chosen]
    else:
        places = asyncio.Semaphore(AT_ONCE)

        async def one(run: Run) -> dict[str, Json]:
            async with places:
                return await _do(surface, run, body.action, by=who.name)

        items = list(await asyncio.gather(*(one(run) for run in chosen)))
        auditing.tell(action=body.action, runs=len(chosen))
    return Reply(
        {
            "action": body.action,
            "preview": body.preview,
            "count": len(chosen),
            "has_more": len(found) > len(chosen),
            "items": items,
        }
    )


@router.get("/runs/bulk", include_in_schema=False)
async def no_run() -> Reply:
    """Not the run of that id: there is none."""
    raise HTTPException(405)


async def _select(surface: Surface, body: models.Bulk) -> list[Run]:
    wanted = body.filter
    if not wanted.state:
        event = Event(body.action)
        states = [state for state, events in TRANSITIONS.items() if event in events]
        wanted = wanted.model_copy(update={"state": states})
    return await surface.store.look.runs(wanted.to_filter(body.limit + 1))


def _would(run: Run, event: Event) -> dict[str, Json]:
    following = TRANSITIONS[run.state].get(event)
    message = f"takes no {event}" if following is None else f"{event} would make it {following}"
    code = "refused" if following is None else None
    return _item(run, message, code=code)


async def _do(surface: Surface, run: Run, action: str, *, by: str) -> dict[str, Json]:
    try:
        async with surface.audit.action(
            actor=by,
            action=f"runs.{action}",
            target=run.run_id,
            detail={"via": "bulk"},
            is_announced=False,
        ):
            answer = await getattr(surface.operator, action)(run.run_id, by=by)
    except OrchestratorError as error:
        return _item(run, error.message, code=error.kind)
    return {
        "run_id": run.run_id,
        "state": answer.state.value,
        "is_done": answer.is_done,
        "message": answer.message,
        "code": None,
    }


def _item(run: Run, message: str, *, code: str | None) -> dict[str, Json]:
    return {
        "run_id": run.run_id,
        "state": run.state.value,
        "is_done": False,
        "message": message,
        "code": code,
    }
