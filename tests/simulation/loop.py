"""An event loop on virtual time whose callbacks belong to simulated processes.

Every callback carries the context in which it was scheduled, and with it its process. Those of a
frozen process are held back until it thaws; those of a dead one for ever. Nothing here depends on
addresses or on real time: the same seed runs the same callbacks in the same order.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context, ContextVar, copy_context
from typing import Any

START_US = 1_800_000_000_000_000 - 12_000_000
"""Virtual time begins 12 s before a full minute, so that cron lines fire within a short seed."""


class Process:
    """One simulated operating system process: a clock, a context, and whether it runs."""

    def __init__(self, name: str, loop: SimLoop, *, seed: int, skew_s: float = 0.0) -> None:
        self.name = name
        self.loop = loop
        self.clock = ProcessClock(loop, seed, skew_s)
        self.is_held = False
        self.is_dead = False
        self.held: list[asyncio.Handle] = []
        self.context = copy_context()
        self.context.run(PROCESS.set, self)

    def spawn(self, work: Coroutine[Any, Any, Any], name: str = "") -> asyncio.Task[Any]:
        """Run a coroutine as this process."""
        return self.loop.create_task(work, name=name or self.name, context=self.context)

    def freeze(self) -> None:
        """As SIGSTOP: its sockets stay open, nothing of it runs."""
        self.is_held = True

    def thaw(self) -> None:
        """As SIGCONT: everything that came meanwhile happens now, in order."""
        if self.is_dead:
            return
        self.release()

    def release(self) -> None:
        """Let what was held back run after all."""
        self.is_held = False
        self.loop.ready.extend(self.held)
        self.held.clear()

    def kill(self) -> None:
        """As SIGKILL: nothing of it ever runs again."""
        self.is_dead = self.is_held = True


PROCESS: ContextVar[Process] = ContextVar("simulated_process")
WORLD_CONTEXT: Context = Context()
"""Of the network and the servers: of no process."""


class SimTask(asyncio.Task[Any]):
    """A task whose place in a set does not depend on its address."""

    def __init__(self, number: int, *args: Any, **kwargs: Any) -> None:
        self.number = number
        super().__init__(*args, **kwargs)

    def __hash__(self) -> int:
        return self.number


class Stuck(Exception):
    """Nothing is scheduled any more."""


class SimLoop(asyncio.BaseEventLoop):
    """See the module's docstring."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.turns = 0
        self.ready: deque[asyncio.Handle] = deque()
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._order = itertools.count()
        self._tasks = itertools.count()
        self.tasks: dict[int, SimTask] = {}
        self.set_task_factory(self._make_task)
        self.set_exception_handler(self._complain)
        self.complaints: list[str] = []

    def _make_task(
        self, loop: asyncio.AbstractEventLoop, work: Any, *, context: Context | None = None
    ) -> Any:
        number = next(self._tasks)
        task = SimTask(number, work, loop=loop, context=context)
        self.tasks[number] = task
        task.add_done_callback(self._forget, context=WORLD_CONTEXT)
        return task

    def _forget(self, task: Any) -> None:
        self.tasks.pop(task.number, None)

    def _complain(self, _: asyncio.AbstractEventLoop, facts: dict[str, Any]) -> None:
        self.complaints.append(f"{facts.get('message')}: {facts.get('exception')!r}")

    # -- what asyncio asks of a loop -------------------------------------------------------------

    def time(self) -> float:
        return self.now

    def call_soon(  # type: ignore[override]
        self, callback: Any, *args: Any, context: Context | None = None
    ) -> Any:
        handle = asyncio.Handle(callback, args, self, context)
        self.ready.append(handle)
        return handle

    call_soon_threadsafe = call_soon  # type: ignore[assignment]

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Any, *args: Any, context: Any = None
    ) -> Any:
        return self.call_at(self.now + delay, callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Any, *args: Any, context: Any = None
    ) -> Any:
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        heapq.heappush(self._timers, (when, next(self._order), handle))
        return handle

    def in_world(self, delay: float, callback: Callable[..., Any], *args: Any) -> None:
        """Call something that belongs to no process."""
        self.call_at(self.now + delay, callback, *args, context=WORLD_CONTEXT)

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None: ...

    def _process_events(self, event_list: Any) -> None: ...

    def _write_to_self(self) -> None: ...

    def _run_once(self) -> None:
        ready, timers = self.ready, self._timers
        if not ready:
            while timers and timers[0][2].cancelled():
                heapq.heappop(timers)
            if not timers:
                raise Stuck
            self.now = max(self.now, timers[0][0])
        while timers and timers[0][0] <= self.now:
            handle = heapq.heappop(timers)[2]
            if not handle.cancelled():
                ready.append(handle)
        self.turns += 1
        for _ in range(len(ready)):
            chosen: Any = ready.popleft()
            if chosen._cancelled:
                continue
            process = chosen._context.get(PROCESS)
            if process is not None and process.is_held:
                process.held.append(chosen)
            else:
                chosen._run()


class ProcessClock:
    """One machine's clock: wrong by up to an hour, steady, seeded chance."""

    def __init__(self, loop: SimLoop, seed: int, skew_s: float) -> None:
        self._loop = loop
        self._random = random.Random(seed)
        self.skew_us = int(skew_s * 1e6)

    def now_us(self) -> int:
        return START_US + self.skew_us + int(self._loop.now * 1e6)

    def monotonic(self) -> float:
        return self._loop.now

    async def sleep(self, seconds: float) -> None:
        future = self._loop.create_future()
        handle = self._loop.call_later(seconds, _wake, future)
        try:
            await future
        finally:
            handle.cancel()

    def chance(self) -> float:
        return self._random.random()

    def random_bytes(self, count: int) -> bytes:
        return self._random.randbytes(count)


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
