"""What ties a stream to its store: whose it is, what came before it, how far the store is.

Records of kind `archive` (never archived themselves):

    begin      since when and where this incarnation of the store is archived, and whether it held
               something then that is not (`is_whole` false: segments alone are not enough)
    STREAM     everything up to batch `number` of that stream has ended, and is in the store if it
               landed. It stands in every backup, so a rebuild knows behind what it may begin. It
               lags a second behind; that is safe, for applying a batch again changes nothing.
               And how the archive fares, for people.

The place has a mark for each incarnation that is archived there: a folder of the same name on
another machine has none, and is refused.
"""

from __future__ import annotations

import asyncio
import base64
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llm_orchestrator.clock import Clock
from llm_orchestrator.errors import ConfigError, NotFound, Overtaken, StoreError
from llm_orchestrator.model import Json
from llm_orchestrator.recovery.compact import MARKS
from llm_orchestrator.recovery.places import Place
from llm_orchestrator.recovery.sealing import Seal, SealedKey
from llm_orchestrator.recovery.segments import Header
from llm_orchestrator.recovery.stream_sinks import Sink, make_sink
from llm_orchestrator.recovery.unarchived import BEGIN, KIND
from llm_orchestrator.store.audit import AuditFilter
from llm_orchestrator.store.base import Batch, Database, PutRecord, RunFilter, lives

logger = logging.getLogger(__name__)
POSITION_S = 1.0
LEASE_S = 3.5
"""A node that has not beaten for so long is no reason to wait."""


class StoreStream:
    """See stream.Opener. One per process life and incarnation of the store."""

    def __init__(
        self,
        place: Place,
        store: Database,
        clock: Clock,
        *,
        kind: str,
        stream: str = "",
        recipients: Sequence[Any] = (),
    ) -> None:
        self.stream = stream or store.node_id
        self.state: Callable[[], dict[str, Json]] = dict
        """How the archive fares."""
        self._incarnation = ""
        self._place = place
        self._store = store
        self._clock = clock
        self._kind = kind
        self._recipients = recipients
        self._is_whole = False
        self._known: dict[str, int] = {}
        self._at = clock.now_us()
        self._began_at = self._begin_version = 0
        self._settled = self._written = self._version = 0
        self._moved: asyncio.Event | None = None
        self._task: asyncio.Task[None] | None = None

    async def prepare(self, *, is_needed: bool = True) -> None:
        self._incarnation = self._store.incarnation
        begun = await self._begun()
        if begun is None:
            begun = await self._begin()
        elif begun.get("place") != self._place.shown:
            raise ConfigError(
                f"this store is archived to {begun.get('place')}, and not to {self._place.shown}",
                hint="set archive_place to it, or end that archive: llmo archive stop",
            )
        else:
            try:
                await check_mark(self._place, self._incarnation)
            except StoreError as error:
                if is_needed:
                    raise
                logger.critical("the stream archive is away: %s", error.message)
        self._is_whole, self._began_at = bool(begun["is_whole"]), int(begun["at"])
        self._known = certain(await self._store.shelf.records(KIND))

    async def _begun(self) -> dict[str, Any] | None:
        """The record `begin` of this incarnation."""
        value, self._begin_version = await self._store.shelf.record(KIND, BEGIN)
        is_ours = isinstance(value, dict) and value.get("incarnation") == self._incarnation
        return value if is_ours and isinstance(value, dict) else None

    async def _begin(self) -> dict[str, Any]:
        """From now on this incarnation is archived, by every process that writes to it."""
        store = self._store
        await self._refuse_strangers()
        trouble = await self._place.check()
        if trouble:
            raise ConfigError(f"{self._place.shown} cannot hold a stream archive: {trouble}")
        await _put_mark(self._place, MARKS + self._incarnation)
        while (found := await self._begun()) is None:
            value: dict[str, Json] = {
                "incarnation": self._incarnation,
                "place": self._place.shown,
                "at": self._clock.now_us(),
                "is_whole": await _is_empty(store),
            }
            change = PutRecord(KIND, BEGIN, value, self._begin_version)
            await store.commit(Batch(changes=(change,)))
        return found

    async def _refuse_strangers(self) -> None:
        """Nodes that write without an archive. Raises ConfigError."""
        before = await self._strangers()
        if not before:
            return
        await self._clock.sleep(LEASE_S)
        after = await self._strangers()
        moving = sorted(name for name, beat in after.items() if beat != before.get(name))
        if moving:
            raise ConfigError(
                f"node {moving[0]} writes to this store without an archive",
                hint="stop it, and start it again with the same archive_place",
            )

    async def _strangers(self) -> dict[str, int]:
        return {
            node.node_id: node.beat
            for node in await self._store.shelf.nodes()
            if lives(node)
            and node.node_id.partition(".")[0] != self._store.node_id
            and not (isinstance(node.info, dict) and node.info.get("archive"))
        }

    def open(self) -> Sink:
        seal, wrapped = None, ""
        if self._recipients:
            key = self._clock.random_bytes(32)
            seal = Seal(key)
            wrapped = base64.b64encode(SealedKey.wrap(key, self._recipients).wrapped).decode()

        def header(number: int, previous: bytes) -> Header:
            store = self._store
            return Header(
                stream=self.stream,
                number=number,
                previous=previous,
                incarnation=self._incarnation,
                generation=store.generation,
                kind=self._kind,
                began_at=self._began_at,
                is_whole=self._is_whole,
                key=wrapped,
                at=self._at,
                known=self._known if number == 1 else {},
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
        is_known = self._settled or self._version
        if is_known and self._store.incarnation == self._incarnation:
            await self._put(is_forced=True)

    async def tell(self) -> None:
        await self._put(is_forced=True)

    async def _follow(self) -> None:
        assert self._moved is not None
        while True:
            await self._moved.wait()
            self._moved.clear()
            await self._clock.sleep(POSITION_S)
            await asyncio.shield(self._put())

    async def _put(self, *, is_forced: bool = False) -> None:
        number = self._settled
        if number <= self._written and not is_forced:
            return
        value: Json = {**self.state(), "number": number, "at": self._clock.now_us()}
        key = self.stream
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


def certain(records: Mapping[str, Json]) -> dict[str, int]:
    """Up to which batch each stream has come into the archive, as its writer has said."""
    return {
        stream: int(value["number"])
        for stream, value in records.items()
        if isinstance(value, dict)
        and value.get("number")
        and not value.get("is_degraded")
        and not value.get("has_hole")
        and (value.get("is_ended") or value.get("mode") == "sync")
    }


async def _put_mark(place: Place, name: str) -> None:
    try:
        await place.create(name, b"this store is archived here\n")
    except Overtaken:
        return


async def check_mark(place: Place, incarnation: str) -> None:
    """Raises ConfigError when the store is not archived in this place; StoreError."""
    try:
        await place.peek(MARKS + incarnation, 1)
    except NotFound as error:
        raise ConfigError(
            f"{place.shown} is not the place where this store is archived: its mark is not there",
            hint="the same folder on another machine? Every node needs the same place",
        ) from error


async def stop_archive(store: Database) -> bool:
    """What is committed from now on is not archived. False when it was not. Raises StoreError."""
    value, version = await store.shelf.record(KIND, BEGIN)
    if value is None:
        return False
    await store.commit(Batch(changes=(PutRecord(KIND, BEGIN, None, version),)))
    return True
