"""What a queue allows over all nodes besides its concurrency: starts per period, tokens per minute.

Two buckets per queue in one shared record, changed by compare-and-swap: a start takes one from the
first; tokens that its runs used are taken from the second afterwards, and while that one is in debt
nothing of the queue starts. (How many of its runs are driven at a time is counted by `Store.pick`.)
"""

from __future__ import annotations

from collections.abc import Mapping

from llm_orchestrator.clock import Clock
from llm_orchestrator.model import MICROSECONDS, Json
from llm_orchestrator.store.base import QueueLimit, Store
from llm_orchestrator.store.shared import StoreState

KIND = "queue"
_TRIES = 20
_MINUTE_S = 60.0


class Quotas:
    """The buckets of the queues that have limits."""

    def __init__(self, store: Store, clock: Clock, limits: Mapping[str, QueueLimit]) -> None:
        self._shared = StoreState(store)
        self._clock = clock
        self._limits = limits
        self._ready_at: dict[str, int] = {}
        self._spent: dict[str, int] = {}

    def limit(self, limits: Mapping[str, QueueLimit]) -> None:
        """Other limits from now on; what is in the buckets stays."""
        self._limits = limits
        self._ready_at.clear()

    async def reserve(self, queue: str, wanted: int, now_us: int) -> int:
        """How many runs of the queue may start now; give back what was not needed."""
        limit = self._limits.get(queue)
        if wanted <= 0 or limit is None:
            return 0
        if not limit.rate and not limit.tokens_per_minute:
            return wanted
        if self._ready_at.get(queue, 0) > now_us and not self._spent.get(queue):
            return 0
        for _ in range(_TRIES):
            value, version = await self._shared.get(KIND, queue)
            spent = self._spent.get(queue, 0)
            starts, tokens, at = _refilled(value, limit, now_us)
            tokens -= spent
            granted = wanted if not limit.rate else min(wanted, int(starts + 1e-6))
            if limit.tokens_per_minute and tokens <= 0:
                granted = 0
            after = [starts - granted if limit.rate else 0.0, tokens, at]
            if granted <= 0 and not spent:
                self._ready_at[queue] = now_us + _wait_us(after, limit)
                return 0
            if await self._shared.put(KIND, queue, after, version=version):
                self._spent[queue] = self._spent.get(queue, 0) - spent
                self._ready_at[queue] = now_us + (_wait_us(after, limit) if granted <= 0 else 0)
                return max(granted, 0)
        return 0  # many want the same: at the next look

    async def give_back(self, queue: str, count: int) -> None:
        """Starts that were reserved and not needed."""
        limit = self._limits.get(queue)
        if count <= 0 or limit is None or not limit.rate:
            return
        for _ in range(_TRIES):
            value, version = await self._shared.get(KIND, queue)
            now_us = self._clock.now_us()
            starts, tokens, at = _refilled(value, limit, now_us)
            after = [min(starts + count, float(limit.rate)), tokens, at]
            if await self._shared.put(KIND, queue, after, version=version):
                return

    def spend(self, queue: str, tokens: int) -> None:
        """A run of the queue used tokens; told to the others with the next reservation."""
        limit = self._limits.get(queue)
        if limit is not None and limit.tokens_per_minute and tokens > 0:
            self._spent[queue] = self._spent.get(queue, 0) + tokens

    def pause_s(self, now_us: int) -> float:
        """Until a queue that is spent may go on; a minute when none is."""
        waits = [ready - now_us for ready in self._ready_at.values() if ready > now_us]
        return max(0.001, min(waits, default=60 * MICROSECONDS) / MICROSECONDS)


def _refilled(value: Json, limit: QueueLimit, now_us: int) -> tuple[float, float, int]:
    """Starts and tokens that are left, and when; a queue that was never used has all of them.

    The moment never goes back: of two nodes whose clocks differ the one ahead would refill the
    difference again and again.
    """
    full = float(limit.rate), float(limit.tokens_per_minute)
    try:
        starts, tokens, at = float(value[0]), float(value[1]), int(value[2])
    except (TypeError, ValueError, LookupError):
        return *full, now_us
    passed_s = max(0, now_us - at) / MICROSECONDS
    return (
        min(full[0], starts + passed_s * limit.rate / limit.period_s),
        min(full[1], tokens + passed_s * limit.tokens_per_minute / _MINUTE_S),
        max(now_us, at),
    )


def _wait_us(after: list[float], limit: QueueLimit) -> int:
    """Until one more may start."""
    waits = [0.0]
    if limit.rate and after[0] < 1:
        waits.append((1 - after[0]) * limit.period_s / limit.rate)
    if limit.tokens_per_minute and after[1] <= 0:
        waits.append((1 - after[1]) * _MINUTE_S / limit.tokens_per_minute)
    return int(max(waits) * MICROSECONDS) + 1
