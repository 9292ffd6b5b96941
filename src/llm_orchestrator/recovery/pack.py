"""One backup file: a tar of members in a fixed order, written and read as a stream.

    metadata.json     first, so that whoever asks what a file is reads its beginning only
    database.*        the dump
    definitions/...   and the rest, small
    checksums.sha256  last: SHA-256 of every other member, made while they pass

Nothing of `metadata.json` is secret, but it goes where the rest goes: under the checksums, and in a
sealed file under the seal. There is no second file that says the same: it could say otherwise.

Reading takes the file for hostile. Only plain files with names that we give are read, none is
written but the dump, under a name of ours; sizes are bounded by the manifest and by the room that
there is. Any tar program can read what we write.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from llm_orchestrator.errors import (
    NotFound,
    OperatorError,
    StoreDamaged,
    StoreError,
    StoreFull,
    StoreReadOnly,
)
from llm_orchestrator.recovery.frames import Deflater, Inflater, Sink, opened, sealing
from llm_orchestrator.recovery.manifest import CHECKSUMS, METADATA, Manifest, read_manifest
from llm_orchestrator.store.copying import Advance

METADATA_BYTES_MAX = 64 << 20
SMALL_BYTES_MAX = 64 << 20
"""Of any member but the dump."""
SMALL_BYTES_IN_ALL_MAX = 4 << 30
ROOM_BYTES = 16 << 20
"""So much of a disk is left free."""
_BLOCK = tarfile.BLOCKSIZE
_PIECE_BYTES = 1 << 20
_DUMP_NAME = re.compile(r"database\.[a-z0-9]{1,16}")
_SMALL_NAME = re.compile(r"config\.json|report\.txt|definitions/[A-Za-z0-9][A-Za-z0-9._@-]{0,79}")


class Packed(NamedTuple):
    """A finished file."""

    size_bytes: int
    sha256: str
    """Hex, of the file as it is stored."""


@dataclass(slots=True)
class Stop:
    """Set from another thread, it ends work in a thread."""

    is_set: bool = False

    def check(self) -> None:
        """Raises InterruptedError once it is set."""
        if self.is_set:
            raise InterruptedError("stopped")


# -- writing --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Content:
    """What goes into a backup file."""

    manifest: Manifest
    dump: Path
    small: Mapping[str, bytes] = field(default_factory=dict)
    """Members but metadata, dump and checksums, by name."""


class _Hashing:
    """The file below everything, with its digest."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self._size = 0

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        self._size += len(data)
        return self._file.write(data)

    def packed(self) -> Packed:
        return Packed(self._size, self._hash.hexdigest())


class _TarWriter:
    """Appends members to a tar, keeping their checksums."""

    def __init__(self, out: Sink, created_at_s: int) -> None:
        self._out = out
        self._mtime = created_at_s
        self._sums: list[str] = []

    def add(self, name: str, size: int, pieces: Iterator[bytes]) -> None:
        """One member of exactly `size` bytes. Raises OSError when there are more or fewer."""
        info = tarfile.TarInfo(name)
        info.size, info.mtime, info.mode = size, self._mtime, 0o600
        self._out.write(info.tobuf(tarfile.GNU_FORMAT))
        digest, left = hashlib.sha256(), size
        for piece in pieces:
            digest.update(piece)
            left -= len(piece)
            self._out.write(piece)
        if left:
            raise OSError(f"{name} changed while it was packed")
        self._out.write(b"\0" * (-size % _BLOCK))
        self._sums.append(f"{digest.hexdigest()}  {name}\n")

    def add_bytes(self, name: str, content: bytes) -> None:
        """One small member."""
        self.add(name, len(content), iter((content,)))

    def end(self) -> None:
        """The checksums, and two empty blocks."""
        self.add_bytes(CHECKSUMS, "".join(self._sums).encode())
        self._out.write(b"\0" * 2 * _BLOCK)


def write(
    file: Path,
    content: Content,
    *,
    compression: str,
    recipients: Sequence[Any] = (),
    advance: Advance | None = None,
    stop: Stop | None = None,
) -> Packed:
    """Pack into a new file, durable on return (its folder is not). Blocks.

    Raises StoreFull, StoreReadOnly and StoreError; whoever calls removes what was begun.
    """
    try:
        with open(file, "xb", opener=_private) as raw:
            hashing = _Hashing(raw)
            with sealing(hashing, recipients) as sink:
                deflater = Deflater(sink, compression)
                _write_tar(deflater, content, _teller(advance, content.manifest.dump_bytes, stop))
                deflater.finish()
            raw.flush()
            os.fsync(raw.fileno())
    except OSError as error:
        raise explained(error, file) from error
    return hashing.packed()


def _private(path: str, flags: int) -> int:
    """What people asked of models is in it."""
    return os.open(path, flags, 0o600)


def _write_tar(out: Sink, content: Content, tell: Callable[[int], None]) -> None:
    manifest = content.manifest
    tar = _TarWriter(out, manifest.taken_at // 1_000_000)
    tar.add_bytes(METADATA, manifest.model_dump_json(indent=1).encode() + b"\n")
    with content.dump.open("rb") as dump:
        tar.add(manifest.dump, manifest.dump_bytes, _pieces(dump, tell))
    for name, small in content.small.items():
        if not _SMALL_NAME.fullmatch(name) or len(small) > SMALL_BYTES_MAX:
            raise OSError(f"{name!r} cannot be a member of a backup")
        tar.add_bytes(name, small)
    tar.end()


def _pieces(file: BinaryIO, tell: Callable[[int], None]) -> Iterator[bytes]:
    done = 0
    while piece := file.read(_PIECE_BYTES):
        done += len(piece)
        tell(done)
        yield piece


def _teller(advance: Advance | None, total: int, stop: Stop | None) -> Callable[[int], None]:
    def tell(done: int) -> None:
        if stop is not None:
            stop.check()
        if advance is not None:
            advance(done, total)

    return tell


# -- reading --------------------------------------------------------------------------------------


class Unpacked(NamedTuple):
    """A file that was read to its last byte, and whose every checksum fits."""

    manifest: Manifest
    dump: Path | None
    """Where it was put; None when it was only read."""
    members: Sequence[str]


def read_metadata(file: Path, keys: Sequence[Any] = ()) -> Manifest:
    """What a file says of itself, from its beginning alone: nothing is verified. Blocks.

    Raises NotFound, StoreDamaged, WrongKey.
    """
    try:
        with file.open("rb") as raw, opened(raw, file.name, keys) as source:
            return _first(source, file.name)[0]
    except OSError as error:
        raise explained(error, file) from error


def read_metadata_of(beginning: BinaryIO, name: str, keys: Sequence[Any] = ()) -> Manifest | None:
    """The same of a file's first bytes; None when it takes more of them.

    Raises StoreDamaged, WrongKey.
    """
    size = beginning.seek(0, os.SEEK_END)
    beginning.seek(0)
    with opened(beginning, name, keys) as source:
        try:
            return _first(source, name)[0]
        except StoreDamaged:
            if beginning.tell() >= size:  # it may only be that the rest is not here
                return None
            raise


def read(
    file: Path,
    *,
    keys: Sequence[Any] = (),
    into: Path | None = None,
    advance: Advance | None = None,
    stop: Stop | None = None,
) -> Unpacked:
    """Read a whole file, checking everything that it says of itself; its dump goes to `into`.

    `into` is a folder, or None to write nothing. Blocks. Raises StoreDamaged naming what is wrong
    and where, WrongKey, StoreFull; then nothing is left in `into`.
    """
    try:
        with file.open("rb") as raw, opened(raw, file.name, keys) as source:
            return _Reading(source, file.name, into).run(advance, stop)
    except OSError as error:
        raise explained(error, file) from error


class _Member(NamedTuple):
    name: str
    size: int


class _Reading:
    """One pass over the members."""

    def __init__(self, source: Inflater, name: str, into: Path | None) -> None:
        self._source = source
        self._name = name
        self._into = into
        self._sums: dict[str, str] = {}
        self._small_left = SMALL_BYTES_IN_ALL_MAX

    def run(self, advance: Advance | None, stop: Stop | None) -> Unpacked:
        manifest, content = _first(self._source, self._name)
        self._sums[METADATA] = hashlib.sha256(content).hexdigest()
        if not _DUMP_NAME.fullmatch(manifest.dump):
            raise self._source.damaged(f"{manifest.dump!r} is no name of a dump")
        tell = _teller(advance, manifest.dump_bytes, stop)
        dump = self._into / manifest.dump if self._into is not None else None
        try:
            self._dump(manifest, dump, tell)
            self._rest()
        except BaseException:
            if dump is not None:
                dump.unlink(missing_ok=True)
            raise
        return Unpacked(manifest, dump, tuple(self._sums))

    def _dump(self, manifest: Manifest, target: Path | None, tell: Callable[[int], None]) -> None:
        member = _header(self._source)
        if member is None or member != (manifest.dump, manifest.dump_bytes):
            found = "nothing" if member is None else f"{member.name} of {member.size} bytes"
            raise self._source.damaged(
                f"{manifest.dump} of {manifest.dump_bytes} bytes must come second, not {found}"
            )
        if target is None:
            self._pass(member, None, tell)
            return
        room = shutil.disk_usage(target.parent).free
        if member.size + ROOM_BYTES > room:
            raise StoreFull(
                f"{target.parent} has room for {room} bytes, the dump needs {member.size}"
            )
        with open(target, "xb", opener=_private) as file:
            self._pass(member, file, tell)

    def _rest(self) -> None:
        while (member := _header(self._source)) is not None:
            if member.name == CHECKSUMS:
                self._compare(self._content(member))
                break
            if not _SMALL_NAME.fullmatch(member.name) or member.name in self._sums:
                raise self._source.damaged(f"{member.name!r} does not belong there")
            self._small_left -= member.size
            if member.size > SMALL_BYTES_MAX or self._small_left < 0:
                raise self._source.damaged(f"{member.name} is too big ({member.size} bytes)")
            self._pass(member, None, lambda _: None)
        else:
            raise self._source.damaged(f"it has no {CHECKSUMS}")
        if self._source.read_exactly(2 * _BLOCK).strip(b"\0"):
            raise self._source.damaged(f"something follows {CHECKSUMS}")
        self._source.finish()

    def _pass(self, member: _Member, file: BinaryIO | None, tell: Callable[[int], None]) -> None:
        """Over a member's bytes, to its checksum."""
        digest, left = hashlib.sha256(), member.size
        while left:
            piece = self._source.read(min(left, _PIECE_BYTES))
            if not piece:
                raise self._source.damaged(f"it ends too early, in {member.name}")
            digest.update(piece)
            if file is not None:
                file.write(piece)
            left -= len(piece)
            tell(member.size - left)
        self._padding(member)
        self._sums[member.name] = digest.hexdigest()

    def _content(self, member: _Member) -> bytes:
        if member.size > SMALL_BYTES_MAX:
            raise self._source.damaged(f"{member.name} is too big ({member.size} bytes)")
        content = self._source.read_exactly(member.size)
        self._padding(member)
        return content

    def _padding(self, member: _Member) -> None:
        if self._source.read_exactly(-member.size % _BLOCK).strip(b"\0"):
            raise self._source.damaged(f"something follows {member.name}")

    def _compare(self, content: bytes) -> None:
        wanted: dict[str, str] = {}
        for line in content.decode("utf-8", "replace").splitlines():
            digest, _, name = line.partition("  ")
            wanted[name] = digest
        for name, digest in self._sums.items():
            if wanted.pop(name, "") != digest:
                raise self._source.damaged(f"{name} does not fit its checksum")
        if wanted:
            raise self._source.damaged(f"{next(iter(wanted))!r} is missing")


def _first(source: Inflater, name: str) -> tuple[Manifest, bytes]:
    """The manifest, which must come first."""
    member = _header(source)
    if member is None or member.name != METADATA:
        raise StoreDamaged(
            f"{name} is no backup of this program: {METADATA} must come first,"
            f" not {member.name if member else 'nothing'!r}"
        )
    if member.size > METADATA_BYTES_MAX:
        raise source.damaged(f"{METADATA} is too big ({member.size} bytes)")
    content = source.read_exactly(member.size)
    if source.read_exactly(-member.size % _BLOCK).strip(b"\0"):
        raise source.damaged(f"something follows {METADATA}")
    return read_manifest(content, name), content


def _header(source: Inflater) -> _Member | None:
    """The next member's header; None at the tar's end."""
    block = source.read_exactly(_BLOCK)
    if not block.strip(b"\0"):
        return None
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
    except (tarfile.HeaderError, UnicodeDecodeError) as error:
        raise source.damaged(f"a header of its tar is wrong ({error})") from error
    if info.type != tarfile.REGTYPE or info.linkname or info.size < 0:
        raise source.damaged(f"{info.name[:80]!r} is no plain file")
    return _Member(info.name, info.size)


def explained(error: OSError, file: Path) -> OperatorError:
    """An operating system's error, in our words."""
    if isinstance(error, FileNotFoundError):
        return NotFound(f"{file} is not there")
    where = file.parent
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return StoreFull(f"{where} has no room for {file.name}: {error.strerror}")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return StoreReadOnly(f"{where} does not let us write or read {file.name}")
    return StoreError(f"{file}: {error.strerror or error}")
