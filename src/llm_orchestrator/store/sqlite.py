"""The store on SQLite: one file, one engine, readers beside it.

`write-ahead log, synchronous=FULL`: a commit returns once the bytes are on the disk. One connection, on
a thread of its own, writes and checkpoints; another one reads. Both roles of this class look alike to
their callers:

- engine: holds the file's lock (see sqlite_file.EngineLock) from open to close and serves a local
  socket, through which other processes hand in their batches (see sqlite_share);
- client: `commit` takes the lock for the moment if nobody has it, else sends the batch to the engine.

It must never write outside `BatchWriter`, and never delete to go back.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from llm_orchestrator.clock import Clock
from llm_orchestrator.errors import StoreDamaged, StoreError, StoreLocked
from llm_orchestrator.model import Entry, Flaw, Journal, Json, Message, Run, RunState, Workflow
from llm_orchestrator.store.base import Batch, Progress, Receipt, RunFilter
from llm_orchestrator.store.check import check_journal, definition_digest
from llm_orchestrator.store.queries import load_queries
from llm_orchestrator.store.sqlite_file import EngineLock, connect, prepare, translate
from llm_orchestrator.store.sqlite_share import ShareServer, send_batch, socket_path
from llm_orchestrator.store.sqlite_thread import DatabaseThread
from llm_orchestrator.store.sqlite_write import BatchWriter, message_digest

T = TypeVar("T")
OnCommit = Callable[[Batch], None]


class SQLiteStore:
    """See store.base.Store for every method's contract."""

    def __init__(self, path: Path, *, node_id: str, clock: Clock) -> None:
        self.node_id = node_id
        self.path = path
        self._clock = clock
        self._lock = EngineLock(path)
        self._writer: BatchWriter | None = None
        self._write_thread: DatabaseThread | None = None
        self._read_thread: DatabaseThread | None = None
        self._write_database: sqlite3.Connection | None = None
        self._read_database: sqlite3.Connection | None = None
        self._server: ShareServer | None = None
        self._listeners: list[OnCommit] = []
        self._queries = load_queries()

    # -- opening -------------------------------------------------------------------------------

    async def open_as_engine(self, *, patience_s: float = 2.0) -> None:
        """Become the one process that writes. Raises StoreLocked when there is one already.

        A client holds the lock for the length of a commit; `patience_s` outlasts it.
        """
        deadline = self._clock.monotonic() + patience_s
        while not self._lock.acquire(self.node_id):
            if self._clock.monotonic() >= deadline:
                raise StoreLocked(
                    f"another engine ({self._lock.owner() or 'unknown'}) serves {self.path}",
                    hint=f"llmo runs list --store sqlite:///{self.path}",
                )
            await self._clock.sleep(0.05)
        try:
            await self._open_writer()
            self._server = ShareServer(socket_path(self.path), self.commit)
            await self._server.start()
        except BaseException:
            await self.close()
            raise

    async def open_as_client(self, *, may_create: bool = False) -> None:
        """Read now; write through the engine if there is one."""
        if may_create and not self.path.exists() and self._lock.acquire(self.node_id):
            try:
                await self._open_writer()
            finally:
                await self._close_writer()
        self._read_connection()

    async def _open_writer(self) -> None:
        self._write_thread = DatabaseThread("store-writer")
        incarnation = self._clock.random_bytes(16).hex()

        def start() -> None:
            self._write_database = prepare(self.path, incarnation, self._clock.now_us())
            row = self._write_database.execute(self._queries["incarnation"].sql).fetchone()
            if row is None:
                raise StoreDamaged(f"{self.path} has lost its identity row", hint="llmo doctor")
            self._writer = BatchWriter(self._write_database, self.node_id, row[0])

        await self._write_thread.submit(start)

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
        if self._read_thread is not None:
            self._read_thread.stop()
            self._read_thread = None
        if self._read_database is not None:
            self._read_database.close()
            self._read_database = None
        await self._close_writer()

    def on_commit(self, listener: OnCommit) -> None:
        """Call `listener` after each commit, on the event loop: the wake-up within this process."""
        self._listeners.append(listener)

    # -- writing -------------------------------------------------------------------------------

    async def commit(self, batch: Batch) -> Receipt:
        if self._writer is None:
            return await self._commit_as_client(batch)
        receipt = await self._apply(batch)
        for listener in self._listeners:
            listener(batch)
        return receipt

    async def _apply(self, batch: Batch) -> Receipt:
        writer, thread = self._writer, self._write_thread
        if writer is None or thread is None:
            raise StoreError("the store is closed")
        try:
            receipt: Receipt = await thread.submit(
                lambda: writer.apply(batch, self._clock.now_us())
            )
        except sqlite3.Error as error:
            raise translate(error, self.path) from error
        return receipt

    async def _commit_as_client(self, batch: Batch) -> Receipt:
        for _ in range(200):
            if self._lock.acquire(self.node_id):
                try:
                    await self._open_writer()
                    return await self._apply(batch)
                finally:
                    await self._close_writer()
            receipt = await send_batch(socket_path(self.path), batch)
            if receipt is not None:
                return receipt
            await self._clock.sleep(0.05)  # another client has the lock, or the engine just starts
        raise StoreLocked(
            f"{self.path} is locked and its owner ({self._lock.owner()}) does not answer",
            hint="llmo doctor",
        )

    # -- reading -------------------------------------------------------------------------------

    def _read_connection(self) -> sqlite3.Connection:
        if self._read_database is None:
            self._read_database = connect(self.path, is_read_only=True)
        return self._read_database

    async def _read(self, function: Callable[[sqlite3.Connection], T]) -> T:
        if self._read_thread is None:
            self._read_thread = DatabaseThread("store-reader")

        def work() -> T:
            return function(self._read_connection())

        try:
            result: T = await self._read_thread.submit(work)
        except sqlite3.Error as error:
            raise translate(error, self.path) from error
        return result

    async def _rows(self, name: str, **values: object) -> list[tuple[object, ...]]:
        query = self._queries[name]
        return await self._read(lambda db: db.execute(query.sql, query.bind(**values)).fetchall())

    async def load(self, run_ids: Sequence[str]) -> dict[str, Journal]:
        return await self._read(lambda db: self._load(db, run_ids))

    def _load(self, database: sqlite3.Connection, run_ids: Sequence[str]) -> dict[str, Journal]:
        query = self._queries["journal"]
        journals: dict[str, Journal] = {}
        for run_id in run_ids:
            broken: list[Flaw] = []
            try:
                rows = database.execute(query.sql, query.bind(run_id=run_id)).fetchall()
            except sqlite3.DatabaseError:
                rows, broken = self._salvage(database, run_id)
            if rows or broken:
                entries = [Entry(*row) for row in rows]
                journals[run_id] = check_journal(
                    run_id, entries, broken, lambda digest, run=run_id: self._blob(database, run, digest)
                )
        return journals

    def _salvage(
        self, database: sqlite3.Connection, run_id: str
    ) -> tuple[list[tuple[object, ...]], list[Flaw]]:
        """Row by row, past pages that cannot be read; stops after a gap of a thousand."""
        query, rows, flaws = self._queries["journal_row"], [], []
        seq, misses = 1, 0
        while misses < 1000:
            try:
                row = database.execute(query.sql, query.bind(run_id=run_id, seq=seq)).fetchone()
                misses = 0 if row else misses + 1
                if row:
                    rows.append(row)
            except sqlite3.DatabaseError as error:
                misses += 1
                flaws.append(Flaw(run_id, seq, f"page unreadable: {error}", is_mendable=False))
            seq += 1
        last = rows[-1][1] if rows else 0
        return rows, [flaw for flaw in flaws if flaw.seq <= last + 1]

    def _blob(self, database: sqlite3.Connection, run_id: str, digest: bytes) -> bytes | None:
        query = self._queries["blob"]
        try:
            row = database.execute(query.sql, query.bind(run_id=run_id, digest=digest)).fetchone()
        except sqlite3.DatabaseError:
            return None
        return row[0] if row else None

    async def run(self, run_id: str) -> Run | None:
        rows = await self._rows("run", run_id=run_id)
        return _run(rows[0]) if rows else None

    async def runs(self, wanted: RunFilter) -> list[Run]:
        label = wanted.label and f"{json.dumps(wanted.label[0])}:{json.dumps(wanted.label[1])}"
        rows = await self._rows(
            "runs",
            states=f",{','.join(wanted.states)}," if wanted.states else "",
            workflow=wanted.workflow,
            parent_run_id=wanted.parent_run_id,
            queue=wanted.queue,
            label=label,
            before=wanted.before,
            limit=wanted.limit,
        )
        return [_run(row) for row in rows]

    async def result(self, run_id: str) -> tuple[Json, Json]:
        rows = await self._rows("result", run_id=run_id)
        output, error = rows[0] if rows else (None, None)
        return _json(output), _json(error)

    async def claimable(self, now_us: int, limit: int) -> list[Run]:
        return [_run(row) for row in await self._rows("claimable", now=now_us, limit=limit)]

    async def owned(self, owners_alive: Sequence[str]) -> list[str]:
        owner = owners_alive[0] if owners_alive else ""
        return [str(row[0]) for row in await self._rows("owned", node_id=owner)]

    async def next_wake(self) -> int | None:
        [[wake_at]] = await self._rows("next_wake")
        return wake_at if isinstance(wake_at, int) else None

    async def inbox(self, run_id: str) -> list[Message]:
        messages = []
        for row in await self._rows("inbox", run_id=run_id):
            run, number, kind, name, payload, sender_key, digest = row
            if message_digest(run, number, kind, name, payload) != digest:  # type: ignore[arg-type]
                raise StoreDamaged(
                    f"message {number} of run {run_id} does not fit its digest", run_id=run_id
                )
            messages.append(Message(run, number, kind, name, _json(payload), sender_key))  # type: ignore[arg-type]
        return messages

    async def progress(self, run_id: str, step: str) -> Progress | None:
        rows = await self._rows("progress", run_id=run_id, step=step)
        if not rows:
            return None
        newest = max(int(str(row[0])) for row in rows)
        parts = [row for row in rows if row[0] == newest]
        handles = [row[2] for row in parts if row[2] is not None]
        return Progress(
            newest, "".join(str(row[1]) for row in parts), _json(handles[-1]) if handles else None
        )

    async def workflow(
        self, name: str, version: str | None = None, digest: str | None = None
    ) -> Workflow | None:
        rows = await self._rows("workflow", name=name, version=version, digest=digest)
        if not rows:
            return None
        found = Workflow(*rows[0])  # type: ignore[arg-type]
        if definition_digest(found.definition) != found.digest:
            raise StoreDamaged(
                f"the stored definition of workflow {name} {found.version} does not fit its digest",
                hint="llmo workflows register FILE",
            )
        return found

    async def workflows(self) -> list[Workflow]:
        return [Workflow(*row) for row in await self._rows("workflows")]  # type: ignore[arg-type]

    async def record(self, kind: str, key: str) -> tuple[Json, int]:
        rows = await self._rows("record", kind=kind, key=key)
        return (_json(rows[0][0]), int(str(rows[0][1]))) if rows else (None, 0)

    async def records(self, kind: str) -> dict[str, Json]:
        return {str(key): _json(value) for key, value in await self._rows("records", kind=kind)}

    async def vectors(self, index: str, namespace: str) -> list[tuple[str, bytes, bytes]]:
        return await self._rows("vectors", index_name=index, namespace=namespace)  # type: ignore[return-value]

    async def expirable(self, *, finished_before: int, keep: int, limit: int) -> list[str]:
        rows = await self._rows(
            "expirable", finished_before=finished_before, keep=keep, limit=limit
        )
        return [str(row[0]) for row in rows]

    async def run_ids(self) -> list[str]:
        return [str(row[0]) for row in await self._rows("run_ids")]

    async def structure(self) -> list[str]:
        """What SQLite's own check finds; empty when the file's pages are whole."""
        def work(database: sqlite3.Connection) -> list[str]:
            try:
                rows = database.execute("PRAGMA integrity_check(20)").fetchall()
            except sqlite3.DatabaseError as error:
                return [str(error)]
            return [] if rows == [("ok",)] else [str(row[0]) for row in rows]

        return await self._read(work)


def _json(value: object) -> Json:
    if value is None:
        return None
    if not isinstance(value, bytes | str):
        raise StoreDamaged("a stored value is neither text nor bytes")
    try:
        return json.loads(value)
    except ValueError as error:
        raise StoreDamaged(f"a stored value is no JSON: {error}") from error


def _run(row: Sequence[object]) -> Run:
    values = list(row)
    try:
        values[4] = RunState(str(values[4]))
        values[14] = json.loads(str(values[14]))
    except ValueError as error:
        raise StoreDamaged(
            f"the row of run {values[0]} is damaged: {error}",
            run_id=str(values[0]),
            hint=f"llmo journal repair {values[0]}",
        ) from error
    return Run(*values)  # type: ignore[arg-type]
