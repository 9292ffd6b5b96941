"""Looking at runs."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query

from llm_orchestrator.server import acts, looks, models, shapes
from llm_orchestrator.server.openapi import answers
from llm_orchestrator.server.principal import Permission
from llm_orchestrator.server.replies import Reply
from llm_orchestrator.server.strict import StrictRoute
from llm_orchestrator.server.surface import Allowed, TheSurface

router = APIRouter(tags=["runs"], route_class=StrictRoute)
READ = Depends(Allowed(Permission.RUN_READ))
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
    before = shapes.run_in(wanted.cursor)
    found = await surface.store.look.runs(wanted.to_filter(wanted.limit + 1, before=before))
    items = [shapes.run_facts(run) for run in found[: wanted.limit]]
    following = shapes.run_cursor(items[-1]["run_id"]) if len(found) > wanted.limit else None
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


@router.get(
    "/runs/{run_id}/journal",
    operation_id="runs_journal",
    responses=answers(404, _200=models.JournalPage),
    dependencies=[READ],
)
async def journal(
    run_id: models.RunPath, page: Annotated[models.Page, Query()], surface: TheSurface
) -> Reply:
    """The entries of its journal, decoded, with the chain's digests."""
    return Reply(await looks.journal_page(surface, run_id, page.cursor, limit=page.limit))


@router.get(
    "/runs/{run_id}/checkpoints",
    operation_id="runs_checkpoints",
    responses=answers(404, _200=models.CheckpointPage),
    dependencies=[READ],
)
async def list_checkpoints(
    run_id: models.RunPath, page: Annotated[models.Page, Query()], surface: TheSurface
) -> Reply:
    """The points to which it can go back: its beginning, and every finished step."""
    found = await looks.all_checkpoints(surface, run_id)
    return Reply(looks.page_of(found, page.cursor, page.limit))


@router.post(
    "/runs/{run_id}/checkpoints",
    operation_id="runs_checkpoint",
    responses=answers(404, _200=models.CheckpointFacts),
    dependencies=[READ],
)
async def name_checkpoint(run_id: models.RunPath, surface: TheSurface) -> Reply:
    """The newest checkpoint. Each finished step is one, so there is nothing to create."""
    return Reply(await looks.newest_checkpoint(surface, run_id))


@router.get(
    "/runs/{run_id}/explain",
    operation_id="runs_explain",
    responses=answers(404, _200=models.Explained),
    dependencies=[READ],
)
async def explain(run_id: models.RunPath, surface: TheSurface) -> Reply:
    """Why it does not move, in one sentence, and the command that moves it."""
    return Reply(await looks.explained(surface, run_id))


@router.get(
    "/runs/{run_id}/steps",
    operation_id="runs_steps",
    responses=answers(404, _200=models.StepsView),
    dependencies=[READ],
)
async def steps(run_id: models.RunPath, surface: TheSurface) -> Reply:
    """Its steps: attempts, tokens, cost, time, waits."""
    return Reply(await looks.steps(surface, run_id))
