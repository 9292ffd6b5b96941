"""What ties a stream to its store: whose it is, what came before it, how far the store is.

Records of kind `archive` (never archived themselves):

    begin      since when this incarnation of the store is archived, and whether it held something
               then that is not (`is_whole` false: segments alone are not enough)
    STREAM     everything up to batch `number` of that stream has ended, and is in the store if it
               landed. It stands in every backup, so a rebuild knows behind what it may begin. It
               lags a second behind; that is safe, for applying a batch again changes nothing.
"""

from __future__ import annotations

import asyncio
import base64
import logging
from collections.abc import Sequence
from typing import Any

from llm_orchestrator.clock import Clock
from llm_orchestrator.errors import StoreError
from llm_orchestrator.model import Json
from llm_orchestrator.recovery.places import Place
from llm_orchestrator.recovery.sealing import Seal, SealedKey
from llm_orchestrator.recovery.segments import Header
from llm_orchestrator.recovery.stream_sinks import Sink, make_sink
from llm_orchestrator.store.audit import AuditFilter
from llm_orchestrator.store.base import Batch, Database, PutRecord, RunFilter

logger = logging.getLogger(__name__)
KIND = "archive"
BEGIN = "begin"
POSITION_S = 1.0


class StoreStream:
    """See stream.Opener. One per process life."""

    def __init__(
        self,
        place: Place,
        store: Database,
        clock: Clock,
        *,
        kind: str,
        recipients: Sequence[Any] = (),
    ) -> None:
        self._place = place
        self._store = store
        self._clock = clock
        self._kind = kind
        self._recipients = recipients
        self._is_whole = False
        self._began_at = 0
        self._settled = self._written = self._version = 0
        self._moved: asyncio.Event | None = None
        self._task: asyncio.Task[None] | None = None

    async def prepare(self) -> None:
        store = self._store
        while True:
            value, version = await store.shelf.record(KIND, BEGIN)
            if isinstance(value, dict) and value.get("incarnation") == store.incarnation:
                break
            value = {
                "incarnation": store.incarnation,
                "at": self._clock.now_us(),
                "is_whole": await _is_empty(store),
            }
            change = PutRecord(KIND, BEGIN, value, version)
            if not (await store.commit(Batch(changes=(change,)))).is_refused:
                break
        self._is_whole, self._began_at = bool(value["is_whole"]), int(value["at"])

    def open(self) -> Sink:
        seal, wrapped = None, ""
        if self._recipients:
            key = self._clock.random_bytes(32)
            seal = Seal(key)
            wrapped = base64.b64encode(SealedKey.wrap(key, self._recipients).wrapped).decode()

        def header(number: int, previous: bytes) -> Header:
            store = self._store
            return Header(
                stream=store.node_id,
                number=number,
                previous=previous,
                incarnation=store.incarnation,
                generation=store.generation,
                kind=self._kind,
                began_at=self._began_at,
                is_whole=self._is_whole,
                key=wrapped,
            )

        return make_sink(self._place, header, seal)

    def is_own(self, batch: Batch) -> bool:
        return not batch.appends and all(
            isinstance(change, PutRecord) and change.kind == KIND for change in batch.changes
        )

    def settled(self, number: int) -> None:
        self._settled = number
        if self._moved is None:
            self._moved = asyncio.Event()
            self._task = asyncio.get_running_loop().create_task(self._follow(), name="position")
        self._moved.set()

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        await self._put()

    async def _follow(self) -> None:
        assert self._moved is not None
        while True:
            await self._moved.wait()
            self._moved.clear()
            await self._clock.sleep(POSITION_S)
            await asyncio.shield(self._put())

    async def _put(self) -> None:
        number = self._settled
        if number <= self._written:
            return
        value: Json = {"number": number, "at": self._clock.now_us()}
        key = self._store.node_id
        try:
            change = PutRecord(KIND, key, value, self._version)
            receipt = await self._store.commit(Batch(changes=(change,)))
            if receipt.is_refused:  # compacted away, or a commit of ours whose answer was lost
                _, self._version = await self._store.shelf.record(KIND, key)
                return
        except StoreError as error:
            logger.debug("the archive's position is not written: %s", error.message)
            return
        self._written, self._version = number, self._version + 1


async def _is_empty(store: Database) -> bool:
    if await store.look.runs(RunFilter(limit=1)) or await store.shelf.workflows():
        return False
    return not await store.shelf.audit(AuditFilter(limit=1))


async def forget_archive(store: Database) -> None:
    """What is committed from now on is not archived: a later archive must not claim the contrary.

    For engines that open without one. Raises StoreError.
    """
    value, version = await store.shelf.record(KIND, BEGIN)
    if value is not None:
        await store.commit(Batch(changes=(PutRecord(KIND, BEGIN, None, version),)))
