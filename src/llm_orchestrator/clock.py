"""The only door to time, sleep, randomness and new ids.

Everything nondeterministic enters the engine here, so that a simulation can hold the door: it hands
every part a `Clock` of its own (virtual time, seeded chance). Nothing else in the package imports
`time`, `random`, `uuid` or `secrets` (tests/test_tidy.py checks it).
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import time
from typing import Protocol

_STEADY = getattr(time, "CLOCK_BOOTTIME", None)
"""It goes on while the machine sleeps, which Linux's monotonic clock does not: leases end there."""


class Clock(Protocol):
    """What the engine asks of the world besides its store and its providers."""

    def now_us(self) -> int:
        """Wall time, microseconds since the epoch. For display and new ids, never for a lease."""
        ...

    def monotonic(self) -> float:
        """Seconds on a clock that never goes back; only differences mean anything."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Let `seconds` pass."""
        ...

    def chance(self) -> float:
        """A random number in [0, 1)."""
        ...

    def random_bytes(self, count: int) -> bytes:
        """`count` random bytes, fit for keys."""
        ...


class RealClock:
    """The world as it is."""

    def now_us(self) -> int:
        return time.time_ns() // 1000

    def monotonic(self) -> float:
        return time.monotonic() if _STEADY is None else time.clock_gettime(_STEADY)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    def chance(self) -> float:
        return random.random()

    def random_bytes(self, count: int) -> bytes:
        return os.urandom(count)


class BlockingClock(RealClock):
    """The world as it is, for code that has no event loop."""

    def pause(self, seconds: float) -> None:
        """Let `seconds` pass."""
        time.sleep(seconds)


class StoreClock:
    """The store's time on this machine's steady clock: whatever hour this machine thinks it is.

    It never goes back: after a failover to a server whose clock is behind, it waits for that one.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._offset_us = clock.now_us() - self._steady_us()
        self._latest_us = 0
        self._is_set = False

    def _steady_us(self) -> int:
        return int(self._clock.monotonic() * 1_000_000)

    def set(self, now_us: int) -> None:
        """Take the store's time, as it has just been told; the first voids what was guessed."""
        self._offset_us = now_us - self._steady_us()
        if not self._is_set:
            self._is_set, self._latest_us = True, 0

    @property
    def drift_s(self) -> float:
        """How far this machine's clock is ahead of the store's."""
        return (self._clock.now_us() - self._steady_us() - self._offset_us) / 1_000_000

    def now_us(self) -> int:
        """Microseconds since the epoch on the store's clock."""
        self._latest_us = max(self._latest_us, self._steady_us() + self._offset_us)
        return self._latest_us

    def monotonic(self) -> float:
        """See Clock."""
        return self._clock.monotonic()

    async def sleep(self, seconds: float) -> None:
        """See Clock."""
        await self._clock.sleep(seconds)

    def chance(self) -> float:
        """See Clock."""
        return self._clock.chance()

    def random_bytes(self, count: int) -> bytes:
        """See Clock."""
        return self._clock.random_bytes(count)


def new_run_id(clock: Clock) -> str:
    """A uuid of version 7 (RFC 9562): 48 bits of milliseconds, then 74 random bits, as text."""
    value = bytearray((clock.now_us() // 1000).to_bytes(6, "big") + clock.random_bytes(10))
    return _format(value)


def derived_run_id(parent_run_id: str, step: str) -> str:
    """The id of the child that `step` of `parent_run_id` starts: the same at each replay.

    The parent's time is kept, so that children sort with it; the random part is a hash.
    """
    head = bytes.fromhex(parent_run_id.replace("-", ""))[:6]
    tail = hashlib.blake2b(f"{parent_run_id}/{step}".encode(), digest_size=10).digest()
    return _format(bytearray(head + tail))


def _format(value: bytearray) -> str:
    value[6] = (value[6] & 0x0F) | 0x70
    value[8] = (value[8] & 0x3F) | 0x80
    text = value.hex()
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"
