"""Backups by schedule, made by whatever engine serves the store (setting `backup_schedule`)."""

from __future__ import annotations

import logging
from dataclasses import replace

from llm_orchestrator.engine.schedule import times_after
from llm_orchestrator.errors import NotUploaded, OrchestratorError, StoreLocked
from llm_orchestrator.model import MICROSECONDS
from llm_orchestrator.recovery.catalogue import Catalogue
from llm_orchestrator.recovery.create import BACKUP, LAST
from llm_orchestrator.recovery.stream_heal import base_from
from llm_orchestrator.recovery.tally import count_backup
from llm_orchestrator.recovery.unarchived import BEGIN, KIND
from llm_orchestrator.store.base import Database
from llm_orchestrator.wire.backups import Backups, policy_of

logger = logging.getLogger(__name__)
PERIOD_S = 30.0
"""How often a due backup is looked for."""
RETRY_US = 600 * MICROSECONDS
"""After a failure."""


class BackupKeeper:
    """Makes a backup when one is due, lets old ones go, and proves the new one.

    `cron` may be "": then only the stream archive asks for one, when the store held something
    before it was archived (after a restore it always did): segments alone would not bring it back.

    Due is what was planned since the last backup of the store, whoever made it: so one node of
    many makes it (the others find the lock held, or the backup made), and one that was missed while
    nobody served is made up once.
    """

    def __init__(self, backups: Backups, store: Database, cron: str) -> None:
        self._backups = backups
        self._store = store
        self._cron = cron
        self._rests_until = 0

    async def do(self) -> bool:
        """True when a backup was made. Raises nothing but StoreError of looking."""
        now_us = self._store.clock.now_us()
        if now_us < self._rests_until or await self._next_us() > now_us:
            return False
        self._backups = replace(self._backups)  # a key that was read once may be gone since
        try:
            backup_id = await self._made()
            await self._prove(backup_id, now_us)
        except StoreLocked:
            return False  # another one is at it
        except OrchestratorError as error:
            logger.error("the scheduled backup failed: %s", error.message)
            self._rests_until = now_us + RETRY_US
            return False
        return True

    async def _prove(self, backup_id: str, now_us: int) -> None:
        """Let old ones go and prove this one. What stops that is counted like a failed backup."""
        try:
            catalogue = await self._backups.catalogue(self._store)
            trouble = await self._let_go(catalogue, now_us)
            here = await catalogue.items(is_local_only=True)
            item = next((one for one in here if one.backup_id == backup_id), None)
            item = item or await catalogue.find(backup_id)
            proof = await self._backups.prove(catalogue, item, store=self._store, advance=None)
            if trouble is not None:
                raise trouble
        except StoreLocked:
            raise
        except OrchestratorError as error:
            await count_backup(self._store, error, self._store.clock.now_us())
            raise
        if not proof.is_good:
            logger.error("backup %s is no good: %s", backup_id, "; ".join(proof.flaws[:3]))

    async def _let_go(self, catalogue: Catalogue, now_us: int) -> OrchestratorError | None:
        """Remove old ones first: the proof needs room. What is in the way must not stop it."""
        policy = policy_of(self._backups.config)
        try:
            await self._backups.prune(catalogue, policy, now_us=now_us)
        except OrchestratorError as error:
            logger.error("no old backup was let go: %s", error.message)
            return error
        return None

    async def _made(self) -> str:
        """The id of a new one. A second place that does not have it is told, and stops nothing."""
        try:
            return (await self._backups.create(self._store)).manifest.backup_id
        except NotUploaded as error:
            logger.error("the scheduled backup is not in the second place: %s", error.message)
            return str((await self._store.shelf.records(BACKUP))[LAST]["backup_id"])

    async def _next_us(self) -> int:
        last = (await self._store.shelf.records(BACKUP)).get(LAST) or {}
        if await self._needs_base(int(last.get("taken_at") or 0)):
            return 0
        if not self._cron:
            return 1 << 62
        return next(times_after(self._cron, "UTC", int(last.get("at") or 0)))

    async def _needs_base(self, taken_at: int) -> bool:
        begun, _ = await self._store.shelf.record(KIND, BEGIN)
        if not self._backups.config.archive_place or not isinstance(begun, dict):
            return False
        is_ours = begun.get("incarnation") == self._store.incarnation
        return is_ours and taken_at < base_from(begun)
