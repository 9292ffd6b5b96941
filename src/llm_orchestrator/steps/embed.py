"""Step type `embed`: texts to vectors, in batches that the provider can take.

One text gives one vector, a list gives a list of vectors in the same order. It never retries and
never drops a text: an answer with too few vectors is an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from llm_orchestrator.errors import AuthorError, ProviderTransient
from llm_orchestrator.model import Effect, Json, Usage
from llm_orchestrator.steps.base import Outputs, StepContext
from llm_orchestrator.steps.values import describe
from llm_orchestrator.telemetry.genai import Asked
from llm_orchestrator.telemetry.propagation import asked


@dataclass(frozen=True, slots=True)
class Embedding:
    """Who makes the vectors, and how."""

    provider: str
    model: str
    dimensions: int | None = None
    batch_size: int | None = None
    extra: Mapping[str, Json] = field(default_factory=dict)


class Embed:
    """Embeds `input`; `output` binds vector, metadata."""

    type: ClassVar[str] = "embed"
    outputs: ClassVar[tuple[str, ...]] = ("vector", "metadata")
    is_paid: ClassVar[bool] = True

    def effect(self, config: Any) -> Effect:
        """Asking again costs money and changes nothing."""
        return Effect.REPEATABLE

    async def execute(self, context: StepContext, config: Any) -> Outputs:
        """Raises ProviderError's subclasses; AuthorError for an input that is no text."""
        is_single = isinstance(config.input, str)
        texts = [config.input] if is_single else list(config.input)
        how = Embedding(
            config.provider, config.model, config.dimensions, config.batch_size, config.parameters
        )
        vectors, model, usage, is_priced = await embed_texts(context, how, texts)
        metadata = {
            "provider": config.provider,
            "model": model,
            "dimensions": len(vectors[0]) if vectors else 0,
            "tokens_used": usage.input_tokens + usage.output_tokens,
            "count": len(vectors),
            "usage": usage.to_json(),
            "is_priced": is_priced,
        }
        return {"vector": vectors[0] if is_single else vectors, "metadata": metadata}


async def embed_texts(
    context: StepContext, how: Embedding, texts: Sequence[Json]
) -> tuple[list[list[float]], str, Usage, bool]:
    """One vector per text, in order; the model; what was used (booked already), and if priced."""
    for place, text in enumerate(texts):
        if not isinstance(text, str):
            raise AuthorError(f"input {place} to embed is {describe(text)}; it must be text")
    provider = context.providers.embedding(how.provider)
    size = min(how.batch_size or provider.batch_size_max, provider.batch_size_max)
    vectors: list[list[float]] = []
    model, used, is_priced = how.model, Usage(), True
    question = Asked("embeddings", how.provider, how.model)
    asked(question)
    for start in range(0, len(texts), size):
        batch = texts[start : start + size]
        answer = await provider.embed(
            batch, model=how.model, dimensions=how.dimensions, extra=how.extra
        )
        context.add_usage(answer.usage)
        if len(answer.vectors) != len(batch):
            raise ProviderTransient(
                f"{how.provider} gave {len(answer.vectors)} vectors for {len(batch)} texts",
                provider=how.provider,
            )
        vectors += [[float(number) for number in vector] for vector in answer.vectors]
        model, used = answer.model, used + answer.usage
        is_priced = is_priced and answer.is_priced
    question = question._replace(response_model=model, input_tokens=used.input_tokens)
    asked(question, cost_usd=used.cost_usd)
    return vectors, model, used, is_priced
