"""Who may start, who still works, and when a run leaves the process.

Once a run is asked to stop, nothing new starts: whoever wants to is held. What is in flight may end
(its result is paid for); then the run's task is cancelled and leaves. When nothing executes and
everything that is left waits for longer than PARK_S, the run asks itself to stop: it parks and
costs no memory until its wake-up. A run that parks although something was about to move would sleep
through it, so time alone is no proof of idleness: a loaded loop may be slow to pass things on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from llm_orchestrator.clock import Clock
from llm_orchestrator.engine.machine import Event, Happening
from llm_orchestrator.errors import Suspended
from llm_orchestrator.model import MICROSECONDS, Json

PARK_S = 1.0
"""Waits shorter than this stay in memory."""
PARK_GRACE_S = 0.01
"""How long nothing may move before a waiting run parks."""
PARK_TURNS = 40
"""How many turns of the event loop nothing may move, after that: an end takes some to arrive."""
PROVIDER = "provider"
"""Why a run is parked that waits for a provider; its entry names the breakers that are open."""
NEVER = 1 << 62
"""A wake-up that only a message brings."""


class Gate:
    """One run's gate. `task` is the run's own, set by itself when it starts."""

    __slots__ = (
        "_activity",
        "_clock",
        "_executing",
        "_run_id",
        "_shut",
        "_waits",
        "inbox_seen",
        "stop",
        "task",
    )

    def __init__(self, run_id: str, clock: Clock) -> None:
        self._run_id = run_id
        self._clock = clock
        self._executing = 0
        self._activity = 0
        self._waits: dict[str, tuple[int, asyncio.Future[None] | None]] = {}
        self._shut: dict[str, tuple[str, asyncio.Future[None]]] = {}
        self.task: asyncio.Task[Any] | None = None
        self.stop: Happening | None = None
        self.inbox_seen = 0

    @property
    def shut(self) -> frozenset[str]:
        """The breakers that this run waits for, by the names of what they stand before."""
        return frozenset(name for name, _ in self._shut.values())

    def release(self, breaker: str) -> bool:
        """It is closed: wait for it no longer. False when nobody did."""
        found = [each for name, each in self._shut.values() if name == breaker]
        for returned in found:
            if not returned.done():
                returned.set_result(None)
        return bool(found)

    @property
    def is_idle(self) -> bool:
        """True while nothing is in flight."""
        return self._executing == 0

    def request_stop(self, happening: Happening, *, at_once: bool = False) -> None:
        """Ask the run to leave. Work in flight may end first unless `at_once`."""
        if self.stop is None or at_once:
            self.stop = happening
        if (at_once or self._executing == 0) and self.task is not None:
            self.task.cancel()

    def close(self) -> None:
        """The run's code has ended: no stop may interrupt the entry with which it leaves."""
        self.task = None

    async def hold(self) -> None:
        """The run is leaving: start nothing, and tear nothing down that is still in flight."""
        if self._executing == 0:
            asyncio.get_running_loop().call_soon(self._leave_for_good)
        await asyncio.get_running_loop().create_future()

    def enter(self) -> None:
        """Work begins. Pair with `leave`; `hold` first when there is a `stop`."""
        if self.stop is not None:
            raise Suspended(f"run {self._run_id} is leaving")
        self._executing += 1
        self._activity += 1

    def leave(self) -> None:
        """Work ended."""
        self._executing -= 1
        self._activity += 1
        if self._executing == 0:
            if self.stop is not None:
                asyncio.get_running_loop().call_soon(self._leave_for_good)
            elif self._waits:
                self._arm()

    async def wait(
        self, key: str, until_us: int, event: asyncio.Future[None] | None = None
    ) -> None:
        """Until the moment or the event, whichever comes first."""
        if self.stop is not None:
            await self.hold()
        self._waits[key] = (until_us, event)
        self._activity += 1
        self._arm()
        try:
            remaining = max(0.0, (until_us - self._clock.now_us()) / MICROSECONDS)
            if event is None:
                await self._clock.sleep(remaining)
            else:
                await asyncio.wait({event}, timeout=None if until_us >= NEVER else remaining)
        finally:
            self._waits.pop(key, None)
            self._activity += 1
            if self._waits:
                self._arm()

    async def wait_for_breaker(self, key: str, until_us: int, breaker: str) -> None:
        """Until the moment, or until somebody says that it is closed (`release`)."""
        if not breaker:
            await self.wait(key, until_us)
            return
        returned: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._shut[key] = (breaker, returned)
        try:
            await self.wait(key, until_us, returned)
        finally:
            self._shut.pop(key, None)

    def _leave_for_good(self) -> None:
        if self._executing == 0 and self.task is not None and not self.task.done():
            self.task.cancel()

    def _arm(self) -> None:
        if self._executing == 0:
            loop = asyncio.get_running_loop()
            loop.call_later(PARK_GRACE_S, self._park_if_idle, self._activity, PARK_TURNS)

    def _park_if_idle(self, activity: int, turns: int) -> None:
        if self._executing or not self._waits or activity != self._activity or self.stop:
            return
        wake_at = min(until for until, _ in self._waits.values())
        if wake_at - self._clock.now_us() < PARK_S * MICROSECONDS:
            return
        if any(event is not None and event.done() for _, event in self._waits.values()):
            return  # its waiter is about to run
        if turns:
            loop = asyncio.get_running_loop()
            loop.call_soon(self._park_if_idle, activity, turns - 1)
            return
        reason = "timer" if wake_at < NEVER else "signal"
        data: dict[str, Json] = {}
        if self._shut:
            reason, data = PROVIDER, {"breakers": sorted(self.shut)}
        self.request_stop(
            Happening(Event.WAIT, reason, wake_at=wake_at, inbox_seen=self.inbox_seen, data=data)
        )


def shut_in(gates: Sequence[Gate]) -> frozenset[str]:
    """The breakers for which any of these runs wait."""
    return frozenset().union(*(gate.shut for gate in gates))


def release_in(gates: Sequence[Gate], breaker: str, *, limit: int) -> bool:
    """Let at most `limit` runs go on that wait for this breaker. False: none did."""
    waiting = [gate for gate in gates if breaker in gate.shut]
    for gate in waiting[:limit]:
        gate.release(breaker)
    return bool(waiting)
