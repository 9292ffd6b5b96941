"""A store file of the first release opens, gains what it lacks, and keeps what it has."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from llm_orchestrator.errors import StoreDamaged
from llm_orchestrator.model import RunState
from llm_orchestrator.store.audit import AuditFilter
from llm_orchestrator.store.sqlite import SQLiteStore
from tests.store.support import HandClock, accepted, claim, draft, land

FIRST = "DROP TABLE nodes; DROP TABLE audit; PRAGMA user_version = 1"
"""What schema 1 did not have."""
SECOND = "DROP TABLE audit; PRAGMA user_version = 2"


async def opened(path: Path) -> SQLiteStore:
    store = SQLiteStore(path, node_id="node", clock=HandClock())
    await store.open_as_engine()
    return store


@pytest.mark.parametrize("older", [FIRST, SECOND])
async def test_an_older_file_is_brought_up_to_date(tmp_path: Path, older: str) -> None:
    path = tmp_path / "store.db"
    store = await opened(path)
    writer = await accepted(store)
    entry, change = claim("first-life")
    await land(store, writer.append(entry, draft(), change=change))
    await store.close()
    with closing(sqlite3.connect(path)) as database:
        database.executescript(older)
    store = await opened(path)
    members = await store.members()
    await members.join("node", "here", None)
    assert [node.node_id for node in await store.shelf.nodes()] == ["node"]
    assert await store.adopt("node", 5) == [writer.run_id]
    journals = await store.look.load([writer.run_id])
    assert len(journals[writer.run_id].entries) == 3
    run = await store.look.run(writer.run_id)
    assert run is not None
    assert run.state is RunState.RUNNING
    assert await store.shelf.audit(AuditFilter()) == []
    await store.close()
    await (await opened(path)).close()  # and it is done once


async def test_a_file_that_only_says_that_it_is_old_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    await (await opened(path)).close()
    with closing(sqlite3.connect(path)) as database:
        database.executescript(f"DROP TABLE inbox; {FIRST}")
    with pytest.raises(StoreDamaged):
        await opened(path)
