"""The guard of a process that is not told to archive: it must not write to a store that is.

Its batches would be missing in the archive, and nobody would notice before a rebuild.
"""

from __future__ import annotations

from llm_orchestrator.errors import ConfigError
from llm_orchestrator.store.archiving import Archive
from llm_orchestrator.store.base import Batch, Database, PutRecord, Receipt

KIND = "archive"
"""The kind of records that tell of the archive (stream_store.py)."""
BEGIN = "begin"


class Unarchived(Archive):
    """For a process that is not told to archive."""

    def __init__(self, store: Database) -> None:
        self._store = store
        self._checked = ""

    async def start(self) -> None:
        """Raises ConfigError when the store is archived."""
        await self._check()

    async def keep(self, batch: Batch) -> int:
        is_stop = any(isinstance(each, PutRecord) and each.kind == KIND for each in batch.changes)
        if self._checked != self._store.incarnation and not is_stop:
            await self._check()
        return 0

    def settle(self, number: int, receipt: Receipt | None) -> None:
        """Nothing was kept."""

    async def close(self) -> None:
        """Nothing is open."""

    async def _check(self) -> None:
        incarnation = self._store.incarnation
        if place := await archived_to(self._store):
            raise ConfigError(
                f"this store is archived to {place}, and this process is not told to: what it"
                " writes would be missing there",
                hint="set archive_place to it, or end that archive: llmo archive stop",
            )
        self._checked = incarnation


async def archived_to(store: Database) -> str:
    """The place of its stream archive, "" if it has none. Raises StoreError."""
    value, _ = await store.shelf.record(KIND, BEGIN)
    if isinstance(value, dict) and value.get("incarnation") == store.incarnation:
        return str(value.get("place") or "another place")
    return ""
