"""Stores to back up, and a copier of one file that says by itself what it does."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, closing
from pathlib import Path

import asyncpg  # type: ignore[import-untyped]

from llm_orchestrator.clock import RealClock
from llm_orchestrator.drill.postgres_lab import find_binaries
from llm_orchestrator.errors import StoreError
from llm_orchestrator.model import Workflow
from llm_orchestrator.recovery import pack
from llm_orchestrator.recovery.create import Made, Options, create
from llm_orchestrator.recovery.manifest import Manifest
from llm_orchestrator.recovery.places import Place
from llm_orchestrator.store.base import Batch, Database, Register
from llm_orchestrator.store.copying import Advance, Aside, Cut, Identity, RunHead
from llm_orchestrator.store.postgres import PostgresStore
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


class PostgresPlainCopier(PlainCopier):
    """The same for PostgreSQL, of a store that nobody writes meanwhile."""

    kind = "postgresql"

    def __init__(self, url: str) -> None:
        self._url = url
        self._binaries = find_binaries()

    @property
    def shown(self) -> str:
        return "postgresql://somewhere/x"

    async def size(self) -> int:
        return 1

    async def dump(
        self, folder: Path, *, bytes_per_s: int = 0, advance: Advance | None = None
    ) -> tuple[Path, Cut]:
        target = folder / "database.dump"
        command = [str(self._binaries / "pg_dump"), "-Fc", "-T", "nodes", "-f", str(target)]
        await asyncio.to_thread(subprocess.run, [*command, self._url], check=True)
        return target, await self._seen()

    async def _seen(self) -> Cut:
        live = await asyncpg.connect(self._url)
        try:
            tables = [*COPIED, "commits", "audit", "store"]
            counts = {
                table: await live.fetchval(f"SELECT count(*) FROM {table}") for table in tables
            }
            store = await live.fetchrow("SELECT incarnation, generation FROM store")
            rows = await live.fetch(
                "SELECT DISTINCT ON (run_id) run_id, seq, journal.digest, state"
                " FROM journal JOIN runs USING (run_id) WHERE state <> ALL($1)"
                " ORDER BY run_id, seq DESC",
                list(FINAL),
            )
        finally:
            await live.close()
        heads = [RunHead(str(run), seq, digest.hex(), state) for run, seq, digest, state in rows]
        return Cut("postgresql", 2, "15", 1, str(store[0]), int(store[1]), 1, 1, counts, heads, [])

    async def check_dump(self, dump: Path) -> str:
        command = [str(self._binaries / "pg_restore"), "--list", str(dump)]
        done = await asyncio.to_thread(
            subprocess.run, command, capture_output=True, text=True, check=False
        )
        return done.stderr.strip()


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


@asynccontextmanager
async def postgres_store(url: str, runs: int = RUNS) -> AsyncIterator[PostgresStore]:
    """The same on PostgreSQL."""
    store = PostgresStore(url, node_id="node-1", clock=RealClock())
    await store.open_as_engine()
    try:
        await fill(store, runs)
        yield store
    finally:
        await store.close()


async def fill(store: Database, runs: int = RUNS) -> None:
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


def repacked(
    file: Path,
    change: Callable[[Manifest], Manifest] = lambda same: same,
    dump: bytes | None = None,
) -> Path:
    """What somebody who knows the format makes of a file: every checksum fits again."""
    with tempfile.TemporaryDirectory() as folder:
        read = pack.read(file, into=Path(folder))
        assert read.dump is not None
        if dump is not None:
            read.dump.write_bytes(dump)
        size = {"dump_bytes": read.dump.stat().st_size}
        manifest = change(read.manifest).model_copy(update=size)
        target = file.with_name(f"repacked-{file.name}")
        target.unlink(missing_ok=True)
        content = pack.Content(manifest, read.dump, {"config.json": b"{}"})
        pack.write(target, content, compression="gzip")
    return target
