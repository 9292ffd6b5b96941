"""Stores to back up, and a copier of one file that says by itself what it does."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, closing
from pathlib import Path

from llm_orchestrator.clock import RealClock
from llm_orchestrator.errors import StoreError
from llm_orchestrator.model import Workflow
from llm_orchestrator.recovery.create import Made, Options, create
from llm_orchestrator.recovery.manifest import Manifest
from llm_orchestrator.recovery.places import Place
from llm_orchestrator.store.base import Batch, Register
from llm_orchestrator.store.copying import Advance, Aside, Cut, Identity, RunHead
from llm_orchestrator.store.sqlite import SQLiteStore
from tests.store.support import accepted, draft, land

COPIED = ("workflows", "runs", "journal", "inbox", "progress", "records", "vectors", "blobs")
FINAL = ("completed", "failed", "cancelled")
RUNS = 5


class PlainCopier:
    """A Copier that can only dump: SQLite's own backup, and nothing else."""

    kind = "sqlite"

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def shown(self) -> str:
        return f"sqlite:///{self._path}"

    async def size(self) -> int:
        return self._path.stat().st_size

    async def identity(self) -> Identity | None:
        return None

    async def dump(
        self, folder: Path, *, bytes_per_s: int = 0, advance: Advance | None = None
    ) -> tuple[Path, Cut]:
        target = folder / "database.sqlite"
        with closing(sqlite3.connect(self._path)) as live, closing(sqlite3.connect(target)) as copy:
            live.backup(copy)
            copy.execute("PRAGMA journal_mode = DELETE")
            if advance is not None:
                advance(1, 1)
            return target, self._cut(copy, target.stat().st_size)

    def _cut(self, copy: sqlite3.Connection, size: int) -> Cut:
        counts = {
            table: copy.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
            for table in (*COPIED, "commits", "audit", "store")
        }
        [(schema,)] = copy.execute("PRAGMA user_version")
        [(incarnation, generation)] = copy.execute("SELECT incarnation, generation FROM store")
        heads = [
            RunHead(run_id, seq, bytes(digest).hex(), state)
            for run_id, state, seq, digest in copy.execute(
                "SELECT run_id, state, max(seq), journal.digest"
                " FROM runs JOIN journal USING (run_id) GROUP BY run_id ORDER BY run_id"
            )
            if state not in FINAL
        ]
        taken_at = RealClock().now_us()
        version = sqlite3.sqlite_version
        return Cut(
            "sqlite", schema, version, size, incarnation, generation, 1, taken_at, counts, heads, []
        )

    async def check_dump(self, dump: Path) -> str:
        try:
            with closing(sqlite3.connect(f"file:{dump}?mode=ro", uri=True)) as copy:
                [(word,)] = copy.execute("PRAGMA quick_check(1)")
        except sqlite3.DatabaseError as error:
            return str(error)
        return "" if word == "ok" else str(word)

    async def load(self, dump: Path, *, advance: Advance | None = None) -> Aside:
        raise StoreError("not here")

    async def empty(self) -> Aside:
        raise StoreError("not here")

    async def kept(self) -> list[str]:
        return []

    async def drop(self, name: str) -> None:
        raise StoreError("not here")

    async def leftovers(self) -> list[str]:
        return []


def manifest_of(**more: object) -> Manifest:
    """A manifest that fits no store, to pack."""
    base: dict[str, object] = {
        "backup_id": "llm-orchestrator-backup-20260102_030405",
        "program": "0.1.0",
        "created_at": "2026-01-02T03:04:05Z",
        "host": "host",
        "duration_s": 1.5,
        "kind": "sqlite",
        "store": "sqlite:///x.db",
        "schema_version": 3,
        "server": "3.40.1",
        "size_bytes": 1000,
        "dump": "database.sqlite",
        "dump_bytes": 1000,
        "incarnation": "ab" * 16,
        "generation": 1,
        "epoch": 5,
        "taken_at": 1_767_323_045_000_000,
        "counts": {"runs": 1},
        "heads": [("run", 3, "cd" * 32, "running")],
    }
    return Manifest.model_validate(base | more)


@asynccontextmanager
async def sqlite_store(path: Path, runs: int = RUNS) -> AsyncIterator[SQLiteStore]:
    """A store of unfinished runs, a workflow and an idle engine."""
    store = SQLiteStore(path, node_id="node-1", clock=RealClock())
    await store.open_as_engine()
    try:
        await fill(store, runs)
        yield store
    finally:
        await store.close()


async def fill(store: SQLiteStore, runs: int = RUNS) -> None:
    flow = Workflow("flow", "1", "ab" * 32, b'{"name": "flow"}')
    await store.commit(Batch(changes=(Register(flow),)))
    for _ in range(runs):
        writer = await accepted(store)
        await land(store, writer.append(draft(), draft(step="b")))


def options(folder: Path, *, compression: str = "gzip", recipients: Sequence[str] = ()) -> Options:
    return Options(folder, "0.1.0", "host", compression, recipients, config={"data_dir": "x"})


async def backed_up(store: SQLiteStore, how: Options, place: Place | None = None) -> Made:
    """A backup of a store that is a file."""
    return await create(PlainCopier(store.path), place, how, store=store, clock=RealClock())
