"""A store made anew out of the stream archive, alone or on top of a backup, on either database.

All streams are read at once, in the order of their batches' times. What is applied at a time is a
*unit*: one run's append, or a batch's own changes. A unit goes in when it fits: its predecessor is
the run's head, its records have the versions that it moves, its messages get the numbers that they
had. One that is there already is passed over (so a base may overlap); one that does not fit yet
waits for another stream. What nobody knows the end of (the last batches of a process that was
killed) comes last: if a known entry goes on after it, it had landed; at a fork the branch of the
higher epoch is taken. What was refused is left out. What never fits is a gap, and is named.

Everything goes through the target's own `commit`, with the time that it had: the same rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from llm_orchestrator.errors import StoreDamaged
from llm_orchestrator.model import Entry
from llm_orchestrator.recovery.archive_read import (
    Merged,
    along,
    check_base,
    choose,
    content_of,
    filled_in,
    positions_of,
)
from llm_orchestrator.recovery.beyond import NEVER_BACK, Tail, tail_of
from llm_orchestrator.recovery.places import Place
from llm_orchestrator.recovery.stream_read import Findings, Item
from llm_orchestrator.recovery.unarchived import BEGIN, KIND
from llm_orchestrator.store.audit import Audit
from llm_orchestrator.store.base import (
    Append,
    Batch,
    Change,
    Consume,
    Database,
    Post,
    PutBlob,
    PutRecord,
)
from llm_orchestrator.store.journal import GENESIS

AUDIT_HEAD = "audit"
_PAGE = 500


@dataclass(slots=True)
class Rebuilt:
    """What came of it."""

    tails: list[Tail] = field(default_factory=list)
    """What the archive knows of runs beyond the point."""
    generation: int = 0
    point_us: int = 0
    applied: int = 0
    passed_over: int = 0
    """Units that were there already."""
    dropped: int = 0
    """Units that were never acknowledged, and did not fit."""
    findings: Findings = field(default_factory=Findings)


class _Unit(NamedTuple):
    """What stands or falls together. `posted`: a message's number, 0 none, -1 not known."""

    at: int
    where: str
    is_known: bool
    append: Append | None
    changes: Sequence[Change]
    posted: Sequence[int]

    def batch(self) -> Batch:
        """It alone, without messages that had put nothing."""
        numbers = iter(self.posted)
        changes = tuple(
            each for each in self.changes if not isinstance(each, Post) or next(numbers) != 0
        )
        if self.append is None:
            return Batch(changes=changes, at=self.at)
        return Batch((self.append._replace(changes=changes),), at=self.at)


async def rebuild(
    place: Place,
    target: Database,
    *,
    until_us: int | None = None,
    base_us: int = 0,
    incarnation: str = "",
    keys: Sequence[Any] = (),
    may_miss: bool = False,
) -> Rebuilt:
    """Apply the archive to `target`: an empty store, or one that a backup was put into.

    `until_us`: the last moment that is wanted, on the store's clock; by default everything.
    `base_us`: when that backup was made. A moment before it cannot be reached.
    `incarnation`: of which life of the store; by default the base's, or the newest.
    Raises StoreDamaged when something is missing or does not fit, unless `may_miss`; WrongKey.
    """
    records = await target.shelf.records(KIND)
    begun = records.get(BEGIN)
    base = str(begun["incarnation"]) if isinstance(begun, dict) else ""
    one = await choose(place, until_us=until_us, name=incarnation or base)
    check_base(one, base=base, base_at=base_us, place=place)
    done = Rebuilt(generation=one.generation)
    done.findings.damage += one.damage
    merged = Merged(place, one, positions=positions_of(records), keys=keys, findings=done.findings)
    there = set(await target.look.run_ids())
    builder = _Builder(target, done, is_alone=len(one.streams) == 1, there=there)
    beyond: list[Item] = []
    async for item in merged.items():
        if until_us is not None and item.kept.at > until_us:
            beyond.append(item)
        else:
            await builder.offer(item)
    lost = await builder.finish(has_cut=until_us is not None)
    merged.check_ends()
    done.findings.damage += lost
    if done.findings.damage and not may_miss:
        raise StoreDamaged(
            f"the stream archive is not whole: {'; '.join(done.findings.damage[:3])}",
            hint="restore a newer backup, or go on without what is missing: --despite-flaws",
        )
    if beyond:
        await _look_beyond(target, beyond, done)
    return done


# -- what is applied at once -----------------------------------------------------------------------


def _units(item: Item) -> list[_Unit]:
    batch, told = content_of(item), item.told
    refused = set(told.refused) if told else set()
    numbers = list(told.posted) if told else []
    is_heard = item.is_known and len(numbers) == sum(
        isinstance(change, Post) for change in batch.every_change()
    )
    where = f"batch {item.kept.number} of stream {item.stream}"

    def taken(changes: Sequence[Change]) -> list[int]:
        count = sum(isinstance(change, Post) for change in changes)
        if not is_heard:
            return [-1] * count
        found, numbers[:count] = numbers[:count], []
        return found

    units = []
    for append in batch.appends:
        posted = taken(append.changes)
        if append.run_id not in refused:
            units.append(_Unit(batch.at, where, item.is_known, append, append.changes, posted))
    if batch.changes and not (told and told.is_refused):
        posted = taken(batch.changes)
        units.append(_Unit(batch.at, where, item.is_known, None, batch.changes, posted))
    return units


# -- applying -------------------------------------------------------------------------------------


class _Builder:
    """Puts units into the target, each when it fits."""

    def __init__(self, target: Database, done: Rebuilt, *, is_alone: bool, there: set[str]) -> None:
        self._target = target
        self._there = there  # runs of the base: of all others we know everything
        self._is_lenient = is_alone  # a single stream is in order; no need to look at the mail
        self._done = done
        self._heads: dict[str, dict[int, bytes]] = {}
        self._inboxes: dict[str, int] = {}
        self._waiting: list[_Unit] = []
        self._unsure: list[_Unit] = []

    async def offer(self, item: Item) -> None:
        """It is its turn by the clock."""
        units = _units(item)
        if not item.is_known:
            self._unsure += units
            return
        left = await self._together(units) if len(units) > 1 else units
        for unit in left:
            if not await self._try(unit):
                self._waiting.append(unit)
        await self._settle()

    async def _together(self, units: Sequence[_Unit]) -> list[_Unit]:
        """Those that fit go in with one commit; what is left."""
        fitting: list[_Unit] = []
        left: list[_Unit] = []
        runs: set[str] = set()
        for unit in units:
            run_id = _run(unit)
            is_first = run_id not in runs and not any(isinstance(c, Post) for c in unit.changes)
            runs.add(run_id)
            is_fit = is_first and not await self._has(unit) and await self._fits(unit)
            (fitting if is_fit else left).append(unit)
        if len(fitting) < 2:
            return list(units)
        parts = [unit.batch() for unit in fitting]
        changes = [each for part in parts for each in part.changes]
        batch = Batch([each for part in parts for each in part.appends], changes, units[0].at)
        receipt = await self._target.commit(batch)
        for unit in fitting:
            is_out = receipt.is_refused if unit.append is None else _run(unit) in receipt.refused
            if is_out:
                left.append(unit)
            else:
                self._landed(unit)
        return left

    async def finish(self, *, has_cut: bool) -> list[str]:
        """No more comes. What of the known never fitted."""
        await self._settle()
        self._is_lenient = True
        await self._settle()
        while await self._one_unsure():
            await self._settle()
        self._done.dropped += len(self._unsure)
        if has_cut:  # they wait for what lies beyond the point
            return []
        return [
            f"{unit.where}: what comes before it is missing"
            + (f" (run {unit.append.run_id}, entry {unit.append.prev_seq})" if unit.append else "")
            for unit in self._waiting
        ]

    async def _settle(self) -> None:
        while self._waiting:
            left = [unit for unit in self._waiting if not await self._try(unit)]
            if len(left) == len(self._waiting):
                return
            self._waiting = left

    async def _one_unsure(self) -> bool:
        """The best of those that fit: what a known one goes on after, then the higher epoch."""
        wanted = {unit.append.prev_digest for unit in self._waiting if unit.append}
        taken = {
            (unit.append.run_id, unit.append.prev_seq) for unit in self._waiting if unit.append
        }

        def rank(unit: _Unit) -> tuple[bool, int, int]:
            last = unit.append.entries[-1] if unit.append and unit.append.entries else None
            return (
                last is None or last.digest not in wanted,
                -(last.epoch if last else 0),
                unit.at,
            )

        for unit in sorted(self._unsure, key=rank):
            append = unit.append
            is_rival = append is not None and (append.run_id, append.prev_seq) in taken
            if not is_rival and await self._try(unit):
                self._unsure.remove(unit)
                return True
        return False

    async def _try(self, unit: _Unit) -> bool:
        """True when it is in the target now."""
        if await self._has(unit):
            self._done.passed_over += 1
            return True
        fit = await self._fits(unit)
        if fit is None:
            self._done.passed_over += 1
            return True
        if not fit:
            return False
        receipt = await self._target.commit(unit.batch())
        if receipt.refused or receipt.is_refused:
            return False
        self._landed(unit)
        return True

    async def _has(self, unit: _Unit) -> bool:
        """True when its entries are there already."""
        append = unit.append
        if append is None:
            return False
        digests = await self._digests(append.run_id)
        if not append.entries:  # changes alone: the run has gone on behind them
            has_gone_on = append.prev_seq + 1 in digests
            return has_gone_on and digests.get(append.prev_seq) == append.prev_digest
        last = append.entries[-1]
        return digests.get(last.seq) == last.digest

    async def _fits(self, unit: _Unit) -> bool | None:
        """None: its changes are there already."""
        append = unit.append
        if append is not None:
            digests = await self._digests(append.run_id)
            before = digests.get(append.prev_seq, GENESIS if not append.prev_seq else b"")
            if before != append.prev_digest or append.prev_seq + 1 in digests:
                return False
            seen = append.change.inbox_seen if append.change else 0
            if not self._is_lenient and seen > await self._inbox(append.run_id):
                return False  # another stream's message comes before it
        numbers = iter(unit.posted)
        more: dict[str, int] = {}
        for change in unit.changes:
            if isinstance(change, Post) and (number := next(numbers)) > 0:
                here = await self._inbox(change.run_id) + more.get(change.run_id, 0)
                if number <= here and append is None:
                    return None
                if number != here + 1:
                    return False
                more[change.run_id] = more.get(change.run_id, 0) + 1
            elif isinstance(change, PutRecord):
                _, version = await self._target.shelf.record(change.kind, change.key)
                if version > change.version and append is None:
                    return None
                if version != change.version:
                    return False
        return True

    async def _digests(self, run_id: str) -> dict[int, bytes]:
        if run_id not in self._heads:
            if run_id not in self._there:
                return self._heads.setdefault(run_id, {})
            entries = await self._target.look.stored(run_id)
            self._heads[run_id] = {entry.seq: entry.digest for entry in entries}
        return self._heads[run_id]

    async def _inbox(self, run_id: str) -> int:
        if run_id not in self._inboxes:
            found = await self._target.look.inbox_seqs([run_id])
            self._inboxes[run_id] = found.get(run_id, 0)
        return self._inboxes[run_id]

    def _landed(self, unit: _Unit) -> None:
        self._done.applied += 1
        self._done.point_us = max(self._done.point_us, unit.at)
        if unit.append is not None and unit.append.run_id in self._heads:
            digests = self._heads[unit.append.run_id]
            digests.update((entry.seq, entry.digest) for entry in unit.append.entries)
        for change in unit.changes:
            if isinstance(change, Post):
                self._inboxes.pop(change.run_id, None)
            elif not isinstance(change, PutRecord | PutBlob) and unit.append is None:
                self._there.update(self._heads)
                self._heads.clear()  # runs may have been removed or mended


def _run(unit: _Unit) -> str:
    return unit.append.run_id if unit.append else ""


# -- what lies beyond the point -------------------------------------------------------------------


async def _look_beyond(target: Database, items: Sequence[Item], done: Rebuilt) -> None:
    """Runs' entries for reconciliation; what never goes back is carried over (law 10)."""
    entries: dict[str, list[Entry]] = {}
    blobs: dict[bytes, bytes] = {}
    units = [unit for item in items for unit in _units(item)]
    for unit in units:
        blobs.update(
            (each.digest, each.content) for each in unit.changes if isinstance(each, PutBlob)
        )
        if unit.append is not None:
            entries.setdefault(unit.append.run_id, []).extend(unit.append.entries)
    for run_id, known in entries.items():
        journal = (await target.look.load([run_id])).get(run_id)
        restored = journal.entries if journal else ()
        head = restored[-1].digest if restored else GENESIS
        whole = filled_in(along(head, len(restored), known), blobs)
        tail = tail_of(restored, [*restored, *whole], run_id)
        if tail is not None:
            done.tails.append(tail)
    known_units = [unit for unit in units if unit.is_known]
    await _carry(target, [change for unit in known_units for change in unit.changes])
    await _mail(target, known_units)


async def _carry(target: Database, changes: Sequence[Change]) -> None:
    """Records that never go back, as they were last, and the audit log."""
    last: dict[tuple[str, str], Any] = {}
    for change in changes:
        if isinstance(change, Audit):
            await target.commit(Batch(changes=(change,)))
        elif isinstance(change, PutRecord) and change.kind in (*NEVER_BACK, AUDIT_HEAD):
            last[change.kind, change.key] = change.value
    for (kind, key), value in last.items():
        _, version = await target.shelf.record(kind, key)
        if value is not None or version:
            await target.commit(Batch(changes=(PutRecord(kind, key, value, version),)))


async def _mail(target: Database, units: Sequence[_Unit]) -> None:
    """Messages that came later, under the numbers that they had; those taken are used up.

    What took one is among the hidden entries, which deliver it again (see carry.py).
    """
    posts: dict[str, dict[int, Post]] = {}
    taken: dict[str, set[int]] = {}
    for unit in units:
        numbers = iter(unit.posted)
        for change in unit.changes:
            if isinstance(change, Post) and (number := next(numbers)) > 0:
                posts.setdefault(change.run_id, {})[number] = change
            elif isinstance(change, Consume):
                taken.setdefault(change.run_id, set()).update(change.numbers)
    seen = await target.look.inbox_seqs(list(posts))
    for run_id in posts.keys() & seen.keys():
        there = posts[run_id]
        wanted = range(seen[run_id] + 1, max(there) + 1)
        again = [there.get(number) or Post(run_id, "taken") for number in wanted]
        used = [n for n in wanted if n not in there or n in taken.get(run_id, ())]
        for start in range(0, len(again), _PAGE):
            await target.commit(Batch(changes=again[start : start + _PAGE]))
        if used:
            await target.commit(Batch(changes=(Consume(run_id, tuple(used)),)))
