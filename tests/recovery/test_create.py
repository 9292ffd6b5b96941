"""A backup is whole under its final name, or not there; and only one is made at a time."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyrage
import pytest

from llm_orchestrator.clock import RealClock
from llm_orchestrator.errors import (
    ConfigError,
    Denied,
    NotUploaded,
    StoreError,
    StoreFull,
    StoreLocked,
    StoreUnavailable,
)
from llm_orchestrator.model import Workflow
from llm_orchestrator.recovery import lock
from llm_orchestrator.recovery.create import create
from llm_orchestrator.recovery.manifest import backup_id_of
from llm_orchestrator.recovery.places import Kept
from llm_orchestrator.recovery.places_folder import FolderPlace
from llm_orchestrator.recovery.verify import verify
from llm_orchestrator.store.base import Batch, PutRecord, Register
from llm_orchestrator.store.copying import Advance, Cut
from llm_orchestrator.store.sqlite import SQLiteStore
from tests.recovery.backup_support import RUNS, PlainCopier, backed_up, options, sqlite_store
from tests.recovery.kills import KILLS

KEYS = [pyrage.x25519.Identity.generate() for _ in range(2)]
CHILD = Path(__file__).parent / "backup_child.py"


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


async def test_a_backup_holds_all_that_it_should(tmp_path: Path) -> None:
    async with sqlite_store(tmp_path / "live.db") as store:
        how = replace(options(tmp_path / "b"), config={"data_dir": "x", "port": 1})
        made = await backed_up(store, how)
        last = await store.shelf.record("backup", "last")
        assert (await store.shelf.record("lease", "backup"))[0] is None
    assert files(tmp_path / "b") == [f"{made.manifest.backup_id}.tar.gz"]
    assert made.file.stat().st_mode & 0o077 == 0
    assert made.warnings == []
    with tarfile.open(made.file) as tar:
        names = tar.getnames()
        members = {name: file.read() for name in names if (file := tar.extractfile(name))}
    assert names[0] == "metadata.json"
    assert names[-1] == "checksums.sha256"
    assert json.loads(members["config.json"]) == {"data_dir": "x", "port": 1}
    [definition] = [json.loads(members[n]) for n in names if n.startswith("definitions/")]
    assert (definition["name"], definition["definition"]) == ("flow", {"name": "flow"})
    assert made.manifest.backup_id in members["report.txt"].decode()
    metadata = json.loads(members["metadata.json"])
    assert metadata["counts"]["runs"] == RUNS
    assert metadata["counts"]["journal"] == 3 * RUNS
    assert len(metadata["heads"]) == RUNS
    assert metadata["created_at"].endswith("Z")
    value = last[0]
    assert isinstance(value, dict)
    assert value["backup_id"] == made.manifest.backup_id
    assert value["taken_at"] == made.manifest.taken_at
    assert value["size_bytes"] == made.size_bytes == made.file.stat().st_size
    assert value["sha256"] == made.sha256
    assert value["place"] == ""


async def test_a_backup_is_made_while_the_store_is_written(tmp_path: Path) -> None:
    """The heads and counts of the manifest are the dump's, whatever came before and after."""
    async with sqlite_store(tmp_path / "live.db") as store:
        done = asyncio.Event()

        async def write() -> None:
            number = 0
            while not done.is_set():
                number += 1
                flow = Workflow(f"flow-{number}", "1", f"{number:064d}", b"{}")
                await store.commit(Batch(changes=(Register(flow),)))

        writing = asyncio.create_task(write())
        for _ in range(3):
            made = await backed_up(store, options(tmp_path / "b"))
            verified = await verify(made.file)
            assert verified.manifest.counts["workflows"] > 0
            with tarfile.open(made.file) as tar:
                named = sum(name.startswith("definitions/") for name in tar.getnames())
            is_told = any("registered meanwhile" in warning for warning in made.warnings)
            assert is_told == (named != verified.manifest.counts["workflows"])
        done.set()
        await writing


async def test_sealed_for_one_key_warns_and_for_two_does_not(tmp_path: Path) -> None:
    who = [str(key.to_public()) for key in KEYS]
    async with sqlite_store(tmp_path / "live.db") as store:
        one = await backed_up(store, options(tmp_path / "b", recipients=who[:1]))
        two = await backed_up(store, options(tmp_path / "b", recipients=["\n".join(who)]))
        with pytest.raises(ConfigError):
            await backed_up(store, options(tmp_path / "b", recipients=["age1x"]))
    assert [len(made.warnings) for made in (one, two)] == [1, 0]
    assert "one key alone" in one.warnings[0]
    assert two.manifest.encryption == "age, 2 recipients"
    assert one.file.name.endswith(".tar.gz.age")
    assert b"metadata" not in one.file.read_bytes()
    for key in KEYS:
        assert (await verify(two.file, keys=[key])).manifest == two.manifest


async def test_backups_of_one_second_have_names_of_their_own(tmp_path: Path) -> None:
    async with sqlite_store(tmp_path / "live.db") as store:
        made = [
            await backed_up(store, options(tmp_path / "b", compression=form))
            for form in ("gzip", "zstd", "gzip")
        ]
        for one in made:
            await verify(one.file)
    assert len({one.manifest.backup_id for one in made}) == 3
    assert len(files(tmp_path / "b")) == 3


async def test_progress_is_told_of_each_stage(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    async with sqlite_store(tmp_path / "live.db") as store:
        how = options(tmp_path / "b")
        how = replace(how, watch=lambda *each: told.append(each))
        made = await backed_up(store, how, FolderPlace(tmp_path / "place"))
    assert [stage for stage in ("dump", "pack", "upload") if stage in {t[0] for t in told}] == [
        "dump",
        "pack",
        "upload",
    ]
    packed = [each for each in told if each[0] == "pack"]
    assert packed[-1][1] == packed[-1][2] == made.manifest.dump_bytes


# -- one at a time --------------------------------------------------------------------------------


class WaitingCopier(PlainCopier):
    """Dumps when it is let go."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.begun = asyncio.Event()
        self.go = asyncio.Event()

    async def dump(
        self, folder: Path, *, bytes_per_s: int = 0, advance: Advance | None = None
    ) -> tuple[Path, Cut]:
        (folder / "half").write_bytes(b"half a dump")
        self.begun.set()
        await self.go.wait()
        return await super().dump(folder, bytes_per_s=bytes_per_s, advance=advance)


async def test_a_second_backup_is_refused_until_the_first_is_made(tmp_path: Path) -> None:
    async with sqlite_store(tmp_path / "live.db") as store:
        copier, clock = WaitingCopier(store.path), RealClock()
        how = options(tmp_path / "b")
        first = asyncio.create_task(create(copier, None, how, store=store, clock=clock))
        await copier.begun.wait()
        with pytest.raises(StoreLocked, match=str(os.getpid())) as caught:
            await backed_up(store, how)
        assert caught.value.exit_code == 11
        async with client(store.path) as other:  # another process's view of the same store
            with pytest.raises(StoreLocked):
                await backed_up(other, how)
        copier.go.set()
        await verify((await first).file)
        await backed_up(store, how)


class client:  # noqa: N801 (read as a function)
    """The same store, as a client has it."""

    def __init__(self, path: Path) -> None:
        self.store = SQLiteStore(path, node_id="", clock=RealClock())

    async def __aenter__(self) -> SQLiteStore:
        await self.store.open_as_client()
        return self.store

    async def __aexit__(self, *_: object) -> None:
        await self.store.close()


async def test_a_lease_is_renewed_by_its_holder_alone(tmp_path: Path) -> None:
    class Stepped(RealClock):
        """`sleep` ends when the test says so."""

        def __init__(self) -> None:
            self.slept: asyncio.Queue[float] = asyncio.Queue()
            self.go = asyncio.Semaphore(0)

        async def sleep(self, seconds: float) -> None:
            self.slept.put_nowait(seconds)
            await self.go.acquire()

    async def ends_at() -> object:
        value, _ = await store.shelf.record(lock.KIND, lock.KEY)
        return value["ends_at"] if isinstance(value, dict) else None

    clock = Stepped()
    async with sqlite_store(tmp_path / "live.db") as store:
        async with lock.locked(store, clock, lease_s=60):
            assert await clock.slept.get() == 15
            first = await ends_at()
            clock.go.release()
            await clock.slept.get()
            assert await ends_at() > first  # type: ignore[operator]
            _, version = await store.shelf.record(lock.KIND, lock.KEY)
            taken = {"token": "another", "ends_at": 1 << 60}
            change = PutRecord(lock.KIND, lock.KEY, taken, version)
            assert not (await store.commit(Batch(changes=(change,)))).is_refused
            clock.go.release()
        assert (await store.shelf.record(lock.KIND, lock.KEY))[0] == taken


def lease(**more: object) -> dict[str, object]:
    """One that this very process would hold, for long."""
    found = dict(lock._holder("token", RealClock().now_us() + 10**9))
    return {**found, **more}


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


HELD = [
    ("living", lease, True),
    ("ended", lambda: lease(ends_at=RealClock().now_us() - 1), False),
    ("dead process", lambda: lease(pid=dead_pid()), False),
    ("the number of a dead process given again", lambda: lease(born="1"), False),
    ("dead process of another boot", lambda: lease(pid=dead_pid(), boot="x"), True),
    ("dead process of another container", lambda: lease(pid=dead_pid(), pids="x"), True),
    ("nonsense", lambda: {"x": 1}, False),
]


@pytest.mark.parametrize(("make", "is_held"), [h[1:] for h in HELD], ids=[h[0] for h in HELD])
async def test_a_lease_is_stale_after_its_end_or_its_holder(
    tmp_path: Path, make: object, is_held: bool
) -> None:
    async with sqlite_store(tmp_path / "live.db") as store:
        value = make()  # type: ignore[operator]
        await store.commit(Batch(changes=(PutRecord(lock.KIND, lock.KEY, value, 0),)))
        if is_held:
            with pytest.raises(StoreLocked, match=socket.gethostname()):
                await backed_up(store, options(tmp_path / "b"))
        else:
            await backed_up(store, options(tmp_path / "b"))


# -- what fails leaves nothing --------------------------------------------------------------------


class FailingCopier(PlainCopier):
    async def dump(
        self, folder: Path, *, bytes_per_s: int = 0, advance: Advance | None = None
    ) -> tuple[Path, Cut]:
        (folder / "database.sqlite").write_bytes(b"half")
        raise StoreUnavailable("the database went away")


async def test_a_dump_that_fails_leaves_nothing_and_says_why(tmp_path: Path) -> None:
    async with sqlite_store(tmp_path / "live.db") as store:
        with pytest.raises(StoreUnavailable, match="went away"):
            await create(
                FailingCopier(store.path),
                None,
                options(tmp_path / "b"),
                store=store,
                clock=RealClock(),
            )
        assert files(tmp_path / "b") == []
        assert await store.shelf.records("backup") == {}
        await backed_up(store, options(tmp_path / "b"))


async def test_a_backup_that_is_cancelled_leaves_nothing(tmp_path: Path) -> None:
    """While it dumps, and while a thread packs: the thread is stopped and waited for."""
    loop = asyncio.get_running_loop()
    async with sqlite_store(tmp_path / "live.db") as store:
        copier = WaitingCopier(store.path)
        making = create(copier, None, options(tmp_path / "b"), store=store, clock=RealClock())
        task = asyncio.create_task(making)
        await copier.begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert files(tmp_path / "b") == []

        is_packing, go = asyncio.Event(), threading.Event()

        def watch(stage: str, done: int, _: int) -> None:
            if stage == "pack":
                loop.call_soon_threadsafe(is_packing.set)
                go.wait(30)

        how = replace(options(tmp_path / "b"), watch=watch)
        task = asyncio.create_task(backed_up(store, how))
        await is_packing.wait()
        task.cancel()
        loop.call_soon(go.set)
        with pytest.raises(asyncio.CancelledError):
            await task
        assert files(tmp_path / "b") == []
        assert await store.shelf.records("backup") == {}
        await backed_up(store, options(tmp_path / "b"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a small disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


async def test_a_full_disk_is_said_before_anything_is_written(
    tmp_path: Path, small_disk: Path
) -> None:
    async with sqlite_store(tmp_path / "live.db") as store:
        await backed_up(store, options(small_disk / "b"))
        (small_disk / "fill").write_bytes(b"x" * (20 << 20))
        before = files(small_disk / "b")
        with pytest.raises(StoreFull, match="has room for"):
            await backed_up(store, options(small_disk / "b"))
        assert files(small_disk / "b") == before
        value, _ = await store.shelf.record("backup", "last")
        assert isinstance(value, dict)
        assert [f"{value['backup_id']}.tar.gz"] == before
        (small_disk / "fill").unlink()
        await backed_up(store, options(small_disk / "b"))


async def test_a_disk_that_fills_meanwhile_leaves_nothing(tmp_path: Path) -> None:
    """The limit on files' sizes hits the packed file, after the dump was made."""
    async with sqlite_store(tmp_path / "live.db") as store:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

        def watch(stage: str, _done: int, _total: int) -> None:
            if stage == "pack":
                resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, hard))

        try:
            with pytest.raises(StoreFull, match="no room"):
                await backed_up(store, replace(options(tmp_path / "b"), watch=watch))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert files(tmp_path / "b") == []
        # The limit was the store's too, so the lease could not be given back; it ends by itself.
        value, version = await store.shelf.record(lock.KIND, lock.KEY)
        assert isinstance(value, dict)
        value = {**value, "ends_at": store.clock.now_us()}
        await store.commit(Batch(changes=(PutRecord(lock.KIND, lock.KEY, value, version),)))
        await backed_up(store, options(tmp_path / "b"))


async def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(b"a file")
    async with sqlite_store(tmp_path / "live.db") as store:
        with pytest.raises(StoreError):
            await backed_up(store, options(tmp_path / "b"))


# -- the second place -----------------------------------------------------------------------------


class ClosedPlace(FolderPlace):
    async def put(self, file: Path, name: str, *, advance: Advance | None = None) -> Kept:
        raise Denied("it refuses us", hint="ask for a key")


async def test_a_failed_upload_keeps_the_file_and_exits_3(tmp_path: Path) -> None:
    async with sqlite_store(tmp_path / "live.db") as store:
        with pytest.raises(NotUploaded, match="it refuses us") as caught:
            await backed_up(store, options(tmp_path / "b"), ClosedPlace(tmp_path / "p"))
        value, _ = await store.shelf.record("backup", "last")
    assert caught.value.exit_code == 3
    assert caught.value.hint == "ask for a key"
    [name] = files(tmp_path / "b")
    assert name in caught.value.message
    await verify(tmp_path / "b" / name)
    assert isinstance(value, dict)
    assert (value["backup_id"], value["place"]) == (backup_id_of(name), "")


async def test_what_is_uploaded_is_the_same_file(tmp_path: Path) -> None:
    async with sqlite_store(tmp_path / "live.db") as store:
        made = await backed_up(store, options(tmp_path / "b"), FolderPlace(tmp_path / "p"))
    assert made.place == str(tmp_path / "p")
    assert (tmp_path / "p" / made.file.name).read_bytes() == made.file.read_bytes()


# -- killed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(KILLS))
async def test_killed_anywhere_leaves_no_half_file(tmp_path: Path, number: int) -> None:
    """A child is killed at a call to the system that chance has chosen; the next backup works."""
    async with sqlite_store(tmp_path / "live.db", runs=20):
        pass
    count = run_child(tmp_path, 0)
    shutil.rmtree(tmp_path / "b")
    shutil.rmtree(tmp_path / "p")
    at = 1 + number * count // KILLS + int.from_bytes(os.urandom(2), "big") % (count // KILLS)
    run_child(tmp_path, at)
    for folder in (tmp_path / "b", tmp_path / "p"):
        for file in folder.glob("llm-orchestrator-backup-*") if folder.exists() else ():
            await verify(file)
    run_child(tmp_path, 0)  # a process of its own: no lock is in the way
    for folder in (tmp_path / "b", tmp_path / "p"):
        names = [name for name in files(folder) if not name.startswith(".part-")]
        assert names, f"killed at {at} of {count}"
        assert all(backup_id_of(name) for name in names), f"killed at {at} of {count}: {names}"


def run_child(folder: Path, kill_at: int) -> int:
    """How many calls to the system it made; 0 when it was killed, as it should be."""
    command = [sys.executable, str(CHILD), str(folder), str(kill_at)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    if kill_at:
        assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
        return 0
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout)
