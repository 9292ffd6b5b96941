"""Runs that a restore has held, and what a person may decide about each.

A held run's journal has, hidden by a `rewound` entry, what it did after the point to which the
store was put back (see beyond.py). Two ways on:

- `accept`: it did happen. The hidden results are taken as they are, and the run goes on behind
  them; nothing is asked or paid for again. An attempt whose end nobody knows follows its step's
  policy, as after a crash.
- `rerun`: go on from the restored point; the effects may happen a second time, and are paid for
  a second time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from llm_orchestrator.clock import Clock
from llm_orchestrator.engine.control import RESTORED, is_held_by_restore, read_journal
from llm_orchestrator.engine.forks import free
from llm_orchestrator.engine.machine import Event, Happening, decide
from llm_orchestrator.engine.replay import Fold, fold, hidden
from llm_orchestrator.errors import NotFound, Overtaken
from llm_orchestrator.model import Draft, Entry, Json, Kind, RunState, Usage
from llm_orchestrator.recovery.beyond import HELD, Effect, chain, effects
from llm_orchestrator.store.base import Append, Batch, RunFilter, Store
from llm_orchestrator.store.journal import decode, encode
from llm_orchestrator.store.writer import Head


class Held(NamedTuple):
    """A run that waits for a decision."""

    run_id: str
    workflow: str
    to_seq: int
    """The restored point."""
    why: str
    effects: Sequence[Effect]

    @property
    def usage(self) -> Usage:
        """What doing it again would cost a second time, by what it took the first time."""
        return sum((effect.usage for effect in self.effects), Usage())


async def held_runs(store: Store) -> list[Held]:
    """All of them, oldest first. Raises StoreError."""
    found: list[Held] = []
    before: str | None = None
    while True:
        wanted = RunFilter(states=(RunState.PAUSED,), before=before, limit=200)
        page = await store.look.runs(wanted)
        held = [await _held(store, run.run_id) for run in page if run.reason == HELD]
        found += [one for one in held if one is not None]
        if len(page) < wanted.limit:
            return found[::-1]
        before = page[-1].run_id


async def accept(store: Store, clock: Clock, run_id: str, *, by: str) -> int:
    """Take the hidden results as they are and let the run go on; how many steps were taken.

    Raises NotFound when the run is not held, Overtaken when it moved meanwhile.
    """
    state, entries, rewound = await _read(store, run_id)
    drafts = _adopted(entries, rewound)
    await _go_on(store, clock, state, drafts=drafts, data={"by": by, "reconciled": "accept"})
    return sum(draft.kind != Kind.INTENT for draft in drafts)


async def rerun(store: Store, clock: Clock, run_id: str, *, by: str) -> None:
    """Let it go on from the restored point, also where a step was under way. Raises as `accept`."""
    state, _, _ = await _read(store, run_id)
    again = encode({"choose": "retry", "result": None, "by": by})
    drafts = [Draft(Kind.DECISION, step, 0, again) for step in state.intents]
    await _go_on(store, clock, state, drafts=drafts, data={"by": by, "reconciled": "rerun"})


# -- how ------------------------------------------------------------------------------------------


async def _held(store: Store, run_id: str) -> Held | None:
    try:
        state, entries, rewound = await _read(store, run_id)
    except NotFound:
        return None
    to_seq = int(decode(rewound.payload)["to_seq"])
    begun = frozenset(fold(run_id, entries[:to_seq]).intents)
    done = effects([entry for entry in entries if to_seq < entry.seq < rewound.seq], begun)
    error = state.error or {}
    why = str(error.get("message", ""))
    return Held(run_id, str(state.accepted["workflow"]), to_seq, why, done)


async def _read(store: Store, run_id: str) -> tuple[Fold, Sequence[Entry], Entry]:
    """A held run, its entries, and the one that hides what it did."""
    journal = await read_journal(store, run_id)
    state = fold(run_id, journal.entries)
    if not is_held_by_restore(state):
        raise NotFound(
            f"run {run_id} is not held by a restore; it is {state.state}",
            hint="llmo recovery reconcile list",
        )
    rewound = [entry for entry in journal.entries if entry.kind == Kind.REWOUND][-1]
    return state, journal.entries, rewound


def _adopted(entries: Sequence[Entry], rewound: Entry) -> list[Draft]:
    """The hidden results as new entries, and attempts that have no end."""
    to_seq = int(decode(rewound.payload)["to_seq"])
    known = [entry for entry in entries if entry.seq < rewound.seq]
    gone = hidden([entry for entry in known if not _is_restore(entry)])  # what people took back
    drafts: dict[str, Draft] = {}
    for entry in known:
        if entry.seq <= to_seq or entry.seq in gone:
            continue
        if entry.kind in (Kind.STEP_FINISHED, Kind.STEP_SKIPPED):
            is_free = entry.kind == Kind.STEP_FINISHED
            payload = free(entry.payload) if is_free else entry.payload
            drafts[entry.step] = Draft(entry.kind, entry.step, entry.attempt, payload)
        elif entry.kind == Kind.INTENT:
            drafts[entry.step] = Draft(entry.kind, entry.step, entry.attempt, entry.payload)
        elif entry.kind == Kind.ATTEMPT_FAILED:
            drafts.pop(entry.step, None)
    return list(drafts.values())


def _is_restore(entry: Entry) -> bool:
    """True for a rewind by an earlier restore: what that one hid was never decided, or was done."""
    return entry.kind == Kind.REWOUND and decode(entry.payload).get("reason") == RESTORED


async def _go_on(
    store: Store, clock: Clock, state: Fold, *, drafts: Sequence[Draft], data: dict[str, Json]
) -> None:
    """The adopted entries and the resume: one commit."""
    decision = decide(state.state, state.epoch, Happening(Event.RESUME, data=data))
    head = Head(state.run_id, decision.epoch, seq=state.seq, digest=state.digest)
    entries, changes = chain(head, (), [*drafts, decision.draft], now_us=clock.now_us())
    append = Append(
        state.run_id, head.seq, head.digest, entries, None, decision.change, tuple(changes)
    )
    receipt = await store.commit(Batch(appends=(append,)))
    if state.run_id in receipt.refused:
        raise Overtaken(
            f"run {state.run_id} changed meanwhile", run_id=state.run_id, epoch=state.epoch
        )
