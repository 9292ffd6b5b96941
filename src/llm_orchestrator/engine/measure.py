"""What a node tells metrics of itself: how fast runs come to it, and how it stands."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from llm_orchestrator.clock import Clock
from llm_orchestrator.engine.replay import Fold
from llm_orchestrator.model import MICROSECONDS, Journal, RunState
from llm_orchestrator.providers.breaker import State
from llm_orchestrator.telemetry.metrics import Metrics, Sample
from llm_orchestrator.telemetry.metrics_names import ACTIVE

if TYPE_CHECKING:
    from llm_orchestrator.engine.node import Node
    from llm_orchestrator.engine.store_breaker import StoreBreaker

BREAKER = {State.CLOSED: 0.0, State.HALF_OPEN: 1.0, State.OPEN: 2.0}


class ClaimTimes:
    """From due to claimed, and from a node's death to its runs being driven again."""

    def __init__(self, metrics: Metrics, clock: Clock) -> None:
        self._metrics = metrics
        self._clock = clock
        self._death_at: float | None = None
        self._looked_at = 0.0

    def saw_death(self) -> None:
        """A node died. While runs of an earlier one are left, that one's death counts."""
        if self._death_at is None:
            self._death_at = self._clock.monotonic()

    def look(self) -> None:
        """Runs of dead nodes are looked for; of a death that nobody told us this is the time."""
        self._looked_at = self._clock.monotonic()

    def took_all(self) -> None:
        """Nothing is left of dead nodes."""
        self._death_at = None

    def driven(self, before: Fold, journal: Journal, node_id: str) -> None:
        """A run is driven here, by `node_id`; `before` is how it was found."""
        if before.state is not RunState.RUNNING:
            self._claimed(before, journal)
        elif before.owner != node_id:
            self._took_over()

    def _took_over(self) -> None:
        """A run of a node that does not live."""
        since = self._looked_at if self._death_at is None else self._death_at
        self._metrics.count("takeovers_total")
        self._metrics.observe("recovery_time_seconds", self._clock.monotonic() - since)

    def _claimed(self, before: Fold, journal: Journal) -> None:
        """A run that was due. Of one that a message woke nobody knows since when."""
        is_woken = before.state is RunState.WAITING and before.wake_at > self._clock.now_us()
        if is_woken or not journal.entries:
            return
        due_at = max(before.wake_at, journal.entries[-1].recorded_at)
        waited_s = (self._clock.now_us() - due_at) / MICROSECONDS
        self._metrics.observe("claim_latency_seconds", max(0.0, waited_s))


def store_gauges(gate: StoreBreaker) -> Iterator[Sample]:
    """How the breaker before the store stands."""
    yield Sample("breaker_state", ("store",), BREAKER[gate.state])


def node_gauges(node: Node) -> Iterator[Sample]:
    """How the node stands at this moment."""
    yield Sample(ACTIVE.word, (), node.driver.count)
    yield Sample("draining", (), float(bool(node.leaving() or node.upkeep.draining)))
    yield from store_gauges(node.store_gate)
    pressure = node.upkeep.pressure
    if pressure.reading.limit:
        yield Sample("memory_bytes", (), pressure.reading.use)
        yield Sample("memory_limit_bytes", (), pressure.reading.limit)
    if node.spool is not None:
        for word, value in zip(("spool_results", "spool_bytes"), node.spool.held, strict=True):
            yield Sample(word, (), value)
    yield Sample("memory_shedding", (), float(pressure.is_shedding))
    if node.verifier is not None and node.verifier.last_round_s:
        yield Sample("journal_damaged_runs", (), node.verifier.damaged)
        last = node.verifier.last_round_s
        yield Sample("journal_verify_last_round_timestamp_seconds", (), last)
    if node.verifier is not None:
        yield Sample("journal_verify_progress_ratio", (), node.verifier.progress)
