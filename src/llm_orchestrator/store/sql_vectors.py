"""Vectors in the engine's own database: backups and recovery cover them like everything else.

On SQLite float32 rows are searched by brute force, which is right for some ten thousand vectors; on
PostgreSQL pgvector finds the nearest ones where the server has it. It speaks the providers'
`VectorStore` protocol without importing it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from llm_orchestrator.model import Json
from llm_orchestrator.store.base import Batch, PutVectors, Store
from llm_orchestrator.store.journal import canonical
from llm_orchestrator.telemetry.redact import redact_data
from llm_orchestrator.vector_math import matches, pack, top_k, unpack


class Item(Protocol):
    """What is to be kept."""

    @property
    def id(self) -> str: ...
    @property
    def vector(self) -> Sequence[float]: ...
    @property
    def metadata(self) -> Mapping[str, Json]: ...


@dataclass(frozen=True, slots=True)
class Hit:
    """One hit of a search; a higher score is nearer."""

    id: str
    score: float
    metadata: Mapping[str, Json] | None = field(default=None)
    vector: Sequence[float] | None = None


class SqlVectors:
    """The vector store `sql`."""

    name = "sql"

    def __init__(self, store: Store) -> None:
        self._store = store

    async def upsert(self, index: str, items: Sequence[Item], *, namespace: str = "") -> int:
        """Insert or replace; returns how many. Repeating it changes nothing."""
        rows = tuple(
            (item.id, pack(item.vector), canonical(redact_data(dict(item.metadata))))
            for item in items
        )
        await self._store.commit(Batch(changes=(PutVectors(index, namespace, rows),)))
        return len(rows)

    async def search(
        self,
        index: str,
        vector: Sequence[float],
        *,
        top_k: int,
        namespace: str = "",
        filter: Mapping[str, Json] | None = None,  # noqa: A002 (the protocol's word)
        include_metadata: bool = True,
        include_vectors: bool = False,
    ) -> Sequence[Hit]:
        """The `top_k` nearest by cosine, among those that fit `filter`."""
        limit = top_k
        while True:
            rows = await self._store.shelf.vectors(index, namespace, near=vector, limit=limit)
            known = [(key, blob, json.loads(metadata)) for key, blob, metadata in rows]
            if filter:
                known = [row for row in known if matches(filter, row[2])]
            if len(known) >= top_k or len(rows) != limit:
                break
            limit *= 8  # too few of the nearest fit the filter
        nearest = _nearest(vector, [blob for _, blob, _ in known], top_k)
        return [
            Hit(
                known[place][0],
                score,
                known[place][2] if include_metadata else None,
                unpack(known[place][1]) if include_vectors else None,
            )
            for place, score in nearest
        ]

    async def close(self) -> None:
        """Nothing of its own is open."""


def _nearest(vector: Sequence[float], blobs: list[bytes], count: int) -> list[tuple[int, float]]:
    return top_k(vector, blobs, count)
