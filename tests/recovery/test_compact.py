"""Segments go once a kept backup holds what is in them, and a rebuild knows that it needs one."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from llm_orchestrator.clock import RealClock
from llm_orchestrator.config import Config
from llm_orchestrator.errors import StoreDamaged
from llm_orchestrator.model import MICROSECONDS
from llm_orchestrator.recovery import stream_sinks
from llm_orchestrator.recovery.archive_read import read_incarnations
from llm_orchestrator.recovery.compact import ENDED_S, MARGIN_S
from llm_orchestrator.recovery.places_folder import FolderPlace
from llm_orchestrator.store.base import Database
from llm_orchestrator.wire import make_store
from llm_orchestrator.wire.backups import Backups
from tests.recovery.test_archive import archived, choose, drive, restored, small
from tests.recovery.test_restore import Site

__all__ = ["small"]


@pytest.fixture
def config(small: Site, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setattr(stream_sinks, "SEGMENT_BYTES", 600)
    return archived(small)


@asynccontextmanager
async def opened(config: Config) -> AsyncIterator[Database]:
    store = make_store(config, RealClock())
    await store.open_as_client()
    try:
        yield store
    finally:
        await store.close()


def segments(config: Config) -> list[Path]:
    return sorted((Path(config.archive_place) / "segments").glob("*/*"))


def age(files: list[Path], seconds: float) -> None:
    """As if they had been written so long ago."""
    moment = RealClock().now_us() / MICROSECONDS - seconds
    for file in files:
        os.utime(file, (moment, moment))


async def proved(config: Config) -> None:
    backups = Backups(config, RealClock())
    async with opened(config) as store:
        made = await backups.create(store)
        catalogue = await backups.catalogue(store)
        item = await catalogue.find(made.manifest.backup_id)
        assert (await backups.prove(catalogue, item, store=store, advance=None)).is_good


async def test_a_proof_lets_go_of_what_the_backup_holds(small: Site, config: Config) -> None:
    first = await drive(config, range(5))
    old = segments(config)
    age(old[:-2], MARGIN_S + 60)
    age(old[-2:], MARGIN_S - 60)  # too near to the backup: clocks differ
    await proved(config)
    assert [file for file in old if file.exists()] == old[-2:]
    second = await drive(config, range(5, 7))
    small.destroy()
    alone = replace(config, backup_dir=config.data_dir / "none")
    with pytest.raises(StoreDamaged, match="alone is not enough"):
        await choose(alone)
    done = await restored(config)
    assert done.runs == len(first) + len(second)
    assert done.carried.trouble == []


async def test_a_stream_that_ended_long_ago_goes_as_a_whole(config: Config) -> None:
    await drive(config, range(2))
    [gone] = (Path(config.archive_place) / "segments").iterdir()
    age(segments(config), ENDED_S + 60)
    await drive(config, range(2, 4))
    await proved(config)
    assert list(gone.iterdir()) == []
    [one] = await read_incarnations(FolderPlace(Path(config.archive_place)))
    assert one.floor_us
    assert gone.name not in one.streams
    async with opened(config) as store:
        assert gone.name not in await store.shelf.records("archive")
    await proved(config)  # nothing is left to let go


async def test_what_an_older_kept_backup_needs_stays(config: Config) -> None:
    await proved_empty(config)
    await drive(config, range(3))
    made = segments(config)
    age(made, MARGIN_S + 60)  # older than the second backup, and not than the first one
    oldest = min(config.backup_folder.glob("llm-orchestrator-backup-*"))
    earlier = oldest.with_name(oldest.name.replace(oldest.name[24:39], "20200101_000000"))
    oldest.rename(earlier)
    await proved(config)
    assert all(file.exists() for file in made)


async def proved_empty(config: Config) -> None:
    await drive(config, range(1))
    await proved(config)
