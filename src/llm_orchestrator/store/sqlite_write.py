"""How a batch becomes one SQLite transaction.

The fast path writes all appends with one `executemany` and counts the rows. When the count is
short, the primary key objects or a run's content or pages are at fault, the transaction is rolled
back and the batch is applied again one run at a time, each under a savepoint: the guilty run stands
alone and is named, the others land. What is wrong with the disk as a whole (full, gone), or with
pages that belong to no run of the batch, fails the whole batch, with nothing written.
"""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Sequence
from hashlib import blake2b

from llm_orchestrator.errors import StoreError, TooLarge
from llm_orchestrator.model import Workflow
from llm_orchestrator.store.base import (
    Append,
    Batch,
    Change,
    Consume,
    DropProgress,
    Expire,
    Mend,
    Outcome,
    Post,
    PutBlob,
    PutProgress,
    PutRecord,
    PutVectors,
    Receipt,
    Register,
    RunRow,
    StateChange,
    TrimCommits,
)
from llm_orchestrator.store.journal import canonical, encode
from llm_orchestrator.store.queries import load_queries
from llm_orchestrator.store.sqlite_file import is_damage

logger = logging.getLogger(__name__)

Row = tuple[object, ...]
_UNFIT = (
    sqlite3.DataError,
    sqlite3.InterfaceError,
    sqlite3.ProgrammingError,
    ArithmeticError,
    RecursionError,
    TooLarge,
    TypeError,
    ValueError,
)
"""What a driver and its encoders say of values that no column takes."""


class Refusal(Exception):
    """A change does not fit what is stored; `outcome` says how."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome)
        self.outcome = outcome


class BatchWriter:
    """Applies batches on the one writing connection. Not thread-safe: one thread owns it."""

    def __init__(self, database: sqlite3.Connection, node_id: str, incarnation: str) -> None:
        self._database = database
        self._node_id = node_id
        self._incarnation = incarnation
        self._queries = load_queries()
        self._number = self._last_number()
        self._is_healed = False

    def apply(self, batch: Batch, now_us: int) -> Receipt:
        """One transaction. Raises sqlite3.Error or StoreError with nothing written."""
        try:
            receipt = self._apply_once(batch, now_us)
        except sqlite3.Error as error:
            if not self._heal(error):
                raise
            return self._apply_once(batch, now_us)
        return receipt

    def _apply_once(self, batch: Batch, now_us: int) -> Receipt:
        database = self._database
        database.execute("BEGIN IMMEDIATE")
        try:
            self._check_incarnation()
            receipt = self._apply_together(batch, now_us)
            if receipt is None:
                if database.in_transaction:
                    database.execute("ROLLBACK")
                database.execute("BEGIN IMMEDIATE")
                receipt = self._apply_one_by_one(batch, now_us)
            self._count(batch, receipt)
            database.execute("COMMIT")
        except BaseException:
            if database.in_transaction:
                database.execute("ROLLBACK")
            raise
        return receipt

    def _heal(self, error: sqlite3.Error) -> bool:
        """An index that contradicts its table can be made anew; once, for it reads the whole table.

        Not those of the journal: its key columns stand in table and index, and the index is the
        copy that reads go by.
        """
        if self._is_healed or not is_damage(error):
            return False
        self._is_healed = True
        for table in ("runs", "inbox", "records"):
            try:
                self._database.execute(f"REINDEX {table}")
            except sqlite3.Error as trouble:
                logger.error("the indexes of %s are damaged and stay so: %s", table, trouble)
        logger.error("pages are damaged (%s); indexes were made anew from their tables", error)
        return True

    def _last_number(self) -> int:
        """A client opens for each of its commits; an engine begins anew with each life."""
        try:
            [number] = self._execute("last_commit", node_id=self._node_id).fetchone()
        except sqlite3.Error as error:
            logger.error("the table of commits cannot be read: %s", error)
            return 0
        return number if isinstance(number, int) else 0

    def _check_incarnation(self) -> None:
        row = self._database.execute(self._queries["incarnation"].sql).fetchone()
        if row is None or row[0] != self._incarnation:
            raise StoreError(
                "the store was replaced or restored under this process", hint="llmo serve"
            )

    def _apply_together(self, batch: Batch, now_us: int) -> Receipt | None:
        try:
            rows = [row for append in batch.appends for row in _journal_rows(append)]
            if rows:
                cursor = self._database.executemany(self._queries["append"].sql, rows)
                if cursor.rowcount != len(rows):
                    return None
            for append in batch.appends:
                self._apply_beside(append, now_us)
            for change in batch.changes:
                self._apply_change(change, now_us)
        except (sqlite3.Error, Refusal, *_UNFIT) as error:
            if _blame(error) is None:
                raise
            return None
        return Receipt()

    def _apply_one_by_one(self, batch: Batch, now_us: int) -> Receipt:
        refused: dict[str, Outcome] = {}
        for append in batch.appends:
            outcome = self._try(append, (), now_us)
            if outcome is not Outcome.LANDED:
                refused[append.run_id] = outcome
        outcome = self._try(None, batch.changes, now_us)
        return Receipt(refused, is_refused=outcome is not Outcome.LANDED)

    def _try(self, append: Append | None, changes: Sequence[Change], now_us: int) -> Outcome:
        database = self._database
        database.execute("SAVEPOINT one")
        try:
            if append is not None:
                rows = _journal_rows(append)
                cursor = database.executemany(self._queries["append"].sql, rows)
                if rows and cursor.rowcount != len(rows):
                    raise Refusal(Outcome.DAMAGED)
                self._apply_beside(append, now_us)
            for change in changes:
                self._apply_change(change, now_us)
        except (sqlite3.Error, Refusal, *_UNFIT) as error:
            blame = _blame(error)
            if blame is None or not database.in_transaction:
                raise
            is_damaged = isinstance(error, sqlite3.Error) and is_damage(error)
            if is_damaged and (append is None or not self._is_healed):
                raise  # to be healed; or it belongs to no run that could be named in the receipt
            database.execute("ROLLBACK TO one")
            database.execute("RELEASE one")
            return blame if append is None else self._judge(append, blame)
        database.execute("RELEASE one")
        return Outcome.LANDED

    def _judge(self, append: Append, blame: Outcome) -> Outcome:
        """Law 2: my digest at my seq means that it had landed before; another one means fenced."""
        if blame is Outcome.UNFIT:
            return blame
        try:
            if append.entries:
                last = append.entries[-1]
                if self._digest_at(append.run_id, last.seq) == last.digest:
                    return Outcome.LANDED
            is_taken = self._digest_at(append.run_id, append.prev_seq + 1) is not None
        except sqlite3.Error:
            return Outcome.DAMAGED
        return Outcome.FENCED if is_taken and append.accept is None else blame

    def _digest_at(self, run_id: str, seq: int) -> object:
        row = self._execute("digest_at", run_id=run_id, seq=seq).fetchone()
        return None if row is None else row[0]

    def _count(self, batch: Batch, receipt: Receipt) -> None:
        """One row per commit, so that a missing one shows. Damage there stops nobody."""
        landed = [
            append
            for append in batch.appends
            if append.entries and append.run_id not in receipt.refused
        ]
        digests = b"".join(append.entries[-1].digest for append in landed)
        try:
            self._execute(
                "count_commit",
                node_id=self._node_id,
                number=self._number + 1,
                entries=sum(len(append.entries) for append in landed),
                digest=blake2b(digests, digest_size=32).digest(),
            )
        except sqlite3.Error as error:
            if not is_damage(error) or not self._database.in_transaction:
                raise
            logger.error("the table of commits is damaged; commits go on uncounted: %s", error)
        self._number += 1

    def _execute(self, name: str, /, **values: object) -> sqlite3.Cursor:
        query = self._queries[name]
        return self._database.execute(query.sql, query.bind(**values))

    def _apply_beside(self, append: Append, now_us: int) -> None:
        """All of an append but its entries."""
        if not append.entries and self._is_moved(append):
            raise Refusal(Outcome.DAMAGED)
        if append.accept is not None:
            self._accept(append, now_us)
        if append.change is not None:
            last = append.entries[-1]
            done = self._execute(
                "change_state",
                run_id=append.run_id,
                **_columns(append.change),
                inbox_seen=append.change.inbox_seen,
                epoch=last.epoch,
                head_seq=last.seq,
                head_digest=last.digest,
                now=now_us,
            )
            if done.rowcount != 1:
                raise Refusal(Outcome.DAMAGED)  # the row of `runs` is gone
        for change in append.changes:
            self._apply_change(change, now_us)

    def _is_moved(self, append: Append) -> bool:
        head = self._digest_at(append.run_id, append.prev_seq)
        if append.prev_seq and head != append.prev_digest:
            return True
        return self._digest_at(append.run_id, append.prev_seq + 1) is not None

    def _accept(self, append: Append, now_us: int) -> None:
        run = append.accept
        assert run is not None
        self._execute(
            "accept",
            run_id=run.run_id,
            workflow=run.workflow,
            version=run.version,
            digest=run.digest,
            priority=run.priority,
            queue=run.queue,
            idempotency_key=run.idempotency_key,
            parent_run_id=run.parent_run_id,
            wake_at=run.wake_at,
            labels=canonical(dict(run.labels)).decode(),
            origin=canonical(dict(run.origin)).decode(),
            input=encode({"value": run.input}),
            created_at=now_us,
        )

    def _apply_change(self, change: Change, now_us: int) -> None:
        match change:
            case Post():
                self._post(change, now_us)
            case PutRecord():
                self._put_record(change)
            case PutProgress():
                self._put_progress(change)
            case Register():
                self._register(change.workflow, now_us)
            case PutVectors():
                self._put_vectors(change)
            case Mend():
                self._mend(change)
            case _:
                self._apply_small(change)

    def _apply_small(self, change: Change) -> None:
        match change:
            case Consume():
                for number in change.numbers:
                    self._execute("consume", run_id=change.run_id, number=number)
            case DropProgress():
                self._execute("drop_progress", run_id=change.run_id, step=change.step)
            case PutBlob():
                self._execute(
                    "put_blob", run_id=change.run_id, digest=change.digest, content=change.content
                )
            case Expire():
                for run_id in change.run_ids:
                    if self._execute("expire_run", run_id=run_id).rowcount == 1:
                        for table in ("journal", "inbox", "blobs", "progress"):
                            self._execute(f"expire_{table}", run_id=run_id)
            case TrimCommits():
                self._execute("trim_commits", node_id=change.node_id, number=change.number)

    def _put_progress(self, change: PutProgress) -> None:
        handle = encode({"value": change.handle})
        self._execute(
            "put_progress",
            run_id=change.run_id,
            step=change.step,
            attempt=change.attempt,
            part=change.part,
            text=change.text,
            handle=handle,
            digest=row_digest(
                change.run_id, change.step, change.attempt, change.part, change.text, handle
            ),
        )

    def _register(self, flow: Workflow, now_us: int) -> None:
        self._execute(
            "register",
            name=flow.name,
            version=flow.version,
            digest=flow.digest,
            definition=flow.definition,
            created_at=flow.created_at or now_us,
        )

    def _put_vectors(self, change: PutVectors) -> None:
        for key, vector, metadata in change.rows:
            self._execute(
                "put_vector",
                index_name=change.index,
                namespace=change.namespace,
                id=key,
                vector=vector,
                metadata=metadata,
            )

    def _post(self, change: Post, now_us: int) -> None:
        row = self._execute(
            "next_message", run_id=change.run_id, sender_key=change.sender_key
        ).fetchone()
        if row is None:
            return  # this sender_key was posted before, or there is no such run
        payload = encode({"value": change.payload})
        self._execute(
            "post",
            run_id=change.run_id,
            number=row[0],
            kind=change.kind,
            name=change.name,
            payload=payload,
            sender_key=change.sender_key,
            digest=row_digest(
                change.run_id, row[0], change.kind, change.name, change.sender_key, payload
            ),
            created_at=now_us,
        )

    def _put_record(self, change: PutRecord) -> None:
        kind, key, version = change.kind, change.key, change.version
        value = canonical(change.value)
        digest = row_digest(kind, key, version + 1, value)
        if change.value is None:
            done = self._execute("delete_record", kind=kind, key=key, version=version)
        elif version == 0:
            done = self._execute("insert_record", kind=kind, key=key, value=value, digest=digest)
        else:
            done = self._execute(
                "update_record", kind=kind, key=key, value=value, digest=digest, version=version
            )
        if done.rowcount != 1:
            raise Refusal(Outcome.CONFLICT)

    def _mend(self, change: Mend) -> None:
        for entry in change.entries:
            self._execute("mend_entry", **entry._asdict())
        row = change.row
        if row is None:
            return
        head = Append(change.run_id, row.head_seq, row.head_digest, ())
        if self._is_moved(head):
            raise Refusal(Outcome.FENCED)
        self._execute("drop_row", run_id=change.run_id)
        self._accept(head._replace(accept=row.accept), row.created_at)
        self._execute("set_row", run_id=change.run_id, **_row_columns(row))


def row_digest(*columns: object) -> bytes:
    """What the digest of a row beside the journal must be: over all that it means, with lengths."""
    parts = [
        column if isinstance(column, bytes) else json.dumps(column).encode() for column in columns
    ]
    lengths = json.dumps([len(part) for part in parts]).encode()
    return blake2b(b"".join([lengths, *parts]), digest_size=32).digest()


def _columns(change: StateChange) -> dict[str, object]:
    values = change._asdict()
    del values["inbox_seen"]
    return values


def _row_columns(row: RunRow) -> dict[str, object]:
    values = row._asdict()
    del values["accept"], values["change"], values["created_at"]
    return {**_columns(row.change), **values}


def _blame(error: Exception) -> Outcome | None:
    """What an error says of the run at hand; None when it is not the run's."""
    if isinstance(error, Refusal):
        return error.outcome
    if isinstance(error, sqlite3.IntegrityError):
        return Outcome.CONFLICT
    if isinstance(error, sqlite3.Error) and is_damage(error):
        return Outcome.DAMAGED
    return Outcome.UNFIT if isinstance(error, _UNFIT) else None


def _journal_rows(append: Append) -> list[Row]:
    """Parameters of `append`, in its order: the nine columns, then the predecessor."""
    rows: list[Row] = []
    seq, digest = append.prev_seq, append.prev_digest
    for entry in append.entries:
        if entry.seq != seq + 1 or entry.run_id != append.run_id:
            raise Refusal(Outcome.UNFIT)
        rows.append((*entry, seq, digest))
        seq, digest = entry.seq, entry.digest
    return rows
