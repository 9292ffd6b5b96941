"""Vectors in Qdrant: embedded in a folder, or a server by URL, through the same client.

Qdrant knows no namespaces and takes only numbers and uuids as ids. So a point's id is derived from
namespace and id, and both stand in the payload beside the caller's metadata, which is kept under a
name of its own. Repeating an upsert therefore changes nothing. The client is not async: all calls
run, one at a time, on one thread of our own, so that the event loop never blocks. Cosine: vectors
come back with length 1. A real server has not been run here; embedded mode has.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from llm_orchestrator.errors import (
    ConfigError,
    OrchestratorError,
    ProviderAuthentication,
    ProviderError,
    ProviderInvalidRequest,
    ProviderRateLimited,
    ProviderTransient,
)
from llm_orchestrator.model import Json
from llm_orchestrator.providers.base import Match, VectorItem
from llm_orchestrator.vector_math import check_filter

HINT = "pip install 'llm-orchestrator[qdrant]'"

_TIMEOUT_S = 30
_UPSERT_MAX = 256

T = TypeVar("T")


class QdrantVectors:
    """The VectorStore `qdrant`. Give either `path` (embedded) or `url`."""

    def __init__(
        self,
        *,
        path: Path | None = None,
        url: str | None = None,
        api_key: str | None = None,
        name: str = "qdrant",
    ) -> None:
        if (path is None) == (url is None):
            raise ConfigError(
                "qdrant needs a folder or a URL, one of the two", hint="set QDRANT_URL"
            )
        self.name = name
        self._path = path
        self._url = url
        self._api_key = api_key
        self._client: Any = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="qdrant")

    async def upsert(self, index: str, items: Sequence[VectorItem], *, namespace: str = "") -> int:
        """Insert or replace; the first upsert makes the collection with its dimension."""
        if not items:
            return 0
        await self._call(lambda client: _upsert(client, index, items=items, namespace=namespace))
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
        """The `top_k` nearest in `namespace`, best first."""
        check_filter(filter)

        def query(client: Any) -> list[Match]:
            models = _models()
            wanted = [_equal(models, "namespace", namespace), _translate(models, filter or {})]
            found = client.query_points(
                index,
                query=[float(value) for value in vector],
                query_filter=models.Filter(must=wanted),
                limit=top_k,
                with_payload=True,
                with_vectors=include_vectors,
            )
            return [
                Match(
                    id=point.payload["id"],
                    score=point.score,
                    metadata=point.payload["metadata"] if include_metadata else None,
                    vector=point.vector if include_vectors else None,
                )
                for point in found.points
            ]

        return await self._call(query)

    async def close(self) -> None:
        """Close the client; an embedded store is on disk afterwards."""
        client, self._client = self._client, None
        if client is not None:
            await asyncio.get_running_loop().run_in_executor(self._thread, client.close)
        self._thread.shutdown(wait=False)

    async def _call(self, work: Callable[[Any], T]) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._guarded, work)

    def _guarded(self, work: Callable[[Any], T]) -> T:
        """In the thread: no error of the client's leaves this module."""
        try:
            if self._client is None:
                self._client = self._open()
            return work(self._client)
        except OrchestratorError:
            raise
        except Exception as error:  # the client raises whatever its parts raise
            raise self._explain(error) from error

    def _open(self) -> Any:
        try:
            client = import_module("qdrant_client").QdrantClient
        except ImportError as error:
            raise ProviderInvalidRequest(
                f"qdrant cannot be loaded: {error}", provider=self.name, hint=HINT
            ) from error
        if self._path is None:
            return client(
                url=self._url,
                api_key=self._api_key,
                timeout=_TIMEOUT_S,
                check_compatibility=False,  # it would ask the server at once, and only warn
            )
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            return client(path=str(self._path))
        except (RuntimeError, OSError) as error:
            raise ProviderInvalidRequest(
                f"the embedded qdrant in {self._path} cannot be opened: {error}",
                provider=self.name,
                hint="one process at a time may use it; for more run a server, set QDRANT_URL",
            ) from error

    def _explain(self, error: Exception) -> ProviderError:
        """By what the reader can do. The key is in none of the client's messages."""
        status = getattr(error, "status_code", None)
        message = f"qdrant: {str(error).strip() or type(error).__name__}"[:500]
        kind: type[ProviderError] = ProviderTransient
        hint = None
        if isinstance(error, ValueError | TypeError | AssertionError):
            kind = ProviderInvalidRequest  # what embedded mode raises: no such index, bad dimension
            hint = "does the index exist, with the dimension of this embedding model?"
        elif status in {401, 403}:
            kind, hint = ProviderAuthentication, "check qdrant's API key"
        elif status == 429:
            kind = ProviderRateLimited
        elif status is not None and 400 <= status < 500:
            kind = ProviderInvalidRequest
        elif status is None:
            hint = f"does a qdrant server answer at {self._url}?" if self._url else None
        return kind(message, provider=self.name, status=status, hint=hint)


def point_id(namespace: str, item_id: str) -> str:
    """The uuid that stands for an id in a namespace: a hash, so the same again each time."""
    # The length keeps ("a", "bc") and ("ab", "c") apart.
    text = f"{len(namespace)}:{namespace}{item_id}".encode()
    value = hashlib.blake2b(text, digest_size=16).hexdigest()
    return f"{value[:8]}-{value[8:12]}-{value[12:16]}-{value[16:20]}-{value[20:]}"


def _upsert(client: Any, index: str, *, items: Sequence[VectorItem], namespace: str) -> None:
    models = _models()
    if not client.collection_exists(index):
        size = len(items[0].vector)
        shape = models.VectorParams(size=size, distance=models.Distance.COSINE)
        client.create_collection(index, vectors_config=shape)
    points = [
        models.PointStruct(
            id=point_id(namespace, item.id),
            vector=[float(value) for value in item.vector],
            payload={
                "id": item.id,
                "namespace": namespace,
                "metadata": dict(item.metadata),
            },
        )
        for item in items
    ]
    for start in range(0, len(points), _UPSERT_MAX):
        client.upsert(index, points=points[start : start + _UPSERT_MAX], wait=True)


def _models() -> Any:
    return import_module("qdrant_client.models")


def _translate(models: Any, filter: Mapping[str, Json]) -> Any:  # noqa: A002
    """Our filter (vector_math.matches) as Qdrant's."""
    must: list[Any] = []
    for key, wanted in filter.items():
        if key == "$and":
            must += [_translate(models, part) for part in wanted]
        elif key == "$or":
            must.append(models.Filter(should=[_translate(models, part) for part in wanted]))
        else:
            operators = wanted if isinstance(wanted, Mapping) else {"$eq": wanted}
            field = f"metadata.{key}"
            must += [
                _operator(models, field, name, value=value) for name, value in operators.items()
            ]
    return models.Filter(must=must)


def _operator(models: Any, field: str, name: str, *, value: Json) -> Any:
    if name == "$eq":
        return _equal(models, field, value)
    if name == "$ne":
        return models.Filter(must_not=[_equal(models, field, value)])
    if name in {"$in", "$nin"}:
        each = [_equal(models, field, one) for one in value]
        if name == "$nin":
            return models.Filter(must_not=each)
        # Nothing is in an empty list; an empty `should` would ask for nothing and fit all.
        return models.Filter(should=each) if each else models.Filter(must_not=[models.Filter()])
    if name == "$exists":
        empty = models.IsEmptyCondition(is_empty=models.PayloadField(key=field))
        return models.Filter(**{"must_not" if value else "must": [empty]})
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ProviderInvalidRequest(
            f"qdrant compares numbers only: {name} of {field.removeprefix('metadata.')} "
            f"is {type(value).__name__}",
            provider="qdrant",
        )
    return models.FieldCondition(key=field, range=models.Range(**{name.removeprefix("$"): value}))


def _equal(models: Any, field: str, value: Json) -> Any:
    """1 and 1.0 are one number in JSON, so numbers are met as a range of one point."""
    if value is None:
        return models.IsNullCondition(is_null=models.PayloadField(key=field))
    if isinstance(value, bool | str):
        return models.FieldCondition(key=field, match=models.MatchValue(value=value))
    if isinstance(value, int | float):
        return models.FieldCondition(key=field, range=models.Range(gte=value, lte=value))
    raise ProviderInvalidRequest(
        f"qdrant finds texts, numbers, true, false and null, not {type(value).__name__}",
        provider="qdrant",
    )
