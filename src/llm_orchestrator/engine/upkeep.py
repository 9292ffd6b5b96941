"""What a node watches besides its runs: operators' orders, its region, memory, closed breakers.

Runs here that wait for a breaker go on when somebody has closed it, in growing waves. Each of the
others leads to the same two brakes: claim nothing, and let go what can leave. Orders are looked at
when news of them comes and every POLL_S; memory each second. Never waits for the store in the loop
that watches memory: a store that hangs must not hide that the process is about to be ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from llm_orchestrator.clock import Clock
from llm_orchestrator.engine.breakers import waves
from llm_orchestrator.engine.gate import Gate, release_in, shut_in
from llm_orchestrator.engine.lease import Verdict
from llm_orchestrator.engine.maintenance import Mode, Watch
from llm_orchestrator.engine.memory import SHARE, Memory, Pressure, give_back
from llm_orchestrator.engine.region import POLL_S as REGION_POLL_S
from llm_orchestrator.engine.region import Heir, Role
from llm_orchestrator.errors import StoreError
from llm_orchestrator.model import Json

if TYPE_CHECKING:
    from llm_orchestrator.engine.driver import NodeOptions

logger = logging.getLogger(__name__)
MEMORY_S = 1.0
GIVE_BACK_EVERY = 5


class Drives(Protocol):
    """The part of the driver that brakes."""

    ceiling: int

    @property
    def count(self) -> int: ...

    def leave(self) -> None: ...

    def stay(self) -> None: ...

    def shed(self, share: float) -> int: ...

    @property
    def gates(self) -> list[Gate]: ...


class Upkeep:
    """See the module's docstring. `on_free` is called when claiming may go on."""

    def __init__(
        self,
        watch: Watch,
        clock: Clock,
        driver: Drives,
        *,
        memory: Memory | None,
        runs_max: int,
        on_free: Callable[[], None],
        heir: Heir,
    ) -> None:
        self.watch = watch
        self.heir = heir
        self._is_heir = False
        self._why_idle = ""
        self.pressure = Pressure(runs_max=runs_max)
        self.node_id = ""
        self._clock = clock
        self._driver = driver
        self._memory = memory
        self._on_free = on_free
        self._wake = asyncio.Event()
        self._closed = asyncio.Event()
        self._why_drained = ""
        self._took_schedules = True
        watch.on_change(self._wake.set)
        watch.on_change(self._closed.set)

    def reconfigure(self, options: NodeOptions) -> None:
        """Another memory limit, another bound on runs, another pace."""
        self.watch.poll_s = options.poll_s
        self._memory = options.memory
        self.pressure.resize(options.runs_max)
        self._driver.ceiling = self.pressure.ceiling

    @property
    def is_drained(self) -> bool:
        """True while this node, and not all of them, is to be empty."""
        return self.watch.orders.drains(self.node_id)

    @property
    def draining(self) -> str:
        """Why runs are let go and nothing is claimed, by order; nothing when it is not so."""
        return self._why_drained

    @property
    def is_holding(self) -> bool:
        """True while nothing may be claimed."""
        return bool(self._why_drained or self._why_idle) or self.pressure.is_shedding

    @property
    def takes_schedules(self) -> bool:
        """False while new runs are refused."""
        return not self.watch.orders.standing.enabled

    def info(self) -> dict[str, Json]:
        """For `llmo nodes list` and for health: only what is out of the ordinary, and memory."""
        told: dict[str, Json] = {}
        if self._why_drained:
            told["draining"] = self._why_drained
        regions = self.watch.orders.regions
        if regions.counter:
            role = regions.role_of(self.heir.region).value
            told["region"] = {"role": role, "counter": regions.counter}
        if self.watch.orders.standing.enabled:
            told["maintenance"] = self.watch.orders.standing.mode.value
        if self._memory is not None:
            reading = self.pressure.reading
            told["memory"] = {
                "use": reading.use,
                "limit": reading.limit,
                "is_shedding": self.pressure.is_shedding,
            }
        return told

    async def begin(self, node_id: str) -> None:
        """A life of the node begins: the orders are known before anything is claimed."""
        self.node_id = node_id
        await self.watch.look()
        self._obey()

    async def watch_orders(self) -> None:
        """Until cancelled."""
        while True:
            self._wake.clear()
            try:
                if self._is_heir:
                    self._is_heir = False
                    await self.heir.succeed()
                await self.watch.refresh()
                self._obey()
            except StoreError as error:
                logger.debug("orders cannot be read: %s", error.message)
            poll_s = min(self.watch.poll_s, REGION_POLL_S if self._why_idle else math.inf)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(poll_s):
                    await self._wake.wait()

    def saw(self, verdict: Verdict) -> None:
        """The heart has seen the other nodes: it may be our region's turn, not a drained node's."""
        if self.heir.saw(verdict, self.watch.orders.regions) and not self._why_drained:
            self._is_heir = True
            self._wake.set()

    async def watch_breakers(self) -> None:
        """Until cancelled. A closed breaker is news; runs that wait here are few: most park."""
        while True:
            self._closed.clear()
            for breaker in sorted(shut_in(self._driver.gates)):
                try:
                    async for size in waves(self.watch.shelf, breaker, self._clock):
                        if not release_in(self._driver.gates, breaker, limit=size):
                            break
                except StoreError as error:
                    logger.debug("breakers cannot be read: %s", error.message)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.watch.poll_s):
                    await self._closed.wait()

    async def watch_memory(self) -> None:
        """Until cancelled."""
        turns = 0
        while True:
            if self._memory is not None and self._memory.bounds:
                self.weigh(self._memory)
            turns += 1
            if self.pressure.is_shedding and turns % GIVE_BACK_EVERY == 0:
                give_back()
            await self._clock.sleep(MEMORY_S)

    def weigh(self, memory: Memory) -> None:
        """One look at the memory, and what follows."""
        pressure = self.pressure
        was_shedding, ceiling = pressure.is_shedding, pressure.ceiling
        pressure.take(memory.read(), driven=self._driver.count)
        self._driver.ceiling = pressure.ceiling
        if pressure.is_shedding:
            self._driver.shed(SHARE)
        elif was_shedding or pressure.ceiling > ceiling:
            self._on_free()

    def _obey(self) -> None:
        orders, before = self.watch.orders, self._why_drained or self._why_idle
        had_schedules, self._took_schedules = self._took_schedules, self.takes_schedules
        standing = orders.standing
        if orders.drains(self.node_id):
            self._why_drained = f"node {self.node_id} is drained"
        elif standing.enabled and standing.mode is Mode.DRAIN:
            self._why_drained = f"maintenance: {standing.reason or standing.by}"
        else:
            self._why_drained = ""
        role = orders.regions.role_of(self.heir.region)
        self._why_idle = "" if role is Role.ACTIVE else f"region {self.heir.region} is {role.value}"
        why = self._why_drained or self._why_idle
        if why and not before:
            logger.warning("%s: nothing is claimed, runs are let go", why)
            self._driver.leave()
        elif before and not why:
            logger.warning("node %s works again", self.node_id)
            self._driver.stay()
            self._on_free()
        elif self.takes_schedules and not had_schedules:
            self._on_free()
