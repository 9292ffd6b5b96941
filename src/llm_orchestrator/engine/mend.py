"""Damage (P6): what is lost, what still stands, and what a run may do about it.

`verify` names the rows that do not fit the chain. From them, in this order:

1. a stored digest that flipped while the entry is whole: put the digest right;
2. entry 1, which the row of `runs` repeats: rebuild it, and believe it only if the chain's own digest
   says that it is byte for byte the same;
3. everything else is given up by a `rewound` entry that lists the lost rows. Steps whose own entry is
   lost run again; all others stand.

A row that may have been the record of an effect that must not be doubled (its kind is `intent`, or
cannot be read) pauses the run for a person: reason `damaged`. Nothing is deleted.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from llm_orchestrator.engine.acceptance import accepted_draft
from llm_orchestrator.engine.machine import Event, Happening, decide
from llm_orchestrator.engine.replay import Fold, fold
from llm_orchestrator.errors import StoreDamaged, TooLarge
from llm_orchestrator.model import Draft, Entry, Flaw, Journal, Json, Kind, NewRun, RunState
from llm_orchestrator.store import journal as chains
from llm_orchestrator.store.base import Batch, Mend, Store
from llm_orchestrator.store.journal import encode
from llm_orchestrator.store.writer import GroupWriter, Head

logger = logging.getLogger(__name__)
_HARMLESS = frozenset(
    {
        Kind.CLAIMED,
        Kind.WAITING,
        Kind.STATE,
        Kind.PROGRESS,
        Kind.STEP_FINISHED,
        Kind.STEP_SKIPPED,
        Kind.ATTEMPT_FAILED,
    }
)


@dataclass(frozen=True, slots=True)
class Plan:
    """How a damaged run is mended. `needs_person` says why somebody must decide, or is empty."""

    run_id: str
    flaws: tuple[Flaw, ...]
    mend: Mend | None
    lost: tuple[tuple[int, bytes], ...]
    lost_steps: tuple[str, ...]
    needs_person: str = ""

    def summary(self) -> str:
        """One line for the log and the command line."""
        parts = [f"entry {flaw.seq}: {flaw.what}" for flaw in self.flaws[:5]]
        if self.lost_steps:
            parts.append(f"steps that run again: {', '.join(self.lost_steps)}")
        if self.needs_person:
            parts.append(f"paused: {self.needs_person}")
        return "; ".join(parts)

    def drafts(self) -> tuple[Draft, ...]:
        """The entries that record the repair."""
        if not self.lost:
            return ()
        data: dict[str, Json] = {
            "is_repair": True,
            "lost": [[seq, digest.hex()] for seq, digest in self.lost],
            "steps": list(self.lost_steps),
            "why": [f"{flaw.seq}: {flaw.what}" for flaw in self.flaws][:100],
        }
        return (Draft(Kind.REWOUND, "", 0, encode(data)),)


def plan(journal: Journal, stored: list[Entry], accept: NewRun | None) -> Plan:
    """What to do about `journal.flaws`. `accept` is what the row of `runs` says of acceptance.

    Raises StoreDamaged when not even entry 1 can be had: then nothing says what the run is.
    """
    run_id = journal.run_id
    rows = {entry.seq: entry for entry in stored}
    digests, payloads, lost = [], [], []
    for flaw in journal.flaws:
        row = rows.get(flaw.seq)
        if flaw.is_mendable and row is not None:
            previous = rows[flaw.seq - 1].digest if flaw.seq > 1 else chains.GENESIS
            digests.append((flaw.seq, chains.chain(previous, row)))
        elif flaw.seq == 1 and row is not None and accept is not None:
            payload = _rebuild(row, accept)
            if payload is None:
                raise _hopeless(run_id)
            payloads.append((1, payload))
        elif flaw.seq == 1:
            raise _hopeless(run_id)
        else:
            lost.append((flaw.seq, row.digest if row is not None else b""))
    seqs = [seq for seq, _ in lost]
    unclear = [seq for seq in seqs if seq not in rows or rows[seq].kind not in _HARMLESS]
    steps = tuple(sorted({rows[seq].step for seq in seqs if seq in rows and rows[seq].step}))
    why = ""
    if unclear:
        numbers = ", ".join(str(seq) for seq in unclear)
        why = f"entry {numbers} is lost and may have recorded an effect or a message"
    mend = Mend(run_id, tuple(digests), tuple(payloads)) if digests or payloads else None
    return Plan(run_id, tuple(journal.flaws), mend, tuple(lost), steps, why)


def _rebuild(row: Entry, accept: NewRun) -> bytes | None:
    """Entry 1's payload from the row of `runs`, if the chain proves that it is the same."""
    try:
        payload = accepted_draft(accept).payload
    except TooLarge:
        return None
    if len(payload) > chains.BLOB_BYTES_MIN:
        return None
    rebuilt = row._replace(payload=payload)
    return payload if chains.chain(chains.GENESIS, rebuilt) == row.digest else None


def _hopeless(run_id: str) -> StoreDamaged:
    return StoreDamaged(
        f"run {run_id} cannot be mended from this store: its first entry is damaged and no copy fits",
        run_id=run_id,
        hint="restore it from a backup, or start it again",
    )


class Mender:
    """Carries out plans. Every repair is an entry, or a byte that the chain itself proves right."""

    def __init__(self, store: Store, writer: GroupWriter) -> None:
        self._store = store
        self._writer = writer

    async def plan(self, journal: Journal) -> Plan:
        """What would be done about a damaged run."""
        stored = await self._store.look.stored(journal.run_id)
        return plan(journal, stored, await self._store.look.acceptance(journal.run_id))

    async def whole(self, journal: Journal) -> tuple[Fold, Head]:
        """A fold that may be trusted and the head to append to; mends on the way if it must.

        A run that needs a person is paused with reason `damaged`; its fold says so.
        Raises StoreDamaged when nothing says what the run is.
        """
        if journal.flaws:
            journal = await self.mend(await self.plan(journal))
        last = journal.entries[-1]
        state = fold(journal.run_id, journal.entries)
        return state, Head(journal.run_id, state.epoch, last.seq, last.digest)

    async def mend(self, plan: Plan) -> Journal:
        """Do it, and read the run again. Raises StoreDamaged when it still does not fit."""
        run_id = plan.run_id
        logger.error("run %s is damaged: %s", run_id, plan.summary())
        if plan.mend is not None:
            await self._store.commit(Batch(changes=(plan.mend,)))
        if plan.lost:
            stored = await self._store.look.stored(run_id)
            last = stored[-1]
            head = Head(run_id, last.epoch, last.seq, last.digest)
            await self._writer.append(head, plan.drafts())
            if plan.needs_person:
                await self._pause(head, plan)
        journal = (await self._store.look.load([run_id]))[run_id]
        if journal.flaws:
            raise StoreDamaged(
                f"run {run_id} is still damaged after its repair: {journal.flaws[0].what}",
                run_id=run_id,
            )
        return journal

    async def _pause(self, head: Head, plan: Plan) -> None:
        state = fold(plan.run_id, (await self._store.look.load([plan.run_id]))[plan.run_id].entries)
        if state.state.is_final or state.state is RunState.PAUSED:
            return
        error = {"kind": "damaged", "message": plan.needs_person}
        happening = Happening(Event.PAUSE, reason="damaged", error=error)
        decision = decide(state.state, state.epoch, happening)
        head.epoch = decision.epoch
        await self._writer.append(head, (decision.draft,), change=decision.change)
