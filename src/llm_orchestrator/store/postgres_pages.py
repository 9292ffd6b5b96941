"""Damaged pages of the server that is written to: whose fault they are.

A page whose checksum does not fit is damaged on that server's disk alone: its copies have pages of
their own. While somebody leaves such a server for a copy (recovery/damaged_primary.py), whoever
meets the page is told that the store is away, and waits. Otherwise it is StoreDamaged, which is the
matter of the rows that lie on that page.
"""

from __future__ import annotations

from llm_orchestrator.errors import StoreUnavailable

DAMAGED_PAGE = "XX001"
"""PostgreSQL's word for a page that it could not read. XX002, an index that contradicts its table,
is not about a disk: the copies have it, too."""


class Pages:
    """What one process knows of them; nodes share it between their connections."""

    def __init__(self) -> None:
        self.is_left = False
        """Whether somebody leaves a server that has damaged pages."""

    def told(self, error: Exception) -> Exception:
        """`error`, or StoreUnavailable while waiting is better."""
        if not self.is_left or getattr(error, "sqlstate", None) != DAMAGED_PAGE:
            return error
        return StoreUnavailable(
            f"the server has damaged pages and is being left for a copy: {error}",
            hint="llmo region status",
        )
