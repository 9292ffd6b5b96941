"""Changes one after another, in a transaction: what one statement cannot say.

The same sequential statements as on SQLite (see sqlite_change.py). Rare: registering a definition,
large payloads, vectors, repair, retention, and batches that touch one row twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from typing import Any

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
from llm_orchestrator.store.postgres_connect import Connection
from llm_orchestrator.store.postgres_write import mail_digest, progress_row
from llm_orchestrator.store.queries import load_queries
from llm_orchestrator.store.rows import is_run_id, row_columns, row_digest
from llm_orchestrator.store.shelf import as_text
from llm_orchestrator.vector_math import unpack

DIMENSIONS_MAX = 16_000
"""Of pgvector."""
_PROGRESS = ("run_id", "step", "attempt", "part", "text", "handle", "digest")


class Refusal(Exception):
    """A change does not fit what is stored; `outcome` says how."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome)
        self.outcome = outcome


class Turn:
    """Applies changes within a transaction that its maker opened."""

    def __init__(self, connection: Connection, now_us: int, *, has_nearest: bool = False) -> None:
        self._connection = connection
        self._now_us = now_us
        self._has_nearest = has_nearest
        self.posted: list[tuple[Post, int]] = []
        """What was put into inboxes, and under which number."""

    async def apply(self, changes: Sequence[Change]) -> None:
        """Carry them out. Raises Refusal or what asyncpg raises."""
        for change in changes:
            if isinstance(change, Post | Consume | DropProgress) and not is_run_id(change.run_id):
                continue  # no such run can be
            match change:
                case Post():
                    await self._post(change)
                case PutRecord():
                    await self._put_record(change)
                case Mend():
                    await self._mend(change)
                case Expire():
                    await self._expire(change)
                case PutVectors():
                    await self._put_vectors(change)
                case Unregister():
                    await self._unregister(change)
                case Audit() | ForgetAudit():
                    await self._audit(change)
                case _:
                    await self._small(change)

    async def _small(self, change: Change) -> None:
        match change:
            case Consume():
                for number in change.numbers:
                    await self._run("consume", run_id=change.run_id, number=number)
            case PutProgress():
                row = dict(zip(_PROGRESS, progress_row(change), strict=True))
                await self._run("put_progress", **row)
            case DropProgress():
                await self._run("drop_progress", run_id=change.run_id, step=change.step)
            case PutBlob():
                where = {"run_id": change.run_id, "digest": change.digest}
                await self._run("put_blob", **where, content=change.content)
            case Register():
                flow = change.workflow
                await self._run(
                    "register",
                    name=flow.name,
                    version=flow.version,
                    digest=flow.digest,
                    definition=flow.definition,
                    created_at=flow.created_at or self._now_us,
                )
            case Reindex():
                await self._connection.execute("REINDEX TABLE journal")
                await self._connection.execute("REINDEX TABLE runs")
            case TrimCommits():
                await self._run("trim_commits", keep=change.keep, limit=change.limit)

    async def _audit(self, change: Audit | ForgetAudit) -> None:
        if isinstance(change, ForgetAudit):
            await self._touch("forget_audit", chain_id=change.chain_id)
            return
        for entry in change.entries:
            await self._run("audit_entry", **entry._asdict())

    async def _run(self, name: str, /, **values: object) -> int:
        """Execute a named statement; how many rows it touched."""
        query = load_queries("postgres")[name]
        done = await self._connection.fetch(query.sql, *query.bind(**values))
        return len(done)

    async def _touch(self, name: str, /, **values: object) -> int:
        """Like `_run`, by the server's count of rows."""
        query = load_queries("postgres")[name]
        status: str = await self._connection.execute(query.sql, *query.bind(**values))
        return int(status.rpartition(" ")[2])

    async def _post(self, change: Post) -> None:
        query = load_queries("postgres")["next_message"]
        values = query.bind(run_id=change.run_id, sender_key=change.sender_key)
        number = await self._connection.fetchval(query.sql, *values)
        if number is None:
            return  # this sender_key was posted before, or there is no such run
        payload = encode_value(change.payload)
        await self._run(
            "post",
            run_id=change.run_id,
            number=number,
            kind=change.kind,
            name=change.name,
            payload=payload,
            sender_key=change.sender_key,
            digest=numbered(mail_digest(change, payload), number),
            created_at=self._now_us,
        )
        self.posted.append((change, number))

    async def _put_record(self, change: PutRecord) -> None:
        where: dict[str, Any] = {"kind": change.kind, "key": change.key}
        if change.value is None:
            done = await self._touch("delete_record", **where, version=change.version)
        else:
            value = canonical_value(change.value)
            digest = row_digest(change.kind, change.key, change.version + 1, value)
            where.update(value=value, digest=digest)
            if change.version == 0:
                done = await self._touch("insert_record", **where)
            else:
                done = await self._touch("update_record", **where, version=change.version)
        if done != 1:
            raise Refusal(Outcome.CONFLICT)

    async def _unregister(self, change: Unregister) -> None:
        if not await self._touch("unregister", name=change.name, version=change.version):
            raise Refusal(Outcome.CONFLICT)

    async def _put_vectors(self, change: PutVectors) -> None:
        name = "put_vector_near" if self._has_nearest else "put_vector"
        query = load_queries("postgres")[name]
        rows = []
        for key, vector, metadata in change.rows:
            values: dict[str, Any] = {"id": key, "vector": vector, "metadata": metadata}
            if self._has_nearest:
                values["near"] = near_text(vector)
            where = {"index_name": change.index, "namespace": change.namespace}
            rows.append(query.bind(**where, **values))
        await self._connection.executemany(query.sql, rows)

    async def _expire(self, change: Expire) -> None:
        for run_id in sorted(filter(is_run_id, change.run_ids)):
            if await self._touch("expire_run", run_id=run_id) == 1:
                for table in ("journal", "inbox", "blobs", "progress"):
                    await self._touch(f"expire_{table}", run_id=run_id)

    async def _mend(self, change: Mend) -> None:
        for entry in change.entries:
            await self._run("mend_entry", **entry._asdict())
        row = change.row
        if row is None:
            return
        is_there = await self._run("lock_row", run_id=change.run_id) == 1
        found = load_queries("postgres")["digest_at"]
        head = await self._connection.fetchval(
            found.sql, *found.bind(run_id=change.run_id, seq=row.head_seq)
        )
        after = await self._connection.fetchval(
            found.sql, *found.bind(run_id=change.run_id, seq=row.head_seq + 1)
        )
        if head != row.head_digest or after is not None:
            raise Refusal(Outcome.FENCED)
        new = row.accept
        await self._run(
            "accept_again" if is_there else "accept",
            run_id=new.run_id,
            workflow=new.workflow,
            version=new.version,
            digest=new.digest,
            priority=new.priority,
            queue=new.queue,
            idempotency_key=new.idempotency_key,
            parent_run_id=new.parent_run_id,
            wake_at=new.wake_at,
            labels=canonical(dict(new.labels)).decode(),
            origin=canonical(dict(new.origin)).decode(),
            input=encode_value(new.input),
            created_at=row.created_at,
        )
        await self._run("set_row", run_id=change.run_id, **row_columns(row))


def near_text(vector: bytes) -> str | None:
    """A stored vector as pgvector reads it; None for one that it has no room for."""
    if len(vector) % 4 or not 0 < len(vector) <= 4 * DIMENSIONS_MAX:
        return None
    return as_text(unpack(vector))


def numbered(digest: bytes, number: int) -> bytes:
    """The digest of a message as PostgreSQL makes it: `sha256(digest || int8send(number))`."""
    return sha256(digest + number.to_bytes(8, "big", signed=True)).digest()
