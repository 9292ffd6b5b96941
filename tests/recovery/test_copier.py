"""A copy is one cut; taking over is all or nothing, and keeps what was there."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from llm_orchestrator import Context, Orchestrator, step, workflow
from llm_orchestrator.clock import RealClock
from llm_orchestrator.engine.audit import verify_store
from llm_orchestrator.errors import (
    StoreError,
    StoreFull,
    StoreIsCopy,
    StoreLocked,
    StoreReplaced,
    StoreUnavailable,
)
from llm_orchestrator.store import sqlite_copy
from llm_orchestrator.store.base import Batch, Database, News, PutBlob, PutRecord
from llm_orchestrator.store.copying import Identity, Role
from llm_orchestrator.store.postgres_copy import PostgresCopier
from llm_orchestrator.store.sqlite import SQLiteStore
from llm_orchestrator.store.sqlite_copy import SQLiteCopier
from llm_orchestrator.store.sqlite_file import EngineLock, prepare
from llm_orchestrator.store.sqlite_write import BatchWriter
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


@workflow
async def asks(ctx: Context, n: int) -> int:
    await ctx.wait_signal("go")
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
    async with opened(url(live)):
        dump, _ = await copier.dump(tmp_path)
    zombie = BatchWriter(prepare(live, "", 0), "zombie", "")  # with no lock
    zombie._incarnation = (await copier.identity() or NEW).incarnation
    batch = Batch(changes=(PutRecord("test", "value", 2, 0),))
    zombie.apply(Batch(), 1)
    await restored(live, dump)
    with pytest.raises(StoreReplaced):
        zombie.apply(batch, 1)
    zombie._database.close()
    assert await value_of(url(live)) is None


async def test_a_lock_that_nobody_gives_up_stops_the_restore(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_copy, "_PATIENCE_S", 0.2)
    live = tmp_path / "live.db"
    async with opened(url(live)):
        dump, _ = await SQLiteCopier(live, RealClock()).dump(tmp_path)
    lock = EngineLock(live)
    assert lock.acquire("another")
    with pytest.raises(StoreLocked, match="another"):
        await restored(live, dump)
    lock.release()
    assert await value_of(url(live)) is None
    assert await SQLiteCopier(live, RealClock()).kept() == []


async def test_an_engine_takes_nothing_in_before_it_is_renewed(tmp_path: Path) -> None:
    live = tmp_path / "live.db"
    engine = SQLiteStore(live, node_id="engine", clock=RealClock())
    await engine.open_as_engine()
    told: asyncio.Queue[News] = asyncio.Queue()
    engine.on_news(told.put_nowait)
    dump, _ = await SQLiteCopier(live, RealClock()).dump(tmp_path)
    await restored(live, dump)
    assert (await told.get()).is_replaced
    with pytest.raises(StoreReplaced):
        await put(engine, 1)
    assert engine.incarnation != NEW.incarnation
    await engine.renew()
    assert (engine.incarnation, engine.generation) == (NEW.incarnation, NEW.generation)
    await put(engine, 2)
    await engine.close()
    assert await value_of(url(live)) == 2


async def test_an_engine_goes_on_with_its_runs_when_nothing_was_changed(tmp_path: Path) -> None:
    live = tmp_path / "live.db"
    async with Orchestrator(url(live), workflows=[asks]) as one:
        dump, _ = await SQLiteCopier(live, RealClock()).dump(tmp_path)
        run_id = await one.start(asks, {"n": 1})
        before = one.node.node_id
        aside = await SQLiteCopier(live, RealClock()).load(dump)

        async def last(store: Database) -> None:
            with pytest.raises(StoreUnavailable, match="being restored"):
                await one.store.look.run(run_id)
            with pytest.raises(StoreUnavailable, match="being restored"):
                await put(one.store, 3)
            raise StoreLocked("not today")

        with pytest.raises(StoreLocked, match="not today"):
            await aside.take_over(NEW, last=last)
        await aside.discard()
        while True:
            try:
                await one.operator.signal(run_id, "go")
                break
            except StoreUnavailable:
                await one.clock.sleep(0)
        assert await one.result(run_id) == 1
        assert one.node.node_id == before


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
    (tmp_path / "live.db.restore-0000dead").write_bytes(dump.read_bytes())
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


async def test_files_of_other_people_stay(tmp_path: Path) -> None:
    live = tmp_path / "live.db"
    copier = SQLiteCopier(live, RealClock())
    async with opened(url(live)):
        dump, _ = await copier.dump(tmp_path)
    theirs = [tmp_path / f"live.db.{word}" for word in ("restore-mine", "old-mine", "old-a.part")]
    for file in theirs:
        file.write_bytes(b"theirs")
    await (await copier.load(dump)).discard()
    assert await copier.kept() == []
    assert [file.read_bytes() for file in theirs] == [b"theirs"] * 3


@pytest.mark.parametrize("damage", [slice(100, 4096), slice(0, 4096)])
async def test_a_file_whose_first_page_is_lost_is_replaced_and_kept(
    tmp_path: Path, damage: slice
) -> None:
    live = tmp_path / "live.db"
    copier = SQLiteCopier(live, RealClock())
    async with opened(url(live)) as store:
        await put(store, 1)
        dump, _ = await copier.dump(tmp_path)
    content = bytearray(live.read_bytes())
    content[damage] = b"\xff" * (damage.stop - damage.start)
    live.write_bytes(content)
    live.with_name("live.db-wal").write_bytes(b"an old log")
    old = await restored(live, dump)
    assert not live.with_name("live.db-wal").exists()
    assert live.with_name(old).read_bytes() == content
    assert await value_of(url(live)) == 1
    assert await copier.identity() == NEW


async def test_what_was_kept_outlives_a_failure_after_the_exchange(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = tmp_path / "live.db"
    copier = SQLiteCopier(live, RealClock())
    async with opened(url(live)) as store:
        dump, _ = await copier.dump(tmp_path)
        await put(store, 2)
    aside = await copier.load(dump)
    exchange = aside._exchange

    def exchange_and_fail(identity: Identity) -> None:
        exchange(identity)
        raise OSError("the folder cannot be synced")

    monkeypatch.setattr(aside, "_exchange", exchange_and_fail)
    with pytest.raises(StoreError, match="synced"):
        await aside.take_over(NEW)
    await aside.discard()
    [old] = await copier.kept()
    assert await value_of(url(tmp_path / old)) == 2
    assert await copier.identity() == NEW


async def test_a_restore_that_is_cancelled_waits_for_its_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = tmp_path / "live.db"
    copier = SQLiteCopier(live, RealClock())
    async with opened(url(live)) as store:
        dump, _ = await copier.dump(tmp_path)
        await put(store, 2)
    aside = await copier.load(dump)
    exchange, begun, go_on = aside._exchange, threading.Event(), threading.Event()

    def slow(identity: Identity) -> None:
        begun.set()
        go_on.wait(60)
        exchange(identity)

    monkeypatch.setattr(aside, "_exchange", slow)
    swapping = asyncio.create_task(aside.take_over(NEW))
    assert await asyncio.to_thread(begun.wait, 60)
    swapping.cancel()
    await asyncio.sleep(0)
    assert not EngineLock(live).acquire("another")  # it is still at it
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await swapping
    await aside.discard()
    [old] = await copier.kept()
    assert await value_of(url(tmp_path / old)) == 2
    assert await copier.identity() == NEW


async def test_a_dump_that_is_cancelled_ends_and_leaves_nothing(tmp_path: Path) -> None:
    live, folder = tmp_path / "live.db", tmp_path / "dump"
    copier = SQLiteCopier(live, RealClock())
    begun = threading.Event()
    folder.mkdir()

    def advance(_done: int, _total: int) -> None:
        begun.set()

    async with opened(url(live)):
        dumping = asyncio.create_task(copier.dump(folder, bytes_per_s=1, advance=advance))
        assert await asyncio.to_thread(begun.wait, 60)
        dumping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await dumping
    assert files(folder, "*") == []


@contextlib.contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """To SQLite it is a disk that takes no more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def test_a_full_disk_stops_any_phase_and_changes_nothing(tmp_path: Path) -> None:
    live, size = tmp_path / "live.db", 1 << 20
    copier = SQLiteCopier(live, RealClock())
    async with opened(url(live)) as store:
        await put(store, 1)
        blob = PutBlob("00000000-0000-7000-8000-000000000000", b"d" * 32, b"\x01" * 4 * size)
        await store.commit(Batch(changes=(blob,)))
        dump, _ = await copier.dump(tmp_path)
        await put(store, 2)
    before = await copier.identity()
    (tmp_path / "again").mkdir()
    with no_file_larger_than(size), pytest.raises(StoreFull):
        await copier.dump(tmp_path / "again")
    assert files(tmp_path / "again", "*") == []
    with no_file_larger_than(size), pytest.raises(StoreFull):
        await copier.load(dump)
    aside = await copier.load(dump)
    with no_file_larger_than(size), pytest.raises(StoreFull):  # nothing can be kept
        await aside.take_over(NEW)
    with contextlib.ExitStack() as full:

        async def last(_: Database) -> None:
            full.enter_context(no_file_larger_than(size))

        with pytest.raises(StoreFull):  # it is kept, and cannot be exchanged
            await aside.take_over(NEW, last=last)
    assert await copier.identity() == before
    assert await copier.kept() == []
    assert await value_of(url(live)) == 2
    await aside.take_over(NEW)
    assert await value_of(url(live)) == 1
