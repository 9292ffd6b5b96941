"""A place that is a folder: a disk of this machine, or one that is mounted.

A file is written under another name, flushed to the disk, and only then given its own; the folder
is flushed too. Names that begin with a dot are ours and are never listed.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, ParamSpec, TypeVar

from llm_orchestrator.errors import (
    NotFound,
    OperatorError,
    Overtaken,
    Refused,
    StoreDamaged,
)
from llm_orchestrator.recovery.pack import explained
from llm_orchestrator.recovery.places import Kept
from llm_orchestrator.store.copying import Advance

_PIECE_BYTES = 1 << 20
_HIDDEN = "."
_PART = f"{_HIDDEN}part-"
_LEFT_S = 86_400.0
"""A part of which nobody has written anything for so long belongs to nobody."""
P = ParamSpec("P")
T = TypeVar("T")


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable. Blocks; raises OSError."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def name_file(made: Path, name: Path) -> None:
    """Give a flushed file its name, durable on return, if the name is free.

    Blocks. Raises FileExistsError, and OSError.
    """
    os.link(made, name)
    made.unlink()
    sync_folder(name.parent)


class FolderPlace:
    """See Place. The folder is made when it is first needed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def shown(self) -> str:
        return str(self._folder)

    @property
    def folder(self) -> Path:
        """Where it is."""
        return self._folder

    async def put(self, file: Path, name: str, *, advance: Advance | None = None) -> Kept:
        return await self._do(self._put, file, self._path(name), advance)

    async def create(self, name: str, content: bytes) -> None:
        await self._do(self._create, self._path(name), content)

    async def read(self, name: str) -> bytes:
        return await self._do(self._path(name).read_bytes)

    async def peek(self, name: str, size: int) -> bytes:
        def work() -> bytes:
            with path.open("rb") as file:
                return file.read(size)

        path = self._path(name)
        return await self._do(work)

    async def get(self, name: str, file: Path, *, advance: Advance | None = None) -> None:
        await self._do(_copy, self._path(name), file, advance)

    async def list(self, prefix: str = "") -> Sequence[Kept]:
        return await self._do(self._list, prefix)

    async def remove(self, name: str) -> None:
        def work() -> None:
            path.unlink(missing_ok=True)
            if path.parent.is_dir():
                sync_folder(path.parent)

        path = self._path(name)
        await self._do(work)

    async def check(self, *, is_exclusive: bool = True) -> str:
        name = f"{_HIDDEN}check-{os.getpid()}-{id(self)}"
        try:
            await self.create(name, b"1")
            try:
                flaw = await self._is_lying(name) if is_exclusive else ""
                return flaw or ("" if await self.read(name) == b"1" else "it reads other bytes")
            finally:
                await self.remove(name)
        except OperatorError as error:
            return error.message

    # -- how, in a thread ---------------------------------------------------------------------

    async def _is_lying(self, name: str) -> str:
        try:
            await self.create(name, b"2")
        except Overtaken:
            return ""
        return f"{self.shown} lets a file be made twice"

    def _path(self, name: str) -> Path:
        parts = name.split("/")
        if not all(parts) or {".", ".."} & set(parts) or "\0" in name:
            raise Refused(f"{name!r} is no name of a file in {self.shown}")
        return self._folder.joinpath(*parts)

    async def _do(self, work: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        try:
            return await asyncio.to_thread(work, *args, **options)
        except FileNotFoundError as error:
            raise NotFound(f"{error.filename} is not there") from error
        except OSError as error:
            raise explained(error, Path(error.filename or self._folder)) from error

    def _put(self, file: Path, target: Path, advance: Advance | None) -> Kept:
        self._make(target.parent)
        _copy(file, target, advance)
        return self._kept(target)

    def _create(self, target: Path, content: bytes) -> None:
        self._make(target.parent)
        made = made_beside(target)
        try:
            with made.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            name_file(made, target)
        except FileExistsError as error:
            raise Overtaken(f"{target} is there already", run_id="", epoch=0) from error
        finally:
            made.unlink(missing_ok=True)

    def _make(self, folder: Path) -> None:
        missing = [each for each in (folder, *folder.parents) if not each.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        for each in missing:
            sync_folder(each.parent)

    def _list(self, prefix: str) -> Sequence[Kept]:
        if not self._folder.is_dir():
            return []
        return sorted(
            kept
            for path in _files(self._folder)
            if (kept := self._kept(path)).name[:1] != _HIDDEN and kept.name.startswith(prefix)
        )

    def _kept(self, path: Path) -> Kept:
        about = path.stat()
        return Kept(path.relative_to(self._folder).as_posix(), about.st_size, about.st_mtime)


def _files(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.name.startswith(_HIDDEN):
            continue
        if path.is_dir():
            yield from _files(path)
        elif path.is_file():
            yield path


def made_beside(target: Path) -> Path:
    """A new, empty, hidden file in the folder of `target`. Blocks; raises OSError."""
    handle, name = tempfile.mkstemp(prefix=_PART, dir=target.parent)
    os.close(handle)
    return Path(name)


def _copy(source: Path, target: Path, advance: Advance | None) -> None:
    """The whole file or none, durable on return."""
    made = made_beside(target)
    try:
        _sweep(made)
        with source.open("rb") as given, made.open("wb") as taking:
            digest = _pour(given, taking, advance)
            taking.flush()
            os.fsync(taking.fileno())
        with made.open("rb") as again:
            if hashlib.file_digest(again, "sha256").digest() != digest:
                raise StoreDamaged(f"{target.parent} gives back other bytes than it was given")
        made.replace(target)
        sync_folder(target.parent)
    finally:
        made.unlink(missing_ok=True)


def _sweep(made: Path) -> None:
    """Remove what copies that were killed have left, by the folder's own clock."""
    now = made.stat().st_mtime
    for part in made.parent.glob(f"{_PART}*"):
        with contextlib.suppress(OSError):
            if now - part.stat().st_mtime > _LEFT_S:
                part.unlink()


def _pour(given: BinaryIO, taking: BinaryIO, advance: Advance | None) -> bytes:
    total, done, digest = os.fstat(given.fileno()).st_size, 0, hashlib.sha256()
    while piece := given.read(_PIECE_BYTES):
        taking.write(piece)
        digest.update(piece)
        done += len(piece)
        if advance is not None:
            advance(done, total)
    return digest.digest()
