"""A store in memory: the model that the real ones must agree with.

It keeps nothing. It exists so that the conformance suite has a reference that is too simple to be
wrong in the way of a database (plain dicts, copied before each append is tried, put back when it
fails), and as the shortest reading of base.py.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from llm_orchestrator.clock import Clock
from llm_orchestrator.errors import StoreError
from llm_orchestrator.model import (
    Entry,
    Flaw,
    Journal,
    Json,
    Message,
    NewRun,
    Run,
    RunState,
    Workflow,
)
from llm_orchestrator.store import base
from llm_orchestrator.store.audit import Audit, AuditEntry, AuditFilter, ForgetAudit, select
from llm_orchestrator.store.base import Append, Batch, Outcome, Progress, Receipt, RunFilter, RunRow
from llm_orchestrator.store.check import Anchor, check_journal
from llm_orchestrator.store.journal import canonical_value, decode, encode_value
from llm_orchestrator.store.memory_members import MemoryMembers
from llm_orchestrator.store.statistics import Queue, RunCount, Statistics

_Key = tuple[Any, ...]


@dataclass
class _Tables:
    """Everything that is stored."""

    runs: dict[str, RunRow] = field(default_factory=dict)
    inbox_seqs: dict[str, int] = field(default_factory=dict)
    journal: dict[_Key, Entry] = field(default_factory=dict)
    inbox: dict[_Key, tuple[base.Post, bytes | None]] = field(default_factory=dict)
    posted_at: dict[_Key, int] = field(default_factory=dict)
    progress: dict[_Key, tuple[str, Json]] = field(default_factory=dict)
    records: dict[_Key, tuple[Json, int]] = field(default_factory=dict)
    blobs: dict[_Key, bytes] = field(default_factory=dict)
    vectors: dict[_Key, tuple[bytes, bytes]] = field(default_factory=dict)
    workflows: dict[_Key, Workflow] = field(default_factory=dict)
    audit: dict[_Key, AuditEntry] = field(default_factory=dict)

    def copy(self) -> _Tables:
        return _Tables(**{name: dict(table) for name, table in vars(self).items()})


class _Refusal(Exception):
    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome)
        self.outcome = outcome


class MemoryStore:
    """See store.base.Store for every method's contract."""

    def __init__(self, clock: Clock, *, node_id: str = "memory") -> None:
        self.node_id = node_id
        self.generation = 1
        self.incarnation = "memory"
        self._clock = clock
        self._listeners: list[Callable[[base.News], None]] = []
        self._is_closed = False
        self._now = 0
        self._posted: list[int] = []
        self.tables = _Tables()
        self.nodes: dict[str, base.Member] = {}
        self.look = MemoryLook(self)
        self.shelf = MemoryShelf(self)
        self.counts = MemoryCounts(self)

    async def close(self) -> None:
        self._is_closed = True

    def on_news(self, listener: Callable[[base.News], None]) -> None:
        self._listeners.append(listener)

    async def members(self) -> MemoryMembers:
        return MemoryMembers(self.nodes, self._clock)

    async def pick(self, node_id: str, wanted: base.Wanted) -> list[Run]:
        free = [run for run in self.look.free() if run.wake_at <= wanted.now_us]
        found = [
            run
            for run in free
            if run.queue not in wanted.full_queues
            and run.digest not in wanted.strange
            and run.run_id not in wanted.except_runs
            and wanted.queue in (None, run.queue)
        ]
        limit = wanted.limit
        if wanted.queue is not None and wanted.concurrency:
            rows = self.tables.runs.values()
            busy = [row for row in rows if row.change.owner and row.accept.queue == wanted.queue]
            limit = min(limit, max(0, wanted.concurrency - len(busy)))
        return sorted(found, key=lambda run: (-run.priority, run.wake_at, run.run_id))[:limit]

    async def adopt(
        self,
        node_id: str,
        limit: int,
        except_runs: Sequence[str] = (),
        *,
        strange: Sequence[str] = (),
    ) -> list[str]:
        alive = {member.node_id for member in self.nodes.values() if base.lives(member)}
        rows = [row for row in self.tables.runs.values() if row.change.owner is not None]
        owned = [row.accept for row in rows if row.change.owner not in alive]
        owned = [new for new in owned if new.digest not in strange]
        owned.sort(key=lambda new: (-new.priority, new.run_id))
        return [new.run_id for new in owned if new.run_id not in except_runs][:limit]

    async def renew(self) -> None:
        """There is nobody else."""

    async def put_back(self, node_id: str, run_ids: Sequence[str]) -> None:
        """Nothing is kept for whoever picks."""

    async def commit(self, batch: Batch) -> Receipt:
        if self._is_closed:
            raise StoreError("the store is closed")
        refused = {}
        self._now, self._posted = batch.at or self._clock.now_us(), []
        for append in batch.appends:
            outcome = self._try(append, append.changes)
            if outcome is not Outcome.LANDED:
                refused[append.run_id] = outcome
        rest = self._try(None, batch.changes)
        news = base.news_of(batch)
        if news:
            for listener in self._listeners:
                listener(news)
        return Receipt(refused, is_refused=rest is not Outcome.LANDED, posted=tuple(self._posted))

    def _try(self, append: Append | None, changes: Sequence[base.Change]) -> Outcome:
        before, posted = self.tables, len(self._posted)
        self.tables = before.copy()
        try:
            if append is not None:
                self._append(append)
            for change in changes:
                self._change(change)
        except _Refusal as refusal:
            outcome = refusal.outcome
        except (TypeError, ValueError, OverflowError):
            outcome = Outcome.UNFIT
        else:
            return Outcome.LANDED
        self.tables = before
        if append is not None and outcome is not Outcome.UNFIT:
            outcome = self._judge(append, outcome)
        number = -1 if outcome is Outcome.LANDED else 0
        self._posted[posted:] = [number] * base.count_posts(changes)
        return outcome

    def _judge(self, append: Append, outcome: Outcome) -> Outcome:
        journal = self.tables.journal
        if append.entries:
            last = append.entries[-1]
            found = journal.get((append.run_id, last.seq))
            if found is not None and found.digest == last.digest:
                return Outcome.LANDED
        is_taken = (append.run_id, append.prev_seq + 1) in journal
        return Outcome.FENCED if is_taken and append.accept is None else outcome

    def _append(self, append: Append) -> None:
        journal = self.tables.journal
        previous = journal.get((append.run_id, append.prev_seq))
        seq = append.prev_seq
        for entry in append.entries:
            seq += 1
            if entry.seq != seq or entry.run_id != append.run_id:
                raise _Refusal(Outcome.UNFIT)
            _must_fit(*entry)
            if (entry.run_id, seq) in journal:
                raise _Refusal(Outcome.CONFLICT)
        is_headless = previous is None or previous.digest != append.prev_digest
        is_over = not append.entries and (append.run_id, seq + 1) in journal
        if is_over or (append.prev_seq and is_headless):
            raise _Refusal(Outcome.DAMAGED)
        journal.update({(entry.run_id, entry.seq): entry for entry in append.entries})
        if append.accept is not None:
            self._accept(append.accept)
        if append.change is not None:
            self._change_state(append, append.change)

    def _accept(self, new: NewRun) -> None:
        if new.run_id in self.tables.runs:
            raise _Refusal(Outcome.CONFLICT)
        texts = (new.workflow, new.version, new.digest, new.queue, new.idempotency_key)
        _must_fit(*texts, new.parent_run_id, new.priority, new.wake_at)
        plain = replace(new, input=_stored(new.input))
        change = base.StateChange(RunState.PENDING.value, wake_at=new.wake_at)
        self.tables.runs[new.run_id] = RunRow(plain, change, 0, 0, b"", self._now, None, None)
        self.tables.inbox_seqs[new.run_id] = 0

    def _change_state(self, append: Append, change: base.StateChange) -> None:
        row = self.tables.runs.get(append.run_id)
        if row is None:
            raise _Refusal(Outcome.DAMAGED)
        _must_fit(*change)
        last, now = append.entries[-1], self._now
        if self.tables.inbox_seqs[append.run_id] > change.inbox_seen:
            change = change._replace(wake_at=0)
        is_started = change.state == RunState.RUNNING and row.started_at is None
        self.tables.runs[append.run_id] = row._replace(
            change=change._replace(state=str(change.state)),
            epoch=last.epoch,
            head_seq=last.seq,
            head_digest=last.digest,
            started_at=now if is_started else row.started_at,
            finished_at=now if RunState(change.state).is_final else None,
        )

    def _change(self, change: base.Change) -> None:
        tables = self.tables
        match change:
            case base.Post():
                self._post(change)
            case base.Consume():
                for number in change.numbers:
                    if (found := tables.inbox.get((change.run_id, number))) is not None:
                        tables.inbox[change.run_id, number] = (found[0], None)
            case base.Register():
                self._register(change.workflow)
            case base.PutRecord():
                self._put_record(change)
            case base.PutBlob():
                tables.blobs[change.run_id, change.digest] = change.content
            case base.PutProgress():
                where = (change.run_id, change.step, change.attempt, change.part)
                _must_fit(*where, change.text)
                tables.progress.setdefault(where, (change.text, _stored(change.handle)))
            case base.DropProgress():
                _drop(tables.progress, change.run_id, change.step)
            case base.PutVectors():
                for key, vector, metadata in change.rows:
                    tables.vectors[change.index, change.namespace, key] = (vector, metadata)
            case _:
                self._rare(change)

    def _register(self, flow: Workflow) -> None:
        key = (flow.name, flow.version, flow.digest)
        before = self.tables.workflows.get(key)
        created_at = flow.created_at or self._now
        if before is not None:
            created_at = before.created_at
        self.tables.workflows[key] = replace(flow, created_at=created_at)

    def _rare(self, change: base.Change) -> None:
        match change:
            case base.Mend():
                self._mend(change)
            case base.Unregister():
                self._unregister(change)
            case base.Expire():
                for run_id in change.run_ids:
                    self._expire(run_id)
            case Audit():
                for entry in change.entries:
                    _must_fit(*entry)
                    if entry[:2] in self.tables.audit:
                        raise _Refusal(Outcome.CONFLICT)
                    self.tables.audit[entry[:2]] = entry
            case ForgetAudit():
                _drop(self.tables.audit, change.chain_id)

    def _unregister(self, change: base.Unregister) -> None:
        runs = [row.accept for row in self.tables.runs.values()]
        is_used = any(
            run.workflow == change.name
            and (change.version is None or run.version == change.version)
            for run in runs
        )
        flows = self.tables.workflows
        gone = [key for key in flows if key[0] == change.name and change.version in (None, key[1])]
        if is_used or not gone:
            raise _Refusal(Outcome.CONFLICT)
        for key in gone:
            del flows[key]

    def _expire(self, run_id: str) -> None:
        tables = self.tables
        row = tables.runs.get(run_id)
        if row is not None and RunState(row.change.state).is_final:
            del tables.runs[run_id], tables.inbox_seqs[run_id]
            for table in (tables.journal, tables.inbox, tables.blobs, tables.progress):
                _drop(table, run_id)

    def _mend(self, change: base.Mend) -> None:
        journal = self.tables.journal
        journal.update({(entry.run_id, entry.seq): entry for entry in change.entries})
        if change.row is None:
            return
        head = journal.get((change.run_id, change.row.head_seq))
        is_moved = (change.run_id, change.row.head_seq + 1) in journal
        if head is None or head.digest != change.row.head_digest or is_moved:
            raise _Refusal(Outcome.FENCED)
        self.tables.runs[change.run_id] = change.row
        numbers = [key[1] for key in self.tables.inbox if key[0] == change.run_id]
        self.tables.inbox_seqs[change.run_id] = max(numbers, default=0)

    def _post(self, post: base.Post) -> None:
        tables = self.tables
        row = tables.runs.get(post.run_id)
        keys = {
            other.sender_key for key, (other, _) in tables.inbox.items() if key[0] == post.run_id
        }
        if row is None or (post.sender_key is not None and post.sender_key in keys):
            self._posted.append(0)
            return
        _must_fit(post.kind, post.name, post.sender_key)
        tables.inbox_seqs[post.run_id] += 1
        number = tables.inbox_seqs[post.run_id]
        tables.inbox[post.run_id, number] = (post, encode_value(post.payload))
        tables.posted_at[post.run_id, number] = self._now
        self._posted.append(number)
        if row.change.state == RunState.WAITING:
            tables.runs[post.run_id] = row._replace(change=row.change._replace(wake_at=0))

    def _put_record(self, change: base.PutRecord) -> None:
        _must_fit(change.kind, change.key)
        value = json.loads(canonical_value(change.value))
        records, key = self.tables.records, (change.kind, change.key)
        _, version = records.get(key, (None, 0))
        if version != change.version or (change.value is None and version == 0):
            raise _Refusal(Outcome.CONFLICT)
        if change.value is None:
            del records[key]
        else:
            records[key] = (value, version + 1)


class MemoryCounts:
    """See store.statistics.Counts for every method's contract."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store

    async def census(self) -> list[RunCount]:
        rows = self._store.tables.runs.values()
        found = Counter((row.change.state, row.accept.workflow) for row in rows)
        counts = [RunCount(*key, count) for key, count in found.items()]
        return sorted(counts, key=lambda each: (-each.number, each.state, each.workflow))

    async def statistics(self, now_us: int, *, stalled_before: int) -> Statistics:
        due: dict[str, list[int]] = {}
        for run in self._store.look.free():
            if run.wake_at <= now_us:
                due.setdefault(run.queue, []).append(max(run.wake_at, self._since(run)))
        queues = [Queue(name, len(since), min(since)) for name, since in due.items()]
        queues.sort(key=lambda queue: (-queue.depth, queue.name))
        owned = [
            run_id
            for run_id, row in self._store.tables.runs.items()
            if row.change.owner is not None
        ]
        stalled = [run_id for run_id in owned if self._last(run_id) < stalled_before]
        return Statistics(queues, len(stalled))

    def _since(self, run: Run) -> int:
        """When it became due, if not by its own time."""
        if run.state is RunState.WAITING and run.wake_at == 0:
            mail = self._store.tables.posted_at.items()
            open_ = [at for key, at in mail if key[0] == run.run_id and self._is_open(key)]
            if open_:
                return min(open_)
        return run.created_at if run.started_at is None else self._last(run.run_id)

    def _is_open(self, key: _Key) -> bool:
        return self._store.tables.inbox.get(key, (None, None))[1] is not None

    def _last(self, run_id: str) -> int:
        journal = self._store.tables.journal.items()
        return max((key[1], entry.recorded_at) for key, entry in journal if key[0] == run_id)[1]


class MemoryLook:
    """See store.base.Look for every method's contract."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store

    @property
    def _tables(self) -> _Tables:
        return self._store.tables

    async def load(self, run_ids: Sequence[str]) -> dict[str, Journal]:
        journals = {}
        for run_id in run_ids:
            entries, row = await self.stored(run_id), self._tables.runs.get(run_id)
            if not entries and row is None:
                continue
            broken = [] if row else [Flaw(run_id, 0, "the row of runs is missing")]
            if not entries:
                broken.append(Flaw(run_id, 1, "row missing: there is no journal", False))
            anchor = Anchor(row.head_seq, row.head_digest) if row and row.head_seq else None

            def read(digest: bytes, run_id: str = run_id) -> bytes | None:
                return self._tables.blobs.get((run_id, digest))

            journals[run_id] = check_journal(run_id, entries, read, broken=broken, anchor=anchor)
        return journals

    async def stored(self, run_id: str) -> list[Entry]:
        rows = self._tables.journal.items()
        return [entry for key, entry in sorted(rows) if key[0] == run_id]

    async def run(self, run_id: str) -> Run | None:
        row = self._tables.runs.get(run_id)
        return None if row is None else self._run(row)

    def _run(self, row: RunRow) -> Run:
        new, change = row.accept, row.change
        return Run(
            run_id=new.run_id,
            workflow=new.workflow,
            version=new.version,
            digest=new.digest,
            state=RunState(change.state),
            reason=change.reason,
            owner=change.owner,
            epoch=row.epoch,
            priority=new.priority,
            queue=new.queue,
            idempotency_key=new.idempotency_key,
            parent_run_id=new.parent_run_id,
            wake_at=change.wake_at,
            inbox_seq=self._tables.inbox_seqs[new.run_id],
            labels=dict(new.labels),
            created_at=row.created_at,
            started_at=row.started_at,
            finished_at=row.finished_at,
        )

    def _runs(self) -> list[Run]:
        return [self._run(row) for row in self._tables.runs.values()]

    async def row(self, run_id: str) -> RunRow | None:
        row = self._tables.runs.get(run_id)
        if row is None:
            return None
        return row._replace(change=row.change._replace(inbox_seen=self._tables.inbox_seqs[run_id]))

    async def runs(self, wanted: RunFilter) -> list[Run]:
        def fits(run: Run) -> bool:
            return (
                (not wanted.states or run.state in wanted.states)
                and wanted.workflow in (None, run.workflow)
                and wanted.parent_run_id in (None, run.parent_run_id)
                and wanted.queue in (None, run.queue)
                and (wanted.label is None or wanted.label in run.labels.items())
                and (wanted.since is None or run.created_at >= wanted.since)
                and (wanted.until is None or run.created_at < wanted.until)
                and (wanted.before is None or run.run_id < wanted.before)
            )

        found = sorted(filter(fits, self._runs()), key=lambda run: run.run_id, reverse=True)
        return found[: wanted.limit]

    async def run_ids(self) -> list[str]:
        return sorted({key[0] for key in self._tables.journal} | set(self._tables.runs))

    async def unfinished(self) -> list[str]:
        done = {run.run_id for run in self._runs() if run.state.is_final}
        return [run_id for run_id in await self.run_ids() if run_id not in done]

    def free(self) -> list[Run]:
        """Runs that nobody drives and that somebody may."""
        states = (RunState.PENDING, RunState.WAITING)
        return [run for run in self._runs() if run.state in states and run.owner is None]

    async def next_wake(self) -> int | None:
        return min((run.wake_at for run in self.free()), default=None)

    async def inbox(self, run_id: str) -> list[Message]:
        return [
            Message(run_id, key[1], post.kind, post.name, _value(payload), post.sender_key)
            for key, (post, payload) in sorted(self._tables.inbox.items(), key=lambda item: item[0])
            if key[0] == run_id and payload is not None
        ]

    async def inbox_seqs(self, run_ids: Sequence[str]) -> dict[str, int]:
        known = self._tables.inbox_seqs
        return {run_id: known[run_id] for run_id in run_ids if run_id in known}

    async def progress(self, run_id: str, step: str) -> Progress | None:
        rows = [
            item for item in sorted(self._tables.progress.items()) if item[0][:2] == (run_id, step)
        ]
        if not rows:
            return None
        newest = rows[-1][0][2]
        parts = [value for key, value in rows if key[2] == newest]
        handles = [handle for _, handle in parts if handle is not None]
        return Progress(
            newest, "".join(text for text, _ in parts), handles[-1] if handles else None
        )

    async def expirable(self, *, finished_before: int, keep: int, limit: int) -> list[Run]:
        done = [run for run in self._runs() if run.finished_at is not None]
        done.sort(key=lambda run: run.finished_at or 0)
        newest = [run.finished_at or 0 for run in reversed(done)]
        border = max(finished_before, newest[keep - 1] if keep <= len(newest) else 0)
        return [run for run in done if (run.finished_at or 0) < border][:limit]

    async def structure(self) -> list[str]:
        return []


class MemoryShelf:
    """See store.base.Shelf for every method's contract."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store

    async def workflow(
        self, name: str, version: str | None = None, digest: str | None = None
    ) -> Workflow | None:
        found = [
            flow
            for flow in self._store.tables.workflows.values()
            if flow.name == name
            and version in (None, flow.version)
            and digest in (None, flow.digest)
        ]
        found.sort(key=lambda flow: (flow.created_at, flow.version, flow.digest))
        return found[-1] if found else None

    async def workflows(self) -> list[Workflow]:
        found = self._store.tables.workflows.values()
        return sorted(
            found, key=lambda flow: (flow.name, flow.created_at, flow.version, flow.digest)
        )

    async def record(self, kind: str, key: str) -> tuple[Json, int]:
        return self._store.tables.records.get((kind, key), (None, 0))

    async def records(self, kind: str) -> dict[str, Json]:
        rows = sorted(self._store.tables.records.items())
        return {key[1]: value for key, (value, _) in rows if key[0] == kind}

    async def vectors(
        self, index: str, namespace: str, *, near: Sequence[float] = (), limit: int = 0
    ) -> list[tuple[str, bytes, bytes]]:
        rows = sorted(self._store.tables.vectors.items())
        return [(key[2], *row) for key, row in rows if key[:2] == (index, namespace)]

    async def nodes(self, limit: int = 100) -> list[base.Member]:
        found = sorted(self._store.nodes.values())
        return sorted(found, key=lambda node: node.started_at, reverse=True)[:limit]

    async def audit(self, wanted: AuditFilter) -> list[AuditEntry]:
        return select(list(self._store.tables.audit.values()), wanted)

    async def audit_chains(self, after: tuple[str, int], limit: int) -> list[AuditEntry]:
        rows = sorted(self._store.tables.audit.items())
        return [entry for key, entry in rows if key > after][:limit]


def _drop(table: dict[_Key, Any], *start: object) -> None:
    for key in [key for key in table if key[: len(start)] == start]:
        del table[key]


def _must_fit(*values: object) -> None:
    """Raises for what no column takes: a lone surrogate, a number beyond 64 bits."""
    for value in values:
        if isinstance(value, str):
            value.encode()
        elif isinstance(value, int):
            value.to_bytes(8, "big", signed=True)


def _stored(value: Json) -> Json:
    return decode(encode_value(value))["value"]


def _value(column: bytes | None) -> Json:
    return None if column is None else decode(column)["value"]
