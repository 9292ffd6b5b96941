"""A store out of its archive alone has every row that it had, on either database."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from llm_orchestrator import Orchestrator
from llm_orchestrator.clock import RealClock
from llm_orchestrator.config import Config
from llm_orchestrator.errors import StoreDamaged
from llm_orchestrator.model import RunState
from llm_orchestrator.recovery.archive_read import find_entry
from llm_orchestrator.recovery.places_folder import FolderPlace
from llm_orchestrator.recovery.rebuild import Rebuilt, rebuild
from llm_orchestrator.recovery.unarchived import KIND
from llm_orchestrator.security.audit import AuditLog, Result
from llm_orchestrator.store.base import Append, Batch, PutBlob, PutProgress, PutRecord, PutVectors
from llm_orchestrator.store.sqlite import SQLiteStore
from llm_orchestrator.store.tables import Row
from llm_orchestrator.wire import make_store
from tests.recovery.test_stream import archive_of
from tests.recovery.test_tables import client, rows, waits
from tests.store.support import HandClock
from tests.store.test_agreement import BATCH, RUNS, Drivers


async def filled(url: str, folder: Path) -> list[str]:
    """Something in every table, all of it archived."""
    store = make_store(Config(), RealClock(), url=url)
    store.archive = archive_of(store, folder)  # type: ignore[attr-defined]
    async with Orchestrator(url, store=store) as one:
        done = await one.start(waits, {"n": 1}, idempotency_key="k", labels={"ü": "\u2028"})
        while (row := await store.look.run(done)) is None or row.state is not RunState.WAITING:
            await RealClock().sleep(0.01)
        head = (await store.look.stored(done))[-1]
        piece = PutProgress(done, "step", 1, 1, "half an")  # of a streamed answer: not archived
        beside = PutRecord("kind", "beside", 1, 0)
        append = Append(done, head.seq, head.digest, (), changes=(piece,))
        assert not (await store.commit(Batch((append,), (beside,)))).refused
        await one.operator.signal(done, "go")
        await one.result(done)
        waiting = await one.start(waits, {"n": 2}, delay_s=1_000)
        await one.operator.signal(waiting, "go", {"bytes": "\x00"}, sender_key="s")
        await one.operator.signal(waiting, "go", None)
        changes = (
            PutRecord("kind", "key", {"a": [1, None]}, 0),
            PutVectors("index", "", (("id", b"\x00\x00\x80?", b"{}"),)),
            PutBlob(done, b"d" * 32, b"\x00" * 3_000_000),
        )
        await store.commit(Batch(changes=changes))
        log = AuditLog(store, store.clock, "chain")
        await log.write(actor="ann", action="a.b", target="t", result=Result.SUCCESS)
    return [done, waiting]


async def all_rows(url: str) -> dict[str, list[Row]]:
    """All but the archive's own records, which say how far it is."""
    found = await rows(url)
    found["records"] = [row for row in found["records"] if row[0] != KIND]
    return found


async def rebuilt(folder: Path, url: str, **options: Any) -> Rebuilt:
    async with client(url) as store:
        return await rebuild(FolderPlace(folder), store, **options)


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
@pytest.mark.parametrize("taking", ["sqlite", "postgres"])
async def test_every_row_comes_back_on_either_database(
    tmp_path: Path, postgres_url: str, request: pytest.FixtureRequest, kind: str, taking: str
) -> None:
    server = request.getfixturevalue("postgres_server")
    other = f"{postgres_url.rpartition('/')[2]}_other"
    source = postgres_url if kind == "postgres" else f"sqlite:///{tmp_path / 'a.db'}"
    target = f"sqlite:///{tmp_path / 'b.db'}"
    if taking == "postgres":
        target = server.create_database(other)
    try:
        await filled(source, tmp_path / "archive")
        done = await rebuilt(tmp_path / "archive", target)
        before = await all_rows(source)
        assert min(map(len, before.values())) > 0
        assert await all_rows(target) == before
        assert (done.dropped, done.findings.damage) == (0, [])
    finally:
        server.psql(f'DROP DATABASE IF EXISTS "{other}" WITH (FORCE)')


async def test_applying_it_again_changes_nothing(tmp_path: Path) -> None:
    source, target = (f"sqlite:///{tmp_path / name}" for name in ("a.db", "b.db"))
    await filled(source, tmp_path / "archive")
    first = await rebuilt(tmp_path / "archive", target)
    again = await rebuilt(tmp_path / "archive", target)
    assert again.passed_over > 0
    assert first.point_us >= again.point_us
    assert await all_rows(target) == await all_rows(source)


async def test_up_to_an_entry_and_what_lies_beyond_it(tmp_path: Path) -> None:
    source, target = (f"sqlite:///{tmp_path / name}" for name in ("a.db", "b.db"))
    run_id, other = await filled(source, tmp_path / "archive")
    moment = await find_entry(FolderPlace(tmp_path / "archive"), run_id, 1)
    done = await rebuilt(
        tmp_path / "archive", target, until_us=moment.at, incarnation=moment.incarnation
    )
    async with client(source) as store:
        story = await store.look.stored(run_id)
    async with client(target) as store:
        here = await store.look.stored(run_id)
        assert await store.look.run(other) is None
        assert len(await store.shelf.audit_chains(("", 0), 9)) > 0  # a log never goes back
    tails = {tail.run_id: tail for tail in done.tails}
    assert 0 < len(here) < len(story)
    assert [*here, *tails[run_id].entries] == story
    assert tails[other].at == 0


async def test_a_missing_piece_is_named(tmp_path: Path) -> None:
    source, target = (f"sqlite:///{tmp_path / name}" for name in ("a.db", "b.db"))
    await filled(source, tmp_path / "archive")
    [segment] = (tmp_path / "archive" / "segments").rglob("0*")
    data = bytearray(segment.read_bytes())
    data[len(data) // 2] ^= 1
    segment.write_bytes(data)
    with pytest.raises(StoreDamaged, match="segment 1 of stream"):
        await rebuilt(tmp_path / "archive", target)


async def test_an_archive_that_began_late_needs_a_base(tmp_path: Path) -> None:
    source, target = (f"sqlite:///{tmp_path / name}" for name in ("a.db", "b.db"))
    async with Orchestrator(source) as one:
        await one.start(waits, {"n": 1})
    await filled(source, tmp_path / "archive")
    with pytest.raises(StoreDamaged, match="before it was archived"):
        await rebuilt(tmp_path / "archive", target)


async def at_random(folder: Path, batches: list[Any]) -> None:
    clock = HandClock(100)
    store = SQLiteStore(folder / "a.db", node_id="node-1", clock=clock)
    store.archive = archive_of(store, folder / "archive")
    await store.open_as_engine()
    drivers = Drivers()
    for parts, changes, passed in batches:
        clock.now += passed
        appends = [append for part in parts if (append := drivers.append(part)) is not None]
        batch = Batch(appends, changes)
        receipt = await store.commit(batch)
        heads = {}
        for run_id in RUNS:
            entries = await store.look.stored(run_id)
            heads[run_id] = (entries[-1].seq, entries[-1].digest) if entries else (0, bytes(32))
        drivers.settle(batch, receipt, heads)
    await store.close()
    target, source = (f"sqlite:///{folder / name}" for name in ("b.db", "a.db"))
    if (folder / "archive").exists():
        await rebuilt(folder / "archive", target)
        assert await all_rows(target) == await all_rows(source)


@settings(max_examples=25, deadline=None, phases=set(Phase) - {Phase.explain})
@given(st.lists(BATCH, min_size=3, max_size=12))
def test_whatever_happened_comes_back(batches: list[Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(at_random(Path(folder), batches))
