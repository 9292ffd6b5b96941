"""The changes of a batch: everything that is not a journal entry, one statement or two for each.

Runs inside BatchWriter's transaction and never opens or ends one.
"""

from __future__ import annotations

import logging
import sqlite3

from llm_orchestrator.model import NewRun, Workflow
from llm_orchestrator.store.audit import Audit, ForgetAudit
from llm_orchestrator.store.base import (
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
    Register,
    Reindex,
    TrimCommits,
    Unregister,
)
from llm_orchestrator.store.journal import canonical, canonical_value, encode_value
from llm_orchestrator.store.queries import load_queries
from llm_orchestrator.store.rows import row_columns, row_digest

logger = logging.getLogger(__name__)


class Refusal(Exception):
    """A change does not fit what is stored; `outcome` says how."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome)
        self.outcome = outcome


class ChangeWriter:
    """Applies changes on the one writing connection."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database
        self._queries = load_queries()
        self.posted: list[int] = []
        """As in Receipt; whoever begins a batch empties it."""

    def execute(self, name: str, /, **values: object) -> sqlite3.Cursor:
        """Run a named statement."""
        query = self._queries[name]
        return self._database.execute(query.sql, query.bind(**values))

    def digest_at(self, run_id: str, seq: int) -> object:
        """The stored digest of an entry, or None when there is no such entry."""
        row = self.execute("digest_at", run_id=run_id, seq=seq).fetchone()
        return None if row is None else row[0]

    def is_moved(self, run_id: str, seq: int, digest: bytes) -> bool:
        """True when (seq, digest) is not the end of the run's journal."""
        if seq and self.digest_at(run_id, seq) != digest:
            return True
        return self.digest_at(run_id, seq + 1) is not None

    def accept(self, run: NewRun, now_us: int) -> None:
        """The row of `runs` for a run that is being accepted."""
        self.execute(
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
            input=encode_value(run.input),
            created_at=now_us,
        )

    def apply(self, change: Change, now_us: int) -> None:
        """Carry out one change. Raises Refusal or sqlite3.Error; the transaction stays open."""
        match change:
            case Post():
                self._post(change, now_us)
            case PutRecord():
                self._put_record(change)
            case PutProgress():
                self._put_progress(change)
            case Register():
                self._register(change.workflow, now_us)
            case Unregister():
                self._unregister(change)
            case PutVectors():
                self._put_vectors(change)
            case Mend():
                self._mend(change)
            case Audit():
                for entry in change.entries:
                    self.execute("audit_entry", **entry._asdict())
            case ForgetAudit():
                self.execute("forget_audit", chain_id=change.chain_id)
            case _:
                self._apply_small(change)

    def _apply_small(self, change: Change) -> None:
        match change:
            case Consume():
                for number in change.numbers:
                    self.execute("consume", run_id=change.run_id, number=number)
            case DropProgress():
                self.execute("drop_progress", run_id=change.run_id, step=change.step)
            case PutBlob():
                self.execute(
                    "put_blob", run_id=change.run_id, digest=change.digest, content=change.content
                )
            case Expire():
                for run_id in change.run_ids:
                    if self.execute("expire_run", run_id=run_id).rowcount == 1:
                        for table in ("journal", "inbox", "blobs", "progress"):
                            self.execute(f"expire_{table}", run_id=run_id)
            case Reindex():
                make_indexes(self._database)
            case TrimCommits():
                self.execute("trim_commits", keep=change.keep, limit=change.limit)

    def _put_progress(self, change: PutProgress) -> None:
        handle = encode_value(change.handle)
        self.execute(
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
        self.execute(
            "register",
            name=flow.name,
            version=flow.version,
            digest=flow.digest,
            definition=flow.definition,
            created_at=flow.created_at or now_us,
        )

    def _unregister(self, change: Unregister) -> None:
        done = self.execute("unregister", name=change.name, version=change.version)
        if not done.rowcount:
            raise Refusal(Outcome.CONFLICT)

    def _put_vectors(self, change: PutVectors) -> None:
        for key, vector, metadata in change.rows:
            self.execute(
                "put_vector",
                index_name=change.index,
                namespace=change.namespace,
                id=key,
                vector=vector,
                metadata=metadata,
            )

    def _post(self, change: Post, now_us: int) -> None:
        row = self.execute(
            "next_message", run_id=change.run_id, sender_key=change.sender_key
        ).fetchone()
        if row is None:
            self.posted.append(0)
            return  # this sender_key was posted before, or there is no such run
        payload = encode_value(change.payload)
        self.execute(
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
        self.posted.append(row[0])

    def _put_record(self, change: PutRecord) -> None:
        kind, key, version = change.kind, change.key, change.version
        value = canonical_value(change.value)
        digest = row_digest(kind, key, version + 1, value)
        if change.value is None:
            done = self.execute("delete_record", kind=kind, key=key, version=version)
        elif version == 0:
            done = self.execute("insert_record", kind=kind, key=key, value=value, digest=digest)
        else:
            done = self.execute(
                "update_record", kind=kind, key=key, value=value, digest=digest, version=version
            )
        if done.rowcount != 1:
            raise Refusal(Outcome.CONFLICT)

    def _mend(self, change: Mend) -> None:
        for entry in change.entries:
            self.execute("mend_entry", **entry._asdict())
        row = change.row
        if row is None:
            return
        if self.is_moved(change.run_id, row.head_seq, row.head_digest):
            raise Refusal(Outcome.FENCED)
        self.execute("drop_row", run_id=change.run_id)
        self.accept(row.accept, row.created_at)
        self.execute("set_row", run_id=change.run_id, **row_columns(row))


def make_indexes(database: sqlite3.Connection) -> None:
    """Make the indexes anew from their tables; one that cannot be is reported."""
    for table in ("runs", "journal", "inbox", "records"):
        try:
            database.execute(f"REINDEX {table}")
        except sqlite3.Error as error:
            logger.error("the indexes of %s are damaged and stay so: %s", table, error)
