"""How a batch becomes one SQLite transaction.

The fast path writes all appends with one `executemany`. When a predecessor is not there, the
primary key objects or a run's content or pages are at fault, the transaction is rolled back and the
batch is applied again one run at a time, each under a savepoint: the guilty run stands alone and is
named, the others land. What is wrong with the disk as a whole (full, gone), or with pages that
belong to no run of the batch, fails the whole batch, with nothing written.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Sequence
from hashlib import blake2b

from llm_orchestrator.errors import StoreReplaced, TooLarge
from llm_orchestrator.store.base import (
    Append,
    Batch,
    Change,
    Outcome,
    Receipt,
    count_posts,
)
from llm_orchestrator.store.queries import load_queries
from llm_orchestrator.store.rows import state_columns
from llm_orchestrator.store.sqlite_change import (
    ChangeWriter,
    Refusal,
    make_indexes,
)
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


class _Uncounted(Exception):
    """The batch is good; only the table that counts commits is damaged."""


class BatchWriter:
    """Applies batches on the one writing connection. Not thread-safe: one thread owns it."""

    def __init__(self, database: sqlite3.Connection, node_id: str, incarnation: str) -> None:
        self._database = database
        self._node_id = node_id
        self._incarnation = incarnation
        self._queries = load_queries()
        self._changes = ChangeWriter(database)
        self._number = self._last_number()
        self._is_healed = False
        self._is_counting = True

    def apply(self, batch: Batch, now_us: int) -> Receipt:
        """One transaction. Raises sqlite3.Error or StoreError with nothing written."""
        now_us = batch.at or now_us
        while True:
            try:
                return self._apply_once(batch, now_us)
            except _Uncounted as error:
                logger.error("table commits is damaged; commits go on uncounted: %s", error)
                self._is_counting = False
            except sqlite3.Error as error:
                if not self._heal(error):
                    raise

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
        """An index that contradicts its table can be made anew; once, for it reads whole tables."""
        if self._is_healed or not is_damage(error):
            return False
        self._is_healed = True
        logger.error("pages are damaged (%s); indexes are made anew from their tables", error)
        make_indexes(self._database)
        return True

    def _last_number(self) -> int:
        """A client opens for each of its commits; an engine begins anew with each life."""
        try:
            [number] = self._changes.execute("last_commit", node_id=self._node_id).fetchone()
        except sqlite3.Error as error:
            logger.error("the table of commits cannot be read: %s", error)
            return 0
        return number if isinstance(number, int) else 0

    def _check_incarnation(self) -> None:
        row = self._database.execute(self._queries["incarnation"].sql).fetchone()
        if row is None or row[0] != self._incarnation:
            raise StoreReplaced(
                "the store was replaced or restored under this process", hint="llmo serve"
            )

    def _apply_together(self, batch: Batch, now_us: int) -> Receipt | None:
        self._changes.posted.clear()
        try:
            rows = [row for append in batch.appends for row in _journal_rows(append)]
            if not self._append(rows):
                return None
            for append in batch.appends:
                self._apply_beside(append, now_us)
            for change in batch.changes:
                self._changes.apply(change, now_us)
        except (sqlite3.Error, Refusal, *_UNFIT) as error:
            if _blame(error) is None:
                raise
            return None
        posted = self._changes.posted
        return Receipt(posted=tuple(posted)) if posted else Receipt()

    def _append(self, rows: Sequence[Row]) -> bool:
        """False when a predecessor is not there: then the key is NULL (see the statement)."""
        try:
            self._database.executemany(self._queries["append"].sql, rows)
        except sqlite3.IntegrityError as error:
            if error.sqlite_errorname == "SQLITE_CONSTRAINT_NOTNULL":
                return False
            raise
        return True

    def _apply_one_by_one(self, batch: Batch, now_us: int) -> Receipt:
        refused: dict[str, Outcome] = {}
        self._changes.posted.clear()
        for append in batch.appends:
            outcome = self._try(append, (), now_us)
            if outcome is not Outcome.LANDED:
                refused[append.run_id] = outcome
        outcome = self._try(None, batch.changes, now_us)
        is_refused = outcome is not Outcome.LANDED
        return Receipt(refused, is_refused=is_refused, posted=tuple(self._changes.posted))

    def _try(self, append: Append | None, changes: Sequence[Change], now_us: int) -> Outcome:
        database = self._database
        database.execute("SAVEPOINT one")
        posted = len(self._changes.posted)
        try:
            if append is not None:
                if not self._append(_journal_rows(append)):
                    self._look_past_index(append)
                    raise Refusal(Outcome.DAMAGED)
                self._apply_beside(append, now_us)
            for change in changes:
                self._changes.apply(change, now_us)
        except (sqlite3.Error, Refusal, *_UNFIT) as error:
            blame = _blame(error)
            if blame is None or not database.in_transaction:
                raise
            is_damaged = isinstance(error, sqlite3.Error) and is_damage(error)
            if is_damaged and (append is None or not self._is_healed):
                raise  # to be healed; or it belongs to no run that could be named in the receipt
            database.execute("ROLLBACK TO one")
            database.execute("RELEASE one")
            outcome = blame if append is None else self._judge(append, blame)
            number = -1 if outcome is Outcome.LANDED else 0  # it had landed before
            self._changes.posted[posted:] = [number] * count_posts(changes, append)
            return outcome
        database.execute("RELEASE one")
        return Outcome.LANDED

    def _look_past_index(self, append: Append) -> None:
        """Raises what heals when the predecessor is there, and only the index hides it."""
        query = self._queries["scan_digest"]
        values = query.bind(run_id=append.run_id, seq=append.prev_seq)
        if self._database.execute(query.sql, values).fetchone() == (append.prev_digest,):
            raise sqlite3.DatabaseError("malformed: the index of the journal hides a row")

    def _judge(self, append: Append, blame: Outcome) -> Outcome:
        """Law 2: my digest at my seq means that it had landed before; another one means fenced."""
        if blame is Outcome.UNFIT:
            return blame
        try:
            if append.entries:
                last = append.entries[-1]
                if self._changes.digest_at(append.run_id, last.seq) == last.digest:
                    return Outcome.LANDED
            is_taken = self._changes.digest_at(append.run_id, append.prev_seq + 1) is not None
        except sqlite3.Error:
            return Outcome.DAMAGED
        return Outcome.FENCED if is_taken and append.accept is None else blame

    def _count(self, batch: Batch, receipt: Receipt) -> None:
        """One row per commit, so that a missing one shows. Damage there stops nobody."""
        if not self._is_counting:
            return
        landed = [
            append
            for append in batch.appends
            if append.entries and append.run_id not in receipt.refused
        ]
        digests = b"".join(append.entries[-1].digest for append in landed)
        try:
            self._changes.execute(
                "count_commit",
                node_id=self._node_id,
                number=self._number + 1,
                entries=sum(len(append.entries) for append in landed),
                digest=blake2b(digests, digest_size=32).digest(),
            )
        except sqlite3.Error as error:
            if is_damage(error):
                raise _Uncounted(error) from error
            raise
        self._number += 1

    def _apply_beside(self, append: Append, now_us: int) -> None:
        """All of an append but its entries."""
        if not append.entries and self._changes.is_moved(
            append.run_id, append.prev_seq, append.prev_digest
        ):
            raise Refusal(Outcome.DAMAGED)
        if append.accept is not None:
            self._changes.accept(append.accept, now_us)
        if append.change is not None:
            last = append.entries[-1]
            done = self._changes.execute(
                "change_state",
                run_id=append.run_id,
                **state_columns(append.change),
                inbox_seen=append.change.inbox_seen,
                epoch=last.epoch,
                head_seq=last.seq,
                head_digest=last.digest,
                now=now_us,
            )
            if done.rowcount != 1:
                raise Refusal(Outcome.DAMAGED)  # the row of `runs` is gone
        for change in append.changes:
            self._changes.apply(change, now_us)


def _blame(error: Exception) -> Outcome | None:
    """What an error says of the run at hand; None when it is not the run's."""
    if isinstance(error, Refusal):
        return error.outcome
    if isinstance(error, sqlite3.IntegrityError):
        return Outcome.CONFLICT
    if isinstance(error, sqlite3.Error) and is_damage(error):
        return Outcome.DAMAGED
    if isinstance(error, UnicodeDecodeError):  # SQLite quotes what is damaged
        return Outcome.DAMAGED
    return Outcome.UNFIT if isinstance(error, _UNFIT) else None


def _journal_rows(append: Append) -> list[Row]:
    """Parameters of `append`, in its order: predecessor and run, then the other columns."""
    rows: list[Row] = []
    seq, digest = append.prev_seq, append.prev_digest
    for entry in append.entries:
        if entry.seq != seq + 1 or entry.run_id != append.run_id:
            raise Refusal(Outcome.UNFIT)
        rows.append((seq, append.run_id, digest, *entry[1:]))
        seq, digest = entry.seq, entry.digest
    return rows
