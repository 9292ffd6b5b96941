"""Starting a run: the one request of which there are thousands a second.

So its parameters are read here, by the same models that describe them, and not by FastAPI, whose
way costs as much processor time as the rest of the answer; and its router comes first in app.py.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from llm_orchestrator.model import Json
from llm_orchestrator.server import acts, models, shapes
from llm_orchestrator.server.openapi import answers
from llm_orchestrator.server.principal import Permission
from llm_orchestrator.server.replies import Reply
from llm_orchestrator.server.strict import JsonBody, StrictRoute, wrong
from llm_orchestrator.server.surface import Allowed, Surface, surface_in

router = APIRouter(tags=["workflows"], route_class=StrictRoute)
allowed = Allowed(Permission.RUN_EXECUTE)


class Choices(models.Given):
    """What the query of a request to start a run may say."""

    version: models.Word | None = Field(None, description="The newest by default.")
    wait: float = Field(
        0.0,
        ge=0,
        le=models.WAIT_S_MAX,
        allow_inf_nan=False,
        description="Answer when it ended, or after so many seconds.",
    )


NAME: TypeAdapter[str] = TypeAdapter(models.NamePath)
KEY: TypeAdapter[str | None] = TypeAdapter(models.Key)
BODY = JsonBody(models.Execute, is_required=False)
_NOTHING = Choices(version=None, wait=0.0)


def _parameters() -> list[dict[str, Json]]:
    """The path, the query and the header, as FastAPI would have described them."""
    query = Choices.model_json_schema()["properties"]
    found = [{"name": "name", "in": "path", "required": True, "schema": NAME.json_schema()}]
    found += [
        {"name": name, "in": "query", "required": False, "schema": schema}
        for name, schema in query.items()
    ]
    key = {"name": "Idempotency-Key", "in": "header", "required": False}
    return [*found, {**key, "schema": KEY.json_schema()}]


@router.post(
    "/workflows/{name}/execute",
    operation_id="workflows_execute",
    responses=answers(404, 409, _200=models.Executed, _202=models.Executed),
    openapi_extra={"parameters": _parameters(), "requestBody": BODY.document()},
)
async def execute(request: Request) -> Reply:
    """Start a run: 202, or 200 with its result when it ended within `wait`."""
    surface = surface_in(request)
    await allowed(request)
    name = _valid(NAME, request.path_params["name"], ("path", "name"))
    key = request.headers.get("idempotency-key")
    if key is not None:
        key = _valid(KEY, key, ("header", "Idempotency-Key"))
    choices = _NOTHING
    if request.scope["query_string"]:
        choices = _valid(Choices, dict(request.query_params), ("query",))
    order = await BODY(request)
    wish = acts.Wish(
        name,
        choices.version,
        inputs=order.inputs,
        labels=order.labels,
        priority=order.priority,
        queue=order.queue,
        delay_s=order.delay_s,
        key=key,
    )
    started = await acts.start(surface, wish)
    wait_s = choices.wait
    if order.is_async is False:
        wait_s = max(wait_s, order.timeout_override or models.WAIT_S_MAX)
    return await answer(surface, started, wait_s)


async def answer(surface: Surface, started: acts.Started, wait_s: float) -> Reply:
    """models.Executed of a run that was just started, once it has ended or `wait_s` is over."""
    run_id = started.run_id
    end = None
    if wait_s or started.is_repeat:
        end = await acts.wait_end(surface, run_id, wait_s)
    if end is not None:
        body = shapes.outcome_of(end)
    elif started.is_repeat:
        row = await acts.run_row(surface, run_id)
        body = shapes.moving(run_id, row.state, row.reason)
    else:
        body = shapes.moving(run_id, acts.state_now(surface, run_id))
    body["workflow"], body["version"] = started.workflow, started.version
    body["is_repeat"] = started.is_repeat
    headers = {"location": f"/api/v1/runs/{run_id}"}
    return Reply(body, 200 if end is not None else 202, headers=headers)


def _valid(kind: Any, value: object, where: tuple[str, ...]) -> Any:
    """`value` as an adapter or a model takes it. Raises RequestValidationError."""
    try:
        if isinstance(kind, TypeAdapter):
            return kind.validate_python(value)
        assert issubclass(kind, BaseModel)
        return kind.model_validate(value)
    except ValidationError as error:
        raise wrong(error, *where) from error
