"""Regions: what the command line works with, and the audit log of a node that takes over."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from llm_orchestrator.clock import Clock
from llm_orchestrator.config import Config
from llm_orchestrator.engine.region import Regions, Told
from llm_orchestrator.store.base import Store
from llm_orchestrator.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from llm_orchestrator.recovery.patroni import Patroni


@asynccontextmanager
async def patroni_of(config: Config, clock: Clock) -> AsyncIterator[Patroni | None]:
    """What moves the primary; None where the configuration names no Patroni."""
    if not config.patroni_urls:
        yield None
        return
    from llm_orchestrator.recovery.patroni import Patroni  # noqa: PLC0415 (aiohttp is heavy)

    async with Patroni(config.patroni_urls, clock) as patroni:
        yield patroni


def audit_of(store: Store, clock: Clock, *, region: str, metrics: Metrics) -> Told:
    """Writes down that a node has made its region active. Its chain is its own."""

    async def told(regions: Regions) -> None:
        from llm_orchestrator.security.audit import (  # noqa: PLC0415 (rarely needed)
            SYSTEM,
            AuditLog,
        )

        log = AuditLog(store, clock, f"{store.node_id}/{regions.counter}", metrics=metrics)
        await log.write(
            actor=SYSTEM,
            action="region.takeover",
            target=region,
            detail={"counter": regions.counter, "why": regions.why, "by": regions.by},
        )

    return told
