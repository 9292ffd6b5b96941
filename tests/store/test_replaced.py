"""A store that was restored under its users takes nothing from them any more."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from llm_orchestrator.clock import RealClock
from llm_orchestrator.drill.postgres_lab import PostgresServer
from llm_orchestrator.errors import StoreError
from llm_orchestrator.model import Workflow
from llm_orchestrator.store.base import Change, Post, PutRecord, Register
from llm_orchestrator.store.check import definition_digest
from llm_orchestrator.store.postgres import PostgresStore
from tests.store.support import accepted, draft, land

FLOW = Workflow("flow", "1", definition_digest(b"{}"), b"{}")


@pytest.mark.parametrize(
    "changes",
    [(PutRecord("kind", "key", 1, 0),), (Register(FLOW),), (Post("", "signal", "x"),), ()],
    ids=["a record", "a definition", "a message", "an entry"],
)
async def test_nothing_lands_in_a_store_that_was_replaced(
    postgres_server: PostgresServer, postgres_url: str, changes: Sequence[Change]
) -> None:
    store = PostgresStore(postgres_url, node_id="node", clock=RealClock())
    await store.open()
    writer = await accepted(store)
    name = postgres_url.rpartition("/")[2]
    postgres_server.psql("UPDATE store SET incarnation = 'another'", database=name)
    changes = [
        Post(writer.run_id, "signal", "x") if isinstance(change, Post) else change
        for change in changes
    ]
    with pytest.raises(StoreError, match="restored meanwhile; ask again"):
        await land(store, *([] if changes else [writer.append(draft())]), changes=changes)
    count = "SELECT (SELECT count(*) FROM records) + (SELECT count(*) FROM workflows)"
    count += " + (SELECT count(*) FROM inbox) + (SELECT count(*) FROM journal)"
    assert postgres_server.psql(count, database=name) == "1"
    await store.close()
