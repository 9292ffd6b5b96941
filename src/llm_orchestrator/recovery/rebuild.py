"""A store made anew out of the stream archive, alone or on top of a backup, on either database.

All streams are read at once, in the order of their batches' times. What is applied at a time is a
*unit*: one run's append, or a batch's own changes. A unit goes in when it fits: its predecessor is
the run's head, its records have the versions that it moves, its messages get the numbers that they
had. One that is there already is passed over (so a base may overlap); one that does not fit yet
waits for another stream. What nobody knows the end of (the last batches of a process that was
killed) comes last: if a known entry goes on after it, it had landed; at a fork the branch of the
higher epoch is taken. What was refused is left out. What never fits is a gap, and is named.

Everything goes through the target's own `commit`, with the time that it had: the same rows.
"""

from __future__ import annotations

import heapq
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from llm_orchestrator.errors import StoreDamaged
from llm_orchestrator.model import Entry
from llm_orchestrator.recovery.beyond import NEVER_BACK, Tail, tail_of
from llm_orchestrator.recovery.places import Place
from llm_orchestrator.recovery.segments import Header
from llm_orchestrator.recovery.stream_read import (
    Findings,
    Item,
    StreamReader,
    list_streams,
    read_header,
)
from llm_orchestrator.recovery.unarchived import BEGIN, KIND
from llm_orchestrator.store.audit import Audit
from llm_orchestrator.store.base import Append, Batch, Change, Database, Post, PutBlob, PutRecord
from llm_orchestrator.store.batch_codec import batch_of
from llm_orchestrator.store.journal import GENESIS, blob_digest, chain

AUDIT_HEAD = "audit"


class Point(NamedTuple):
    """Up to where: everything, a moment, or the batch that holds a run's entry."""

    until_us: int | None = None
    run_id: str = ""
    seq: int = 0


@dataclass(slots=True)
class Rebuilt:
    """What came of it."""

    tails: list[Tail] = field(default_factory=list)
    """What the archive knows of runs beyond the point."""
    generation: int = 0
    point_us: int = 0
    applied: int = 0
    passed_over: int = 0
    """Units that were there already."""
    dropped: int = 0
    """Units that were never acknowledged, and did not fit."""
    findings: Findings = field(default_factory=Findings)


class _Unit(NamedTuple):
    """What stands or falls together. `posted`: a message's number, 0 none, -1 not known."""

    at: int
    where: str
    is_known: bool
    append: Append | None
    changes: Sequence[Change]
    posted: Sequence[int]

    def batch(self) -> Batch:
        """It alone, without messages that had put nothing."""
        numbers = iter(self.posted)
        changes = tuple(
            each for each in self.changes if not isinstance(each, Post) or next(numbers) != 0
        )
        if self.append is None:
            return Batch(changes=changes, at=self.at)
        return Batch((self.append._replace(changes=changes),), at=self.at)


async def rebuild(
    place: Place,
    target: Database,
    *,
    point: Point | None = None,
    incarnation: str = "",
    keys: Sequence[Any] = (),
    may_miss: bool = False,
) -> Rebuilt:
    """Apply the archive to `target`: an empty store, or one that a backup was put into.

    Raises StoreDamaged when something is missing or does not fit, unless `may_miss`; WrongKey.
    """
    done = Rebuilt()
    reading = _Reading(place, keys, done)
    await reading.begin(target, incarnation)
    point = point or Point()
    until = point.until_us
    if point.run_id:
        until = await reading.moment_of(point)
    builder = _Builder(target, done, is_alone=reading.is_alone)
    beyond: list[Item] = []
    async for item in reading.items():
        if until is not None and item.kept.at > until:
            beyond.append(item)
        else:
            for unit in _units(item):
                await builder.offer(unit)
    lost = await builder.finish(has_cut=until is not None)
    reading.check_starts()
    done.findings.damage += lost
    if done.findings.damage and not may_miss:
        raise StoreDamaged(
            f"the stream archive is not whole: {'; '.join(done.findings.damage[:3])}",
            hint="restore a newer backup, or go on without what is missing",
        )
    if beyond:
        await _look_beyond(target, beyond, done)
    return done


# -- reading --------------------------------------------------------------------------------------


class _Reading:
    """The streams of one incarnation, merged."""

    def __init__(self, place: Place, keys: Sequence[Any], done: Rebuilt) -> None:
        self._place = place
        self._keys = keys
        self._done = done
        self._streams: dict[str, list[Any]] = {}
        self._kinds: dict[str, str] = {}
        self._positions: dict[str, int] = {}
        self._readers: list[StreamReader] = []

    @property
    def is_alone(self) -> bool:
        """True when there is one stream."""
        return len(self._streams) == 1

    async def begin(self, target: Database, incarnation: str) -> None:
        """Choose the streams, and where to begin in each."""
        records = await target.shelf.records(KIND)
        begun = records.get(BEGIN)
        base = str(begun["incarnation"]) if isinstance(begun, dict) else ""
        heads: dict[str, Header] = {}
        streams = await list_streams(self._place)
        for stream, segments in streams.items():
            found = [await read_header(self._place, each) for each in segments[:1]]
            if found[0] is not None:
                heads[stream] = found[0]
            elif len(segments) > 1:
                self._done.findings.damage.append(f"{segments[0].name} has no header")
        known = {head.incarnation for head in heads.values()}
        wanted = incarnation or base or (known.pop() if len(known) == 1 else "")
        if not wanted:
            raise StoreDamaged(
                f"{self._place.shown} holds the streams of {len(known)} stores, or of none:"
                f" {', '.join(sorted(known))}",
                hint="say which one, by its incarnation",
            )
        for stream, head in heads.items():
            self._done.generation = max(self._done.generation, head.generation)
            if head.incarnation == wanted:
                self._streams[stream] = streams[stream]
                self._kinds[stream] = head.kind
                if not head.is_whole and base != wanted:
                    raise StoreDamaged(
                        "the store held something before it was archived",
                        hint="restore a backup that was made since, with the archive on top",
                    )
        for stream, value in records.items():
            if isinstance(value, dict) and "number" in value:
                self._positions[stream] = int(value["number"])

    async def items(self) -> AsyncIterator[Item]:
        """All batches behind the base's positions, by time."""
        self._readers = []
        heap: list[tuple[int, str, int, Item, AsyncIterator[Item]]] = []
        for stream, segments in self._streams.items():
            reader = StreamReader(
                self._place, stream, segments, keys=self._keys, findings=self._done.findings
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

    async def moment_of(self, point: Point) -> int:
        """The time of the batch with an entry. Raises StoreDamaged when no stream has it."""
        found = None
        async for item in self.items():
            places = {
                (append.run_id, entry.seq)
                for append in _batch(item).appends
                for entry in append.entries
            }
            if item.is_known and (point.run_id, point.seq) in places:
                found = item.kept.at
        self._done.findings = Findings()
        if found is None:
            raise StoreDamaged(f"entry {point.seq} of run {point.run_id} is not in the archive")
        return found

    def check_starts(self) -> None:
        """Streams whose beginning is neither here nor in the base; and holes."""
        damage = self._done.findings.damage
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


def _batch(item: Item) -> Batch:
    return batch_of(item.kept.at, item.kept.appends, item.kept.changes)


def _units(item: Item) -> list[_Unit]:
    batch, told = _batch(item), item.told
    refused = set(told.refused) if told else set()
    numbers = list(told.posted) if told else []
    is_heard = item.is_known and len(numbers) == sum(
        isinstance(change, Post) for change in batch.every_change()
    )
    where = f"batch {item.kept.number} of stream {item.stream}"

    def taken(changes: Sequence[Change]) -> list[int]:
        count = sum(isinstance(change, Post) for change in changes)
        if not is_heard:
            return [-1] * count
        found, numbers[:count] = numbers[:count], []
        return found

    units = []
    for append in batch.appends:
        posted = taken(append.changes)
        if append.run_id not in refused:
            units.append(_Unit(batch.at, where, item.is_known, append, append.changes, posted))
    if batch.changes and not (told and told.is_refused):
        posted = taken(batch.changes)
        units.append(_Unit(batch.at, where, item.is_known, None, batch.changes, posted))
    return units


# -- applying -------------------------------------------------------------------------------------


class _Builder:
    """Puts units into the target, each when it fits."""

    def __init__(self, target: Database, done: Rebuilt, *, is_alone: bool) -> None:
        self._target = target
        self._is_lenient = is_alone  # a single stream is in order; no need to look at the mail
        self._done = done
        self._heads: dict[str, dict[int, bytes]] = {}
        self._inboxes: dict[str, int] = {}
        self._waiting: list[_Unit] = []
        self._unsure: list[_Unit] = []

    async def offer(self, unit: _Unit) -> None:
        """It is its turn by the clock."""
        if not unit.is_known:
            self._unsure.append(unit)
        elif await self._try(unit):
            await self._settle()
        else:
            self._waiting.append(unit)

    async def finish(self, *, has_cut: bool) -> list[str]:
        """No more comes. What of the known never fitted."""
        await self._settle()
        self._is_lenient = True
        await self._settle()
        while await self._one_unsure():
            await self._settle()
        self._done.dropped += len(self._unsure)
        if has_cut:  # they wait for what lies beyond the point
            return []
        return [
            f"{unit.where}: what comes before it is missing"
            + (f" (run {unit.append.run_id}, entry {unit.append.prev_seq})" if unit.append else "")
            for unit in self._waiting
        ]

    async def _settle(self) -> None:
        while self._waiting:
            left = [unit for unit in self._waiting if not await self._try(unit)]
            if len(left) == len(self._waiting):
                return
            self._waiting = left

    async def _one_unsure(self) -> bool:
        """The best of those that fit: what a known one goes on after, then the higher epoch."""
        wanted = {unit.append.prev_digest for unit in self._waiting if unit.append}
        taken = {
            (unit.append.run_id, unit.append.prev_seq) for unit in self._waiting if unit.append
        }

        def rank(unit: _Unit) -> tuple[bool, int, int]:
            last = unit.append.entries[-1] if unit.append and unit.append.entries else None
            return (
                last is None or last.digest not in wanted,
                -(last.epoch if last else 0),
                unit.at,
            )

        for unit in sorted(self._unsure, key=rank):
            append = unit.append
            is_rival = append is not None and (append.run_id, append.prev_seq) in taken
            if not is_rival and await self._try(unit):
                self._unsure.remove(unit)
                return True
        return False

    async def _try(self, unit: _Unit) -> bool:
        """True when it is in the target now."""
        if unit.append is not None and await self._is_there(unit.append):
            self._done.passed_over += 1
            return True
        fit = await self._fits(unit)
        if fit is None:
            self._done.passed_over += 1
            return True
        if not fit:
            return False
        receipt = await self._target.commit(unit.batch())
        if receipt.refused or receipt.is_refused:
            return False
        self._moved(unit, receipt.posted)
        self._done.applied += 1
        self._done.point_us = max(self._done.point_us, unit.at)
        return True

    async def _is_there(self, append: Append) -> bool:
        digests = await self._digests(append.run_id)
        last = append.entries[-1] if append.entries else None
        return last is not None and digests.get(last.seq) == last.digest

    async def _fits(self, unit: _Unit) -> bool | None:
        """None: its changes are there already."""
        append = unit.append
        if append is not None:
            digests = await self._digests(append.run_id)
            before = digests.get(append.prev_seq, GENESIS if not append.prev_seq else b"")
            if before != append.prev_digest or append.prev_seq + 1 in digests:
                return False
            seen = append.change.inbox_seen if append.change else 0
            if not self._is_lenient and seen > await self._inbox(append.run_id):
                return False  # another stream's message comes before it
        numbers = iter(unit.posted)
        more: dict[str, int] = {}
        for change in unit.changes:
            if isinstance(change, Post) and (number := next(numbers)) > 0:
                here = await self._inbox(change.run_id) + more.get(change.run_id, 0)
                if number <= here and append is None:
                    return None
                if number != here + 1:
                    return False
                more[change.run_id] = more.get(change.run_id, 0) + 1
            elif isinstance(change, PutRecord):
                _, version = await self._target.shelf.record(change.kind, change.key)
                if version > change.version and append is None:
                    return None
                if version != change.version:
                    return False
        return True

    async def _digests(self, run_id: str) -> dict[int, bytes]:
        if run_id not in self._heads:
            entries = await self._target.look.stored(run_id)
            self._heads[run_id] = {entry.seq: entry.digest for entry in entries}
        return self._heads[run_id]

    async def _inbox(self, run_id: str) -> int:
        if run_id not in self._inboxes:
            found = await self._target.look.inbox_seqs([run_id])
            self._inboxes[run_id] = found.get(run_id, 0)
        return self._inboxes[run_id]

    def _moved(self, unit: _Unit, posted: Sequence[int]) -> None:
        if unit.append is not None and unit.append.run_id in self._heads:
            digests = self._heads[unit.append.run_id]
            digests.update((entry.seq, entry.digest) for entry in unit.append.entries)
        for change in unit.changes:
            if isinstance(change, Post):
                self._inboxes.pop(change.run_id, None)
            elif not isinstance(change, PutRecord | PutBlob) and unit.append is None:
                self._heads.clear()  # runs may have been removed or mended


# -- what lies beyond the point -------------------------------------------------------------------


async def _look_beyond(target: Database, items: Sequence[Item], done: Rebuilt) -> None:
    """Runs' entries for reconciliation; what never goes back is carried over (law 10)."""
    entries: dict[str, list[Entry]] = {}
    blobs: dict[bytes, bytes] = {}
    units = [unit for item in items for unit in _units(item)]
    for unit in units:
        blobs.update(
            (each.digest, each.content) for each in unit.changes if isinstance(each, PutBlob)
        )
        if unit.append is not None:
            entries.setdefault(unit.append.run_id, []).extend(unit.append.entries)
    for run_id, known in entries.items():
        journal = (await target.look.load([run_id])).get(run_id)
        restored = journal.entries if journal else ()
        head = restored[-1].digest if restored else GENESIS
        whole = [
            entry._replace(payload=blobs.get(blob_digest(entry.payload) or b"", entry.payload))
            for entry in _along(head, len(restored), known)
        ]
        tail = tail_of(restored, [*restored, *whole], run_id)
        if tail is not None:
            done.tails.append(tail)
    await _carry(target, [change for unit in units if unit.is_known for change in unit.changes])


async def _carry(target: Database, changes: Sequence[Change]) -> None:
    """Records that never go back, as they were last, and the audit log."""
    last: dict[tuple[str, str], Any] = {}
    for change in changes:
        if isinstance(change, Audit):
            await target.commit(Batch(changes=(change,)))
        elif isinstance(change, PutRecord) and change.kind in (*NEVER_BACK, AUDIT_HEAD):
            last[change.kind, change.key] = change.value
    for (kind, key), value in last.items():
        _, version = await target.shelf.record(kind, key)
        if value is not None or version:
            await target.commit(Batch(changes=(PutRecord(kind, key, value, version),)))


def _along(digest: bytes, seq: int, known: Sequence[Entry]) -> list[Entry]:
    """The entries that go on after a head, one after another; of two the higher epoch's."""
    story: list[Entry] = []
    while True:
        after = [
            each for each in known if each.seq == seq + 1 and chain(digest, each) == each.digest
        ]
        if not after:
            return story
        best = max(after, key=lambda each: each.epoch)
        story.append(best)
        seq, digest = best.seq, best.digest
