"""Stands before a provider and its guards: counts questions, tokens, dollars and seconds.

A question that was never sent (its breaker is open, its limit spent) counts as one with the outcome
`unavailable`, without a duration.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TypeVar

from llm_orchestrator.clock import Clock
from llm_orchestrator.errors import OrchestratorError, ProviderOutage, ProviderUnavailable
from llm_orchestrator.model import Json, Usage
from llm_orchestrator.providers.base import (
    EmbeddingProvider,
    EmbedResponse,
    LLMProvider,
    LLMRequest,
    LLMResponse,
    OnChunk,
)
from llm_orchestrator.telemetry.metrics import Metrics

T = TypeVar("T")


class _Meter:
    """The measuring that language models and embeddings share."""

    def __init__(self, provider: str, clock: Clock, metrics: Metrics) -> None:
        self._provider = provider
        self._clock = clock
        self._metrics = metrics

    async def ask(
        self, model: str, ask: Callable[[], Awaitable[T]], usage: Callable[[T], Usage]
    ) -> T:
        """Ask, and count how it ends. Raises what `ask` raises."""
        began = self._clock.monotonic()
        try:
            answer = await ask()
        except ProviderUnavailable as error:
            took_s = None
            if isinstance(error, ProviderOutage):  # it was asked
                took_s = self._clock.monotonic() - began
            self._metrics.asked(self._provider, model, outcome=_outcome(error), seconds=took_s)
            raise
        except (Exception, asyncio.CancelledError) as error:
            took_s = self._clock.monotonic() - began
            self._metrics.asked(self._provider, model, outcome=_outcome(error), seconds=took_s)
            raise
        took_s = self._clock.monotonic() - began
        self._metrics.asked(self._provider, model, outcome="ok", seconds=took_s)
        used = usage(answer)
        tokens = used.input_tokens, used.output_tokens
        self._metrics.used(self._provider, model, tokens=tokens, cost_usd=used.cost_usd)
        return answer


def _outcome(error: BaseException) -> str:
    if isinstance(error, asyncio.CancelledError):
        return "cancelled"
    if isinstance(error, ProviderOutage) and error.__cause__ is not None:
        return _outcome(error.__cause__)
    return error.kind if isinstance(error, OrchestratorError) else "defect"


class Measured:
    """A language model that is measured."""

    def __init__(self, inner: LLMProvider, clock: Clock, metrics: Metrics) -> None:
        self.name = inner.name
        self.inner = inner
        self._meter = _Meter(inner.name, clock, metrics)

    async def complete(
        self,
        request: LLMRequest,
        on_chunk: OnChunk,
        on_handle: Callable[[Mapping[str, Json]], None],
    ) -> LLMResponse:
        """Ask once. Raises what the provider raises."""
        return await self._meter.ask(
            request.model,
            lambda: self.inner.complete(request, on_chunk, on_handle),
            lambda answer: answer.usage,
        )

    async def close(self) -> None:
        """Close the provider."""
        await self.inner.close()


class MeasuredEmbeddings:
    """An embedding model that is measured."""

    def __init__(self, inner: EmbeddingProvider, clock: Clock, metrics: Metrics) -> None:
        self.name = inner.name
        self.batch_size_max = inner.batch_size_max
        self.inner = inner
        self._meter = _Meter(inner.name, clock, metrics)

    async def embed(
        self,
        texts: Sequence[str],
        *,
        model: str,
        dimensions: int | None = None,
        extra: Mapping[str, Json] | None = None,
    ) -> EmbedResponse:
        """Embed once. Raises what the provider raises."""
        return await self._meter.ask(
            model,
            lambda: self.inner.embed(texts, model=model, dimensions=dimensions, extra=extra),
            lambda answer: answer.usage,
        )

    async def close(self) -> None:
        """Close the provider."""
        await self.inner.close()
