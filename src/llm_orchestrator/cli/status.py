"""`llmo status`: one screen that says how the store's runs are, what is wrong, and what mends it.

It asks the store, not a server, so it works when every server is down. Reads only. Each line is
`ok`, `warning` or `error` with the command that shows more or mends it; the worst come first. The
exit code is 1 when there is an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

import typer

from llm_orchestrator.cli.backup_findings import record_findings
from llm_orchestrator.cli.doctor_postgres import Finding
from llm_orchestrator.cli.options import ObjectFormat, make_app
from llm_orchestrator.cli.output import count, print_object, print_table
from llm_orchestrator.cli.session import Session, session_of
from llm_orchestrator.errors import StoreError
from llm_orchestrator.model import MICROSECONDS, Json, Run, RunState

if TYPE_CHECKING:
    from llm_orchestrator.engine.breakers import BreakerView
    from llm_orchestrator.engine.maintenance import Orders
    from llm_orchestrator.store.base import Member
    from llm_orchestrator.store.statistics import RunCount, Statistics

app = make_app("What is wrong, and which command mends it.")
COLUMNS = ("what", "state", "finding", "command")
STALLED_S = 300
"""A driven run without a new entry for so long deserves a look."""
DUE_S = 30
"""Nobody should wait so long for a node."""
SILENT_S = 10.0
LAG_S = 30.0
PAUSED_MAX = 1_000
_WORST = ("error", "warning", "ok")


@dataclass(frozen=True, slots=True)
class Seen:
    """What the store says, read within a moment. Times are microseconds on its clock."""

    now_us: int
    took_ms: float
    is_served: bool
    census: Sequence[RunCount]
    statistics: Statistics
    paused: Sequence[Run]
    members: Sequence[Member]
    orders: Orders
    breakers: Sequence[BreakerView]
    backups: Mapping[str, Json] = field(default_factory=dict)
    """The records of that kind."""


@app.command()
def status(
    context: typer.Context,
    *,
    output: Annotated[
        ObjectFormat, typer.Option("--output", "-o", help="How to print.")
    ] = ObjectFormat.TABLE,
) -> int:
    """Say what is wrong with the store, its nodes and its runs; exit code 1 when something is."""
    session = session_of(context)
    found = sorted(session.run(_findings(session)), key=lambda each: _WORST.index(each.state))
    rows = [dict(zip(COLUMNS, finding, strict=True)) for finding in found]
    if output is ObjectFormat.TABLE:
        print_table(rows, COLUMNS)
    else:
        print_object(rows, output)
    return 1 if any(finding.state == "error" for finding in found) else 0


async def _findings(session: Session) -> list[Finding]:
    try:
        seen = await _look(session)
    except StoreError as error:
        return [Finding("store", "error", error.message, error.hint or "llmo doctor")]
    return [
        Finding("store", "ok", f"{session.store_url} answered in {seen.took_ms:.0f} ms"),
        *node_findings(seen),
        *order_findings(seen),
        *run_findings(seen),
        *standby_findings(seen),
        *breaker_findings(seen),
        *record_findings(seen.backups, seen.now_us),
    ]


async def _look(session: Session) -> Seen:
    from llm_orchestrator.engine.breakers import list_breakers
    from llm_orchestrator.engine.maintenance import read_orders
    from llm_orchestrator.store.base import RunFilter

    async with session.client() as store:
        started = session.clock.monotonic()
        census = await store.counts.census()
        now_us = store.clock.now_us()
        stalled_before = now_us - STALLED_S * MICROSECONDS
        return Seen(
            now_us,
            (session.clock.monotonic() - started) * 1_000,
            await store.is_served(),
            census,
            await store.counts.statistics(now_us, stalled_before=stalled_before),
            await store.look.runs(RunFilter(states=(RunState.PAUSED,), limit=PAUSED_MAX)),
            await store.shelf.nodes(),
            await read_orders(store.shelf),
            await list_breakers(store.shelf, now_us),
            await store.shelf.records("backup"),
        )


def node_findings(seen: Seen) -> list[Finding]:
    """Whether anybody executes runs, and whether everybody who should gives signs of life."""
    from llm_orchestrator.store.base import lives

    alive = [each for each in seen.members if lives(each) and (each.beat or seen.is_served)]
    if not alive:
        return [Finding("nodes", "error", "nobody executes runs", "llmo serve")]
    silent = [
        member.node_id
        for member in alive
        if member.beat and seen.now_us - member.heartbeat_at > SILENT_S * MICROSECONDS
    ]
    if silent and len(silent) == len(alive):
        what = f"all nodes are silent: {', '.join(sorted(silent))}"
        return [Finding("nodes", "error", what, "llmo serve")]
    if silent:
        what = f"silent: {', '.join(sorted(silent))}; others take their runs over"
        return [Finding("nodes", "warning", what, "llmo nodes list")]
    return [Finding("nodes", "ok", f"{count(len(alive), 'node')} alive")]


def order_findings(seen: Seen) -> list[Finding]:
    """What operators have switched off, lest they forget."""
    found = []
    standing = seen.orders.standing
    if standing.enabled:
        why = f": {standing.reason}" if standing.reason else ""
        what = f"on since {_ago(seen.now_us, standing.since)}, by {standing.by}{why}"
        found.append(Finding("maintenance", "warning", what, "llmo maintenance disable"))
    found += [
        Finding("drained", "warning", f"node {node} is drained", f"llmo nodes drain {node} --undo")
        for node in sorted(seen.orders.drained)
    ]
    return found


def run_findings(seen: Seen) -> list[Finding]:
    """How many runs there are, and which of them want somebody."""
    by_state: Counter[str] = Counter()
    for each in seen.census:
        by_state[each.state] += each.number
    shown = ", ".join(f"{by_state[state]} {state}" for state in RunState if by_state[state])
    found = [Finding("runs", "ok", shown or "none", "llmo runs list")]
    waiting, oldest = seen.statistics.waiting, seen.now_us
    for queue in seen.statistics.queues:
        oldest = min(oldest, queue.since)
    if waiting and seen.now_us - oldest > DUE_S * MICROSECONDS:
        verb = "waits" if waiting == 1 else "wait"
        what = f"{count(waiting, 'due run')} {verb} for a node, the oldest since "
        found.append(
            Finding(
                "queues",
                "error",
                what + _ago(seen.now_us, oldest),
                "llmo runs list --state pending",
            )
        )
    if seen.statistics.stalled:
        what = f"{count(seen.statistics.stalled, 'driven run')} without a new entry for "
        what += f"{STALLED_S // 60} minutes"
        found.append(Finding("stalled", "warning", what, "llmo runs list --state running"))
    reasons = Counter(run.reason for run in seen.paused)
    found += [
        Finding(
            f"paused: {reason or 'no reason'}",
            "warning",
            f"{count(number, 'run')} for a person to decide",
            "llmo runs list --state paused",
        )
        for reason, number in sorted(reasons.items())
    ]
    return found


def standby_findings(seen: Seen) -> list[Finding]:
    """Who follows the database, and how far behind."""
    found = []
    for standby in seen.statistics.standbys or ():
        is_late = standby.exposed_s > LAG_S
        kind = "synchronous" if standby.is_sync else "asynchronous"
        what = f"{standby.name}, {kind}, {standby.exposed_s:.1f} s behind"
        state = "warning" if is_late else "ok"
        found.append(Finding("standby", state, what, "llmo doctor" if is_late else ""))
    return found


def breaker_findings(seen: Seen) -> list[Finding]:
    """Providers that are not asked."""
    return [
        Finding(
            "breaker",
            "warning",
            f"{breaker.name} is {breaker.state}; asked again in {breaker.retry_in_s:.0f} s",
            "llmo breakers list",
        )
        for breaker in seen.breakers
        if breaker.state != "closed"
    ]


def _ago(now_us: int, then_us: int) -> str:
    seconds = max(0, (now_us - then_us) // MICROSECONDS)
    if seconds < 120:
        return f"{seconds} s"
    return f"{seconds // 60} min" if seconds < 7_200 else f"{seconds // 3_600} h"
