"""Embeddings of OpenAI and of every server that speaks the same. One request, never retried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from urllib.parse import quote

from llm_orchestrator.errors import ProviderTransient
from llm_orchestrator.model import Json, Usage
from llm_orchestrator.providers.answers import estimate_tokens
from llm_orchestrator.providers.base import EmbedResponse
from llm_orchestrator.providers.http import HttpClient, Target
from llm_orchestrator.providers.openai import Dialect, azure_path, require_key
from llm_orchestrator.providers.prices import PriceBook


class OpenAIEmbeddings:
    """Embeddings behind an OpenAI-compatible address."""

    batch_size_max = 2048

    def __init__(
        self, target: Target, http: HttpClient, *, dialect: Dialect, prices: PriceBook
    ) -> None:
        self.name = target.provider
        self._target = target
        self._http = http
        self._dialect = dialect
        self._prices = prices

    async def embed(
        self,
        texts: Sequence[str],
        *,
        model: str,
        dimensions: int | None = None,
        extra: Mapping[str, Json] | None = None,
    ) -> EmbedResponse:
        """One request for all texts."""
        require_key(self._target, is_required=self._dialect.is_key_required)
        body: dict[str, Json] = {"model": model, "input": list(texts), **(extra or {})}
        if dimensions is not None:
            body["dimensions"] = dimensions
        path, version = "/embeddings", self._dialect.api_version
        if version:
            path = f"{azure_path(self._target, model)}{path}?api-version={quote(version)}"
        reply = await self._http.post(self._target, path, body)
        try:
            rows = sorted(reply["data"], key=lambda row: int(row.get("index", 0)))
            vectors = [row["embedding"] for row in rows]
            used = Usage(int((reply.get("usage") or {}).get("prompt_tokens", 0)))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ProviderTransient(
                f"{self.name} answered without embeddings", provider=self.name
            ) from error
        require_vectors(self.name, vectors, len(texts))
        used = used if used.input_tokens else Usage(sum(estimate_tokens(text) for text in texts))
        priced = self._prices.price(self.name, model, used=used)
        return EmbedResponse(vectors, model, priced.usage, is_priced=priced.is_priced)

    async def close(self) -> None:
        """Nothing: whoever made the HTTP client closes it."""


def require_vectors(provider: str, vectors: Sequence[Json], count: int) -> None:
    """An embedding for each text, or the answer is of no use."""
    if len(vectors) != count or not all(isinstance(v, list) and v for v in vectors):
        raise ProviderTransient(
            f"{provider} answered with {len(vectors)} embeddings for {count} texts",
            provider=provider,
        )
