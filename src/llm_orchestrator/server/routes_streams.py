"""Event streams: what happens to a run, and the tokens of its steps, as server-sent events.

Ids are `SEQ` for a journal entry and `SEQ.ATTEMPT.OFFSET.PROOF` for text (see streams_text.py). A
reader that was cut off comes back, to any node, with the last id in `Last-Event-ID` or `?after=`.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Path, Query
from starlette.responses import Response

from llm_orchestrator.server import models
from llm_orchestrator.server.openapi import answers
from llm_orchestrator.server.principal import Permission
from llm_orchestrator.server.streams import Reader
from llm_orchestrator.server.streams_sse import EventStream, Streams, streams_of, to_stream, undone
from llm_orchestrator.server.streams_text import Position
from llm_orchestrator.server.streams_watch import Watch
from llm_orchestrator.server.strict import StrictRoute
from llm_orchestrator.server.surface import Allowed, TheSurface

router = APIRouter(tags=["streams"], route_class=StrictRoute)
READ = Depends(Allowed(Permission.RUN_READ))
TheStreams = Annotated[Streams, Depends(streams_of)]
PLACE = r"^([0-9]{1,18}(\.end|\.[0-9]{1,18}\.[0-9]{1,18}(\.[!-~]*)?)?)?$"
"""The form of an event's id; none at all is the beginning."""
_EVENT = {
    "type": "object",
    "properties": {
        "id": {"type": "string"},
        "event": {"type": "string"},
        "data": {"type": "string", "description": "JSON."},
    },
    "required": ["event", "data"],
}
_STREAM: dict[int | str, Any] = {
    **answers(404),
    200: {
        "description": (
            "Journal entries by their kinds; `chunk` {step, attempt, offset, text}; `reset` {step, "
            "attempt, offset}: forget the step's text from `offset` on; `end` {state, output or "
            "error}; `reconnect` {reason}: come back with the last id."
        ),
        "content": {"text/event-stream": {"schema": _EVENT}},
    },
    204: {"description": "The run has ended, and the reader has seen it."},
}


def position_of(
    after: Annotated[
        str,
        Query(max_length=200, pattern=PLACE, description="The id of the last event that was read."),
    ] = "",
    last_event_id: Annotated[
        str, Header(max_length=200, pattern=PLACE, description="The same, as browsers send it.")
    ] = "",
) -> Position | None:
    """Where the reader stands: a browser repeats the query, so the header counts first.

    Raises InputError.
    """
    text = last_event_id or after
    return Position.parse(text) if text else None


Place = Annotated[Position | None, Depends(position_of)]


@router.get(
    "/runs/{run_id}/events",
    operation_id="runs_events",
    responses=_STREAM,
    response_class=Response,
    dependencies=[READ],
)
async def run_events(
    run_id: models.RunPath,
    *,
    surface: TheSurface,
    streams: TheStreams,
    position: Place,
    text: Annotated[bool, Query(description="False: entries only, no chunks.")] = True,
) -> Response:
    """Everything that happens to a run, its steps' text included, until it ends."""
    reader = Reader(position, has_text=text)
    return await _respond(Watch(surface, run_id, reader, crowd=streams), streams, position)


@router.get(
    "/runs/{run_id}/steps/{step:path}/events",
    operation_id="runs_step_events",
    responses=_STREAM,
    response_class=Response,
    dependencies=[READ],
)
async def step_events(
    run_id: models.RunPath,
    step: Annotated[str, Path(max_length=1_000, description="The step's path in the run.")],
    *,
    surface: TheSurface,
    streams: TheStreams,
    position: Place,
) -> Response:
    """One step's entries and text, until it ends; `summaries/3/say` is a step within others."""
    reader = Reader(position, step=step)
    return await _respond(Watch(surface, run_id, reader, crowd=streams), streams, position)


async def _respond(watch: Watch, streams: Streams, position: Position | None) -> Response:
    with undone(watch.close):
        leave = streams.enter()
    with undone(watch.close, leave):
        await watch.open()
    if position is not None and position.is_end and watch.is_at_end(position.seq):
        watch.close()
        leave()
        return Response(status_code=204)
    return EventStream(to_stream(watch), watch.close, leave)
