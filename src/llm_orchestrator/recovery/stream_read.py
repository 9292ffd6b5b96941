"""Reading the stream archive: which streams there are, and each one's batches with their ends.

A stream is read through its chain, not by its numbers: a segment counts if it goes on after a
digest that counts. So a flush that failed (its segment is cut short, or was written again under the
next number) is passed over, and a segment that was removed, swapped or edited is found and named.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from llm_orchestrator.errors import NotFound, StoreDamaged
from llm_orchestrator.recovery.places import Place
from llm_orchestrator.recovery.segments import (
    FOLDER,
    GENESIS,
    CutShort,
    Header,
    Hole,
    Kept,
    Read,
    SegmentReader,
    Told,
    stream_of,
)

_AHEAD = 8
"""Segments that are fetched at once."""


class Named(NamedTuple):
    """A segment that a place has."""

    number: int
    name: str
    size_bytes: int


class Item(NamedTuple):
    """A batch and what became of it."""

    stream: str
    kept: Kept
    told: Told | None
    """None: it landed whole and posted nothing. See `is_known`."""
    is_known: bool
    """False: nobody knows whether it landed."""


@dataclass(slots=True)
class Findings:
    """What was wrong, and what is only worth to be known."""

    damage: list[str] = field(default_factory=list)
    """Something is missing or was changed: what comes out is not all."""
    torn: list[str] = field(default_factory=list)
    """Ends that a crash left; nobody was told that anything is there."""


async def list_streams(place: Place) -> dict[str, list[Named]]:
    """Every stream's segments, by number."""
    found: dict[str, list[Named]] = {}
    for kept in await place.list(FOLDER):
        known = stream_of(kept.name)
        if known is not None:
            stream, number = known
            found.setdefault(stream, []).append(Named(number, kept.name, kept.size_bytes))
    for segments in found.values():
        segments.sort()
    return found


async def read_header(place: Place, segment: Named) -> Header | None:
    """A segment's header; None when it has none that can be read."""
    try:
        data = await place.peek(segment.name, 1 << 16)
        return SegmentReader(data, segment.name).header
    except (StoreDamaged, NotFound):
        return None


class StreamReader:
    """One stream, from its first segment to its end."""

    def __init__(
        self,
        place: Place,
        stream: str,
        segments: Sequence[Named],
        *,
        keys: Sequence[Any] = (),
        findings: Findings,
    ) -> None:
        self._place = place
        self.stream = stream
        self._segments = segments
        self._keys = keys
        self._findings = findings
        self.holes: list[Hole] = []
        self.is_ended = False
        """Its process ended in good order."""
        self.first = 0
        """The number of the first batch; 0 when there is none."""
        self.last = 0
        """Of the last one that is here, or of which it is known that it never came."""

    async def items(self) -> AsyncIterator[Item]:
        """Every batch, in order, as soon as the stream says what became of it."""
        open_: dict[int, Kept] = {}
        told: dict[int, Told] = {}
        settled = 0
        async for read in self._reads():
            frame = read.frame
            for kept in frame.kept:
                self.first = self.first or kept.number
                self.last = max(self.last, kept.number)
                open_[kept.number] = kept
            told.update((each.number, each) for each in frame.told)
            self.holes += frame.holes
            self.last = max([self.last, *(hole.last for hole in frame.holes)])
            self.is_ended = self.is_ended or frame.is_end
            settled = max(settled, frame.settled)
            for number in [number for number in open_ if number <= settled or number in told]:
                item = self._item(open_.pop(number), told.pop(number, None))
                if item is not None:
                    yield item
        for kept in open_.values():
            yield Item(self.stream, kept, None, False)

    def _item(self, kept: Kept, told: Told | None) -> Item | None:
        if told is None:
            return Item(self.stream, kept, None, True)
        return None if told.is_void else Item(self.stream, kept, told, told.is_landed)

    async def _reads(self) -> AsyncIterator[Read]:
        """Frames along the chain. What is wrong goes into the findings; then it goes on."""
        before: _Segment | None = None
        unread: list[StoreDamaged] = []
        async for segment, data in self._contents():
            try:
                after = self._open(segment, data)
            except StoreDamaged as error:
                unread.append(error)
                continue
            for read in self._joined(before, after, unread):
                yield read
            before, unread = after, []
        if before is not None:
            for read in before.reads:
                yield read
            if before.flaw is not None:
                self._findings.damage.append(before.flaw.message)
            elif before.torn:
                self._findings.torn.append(f"{before.where} ends in {before.torn} torn bytes")
        for flaw in unread:
            is_torn = isinstance(flaw, CutShort)
            (self._findings.torn if is_torn else self._findings.damage).append(flaw.message)

    def _joined(
        self, before: _Segment | None, after: _Segment, unread: Sequence[StoreDamaged]
    ) -> Sequence[Read]:
        """The frames of `before` that count, now that it is known with what the stream goes on."""
        previous = after.header.previous
        if before is None:
            if self._segments[0].number == 1 and previous != GENESIS:
                self._findings.damage.append(f"{after.where} is not the stream's first segment")
            return ()
        if before.header.previous == previous:
            return ()
        for count, read in enumerate(before.reads, 1):
            if read.digest == previous:
                return before.reads[:count]
        flaws = [flaw for flaw in (before.flaw, *unread) if flaw is not None]
        what = f"{after.where} does not go on where {before.where} ends: a segment between them is"
        what += " missing, or one of them was changed or exchanged"
        self._findings.damage += [flaw.message for flaw in flaws] or [what]
        return before.reads

    def _open(self, segment: Named, data: bytes) -> _Segment:
        where = f"segment {segment.number} of stream {self.stream}"
        reader = SegmentReader(data, where)
        header = reader.header
        if (header.stream, header.number) != (self.stream, segment.number):
            raise reader.damaged(f"it is segment {header.number} of {header.stream}, exchanged")
        reads: list[Read] = []
        flaw: StoreDamaged | None = None
        try:
            reads.extend(reader.frames(self._keys))
        except StoreDamaged as error:
            flaw = error
        return _Segment(header, where, reads, flaw, reader.torn)

    async def _contents(self) -> AsyncIterator[tuple[Named, bytes]]:
        """Each segment with its bytes; some are fetched ahead."""
        for start in range(0, len(self._segments), _AHEAD):
            some = self._segments[start : start + _AHEAD]
            found = await asyncio.gather(*(self._place.read(each.name) for each in some))
            for pair in zip(some, found, strict=True):
                yield pair


class _Segment(NamedTuple):
    """One that was read, as far as it can be."""

    header: Header
    where: str
    reads: list[Read]
    flaw: StoreDamaged | None
    torn: int
