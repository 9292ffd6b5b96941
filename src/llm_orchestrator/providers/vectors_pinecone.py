"""Vectors in Pinecone, by its REST API (the control plane only to find an index's host).

No account could be reached while this was written: it is tested against drill/fake_pinecone.py,
which speaks the documented wire format over a real socket. Repeating an upsert changes nothing, so
a request that was cut off is transient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from urllib.parse import quote

from llm_orchestrator.errors import ConfigError, ProviderInvalidRequest, ProviderTransient
from llm_orchestrator.model import Json
from llm_orchestrator.providers.base import Match, VectorItem
from llm_orchestrator.providers.http import HttpClient, Target
from llm_orchestrator.vector_math import check_filter

CONTROLLER = "https://api.pinecone.io"
API_VERSION = "2026-07"

_TIMEOUT_S = 30.0
_UPSERT_MAX = 100


class PineconeVectors:
    """The VectorStore `pinecone`.

    `host` is the address of one index and serves every index name; without it the host of each
    index is asked from the control plane, once. `http` is shared and closed by whoever made it.
    """

    def __init__(
        self,
        http: HttpClient,
        *,
        api_key: str,
        host: str | None = None,
        controller: str = CONTROLLER,
        name: str = "pinecone",
    ) -> None:
        if not api_key:
            raise ConfigError("pinecone needs an API key", hint="set PINECONE_API_KEY")
        self.name = name
        self._http = http
        self._api_key = api_key
        self._host = host
        self._controller = self._target(controller)
        self._targets: dict[str, Target] = {}

    async def upsert(self, index: str, items: Sequence[VectorItem], *, namespace: str = "") -> int:
        """Insert or replace, a hundred a request. The index must exist."""
        target = await self._find(index)
        for start in range(0, len(items), _UPSERT_MAX):
            vectors = [
                {"id": item.id, "values": list(item.vector), "metadata": dict(item.metadata)}
                for item in items[start : start + _UPSERT_MAX]
            ]
            body = {"vectors": vectors, "namespace": namespace}
            await self._post(target, "/vectors/upsert", body)
        return len(items)

    async def search(
        self,
        index: str,
        vector: Sequence[float],
        *,
        top_k: int,
        namespace: str = "",
        filter: Mapping[str, Json] | None = None,  # noqa: A002
        include_metadata: bool = True,
        include_vectors: bool = False,
    ) -> Sequence[Match]:
        """The `top_k` nearest in `namespace`, best first. Pinecone's filters are spelt as ours."""
        check_filter(filter)
        body: dict[str, Json] = {
            "vector": list(vector),
            "topK": top_k,
            "namespace": namespace,
            "includeMetadata": include_metadata,
            "includeValues": include_vectors,
        }
        if filter:
            body["filter"] = dict(filter)
        answer = await self._post(await self._find(index), "/query", body)
        try:
            return [
                Match(
                    id=str(match["id"]),
                    score=float(match.get("score", 0.0)),
                    metadata=(match.get("metadata") or {}) if include_metadata else None,
                    vector=match.get("values") if include_vectors else None,
                )
                for match in answer["matches"]
            ]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self._odd_answer() from error

    async def close(self) -> None:
        """Nothing of its own is open."""

    def _target(self, host: str) -> Target:
        """A host as the control plane gives it has no scheme."""
        address = (host if "://" in host else f"https://{host}").rstrip("/")
        return Target(
            provider=self.name,
            base_urls=(address,),
            headers={"Api-Key": self._api_key, "X-Pinecone-Api-Version": API_VERSION},
            key=self._api_key,
            variable="PINECONE_API_KEY",
            timeout_s=_TIMEOUT_S,
        )

    async def _find(self, index: str) -> Target:
        """Where the index lives. Hosts do not change while an index exists."""
        if index not in self._targets:
            host = self._host or await self._ask_host(index)
            self._targets[index] = self._target(host)
        return self._targets[index]

    async def _ask_host(self, index: str) -> str:
        path = f"/indexes/{quote(index, safe='')}"
        try:
            async with self._http.stream(self._controller, path) as answer:
                host = answer.whole["host"]
        except ProviderInvalidRequest as error:
            error.hint = f"is there an index {index!r} in this Pinecone project?"
            raise
        except (KeyError, TypeError) as error:
            raise self._odd_answer() from error
        return str(host)

    async def _post(self, target: Target, path: str, body: Json) -> Json:
        try:
            return await self._http.post(target, path, body)
        except ProviderInvalidRequest as error:
            error.hint = error.hint or "check the index, PINECONE_HOST, and the vector's dimension"
            raise

    def _odd_answer(self) -> ProviderTransient:
        return ProviderTransient(
            "pinecone's answer is not shaped as its API says", provider=self.name
        )
