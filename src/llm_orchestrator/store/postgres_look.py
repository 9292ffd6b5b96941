"""Reading runs and journals from PostgreSQL: see store.base.Look."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from llm_orchestrator.errors import StoreDamaged
from llm_orchestrator.model import Entry, Flaw, Journal, Message, Run
from llm_orchestrator.store.base import Progress, RunFilter, RunRow
from llm_orchestrator.store.check import Anchor, check_journal
from llm_orchestrator.store.journal import blob_digest
from llm_orchestrator.store.postgres_read import Pool
from llm_orchestrator.store.postgres_turn import numbered
from llm_orchestrator.store.queries import load_queries
from llm_orchestrator.store.rows import (
    is_run_id,
    json_text,
    listed,
    parse_value,
    row_digest,
    run_of,
    run_row_of,
)

logger = logging.getLogger(__name__)


class PostgresLook:
    """See store.base.Look for every method's contract."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._reported: set[str] = set()

    # -- journals ------------------------------------------------------------------------------

    async def load(self, run_ids: Sequence[str]) -> dict[str, Journal]:
        wanted = [run_id for run_id in run_ids if is_run_id(run_id)]
        if not wanted:
            return {}
        try:
            found = await self._load(wanted)
            if odd := [run_id for run_id, journal in found.items() if journal.flaws]:
                # Between two of our statements a run may have aged out, or been accepted.
                whole = {run_id: found[run_id] for run_id in found if run_id not in odd}
                return {**whole, **await self._load(odd)}
            return found
        except StoreDamaged as error:
            logger.error("%s", error.message)
            if len(wanted) == 1:
                flaw = Flaw(wanted[0], 1, "its pages cannot be read", is_mendable=False)
                return {wanted[0]: Journal(wanted[0], (), (flaw,))}
        found = {}
        for run_id in wanted:  # the damage is one run's, or few runs': the others go on
            found.update(await self.load([run_id]))
        return found

    async def _load(self, run_ids: Sequence[str]) -> dict[str, Journal]:
        queries = load_queries("postgres")
        async with self._pool.connection() as connection:
            # The anchors first: entries that come in between are no contradiction.
            anchors = await connection.fetch(queries["anchors"].sql, run_ids)
            rows = await connection.fetch(queries["journals"].sql, run_ids)
        heads = {str(row[0]): (row[1], row[2]) for row in anchors}
        entries: dict[str, list[Entry]] = {}
        for row in rows:
            run_id = str(row[0])
            entries.setdefault(run_id, []).append(Entry(run_id, *row[1:]))
        blobs = await self._blobs(entries)
        found = {}
        for run_id in run_ids:
            if run_id in heads or run_id in entries:
                own = entries.get(run_id, [])
                found[run_id] = _checked(run_id, own, heads.get(run_id), blobs=blobs)
        return found

    async def _blobs(self, entries: dict[str, list[Entry]]) -> dict[tuple[str, bytes], bytes]:
        blobs = {}
        for run_id, rows in entries.items():
            for entry in rows:
                digest = blob_digest(entry.payload)
                if digest is not None:
                    for row in await self._pool.rows("blob", run_id=run_id, digest=digest):
                        blobs[run_id, digest] = row[0]
        return blobs

    async def stored(self, run_id: str) -> list[Entry]:
        if not is_run_id(run_id):
            return []
        rows = await self._pool.rows("journals", runs=[run_id])
        return [Entry(run_id, *row[1:]) for row in rows]

    # -- runs ----------------------------------------------------------------------------------

    async def run(self, run_id: str) -> Run | None:
        if not is_run_id(run_id):
            return None
        rows = await self._pool.rows("run", run_id=run_id)
        return run_of(plain(rows[0])) if rows else None

    async def row(self, run_id: str) -> RunRow | None:
        if not is_run_id(run_id):
            return None
        try:
            rows = await self._pool.rows("run_row", run_id=run_id)
            return run_row_of(run_id, plain(rows[0])) if rows else None
        except StoreDamaged:
            return None

    async def runs(self, wanted: RunFilter) -> list[Run]:
        label = wanted.label and f"{json_text(wanted.label[0])}:{json_text(wanted.label[1])}"
        parent, before = wanted.parent_run_id, wanted.before
        if parent is not None and not is_run_id(parent):
            return []
        rows = await self._pool.rows(
            "runs",
            states=listed(wanted.states),
            workflow=wanted.workflow,
            parent_run_id=parent,
            queue=wanted.queue,
            label=label,
            since=wanted.since,
            until=wanted.until,
            before=before,
            limit=wanted.limit,
        )
        return self.readable(rows)

    async def run_ids(self) -> list[str]:
        found = {str(row[0]) for row in await self._pool.rows("ids_of_rows")}
        found |= {str(row[0]) for row in await self._pool.rows("ids_of_entries")}
        return sorted(found)

    async def unfinished(self) -> list[str]:
        states = {str(row[0]): row[1] for row in await self._pool.rows("states")}
        done = {key for key, state in states.items() if state in _FINAL}
        return [run_id for run_id in await self.run_ids() if run_id not in done]

    async def next_wake(self) -> int | None:
        rows = await self._pool.rows("next_wake")
        return rows[0][0] if rows else None

    async def expirable(self, *, finished_before: int, keep: int, limit: int) -> list[Run]:
        rows = await self._pool.rows(
            "expirable", finished_before=finished_before, keep=keep, limit=limit
        )
        return self.readable(rows)

    def readable(self, rows: Sequence[Any]) -> list[Run]:
        """The runs whose rows make sense; the others are reported once and keep nobody waiting."""
        runs = []
        for row in rows:
            try:
                runs.append(run_of(plain(row)))
            except StoreDamaged as error:
                if error.message not in self._reported:
                    self._reported.add(error.message)
                    logger.error("%s (%s)", error.message, error.hint)
        return runs

    # -- what stands beside a run --------------------------------------------------------------

    async def inbox(self, run_id: str) -> list[Message]:
        if not is_run_id(run_id):
            return []
        messages = []
        for row in await self._pool.rows("inbox", run_id=run_id):
            _, number, kind, name, payload, sender_key, digest = row
            own = row_digest(run_id, kind, name, sender_key, payload)
            if digest != numbered(own, number):
                raise StoreDamaged(
                    f"message {number} of run {run_id} does not fit its digest",
                    run_id=run_id,
                    hint=f"llmo journal verify {run_id}",
                )
            messages.append(Message(run_id, number, kind, name, parse_value(payload), sender_key))
        return messages

    async def inbox_seqs(self, run_ids: Sequence[str]) -> dict[str, int]:
        wanted = [run_id for run_id in run_ids if is_run_id(run_id)]
        rows = await self._pool.rows("inbox_seqs", runs=wanted) if wanted else []
        return {str(row[0]): row[1] for row in rows}

    async def progress(self, run_id: str, step: str) -> Progress | None:
        rows = await self._pool.rows("progress", run_id=run_id, step=step)
        pieces: dict[int, list[str]] = {}
        handles: dict[int, Any] = {}
        for attempt, part, content, handle, digest in rows:
            try:
                text = content.decode()
            except UnicodeDecodeError:
                return None
            if digest != row_digest(run_id, step, attempt, part, text, handle):
                return None  # a damaged piece costs money, never truth
            pieces.setdefault(attempt, []).append(text)
            if (value := parse_value(handle)) is not None:
                handles[attempt] = value
        if not pieces:
            return None
        newest = max(pieces)
        return Progress(newest, "".join(pieces[newest]), handles.get(newest))

    async def structure(self) -> list[str]:
        found = []
        try:
            for node_id, *_ in await self._pool.rows("commit_gaps"):
                found.append(f"commits of node {node_id} are missing")
            records = await self._pool.rows("all_records")
            found += [
                f"record {tuple(row[:2])} does not fit its digest"
                for row in records
                if row[4] != row_digest(*row[:4])
            ]
            for run_id, *columns, content, handle, digest in await self._pool.rows("all_progress"):
                text = content.decode(errors="replace")
                if digest != row_digest(str(run_id), *columns, text, handle):
                    found.append(f"progress of run {run_id} does not fit its digest")
        except StoreDamaged as error:
            found.append(error.message)
        return found


_FINAL = ("completed", "failed", "cancelled")


def _checked(
    run_id: str,
    entries: list[Entry],
    head: tuple[int, bytes | None] | None,
    *,
    blobs: dict[tuple[str, bytes], bytes],
) -> Journal:
    broken = [] if head is not None else [Flaw(run_id, 0, "the row of runs is missing")]
    if not entries:
        broken.append(Flaw(run_id, 1, "row missing: there is no journal", is_mendable=False))
    anchor = Anchor(head[0], head[1]) if head is not None and head[1] is not None else None

    def read(digest: bytes) -> bytes | None:
        return blobs.get((run_id, digest))

    return check_journal(run_id, entries, read, broken=broken, anchor=anchor)


def plain(row: Sequence[Any]) -> list[Any]:
    """A row with ids as text, wherever they stand in it."""
    return [str(value) if type(value).__name__ == "UUID" else value for value in row]
