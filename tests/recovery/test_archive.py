"""With the archive in mode `sync` nothing acknowledged is lost, whatever dies and is destroyed.

A child serves runs and books, on a disk of its own, what it did and what it was told is durable. It
is killed at some moment, its store is destroyed, and a store is made anew out of the archive.
"""

from __future__ import annotations

import asyncio
import random
import signal
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from llm_orchestrator import Context, Orchestrator, step, workflow
from llm_orchestrator.clock import RealClock
from llm_orchestrator.config import Config
from llm_orchestrator.engine.audit import verify_store
from llm_orchestrator.errors import ConfigError, NotFound, StoreDamaged, StoreUnavailable
from llm_orchestrator.recovery.archive_read import read_incarnations
from llm_orchestrator.recovery.from_archive import Chosen, Wanted, choose_source
from llm_orchestrator.recovery.places_folder import FolderPlace
from llm_orchestrator.recovery.restore import Request, Restored, restore
from llm_orchestrator.store.base import Batch, PutRecord
from llm_orchestrator.wire import make_store
from llm_orchestrator.wire.archive import archive_place
from llm_orchestrator.wire.backups import Backups, make_copier
from llm_orchestrator.wire.recovery import make_checks
from tests.recovery.kills import KILLS
from tests.recovery.test_restore import ROOT, Site, ledger, site

__all__ = ["site"]
RUNS = 200
STEPS = 4
STOP_S = 120.0


@step
def work(name: str) -> str:
    ledger.book(f"did {name}")
    return f"result {name}"


@workflow
async def chained(ctx: Context, n: int) -> list[str]:
    found = []
    for number in range(STEPS):
        found.append(await ctx.step(work, f"{n}-{number}"))
        ledger.book(f"durable {n}-{number}")
    return found


def expected(n: int) -> list[str]:
    return [f"result {n}-{number}" for number in range(STEPS)]


def archived(site: Site, **settings: object) -> Config:
    folder = site.config.data_dir / "elsewhere"
    return replace(site.config, archive_place=str(folder), **settings)  # type: ignore[arg-type]


async def serve(url: str, folder: str, ledger_file: str, mode: str) -> None:
    """In the child: accept runs and drive them until killed."""
    ledger.file = Path(ledger_file)
    config = archived(Site(url, Path(folder), None), archive_mode=mode)
    async with Orchestrator(url, workflows=[chained], config=config) as one:
        for n in range(RUNS):
            run_id = await one.start(chained, {"n": n})
            ledger.book(f"accepted {n} {run_id}")
        await asyncio.Event().wait()


async def killed(site: Site, lines: int, *, mode: str = "sync") -> None:
    """A child that dies once its ledger has so many lines."""
    script = "import asyncio,sys; from tests.recovery.test_archive import serve; "
    script += "asyncio.run(serve(*sys.argv[1:]))"
    words = (site.url, str(site.config.data_dir), str(ledger.file), mode)
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", script, *words, cwd=ROOT)
    async with asyncio.timeout(STOP_S):
        while len(ledger.lines()) < lines:
            assert process.returncode is None
            await RealClock().sleep(0.01)
    process.send_signal(signal.SIGKILL)
    await process.wait()


async def choose(config: Config, wanted: Wanted | None = None) -> Chosen:
    catalogue = await Backups(config, RealClock()).catalogue(None)
    return await choose_source(archive_place(config, RealClock()), catalogue, wanted or Wanted())


async def restored(config: Config, wanted: Wanted | None = None, *, url: str = "") -> Restored:
    """As `llmo restore --from-archive`."""
    chosen = await choose(config, wanted)
    copier = make_copier(config, RealClock(), url=url)
    backups = Backups(config, RealClock())
    fill = chosen.fill([], may_miss=False)
    checks = make_checks(config, RealClock())
    if chosen.item is None:
        request = Request(None, fill, why="a test")
        return await restore(copier, request, checks=checks, clock=RealClock())
    async with backups.base(await backups.catalogue(None), chosen.item) as base:
        request = Request(base, fill, why="a test")
        return await restore(copier, request, checks=checks, clock=RealClock())


@pytest.mark.parametrize("seed", range(KILLS))
async def test_killed_and_destroyed_nothing_acknowledged_is_missing(site: Site, seed: int) -> None:
    most = RUNS * (1 + 2 * STEPS)
    await killed(site, random.Random(seed).randrange(10, most * 3 // 4))
    before = Counter(ledger.lines())
    site.destroy()
    config = archived(site)
    done = await restored(config)
    assert (done.old, done.flaws, done.carried.trouble) == ("", [], [])
    assert done.identity.generation == 2
    await nothing_is_missing(config, before)


async def nothing_is_missing(config: Config, before: Counter[str], *, lives: int = 1) -> None:
    """Every accepted run ends as it must; what was durable was not done again.

    `lives`: so often a process was killed, and each time what was in flight may be done again.
    """
    accepted = dict(line.split()[1:] for line in before if line.startswith("accepted"))
    async with Orchestrator(config.store_url, workflows=[chained], config=config) as one:
        for n, run_id in accepted.items():
            assert await one.result(run_id) == expected(int(n))
        assert await verify_store(one.store) == []
    after = Counter(ledger.lines())
    durable = {line.split()[1] for line in before if line.startswith("durable")}
    assert {name for name in durable if after[f"did {name}"] != before[f"did {name}"]} == set()
    doubled = [line for line, times in after.items() if line.startswith("did") and times > 1]
    assert all(1 <= before[line] <= lives and after[line] <= lives + 1 for line in doubled)


async def test_what_an_async_archive_lacks_is_in_a_new_backup(site: Site) -> None:
    """Killed, it lacks its tail, which the store has; the next process finds that out."""
    await killed(site, RUNS * STEPS, mode="async")
    config = archived(site, archive_mode="async")
    await drive(config, range(0), until=1)
    accepted = [line.split() for line in ledger.lines() if line.startswith("accepted")]
    site.destroy()
    done = await restored(config)
    assert done.flaws == []
    async with Orchestrator(site.url, workflows=[chained], config=config) as one:
        for _, n, run_id in accepted:
            assert await one.result(run_id) == expected(int(n))


@pytest.fixture
def small(tmp_path: Path) -> Site:
    ledger.file = tmp_path / "ledger"
    (tmp_path / "live").mkdir()
    return Site(f"sqlite:///{tmp_path / 'live' / 'runs.db'}", tmp_path, None)


async def drive(config: Config, numbers: range, *, until: int = 0) -> list[str]:
    """Runs that end, and `until` so many backups there are."""
    async with Orchestrator(config.store_url, workflows=[chained], config=config) as one:
        runs = [await one.start(chained, {"n": n}) for n in numbers]
        for run_id in runs:
            await one.result(run_id)
        async with asyncio.timeout(STOP_S):
            while len(list(config.backup_folder.glob("llm-*"))) < until:
                await one.clock.sleep(0.05)
    return runs


async def test_a_base_and_what_came_after_it(site: Site) -> None:
    """After a restore the archive begins anew: it leads nowhere without a backup made since."""
    config = archived(site)
    first = await drive(config, range(3))
    site.destroy()
    await restored(config)
    second = await drive(config, range(3, 5), until=1)  # its engine makes a backup by itself
    third = await drive(config, range(5, 7))
    site.destroy()
    chosen = await choose(config)
    assert chosen.item is not None
    done = await restored(config)
    assert done.identity.generation == 3
    async with Orchestrator(site.url, workflows=[chained], config=config) as one:
        for n, run_id in enumerate([*first, *second, *third]):
            assert await one.result(run_id) == expected(n)
    assert max(Counter(ledger.lines()).values()) == 1
    place = FolderPlace(Path(config.archive_place))
    assert [one.generation for one in await read_incarnations(place)][-2:] == [2, 1]


async def test_back_to_an_entry_holds_what_was_done_since(small: Site) -> None:
    config = archived(small)
    first, second = await drive(config, range(2))
    small.destroy()
    done = await restored(config, Wanted(run_id=first, seq=3))
    assert done.carried.runs >= 1
    store = make_store(config, RealClock())
    await store.open_as_client()
    journal = (await store.look.load([first]))[first]
    assert [entry.kind for entry in journal.entries].count("rewound") == 1
    await store.close()
    with pytest.raises(NotFound, match="is not in the stream archive"):
        await choose(config, Wanted(run_id=second, seq=99))


async def test_a_site_on_a_file_grows_into_a_server(small: Site, postgres_url: str) -> None:
    config = archived(small)
    runs = await drive(config, range(3))
    done = await restored(config, url=postgres_url)
    assert done.runs == 3
    async with Orchestrator(postgres_url, workflows=[chained]) as one:
        for n, run_id in enumerate(runs):
            assert await one.result(run_id) == expected(n)
    for name in await (copier := make_copier(config, RealClock(), url=postgres_url)).kept():
        await copier.drop(name)


def swap(path: Path, to: Path, *, content: str = "") -> None:
    path.rename(to)
    if content:
        path.write_text(content)


async def test_a_process_that_does_not_archive_may_not_write(small: Site) -> None:
    await drive(archived(small), range(1))
    with pytest.raises(ConfigError, match="archived to"):
        async with Orchestrator(small.url, config=small.config):
            pass
    store = make_store(small.config, RealClock())
    await store.open_as_client()
    with pytest.raises(ConfigError, match="would be missing there"):
        await store.commit(Batch(changes=(PutRecord("kind", "key", 1, 0),)))
    await store.close()


async def test_another_place_is_refused(small: Site) -> None:
    config = archived(small)
    await drive(config, range(1))
    place = Path(config.archive_place)
    other = replace(config, archive_place=str(place.parent / "other"))
    with pytest.raises(ConfigError, match="and not to"):
        async with Orchestrator(small.url, config=other):
            pass
    swap(place, place.parent / "gone")  # as on another machine
    with pytest.raises(ConfigError, match="its mark is not there"):
        async with Orchestrator(small.url, config=config):
            pass


async def test_a_place_that_is_away_stops_or_degrades_a_start(small: Site) -> None:
    config = archived(small)
    await drive(config, range(1))
    place = Path(config.archive_place)
    swap(place, place.parent / "away", content="no folder")
    with pytest.raises(StoreUnavailable, match="cannot hold the stream archive"):
        async with Orchestrator(small.url, config=config):
            pass
    await drive(replace(config, archive_on_failure="degrade"), range(1, 2))
    swap(place, place.parent / "file")
    swap(place.parent / "away", place)
    await drive(config, range(2, 3), until=1)  # what the archive lacks is in a new backup
    small.destroy()
    aside = replace(config, backup_dir=config.data_dir / "none")
    with pytest.raises(StoreDamaged, match="alone is not enough"):
        await choose(aside)
    assert (await restored(config)).runs == 3
