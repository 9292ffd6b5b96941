"""The row of `runs` that a journal stands for, and whether the stored row is that one.

The journal is the truth; the row is its summary, for lists and claims. A row that contradicts its
journal (a flipped bit, a lost page) would let a run sleep for ever, so it is rebuilt. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence

from llm_orchestrator.engine.acceptance import accepted_draft, from_accepted
from llm_orchestrator.engine.machine import column_bytes
from llm_orchestrator.engine.replay import Fold
from llm_orchestrator.errors import StoreDamaged
from llm_orchestrator.model import Entry, Kind, RunState
from llm_orchestrator.store.base import RunRow, StateChange


def row_of(state: Fold, entries: Sequence[Entry]) -> RunRow:
    """The row that `entries` (checked, folded to `state`) say there must be.

    A waiting run is woken: it looks around and parks again, and no message can have been missed.
    """
    started = [entry.recorded_at for entry in entries if entry.kind == Kind.CLAIMED]
    is_final = state.state.is_final
    change = StateChange(
        state=state.state.value,
        reason=state.reason,
        owner=state.owner,
        wake_at=0 if state.state is RunState.WAITING else state.wake_at,
        output=column_bytes(state.output) if state.state is RunState.COMPLETED else None,
        error=None if state.error is None else column_bytes(state.error),
    )
    try:
        accept = from_accepted(state.run_id, state.accepted)
    except KeyError as error:
        raise StoreDamaged(
            f"the first entry of run {state.run_id} lacks {error}", run_id=state.run_id
        ) from error
    return RunRow(
        accept=accept,
        change=change,
        epoch=state.epoch,
        head_seq=state.seq,
        head_digest=state.digest,
        created_at=state.created_at,
        started_at=started[0] if started else None,
        finished_at=entries[-1].recorded_at if is_final else None,
    )


def contradiction(row: RunRow | None, state: Fold, entries: Sequence[Entry]) -> str:
    """What the stored row says that the journal does not; empty when they agree."""
    if row is None:
        return "the row is missing or makes no sense"
    right = row_of(state, entries)
    if accepted_draft(row.accept).payload != accepted_draft(right.accept).payload:
        return "the row was accepted as something else"
    for name in ("state", "reason", "owner", "output", "error"):
        found, wanted = getattr(row.change, name), getattr(right.change, name)
        if found != wanted:
            return f"{name} is {found!r}, the journal says {wanted!r}"[:300]
    if row.change.wake_at not in (0, state.wake_at):
        return f"wake_at is {row.change.wake_at}, the journal says {state.wake_at}"
    if (row.finished_at is not None) != state.state.is_final:
        return f"finished_at is {row.finished_at} in a run that is {state.state}"
    epochs = {entry.seq: entry.epoch for entry in entries}
    if row.head_seq in epochs and row.epoch != epochs[row.head_seq]:
        return f"epoch is {row.epoch}, the journal says {epochs[row.head_seq]}"
    return ""
