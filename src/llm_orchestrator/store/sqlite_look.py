"""Reading runs and journals from SQLite, with suspicion: see store.base.Look."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable, Sequence
from functools import partial

from llm_orchestrator.errors import StoreDamaged
from llm_orchestrator.model import Entry, Flaw, Journal, Message, Run, RunState
from llm_orchestrator.store.base import Progress, RunFilter, RunRow
from llm_orchestrator.store.check import Anchor, check_journal
from llm_orchestrator.store.queries import load_queries
from llm_orchestrator.store.rows import (
    filtered,
    json_text,
    listed,
    parse_value,
    row_digest,
    run_of,
    run_row_of,
)
from llm_orchestrator.store.sqlite_file import is_damage
from llm_orchestrator.store.sqlite_reader import SQLiteReader
from llm_orchestrator.store.sqlite_salvage import (
    Row,
    read_entries,
    read_run_ids,
    read_run_rows,
    read_unfinished,
    scan_entries,
)

logger = logging.getLogger(__name__)
_NO_ROW = "the row of runs is missing"
_NOT_FINAL = (RunState.PENDING, RunState.WAITING)


class SQLiteLook:
    """See store.base.Look for every method's contract."""

    def __init__(self, reader: SQLiteReader) -> None:
        self._reader = reader
        self._queries = load_queries()
        self._reported: set[str] = set()

    # -- journals ------------------------------------------------------------------------------

    async def load(self, run_ids: Sequence[str]) -> dict[str, Journal]:
        def work(database: sqlite3.Connection) -> dict[str, Journal]:
            journals = {run_id: self._load(database, run_id) for run_id in run_ids}
            return {run_id: found for run_id, found in journals.items() if found is not None}

        return await self._reader.snapshot(work)

    def _load(self, database: sqlite3.Connection, run_id: str) -> Journal | None:
        entries, flaws = read_entries(database, run_id)
        journal = self._checked(database, run_id, entries, flaws=flaws)
        if journal is None or not any(flaw.seq for flaw in journal.flaws):
            return journal
        scanned, flaws = scan_entries(database, run_id)
        other = self._checked(database, run_id, scanned, flaws=flaws)
        is_better = other is not None and len(other.entries) > len(journal.entries)
        return other if is_better else journal

    def _checked(
        self,
        database: sqlite3.Connection,
        run_id: str,
        entries: Sequence[Entry],
        *,
        flaws: list[Flaw],
    ) -> Journal | None:
        anchor, complaint = self._anchor(database, run_id)
        if not entries and not any(flaw.seq for flaw in flaws):
            if complaint == _NO_ROW:
                return None
            flaws.append(Flaw(run_id, 1, "row missing: there is no journal", is_mendable=False))
        if complaint:
            flaws.append(Flaw(run_id, 0, complaint))
        read_blob = partial(self._blob, database, run_id)
        return check_journal(run_id, entries, read_blob, broken=flaws, anchor=anchor)

    def _anchor(self, database: sqlite3.Connection, run_id: str) -> tuple[Anchor | None, str]:
        """What the row of `runs` says of the journal's head, and what is wrong with the row."""
        query = self._queries["anchor"]
        try:
            row = database.execute(query.sql, query.bind(run_id=run_id)).fetchone()
        except sqlite3.DatabaseError as error:
            return None, f"the row of runs cannot be read: {error}"
        if row is None:
            return None, _NO_ROW
        seq, digest = row
        if seq == 0 and digest is None:
            return None, ""
        if not isinstance(seq, int) or not isinstance(digest, bytes):
            return None, "the row of runs has no readable anchor"
        return Anchor(seq, digest), ""

    def _blob(self, database: sqlite3.Connection, run_id: str, digest: bytes) -> bytes | None:
        query = self._queries["blob"]
        try:
            row = database.execute(query.sql, query.bind(run_id=run_id, digest=digest)).fetchone()
        except sqlite3.DatabaseError:
            return None
        return row[0] if row and isinstance(row[0], bytes) else None

    async def stored(self, run_id: str) -> list[Entry]:
        def work(database: sqlite3.Connection) -> list[Entry]:
            found = [read(database, run_id)[0] for read in (read_entries, scan_entries)]
            return max(found, key=len)

        return await self._reader.snapshot(work)

    # -- runs ----------------------------------------------------------------------------------

    async def run(self, run_id: str) -> Run | None:
        rows = await self._reader.rows("run", run_id=run_id)
        return run_of(rows[0]) if rows else None

    async def row(self, run_id: str) -> RunRow | None:
        try:
            rows = await self._reader.rows("run_row", run_id=run_id)
            return run_row_of(run_id, rows[0]) if rows else None
        except StoreDamaged:
            return None

    async def runs(self, wanted: RunFilter) -> list[Run]:
        label = wanted.label and f"{json_text(wanted.label[0])}:{json_text(wanted.label[1])}"
        found = await self.rows(
            "runs",
            lambda runs: filtered(runs, wanted),
            states=listed(wanted.states),
            workflow=wanted.workflow,
            parent_run_id=wanted.parent_run_id,
            queue=wanted.queue,
            label=label,
            since=wanted.since,
            until=wanted.until,
            before=wanted.before,
            limit=wanted.limit,
        )
        return self.readable(found)

    async def run_ids(self) -> list[str]:
        return await self._reader.snapshot(read_run_ids)

    async def unfinished(self) -> list[str]:
        return await self._reader.snapshot(read_unfinished)

    async def next_wake(self) -> int | None:
        def earliest(runs: list[Run]) -> list[Run]:
            free = [run for run in runs if run.state in _NOT_FINAL and run.owner is None]
            return sorted(free, key=lambda run: run.wake_at)[:1]

        for row in await self.rows("next_wake", earliest):
            wake_at = row.wake_at if isinstance(row, Run) else row[0]
            return wake_at if isinstance(wake_at, int) else None
        return None

    async def expirable(self, *, finished_before: int, keep: int, limit: int) -> list[Run]:
        rows = await self._reader.rows(
            "expirable", finished_before=finished_before, keep=keep, limit=limit
        )
        return self.readable(rows)

    async def rows(
        self, name: str, choose: Callable[[list[Run]], list[Run]], /, **values: object
    ) -> Sequence[Row | Run]:
        """The rows of a statement; when its pages are damaged, `choose` of all that can be read."""
        query = self._queries[name]

        def work(database: sqlite3.Connection) -> Sequence[Row | Run]:
            try:
                rows: list[Row] = database.execute(query.sql, query.bind(**values)).fetchall()
            except sqlite3.DatabaseError as error:
                if not is_damage(error):
                    raise
                logger.error("table runs is damaged, it is read row by row: %s", error)
                return choose(self.readable(read_run_rows(database)))
            return rows

        return await self._reader.read(work)

    def readable(self, rows: Sequence[Row | Run]) -> list[Run]:
        """The runs whose rows make sense; the others are reported once and keep nobody waiting."""
        runs = []
        for row in rows:
            try:
                runs.append(row if isinstance(row, Run) else run_of(row))
            except StoreDamaged as error:
                if error.message not in self._reported:
                    self._reported.add(error.message)
                    logger.error("%s (%s)", error.message, error.hint)
        return runs

    # -- what stands beside a run --------------------------------------------------------------

    async def inbox(self, run_id: str) -> list[Message]:
        messages = []
        for row in await self._reader.rows("inbox", run_id=run_id):
            _, number, kind, name, payload, sender_key, digest = row
            if not isinstance(payload, bytes) or digest != row_digest(
                run_id, number, kind, name, sender_key, payload
            ):
                raise StoreDamaged(
                    f"message {number} of run {run_id} does not fit its digest",
                    run_id=run_id,
                    hint=f"llmo journal verify {run_id}",
                )
            messages.append(Message(run_id, number, kind, name, parse_value(payload), sender_key))
        return messages

    async def inbox_seqs(self, run_ids: Sequence[str]) -> dict[str, int]:
        found = {}
        for run_id in run_ids:
            for row in await self._reader.rows("inbox_seq", run_id=run_id):
                found[run_id] = row[0] if isinstance(row[0], int) else 0
        return found

    async def progress(self, run_id: str, step: str) -> Progress | None:
        rows = await self._reader.rows("progress", run_id=run_id, step=step)
        for attempt, part, text, handle, digest in rows:
            if not isinstance(handle, bytes) or digest != row_digest(
                run_id, step, attempt, part, text, handle
            ):
                return None  # a damaged piece costs money, never truth
        if not rows:
            return None
        newest = max(row[0] for row in rows)
        parts = [row for row in rows if row[0] == newest]
        handles = [value for row in parts if (value := parse_value(row[3])) is not None]
        return Progress(newest, "".join(row[2] for row in parts), handles[-1] if handles else None)

    async def structure(self) -> list[str]:
        def work(database: sqlite3.Connection) -> list[str]:
            try:
                rows = database.execute("PRAGMA integrity_check(20)").fetchall()
                found = [] if rows == [("ok",)] else [str(row[0]) for row in rows]
                for node_id, *_ in database.execute(self._queries["commit_gaps"].sql):
                    found.append(f"commits of node {node_id} are missing")
                for name in ("all_records", "all_progress"):
                    for *columns, digest in database.execute(self._queries[name].sql):
                        if digest != row_digest(*columns):
                            found.append(f"row {columns[:-1]} does not fit its digest")
            except sqlite3.DatabaseError as error:
                return [str(error)]
            return found

        return await self._reader.read(work)
