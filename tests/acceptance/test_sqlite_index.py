"""An index that lies: a damaged key hides a run's tail, and what was paid for with it."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from llm_orchestrator.clock import RealClock
from llm_orchestrator.engine.audit import verify_store
from llm_orchestrator.engine.mend import Mender
from llm_orchestrator.model import RunState
from llm_orchestrator.store.base import Outcome, Post
from llm_orchestrator.store.check import INDEX_DAMAGED
from llm_orchestrator.store.sqlite import SQLiteStore
from llm_orchestrator.store.writer import GroupWriter
from tests.store.support import Writer, accepted, draft, land, moved, new_run, outcome


def store_at(path: Path) -> SQLiteStore:
    return SQLiteStore(path, node_id="here", clock=RealClock())


async def three_runs(path: Path) -> list[Writer]:
    """Each with five entries; the file holds everything, the log nothing."""
    store = store_at(path)
    await store.open_as_engine()
    writers = [await accepted(store, new_run(number)) for number in (1, 2, 3)]
    for name in "abcd":
        for writer in writers:
            await land(store, writer.append(draft(step=name)))
    await store.close()
    return writers


def spoil_key(path: Path, index: str, key: bytes, spoilt: bytes) -> None:
    """Change a key in an index of one page, and nothing in its table."""
    with sqlite3.connect(path) as database:
        query = "SELECT rootpage FROM sqlite_schema WHERE name = ?"
        [page] = database.execute(query, (index,)).fetchone()
        [size] = database.execute("PRAGMA page_size").fetchone()
    database.close()
    content = path.read_bytes()
    start, end = (page - 1) * size, page * size
    assert content[start:end].count(key) == 1
    spoilt_page = content[start:end].replace(key, spoilt)
    path.write_bytes(content[:start] + spoilt_page + content[end:])


@pytest.mark.parametrize("letter", ["~", "!"], ids=["above", "below"])
@pytest.mark.parametrize("seq", [3, 4, 5])
async def test_a_damaged_key_hides_no_entry_and_the_index_is_made_anew(
    tmp_path: Path, seq: int, letter: str
) -> None:
    path = tmp_path / "runs.db"
    writers = await three_runs(path)
    key = writers[1].run_id.encode() + bytes([seq])
    spoil_key(path, "sqlite_autoindex_journal_1", key, letter.encode() + key[1:])
    store = store_at(path)
    await store.open_as_engine()
    journals = await store.look.load([writer.run_id for writer in writers])
    assert [len(journal.entries) for journal in journals.values()] == [5, 5, 5]
    assert {flaw.what for flaw in journals[writers[1].run_id].flaws} == {INDEX_DAMAGED}
    writer = GroupWriter(store, RealClock())
    writer.start()
    _, head = await Mender(store, writer).whole(journals[writers[1].run_id])
    assert (head.seq, head.digest) == (5, writers[1].digest)
    assert await verify_store(store) == []
    for each in writers:
        assert await outcome(store, each.append(draft(step="next"))) is Outcome.LANDED
    await writer.close()
    await store.close()


@pytest.mark.parametrize("letter", ["~", "!"], ids=["above", "below"])
async def test_an_append_finds_its_predecessor_past_a_damaged_key(
    tmp_path: Path, letter: str
) -> None:
    path = tmp_path / "runs.db"
    writers = await three_runs(path)
    key = writers[1].run_id.encode() + bytes([5])
    spoil_key(path, "sqlite_autoindex_journal_1", key, letter.encode() + key[1:])
    store = store_at(path)
    await store.open_as_engine()
    for each in writers:
        assert await outcome(store, each.append(draft(step="next"))) is Outcome.LANDED
    assert await verify_store(store) == []
    await store.close()


async def test_a_run_whose_row_is_filed_wrongly_takes_messages(tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    writers = await three_runs(path)
    store = store_at(path)
    await store.open_as_engine()
    await moved(store, writers[1], RunState.WAITING, wake_at=0x1234567812345678)
    await store.close()
    moment = (0x1234567812345678).to_bytes(8, "big")
    spoil_key(path, "runs_to_claim", moment, b"\x02" + moment[1:])
    store = store_at(path)
    await store.open_as_engine()
    await land(store, changes=[Post(writers[1].run_id, "signal", "go")])
    assert [message.name for message in await store.look.inbox(writers[1].run_id)] == ["go"]
    assert await store.look.next_wake() == 0
    assert await verify_store(store) == []
    await store.close()
