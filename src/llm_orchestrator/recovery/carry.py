"""Carrying over: what a restored store takes from the live one before it takes its place.

Called when nobody can write to the live store any more (`Aside.take_over`), so what is read here is
the last that it will ever say. See beyond.py for what happens to runs. A live store that cannot be
read gives nothing, and the report says so: then the window since the backup is lost.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from llm_orchestrator.errors import StoreError
from llm_orchestrator.model import Entry, Journal, Message, Run, RunState
from llm_orchestrator.recovery.beyond import NEVER_BACK, Tail, carry, tail_of
from llm_orchestrator.store.audit import Audit, AuditEntry
from llm_orchestrator.store.base import (
    Batch,
    Change,
    Consume,
    Database,
    Post,
    PutRecord,
    Register,
    RunFilter,
)
from llm_orchestrator.store.check import whole

logger = logging.getLogger(__name__)
_AT_ONCE = 50
_PAGE = 500
_AUDIT_HEAD = "audit"
"""Kind of the records that hold the heads of the audit log (security/audit.py)."""


@dataclass(slots=True)
class Carriage:
    """What was carried over, for the report and the audit log."""

    runs: int = 0
    """Runs that had gone on, or begun, after the restored point."""
    entries: int = 0
    held: list[str] = field(default_factory=list)
    records: int = 0
    messages: int = 0
    audit: int = 0
    usd: float = 0.0
    """What the hidden entries had spent."""
    trouble: list[str] = field(default_factory=list)
    """What could not be carried over, and is lost."""


@dataclass(frozen=True, slots=True)
class Under:
    """Under which name things are carried: the new generation, the reason, the time."""

    generation: int
    now_us: int
    why: str


async def carry_over(
    live: Database | None,
    restored: Database,
    under: Under,
    *,
    tails: Sequence[Tail] = (),
    hold: bool = False,
) -> Carriage:
    """Everything that a restore must not forget, into `restored`.

    `tails` are what the stream archive knows beyond the point; of two stories of a run the longer
    one is taken. `hold`: where nobody can say what unfinished runs did since, they are held.
    Raises StoreError when `restored` does not take it; what of `live` (None: it is gone) cannot be
    read is named.
    """
    done = Carriage()
    runs = _Runs(restored, under, archived={tail.run_id: tail for tail in tails}, done=done)
    if live is not None:
        for what, work in (
            ("the definitions", _definitions(live, restored)),
            ("the runs", runs.carry(live)),
            ("the records", _records(live, restored, NEVER_BACK, done=done)),
            ("the audit log", _audit(live, restored, done)),
        ):
            try:
                await work
            except _Unreadable as error:
                done.trouble.append(f"{what} of the store that is replaced: {error}")
    await runs.carry_rest()
    if hold and (live is None or done.trouble):
        await runs.hold_all()
    return done


class _Unreadable(Exception):
    """The live store does not say."""


# -- runs -----------------------------------------------------------------------------------------


class _Runs:
    """Runs on their way into the restored store, each by the longer of its two stories."""

    def __init__(
        self, restored: Database, under: Under, *, archived: dict[str, Tail], done: Carriage
    ) -> None:
        self._restored = restored
        self._under = under
        self._archived = archived
        self._done = done

    async def carry(self, live: Database) -> None:
        """What `live` knows; afterwards, what only the archive does."""
        there = {run.run_id: run async for run in _all_runs(self._restored)}
        try:
            moved = [
                run.run_id
                async for run in _all_runs(live)
                if not _stands(run, there.get(run.run_id))
            ]
        except StoreError as error:
            raise _Unreadable(error.message) from error
        for start in range(0, len(moved), _AT_ONCE):
            some = moved[start : start + _AT_ONCE]
            last = await self._journals(live, some)
            for run_id in some:
                await self._one(run_id, whole(last[run_id]) if run_id in last else ())
            await self._mail(live, some)

    async def carry_rest(self) -> None:
        """What the archive alone knows."""
        for run_id in list(self._archived):
            await self._one(run_id, ())

    async def hold_all(self) -> None:
        """Every unfinished run that is not held already."""
        under, done = self._under, self._done
        async for run in _all_runs(self._restored):
            if run.state.is_final or run.state is RunState.PAUSED:
                continue
            journal = (await self._restored.look.load([run.run_id]))[run.run_id]
            last = journal.entries[-1]
            held = carry(
                Tail(run.run_id, last.seq, last.digest, ()),
                journal.entries,
                generation=under.generation,
                now_us=under.now_us,
                why=under.why,
                is_held=True,
            )
            receipt = await self._restored.commit(Batch(appends=(held.append,)))
            if run.run_id not in receipt.refused:
                done.held.append(run.run_id)

    async def _journals(self, live: Database, run_ids: Sequence[str]) -> Mapping[str, Journal]:
        try:
            return await live.look.load(run_ids)
        except StoreError as error:
            self._done.trouble.append(f"{len(run_ids)} runs cannot be read: {error.message}")
            return {}

    async def _one(self, run_id: str, known: Sequence[Entry]) -> None:
        journal = (await self._restored.look.load([run_id])).get(run_id)
        entries = journal.entries if journal else ()
        tail = tail_of(entries, known, run_id)
        other = self._archived.pop(run_id, None)
        if other is not None and (tail is None or len(other.entries) > len(tail.entries)):
            tail = tail_of(entries, [*entries, *other.entries], run_id)
        if tail is not None:
            await self._take(tail, entries)

    async def _take(self, tail: Tail, known: Sequence[Entry]) -> None:
        under, done = self._under, self._done
        carried = carry(
            tail, known, generation=under.generation, now_us=under.now_us, why=under.why
        )
        receipt = await self._restored.commit(Batch(appends=(carried.append,)))
        if tail.run_id in receipt.refused:
            done.trouble.append(f"run {tail.run_id}: {receipt.refused[tail.run_id]}")
            return
        done.runs += 1
        done.entries += len(tail.entries)
        done.usd += sum(effect.usage.cost_usd for effect in tail.effects)
        if carried.is_held:
            done.held.append(tail.run_id)

    async def _mail(self, live: Database, run_ids: Sequence[str]) -> None:
        """Messages that came after the restored point, under the numbers that they had.

        One that was taken already is in the hidden entries, which deliver it again; its number
        must not be given to another one, so it is used up.
        """
        seen = await self._restored.look.inbox_seqs(run_ids)
        for run_id in run_ids:
            try:
                messages = {each.number: each for each in await live.look.inbox(run_id)}
                last = (await live.look.inbox_seqs([run_id])).get(run_id, 0)
            except StoreError as error:
                self._done.trouble.append(f"the inbox of run {run_id}: {error.message}")
                continue
            numbers = range(seen.get(run_id, 0) + 1, last + 1)
            if run_id not in seen or not numbers:
                continue
            posts = [_again(run_id, messages.get(number)) for number in numbers]
            await self._restored.commit(Batch(changes=posts))
            used = tuple(number for number in numbers if number not in messages)
            if used:
                await self._restored.commit(Batch(changes=(Consume(run_id, used),)))
            self._done.messages += len(posts) - len(used)


def _stands(run: Run, restored: Run | None) -> bool:
    """True when it had ended before the restored point, and has not moved since."""
    if restored is None or not run.state.is_final:
        return False
    now, then = (
        (each.state, each.epoch, each.finished_at, each.inbox_seq) for each in (run, restored)
    )
    return now == then


async def _all_runs(store: Database) -> AsyncIterator[Run]:
    before: str | None = None
    while page := await store.look.runs(RunFilter(before=before, limit=_PAGE)):
        for run in page:
            yield run
        before = page[-1].run_id


def _again(run_id: str, message: Message | None) -> Post:
    if message is None:
        return Post(run_id, "taken")
    return Post(run_id, message.kind, message.name, message.payload, message.sender_key)


# -- everything else ------------------------------------------------------------------------------


async def _definitions(live: Database, restored: Database) -> None:
    try:
        known = await live.shelf.workflows()
    except StoreError as error:
        raise _Unreadable(error.message) from error
    there = {(flow.name, flow.version, flow.digest) for flow in await restored.shelf.workflows()}
    for flow in known:
        if (flow.name, flow.version, flow.digest) not in there:
            await restored.commit(Batch(changes=(Register(flow),)))


async def _records(
    live: Database, restored: Database, kinds: Iterable[str], *, done: Carriage
) -> None:
    for kind in kinds:
        try:
            last = await live.shelf.records(kind)
        except StoreError as error:
            raise _Unreadable(error.message) from error
        there = await restored.shelf.records(kind)
        changes: list[Change] = []
        for key, value in last.items():
            if key in there and there[key] == value:
                continue
            version = (await restored.shelf.record(kind, key))[1] if key in there else 0
            changes.append(PutRecord(kind, key, value, version))
        for start in range(0, len(changes), _PAGE):
            await restored.commit(Batch(changes=changes[start : start + _PAGE]))
        done.records += len(changes)


async def _audit(live: Database, restored: Database, done: Carriage) -> None:
    """The log never goes back: what it has more than the copy is put behind the copy's."""
    heads = {entry.chain_id: entry.number async for entry in _chains(restored)}
    try:
        new = [
            entry async for entry in _chains(live) if entry.number > heads.get(entry.chain_id, 0)
        ]
    except StoreError as error:
        raise _Unreadable(error.message) from error
    for start in range(0, len(new), _PAGE):
        await restored.commit(Batch(changes=(Audit(tuple(new[start : start + _PAGE])),)))
    done.audit = len(new)
    await _records(live, restored, (_AUDIT_HEAD,), done=Carriage())


async def _chains(store: Database) -> AsyncIterator[AuditEntry]:
    after = ("", 0)
    while page := await store.shelf.audit_chains(after, _PAGE):
        for entry in page:
            yield entry
        after = page[-1][:2]
