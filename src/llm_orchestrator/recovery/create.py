"""Making a backup: one consistent cut of a live store, in one file, and in a second place.

    the store's lock -> room on the disk -> dump into a scratch folder beside the target -> pack
    -> flushed -> its final name -> uploaded -> a record of the store (`backup/last`)

What has a final name is whole. Until then everything stands in a scratch folder (`.making-...`),
which a failure removes, and after a crash the next call: its maker holds a lock on it (flock), that
ends with the process. A failed upload leaves the file where it is, and raises NotUploaded.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from llm_orchestrator.clock import Clock
from llm_orchestrator.errors import NotUploaded, OperatorError, StoreError, StoreFull
from llm_orchestrator.model import MICROSECONDS, Json, Workflow
from llm_orchestrator.recovery import pack
from llm_orchestrator.recovery.frames import COMPRESSIONS, GZIP, read_recipients
from llm_orchestrator.recovery.lock import locked
from llm_orchestrator.recovery.manifest import ENDINGS, PREFIX, Manifest
from llm_orchestrator.recovery.places import Place
from llm_orchestrator.recovery.places_folder import name_file
from llm_orchestrator.recovery.report import report
from llm_orchestrator.recovery.scratch import in_thread, scratch
from llm_orchestrator.store.base import Batch, Database, PutRecord
from llm_orchestrator.store.copying import Advance, Copier, Cut

BACKUP = "backup"
LAST = "last"
HEADS_MAX = 200_000
"""So many unfinished runs are named in a manifest; the dump has them all."""
_ROOM_BYTES = pack.ROOM_BYTES
_RECORD_TRIES = 5
Watch = Callable[[str, int, int], None]
"""Told now and then: `dump`, `pack` or `upload`, bytes done, bytes in all (0: not known)."""


@dataclass(frozen=True, slots=True)
class Options:
    """How a backup is made."""

    folder: Path
    """Where the file is made, and stays."""
    program: str
    """This program's version."""
    host: str
    compression: str = GZIP
    recipients: Sequence[str] = ()
    """Public keys of age; lines of key files. One is enough, two are better: `warnings`."""
    bytes_per_s: int = 0
    """Bounds what is read of the live store (0: no bound)."""
    config: Mapping[str, Json] = field(default_factory=dict)
    """The configuration without secrets."""
    database: Mapping[str, Any] = field(default_factory=dict)
    """host, port, name."""
    watch: Watch = lambda _stage, _done, _total: None


class Made(NamedTuple):
    """A backup that was made."""

    manifest: Manifest
    file: Path
    size_bytes: int
    sha256: str
    place: str
    """Where else it is; "" when there is no second place."""
    warnings: Sequence[str]


async def create(
    copier: Copier, place: Place | None, options: Options, *, store: Database, clock: Clock
) -> Made:
    """Back up the store that `copier` copies; `store` is the same one, open to look and ask.

    Raises StoreLocked when another one is at it, StoreFull, ConfigError, StoreError: then there is
    nothing half-made. Raises NotUploaded when the file is made and only the place does not have it.
    """
    if options.compression not in COMPRESSIONS:
        raise StoreError(f"no such compression: {options.compression}")
    recipients = read_recipients(options.recipients)  # before any work is done
    async with locked(store, clock), scratch(options.folder) as folder:
        making = _Making(copier, options, store, clock=clock, folder=folder)
        made = await making.make(recipients)
        trouble = await making.upload(made, place) if place is not None else None
        if place is not None and trouble is None:
            made = made._replace(place=place.shown)
        made = made._replace(warnings=[*made.warnings, *await making.record(made)])
    if trouble is not None and place is not None:
        raise NotUploaded(
            f"{made.file} is made, but {place.shown} does not have it: {trouble.message}",
            hint=trouble.hint or "llmo backup check says more; the next backup goes there again",
        ) from trouble
    return made


class _Making:
    """One backup while it is made."""

    def __init__(
        self, copier: Copier, options: Options, store: Database, *, clock: Clock, folder: Path
    ) -> None:
        self._copier = copier
        self._options = options
        self._store = store
        self._clock = clock
        self._scratch = folder
        self._begun = clock.monotonic()
        self._begun_us = clock.now_us()

    async def make(self, recipients: Sequence[Any]) -> Made:
        """Up to the file under its final name."""
        options = self._options
        size = await self._copier.size()
        await asyncio.to_thread(_need_room, self._scratch, size, "a copy of the store")
        before = await self._store.shelf.workflows()
        dump, cut = await self._copier.dump(
            self._scratch, bytes_per_s=options.bytes_per_s, advance=self._advance("dump")
        )
        dump_bytes = await asyncio.to_thread(_size, dump)
        await asyncio.to_thread(_need_room, self._scratch, dump_bytes, "the packed file")
        ending = _ending(options.compression, is_sealed=bool(recipients))
        manifest = self._manifest(cut, dump, dump_bytes, recipients=len(recipients))
        flows = await self._definitions(before)
        warnings = _warnings(manifest, cut, flows, recipients=recipients)
        small = {**_definitions(flows), "config.json": _config(options.config)}
        small["report.txt"] = report(manifest, options.config, warnings).encode()
        file = self._scratch / f"packed{ending}"
        packed = await in_thread(
            pack.write,
            file,
            pack.Content(manifest, dump, small),
            compression=options.compression,
            recipients=recipients,
            advance=self._advance("pack"),
        )
        target = options.folder / f"{manifest.backup_id}{ending}"
        await asyncio.to_thread(_name, file, target)
        return Made(manifest, target, packed.size_bytes, packed.sha256, "", warnings)

    async def upload(self, made: Made, place: Place) -> OperatorError | None:
        """Into the second place; why not."""
        try:
            await place.put(made.file, made.file.name, advance=self._advance("upload"))
        except OperatorError as error:
            return error
        return None

    async def record(self, made: Made) -> list[str]:
        """In the store, where metrics and `doctor` find it; what went wrong with that.

        The backup is good whether the store can still be written or not.
        """
        value: dict[str, Json] = {
            "backup_id": made.manifest.backup_id,
            "at": self._store.clock.now_us(),
            "taken_at": made.manifest.taken_at,
            "size_bytes": made.size_bytes,
            "took_s": round(self._clock.monotonic() - self._begun, 3),
            "sha256": made.sha256,
            "file": str(made.file),
            "place": made.place,
            "encryption": made.manifest.encryption,
        }
        try:
            for _ in range(_RECORD_TRIES):
                _, version = await self._store.shelf.record(BACKUP, LAST)
                change = PutRecord(BACKUP, LAST, value, version)
                if not (await self._store.commit(Batch(changes=(change,)))).is_refused:
                    return []
        except StoreError as error:
            return [f"the store has no record of it: {error.message}"]
        return ["the store has no record of it: somebody else writes the same record"]

    async def _definitions(self, before: Sequence[Workflow]) -> list[Workflow]:
        """Those that were there before the cut and after it: so they are in the dump."""
        after = {
            (flow.name, flow.version, flow.digest) for flow in await self._store.shelf.workflows()
        }
        return [flow for flow in before if (flow.name, flow.version, flow.digest) in after]

    def _manifest(self, cut: Cut, dump: Path, dump_bytes: int, *, recipients: int) -> Manifest:
        options = self._options
        created_at, backup_id = _free_id(options.folder, self._begun_us)
        return Manifest.of(
            cut,
            backup_id=backup_id,
            program=options.program,
            created_at=created_at,
            host=options.host,
            duration_s=round(self._clock.monotonic() - self._begun, 3),
            store=self._copier.shown,
            dump=dump.name,
            dump_bytes=dump_bytes,
            heads=list(cut.heads[:HEADS_MAX]),
            encryption=f"age, {recipients} recipients" if recipients else "none",
            database=dict(options.database),
        )

    def _advance(self, stage: str) -> Advance:
        watch = self._options.watch
        return lambda done, total: watch(stage, done, total)


# -- members --------------------------------------------------------------------------------------


def _definitions(flows: Sequence[Workflow]) -> dict[str, bytes]:
    members = {}
    for flow in flows:
        name = re.sub(r"[^A-Za-z0-9._-]", "_", f"{flow.name}-{flow.version}").lstrip("._-")[:40]
        about = {
            "name": flow.name,
            "version": flow.version,
            "digest": flow.digest,
            "created_at": flow.created_at,
            "definition": json.loads(flow.definition),
        }
        content = json.dumps(about, indent=1, ensure_ascii=False).encode()
        members[f"definitions/{name or 'x'}-{flow.digest[:16]}.json"] = content
    return members


def _config(config: Mapping[str, Json]) -> bytes:
    return json.dumps(config, indent=1, ensure_ascii=False, default=str).encode() + b"\n"


def _warnings(
    manifest: Manifest, cut: Cut, flows: Sequence[Workflow], *, recipients: Sequence[Any]
) -> list[str]:
    found = []
    if len(recipients) == 1:
        found.append("one key alone opens it: whoever loses that key has no backup")
    if len(cut.heads) > len(manifest.heads):
        found.append(f"of {len(cut.heads)} unfinished runs, the manifest names {HEADS_MAX}")
    if len(flows) != cut.counts.get("workflows", len(flows)):
        found.append("workflows were registered meanwhile: the dump has them, definitions/ not all")
    return found


# -- the file and its name ------------------------------------------------------------------------


def _ending(compression: str, *, is_sealed: bool) -> str:
    base = ".tar.gz" if compression == GZIP else ".tar.zst"
    ending = f"{base}.age" if is_sealed else base
    assert ending in ENDINGS
    return ending


def _free_id(folder: Path, now_us: int) -> tuple[str, str]:
    """Moment and id: of now, or of the next second of which there is no backup in the folder."""
    second = now_us // MICROSECONDS
    while True:
        moment = datetime.fromtimestamp(second, UTC)
        backup_id = f"{PREFIX}{moment:%Y%m%d_%H%M%S}"
        if not any((folder / f"{backup_id}{ending}").exists() for ending in ENDINGS):
            return moment.isoformat().replace("+00:00", "Z"), backup_id
        second += 1


def _name(file: Path, target: Path) -> None:
    try:
        name_file(file, target)
    except OSError as error:
        raise pack.explained(error, target) from error


def _size(file: Path) -> int:
    return file.stat().st_size


def _need_room(folder: Path, size_bytes: int, what: str) -> None:
    free = shutil.disk_usage(folder).free
    if size_bytes + _ROOM_BYTES > free:
        raise StoreFull(
            f"{folder.parent} has room for {free} bytes; {what} may need {size_bytes}",
            hint="llmo backup prune, or another backup_dir",
        )
