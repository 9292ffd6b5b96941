"""Rows in versions, and what PostgreSQL makes a statement wait for (READ COMMITTED).

A statement is a generator. It yields a `Transaction` that it must wait for, or seconds that pass;
whoever drives it (server.py) sends nothing back. Reads see the versions that were visible when the
statement began. An insert waits for whoever holds the same key; an update waits for whoever holds
the row, then looks at the newest version again (EvalPlanQual).
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import asyncpg  # type: ignore[import-untyped]

Steps = Generator["Transaction | float", None, Any]
Row = Any
VERSIONS_MAX = 64
_GONE = object()


class Cell:
    """One key: its visible versions, oldest first, and at most one that is not committed."""

    __slots__ = ("holder", "new", "versions")

    def __init__(self) -> None:
        self.versions: list[tuple[int, Row]] = []
        self.holder: Transaction | None = None
        self.new: Row = None

    def at(self, snapshot: int, own: Transaction | None = None) -> Row:
        """The row as a snapshot sees it; None when it is not there."""
        if own is not None and self.holder is own:
            return self.new
        for number, row in reversed(self.versions):
            if number <= snapshot:
                return row
        return None

    def newest(self, own: Transaction) -> Row:
        """The row as it stands now, for somebody who holds it or whom nobody keeps waiting."""
        if self.holder is own:
            return self.new
        return self.versions[-1][1] if self.versions else None

    def settle(self, number: int) -> None:
        """The holder's version becomes visible."""
        self.versions.append((number, self.new))
        if len(self.versions) > VERSIONS_MAX:
            del self.versions[0]
        self.holder = self.new = None


Table = dict[Any, Cell]


class Transaction:
    """Whose rows are not visible yet. It ends committed or not; whoever waits goes on then."""

    __slots__ = ("cells", "is_over", "lsn", "snapshot", "waiters", "waits_for", "writes")

    def __init__(self) -> None:
        self.snapshot = 0
        self.writes: list[tuple[str, Any, Row]] = []
        self.cells: list[Cell] = []
        self.waiters: list[Callable[[], None]] = []
        self.waits_for: Transaction | None = None
        self.is_over = False
        self.lsn = 0
        """Where its commit stands in the log; 0 before it is durable."""

    def take(self, where: tuple[str, Any], cell: Cell, row: Row) -> None:
        """Write a row that nobody else holds."""
        if cell.holder is None:
            cell.holder = self
            self.cells.append(cell)
        cell.new = row
        self.writes.append((*where, row))

    def end(self, number: int | None) -> None:
        """Visible as `number`, or rolled back (None)."""
        for cell in self.cells:
            if number is None:
                cell.holder = cell.new = None
            else:
                cell.settle(number)
        self.is_over = True
        waiters, self.waiters = self.waiters, []
        for waiter in waiters:
            waiter()


def wait_for(own: Transaction, cell: Cell) -> Steps:
    """Until nobody else holds the row. Raises a deadlock when they wait for us."""
    while cell.holder is not None and cell.holder is not own:
        other: Transaction | None = cell.holder
        own.waits_for = other
        while other is not None:
            if other is own:
                own.waits_for = None
                raise asyncpg.DeadlockDetectedError("deadlock detected")
            other = other.waits_for
        yield cell.holder
        own.waits_for = None


class Tables:
    """All rows of one server."""

    def __init__(self) -> None:
        self.number = 0
        """Of the last transaction that became visible."""
        self.all: dict[str, Table] = {}
        self.ends: dict[str, int] = {}
        """The highest seq of each run's journal, visible or not."""

    def table(self, name: str) -> Table:
        return self.all.setdefault(name, {})

    def cell(self, name: str, key: Any) -> Cell:
        """The cell of a key, made when it is new."""
        table = self.table(name)
        found = table.get(key)
        if found is None:
            found = table[key] = Cell()
            if name == "journal":
                self.ends[key[0]] = max(self.ends.get(key[0], 0), key[1])
        return found

    def get(self, name: str, key: Any, tx: Transaction) -> Row:
        """One row as the statement's snapshot sees it."""
        cell = self.table(name).get(key)
        return None if cell is None else cell.at(tx.snapshot, tx)

    def rows(self, name: str, tx: Transaction) -> list[tuple[Any, Row]]:
        """Every row that the snapshot sees, with its key."""
        seen = [(key, cell.at(tx.snapshot, tx)) for key, cell in self.table(name).items()]
        return [(key, row) for key, row in seen if row is not None]

    def journal(self, run_id: str, tx: Transaction) -> list[Row]:
        """A run's entries that the snapshot sees, in order."""
        seqs = range(1, self.ends.get(run_id, 0) + 1)
        found = [self.get("journal", (run_id, seq), tx) for seq in seqs]
        return [row for row in found if row is not None]

    # -- writing -------------------------------------------------------------------------------

    def insert(self, tx: Transaction, where: tuple[str, Any], row: Row) -> Steps:
        """Waits for an uncommitted row of the same key. Raises UniqueViolationError."""
        cell = self.cell(*where)
        yield from wait_for(tx, cell)
        if cell.newest(tx) is not None:
            raise asyncpg.UniqueViolationError(f"duplicate key {where}")
        tx.take(where, cell, row)

    def update(
        self, tx: Transaction, where: tuple[str, Any], change: Callable[[Row], Row]
    ) -> Steps:
        """Change a row that the snapshot sees; `change` may say None: it fits no longer."""
        cell = self.table(where[0]).get(where[1])
        if cell is None or cell.at(tx.snapshot, tx) is None:
            return None
        yield from wait_for(tx, cell)
        newest = cell.newest(tx)
        changed = None if newest is None else change(newest)
        if changed is not None:
            tx.take(where, cell, changed)
        return changed

    def upsert(
        self, tx: Transaction, where: tuple[str, Any], change: Callable[[Row], Row]
    ) -> Steps:
        """Insert, or replace what is there (None: leave it)."""
        cell = self.cell(*where)
        yield from wait_for(tx, cell)
        row = change(cell.newest(tx))
        if row is not None:
            tx.take(where, cell, row)

    def delete(self, tx: Transaction, where: tuple[str, Any], fits: Callable[[Row], bool]) -> Steps:
        """Delete a row that the snapshot sees; True when it still fitted."""
        cell = self.table(where[0]).get(where[1])
        if cell is None or cell.at(tx.snapshot, tx) is None:
            return False
        yield from wait_for(tx, cell)
        newest = cell.newest(tx)
        if newest is None or not fits(newest):
            return False
        tx.take(where, cell, None)
        return True

    def replay(self, writes: list[tuple[str, Any, Row]]) -> None:
        """Apply a durable transaction's rows, as recovery does."""
        self.number += 1
        for name, key, row in writes:
            cell = self.cell(name, key)
            cell.new = row
            cell.settle(self.number)
