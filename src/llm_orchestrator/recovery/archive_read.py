"""What the stream archive holds, ready to be applied: whose streams, in which order, from where.

An archive's place may hold several *incarnations* of a store: each restore begins one. All streams
of one are read at once, in the order of their batches' times, each from behind the base's position.
"""

from __future__ import annotations

import heapq
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from llm_orchestrator.errors import NotFound, StoreDamaged
from llm_orchestrator.model import Entry, Json, stamp
from llm_orchestrator.recovery.compact import floor_of
from llm_orchestrator.recovery.places import Place
from llm_orchestrator.recovery.segments import Header
from llm_orchestrator.recovery.stream_read import (
    Findings,
    Item,
    Named,
    StreamReader,
    list_streams,
    read_header,
)
from llm_orchestrator.store.base import Batch, PutBlob
from llm_orchestrator.store.batch_codec import batch_of
from llm_orchestrator.store.journal import GENESIS, blob_digest, chain


@dataclass(slots=True)
class Incarnation:
    """One life of a store, from when it was begun (or restored) until the next restore."""

    name: str
    generation: int
    began_at: int
    """Since when it is archived, microseconds on the store's clock."""
    is_whole: bool
    """False: it held something before; a backup made since is needed."""
    kind: str
    floor_us: int = 0
    """A backup made since is needed: older segments were let go, or some never came. 0: none."""
    streams: dict[str, Sequence[Named]] = field(default_factory=dict)
    vouched: list[Header] = field(default_factory=list)
    """The first headers of streams: they know how long others were."""
    damage: list[str] = field(default_factory=list)

    @property
    def size_bytes(self) -> int:
        """Of its segments."""
        return sum(each.size_bytes for some in self.streams.values() for each in some)


async def read_incarnations(place: Place) -> list[Incarnation]:
    """All that the place holds, the newest first. Raises StoreError."""
    found: dict[str, Incarnation] = {}
    headless = []
    for stream, segments in (await list_streams(place)).items():
        header = await read_header(place, segments[0])
        if header is None:
            if len(segments) > 1:
                headless.append(f"{segments[0].name} has no header that can be read")
            continue
        one = found.setdefault(
            header.incarnation,
            Incarnation(
                header.incarnation,
                header.generation,
                header.began_at,
                header.is_whole,
                header.kind,
                await floor_of(place, header.incarnation),
            ),
        )
        one.streams[stream] = segments
        one.vouched.append(header)
    for one in found.values():
        one.damage += headless
    return sorted(found.values(), key=lambda one: (one.generation, one.began_at), reverse=True)


async def choose(place: Place, *, until_us: int | None = None, name: str = "") -> Incarnation:
    """The newest that had begun by then, or the one of that name. Raises NotFound."""
    found = await read_incarnations(place)
    for one in found:
        if one.name == name if name else until_us is None or one.began_at <= until_us:
            return one
    if found and until_us is not None and not name:
        raise NotFound("the stream archive began only after that moment")
    raise NotFound(f"{place.shown} holds no stream of this store", hint="llmo archive status")


class Merged:
    """The streams of one incarnation, merged. `positions`: what a base has of each."""

    def __init__(
        self,
        place: Place,
        incarnation: Incarnation,
        *,
        positions: Mapping[str, int],
        base_us: int = 0,
        keys: Sequence[Any] = (),
        findings: Findings,
    ) -> None:
        self._base_us = base_us
        self._place = place
        self._incarnation = incarnation
        self._positions = positions
        self._keys = keys
        self._findings = findings
        self._readers: list[StreamReader] = []

    async def items(self) -> AsyncIterator[Item]:
        """All batches behind the positions, by time. Raises WrongKey, StoreError."""
        heap: list[tuple[int, str, int, Item, AsyncIterator[Item]]] = []
        for stream, segments in self._incarnation.streams.items():
            reader = StreamReader(
                self._place, stream, segments, keys=self._keys, findings=self._findings
            )
            self._readers.append(reader)
            await self._push(heap, stream, reader.items())
        while heap:
            _, stream, _, item, rest = heapq.heappop(heap)
            yield item
            await self._push(heap, stream, rest)

    async def _push(self, heap: list[Any], stream: str, rest: AsyncIterator[Item]) -> None:
        async for item in rest:
            if item.kept.number > self._positions.get(stream, 0):
                heapq.heappush(heap, (item.kept.at, stream, item.kept.number, item, rest))
                return

    def check_ends(self) -> None:
        """After all was read: beginnings and ends that are neither here nor in the base; holes."""
        damage = self._findings.damage
        there = {reader.stream: reader.last for reader in self._readers}
        for header in self._incarnation.vouched:
            if header.at <= self._base_us:
                continue  # the base has what it knew of
            damage += [
                f"stream {stream} ends with batch {there.get(stream, 0)}, and there were {number}"
                for stream, number in header.known.items()
                if there.get(stream, 0) < number > self._positions.get(stream, 0)
            ]
        for reader in self._readers:
            position = self._positions.get(reader.stream, 0)
            if reader.first > position + 1:
                damage.append(
                    f"stream {reader.stream} begins with batch {reader.first}: segments before it"
                    " are missing"
                )
            damage += [
                f"stream {reader.stream} lacks batches {hole.first} to {hole.last}: it was away"
                for hole in reader.holes
                if hole.last > position
            ]


def positions_of(records: Mapping[str, Json]) -> dict[str, int]:
    """How far a store is in each stream, by its records of kind `archive`."""
    return {
        stream: int(value["number"])
        for stream, value in records.items()
        if isinstance(value, dict) and "number" in value
    }


def content_of(item: Item) -> Batch:
    """The batch."""
    return batch_of(item.kept.at, item.kept.appends, item.kept.changes)


class Moment(NamedTuple):
    """Where an entry is."""

    incarnation: str
    at: int
    """Of the batch that holds it, microseconds on the store's clock."""


async def find_entry(place: Place, run_id: str, seq: int, *, keys: Sequence[Any] = ()) -> Moment:
    """The moment of a run's entry, in the newest incarnation that has it. Raises NotFound."""
    for one in await read_incarnations(place):
        merged = Merged(place, one, positions={}, keys=keys, findings=Findings())
        found = None
        async for item in merged.items():
            if item.is_known and any(
                append.run_id == run_id and entry.seq == seq
                for append in content_of(item).appends
                for entry in append.entries
            ):
                found = item.kept.at
        if found is not None:
            return Moment(one.name, found)
    raise NotFound(f"entry {seq} of run {run_id} is not in the stream archive")


def check_base(one: Incarnation, *, base: str, base_at: int, place: Place) -> None:
    """Whether segments can go on from a base of incarnation `base`. Raises StoreDamaged."""
    has_base = base == one.name
    if not one.is_whole and not has_base:
        raise StoreDamaged(
            "the store held something before it was archived",
            hint="restore a backup that was made since, with the archive on top",
        )
    if one.floor_us and not (has_base and base_at >= one.floor_us):
        raise StoreDamaged(
            f"{place.shown} alone is not enough: it lacks what backups since"
            f" {stamp(one.floor_us)} hold",
            hint="restore a backup that was made since, with the archive on top",
        )


def along(digest: bytes, seq: int, known: Sequence[Entry]) -> list[Entry]:
    """The entries that go on after a head, one after another; of two the higher epoch's."""
    at: dict[int, list[Entry]] = {}
    for entry in known:
        at.setdefault(entry.seq, []).append(entry)
    story: list[Entry] = []
    while after := [each for each in at.get(seq + 1, ()) if chain(digest, each) == each.digest]:
        best = max(after, key=lambda each: each.epoch)
        story.append(best)
        seq, digest = best.seq, best.digest
    return story


def filled_in(entries: Sequence[Entry], blobs: Mapping[bytes, bytes]) -> list[Entry]:
    """With large payloads in their places, as `Look.load` gives them."""
    return [
        entry._replace(payload=blobs.get(blob_digest(entry.payload) or b"", entry.payload))
        for entry in entries
    ]


class ArchiveCopy:
    """See engine.second_copy.SecondCopy: a run as the archive knows it from its first entry on."""

    name = "the stream archive"

    def __init__(self, place: Place, keys: Callable[[], Sequence[Any]]) -> None:
        self._place = place
        self._keys = keys

    async def entries(self, run_id: str) -> Sequence[Entry]:
        """Reads all of it; nothing when its beginning was let go. Raises WrongKey, StoreError."""
        known: list[Entry] = []
        blobs: dict[bytes, bytes] = {}
        for one in await read_incarnations(self._place):
            merged = Merged(self._place, one, positions={}, keys=self._keys(), findings=Findings())
            async for item in merged.items():
                batch = content_of(item)
                for append in batch.appends:
                    if append.run_id == run_id:
                        known += append.entries
                for change in batch.every_change():
                    if isinstance(change, PutBlob) and change.run_id == run_id:
                        blobs[change.digest] = change.content
        return filled_in(along(GENESIS, 0, known), blobs)
