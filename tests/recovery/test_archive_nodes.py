"""Several nodes on one PostgreSQL archive into one place: a folder, or an object store."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import threading
from asyncio.subprocess import Process
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llm_orchestrator import Context, Orchestrator, step, workflow
from llm_orchestrator.clock import RealClock
from llm_orchestrator.config import Config
from llm_orchestrator.errors import StoreUnavailable
from llm_orchestrator.recovery.archive_read import read_incarnations
from llm_orchestrator.wire.archive import archive_place
from tests.recovery import s3_support
from tests.recovery.kills import KILLS
from tests.recovery.test_archive import (
    RUNS,
    STEPS,
    STOP_S,
    chained,
    nothing_is_missing,
    restored,
)
from tests.recovery.test_restore import ROOT, Site, ledger, site

__all__ = ["site"]
on_postgres = pytest.mark.parametrize("site", ["postgres"], indirect=True)


@pytest.fixture(scope="module")
def moto_port() -> Iterator[int]:
    with s3_support.moto() as port:
        yield port


def settings(site: Site, kind: str, port: int) -> Config:
    """Quick leases, and the archive in a folder or in the object store at `port`."""
    folder = site.config.data_dir
    config = replace(site.config, heartbeat_ms=200, lease_ms=1_000)
    if kind == "folder":
        return replace(config, archive_place=str(folder / "elsewhere"))
    for name, secret in (("key", s3_support.KEY), ("secret", s3_support.SECRET)):
        (folder / name).write_text(secret)
    return replace(
        config,
        archive_place=f"s3://{s3_support.BUCKET}/{folder.name}",
        s3_endpoint_url=f"http://127.0.0.1:{port}",
        s3_region="us-east-1",
        s3_storage_class="",
        s3_access_key=f"file:{folder / 'key'}",
        s3_secret_key=f"file:{folder / 'secret'}",
    )


async def serve(url: str, folder: str, kind: str, port: str, first: str) -> None:
    """In a child: accept half of the runs, and drive what there is until killed."""
    ledger.file = Path(folder) / "ledger"
    config = settings(Site(url, Path(folder), None), kind, int(port))
    config = replace(config, data_dir=Path(folder) / f"node-{first}")
    async with Orchestrator(url, workflows=[chained], config=config) as one:
        for n in range(int(first), RUNS, 2):
            run_id = await one.start(chained, {"n": n})
            ledger.book(f"accepted {n} {run_id}")
        await asyncio.Event().wait()


@asynccontextmanager
async def nodes(site: Site, kind: str, port: int) -> AsyncIterator[list[Process]]:
    script = "import asyncio,sys; from tests.recovery.test_archive_nodes import serve; "
    script += "asyncio.run(serve(*sys.argv[1:]))"
    words = (site.url, str(site.config.data_dir), kind, str(port))
    started = [
        await asyncio.create_subprocess_exec(
            sys.executable, "-c", script, *words, str(first), cwd=ROOT
        )
        for first in range(2)
    ]
    try:
        yield started
    finally:
        for each in started:
            if each.returncode is None:
                each.send_signal(signal.SIGKILL)
            await each.wait()


async def booked(lines: int) -> None:
    async with asyncio.timeout(STOP_S):
        while len(ledger.lines()) < lines:
            await RealClock().sleep(0.01)


@on_postgres
@pytest.mark.parametrize(
    ("kind", "seed"), [*(("folder", seed) for seed in range(max(2, KILLS // 2))), ("s3", 7)]
)
async def test_one_dies_then_all_and_the_database(
    site: Site, moto_port: int, kind: str, seed: int
) -> None:
    dice = random.Random(seed)
    most = RUNS * (1 + 2 * STEPS)
    first = dice.randrange(20, most // 2)
    async with nodes(site, kind, moto_port) as started:
        await booked(first)
        started[0].send_signal(signal.SIGKILL)
        await booked(first + dice.randrange(10, most // 5))  # the other one takes its runs over
    before = Counter(ledger.lines())
    site.destroy()
    config = settings(site, kind, moto_port)
    done = await restored(config)
    assert (done.flaws, done.carried.trouble) == ([], [])
    place = archive_place(config, RealClock())
    [one] = await read_incarnations(place)
    assert len(one.streams) == 2
    await nothing_is_missing(config, before, lives=2)


@step(effect="once")
async def pay() -> str:
    ledger.book("paid")
    return "a receipt"


@workflow
async def buys(ctx: Context) -> str:
    return await ctx.step(pay)


async def buy(url: str, folder: str) -> None:
    """In a child: pay, and find that the archive's disk hangs when it comes to saying so."""
    ledger.file = Path(folder) / "ledger"
    flush = os.fdatasync

    def hang(file: Any) -> None:
        if "paid" in ledger.lines() and "elsewhere" in str(
            Path(f"/proc/self/fd/{file}").readlink()
        ):
            threading.Event().wait()
        flush(file)

    os.fdatasync = hang  # type: ignore[assignment]
    config = settings(Site(url, Path(folder), None), "folder", 0)
    async with Orchestrator(url, config=config) as one:
        ledger.book(await one.start(buys))
        await asyncio.Event().wait()


@on_postgres
async def test_what_was_paid_and_never_committed_is_in_the_spool(site: Site) -> None:
    """The result is on the node's disk alone: the restored store takes it."""
    folder = site.config.data_dir
    config = settings(site, "folder", 0)
    script = "import asyncio,sys; from tests.recovery.test_archive_nodes import buy; "
    script += "asyncio.run(buy(*sys.argv[1:]))"
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, site.url, str(folder), cwd=ROOT
    )
    await booked(2)
    async with asyncio.timeout(STOP_S):
        while not any(size_of(each) for each in (folder / "spool").glob("*.spool")):
            await RealClock().sleep(0.01)
    child.send_signal(signal.SIGKILL)
    await child.wait()
    site.destroy()
    await restored(config)
    [run_id] = [line for line in ledger.lines() if line != "paid"]
    async with Orchestrator(site.url, workflows=[buys], config=config) as one:
        assert await one.result(run_id) == "a receipt"
    assert ledger.lines().count("paid") == 1


def size_of(file: Path) -> int:
    return file.stat().st_size


@on_postgres
async def test_an_object_store_that_ignores_conditions_is_refused(
    site: Site, tmp_path: Path
) -> None:
    refused = pytest.raises(StoreUnavailable, match="ignores conditions")
    with s3_support.rclone(tmp_path / "rclone") as port, refused:
        async with Orchestrator(site.url, config=settings(site, "s3", port)):
            pass
