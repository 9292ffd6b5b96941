"""Copying and exchanging a store that is a file (see copying.py).

A dump is SQLite's own online backup, taken inside one read transaction, so writers neither wait nor
make it begin again. An aside is a file beside the live one. Taking over copies it *into* the live
file by the backup API, in one transaction: a rename would leave the old write-ahead log behind,
which the next opener would replay onto the new file (law 12). A process killed in the middle leaves
the old content; SQLite rolls the rest back. Only a file that is no database any more is renamed
over, without its log. An engine that serves the file lets go of it meanwhile (sqlite_share.py).

All that blocks runs in a thread, and ends there: whoever is cancelled waits for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import re
import shutil
import sqlite3
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from llm_orchestrator.clock import Clock
from llm_orchestrator.errors import (
    NotFound,
    StoreDamaged,
    StoreError,
    StoreForeign,
    StoreLocked,
)
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
from llm_orchestrator.store.sqlite_share import asked_aside, socket_path
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
_ASK_AGAIN_S = 2.0
_NAMES = {
    "restore": re.compile(r"[0-9a-f]{8}"),
    "old": re.compile(r"\d{8}_\d{6}(-\d+)?"),
    "half": re.compile(r"\d{8}_\d{6}(-\d+)?\.part"),
}
"""What comes behind `<file>.restore-` and `<file>.old-`: other names are people's own files."""
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
        stop = threading.Event()

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
                            stop=stop,
                        )
                        copy.execute("PRAGMA journal_mode=DELETE")
                        cut = _cut(copy, _size(self._path), taken_at)
                _sync(target)
            except BaseException:
                _remove(target)
                raise
            return cut

        return target, await in_thread(work, self._path, stop=stop)

    async def check_dump(self, dump: Path) -> str:
        return await asyncio.to_thread(_check, dump)

    async def load(self, dump: Path, *, advance: Advance | None = None) -> SQLiteAside:
        def work(aside: SQLiteAside) -> None:
            with closing(_plain(dump)) as given, closing(_plain(aside.path)) as copy:
                _pour(given, copy, advance=advance)  # ends early only with the process
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
        async with self._locked():
            old = await in_thread(self._keep_old, self._live)
            try:
                is_whole = await in_thread(lambda: _identity(self._live), self._live) is not None
                if last is not None and is_whole:
                    await self._look(last)
                exchange = self._exchange if is_whole else self._put_over
                await in_thread(lambda: exchange(identity), self._live)
            except BaseException:
                if old:
                    await in_thread(lambda: self._undo(old, identity), self._live)
                raise
        await self.discard()
        return old

    async def discard(self) -> None:
        await asyncio.to_thread(_remove, self.path)
        if self._held is not None:
            os.close(self._held)
            self._held = None

    # -- how ----------------------------------------------------------------------------------

    async def _ask(self, asked: AsyncExitStack, within_s: float) -> None:
        async with asyncio.timeout(within_s):
            await asked.enter_async_context(asked_aside(socket_path(self._live)))

    @asynccontextmanager
    async def _locked(self) -> AsyncIterator[None]:
        """Nobody else may write. A client has the lock for a commit, an engine until it is asked.

        The engine has its file back when the block ends, and when this process does.
        """
        lock = EngineLock(self._live)
        deadline = self._clock.monotonic() + _PATIENCE_S
        async with AsyncExitStack() as asked:
            ask_at = self._clock.monotonic()
            while not lock.acquire("a restore"):
                now = self._clock.monotonic()
                if now >= deadline:
                    raise StoreLocked(
                        f"an engine ({lock.owner() or 'unknown'}) serves {self._live}",
                        hint="stop it (SIGTERM), restore, start it again",
                    )
                if now >= ask_at:
                    ask_at = now + _ASK_AGAIN_S
                    with contextlib.suppress(TimeoutError):
                        await self._ask(asked, deadline - now)
                else:
                    await self._clock.sleep(0.05)
            try:
                yield
            finally:
                lock.release()

    async def _look(self, last: Callable[[Database], Awaitable[None]]) -> None:
        live = SQLiteStore(self._live, node_id="restore", clock=self._clock)
        await live.open_as_client()
        try:
            await last(live)
        finally:
            await live.close()

    def _keep_old(self) -> str:
        """The live file's content under another name; that name, "" when there is no file."""
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
        except (sqlite3.DatabaseError, StoreForeign, StoreDamaged) as error:
            _remove(part)
            if isinstance(error, sqlite3.OperationalError):
                raise  # the disk, not the file
            self._keep_bytes(name)
        except BaseException:
            _remove(part)
            raise
        _sync(self._live.parent)
        return name

    def _keep_bytes(self, name: str) -> None:
        """A file that is no database any more, and its log, as they are."""
        for suffix in ("-wal", ""):
            path = self._live.with_name(self._live.name + suffix)
            if path.exists():
                shutil.copyfile(path, self._live.with_name(name + suffix))
                _sync(self._live.with_name(name + suffix))

    def _undo(self, old: str, identity: Identity) -> None:
        """Nothing has changed, so nothing need be kept; unless we failed after the exchange."""
        if _identity(self._live) != identity:
            _remove(self._live.with_name(old))

    def _exchange(self, identity: Identity) -> None:
        """The one transaction that changes the live file."""
        with closing(connect(self.path)) as copy:
            self._identify(copy, identity)
            with closing(connect(self._live)) as live:
                live.execute("PRAGMA journal_mode=WAL")
                live.execute("PRAGMA synchronous=FULL")
                copy.backup(live)
                with contextlib.suppress(sqlite3.Error):  # done is done: the next opener does it
                    live.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        _sync(self._live.parent)

    def _put_over(self, identity: Identity) -> None:
        """What is no database any more cannot be copied into: it is renamed over, by a whole one.

        Its log goes first, or the next opener would replay it. We have the lock: nobody uses it.
        """
        with closing(connect(self.path)) as copy:
            self._identify(copy, identity)
            copy.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            copy.execute("PRAGMA journal_mode=DELETE")
        _sync(self.path)
        for suffix in ("-wal", "-shm", "-journal"):
            self._live.with_name(self._live.name + suffix).unlink(missing_ok=True)
        self.path.replace(self._live)
        _sync(self._live.parent)

    @staticmethod
    def _identify(copy: sqlite3.Connection, identity: Identity) -> None:
        copy.execute("BEGIN IMMEDIATE")
        copy.execute(
            "UPDATE store SET incarnation = ?, generation = ?, role = ?",
            (identity.incarnation, identity.generation, identity.role),
        )
        for table in ("nodes", "commits"):  # who lives, and what servers have counted
            copy.execute(f"DELETE FROM {table}")  # noqa: S608 (names of ours)
        copy.execute("COMMIT")


# -- in a thread ----------------------------------------------------------------------------------


async def in_thread(work: Callable[[], T], path: Path, *, stop: threading.Event | None = None) -> T:
    """Run what blocks; SQLite's errors and the system's come out in our words.

    A thread cannot be cancelled, and must not go on behind its caller's back: we wait for its end,
    which `stop` hastens.
    """
    working = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        try:
            return await asyncio.shield(working)
        except asyncio.CancelledError:
            if stop is not None:
                stop.set()
            await _ended(working)
            raise
    except sqlite3.Error as error:
        raise translate(error, path) from error
    except OSError as error:
        raise StoreError(
            f"{path.parent}: {error.strerror or error}", hint="df -h; ls -ld"
        ) from error


async def _ended(working: asyncio.Future[Any]) -> None:
    """Wait for it, whoever else wants us to stop."""
    while not working.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([working])
    if not working.cancelled():
        working.exception()  # nobody else asks


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
    stop: threading.Event | None = None,
) -> None:
    """Copy a whole database, a step at a time; by `clock` at most so fast, until `stop` is set."""
    [(page,)] = given.execute("PRAGMA page_size")
    pause = stop or threading.Event()
    begun = clock.monotonic() if clock else 0.0

    def told(_status: int, remaining: int, total: int) -> None:
        done = (total - remaining) * page
        if advance is not None:
            advance(done, total * page)
        if bytes_per_s and clock is not None:
            pause.wait(max(0.0, done / bytes_per_s - (clock.monotonic() - begun)))
        if pause.is_set():
            raise StoreError("the copy was stopped")

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


def _beside(path: Path, kind: str) -> list[Path]:
    """Files that we have named so (see _NAMES), without what lies beside each."""
    if not path.parent.is_dir():
        return []
    begin = f"{path.name}.{'restore' if kind == 'restore' else 'old'}-"
    return sorted(
        one
        for one in path.parent.iterdir()
        if one.name.startswith(begin) and _NAMES[kind].fullmatch(one.name.removeprefix(begin))
    )


def _abandoned(path: Path) -> list[Path]:
    """Asides and half-kept copies whose maker is gone."""
    found = _beside(path, "half")
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
