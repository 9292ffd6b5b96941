"""The writing statement (queries.sql, `append` and its parts) as PostgreSQL would carry it out.

All parts read the snapshot that was taken when the statement began; others may commit between the
parts. What a part of the statement guarantees is a method of its own here, so that a planted bug
can take one guarantee away.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import asyncpg  # type: ignore[import-untyped]

from tests.simulation.mvcc import Row, Steps, Tables, Transaction

if TYPE_CHECKING:
    from tests.simulation.server import Server

FINAL = ("completed", "failed", "cancelled")
Values = Mapping[str, Any]


def unnest(values: Values, prefix: str, *names: str) -> list[tuple[Any, ...]]:
    """Columns as rows."""
    return list(zip(*(values[prefix + name] for name in names), strict=True))


class Append:
    """See the module's docstring. One for each server."""

    def __init__(self, server: Server) -> None:
        self.server = server

    @property
    def tables(self) -> Tables:
        return self.server.tables

    def run(self, tx: Transaction, parts: tuple[str, ...], v: Values) -> Steps:
        """Rows of the statement: one, with the runs whose entries went in, and what parts say."""
        head = {
            run_id
            for run_id, seq, digest in unnest(v, "head_", "run", "seq", "digest")
            if self.is_mine(tx, v["incarnation"]) and self.is_next(tx, run_id, (seq, digest))
            if self.is_owned(tx, run_id, v)
        }
        yield self.server.pause()
        columns = ("run_id", "seq", "epoch", "kind", "step", "attempt", "payload", "digest")
        for entry in sorted(unnest(v, "", *columns, "recorded_at")):
            if entry[0] in head:
                yield from self.insert_entry(tx, entry)
        where = ("commits", (v["lane"], v["number"]))
        yield from self.tables.insert(tx, where, (v["entries"], v["batch"]))
        counts: dict[str, Any] = {}
        for part in parts:
            yield self.server.pause()
            counts[part] = (yield from getattr(self, part)(tx, head, v)) or 0
        if "changed" in parts:
            self.check(counts["changed"] == len(head & set(v["c_run"])))
        if "recorded" in parts:
            self.check(counts["recorded"] == sum(via in head or via is None for via in v["p_via"]))
        order = [run_id for run_id in v["head_run"] if run_id in head]
        return [(order, 1, counts["mailed"] or [])] if "mailed" in parts else [(order, 1)]

    @staticmethod
    def check(holds: bool) -> None:
        """The end of the statement divides by this."""
        if not holds:
            raise asyncpg.DivisionByZeroError("division by zero")

    # -- what fences -----------------------------------------------------------------------------

    def is_mine(self, tx: Transaction, incarnation: str) -> bool:
        """The store is still the one that the caller opened."""
        return bool(self.tables.get("store", 1, tx)[0] == incarnation)

    def is_next(self, tx: Transaction, run_id: str, head: tuple[int, bytes]) -> bool:
        """The predecessor is there with its digest, and nobody stands behind it."""
        seq, digest = head
        before = self.tables.get("journal", (run_id, seq), tx) if seq else None
        after = self.tables.get("journal", (run_id, seq + 1), tx)
        return (seq == 0 or (before is not None and before[7] == digest)) and after is None

    def is_owned(self, tx: Transaction, run_id: str, v: Values) -> bool:
        """Nothing more: the key decides. (Planted bugs fence in other ways here.)"""
        return True

    def insert_entry(self, tx: Transaction, entry: Row) -> Steps:
        """A plain INSERT: it waits for an uncommitted one, and fails for a committed one."""
        yield from self.tables.insert(tx, ("journal", (entry[0], entry[1])), entry)

    # -- parts -----------------------------------------------------------------------------------

    def accepted(self, tx: Transaction, head: set[str], v: Values) -> Steps:
        names: tuple[str, ...]
        names = ("run", "workflow", "version", "digest", "state", "reason", "owner", "epoch")
        names += ("priority", "queue", "key", "parent", "wake", "first", "labels", "origin")
        for row in unnest(v, "a_", *names, "input", "output", "error", "seq", "head"):
            if row[0] not in head:
                continue
            new = dict(zip(RUN_COLUMNS, row, strict=True))
            state = new["state"]
            new["inbox_seq"], new["created_at"] = 0, v["now"]
            new["started_at"] = v["now"] if state == "running" else None
            new["finished_at"] = v["now"] if state in FINAL else None
            new["picked_until"], new["picked_by"] = 0, None
            yield from self.tables.insert(tx, ("runs", row[0]), new)

    def changed(self, tx: Transaction, head: set[str], v: Values) -> Steps:
        count = 0
        names = ("run", "state", "reason", "owner", "epoch", "wake", "seen", "output", "error")
        for row in unnest(v, "c_", *names, "seq", "head"):
            if row[0] in head:
                change = partial(self.standing, columns=row[1:], now=v["now"])
                done = yield from self.tables.update(tx, ("runs", row[0]), change)
                count += done is not None
        return count

    def standing(self, old: Row, columns: tuple[Any, ...], now: int) -> Row:
        """A row of `runs` after a state change. A park keeps 0 if the inbox moved (law 7)."""
        state, reason, owner, epoch, wake_at, seen, output, error, head_seq, head_digest = columns
        started = old["started_at"]
        return {
            **old,
            "state": state,
            "reason": reason,
            "owner": owner,
            "epoch": epoch,
            "wake_at": self.parked(old, wake_at, seen),
            "output": output,
            "error": error,
            "head_seq": head_seq,
            "head_digest": head_digest,
            "started_at": (started or now) if state == "running" else started,
            "finished_at": now if state in FINAL else None,
            "picked_until": 0,
        }

    def parked(self, old: Row, wake_at: int, seen: int) -> int:
        return 0 if old["inbox_seq"] > seen else wake_at

    def mailed(self, tx: Transaction, head: set[str], v: Values) -> Steps:
        placed: list[list[int]] = []
        names = ("via", "run", "place", "kind", "name", "payload", "key", "digest")
        mail: dict[str, list[tuple[Any, ...]]] = {}
        for row in unnest(v, "m_", *names):
            is_known = row[6] is not None and self.tables.get("inbox_keys", (row[1], row[6]), tx)
            if (row[0] is None or row[0] in head) and not is_known:
                mail.setdefault(row[1], []).append(row)
        for run_id, rows in sorted(mail.items()):
            count = len(rows)
            change = partial(self.numbered, count=count)
            done = yield from self.tables.update(tx, ("runs", run_id), change)
            if done is None:
                continue
            before = done["inbox_seq"] - count
            for number, row in enumerate(sorted(rows, key=lambda row: row[2]), before + 1):
                digest = sha256(row[7] + number.to_bytes(8, "big", signed=True)).digest()
                message = (*row[3:7], digest, v["now"])
                yield from self.insert_message(tx, (run_id, number), message)
                placed.append([row[2], number])
        return placed

    def numbered(self, old: Row, count: int) -> Row:
        """A message takes its number from the run's row and wakes the run."""
        wake_at = 0 if old["state"] == "waiting" else old["wake_at"]
        return {**old, "inbox_seq": old["inbox_seq"] + count, "wake_at": wake_at}

    def insert_message(self, tx: Transaction, key: tuple[str, int], message: Row) -> Steps:
        yield from self.tables.insert(tx, ("inbox", key), message)
        if message[3] is not None:
            yield from self.tables.insert(tx, ("inbox_keys", (key[0], message[3])), key[1])

    def consumed(self, tx: Transaction, head: set[str], v: Values) -> Steps:
        for via, run_id, number in unnest(v, "t_", "via", "run", "number"):
            if via is None or via in head:
                yield from self.tables.update(tx, ("inbox", (run_id, number)), empty)

    def recorded(self, tx: Transaction, head: set[str], v: Values) -> Steps:
        count = 0
        names = ("via", "kind", "key", "value", "version", "digest")
        for via, kind, key, value, version, digest in unnest(v, "p_", *names):
            if via is not None and via not in head:
                continue
            where = ("records", (kind, key))
            if version == 0 and value is not None:
                yield from self.tables.insert(tx, where, (value, 1, digest))
                count += 1
            elif value is None:
                fits = partial(is_at, version)
                count += yield from self.tables.delete(tx, where, fits)
            else:
                row = (value, version + 1, digest)
                done = yield from self.tables.update(tx, where, partial(moved, version, row))
                count += done is not None
        return count

    def kept(self, tx: Transaction, head: set[str], v: Values) -> Steps:
        names = ("via", "run", "step", "attempt", "part", "text", "handle", "digest")
        for row in unnest(v, "k_", *names):
            if row[0] is None or row[0] in head:
                where = ("progress", row[1:5])
                new = row[5:]
                yield from self.tables.upsert(tx, where, partial(unless_there, new))

    def dropped(self, tx: Transaction, head: set[str], v: Values) -> Steps:
        for via, run_id, step in unnest(v, "d_", "via", "run", "step"):
            if via is None or via in head:
                for key, _ in self.tables.rows("progress", tx):
                    if key[:2] == (run_id, step):
                        yield from self.tables.delete(tx, ("progress", key), bool)


def is_at(version: int, old: Row) -> bool:
    """A record of this version."""
    return bool(old[1] == version)


def moved(version: int, new: Row, old: Row) -> Row:
    """Its next version, if nobody was quicker."""
    return new if old[1] == version else None


def unless_there(new: Row, old: Row) -> Row:
    """ON CONFLICT DO NOTHING."""
    return None if old else new


def empty(message: Row) -> Row:
    """A consumed message: its row stays."""
    kind, name, _, *rest = message
    return (kind, name, None, *rest)


RUN_COLUMNS = (
    *("run_id", "workflow", "version", "digest", "state", "reason", "owner", "epoch"),
    *("priority", "queue", "idempotency_key", "parent_run_id", "wake_at", "wake_first"),
    *("labels", "origin", "input", "output", "error", "head_seq", "head_digest"),
)
