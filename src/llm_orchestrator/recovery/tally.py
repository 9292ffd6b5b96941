"""How backups ended, counted in the store itself, so that every node shows the same numbers.

    backup/tally   {"ok": 3, "partial": 0, "failed": 1, "failed_at": microseconds, "error": why}

`partial`: the file is there, its copy in the second place is not.
"""

from __future__ import annotations

from enum import StrEnum

from llm_orchestrator.errors import NotUploaded, OrchestratorError, StoreError
from llm_orchestrator.model import Json
from llm_orchestrator.recovery.create import BACKUP
from llm_orchestrator.store.base import Batch, PutRecord, Store
from llm_orchestrator.telemetry.redact import redact

TALLY = "tally"
_TRIES = 5
_ERROR_MAX = 500


class Outcome(StrEnum):
    """How making a backup ended."""

    OK = "ok"
    PARTIAL = "partial"
    FAILED = "failed"


def outcome_of(error: OrchestratorError | None) -> Outcome:
    """How it ended, by what was raised."""
    if error is None:
        return Outcome.OK
    return Outcome.PARTIAL if isinstance(error, NotUploaded) else Outcome.FAILED


async def count_backup(store: Store, error: OrchestratorError | None, now_us: int) -> bool:
    """Count one; False when the store does not take it. Raises nothing."""
    try:
        for _ in range(_TRIES):
            before, version = await store.shelf.record(BACKUP, TALLY)
            value = counted(before if isinstance(before, dict) else {}, error, now_us)
            receipt = await store.commit(Batch(changes=(PutRecord(BACKUP, TALLY, value, version),)))
            if not receipt.is_refused:
                return True
    except StoreError:
        return False
    return False


def counted(
    before: dict[str, Json], error: OrchestratorError | None, now_us: int
) -> dict[str, Json]:
    """The record with one more in it."""
    outcome = outcome_of(error)
    value = {each.value: int(before.get(each.value) or 0) for each in Outcome}
    value[outcome.value] += 1
    if error is None:
        return {**value, "failed_at": before.get("failed_at") or 0, "error": ""}
    return {**value, "failed_at": now_us, "error": redact(error.message)[:_ERROR_MAX]}
