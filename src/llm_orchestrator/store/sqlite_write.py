"""How a batch becomes one SQLite transaction.

The fast path writes all appends with one `executemany` and counts the rows. When the count is short
or the primary key objects, the transaction is rolled back and the batch is applied again one run at
a time, each under a savepoint: the guilty run stands alone and is named, the others land.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from hashlib import blake2b

from llm_orchestrator.errors import StoreError
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
)
from llm_orchestrator.store.journal import canonical
from llm_orchestrator.store.queries import load_queries

Row = tuple[object, ...]


class Refusal(Exception):
    """A change does not fit what is stored (a record's version moved)."""


class BatchWriter:
    """Applies batches on the one writing connection. Not thread-safe: one thread owns it."""

    def __init__(self, database: sqlite3.Connection, node_id: str, incarnation: str) -> None:
        self._database = database
        self._node_id = node_id
        self._incarnation = incarnation
        self._queries = load_queries()
        self._number = 0

    def apply(self, batch: Batch, now_us: int) -> Receipt:
        """One transaction. Raises sqlite3.Error with nothing written."""
        database = self._database
        database.execute("BEGIN IMMEDIATE")
        try:
            self._check_incarnation()
            receipt = self._apply_together(batch, now_us)
            if receipt is None:
                database.execute("ROLLBACK")
                database.execute("BEGIN IMMEDIATE")
                receipt = self._apply_one_by_one(batch, now_us)
            self._count(batch)
            database.execute("COMMIT")
        except BaseException:
            if database.in_transaction:
                database.execute("ROLLBACK")
            raise
        return receipt

    def _check_incarnation(self) -> None:
        row = self._database.execute(self._queries["incarnation"].sql).fetchone()
        if row is None or row[0] != self._incarnation:
            raise StoreError(
                "the store was replaced or restored under this process", hint="llmo serve"
            )

    def _apply_together(self, batch: Batch, now_us: int) -> Receipt | None:
        rows = [row for append in batch.appends for row in _journal_rows(append)]
        try:
            if rows:
                cursor = self._database.executemany(self._queries["append"].sql, rows)
                if cursor.rowcount != len(rows):
                    return None
            for append in batch.appends:
                self._apply_run_row(append, now_us)
            for change in batch.changes:
                self._apply_change(change, now_us)
        except (sqlite3.IntegrityError, sqlite3.DataError, Refusal):
            return None
        return Receipt()

    def _apply_one_by_one(self, batch: Batch, now_us: int) -> Receipt:
        """Changes belong to the batch as a whole: with one append alone they stand and fall with it."""
        refused: dict[str, Outcome] = {}
        for append in batch.appends:
            alone = batch.changes if len(batch.appends) == 1 else _changes_of(append, batch.changes)
            outcome = self._try(append, alone, now_us)
            if outcome is not Outcome.LANDED:
                refused[append.run_id] = outcome
        runs = {append.run_id for append in batch.appends}
        rest = [change for change in batch.changes if getattr(change, "run_id", None) not in runs]
        if len(batch.appends) == 1:
            rest = []
        return Receipt(refused, is_refused=not self._try_rest(rest, now_us))

    def _try(self, append: Append, changes: Sequence[Change], now_us: int) -> Outcome:
        database = self._database
        database.execute("SAVEPOINT run")
        try:
            cursor = database.executemany(self._queries["append"].sql, _journal_rows(append))
            if cursor.rowcount == len(append.entries):
                self._apply_run_row(append, now_us)
                for change in changes:
                    self._apply_change(change, now_us)
                database.execute("RELEASE run")
                return Outcome.LANDED
            outcome = Outcome.FENCED
        except sqlite3.IntegrityError:
            outcome = Outcome.CONFLICT
        except Refusal:
            outcome = Outcome.CONFLICT
        except sqlite3.DatabaseError as error:
            if "FULL" in getattr(error, "sqlite_errorname", ""):
                raise
            outcome = Outcome.DAMAGED
        database.execute("ROLLBACK TO run")
        database.execute("RELEASE run")
        return self._judge(append, outcome)

    def _judge(self, append: Append, outcome: Outcome) -> Outcome:
        """Law 2: my digest at my seq means that it had landed before; another one means fenced."""
        if outcome is Outcome.DAMAGED or not append.entries:
            return outcome
        last = append.entries[-1]
        query = self._queries["digest_at"]
        found = self._database.execute(
            query.sql, query.bind(run_id=append.run_id, seq=last.seq)
        ).fetchone()
        if found is not None and found[0] == last.digest:
            return Outcome.LANDED
        first = append.entries[0]
        taken = self._database.execute(
            query.sql, query.bind(run_id=append.run_id, seq=first.seq)
        ).fetchone()
        return Outcome.FENCED if taken is not None and not append.accept else outcome

    def _try_rest(self, changes: Sequence[Change], now_us: int) -> bool:
        self._database.execute("SAVEPOINT rest")
        try:
            for change in changes:
                self._apply_change(change, now_us)
        except (sqlite3.IntegrityError, sqlite3.DataError, Refusal):
            self._database.execute("ROLLBACK TO rest")
            return False
        finally:
            self._database.execute("RELEASE rest")
        return True

    def _count(self, batch: Batch) -> None:
        self._number += 1
        digests = [append.entries[-1].digest for append in batch.appends if append.entries]
        entries = sum(len(append.entries) for append in batch.appends)
        total = blake2b(b"".join(digests), digest_size=32).digest()
        self._execute(
            "count_commit",
            node_id=self._node_id,
            number=self._number,
            entries=entries,
            digest=total,
        )

    def _execute(self, name: str, /, **values: object) -> sqlite3.Cursor:
        query = self._queries[name]
        return self._database.execute(query.sql, query.bind(**values))

    def _apply_run_row(self, append: Append, now_us: int) -> None:
        if append.accept is not None:
            run = append.accept
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
                input=canonical(run.input) if _is_json(run.input) else b"null",
                created_at=now_us,
            )
        if append.change is not None:
            change, last = append.change, append.entries[-1]
            self._execute(
                "change_state",
                run_id=append.run_id,
                state=change.state,
                reason=change.reason,
                owner=change.owner,
                epoch=last.epoch,
                wake_at=change.wake_at,
                inbox_seen=change.inbox_seen,
                output=change.output,
                error=change.error,
                head_seq=last.seq,
                head_digest=last.digest,
                now=now_us,
            )

    def _apply_change(self, change: Change, now_us: int) -> None:
        match change:
            case Post():
                self._post(change, now_us)
            case Consume():
                for number in change.numbers:
                    self._execute("consume", run_id=change.run_id, number=number)
            case PutProgress():
                handle = None if change.handle is None else canonical(change.handle)
                self._execute(
                    "put_progress",
                    run_id=change.run_id,
                    step=change.step,
                    attempt=change.attempt,
                    part=change.part,
                    text=change.text,
                    handle=handle,
                )
            case DropProgress():
                self._execute("drop_progress", run_id=change.run_id, step=change.step)
            case PutBlob():
                self._execute(
                    "put_blob", run_id=change.run_id, digest=change.digest, content=change.content
                )
            case Register():
                flow = change.workflow
                self._execute(
                    "register",
                    name=flow.name,
                    version=flow.version,
                    digest=flow.digest,
                    definition=flow.definition,
                    created_at=flow.created_at or now_us,
                )
            case PutRecord():
                self._put_record(change)
            case PutVectors():
                for key, vector, metadata in change.rows:
                    self._execute(
                        "put_vector",
                        index_name=change.index,
                        namespace=change.namespace,
                        id=key,
                        vector=vector,
                        metadata=metadata,
                    )
            case Expire():
                for run_id in change.run_ids:
                    for table in ("journal", "inbox", "blobs", "progress", "run"):
                        self._execute(f"expire_{table}", run_id=run_id)
            case Mend():
                self._mend(change, now_us)

    def _post(self, change: Post, now_us: int) -> None:
        row = self._execute(
            "next_message", run_id=change.run_id, sender_key=change.sender_key
        ).fetchone()
        if row is None:
            return  # this sender_key was posted before, or there is no such run
        payload = canonical(change.payload)
        self._execute(
            "post",
            run_id=change.run_id,
            number=row[0],
            kind=change.kind,
            name=change.name,
            payload=payload,
            sender_key=change.sender_key,
            digest=message_digest(change.run_id, row[0], change.kind, change.name, payload),
            created_at=now_us,
        )

    def _put_record(self, change: PutRecord) -> None:
        if change.value is None:
            done = self._execute(
                "delete_record", kind=change.kind, key=change.key, version=change.version
            )
        elif change.version == 0:
            self._execute(
                "insert_record", kind=change.kind, key=change.key, value=canonical(change.value)
            )
            return
        else:
            done = self._execute(
                "update_record",
                kind=change.kind,
                key=change.key,
                value=canonical(change.value),
                version=change.version,
            )
        if done.rowcount != 1:
            raise Refusal(f"record {change.kind}/{change.key} moved")

    def _mend(self, change: Mend, now_us: int) -> None:
        for seq, digest in change.digests:
            self._execute("mend_digest", run_id=change.run_id, seq=seq, digest=digest)
        for seq, payload in change.payloads:
            self._execute("mend_payload", run_id=change.run_id, seq=seq, payload=payload)
        if change.accept is not None:
            self._execute("forget_run_row", run_id=change.run_id)
            empty = Append(change.run_id, 0, b"", (), accept=change.accept)
            self._apply_run_row(empty, now_us)


def message_digest(run_id: str, number: int, kind: str, name: str, payload: bytes) -> bytes:
    """What an inbox row's digest must be."""
    head = json.dumps([run_id, number, kind, name, len(payload)]).encode()
    return blake2b(head + payload, digest_size=32).digest()


def _is_json(value: object) -> bool:
    try:
        canonical(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _changes_of(append: Append, changes: Sequence[Change]) -> list[Change]:
    return [change for change in changes if getattr(change, "run_id", None) == append.run_id]


def _journal_rows(append: Append) -> list[Row]:
    """Parameters of `append`, in its order: the nine columns, then the predecessor."""
    rows: list[Row] = []
    seq, digest = append.prev_seq, append.prev_digest
    for entry in append.entries:
        rows.append((*entry, seq, digest))
        seq, digest = entry.seq, entry.digest
    return rows
