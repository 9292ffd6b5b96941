"""All rows of a store go into one of either kind, and come out the same."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from llm_orchestrator import Context, Orchestrator, workflow
from llm_orchestrator.clock import RealClock
from llm_orchestrator.config import Config
from llm_orchestrator.engine.audit import verify_store
from llm_orchestrator.errors import StoreDamaged
from llm_orchestrator.security.audit import AuditLog, Result
from llm_orchestrator.store.base import Batch, Database, PutBlob, PutRecord, PutVectors
from llm_orchestrator.store.postgres_tables import PostgresTables
from llm_orchestrator.store.sqlite_tables import SQLiteTables
from llm_orchestrator.store.tables import COLUMNS, Row, Tables, copy
from llm_orchestrator.wire import is_postgres, make_store, store_path


@workflow
async def waits(ctx: Context, n: int) -> int:
    await ctx.wait_signal("go")
    return n


def tables(url: str) -> Tables:
    return PostgresTables(url) if is_postgres(url) else SQLiteTables(store_path(url))


@asynccontextmanager
async def client(url: str) -> AsyncIterator[Database]:
    store = make_store(Config(), RealClock(), url=url)
    await store.open_as_client(may_create=True)
    try:
        yield store
    finally:
        await store.close()


async def filled(url: str) -> None:
    """Something in every table."""
    async with Orchestrator(url) as one:
        done = await one.start(waits, {"n": 1}, idempotency_key="k", labels={"ü": "\u2028"})
        await one.operator.signal(done, "go")
        await one.result(done)
        waiting = await one.start(waits, {"n": 2}, delay_s=1_000)
        await one.operator.signal(waiting, "go", {"bytes": "\x00"}, sender_key="s")
        await one.operator.signal(waiting, "go", None)
    async with client(url) as store:
        changes = (
            PutRecord("kind", "key", {"a": [1, None]}, 0),
            PutVectors("index", "", (("id", b"\x00\x00\x80?", b"{}"),)),
            PutBlob(done, b"d" * 32, b"\x00" * 3_000_000),
        )
        await store.commit(Batch(changes=changes))
        log = AuditLog(store, store.clock, "chain")
        await log.write(actor="ann", action="a.b", target="t", result=Result.SUCCESS)


async def rows(url: str) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {table: [] for table in COLUMNS}
    async with tables(url) as opened:
        for table, known in found.items():
            async for page in opened.pages(table):
                known += page
    return {table: sorted(known, key=repr) for table, known in found.items()}


@pytest.mark.parametrize("given", ["sqlite", "postgres"])
@pytest.mark.parametrize("taking", ["sqlite", "postgres"])
async def test_every_row_is_the_same(
    tmp_path: Path, postgres_url: str, request: pytest.FixtureRequest, given: str, taking: str
) -> None:
    server = request.getfixturevalue("postgres_server")
    other = f"{postgres_url.rpartition('/')[2]}_other"
    source = postgres_url if given == "postgres" else f"sqlite:///{tmp_path / 'a.db'}"
    target = f"sqlite:///{tmp_path / 'b.db'}"
    if taking == "postgres":
        target = server.create_database(other)
    try:
        await filled(source)
        async with client(target):
            pass
        moved = await copy(tables(source), tables(target))
        assert min(moved.values()) > 0
        before = await rows(source)
        assert await rows(target) == before
        assert {table: len(known) for table, known in before.items()} == moved
        async with client(target) as store:
            assert await verify_store(store) == []
    finally:
        server.psql(f'DROP DATABASE IF EXISTS "{other}" WITH (FORCE)')


async def test_a_message_that_was_changed_is_not_moved(tmp_path: Path) -> None:
    source, target = (f"sqlite:///{tmp_path / name}" for name in ("a.db", "b.db"))
    await filled(source)
    async with client(target):
        pass
    async with SQLiteTables(tmp_path / "a.db") as opened:
        opened._open.execute("UPDATE inbox SET name = 'stop'")
    with pytest.raises(StoreDamaged, match="message"):
        await copy(tables(source), tables(target))
    assert (await rows(target))["runs"] == []
