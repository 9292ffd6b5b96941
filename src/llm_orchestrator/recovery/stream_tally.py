"""What became of which batch: the part of the stream archive that counts.

Nearly every batch lands whole and posts nothing; such a one is told by the watermark alone.
"""

from __future__ import annotations

from llm_orchestrator.recovery.segments import Told
from llm_orchestrator.store.base import Receipt


class Tally:
    """Numbers that have begun, and how they ended. Pure."""

    def __init__(self) -> None:
        self._open: dict[int, None] = {}
        self._last = 0
        self._told: list[Told] = []
        self._written = 0

    @property
    def settled(self) -> int:
        """Every batch up to this number has ended."""
        return next(iter(self._open)) - 1 if self._open else self._last

    @property
    def has_news(self) -> bool:
        """True when a frame would say more than the last one did."""
        return bool(self._told) or self.settled > self._written

    @property
    def is_open(self) -> bool:
        """True while a batch has not ended."""
        return bool(self._open)

    def begin(self, number: int) -> None:
        """A batch is on its way to the store."""
        self._open[number] = None
        self._last = number

    def void(self, number: int) -> None:
        """It never got there."""
        if number in self._open:
            del self._open[number]
            self._told.append(Told(number, False, True))

    def end(self, number: int, receipt: Receipt | None) -> None:
        """It got there, or (None) nobody knows."""
        self._open.pop(number, None)
        if receipt is None:
            self._told.append(Told(number, False))
        elif receipt.refused or receipt.is_refused or receipt.posted:
            refused, posted = list(receipt.refused), list(receipt.posted)
            self._told.append(Told(number, True, False, refused, receipt.is_refused, posted))

    def take(self) -> tuple[int, list[Told]]:
        """What the next frame says."""
        told, self._told = self._told, []
        self._written = self.settled
        return self._written, told
