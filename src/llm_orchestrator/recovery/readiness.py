"""What would be lost now, and what has been proved: the numbers behind `llmo dr status`.

One `Exposure` for each mechanism that keeps a second copy: if the store were gone now, how
much acknowledged work would this mechanism alone not bring back. Ages are on the store's clock.
The scorecard is the rule 3-2-1-1-0: three copies, two kinds of media, one elsewhere, one that
nobody can change, no error in the last proof.

Reads only. What cannot be known is None, never a guess.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from llm_orchestrator.errors import ConfigError
from llm_orchestrator.model import MICROSECONDS, Json, Usage
from llm_orchestrator.recovery.create import BACKUP, LAST
from llm_orchestrator.recovery.prove import DISPROVED, PROVED
from llm_orchestrator.recovery.stream_heal import base_from
from llm_orchestrator.recovery.unarchived import BEGIN, KIND
from llm_orchestrator.store.base import Database, RunFilter
from llm_orchestrator.store.journal import decode
from llm_orchestrator.store.statistics import Standby

RUNS_MAX = 2_000
"""So many runs are read for what they have spent; beyond it the sum is a lower bound."""
CLASSES = (
    "application_crash",
    "database_connection_loss",
    "database_crash",
    "database_failover",
    "network_partition",
    "data_corruption",
    "backup_restore",
    "multi_region_failover",
)


_RECEIVERS = ("barman", "pg_receivewal")


class Exposure(NamedTuple):
    """What one mechanism would not bring back."""

    mechanism: str
    """`replica`, `archive`, `wal` or `backup`."""
    seconds: float | None
    """None: there is no such copy."""
    entries: int | None = None
    runs: int | None = None
    usd: float | None = None
    is_at_least: bool = False
    """True when `usd` is a lower bound."""
    detail: str = ""


class Point(NamedTuple):
    """A line of the scorecard."""

    name: str
    is_met: bool
    detail: str


@dataclass(frozen=True, slots=True)
class Backups:
    """The records about backups."""

    last: Mapping[str, Json]
    proved: Mapping[str, Json]
    disproved: Mapping[str, Json]

    def age_s(self, now_us: int) -> float | None:
        """How old the cut of the last backup is."""
        return _age(self.last.get("taken_at"), now_us)

    def proof_age_s(self, now_us: int) -> float | None:
        """How long ago one was proved."""
        return _age(self.proved.get("at"), now_us)


def _age(at: Json, now_us: int) -> float | None:
    return max(0.0, (now_us - at) / MICROSECONDS) if isinstance(at, int) else None


async def read_backups(store: Database) -> Backups:
    """What the store knows of its backups. Raises StoreError."""
    records = await store.shelf.records(BACKUP)
    last, proved, disproved = (records.get(key) or {} for key in (LAST, PROVED, DISPROVED))
    return Backups(last, proved, disproved)


async def backup_exposure(store: Database, backups: Backups, now_us: int) -> Exposure:
    """What was done since the last backup's cut."""
    since = backups.last.get("taken_at")
    if not isinstance(since, int):
        return Exposure("backup", None, detail="there is no backup: llmo backup create")
    found = await done_since(store, since, now_us)
    return found._replace(detail=str(backups.last.get("backup_id", "")))


async def done_since(store: Database, since: int, now_us: int) -> Exposure:
    """What a store that is put back to `since` would not have. Raises StoreError."""
    runs = await store.look.runs(RunFilter(since=since, limit=RUNS_MAX))
    moved = {run.run_id for run in runs} | set(await store.look.unfinished())
    usage, entries = Usage(), 0
    some = sorted(moved)[:RUNS_MAX]
    for start in range(0, len(some), 50):
        for journal in (await store.look.load(some[start : start + 50])).values():
            for entry in journal.entries:
                if entry.recorded_at > since:
                    entries += 1
                    data = decode(entry.payload)
                    usage += Usage.from_json(data.get("usage") or {})
    return Exposure(
        "backup",
        _age(since, now_us),
        entries,
        len(runs),
        round(usage.cost_usd, 6),
        is_at_least=len(moved) > RUNS_MAX or len(runs) == RUNS_MAX,
    )


def receivers(standbys: Sequence[Standby] | None) -> list[Standby]:
    """Those that only keep the log: Barman's, or a pg_receivewal of somebody's."""
    return [one for one in standbys or () if one.name.startswith(_RECEIVERS)]


def followers(standbys: Sequence[Standby] | None) -> list[Standby]:
    """Servers that follow and could take over."""
    return [one for one in standbys or () if not one.name.startswith(_RECEIVERS)]


def replica_exposure(standbys: Sequence[Standby] | None) -> Exposure:
    """What the best of the servers that follow does not have on its disk."""
    return _stream("replica", followers(standbys), "no server follows this one")


def wal_exposure(standbys: Sequence[Standby] | None) -> Exposure:
    """What the best of those that keep the log does not have on its disk."""
    return _stream("wal", receivers(standbys), "nobody keeps this server's log")


def _stream(mechanism: str, streams: Sequence[Standby], nobody: str) -> Exposure:
    if not streams:
        return Exposure(mechanism, None, detail=nobody)
    sync = [one for one in streams if one.is_sync]
    if sync:
        return Exposure(mechanism, 0.0, 0, 0, 0.0, detail=f"commits wait for {sync[0].name}")
    best = min(streams, key=lambda one: one.exposed_s)
    return Exposure(mechanism, best.exposed_s, detail=f"{best.name} follows, nobody waits for it")


async def archive_exposure(store: Database, now_us: int) -> Exposure:
    """What the stream archive does not have yet, as its writers last said. Raises StoreError."""
    records = await store.shelf.records(KIND)
    begun = records.get(BEGIN)
    if not isinstance(begun, dict) or begun.get("incarnation") != store.incarnation:
        return Exposure("archive", None, detail="this store is not archived: archive_place")
    writers = [
        value
        for value in records.values()
        if isinstance(value, dict) and "mode" in value and not value.get("is_ended")
    ]
    exposed_s = max((float(each.get("exposure_s") or 0) for each in writers), default=0.0)
    place = str(begun.get("place"))
    if needed := base_from(begun):
        backups = await read_backups(store)
        if int(backups.last.get("taken_at") or 0) < needed:
            return Exposure("archive", None, detail=f"{place} needs a backup made since")
    if any(each.get("has_hole") for each in writers):
        return Exposure("archive", None, detail=f"{place} was away: it has a hole")
    if any(each.get("is_degraded") for each in writers):
        return Exposure("archive", exposed_s, detail=f"{place} is away")
    if all(each.get("mode") == "sync" for each in writers):
        return Exposure("archive", 0.0, 0, 0, 0.0, detail=f"commits wait for {place}")
    return Exposure("archive", exposed_s, detail=f"{place} follows, nobody waits for it")


class Copies(NamedTuple):
    """Where else the work is, as the composition root knows."""

    standbys: int = 0
    backup_folder: bool = False
    backup_place: str = ""
    """The object store, if any."""
    is_locked: bool = False
    """Object lock: nobody can change or remove it for a time."""
    archive: str = ""
    """Where the stream archive is."""
    log: bool = False
    """Somebody else keeps the server's log (Barman)."""


def scorecard(copies: Copies, backups: Backups) -> list[Point]:
    """3-2-1-1-0."""
    has_backup = bool(backups.last)
    count = 1 + copies.standbys + bool(copies.archive) + copies.log
    count += (copies.backup_folder and has_backup) + bool(copies.backup_place and has_backup)
    media = {"database"}
    if (copies.backup_folder and has_backup) or (copies.archive and not _is_remote(copies.archive)):
        media.add("folder")
    if (copies.backup_place and has_backup) or _is_remote(copies.archive):
        media.add("object store")
    away = [name for name in (copies.backup_place if has_backup else "", copies.archive) if name]
    away = [name for name in away if _is_remote(name)]
    flaws = len(backups.disproved.get("flaws") or ()) if _is_newer(backups) else 0
    is_proved = bool(backups.proved) and not _is_newer(backups)
    locked = "object lock" if copies.is_locked else "no object lock"
    proof = f"{flaws} flaws in the last proof" if flaws else "the last proof found nothing wrong"
    return [
        Point("3 copies", count >= 3, f"{count}"),
        Point("2 media", len(media) >= 2, ", ".join(sorted(media))),
        Point("1 elsewhere", bool(away), ", ".join(away) or "everything is on this site"),
        Point("1 immutable", copies.is_locked, locked),
        Point("0 errors", is_proved, proof if is_proved or flaws else "no backup was ever proved"),
    ]


def _is_remote(place: str) -> bool:
    return place.startswith("s3://")


def _is_newer(backups: Backups) -> bool:
    """True when the last proof failed."""
    return int(backups.disproved.get("at") or 0) > int(backups.proved.get("at") or 0)


class Objective(BaseModel):
    """What is promised for one class of disasters."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rto_s: float = Field(gt=0)
    rpo_s: float = Field(ge=0)


DEFAULTS: Mapping[str, Objective] = {
    name: Objective(rto_s=rto, rpo_s=rpo)
    for name, (rto, rpo) in zip(
        CLASSES,
        ((30, 60), (120, 0), (120, 60), (120, 30), (60, 0), (120, 60), (600, 3600), (300, 60)),
        strict=True,
    )
}
"""The outer limits that this project inherits; a file may say stricter ones."""


def read_objectives(file: Path | None) -> Mapping[str, Objective]:
    """`dr-objectives.yaml`: `CLASS: {rto_s, rpo_s}`. Without a file the defaults.

    Raises ConfigError naming what is wrong.
    """
    if file is None:
        return DEFAULTS
    try:
        data = YAML(typ="safe", pure=True).load(file.read_text())
    except (OSError, YAMLError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{file} must map classes to rto_s and rpo_s")
    unknown = sorted(set(data) - set(CLASSES))
    if unknown:
        raise ConfigError(f"{file}: no such class: {unknown[0]}; there is: {', '.join(CLASSES)}")
    try:
        own = {name: Objective.model_validate(value) for name, value in data.items()}
    except ValueError as error:
        raise ConfigError(f"{file}: {error}") from error
    return {**DEFAULTS, **own}
