"""`llmo nodes`: who executes the runs of a store, and when each was last heard of.

Reads only. Ages are told by the store's clock, whatever hour this machine thinks it is.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated

import typer

from llm_orchestrator.cli.options import Format, Output, make_app
from llm_orchestrator.cli.output import duration, print_rows, stamp
from llm_orchestrator.cli.session import session_of
from llm_orchestrator.model import Json

if TYPE_CHECKING:
    from llm_orchestrator.store.base import Database, Member

app = make_app("List the nodes that execute runs. Without a verb: list.")
COLUMNS = ("node_id", "state", "region", "host", "pid", "runs", "last_beat")
LIMIT = 1_000


@app.callback()
def nodes() -> None:
    """Keep `list` a verb of its own, although it is the only one."""


@app.command("list")
def list_nodes(
    context: typer.Context,
    *,
    is_all: Annotated[
        bool, typer.Option("--all", help="Also those that lately left or died.")
    ] = False,
    output: Output = Format.TABLE,
) -> None:
    """List the nodes of the store, the newest first."""
    session = session_of(context)

    async def work() -> list[dict[str, Json]]:
        async with session.client() as store:
            return await _rows(store, is_all=is_all)

    rows = session.run(work())
    print_rows(rows, output, columns=COLUMNS, key="node_id")
    if not rows:
        session.note("no nodes\nhint: llmo serve")


async def _rows(store: Database, *, is_all: bool) -> list[dict[str, Json]]:
    """A file's engine does not beat (a lock says that it lives): its runs are counted instead."""
    from llm_orchestrator.model import RunState
    from llm_orchestrator.store.base import RunFilter, lives

    nodes = [node for node in await store.shelf.nodes(LIMIT) if is_all or lives(node)]
    driven: Counter[str | None] = Counter()
    if any(lives(node) and not node.beat for node in nodes):
        running = RunFilter(states=(RunState.RUNNING,), limit=10_000)
        driven.update(run.owner for run in await store.look.runs(running))
        if not await store.is_served():
            nodes = [node._replace(is_connected=False) for node in nodes]
    now = store.clock.now_us()
    return [facts_of(node, now, counted=driven[node.node_id]) for node in nodes]


def facts_of(node: Member, now: int, *, counted: int = 0) -> dict[str, Json]:
    """A node for printing. `now` is microseconds on the store's clock.

    `counted`: the runs that a node drives which does not tell of them.
    """
    from llm_orchestrator.store.base import lives

    told = node.info if isinstance(node.info, dict) and node.beat else {"runs": counted}
    known = node.info if isinstance(node.info, dict) else {}
    age_ms = max(0, now - node.heartbeat_at) / 1000
    last = f"{duration(age_ms)} ago" if node.beat else None
    if lives(node) and not node.is_connected:
        last = f"{last}, disconnected" if last else "disconnected"
    return {
        "node_id": node.node_id,
        "state": node.state,
        "region": node.region,
        "host": known.get("host"),
        "pid": known.get("pid"),
        "runs": told.get("runs") if lives(node) else 0,
        "room": told.get("room") if lives(node) else 0,
        "is_connected": node.is_connected,
        "beat": node.beat,
        "beat_age_ms": round(age_ms) if node.beat else None,
        "started_at": stamp(node.started_at),
        "heartbeat_at": stamp(node.heartbeat_at) if node.beat else None,
        "last_beat": last,
    }
