"""How a batch becomes one statement: arrays for each part that the batch needs.

Pure: no connection here. What cannot be said in one statement, because two of its changes touch
the same row or because the kind is rare, is said `in turn` (see postgres_turn.py): the same
sequential statements that SQLite runs, in one transaction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from llm_orchestrator.store.audit import Audit
from llm_orchestrator.store.base import (
    Append,
    Change,
    Consume,
    DropProgress,
    Post,
    PutProgress,
    PutRecord,
)
from llm_orchestrator.store.journal import canonical, canonical_value, encode_value
from llm_orchestrator.store.queries import Query, compose
from llm_orchestrator.store.rows import is_run_id, row_digest

_COMMON = (Post, Consume, PutRecord, PutProgress, DropProgress, Audit)
_ENTRY = ("run_id", "seq", "epoch", "kind", "step", "attempt", "payload", "digest", "recorded_at")
_HEAD = ("head_run", "head_seq", "head_digest")
_ACCEPTED = tuple(
    f"a_{name}"
    for name in (
        *("run", "workflow", "version", "digest", "state", "reason", "owner", "epoch", "priority"),
        *("queue", "key", "parent", "wake", "first", "labels", "origin", "input", "output"),
        *("error", "seq", "head"),
    )
)
_CHANGED = tuple(
    f"c_{name}"
    for name in (
        *("run", "state", "reason", "owner", "epoch", "wake", "seen", "output", "error", "seq"),
        "head",
    )
)
_MAILED = tuple(
    f"m_{name}" for name in ("via", "run", "place", "kind", "name", "payload", "key", "digest")
)
_CONSUMED = ("t_via", "t_run", "t_number")
_RECORDED = tuple(f"p_{name}" for name in ("via", "kind", "key", "value", "version", "digest"))
_KEPT = tuple(
    f"k_{name}" for name in ("via", "run", "step", "attempt", "part", "text", "handle", "digest")
)
_DROPPED = ("d_via", "d_run", "d_step")
_AUDITED = tuple(
    f"u_{name}"
    for name in (
        *("via", "chain", "number", "at", "actor", "action", "target", "result", "detail"),
        *("request", "previous", "digest"),
    )
)


@dataclass(slots=True)
class Statement:
    """What goes over the wire: a query, its values, and whose entries are in it."""

    query: Query
    values: dict[str, Any]
    heads: Sequence[Append]
    entries: int
    digest: bytes
    posts: Sequence[Post] = ()
    """In the order of their places."""

    def bind(self, lane: str, number: int, incarnation: str) -> tuple[object, ...]:
        """The values in the statement's order."""
        return self.query.bind(
            **self.values,
            lane=lane,
            number=number,
            incarnation=incarnation,
            entries=self.entries,
            batch=self.digest,
        )


def group(appends: Sequence[Append]) -> Iterator[list[Append]]:
    """`appends`, in groups that one statement can say each; one that none can stands alone.

    A row can change once in a statement: mail for a run whose own row changes goes a statement
    later. Rows of `runs` are touched in the order of their ids, so that two nodes do not wait for
    each other.
    """
    rows: set[str] = set()
    mailed: set[str] = set()
    others: set[object] = set()
    chosen: list[Append] = []
    for append in appends:
        own, mail, keys = _touched(append)
        is_rare = not is_plain(append)
        if chosen and (is_rare or own & mailed or mail & (rows | own) or keys & others):
            yield _by_id(chosen)
            chosen, rows, mailed, others = [], set(), set(), set()
        if is_rare:
            yield [append]
            continue
        chosen.append(append)
        rows |= own
        mailed |= mail
        others |= keys
    if chosen:
        yield _by_id(chosen)


def _by_id(appends: list[Append]) -> list[Append]:
    return sorted(appends, key=lambda append: append.run_id)


def is_plain(append: Append) -> bool:
    """True when one statement can say all of it: its run's row changes once."""
    own, mail, _ = _touched(append)
    return not own & mail and is_common(append.changes)


def is_common(changes: Sequence[Change]) -> bool:
    """True when one statement can say all of them: no rare kind, no row twice."""
    if not changes:
        return True
    if any(not isinstance(change, _COMMON) for change in changes):
        return False
    keys = [key for change in changes if (key := _key(change)) is not None]
    return len(set(keys)) == len(keys)


def _touched(append: Append) -> tuple[set[str], set[str], set[object]]:
    own = {append.run_id} if append.change or append.accept else set()
    if not append.changes:
        return own, set(), set()
    mail = {change.run_id for change in append.changes if isinstance(change, Post)}
    keys = {key for change in append.changes if (key := _key(change)) is not None}
    return own, mail, keys


def _key(change: Change) -> object:
    """The row that a change is about, where two changes of one row must come one after another."""
    match change:
        case PutRecord():
            return (change.kind, change.key)
        case PutProgress():
            return (change.run_id, change.step, change.attempt, change.part)
        case Post() if change.sender_key is not None:
            return (change.run_id, change.sender_key)
    return None


def state(appends: Sequence[Append], changes: Sequence[Change], now_us: int) -> Statement:
    """One statement for all of them. Raises what a value raises that no column takes."""
    if len(appends) == 1 and not changes and _is_bare(appends[0]):
        return _one(appends[0])
    parts, checks = [], [] if appends else ["same_store_check"]
    entries = [entry for append in appends for entry in _checked(append)]
    values: dict[str, Any] = dict(zip(_ENTRY, _columns(entries, len(_ENTRY)), strict=True))
    heads = [(append.run_id, append.prev_seq, append.prev_digest) for append in appends]
    values.update(zip(_HEAD, _columns(heads, len(_HEAD)), strict=True))
    accepted = [_accepted(append) for append in appends if append.accept is not None]
    if accepted:
        parts.append("accepted")
        values.update(zip(_ACCEPTED, _columns(accepted, len(_ACCEPTED)), strict=True))
    changed = [
        _changed(append)
        for append in appends
        if append.change is not None and append.accept is None
    ]
    if changed:
        parts.append("changed")
        checks.append("changed_check")
        values.update(zip(_CHANGED, _columns(changed, len(_CHANGED)), strict=True))
    pairs = [(append.run_id, change) for append in appends for change in append.changes]
    side = _Side()
    for via, change in pairs:
        side.add(via, change)
    for change in changes:
        side.add(None, change)
    for name, columns, rows in side.tables():
        parts.append(name)
        values.update(zip(columns, _columns(rows, len(columns)), strict=True))
    if side.recorded:
        checks.append("recorded_check")
    if accepted or changed or side.mailed:
        values["now"] = now_us
    digests = b"".join(append.entries[-1].digest for append in appends if append.entries)
    digest = blake2b(digests, digest_size=32).digest()
    query = compose(tuple(parts), tuple(checks))
    return Statement(query, values, appends, len(entries), digest, side.posts)


def _is_bare(append: Append) -> bool:
    """True when it is one entry, and neither a row of `runs` nor anything else changes."""
    is_row_still = append.change is None and append.accept is None
    return is_row_still and not append.changes and len(append.entries) == 1


def _one(append: Append) -> Statement:
    """The statement for a step that is alone in its commit."""
    entry = _checked(append)[0]
    values = dict(zip(_ENTRY, entry, strict=True))
    values.update(zip(_HEAD, (append.run_id, append.prev_seq, append.prev_digest), strict=True))
    digest = blake2b(entry.digest, digest_size=32).digest()
    return Statement(compose((), (), has_single_rows=True), values, (append,), 1, digest)


@dataclass(slots=True)
class _Side:
    """Rows of the tables beside the journal."""

    mailed: list[tuple[Any, ...]] = field(default_factory=list)
    consumed: list[tuple[Any, ...]] = field(default_factory=list)
    recorded: list[tuple[Any, ...]] = field(default_factory=list)
    kept: list[tuple[Any, ...]] = field(default_factory=list)
    dropped: list[tuple[Any, ...]] = field(default_factory=list)
    audited: list[tuple[Any, ...]] = field(default_factory=list)
    posts: list[Post] = field(default_factory=list)
    """What `mailed` has, as it was asked for."""

    def tables(self) -> Iterator[tuple[str, tuple[str, ...], list[tuple[Any, ...]]]]:
        """The parts that there is something for."""
        for name, columns, rows in (
            ("mailed", _MAILED, self.mailed),
            ("consumed", _CONSUMED, self.consumed),
            ("recorded", _RECORDED, self.recorded),
            ("kept", _KEPT, self.kept),
            ("dropped", _DROPPED, self.dropped),
            ("audited", _AUDITED, self.audited),
        ):
            if rows:
                yield name, columns, rows

    def add(self, via: str | None, change: Change) -> None:
        """File one change. About a run whose id no column takes there is nothing to do."""
        if isinstance(change, Post | Consume | DropProgress) and not is_run_id(change.run_id):
            return
        match change:
            case Post():
                payload = encode_value(change.payload)
                digest = mail_digest(change, payload)
                row = (change.kind, change.name, payload, change.sender_key, digest)
                self.mailed.append((via, change.run_id, len(self.mailed), *row))
                self.posts.append(change)
            case Consume():
                self.consumed += [(via, change.run_id, number) for number in change.numbers]
            case PutRecord():
                value = None if change.value is None else canonical_value(change.value)
                digest = row_digest(change.kind, change.key, change.version + 1, value or b"")
                self.recorded.append((via, change.kind, change.key, value, change.version, digest))
            case PutProgress():
                self.kept.append((via, *progress_row(change)))
            case DropProgress():
                self.dropped.append((via, change.run_id, change.step))
                self.kept = [row for row in self.kept if row[1:3] != (change.run_id, change.step)]
            case Audit():
                self.audited += [(via, *entry) for entry in change.entries]
            case _:
                raise TypeError(f"{type(change).__name__} is no common change")


def mail_digest(post: Post, payload: bytes) -> bytes:
    """Over all of a message but its number, which the server gives and adds to it."""
    return row_digest(post.run_id, post.kind, post.name, post.sender_key, payload)


def progress_row(change: PutProgress) -> tuple[Any, ...]:
    """A row of `progress`. Text is kept as bytes: PostgreSQL's has no room for a null byte."""
    handle = encode_value(change.handle)
    where = (change.run_id, change.step, change.attempt, change.part)
    return (*where, change.text.encode(), handle, row_digest(*where, change.text, handle))


def _checked(append: Append) -> Sequence[Any]:
    seq = append.prev_seq
    for entry in append.entries:
        seq += 1
        if entry.seq != seq or entry.run_id != append.run_id:
            raise ValueError("an entry stands at a place that is not its own")
    return append.entries


def _columns(rows: Sequence[tuple[Any, ...]], count: int) -> list[Sequence[Any]]:
    return list(zip(*rows, strict=True)) if rows else [()] * count


def _accepted(append: Append) -> tuple[Any, ...]:
    new, change = append.accept, append.change
    assert new is not None
    labels, origin = canonical(dict(new.labels)).decode(), canonical(dict(new.origin)).decode()
    head = (new.run_id, new.workflow, new.version, new.digest)
    value = encode_value(new.input)
    standing: tuple[Any, ...]
    if change is None:
        standing = ("pending", "", None, 0)
        wake_at, output, error, seq, digest = new.wake_at, None, None, 0, None
    else:
        last = append.entries[-1]
        standing = (str(change.state), change.reason, change.owner, last.epoch)
        wake_at, output, error = change.wake_at, change.output, change.error
        seq, digest = last.seq, last.digest
    parent = new.parent_run_id
    rest = (new.priority, new.queue, new.idempotency_key, parent, wake_at, new.wake_at)
    return (*head, *standing, *rest, labels, origin, value, output, error, seq, digest)


def _changed(append: Append) -> tuple[Any, ...]:
    change, last = append.change, append.entries[-1]
    assert change is not None
    head = (append.run_id, str(change.state), change.reason, change.owner, last.epoch)
    tail = (change.output, change.error, last.seq, last.digest)
    return (*head, change.wake_at, change.inbox_seen, *tail)
