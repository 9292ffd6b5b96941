"""Counting commits as they end, whoever asked for them: once per batch, never per entry."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable

from llm_orchestrator.clock import Clock
from llm_orchestrator.store.base import Batch, Outcome, Receipt
from llm_orchestrator.telemetry.metrics import EMPTY, Metrics


async def measured(
    commit: Awaitable[Receipt], batch: Batch, *, metrics: Metrics, clock: Clock
) -> Receipt:
    """What `commit` returns or raises, counted."""
    began = clock.monotonic()
    try:
        receipt = await commit
    except Exception:
        metrics.committed("failed", clock.monotonic() - began)
        raise
    took_s = clock.monotonic() - began
    refused, landed = receipt.refused, batch.appends
    if refused:
        landed = [append for append in landed if append.run_id not in refused]
    entries, accepted = 0, []
    for append in landed:
        entries += len(append.entries)
        if append.accept is not None:
            accepted.append(append.accept.workflow)
    metrics.committed(
        "refused" if refused or receipt.is_refused else "landed",
        took_s,
        entries=entries,
        fenced=sum(outcome is Outcome.FENCED for outcome in refused.values()),
        accepted=Counter(accepted) if accepted else EMPTY,
    )
    return receipt
