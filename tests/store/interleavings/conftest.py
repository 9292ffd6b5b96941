"""One server for each module, because its commits are held at will, and one world on it.

The tests of a module share an event loop, so that sessions and what they have prepared are used
again: every order of a scenario takes milliseconds.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio

from llm_orchestrator.drill.postgres_lab import PostgresServer
from tests.postgres import fresh_database
from tests.store.interleavings.world import World


@pytest.fixture(scope="module")
def own_url() -> Iterator[str]:
    with PostgresServer(settings={"autovacuum": "off"}) as server, fresh_database(server) as url:
        yield url


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(own_url: str) -> AsyncIterator[World]:
    world = World(own_url)
    await world.open()
    yield world
    await world.close()
