"""One engine, several processes: locks, the socket, kill -9, and files that are not ours."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llm_orchestrator.clock import RealClock
from llm_orchestrator.engine.audit import verify_store
from llm_orchestrator.errors import (
    StoreAbsent,
    StoreDamaged,
    StoreError,
    StoreForeign,
    StoreLocked,
    StoreNewer,
)
from llm_orchestrator.store.base import Batch, Outcome, Post, Receipt
from llm_orchestrator.store.sqlite import SQLiteStore
from llm_orchestrator.store.sqlite_share import socket_path
from tests.store.support import accepted, accepting, draft, land, new_run, outcome

ROOT = Path(__file__).resolve().parents[2]


class Children:
    """Processes of this test, ended with it."""

    def __init__(self) -> None:
        self._started: list[subprocess.Popen[str]] = []

    def start(self, word: str, path: Path) -> subprocess.Popen[str]:
        child = subprocess.Popen(
            [sys.executable, "-m", "tests.acceptance.sqlite_child", word, str(path)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._started.append(child)
        return child

    def run(self, word: str, path: Path) -> list[str]:
        output, _ = self.start(word, path).communicate(timeout=60)
        return output.splitlines()

    def stop(self) -> None:
        for child in self._started:
            child.kill()
            child.communicate()


@pytest.fixture
def children() -> Iterator[Children]:
    found = Children()
    yield found
    found.stop()


def line(child: subprocess.Popen[str]) -> list[str]:
    assert child.stdout is not None
    return child.stdout.readline().split()


def store_at(path: Path, name: str = "here") -> SQLiteStore:
    return SQLiteStore(path, node_id=name, clock=RealClock())


async def test_a_second_engine_is_refused_and_told_who_serves(
    tmp_path: Path, children: Children
) -> None:
    path = tmp_path / "runs.db"
    child = children.start("serve", path)
    _, owner = line(child)
    second = store_at(path)
    with pytest.raises(StoreLocked, match=owner) as caught:
        await second.open_as_engine(patience_s=0.1)
    assert str(path) in caught.value.message
    assert caught.value.hint
    await second.close()
    child.communicate(timeout=30)
    await second.open_as_engine()
    await second.close()


async def test_a_client_writes_through_the_engine_and_wakes_it(
    tmp_path: Path, children: Children
) -> None:
    path = tmp_path / "runs.db"
    child = children.start("serve", path)
    line(child)
    store = store_at(path)
    await store.open_as_client()
    writer = await accepted(store)
    assert line(child) == ["commit", "True"]
    stale = writer.copy()
    assert await outcome(store, writer.append(draft())) is Outcome.LANDED
    assert await outcome(store, stale.append(draft(step="late"))) is Outcome.FENCED
    message = {"text": "ü\0", "list": [1, {"$b": "x"}, None], "big": 1 << 70}
    await land(store, changes=[Post(writer.run_id, "signal", "x", message, "key")])
    assert (await store.look.inbox(writer.run_id))[0].payload == message
    await store.close()


def test_a_client_writes_by_itself_when_no_engine_runs(tmp_path: Path, children: Children) -> None:
    path = tmp_path / "runs.db"
    assert children.run("client", path) == ["receipt 0", "receipt 0", "runs 2"]
    assert children.run("client", path) == ["receipt 0", "receipt 0", "runs 2"]


async def test_clients_of_no_engine_take_turns(tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    stores = [store_at(path, f"client{number}") for number in range(4)]
    await stores[0].open_as_client(may_create=True)
    runs = [accepting(new_run())[1] for _ in range(12)]
    receipts = await asyncio.gather(
        *(stores[number % 4].commit(Batch((run,))) for number, run in enumerate(runs))
    )
    assert set(map(str, receipts)) == {str(Receipt())}
    assert len(await stores[0].look.run_ids()) == 12
    assert await verify_store(stores[0]) == []
    for store in stores:
        await store.close()


async def test_a_killed_engine_leaves_nothing_that_keeps_the_next_one_out(
    tmp_path: Path, children: Children
) -> None:
    path = tmp_path / "runs.db"
    child = children.start("die", path)
    _, run_id = line(child)
    assert child.wait(timeout=30) == -9
    assert socket_path(path).exists()
    reader = store_at(path, "reader")
    await reader.open_as_client()
    assert await reader.look.run_ids() == [run_id]
    _, append = accepting(new_run(2))
    assert (await reader.commit(Batch((append,)))).refused == {}
    await reader.close()
    engine = store_at(path)
    await engine.open_as_engine(patience_s=0)
    assert len(await engine.look.run_ids()) == 2
    client = store_at(path, "client")
    await client.open_as_client()
    await accepted(client)
    await client.close()
    await engine.close()
    assert not socket_path(path).exists()


def test_nothing_acknowledged_is_lost_by_a_kill(tmp_path: Path, children: Children) -> None:
    path = tmp_path / "runs.db"
    chance = random.Random(3)
    for _ in range(4):
        for file in tmp_path.iterdir():
            file.unlink()
        child = children.start("work", path)
        for _ in range(chance.randrange(20, 200)):
            line(child)
        child.kill()
        output, _ = child.communicate(timeout=30)
        acknowledged = max([int(words.split()[1]) for words in output.splitlines()[:-1]] or [1])
        with sqlite3.connect(path) as database:
            [found] = database.execute("SELECT MAX(seq) FROM journal").fetchone()
        database.close()
        assert found >= acknowledged


# -- files that are not what they should be ----------------------------------------------------


async def test_an_absent_file_is_absent(tmp_path: Path) -> None:
    store = store_at(tmp_path / "nothing.db")
    with pytest.raises(StoreAbsent, match="there is no store"):
        await store.open_as_client()
    await store.close()


@pytest.mark.parametrize(
    "content", [b"hello, this is a text\n" * 99, b"SQLite format 3\0" + bytes(99)]
)
async def test_a_file_that_is_no_database_is_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    for is_engine in (True, False):
        store = store_at(path)
        with pytest.raises(StoreError) as caught:
            await (store.open_as_engine() if is_engine else store.open_as_client())
        assert isinstance(caught.value, StoreForeign | StoreDamaged)
        assert str(path) in caught.value.message
        await store.close()
    assert path.read_bytes() == content


async def test_somebody_elses_database_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "theirs.db"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE runs (id)")
    database.close()
    before = path.read_bytes()
    store = store_at(path)
    with pytest.raises(StoreForeign, match="not one of ours"):
        await store.open_as_engine()
    await store.close()
    assert path.read_bytes() == before


async def test_a_store_of_a_newer_version_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    store = store_at(path)
    await store.open_as_engine()
    await store.close()
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version=99")
    database.close()
    for is_engine in (True, False):
        store = store_at(path)
        with pytest.raises(StoreNewer, match="schema 99"):
            await (store.open_as_engine() if is_engine else store.open_as_client())
        await store.close()


async def test_a_damaged_schema_is_found_at_opening(tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    store = store_at(path)
    await store.open_as_engine()
    await store.close()
    content = path.read_bytes()
    path.write_bytes(content.replace(b"head_digest BLOB", b"head_dagest BLOB", 1))
    store = store_at(path)
    with pytest.raises(StoreDamaged, match="schema"):
        await store.open_as_engine()
    await store.close()


@pytest.fixture
def open_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder that other users can reach (pytest's own is private)."""
    folder = Path("/tmp") / f"llmo-test-{os.getpid()}-{tmp_path.name}"
    folder.mkdir(mode=0o755)
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


@pytest.mark.parametrize("is_there", [True, False])
def test_a_folder_that_cannot_be_written_is_named(
    open_folder: Path, children: Children, is_there: bool
) -> None:
    path = open_folder / "runs.db"
    if is_there:
        assert children.run("client", path)[-1] == "runs 2"
    open_folder.chmod(0o555)
    [said] = children.run("unprivileged", path)
    assert said.startswith("StoreReadOnly")
    assert str(open_folder) in said
    assert "ls -ld" in said


# -- no room, and large things -----------------------------------------------------------------


def test_results_are_kept_while_there_is_no_room_and_written_when_there_is(
    tmp_path: Path, children: Children
) -> None:
    path = tmp_path / "runs.db"
    output = children.run("full", path)
    said = [words.split()[0] for words in output]
    assert said.count("complaint") >= 1, output[-20:]
    assert output[-1] == "results {200000}"
    assert said.count("finished") == 64
    with sqlite3.connect(path) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        query = "SELECT COUNT(*) FROM journal WHERE kind = 'step_finished'"
        assert database.execute(query).fetchone() == (64,)
    database.close()


async def test_the_store_is_replaced_under_a_process_that_then_writes_nothing(
    tmp_path: Path,
) -> None:
    path = tmp_path / "runs.db"
    store = store_at(path)
    await store.open_as_engine()
    writer = await accepted(store)
    with sqlite3.connect(path) as database:
        database.execute("UPDATE store SET incarnation = 'another'")
    database.close()
    with pytest.raises(StoreError, match="replaced or restored"):
        await land(store, writer.append(draft()))
    assert len(await store.look.stored(writer.run_id)) == 1
    await store.close()


async def test_a_cancelled_await_loses_no_append(tmp_path: Path) -> None:
    store = store_at(tmp_path / "runs.db")
    await store.open_as_engine()
    writer = await accepted(store)
    for number in range(50):
        append = asyncio.ensure_future(land(store, writer.append(draft(step=str(number)))))
        await asyncio.sleep(0)
        append.cancel()
        await asyncio.gather(append, return_exceptions=True)
    await land(store, writer.append(draft(step="last")))
    steps = [entry.step for entry in await store.look.stored(writer.run_id)]
    assert steps == ["", *map(str, range(50)), "last"]
    await store.close()


async def test_a_client_that_is_cancelled_leaves_the_lock_free(tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    client = store_at(path, "client")
    await client.open_as_client(may_create=True)
    for turns in range(6):
        _, append = accepting(new_run())
        commit = asyncio.ensure_future(client.commit(Batch((append,))))
        for _ in range(turns):
            await asyncio.sleep(0)
        commit.cancel()
        await asyncio.gather(commit, return_exceptions=True)
    await client.close()
    engine = store_at(path)
    await engine.open_as_engine(patience_s=0)
    assert await verify_store(engine) == []
    await engine.close()


async def test_nonsense_on_the_socket_ends_only_its_own_connection(tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    store = store_at(path)
    await store.open_as_engine()
    for nonsense in (b"\0\0\0\2{}", b"\0\0\0\4nope", b"\xff\xff\xff\xff", b"\0\0\0\2[]", b"x"):
        reader, writer = await asyncio.open_unix_connection(str(socket_path(path)))
        writer.write(nonsense)
        writer.write_eof()
        await reader.read()
        writer.close()
        await writer.wait_closed()
    client = store_at(path, "client")
    await client.open_as_client()
    await accepted(client)
    await client.close()
    await store.close()
