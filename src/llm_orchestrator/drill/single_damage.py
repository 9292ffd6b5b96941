"""Damage to what a SingleTarget has recorded, and its backups: done to the bytes, not by the store.

Rows are changed through SQLite itself, as a bad disk or a person with a database tool would change
them; the store's own code would refuse. Confirmed: what is read back is what was put there.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sqlite3
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from llm_orchestrator.drill.scenario import Fault
from llm_orchestrator.drill.target import Broken, Injected, NotConfirmed

if TYPE_CHECKING:
    from llm_orchestrator.drill.single import SingleTarget

_COMMAND_S = 120.0
_MARGIN_S = 0.2
_PICK = """\
SELECT j.run_id, j.seq, j.payload FROM journal j JOIN runs r USING (run_id)
WHERE j.kind = 'step_finished' AND j.step = 'ask' AND r.workflow = 'drill_load'
AND r.finished_at IS NULL ORDER BY j.run_id LIMIT ?"""


def _flip(payload: bytes) -> bytes:
    place = len(payload) // 2
    return payload[:place] + bytes([payload[place] ^ 0x10]) + payload[place + 1 :]


_CHANGES: Mapping[str, Callable[[bytes], bytes | None]] = {
    "flip": _flip,
    "json": lambda payload: payload[: len(payload) // 2],
    "edit": lambda payload: payload.replace(b"asked", b"asket"),
    "missing": lambda payload: None,
}


async def journal_damage(target: SingleTarget, fault: Fault) -> Injected:
    """Kill the node, change recorded steps of `runs` runs in flight as `how` says, start it again.

    `how`: flip (a bit), json (cut in half), edit (a word), missing (no row).
    """
    how, count = str(fault.options["how"]), int(fault.options.get("runs", 3))
    target.node.hold()
    try:
        await target.node.end_with(signal.SIGKILL)
        touched = await asyncio.to_thread(_damage, target.store_path, _CHANGES[how], count)
    finally:
        target.node.release()
    if len(touched) < count:
        raise NotConfirmed(f"{len(touched)} of {count} entries could be damaged")
    evidence = f"{how}: a recorded step of {count} runs, read back as it was put there"
    return Injected(target.clock.monotonic(), evidence, touched=frozenset(touched))


def _damage(path: Path, change: Callable[[bytes], bytes | None], count: int) -> list[str]:
    touched = []
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        for run_id, seq, payload in database.execute(_PICK, (count,)).fetchall():
            changed = change(payload)
            key = (run_id, seq)
            if changed is None:
                database.execute("DELETE FROM journal WHERE run_id = ? AND seq = ?", key)
            else:
                statement = "UPDATE journal SET payload = ? WHERE run_id = ? AND seq = ?"
                database.execute(statement, (changed, *key))
            found = database.execute(
                "SELECT payload FROM journal WHERE run_id = ? AND seq = ?", key
            ).fetchone()
            is_there = None if found is None else found[0]
            if is_there == changed != payload:
                touched.append(run_id)
    return touched


class Shape(NamedTuple):
    """What a migration may change in a store's file."""

    version: int
    schema: frozenset[tuple[object, ...]]


def shape_of(path: Path) -> Shape:
    """As the file has it now."""
    with contextlib.closing(sqlite3.connect(path)) as database:
        version = database.execute("PRAGMA user_version").fetchone()[0]
        found = database.execute("SELECT type, name, tbl_name, sql FROM sqlite_schema")
        return Shape(version, frozenset(found))


# --- backups ---


async def llmo(target: SingleTarget, *words: str) -> tuple[int, str]:
    """Run a command on the target's store; its exit code and all that it said."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "llm_orchestrator",
        *words,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=target.environment(),
        cwd=target.folder,
    )
    said, _ = await asyncio.wait_for(process.communicate(), _COMMAND_S)
    return process.returncode or 0, said.decode(errors="replace")


async def _backup(target: SingleTarget) -> Path:
    code, said = await llmo(target, "backup", "create")
    made = sorted(target.folder.rglob("llm-orchestrator-backup-*.tar.*"))
    if code != 0 or not made:
        raise NotConfirmed(f"no backup could be made: {said[-300:]}")
    return made[-1]


async def store_lost(target: SingleTarget, fault: Fault) -> Injected:
    """Back up, work on for `age_s`, then kill the node and remove the database; then restore.

    Without an archive, what was acknowledged after the backup began is lost with it, and promised
    to nobody; with `from_archive` nothing may be missing.
    """
    is_archived = bool(fault.options.get("from_archive"))
    kept_until_us = None if is_archived else target.clock.now_us()
    backup = await _backup(target)
    await target.clock.sleep(float(fault.options.get("age_s", 3)))
    words = ("--from-archive",) if is_archived else ("--backup", str(backup))
    target.node.hold()
    try:
        await target.node.end_with(signal.SIGKILL)
        for path in target.folder.glob(f"{target.store_path.name}*"):
            path.unlink()
        at_s = target.clock.monotonic()
        if target.store_path.exists():
            raise NotConfirmed("the database is still there")
        code, said = await llmo(target, "restore", *words, "--yes")
    finally:
        target.node.release()
    if code != 0:
        raise Broken(f"the restore ended with {code}: {said[-300:]}")
    size_mb = backup.stat().st_size / 1e6
    evidence = f"the database was removed, a backup of {size_mb:.1f} MB restored"
    return Injected(
        at_s, evidence + (" with what the archive has" * is_archived), kept_until_us=kept_until_us
    )


async def rows_deleted(target: SingleTarget, fault: Fault) -> Injected:
    """An operator deletes all runs by SQL; by the archive the store goes back to before that.

    `to`: moment (default), or entry: the last one that there is. Then what runs had done since is
    accepted (llmo recovery reconcile accept).

    Confirmed: the table is empty. What was acknowledged since that moment is promised to nobody.
    """
    await _backup(target)
    before_us = target.clock.now_us()
    await target.clock.sleep(_MARGIN_S)
    if fault.options.get("to") == "entry":
        point = await asyncio.to_thread(_newest_entry, target.store_path)
    else:
        point = datetime.fromtimestamp(before_us / 1e6, UTC).isoformat()
    count = await asyncio.to_thread(_delete_all, target.store_path)
    at_s = target.clock.monotonic()
    if not count:
        raise NotConfirmed("there was nothing to delete")
    code, said = await llmo(target, "restore", "--to", point, "--yes")
    if code != 0:
        raise Broken(f"the restore to {point} ended with {code}: {said[-300:]}")
    code, said = await llmo(target, "recovery", "reconcile", "accept", "--all")
    if code != 0:
        raise Broken(f"what the archive knows could not be accepted: {said[-300:]}")
    evidence = f"DELETE of {count} entries, then restored to {point}"
    return Injected(at_s, evidence, kept_until_us=before_us)


def _newest_entry(path: Path) -> str:
    """RUN:SEQ of the entry that was recorded last."""
    with contextlib.closing(sqlite3.connect(path, timeout=_COMMAND_S)) as database:
        run_id, seq = database.execute(
            "SELECT run_id, seq FROM journal ORDER BY recorded_at DESC, seq DESC LIMIT 1"
        ).fetchone()
    return f"{run_id}:{seq}"


def _delete_all(path: Path) -> int:
    with contextlib.closing(sqlite3.connect(path, timeout=_COMMAND_S)) as database, database:
        return database.execute("DELETE FROM journal").rowcount


async def backup_damaged(target: SingleTarget, fault: Fault) -> Injected:
    """Back up, flip a bit in the middle of the file, order its restore: it must be refused."""
    backup = await _backup(target)
    data = await asyncio.to_thread(backup.read_bytes)
    await asyncio.to_thread(backup.write_bytes, _flip(data))
    at_s = target.clock.monotonic()
    code, _ = await llmo(target, "restore", "--backup", str(backup), "--yes")
    if code == 0:
        raise Broken("a damaged backup was restored: nothing has refused it")
    return Injected(at_s, f"its restore was refused with exit code {code}")
