"""The tables of a PostgreSQL store: made at the first opening, migrated forward at later ones.

`migrations/postgres_NNN.sql`, each once, in order, in one transaction with the row that says so,
under an advisory lock: any number of nodes may open at once. Never back: an older program refuses a
newer store.
"""

from __future__ import annotations

import logging
from pathlib import Path

import asyncpg  # type: ignore[import-untyped]

from llm_orchestrator.clock import Clock
from llm_orchestrator.errors import StoreAbsent, StoreDamaged, StoreForeign, StoreNewer
from llm_orchestrator.store.postgres_connect import Connection, translate
from llm_orchestrator.store.postgres_turn import near_text

logger = logging.getLogger(__name__)

_FOLDER = Path(__file__).with_name("migrations")
_IS_THERE = (
    "SELECT EXISTS (SELECT 1 FROM pg_class "
    "WHERE relname = 'schema_version' AND pg_table_is_visible(oid))"
)
_LOCK = 0x4C4C4D4F
"""`LLMO`: the key of the advisory lock."""


def migrations() -> list[str]:
    """The text of every migration, in order; the number of the last one is the schema's version."""
    return [path.read_text() for path in sorted(_FOLDER.glob("postgres_*.sql"))]


async def prepare(
    connection: Connection, clock: Clock, *, shown: str, may_create: bool
) -> tuple[str, int, str]:
    """Bring the tables up to date; the store's incarnation, generation and role.

    Raises StoreNewer, StoreAbsent (no tables, and none may be made), StoreDamaged, StoreDenied.
    """
    try:
        if await _version(connection) != len(migrations()):
            await _migrate(connection, clock, shown=shown, may_create=may_create)
        row = await connection.fetchrow("SELECT incarnation, generation, role FROM store")
    except Exception as error:
        raise translate(error, shown) from error
    if row is None:
        raise StoreDamaged(f"{shown} has lost its identity row", hint="llmo doctor")
    return row[0], row[1], row[2]


async def _version(connection: Connection) -> int:
    """0 for an empty database. Asks the catalogue itself: to_regclass may answer from a cache."""
    if not await connection.fetchval(_IS_THERE):
        return 0
    found = await connection.fetchval("SELECT max(version) FROM schema_version")
    if not isinstance(found, int | None):
        raise StoreForeign(
            "the table schema_version here is another program's", hint="createdb NAME, for us alone"
        )
    return found or 0


async def _lock(connection: Connection) -> None:
    """Wait for whoever migrates just now, however long that takes; then for nothing else."""
    await connection.execute("SET LOCAL idle_in_transaction_session_timeout = '60s'")
    await connection.execute("SET LOCAL lock_timeout = 0")
    await connection.execute("SELECT pg_advisory_xact_lock($1)", _LOCK)
    await connection.execute("SET LOCAL lock_timeout = '10s'")


async def _migrate(connection: Connection, clock: Clock, *, shown: str, may_create: bool) -> None:
    known = migrations()
    async with connection.transaction():
        await _lock(connection)
        version = await _version(connection)  # somebody may have been quicker
        if version > len(known):
            raise StoreNewer(
                f"{shown} was made by a newer version (schema {version}, this program knows "
                f"{len(known)})",
                hint="pip install --upgrade llm-orchestrator",
            )
        if version == 0 and not may_create:
            raise StoreAbsent(f"there is no store in {shown}", hint="llmo run FILE makes one")
        if version == 0:
            await connection.execute(
                "CREATE TABLE schema_version "
                "(version integer PRIMARY KEY, applied_at bigint NOT NULL)"
            )
        for number in range(version + 1, len(known) + 1):
            await connection.execute(known[number - 1])
            await connection.execute(
                "INSERT INTO schema_version VALUES ($1, $2)", number, clock.now_us()
            )
        if version == 0:
            await connection.execute(
                "INSERT INTO store VALUES (1, $1, 1, 'primary', $2)",
                clock.random_bytes(16).hex(),
                clock.now_us(),
            )


async def prepare_vectors(connection: Connection) -> bool:
    """True when pgvector is there and the table of vectors has its column. Never fails for it."""
    has_column = "SELECT EXISTS (SELECT 1 FROM pg_attribute WHERE attrelid = 'vectors'::regclass "
    has_column += "AND attname = 'embedding' AND NOT attisdropped)"
    if await connection.fetchval(has_column):
        return True
    is_known = "SELECT EXISTS (SELECT 1 FROM pg_available_extensions WHERE name = 'vector')"
    if not await connection.fetchval(is_known):
        return False
    try:
        async with connection.transaction():
            await _lock(connection)
            await connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
            await connection.execute(
                "ALTER TABLE vectors ADD COLUMN IF NOT EXISTS embedding vector"
            )
            rows = await connection.fetch(
                "SELECT index_name, namespace, id, vector FROM vectors WHERE embedding IS NULL"
            )
            await connection.executemany(
                "UPDATE vectors SET embedding = CAST(CAST($4 AS text) AS vector) "
                "WHERE index_name = $1 AND namespace = $2 AND id = $3",
                [(*row[:3], near_text(row[3])) for row in rows],
            )
    except asyncpg.PostgresError as error:
        logger.info("vectors are searched by brute force: %s", error)
        return False
    return True
