"""What a node does now and then besides driving runs: retention and schedules."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

from llm_orchestrator.clock import Clock
from llm_orchestrator.engine.retention import Retention, expire
from llm_orchestrator.errors import StoreError
from llm_orchestrator.store.base import Store
from llm_orchestrator.store.writer import GroupWriter

logger = logging.getLogger(__name__)
RETENTION_PERIOD_S = 60.0
SCHEDULE = "schedule"
"""The kind of record that a schedule is (engine/schedule.py)."""


@dataclass(frozen=True, slots=True)
class Chore:
    """Something that is done at a node's start and once in `period_s`. Handed in by who wires."""

    name: str
    period_s: float
    work: Callable[[], Awaitable[object]]

    async def do_forever(self, clock: Clock) -> None:
        """Until cancelled; trouble of the store is a line in the log, and the next time comes."""
        while True:
            try:
                await self.work()
            except StoreError as error:
                logger.error("%s: %s", self.name, error.message)
            await clock.sleep(self.period_s)


def expiring(store: Store, retention: Retention, clock: Clock) -> list[Chore]:
    """Remove finished runs beyond the policy; nothing to do where all are kept."""
    work = partial(expire, store, retention, clock)
    return [Chore("retention", RETENTION_PERIOD_S, work)] if retention else []


async def fire_schedules(store: Store, writer: GroupWriter, clock: Clock) -> int | None:
    """Accept what is due; the next planned time, or None where there is no schedule."""
    if not await store.shelf.records(SCHEDULE):
        return None
    from llm_orchestrator.engine.schedule import Scheduler  # noqa: PLC0415 (cron, rarely needed)

    return await Scheduler(store, writer, clock).fire()
