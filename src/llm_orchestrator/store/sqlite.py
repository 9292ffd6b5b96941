"""The store on SQLite: one file, one engine, readers beside it.

`write-ahead log, synchronous=FULL`: a commit returns once the bytes are on the disk. One
connection, on a thread of its own, writes and checkpoints; another one reads. Both roles of this
class look alike to their callers:

- engine: holds the file's lock (see sqlite_file.EngineLock) from open to close and serves a local
  socket, through which other processes hand in their batches (see sqlite_share);
- client: `commit` takes the lock for the moment if nobody has it, else sends the batch to the
  engine.

When a restore asks for the file, an engine lets go of it until that process is gone, and then goes
on: with its runs if nothing has changed, else its node begins anew (`_step_aside`, `renew`).

It must never write outside `BatchWriter`, and never delete to go back.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path

from llm_orchestrator.clock import Clock
from llm_orchestrator.errors import (
    StoreDamaged,
    StoreError,
    StoreLocked,
    StoreReplaced,
    StoreUnavailable,
)
from llm_orchestrator.model import Run
from llm_orchestrator.store.archiving import Archive, archived
from llm_orchestrator.store.base import Batch, News, Receipt, Wanted, news_of
from llm_orchestrator.store.measure import measured
from llm_orchestrator.store.queries import load_queries
from llm_orchestrator.store.shelf import TableShelf
from llm_orchestrator.store.sqlite_claims import SQLiteClaims
from llm_orchestrator.store.sqlite_file import (
    SCHEMA_VERSION,
    EngineLock,
    check_role,
    extend_log,
    prepare,
    translate,
)
from llm_orchestrator.store.sqlite_look import SQLiteLook
from llm_orchestrator.store.sqlite_members import SQLiteMembers
from llm_orchestrator.store.sqlite_reader import SQLiteReader
from llm_orchestrator.store.sqlite_share import (
    Gone,
    ShareServer,
    answers,
    send_batch,
    socket_path,
)
from llm_orchestrator.store.sqlite_thread import DatabaseThread
from llm_orchestrator.store.sqlite_write import BatchWriter
from llm_orchestrator.store.statistics import TableCounts
from llm_orchestrator.telemetry.metrics import Metrics

logger = logging.getLogger(__name__)
OnNews = Callable[[News], None]
_AGAIN_S = 0.05
GENERATION_MAX = 1 << 20
"""An epoch is generation x 2^40 + claims, and has 63 bits."""


class SQLiteStore:
    """See store.base.Store for every method's contract."""

    def __init__(
        self,
        path: Path,
        *,
        node_id: str,
        clock: Clock,
        metrics: Metrics | None = None,
        may_copy: bool = False,
    ) -> None:
        self.node_id = node_id
        self._may_copy = may_copy  # whoever has put it aside knows that it is a copy
        self.metrics = metrics or Metrics()
        self.archive: Archive | None = None
        self.path = path
        self.generation = 1
        self.incarnation = ""
        self.clock = clock
        self._lock = EngineLock(path)
        self._is_away = False
        self._successor: tuple[str, int] | None = None
        self._writer: BatchWriter | None = None
        self._write_thread: DatabaseThread | None = None
        self._write_database: sqlite3.Connection | None = None
        self._reader = SQLiteReader(path)
        self.look = SQLiteLook(self._reader)
        self.shelf = TableShelf(self._reader)
        self._counter = SQLiteReader(path)  # apart: counting takes long, and claims read, too
        self.counts = TableCounts(self._counter)
        self._claims = SQLiteClaims(self.look, self.shelf)
        self._server: ShareServer | None = None
        self._listeners: list[OnNews] = []
        self._queries = load_queries()

    @property
    def shown(self) -> str:
        """The file."""
        return f"sqlite:///{self.path}"

    async def is_served(self) -> bool:
        """True when an engine answers on the store's local socket."""
        return await answers(socket_path(self.path))

    # -- opening -------------------------------------------------------------------------------

    async def open_as_engine(self, *, patience_s: float = 2.0) -> None:
        """Become the one process that writes. Raises StoreLocked when there is one already.

        A client holds the lock for the length of a commit; `patience_s` outlasts it.
        """
        deadline = self.clock.monotonic() + patience_s
        while not self._lock.acquire(self.node_id):
            if self.clock.monotonic() >= deadline:
                raise StoreLocked(
                    f"another engine ({self._lock.owner() or 'unknown'}) serves {self.path}",
                    hint=f"llmo runs list --store sqlite:///{self.path}",
                )
            await self.clock.sleep(0.05)
        try:
            self.incarnation, self.generation = await self._open_writer(is_engine=True)
            self._server = ShareServer(socket_path(self.path), self.commit, self._step_aside)
            await self._server.start()
        except BaseException:
            await self.close()
            raise

    async def open_as_client(self, *, may_create: bool = False) -> None:
        """Read now; write through the engine if there is one."""
        version = await self._version()
        is_wanted = may_create if version == 0 else version < SCHEMA_VERSION
        if is_wanted and self._lock.acquire(self.node_id):
            try:
                self.incarnation, self.generation = await self._open_writer()
            except StoreError:
                if version == 0:
                    raise  # an older one can be read, at least
            finally:
                await self._close_writer()
        with contextlib.suppress(StoreDamaged):  # empty as yet: its first writer makes the tables
            for row in await self._reader.rows("incarnation"):
                self.incarnation, self.generation = row

    async def _version(self) -> int:
        """The schema's; 0 when there is none as yet."""
        if not self.path.exists():
            return 0

        def work(database: sqlite3.Connection) -> int:
            [version] = database.execute("PRAGMA user_version").fetchone()
            return int(version)

        return await self._reader.read(work)

    async def _open_writer(self, *, is_engine: bool = False) -> tuple[str, int]:
        """The incarnation and generation of what is there."""
        self._write_thread = DatabaseThread("store-writer")
        incarnation = self.clock.random_bytes(16).hex()

        def start() -> tuple[str, int]:
            self._write_database = prepare(self.path, incarnation, self.clock.now_us())
            row = self._write_database.execute(self._queries["incarnation"].sql).fetchone()
            if row is None or not isinstance(row[1], int) or not 0 < row[1] < GENERATION_MAX:
                raise StoreDamaged(f"{self.path} has lost its identity row", hint="llmo doctor")
            self._writer = BatchWriter(self._write_database, self.node_id, row[0])
            if self._may_copy:
                self._write_database.execute("PRAGMA synchronous=OFF")  # it can be made again
            if is_engine:
                check_role(self._write_database, self.path, may_copy=self._may_copy)
                extend_log(self._write_database)
            return row[0], row[1]

        try:
            found: tuple[str, int] = await self._write_thread.submit(start)
        except sqlite3.Error as error:
            raise translate(error, self.path) from error
        return found

    async def _close_writer(self) -> None:
        if self._write_thread is not None:
            self._write_thread.stop()
            self._write_thread = None
        if self._write_database is not None:
            self._write_database.close()
            self._write_database = None
        self._writer = None
        self._lock.release()

    async def close(self) -> None:
        """End both connections and free the lock."""
        if self._server is not None:
            await self._server.stop()
            self._server = None
        if self.archive is not None:
            await self.archive.close()
        self._reader.close()
        self._counter.close()
        await self._close_writer()

    def on_news(self, listener: OnNews) -> None:
        """Call `listener` after each commit, on the event loop: the wake-up within this process."""
        self._listeners.append(listener)

    # -- while a restore has the file ----------------------------------------------------------

    async def _step_aside(self, gone: Gone) -> None:
        """Let go of the file until `gone` returns, then take what is there."""
        if self._is_away or self._successor is not None:
            raise StoreLocked("another restore has the file")
        self._is_away = True
        logger.warning("%s is let go of: a restore wants it", self.path)
        for reader in (self._reader, self._counter):
            reader.shut(f"{self.path} is being restored")
        await self._close_writer()
        await gone()
        found = await self._take_again()
        self._is_away = False
        for reader in (self._reader, self._counter):
            reader.open_again()
        if found == (self.incarnation, self.generation):
            self._tell(News(is_due=True, is_gap=True))
            return
        self._successor = found
        self._tell(News(is_replaced=True))

    async def _take_again(self) -> tuple[str, int]:
        """The lock, and a writer. Clients may have the lock for a commit."""
        trouble = ""
        while True:
            if self._lock.acquire(self.node_id):
                try:
                    return await self._open_writer(is_engine=True)
                except StoreError as error:
                    await self._close_writer()
                    if error.message != trouble:
                        logger.error("%s cannot be served: %s", self.path, error.message)
                    trouble = error.message
            await self.clock.sleep(_AGAIN_S)

    def _check_here(self) -> None:
        """Raises StoreError while the file is not ours, or not the one that we know."""
        if self._is_away:
            raise StoreUnavailable(f"{self.path} is being restored", hint="ask again")
        if self._successor is not None:
            raise StoreReplaced("the store was restored under this process", hint="ask again")

    # -- nodes and claims: one engine, so nobody else picks ------------------------------------

    async def members(self) -> SQLiteMembers:
        if self._server is None:
            raise StoreError("only the engine of a store is a node of it")
        return SQLiteMembers(self._lend, path=self.path, clock=self.clock)

    def _lend(self) -> tuple[sqlite3.Connection, DatabaseThread]:
        self._check_here()
        if self._write_database is None or self._write_thread is None:
            raise StoreError("the store is closed")
        return self._write_database, self._write_thread

    async def pick(self, node_id: str, wanted: Wanted) -> list[Run]:
        return await self._claims.pick(wanted)

    async def adopt(
        self,
        node_id: str,
        limit: int,
        except_runs: Sequence[str] = (),
        *,
        strange: Sequence[str] = (),
    ) -> list[str]:
        return await self._claims.adopt(limit, except_runs, strange)

    async def put_back(self, node_id: str, run_ids: Sequence[str]) -> None:
        """There is nobody else."""

    async def renew(self) -> None:
        if self._successor is not None:
            self.incarnation, self.generation = self._successor
            self._successor = None

    # -- writing -------------------------------------------------------------------------------

    async def commit(self, batch: Batch) -> Receipt:
        self._check_here()
        if self._writer is None:
            return await self._commit_as_client(batch)
        receipt = await measured(self._apply(batch), batch, metrics=self.metrics, clock=self.clock)
        news = news_of(batch)
        if news:
            self._tell(news)
        return receipt

    def _tell(self, news: News) -> None:
        for listener in self._listeners:
            listener(news)

    async def _apply(self, batch: Batch) -> Receipt:
        return await archived(self.archive, batch, self._write, clock=self.clock)

    async def _write(self, batch: Batch) -> Receipt:
        self._check_here()
        writer, thread = self._writer, self._write_thread
        if writer is None or thread is None:
            raise StoreError("the store is closed")
        try:
            receipt: Receipt = await thread.submit(lambda: writer.apply(batch, self.clock.now_us()))
        except sqlite3.Error as error:
            raise translate(error, self.path) from error
        return receipt

    async def _commit_as_client(self, batch: Batch) -> Receipt:
        for _ in range(200):
            if self._lock.acquire(self.node_id):
                try:
                    self.incarnation, self.generation = await self._open_writer()
                    return await self._apply(batch)
                finally:
                    await self._close_writer()
            receipt = await send_batch(socket_path(self.path), batch)
            if receipt is not None:
                return receipt
            await self.clock.sleep(0.05)  # another client has the lock, or the engine just starts
        raise StoreLocked(
            f"{self.path} is locked and its owner ({self._lock.owner()}) does not answer",
            hint="llmo doctor",
        )
