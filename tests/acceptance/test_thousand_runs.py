"""1,000 runs in flight, kill -9 of the engine, a start: all complete, hardly a call is repeated."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from llm_orchestrator.clock import RealClock
from llm_orchestrator.engine.replay import fold
from llm_orchestrator.store.sqlite import SQLiteStore
from tests.acceptance.fake_server import FakeServer, fake_server

RUNS = 1_000


@contextmanager
def engine(folder: Path, fake: FakeServer) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.acceptance.crash.many", str(folder), fake.url]
    with subprocess.Popen([*command, str(RUNS)], stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def said(process: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    assert process.stdout is not None
    for line in process.stdout:
        yield json.loads(line)


async def recorded(folder: Path) -> tuple[set[str], set[str], int]:
    """Finished steps and open attempts by idempotency key, and how many runs have not ended."""
    store = SQLiteStore(folder / "runs.db", node_id="looking", clock=RealClock())
    await store.open_as_client()
    try:
        finished, open_steps, unfinished = set(), set(), 0
        journals = await store.look.load(await store.look.run_ids())
        for run_id, journal in journals.items():
            assert list(journal.flaws) == []
            state = fold(run_id, journal.entries)
            finished |= {f"{run_id}/{key}" for key in state.finished}
            open_steps |= {f"{run_id}/{key}" for key in state.intents}
            unfinished += not state.state.is_final
        return finished, open_steps, unfinished
    finally:
        await store.close()


@pytest.mark.serial
@pytest.mark.timeout(240)
async def test_a_thousand_runs_survive_kill_9_and_repeat_at_most_what_was_in_flight(
    tmp_path: Path,
) -> None:
    with fake_server(tmp_path) as fake:
        with engine(tmp_path, fake) as first:
            is_full = False
            for line in said(first):
                is_full = is_full or "accepted" in line
                if is_full and line.get("finished", 0) >= RUNS // 5:
                    break
            first.kill()
            first.wait()
        was_finished, open_steps, unfinished = await recorded(tmp_path)
        called = {line["idempotency_key"] for line in fake.arrived("")}
        in_flight = (called | open_steps) - was_finished
        begun, advanced_s = time.monotonic(), 0.0
        with engine(tmp_path, fake) as second:
            for line in said(second):
                if "opened" in line:
                    advanced_s = time.monotonic() - begun  # each was claimed: an entry more
                assert line.get("accepted", RUNS) == RUNS
                if "complete" in line:
                    end = line
                    break
            second.wait()
        calls = Counter(line["idempotency_key"] for line in fake.arrived(""))
    finished, open_steps, left = await recorded(tmp_path)
    repeated = sum(count - 1 for count in calls.values())
    print(
        f"{unfinished} runs and {len(in_flight)} calls in flight at the kill, "
        f"{repeated} issued twice; all had advanced {advanced_s:.2f} s after the start, "
        f"all were complete after {end['seconds']:.2f} s"
    )
    assert end["complete"] == RUNS
    assert (left, open_steps) == (0, set())
    assert all(result["said"].count(", ") == 1 for result in end["results"])
    assert was_finished <= finished
    assert len(finished) == 2 * RUNS
    assert [key for key in was_finished if calls[key] != 1] == []
    assert repeated <= len(in_flight)
