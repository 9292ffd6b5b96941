"""The stream archive as a store sees it: every batch is offered before it is committed (law 11).

    kept = await archive.keep(batch)      in mode `sync` it is durable in the second place now
    receipt = ...                         the commit
    archive.settle(kept, receipt)         what became of it rides along with a later record

The store stamps the batch (`Batch.at`), so that committing it again elsewhere gives the same rows.
What only the commit knows (who was refused, which numbers messages got) is in the receipt.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Protocol

from llm_orchestrator.clock import Clock
from llm_orchestrator.store.base import Batch, Receipt


class Archive(Protocol):
    """A second place for every batch. `recovery/stream.py` is the one that there is."""

    async def keep(self, batch: Batch) -> int:
        """The batch's number in this process life's stream; 0 when it need not be kept.

        In mode `sync` it returns once the batch is durable there; in `async` at once, unless the
        archive is too far behind. Raises StoreUnavailable when it is away and the mode is `stall`.
        """
        ...

    def settle(self, number: int, receipt: Receipt | None) -> None:
        """What became of it; None when it failed, or when nobody knows."""
        ...

    async def close(self) -> None:
        """Write what is left, while the store is still open. Raises nothing."""
        ...


async def archived(
    archive: Archive | None,
    batch: Batch,
    commit: Callable[[Batch], Awaitable[Receipt]],
    *,
    clock: Clock,
) -> Receipt:
    """`commit(batch)`, kept before and settled after. Raises what either raises."""
    if archive is None:
        return await commit(batch)
    if not batch.at:
        batch = replace(batch, at=clock.now_us())
    number = await archive.keep(batch)
    receipt = None
    try:
        receipt = await commit(batch)
    finally:
        archive.settle(number, receipt)
    return receipt
