"""Which backups there are: here and in the second place; one of them by any name; how they fare.

An id is a file's name without its ending. The moment in it is its maker's clock, in seconds, UTC.
Nothing is believed of a file but its name until somebody reads it.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from llm_orchestrator.errors import NotFound, OperatorError, StoreDamaged
from llm_orchestrator.model import MICROSECONDS, Json
from llm_orchestrator.recovery import pack
from llm_orchestrator.recovery.manifest import ENDINGS, PREFIX, Manifest, backup_id_of
from llm_orchestrator.recovery.places import Place
from llm_orchestrator.recovery.scratch import scratch
from llm_orchestrator.store.copying import Advance

LATEST = "latest"
_MOMENT = re.compile(re.escape(PREFIX) + r"(\d{8}_\d{6})")
_PEEK_BYTES = 256 << 10
_PEEK_BYTES_MAX = 128 << 20


@dataclass(frozen=True, slots=True)
class Item:
    """A backup: a file here, one in the second place, or both."""

    backup_id: str
    made_at_us: int
    """By its name; 0 when that says nothing."""
    size_bytes: int
    file: Path | None = None
    names: tuple[str, ...] = ()
    """In the second place."""
    is_sealed: bool = False
    is_proved: bool = False
    is_verified: bool = False

    @property
    def is_remote(self) -> bool:
        """True when the second place has it."""
        return bool(self.names)

    def to_json(self) -> dict[str, Json]:
        """For `--json`."""
        return {
            "backup_id": self.backup_id,
            "made_at": _iso(self.made_at_us),
            "size_bytes": self.size_bytes,
            "file": str(self.file) if self.file is not None else None,
            "is_remote": self.is_remote,
            "is_sealed": self.is_sealed,
            "is_proved": self.is_proved,
            "is_verified": self.is_verified,
        }


@dataclass(frozen=True, slots=True)
class Marks:
    """What the store remembers of its backups. `read_marks` makes it of records."""

    proved: frozenset[str] = frozenset()
    verified: frozenset[str] = frozenset()
    last_proved: str = ""
    last: Mapping[str, Json] = field(default_factory=dict)


def read_marks(records: Mapping[str, Json]) -> Marks:
    """Of `shelf.records("backup")`."""
    last, proved, verified = (
        value if isinstance(value := records.get(key), dict) else {}
        for key in ("last", "proved", "verified")
    )
    last_proved = str(proved.get("backup_id", ""))
    known, every = verified.get("all"), proved.get("all")
    return Marks(
        frozenset([last_proved, *(every if isinstance(every, dict) else ())]) - {""},
        frozenset(known if isinstance(known, dict) else ()),
        last_proved,
        last,
    )


def made_at_us(backup_id: str) -> int:
    """The moment in an id, microseconds since 1970; 0 when there is none."""
    found = _MOMENT.fullmatch(backup_id)
    try:
        moment = datetime.strptime(found[1] if found else "", "%Y%m%d_%H%M%S").replace(tzinfo=UTC)
    except ValueError:
        return 0
    return int(moment.timestamp()) * MICROSECONDS


def _iso(moment_us: int) -> str:
    return datetime.fromtimestamp(moment_us // MICROSECONDS, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass(frozen=True, slots=True)
class Catalogue:
    """The backups of one store. `place` is the second one, if there is one."""

    folder: Path
    place: Place | None = None
    marks: Marks = field(default_factory=Marks)
    open_place: Callable[[str], Place] | None = None
    """A place by `s3://bucket/prefix`, for a backup that is named by its address."""

    async def items(self, *, is_local_only: bool = False) -> list[Item]:
        """All of them, newest first. Raises StoreError when the place cannot be asked."""
        found: dict[str, Item] = {}
        for file, size in await asyncio.to_thread(_files, self.folder):
            self._add(found, file.name, size, file=file)
        if self.place is not None and not is_local_only:
            for kept in await self.place.list(PREFIX):
                self._add(found, kept.name, kept.size_bytes)
        return sorted(found.values(), key=lambda one: (one.made_at_us, one.backup_id), reverse=True)

    def _add(
        self, found: dict[str, Item], name: str, size: int, *, file: Path | None = None
    ) -> None:
        backup_id = backup_id_of(name)
        if backup_id is None or "/" in name:
            return
        known = found.get(backup_id)
        found[backup_id] = Item(
            backup_id,
            made_at_us(backup_id),
            known.size_bytes if known else size,
            known.file if known else file,
            (*(known.names if known else ()), *(() if file is not None else (name,))),
            name.endswith(".age"),
            backup_id in self.marks.proved,
            backup_id in self.marks.verified,
        )

    async def find(self, text: str) -> Item:
        """By id (whole, or the moment in it), file name, path, s3:// address, or `latest`.

        A path and an address need no name of ours. Raises NotFound, saying what there is.
        """
        if text.startswith("s3://"):
            return await self._by_address(text)
        if "/" in text or await asyncio.to_thread(Path(text).is_file):
            return await asyncio.to_thread(_by_path, Path(text))
        items = await self.items()
        if text == LATEST and items:
            return items[0]
        wanted = backup_id_of(text) or text
        for item in items:
            if wanted in (item.backup_id, item.backup_id.removeprefix(PREFIX)):
                return item
        there = f"the newest is {items[0].backup_id}" if items else "there is none at all"
        raise NotFound(f"there is no backup {text!r}: {there}", hint="llmo backup list")

    async def _by_address(self, url: str) -> Item:
        base, _, name = url.rpartition("/")
        if self.open_place is None or base in ("s3:/", "s3:"):
            raise NotFound(f"{url} names no file in a bucket")
        place = self.open_place(base)
        for kept in await place.list(name):
            if kept.name == name:
                backup_id = backup_id_of(name) or name
                moment = made_at_us(backup_id)
                return _Elsewhere(backup_id, moment, kept.size_bytes, None, (name,), place=place)
        raise NotFound(f"{url} is not there")

    @contextlib.asynccontextmanager
    async def fetched(self, item: Item, *, advance: Advance | None = None) -> AsyncIterator[Path]:
        """A local file of it: its own, or one that is fetched and goes afterwards."""
        if item.file is not None:
            yield item.file
            return
        async with scratch(self.folder) as made:
            file = made / item.names[0].rpartition("/")[2]
            await self._place(item).get(item.names[0], file, advance=advance)
            yield file

    async def show(self, item: Item, keys: Sequence[Any] = ()) -> Manifest:
        """What it says of itself, unverified; of one far away, only its beginning is fetched.

        Raises WrongKey, StoreDamaged, StoreError.
        """
        if item.file is not None:
            return await asyncio.to_thread(pack.read_metadata, item.file, keys)
        place, size = self._place(item), _PEEK_BYTES
        while True:
            beginning = io.BytesIO(await place.peek(item.names[0], size))
            found = await asyncio.to_thread(pack.read_metadata_of, beginning, item.names[0], keys)
            if found is not None:
                return found
            if size >= min(_PEEK_BYTES_MAX, item.size_bytes):
                raise StoreDamaged(f"{item.names[0]} is damaged: it says nothing of itself")
            size *= 8

    def _place(self, item: Item) -> Place:
        place = item.place if isinstance(item, _Elsewhere) else self.place
        if place is None:
            raise NotFound(f"{item.backup_id} is not here, and there is no second place")
        return place


@dataclass(frozen=True, slots=True)
class _Elsewhere(Item):
    """In a place that was named by its address."""

    place: Place | None = None


def _files(folder: Path) -> list[tuple[Path, int]]:
    try:
        found = [path for ending in ENDINGS for path in folder.glob(f"{PREFIX}*{ending}")]
        return [(path, path.stat().st_size) for path in found if path.is_file()]
    except OSError as error:
        raise pack.explained(error, folder / "a backup") from error


def _by_path(path: Path) -> Item:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise pack.explained(error, path) from error
    backup_id = backup_id_of(path.name) or path.name
    is_sealed = path.name.endswith(".age")
    return Item(backup_id, made_at_us(backup_id), size, path, is_sealed=is_sealed)


# -- how they fare --------------------------------------------------------------------------------


class Finding(NamedTuple):
    """One thing that was looked at."""

    name: str
    is_good: bool
    detail: str


@dataclass(frozen=True, slots=True)
class Limits:
    """When a backup is too old."""

    age_s_max: float
    proof_age_s_max: float = 0.0
    """0: no limit."""


async def check(
    catalogue: Catalogue,
    *,
    now_us: int,
    limits: Limits,
    keys: Sequence[Any] = (),
    more: Sequence[Finding] = (),
) -> list[Finding]:
    """Are there backups, young enough, in both places, and can we open them? Raises nothing.

    `more` is what others know (WAL, the stream archive, Barman); it is put behind.
    """
    found = []
    try:
        items = await catalogue.items()
    except OperatorError as error:
        found.append(Finding("second place", False, error.message))
        items = await catalogue.items(is_local_only=True)
    else:
        if catalogue.place is not None:
            flaw = await catalogue.place.check(is_exclusive=False)
            found.append(Finding("second place", not flaw, flaw or catalogue.place.shown))
    found.append(_check_age(items, now_us, limits.age_s_max))
    if items and catalogue.place is not None:
        is_there = items[0].is_remote
        detail = "it has the newest backup" if is_there else f"it lacks {items[0].backup_id}"
        found.append(Finding("newest in the second place", is_there, detail))
    if items:
        found.append(await _check_newest(catalogue, items[0], keys))
    if limits.proof_age_s_max:
        found.append(_check_proof(catalogue.marks, now_us, limits.proof_age_s_max))
    return [*found, *more]


def _check_age(items: Sequence[Item], now_us: int, age_s_max: float) -> Finding:
    if not items:
        return Finding("last backup", False, "there is none: llmo backup create")
    age_s = (now_us - items[0].made_at_us) / MICROSECONDS
    detail = f"{items[0].backup_id}, {age_s:.0f} s old, at most {age_s_max:.0f} s"
    return Finding("last backup", age_s <= age_s_max, detail)


def _check_proof(marks: Marks, now_us: int, age_s_max: float) -> Finding:
    if not marks.last_proved:
        return Finding("last proof", False, "none was ever proved: llmo backup prove latest")
    age_s = (now_us - made_at_us(marks.last_proved)) / MICROSECONDS
    detail = f"{marks.last_proved}, {age_s:.0f} s old, at most {age_s_max:.0f} s"
    return Finding("last proof", age_s <= age_s_max, detail)


async def _check_newest(catalogue: Catalogue, item: Item, keys: Sequence[Any]) -> Finding:
    """The newest can be opened with the keys that are here."""
    name = "key" if item.is_sealed else "newest readable"
    try:
        manifest = await catalogue.show(item, keys)
    except OperatorError as error:
        return Finding(name, False, error.message)
    return Finding(name, True, f"{item.backup_id} of {manifest.store} ({manifest.encryption})")
