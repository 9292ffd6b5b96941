"""Reading runs and journals from SQLite, with suspicion: see store.base.Look."""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Sequence
from functools import partial
from typing import Any

from llm_orchestrator.errors import StoreDamaged
from llm_orchestrator.model import Entry, Flaw, Journal, Json, Message, NewRun, Run, RunState
from llm_orchestrator.store.base import Progress, RunFilter
from llm_orchestrator.store.check import check_journal, missing_tail
from llm_orchestrator.store.queries import load_queries
from llm_orchestrator.store.sqlite_reader import SQLiteReader, parse
from llm_orchestrator.store.sqlite_write import message_digest

logger = logging.getLogger(__name__)
_GAP_MAX = 1_000


class SQLiteLook:
    """See store.base.Look for every method's contract."""

    def __init__(self, reader: SQLiteReader) -> None:
        self._reader = reader
        self._queries = load_queries()

    async def load(self, run_ids: Sequence[str]) -> dict[str, Journal]:
        return await self._reader.read(lambda db: self._load(db, run_ids))

    def _load(self, database: sqlite3.Connection, run_ids: Sequence[str]) -> dict[str, Journal]:
        journals: dict[str, Journal] = {}
        anchor = self._queries["anchor"]
        for run_id in run_ids:
            entries, flaws = self._entries(database, run_id)
            if not entries and not flaws:
                continue
            try:
                found = database.execute(anchor.sql, anchor.bind(run_id=run_id)).fetchone()
            except sqlite3.DatabaseError:
                found = None
            flaws += missing_tail(run_id, entries, found[0] if found else 0)
            read_blob = partial(self._blob, database, run_id)
            journals[run_id] = check_journal(run_id, entries, flaws, read_blob)
        return journals

    def _entries(self, database: sqlite3.Connection, run_id: str) -> tuple[list[Entry], list[Flaw]]:
        query = self._queries["journal"]
        try:
            rows = database.execute(query.sql, query.bind(run_id=run_id)).fetchall()
        except sqlite3.DatabaseError:
            return self._salvage(database, run_id)
        return [Entry(*row) for row in rows], []

    async def stored(self, run_id: str) -> list[Entry]:
        return await self._reader.read(lambda db: self._entries(db, run_id)[0])

    async def acceptance(self, run_id: str) -> NewRun | None:
        try:
            rows = await self._reader.rows("acceptance", run_id=run_id)
            if not rows:
                return None
            *columns, origin, labels, value = rows[0]
            facts = [*columns, parse(origin), parse(labels), parse(value)]
            return NewRun(run_id, *facts)
        except StoreDamaged:
            return None

    def _salvage(self, database: sqlite3.Connection, run_id: str) -> tuple[list[Entry], list[Flaw]]:
        """Row by row, past pages that cannot be read; stops after a gap of a thousand."""
        query = self._queries["journal_row"]
        rows: list[Entry] = []
        flaws: list[Flaw] = []
        seq, misses = 1, 0
        while misses < _GAP_MAX:
            try:
                row = database.execute(query.sql, query.bind(run_id=run_id, seq=seq)).fetchone()
                misses = 0 if row else misses + 1
                if row:
                    rows.append(Entry(*row))
            except sqlite3.DatabaseError as error:
                misses += 1
                flaws.append(Flaw(run_id, seq, f"page unreadable: {error}", is_mendable=False))
            seq += 1
        last = rows[-1].seq if rows else 0
        return rows, [flaw for flaw in flaws if flaw.seq <= last + 1]

    def _blob(self, database: sqlite3.Connection, run_id: str, digest: bytes) -> bytes | None:
        query = self._queries["blob"]
        try:
            row = database.execute(query.sql, query.bind(run_id=run_id, digest=digest)).fetchone()
        except sqlite3.DatabaseError:
            return None
        return row[0] if row else None

    async def run(self, run_id: str) -> Run | None:
        rows = await self._reader.rows("run", run_id=run_id)
        return _run(rows[0]) if rows else None

    async def runs(self, wanted: RunFilter) -> list[Run]:
        label = wanted.label and f"{json.dumps(wanted.label[0])}:{json.dumps(wanted.label[1])}"
        rows = await self._reader.rows(
            "runs",
            states=f",{','.join(wanted.states)}," if wanted.states else "",
            workflow=wanted.workflow,
            parent_run_id=wanted.parent_run_id,
            queue=wanted.queue,
            label=label,
            before=wanted.before,
            limit=wanted.limit,
        )
        return _readable(rows)

    async def result(self, run_id: str) -> tuple[Json, Json]:
        rows = await self._reader.rows("result", run_id=run_id)
        output, error = rows[0] if rows else (None, None)
        return parse(output), parse(error)

    async def claimable(self, now_us: int, limit: int) -> list[Run]:
        return _readable(await self._reader.rows("claimable", now=now_us, limit=limit))

    async def owned(self, owners_alive: Sequence[str]) -> list[str]:
        owner = owners_alive[0] if owners_alive else ""
        return [str(row[0]) for row in await self._reader.rows("owned", node_id=owner)]

    async def next_wake(self) -> int | None:
        [[wake_at]] = await self._reader.rows("next_wake")
        return wake_at if isinstance(wake_at, int) else None

    async def inbox(self, run_id: str) -> list[Message]:
        messages = []
        for row in await self._reader.rows("inbox", run_id=run_id):
            run, number, kind, name, payload, sender_key, digest = row
            if message_digest(run, number, kind, name, payload) != digest:
                raise StoreDamaged(
                    f"message {number} of run {run_id} does not fit its digest", run_id=run_id
                )
            messages.append(Message(run, number, kind, name, parse(payload), sender_key))
        return messages

    async def progress(self, run_id: str, step: str) -> Progress | None:
        rows = await self._reader.rows("progress", run_id=run_id, step=step)
        if not rows:
            return None
        newest = max(int(str(row[0])) for row in rows)
        parts = [row for row in rows if row[0] == newest]
        handles = [row[2] for row in parts if row[2] is not None]
        return Progress(
            newest, "".join(str(row[1]) for row in parts), parse(handles[-1]) if handles else None
        )

    async def expirable(self, *, finished_before: int, keep: int, limit: int) -> list[str]:
        rows = await self._reader.rows(
            "expirable", finished_before=finished_before, keep=keep, limit=limit
        )
        return [str(row[0]) for row in rows]

    async def run_ids(self) -> list[str]:
        return [str(row[0]) for row in await self._reader.rows("run_ids")]

    async def structure(self) -> list[str]:
        def work(database: sqlite3.Connection) -> list[str]:
            try:
                rows = database.execute("PRAGMA integrity_check(20)").fetchall()
            except sqlite3.DatabaseError as error:
                return [str(error)]
            return [] if rows == [("ok",)] else [str(row[0]) for row in rows]

        return await self._reader.read(work)


def _readable(rows: Sequence[Sequence[Any]]) -> list[Run]:
    """The runs whose rows make sense; the others are reported and keep nobody waiting."""
    runs = []
    for row in rows:
        try:
            runs.append(_run(row))
        except StoreDamaged as error:
            logger.error("%s (%s)", error.message, error.hint)
    return runs


def _run(row: Sequence[Any]) -> Run:
    values = list(row)
    try:
        values[4] = RunState(values[4])
        values[14] = json.loads(values[14])
    except (ValueError, TypeError) as error:
        raise StoreDamaged(
            f"the row of run {values[0]} is damaged: {error}",
            run_id=str(values[0]),
            hint=f"llmo journal repair {values[0]}",
        ) from error
    return Run(*values)
