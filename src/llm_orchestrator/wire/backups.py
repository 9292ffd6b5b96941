"""The backups of a configured store: what the command line and `llmo serve` do with them.

`recovery/` knows no configuration: here its parts are put together from the settings. Nothing here
opens the store: whoever calls has it open, or does without (a store that is gone is when one wants
to list its backups).
"""

from __future__ import annotations

import logging
import re
import socket
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from llm_orchestrator import __version__
from llm_orchestrator.clock import Clock
from llm_orchestrator.config import Config, resolve_secret
from llm_orchestrator.errors import ConfigError, OrchestratorError, StoreDamaged, StoreLocked
from llm_orchestrator.model import Entry, Json
from llm_orchestrator.recovery.catalogue import Catalogue, Item, Marks, read_marks
from llm_orchestrator.recovery.create import BACKUP, Made, Options, Watch, create
from llm_orchestrator.recovery.frames import read_keys
from llm_orchestrator.recovery.pack import explained
from llm_orchestrator.recovery.places import Place
from llm_orchestrator.recovery.places_folder import FolderPlace
from llm_orchestrator.recovery.prove import Proof, prove, record_proof
from llm_orchestrator.recovery.prune import Policy, Removed, execute, plan
from llm_orchestrator.recovery.restore import Base
from llm_orchestrator.recovery.tally import count_backup
from llm_orchestrator.recovery.verify import (
    Tools,
    Verified,
    record_verified,
    unpacked,
    verify,
)
from llm_orchestrator.store.base import Database
from llm_orchestrator.store.check import whole
from llm_orchestrator.store.copying import Advance, Copier
from llm_orchestrator.telemetry.redact import redact
from llm_orchestrator.wire.orchestrator import is_postgres, store_path
from llm_orchestrator.wire.recovery import make_checks

if TYPE_CHECKING:
    from llm_orchestrator.recovery.compact import Compacted

logger = logging.getLogger(__name__)
_SECRET = re.compile("key|token|secret|password", re.IGNORECASE)
_PASSWORD = re.compile(r"(//[^/@:]*):[^/@]*@")
_REMOTE = "s3://"


def make_copier(config: Config, clock: Clock, *, url: str = "") -> Copier:
    """What copies the store at `url` (by default the configured one)."""
    address = url or config.store_url
    if is_postgres(address):
        from llm_orchestrator.store.postgres_copy import PostgresCopier  # noqa: PLC0415 (slow)

        return PostgresCopier(config.direct_url or address, clock)
    from llm_orchestrator.store.sqlite_copy import SQLiteCopier  # noqa: PLC0415 (rarely needed)

    return SQLiteCopier(store_path(address), clock)


def make_place(spec: str, config: Config, clock: Clock) -> Place:
    """A folder, or `s3://BUCKET/PREFIX` with the configured keys. Raises ConfigError."""
    if not spec.startswith(_REMOTE):
        return FolderPlace(Path(spec).expanduser())
    from llm_orchestrator.recovery.places_s3 import S3Place  # noqa: PLC0415 (rarely needed)
    from llm_orchestrator.recovery.s3_client import S3Options, parse_s3_url  # noqa: PLC0415

    bucket, prefix = parse_s3_url(spec)
    options = S3Options(
        bucket,
        prefix,
        config.s3_endpoint_url,
        config.s3_region,
        _secret(config.s3_access_key),
        _secret(config.s3_secret_key),
        storage_class=config.s3_storage_class,
        object_lock_days=config.s3_object_lock_days,
        bytes_per_s=config.backup_bytes_per_s,
    )
    return S3Place(options, clock)


def _secret(reference: str) -> str:
    return resolve_secret(reference) if reference else ""


def policy_of(config: Config) -> Policy:
    """What stays, by the settings."""
    return Policy(
        config.backup_keep_days,
        config.backup_keep_last,
        config.backup_keep_daily,
        config.backup_keep_weekly,
        config.backup_keep_monthly,
    )


@dataclass(frozen=True)
class Backups:
    """See the module's docstring."""

    config: Config
    clock: Clock

    @cached_property
    def copier(self) -> Copier:
        """Of the configured store."""
        return make_copier(self.config, self.clock)

    @cached_property
    def place(self) -> Place | None:
        """The second place, if one is set."""
        spec = self.config.backup_place
        return make_place(spec, self.config, self.clock) if spec else None

    @cached_property
    def keys(self) -> list[Any]:
        """Age keys that open sealed files; none when none is set. Raises ConfigError."""
        reference = self.config.backup_identity
        return read_keys(resolve_secret(reference)) if reference else []

    async def catalogue(self, store: Database | None) -> Catalogue:
        """The backups that there are. `store` knows which were proved."""
        marks = read_marks(await store.shelf.records(BACKUP)) if store is not None else Marks()
        return Catalogue(self.config.backup_folder, self.place, marks, self._open)

    def _open(self, url: str) -> Place:
        return make_place(url, self.config, self.clock)

    # -- verbs --------------------------------------------------------------------------------

    async def create(self, store: Database, watch: Watch | None = None) -> Made:
        """Make one, and count how that ended in the store. Raises as recovery.create does."""
        error: OrchestratorError | None = None
        try:
            options = self._options()
            if watch is not None:
                options = replace(options, watch=watch)
            return await create(self.copier, self.place, options, store=store, clock=self.clock)
        except OrchestratorError as caught:
            error = caught
            raise
        finally:
            if not isinstance(error, StoreLocked):  # another one is at it, and will be counted
                await count_backup(store, error, store.clock.now_us())

    async def verify(
        self, catalogue: Catalogue, item: Item, *, store: Database | None, advance: Advance | None
    ) -> Verified:
        """Read every byte of it. Raises StoreDamaged, WrongKey, StoreError."""
        async with catalogue.fetched(item) as file:
            found = await verify(
                file,
                keys=self.keys,
                folder=self._scratch(),
                tools=Tools(self.copier),
                advance=advance,
            )
        if store is not None:
            await record_verified(store, item.backup_id, store.clock.now_us())
        return found

    async def prove(
        self, catalogue: Catalogue, item: Item, *, store: Database | None, advance: Advance | None
    ) -> Proof:
        """Restore it aside and try it; the result is recorded. Raises StoreError."""
        proof = Proof(item.backup_id)
        try:
            async with self.base(catalogue, item, advance=advance) as base:
                proof = await prove(
                    base.manifest,
                    base.dump,
                    copier=base.copier,
                    checks=make_checks(self.config, self.clock),
                    clock=self.clock,
                )
        except StoreDamaged as error:
            proof.flaws.append(error.message)
        if store is not None:
            await record_proof(store, proof, store.clock.now_us())
            if proof.is_good:
                await self._compact(catalogue, store)
        return proof

    async def compact(
        self, catalogue: Catalogue, store: Database, *, is_dry: bool = False
    ) -> Compacted:
        """Let go of segments that the oldest kept backup holds. Raises StoreError."""
        from llm_orchestrator.recovery.compact import Compacted, compact  # noqa: PLC0415
        from llm_orchestrator.wire.archive import archive_place  # noqa: PLC0415

        place = archive_place(self.config, self.clock)
        made = [item.made_at_us for item in await catalogue.items() if item.made_at_us]
        if not made or catalogue.marks.last_proved == "":
            return Compacted()
        return await compact(place, store, min(made), is_dry=is_dry)

    async def _compact(self, catalogue: Catalogue, store: Database) -> None:
        if not self.config.archive_place:
            return
        try:
            marks = read_marks(await store.shelf.records(BACKUP))
            gone = await self.compact(replace(catalogue, marks=marks), store)
        except OrchestratorError as error:  # the proof stands, whatever becomes of old segments
            logger.error("old segments are not let go: %s", error.message)
            return
        if gone.segments:
            logger.info("%d segments were let go, %d bytes", gone.segments, gone.size_bytes)

    @asynccontextmanager
    async def base(
        self, catalogue: Catalogue, item: Item, *, advance: Advance | None = None
    ) -> AsyncIterator[Base]:
        """Its dump, verified, for as long as the block lasts; and what can put it down."""
        async with (
            catalogue.fetched(item) as file,
            unpacked(
                file,
                keys=self.keys,
                folder=self._scratch(),
                tools=Tools(self.copier),
                advance=advance,
            ) as (found, dump),
        ):
            kind = found.manifest.kind
            if kind == self.copier.kind:
                yield Base(found.manifest, dump, self.copier)
                return
            if kind != "sqlite":
                raise ConfigError(
                    f"{item.backup_id} is of {kind}, and this store is none",
                    hint="--store postgresql://HOST/DATABASE names a server that can take it",
                )
            with tempfile.TemporaryDirectory(prefix="llmo-", dir=dump.parent) as folder:
                from llm_orchestrator.store.sqlite_copy import SQLiteCopier  # noqa: PLC0415

                copier = SQLiteCopier(Path(folder) / "copy.db", self.clock)
                yield Base(found.manifest, dump, copier)

    async def prune(
        self, catalogue: Catalogue, policy: Policy, *, now_us: int, is_dry: bool = False
    ) -> Removed:
        """Let go what the policy does not keep; with `is_dry` only say what that would be."""
        proved = catalogue.marks.last_proved
        verdicts = plan(await catalogue.items(), now_us=now_us, policy=policy, proved=proved)
        return Removed(verdicts, ()) if is_dry else await execute(verdicts, catalogue.place)

    # -- how ----------------------------------------------------------------------------------

    def _scratch(self) -> Path:
        """Where dumps are unpacked: where there must be room for backups anyway."""
        folder = self.config.backup_folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise explained(error, folder) from error
        return folder

    def _options(self) -> Options:
        config = self.config
        return Options(
            folder=config.backup_folder,
            program=__version__,
            host=socket.gethostname(),
            compression=config.backup_compression,
            recipients=recipients(config.backup_recipients),
            bytes_per_s=config.backup_bytes_per_s,
            config=public_settings(config),
            database=_database(config.store_url),
        )


class BackupCopy:
    """See engine.second_copy.SecondCopy: a run as the newest backup that has it knows it.

    Slow: each backup that is asked is verified and restored aside.
    """

    name = "a backup"

    def __init__(self, backups: Backups, store: Database) -> None:
        self._backups = backups
        self._store = store

    async def entries(self, run_id: str) -> Sequence[Entry]:
        """Raises nothing: a backup that cannot be read is passed over."""
        catalogue = await self._backups.catalogue(self._store)
        for item in await catalogue.items():
            try:
                if found := await self._in(catalogue, item, run_id):
                    return found
            except OrchestratorError as error:
                logger.warning("%s is passed over: %s", item.backup_id, error.message)
        return ()

    async def _in(self, catalogue: Catalogue, item: Item, run_id: str) -> Sequence[Entry]:
        async with self._backups.base(catalogue, item) as base:
            aside = await base.copier.load(base.dump)
            try:
                copy = aside.store()
                await copy.open_as_client()
                try:
                    journal = (await copy.look.load([run_id])).get(run_id)
                finally:
                    await copy.close()
            finally:
                await aside.discard()
        return () if journal is None else whole(journal)


def recipients(given: Sequence[str]) -> list[str]:
    """Age public keys: as they are, or the lines of files of them. Raises ConfigError."""
    found: list[str] = []
    for each in given:
        if each.startswith(("age1", "ssh-")):
            found.append(each)
            continue
        try:
            lines = Path(each).expanduser().read_text().splitlines()
        except OSError as error:
            raise ConfigError(f"recipients in {each} cannot be read: {error.strerror}") from error
        found += [line for line in lines if line.strip() and not line.startswith("#")]
    return found


def public_settings(config: Config) -> dict[str, Json]:
    """The settings as a backup may hold them: no secret, no password."""
    return {each.name: _plain(each.value) for each in config.settings()}


def _plain(value: object, name: str = "") -> Json:
    if isinstance(value, Mapping):
        return {str(key): _plain(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, name) for item in value]
    if isinstance(value, str) and _SECRET.search(name) and not name.endswith("_env"):
        return "(hidden)"
    if isinstance(value, bool | int | float) or value is None:
        return value
    return _PASSWORD.sub(r"\1:(hidden)@", redact(str(value)))


def _database(url: str) -> dict[str, Json]:
    """host, port and name: what the earlier system's metadata had."""
    if not is_postgres(url):
        return {"name": store_path(url).name}
    parts = urlsplit(url)
    _, _, place = parts.netloc.rpartition("@")
    host, _, port = place.partition(",")[0].rpartition(":") if ":" in place else (place, "", "")
    return {"host": host or "localhost", "port": port or "5432", "name": parts.path.lstrip("/")}
