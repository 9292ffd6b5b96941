"""When to stop asking a provider, and how to come back: a pure machine, `now` is handed in.

closed     calls pass. N failures in a row (and half of what has begun since the first of them), or
           too large a share of a window, open it; so does a
           Retry-After, at once, because the provider has said when to come again.
open       nothing passes until `until`. Each opening in a row lasts twice as long as the last one.
half_open  calls come back in waves: 1, then 4, 16, ... The next wave begins when each call of the
           last one has begun to be answered; one failure since it opened opens it again. It closes
           when a wave of `wave_max` has begun and any answer since then was whole: a provider that
           breaks off every answer is not back.

What is counted while closed (`Tally`) belongs to one node and may be lost. The verdict is shared by
all nodes. Times are wall clocks that need not agree: a wait is never longer than the policy allows,
whatever the clock that wrote it said, so a wrong clock costs a request too early or a short delay.
A wave's results carry its number: late answers of an older wave change nothing, and probes that
never answer (their node died) are given up after `wave_s_max`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from enum import StrEnum

from llm_orchestrator.model import Json

_GROWTH = 4


class State(StrEnum):
    """Whether calls pass."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


@dataclass(frozen=True, slots=True)
class BreakerPolicy:
    """When it opens and how it comes back. `failures_max` 0 switches the breaker off."""

    failures_max: int = 5
    share_max: float = 0.5
    window_s: float = 30.0
    window_calls_min: int = 20
    open_s: float = 0.5
    open_s_max: float = 2.0
    retry_after_s_max: float = 600.0
    wave_max: int = 64
    wave_s_max: float = 300.0
    probe_wait_s: float = 0.5


@dataclass(frozen=True, slots=True)
class Tally:
    """What one node has seen while closed.

    A row of failures lasts until a call succeeds that began after its first one: what was under way
    before (long streams) says nothing of now. `row_begun`: calls that have begun since.
    `doubt` is failures less successes since it was 0 last, of calls begun since: a provider that
    breaks off long answers may still give short ones, and those end every row.
    """

    in_a_row: int = 0
    row_since: float = 0.0
    row_begun: int = 0
    doubt: int = 0
    doubt_since: float = 0.0
    calls: int = 0
    failures: int = 0
    since: float = 0.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """What all nodes act on. `wave_id` grows with each wave and each opening (`opened_id`)."""

    state: State = State.CLOSED
    until: float = 0.0
    openings: int = 0
    wave: int = 0
    wave_id: int = 0
    admitted: int = 0
    succeeded: int = 0
    since: float = 0.0
    opened_id: int = 0
    is_proved: bool = False

    def to_json(self) -> Json:
        """Plain JSON for the shared state."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Json) -> Verdict:
        """The inverse; anything unreadable is a closed breaker."""
        if not isinstance(data, Mapping):
            return cls()
        try:
            return cls(**{**data, "state": State(data["state"])})
        except (KeyError, TypeError, ValueError):
            return cls()


@dataclass(frozen=True, slots=True)
class Admission:
    """The answer to "may I call": yes with the wave's id (0: closed), or no with a wait."""

    is_admitted: bool
    wave_id: int = 0
    wait_s: float = 0.0


def begun(tally: Tally) -> Tally:
    """A call begins while closed."""
    return replace(tally, row_begun=tally.row_begun + 1) if tally.in_a_row else tally


def count(
    tally: Tally,
    now: float,
    *,
    is_failure: bool,
    policy: BreakerPolicy,
    began: float | None = None,
) -> tuple[Tally, bool]:
    """Count a call made while closed (it began at `began`; None: just now); True: it must open."""
    if not 0 <= now - tally.since < policy.window_s:
        tally = replace(tally, calls=0, failures=0, since=now)
    tally = replace(tally, calls=tally.calls + 1, failures=tally.failures + is_failure)
    if is_failure and not tally.in_a_row:
        tally = replace(tally, in_a_row=1, row_since=now, row_begun=0)
    elif is_failure:
        tally = replace(tally, in_a_row=tally.in_a_row + 1)
    elif began is None or began >= tally.row_since:
        tally = replace(tally, in_a_row=0)
    tally = _doubt(tally, now, is_failure=is_failure, policy=policy, began=began)
    if not policy.failures_max or not is_failure:
        return tally, False
    is_share = (
        tally.calls >= policy.window_calls_min and tally.failures >= policy.share_max * tally.calls
    )
    is_row = tally.in_a_row >= policy.failures_max and 2 * tally.in_a_row >= tally.row_begun
    return tally, is_share or is_row


def _doubt(
    tally: Tally, now: float, *, is_failure: bool, policy: BreakerPolicy, began: float | None
) -> Tally:
    if is_failure:
        since = tally.doubt_since if tally.doubt else now
        doubt = min(tally.doubt + 1, policy.window_calls_min)
        return replace(tally, doubt=doubt, doubt_since=since)
    if tally.doubt and (began is None or began >= tally.doubt_since):
        return replace(tally, doubt=tally.doubt - 1)
    return tally


def is_doubted(tally: Tally, policy: BreakerPolicy) -> bool:
    """Whether so much fails now that a failure is the provider's, though the breaker is closed."""
    return 0 < policy.failures_max <= tally.doubt


def opened(now: float, policy: BreakerPolicy) -> Tally:
    """What is known once it has opened: closed again, it is doubted until calls succeed."""
    return Tally(doubt=policy.failures_max, doubt_since=now, since=now)


def admit(verdict: Verdict, now: float, policy: BreakerPolicy) -> tuple[Verdict, Admission]:
    """Ask to pass."""
    if verdict.state is State.CLOSED:
        return verdict, Admission(is_admitted=True)
    if verdict.state is State.OPEN:
        longest = max(policy.open_s_max, policy.retry_after_s_max)
        if verdict.until - now > longest:
            verdict = replace(verdict, until=now + longest)
        if now < verdict.until:
            return verdict, Admission(is_admitted=False, wait_s=verdict.until - now)
        return _enter(_begin_wave(verdict, now, 1))
    if not 0 <= now - verdict.since < policy.wave_s_max:
        return _enter(_begin_wave(verdict, now, 1))
    if verdict.admitted < verdict.wave:
        return _enter(verdict)
    return verdict, Admission(is_admitted=False, wait_s=policy.probe_wait_s)


def open_(
    verdict: Verdict, now: float, policy: BreakerPolicy, *, retry_after_s: float | None = None
) -> Verdict:
    """Stop everything, for as long as the provider says or a little longer than the last time."""
    openings = verdict.openings + (verdict.state is not State.OPEN)
    last_s = min(policy.open_s * 2 ** min(openings - 1, 30), policy.open_s_max)
    if retry_after_s is not None:
        last_s = min(retry_after_s, policy.retry_after_s_max)
    until = max(now + last_s, verdict.until if verdict.state is State.OPEN else 0.0)
    wave_id = verdict.wave_id + 1
    return Verdict(State.OPEN, until, openings, wave_id=wave_id, opened_id=wave_id)


def fail(
    verdict: Verdict,
    now: float,
    policy: BreakerPolicy,
    *,
    wave_id: int,
    retry_after_s: float | None = None,
) -> Verdict:
    """A call that had passed failed, while closed (wave 0) or as part of a wave."""
    if verdict.state is State.OPEN:
        told = now + min(retry_after_s or 0.0, policy.retry_after_s_max)
        return replace(verdict, until=told) if told > verdict.until else verdict
    is_news = verdict.state is State.CLOSED or wave_id > verdict.opened_id
    is_told = retry_after_s is not None and policy.failures_max > 0
    if is_told or (verdict.state is State.HALF_OPEN and is_news):
        return open_(verdict, now, policy, retry_after_s=retry_after_s)
    return verdict


def begin(verdict: Verdict, now: float, policy: BreakerPolicy, *, wave_id: int) -> Verdict:
    """A call that had passed begins to be answered."""
    if verdict.state is not State.HALF_OPEN or wave_id != verdict.wave_id:
        return verdict
    succeeded = verdict.succeeded + 1
    if succeeded < verdict.wave:
        return replace(verdict, succeeded=succeeded)
    if verdict.wave >= policy.wave_max and verdict.is_proved:
        return Verdict(wave_id=verdict.wave_id)
    return _begin_wave(verdict, now, min(verdict.wave * _GROWTH, policy.wave_max))


def prove(verdict: Verdict, *, wave_id: int) -> Verdict:
    """An answer was whole."""
    if verdict.state is not State.HALF_OPEN or wave_id <= verdict.opened_id:
        return verdict
    return replace(verdict, is_proved=True)


def succeed(verdict: Verdict, now: float, policy: BreakerPolicy, *, wave_id: int) -> Verdict:
    """A call that had passed was answered, at once and whole."""
    return begin(prove(verdict, wave_id=wave_id), now, policy, wave_id=wave_id)


def release(verdict: Verdict, *, wave_id: int) -> Verdict:
    """A call that had passed was given up without an answer: its place is free again."""
    if verdict.state is State.HALF_OPEN and wave_id == verdict.wave_id:
        return replace(verdict, admitted=max(verdict.admitted - 1, verdict.succeeded))
    return verdict


def _begin_wave(verdict: Verdict, now: float, size: int) -> Verdict:
    return Verdict(
        State.HALF_OPEN,
        openings=verdict.openings,
        wave=size,
        wave_id=verdict.wave_id + 1,
        since=now,
        opened_id=verdict.opened_id,
        is_proved=verdict.is_proved,
    )


def _enter(verdict: Verdict) -> tuple[Verdict, Admission]:
    verdict = replace(verdict, admitted=verdict.admitted + 1)
    return verdict, Admission(is_admitted=True, wave_id=verdict.wave_id)
