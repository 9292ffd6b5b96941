"""A copy is one cut; taking over is all or nothing, and keeps what was there."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from llm_orchestrator import Context, Orchestrator, step, workflow
from llm_orchestrator.clock import RealClock
from llm_orchestrator.engine.audit import verify_store
from llm_orchestrator.errors import StoreIsCopy, StoreLocked
from llm_orchestrator.store.base import Batch, Database, PutRecord
from llm_orchestrator.store.copying import Identity, Role
from llm_orchestrator.store.postgres_copy import PostgresCopier
from llm_orchestrator.store.sqlite import SQLiteStore
from llm_orchestrator.store.sqlite_copy import SQLiteCopier
from tests.recovery.test_carry import opened

NEW = Identity("new" * 10, 7)


@step
async def work(number: int) -> int:
    return number


@workflow
async def busy(ctx: Context, n: int) -> int:
    for number in range(n):
        await ctx.step(work, number)
    return n


class Site:
    """A live store, and what copies it."""

    def __init__(self, url: str, copier: SQLiteCopier | PostgresCopier) -> None:
        self.url = url
        self.copier = copier

    def old(self, name: str) -> str:
        """The URL of a store that was put out of the way."""
        return f"{self.url.rpartition('/')[0]}/{name}"


@pytest.fixture(params=["sqlite", "postgres"])
async def site(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Site]:
    if request.param == "sqlite":
        live = tmp_path / "live.db"
        yield Site(f"sqlite:///{live}", SQLiteCopier(live, RealClock()))
        return
    address: str = request.getfixturevalue("postgres_url")
    copier = PostgresCopier(address, RealClock())
    yield Site(address, copier)
    for name in [*await copier.kept(), *await copier.leftovers()]:
        request.getfixturevalue("postgres_server").psql(f'DROP DATABASE "{name}" WITH (FORCE)')


def url(file: Path) -> str:
    return f"sqlite:///{file}"


async def test_a_dump_under_load_is_one_cut(site: Site, tmp_path: Path) -> None:
    copier = site.copier
    async with Orchestrator(site.url) as one:
        runs = [await one.start(busy, {"n": 60}) for _ in range(20)]
        dump, cut = await copier.dump(tmp_path)
        results = [await one.result(run_id) for run_id in runs]
    assert results == [60] * 20
    assert await copier.check_dump(dump) == ""
    aside = await copier.load(dump)
    store = aside.store()
    await store.open_as_client()
    assert await verify_store(store) == []
    journals = await store.look.load([head.run_id for head in cut.heads])
    for head in cut.heads:
        last = journals[head.run_id].entries[-1]
        assert (last.seq, last.digest.hex()) == (head.seq, head.digest)
    assert cut.counts["runs"] == len(await store.look.run_ids())
    assert cut.generation == 1
    await store.close()
    await aside.discard()
    assert files(tmp_path, "*.restore-*") == []


def files(folder: Path, pattern: str) -> list[Path]:
    return sorted(folder.glob(pattern))


async def restored(live: Path, dump: Path) -> str:
    aside = await SQLiteCopier(live, RealClock()).load(dump)
    return await aside.take_over(NEW)


async def put(store: Database, value: int) -> None:
    _, version = await store.shelf.record("test", "value")
    await store.commit(Batch(changes=(PutRecord("test", "value", value, version),)))


async def value_of(address: str) -> object:
    async with opened(address) as store:
        return (await store.shelf.record("test", "value"))[0]


async def test_taking_over_brings_the_dump_back_and_keeps_the_old(
    site: Site, tmp_path: Path
) -> None:
    copier = site.copier
    async with opened(site.url) as store:
        await put(store, 1)
        dump, _ = await copier.dump(tmp_path)
        await put(store, 2)
    aside = await copier.load(dump)
    seen: list[object] = []

    async def last(store: Database) -> None:
        seen.append((await store.shelf.record("test", "value"))[0])
        kept = aside.store()
        await kept.open_as_client()
        await kept.commit(Batch(changes=(PutRecord("test", "carried", 3, 0),)))
        await kept.close()

    old = await aside.take_over(NEW, last=last)
    assert seen == [2]
    assert await copier.kept() == [old]
    assert await value_of(site.url) == 1
    assert await value_of(site.old(old)) == 2
    assert await copier.identity() == NEW
    async with opened(site.url) as store:
        assert (await store.shelf.record("test", "carried"))[0] == 3
        assert (store.incarnation, store.generation) == (NEW.incarnation, 7)
    await copier.drop(old)
    assert await copier.kept() == []


async def test_a_writer_of_before_gets_nothing_in(tmp_path: Path) -> None:
    live = tmp_path / "live.db"
    copier = SQLiteCopier(live, RealClock())
    async with opened(url(live)) as store:
        dump, _ = await copier.dump(tmp_path)
        zombie = sqlite3.connect(live, isolation_level=None)
        zombie.execute("SELECT * FROM store").fetchall()
        with pytest.raises(StoreLocked, match="serves"):
            await asyncio.wait_for(restored(live, dump), 60)
        await put(store, 2)  # it goes on serving
    await restored(live, dump)
    assert zombie.execute("SELECT generation FROM store").fetchall() == [(7,)]
    zombie.close()
    assert await value_of(url(live)) is None


async def test_a_copy_is_not_served(tmp_path: Path) -> None:
    live = tmp_path / "live.db"
    copier = SQLiteCopier(live, RealClock())
    async with opened(url(live)):
        dump, _ = await copier.dump(tmp_path)
    aside = await copier.load(dump)
    with pytest.raises(StoreIsCopy):
        await SQLiteStore(aside.path, node_id="n", clock=RealClock()).open_as_engine()
    own = aside.store()
    await own.open_as_engine()
    await own.close()
    await aside.discard()


async def test_a_file_that_is_no_database_is_replaced_and_kept(tmp_path: Path) -> None:
    live = tmp_path / "live.db"
    copier = SQLiteCopier(live, RealClock())
    async with opened(url(live)) as store:
        await put(store, 1)
        dump, _ = await copier.dump(tmp_path)
    live.write_bytes(b"rubbish" * 1000)
    old = await restored(live, dump)
    assert live.with_name(old).read_bytes().startswith(b"rubbish")
    assert await value_of(url(live)) == 1


async def test_a_store_that_is_gone_is_made_anew(tmp_path: Path) -> None:
    live = tmp_path / "live.db"
    copier = SQLiteCopier(live, RealClock())
    async with opened(url(live)) as store:
        await put(store, 1)
        dump, _ = await copier.dump(tmp_path)
    for path in files(tmp_path, "live.db*"):
        path.unlink()
    assert await copier.identity() is None
    assert await restored(live, dump) == ""
    assert await value_of(url(live)) == 1


async def test_what_a_dead_maker_left_goes_with_the_next(tmp_path: Path) -> None:
    live = tmp_path / "live.db"
    copier = SQLiteCopier(live, RealClock())
    async with opened(url(live)):
        dump, _ = await copier.dump(tmp_path)
    (tmp_path / "live.db.restore-dead").write_bytes(dump.read_bytes())
    living = await copier.load(dump)  # removes the dead one
    assert await copier.leftovers() == []
    other = await copier.load(dump)  # and leaves a living one alone
    assert living.path.exists()
    await living.discard()
    await other.discard()
    assert files(tmp_path, "*.restore-*") == []


async def test_a_failure_in_the_last_look_changes_nothing(site: Site, tmp_path: Path) -> None:
    copier = site.copier
    async with opened(site.url) as store:
        dump, _ = await copier.dump(tmp_path)
        await put(store, 2)
    before = await copier.identity()
    aside = await copier.load(dump)

    async def last(store: Database) -> None:
        raise StoreLocked("no")

    with pytest.raises(StoreLocked, match="no"):
        await aside.take_over(NEW, last=last)
    await aside.discard()
    assert await copier.identity() == before
    assert before is not None
    assert before.role == Role.PRIMARY
    assert await copier.kept() == []
    assert await value_of(site.url) == 2
