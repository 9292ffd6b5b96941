"""Definitions, and starting runs of them."""

from __future__ import annotations

import asyncio
import json
from typing import Annotated

from fastapi import APIRouter, Depends, HTTPException, Query, Request
from pydantic import Field, RootModel

from llm_orchestrator.errors import DefinitionError, NotFound, Refused
from llm_orchestrator.model import Json, Workflow
from llm_orchestrator.server import acts, auditing, earlier, models, shapes
from llm_orchestrator.server.openapi import answers
from llm_orchestrator.server.principal import Permission, Principal
from llm_orchestrator.server.replies import Reply
from llm_orchestrator.server.strict import StrictRoute, invalid, is_json
from llm_orchestrator.server.surface import Allowed, Parsed, Surface, TheSurface

router = APIRouter(tags=["workflows"], route_class=StrictRoute)
READ = Depends(Allowed(Permission.WORKFLOW_READ))
Writer = Annotated[Principal, Depends(Allowed(Permission.WORKFLOW_WRITE, is_named_later=True))]
YAML = ("application/yaml", "application/x-yaml", "text/yaml", "text/x-yaml")
_STEP: dict[str, Json] = {"type": "object", "required": ["id", "type"]}
_FILE: dict[str, Json] = {
    "type": "object",
    "required": ["name", "steps"],
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 200, "pattern": "^[^/]+$"},
        "steps": {"type": "array", "minItems": 1, "items": _STEP},
    },
}


def _body(schema: dict[str, Json]) -> dict[str, Json]:
    """A workflow file as a request's body."""
    kinds = ("application/json", "application/yaml")
    return {
        "requestBody": {
            "required": True,
            "description": "A workflow file: docs/reference/workflow-files.md.",
            "content": {kind: {"schema": schema} for kind in kinds},
        }
    }


class Wanted(models.NamePage):
    """Definitions; with `status` runs, as the earlier system listed them."""

    status: earlier.Word | None = Field(None, description="Runs with this status instead.")
    offset: int = Field(0, ge=0, le=earlier.OFFSET_MAX, description="Only with `status`.")


class EarlierRun(models.Told):
    """A run in the older words."""

    id: models.RunId
    execution_id: models.RunId
    workflow_id: str
    workflow_name: str
    status: str
    reason: str
    started_at: str | None
    completed_at: str | None


class EarlierRuns(models.Told):
    """A page of runs in the older words."""

    items: list[EarlierRun]
    total: int
    limit: int
    offset: int


class WorkflowsOrRuns(RootModel[models.WorkflowPage | EarlierRuns]):
    """Definitions, or with `status` runs."""


@router.post(
    "/workflows",
    operation_id="workflows_register",
    openapi_extra=_body(_FILE),
    responses=answers(409, _200=models.Registered, _201=models.Registered),
)
async def register(
    request: Request,
    surface: TheSurface,
    _: Writer,
) -> Reply:
    """Keep a workflow: 201, or 200 when the same is there already.

    409 when its version is there with another content: raise the version, or PUT.
    """
    parsed = await _parsed(request, surface)
    stored = parsed.workflow
    auditing.name(f"{stored.name}@{stored.version}", digest=stored.digest)
    same = await acts.versions_of(surface, stored.name, stored.version)
    if same and all(each.digest != stored.digest for each in same):
        raise Refused(
            f"{stored.name} {stored.version} is registered with another content",
            hint="raise its version, or PUT /workflows/{name} to let new runs take this one",
        )
    return await _keep(surface, parsed, same)


@router.put(
    "/workflows/{name}",
    operation_id="workflows_replace",
    openapi_extra=_body(_FILE),
    responses=answers(404, _200=models.Registered, _201=models.Registered),
)
async def replace(
    request: Request,
    name: models.NamePath,
    surface: TheSurface,
    _: Writer,
) -> Reply:
    """Give a workflow a new version; new runs take it, others keep theirs."""
    parsed = await _parsed(request, surface)
    stored = parsed.workflow
    auditing.name(f"{stored.name}@{stored.version}", digest=stored.digest)
    if stored.name != name:
        raise invalid("body", "name", f"it is {stored.name!r}; the path says {name!r}")
    known = await acts.versions_of(surface, name)
    if not known:
        raise NotFound(f"no workflow {name!r} is registered", hint="POST /workflows")
    return await _keep(surface, parsed, known)


@router.post(
    "/workflows/validate",
    operation_id="workflows_validate",
    openapi_extra=_body({}),
    responses=answers(_200=models.Validated),
    dependencies=[READ],
)
async def validate(request: Request, surface: TheSurface) -> Reply:
    """Say everything that is wrong with a workflow, with line and column. Nothing is saved."""
    found: dict[str, Json] = {"is_valid": True, "name": None, "version": None, "digest": None}
    problems: list[dict[str, Json]] = []
    warnings: list[str] = []
    try:
        parsed = await _parsed(request, surface)
    except DefinitionError as error:
        found["is_valid"] = False
        problems = [
            {"line": each.line, "column": each.column, "message": each.message}
            for each in error.problems
        ]
    else:
        stored, warnings = parsed.workflow, list(parsed.warnings)
        found |= {"name": stored.name, "version": stored.version, "digest": stored.digest}
    return Reply(found | {"problems": problems, "warnings": warnings})


@router.get(
    "/workflows",
    operation_id="workflows_list",
    responses=answers(_200=WorkflowsOrRuns),
    dependencies=[READ],
)
async def list_workflows(page: Annotated[Wanted, Query()], surface: TheSurface) -> Reply:
    """The registered workflows by name, each by its newest version.

    With `status`, as in the earlier system: the runs that have it, page by page of `offset`.
    """
    if page.status is not None:
        return Reply(
            await earlier.run_page(surface, page.status, limit=page.limit, offset=page.offset)
        )
    after = shapes.name_in(page.cursor)
    newest: dict[str, list[Workflow]] = {}
    for each in await surface.store.shelf.workflows():
        newest.setdefault(each.name, []).append(each)
    names = sorted(name for name in newest if name > after)
    items = [
        shapes.workflow_facts(newest[name][-1]) | {"versions": len(newest[name])}
        for name in names[: page.limit]
    ]
    following = shapes.name_cursor(names[page.limit - 1]) if len(names) > page.limit else None
    return Reply({"items": items, "next": following})


@router.get(
    "/workflows/{name}",
    operation_id="workflows_get",
    responses=answers(404, _200=models.WorkflowDetail),
    dependencies=[READ],
)
async def get(
    name: models.NamePath,
    surface: TheSurface,
    version: Annotated[models.Word | None, Query(description="The newest by default.")] = None,
) -> Reply:
    """One version of a workflow with its definition, and which other versions there are."""
    stored = await surface.store.shelf.workflow(name, version)
    if stored is None:
        raise NotFound(f"no workflow {name!r} {version or ''}".rstrip() + " is registered")
    known = await acts.versions_of(surface, name)
    return Reply(
        shapes.workflow_facts(stored)
        | {
            "definition": json.loads(stored.definition),
            "versions": [shapes.workflow_facts(each) for each in known],
        }
    )


@router.delete(
    "/workflows/{name}",
    operation_id="workflows_delete",
    responses=answers(404, 409, _200=models.Deleted),
    dependencies=[Depends(Allowed(Permission.WORKFLOW_DELETE))],
)
async def delete(
    name: models.NamePath,
    surface: TheSurface,
    version: Annotated[models.Word | None, Query(description="All versions by default.")] = None,
) -> Reply:
    """Forget a workflow, or one version of it, and its schedule.

    409 while a run refers to it, ended or not: a run that is retried, restored or forked needs its
    definition. Retention removes runs; the last one's end of keeping frees the definition.
    """
    gone = await acts.unregister(surface, name, version)
    return Reply({"name": name, "deleted": [shapes.workflow_facts(each) for each in gone]})


# -- how ------------------------------------------------------------------------------------------


async def _parsed(request: Request, surface: Surface) -> Parsed:
    """The definition in a request's body. Raises HTTPException 415, DefinitionError."""
    kind = request.headers.get("content-type")
    as_json = is_json(kind)
    if not as_json and (kind or "").partition(";")[0].strip().lower() not in YAML:
        raise HTTPException(415, "send application/json or application/yaml")
    content = await request.body()
    # On a thread: a large file takes seconds, and other requests must not wait for it.
    return await asyncio.to_thread(surface.catalogue.parse, content, is_json=as_json)


async def _keep(surface: Surface, parsed: Parsed, known: list[Workflow]) -> Reply:
    stored = parsed.workflow
    if "/" in stored.name:
        raise invalid("body", "name", "a name with a slash cannot stand in a path")
    same = [each for each in known if each.version == stored.version]
    is_new = all(each.digest != stored.digest for each in same)
    warnings = list(parsed.warnings)
    if is_new and same:
        warnings.append(f"version {stored.version} had another content; new runs take this one")
    await auditing.announce()
    await surface.operator.register(stored)
    surface.known.forget()
    kept = await surface.store.shelf.workflow(stored.name, stored.version, stored.digest)
    facts = shapes.workflow_facts(kept or stored)
    return Reply(facts | {"is_new": is_new, "warnings": warnings}, 201 if is_new else 200)
