"""`/v1/chat/completions`: a run of a workflow as one completion, streamed or not.

A stream cannot take anything back. Text that a takeover repeats is silent as long as it is what was
sent; where it differs the stream ends with an error, and the same request with the same
Idempotency-Key gives the answer of the same run.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, Field, ValidationError

from llm_orchestrator.errors import InputError
from llm_orchestrator.model import Json, RunState
from llm_orchestrator.server import model_shapes as shapes
from llm_orchestrator.server.model_inputs import PARAMETERS, Asked, answer_text
from llm_orchestrator.server.model_run import (
    Begun,
    Text,
    completed,
    follow,
    is_paused,
    state_of,
    watch_of,
)
from llm_orchestrator.server.streams_sse import Streams
from llm_orchestrator.server.surface import Surface

_UNSUPPORTED = ("tools", "functions", "audio", "previous_response_id", "conversation")
_DONE = b"data: [DONE]\n\n"
STILL_HERE = b": still here\n\n"
VOID = "the answer was begun anew, what was streamed of it is void; repeat the request"


class ModelRequest(BaseModel):
    """What both shapes bring; what we do not know is left out, as OpenAI's servers do."""

    model: str = Field(min_length=1, max_length=400)
    stream: bool | None = False
    metadata: dict[str, str] | None = None
    inputs: dict[str, Json] | None = None


R = TypeVar("R", bound=ModelRequest)


class ChatRequest(ModelRequest):
    """The body of a chat completion."""

    messages: list[dict[str, Json]] = Field(min_length=1)
    stream_options: dict[str, Json] | None = None
    n: int | None = None


def parse(kind: type[R], body: bytes) -> tuple[R, Mapping[str, Json]]:
    """A body as a request, and all that it brought. Raises InputError."""
    try:
        raw = json.loads(body)
        request = kind.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "body"
        raise InputError(f"{place}: {first['msg']}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"the body is no JSON: {error}") from error
    for name in _UNSUPPORTED:
        if raw.get(name):
            raise InputError(f"{name}: a workflow behind this API does not take it")
    return request, raw


def parameters(raw: Mapping[str, Json]) -> dict[str, Json]:
    """What a workflow may declare as inputs."""
    return {name: raw[name] for name in PARAMETERS if raw.get(name) is not None}


def asked_of(request: ChatRequest, raw: Mapping[str, Json]) -> Asked:
    """What a chat request says. Raises InputError."""
    if request.n not in (None, 1):
        raise InputError("n: one answer is given for one request")
    return Asked(
        request.messages,
        parameters=parameters(raw),
        metadata=request.metadata or {},
        inputs=request.inputs or {},
    )


async def whole(surface: Surface, begun: Begun) -> dict[str, Any]:
    """Wait for the end. Raises RunFailed, RunPaused, StillRunning."""
    return shapes.chat(await completed(surface, begun.run_id), begun.step)


class ChatStream:
    """One streamed completion. It listens from the start: `close` it in any case."""

    def __init__(
        self, surface: Surface, begun: Begun, *, streams: Streams, has_usage: bool
    ) -> None:
        self._surface = surface
        self._begun = begun
        self._watch = watch_of(surface, begun, crowd=streams, is_live=True)
        self.close = self._watch.close
        self._has_usage = has_usage
        self._text = Text()

    async def pieces(self) -> AsyncIterator[bytes]:
        """The stream's bytes."""
        state = await state_of(self._surface, self._begun.run_id)
        self._run = shapes.run_of(state)
        yield self._chunk({"role": "assistant", "content": "", "refusal": None})
        async for event in follow(self._watch):
            if event is None:
                yield STILL_HERE
            elif event.name in ("chunk", "reset"):
                self._text.apply(event)
                if self._text.is_void:
                    yield _error(VOID, "stream_reset")
                    return
                if new := self._text.take():
                    yield self._chunk({"content": new})
            elif event.name in ("reconnect", "error"):
                yield _error(str(event.data["message"]), event.name)
                return
            elif event.name == "end" or is_paused(event):
                async for piece in self._last():
                    yield piece
                    if piece is _DONE:
                        return

    async def _last(self) -> AsyncIterator[bytes]:
        """The rest of the answer, or why there is none; nothing when the run goes on."""
        state = await state_of(self._surface, self._begun.run_id)
        if state.state is not RunState.COMPLETED:
            if state.state.is_final or state.state is RunState.PAUSED:
                yield _error(shapes.error_message(state), str(state.state))
                yield _DONE
            return
        self._text.now = answer_text(state.output)
        if not self._text.now.startswith(self._text.sent):
            yield _error(VOID, "stream_reset")
            yield _DONE
            return
        if new := self._text.take():
            yield self._chunk({"content": new})
        yield self._chunk({}, finish=shapes.finish_reason(state, self._begun.step))
        if self._has_usage:
            yield _data(shapes.chat_last(self._run, state.usage))
        yield _DONE

    def _chunk(self, delta: Mapping[str, Json], *, finish: str | None = None) -> bytes:
        made = shapes.chat_chunk(self._run, delta, finish=finish, has_usage=self._has_usage)
        return _data(made)


def _data(value: Json) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


def _error(message: str, code: str) -> bytes:
    return _data(shapes.error_body(message, code, kind="server_error"))
