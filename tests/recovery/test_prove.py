"""A proof finds what is wrong with a copy, and moves nothing that is in it."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from llm_orchestrator import Context, Orchestrator, step, workflow
from llm_orchestrator.clock import RealClock
from llm_orchestrator.config import Config
from llm_orchestrator.engine.maintenance import KIND, MODE, Mode, Standing
from llm_orchestrator.model import RunState, Workflow
from llm_orchestrator.recovery.prove import Proof, check_copy, record_proof
from llm_orchestrator.recovery.readiness import read_backups
from llm_orchestrator.store.base import Batch, Database, PutRecord, RunFilter
from llm_orchestrator.store.copying import Identity
from llm_orchestrator.store.sqlite_tables import SQLiteTables
from llm_orchestrator.wire import make_store
from llm_orchestrator.wire.recovery import make_checks
from tests.recovery.test_carry import opened

calls: list[str] = []
CONFIG = Config()


@step(effect="once")
async def pay(name: str) -> str:
    calls.append(name)
    return name


@workflow
async def shop(ctx: Context) -> str:
    await ctx.sleep(0.001)
    await ctx.wait_signal("go")
    return str(await ctx.step(pay, "a"))


class Copied:
    """A copy that stands in a file of its own."""

    def __init__(self, file: Path) -> None:
        self.url = self.shown = f"sqlite:///{file}"
        self.file = file

    def store(self) -> Database:
        return make_store(CONFIG, RealClock(), url=self.url)

    def tables(self) -> SQLiteTables:
        return SQLiteTables(self.file)

    async def take_over(
        self, identity: Identity, *, last: Callable[[Database], Awaitable[None]] | None = None
    ) -> str:
        raise NotImplementedError

    async def discard(self) -> None:
        self.file.unlink()


@pytest.fixture
async def copied(tmp_path: Path) -> Copied:
    """A store in maintenance with a run that is due, and one that waits."""
    calls.clear()
    live = tmp_path / "live.db"
    async with Orchestrator(f"sqlite:///{live}") as one:
        run_id = await one.start(shop)
        while (await one.operator.state(run_id)).waits.keys() == set():
            await one.clock.sleep(0.001)
        while (await one.operator.state(run_id)).state is not RunState.WAITING:
            await one.clock.sleep(0.001)
    async with opened(f"sqlite:///{live}") as store:
        await Orchestrator(store=store).operator.signal(run_id, "go")  # it is due now
        order = PutRecord(KIND, MODE, Standing(enabled=True, mode=Mode.DRAIN).to_json(), 0)
        await store.commit(Batch(changes=(order,)))
    file = tmp_path / "copy.db"
    shutil.copy(live, file)
    return Copied(file)


async def test_a_whole_copy_passes_and_nobody_elses_run_moves(copied: Copied) -> None:
    before = await states(copied)
    runs, flaws = await check_copy(copied, None, make_checks(CONFIG, RealClock()))
    assert (runs, flaws) == (1, [])
    after = await states(copied)
    assert after == before
    assert [flow.name for flow in await workflows(copied)] == ["shop"]
    assert calls == []


async def states(copied: Copied) -> dict[str, str]:
    store = copied.store()
    await store.open_as_client()
    found = {run.run_id: run.state.value for run in await store.look.runs(RunFilter())}
    await store.close()
    return found


async def workflows(copied: Copied) -> list[Workflow]:
    store = copied.store()
    await store.open_as_client()
    found = await store.shelf.workflows()
    await store.close()
    return found


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        ("UPDATE journal SET payload = X'7b7d' WHERE seq = 1", "entry 1"),
        ("UPDATE runs SET state = 'completed', finished_at = 1", "run"),
        ("UPDATE inbox SET payload = X'7b7d'", "message"),
        ("UPDATE workflows SET definition = X'7b7d'", "definition"),
        ("DELETE FROM journal WHERE seq = 2", "entry"),
    ],
)
async def test_what_is_damaged_is_named(copied: Copied, damage: str, what: str) -> None:
    with sqlite3.connect(copied.file) as database:
        database.execute(damage)
    _, flaws = await check_copy(copied, None, make_checks(CONFIG, RealClock()))
    assert flaws
    assert what in flaws[0]


async def test_an_engine_that_cannot_work_is_a_flaw(copied: Copied) -> None:
    with sqlite3.connect(copied.file) as database:
        database.execute(
            "CREATE TRIGGER no BEFORE INSERT ON runs BEGIN SELECT raise(ABORT,'x');END"
        )
    _, flaws = await check_copy(copied, None, make_checks(CONFIG, RealClock()))
    assert len(flaws) == 1
    assert flaws[0].startswith("an engine on the copy: ")


async def test_a_failed_proof_does_not_hide_the_last_good_one(tmp_path: Path) -> None:
    async with opened(f"sqlite:///{tmp_path / 'live.db'}") as store:
        await record_proof(store, Proof("one", runs=3), 1_000_000)
        await record_proof(store, Proof("two", flaws=["bad"]), 2_000_000)
        backups = await read_backups(store)
    assert backups.proved["backup_id"] == "one"
    assert backups.disproved["flaws"] == ["bad"]
    assert backups.proof_age_s(3_000_000) == 2.0
