"""One read-only connection on a thread of its own, and how its errors are told."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from llm_orchestrator.errors import StoreDamaged, StoreError, StoreUnavailable
from llm_orchestrator.store.queries import load_queries
from llm_orchestrator.store.sqlite_file import connect, translate
from llm_orchestrator.store.sqlite_thread import DatabaseThread

T = TypeVar("T")


class SQLiteReader:
    """Runs functions on the connection. It opens at first use: a new store's file comes later."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._thread: DatabaseThread | None = None
        self._database: sqlite3.Connection | None = None
        self._why = ""

    async def open(self) -> None:
        """Connect now, to hear of an absent or foreign file at once."""
        await self.read(lambda database: None)

    async def read(self, function: Callable[[sqlite3.Connection], T]) -> T:
        """`function(connection)` on the reading thread."""
        if self._why:
            raise StoreUnavailable(self._why)
        if self._thread is None:
            self._thread = DatabaseThread("store-reader")

        def work() -> T:
            if self._database is None:
                self._database = connect(self._path, is_read_only=True)
            return function(self._database)

        try:
            result: T = await self._thread.submit(work)
        except sqlite3.Error as error:
            raise translate(error, self._path) from error
        except UnicodeEncodeError as error:
            raise StoreError("a name that is no text cannot be looked up") from error
        except (MemoryError, UnicodeDecodeError) as error:  # a flipped length, a flipped schema
            raise StoreDamaged(
                f"pages of {self._path} are damaged", hint="llmo journal verify --all"
            ) from error
        return result

    async def snapshot(self, function: Callable[[sqlite3.Connection], T]) -> T:
        """Like `read`, and all that `function` reads is of one moment."""

        def work(database: sqlite3.Connection) -> T:
            database.execute("BEGIN")
            try:
                return function(database)
            finally:
                if database.in_transaction:
                    database.execute("ROLLBACK")

        return await self.read(work)

    async def rows(self, name: str, /, **values: object) -> list[Any]:
        """All rows of a named statement."""
        query = load_queries()[name]
        return await self.read(lambda db: db.execute(query.sql, query.bind(**values)).fetchall())

    def shut(self, why: str) -> None:
        """Let go of the file, and read nothing until `open_again`."""
        self._why = why
        self.close()

    def open_again(self) -> None:
        """The opposite of `shut`."""
        self._why = ""

    def close(self) -> None:
        """End the thread and the connection."""
        if self._thread is not None:
            self._thread.stop()
            self._thread = None
        if self._database is not None:
            self._database.close()
            self._database = None
