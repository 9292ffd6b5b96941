"""`llmo nodes list`: what is printed of a node, and that it works on a file."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from llm_orchestrator.cli.main import main
from llm_orchestrator.cli.nodes import facts_of
from llm_orchestrator.clock import RealClock
from llm_orchestrator.store.base import Member, NodeState
from llm_orchestrator.store.sqlite import SQLiteStore

NOW = 1_800_000_000_000_000
INFO = {"host": "db-7", "pid": 41, "runs": 3, "room": 997}


def a_member(state: NodeState = NodeState.ALIVE, *, beat: int = 9, is_here: bool = True) -> Member:
    return Member("n-1", "eu", state, beat, is_here, NOW - 90_000_000, NOW - 400_000, INFO)


def test_a_node_tells_its_runs_and_the_store_its_age() -> None:
    facts = facts_of(a_member(), NOW)
    assert (facts["host"], facts["pid"], facts["runs"], facts["room"]) == ("db-7", 41, 3, 997)
    assert (facts["beat_age_ms"], facts["last_beat"]) == (400, "400 ms ago")


def test_a_node_whose_session_is_closed_is_shown_disconnected() -> None:
    assert facts_of(a_member(is_here=False), NOW)["last_beat"] == "400 ms ago, disconnected"
    gone = facts_of(a_member(NodeState.DEAD, is_here=False), NOW)
    assert (gone["last_beat"], gone["runs"], gone["state"]) == ("400 ms ago", 0, "dead")


def test_a_node_that_never_beats_has_no_age_and_its_runs_are_counted() -> None:
    facts = facts_of(a_member(beat=0), NOW, counted=5)
    assert (facts["runs"], facts["beat_age_ms"], facts["last_beat"]) == (5, None, None)


def test_a_clock_that_is_behind_gives_no_negative_age() -> None:
    assert facts_of(a_member(), NOW - 3_600_000_000)["beat_age_ms"] == 0


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A file of which one engine left and another one was killed."""

    async def live() -> None:
        for name in ("left-1", "killed-1"):
            store = SQLiteStore(tmp_path / "runs.db", node_id=name, clock=RealClock())
            await store.open_as_engine()
            members = await store.members()
            await members.join(name, "local", {"host": "here", "pid": 1})
            if name == "left-1":
                await members.leave(name, NodeState.LEFT)
            await members.close()
            await store.close()

    asyncio.run(live())
    return f"sqlite:///{tmp_path / 'runs.db'}"


def test_a_files_nodes_are_listed(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--store", url, "nodes"]) == 0
    head, row = capsys.readouterr().out.splitlines()
    assert " ".join(head.split()) == "NODE STATE REGION HOST PID RUNS LAST BEAT NOTE"
    assert row.split() == ["killed-1", "alive", "local", "here", "1", "0", "disconnected", "-"]


def test_those_that_left_are_listed_when_asked_for(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--store", url, "nodes", "list", "--all", "-o", "ids"]) == 0
    assert set(capsys.readouterr().out.split()) == {"left-1", "killed-1"}
    for kind in ("json", "jsonl"):
        assert main(["--store", url, "nodes", "list", "-o", kind]) == 0
        found = json.loads(capsys.readouterr().out)
        (row,) = found if kind == "json" else [found]
        assert (row["node_id"], row["is_connected"]) == ("killed-1", False)


def test_where_nobody_is_a_hint_says_how_to_begin(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def make() -> None:
        store = SQLiteStore(tmp_path / "runs.db", node_id="maker", clock=RealClock())
        await store.open_as_engine()
        await store.close()

    asyncio.run(make())
    assert main(["--store", f"sqlite:///{tmp_path / 'runs.db'}", "nodes"]) == 0
    assert "llmo serve" in capsys.readouterr().err
