"""Segments: what the stream archive is made of.

One stream per process life, in segments numbered from 1: `segments/STREAM/00000001`. A segment is

    MAGIC, then frames: head (8 bytes), body, digest (16 bytes)

where each digest covers the one before it, the head and the body. A head is the body's length and
a check of it: a length that was changed is damage, though it points behind the end. The first
frame's body is the header (JSON, for people too); it names the digest with which the segment before
it ended. So a stream is one chain: a byte that was changed, a frame or a segment that was removed,
moved or put in does not fit, and the reader says where.

The other bodies are one zstandard stream, flushed after each frame, so that small frames compress
as well as big ones; optionally each is sealed (AES-256-GCM; the key is the process life's own, in
the header, wrapped by age). Inside is msgpack: see `Frame`.

A frame that is cut short at the very end of a stream is what a crash leaves (so is one whose bytes
are not there yet, all zero): nobody was told that it is there. Anywhere else it is damage.
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

import zstandard

from llm_orchestrator.errors import StoreDamaged, WrongKey
from llm_orchestrator.recovery.sealing import Seal, SealedKey
from llm_orchestrator.store.batch_codec import from_bytes, to_bytes

MAGIC = b"LLMOSEG\x02"
FORMAT = 1
FOLDER = "segments/"
GENESIS = bytes(16)
_LENGTH = struct.Struct(">I")
_HEAD = 8
_DIGEST = 16
_NONCE = struct.Struct(">IQ")
FRAME_BYTES_MAX = 1 << 30
_LEVEL = 1


class Header(NamedTuple):
    """Whose stream this is, and where in it we are."""

    stream: str
    number: int
    """The segment's, from 1."""
    previous: bytes
    """The digest with which the segment before it ended; GENESIS for the first."""
    incarnation: str
    generation: int
    kind: str
    """The store's: `sqlite` or `postgresql`."""
    began_at: int
    """Since when the store has been archived, microseconds on its clock."""
    is_whole: bool
    """False: the store held something before it was archived. A base is needed."""
    key: str = ""
    """The stream's key, wrapped; "" when it is not sealed."""
    at: int = 0
    """When the stream began."""
    known: Mapping[str, int] = {}
    """Up to which batch other streams are there, for certain: so the last one vouches for the ends
    of those before it. Only in the first segment."""


class Told(NamedTuple):
    """What became of a batch, where that is not: all of it landed, and it posted nothing."""

    number: int
    is_landed: bool
    """False: nobody knows, unless `is_void`."""
    is_void: bool = False
    """It was never offered to the store."""
    refused: Sequence[str] = ()
    is_refused: bool = False
    posted: Sequence[int] = ()


class Kept(NamedTuple):
    """A batch, as `batch_codec.plain` gives it."""

    number: int
    at: int
    appends: Sequence[Any]
    changes: Sequence[Any] | None


class Hole(NamedTuple):
    """Batches that were committed and are not here: the archive was away for too long."""

    first: int
    last: int
    since: int
    until: int


class Frame(NamedTuple):
    """What is written at once."""

    settled: int
    """Every batch up to this number has ended, and whatever is not in `told` landed."""
    told: Sequence[Told]
    kept: Sequence[Kept]
    holes: Sequence[Hole] = ()
    is_end: bool = False
    """The process ended in good order: nothing comes after this."""


def segment_name(stream: str, number: int) -> str:
    """Where a segment is kept."""
    return f"{FOLDER}{stream}/{number:08d}"


def stream_of(name: str) -> tuple[str, int] | None:
    """The inverse; None for a name that is none of ours."""
    parts = name.removeprefix(FOLDER).split("/")
    if not name.startswith(FOLDER) or len(parts) != 2 or not parts[1].isdecimal():
        return None
    return parts[0], int(parts[1])


def frame_bytes(frame: Frame) -> bytes:
    """A frame's content, neither compressed nor sealed. Raises what no column takes."""
    return to_bytes(frame)


class SegmentWriter:
    """Makes one segment's bytes. Not thread-safe; one thread owns it."""

    def __init__(self, header: Header, seal: Seal | None = None) -> None:
        self.header = header
        self.digest = header.previous
        self.size = 0
        self._seal = seal
        self._frames = 0
        self._zstd = zstandard.ZstdCompressor(level=_LEVEL).compressobj()

    def begin(self) -> bytes:
        """The segment's first bytes."""
        fields = self.header._asdict()
        fields["previous"] = self.header.previous.hex()
        text = json.dumps({"format": FORMAT, **fields}, separators=(",", ":")).encode()
        return self._grown(MAGIC + self._framed(text))

    def add(self, content: bytes) -> bytes:
        """The next frame's bytes."""
        body = self._zstd.compress(content) + self._zstd.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
        if self._seal is not None:
            body = self._seal.close(self._nonce(), body, self.digest)
        return self._grown(self._framed(body))

    def _nonce(self) -> bytes:
        self._frames += 1
        return _NONCE.pack(self.header.number, self._frames)

    def _framed(self, body: bytes) -> bytes:
        head = _head(len(body))
        self.digest = _link(self.digest, head, body)
        return head + body + self.digest

    def _grown(self, data: bytes) -> bytes:
        self.size += len(data)
        return data


def _head(size: int) -> bytes:
    length = _LENGTH.pack(size)
    return length + blake2b(length, digest_size=_HEAD - _LENGTH.size).digest()


def _link(previous: bytes, head: bytes, body: bytes) -> bytes:
    return blake2b(b"".join((previous, head, body)), digest_size=_DIGEST).digest()


# -- reading --------------------------------------------------------------------------------------


class Read(NamedTuple):
    """A frame, and the digest behind it."""

    frame: Frame
    digest: bytes


class CutShort(StoreDamaged):
    """Not even its header is whole: made, and never written."""


class SegmentReader:
    """Reads one segment. Raises StoreDamaged, which names it.

    `where` is how messages call it. `torn` is how many bytes at the end are no whole frame, once
    everything before them has been read; whether that is damage depends on what comes after.
    """

    def __init__(self, data: bytes, where: str) -> None:
        self._data = data
        self.where = where
        self.torn = 0
        self.digest = GENESIS
        self._at = len(MAGIC)
        if len(data) < len(MAGIC):
            raise CutShort(f"{where}: its header is cut short")
        if not data.startswith(MAGIC):
            raise self.damaged("it is no segment, or its first bytes are damaged")
        self.header = self._header()

    def damaged(self, what: str) -> StoreDamaged:
        """An error that names the segment."""
        return StoreDamaged(f"{self.where}: {what}")

    def frames(self, keys: Sequence[Any] = ()) -> Iterator[Read]:
        """Every whole frame, in order. `keys`: of age, for a sealed one. Raises WrongKey."""
        seal = self._unseal(keys)
        zstd = zstandard.ZstdDecompressor().decompressobj()
        number = 0
        while True:
            before = self.digest
            body = self._next()
            if body is None:
                return
            number += 1
            try:
                if seal is not None:
                    body = seal.open(_NONCE.pack(self.header.number, number), body, before)
                yield Read(_frame_of(from_bytes(zstd.decompress(body))), self.digest)
            except (zstandard.ZstdError, StoreDamaged, TypeError, ValueError) as error:
                raise self.damaged(f"frame {number} makes no sense: {error}") from error

    def _unseal(self, keys: Sequence[Any]) -> Seal | None:
        if not self.header.key:
            return None
        try:
            return SealedKey(base64.b64decode(self.header.key)).open(keys)
        except WrongKey as error:
            raise WrongKey(f"{self.where}: {error.message}", hint=error.hint) from error

    def _header(self) -> Header:
        body = self._next(is_header=True)
        if body is None:
            raise CutShort(f"{self.where}: its header is cut short")
        try:
            fields = json.loads(body)
            form = fields.pop("format")
            if form > FORMAT:
                raise self.damaged(f"a newer version wrote it (layout {form})")
            fields["previous"] = bytes.fromhex(fields["previous"])
            return Header(**fields)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise self.damaged(f"its header makes no sense: {error}") from error

    def _next(self, *, is_header: bool = False) -> bytes | None:
        """The next body, its digest checked; None at the end (see `torn`)."""
        start = self._at + _HEAD
        left = len(self._data) - self._at
        if left == 0:
            return None
        head = self._data[self._at : start]
        if len(head) < _HEAD or (head == bytes(_HEAD) and not any(self._data[start:])):
            self.torn = left
            return None
        size = _LENGTH.unpack_from(head)[0]
        if head != _head(size):
            raise self.damaged(f"the length at byte {self._at} is damaged")
        end = start + size
        if len(self._data) < end + _DIGEST:
            self.torn = left
            return None
        body = self._data[start:end]
        previous = self.digest
        if is_header:
            previous = _previous(body)
        digest = _link(previous, head, body)
        if digest != self._data[end : end + _DIGEST]:
            if len(self._data) > end + _DIGEST or is_header:
                raise self.damaged(f"what stands at byte {self._at} does not fit its digest")
            self.torn = left
            return None
        self._at, self.digest = end + _DIGEST, digest
        return body


def _previous(body: bytes) -> bytes:
    try:
        return bytes.fromhex(json.loads(body)["previous"])
    except (ValueError, TypeError, KeyError):
        return GENESIS


def _frame_of(row: Sequence[Any]) -> Frame:
    settled, told, kept, holes, is_end = row
    return Frame(
        settled,
        [Told._make(each) for each in told],
        [Kept._make(each) for each in kept],
        [Hole._make(each) for each in holes],
        is_end,
    )
