"""Telling systemd how the service stands (sd_notify): a datagram to the socket that it named.

Source: sd_notify(3) and sd_watchdog_enabled(3). Not being heard is no error: the service works
without a supervisor. Sends WATCHDOG=1 only while the event loop turns (this is a task on it) and
`is_alive` says that what turns on other threads does.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable

from llm_orchestrator.clock import Clock
from llm_orchestrator.config import Supervisor

logger = logging.getLogger(__name__)


class Notifier:
    """Says nothing when nobody supervises us."""

    def __init__(self, supervisor: Supervisor, clock: Clock) -> None:
        self._supervisor = supervisor
        self._clock = clock

    def ready(self, status: str = "") -> None:
        """The service has started, or has been reloaded."""
        self._send("READY=1", *_status(status))

    def reloading(self) -> None:
        """It reads its settings again; `ready` ends that. Call on the event loop."""
        moment = int(asyncio.get_running_loop().time() * 1_000_000)  # CLOCK_MONOTONIC, as asked for
        self._send("RELOADING=1", f"MONOTONIC_USEC={moment}")

    def stopping(self, status: str = "") -> None:
        """It ends in order."""
        self._send("STOPPING=1", *_status(status))

    def status(self, text: str) -> None:
        """One line for `systemctl status`."""
        self._send(*_status(text))

    async def watch(self, is_alive: Callable[[], bool]) -> None:
        """Feed the watchdog, twice as often as it bites, until cancelled."""
        period_s = self._supervisor.watchdog_s / 2
        while period_s > 0:
            if is_alive():
                self._send("WATCHDOG=1")
            else:
                logger.error("the heart does not beat: the watchdog is not fed")
            await self._clock.sleep(period_s)

    def _send(self, *lines: str) -> None:
        address = self._supervisor.socket
        if not address or not lines:
            return
        if address.startswith("@"):
            address = "\0" + address[1:]  # the abstract namespace
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
                sender.setblocking(False)
                sender.sendto("\n".join(lines).encode(), address)
        except OSError as error:
            logger.debug("the supervisor does not hear us: %s", error)


def _status(text: str) -> tuple[str, ...]:
    return (f"STATUS={' '.join(text.split())}",) if text else ()
