"""A store that does not answer is left alone for a moment: requests fail fast instead of piling up.

For what people and programs ask of this process (API reads and writes, doors for new runs), never
for the writer of runs: what a commit with an unknown outcome needs is its own protocol. The machine
is the providers' one (providers/breaker.py); its state is this process's own, because a store that
is away can tell nobody anything. Only StoreUnavailable opens it: a full disk or a damaged page
is an answer. No answer in time is one: a network that swallows everything says nothing at all. What
was asked may still be done then, as after a connection that broke.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, cast

from llm_orchestrator.clock import Clock
from llm_orchestrator.errors import StoreReplaced, StoreResting, StoreUnavailable
from llm_orchestrator.model import Json
from llm_orchestrator.providers import breaker
from llm_orchestrator.providers.breaker import BreakerPolicy, State, Tally, Verdict
from llm_orchestrator.store.base import Batch, Database, Look, Receipt, Shelf
from llm_orchestrator.store.statistics import Counts

logger = logging.getLogger(__name__)
T = TypeVar("T")
POLICY = BreakerPolicy(
    failures_max=3,
    open_s=0.5,
    open_s_max=4.0,
    wave_max=4,
    wave_s_max=10.0,
    probe_wait_s=0.25,
    window_calls_min=1_000_000,
)
"""Three failures in a row; half a second, then up to four; probes in waves of 1 and 4."""
PATIENCE_S = 10.0
"""How long a question may take while nothing is wrong."""
PROBE_S = 3.0
"""How long one may take that finds out whether the store is there."""


class StoreBreaker:
    """See the module's docstring. One per process."""

    def __init__(self, clock: Clock, policy: BreakerPolicy = POLICY) -> None:
        self._clock = clock
        self._policy = policy
        self._tally = Tally()
        self._verdict = Verdict()
        self._why = ""

    @property
    def state(self) -> State:
        """Closed, open or half open."""
        return self._verdict.state

    def to_json(self) -> dict[str, Json]:
        """For health and metrics."""
        until = self._verdict.until if self.state is State.OPEN else 0.0
        return {
            "name": "store",
            "state": self.state.value,
            "retry_in_s": round(max(0.0, until - self._clock.monotonic()), 3) if until else 0.0,
            "openings": self._verdict.openings,
            "detail": self._why if self.state is not State.CLOSED else "",
        }

    def demand(self) -> None:
        """For a door that will not ask the store by itself. Raises StoreResting while it rests."""
        now = self._clock.monotonic()
        if self.state is State.OPEN and now < self._verdict.until:
            raise self._resting(self._verdict.until - now)

    async def call(self, ask: Callable[[], Awaitable[T]], *, patience_s: float = PATIENCE_S) -> T:
        """Ask the store, if it is to be asked now. Raises StoreResting when it is not.

        Raises StoreUnavailable, too, when no answer comes within `patience_s` (of a probe: PROBE_S
        at most). 0: whoever asks sees to that.
        """
        self._verdict, answer = breaker.admit(self._verdict, self._clock.monotonic(), self._policy)
        if not answer.is_admitted:
            raise self._resting(answer.wait_s)
        try:
            result = await self._answer(
                ask, min(patience_s, PROBE_S) if answer.wave_id else patience_s
            )
        except StoreUnavailable as error:
            self._fail(answer.wave_id, error)
            raise
        except Exception:
            self._succeed(answer.wave_id)  # an answer, if no good one
            raise
        except BaseException:
            self._verdict = breaker.release(self._verdict, wave_id=answer.wave_id)
            raise
        self._succeed(answer.wave_id)
        return result

    async def _answer(self, ask: Callable[[], Awaitable[T]], patience_s: float) -> T:
        if not patience_s:
            return await ask()
        limit = asyncio.timeout(patience_s)
        try:
            async with limit:
                return await ask()
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise StoreUnavailable(
                f"the store gave no answer within {patience_s:g} s; "
                "what was asked of it may still be done",
                hint="llmo doctor",
            ) from error

    def _resting(self, wait_s: float) -> StoreResting:
        return StoreResting(
            f"the store is not asked for a moment, it does not answer: {self._why}",
            retry_after_s=max(0.1, wait_s),
            hint="llmo doctor",
        )

    def _fail(self, wave_id: int, error: StoreUnavailable) -> None:
        now, before = self._clock.monotonic(), self.state
        self._why = error.message
        if before is State.CLOSED:
            self._tally, is_open = breaker.count(
                self._tally, now, is_failure=True, policy=self._policy
            )
            if is_open:
                self._tally = Tally()
                self._verdict = breaker.open_(self._verdict, now, self._policy)
        else:
            self._verdict = breaker.fail(self._verdict, now, self._policy, wave_id=wave_id)
        if self.state is State.OPEN and before is not State.OPEN:
            logger.error("the store's breaker is open: %s", error.message)

    def _succeed(self, wave_id: int) -> None:
        now, before = self._clock.monotonic(), self.state
        if before is State.CLOSED:
            self._tally, _ = breaker.count(self._tally, now, is_failure=False, policy=self._policy)
            return
        self._verdict = breaker.succeed(self._verdict, now, self._policy, wave_id=wave_id)
        if self.state is State.CLOSED:
            logger.warning("the store's breaker is closed: it answers again")


class _Gated:
    """Every method of a Look or a Shelf, through the breaker."""

    def __init__(
        self, target: object, gate: StoreBreaker, *, patience_s: float = PATIENCE_S
    ) -> None:
        self._target = target
        self._gate = gate
        self._patience_s = patience_s

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._target, name)

        async def call(*arguments: Any, **named: Any) -> Any:
            return await self._gate.call(
                lambda: method(*arguments, **named), patience_s=self._patience_s
            )

        return call


class _GatedStore:
    """A Database whose reads and commits pass a breaker; the rest is the store's own."""

    def __init__(self, store: Database, gate: StoreBreaker, patience_s: float) -> None:
        self._store = store
        self._gate = gate
        self._patience_s = patience_s
        self.look = cast(Look, _Gated(store.look, gate, patience_s=patience_s))
        self.shelf = cast(Shelf, _Gated(store.shelf, gate, patience_s=patience_s))
        self.counts = cast(Counts, _Gated(store.counts, gate, patience_s=0.0))
        """(They read whole tables: whoever asks for them knows how long that may take.)"""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def commit(self, batch: Batch) -> Receipt:
        try:
            return await self._gate.call(
                lambda: self._store.commit(batch), patience_s=self._patience_s
            )
        except StoreReplaced as error:
            raise StoreUnavailable(error.message, hint="ask again") from error

    async def is_served(self) -> bool:
        return await self._gate.call(self._store.is_served, patience_s=self._patience_s)

    def hurried(self, patience_s: float) -> Database:
        return gated(self._store, self._gate, patience_s=patience_s)


def gated(store: Database, gate: StoreBreaker, *, patience_s: float = PATIENCE_S) -> Database:
    """The store as requests from outside use it. Nodes and their writers keep the plain one."""
    return cast(Database, _GatedStore(store, gate, patience_s))


def hurried(store: Database, patience_s: float) -> Database:
    """The same store for whoever does not wait so long; one without a breaker as it is."""
    return store.hurried(patience_s) if isinstance(store, _GatedStore) else store
