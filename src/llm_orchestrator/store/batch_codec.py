"""A batch as bytes, for the stream archive: small, fast, and the same rows when it is read.

Payloads travel as they are stored (`journal.Stored`), never decoded and encoded again. Pieces of
streamed answers, new indexes and what counts commits are left out: losing them costs no truth.

The hot path is a batch of plain steps: its entries go through msgspec untouched. What no column
takes (a lone surrogate, a number beyond 64 bits, a value that is no JSON) is left out as `None`
where its run or the batch's own changes stood: no store lands it either.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from llm_orchestrator.errors import StoreDamaged, TooLarge
from llm_orchestrator.model import Entry, NewRun, Workflow
from llm_orchestrator.store import base
from llm_orchestrator.store.audit import Audit, AuditEntry, ForgetAudit
from llm_orchestrator.store.base import Append, Batch, Change, RunRow, StateChange
from llm_orchestrator.store.journal import Stored, canonical, canonical_value, encode_value

LEFT_OUT = (base.PutProgress, base.DropProgress, base.Reindex, base.TrimCommits)
_UNFIT = (TypeError, ValueError, OverflowError, RecursionError, TooLarge)
Row = Sequence[Any]


def _hook(value: object) -> object:
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, bytes):
        return bytes(value)
    raise TypeError(f"{type(value).__name__} is no column")


_encode = msgspec.msgpack.Encoder(enc_hook=_hook).encode
_decode = msgspec.msgpack.Decoder().decode


def is_archived(batch: Batch) -> bool:
    """True when there is anything in it that a copy needs."""
    if any(append.entries or append.accept for append in batch.appends):
        return True
    return any(not isinstance(change, LEFT_OUT) for change in batch.every_change())


def to_bytes(value: object) -> bytes:
    """What `plain` gave, or anything that is made of such. Raises what `plain` leaves out."""
    return _encode(value)


def from_bytes(data: bytes) -> Any:
    """The inverse. Raises StoreDamaged."""
    try:
        return _decode(data)
    except msgspec.DecodeError as error:
        raise StoreDamaged(f"archived bytes make no sense: {error}") from error


def plain(batch: Batch) -> tuple[list[Any], list[Any] | None]:
    """Its appends and its own changes, for `to_bytes`. Nothing is checked as yet but JSON."""
    appends: list[Any] = []
    for append in batch.appends:
        if append.accept is None and not append.changes:
            appends.append(append)
            continue
        try:
            accept: Any = None if append.accept is None else _new_run(append.accept)
            rows: Any = _changes(append.changes)
            appends.append(append._replace(accept=accept, changes=rows))
        except _UNFIT:
            appends.append(None)
    if not batch.changes:
        return appends, []
    try:
        return appends, _changes(batch.changes)
    except _UNFIT:
        return appends, None


def fitting(appends: Sequence[Any], changes: Any) -> tuple[list[Any], Any]:
    """What of `plain` can be encoded; None in place of what cannot."""
    return [_fit(append) for append in appends], _fit(changes)


def _fit(value: Any) -> Any:
    try:
        _encode(value)
    except _UNFIT:
        return None
    return value


def batch_of(at: int, appends: Sequence[Any], changes: Sequence[Row] | None) -> Batch:
    """The inverse of `plain`, without what had been left out. Raises StoreDamaged."""
    try:
        return Batch(
            tuple(_append_of(append) for append in appends if append is not None),
            tuple(map(_change_of, changes or ())),
            at,
        )
    except (TypeError, ValueError, KeyError, IndexError) as error:
        raise StoreDamaged(f"an archived batch makes no sense: {error}") from error


def _append_of(row: Row) -> Append:
    run_id, seq, digest, entries, accept, change, changes = row
    return Append(
        run_id,
        seq,
        digest,
        tuple(map(Entry._make, entries)),
        None if accept is None else _run_of(accept),
        None if change is None else StateChange._make(change),
        tuple(map(_change_of, changes)),
    )


def _new_run(run: NewRun) -> Row:
    return (
        *(run.run_id, run.workflow, run.version, run.digest, run.priority, run.queue),
        *(run.idempotency_key, run.parent_run_id, run.wake_at),
        canonical(dict(run.origin)),
        canonical(dict(run.labels)),
        encode_value(run.input),
    )


def _run_of(row: Row) -> NewRun:
    columns: Any = row[:9]
    origin, labels, value = row[9:]
    values = {"origin": json.loads(origin), "labels": json.loads(labels), "input": Stored(value)}
    return NewRun(*columns, **values)


# -- changes: a code, and the columns -------------------------------------------------------------


def _changes(changes: Iterable[Change]) -> list[Any]:
    return [
        (_CODES[type(change)][0], *_CODES[type(change)][1](change))
        for change in changes
        if not isinstance(change, LEFT_OUT)
    ]


def _change_of(row: Row) -> Change:
    code, *columns = row
    change: Change = _MAKERS[code](*columns)
    return change


def _value(value: Any) -> bytes | None:
    return None if value is None else canonical_value(value)


def _make_record(kind: str, key: str, value: bytes | None, *rest: Any) -> base.PutRecord:
    return base.PutRecord(kind, key, None if value is None else Stored(value), *rest)


def _make_mend(run_id: str, entries: Sequence[Row], row: Row | None) -> base.Mend:
    made = None
    if row is not None:
        accept, change, *rest = row
        made = RunRow(_run_of(accept), StateChange._make(change), *rest)
    return base.Mend(run_id, tuple(map(Entry._make, entries)), made)


def _mend(change: base.Mend) -> Row:
    row = change.row
    return (
        change.run_id,
        change.entries,
        None if row is None else (_new_run(row.accept), *row[1:]),
    )


_Pack = Callable[[Any], Row]
_TABLE: tuple[tuple[int, type[Any], _Pack, Callable[..., Change]], ...] = (
    (
        1,
        base.Post,
        lambda each: (
            *(each.run_id, each.kind, each.name),
            encode_value(each.payload),
            each.sender_key,
        ),
        lambda run, kind, name, payload, key: base.Post(run, kind, name, Stored(payload), key),
    ),
    (
        2,
        base.Consume,
        lambda each: (each.run_id, each.numbers),
        lambda run, numbers: base.Consume(run, tuple(numbers)),
    ),
    (
        3,
        base.Register,
        lambda each: (
            *(each.workflow.name, each.workflow.version, each.workflow.digest),
            *(each.workflow.definition, each.workflow.created_at),
        ),
        lambda *columns: base.Register(Workflow(*columns)),
    ),
    (4, base.Unregister, lambda each: (each.name, each.version), base.Unregister),
    (
        5,
        base.PutRecord,
        lambda each: (each.kind, each.key, _value(each.value), each.version, each.run_id),
        _make_record,
    ),
    (6, base.PutBlob, lambda each: (each.run_id, each.digest, each.content), base.PutBlob),
    (
        7,
        base.PutVectors,
        lambda each: (each.index, each.namespace, each.rows),
        lambda index, space, rows: base.PutVectors(index, space, tuple(map(tuple, rows))),
    ),
    (
        8,
        base.Expire,
        lambda each: (each.run_ids,),
        lambda runs: base.Expire(tuple(runs)),
    ),
    (9, base.Mend, _mend, _make_mend),
    (
        10,
        Audit,
        lambda each: (each.entries,),
        lambda rows: Audit(tuple(map(AuditEntry._make, rows))),
    ),
    (11, ForgetAudit, lambda each: (each.chain_id,), ForgetAudit),
)
_CODES = {kind: (code, pack) for code, kind, pack, _ in _TABLE}
_MAKERS = {code: make for code, _, _, make in _TABLE}
