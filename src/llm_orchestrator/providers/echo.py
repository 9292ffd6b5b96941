"""A language model and an embedding model that need no network, for first steps and tests.

The same request always gets the same answer: "echo: " and the last user message, or `reply` of
`extra`, or a value that fits `response_schema`. Streams by words, continues a partial answer
(prefill), costs nothing. Keeps no state; waits only where `extra` asks for it.

`extra`: reply (text), delay_ms (before each chunk), chunks (how many at most), fail (an error kind
of errors.py), fail_after (chunks before it fails, default 0).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence

from llm_orchestrator import errors
from llm_orchestrator.clock import Clock
from llm_orchestrator.model import Json, Usage
from llm_orchestrator.providers.base import (
    EmbedResponse,
    LLMRequest,
    LLMResponse,
    OnChunk,
    Resume,
)

DIMENSIONS = 64
_FAILURES: dict[str, type[errors.ProviderError]] = {
    kind.kind: kind
    for kind in (
        errors.ProviderTransient,
        errors.ProviderRateLimited,
        errors.ProviderTimeout,
        errors.ProviderUnavailable,
        errors.ProviderAuthentication,
        errors.ProviderInvalidRequest,
        errors.ProviderContentFiltered,
        errors.ProviderUnknownOutcome,
    )
}


class Echo:
    """A language model that says what it was told."""

    name = "echo"

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    async def complete(
        self,
        request: LLMRequest,
        on_chunk: OnChunk,
        on_handle: Callable[[Mapping[str, Json]], None],
    ) -> LLMResponse:
        """Answer; see the module's docstring for what `extra` may ask for."""
        extra = request.extra
        full = answer_to(request)
        kept = request.partial.text if request.partial else ""
        is_resumed = bool(kept) and full.startswith(kept)
        kept = kept if is_resumed else ""
        if request.partial:
            on_handle({"kept_chars": len(kept)})
        pieces = _pieces(full[len(kept) :], int(extra.get("chunks", 0)))
        for number, piece in enumerate(pieces):
            self._fail(extra, number)
            if extra.get("delay_ms"):
                await self._clock.sleep(float(extra["delay_ms"]) / 1000)
            if request.stream:
                await on_chunk(piece)
        self._fail(extra, len(pieces))
        resumed = None
        if request.partial:
            resumed = Resume.PREFILL if is_resumed else Resume.RESTART
        return LLMResponse(
            text=full,
            model=request.model,
            usage=Usage(_count(_prompt(request)), _count(full[len(kept) :])),
            resumed=resumed,
            resumed_from_tokens=_count(kept),
        )

    async def close(self) -> None:
        """Nothing to close."""

    def _fail(self, extra: Mapping[str, Json], sent: int) -> None:
        kind = extra.get("fail")
        if not kind or sent < int(extra.get("fail_after", 0)):
            return
        if kind not in _FAILURES:
            raise errors.ProviderInvalidRequest(
                f"echo cannot fail with {kind!r}; known kinds: {', '.join(sorted(_FAILURES))}",
                provider=self.name,
            )
        raise _FAILURES[kind](
            f"echo was asked to fail: {kind}",
            provider=self.name,
            retry_after_s=extra.get("retry_after_s"),
        )


class EchoEmbeddings:
    """Unit vectors from hashed words: texts that share words are near each other."""

    name = "echo"
    batch_size_max = 1024

    async def embed(
        self,
        texts: Sequence[str],
        *,
        model: str,
        dimensions: int | None = None,
        extra: Mapping[str, Json] | None = None,
    ) -> EmbedResponse:
        """Hash each text to a unit vector of `dimensions` (default 64)."""
        vectors = [unit_vector(text, dimensions or DIMENSIONS) for text in texts]
        return EmbedResponse(vectors, model, Usage(sum(_count(text) for text in texts)))

    async def close(self) -> None:
        """Nothing to close."""


def answer_to(request: LLMRequest) -> str:
    """The whole answer to a request, before anything is kept or cut."""
    if "reply" in request.extra:
        return str(request.extra["reply"])
    if request.response_schema is not None:
        return json.dumps(sample(request.response_schema))
    users = [m for m in request.messages if m.get("role") == "user"]
    return f"echo: {_text(users[-1].get('content')) if users else ''}"


def sample(schema: Json) -> Json:
    """A small value that fits a JSON schema (types, enum, const, properties, items, bounds)."""
    if not isinstance(schema, Mapping):
        return None
    for key in ("const", "default"):
        if key in schema:
            return schema[key]
    if schema.get("enum"):
        return schema["enum"][0]
    for key in ("anyOf", "oneOf", "allOf"):
        if schema.get(key):
            return sample(schema[key][0])
    kind = schema.get("type", "object" if "properties" in schema else "string")
    kind = kind[0] if isinstance(kind, list) else kind
    if kind == "object":
        return {name: sample(part) for name, part in schema.get("properties", {}).items()}
    if kind == "array":
        return [sample(schema.get("items", {})) for _ in range(int(schema.get("minItems", 1)))]
    if kind in ("integer", "number"):
        return schema.get("minimum", schema.get("maximum", 1))
    return {"boolean": True, "null": None}.get(kind, "text".ljust(schema.get("minLength", 0), "x"))


def unit_vector(text: str, dimensions: int) -> list[float]:
    """A bag of hashed words, normalised to length 1; the same in every process."""
    total = [0.0] * dimensions
    for word in re.findall(r"\w+", text.lower()) or [text]:
        digest = hashlib.shake_128(word.encode()).digest(dimensions)
        for place, byte in enumerate(digest):
            total[place] += byte - 127.5
    length = math.sqrt(sum(value * value for value in total)) or 1.0
    return [value / length for value in total]


def _pieces(text: str, chunks: int) -> list[str]:
    pieces = re.findall(r"\s*\S+|\s+$", text)
    if chunks and len(pieces) > chunks:
        pieces = [*pieces[: chunks - 1], "".join(pieces[chunks - 1 :])]
    return pieces


def _text(content: Json) -> str:
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    return "" if content is None else str(content)


def _prompt(request: LLMRequest) -> str:
    return " ".join([request.system or "", *(_text(m.get("content")) for m in request.messages)])


def _count(text: str) -> int:
    return len(text.split())
