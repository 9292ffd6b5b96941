"""The heart: beats for a node from a thread and a connection of its own, and says what it sees.

A workflow that keeps the event loop busy does not stop it; code that keeps the interpreter itself
for a whole lease does, and then the node is taken for dead, which is safe. In a simulation it is a
task on the same virtual loop: what decides (lease.py) is the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Literal

from llm_orchestrator.clock import Clock, StoreClock
from llm_orchestrator.engine.lease import Lease, LeaseOptions, Verdict
from llm_orchestrator.errors import StoreError, StoreUnavailable
from llm_orchestrator.model import Json
from llm_orchestrator.store.base import Members, NodeState, Pulse, Store

logger = logging.getLogger(__name__)
Kind = Literal["thread", "task", "none"]
"""`none`: nobody else can own this store's runs (a file with a lock): joins and leaves only."""
STALL_S = 20.0
"""A heart that has not even tried for so long does not beat; trying takes seconds at most."""
JOIN_S = 20.0
"""How long a store that opens, and then does not answer, is asked to let this node join."""
_PROMPT_S = 0.25
"""An answer that took longer says too little about what time it is."""
_NEVER = float("-inf")


class Heart:
    """One node life's heart: `start` joins, `stop` leaves."""

    def __init__(
        self,
        node_id: str,
        store: Store,
        clock: Clock,
        *,
        kind: Kind = "thread",
        options: LeaseOptions | None = None,
        region: str = "local",
        info: Callable[[], Json] = dict,
        told: Callable[[Verdict], None],
    ) -> None:
        self.node_id = node_id
        self.kind = kind
        self._store = store
        self._clock = clock
        self._options = options or LeaseOptions()
        self._region = region
        self._info = info
        self._told = told
        self._lease = Lease(node_id, self._options, clock.monotonic())
        self._held: list[asyncio.Future[None]] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._beating: asyncio.Task[None] | None = None
        self._beat_loop: asyncio.AbstractEventLoop | None = None
        self._turned_at = clock.monotonic()
        self._has_joined = False
        self._is_stopping = False
        self._is_leaving = False
        self._final = NodeState.LEFT
        self._pause = asyncio.Event()

    def holds(self) -> bool:
        """True while this node may begin something outside the store: not before it has joined."""
        if self.kind == "none":
            return True
        return self._has_joined and self._lease.holds(self._clock.monotonic())

    def is_beating(self) -> bool:
        """False when its thread has ended or stands still: whatever the store answers."""
        if self.kind == "none":
            return True
        is_there = self._thread is None or self._thread.is_alive()
        return is_there and self._clock.monotonic() - self._turned_at < STALL_S

    async def held(self) -> None:
        """Wait until it may. A node that is fenced waits in vain: its runs are being dropped."""
        while not self.holds():
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._held.append(future)
            await future

    async def start(self) -> None:
        """Join the nodes and begin to beat. Raises StoreError."""
        self._loop = asyncio.get_running_loop()
        joined: asyncio.Future[None] = self._loop.create_future()
        if self.kind == "thread":
            self._thread = threading.Thread(
                target=lambda: asyncio.run(self._serve(joined)), name="heart", daemon=True
            )
            self._thread.start()
        else:
            self._spawn(self._serve(joined))
        await joined

    async def stop(self, state: NodeState = NodeState.LEFT) -> None:
        """Stop beating, and say so to the others (not when we are fenced: it is known)."""
        self._is_stopping = True
        self._final = state
        self._nudge()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, 5.0)
        elif self._beating is not None:
            await asyncio.gather(self._beating, return_exceptions=True)

    def announce(self) -> None:
        """Say LEAVING, soon: what dies from here on is no surprise."""
        self._is_leaving = True
        self._nudge()

    def _nudge(self) -> None:
        if self._beat_loop is None or self._beat_loop.is_closed():
            return
        if self._beat_loop is self._loop:
            self._interrupt()
            return
        with contextlib.suppress(RuntimeError):  # its thread has just ended
            self._beat_loop.call_soon_threadsafe(self._interrupt)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        self._beating = asyncio.get_running_loop().create_task(work, name="heart")

    def _interrupt(self) -> None:
        self._pause.set()

    async def _serve(self, joined: asyncio.Future[None]) -> None:
        """Everything that happens on the heart's own loop."""
        self._beat_loop = asyncio.get_running_loop()
        if self._is_stopping:
            self._interrupt()
        members: Members | None = None
        try:
            members = await self._store.members()
            await self._join(members)
        except BaseException as error:  # noqa: BLE001 (told to whoever waits for the join)
            self._tell(_fail, joined, error)
            if members is not None:
                await members.close()
            return
        self._has_joined = True
        self._tell(_done, joined)
        try:
            await self._beat_forever(members)
            await members.leave(self.node_id, self._final)
        except StoreError as error:
            logger.debug("the node could not say good-bye: %s", error.message)
        finally:
            await members.close()

    async def _join(self, members: Members) -> None:
        """Join the nodes. A store that was heard a moment ago may be slow: it is asked again."""
        until = self._clock.monotonic() + JOIN_S
        while True:
            self._turned_at = self._clock.monotonic()
            self._lease = Lease(self.node_id, self._options, self._turned_at)
            try:
                return await members.join(self.node_id, self._region, self._info())
            except StoreUnavailable:
                if self._is_stopping or self._clock.monotonic() >= until:
                    raise
            await self._rest(self._lease.pause_s())

    async def _beat_forever(self, members: Members) -> None:
        is_told, sent_at, session = False, _NEVER, 0
        while not self._is_stopping:
            self._turned_at = self._clock.monotonic()
            try:
                if self._is_leaving and not is_told:
                    await members.leave(self.node_id, NodeState.LEAVING)
                    is_told = True
                if self.kind == "none":
                    await self._pause.wait()
                    self._pause.clear()
                    continue
                now = self._clock.monotonic()
                if is_beat := self._lease.is_due(now, sent_at):
                    sent_at = now
                    pulse = await members.beat(self.node_id, self._info())
                else:
                    pulse = await members.watch(self.node_id)
                verdict = self._take_in(now, pulse, is_beat=is_beat)
                for node_id, beat in verdict.dead:
                    if await members.bury(node_id, beat):
                        logger.warning("node %s is dead: its runs are taken over", node_id)
                self._tell(self._report, verdict)
                if verdict.is_fenced:
                    return
                if pulse.session != session and not is_beat:
                    sent_at = _NEVER  # at once: to the others we are gone until they see this one
                    continue
                session = pulse.session
            except StoreError as error:
                logger.debug("a beat failed: %s", error.message)
                sent_at = _NEVER
            except Exception:  # a heart that stops leaves a node that nobody mourns
                logger.exception("a defect in the heart")
            await self._rest(self._lease.pause_s())

    def _take_in(self, asked_at: float, pulse: Pulse, *, is_beat: bool) -> Verdict:
        now = self._clock.monotonic()
        if isinstance(self._clock, StoreClock) and now - asked_at < _PROMPT_S:
            self._clock.set(pulse.now_us)
        return self._lease.answered(asked_at if is_beat else None, now, pulse)

    async def _rest(self, pause_s: float) -> None:
        sleeping = asyncio.ensure_future(self._clock.sleep(pause_s))
        waking = asyncio.ensure_future(self._pause.wait())
        try:
            await asyncio.wait([sleeping, waking], return_when=asyncio.FIRST_COMPLETED)
        finally:
            sleeping.cancel()
            waking.cancel()
            self._pause.clear()

    def _tell(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call something on the engine's loop, which is another one than ours in production."""
        if self._loop is None or self._loop.is_closed():
            self._is_stopping = True  # nobody drives runs any more: a heart without a body
            return
        if self._loop is self._beat_loop:
            function(*arguments)
            return
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the engine's loop has just been closed
            self._is_stopping = True

    def _report(self, verdict: Verdict) -> None:
        if not verdict.is_fenced:
            held, self._held = self._held, []
            for future in held:
                _done(future)
        self._told(verdict)


def _done(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _fail(future: asyncio.Future[None], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
