"""Reading past pages that cannot be read: row by row, each row by its key, errors skipped.

Slow and only used after the ordinary statement has failed: one damaged page of `runs` must not keep
the runs of the other pages from being claimed, nor one of the journal hide a run's other entries.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterator, Sequence
from typing import Any

from llm_orchestrator.model import Entry, Flaw, RunState
from llm_orchestrator.store.check import INDEX_DAMAGED, entry_of
from llm_orchestrator.store.journal import GAP_MAX
from llm_orchestrator.store.queries import load_queries

logger = logging.getLogger(__name__)
Row = Sequence[Any]
_FINAL = frozenset(state.value for state in RunState if state.is_final)


def read_entries(database: sqlite3.Connection, run_id: str) -> tuple[list[Entry], list[Flaw]]:
    """A run's rows in order, and a flaw for each that is there and cannot be read."""
    query = load_queries()["journal_from"]
    entries: list[Entry] = []
    try:
        for row in database.execute(query.sql, query.bind(run_id=run_id)):
            if row[0] != run_id:
                if row[1] == 1:
                    break
                return scan_entries(database, run_id)  # no run begins there: the key is damaged
            entry = entry_of(row)
            if entry is not None:
                entries.append(entry)
    except sqlite3.DatabaseError:
        return scan_entries(database, run_id)
    return sorted(entries, key=lambda entry: entry.seq), []


def scan_entries(database: sqlite3.Connection, run_id: str) -> tuple[list[Entry], list[Flaw]]:
    """Like `read_entries`, past the index: the table is a second copy of its keys."""
    query = load_queries()["journal_scan"]
    try:
        rows = database.execute(query.sql, query.bind(run_id=run_id)).fetchall()
    except sqlite3.DatabaseError:
        return _entries_one_by_one(database, run_id)
    entries = [entry for row in rows if (entry := entry_of(row)) is not None]
    return entries, [Flaw(run_id, 0, INDEX_DAMAGED)]


def _entries_one_by_one(
    database: sqlite3.Connection, run_id: str
) -> tuple[list[Entry], list[Flaw]]:
    query = load_queries()["journal_row"]
    entries: list[Entry] = []
    flaws: list[Flaw] = []
    seq, misses = 1, 0
    while misses < GAP_MAX:
        misses += 1
        try:
            row = database.execute(query.sql, query.bind(run_id=run_id, seq=seq)).fetchone()
        except sqlite3.DatabaseError as error:
            flaws.append(Flaw(run_id, seq, f"page unreadable: {error}", is_mendable=False))
        else:
            entry = entry_of(row) if row else None
            if entry is not None:
                entries.append(entry)
                misses = 0
        seq += 1
    last = entries[-1].seq if entries else 0
    return entries, [flaw for flaw in flaws if flaw.seq <= last + 1]


def read_run_rows(database: sqlite3.Connection) -> list[Row]:
    """Every row of `runs` that can be read (the columns of statement `run`)."""
    query = load_queries()["run"]
    rows = []
    for run_id in read_run_ids(database):
        try:
            row = database.execute(query.sql, query.bind(run_id=run_id)).fetchone()
        except sqlite3.DatabaseError as error:
            logger.error("the row of run %s cannot be read: %s", run_id, error)
        else:
            if row is not None:
                rows.append(row)
    return rows


def read_run_ids(database: sqlite3.Connection) -> list[str]:
    """Every run of which a row or an entry can be found."""
    return sorted({*_column(database, "ids_of_rows"), *_column(database, "ids_of_entries")})


def read_unfinished(database: sqlite3.Connection) -> list[str]:
    """Every run whose row is not final, or is missing."""
    states = {row[0]: row[1] for row in _pairs(database, "states")}
    found = {run_id for run_id, state in states.items() if state not in _FINAL}
    found.update(run_id for run_id in _column(database, "ids_of_entries") if run_id not in states)
    return sorted(found)


def _column(database: sqlite3.Connection, name: str) -> Iterator[str]:
    return (run_id for run_id, *_ in _pairs(database, name))


def _pairs(database: sqlite3.Connection, name: str) -> Iterator[Row]:
    """Rows that begin with a run's id; damaged ids are reported and left out."""
    try:
        for row in database.execute(load_queries()[name].sql):
            if isinstance(row[0], str) and is_text(row[0]):
                yield row
            else:
                logger.error("a run's id is damaged: %r", row[0])
    except sqlite3.DatabaseError as error:
        logger.error("the ids of runs cannot be read to their end: %s", error)


def is_text(value: str) -> bool:
    """False for what a flipped bit leaves of text: no statement takes it."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
