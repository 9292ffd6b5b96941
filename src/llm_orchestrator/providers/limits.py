"""Requests and tokens per minute: a token bucket, pure, `now` is handed in.

A bucket holds one minute's worth and fills evenly, as the providers' own do. A request takes one
from the bucket of requests and an estimate from the bucket of tokens; what it really used is
settled afterwards, so a bucket may be in debt. A request larger than the bucket passes when the
bucket is full, else it would wait for ever.

Nodes share the buckets through the store and do not want to ask it at each call: a node takes a
`Slice` (a twentieth of a minute's worth) and spends it alone. A slice that is not spent within its
time is dropped, and a dead node's with it: that errs on the side of the limit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from llm_orchestrator.model import Json

SLICE_S = 3.0
MINUTE_S = 60.0


@dataclass(frozen=True, slots=True)
class Limit:
    """At most so many a minute; 0 means no limit."""

    requests_per_minute: int = 0
    tokens_per_minute: int = 0

    def __bool__(self) -> bool:
        return bool(self.requests_per_minute or self.tokens_per_minute)


@dataclass(frozen=True, slots=True)
class Bucket:
    """What is left, as of `at`."""

    level: float
    at: float


@dataclass(frozen=True, slots=True)
class Buckets:
    """The shared state of one limit."""

    requests: Bucket
    tokens: Bucket

    def to_json(self) -> Json:
        """Plain JSON for the shared state."""
        parts = (self.requests, self.tokens)
        return [[part.level, part.at] for part in parts]

    @classmethod
    def from_json(cls, data: Json, limit: Limit, now: float) -> Buckets:
        """The inverse; nothing or something unreadable is a full bucket."""
        try:
            requests, tokens = (Bucket(float(level), float(at)) for level, at in data)
        except (TypeError, ValueError):
            requests = Bucket(limit.requests_per_minute, now)
            tokens = Bucket(limit.tokens_per_minute, now)
        return cls(requests, tokens)


@dataclass(frozen=True, slots=True)
class Slice:
    """What a node may spend without asking. Tokens below 0 are owed."""

    requests: float = 0.0
    tokens: float = 0.0
    until: float = 0.0


def refill(bucket: Bucket, now: float, per_minute: float) -> Bucket:
    """Add what has flowed in. A clock that went back starts anew and adds nothing."""
    gone = max(now - bucket.at, 0.0)
    return Bucket(min(bucket.level + gone * per_minute / MINUTE_S, per_minute), now)


def spend(part: Slice, now: float, *, tokens: float, limit: Limit) -> Slice | None:
    """Pay one request from a slice; None when it does not suffice."""
    has_requests = not limit.requests_per_minute or part.requests >= 1
    has_tokens = not limit.tokens_per_minute or part.tokens >= tokens
    if now >= part.until or not has_requests or not has_tokens:
        return None
    return replace(part, requests=part.requests - 1, tokens=part.tokens - tokens)


def cut_slice(
    shared: Buckets, part: Slice, now: float, *, tokens: float, limit: Limit
) -> tuple[Buckets, Slice | None, float]:
    """Take what `part` lacks for one request of `tokens`, or a slice if that is more.

    Returns the shared state, what was taken (None: not now) and the seconds to wait for it.
    """
    requests = refill(shared.requests, now, limit.requests_per_minute)
    pool = refill(shared.tokens, now, limit.tokens_per_minute)
    had, left = _still_valid(part, now)
    more = _share(requests, 1 - had, limit.requests_per_minute)
    much = _share(pool, tokens - left, limit.tokens_per_minute)
    if more is None or much is None:
        wait = max(
            _wait(requests, 1 - had, limit.requests_per_minute),
            _wait(pool, tokens - left, limit.tokens_per_minute),
        )
        return shared, None, wait
    rest = Buckets(
        replace(requests, level=requests.level - more), replace(pool, level=pool.level - much)
    )
    return rest, Slice(more, much, now + SLICE_S), 0.0


def join(part: Slice, taken: Slice, now: float) -> Slice:
    """Add what was taken to what is left; a slice whose time is over leaves only its debt."""
    had, left = _still_valid(part, now)
    return Slice(had + taken.requests, left + taken.tokens, taken.until)


def _still_valid(part: Slice, now: float) -> tuple[float, float]:
    if now < part.until:
        return part.requests, part.tokens
    return 0.0, min(part.tokens, 0.0)


def _wait(bucket: Bucket, need: float, per_minute: float) -> float:
    if not per_minute or need <= 0:
        return 0.0
    missing = min(need, per_minute) - bucket.level
    return 0.0 if missing <= 1e-9 else missing * MINUTE_S / per_minute


def _share(bucket: Bucket, need: float, per_minute: float) -> float | None:
    """How much a node takes at once: what it needs, or a slice; None when that is not there."""
    if not per_minute or need <= 0:
        return 0.0
    if _wait(bucket, need, per_minute) > 0:
        return None
    return max(need, min(per_minute * SLICE_S / MINUTE_S, bucket.level))


def settle(part: Slice, *, estimated: float, used: float) -> Slice:
    """Correct a slice by what a request really used."""
    return replace(part, tokens=part.tokens + estimated - used)


def limit_for(limits: Mapping[str, Limit], provider: str, model: str) -> tuple[str, Limit] | None:
    """The limit of `provider/model`, else of the whole provider, with its name."""
    for name in (f"{provider}/{model}", provider):
        if limits.get(name):
            return name, limits[name]
    return None
