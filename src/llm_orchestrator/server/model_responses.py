"""`/v1/responses`: a run as a response, in the foreground or the background, streamed or not.

See model_events.py for what the numbers of a stream promise.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from llm_orchestrator.engine.replay import Fold
from llm_orchestrator.errors import InputError
from llm_orchestrator.model import Json, RunState
from llm_orchestrator.server import model_shapes as shapes
from llm_orchestrator.server.model_chat import STILL_HERE, ModelRequest, parameters
from llm_orchestrator.server.model_events import Numbered, Script
from llm_orchestrator.server.model_inputs import Asked, answer_text
from llm_orchestrator.server.model_run import (
    Begun,
    Text,
    completed,
    follow,
    state_of,
    voids,
    watch_of,
)
from llm_orchestrator.server.streams_entries import Event
from llm_orchestrator.server.streams_sse import Streams
from llm_orchestrator.server.surface import Surface


class ResponseRequest(ModelRequest):
    """The body of a response."""

    input: str | list[dict[str, Json]]
    instructions: str | None = None
    background: bool | None = False
    store: bool | None = None


def asked_of(request: ResponseRequest, raw: Mapping[str, Json]) -> Asked:
    """What a request for a response says."""
    items = request.input
    if isinstance(items, str):
        items = [{"role": "user", "content": items}]
    return Asked(
        items,
        system=request.instructions or "",
        parameters=parameters(raw),
        metadata=request.metadata or {},
        inputs=request.inputs or {},
    )


def origin_of(request: ResponseRequest) -> dict[str, Json]:
    """What the run's journal keeps of the request beside its inputs."""
    facts: dict[str, Json] = {"background": bool(request.background)}
    if request.instructions is not None:
        facts["instructions"] = request.instructions
    if request.metadata:
        facts["metadata"] = dict(request.metadata)
    return {"response": facts}


async def whole(surface: Surface, run_id: str) -> dict[str, Any]:
    """Wait for the end. Raises RunFailed, RunPaused, StillRunning."""
    return shapes.response(await completed(surface, run_id))


def check_resumable(state: Fold, after: int | None) -> None:
    """Raises InputError for a response whose numbers promise nothing."""
    if after is not None and not shapes.is_background(state):
        raise InputError(
            "starting_after: only a response that was created with background=true is resumed"
        )


class ResponseStream:
    """The events of one response, from the start or after a number. `close` it in any case."""

    def __init__(
        self,
        surface: Surface,
        begun: Begun,
        *,
        streams: Streams,
        is_background: bool,
        after: int | None = None,
    ) -> None:
        self._surface = surface
        self._begun = begun
        self._after = after
        self._watch = watch_of(surface, begun, crowd=streams, is_live=not is_background)
        self.close = self._watch.close
        self._text = Text()
        self._is_over = False

    async def pieces(self) -> AsyncIterator[bytes]:
        """The stream's bytes."""
        run_id = self._begun.run_id
        state = await state_of(self._surface, run_id)
        self._script = Script(shapes.run_of(state), self._after)
        self._is_proved = not self._script.is_resumed
        for event in self._script.opening(shapes.response(state)):
            yield _bytes(event)
        async for told in follow(self._watch):
            if told is None:
                yield STILL_HERE
                continue
            async for event in self._take(told):
                yield _bytes(event)
            if self._is_over:
                return

    async def _take(self, told: Event) -> AsyncIterator[Numbered]:
        if told.name in ("chunk", "reset"):
            self._text.apply(told)
            async for event in self._new(self._text.now, is_whole=False):
                yield event
        elif told.name in ("reconnect", "error"):
            self._is_over = True
            yield self._script.error(told.name, str(told.data["message"]))
        elif told.name == "end":
            async for event in self._end():
                yield event
            self._is_over = True

    async def _new(self, text: str, *, is_whole: bool) -> AsyncIterator[Numbered]:
        """Deltas, once it is sure that they follow what the reader has."""
        script = self._script
        if len(text) <= script.told and not is_whole and not self._text.is_void:
            return
        if not self._is_proved:
            step = self._begun.step
            if step is not None and await voids(self._surface, self._begun.run_id, step):
                self._text.sent = "\0"  # another text than any: nothing follows it
            else:
                self._text.sent = text[: script.told]
            self._is_proved = True
        if self._text.is_void:
            self._is_over = True
            yield script.error()
            return
        for event in script.deltas(text, is_whole=is_whole):
            self._text.sent += str(event["delta"])
            yield event

    async def _end(self) -> AsyncIterator[Numbered]:
        state = await state_of(self._surface, self._begun.run_id)
        response = shapes.response(state)
        if state.state is not RunState.COMPLETED:
            yield self._script.ending(response)
            return
        text = self._text.now = answer_text(state.output)
        async for event in self._new(text, is_whole=True):
            yield event
        if not self._is_over:
            for event in self._script.closing(response, text):
                yield event


def _bytes(event: Numbered) -> bytes:
    data = json.dumps(event, separators=(",", ":"))
    return f"event: {event['type']}\ndata: {data}\n\n".encode()
