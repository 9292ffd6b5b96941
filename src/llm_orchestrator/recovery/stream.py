"""The stream archive: every batch of this process in a second place as well (laws 10 and 11).

    keep(batch)  -> waits its turn -> one frame of all that wait -> durable there -> (sync: go on)
    commit
    settle       -> what became of it rides along with a later frame

In mode `sync` a batch is durable in the archive before the store sees it, so the archive has all
that anybody has ever seen; it may have more (what was never committed), and the chains decide about
that. In mode `async` frames leave every FLUSH_S, and commits wait for nobody until the archive is
further behind than allowed.

When the place is away: `stall` lets commits wait, and fail after PATIENCE_S; `degrade` lets them go
on. What was not written is kept in memory, up to a bound, and written when the place is back; what
goes beyond the bound is a *hole*, which is written down too: from there on only a fresh backup
closes the gap, and the gauge says so until the process ends.

Nothing here ever raises into a commit but StoreUnavailable from `keep`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from llm_orchestrator.clock import Clock
from llm_orchestrator.errors import OrchestratorError, StoreUnavailable
from llm_orchestrator.model import Json
from llm_orchestrator.recovery.segments import Frame, Hole, Kept, frame_bytes
from llm_orchestrator.recovery.stream_sinks import Sink
from llm_orchestrator.recovery.stream_tally import Tally
from llm_orchestrator.store.base import Batch, Receipt
from llm_orchestrator.store.batch_codec import fitting, is_archived, plain
from llm_orchestrator.telemetry.metrics import Metrics, Sample

logger = logging.getLogger(__name__)
FLUSH_S = 0.2
"""How long an `async` batch waits for others."""
IDLE_S = 0.5
"""How long outcomes wait for a batch to ride along with."""
RETRY_S = 0.5
PATIENCE_S = 10.0
LATE_S = 5.0
"""A place that has not answered for so long is away."""
WAITING_BYTES_MAX = 64 << 20


class Mode(StrEnum):
    """When a commit may go on."""

    SYNC = "sync"
    ASYNC = "async"


class OnFailure(StrEnum):
    """What commits do while the archive is away."""

    STALL = "stall"
    DEGRADE = "degrade"


@dataclass(frozen=True, slots=True)
class StreamOptions:
    """How careful the archive is."""

    mode: Mode = Mode.SYNC
    on_failure: OnFailure = OnFailure.STALL
    lag_s: float = 5.0
    """How far an `async` archive may be behind before commits wait."""
    waiting_bytes_max: int = WAITING_BYTES_MAX


class Opener(Protocol):
    """Gives the sink once there is something to write, and remembers how far the store is."""

    state: Callable[[], dict[str, Json]]
    """Asked how the archive fares, for people."""

    async def prepare(self, *, is_needed: bool = True) -> None:
        """Find out what the store held before the first batch, and whether the place is its own.

        Raises ConfigError; StoreError when the place is away and `is_needed`.
        """
        ...

    def open(self) -> Sink:
        """Raises ConfigError."""
        ...

    def settled(self, number: int) -> None:
        """Everything up to this batch has ended; what of it landed is in the store."""
        ...

    async def tell(self) -> None:
        """Write into the store, now, how the archive fares. Raises nothing."""
        ...

    def is_own(self, batch: Batch) -> bool:
        """True for what it commits itself: not archived."""
        ...

    async def close(self) -> None: ...


class _Waiting:
    """A batch that is not durable here yet."""

    __slots__ = ("appends", "at", "changes", "future", "number", "since", "size")

    def __init__(self, number: int, batch: Batch, since: float) -> None:
        self.number = number
        self.at = batch.at
        self.appends, self.changes = plain(batch)
        self.since = since
        self.size = 0
        self.future: asyncio.Future[None] | None = None


class StreamArchive:
    """See store.archiving.Archive, and the module's docstring. Belongs to one event loop."""

    def __init__(
        self,
        opener: Opener,
        clock: Clock,
        options: StreamOptions | None = None,
        *,
        metrics: Metrics | None = None,
    ) -> None:
        self._opener = opener
        self._clock = clock
        self._options = options or StreamOptions()
        self._sink: Sink | None = None
        self._queue: list[_Waiting] = []
        self._flight: list[_Waiting] = []
        self._tally = Tally()
        self._number = 0
        self._wake: asyncio.Future[None] | None = None
        self._task: asyncio.Task[None] | None = None
        self._away_since: float | None = None
        self._is_told = False
        self._holes: list[Hole] = []
        self._has_lost = False
        self._waiting_bytes = 0
        self._is_closing = self._is_prepared = False
        self._preparing = asyncio.Lock()
        opener.state = self.state
        self._metrics = metrics
        if metrics is not None:
            metrics.watch(self._gauges)

    # -- what a store calls -------------------------------------------------------------------

    async def keep(self, batch: Batch) -> int:
        if not is_archived(batch) or self._opener.is_own(batch):
            return 0
        options = self._options
        if not self._is_prepared:
            await self.prepare()
        self._number += 1
        one = _Waiting(self._number, batch, self._clock.monotonic())
        self._tally.begin(one.number)
        if self._away_since is not None and self._is_full(one, batch):
            return one.number
        self._queue.append(one)
        self._start()
        if options.mode is Mode.ASYNC:
            oldest = (self._flight or self._queue)[0].since
            if one.since - oldest <= options.lag_s or self._may_go_on():
                return one.number
        elif self._may_go_on():
            return one.number
        one.future = asyncio.get_running_loop().create_future()
        try:
            await one.future
        except BaseException:
            self._tally.void(one.number)
            raise
        return one.number

    async def prepare(self) -> None:
        """Before the first batch, or earlier. Raises ConfigError, StoreError."""
        async with self._preparing:
            if not self._is_prepared:
                is_needed = self._options.on_failure is OnFailure.STALL
                await self._opener.prepare(is_needed=is_needed)
                if self._options.mode is Mode.ASYNC:
                    await self._opener.tell()  # whoever finds us dead knows that a tail is missing
                self._is_prepared = True

    def settle(self, number: int, receipt: Receipt | None) -> None:
        if not number:
            return
        self._tally.end(number, receipt)
        self._opener.settled(self._tally.settled)
        self._start(is_hurried=False)

    async def close(self) -> None:
        self._is_closing = True
        if self._task is not None:
            self._awake()
            await asyncio.wait([self._task], timeout=PATIENCE_S)
            if not self._task.done():
                logger.error("the archive does not answer; its last batches are not there")
                self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        await self._opener.close()
        if self._sink is not None:
            await self._sink.close()
            self._sink = None
        if self._metrics is not None:
            self._metrics.unwatch(self._gauges)

    async def abandon(self) -> None:
        """The store is another one now: what waits belongs to nobody any more. Raises nothing."""
        self._is_closing = True
        for one in (*self._flight, *self._queue):
            _release(one, StoreUnavailable("the store was restored meanwhile", hint="ask again"))
        self._flight, self._queue = [], []
        await self.close()

    # -- the flusher --------------------------------------------------------------------------

    def _start(self, *, is_hurried: bool = True) -> None:
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run(), name="archive")
        elif is_hurried:
            self._awake()

    def _awake(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    async def _run(self) -> None:
        while True:
            if not self._queue:
                if self._is_closing:
                    await self._finish()
                    return
                await self._rest()
            if self._options.mode is Mode.ASYNC and not self._is_closing:
                await self._clock.sleep(FLUSH_S)
            if self._queue or self._tally.has_news:
                await self._flush(is_end=False)

    async def _rest(self) -> None:
        """Until there is a batch, or outcomes have waited long enough for one."""
        self._wake = asyncio.get_running_loop().create_future()
        limit_s = IDLE_S if self._tally.has_news or self._tally.is_open else None
        await asyncio.wait([self._wake], timeout=limit_s)
        self._wake = None

    async def _finish(self) -> None:
        if self._sink is not None:
            await self._flush(is_end=True)

    async def _flush(self, *, is_end: bool) -> None:
        """Everything that waits, in one frame; returns once it is durable."""
        self._flight, self._queue = self._queue, []
        frame = Frame(*self._tally.take(), [], self._holes, is_end)
        content = _encode(frame, self._flight)
        self._holes = []
        while not await self._write(content):
            if self._is_closing and is_end:
                return
            await self._complain()
            await self._clock.sleep(RETRY_S)
        self._is_back()
        for one in self._flight:
            _release(one)
        self._flight = []

    async def _write(self, content: bytes) -> bool:
        try:
            if self._sink is None:
                self._sink = self._opener.open()
            writing = asyncio.ensure_future(self._sink.write(content))
            done, _ = await asyncio.wait([writing], timeout=LATE_S)
            while not done:
                self._is_away("it does not answer")
                await self._complain()
                done, _ = await asyncio.wait([writing], timeout=RETRY_S)
            await writing
        except OrchestratorError as error:
            self._is_away(error.message)
            return False
        return True

    # -- when the place is away ---------------------------------------------------------------

    def _may_go_on(self) -> bool:
        """True once the store knows that its archive may lack something from here on."""
        return self._away_since is not None and self._is_told

    def _is_away(self, why: str) -> None:
        if self._away_since is not None:
            return
        self._away_since = self._clock.monotonic()
        if self._options.on_failure is OnFailure.DEGRADE:
            logger.critical(
                "the stream archive is away (%s): commits go on without a second place", why
            )
        else:
            logger.error("the stream archive is away (%s): commits wait for it", why)

    def _is_back(self) -> None:
        if self._away_since is None:
            return
        away_s = self._clock.monotonic() - self._away_since
        self._away_since, self._waiting_bytes, self._is_told = None, 0, False
        logger.warning("the stream archive is back after %.0f s", away_s)

    async def _complain(self) -> None:
        """Those who wait: on they go, or they have waited long enough."""
        is_degraded = self._options.on_failure is OnFailure.DEGRADE
        if is_degraded and not self._is_told:
            await self._opener.tell()
            self._is_told = True
        now = self._clock.monotonic()
        for one in (*self._flight, *self._queue):
            if is_degraded:
                _release(one)
            elif now - one.since > PATIENCE_S or self._is_closing:
                _release(one, StoreUnavailable("the stream archive is away", hint="llmo doctor"))

    def _is_full(self, one: _Waiting, batch: Batch) -> bool:
        """True when it must be left out: then it is part of a hole."""
        size = _size(batch)
        if self._waiting_bytes + size <= self._options.waiting_bytes_max:
            self._waiting_bytes += size
            return False
        if not self._may_go_on():
            raise StoreUnavailable("the stream archive is away", hint="llmo doctor")
        if not self._has_lost:
            logger.critical(
                "what the archive misses does not fit into memory any more: there will be a hole"
                " in it, and only a new backup closes it"
            )
        self._has_lost = True
        last = self._holes.pop() if self._holes else Hole(one.number, 0, one.at, 0)
        self._holes.append(last._replace(last=one.number, until=one.at))
        return True

    # -- what can be seen ---------------------------------------------------------------------

    @property
    def exposure_s(self) -> float:
        """How old the oldest batch is that is not there yet."""
        waiting = self._flight or self._queue
        return self._clock.monotonic() - waiting[0].since if waiting else 0.0

    @property
    def is_degraded(self) -> bool:
        """True while a new batch might not get there, or when some never will."""
        return self._has_lost or self._away_since is not None

    def state(self) -> dict[str, Json]:
        """How it fares, for people."""
        return {
            "mode": self._options.mode.value,
            "exposure_s": round(self.exposure_s, 3),
            "is_degraded": self.is_degraded,
            "has_hole": self._has_lost,
            "is_ended": self._is_closing and not self._queue and not self._flight,
        }

    def _gauges(self) -> Iterable[Sample]:
        sink = self._sink
        return (
            Sample("recovery_point_exposure_seconds", ("archive",), self.exposure_s),
            Sample("archive_lag_batches", (), len(self._flight) + len(self._queue)),
            Sample("archive_degraded", (), float(self.is_degraded)),
            Sample("archive_segments", (), sink.segments if sink else 0),
            Sample("archive_bytes", (), sink.written_bytes if sink else 0),
        )


def _release(one: _Waiting, error: Exception | None = None) -> None:
    future = one.future
    if future is None or future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)


def _encode(frame: Frame, batches: list[_Waiting]) -> bytes:
    """The frame with them in it. What no column takes is left out of its batch."""
    kept = [Kept(one.number, one.at, one.appends, one.changes) for one in batches]
    try:
        return frame_bytes(frame._replace(kept=kept))
    except (TypeError, ValueError, OverflowError, RecursionError):
        kept = [Kept(one.number, one.at, *fitting(one.appends, one.changes)) for one in batches]
        return frame_bytes(frame._replace(kept=kept))


def _size(batch: Batch) -> int:
    return 200 + sum(
        200 + len(entry.payload) for append in batch.appends for entry in append.entries
    )
