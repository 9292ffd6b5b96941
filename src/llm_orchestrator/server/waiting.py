"""Waiting for a run to end, for at most as long as its caller wants.

A run that this process drives ends here, and whoever waits is told at once, without a look at the
store. One that another node drives is looked at again and again (its row, which is cheap), quickly
at first and every POLL_S_MAX later; news of a commit in this process wakes who waits for its run.
How many looks are under way at a time is bounded, so that a thousand waiting requests are no load.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from llm_orchestrator.clock import Clock
from llm_orchestrator.engine.control import read_journal
from llm_orchestrator.engine.driver import End
from llm_orchestrator.engine.replay import fold
from llm_orchestrator.model import RunState
from llm_orchestrator.store.base import News, Store

if TYPE_CHECKING:
    from llm_orchestrator.engine.node import Node

POLL_S_MIN, POLL_S_MAX = 0.05, 2.0
LOOKS_MAX = 8
WAIT_S_MAX = 300.0


def is_at_rest(state: RunState) -> bool:
    """True when a run does not move by itself any more."""
    return state.is_final or state is RunState.PAUSED


class Waiting:
    """See the module's docstring. `is_over`: the process stops, nobody waits any more."""

    def __init__(
        self, store: Store, clock: Clock, node: Node | None, *, is_over: Callable[[], bool]
    ) -> None:
        self._store = store
        self._clock = clock
        self._node = node
        self._is_over = is_over
        self._looks = asyncio.Semaphore(LOOKS_MAX)
        self._bells: dict[str, list[asyncio.Future[End | None]]] = {}
        store.on_news(self._notice)

    async def ended(self, run_id: str, wait_s: float) -> End | None:
        """How a run ended or why it is paused; None when it still moves after `wait_s`.

        Raises NotFound, StoreDamaged, StoreError.
        """
        deadline = self._clock.monotonic() + wait_s
        pause_s = POLL_S_MIN
        while True:
            told = self._told(run_id)
            try:
                found = await self.look(run_id)
                left_s = deadline - self._clock.monotonic()
                if found is not None or left_s <= 0 or self._is_over():
                    return found
                if self._is_here(run_id):
                    pause_s = POLL_S_MAX
                await asyncio.wait([told], timeout=min(pause_s, left_s))
                if told.done() and (end := told.result()) is not None:
                    return end
            finally:
                told.cancel()
            pause_s = min(pause_s * 2, POLL_S_MAX)

    async def look(self, run_id: str) -> End | None:
        """The same, without waiting."""
        if self._is_here(run_id):
            return None
        async with self._looks:
            run = await self._store.look.run(run_id)
            if run is not None and not is_at_rest(run.state):
                return None
            state = fold(run_id, (await read_journal(self._store, run_id)).entries)
        if not is_at_rest(state.state):
            return None
        return End(run_id, state.state, state.reason, state.output, state.error)

    def _is_here(self, run_id: str) -> bool:
        return self._node is not None and run_id in self._node.driver.driven

    def _told(self, run_id: str) -> asyncio.Future[End | None] | asyncio.Future[End]:
        """Done with the run's end, or with None when a commit here has ended it; cancel it."""
        if self._node is not None:
            return self._node.driver.wait_end(run_id)
        told: asyncio.Future[End | None] = asyncio.get_running_loop().create_future()
        self._bells.setdefault(run_id, []).append(told)
        told.add_done_callback(lambda done: self._forget(run_id, done))
        return told

    def _forget(self, run_id: str, told: asyncio.Future[End | None]) -> None:
        bells = self._bells[run_id]
        bells.remove(told)
        if not bells:
            del self._bells[run_id]

    def _notice(self, news: News) -> None:
        for run_id in news.ended if self._bells else ():
            for told in self._bells.get(run_id, ()):
                if not told.done():
                    told.set_result(None)
