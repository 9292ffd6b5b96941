"""Finding the server that may be written to, and what PostgreSQL's errors mean.

A URL may name several hosts. All of them are asked at once: a host that does not answer costs no
time, and the first one that is no standby wins. After a server has kept a commit waiting its word
is not enough (a cut-off primary still says that it is one): then every host is heard, and the
highest timeline wins.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import asyncpg  # type: ignore[import-untyped]

from llm_orchestrator.errors import (
    ConfigError,
    OrchestratorError,
    StoreAbsent,
    StoreDamaged,
    StoreDenied,
    StoreError,
    StoreForeign,
    StoreFull,
    StoreUnavailable,
)
from llm_orchestrator.store.postgres_address import Address
from llm_orchestrator.store.queries import load_queries

Connection = Any
"""An `asyncpg.Connection`; the package ships no types."""

CONNECT_S = 5.0
ALL_HOSTS_S = 2.0
"""How long every host is given to say who it is when a leader is sought."""

SETTINGS = {
    "application_name": "llm-orchestrator",
    "default_transaction_isolation": "read committed",
    "jit": "off",
    "idle_in_transaction_session_timeout": "1s",
    "lock_timeout": "10s",
    "tcp_keepalives_idle": "5",
    "tcp_keepalives_interval": "2",
    "tcp_keepalives_count": "3",
    "tcp_user_timeout": "10000",
    "client_min_messages": "warning",
}


_PEER = {
    "TCP_KEEPIDLE": 5,
    "TCP_KEEPINTVL": 2,
    "TCP_KEEPCNT": 3,
    "TCP_USER_TIMEOUT": 10_000,
}
"""Seconds, seconds, a count, milliseconds: the client's side of the same."""


@dataclass(frozen=True, slots=True)
class Server:
    """What one server says of itself."""

    is_read_only: bool
    """It is a standby, or was told to take no writes."""
    identity: str
    now_us: int
    timeline: str


async def server_of(connection: Connection) -> Server:
    """Ask a server who it is."""
    row = await connection.fetchrow(load_queries("postgres")["server"].sql)
    assert row is not None
    return Server(*row)


async def connect(
    address: Address,
    *,
    is_pooled: bool = False,
    settings: Mapping[str, str] | None = None,
    seek_leader: bool = False,
) -> tuple[Connection, Server]:
    """A connection to the primary. Raises StoreError's subclasses.

    `is_pooled`: through a pooler in transaction mode, which keeps no prepared statements and passes
    no settings on. (The driver prepares and executes an unnamed one within one exchange.)
    `seek_leader`: hear every host before choosing.
    """
    attempts = [
        asyncio.ensure_future(_one(host, is_pooled, settings or {})) for host in address.hosts
    ]
    chosen: tuple[Connection, Server] | None = None
    try:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ALL_HOSTS_S if seek_leader else CONNECT_S):
                pending = set(attempts)
                while pending and (chosen is None or seek_leader):
                    done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                    chosen = _best([chosen] if chosen else [], done)
    except BaseException:
        chosen = None  # nobody will take it
        raise
    finally:
        for attempt in attempts:
            _drop(attempt, keep=chosen)
    if chosen is not None:
        return chosen
    raise _why_not(address, attempts)


async def connect_standby(address: Address) -> Connection | None:
    """A connection to a server that only follows; None when no host of the URL is one."""
    for host in address.hosts:
        try:
            async with asyncio.timeout(ALL_HOSTS_S):
                connection, server = await _one(host, is_pooled=False, settings={})
        except (TimeoutError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            continue
        if server.is_read_only:
            return connection
        connection.terminate()
    return None


def _best(
    known: Sequence[tuple[Connection, Server]],
    done: Collection[asyncio.Future[tuple[Connection, Server]]],
) -> tuple[Connection, Server] | None:
    found = [*known, *(task.result() for task in done if task.exception() is None)]
    writable = [pair for pair in found if not pair[1].is_read_only]
    return max(writable, key=lambda pair: pair[1].timeline, default=None)


def _drop(attempt: asyncio.Future[Any], *, keep: tuple[Connection, Server] | None) -> None:
    """Close what an attempt opened, now or when it ends, unless it is the chosen one."""

    def close(task: asyncio.Future[tuple[Connection, Server]]) -> None:
        if not task.cancelled() and task.exception() is None:
            connection = task.result()[0]
            if keep is None or connection is not keep[0]:
                connection.terminate()

    attempt.cancel()
    attempt.add_done_callback(close)


async def _one(dsn: str, is_pooled: bool, settings: Mapping[str, str]) -> tuple[Connection, Server]:
    connection = await asyncpg.connect(
        dsn,
        timeout=CONNECT_S,
        statement_cache_size=0 if is_pooled else 200,
        max_cached_statement_lifetime=0,
        server_settings=None if is_pooled else {**SETTINGS, **settings},
    )
    try:
        _watch_peer(connection)
        return connection, await server_of(connection)
    except BaseException:
        connection.terminate()
        raise


def _watch_peer(connection: Connection) -> None:
    """Let the kernel notice a peer that is gone without a word, as the server does of us."""
    peer = connection._transport.get_extra_info("socket")  # noqa: SLF001 (the driver has no word)
    if peer.family not in (socket.AF_INET, socket.AF_INET6):
        return
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _PEER.items():
        if hasattr(socket, name):  # Linux has them all
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _why_not(address: Address, attempts: Sequence[asyncio.Future[Any]]) -> OrchestratorError:
    """One error for all hosts. What only some of them say may pass with the others' trouble."""
    reasons: list[str] = []
    final: list[OrchestratorError] = []
    for attempt in attempts:
        error = None if attempt.cancelled() or not attempt.done() else attempt.exception()
        if attempt.cancelled() or not attempt.done():
            reasons.append("no answer in time")
        elif error is None:
            reasons.append("it takes no writes (a standby, or read-only)")
        else:
            reasons.append(str(error) or type(error).__name__)
            told = translate(error, address.shown)
            if isinstance(error, asyncpg.ClientConfigurationError):
                final.append(ConfigError(f"the store's URL: {error}", hint="llmo --store URL"))
            elif not told.retryable:
                final.append(told)
    if len(final) == len(attempts):
        return final[0]
    return StoreUnavailable(
        f"the store {address.shown} cannot be reached for writing: "
        + "; ".join(dict.fromkeys(reasons)),
        hint="llmo doctor",
    )


def is_connection_trouble(error: BaseException) -> bool:
    """True when the connection cannot be used any more, or the server is no primary any more.

    A statement that was under way then has an unknown outcome.
    """
    if isinstance(error, OSError | EOFError | asyncpg.PostgresConnectionError):
        return True
    if isinstance(error, asyncpg.InternalClientError):
        return True  # the server has said good-bye, and the driver has not heard it close
    if isinstance(error, asyncpg.InterfaceError):
        return not isinstance(error, ValueError)  # DataError is both: a value that does not fit
    code = getattr(error, "sqlstate", None) or ""
    return code.startswith(("57P", "08", "25006", "25P03", "25P04"))


def is_taken(error: BaseException) -> bool:
    """True when a key was there already: written by ourselves, or by somebody who was quicker."""
    return getattr(error, "sqlstate", None) == "23505"


def is_passing(error: BaseException) -> bool:
    """True when nothing was written and the same statement may simply succeed the next time.

    A deadlock, a serialization failure, a lock that was not had in time, a cancelled statement.
    """
    return getattr(error, "sqlstate", None) in ("40P01", "40001", "55P03", "57014")


def is_data_trouble(error: BaseException) -> bool:
    """True when what was sent is at fault, or rows that it touches: not the server as a whole."""
    if isinstance(error, asyncpg.InterfaceError):
        return isinstance(error, ValueError)
    if isinstance(error, asyncpg.PostgresError):
        code = error.sqlstate or ""
        return code.startswith(("22", "23", "XX001", "XX002", "54"))
    return isinstance(error, TypeError | ValueError | ArithmeticError | RecursionError)


_FULL = "the disk of {} takes no more ({}); nothing acknowledged is lost"


def translate(error: BaseException, shown: str) -> StoreError:
    """What a driver's error means to the operator. What may pass by itself is `retryable`."""
    if isinstance(error, StoreError):
        return error
    code, text = getattr(error, "sqlstate", None) or "", str(error) or type(error).__name__
    if isinstance(error, TimeoutError):
        text = "no answer in time"
    if code in ("28P01", "28000"):
        return StoreDenied(
            f"{shown} does not let us in: {text}",
            hint="set the user and password in LLM_ORCHESTRATOR_URL, or PGPASSWORD",
        )
    if code == "42501":
        return StoreDenied(f"{shown}: {text}", hint="GRANT ALL ON SCHEMA public TO the user")
    if code == "3D000":
        return StoreAbsent(f"there is no such database: {text}", hint="createdb NAME")
    if code == "53100":
        return StoreFull(_FULL.format(shown, text), hint="llmo doctor")
    if code in ("XX001", "XX002"):
        return StoreDamaged(
            f"pages of {shown} are damaged: {text}", hint="llmo journal verify --all"
        )
    if code in ("42P01", "42703"):
        return StoreForeign(f"{shown} lacks a table or column of ours: {text}", hint="llmo doctor")
    if code == "53300":
        return StoreUnavailable(
            f"{shown} has no connection left: {text}", hint="lower DB_POOL_SIZE, or a pooler"
        )
    if (
        is_connection_trouble(error)
        or is_passing(error)
        or is_taken(error)
        or code.startswith(("57", "53"))
    ):
        return StoreUnavailable(f"the store {shown} does not answer: {text}", hint="llmo doctor")
    return StoreError(f"{shown}: {text} {code}".rstrip(), hint="llmo doctor")
