"""What operators want of the nodes: maintenance mode for all of them, and draining one of them.

Three kinds of orders, each a record that every node reads (`Watch`): at once when news of it comes,
and every POLL_S in any case. They survive restarts of everything.

    mode      refuses new runs at every door (`Admission`). `keep`: what was accepted goes on;
              `drain`: every node also stops claiming and lets its runs go.
    node/ID   drains one node: it claims nothing, lets its runs go, and is not ready. The order dies
              with the node: a process that is started again is another node.
    regions   which regions work (region.py).

Orders must never touch what is already accepted: children of running runs, signals, approvals and
requests to a run pass in every mode. Schedules wait, and then follow their own backfill policy.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum

from llm_orchestrator.clock import Clock
from llm_orchestrator.engine.region import KEY as REGIONS
from llm_orchestrator.engine.region import Regions
from llm_orchestrator.engine.store_breaker import StoreBreaker
from llm_orchestrator.errors import Draining, Maintenance, NotFound, Refused, StoreError
from llm_orchestrator.model import Json
from llm_orchestrator.store.base import Batch, News, PutRecord, Shelf, Store, lives

logger = logging.getLogger(__name__)
KIND = "maintenance"
"""The kind of record; `store.base.news_of` tells every node of a change."""
MODE = "mode"
NODE = "node/"
POLL_S = 2.0
RETRY_AFTER_S = 30.0
_TRIES = 20
_NODES = 1_000


class Mode(StrEnum):
    """What becomes of the runs that were accepted before."""

    KEEP = "keep"
    DRAIN = "drain"


@dataclass(frozen=True, slots=True)
class Standing:
    """Maintenance mode as it stands. `since` is microseconds on the store's clock."""

    enabled: bool = False
    mode: Mode = Mode.KEEP
    by: str = ""
    reason: str = ""
    since: int = 0
    retry_after_s: float = RETRY_AFTER_S

    def to_json(self) -> dict[str, Json]:
        """The record's value."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Json) -> Standing:
        """The inverse. A record that makes no sense is no maintenance."""
        if not isinstance(data, Mapping):
            return cls()
        try:
            return cls(
                bool(data["enabled"]),
                Mode(data["mode"]),
                str(data["by"]),
                str(data["reason"]),
                int(data["since"]),
                float(data["retry_after_s"]),
            )
        except (KeyError, TypeError, ValueError):
            return cls()

    def refusal(self) -> Maintenance:
        """What whoever wants a new run is told."""
        why = f": {self.reason}" if self.reason else ""
        return Maintenance(
            f"no new runs for now, {self.by or 'an operator'} switched maintenance on{why}",
            retry_after_s=self.retry_after_s,
            hint="llmo maintenance show, llmo maintenance disable",
        )


@dataclass(frozen=True, slots=True)
class Orders:
    """Everything that operators want at the moment. `drained`: who drains each node, and why."""

    standing: Standing = field(default_factory=Standing)
    drained: Mapping[str, Mapping[str, Json]] = field(default_factory=dict)
    regions: Regions = field(default_factory=Regions)

    def drains(self, node_id: str) -> bool:
        """True when this node, in whichever of its lives (`ID`, `ID.2`, ...), is to be empty."""
        return _first_life(node_id) in _firsts(self.drained)


async def read_orders(shelf: Shelf) -> Orders:
    """What stands in the store. Raises StoreError."""
    found = await shelf.records(KIND)
    drained = {
        key.removeprefix(NODE): value if isinstance(value, Mapping) else {}
        for key, value in found.items()
        if key.startswith(NODE) and value is not None
    }
    regions = Regions.from_json(found.get(REGIONS))
    return Orders(Standing.from_json(found.get(MODE)), drained, regions)


async def set_standing(store: Store, wanted: Standing) -> Standing:
    """Switch maintenance on or off, for every node. Whoever comes last wins. Raises StoreError."""
    await _put(store, MODE, wanted.to_json())
    return wanted


async def drain_node(store: Store, node: str, *, by: str, reason: str = "", since: int = 0) -> str:
    """Tell a node to let its runs go; its whole id. `node` may be the beginning of one.

    Raises NotFound when no living node is meant, Refused when several are.
    """
    living = [member.node_id for member in await store.shelf.nodes(_NODES) if lives(member)]
    node_id = _meant(node, living)
    await _put(store, NODE + node_id, {"by": by, "reason": reason, "since": since})
    for key in await store.shelf.records(KIND):
        if key.startswith(NODE) and _first_life(key.removeprefix(NODE)) not in _firsts(living):
            await _put(store, key, None)  # its node is gone
    return node_id


async def undrain_node(store: Store, node: str) -> str:
    """Let a drained node work again; its whole id. Raises NotFound, Refused."""
    drained = list((await read_orders(store.shelf)).drained)
    node_id = _meant(node, drained, what="node is drained")
    await _put(store, NODE + node_id, None)
    return node_id


class Watch:
    """The orders as this process knows them: never older than POLL_S, and renewed by news."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        *,
        poll_s: float = POLL_S,
        gate: StoreBreaker | None = None,
    ) -> None:
        """`gate`: its reads are also probes of a store that does not answer."""
        self.poll_s = poll_s
        self.orders = Orders()
        self.shelf = store.shelf
        self._clock = clock
        self._gate = gate or StoreBreaker(clock)
        self._lock = asyncio.Lock()
        self._looked_at: float | None = None
        self._is_known = False
        self._told = 0
        self._listeners: list[Callable[[], None]] = []
        store.on_news(self._notice)

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call `listener` when there is something to look at."""
        self._listeners.append(listener)

    async def look(self) -> Orders:
        """The orders. Raises StoreError only while they were never read: else the last known."""
        if self._is_fresh():
            return self.orders
        async with self._lock:
            return self.orders if self._is_fresh() else await self._read()

    async def refresh(self) -> Orders:
        """The orders as they are now; raises as `look` does."""
        async with self._lock:
            return await self._read()

    async def _read(self) -> Orders:
        now, told = self._clock.monotonic(), self._told
        try:
            self.orders = await self._gate.call(lambda: read_orders(self.shelf))
        except StoreError as error:
            if not self._is_known:
                raise
            logger.debug("the last known orders stand: %s", error.message)
        self._is_known = True
        self._looked_at = now if told == self._told else None
        return self.orders

    def _is_fresh(self) -> bool:
        at = self._looked_at
        return at is not None and 0 <= self._clock.monotonic() - at < self.poll_s

    def _notice(self, news: News) -> None:
        if news.is_order or news.is_gap or news.is_replaced:
            self._looked_at = None
            self._told += 1
            for listener in self._listeners:
                listener()


class Admission:
    """Whether runs from outside may begin: asked by every door that takes new ones."""

    def __init__(
        self,
        watch: Watch,
        *,
        leaving: Callable[[], str] = str,
        gate: StoreBreaker | None = None,
    ) -> None:
        """`leaving`: why this process takes no more runs; empty while it does."""
        self._watch = watch
        self._leaving = leaving
        self._gate = gate

    async def check(self) -> None:
        """Raises Maintenance, Draining, StoreResting; StoreError when nothing is known yet."""
        if self._gate is not None:
            self._gate.demand()
        orders = await self._watch.look()
        if why := self._leaving():
            raise Draining(why, retry_after_s=1.0, hint="ask another node")
        if orders.standing.enabled:
            raise orders.standing.refusal()


async def check_admission(shelf: Shelf) -> None:
    """The same for a process that lives for one request. Raises Maintenance."""
    standing = (await read_orders(shelf)).standing
    if standing.enabled:
        raise standing.refusal()


def enabled(
    *, by: str, reason: str, since: int, mode: Mode = Mode.KEEP, retry_after_s: float | None = None
) -> Standing:
    """Maintenance mode, switched on."""
    standing = Standing(True, mode, by, reason, since)
    return standing if retry_after_s is None else replace(standing, retry_after_s=retry_after_s)


async def _put(store: Store, key: str, value: Json) -> None:
    for _ in range(_TRIES):
        before, version = await store.shelf.record(KIND, key)
        if before is None and value is None:
            return
        change = PutRecord(KIND, key, value, version)
        if not (await store.commit(Batch(changes=(change,)))).is_refused:
            return
    raise Refused("somebody else changes the same order again and again; try again")


def _meant(node: str, known: list[str], *, what: str = "node lives") -> str:
    found = [each for each in known if each == node] or [
        each for each in known if node and each.startswith(node)
    ]
    if not found:
        raise NotFound(
            f"no such {what}: {node}; there is: {', '.join(sorted(known)) or 'none'}",
            hint="llmo nodes list",
        )
    if len(found) > 1:
        raise Refused(f"{node} may be {', '.join(sorted(found))}", hint="give more of its id")
    return found[0]


def _first_life(node_id: str) -> str:
    head, dot, life = node_id.rpartition(".")
    return head if dot and life.isdigit() else node_id


def _firsts(node_ids: Iterable[str]) -> set[str]:
    return {_first_life(each) for each in node_ids}
