"""What a provider is: small protocols, one each for language models, embeddings and vectors.

Adapters translate one request to one HTTP call and back. They never retry, never sleep, never keep
state between calls and never read the environment: the engine owns every attempt, the store owns
every limit, the composition root hands in keys and addresses. A provider's own error types never
leave this package; see errors.ProviderError.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from llm_orchestrator.model import Json, Usage

OnChunk = Callable[[str], Awaitable[None]]
"""Called with each piece of new text, in order. Must be quick."""


class Resume(StrEnum):
    """How a half-streamed answer goes on, best first. `restart` pays for everything again."""

    ATTACH = "attach"
    PREFILL = "prefill"
    CONTINUE_TURN = "continue_turn"
    RESTART = "restart"


@dataclass(frozen=True, slots=True)
class Partial:
    """What an earlier attempt left behind: text so far, and what the provider needs to go on."""

    text: str
    tokens: int = 0
    handle: Mapping[str, Json] = field(default_factory=dict)
    """Provider's own: conversation id, byte offset, response id, last event id."""


@dataclass(frozen=True, slots=True)
class LLMRequest:
    """One question. `messages` are as OpenAI's: role, content, tool_calls, tool_call_id."""

    model: str
    messages: Sequence[Mapping[str, Json]]
    system: str | None = None
    temperature: float | None = None
    max_tokens: int | None = None
    response_schema: Mapping[str, Json] | None = None
    tools: Sequence[Mapping[str, Json]] = ()
    extra: Mapping[str, Json] = field(default_factory=dict)
    """Any further parameter of the provider, passed on as it is."""
    idempotency_key: str = ""
    stream: bool = True
    partial: Partial | None = None


@dataclass(frozen=True, slots=True)
class LLMResponse:
    """One answer. `text` is whole: the kept prefix included when the request carried a partial."""

    text: str
    model: str
    usage: Usage
    finish_reason: str = "stop"
    tool_calls: Sequence[Mapping[str, Json]] = ()
    """Each {id, name, arguments (parsed JSON)}."""
    response_id: str = ""
    resumed: Resume | None = None
    resumed_from_tokens: int = 0
    is_priced: bool = True
    """False: the price of this model is not known, and a cost of 0 does not mean free."""


class LLMProvider(Protocol):
    """A language model behind a wire format."""

    name: str

    async def complete(
        self,
        request: LLMRequest,
        on_chunk: OnChunk,
        on_handle: Callable[[Mapping[str, Json]], None],
    ) -> LLMResponse:
        """Ask once. Chunks are the new text only. `on_handle` is told what a later attempt needs.

        If the request carries a partial, `on_handle` is first told `kept_chars`: all of its text,
        or 0 when the answer starts again, in which case readers must be told before any chunk.
        Raises ProviderError's subclasses only. A request cut off after it went out raises
        ProviderTransient when it is safe to send again (every LLM call is; it may cost twice).
        """
        ...

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class EmbedResponse:
    """One vector per text, in order."""

    vectors: Sequence[Sequence[float]]
    model: str
    usage: Usage
    is_priced: bool = True


class EmbeddingProvider(Protocol):
    """Texts to vectors."""

    name: str
    batch_size_max: int

    async def embed(
        self,
        texts: Sequence[str],
        *,
        model: str,
        dimensions: int | None = None,
        extra: Mapping[str, Json] | None = None,
    ) -> EmbedResponse:
        """Embed at most `batch_size_max` texts in one call."""
        ...

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Match:
    """One hit of a search; a higher score is nearer."""

    id: str
    score: float
    metadata: Mapping[str, Json] | None = None
    vector: Sequence[float] | None = None


@dataclass(frozen=True, slots=True)
class VectorItem:
    """One vector to keep."""

    id: str
    vector: Sequence[float]
    metadata: Mapping[str, Json] = field(default_factory=dict)


class VectorStore(Protocol):
    """Vectors by index (collection) and namespace, nearest first by cosine."""

    name: str

    async def upsert(self, index: str, items: Sequence[VectorItem], *, namespace: str = "") -> int:
        """Insert or replace; returns how many. Repeating it changes nothing."""
        ...

    async def search(
        self,
        index: str,
        vector: Sequence[float],
        *,
        top_k: int,
        namespace: str = "",
        filter: Mapping[str, Json] | None = None,  # noqa: A002 - the word of every vector store
        include_metadata: bool = True,
        include_vectors: bool = False,
    ) -> Sequence[Match]:
        """The `top_k` nearest. `filter`: key equals value, or {"$in": [...]}, {"$gte": n}, ..."""
        ...

    async def close(self) -> None: ...


class SharedState(Protocol):
    """Where breakers and limits keep state that every node sees. The store implements it."""

    async def get(self, kind: str, key: str) -> tuple[Json, int]:
        """Value and version; (None, 0) when there is none."""
        ...

    async def put(self, kind: str, key: str, value: Json, *, version: int) -> bool:
        """Write if the stored version is still `version`; False when somebody was quicker."""
        ...


class Providers(Protocol):
    """What steps see: every configured provider by name. Unknown names raise ConfigError."""

    def llm(self, name: str) -> LLMProvider: ...

    def embedding(self, name: str) -> EmbeddingProvider: ...

    def vectors(self, name: str) -> VectorStore: ...
