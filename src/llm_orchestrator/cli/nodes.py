"""`llmo nodes`: who executes the runs of a store, when each was last heard of, and draining one.

Ages are told by the store's clock, whatever hour this machine thinks it is.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated

import typer

from llm_orchestrator.cli.options import Format, Output, make_app
from llm_orchestrator.cli.output import duration, print_rows
from llm_orchestrator.cli.session import session_of, whoami
from llm_orchestrator.model import Json, stamp

if TYPE_CHECKING:
    from llm_orchestrator.engine.maintenance import Orders
    from llm_orchestrator.store.base import Database, Member

app = make_app("List the nodes that execute runs, drain one. Without a verb: list.")
COLUMNS = ("node_id", "state", "region", "host", "pid", "runs", "last_beat", "note")
LIMIT = 1_000


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


@app.command()
def drain(
    context: typer.Context,
    node: Annotated[str, typer.Argument(metavar="NODE", help="Its id, or how that begins.")],
    *,
    is_undone: Annotated[bool, typer.Option("--undo", help="Let it work again.")] = False,
    reason: Annotated[str, typer.Option("--reason", help="Why.")] = "",
    by: Annotated[str | None, typer.Option("--by", help="Who says so (you).")] = None,
) -> None:
    """Let a node end its steps in flight and hand everything else to the others.

    It claims nothing and is not ready until `--undo`, or until its process is started again.
    """
    session = session_of(context)

    async def work() -> str:
        from llm_orchestrator.engine.maintenance import drain_node, undrain_node

        async with session.client() as store:
            now = store.clock.now_us()
            detail: dict[str, Json] = {"by": by, "reason": reason}
            action = "nodes.undrain" if is_undone else "nodes.drain"
            async with session.audited(store, action, target=node, detail=detail) as told:
                if is_undone:
                    found = await undrain_node(store, node)
                else:
                    who = by or whoami()
                    found = await drain_node(store, node, by=who, reason=reason, since=now)
                told["target"] = found
            return found

    node_id = session.run(work())
    if is_undone:
        session.note(f"node {node_id} works again")
    else:
        session.note(f"node {node_id} is drained\nhint: llmo nodes drain {node_id} --undo")


async def _rows(store: Database, *, is_all: bool) -> list[dict[str, Json]]:
    """A file's engine does not beat (a lock says that it lives): its runs are counted instead."""
    from llm_orchestrator.engine.maintenance import read_orders
    from llm_orchestrator.model import RunState
    from llm_orchestrator.store.base import RunFilter, lives

    nodes = [node for node in await store.shelf.nodes(LIMIT) if is_all or lives(node)]
    driven: Counter[str | None] = Counter()
    if any(lives(node) and not node.beat for node in nodes):
        running = RunFilter(states=(RunState.RUNNING,), limit=10_000)
        driven.update(run.owner for run in await store.look.runs(running))
        if not await store.is_served():
            nodes = [node._replace(is_connected=False) for node in nodes]
    now, orders = store.clock.now_us(), await read_orders(store.shelf)
    return [
        {**facts_of(node, now, counted=driven[node.node_id]), "note": _note(node, orders)}
        for node in nodes
    ]


def _note(node: Member, orders: Orders) -> str | None:
    """What is out of the ordinary: ordered, or told by the node itself."""
    from llm_orchestrator.engine.maintenance import Mode
    from llm_orchestrator.store.base import lives

    if not lives(node):
        return None
    told = node.info if isinstance(node.info, dict) else {}
    memory = told.get("memory")
    notes = []
    if orders.drains(node.node_id):
        notes.append("drained")
    elif orders.standing.enabled:
        notes.append("maintenance" + (": drains" if orders.standing.mode is Mode.DRAIN else ""))
    if node.beat and isinstance(memory, dict) and memory.get("is_shedding"):
        notes.append("short of memory")
    return ", ".join(notes) or None


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
