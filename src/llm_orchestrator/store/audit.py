"""The audit log at rest: rows in chains, changed only through `commit`, read in two ways.

A chain belongs to one process life. What an entry's digest covers, who writes and how a log is
verified: security/audit.py, the only maker of these rows. The store checks one thing: a place
(chain_id, number) is taken once. That numbers are dense, and that nobody else writes to the chain,
comes from the chain's head: a record that moves in the same batch (compare-and-swap).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol


class AuditEntry(NamedTuple):
    """A row of `audit`."""

    chain_id: str
    number: int
    """Dense from 1."""
    recorded_at: int
    """Microseconds on the store's clock."""
    actor: str
    action: str
    target: str
    result: str
    detail: bytes
    """A JSON object."""
    request_id: str
    previous: bytes
    """The digest of the entry before it."""
    digest: bytes


@dataclass(frozen=True, slots=True)
class Audit:
    """Add entries. Refused like a record that has moved when one of their places is taken."""

    entries: tuple[AuditEntry, ...]


@dataclass(frozen=True, slots=True)
class ForgetAudit:
    """Remove a whole chain, by policy."""

    chain_id: str


@dataclass(frozen=True, slots=True)
class AuditFilter:
    """Which entries `AuditShelf.audit` lists, newest first. None and "" filter nothing."""

    actor: str | None = None
    action: str | None = None
    target: str | None = None
    since: int | None = None
    """Recorded at this time or later, microseconds on the store's clock."""
    until: int | None = None
    """Recorded before this time."""
    before: tuple[int, str, int] | None = None
    """Only entries behind (recorded_at, chain_id, number) of the last one seen (keyset paging)."""
    limit: int = 100


class AuditShelf(Protocol):
    """Reading the audit log. All may raise StoreError."""

    async def audit(self, wanted: AuditFilter) -> list[AuditEntry]:
        """Entries as they are stored, unchecked, newest first."""
        ...

    async def audit_chains(self, after: tuple[str, int], limit: int) -> list[AuditEntry]:
        """Entries behind (chain_id, number), in this order: for verification."""
        ...


def place(entry: AuditEntry) -> tuple[int, str, int]:
    """Where an entry stands in a list: what `AuditFilter.before` takes."""
    return entry.recorded_at, entry.chain_id, entry.number


def select(entries: list[AuditEntry], wanted: AuditFilter) -> list[AuditEntry]:
    """What statement `audit` gives, in words of this language: the model's."""

    def fits(entry: AuditEntry) -> bool:
        return (
            wanted.actor in (None, entry.actor)
            and wanted.action in (None, entry.action)
            and wanted.target in (None, entry.target)
            and (wanted.since is None or entry.recorded_at >= wanted.since)
            and (wanted.until is None or entry.recorded_at < wanted.until)
            and (wanted.before is None or place(entry) < wanted.before)
        )

    return sorted(filter(fits, entries), key=place, reverse=True)[: wanted.limit]
