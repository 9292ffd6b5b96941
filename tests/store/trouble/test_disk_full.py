"""A server whose disk is full: nothing acknowledged is lost, and it goes on when there is room.

With the rights to mount, the disk is a small file system in memory, and full. Without them only
the server's answer is the same: a trigger says SQLSTATE 53100 where the disk would.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from llm_orchestrator.clock import RealClock
from llm_orchestrator.drill.lab_process import account
from llm_orchestrator.drill.postgres_lab import PostgresServer
from llm_orchestrator.errors import StoreFull, StoreUnavailable
from llm_orchestrator.model import Draft, Kind
from llm_orchestrator.store import postgres_apply
from llm_orchestrator.store.base import Append, Outcome, Post, Store
from tests.store.support import Writer, outcome
from tests.store.trouble.support import HANG_S, has_logged, opened, post, warmed_up, watched

MAY_MOUNT = os.getuid() == 0
PAYLOAD = 1_000_000


@contextlib.contextmanager
def small_disk(size_mb: int) -> Iterator[Path]:
    """A file system of its own, which the server's user owns."""
    who = account()
    assert who is not None
    with tempfile.TemporaryDirectory(prefix="llmo-disk-") as name:
        Path(name).chmod(0o755)
        place = Path(name) / "disk"
        place.mkdir()
        options = f"size={size_mb}m,mode=700,uid={who.pw_uid},gid={who.pw_gid}"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], check=True)
        try:
            yield place
        finally:
            subprocess.run(["umount", "--lazy", place], check=True)


def grow(place: Path, size_mb: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size_mb}m", place], check=True)


def move_log(server: PostgresServer, place: Path) -> None:
    """The write-ahead log gets a disk of its own."""
    server.halt()
    log = server.folder / "data" / "pg_wal"
    subprocess.run(["cp", "-a", log, place], check=True)
    shutil.rmtree(log)
    log.symlink_to(place / "pg_wal")
    server.start()


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres_apply, "PATIENCE_S", 0.3)


def large(writer: Writer) -> Append:
    """An entry that no compression makes smaller, and a message that comes with it."""
    payload = RealClock().random_bytes(PAYLOAD)
    changes = [Post(writer.run_id, "signal", f"with {writer.seq + 1}")]
    return writer.append(Draft(Kind.STEP_FINISHED, "a", 1, payload), changes=changes)


async def fill(store: Store, writer: Writer) -> Append:
    """Append until the store takes no more; what it did not take."""
    while writer.seq < 1_000:
        append = large(writer)
        try:
            assert await outcome(store, append) is Outcome.LANDED
        except (StoreFull, StoreUnavailable):
            return append
    raise AssertionError("the disk does not fill")


async def test_a_full_table_space_is_told_and_mended(postgres_server: PostgresServer) -> None:
    async with asyncio.timeout(HANG_S):
        with contextlib.ExitStack() as stack:
            if MAY_MOUNT:
                place = stack.enter_context(small_disk(16))
                postgres_server.psql(f"CREATE TABLESPACE small LOCATION '{place}'")
                stack.callback(postgres_server.psql, "DROP TABLESPACE small")
                where = "TABLESPACE small"
            else:
                where = ""
            postgres_server.psql(f"CREATE DATABASE full_disk TEMPLATE template0 {where}")
            stack.callback(postgres_server.psql, "DROP DATABASE full_disk WITH (FORCE)")
            url = postgres_server.url("full_disk")
            async with opened(url) as store, watched(postgres_server, url) as witness:
                writer = await warmed_up(store)
                if not MAY_MOUNT:
                    await witness.see(
                        "CREATE FUNCTION fill() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN "
                        "IF new.seq > 5 THEN RAISE EXCEPTION USING ERRCODE = 'disk_full', "
                        "MESSAGE = 'no space left'; END IF; RETURN new; END$$"
                    )
                    await witness.see(
                        "CREATE TRIGGER fill BEFORE INSERT ON journal "
                        "FOR EACH ROW EXECUTE FUNCTION fill()"
                    )
                refused = await fill(store, writer)
                with pytest.raises(StoreFull, match="nothing acknowledged is lost") as caught:
                    await outcome(store, refused)
                assert caught.value.hint
                seq = refused.prev_seq
                assert await witness.entries(writer.run_id) == seq
                assert len(await witness.messages(writer.run_id)) == seq - 1
                if MAY_MOUNT:
                    grow(place, 64)
                else:
                    await witness.see("DROP TRIGGER fill ON journal")
                assert await outcome(store, refused) is Outcome.LANDED  # the same bytes again
                await post(store, "hello", run_id=writer.run_id)
                assert await witness.entries(writer.run_id) == seq + 1
                assert len(await witness.messages(writer.run_id)) == seq + 1
                journal = (await store.look.load([writer.run_id]))[writer.run_id]
                assert journal.flaws == ()


@pytest.mark.skipif(not MAY_MOUNT, reason="a log on a full disk of its own takes a mount")
async def test_a_server_that_died_of_a_full_disk_comes_back_with_everything() -> None:
    """No room for its log is a PANIC, and it cannot start before there is some."""
    with small_disk(40) as place, PostgresServer() as server:
        url = server.create_database("store")
        move_log(server, place)
        async with opened(url) as store, asyncio.timeout(HANG_S):
            writer = await warmed_up(store)
            refused = await fill(store, writer)
            with pytest.raises(StoreUnavailable) as caught:
                await outcome(store, refused)
            assert caught.value.hint
            assert has_logged(server, "PANIC")
            server.kill()
            grow(place, 200)
            server.start()
            assert await outcome(store, refused) is Outcome.LANDED
            async with watched(server, url) as witness:
                assert await witness.entries(writer.run_id) == refused.prev_seq + 1
                messages = await witness.messages(writer.run_id)
                assert len(messages) == len(set(messages)) == refused.prev_seq
