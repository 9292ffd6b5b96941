"""What a PostgreSQL server says of itself, for `llmo doctor`. Reads only, needs no tables of ours.

A pooler is recognised by the process id: it hands out one of its own when a client connects, and
the server names another one.
"""

from __future__ import annotations

import statistics
from typing import NamedTuple

import asyncpg  # type: ignore[import-untyped]

from llm_orchestrator.clock import Clock
from llm_orchestrator.model import MICROSECONDS
from llm_orchestrator.store.postgres_address import Address, parse_address
from llm_orchestrator.store.postgres_connect import Connection, Server, connect, translate

_ROUNDS = 5
_ABOUT = """\
SELECT current_setting('server_version_num')::integer, current_setting('server_version'),
       current_setting('synchronous_commit'), current_setting('synchronous_standby_names'),
       (SELECT count(*) FROM pg_stat_replication WHERE sync_state IN ('sync', 'quorum')),
       current_setting('fsync') = 'on', current_setting('max_connections')::integer,
       (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend')
"""


class About(NamedTuple):
    """What the server answers about itself."""

    version_number: int
    """150004 for 15.4."""
    version: str
    synchronous_commit: str
    standby_names: str
    """`synchronous_standby_names`: empty where nobody waits for a standby."""
    standbys: int
    """Synchronous standbys that are connected, as far as this role may see."""
    is_durable: bool
    """`fsync` is on."""
    connections_max: int
    connections: int


class Report(NamedTuple):
    """One look at the server that may be written to."""

    about: About
    round_trip_ms: float
    drift_s: float
    """How far this machine's clock is ahead of the server's."""
    is_pooled: bool
    """The store's URL leads to a pooler."""
    is_direct_pooled: bool
    """So does the direct one (the store's own where there is none)."""
    is_same_server: bool
    """Both lead to the same server."""


async def report(url: str, *, direct_url: str, clock: Clock) -> Report:
    """Look at the server behind `url`. Raises StoreError's subclasses, and ConfigError."""
    address = parse_address(url)
    direct = parse_address(direct_url) if direct_url else address
    connection, server = await connect(address, is_pooled=True)
    drift_s = (clock.now_us() - server.now_us) / MICROSECONDS
    try:
        about = About(*await connection.fetchrow(_ABOUT))
        trip_ms = await _round_trip_ms(connection, clock)
        is_shared = await is_pooled(connection)
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        raise translate(error, address.shown) from error
    finally:
        connection.terminate()
    is_direct_pooled, other = await _direct(direct)
    return Report(
        about,
        round_trip_ms=trip_ms,
        drift_s=drift_s,
        is_pooled=is_shared,
        is_direct_pooled=is_direct_pooled,
        is_same_server=_start_of(other) == _start_of(server),
    )


def _start_of(server: Server) -> str:
    """When it started: the same through whichever address it is reached."""
    return server.identity.rpartition(" ")[0]


async def _direct(address: Address) -> tuple[bool, Server]:
    """Whether it leads to a pooler, and to which server in the end."""
    connection, server = await connect(address, is_pooled=True)
    try:
        return await is_pooled(connection), server
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        raise translate(error, address.shown) from error
    finally:
        connection.terminate()


async def is_pooled(connection: Connection) -> bool:
    """True when something between us and the server shares its processes out."""
    seen: int = await connection.fetchval("SELECT pg_backend_pid()")
    return seen != int(connection.get_server_pid())


async def _round_trip_ms(connection: Connection, clock: Clock) -> float:
    took = []
    for _ in range(_ROUNDS):
        begun = clock.monotonic()
        await connection.execute("SELECT 1")
        took.append((clock.monotonic() - begun) * 1_000)
    return statistics.median(took)


_WAY = """\
SELECT coalesce(host(inet_server_addr()), ''), coalesce(host(inet_client_addr()), ''),
       coalesce((SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()), false)
"""
_FOLLOWERS = """\
SELECT application_name, coalesce(host(client_addr), ''), coalesce(sync_state, '')
FROM pg_stat_replication ORDER BY application_name
"""


class Follower(NamedTuple):
    """A server that takes the log. What this role may not see is empty."""

    name: str
    address: str
    """Empty: it comes through a socket of the server's own machine, or we may not see it."""
    sync_state: str
    """`sync`, `quorum`, `potential`, `async`; empty: we may not see it."""


class Way(NamedTuple):
    """How we reach the server, and who follows it."""

    server: str
    client: str
    """Addresses as the server sees them; empty for a socket of its machine."""
    is_encrypted: bool
    followers: tuple[Follower, ...]


async def way(url: str) -> Way:
    """Ask the server behind `url`. Raises StoreError's subclasses, and ConfigError."""
    address = parse_address(url)
    connection, _ = await connect(address, is_pooled=True)
    try:
        server, client, is_encrypted = await connection.fetchrow(_WAY)
        found = tuple(Follower(*row) for row in await connection.fetch(_FOLLOWERS))
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        raise translate(error, address.shown) from error
    finally:
        connection.terminate()
    return Way(server, client, is_encrypted, found)
