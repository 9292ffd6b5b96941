"""Planted bugs of the writing statement and of the store's protocol (see plants.py)."""

from __future__ import annotations

import asyncio
from typing import Any

from llm_orchestrator.model import Kind
from llm_orchestrator.store.base import Batch, Receipt
from llm_orchestrator.store.postgres import PostgresStore
from llm_orchestrator.store.postgres_lane import Lane, Unsure
from tests.simulation.append import Append
from tests.simulation.mvcc import Steps, Transaction
from tests.simulation.statements import ALIVE, Statements

_APPEND = "tests.simulation.append.Append"
_LANE = "llm_orchestrator.store.postgres_lane.Lane"


def _always(*_: Any) -> bool:
    return True


def _overwrite(self: Append, tx: Transaction, entry: Any) -> Steps:
    yield from self.tables.upsert(tx, ("journal", entry[:2]), lambda old: entry)


def _elsewhere(self: Append, tx: Transaction, entry: Any) -> Steps:
    """At the next free place: a writer that numbers by what the table has."""
    run_id, seq = entry[:2]
    while (cell := self.tables.table("journal").get((run_id, seq))) is not None and (
        cell.newest(tx) is not None
    ):
        seq += 1
    yield from self.tables.insert(tx, ("journal", (run_id, seq)), (run_id, seq, *entry[2:]))


def fence_removed() -> dict[str, Any]:
    """Whoever writes, writes."""
    return {f"{_APPEND}.is_next": _always, f"{_APPEND}.insert_entry": _overwrite}


def predecessor_unchecked() -> dict[str, Any]:
    """The primary key alone: after a restore a stale writer goes on behind a gap."""

    def is_free(self: Append, tx: Transaction, run_id: str, head: tuple[int, bytes]) -> bool:
        return self.tables.get("journal", (run_id, head[0] + 1), tx) is None

    return {f"{_APPEND}.is_next": is_free, f"{_APPEND}.is_mine": _always}


def on_conflict_do_nothing() -> dict[str, Any]:
    """What is there already counts as written."""

    def insert(self: Append, tx: Transaction, entry: Any) -> Steps:
        where = ("journal", entry[:2])
        yield from self.tables.upsert(tx, where, lambda old: None if old else entry)

    return {f"{_APPEND}.is_next": _always, f"{_APPEND}.insert_entry": insert}


def _epoch_fits(self: Append, tx: Transaction, run_id: str, v: Any) -> bool:
    row = self.tables.get("runs", run_id, tx)
    own = [e for r, e in zip(v["run_id"], v["epoch"], strict=True) if r == run_id]
    return row is None or not own or row["epoch"] <= own[0]


def epoch_only() -> dict[str, Any]:
    """INSERT .. WHERE EXISTS (epoch = mine), without a lock."""
    return {
        f"{_APPEND}.is_next": _always,
        f"{_APPEND}.is_owned": _epoch_fits,
        f"{_APPEND}.insert_entry": _elsewhere,
    }


def lock_and_check() -> dict[str, Any]:
    """An advisory lock and the check that it protects, in one statement: one snapshot."""
    original = Append.run

    def run(self: Append, tx: Transaction, parts: tuple[str, ...], v: Any) -> Steps:
        for run_id in sorted(v["head_run"]):
            where = ("advisory", run_id)
            yield from self.tables.upsert(tx, where, lambda old: (old or 0) + 1)
        return (yield from original(self, tx, parts, v))

    return {**epoch_only(), f"{_APPEND}.run": run}


def node_fence_only() -> dict[str, Any]:
    """The node's row lives: so it may write."""

    def lives(self: Append, tx: Transaction, run_id: str, v: Any) -> bool:
        lane = str(v["lane"]).partition("/")[0]
        nodes = [row for key, row in self.tables.rows("nodes", tx) if key.partition(".")[0] == lane]
        return not nodes or any(row["state"] in ALIVE for row in nodes)

    return {
        f"{_APPEND}.is_next": _always,
        f"{_APPEND}.is_owned": lives,
        f"{_APPEND}.insert_entry": _elsewhere,
    }


def lost_wakeup() -> dict[str, Any]:
    """A park does not look whether the inbox moved."""
    return {f"{_APPEND}.parked": lambda self, old, wake_at, seen: wake_at}


def double_claim() -> dict[str, Any]:
    """A pick that others do not see, and a claim that believes itself."""
    original = PostgresStore.commit

    async def commit(self: PostgresStore, batch: Batch) -> Receipt:
        receipt = await original(self, batch)
        claims = {
            a.run_id for a in batch.appends if a.entries and a.entries[0].kind == Kind.CLAIMED
        }
        refused = {key: why for key, why in receipt.refused.items() if key not in claims}
        return Receipt(refused, receipt.is_refused)

    def take(self: Statements, tx: Transaction, v: Any, fits: Any, order: Any) -> Steps:
        yield self.server.pause()
        return sorted(filter(fits, self._runs(tx)), key=order)[: v["limit"]]

    return {
        "llm_orchestrator.store.postgres.PostgresStore.commit": commit,
        "tests.simulation.statements.Statements._take": take,
    }


def ack_before_commit() -> dict[str, Any]:
    """The answer does not wait for the database."""
    original = PostgresStore.commit
    tasks: set[asyncio.Task[Any]] = set()

    async def quietly(self: PostgresStore, batch: Batch) -> None:
        try:
            await original(self, batch)
        except Exception:  # noqa: BLE001 (nobody is told: that is the bug)
            return

    async def commit(self: PostgresStore, batch: Batch) -> Receipt:
        task = asyncio.get_running_loop().create_task(quietly(self, batch))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        return Receipt()

    return {"llm_orchestrator.store.postgres.PostgresStore.commit": commit}


def resend_without_asking() -> dict[str, Any]:
    """A commit whose outcome is unknown is simply sent again, under the next number."""

    async def settle(self: Lane, unsure: Unsure) -> bool:
        return False

    return {f"{_LANE}.settle": settle}


def warning_unheard() -> dict[str, Any]:
    """A cancelled wait for the standby counts as a commit."""
    return {f"{_LANE}._listen": lambda self, connection, message: None}
