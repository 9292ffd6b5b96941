"""Verifying a backup file: every byte of it, without restoring it.

    structure, every checksum, the seal (pack.py) -> the dump can be read (the copier's own check)
    -> the dump has the rows and the ends of journals that the manifest says (store/dumps.py)

Whoever changed the manifest together with its checksum is found by the last: the dump tells another
story. Nothing is changed anywhere; the dump is unpacked into a scratch folder and goes with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llm_orchestrator.errors import OperatorError, StoreDamaged
from llm_orchestrator.model import Json
from llm_orchestrator.recovery import pack
from llm_orchestrator.recovery.create import BACKUP, HEADS_MAX
from llm_orchestrator.recovery.manifest import Manifest, backup_id_of
from llm_orchestrator.recovery.scratch import in_thread, scratch
from llm_orchestrator.store.base import Batch, PutRecord, Store
from llm_orchestrator.store.copying import Advance, Copier
from llm_orchestrator.store.dumps import Facts, differences, read_postgres, read_sqlite

VERIFIED = "verified"
_REMEMBERED = 200
_SHOWN = 3
_TRIES = 3


class Verified(NamedTuple):
    """A backup file of which every byte was read and fits."""

    manifest: Manifest
    file: Path
    size_bytes: int
    members: Sequence[str]
    notes: Sequence[str]
    """What could not be compared here, and why."""


class Tools(NamedTuple):
    """What a dump is read with."""

    copier: Copier | None = None
    """Of the dump's kind, its own check is asked too; another kind's is of no use."""
    pg_restore: str = "pg_restore"


async def verify(
    file: Path,
    *,
    keys: Sequence[Any] = (),
    folder: Path | None = None,
    tools: Tools = Tools(),  # noqa: B008 (an immutable)
    advance: Advance | None = None,
) -> Verified:
    """See the module's docstring. `folder` has room for the dump; the file's own by default.

    Raises StoreDamaged naming what is wrong and where, WrongKey, NotFound, StoreFull.
    """
    async with unpacked(file, keys=keys, folder=folder, tools=tools, advance=advance) as (done, _):
        return done


@contextlib.asynccontextmanager
async def unpacked(
    file: Path,
    *,
    keys: Sequence[Any] = (),
    folder: Path | None = None,
    tools: Tools = Tools(),  # noqa: B008 (an immutable)
    advance: Advance | None = None,
) -> AsyncIterator[tuple[Verified, Path]]:
    """Verify, and keep the dump for as long as the block lasts: for a restore, for a proof."""
    async with scratch(folder or file.parent) as made:
        read = await in_thread(pack.read, file, keys=keys, into=made, advance=advance)
        manifest, dump = read.manifest, read.dump
        assert dump is not None
        _check_name(file, manifest)
        notes = await _check_dump(file, manifest, dump, tools=tools)
        size = (await asyncio.to_thread(file.stat)).st_size
        yield Verified(manifest, file, size, read.members, notes), dump


def _check_name(file: Path, manifest: Manifest) -> None:
    """A name of ours must be the manifest's; any other name is its owner's affair."""
    name = backup_id_of(file.name)
    if name is not None and name != manifest.backup_id:
        raise StoreDamaged(
            f"{file.name} holds {manifest.backup_id}: it was given another backup's name",
            hint=f"rename it to {manifest.backup_id}",
        )


async def _check_dump(file: Path, manifest: Manifest, dump: Path, *, tools: Tools) -> list[str]:
    notes = []
    if tools.copier is not None and tools.copier.kind == manifest.kind:
        why = await tools.copier.check_dump(dump)
        if why:
            raise StoreDamaged(f"{file.name} is damaged: its dump cannot be read: {why}")
    else:
        notes.append(f"there is no {manifest.kind} here: its own check was left out")
    try:
        facts = await asyncio.to_thread(_facts, manifest, dump, tools.pg_restore)
    except OperatorError as error:
        raise StoreDamaged(f"{file.name} is damaged: {error.message}", hint=error.hint) from error
    if facts is None:
        notes.append(f"{tools.pg_restore} is not here: rows and ends of journals were not compared")
        return notes
    is_every_head = len(manifest.heads) < HEADS_MAX
    flaws = differences(facts, manifest.cut(), is_every_head=is_every_head)
    if flaws:
        more = f", and {len(flaws) - _SHOWN} more" if len(flaws) > _SHOWN else ""
        raise StoreDamaged(
            f"{file.name} is damaged: its dump is not what its manifest says:"
            f" {'; '.join(flaws[:_SHOWN])}{more}"
        )
    return notes


def _facts(manifest: Manifest, dump: Path, pg_restore: str) -> Facts | None:
    """What the dump says; None when nothing here can read it."""
    if manifest.kind == "sqlite":
        return read_sqlite(dump, list(manifest.counts), manifest.heads)
    if manifest.kind != "postgresql":
        raise StoreDamaged(f"its dump is of no kind that we know: {manifest.kind!r}")
    program = shutil.which(pg_restore)
    return read_postgres(dump, manifest.heads, pg_restore=program) if program else None


async def record_verified(store: Store, backup_id: str, now_us: int) -> None:
    """Where lists find it: `backup/verified`, with when each of the last ones was verified.

    Raises StoreError. When somebody else writes it at the same time, ours may not be there.
    """
    for _ in range(_TRIES):
        value, version = await store.shelf.record(BACKUP, VERIFIED)
        known = value.get("all") if isinstance(value, dict) else None
        verified: dict[str, Json] = {
            **(known if isinstance(known, dict) else {}),
            backup_id: now_us,
        }
        kept = dict(sorted(verified.items())[-_REMEMBERED:])
        change = PutRecord(
            BACKUP, VERIFIED, {"backup_id": backup_id, "at": now_us, "all": kept}, version
        )
        if not (await store.commit(Batch(changes=(change,)))).is_refused:
            return
