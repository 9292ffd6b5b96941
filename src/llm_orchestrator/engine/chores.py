"""What a node does now and then besides driving runs: retention and schedules."""

from __future__ import annotations

import logging

from llm_orchestrator.clock import Clock
from llm_orchestrator.engine.retention import Retention, expire
from llm_orchestrator.errors import StoreError
from llm_orchestrator.store.base import Store
from llm_orchestrator.store.writer import GroupWriter

logger = logging.getLogger(__name__)
RETENTION_PERIOD_S = 60.0
SCHEDULE = "schedule"
"""The kind of record that a schedule is (engine/schedule.py)."""


async def expire_forever(store: Store, retention: Retention, clock: Clock) -> None:
    """Remove finished runs beyond the policy, at the start and once a minute, until cancelled."""
    while True:
        try:
            await expire(store, retention, clock)
        except StoreError as error:
            logger.error("finished runs could not be removed: %s", error.message)
        await clock.sleep(RETENTION_PERIOD_S)


async def fire_schedules(store: Store, writer: GroupWriter, clock: Clock) -> int | None:
    """Accept what is due; the next planned time, or None where there is no schedule."""
    if not await store.shelf.records(SCHEDULE):
        return None
    from llm_orchestrator.engine.schedule import Scheduler  # noqa: PLC0415 (cron, rarely needed)

    return await Scheduler(store, writer, clock).fire()
