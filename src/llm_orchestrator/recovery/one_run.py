"""One run out of a backup, beside the live ones.

    the live store does not have it   it comes back under its own id, byte for byte
    the live store's own is damaged   it is mended from the backup, row by row (engine/mend.py)
    the live store's own is whole     the backup's comes in as another run, whose origin says so

A run that had not ended then is held (reconcile.py): what it did afterwards, nobody knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum
from typing import NamedTuple

from llm_orchestrator.clock import Clock, new_run_id
from llm_orchestrator.engine.acceptance import accepted_draft, from_accepted
from llm_orchestrator.engine.control import RESTORED
from llm_orchestrator.engine.machine import Event, Happening, decide
from llm_orchestrator.engine.mend import Mender
from llm_orchestrator.engine.replay import Fold, fold
from llm_orchestrator.engine.rows import row_of
from llm_orchestrator.engine.second_copy import StoreCopy
from llm_orchestrator.errors import NotFound, Refused
from llm_orchestrator.model import Draft, Entry, Journal
from llm_orchestrator.recovery.beyond import HELD, chain
from llm_orchestrator.store.base import Append, Batch, Database, Register, StateChange
from llm_orchestrator.store.check import whole
from llm_orchestrator.store.journal import GENESIS
from llm_orchestrator.store.writer import GroupWriter, Head


class How(StrEnum):
    """How a run came back."""

    AS_IT_WAS = "as it was"
    MENDED = "mended"
    AS_ANOTHER = "as another run"


class Brought(NamedTuple):
    """What came of it."""

    run_id: str
    how: How
    is_held: bool
    entries: int


async def bring_back(
    backup: Database, live: Database, run_id: str, *, clock: Clock, name: str
) -> Brought:
    """Take `run_id` out of `backup` (named `name` in messages) into `live`.

    Raises NotFound when the backup does not have it, StoreDamaged when it is damaged there, too.
    """
    known = whole((await backup.look.load([run_id])).get(run_id) or Journal(run_id, ()))
    if not known:
        raise NotFound(f"{name} has no run {run_id}", hint="llmo backup list")
    own = (await live.look.load([run_id])).get(run_id)
    if own is not None and any(flaw.seq for flaw in own.flaws):
        return await _mend(backup, live, own, name=name)
    await _definition(backup, live, fold(run_id, known))
    if own is not None and own.entries:
        known = _renamed(known, new_run_id(clock), name)
        return await _put(live, known, How.AS_ANOTHER, clock=clock, name=name)
    return await _put(live, known, How.AS_IT_WAS, clock=clock, name=name)


async def _mend(backup: Database, live: Database, own: Journal, *, name: str) -> Brought:
    writer = GroupWriter(live, live.clock)
    writer.start()
    try:
        mender = Mender(live, writer, copies=[StoreCopy(name, backup.look)])
        plan = await mender.plan(own)
        mended = await mender.mend(plan)
    finally:
        await writer.close()
    return Brought(own.run_id, How.MENDED, bool(plan.needs_person), len(mended.entries))


async def _definition(backup: Database, live: Database, state: Fold) -> None:
    """What the run runs, if the live store does not have it any more."""
    name, version, digest = (str(state.accepted[key]) for key in ("workflow", "version", "digest"))
    flow = await backup.shelf.workflow(name, version, digest)
    if flow is not None and await live.shelf.workflow(name, version, digest) is None:
        await live.commit(Batch(changes=(Register(flow),)))


def _renamed(known: Sequence[Entry], run_id: str, name: str) -> list[Entry]:
    """The same entries as another run's, chained anew."""
    old = known[0].run_id
    accept = from_accepted(run_id, fold(old, known).accepted)
    origin = {**accept.origin, "restored": {"run": old, "backup": name}}
    accept = replace(accept, origin=origin, idempotency_key=None, parent_run_id=None)
    drafts = [accepted_draft(accept)]
    drafts += [Draft(e.kind, e.step, e.attempt, e.payload) for e in known[1:]]
    entries: list[Entry] = []
    head = Head(run_id)
    for draft, origin_entry in zip(drafts, known, strict=True):
        head.epoch = origin_entry.epoch
        [entry], _ = chain(head, (), [draft], now_us=origin_entry.recorded_at)
        entry = entry._replace(payload=draft.payload)  # blobs are put when it is stored
        entries.append(entry)
        head.seq, head.digest = entry.seq, entry.digest
    return entries


async def _put(
    live: Database, known: Sequence[Entry], how: How, *, clock: Clock, name: str
) -> Brought:
    run_id = known[0].run_id
    state = fold(run_id, known)
    drafts, change = _closing(state, known, live.generation, name=name)
    epoch = max(state.epoch, live.generation << 40) + bool(drafts)
    head = Head(run_id, epoch)
    entries, changes = chain(head, known, drafts, now_us=clock.now_us())
    accept = from_accepted(run_id, state.accepted)
    append = Append(run_id, 0, GENESIS, entries, accept, change, tuple(changes))
    receipt = await live.commit(Batch(appends=(append,)))
    if run_id in receipt.refused:
        raise Refused(
            f"run {run_id} came back by itself meanwhile", hint=f"llmo runs show {run_id}"
        )
    return Brought(run_id, how, bool(drafts), len(known))


def _closing(
    state: Fold, known: Sequence[Entry], generation: int, *, name: str
) -> tuple[list[Draft], StateChange]:
    """Nothing for a run that had ended; else a rewind to where it is, and a pause."""
    if state.state.is_final:
        return [], row_of(state, known).change
    to_seq = known[-1].seq
    epoch = max(state.epoch, generation << 40)
    rewind = decide(state.state, epoch, Happening(Event.REWIND, RESTORED, data={"to_seq": to_seq}))
    error = {"kind": RESTORED, "message": f"it comes from {name}", "to_seq": to_seq}
    pause = decide(rewind.state, rewind.epoch, Happening(Event.PAUSE, HELD, error=error))
    return [rewind.draft, pause.draft], pause.change
