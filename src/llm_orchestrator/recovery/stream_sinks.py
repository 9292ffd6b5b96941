"""Where segments go: appended to in a folder, or one object per flush.

Both work in a thread of their own (compressing and waiting for disks leaves the event loop alone)
and both have one rule: what was not acknowledged is written again, in a segment of its own, whose
header says after which digest it goes on. So a flush that failed, or of which nobody knows, can
never be mistaken for one that counts.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from llm_orchestrator.errors import Overtaken, StoreUnavailable
from llm_orchestrator.recovery.pack import explained
from llm_orchestrator.recovery.places import Place
from llm_orchestrator.recovery.places_folder import FolderPlace, sync_folder
from llm_orchestrator.recovery.sealing import Seal
from llm_orchestrator.recovery.segments import GENESIS, Header, SegmentWriter, segment_name
from llm_orchestrator.store.sqlite_thread import DatabaseThread

SEGMENT_BYTES = 4 << 20
"""A folder's segment is followed by another one once it is bigger."""
MakeHeader = Callable[[int, bytes], Header]
"""Given the segment's number and the digest before it."""


class Sink(Protocol):
    """Writes frames, one after the other."""

    segments: int
    """How many there are."""
    written_bytes: int

    async def write(self, content: bytes) -> None:
        """Make a frame durable. Raises StoreError; then write the same again."""
        ...

    async def close(self) -> None: ...


def make_sink(place: Place, make: MakeHeader, seal: Seal | None) -> Sink:
    """The one that fits the place."""
    if isinstance(place, FolderPlace):
        return FolderSink(place.folder, make, seal)
    return ObjectSink(place, make, seal)


class FolderSink:
    """See Sink. The file is made exclusively, and flushed after each frame."""

    def __init__(self, folder: Path, make: MakeHeader, seal: Seal | None) -> None:
        self._folder = folder
        self._make = make
        self._seal = seal
        self._thread: DatabaseThread | None = None
        self._file = -1
        self._writer: SegmentWriter | None = None
        self._digest = GENESIS
        self.segments = 0
        self.written_bytes = 0

    async def write(self, content: bytes) -> None:
        if self._thread is None:
            self._thread = DatabaseThread("archive-writer")
        try:
            await self._thread.submit(lambda: self._write(content))
        except OSError as error:
            path = Path(error.filename or self._folder)
            raise StoreUnavailable(f"the archive is away: {explained(error, path)}") from error

    def _write(self, content: bytes) -> None:
        """In the thread."""
        try:
            if self._writer is None or self._writer.size > SEGMENT_BYTES:
                self._end()
                self._begin()
            assert self._writer is not None
            self._put(self._writer.add(content))
            os.fdatasync(self._file)
        except BaseException:
            self._end()  # what is in it from here on does not count
            raise
        self._digest = self._writer.digest

    def _begin(self) -> None:
        from_digest = self._digest
        while True:
            writer = SegmentWriter(self._header(from_digest), self._seal)
            path = self._folder / segment_name(writer.header.stream, writer.header.number)
            self._make_folder(path.parent)
            self.segments += 1
            with contextlib.suppress(FileExistsError):  # of a try of ours that failed half-way
                self._file = os.open(
                    path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND, 0o600
                )
                break
        self._put(writer.begin())
        sync_folder(path.parent)
        self._writer = writer

    def _header(self, digest: bytes) -> Header:
        return self._make(self.segments + 1, digest)

    def _make_folder(self, folder: Path) -> None:
        missing = [each for each in (folder, *folder.parents) if not each.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        for each in missing:
            sync_folder(each.parent)

    def _put(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._file, view) :]
        self.written_bytes += len(data)

    def _end(self) -> None:
        if self._file >= 0:
            with contextlib.suppress(OSError):
                os.close(self._file)
        self._file, self._writer = -1, None

    async def close(self) -> None:
        if self._thread is not None:
            self._thread.submit(self._end)
            await asyncio.to_thread(self._thread.stop)
            self._thread = None


class ObjectSink:
    """See Sink. An object that was made cannot be made again: a stream has one writer."""

    def __init__(self, place: Place, make: MakeHeader, seal: Seal | None) -> None:
        self._place = place
        self._make = make
        self._seal = seal
        self._digest = GENESIS
        self.segments = 0
        self.written_bytes = 0

    async def write(self, content: bytes) -> None:
        writer = SegmentWriter(self._make(self.segments + 1, self._digest), self._seal)
        data = await asyncio.to_thread(lambda: writer.begin() + writer.add(content))
        self.segments += 1  # one that failed may be there, or come yet: its number is used up
        try:
            await self._place.create(segment_name(writer.header.stream, writer.header.number), data)
        except Overtaken as error:
            raise StoreUnavailable(f"somebody else writes our stream: {error.message}") from error
        self._digest = writer.digest
        self.written_bytes += len(data)

    async def close(self) -> None:
        """Nothing is open."""
