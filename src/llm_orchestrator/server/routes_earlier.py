"""The earlier system's path names, for programs and runbooks that know them (see earlier.py).

New programs use `/runs/{run_id}/...`; these paths do the same and answer in the older words.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query
from pydantic import ConfigDict, Field

from llm_orchestrator.engine.control import read_journal
from llm_orchestrator.errors import Refused
from llm_orchestrator.model import Json
from llm_orchestrator.server import acts, earlier, models, shapes
from llm_orchestrator.server.openapi import answers
from llm_orchestrator.server.principal import Permission, Principal
from llm_orchestrator.server.replies import Reply
from llm_orchestrator.server.strict import JsonBody, StrictRoute
from llm_orchestrator.server.surface import Allowed, Surface, TheSurface

router = APIRouter(tags=["earlier names"], route_class=StrictRoute)
Reader = Annotated[Principal, Depends(Allowed(Permission.RUN_READ))]
Starter = Annotated[Principal, Depends(Allowed(Permission.RUN_EXECUTE))]
Controller = Annotated[Principal, Depends(Allowed(Permission.RUN_CONTROL))]
Name = Annotated[
    str,
    Path(
        alias="id",
        min_length=1,
        max_length=200,
        pattern=rf"^[^/{models.CONTROL}]+$",
        description="A run's id, or a workflow's name.",
    ),
]
Execution = Annotated[
    models.Word | None,
    Query(alias="executionId", description="Which run of the workflow; needed if it has several."),
]


class EarlierRestore(models.Given):
    """Back to which checkpoint; the newest one by default."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_by_name=True)
    checkpoint_id: models.Word | None = Field(None, alias="checkpointId")


class Point(models.Given):
    """Which run's checkpoint is asked for."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_by_name=True)
    execution_id: models.Word | None = Field(None, alias="executionId")
    step_id: models.Word | None = Field(None, alias="stepId")


class Status(models.Told):
    """A run in the older words."""

    id: models.RunId
    execution_id: models.RunId
    workflow_id: str
    workflow_name: str
    status: str
    reason: str
    started_at: str | None
    updated_at: str | None
    completed_at: str | None
    error: str | None


class State(Status):
    """The same with everything that it has done."""

    context: dict[str, Json]
    steps: list[dict[str, Json]]
    output: Json


class EarlierCheckpoint(models.Told):
    """A point to which a run can go back."""

    id: str
    workflow_state_id: models.RunId
    step_id: str
    timestamp: str | None


class Checkpoints(models.Told):
    """All of them, the newest first."""

    items: list[EarlierCheckpoint]
    total: int


@router.post(
    "/workflows/{id}/pause",
    operation_id="earlier_pause",
    responses=answers(404, 409, _200=models.Answered),
)
async def pause(
    name: Name, surface: TheSurface, who: Controller, execution: Execution = None
) -> Reply:
    """Let steps in flight end, then hold the run until it is resumed."""
    run_id = await earlier.meant(surface, name, execution)
    return Reply(shapes.answered(await surface.operator.pause(run_id, by=who.name)))


@router.post(
    "/workflows/{id}/resume",
    operation_id="earlier_resume",
    responses=answers(404, 409, _200=models.Answered),
)
async def resume(
    name: Name, surface: TheSurface, who: Starter, execution: Execution = None
) -> Reply:
    """Let a paused run go on."""
    run_id = await earlier.meant(surface, name, execution)
    return Reply(shapes.answered(await surface.operator.resume(run_id, by=who.name)))


@router.post(
    "/workflows/{id}/cancel",
    operation_id="earlier_cancel",
    responses=answers(404, 409, _200=models.Answered),
)
async def cancel(
    name: Name, surface: TheSurface, who: Controller, execution: Execution = None
) -> Reply:
    """End the run for good; its children too."""
    run_id = await earlier.meant(surface, name, execution)
    return Reply(shapes.answered(await surface.operator.cancel(run_id, by=who.name)))


@router.post(
    "/workflows/{id}/retry",
    operation_id="earlier_retry",
    responses=answers(404, 409, _200=models.Answered),
)
async def retry(
    name: Name, surface: TheSurface, who: Controller, execution: Execution = None
) -> Reply:
    """Run a failed run again from the steps that failed."""
    run_id = await earlier.meant(surface, name, execution)
    return Reply(shapes.answered(await surface.operator.retry(run_id, by=who.name)))


@router.get(
    "/workflows/{id}/status",
    operation_id="earlier_status",
    responses=answers(404, 409, _200=Status),
)
async def status(name: Name, surface: TheSurface, _: Reader, execution: Execution = None) -> Reply:
    """Where the run stands."""
    run_id = await earlier.meant(surface, name, execution)
    return Reply(earlier.status_facts(*await acts.run_and_state(surface, run_id)))


@router.get("/state/{id}", operation_id="earlier_state", responses=answers(404, 409, _200=State))
async def state(name: Name, surface: TheSurface, _: Reader, execution: Execution = None) -> Reply:
    """Everything that the run has done so far."""
    run_id = await earlier.meant(surface, name, execution)
    entries = (await read_journal(surface.store, run_id)).entries
    return Reply(earlier.state_facts(await acts.run_row(surface, run_id), entries))


@router.get(
    "/state/{id}/checkpoints",
    operation_id="earlier_checkpoints",
    responses=answers(404, 409, _200=Checkpoints),
)
async def list_checkpoints(
    name: Name, surface: TheSurface, _: Reader, execution: Execution = None
) -> Reply:
    """The points to which the run can go back: each finished step is one."""
    run_id = await earlier.meant(surface, name, execution)
    entries = (await read_journal(surface.store, run_id)).entries
    items = earlier.checkpoint_facts(run_id, entries)
    return Reply({"items": items, "total": len(items)})


@router.post(
    "/state/{id}/checkpoints",
    operation_id="earlier_checkpoint",
    responses=answers(404, 409, _200=EarlierCheckpoint),
)
async def checkpoint(
    name: Name,
    surface: TheSurface,
    _: Starter,
    wanted: Annotated[Point, Depends(JsonBody(Point, is_required=False))],
) -> Reply:
    """The newest checkpoint (of `stepId`, if it is given): each is made as its step finishes."""
    run_id = await earlier.meant(surface, name, wanted.execution_id)
    entries = (await read_journal(surface.store, run_id)).entries
    for found in earlier.checkpoint_facts(run_id, entries):
        if wanted.step_id in (None, found["step_id"]):
            return Reply(found)
    raise Refused(f"run {run_id} has finished no step yet that could be gone back to")


@router.post(
    "/workflows/{id}/restore",
    operation_id="earlier_workflow_restore",
    responses=answers(404, 409, _200=models.Answered),
)
async def restore_workflow(
    *,
    name: Name,
    surface: TheSurface,
    who: Controller,
    wanted: Annotated[EarlierRestore, Depends(JsonBody(EarlierRestore, is_required=False))],
    execution: Execution = None,
) -> Reply:
    """Go back to a checkpoint; what came after is hidden, never deleted."""
    run_id = await earlier.meant(surface, name, execution)
    return await _restore(surface, run_id, wanted.checkpoint_id, by=who.name)


@router.post(
    "/state/{id}/restore",
    operation_id="earlier_state_restore",
    responses=answers(404, 409, _200=models.Answered),
)
async def restore_state(
    *,
    name: Name,
    surface: TheSurface,
    who: Controller,
    wanted: Annotated[EarlierRestore, Depends(JsonBody(EarlierRestore, is_required=False))],
    execution: Execution = None,
    checkpoint_id: Annotated[models.Word | None, Query(alias="checkpointId")] = None,
) -> Reply:
    """The same under its other name."""
    run_id = await earlier.meant(surface, name, execution)
    return await _restore(surface, run_id, wanted.checkpoint_id or checkpoint_id, by=who.name)


async def _restore(surface: Surface, run_id: str, checkpoint_id: str | None, *, by: str) -> Reply:
    if checkpoint_id is not None:
        seq = earlier.seq_of(checkpoint_id, run_id)
    else:
        points = earlier.checkpoint_facts(
            run_id, (await read_journal(surface.store, run_id)).entries
        )
        if not points:
            raise Refused(f"run {run_id} has finished no step yet that could be gone back to")
        seq = earlier.seq_of(str(points[0]["id"]), run_id)
    return Reply(shapes.answered(await surface.operator.rewind(run_id, seq, by=by)))
