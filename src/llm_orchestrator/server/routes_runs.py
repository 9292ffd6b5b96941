"""Looking at runs and changing them, one at a time."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query

from llm_orchestrator.server import acts, models, shapes
from llm_orchestrator.server.openapi import answers
from llm_orchestrator.server.principal import Permission, Principal
from llm_orchestrator.server.replies import Reply
from llm_orchestrator.server.strict import StrictRoute, invalid
from llm_orchestrator.server.surface import Allowed, TheSurface
from llm_orchestrator.store.rows import is_run_id

router = APIRouter(tags=["runs"], route_class=StrictRoute)
READ = Depends(Allowed(Permission.RUN_READ))
Controller = Annotated[Principal, Depends(Allowed(Permission.RUN_CONTROL))]
Wait = Annotated[
    float, Query(ge=0, le=models.WAIT_S_MAX, description="Wait so many seconds for its end.")
]


@router.get(
    "/runs",
    operation_id="runs_list",
    responses=answers(_200=models.RunPage),
    dependencies=[READ],
)
async def list_runs(wanted: Annotated[models.RunQuery, Query()], surface: TheSurface) -> Reply:
    """Runs, the newest first."""
    before = shapes.place_in(wanted.cursor)
    if before is not None and not (isinstance(before, str) and is_run_id(before)):
        raise invalid("query", "cursor", "no page begins there: take `next` of the page before")
    found = await surface.store.look.runs(wanted.to_filter(before, wanted.limit + 1))
    items = [shapes.run_facts(run) for run in found[: wanted.limit]]
    following = shapes.cursor_of(items[-1]["run_id"]) if len(found) > wanted.limit else None
    return Reply({"items": items, "next": following})


@router.get(
    "/runs/{run_id}",
    operation_id="runs_get",
    responses=answers(404, _200=models.RunDetail),
    dependencies=[READ],
)
async def get(run_id: models.RunPath, surface: TheSurface) -> Reply:
    """Where a run stands, and what its journal says of it."""
    return Reply(shapes.run_detail(*await acts.run_and_state(surface, run_id)))


@router.get(
    "/runs/{run_id}/result",
    operation_id="runs_result",
    responses=answers(404, _200=models.Outcome, _202=models.Outcome),
    dependencies=[READ],
)
async def result(run_id: models.RunPath, surface: TheSurface, wait: Wait = 0.0) -> Reply:
    """Its output or error: 200 when it has ended (or is paused), 202 when it moves still."""
    end = await acts.wait_end(surface, run_id, wait)
    if end is not None:
        return Reply(shapes.outcome_of(end))
    row = await acts.run_row(surface, run_id)
    return Reply(shapes.moving(run_id, row.state, row.reason), 202)


@router.post(
    "/runs/{run_id}/cancel",
    operation_id="runs_cancel",
    responses=answers(404, 409, _200=models.Answered),
)
async def cancel(run_id: models.RunPath, surface: TheSurface, who: Controller) -> Reply:
    """End it for good; its children too."""
    return Reply(shapes.answered(await surface.operator.cancel(run_id, by=who.name)))
