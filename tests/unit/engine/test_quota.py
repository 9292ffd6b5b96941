"""Limits of a queue over all nodes: two nodes with buckets in one store, on virtual time."""

from __future__ import annotations

from llm_orchestrator.engine.quota import Quotas
from llm_orchestrator.store.base import QueueLimit
from llm_orchestrator.store.memory import MemoryStore
from tests.unit.engine.support import VirtualClock, virtually

Q = "narrow"


class Pair:
    """Two nodes with the same limits."""

    def __init__(self, limit: QueueLimit) -> None:
        self.clock = VirtualClock()
        self.store = MemoryStore(self.clock)
        self.first, self.second = self.make(limit), self.make(limit)

    def make(self, limit: QueueLimit) -> Quotas:
        return Quotas(self.store, self.clock, {Q: limit})

    async def reserve(self, quotas: Quotas, wanted: int) -> int:
        return await quotas.reserve(Q, wanted, self.clock.now_us())


def test_a_rate_is_everybodys_and_comes_back_with_time() -> None:
    async def main() -> None:
        pair = Pair(QueueLimit(rate=6, period_s=60.0))
        assert await pair.reserve(pair.first, 4) == 4
        assert await pair.reserve(pair.second, 4) == 2
        assert await pair.reserve(pair.first, 1) == 0
        pause = pair.first.pause_s(pair.clock.now_us())
        assert 9.9 < pause <= 10.001
        await pair.clock.sleep(pause)
        assert await pair.reserve(pair.first, 5) == 1
        assert await pair.reserve(pair.second, 5) == 0
        await pair.clock.sleep(600.0)
        assert await pair.reserve(pair.second, 100) == 6, "a bucket holds no more than one period"

    virtually(main())


def test_what_was_not_needed_is_given_back() -> None:
    async def main() -> None:
        pair = Pair(QueueLimit(rate=6, period_s=60.0))
        assert await pair.reserve(pair.first, 6) == 6
        await pair.first.give_back(Q, 4)
        assert await pair.reserve(pair.second, 10) == 4
        await pair.first.give_back(Q, 100)
        assert await pair.reserve(pair.second, 100) == 6

    virtually(main())


def test_tokens_are_paid_afterwards_and_a_debt_stops_every_node() -> None:
    async def main() -> None:
        pair = Pair(QueueLimit(tokens_per_minute=600))
        assert await pair.reserve(pair.first, 50) == 50
        pair.first.spend(Q, 900)
        assert await pair.reserve(pair.second, 1) == 1, "nobody knows of it yet"
        assert await pair.reserve(pair.first, 1) == 0, "its own use is known at once"
        assert await pair.reserve(pair.second, 1) == 0
        pause = pair.second.pause_s(pair.clock.now_us())
        assert 29.9 < pause < 31.0  # 300 in debt, ten a second
        await pair.clock.sleep(pause + 0.2)
        assert await pair.reserve(pair.second, 3) == 3

    virtually(main())


def test_a_queue_without_rates_asks_nobody() -> None:
    async def main() -> None:
        pair = Pair(QueueLimit(concurrency=2))
        assert await pair.reserve(pair.first, 7) == 7
        assert await pair.reserve(pair.first, 0) == 0
        pair.first.spend(Q, 1_000)
        pair.first.spend("another", 1_000)
        await pair.first.give_back(Q, 3)
        assert await pair.store.shelf.records("queue") == {}

    virtually(main())


def test_a_node_whose_clock_is_ahead_refills_once_only() -> None:
    async def main() -> None:
        pair = Pair(QueueLimit(rate=60, period_s=60.0))
        assert await pair.reserve(pair.first, 60) == 60
        ahead = pair.clock.now_us() + 30_000_000
        assert await pair.second.reserve(Q, 20, ahead) == 20
        assert await pair.reserve(pair.make(QueueLimit(rate=60, period_s=60.0)), 1) == 1
        assert await pair.second.reserve(Q, 100, ahead) == 9

    virtually(main())


def test_other_limits_are_in_force_at_once() -> None:
    async def main() -> None:
        pair = Pair(QueueLimit(rate=2, period_s=60.0))
        assert await pair.reserve(pair.first, 5) == 2
        assert await pair.reserve(pair.first, 5) == 0
        pair.first.limit({Q: QueueLimit(concurrency=9)})
        assert await pair.reserve(pair.first, 5) == 5
        pair.first.limit({})
        assert await pair.reserve(pair.first, 5) == 0, "who still asks had old news"
        await pair.first.give_back(Q, 2)

    virtually(main())
