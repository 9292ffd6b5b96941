"""Copying and exchanging a store on PostgreSQL (see copying.py).

A dump is pg_dump of an exported snapshot, from which the Cut is read, too: one moment. An aside is
another database of the same server. Taking over: the live database lets nobody in any more, its
sessions are ended, what it knows is carried over through one connection that was there before, then
both are renamed in one transaction. Until that commits the live store has its name and its rows.

Whoever makes an aside, or has closed the live database, holds an advisory lock for as long as he
lives. What a dead one has left (`leftovers`, a database that lets nobody in) the next call mends.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO, Self
from urllib.parse import unquote, urlsplit

import asyncpg  # type: ignore[import-untyped]

from llm_orchestrator.clock import Clock
from llm_orchestrator.errors import (
    NotFound,
    StoreAbsent,
    StoreDamaged,
    StoreDenied,
    StoreError,
    StoreForeign,
)
from llm_orchestrator.model import MICROSECONDS, RunState
from llm_orchestrator.store.base import Database
from llm_orchestrator.store.copying import Advance, ChainHead, Cut, Identity, Role, RunHead
from llm_orchestrator.store.postgres import PostgresStore
from llm_orchestrator.store.postgres_address import Address, parse_address
from llm_orchestrator.store.postgres_connect import Connection, connect, translate
from llm_orchestrator.store.postgres_programs import find, pour, reached, run
from llm_orchestrator.store.postgres_schema import prepare
from llm_orchestrator.store.postgres_tables import PostgresTables

DUMP = "database.dump"
TABLES = (
    *("workflows", "runs", "journal", "inbox", "progress", "records", "vectors", "blobs"),
    *("commits", "audit", "store", "schema_version"),
)
"""Every table but `nodes`."""
_BASE_MAX = 38
"""Bytes: with what comes behind it a name stays under 63, where PostgreSQL cuts it silently."""
_OURS = 1_717
"""The connection limit of every aside: CREATE DATABASE sets it together with the name, so that no
database of other people, however it is called, is taken for one that a dead restore has left."""
_NAMES = {"restore": r"[0-9a-f]{8}", "old": r"\d{8}_\d{6}(_\d+)?"}
_LOOK_S = 0.05
_PATIENCE_S = 30.0
_TROUBLE = (OSError, asyncpg.PostgresError, asyncpg.InterfaceError)
_PATIENT = {
    "idle_in_transaction_session_timeout": "0",
    "lock_timeout": "0",
    "statement_timeout": "0",
    "synchronous_commit": "on",
    "application_name": "llm-orchestrator recovery",
}
_FINAL = [state.value for state in RunState if state.is_final]
_HEADS = """
SELECT r.run_id::text, r.state, j.seq, j.digest FROM runs r CROSS JOIN LATERAL
    (SELECT seq, digest FROM journal WHERE run_id = r.run_id ORDER BY seq DESC LIMIT 1) j
WHERE r.state <> ALL ($1::text[]) ORDER BY r.run_id
"""
_CHAINS = "SELECT DISTINCT ON (chain_id) chain_id, number, digest FROM audit "
_CHAINS += "ORDER BY chain_id, number DESC"
_BEGIN = """
SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint, pg_export_snapshot(),
       pg_database_size(current_database()), current_setting('server_version')
"""
_MAY = """
SELECT rolsuper OR (rolcreatedb AND COALESCE((SELECT pg_has_role(datdba, 'MEMBER')
    FROM pg_database WHERE datname = $1), true)) FROM pg_roles WHERE rolname = current_user
"""


class PostgresCopier:
    """See Copier. `url` is the direct one: no pooler in between."""

    kind = "postgresql"

    def __init__(self, url: str, clock: Clock) -> None:
        self._url = url
        self._clock = clock
        self._address = parse_address(url)
        self._name = _database_of(url)

    @property
    def shown(self) -> str:
        return f"postgresql: {self._address.shown}"

    async def size(self) -> int:
        try:
            async with self._session() as session:
                return int(await session.fetchval("SELECT pg_database_size(current_database())"))
        except StoreAbsent:
            return 0

    async def identity(self) -> Identity | None:
        await self._heal()
        try:
            async with self._session() as session:
                row = await session.fetchrow("SELECT incarnation, generation, role FROM store")
        except (StoreAbsent, StoreForeign, StoreDamaged):
            return None
        return Identity(*row) if row is not None else None

    async def dump(
        self, folder: Path, *, bytes_per_s: int = 0, advance: Advance | None = None
    ) -> tuple[Path, Cut]:
        target = folder / DUMP
        try:
            async with self._session() as session:
                program = await find("pg_dump", _major(session))
                async with session.transaction(isolation="repeatable_read", readonly=True):
                    cut, snapshot = await _cut(session)
                    words = [program, "--format=custom", "--compress=0", f"--snapshot={snapshot}"]
                    words += ["--no-owner", "--no-privileges"]
                    with reached(_dsn(self._address, session)) as reach, target.open("xb") as file:
                        writing = _Writing(file, cut.size_bytes, self._clock)
                        writing.bytes_per_s, writing.advance = bytes_per_s, advance
                        command = [*words, f"--dbname={reach.dsn}"]
                        await pour(command, writing.take, inherited=reach.inherited)
                        await asyncio.to_thread(os.fsync, file.fileno())
        except OSError as error:
            await asyncio.to_thread(target.unlink, missing_ok=True)
            raise translate(error, self._address.shown) from error
        except BaseException:
            await asyncio.to_thread(target.unlink, missing_ok=True)
            raise
        return target, cut

    async def check_dump(self, dump: Path) -> str:
        try:
            program = await find("pg_restore", 0)
            said = await run([program, "--list", str(dump)])
            if "TABLE DATA public journal" not in said and " journal " not in said:
                return "it holds no journals"
            await run([program, "--file=/dev/null", str(dump)])
        except StoreError as error:
            return error.message
        return ""

    async def load(self, dump: Path, *, advance: Advance | None = None) -> PostgresAside:
        async def fill(aside: PostgresAside, session: Connection) -> None:
            program = await find("pg_restore", _major(session))
            words = [program, "--exit-on-error", "--no-owner", "--no-privileges", "--jobs=2"]
            with reached(aside.dsn) as reach:
                command = [*words, f"--dbname={reach.dsn}", str(dump)]
                await run(command, inherited=reach.inherited)
            if advance is not None:
                size = (await asyncio.to_thread(dump.stat)).st_size
                advance(size, size)

        return await self._aside(fill)

    async def empty(self) -> PostgresAside:
        async def fill(aside: PostgresAside, session: Connection) -> None:
            """The tables are made when it is prepared."""

        return await self._aside(fill)

    async def kept(self) -> list[str]:
        return await self._named("old")

    async def drop(self, name: str) -> None:
        if name not in await self.kept():
            raise NotFound(f"{self._address.shown} keeps no {name}")
        async with self._session("postgres") as session:
            await session.execute(f"DROP DATABASE IF EXISTS {_quoted(name)} WITH (FORCE)")

    async def leftovers(self) -> list[str]:
        ours = "SELECT datconnlimit = $2 FROM pg_database WHERE datname = $1"
        async with self._session("postgres") as session:
            return [
                name
                for name in await self._named("restore")
                if await session.fetchval(ours, name, _OURS) and await _is_free(session, name)
            ]

    # -- how ----------------------------------------------------------------------------------

    async def _aside(
        self, fill: Callable[[PostgresAside, Connection], Awaitable[None]]
    ) -> PostgresAside:
        await self._heal()
        for name in await self.leftovers():
            async with self._session("postgres") as session:
                await session.execute(f"DROP DATABASE IF EXISTS {_quoted(name)} WITH (FORCE)")
        name = f"{_base(self._name)}_restore_{self._clock.random_bytes(4).hex()}"
        aside = await PostgresAside.make(self._url, name, self._clock)
        try:
            async with self._session(name) as session:
                await fill(aside, session)
                await _prepare(session, self._clock, aside.shown)
        except BaseException:
            await aside.discard()
            raise
        return aside

    async def _named(self, word: str) -> list[str]:
        async with self._session("postgres") as session:
            rows = await session.fetch("SELECT datname FROM pg_database ORDER BY datname")
        begin, ending = f"{_base(self._name)}_{word}_", re.compile(_NAMES[word])
        names = [row[0] for row in rows if row[0].startswith(begin)]
        return [name for name in names if ending.fullmatch(name.removeprefix(begin))]

    async def _heal(self) -> None:
        """Let people in again where a restore died after it had closed the door."""
        async with self._session("postgres") as session:
            closed = "SELECT NOT datallowconn FROM pg_database WHERE datname = $1"
            if await session.fetchval(closed, self._name) and await _is_free(session, self._name):
                await session.execute(
                    f"ALTER DATABASE {_quoted(self._name)} ALLOW_CONNECTIONS true"
                )

    def _session(self, database: str = "") -> contextlib.AbstractAsyncContextManager[Connection]:
        return session_of(self._address, database)


class _Writing:
    """pg_dump's output on its way into a file, at most so fast."""

    def __init__(self, file: BinaryIO, total: int, clock: Clock) -> None:
        self._file = file
        self._total = total
        self._clock = clock
        self._begun = clock.monotonic()
        self._done = 0
        self.bytes_per_s = 0
        self.advance: Advance | None = None

    async def take(self, piece: bytes) -> None:
        """Write a piece. Raises OSError."""
        await asyncio.to_thread(self._file.write, piece)
        self._done += len(piece)
        if self.advance is not None:
            self.advance(min(self._done, self._total), self._total)
        if self.bytes_per_s:
            ahead = self._done / self.bytes_per_s - (self._clock.monotonic() - self._begun)
            if ahead > 0:
                await self._clock.sleep(ahead)


class PostgresAside:
    """Another database of the live store's server."""

    def __init__(self, url: str, name: str, clock: Clock, *, holder: Connection, dsn: str) -> None:
        self._url = url
        self._name = name
        self._clock = clock
        self._address = parse_address(url)
        self._live = _database_of(url)
        self._holder = holder
        self.dsn = dsn

    @classmethod
    async def make(cls, url: str, name: str, clock: Clock) -> Self:
        """Create the database. Raises StoreDenied when we may not, before anything is done."""
        address = parse_address(url)
        holder, _ = await connect(_in(address, "postgres"), settings=_PATIENT)
        try:
            if not await holder.fetchval(_MAY, _database_of(url)):
                raise StoreDenied(
                    f"to restore, the user must own {_database_of(url)} and may create databases",
                    hint="ALTER ROLE ... CREATEDB, and ALTER DATABASE ... OWNER TO it",
                )
            await holder.execute("SELECT pg_advisory_lock($1)", _key(name))
            await holder.execute(
                f"CREATE DATABASE {_quoted(name)} TEMPLATE template0 CONNECTION LIMIT {_OURS}"
            )
        except BaseException as error:
            holder.terminate()
            if isinstance(error, _TROUBLE):
                raise translate(error, address.shown) from error
            raise
        return cls(url, name, clock, holder=holder, dsn=_dsn(_in(address, name), holder))

    @property
    def url(self) -> str:
        return _url_in(self._url, self._name)

    @property
    def shown(self) -> str:
        return f"{self._name}, beside {self._address.shown}"

    def store(self) -> Database:
        node_id = f"copy-{self._clock.random_bytes(6).hex()}"
        return PostgresStore(self.url, node_id=node_id, clock=self._clock, may_copy=True)

    def tables(self) -> PostgresTables:
        return PostgresTables(self.url)

    async def take_over(
        self, identity: Identity, *, last: Callable[[Database], Awaitable[None]] | None = None
    ) -> str:
        try:
            return await self._take_over(identity, last)
        except _TROUBLE as error:
            raise translate(error, self._address.shown) from error

    async def discard(self) -> None:
        with contextlib.suppress(StoreError, *_TROUBLE):
            async with session_of(self._address, "postgres") as session:
                await session.execute(f"DROP DATABASE IF EXISTS {_quoted(self._name)} WITH (FORCE)")
        self._holder.terminate()

    # -- how ----------------------------------------------------------------------------------

    async def _take_over(
        self, identity: Identity, last: Callable[[Database], Awaitable[None]] | None
    ) -> str:
        holder = self._holder
        exists = "SELECT EXISTS (SELECT FROM pg_database WHERE datname = $1)"
        if not await holder.fetchval(exists, self._live):
            await self._identify(identity)
            await self._empty_out(self._name)
            await self._rename("")
            self._holder.terminate()
            return ""
        old = await self._free_name()
        await holder.execute("SELECT pg_advisory_lock($1)", _key(self._live))
        try:
            async with self._closed():
                if last is not None:
                    await self._look(last)
                await self._empty_out(self._live)
                await self._identify(identity)
                await self._empty_out(self._name)
                await self._rename(old)
        finally:
            with contextlib.suppress(*_TROUBLE):
                await holder.execute("SELECT pg_advisory_unlock($1)", _key(self._live))
        self._holder.terminate()
        return old

    @asynccontextmanager
    async def _closed(self) -> AsyncIterator[None]:
        """Nobody gets into the live database; on failure everybody does again."""
        door = f"ALTER DATABASE {_quoted(self._live)} ALLOW_CONNECTIONS"
        try:
            self._reader = await self._open_reader()
            await self._holder.execute(f"{door} false")
            await self._empty_out(self._live, keep=self._reader_pid)
            yield
        except BaseException:
            await self._close_reader()
            async with session_of(self._address, "postgres") as session:
                await session.execute(f"{door} true")
            raise

    async def _open_reader(self) -> PostgresStore | None:
        """The one connection that stays: opened before the door is closed."""
        self._reader_pid = 0
        reader = PostgresStore(
            self._url, node_id="restore", clock=self._clock, pool_size=1, may_copy=True
        )
        try:
            await reader.open_as_client()
            self._reader_pid = await reader.reader_pid()
        except (StoreAbsent, StoreForeign, StoreDamaged):
            await reader.close()
            return None
        return reader

    async def _look(self, last: Callable[[Database], Awaitable[None]]) -> None:
        if self._reader is not None:
            await last(self._reader)

    async def _close_reader(self) -> None:
        reader, self._reader = getattr(self, "_reader", None), None
        if reader is not None:
            await reader.close()

    async def _identify(self, identity: Identity) -> None:
        where = session_of(self._address, self._name)
        async with where as session, session.transaction():
            await session.execute(
                "UPDATE store SET incarnation = $1, generation = $2, role = $3",
                *(identity.incarnation, identity.generation, identity.role),
            )
            for table in ("nodes", "commits"):  # who lives, and what servers have counted
                await session.execute(f"DELETE FROM {table}")  # noqa: S608 (names of ours)

    async def _empty_out(self, name: str, *, keep: int = 0) -> None:
        """End every session of a database, and wait until they are gone."""
        if name == self._live and not keep:
            await self._close_reader()
        deadline = self._clock.monotonic() + _PATIENCE_S
        ending = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
        ending += "WHERE datname = $1 AND pid <> $2 AND pid <> pg_backend_pid()"
        while await self._holder.fetchval(ending, name, keep):
            if self._clock.monotonic() > deadline:
                raise StoreError(
                    f"sessions of {name} do not end", hint="SELECT * FROM pg_stat_activity"
                )
            await self._clock.sleep(_LOOK_S)

    async def _rename(self, old: str) -> None:
        """The one transaction that changes what the live store's name means."""
        async with self._holder.transaction():
            if old:
                await self._holder.execute(
                    f"ALTER DATABASE {_quoted(self._live)} RENAME TO {_quoted(old)}"
                )
                await self._holder.execute(f"ALTER DATABASE {_quoted(old)} ALLOW_CONNECTIONS true")
            await self._holder.execute(
                f"ALTER DATABASE {_quoted(self._name)} RENAME TO {_quoted(self._live)}"
            )
            await self._holder.execute(f"ALTER DATABASE {_quoted(self._live)} CONNECTION LIMIT -1")

    async def _free_name(self) -> str:
        moment = datetime.fromtimestamp(self._clock.now_us() / MICROSECONDS, UTC)
        taken = {row[0] for row in await self._holder.fetch("SELECT datname FROM pg_database")}
        first = name = f"{_base(self._live)}_old_{moment:%Y%m%d_%H%M%S}"
        number = 1
        while name in taken:
            number += 1
            name = f"{first}_{number}"
        return name


# -- sessions -------------------------------------------------------------------------------------


@asynccontextmanager
async def session_of(address: Address, database: str = "") -> AsyncIterator[Connection]:
    """A connection to the leader, with patience. Raises StoreError's subclasses only."""
    where = _in(address, database) if database else address
    connection, _ = await connect(where, settings=_PATIENT)
    try:
        yield connection
    except _TROUBLE as error:
        raise translate(error, where.shown) from error
    finally:
        connection.terminate()


async def _prepare(session: Connection, clock: Clock, shown: str) -> None:
    """Tables, brought up to date; and the mark that it is a copy."""
    await prepare(session, clock, shown=shown, may_create=True)
    await session.execute("UPDATE store SET role = $1", Role.COPY.value)


async def _cut(session: Connection) -> tuple[Cut, str]:
    """What the transaction sees, and the name under which pg_dump sees the same."""
    taken_at, snapshot, size, server = await session.fetchrow(_BEGIN)
    counts = {
        table: await session.fetchval(f"SELECT count(*) FROM {table}")  # noqa: S608 (a name)
        for table in TABLES
    }
    schema = await session.fetchval("SELECT max(version) FROM schema_version")
    incarnation, generation = await session.fetchrow("SELECT incarnation, generation FROM store")
    epoch = await session.fetchval("SELECT coalesce(max(epoch), 0) FROM runs")
    heads = [
        RunHead(run_id, seq, digest.hex(), state)
        for run_id, state, seq, digest in await session.fetch(_HEADS, _FINAL)
    ]
    chains = [ChainHead(name, n, end.hex()) for name, n, end in await session.fetch(_CHAINS)]
    cut = Cut(
        "postgresql",
        schema,
        server,
        size,
        incarnation,
        generation,
        epoch,
        taken_at,
        counts,
        heads,
        chains,
    )
    return cut, snapshot


async def _is_free(session: Connection, name: str) -> bool:
    """True when nobody holds the advisory lock of a name."""
    if not await session.fetchval("SELECT pg_try_advisory_lock($1)", _key(name)):
        return False
    await session.execute("SELECT pg_advisory_unlock($1)", _key(name))
    return True


# -- names ----------------------------------------------------------------------------------------


def _key(name: str) -> int:
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "big", signed=True)


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _base(name: str) -> str:
    """What the names beside a database's begin with: a long one's own, not its neighbours'."""
    content = name.encode()
    if len(content) <= _BASE_MAX:
        return name
    digest = blake2b(content, digest_size=4).hexdigest()
    return content[: _BASE_MAX - 9].decode(errors="ignore") + f"_{digest}"


def _database_of(url: str) -> str:
    return unquote(urlsplit(url).path.removeprefix("/"))


def _url_in(url: str, database: str) -> str:
    return urlsplit(url)._replace(path=f"/{database}").geturl()


def _in(address: Address, database: str) -> Address:
    """Another database on the same hosts."""
    hosts = tuple(_url_in(host, database) for host in address.hosts)
    return Address(hosts, f"{database}, beside {address.shown}")


def _major(session: Connection) -> int:
    return int(session.get_server_version().major)


def _dsn(address: Address, session: Connection) -> str:
    """The DSN of the host that a connection is to."""
    peer = session._addr  # noqa: SLF001 (the driver has no word for it)
    for dsn in address.hosts:
        parts = urlsplit(dsn)
        if isinstance(peer, tuple) and (parts.hostname, parts.port or 5432) == tuple(peer[:2]):
            return dsn
    return address.hosts[0]
