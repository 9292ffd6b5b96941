"""The rows of a store on PostgreSQL. See tables.py."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any, Self

import asyncpg  # type: ignore[import-untyped]

from llm_orchestrator.errors import StoreError
from llm_orchestrator.store.postgres_address import parse_address
from llm_orchestrator.store.postgres_connect import Connection, connect, translate
from llm_orchestrator.store.postgres_turn import numbered
from llm_orchestrator.store.rows import row_digest
from llm_orchestrator.store.tables import COLUMNS, PAGE_ROWS, Row, neutral, own

_TROUBLE = (OSError, asyncpg.PostgresError, asyncpg.InterfaceError)
_PATIENT = {"idle_in_transaction_session_timeout": "0", "lock_timeout": "0"}


_Uuid = asyncpg.pgproto.pgproto.UUID
"""What the driver gives for an id."""


class PostgresTables:
    """See Tables. One transaction from the first row to the end of the block."""

    def __init__(self, url: str) -> None:
        self._address = parse_address(url)
        self._connection: Connection | None = None
        self._transaction: Any = None

    async def __aenter__(self) -> Self:
        self._connection, _ = await connect(self._address, settings=_PATIENT)
        self._transaction = self._connection.transaction(isolation="repeatable_read")
        await self._transaction.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        connection, self._connection = self._open, None
        try:
            await (self._transaction.rollback() if error[0] else self._transaction.commit())
            await connection.close(timeout=5)
        except _TROUBLE as trouble:
            raise translate(trouble, self._address.shown) from trouble
        finally:
            connection.terminate()

    async def pages(self, table: str) -> AsyncIterator[list[Row]]:
        statement = f"SELECT {', '.join(COLUMNS[table])} FROM {table}"  # noqa: S608 (names of ours)
        try:
            cursor = await self._open.cursor(statement)
            while rows := await cursor.fetch(PAGE_ROWS):
                yield [neutral(table, _plain(row), _mail) for row in rows]
        except _TROUBLE as error:
            raise translate(error, self._address.shown) from error

    async def write(self, table: str, rows: Sequence[Row]) -> None:
        mine = [own(table, row, _mail) for row in rows]
        try:
            await self._open.copy_records_to_table(table, records=mine, columns=COLUMNS[table])
        except _TROUBLE as error:
            raise translate(error, self._address.shown) from error

    @property
    def _open(self) -> Connection:
        if self._connection is None:
            raise StoreError(f"{self._address.shown} is not open")
        return self._connection


def _plain(row: Any) -> Row:
    return tuple(str(value) if isinstance(value, _Uuid) else value for value in row)


def _mail(row: Row) -> bytes:
    run_id, number, kind, name, payload, sender_key, *_ = row
    return numbered(row_digest(run_id, kind, name, sender_key, payload), number)
