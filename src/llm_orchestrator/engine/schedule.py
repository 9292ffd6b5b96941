"""Runs that start by themselves: a cron line, a time zone, and what to do about missed times.

A schedule is a record; firing it accepts one run whose id is derived from the schedule and the
planned time, in the same transaction that moves `next_at` on. However often it is tried, by
whomever, each planned time has exactly one accepted run. Times are the store's clock; nothing
fires early.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal
from zoneinfo import ZoneInfo

from cronsim import CronSim

from llm_orchestrator.clock import Clock, derived_run_id
from llm_orchestrator.engine.acceptance import accepted_draft
from llm_orchestrator.errors import Refused
from llm_orchestrator.model import MICROSECONDS, Json, NewRun
from llm_orchestrator.store.base import Batch, PutRecord, Store
from llm_orchestrator.store.writer import GroupWriter, Head

KIND = "schedule"
BACKFILL_MAX = 1_000
"""At most this many missed times are made up for at once."""

_ROOT = "00000000-0000-7000-8000-000000000000"
MACROS = {
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}
Backfill = Literal["none", "latest", "all"]


def times_after(cron: str, timezone: str, after_us: int) -> Iterator[int]:
    """The planned times after a moment, in microseconds, in order, without end."""
    start = datetime.datetime.fromtimestamp(after_us / MICROSECONDS, tz=ZoneInfo(timezone))
    for moment in CronSim(MACROS.get(cron, cron), start):
        yield int(moment.timestamp()) * MICROSECONDS


def schedule_record(
    flow: tuple[str, str, str],
    *,
    cron: str,
    timezone: str,
    backfill: Backfill,
    inputs: Json,
    now_us: int,
    version: int,
) -> PutRecord:
    """What registering a workflow (name, version, digest) with a schedule writes."""
    name, flow_version, digest = flow
    value: dict[str, Json] = {
        "version": flow_version,
        "digest": digest,
        "cron": cron,
        "timezone": timezone,
        "backfill": backfill,
        "inputs": inputs,
        "next_at": next(times_after(cron, timezone, now_us)),
    }
    return PutRecord(KIND, name, value, version)


def due(value: dict[str, Json], now_us: int) -> tuple[list[int], int]:
    """Planned times to fire now, by the backfill policy, and the next one after that."""
    planned = int(value["next_at"])
    if planned > now_us:
        return [], planned
    missed = [planned]
    for moment in times_after(value["cron"], value["timezone"], planned):
        if moment > now_us:
            planned = moment
            break
        missed.append(moment)
    if value["backfill"] == "all":
        return missed[-BACKFILL_MAX:], planned
    is_on_time = now_us - missed[-1] < 60 * MICROSECONDS
    return (missed[-1:] if value["backfill"] == "latest" or is_on_time else []), planned


class Scheduler:
    """Fires what is due. The node calls it whenever something may be."""

    def __init__(self, store: Store, writer: GroupWriter, clock: Clock) -> None:
        self._store = store
        self._writer = writer
        self._clock = clock

    async def fire(self) -> int | None:
        """Accept the runs of every schedule that is due; the next planned time of all, or None."""
        upcoming = []
        for name in await self._store.shelf.records(KIND):
            value, version = await self._store.shelf.record(KIND, name)
            if value is not None:
                upcoming.append(await self._fire_one(name, value, version))
        return min(upcoming, default=None)

    async def _fire_one(self, name: str, value: dict[str, Json], version: int) -> int:
        times, following = due(value, self._clock.now_us())
        moved = PutRecord(KIND, name, {**value, "next_at": following}, version)
        if not times:
            if following != value["next_at"]:  # missed while nobody served, and not wanted any more
                await self._store.commit(Batch(changes=(moved,)))
            return following
        for moment in times[:-1]:
            await self._accept(_planned(name, value, moment))
        await self._accept(_planned(name, value, times[-1]), moved)
        return following

    async def _accept(self, new: NewRun, moved: PutRecord | None = None) -> None:
        changes = () if moved is None else (replace(moved, run_id=new.run_id),)
        head = Head(new.run_id, self._store.generation << 40)
        try:
            await self._writer.append(head, (accepted_draft(new),), accept=new, changes=changes)
        except Refused:
            return  # somebody else fired this time; the next look sees the moved record


def _planned(name: str, value: dict[str, Json], moment: int) -> NewRun:
    """The run of one planned time, the same whoever starts it."""
    return NewRun(
        derived_run_id(_ROOT, f"{KIND}/{name}/{moment}"),
        name,
        value["version"],
        value["digest"],
        origin={"schedule": name, "planned_at": moment},
        input=value["inputs"],
    )
