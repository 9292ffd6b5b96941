"""What happened after the point to which a store is put back, and what becomes of it (law 10).

Restoring rewinds runs, never facts. What is known to lie beyond the point (from the live store if
it can be read, else from the stream archive) is carried into the restored store before it opens:

- the entries of each run, byte for byte, and behind them a `rewound` entry that hides them: the
  journal says what was taken back, and money that was spent stays spent;
- a run whose hidden entries hold an attempt that was paid for, or an effect that must not happen
  twice, is held: `paused`, reason `unknown_outcome`, until somebody says what to do (reconcile.py).
  Every other run goes on from the restored point;
- idempotency keys, schedules' fired times, outbox records, the audit log: as they were last.

Pure, but for reading journals; nothing here writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from llm_orchestrator.engine.acceptance import KEY_RECORD, from_accepted
from llm_orchestrator.engine.attempt import OUTBOX
from llm_orchestrator.engine.control import RESTORED
from llm_orchestrator.engine.machine import Decision, Event, Happening, decide
from llm_orchestrator.engine.replay import Fold, fold
from llm_orchestrator.engine.schedule import KIND as SCHEDULE
from llm_orchestrator.engine.second_copy import as_stored
from llm_orchestrator.model import Draft, Entry, Kind, RunState, Usage
from llm_orchestrator.recovery.create import BACKUP
from llm_orchestrator.store.base import Append, Change, Consume, PutBlob, StateChange
from llm_orchestrator.store.journal import (
    BLOB_BYTES_MIN,
    GENESIS,
    blob_reference,
    decode,
    link,
)
from llm_orchestrator.store.spool import ANCESTOR
from llm_orchestrator.store.writer import Head

HELD = "unknown_outcome"
NEVER_BACK = (KEY_RECORD, SCHEDULE, OUTBOX, BACKUP, ANCESTOR)
"""Kinds of records that a restore carries over as they were last."""


class Effect(NamedTuple):
    """Something that a hidden entry says was done, or may have been."""

    seq: int
    step: str
    attempt: int
    is_done: bool
    """False: begun, and nothing says how it ended."""
    usage: Usage


@dataclass(frozen=True, slots=True)
class Tail:
    """A run's entries beyond the point; `at` is its head there (0 for one that was not there)."""

    run_id: str
    at: int
    digest: bytes
    entries: tuple[Entry, ...]
    """With their payloads, as `Look.load` gives them."""
    begun: frozenset[str] = frozenset()
    """Steps whose attempt was under way at the point."""

    @property
    def effects(self) -> list[Effect]:
        """Paid attempts and effects that must not happen twice."""
        return effects(self.entries, self.begun)


def effects(entries: Iterable[Entry], begun: frozenset[str] = frozenset()) -> list[Effect]:
    """What `entries` say was done. A step that costs, or must not be doubled, has an intent."""
    found: list[Effect] = []
    under_way: dict[str, Entry | None] = dict.fromkeys(begun)
    for entry in entries:
        if entry.kind == Kind.INTENT:
            under_way[entry.step] = entry
        elif entry.kind in (Kind.STEP_FINISHED, Kind.ATTEMPT_FAILED):
            usage = Usage.from_json(decode(entry.payload).get("usage", {}))
            is_known = entry.step in under_way
            under_way.pop(entry.step, None)
            if is_known or usage != Usage():
                found.append(Effect(entry.seq, entry.step, entry.attempt, True, usage))
    open_ones = [last for last in under_way.values() if last is not None]
    found += [Effect(one.seq, one.step, one.attempt, False, Usage()) for one in open_ones]
    return found


def tail_of(restored: Sequence[Entry], known: Sequence[Entry], run_id: str) -> Tail | None:
    """What `known` has beyond `restored`; None when there is nothing, or they are two stories.

    Both are checked journals, so the digest at the restored head vouches for all before it.
    """
    at, digest = (restored[-1].seq, restored[-1].digest) if restored else (0, GENESIS)
    there = {entry.seq: entry for entry in known}
    if at and (at not in there or there[at].digest != digest):
        return None
    beyond = tuple(entry for entry in known if entry.seq > at)
    if not beyond:
        return None
    begun = frozenset(fold(run_id, restored).intents) if restored else frozenset[str]()
    return Tail(run_id, at, digest, beyond, begun)


class Carried(NamedTuple):
    """What puts a tail into the restored store."""

    append: Append
    is_held: bool


def carry(
    tail: Tail,
    restored: Sequence[Entry],
    *,
    generation: int,
    now_us: int,
    why: str,
    is_held: bool = False,
) -> Carried:
    """The tail, hidden; the run held if it must be, or if `is_held` says so.

    A run that was cancelled beyond the point stays cancelled: that was somebody's will.
    """
    state = fold(tail.run_id, [*restored, *tail.entries])
    epoch = max(state.epoch, generation << 40)
    decisions = _closing(tail, restored, state, epoch=epoch, why=why, is_held=is_held)
    drafts = [decision.draft for decision in decisions]
    last = decisions[-1] if decisions else None
    head = Head(tail.run_id, last.epoch if last else epoch, seq=tail.at, digest=tail.digest)
    entries, changes = chain(head, tail.entries, drafts, now_us=now_us)
    taken = tuple(_taken(tail.entries))
    if taken:
        changes.append(Consume(tail.run_id, taken))  # the hidden entries deliver them again
    accept = None if restored else from_accepted(tail.run_id, state.accepted)
    change = last.change if last else StateChange(RunState.CANCELLED, state.reason)
    append = Append(tail.run_id, tail.at, tail.digest, entries, accept, change, tuple(changes))
    return Carried(append, len(decisions) > 1)


def _closing(
    tail: Tail, restored: Sequence[Entry], state: Fold, *, epoch: int, why: str, is_held: bool
) -> list[Decision]:
    """What ends the tail: nothing, a rewind, or a rewind and a pause."""
    if state.state is RunState.CANCELLED:
        return []
    to_seq = max(tail.at, 1)
    rewind = decide(state.state, epoch, Happening(Event.REWIND, RESTORED, data={"to_seq": to_seq}))
    before = fold(tail.run_id, restored).state if restored else RunState.PENDING
    stood = (RunState.PAUSED, RunState.FAILED)
    is_quiet = not tail.effects and before not in stood and state.state is not RunState.PAUSED
    if is_quiet and not is_held:
        return [rewind]
    error = {"kind": RESTORED, "message": why, "to_seq": to_seq}
    held = Happening(Event.PAUSE, HELD, error=error)
    return [rewind, decide(rewind.state, rewind.epoch, held)]


def chain(
    head: Head, known: Sequence[Entry], drafts: Sequence[Draft], *, now_us: int
) -> tuple[list[Entry], list[Change]]:
    """`known` as they were and `drafts` behind them, with the blobs that they need."""
    entries: list[Entry] = []
    changes: list[Change] = []

    def stored(payload: bytes) -> bytes:
        if len(payload) <= BLOB_BYTES_MIN:
            return payload
        reference = blob_reference(payload)
        changes.append(PutBlob(head.run_id, reference[1:], payload))
        return reference

    seq, digest = head.seq, head.digest
    for entry in known:
        stored_entry, blobs = as_stored(entry, digest)
        entries.append(stored_entry)
        changes.extend(blobs)
        seq, digest = entry.seq, entry.digest
    for draft in drafts:
        seq += 1
        columns = (seq, head.epoch, draft.kind, draft.step, draft.attempt, stored(draft.payload))
        digest = link(digest, head.run_id, columns)
        entries.append(Entry(head.run_id, *columns, digest, now_us))
    return entries, changes


def _taken(entries: Iterable[Entry]) -> Iterator[int]:
    """Numbers of messages that the hidden entries took out of the inbox."""
    for entry in entries:
        if entry.kind == Kind.SIGNAL:
            number = decode(entry.payload).get("number")
            if isinstance(number, int):
                yield number
