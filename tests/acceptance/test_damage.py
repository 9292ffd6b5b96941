"""One flipped byte, anywhere: never a wrong result, nobody else touched, and the run says why.

A store with runs of all kinds is copied for each flip. The checked journal is read, an engine opens
and goes on, and every run must end as it would have without the flip, or say why it cannot. The
damaged file of a failing seed is kept as `damaged.db` in the test's folder.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
import shutil
import sqlite3
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from llm_orchestrator.clock import RealClock
from llm_orchestrator.engine.audit import verify_store
from llm_orchestrator.errors import OrchestratorError
from llm_orchestrator.model import Flaw
from llm_orchestrator.store.sqlite import SQLiteStore
from tests.acceptance.damage_lab import Found, build, recover

CHUNK = 20
STARTS = range(0, 100, CHUNK)


@dataclass(frozen=True)
class Place:
    """Where an entry's payload lies in the file."""

    run_id: str
    seq: int
    kind: str
    step: str
    start: int
    length: int


@dataclass(frozen=True)
class Original:
    """The undamaged store, and what comes of its runs."""

    path: Path
    content: bytes
    places: list[Place]
    run_ids: list[str]
    right: Found
    made: Counter[str]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Original:
    path = tmp_path_factory.mktemp("damage") / "original.db"
    asyncio.run(build(path))
    content = path.read_bytes()
    database = sqlite3.connect(path)
    places = find_payloads(database, content)
    run_ids = [row[0] for row in database.execute("SELECT run_id FROM runs ORDER BY run_id")]
    database.close()
    copy = path.with_name("whole.db")
    shutil.copy(path, copy)
    assert asyncio.run(flaws_of(copy)) == []
    right, made = asyncio.run(recover(copy, run_ids))
    assert Counter(what for what, _ in right.values()) == {"result": 25, "failed": 2, "paused": 1}
    return Original(path, content, places, run_ids, right, made)


def find_payloads(database: sqlite3.Connection, content: bytes) -> list[Place]:
    """Each row of the journal ends with its digest, a moment of 8 bytes, and its payload."""
    places = []
    query = "SELECT run_id, seq, kind, step, digest, payload FROM journal"
    for run_id, seq, kind, step, digest, payload in database.execute(query):
        starts = [found.end() + 8 for found in re.finditer(re.escape(digest), content)]
        [start] = [at for at in starts if content[at : at + len(payload)] == payload]
        places.append(Place(run_id, seq, kind, step, start, len(payload)))
    return places


@pytest.fixture(autouse=True)
def no_defects(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """A bare traceback in the log is a defect, whatever the damage."""
    caplog.set_level(logging.WARNING)
    yield
    assert [record.getMessage() for record in caplog.records if record.exc_info] == []


async def flaws_of(path: Path) -> list[Flaw] | None:
    """All that the checked journal finds; None when the store says that it cannot be opened."""
    store = SQLiteStore(path, node_id="reader", clock=RealClock())
    try:
        await store.open_as_client()
        return await verify_store(store)
    except OrchestratorError:
        return None
    finally:
        await store.close()


def flipped(original: Original, path: Path, offset: int, mask: int) -> Path:
    """A copy with one byte changed."""
    for old in path.parent.glob("flip.db*"):
        old.unlink()
    content = bytearray(original.content)
    content[offset] ^= mask
    path.with_name("damaged.db").write_bytes(content)
    path.write_bytes(content)
    return path


def outcomes(original: Original, path: Path) -> tuple[Found, set[str], Counter[str]]:
    """What came of the runs, those that ended otherwise than they should, and steps in excess."""
    found, made = asyncio.run(recover(path, original.run_ids))
    other = {run_id for run_id in original.run_ids if found[run_id] != original.right[run_id]}
    return found, other, made - original.made


def assert_honest(found: Found, other: set[str], *, note: str) -> None:
    """A run that does not end as it should is paused for a person, or names the damage."""
    for run_id in other:
        what, why = found[run_id]
        if what == "waits":
            what, why = why
        is_paused = what == "paused" and why in ("damaged", "unknown_outcome")
        is_named = what == "error" and str(why).startswith("Store")
        assert is_paused or is_named, f"{note}: run {run_id} ended {what} {why!r}"


@pytest.mark.parametrize("start", STARTS)
def test_a_flip_in_a_payload_is_found_and_touches_its_own_run_only(
    original: Original, tmp_path: Path, start: int
) -> None:
    for seed in range(start, start + CHUNK):
        chance = random.Random(seed)
        place = chance.choice(original.places)
        offset = place.start + chance.randrange(place.length)
        path = flipped(original, tmp_path / "flip.db", offset, chance.randrange(1, 256))
        note = f"seed {seed}, {place}"
        flaws = asyncio.run(flaws_of(path))
        assert flaws is not None, note
        assert {(flaw.run_id, flaw.seq) for flaw in flaws} == {(place.run_id, place.seq)}, note
        found, other, extra = outcomes(original, path)
        assert other <= {place.run_id} | parents_of(original, place), note
        assert_honest(found, other, note=note)
        assert not [what for what in extra if what.startswith("paid")], note
        assert sum(extra.values()) <= 1, f"{note}: {extra}"


def parents_of(original: Original, place: Place) -> set[str]:
    """A run that waits for a damaged child shares its fate."""
    database = sqlite3.connect(original.path)
    query = "SELECT parent_run_id FROM runs WHERE run_id = ?"
    [row] = database.execute(query, (place.run_id,)).fetchall()
    database.close()
    return {row[0]} - {None}


@pytest.mark.parametrize("start", STARTS)
def test_a_flip_anywhere_gives_no_wrong_result(
    original: Original, tmp_path: Path, start: int
) -> None:
    touched = []
    for seed in range(start, start + CHUNK):
        chance = random.Random(1_000 + seed)
        offset = chance.randrange(len(original.content))
        path = flipped(original, tmp_path / "flip.db", offset, chance.randrange(1, 256))
        note = f"seed {seed}, page {offset // 4096 + 1}, offset {offset % 4096}"
        asyncio.run(flaws_of(path))
        found, other, extra = outcomes(original, path)
        assert_honest(found, other, note=note)
        assert not [what for what in extra if what.startswith("paid")], f"{note}: {extra}"
        touched.append(len(other))
    print(f"seeds {start} to {start + CHUNK - 1}: runs touched by each flip {touched}")
