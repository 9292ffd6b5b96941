"""A node forgets old chains of the audit log by itself, and what is left still verifies."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from llm_orchestrator import Orchestrator
from llm_orchestrator.clock import RealClock
from llm_orchestrator.config import Config
from llm_orchestrator.engine.chores import Chore
from llm_orchestrator.errors import ConfigError, StoreUnavailable
from llm_orchestrator.model import MICROSECONDS
from llm_orchestrator.security.audit import FORGET, AuditLog
from llm_orchestrator.security.audit_check import check_audit
from llm_orchestrator.store.audit import AuditEntry, AuditFilter
from llm_orchestrator.store.base import Store
from tests.unit.engine.support import VirtualClock, virtually

DAY_US = 86_400 * MICROSECONDS


class Then(RealClock):
    """Another day."""

    def __init__(self, now_us: Callable[[], int], days: float) -> None:
        super().__init__()
        self._before = now_us() + int(days * DAY_US)

    def now_us(self) -> int:
        self._before += 1
        return self._before


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "postgres":
        found: str = request.getfixturevalue("postgres_url")
        return found
    return f"sqlite:///{tmp_path / 'runs.db'}"


async def log(store: Store) -> list[AuditEntry]:
    return await store.shelf.audit(AuditFilter(limit=1_000))


async def test_a_node_forgets_what_is_too_old_and_the_rest_verifies(
    url: str, tmp_path: Path
) -> None:
    config = Config(data_dir=tmp_path, store=url)
    async with Orchestrator(config=config) as engine:
        now_us = engine.clock.now_us
        for name, days in (("older", -40.0), ("old", -31.0), ("young", -29.0)):
            past = AuditLog(engine.store, Then(now_us, days), name)
            for _ in range(3):
                await past.write(actor="ann", action="runs.cancel", target=name)
        assert len(await log(engine.store)) == 12
    keeps = Config(data_dir=tmp_path, store=url, audit_retention_days=30.0)
    for _ in range(2):  # the second one finds nothing to do
        async with Orchestrator(config=keeps) as engine:
            found = await log(engine.store)
            while not any(row.action == FORGET and row.result == "success" for row in found):
                await asyncio.sleep(0)
                found = await log(engine.store)
            chains = {row.chain_id for row in found}
            assert chains >= {"young"}
            assert not chains & {"old", "older"}
            [done] = [row for row in found if row.action == FORGET and row.result == "success"]
            assert (done.actor, b'"forgotten":2' in done.detail) == ("system", True)
            assert (await check_audit(engine.store)).flaws == []


async def test_nothing_is_forgotten_unless_somebody_says_so(url: str, tmp_path: Path) -> None:
    async with Orchestrator(config=Config(data_dir=tmp_path, store=url)) as engine:
        past = AuditLog(engine.store, Then(engine.clock.now_us, -4_000.0), "past")
        await past.write(actor="ann", action="runs.cancel")
        assert engine.node._chores == []
    async with Orchestrator(config=Config(data_dir=tmp_path, store=url)) as engine:
        assert {row.chain_id for row in await log(engine.store)} == {"past"}
    with pytest.raises(ConfigError, match="audit_retention_days"):
        async with Orchestrator(
            config=Config(data_dir=tmp_path, store=url, audit_retention_days=-1.0)
        ):
            pass


def test_a_chore_is_done_again_and_again_whatever_the_store_says(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def main() -> None:
        clock = VirtualClock()
        times: list[float] = []

        async def work() -> None:
            times.append(clock.monotonic())
            if len(times) == 2:
                raise StoreUnavailable("away")

        task = asyncio.create_task(Chore("sweeping", 60.0, work).do_forever(clock))
        await clock.sleep(150.0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert [moment - times[0] for moment in times] == [0.0, 60.0, 120.0]
        assert "sweeping: away" in caplog.text

    virtually(main())
