"""Who takes part, with which workloads, and how much of them is enough to know its speed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
_ALL = ("W1", "W2", "W3", "W4", "W5", "W6", "W7")


class Contestant(NamedTuple):
    """One program that does the workloads. `imports` is what W7 times, in a process of its own."""

    name: str
    python: str
    module: str
    works: tuple[str, ...]
    runs: dict[str, int]
    imports: str
    is_peer: bool = False


def _peer(name: str, runs: dict[str, int], imports: str) -> Contestant:
    python = ROOT / ".tools" / "bench-venvs" / name / "bin" / "python"
    works = tuple(work for work in _ALL if work != "W6")
    return Contestant(
        name, str(python), f"bench.peers.{name}_works", works, runs, imports, is_peer=True
    )


CONTESTANTS = (
    Contestant(
        "ours",
        sys.executable,
        "bench.ours",
        _ALL,
        {"W1": 500, "W4": 200},
        "from llm_orchestrator import Context, Orchestrator, step, workflow",
    ),
    Contestant(
        "ideal", sys.executable, "bench.ideal", ("W1", "W2", "W3", "W4"), {"W1": 500, "W4": 200}, ""
    ),
    # Fewer runs for the slow: their rate does not depend on how many there are.
    _peer("dbos", {"W1": 100, "W4": 50}, "from dbos import DBOS"),
    _peer(
        "langgraph",
        {"W1": 150, "W4": 60},
        "from langgraph.graph import StateGraph; "
        "from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver",
    ),
)
