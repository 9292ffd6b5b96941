"""Can the store be read and written? Asked at most once in FRESH_S, whoever asks how often.

The answer is a real one: a read of a record, and a commit (it trims a table that is trimmed anyway,
and is counted like every commit). One probe is under way at a time, everybody shares its answer,
and one that hangs is an answer, too.
"""

from __future__ import annotations

import asyncio
from typing import NamedTuple

from llm_orchestrator.clock import Clock
from llm_orchestrator.engine.store_breaker import hurried
from llm_orchestrator.errors import StoreError
from llm_orchestrator.store.base import Batch, Database, TrimCommits

FRESH_S = 2.0
PATIENCE_S = 3.0
ANSWER_S = 2.5
"""How long each of the two may take where a breaker counts what fails."""


class Finding(NamedTuple):
    """Latencies in milliseconds; None with what went wrong in `trouble`."""

    read_ms: float | None
    write_ms: float | None
    trouble: str = ""


class Probe:
    """See the module's docstring."""

    def __init__(self, store: Database, clock: Clock) -> None:
        self._store = hurried(store, ANSWER_S)
        self._clock = clock
        self._found: tuple[float, Finding] | None = None
        self._under_way: asyncio.Task[Finding] | None = None

    async def ask(self) -> Finding:
        """The newest finding; never raises, and never waits longer than PATIENCE_S."""
        if self._found is not None and self._clock.monotonic() - self._found[0] < FRESH_S:
            return self._found[1]
        if self._under_way is None:
            self._under_way = asyncio.create_task(self._probe(), name="store-probe")
            self._under_way.add_done_callback(self._done)
        return await asyncio.shield(self._under_way)

    def _done(self, task: asyncio.Task[Finding]) -> None:
        self._under_way = None
        if not task.cancelled() and task.exception() is None:
            self._found = (self._clock.monotonic(), task.result())

    async def _probe(self) -> Finding:
        read_ms = None
        try:
            async with asyncio.timeout(PATIENCE_S):
                started = self._clock.monotonic()
                await self._store.shelf.record("probe", "health")
                read_ms = self._ms(started)
                started = self._clock.monotonic()
                await self._store.commit(Batch(changes=(TrimCommits(limit=1),)))
                return Finding(read_ms, self._ms(started))
        except TimeoutError:
            return Finding(read_ms, None, f"no answer within {PATIENCE_S:g} s")
        except StoreError as error:
            return Finding(read_ms, None, error.message)

    def _ms(self, started: float) -> float:
        return round((self._clock.monotonic() - started) * 1_000, 3)
