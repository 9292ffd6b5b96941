"""Copying and exchanging a store that is a file (see copying.py).

A dump is SQLite's own online backup, taken inside one read transaction, so writers neither wait nor
make it begin again. An aside is a file beside the live one. Taking over copies it *into* the live
file by the backup API, in one transaction: a rename would leave the old write-ahead log behind,
which the next opener would replay onto the new file (law 12). A process killed in the middle leaves
the old content; SQLite rolls the rest back.

All that blocks runs in a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import sqlite3
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from llm_orchestrator.clock import Clock
from llm_orchestrator.errors import NotFound, StoreError, StoreForeign, StoreLocked
from llm_orchestrator.model import MICROSECONDS, RunState
from llm_orchestrator.store.base import Database
from llm_orchestrator.store.copying import Advance, ChainHead, Cut, Identity, Role, RunHead
from llm_orchestrator.store.sqlite import SQLiteStore
from llm_orchestrator.store.sqlite_file import (
    APPLICATION_ID,
    EngineLock,
    connect,
    library_version,
    prepare,
    translate,
)
from llm_orchestrator.store.sqlite_tables import SQLiteTables

T = TypeVar("T")
DUMP = "database.sqlite"
TABLES = (
    "workflows",
    "runs",
    "journal",
    "inbox",
    "progress",
    "records",
    "vectors",
    "blobs",
    "commits",
    "audit",
    "store",
)
"""Every table but `nodes`."""
_STEP_PAGES = 1_000
_PATIENCE_S = 10.0
_FINAL = tuple(state.value for state in RunState if state.is_final)
_HEADS = (
    "SELECT run_id, state, (SELECT max(seq) FROM journal j WHERE j.run_id = r.run_id) AS last, "
    "(SELECT digest FROM journal j WHERE j.run_id = r.run_id ORDER BY seq DESC LIMIT 1) "
    "FROM runs r WHERE state NOT IN (?, ?, ?) ORDER BY run_id"
)
_CHAINS = (
    "SELECT chain_id, number, digest FROM audit a WHERE number = "
    "(SELECT max(number) FROM audit b WHERE b.chain_id = a.chain_id) ORDER BY chain_id"
)


class SQLiteCopier:
    """See Copier."""

    kind = "sqlite"

    def __init__(self, path: Path, clock: Clock) -> None:
        self._path = path
        self._clock = clock

    @property
    def shown(self) -> str:
        return f"sqlite:///{self._path}"

    async def size(self) -> int:
        return await asyncio.to_thread(_size, self._path)

    async def identity(self) -> Identity | None:
        return await asyncio.to_thread(_identity, self._path)

    async def dump(
        self, folder: Path, *, bytes_per_s: int = 0, advance: Advance | None = None
    ) -> tuple[Path, Cut]:
        target = folder / DUMP
        now_us = self._clock.now_us

        def work() -> Cut:
            try:
                with closing(connect(self._path, is_read_only=True)) as live:
                    taken_at = _snapshot(live, now_us)
                    with closing(_plain(target)) as copy:
                        _pour(
                            live,
                            copy,
                            bytes_per_s=bytes_per_s,
                            clock=self._clock,
                            advance=advance,
                        )
                        copy.execute("PRAGMA journal_mode=DELETE")
                        cut = _cut(copy, _size(self._path), taken_at)
                _sync(target)
            except BaseException:
                _remove(target)
                raise
            return cut

        return target, await self._do(work)

    async def check_dump(self, dump: Path) -> str:
        return await asyncio.to_thread(_check, dump)

    async def load(self, dump: Path, *, advance: Advance | None = None) -> SQLiteAside:
        def work(aside: SQLiteAside) -> None:
            with closing(_plain(dump)) as given, closing(_plain(aside.path)) as copy:
                _pour(given, copy, advance=advance)
            with closing(prepare(aside.path, "", 0)) as copy:  # an older schema is brought up
                copy.execute("UPDATE store SET role = ?", (Role.COPY,))

        return await self._aside(work)

    async def empty(self) -> SQLiteAside:
        incarnation, now_us = self._clock.random_bytes(16).hex(), self._clock.now_us()

        def work(aside: SQLiteAside) -> None:
            with closing(prepare(aside.path, incarnation, now_us)) as copy:
                copy.execute("UPDATE store SET role = ?", (Role.COPY,))

        return await self._aside(work)

    async def kept(self) -> list[str]:
        return [path.name for path in await asyncio.to_thread(_beside, self._path, "old")]

    async def drop(self, name: str) -> None:
        def work() -> None:
            if name not in [path.name for path in _beside(self._path, "old")]:
                raise NotFound(f"{self._path.parent} keeps no {name}")
            _remove(self._path.with_name(name))

        await asyncio.to_thread(work)

    async def leftovers(self) -> list[str]:
        return [path.name for path in await asyncio.to_thread(_abandoned, self._path)]

    # -- how ----------------------------------------------------------------------------------

    async def _aside(self, fill: Callable[[SQLiteAside], None]) -> SQLiteAside:
        name = f"{self._path.name}.restore-{self._clock.random_bytes(4).hex()}"
        aside = SQLiteAside(self._path.with_name(name), self._path, self._clock)

        def work() -> None:
            for path in _abandoned(self._path):
                _remove(path)
            aside.hold()
            fill(aside)

        try:
            await self._do(work)
        except BaseException:
            await aside.discard()
            raise
        return aside

    async def _do(self, work: Callable[[], T]) -> T:
        return await in_thread(work, self._path)


class SQLiteAside:
    """A file beside the live one. Its maker holds a lock, so that others know that it lives."""

    def __init__(self, path: Path, live: Path, clock: Clock) -> None:
        self.path = path
        self._live = live
        self._clock = clock
        self._held: int | None = None

    @property
    def url(self) -> str:
        return f"sqlite:///{self.path}"

    @property
    def shown(self) -> str:
        return self.url

    def hold(self) -> None:
        """Say that this process makes it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._held = os.open(_maker(self.path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def store(self) -> Database:
        node_id = f"copy-{self._clock.random_bytes(6).hex()}"
        return SQLiteStore(self.path, node_id=node_id, clock=self._clock, may_copy=True)

    def tables(self) -> SQLiteTables:
        return SQLiteTables(self.path)

    async def take_over(
        self, identity: Identity, *, last: Callable[[Database], Awaitable[None]] | None = None
    ) -> str:
        lock = EngineLock(self._live)
        await self._lock(lock)
        try:
            old = await in_thread(self._keep_old, self._live)
            try:
                identity_now = await asyncio.to_thread(_identity, self._live)
                if last is not None and identity_now is not None:
                    await self._look(last)
                await in_thread(lambda: self._exchange(identity), self._live)
            except BaseException:
                if old:
                    await asyncio.to_thread(self._undo, old)
                raise
        finally:
            lock.release()
        await self.discard()
        return old

    async def discard(self) -> None:
        await asyncio.to_thread(_remove, self.path)
        if self._held is not None:
            os.close(self._held)
            self._held = None

    # -- how ----------------------------------------------------------------------------------

    async def _lock(self, lock: EngineLock) -> None:
        """Nobody else may write. A client has the lock for a commit, an engine for its life."""
        deadline = self._clock.monotonic() + _PATIENCE_S
        while not lock.acquire("a restore"):
            if self._clock.monotonic() >= deadline:
                raise StoreLocked(
                    f"an engine ({lock.owner() or 'unknown'}) serves {self._live}",
                    hint="stop it (SIGTERM), restore, start it again",
                )
            await self._clock.sleep(0.05)

    async def _look(self, last: Callable[[Database], Awaitable[None]]) -> None:
        live = SQLiteStore(self._live, node_id="restore", clock=self._clock)
        await live.open_as_client()
        try:
            await last(live)
        finally:
            await live.close()

    def _keep_old(self) -> str:
        """A copy of the live file under another name; its name, "" when there is none."""
        if not self._live.exists():
            return ""
        moment = datetime.fromtimestamp(self._clock.now_us() / MICROSECONDS, UTC)
        name = _free(self._live, f"{self._live.name}.old-{moment:%Y%m%d_%H%M%S}")
        part = self._live.with_name(f"{name}.part")
        try:
            with closing(connect(self._live)) as live, closing(_plain(part)) as copy:
                _pour(live, copy)
                copy.execute("PRAGMA journal_mode=DELETE")
            _sync(part)
            part.rename(self._live.with_name(name))
        except (sqlite3.DatabaseError, StoreForeign) as error:
            _remove(part)
            if isinstance(error, sqlite3.OperationalError):
                raise  # the disk, not the file
            self._move_away(name)
        except BaseException:
            _remove(part)
            raise
        _sync(self._live.parent)
        return name

    def _move_away(self, name: str) -> None:
        """What is no database any more cannot be copied into. We have the lock: nobody uses it."""
        for suffix in ("", "-wal", "-shm"):
            path = self._live.with_name(self._live.name + suffix)
            if path.exists():
                path.rename(self._live.with_name(name + suffix))

    def _undo(self, old: str) -> None:
        """The live file is as it was, or was moved away: then it comes back."""
        kept = self._live.with_name(old)
        if self._live.exists() and _identity(self._live) is not None:
            _remove(kept)
            return
        for suffix in ("-wal", "-shm", ""):
            path = self._live.with_name(old + suffix)
            if path.exists():
                path.replace(self._live.with_name(self._live.name + suffix))

    def _exchange(self, identity: Identity) -> None:
        """The one transaction that changes the live file."""
        with closing(connect(self.path)) as copy:
            copy.execute("BEGIN IMMEDIATE")
            copy.execute(
                "UPDATE store SET incarnation = ?, generation = ?, role = ?",
                (identity.incarnation, identity.generation, identity.role),
            )
            for table in ("nodes", "commits"):  # who lives, and what servers have counted
                copy.execute(f"DELETE FROM {table}")  # noqa: S608 (names of ours)
            copy.execute("COMMIT")
            with closing(connect(self._live)) as live:
                live.execute("PRAGMA journal_mode=WAL")
                live.execute("PRAGMA synchronous=FULL")
                copy.backup(live)
                live.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        _sync(self._live.parent)


# -- in a thread ----------------------------------------------------------------------------------


async def in_thread(work: Callable[[], T], path: Path) -> T:
    """Run what blocks; SQLite's errors and the system's come out in our words."""
    try:
        return await asyncio.to_thread(work)
    except sqlite3.Error as error:
        raise translate(error, path) from error
    except OSError as error:
        raise StoreError(
            f"{path.parent}: {error.strerror or error}", hint="df -h; ls -ld"
        ) from error


def _plain(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path, isolation_level=None)


def _snapshot(live: sqlite3.Connection, now_us: Callable[[], int]) -> int:
    """From now on this connection sees one moment; which one."""
    live.execute("BEGIN")
    taken_at = now_us()
    live.execute("SELECT incarnation FROM store").fetchone()
    return taken_at


def _pour(
    given: sqlite3.Connection,
    taking: sqlite3.Connection,
    *,
    bytes_per_s: int = 0,
    clock: Clock | None = None,
    advance: Advance | None = None,
) -> None:
    """Copy a whole database, a step at a time; by `clock` at most so fast."""
    [(page,)] = given.execute("PRAGMA page_size")
    pause = threading.Event()
    begun = clock.monotonic() if clock else 0.0

    def told(_status: int, remaining: int, total: int) -> None:
        done = (total - remaining) * page
        if advance is not None:
            advance(done, total * page)
        if bytes_per_s and clock is not None:
            pause.wait(max(0.0, done / bytes_per_s - (clock.monotonic() - begun)))

    pages = _STEP_PAGES if not bytes_per_s else max(1, min(_STEP_PAGES, bytes_per_s // page // 4))
    given.backup(taking, pages=pages, progress=told)


def _cut(copy: sqlite3.Connection, size: int, taken_at: int) -> Cut:
    counts = {
        table: copy.execute(f"SELECT count(*) FROM {table}").fetchone()[0]  # noqa: S608 (a name)
        for table in TABLES
    }
    [(schema,)] = copy.execute("PRAGMA user_version")
    [(incarnation, generation)] = copy.execute("SELECT incarnation, generation FROM store")
    [(epoch,)] = copy.execute("SELECT coalesce(max(epoch), 0) FROM runs")
    heads = [
        RunHead(run_id, seq, bytes(digest).hex(), state)
        for run_id, state, seq, digest in copy.execute(_HEADS, _FINAL)
        if seq is not None
    ]
    chains = [
        ChainHead(name, number, bytes(end).hex()) for name, number, end in copy.execute(_CHAINS)
    ]
    return Cut(
        "sqlite",
        schema,
        library_version(),
        size,
        incarnation,
        generation,
        epoch,
        taken_at,
        counts,
        heads,
        chains,
    )


def _check(dump: Path) -> str:
    try:
        with closing(sqlite3.connect(f"{dump.resolve().as_uri()}?mode=ro", uri=True)) as copy:
            [(application,)] = copy.execute("PRAGMA application_id")
            if application != APPLICATION_ID:
                return "it is no store of this program"
            [(word,)] = copy.execute("PRAGMA integrity_check(1)")
    except (sqlite3.Error, UnicodeDecodeError) as error:
        return str(error)
    return "" if word == "ok" else str(word)


def _identity(path: Path) -> Identity | None:
    try:
        with closing(connect(path, is_read_only=True)) as database:
            row = database.execute("SELECT incarnation, generation, role FROM store").fetchone()
    except (sqlite3.Error, StoreError):
        return None
    is_good = row is not None and isinstance(row[0], str) and isinstance(row[1], int)
    return Identity(*row) if is_good else None


# -- files ----------------------------------------------------------------------------------------


def _files(path: Path) -> Iterator[Path]:
    """A database and what SQLite and we keep beside it."""
    for suffix in ("", "-wal", "-shm", "-journal", ".lock", ".maker"):
        yield path.with_name(path.name + suffix)


def _maker(path: Path) -> Path:
    return path.with_name(path.name + ".maker")


def _remove(path: Path) -> None:
    for file in _files(path):
        file.unlink(missing_ok=True)


def _size(path: Path) -> int:
    total = 0
    for suffix in ("", "-wal"):
        with contextlib.suppress(FileNotFoundError):
            total += path.with_name(path.name + suffix).stat().st_size
    return total


def _beside(path: Path, word: str) -> list[Path]:
    """Databases named `<file>.<word>-...`, without what lies beside each."""
    if not path.parent.is_dir():
        return []
    found = path.parent.glob(f"{path.name}.{word}-*")
    extra = ("-wal", "-shm", "-journal", ".lock", ".maker")
    return sorted(one for one in found if not one.name.endswith(extra))


def _abandoned(path: Path) -> list[Path]:
    """Asides and half-kept copies whose maker is gone."""
    found = [one for one in _beside(path, "old") if one.name.endswith(".part")]
    for one in _beside(path, "restore"):
        descriptor = os.open(_maker(one), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue
        else:
            found.append(one)
        finally:
            os.close(descriptor)
    return found


def _free(path: Path, name: str) -> str:
    number, chosen = 1, name
    while path.with_name(chosen).exists():
        number += 1
        chosen = f"{name}-{number}"
    return chosen


def _sync(path: Path) -> None:
    descriptor: Any = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
