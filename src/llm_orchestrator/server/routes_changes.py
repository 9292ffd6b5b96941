"""Changing runs, one at a time. Each is one request to the engine's Operator.

A run that is being driven is asked through its inbox (`is_done` false); one that nobody drives is
changed at once.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Depends

from llm_orchestrator.errors import NotFound
from llm_orchestrator.language.sandbox import aside
from llm_orchestrator.model import Json, NewRun
from llm_orchestrator.server import acts, auditing, looks, models, shapes
from llm_orchestrator.server.openapi import answers
from llm_orchestrator.server.principal import Permission, Principal
from llm_orchestrator.server.replies import Reply
from llm_orchestrator.server.strict import JsonBody, StrictRoute
from llm_orchestrator.server.surface import Allowed, Surface, TheSurface

router = APIRouter(tags=["runs"], route_class=StrictRoute)
Controller = Annotated[Principal, Depends(Allowed(Permission.RUN_CONTROL))]
Answerer = Annotated[Principal, Depends(Allowed(Permission.RUN_ANSWER))]
_ANSWERED = answers(404, 409, _200=models.Answered)


@router.post("/runs/{run_id}/cancel", operation_id="runs_cancel", responses=_ANSWERED)
async def cancel(run_id: models.RunPath, surface: TheSurface, who: Controller) -> Reply:
    """End it for good; its children too."""
    return Reply(shapes.answered(await surface.operator.cancel(run_id, by=who.name)))


@router.post("/runs/{run_id}/pause", operation_id="runs_pause", responses=_ANSWERED)
async def pause(run_id: models.RunPath, surface: TheSurface, who: Controller) -> Reply:
    """Let steps in flight end, then hold it until it is resumed."""
    return Reply(shapes.answered(await surface.operator.pause(run_id, by=who.name)))


@router.post("/runs/{run_id}/resume", operation_id="runs_resume", responses=_ANSWERED)
async def resume(
    run_id: models.RunPath,
    surface: TheSurface,
    who: Controller,
    body: Annotated[models.Resume, Depends(JsonBody(models.Resume, is_required=False))],
) -> Reply:
    """Let a paused run go on; with `decide`, say what became of a step's unknown outcome."""
    told = body.decide
    if told is None:
        answer = await surface.operator.resume(run_id, by=who.name)
    else:
        result = told.result if isinstance(told, models.DecideFinished) else None
        answer = await surface.operator.decide(
            run_id, told.step, told.outcome, result=result, by=who.name
        )
    return Reply(shapes.answered(answer))


@router.post("/runs/{run_id}/retry", operation_id="runs_retry", responses=_ANSWERED)
async def retry(run_id: models.RunPath, surface: TheSurface, who: Controller) -> Reply:
    """Run a failed run again from the steps that failed; finished steps stand."""
    return Reply(shapes.answered(await surface.operator.retry(run_id, by=who.name)))


@router.post("/runs/{run_id}/restore", operation_id="runs_restore", responses=_ANSWERED)
async def restore(
    run_id: models.RunPath,
    surface: TheSurface,
    who: Controller,
    body: Annotated[models.Restore, Depends(JsonBody(models.Restore))],
) -> Reply:
    """Go back to a checkpoint; what came after is hidden, never deleted."""
    whose, _, seq = body.checkpoint.partition(":")
    if whose != run_id:
        raise NotFound(f"{body.checkpoint} is no checkpoint of run {run_id}")
    return Reply(shapes.answered(await surface.operator.rewind(run_id, int(seq), by=who.name)))


@router.post(
    "/runs/{run_id}/fork",
    operation_id="runs_fork",
    responses=answers(404, 409, _200=models.Forked, _201=models.Forked),
)
async def fork(
    run_id: models.RunPath,
    surface: TheSurface,
    _: Annotated[Principal, Depends(Allowed(Permission.RUN_EXECUTE))],
    body: Annotated[models.Fork, Depends(JsonBody(models.Fork, is_required=False))],
) -> Reply:
    """A new run that shares the results before a step; `dry_run` says what would be done again."""
    plan = await looks.fork_plan(surface, run_id, body.step)
    edit = await _edit(surface, run_id, body)
    plan["version"] = edit.version
    if body.dry_run:
        auditing.leave_out()
        return Reply(plan)
    await surface.admission.check()
    plan["run_id"] = await surface.operator.fork(
        run_id,
        body.step,
        edit=lambda new: replace(new, version=edit.version, digest=edit.digest, input=edit.input),
    )
    auditing.tell(new_run_id=plan["run_id"], step=body.step)
    headers = {"location": f"/api/v1/runs/{plan['run_id']}"}
    return Reply(plan, 201, headers=headers)


@router.post("/runs/{run_id}/signal", operation_id="runs_signal", responses=_ANSWERED)
async def signal(
    run_id: models.RunPath,
    surface: TheSurface,
    _: Answerer,
    body: Annotated[models.Signal, Depends(JsonBody(models.Signal))],
    key: models.SenderKey = None,
) -> Reply:
    """Hand a message to a run. The same key again delivers nothing a second time."""
    answer = await surface.operator.signal(run_id, body.name, body.payload, sender_key=key)
    return Reply(shapes.answered(answer))


@router.post("/runs/{run_id}/approve", operation_id="runs_approve", responses=_ANSWERED)
async def approve(
    run_id: models.RunPath,
    surface: TheSurface,
    who: Answerer,
    body: Annotated[models.Approve, Depends(JsonBody(models.Approve, is_required=False))],
) -> Reply:
    """Answer an approval step."""
    answer = await surface.operator.approve(
        run_id, body.step, approved=body.approved, form=body.form, by=who.name
    )
    return Reply(shapes.answered(answer))


@router.post("/runs/{run_id}/reject", operation_id="runs_reject", responses=_ANSWERED)
async def reject(
    run_id: models.RunPath,
    surface: TheSurface,
    who: Answerer,
    body: Annotated[models.Reject, Depends(JsonBody(models.Reject, is_required=False))],
) -> Reply:
    """Say no to an approval step."""
    answer = await surface.operator.approve(
        run_id, body.step, approved=False, form=body.form, by=who.name
    )
    return Reply(shapes.answered(answer))


async def _edit(surface: Surface, run_id: str, body: models.Fork) -> NewRun:
    """The fork's version and inputs, checked. Raises NotFound, InputError."""
    row, state = await acts.run_and_state(surface, run_id)
    shelf = surface.store.shelf
    if body.version is None:
        stored = await shelf.workflow(row.workflow, row.version, row.digest)
    else:
        stored = await shelf.workflow(row.workflow, body.version)
    if stored is None:
        raise NotFound(f"workflow {row.workflow} {body.version or row.version} is not registered")
    value: Json = state.accepted["input"]
    if body.inputs is None and body.version is None:
        return NewRun(run_id, stored.name, stored.version, stored.digest, input=value)
    before = value if isinstance(value, dict) else {}
    inputs = {**before, **(body.inputs or {})}
    return await aside(partial(surface.catalogue.new_run, stored, inputs, run_id))
