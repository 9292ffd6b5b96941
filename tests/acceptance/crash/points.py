"""Where a child process may be stopped, and the wrappers that stop it there.

Production code has no kill switch. The child is built through `wire` with a store whose every
commit is a point (before it, after it), step types whose every leaf is one (before, after, each
streamed piece) and HTTP requests (before one is sent, once its answer begins). At its point the
process says so and does nothing any more, until somebody kills it. Before a commit the disk is
slow for a moment first, and whatever does not wait for the commit goes on: an effect that is issued
before its intent is durable shows.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from typing import Any

import aiohttp

from llm_orchestrator.steps.action import Actions
from llm_orchestrator.steps.base import Leaf, Outputs
from llm_orchestrator.steps.registry import StepTypes
from llm_orchestrator.store.base import Batch, Receipt
from llm_orchestrator.store.sqlite import SQLiteStore
from llm_orchestrator.wire import Orchestrator

Say = Callable[[dict[str, Any]], None]
SLOW_S = 0.05
"""How long the disk is slow; an effect reaches the fake server in a tenth of that."""


class Points:
    """Counts points and reports each; blocks the whole process at number `stop_at` (0: never)."""

    def __init__(self, stop_at: int, say: Say) -> None:
        self.count = 0
        self._stop_at = stop_at
        self._say = say
        self._is_frozen = False

    def is_next(self) -> bool:
        """True when the next point is the one to stop at."""
        return self.count + 1 == self._stop_at

    def freeze(self) -> None:
        """Until `thaw`, points that are passed do not count: this one has been reached."""
        self._is_frozen = True

    def thaw(self) -> None:
        self._is_frozen = False

    def hit(self, name: str) -> None:
        if self._is_frozen:
            return
        self.count += 1
        is_last = self.count == self._stop_at
        self._say({"point": self.count, "name": name, "stopped": is_last})
        while is_last:
            signal.pause()


class StoppingStore(SQLiteStore):
    """Every commit is two points."""

    points: Points

    async def commit(self, batch: Batch) -> Receipt:
        name = _name(batch)
        if self.points.is_next():
            self.points.freeze()
            await asyncio.sleep(SLOW_S)
            self.points.thaw()
        self.points.hit(f"before commit of {name}")
        receipt = await super().commit(batch)
        self.points.hit(f"after commit of {name}")
        return receipt


class StoppingLeaf:
    """A step type that is stopped before it executes, after it, and after each piece it shows."""

    def __init__(self, leaf: Leaf, points: Points) -> None:
        self._leaf = leaf
        self._points = points
        self.is_paid = leaf.is_paid

    def effect(self, config: Any) -> Any:
        return self._leaf.effect(config)

    async def execute(self, context: Any, config: Any) -> Outputs:
        points, emit = self._points, type(context).emit

        async def show(text: str) -> None:
            await emit(context, text)
            points.hit(f"piece of {context.step}")

        context.emit = show
        points.hit(f"before {context.step}")
        outputs = await self._leaf.execute(context, config)
        points.hit(f"after {context.step}")
        return outputs


class StoppingTypes(StepTypes):
    """Step types whose leaves stop."""

    points: Points

    def leaf(self, name: str) -> Leaf:
        return StoppingLeaf(super().leaf(name), self.points)  # type: ignore[return-value]


class StoppingOrchestrator(Orchestrator):
    """The engine as `wire` builds it, its leaves wrapped."""

    points: Points

    def _make_tools(self) -> Any:
        tools = super()._make_tools()
        tools.step_types = StoppingTypes(Actions(outgoing_allow=self.config.outgoing_allow))
        tools.step_types.points = self.points
        return tools


def stop_requests(points: Points) -> None:
    """Make each HTTP request of this process two points."""
    send = aiohttp.ClientSession._request

    async def request(self: Any, method: str, url: Any, **more: Any) -> Any:
        name = f"{method} {str(url).rpartition('/')[2]}"
        points.hit(f"before {name}")
        response = await send(self, method, url, **more)
        points.hit(f"answer of {name}")
        return response

    aiohttp.ClientSession._request = request  # type: ignore[method-assign, assignment]


def _name(batch: Batch) -> str:
    kinds = [entry.kind for append in batch.appends for entry in append.entries]
    return "+".join([*kinds, *(type(change).__name__ for change in batch.changes)])
