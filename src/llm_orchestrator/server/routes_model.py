"""Workflows as models, in OpenAI's shapes: every OpenAI client can start durable runs.

    OpenAI(base_url="http://HOST:8080/v1", api_key=TOKEN)

The token is the API key. A model is a registered workflow, `name` (the newest) or `name@version`;
model_inputs.py says how messages become inputs. The run goes on when its client goes. The header
Idempotency-Key makes a repeated request answer with the first one's run. Bodies, errors and events
are OpenAI's, so these routes stand beside the API's own document.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Coroutine
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import Response

from llm_orchestrator.errors import NotFound, OrchestratorError, Refused, RunFailed, RunPaused
from llm_orchestrator.server import acts, model_chat, model_responses, models
from llm_orchestrator.server import model_shapes as shapes
from llm_orchestrator.server.model_run import (
    Begun,
    StillRunning,
    begin,
    model_name,
    state_of,
    step_of,
)
from llm_orchestrator.server.principal import Permission, Principal
from llm_orchestrator.server.problems import RETRY_AFTER_S, status_of
from llm_orchestrator.server.replies import Reply
from llm_orchestrator.server.routes_streams import TheStreams
from llm_orchestrator.server.streams_sse import EventStream, undone
from llm_orchestrator.server.surface import Allowed, TheSurface
from llm_orchestrator.store.rows import is_run_id

CANCEL_S = 10.0
"""How long the answer to a cancel waits until the run has ended."""
_NO_RETRY = {"x-should-retry": "false"}
"""To the official clients: the same request again would start another run."""
Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class ModelRoute(APIRoute):
    """Errors leave in OpenAI's shape."""

    def get_route_handler(self) -> Handler:
        """FastAPI's handler, its errors caught."""
        handler = super().get_route_handler()

        async def shaped(request: Request) -> Response:
            try:
                return await handler(request)
            except OrchestratorError as error:
                return _refusal(error)
            except RequestValidationError as error:
                first = error.errors()[0]
                param = str(first["loc"][-1])
                body = shapes.error_body(str(first["msg"]), "invalid_request", param=param)
                return Reply(body, 400)
            except HTTPException as error:
                return Reply(shapes.error_body(str(error.detail), "http"), error.status_code)

        return shaped


def _refusal(error: OrchestratorError) -> Response:
    status = status_of(error)
    headers: dict[str, str] = {}
    if isinstance(error, RunFailed | RunPaused | StillRunning):
        status = {RunFailed: 500, RunPaused: 409}.get(type(error), 504)
        headers = _NO_RETRY
    elif status == 422:
        status = 400
    elif status == 503:
        after_s = getattr(error, "retry_after_s", None) or RETRY_AFTER_S
        headers = {"retry-after": str(max(1, math.ceil(after_s)))}
    return Reply(shapes.error_of(error), status, headers=headers)


router = APIRouter(
    prefix="/v1", tags=["as a model"], route_class=ModelRoute, include_in_schema=False
)
Runner = Annotated[Principal, Depends(Allowed(Permission.RUN_EXECUTE))]
READ = Depends(Allowed(Permission.RUN_READ))
READ_WORKFLOWS = Depends(Allowed(Permission.WORKFLOW_READ))


@router.get("/models", dependencies=[READ_WORKFLOWS])
async def list_models(surface: TheSurface) -> Reply:
    """Every registered workflow, by name and by name@version."""
    found = shapes.models(await surface.store.shelf.workflows())
    return Reply({"object": "list", "data": found, "has_more": False})


@router.get("/models/{model:path}", dependencies=[READ_WORKFLOWS])
async def get_model(model: str, surface: TheSurface) -> Reply:
    """One of them."""
    stored = await surface.known.find(*model_name(model))
    return Reply(shapes.models([stored])[0] | {"id": model})


@router.post("/chat/completions")
async def chat(
    request: Request, *, surface: TheSurface, streams: TheStreams, _: Runner, key: models.Key = None
) -> Response:
    """Run a workflow; its answer as a completion, at once or as it comes."""
    wanted, raw = model_chat.parse(model_chat.ChatRequest, await request.body())
    asked = model_chat.asked_of(wanted, raw)
    if not wanted.stream:
        begun = await begin(surface, wanted.model, asked, key=key, origin={"chat": True})
        return Reply(await model_chat.whole(surface, begun))
    leave = streams.enter()
    with undone(leave):
        begun = await begin(surface, wanted.model, asked, key=key, origin={"chat": True})
        has_usage = bool((wanted.stream_options or {}).get("include_usage"))
        stream = model_chat.ChatStream(surface, begun, streams=streams, has_usage=has_usage)
        return EventStream(stream.pieces(), leave, stream.close)


@router.post("/responses")
async def create_response(
    request: Request, *, surface: TheSurface, streams: TheStreams, _: Runner, key: models.Key = None
) -> Response:
    """Run a workflow; its answer as a response, waited for, streamed, or in the background."""
    wanted, raw = model_chat.parse(model_responses.ResponseRequest, await request.body())
    asked, origin = model_responses.asked_of(wanted, raw), model_responses.origin_of(wanted)
    if wanted.stream:
        leave = streams.enter()
        with undone(leave):
            begun = await begin(surface, wanted.model, asked, key=key, origin=origin)
            stream = model_responses.ResponseStream(
                surface, begun, streams=streams, is_background=bool(wanted.background)
            )
            return EventStream(stream.pieces(), leave, stream.close)
    begun = await begin(surface, wanted.model, asked, key=key, origin=origin)
    if wanted.background:
        return Reply(shapes.response(await state_of(surface, begun.run_id)))
    return Reply(await model_responses.whole(surface, begun.run_id))


@router.get("/responses/{response_id}", dependencies=[READ])
async def get_response(
    response_id: str,
    *,
    surface: TheSurface,
    streams: TheStreams,
    stream: Annotated[bool, Query()] = False,
    starting_after: Annotated[int | None, Query(ge=0)] = None,
) -> Response:
    """Where a response stands; streamed: its events, from the start or after a number."""
    state = await state_of(surface, _run_id(response_id))
    if not stream:
        return Reply(shapes.response(state))
    model_responses.check_resumable(state, starting_after)
    begun = Begun(state.run_id, await step_of(surface, state))
    leave = streams.enter()
    made = model_responses.ResponseStream(
        surface,
        begun,
        streams=streams,
        is_background=shapes.is_background(state),
        after=starting_after,
    )
    return EventStream(made.pieces(), leave, made.close)


@router.post("/responses/{response_id}/cancel")
async def cancel_response(
    response_id: str,
    surface: TheSurface,
    who: Annotated[Principal, Depends(Allowed(Permission.RUN_CONTROL))],
) -> Reply:
    """End its run for good; one that has ended stays as it is."""
    run_id = _run_id(response_id)
    try:
        answer = await surface.operator.cancel(run_id, by=who.name)
    except Refused:
        if not (await state_of(surface, run_id)).state.is_final:
            raise
    else:
        if not answer.is_done:
            await acts.wait_end(surface, run_id, CANCEL_S)
    return Reply(shapes.response(await state_of(surface, run_id)))


def _run_id(response_id: str) -> str:
    run_id = response_id.removeprefix(shapes.RESPONSE)
    if not is_run_id(run_id) or run_id == response_id:
        raise NotFound(f"there is no response {response_id[:80]!r}")
    return run_id
