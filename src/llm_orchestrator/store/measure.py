"""Counting commits as they end, whoever asked for them: once per batch, never per entry."""

from __future__ import annotations

from collections.abc import Awaitable

from llm_orchestrator.clock import Clock
from llm_orchestrator.store.base import Batch, Outcome, Receipt
from llm_orchestrator.telemetry.metrics import Metrics


async def measured(
    commit: Awaitable[Receipt], batch: Batch, *, metrics: Metrics, clock: Clock
) -> Receipt:
    """What `commit` returns or raises, counted."""
    began = clock.monotonic()
    try:
        receipt = await commit
    except Exception:
        metrics.committed("failed", clock.monotonic() - began, entries=0, fenced=0, accepted=())
        raise
    refused = receipt.refused
    accepted = [
        append.accept.workflow
        for append in batch.appends
        if append.accept is not None and append.run_id not in refused
    ]
    metrics.committed(
        "refused" if refused or receipt.is_refused else "landed",
        clock.monotonic() - began,
        entries=sum(len(each.entries) for each in batch.appends if each.run_id not in refused),
        fenced=sum(outcome is Outcome.FENCED for outcome in refused.values()),
        accepted=accepted,
    )
    return receipt
