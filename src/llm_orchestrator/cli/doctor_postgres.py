"""What `llmo doctor` finds of a PostgreSQL server: a report in, a finding out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from llm_orchestrator.cli.output import count
from llm_orchestrator.store.base import Member, lives

if TYPE_CHECKING:
    from llm_orchestrator.cli.session import Session
    from llm_orchestrator.store.postgres_report import Report

VERSION_MIN = 15
ROUND_TRIP_MS = 20.0
DRIFT_S = 1.0
OWN_CONNECTIONS = 4
"""What a node has besides its pool: two that write, one for its heart, one for wake-ups."""


class Finding(NamedTuple):
    """What one check found. `state`: ok, warning or error."""

    check: str
    state: str
    finding: str
    hint: str = ""


async def server_findings(session: Session) -> list[Finding]:
    """Look at the server of the configured store. Raises StoreError's subclasses, ConfigError."""
    from llm_orchestrator.store.postgres_report import report

    config = session.config
    found = await report(config.store_url, direct_url=config.direct_url, clock=session.clock)
    return [
        check_version(found),
        check_round_trip(found),
        check_clock(found),
        check_sessions(found, has_direct=bool(config.direct_url)),
        check_durability(found),
        check_pool(found, config.pool_size),
    ]


def check_version(found: Report) -> Finding:
    """15 or later, and the primary: `report` refuses anything that takes no writes."""
    if found.about.version_number < VERSION_MIN * 10_000:
        return Finding(
            "postgresql", "error", f"{found.about.version} is too old", "PostgreSQL 15 or later"
        )
    return Finding("postgresql", "ok", f"{found.about.version}, a primary that takes writes")


def check_round_trip(found: Report) -> Finding:
    """A step is one round trip."""
    text = f"{found.round_trip_ms:.2f} ms"
    if found.round_trip_ms > ROUND_TRIP_MS:
        text += ": each step waits that long at least"
        return Finding("round trip", "warning", text, "run the nodes near the database")
    return Finding("round trip", "ok", text)


def check_clock(found: Report) -> Finding:
    """The store's clock counts; a machine that is off deserves to be known."""
    text = f"this machine's is {found.drift_s:+.2f} s off the database's"
    if abs(found.drift_s) > DRIFT_S:
        return Finding("clock", "warning", f"{text}, which is used", "timedatectl")
    return Finding("clock", "ok", text)


def check_sessions(found: Report, *, has_direct: bool) -> Finding:
    """Heartbeats and wake-ups need a session of their own, which a pooler does not give."""
    variable = "LLM_ORCHESTRATOR_DIRECT_URL"
    if found.is_direct_pooled:
        what = "the direct URL" if has_direct else "the store's URL"
        return Finding(
            "sessions",
            "error",
            f"{what} leads to a pooler, which keeps no session for heartbeats and wake-ups",
            f"export {variable}=postgresql://... (the server's own)",
        )
    if not found.is_same_server:
        return Finding(
            "sessions", "error", "the direct URL leads to another server", f"mend {variable}"
        )
    if found.is_pooled:
        return Finding("sessions", "ok", "through a pooler, heartbeats and wake-ups directly")
    return Finding("sessions", "ok", "direct, no pooler")


def check_durability(found: Report) -> Finding:
    """What an acknowledged commit survives."""
    if not found.about.is_durable:
        return Finding(
            "durability",
            "warning",
            "fsync is off: what was acknowledged may be lost with the machine",
            "ALTER SYSTEM SET fsync = on",
        )
    mode = f"synchronous_commit is {found.about.synchronous_commit}"
    if not found.about.standby_names:
        return Finding("durability", "ok", f"{mode}, no synchronous standby")
    if not found.about.standbys:
        return Finding(
            "durability",
            "warning",
            f"{mode}; no standby of {found.about.standby_names!r} is seen: commits wait for one",
            "SELECT * FROM pg_stat_replication",
        )
    return Finding(
        "durability", "ok", f"{mode}, on {count(found.about.standbys, 'standby server')} too"
    )


def check_pool(found: Report, size: int) -> Finding:
    """A node must find as many connections as it may want."""
    left, wanted = found.about.connections_max - found.about.connections, size + OWN_CONNECTIONS
    text = (
        f"DB_POOL_SIZE {size}: a node opens up to {wanted}; the server has {left} of "
        f"{found.about.connections_max} left"
    )
    if left < wanted:
        return Finding("connections", "warning", text, "lower DB_POOL_SIZE, or a pooler")
    return Finding("connections", "ok", text)


def check_nodes(nodes: Sequence[Member]) -> Finding:
    """Who lives."""
    alive = [node for node in nodes if lives(node)]
    here = sum(node.is_connected for node in alive)
    if not alive:
        return Finding("nodes", "ok", "none lives", "llmo serve")
    text = f"{count(here, 'node')} alive and connected"
    if here < len(alive):
        text += f", {len(alive) - here} not connected"
        return Finding("nodes", "warning", text, "llmo nodes list")
    return Finding("nodes", "ok", text, "llmo nodes list")
