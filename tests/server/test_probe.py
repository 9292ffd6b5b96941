"""The probe behind health: one question at a time, an answer in bounded time, and a real one."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from llm_orchestrator.clock import RealClock
from llm_orchestrator.errors import StoreUnavailable
from llm_orchestrator.server import probe as probes
from llm_orchestrator.server.probe import Probe
from llm_orchestrator.store.base import Batch, Database, Receipt
from llm_orchestrator.store.memory import MemoryStore


class Store(MemoryStore):
    """Counts commits; may hang or refuse."""

    def __init__(self) -> None:
        super().__init__(RealClock())
        self.commits = 0
        self.is_away = False
        self.hangs = asyncio.Event()
        self.hangs.set()

    async def commit(self, batch: Batch) -> Receipt:
        self.commits += 1
        await self.hangs.wait()
        if self.is_away:
            raise StoreUnavailable("away")
        return await super().commit(batch)


class Clock(RealClock):
    """Time that the test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


async def test_many_who_ask_at_once_are_one_commit() -> None:
    store, clock = Store(), Clock()
    probe = Probe(cast(Database, store), clock)
    found = await asyncio.gather(*(probe.ask() for _ in range(50)))
    assert {each.trouble for each in found} == {""}
    assert store.commits == 1
    clock.now = probes.FRESH_S + 0.1
    await probe.ask()
    assert store.commits == 2


async def test_a_store_that_refuses_is_trouble_and_forgotten_when_it_is_over() -> None:
    store, clock = Store(), Clock()
    probe = Probe(cast(Database, store), clock)
    store.is_away = True
    assert (await probe.ask()).trouble == "away"
    store.is_away = False
    clock.now = probes.FRESH_S + 0.1
    assert (await probe.ask()).trouble == ""


async def test_a_store_that_hangs_is_an_answer_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "PATIENCE_S", 0.05)
    store = Store()
    store.hangs.clear()
    found = await Probe(cast(Database, store), Clock()).ask()
    assert (found.write_ms, "no answer" in found.trouble) == (None, True)
