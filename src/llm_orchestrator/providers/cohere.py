"""Cohere's embeddings, API v2. One request carries at most 96 texts.

`input_type` says what the vectors are for: `search_document` (default) for what is kept,
`search_query` for what is asked; both come from `extra`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llm_orchestrator.errors import ProviderTransient
from llm_orchestrator.model import Json, Usage
from llm_orchestrator.providers.answers import estimate_tokens
from llm_orchestrator.providers.base import EmbedResponse
from llm_orchestrator.providers.http import HttpClient, Target
from llm_orchestrator.providers.openai import require_key
from llm_orchestrator.providers.openai_embeddings import require_vectors
from llm_orchestrator.providers.prices import PriceBook

OFFICIAL_URL = "https://api.cohere.com/v2"


class CohereEmbeddings:
    """Texts to vectors by Cohere."""

    batch_size_max = 96

    def __init__(
        self, target: Target, http: HttpClient, *, prices: PriceBook, is_key_required: bool = True
    ) -> None:
        self.name = target.provider
        self._target = target
        self._http = http
        self._prices = prices
        self._is_key_required = is_key_required

    async def embed(
        self,
        texts: Sequence[str],
        *,
        model: str,
        dimensions: int | None = None,
        extra: Mapping[str, Json] | None = None,
    ) -> EmbedResponse:
        """One request for all texts."""
        require_key(self._target, is_required=self._is_key_required)
        body: dict[str, Json] = {
            "model": model,
            "texts": list(texts),
            "input_type": "search_document",
            **(extra or {}),
            "embedding_types": ["float"],
        }
        if dimensions is not None:
            body["output_dimension"] = dimensions
        reply = await self._http.post(self._target, "/embed", body)
        try:
            vectors = reply["embeddings"]["float"]
            billed = (reply.get("meta") or {}).get("billed_units") or {}
            tokens = int(billed.get("input_tokens") or 0)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ProviderTransient(
                f"{self.name} answered without embeddings", provider=self.name
            ) from error
        require_vectors(self.name, vectors, len(texts))
        used = Usage(tokens or sum(estimate_tokens(text) for text in texts))
        priced = self._prices.price("cohere", model, used=used)
        return EmbedResponse(vectors, model, priced.usage, is_priced=priced.is_priced)

    async def close(self) -> None:
        """Nothing: whoever made the HTTP client closes it."""
