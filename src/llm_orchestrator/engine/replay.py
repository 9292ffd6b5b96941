"""Replay: the state of a run from its journal, without redoing anything.

`fold` is the only reader of entries. Live code never reads back what it just wrote; after a crash,
a wake-up or a move to another node the fold is all there is, so whatever a run needs to go on must
be an entry. A rewind hides the entries between its target and itself (claims and spent money stay;
taken signals come back to be taken again); a repair's `lost` rows are left out before they get
here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from llm_orchestrator.errors import StoreDamaged
from llm_orchestrator.model import Draft, Entry, Json, Kind, RunState, Usage
from llm_orchestrator.store.journal import decode


class Finished(NamedTuple):
    """A finished step, as recorded."""

    result: Json
    seq: int
    attempt: int
    at: int | None
    data: dict[str, Json]


class Failure(NamedTuple):
    """The last failed attempt of a step that has not finished."""

    attempt: int
    error: dict[str, Json]
    is_final: bool
    next_at: int
    seq: int


@dataclass(slots=True)
class Fold:
    """Everything that a run's journal says."""

    run_id: str
    accepted: dict[str, Json] = field(default_factory=dict)
    created_at: int = 0
    state: RunState = RunState.PENDING
    reason: str = ""
    owner: str | None = None
    wake_at: int = 0
    epoch: int = 0
    seq: int = 0
    digest: bytes = b""
    finished: dict[str, Finished] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    failures: dict[str, Failure] = field(default_factory=dict)
    intents: dict[str, int] = field(default_factory=dict)
    """Steps whose attempt was recorded and has no end: the outcome is unknown."""
    intent_data: dict[str, dict[str, Json]] = field(default_factory=dict)
    waits: dict[str, dict[str, Json]] = field(default_factory=dict)
    signals: dict[str, dict[str, Json]] = field(default_factory=dict)
    redeliver: list[dict[str, Json]] = field(default_factory=list)
    decisions: dict[str, dict[str, Json]] = field(default_factory=dict)
    order: dict[tuple[str, int], str] = field(default_factory=dict)
    """Which key a Python workflow asked for at which place of which scope."""
    usage: Usage = field(default_factory=Usage)
    attempts: int = 0
    repeats: int = 0
    """Attempts that were issued again because a crash left their outcome unknown."""
    output: Json = None
    error: Json = None
    rewinds: int = 0
    redone: dict[str, int] = field(default_factory=dict)
    """Steps that a rewind took back, and the seq of the last entry of each that it hid."""
    stay: tuple[int, int] = (0, 0)
    """Epoch and time of the last claim."""
    ends: int = 0
    """How often it has ended: retries and rewinds lead on from there."""
    deaths: int = 0
    """Nodes that died in a row while they drove it, without a step finished in between."""

    def mark(self, step: str) -> str:
        """Tells a step's key from the one that it had before a rewind took it back."""
        return f"@{self.redone[step]}" if step in self.redone else ""


def fold(run_id: str, entries: Sequence[Entry]) -> Fold:
    """Replay `entries` (checked, in order). Raises StoreDamaged when a payload makes no sense."""
    state = Fold(run_id)
    skipped = hidden(entries)
    for entry in entries:
        data = decode(entry.payload)
        try:
            if entry.seq in skipped:
                _apply_hidden(state, entry, data)
            else:
                _APPLY[Kind(entry.kind)](state, entry, data)
        except (KeyError, TypeError, ValueError) as error:
            raise StoreDamaged(
                f"entry {run_id}:{entry.seq} ({entry.kind}) makes no sense: {error!r}",
                run_id=run_id,
                hint=f"llmo journal repair {run_id} --dry-run",
            ) from error
        state.seq, state.digest = entry.seq, entry.digest
        state.epoch = max(state.epoch, entry.epoch)
    return state


def include(state: Fold, head_seq: int, drafts: Sequence[Draft]) -> None:
    """Take in entries that are about to be appended after `head_seq`."""
    for seq, draft in enumerate(drafts, head_seq + 1):
        entry = Entry(state.run_id, seq, state.epoch, *draft, b"", 0)
        _APPLY[Kind(draft.kind)](state, entry, decode(draft.payload))


def checkpoints(entries: Iterable[Entry]) -> list[Entry]:
    """The entries to which a run can be rewound."""
    kinds = (Kind.STEP_FINISHED, Kind.STEP_SKIPPED)
    return [entry for entry in entries if entry.kind in kinds]


def hidden(entries: Sequence[Entry]) -> set[int]:
    """The seqs that rewinds have taken back; a rewind that was itself taken back hides nothing."""
    found: set[int] = set()
    for entry in reversed(entries):
        if entry.kind == Kind.REWOUND and entry.seq not in found:
            target = int(decode(entry.payload).get("to_seq", entry.seq))
            found.update(range(target + 1, entry.seq))
    return found


def _apply_hidden(state: Fold, entry: Entry, data: dict[str, Json]) -> None:
    """A rewind takes back results, not facts: money stays spent, signals can be taken again."""
    _count_usage(state, data)
    if entry.kind == Kind.SIGNAL and "number" in data:
        state.redeliver.append(data)
    if entry.kind == Kind.CLAIMED:
        state.owner, state.stay = data.get("node"), (entry.epoch, entry.recorded_at)
    if entry.kind == Kind.STATE:
        state.ends += RunState(data["state"]).is_final
    if entry.kind in (Kind.INTENT, Kind.ATTEMPT_FAILED, Kind.STEP_FINISHED):
        state.redone[entry.step] = entry.seq


def _count_usage(state: Fold, data: dict[str, Json]) -> None:
    if "usage" in data:
        state.usage = state.usage + Usage.from_json(data["usage"])


def _accepted(state: Fold, entry: Entry, data: dict[str, Json]) -> None:
    state.accepted = data
    state.wake_at = int(data["wake_at"])
    state.created_at = entry.recorded_at


def _claimed(state: Fold, entry: Entry, data: dict[str, Json]) -> None:
    state.state, state.reason, state.wake_at = RunState.RUNNING, "", 0
    state.owner, state.stay = data.get("node"), (entry.epoch, entry.recorded_at)
    state.output = state.error = None
    state.deaths = int(data.get("deaths", 0))


def _intent(state: Fold, entry: Entry, data: dict[str, Json]) -> None:
    if state.intents.get(entry.step) == entry.attempt:
        state.repeats += 1
    state.intents[entry.step] = entry.attempt
    state.intent_data[entry.step] = data
    state.decisions.pop(entry.step, None)
    state.attempts += 1


def _attempt_failed(state: Fold, entry: Entry, data: dict[str, Json]) -> None:
    if entry.step not in state.intents:
        state.attempts += 1
    state.intents.pop(entry.step, None)
    _count_usage(state, data)
    is_final, next_at = bool(data.get("final")), int(data.get("next_at", 0))
    state.failures[entry.step] = Failure(entry.attempt, data["error"], is_final, next_at, entry.seq)
    _place(state, entry, data)


def _step_finished(state: Fold, entry: Entry, data: dict[str, Json]) -> None:
    if entry.step not in state.intents:
        state.attempts += 1
    state.intents.pop(entry.step, None)
    state.failures.pop(entry.step, None)
    state.deaths = 0
    _count_usage(state, data)
    at = data.get("at")
    state.finished[entry.step] = Finished(data["result"], entry.seq, entry.attempt, at, data)
    _place(state, entry, data)


def _step_skipped(state: Fold, entry: Entry, data: dict[str, Json]) -> None:
    state.skipped[entry.step] = str(data.get("reason", ""))


def _waiting(state: Fold, entry: Entry, data: dict[str, Json]) -> None:
    state.waits[entry.step] = data
    _place(state, entry, data)


def _signal(state: Fold, entry: Entry, data: dict[str, Json]) -> None:
    state.signals[entry.step] = data
    state.redeliver = [
        other for other in state.redeliver if other.get("number") != data.get("number")
    ]


def _decision(state: Fold, entry: Entry, data: dict[str, Json]) -> None:
    state.decisions[entry.step] = data


def _state(state: Fold, entry: Entry, data: dict[str, Json]) -> None:
    state.state, state.reason = RunState(data["state"]), str(data.get("reason", ""))
    state.ends += state.state.is_final
    state.owner = None
    state.wake_at = int(data.get("wake_at", 0))
    state.output, state.error = data.get("output"), data.get("error")
    if data.get("event") == "retry":
        state.failures.clear()


def _rewound(state: Fold, entry: Entry, data: dict[str, Json]) -> None:
    state.rewinds += 1
    state.owner = None
    if not data.get("is_repair"):
        state.state, state.reason = RunState.PENDING, str(data.get("reason", ""))
        state.wake_at = 0
        state.output = state.error = None
        state.failures.clear()


def _progress(state: Fold, entry: Entry, data: dict[str, Json]) -> None:
    _count_usage(state, data)
    if "unsent" in data and state.intents.pop(entry.step, None) is not None:
        state.attempts -= 1  # its provider was away, nothing is unknown


def _place(state: Fold, entry: Entry, data: dict[str, Json]) -> None:
    at = data.get("at")
    if at is not None:
        scope = entry.step.rpartition("/")[0]
        state.order[(scope, int(at))] = entry.step


_APPLY = {
    Kind.ACCEPTED: _accepted,
    Kind.CLAIMED: _claimed,
    Kind.INTENT: _intent,
    Kind.ATTEMPT_FAILED: _attempt_failed,
    Kind.STEP_FINISHED: _step_finished,
    Kind.STEP_SKIPPED: _step_skipped,
    Kind.PROGRESS: _progress,
    Kind.WAITING: _waiting,
    Kind.SIGNAL: _signal,
    Kind.DECISION: _decision,
    Kind.STATE: _state,
    Kind.REWOUND: _rewound,
}
