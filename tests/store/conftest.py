"""Every test of this folder runs on every store: what one of them lacks is not in the protocol."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from llm_orchestrator.store.base import Store
from llm_orchestrator.store.memory import MemoryStore
from llm_orchestrator.store.postgres import PostgresStore
from llm_orchestrator.store.sqlite import SQLiteStore
from tests.store.support import HandClock, on_hand_clock


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture(params=["memory", "sqlite", "postgres"])
async def store(
    request: pytest.FixtureRequest, tmp_path: Path, clock: HandClock
) -> AsyncIterator[Store]:
    if request.param == "memory":
        yield MemoryStore(clock)
        return
    if request.param == "postgres":
        url = request.getfixturevalue("postgres_url")
        remote = PostgresStore(url, node_id="node-1", clock=clock)
        await remote.open()
        on_hand_clock(remote, clock)
        yield remote
        await remote.close()
        return
    database = SQLiteStore(tmp_path / "store.db", node_id="node-1", clock=clock)
    await database.open_as_engine()
    yield database
    await database.close()
