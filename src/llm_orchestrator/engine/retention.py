"""Finished runs age out, by age and by count, a few at a time so that nobody waits for a lock.

Whole runs only: a journal is never thinned. Runs that wait, run or are paused never expire.
"""

from __future__ import annotations

from dataclasses import dataclass

from llm_orchestrator.clock import Clock
from llm_orchestrator.model import MICROSECONDS
from llm_orchestrator.store.base import Batch, Expire, Store

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
        if not old:
            break
        await store.commit(Batch(changes=(Expire(tuple(run.run_id for run in old)),)))
        gone += len(old)
    return gone
