"""Where a child process may be stopped, and the wrappers that stop it there.

Production code has no kill switch. The child is built through `wire` with a store whose every
commit is a point (before it, after it), step types whose every leaf is one (before, after, each
streamed piece) and HTTP requests (before one is sent, once its answer begins). At its point the
process says so and does nothing any more, until somebody kills it.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import aiohttp

from llm_orchestrator.steps.base import Leaf, Outputs
from llm_orchestrator.steps.registry import StepTypes
from llm_orchestrator.store.base import Batch, Receipt
from llm_orchestrator.store.sqlite import SQLiteStore
from llm_orchestrator.wire import Orchestrator

Say = Callable[[dict[str, Any]], None]


class Points:
    """Counts points and reports each; blocks the whole process at number `stop_at` (0: never)."""

    def __init__(self, stop_at: int, say: Say) -> None:
        self.count = 0
        self._stop_at = stop_at
        self._say = say

    def hit(self, name: str) -> None:
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
        tools.step_types = StoppingTypes()
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
