"""How many steps may execute at once on a node. Like a semaphore, but free slots cost no await."""

from __future__ import annotations

import asyncio
from collections import deque


class Slots:
    """Take one with `if not slots.take(): await slots.wait()`; give it back when done."""

    __slots__ = ("_count", "_free", "_waiting")

    def __init__(self, count: int) -> None:
        self._count = self._free = count
        self._waiting: deque[asyncio.Future[None]] = deque()

    def resize(self, count: int) -> None:
        """Another number from now on; what is taken stays taken."""
        more, self._count = count - self._count, count
        self._free += more
        while more > 0 and self._free > 0 and self._waiting:
            self._free -= 1
            self.give()

    def take(self) -> bool:
        """A slot at once, or False."""
        if self._free > 0:
            self._free -= 1
            return True
        return False

    async def wait(self) -> None:
        """A slot as soon as it is this caller's turn."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give()
            raise

    def give(self) -> None:
        """Hand the slot on, or keep it free."""
        while self._waiting and self._free >= 0:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1
