"""A context, providers and configurations for step types, without an engine."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from llm_orchestrator.clock import Clock, RealClock
from llm_orchestrator.errors import ConfigError, TemplateError
from llm_orchestrator.language.base import BaseStep
from llm_orchestrator.language.steps import STEP_TYPES
from llm_orchestrator.model import Json, Usage
from llm_orchestrator.providers.base import (
    EmbeddingProvider,
    LLMProvider,
    LLMRequest,
    LLMResponse,
    OnChunk,
    Partial,
    Providers,
    VectorStore,
)

T = TypeVar("T")


def config(kind: str, **fields: Json) -> Any:
    """A step's configuration, as it is after rendering."""
    data = {"id": "it", "type": kind, **fields}
    context = {"rendered": True, "step_types": STEP_TYPES}
    return STEP_TYPES[kind].model_validate(data, context=context)


def steps_of(step: BaseStep) -> tuple[BaseStep, ...]:
    return next(steps for _, steps in step.children())


@dataclass
class Shelf:
    """Providers by name."""

    llms: dict[str, LLMProvider] = field(default_factory=dict)
    embeddings: dict[str, EmbeddingProvider] = field(default_factory=dict)
    stores: dict[str, VectorStore] = field(default_factory=dict)

    def llm(self, name: str) -> LLMProvider:
        return _find(self.llms, name)

    def embedding(self, name: str) -> EmbeddingProvider:
        return _find(self.embeddings, name)

    def vectors(self, name: str) -> VectorStore:
        return _find(self.stores, name)


def _find(shelf: dict[str, T], name: str) -> T:
    if name not in shelf:
        raise ConfigError(f"no provider {name}")
    return shelf[name]


@dataclass
class Room:
    """A StepContext that remembers what it was told. `stream` is what a reader sees."""

    run_id: str = "run-1"
    step: str = "it"
    attempt: int = 1
    idempotency_key: str = "key-1"
    clock: Clock = field(default_factory=RealClock)
    providers: Providers = field(default_factory=Shelf)
    partial: Partial | None = None
    stream: str = ""
    resets: int = 0
    handle: Mapping[str, Json] = field(default_factory=dict)
    usage: list[Usage] = field(default_factory=list)
    notes: dict[str, Json] = field(default_factory=dict)
    outbox: list[tuple[str, Json]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.partial is not None:
            self.stream, self.handle = self.partial.text, self.partial.handle

    async def emit(self, text: str) -> None:
        self.stream += text

    async def reset_stream(self) -> None:
        self.stream, self.handle = "", {}
        self.resets += 1

    def keep_handle(self, handle: Mapping[str, Json]) -> None:
        self.handle = handle

    def add_usage(self, usage: Usage) -> None:
        self.usage.append(usage)

    def note(self, key: str, value: Json) -> None:
        self.notes[key] = value

    async def post_outbox(self, name: str, payload: Json) -> None:
        self.outbox.append((name, payload))

    def interrupted(self) -> Partial:
        """What a takeover would find if this attempt died now."""
        return Partial(self.stream, len(self.stream.split()), self.handle)


Play = Callable[[LLMRequest, OnChunk, Callable[[Mapping[str, Json]], None]], Awaitable[LLMResponse]]


class Scripted:
    """A language model that follows a list of plays, one per question."""

    def __init__(self, name: str, *plays: Play) -> None:
        self.name = name
        self.plays = list(plays)
        self.requests: list[LLMRequest] = []

    async def complete(
        self,
        request: LLMRequest,
        on_chunk: OnChunk,
        on_handle: Callable[[Mapping[str, Json]], None],
    ) -> LLMResponse:
        self.requests.append(request)
        return await self.plays.pop(0)(request, on_chunk, on_handle)

    async def close(self) -> None: ...


def say(*pieces: str, **more: Any) -> Play:
    """Stream these pieces and end."""

    async def play(
        request: LLMRequest, on_chunk: OnChunk, on_handle: Callable[[Mapping[str, Json]], None]
    ) -> LLMResponse:
        for piece in pieces:
            await on_chunk(piece)
        response = {"text": "".join(pieces), "model": request.model, "usage": Usage(10, 5, 0, 0.01)}
        return LLMResponse(**{**response, **more})

    return play


def fail(error: BaseException, *pieces: str, handle: Mapping[str, Json] | None = None) -> Play:
    """Stream these pieces, then break."""

    async def play(
        request: LLMRequest, on_chunk: OnChunk, on_handle: Callable[[Mapping[str, Json]], None]
    ) -> LLMResponse:
        if handle is not None:
            on_handle(handle)
        for piece in pieces:
            await on_chunk(piece)
        raise error

    return play


class PlainNames:
    """Names of a control step: an expression is a key of `values`, or of what is given besides."""

    def __init__(self, values: Mapping[str, Json]) -> None:
        self.values = values
        self.asked: list[tuple[str, Mapping[str, Json]]] = []

    def evaluate(self, expression: str, extra: Mapping[str, Json] | None = None) -> Json:
        self.asked.append((expression, extra or {}))
        value: Json = {**self.values, **(extra or {})}
        for part in expression.split("."):
            if part not in value:
                raise TemplateError(f"{expression} names nothing")
            value = value[part]
        return value
