"""Damage (P6): what is lost, what still stands, and what a run may do about it.

`verify` names the rows that do not fit the chain. From them, in this order:

1. a stored digest that flipped while the entry is whole: put the digest right;
2. an entry that the row of `runs` repeats (the first: how it was accepted; the last: how it
   ended): rebuild it, and believe it only if the chain's own digests say that it is the same, byte
   for byte;
3. what a second copy has (the stream archive, a replica, a backup) in that place, if it tells the
   same story: put it back (second_copy.py); where the end is lost, also what it has behind it;
4. everything else is given up by a `rewound` entry that lists the lost rows. Steps whose own entry
   is lost run again; all others stand.

A row that may have been the record of an effect that must not be doubled, or of somebody's will
(its kind is `intent`, `signal`, `decision`, or cannot be read), pauses the run for a person: reason
`damaged`, in the same commit. Nothing is deleted. At the end the row of `runs` says what the
journal says.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from llm_orchestrator.engine.acceptance import accepted_draft
from llm_orchestrator.engine.machine import Event, Happening, decide
from llm_orchestrator.engine.replay import Fold, fold
from llm_orchestrator.engine.rows import contradiction, row_of
from llm_orchestrator.engine.second_copy import Found, SecondCopy, ask
from llm_orchestrator.errors import Refused, StoreDamaged, TooLarge
from llm_orchestrator.model import Draft, Entry, Flaw, Journal, Json, Kind, RunState
from llm_orchestrator.store import journal as chains
from llm_orchestrator.store.base import Append, Batch, Mend, PutBlob, Reindex, RunRow, Store
from llm_orchestrator.store.check import INDEX_DAMAGED, within_reach
from llm_orchestrator.store.journal import encode
from llm_orchestrator.store.writer import GroupWriter, Head
from llm_orchestrator.telemetry.metrics import Metrics

logger = logging.getLogger(__name__)
_HARMLESS = frozenset(
    {
        Kind.CLAIMED,
        Kind.WAITING,
        Kind.PROGRESS,
        Kind.STEP_FINISHED,
        Kind.STEP_SKIPPED,
        Kind.ATTEMPT_FAILED,
    }
)
_MOVING = frozenset({RunState.PENDING, RunState.RUNNING, RunState.WAITING, RunState.COMPLETED})
"""States that the run finds again by itself when their entry is lost."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How a damaged run is mended. `needs_person` says why somebody must decide, or is empty."""

    run_id: str
    flaws: tuple[Flaw, ...]
    entries: tuple[Entry, ...]
    """Rows to put back as they were."""
    blobs: tuple[PutBlob, ...]
    lost: tuple[tuple[int, bytes], ...]
    lost_steps: tuple[str, ...]
    needs_person: str = ""
    found: tuple[Found, ...] = ()
    """What second copies had."""
    behind: tuple[Found, ...] = ()
    """Of these, what belongs behind everything that the store knows of: it is appended."""

    def summary(self) -> str:
        """One line for the log and the command line."""
        parts = [f"entry {flaw.seq}: {flaw.what}" for flaw in self.flaws[:5]]
        if self.entries:
            parts.append(f"put back as they were: {', '.join(str(e.seq) for e in self.entries)}")
        for where in sorted({each.where for each in self.found}):
            seqs = [str(each.entry.seq) for each in self.found if each.where == where]
            parts.append(f"from {where}: {', '.join(seqs)}")
        if self.lost_steps:
            parts.append(f"steps that run again: {', '.join(self.lost_steps)}")
        if self.needs_person:
            parts.append(f"paused: {self.needs_person}")
        return "; ".join(parts)

    def draft(self) -> Draft:
        """The entry that gives up what is lost."""
        data: dict[str, Json] = {
            "is_repair": True,
            "lost": [[seq, digest.hex()] for seq, digest in self.lost],
            "steps": list(self.lost_steps),
            "why": [f"{flaw.seq}: {flaw.what}" for flaw in self.flaws][:100],
        }
        return Draft(Kind.REWOUND, "", 0, encode(data))


def plan(
    journal: Journal,
    stored: Sequence[Entry],
    row: RunRow | None,
    *,
    found: Mapping[int, Found] | None = None,
) -> Plan:
    """What to do about `journal.flaws`; `row` is what the row of `runs` says.

    `found` is what second copies have in the flawed places.

    Raises StoreDamaged when not even entry 1 can be had: then nothing says what the run is.
    """
    run_id = journal.run_id
    rows = {entry.seq: entry for entry in within_reach(stored)}
    entries: dict[int, Entry] = {}
    blobs: list[PutBlob] = []
    lost: dict[int, bytes] = {}
    used: list[Found] = []
    copies = found or {}
    for flaw in journal.flaws:
        seq = flaw.seq
        if seq == 0 or seq in entries:
            continue
        whole = _rebuilt(flaw, {**rows, **entries}, row)
        copy = copies.get(seq)
        if whole is not None:
            entries[seq] = whole.entry
            blobs += whole.blobs
        elif copy is not None:
            entries[seq] = copy.entry
            blobs += copy.blobs
            used.append(copy)
        elif seq == 1:
            raise StoreDamaged(
                f"run {run_id} cannot be mended from this store: its first entry is damaged and "
                "no copy fits",
                run_id=run_id,
                hint="restore it from a backup, or start it again",
            )
        else:
            lost[seq] = rows[seq].digest if seq in rows else b""
    end = max([*rows, *entries, *lost], default=0)
    behind = () if lost else tuple(copies[seq] for seq in sorted(copies) if seq > end)
    redone = (Kind.STEP_FINISHED, Kind.STEP_SKIPPED)
    steps = {rows[seq].step for seq in lost if seq in rows and rows[seq].kind in redone}
    return Plan(
        run_id,
        tuple(journal.flaws),
        tuple(entries.values()),
        tuple(blobs),
        tuple(lost.items()),
        tuple(sorted(steps)),
        _doubt(lost, rows, row),
        (*used, *behind),
        behind,
    )


def _doubt(lost: Mapping[int, bytes], rows: Mapping[int, Entry], row: RunRow | None) -> str:
    """Why a person must look at what is lost; empty when the run can go on by itself."""
    for seq in lost:
        kind = rows[seq].kind if seq in rows else ""
        if kind in _HARMLESS:
            continue
        if kind == Kind.STATE and not _was_will(seq, rows, row):
            continue
        what = f"of kind {kind} " if kind in set(Kind) else ""
        return f"entry {seq} {what}is lost: it may have recorded an effect, a message or a decision"
    return ""


def _was_will(seq: int, rows: Mapping[int, Entry], row: RunRow | None) -> bool:
    """True when a lost `state` entry may have been a pause, a cancel, a failure or a retry."""
    if row is not None and row.head_seq == seq:
        return row.change.state not in _MOVING
    return any(other.kind == Kind.ATTEMPT_FAILED for other in rows.values() if other.seq < seq)


class _Candidate(NamedTuple):
    """What an entry may have been. Its digest is yet to be found."""

    entry: Entry
    blobs: tuple[PutBlob, ...] = ()


def _rebuilt(flaw: Flaw, rows: Mapping[int, Entry], row: RunRow | None) -> _Candidate | None:
    """The entry as it was, if one of its possible forms fits the chain around it."""
    seq = flaw.seq
    previous = chains.GENESIS if seq == 1 else rows[seq - 1].digest if seq - 1 in rows else b""
    if not previous:
        return None
    stored, follower = rows.get(seq), rows.get(seq + 1)
    for candidate in _candidates(flaw, rows, row):
        digest = chains.chain_or_none(previous, candidate.entry)
        if digest is None:
            continue
        is_proved = stored is not None and digest == stored.digest
        if follower is not None:
            is_proved = is_proved or chains.chain_or_none(digest, follower) == follower.digest
        if row is not None and row.head_seq == seq:
            is_proved = is_proved or digest == row.head_digest
        if is_proved:
            return candidate._replace(entry=candidate.entry._replace(digest=digest))
    return None


def _candidates(flaw: Flaw, rows: Mapping[int, Entry], row: RunRow | None) -> Iterator[_Candidate]:
    """What a damaged entry may have been before."""
    seq = flaw.seq
    stored = rows.get(seq)
    if stored is not None and flaw.is_mendable:
        yield _Candidate(stored)
    if row is None:
        return
    drafts: list[Draft] = []
    with contextlib.suppress(Refused, StoreDamaged, TooLarge, AttributeError, TypeError):
        if seq == 1:
            drafts.append(accepted_draft(row.accept))
        if seq == row.head_seq:
            drafts += _closings(row)
    near = [rows[other] for other in (seq, seq - 1, seq + 1) if other in rows]
    epochs = {entry.epoch for entry in near} | {row.epoch, _first_epoch(row.epoch)}
    for draft in drafts:
        blobs: tuple[PutBlob, ...] = ()
        if len(draft.payload) > chains.BLOB_BYTES_MIN:
            reference = chains.blob_reference(draft.payload)
            blobs = (PutBlob(row.accept.run_id, reference[1:], draft.payload),)
            draft = draft._replace(payload=reference)
        for epoch in sorted(epochs):
            at = stored.recorded_at if stored is not None else row.created_at
            yield _Candidate(Entry(row.accept.run_id, seq, epoch, *draft, b"", at), blobs)


def _first_epoch(epoch: int) -> int:
    return epoch >> 40 << 40


def _closings(row: RunRow) -> Iterator[Draft]:
    """The entries that may have led to the state that the row is in."""
    output, error = _value(row.change.output), _value(row.change.error)
    for event in (Event.COMPLETE, Event.FAIL, Event.PAUSE):
        happening = Happening(event, row.change.reason, output=output, error=error)
        decision = decide(RunState.RUNNING, row.epoch, happening)
        if decision.state == row.change.state:
            yield decision.draft


def _value(column: bytes | None) -> Json:
    return None if column is None else chains.decode(column).get("value")


class Mender:
    """Carries out plans. Every repair is an entry, or a byte that the chain itself proves right."""

    def __init__(
        self,
        store: Store,
        writer: GroupWriter,
        *,
        metrics: Metrics | None = None,
        copies: Sequence[SecondCopy] = (),
    ) -> None:
        self._store = store
        self._writer = writer
        self.metrics = metrics or Metrics()
        self._copies = copies

    async def plan(self, journal: Journal) -> Plan:
        """What would be done about a damaged run. Second copies are asked only if they must be."""
        stored = await self._store.look.stored(journal.run_id)
        row = await self._store.look.row(journal.run_id)
        wanted = [flaw.seq for flaw in journal.flaws if flaw.seq]
        if not self._copies:
            return plan(journal, stored, row)
        with contextlib.suppress(StoreDamaged):
            alone = plan(journal, stored, row)
            if not alone.lost:
                return alone
        found = await ask(self._copies, journal, wanted)
        # what lies behind may be what a restore has taken back: then it is of an older generation
        found = {
            seq: each
            for seq, each in found.items()
            if seq in wanted or each.entry.epoch >> 40 == self._store.generation
        }
        return plan(journal, stored, row, found=found)

    async def whole(self, journal: Journal) -> tuple[Fold, Head]:
        """A fold that may be trusted and the head to append to; mends on the way if it must.

        A run that needs a person is paused with reason `damaged`; its fold says so.
        Raises StoreDamaged when nothing says what the run is.
        """
        if any(flaw.what == INDEX_DAMAGED for flaw in journal.flaws):
            logger.error("run %s: %s; it is made anew", journal.run_id, INDEX_DAMAGED)
            await self._store.commit(Batch(changes=(Reindex(),)))
            journal = await self._load(journal.run_id)
        if journal.flaws:
            journal = await self.mend(await self.plan(journal))
        last = journal.entries[-1]
        state = fold(journal.run_id, journal.entries)
        return state, Head(journal.run_id, state.epoch, seq=last.seq, digest=last.digest)

    async def mend(self, plan: Plan) -> Journal:
        """Do it, and read the run again. Raises StoreDamaged when it still does not fit."""
        run_id = plan.run_id
        logger.error("run %s is damaged: %s", run_id, plan.summary())
        damaged = len({flaw.seq for flaw in plan.flaws})
        self.metrics.count("journal_damaged_total", amount=damaged)
        if plan.entries:
            await self._store.commit(Batch(changes=(*plan.blobs, Mend(run_id, plan.entries))))
        if plan.behind:
            await self._append(run_id, plan.behind)
        if plan.lost:
            await self._give_up(plan)
        await self.set_row(run_id)
        journal = await self._load(run_id)
        if journal.flaws:
            raise StoreDamaged(
                f"run {run_id} is still damaged after its repair: {journal.flaws[0].what}",
                run_id=run_id,
            )
        self.metrics.count("journal_mended_total", amount=damaged)
        return journal

    async def _append(self, run_id: str, behind: Sequence[Found]) -> None:
        """As every append: nothing when another one has gone on from there meanwhile."""
        entries = [each.entry for each in behind]
        blobs = [blob for each in behind for blob in each.blobs]
        for last in (await self._load(run_id)).entries:
            if last.seq == entries[0].seq - 1:
                append = Append(run_id, last.seq, last.digest, entries, changes=blobs)
                await self._store.commit(Batch([append]))

    async def _give_up(self, plan: Plan) -> None:
        """One commit: the lost rows are named, and the run is free to go on, or paused."""
        state = fold(plan.run_id, (await self._load(plan.run_id)).entries)
        last = within_reach(await self._store.look.stored(plan.run_id))[-1]
        drafts, change = [plan.draft()], None
        happening = None
        if plan.needs_person and state.state not in (RunState.PAUSED, RunState.CANCELLED):
            error = {"kind": "damaged", "message": plan.needs_person}
            happening = Happening(Event.PAUSE, "damaged", error=error)
        elif state.state is RunState.RUNNING:
            happening = Happening(Event.RELEASE, "repaired")
        if happening is not None and not state.state.is_final:
            decision = decide(state.state, state.epoch, happening)
            drafts.append(decision.draft)
            change = decision.change
        head = Head(plan.run_id, state.epoch, seq=last.seq, digest=last.digest)
        await self._writer.append(head, drafts, change=change)

    async def set_row(self, run_id: str) -> str:
        """Rebuild the row of `runs` if it contradicts the journal; what it had said wrong, or "".

        Does nothing while the journal itself has flaws, or moves.
        """
        journal = await self._load(run_id)
        if not journal.entries or any(flaw.seq for flaw in journal.flaws):
            return ""
        state = fold(run_id, journal.entries)
        wrong = contradiction(await self._store.look.row(run_id), state, journal.entries)
        wrong = wrong or "".join(flaw.what for flaw in journal.flaws)
        if wrong:
            mend = Mend(run_id, row=row_of(state, journal.entries))
            receipt = await self._store.commit(Batch(changes=(mend,)))
            if receipt.is_refused:
                return ""  # it moved: whoever moved it has set the row
            logger.error("the row of run %s was rebuilt: %s", run_id, wrong)
        return wrong

    async def _load(self, run_id: str) -> Journal:
        found = (await self._store.look.load([run_id])).get(run_id)
        return found if found is not None else Journal(run_id, ())
