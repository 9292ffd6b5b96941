"""Group commit: appends from all runs meet in one queue and share one transaction.

While one commit is in flight the next batch gathers; it leaves as soon as the disk has answered. No
timer, so a lone step waits for nobody, and a hundred runs pay one fsync.

`WriterCore` is pure: it owns the queue and gives seq and digest at flush, per run in order (a
batch that failed would make earlier ones wrong). `GroupWriter` drives it. An entry counts as
recorded only when its commit has returned; a commit that failed for want of room is sent again,
byte for byte, until it lands: nothing else may be chosen for those seqs before.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Protocol

from llm_orchestrator.clock import Clock
from llm_orchestrator.errors import Fenced, Refused, StoreDamaged, StoreError, StoreReplaced
from llm_orchestrator.model import Draft, Entry, NewRun
from llm_orchestrator.store import journal
from llm_orchestrator.store.base import (
    Append,
    Batch,
    Change,
    Outcome,
    PutBlob,
    Receipt,
    StateChange,
)

logger = logging.getLogger(__name__)
BATCH_ENTRIES_MAX = 2_000
BATCH_BYTES_MAX = 16 << 20
_RETRY_S = (0.05, 0.2, 0.5, 1.0)


class CommitPort(Protocol):
    """The part of a store that a writer needs."""

    async def commit(self, batch: Batch) -> Receipt: ...


class Copy(Protocol):
    """A result that was paid for, in a second place."""

    async def written(self) -> None:
        """Return once it is there, or had to be given up. Raises nothing."""
        ...

    def settle(self, *, is_landed: bool) -> None:
        """The store has it; or it did not take it from us, and somebody may offer it again."""
        ...


class Sink(Protocol):
    """Where results of paid steps are put before they are offered to the store (the spool)."""

    def put(self, head: Head, draft: Draft) -> Copy:
        """Begin at once: what waits for a store that is away must be safe meanwhile."""
        ...


class Head:
    """The end of one run's journal as its driver knows it; only the writer moves it."""

    __slots__ = ("digest", "epoch", "is_fenced", "run_id", "seq")

    def __init__(
        self, run_id: str, epoch: int = 0, *, seq: int = 0, digest: bytes = journal.GENESIS
    ) -> None:
        self.run_id = run_id
        self.epoch = epoch
        self.seq = seq
        self.digest = digest
        self.is_fenced = False


class Ticket:
    """One request to append, waiting for its commit."""

    __slots__ = ("accept", "change", "changes", "copies", "drafts", "epoch", "future", "head")

    def __init__(
        self,
        head: Head,
        drafts: Sequence[Draft],
        *,
        future: asyncio.Future[None],
        change: StateChange | None,
        accept: NewRun | None,
        changes: Sequence[Change],
    ) -> None:
        self.head = head
        self.epoch = head.epoch
        self.drafts = drafts
        self.future = future
        self.change = change
        self.accept = accept
        self.changes = changes
        self.copies: Sequence[Copy] = ()


class _Part:
    """What one run adds to a batch that is being put together."""

    __slots__ = ("accept", "change", "changes", "digest", "entries", "seq")

    def __init__(self, head: Head) -> None:
        self.seq = head.seq
        self.digest = head.digest
        self.entries: list[Entry] = []
        self.accept: NewRun | None = None
        self.change: StateChange | None = None
        self.changes: list[Change] = []

    def add(self, ticket: Ticket, now_us: int) -> int:
        """Give the ticket's drafts their places; returns how many bytes they are."""
        size = 0
        run_id, epoch = ticket.head.run_id, ticket.epoch
        for kind, step, attempt, payload in ticket.drafts:
            size += len(payload)
            if len(payload) > journal.BLOB_BYTES_MIN:
                reference = journal.blob_reference(payload)
                self.changes.append(PutBlob(run_id, reference[1:], payload))
                payload = reference
            self.seq += 1
            columns = (self.seq, epoch, kind, step, attempt, payload)
            self.digest = journal.link(self.digest, run_id, columns)
            self.entries.append(Entry(run_id, *columns, self.digest, now_us))
        self.changes.extend(ticket.changes)
        self.accept = self.accept or ticket.accept
        self.change = ticket.change
        return size


class WriterCore:
    """The queue, and how it becomes batches. No I/O, no clock of its own."""

    def __init__(self) -> None:
        self.queue: list[Ticket] = []

    def next_batch(self, now_us: int) -> tuple[Batch, list[Ticket]]:
        """Take what fits out of the queue. At most one state change per run and batch, in order.

        What is queued behind an entry that did not land must not land either: it is refused here.
        """
        taken: list[Ticket] = []
        parts: dict[Head, _Part] = {}
        owners: dict[str, Head] = {}
        size = count = position = 0
        for ticket in self.queue:
            head = ticket.head
            if head.is_fenced:
                position += 1
                _refuse(ticket, Fenced(f"run {head.run_id} has another owner"))
                continue
            if count >= BATCH_ENTRIES_MAX or size >= BATCH_BYTES_MAX:
                break
            if owners.setdefault(head.run_id, head) is not head:
                break
            part = parts.get(head)
            if part is None:
                part = parts[head] = _Part(head)
            elif part.change is not None:
                break
            position += 1
            size += part.add(ticket, now_us)
            count += len(ticket.drafts)
            taken.append(ticket)
        del self.queue[:position]
        appends = [
            Append(
                head.run_id,
                head.seq,
                head.digest,
                part.entries,
                part.accept,
                part.change,
                part.changes,
            )
            for head, part in parts.items()
            if part.entries or part.changes
        ]
        return Batch(appends), taken

    @staticmethod
    def settle(batch: Batch, tickets: Sequence[Ticket], receipt: Receipt) -> None:
        """Move the heads that landed and tell every waiter."""
        ends = {append.run_id: append.entries[-1] for append in batch.appends if append.entries}
        refused = receipt.refused
        for ticket in tickets:
            head, future = ticket.head, ticket.future
            outcome = refused.get(head.run_id) if refused else None
            if outcome is None:
                end = ends.get(head.run_id)
                if end is not None:
                    head.seq, head.digest = end.seq, end.digest
                for copy in ticket.copies:
                    copy.settle(is_landed=True)
                if not future.done():
                    future.set_result(None)
                continue
            head.is_fenced = True
            _refuse(ticket, _refusal(head, outcome))


class GroupWriter:
    """Drives a WriterCore against a store."""

    def __init__(self, store: CommitPort, clock: Clock, sinks: Sequence[Sink] = ()) -> None:
        self._store = store
        self._clock = clock
        self._sinks = sinks
        self._core = WriterCore()
        self._wake: asyncio.Future[None] | None = None
        self._task: asyncio.Task[None] | None = None
        self._is_closing = False
        self._is_hurried = False
        self._lives = 1
        self.batches = 0
        self.entries = 0

    def start(self) -> None:
        """Begin to commit. Call on the event loop."""
        self._task = asyncio.get_running_loop().create_task(self._run(), name="group-writer")

    def append(
        self,
        head: Head,
        drafts: Sequence[Draft],
        *,
        change: StateChange | None = None,
        accept: NewRun | None = None,
        changes: Sequence[Change] = (),
        is_paid: bool = False,
    ) -> asyncio.Future[None]:
        """Queue entries of one run. The future ends when they are durable.

        `is_paid` says that the drafts are results which cost money: they are put into the sinks
        first. It raises Fenced when another owner has the run, Refused when an acceptance
        conflicts, and StoreError when the store is gone for good.
        """
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        ticket = Ticket(head, drafts, future=future, change=change, accept=accept, changes=changes)
        if is_paid and self._sinks:
            ticket.copies = [sink.put(head, draft) for sink in self._sinks for draft in drafts]
        if head.is_fenced:
            _refuse(ticket, Fenced(f"run {head.run_id} has another owner"))
            return future
        if self._is_closing:
            _refuse(ticket, StoreError("the writer is closed"))
            return future
        self._core.queue.append(ticket)
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)
        return future

    def hurry(self) -> None:
        """From now on a store that cannot take a batch is given a few seconds, not for ever."""
        self._is_hurried = True

    def forget(self) -> None:
        """A restore has put another store in its place: nothing of before may land in it."""
        self._lives += 1
        _fail(self._core.queue, _replaced())
        self._core.queue.clear()

    async def close(self) -> None:
        """Commit what is queued, then stop."""
        self._is_closing = self._is_hurried = True
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)
        if self._task is not None:
            await self._task

    async def _run(self) -> None:
        queue = self._core.queue
        while True:
            if not queue:
                if self._is_closing:
                    return
                self._wake = asyncio.get_running_loop().create_future()
                await self._wake
                self._wake = None
                continue
            try:
                batch, tickets = self._core.next_batch(self._clock.now_us())
            except Exception as error:  # nobody may wait for ever, whatever it is
                logger.exception("a defect in the writer")
                _fail(queue, error)
                queue.clear()
                continue
            try:
                receipt = await self._land(batch, tickets)
            except BaseException as error:
                _fail(tickets, error)
                if not isinstance(error, Exception):
                    raise
                if not isinstance(error, StoreError):
                    logger.exception("a defect in the store")
                continue
            self.batches += 1
            self.entries += sum(len(append.entries) for append in batch.appends)
            self._core.settle(batch, tickets, receipt)

    async def _land(self, batch: Batch, tickets: Sequence[Ticket]) -> Receipt:
        """Commit, again and again while the store says that it can only not take it now."""
        if self._sinks:
            for copy in [copy for ticket in tickets for copy in ticket.copies]:
                await copy.written()
        tries, life = 0, self._lives
        while True:
            if life != self._lives:
                raise _replaced()
            try:
                return await self._store.commit(batch)
            except StoreError as error:
                if not error.retryable or (self._is_hurried and tries >= len(_RETRY_S)):
                    raise
                log = logger.error if tries == 0 else logger.debug
                log("%s; results are kept in memory and written when there is room", error.message)
                await self._clock.sleep(_RETRY_S[min(tries, len(_RETRY_S) - 1)])
                tries += 1


def _replaced() -> StoreReplaced:
    return StoreReplaced("the store was restored before this was committed")


def _fail(tickets: Sequence[Ticket], error: BaseException) -> None:
    """Their outcome is not known to be good: the heads may not be used again."""
    known = error if isinstance(error, StoreError) else StoreError(f"the store failed: {error!r}")
    for ticket in tickets:
        ticket.head.is_fenced = True
        _refuse(ticket, known)


def _refuse(ticket: Ticket, error: BaseException) -> None:
    for copy in ticket.copies:
        copy.settle(is_landed=False)
    future = ticket.future
    if not future.done():
        future.set_exception(error)
        future.exception()  # a waiter that is gone leaves no "never retrieved" warning


def _refusal(head: Head, outcome: Outcome) -> BaseException:
    if outcome is Outcome.FENCED:
        return Fenced(f"run {head.run_id} has another owner")
    if outcome is Outcome.DAMAGED:
        return StoreDamaged(
            f"run {head.run_id} is damaged: its pages cannot be read, or entry {head.seq} is not "
            "there as it was written (or the store was put back)",
            run_id=head.run_id,
            hint=f"llmo journal repair {head.run_id}",
        )
    if outcome is Outcome.UNFIT:
        return Refused(f"run {head.run_id} holds a name or a number that no store takes")
    return Refused(f"run {head.run_id} conflicts with what is stored")
