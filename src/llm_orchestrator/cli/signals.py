"""SIGINT and SIGTERM: the first one asks to stop and says so, the second one ends the process.

Ending at once loses nothing: what is acknowledged is on the disk, the rest is found at the next
start.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable

ECHO_S = 0.3
"""A shell or `timeout` may send one wish twice, to the process and to its group."""


class Stop:
    """Waits for the first signal. Use inside a running loop; `close` gives the handlers back."""

    def __init__(self, on_first: Callable[[], None]) -> None:
        self.number = 0
        self._first_at = 0.0
        self._event = asyncio.Event()
        self._on_first = on_first
        self._loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            self._loop.add_signal_handler(number, self._take, number)

    @property
    def exit_code(self) -> int:
        """130 or 143."""
        return 128 + self.number

    async def wait(self) -> None:
        """Until the first signal."""
        await self._event.wait()

    def close(self) -> None:
        """The signals mean what they meant before."""
        for number in (signal.SIGINT, signal.SIGTERM):
            self._loop.remove_signal_handler(number)

    def _take(self, number: int) -> None:
        now = self._loop.time()
        if self.number and now - self._first_at < ECHO_S:
            return
        if self.number:
            sys.stderr.flush()
            os._exit(128 + number)
        self.number, self._first_at = number, now
        self._event.set()
        self._on_first()


def on_hangup(act: Callable[[], None]) -> None:
    """Call `act` on the loop at each SIGHUP, for as long as the loop lives."""
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, act)
