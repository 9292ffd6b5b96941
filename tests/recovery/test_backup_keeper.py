"""Backups by schedule: made when due, once, and made up when nobody served."""

from __future__ import annotations

from pathlib import Path

import pytest
from pyrage import x25519

from llm_orchestrator.config import Config
from llm_orchestrator.recovery.lock import locked
from llm_orchestrator.recovery.readiness import read_backups
from llm_orchestrator.store.base import Batch, Database, PutRecord
from llm_orchestrator.telemetry.metrics import Metrics
from llm_orchestrator.wire.backup_keeper import BackupKeeper
from llm_orchestrator.wire.backups import Backups
from llm_orchestrator.wire.housekeeping import chores
from tests.recovery.test_carry import opened

YEARLY = "0 0 1 1 *"


def keeper(folder: Path, store: Database) -> BackupKeeper:
    config = Config(store=f"sqlite:///{folder / 'runs.db'}", data_dir=folder)
    return BackupKeeper(Backups(config, store.clock), store, YEARLY)


async def made_long_ago(store: Database) -> None:
    value, version = await store.shelf.record("backup", "last")
    assert isinstance(value, dict)
    change = PutRecord("backup", "last", {**value, "at": 1_000_000}, version)
    await store.commit(Batch(changes=(change,)))


async def test_a_due_backup_is_made_proved_and_not_made_again(tmp_path: Path) -> None:
    async with opened(f"sqlite:///{tmp_path / 'runs.db'}") as store:
        keeping = keeper(tmp_path, store)
        assert await keeping.do()
        backups = await read_backups(store)
        assert backups.proved["backup_id"] == backups.last["backup_id"]
        assert not await keeping.do()
        assert not await keeper(tmp_path, store).do()  # of another node
        await made_long_ago(store)
        assert await keeping.do()
        assert len(list((tmp_path / "backups").glob("*.tar.gz"))) == 2


async def test_while_another_one_is_at_it_nothing_is_made(tmp_path: Path) -> None:
    async with opened(f"sqlite:///{tmp_path / 'runs.db'}") as store:
        keeping = keeper(tmp_path, store)
        async with locked(store, store.clock):
            assert not await keeping.do()
        assert await keeping.do()


async def test_a_failure_is_told_and_not_repeated_at_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "backups").write_text("no folder")
    async with opened(f"sqlite:///{tmp_path / 'runs.db'}") as store:
        keeping = keeper(tmp_path, store)
        assert not await keeping.do()
        assert "the scheduled backup failed" in caplog.text
        caplog.clear()
        assert not await keeping.do()
        assert caplog.text == ""


async def test_a_second_place_that_is_away_stops_no_proof(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "second").write_text("no folder")
    config = Config(
        store=f"sqlite:///{tmp_path / 'runs.db'}",
        data_dir=tmp_path,
        backup_place=str(tmp_path / "second"),
    )
    async with opened(config.store) as store:
        assert await BackupKeeper(Backups(config, store.clock), store, YEARLY).do()
        backups = await read_backups(store)
    assert "not in the second place" in caplog.text
    assert backups.proved["backup_id"] == backups.last["backup_id"]


async def test_an_object_store_that_is_away_stops_no_proof_and_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OBJECTS_KEY", "key-of-this-test")
    config = Config(
        store=f"sqlite:///{tmp_path / 'runs.db'}",
        data_dir=tmp_path,
        backup_place="s3://bucket/backups",
        s3_endpoint_url="http://127.0.0.1:9",  # nobody listens
        s3_region="us-east-1",
        s3_access_key="env:OBJECTS_KEY",
        s3_secret_key="env:OBJECTS_KEY",
    )
    async with opened(config.store) as store:
        assert not await BackupKeeper(Backups(config, store.clock), store, YEARLY).do()
        backups = await read_backups(store)
    assert "not in the second place" in caplog.text
    assert "no old backup was let go" in caplog.text
    assert backups.proved["backup_id"] == backups.last["backup_id"]


async def test_a_key_that_is_lost_after_a_proof_is_counted_as_a_failure(tmp_path: Path) -> None:
    key = x25519.Identity.generate()
    identity = tmp_path / "identity.txt"
    identity.write_text(str(key))
    config = Config(
        store=f"sqlite:///{tmp_path / 'runs.db'}",
        data_dir=tmp_path,
        backup_recipients=(str(key.to_public()),),
        backup_identity=f"file:{identity}",
    )
    async with opened(config.store) as store:
        keeping = BackupKeeper(Backups(config, store.clock), store, YEARLY)
        assert await keeping.do()
        identity.unlink()
        await made_long_ago(store)
        assert not await keeping.do()
        tally, _ = await store.shelf.record("backup", "tally")
        backups = await read_backups(store)
    assert isinstance(tally, dict)
    assert tally["failed_at"] > backups.last["taken_at"]


async def test_the_setting_gives_the_engine_the_chore(tmp_path: Path) -> None:
    async with opened(f"sqlite:///{tmp_path / 'runs.db'}") as store:
        config = Config(data_dir=tmp_path, backup_schedule="@hourly")
        names = [chore.name for chore in chores(config, store, metrics=Metrics())]
        assert names == ["scheduled backups"]
        assert chores(Config(data_dir=tmp_path), store, metrics=Metrics()) == []
