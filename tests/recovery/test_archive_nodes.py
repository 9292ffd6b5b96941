"""Several nodes on one PostgreSQL archive into one place: a folder, or an object store."""

from __future__ import annotations

import asyncio
import random
import signal
import sys
from asyncio.subprocess import Process
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from llm_orchestrator import Orchestrator
from llm_orchestrator.clock import RealClock
from llm_orchestrator.config import Config
from llm_orchestrator.errors import StoreUnavailable
from llm_orchestrator.recovery.archive_read import read_incarnations
from llm_orchestrator.wire.archive import archive_place
from tests.recovery import s3_support
from tests.recovery.kills import KILLS
from tests.recovery.test_archive import (
    ROOT,
    RUNS,
    STEPS,
    STOP_S,
    chained,
    nothing_is_missing,
    restored,
)
from tests.recovery.test_restore import Site, ledger, site

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


@on_postgres
async def test_an_object_store_that_ignores_conditions_is_refused(
    site: Site, tmp_path: Path
) -> None:
    refused = pytest.raises(StoreUnavailable, match="ignores conditions")
    with s3_support.rclone(tmp_path / "rclone") as port, refused:
        async with Orchestrator(site.url, config=settings(site, "s3", port)):
            pass
