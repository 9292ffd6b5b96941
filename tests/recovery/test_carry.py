"""What a store that is put back takes from the one that it replaces."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from llm_orchestrator import Context, Orchestrator, step, workflow
from llm_orchestrator.clock import RealClock
from llm_orchestrator.config import Config
from llm_orchestrator.drill.postgres_lab import PostgresServer
from llm_orchestrator.engine.audit import verify_store
from llm_orchestrator.engine.node import registration
from llm_orchestrator.model import Json, RunState
from llm_orchestrator.recovery import reconcile
from llm_orchestrator.recovery.carry import Carriage, Under, carry_over
from llm_orchestrator.security.audit import AuditLog, Result
from llm_orchestrator.security.audit_check import check_audit
from llm_orchestrator.store.base import Batch, Database, PutRecord, Register
from llm_orchestrator.wire import make_store

calls: list[str] = []


@step(effect="once")
async def pay(name: str) -> str:
    calls.append(name)
    return f"paid {name}"


@workflow
async def buy(ctx: Context, name: str) -> str:
    return str(await ctx.step(pay, name))


@workflow
async def ask(ctx: Context) -> list[Json]:
    first = await ctx.wait_signal("go")
    second = await ctx.wait_signal("go")
    return [first, second]


class Site:
    """A live store, and the store that a backup of it is put back into."""

    def __init__(self, live: str, restored: str, copy: Callable[[], None]) -> None:
        self.live = live
        self.restored = restored
        self.back_up = copy
        """Nobody may have the live store open."""


@pytest.fixture(params=["sqlite", "postgres"])
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    if request.param == "sqlite":
        live, restored = tmp_path / "live.db", tmp_path / "restored.db"

        def copy() -> None:
            wal = live.with_name(live.name + "-wal")
            assert not wal.exists() or not wal.stat().st_size
            shutil.copy(live, restored)

        yield Site(f"sqlite:///{live}", f"sqlite:///{restored}", copy)
        return
    server: PostgresServer = request.getfixturevalue("postgres_server")
    address: str = request.getfixturevalue("postgres_url")
    base, _, name = address.rpartition("/")
    other = f"{name}_restored"
    statement = f'CREATE DATABASE "{other}" TEMPLATE "{name}" STRATEGY file_copy'
    yield Site(address, f"{base}/{other}", lambda: _psql(server, statement))
    server.psql(f'DROP DATABASE IF EXISTS "{other}" WITH (FORCE)')


def _psql(server: PostgresServer, statement: str) -> None:
    server.psql(statement)


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[Database]:
    store = make_store(Config(), RealClock(), url=url)
    await store.open_as_engine()
    yield store
    await store.close()


async def carried(site: Site) -> Carriage:
    async with opened(site.live) as old, opened(site.restored) as new:
        under = Under(new.generation + 1, new.clock.now_us(), "a test")
        done = await carry_over(old, new, under)
        assert await verify_store(new) == []
    assert done.trouble == []
    return done


async def test_a_key_gives_the_same_run_and_it_is_not_paid_again(site: Site) -> None:
    calls.clear()
    async with Orchestrator(site.live) as one:
        await one.store.commit(Batch(changes=(Register(registration(buy)),)))
    site.back_up()
    async with Orchestrator(site.live) as one:
        run_id = await one.start(buy, {"name": "a"}, idempotency_key="order-1")
        assert await one.result(run_id) == "paid a"
    done = await carried(site)
    assert (done.runs, done.held, done.records) == (1, [run_id], 1)
    async with Orchestrator(site.restored, workflows=[buy]) as one:
        assert await one.start(buy, {"name": "a"}, idempotency_key="order-1") == run_id
        await reconcile.accept(one.store, one.clock, run_id, by="a test")
        assert await one.result(run_id) == "paid a"
    assert calls == ["a"]


async def test_messages_keep_their_numbers_and_come_once(site: Site) -> None:
    async with Orchestrator(site.live) as one:
        taken = await one.start(ask)
        waiting = await one.start(ask)
        await until(one, taken, RunState.WAITING)
        await until(one, waiting, RunState.WAITING)
    site.back_up()
    async with Orchestrator(site.live, workflows=[ask]) as one:
        await one.operator.signal(taken, "go", "first")
        await signals_taken(one, taken, 1)
    async with opened(site.live) as store:  # nobody takes these
        one_more = Orchestrator(store=store)
        await one_more.operator.signal(taken, "go", "second")
        await one_more.operator.signal(waiting, "go", "only", sender_key="k")
    done = await carried(site)
    assert done.messages == 2
    async with Orchestrator(site.restored, workflows=[ask]) as one:
        assert await one.result(taken) == ["first", "second"]
        await one.operator.signal(waiting, "go", "only", sender_key="k")  # the same once more
        await one.operator.signal(waiting, "go", "last")
        assert await one.result(waiting) == ["only", "last"]


async def until(one: Orchestrator, run_id: str, wanted: RunState) -> None:
    for _ in range(10_000):
        run = await one.store.look.run(run_id)
        if run is not None and run.state is wanted:
            return
    pytest.fail(f"{run_id} is not {wanted}")


async def signals_taken(one: Orchestrator, run_id: str, count: int) -> None:
    for _ in range(10_000):
        state = await one.operator.state(run_id)
        if len(state.signals) == count and state.state is RunState.WAITING:
            return
    pytest.fail("the signal was not taken")


async def test_the_audit_log_never_goes_back(site: Site) -> None:
    async with opened(site.live) as store:
        log = AuditLog(store, store.clock, "chain-1")
        await log.write(actor="ann", action="runs.cancel", target="1", result=Result.SUCCESS)
    site.back_up()
    async with opened(site.live) as store:
        other = AuditLog(store, store.clock, "chain-2")
        for number in range(3):
            await other.write(
                actor="ben", action="runs.cancel", target=str(number), result=Result.SUCCESS
            )
        before = await check_audit(store)
    done = await carried(site)
    assert done.audit == 4
    async with opened(site.restored) as store:
        after = await check_audit(store)
    assert after.flaws == []
    assert after.heads == before.heads


async def test_a_live_store_that_cannot_be_read_is_named_and_loses_no_more(site: Site) -> None:
    async with opened(site.live) as store:
        await store.commit(Batch(changes=(PutRecord("outbox", "k", {"x": 1}, 0),)))
    site.back_up()
    async with opened(site.live) as old, opened(site.restored) as new:
        setattr(old, "look", Broken(old.look))  # noqa: B010 (a property of the protocol)
        done = await carry_over(old, new, Under(2, 1, "a test"))
    assert [line.partition(":")[0] for line in done.trouble] == [
        "the runs of the store that is replaced"
    ]


class Broken:
    """A look at pages that are gone."""

    def __init__(self, look: object) -> None:
        self._look = look

    async def runs(self, wanted: object) -> object:
        from llm_orchestrator.errors import StoreDamaged

        raise StoreDamaged("pages are damaged")
