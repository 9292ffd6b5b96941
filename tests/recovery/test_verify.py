"""Verifying finds what the checksums cannot: a dump that is not what its manifest says."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from llm_orchestrator.clock import RealClock
from llm_orchestrator.drill.postgres_lab import find_binaries
from llm_orchestrator.errors import NotFound, StoreDamaged, StoreFull
from llm_orchestrator.recovery import pack
from llm_orchestrator.recovery.catalogue import read_marks
from llm_orchestrator.recovery.create import Made, create
from llm_orchestrator.recovery.manifest import Manifest
from llm_orchestrator.recovery.verify import Tools, record_verified, unpacked, verify
from llm_orchestrator.store.base import Database
from llm_orchestrator.store.copying import RunHead
from llm_orchestrator.store.dumps import read_postgres, read_sqlite
from tests.recovery.backup_support import (
    RUNS,
    PlainCopier,
    PostgresPlainCopier,
    fill,
    options,
    postgres_store,
    repacked,
    sqlite_store,
)

PG_RESTORE = str(find_binaries() / "pg_restore")


@dataclass
class Site:
    """A store that was backed up."""

    store: Database
    copier: PlainCopier
    folder: Path
    made: Made

    @property
    def tools(self) -> Tools:
        return Tools(self.copier, PG_RESTORE)

    async def again(self) -> Made:
        """Another backup, of what is there now."""
        how = options(self.folder)
        return await create(self.copier, None, how, store=self.store, clock=RealClock())

    async def refuses(self, file: Path) -> str:
        """Why a file is refused; nothing is left of the try."""
        with pytest.raises(StoreDamaged) as caught:
            await verify(file, tools=self.tools)
        assert caught.value.exit_code == 8
        assert list(self.folder.glob(".*")) == []
        assert file.name in caught.value.message
        return caught.value.message


@pytest.fixture(params=["sqlite", "postgresql"])
async def site(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Site]:
    folder = tmp_path / "b"
    copier: PlainCopier
    if request.param == "sqlite":
        copier = PlainCopier(tmp_path / "live.db")
        opened: AbstractAsyncContextManager[Database] = sqlite_store(tmp_path / "live.db")
    else:
        url = request.getfixturevalue("postgres_url")
        copier = PostgresPlainCopier(url)
        opened = postgres_store(url)
    async with opened as store:
        made = await create(copier, None, options(folder), store=store, clock=RealClock())
        yield Site(store, copier, folder, made)


async def test_a_good_backup_is_verified(site: Site) -> None:
    done = await verify(site.made.file, tools=site.tools)
    assert done.manifest == site.made.manifest
    assert len(done.manifest.heads) == RUNS
    assert done.notes == []
    assert done.size_bytes == site.made.size_bytes
    assert [path.name for path in site.folder.iterdir()] == [site.made.file.name]


async def test_a_dump_is_there_while_it_is_needed(site: Site) -> None:
    async with unpacked(site.made.file, tools=site.tools) as (done, dump):
        assert dump.stat().st_size == done.manifest.dump_bytes
    assert not dump.exists()


def head(manifest: Manifest, **more: object) -> Manifest:
    """Its second head, changed."""
    heads = list(manifest.heads)
    heads[1] = RunHead(**{**heads[1]._asdict(), **more})
    return manifest.model_copy(update={"heads": heads})


def with_heads(change: Callable[[list[RunHead]], list[RunHead]]) -> Callable[[Manifest], Manifest]:
    return lambda manifest: manifest.model_copy(update={"heads": change(list(manifest.heads))})


def counted(table: str, by: int) -> Callable[[Manifest], Manifest]:
    def change(manifest: Manifest) -> Manifest:
        counts = {**manifest.counts, table: manifest.counts.get(table, 0) + by}
        return manifest.model_copy(update={"counts": counts})

    return change


EDITS: dict[str, tuple[Callable[[Manifest], Manifest], str]] = {
    "a digest": (lambda m: head(m, digest="00" * 32), "ends at entry 3"),
    "a later end": (lambda m: head(m, seq=4), "not at entry 4"),
    "an earlier end": (lambda m: head(m, seq=2), "not at entry 2"),
    "a state": (lambda m: head(m, state="waiting"), "not waiting"),
    "a run that is not there": (
        lambda m: head(m, run_id="00000000-0000-7000-8000-999999999999"),
        "has no entry",
    ),
    "one run less": (with_heads(lambda heads: heads[1:]), f"{RUNS} unfinished runs, not"),
    "rows of the journal": (counted("journal", 1), "table journal has"),
    "rows of the runs": (counted("runs", -1), "table runs has"),
    "a table that is not there": (counted("nothing", 0), "table nothing has None rows"),
    "a table that is no name": (counted("runs; DROP TABLE runs", 1), "rows, not 1"),
    "incarnation": (lambda m: m.model_copy(update={"incarnation": "00"}), "of another store"),
    "generation": (lambda m: m.model_copy(update={"generation": 9}), "of another store"),
    "kind": (lambda m: m.model_copy(update={"kind": "oracle"}), "no kind that we know"),
}


@pytest.mark.parametrize("edit", EDITS)
async def test_metadata_that_were_edited_with_their_checksum_are_found(
    site: Site, edit: str
) -> None:
    change, message = EDITS[edit]
    assert message in await site.refuses(repacked(site.made.file, change))


async def test_repacked_as_it_was_it_is_good(site: Site) -> None:
    await verify(repacked(site.made.file), tools=site.tools)


async def test_another_dump_under_the_same_manifest_is_found(site: Site) -> None:
    await fill(site.store, 1)
    newer = await site.again()
    async with unpacked(newer.file, tools=site.tools) as (_, dump):
        content = dump.read_bytes()
    message = await site.refuses(repacked(site.made.file, dump=content))
    assert "table runs has 6 rows, not 5" in message


async def test_a_dump_that_was_damaged_before_it_was_packed_is_found(site: Site) -> None:
    """Its checksum fits: only reading it tells."""
    async with unpacked(site.made.file, tools=site.tools) as (_, dump):
        content = dump.read_bytes()
    size = len(content)
    for start, end in ((0, 16), (size // 2, size // 2 + 4096), (100, size)):
        zeros = content[:start] + b"\0" * (end - start) + content[end:]
        await site.refuses(repacked(site.made.file, dump=zeros))
    for cut in (0, 1, 100, size // 2):
        await site.refuses(repacked(site.made.file, dump=content[:cut]))
    await site.refuses(repacked(site.made.file, dump=b"nonsense" * 1000))


async def test_a_file_under_another_backups_name_is_refused(site: Site) -> None:
    wrong = site.folder / "llm-orchestrator-backup-20200101_000000.tar.gz"
    shutil.copyfile(site.made.file, wrong)
    assert "another backup's name" in await site.refuses(wrong)
    other = site.folder / "of-a-friend.tgz"
    shutil.copyfile(site.made.file, other)
    await verify(other, tools=site.tools)


async def test_what_cannot_be_compared_is_said(site: Site) -> None:
    done = await verify(site.made.file, tools=Tools(None, "no-such-program"))
    expected = 1 if done.manifest.kind == "sqlite" else 2
    assert len(done.notes) == expected
    assert "left out" in done.notes[0]


async def test_no_room_for_the_dump_is_said(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack, "ROOM_BYTES", 1 << 60)
    with pytest.raises(StoreFull, match="has room for"):
        await verify(site.made.file, tools=site.tools)


async def test_what_is_not_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        await verify(tmp_path / "nothing.tar.gz")


async def test_marks_are_remembered_when_two_verify_at_once(site: Site) -> None:
    ids = [f"llm-orchestrator-backup-2026010{n}_000000" for n in range(1, 4)]
    for number, backup_id in enumerate(ids):
        await record_verified(site.store, backup_id, number)
    await asyncio.gather(*(record_verified(site.store, f"{i}", 9) for i in range(2)))
    marks = read_marks(await site.store.shelf.records("backup"))
    assert {*ids, "0", "1"} <= marks.verified


def test_a_dump_with_a_view_for_a_table_is_no_store(tmp_path: Path) -> None:
    """Counting it would run whatever its maker wrote."""
    dump = tmp_path / "database.sqlite"
    with closing(sqlite3.connect(dump)) as made:
        made.execute(
            "CREATE VIEW runs AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1"
            " FROM n) SELECT i AS run_id, 'x' AS state FROM n"
        )
    with pytest.raises(StoreDamaged):
        read_sqlite(dump, ["runs"], [])


def test_a_line_of_any_length_is_read_in_pieces(tmp_path: Path) -> None:
    """`pg_restore` may say anything: here it says one row of 64 MiB, and one more."""
    program = tmp_path / "pg_restore"
    program.write_text(
        "#!/bin/sh\n"
        "echo 'COPY public.journal (run_id, seq, digest, payload) FROM stdin;'\n"
        "printf 'run\\t1\\t\\\\\\\\x0a\\t'\n"
        "head -c 67108864 /dev/zero | tr '\\0' 'x'\n"
        "printf '\\nrun\\t2\\t\\\\\\\\x0b\\tx\\n'\n"
        "echo '\\.'\n"
    )
    program.chmod(0o755)
    dump = tmp_path / "database.dump"
    dump.touch()
    facts = read_postgres(dump, [RunHead("run", 2, "0b", "running")], pg_restore=str(program))
    assert facts.counts == {"journal": 2}
    assert facts.ends == {"run": (2, "0b")}
