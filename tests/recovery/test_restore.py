"""A store that is destroyed comes back, its runs go on, and nothing is paid for twice."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from llm_orchestrator import Context, Orchestrator, step, workflow
from llm_orchestrator.clock import RealClock
from llm_orchestrator.config import Config
from llm_orchestrator.drill.postgres_lab import PostgresServer
from llm_orchestrator.engine.audit import verify_store
from llm_orchestrator.errors import StoreDamaged
from llm_orchestrator.model import RunState
from llm_orchestrator.recovery import reconcile
from llm_orchestrator.recovery.restore import Request, Restored, restore
from llm_orchestrator.store.base import RunFilter
from llm_orchestrator.wire import store_path
from llm_orchestrator.wire.backups import Backups
from llm_orchestrator.wire.recovery import make_checks
from tests.recovery.kills import KILLS
from tests.recovery.test_carry import opened
from tests.recovery.test_tables import client

RUNS = 200
ROOT = Path(__file__).resolve().parents[2]


class Ledger:
    """What was really done, told by whoever does it, on a disk of its own."""

    def __init__(self) -> None:
        self.file: Path | None = None

    def book(self, line: str) -> None:
        assert self.file is not None
        with self.file.open("a") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

    def lines(self) -> list[str]:
        assert self.file is not None
        return self.file.read_text().splitlines() if self.file.exists() else []


ledger = Ledger()


@step(effect="once")
def pay(name: str) -> str:
    ledger.book(name)
    return f"paid {name}"


@step
async def look(name: str) -> str:
    return f"saw {name}"


@workflow
async def trade(ctx: Context, n: int) -> list[str]:
    first = await ctx.step(look, f"{n}-shelf")
    second = await ctx.step(pay, f"{n}-a")
    await ctx.wait_signal("go")
    third = await ctx.step(pay, f"{n}-b")
    return [first, second, third]


def expected(n: int) -> list[str]:
    return [f"saw {n}-shelf", f"paid {n}-a", f"paid {n}-b"]


class Site:
    """A live store and its backups."""

    def __init__(self, url: str, folder: Path, server: PostgresServer | None) -> None:
        self.url = url
        self.config = Config(store=url, data_dir=folder, backup_dir=folder / "backups")
        self.backups = Backups(self.config, RealClock())
        self._server = server

    def destroy(self) -> None:
        """Nothing of the live store is left."""
        if self._server is None:
            file = store_path(self.url)
            for path in file.parent.glob(f"{file.name}*"):
                path.unlink()
        else:
            name = self.url.rpartition("/")[2]
            self._server.psql(f'DROP DATABASE "{name}" WITH (FORCE)')

    async def back_up(self) -> str:
        async with client(self.url) as store:
            return (await self.backups.create(store)).manifest.backup_id

    async def restore(self, backup_id: str = "latest") -> Restored:
        catalogue = await self.backups.catalogue(None)
        async with self.backups.base(catalogue, await catalogue.find(backup_id)) as base:
            return await restore(
                self.backups.copier,
                Request(base, why=base.manifest.backup_id),
                checks=make_checks(self.config, RealClock()),
                clock=RealClock(),
            )


@pytest.fixture(params=["sqlite", "postgres"])
async def site(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Site]:
    ledger.file = tmp_path / "ledger"
    if request.param == "sqlite":
        (tmp_path / "live").mkdir()
        yield Site(f"sqlite:///{tmp_path / 'live' / 'runs.db'}", tmp_path, None)
        return
    server: PostgresServer = request.getfixturevalue("postgres_server")
    name = f"{request.getfixturevalue('postgres_url').rpartition('/')[2]}_live"
    made = Site(server.create_database(name), tmp_path, server)
    yield made
    names = server.psql("SELECT datname FROM pg_database").splitlines()
    for each in names:
        if each.startswith(name):
            server.psql(f'DROP DATABASE "{each}" WITH (FORCE)')


async def parked(one: Orchestrator, count: int) -> None:
    """Until so many runs wait for their signal."""
    async with asyncio.timeout(120):
        while True:
            wanted = RunFilter(states=(RunState.WAITING,), limit=10_000)
            if len(await one.store.look.runs(wanted)) >= count:
                return
            await one.clock.sleep(0.02)


async def test_destroyed_under_load_every_run_of_the_backup_goes_on(site: Site) -> None:
    async with Orchestrator(site.url) as one:
        runs = [await one.start(trade, {"n": n}) for n in range(RUNS)]
        await parked(one, RUNS)
        for run_id in runs[: RUNS // 2]:
            await one.operator.signal(run_id, "go")
        await site.back_up()  # in the middle of it
        lost = await one.start(trade, {"n": RUNS})
        await parked(one, 1)
    site.destroy()
    done = await site.restore()
    assert done.old == ""
    assert done.runs == RUNS
    assert done.identity.generation == 2
    async with Orchestrator(site.url, workflows=[trade]) as one:
        for run_id in runs[RUNS // 2 :]:
            await one.operator.signal(run_id, "go")
        for n, run_id in enumerate(runs):
            await settled(one, run_id)
            assert await one.result(run_id) == expected(n)
        assert await one.store.look.run(lost) is None
        assert await verify_store(one.store) == []
    booked = ledger.lines()
    before = {f"{n}-a" for n in range(RUNS)}
    assert before <= {line for line in booked if booked.count(line) == 1}


async def settled(one: Orchestrator, run_id: str) -> None:
    """A step that was cut off in the middle is for a person: here, it was not done."""
    state = await one.operator.state(run_id)
    if state.state is RunState.PAUSED and state.intents:
        for each in list(state.intents):
            await one.operator.decide(run_id, each, "retry")


async def test_what_was_paid_after_the_backup_is_not_paid_again(site: Site) -> None:
    async with Orchestrator(site.url) as one:
        early = await one.start(trade, {"n": 1})
        await parked(one, 1)
        await site.back_up()
        await one.operator.signal(early, "go")
        assert await one.result(early) == expected(1)
        late = await one.start(trade, {"n": 2}, idempotency_key="order")
        await parked(one, 1)
    done = await site.restore()
    assert sorted(done.carried.held) == sorted([early, late])
    assert done.carried.trouble == []
    assert done.old
    async with Orchestrator(site.url, workflows=[trade]) as one:
        assert one.store.generation == 2
        assert await one.start(trade, {"n": 2}, idempotency_key="order") == late
        held = {each.run_id: each for each in await reconcile.held_runs(one.store)}
        assert [effect.step for effect in held[early].effects] == ["pay#2"]
        assert [effect.step for effect in held[late].effects] == ["pay"]
        for run_id in (early, late):
            await reconcile.accept(one.store, one.clock, run_id, by="a test")
        await one.operator.signal(late, "go")
        assert await one.result(early) == expected(1)
        assert await one.result(late) == expected(2)
    assert sorted(ledger.lines()) == ["1-a", "1-b", "2-a", "2-b"]


async def test_a_bad_copy_is_refused_and_the_live_store_stays(site: Site) -> None:
    async with Orchestrator(site.url) as one:
        run_id = await one.start(trade, {"n": 1})
        await parked(one, 1)
        await site.back_up()
    before = await site.backups.copier.identity()
    catalogue = await site.backups.catalogue(None)
    async with site.backups.base(catalogue, await catalogue.find("latest")) as base:
        heads = [base.manifest.heads[0]._replace(digest="00" * 32)]
        wrong = base._replace(manifest=base.manifest.model_copy(update={"heads": heads}))
        with pytest.raises(StoreDamaged, match="nothing was changed"):
            await restore(
                site.backups.copier,
                Request(wrong),
                checks=make_checks(site.config, RealClock()),
                clock=RealClock(),
            )
    assert await site.backups.copier.identity() == before
    assert await site.backups.copier.leftovers() == []
    async with Orchestrator(site.url, workflows=[trade]) as one:
        await one.operator.signal(run_id, "go")
        assert await one.result(run_id) == expected(1)


async def test_a_file_grows_into_a_server_and_comes_back(
    tmp_path: Path, postgres_url: str, postgres_server: PostgresServer
) -> None:
    ledger.file = tmp_path / "ledger"
    small = Site(f"sqlite:///{tmp_path / 'runs.db'}", tmp_path, None)
    async with Orchestrator(small.url) as one:
        run_id = await one.start(trade, {"n": 1})
        await parked(one, 1)
        await small.back_up()
    server = Site(postgres_url, tmp_path, postgres_server)
    done = await server.restore()
    [unknown] = done.carried.trouble
    assert "nothing here knows it" in unknown
    async with Orchestrator(postgres_url, workflows=[trade]) as one:
        await one.operator.signal(run_id, "go")
        assert await one.result(run_id) == expected(1)
    for name in await server.backups.copier.kept():
        await server.backups.copier.drop(name)


def moments() -> list[tuple[str, float]]:
    """When it is killed: a part of the time that it takes."""
    if KILLS > 5:
        kinds = ("sqlite", "postgres")
        return [(kind, (number + 0.5) / KILLS) for kind in kinds for number in range(KILLS)]
    return [
        *(("sqlite", part) for part in (0.3, 0.5, 0.7, 0.8, 0.95)),
        *(("postgres", part) for part in (0.6, 0.9)),
    ]


@pytest.mark.parametrize(("site", "part"), moments(), indirect=["site"])
async def test_killed_anywhere_it_is_the_old_store_or_the_new_one(site: Site, part: float) -> None:
    async with Orchestrator(site.url) as one:
        runs = [await one.start(trade, {"n": n}) for n in range(5)]
        await parked(one, 5)
        backup_id = await site.back_up()
        for run_id in runs:
            await one.operator.signal(run_id, "go")
        for n, run_id in enumerate(runs):
            assert await one.result(run_id) == expected(n)
    took = await child(site, backup_id, None)
    await child(site, backup_id, took * part)
    identity = await site.backups.copier.identity()
    assert identity is not None
    assert identity.generation in (2, 3)
    async with opened(site.url) as store:
        assert await verify_store(store) == []
        assert len(await store.look.run_ids()) == 5
    done = await site.restore(backup_id)
    assert done.identity.generation == identity.generation + 1
    assert await site.backups.copier.leftovers() == []
    async with Orchestrator(site.url, workflows=[trade]) as one:
        for held in await reconcile.held_runs(one.store):
            await reconcile.accept(one.store, one.clock, held.run_id, by="a test")
        for n, run_id in enumerate(runs):
            assert await one.result(run_id) == expected(n)
    assert len(ledger.lines()) == 10


async def child(site: Site, backup_id: str, kill_after_s: float | None) -> float:
    """A restore in a process of its own, killed after a time or not at all; how long it took."""
    script = "import asyncio,sys; from tests.recovery.test_restore import in_child; "
    script += "asyncio.run(in_child(*sys.argv[1:]))"
    folder = str(site.config.data_dir)
    clock = RealClock()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, site.url, folder, backup_id, cwd=ROOT, start_new_session=True
    )
    begun = clock.monotonic()
    try:
        async with asyncio.timeout(kill_after_s):
            assert await process.wait() == 0
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
    return clock.monotonic() - begun


async def in_child(url: str, folder: str, backup_id: str) -> None:
    await Site(url, Path(folder), None).restore(backup_id)
