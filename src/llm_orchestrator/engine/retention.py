"""Finished runs age out, by age and by count, a few at a time so that nobody waits for a lock.

Whole runs only: a journal is never thinned. Runs that wait, run or are paused never expire.
"""

from __future__ import annotations

from dataclasses import dataclass

from llm_orchestrator.clock import Clock
from llm_orchestrator.engine.acceptance import KEY_RECORD, key_of
from llm_orchestrator.model import MICROSECONDS, Run
from llm_orchestrator.store.base import Batch, Expire, PutRecord, Store, TrimCommits

BATCH_RUNS = 50
_DAY_S = 86_400


@dataclass(frozen=True, slots=True)
class Retention:
    """What is kept. 0 means no limit."""

    days: float = 0.0
    runs: int = 0

    def __bool__(self) -> bool:
        return bool(self.days or self.runs)


async def expire(store: Store, retention: Retention, clock: Clock) -> int:
    """Remove what is beyond the policy; returns how many runs went. Safe to stop at any point."""
    before = clock.now_us() - int(retention.days * _DAY_S * MICROSECONDS) if retention.days else 0
    keep = retention.runs or 1 << 40
    gone = 0
    while retention:
        old = await store.look.expirable(finished_before=before, keep=keep, limit=BATCH_RUNS)
        await store.commit(Batch(changes=(Expire(tuple(run.run_id for run in old)), TrimCommits())))
        left = [run for run in old if await store.look.run(run.run_id) is not None]
        await _forget_keys(store, [run for run in old if run not in left])
        gone += len(old) - len(left)
        if left or len(old) < BATCH_RUNS:
            break  # done, or somebody takes runs up again: next time
    return gone


async def _forget_keys(store: Store, runs: list[Run]) -> None:
    """A run that is gone answers no repeated idempotency key any more."""
    for run in runs:
        if run.idempotency_key is None:
            continue
        key = key_of(run)
        value, version = await store.shelf.record(KEY_RECORD, key)
        if isinstance(value, dict) and value.get("run_id") == run.run_id:
            await store.commit(Batch(changes=(PutRecord(KEY_RECORD, key, None, version),)))
