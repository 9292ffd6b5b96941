"""Who takes part, with which workloads, and how much of them is enough to know its speed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
StoreKind = Literal["sqlite", "postgres"]
VENVS = ROOT / ".tools" / "bench-venvs"
_PEER_SQLITE = ("W1", "W2", "W3", "W4", "W5", "W7")
_PEER_POSTGRES = ("W1", "W1.500", "W2", "W3", "W4", "W5")
_SKETCH = ("W1", "W2", "W3", "W4")
WORKS: dict[StoreKind, tuple[str, ...]] = {
    "sqlite": ("W1", "W2", "W3", "W4", "W5", "W6", "W7"),
    "postgres": (
        *("W1", "W1.500", "W1.long", "W2", "W3", "W4", "W5", "W5.second", "W6"),
        *("W8.1", "W8.2", "W8.4", "W8.1s", "W8.4s", "W9"),
    ),
}
SLOW = {
    "sqlite dbos W5": 2,
    "sqlite langgraph W5": 2,
    **{f"postgres {peer} W1.500": 1 for peer in ("dbos", "langgraph", "absurd", "restate")},
    **{f"postgres {peer} W5": 1 for peer in ("restate", "langgraph", "dbos", "absurd")},
}
"""What is measured fewer times than the rest, and last: the recovery of peers takes minutes."""


class Contestant(NamedTuple):
    """One program that does the workloads. `imports` is what W7 times, in a process of its own."""

    name: str
    python: str
    module: str
    works: tuple[str, ...]
    runs: dict[str, int] = {}  # noqa: RUF012 - never changed
    imports: str = ""
    is_peer: bool = False
    has_own_store: bool = False
    """It brings a server with a log of its own, and does both parts of W5 in one go."""


def _peer(name: str, works: tuple[str, ...], runs: dict[str, int], imports: str = "") -> Contestant:
    python = str(VENVS / name / "bin" / "python")
    return Contestant(name, python, f"bench.peers.{name}_works", works, runs, imports, is_peer=True)


_OURS = {"W1": 500, "W1.long": 100, "W4": 200, "W8": 500}
_IMPORT = "from llm_orchestrator import Context, Orchestrator, step, workflow"
# Fewer runs for the slow: their rate does not depend on how many there are.
CONTESTANTS: dict[StoreKind, tuple[Contestant, ...]] = {
    "sqlite": (
        Contestant("ours", sys.executable, "bench.ours", WORKS["sqlite"], _OURS, _IMPORT),
        Contestant("ideal", sys.executable, "bench.ideal", _SKETCH, _OURS),
        _peer("dbos", _PEER_SQLITE, {"W1": 100, "W4": 50}, "from dbos import DBOS"),
        _peer(
            "langgraph",
            _PEER_SQLITE,
            {"W1": 150, "W4": 60},
            "from langgraph.graph import StateGraph; "
            "from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver",
        ),
    ),
    "postgres": (
        Contestant("ours", sys.executable, "bench.ours", WORKS["postgres"], _OURS),
        Contestant("ideal", sys.executable, "bench.ideal_postgres", _SKETCH, _OURS),
        _peer("dbos", _PEER_POSTGRES, {"W1": 100, "W1.500": 500, "W4": 50}),
        _peer("langgraph", _PEER_POSTGRES, {"W1": 100, "W1.500": 500, "W4": 40}),
        _peer("absurd", _PEER_POSTGRES, {"W1": 200, "W1.500": 500, "W4": 100}),
        _peer("restate", _PEER_POSTGRES, {"W1": 200, "W1.500": 500, "W4": 100})._replace(
            has_own_store=True
        ),
    ),
}


def is_able(one: Contestant) -> bool:
    """False when a peer could not be installed here."""
    server = VENVS / "restate" / "server" / "node_modules"
    return Path(one.python).exists() and (not one.has_own_store or server.exists())
