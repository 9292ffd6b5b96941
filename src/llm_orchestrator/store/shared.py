"""Small state that all nodes share (breakers, limits), kept in `records` by compare-and-swap."""

from __future__ import annotations

from llm_orchestrator.model import Json
from llm_orchestrator.store.base import Batch, PutRecord, Store


class StoreState:
    """Implements the providers' `SharedState` on a store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def get(self, kind: str, key: str) -> tuple[Json, int]:
        """Value and version; (None, 0) when there is none."""
        return await self._store.shelf.record(kind, key)

    async def put(self, kind: str, key: str, value: Json, *, version: int) -> bool:
        """Write if the stored version is still `version`; False when somebody was quicker."""
        receipt = await self._store.commit(Batch(changes=(PutRecord(kind, key, value, version),)))
        return not receipt.is_refused
