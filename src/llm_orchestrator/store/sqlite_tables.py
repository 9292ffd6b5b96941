"""The rows of a store that is a file. See tables.py."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Self

from llm_orchestrator.errors import StoreError
from llm_orchestrator.store.sqlite_file import connect, translate
from llm_orchestrator.store.tables import COLUMNS, PAGE_ROWS, Row, neutral, own, sqlite_mail


class SQLiteTables:
    """See Tables. One transaction from the first row to the end of the block."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._database: sqlite3.Connection | None = None

    async def __aenter__(self) -> Self:
        self._database = await asyncio.to_thread(connect, self._path)
        self._database.execute("BEGIN")
        return self

    async def __aexit__(self, *error: object) -> None:
        database, self._database = self._open, None
        try:
            await asyncio.to_thread(database.execute, "ROLLBACK" if error[0] else "COMMIT")
        except sqlite3.Error as trouble:
            raise translate(trouble, self._path) from trouble
        finally:
            database.close()

    async def pages(self, table: str) -> AsyncIterator[list[Row]]:
        columns = ", ".join(COLUMNS[table])
        some = "WHERE rowid > ? ORDER BY rowid LIMIT ?"
        statement = f"SELECT rowid, {columns} FROM {table} {some}"  # noqa: S608 (our names)
        last = -(1 << 63)
        while rows := await self._do(statement, (last, PAGE_ROWS)):
            last = rows[-1][0]
            yield [neutral(table, tuple(row[1:]), sqlite_mail) for row in rows]

    async def write(self, table: str, rows: Sequence[Row]) -> None:
        marks = ", ".join("?" * len(COLUMNS[table]))
        columns = ", ".join(COLUMNS[table])
        statement = f"INSERT INTO {table} ({columns}) VALUES ({marks})"  # noqa: S608 (our names)
        mine = [own(table, row, sqlite_mail) for row in rows]
        try:
            await asyncio.to_thread(self._open.executemany, statement, mine)
        except sqlite3.Error as error:
            raise translate(error, self._path) from error

    @property
    def _open(self) -> sqlite3.Connection:
        if self._database is None:
            raise StoreError(f"{self._path} is not open")
        return self._database

    async def _do(self, statement: str, values: Row) -> list[Row]:
        database = self._open
        try:
            return await asyncio.to_thread(lambda: database.execute(statement, values).fetchall())
        except sqlite3.Error as error:
            raise translate(error, self._path) from error
