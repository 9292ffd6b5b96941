"""What a real primary says of a real standby: who waits for it, how far it is behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from llm_orchestrator.clock import RealClock
from llm_orchestrator.drill.postgres_lab import PostgresServer
from llm_orchestrator.store.postgres import PostgresStore
from llm_orchestrator.store.statistics import Standby
from tests.postgres import fresh_database
from tests.store.support import accepted


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[PostgresStore]:
    store = PostgresStore(url, node_id="one", clock=RealClock())
    await store.open()
    try:
        yield store
    finally:
        await store.close()


async def standbys(store: PostgresStore) -> list[Standby] | None:
    found = (await store.counts.statistics(0, stalled_before=0)).standbys
    return None if found is None else list(found)


async def until(store: PostgresStore, is_so: Callable[[Standby], bool]) -> None:
    """Until the one standby is as wanted."""
    while not (found := await standbys(store)) or not is_so(found[0]):
        await store.clock.sleep(0.05)


async def test_a_standby_is_told_with_its_lag_and_whether_commits_wait_for_it() -> None:
    with PostgresServer() as primary, primary.standby() as standby, fresh_database(primary) as url:
        async with opened(url) as store, asyncio.timeout(60):
            await until(store, lambda each: not each.lag_bytes)
            assert await standbys(store) == [Standby("walreceiver", False, 0.0, 0, 0.0)]
            standby.freeze()
            try:
                await accepted(store)
                await until(store, lambda each: each.lag_bytes > 0)
                found = await standbys(store)
                assert found
                assert found[0].lag_s > 0
                assert found[0].exposed_s > 0
            finally:
                standby.thaw()
            await until(store, lambda each: not each.lag_bytes)
            primary.psql("ALTER SYSTEM SET synchronous_standby_names = '*'")
            primary.psql("SELECT pg_reload_conf()")
            await until(store, lambda each: each.is_sync)


async def test_a_role_that_may_not_see_standbys_tells_of_none(
    postgres_server: PostgresServer, postgres_url: str
) -> None:
    async with opened(postgres_url) as store:
        assert await standbys(store) == []
    role = postgres_server.create_role("blind", "word")
    name = postgres_url.rpartition("/")[2]
    grant = 'GRANT ALL ON ALL TABLES IN SCHEMA public TO "blind"'
    postgres_server.psql(grant, database=name)
    try:
        async with opened(role.rpartition("/")[0] + f"/{name}") as store:
            assert await standbys(store) is None
    finally:
        postgres_server.psql('DROP OWNED BY "blind"', database=name)
        postgres_server.psql('DROP ROLE "blind"')
