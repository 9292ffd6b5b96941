"""What a store is: one way in (`commit`), a few ways to look.

A `Batch` holds appends (at most one per run) and changes of other tables; it lands whole, except
that a run which cannot land (fenced, conflicting, damaged) is left out and named in the receipt.
Rule of the journal, whoever calls: a run's entries go in only if the store's incarnation is the
caller's, their predecessor (run, seq, digest) exists and seq + 1 does not. Accepting, claiming,
rewinding are entries too, so the primary key serialises everybody.

A commit whose outcome is unknown is sent again with the same bytes: an entry that is there already
with the same digest counts as landed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple, Protocol

from llm_orchestrator.clock import Clock
from llm_orchestrator.model import (
    Entry,
    Journal,
    Json,
    Message,
    NewRun,
    Run,
    RunState,
    Workflow,
)
from llm_orchestrator.store.audit import Audit, AuditShelf, ForgetAudit
from llm_orchestrator.store.news import NO_NEWS
from llm_orchestrator.store.news import News as News  # noqa: PLC0414 (part of this protocol)
from llm_orchestrator.store.statistics import Counts


class StateChange(NamedTuple):
    """The columns of `runs` that a state change sets, together with the entry that causes it."""

    state: str
    reason: str = ""
    owner: str | None = None
    wake_at: int = 0
    inbox_seen: int = 0
    """Parking keeps wake_at = 0 if the inbox has moved beyond this number."""
    output: bytes | None = None
    error: bytes | None = None


class Append(NamedTuple):
    """A run's entries, complete with seq and digest, after the entry (prev_seq, prev_digest).

    Without entries it only asks whether (prev_seq, prev_digest) is still the run's head, so that
    `changes` (pieces of a streamed answer) are fenced like everything else.
    """

    run_id: str
    prev_seq: int
    prev_digest: bytes
    entries: Sequence[Entry]
    accept: NewRun | None = None
    """Inserts the row of `runs`; only with prev_seq 0."""
    change: StateChange | None = None
    changes: Sequence[Change] = ()
    """Changes of other tables, also of other runs' inboxes: they stand and fall with these."""


class RunRow(NamedTuple):
    """A whole row of `runs`, as a journal says that it must be."""

    accept: NewRun
    change: StateChange
    epoch: int
    head_seq: int
    head_digest: bytes
    created_at: int
    started_at: int | None
    finished_at: int | None


@dataclass(frozen=True, slots=True)
class Post:
    """Put a message into a run's inbox and wake the run. A repeated `sender_key` does nothing."""

    run_id: str
    kind: str
    name: str = ""
    payload: Json = None
    sender_key: str | None = None


@dataclass(frozen=True, slots=True)
class Consume:
    """Take messages out of an inbox, in the transaction of the entry that records them."""

    run_id: str
    numbers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Register:
    """Keep a definition. The same name, version and digest again changes nothing."""

    workflow: Workflow


@dataclass(frozen=True, slots=True)
class Unregister:
    """Forget a workflow's definitions: one version's, or all of its name.

    Refused like a record that has moved when there is none, or while a run refers to any of them,
    ended or not: a run that is retried, rewound or explained needs its definition.
    """

    name: str
    version: str | None = None


@dataclass(frozen=True, slots=True)
class PutRecord:
    """Write `records(kind, key)` if its version is still `version` (0: it must not exist).

    `value` None deletes. Another version refuses the append that it comes with (Outcome.CONFLICT),
    or all of the batch's own changes when it comes with none.
    """

    kind: str
    key: str
    value: Json
    version: int
    run_id: str = ""


@dataclass(frozen=True, slots=True)
class PutBlob:
    """Keep bytes that an entry of `run_id` refers to by digest."""

    run_id: str
    digest: bytes
    content: bytes


@dataclass(frozen=True, slots=True)
class PutProgress:
    """Keep a piece of a streamed answer: part `part` of (run, step, attempt)."""

    run_id: str
    step: str
    attempt: int
    part: int
    text: str
    handle: Json = None


@dataclass(frozen=True, slots=True)
class DropProgress:
    """Forget a step's pieces, in the transaction of the entry that finishes it."""

    run_id: str
    step: str


@dataclass(frozen=True, slots=True)
class PutVectors:
    """Insert or replace vectors. Each row: (id, float32 bytes, metadata JSON bytes)."""

    index: str
    namespace: str
    rows: tuple[tuple[str, bytes, bytes], ...]


@dataclass(frozen=True, slots=True)
class Expire:
    """Remove whole runs, by policy; one that is not finished (any more) is left alone."""

    run_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Mend:
    """Put rows back as the chain proves that they were, and rebuild a row of `runs`.

    The row is rebuilt only while its head is still the journal's; refused otherwise.
    """

    run_id: str
    entries: tuple[Entry, ...] = ()
    row: RunRow | None = None


@dataclass(frozen=True, slots=True)
class Reindex:
    """Make all indexes anew from their tables."""


@dataclass(frozen=True, slots=True)
class TrimCommits:
    """Forget up to `limit` rows of `commits`, but the last `keep` of each node."""

    keep: int = 1_000
    limit: int = 5_000


Change = (
    Post
    | Consume
    | Register
    | Unregister
    | PutRecord
    | PutBlob
    | PutProgress
    | DropProgress
    | PutVectors
    | Expire
    | Mend
    | Reindex
    | TrimCommits
    | Audit
    | ForgetAudit
)


@dataclass(frozen=True, slots=True)
class Batch:
    """One transaction."""

    appends: Sequence[Append] = ()
    changes: Sequence[Change] = ()
    """Changes that belong to no append: all of them land, or none."""
    at: int = 0
    """When, microseconds on the store's clock; 0 for now. A batch that is committed again
    elsewhere (a store made anew out of the stream archive) has its time: the same rows."""

    def every_change(self) -> Iterator[Change]:
        """The changes of all appends, then the batch's own."""
        for append in self.appends:
            yield from append.changes
        yield from self.changes


def count_posts(changes: Sequence[Change], append: Append | None = None) -> int:
    """How many of them are Posts; those of `append` count, too."""
    more = append.changes if append is not None else ()
    return sum(isinstance(change, Post) for each in (changes, more) for change in each)


def news_of(batch: Batch) -> News:
    """What to tell of a batch that landed."""
    is_due = is_order = is_workflow = False
    freed, ended, parked, posted, mended = [], [], [], [], []
    for append in batch.appends:
        change = append.change
        if change is None:
            is_due = is_due or append.accept is not None
        elif change.state == RunState.PENDING:
            freed.append(append.run_id)
        elif change.state == RunState.WAITING:
            parked.append(append.run_id)
        elif change.state != RunState.RUNNING:
            ended.append(append.run_id)
    for each in batch.every_change():
        if isinstance(each, Post):
            posted.append(each.run_id)
        elif isinstance(each, Mend):
            mended.append(each.run_id)
        elif isinstance(each, PutRecord):
            is_due = is_due or each.kind == "schedule"
            is_order = is_order or each.kind == "maintenance" or _closes_breaker(each)
        elif isinstance(each, Register | Unregister):
            is_workflow = True
    if not (is_due or is_order or is_workflow or freed or ended or parked or posted or mended):
        return NO_NEWS
    is_due = is_due or bool(freed or mended)
    told = [frozenset(run_ids) for run_ids in (posted, freed, ended, parked, mended)]
    flags = {"is_order": is_order, "is_workflow": is_workflow}
    return News(is_due, told[0], told[1], told[2], told[3], told[4], **flags)


def _closes_breaker(change: PutRecord) -> bool:
    """What runs on every node may wait for, like an order."""
    value = change.value
    return change.kind == "breaker" and isinstance(value, dict) and value.get("state") == "closed"


class Outcome(StrEnum):
    """What became of one run's append."""

    LANDED = "landed"
    FENCED = "fenced"
    """Somebody else has written at this seq."""
    CONFLICT = "conflict"
    """The run is there already, or a record that comes with it has moved."""
    DAMAGED = "damaged"
    """Its pages cannot be read, or the predecessor is not there (or the store went back)."""
    UNFIT = "unfit"
    """Its content cannot be stored, whoever tries."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """Runs that did not land, and why; everything else of the batch is durable."""

    refused: Mapping[str, Outcome] = field(default_factory=dict)
    is_refused: bool = False
    """True when the batch's own changes were refused (a record's version moved)."""
    posted: tuple[int, ...] = ()
    """The number of each Post's message, in the order of `every_change`: 0 for one that was not
    put (refused, repeated, no such run), -1 where the store did not hear it."""


@dataclass(frozen=True, slots=True)
class Progress:
    """What is kept of a streamed answer."""

    attempt: int
    text: str
    handle: Json


@dataclass(frozen=True, slots=True)
class RunFilter:
    """Which runs `Store.runs` lists; newest first unless `is_oldest_first`."""

    states: tuple[RunState, ...] = ()
    workflow: str | None = None
    parent_run_id: str | None = None
    queue: str | None = None
    label: tuple[str, str] | None = None
    since: int | None = None
    """Accepted at this time or later, microseconds on the store's clock."""
    until: int | None = None
    """Accepted before this time."""
    before: str | None = None
    """Only runs with a smaller id (keyset paging)."""
    limit: int = 100


class NodeState(StrEnum):
    """How a node's life stands."""

    ALIVE = "alive"
    LEAVING = "leaving"
    """It said that it will go: its death is no surprise, and no run is blamed for it."""
    LEFT = "left"
    DEAD = "dead"
    """Somebody saw it gone or silent. Its runs may be taken over; it must come back as another."""


class Member(NamedTuple):
    """A row of `nodes`. `beat` only ever grows; times are the store's."""

    node_id: str
    region: str
    state: str
    beat: int
    is_connected: bool
    """False when the server no longer has the session from which the node beat last."""
    started_at: int
    heartbeat_at: int
    info: Json = None
    """What people want to know: host, process id, version, runs in memory."""


def lives(member: Member) -> bool:
    """True while a node may own runs."""
    return member.state in (NodeState.ALIVE, NodeState.LEAVING)


class Pulse(NamedTuple):
    """What a node learns from one beat."""

    server: str
    """Which server process answered; another one after a restart or a failover."""
    now_us: int
    """The store's clock."""
    members: Sequence[Member]
    """Every node that is not dead or gone, and always the one that asks."""
    session: int = 0
    """Which of the asker's sessions this was: another one after each reconnect."""


class Members(Protocol):
    """The nodes of a store, over a connection of their own. All may raise StoreError."""

    async def join(self, node_id: str, region: str, info: Json) -> None:
        """Add a node that lives from now on."""
        ...

    async def beat(self, node_id: str, info: Json) -> Pulse:
        """Give a sign of life (not if somebody has declared the node dead), and look around."""
        ...

    async def watch(self, node_id: str) -> Pulse:
        """Only look around."""
        ...

    async def bury(self, node_id: str, beat: int) -> bool:
        """Declare a node dead if it has not beaten since `beat`. False when it has."""
        ...

    async def leave(self, node_id: str, state: NodeState) -> None:
        """Say LEAVING or LEFT of oneself."""
        ...

    async def close(self) -> None: ...


class QueueLimit(NamedTuple):
    """What a queue allows over all nodes. 0 means no limit."""

    concurrency: int = 0
    """Runs that are driven at a time."""
    rate: int = 0
    """Starts per `period_s`."""
    period_s: float = 60.0
    tokens_per_minute: int = 0
    """Tokens that the runs of the queue use."""


class Wanted(NamedTuple):
    """What a node would like to claim."""

    limit: int
    now_us: int
    full_queues: Sequence[str] = ()
    strange: Sequence[str] = ()
    """Digests of workflows whose code is not here: these runs wait for a node that has it."""
    queue: str | None = None
    """Only this queue, of which at most `concurrency` runs may be driven by all nodes together."""
    concurrency: int = 0
    except_runs: Sequence[str] = ()


class Look(Protocol):
    """Reading runs and journals. Nothing here changes anything; all may raise StoreError."""

    async def load(self, run_ids: Sequence[str]) -> dict[str, Journal]:
        """Journals with their chains checked; unknown runs are absent. Blobs are filled in."""
        ...

    async def stored(self, run_id: str) -> list[Entry]:
        """The rows as they are, damaged ones included, as far as they can be read."""
        ...

    async def run(self, run_id: str) -> Run | None: ...

    async def runs(self, wanted: RunFilter) -> list[Run]: ...

    async def run_ids(self) -> list[str]:
        """Every run of which there is a row or an entry."""
        ...

    async def unfinished(self) -> list[str]:
        """Runs whose row is not final, or of which there are entries and no row."""
        ...

    async def next_wake(self) -> int | None:
        """The earliest wake_at of a run that nobody drives; None when there is none."""
        ...

    async def inbox(self, run_id: str) -> list[Message]:
        """Messages that nobody has consumed. Raises StoreDamaged for one that fails its digest."""
        ...

    async def inbox_seqs(self, run_ids: Sequence[str]) -> dict[str, int]:
        """How many messages each run was ever sent: what a park has seen if it asked this first."""
        ...

    async def progress(self, run_id: str, step: str) -> Progress | None:
        """The pieces of the newest attempt, joined."""
        ...

    async def row(self, run_id: str) -> RunRow | None:
        """The row of `runs` with its anchor, unchecked; None when it is gone or makes no sense."""
        ...

    async def expirable(self, *, finished_before: int, keep: int, limit: int) -> list[Run]:
        """The oldest finished runs, beyond an age or beyond the newest `keep`."""
        ...

    async def structure(self) -> list[str]:
        """What the database's own check of its pages finds; empty when they are whole."""
        ...


class Shelf(AuditShelf, Protocol):
    """Reading what is not a run: definitions, records, vectors, nodes, the audit log."""

    async def workflow(
        self, name: str, version: str | None = None, digest: str | None = None
    ) -> Workflow | None:
        """A definition, its digest checked; the newest where version and digest leave a choice."""
        ...

    async def workflows(self) -> list[Workflow]: ...

    async def record(self, kind: str, key: str) -> tuple[Json, int]:
        """Value and version of a record; (None, 0) when there is none."""
        ...

    async def records(self, kind: str) -> dict[str, Json]: ...

    async def vectors(
        self, index: str, namespace: str, *, near: Sequence[float] = (), limit: int = 0
    ) -> list[tuple[str, bytes, bytes]]:
        """(id, float32 bytes, metadata JSON bytes) of a whole namespace.

        A store that can tell gives only the `limit` ones nearest to `near` by cosine.
        """
        ...

    async def nodes(self, limit: int = 100) -> list[Member]:
        """The nodes that there are and lately were, newest first."""
        ...


class Store(Protocol):
    """A database that keeps journals: one way in, two ways to look."""

    node_id: str
    generation: int
    """Grows at each restore; the upper part of every epoch."""
    incarnation: str
    """New at each restore and each copy; empty before the store is open."""

    @property
    def look(self) -> Look: ...

    @property
    def shelf(self) -> Shelf: ...

    async def commit(self, batch: Batch) -> Receipt:
        """Make `batch` durable. Returns once it is; raises if nothing of it can be."""
        ...

    async def pick(self, node_id: str, wanted: Wanted) -> list[Run]:
        """Runs to claim, set aside for `node_id` for a moment so that others pick other ones.

        Only an offer: what claims a run is the entry that says so. By priority, then age.
        """
        ...

    async def adopt(
        self,
        node_id: str,
        limit: int,
        except_runs: Sequence[str] = (),
        *,
        strange: Sequence[str] = (),
    ) -> list[str]:
        """Like `pick`, for runs whose owner is a node that does not live (any more)."""
        ...

    async def put_back(self, node_id: str, run_ids: Sequence[str]) -> None:
        """Runs that were picked and are not to be claimed: other nodes may have them at once."""
        ...

    async def members(self) -> Members:
        """A connection for heartbeats. Belongs to the event loop (and thread) that asks for it."""
        ...

    async def renew(self) -> None:
        """After a restore: take the store for what it is now, once all of before is dropped."""

    def on_news(self, listener: Callable[[News], None]) -> None:
        """Call `listener` after commits: at once after this process's, soon after other nodes'."""
        ...

    async def close(self) -> None: ...


class Database(Store, Protocol):
    """A store that can be opened: as a node's, or only to look and to ask."""

    @property
    def clock(self) -> Clock:
        """The store's time."""
        ...

    @property
    def counts(self) -> Counts:
        """How much of what is in it."""
        ...

    @property
    def shown(self) -> str:
        """Where it is, fit for messages: no password."""
        ...

    async def open_as_engine(self) -> None:
        """Open for a node. Raises StoreError's subclasses, each with a hint."""
        ...

    async def open_as_client(self, *, may_create: bool = False) -> None:
        """Open to look and to ask."""
        ...

    async def is_served(self) -> bool:
        """True when a node lives that drives this store's runs."""
        ...
