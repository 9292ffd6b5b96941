"""Gauges of the store, for `/metrics`: read when somebody asks, and never so often that it hurts.

What is asked of the store is small and bounded: one answer serves everybody for FRESH_S, and a
question that took long is not put again before SHARE times as long has passed, so that scraping
costs the store a twentieth of one connection at most (a fiftieth for the census, which reads the
whole table of runs and is waited for by nobody after the first time). A store that does not answer
within PATIENCE_S is told as `store_reachable 0`, without gauges: old ones would be lies.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Generic, TypeVar

from llm_orchestrator.clock import Clock
from llm_orchestrator.engine.breakers import BreakerView, list_breakers
from llm_orchestrator.engine.maintenance import read_orders
from llm_orchestrator.engine.measure import BREAKER
from llm_orchestrator.engine.region import Regions, Role
from llm_orchestrator.errors import StoreError
from llm_orchestrator.model import MICROSECONDS, Json
from llm_orchestrator.recovery.create import BACKUP
from llm_orchestrator.recovery.readiness import followers, replica_exposure, wal_exposure
from llm_orchestrator.server.backups import backup_samples
from llm_orchestrator.server.probe import Finding, Probe
from llm_orchestrator.store.base import Database, Member, NodeState, lives
from llm_orchestrator.store.statistics import Queue, RunCount, Standby
from llm_orchestrator.telemetry.metrics import Metrics, Sample

logger = logging.getLogger(__name__)
FRESH_S = 1.0
PATIENCE_S = 2.0
SHARE = 20
CENSUS_S = 30.0
CENSUS_SHARE = 50
STALLED_US = 300 * MICROSECONDS
NODES_MAX = 200
"""Living nodes that are named."""
_NODES_READ = 1_000
T = TypeVar("T")


class Paced(Generic[T]):
    """One answer for everybody, renewed no more often than its cost allows."""

    def __init__(
        self, ask: Callable[[], Awaitable[T]], clock: Clock, *, limit_s: float, share: float
    ) -> None:
        self._ask = ask
        self._clock = clock
        self._limit_s = limit_s
        self._share = share
        self._next_at: float | None = None
        self._under_way: asyncio.Task[None] | None = None
        self.answer: T | None = None
        """The last one; None until there is one, and after one that failed."""

    async def get(self, patience_s: float) -> T | None:
        """The newest answer that there is within `patience_s`. Raises nothing."""
        is_due = self._next_at is None or self._clock.monotonic() >= self._next_at
        if self._under_way is None and is_due:
            self._under_way = asyncio.create_task(self._renew(), name="metrics")
        if self._under_way is not None and patience_s > 0:
            await asyncio.wait([self._under_way], timeout=patience_s)
        return self.answer

    async def _renew(self) -> None:
        began = self._clock.monotonic()
        try:
            async with asyncio.timeout(self._limit_s):
                self.answer = await self._ask()
        except (StoreError, TimeoutError) as error:
            self.answer = None
            logger.debug("gauges of the store cannot be read: %s", error)
        finally:
            now = self._clock.monotonic()
            self._next_at = now + max(FRESH_S, (now - began) * self._share)
            self._under_way = None


class Collector:
    """See the module's docstring."""

    def __init__(
        self,
        store: Database,
        clock: Clock,
        *,
        metrics: Metrics,
        probe: Probe,
        is_stopping: Callable[[], bool],
    ) -> None:
        self._store = store
        self._clock = clock
        self._metrics = metrics
        self._probe = probe
        self._is_stopping = is_stopping
        self._queues = {"default"}
        """Those that were seen: an empty queue is 0, not gone."""
        self._census = Paced(store.counts.census, clock, limit_s=CENSUS_S, share=CENSUS_SHARE)
        self._figures = Paced(self._read, clock, limit_s=PATIENCE_S, share=SHARE)

    async def samples(self) -> list[Sample]:
        """Every gauge at this moment, those of this process included. Raises nothing."""
        stopping = Sample("draining", (), float(self._is_stopping()))  # a node may say more
        return [stopping, *self._metrics.read_gauges(), *await self._of_store()]

    async def _of_store(self) -> list[Sample]:
        found = await self._ask()
        is_reachable = found is not None and found.read_ms is not None
        is_writable = found is not None and not found.trouble
        samples = [
            Sample("store_reachable", (), float(is_reachable)),
            Sample("store_writable", (), float(is_writable)),
            Sample("epoch", (), self._store.generation),
        ]
        if found is None or found.read_ms is None:
            return samples
        samples.append(Sample("store_latency_seconds", (), found.read_ms / 1_000))
        samples += await self._figures.get(PATIENCE_S) or ()
        is_first = self._census.answer is None
        census = await self._census.get(PATIENCE_S if is_first else 0.0)
        return [*samples, *self._runs(census or ())]

    async def _ask(self) -> Finding | None:
        try:
            async with asyncio.timeout(PATIENCE_S):
                return await self._probe.ask()
        except TimeoutError:
            return None

    async def _read(self) -> list[Sample]:
        """Everything that is read together. Raises StoreError."""
        now, shelf = self._clock.now_us(), self._store.shelf
        found = await self._store.counts.statistics(now, stalled_before=now - STALLED_US)
        orders = await read_orders(shelf)
        members = await shelf.nodes(_NODES_READ)
        samples = [
            Sample("runs_accepted_minus_advanced", (), found.waiting + found.stalled),
            Sample("maintenance", (), float(orders.standing.enabled)),
            *self._waiting(found.queues, now),
            *_nodes(members, now),
            *self._regions(orders.regions, members),
            *self._breakers(await list_breakers(shelf, now)),
            *backup_samples(await shelf.records(BACKUP), now),
        ]
        if found.standbys is not None:
            samples += self._replication(found.standbys)
        if found.damaged_pages is not None:
            samples.append(Sample("database_damaged_pages", (), found.damaged_pages.number))
        return samples

    # -- what the answers mean -----------------------------------------------------------------

    def _runs(self, census: Sequence[RunCount]) -> Iterator[Sample]:
        counts: Counter[tuple[str, str]] = Counter()
        for state, workflow, number in census:
            counts[state, self._metrics.workflows(workflow)] += number
        for labels, number in counts.items():
            yield Sample("runs", labels, number)

    def _waiting(self, queues: Sequence[Queue], now: int) -> Iterator[Sample]:
        depths = Counter(dict.fromkeys(self._queues, 0))
        ages = dict.fromkeys(self._queues, 0.0)
        for queue in queues:
            name = self._metrics.queues(queue.name)
            depths[name] += queue.depth
            ages[name] = max(ages.get(name, 0.0), (now - queue.since) / MICROSECONDS)
        self._queues |= set(depths)
        for name, depth in depths.items():
            yield Sample("queue_depth", (name,), depth)
            yield Sample("queue_oldest_age_seconds", (name,), ages[name])

    def _regions(self, regions: Regions, members: Sequence[Member]) -> Iterator[Sample]:
        for region in regions.known([each.region for each in members if lives(each)]):
            is_active = regions.role_of(region) is Role.ACTIVE
            yield Sample("region_active", (self._metrics.words(region),), float(is_active))

    def _breakers(self, breakers: Sequence[BreakerView]) -> Iterator[Sample]:
        worst: dict[str, float] = {}
        for breaker in breakers:
            provider = self._metrics.names(breaker.provider)
            worst[provider] = max(worst.get(provider, 0.0), BREAKER[breaker.state])
        for provider, state in worst.items():
            yield Sample("breaker_state", (provider,), state)

    def _replication(self, standbys: Sequence[Standby]) -> Iterator[Sample]:
        lags: dict[str, tuple[float, int]] = {}
        servers = followers(standbys)
        for standby in servers:
            name = self._metrics.words(standby.name)
            lag_s, lag_bytes = lags.get(name, (0.0, 0))
            lags[name] = max(lag_s, standby.lag_s), max(lag_bytes, standby.lag_bytes)
        for name, (lag_s, lag_bytes) in lags.items():
            yield Sample("replication_lag_seconds", (name,), lag_s)
            yield Sample("replication_lag_bytes", (name,), lag_bytes)
        waited_for = sum(standby.is_sync for standby in servers)
        yield Sample("replication_standbys", ("true",), waited_for)
        yield Sample("replication_standbys", ("false",), len(servers) - waited_for)
        for exposure in (replica_exposure(standbys), wal_exposure(standbys)):
            if exposure.seconds is not None:
                labels = (exposure.mechanism,)
                yield Sample("recovery_point_exposure_seconds", labels, exposure.seconds)


def _nodes(members: Sequence[Member], now: int) -> Iterator[Sample]:
    states = Counter(dict.fromkeys((state.value for state in NodeState), 0))
    states.update(member.state for member in members)
    for state, number in states.items():
        yield Sample("nodes", (state,), number)
    for member in [each for each in members if lives(each)][:NODES_MAX]:
        info = (member.node_id, _version(member.info), member.region)
        yield Sample("node_info", info, 1.0)
        if member.beat:  # on a file nobody beats: its lock says who lives
            age_s = (now - member.heartbeat_at) / MICROSECONDS
            yield Sample("node_lease_age_seconds", (member.node_id,), max(0.0, age_s))


def _version(info: Json) -> str:
    return str(info.get("version", "")) if isinstance(info, dict) else ""
