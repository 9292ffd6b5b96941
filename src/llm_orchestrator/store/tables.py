"""All rows of a store, table by table, in one form for both kinds: to move them, or to compare.

What a store knows of its own server is left out: `nodes` (who lives), `commits` (what its server
has counted), `store` (its identity) and `progress` (pieces of answers under way; losing them costs
money, never truth). Everything else is moved as it is, byte for byte; only a message's digest is
made anew, because each kind has its own.

Opened by address and not by a Store: this is how a store is filled before anybody opens it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, Protocol, Self

from llm_orchestrator.errors import StoreDamaged
from llm_orchestrator.store.rows import row_digest

Row = tuple[Any, ...]
PAGE_ROWS = 500
COLUMNS: Mapping[str, Sequence[str]] = {
    table: columns.split()
    for table, columns in {
        "workflows": "name version digest definition created_at",
        "runs": "run_id workflow version digest state reason owner epoch priority queue "
        "idempotency_key parent_run_id wake_at wake_first inbox_seq labels origin input output "
        "error head_seq head_digest created_at started_at finished_at",
        "journal": "run_id seq epoch kind step attempt digest recorded_at payload",
        "inbox": "run_id number kind name payload sender_key digest created_at",
        "records": "kind key value version digest",
        "vectors": "index_name namespace id vector metadata",
        "blobs": "run_id digest content",
        "audit": "chain_id number recorded_at actor action target result detail request_id "
        "previous digest",
    }.items()
}
"""The tables that are moved, and their columns in the order of a row here. Ids are text."""


class Tables(Protocol):
    """The rows of one store. All raise StoreError."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *error: object) -> None: ...

    def pages(self, table: str) -> AsyncIterator[list[Row]]:
        """All rows of a table, some at a time. Everything read is of one moment."""
        ...

    async def write(self, table: str, rows: Sequence[Row]) -> None:
        """Add rows to a store that nobody else uses. All of them are durable at the end."""
        ...


async def copy(given: Tables, taking: Tables) -> dict[str, int]:
    """All rows of one store into an empty one; how many of each table."""
    moved = dict.fromkeys(COLUMNS, 0)
    async with given, taking:
        for table in COLUMNS:
            async for page in given.pages(table):
                await taking.write(table, page)
                moved[table] += len(page)
    return moved


MailDigest = Callable[[Row], bytes]
"""The digest of a message, as one kind of store has it; the row's own digest is not looked at."""


def neutral(table: str, row: Row, digest: MailDigest) -> Row:
    """A row as it is stored, without what its kind of store adds. Raises StoreDamaged."""
    if table != "inbox":
        return row
    is_taken = row[4] is None  # what is left of it holds its number and its sender's key
    if not is_taken and row[6] != digest(row):
        raise StoreDamaged(f"message {row[1]} of run {row[0]} does not fit its digest")
    return (*row[:6], b"", row[7])


def own(table: str, row: Row, digest: MailDigest) -> Row:
    """The inverse of `neutral`."""
    return row if table != "inbox" else (*row[:6], digest(row), row[7])


def sqlite_mail(row: Row) -> bytes:
    """See MailDigest."""
    run_id, number, kind, name, payload, sender_key, *_ = row
    return row_digest(run_id, number, kind, name, sender_key, payload)
