"""The one place that decides what state a run is in.

`TRANSITIONS` is the whole machine; anything that is not in it raises. `decide` is pure: it takes
where a run stands, what happened and the time, and returns the entry to append and the columns of
`runs` that change with it. Steps do not pass here: a finished step changes no run state and costs
one row.

    pending ──claim──▶ running ──complete──▶ completed
       ▲                │ │ └────fail──────▶ failed ──retry──▶ pending
       │ resume         │ └──wait──▶ waiting ──claim──▶ running
       └──── paused ◀───┘ pause

Release leads from running back to pending, rewind from everywhere but cancelled; cancel is final.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from llm_orchestrator.errors import Refused, TooLarge
from llm_orchestrator.model import Draft, Json, Kind, RunState
from llm_orchestrator.store.base import StateChange
from llm_orchestrator.store.journal import encode, round_trip


class Event(StrEnum):
    """What can happen to a run as a whole."""

    CLAIM = "claim"
    TAKEOVER = "takeover"
    RELEASE = "release"
    WAIT = "wait"
    COMPLETE = "complete"
    FAIL = "fail"
    PAUSE = "pause"
    RESUME = "resume"
    RETRY = "retry"
    REWIND = "rewind"
    CANCEL = "cancel"


_P, _R, _W = RunState.PENDING, RunState.RUNNING, RunState.WAITING
_PAUSED, _DONE, _FAILED = RunState.PAUSED, RunState.COMPLETED, RunState.FAILED
_CANCELLED = RunState.CANCELLED

TRANSITIONS: dict[RunState, dict[Event, RunState]] = {
    _P: {
        Event.CLAIM: _R,
        Event.PAUSE: _PAUSED,
        Event.CANCEL: _CANCELLED,
        Event.REWIND: _P,
        Event.FAIL: _FAILED,
    },
    _R: {
        Event.TAKEOVER: _R,
        Event.RELEASE: _P,
        Event.WAIT: _W,
        Event.COMPLETE: _DONE,
        Event.FAIL: _FAILED,
        Event.PAUSE: _PAUSED,
        Event.CANCEL: _CANCELLED,
        Event.REWIND: _P,
    },
    _W: {
        Event.CLAIM: _R,
        Event.PAUSE: _PAUSED,
        Event.CANCEL: _CANCELLED,
        Event.REWIND: _P,
        Event.FAIL: _FAILED,
    },
    _PAUSED: {
        Event.RESUME: _P,
        Event.RETRY: _P,
        Event.CANCEL: _CANCELLED,
        Event.REWIND: _P,
        Event.FAIL: _FAILED,
    },
    _DONE: {Event.REWIND: _P},
    _FAILED: {Event.RETRY: _P, Event.REWIND: _P},
    _CANCELLED: {},
}

WAKE_MAX = 1 << 62
"""The latest wake-up that a column holds."""
_TAKES_OWNER = frozenset({Event.CLAIM, Event.TAKEOVER})
_RAISES_EPOCH = frozenset({Event.CLAIM, Event.TAKEOVER, Event.REWIND})


@dataclass(frozen=True, slots=True)
class Happening:
    """An event with what belongs to it. `data` goes into the entry as it is."""

    event: Event
    reason: str = ""
    owner: str | None = None
    wake_at: int = 0
    inbox_seen: int = 0
    output: Json = None
    error: Json = None
    data: Mapping[str, Json] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Decision:
    """What to append and what to set, together or not at all."""

    state: RunState
    epoch: int
    draft: Draft
    change: StateChange
    output: Json = None
    """As recorded: what is live equals what a replay reads."""
    error: Json = None


def decide(state: RunState, epoch: int, happening: Happening) -> Decision:
    """The next state of a run, with the entry that records it. Raises Refused outside the table."""
    event = happening.event
    wake_at = min(happening.wake_at, WAKE_MAX)
    following = TRANSITIONS[state].get(event)
    if following is None:
        raise Refused(f"a run that is {state} takes no {event}", hint="llmo runs explain ID")
    data: dict[str, Json] = dict(happening.data)
    kind = Kind.STATE
    if event in _TAKES_OWNER:
        kind, data["node"] = Kind.CLAIMED, happening.owner
    elif event is Event.REWIND:
        kind = Kind.REWOUND
    else:
        data["state"], data["event"] = following, event
    if happening.reason:
        data["reason"] = happening.reason
    if event is Event.COMPLETE:
        data["output"] = happening.output
    if event is Event.WAIT:
        data["wake_at"] = wake_at
    if happening.error is not None:
        data["error"] = happening.error
    try:
        payload, recorded = round_trip(data)
    except TooLarge as large:
        facts = {"kind": large.kind, "message": f"its output is too large: {large.message}"}
        return decide(state, epoch, Happening(Event.FAIL, "too_large", error=facts))
    output, error = recorded.get("output"), recorded.get("error")
    change = StateChange(
        state=following,
        reason=happening.reason,
        owner=happening.owner if event in _TAKES_OWNER else None,
        wake_at=wake_at,
        inbox_seen=happening.inbox_seen,
        output=column_bytes(output) if event is Event.COMPLETE else None,
        error=None if error is None else column_bytes(error),
    )
    step_up = 1 if event in _RAISES_EPOCH else 0
    draft = Draft(kind, "", 0, payload)
    return Decision(following, epoch + step_up, draft, change, output, error)


def column_bytes(value: Json) -> bytes:
    """A JSON value as a column of `runs` holds it."""
    return encode({"value": value})
