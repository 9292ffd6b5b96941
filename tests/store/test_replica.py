"""A standby mends what has rotted on the primary."""

from __future__ import annotations

import pytest

from llm_orchestrator.clock import RealClock
from llm_orchestrator.drill.postgres_lab import PostgresServer
from llm_orchestrator.engine.mend import Mender
from llm_orchestrator.errors import StoreUnavailable
from llm_orchestrator.store.postgres import PostgresStore
from llm_orchestrator.store.postgres_replica import Replica
from llm_orchestrator.store.writer import GroupWriter
from tests.postgres import fresh_database
from tests.store.support import accepted, draft, land


async def test_a_row_that_is_damaged_on_the_primary_alone_comes_back() -> None:
    with PostgresServer() as primary, fresh_database(primary) as url:
        store = PostgresStore(url, node_id="node", clock=RealClock())
        await store.open()
        writer = await accepted(store)
        await land(store, writer.append(draft(step="a"), draft(step="b")))
        name = url.rpartition("/")[2]
        with primary.standby() as standby:
            reached = standby.url(name)
            both = f"{url.rpartition('/')[0]},{reached.partition('@')[2]}"
            replica = Replica(both, RealClock())
            assert [entry.seq for entry in await replica.entries(writer.run_id)] == [1, 2, 3]
            standby.psql("SELECT pg_wal_replay_pause()", database=name)
            primary.psql("UPDATE journal SET payload = 'x' WHERE seq = 2", database=name)
            group = GroupWriter(store, store.clock)
            group.start()
            mender = Mender(store, group, copies=[replica])
            journal = (await store.look.load([writer.run_id]))[writer.run_id]
            plan = await mender.plan(journal)
            assert "from a replica: 2" in plan.summary()
            assert [entry.step for entry in (await mender.mend(plan)).entries] == ["", "a", "b"]
            await group.close()
        with pytest.raises(StoreUnavailable):
            await Replica(url, RealClock()).entries(writer.run_id)
        await store.close()
