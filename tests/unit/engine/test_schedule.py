"""Planned times: which are due, by which policy, and that each is one accepted run."""

from __future__ import annotations

import asyncio
import datetime
from pathlib import Path

import pytest

from llm_orchestrator.clock import RealClock
from llm_orchestrator.engine.control import Operator
from llm_orchestrator.engine.schedule import KIND, Scheduler, due, times_after
from llm_orchestrator.model import MICROSECONDS, Json, Workflow
from llm_orchestrator.store.base import RunFilter
from llm_orchestrator.store.check import definition_digest
from llm_orchestrator.store.journal import canonical
from llm_orchestrator.store.sqlite import SQLiteStore
from llm_orchestrator.store.writer import GroupWriter


def at(text: str) -> int:
    """Microseconds of an ISO moment in UTC."""
    moment = datetime.datetime.fromisoformat(text).replace(tzinfo=datetime.UTC)
    return int(moment.timestamp()) * MICROSECONDS


class SetClock(RealClock):
    """A clock whose wall time is set by hand."""

    def __init__(self, now_us: int) -> None:
        self.now = now_us

    def now_us(self) -> int:
        return self.now


def value(backfill: str, next_at: int) -> dict[str, Json]:
    return {"cron": "0 * * * *", "timezone": "UTC", "backfill": backfill, "next_at": next_at}


def test_nothing_fires_early() -> None:
    planned = at("2026-05-01T10:00:00")
    assert due(value("all", planned), planned - 1) == ([], planned)


def test_a_time_that_has_come_fires_once_and_names_the_next() -> None:
    planned = at("2026-05-01T10:00:00")
    for policy in ("none", "latest", "all"):
        assert due(value(policy, planned), planned + 5 * MICROSECONDS) == (
            [planned],
            at("2026-05-01T11:00:00"),
        )


@pytest.mark.parametrize(("policy", "count"), [("none", 0), ("latest", 1), ("all", 4)])
def test_missed_times_follow_the_backfill_policy(policy: str, count: int) -> None:
    times, following = due(value(policy, at("2026-05-01T07:00:00")), at("2026-05-01T10:30:00"))
    assert len(times) == count
    assert following == at("2026-05-01T11:00:00")
    if times:
        assert times[-1] == at("2026-05-01T10:00:00")


def test_a_time_zone_decides_what_nine_in_the_morning_is() -> None:
    summer = next(times_after("0 9 * * *", "Europe/Berlin", at("2026-07-01T00:00:00")))
    winter = next(times_after("0 9 * * *", "Europe/Berlin", at("2026-01-01T00:00:00")))
    assert summer == at("2026-07-01T07:00:00")
    assert winter == at("2026-01-01T08:00:00")


async def test_each_planned_time_is_one_accepted_run_however_many_fire(tmp_path: Path) -> None:
    clock = SetClock(at("2026-05-01T09:59:00"))
    store = SQLiteStore(tmp_path / "runs.db", node_id="node", clock=clock)
    await store.open_as_engine()
    writer = GroupWriter(store, clock)
    writer.start()
    definition = canonical({"name": "hourly", "schedule": {"cron": "@hourly"}})
    flow = Workflow("hourly", "1", definition_digest(definition), definition)
    try:
        await Operator(store, clock).register(flow)
        schedulers = [Scheduler(store, writer, clock) for _ in range(3)]
        await asyncio.gather(*(scheduler.fire() for scheduler in schedulers))
        assert await store.look.runs(RunFilter()) == []
        for hour in (10, 11):
            clock.now = at(f"2026-05-01T{hour}:00:01")
            await asyncio.gather(*(scheduler.fire() for scheduler in schedulers))
            await schedulers[0].fire()
        runs = await store.look.runs(RunFilter())
        assert len(runs) == 2
        record, _ = await store.shelf.record(KIND, "hourly")
        assert record["next_at"] == at("2026-05-01T12:00:00")
    finally:
        await writer.close()
        await store.close()


async def test_registering_again_keeps_one_schedule_of_the_newest_version(tmp_path: Path) -> None:
    clock = SetClock(at("2026-05-01T09:59:00"))
    store = SQLiteStore(tmp_path / "runs.db", node_id="node", clock=clock)
    await store.open_as_engine()
    try:
        operator = Operator(store, clock)
        for version, cron in (("1", "0 1 * * *"), ("2", "0 2 * * *")):
            data = canonical({"name": "nightly", "version": version, "schedule": {"cron": cron}})
            await operator.register(Workflow("nightly", version, definition_digest(data), data))
        records = await store.shelf.records(KIND)
        assert list(records) == ["nightly"]
        assert records["nightly"]["version"] == "2"
        assert records["nightly"]["next_at"] == at("2026-05-02T02:00:00")
    finally:
        await store.close()
