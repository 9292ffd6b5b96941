"""Segments hold every batch and say what of it landed; what is wrong with them is named."""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest

from llm_orchestrator import Context, Orchestrator, step, workflow
from llm_orchestrator.clock import RealClock
from llm_orchestrator.errors import StoreUnavailable, WrongKey
from llm_orchestrator.model import Entry
from llm_orchestrator.recovery import stream_sinks
from llm_orchestrator.recovery.places_folder import FolderPlace
from llm_orchestrator.recovery.stream import Mode, OnFailure, StreamArchive, StreamOptions
from llm_orchestrator.recovery.stream_read import Findings, Item, StreamReader, list_streams
from llm_orchestrator.recovery.stream_store import StoreStream
from llm_orchestrator.store.base import Batch, Database, PutRecord
from llm_orchestrator.store.batch_codec import batch_of
from llm_orchestrator.wire import make_store
from tests.recovery.test_carry import opened


@step
async def work(number: int) -> str:
    return f"{number} " * 50


@workflow
async def busy(ctx: Context, n: int) -> int:
    for number in range(n):
        await ctx.step(work, number)
    return n


def archive_of(store: Database, folder: Path, **options: Any) -> StreamArchive:
    recipients = options.pop("recipients", ())
    clock = RealClock()
    opener = StoreStream(FolderPlace(folder), store, clock, kind="sqlite", recipients=recipients)
    return StreamArchive(opener, clock, StreamOptions(**options))


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'live.db'}"
    return str(request.getfixturevalue("postgres_url"))


async def driven(url: str, folder: Path, **options: Any) -> dict[str, list[Entry]]:
    """Runs on a store that is archived; what the store has in the end."""
    from llm_orchestrator.config import Config

    store = make_store(Config(), RealClock(), url=url)
    store.archive = archive_of(store, folder, **options)  # type: ignore[attr-defined]
    async with Orchestrator(url, store=store) as one:
        runs = [await one.start(busy, {"n": 15}) for _ in range(8)]
        for run_id in runs:
            assert await one.result(run_id) == 15
        return {run_id: await store.look.stored(run_id) for run_id in runs}


async def read(folder: Path, keys: Any = ()) -> tuple[list[Item], Findings]:
    found, findings = [], Findings()
    place = FolderPlace(folder)
    for stream, segments in (await list_streams(place)).items():
        reader = StreamReader(place, stream, segments, keys=keys, findings=findings)
        found += [item async for item in reader.items()]
    return found, findings


def entries_in(items: list[Item]) -> dict[str, list[Entry]]:
    found: dict[str, list[Entry]] = {}
    for item in items:
        refused = item.told.refused if item.told else ()
        for append in batch_of(item.kept.at, item.kept.appends, item.kept.changes).appends:
            if append.run_id not in refused:
                found.setdefault(append.run_id, []).extend(append.entries)
    return {run_id: sorted(rows, key=lambda row: row.seq) for run_id, rows in found.items()}


@pytest.mark.parametrize("mode", list(Mode))
async def test_what_a_store_has_is_in_its_archive(url: str, tmp_path: Path, mode: Mode) -> None:
    stored = await driven(url, tmp_path / "archive", mode=mode)
    items, findings = await read(tmp_path / "archive")
    assert (findings.damage, findings.torn) == ([], [])
    assert entries_in(items) == stored
    assert all(item.is_known for item in items)


async def test_a_sealed_archive_opens_with_its_key_alone(tmp_path: Path) -> None:
    import pyrage

    mine, other = (pyrage.x25519.Identity.generate() for _ in range(2))
    url, folder = f"sqlite:///{tmp_path / 'live.db'}", tmp_path / "archive"
    stored = await driven(url, folder, recipients=[mine.to_public()])
    assert entries_in((await read(folder, [mine]))[0]) == stored
    for keys in ([], [other]):
        with pytest.raises(WrongKey):
            await read(folder, keys)
    assert not any(b"busy" in file.read_bytes() for file in segments(folder))


def segments(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "segments").rglob("*") if path.is_file())


@pytest.fixture
async def archived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An archive of several small segments."""
    monkeypatch.setattr(stream_sinks, "SEGMENT_BYTES", 600)
    folder = tmp_path / "archive"
    await driven(f"sqlite:///{tmp_path / 'live.db'}", folder)
    assert len(segments(folder)) > 4
    return folder


@pytest.mark.parametrize("part", [0.01, 0.2, 0.5, 0.8, 0.99])
async def test_a_flipped_byte_is_named(archived: Path, part: float) -> None:
    middle = segments(archived)[2]
    content = bytearray(middle.read_bytes())
    content[int(len(content) * part)] ^= 1
    middle.write_bytes(bytes(content))
    _, findings = await read(archived)
    assert findings.damage
    assert "segment" in findings.damage[0]


async def test_a_segment_that_is_gone_or_exchanged_is_named(archived: Path) -> None:
    first, second = segments(archived)[1:3]
    kept = first.read_bytes()
    first.unlink()
    assert "missing" in (await read(archived))[1].damage[0]
    first.write_bytes(second.read_bytes())
    assert "exchanged" in (await read(archived))[1].damage[0]
    first.write_bytes(kept)
    assert (await read(archived))[1].damage == []


async def test_a_torn_end_is_what_a_crash_leaves(archived: Path) -> None:
    whole = len((await read(archived))[0])
    last = segments(archived)[-1]
    last.write_bytes(last.read_bytes()[:-3])
    items, findings = await read(archived)
    assert findings.damage == []
    assert findings.torn
    assert whole - 2 <= len(items) <= whole
    middle = segments(archived)[1]
    middle.write_bytes(middle.read_bytes()[:-3])
    assert (await read(archived))[1].damage


async def test_a_length_that_points_behind_the_end_is_no_torn_end(archived: Path) -> None:
    last = segments(archived)[-1]
    whole = last.read_bytes()
    heads = [at for at in range(len(whole)) if is_head(whole, at)]
    assert len(heads) > 1
    for at in heads:
        for place in range(at, at + 8):
            spoilt = bytearray(whole)
            spoilt[place] ^= 1
            last.write_bytes(bytes(spoilt))
            assert (await read(archived))[1].damage, place
    last.write_bytes(whole + bytes(4_096))  # room was made, and nothing written
    _, findings = await read(archived)
    assert (findings.damage, len(findings.torn)) == ([], 1)


def is_head(data: bytes, at: int) -> bool:
    return data[at + 4 : at + 8] == blake2b(data[at : at + 4], digest_size=4).digest()


async def test_while_the_place_is_away_commits_wait_or_go_on(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "archive", tmp_path / "elsewhere"
    for on_failure in OnFailure:
        async with opened(f"sqlite:///{tmp_path / f'{on_failure}.db'}") as store:
            archive = archive_of(store, folder, on_failure=on_failure)
            await archive.prepare()
            folder.rename(elsewhere)
            folder.write_text("a file where the folder should be")
            store.archive = archive  # type: ignore[attr-defined]
            batch = Batch(changes=(PutRecord("kind", "key", 1, 0),))
            if on_failure is OnFailure.STALL:
                with pytest.raises(StoreUnavailable):
                    await store.commit(batch)
                assert await store.shelf.record("kind", "key") == (None, 0)
            else:
                await store.commit(batch)
                assert archive.exposure_s > 0
            folder.unlink()
            elsewhere.rename(folder)  # it is back
    items, findings = await read(folder)
    assert findings.damage == []
    batches = [batch_of(i.kept.at, i.kept.appends, i.kept.changes) for i in items]
    records = [each for batch in batches for each in batch.changes if isinstance(each, PutRecord)]
    assert "kind" in [record.kind for record in records]
