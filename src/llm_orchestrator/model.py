"""Frozen nouns and state enums. No I/O, no clock, no randomness.

The words are the glossary's (ARCHITECTURE.md): one word, one meaning, in code, SQL and output.
Times are integers, microseconds since the epoch on the store's clock. JSON is what `Json` says.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

Json = Any
"""Any JSON value; `Any` because mypy has no useful recursive JSON type at our edges."""

MICROSECONDS = 1_000_000


def stamp(moment: int | None) -> str | None:
    """Microseconds since the epoch as ISO 8601 in UTC; None for no moment."""
    if not moment:
        return None
    try:
        at = datetime.datetime.fromtimestamp(moment / MICROSECONDS, tz=datetime.UTC)
    except (OverflowError, ValueError, OSError):
        return None
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")


class RunState(StrEnum):
    """Where a run stands. Reasons (timer, signal, operator, ...) are data beside it."""

    PENDING = "pending"
    RUNNING = "running"
    WAITING = "waiting"
    PAUSED = "paused"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        """True when nothing but an operator's request moves the run again."""
        return self in _FINAL


_FINAL = frozenset({RunState.COMPLETED, RunState.FAILED, RunState.CANCELLED})


class Kind(StrEnum):
    """What a journal entry records."""

    ACCEPTED = "accepted"
    CLAIMED = "claimed"
    INTENT = "intent"
    ATTEMPT_FAILED = "attempt_failed"
    STEP_FINISHED = "step_finished"
    STEP_SKIPPED = "step_skipped"
    PROGRESS = "progress"
    WAITING = "waiting"
    SIGNAL = "signal"
    DECISION = "decision"
    STATE = "state"
    REWOUND = "rewound"


class StepState(StrEnum):
    """How far a step has come, as the journal tells it."""

    RUNNING = "running"
    WAITING = "waiting"
    COMPLETED = "completed"
    FAILED = "failed"
    SKIPPED = "skipped"


class Effect(StrEnum):
    """Whether a step whose outcome is unknown may be issued again without asking."""

    REPEATABLE = "repeatable"
    ONCE = "once"


class OnUnknown(StrEnum):
    """What to do with a `once` step whose outcome is unknown."""

    RETRY = "retry"
    ASK = "ask"
    PROBE = "probe"
    FAIL = "fail"


class Backoff(StrEnum):
    """How the delay before the next attempt grows."""

    EXPONENTIAL = "exponential"
    LINEAR = "linear"
    CONSTANT = "constant"


class Entry(NamedTuple):
    """One row of a journal, as stored. `payload` is the stored bytes, `digest` 32 bytes."""

    run_id: str
    seq: int
    epoch: int
    kind: str
    step: str
    attempt: int
    payload: bytes
    digest: bytes
    recorded_at: int


class Draft(NamedTuple):
    """An entry before the writer gives it a seq and a digest. `payload` is already encoded."""

    kind: str
    step: str
    attempt: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class Retry:
    """When a failed attempt is followed by another.

    `max_attempts` counts every try and survives crashes. Delays are milliseconds. `jitter` is the
    share of a delay that is random (0 to 1). `retry_on` names error kinds; empty means every
    retryable one.
    """

    max_attempts: int = 3
    backoff: Backoff = Backoff.EXPONENTIAL
    initial_delay_ms: int = 100
    max_delay_ms: int = 30_000
    multiplier: float = 2.0
    jitter: float = 0.25
    retry_on: tuple[str, ...] = ()

    def delay_ms(self, attempt: int, chance: float) -> float:
        """Delay after failed try `attempt` (from 1); `chance` is a random number in [0, 1)."""
        if self.backoff is Backoff.CONSTANT:
            delay = float(self.initial_delay_ms)
        elif self.backoff is Backoff.LINEAR:
            delay = float(self.initial_delay_ms) * attempt
        else:
            delay = self.initial_delay_ms * self.multiplier ** min(attempt - 1, 64)
        delay = min(delay, float(self.max_delay_ms))
        return delay * (1 - self.jitter + 2 * self.jitter * chance)


@dataclass(frozen=True, slots=True)
class Policy:
    """How the engine performs one step, whatever its type."""

    retry: Retry = Retry()
    timeout_s: float | None = None
    effect: Effect = Effect.REPEATABLE
    on_unknown: OnUnknown = OnUnknown.ASK
    is_paid: bool = False
    """Paid steps record their attempt before it is issued, so that each repeat is counted."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What one attempt used, and its price when it was made (never computed again)."""

    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    cost_usd: float = 0.0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.input_tokens + other.input_tokens,
            self.output_tokens + other.output_tokens,
            self.cached_tokens + other.cached_tokens,
            self.cost_usd + other.cost_usd,
        )

    def to_json(self) -> dict[str, Json]:
        """Plain JSON, as it stands in the journal."""
        return {
            "input_tokens": self.input_tokens,
            "output_tokens": self.output_tokens,
            "cached_tokens": self.cached_tokens,
            "cost_usd": self.cost_usd,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Json]) -> Usage:
        """The inverse of `to_json`; missing fields are 0."""
        return cls(
            int(data.get("input_tokens", 0)),
            int(data.get("output_tokens", 0)),
            int(data.get("cached_tokens", 0)),
            float(data.get("cost_usd", 0.0)),
        )


@dataclass(frozen=True, slots=True)
class NewRun:
    """Everything that acceptance records. `workflow` and `version` name a registered definition."""

    run_id: str
    workflow: str
    version: str
    digest: str
    priority: int = 0
    queue: str = "default"
    idempotency_key: str | None = None
    parent_run_id: str | None = None
    wake_at: int = 0
    origin: Mapping[str, Json] = field(default_factory=dict)
    """Where the run comes from: fork (run, seq), schedule, parent step. Empty for a fresh one."""
    labels: Mapping[str, str] = field(default_factory=dict)
    input: Json = None


@dataclass(frozen=True, slots=True)
class Run:
    """A row of `runs`: the journal's summary, for lists and claims. The journal is the truth."""

    run_id: str
    workflow: str
    version: str
    digest: str
    state: RunState
    reason: str
    owner: str | None
    epoch: int
    priority: int
    queue: str
    idempotency_key: str | None
    parent_run_id: str | None
    wake_at: int
    inbox_seq: int
    labels: Mapping[str, str]
    created_at: int
    started_at: int | None
    finished_at: int | None


@dataclass(frozen=True, slots=True)
class Message:
    """A row of `inbox`: what somebody else wants of a run (signal, cancel, pause, ...)."""

    run_id: str
    number: int
    kind: str
    name: str
    payload: Json
    sender_key: str | None = None


@dataclass(frozen=True, slots=True)
class Workflow:
    """A registered definition. `definition` is canonical JSON bytes; `digest` is their hash."""

    name: str
    version: str
    digest: str
    definition: bytes
    created_at: int = 0


@dataclass(frozen=True, slots=True)
class Flaw:
    """One thing that `verify` found: where, what, and whether what is left can mend it."""

    run_id: str
    seq: int
    what: str
    is_mendable: bool = True


@dataclass(frozen=True, slots=True)
class Journal:
    """A run's entries in order, checked. `flaws` is empty when every byte fits the chain."""

    run_id: str
    entries: Sequence[Entry]
    flaws: Sequence[Flaw] = ()
