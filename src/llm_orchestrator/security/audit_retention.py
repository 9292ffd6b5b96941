"""Letting old entries of the audit log go, so that a check still finds everything else.

Chains go as a whole, with their heads, once their last entry is older than a time. That time stands
in an entry of its own before the first chain goes: it excuses what is missing and nothing younger.
"""

from __future__ import annotations

from llm_orchestrator.clock import Clock
from llm_orchestrator.errors import StoreDamaged
from llm_orchestrator.model import MICROSECONDS
from llm_orchestrator.security.audit import (
    FORGET,
    HEAD,
    SYSTEM,
    AuditLog,
    Head,
    head_of,
    read_head,
)
from llm_orchestrator.store.audit import ForgetAudit
from llm_orchestrator.store.base import Batch, PutRecord, Store
from llm_orchestrator.telemetry.metrics import Metrics

PERIOD_S = 3_600.0
"""How often a node looks whether anything has become too old."""
_DAY_S = 86_400
_CHAIN = "retention"
"""Behind the process's name: its own chain may be written to by others meanwhile."""


async def old_chains(store: Store, before_us: int) -> list[Head]:
    """Chains that ended before a time (microseconds on the store's clock)."""
    found = []
    for chain_id, value in (await store.shelf.records(HEAD)).items():
        try:
            head = head_of(chain_id, value)
        except StoreDamaged:
            continue  # it stays: `llmo audit verify` names it
        if head.recorded_at < before_us:
            found.append(head)
    return found


async def forget(store: Store, log: AuditLog, *, before_us: int, actor: str) -> int:
    """Remove them; how many. One that moves meanwhile stays. Raises StoreError."""
    chosen = await old_chains(store, before_us)
    if not chosen:
        return 0
    gone = 0
    detail = {"before": before_us, "chains": len(chosen)}
    async with log.action(actor=actor, action=FORGET, detail=detail) as facts:
        for chain_id, *_ in chosen:
            head = await read_head(store, chain_id)
            if 0 < head.recorded_at < before_us:
                removed = PutRecord(HEAD, chain_id, None, head.version)
                receipt = await store.commit(Batch(changes=(ForgetAudit(chain_id), removed)))
                gone += not receipt.is_refused
        facts["forgotten"] = gone
    return gone


async def forget_older(
    store: Store, clock: Clock, *, days: float, metrics: Metrics | None = None
) -> int:
    """Remove chains that ended more than `days` ago, by policy; how many. Raises StoreError.

    Several nodes may do it at once: each chain goes once.
    """
    log = AuditLog(store, clock, f"{store.node_id}-{_CHAIN}", metrics=metrics)
    before_us = clock.now_us() - int(days * _DAY_S * MICROSECONDS)
    return await forget(store, log, before_us=before_us, actor=SYSTEM)
