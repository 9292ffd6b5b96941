"""Back to a moment, a place in the log, a restore point: what was before is there, the rest not."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from llm_orchestrator import Orchestrator
from llm_orchestrator.clock import RealClock
from llm_orchestrator.config import Config
from llm_orchestrator.errors import ConfigError, NotFound, StoreDamaged
from llm_orchestrator.recovery import reconcile
from llm_orchestrator.recovery.barman import Target, missing, place
from llm_orchestrator.recovery.restore import Request, Restored, restore
from llm_orchestrator.wire.backups import make_copier
from llm_orchestrator.wire.barman import base_at, make_barman
from llm_orchestrator.wire.recovery import make_checks
from tests.acceptance.cli_support import Shell
from tests.recovery.barman_lab import NAME, BarmanLab, tools_on_path
from tests.recovery.test_restore import expected, ledger, parked, trade

NEVER = 1e9


@pytest.fixture(scope="module")
def lab() -> Iterator[BarmanLab]:
    with tools_on_path(), BarmanLab() as made:
        made.call("backup", "--wait", NAME)
        yield made


@pytest.fixture
def config(lab: BarmanLab, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Config]:
    ledger.file = tmp_path / "ledger"
    name = f"live_{abs(hash(request.node.name))}"
    url = lab.server.create_database(name)
    yield Config(store=url, data_dir=tmp_path, barman_server=NAME, barman_config=str(lab.config))
    for each in lab.server.psql("SELECT datname FROM pg_database").splitlines():
        if each.startswith(name):
            lab.server.psql(f'DROP DATABASE "{each}" WITH (FORCE)')


async def restored(config: Config, target: Target) -> Restored:
    """As `llmo restore --to`."""
    await make_barman(config, RealClock()).sync()
    async with base_at(config, RealClock(), target) as (base, is_reached):
        assert is_reached
        return await restore(
            make_copier(config, RealClock()),
            Request(base, why=target.shown),
            checks=make_checks(config, RealClock()),
            clock=RealClock(),
        )


@pytest.mark.parametrize("kind", ["moment", "lsn", "name"])
async def test_exactly_to_the_point(lab: BarmanLab, config: Config, kind: str) -> None:
    async with Orchestrator(config.store_url) as one:
        first = await one.start(trade, {"n": 1})
        await parked(one, 1)
        target = Target(at_us=one.store.clock.now_us())
        if kind == "lsn":
            target = Target(lsn=lab.server.psql("SELECT pg_current_wal_lsn()"))
        elif kind == "name":
            target = Target(name=f"before_{config.store_url.rpartition('_')[2]}")
            lab.server.psql(f"SELECT pg_create_restore_point('{target.name}')")
        await one.operator.signal(first, "go")
        assert await one.result(first) == expected(1)
        second = await one.start(trade, {"n": 2})
        await parked(one, 1)
    outside = lab.tablespace()
    done = await restored(config, target)
    assert lab.tablespace() == outside, "the live server's tablespace was written to"
    assert done.old
    assert done.carried.trouble == []
    assert sorted(done.carried.held) == sorted([first, second])  # both have paid since
    async with Orchestrator(config.store_url, workflows=[trade]) as one:
        assert one.store.generation == 2
        for run_id in (first, second):
            await reconcile.accept(one.store, one.clock, run_id, by="a test")
        await one.operator.signal(second, "go")
        assert await one.result(first) == expected(1)
        assert await one.result(second) == expected(2)
    assert sorted(ledger.lines()) == ["1-a", "1-b", "2-a", "2-b"]


def test_from_the_command_line(lab: BarmanLab, config: Config, tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    shell.environment["LLM_ORCHESTRATOR_URL"] = config.store_url
    shell.environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]  # rsync's
    settings = f'barman_server = "{NAME}"\nbarman_config = "{lab.config}"\n'
    (tmp_path / "llm-orchestrator.toml").write_text(settings)
    assert shell("run", "hello.yaml", "--input", "who=one").code == 0
    lab.server.psql("SELECT pg_create_restore_point('by_hand')")
    assert shell("run", "hello.yaml", "--input", "who=two").code == 0
    rows = {row["check"]: row for row in shell("backup", "check", "--json").json}
    assert rows["barman log"]["state"] == "ok"
    plan = shell("restore", "--to", "by_hand", "--dry-run", "--json").json
    assert plan["up_to"] == "by_hand"
    done = shell("restore", "--to", "by_hand", "--yes", "--json")
    assert done.code == 0, done.err
    assert (done.json["runs"], done.json["rewound"]["runs"]) == (1, 1)
    exposed = {row["mechanism"]: row for row in shell("dr", "status", "--json").json["exposure"]}
    assert "barman" in exposed["wal"]["detail"]
    assert exposed["replica"]["seconds"] is None
    assert shell("backup", "create", "--type", "incr").code == 2


async def test_the_live_store_is_gone(lab: BarmanLab, config: Config) -> None:
    """Somebody has dropped it: what was done until then comes back."""
    async with Orchestrator(config.store_url) as one:
        run_id = await one.start(trade, {"n": 1})
        await parked(one, 1)
        moment = one.store.clock.now_us()
    lab.server.psql(f'DROP DATABASE "{config.store_url.rpartition("/")[2]}" WITH (FORCE)')
    done = await restored(config, Target(at_us=moment))
    assert done.old == ""
    async with Orchestrator(config.store_url, workflows=[trade]) as one:
        await one.operator.signal(run_id, "go")
        assert await one.result(run_id) == expected(1)


async def test_a_moment_behind_the_end_of_the_log(config: Config) -> None:
    async with Orchestrator(config.store_url) as one:
        await one.start(trade, {"n": 1})
        await parked(one, 1)
        later = one.store.clock.now_us() + 3_600_000_000
    await make_barman(config, RealClock()).sync()
    async with base_at(config, RealClock(), Target(at_us=later)) as (base, is_reached):
        assert not is_reached
        assert base.manifest.counts["runs"] == 1


async def test_what_cannot_be_reached_is_said(lab: BarmanLab, config: Config) -> None:
    for target, what in (
        (Target(at_us=1_000_000), "was made before"),
        (Target(lsn="0/1"), "was made before"),
        (Target(name="nobody_made_it"), "is in no log"),
    ):
        with pytest.raises(NotFound, match=what):
            async with base_at(config, RealClock(), target):
                pass
    assert list(lab.home.glob(".llmo-*")) == []


async def test_cut_short_nothing_is_left(lab: BarmanLab, config: Config) -> None:
    """Whoever is cancelled while the log is replayed leaves no server and no folder."""
    async with Orchestrator(config.store_url) as one:
        await one.start(trade, {"n": 1})
        moment = one.store.clock.now_us()
    await make_barman(config, RealClock()).sync()
    entered = asyncio.Event()

    async def stay() -> None:
        async with base_at(config, RealClock(), Target(at_us=moment)):
            entered.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(stay())
    async with asyncio.timeout(120):
        await entered.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert list(lab.home.glob(".llmo-*")) == []


async def test_a_check_knows_gaps_and_ages(lab: BarmanLab, config: Config) -> None:
    barman = make_barman(config, RealClock())
    now_us = RealClock().now_us()
    found = {each.name: each for each in await barman.check(now_us=now_us, age_s_max=NEVER)}
    assert found["barman log"].is_good, found
    old = await barman.check(now_us=now_us + 90_000_000_000, age_s_max=3_600)
    assert [each.name for each in old if not each.is_good] == ["barman base"]
    for _ in range(3):
        lab.server.psql("SELECT pg_logical_emit_message(true, 'a', 'b')")
        lab.call("switch-wal", "--force", "--archive", NAME)
    *_, lost, _ = lab.segments()
    content = lost.read_bytes()
    lost.unlink()
    try:
        found = {each.name: each for each in await barman.check(now_us=now_us, age_s_max=NEVER)}
        assert not found["barman log"].is_good
        assert lost.name in found["barman log"].detail
        with pytest.raises(StoreDamaged, match=lost.name):
            async with base_at(config, RealClock(), Target(at_us=now_us)):
                pass
    finally:
        lost.write_bytes(content)


async def test_what_has_changed_only_needs_a_newer_server(config: Config) -> None:
    barman = make_barman(config, RealClock())
    assert (await barman.backup(is_incremental=False)).kind == "full"
    with pytest.raises(ConfigError, match="cannot back up what has changed only"):
        await barman.backup(is_incremental=True)
    nowhere = replace(config, barman_server="nowhere")
    found = await make_barman(nowhere, RealClock()).check(now_us=0, age_s_max=NEVER)
    assert [each.is_good for each in found] == [False]
    for wrong in (replace(config, barman_server=""), replace(config, store="sqlite:///a.db")):
        with pytest.raises(ConfigError):
            make_barman(wrong, RealClock())


async def test_incremental_on_a_newer_server(tmp_path: Path) -> None:
    ledger.file = tmp_path / "ledger"
    with tools_on_path("wheel"), BarmanLab("wheel") as lab:
        url = lab.server.create_database("live")
        config = Config(
            store=url, data_dir=tmp_path, barman_server=NAME, barman_config=str(lab.config)
        )
        barman = make_barman(config, RealClock())
        await barman.backup(is_incremental=False)
        async with Orchestrator(url) as one:
            run_id = await one.start(trade, {"n": 1})
            await parked(one, 1)
            made = await barman.backup(is_incremental=True)
            assert made.kind == "incremental"
            moment = one.store.clock.now_us()
            await one.operator.signal(run_id, "go")
            await one.result(run_id)
        done = await restored(config, Target(at_us=moment))
        assert done.runs == 1


def test_gaps_are_named() -> None:
    names = ["000000010000000000000001", "000000010000000000000003", "00000002.history"]
    assert missing(names) == ["000000010000000000000002"]
    names = ["0000000100000000000000FE", "0000000100000000000000FF", "000000010000000100000000"]
    assert missing(names) == []
    assert missing([*names, "000000020000000100000000", "000000020000000100000001"]) == []
    assert missing([*names, "000000020000000100000002"]) == ["000000020000000100000001"]
    assert missing([]) == []
    assert place("1/0") > place("0/FFFFFFFF")
